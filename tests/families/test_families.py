"""The table of families: generated from its rows, complete, and what a run of some families gives. `scripts/sweep_families.sh` runs all."""

import json
import sys

import families_page
import pytest
import sweep
import transformers
from family_checks import check
from family_settings import VARIANTS, cases
from tiny_models import names

VERSION = transformers.__version__
TABLES = families_page.committed()
CASES = {case.name: case for case in cases(names())}
# One of each kind of layer and of outcome, the quickest of them.
SELECTION = (
    "llama:LlamaForCausalLM:3 heads, 1 KV head",
    "gpt_oss:GptOssForCausalLM:default",
    "lfm2:Lfm2ForCausalLM:default",
    "bloom:BloomForCausalLM:default",
)
# Of the slow tier: every family of text whose class has a setting of its own in the table.
BROAD = [name for name, case in CASES.items() if case.model_type in VARIANTS and name not in SELECTION]


def _agrees(name: str) -> None:
    row = json.loads(json.dumps(sweep.make_row(name, check(CASES[name]))))
    expected = TABLES[VERSION][name]
    assert {key: row[key] for key in sweep.COMPARED} == {key: expected[key] for key in sweep.COMPARED}


needs_table = pytest.mark.skipif(VERSION not in TABLES, reason=f"no committed table of transformers {VERSION}")


def test_the_page_is_written_from_the_rows():
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.make_page(TABLES), (
        "write it anew: scripts/sweep_families.sh --accept"
    )


@needs_table
def test_every_family_has_a_row():
    assert set(TABLES[VERSION]) == set(CASES), "run scripts/sweep_families.sh, and again with --accept"


@pytest.mark.parametrize("version", TABLES)
def test_nothing_is_wrong_and_every_refusal_has_a_reason(version):
    for name, row in TABLES[version].items():
        assert row["transformers"] == version and row["case"] == name
        assert row["status"] in ("right", "refused", "not run"), f"{name}: {row['reason']}"
        assert (row["gated"] > 0) if row["status"] == "right" else row["reason"], name
        if row["status"] == "refused":
            reason = families_page.kind(row["reason"])
            assert families_page.meaning(reason), f"{name}: families_page.MEANINGS has no words for {reason!r}"


@needs_table
@pytest.mark.parametrize("name", SELECTION)
def test_families_are_as_the_table_says(name):
    _agrees(name)


@needs_table
@pytest.mark.slow
@pytest.mark.parametrize("name", BROAD)
def test_unusual_settings_are_as_the_table_says(name):
    _agrees(name)


_WORKER = """
import json, os, sys, time
for case in sys.argv[1:]:
    if case.endswith("crash"):
        os.abort()
    if case.endswith("hang"):
        time.sleep(60)
    print(json.dumps({"case": case, "status": "right"}), flush=True)
"""


def test_a_crash_and_a_hang_lose_themselves_alone():
    rows = []
    names = [f"type:Class:{end}" for end in ("one", "crash", "two", "hang", "three")]
    sweep.run_cases(names, [sys.executable, "-c", _WORKER], 1.5, rows.append)
    assert [(row["case"].rpartition(":")[2], row["status"]) for row in rows] == [
        ("one", "right"),
        ("crash", "WRONG"),
        ("two", "right"),
        ("hang", "WRONG"),
        ("three", "right"),
    ]
    assert "signal SIGABRT" in rows[1]["reason"] and "within 1.5 seconds" in rows[3]["reason"]


def test_changes_are_listed(tmp_path):
    right = sweep.make_row("llama:Llama:default", {"status": "right", "gated": 2, "layers": 2})
    refused = sweep.make_row("new:New:default", {"status": "refused", "reason": "it is an encoder"})
    before = {right["case"]: right}
    assert sweep.changes(before, before) == []
    now = {right["case"]: right | {"status": "WRONG", "reason": "differs by 2"}, refused["case"]: refused}
    assert sweep.changes(before, now) == [
        "llama:Llama:default: was right (2 of 2 layers gated); is WRONG (2 of 2 layers gated): differs by 2",
        "new:New:default: new, refused (0 of 0 layers gated): it is an encoder",
    ]
    sweep.write_rows(tmp_path / "rows.jsonl", now)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"case": "cut')
    assert sweep.read_rows(tmp_path / "rows.jsonl") == now


@pytest.mark.parametrize("what", ["decisions", "decode", "dense"])
def test_a_fault_is_found(what, monkeypatch):
    """A family that is right is WRONG where something is broken on purpose."""
    from dms import attention, masks, modes

    if what == "decisions":
        # Nothing is ever hidden.
        visible = masks.visible
        monkeypatch.setattr(attention.masks, "visible", lambda q, k, evicted, **given: visible(q, k, evicted & False, **given))
        expected = "decisions have no effect"
    elif what == "decode":
        monkeypatch.setattr(attention, "scale_of", lambda scaling, query: (scaling or 0.25) * (1.1 if query.shape[2] == 1 else 1.0))
        expected = "in steps"
    else:
        monkeypatch.setattr(modes.DMSState, "activate", lambda state, mode: setattr(state, "mode", "train" if mode == "dense" else mode))
        expected = "dense mode"
    row = check(CASES["llama:LlamaForCausalLM:default"])
    assert row["status"] == "WRONG" and expected in row["reason"]
