"""`dms plan`: what it prints and writes, what it recommends, and what it refuses."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from dms_train import plan_command as planning
from dms_train.cli import app
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import load_recipe
from said import says
from typer.testing import CliRunner

from dms.console import make_console
from dms.costs import hardware
from dms.costs import plan_table as table
from dms.costs.job import Choice, choices
from dms.costs.plan import recipe_lines

CONFIGS = "tests/recipes/configs"
# Of Qwen3-8B: a decision for each of 8 heads and 3 windows, in 36 layers.
_GATES = 36 * 8 * 3 * 4097


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@cache
def plan_of(name, *overrides, gpu="h100-80", num=1):
    return planning.plan(load_recipe(name, list(overrides), RetrofitRecipe), gpu=gpu, num_gpus=num, config=CONFIGS)


def outcome_of(plan, **fields):
    (found,) = [outcome for outcome in plan.outcomes if outcome.choice == Choice(**fields)]
    return found


def test_the_command_prints_and_writes_a_plan(tmp_path):
    result = CliRunner().invoke(app, ["plan", "tiny/retrofit", "steps=10", "--gpu", "rtx4090", "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert says(result.output, "LlamaForCausalLM, 1,049,728 parameters, 3,096 trained")
    assert says(result.output, "10 steps of 2 x 2,048 tokens = 40,960; 1 x NVIDIA GeForce RTX 4090")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["choices"]) == 18 and plan["recommended"]["fits"] and plan["recipe"]["choice"]["stage"] == 0
    kinds = {"weights", "activations", "checkpoints", "loss", "gradients", "optimizer", "buffers", "reserve", "peak", "evaluation", "host"}
    assert kinds <= set(plan["recommended"]["bytes"])
    assert plan["flops_per_step"]["total"] == pytest.approx(sum(value for key, value in plan["flops_per_step"].items() if key != "total"))


def test_every_packaged_retrofit_is_planned_and_nothing_else():
    for name in planning._every():
        load_recipe(name, [], RetrofitRecipe)
    assert {"tiny/retrofit", "qwen3-8b"} <= set(planning._every())


def test_steps_of_a_warm_start_are_counted_whole_and_said_so(capsys):
    common = ("tiny/retrofit", "steps=10", "dms.window=48", "budget=decided")
    plan, warm = plan_of(*common), plan_of(*common, "warm_start={steps: 4, start_cr: 2}")
    assert warm.own.bytes == plan.own.bytes and warm.job.tokens == plan.job.tokens
    # The ratio of the 6 steps of distillation rises from 2 to 4 in 4.8.
    assert warm.job.mean_lifetimes.stay == pytest.approx(sum(1 / (2 + 2 * min(1, step / 4.8)) for step in range(1, 7)) / 6)
    table.show(make_console(), "warm", warm)
    assert says(capsys.readouterr().out, "4 of the steps are those of warm_start") and warm.own.seconds.total < plan.own.seconds.total
    table.show(make_console(), "cold", plan)
    assert "warm_start" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_overview_is_readable_in_a_file(capsys):
    plans = {"deepseek-r1-distill-qwen-1.5b": plan_of("deepseek-r1-distill-qwen-1.5b"), "qwen3-8b": plan_of("qwen3-8b", gpu="h100-80")}
    table.overview(make_console(), plans)
    printed = capsys.readouterr().out
    assert "…" not in printed and "deepseek-r1-distill-qwen-1.5b" in printed
    best = plans["qwen3-8b"].recommended
    assert f"{best.bytes.peak / 1e9:.1f}" in printed and f"{best.gpu_hours:.1f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny/retrofit", "--gpu", "h100"],
            r"unknown GPU 'h100' (did you mean 'h100-80'?); there are h100-80, h200, a100-80, l40s, rtx4090",
        ),
        (["tiny/retrofit", "--gpu", "rtx490"], "did you mean 'rtx4090'"),
        (["tiny/retrofit", "--num", "3"], "batch_size 2 cannot be shared by 3 GPUs with micro_batch_size 1"),
        (["qwen3-8b", "--config", "tests"], "neither a file nor a folder with config.json or Qwen3-8B.json"),
        (["qwen3-8b", "--config", "setup.cfg"], "the configuration of 'Qwen/Qwen3-8B' cannot be read"),
        (["tiny/retrofi"], "did you mean 'tiny/retrofit'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


@pytest.mark.slow
def test_what_does_not_fit_is_recommended_smaller_until_it_does():
    large, small = (plan_of("qwen3-8b", "warm_start=null", gpu=gpu) for gpu in ("h100-80", "rtx4090"))
    kept, checkpointed = outcome_of(large), outcome_of(large, activation_checkpointing=True)
    assert not kept.fits and kept.seconds.total < checkpointed.seconds.total
    assert large.recommended.choice == Choice(activation_checkpointing=True)
    # 24 GB: 16 of weights, and 32K tokens of checkpoints.
    assert not outcome_of(small, activation_checkpointing=True).fits
    assert small.recommended.choice == Choice(stage=3, offload_param=True, activation_checkpointing=True, offload_activations=True)
    assert small.recommended.bytes.host > 16.3e9 + 36 * 32768 * 4096 * 2 * 2
    nothing = plan_of("qwen3-32b", "data.length=40960", gpu="rtx4090")
    assert nothing.recommended is None and recipe_lines(nothing) == []


@pytest.mark.slow
def test_recommended_lines_are_a_recipe_s():
    small = plan_of("qwen3-8b", "warm_start=null", "evaluation={batch_size: 4}", gpu="rtx4090")
    lines = recipe_lines(small)
    assert lines[:3] == ["zero: {stage: 3, offload_param: cpu}", "activation_checkpointing: true", "offload_activations: true"]
    values = yaml.safe_load("\n".join(lines))
    again = load_recipe("qwen3-8b", ["warm_start=null", *(line.replace(": ", "=", 1) for line in lines)], RetrofitRecipe)
    assert planning.choice_of(again) == small.recommended.choice
    # Evaluation at 4 x 32K tokens would hold hundreds of GB of logits; what is recommended fits.
    assert values["evaluation"] == {"batch_size": 1, "length": again.evaluation.length} and again.evaluation.length >= 1024
    fitting = planning.plan(again, gpu="rtx4090", num_gpus=1, config=CONFIGS)
    assert fitting.own.fits and fitting.own.bytes.evaluation <= fitting.gpu.memory < small.recommended.bytes.evaluation


@pytest.mark.slow
def test_bytes_by_kind_of_a_shape_reckoned_by_hand():
    used = outcome_of(plan_of("qwen3-8b"), activation_checkpointing=True).bytes
    assert used.weights == 8_190_735_360 * 2 + _GATES * 4
    # Inputs and attention's outputs of 36 layers in bfloat16; a token's 32 log-sum-exps, norms of 32 queries and of 8 keys.
    assert used.checkpoints == 36 * 32768 * (4096 * 2 + 32 * 128 * 2 + 32 * 4 + 32 * 4 + 8 * 4)
    assert used.gradients == 4 * _GATES and used.optimizer == 8 * _GATES
    assert used.loss <= 1.5e9 + 32768 * 4096 * 2
    divided = outcome_of(plan_of("qwen3-8b", "warm_start=null", num=8), stage=3, activation_checkpointing=True).bytes
    assert divided.weights == used.weights // 8 and divided.checkpoints == used.checkpoints
    shared = outcome_of(plan_of("qwen3-8b", "warm_start=null", num=8), activation_checkpointing=True, sequence_parallel=8).bytes
    assert shared.checkpoints == used.checkpoints // 8 and shared.weights == used.weights
    # Each GPU sizes its loss's chunk for itself; of what it adds the hidden states' gradient alone is shared.
    assert used.loss - shared.loss == 32768 * 4096 * 2 * 7 // 8


def test_a_base_in_4_bits_on_one_gpu_of_24_gb():
    plan = plan_of("qwen3-8b", "quantize=nf4", "warm_start=null", gpu="rtx4090")
    kept, checkpointed, offloaded = (
        outcome_of(plan, **choice)
        for choice in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "offload_activations": True})
    )
    # 36 layers' q, k, v, o and three matrices of the MLP: half a byte a number, a byte for 64, four bytes for 64 * 256, tables for each.
    matrices = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, *[12288 * 4096] * 3]
    packed = 36 * sum(numbers // 2 + numbers // 64 + numbers // 64 // 256 * 4 + 64 + 256 * 4 + 4 for numbers in matrices)
    whole = 8_190_735_360 - 36 * sum(matrices)
    assert (offloaded.bytes.packed, offloaded.bytes.weights) == (packed, packed + 2 * whole + 4 * _GATES)
    # Packed weights have no gradients and no moments.
    assert offloaded.bytes.gradients == 4 * _GATES and offloaded.bytes.optimizer == 8 * _GATES
    # 32K tokens' inputs and attention outputs of 36 layers do not fit beside the weights; in host memory they do.
    assert (kept.fits, checkpointed.fits, offloaded.fits) == (False, False, True)
    assert plan.recommended == offloaded
    assert offloaded.bytes.host > 36 * 32768 * 4096 * 2 * 2
    # DeepSpeed does not handle packed weights.
    assert {outcome.choice.stage for outcome in plan.outcomes} == {0}


def test_the_plan_says_what_is_packed_and_what_would_fit(capsys):
    packed = plan_of("qwen3-8b", "quantize=nf4", "warm_start=null", gpu="rtx4090")
    table.show(make_console(), "qwen3-8b", packed)
    printed = " ".join(capsys.readouterr().out.split())
    assert "the base is packed: 6.95G of its parameters as nf4 in 3.6 GB, scales included, and 1.24G whole" in printed
    assert "offload_activations: true" in printed and "stage: 0" in printed
    nothing = replace(packed, shape=replace(packed.shape, packing=None), recommended=None)
    table.show(make_console(), "qwen3-8b", nothing)
    assert "a base in 4 bits (quantize=nf4), or a shorter data.length" in " ".join(capsys.readouterr().out.split())


def test_several_windows(capsys):
    one = plan_of("tiny/retrofit", "dms.window=24", "budget=end")
    three = plan_of("tiny/retrofit", "dms.window=[24,96,384]", "budget=end")
    assert three.shape.gates == 3 * one.shape.gates
    # The same target of entries at the end: windows hold what then need not stay.
    assert three.job.mean_lifetimes.stay < one.job.mean_lifetimes.stay
    length = one.job.length
    assert three.job.mean_lifetimes.entries(length) == pytest.approx(one.job.mean_lifetimes.entries(length))
    kept = [plan.job.mean_lifetimes.pairs(length) for plan in (one, three)]
    assert three.flops.student_attention / one.flops.student_attention == pytest.approx(kept[1] / kept[0])
    values = json.loads(json.dumps(three.as_dict()))
    assert values["job"]["window"] == values["lifetimes"]["windows"] == [24, 96, 384] and values["job"]["budget"] == "end"
    table.show(make_console(), "tiny/retrofit", three)
    assert says(
        capsys.readouterr().out, "assumed of tokens, in the mean over the steps: 21% after 24, 21% after 96, 21% after 384, and 36% stay"
    )


def test_a_quantised_checkpoint_is_planned_as_it_lies_in_memory(tmp_path):
    config = json.loads(Path(CONFIGS, "Qwen3-0.6B.json").read_text()) | {"num_hidden_layers": 2}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.0"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    short = ["data.length=512", "dms.window=16", "evaluation.length=256", "warm_start=null"]

    def planned(*overrides):
        return planning.plan(
            load_recipe("qwen3-0.6b", [*short, *overrides], RetrofitRecipe), gpu="rtx4090", num_gpus=1, config=str(tmp_path)
        )

    plan = planned()
    layer = plan.shape.layers[1].linear
    assert plan.shape.num_packed == layer
    # A byte a number, and a float32 for each output: 2048 of q, 1024 of k and v, 1024 of o, 3072 of gate and up, 1024 of down.
    assert plan.shape.packed_bytes == layer + 4 * (2048 + 1024 + 1024 + 1024 + 3072 + 3072 + 1024)
    with pytest.raises(ValueError, match=r"quantize is nf4, and .* are quantised already \(bitsandbytes\); leave quantize out"):
        planned("quantize=nf4")
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes int8\), and DeepSpeed does not handle packed weights"):
        planned("zero={stage: 2}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ValueError, match="quantised by 'hqq', whose bytes are not known here"):
        planned()
    # As the run refuses it, though loading unpacks these.
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ValueError, match=r"quantised already \(mxfp4\)"):
        planned("quantize=nf4")


@pytest.mark.slow
def test_int8_keeps_its_inputs_whatever_is_checkpointed():
    values = ("quantize=int8", "data.length=2048", "dms.window=16", "evaluation.length=512")
    kept, plain = (plan_of("qwen3-0.6b", *values[start:], gpu="rtx4090") for start in (0, 1))
    more = (
        outcome_of(kept, activation_checkpointing=True).bytes.checkpoints
        - outcome_of(plain, activation_checkpointing=True).bytes.checkpoints
    )
    # Two normed hidden states and the MLP's product, in bfloat16; attention's output is kept anyway, and before the first nothing trains.
    assert more == (28 * (1024 + 1024 + 3072) - 1024) * 2048 * 2
    offloaded = outcome_of(kept, activation_checkpointing=True, offload_activations=True).bytes
    assert offloaded.checkpoints > more


@pytest.mark.slow
def test_adapters_on_a_packed_base_make_it_whole_for_the_evaluation():
    values = ("data.length=512", "dms.window=16", "evaluation.length=256", "trainable=gates+lora", "optimizer.base_lr=1e-5")
    packed, plain = (plan_of("qwen3-0.6b", *quantize, *values, gpu="rtx4090") for quantize in (("quantize=nf4",), ()))
    assert packed.own.bytes.weights < plain.own.bytes.weights
    assert packed.own.bytes.evaluation > 2 * packed.shape.parameters


@pytest.mark.slow
def test_casts_of_weights_are_whole_on_every_gpu_that_shares_a_row():
    plan = plan_of("llama3.2-1b-all", "micro_batch_size=1", num=8)
    whole, shared = (outcome_of(plan, stage=2, sequence_parallel=width).bytes for width in (1, 8))
    casts = 2 * sum(layer.linear for layer in plan.shape.layers)
    assert shared.activations == pytest.approx(casts + (whole.activations - casts) / 8, rel=0.01)
    head = plan.shape.vocab_size * plan.shape.hidden_size
    # The head's gradient, and two casts of heads, the teacher's among them.
    assert shared.loss > 4 * head + 2 * 2 * head


def test_host_memory_is_pinned_in_powers_of_two():
    # 24576 tokens: every tensor of 3 * 2**n bytes takes 4 * 2**n.
    plan = plan_of("qwen3-8b", "data.length=24576", "zero={stage: 2}", "warm_start=null")
    kept = outcome_of(plan, stage=2, activation_checkpointing=True).bytes.checkpoints
    assert outcome_of(plan, stage=2, activation_checkpointing=True, offload_activations=True).bytes.host == kept * 4 // 3


@pytest.mark.slow
def test_divided_gradients_are_sent_after_every_micro_step():
    plan = plan_of("llama3.1-8b-all", "batch_size=64", num=8)
    plain, divided = (outcome_of(plan, stage=stage, activation_checkpointing=True).seconds.links for stage in (0, 2))
    once = 7 / 8 * 4 * plan.trained / (450e9 * 0.8)
    assert plain == pytest.approx(2 * once) and divided == pytest.approx((64 // 8 + 1) * once)


def test_every_weight_trained_holds_a_teacher_and_moments():
    plan = plan_of("llama3.2-1b-all", num=8)
    plain, divided = outcome_of(plan, activation_checkpointing=True).bytes, outcome_of(plan, stage=2, activation_checkpointing=True).bytes
    trained = plan.trained
    assert plain.weights == pytest.approx(8 * 1_235_814_400, rel=1e-3) and plain.optimizer == 8 * trained
    # DeepSpeed keeps a float32 copy of what it steps; all of it is divided.
    assert divided.optimizer == 12 * trained // 8 and divided.gradients == 4 * trained // 8
    offloaded = outcome_of(plan, stage=2, offload_optimizer=True, activation_checkpointing=True).bytes
    assert offloaded.optimizer == 0 and offloaded.host == 8 * (12 * trained // 8 + 4 * trained // 8)


def test_the_host_link_binds_where_weights_come_over_it_for_little_work():
    short = plan_of(
        "qwen3-8b", "warm_start=null", "data.length=1024", "dms.window=16", "evaluation.length=1024", "batch_size=1", gpu="rtx4090"
    )
    offloaded = outcome_of(short, stage=3, offload_param=True, activation_checkpointing=True)
    # 16.4 GB four times: teacher, student, recomputation, backward.
    assert offloaded.seconds.limit == "host"
    assert offloaded.seconds.host == pytest.approx(4 * 16.38e9 / (32e9 * 0.8), rel=0.01)


@pytest.mark.slow
def test_a_cached_teacher_takes_no_pass():
    with_pass, without = plan_of("qwen3-8b"), plan_of("qwen3-8b", "teacher_cache={path: cache}")
    assert without.flops.teacher == without.flops.teacher_attention == 0.0
    assert without.flops.loss == pytest.approx(with_pass.flops.loss * 2 / 3)
    assert without.own.seconds.total < with_pass.own.seconds.total


def test_experts_in_float32_are_refused():
    with pytest.raises(ValueError, match="experts, which are planned in bfloat16 alone; set precision=bf16"):
        plan_of("gpt-oss-20b", "precision=fp32")


def test_choices_are_those_that_divide():
    job, widths = planning.job_of(load_recipe("qwen3-8b", [], RetrofitRecipe)), [1, 2, 4, 8]
    # DeepSpeed does not run steps on labels, and a run with both is refused.
    assert {choice.stage for choice in choices(job, widths, 8)} == {0}
    job = replace(job, warm_up_steps=0)
    assert {choice.stage for choice in choices(job, widths, 8)} == {0, 2, 3}
    assert {choice.sequence_parallel for choice in choices(job, widths, 8)} == {1, 2, 4, 8}
    assert {choice.sequence_parallel for choice in choices(job, [1, 2], 8)} == {1, 2}
    # 16 GPUs and 8 sequences: two GPUs to each at least.
    assert {choice.sequence_parallel for choice in choices(job, widths, 16)} == {2, 4, 8}


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        # 40 query heads could be shared by 8, 10 KV heads by 1, 2 (and 5) alone.
        ({"num_attention_heads": 40, "num_key_value_heads": 10}, {1, 2}),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, {1, 2, 4}),
        ({"max_position_embeddings": 30}, {1, 2}),
    ],
)
def test_rows_are_shared_only_as_a_run_would(tmp_path, changes, widths):
    config = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8, "hidden_size": 480, "num_hidden_layers": 2}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 64, "vocab_size": 128} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    length = changes.get("max_position_embeddings", 256)
    recipe = load_recipe("qwen3-8b", [f"data.length={length}", "dms.window=16", "budget=decided"], RetrofitRecipe)
    plan = planning.plan(recipe, gpu="h100-80", num_gpus=8, config=str(tmp_path))
    assert {outcome.choice.sequence_parallel for outcome in plan.outcomes} == widths


def test_hardware_is_whole_and_strict():
    known = hardware.load()
    assert set(known.gpus) == {"h100-80", "h200", "a100-80", "l40s", "rtx4090"}
    named = [name for gpu in known.gpus.values() for name in gpu.device_names]
    assert len(set(named)) == len(named)
    for gpu in known.gpus.values():
        assert gpu.flops.bf16 == gpu.flops.fp16 and all(source.startswith("https://") for source in gpu.sources)
    assert known.gpu("h100-80").link(8) == 450e9 and known.gpu("h100-80").link(16) == 50e9 and known.gpu("l40s").link(2) == 32e9
    with pytest.raises(ValueError, match="unknown key 'memry'"):
        hardware.read(asdict(known) | {"gpus": {"l40s": asdict(known.gpu("l40s")) | {"memry": 1.0}}})
    with pytest.raises(ValueError, match=r"hardware.attainable.compute is -1; give a number above 0"):
        hardware.read(asdict(known) | {"attainable": {"compute": -1, "memory": 0.5, "links": 0.5}})
    with pytest.raises(ValueError, match="hardware: key 'gpus' is missing"):
        hardware.read({name: value for name, value in asdict(known).items() if name != "gpus"})
    assert hardware.read(asdict(known)) == known


def test_every_packaged_retrofit_is_among_all():
    from dms_train import plan_command as planning
    from dms_train.recipe import RetrofitRecipe
    from dms_train.recipe_file import load_recipe

    names = planning._every()
    assert {"tiny/retrofit", "qwen3-8b", "llama3.1-8b-all"} <= set(names)
    for name in names:
        load_recipe(name, [], RetrofitRecipe)
