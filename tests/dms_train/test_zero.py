"""DeepSpeed's ZeRO on CPU processes: the same run, divided; and what it does not hold."""

import functools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from dms_train import cache_teacher, engine, loop, preflight
from dms_train.recipe import RetrofitRecipe
from dms_train.run_folder import RunFolder
from jobs import Job, read_metrics, trajectory
from rich.console import Console
from safetensors.torch import load_file
from said import says
from small_models import wider_model

pytest.importorskip("deepspeed")

# The same course for all: how the run is divided among two processes, and what trains.
STEPS = 12
ZERO = {
    "zero2": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "zero3": {"zero": {"stage": 3, "offload_param": "cpu"}},
    "zero3-both": {"zero": {"stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"}},
}
DIVIDED = {
    # Two micro-batches a step on each process.
    "ddp": {"micro_batch_size": 1},
    "zero2": {**ZERO["zero2"], "micro_batch_size": 1},
    "zero3": {**ZERO["zero3"], "micro_batch_size": 1, "activation_checkpointing": True},
    "zero3-both": ZERO["zero3-both"],
    # Both processes have half of every row.
    "rows": {"sequence_parallel": 2},
    "rows-zero3": {**ZERO["zero3-both"], "sequence_parallel": 2, "micro_batch_size": 1, "activation_checkpointing": True},
}
TRAINS = {
    "gates": {},
    "gates+lora": {"trainable": "gates+lora", "optimizer": {"lr": 2e-3, "base_lr": 1e-3, "warmup_steps": 1}, "lora": {"rank": 4}},
    "all": {"trainable": "all", "optimizer": {"lr": 2e-3, "base_lr": 1e-4, "warmup_steps": 1}},
}


def assert_same_course(folder, whole, steps):
    """The KL to rounding: masks are of probabilities, and hard decisions only count what is evicted. Later, rounding has grown."""
    ours, theirs = read_metrics(folder), read_metrics(whole)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.02) and a["tokens"] == b["tokens"]
    for a, b in list(zip(ours, theirs, strict=True))[:8]:
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-7)
        # Three of a step's 3,072 decisions, each of which rounding may turn.
        assert a["compression_loss"] == pytest.approx(b["compression_loss"], abs=1e-3)
    for a, b in list(zip(ours, theirs, strict=True))[:5]:
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.fixture(scope="module")
def alone(make_values, tmp_path_factory):
    """alone(trains): folder and result of the run on one process, in this one."""

    @functools.cache
    def run(trains):
        folder = tmp_path_factory.mktemp("alone") / "run"
        return folder, loop.run(RetrofitRecipe.model_validate(make_values(folder, steps=STEPS, **TRAINS[trains])))

    return run


@pytest.fixture(scope="module")
def divided(make_values, tmp_path_factory):
    """divided(how, trains): the finished job of the run on two processes."""

    @functools.cache
    def run(how, trains):
        job = Job(make_values(tmp_path_factory.mktemp("divided") / "run", steps=STEPS, **TRAINS[trains], **DIVIDED[how]), 2)
        assert job.wait() == 0, job.output
        return job

    return run


@pytest.mark.parametrize(
    ("how", "trains"),
    [
        pytest.param("zero3", "gates", marks=pytest.mark.slow),
        pytest.param("ddp", "gates", marks=pytest.mark.slow),
        pytest.param("rows", "gates", marks=pytest.mark.slow),
        pytest.param("zero2", "gates", marks=pytest.mark.slow),
        pytest.param("rows", "all", marks=pytest.mark.slow),
        pytest.param("rows-zero3", "gates", marks=pytest.mark.slow),
        pytest.param("zero2", "all", marks=pytest.mark.slow),
        pytest.param("zero3-both", "all", marks=pytest.mark.slow),
        pytest.param("zero2", "gates+lora", marks=pytest.mark.slow),
        pytest.param("zero3", "gates+lora", marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_same_course_as_one(alone, divided, how, trains):
    (whole, expected), folder = alone(trains), divided(how, trains).folder
    assert_same_course(folder, whole, STEPS)
    result = json.loads((folder / "result.json").read_text())
    for policy in ("dense", "dms"):
        assert result["policies"][policy]["bits_per_byte"] == pytest.approx(expected["policies"][policy]["bits_per_byte"], rel=1e-2)
    # What is written is whole, and the frozen part of it the base itself.
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, whole))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    if trains == "gates":
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    if "zero" in DIVIDED[how]:
        config = json.loads((folder / "deepspeed.json").read_text())
        assert config["zero_optimization"]["stage"] == DIVIDED[how]["zero"]["stage"] and "bf16" not in config


@pytest.mark.parametrize(
    ("killed", "how", "trains"),
    [
        pytest.param("rank 1", "zero2", "gates", marks=pytest.mark.slow),
        pytest.param("launcher", "zero2", "all", marks=pytest.mark.slow),
        pytest.param("launcher", "zero3-both", "gates+lora", marks=pytest.mark.slow),
        pytest.param(None, "zero3", "gates", marks=pytest.mark.slow),
    ],
)
def test_a_divided_run_goes_on_exactly(make_values, tmp_path, divided, killed, how, trains):
    """After SIGKILL of one of its processes or of the launcher, or after SIGUSR1, which saves."""
    whole = divided(how, trains)
    values = make_values(tmp_path / "run", steps=STEPS, save={"every": 3}, **TRAINS[trains], **DIVIDED[how])
    job = Job(values, 2)
    job.wait_for_step(5)
    if killed == "rank 1":
        os.kill(job.ranks[1], signal.SIGKILL)
        assert job.wait(60) == 137, job.output
        assert re.search(r"rank 1 .* killed by SIGKILL", job.output) and says(job.output, "the run can be continued from")
    else:
        assert job.send(signal.SIGKILL if killed else signal.SIGUSR1).wait() == (-9 if killed else 75), job.output
    again = Job(values, 2)
    assert again.wait() == 0, again.output
    assert says(again.output, "continuing after step")
    assert trajectory(job.folder) == trajectory(whole.folder)
    manifests = [json.loads(path.read_text()) for path in sorted(job.folder.glob("checkpoints/*/manifest.json"))]
    assert len({manifest["frozen"] for manifest in manifests}) == 1
    assert {path.suffix for path in job.folder.glob("checkpoints/*/*")} == {".json", ".safetensors"}
    # One process alone cannot go on.
    (job.folder / "result.json").unlink()
    recipe = RetrofitRecipe.model_validate(values)
    with (
        RunFolder(job.folder, recipe, Console()) as run_folder,
        pytest.raises(ValueError, match=r"was written by 2 processes and there are 1.*start 2 processes"),
    ):
        run_folder.decide(1, preflight.base_hash(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("caches", [False, True])
def test_packed_rows_that_processes_share_take_the_same_course(make_values, tmp_path, caches):
    """Everything for long rows at once: documents across the border, checkpoints in host memory, the teacher read from disk."""
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (2 + i % 17) for i in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changes = {"data": {"source": "jsonl", "path": str(path), "length": 192}, "evaluation": {"num_documents": 4, "num_items": 2}}
    if caches:
        changes["teacher_cache"] = {"path": str(tmp_path / "teacher"), "top_k": 64}
        cache_teacher.write(RetrofitRecipe.model_validate(make_values(tmp_path / "whole", **changes)))
    whole = tmp_path / "whole"
    loop.run(RetrofitRecipe.model_validate(make_values(whole, **changes)))
    divided = {"sequence_parallel": 2, "activation_checkpointing": True, "offload_activations": True}
    job = Job(make_values(tmp_path / "run", **changes, **divided), 2)
    assert job.wait() == 0, job.output
    assert_same_course(job.folder, whole, 8)
    assert max(m["kl"] for m in read_metrics(job.folder)) > 1e-4


@pytest.mark.slow
def test_a_teacher_of_another_width_is_divided(make_values, tiny_folder, tmp_path):
    teacher = wider_model(tmp_path / "teacher", tiny_folder)
    values = {"steps": STEPS, "teacher": teacher}
    whole = tmp_path / "whole"
    loop.run(RetrofitRecipe.model_validate(make_values(whole, **values)))
    job = Job(make_values(tmp_path / "run", **values, **DIVIDED["zero3"]), 2)
    assert job.wait() == 0, job.output
    assert_same_course(job.folder, whole, STEPS)
    assert min(m["kl"] for m in read_metrics(job.folder)) > 0.01
    found = re.search(r"of the teacher's ([\d,]+) bytes of weights the first process holds ([\d,]+)", " ".join(job.output.split()))
    num_bytes, held = (int(number.replace(",", "")) for number in found.groups())
    # Small tensors stay whole.
    assert num_bytes == sum(t.nbytes for t in load_file(f"{teacher}/model.safetensors").values()) and held <= 0.6 * num_bytes


def test_the_configuration_names_only_what_deepspeed_knows(make_values, tmp_path):
    """DeepSpeed passes over keys that it does not know; ours must not be among them."""
    from deepspeed.runtime import config as known_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    text = Path(known_config.__file__).read_text() + Path(known_config.__file__).with_name("constants.py").read_text()
    for changes in (
        {},
        *ZERO.values(),
        {"zero": {"stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme", "nvme_path": "/x"}, "save": {"every": 0}},
    ):
        derived = engine.deepspeed_config(RetrofitRecipe.model_validate(make_values(tmp_path / "run", **changes)), 2)
        assert not [key for key in derived if f'"{key}"' not in text]
        section = derived["zero_optimization"]
        DeepSpeedZeroConfig(**section)
        known = {name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)}
        assert set(section) <= known
        assert derived["train_batch_size"] == derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 2


def test_an_optimizer_on_nvme_is_not_saved_and_says_so(make_values, tmp_path):
    zero = {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/x"}
    with pytest.raises(ValueError, match="an optimizer on nvme cannot be saved yet"):
        RetrofitRecipe(**make_values(tmp_path / "run", zero=zero))
    assert RetrofitRecipe(**make_values(tmp_path / "run", zero=zero, save={"every": 0})).zero.offloads_to_nvme


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 1}, "0, 2 or 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "no effect with zero.stage 0"),
        ({"stage": 2, "offload_param": "cpu"}, "needs stage 3"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/x"}, "needs stage 3"),
        ({"stage": 3, "offload_param": "nvme"}, "nvme_path is missing"),
        ({"stage": 3, "nvme_path": "/x"}, "no effect without nvme"),
        ({"stage": 3, "offload_params": "cpu"}, "did you mean 'offload_param'"),
    ],
)
def test_contradictions_are_refused(make_values, tmp_path, zero, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RetrofitRecipe(**make_values(tmp_path / "run", zero=zero))


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"sequence_parallel": 4}, 2, "sequence_parallel is 4, and there are 2 processes"),
        ({"sequence_parallel": 2, "batch_size": 6}, 8, "not a multiple of micro_batch_size x processes / sequence_parallel = 2 x 8 / 2"),
        ({"batch_size": 6}, 2, "not a multiple of micro_batch_size x processes = 2 x 2"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(make_values, tmp_path, changes, processes, message):
    recipe = RetrofitRecipe.model_validate(make_values(tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=message):
        engine.check_batch(recipe, processes)


def test_rows_that_processes_cannot_divide_are_refused(make_values, tmp_path):
    with pytest.raises(ValueError, match=r"data\.length 192 is not a multiple of sequence_parallel 5"):
        RetrofitRecipe(**make_values(tmp_path / "run", sequence_parallel=5))


def test_without_a_compiler_the_offloaded_optimizer_is_torchs_and_says_so(make_values, tmp_path, monkeypatch, capsys):
    recipe = RetrofitRecipe.model_validate(make_values(tmp_path / "run", **ZERO["zero2"]))
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "peak_lr": 1.0}]
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    assert type(engine.make_optimizer(groups, recipe, Console())) is torch.optim.AdamW
    assert says(capsys.readouterr().out, "slower than DeepSpeed's: g++ and ninja not on PATH")


@pytest.fixture
def build_lock(tmp_path, monkeypatch):
    """The lock of a build of DeepSpeed's Adam that nobody is at."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    lock = tmp_path / "py_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # PyTorch would wait for the lock in here, without an end.
    monkeypatch.setattr(CPUAdamBuilder, "load", lambda self, verbose: (not lock.exists()) or pytest.fail("loads under a lock"))
    return lock


def test_waiting_for_another_build_is_said(build_lock, capsys):
    timer = threading.Timer(0.5, build_lock.unlink)
    timer.start()
    assert engine._why_no_compiled_adam(Console()) is None
    timer.join()
    assert says(capsys.readouterr().out, f"another process that builds DeepSpeed's CPUAdam; if none does, delete {build_lock}")


def test_a_lock_of_a_killed_build_is_removed(build_lock, capsys):
    os.utime(build_lock, (time.time() - 601,) * 2)
    assert engine._why_no_compiled_adam(Console()) is None
    assert not build_lock.exists() and says(capsys.readouterr().out, f"removed {build_lock}: 601 s old")


@pytest.mark.parametrize(
    ("how", "minutes"), [pytest.param("ddp", 0.1, marks=pytest.mark.slow), pytest.param("zero3", 0.2, marks=pytest.mark.slow)]
)
def test_waiting_for_a_process_ends_after_the_recipes_timeout(make_values, tmp_path, how, minutes):
    """That DeepSpeed's groups have it as well is a test of compat.set_world_group."""
    job = Job(make_values(tmp_path / "run", steps=4000, timeout_minutes=minutes, **DIVIDED[how]), 2, "--grace", "1")
    job.wait_for_step(3)
    os.kill(job.ranks[1], signal.SIGSTOP)
    assert job.wait(90) == 1
    assert "Timed out" in job.output, job.output


@pytest.mark.slow
def test_weights_are_divided_from_loading_on(make_values, tmp_path, tiny_folder):
    """A 40 M model: what a process holds at the start, and the most that it ever held."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, max_position_embeddings=512, pad_token_id=1, **shape)).save_pretrained(folder)
    whole = sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values())
    job = Job(make_values(tmp_path / "run", model=str(folder), steps=2, zero={"stage": 3}), 2)
    assert job.wait() == 0, job.output
    found = re.search(r"of ([\d,]+) bytes of weights the first process holds ([\d,]+)", " ".join(job.output.split()))
    held = int(found[2].replace(",", ""))
    assert int(found[1].replace(",", "")) >= whole > 100e6
    assert held <= 0.6 * whole
    saved = sum(path.stat().st_size for path in job.folder.glob("checkpoints/step_000002/*"))
    assert saved < 1e6
