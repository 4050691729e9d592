"""`DMSConfig`: the settings of the method, as checkpoints store them. Symbols as in arXiv 2506.05345 (cited as [P])."""

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

FORMAT_VERSION = 1
# Of files whose gates choose among several windows, or are of another kind than linear, or whose pages are quantised; others stay what older
# versions read.
EXTENDED_VERSION = 2
FORMAT_VERSIONS = (FORMAT_VERSION, EXTENDED_VERSION)
MAX_WINDOWS = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for the known name closest to `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


@dataclass(frozen=True, kw_only=True)
class DMSConfig:
    """How gates decide, and what their decisions mean.

    Raises:
        ValueError: unknown, misspelt or mistyped fields, or values out of range; all of them in one message.
    """

    window: int | tuple[int, ...] = field(default=256, metadata={"windows": True})
    """w in tokens: an evicted token stays visible for the w queries after its own ([P] section 3.1, delayed eviction). A list of 2 to 4 rising
    numbers lets gates choose among lifetimes: there is a decision for each window w_j, and a token is gone for the queries more than w_j after
    it where decision j evicts it."""
    gate: Literal["linear", "borrowed", "borrowed_once"] = "linear"
    """What decides: `linear`, a small layer of its own that reads what attention reads; `borrowed`, the last channel of the first query head of
    each KV group, which is then no query any more: it is 0 before rotation and after it, in every mode (NVIDIA's published checkpoints; [P]
    section 3.1); `borrowed_once`, the same, 0 before rotation alone (FastDMS)."""
    granularity: Literal["head", "layer"] = "head"
    """One decision per token and KV head, or one per token for all heads of a layer."""
    alignment: Literal["own", "next"] = "own"
    """Which token a gate decides for: `own`, the token that it reads ([P]); `next`, the one before it (NVIDIA's checkpoints)."""
    tau: float = field(default=0.1, metadata={"above": 0})
    """Temperature of the Gumbel-sigmoid in training (not in [P]; NVIDIA's reference implementation uses 0.1)."""
    scale: float = field(default=100.0, metadata={"above": 0})
    """The gate's logit is `scale * (x w + b) - offset`; the scale acts as a learning rate of the gate's own (NVIDIA's reference: 100)."""
    offset: float = 5.0
    """Minus the logit at the start, where w = b = 0: sigmoid(-5) = 0.7 %, so that nothing is evicted at first ([P] section 3.1)."""
    sinks: int = field(default=0, metadata={"least": 0})
    """How many first tokens of each document are never evicted."""
    kv_dtype: Literal["int8", "fp8", "int4"] | None = None
    """How pages hold what has left the (first) window, unless a cache is made otherwise; in training the distillation reads it so, rounded. None:
    in the model's dtype."""

    def __new__(cls, **given: Any) -> "DMSConfig":
        # Checked before the generated __init__, which would raise TypeError for an unknown name.
        known = {f.name: f for f in fields(cls)}
        problems = [
            _problem(known[name], value) if name in known else f"unknown key {name!r}{nearest(name, known)}; allowed: {', '.join(known)}"
            for name, value in given.items()
        ]
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
        return super().__new__(cls)

    def __post_init__(self):
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        for f in fields(self):
            if f.type is float:
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        if self.is_borrowed and (self.granularity != "head" or len(self.windows) > 1):
            raise ValueError(
                f"gate is {self.gate!r} with granularity {self.granularity!r} and window {self.to_dict()['window']}: a borrowed channel gives one "
                "decision for each KV head and one window; choose granularity 'head' and one window, or gate 'linear'"
            )

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], source: str) -> "DMSConfig":
        """Read `config.json["dms"]` (or a gates file's metadata).

        Raises:
            ValueError: another format version, an unknown alignment, or any other field that this version does not know.
        """
        given = dict(saved)
        version = given.pop("format_version", None)
        extended = isinstance(given.get("window"), list | tuple) or given.get("gate", "linear") != "linear" or bool(given.get("kv_dtype"))
        if version == (FORMAT_VERSION if extended else EXTENDED_VERSION):
            raise ValueError(
                f"{source}: format_version is {version}, window {given.get('window')!r}, gate {given.get('gate', 'linear')!r} and kv_dtype "
                f"{given.get('kv_dtype')!r}: one window of linear gates is format {FORMAT_VERSION}, several windows, other gates and quantised pages are "
                f"{EXTENDED_VERSION}; the file was changed, or half of it is another's"
            )
        if version not in FORMAT_VERSIONS:
            raise ValueError(
                f"{source}: format_version is {version!r}, this version of dms reads {' and '.join(map(str, FORMAT_VERSIONS))}; upgrade "
                "dms-retrofit or retrofit anew"
            )
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @property
    def windows(self) -> tuple[int, ...]:
        """The window, or the several, in tokens."""
        return (self.window,) if isinstance(self.window, int) else self.window

    @property
    def format_version(self) -> int:
        """Of the files that this is saved in."""
        plain = isinstance(self.window, int) and not self.is_borrowed and self.kv_dtype is None
        return FORMAT_VERSION if plain else EXTENDED_VERSION

    @property
    def is_borrowed(self) -> bool:
        """Whether gates are channels of the queries, without weights of their own."""
        return self.gate != "linear"

    def with_window(self, window: int | Sequence[int]) -> "DMSConfig":
        """The same with other windows: gates go to texts longer than they were trained on with windows in proportion.

        Raises:
            ValueError: not as many as before, since each has a decision of its own, or windows that DMSConfig refuses.
        """
        windows = (window,) if isinstance(window, int) else tuple(window)
        changed = replace(self, window=windows[0] if len(windows) == 1 else windows)
        if len(changed.windows) != len(self.windows):
            raise ValueError(
                f"window is {list(changed.windows)} and the gates were trained with {list(self.windows)}: each window has a decision of its own, so "
                "give as many"
            )
        return changed

    def check_context(self, context: int) -> None:
        """Raises ValueError where a window is as long as the longest text, of `context` tokens: its decisions would never count."""
        if self.windows[-1] < context:
            return
        if isinstance(self.window, int):
            raise ValueError(
                f"window is {self.window} and the model's context is {context} tokens: nothing could ever be evicted; choose a window below the "
                "context"
            )
        beyond = ", ".join(str(w) for w in self.windows if w >= context)
        raise ValueError(
            f"window is {list(self.windows)} and the model's context is {context} tokens: decisions of {beyond} could never count; choose windows "
            "below the context, or leave these out"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as YAML and JSON have them. `gate` and `kv_dtype` only where they say something: older versions do not know them."""
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        silent = {"gate": "linear", "kv_dtype": None}
        return {name: value for name, value in told.items() if name not in silent or value != silent[name]}

    def to_saved(self) -> dict[str, Any]:
        return {**self.to_dict(), "format_version": self.format_version}


def _values(kind: Any) -> tuple[Any, ...]:
    """Those of a Literal, and None where it may be that."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for part in get_args(kind) for value in ((None,) if part is type(None) else _values(part)))


def _problem(f: Field[Any], value: Any) -> str | None:
    """What is wrong with a field's value, in the words that recipes' errors use, or None."""
    bounds, allowed = f.metadata, None
    if "windows" in bounds and isinstance(value, list | tuple):
        whole = all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in value)
        if not (whole and 2 <= len(value) <= MAX_WINDOWS and all(a < b for a, b in itertools.pairwise(value))):
            allowed = f"a number of tokens, or 2 to {MAX_WINDOWS} rising ones, such as [24, 96, 384]"
    elif "windows" in bounds:
        if isinstance(value, bool) or not isinstance(value, int):
            allowed = "a valid integer, or a list of them"
        elif value < 0:
            allowed = "greater than or equal to 0"
    elif f.type in (int, float):
        # To Python a bool is an int.
        if isinstance(value, bool) or not isinstance(value, int if f.type is int else (int, float)):
            allowed = "a valid integer" if f.type is int else "a valid number"
        elif not math.isfinite(value):
            allowed = "a finite number"
        elif "least" in bounds and value < bounds["least"]:
            allowed = f"greater than or equal to {bounds['least']}"
        elif "above" in bounds and value <= bounds["above"]:
            allowed = f"greater than {bounds['above']}"
    elif value not in (allowed_values := _values(f.type)):
        allowed = " or ".join(map(repr, allowed_values))
    return None if allowed is None else f"{f.name}: Input should be {allowed}; given: {value!r}"
