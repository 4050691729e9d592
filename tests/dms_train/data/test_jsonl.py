"""JSON Lines as they come: with byte-order marks, compressed, damaged, or something else under their name."""

import codecs
import itertools
import json
import subprocess
import sys
import warnings

import pytest
from dms_train.data.compressed import check_modules, open_file
from dms_train.data.jsonl import JsonLines
from dms_train.data.settings import Origin
from dms_train.data.shards import BLOCK_RECORDS, BadShard, TextFiles
from dms_train.recipe import GenerateRecipe
from packed import COMPRESSED, compress, documents_of, texts


def lines_of(records):
    return "".join(json.dumps({"text": text}) + "\n" for text in records).encode()


def shard_of(path):
    return JsonLines(Origin(source="jsonl", path=str(path))).open(0)


def all_records(shard):
    """To its end, which a shard without a number of blocks shows by a block without records."""
    if shard.num_blocks is not None:
        return [record for block in range(shard.num_blocks) for record in shard.records(block)]
    return list(itertools.chain.from_iterable(itertools.takewhile(bool, map(shard.records, itertools.count()))))


@pytest.mark.parametrize("name", ["x.jsonl", *(f"x.jsonl.{kind}" for kind in COMPRESSED)])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, name):
    content = codecs.BOM_UTF8 + lines_of(["first", "second"])
    # As `cat` joins two such files.
    content += content
    path = tmp_path / name
    path.write_bytes(content) if name == "x.jsonl" else compress(path, content)
    records = all_records(shard_of(path))
    assert [record.values for record in records] == [{"text": text} for text in ("first", "second", "first", "second")]
    assert [record.where for record in records] == [f"{path}:{number}" for number in range(1, 5)]


@pytest.mark.parametrize("name", ["x.txt", *(f"x.txt.{kind}" for kind in COMPRESSED)])
def test_text_is_read_compressed_and_without_its_mark(tmp_path, name):
    content = codecs.BOM_UTF8 + "first\r\nsecönd".encode()
    (tmp_path / name).write_bytes(content) if name == "x.txt" else compress(tmp_path / name, content)
    (record,) = TextFiles(Origin(source="text", path=str(tmp_path))).records(0)
    assert record.values == {"text": "first\nsecönd"}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_file_holds_what_the_plain_one_does(tmp_path, kind):
    """Every record with its line, in blocks of bounded records and bytes, whichever block is asked for; empty lines count as lines."""
    content = lines_of(texts(600, low=1, high=3)) + b"\n" * (2 * BLOCK_RECORDS) + lines_of(["x" * 300_000] * 9 + ["end"])
    (tmp_path / "x.jsonl").write_bytes(content)
    plain = all_records(shard_of(tmp_path / "x.jsonl"))
    shard = shard_of(compress(tmp_path / f"x.jsonl.{kind}", content))
    blocks = [shard.records(block) for block in range(6)]
    assert [len(records) for records in blocks] == [256, 256, 92, 4, 2, 0]
    found = [record for records in blocks for record in records]
    assert [record.values for record in found] == [record.values for record in plain]
    assert [record.where.rsplit(":", 1)[1] for record in found] == [record.where.rsplit(":", 1)[1] for record in plain]
    for block in (4, 0, 2, 2, 1, 9, 3):
        assert shard.records(block) == (blocks[block] if block < 5 else [])


def test_several_members_of_a_compressed_file_are_one_text(tmp_path):
    for kind, packed in COMPRESSED.items():
        path = tmp_path / f"x.jsonl.{kind}"
        path.write_bytes(packed(lines_of(["first"])) + packed(lines_of(["second"])))
        assert [record.values["text"] for record in all_records(shard_of(path))] == ["first", "second"], kind


@pytest.mark.parametrize("kind", [kind if kind in ("gz", "zst") else pytest.param(kind, marks=pytest.mark.slow) for kind in COMPRESSED])
def test_a_damaged_compressed_file_is_named_with_its_line_or_left_out(tmp_path, open_stream, tokenizer, kind):
    records = {name: texts(100, number, high=30) for number, name in enumerate("abc")}
    paths = {name: compress(tmp_path / "d" / f"{name}.jsonl.{kind}", lines_of(records[name])) for name in records}
    # Long enough for some to be unpacked before the end of what is there.
    content = lines_of(texts(60_000, 1, 1, 2))
    whole = COMPRESSED[kind](content)
    paths["b"].write_bytes(whole[: len(whole) * 9 // 10])
    before = []
    with pytest.raises(BadShard, match=rf"b\.jsonl\.{kind} cannot be read from line \d+ on: \w+: \w+") as raised:
        shard = shard_of(paths["b"])
        for block in range(1000):
            before += shard.records(block)
    assert len(before) == int(str(raised.value).split("from line ")[1].split()[0]) - 1 > BLOCK_RECORDS
    assert lines_of(record.values["text"] for record in before) == content[: len(lines_of(record.values["text"] for record in before))]
    # It stays as bad as it was, and what stands before the damage can be gone back to.
    with pytest.raises(BadShard, match="cannot be read from line"):
        shard.records(block)
    assert shard.records(0) == before[:BLOCK_RECORDS]

    paths["b"].write_bytes(whole[:200])
    data = {"source": "jsonl", "path": str(tmp_path / "d"), "length": 256, "fill": "pad"}
    with pytest.raises(ValueError, match=rf"b\.jsonl\.{kind} cannot be read.*bad_shards: skip leaves such out"):
        stream = open_stream(data, batch_size=8, steps=40)
        for _ in range(40):
            stream.next_step()
    said = []
    stream = open_stream({**data, "bad_shards": "skip"}, batch_size=8, steps=40, say=said.append)
    found = [ids for _ in range(40) for ids, _ in documents_of(stream.next_step().micro_batches)]
    assert len(said) == 1 and f"b.jsonl.{kind} cannot be read" in said[0]
    good = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for name in "ac" for text in records[name]}
    assert good <= set(found)


def test_what_is_no_compressed_file_says_so(tmp_path):
    for kind in COMPRESSED:
        path = tmp_path / f"x.jsonl.{kind}"
        path.write_bytes(lines_of(["plain"]))
        with pytest.raises(BadShard, match=rf"x\.jsonl\.{kind} cannot be read"):
            shard_of(path)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_16_is_named(tmp_path, mark):
    encoding = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    (tmp_path / "x.jsonl").write_bytes(mark + lines_of(["a"]).decode().encode(encoding))
    with pytest.raises(BadShard, match=r"x\.jsonl is text in UTF-16; convert it: iconv"):
        shard_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_refused_with_the_command_that_converts_it(tmp_path, indent):
    records = [{"text": "erste Zeile\nüber"}, {"text": "second"}]
    path = tmp_path / "own data.json"
    path.write_text("\ufeff" + json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(BadShard, match="begins with a JSON list, and what is read is JSON Lines: an object a line") as raised:
        shard_of(path)
    command = str(raised.value).split("Convert it: python ")[1]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path)
    assert [record.values for record in all_records(shard_of(tmp_path / "NEW.jsonl"))] == records


def test_a_folder_says_what_it_holds_and_what_is_read(tmp_path):
    for name in ("a/0.json.gz", "a/1.json.gz", "a/LICENSE", "b/0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    compress(tmp_path / "a" / "0.json.gz", lines_of(["x"]))

    def message(path, source="jsonl"):
        with pytest.raises(ValueError, match="is a folder without files for source") as raised:
            {"jsonl": JsonLines, "text": TextFiles}[source](Origin(source=source, path=str(path)))
        return str(raised.value)

    kinds = ".jsonl, .jsonl.gz, .jsonl.bz2, .jsonl.xz, .jsonl.zst"
    given = message(tmp_path / "a")
    assert (
        f"source: jsonl, which reads {kinds}; it holds 2 .json.gz, 1 without suffix. Files with other suffixes are named by a glob" in given
    )
    assert JsonLines(Origin(source="jsonl", path=given.rsplit("such as ", 1)[1].strip("'"))).num_shards == 2
    assert message(tmp_path / "b").endswith("it holds 1 .parquet. source: parquet reads .parquet")
    assert ".txt, .txt.gz" in message(tmp_path / "b", "text")
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty").endswith("it holds no file")


def test_what_cannot_be_unpacked_here_is_said_before_anything_is_read(tmp_path, monkeypatch):
    path = compress(tmp_path / "x.jsonl.zst", lines_of(["x"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"\.zst files cannot be read here.*pip install pyarrow"):
        JsonLines(Origin(source="jsonl", path=str(path)))
    monkeypatch.setitem(sys.modules, "bz2", None)
    with pytest.raises(RuntimeError, match="built without bz2"):
        check_modules([tmp_path / "x.bz2"])
    check_modules([tmp_path / "x.jsonl"])


def test_files_are_closed(tmp_path):
    for name in ("x.jsonl", *(f"x.jsonl.{kind}" for kind in COMPRESSED)):
        path = tmp_path / name
        path.write_bytes(lines_of(["x"])) if name == "x.jsonl" else compress(path, lines_of(["x"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with open_file(path) as opened:
                assert opened.read() == lines_of(["x"])


def test_generated_records_have_no_name_of_a_compressed_file():
    values = {"model": "x", "output": "own.jsonl.gz", "prompts": {"source": "builtin", "tokens": 1}, "num_prompts": 1, "max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"'own\.jsonl\.gz' has the suffix of a compressed file, and the file is written uncompressed"):
        GenerateRecipe(**values)
