"""`dms bench prefixes`, small."""

from dms.benchmarks.prefixes import run


def test_a_file_is_smaller_than_a_dense_cache(capsys):
    short, long = run([400, 200], quick=True, window="32")
    assert (short.context, long.context) == (200, 400)
    assert long.cr > 2 and long.num_bytes < long.dense_bytes and min(long.get_seconds, long.put_seconds, long.prefill_seconds) > 0
    assert "times quicker" in capsys.readouterr().out
