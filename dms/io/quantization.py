"""Quantised bases: how a configuration says that its weights are packed, and how they are loaded."""

from typing import Any


def quant_method(config: Any) -> str | None:
    """How a configuration's weights are quantised, such as "fp8", "gptq" or "bitsandbytes"; None: they are not."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
            return str(getattr(method, "value", method))
    return None


def is_packed(config: Any) -> bool:
    """Whether weights are saved in MXFP4, four bits and a scale for each 32: `load_base` unpacks them."""
    return quant_method(config) == "mxfp4"


def refuse_quantized(config: Any, name: str) -> None:
    """Raises ValueError where the weights of `name` are quantised: saving would not give back a model that loads."""
    method = quant_method(config)
    if method is not None:
        raise ValueError(
            f"{name} is quantised ({method}), and a quantised model cannot be retrofitted or saved with gates yet; give the model that it was "
            "made from, in bfloat16, float16 or float32 (often the same name without -4bit, -bnb, -FP8, -GPTQ or -AWQ)"
        )


def load_options(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which weights of this kind are loaded."""
    if not is_packed(config):
        return {}
    from transformers.utils.quantization_config import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}
