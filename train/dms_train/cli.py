"""The `dms` command. Heavy imports are inside the commands, so that --help is instant."""

import json
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dms.errors import writing
from dms.requirements import require
from dms_train.bench_commands import bench
from dms_train.compare_command import compare
from dms_train.environment import RETROFIT_NEEDS, is_bfloat16, prepare, prepare_bfloat16
from dms_train.evaluate_options import split_list, split_numbers, split_settings
from dms_train.exit_codes import run_command

app = typer.Typer(
    help="Retrofit a pretrained LLM with learned KV-cache eviction (Dynamic Memory Sparsification).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command()(compare)


class ExportFormat(str, Enum):
    hf = "hf"
    merged = "merged"
    gates = "gates"
    nvidia = "nvidia"
    fastdms = "fastdms"
    hipengine = "hipengine"


Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as target_cr=8 dms.window=64.", show_default=False)]

Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Where MODEL is a folder of gates alone, such as RUN/gates: the model that they go with.", show_default=False
    ),
]
OtherBase = Annotated[
    bool,
    typer.Option(
        "--other-base",
        help="Accept another form of the model that the gates were trained on: from another place, in another dtype or quantisation.",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto",
        help="For weights that do not fit on the device: auto fills the GPU, then host memory, then the disk; also balanced, balanced_low_0, sequential.",
        show_default=False,
    ),
]
OffloadFolder = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="With --device-map: where weights on disk are written that the model's files hold in another form.",
        show_default=False,
    ),
]
Window = Annotated[
    str,
    typer.Option(
        metavar="TOKENS",
        help="In place of the windows that the gates were trained with, and as many: for longer texts windows in proportion, such as 128,512,2048.",
        show_default=False,
    ),
]


@app.command()
def retrofit(
    recipe: Annotated[str, typer.Argument(help="A path, or a packaged name such as tiny/retrofit.")], overrides: Overrides = None
) -> None:
    """Train gates that decide which KV entries to evict, by distillation; write the model, its evaluation and a report."""
    from dms_train.recipe import RetrofitRecipe
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], RetrofitRecipe)
    require("dms retrofit", *RETROFIT_NEEDS)
    prepare(loaded.precision)
    from dms_train.loop import run

    with writing(loaded.output_dir):
        run(loaded)


@app.command("cache-teacher")
def cache_teacher(
    recipe: Annotated[str, typer.Argument(help="A path, or a packaged name such as tiny/retrofit; it names teacher_cache.path.")],
    overrides: Overrides = None,
    part: Annotated[
        str, typer.Option(help="I/N: process every N-th sequence from the I-th (from 0), to share the work among N devices.")
    ] = "0/1",
) -> None:
    """Cache the teacher's log-probabilities of a recipe's training data, once for all runs on it; repeated, it continues."""
    from dms_train.recipe import RetrofitRecipe
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], RetrofitRecipe)
    index, slash, number = part.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ValueError(f"--part is {part!r}; write I/N with I from 0 to N - 1, such as 0/8")
    require("dms cache-teacher", "accelerate")
    prepare(loaded.precision)
    from dms_train.cache_teacher import write

    with writing(loaded.teacher_cache.path if loaded.teacher_cache else ""):
        write(loaded, part=int(index), num_parts=int(number))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A path, a packaged name such as qwen3-8b, or `all`: every packaged recipe, a row each.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="h100-80, h200, a100-80, l40s or rtx4090.")] = "h100-80",
    num: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="The model's config.json, or a folder with it (or with a NAME.json for each model). Default: from the hub."
        ),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the plan to this file.")] = None,
) -> None:
    """Estimate a run before it starts: FLOPs, memory by kind, seconds and GPU hours of every choice, and which one to take."""
    prepare("auto")
    from dms.console import make_console
    from dms_train.plan_command import run

    run(recipe, overrides or [], gpu=gpu, num_gpus=num, config=config, json_file=json_file, console=make_console())


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A path, or a packaged name such as tiny/pretrain.")], overrides: Overrides = None
) -> None:
    """Train the small embedded model from scratch; repeated, it continues from its last checkpoint."""
    from dms_train.recipe import PretrainRecipe
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], PretrainRecipe)
    prepare(loaded.precision)
    from dms_train.pretrain import run

    with writing(loaded.output_dir):
        run(loaded)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder that dms wrote, such as RUN/model, or a repository on the hub.")],
    evict_bias: Annotated[
        float, typer.Option(help="Added to every gate's logit: above 0 evicts more than was trained, below 0 less.")
    ] = 0.0,
) -> None:
    """Serve a retrofitted model with vLLM; further options are those of `vllm serve`."""
    from dms_vllm.command import run

    run(model, evict_bias, context.args)


@app.command("generate-data")
def generate_data(
    recipe: Annotated[str, typer.Argument(help="A path, or a packaged name such as tiny/generate.")], overrides: Overrides = None
) -> None:
    """Write the dense model's own completions of prompts as training data; repeated, it continues."""
    from dms_train.recipe import GenerateRecipe
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [], GenerateRecipe)
    prepare(loaded.precision)
    from dms_train.generate_data import run

    with writing(loaded.output):
        run(loaded)


# Unknown options reach the command, which says where one that moved is now.
@app.command(context_settings={"ignore_unknown_options": True})
def evaluate(
    model: Annotated[str, typer.Argument(help="A retrofitted model folder, such as RUN/model, or gates alone (with --base).")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS.yaml] [key=value ...]",
            help="A settings file, or a packaged one such as tiny/evaluate, which lists all keys; and overrides, such as "
            "num_documents=32 scaling.max_k=8. Where an option below sets the same thing, the option wins.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Of dense, dms, sliding_window, h2o, tova, snapkv, keydiff, random, which are the default, and random_attention, "
            "expected_attention, kvzip, ada_snapkv, ada_expected_attention, ada_kvzip, which run only where they are named."
        ),
    ] = "",
    tasks: Annotated[
        str,
        typer.Option(
            help="Suites (the key `suites`): of needle, records, passages, classification, words, text, one_pass; or none. "
            "Default: all but one_pass, which is the evaluation at a run's end."
        ),
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Tokens of a document. Default: half of the model's context and all of it, up to 8192.")
    ] = "",
    evict_bias: Annotated[
        list[float] | None, typer.Option(help="Added to every gate's logit: above 0 evicts more. Repeat it to measure several points.")
    ] = None,
    kv_dtype: Annotated[
        list[str] | None, typer.Option(help="Also dms with pages of int8, fp8 or int4 (the policy dms_int4). Repeat it for several.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write; repeated, it goes on there. Default: RUN/evaluation.")] = None,
    text: Annotated[str | None, typer.Option(help="A file or folder of running text. Default: held-out standard-library sources.")] = None,
    lm_eval: Annotated[
        str, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, dense and dms: gsm8k,hellaswag (lm_eval.tasks).")
    ] = "",
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder of harness tasks of your own (lm_eval.include_path).")
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also accuracy of k sampled chains against the KV entries that they read (scaling.*).")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes on two cores: fewer documents, at one length.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where nothing was evicted, a budget was missed, dense is at chance, or samples are few.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the measured points into the model's README.md.")] = False,
    window: Window = "",
    base: Base = None,
    other_base: OtherBase = False,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadFolder = None,
) -> None:
    """Measure a saved model beside dense and beside training-free policies, in prefill and decode, at the same budget."""
    name, overrides = split_settings(settings or [])
    # As overrides after all others: an option wins over a file and a key.
    for key, value in {
        "policies": split_list(policies) or None,
        "suites": [] if tasks == "none" else split_list(tasks) or None,
        "lengths": split_numbers("--lengths", lengths) or None,
        "evict_bias": evict_bias or None,
        "kv_dtype": kv_dtype or None,
        "text": text,
        "lm_eval.tasks": split_list(lm_eval) or None,
        "lm_eval.include_path": include_path,
        "quick": quick or None,
    }.items():
        if value is not None:
            # JSON is YAML.
            overrides.append(f"{key}={json.dumps(value)}")
    prepare("auto")
    from dms.evaluation.command import default_out, evaluate_folder, failures
    from dms.evaluation.engine.settings import EvaluationSettings, ScalingSettings
    from dms_train.recipe_file import load_recipe

    loaded = load_recipe(name, overrides, EvaluationSettings)
    if loaded.dtype == "bfloat16":
        prepare_bfloat16()
    if scaling and loaded.scaling is None:
        loaded = loaded.model_copy(update={"scaling": ScalingSettings()})
    windows = split_numbers("--window", window) or None
    with writing(out or default_out(model)):
        result = evaluate_folder(
            model,
            loaded,
            base=base,
            other_base=other_base,
            window=windows,
            out=out,
            card=card,
            device_map=device_map,
            offload_folder=offload_folder,
        )
    if strict and (found := failures(result)):
        print("dms: --strict:", *found, sep="\n  ", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="A retrofitted model folder, such as RUN/model, or gates alone (with --base). With --dense: any model.")
    ],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; with --chat, what is asked.", show_default=False)] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Through the tokenizer's chat template: --prompt is one turn; without it, a conversation on the terminal."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system's message of a conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    evict_bias: Annotated[float, typer.Option(help="Added to every gate's logit: above 0 evicts more.")] = 0.0,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="int8, fp8 or int4: entries beyond the window take a byte, or about half of one, a number; model: the model's own dtype. "
            "Default: as the gates were trained."
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Nothing is evicted: a retrofitted model without its gates, or a plain model.")
    ] = False,
    window: Window = "",
    base: Base = None,
    other_base: OtherBase = False,
    device_map: DeviceMapOption = None,
    offload_folder: OffloadFolder = None,
) -> None:
    """Stream a continuation, or hold a conversation, and print how many KV entries are alive."""
    prepare("bf16" if is_bfloat16(base or model) else "auto")
    from dms_train.generate_command import run

    run(
        model,
        prompt,
        chat=chat,
        system=system,
        base=base,
        other_base=other_base,
        window=split_numbers("--window", window) or None,
        dense=dense,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        evict_bias=evict_bias,
        kv_dtype=kv_dtype,
        device_map=device_map,
        offload_folder=offload_folder,
    )


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, a model folder such as RUN/model, or gates alone (with --base).")
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="hf: for everyone; transformers loads it with trust_remote_code=True, evicting, without dms. "
            "merged: the weights, with all that was trained in them, and the gates, without code, for those who have dms. "
            "gates: the gates alone, for those who have dms and the base. "
            "nvidia, fastdms, hipengine: for the DMS code of other projects; what they cannot represent is refused."
        ),
    ] = ExportFormat.hf,
    max_shard_size: Annotated[str, typer.Option(help="Weights in larger files are divided.")] = "5GB",
    at_cr: Annotated[
        float | None,
        typer.Option(help="A ratio snapshot: the run as it was when its schedule passed this ratio (save.at_cr). Default: its end."),
    ] = None,
    base: Base = None,
    other_base: OtherBase = False,
    reference_vectors: Annotated[
        bool,
        typer.Option(
            "--reference-vectors",
            help="Also write inputs of gates and cache with the decisions, visibility and outputs that must follow, for tests of an implementation "
            "in another engine. Runs the model in float32 on the CPU.",
        ),
    ] = False,
) -> None:
    """Write a retrofitted model as a folder to share: with code, without code, or the gates alone."""
    prepare("auto")
    from dms.export.folder import export as write

    with tempfile.TemporaryDirectory() as snapshot:
        if at_cr is not None:
            from dms_train.ratio_snapshots import write_snapshot

            with writing(snapshot):
                source = str(write_snapshot(source, at_cr, Path(snapshot) / "run"))
        with writing(out):
            files = write(
                source,
                out,
                format=format.value,
                max_shard_size=max_shard_size,
                base=base,
                other_base=other_base,
                reference_vectors=reference_vectors,
            )
    total = sum(file.stat().st_size for file in files if file.is_file())
    print(f"wrote {out}: {len(files)} files, {total / 1e6:,.1f} MB, format {format.value}")


@app.command("import")
def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|HUB-ID", help="A DMS checkpoint of NVIDIA's, FastDMS' or hipEngine's, such as nvidia/Qwen3-8B-DMS-8x."
        ),
    ],
    out: Annotated[str, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
    window: Annotated[int | None, typer.Option(metavar="TOKENS", help="As the others: for what the checkpoint's files leave out.")] = None,
    alignment: Annotated[str | None, typer.Option(help="own or next.")] = None,
    scale: Annotated[float | None, typer.Option()] = None,
    offset: Annotated[float | None, typer.Option()] = None,
    tau: Annotated[float | None, typer.Option()] = None,
    target_cr: Annotated[float | None, typer.Option(help="The ratio that it was trained to.")] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="What its gates were trained on, where its card does not say.")] = None,
    licence: Annotated[str | None, typer.Option("--license", metavar="ID", help="Its licence, where its card names none.")] = None,
) -> None:
    """Write a DMS checkpoint of another project as a folder that every command takes; its code does not run."""
    prepare("auto")
    from dms.formats.importing import import_checkpoint as write

    settings = {"window": window, "alignment": alignment, "scale": scale, "offset": offset, "tau": tau, "target_cr": target_cr}
    given = {name: value for name, value in settings.items() if value is not None}
    with writing(out):
        done = write(source, out, given=given, base=base, licence=licence)
    for note in done.foreign.notes:
        print(f"note: {note}")
    print(f"licence: {', '.join(done.licence.values()) or 'none is named; give it with --license where you know it'}")
    told = ", ".join(f"{name} {value}" for name, value in done.foreign.config.to_dict().items())
    print(f"wrote {out}: {done.foreign.format} ({told})")


@app.command()
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE|CONFIG.json", help="A model folder, hub id, GGUF file or builtin:tiny; a recipe; or a config.json."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="h100-80, h200, a100-80, l40s or rtx4090.")] = "h100-80",
    num: Annotated[int, typer.Option(min=1, help="GPUs that share the model by tensor parallelism.")] = 1,
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens; repeat it. Default: 4096 to 131072, up to the model's own context.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences at once; repeat it. Default: 1, 8, 32 and 64.")] = None,
    cr: Annotated[list[float] | None, typer.Option(help="Eviction ratio of decided tokens; repeat it. Default: 2, 4, 8 and 16.")] = None,
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option(help="What pages hold: model (16 bits), int8, fp8 or int4; repeat it. Default: model, int8 and int4."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Tokens that stay visible. Default: the recipe's or the model's, else 256.")
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="16, 8 or 4: bits of matrices. None: as the model's configuration has them, 16 if not quantised.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="PATH", help="The model's config.json, or a folder with it (or with a NAME.json for each model).")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write every number to this file.")] = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw the roofline and the memory wall.")] = None,
) -> None:
    """Where inference of a model stands on a GPU's roofline, when KV reads overtake weight reads, and what eviction gives."""
    prepare("auto")
    from dms.console import make_console
    from dms_train.analyze_command import run

    run(
        model,
        gpu=gpu,
        num_gpus=num,
        contexts=context or [],
        batches=batch or [],
        ratios=cr or [],
        kv_dtypes=kv_dtype or [],
        window=window,
        weight_bits=weight_bits,
        config=config,
        json_file=json_file,
        plot=plot,
        console=make_console(),
    )


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `dms evaluate --out` wrote, or a run's folder.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The page to write. Default: DIR/report.html; pictures go to report/ beside it.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the figures, and what an audit needs, into the model's README.md.")
    ] = False,
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where that model lies now. Default: where it was evaluated.")] = None,
) -> None:
    """Write one self-contained page of an evaluation or a run: figures, a table, and which tokens of a document are kept."""
    require("dms report", "matplotlib")
    prepare("auto")
    from dms.console import make_console
    from dms.report.command import run

    with writing(out or Path(folder) / "report.html"):
        run(folder, out, card, model, make_console())


@app.command()
def doctor() -> None:
    """Check versions, devices, compilers and kernels: what works here, and what each missing piece costs."""
    from dms import doctor as checks

    raise typer.Exit(checks.main())


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
