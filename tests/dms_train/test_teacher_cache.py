"""The teacher cache: written once, whole shards only, used by whatever reads the same sequences, and never silently wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from dms_train import cache_teacher, loop, models
from dms_train.recipe import RetrofitRecipe
from dms_train.step import HeadLoss, Normalizer, distill_step
from dms_train.teacher_cache import BATCH_KEYS, sequence_key
from jobs import Job, read_metrics

from dms.io import base_models
from dms.retrofitting import retrofit
from dms_kernels import top_log_probs


def load(values, **changes):
    return RetrofitRecipe.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def cached(make_values, tmp_path_factory):
    """A recipe's values with a cache of all its rows, for tests that only read it."""
    folder = tmp_path_factory.mktemp("cached")
    values = make_values(folder / "run", teacher_cache={"path": str(folder / "cache"), "top_k": 48})
    counts = cache_teacher.write(load(values))
    assert counts["written"] == 32 and counts["tokens"] == 32 * 192 and counts["there"] == 0
    return values


def source_of(recipe):
    return list(cache_teacher.sequences_of(recipe, base_models.load_tokenizer(recipe.model)))


def batch_of(recipe, numbers):
    rows = source_of(recipe)
    return torch.utils.data.default_collate([rows[number] for number in numbers])


def test_what_is_read_is_what_the_teacher_says(cached):
    recipe = load(cached)
    model = base_models.load_base(recipe.model, "float32")
    batch = cache_teacher.open_for(recipe, 1024).add_to(batch_of(recipe, [5, 30]))
    ids, log_probs, log_tail = (batch[name] for name in BATCH_KEYS)
    assert ids.shape == log_probs.shape == (2, 192, 48) and log_tail.shape == (2, 192)
    with torch.no_grad():
        want = torch.log_softmax(model(batch["input_ids"]).logits, -1)
    torch.testing.assert_close(log_probs, want.gather(2, ids.long()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(log_probs[..., -1], want.topk(48).values[..., -1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(log_tail.exp() + log_probs.exp().sum(-1), torch.ones(2, 192), rtol=2e-3, atol=0)
    # The bytes that a token takes: two for each of 48 ids and log-probabilities, and two for the tail; the rest is names.
    size = sum(file.stat().st_size for file in Path(recipe.teacher_cache.path).glob("*.safetensors"))
    assert 48 * 4 + 2 <= size / (32 * 192) < 48 * 4 + 10


def test_fewer_tokens_than_are_there_can_be_used(cached):
    recipe = load(cached)
    few = load(cached, teacher_cache={**cached["teacher_cache"], "top_k": 5})
    batch = batch_of(recipe, [3])
    ids, log_probs, log_tail = (cache_teacher.open_for(few, 1024).add_to(batch)[name] for name in BATCH_KEYS)
    model = base_models.load_base(recipe.model, "float32")
    with torch.no_grad():
        hidden = model.base_model(batch["input_ids"]).last_hidden_state[0]
    want = top_log_probs(hidden, model.lm_head.weight.detach(), 5)
    assert ids.shape == (1, 192, 5)
    torch.testing.assert_close(log_probs[0], want[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(log_tail[0], want[2], rtol=2e-3, atol=1e-4)


def test_the_step_with_it_is_the_exact_step_but_for_the_tail(cached):
    """One step's loss and gate gradients, at several k."""
    recipe = load(cached)
    student = base_models.load_base(recipe.model, "float32")
    retrofit(student, recipe.dms)
    gates = [layer.module.dms_gate.weight for layer in student.dms.layers]
    with torch.no_grad():
        for gate in gates:
            gate.normal_(0, 0.03, generator=torch.Generator().manual_seed(0))
    numbers = [0, 1]
    arguments = {"head_loss": HeadLoss(student, None, beta=0.0, chunk=None), "target": 0.5, "normalizer": Normalizer(384, 2)}

    def step(batch):
        student.zero_grad()
        output = distill_step(student, None, batch, **arguments, seed=0, compression_weight=1.0)
        output.loss.backward()
        return float(output.kl), torch.cat([gate.grad.flatten() for gate in gates])

    exact, gradient = step(batch_of(recipe, numbers))
    assert exact > 1e-3
    differences = []
    for k in (2, 12, 48):
        few = load(cached, teacher_cache={**cached["teacher_cache"], "top_k": k})
        kl, approximate = step(cache_teacher.open_for(few, 1024).add_to(batch_of(recipe, numbers)))
        assert kl < exact * 1.001
        differences.append((1 - kl / exact, float((approximate - gradient).norm() / gradient.norm())))
    # This model is random and its distributions flat: the worst case for a tail of all others.
    assert differences[0][0] > differences[1][0] > differences[2][0] > 0
    assert differences[0][1] > differences[2][1]


@pytest.mark.parametrize("trainable", [pytest.param("gates", marks=pytest.mark.slow), "all"])
def test_runs_share_it_run_no_teacher_and_end_where_exact_ones_do(cached, tmp_path, trainable, monkeypatch):
    changes = {"target_cr": 3, "dms": {"window": 12}, "optimizer": {"lr": 1e-3, "warmup_steps": 1}}
    if trainable == "all":
        changes |= {"trainable": "all", "optimizer": {"lr": 1e-3, "base_lr": 1e-5, "warmup_steps": 1}}
    built, modes, build, step = [], [], models.build, loop.distill_step
    monkeypatch.setattr(models, "build", lambda *args: built.append(build(*args)) or built[-1])

    def watched(student, *args, **kwargs):
        hook = student.dms.decoder.register_forward_pre_hook(lambda *_: modes.append(student.dms.mode))
        try:
            return step(student, *args, **kwargs)
        finally:
            hook.remove()

    plain = {name: value for name, value in cached.items() if name != "teacher_cache"}
    exact = loop.run(load(plain, **changes, output_dir=str(tmp_path / "exact")))
    monkeypatch.setattr(loop, "distill_step", watched)
    found = loop.run(load(cached, **changes, output_dir=str(tmp_path / "cached")))
    # Eight steps of two micro-batches.
    assert modes == ["train"] * 16
    # No copy of the base is held for a pass that is not taken, and yet its scores are there.
    assert [parts.teacher is None for parts in built] == [trainable == "gates", True]
    assert found["policies"]["dense"]["bits_per_byte"] == pytest.approx(exact["policies"]["dense"]["bits_per_byte"], rel=1e-6)
    ours, theirs = (read_metrics(tmp_path / name)[-1] for name in ("cached", "exact"))
    assert ours["cr_decided"] == pytest.approx(theirs["cr_decided"], rel=0.1)
    assert found["policies"]["dms"]["cr_decided"] == pytest.approx(exact["policies"]["dms"]["cr_decided"], rel=0.1)


def test_a_row_is_known_by_its_content(cached):
    ids, segment = torch.arange(10), torch.tensor([1, 1, 1, 2, 2, 2, 2, 3, 0, 0])
    key = sequence_key(ids, segment)
    assert key == sequence_key(ids.int(), torch.where(segment > 0, segment + 4, 0).int())
    others = [
        sequence_key(ids + 1, segment),
        sequence_key(ids, (segment > 0).long()),
        sequence_key(ids, torch.where(segment > 0, segment, 4)),
    ]
    assert len({key, *others}) == 4


def test_as_many_tokens_as_there_are_is_refused_before_anything_is_made(cached, tmp_path):
    with pytest.raises(ValueError, match=r"top_k is 1024 and the vocabulary has 1024 tokens"):
        cache_teacher.write(load(cached, teacher_cache={"path": str(tmp_path / "cache"), "top_k": 1024}))
    assert not (tmp_path / "cache").exists()


def test_files_that_changed_since_are_noticed(cached, tmp_path):
    """Beyond the first step too."""
    data = tmp_path / "texts.jsonl"
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (2 + i % 17) for i in range(60)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = {
        "data": {"source": "jsonl", "path": str(data), "length": 192},
        "teacher_cache": {"path": str(tmp_path / "cache"), "top_k": 8},
    }
    recipe = load(cached, **changes)
    cache_teacher.write(recipe)
    tokenizer = base_models.load_tokenizer(recipe.model)
    cache_teacher.check(recipe, tokenizer, 1024)
    name = cache_teacher.name_of(recipe, tokenizer)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:-1], "other = 1\n" * 40]))
    assert cache_teacher.name_of(recipe, tokenizer) != name


def test_a_run_whose_data_it_lacks_is_refused_before_its_first_step(cached, tmp_path):
    more = load(cached, steps=9, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"lacks 4 of the run's 36 sequences; write it with dms cache-teacher and this recipe"):
        loop.run(more)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="lacks a sequence of this run"):
        cache_teacher.open_for(load(cached), 1024).add_to(batch_of(more, [35]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "was written with precision 'fp32'.* and this recipe has 'bf16'"),
        ({"model": "builtin:tiny"}, r"was written with base_hash '\w+' \(of .*\) and this recipe has '\w+' \(of builtin:tiny\)"),
        ({"top_k": 64}, "teacher_cache.top_k is 64 and .* holds 48 tokens of each distribution; choose 48 or fewer"),
        ({"path": "/nowhere/at/all"}, "holds no teacher cache; write it with dms cache-teacher"),
    ],
)
def test_another_teachers_cache_is_refused(cached, changes, message):
    section = cached["teacher_cache"] | {name: changes[name] for name in ("path", "top_k") if name in changes}
    others = {name: value for name, value in changes.items() if name not in section}
    with pytest.raises(ValueError, match=message):
        cache_teacher.open_for(load(cached, **others, teacher_cache=section), 1024)


def test_damage_is_noticed(cached, tmp_path):
    import shutil

    folder = tmp_path / "cache"
    shutil.copytree(cached["teacher_cache"]["path"], folder)
    recipe = load(cached, teacher_cache={"path": str(folder), "top_k": 48})
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    cache = cache_teacher.open_for(recipe, 1024)
    with pytest.raises(ValueError, match=r"is damaged \(its content is not what was written\); delete it and its .json"):
        cache.add_to(batch_of(recipe, range(32)))
    # One that was cut is as one that is missing, and is written again.
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="lacks 32 of the run's 32 sequences"):
        cache_teacher.check(recipe, base_models.load_tokenizer(recipe.model), 1024)
    with pytest.raises(ValueError, match="lacks 32 of the run's 32 sequences"):
        cache_teacher.open_for(recipe, 1024).check_all(source_of(recipe))
    assert cache_teacher.write(recipe)["written"] == 32
    cache_teacher.open_for(recipe, 1024).add_to(batch_of(recipe, range(32)))
    # And one whose description was not written yet.
    shard.with_suffix(".json").unlink()
    (folder / ".torn.1.new").write_bytes(b"half")
    assert cache_teacher.write(recipe)["there"] == 0


def test_parts_make_one_cache(cached, tmp_path):
    recipe = load(cached, teacher_cache={"path": str(tmp_path / "cache"), "top_k": 48})
    counts = [cache_teacher.write(recipe, part=part, num_parts=3) for part in range(3)]
    assert [count["written"] for count in counts] == [11, 11, 10]
    ours, theirs = (cache_teacher.open_for(r, 1024).add_to(batch_of(recipe, [0, 1, 2, 31])) for r in (recipe, load(cached)))
    for name in BATCH_KEYS:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_foreign_folder_is_left_alone(cached, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    recipe = load(cached, teacher_cache={"path": str(tmp_path), "top_k": 48})
    with pytest.raises(ValueError, match="is not empty and holds no teacher cache; choose another folder"):
        cache_teacher.write(recipe)
    with pytest.raises(
        ValueError, match=r"holds 48 tokens .* teacher_cache.top_k is 8: a smaller number can be read from it, but not added to it"
    ):
        cache_teacher.write(load(cached, teacher_cache={**cached["teacher_cache"], "top_k": 8}))
    plain = {name: value for name, value in cached.items() if name != "teacher_cache"}
    with pytest.raises(ValueError, match=r"names no teacher cache; add teacher_cache.path=FOLDER"):
        cache_teacher.write(load(plain))


_SLOWLY = """
import sys, time
from dms_train import cache_teacher, cli
cache_teacher.SHARD_BYTES = 1
original = cache_teacher._known
cache_teacher._known = lambda *arguments: (time.sleep(0.15), original(*arguments))[1]
sys.argv = ["dms", "cache-teacher", sys.argv[1]]
cli.main()
"""


@pytest.mark.slow
def test_a_killed_writer_goes_on_where_it_was(cached, tmp_path):
    """Cut off by SIGKILL, a shard a micro-batch: what was whole is kept, what was not is written again."""
    folder = tmp_path / "cache"
    values = {**cached, "teacher_cache": {"path": str(folder), "top_k": 48}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", _SLOWLY, str(recipe)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.safetensors"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    # A shard that lacks its description, and one that is half there.
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.with_suffix(".json").unlink()
    (folder / ".torn.1.new").write_bytes(b"half")
    counts = cache_teacher.write(load(values))
    assert 0 < counts["there"] < 32 and counts["written"] + counts["there"] == 32
    untouched = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert all(untouched[name] == when for name, when in before.items() if name != victim.with_suffix(".json").name)
    cache_teacher.open_for(load(values), 1024).check_all(source_of(load(values)))
    assert cache_teacher.write(load(values))["written"] == 0


def test_the_command_refuses_a_part_that_is_none(cached, tmp_path):
    from dms_train.cli import app
    from typer.testing import CliRunner

    for part in ("8/8", "1", "a/b", "-1/2"):
        result = CliRunner().invoke(app, ["cache-teacher", "tiny/retrofit", "--part", part])
        assert isinstance(result.exception, ValueError) and "write I/N with I from 0 to N - 1" in str(result.exception)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.5}, "beta is 0.5, and a teacher cache works for the forward KL only: set beta=0, or remove teacher_cache"),
        ({"offload_activations": True}, "offload_activations has no effect without activation_checkpointing"),
    ],
)
def test_recipes_that_cannot_be_are_refused(cached, change, message):
    with pytest.raises(ValueError, match=message):
        load(cached, **change)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["gates", "all"])
def test_with_weights_divided_by_zero3(cached, tmp_path, trainable):
    pytest.importorskip("deepspeed")
    changes = {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-5, "warmup_steps": 1}} if trainable == "all" else {}
    whole = loop.run(load(cached, **changes, output_dir=str(tmp_path / "whole")))
    job = Job({**cached, **changes, "output_dir": str(tmp_path / "run"), "zero": {"stage": 3, "offload_param": "cpu"}}, 2)
    assert job.wait() == 0, job.output
    ours, theirs = read_metrics(job.folder), read_metrics(tmp_path / "whole")
    for a, b in list(zip(ours, theirs, strict=True))[:4]:
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    result = json.loads((job.folder / "result.json").read_text())
    assert result["policies"]["dense"]["bits_per_byte"] == pytest.approx(whole["policies"]["dense"]["bits_per_byte"], rel=1e-4)
