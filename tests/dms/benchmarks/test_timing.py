"""The timer of benchmarks: whose turn it is, and whose seconds are whose."""

import time

import pytest
import torch

from dms.benchmarks.timing import seconds_in_turns

CPU = torch.device("cpu")


@pytest.mark.parametrize("first", [0, 1, 5])
def test_each_has_its_own_seconds_whoever_begins(first, monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(place):
        order.append(place)
        now[0] += 10.0**place

    assert seconds_in_turns([lambda place=place: work(place) for place in range(3)], CPU, first=first) == [1.0, 10.0, 100.0]
    assert order == [(first + place) % 3 for place in range(3)]
