"""The launcher with small stand-ins for workers, real processes and real signals; the scripts by what they would run."""

import contextlib
import os
import re
import shlex
import shutil
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
SBATCH = ROOT / "scripts" / "slurm.sbatch"
BIN = Path(sys.executable).parent
# Against a hang only; nothing here takes as long unless the machine is overloaded.
DEADLINE = 90

# The launcher with its command line, but with a stand-in for `dms retrofit`, and with its times shortened.
DRIVER = """
import sys
from dms_train import launch, nodes
launch.worker_command = lambda recipe, overrides: [sys.executable, "-S", {stub!r}]
nodes.BEAT_SECONDS, nodes.LINGER_SECONDS, nodes.LOST_SECONDS, nodes.JOIN_SECONDS = 0.2, 2.0, {lost}, {join}
sys.exit(launch.main())
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
    # Each of the others shows where it stands, with its prefix if it is not rank 0, before it is killed.
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
    assert b"[rank 1] out 1\n[rank 1] \xff\xfe half\n" in out
    assert out.replace(b"[rank 1] out 1\n[rank 1] \xff\xfe half\n", b"") == b"out 0\n\xff\xfe half"
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


def test_nodes_end_well_at_different_times(start_nodes):
    jobs = start_nodes("time.sleep(rank); sys.exit(75 * rank)", lost=10)
    assert [job.wait() for job in jobs] == [75, 75], [job.said for job in jobs]
    assert not any("gone" in job.said or "failed" in job.said for job in jobs)


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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_ends_the_other_node(start_nodes, victim):
    jobs = start_nodes("ready(); time.sleep(600)")
    workers = [jobs[0].worker(0), jobs[1].worker(1)]
    jobs[victim].process.kill()
    survivor = jobs[1 - victim]
    assert survivor.wait() == 1, survivor.said
    assert f"node {victim} is gone: " in survivor.said
    assert "frame #" not in survivor.said, "a C++ stack of the store"
    wait_for(lambda: not any(map(alive, workers)), "the workers to die")


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


# The scripts.


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run a script without set-up, on a machine without GPUs and SLURM unless told otherwise."""
    hidden = {name for name in os.environ if name.startswith("SLURM_")} | {"OMP_NUM_THREADS", "DS_ACCELERATOR"}
    base = {name: value for name, value in os.environ.items() if name not in hidden}
    base |= {"DMS_SKIP_SETUP": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def _run(script: str | Path, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "scripts" / script), *args]
        return subprocess.run(
            command, cwd=tmp_path, env=base | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
        )

    return _run


def processes(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the command of each line of a dry run."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "env"
        told = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            told[name] = value
        found.append((told, words))
    return found


def expected(rank: int, *, local_rank: int, per_node: int, node_rank: int = 0, nodes: int = 1, host: str = "127.0.0.1", port: str) -> dict:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(per_node * nodes),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(node_rank),
        "NODE_RANK": str(node_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "DMS_LAUNCHED": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // per_node)),
        "DS_ACCELERATOR": "cpu",
    }


def retrofit(*args: str) -> list[str]:
    return ["-m", "dms_train.cli", "retrofit", *args]


@pytest.mark.parametrize("order", ["before", "after"])
def test_launch_node_dry_run(run_script, order):
    options, words = ["--gpus", "2", "--dry-run"], ["tiny/retrofit", "output_dir=a run", "target_cr=8"]
    done = run_script("launch_node.sh", *(options + words if order == "before" else words + options))
    assert done.returncode == 0, done.stderr
    found = processes(done.stdout)
    port = found[0][0]["MASTER_PORT"]
    assert [told for told, _ in found] == [expected(rank, local_rank=rank, per_node=2, port=port) for rank in range(2)]
    assert all(command[1:] == retrofit(*words) for _, command in found)
    assert Path(found[0][1][0]).name.startswith("python")


def test_what_is_set_stays_set(run_script):
    done = run_script("launch_node.sh", "--dry-run", "tiny/retrofit", OMP_NUM_THREADS="7", DS_ACCELERATOR="xpu")
    ((told, _),) = processes(done.stdout)
    assert (told["OMP_NUM_THREADS"], told["DS_ACCELERATOR"]) == ("7", "xpu")
    assert "no GPU seen: one process" in done.stderr


def test_with_gpus_there_is_a_process_for_each(run_script):
    found = processes(run_script("launch_node.sh", "--dry-run", "tiny/retrofit", CUDA_VISIBLE_DEVICES="4,5,6").stdout)
    assert [told["LOCAL_RANK"] for told, _ in found] == ["0", "1", "2"]
    assert "DS_ACCELERATOR" not in found[0][0]


def test_launch_multinode_dry_run(run_script):
    where = ["--nodes", "3", "--node-rank", "2", "--host", "head", "--port", "29500"]
    done = run_script("launch_multinode.sh", *where, "tiny/retrofit", "--gpus", "2", "--dry-run", "steps=3")
    assert done.returncode == 0, done.stderr
    found = processes(done.stdout)
    shape = dict(per_node=2, node_rank=2, nodes=3, host="head", port="29500")
    assert [told for told, _ in found] == [expected(4 + i, local_rank=i, **shape) for i in range(2)]
    assert all(command[1:] == retrofit("tiny/retrofit", "steps=3") for _, command in found)


def srun_command(*, nodes: str, host: str, port: str, cpus: str, words: list[str]) -> list[str]:
    return [
        *("env", "DMS_SKIP_SETUP=1", "srun", "--kill-on-bad-exit=0", "--wait=0", f"--cpus-per-task={cpus}"),
        *("bash", "-c", 'exec "$0" "$@" --node-rank "$SLURM_NODEID"', str(ROOT / "scripts" / "launch_multinode.sh"), words[0]),
        *("--nodes", nodes, "--host", host, "--port", port, "resume=auto", *words[1:]),
    ]


@pytest.mark.parametrize("order", ["before", "after"])
def test_slurm_dry_run_outside_slurm(run_script, order):
    words = ["tiny/retrofit", "output_dir=a 'run'", "save.at_cr=[2]"]
    done = run_script("slurm.sbatch", *(["--dry-run", *words] if order == "before" else [*words, "--dry-run"]))
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == srun_command(nodes="2", host="FIRST_HOST", port="10000", cpus="64", words=words)


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol, the script where SLURM puts it, and the variables of a job."""
    tools, spool = tmp_path / "bin", tmp_path / "spool" / "job12345"
    tools.mkdir()
    spool.mkdir(parents=True)
    shutil.copy(SBATCH, spool / "slurm_script")
    # As on the second node: drops its own options, and has the launcher print what it would start.
    srun = 'while [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=1 "$@" --dry-run --gpus 2 || exit\nexit "${SRUN_CODE:-0}"'
    scontrol = f'if [[ "$1" == show ]]; then printf "n7\\nn8\\n"; else echo "$*" >> "{tmp_path}/requeued"; fi'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    env = {
        "PATH": f"{tools}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    return spool / "slurm_script", env


def test_slurm_dry_run_in_a_job(run_script, slurm):
    script, env = slurm
    done = run_script(script, "--dry-run", "tiny/retrofit", **env)
    assert shlex.split(done.stdout) == srun_command(nodes="2", host="n7", port="14690", cpus="16", words=["tiny/retrofit"])


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("75", True), ("137", False)])
def test_a_slurm_job_that_stopped_after_saving_queues_itself_again(run_script, slurm, tmp_path, code, requeued):
    script, env = slurm
    done = run_script(script, "tiny/retrofit", "steps=3", **env, SRUN_CODE=code)
    assert done.returncode == int(code), done.stderr
    shape = dict(per_node=2, node_rank=1, nodes=2, host="n7", port="14690")
    found = processes(done.stdout)
    assert [told for told, _ in found] == [expected(2 + i, local_rank=i, **shape) for i in range(2)]
    assert found[0][1][1:] == retrofit("tiny/retrofit", "resume=auto", "steps=3")
    record = tmp_path / "requeued"
    assert (record.read_text() if record.exists() else "") == ("requeue 12345\n" if requeued else "")


def test_slurm_reads_the_directives():
    """SLURM stops looking for them at the first command."""
    text = SBATCH.read_text()
    head = text[: text.index("set -euo")]
    assert text.count("\n#SBATCH ") == head.count("\n#SBATCH ")
    for directive in ("--requeue", "--open-mode=append", "--signal=USR1@120", "--ntasks-per-node=1"):
        assert f"\n#SBATCH {directive}\n" in head


@pytest.mark.parametrize("script", ["launch_node.sh", "launch_multinode.sh", "slurm.sbatch"])
@pytest.mark.parametrize("args", [(), ("tiny/retrofit", "--gpuss", "2"), ("--dry-run",), ("--help",)])
def test_a_wrong_call_prints_the_usage(run_script, script, args):
    done = run_script(script, *args)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("usage: ") and f"scripts/{script}" in done.stderr


def test_a_slurm_script_outside_slurm_says_what_to_do(run_script):
    done = run_script("slurm.sbatch", "tiny/retrofit")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_the_slurm_script_is_executable_and_parses():
    assert os.access(SBATCH, os.X_OK)
    subprocess.run(["bash", "-n", SBATCH], check=True)
