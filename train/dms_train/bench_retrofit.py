"""`dms bench retrofit`: one retrofit step of a random model, ours beside the same step with FlexAttention and whole logits.

Every weight is random and so are the tokens; gates are set so that each head evicts its share. What is timed is a micro-batch of one
row, teacher pass to backward, and the gates' optimizer step.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

import dms
import dms.attention
from dms.benchmarks.model import evict_shares, keep_shares
from dms.config import DMSConfig
from dms.console import make_console
from dms.costs.activations import measure as measure_layers
from dms.costs.job import Choice, Job
from dms.costs.training_flops import of_sequence
from dms.costs.training_memory import Held, of_choice
from dms.costs.training_shapes import measure as measure_shape
from dms.errors import writing
from dms.evaluation.stats.rows import describe_device, versions
from dms.lm_head import head_parameters
from dms.modes import enable_checkpointing
from dms.retrofitting import gate_parameters, retrofit
from dms_train.step import HeadLoss, Normalizer, distill_step

# As in its config.json.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QUICK = QWEN3_8B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 211,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. evicted: mean share of tokens that gates evict. repeats: steps after the first, whose median counts."""

    config: dict[str, Any]
    length: int = 32768
    window: int = 512
    evicted: float = 0.875
    layers: int | None = None
    repeats: int = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a step took; seconds and peak_bytes are None where it ran out of memory. kl: of its first step, to compare."""

    name: str
    seconds: float | None
    peak_bytes: int | None
    kl: float | None


def build(settings: Settings, device: torch.device) -> nn.Module:
    """The random model, bfloat16 on a GPU and float32 elsewhere, with gates that evict their shares."""
    from transformers import AutoModelForCausalLM

    config = _config(settings)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.config.use_cache = False
    retrofit(model, DMSConfig(window=settings.window))
    text = config.get_text_config()
    keep_LH = keep_shares(text.num_hidden_layers, text.num_key_value_heads, settings.evicted, seed=0)
    evict_shares(model, keep_LH, seed=0)
    model.train().requires_grad_(False)
    enable_checkpointing(model)
    for parameter in gate_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def _config(settings: Settings):
    from transformers import AutoConfig

    values = dict(settings.config)
    if settings.layers is not None:
        values["num_hidden_layers"] = settings.layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.max_position_embeddings = max(config.max_position_embeddings, settings.length)
    return config


def make_batch(model: nn.Module, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator).to(device)
    return {
        "input_ids": ids,
        "segment_ids": torch.ones_like(ids),
        "position_ids": torch.arange(length, device=device)[None],
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),
        "number": torch.zeros(1, dtype=torch.long, device=device),
    }


class WholeLogitsLoss(nn.Module):
    """KL(teacher || student) as it is usually written: all logits at once, in float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = head_parameters(model)

    def forward(self, hidden_s_NM: torch.Tensor, hidden_t_NM: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
        log_s_NV, log_t_NV = (nn.functional.linear(x, *self.weights).float().log_softmax(-1) for x in (hidden_s_NM, hidden_t_NM))
        return (log_t_NV.exp() * (log_t_NV - log_s_NV)).sum(-1)[valid_N].sum()


def flex_attention(compiled: bool) -> Callable:
    """`gated_attention` by FlexAttention with the gate in its score_mod and causal blocks, as NVIDIA's code has it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend(q, k, v, log_keep, *, window, scale, **_):
        gate_BHT, group, T = log_keep.transpose(1, 2).contiguous(), q.shape[2] // k.shape[2], q.shape[1]

        def gated(score, b, h, i, j):
            return torch.where(i - j > window, score + gate_BHT[b, h // group, j].to(score.dtype), score)

        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=q.device)
        x = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return run(*x, score_mod=gated, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return attend


@contextmanager
def _rival_attention() -> Iterator[None]:
    with patch.object(dms.attention, "gated_attention", flex_attention(compiled=True)):
        yield


def take_step(model: nn.Module, batch: dict[str, torch.Tensor], loss: nn.Module, optimizer: torch.optim.Optimizer) -> float:
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


def measure(name: str, model: nn.Module, batch: dict, loss: nn.Module, settings: Settings, attention) -> Row:
    is_cuda = batch["input_ids"].is_cuda
    gates = list(gate_parameters(model).values())
    before = [gate.detach().clone() for gate in gates]
    optimizer = torch.optim.AdamW(gates, lr=1e-6)
    seconds, kl = [], None
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with attention:
            for _ in range(1 + settings.repeats):
                start = time.perf_counter()
                found = take_step(model, batch, loss, optimizer)
                if is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                kl = found if kl is None else kl
    except torch.cuda.OutOfMemoryError:
        seconds = []
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)
    if not seconds:
        return Row(name=name, seconds=None, peak_bytes=None, kl=None)
    # The first compiles.
    return Row(name=name, seconds=median(seconds[1:]), peak_bytes=torch.cuda.max_memory_allocated() if is_cuda else None, kl=kl)


def expect(settings: Settings, device: torch.device) -> dict[str, float]:
    """What the plan says of the step: peak_bytes without what is no tensor, flops of ours, dense_flops without eviction. GPU's peak_flops where it is known."""
    config = _config(settings)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = retrofit(AutoModelForCausalLM.from_config(config), DMSConfig(window=settings.window))
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
    shape, held = measure_shape(model), Held.of(job, saved_bfloat16=is_cuda)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    made = measure_layers(model, shape, batch=1, length=settings.length, held=dtype, autocast=is_cuda, kernels=is_cuda)
    choice = Choice(activation_checkpointing=True)
    options = {"num_gpus": 1, "gpus_per_node": 8, "kernels": is_cuda, "reserve": False}
    found = {"peak_bytes": of_choice(shape, job, choice, made, held, **options).peak}
    for name, share in (("flops", keep), ("dense_flops", 1.0)):
        found[name] = of_sequence(shape, job, checkpointing=True, keep=share).total
    return found | _peak_flops(device)


def _peak_flops(device: torch.device) -> dict[str, float]:
    """Read plainly: what checks the hardware table is not installed everywhere that this runs."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    gpus = yaml.safe_load(Path(dms.__file__).with_name("costs").joinpath("hardware.yaml").read_text(encoding="utf-8"))["gpus"].values()
    return next(({"peak_flops": float(gpu["flops"]["bf16"])} for gpu in gpus if name in gpu["device_names"]), {})


def _show(console: Console, settings: Settings, rows: list[Row], expected: dict[str, float]) -> None:
    table = Table(
        "step", "seconds", "tokens/s", "FLOP/s", "of the GPU's", "peak GiB", "KL", title=f"One retrofit step on {describe_device()}"
    )
    for row in rows:
        if row.seconds is None:
            table.add_row(row.name, "out of memory", *["-"] * 5)
            continue
        rate = expected["flops" if row.name == "ours" else "dense_flops"] / row.seconds
        share = f"{rate / expected['peak_flops']:.0%}" if "peak_flops" in expected else "-"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
        figures = f"{row.seconds:.3g}", f"{settings.length / row.seconds:,.0f}", f"{rate / 1e12:.4g} T", share, peak, f"{row.kl:.3g}"
        table.add_row(row.name, *figures)
    console.print(table)
    console.print(
        f"{settings.length} tokens, window {settings.window}, {settings.evicted:.1%} evicted; planned peak {expected['peak_bytes'] / 2**30:.1f} GiB; "
        f"FLOPs of a step {expected['flops']:.3g}, without eviction {expected['dense_flops']:.3g}, which the others are taken to compute (by our count: seven products in attention's backward, no second forward of it)",
        highlight=False,
    )


def run(settings: Settings, out: str | None = None, console: Console | None = None) -> list[Row]:
    """Measure, print and, with `out`, write a JSON file."""
    console = console or make_console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(settings, device)
    batch = make_batch(model, settings.length, device)
    ours = HeadLoss(model, None, beta=0.0, chunk=None)
    rows = [measure("ours", model, batch, ours, settings, nullcontext())]
    loss = WholeLogitsLoss(model)
    if device.type == "cuda":
        rows.append(measure("FlexAttention, chunked loss", model, batch, ours, settings, _rival_attention()))
        rows.append(measure("FlexAttention, whole logits", model, batch, loss, settings, _rival_attention()))
    else:
        # FlexAttention has no backward on a CPU.
        rows.append(measure("whole logits", model, batch, loss, settings, nullcontext()))
    expected = expect(settings, device)
    _show(console, settings, rows, expected)
    if out is not None:
        values = {
            "settings": asdict(settings),
            "device": describe_device(),
            "versions": versions(),
            "expected": expected,
            "rows": [asdict(row) for row in rows],
        }
        with writing(out):
            Path(out).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return rows


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
    given = parser.parse_args(arguments)
    shape = {"config": QWEN3_8B, "length": given.length, "window": given.window}
    if given.quick:
        shape = {"config": QUICK, "length": 256, "window": 16}
    run(Settings(**shape, evicted=given.evicted, layers=given.layers, repeats=given.repeats), given.json)


if __name__ == "__main__":
    main()
