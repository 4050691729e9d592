"""README.md of a model folder as it is first written: by a retrofit, by pretraining, and by an export.

An evaluation later fills its figures into these cards (`evaluation_card`).
"""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dms.evaluation.stats.bootstrap import HIGHER_IS_BETTER
from dms.evaluation.stats.rows import ResultRow
from dms.report import card_text
from dms.report.card_text import Card, facts, hub_id, new_card, public_base, public_name, table
from dms.report.charts import window_name
from dms.report.evidence import TrainingFacts

_QUARTILES = tuple(f"recall_q{i}" for i in range(1, 5))
# Figures of the first table; those of the other tasks go into a second one.
_MAIN = ("bits_per_byte", "recall", *_QUARTILES)
_TITLES = {"bits_per_byte": "bits per byte", **{name: f"recall q{i}" for i, name in enumerate(_QUARTILES, start=1)}}
# Requirements of ours that the code in an exported folder has.
_NEEDED = ("torch", "transformers", "safetensors")

# One line of a table: policy, target_cr and seed.
_Variant = tuple[str, float | None, int | None]
# (variant, length) -> name of the figure -> its row.
_Figures = dict[tuple[_Variant, int | None], dict[str, ResultRow]]

WITH_DMS = """```python
import dms
from transformers import AutoTokenizer

model = dms.load("FOLDER")  # this folder
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""

_LOAD_RUN = f"""{WITH_DMS}
It evicts from the start and works with `model.generate`. From a shell: `dms generate FOLDER --prompt ...`; `dms evaluate FOLDER` repeats the measurement.
"""

_LOAD_WITH_CODE = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

It evicts from the start, in prefill as in decode. {needs}

The code lies in this folder and `trust_remote_code=True` runs it; without that, transformers loads the dense model.

- `from_pretrained(..., evict_bias=1.0)`, `generate(..., evict_bias=1.0)` or `model.dms.evict_bias`: added to every gate's logit; above 0 evicts more than was trained, below 0 less.
- `model.dms.activate("dense")`: the model without eviction again; `model.dms.activate("evict")`: back.
- `transformers serve FOLDER --trust-remote-code` serves it (`pip install 'transformers[serving]'`); with `--continuous-batching` nothing would be evicted.
{more}
"""
# What follows the list, by whether the model is of text alone.
_HARNESS = "- lm-evaluation-harness: `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...`"
_IMAGES = "- The gates are for text: images, video and sound are read in mode `dense` alone."

LOAD_WITHOUT_CODE = f"""{WITH_DMS}
It evicts from the start and works with `model.generate`; transformers alone loads the dense model.
"""

BORROWED = (
    "Its gates are query channels, which are kept out of attention in every mode: what is called the dense model here is the model without them. What "
    "loads the weights alone leaves them in, and is another model."
)

_DEQUANTIZED = (
    "The base's weights were dequantised from the GGUF file `{file}` (SHA-256 `{sha256}`). They stand here as plain numbers, and what was lost "
    "when that file was made is lost here too."
)

LOAD_GATES = """```python
import dms

model = dms.load("FOLDER", base="{base}")  # this folder, and the base that the gates were trained on
```

The base's weights are not here. These gates belong to weights with hash `{hash}`; the same model in another form (from another place, in
another dtype or quantisation) is accepted with `other_base=True`, any other is refused.
"""


def write_run_card(
    folder: str | Path,
    *,
    base_name: str,
    base_license: str | None,
    base_sha256: str | None = None,
    dms_config: Mapping[str, Any],
    rows: Sequence[ResultRow],
    run: TrainingFacts,
    data: str,
) -> Path:
    """Write the card of the model that a retrofit leaves, and return its path.

    Args:
        base_name: a hub id (it goes into the front matter), or a built-in model, folder or file (named in the text alone).
        base_sha256: of the GGUF file that the base's weights were dequantised from; None: there is no such file.
        base_license: the id of the base's licence; None: unknown.
        dms_config: fields of `DMSConfig`.
        rows: of the run's own evaluation; figures come from nowhere else.
        run: how the model was trained.
        data: what it was trained on, in words; empty: unknown.

    Raises:
        ValueError: two rows give one figure different values.
    """
    figures = _by_variant(rows)
    fields = {
        "base_model": hub_id(base_name),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kv-cache", "dms"],
        "license": base_license,
    }
    lengths = sorted({row.length for row in rows if row.length is not None})
    paragraphs = [
        card_text.title(base_name),
        _summary(public_name(base_name), dms_config),
        "" if base_sha256 is None else _DEQUANTIZED.format(file=public_name(base_name), sha256=base_sha256),
        f"## {card_text.RESULTS}",
        _results(figures) if any(figures.values()) else "Nothing was measured.",
        f"## {card_text.LOSSES}",
        _losses(figures),
        f"## {card_text.TRAINING}",
        card_text.training_section(run, dms_config, data),
        f"## {card_text.LOADING}",
        _LOAD_RUN,
        f"## {card_text.LIMITS}",
        card_text.limits_section(lengths, {row.memory for row in rows}),
    ]
    return new_card(fields, paragraphs).write(folder)


def write_pretrain_card(folder: str | Path, known: Mapping[str, Any]) -> Path:
    """Write the card of the embedded model and return its path.

    known: the result.json of `dms pretrain`: architecture, parameters, context, vocabulary, num_files, tokens, steps, loss, seconds, device,
    versions (its `python` names the sources), length, and results: bits_per_byte, recall, recall_questions, recall_by_distance (nearest
    quarter first), by_task. What is absent is left out.
    """
    python = (known.get("versions") or {}).get("python")
    details = [python, f"{known['num_files']:,} files" if known.get("num_files") is not None else None]
    sources = "the standard-library sources of the Python that ran it" + (f" ({', '.join(filter(None, details))})" if any(details) else "")

    def count(key: str) -> str | None:
        return f"{known[key]:,}" if known.get(key) is not None else None

    made = [
        ("architecture", known.get("architecture")),
        ("parameters", count("parameters")),
        ("context", f"{known['context']} tokens" if known.get("context") is not None else None),
        ("vocabulary", count("vocabulary")),
        ("training tokens", count("tokens")),
        ("steps", count("steps")),
        ("final loss", f"{known['loss']:.4f}" if known.get("loss") is not None else None),
        ("hardware", known.get("device")),
        ("time", card_text.format_duration(known["seconds"]) if known.get("seconds") is not None else None),
        ("versions", card_text.format_versions(known.get("versions"))),
    ]
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kv-cache", "dms"], "license": "apache-2.0"}
    paragraphs = [
        "# The embedded model: a small language model that recalls",
        "A small causal language model of Python source that answers questions about records planted in its context. It exists so that "
        "retrofits of the KV cache can be tried and tested in minutes, without downloads.",
        "## How it was made",
        facts(made),
        "## Data",
        f"Text: {sources}, read at run time and not distributed. Planted in it: records to recall, chains of links, pieces of code to copy, "
        "events to count, each asked for later in the document. Held out for the figures below: other files, other seeds, other names.",
        "The tokenizer makes recall easy, on purpose: the words that planted names are made of, such as ` $amber`, the values, such as "
        "` 317`, and the markers of planted lines are single dedicated tokens. Figures of recall are not those of ordinary words.",
        f"## {card_text.RESULTS}",
        _pretrain_results(known.get("results") or {}, known.get("length")),
        "## How to make it again",
        "```\ndms pretrain tiny/pretrain\n```",
        f"## {card_text.LIMITS}",
        "- For tests, demonstrations and experiments with KV caches.\n- It is not a general language model: it has seen Python source and "
        "planted records alone, follows no instructions and knows no facts.\n- Licence: Apache-2.0.",
    ]
    return new_card(fields, paragraphs).write(folder)


def card_of_exported(source: Path, metadata: Mapping[str, str], tags: list[str]) -> Card:
    """The card of the folder that is exported (which may be missing), with the fields that any exported model has. tags: before its own."""
    card = Card.read(source)
    own = [tag for tag in card.fields.get("tags") or ["kv-cache", "dms"] if tag != "custom_code"]
    card.fields = {
        "base_model": hub_id(metadata.get("base_name") or ""),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **card.fields,
        "tags": tags + own,
    }
    return card


def write_export_card(source: Path, folder: Path, metadata: Mapping[str, str], *, auto_class: str | None) -> Path:
    """Write the card of an exported model: `source`, the card of the exported folder (which may be missing), with a new section on loading.

    metadata: of the gates file. auto_class: what loads the code that the folder holds, with trust_remote_code; None: it holds none.
    """
    card = card_of_exported(source, metadata, tags=["custom_code"] if auto_class else [])
    if not card.body.strip():
        card.body = card_text.introduction(metadata.get("base_name") or "")
    loading = LOAD_WITHOUT_CODE
    if auto_class is not None:
        more = _HARNESS if auto_class == "AutoModelForCausalLM" else _IMAGES
        loading = _LOAD_WITH_CODE.format(auto=auto_class, needs=_requirements(), more=more)
    if json.loads(metadata.get("dms", "{}")).get("gate", "linear") != "linear":
        loading = f"{loading.rstrip()}\n\n{BORROWED}\n"
    if trained_on := metadata.get("trained_on"):
        loading = f"{loading.rstrip()}\n\nThe gates were trained on {public_base(trained_on)}, another form of the weights here (hash {metadata['base_hash']}).\n"
    card.set_section(card_text.LOADING, loading, before=(card_text.LIMITS,))
    return card.write(folder)


def write_gates_card(folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write the card of a folder that holds gates without a base. metadata: of the gates file."""
    base = metadata.get("base_name") or ""
    card = Card({"base_model": hub_id(base), "tags": ["kv-cache", "dms"]}, card_text.introduction(base))
    card.set_section(card_text.LOADING, LOAD_GATES.format(base=public_name(base), hash=metadata.get("base_hash")))
    return card.write(folder)


def _summary(shown: str, dms_config: Mapping[str, Any]) -> str:
    by = {"head": ", for each token and KV head", "layer": ", for each token and layer"}.get(dms_config.get("granularity", ""), "")
    text = f"`{shown}` with gates that learned which entries of the KV cache to evict{by}: Dynamic Memory Sparsification (DMS), {card_text.PAPER}."
    window = dms_config.get("window")
    if window is None:
        return text
    if isinstance(window, int):
        return f"{text} An evicted entry stays visible for {window} more tokens, and then no longer."
    return f"{text} They choose how long an entry stays: for {window_name(window)} more tokens, or for good."


def _figure_name(row: ResultRow) -> str:
    """A task's accuracy goes by the task's name, a metric of running text by its own."""
    if row.metric == "accuracy":
        return row.task
    return row.metric if row.task in ("text", row.metric) else f"{row.task} {row.metric}"


def _by_variant(rows: Iterable[ResultRow]) -> _Figures:
    """Raises ValueError where two rows give one figure different values."""
    found: _Figures = {}
    for row in rows:
        figures, name = found.setdefault(((row.policy, row.target_cr, row.seed), row.length), {}), _figure_name(row)
        if name in figures and figures[name].value != row.value:
            raise ValueError(f"rows give {row.policy} {name} at length {row.length} twice: {figures[name].value} and {row.value}")
        figures[name] = row
    return found


def _label(variant: _Variant, variants: Sequence[_Variant]) -> str:
    """The policy, and what tells it from other lines of that policy."""
    policy, target, seed = variant
    same = [other for other in variants if other[0] == policy]
    label = policy
    if len({other[1] for other in same}) > 1:
        label += f", target CR {target:g}" if target is not None else ", no target"
    if len({other[2] for other in same}) > 1:
        label += f", seed {seed}"
    return label


def _results(found: _Figures) -> str:
    """Two tables for each length: the main figures with what the cache held, and the other tasks."""
    parts = []
    for length in dict.fromkeys(length for _, length in found):
        here = {variant: figures for (variant, at), figures in found.items() if at == length}
        variants = list(here)
        names = list(dict.fromkeys(name for figures in here.values() for name in figures))
        main, others = [name for name in _MAIN if name in names], [name for name in names if name not in _MAIN]
        if length is not None:
            parts.append(f"At {length} tokens a document:")
        body = []
        for variant, figures in here.items():
            row = next(iter(figures.values()))
            ratios = [f"{ratio:.2f}" if ratio is not None else "–" for ratio in (row.cr_decided, row.cr, row.cr_mean)]
            body.append([_label(variant, variants), *(_value(figures.get(name)) for name in main), *ratios, row.memory or "–"])
        parts.append(table(["policy", *(_TITLES.get(name, name) for name in main), "cr_decided", "cr", "cr_mean", "memory"], body))
        if others:
            body = [[_label(variant, variants), *(_value(figures.get(name)) for name in others)] for variant, figures in here.items()]
            parts.append(table(["policy", *others], body))
        counts = {figures["recall"].num_samples for figures in here.values() if "recall" in figures}
        if len(counts) == 1 and None not in counts:
            parts.append(f"Recall is over {counts.pop()} questions of held-out documents.")
    notes = "`cr_decided`: tokens decided over tokens kept by the gates. `cr`: tokens seen over entries alive at the end, window and sinks included; `cr_mean`: the same over all positions."
    if any(name in figures for figures in found.values() for name in _QUARTILES):
        notes += " `recall q1` to `q4`: by the distance of what is asked for, from the nearest quarter of the document to the farthest."
    return "\n\n".join([*parts, notes])


def _losses(found: _Figures) -> str:
    """Where dms is worse than dense, figure by figure, in words."""
    several_lengths = len({length for _, length in found}) > 1
    variants = [variant for variant, _ in found]
    losses, num_compared, not_compared = [], 0, set()
    for (variant, length), figures in found.items():
        if variant[0] != "dms":
            continue
        label = _label(variant, variants)
        where = (f" ({label})" if label != "dms" else "") + (f" at {length} tokens" if several_lengths else "")
        for name, row in figures.items():
            title, dense = _TITLES.get(name, name), _dense_for(found, variant, length, name)
            higher_is_better = HIGHER_IS_BETTER.get(row.metric)
            if dense is None or higher_is_better is None:
                not_compared.add(title)
                continue
            num_compared += 1
            if row.value != dense.value and (row.value > dense.value) != higher_is_better:
                losses.append(f"{title}{where}: {_loss(row, dense)}")
    if not num_compared:
        return "There are no figures of dense and dms to compare."
    text = f"No metric is worse: in none of the {num_compared} figures compared is dms behind dense."
    if losses:
        text = f"Against dense, dms is worse in {len(losses)} of {num_compared} figures:\n\n{card_text.bullets(losses)}"
    if not_compared:
        names = ", ".join(sorted(not_compared))
        text += f"\n\nNot compared, for want of a dense figure or because it is not known which way is better: {names}."
    return text


def _dense_for(found: _Figures, variant: _Variant, length: int | None, name: str) -> ResultRow | None:
    """The dense row to compare with: of the same run, else the only one at that length."""
    same = found.get((("dense", *variant[1:]), length), {}).get(name)
    if same is not None:
        return same
    others = [figures[name] for (other, at), figures in found.items() if other[0] == "dense" and at == length and name in figures]
    return others[0] if len({row.value for row in others}) == 1 else None


def _loss(row: ResultRow, dense: ResultRow) -> str:
    difference = row.value - dense.value
    relative = f", {100 * abs(difference / dense.value):.2g} %" if dense.value else ""
    text = f"{abs(difference):.2g} {'lower' if difference < 0 else 'higher'}{relative} ({_value(dense)} dense, {_value(row)} dms)"
    return text + ("; the confidence intervals overlap" if _overlap(row, dense) else "")


def _overlap(a: ResultRow, b: ResultRow) -> bool:
    if a.ci_low is None or a.ci_high is None or b.ci_low is None or b.ci_high is None:
        return False
    return a.ci_low <= b.ci_high and b.ci_low <= a.ci_high


def _value(row: ResultRow | None) -> str:
    return "–" if row is None else f"{row.value:.4f}"


def _pretrain_results(results: Mapping[str, Any], length: int | None) -> str:
    figures = []
    if results.get("bits_per_byte") is not None:
        figures.append(("bits per byte", results["bits_per_byte"]))
    if results.get("recall") is not None:
        asked = results.get("recall_questions")
        figures.append(("recall" + (f", {asked:,} questions" if asked is not None else ""), results["recall"]))
    places = ("nearest quarter", "second", "third", "farthest quarter")
    by_distance = zip(places, results.get("recall_by_distance") or (), strict=False)
    figures += [(f"recall by distance, {place}", value) for place, value in by_distance]
    figures += [(f"task {task}", value) for task, value in (results.get("by_task") or {}).items()]
    body = [[name, f"{value:.4f}"] for name, value in figures if value is not None]
    if not body:
        return "Nothing was measured."
    of_length = f" of {length} tokens" if length is not None else ""
    return f"Dense, on held-out documents{of_length}:\n\n" + table(["figure", "value"], body)


def _requirements() -> str:
    """Which of this project's own requirements the code in an exported folder has."""
    try:
        declared = importlib.metadata.requires("dms-retrofit") or []
    except importlib.metadata.PackageNotFoundError:
        declared = []
    named = {re.split(r"[^\w.-]", line, maxsplit=1)[0]: line.split(";")[0].strip() for line in declared if "extra ==" not in line}
    needed = [f"`{named.get(name, name)}`" for name in _NEEDED]
    return f"It needs {', '.join(needed[:-1])} and {needed[-1]}, not dms itself."
