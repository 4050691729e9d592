"""The command: bad input is one line on stderr and exit code 2, before any work; good input works end to end."""

import io
import json
import shutil
import sys

import pytest
import yaml
from said import says

from dms.io import base_models


@pytest.fixture
def recipe(recipe_values, tmp_path):
    def _recipe(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe_values, **changes}))
        return path

    return _recipe


def assert_refused(result, *parts):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("dms: ") and not line.startswith("dms: warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("dms: error: "), err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["target_crr=4"], ["unknown key 'target_crr'", "did you mean 'target_cr'"]),
        (["dms.windw=4"], ["windw", "did you mean 'window'"]),
        (["steps=two"], ["steps", "'two'"]),
        (["target_cr=0.5"], ["target_cr", "greater than or equal to 1"]),
        (["dms.alignment=previous"], ["alignment", "'own'"]),
        (["dms.window=4096"], ["dms.window is 4096", "window"]),
        (["data.length=1024"], ["data.length is 1024", "512 tokens"]),
        (["model=/nowhere/model"], ["/nowhere/model", "not a folder"]),
        (["model=builtin:tine"], ["builtin:tine"]),
        (["data={source: jsonl, path: /nowhere.jsonl, length: 64}"], ["/nowhere.jsonl", "matches no"]),
        (["micro_batch_size=3"], ["batch_size 4", "3"]),
    ],
)
def test_bad_recipes_are_refused_before_any_work(run_dms, recipe, tmp_path, overrides, parts):
    assert_refused(run_dms("retrofit", recipe(), *overrides), *parts)
    assert not (tmp_path / "run").exists()


def test_duplicate_key(run_dms, recipe):
    path = recipe()
    path.write_text(path.read_text() + "steps: 3\n")
    assert_refused(run_dms("retrofit", path), "'steps' is given twice")


def test_recipe_that_is_not_there(run_dms):
    assert_refused(run_dms("retrofit", "tiny/retrofitt"), "tiny/retrofitt", "did you mean 'tiny/retrofit'")


def test_a_damaged_model(run_dms, recipe, tiny_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert_refused(run_dms("retrofit", recipe(model=str(broken))), "broken", "is damaged")


def test_a_model_folder_without_tokenizer(run_dms, recipe, tiny_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert_refused(run_dms("retrofit", recipe(model=str(bare))), "tokenizer", "bare")


def test_a_folder_without_gates_is_no_retrofit(run_dms, tiny_folder):
    assert_refused(
        run_dms("generate", tiny_folder, "--prompt", "x"), "has no gates", f"`dms retrofit RECIPE model={tiny_folder}`", "add --dense"
    )
    assert_refused(run_dms("evaluate", tiny_folder), "has no gates", "a model without gates is retrofitted first")
    assert_refused(run_dms("evaluate", "builtin:tiny"), "builtin:tiny is no folder on this machine", "RUN/model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --prompt TEXT, or --chat"),
        (["--prompt", "x", "--system", "y"], "--system is for a conversation"),
        (["--prompt", "x"], "has no gates (gates.safetensors is missing)"),
        (["--prompt", "x", "--dense", "--evict-bias", 1, "--other-base"], "--evict-bias, --other-base: without effect in dense mode"),
        (["--prompt", "x", "--dense", "--kv-dtype", "int8", "--base", "y"], "--kv-dtype, --base: without effect in dense mode"),
        (["--prompt", "x", "--dense", "--window", "8"], "--window: without effect in dense mode"),
        (["--prompt", "x", "--dense", "--device-map", "cuda"], "device_map is 'cuda'; give one of auto, balanced"),
        (
            ["--prompt", "x", "--dense", "--offload-folder", "y"],
            "offload_folder has no effect without device_map; give device_map='auto' (--device-map auto)",
        ),
        (["--prompt", "x", "--window", "8,-1"], "--window is '8,-1'; give numbers above 0"),
        (["--prompt", "", "--dense"], "the prompt is empty"),
        (["--chat", "--dense"], "has no chat template"),
    ],
)
def test_what_generate_refuses(run_dms, tiny_folder, options, said):
    assert_refused(run_dms("generate", tiny_folder, *options), said)


def test_a_plain_model_generates_and_converses(run_dms, tiny_folder, tmp_path, monkeypatch):
    code, out, err = run_dms("generate", tiny_folder, "--dense", "--prompt", "import os\n", "--max-new-tokens", 3)
    assert code == 0 and "import os" in out and "3 tokens in" in err and "tokens in the cache" in err, err
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    template = "{% for m in messages %}{{ m['role'] }}<|pad|>{{ m['content'] }}<|pad|>{% endfor %}assistant<|pad|>"
    (folder / "chat_template.jinja").write_text(template)
    chat = ("generate", folder, "--dense", "--chat", "--max-new-tokens", 3)
    code, out, err = run_dms(*chat, "--prompt", "import os", "--system", "be short")
    assert code == 0 and "import os" not in out and err.count("generated in") == 1, err
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n\n/reset\nimport sys\n"))
    code, out, err = run_dms(*chat)
    assert code == 0 and "> import os" in out and "> import sys" in out and err.count("generated in") == 2, err


def test_output_of_another_run(run_dms, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: x\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert_refused(run_dms("retrofit", recipe()), "holds another run", "overwrite=true")


def test_retrofit_evaluate_generate(run_dms, recipe, tmp_path):
    code, out, err = run_dms("retrofit", recipe(), "steps=20")
    assert code == 0, err
    for word in ("dense", "dms", "sliding_window", "compacted", "step 20/20"):
        assert word in out
    small = [
        "--policies",
        "dense,dms,sliding_window",
        "--tasks",
        "records,text",
        "--lengths",
        192,
        "num_documents=2",
        "prefill_chunk=48",
    ]
    code, out, err = run_dms("evaluate", tmp_path / "run" / "model", *small, "--card")
    assert code == 0 and "sliding" in out and "1/" in out, err
    rows = json.loads((tmp_path / "run" / "evaluation" / "rows.json").read_text())["rows"]
    assert {"policy", "task", "metric", "value", "ci_low", "ci_high", "num_samples", "cr", "memory", "model_hash"} <= set(rows[0])
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert rows[0]["model_hash"] in card and "192" in card
    # Again it reads nothing anew; of so few documents nothing is shown, which --strict does not let pass.
    code, out, err = run_dms("evaluate", tmp_path / "run" / "model", *small, "--strict")
    assert code == 1 and "few_samples: dms: " in err
    assert_refused(run_dms("evaluate", tmp_path / "run" / "model", "--tasks", "none"), "nothing to measure", "--lm-eval")
    # The settings' file and keys give way to options.
    (tmp_path / "settings.yaml").write_text("policies: [dense]\nsuites: [words]\nnum_documents: 1\nquick: true\n")
    code, out, err = run_dms(
        "evaluate", tmp_path / "run" / "model", tmp_path / "settings.yaml", "seed=8", *small, "--out", tmp_path / "eight"
    )
    written = json.loads((tmp_path / "eight" / "settings.json").read_text())
    assert code == 0 and (written["seed"], written["suites"], written["num_documents"]) == (8, ["records", "text"], 2), err
    assert_refused(run_dms("evaluate", tmp_path / "run" / "model", "--lengths", "1k"), "--lengths is '1k'", "1024,2048")
    code, out, err = run_dms("report", tmp_path / "run")
    assert code == 0 and (tmp_path / "run" / "report.html").stat().st_size > 10_000, err
    other = ["--window", "96", "--lengths", 192, "--tasks", "text", "num_documents=2", "policies=[dense,dms]"]
    code, out, err = run_dms("evaluate", tmp_path / "run" / "model", *other, "--out", tmp_path / "wide")
    assert code == 0 and "window 96, in place of what the gates were trained with" in out, err
    wide = json.loads((tmp_path / "wide" / "rows.json").read_text())["rows"]
    assert min(row["cr"] for row in wide if row["policy"] == "dms") < min(row["cr"] for row in rows if row["policy"] == "dms")
    assert_refused(run_dms("evaluate", tmp_path / "run" / "model", "--window", "8,96"), "trained with [", "give as many")
    code, out, err = run_dms("generate", tmp_path / "run" / "model", "--prompt", "import os\n", "--max-new-tokens", 5)
    assert code == 0 and "import os" in out and "compacted" in err
    placed = ["--device-map", "auto", "--offload-folder", tmp_path / "aside"]
    assert run_dms("generate", tmp_path / "run" / "model", "--prompt", "import os\n", "--max-new-tokens", 5, *placed)[:2] == (0, out)
    assert_refused(
        run_dms("evaluate", tmp_path / "run" / "model", "--offload-folder", "y"), "offload_folder has no effect without device_map"
    )
    code, _, err = run_dms("evaluate", tmp_path / "run" / "model", *other[2:], *placed, "--out", tmp_path / "placed")
    assert code == 0 and (tmp_path / "placed" / "rows.json").is_file(), err
    base = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]
    alone = [tmp_path / "run" / "gates", "--prompt", "import os\n", "--max-new-tokens", 5, "--base"]
    code, gates_out, err = run_dms("generate", *alone, base)
    assert code == 0 and gates_out == out and "compacted" in err, err
    base_models.load_base(base, "float32").save_pretrained(tmp_path / "float32")
    base_models.load_tokenizer(base).save_pretrained(tmp_path / "float32")
    assert_refused(run_dms("generate", *alone, tmp_path / "float32"), "belong to another base", "--other-base accepts it")
    with pytest.warns(UserWarning, match="^gates trained on"):
        code, out, err = run_dms("generate", *alone, tmp_path / "float32", "--other-base")
    assert code == 0 and "compacted" in err, err
    assert_refused(run_dms("generate", *alone[:-1]), "holds gates alone", "--base")
    for source, options in ((tmp_path / "run", []), (tmp_path / "run" / "model", ["--format", "merged", "--max-shard-size", "100KB"])):
        code, out, err = run_dms("export", source, tmp_path / f"out{len(options)}", *options)
        assert code == 0 and says(out, f"wrote {tmp_path}"), err
    assert (tmp_path / "out0" / "modeling_dms.py").is_file() and len(list((tmp_path / "out4").glob("model-*.safetensors"))) > 1
    assert_refused(run_dms("export", tmp_path / "run", tmp_path / "out0"), "out0", "is not an empty folder")
    assert_refused(run_dms("export", tmp_path / "run" / "report", tmp_path / "out1"), "has no gates")


def test_versions_that_were_not_tested_are_said_once_before_any_work(run_dms, distribution, recipe, tmp_path):
    distribution(["transformers<2", "torch>=2.11"])
    code, _, err = run_dms("retrofit", recipe(model="/nowhere/model"))
    assert code == 2 and err.startswith("dms: warning: transformers ") and err.count("dms: warning") == 1
    assert "is not among the tested versions <2; if anything fails, pip install 'transformers<2'\ndms: error: " in err
    assert "warning" not in run_dms("retrofit", "--help")[2]


def test_of_several_processes_the_first_speaks_of_versions(run_dms, distribution, recipe, monkeypatch):
    distribution(["transformers<2"])
    monkeypatch.setenv("RANK", "1")
    assert "warning" not in run_dms("retrofit", recipe(model="/nowhere/model"))[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-k", 32], "--max-k moved to the settings: write scaling.max_k=32 after the model"),
        (["--num-documents=5"], "--num-documents moved to the settings: write num_documents=5 after"),
        (["--chat-template", "--quick"], "write chat=true after"),
        (["--stop", "x"], 'write scaling.stop=["x"] after'),
        (["one.yaml", "two.yaml"], "one.yaml, two.yaml: one settings file is read"),
        (["nowhere.yaml"], "recipe 'nowhere.yaml' is neither a file nor a packaged recipe"),
        (["num_document=5"], "unknown key 'num_document' (did you mean 'num_documents'?)"),
        (["num_documents=many"], "num_documents: Input should be a valid integer; given: 'many'"),
        (["scaling.stop=[x]"], "name them with problems=FILE.jsonl"),
        (["--include-path", "tasks"], "lm_eval: key 'tasks' is missing"),
        (["--policies", "dense,dms,h20"], "'h20' is unknown (did you mean 'h2o'?)"),
    ],
)
def test_what_evaluate_refuses_of_its_settings(run_dms, arguments, said):
    assert_refused(run_dms("evaluate", "anywhere", *arguments), said)


def test_an_option_that_evaluate_never_had(run_dms):
    code, _, err = run_dms("evaluate", "anywhere", "--maxk", 3)
    assert code == 2 and "no such option: --maxk" in err
