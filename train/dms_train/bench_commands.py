"""`dms bench ...`. Heavy imports are inside the commands, as in `cli`."""

from typing import Annotated, Any

import typer

from dms.errors import writing
from dms.requirements import require
from dms_train.environment import RETROFIT_NEEDS, prepare

bench = typer.Typer(help="Measure on this machine the time and memory that evict mode saves.", no_args_is_help=True)


@bench.command("cache")
def bench_cache(
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; repeat it. Default: 1 and 4.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; repeat it. Default: 4096, 8192 and 16384.")] = None,
    evicted: Annotated[list[float] | None, typer.Option(help="Share of tokens evicted; repeat it. Default: 0.75 and 0.875.")] = None,
    window: Annotated[
        list[str] | None, typer.Option(metavar="TOKENS", help="Window, or several such as 32,128,512; repeat it to compare. Default: 256.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the random model. Default: 8.")] = None,
    prefill: Annotated[bool, typer.Option(help="Measure prefill too, which takes longest.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny shape, to see that it works; its figures say nothing.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result rows to this file.")] = None,
) -> None:
    """Time and memory of the compacted cache beside two dense ones: decoding, attention alone, prefill."""
    prepare("auto")
    from dms.benchmarks.cache import benchmark_for, run

    given = benchmark_for(batch=batch, context=context, evicted=evicted, window=window, layers=layers, prefill=prefill, quick=quick)
    run(given, json_file)


@bench.command("decode")
def bench_decode(
    model: Annotated[str, typer.Argument(help="A retrofitted model folder, such as RUN/model, or gates alone (with --base).")],
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; repeat it. Default: 4096.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; repeat it. Default: 1 and 4.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; repeat it. Default: float32.")] = None,
    evict_bias: Annotated[
        list[float] | None, typer.Option(help="Added to every gate's logit, so that above 0 more is evicted; repeat it. Default: 0.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A file or folder of text to read. Default: held-out standard-library sources.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that are decoded and timed.")] = 32,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Where MODEL is gates alone: the model that they go with.")] = None,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Accept another form of the model that the gates were trained on.")
    ] = False,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result rows to this file.")] = None,
) -> None:
    """Memory and tokens/s of a retrofitted model that decodes after long contexts, beside the same model dense."""
    prepare("auto")
    from dms.benchmarks.decoding import DecodeBenchmark, run

    given = {"context": context, "batch": batch, "dtype": dtype, "evict_bias": evict_bias}
    lists: dict[str, Any] = {name: tuple(dict.fromkeys(values)) for name, values in given.items() if values}
    run(DecodeBenchmark(model=model, base=base, other_base=other_base, text=text, steps=steps, **lists), json_file)


@bench.command("prefixes")
def bench_prefixes(
    context: Annotated[list[int] | None, typer.Option(help="Tokens of a document; repeat it. Default: 2048, 8192 and 32768.")] = None,
    evicted: Annotated[float, typer.Option(help="Share of tokens evicted.")] = 0.875,
    window: Annotated[str, typer.Option(metavar="TOKENS", help="Window, or several such as 32,128,512.")] = "256",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny shape, to see that it works; its figures say nothing.")] = False,
) -> None:
    """Seconds and bytes of reading a document again from a `PrefixStore`, beside reading it by a random model."""
    prepare("auto")
    from dms.benchmarks.prefixes import run

    run(context or (), evicted, window, quick)


@bench.command("idle")
def bench_idle(
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a conversation. Default: 2048.", show_default=False)] = None,
    conversations: Annotated[int, typer.Option(min=2, help="Conversations that take turns.")] = 10,
    on_device: Annotated[int, typer.Option(min=1, help="How many of them the bound allows on the device.")] = 4,
    evicted: Annotated[float, typer.Option(help="Share of tokens evicted.")] = 0.875,
    window: Annotated[str, typer.Option(metavar="TOKENS", help="Window, or several such as 32,128,512.")] = "256",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny shape, to see that it works; its figures say nothing.")] = False,
) -> None:
    """Seconds and bytes of conversations that take turns under a bound, of which the longest idle leave the device and come back."""
    prepare("auto")
    from dms.benchmarks.idle import run

    run(context, conversations, on_device, evicted, window, quick)


@bench.command("batching")
def bench_batching(
    model: Annotated[str, typer.Option(help="A folder, a hub id, a GGUF file, or builtin:tiny; its gates are random.")] = "builtin:tiny",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns, whose medians the figures are.")] = 3,
) -> None:
    """Tokens/s of continuous batching beside `generate` over left-padded batches, for texts of mixed lengths."""
    prepare("auto")
    from dms.benchmarks.batching import BatchingBenchmark, run

    run(BatchingBenchmark(model=model, num_prompts=num_prompts, batch_size=batch_size, repeats=repeats))


@bench.command("retrofit", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench_retrofit(context: typer.Context) -> None:
    """Time and memory of one retrofit step of a random Qwen3-8B, beside FlexAttention and a loss over whole logits."""
    prepare("auto")
    from dms_train.bench_retrofit import main as measure

    measure(context.args)


@bench.command("gates")
def bench_gates(
    comparison: Annotated[
        str, typer.Argument(metavar="COMPARISON.yaml", help="What is compared: a path, or a packaged file such as tiny/compare-gates.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as processes=2 seeds=[0].", show_default=False)] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Show and draw what is measured; start and evaluate nothing.")] = False,
) -> None:
    """Train variants of a recipe over ratios and seeds, and compare their gates at equal memory; repeated, it continues."""
    require("dms bench gates", *RETROFIT_NEEDS)
    prepare("auto")
    from dms_train.bench_gates import GateComparison, run
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(comparison, overrides or [], GateComparison)

    with writing(loaded.output_dir):
        complete = run(loaded, table_only=table_only)
    if not complete and not table_only:
        raise typer.Exit(1)
