#!/usr/bin/env python
"""Runs the real code of other projects on what `dms export` writes for them, on the CPU.

    .venv/bin/python scripts/check_formats.py nvidia  CHECKOUT [--python PYTHON]    CHECKOUT: NVIDIA/Model-Optimizer
    .venv/bin/python scripts/check_formats.py fastdms CHECKOUT [--python PYTHON]    CHECKOUT: shisa-ai/FastDMS

PYTHON has what their code needs besides itself: for NVIDIA's transformers 4.57.3, for FastDMS torch, triton and transformers. It is not ours where
their package is named as ours is. flash-attn is not needed: FastDMS gets an attention and a norm of a few lines in place of those for 16 bits, and
NVIDIA's reads prompts without.
Random tiny models, or with `--model FOLDER` one that dms wrote. Prints of each the largest difference of logits over a whole prompt, and how many gate
decisions differ, and fails above 1e-4 or one decision.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
WINDOW = 264
"""NVIDIA's must be above its block size, 256."""
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whose", choices=list(READERS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        READERS[given.whose](given.inside)
        return
    package = given.checkout / PACKAGES[given.whose]
    if not package.is_dir():
        sys.exit(f"check_formats: {package} is not there; name a checkout of {given.whose}'s repository")
    failed = False
    with tempfile.TemporaryDirectory() as work:
        folders = WRITERS[given.whose](Path(work)) if given.model is None else [write(Path(work), given.model, given.whose)]
        for name, folder, ours in folders:
            theirs = read_with(given.whose, package.parent.resolve(), given.python, folder)
            difference = (theirs["logits"] - ours["logits"]).abs().max().item()
            differ = int((theirs["evicts"] != ours["evicts"]).sum())
            failed |= difference > TOLERANCE or differ > 0
            print(
                f"{given.whose}, {name}: logits differ by at most {difference:.1e}, {differ} of {ours['evicts'].numel():,} decisions, of which "
                f"{ours['evicts'].float().mean():.0%} evict"
            )
    sys.exit(failed)


PACKAGES = {"nvidia": "experimental/dms/dms", "fastdms": "fastdms"}


def read_with(whose: str, path: Path, python: str, folder: Path) -> dict[str, torch.Tensor]:
    """What their code makes of a folder, in a process without ours."""
    plain = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(path)} | plain
    subprocess.run([python, "-P", __file__, whose, str(path), "--inside", str(folder)], env=env, check=True, cwd=folder)
    return torch.load(folder / "theirs.pt")


# Ours.


def random_gates(family: str, config: Any) -> Any:
    """A random retrofitted model, of whose decisions about half evict."""
    import dms
    from dms.borrowed import channels, query_projection
    from dms.modes import state_of
    from dms.retrofitting import gate_parameters

    sys.path.insert(0, str(HELPERS))
    from foreign_folders import random_model

    model = dms.retrofit(random_model(family, max_position_embeddings=1024), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 0.5, generator=generator)
        if config.gate != "linear":
            for layer in state_of(model).layers:
                query_projection(layer).weight[channels(layer)].normal_(0, 0.5, generator=generator)
    return model


@torch.no_grad()
def ours(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """ids [1, T] -> logits [T, V], and of each layer what its gate says of each token, evicts [L, T, H]."""
    import dms
    from dms.gates import AnyGate

    said: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, logits: said.append(logits[0] > 0))
        for module in model.modules()
        if isinstance(module, AnyGate)
    ]
    dms.set_mode(model, "evict")
    logits = model(ids).logits[0]
    for hook in hooks:
        hook.remove()
    return {"logits": logits, "evicts": torch.stack(said)}


def write(work: Path, folder: Path, whose: str) -> tuple[str, Path, dict]:
    """A folder that dms wrote, for their code: its name, where it lies, and what ours makes of it."""
    import dms
    from dms.export.folder import export

    model, to = dms.load(folder, dtype="float32", device="cpu"), work / folder.name
    export(folder, to, format=whose)
    # FastDMS reads prompts dense, and within a window so does everybody.
    window = model.dms.config.window
    length = window if whose == "fastdms" else max(700, 2 * window)
    ids = torch.randint(2, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(3))
    torch.save(ids, to / "prompt.pt")
    return folder.name, to, ours(model, ids)


def write_random(work: Path, name: str, family: str, config: Any, whose: str) -> tuple[str, Path, dict]:
    from dms.io import checkpoint

    return write(work, checkpoint.save(random_gates(family, config), work / "saved" / name, base_name="acme/random", target_cr=None), whose)


def write_for_nvidia(work: Path) -> Iterator[tuple[str, Path, dict]]:
    import dms

    same = {"window": WINDOW, "alignment": "next", "scale": 2.0, "offset": 0.5}
    yield write_random(work, "adapter", "qwen3", dms.DMSConfig(**same), "nvidia")
    yield write_random(work, "borrowed", "qwen3", dms.DMSConfig(gate="borrowed", **same), "nvidia")


def write_for_fastdms(work: Path) -> Iterator[tuple[str, Path, dict]]:
    import dms

    for family in ("llama", "qwen3"):
        config = dms.DMSConfig(gate="borrowed_once", window=WINDOW, scale=2.0, offset=0.5)
        yield write_random(work, family, family, config, "fastdms")


WRITERS = {"nvidia": write_for_nvidia, "fastdms": write_for_fastdms}


# Theirs: what follows runs in a process of its own.


@torch.no_grad()
def read_as_nvidia(folder: Path) -> None:
    from models.qwen3 import modeling_qwen3_dms as theirs

    said: list[torch.Tensor] = []
    prepare = theirs.prepare_attention_input

    def listening(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        said.append(prepared[3][0].T.bool())
        return prepared

    theirs.prepare_attention_input = listening
    model = theirs.Qwen3ForCausalLMDMS.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(torch.load(folder / "prompt.pt"), use_cache=True).logits[0]
    torch.save({"logits": logits, "evicts": torch.stack(said)}, folder / "theirs.pt")


@torch.no_grad()
def read_as_fastdms(folder: Path) -> None:
    import importlib.machinery
    import types

    import torch.distributed
    from transformers import AutoConfig

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, **_: Any) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)[0].transpose(
            0, 1
        )

    flash_attn: Any = types.ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache = attention, None
    # transformers looks for the package too, and must not find it.
    sys.modules["flash_attn"], flash_attn.__spec__ = flash_attn, importlib.machinery.ModuleSpec("flash_attn", None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)

    from fastdms.engine.dms import load_dms_metadata
    from fastdms.layers.layernorm import RMSNorm
    from fastdms.models import llama, qwen3
    from fastdms.utils.context import set_context
    from fastdms.utils.loader import load_model

    def norm(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return normed if residual is None else (normed, total)

    # Theirs works in place on a copy in float32, which in a model in float32 is no copy.
    RMSNorm.forward = norm
    config, found = AutoConfig.from_pretrained(folder), load_dms_metadata(folder)
    model = {"llama": llama.LlamaForCausalLM, "qwen3": qwen3.Qwen3ForCausalLM}[config.model_type](config)
    load_model(model, str(folder))
    attentions = [module for module in model.modules() if type(module).__name__ == "Attention"]
    for number, module in enumerate(attentions):
        module.layer_id = number
    said: dict[int, torch.Tensor] = {}
    ids = torch.load(folder / "prompt.pt")[0]
    T = len(ids)
    ends = torch.tensor([0, T], dtype=torch.int32)
    set_context(
        True,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=T,
        max_seqlen_k=T,
        dms_capture_enabled=True,
        dms_alpha_scale=found.alpha_scale,
        dms_alpha_offset=found.alpha_offset,
        dms_layer_evictions=said,
    )
    hidden = model(ids, torch.arange(T))
    logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
    evicts = torch.stack([said[number] for number in range(len(attentions))])
    torch.save({"logits": logits, "evicts": evicts.reshape(evicts.shape[0], T, -1)}, folder / "theirs.pt")


READERS = {"nvidia": read_as_nvidia, "fastdms": read_as_fastdms}


if __name__ == "__main__":
    main()
