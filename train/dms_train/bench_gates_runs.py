"""The runs of `dms bench gates`: each is `dms retrofit` in a process of its own, so that one that fails takes no other with it.

Beside a run's folder lie its recipe (`.yaml`), what it printed (`.log`), the lock of whoever makes it (`.lock`), and why it failed (`.failed`).
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from dms.errors import describe
from dms_train.bench_gates import Comparison, Run
from dms_train.recipe_file import dump_recipe
from dms_train.run_folder import LOCK_FILE
from dms_train.stopping import Stopped, StopRequest, listening

# The command that a run's recipe is given to.
RETROFIT = (sys.executable, "-m", "dms_train.cli", "retrofit")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Running:
    run: Run
    process: subprocess.Popen
    lock: IO
    """Held by the process too: where the bench is killed, nobody else starts the run before that one has ended."""
    log_start: int
    """Bytes of the log that were there before."""
    started: float


def lock(run: Run) -> IO | None:
    """Take a run; None where another process makes or evaluates it."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    held = run.beside(".lock").open("a")
    if _try_lock(held) and not _is_in_use(run.folder / LOCK_FILE):
        return held
    held.close()
    return None


def _try_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_in_use(path: Path) -> bool:
    """Whether a `dms retrofit` that nobody here started has the folder."""
    if not path.exists():
        return False
    with path.open("a") as file:
        return not _try_lock(file)


def make_all(comparison: Comparison, runs: Sequence[Run], console: Console) -> None:
    """Make and evaluate every run that is missing, `processes` at a time, and then read the baselines. A run that fails leaves its reason.

    Raises:
        ValueError: evaluation documents that cannot be made, before the first run.
        Stopped: a signal came; runs have saved, and the same command goes on.
    """
    with listening() as request:
        _Bench(comparison, runs, console, request).make_all()


class _Bench:
    def __init__(self, comparison: Comparison, runs: Sequence[Run], console: Console, request: StopRequest):
        from dms_train.bench_gates_rows import Evaluator

        self.comparison, self.runs, self.console, self.request = comparison, runs, console, request
        self.running: list[_Running] = []
        self.elsewhere: list[Run] = []
        comparison.folder.mkdir(parents=True, exist_ok=True)
        self.evaluator = Evaluator(comparison, runs[0].recipe, between=self._heed_signals)

    def make_all(self) -> None:
        self._share_cores()
        pending = list(self.runs)
        with self._stopping_runs():
            while pending or self.running:
                self._heed_signals()
                for one in [one for one in self.running if one.process.poll() is not None]:
                    self._collect(one)
                while pending and len(self.running) < self.comparison.processes:
                    self._begin(pending.pop(0))
                if self.running:
                    time.sleep(_POLL_SECONDS)
            self.evaluator.evaluate_baselines([run for run in self.runs if run.is_finished])
        if self.elsewhere:
            names = ", ".join(run.name for run in self.elsewhere)
            self._say(f"other processes make {names}: when they have ended, the same command adds them to the table")

    def _share_cores(self) -> None:
        if self.comparison.processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.comparison.processes))

    def _begin(self, run: Run) -> None:
        held = lock(run)
        if held is None:
            self.elsewhere.append(run)
            return
        if run.is_finished:
            with held:
                self._evaluate(run)
            return
        self.running.append(self._start(run, held))

    def _start(self, run: Run, held: IO) -> _Running:
        import torch

        run.beside(".failed").unlink(missing_ok=True)
        recipe, log = run.beside(".yaml"), run.beside(".log")
        recipe.write_text(dump_recipe(run.recipe), encoding="utf-8")
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                [*RETROFIT, str(recipe)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(held.fileno(),),
                # Ctrl-C comes to this process alone, which tells the others.
                start_new_session=True,
            )
        self._say(f"{run.name}: process {process.pid}, log in {log}")
        return _Running(run, process, held, log_start, time.perf_counter())

    def _collect(self, one: _Running) -> None:
        """Evaluate a run that has ended, or say why it failed."""
        self.running.remove(one)
        with one.lock:
            # What evicts next to nothing ends with an error and has a result all the same.
            if one.run.is_finished:
                self._say(f"{one.run.name}: finished after {time.perf_counter() - one.started:.0f} s")
                self._evaluate(one.run)
            else:
                self._fail(one.run, _reason(one))

    def _evaluate(self, run: Run) -> None:
        try:
            self.evaluator.evaluate(run)
        except (ValueError, RuntimeError, OSError) as error:
            self._fail(run, f"its evaluation failed: {describe(error)}")
        else:
            run.beside(".failed").unlink(missing_ok=True)

    def _fail(self, run: Run, reason: str) -> None:
        run.beside(".failed").write_text(reason + "\n", encoding="utf-8")
        self._say(f"{run.name} failed: {reason}")

    def _heed_signals(self) -> None:
        if self.request.signal is not None:
            number = sum(run.is_finished for run in self.runs)
            raise Stopped(
                f"stopped by {self.request.signal} with {number} of {len(self.runs)} runs finished; the same command continues",
                by=self.request.signal,
            )

    @contextmanager
    def _stopping_runs(self) -> Iterator[None]:
        """However it is left, no run goes on: each saves a checkpoint first."""
        try:
            yield
        finally:
            for one in self.running:
                one.process.send_signal(signal.SIGTERM)
            if self.running:
                self._say(f"{len(self.running)} runs save and stop")
            for one in self.running:
                one.process.wait()
                one.lock.close()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _reason(one: _Running) -> str:
    """Why a run ended without a result: the last line that the command said of it, else the last line."""
    with one.run.beside(".log").open("rb") as file:
        file.seek(one.log_start)
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    code = one.process.returncode
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said = [line.removeprefix("dms: ") for line in lines if line.startswith("dms: ") and not line.startswith("dms: warning")]
    text = said[-1] if said else lines[-1] if lines else "no output"
    return f"{text} ({end}; {one.run.beside('.log')})"
