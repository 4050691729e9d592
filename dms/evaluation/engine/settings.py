"""What an evaluation measures: one strict settings file, checked before anything is loaded, written beside the results, and compared when
an evaluation goes on.

`dms evaluate FOLDER [SETTINGS.yaml] [key=value ...]` reads `EvaluationSettings`; all keys have defaults.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dms.config import nearest
from dms.evaluation.data.text_sources import hash_files
from dms.evaluation.engine.resume import LOCK_FILE, hash_of, locked, read_json, write_json
from dms.evaluation.policies import QUICK_ONES, TRAINING_FREE
from dms.evaluation.stats.results import DMS_POLICIES, OperatingPoint
from dms.evaluation.stats.rows import RowContext
from dms.evaluation.suites import DEFAULT_SUITES, SUITES
from dms.evaluation.suites.running_text import stride_of
from dms.strict_config import Strict

POLICIES = ("dense", *DMS_POLICIES, *TRAINING_FREE)
# Where none are named: the others take longer, or are variants of these.
DEFAULT_POLICIES = ("dense", "dms", *QUICK_ONES)
FORMAT_VERSION = 1
# Of what two calls on one folder must share. Since 2 windows, packing and the text's contents are among it.
_IDENTITY_VERSION = 2
# The longest documents of an evaluation that names no lengths.
MAX_DEFAULT_LENGTH = 8192
# Defaults under `quick`, of settings that are not given.
QUICK: dict[str, Any] = {"num_documents": 50, "batch_size": 25, "suites": ["needle", "records", "text"]}
# What may differ between two calls on one folder: how much is measured.
_EXTENSIBLE = ("policies", "suites", "lengths", "evict_bias")
# What two calls on one folder must share, beside the model: what is measured.
_IDENTITY = ("num_documents", "prefill_chunk", "decode_chunk", "num_greedy", "text", "chat", "seed")
_IDENTITY_OF_MODEL = (
    *("model_hash", "quant_method", "gates_hash", "window", "sinks", "granularity", "alignment"),
    *("dtype", "device_type", "versions"),
)


class ScalingSettings(Strict):
    """`scaling`: accuracy of k sampled chains against the KV entries that they read and hold (hyper-scaling)."""

    problems: str | None = None
    """A JSONL file of problems: `prompt` or `messages`, and `answer`. None: built-in chains of names, in documents of the longest of the
    evaluation's lengths."""
    num_problems: int = Field(default=64, ge=1)
    """Of a file: the first so many."""
    max_k: int = 16
    """Chains that are sampled for each problem."""
    chains_at_once: int | None = Field(default=None, ge=1)
    """Chains that are decoded as one batch, of one problem or several; None: max_k."""
    temperature: float = 1.0
    """Sampling temperature of the chains."""
    top_p: float = 1.0
    """Chains draw from the likeliest tokens that make up this share."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Of a chain; None: 24 for the built-in problems, 1024 for others."""
    answer_pattern: str | None = None
    """A regular expression for the answer of a chain, in its group 1 or as the whole match. None: the last box, else the last number.
    For problems of your own."""
    stop: list[str] = Field(default=[])
    """Strings that end a chain. For problems of your own."""
    num_hops: int = Field(default=6, ge=1)
    """Names in a chain of the built-in problems."""

    @model_validator(mode="after")
    def _check(self):
        if self.problems is None and (self.answer_pattern is not None or self.stop):
            raise ValueError("answer_pattern and stop are for problems of your own; name them with problems=FILE.jsonl")
        if self.problems is not None and "num_hops" in self.model_fields_set:
            raise ValueError("num_hops is of the built-in problems, and problems names others; leave one of them out")
        return self


class LmEvalSettings(Strict):
    """`lm_eval`: tasks of lm-evaluation-harness, under dense and dms."""

    tasks: list[str]
    """By the harness's names, such as gsm8k. On the command line: `--lm-eval`."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many documents of each task; None: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; None: as the task says."""
    include_path: str | None = None
    """A folder with the YAML files of tasks of your own."""


class EvaluationSettings(Strict):
    """`dms evaluate`: which policies read which documents, and what is measured besides."""

    policies: list[str] = Field(default=list(DEFAULT_POLICIES))
    """Of dense, dms, sliding_window, h2o, tova, snapkv, keydiff and random, which are the default, and random_attention, expected_attention,
    kvzip, ada_snapkv, ada_expected_attention and ada_kvzip, which are read where they are named. All but dense and dms get the budget that
    dms is measured to use. dms_int8, dms_fp8 and dms_int4 are dms with pages of that `kv_dtype`."""
    kv_dtype: list[Literal["int8", "fp8", "int4"]] = Field(default=[])
    """Also dms with pages of these: the policies dms_int8, dms_fp8 and dms_int4."""
    suites: list[str] = Field(default=list(DEFAULT_SUITES))
    """Kinds of documents: needle, records, passages, classification, words, text; one_pass is the evaluation at a run's end. On the
    command line: `--tasks`."""
    lengths: list[int] = Field(default=[])
    """Tokens of a document; none: half of the model's context and all of it, up to 8192."""
    evict_bias: list[float] = Field(default=[0.0])
    """Operating points of dms: added to every gate's logit, so that above 0 more is evicted."""
    num_documents: int = Field(default=64, ge=1)
    """Of each suite at each length."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the model, all policies alike; None: float32 on a CPU, as saved elsewhere. CPUs that multiply bfloat16 (AVX-512 BF16, AMX) take a third
    of the time with it, and its rounding is in every figure."""
    batch_size: int = Field(default=16, ge=1)
    """Documents that are read at once. Changes time and memory, not what is measured."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Tokens of a prompt that are read between two evictions; the dense model, and policies that rank after a whole prompt, such as snapkv, read it
    at once."""
    decode_chunk: int = Field(default=1, ge=1)
    """Tokens after a prompt that are read between two evictions. 1: as generation would. More take less time, and let the other policies hold so
    many entries beyond their budget; dms, whose gates decide token by token, sees the same."""
    num_greedy: int = Field(default=64, ge=1)
    """Tokens that are written after a prompt of running text, to see how long greedy decoding stays with dense's; no more than the window has after
    its prompt, an eighth of its length."""
    text: str | None = None
    """A file or folder of text that documents are made of; None: held-out sources of the standard library."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    seed: int = 7
    """Of documents, random eviction and sampling."""
    quick: bool = False
    """Minutes on two cores: for settings that are not given, fewer documents and suites, at half of the model's context."""
    scaling: ScalingSettings | None = None
    """Also hyper-scaling. On the command line, `--scaling` switches it on."""
    lm_eval: LmEvalSettings | None = None
    """Also tasks of lm-evaluation-harness."""

    @field_validator("policies", "suites", "lengths", "evict_bias")
    @classmethod
    def _each_once(cls, given: list) -> list:
        return list(dict.fromkeys(given))

    @field_validator("policies", "suites")
    @classmethod
    def _known(cls, given: list[str], info) -> list[str]:
        known = POLICIES if info.field_name == "policies" else tuple(SUITES)
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}")
        # In the order in which they run: a policy's budget is known after dms has read the documents.
        return [name for name in known if name in given] if info.field_name == "policies" else given

    @field_validator("policies")
    @classmethod
    def _compared_with(cls, given: list[str]) -> list[str]:
        if "dense" not in given:
            raise ValueError("dense is not among them, and every figure is compared with it; add it")
        if "dms" not in given and len(given) > 1:
            raise ValueError(f"{', '.join(given)}: the other policies get the budget that dms is measured to use; add dms")
        return given

    @field_validator("lengths")
    @classmethod
    def _positive(cls, given: list[int]) -> list[int]:
        if any(length < 1 for length in given):
            raise ValueError(f"{given} has a length below 1; give numbers of tokens, such as [1024, 2048]")
        return given

    @field_validator("evict_bias")
    @classmethod
    def _some(cls, given: list[float]) -> list[float]:
        if not given:
            raise ValueError("no operating point is left; give at least one number, such as [0.0]")
        return given

    def completed(self, context: int) -> "EvaluationSettings":
        """With what was left out filled in: the lengths for a model of `context` tokens, and the defaults of `quick`."""
        defaults = {name: value for name, value in QUICK.items() if self.quick and name not in self.model_fields_set}
        if not self.lengths:
            longest = min(context, MAX_DEFAULT_LENGTH)
            defaults["lengths"] = [longest // 2] if self.quick else [longest // 2, longest]
        wanted = {*self.policies, *(f"dms_{kind}" for kind in self.kv_dtype)}
        defaults["policies"] = [policy for policy in POLICIES if policy in wanted]
        settings = self.model_copy(update=defaults)
        if "one_pass" in settings.suites and (pointless := [policy for policy in settings.policies if DMS_POLICIES.get(policy)]):
            raise ValueError(
                f"one_pass with {', '.join(pointless)}: it reads a document in one pass, which takes nothing from pages; leave one of them out"
            )
        return settings

    def greedy_tokens(self, length: int) -> int:
        """Of `num_greedy` those that a window of so many tokens has room for."""
        return min(self.num_greedy, stride_of(length))

    def points(self) -> list[OperatingPoint]:
        """In the order in which they run: an operating point's other policies follow its dms."""
        return [
            OperatingPoint("dense", None),
            *(OperatingPoint(policy, bias) for bias in self.evict_bias for policy in self.policies if policy != "dense"),
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """What settings.json says of the model and of where it runs."""

    model: str
    """The folder."""
    model_hash: str | None
    """Of the base's weights; None: not known."""
    other_base: str | None
    """As in ResultRow."""
    quant_method: str | None
    """How its weights are packed; None: they are not."""
    gates_hash: str
    recipe_hash: str | None
    """None: the folder lies outside its run's."""
    base_name: str | None
    run_dir: str | None
    target_cr: float | None
    trained_length: int | None
    """Tokens that the gates were trained at; None: not recorded."""
    window: int | tuple[int, ...]
    sinks: int
    granularity: str
    alignment: str
    context: int
    """Tokens, the most that the model reads."""
    device_type: str
    dtype: str
    versions: dict[str, str]
    device: str

    def row_context(self, seed: int) -> RowContext:
        return RowContext(
            model=self.model,
            model_hash=self.model_hash,
            recipe_hash=self.recipe_hash,
            target_cr=self.target_cr,
            seed=seed,
            versions=self.versions,
            device=self.device,
            other_base=self.other_base,
        )


def identity(settings: EvaluationSettings, model: EvaluatedModel) -> dict[str, Any]:
    """What two calls must share for one to go on where the other stopped: all that is measured, apart from how much of it."""
    return {
        **{name: getattr(settings, name) for name in _IDENTITY},
        **{name: getattr(model, name) for name in _IDENTITY_OF_MODEL},
        "text_hash": None if settings.text is None else hash_files(settings.text),
        "format_version": FORMAT_VERSION,
        "identity_version": _IDENTITY_VERSION,
    }


def open_folder(out: Path, settings: EvaluationSettings, model: EvaluatedModel) -> str:
    """Make or reopen the folder of an evaluation and write settings.json; returns the identity's digest, which finished units carry.

    Raises:
        ValueError: the folder holds an evaluation of something else.
    """
    own = json.loads(json.dumps(identity(settings, model)))
    if out.is_dir():
        # A folder of something else is left as it is.
        _settings_before(out, own)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        before = _settings_before(out, own)
        merged = {name: _union(before.get(name, []), getattr(settings, name)) for name in _EXTENSIBLE}
        written = {
            **asdict(model),
            **settings.model_dump(exclude={"quick", "scaling", "lm_eval", "dtype"}),
            **own,
            **merged,
            "num_samples": settings.num_documents,
            "chat_template": settings.chat,
        }
        write_json(out / "settings.json", written, indent=1)
        (out / "done").mkdir(exist_ok=True)
    return hash_of(own)


def _settings_before(out: Path, own: dict[str, Any]) -> dict[str, Any]:
    """What settings.json says, nothing where the folder is new. Raises ValueError where it is of something else."""
    path = out / "settings.json"
    if not path.is_file():
        # Another process may be about to write it, or have written it just now.
        others = any(there.name != LOCK_FILE and there.suffix != ".partial" for there in out.iterdir())
        if others and not path.is_file():
            raise ValueError(f"{out} is not empty and holds no evaluation (no settings.json); name another --out")
        if not others:
            return {}
    before = read_json(path)
    if not isinstance(before, dict):
        raise ValueError(f"{path} is no JSON object, and says nothing of what the folder holds; remove that folder, or name another --out")
    differing = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in own.items() if before.get(name) != value]
    if differing:
        raise ValueError(f"{out} holds another evaluation: {'; '.join(differing)}; name another --out, or remove that folder")
    return before


def _union(before: Sequence, now: Iterable) -> list:
    return list(dict.fromkeys([*before, *now]))
