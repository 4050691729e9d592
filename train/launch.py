"""`python -m dms.train.launch RECIPE`: one `dms retrofit` process for each device of this node; they stop, fail and end together.

Not torchrun: its one shutdown timeout serves both preemption (workers need a step and a save) and failure (which must end fast), it dies by
the signal that it forwards, and its nodes do not hear of each other's failures.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# EX_TEMPFAIL: how a worker ends that was told to stop and has saved; started again, it goes on.
STOPPED = 75

# Between launchers: how often each says that it lives, the silence after which it counts as gone, how long all may take to come together,
# and how long node 0 keeps the board up for those that have not read the end yet.
BEAT_SECONDS = 2.0
LOST_SECONDS = 20.0
JOIN_SECONDS = 600.0
LINGER_SECONDS = 5.0

DRAIN_SECONDS = 2.0
TAIL_LINES = 30
MAX_LINE = 1 << 16
"""Bytes; a longer line is passed on in pieces."""

_printing = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which processes this node runs, and where all meet."""

    processes: int
    """Of this node, and of each other one."""
    nodes: int
    node_rank: int
    host: str
    """Node 0."""
    port: int
    """Rank 0's; the launchers talk over the next one."""
    has_gpu: bool


def worker_command(recipe: str, overrides: list[str]) -> list[str]:
    """What each process runs; who it is stands in its environment."""
    return [sys.executable, "-m", "dms.train.cli", "retrofit", recipe, *overrides]


def environment(layout: Layout, local_rank: int) -> dict[str, str]:
    """What a process is told besides what it inherits, by torchrun's names."""
    told = {
        "RANK": layout.node_rank * layout.processes + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": layout.nodes * layout.processes,
        "LOCAL_WORLD_SIZE": layout.processes,
        "GROUP_RANK": layout.node_rank,
        "NODE_RANK": layout.node_rank,
        "MASTER_ADDR": layout.host,
        "MASTER_PORT": layout.port,
        "DMS_LAUNCHED": 1,
    }
    if not layout.has_gpu:
        # Else each process takes a thread for every core, and they fight for them.
        threads = max(1, len(os.sched_getaffinity(0)) // layout.processes)
        defaults = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}
        told |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return {name: str(value) for name, value in told.items()}


def emit(fd: int, data: bytes) -> None:
    """Write whole lines, so that those of different processes do not mix; a reader that went away must not stop the training."""
    with _printing, contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]


def say(text: str) -> None:
    emit(2, f"dms launch: {text}\n".encode(errors="replace"))


def pass_on(source: int, sink: int, prefix: bytes, tail: deque[bytes]) -> None:
    """Copy a pipe line by line, as bytes, until its last writer is gone."""
    rest = b""
    while chunk := os.read(source, MAX_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) >= MAX_LINE:
            lines, rest = [*lines, rest], b""
        tail.extend(lines)
        emit(sink, b"".join(prefix + line + b"\n" for line in lines))
    if rest:
        tail.append(rest)
        emit(sink, prefix + rest + b"\n")


def die_with_launcher() -> Callable[[], None]:
    """For a child between fork and exec: have the kernel kill it when the launcher ends, however that ends."""
    # Loaded here because nothing may be imported between fork and exec.
    prctl, set_pdeathsig, launcher = ctypes.CDLL(None).prctl, 1, os.getpid()
    number, zero = ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0)

    def in_child() -> None:
        prctl(set_pdeathsig, number, zero, zero, zero)
        if os.getppid() != launcher:  # it ended before the kernel was told
            os._exit(1)

    return in_child


class Worker:
    """One process of this node, in a session of its own: Ctrl-C in the terminal reaches it through the launcher alone."""

    def __init__(self, command: list[str], told: dict[str, str]):
        self.rank, self.local_rank = int(told["RANK"]), int(told["LOCAL_RANK"])
        self.tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.start, self.seconds, self.killed = time.monotonic(), 0.0, False
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **told},
            stdin=subprocess.DEVNULL,
            # Rank 0 draws its progress bar on the launcher's own terminal.
            stdout=None if self.rank == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=die_with_launcher(),
        )

    def watch(self, events: queue.SimpleQueue) -> None:
        """Pass its output on, and put the worker among the events when it has ended."""
        prefix = f"[rank {self.rank}] ".encode() if self.rank else b""
        pipes = [(self.process.stdout, 1, deque(maxlen=0)), (self.process.stderr, 2, self.tail)]
        self.pumps = [
            threading.Thread(target=pass_on, args=(pipe.fileno(), sink, prefix, tail), daemon=True) for pipe, sink, tail in pipes if pipe
        ]

        def wait() -> None:
            self.process.wait()
            self.seconds = time.monotonic() - self.start
            events.put(self)

        for thread in (*self.pumps, threading.Thread(target=wait, daemon=True)):
            thread.start()

    def drain(self, deadline: float) -> None:
        """Wait for the rest of its output, but not for a child that outlives it and holds the pipes open."""
        for pump in self.pumps:
            pump.join(max(0.0, deadline - time.monotonic()))

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def ending(self) -> str:
        code = self.process.returncode
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-code, 'signal')} ({-code})" if code < 0 else f"exited with code {code}"

    def kill(self) -> None:
        """With all that it started, such as its data loaders."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def report(self) -> None:
        place = f"local rank {self.local_rank}, host {socket.gethostname()}, pid {self.process.pid}"
        self.drain(time.monotonic() + DRAIN_SECONDS)
        lines = list(self.tail)
        last = f"; the last lines of its stderr ({len(lines)}):" if lines else "; its stderr is empty"
        say(f"rank {self.rank} ({place}) {self.ending} after {self.seconds:.1f} s{last}")
        emit(2, b"".join(b"    " + line + b"\n" for line in lines))


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """For the import of torch, which reads the level of its C++ log then."""
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class Board:
    """What each launcher says of itself, in a store that node 0 hosts: one line for each node, rewritten at every beat."""

    def __init__(self, layout: Layout):
        from datetime import timedelta

        # A store that is gone is told below in a line; torch would add a C++ stack. The workers inherit nothing of it.
        with quiet_torch():
            from torch.distributed import TCPStore

        self.rank, self.nodes, self.where = layout.node_rank, range(layout.nodes), f"{layout.host}:{layout.port + 1}"
        self.line = {"state": "running", "code": 0, "reason": "", "heard": False, "processes": layout.processes}
        self.cut, self.closing, self.wake = False, threading.Event(), threading.Event()
        try:
            timeout = timedelta(seconds=JOIN_SECONDS)
            self.store = TCPStore(layout.host, layout.port + 1, is_master=self.rank == 0, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            what = "cannot be opened here" if self.rank == 0 else f"was not opened by node 0 within {JOIN_SECONDS:g} s"
            raise RuntimeError(f"the launchers' port {self.where} {what}: {str(error).splitlines()[0]}") from None
        self._join()
        self.store.set_timeout(timedelta(seconds=LOST_SECONDS))
        self.texts, self.seen = [b""] * layout.nodes, [time.monotonic()] * layout.nodes
        self._round(0)
        self.thread = threading.Thread(target=self._keep, daemon=True)
        self.thread.start()
        if odd := [rank for rank in self.nodes if self.of(rank)["processes"] != layout.processes]:
            self.close()
            theirs = self.of(odd[0])["processes"]
            raise RuntimeError(f"node {self.rank} has {layout.processes} processes and node {odd[0]} {theirs}; give all the same --gpus")

    def _join(self) -> None:
        deadline, missing = time.monotonic() + JOIN_SECONDS, [0]
        try:
            self.store.set(f"node/{self.rank}", json.dumps(self.line))
            while missing := [rank for rank in self.nodes if not self.store.check([f"node/{rank}"])]:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.2)
        except (RuntimeError, TimeoutError) as error:
            who = f"node {' and node '.join(map(str, missing))}"
            gone = "" if isinstance(error, TimeoutError) else "; node 0 has given up"
            raise RuntimeError(f"{who} did not join at {self.where} within {JOIN_SECONDS:g} s{gone}") from None

    def _round(self, beat: int) -> None:
        self.store.set(f"node/{self.rank}", json.dumps({**self.line, "beat": beat}))
        for rank, text in enumerate(self.store.multi_get([f"node/{rank}" for rank in self.nodes])):
            # The nodes' clocks differ, so a beat is dated by when this node sees it.
            if text != self.texts[rank]:
                self.texts[rank], self.seen[rank] = text, time.monotonic()

    def _keep(self) -> None:
        for beat in itertools.count(1):
            last = self.closing.is_set()
            try:
                self._round(beat)
            except RuntimeError:
                self.cut = True
                return
            if last:
                return
            self.wake.wait(BEAT_SECONDS)
            self.wake.clear()

    def of(self, rank: int) -> dict:
        return json.loads(self.texts[rank])

    def publish(self, **changes) -> None:
        self.line = {**self.line, **changes}
        self.wake.set()

    def failures(self) -> list[tuple[str, int]]:
        """Other nodes that failed or fell silent: what to say, and the exit code."""
        if self.cut:
            # Once this node has failed or heard of a failure, node 0 may leave.
            expected = self.line["heard"] or self.line["state"] == "failed"
            return [] if expected else [(f"node 0 is gone: its launcher at {self.where} no longer answers", 1)]
        found = []
        for rank in (rank for rank in self.nodes if rank != self.rank):
            line = self.of(rank)
            if line["state"] == "failed":
                found.append((f"node {rank} failed: {line['reason']}", line["code"]))
            elif line["state"] == "running" and not line["heard"] and time.monotonic() - self.seen[rank] > LOST_SECONDS:
                found.append((f"node {rank} is gone: not heard of for {LOST_SECONDS:g} s", 1))
        return found

    def code_of_all(self) -> int | None:
        """0 or 75 once every node has ended well, else None."""
        lines = [self.of(rank) for rank in self.nodes]
        return max(line["code"] for line in lines) if all(line["state"] == "done" for line in lines) else None

    def close(self) -> None:
        """Leave; node 0, whose end takes the board away, when the others have read how it went."""
        self.publish(heard=True)
        deadline = time.monotonic() + LINGER_SECONDS
        while self.rank == 0 and time.monotonic() < deadline and not all(self.of(rank)["heard"] for rank in self.nodes):
            self.wake.set()
            time.sleep(0.1)
        self.closing.set()
        self.wake.set()
        self.thread.join(LINGER_SECONDS)


class Supervisor:
    """Sees the processes of this node through to the end of the job."""

    def __init__(self, workers: list[Worker], events: queue.SimpleQueue, board: Board | None, grace: float):
        self.workers, self.events, self.board, self.grace = workers, events, board, max(1.0, grace)
        self.received: set[signal.Signals] = set()
        self.told: set[str] = set()
        self.code: int | None = None
        """Of a job that failed; None while it goes well."""
        self.deadline = math.inf
        """When those that still live are killed."""

    @property
    def living(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive]

    def run(self) -> int:
        while (code := self.outcome()) is None:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=min(0.5, max(0.0, self.deadline - time.monotonic())))
                self.worker_ended(event) if isinstance(event, Worker) else self.signalled(event)
            for failure in self.board.failures() if self.board else ():
                self.other_node_failed(*failure)
            if time.monotonic() >= self.deadline:
                self.kill(f"not ended within {self.grace:g} s", 128 + signal.SIGINT)
        return code

    def outcome(self) -> int | None:
        """The launcher's exit code, None while the job goes on."""
        if self.living or self.code is not None:
            return None if self.living else self.code
        codes = {worker.process.returncode for worker in self.workers}
        if codes - {0, STOPPED}:
            return None  # the event that tells of it is on its way
        if self.board is None:
            return max(codes)
        if self.board.line["state"] == "running":
            self.board.publish(state="done", code=max(codes))
        return self.board.code_of_all()

    def signalled(self, number: signal.Signals) -> None:
        ends = {signal.SIGTERM, signal.SIGINT}
        if number in ends and self.received & ends:
            self.kill(f"a second signal, {number.name}", 128 + number)
        elif number not in self.received:
            self.received.add(number)
            say(f"received {number.name}, forwarded to {len(self.living)} processes")
            self.send(number)
            if number == signal.SIGINT:
                # TERM and USR1 wait for a step and a save, however long they take; this stops without saving.
                self.deadline = min(self.deadline, time.monotonic() + self.grace)

    def worker_ended(self, worker: Worker) -> None:
        code = worker.process.returncode
        if code in (0, STOPPED) or worker.killed:
            return
        reason = f"rank {worker.rank} on {socket.gethostname()} {worker.ending}"
        if signal.SIGINT in self.received:
            self.fail(f"{reason} after SIGINT", 128 + signal.SIGINT)
        elif self.code is not None:
            say(f"rank {worker.rank} {worker.ending} after {worker.seconds:.1f} s as well")
        elif -code in self.received:
            # Told to stop before it could listen, such as while it imported: what was saved earlier stands, so go on from there.
            worker.report()
            self.fail(f"{reason} before it could save", STOPPED)
            self.end_others()
        else:
            worker.report()
            self.fail(reason, code if code > 0 else 128 - code)
            self.end_others()

    def other_node_failed(self, reason: str, code: int) -> None:
        if reason in self.told:
            return
        self.told.add(reason)
        say(reason)
        if self.code is None:
            self.code = code
            self.board.publish(heard=True)
            self.end_others()

    def fail(self, reason: str, code: int) -> None:
        """What the other nodes are told, and the exit code: those of the first failure."""
        if self.code is None:
            self.code = code
            if self.board:
                self.board.publish(state="failed", code=code, reason=reason)

    def end_others(self) -> None:
        """Let them show where they stand and fail by themselves, as most do whose peer is gone. SIGTERM would have them save."""
        if self.living:
            say(f"ending the other processes of this node ({len(self.living)}); each shows where it stands")
            self.send(signal.SIGUSR2)
            self.deadline = min(self.deadline, time.monotonic() + self.grace)

    def send(self, number: signal.Signals) -> None:
        for worker in self.living:
            worker.process.send_signal(number)

    def kill(self, why: str, code: int) -> None:
        """code: the launcher's, unless a failure came before."""
        self.fail(why, code)
        self.deadline = math.inf
        if living := self.living:
            say(f"{why}: killing rank {', '.join(str(worker.rank) for worker in living)}")
        for worker in living:
            worker.kill()


def launch(layout: Layout, command: list[str], grace: float) -> int:
    """Run the command once for each device of this node -> the exit code: 0, 75 (stopped after saving), or that of what failed.

    Raises:
        RuntimeError: the nodes did not come together.
        OSError: a process could not be started.
    """
    # So that Ctrl-C also ends the wait for the other nodes, which happens outside Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    board = Board(layout) if layout.nodes > 1 else None
    events: queue.SimpleQueue = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, _: events.put(signal.Signals(received)))
    # All from this thread, which lives as long as the launcher: the kernel's order to kill goes by the thread that forked.
    workers = [Worker(command, environment(layout, local_rank)) for local_rank in range(layout.processes)]
    for worker in workers:
        worker.watch(events)
    code = Supervisor(workers, events, board, grace).run()
    deadline = time.monotonic() + DRAIN_SECONDS
    for worker in workers:
        worker.drain(deadline)
    if board:
        board.close()
    return code


def count_gpus() -> int:
    """GPUs that a process would see, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA ignores all that follows an entry it cannot read.
        return len(list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, (entry.strip() for entry in visible.split(",")))))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help shows what there is)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m dms.train.launch", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="a path, or a packaged name such as tiny/retrofit")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, such as target_cr=8 dms.window=64")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes on this node; default: the GPUs seen, or 1 without any")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines in the job (default 1)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this is, from 0")
    parser.add_argument("--host", metavar="H", help="node 0, as the others reach it (default 127.0.0.1 on one node)")
    parser.add_argument("--port", type=int, metavar="P", help="a port of node 0, free like the next one (on one node: any free port)")
    parser.add_argument("--grace", type=float, default=15.0, metavar="SECONDS", help="from a failure to the end of the others (default 15)")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each process of this node and stop")
    return parser.parse_intermixed_args(argv)


def layout_of(args: argparse.Namespace) -> Layout:
    """Raises ValueError for options that do not go together."""
    seen = count_gpus()
    if args.gpus is not None and (args.gpus < 1 or 0 < seen < args.gpus):
        raise ValueError(f"--gpus is {args.gpus}; give 1 {f'to {seen}, the GPUs that are seen here' if seen else 'or more'}")
    if args.nodes < 1:
        raise ValueError(f"--nodes is {args.nodes}; give 1 or more")
    given = {"--node-rank": args.node_rank, "--host": args.host, "--port": args.port}
    if args.nodes > 1 and (missing := [name for name, value in given.items() if value is None]):
        raise ValueError(f"--nodes {args.nodes} needs {' and '.join(missing)}")
    if not 0 <= (args.node_rank or 0) < args.nodes:
        raise ValueError(f"--node-rank is {args.node_rank}; with --nodes {args.nodes} it is at least 0 and at most {args.nodes - 1}")
    if args.port is not None and not 1 <= args.port <= 65534:
        raise ValueError(f"--port is {args.port}; give 1 to 65534, the launchers use the next one")
    if not 0 <= args.grace < math.inf:
        raise ValueError(f"--grace is {args.grace}; give seconds, 0 or more")
    if args.gpus is None and not seen:
        say("no GPU seen: one process, on the CPU")
    return Layout(
        processes=args.gpus or seen or 1,
        nodes=args.nodes,
        node_rank=args.node_rank or 0,
        host=args.host or "127.0.0.1",
        port=args.port or free_port(),
        has_gpu=seen > 0,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: list[str] | None = None) -> int:
    """The exit code; bad input is one line on stderr and 2, before any process starts."""
    try:
        args = parse(argv)
        layout = layout_of(args)
        # Without torch, so that a mistake is told once and at once.
        from dms.train.recipe import RetrofitRecipe, load_recipe

        load_recipe(args.recipe, args.overrides, RetrofitRecipe)
    except (ValueError, OSError) as error:
        emit(2, f"dms: error: {error}\n".encode())
        return 2
    command = worker_command(args.recipe, args.overrides)
    if args.dry_run:
        for local_rank in range(layout.processes):
            print(shlex.join(["env", *(f"{name}={value}" for name, value in environment(layout, local_rank).items()), *command]))
        return 0
    try:
        return launch(layout, command, args.grace)
    except (RuntimeError, OSError) as error:
        emit(2, f"dms: failed: {error}\n".encode())
        return 1


if __name__ == "__main__":
    sys.exit(main())
