"""Rotary frequencies that depend on the length read so far (longrope, dynamic NTK), for texts that are read in parts.

transformers chooses them anew in each pass, by the largest position in it: a text read in parts would have keys of two kinds in its
cache. Within `reading` all passes take the frequencies of the whole text's length, so that parts equal one pass; a pass that needs
others than the cache was filled with is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dms import hf_compat


class RotaryLengths:
    """The parts of a decoder whose rotary frequencies depend on the length; `length`: tokens of the text being read, None: not told."""

    def __init__(self, decoder: nn.Module):
        self.length: int | None = None
        # By module: where each of its sets of frequencies changes, "switch" once or "grow" from there on.
        self.changes = hf_compat.rotary_changes(decoder)
        for module in self.changes:
            module.register_forward_pre_hook(self._add_last_position, with_kwargs=True)
            module.register_forward_hook(self._drop_last_position)

    def frequencies_of(self, length: int) -> tuple:
        """What tells apart the frequencies that texts of different lengths get."""
        found = []
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
            "one call of generate, or, where you read it in parts yourself, within dms.rotary.reading(model, its tokens)"
        )

    def _add_last_position(self, module: nn.Module, args: tuple, kwargs: dict):
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
    rotary = model.dms.rotary
    before, rotary.length = rotary.length, length
    try:
        yield
    finally:
        rotary.length = before
