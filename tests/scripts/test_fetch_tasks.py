"""scripts/fetch_tasks.sh: tasks whose answers stand in their context, once, from a source distribution of our own; and how answers are scored."""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fetch_tasks.sh"
NUM_PAGES = 30


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("reading_tasks", ROOT / "scripts" / "reading_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(tasks) -> dict[str, object]:
    """Files in the forms of BIG-bench's."""
    turns = [{"input_text": f"word {turn}?"} for turn in range(12)]
    stories = [
        {
            "story": f"Story {number}. " + " ".join(f"word{turn}" for turn in range(12)),
            "questions": turns,
            "answers": [{"input_text": f"word{turn}"} for turn in range(12)],
            "additional_answers": {"0": [{"input_text": f"the word{turn}"} for turn in range(12)]},
        }
        for number in range(4)
    ]
    short = {**stories[0], "story": "Short.", "questions": turns[:3], "answers": stories[0]["answers"][:3]}
    articles = [
        {"paragraphs": [{"context": f"Page {n} says n{n}.", "qas": [{"question": f"Page {n}?", "answers": [{"text": f"n{n}"}]}]}]}
        for n in range(NUM_PAGES)
    ]
    passage = " ".join(["word"] * 70)
    conflicts = [{"input": f"\nQuestion: who is {n}?\nContext: {passage} name{n}", "target": f"name{n}"} for n in range(8)]
    conflicts.append({"input": "\nQuestion: who?\nContext: too short", "target": "short"})
    # The loader of JSON takes such answers for times.
    pairs = [{"input": f"!{1 + n % 12:02}!{1 + n % 28:02}!1970!", "target": f"1970-{1 + n % 12:02}-{1 + n % 28:02}"} for n in range(50)]
    return {
        tasks.COQA: {"data": [*stories, short]},
        tasks.SQUAD: {"data": articles},
        tasks.CONFLICTS: {"examples": conflicts},
        tasks.DATES: {"canary": "a canary", "examples": pairs},
        tasks.NEGATION: {"examples": pairs},
    }


@pytest.fixture(scope="module")
def sdist(tasks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("index") / "standin-1.0.tar.gz"
    files = {
        "setup.py": "from setuptools import setup\nsetup(name='standin', version='1.0')\n",
        "PKG-INFO": "Metadata-Version: 1.0\nName: standin\nVersion: 1.0\n",
        **{name: json.dumps(content) for name, content in stand_in(tasks).items()},
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"standin-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def fetch(sdist: Path, *arguments, **changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and "proxy" not in name.lower()}
    sha = hashlib.sha256(sdist.read_bytes()).hexdigest()
    # In the environment that runs, since there is no index from which pip could make another one.
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(sdist.parent), "PIP_NO_BUILD_ISOLATION": "0"}
    ours = {"PYTHON": sys.executable, "DMS_TASKS_PACKAGE": f"standin==1.0 --hash=sha256:{sha}"}
    return subprocess.run([SCRIPT, *arguments], env={**kept, **pip, **ours, **changes}, capture_output=True, text=True, timeout=120)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_documents_hold_what_is_asked_for(tasks, sdist, tmp_path):
    tasks.convert(sdist, tmp_path)
    tasks.check(tmp_path)
    coqa = rows(tmp_path / "reading_coqa.test.jsonl") + rows(tmp_path / "reading_coqa.examples.jsonl")
    assert len(coqa) == 4 and all(row["prompt"].endswith("A: word10\n\nQ: word 11?\nA:") for row in coqa)
    assert all(row["answers"] == ["word11", "the word11"] for row in coqa)
    for row in rows(tmp_path / "reading_squad.test.jsonl"):
        pages = row["prompt"].split("\n\n")
        (answer,) = row["answers"]
        assert len(pages) == 9 and len(set(pages)) == 9 and sum(page.endswith(f"says {answer}.") for page in pages) == 1
    assert len(rows(tmp_path / "reading_conflicts.examples.jsonl")) == 4 and len(rows(tmp_path / "reading_conflicts.test.jsonl")) == 4
    for name, number in tasks.FEWSHOT.items():
        shown, asked = rows(tmp_path / f"{name}.examples.jsonl"), rows(tmp_path / f"{name}.test.jsonl")
        assert len(shown) == number and asked and not {row["prompt"] for row in shown} & {row["prompt"] for row in asked}
    assert "a canary" in (tmp_path / "LICENCES.md").read_text()


@pytest.mark.parametrize(
    ("given", "answers", "exact", "f1"),
    [
        (" The red house.", ["red house"], 1.0, 1.0),
        ("red", ["blue", "red house"], 0.0, 2 / 3),
        ("", ["red"], 0.0, 0.0),
        ("1970-01-02", ["1970-01-02"], 1.0, 1.0),
    ],
)
def test_answers_are_scored_by_their_words(tasks, given, answers, exact, f1):
    assert tasks.score({"answers": answers}, [given]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_the_harness_reads_the_tasks(tasks, sdist, tmp_path, monkeypatch):
    """With examples first, and the figures of our own scoring."""
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'dms-retrofit[evaluate]'")
    from evicting import embedded

    from dms.evaluation.engine.lm_eval import prepare_lm_eval
    from dms.evaluation.engine.settings import LmEvalSettings

    folder = tmp_path / "tasks"
    folder.mkdir()
    tasks.convert(sdist, folder)
    tasks.check(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    wanted = LmEvalSettings(tasks=["fewshot_dates", "reading_squad"], limit=1, include_path=str(folder))
    model, tokenizer = embedded()
    prepared = prepare_lm_eval(model, tokenizer, wanted, policies=["dense"], points=[0.0], versions={}, out=None)
    found = {(run.task, run.num_fewshot[run.task]) for run in _run(prepared)}
    assert found == {("fewshot_dates", 30), ("reading_squad", 0)}


def _run(prepared):
    from dms.evaluation.engine import lm_eval
    from dms.evaluation.engine.lm_eval_rows import HarnessRun

    for unit in prepared.units:
        found = lm_eval._measure(prepared.harness, prepared.simple_evaluate, unit)
        run = HarnessRun.from_dict({name: unit[name] for name in ("task", "policy", "evict_bias")} | found)
        assert set(run.values[run.task]) == {"exact_match,none", "f1,none"}
        yield run


@pytest.mark.slow
def test_fetched_once_and_a_wrong_archive_never(sdist, tmp_path):
    pytest.importorskip("setuptools")
    folder = tmp_path / "tasks"
    wrong = fetch(sdist, folder, DMS_TASKS_PACKAGE=f"standin==1.0 --hash=sha256:{'0' * 64}")
    assert (
        wrong.returncode == 1 and "pip could not download standin==1.0" in wrong.stderr and list(folder.iterdir()) == [folder / ".fetching"]
    )
    done = fetch(sdist, folder)
    assert done.returncode == 0, done.stderr
    assert "reading_squad: 29 documents" in done.stderr and f"--include-path {folder}" in done.stderr
    again = fetch(sdist, folder, PIP_FIND_LINKS=str(tmp_path))
    assert again.returncode == 0 and "reading_squad: 29 documents" in again.stderr and "standin" not in again.stderr
    (folder / "reading_coqa.test.jsonl").write_text("something of yours\n")
    refused = fetch(sdist, folder)
    assert refused.returncode == 1 and "is not the file that was written" in refused.stderr


def test_what_is_refused(sdist, tmp_path):
    (tmp_path / "yours.yaml").write_text("task: mine\n")
    for arguments, code, said in (
        (("a", "b"), 2, "usage: scripts/fetch_tasks.sh [FOLDER]"),
        ((tmp_path,), 1, "is not empty and holds no tasks"),
    ):
        done = fetch(sdist, *arguments)
        assert done.returncode == code and said in done.stderr, done.stderr
