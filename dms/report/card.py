"""Model cards: README.md of an exported folder, filled with measured figures and nothing else. What is unknown is left out."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

PAPER = "[arXiv 2506.05345](https://arxiv.org/abs/2506.05345)"
_LOWER_IS_BETTER = {"bits_per_byte", "cross_entropy", "kl", "loss", "nll", "perplexity"}
_HIGHER_IS_BETTER = {"accuracy", "exact_match", "f1", "pass_at_1", "recall"}
_QUARTILES = tuple(f"recall_q{i}" for i in range(1, 5))
_MAIN = ("bits_per_byte", "recall", *_QUARTILES)
_TITLES = {"bits_per_byte": "bits per byte", **{name: f"recall q{i}" for i, name in enumerate(_QUARTILES, start=1)}}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# One table row: (policy, target_cr, seed), the same model and length throughout.
_Variant = tuple[str, float | None, int | None]


def _front_matter(fields: Mapping[str, Any]) -> str:
    import yaml

    known = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


def _write(folder: str | Path, sections: Sequence[str]) -> Path:
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(section.strip("\n") + "\n" for section in sections if section.strip()), encoding="utf-8")
    return path


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shown_versions(versions: Mapping[str, str] | str | None) -> str | None:
    if isinstance(versions, Mapping):
        return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None) or None
    return versions


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def bullets(pairs: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in pairs if value is not None)


def _figures(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Named figures of one result row. A task's accuracy goes by the task's name; a list by distance is four figures."""
    metric, task, value = row["metric"], row.get("task"), row["value"]
    if isinstance(value, list | tuple):
        name = "recall" if metric == "recall_by_distance" else metric
        return [(f"{name}_q{i}", v) for i, v in enumerate(value, start=1) if v is not None]
    if value is None or metric in ("cr", "cr_decided"):
        # The ratios are columns of every row.
        return []
    if metric == "accuracy" and task:
        return [(task, value)]
    return [(metric if task in (None, "", "text", metric) else f"{task} {metric}", value)]


def _direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where it is not known."""
    base = re.sub(r"_(q\d|by_distance)$", "", metric)
    return 1 if base in _HIGHER_IS_BETTER else -1 if base in _LOWER_IS_BETTER else 0


def _collect(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[_Variant, Any], dict[str, tuple[float, Mapping[str, Any]]]]:
    """(variant, length) -> figure -> (value, its row). Raises ValueError where two rows give one figure different values."""
    found: dict[tuple[_Variant, Any], dict[str, tuple[float, Mapping[str, Any]]]] = {}
    for row in rows:
        variant = (row["policy"], row.get("target_cr"), row.get("seed"))
        figures = found.setdefault((variant, row.get("length")), {})
        for name, value in _figures(row):
            if name in figures and figures[name][0] != value:
                raise ValueError(f"rows give {row['policy']} {name} at length {row.get('length')} twice: {figures[name][0]} and {value}")
            figures[name] = (value, row)
    return found


def _label(variant: _Variant, variants: Sequence[_Variant]) -> str:
    """The policy, and what tells it from other rows of that policy."""
    policy, target, seed = variant
    same = [other for other in variants if other[0] == policy]
    label = policy
    if len({other[1] for other in same}) > 1:
        label += f", target CR {target:g}" if target is not None else ", no target"
    if len({other[2] for other in same}) > 1:
        label += f", seed {seed}"
    return label


def _results(found: Mapping) -> str:
    parts = []
    lengths = list(dict.fromkeys(length for _, length in found))
    for length in lengths:
        here = {variant: figures for (variant, at), figures in found.items() if at == length and figures}
        variants = list(here)
        names = list(dict.fromkeys(name for figures in here.values() for name in figures))
        main, others = [name for name in _MAIN if name in names], [name for name in names if name not in _MAIN]
        if length is not None:
            parts.append(f"At {length} tokens a document:")
        body = []
        for variant in variants:
            row = next(row for _, row in here[variant].values())
            # Of a policy that drops nothing, "masked" would say something false.
            memory = None if variant[0] == "dense" else row.get("memory")
            ratios = [f"{row[key]:.2f}" if row.get(key) is not None else "–" for key in ("cr_decided", "cr")]
            values = [_number(here[variant].get(name, (None,))[0]) for name in main]
            body.append([_label(variant, variants), *values, *ratios, memory or "–"])
        parts.append(table(["policy", *(_TITLES.get(name, name) for name in main), "cr_decided", "cr", "memory"], body))
        if others:
            body = [[_label(v, variants), *(_number(here[v].get(name, (None,))[0]) for name in others)] for v in variants]
            parts.append(table(["policy", *others], body))
        counts = {figures["recall"][1].get("num_samples") for figures in here.values() if "recall" in figures}
        if len(counts) == 1 and None not in counts:
            parts.append(f"Recall is over {counts.pop()} questions of held-out documents.")
    notes = "`cr_decided`: tokens decided over tokens kept by the gates. `cr`: tokens seen over entries alive at the end, window and sinks included."
    if any(name in figures for figures in found.values() for name in _QUARTILES):
        notes += " `recall q1` to `q4`: by the distance of what is asked for, from the nearest quarter of the document to the farthest."
    return "\n\n".join([*parts, notes])


def _dense_for(found: Mapping, variant: _Variant, length: Any, name: str) -> tuple[float, Mapping[str, Any]] | None:
    """The dense figure to compare with: of the same run, else the only one at that length."""
    same = found.get((("dense", *variant[1:]), length), {}).get(name)
    if same is not None:
        return same
    others = [figures[name] for (other, at), figures in found.items() if other[0] == "dense" and at == length and name in figures]
    return others[0] if len({value for value, _ in others}) == 1 else None


def _losses(found: Mapping) -> str:
    """Where dms is worse than dense, figure by figure, in words."""
    several_lengths = len({length for _, length in found}) > 1
    variants = [variant for variant, _ in found]
    losses, num_compared, unjudged = [], 0, set()
    for (variant, length), figures in found.items():
        if variant[0] != "dms":
            continue
        for name, (value, row) in figures.items():
            dense = _dense_for(found, variant, length, name)
            direction = _direction(row["metric"])
            if dense is None or direction == 0:
                unjudged.add(_TITLES.get(name, name))
                continue
            num_compared += 1
            difference = value - dense[0]
            if difference * direction >= 0:
                continue
            by = f"{abs(difference):.2g}"
            relative = f", {100 * abs(difference / dense[0]):.2g} %" if dense[0] else ""
            label = _label(variant, variants)
            where = (f" ({label})" if label != "dms" else "") + (f" at {length} tokens" if several_lengths else "")
            line = f"- {_TITLES.get(name, name)}{where}: {by} {'lower' if difference < 0 else 'higher'}{relative} "
            line += f"({_number(dense[0])} dense, {_number(value)} dms)"
            line += "; the confidence intervals overlap" if _overlap(row, dense[1]) else ""
            losses.append(line)
    if not num_compared:
        return "There are no figures of dense and dms to compare."
    text = f"Against dense, dms is worse in {len(losses)} of {num_compared} figures:\n\n" + "\n".join(losses)
    if not losses:
        text = f"No metric is worse: in none of the {num_compared} figures compared is dms behind dense."
    if unjudged:
        text += (
            f"\n\nNot compared, for want of a dense figure or because it is not known which way is better: {', '.join(sorted(unjudged))}."
        )
    return text


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    bounds = [row.get(key) for row in (a, b) for key in ("ci_low", "ci_high")]
    if any(not isinstance(bound, int | float) for bound in bounds):
        return False
    return bounds[0] <= bounds[3] and bounds[2] <= bounds[1]


def training(run: Mapping[str, Any], config: Mapping[str, Any], data: str) -> str:
    trainable = {"gates": "the gates alone; the base's weights are unchanged", "all": "all weights, gates included"}
    alignment = {"own": "a gate rules the token that it reads", "next": "a gate rules the token before the one that it reads"}
    beta = run.get("beta")
    aligned = run.get("alignment", config.get("alignment"))
    directions = {0: "forward, KL(dense || dms)", 1: "reverse, KL(dms || dense)"}
    seconds = run.get("training_seconds", run.get("seconds"))
    fields = ", ".join(
        f"{key} {value}" for key, value in config.items() if key not in ("alignment", "format_version") and value is not None
    )
    pairs = [
        ("data", data or None),
        ("target compression ratio", f"{run['target_cr']:g}" if run.get("target_cr") is not None else None),
        ("steps", f"{run['steps']:,}" if run.get("steps") is not None else None),
        ("tokens", f"{run['tokens']:,}" if run.get("tokens") is not None else None),
        ("time", _duration(seconds) if seconds is not None else None),
        ("device", run.get("device")),
        ("trained", trainable.get(run.get("trainable"), run.get("trainable"))),
        (
            "divergence from the dense model",
            None if beta is None else f"beta {beta:g}: {directions.get(beta, 'generalised Jensen-Shannon')}",
        ),
        ("alignment", None if aligned is None else f"`{aligned}`" + (f": {alignment[aligned]}" if aligned in alignment else "")),
        ("gates", fields or None),
        ("versions", shown_versions(run.get("versions"))),
    ]
    return bullets(pairs)


def shown_name(base_name: str) -> str:
    """A base as a card names it. A path says nothing to others, and may say too much: of that, the last part."""
    is_path = base_name.startswith((".", "/", "~")) or base_name.count("/") > 1
    return Path(base_name).name if is_path else base_name


def hub_id(base_name: str) -> str | None:
    """The base as front matter may name it, or None for a folder or a built-in model."""
    return base_name if _HUB_ID.fullmatch(base_name) else None


def introduction(base_name: str) -> str:
    """Title and first sentence of a card that is begun without its run."""
    name = shown_name(base_name) or "A model"
    return (
        f"# {name}, retrofitted with Dynamic Memory Sparsification\n\n"
        f"`{name}` with gates that learned which entries of the KV cache to evict: Dynamic Memory Sparsification (DMS), {PAPER}.\n"
    )


def limits(lengths: Sequence[int], memory: Collection[str | None], trained_length: int | None = None, context: int | None = None) -> str:
    """Intended use and limits, as a list. lengths: those that were measured. memory: how its rows were. trained_length, context: where known."""
    lines = [
        "It is meant for what its base is meant for, with a smaller KV cache; the base's own limits apply.",
        "What is evicted cannot be recalled: a question about a detail that seemed unimportant may find it gone.",
    ]
    if lengths:
        lines.append(f"It was measured at {', '.join(map(str, lengths))} tokens; nothing is known here about longer documents.")
    if trained_length is not None:
        beyond = [length for length in lengths if length > trained_length]
        at = f"at {', '.join(map(str, beyond))} tokens it was measured beyond that" if beyond else "nothing was measured beyond that"
        lines.append(f"Its gates were trained at {trained_length} tokens; {at}.")
    if context is not None:
        lines.append(f"The base's context is {context} tokens.")
    if "masked" in memory:
        lines.append('"masked": evicted entries are hidden from attention but not freed yet, so the ratio is not a saving of memory.')
    if "compacted" in memory:
        lines.append('"compacted": evicted entries are really freed.')
    return "\n".join(f"- {line}" for line in lines)


def write_card(
    folder: str | Path,
    *,
    base_name: str,
    base_license: str | None,
    dms_config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    data: str,
) -> Path:
    """Write README.md of a retrofitted model's folder and return its path.

    base_name: a hub id (it goes into the front matter), or a built-in model or folder (named in the text alone). base_license:
    its licence id; None: unknown. dms_config: fields of `DMSConfig`. rows: common result rows; figures come from nowhere else.
    run: target_cr, steps, tokens, training_seconds (or seconds), device, versions, trainable, beta, alignment; each may be
    absent. data: what it was trained on, in words. Raises ValueError where two rows contradict each other.
    """
    shown = shown_name(base_name)
    front = _front_matter(
        {
            "base_model": hub_id(base_name),
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["kv-cache", "dms"],
            "license": base_license,
        }
    )
    found = _collect(rows)
    window, memory = dms_config.get("window"), {row.get("memory") for row in rows if row["policy"] != "dense"}
    delayed = f" An evicted entry stays visible for {window} more tokens, and then no longer." if window is not None else ""
    by = {"head": ", for each token and KV head", "layer": ", for each token and layer"}.get(dms_config.get("granularity"), "")
    sections = [
        front,
        f"# {shown}, retrofitted with Dynamic Memory Sparsification",
        f"`{shown}` with gates that learned which entries of the KV cache to evict{by}: Dynamic Memory Sparsification (DMS), {PAPER}.{delayed}",
        "## What was measured",
        _results(found) if any(found.values()) else "Nothing was measured.",
        "## Where it loses",
        _losses(found),
        "## How it was trained",
        training(run, dms_config, data),
        "## How to load it",
        "```python\nimport dms\nfrom transformers import AutoTokenizer\n\n"
        'model = dms.load("FOLDER")  # this folder\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
        "It evicts from the start and works with `model.generate`. From a shell: `dms generate FOLDER --prompt ...`; "
        "`dms evaluate FOLDER` repeats the measurement.",
        "## Intended use and limits",
        limits(sorted({row["length"] for row in rows if row.get("length") is not None}), memory),
    ]
    return _write(folder, sections)


def pretrain_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write README.md of the embedded model and return its path.

    facts, each of which may be absent: architecture, parameters, context, vocabulary, num_files, tokens, steps, loss, seconds,
    device, versions (its `python` names the sources), length, and results: bits_per_byte, recall, recall_questions,
    recall_by_distance (nearest quarter first), by_task.
    """
    python = (facts.get("versions") or {}).get("python")
    sources = "the standard-library sources of the Python that ran it" + (f" ({python}" if python else "")
    if facts.get("num_files") is not None:
        sources += (", " if python else " (") + f"{facts['num_files']:,} files"
    sources += ")" if "(" in sources else ""

    def count(key: str) -> str | None:
        return f"{facts[key]:,}" if facts.get(key) is not None else None

    made = [
        ("architecture", facts.get("architecture")),
        ("parameters", count("parameters")),
        ("context", f"{facts['context']} tokens" if facts.get("context") is not None else None),
        ("vocabulary", count("vocabulary")),
        ("training tokens", count("tokens")),
        ("steps", count("steps")),
        ("final loss", f"{facts['loss']:.4f}" if facts.get("loss") is not None else None),
        ("hardware", facts.get("device")),
        ("time", _duration(facts["seconds"]) if facts.get("seconds") is not None else None),
        ("versions", shown_versions(facts.get("versions"))),
    ]
    sections = [
        _front_matter(
            {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kv-cache", "dms"], "license": "apache-2.0"}
        ),
        "# The embedded model: a small language model that recalls",
        "A small causal language model of Python source that answers questions about records planted in its context. It exists so that "
        "retrofits of the KV cache can be tried and tested in minutes, without downloads.",
        "## How it was made",
        bullets(made),
        "## Data",
        f"Text: {sources}, read at run time and not distributed. Planted in it: records to recall, chains of links, pieces of code to copy, "
        "events to count, each asked for later in the document. Held out for the figures below: other files, other seeds, other names.",
        "The tokenizer makes recall easy, on purpose: the words that planted names are made of, such as ` $amber`, the values, such as "
        "` 317`, and the markers of planted lines are single dedicated tokens. Figures of recall are not those of ordinary words.",
        "## What was measured",
        _pretrain_results(facts.get("results") or {}, facts.get("length")),
        "## How to make it again",
        "```\ndms pretrain tiny/pretrain\n```",
        "## Intended use and limits",
        "- For tests, demonstrations and experiments with KV caches.\n- It is not a general language model: it has seen Python source and "
        "planted records alone, follows no instructions and knows no facts.\n- Licence: Apache-2.0.",
    ]
    return _write(folder, sections)


def _pretrain_results(results: Mapping[str, Any], length: int | None) -> str:
    body = []
    if results.get("bits_per_byte") is not None:
        body.append(["bits per byte", _number(results["bits_per_byte"])])
    if results.get("recall") is not None:
        asked = results.get("recall_questions")
        body.append(["recall" + (f", {asked:,} questions" if asked is not None else ""), _number(results["recall"])])
    places = ("nearest quarter", "second", "third", "farthest quarter")
    for place, value in zip(places, results.get("recall_by_distance") or (), strict=False):
        if value is not None:
            body.append([f"recall by distance, {place}", _number(value)])
    body += [[f"task {task}", _number(value)] for task, value in (results.get("by_task") or {}).items() if value is not None]
    if not body:
        return "Nothing was measured."
    head = f"Dense, on held-out documents of {length} tokens:\n\n" if length is not None else "Dense, on held-out documents:\n\n"
    return head + table(["figure", "value"], body)
