"""A compacted cache as a safetensors file: what is alive, without pages; whose it is; and a hash of it all."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dms.cache.cache import DMSCache
from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import lasting
from dms.cache.store import Store
from dms.io.weights import save_tensors
from dms.modes import DMSState, state_of

_VERSION = "1"
_OWN = ("ring_kv", "ring_state", "num_kept", "seq_len", "evicted", "decided")


def fingerprint(state: DMSState) -> str:
    """Of a decoder's weights, gates and positions: names, types, shapes and a sample of their rows."""
    config = state.decoder.config
    shape = {name: getattr(config, name, None) for name in ("model_type", "rope_parameters", "layer_types", "sliding_window")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.decoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
            digest.update(_raw(rows[torch.arange(8, device=rows.device) * len(rows) // 8]))
    return digest.hexdigest()[:32]


def save(cache: DMSCache, path: str | Path) -> None:
    """Write the cache.

    Raises:
        ValueError: an empty cache, one whose model is gone, or one with layers that keep something else than keys and values.
    """
    state = cache.state()
    if state is None:
        raise ValueError("the model that made this cache is gone; save a cache while its model lives")
    if not cache.compacted_layers():
        raise ValueError("the cache is empty; there is nothing to save")
    tensors, columns = {}, []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompactedLayer):
            layer.crop(0)
            columns.append(layer.columns)
            tensors |= {f"{index}.{name}": tensor for name, tensor in _pack(layer.store).items()}
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if getattr(layer, "record_past", False):
                layer.crop(0)
            columns.append(layer.get_seq_length())
            if layer.keys is not None:
                tensors |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
        else:
            raise ValueError(f"layer {index} of the cache is a {type(layer).__name__}, which cannot be saved")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"version": _VERSION, "model": fingerprint(state), "columns": json.dumps(columns), "dms": json.dumps(_settings(cache))}
    # An interrupted write must not cost the file that was there.
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_tensors(tensors, unfinished, about | {"sha256": _digest(tensors, about)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@lasting
def load(path: str | Path, model, **options) -> DMSCache:
    """As `DMSCache.load`."""
    tensors, about = _read(Path(path))
    config, saved = state_of(model).config, json.loads(about["dms"])
    for name, value in asdict(config).items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} is the cache of another model: dms.{name} was {saved.get(name)!r} and is {value!r} here; load it with the model that made it"
            )
    given = fingerprint(state_of(model))
    if about["model"] != given:
        raise ValueError(
            f"{path} is the cache of another model: it was made by weights and gates {about['model']}, and {type(model).__name__} has "
            f"{given}; load it with the model, and in the dtype, that made it"
        )
    gated = {layer.index: next(layer.module.parameters()).device for layer in state_of(model).layers}
    cache = DMSCache(model, **{"page_size": saved["page_size"], "kv_dtype": saved.get("kv_dtype")} | options)
    for index, (layer, columns) in enumerate(zip(cache.layers, json.loads(about["columns"]), strict=True)):
        device = gated.get(index, next(model.parameters()).device)
        own = {name.partition(".")[2]: tensor.to(device) for name, tensor in tensors.items() if name.startswith(f"{index}.")}
        if isinstance(layer, CompactedLayer):
            _unpack(layer, own)
            layer.columns = columns
        else:
            if own:
                layer.lazy_initialization(own["keys"], own["values"])
                layer.keys, layer.values = own["keys"], own["values"]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns
    cache.rotary_length = saved.get("rotary_length")
    cache.budget.check()
    return cache


def _settings(cache: DMSCache) -> dict:
    layer = next(iter(cache.compacted_layers().values()))
    return asdict(layer.dms) | {"page_size": layer.page_size, "kv_dtype": layer.kv_dtype, "rotary_length": cache.rotary_length}


def _pack(store: Store) -> dict[str, torch.Tensor]:
    """Own tensors, and the kept entries [K, 2, D] ordered by row, head and age, with their scales [K, 2] if they have any."""
    entry = torch.arange(store.page_table.shape[2] * store.pool.page_size, device=store.device)
    b, h, n = (entry < store.num_kept[..., None]).nonzero(as_tuple=True)
    row = store.pool.row_of(store.page_table[b, h, n // store.pool.page_size].long(), n % store.pool.page_size)
    row = torch.stack([row, row + store.pool.page_size], 1)
    kept = {"kept": store.pool.rows[row]} | ({} if store.pool.row_scales is None else {"scales": store.pool.row_scales[row]})
    return {name: getattr(store, name) for name in _OWN} | kept


def _unpack(layer: CompactedLayer, own: dict[str, torch.Tensor]) -> None:
    kept, scales, num_kept = own.pop("kept"), own.pop("scales", None), own.pop("num_kept")
    dtype, device = own["ring_kv"].dtype, kept.device
    if scales is not None:
        # Quantised anew they get the same scales and numbers.
        kept = kept.float() * scales[..., None]
    B, H = num_kept.shape
    layer.store = layer.make_store(B, H, kept.shape[-1], dtype, device)
    layer.dtype, layer.device, layer.is_initialized = dtype, device, True
    for name, tensor in own.items():
        setattr(layer.store, name, tensor)
    head = torch.repeat_interleave(torch.arange(B * H, device=kept.device), num_kept.flatten().long())
    if len(head):
        layer.store.append(head // H, head % H, kept[:, 0], kept[:, 1])
    layer.store.recount()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a file that cache.save wrote")
    try:
        with safe_open(str(path), framework="pt") as f:
            tensors, about = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if about.get("version") != _VERSION:
        raise ValueError(f"{path} holds no cache of this version of dms ({_VERSION}): version is {about.get('version')!r}")
    digest = about.pop("sha256", None)
    if digest != _digest(tensors, about):
        raise ValueError(f"{path} is damaged: its contents are not what was written; prefill the text again")
    return tensors, about


def _digest(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
