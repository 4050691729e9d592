"""Every packaged recipe: it loads, its model can carry gates, its plan fits the hardware that its header names, with those figures.

The models' configurations are written down in `configs`, so that nothing is fetched.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from dms_train import plan_command as planning
from dms_train.recipe import RetrofitRecipe
from dms_train.recipe_file import find_recipe, load_recipe, packaged_recipes

from dms.costs.plan import Plan
from dms.evaluation.engine.settings import EvaluationSettings

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(name for name in packaged_recipes() if "/" not in name)
# Every weight of a dense model, and experts with sinks. The others are planned among the slow tests.
PLANNED = ("llama3.1-8b-all", "gpt-oss-20b")
SOME_FAST = [name if name in PLANNED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
# What the models' pages say, or their safetensors files hold.
PARAMETERS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "gpt-oss-20b": 20_914_757_184,
    "Mistral-7B-v0.3": 7_248_023_552,
    "gemma-3-4b-pt": 4_300_079_472,
}
_HEADER = re.compile(
    r"^# Hardware: (\d+) x H100 80 GB, (\d+) GB of each in training and (\d+) in evaluation(?:, (\d+) GB of host memory)?;", re.M
)
_HOURS = re.compile(r"([\d.]+) s a step, ([\d.]+) GPU hours of steps")


@cache
def load(name: str) -> RetrofitRecipe:
    return load_recipe(name, [], RetrofitRecipe)


@cache
def plan_of(name: str) -> Plan:
    num_gpus = 8 if "32b" in name or "-all" in name else 1
    return planning.plan(load(name), gpu="h100-80", num_gpus=num_gpus, config=str(CONFIGS))


def header(plan: Plan) -> str:
    """The line that a recipe begins with."""
    used, seconds = plan.own.bytes, plan.own.seconds
    host = f", {used.host / 1e9:.0f} GB of host memory" if used.host > 1e9 else ""
    return (
        f"# Hardware: {plan.num_gpus} x H100 80 GB, {used.peak / 1e9:.0f} GB of each in training and {used.evaluation / 1e9:.0f} in evaluation{host}; "
        f"{seconds.total:.1f} s a step, {plan.own.gpu_hours:.1f} GPU hours of steps.\n# These are `dms plan`'s figures; not yet run."
    )


def text_of(name: str) -> str:
    return find_recipe(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SOME_FAST)
def test_its_plan_fits_and_is_what_its_header_says(name):
    plan = plan_of(name)
    assert plan.own is not None and plan.own.fits and plan.own.bytes.evaluation <= plan.gpu.memory
    text = text_of(name)
    found, hours = _HEADER.search(text), _HOURS.search(text)
    assert found and hours, header(plan)
    num_gpus, training, evaluation, host = (float(figure or 0) for figure in found.groups())
    used = plan.own.bytes
    stated = (num_gpus, training, evaluation, host, *(float(figure) for figure in hours.groups()))
    planned = (plan.num_gpus, used.peak / 1e9, used.evaluation / 1e9, used.host / 1e9, plan.own.seconds.total, plan.own.gpu_hours)
    # Rounded as they are written.
    assert stated == pytest.approx(planned, rel=0.05, abs=0.5), header(plan)


@pytest.mark.parametrize("name", SOME_FAST)
def test_its_model_carries_gates(name):
    recipe, plan = load(name), plan_of(name)
    basename = recipe.model.rpartition("/")[2]
    text = json.loads((CONFIGS / f"{basename}.json").read_text())
    text = text.get("text_config", text)
    shape = plan.shape
    assert shape.parameters == PARAMETERS[basename]
    sliding = {"gpt-oss-20b": 12, "gemma-3-4b-pt": 29}.get(basename, 0)
    assert shape.num_gated == text["num_hidden_layers"] - sliding
    outputs = text["num_key_value_heads"] * len(recipe.dms.windows)
    assert shape.gates == shape.num_gated * outputs * (text["hidden_size"] + 1)
    assert recipe.data.length <= text["max_position_embeddings"]
    assert plan.trained == shape.gates + (shape.parameters if recipe.trainable == "all" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_says_what_it_needs(name):
    text = text_of(name)
    recipe = load(name)
    assert len(text.splitlines()) <= 30
    assert "Data: " in text and "Model: " in text and "CR 8, with a snapshot at CR 4" in text
    assert recipe.target_cr == 8 and recipe.save.at_cr == [4]
    assert recipe.output_dir == f"runs/{name}"


@pytest.mark.parametrize(
    "name", [pytest.param("llama3.2-1b", marks=pytest.mark.slow), "gpt-oss-20b", pytest.param("gemma3-4b", marks=pytest.mark.slow)]
)
def test_active_experts_are_computed_and_all_are_held(name):
    shape = plan_of(name).shape
    computed = sum(layer.linear for layer in shape.layers)
    held = sum(layer.num_parameters for layer in shape.layers)
    if name == "gpt-oss-20b":
        # 4 of 32 experts; the model's page speaks of 3.6e9 active parameters, embeddings among them.
        assert 2.9e9 < computed + shape.vocab_size * shape.hidden_size < 3.7e9 < 19e9 < held
    else:
        assert 0.99 < computed / held < 1.0


def test_the_wanted_recipes_are_there():
    wanted = {f"llama3.{size}" for size in ("2-1b", "2-3b", "1-8b", "2-1b-all", "1-8b-all")}
    wanted |= {f"qwen3-{size}" for size in ("0.6b", "1.7b", "8b", "32b")} | {"gpt-oss-20b", "mistral-7b", "gemma3-4b"}
    assert set(NAMES) == wanted | {f"deepseek-r1-distill-qwen-{size}" for size in ("1.5b", "7b", "32b")}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("folder", ["smollm2-135m", "gemma3-270m"])
def test_recipes_of_fetched_models_train_and_evaluate_on_what_is_fetched(folder):
    recipe, text = load(f"{folder}/retrofit"), text_of(f"{folder}/retrofit")
    scripts = Path(__file__).parents[2] / "scripts"
    table = [line.split("|") for line in (scripts / "fetch_model.sh").read_text().splitlines() if line.count("|") == 6]
    assert [recipe.model] == [f"models/{row[1]}" for row in table if row[0] == folder]
    assert f"scripts/fetch_model.sh {folder}" in text and "scripts/fetch_text.sh" in text
    assert "Data: " in text and "Model: " in text and "Hardware: 2 CPU cores" in text and len(text.splitlines()) <= 30
    assert [source.path for source in recipe.data.all_sources] == ["text/train.jsonl", None]
    assert load_recipe(f"{folder}/evaluate", [], EvaluationSettings).text == "text/heldout.jsonl"
    # Checkpoints of a run that may be stopped at any time, and windows that count at the lengths that are evaluated.
    assert 0 < recipe.save.every <= 20 and recipe.dms.windows[-1] < recipe.data.length == 2048
    assert recipe.labels_cr == 4 > recipe.start_cr


def test_adapters_of_gemma3_270m_go_on_from_its_gates():
    first, second = load("gemma3-270m/retrofit"), load("gemma3-270m/retrofit-lora")
    assert second.trainable == "gates+lora" and second.warm_start is None
    assert second.gates.path == f"{first.output_dir}/gates" and second.output_dir != first.output_dir
    assert (second.gates.start_cr, second.target_cr) == (first.target_cr, first.target_cr)
    assert (second.model, second.dms) == (first.model, first.dms)
