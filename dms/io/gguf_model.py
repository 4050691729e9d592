"""A GGUF file as an ordinary dense model: its configuration from the header, its weights dequantised by transformers.

transformers reads what it knows of a header and leaves out the rest, weights that find no place included. Here what it leaves out is
added where it is known, and refused where the model would be another one than the file's.
"""

import struct
import tempfile
from collections.abc import Mapping
from math import isclose, pi, prod
from pathlib import Path
from typing import Any

import torch

from dms.io.gguf_file import GGUFError, GGUFHeader, read_header

_BFLOAT16 = 30
_FLOATS = (0, 1, _BFLOAT16)
# Rotary factors are no weights of a model in transformers.
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# Keys of the header, and the fields that must say the same.
_SAME = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Without a field for these a model would compute something else.
_NEEDED = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# Layers of the Gemma models whose queries are scaled by M / Hq instead of D; no key of the header says so.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def read_config(header: GGUFHeader) -> Any:
    """The configuration that a header describes. Its `dtype` is that in which `load` gives the weights: see `_dtype`.

    Raises:
        ValueError: a model that transformers would load as another one than the file's.
    """
    config = _transformers_config(header)
    # The model's title, which transformers' reader stores where a name is expected.
    vars(config).pop("_model_name_or_path", None)
    config.name_or_path = str(header.path)
    _complete_rope(config, header)
    if header.of_model("block_count") == _SCALED_BY_WIDTH.get(header.architecture):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    _check(config, header)
    config.dtype = _dtype(header)
    return config


def load(path: Path, cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """The weights of a GGUF file in a model of an Auto class, dequantised; nothing of it says that they were quantised.

    Raises:
        ValueError: weights that are not in the file, or that have no place in the model.
    """
    from transformers import GgufConfig

    # All supported releases (5.17 to 5.24) take this; without it they leave weights packed where a kernel for them is installed, and
    # saving is refused.
    options = {"quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
    model, info = cls.from_pretrained(str(path.parent), gguf_file=path.name, config=config, dtype=dtype, **options)
    _check_weights(model, info, read_header(path))
    # from_pretrained puts the folder there.
    model.config.name_or_path = str(path)
    return model


def _dtype(header: GGUFHeader) -> torch.dtype:
    """float32: a block's values are products of a float16 scale, with more digits than bfloat16 has. Weights in bfloat16 stay so."""
    matrices = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return torch.bfloat16 if matrices == {_BFLOAT16} else torch.float32


def _transformers_config(header: GGUFHeader) -> Any:
    """As transformers reads it, from a copy of the header without vocabulary, which would take it seconds."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="dms-") as folder:
        _write_without_vocabulary(header, Path(folder, "header.gguf"))
        try:
            return AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
        except KeyError:
            # Some architectures count the vocabulary itself; their reader is a fast one.
            return AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)


def _write_without_vocabulary(header: GGUFHeader, path: Path) -> None:
    kept = [span for key, span in header.spans.items() if not (key.startswith("tokenizer.") and isinstance(header.values[key], list))]
    added = b""
    if (embedding := header.tensors.get("token_embd.weight")) is not None and header.of_model("vocab_size") is None:
        # A value of type 4, 32 bits without sign.
        key = f"{header.architecture}.vocab_size".encode()
        added = struct.pack(f"<Q{len(key)}sII", len(key), key, 4, embedding.shape[0])
    with header.path.open("rb") as source, path.open("wb") as file:
        source.seek(4)
        file.write(b"GGUF" + source.read(4) + struct.pack("<QQ", len(header.tensors), len(kept) + bool(added)))
        for begin, end in kept:
            source.seek(begin)
            file.write(source.read(end - begin))
        begin, end = header.table
        source.seek(begin)
        file.write(added + source.read(end - begin))
        # Readers map the weights without looking at them: a hole in the file will do.
        file.truncate(file.tell() + header.path.stat().st_size)


def _complete_rope(config: Any, header: GGUFHeader) -> None:
    """Add the rotary settings that transformers' reader leaves out. Raises ValueError for those that cannot be expressed."""
    rope = _rope(config)
    if rope is None:
        return
    if (theta := header.of_model("rope.freq_base")) is not None and not isclose(theta, rope.get("rope_theta") or 0.0, rel_tol=1e-6):
        rope["rope_theta"] = theta
    kind, factor = header.of_model("rope.scaling.type"), header.of_model("rope.scaling.factor") or header.of_model("rope.scale_linear")
    if kind not in (None, "none") and kind != rope.get("rope_type"):
        if kind == "linear" and factor:
            rope |= {"rope_type": "linear", "factor": factor}
        elif kind == "yarn" and factor and (original := header.of_model("rope.scaling.original_context_length")):
            rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        else:
            raise _refused(header, f"its rotary scaling {kind!r}")
    if _ROPE_FACTORS in header.tensors:
        rope |= _llama3_scaling(header, rope["rope_theta"])
    if found := [name for name in _LONG_FACTORS if name in header.tensors]:
        raise _refused(header, f"its rotary factors {found[0]!r}")


def _rope(config: Any) -> dict[str, Any] | None:
    """The rotary settings of layers with full attention; None where positions are not rotated."""
    rope = getattr(config, "rope_parameters", None)
    return rope.get("full_attention", rope) if rope else None


def _llama3_scaling(header: GGUFHeader, theta: float) -> dict[str, Any]:
    """The settings from which a file's rotary factors [D / 2] were made, as Llama 3.1 to 3.3 have them; empty where all are 1."""
    tensor = header.tensors[_ROPE_FACTORS]
    if tensor.kind != 0:
        raise _refused(header, f"its rotary factors {_ROPE_FACTORS!r} in type {tensor.kind}")
    with header.path.open("rb") as file:
        file.seek(header.data_start + tensor.offset)
        factors = torch.frombuffer(bytearray(file.read(tensor.num_bytes)), dtype=torch.float32)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    num = 2 * len(factors)
    wavelengths = 2 * pi * theta ** (torch.arange(0, num, 2, dtype=torch.float64) / num)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    made = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(factors.double(), made, rtol=1e-4):
        raise _refused(header, f"its rotary factors {_ROPE_FACTORS!r}")
    names = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", **names}


def _check(config: Any, header: GGUFHeader) -> None:
    """Raises ValueError where the configuration says another thing than the header."""
    said = {key: getattr(config, name, None) for key, name in _SAME.items() if key in _NEEDED or hasattr(config, name)}
    # Gemma 4 has heads of two sizes, and configurations without attention have none.
    if config.model_type != "gemma4_text" and (num_heads := getattr(config, "num_attention_heads", None)):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        said["attention.key_length"] = head_dim
        if rope := _rope(config):
            share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
            said["rope.dimension_count"] = int(head_dim * share)
    for key, ours in said.items():
        theirs = header.of_model(key)
        # A list says something of each layer, and no field of a configuration says the same.
        if theirs in (None, 0) or isinstance(theirs, list) or isinstance(ours, list):
            continue
        if ours is None or not isclose(theirs, ours, rel_tol=1e-6):
            raise _refused(header, f"{header.architecture}.{key} {theirs}, for which it has {ours}")


def _check_weights(model: Any, info: Mapping[str, Any], header: GGUFHeader) -> None:
    if missing := sorted(info["missing_keys"]):
        raise _refused(header, f"its weights: {len(missing)} of the model's are not found in it, such as {missing[0]}")
    # Blocks that predict several tokens ahead are no part of the decoder, and follow its layers.
    extra = tuple(f"blk.{model.config.num_hidden_layers + index}." for index in range(header.of_model("nextn_predict_layers") or 0))
    left_out = (_ROPE_FACTORS, *_LONG_FACTORS)
    given = sum(prod(t.shape) for t in header.tensors.values() if t.name not in left_out and not t.name.startswith(extra or ("\0",)))
    saved = model.state_dict().keys()
    taken = sum(p.numel() for p in model.parameters()) + sum(b.numel() for name, b in model.named_buffers() if name in saved)
    if given != taken:
        raise _refused(header, f"its weights: it holds {given:,} numbers, and {type(model).__name__} has a place for {taken:,}")


def _refused(header: GGUFHeader, what: str) -> GGUFError:
    from transformers import __version__

    return GGUFError(
        f"transformers {__version__} does not load {header.path.name} as the model that it is: it does not carry over {what}; "
        "give the model that the file was made from"
    )
