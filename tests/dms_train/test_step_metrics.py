"""Results of a step that processes add up in one tensor."""

import pytest
import torch
from dms_train.step import StepOutput
from dms_train.step_metrics import StepSums


def output(kl, compression, evicted, decided, rate_LH, class_rate_LHK=None):
    numbers = (torch.tensor(float(x)) for x in (0.0, kl, compression, evicted, decided))
    classes = None if class_rate_LHK is None else torch.tensor(class_rate_LHK)
    return StepOutput(*numbers, head_rate_LH=torch.tensor(rate_LH), class_rate_LHK=classes)


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("stopping", [None, 0, 2])
def test_what_processes_pack_is_read_back_by_name(num_processes, stopping):
    """All-reduce is a sum; ranks here are objects of one process."""
    ranks = [StepSums(rank=rank, num_processes=num_processes, num_micro_batches=2, device="cpu") for rank in range(num_processes)]
    for rank, sums in enumerate(ranks):
        sums.add(output(1 + rank, 0.25, 10, 100, [[0.0, 0.5]]))
        sums.add(output(2 + rank, 0.5, 20, 100, [[0.5, 1.0]]))
    # 24 bits of a mark pass exactly.
    marks = [2**24 - 1 - rank for rank in range(num_processes)]
    packed = [sums.pack(stops=rank == stopping, waited=0.5 * rank, plan_mark=marks[rank]) for rank, sums in enumerate(ranks)]
    summed = torch.stack(packed).sum(0)
    found = [sums.unpack(summed) for sums in ranks]
    for totals in found:
        assert totals.kl == sum(3 + 2 * rank for rank in range(num_processes))
        assert (totals.compression, totals.evicted, totals.decided) == (0.75 * num_processes, 30 * num_processes, 200 * num_processes)
        assert totals.stops == (stopping is not None and stopping < num_processes)
        assert totals.waited == [0.5 * rank for rank in range(num_processes)]
        assert totals.plan_marks == marks
        assert totals.head_rate_LH.tolist() == [[0.25, 0.75]] and totals.class_rate_LHK is None


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rates_of_several_windows_go_along(num_processes):
    ranks = [StepSums(rank=rank, num_processes=num_processes, num_micro_batches=2, device="cpu") for rank in range(num_processes)]
    for rank, sums in enumerate(ranks):
        sums.add(output(1, 0, 10, 100, [[0.0, 0.5]], [[[0.0, 0.0], [0.25, 0.25]]]))
        sums.add(output(1, 0, 20, 100, [[1.0, 0.5 + 0.25 * rank]], [[[0.5, 0.5], [0.25, 0.25 + 0.25 * rank]]]))
    summed = torch.stack([sums.pack(stops=False, waited=0.0, plan_mark=1) for sums in ranks]).sum(0)
    more = 0.0 if num_processes == 1 else 0.0625
    for sums in ranks:
        totals = sums.unpack(summed)
        assert totals.head_rate_LH.tolist() == [[0.5, 0.5 + more]] and totals.plan_marks == [1] * num_processes
        assert totals.class_rate_LHK.tolist() == [[[0.25, 0.25], [0.25, 0.25 + more]]]


def test_sums_are_those_of_one_tensor_of_float32():
    """The order of additions is the loop's, so that a run's numbers do not depend on how they are packed."""
    torch.manual_seed(0)
    sums, expected = StepSums(rank=0, num_processes=1, num_micro_batches=5, device="cpu"), torch.zeros(4)
    for _ in range(5):
        made = output(*torch.rand(4).tolist(), torch.rand(3, 2).tolist())
        expected += torch.stack([made.kl, made.compression, made.evicted, made.decided])
        sums.add(made)
    totals = sums.unpack(sums.pack(stops=False, waited=0.0, plan_mark=0))
    assert [totals.kl, totals.compression, totals.evicted, totals.decided] == expected.tolist()
