"""The processes of one machine, which share a reader."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch


@dataclass(frozen=True)
class Node:
    """The processes of this machine that share a reader. group: theirs, None for one alone. data_groups: whose rows each trains on."""

    rank: int = 0
    group: Any = None
    data_groups: list[int] = field(default_factory=lambda: [0])

    @property
    def reads(self) -> bool:
        return self.rank == 0


def join_node(data_group: int, timeout: timedelta) -> Node:
    """Find the processes of this machine. All processes call it together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return Node(data_groups=[data_group])
    # A launcher that says nothing of nodes: each process reads for itself.
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
