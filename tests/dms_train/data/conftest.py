"""A tokenizer, files of documents that can be told apart, and streams of them."""

import json

import pytest
from dms_train.data.loader import open_data
from dms_train.data.packing import Cost
from dms_train.data.settings import Data

from dms.io import base_models

# Attention over 100 tokens costs as much as all else.
COST = Cost(token=100.0, pair=2.0)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    return base_models.load_tokenizer(str(tiny_folder))


@pytest.fixture
def open_stream(tokenizer):
    opened = []

    def _open(data, *, batch_size=4, micro_batch_size=1, steps=40, seed=0, say=print, tokenizer=tokenizer, **changes):
        settings = Data(**data) if isinstance(data, dict) else data
        stream = open_data(
            tokenizer,
            settings,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            steps=steps,
            seed=seed,
            cost=COST,
            say=say,
            **{"num_embeddings": len(tokenizer), **changes},
        )
        opened.append(stream)
        return stream

    yield _open
    for stream in opened:
        stream.close()


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(name, rows) -> the path of a file of these texts or records."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
        return path

    return write
