"""Activation checkpointing of a model whose gates train: a layer that runs again decides as it did the first time.

transformers runs a checkpointed layer through a function that it keeps on the layer. Here that function also brings back the pass
that the layer belonged to, whatever ran since, and lets a store in host memory hold the layer's inputs.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dms import hf_compat
from dms.modes import DMSState, ForwardPass


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing of the kind that keeps the gradient of the compression count: not the reentrant one."""
    # transformers renames this: the older name is deprecated where the newer exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Else everything before the first gate would be differentiated for nothing.
    hf_compat.needs_no_input_gradients(model)


def follow_passes(state: DMSState, decoder: nn.Module) -> None:
    """Have the checkpointed layers of a decoder run again under the pass that they first ran under.

    Raises:
        ValueError: checkpointing of the reentrant kind, which cuts the gradient of the compression count.
    """
    for module in decoder.modules():
        hf_compat.wrap_checkpointing(module, functools.partial(_with_passes, state))


def _with_passes(state: DMSState, checkpoint: Callable) -> Callable:
    keywords = getattr(checkpoint, "keywords", {})
    if keywords.get("use_reentrant", True):
        raise ValueError(
            "activation checkpointing is of the reentrant kind, which cuts the gradient of the compression count; "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if keywords.get("context_fn") is not None:
        # Wrapped in an earlier pass.
        return checkpoint
    return functools.partial(_checkpoint, state, checkpoint, use_reentrant=False, context_fn=functools.partial(_contexts, state))


def _checkpoint(state: DMSState, checkpoint: Callable, *args, **kwargs):
    """Run a layer under activation checkpointing; what it saves are its inputs."""
    store = None if state.forward is None else state.forward.store
    if store is None:
        return checkpoint(*args, **kwargs)
    store.begin_group()
    with store.hooks():
        return checkpoint(*args, **kwargs)


def _contexts(state: DMSState) -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint: the pass as a layer's first one, and later the same again, recomputed."""
    if state.forward is None:
        return nullcontext(), nullcontext()
    return _Within(state, state.forward.as_first_pass()), _Within(state, state.forward.as_recomputation())


class _Within:
    """Makes `forward` the current pass, as the recomputation needs, whatever ran since.

    Entered once for each backward: a retained graph has several.
    """

    def __init__(self, state: DMSState, forward: ForwardPass):
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
