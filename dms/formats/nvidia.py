"""Checkpoints of NVIDIA/Model-Optimizer (experimental/dms): Qwen3, alignment `next`.

Adapter (`dms_separate_alpha: true`). Beside the base's tensors, in each layer `self_attn.dms_proj_alpha.weight` [H, M], `.bias` [H] where
the base has attention biases, and `self_attn.dms_proj_alpha_norm.weight` [M], g. With x the residual before input_layernorm, whose weight
is gamma: `logit = scale * (W (g * x / rms(x)) + b) - offset`. Our gates read gamma * x / rms(x), so theirs is ours with W * g / gamma.

Borrowed neuron (`dms_separate_alpha: false`, such as nvidia/Qwen3-8B-DMS-8x). No tensors of its own: gate `borrowed`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dms.config import DMSConfig
from dms.formats.foreign import Foreign, Settings, Tensors, plain_config
from dms.formats.writing import Retrofitted, common_limits, copy_others, copy_weights, ratio, write_json

MODEL_TYPE, ARCHITECTURE = "qwen3", "Qwen3ForCausalLM"
_MARKS = ("dms_separate_alpha", "dms_paged_attention_block_size", "dms_alpha_per")
# Entries of a page of its cache, which its window must exceed.
_PAGE = 256
_AUTO_MAP = {
    "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
    "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
}
CODE = (
    "put configuration_qwen3_dms.py and modeling_qwen3_dms.py of github.com/NVIDIA/Model-Optimizer (experimental/dms/models/qwen3) beside it, and use an "
    "environment with its package dms, and so without dms-retrofit, which has the same name"
)
_ADAPTER = re.compile(r"model\.layers\.(\d+)\.self_attn\.dms_proj_alpha(_norm)?\.(weight|bias)")


def recognises(config: Mapping[str, Any], tensors: Tensors) -> bool:
    """Whether a folder is one of theirs, by its configuration and its tensors' names."""
    return any(key in config for key in _MARKS) or "_dms." in str(config.get("auto_map")) or any(map(_ADAPTER.fullmatch, tensors.names))


def read(folder: Path, config: Mapping[str, Any], tensors: Tensors, given: Mapping[str, Any]) -> Foreign:
    """Raises ValueError for a model of another type, settings that contradict each other, or tensors that are not all there."""
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder}: model_type is {config.get('model_type')!r}; NVIDIA's DMS checkpoints that are read are of type {MODEL_TYPE!r}"
        )
    settings = Settings(config, given, f"{folder}/config.json")
    own = frozenset(filter(_ADAPTER.fullmatch, tensors.names))
    separate = bool(settings.take("dms_separate_alpha", "dms_separate_alpha", default=bool(own)))
    if separate != bool(own):
        has = f"has {len(own)} tensors such as {min(own)}" if own else "has no tensors dms_proj_alpha"
        raise ValueError(f"{folder}: dms_separate_alpha is {separate} and the folder {has}; half of it is another checkpoint's")
    dms = DMSConfig(
        gate="linear" if separate else "borrowed",
        window=settings.take("window", "dms_window_size", default=512),
        granularity=settings.take("granularity", "dms_alpha_per", default="head"),
        alignment=settings.take("alignment", default="next"),
        tau=settings.take("tau", "dms_tau", default=0.1),
        scale=settings.take("scale", "dms_alpha_scale", default=100.0),
        offset=settings.take("offset", "dms_initial_alpha_offset", default=5.0),
    )
    notes = settings.notes
    if config.get("dms_disable_eviction"):
        notes.append("dms_disable_eviction is true there; here the gates evict, and mode dense switches them off")
    return Foreign(
        format="NVIDIA, adapter" if separate else "NVIDIA, borrowed neuron",
        config=dms,
        gates=_gates(folder, tensors, own, dms.granularity) if separate else {},
        base_config=plain_config(config, ARCHITECTURE),
        not_base=own,
        target_cr=settings.take("target_cr", "dms_cr"),
        notes=tuple(notes),
    )


def _gates(folder: Path, tensors: Tensors, names: frozenset[str], granularity: str) -> dict[str, torch.Tensor]:
    gates: dict[str, torch.Tensor] = {}
    for index in sorted({int(match[1]) for name in names if (match := _ADAPTER.fullmatch(name))}):
        layer = f"model.layers.{index}"
        weight_HM = tensors[f"{layer}.self_attn.dms_proj_alpha.weight"].double()
        norm_M = tensors[f"{layer}.self_attn.dms_proj_alpha_norm.weight"].double()
        gamma_M = tensors[f"{layer}.input_layernorm.weight"].double()
        if bool((gamma_M == 0).any()):
            raise ValueError(
                f"{folder}: {layer}.input_layernorm.weight has zeros, so that the gates read what attention does not; such an adapter has no gate here"
            )
        bias = f"{layer}.self_attn.dms_proj_alpha.bias"
        bias_H = tensors[bias] if bias in names else torch.zeros(weight_HM.shape[0])
        # One decision for a layer is their head 0's.
        rows = slice(0, 1) if granularity == "layer" else slice(None)
        gates[f"layers.{index}.gate.weight"] = (weight_HM * norm_M / gamma_M)[rows].float().contiguous()
        gates[f"layers.{index}.gate.bias"] = bias_H[rows].float().contiguous()
    return gates


def why_not(model: Retrofitted) -> list[str]:
    """What of a model their code cannot represent, and what to retrain; nothing: all of it can."""
    problems = common_limits(model.dms, "NVIDIA's", "next")
    if model.config.get("model_type") != MODEL_TYPE:
        problems.append(
            f"its model_type is {model.config.get('model_type')!r}, and NVIDIA's code is for {MODEL_TYPE!r}: retrofit such a model"
        )
    if model.dms.windows[-1] <= _PAGE:
        problems.append(
            f"dms.window is {model.dms.windows[-1]}, and must exceed a page of NVIDIA's cache, {_PAGE} tokens: retrain with dms.window=512"
        )
    if model.dms.gate == "borrowed_once":
        problems.append(
            "dms.gate is 'borrowed_once', and NVIDIA's code zeroes the channel after rotation too: retrain with dms.gate=borrowed"
        )
    num_layers = int(model.config.get("num_hidden_layers", 0))
    if not model.dms.is_borrowed and (num_gates := len(model.gates) // 2) != num_layers:
        problems.append(
            f"{num_gates} of its {num_layers} layers have gates, and NVIDIA's code needs all: retrofit a model of full attention"
        )
    return problems


def write(model: Retrofitted, out: Path) -> list[Path]:
    """Write a folder of theirs, without its code, which CODE says where to get. The model is one of which `why_not` says nothing."""
    tensors, needs_bias = Tensors(model.folder), bool(model.config.get("attention_bias", False))
    more: dict[str, torch.Tensor] = {}
    if not model.dms.is_borrowed:
        biased = any(bool(tensor.any()) for name, tensor in model.gates.items() if name.endswith("bias"))
        if biased and not needs_bias:
            # Their gates have biases where attention has: there those are 0.
            more |= _zero_biases(tensors, model.config)
            needs_bias = True
        more |= _adapter(model, tensors, needs_bias)
    config = {key: value for key, value in model.base_config.items() if key != "architectures"} | {
        "attention_bias": needs_bias,
        "auto_map": _AUTO_MAP,
        "dms_alpha_scale": model.dms.scale,
        "dms_initial_alpha_offset": model.dms.offset,
        "dms_window_size": model.dms.windows[0],
        "dms_paged_attention_block_size": _PAGE,
        "dms_cr": ratio(model.target_cr),
        "dms_disable_eviction": False,
        "dms_separate_alpha": not model.dms.is_borrowed,
        "dms_alpha_per": model.dms.granularity,
        "dms_tau": model.dms.tau,
        "dms_manual_inference_mode": False,
        "dms_chunked_prefill": None,
        "dms_preallocate_for_tokens": 4096,
    }
    return [*copy_others(model.folder, out), *copy_weights(model.folder, out, more), write_json(out / "config.json", config)]


def _adapter(model: Retrofitted, tensors: Tensors, with_bias: bool) -> dict[str, torch.Tensor]:
    num_heads = int(model.config["num_key_value_heads"])
    found: dict[str, torch.Tensor] = {}
    for index in range(int(model.config["num_hidden_layers"])):
        gamma_M = tensors[f"model.layers.{index}.input_layernorm.weight"].double()
        weight_HM = (model.gates[f"layers.{index}.gate.weight"].double() * gamma_M).float()
        bias_H = model.gates[f"layers.{index}.gate.bias"].float()
        name = f"model.layers.{index}.self_attn.dms_proj_alpha"
        # A layer's one decision is their head 0's.
        found[f"{name}.weight"] = weight_HM.expand(num_heads, -1).contiguous()
        found[f"{name}_norm.weight"] = torch.ones_like(gamma_M, dtype=torch.float32)
        if with_bias:
            found[f"{name}.bias"] = bias_H.expand(num_heads).contiguous()
    return found


def _zero_biases(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    biases = {}
    for index in range(int(config["num_hidden_layers"])):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{index}.self_attn.{projection}"
            biases[f"{name}.bias"] = torch.zeros_like(tensors[f"{name}.weight"][:, 0])
    return biases
