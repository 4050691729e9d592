"""What the teacher cache costs and saves on the embedded model, in figures; -m slow."""

import statistics
import time

import pytest
import torch
from dms_train import cache_teacher, loop
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import load_recipe
from dms_train.step import HeadLoss, Normalizer, distill_step
from jobs import read_metrics

import dms
from dms.io import base_models

STEPS, STORED, USED = 30, 128, 64


@pytest.mark.slow
def test_the_embedded_model_with_and_without(tmp_path, capsys):
    """`tiny/retrofit` for 30 steps of two sequences: the loss at several k against the exact one, seconds a step, bytes a token, where it ends."""

    def recipe(name, *overrides):
        common = [f"steps={STEPS}", "batch_size=2", "evaluation.num_documents=4", "tracking.wandb=off", f"output_dir={tmp_path / name}"]
        return load_recipe("tiny/retrofit", [*common, *overrides], RetrofitRecipe)

    def with_cache(name, top_k):
        return recipe(name, f"teacher_cache.path={tmp_path / 'cache'}", f"teacher_cache.top_k={top_k}")

    lines = []
    start = time.perf_counter()
    counts = cache_teacher.write(with_cache("none", STORED))
    seconds = time.perf_counter() - start
    lines.append(
        f"top {STORED} of 2,048: {counts['bytes'] / counts['tokens']:.0f} bytes a token, {counts['tokens'] / seconds:,.0f} tokens/s to write"
    )

    ends = {}
    for name, chosen in (("exact", recipe("exact")), (f"top {USED}", with_cache("cached", USED))):
        loop.run(chosen)
        metrics = read_metrics(chosen.output_dir)
        ends[name] = metrics[-1]
        step_seconds = statistics.median(m["seconds"] for m in metrics)
        lines.append(
            f"{name}: {step_seconds:.3f} s a step; at step {STEPS} kl {ends[name]['kl']:.4f}, cr decided {ends[name]['cr_decided']:.3f}"
        )

    lines += _losses(tmp_path, with_cache)
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert ends[f"top {USED}"]["cr_decided"] == pytest.approx(ends["exact"]["cr_decided"], rel=0.1)


def _losses(tmp_path, with_cache):
    """The loss of the gates that the exact run trained, and its gradient by them, exact and at several k."""
    student = dms.load(tmp_path / "exact" / "model", dtype="float32")
    student.config.use_cache = False
    student.requires_grad_(False)
    gates = [parameter for layer in student.dms.layers for parameter in layer.module.dms_gate.parameters()]
    for parameter in gates:
        parameter.requires_grad_(True)
    chosen = with_cache("none", STORED)
    rows = list(cache_teacher.sequences_of(chosen, base_models.load_tokenizer(chosen.model)))
    batch = torch.utils.data.default_collate([rows[number] for number in (40, 50)])
    head_loss = HeadLoss(student, None, beta=0.0, chunk=None)

    def step(batch):
        student.zero_grad()
        output = distill_step(
            student, None, batch, head_loss=head_loss, target=0.0, normalizer=Normalizer(2 * 2048, 2), seed=0, compression_weight=1.0
        )
        output.loss.backward()
        return float(output.kl), torch.cat([gate.grad.flatten() for gate in gates])

    # In turns, since a machine is not always as fast.
    cache, taken = cache_teacher.open_for(with_cache("none", USED), 2048), {"exact": [], f"top {USED}": []}
    for _ in range(5):
        for name, seconds in taken.items():
            start = time.perf_counter()
            step(batch if name == "exact" else cache.add_to(batch))
            seconds.append(time.perf_counter() - start)
    yield "seconds a step, median of 5: " + ", ".join(f"{name} {statistics.median(seconds):.3f}" for name, seconds in taken.items())

    exact, gradient = step(batch)
    yield f"loss of the trained gates: exact {exact:.5f}"
    for k in (8, 32, 64, 128):
        kl, approximate = step(cache_teacher.open_for(with_cache("none", k), 2048).add_to(batch))
        error = (approximate - gradient).norm() / gradient.norm()
        yield f"  top {k}: {kl:.5f} ({kl / exact - 1:+.2%}), gradient of the gates off by {error:.2%}"
        assert abs(kl / exact - 1) < 0.5
