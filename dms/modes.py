"""What a retrofitted model is doing now: one explicit state, fixed for a forward and for its recomputation."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from dms import hf_compat
from dms.config import DMSConfig
from dms.layer_discovery import AttentionLayer
from dms.masks import Tokens
from dms.rotary import RotaryLengths
from dms.training.offload import HostStore
from dms_kernels.gated_attention import FirstPass

Mode = Literal["dense", "train", "evict"]


@dataclass(frozen=True)
class Noise:
    """Names the noise of one training forward: the run's seed and the number [B] int64 of each of its sequences."""

    seed: int
    sequence_B: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """One forward pass: fixed at its start. rows: as in DMSState; `tokens` are then those of whole rows. The dictionaries collect what its layers decided, by layer index.

    evicted_count / decided_count: [B] sums over heads and tokens (train: straight-through, with the gate's gradient).
    head_rate: [H] share of decided tokens evicted, detached. evicted: [B, T, H] bool, logits: [B, T, H] (evict mode without a cache).
    has_cache: the pass was given a cache, or made one. entered: layers whose attention was called. first_passes: what attention made in checkpointed layers, for their recomputation. keeps: this is such a layer's first pass.
    store: where activations rest until the backward; None: where they are.
    """

    mode: Mode
    tokens: Tokens
    noise: Noise | None = None
    rows: Any = None
    has_cache: bool = False
    entered: set[int] = field(default_factory=set)
    evicted_count: dict[int, torch.Tensor] = field(default_factory=dict)
    decided_count: dict[int, torch.Tensor] = field(default_factory=dict)
    head_rate: dict[int, torch.Tensor] = field(default_factory=dict)
    evicted: dict[int, torch.Tensor] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    first_passes: dict[int, FirstPass] = field(default_factory=dict)
    keeps: bool = False
    store: HostStore | None = None

    def as_first_pass(self) -> "Forward":
        """The same pass inside a layer that activation checkpointing will run again."""
        return replace(self, keeps=True)

    def as_recomputation(self) -> "Forward":
        """The same pass run again by activation checkpointing: what it decides was collected the first time."""
        return Forward(self.mode, self.tokens, self.noise, self.rows, first_passes=self.first_passes)

    def enter(self, layer: AttentionLayer) -> None:
        """Note that a layer's attention is called; raises RuntimeError where it was called in this pass before."""
        if layer.index in self.entered:
            raise RuntimeError(
                f"{layer.name} ({type(layer.module).__name__}) was called more than once in a pass, and its gate decides once for each token; "
                "such a model cannot be retrofitted"
            )
        self.entered.add(layer.index)

    def first_pass(self, layer: int) -> FirstPass | None:
        """What a layer's attention is to fill, or to resume from. A retained graph's second backward finds nothing, and runs it."""
        if not self.keeps:
            return self.first_passes.pop(layer, None)
        first_pass = FirstPass() if self.store is None else FirstPass(self.store.put, self.store.get)
        self.first_passes[layer] = first_pass
        return first_pass


@dataclass
class DMSState:
    """Lives at `model.dms`. Change `mode` with `dms.set_mode`; `noise` names the next training forward's noise, `tokens` where its
    tokens stand (None: found from attention mask and positions). rows: a `dms.training.packed_attention.Rows` where rows are divided
    among processes.

    layers: those with gates. skipped: why the others are left alone, by name. decoder: what owns the layers. model_configs: the transformers configurations
    that name the attention function. takes_cache: the model works with a cache that it did not make (minimax does not). evict_bias is added to the logits in evict mode. page_size, max_cache_bytes
    and kv_dtype (None or "int8", for pages) are for the caches that evict mode makes by itself; prefill_chunk is how many tokens of a prompt `generate` reads at a time (None: all).
    offload_activations: in training, inputs and attention outputs of checkpointed layers rest in host memory until the backward.
    trained_length: tokens of the rows that the gates were trained on, None: not known.
    rotary: of decoders whose rotary frequencies depend on the length read so far.
    decoder_is_inside: it is part of a model of more than text, which turns the attention mask that it is given into others; given_mask: that mask.
    """

    config: DMSConfig
    layers: list[AttentionLayer]
    skipped: dict[str, str]
    decoder: nn.Module
    model_configs: list
    original_attention: str
    attention_name: str
    takes_cache: bool = True
    mode: Mode = "dense"
    noise: Noise | None = None
    tokens: Tokens | None = None
    rows: Any = None
    evict_bias: float = 0.0
    page_size: int = 64
    max_cache_bytes: int | None = None
    kv_dtype: str | None = None
    prefill_chunk: int | None = None
    offload_activations: bool = False
    trained_length: int | None = None
    decoder_is_inside: bool = False
    given_mask: torch.Tensor | None = None
    rotary: RotaryLengths | None = None
    forward: Forward | None = None

    @cached_property
    def decoder_signature(self) -> inspect.Signature:
        return inspect.signature(self.decoder.forward)

    def __getstate__(self) -> dict:
        # The last pass is no part of a copy, and what it holds cannot always be copied.
        return {name: value for name, value in vars(self).items() if name != "decoder_signature"} | {"forward": None}

    def activate(self, mode: Mode) -> None:
        """Choose the attention function. Only the text decoder's: the public setter would hand it on to vision towers."""
        self.mode = mode
        name = self.original_attention if mode == "dense" else self.attention_name
        for config in self.model_configs:
            hf_compat.set_attention(config, name if self.rows is None else self.rows.attention_name)

    def checkpoint_contexts(self):
        """`context_fn` for torch.utils.checkpoint: the pass as a layer's first one, and later the same again, recomputed."""
        if self.forward is None:
            return nullcontext(), nullcontext()
        return CurrentPass(self, self.forward.as_first_pass()), CurrentPass(self, self.forward.as_recomputation())


class CurrentPass:
    """Makes `forward` the current pass, as activation checkpointing's recomputation needs, whatever ran since.

    Entered once for each backward: a retained graph has several.
    """

    def __init__(self, state: DMSState, forward: Forward):
        self.state, self.forward = state, forward

    def __enter__(self) -> None:
        state, forward = self.state, self.forward
        self.before = state.mode, state.forward, state.rows
        forward.entered.clear()
        state.forward, state.rows = forward, forward.rows
        if state.rows is not None:
            state.rows.tokens = forward.tokens
        state.activate(forward.mode)

    def __exit__(self, *_) -> None:
        mode, self.state.forward, self.state.rows = self.before
        self.state.activate(mode)


def enable_checkpointing(model: nn.Module) -> None:
    """Activation checkpointing of the kind that the count's gradient survives."""
    # transformers renames this: the older name is deprecated where the newer exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Whatever stands before the first gate would be differentiated for nothing.
    hf_compat.needs_no_input_gradients(model)


def state_of(model: nn.Module) -> DMSState:
    """Raises ValueError where the model has no gates."""
    state = getattr(model, "dms", None)
    if not isinstance(state, DMSState):
        raise ValueError(
            f"{type(model).__name__} has no gates; attach them with dms.retrofit(model, dms.DMSConfig(...)) or load a retrofitted folder with dms.load"
        )
    return state
