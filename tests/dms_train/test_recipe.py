import pytest
import yaml
from dms_train.bench_gates import GateComparison
from dms_train.recipe import GenerateRecipe, PretrainRecipe, RetrofitRecipe
from dms_train.recipe_file import dump_recipe, load_recipe, packaged_recipes, parse_yaml

from dms.builtin import recipes_folder
from dms.evaluation.engine.settings import EvaluationSettings

SCHEMAS = {"pretrain": PretrainRecipe, "generate": GenerateRecipe, "evaluate": EvaluationSettings, "compare-gates": GateComparison}


@pytest.fixture
def write(tmp_path, recipe_values):
    def _write(change=None, text=None):
        path = tmp_path / "recipe.yaml"
        values = dict(recipe_values)
        if change:
            change(values)
        path.write_text(text if text is not None else yaml.safe_dump(values))
        return str(path)

    return _write


def refusal(path, *overrides):
    with pytest.raises(ValueError) as caught:
        load_recipe(path, list(overrides), RetrofitRecipe)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_loads(name):
    schema = SCHEMAS.get(name.rpartition("/")[2], RetrofitRecipe)
    recipe = load_recipe(name, [], schema)
    again = yaml.safe_load(dump_recipe(recipe))
    assert schema.model_validate(again) == recipe


def test_the_settings_file_of_an_evaluation_names_all_keys_with_their_defaults():
    loaded = load_recipe("tiny/evaluate", [], EvaluationSettings)
    assert loaded.model_fields_set == set(EvaluationSettings.model_fields)
    assert loaded.model_copy(update={"lengths": []}) == EvaluationSettings()
    # A section that the file switches off is switched on by a key of it.
    assert load_recipe("tiny/evaluate", ["scaling.max_k=3"], EvaluationSettings).scaling.max_k == 3


def test_overrides_are_typed(write):
    recipe = load_recipe(
        write(), ["target_cr=8", "dms.window=3", "optimizer.lr=1e-5", "trainable=all", "optimizer.base_lr=1e-6"], RetrofitRecipe
    )
    assert (recipe.target_cr, recipe.dms.window, recipe.optimizer.lr, recipe.trainable) == (8.0, 3, 1e-5, "all")


def test_unknown_key_names_the_nearest(write):
    assert "did you mean 'target_cr'" in refusal(write(lambda v: v.update(targetcr=4)))


def test_unknown_nested_key_names_the_nearest(write):
    message = refusal(write(lambda v: v["dms"].update(windw=4)))
    assert "windw" in message and "did you mean 'window'" in message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"windw": 4}, "dms: unknown key 'windw' (did you mean 'window'?); allowed: window, gate, granularity,"),
        ({"alignment": "previous"}, "dms: alignment: Input should be 'own' or 'next'; given: 'previous'"),
        (
            {"window": True, "tau": 0.0},
            "dms: tau: Input should be greater than 0; given: 0.0; window: Input should be a valid integer, or a list of them; given: True",
        ),
        (16, "dms: a section of keys and values, such as {window: 16}, is needed; given: 16"),
    ],
)
def test_the_method_s_section_is_strict_too(section, message, write):
    assert message in refusal(write(lambda v: v.update(dms=section)))


def test_the_method_s_section_is_written_out_and_read_again(write):
    recipe = load_recipe(write(), ["dms.offset=4", "dms.granularity=layer"], RetrofitRecipe)
    written = yaml.safe_load(dump_recipe(recipe))["dms"]
    assert written == {"window": 8, "granularity": "layer", "alignment": "own", "tau": 0.1, "scale": 100.0, "offset": 4.0, "sinks": 0}
    assert RetrofitRecipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert RetrofitRecipe.model_validate({**recipe.model_dump(), "dms": recipe.dms}) == recipe


def test_duplicate_key(write, recipe_values):
    message = refusal(write(text=yaml.safe_dump(recipe_values) + "\nsteps: 9\n"))
    assert "'steps' is given twice" in message


def test_wrong_type(write):
    message = refusal(write(lambda v: v.update(steps="many")))
    assert "steps" in message and "'many'" in message


def test_wrong_type_of_override(write):
    assert "steps" in refusal(write(), "steps=2.5")


def test_override_without_equals(write):
    assert "key=value" in refusal(write(), "steps")


def test_target_below_one(write):
    message = refusal(write(), "target_cr=0.5")
    assert "target_cr" in message and "0.5" in message


def test_window_not_below_length(write):
    assert "dms.window is 192" in refusal(write(), "dms.window=192")
    said = refusal(write(), "dms.window=[8,24,192]", "budget=end")
    assert "dms.window is [8, 24, 192]" in said and "decisions of 192 would never count" in said
    assert "dms.window is [192, 200]" in refusal(write(), "dms.window=[192,200]", "budget=end")


def test_unknown_alignment(write):
    message = refusal(write(), "dms.alignment=prev")
    assert "alignment" in message and "'own'" in message and "'next'" in message


def test_missing_key(write):
    assert "'model' is missing" in refusal(write(lambda v: v.pop("model")))


def test_setting_without_effect(write):
    assert "no effect" in refusal(write(), "data.path=x.txt")


def test_the_learning_rate_of_the_base_goes_with_training_it(write):
    assert "base_lr is missing" in refusal(write(), "trainable=all")
    assert "no effect" in refusal(write(), "optimizer.base_lr=1e-4")


def test_unknown_recipe_names_the_nearest():
    assert "did you mean 'tiny/retrofit'" in refusal("tiny/retrofi")


def test_extends_one_level(tmp_path, write):
    base = write()
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {base}\nsteps: 3\ndms: {{window: 5}}\n")
    recipe = load_recipe(str(child), [], RetrofitRecipe)
    assert (recipe.steps, recipe.dms.window, recipe.batch_size) == (3, 5, 4)
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text(f"extends: {child}\n")
    assert "one level" in refusal(str(grandchild))


def test_yaml_traps():
    values = parse_yaml("a: 1e-5\nb: no\nc: 3\nd: true\ne: 1_000\nf: 1.5\ng: -2", "t")
    assert values == {"a": 1e-5, "b": "no", "c": 3, "d": True, "e": 1000, "f": 1.5, "g": -2}
    assert isinstance(values["c"], int) and isinstance(values["a"], float)


def test_recipes_are_packaged():
    assert {"tiny/pretrain", "tiny/retrofit", "llama3.2-1b", "qwen3-8b"} <= set(packaged_recipes())
    assert recipes_folder().joinpath("tiny/model/config.json").is_file()


def test_two_ratios_that_pass_in_one_step_are_refused(write):
    message = refusal(write(lambda v: v.update(save={"at_cr": [2.0, 2.2]})), "steps=4")
    assert "save.at_cr has 2 and 2.2, and the ratio passes both in step 2" in message
