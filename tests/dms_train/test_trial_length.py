"""Training at several lengths, and at positions that jump."""

from itertools import islice

import pytest
import torch
from dms_train import bench_gates_rows, loop
from dms_train.bench_gates import GateComparison, Run
from dms_train.data.loader import open_data
from dms_train.data.packing import Cost
from dms_train.data.settings import Data
from dms_train.recipe import RetrofitRecipe
from dms_train.step import Normalizer, distill_step
from dms_train.trial_length import add_jumps, divide, length_at, target_at_length, windows_at
from jobs import read_metrics

import dms
from dms.io import base_models
from dms.training import soft_decisions

LENGTHS = [96, 192]


@pytest.fixture(scope="module")
def student(tiny_folder):
    model = base_models.load_base(str(tiny_folder), "float32")
    return dms.retrofit(model, dms.DMSConfig(window=8, offset=60.0)).train()


def steps_of(tiny_folder, lengths, count=4):
    tokenizer = base_models.load_tokenizer(str(tiny_folder))
    data = Data(source="builtin", length=192, items=[2, 4], prefetch=0)
    stream = open_data(
        tokenizer,
        data,
        batch_size=2,
        micro_batch_size=1,
        steps=count,
        seed=0,
        cost=Cost(1, 1),
        num_embeddings=len(tokenizer),
        lengths=lengths,
    )
    return [stream.next_step().micro_batches for _ in range(count)]


def test_steps_take_turns_at_the_lengths(tiny_folder):
    several, plain = steps_of(tiny_folder, LENGTHS), steps_of(tiny_folder, None)
    numbers = []
    for step, batches in enumerate(several, 1):
        for batch, usual in zip(batches, plain[step - 1], strict=True):
            length = length_at(LENGTHS, step)
            divided = divide(batch, length, min(LENGTHS))
            assert divided["input_ids"].shape == (192 // length, length)
            assert torch.equal(divided["position_ids"], torch.arange(length).expand(192 // length, -1))
            assert (divided["segment_ids"] == 1).all()
            assert length == 96 or torch.equal(batch["input_ids"], usual["input_ids"])
            numbers += divided["number"].tolist()
    assert len(set(numbers)) == len(numbers) == 2 * 2 * (2 + 1)
    # Documents of the shorter length, not halves of longer ones, each of its own text.
    first = several[0][0]["input_ids"].view(2, 96)
    assert not torch.equal(first[0], plain[0][0]["input_ids"][0, :96])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("budget, share", [("decided", 0.75), ("end", 0.75 * (87 / 96) / (183 / 192))])
def test_short_documents_are_asked_for_as_many_decisions_to_evict(budget, share):
    config = dms.DMSConfig(window=8)
    assert target_at_length(0.75, 96, 192, config, config, budget) == pytest.approx(share)
    assert target_at_length(0.75, 192, 192, config, config, budget) == 0.75


def test_windows_in_proportion_to_the_length():
    assert windows_at(dms.DMSConfig(window=32, sinks=4), 512, 2048) == dms.DMSConfig(window=128, sinks=4)
    assert windows_at(dms.DMSConfig(window=(8, 32, 128)), 512, 2048).windows == (32, 128, 512)
    assert windows_at(dms.DMSConfig(window=32), 512, 128).window == 8


def test_positions_jump_once_for_teacher_and_student(student):
    batch = {
        "input_ids": torch.randint(2, 500, (3, 32), generator=torch.Generator().manual_seed(0)),
        "segment_ids": torch.ones(3, 32, dtype=torch.long),
        "position_ids": torch.arange(32).repeat(3, 1),
        "loss_mask": torch.ones(3, 32, dtype=torch.bool),
        "number": torch.tensor([7, 8, 9]),
    }
    jumping = add_jumps(batch, 100, seed=0)
    gaps = jumping["model_position_ids"].diff(dim=1)
    assert (gaps > 0).all() and ((gaps > 1).sum(1) <= 1).all() and gaps.max() > 1 and gaps.max() <= 101
    alone = add_jumps({name: tensor[1:2] for name, tensor in batch.items()}, 100, seed=0)
    assert torch.equal(alone["model_position_ids"], jumping["model_position_ids"][1:2])

    states = []

    def head_loss(hidden_s, hidden_t, *_):
        states.extend([hidden_s.detach(), hidden_t])
        return hidden_s.sum()

    options = {"target": 0.5, "normalizer": Normalizer(96, 3), "seed": 0, "compression_weight": 1.0}
    for given in (batch, jumping):
        distill_step(student, None, given, head_loss=head_loss, **options)
    plain_s, plain_t, jumping_s, jumping_t = states
    # Gates that evict nothing: student and teacher agree where both read a jump as one document.
    assert torch.allclose(plain_s, plain_t, atol=1e-4) and torch.allclose(jumping_s, jumping_t, atol=1e-4)
    assert not torch.allclose(plain_t, jumping_t, atol=1e-3)


@pytest.mark.parametrize(
    "trial, change, said",
    [
        ({"lengths": [96, 100]}, {}, "different divisors of data.length"),
        ({"lengths": [96, 48]}, {}, "itself among them"),
        ({"lengths": [8, 192]}, {}, "dms.window is 8"),
        ({"lengths": LENGTHS}, {"data": {"source": "text", "path": "x", "length": 192}}, "builtin alone"),
        ({"lengths": LENGTHS}, {"teacher_cache": {"path": "x"}}, "teacher cache"),
        (
            {"windows_grow": True},
            {"dms": {"window": 8, "gate_input": "hidden+attention"}},
            "windows_grow does not work with dms.gate_input",
        ),
        ({"position_jump": 9}, {"sequence_parallel": 2}, "sequence_parallel 2"),
    ],
)
def test_what_does_not_go_together_is_refused(make_values, tmp_path, trial, change, said):
    with pytest.raises(ValueError, match=said):
        RetrofitRecipe(**{**make_values(tmp_path), "trial": trial, **change})


def test_a_jump_beyond_the_context_is_refused(make_values, tmp_path):
    with pytest.raises(ValueError, match="jump by at most 320"):
        loop.run(RetrofitRecipe(**make_values(tmp_path / "run", trial={"position_jump": 321})))


@pytest.mark.parametrize("budget, grow", [("decided", False), ("end", True)])
def test_a_run_at_several_lengths_with_jumps(make_values, tmp_path, monkeypatch, budget, grow):
    windows, original = [], soft_decisions.train_attention

    def watch(*tensors, window, **options):
        windows.append((tensors[0].shape[2], window))
        return original(*tensors, window=window, **options)

    monkeypatch.setattr(soft_decisions, "train_attention", watch)
    trial = {"lengths": LENGTHS, "position_jump": 320, "windows_grow": grow}
    recipe = RetrofitRecipe(**make_values(tmp_path / "run", trial=trial, budget=budget, steps=3))
    loop.run(recipe)
    assert set(windows) == {(96, 4 if grow else 8), (192, 8)}
    assert dms.load(tmp_path / "run" / "model").dms.config.window == 8
    metrics = list(islice(read_metrics(tmp_path / "run"), 3))
    assert [line["tokens"] for line in metrics] == [768, 1536, 2304]
    assert all(line["kl"] < 1 for line in metrics)

    read, original_read = [], bench_gates_rows.read_masked

    def watch_reading(model, documents, *rest, **options):
        read.append((len(documents[0].input_ids), model.dms.config.window))
        return original_read(model, documents, *rest, **options)

    monkeypatch.setattr(bench_gates_rows, "read_masked", watch_reading)
    evaluation = {"lengths": [96, 192, 384], "num_documents": 1, "num_items": 2}
    comparison = GateComparison(recipe="", variants={"v": {}}, target_cr=[4], output_dir=str(tmp_path / "out"), evaluation=evaluation)
    (tmp_path / "out").mkdir()
    bench_gates_rows.Evaluator(comparison, recipe).evaluate(Run("v", recipe))
    assert read == ([(96, 4), (192, 8), (384, 16)] if grow else [(96, 8), (192, 8), (384, 8)])
