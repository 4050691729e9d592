"""Nodes that share a job: how their launchers learn of each other's failures and ends."""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dms_train.workers import Layout


@dataclass(frozen=True, kw_only=True)
class BoardTimes:
    """Seconds. Tests shorten them."""

    beat: float = 2.0
    """Between two signs of life of a launcher."""
    lost: float = 20.0
    """The silence after which a node counts as gone."""
    join: float = 600.0
    """Within which all nodes must have come."""
    linger: float = 5.0
    """How long node 0 keeps the board up for nodes that have not read the end yet."""


@dataclass(frozen=True)
class NodeStatus:
    """What a launcher writes of its node."""

    processes: int
    state: Literal["running", "done", "failed"] = "running"
    code: int = 0
    """Exit code, once it is not running."""
    reason: str = ""
    """Why it failed."""
    heard: bool = False
    """It knows how the job ended, and its silence means nothing."""
    beat: int = 0
    """Rises while it lives."""


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """For the import of torch, which is when it reads the level of its C++ log."""
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class Board:
    """Every node's status, in a store that node 0 hosts; each launcher rewrites its own at every beat."""

    def __init__(self, layout: Layout, times: BoardTimes):
        from datetime import timedelta

        # Of a lost store torch would log a C++ stack; it is reported in one line below. Workers do not inherit the setting.
        with quiet_torch():
            from torch.distributed import TCPStore

        self.rank, self.nodes, self.where = layout.node_rank, range(layout.nodes), f"{layout.host}:{layout.port + 1}"
        self.times, self.status = times, NodeStatus(processes=layout.processes)
        self.cut, self.closing, self.wake = False, threading.Event(), threading.Event()
        try:
            timeout = timedelta(seconds=times.join)
            self.store = TCPStore(layout.host, layout.port + 1, is_master=self.rank == 0, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            what = "cannot be opened here" if self.rank == 0 else f"was not opened by node 0 within {times.join:g} s"
            raise RuntimeError(f"the launchers' port {self.where} {what}: {str(error).splitlines()[0]}") from None
        self._join()
        self.store.set_timeout(timedelta(seconds=times.lost))
        self.texts, self.seen = [b""] * layout.nodes, [time.monotonic()] * layout.nodes
        self._round(0)
        self.thread = threading.Thread(target=self._keep, daemon=True)
        self.thread.start()
        if odd := [rank for rank in self.nodes if self.of(rank).processes != layout.processes]:
            self.close()
            theirs = self.of(odd[0]).processes
            raise RuntimeError(f"node {self.rank} has {layout.processes} processes and node {odd[0]} {theirs}; give all the same --gpus")

    def _join(self) -> None:
        deadline, missing = time.monotonic() + self.times.join, [0]
        try:
            self.store.set(f"node/{self.rank}", json.dumps(asdict(self.status)))
            while missing := [rank for rank in self.nodes if not self.store.check([f"node/{rank}"])]:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.2)
        except (RuntimeError, TimeoutError) as error:
            who = f"node {' and node '.join(map(str, missing))}"
            gone = "" if isinstance(error, TimeoutError) else "; node 0 has given up"
            raise RuntimeError(f"{who} did not join at {self.where} within {self.times.join:g} s{gone}") from None

    def _round(self, beat: int) -> None:
        self.store.set(f"node/{self.rank}", json.dumps(asdict(replace(self.status, beat=beat))))
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
            self.wake.wait(self.times.beat)
            self.wake.clear()

    def of(self, rank: int) -> NodeStatus:
        return NodeStatus(**json.loads(self.texts[rank]))

    def publish(self, **changes: Any) -> None:
        """Change fields of this node's status, and tell the others at once."""
        self.status = replace(self.status, **changes)
        self.wake.set()

    def failures(self) -> list[tuple[str, int]]:
        """Other nodes that failed or fell silent: (reason, exit code) of each."""
        if self.cut:
            # Once this node has failed or heard of a failure, node 0 may leave.
            expected = self.status.heard or self.status.state == "failed"
            return [] if expected else [(f"node 0 is gone: its launcher at {self.where} no longer answers", 1)]
        found = []
        for rank in (rank for rank in self.nodes if rank != self.rank):
            status = self.of(rank)
            if status.state == "failed":
                found.append((f"node {rank} failed: {status.reason}", status.code))
            elif status.state == "running" and not status.heard and time.monotonic() - self.seen[rank] > self.times.lost:
                found.append((f"node {rank} is gone: not heard of for {self.times.lost:g} s", 1))
        return found

    def code_of_all(self) -> int | None:
        """0 or 75 once every node has ended well, else None."""
        statuses = [self.of(rank) for rank in self.nodes]
        return max(status.code for status in statuses) if all(status.state == "done" for status in statuses) else None

    def close(self) -> None:
        """Leave. Node 0, whose end takes the board away, first waits until the others have read how the job ended."""
        self.publish(heard=True)
        deadline = time.monotonic() + self.times.linger
        while self.rank == 0 and time.monotonic() < deadline and not all(self.of(rank).heard for rank in self.nodes):
            self.wake.set()
            time.sleep(0.1)
        self.closing.set()
        self.wake.set()
        self.thread.join(self.times.linger)
