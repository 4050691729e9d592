"""A conversation through a tokenizer's chat template, with the cache kept between turns: each turn feeds only the tokens that are new."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer
from transformers.cache_utils import Cache, DynamicCache

from dms import hf_compat
from dms.cache import DMSCache
from dms.cache.page_pool import held_bytes
from dms.cache.stats import cache_stats, compacted_layers
from dms.io.vocabulary import check_tokens, num_embeddings
from dms.placement import compute_device

HELP = "/reset starts over; /exit or Ctrl-D ends"
_MARK = "dmsmarkdms"


@dataclass(frozen=True)
class Turn:
    """One answer, and what it took."""

    reply: str
    """Without the tokens that end it."""
    num_read: int
    """Tokens that were fed before the answer: what the cache did not hold."""
    num_new: int
    """Tokens generated."""
    seconds: float
    cache: Cache
    is_whole: bool
    """It ended by itself, not at the most tokens."""
    notes: tuple[str, ...]
    """What a reader must know of this turn: why the cache was not kept, that the context is full."""

    def __str__(self) -> str:
        parts = [f"{self.num_read} tokens read, {self.num_new} generated in {self.seconds:.1f} s", describe_cache(self.cache)]
        return "; ".join([*parts, *([] if self.is_whole else ["stopped at --max-new-tokens"])])


def describe_cache(cache: Cache) -> str:
    """Entries alive and ratios, or that it is dense."""
    if not compacted_layers(cache):
        return f"dense: {cache.get_seq_length():,} tokens in the cache, {held_bytes(cache) / 2**20:.1f} MiB"
    stats = cache_stats(cache, warn=False)
    return (
        f"{stats.alive:,} of {stats.seen:,} KV entries alive, CR {stats.cr:.2f} (decided {stats.cr_decided:.2f}), "
        f"{stats.bytes / 2**20:.1f} MiB (dense: {stats.bytes_dense / 2**20:.1f} MiB)"
    )


class Conversation:
    """Messages, and the cache that holds what of them was read.

    model: a base, or a retrofitted model in any mode. system: the system's message; None: the template's own, if it has one.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that takes no system message.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, system: str | None = None, **sampling: Any):
        require_template(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.not_kept = _why_not_kept(model)
        """Why each turn reads the whole conversation; None: it does not."""
        self.stops = sorted(stop_tokens(model, tokenizer))
        self.reset()
        render(tokenizer, [*self.system, {"role": "user", "content": "a"}])

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages: list[dict[str, str]] = list(self.system)
        self._forget()

    def _forget(self) -> None:
        self.cache: Cache | None = None
        self.fed: list[int] = []
        """Tokens whose entries the cache holds, or has evicted."""

    def turn(self, text: str, streamer: Any = None) -> Turn:
        """Add a user's message and generate the answer.

        Raises:
            ValueError: tokens without an embedding, or more of them than the model's context.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            turn = self._answer(streamer)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": turn.reply})
        return turn

    def _answer(self, streamer: Any) -> Turn:
        tokens = render(self.tokenizer, self.messages)
        check_tokens(tokens, self.tokenizer, num_embeddings(self.model.config), "the conversation")
        notes = [self._room_for(len(tokens))]
        if tokens[: len(self.fed)] != self.fed or len(tokens) == len(self.fed):
            notes.append(
                "the chat template renders earlier turns otherwise than they were read (some take out what was thought), so all of it is read again"
            )
            self._forget()
        if self.cache is None and self.not_kept is None:
            self.cache = _new_cache(self.model)
        num_held = len(self.fed)
        given = {} if self.cache is None else {hf_compat.generation_cache_name(): self.cache}
        ids_1T = torch.tensor([tokens], device=compute_device(self.model))
        start = time.perf_counter()
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids_1T,
                    attention_mask=torch.ones_like(ids_1T),
                    return_dict_in_generate=True,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self.stops or None,
                    streamer=streamer,
                    **given,
                    **self.sampling,
                )
        except BaseException:
            # The cache may hold a part of this turn.
            self._forget()
            raise
        seconds = time.perf_counter() - start
        cache, text = hf_compat.output_cache(output), output.sequences[0].tolist()
        assert cache is not None, "generate was asked for a cache"
        if self.cache is not None:
            # The last token was generated and not read.
            self.fed = text[: cache.get_seq_length()]
        new = text[len(tokens) :]
        is_whole = bool(new) and new[-1] in self.stops
        reply = self.tokenizer.decode(new[:-1] if is_whole else new, skip_special_tokens=True)
        return Turn(reply, len(tokens) - num_held, len(new), seconds, cache, is_whole, tuple(filter(None, notes)))

    def _room_for(self, num_tokens: int) -> str | None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or num_tokens + self.max_new_tokens <= context:
            return None
        if num_tokens >= context:
            raise ValueError(f"the conversation has {num_tokens} tokens and the model's context is {context}; start over with /reset")
        return f"the conversation has {num_tokens} tokens of the model's context of {context}; start over soon with /reset"


def require_template(tokenizer: Any) -> None:
    """Raises ValueError where a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: the model is a base that was not made for conversations, or "
            "its template was left out; leave out --chat to continue a text, or choose the instruction-tuned model"
        )


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the assistant's answer begins.

    Raises:
        ValueError: the chat template refuses it.
    """
    return list(_apply(tokenizer, messages, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"])


def _apply(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        # Templates raise errors of their own kinds, for a system message among others.
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the roles {', '.join(m['role'] for m in messages)}: {error}"
        ) from error


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the generation configuration, the tokenizer's, and the one that the template puts behind it."""
    found = model.generation_config.eos_token_id
    known = {int(token) for token in (found if isinstance(found, list | tuple) else [found]) if token is not None}
    known |= {tokenizer.eos_token_id} - {None}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = _apply(tokenizer, messages, tokenize=False)
    except ValueError:
        # A template with rules of its own for what a conversation is; the tokens above remain.
        return known
    behind = tokenizer(text.rpartition(_MARK)[2].lstrip(), add_special_tokens=False)["input_ids"]
    # A word or a line's end would also stand within answers.
    if behind and behind[0] in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[behind[0]].special:
        known.add(behind[0])
    return known


def _why_not_kept(model: Any) -> str | None:
    state = getattr(model, "dms", None)
    if not (hf_compat.makes_default_cache(model) if state is None else state.takes_cache):
        return f"{type(model).__name__} works with a cache of its own kind alone"
    if hf_compat.rotary_changes(model):
        return f"rotary frequencies of {type(model).__name__} depend on a text's length"
    return None


def _new_cache(model: Any) -> Cache:
    state = getattr(model, "dms", None)
    return DMSCache(model) if state is not None and state.mode == "evict" else DynamicCache(config=model.config)


def converse(conversation: Conversation, lines: Iterable[str] | None = None) -> Turn | None:
    """Read a line, print the answer and what the cache holds, until the end or `/exit` -> the last turn. lines: None: standard input."""
    if conversation.not_kept is not None:
        _say(f"{conversation.not_kept}: each turn reads the whole conversation")
    last = None
    for line in _typed() if lines is None else lines:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
            _say("the conversation starts over, with an empty cache")
        elif text.startswith("/"):
            _say(f"{text.split()[0]} is no command: {HELP}")
        elif text:
            try:
                last = answer(conversation, text)
            except ValueError as error:
                _say(f"error: {error}")
    return last


def answer(conversation: Conversation, text: str) -> Turn:
    """One turn, printed as it comes."""
    turn = conversation.turn(text, TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True))
    for note in (*turn.notes, str(turn)):
        _say(note)
    return turn


def _typed() -> Iterator[str]:
    """Lines of standard input: asked for on a terminal, shown where they come from a file or a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                print(f"> {line.strip()}", flush=True)
            yield line
        return
    _say(HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"[{text}]", file=sys.stderr, flush=True)
