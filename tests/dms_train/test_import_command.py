"""`dms import` and what follows it, as typed."""

import json
import shutil

import pytest

from dms.io import base_models, checkpoint


@pytest.fixture
def theirs(tiny_folder, tmp_path):
    """The tiny model as a FastDMS folder that says everything but the offset."""
    folder = shutil.copytree(tiny_folder, tmp_path / "theirs")
    (folder / "dms_metadata.json").write_text(json.dumps({"window_size": 8, "alpha_scale": 100.0, "target_cr": 8}))
    return folder


def test_import_then_generate(run_dms, theirs, tmp_path):
    code, out, _ = run_dms("import", theirs, tmp_path / "ours")
    assert code == 0
    assert "note: " in out and "does not say offset (alpha_offset): taken as 5.0" in out
    assert "licence: none is named; give it with --license" in out and "FastDMS (window 8, gate borrowed_once" in out
    code, out, err = run_dms("generate", tmp_path / "ours", "--prompt", "import os", "--max-new-tokens", 24)
    assert code == 0, err
    assert "KV entries" in out + err
    # Dense, its channels stay out of attention as well.
    code, dense, err = run_dms("generate", tmp_path / "ours", "--prompt", "import os", "--max-new-tokens", 4, "--dense")
    model = checkpoint.load(tmp_path / "ours", mode="dense", device="cpu")
    tokenizer = base_models.load_tokenizer(str(tmp_path / "ours"))
    inputs = tokenizer("import os", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert code == 0 and tokenizer.decode(tokens, skip_special_tokens=True).strip() in dense, err
    code, out, _ = run_dms("import", theirs, tmp_path / "given", "--offset", "-20", "--license", "mit")
    assert code == 0 and "offset -20.0" in out and "licence: mit" in out
    code, _, err = run_dms("import", theirs, tmp_path / "no", "--window", "16")
    assert code == 2 and "window was given as 16" in err and not (tmp_path / "no").exists()
    code, _, err = run_dms("generate", theirs, "--prompt", "import os")
    assert code == 2 and "no gates" in err


@pytest.mark.slow
def test_import_then_evaluate_and_report(run_dms, theirs, tmp_path):
    assert run_dms("import", theirs, tmp_path / "ours", "--offset", "0")[0] == 0
    out = tmp_path / "evaluation"
    code, _, err = run_dms(
        "evaluate", tmp_path / "ours", "--quick", "--policies", "dense,dms", "--tasks", "one_pass,text", "--lengths", "256", "--out", out
    )
    assert code == 0, err
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"dense", "dms"} and any((row["cr"] or 1) > 1.3 for row in rows if row["policy"] == "dms")
    code, _, err = run_dms("report", out)
    assert code == 0 and (out / "report.html").is_file(), err
