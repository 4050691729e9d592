"""Checkpoints of shisa-ai/FastDMS: plain Llama or Qwen3 tensors, of which a query channel is the gate; alignment `own`.

`dms_metadata.json` (or training_log.json one folder up, or config.json) has window_size, alpha_scale and alpha_offset. The channel is the
one of `dms.borrowed`, and its engine zeroes it before rotation alone: gate `borrowed_once`. It reads every `*.safetensors` of a folder
and knows no other tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dms.config import DMSConfig
from dms.formats.foreign import Foreign, Settings, plain_config, read_json
from dms.formats.writing import Retrofitted, common_limits, copy_others, copy_weights, ratio, write_json

METADATA = "dms_metadata.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_IN_CONFIG = ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_cr")


def settings_of(folder: Path, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """Where a folder's settings stand, in the order in which its engine looks, and the file's name; None: it is none of theirs."""
    for file in (folder / METADATA, folder.parent / "training_log.json"):
        if found := read_json(file):
            inner = found.get("config", found)
            if isinstance(inner, dict) and any("alpha_scale" in key or "window_size" in key for key in inner):
                return inner, str(file)
    return (config, f"{folder}/config.json") if any(key in config for key in _IN_CONFIG) else None


def read(folder: Path, config: Mapping[str, Any], saved: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> Foreign:
    """saved, where: as `settings_of` returns them. Raises ValueError for a model of another type."""
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type is {model_type!r}; FastDMS' checkpoints are of type {' or '.join(ARCHITECTURES)}")
    if model_type == "qwen3" and config.get("attention_bias", False):
        raise ValueError(
            f"{folder}: attention_bias is true, where FastDMS leaves out Qwen3's query norm; its decisions would be others here"
        )
    settings = Settings(saved, given, where)
    dms = DMSConfig(
        gate="borrowed_once",
        window=settings.take("window", "window_size", "dms_window_size", default=256),
        alignment=settings.take("alignment", default="own"),
        tau=settings.take("tau", default=DMSConfig().tau),
        scale=settings.take("scale", "alpha_scale", "dms_alpha_scale", default=100.0),
        offset=settings.take("offset", "alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset", default=5.0),
    )
    length = saved.get("context_len")
    return Foreign(
        format="FastDMS",
        config=dms,
        gates={},
        base_config=plain_config(config, ARCHITECTURES[model_type]),
        target_cr=settings.take("target_cr", "target_cr", "dms_cr"),
        trained_length=int(length) if length else None,
        notes=(
            *settings.notes,
            "FastDMS reads a prompt dense and lets evicted entries live up to two windows; here they go after one, in prompts too",
        ),
    )


def why_not(model: Retrofitted) -> list[str]:
    """What of a model its engine cannot represent, and what to retrain; nothing: all of it can."""
    problems = common_limits(model.dms, "FastDMS'", "own")
    model_type = str(model.config.get("model_type"))
    if model_type not in ARCHITECTURES:
        problems.append(f"its model_type is {model_type!r}, and FastDMS reads {' and '.join(ARCHITECTURES)}: retrofit such a model")
    if model_type == "qwen3" and model.config.get("attention_bias", False):
        problems.append("its attention has biases, with which FastDMS leaves out Qwen3's query norm: retrofit a model without them")
    if model.dms.gate != "borrowed_once":
        problems.append(
            f"dms.gate is {model.dms.gate!r}, and FastDMS' gates are query channels that are 0 before rotation alone: retrain with "
            "dms.gate=borrowed_once and trainable=all"
        )
    return problems


def write(model: Retrofitted, out: Path) -> list[Path]:
    """Write a folder of theirs. The model is one of which `why_not` says nothing."""
    metadata = {
        "window_size": model.dms.windows[0],
        "alpha_scale": model.dms.scale,
        "alpha_offset": model.dms.offset,
        "target_cr": ratio(model.target_cr),
        "context_len": model.trained_length,
    }
    config = model.base_config | {
        "dms_window_size": model.dms.windows[0],
        "dms_alpha_scale": model.dms.scale,
        "dms_initial_alpha_offset": model.dms.offset,
        "dms_cr": ratio(model.target_cr),
    }
    files = [*copy_others(model.folder, out), *copy_weights(model.folder, out)]
    return [*files, write_json(out / "config.json", config), write_json(out / METADATA, metadata)]
