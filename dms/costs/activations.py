"""What layers keep for the backward and need besides, from running one of each kind on fake tensors: no formula per family.

The model is on the meta device with its gates attached. Its parameters are replaced by fake ones of the dtypes that they would
have, its layers by one of each kind, its attention and packed linear layers by stand-ins; then it is run once as a student, once as a teacher and once as in an
evaluation, under `LiveBytes`.

Shapes: B batch, T tokens, M model dim.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dms import masks
from dms.costs.operators import LiveBytes
from dms.costs.packed_weights import is_attached
from dms.costs.shapes import ModelShape, layer_list
from dms.costs.stand_in_attention import StandInPackedAttention, replaced_attention, stand_in_attention
from dms.costs.stand_in_linear import replace_packed
from dms.costs.torch_compat import fake_tensors
from dms.modes import set_mode, state_of
from dms.training.soft_decisions import TrainPass, savings_of


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer, in bytes."""

    saved: int
    """What its forward leaves for the backward, its output included."""
    forward: int
    """The most that lives above what there was when its forward began."""
    backward: int
    """As `forward`, of its backward."""
    stays: int = 0
    """Of `saved`, what activation checkpointing does not free: inputs that packed linear layers keep past autograd."""

    @property
    def alone(self) -> int:
        """The most that running it forward and backward at once takes, as a recomputation does."""
        return max(self.forward, self.saved + self.backward)


@dataclass(frozen=True)
class Activations:
    """Bytes of what one GPU has of a micro-batch."""

    layers: list[LayerBytes]
    """By position."""
    before: int
    """What the forward leaves before the first layer: embeddings, positions."""
    after: int
    """What it leaves after the last one: the last norm."""
    teacher: int
    """The most that the teacher's pass takes."""
    evaluation: int
    """The most that the dense pass of an evaluation takes, by the model's own attention."""
    hidden: int
    """Hidden states [B, T, M] as layers hand them on."""

    @property
    def saved(self) -> int:
        return self.before + sum(layer.saved for layer in self.layers) + self.after


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What is passed through a model, and how."""

    batch: int
    length: int
    weight_dtype: torch.dtype
    """Of the model's frozen and trained weights, but for packed ones (`ModelShape.packing`); gates and adapters are float32."""
    autocast: bool
    kernels: bool
    """Attention by our kernels, else by the chunked route of a CPU."""
    packed_attention: bool = False
    """The teacher and layers without gates go by `dms.training.packed_attention`, not by transformers' own attention."""
    evaluated: tuple[int, int] | None = None
    """Batch and length of the run's evaluation; None: as the micro-batch."""


def measure(model: nn.Module, shape: ModelShape, given: MicroBatch, widths: tuple[int, ...] = (1,)) -> dict[int, Activations]:
    """Pass a micro-batch of fake tokens through a model on the meta device, by how many GPUs share a sequence: what one of them has.
    The model is of no use afterwards.

    Of what is kept some goes by tokens and some does not (casts of weights), so each width is run at its own length. In
    attention a GPU has all tokens of some heads instead of some tokens of all: as many numbers.

    Raises:
        ValueError: experts in float32, whose products PyTorch cannot run on fake tensors.
    """
    if given.weight_dtype != torch.bfloat16 and any(layer.has_experts for layer in shape.layers):
        raise ValueError(
            f"{shape.name} has experts, which are planned in bfloat16 alone; set precision=bf16, and train gates or gates+lora"
        )
    inputs = {} if shape.packing is None else replace_packed(model, shape.packing, given.weight_dtype, given.kernels)
    places = _one_of_each(shape)
    # The last one twice: between its two runs lies what a layer leaves, after the second also what comes after all layers.
    _replace(model, layer_list(model), _in_turn(shape, [*places, places[-1]]))
    found = {}
    with fake_tensors():
        _fake(model, given.weight_dtype)
        # The run's own evaluation has no autocast.
        evaluation = _without_gradients(model, torch.zeros(given.evaluated or (given.batch, given.length), dtype=torch.long), None)
        for width in widths:
            ids = torch.zeros(given.batch, given.length // width, dtype=torch.long)
            rows = StandInPackedAttention(given.kernels) if given.packed_attention or width > 1 else None
            # Without autocast's cache each layer makes its own casts, the last one's second run too; and the teacher's, which does
            # not train, are not kept in a run either.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.autocast, cache_enabled=False):
                student = _student(model, ids, given.kernels, rows, inputs)
                teacher = _without_gradients(model, ids, rows)
            model.zero_grad(set_to_none=True)
            by_key = {_key(shape, place): bytes_ for place, bytes_ in zip(places, student.layers, strict=True)}
            found[width] = Activations(
                layers=[by_key.get(_key(shape, place), LayerBytes(0, 0, 0)) for place in range(len(shape.layers))],
                before=student.before,
                after=student.after,
                teacher=teacher,
                evaluation=evaluation,
                hidden=student.hidden,
            )
    return found


def _key(shape: ModelShape, place: int) -> tuple:
    """Layers that cost the same: of one kind, and on the same side of the first that trains."""
    first = shape.first_trained
    return shape.layers[place].kind, (place > first) - (place < first)


def _one_of_each(shape: ModelShape) -> list[int]:
    found: dict[tuple, int] = {}
    for place, layer in enumerate(shape.layers):
        if layer.runs:
            found.setdefault(_key(shape, place), place)
    return sorted(found.values())


def _in_turn(shape: ModelShape, chosen: list[int]) -> list[int]:
    """The chosen layers, with those that text passes by where they were: decoders know these by their position."""
    left, found = list(chosen), []
    for place, layer in enumerate(shape.layers):
        if left:
            found.append(left.pop(0) if layer.runs else place)
    return found + left


def _replace(model: nn.Module, layers: nn.ModuleList, places: list[int]) -> None:
    """Leave the model the layers at `places`, in that order."""
    chosen = nn.ModuleList([layers[place] for place in places])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is layers:
                setattr(module, name, chosen)
    config: Any = state_of(model).decoder.config
    # No fewer than before: some decoders have inputs for each.
    config.num_hidden_layers = max(config.num_hidden_layers, len(chosen))
    if types := list(getattr(config, "layer_types", None) or ()):
        config.layer_types = [types[place] for place in places] + types[len(places) :]


def _fake(model: nn.Module, weight_dtype: torch.dtype) -> None:
    """Give every module parameters and buffers without storage, ties kept."""
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        attached = is_attached(module_name)
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                dtype = torch.float32 if attached else weight_dtype if parameter.is_floating_point() else parameter.dtype
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Marks:
    """Bytes alive where layers begin and end, forward and backward."""

    def __init__(self, live: LiveBytes, inputs: dict[int, int]):
        self.live, self.inputs = live, inputs
        self.stays: list[int] = []
        self.starts: list[int] = []
        self.forward: list[int] = []
        self.backward: dict[int, int] = {}
        self._place: int | None = None

    def before(self, module, args, kwargs=None) -> None:
        self._end_forward()
        self.starts.append(self.live.now)
        self.live.reset_peak()

    def after(self, module, args, output) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        place = len(self.starts) - 1
        if hidden.requires_grad:
            hidden.register_hook(functools.partial(self._begin_backward, place))

    def end(self) -> None:
        self._end_forward()

    def _end_forward(self) -> None:
        if self.starts:
            self.forward.append(self.live.peak - self.starts[-1])
            self.stays.append(sum(self.inputs.values()))
        self.inputs.clear()

    def _begin_backward(self, place: int, grad: torch.Tensor) -> None:
        self.end_backward()
        self._place, self._start = place, self.live.now
        self.live.reset_peak()

    def end_backward(self) -> None:
        if self._place is not None:
            self.backward[self._place] = self.live.peak - self._start


@dataclass(frozen=True)
class _Student:
    layers: list[LayerBytes]
    before: int
    after: int
    hidden: int


def _student(
    model: nn.Module, ids_BT: torch.Tensor, kernels: bool, rows: StandInPackedAttention | None, inputs: dict[int, int]
) -> _Student:
    state = state_of(model)
    tokens = masks.Tokens(torch.ones_like(ids_BT, dtype=torch.int32), torch.zeros_like(ids_BT, dtype=torch.int32))

    saved_BTK, whole_BT = savings_of(state, tokens)
    current = TrainPass("train", tokens, saved_BTK=saved_BTK, whole_BT=whole_BT)

    def enter(*_) -> None:
        # Not by the mode: in train mode the decoder's own hook would read documents from tensors that hold none.
        state.rows = rows
        state.activate("train")
        state.forward = current

    def leave(*_) -> None:
        # The layers of a kind are one object here, which runs more than once in a pass.
        current.entered.clear()

    live = LiveBytes(*model.parameters(), *model.buffers())
    weights, marks = live.now, _Marks(live, inputs)
    layers = layer_list(model)
    hooks = [state.decoder.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [layer.module.register_forward_pre_hook(leave) for layers in (state.layers, state.following) for layer in layers]
    for layer in {id(layer): layer for layer in layers}.values():
        hooks += [layer.register_forward_pre_hook(marks.before, with_kwargs=True), layer.register_forward_hook(marks.after)]
    set_mode(model, "dense")
    try:
        with live, replaced_attention(model, functools.partial(stand_in_attention, kernels=kernels)):
            hidden = state.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
            marks.end()
            kept, size = live.now, hidden.untyped_storage().nbytes()
            outputs = [hidden, *current.evicted_count.values()]
            torch.autograd.backward([x for x in outputs if x.requires_grad], [torch.empty_like(x) for x in outputs if x.requires_grad])
            marks.end_backward()
    finally:
        for hook in hooks:
            hook.remove()
        set_mode(model, "dense")
        state.forward = None
    saved = [after - before for before, after in zip(marks.starts, marks.starts[1:], strict=False)]
    found = [
        LayerBytes(saved[place], marks.forward[place], marks.backward.get(place, 0), marks.stays[place]) for place in range(len(saved))
    ]
    # The second run of the last one: what it left, without what the first left, came after it.
    return _Student(found, marks.starts[0] - weights, kept - marks.starts[-1] - saved[-1], size)


def _without_gradients(model: nn.Module, ids_BT: torch.Tensor, rows: StandInPackedAttention | None) -> int:
    """The most bytes alive in a dense pass without gradients."""
    set_mode(model, "dense")
    state_of(model).rows = rows
    state_of(model).activate("dense")
    live = LiveBytes(*model.parameters(), *model.buffers())
    weights = live.now
    with torch.no_grad(), live:
        state_of(model).decoder(input_ids=ids_BT, use_cache=False)
    return live.peak - weights
