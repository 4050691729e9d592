"""An evaluation in a model's card, and the sections that a card is changed by."""

import hashlib
from dataclasses import replace

import evaluated
import pytest
import yaml

from dms.report.card_text import Card, public_sentence
from dms.report.cards import write_run_card
from dms.report.evaluation_card import write_evaluation_card
from dms.report.evidence import TrainingFacts, read_evidence

GATES = b"gates"


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model's, with the card that its run wrote."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "gates.safetensors").write_bytes(GATES)
    run = TrainingFacts(target_cr=8.0, steps=240, trainable="gates")
    write_run_card(folder, base_name="acme/base", base_license="mit", dms_config={"window": 16}, rows=[], run=run, data="stories")
    return folder


def evidence(tmp_path, **changes):
    settings = {**evaluated.SETTINGS, "gates_hash": hashlib.sha256(GATES).hexdigest()[:16]}
    return read_evidence(evaluated.write_evaluation(tmp_path / "evaluation", **{"settings": settings, **changes}))


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def cells(text, heading, first):
    """Rows below `### heading` whose first cell is `first`."""
    part = text.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:] if row[0] == first]


def test_the_card_says_what_the_rows_say(model, tmp_path):
    path = write_evaluation_card(evidence(tmp_path), model)
    text = path.read_text(encoding="utf-8")
    rows = evaluated.make_rows()

    def row(**wanted):
        return next(r for r in rows if all(getattr(r, key) == value for key, value in wanted.items()))

    count, dense = (row(task="count", policy=p, length=2048, evict_bias=b) for p, b in (("dms", 0.0), ("dense", None)))
    (told,) = cells(text, "Beside dense, at 2,048 tokens", "count")
    assert told["dms"] == f"{count.value:.4f} [{count.ci_low:.4f}, {count.ci_high:.4f}]" and told["samples"] == "256"
    assert told["dense"].startswith(f"{dense.value:.4f} [") and told["difference"] == "not different: -0.0100 [-0.0300, +0.0100]"
    (told,) = cells(text, "Beside dense, at 4,096 tokens", "count")
    assert told["marks"] == "beyond training, dense at chance" and told["difference"].startswith("worse: ")
    # dms at every point, the others beside the point as trained.
    points = "Operating points and other policies, at 2,048 tokens"
    assert [r["evict_bias"] for r in cells(text, points, "dms")] == ["-2", "0", "2"]
    (h2o,) = cells(text, points, "h2o")
    own = row(policy="h2o", length=2048, evict_bias=0.0, task="recall")
    assert h2o["evict_bias"] == "0" and h2o["cr"] == "6.80" and h2o["memory"] == "compacted" and h2o["bytes"] == f"{own.bytes:,}"
    assert h2o["recall"].startswith(f"{own.value:.4f} [") and cells(text, points, "dense")[0]["memory"] == "–"
    assert "| dms | chains | pass@16 | 0.9300 [0.8900, 0.9700] | 21,176 | 706 |" in text

    assert text.count(f"- {evaluated.SCALING_SENTENCES[0]}") == 1

    losses = section(text, "Where it loses")
    trained, other = (f"At 2048 tokens at evict_bias {bias}, dms holds" for bias in ("+0", "-2"))
    assert trained in losses and other not in losses and "- It is not told apart from dense in recall 0." in losses
    assert "miss the budget by more than 3 %" in losses and "There are no figures" not in losses
    limits = section(text, "Intended use and limits")
    assert (
        "measured at 512, 1024, 2048, 4096 tokens" in limits
        and "trained at 2048 tokens; at 4096 tokens it was measured beyond that" in limits
    )
    checks = section(text, "What this card rests on")
    for part in ("licence: mit", "`builtin:tiny`", "`0f3c2a9b1d5e`", "`c0ffee0123456789`", "seed: 7", "torch 2.13.0", "2,048 tokens"):
        assert part in checks, part
    assert "without a chat template" in text and "56 documents" in text


def test_what_else_the_card_says_stays_and_twice_is_once(model, tmp_path):
    before = (model / "README.md").read_text(encoding="utf-8")
    given = evidence(tmp_path)
    once = write_evaluation_card(given, model).read_text(encoding="utf-8")
    assert section(once, "How it was trained") == section(before, "How it was trained") and "data: stories" in once
    assert yaml.safe_load(once.split("---\n")[1])["license"] == "mit"
    titles = [line for line in once.splitlines() if line.startswith("## ")]
    assert titles == [f"## {t}" for t in ("What was measured", "Evaluation", "Where it loses", "How it was trained", "How to load it")] + [
        "## Intended use and limits",
        "## What this card rests on",
    ]
    assert write_evaluation_card(given, model).read_text(encoding="utf-8") == once


def test_a_folder_without_a_card_gets_one(model, tmp_path):
    (model / "README.md").unlink()
    given = replace(evidence(tmp_path), training=read_evidence(evaluated.write_run(tmp_path / "run")).training)
    text = write_evaluation_card(given, model).read_text(encoding="utf-8")
    assert (
        "# builtin:tiny, retrofitted with" in text and "licence: not stated" in text and "steps: 240" in section(text, "How it was trained")
    )
    (model / "README.md").unlink()
    text = write_evaluation_card(replace(given, training=None), model).read_text(encoding="utf-8")
    assert "data and training are not known here" in text


def test_what_is_unknown_is_left_out(model, tmp_path):
    unknown = dict.fromkeys(("ci_low", "ci_high", "num_samples", "num_documents", "cr", "entries", "bytes", "step_ms", "recipe_hash"))
    rows = [
        replace(row, length=None, vs_dense=None, **unknown)
        for row in evaluated.make_rows()
        if row.task == "recall" and row.policy in ("dense", "dms")
    ]
    rows = [row for row in rows if row.evict_bias in (None, 0.0)][:2]
    given = evidence(tmp_path, rows={"rows": [row.to_dict() for row in rows]}, settings={"format_version": 1}, scaling=None)
    text = write_evaluation_card(given, model).read_text(encoding="utf-8")
    (told,) = cells(text, "Beside dense, at lengths of their own", "recall")
    value = {row.policy: f"{row.value:.4f}" for row in rows}
    assert told == {"figure": "recall", "samples": "–", "dense": value["dense"], "dms": value["dms"], "difference": "–", "marks": "–"}
    assert "None" not in text and "no verdict in words" in text and "a length that was not recorded" in text


def test_sentences_of_an_earlier_version_are_one_finding(model, tmp_path):
    """Folders of earlier versions have `words` alone, in which those of hyper-scaling come last."""
    content = evaluated.rows_file(evaluated.make_rows())
    del content["findings"]
    given = evidence(tmp_path, rows=content)
    (finding,) = given.findings
    assert list(finding.sentences) == [line for line in content["words"] if line not in evaluated.SCALING_SENTENCES]
    losses = section(write_evaluation_card(given, model).read_text(encoding="utf-8"), "Where it loses")
    assert all(f"- {sentence}" in losses for sentence in finding.sentences)


def test_another_models_card_is_refused(model, tmp_path):
    given = evidence(tmp_path)
    before = (model / "README.md").read_text(encoding="utf-8")
    (model / "gates.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="the figures are another model's"):
        write_evaluation_card(given, model)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        write_evaluation_card(given, tmp_path)
    (model / "gates.safetensors").write_bytes(GATES)
    with pytest.raises(ValueError, match="no rows of dms"):
        write_evaluation_card(replace(given, rows=[row for row in given.rows if row.policy != "dms"]), model)
    assert (model / "README.md").read_text(encoding="utf-8") == before


CARD = """# Title

Words.

## One

```sh
## not a heading
```

## Two

Last.
"""


def changed(title, content, before=(), body=CARD):
    card = Card({}, body)
    card.set_section(title, content, before)
    return card.body


def test_sections():
    replaced = changed("One", "new")
    assert "## One\n\nnew\n\n## Two\n\nLast.\n" in replaced and "not a heading" not in replaced
    assert changed("Three", "x", before=("Two", "One")).index("## Three") < CARD.index("## One") + 1
    assert changed("Three", "x").endswith("Last.\n\n## Three\n\nx\n")
    assert changed("Only", "x", body="") == "## Only\n\nx\n"
    # Twice is once.
    assert changed("One", "new", body=replaced) == replaced
    assert Card({}, CARD).has_section("Two") and not Card({}, CARD).has_section("not a heading")


def test_front_matter_comes_back_as_it_was():
    fields = {"license": "mit", "tags": ["a", "b"]}
    assert Card.parse(Card(fields, CARD).to_text()) == Card(fields, "\n" + CARD)
    assert Card.parse(CARD) == Card({}, CARD)
    assert Card({}, CARD).to_text() == CARD


def test_bases_are_named_without_their_folders():
    said = "gates trained on /home/me/base (hash 12, packed as nf4 when it was loaded), used on {} (hash unknown); no more was compared"
    for name, public in (("../models/base.gguf", "base.gguf"), ("acme/base", "acme/base")):
        expected = said.replace("/home/me/base", "base").format(public)
        assert public_sentence(said.format(name)) == expected
