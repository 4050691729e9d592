"""What an evaluation measures: checked before anything is loaded, written beside its results, compared when it goes on."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dms.config import nearest
from dms.evaluation.policies import TRAINING_FREE

POLICIES = ("dense", "dms", *TRAINING_FREE)
FORMAT_VERSION = 1
# What may differ between two calls on one folder: the rest decides what was measured.
_EXTENSIBLE = ("policies", "suites", "lengths", "evict_bias")
# Changes what it takes, not what comes out.
_FREE = ("batch_size",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """policies, suites: by name; lengths: tokens of a document; evict_bias: operating points of the gates. num_documents: of each suite
    at each length. prefill_chunk: tokens of a prompt that are read between two evictions. text: files to take running text from, None: the
    built-in held-out text. chat: through the tokenizer's chat template. num_greedy: tokens written to see how long greedy decoding
    stays with dense's."""

    policies: tuple[str, ...]
    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    evict_bias: tuple[float, ...] = (0.0,)
    num_documents: int = 64
    batch_size: int = 16
    prefill_chunk: int = 64
    num_greedy: int = 64
    text: str | None = None
    chat: bool = False
    seed: int = 7

    def __post_init__(self):
        from dms.evaluation.suites import SUITES

        for name, given, known in (("--policies", self.policies, POLICIES), ("--tasks", self.suites, tuple(SUITES))):
            for word in given:
                if word not in known:
                    raise ValueError(f"{name} names {word!r}{nearest(word, known)}; there are {', '.join(known)}")
        for name in ("policies", "lengths", "evict_bias"):
            if not getattr(self, name):
                raise ValueError(f"no {name} are left to evaluate; name at least one")
        if any(math.isnan(bias) for bias in self.evict_bias):
            raise ValueError(f"--evict-bias is {list(self.evict_bias)}; give numbers, such as -2, 0 and 1.5")
        if any(policy in TRAINING_FREE for policy in self.policies) and "dms" not in self.policies:
            raise ValueError(
                f"{', '.join(self.policies)}: the other policies get the budget that dms is measured to use; add dms to --policies"
            )
        if "dense" not in self.policies:
            raise ValueError("--policies lacks dense, which every figure is compared with; add it")

    @classmethod
    def make(cls, **given: Any) -> "Settings":
        """Lists may repeat themselves; policies stand in the order in which they are needed."""
        for name in _EXTENSIBLE:
            given[name] = tuple(dict.fromkeys(given[name]))
        known = [policy for policy in POLICIES if policy in given["policies"]]
        given["policies"] = (*known, *(policy for policy in given["policies"] if policy not in known))
        return cls(**given)

    def points(self) -> list[tuple[str, float | None]]:
        """(policy, evict_bias) in the order in which they run: a point's other policies follow its dms."""
        return [("dense", None), *((policy, bias) for bias in self.evict_bias for policy in self.policies if policy != "dense")]


def identity(settings: Settings, model: dict[str, Any]) -> dict[str, Any]:
    """What two calls must share for one to go on where the other stopped: all that is measured, less how much of it."""
    shared = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in (*_EXTENSIBLE, *_FREE)}
    return {
        **shared,
        **{name: model[name] for name in ("model_hash", "gates_hash", "dtype", "device_type", "versions")},
        "format_version": FORMAT_VERSION,
    }


def open_folder(out: Path, settings: Settings, model: dict[str, Any]) -> str:
    """Make or reopen the folder of an evaluation and write settings.json; returns the identity's digest, which finished units carry.

    Raises:
        ValueError: the folder holds an evaluation of something else.
    """
    own = json.loads(json.dumps(identity(settings, model)))
    path = out / "settings.json"
    before: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in own.items() if before.get(name) != value]
        if differing:
            raise ValueError(f"{out} holds another evaluation: {'; '.join(differing)}; name another --out, or remove that folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no evaluation (no settings.json); name another --out")
    (out / "done").mkdir(parents=True, exist_ok=True)
    merged = {name: _union(before.get(name, []), getattr(settings, name)) for name in _EXTENSIBLE}
    written = {**model, **asdict(settings), **own, **merged, "num_samples": settings.num_documents, "chat_template": settings.chat}
    path.write_text(json.dumps(written, indent=1), encoding="utf-8")
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _union(before: Sequence, now: Iterable) -> list:
    return list(dict.fromkeys([*before, *now]))
