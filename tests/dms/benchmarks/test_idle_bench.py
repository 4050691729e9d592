"""`dms bench idle`, small."""

import pytest

from dms.benchmarks.idle import run


def test_idle_conversations_leave_and_come_back(capsys):
    found = run(200, conversations=4, on_device=2, quick=True, window="32")
    assert [one.place for one in found] == ["cpu", "disk"]
    for one in found:
        assert one.is_same and one.most_held <= one.max_bytes < one.unbounded and one.away > 0
        assert one.leave_seconds > 0 and one.prefill_seconds > 0
    said = capsys.readouterr().out
    assert "same" in said and "DIFFER" not in said


@pytest.mark.parametrize("on_device", [0, 4])
def test_a_bound_that_allows_all_or_none_is_refused(on_device):
    with pytest.raises(ValueError, match="give a number from 1 to 3"):
        run(200, conversations=4, on_device=on_device, quick=True)
