"""`python -m dms_train.launch RECIPE`: one `dms retrofit` process for each device of this node; they stop, fail and end together.

Not torchrun: its one shutdown timeout serves both preemption (workers need a step and a save) and failure (which must end fast), it dies of
the signal that it forwards, and its nodes do not learn of each other's failures.
"""

import argparse
import contextlib
import itertools
import math
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from dms.console import replace_unprintable
from dms.errors import describe
from dms.requirements import require
from dms_train.environment import RETROFIT_NEEDS
from dms_train.rendezvous import Board, BoardTimes
from dms_train.stopping import INTERRUPTED_CODE, STOPPED_CODE
from dms_train.workers import DRAIN_SECONDS, Layout, Worker, emit, environment, say


def worker_command(recipe: str, overrides: list[str]) -> list[str]:
    """What each process runs; its rank comes by its environment."""
    return [sys.executable, "-m", "dms_train.cli", "retrofit", recipe, *overrides]


# Of a process that finished, or saved before it stopped.
_GOOD_CODES = {0, STOPPED_CODE, INTERRUPTED_CODE}


class Supervisor:
    """Supervises the processes of this node until the end of the job."""

    def __init__(self, workers: list[Worker], events: queue.SimpleQueue, board: Board | None, grace: float):
        self.workers, self.events, self.board, self.grace = workers, events, board, max(1.0, grace)
        self.received: set[signal.Signals] = set()
        self.reported: set[str] = set()
        """Reasons of failures of other nodes that were printed."""
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
                self.kill(f"not ended within {self.grace:g} s", INTERRUPTED_CODE)
        return code

    def outcome(self) -> int | None:
        """The launcher's exit code, None while the job goes on."""
        if self.living or self.code is not None:
            return None if self.living else self.code
        codes = {worker.process.returncode for worker in self.workers}
        if codes - _GOOD_CODES:
            return None  # its event is on the way
        if self.board is None:
            return max(codes)
        if self.board.status.state == "running":
            self.board.publish(state="done", code=max(codes))
        return self.board.code_of_all()

    def signalled(self, number: signal.Signals) -> None:
        ends = {signal.SIGTERM, signal.SIGINT}
        if number in ends and self.received & ends:
            self.kill(f"a second signal, {number.name}", 128 + number)
        elif number not in self.received:
            self.received.add(number)
            # No deadline: workers finish a step and save, however long that takes.
            again = "; Ctrl-C again kills them" if number == signal.SIGINT else ""
            say(f"received {number.name}, forwarded to {len(self.living)} processes{again}")
            self.send(number)

    def worker_ended(self, worker: Worker) -> None:
        code = worker.process.returncode
        if code in _GOOD_CODES or worker.killed:
            return
        reason = f"rank {worker.rank} on {socket.gethostname()} {worker.ending}"
        if signal.SIGINT in self.received:
            # It ended before its handlers were in place, or because a peer did. Processes that wait for it would wait in vain.
            self.fail(f"{reason} after SIGINT", INTERRUPTED_CODE)
            self.deadline = min(self.deadline, time.monotonic() + self.grace)
        elif self.code is not None:
            say(f"rank {worker.rank} {worker.ending} after {worker.seconds:.1f} s as well")
        elif -code in self.received:
            # Stopped before its handlers were in place, such as during imports: what was saved earlier is valid, so 75 asks for a restart.
            worker.report()
            self.fail(f"{reason} before it could save", STOPPED_CODE)
            self.end_others()
        else:
            worker.report()
            self.fail(reason, code if code > 0 else 128 - code)
            self.end_others()

    def other_node_failed(self, reason: str, code: int) -> None:
        if reason in self.reported:
            return
        self.reported.add(reason)
        say(reason)
        if self.code is None:
            self.code = code
            if self.board:
                self.board.publish(heard=True)
            self.end_others()

    def fail(self, reason: str, code: int) -> None:
        """Set the exit code and tell the other nodes; only the first failure counts."""
        if self.code is None:
            self.code = code
            if self.board:
                self.board.publish(state="failed", code=code, reason=reason)

    def end_others(self) -> None:
        """Have them print their stacks and give them time to fail by themselves, as most do whose peer is gone. SIGTERM would make them save."""
        if self.living:
            say(f"ending the other processes of this node ({len(self.living)}); each prints its stack")
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


def launch(layout: Layout, command: list[str], grace: float, times: BoardTimes) -> int:
    """Run the command once for each device of this node -> the exit code: 0, 75 (stopped after saving), 130 (Ctrl-C), or that of the first
    failure.

    Raises:
        RuntimeError: not all nodes came.
        OSError: a process could not be started.
    """
    # Default handling: the wait for other nodes happens in C++, where Python's handler would not run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    board = Board(layout, times) if layout.nodes > 1 else None
    events: queue.SimpleQueue = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, _: events.put(signal.Signals(received)))
    # All from this thread, which lives as long as the launcher: the kernel kills the workers when the thread that forked them ends.
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
    """GPUs that a process would see; without torch, whose import takes seconds."""
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
    parser = Parser(prog="python -m dms_train.launch", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
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


def main(
    argv: list[str] | None = None,
    *,
    command_of: Callable[[str, list[str]], list[str]] = worker_command,
    times: BoardTimes | None = None,
) -> int:
    """The exit code; bad input is one line on stderr and 2, before any process starts. command_of, times: replaced in tests."""
    replace_unprintable()
    try:
        args = parse(argv)
        layout = layout_of(args)
        # The recipe is checked here, without torch: a mistake is reported once and immediately.
        from dms_train.recipe import RetrofitRecipe
        from dms_train.recipe_file import load_recipe

        load_recipe(args.recipe, args.overrides, RetrofitRecipe)
    except (ValueError, OSError) as error:
        emit(2, f"dms: error: {describe(error)}\n".encode(errors="replace"))
        return 2
    command = command_of(args.recipe, args.overrides)
    if args.dry_run:
        for local_rank in range(layout.processes):
            print(shlex.join(["env", *(f"{name}={value}" for name, value in environment(layout, local_rank).items()), *command]))
        return 0
    try:
        require("dms retrofit", *RETROFIT_NEEDS)
        return launch(layout, command, args.grace, times or BoardTimes())
    except (RuntimeError, OSError) as error:
        emit(2, f"dms: failed: {describe(error)}\n".encode(errors="replace"))
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED_CODE)
