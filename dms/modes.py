"""The modes of a retrofitted model, and its state: what is fixed between passes, and what one pass collects.

"dense" is the untouched model, bit for bit; with borrowed gates it is the model without their channels. "train" makes noisy soft decisions over whole documents. "evict" makes hard ones, in
prefill as in decode. "label" is dense, and collects the gates' logits and what keys are read for later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers.cache_utils import Cache

from dms import hf_compat
from dms.config import DMSConfig
from dms.gates import AnyGate
from dms.layer_discovery import AttentionLayer, FollowingLayer
from dms.masks import Tokens

if TYPE_CHECKING:
    from dms.training.budgets import Budget
    from dms.training.offload import HostStore
    from dms.training.packed_attention import PackedAttention

Mode = Literal["dense", "train", "evict", "label"]

AttentionFunction = Callable[..., torch.Tensor]
"""query [B, Hq, T, D], key and value [B, H, S, D], and what transformers' attention interface gives by name -> [B, T, Hq, D]."""


@dataclass(frozen=True)
class Noise:
    """Names the noise of one training pass."""

    seed: int
    """The run's."""
    sequence_B: torch.Tensor
    """[B] int64: the number of each sequence among all sequences of the run."""


@dataclass(frozen=True)
class ForwardPass:
    """One pass of the decoder with its gates on: fixed when it begins, and collecting what its layers decide.

    Each mode has a subclass: `dms.attention.EvictPass`, `dms.training.soft_decisions.TrainPass`,
    `dms.training.future_attention.LabelPass`.
    """

    mode: Mode
    tokens: Tokens
    """Where the pass's tokens stand; of whole sequences where processes share them."""
    has_cache: bool = False
    """The pass was given a cache, or made one."""
    rows: PackedAttention | None = None
    """As in DMSState."""
    store: HostStore | None = None
    """Where the activations of checkpointed layers rest until the backward; None: where they are."""
    entered: set[int] = field(default_factory=set)
    """Indices of the layers whose attention was called."""
    followed: dict[int, AttentionFunction] = field(default_factory=dict)
    """The attention functions of layers that others follow, by index."""

    @classmethod
    def begin(cls, state: DMSState, tokens: Tokens, *, has_cache: bool) -> ForwardPass:
        """The pass that a model is about to make."""
        raise NotImplementedError

    def decide(
        self, state: DMSState, layer: AttentionLayer, gate: AnyGate, hidden_BTM: torch.Tensor, cache: Cache | None
    ) -> AttentionFunction:
        """Run a layer's gate on what it reads (of a linear one what attention reads, of a borrowed one its channel [B, T, H]), and return the attention function that follows from its decision."""
        raise NotImplementedError

    def follow(self, layer: FollowingLayer) -> AttentionFunction:
        """The attention function of the layer whose keys and values this one attends to, by the same decision.

        Raises:
            RuntimeError: that layer was not called in this pass.
        """
        if layer.source not in self.followed:
            raise RuntimeError(
                f"{layer.name} ({type(layer.module).__name__}) reads the keys and values of layer {layer.source}, which was not called before it in "
                "this pass; such a model cannot be retrofitted"
            )
        return self.followed[layer.source]

    def end(self) -> None:
        """All layers have attended. Called where some follow others."""

    def as_first_pass(self) -> ForwardPass:
        """The same pass inside a layer that activation checkpointing will run again."""
        return self

    def as_recomputation(self) -> ForwardPass:
        """The same pass run again by activation checkpointing: what it decides was collected the first time."""
        return type(self)(self.mode, self.tokens, followed=self.followed)

    def enter(self, layer: AttentionLayer | FollowingLayer) -> None:
        """Note that a layer's attention is called; raises RuntimeError where it was called in this pass before."""
        if layer.index in self.entered:
            raise RuntimeError(
                f"{layer.name} ({type(layer.module).__name__}) was called more than once in a pass, and its gate decides once for each token; "
                "such a model cannot be retrofitted"
            )
        self.entered.add(layer.index)


@dataclass
class DMSState:
    """The state of a retrofitted model, at `model.dms`. Change the mode with `dms.set_mode`."""

    config: DMSConfig
    layers: list[AttentionLayer]
    """Those with gates."""
    following: list[FollowingLayer]
    """Those that attend to the keys and values of a layer with a gate, and so by its decisions."""
    skipped: dict[str, str]
    """Why the layers without gates have none, by name; the following ones among them."""
    head_counts: list[tuple[int, int]]
    """Query and KV heads of the attention layers, gated or not, each pair once."""
    decoder: nn.Module
    """The module that owns the layers."""
    decoder_is_inside: bool
    """The decoder is part of a multimodal model, which turns the attention mask that it is given into others."""
    layer_configs: list[Any]
    """The transformers configurations that name the attention function of layers with gates and of those that follow them."""
    other_configs: list[Any]
    """Those of the decoder and of its other layers, where they are not the same."""
    original_attention: str
    attention_name: str
    """Ours, which transformers calls while gates are on."""
    dense_attention: str
    """What layers with gates call in dense mode: the original, or, under gate `borrowed`, ours before it."""
    rotary: RotaryLengths
    takes_cache: bool = True
    """The model works with a cache that it did not make (minimax does not)."""
    trained_length: int | None = None
    """Tokens of the sequences that the gates were trained on; None: not known."""

    evict_bias: float = 0.0
    """Added to every gate's logit in evict mode; above 0 evicts more."""
    page_size: int = 64
    """Of the caches that evict mode makes by itself, as the next four."""
    max_cache_bytes: int | None = None
    kv_dtype: str | None = None
    """For pages: "int8", "fp8" or "int4"; None: the model's own dtype."""
    offload_layers: bool = False
    """Pages rest in host memory, and each layer's are on the device while it is read."""
    prefill_chunk: int | None = None
    """Tokens of a prompt that `generate` reads at a time; None: all."""
    masked_attention: AttentionFunction | None = None
    """In evict mode without a cache, in place of `dms.attention.evict_attention`; None: that."""
    budget: Budget = "decided"
    """In training, what the target ratio counts."""
    offload_activations: bool = False
    """In training, inputs and attention outputs of checkpointed layers rest in host memory until the backward."""

    mode: Mode = "dense"
    noise: Noise | None = None
    """Of the next training passes."""
    tokens: Tokens | None = None
    """Where the tokens of the next training passes stand; None: found from attention mask and positions."""
    rows: PackedAttention | None = None
    """Computes the attention of packed sequences in training, of the teacher's dense passes too; None: transformers' own masks."""
    given_mask: torch.Tensor | None = None
    """The attention mask that a model around the decoder was given in the running pass."""
    rope_deltas: dict[nn.Module, torch.Tensor | None] = field(default_factory=dict)
    """What the running pass of a multimodal model, which is of text alone, has set aside, by module."""
    forward: ForwardPass | None = None
    """The latest pass with gates on; None after a dense one."""

    @cached_property
    def followed(self) -> frozenset[int]:
        """Indices of the layers that others follow."""
        return frozenset(layer.source for layer in self.following)

    @cached_property
    def decoder_signature(self) -> inspect.Signature:
        return inspect.signature(self.decoder.forward)

    def __getstate__(self) -> dict[str, Any]:
        # The last pass is no part of a copy, and what it holds cannot always be copied.
        return {name: value for name, value in vars(self).items() if name != "decoder_signature"} | {"forward": None}

    def activate(self, mode: Mode) -> None:
        """Choose the mode and the attention function. Only the text decoder's: the public setter would hand it on to vision towers.

        Raises:
            RuntimeError: train or label mode in an exported folder, whose code lacks what only training needs.
        """
        _pass_type(mode)
        self.mode = mode
        if self.rows is not None:
            ours = others = self.rows.attention_name
        else:
            ours, others = self.dense_attention if mode == "dense" else self.attention_name, self.original_attention
        self._use(ours, others)

    def name_original(self) -> None:
        """Let the configurations name the model's own attention function, as its files do, until a mode is chosen."""
        self._use(self.original_attention, self.original_attention)

    def _use(self, ours: str, others: str) -> None:
        for config in self.layer_configs:
            hf_compat.set_attention(config, ours)
        for config in self.other_configs:
            hf_compat.set_attention(config, others)

    def begin(self, tokens: Tokens, *, has_cache: bool) -> None:
        """Begin a pass in the current mode, with its gates on."""
        kind = _pass_type(self.mode)
        assert kind is not None, "in dense mode no pass begins"
        self.forward = kind.begin(self, tokens, has_cache=has_cache)


def _pass_type(mode: Mode) -> type[ForwardPass] | None:
    """The class of a mode's passes. Imported here, since both import this module, and exported folders come without `dms.training`."""
    if mode == "evict":
        from dms.attention import EvictPass

        return EvictPass
    if mode == "train":
        from dms.training.soft_decisions import TrainPass

        return TrainPass
    if mode == "label":
        from dms.training.future_attention import LabelPass

        return LabelPass
    return None


def set_mode(
    model: nn.Module, mode: Mode, noise: Noise | None = None, tokens: Tokens | None = None, rows: PackedAttention | None = None
) -> None:
    """Switch a retrofitted model to "dense", "train", "evict" or "label".

    noise: of the training passes; None: none. tokens: where the tokens of training and label passes stand, which packed documents beside padding
    need; None: found from attention mask and positions. rows: computes the attention of packed sequences; `tokens` are then those of
    whole sequences.

    Raises:
        ValueError: an unknown mode, or a model without gates.
        RuntimeError: train or label mode in an exported folder, which comes without the code that only training needs.
    """
    state = state_of(model)
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; the modes are 'dense', 'train', 'evict' and 'label'")
    state.noise, state.tokens, state.rows = noise, tokens, rows
    if rows is not None:
        if mode == "evict" or tokens is None:
            raise ValueError(
                "set_mode was given rows, which are for modes 'train' and 'label' and the teacher's 'dense' passes, and need tokens too"
            )
        rows.tokens = tokens
    state.activate(mode)


def state_of(model: nn.Module) -> DMSState:
    """Raises ValueError where the model has no gates."""
    state = getattr(model, "dms", None)
    if not isinstance(state, DMSState):
        raise ValueError(
            f"{type(model).__name__} has no gates; attach them with dms.retrofit(model, dms.DMSConfig(...)) or load a retrofitted folder with dms.load"
        )
    return state


class RotaryLengths:
    """The rotary frequencies of a decoder that depend on the length read so far (longrope, dynamic NTK).

    transformers chooses them anew in each pass, by the largest position in it: a text read in parts would have keys of two kinds in its
    cache. Within `reading` all passes take the frequencies of the whole text's length, so that parts equal one pass; a pass that needs
    others than the cache was filled with is refused.
    """

    def __init__(self, decoder: nn.Module):
        self.length: int | None = None
        """Tokens of the text that is being read in parts; None: not known."""
        self.changes = hf_compat.rotary_changes(decoder)
        """By module: where each of its sets of frequencies changes, "switch" once or "grow" from there on. Empty for most models."""
        self._hooks = []
        for module in self.changes:
            self._hooks.append(module.register_forward_pre_hook(self._add_last_position, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._drop_last_position))

    def remove(self) -> None:
        """Take the hooks off, for a model that has no gates."""
        for hook in self._hooks:
            hook.remove()

    def frequencies_of(self, length: int) -> tuple[bool | int, ...]:
        """What tells apart the frequencies that texts of different lengths get."""
        found: list[bool | int] = []
        for kinds in self.changes.values():
            found += [length > limit if kind == "switch" else max(length, limit) for kind, limit in kinds]
        return tuple(found)

    def check(self, model_name: str, held_length: int, new_length: int, decodes: bool) -> None:
        """Raises ValueError where keys of another kind would join those in a cache.

        held_length: the length whose frequencies the held keys have; new_length: the same of the new ones. decodes: frequencies that
        grow may go on growing, as they do in transformers' own decoding.
        """
        held, new = self.frequencies_of(held_length), self.frequencies_of(new_length)
        switches = any(a != b for a, b in zip(held, new, strict=True) if isinstance(a, bool))
        if held == new or (decodes and not switches):
            return
        limits = sorted({limit for kinds in self.changes.values() for _, limit in kinds})
        raise ValueError(
            f"the rotary frequencies of {model_name} depend on a text's length beyond {', '.join(map(str, limits))} tokens: the cache holds keys "
            f"for a text of {held_length} and the new ones are for {new_length}, which do not go together; read the whole text in one pass or in "
            "one call of generate, or, where you read it in parts yourself, within dms.modes.reading(model, its tokens)"
        )

    def _add_last_position(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if self.length is None:
            return None
        if any(kind == "grow" and self.length > limit for kind, limit in self.changes[module]):
            hf_compat.forget_rotary_length(module)
        name = "position_ids"
        positions = kwargs[name] if name in kwargs else args[1]
        last = torch.full_like(positions[..., :1], self.length - 1)
        longer = torch.cat([positions, last], -1)
        return (args, {**kwargs, name: longer}) if name in kwargs else ((args[0], longer, *args[2:]), kwargs)

    def _drop_last_position(self, module: nn.Module, args: tuple, output):
        return output if self.length is None else tuple(part[..., :-1, :] for part in output)


@contextmanager
def reading(model: nn.Module, length: int) -> Iterator[None]:
    """Within it a text of `length` tokens is read in parts into one cache, in any mode: rotary frequencies are those of its length."""
    rotary = state_of(model).rotary
    before, rotary.length = rotary.length, length
    try:
        yield
    finally:
        rotary.length = before
