"""Nodes that share a job: how their launchers hear of each other's failures and ends."""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator

from dms_train.workers import Layout

# How often each launcher says that it lives, the silence after which it counts as gone, how long all may take to come together,
# and how long node 0 keeps the board up for those that have not read the end yet.
BEAT_SECONDS = 2.0
LOST_SECONDS = 20.0
JOIN_SECONDS = 600.0
LINGER_SECONDS = 5.0


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
