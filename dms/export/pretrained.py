"""What the model class of an exported folder adds to transformers': gates come from beside the weights and go back there.

`dms export` carries this module into the folder with all that it imports, so that it works where dms is not installed.
"""

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from dms import hf_compat
from dms.gates_file import attach, check_base, gate_tensors, read_config, read_gates, write_gates
from dms.retrofitting import set_mode
from dms.weights import GATES_FILE, base_hash

# What `from_pretrained` and the hub's cache both understand.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class GatedPretrained:
    """Stands before a transformers model class. Loaded models evict; `model.dms` tells how, and holds `evict_bias`."""

    # transformers saves the code of such a class beside its weights.
    _auto_class = "AutoModelForCausalLM"

    @classmethod
    def is_custom_code(cls) -> bool:
        # The layers are transformers' own, and so are the rules by which it renames their weights (GPT-NeoX's head).
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, evict_bias: float = 0.0, **kwargs):
        """As transformers' own, and with gates, in evict mode.

        evict_bias is added to every gate's logit: above 0 evicts more than was trained, below 0 less. `model.dms.evict_bias`
        changes it later.

        Raises:
            ValueError: gates of another base or of an unknown format, or damaged files.
            OSError: no gates.safetensors there.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # With output_loading_info there are two things.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        path = Path(cached_file(pretrained_model_name_or_path, GATES_FILE, **options))
        tensors, metadata = read_gates(path)
        check_base(path.parent, metadata, str(pretrained_model_name_or_path))
        config = read_config(metadata, getattr(model.config, "dms", None), path.parent)
        attach(model, config, tensors, path.parent)
        _name_attention(model.dms)
        _follow_offloading(model)
        set_mode(model, "evict")
        model.dms.evict_bias = float(evict_bias)
        model.dms_origin = {name: metadata.get(name) for name in ("base_name", "target_cr", "trained_length")}
        return loaded

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """As transformers' own; the gates go into gates.safetensors and not among the weights.

        Raises:
            ValueError: push_to_hub, which would upload before the gates are written.
        """
        if getattr(self, "dms", None) is None:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) would upload the model without its gates; call model.push_to_hub(...)")
        gates = {f"{layer.name}.dms_gate.{name}" for layer in self.dms.layers for name, _ in layer.module.dms_gate.named_parameters()}
        weights = self.state_dict() if state_dict is None else state_dict
        mode, noise = self.dms.mode, self.dms.noise
        # The configuration names the attention function; the folder's must be the base's own.
        set_mode(self, "dense")
        self.config.dms = self.dms.config.to_saved()
        try:
            super().save_pretrained(
                save_directory, is_main_process, {name: tensor for name, tensor in weights.items() if name not in gates}, **kwargs
            )
        finally:
            set_mode(self, mode, noise)
        if is_main_process:
            origin = getattr(self, "dms_origin", {})
            write_gates(
                save_directory,
                gate_tensors(self),
                self.dms.config,
                base_name=origin.get("base_name") or "",
                base_digest=base_hash(save_directory),
                target_cr=float(origin["target_cr"]) if origin.get("target_cr") else None,
                trained_length=int(origin["trained_length"]) if origin.get("trained_length") else None,
            )


def _name_attention(state) -> None:
    """A name for this folder's attention function: other folders may bring other versions of it into the same process."""
    name = f"{state.attention_name}_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"
    hf_compat.register_attention(name, hf_compat.attention_function(state.attention_name), mask=state.attention_name)
    state.attention_name = name


def _follow_offloading(model) -> None:
    """Where accelerate keeps a layer's weights elsewhere between uses, its gate stays where the layer computes."""
    for layer in model.dms.layers:
        if all(p.device.type == "meta" for name, p in layer.module.named_parameters() if not name.startswith("dms_gate.")):
            device = hf_compat.execution_device(layer.module)
            if device is not None:
                layer.module.dms_gate.to(device)
