"""Quantised bases: how a configuration says that its weights are packed, how they are loaded or packed, and whether gates can train on them.

A packed weight is one that is no plain floating-point tensor: codes of a few bits, with the scales that they are multiplied by. Packed weights
are frozen; gradients pass through them to the gates below.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dms.requirements import missing

# What the recipe key `quantize` packs a base into, and the packages that each needs.
FORMS = {
    "nf4": ("bitsandbytes", "accelerate"),
    "int8": ("bitsandbytes", "accelerate"),
    "torchao-int8": ("torchao", "accelerate"),
    "torchao-int4": ("torchao", "accelerate"),
}
# As above, of files that are packed already. Others' absence transformers itself reports in a line.
_NEEDS = {"bitsandbytes": FORMS["nf4"], "torchao": FORMS["torchao-int8"], "fp8": ("accelerate",)}
# Rounded activations (int8, FP8) make a layer's differences unlike its gradient by up to 2 %; a gradient that is not its own by far more.
_TOLERANCE = 0.05


def quant_method(config: Any) -> str | None:
    """How a configuration's weights are quantised, such as "fp8", "gptq" or "bitsandbytes"; None: they are not."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
            return str(getattr(method, "value", method))
    return None


def is_mxfp4(config: Any) -> bool:
    """Whether weights are saved in MXFP4, four bits and a scale for each 32: `load_base` unpacks them."""
    return quant_method(config) == "mxfp4"


def is_packed(config: Any) -> bool:
    """Whether a base of this configuration has packed weights once it is loaded."""
    return quant_method(config) not in (None, "mxfp4")


def load_options(config: Any, dtype: torch.dtype | None = None, quantize: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which weights of this kind are loaded.

    quantize: one of FORMS, that weights are packed into, which must be ordinary ones; None: as they are. dtype: that packed layers then compute in.

    Raises:
        ValueError: an unknown form, or a package that is not installed.
    """
    # It would log at each pass of each layer that int8 products round what they read to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantize is None:
        if is_packed(config):
            _check_packages("a base in this format", *_NEEDS.get(str(quant_method(config)), ()))
        if not is_mxfp4(config):
            return {}
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if quantize not in FORMS:
        raise ValueError(f"quantize is {quantize!r}; the forms are {', '.join(FORMS)}")
    _check_packages(f"quantize: {quantize}", *FORMS[quantize])
    if quantize == "torchao-int4" and not (find_spec("mslk") and torch.cuda.is_available()):
        raise ValueError(
            "quantize: torchao-int4 needs a GPU and the package mslk (pip install mslk-cuda); or choose nf4, which has 4 bits too"
        )
    return {"quantization_config": _packing(quantize, dtype)}


def _packing(quantize: str, dtype: torch.dtype | None) -> Any:
    import transformers

    if quantize == "nf4":
        # As in QLoRA (arXiv 2305.14314): the scales of 64 weights each are packed too, which saves 0.37 bits a weight.
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    import torchao.quantization as ao

    return transformers.TorchAoConfig(ao.Int8WeightOnlyConfig() if quantize == "torchao-int8" else ao.Int4WeightOnlyConfig())


def _check_packages(what: str, *packages: str) -> None:
    if absent := [package for package in packages if find_spec(package) is None]:
        raise ValueError(missing(what, *absent))


def packed_modules(model: Any) -> dict[str, nn.Module]:
    """A model's modules with packed weights, by name; empty for a model that is not quantised."""
    config = getattr(model, "config", None)
    if config is None or not is_packed(config):
        return {}
    return {name: module for name, module in model.named_modules() if any(map(_is_packed_tensor, _own_tensors(module)))}


def hold_unpacked(model: Any, dtype: torch.dtype | None) -> None:
    """Hold in `dtype` what a model with packed weights does not pack; others are left. transformers holds it as its files do, whatever was asked for."""
    packed, own = packed_modules(model), model.dtype
    if not packed or dtype is None:
        return
    for name, parameter in model.named_parameters():
        # Some models keep a few in float32.
        if parameter.dtype == own and name.rpartition(".")[0] not in packed:
            parameter.data = parameter.data.to(dtype)


def packed_tensors(model: Any) -> dict[str, torch.Tensor]:
    """All plain tensors that packed modules hold, codes and scales, by name; not their biases, whose dtype bitsandbytes changes as it goes."""
    found: dict[str, torch.Tensor] = {}
    for name, module in packed_modules(model).items():
        # Their state, since scales are often no parameters.
        for key, value in module.state_dict(prefix=f"{name}.", keep_vars=True).items():
            if key != f"{name}.bias":
                found |= dict(_plain(key, value.detach()))
    return found


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _is_packed_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a quantised model holds codes: a type of its own, numbers of one byte, or rows of 32-bit integers."""
    if _is_wrapper(tensor):
        return True
    return tensor.dim() > 0 and (tensor.dtype == torch.int32 or (tensor.element_size() == 1 and tensor.dtype != torch.bool))


def _is_wrapper(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor consists of: several where it is a wrapper of others, such as torchao's."""
    if not _is_wrapper(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def check_gradients(model: Any, name: str) -> None:
    """Try one packed layer of each kind: its gradient must be that of what it computes, as gates that train below it need.

    Raises:
        ValueError: a kind of layer that does not differentiate, or wrongly.
    """
    head = model.get_output_embeddings()
    kinds: dict[tuple[type, type], str] = {}
    for path, module in packed_modules(model).items():
        if module is head:
            raise ValueError(
                f"the head of {name} is packed too ({path}), and the distillation loss reads its weight; leave the head unpacked"
            )
        if not isinstance(module, nn.Embedding):
            kinds.setdefault((type(module), type(getattr(module, "weight", None))), path)
    for (kind, weight), path in kinds.items():
        if why := _why_no_gradient(model.get_submodule(path), model.dtype):
            packed = f"{kind.__name__}" + ("" if weight.__name__ in ("NoneType", "Parameter") else f" of {weight.__name__}")
            raise ValueError(
                f"{name} cannot be retrofitted as it is packed ({quant_method(model.config)}): {why} ({packed}, such as {path}), so gates below "
                "would learn nothing right; give the base dequantised, or an ordinary one with quantize=nf4"
            )


def _why_no_gradient(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a linear layer's gradient is of no use, or None: along its own gradient it must rise as much as that says."""
    width = getattr(module, "in_features", None)
    if width is None:
        return "whether gradients pass through its packed layers can be tried on linear layers alone"
    device, mode = next(_own_tensors(module)).device, module.training
    # As in a run: some kinds compute otherwise for inference.
    module.train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, int(width), generator=generator).to(device, dtype).requires_grad_()
    try:
        y = module(x)
        v = torch.randn(y.shape, generator=generator).to(device, torch.float32)
        (y.float() * v).sum().backward()
        assert x.grad is not None
        # As large as activations are, whose rounding is relative to them.
        up = (x.grad.float() * x.grad.float().square().mean().rsqrt()).to(dtype)
        with torch.no_grad():
            risen = ((module(up) - module(torch.zeros_like(up))).float() * v).sum().item()
        said = (x.grad.float() * up.float()).sum().item()
    except Exception as error:  # noqa: BLE001 - kernels without a backward, or without this device, fail in their own ways
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return f"its packed layers have no gradient ({type(error).__name__}: {first})"
    finally:
        module.train(mode)
    if not abs(risen - said) <= _TOLERANCE * abs(risen):
        return f"the gradient of its packed layers is not that of what they compute (a rise of {risen:.4g} where it says {said:.4g})"
    return None
