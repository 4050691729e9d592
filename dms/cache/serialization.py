"""A cache as a safetensors file: the entries alive, without pages; the model that it belongs to; and a hash of it all.

A file holds one tensor named "<layer>.<name>" for everything that a layer stores, and metadata.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import StoredRows, layer_bytes
from dms.cache.store import Store
from dms.io.weights import save_tensors
from dms.modes import DMSState
from dms.placement import value_of

# Of int4 keys have had a fifth bit since 2; all others are written as before.
_VERSION, _VERSION_OF_INT4 = "1", "2"
_STORED = ("ring_kv", "ring_state", "seq_len", "evicted", "decided")


class UnreadableCache(ValueError):
    """A file of a cache is not there, is damaged, or is not of this model and version."""


@dataclass(frozen=True)
class SavedCache:
    """What a file holds."""

    model: str
    """`fingerprint` of the model that made the cache."""
    settings: dict[str, Any]
    """The DMSConfig's fields, page_size, kv_dtype and rotary_length."""
    columns: list[int]
    """Tokens of each layer, padding included."""
    tensors: dict[str, torch.Tensor]

    def require_model(self, state: DMSState, model: str, path: Path) -> None:
        """Raises UnreadableCache where `model`, the name of a class, with this state is not the one that made the cache."""
        for name, value in state.config.to_dict().items():
            saved = self.settings.get(name)
            if saved != value:
                raise UnreadableCache(
                    f"{path} is the cache of another model: dms.{name} was {saved!r} and is {value!r} here; load it with the model that made it"
                )
        given = fingerprint(state)
        if self.model != given:
            raise UnreadableCache(
                f"{path} is the cache of another model: it was made by weights and gates {self.model}, and {model} has "
                f"{given}; load it with the model, and in the dtype, that made it"
            )

    def fill(self, layers: Sequence[Any], devices: Sequence[torch.device]) -> None:
        """Fill the empty layers of a cache, of as many kinds as transformers has, each on its device."""
        for index, (layer, device, columns) in enumerate(zip(layers, devices, self.columns, strict=True)):
            own = {name.partition(".")[2]: tensor.to(device) for name, tensor in self.tensors.items() if name.startswith(f"{index}.")}
            if isinstance(layer, CompactedLayer):
                _unpack(layer, own)
                layer.columns = columns
                continue
            if own:
                layer.lazy_initialization(own["keys"], own["values"])
                layer.keys, layer.values = own["keys"], own["values"]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns


def describe(layers: Sequence[Any], state: DMSState, rotary_length: int | None) -> SavedCache:
    """What a file of a cache's layers holds; trial tokens are stored first.

    Raises:
        ValueError: a layer that keeps something else than keys and values.
    """
    tensors: dict[str, torch.Tensor] = {}
    columns = []
    settings: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, CompactedLayer):
            layer.crop(0)
            columns.append(layer.columns)
            tensors |= {f"{index}.{name}": tensor for name, tensor in _pack(layer.store).items()}
            settings = settings or layer.dms.to_dict() | {"page_size": layer.page_size, "kv_dtype": layer.kv_dtype}
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if getattr(layer, "record_past", False):
                layer.crop(0)
            columns.append(layer.get_seq_length())
            if layer.keys is not None:
                tensors |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
        elif layer_bytes([layer]) == 0:
            # It keeps the place of a decoder layer that reads another one's keys and values.
            columns.append(0)
        else:
            raise ValueError(f"layer {index} of the cache is a {type(layer).__name__}, which cannot be saved")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return SavedCache(fingerprint(state), settings | {"rotary_length": rotary_length}, columns, tensors)


def write(saved: SavedCache, path: Path) -> None:
    metadata = {
        "version": _version_of(saved.settings),
        "model": saved.model,
        "columns": json.dumps(saved.columns),
        "dms": json.dumps(saved.settings),
    }
    # An interrupted write must not cost the file that was there.
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_tensors(saved.tensors, unfinished, metadata | {"sha256": _digest(saved.tensors, metadata)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> SavedCache:
    """Raises UnreadableCache where `path` is no file of a cache, or a damaged one."""
    try:
        with safe_open(str(path), framework="pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except OSError as error:
        if path.is_file():
            raise
        raise UnreadableCache(f"{path} does not exist; name a file that cache.save wrote") from error
    except SafetensorError as error:
        raise UnreadableCache(f"{path} is damaged: {error}") from error
    if metadata.get("version") not in (_VERSION, _VERSION_OF_INT4):
        raise UnreadableCache(
            f"{path} holds no cache of this version of dms ({_VERSION}, of int4 {_VERSION_OF_INT4}): version is {metadata.get('version')!r}"
        )
    digest = metadata.pop("sha256", None)
    if digest != _digest(tensors, metadata):
        raise UnreadableCache(f"{path} is damaged: its contents are not what was written; prefill the text again")
    settings = json.loads(metadata["dms"])
    if metadata["version"] != _version_of(settings):
        raise UnreadableCache(
            f"{path} holds int4 entries with four bits for keys, as an older version of dms stored them; prefill the text again"
        )
    return SavedCache(metadata["model"], settings, json.loads(metadata["columns"]), tensors)


def _version_of(settings: dict[str, Any]) -> str:
    return _VERSION_OF_INT4 if settings.get("kv_dtype") == "int4" else _VERSION


def fingerprint(state: DMSState) -> str:
    """A hash of a decoder's weights, gates and positions: of their names, types, shapes and a sample of their rows."""
    config = state.decoder.config
    shape = {name: getattr(config, name, None) for name in ("model_type", "rope_parameters", "layer_types", "sliding_window")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.decoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            tensor = value_of(state.decoder, name, tensor)
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
            digest.update(_raw(rows[torch.arange(8, device=rows.device) * len(rows) // 8]))
    return digest.hexdigest()[:32]


def _pack(store: Store) -> dict[str, torch.Tensor]:
    """Own tensors, and the entries [K, 2, ...] in pages ordered by row, head (or list) and age, as the pool holds them, with their scales and
    positions [K] if they have any."""
    pool, P = store.pool, store.pool.page_size
    there = store.seen_by(store.seq_len - 1)
    b, h, n = there.nonzero(as_tuple=True)
    page = store.page_table[b, h, n // P].long()
    row = pool.row_of(page, n % P)
    row = torch.stack([row, row + P], 1)
    numbers, scales = pool.stored(row)
    in_pages = {"kept": numbers, "num_kept": there.sum(2, dtype=torch.int32)}
    in_pages |= {} if scales is None else {"scales": scales}
    in_pages |= {} if pool.positions is None else {"positions": pool.positions[page, n % P]}
    return {name: getattr(store, name) for name in _STORED} | in_pages


def _unpack(layer: CompactedLayer, own: dict[str, torch.Tensor]) -> None:
    entries, scales, num_kept = own.pop("kept"), own.pop("scales", None), own.pop("num_kept")
    positions = own.pop("positions", None)
    dtype, device = own["ring_kv"].dtype, entries.device
    (B, H), num_lists = own["evicted"].shape, num_kept.shape[1]
    store = layer.make_store(B, H, own["ring_kv"].shape[-1], dtype, device)
    for name, tensor in own.items():
        setattr(store, name, tensor)
    number = torch.repeat_interleave(torch.arange(B * num_lists, device=device), num_kept.flatten().long())
    if len(number):
        stored = StoredRows(entries.transpose(0, 1).flatten(0, 1), None if scales is None else scales.transpose(0, 1).flatten(0, 1))
        store.append_stored(number // num_lists, number % num_lists, stored, positions)
    store.recount()


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
