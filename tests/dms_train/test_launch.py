"""The launcher with small stand-ins for workers, real processes and real signals."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from dms_train import launch

ROOT = Path(__file__).resolve().parents[2]
# Against a hang only; nothing here takes as long unless the machine is overloaded.
DEADLINE = 90

# The launcher with its command line, but with a stand-in for `dms retrofit` and short times.
DRIVER = """
import sys
from dms_train import launch
from dms_train.rendezvous import BoardTimes

times = BoardTimes(beat=0.2, linger=2.0, lost={lost}, join={join})
sys.exit(launch.main(command_of=lambda recipe, overrides: [sys.executable, "-S", {stub!r}], times=times))
"""

# What every stand-in begins with; `ready()` tells the test that its handlers are in place.
PRELUDE = """
import faulthandler, os, signal, subprocess, sys, time
from pathlib import Path

faulthandler.register(signal.SIGUSR2)
rank, folder = int(os.environ["RANK"]), Path(__file__).parent

def ready():
    (folder / f"{rank}.new").write_text(str(os.getpid()))
    (folder / f"{rank}.new").rename(folder / f"{rank}.pid")

"""


def wait_for(condition, what: str):
    """What the condition returns once that is true."""
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for {what}"
        time.sleep(0.02)
    return result


def alive(pid: int) -> bool:
    """Not so for a zombie that nobody collects."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Job:
    """A launcher that runs, its output in files."""

    def __init__(self, folder: Path, name: str, options: tuple, *, lost: float, join: float):
        self.folder, self.out, self.err = folder, folder / f"{name}.out", folder / f"{name}.err"
        driver = DRIVER.format(stub=str(folder / "stub.py"), lost=lost, join=join)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, "-c", driver, "tiny/retrofit", *map(str, options)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def worker(self, rank: int) -> int:
        """Its process id, once it is ready."""
        path = self.folder / f"{rank}.pid"
        return int(wait_for(lambda: path.exists() and path.read_text(), f"rank {rank} to be ready: {self.said}"))

    def wait(self) -> int:
        return self.process.wait(timeout=DEADLINE)

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    def wait_until_said(self, text: str) -> None:
        wait_for(lambda: text in self.said, repr(text))


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose workers run the given code."""
    jobs = []

    def _start(code: str, *options, lost: float = 3.0, join: float = 60.0) -> Job:
        (tmp_path / "stub.py").write_text(PRELUDE + textwrap.dedent(code))
        jobs.append(Job(tmp_path, f"launcher{len(jobs)}", options, lost=lost, join=join))
        return jobs[-1]

    yield _start
    for job in jobs:
        job.process.kill()
        job.process.wait()


@pytest.fixture
def start_nodes(start):
    """Start the launchers of two nodes, with one process each, on this machine."""

    def _start(code: str, *options, ranks: tuple[int, ...] = (0, 1), **settings) -> list[Job]:
        port = two_free_ports()
        shared = ("--nodes", 2, "--host", "127.0.0.1", "--port", port, "--grace", 1, *options)
        return [start(code, "--gpus", 1, *shared, "--node-rank", rank, **settings) for rank in ranks]

    return _start


def two_free_ports() -> int:
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("", 0))
            # Outside the range that the system gives away, so that no other test is given it meanwhile.
            port = 10000 + first.getsockname()[1] % 20000
            second.bind(("", port + 1))
            with socket.socket() as third:
                third.bind(("", port))
            return port


# The end of the workers.


@pytest.mark.parametrize(("codes", "expected"), [("0, 0", 0), ("75, 75", 75), ("0, 75", 75)])
def test_good_ends(start, codes, expected):
    job = start(f"sys.exit(({codes})[rank])", "--gpus", 2)
    assert job.wait() == expected, job.said
    assert "rank" not in job.said


@pytest.mark.slow
def test_a_failure_is_told_and_ends_the_others(start):
    code = """
        ready()
        if rank == 1:
            while not all((folder / f"{other}.pid").exists() for other in (0, 2)):
                time.sleep(0.05)
            # It holds the pipe open, like a data loader; the others must still not be told of first.
            subprocess.Popen(["sleep", "5"])
            for i in range(40):
                print("line", i, file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """
    job = start(code, "--gpus", 3, "--grace", 1)
    assert job.wait() == 3, job.said
    assert re.search(r"dms launch: rank 1 \(local rank 1, host \S+, pid \d+\) exited with code 3 after \d+\.\d s;", job.said)
    assert re.findall(r"^    line (\d+)$", job.said, re.M) == [str(i) for i in range(10, 40)]
    # Each of the others prints its stack, with its prefix if it is not rank 0, before it is killed.
    assert len(re.findall(r"^(?:\[rank 2\] )?  File .*stub.py", job.said, re.M)) == 2
    assert "not ended within 1 s: killing rank 0, 2" in job.said
    assert not any(alive(job.worker(rank)) for rank in range(3))


def test_kill_9_of_a_worker(start):
    job = start("ready(); time.sleep(600)", "--gpus", 2, "--grace", 1)
    victim, other = job.worker(0), job.worker(1)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait() == 128 + signal.SIGKILL, job.said
    assert time.monotonic() - killed < 30
    assert f"pid {victim}) killed by SIGKILL (9) after" in job.said
    assert "its stderr is empty" in job.said
    assert not alive(other)


def test_those_that_fail_after_the_first_are_told_in_a_line(start):
    code = """
        if rank == 0:
            signal.signal(signal.SIGUSR2, lambda *_: sys.exit("connection closed by peer"))
            ready()
            time.sleep(600)
        while not (folder / "0.pid").exists():
            time.sleep(0.05)
        sys.exit(7)
    """
    job = start(code, "--gpus", 2)
    assert job.wait() == 7, job.said
    assert re.search(r"^dms launch: rank 0 exited with code 1 after \d+\.\d s as well$", job.said, re.M)
    assert "killing" not in job.said


@pytest.mark.slow
def test_the_end_does_not_wait_for_a_child_that_holds_the_output_open(start):
    code = """
        if rank == 1:
            child = subprocess.Popen(["sleep", "600"])
            (folder / "child").write_text(str(child.pid))
    """
    job = start(code, "--gpus", 2)
    try:
        assert job.wait() == 0, job.said
    finally:
        os.kill(int((job.folder / "child").read_text()), signal.SIGKILL)


# Signals.

SAVES = """
    def save(number, _):
        print("told", signal.Signals(number).name, file=sys.stderr, flush=True)
        # Longer than the shortest grace.
        time.sleep(1.3)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGUSR1, save)
    ready()
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_is_forwarded_once_and_waits_for_the_save(start, number):
    job = start(SAVES, "--gpus", 2, "--grace", 0)  # it does not count for these
    job.worker(0), job.worker(1)
    job.process.send_signal(number)
    assert job.wait() == 75, job.said
    assert f"dms launch: received {number.name}, forwarded to 2 processes" in job.said
    assert sorted(re.findall(r"^.*told.*$", job.said, re.M)) == [f"[rank 1] told {number.name}", f"told {number.name}"]
    assert "killing" not in job.said


def test_the_schedulers_sigterm_after_its_warning_does_not_kill(start):
    job = start(SAVES, "--gpus", 1)
    job.worker(0)
    job.process.send_signal(signal.SIGUSR1)
    job.wait_until_said("told SIGUSR1")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.said
    assert "killing" not in job.said


def test_a_second_sigterm_kills(start):
    job = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)", "--gpus", 2)
    job.worker(0), job.worker(1)
    job.process.terminate()
    job.wait_until_said("received SIGTERM")
    job.process.terminate()
    assert job.wait() == 128 + signal.SIGTERM, job.said
    assert "a second signal, SIGTERM: killing rank 0, 1" in job.said


def test_ctrl_c_is_forwarded_once_and_waits_for_the_save(start):
    code = SAVES.replace("75", "130").replace("SIGTERM", "SIGINT")
    job = start(code, "--gpus", 2, "--grace", 0)  # it does not count where all save
    workers = [job.worker(0), job.worker(1)]
    assert len({os.getsid(pid) for pid in (*workers, os.getpid())}) == 3, "a terminal would signal the workers as well"
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130, job.said
    assert "received SIGINT, forwarded to 2 processes; Ctrl-C again kills them" in job.said
    assert sorted(re.findall(r"^.*told.*$", job.said, re.M)) == ["[rank 1] told SIGINT", "told SIGINT"]
    assert "killing" not in job.said and "last lines" not in job.said


def test_the_second_ctrl_c_kills(start):
    job = start("signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(600)", "--gpus", 2)
    job.worker(0), job.worker(1)
    job.process.send_signal(signal.SIGINT)
    job.wait_until_said("received SIGINT")
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130, job.said
    assert "a second signal, SIGINT: killing rank 0, 1" in job.said


@pytest.mark.parametrize("waits", [False, True])
def test_ctrl_c_before_the_processes_listen(start, waits):
    """One that waits for a peer that is gone is not waited for."""
    ignores = f"if rank == 1 and {waits}: signal.signal(signal.SIGINT, signal.SIG_IGN)"
    job = start(f"signal.signal(signal.SIGINT, signal.SIG_DFL)\n{ignores}\nready(); time.sleep(600)", "--gpus", 2, "--grace", 1)
    job.worker(0), job.worker(1)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130, job.said
    assert ("not ended within 1 s: killing rank 1" in job.said) == waits
    assert "last lines" not in job.said


def test_a_worker_that_is_told_to_stop_before_it_listens(start):
    """Nothing is lost, and the scheduler is to start the job again."""
    job = start("ready(); time.sleep(600)", "--gpus", 1)
    job.worker(0)
    job.process.terminate()
    assert job.wait() == 75, job.said
    assert "killed by SIGTERM (15)" in job.said


def test_workers_die_with_a_killed_launcher(start):
    job = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)", "--gpus", 2)
    workers = [job.worker(0), job.worker(1)]
    job.process.kill()
    wait_for(lambda: not any(map(alive, workers)), "the workers to die")


# Output.


def test_prefixes_partial_lines_and_bytes_that_are_no_text(start):
    code = r"""
        os.write(1, b"out %d\n\xff\xfe half" % rank)
        os.write(2, b"err %d\n\n\xff last" % rank)
    """
    job = start(code, "--gpus", 2)
    assert job.wait() == 0
    out = job.out.read_bytes()
    # Rank 0 writes to stdout itself, in one piece, which may stand anywhere among the lines of the other.
    assert out.count(b"out 0\n\xff\xfe half") == 1
    assert out.replace(b"out 0\n\xff\xfe half", b"") == b"[rank 1] out 1\n[rank 1] \xff\xfe half\n"
    assert sorted(job.err.read_bytes().splitlines()) == sorted(
        [b"err 0", b"", b"\xff last", b"[rank 1] err 1", b"[rank 1] ", b"[rank 1] \xff last"]
    )


def test_much_output_neither_blocks_nor_mixes(start):
    code = """
        for i in range(20_000):
            print(f"{rank}:{i}", "x" * 100)
            print(f"{rank}:{i}", "y" * 100, file=sys.stderr)
        os.write(2, b"z" * 3_000_000)
    """
    job = start(code, "--gpus", 2)
    assert job.wait() == 0
    lines = job.err.read_text().splitlines()
    for rank, prefix in ((0, ""), (1, "[rank 1] ")):
        assert [line for line in lines if line.startswith(f"{prefix}{rank}:")] == [f"{prefix}{rank}:{i} {'y' * 100}" for i in range(20_000)]
    assert sum(line.count("z") for line in lines) == 6_000_000
    # Rank 0 writes to stdout itself, so its bytes may stand within a line of another rank.
    assert job.out.read_text().count("x") == 4_000_000


def test_a_reader_that_goes_away_stops_nothing(start, tmp_path):
    (tmp_path / "stub.py").write_text(PRELUDE + "print('x' * 1_000_000) if rank else None\n")
    driver = DRIVER.format(stub=str(tmp_path / "stub.py"), lost=3, join=60)
    process = subprocess.Popen([sys.executable, "-c", driver, "tiny/retrofit", "--gpus", "2"], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=DEADLINE) == 0


# Two nodes, that is two launchers on this machine.


@pytest.mark.slow
def test_nodes_end_well_at_different_times(start_nodes):
    jobs = start_nodes("time.sleep(rank); sys.exit(75 * rank)", lost=10)
    assert [job.wait() for job in jobs] == [75, 75], [job.said for job in jobs]
    assert not any("gone" in job.said or "failed" in job.said for job in jobs)


@pytest.mark.slow
def test_a_failure_reaches_the_other_node(start_nodes):
    """The default silence stands here: it is the message that ends the other node."""
    jobs = start_nodes("ready(); time.sleep(600)", lost=20)
    other, victim = jobs[0].worker(0), jobs[1].worker(1)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert [job.wait() for job in jobs] == [137, 137], [job.said for job in jobs]
    assert time.monotonic() - killed < 30
    assert f"dms launch: node 1 failed: rank 1 on {socket.gethostname()} killed by SIGKILL (9)\n" in jobs[0].said
    assert "ending the other processes of this node (1)" in jobs[0].said
    assert "frame #" not in jobs[0].said + jobs[1].said, "a C++ stack of the store"
    assert not alive(other)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_launcher_ends_the_other_node(start_nodes, victim):
    jobs = start_nodes("ready(); time.sleep(600)", lost=1.5)
    workers = [jobs[0].worker(0), jobs[1].worker(1)]
    jobs[victim].process.kill()
    survivor = jobs[1 - victim]
    assert survivor.wait() == 1, survivor.said
    assert f"node {victim} is gone: " in survivor.said
    assert "frame #" not in survivor.said, "a C++ stack of the store"
    wait_for(lambda: not any(map(alive, workers)), "the workers to die")


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named(start_nodes):
    (job,) = start_nodes("ready()", ranks=(0,), join=1)
    assert job.wait() == 1
    assert re.search(r"^dms: failed: node 1 did not join at 127\.0\.0\.1:\d+ within 1 s$", job.said, re.M), job.said


# The command line.


def errors_of(monkeypatch, capfd, *args: str) -> str:
    monkeypatch.setattr(launch, "count_gpus", lambda: 2)
    assert launch.main(list(args)) == 2
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("dms: error: "), err
    return err


NODES = ("tiny/retrofit", "--nodes", "2", "--host", "h", "--port", "9")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ["RECIPE"]),
        (("tiny/retrofit", "--gpu", "1"), ["--gpu"]),
        (("tiny/retrofit", "--gpus", "two"), ["--gpus", "'two'"]),
        (("tiny/retrofit", "--gpus", "0"), ["--gpus is 0", "1 to 2"]),
        (("tiny/retrofit", "--gpus", "3"), ["--gpus is 3", "1 to 2"]),
        (("tiny/retrofit", "--nodes", "0"), ["--nodes is 0"]),
        (("tiny/retrofit", "--nodes", "2", "--node-rank", "0"), ["--host and --port"]),
        ((*NODES, "--node-rank", "2"), ["--node-rank is 2", "at most 1"]),
        ((*NODES, "--node-rank", "-1"), ["--node-rank is -1"]),
        (("tiny/retrofit", "--port", "65535"), ["--port is 65535", "65534"]),
        (("tiny/retrofit", "--grace", "-1"), ["--grace is -1"]),
        (("tiny/retrofit", "--grace", "nan"), ["--grace is nan"]),
        (("tiny/retrofitt",), ["tiny/retrofitt", "did you mean"]),
        (("tiny/retrofit", "target_crr=4"), ["target_crr", "did you mean"]),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capfd, args, parts):
    err = errors_of(monkeypatch, capfd, *args)
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,1,2", 3), ("", 0), ("-1", 0), ("1,-1,2", 1), ("GPU-8f, MIG-2a", 2), ("NoDevFiles", 0), (None, 2)]
)
def test_gpus_are_counted(monkeypatch, tmp_path, visible, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/bash\n[[ $1 == -L ]] && printf 'GPU 0: A (UUID: x)\\n  MIG 1g: y\\nGPU 1: B (UUID: z)\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.count_gpus() == expected


def test_nothing_heavy_is_imported():
    code = """
        import sys
        from dms_train import launch
        assert launch.main(["tiny/retrofit", "--dry-run"]) == 0
        try:
            launch.main(["--help"])
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--node-rank" in done.stdout
