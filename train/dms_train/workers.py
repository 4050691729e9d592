"""The processes of one node: how each is started, the environment that it gets, and its output."""

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# How long the rest of a process's output is waited for after its end.
DRAIN_SECONDS = 2.0
# Of a process that failed, so many lines of its stderr are repeated.
TAIL_LINES = 30
# Bytes; a longer line is passed on in pieces.
MAX_LINE = 1 << 16

_printing = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which processes this node runs, and where all processes of the job connect."""

    processes: int
    """On this node, and on each other one."""
    nodes: int
    node_rank: int
    host: str
    """Node 0."""
    port: int
    """Of rank 0; the launchers use the next one."""
    has_gpu: bool


def environment(layout: Layout, local_rank: int) -> dict[str, str]:
    """Variables that a process gets besides those it inherits, by torchrun's names."""
    variables: dict[str, int | str] = {
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
    # Else each process takes a thread for every core, and they compete for them.
    defaults: dict[str, int | str] = {"OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // layout.processes)}
    if not layout.has_gpu:
        defaults["DS_ACCELERATOR"] = "cpu"
    variables |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return {name: str(value) for name, value in variables.items()}


def emit(fd: int, data: bytes) -> None:
    """Write whole lines, so that those of different processes do not mix. A closed pipe is ignored: it must not stop the training."""
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
    """To be called in a child between fork and exec: the kernel kills it when the launcher ends, however that happens."""
    # Loaded here because nothing may be imported between fork and exec.
    prctl, set_pdeathsig, launcher = ctypes.CDLL(None).prctl, 1, os.getpid()
    number, zero = ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0)

    def in_child() -> None:
        prctl(set_pdeathsig, number, zero, zero, zero)
        if os.getppid() != launcher:  # it ended before prctl took effect
            os._exit(1)

    return in_child


class Worker:
    """One process of this node, in a session of its own: Ctrl-C in the terminal reaches it through the launcher alone."""

    def __init__(self, command: list[str], variables: dict[str, str]):
        """variables: of `environment`."""
        self.rank, self.local_rank = int(variables["RANK"]), int(variables["LOCAL_RANK"])
        self.tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.start, self.seconds, self.killed = time.monotonic(), 0.0, False
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
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
        """With the processes that it started, such as data loaders."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def report(self) -> None:
        """Print how it ended, and the end of its stderr."""
        place = f"local rank {self.local_rank}, host {socket.gethostname()}, pid {self.process.pid}"
        self.drain(time.monotonic() + DRAIN_SECONDS)
        lines = list(self.tail)
        last = f"; the last lines of its stderr ({len(lines)}):" if lines else "; its stderr is empty"
        say(f"rank {self.rank} ({place}) {self.ending} after {self.seconds:.1f} s{last}")
        emit(2, b"".join(b"    " + line + b"\n" for line in lines))
