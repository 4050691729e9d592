"""The steps of a run: the same from any place, however many read ahead and whatever ranks there are; errors are raised where they belong."""

import json
import threading
from pathlib import Path

import pytest
import torch
from dms_train.data.loader import STATE_BYTES
from dms_train.data.settings import Data
from packed import compress, documents_of, texts

STEPS = 40


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b)


@pytest.fixture
def mixtures(jsonl, tmp_path):
    """Recipes of data: packed and padded, with a schedule, streaming, with dropped and cut documents."""
    import datasets

    rows = [{"text": text} for text in texts(500, 1, 3, 40)]
    (tmp_path / "hub").mkdir()
    for part in range(3):
        datasets.Dataset.from_list(rows[part::3]).to_parquet(tmp_path / "hub" / f"train-{part}.parquet")
    lines = str(jsonl("lines.jsonl", texts(700, 2, 1, 120)))
    long = str(jsonl("long.jsonl", texts(60, 3, 100, 400)))
    packed = {kind: str(compress(tmp_path / f"lines.jsonl.{kind}", Path(lines).read_bytes())) for kind in ("gz", "zst")}
    stream = {"source": "dataset", "path": str(tmp_path / "hub"), "streaming": True}
    return {
        "packed": {"source": "jsonl", "path": lines, "length": 128},
        "padded": {"source": "jsonl", "path": lines, "length": 128, "fill": "pad"},
        "dropped": {"source": "jsonl", "path": lines, "length": 128, "long_documents": "drop"},
        "streaming": {**stream, "length": 128},
        # Three blocks each, which come in order.
        "compressed": {"length": 128, "sources": [{"source": "jsonl", "path": path} for path in packed.values()]},
        # At step 20 one source ends and another begins.
        "schedule": {
            "length": 128,
            "sources": [
                {"source": "jsonl", "path": lines, "weight": [[19, 1], [20, 0]]},
                {"source": "jsonl", "path": long, "weight": [[19, 0], [20, 1]]},
                {**stream, "weight": 0.5},
                {"source": "builtin", "items": [2, 4], "weight": 0.3},
            ],
        },
    }


def read(stream, steps):
    return [stream.next_step() for _ in range(steps)]


@pytest.mark.parametrize(
    "name",
    ["packed", "streaming", *(pytest.param(name, marks=pytest.mark.slow) for name in ("padded", "dropped", "compressed", "schedule"))],
)
def test_going_on_is_exact_from_any_step_and_with_other_readers(mixtures, open_stream, name):
    data = mixtures[name]
    whole = open_stream(data, steps=STEPS)
    steps, states = [], []
    for step in range(STEPS):
        steps.append(whole.next_step())
        states.append(json.loads(json.dumps(whole.state())))
        assert states[-1]["step"] == step + 1
    for at, readers in ((1, {"prefetch": 0}), (7, {"workers": 3}), (16, {}), (19, {"prefetch": 5, "workers": 2}), (33, {})):
        again = open_stream({**data, **readers}, steps=STEPS)
        assert again.digest == whole.digest
        again.seek(states[at - 1])
        for expected in steps[at : at + 8]:
            found = again.next_step()
            assert same(found.micro_batches, expected.micro_batches)
            assert (found.padding, found.counts) == (expected.padding, expected.counts)
        assert again.state() == states[at + len(steps[at : at + 8]) - 1]
        again.close()
    assert max(len(json.dumps(state)) for state in states) < STATE_BYTES / 2


def test_resuming_in_a_later_epoch_reads_nothing_of_those_before(mixtures, open_stream):
    stream = open_stream(mixtures["packed"], steps=100, batch_size=32)
    for _ in range(90):
        stream.next_step()
    state = stream.state()
    assert state["window"]["sources"][0][0] >= 1
    expected = read(stream, 3)
    again = open_stream(mixtures["packed"], steps=100, batch_size=32)
    again.seek(state)
    assert all(same(a.micro_batches, b.micro_batches) for a, b in zip(read(again, 3), expected, strict=True))


@pytest.mark.parametrize("num_groups", [2, 4])
def test_ranks_share_out_the_rows_that_one_would_have(mixtures, open_stream, num_groups):
    alone = open_stream(mixtures["schedule"], batch_size=8, micro_batch_size=2)
    streams = [
        open_stream(mixtures["schedule"], batch_size=8, micro_batch_size=2, group=group, num_groups=num_groups)
        for group in range(num_groups)
    ]
    for _ in range(6):
        whole, parts = alone.next_step(), [stream.next_step() for stream in streams]
        assert {len(part.micro_batches) for part in parts} == {4 // num_groups}
        rows = {}
        for batch in (batch for part in parts for batch in part.micro_batches):
            for place, number in enumerate(batch["number"].tolist()):
                assert number not in rows
                rows[number] = {key: value[place] for key, value in batch.items()}
        for batch in whole.micro_batches:
            for place, number in enumerate(batch["number"].tolist()):
                assert all(torch.equal(rows[number][key], batch[key][place]) for key in batch)
        assert len(rows) == 8 and {(part.padding, part.cost_balance) for part in parts} == {(parts[0].padding, parts[0].cost_balance)}
        assert parts[0].cost_balance >= whole.cost_balance == pytest.approx(1.0)


def test_the_digest_is_that_of_the_data(mixtures, open_stream, tmp_path):
    path = mixtures["packed"]["path"]
    before = open_stream(mixtures["packed"]).digest
    assert before == open_stream({**mixtures["packed"], "workers": 2}).digest
    assert before != open_stream(mixtures["packed"], seed=1).digest
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join([*lines[:-1], lines[-1].replace("word", "wood", 1)]) + "\n")
    assert before != open_stream(mixtures["packed"]).digest


def test_the_reader_stays_a_bounded_number_of_steps_ahead(mixtures, open_stream):
    for prefetch in (1, 3):
        stream = open_stream({**mixtures["packed"], "prefetch": prefetch}, batch_size=64)
        stream.next_step()
        made = []
        original = stream._make
        stream._make = lambda planned, original=original, made=made: (made.append(planned.step), original(planned))[1]
        stream.seek(stream.state())
        stream.next_step()
        threading.Event().wait(0.5)
        # One more is in the making while the queue is full.
        assert len(made) == 1 + prefetch + 1
        stream.close()
        assert not any(thread.name == "data" for thread in threading.enumerate())


def test_a_row_that_turns_bad_is_raised_where_its_step_is_asked_for(jsonl, open_stream):
    rows = texts(3000)
    rows[2000] = {"other": "x"}
    stream = open_stream({"source": "jsonl", "path": str(jsonl("x.jsonl", rows)), "length": 64}, steps=2000)
    with pytest.raises(ValueError, match=r"x.jsonl:2001 has no text under data.field 'text'.*bad_shards: skip"):
        for _ in range(2000):
            stream.next_step()


def test_data_that_changed_under_a_checkpoint_is_said(jsonl, open_stream):
    path = jsonl("x.jsonl", texts(300, 0, 8, 14))
    stream = open_stream({"source": "jsonl", "path": str(path), "length": 64, "fill": "pad"})
    read(stream, 25)
    state = stream.state()
    assert state["window"]["carried"]
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    again = open_stream({"source": "jsonl", "path": str(path), "length": 64, "fill": "pad"})
    again.seek(state)
    with pytest.raises(ValueError, match="has changed"):
        again.next_step()


def test_every_document_is_trained_on_once_an_epoch(jsonl, open_stream, tokenizer):
    """Packing and carrying over change the order, and nothing is lost or doubled."""
    rows = texts(400, high=25)
    stream = open_stream({"source": "jsonl", "path": str(jsonl("x.jsonl", rows)), "length": 128, "fill": "pad"}, steps=400)
    expected = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in rows}
    seen = []
    while len(seen) < 1000:
        seen += [ids for ids, _ in documents_of(stream.next_step().micro_batches)]
    counts = [seen.count(ids) for ids in expected]
    assert set(seen) == expected and max(counts) - min(counts) <= 2
    assert Data(source="jsonl", path="x", length=8).prefetch == 2
