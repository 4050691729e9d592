"""Quantised bases as they lie in memory: which weights are packed, into how many bytes, and what a product with one does first."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from dms.io.quantization import quant_method

# How a product is taken. "whole": the matrix is dequantised, multiplied and dropped, in the backward again; "int8": bitsandbytes
# multiplies bytes by bytes and keeps the input for the backward; "cast": codes are cast and multiplied by operators that PyTorch
# differentiates itself, so that the cast matrix stays until the backward.
Product = Literal["whole", "int8", "cast"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A kind of quantisation: codes of `bits` bits, and scales of blocks."""

    name: str
    """As a person reads it."""
    bits: int
    block: tuple[int | None, int | None]
    """Rows and columns of the numbers that share a scale; None: all of them."""
    block_bytes: float
    """A block's scale, with its zero point where there is one."""
    matrix_bytes: int = 0
    """Of a matrix, whatever its size: tables that codes stand for."""
    column_bytes: int = 0
    """For each column: which group it is in, where columns were reordered."""
    product: Product = "whole"
    computes: torch.dtype | None = None
    """What products compute in; None: in the dtype that weights have which are not packed."""
    skips: tuple[str, ...] | None = None
    """Modules that stay as they are: names, their beginnings, ends or patterns; None: the head, and what is tied with the embeddings."""
    packs_transposed: bool = False
    """GPT-2's linear layers too, whose matrices lie transposed."""
    packs_experts: bool = False
    """Stacks of experts too, which are no linear layers."""
    until_run: bool = False
    """In transformers the first pass makes them whole, and they stay so."""

    def num_blocks(self, num_rows: int, num_columns: int) -> int:
        rows, columns = self.block
        return math.ceil(num_rows / (rows or num_rows)) * math.ceil(num_columns / (columns or num_columns))

    def bytes_of(self, num_rows: int, num_columns: int) -> int:
        """Of a matrix, in bytes: codes, scales and what comes with them."""
        codes = math.ceil(num_rows * num_columns * self.bits / 8)
        scales = math.ceil(self.num_blocks(num_rows, num_columns) * self.block_bytes)
        return codes + scales + self.matrix_bytes + self.column_bytes * num_columns


# bitsandbytes: codes stand for 16 numbers of a table; scales of 64 numbers in float32, or in a byte each, which stands for one of 256
# numbers and has a scale of 256 itself.
_NF4 = Packing(name="nf4", bits=4, block=(1, 64), block_bytes=4, matrix_bytes=64, packs_transposed=True)
_DOUBLE = {"block_bytes": 1 + 4 / 256, "matrix_bytes": 64 + 4 * 256 + 4}
_INT8 = Packing(name="int8", bits=8, block=(1, None), block_bytes=4, product="int8", packs_transposed=True)
# torchao: a float32 scale and a zero point of a byte for each row; of int4, both in 16 bits for each group.
_TORCHAO_INT8 = Packing(name="torchao int8", bits=8, block=(1, None), block_bytes=5, product="cast")
_TORCHAO_INT4 = Packing(name="torchao int4", bits=4, block=(1, 128), block_bytes=4)


class UnknownPacking(ValueError):
    """A configuration says that weights are quantised in a way whose bytes are not known."""


# By the recipe key `quantize`.
FORMS: Mapping[str, Packing] = {
    "nf4": replace(_NF4, **_DOUBLE),  # type: ignore[arg-type]  # a dictionary of both kinds of number
    "int8": _INT8,
    "torchao-int8": _TORCHAO_INT8,
    "torchao-int4": _TORCHAO_INT4,
}


def packing_of(config: Any) -> Packing | None:
    """How a configuration's weights lie in memory once they are loaded; None: whole (MXFP4 is unpacked by loading).

    Raises:
        UnknownPacking: a kind, or settings of one, that are not known here.
    """
    method = quant_method(config)
    if method in (None, "mxfp4"):
        return None
    reader = _READERS.get(method)
    if reader is None:
        raise UnknownPacking(
            f"the weights are quantised by {method!r}, whose bytes are not known here; known are {', '.join(_READERS)}, and mxfp4"
        )
    return reader(_Settings(method, _settings(config)))


def _settings(config: Any) -> dict[str, Any]:
    parts = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    found = next(part for part in parts if part)
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


@dataclass(frozen=True)
class _Settings:
    """A configuration's `quantization_config`."""

    method: str
    values: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def bits(self, name: str, value: Any) -> int:
        if value not in (2, 3, 4, 5, 6, 8):
            raise self.unknown(name, value)
        return int(value)

    def skips(self, name: str) -> tuple[str, ...] | None:
        value = self.values.get(name)
        return None if value is None else tuple(str(one) for one in value)

    def unknown(self, name: str, value: Any) -> UnknownPacking:
        return UnknownPacking(f"quantization_config of kind {self.method!r} has {name} {value!r}, whose bytes are not known here")


def _bitsandbytes(given: _Settings) -> Packing:
    skips = given.skips("llm_int8_skip_modules")
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        return replace(_INT8, name="bitsandbytes int8", skips=skips)
    # transformers computes in float32 where nothing else is said.
    computes = str(given.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    if computes not in ("float32", "bfloat16", "float16"):
        raise given.unknown("bnb_4bit_compute_dtype", computes)
    double = _DOUBLE if given.get("bnb_4bit_use_double_quant") else {}
    name = f"bitsandbytes {given.get('bnb_4bit_quant_type', 'fp4')}"
    return replace(_NF4, name=name, computes=getattr(torch, computes), skips=skips, **double)  # type: ignore[arg-type]  # as above


def _torchao(given: _Settings) -> Packing:
    kind = given.get("quant_type", {})
    kind = kind.get("default", {}) if isinstance(kind, dict) else {}
    data = kind.get("_data", {})
    skips = given.skips("modules_to_not_convert")
    if kind.get("_type") == "Int8WeightOnlyConfig":
        granularity = data.get("granularity") or {}
        group = (granularity.get("_data") or {}).get("group_size") if isinstance(granularity, dict) else None
        # By groups the matrix is dequantised by operators that keep it as well.
        return replace(_TORCHAO_INT8, block=(1, group), skips=skips)
    if kind.get("_type") == "Int4WeightOnlyConfig":
        return replace(_TORCHAO_INT4, block=(1, int(data.get("group_size", 128))), skips=skips)
    raise given.unknown("quant_type", kind.get("_type", given.get("quant_type")))


def _fp8(given: _Settings) -> Packing:
    block = given.values.get("weight_block_size", (128, 128)) or (None, None)
    skips = given.skips("modules_to_not_convert") or given.skips("ignored_layers")
    scale = 1 if given.get("scale_fmt") == "ue8m0" else 4
    return Packing(name="fp8", bits=8, block=(block[0], block[1]), block_bytes=scale, skips=skips, packs_experts=True)


def _grouped(given: _Settings) -> Packing:
    """GPTQ and AWQ: for each group of a row a 16-bit scale, and a zero point as wide as a code."""
    bits, group = given.bits("bits", given.get("bits", 4)), int(given.get("group_size", 128))
    is_gptq = given.method == "gptq"
    # AWQ's names are beside the head, GPTQ leaves the head alone unless told.
    named = given.skips("modules_to_not_convert")
    return Packing(
        name=f"{given.method} {bits}-bit",
        bits=bits,
        block=(1, None if group <= 0 else group),
        block_bytes=2 + bits / 8,
        column_bytes=4 if is_gptq else 0,
        skips=() if given.get("lm_head") else None if not named else (*named, "lm_head"),
        packs_experts=True,
    )


def _compressed_tensors(given: _Settings) -> Packing:
    groups = list(given.get("config_groups", {}).values())
    weights = groups[0].get("weights") if groups else None
    if len(groups) != 1 or not weights:
        raise given.unknown("config_groups", list(given.get("config_groups", {})))
    bits = given.bits("num_bits", weights.get("num_bits"))
    blocks = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or (128, 128)),
    }
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if strategy not in blocks:
        raise given.unknown("strategy", strategy)
    zero = 0.0 if weights.get("symmetric", True) else bits / 8
    skips = tuple(name.removeprefix("re:") for name in given.skips("ignore") or ())
    block = (blocks[strategy][0], blocks[strategy][1])
    name = f"compressed-tensors {bits}-bit"
    return Packing(name=name, bits=bits, block=block, block_bytes=2 + zero, skips=skips, packs_experts=True, until_run=True)


_READERS = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "fp8": _fp8,
    "gptq": _grouped,
    "awq": _grouped,
    "compressed-tensors": _compressed_tensors,
}


def sides(linear: nn.Module) -> tuple[int, int]:
    """Rows (outputs) and columns (inputs) of a linear layer's matrix."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def is_skipped(name: str, packing: Packing, default: set[str]) -> bool:
    """Whether a linear layer stays as it is. default: names to skip where the kind names none."""
    if packing.skips is None:
        return name in default
    return any(name.endswith(skip) or re.match(rf"(?:{skip})(?:\.|$)", name) for skip in packing.skips)


def default_skips(model: Any) -> set[str]:
    """The head, and linear layers that share their weight with another module, such as the embeddings."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    head = model.get_output_embeddings()
    return {name for names in owners.values() if len(names) > 1 for name in names} | {
        name for name, module in model.named_modules() if head is not None and module is head
    }


def packed_linears(model: Any, packing: Packing) -> dict[str, nn.Module]:
    """The linear layers of a base that a kind packs, by name; adapters may stand around them."""
    default = default_skips(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or (packing.packs_transposed and type(module).__name__ == "Conv1D"))
        and not is_attached(name)
        and not is_skipped(name.replace(".base_layer", ""), packing, default)
    }


def is_attached(name: str) -> bool:
    """Whether a module or parameter of this name is no part of the base, but of a gate or an adapter."""
    return "dms_gate" in name or "lora_" in name
