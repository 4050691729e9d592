"""What the accelerator waits for: a skewed mixture, four simulated ranks, beside naive packing. Run with -s to see the figures."""

import itertools
import json
import statistics
import time
from random import Random

import pytest
from dms_train.data.loader import open_data, open_mixture
from dms_train.data.packing import cost_of, imbalance
from dms_train.data.settings import Data
from rich.console import Console
from rich.table import Table

from dms.evaluation.data.text_sources import StdlibText

LENGTH, BATCH, RANKS, STEPS = 32_768, 8, 4, 28
# Teacher, student and backward pass of a frozen base, two operations a multiplication, at 400 TFLOP/s: no H100 is faster.
SECONDS_PER_UNIT = 4 * 2 / 400e12


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """Documents of 100 to 30,000 tokens, log-uniform: many short ones, and most tokens in the long ones."""
    import pyarrow
    import pyarrow.parquet

    folder, rng, text = tmp_path_factory.mktemp("skewed"), Random(0), StdlibText(held_out=False)

    def rows(count, low, high):
        # Less than three characters make a token.
        sizes = [int(2.4 * low * (high / low) ** rng.random()) for _ in range(count)]
        return [{"text": "".join(text.lines(rng, size))[:size]} for size in sizes]

    short, long = folder / "short.jsonl", folder / "long.parquet"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows(2500, 100, 3_000)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(300, 3_000, 30_000)), long, row_group_size=50)
    sources = [{"source": "jsonl", "path": str(short), "weight": 0.3}, {"source": "parquet", "path": str(long), "weight": 0.7}]
    return Data(length=LENGTH, sources=sources)


@pytest.fixture(scope="module")
def setting():
    from transformers import LlamaConfig

    from dms.io import base_models

    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128_256,
    )
    return {
        "tokenizer": base_models.load_tokenizer("builtin:tiny"),
        "batch_size": BATCH,
        "steps": STEPS,
        "seed": 0,
        "cost": cost_of(config),
        "num_embeddings": config.vocab_size,
    }


def planned(skewed, setting):
    tokenizer, rest = setting["tokenizer"], {key: value for key, value in setting.items() if key != "tokenizer"}
    mixture = open_mixture(tokenizer, skewed, **rest)
    return list(mixture.planned(mixture.first_state()))


def naive(steps, cost):
    """The same documents in the order of their drawing, one after another, cut at rows' ends, rows dealt out in turn."""
    documents = {id(p.document): p.document for step in steps for row in step.sequences for p in row.pieces}
    in_order = sorted(documents.values(), key=lambda d: (d.cursor.epoch, d.source, d.cursor))
    Random(0).shuffle(in_order)
    rows, room, cut = [[]], LENGTH, 0
    for document in in_order:
        left = document.length
        while left:
            taken = min(left, room)
            rows[-1].append(taken)
            left, room = left - taken, room - taken
            cut += left > 0
            if room == 0:
                rows.append([])
                room = LENGTH
    costs = [cost.of_sequence(row, LENGTH) for row in rows[: len(rows) // BATCH * BATCH]]
    batches = [costs[start : start + BATCH] for start in range(0, len(costs) - BATCH + 1, BATCH)]
    turns = [list(range(rank, BATCH, RANKS)) for rank in range(RANKS)]
    return [imbalance(batch, turns) for batch in batches], cut / len(in_order)


@pytest.mark.slow
def test_the_accelerator_does_not_wait(skewed, setting):
    cost = setting["cost"]
    steps = planned(skewed, setting)
    lengths = [piece.document.length for step in steps for row in step.sequences for piece in row.pieces]
    assert min(lengths) < 150 and max(lengths) > 25_000
    naive_balance, naive_cut = naive(steps, cost)
    cut = sum(
        piece.length < piece.document.length and piece.start == 0 for step in steps for row in step.sequences for piece in row.pieces
    ) / len({id(piece.document) for step in steps for row in step.sequences for piece in row.pieces})
    waits = {}
    for prefetch in (0, skewed.prefetch):
        data = Data(**{**skewed.model_dump(exclude_none=True), "prefetch": prefetch})
        stream = open_data(micro_batch_size=1, group=0, num_groups=RANKS, data=data, **setting)
        waited, slept, balance, padding, tokens = 0.0, 0.0, [], [], 0
        start = time.perf_counter()
        for step in itertools.islice(steps, STEPS):
            got = stream.next_step()
            # The slowest of the ranks says when the step ends.
            seconds = got.cost_balance * sum(row.cost for row in step.sequences) / RANKS * SECONDS_PER_UNIT
            time.sleep(seconds)
            waited, slept = waited + got.waited, slept + seconds
            balance.append(got.cost_balance)
            padding.append(got.padding)
            tokens += BATCH * LENGTH
        waits[prefetch] = waited / (time.perf_counter() - start), slept / len(balance), tokens / slept
        stream.close()
    table = Table(title=f"{RANKS} ranks, {BATCH} rows of {LENGTH:,} tokens a step, documents of {min(lengths)} to {max(lengths):,} tokens")
    for column in ("", "waiting", "max/mean cost, mean", "largest", "padding", "documents cut"):
        table.add_column(column)
    (share, seconds, rate), (unprefetched, _, _) = waits[skewed.prefetch], waits[0]
    table.add_row(
        "planned", f"{share:.3%}", f"{statistics.mean(balance):.4f}", f"{max(balance):.4f}", f"{statistics.mean(padding):.3%}", f"{cut:.1%}"
    )
    table.add_row(
        "naive", f"{unprefetched:.2%}", f"{statistics.mean(naive_balance):.4f}", f"{max(naive_balance):.4f}", "0%", f"{naive_cut:.1%}"
    )
    Console(width=120).print(
        table,
        f"simulated steps of {seconds:.2f} s on average ({rate:,.0f} tokens/s asked of the reader); naive waits as without prefetch: "
        "it reads when it is asked",
    )
    assert share < 0.01 and max(balance) <= 1.05 and statistics.mean(padding) < 0.01
    assert statistics.mean(naive_balance) > statistics.mean(balance) + 0.03
