"""What is checked of one family: each check compares two ways of computing the same, and gives figures, or says what is wrong.

What transformers' own dense model does not do (padding that changes nothing, decoding as it reads) is not asked of the retrofitted one;
the row says so.

Shapes: B batch, T tokens, V vocabulary.
"""

import contextlib
import inspect
import tempfile
import warnings
from collections import Counter
from typing import Any

import torch
from family_settings import Case
from tiny_models import LAST_TEXT_TOKEN, make_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import dms
from dms.cache import CompactedLayer
from dms.hf_compat import CACHE_NAMES, cache_argument, output_cache
from dms.modes import reading, set_mode
from dms.retrofitting import gate_parameters

LENGTH, NEW_TOKENS, WINDOW = 40, 6, 4
LEFT, RIGHT = 9, 7
# A prompt and tokens one by one; and turns of a conversation.
STEPS = (20, *[1] * (LENGTH - 20))
TURNS = (16, 1, 1, 9, 1, 12)
# Of logits of a few units in float32.
TOLERANCE = 2e-4
# A decision on a logit this close to 0 may fall either way, and is no error.
MARGIN = 2e-4


class Wrong(Exception):
    """What does not hold, with its figure."""


class NotRun(Exception):
    """What transformers' own dense model cannot do."""


def check(case: Case) -> dict[str, Any]:
    """The row of a family: status ("right", "refused", "not run" or "WRONG"), reason, gated and skipped layers, notes."""
    row: dict[str, Any] = {"gated": 0, "layers": 0, "skipped": {}, "notes": []}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in (0, 1):
                row["notes"] = []
                try:
                    _check(case, seed, row)
                except Wrong as wrong:
                    if seed == 0 and row.get("close"):
                        continue
                    return row | {"status": "WRONG", "reason": str(wrong)}
                break
    except NotRun as reason:
        return row | {"status": "not run", "reason": str(reason)}
    except _Refused as reason:
        return row | {"status": "refused", "reason": str(reason)}
    finally:
        row.pop("close", None)
    return row | {"status": "right", "reason": ""}


class _Refused(Exception):
    """Why `retrofit` refused."""


def _check(case: Case, seed: int, row: dict[str, Any]) -> None:
    try:
        model = make_model(case.model_type, case.cls, case.changes, seed)
    except Exception as error:
        raise NotRun(f"transformers does not build it: {_line(error)}") from error
    passes = Passes(model)
    try:
        dense, failure = passes.all(), None
    except Exception as error:  # noqa: BLE001 - whatever its forward raises
        dense, failure = {}, f"transformers' own dense model does not read text alone: {_line(error)}"
    try:
        dms.retrofit(model, dms.DMSConfig(window=WINDOW, scale=1.0, offset=0.0))
    except ValueError as error:
        raise _Refused(str(error)) from error
    except Exception as error:
        raise Wrong(f"retrofit raises {_line(error)}") from error
    state = model.dms
    num_other = sum(int(name.split()[0]) if name.endswith("other layers") else 1 for name in state.skipped)
    row |= {"gated": len(state.layers), "layers": len(state.layers) + num_other, "skipped": _counted(state.skipped)}
    if failure is not None:
        raise NotRun(failure)
    passes.can_pad_left = _fits("left padding", passes.rows(dense["left"], left=True), passes.rows(dense["whole"]), row)
    passes.can_pad_right = _fits("right padding", passes.rows(dense["right"], right=True), passes.rows(dense["whole"]), row)
    for name in ("steps", "turns"):
        if dense[name] is not None and _fits(name, dense[name], dense["whole"], row):
            passes.own_ways[name] = _WAYS[name]
    if passes.can_pad_left and dense["steps"] is not None:
        padded = passes.rows(passes.parts(STEPS, left=LEFT)[0], left=True)
        passes.can_pad_left_parts = _fits("left padding in steps", padded, passes.rows(dense["whole"]), row)
    if dense["steps"] is None:
        row["notes"].append("not compared: reading with a cache, which the dense model does not hand back")

    for name, step in _STEPS.items():
        try:
            step(passes, dense, row)
        except (Wrong, NotRun):
            raise
        except Exception as error:
            raise Wrong(f"{name}: raises {_line(error)}") from error


def _fits(what: str, got: torch.Tensor | None, wanted: torch.Tensor, row: dict[str, Any]) -> bool:
    """Whether the dense model does by itself what is asked of the retrofitted one."""
    error = _error(got, wanted)
    if error > TOLERANCE:
        row["notes"].append(f"not compared: {what}, in which the dense model differs from itself by {error:.1g}")
    return error <= TOLERANCE


_WAYS = {"steps": STEPS, "turns": TURNS}


class Passes:
    """A model, the batch that it reads, and the ways to read it."""

    def __init__(self, model: Any):
        self.model = model
        self.ids = torch.randint(2, LAST_TEXT_TOKEN + 1, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        self.takes = set(inspect.signature(type(model).forward).parameters)
        self.can_pad_left = self.can_pad_right = True
        self.can_pad_left_parts = False
        self.own_ways: dict[str, tuple[int, ...]] = {}
        """How the dense model can be read in parts."""

    def batch(self, left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
        """The batch, with padding put before or behind its second row, whose last tokens are then left away."""
        ids, mask = self.ids.clone(), torch.ones_like(self.ids)
        if left or right:
            ids[1, left : LENGTH - right] = self.ids[1, : LENGTH - left - right]
            mask[1, :left] = 0
            mask[1, LENGTH - right :] = 0
        position = (mask.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": position}
        return {name: value for name, value in given.items() if name in self.takes or name == "input_ids"}

    def rows(self, logits: torch.Tensor, left: bool = False, right: bool = False) -> torch.Tensor:
        """Logits of the second row's tokens that all batches have."""
        length = LENGTH - max(LEFT, RIGHT)
        start = LEFT if left else 0
        return logits[1, start : start + length]

    @torch.no_grad()
    def read(self, **padding: int) -> torch.Tensor:
        """Logits of one pass."""
        return self.model(**self.batch(**padding), use_cache=False).logits

    def ways(self) -> dict[str, tuple[int, ...]]:
        """How it can be read in parts. Where rotary frequencies depend on the length, that is known within `reading` alone."""
        state = getattr(self.model, "dms", None)
        return _WAYS if state is not None and state.rotary.changes else self.own_ways

    @torch.no_grad()
    def parts(self, chunks: tuple[int, ...], **padding: int) -> tuple[torch.Tensor | None, Any]:
        """Logits of the same read in parts through a cache, and the cache; None where the model keeps none."""
        batch, cache, logits, start = self.batch(**padding), None, [], 0
        for chunk in chunks:
            given = {n: v[:, : start + chunk] if n == "attention_mask" else v[:, start : start + chunk] for n, v in batch.items()}
            held = {} if cache is None else cache_argument(self.model, cache)
            # Dense passes are left as they were.
            active = getattr(self.model, "dms", None) is not None and self.model.dms.mode != "dense"
            with reading(self.model, LENGTH) if active else contextlib.nullcontext():
                out = self.model(**given, **held, use_cache=True)
            cache, start = output_cache(out), start + chunk
            if cache is None:
                return None, None
            logits.append(out.logits)
        return torch.cat(logits, 1), cache

    def all(self) -> dict[str, Any]:
        """Logits of every way to read."""
        whole = self.read()
        if not bool(whole.isfinite().all()):
            raise NotRun("its logits are not finite")
        takes_cache = any(name in self.takes for name in CACHE_NAMES)
        parts = {name: self.parts(chunks)[0] if takes_cache else None for name, chunks in _WAYS.items()}
        return {"whole": whole, "left": self.read(left=LEFT), "right": self.read(right=RIGHT), **parts}

    @torch.no_grad()
    def generate(self, **padding: int) -> torch.Tensor:
        batch = self.batch(**padding)
        batch.pop("position_ids", None)
        # What a model adds after each text would stop it.
        return self.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)[:, LENGTH:]

    @torch.no_grad()
    def greedy(self, **padding: int) -> torch.Tensor:
        """What `generate` should give, by whole passes without a cache."""
        batch = self.batch(**padding)
        for _ in range(NEW_TOKENS):
            token = self.model(**batch, use_cache=False).logits[:, -1:].argmax(-1)
            more = {"input_ids": token, "attention_mask": torch.ones_like(token)}
            more["position_ids"] = batch["position_ids"][:, -1:] + 1 if "position_ids" in batch else token
            batch = {name: torch.cat([value, more[name]], 1) for name, value in batch.items()}
        return batch["input_ids"][:, LENGTH:]

    def evicted_share(self) -> float:
        """Of the latest pass, over all gated layers."""
        return float(torch.cat([evicted.float().flatten() for evicted in self.model.dms.forward.evicted.values()]).mean())


def _dense_is_untouched(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    for mode in (None, "train", "evict"):
        if mode is not None:
            set_mode(passes.model, mode)
            passes.read()
            set_mode(passes.model, "dense")
        for name, logits in passes.all().items():
            if logits is not None and not torch.equal(logits, dense[name]):
                raise Wrong(f"dense mode is not bit-identical ({name}): differs by {_error(logits, dense[name]):.2g}")


def _closed_gates_are_dense(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    model = passes.model
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            parameter.fill_(0.0 if name.endswith("weight") else -40.0)
    for mode in ("train", "evict"):
        set_mode(model, mode)
        _same(f"closed gates, {mode}, one pass", passes.read(), dense["whole"])
        if passes.can_pad_left:
            _same(f"closed gates, {mode}, left padding", passes.rows(passes.read(left=LEFT), left=True), passes.rows(dense["whole"]))
        if passes.can_pad_right:
            _same(f"closed gates, {mode}, right padding", passes.rows(passes.read(right=RIGHT), right=True), passes.rows(dense["whole"]))
    for name, chunks in passes.ways().items():
        _same(f"closed gates, in {name}", passes.parts(chunks)[0], dense["whole"])


def _open(passes: Passes) -> None:
    """Random gates, each head of which evicts about half of its tokens."""
    model = passes.model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            if name.endswith("weight"):
                parameter.normal_(0, 1.0, generator=generator)
            else:
                parameter.zero_()
        set_mode(model, "evict")
        for _ in range(2):
            passes.read()
            for layer in model.dms.layers:
                layer.gate.bias -= _between(model.dms.forward.logits[layer.index].flatten(0, 1))


def _between(logits_NH: torch.Tensor) -> torch.Tensor:
    """[H]: of the places near the middle of each head's logits, that farthest from all of them."""
    ordered = logits_NH.sort(0).values
    low, high = int(0.4 * len(ordered)), int(0.6 * len(ordered))
    gaps = ordered[low + 1 : high + 1] - ordered[low:high]
    at = low + gaps.argmax(0, keepdim=True)
    return ((ordered.gather(0, at) + ordered.gather(0, at + 1)) / 2)[0]


def _evicting(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    model = passes.model
    _open(passes)
    whole = passes.read()
    closest = min(float(logits.abs().min()) for logits in model.dms.forward.logits.values())
    row["close"] = closest < MARGIN
    share = passes.evicted_share()
    if not 0.2 <= share <= 0.8:
        raise Wrong(f"gates evict {share:.0%} of the tokens: nothing is shown")
    change = _error(whole, dense["whole"])
    if not change > 20 * TOLERANCE:
        raise Wrong(f"evicting {share:.0%} of the tokens changes logits by {change:.2g} alone: decisions have no effect")
    if passes.can_pad_left:
        _same("evict, left padding", passes.rows(passes.read(left=LEFT), left=True), passes.rows(whole))
    if passes.can_pad_right:
        _same("evict, right padding", passes.rows(passes.read(right=RIGHT), right=True), passes.rows(whole))
    for name, chunks in passes.ways().items():
        logits, cache = passes.parts(chunks)
        _same(f"evict with a cache, in {name}", logits, whole)
        # A decoder with cross-attention keeps one cache for each kind.
        held = [getattr(cache, "self_attention_cache", cache).layers[layer.index] for layer in model.dms.layers]
        if model.dms.takes_cache and not all(isinstance(layer, CompactedLayer) for layer in held):
            raise Wrong(f"evict with a cache holds {type(held[0]).__name__}, which frees nothing")
        if passes.can_pad_left_parts:
            padded = passes.parts(chunks, left=LEFT)[0]
            _same(f"evict with a cache, in {name}, left padding", padded[0], whole[0])
            _same(f"evict with a cache, in {name}, left padding", passes.rows(padded, left=True), passes.rows(whole))


def _generating(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    model = passes.model
    if "steps" not in passes.own_ways:
        row["notes"].append("not compared: generate")
        return
    ways: dict[str, dict[str, int]] = {"": {}} | ({", left padding": {"left": LEFT}} if passes.can_pad_left_parts else {})
    for name, padding in ways.items():
        set_mode(model, "dense")
        try:
            alone = passes.generate(**padding)
        except Exception as error:  # noqa: BLE001 - whatever it raises
            row["notes"].append(f"not compared: generate{name}, where the dense model raises {_line(error)}")
            return
        if not torch.equal(alone, passes.greedy(**padding)):
            row["notes"].append(f"not compared: generate{name}, which in the dense model differs from whole passes")
            continue
        set_mode(model, "evict")
        got, wanted = passes.generate(**padding), passes.greedy(**padding)
        if not torch.equal(got, wanted):
            raise Wrong(f"generate{name} gives {got[:, :6].tolist()}, whole passes {wanted[:, :6].tolist()}")


def _gradients(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    model = passes.model
    model.requires_grad_(False)
    for parameter in gate_parameters(model).values():
        parameter.requires_grad_(True)
    set_mode(model, "train")
    model(**passes.batch(), use_cache=False).logits.square().mean().backward()
    for name, parameter in gate_parameters(model).items():
        grad = parameter.grad
        if grad is None or not bool(grad.isfinite().all()) or not float(grad.abs().max()) > 0:
            raise Wrong(f"{name} has {'no' if grad is None else 'a zero or infinite'} gradient")
        parameter.grad = None


def _lost(model: Any, folder: str) -> str | None:
    """A weight that transformers does not find again in a folder that the model's own class wrote."""
    own = type(model)._own_class
    _, found = own.from_pretrained(folder, output_loading_info=True)
    return min(found["missing_keys"], default=None)


def _saved(passes: Passes, dense: dict[str, Any], row: dict[str, Any]) -> None:
    model = passes.model
    if not any(type(model.config) in mapping for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)):
        row["notes"].append("not compared: save and load, since no Auto class of transformers loads it")
        return
    set_mode(model, "evict")
    before = passes.read()
    with tempfile.TemporaryDirectory() as folder:
        dms.save(model, folder, base_name="tiny")
        if missing := _lost(model, folder):
            row["notes"].append(
                f"not compared: save and load, since transformers itself does not read back what it writes, such as {missing}"
            )
            return
        loaded = dms.load(folder, device="cpu")
    if type(loaded).__name__ != type(model).__name__:
        row["notes"].append(f"loaded as {type(loaded).__name__}")
    again = Passes(loaded)
    if not torch.equal(again.read(), before):
        raise Wrong(f"save and load: logits differ by {_error(again.read(), before):.2g}")
    if not any("generate" in note for note in row["notes"]) and not torch.equal(again.generate(), passes.generate()):
        raise Wrong("save and load: other tokens")


_STEPS = {
    "dense mode": _dense_is_untouched,
    "closed gates": _closed_gates_are_dense,
    "evict": _evicting,
    "generate": _generating,
    "gradients": _gradients,
    "save and load": _saved,
}


def _error(got: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """The largest difference, by the size of the logits."""
    if got is None or got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    # Some models hide tokens by the least number that there is.
    said = wanted > -1e30
    return float((got - wanted)[said].abs().max() / wanted[said].abs().max().clamp(min=1.0))


def _same(what: str, got: torch.Tensor | None, wanted: torch.Tensor) -> None:
    if not (error := _error(got, wanted)) <= TOLERANCE:
        raise Wrong(f"{what}: differs by {error:.2g}")


def _counted(skipped: dict[str, str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, reason in skipped.items():
        found[reason] += int(name.split()[0]) if name.endswith("other layers") else 1
    return dict(found)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__
