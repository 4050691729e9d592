"""`dms bench retrofit`: one retrofit step of a random model, ours beside the same step with FlexAttention and whole logits.

Every weight is random and so are the tokens; gates are set so that each head evicts its share. What is timed is a micro-batch of one
row, teacher pass to backward, and the gates' optimizer step.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedConfig

from dms.benchmarks.model import evict_shares, keep_shares, qwen3_8b
from dms.benchmarks.timing import seconds_of
from dms.config import DMSConfig
from dms.console import make_console
from dms.costs import activations, flops, hardware, memory, shapes
from dms.costs.job import Choice, Job
from dms.costs.stand_in_attention import replaced_attention
from dms.errors import writing
from dms.evaluation.stats.rows import describe_device, versions
from dms.lm_head import head_parameters
from dms.retrofitting import gate_parameters, retrofit
from dms.training.activation_checkpointing import enable_checkpointing
from dms_train.step import HeadLoss, Normalizer, distill_step

# Changes to Qwen3-8B that make it small enough for a test.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 211,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """What is measured."""

    config: dict[str, Any]
    length: int = 32768
    window: int = 512
    evicted: float = 0.875
    """Mean share of tokens that gates evict."""
    layers: int | None = None
    """None: as many as the configuration says."""
    repeats: int = 2
    """Steps after the first, whose median counts."""


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What a step took."""

    name: str
    seconds: float | None
    """None: it ran out of memory."""
    peak_bytes: int | None
    """None: it ran out of memory, or on a CPU."""
    kl: float | None
    """Of its first step, to compare."""
    steps: int = 0
    """Whose median the seconds are."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the plan says of a step."""

    peak_bytes: int
    """Without what is no tensor."""
    flops: float
    """Of ours."""
    dense_flops: float
    """Without eviction."""
    peak_flops: float | None
    """FLOP/s of the GPU; None: it is not in the hardware table."""


def build(settings: StepBenchmark, device: torch.device) -> nn.Module:
    """The random model, bfloat16 on a GPU and float32 elsewhere, with gates that evict their shares."""
    from transformers import AutoModelForCausalLM

    config = _config(settings)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.config.use_cache = False
    model = retrofit(model, DMSConfig(window=settings.window))
    text = config.get_text_config()
    keep_LH = keep_shares(text.num_hidden_layers, text.num_key_value_heads, settings.evicted, seed=0)
    evict_shares(model, keep_LH, seed=0)
    model.train().requires_grad_(False)
    enable_checkpointing(model)
    for parameter in gate_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def _config(settings: StepBenchmark) -> PreTrainedConfig:
    from transformers import AutoConfig

    values = dict(settings.config)
    if settings.layers is not None:
        values["num_hidden_layers"] = settings.layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.max_position_embeddings = max(config.max_position_embeddings, settings.length)
    return config


def make_batch(model: nn.Module, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    head_weight_VM = head_parameters(model)[0]
    ids = torch.randint(head_weight_VM.shape[0], (1, length), generator=generator).to(device)
    return {
        "input_ids": ids,
        "segment_ids": torch.ones_like(ids),
        "position_ids": torch.arange(length, device=device)[None],
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),
        "number": torch.zeros(1, dtype=torch.long, device=device),
    }


class WholeLogitsLoss(HeadLoss):
    """KL(teacher || student) as it is usually written: all logits at once, in float32."""

    def __init__(self, model: nn.Module):
        super().__init__(model, None, beta=0.0, chunk=None)

    def forward(
        self, hidden_s_NM: torch.Tensor, hidden_t_NM: torch.Tensor | None, valid_N: torch.Tensor, *known: torch.Tensor
    ) -> torch.Tensor:
        assert hidden_t_NM is not None and not known, "the teacher's pass is part of the step"
        weight, bias = self.weights[0]
        assert weight is not None
        log_s_NV, log_t_NV = (nn.functional.linear(x, weight, bias).float().log_softmax(-1) for x in (hidden_s_NM, hidden_t_NM))
        return (log_t_NV.exp() * (log_t_NV - log_s_NV)).sum(-1)[valid_N].sum()


def flex_attention(compiled: bool) -> Callable[..., torch.Tensor]:
    """`gated_attention` by FlexAttention with the gate in its score_mod and causal blocks, as NVIDIA's code has it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend(q, k, v, log_keep, *, window, scale, **_):
        gate_BHT, group, T = log_keep.transpose(1, 2).contiguous(), q.shape[2] // k.shape[2], q.shape[1]

        def gated(score, b, h, i, j):
            return torch.where(i - j > window, score + gate_BHT[b, h // group, j].to(score.dtype), score)

        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=q.device)
        x = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return run(*x, score_mod=gated, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return attend


def flex_train_attention(attend: Callable[..., torch.Tensor], query, key, value, *, log_keep_BTH, window, scaling=None, **_):
    """As `dms.training.soft_decisions.train_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, log_keep_BTH, window=window, scale=query.shape[-1] ** -0.5 if scaling is None else scaling)


def take_step(model: nn.Module, batch: dict[str, torch.Tensor], loss: HeadLoss, optimizer: torch.optim.Optimizer) -> float:
    """Returns the KL per token."""
    tokens, device = batch["input_ids"].numel(), batch["input_ids"].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        output = distill_step(
            model,
            None,
            batch,
            head_loss=loss,
            target=1.0,
            normalizer=Normalizer(tokens, 1),
            seed=0,
            compression_weight=1.0,
        )
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(output.kl)


class Contender(NamedTuple):
    """A way to take the step."""

    name: str
    loss: HeadLoss
    attention: AbstractContextManager
    """Within which it attends."""


def contenders(model: nn.Module, device: torch.device) -> dict[str, Contender]:
    """By name, ours first."""
    ours, whole = HeadLoss(model, None, beta=0.0, chunk=None), WholeLogitsLoss(model)
    found = [Contender("ours", ours, nullcontext())]
    if device.type == "cuda":
        flex = partial(flex_train_attention, flex_attention(compiled=True))
        found.append(Contender("FlexAttention, chunked loss", ours, replaced_attention(model, flex)))
        found.append(Contender("FlexAttention, whole logits", whole, replaced_attention(model, flex)))
    else:
        # FlexAttention has no backward on a CPU.
        found.append(Contender("whole logits", whole, nullcontext()))
    return {one.name: one for one in found}


def measure(
    one: Contender,
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    settings: StepBenchmark,
    report: Callable[[StepFigures], None] = lambda figures: None,
) -> StepFigures:
    """report: is told after each step what is known by then."""
    device = batch["input_ids"].device
    is_cuda = device.type == "cuda"
    gates = list(gate_parameters(model).values())
    before = [gate.detach().clone() for gate in gates]
    optimizer = torch.optim.AdamW(gates, lr=1e-6)
    seconds: list[float] = []
    kls: list[float] = []
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def known() -> StepFigures:
        # The first compiles.
        peak = torch.cuda.max_memory_allocated() if is_cuda else None
        return StepFigures(name=one.name, seconds=median(seconds[1:]), peak_bytes=peak, kl=kls[0], steps=len(seconds) - 1)

    try:
        with one.attention:
            for number in range(1 + settings.repeats):
                seconds.append(seconds_of(lambda: kls.append(take_step(model, batch, one.loss, optimizer)), device))
                if number:
                    report(known())
    except torch.cuda.OutOfMemoryError:
        return StepFigures(name=one.name, seconds=None, peak_bytes=None, kl=None)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)
    return known()


def expect(settings: StepBenchmark, device: torch.device) -> Expected:
    """Plan the step."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = retrofit(AutoModelForCausalLM.from_config(_config(settings)), DMSConfig(window=settings.window))
    is_cuda, keep = device.type == "cuda", 1.0 - settings.evicted
    job = Job(
        trainable="gates",
        precision="bf16" if is_cuda else "fp32",
        length=settings.length,
        packed=False,
        steps=1,
        ramp=1.0,
        target_cr=1.0 / keep,
        window=settings.window,
        batch_size=1,
        micro_batch_size=1,
        beta=0.0,
        loss_chunk=None,
        evaluation_length=settings.length,
        evaluation_batch_size=1,
    )
    shape, itemsize = shapes.measure_training(model), memory.ItemSize.of(job, saved_bfloat16=is_cuda)
    given = activations.MicroBatch(batch=1, length=settings.length, weight_dtype=itemsize.weight_dtype, autocast=is_cuda, kernels=is_cuda)
    made = activations.measure(model, shape, given)[1]
    choice = Choice(activation_checkpointing=True)
    used = memory.of_choice(shape, job, choice, made, itemsize, num_gpus=1, gpus_per_node=8, kernels=is_cuda, reserve=False)
    gpu = hardware.load().gpu_of_device(torch.cuda.get_device_name(device)) if is_cuda else None
    return Expected(
        peak_bytes=used.peak,
        flops=flops.of_sequence(shape, job, checkpointing=True, keep=keep).total,
        dense_flops=flops.of_sequence(shape, job, checkpointing=True, keep=1.0).total,
        peak_flops=None if gpu is None else gpu.flops.bf16,
    )


def _show(console: Console, settings: StepBenchmark, rows: list[StepFigures], expected: Expected) -> None:
    table = Table(
        "step", "seconds", "tokens/s", "FLOP/s", "of the GPU's", "peak GiB", "KL", title=f"One retrofit step on {describe_device()}"
    )
    for row in rows:
        if row.seconds is None:
            table.add_row(row.name, "out of memory", *["-"] * 5)
            continue
        rate = (expected.flops if row.name == "ours" else expected.dense_flops) / row.seconds
        share = "-" if expected.peak_flops is None else f"{rate / expected.peak_flops:.0%}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
        figures = f"{row.seconds:.3g}", f"{settings.length / row.seconds:,.0f}", f"{rate / 1e12:.4g} T", share, peak, f"{row.kl:.3g}"
        table.add_row(row.name, *figures)
    console.print(table)
    console.print(
        f"{settings.length} tokens, window {settings.window}, {settings.evicted:.1%} evicted; planned peak {expected.peak_bytes / 2**30:.1f} GiB; "
        f"FLOPs of a step {expected.flops:.3g}, without eviction {expected.dense_flops:.3g}, which the others are taken to compute (by our count: seven products in attention's backward, no second forward of it)",
        highlight=False,
    )


def run(settings: StepBenchmark, out: str | None = None, console: Console | None = None) -> list[StepFigures]:
    """Measure, print and, with `out`, write a JSON file."""
    console = console or make_console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(settings, device)
    batch = make_batch(model, settings.length, device)
    rows = [measure(one, model, batch, settings) for one in contenders(model, device).values()]
    expected = expect(settings, device)
    _show(console, settings, rows, expected)
    if out is not None:
        values = {
            "settings": asdict(settings),
            "device": describe_device(),
            "versions": versions(),
            "expected": {name: value for name, value in asdict(expected).items() if value is not None},
            "rows": [asdict(row) for row in rows],
        }
        with writing(out):
            Path(out).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return rows


def answer_one(settings: StepBenchmark, name: str) -> None:
    """Measure one of `contenders` and say on standard output what is known, as lines of JSON, for `bench.retrofit` in kernels/.

    Raises:
        ValueError: there is none of this name.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(settings, device)
    found = contenders(model, device)
    if name not in found:
        raise ValueError(f"nothing is named {name!r}; there are {', '.join(found)}")
    answer(about={"settings": asdict(settings), "device": describe_device(), "versions": versions(), "contenders": list(found)})
    batch = make_batch(model, settings.length, device)
    figures = measure(found[name], model, batch, settings, report=lambda known: answer(row=asdict(known)))
    if figures.seconds is None:
        answer(row=asdict(figures) | {"problem": "out of memory"})
    if name == "ours":
        answer(expected=asdict(expect(settings, device)))
    answer(done=True)


def main(arguments: list[str] | None = None) -> None:
    """`dms bench retrofit`; by itself too, where typer is not installed."""
    parser = argparse.ArgumentParser(prog="dms bench retrofit", description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768, help="tokens of the row (%(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens that stay visible to all (%(default)s)")
    parser.add_argument("--evicted", type=float, default=0.875, help="mean share of tokens that gates evict (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers of the random Qwen3-8B (all 36)")
    parser.add_argument("--repeats", type=int, default=2, help="steps that are timed, after a first (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works; its figures say nothing")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--answer", metavar="NAME", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    settings = StepBenchmark(
        config=qwen3_8b() | (TINY if given.quick else {}),
        length=256 if given.quick else given.length,
        window=16 if given.quick else given.window,
        evicted=given.evicted,
        layers=given.layers,
        repeats=given.repeats,
    )
    if given.answer is None:
        run(settings, given.json)
    elif given.quick or torch.cuda.is_available():
        answer_one(settings, given.answer)
    else:
        print("no GPU here, and there is nothing to measure without one (--quick shows that it works)", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
