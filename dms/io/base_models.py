"""Load base models and tokenizers by name: a folder, a hub id, a GGUF file, or `builtin:tiny` (the embedded model)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms.builtin import builtin_models
from dms.config import nearest
from dms.io import gguf_file
from dms.io.device_map import DeviceMap, check_device_map, completed
from dms.io.gguf_file import GGUF, HUB_ID
from dms.io.quantization import hold_unpacked, is_mxfp4, is_packed, load_options, quant_method
from dms.requirements import require

BUILTIN = "builtin:"
# What marks a folder of FastDMS or hipEngine.
_METADATA = "dms_metadata.json"
# What prepares images, video and sound, and conversations with them, beside a tokenizer's own files.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are."""

    location: str
    """What `from_pretrained` takes: a folder, or a hub id."""
    gguf: str | None = None
    """The GGUF file in it that is the model; None: the model is the folder."""

    @property
    def path(self) -> Path:
        """The folder or the file, if it is on this machine; of a hub id, a path that means nothing."""
        return Path(self.location, self.gguf or "")

    def gguf_path(self, *, local_files_only: bool = False) -> Path | None:
        """The GGUF file on this machine, fetched from the hub where it must be; None for a model that is a folder.

        Raises:
            ValueError: the hub's model has no such file, or it cannot be fetched.
            RuntimeError: a package that reads it is not installed.
        """
        if self.gguf is None:
            return None
        require("a GGUF file", "gguf", "accelerate")
        if self.path.is_file():
            return self.path
        from transformers.utils import cached_file

        try:
            found = cached_file(self.location, self.gguf, local_files_only=local_files_only)
        except OSError as error:
            raise ValueError(f"model '{self.location}:{self.gguf}' cannot be loaded: {_first_line(error)}") from error
        assert found is not None, "cached_file raises OSError where there is none"
        return Path(found)


def resolve_model(name: str) -> ModelSource:
    """A name as recipes and commands write it -> where its files are. A GGUF file is FOLDER/FILE.gguf, or HUB-ID:FILE.gguf.

    Raises:
        ValueError: an unknown built-in model, or a path to something that is neither a model folder nor a GGUF file.
    """
    if name.startswith(BUILTIN):
        known = builtin_models()
        short = name.removeprefix(BUILTIN)
        if short not in known:
            raise ValueError(
                f"unknown built-in model {name!r}{nearest(short, known)}; there are {', '.join(BUILTIN + k for k in known) or 'none'}"
            )
        return ModelSource(str(known[short]))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob(f"*{GGUF}"))
            instead = f"name one of its GGUF files, such as {Path(name, files[0])}" if files else "name a Hugging Face model folder"
            raise ValueError(f"{name} is a folder without config.json; {instead}")
        return ModelSource(str(path))
    if name.endswith(GGUF):
        return _resolve_gguf(name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model {name!r} is not a folder; name a Hugging Face model folder, a GGUF file, a hub id, or one of "
            f"{', '.join(BUILTIN + k for k in builtin_models())}"
        )
    return ModelSource(name)


def _resolve_gguf(name: str, path: Path) -> ModelSource:
    if path.is_file():
        return ModelSource(str(path.parent), path.name)
    hub_id, colon, file = name.partition(":")
    if colon and HUB_ID.fullmatch(hub_id):
        return ModelSource(hub_id, file)
    beside = sorted(other.name for other in path.parent.glob(f"*{GGUF}")) if path.parent.is_dir() else []
    there = f"; there {'is' if len(beside) == 1 else 'are'} {', '.join(beside)}" if beside else ""
    raise ValueError(f"the GGUF file {name} does not exist{there}; name FOLDER/FILE.gguf, or HUB-ID:FILE.gguf for one on the hub")


def is_saved_bfloat16(config: Any) -> bool:
    """Whether a configuration's weights are bfloat16; those in MXFP4 (gpt-oss) are, once they are unpacked."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(dtype).removeprefix("torch.") == "bfloat16" or is_mxfp4(config)


def local_weights(name: str) -> Path | None:
    """A model's weights on this machine: its folder, or the hub's cache if they were downloaded; of a GGUF model the file. None: not there."""
    from transformers.utils import cached_file

    from dms.io.weights import weight_files

    source = resolve_model(name)
    if source.gguf is not None:
        try:
            return source.gguf_path(local_files_only=True)
        except ValueError:
            return None
    path = source.path
    if not path.is_dir():
        try:
            config_file = cached_file(source.location, "config.json", local_files_only=True)
        except OSError:
            return None
        if config_file is None:
            return None
        path = Path(config_file).parent
    return path if weight_files(path) else None


def processor_files(name: str) -> list[Path]:
    """Those of a model's folder, or of the hub's cache if they were downloaded; for models of text alone mostly none."""
    folder = local_weights(name)
    return [] if folder is None or folder.is_file() else [path for file in PROCESSOR_FILES if (path := folder / file).is_file()]


def read_config(source: ModelSource, **options: Any) -> Any:
    """transformers' configuration of a model, read without its weights; of a GGUF file from its header. options: of `from_pretrained`."""
    from transformers import AutoConfig

    path = source.gguf_path(**options)
    if path is None:
        return AutoConfig.from_pretrained(source.location, **options)
    from dms.io import gguf_model

    return gguf_model.read_config(gguf_file.read_header(path))


def load_config(name: str) -> Any:
    """The configuration of a base, read without its weights.

    Raises:
        ValueError: a model that is not there, cannot be read, or is no decoder of text that transformers loads.
        RuntimeError: a GGUF file, and a package that reads it is not installed.
    """
    from transformers import __version__

    source = resolve_model(name)
    source.gguf_path()
    try:
        config = read_config(source)
    except gguf_file.GGUFError:
        raise
    except Exception as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    refuse_unimported(name, config.to_dict(), source.path)
    # For a model that brings its own code, transformers has a message of its own.
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}) and (why := _why_not(config)):
        raise ValueError(f"model {name!r} is not supported: {why} (transformers {__version__})")
    return config


def refuse_unimported(name: str, config: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where a model is another project's DMS checkpoint, which was not imported. folder: where its files may be."""
    if "dms" in config:
        return
    theirs = sorted(key for key in config if key.startswith("dms_") and key != "dms_version")
    beside = [_METADATA] if (folder / _METADATA).is_file() else []
    if theirs or beside:
        raise ValueError(
            f"{name} is a DMS checkpoint of another project (it has {', '.join(beside + theirs[:3])}): its code needs another package named dms "
            f"and does not run here, and without its gates it is another model; `dms import {name} OUT` makes a folder of it that every command takes"
        )


def _why_not(config: Any) -> str | None:
    """Why a model of this configuration cannot be retrofitted, whatever its weights are; None: nothing is known against it."""
    text = config.get_text_config()
    own = (config.architectures or [f"a model of type {config.model_type}"])[0]
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"{own} is an encoder-decoder; choose a decoder, such as a Llama or Qwen3 model"
    if not auto_classes(config):
        return (
            f"neither AutoModelForCausalLM nor AutoModelForMultimodalLM loads {own} (model type {config.model_type!r}); choose a decoder of text "
            "that one of them loads"
        )
    return None


def auto_class(config: Any) -> Any:
    """What loads a model of this configuration as what it is: AutoModelForCausalLM, or AutoModelForMultimodalLM for a multimodal one."""
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
    found: dict[Any, Any] = {auto: mapping[type(config)] for auto, mapping in mappings.items() if type(config) in mapping}
    # Code that a folder brought into this process is that folder's.
    found = {auto: own for auto, own in found.items() if not own.__module__.startswith("transformers_modules.")}
    return dict(sorted(found.items(), key=lambda item: item[1].__name__ not in (config.architectures or ())))


def check_quantize(name: str, config: Any, quantize: str | None) -> None:
    """Raises ValueError where a GGUF file is to be packed, or weights that are quantised already are to be packed anew."""
    if quantize is None:
        return
    if (method := quant_method(config)) is not None:
        raise ValueError(
            f"quantize is {quantize}, and the weights of {name} are quantised already ({method}); leave quantize out, and they stay as they are"
        )
    if resolve_model(name).gguf is not None:
        raise ValueError(
            f"quantize is {quantize} and {name} is a GGUF file, which is read dequantised; leave quantize out, or write it as a folder first: "
            "dms.io.base_models.load_base(FILE).save_pretrained(FOLDER), and load_tokenizer(FILE) the same way"
        )


def load_base(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Any:
    """Load a model with a head for text as what it is, dense, in eval mode.

    dtype: "auto" (as saved; of a GGUF file float32, or bfloat16 where its weights are), "float32", "bfloat16", "float16"; of packed weights,
    what they do not hold. device: None: a GPU if there is one. quantize: one of `dms.io.quantization.FORMS`, to pack ordinary weights;
    None: as they are.

    device_map, max_memory, offload_folder: transformers', for weights that do not fit on the device; a map may name modules within others, which
    go by the nearest name. Weights on disk are read from the model's own files; offload_folder is for those that the files hold in another
    form, as some mixtures of experts.

    Raises:
        ValueError: a model that is not there, cannot be read, is damaged, or cannot be packed or placed so.
        RuntimeError: a GGUF file or a device_map, and a package that it needs is not installed.
    """
    import torch
    from huggingface_hub import snapshot_download

    from dms import hf_compat

    source, config = resolve_model(name), load_config(name)
    hf_compat.mend_text_outputs()
    check_quantize(name, config, quantize)
    placing = {"max_memory": max_memory, "offload_folder": offload_folder}
    check_device_map(name, device_map, others=placing, device=device, is_gguf=source.gguf is not None, config=config, quantize=quantize)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # transformers takes "auto" for the configuration's.
    held: Any = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    options = load_options(config, held, quantize)
    if quantize is not None or is_packed(config):
        # Packed where they will be: many kinds are not moved afterwards.
        options["device_map"] = {"": device}
    if device_map is not None:
        options |= {"device_map": _completed(config, device_map)} | {key: value for key, value in placing.items() if value is not None}
    model: Any
    try:
        model = _from_pretrained(source, config, "auto" if dtype == "auto" else held, options)
        if config.get_text_config() is not config and source.gguf is None and not source.path.is_dir():
            # From the hub now: when the model is saved, it may be out of reach.
            snapshot_download(source.location, allow_patterns=list(PROCESSOR_FILES))
    except gguf_file.GGUFError:
        raise
    except Exception as error:
        # safetensors, JSON, hub and network errors have no common base class; each becomes one line with its cause.
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if is_mxfp4(config):
        # Else save_pretrained would write the unpacked weights under the names of packed ones.
        hf_compat.forget_weight_conversions(model)
    hf_compat.keep_packed_layout(model)
    hf_compat.use_capped_attention(model)
    hold_unpacked(model, held)
    # accelerate moves its own modules, and refuses to be overruled.
    return (model if device_map is not None else model.to(device)).eval()


def _completed(config: Any, device_map: DeviceMap) -> DeviceMap:
    if isinstance(device_map, str):
        return device_map
    import torch

    with torch.device("meta"):
        return completed(auto_class(config).from_config(copy.deepcopy(config)), device_map)


def _from_pretrained(source: ModelSource, config: Any, dtype: Any, options: dict[str, Any]) -> Any:
    path = source.gguf_path()
    if path is None:
        model, found = auto_class(config).from_pretrained(source.location, dtype=dtype, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            # transformers would go on with random ones.
            raise ValueError(
                f"its files lack {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}; they belong to another class, or "
                "are not all there"
            )
        return model
    from dms.io import gguf_model

    return gguf_model.load(path, auto_class(config), config, config.dtype if dtype == "auto" else dtype)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; of a GGUF file with the chat template that it holds.

    Raises:
        ValueError: the tokenizer is missing or unreadable.
        RuntimeError: a GGUF file, and a package that reads it is not installed.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    path = source.gguf_path()
    if path is not None:
        from dms.io import gguf_tokenizer

        return gguf_tokenizer.build(gguf_file.read_header(path), name)
    try:
        return AutoTokenizer.from_pretrained(source.location)
    except Exception as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
