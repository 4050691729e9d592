"""Attention over packed sequences in training: by segments instead of masks, in one process or with sequence parallelism.

Transformers would give packed documents a mask of T x T, or (gpt_oss, opt) let them see each other, and eager attention makes scores
of T x T. Here the teacher's pass and the layers without gates run on `gated_attention` as well.

With sequence parallelism each process holds a part of every sequence, and attention trades tokens for heads, after DeepSpeed-Ulysses
(arXiv 2309.14509): an all-to-all turns [T/N tokens, all heads] into [all tokens, heads/N], and another one turns the result back. Gates
are computed where their token is and travel beside the keys; alignment, windows and documents are then those of whole sequences, so that
a border between two processes means nothing. All else in a decoder works token by token.

Shapes: B batch, T tokens of a sequence, N processes that share it, S = T / N tokens held here, Hq query heads, H KV heads, D head dim.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dms import hf_compat, masks
from dms.attention import scale_of, take_decision
from dms.masks import Tokens
from dms.modes import state_of
from dms_kernels import gated_attention
from dms_kernels.gated_attention import FirstPass

# What a layer that carries no gate may be; its attention is then a window of the kernel's.
_KNOWN_LAYERS = ("full_attention", "attention", "sliding_attention")
_numbers = itertools.count()


class PackedAttention:
    """This process's place among the N that share sequences, and the attention that they compute."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        """group: the processes that share sequences; None: this one has them whole."""
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.tokens: Tokens | None = None
        """Of the whole sequences [B, T] of the running pass; `set_mode` and recomputation set it."""
        self.attention_name = f"dms_packed_{next(_numbers)}"
        hf_compat.register_attention(self.attention_name, self._attention)

    def part(self, num_tokens: int) -> slice:
        """Which of a sequence's tokens are here."""
        size = num_tokens // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def held(self, whole_BT: torch.Tensor) -> torch.Tensor:
        """The part of whole sequences that is here, [B, S]."""
        return whole_BT[:, self.part(whole_BT.shape[1])]

    def divide(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of whole sequences -> this process's part of each, with the whole sequences' segments and positions beside it."""
        parts = {name: self.held(value) if value.dim() >= 2 else value for name, value in batch.items()}
        return {**parts, "row_segment_ids": batch["segment_ids"], "row_position_ids": batch["position_ids"]}

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, whose gradient goes to each one's own part."""
        if self.size == 1:
            return part
        whole = part.detach().clone()
        dist.all_reduce(whole, group=self.group)
        return part + (whole - part.detach())

    @contextmanager
    def serving(self, model: Any) -> Iterator[None]:
        """Within it a model without gates, such as a teacher that is another model, attends over whole sequences."""
        config = model.config.get_text_config()
        before = hf_compat.set_attention(config, self.attention_name)
        try:
            yield
        finally:
            hf_compat.set_attention(config, before)

    def train_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        log_keep_BSH: torch.Tensor,
        tokens: Tokens,
        window: int | Sequence[int],
        sinks: int,
        alignment: str,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Noisy soft masking over whole sequences. query [B, Hq, S, D], key and value [B, H, S, D] -> [B, S, Hq, D].

        log_keep_BSH: of the tokens held here, by the token whose gate decided; [B, S, H, K] for a sequence of K windows. tokens: of
        the whole sequences.
        """
        return self._attend(query, key, value, log_keep_BSH, tokens, window=window, sinks=sinks, alignment=alignment, **kwargs)

    def _attention(self, module: Any, query, key, value, attention_mask, sliding_window=None, scaling=None, **kwargs):
        """What transformers calls: in train mode the attention that waits on the layer; else dense attention, or a sliding window."""
        pending = take_decision(module)
        if pending is not None:
            return pending(query, key, value, scaling=scaling, **kwargs).contiguous(), None
        if sliding_window is None and _kind(module) == "sliding_attention":
            raise RuntimeError(
                f"{type(module).__name__} does not tell its attention function of its sliding window; it cannot be trained on packed sequences"
            )
        assert self.tokens is not None, "set_mode gives the tokens with this attention"
        log_keep, window = None, 0
        if sliding_window is not None:
            # Every key leaves with the window, in which the query's own token is counted.
            window = int(sliding_window) - 1
            log_keep = torch.full((*key.shape[:1], key.shape[2], key.shape[1]), float("-inf"), device=key.device)
        out = self._attend(query, key, value, log_keep, self.tokens, window=window, sinks=0, alignment="own", scaling=scaling, **kwargs)
        return out.contiguous(), None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_keep_BSH: torch.Tensor | None,
        tokens: Tokens,
        *,
        window: int | Sequence[int],
        sinks: int,
        alignment: str,
        first_pass: FirstPass | None = None,
        kv_dtype: str | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        q_BTHD = self._to_heads(query.transpose(1, 2))
        k_BTHD, v_BTHD = (self._to_heads(self._copied(x.transpose(1, 2))) for x in (key, value))
        log_keep_BTH = None
        if log_keep_BSH is not None:
            # One decision a token and head, or one for each window.
            is_single = log_keep_BSH.dim() == 3
            gathered = self._to_heads(self._copied(log_keep_BSH[..., None] if is_single else log_keep_BSH))
            log_keep_BTH = masks.align(gathered[..., 0] if is_single else gathered, tokens.segment_BT, alignment, 0.0).contiguous()
        sinks_of_heads = None if s_aux is None else s_aux.chunk(self.size)[self.rank]
        out_BTHD = gated_attention(
            q_BTHD,
            k_BTHD,
            v_BTHD,
            log_keep_BTH,
            window=window,
            scale=scale_of(scaling, query),
            segment_ids=tokens.documents,
            sinks=sinks,
            softcap=softcap,
            sink_logits=sinks_of_heads,
            first_pass=first_pass,
            kv_dtype=kv_dtype,
        )
        return self._to_tokens(out_BTHD)

    def _copied(self, x_BSHD: torch.Tensor) -> torch.Tensor:
        """A KV head for each process, where there are fewer heads than processes."""
        copies = self.size // x_BSHD.shape[2]
        return x_BSHD.repeat_interleave(copies, 2) if copies > 1 else x_BSHD

    def _to_heads(self, x_BSHD: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] of all heads -> [B, T, H / N, D] of all tokens."""
        if self.size == 1:
            return x_BSHD
        return _Trade.apply(x_BSHD, self.group, True)

    def _to_tokens(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x_BTHD
        return _Trade.apply(x_BTHD, self.group, False)


class _Trade(torch.autograd.Function):
    """An all-to-all between tokens and heads; its gradient is the one back."""

    @staticmethod
    def forward(ctx, x, group, to_heads: bool):
        ctx.group, ctx.to_heads = group, to_heads
        return _trade(x, group, to_heads)

    @staticmethod
    def backward(ctx, grad):
        return _trade(grad, ctx.group, not ctx.to_heads), None, None


def _trade(x: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
    N = dist.get_world_size(group)
    B, T, H, D = x.shape
    # One block for each process, the process in front.
    blocks = x.view(B, T, N, H // N, D).permute(2, 0, 1, 3, 4) if to_heads else x.view(B, N, T // N, H, D).transpose(0, 1)
    sent = blocks.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    if to_heads:
        return received.transpose(0, 1).reshape(B, N * T, H // N, D)
    return received.permute(1, 2, 0, 3, 4).reshape(B, T // N, N * H, D)


def _kind(module: Any) -> str | None:
    """The kind of an attention layer, as its configuration names it."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds[module.layer_idx] if kinds and getattr(module, "layer_idx", None) is not None else None


def other_attention(model: Any, skipped: dict[str, str]) -> list[str]:
    """Kinds of layers whose attention is not computed here. skipped: layers without gates, and why."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds:
        return sorted(kinds - set(_KNOWN_LAYERS))
    return sorted(set(skipped.values()))


def local_rows(model: nn.Module, *, packs: bool) -> PackedAttention | None:
    """For sequences that one process has whole. None: transformers' own attention serves as well (one document a sequence, no eager
    attention), or a layer needs it."""
    state = state_of(model)
    gains = packs or state.original_attention == "eager"
    return PackedAttention() if gains and not other_attention(model, state.skipped) else None


def check_sharing(model: Any, size: int, num_tokens: int, skipped: dict[str, str]) -> None:
    """Raises ValueError where `size` processes cannot share this model's sequences of `num_tokens` tokens."""
    counts = state_of(model).head_counts
    if num_tokens % size:
        raise ValueError(f"sequence_parallel is {size} and data.length {num_tokens}, which it does not divide; change one of them")
    for heads, kv_heads in counts:
        if _divides(heads, kv_heads, size):
            continue
        fitting = [n for n in range(2, heads + 1) if all(_divides(*count, n) for count in counts)]
        raise ValueError(
            f"sequence_parallel is {size}, and {type(model).__name__} has {heads} query and {kv_heads} KV heads, which {size} processes "
            f"cannot share evenly; choose one of {', '.join(map(str, fitting)) or 1}"
        )
    if other := other_attention(model, skipped):
        raise ValueError(
            f"sequence_parallel is {size}, and {type(model).__name__} has layers whose attention is not computed here ({', '.join(other)}), "
            "which would see this process's tokens alone; set sequence_parallel: 1"
        )
    rotary = state_of(model).rotary
    if rotary.frequencies_of(num_tokens) != rotary.frequencies_of(1):
        raise ValueError(
            f"sequence_parallel is {size}, and the rotary frequencies of {type(model).__name__} depend on a text's length, of which each process "
            f"sees its part alone; set sequence_parallel: 1, or a data.length below {num_tokens} that needs no other frequencies"
        )


def _divides(heads: int, kv_heads: int, size: int) -> bool:
    return heads % size == 0 and max(kv_heads, size) % min(kv_heads, size) == 0
