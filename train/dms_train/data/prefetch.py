"""Data made ahead: an iterator in a thread, and the processes of a node that share one reader."""

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

_POLL_SECONDS = 0.2
_CLOSE_SECONDS = 5.0


class Ahead:
    """A thread that runs an iterator a bounded number of items ahead of who reads it."""

    def __init__(self, items: Iterator[Any], ahead: int):
        self.items, self.stopped = items, threading.Event()
        self.queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
        self.thread = threading.Thread(target=self._run, name="data", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for item in self.items:
                self._put((item, None))
                if self.stopped.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - it is raised where the item is asked for
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> None:
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        return None

    def close(self) -> None:
        """End the thread; what it had made is lost. Whoever waits for an item gets StopIteration.

        A thread that is still making an item is abandoned after a few seconds: it is a daemon, and a run that has to stop may not
        have longer.
        """
        self.stopped.set()
        self.thread.join(_CLOSE_SECONDS)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not self.stopped.is_set():
            try:
                item, error = self.queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return item
        raise StopIteration


@dataclass(frozen=True)
class Node:
    """The processes of this machine, of which the first reads the data for all."""

    rank: int = 0
    """Of this process among them."""
    group: Any = None
    """Their process group; None for one process alone."""
    data_groups: list[int] = field(default_factory=lambda: [0])
    """By rank: the group of ranks that it belongs to. Ranks of one group train on the same sequences."""

    @property
    def reads(self) -> bool:
        return self.rank == 0


def join_node(data_group: int, timeout: timedelta) -> Node:
    """Find the processes of this machine. All processes call it together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return Node(data_groups=[data_group])
    # Under a launcher that does not set it each process reads for itself.
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here, mine = torch.distributed.get_rank() // size, None
    for node in range(torch.distributed.get_world_size() // size):
        made = torch.distributed.new_group(list(range(node * size, (node + 1) * size)), timeout=timeout, backend="gloo")
        mine = made if node == here else mine
    if size == 1:
        return Node(data_groups=[data_group])
    data_groups = [0] * size
    torch.distributed.all_gather_object(data_groups, data_group, group=mine)
    return Node(torch.distributed.get_rank() % size, mine, data_groups)
