"""Findings: sentences about result rows, which say where dms loses, ties and wins against dense and against the other policies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dms.evaluation.stats.bootstrap import HIGHER_IS_BETTER
from dms.evaluation.stats.equal_budget import BUDGETS, EqualBudget
from dms.evaluation.stats.results import DMS_POLICIES
from dms.evaluation.stats.rows import Mark, ResultRow, Verdict

# Recall by distance is left out: these rows are parts of the row `recall`.
_PARTS = tuple(f"recall_q{number}" for number in (1, 2, 3, 4))
_DISTANCES = ("kl", "top1_agreement", "divergence_length")


@dataclass(frozen=True)
class Finding:
    """What the rows of one document length and operating point say.

    Findings of lm-evaluation-harness and of hyper-scaling have no length. Those of hyper-scaling begin with a heading of their own.
    """

    length: int | None
    """Tokens of a document; None: texts of many lengths (lm-evaluation-harness), or hyper-scaling."""
    evict_bias: float | None
    """The operating point of dms."""
    heading: str
    """One sentence that names the place and the point, and says what dms holds there."""
    sentences: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """Heading and sentences, for plain text."""
        return (self.heading, *self.sentences)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"length": self.length, "evict_bias": self.evict_bias, "heading": self.heading, "sentences": list(self.sentences)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Finding":
        return cls(values["length"], values["evict_bias"], values["heading"], tuple(values["sentences"]))


def make_findings(rows: Iterable[ResultRow]) -> list[Finding]:
    """A finding for each length and operating point of dms, and for each length where pages were of several kinds. What rests on few samples is told
    apart from what is known."""
    rows = [row for row in rows if row.task not in _PARTS and row.suite != "scaling"]
    several = len({row.evict_bias for row in rows if row.policy == "dms"}) > 1
    findings = []
    for length, bias in dict.fromkeys((row.length, row.evict_bias) for row in rows if row.policy == "dms"):
        here = [row for row in rows if row.length == length and row.evict_bias == bias]
        dms = [row for row in here if row.policy == "dms"]
        findings.append(Finding(length, bias, _heading(dms, length, bias if several else None), tuple(_sentences(here, dms))))
    for length in dict.fromkeys(row.length for row in rows):
        mixed = [row for row in rows if row.length == length and row.policy in DMS_POLICIES and row.bytes]
        if len({row.policy for row in mixed}) > 1:
            heading = f"At {length} tokens, the mixtures of eviction and bits that no other beats in as many bytes, from the smallest:"
            findings.append(Finding(length, None, heading, tuple(_best_mixtures(mixed))))
    return findings


def _best_mixtures(rows: Sequence[ResultRow]) -> list[str]:
    """A sentence for each figure: the points of dms and its kinds of pages that are better than all that hold no more bytes."""
    found = []
    for task, metric in dict.fromkeys((row.task, row.metric) for row in rows if row.metric in HIGHER_IS_BETTER):
        own = [row for row in rows if (row.task, row.metric) == (task, metric) and Mark.DENSE_AT_CHANCE not in row.marks]
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        front: list[ResultRow] = []
        for row in sorted(own, key=lambda row: (row.bytes or 0, -sign * row.value)):
            if not front or sign * row.value > sign * front[-1].value:
                front.append(row)
        if front:
            points = (f"{row.policy} at {row.evict_bias or 0:+g} ({(row.bytes or 0) / 1e3:,.0f} KB: {_number(row.value)})" for row in front)
            found.append(f"{_name(front[0])}: {', '.join(points)}.")
    return found


def _sentences(here: Sequence[ResultRow], dms: Sequence[ResultRow]) -> list[str]:
    """here: all rows of a length and operating point; dms: those of dms among them."""
    unevicted = [row for row in dms if Mark.EVICTED_NOTHING in row.marks]
    if len(unevicted) == len(dms):
        return ["It evicted nothing: its figures are those of the dense model, and nothing is saved."]
    dms = [row for row in dms if row not in unevicted]
    unable = [row for row in dms if Mark.DENSE_AT_CHANCE in row.marks]
    few = [row for row in dms if Mark.FEW_SAMPLES in row.marks and row not in unable]
    sure = [row for row in dms if row not in unable and row not in few]
    found = [*_beside_dense(sure), *_beside_others(here, sure)]
    if few:
        found.append(f"Too few samples to say: {_names(few)}.")
    if unable:
        found.append(f"Dense itself is at chance in {_names(unable)}: nothing is shown there.")
    if unevicted:
        found.append(f"It evicted nothing in {_names(unevicted)}: these figures are those of the dense model.")
    return found


def _heading(dms: Sequence[ResultRow], length: int | None, bias: float | None) -> str:
    place = "In lm-evaluation-harness" if length is None else f"At {length} tokens"
    point = f" at evict_bias {bias:+g}" if bias is not None else ""
    held = f"{_one_in([row.cr for row in dms if row.cr is not None])} of the entries"
    if means := [row.cr_mean for row in dms if row.cr_mean is not None]:
        held += f" at the end and {_one_in(means)} in the mean over positions"
    if any(row.memory == "masked" for row in dms):
        held += ", masked: they are hidden and not freed"
    longer = [Mark.BEYOND_TRAINING in row.marks for row in dms]
    beyond = f", {'' if all(longer) else 'in part '}beyond the length that its gates were trained at" if any(longer) else ""
    return f"{place}{point}, dms holds {held}{beyond}."


def _one_in(ratios: Sequence[float]) -> str:
    return f"1/{min(ratios):.2f}" + (f" to 1/{max(ratios):.2f}" if max(ratios) - min(ratios) >= 0.01 else "")


def _beside_dense(dms: Sequence[ResultRow]) -> list[str]:
    """Differences from dense by verdict; figures that are themselves distances from dense are given as they are."""
    found = []
    for verdict, beginning in (
        (Verdict.WORSE, "It loses to dense in"),
        (Verdict.BETTER, "It is better than dense in"),
        (Verdict.NOT_DIFFERENT, "It is not told apart from dense in"),
    ):
        differences = [text for row in dms if (text := _difference_from_dense(row, verdict)) is not None]
        if differences:
            found.append(f"{beginning} {'; '.join(differences)}.")
    alone = [row for row in dms if row.vs_dense is None]
    for beginning, chosen in (
        ("Its distance from dense", [row for row in alone if row.metric in _DISTANCES]),
        ("Not compared document by document", [row for row in alone if row.metric not in _DISTANCES]),
    ):
        if chosen:
            found.append(f"{beginning}: {', '.join(f'{_name(row)} {_number(row.value)}' for row in chosen)}.")
    return found


def _beside_others(here: Sequence[ResultRow], dms: Sequence[ResultRow]) -> list[str]:
    off = sorted({row.policy for row in here if Mark.BUDGET_MISSED in row.marks})
    found = [f"{', '.join(off)} missed the budget, and no comparison with that is told."] if off else []
    if in_the_mean := _in_the_mean(here):
        found.append(in_the_mean)
    wins, ties = [], []
    for own in dms:
        others = [
            (row, row.vs_dms.verdict)
            for row in here
            if row.vs_dms is not None and (row.task, row.metric) == (own.task, own.metric) and row.policy not in off
        ]
        if not others:
            continue
        ahead = [f"{row.policy} {_number(row.value)}" for row, verdict in others if verdict is Verdict.BETTER]
        if ahead:
            found.append(f"At the same budget it loses in {_name(own)} {_number(own.value)} to {', '.join(ahead)}.")
        level = [row.policy for row, verdict in others if verdict is Verdict.NOT_DIFFERENT]
        if level:
            ties.append(f"{_name(own)} ({', '.join(level)})")
        if not ahead and not level:
            wins.append(_name(own))
    if ties:
        found.append(f"At the same budget it is not told apart in {'; '.join(ties)}.")
    if wins:
        found.append(f"At the same budget it is better than every other policy in {', '.join(wins)}.")
    return found


def _in_the_mean(here: Sequence[ResultRow]) -> str | None:
    """What policies of equal entries at the end hold on the way there; None: not counted, or there are no others."""
    ratios = []
    for own in here:
        if own.policy != "dms" or not own.entries_mean:
            continue
        others = [row.entries_mean for row in here if row.budget is not None and row.entries_mean and row.suite == own.suite]
        ratios += [own.entries_mean / other for other in others]
    if not ratios:
        return None
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"The other policies hold as many entries at the end; in the mean over positions it holds {span} times theirs."


def _name(row: ResultRow) -> str:
    if row.metric == "accuracy":
        return row.task
    limit = f", at most {row.limit}," if row.limit else ""
    return f"{row.metric.replace('_', ' ')}{limit} of {row.task}"


def _names(rows: Sequence[ResultRow]) -> str:
    return ", ".join(dict.fromkeys(map(_name, rows)))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _difference_from_dense(row: ResultRow, verdict: Verdict) -> str | None:
    """`count 0.380 (dense 0.530, -0.150 [-0.210, -0.090])`; None: the row's verdict is another."""
    versus = row.vs_dense
    if versus is None or versus.verdict is not verdict:
        return None
    dense = _number(row.value - versus.difference)
    interval = f"[{versus.ci_low:+.3f}, {versus.ci_high:+.3f}]"
    return f"{_name(row)} {_number(row.value)} (dense {dense}, {versus.difference:+.3f} {interval})"


def scaling_findings(found: Iterable[EqualBudget], task: str) -> list[Finding]:
    """A finding for each operating point of hyper-scaling on `task`: one sentence for each metric and budget; budgets that come to the same
    number of chains share one."""
    groups: dict[float | None, dict[str, dict[str, list[EqualBudget]]]] = {}
    for one in found:
        groups.setdefault(one.evict_bias, {}).setdefault(one.metric, {}).setdefault(one.budget, []).append(one)
    findings = []
    for bias, by_metric in groups.items():
        sentences = []
        for metric, budgets in by_metric.items():
            names_of: dict[str, list[str]] = {}
            for budget, compared in budgets.items():
                names_of.setdefault("; ".join(map(_equal_budget, compared)), []).append(BUDGETS[budget])
            sentences += [
                f"{task}, {metric}@k with no more {' and '.join(names)} than dense, at evict_bias {bias:g}: {text}."
                for text, names in names_of.items()
            ]
        findings.append(Finding(None, bias, f"Hyper-scaling on {task} at evict_bias {bias:+g}.", tuple(sentences)))
    return findings


def _equal_budget(found: EqualBudget) -> str:
    chains = "1 chain" if found.dense_k == 1 else f"{found.dense_k} chains"
    dense = f"dense with {chains} {found.dense_value:.3f}"
    versus = found.vs_dense
    if versus is None:
        return f"{dense}, and a single chain of dms takes more"
    number = f"all {found.dms_k}, which take less," if found.capped else str(found.dms_k)
    return (
        f"{dense}, dms with {number} {found.dms_value:.3f}, {versus.verdict.value} "
        f"({versus.difference:+.3f}, {versus.ci_low:+.3f} to {versus.ci_high:+.3f})"
    )
