"""Sources of every kind: what is read, in which order, and what becomes of what cannot be read."""

import itertools
from collections import Counter

import pytest
from dms_train.data.jsonl import JsonLines
from dms_train.data.settings import Data, Origin
from dms_train.data.shards import BLOCK_RECORDS, Parquet
from dms_train.data.source_reader import Cursor, Reader
from dms_train.data.tokenization import columns_of, make_render
from packed import COMPRESSED, compress, documents_of, texts


def write_parquet(path, rows, row_group_size=100):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def reader(tokenizer):
    def make(origin, shards, seed=0, skips=False, say=print):
        return Reader(origin, 0, shards, make_render(tokenizer, origin), seed=seed, skips=skips, workers=1, say=say)

    return make


def an_epoch(reader, cursor=None, epoch=0):
    """(cursor, text) of the documents of one epoch, from a place on."""
    outcomes = reader.documents(cursor or Cursor(epoch))
    documents = (outcome.document for outcome in outcomes if outcome.document is not None)
    return list(itertools.takewhile(lambda document: document.cursor.epoch == epoch, documents))


def ids_of(documents):
    return [tuple(document.arrays()[0].tolist()) for document in documents]


@pytest.fixture
def origins(jsonl, tmp_path):
    """The same 700 documents in every kind of source."""
    import datasets

    rows = [{"text": text, "extra": 1} for text in texts(700)]
    for part in range(3):
        jsonl(f"lines/{part}.jsonl", rows[part::3])
        write_parquet(tmp_path / "parquet" / f"{part}.parquet", rows[part::3])
    for number, row in enumerate(rows):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{number}.txt").write_text(row["text"])
    for kind in COMPRESSED:
        for part in range(3):
            compress(tmp_path / kind / f"{part}.jsonl.{kind}", (tmp_path / "lines" / f"{part}.jsonl").read_bytes())
    (tmp_path / "hub").mkdir()
    for part in range(3):
        datasets.Dataset.from_list(rows[part::3]).to_parquet(tmp_path / "hub" / f"train-{part}.parquet")
    return {
        "jsonl": Origin(source="jsonl", path=str(tmp_path / "lines")),
        "parquet": Origin(source="parquet", path=str(tmp_path / "parquet")),
        **{kind: Origin(source="jsonl", path=str(tmp_path / kind)) for kind in COMPRESSED},
        "text": Origin(source="text", path=str(tmp_path / "files")),
        "table": Origin(source="dataset", path=str(tmp_path / "hub")),
        "stream": Origin(source="dataset", path=str(tmp_path / "hub"), streaming=True),
    }


@pytest.fixture
def open_source(reader):
    from dms_train.data import hub
    from dms_train.data.shards import TextFiles

    def make(origin, **changes):
        columns = columns_of(origin)
        made = {
            "jsonl": lambda: JsonLines(origin),
            "parquet": lambda: Parquet(origin, columns, skips=False),
            "text": lambda: TextFiles(origin),
            "dataset": lambda: hub.load(origin, columns),
        }
        return reader(origin, made[origin.source](), **changes)

    return make


@pytest.mark.parametrize(
    "kind", ["jsonl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in COMPRESSED), "parquet", "text", "table", "stream"]
)
def test_an_epoch_is_every_document_once_in_a_new_order(origins, open_source, tokenizer, kind):
    source = open_source(origins[kind])
    first, second = an_epoch(source), an_epoch(source, epoch=1)
    expected = Counter((*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts(700))
    assert Counter(ids_of(first)) == Counter(ids_of(second)) == expected
    assert ids_of(first) != ids_of(second) and ids_of(an_epoch(open_source(origins[kind], seed=1))) != ids_of(first)
    assert ids_of(an_epoch(open_source(origins[kind]))) == ids_of(first)


@pytest.mark.parametrize(
    "kind", ["jsonl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in COMPRESSED), "parquet", "text", "table", "stream"]
)
def test_any_place_can_be_gone_to(origins, open_source, kind):
    whole = an_epoch(open_source(origins[kind]))
    for number in (0, 1, 15, 16, 300, 555, 699):
        source = open_source(origins[kind])
        assert ids_of([source.at(whole[number].cursor)]) == ids_of([whole[number]])
        following = an_epoch(source, whole[number].cursor.after)
        assert ids_of(following) == ids_of(whole[number + 1 :])


def test_a_long_file_is_not_read_in_its_order(jsonl, open_source):
    """Blocks are shuffled, and rows in them: what stands together does not come together."""
    path = jsonl("long.jsonl", [f"{number}" for number in range(20 * BLOCK_RECORDS)])
    source = open_source(Origin(source="jsonl", path=str(path)))
    shard = source.shards.open(0)
    assert shard.num_blocks == 20
    blocks = [document.cursor.block for document in an_epoch(source)]
    assert blocks == sorted(blocks)
    first_rows = [int(source._records(shard, Cursor(0, 0, block))[0].values["text"]) for block in range(20)]
    assert sorted(number // BLOCK_RECORDS for number in first_rows) == list(range(20)) and first_rows != sorted(first_rows)


def test_blocks_are_bounded_in_bytes(jsonl):
    path = jsonl("big.jsonl", ["x" * 300_000] * 10 + ["y" * 3_000_000])
    shard = JsonLines(Origin(source="jsonl", path=str(path))).open(0)
    assert [len(shard.records(block)) for block in range(shard.num_blocks)] == [3, 3, 3, 1, 1]
    assert shard.records(4)[0].where.endswith("big.jsonl:11")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file and no folder, and as a glob matches none; give a file, a folder of .jsonl files, or a glob"),
        ('{"text": "x"}\n{broken', r"x.jsonl:2 is not JSON"),
        ('{"other": "y"}', r"x.jsonl:1 has no text under data.field 'text'; it has: other"),
        ('{"text": "x"}\n[1, 2]', "x.jsonl:2 is not an object of keys and values but a list"),
        ('{"text": "  "}', r"holds no text to train on \(1 empty\)"),
        ("", r"holds no text to train on \(no records\)"),
        (b'{"text": "\xff"}', "x.jsonl:1 cannot be read"),
    ],
)
def test_bad_files_are_named(open_stream, tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_stream({"source": "jsonl", "path": str(path), "length": 16})


def test_bad_lines_are_skipped_counted_and_said(jsonl, open_stream):
    path = jsonl("x.jsonl", texts(40))
    lines = path.read_text().splitlines()
    lines[7], lines[20] = "{broken", '{"other": 1}'
    path.write_text("\n".join(lines) + "\n")
    said = []
    data = {"source": "jsonl", "path": str(path), "length": 64, "bad_shards": "skip"}
    step = open_stream(data, batch_size=4, steps=2, say=said.append).next_step()
    assert step.counts["bad_rows"] >= 1
    assert len(said) == len(set(said)) and all("x.jsonl:8 is not JSON" in line or "x.jsonl:21 has no text" in line for line in said)


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["footer", "pages"])
@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_a_corrupt_shard_is_refused_or_skipped(tmp_path, open_stream, open_source, tokenizer, kind, damage):
    rows = [{"text": text} for text in texts(90)]
    for part in range(3):
        write_parquet(tmp_path / "d" / f"{part}.parquet", rows[part::3])
    broken = tmp_path / "d" / "1.parquet"
    if damage == "footer":
        broken.write_bytes(broken.read_bytes()[:-6])
    else:
        corrupt(broken)
    origin = (
        {"source": "parquet", "path": str(tmp_path / "d")}
        if kind == "parquet"
        else {"source": "dataset", "path": str(tmp_path / "d"), "streaming": True}
    )
    with pytest.raises(ValueError, match=r"cannot be read.*bad_shards: skip"):
        # What can be seen at once is said at once.
        stream = open_stream({**origin, "length": 160, "fill": "pad"})
        for _ in range(40 if damage == "pages" or kind == "stream" else 0):
            stream.next_step()
    said = []
    stream = open_stream({**origin, "length": 160, "fill": "pad", "bad_shards": "skip"}, say=said.append)
    found = [document for _ in range(40) for document in documents_of(stream.next_step().micro_batches)]
    assert len(said) == 1 and "cannot be read" in said[0]
    whole = {(*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id) for row in rows}
    seen = {ids for ids, _ in found} & whole
    lost = {(*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id) for row in rows[1::3]}
    assert not seen & lost and len(seen) > 40


def test_columns_that_are_not_there_are_named(tmp_path, open_stream):
    write_parquet(tmp_path / "d" / "x.parquet", [{"text": "some text"}])
    for kind in ({"source": "parquet"}, {"source": "dataset"}, {"source": "dataset", "streaming": True}):
        with pytest.raises(ValueError, match="has no column 'txt'; it has text"):
            open_stream({**kind, "path": str(tmp_path / "d"), "field": "txt", "length": 16})


def test_a_dataset_that_is_not_there(open_stream, tmp_path):
    for streaming in (False, True):
        with pytest.raises(ValueError, match="cannot be loaded"):
            open_stream({"source": "dataset", "path": str(tmp_path / "absent"), "length": 16, "streaming": streaming})


def test_weights_are_shares_of_tokens(jsonl, open_stream):
    """However long the documents of a source are, and as the schedule says."""
    long, short = jsonl("long.jsonl", texts(50, 1, 300, 400)), jsonl("short.jsonl", texts(3000, 2, 1, 5))
    sources = [
        {"source": "jsonl", "path": str(long), "weight": [[1, 3], [32, 3], [33, 0]]},
        {"source": "jsonl", "path": str(short), "weight": 1},
    ]
    stream = open_stream({"length": 512, "sources": sources}, batch_size=4, steps=64)
    shares = []
    for _ in range(64):
        marks = Counter()
        for ids, _ in documents_of(stream.next_step().micro_batches):
            marks[len(ids) > 40] += len(ids)
        shares.append(marks[True] / sum(marks.values()))
    # Windows of 16 steps; a piece of a cut long document may be short.
    assert sum(shares[:32]) / 32 == pytest.approx(0.75, abs=0.04)
    assert sum(shares[48:]) == 0


def test_long_documents_are_split_or_dropped_and_counted(jsonl, open_stream, tokenizer):
    path = jsonl("x.jsonl", ["long " * 100, *texts(30)])
    whole = (*tokenizer("long " * 100)["input_ids"], tokenizer.eos_token_id)
    data = {"source": "jsonl", "path": str(path), "length": 96}
    split = open_stream({**data, "fill": "pad"}, steps=8)
    steps = [split.next_step() for _ in range(8)]
    pieces = {ids for step in steps for ids, _ in documents_of(step.micro_batches)}
    assert {whole[:96], whole[96:192]} <= pieces and steps[-1].counts["split"] >= 1
    dropped = open_stream({**data, "long_documents": "drop"}, steps=8)
    steps = [dropped.next_step() for _ in range(8)]
    assert not any(ids[:50] == whole[:50] for step in steps for ids, _ in documents_of(step.micro_batches))
    assert steps[-1].counts["dropped"] >= 1 and "split" not in steps[-1].counts
    with pytest.raises(ValueError, match=r"every document is longer than data\.length 8"):
        open_stream({**data, "length": 8, "long_documents": "drop"})


def test_rows_carry_documents_apart_and_padding_at_the_end(jsonl, open_stream):
    path = jsonl("x.jsonl", texts(200, high=30))
    step = open_stream({"source": "jsonl", "path": str(path), "length": 64, "fill": "pad"}, batch_size=8, micro_batch_size=4).next_step()
    assert [batch["number"].tolist() for batch in step.micro_batches] != [] and 0 < step.padding < 0.2
    assert sorted(number for batch in step.micro_batches for number in batch["number"].tolist()) == list(range(8))
    for batch in step.micro_batches:
        for ids, segment, position, counted in zip(*(batch[key] for key in list(batch)[:4]), strict=True):
            starts = [0, *(place for place in range(1, 64) if segment[place] != segment[place - 1])]
            assert [int(segment[start]) for start in starts if segment[start]] == list(range(1, int(segment.max()) + 1))
            assert all(int(position[place]) == place - max(start for start in starts if start <= place) for place in range(64))
            real = segment > 0
            assert real[: int(real.sum())].all() and not counted[~real].any() and (ids[~real] == 1).all()


def test_a_mixture_with_builtin_documents(jsonl, tokenizer, open_stream):
    path = jsonl("x.jsonl", texts(300))
    sources = [{"source": "builtin", "items": [2, 4]}, {"source": "jsonl", "path": str(path)}]
    stream = open_stream({"length": 128, "sources": sources, "fill": "pad"}, batch_size=8)
    kinds = Counter()
    for _ in range(32):
        # Planted names are not predicted; all else is.
        for ids, counted in documents_of(stream.next_step().micro_batches):
            kinds[all(counted)] += len(ids)
    assert kinds[True] == pytest.approx(kinds[False], rel=0.1)


class Flaky:
    """A stream of one shard whose connection breaks at the second block, so many times."""

    num_shards = 1

    def __init__(self, breaks):
        self.breaks, self.broken = breaks, 0

    def with_format(self, _):
        return self

    def shard(self, *_):
        return self

    def iter(self, batch_size):
        import pyarrow

        for block in range(3):
            if block == 1 and self.broken < self.breaks:
                self.broken += 1
                raise ConnectionError("timed out")
            yield pyarrow.table({"text": [f"text {block} {number}" for number in range(batch_size)]})


def test_a_connection_that_breaks_is_tried_again_and_never_counted_as_a_bad_shard(monkeypatch):
    from dms_train.data import hub
    from dms_train.data.settings import Origin

    monkeypatch.setattr(hub, "RETRY_SECONDS", (0.0, 0.0))
    origin = Origin(source="dataset", path="acme/texts", streaming=True)
    shard = hub.HubStream(Flaky(2), origin).open(0)
    assert shard.records(1)[0].values == {"text": "text 1 0"}
    with pytest.raises(ConnectionError, match="acme/texts, shard 0 cannot be reached: ConnectionError: timed out"):
        hub.HubStream(Flaky(3), origin).open(0).records(1)


def test_a_number_too_long_to_read_is_a_bad_row(jsonl, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n")
    rows = JsonLines(Origin(source="jsonl", path=str(path))).open(0).records(0)
    assert rows[0].values == {"text": "a"} and rows[1].values is None and "is not JSON" in rows[1].problem


def test_a_schedule_may_begin_with_nothing():
    data = {
        "length": 64,
        "sources": [
            {"source": "builtin", "weight": [[0, 0.0], [10, 1.0]]},
            {"source": "text", "path": "x", "weight": [[0, 0.0], [5, 1.0]]},
        ],
    }
    assert Data(**data).all_sources[0].weight_at(1) > 0
