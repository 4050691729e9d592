"""Training sequences as pure functions of their number: `source[i]` is the same in every run, split and after every resume.

A sample has input_ids, segment_ids (0 = padding), position_ids (restart with each document), all [T] int64, loss_mask [T] bool
(whether the prediction made at a token counts), and its number.
"""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Dataset, Sampler

from dms.evaluation.corpus import StdlibText
from dms.evaluation.tasks import make_document
from dms.train.data.settings import Data


class BuiltinDocuments(Dataset):
    """Each sequence is one document of exactly T tokens: standard-library text with planted tasks."""

    def __init__(self, tokenizer, data: Data, num_samples: int, seed: int):
        self.tokenizer, self.data, self.num_samples, self.seed = tokenizer, data, num_samples, seed
        self.text = StdlibText(held_out=False)
        for trial in range(4):
            try:
                self._plant(trial, data.items[1], strict=True)
            except ValueError as error:
                raise ValueError(f"data.items {data.items} do not fit data.length {data.length} with this tokenizer: {error}") from None

    def __len__(self) -> int:
        return self.num_samples

    def _plant(self, index: int, num_items: int | None = None, strict: bool = False):
        rng = Random(f"{self.seed}:{self.data.length}:{index}")
        questions = rng.choice(("anywhere", "end"))
        drawn = rng.randint(*self.data.items)
        return make_document(
            self.tokenizer,
            self.text,
            length=self.data.length,
            rng=rng,
            questions=questions,
            num_items=drawn if num_items is None else num_items,
            strict=strict,
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        document = self._plant(index)
        length = len(document.input_ids)
        # Names and values drawn at random: there is nothing to predict, and the embedded model was not trained to.
        predictable = torch.tensor([*document.role[1:], 0]) != 1
        return {
            "input_ids": torch.tensor(document.input_ids),
            "segment_ids": torch.ones(length, dtype=torch.long),
            "position_ids": torch.arange(length),
            "loss_mask": predictable,
            "number": torch.tensor(index),
        }


class PackedDocuments(Dataset):
    """Documents packed one after another into sequences of T tokens; a document that a sequence's end cuts goes on in the next.

    Documents are shuffled anew each time they have all been read; `epochs` says how often that takes.
    """

    def __init__(self, tokenizer, texts: list[str], length: int, num_samples: int, seed: int):
        self.length = length
        self.samples: list[list[list[int]]] = []
        self.epochs = 0
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded: dict[int, list[int]] = {}
        current: list[list[int]] = []
        room = length
        while len(self.samples) < num_samples:
            self.epochs += 1
            order = list(range(len(texts)))
            Random(f"{seed}:{self.epochs}").shuffle(order)
            for number in order:
                if number not in encoded:
                    encoded[number] = tokenizer(texts[number])["input_ids"] + eos
                ids = encoded[number]
                while ids:
                    current.append(ids[:room])
                    room -= len(current[-1])
                    ids = ids[len(current[-1]) :]
                    if room == 0:
                        self.samples.append(current)
                        current, room = [], length
                if len(self.samples) >= num_samples:
                    break
            if not self.samples and not current:
                raise ValueError("the data holds no tokens; check data.path and data.field")
        del self.samples[num_samples:]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = self.samples[index]
        return {
            "input_ids": torch.tensor([token for piece in pieces for token in piece]),
            "segment_ids": torch.tensor([number for number, piece in enumerate(pieces, 1) for _ in piece]),
            "position_ids": torch.tensor([place for piece in pieces for place in range(len(piece))]),
            "loss_mask": torch.ones(self.length, dtype=torch.bool),
            "number": torch.tensor(index),
        }


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one process: numbers first..last-1 of the whole run in order, dealt out to the processes in turn."""

    def __init__(self, *, first: int, last: int, size: int, rank: int, num_ranks: int):
        self.starts, self.size = range(first + rank * size, last, size * num_ranks), size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.size))


def make_source(tokenizer, data: Data, num_samples: int, seed: int) -> Dataset:
    """The recipe's training sequences.

    Raises:
        ValueError: data that is missing, unreadable, empty or without the named field.
    """
    if data.source == "builtin":
        return BuiltinDocuments(tokenizer, data, num_samples, seed)
    texts = list(_read_dataset(data) if data.source == "dataset" else _read_files(data))
    if not any(text.strip() for text in texts):
        raise ValueError(f"data.path {data.path!r} holds no text")
    return PackedDocuments(tokenizer, texts, data.length, num_samples, seed)


def _read_files(data: Data) -> Iterator[str]:
    path = Path(data.path).expanduser()
    suffix = "*.jsonl" if data.source == "jsonl" else "*.txt"
    files = sorted(path.rglob(suffix)) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise ValueError(f"data.path {data.path!r} matches no {'.jsonl' if data.source == 'jsonl' else '.txt'} file")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data file {file} cannot be read: {error}") from None
        if data.source == "text":
            yield text
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(data.field), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{file}:{number} has no text under data.field {data.field!r}; it has: {keys}")
            yield record[data.field]


def _read_dataset(data: Data) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, data.config, split=data.split)
    except Exception as error:
        # datasets raises its own, hub, network and file errors; each becomes one line with its cause.
        raise ValueError(
            f"dataset {data.path!r} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if data.field not in rows.column_names:
        raise ValueError(f"dataset {data.path!r} has no column {data.field!r}; it has {', '.join(rows.column_names)}")
    yield from rows[data.field]
