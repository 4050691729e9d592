"""Sidecars of shisa-ai/hipEngine ("schema 2"): linear gates for all full-attention layers in one file, and dms_metadata.json beside it.

Tensors `weight` [layers, H, M] and `bias` [layers, H], bfloat16, in the order of `physical_layer_ids`. They read what attention reads
(`post_attn_rmsnorm_pre_q_projection`), as ours: `logit = alpha_scale * (W x + b) - alpha_offset`, alignment `own`. A sidecar belongs to one
GGUF file, by its SHA-256, whose first 32 digits are what our gates are tied to their base by.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dms.config import DMSConfig
from dms.formats.foreign import Foreign, Settings
from dms.formats.writing import common_limits, ratio, write_json
from dms.io.weights import save_tensors, sha256

# What it calls types of models.
FAMILIES = dict.fromkeys(("qwen3_5", "qwen3_5_text"), "qwen35_dense_hybrid")
SCHEMA, SOURCE, STAGE = 2, "external_linear_sidecar_v1", "post_attn_rmsnorm_pre_q_projection"


def recognises(metadata: Mapping[str, Any]) -> bool:
    """Whether a folder is one of theirs, by its dms_metadata.json."""
    return "schema_version" in metadata and "decision_source" in metadata


def read(folder: Path, metadata: Mapping[str, Any], given: Mapping[str, Any]) -> Foreign:
    """Raises ValueError for another schema, another input, or a file that is not the one that the metadata describes."""
    where = f"{folder}/dms_metadata.json"
    for key, wanted in {"schema_version": SCHEMA, "decision_source": SOURCE, "input_stage": STAGE}.items():
        if metadata.get(key) != wanted:
            raise ValueError(f"{where}: {key} is {metadata.get(key)!r}; hipEngine's sidecars that are read have {wanted!r}")
    sidecar, layers = metadata.get("sidecar") or {}, metadata.get("physical_layer_ids")
    # A name, and no way out of the folder.
    file = folder / Path(str(sidecar.get("path"))).name
    if not file.is_file() or not isinstance(layers, list):
        raise ValueError(f"{where}: the sidecar {file} is not there, or physical_layer_ids {layers!r} is no list; the folder is not whole")
    if sidecar.get("sha256") != (digest := sha256(file)):
        raise ValueError(
            f"{file}: its SHA-256 is {digest}, and the metadata says {sidecar.get('sha256')}; it belongs to another checkpoint"
        )
    tensors = load_file(file)
    weight_LHM, bias_LH = (tensors[sidecar.get(f"{name}_tensor", name)] for name in ("weight", "bias"))
    if len(layers) != weight_LHM.shape[0] or bias_LH.shape != weight_LHM.shape[:2]:
        raise ValueError(
            f"{file}: weight is {list(weight_LHM.shape)} and bias {list(bias_LH.shape)} for {len(layers)} layers; they are [layers, KV heads, hidden] "
            "and [layers, KV heads]"
        )
    settings = Settings(metadata, given, where)
    config = DMSConfig(
        window=settings.take("window", "window_size", default=256),
        alignment=settings.take("alignment", default="own"),
        tau=settings.take("tau", default=DMSConfig().tau),
        scale=settings.take("scale", "alpha_scale", default=1.0),
        offset=settings.take("offset", "alpha_offset", default=0.0),
    )
    notes = settings.notes
    if metadata.get("prefill_selection_mode", "threshold") != "threshold":
        notes.append(
            f"prefill_selection_mode is {metadata['prefill_selection_mode']!r} there, which ranks a prompt's tokens to fill a budget; here a token is "
            "evicted where its logit is above 0, in prompts too"
        )
    gates = {}
    for place, index in enumerate(layers):
        gates[f"layers.{index}.gate.weight"] = weight_LHM[place].float().contiguous()
        gates[f"layers.{index}.gate.bias"] = bias_LH[place].float().contiguous()
    return Foreign(
        format="hipEngine, sidecar",
        config=config,
        gates=gates,
        base_config=None,
        target_cr=settings.take("target_cr", "target_compression_ratio"),
        base_hash=str(metadata.get("artifact_fingerprint"))[:32],
        notes=tuple(notes),
    )


def why_not(dms: DMSConfig) -> list[str]:
    """What of gates a sidecar cannot represent, and what to retrain; nothing: all of it can."""
    problems = common_limits(dms, "hipEngine's", "own")
    if dms.is_borrowed:
        problems.append(f"dms.gate is {dms.gate!r}, and a sidecar holds linear gates: retrain with dms.gate=linear")
    if dms.granularity != "head":
        problems.append(
            f"dms.granularity is {dms.granularity!r}, and a sidecar has a decision for each KV head: retrain with dms.granularity=head"
        )
    return problems


def write(dms: DMSConfig, gates: Mapping[str, torch.Tensor], base: Path, text: Any, target_cr: float | None, out: Path) -> list[Path]:
    """Write a sidecar of gates of which `why_not` says nothing. base: the GGUF file that it is bound to; text: its configuration.

    `training` says who trained the gates. hipEngine's loader admits those of its own trainer alone, which these are not.
    """
    indices = sorted(int(name.split(".")[1]) for name in gates if name.endswith("weight"))
    weight_LHM, bias_LH = (
        torch.stack([gates[f"layers.{index}.gate.{kind}"] for index in indices]).bfloat16() for kind in ("weight", "bias")
    )
    file = save_tensors({"weight": weight_LHM, "bias": bias_LH}, out / "dms_sidecar.safetensors")
    L, H, M = weight_LHM.shape
    heads = int(text.num_attention_heads)
    metadata = {
        "schema_version": SCHEMA,
        "artifact_fingerprint": sha256(base),
        "model_family": FAMILIES.get(text.model_type, text.model_type),
        "decision_source": SOURCE,
        "physical_layer_ids": indices,
        "num_layers": L,
        "num_q_heads": heads,
        "num_kv_heads": H,
        "head_dim": int(getattr(text, "head_dim", None) or M // heads),
        "hidden_size": M,
        "input_stage": STAGE,
        "window_size": dms.windows[0],
        "target_compression_ratio": ratio(target_cr),
        "alpha_scale": dms.scale,
        "alpha_offset": dms.offset,
        "borrowed_query_channel": None,
        "zero_borrowed_query_channel": False,
        "sidecar": {
            "path": file.name,
            "format": "safetensors",
            "dtype": "bfloat16",
            "weight_tensor": "weight",
            "bias_tensor": "bias",
            "weight_shape": [L, H, M],
            "bias_shape": [L, H],
            "sha256": sha256(file),
        },
        "training": {"method": "dms-retrofit"},
        "trained_checkpoint": True,
        "evidence_source": "dms-retrofit",
    }
    return [file, write_json(out / "dms_metadata.json", metadata)]
