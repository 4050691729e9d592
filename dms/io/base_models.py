"""Load base models and tokenizers by name: a folder, a hub id, or `builtin:tiny` (the embedded model)."""

from pathlib import Path
from typing import Any

from dms.builtin import builtin_models
from dms.config import nearest
from dms.io.quantization import is_packed, load_options

BUILTIN = "builtin:"
# What prepares images, video and sound, and conversations with them, beside a tokenizer's own files.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)


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
    return str(dtype).removeprefix("torch.") == "bfloat16" or is_packed(config)


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


def processor_files(name: str) -> list[Path]:
    """Those of a model's folder, or of the hub's cache if they were downloaded; for models of text alone mostly none."""
    folder = local_folder(name)
    return [] if folder is None else [path for file in PROCESSOR_FILES if (path := folder / file).is_file()]


def load_config(name: str) -> Any:
    """The configuration of a base, read without its weights.

    Raises:
        ValueError: a model that is not there, cannot be read, or is no decoder of text that transformers loads.
    """
    from transformers import AutoConfig, __version__

    path = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    # For a model that brings its own code, transformers has a message of its own.
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}) and (why := _why_not(config)):
        raise ValueError(f"model {name!r} is not supported: {why} (transformers {__version__})")
    return config


def _why_not(config: Any) -> str | None:
    """Why a model of this configuration cannot be retrofitted, whatever its weights are; None: nothing is known against it."""
    text = config.get_text_config()
    own = (config.architectures or [f"a model of type {config.model_type}"])[0]
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"{own} is an encoder-decoder; choose a decoder, such as a Llama or Qwen3 model"
    if getattr(text, "cross_attention_layers", None):
        return f"the text decoder of {own} reads images by cross attention, in layers without tokens to evict; choose a text-only model"
    if not auto_classes(config):
        return (
            f"neither AutoModelForCausalLM nor AutoModelForMultimodalLM loads {own} (model type {config.model_type!r}); choose a decoder of text "
            "that one of them loads"
        )
    return None


def auto_class(config: Any) -> Any:
    """What loads a model of this configuration as what it is: AutoModelForCausalLM, or AutoModelForMultimodalLM for one of more than text."""
    from transformers import AutoModelForCausalLM

    return next(iter(auto_classes(config)), AutoModelForCausalLM)


def auto_classes(config: Any) -> dict[Any, type]:
    """All Auto classes that give a model of this configuration a head for text, with its class; those that give its own class come first.

    Some would load a part alone: AutoModelForCausalLM of Llama 4 leaves out what reads images.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    mappings: dict[Any, Any] = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    found = {auto: mapping[type(config)] for auto, mapping in mappings.items() if type(config) in mapping}
    # Code that a folder brought into this process is that folder's.
    found = {auto: own for auto, own in found.items() if not own.__module__.startswith("transformers_modules.")}
    return dict(sorted(found.items(), key=lambda item: item[1].__name__ not in (config.architectures or ())))


def load_base(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a model with a head for text as what it is, dense, in eval mode. dtype: "auto" (as saved), "float32", "bfloat16", "float16". device: None: a GPU if there is one.

    Raises:
        ValueError: a model that is not there, cannot be read, or is damaged.
    """
    import torch
    from huggingface_hub import snapshot_download

    from dms import hf_compat

    config = load_config(name)
    hf_compat.mend_text_outputs()
    model: Any
    try:
        model = auto_class(config).from_pretrained(
            resolve_model(name), dtype=dtype if dtype == "auto" else getattr(torch, dtype), **load_options(config)
        )
    except Exception as error:
        # safetensors, JSON, hub and network errors have no common base class; each becomes one line with its cause.
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if is_packed(config):
        # Else save_pretrained would write the unpacked weights under the names of packed ones.
        hf_compat.forget_weight_conversions(model)
    if config.get_text_config() is not config and not Path(resolve_model(name)).is_dir():
        # From the hub now: when the model is saved, it may be out of reach.
        snapshot_download(resolve_model(name), allow_patterns=list(PROCESSOR_FILES))
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


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
