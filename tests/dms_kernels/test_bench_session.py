"""What comes back of a run of the benchmarks in which a process crashes, hangs or is wrong: without a GPU, with operations that do nothing."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = {"attention", "prefill", "decode", "append", "loss"}


@pytest.fixture
def bench(monkeypatch):
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    return lambda name: importlib.import_module(f"bench.{name}")


def _start(tmp_path: Path, dry_run: str, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "DMS_BENCH_DRY_RUN": dry_run, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = [str(ROOT / "scripts/bench_gpu.sh"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _run(tmp_path: Path, dry_run: str, *arguments: str) -> tuple[int, str, str, list[dict]]:
    process = _start(tmp_path, dry_run, *arguments)
    printed, errors = process.communicate(timeout=100)
    return process.returncode, printed, errors, _rows(tmp_path)


def _rows(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def _complete(rows: list[dict], operations: set[str]) -> None:
    """Both sides of every shape of these operations have a time."""
    for operation in operations:
        found = [row for row in rows if row["operation"] == operation]
        shapes = {row["shape"] for row in found}
        assert len(found) == 4 * len(shapes) > 0 and all(row["ms"] for row in found), operation


def test_ours_come_before_all_others(tmp_path):
    status, printed, errors, rows = _run(tmp_path, "fake", "60", "--quick")
    assert status == 0 and errors == ""
    _complete(rows, OPERATIONS)
    assert {row["operation"] for row in rows} == OPERATIONS
    is_ours = [row["competitor"].startswith("ours") for row in rows]
    assert is_ours == sorted(is_ours, reverse=True)
    # Nothing is timed before its parity is known, and what was never on a GPU does not say so.
    assert printed.index("parity 1.0e-03") < printed.index("2 ms") and all(row["gpu"] is None and row["dry_run"] for row in rows)
    assert (tmp_path / "table.txt").read_text() in printed
    assert f"{len(rows)} rows in " in printed and " of 60 s" in printed


@pytest.mark.parametrize("kind, name", [("crash", "SIGABRT"), ("segfault", "SIGSEGV")])
def test_a_crash_costs_what_was_measured_there(tmp_path, kind, name):
    """The second thing that is timed: the row before is kept, and a new process takes those after."""
    status, printed, errors, rows = _run(tmp_path, f"fake,{kind}@decode:ours:2", "60", "--quick")
    assert status == 1 and errors == "bench: failed: decode\n"
    _complete(rows, OPERATIONS - {"decode"})
    ours = [(row["competitor"], row["ms"], row["problem"]) for row in rows if row["operation"] == "decode"][:2]
    assert ours == [("ours", 2.0, None), ("ours, again", None, f"it was ended by {name}")]
    assert f"FAILED: decode: it was ended by {name} in ours, again at " in (tmp_path / "table.txt").read_text()
    # After two crashes an operation is left alone, and what is missing is said.
    assert "not measured after a crash or a hang: decode " in printed
    assert "Fatal Python error" in (tmp_path / "logs" / "decode.txt").read_text()


def test_after_an_error_that_spoils_the_process_another_goes_on(tmp_path):
    """As an illegal access on a GPU: the error is the row's, and what comes after it is not an error of its own."""
    status, printed, errors, rows = _run(tmp_path, "fake,poison@append:ours:2,poison@loss:check:1", "60", "--quick")
    assert status == 1 and set(errors.removeprefix("bench: failed: ").strip().split(", ")) == {"append", "loss"}
    _complete(rows, OPERATIONS - {"append", "loss"})
    ours = [(row["competitor"], row["ms"], row["problem"]) for row in rows if row["operation"] == "append"][:4]
    assert ours == [("ours", 2.0, None), ("ours, again", None, "RuntimeError: planted")] * 2
    assert "FAILED: append: it ended with status 3 in ours, again at" in printed and "FAILED: loss: parity: planted" in printed


def test_a_hang_costs_its_limit_and_its_operation(tmp_path):
    start = time.monotonic()
    status, printed, errors, rows = _run(tmp_path, "fake,hang@loss:ours:2", "16", "--quick")
    assert status == 1 and errors == "bench: failed: loss\n" and time.monotonic() - start < 16
    _complete(rows, OPERATIONS - {"loss"})
    assert [row["problem"] for row in rows if row["operation"] == "loss"] == [None, "it did not end in 2 s"]
    assert "FAILED: loss: it did not end in 2 s in ours, again" in printed and "of 16 s" in printed
    # Where it hung.
    assert 'dry.py", line' in (tmp_path / "logs" / "loss.txt").read_text()


def test_what_is_wrong_or_dies_while_it_is_checked_is_not_timed(tmp_path):
    status, printed, errors, rows = _run(
        tmp_path, "fake,wrong@prefill:check:1,crash@loss:check:1,crash@ceilings:ceilings:1", "60", "--quick"
    )
    assert status == 1 and set(errors.removeprefix("bench: failed: ").strip().split(", ")) == {"prefill", "loss", "ceilings"}
    _complete(rows, OPERATIONS - {"prefill", "loss"})
    for operation, reason in {"prefill": "parity: planted", "loss": "parity: it was ended by SIGABRT"}.items():
        (row,) = (row for row in rows if row["operation"] == operation)
        assert row["ms"] is None and row["problem"].startswith(reason) and row["problem"].endswith("not timed")
    assert all(row["share_of_ceiling"] is None for row in rows) and "rows have no share" in printed


def test_a_crash_of_others_keeps_ours(tmp_path):
    status, _, errors, rows = _run(tmp_path, "fake,segfault@attention:others:1", "60", "--only", "attention", "--quick")
    assert status == 1 and errors == "bench: failed: attention\n"
    ours = [row for row in rows if row["competitor"].startswith("ours")]
    assert len(ours) == 8 and all(row["ms"] for row in ours)
    assert [row["problem"] for row in rows if row not in ours] == ["it was ended by SIGSEGV"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place, last", [("check:4", "attention, 8B batch 1 90 CR 8 windows 2,5,8: parity"), ("ours:2", "ours: 2 ms")])
def test_an_interrupt_leaves_rows_and_table_and_no_process(tmp_path, number, place, last):
    """While one hangs: where all are checked at once, and where one is timed. last: what it prints before."""
    process = _start(tmp_path, f"fake,hang@attention:{place}", "600", "--quick", "--only", "attention,loss")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("attention") and last in line:
            break
    time.sleep(0.2)
    started = [child for task in Path(f"/proc/{process.pid}/task").iterdir() for child in (task / "children").read_text().split()]
    process.send_signal(number)
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "bench: interrupted\n"
    assert " rows in " in rest and (tmp_path / "table.txt").read_text() in rest
    if place == "ours:2":
        assert [row["competitor"] for row in _rows(tmp_path) if row["operation"] == "attention"] == ["ours"]
    assert started and not any(Path(f"/proc/{child}").exists() for child in started)


def test_when_the_time_is_over_the_rest_is_dropped(bench, monkeypatch):
    """What is cut short then has not failed."""
    monkeypatch.setenv("DMS_BENCH_DRY_RUN", "fake,hang@decode:others:2")
    module, shapes = (
        bench("session"),
        [shape.tiny() for shape in bench("shapes").all_shapes() if shape.operation in ("decode", "append")][:4],
    )
    said: list[str] = []
    limits = module.Limits(check=60, ceilings=60, ours=60, others=60)
    session = module.Session(limits, end=time.monotonic() + 60, out=None, say=said.append, compared=lambda shape: shape)
    session.time(shapes, "ours")
    assert len(session.rows) == 8 and len(said) == 8 + 4
    session.end = time.monotonic() + 0.5
    session.time(shapes, "others")
    session.close()
    assert [(row["competitor"], row["ms"]) for row in session.rows[8:]] == [("one", 3.0)]
    assert session.failures == {} and [text.rpartition(": ")[2] for text in session.dropped] == ["others"] * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["soon"], "'soon' is no number of seconds from 1 on"),
        (["0"], "'0' is no number of seconds from 1 on"),
        (["--only", "decode,speed"], "speed is none of attention, prefill, decode, append, loss"),
        (["60", "70"], "unrecognized arguments: 70"),
    ],
)
def test_what_is_asked_wrongly_is_refused(tmp_path, arguments, message):
    process = _start(tmp_path, "fake", *arguments)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and message in errors


@pytest.mark.parametrize("planted", ["cuda", "fake,crash@decode", "fake,burn@decode:ours:1", "fake,crash@speed:ours:1"])
def test_faults_that_there_are_not_are_refused(tmp_path, planted):
    process = _start(tmp_path, planted)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and "DMS_BENCH_DRY_RUN" in errors


def test_commands_run_together_within_a_time(bench, tmp_path):
    """As the GPU tests do: one that is well, one that fails, one that is killed, one that does not end."""
    code = {
        "good": "print(1)",
        "bad": "print(2); raise SystemExit(3)",
        "dead": "import os; os.abort()",
        "long": "import time; time.sleep(60)",
    }
    commands = {name: [sys.executable, "-c", text] for name, text in code.items()}
    found = dict(bench("children").run_together(commands, tmp_path / "new", at_once=3, end=time.monotonic() + 3))
    assert found == {"good": 0, "bad": 3, "dead": -signal.SIGABRT, "long": None}
    assert (tmp_path / "new" / "bad.txt").read_text() == "2\n"


@pytest.mark.slow
def test_reference_implementations_on_a_cpu(tmp_path):
    """Everything but the kernels and the clock: tiny shapes, with a crash."""
    status, _, errors, rows = _run(tmp_path, "cpu,crash@append:ours:2", "300", "--quick")
    assert status == 1 and errors == "bench: failed: append\n"
    ours = [row for row in rows if row["competitor"].split(":")[0] == "ours" and row["operation"] != "append"]
    assert len(ours) == 9 and all(row["ms"] > 0 and row["parity_error"] < 1e-4 for row in ours)
