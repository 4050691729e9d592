"""Results that cost time are stored under a hash of all that they depend on, so that an evaluation that was killed goes on."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.modes import set_mode, state_of
from dms.placement import compute_device, value_of
from dms.retrofitting import gate_parameters


def operate(model: Any, policy: str, evict_bias: float | None) -> None:
    """Policy "dense", or "dms" with `evict_bias` (None: 0) added to every gate's logit."""
    set_mode(model, "dense" if policy == "dense" else "evict")
    state_of(model).evict_bias = evict_bias or 0.0


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Mode and evict_bias are afterwards what they were."""
    state = state_of(model)
    mode, bias = state.mode, state.evict_bias
    try:
        yield
    finally:
        state.evict_bias = bias
        set_mode(model, mode)


LOCK_FILE = ".lock"
# Numbers of each weight tensor that are hashed, evenly spread; gates are hashed whole.
_SAMPLED = 64


def describe_model(model: nn.Module) -> dict[str, Any]:
    """All of a retrofitted model that decides its output, apart from operating point and mode."""
    digest = hashlib.sha256()
    parameters, ties = dict(model.named_parameters()), hf_compat.tied_weights(model)
    for name, parameter in sorted(parameters.items()):
        # Tied weights that are kept elsewhere are no longer one object.
        if ties.get(name) in parameters:
            continue
        flat = value_of(model, name, parameter).detach().flatten()
        _add(digest, name, flat[:: max(1, flat.numel() // _SAMPLED)])
    for name, parameter in sorted(gate_parameters(model).items()):
        _add(digest, name, parameter.detach())
    state = state_of(model)
    settings = {name: getattr(state, name) for name in ("page_size", "kv_dtype", "prefill_chunk")}
    return {
        "weights": digest.hexdigest()[:32],
        "dtype": str(model.dtype),
        "device": compute_device(model).type,
        "config": repr(state.config),
        **settings,
    }


def _add(digest, name: str, values: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(values.shape)}".encode())
    digest.update(values.float().cpu().contiguous().numpy().tobytes())


def read_json(path: Path) -> Any | None:
    """None where there is no such file, or a torn one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write_json(path: Path, content: Any, **options: Any) -> None:
    """All of it or nothing, whenever the process is killed and whoever else writes it. options: as of `json.dumps`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, **options), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several processes that evaluate into a folder one at a time reads its files and writes them anew. A process that ends lets it go."""
    with open(folder / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hash_of(settings: Any) -> str:
    """Of anything that JSON has."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class ResultStore:
    """Results as files `{kind}-{hash}.json` in a folder, by what they depend on; folder None: nothing is stored. A file that is torn, or of
    other settings, counts as none."""

    def __init__(self, folder: Path | None, kind: str):
        self.folder, self.kind = folder, kind
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, folder: Path, settings: dict[str, Any]) -> Path:
        text = json.dumps(settings, sort_keys=True)
        return folder / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, settings: dict[str, Any]) -> Any | None:
        if self.folder is None:
            return None
        found = read_json(self._path(self.folder, settings))
        if not isinstance(found, dict) or found.get("settings") != json.loads(json.dumps(settings)):
            return None
        return found["result"]

    def write(self, settings: dict[str, Any], result: Any) -> None:
        if self.folder is not None:
            write_json(self._path(self.folder, settings), {"settings": settings, "result": result})
