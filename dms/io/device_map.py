"""Weights that do not fit on the device: what `device_map` may be, and what of it transformers' `from_pretrained` is given.

transformers and accelerate place a model's modules: on devices, in host memory ("cpu") or in files ("disk"), from where they are brought for
each use.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.config import nearest
from dms.io.quantization import quant_method
from dms.requirements import require

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Those of transformers; each fills devices first, then host memory, then the disk."""

DeviceMap = str | Mapping[str, int | str | torch.device]
"""One of STRATEGIES, or names of modules ("": the model) and where each is: a device, "cpu" or "disk"."""


def check_device_map(
    name: str,
    device_map: DeviceMap | None,
    *,
    others: Mapping[str, Any],
    device: str | None = None,
    is_gguf: bool = False,
    config: Any = None,
    quantize: str | None = None,
) -> None:
    """Refuse a device_map that cannot be followed. others: max_memory and offload_folder, which go with it. The rest: of the model `name`.

    Raises:
        ValueError: an unknown value, one without effect, or a model whose weights cannot be kept elsewhere.
        RuntimeError: accelerate is not installed.
    """
    if device_map is None:
        if given := [option for option, value in others.items() if value is not None]:
            raise ValueError(
                f"{' and '.join(given)} {'has' if len(given) == 1 else 'have'} no effect without device_map; give device_map='auto' "
                "(--device-map auto) as well, or leave it out"
            )
        return
    _check_value(device_map)
    if device is not None:
        raise ValueError(f"device is {device!r}, where all of the model would be, and device_map was given too; give one of them")
    if is_gguf:
        raise ValueError(
            f"device_map was given and {name} is a GGUF file, whose weights are dequantised in memory, all of them; write it as a folder first: "
            "dms.io.base_models.load_base(FILE).save_pretrained(FOLDER), and load_tokenizer(FILE) the same way"
        )
    form = quantize or (None if config is None else quant_method(config))
    if form is not None:
        raise ValueError(
            f"device_map was given and the weights of {name} are quantised ({form}): packed ones stay on one device, and unpacking them was not tried "
            "with it; leave device_map out, or give the base unpacked (with --other-base, where gates were trained on the packed one)"
        )
    require("device_map", "accelerate")


def _check_value(device_map: Any) -> None:
    if isinstance(device_map, str):
        if device_map not in STRATEGIES:
            raise ValueError(
                f"device_map is {device_map!r}{nearest(device_map, STRATEGIES)}; give one of {', '.join(STRATEGIES)}, or in Python a mapping of modules "
                "to places; device=... puts all of a model on one device"
            )
        return
    if not isinstance(device_map, Mapping) or not device_map:
        raise ValueError(f"device_map is {device_map!r}; give one of {', '.join(STRATEGIES)}, or a mapping of modules to places")
    for module, place in device_map.items():
        if not isinstance(module, str) or not _is_place(place):
            raise ValueError(
                f"device_map has {module!r}: {place!r}; give modules by name ('': the model) and their places: a device's number or name, 'cpu' or 'disk'"
            )


def _is_place(place: Any) -> bool:
    if isinstance(place, bool) or not isinstance(place, int | str | torch.device):
        return False
    if isinstance(place, int):
        return place >= 0
    try:
        return place == "disk" or torch.device(place).type != "meta"
    except RuntimeError:
        return False


def completed(model: nn.Module, device_map: DeviceMap) -> DeviceMap:
    """A mapping without overlaps: of a module that has others of the map within it, its other children are named in its place.

    accelerate cannot keep a part of a placed module elsewhere, and transformers takes "layers.1" for the beginning of "layers.10" too.

    Raises:
        ValueError: a name that is no module's, a module without a place, one with weights of its own that is divided, or tied weights in two
            places.
    """
    if isinstance(device_map, str):
        return device_map
    modules = dict(model.named_modules())
    if unknown := [name for name in device_map if name not in modules]:
        raise ValueError(f"device_map has {unknown[0]!r}, which is no module of {type(model).__name__}{nearest(unknown[0], modules)}")
    found: dict[str, Any] = {}

    def put(name: str, place: Any) -> None:
        place = device_map.get(name, place)
        module, prefix = modules[name], f"{name}." if name else ""
        if not any(other.startswith(prefix) and other != name for other in device_map):
            if place is None and next(_tensors(module, recurse=True), None) is not None:
                raise ValueError(f"device_map has no place for {name} of {type(model).__name__}; name it, or '' for all that has no other")
            if place is not None:
                found[name] = place
            return
        if next(_tensors(module, recurse=False), None) is not None:
            raise ValueError(
                f"device_map divides {name or 'the model'} ({type(module).__name__}), which has weights of its own; place it as a whole"
            )
        for child, _ in module.named_children():
            put(prefix + child, place)

    put("", None)
    for second, first in hf_compat.tied_weights(model).items():
        # What shares its weights with another module is where that one is.
        one, other = (next(module for module in _around(name) if module in found) for name in (second, first))
        if found[one] != found[other]:
            if one in device_map or one != second.rpartition(".")[0]:
                raise ValueError(
                    f"device_map puts {one} on {found[one]} and {other} on {found[other]}, and both share {first} (tied weights); give them one place"
                )
            found[one] = found[other]
    return found


def _around(name: str) -> Iterator[str]:
    """The modules that hold a weight, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=recurse)
    yield from module.buffers(recurse=recurse)
