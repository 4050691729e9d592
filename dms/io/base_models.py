"""Load base models and tokenizers by name: a folder, a hub id, or `builtin:tiny` (the embedded model)."""

from pathlib import Path
from typing import Any

from dms.builtin import builtin_models
from dms.config import nearest
from dms.io.quantization import hold_unpacked, is_mxfp4, is_packed, load_options

BUILTIN = "builtin:"


def resolve_model(name: str) -> str:
    """A name as recipes and commands write it -> what `from_pretrained` takes.

    Raises:
        ValueError: an unknown built-in model, or a path to something that is not a model folder.
    """
    if name.startswith(BUILTIN):
        known = builtin_models()
        short = name.removeprefix(BUILTIN)
        if short not in known:
            raise ValueError(
                f"unknown built-in model {name!r}{nearest(short, known)}; there are {', '.join(BUILTIN + k for k in known) or 'none'}"
            )
        return str(known[short])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is a folder without config.json; name a Hugging Face model folder")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model {name!r} is not a folder; name a Hugging Face model folder, a hub id, or one of {', '.join(BUILTIN + k for k in builtin_models())}"
        )
    return name


def is_saved_bfloat16(config: Any) -> bool:
    """Whether a configuration's weights are bfloat16; those in MXFP4 (gpt-oss) are, once they are unpacked."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(dtype).removeprefix("torch.") == "bfloat16" or is_mxfp4(config)


def local_folder(name: str) -> Path | None:
    """The folder of a model's weights on this machine: its own, or the hub's cache if they were downloaded; None where there is none."""
    from transformers.utils import cached_file

    from dms.io.weights import weight_files

    path = Path(resolve_model(name))
    if not path.is_dir():
        try:
            config_file = cached_file(str(path), "config.json", local_files_only=True)
        except OSError:
            return None
        if config_file is None:
            return None
        path = Path(config_file).parent
    return path if weight_files(path) else None


def load_config(name: str) -> Any:
    """The configuration of a base, read without its weights.

    Raises:
        ValueError: a model that is not there, cannot be read, or that AutoModelForCausalLM does not load.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, __version__

    path = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    # For a model that brings its own code, transformers has a message of its own.
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    text = config.get_text_config()
    own = (config.architectures or [f"a model of type {config.model_type}"])[0]
    if getattr(config, "is_encoder_decoder", False):
        why = f"{own} is an encoder-decoder; choose a decoder, such as a Llama or Qwen3 model"
    elif text is config:
        why = f"{own} is no model that continues text; choose one that AutoModelForCausalLM loads"
    else:
        alone = f", such as one of type {text.model_type}" if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else " of its family"
        why = f"its text decoder stands inside {own}, a model of more than text; choose a text-only model{alone}"
    raise ValueError(f"model {name!r} is not supported yet: {why} (AutoModelForCausalLM of transformers {__version__} does not load it)")


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration as what it is."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def load_base(name: str, dtype: str = "auto", device: str | None = None, quantize: str | None = None) -> Any:
    """Load a causal LM, dense, in eval mode. dtype: "auto" (as saved), "float32", "bfloat16", "float16"; of packed weights, what they do not hold.

    device: None: a GPU if there is one. quantize: one of `dms.io.quantization.FORMS`, to pack ordinary weights; None: as they are.

    Raises:
        ValueError: a model that is not there, cannot be read, is damaged, or cannot be packed so.
    """
    import torch

    from dms import hf_compat

    config = load_config(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # transformers takes "auto" for the configuration's.
    held = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    options = load_options(config, held, quantize)
    if quantize is not None or is_packed(config):
        # Packed where they will be: many kinds are not moved afterwards.
        options["device_map"] = {"": device}
    model: Any
    try:
        model = auto_class(config).from_pretrained(resolve_model(name), dtype="auto" if dtype == "auto" else held, **options)
    except Exception as error:
        # safetensors, JSON, hub and network errors have no common base class; each becomes one line with its cause.
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if is_mxfp4(config):
        # Else save_pretrained would write the unpacked weights under the names of packed ones.
        hf_compat.forget_weight_conversions(model)
    hf_compat.keep_packed_layout(model)
    hold_unpacked(model, held)
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """Raises ValueError where the tokenizer is missing or unreadable."""
    from transformers import AutoTokenizer

    path = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
