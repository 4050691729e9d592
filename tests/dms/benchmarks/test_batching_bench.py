"""`dms bench batching`, small: both ways make the same continuations, of the lengths that were asked for."""

import functools

from dms.benchmarks import batching


def test_both_ways_say_the_same(capsys, monkeypatch):
    lengths = []

    def noting(own, *args):
        out = own(*args)
        lengths.append(([len(new) for new in out], args[3]))
        return out

    for name in ("_in_batches", "_continuously"):
        monkeypatch.setattr(batching, name, functools.partial(noting, getattr(batching, name)))
    figures = batching.run(
        batching.BatchingBenchmark(num_prompts=5, batch_size=2, prompt_tokens=(2, 40), new_tokens=(1, 9), window=8, repeats=1)
    )
    assert [(one.mode, one.same_tokens) for one in figures] == [("dense", 1.0), ("evict", 1.0)]
    assert len(lengths) == 4 and all(found == wanted and len(set(wanted)) > 2 for found, wanted in lengths)
    out = capsys.readouterr().out
    assert "builtin:tiny, 5 prompts of 2-40 tokens" in out and "belongs to sequences that have ended" in out
