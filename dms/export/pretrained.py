"""The model class of an exported folder, as far as it is ours: it loads the gates beside the weights, and evicts.

`dms export` carries this module into the folder with all that it imports, so that it works where dms is not installed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import cached_file

from dms import hf_compat
from dms.io.gates_file import attach, check_base, read_config, read_gates
from dms.io.weights import GATES_FILE, Structure
from dms.modes import set_mode

# Where transformers looks for a folder's own `generate`.
GENERATE_FILE = "custom_generate/generate.py"
# What `from_pretrained` and the hub's cache both understand.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class GatedPretrained(_Base):
    """A base class before a transformers model class. Loaded models evict; `model.dms` is their state, with `evict_bias`."""

    own_generate: str | None = None
    """The folder's GENERATE_FILE, to be saved again; None: it has none."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # The layers are transformers' own, and so are the rules by which it renames their weights (GPT-NeoX's head).
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, evict_bias: float = 0.0, other_base: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers' own, with gates and in evict mode.

        evict_bias is added to every gate's logit: above 0 evicts more than was trained, below 0 less. `model.dms.evict_bias`
        changes it later. other_base: as of `dms.load`.

        Raises:
            ValueError: gates of another base or of an unknown format, or damaged files.
            OSError: no gates.safetensors there.
        """
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # With output_loading_info it is the model and a dictionary.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        folder = attach_gates(model, pretrained_model_name_or_path, options, evict_bias=evict_bias, other_base=other_base)
        own_generate = folder / GENERATE_FILE
        model.own_generate = own_generate.read_text(encoding="utf-8") if own_generate.is_file() else None
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers' own, which writes this folder's code beside the weights, but for its `generate`."""
        super().save_pretrained(save_directory, *args, **options)
        if self.own_generate is not None and options.get("is_main_process", args[0] if args else True):
            path = Path(save_directory, GENERATE_FILE)
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.own_generate, encoding="utf-8")


def attach_gates(model: Any, source: Any, options: dict[str, Any], *, evict_bias: float = 0.0, other_base: bool = False) -> Path:
    """Attach the gates that lie beside a loaded model's weights, in place; evict mode. Returns the folder.

    source: the folder or hub id that it was loaded from; options: those of _HUB_OPTIONS that it was loaded with. evict_bias, other_base
    and what is raised: as of `GatedPretrained.from_pretrained`.
    """
    file = cached_file(source, GATES_FILE, **options)
    assert file is not None, "cached_file raises OSError where there is none"
    path = Path(file)
    tensors, metadata = read_gates(path)
    other = check_base(path.parent, metadata, str(source), other_base=other_base, structure=lambda: Structure.of(type(model), model.config))
    config = read_config(metadata, getattr(model.config, "dms", None), path.parent)
    # As dms.load does.
    hf_compat.keep_packed_layout(model)
    hf_compat.use_capped_attention(model)
    attach(model, config, tensors, metadata, path.parent, other)
    set_mode(model, "evict")
    model.dms.evict_bias = float(evict_bias)
    return path.parent
