"""Decode steps of a reserved cache as graphs: captured once, and replayed as long as the cache lies where it lay.

A step of one token a row reads no length on the host: kernels find them on the device. So a captured step stays right while the cache grows, and has to be
captured anew only where a tensor of the cache was replaced, as by a pool that grew. What the host does at each step, which is to make sure of
room and to count, is done before and after the graph.

Shapes: B batch.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from dms import hf_compat
from dms.cache.fused_store import FusedStore
from dms.cache.layer import CompactedLayer
from dms.cache.page_pool import outside_inference_mode
from dms.modes import DMSState
from dms.placement import is_offloaded

if TYPE_CHECKING:
    from dms.cache.cache import DMSCache

# Room that is reserved beyond what gates were trained to keep.
_RESERVED_MORE = 1.25
# Arguments of a forward that a captured step takes, beside the cache: tensors [B, 1] (the mask's last column), and what stays the same.
_TENSORS = ("input_ids", "attention_mask", "position_ids")
_CONSTANTS = ("use_cache", "return_dict", "logits_to_keep")

Recorder = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor, bool]]
"""Takes what runs a step and gives its logits; returns how to run it again, the logits' tensor, in which they will be each time, and whether it
has run."""


def record_on_gpu(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor, bool]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph.replay, logits, False


recorders: dict[str, Recorder] = {"cuda": record_on_gpu}
"""By type of device; on others a reserved cache runs its steps as any cache does."""


def expected_share(model: Any, reserve_tokens: Any) -> float:
    """Of its tokens that a sequence is expected to keep, by what the gates were trained for.

    Raises:
        ValueError: reserve_tokens is no number of tokens.
    """
    if not isinstance(reserve_tokens, int) or isinstance(reserve_tokens, bool) or reserve_tokens < 1:
        raise ValueError(
            f"reserve_tokens is {reserve_tokens!r}; give the tokens that a sequence will have at most, prompt included, or None"
        )
    target_cr = getattr(model, "dms_origin", {}).get("target_cr")
    return 1.0 if target_cr is None else min(1.0, _RESERVED_MORE / target_cr)


def check_capture(cache: "DMSCache", state: DMSState, model_name: str, offloads: bool) -> None:
    """Raises ValueError where decode steps cannot be captured. offloads: pages rest in host memory."""
    if offloads:
        raise ValueError(
            "reserve_tokens and offload_layers were both given: a captured step reads pages where they lay when it was captured, and pages that rest in "
            "host memory come to a buffer for each step; leave out reserve_tokens, or give offload_layers=False"
        )
    growing = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, CompactedLayer)]
    if growing:
        raise ValueError(
            f"reserve_tokens was given, and layers {', '.join(map(str, growing))} of {model_name} have no gates: transformers' cache layers grow at each "
            "step, which cannot be captured; leave reserve_tokens out"
        )
    if is_offloaded(state.decoder):
        raise ValueError(
            f"reserve_tokens was given, and weights of {model_name} are kept in host memory or on disk between uses (device_map): they are brought "
            "anew at each step, which cannot be captured; leave reserve_tokens out"
        )
    if state.rotary.changes:
        raise ValueError(
            f"reserve_tokens was given, and the rotary frequencies of {model_name} depend on a text's length, which is asked at each step and "
            "cannot be captured; leave reserve_tokens out"
        )


class CapturedStep:
    """One captured step, which callers may replay in inference mode and outside."""

    @outside_inference_mode
    @torch.no_grad()
    def __init__(
        self,
        key: Any,
        inputs: dict[str, torch.Tensor],
        launches: list[Any],
        run: Callable[[dict[str, torch.Tensor]], ModelOutput],
        record: Recorder,
    ):
        """run: the model's forward of tensors by name. launches: of the cache's stores, as `FusedStore.step_launches` gives them.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        self._key = key
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        # Weakly, so that a pool that has grown is not kept.
        self._launches = [weakref.ref(launch) for launch in launches]
        self._output_type: type[ModelOutput] = ModelOutput
        self._cache_name = ""
        self._others: dict[str, Any] = {}
        """Fields of the output beside its logits and its cache, which would keep itself alive here."""

        def step() -> torch.Tensor:
            output = run(self._inputs)
            self._output_type = type(output)
            self._cache_name = next(name for name in hf_compat.CACHE_NAMES if name in output)
            self._others = {name: value for name, value in output.items() if name not in ("logits", self._cache_name)}
            return output["logits"]

        try:
            self._replay, self._logits, self.has_run = record(step)
        except RuntimeError as error:
            raise RuntimeError(
                f"a decode step could not be captured ({error}), as where a model asks its device for numbers; the cache is half-way through it: begin "
                "anew with a cache without reserve_tokens"
            ) from error

    def fits(self, key: Any, launches: list[Any]) -> bool:
        return self._key == key and all(mine() is launch for mine, launch in zip(self._launches, launches, strict=True))

    @outside_inference_mode
    @torch.no_grad()
    def replay(self, inputs: dict[str, torch.Tensor]) -> None:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._replay()

    def output(self, cache: Cache) -> ModelOutput:
        """Of the latest replay; the next one does not change it."""
        return self._output_type(**{"logits": self._logits.clone(), self._cache_name: cache}, **self._others)


def captured_forward(model: Any, state: DMSState, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A forward in evict mode by keyword arguments, replayed where it is a decode step over a reserved cache; forward: runs it as it is."""
    cache: Any = next((kwargs[name] for name in hf_compat.CACHE_NAMES if kwargs.get(name) is not None), None)
    if getattr(cache, "reserve_tokens", None) is None:
        return forward(**kwargs)
    given = {name: value for name, value in kwargs.items() if name not in hf_compat.CACHE_NAMES and value is not None}
    inputs = _step_inputs(cache, given)
    if inputs is None or not _can_be_captured(cache, inputs["input_ids"].device):
        return forward(**kwargs)
    cache.prepare_step()
    is_replayed = False
    try:
        launches = [store.step_launches() for store in _stores(cache)]
        constants = {name: given[name] for name in _CONSTANTS if name in given}
        weights = next(model.parameters()).data_ptr()
        key = (inputs["input_ids"].shape, tuple(inputs), tuple(constants.items()), state.evict_bias, weights)
        if any(launch is None for launch in launches):
            # The step before launched others: this one is run as it is, and the next one captured.
            cache.captured = None
            return forward(**kwargs)
        step = cache.captured
        if step is not None and step.fits(key, launches):
            is_replayed = True
            step.replay(inputs)
        else:
            # The cache does not keep itself by way of its step.
            cache.captured, named = None, weakref.WeakValueDictionary({hf_compat.cache_name(model): cache})
            if any(hf_compat.has_forward_hooks(layer.gate) for layer in state.layers):
                warnings.warn(
                    "gates have forward hooks, which run when a decode step is captured and not when it is replayed", stacklevel=3
                )
            record = recorders[inputs["input_ids"].device.type]
            step = CapturedStep(key, inputs, launches, lambda tensors: forward(**named, **tensors, **constants), record)
            if not step.has_run:
                step.replay(inputs)
            cache.captured = step
        return step.output(cache)
    finally:
        cache.end_step(is_replayed)


def _stores(cache: "DMSCache") -> list[Any]:
    return [layer.store for layer in cache.compacted_layers().values()]


def _can_be_captured(cache: "DMSCache", device: torch.device) -> bool:
    stores = _stores(cache)
    if torch.is_grad_enabled() or device.type not in recorders or len(stores) < len(cache.layers):
        return False
    return all(isinstance(store, FusedStore) and store.device == device for store in stores)


def _step_inputs(cache: "DMSCache", given: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """The tensors of a decode step of one token a row; None where it is not one that can be captured."""
    ids, mask, positions = (given.get(name) for name in _TENSORS)
    if cache.is_trial or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    is_known = all(name in _TENSORS or value is False or (name in _CONSTANTS and isinstance(value, int)) for name, value in given.items())
    # Without a cache, or with a tuple for an output.
    is_other = any(given.get(name) is False for name in _CONSTANTS)
    if not is_known or is_other or (mask is not None and mask.dim() != 2) or (positions is not None and positions.shape != ids.shape):
        return None
    if positions is None:
        # As a model numbers tokens that come without.
        positions = torch.full_like(ids, cache.get_seq_length())
    inputs = {"input_ids": ids, "position_ids": positions}
    return inputs if mask is None else inputs | {"attention_mask": mask[:, -1:]}
