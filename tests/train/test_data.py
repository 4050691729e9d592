import json

import pytest
import torch

from dms import models
from dms.train.data.sequences import BuiltinDocuments, PackedDocuments, make_source
from dms.train.data.settings import Data


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return models.load_tokenizer(str(tiny_folder))


def test_builtin_samples_are_functions_of_their_number(tokenizer):
    data = Data(source="builtin", length=192, items=[2, 4])
    one, two = (BuiltinDocuments(tokenizer, data, 10, seed=5) for _ in range(2))
    assert torch.equal(one[7]["input_ids"], two[7]["input_ids"])
    assert not torch.equal(one[7]["input_ids"], one[8]["input_ids"])
    assert not torch.equal(one[7]["input_ids"], BuiltinDocuments(tokenizer, data, 10, seed=6)[7]["input_ids"])
    assert all(one[i]["input_ids"].shape == (192,) for i in range(10))


def test_packing_loses_nothing_and_restarts_positions(tokenizer):
    texts = [f"document {i} " * (i + 1) for i in range(12)]
    packed = PackedDocuments(tokenizer, texts, 32, 6, seed=0)
    stream = []
    for sample in packed:
        ids, segment, position = sample["input_ids"], sample["segment_ids"], sample["position_ids"]
        assert ids.shape == segment.shape == position.shape == (32,)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), segment[1:] != segment[:-1]])
        assert (position[starts] == 0).all() and (position[~starts] > 0).all()
        assert int(segment[0]) == 1 and int((segment[1:] - segment[:-1]).max()) <= 1
        stream += ids.tolist()
    # The sequences one after another are whole documents one after another; only the last may be cut.
    encoded = {tuple(tokenizer(t)["input_ids"]) for t in texts}
    documents, current = [], []
    for token in stream:
        if token == tokenizer.eos_token_id:
            documents.append(tuple(current))
            current = []
        else:
            current.append(token)
    assert len(documents) >= 5 and len(set(documents)) == len(documents) and set(documents) <= encoded
    assert any(document[: len(current)] == tuple(current) for document in encoded)
    assert len(packed) == 6


def test_data_goes_round_when_it_is_short(tokenizer):
    packed = PackedDocuments(tokenizer, ["one two three four"], 16, 4, seed=0)
    assert len(packed) == 4 and packed.epochs > 1


def test_local_files(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": "x = 1\n" * 40}) for _ in range(3)))
    source = make_source(tokenizer, Data(source="jsonl", path=str(tmp_path), length=16, field="body"), 2, 0)
    assert len(source) == 2
    (tmp_path / "b.txt").write_text("some text " * 50)
    assert len(make_source(tokenizer, Data(source="text", path=str(tmp_path / "*.txt"), length=16), 2, 0)) == 2


def test_a_datasets_id(tokenizer, tmp_path):
    import datasets

    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"text": ["some text " * 30, "more of it " * 30]}).to_parquet(tmp_path / "d" / "train.parquet")
    source = make_source(tokenizer, Data(source="dataset", path=str(tmp_path / "d"), length=16), 3, 0)
    assert len(source) == 3
    with pytest.raises(ValueError, match="no column 'txt'; it has text"):
        make_source(tokenizer, Data(source="dataset", path=str(tmp_path / "d"), length=16, field="txt"), 3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "matches no"),
        ("{broken", r"x.jsonl:1 is not JSON"),
        ('{"other": "y"}', "it has: other"),
        ('{"text": "  "}', "holds no text"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_bad_files_are_named(tokenizer, tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        make_source(tokenizer, Data(source="jsonl", path=str(path), length=16), 1, 0)


def test_a_dataset_that_is_not_there(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_source(tokenizer, Data(source="dataset", path=str(tmp_path / "absent"), length=16), 1, 0)
