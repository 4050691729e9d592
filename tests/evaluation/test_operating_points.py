"""`dms evaluate` at several biases, and the section that it writes into a card."""

import json

import pytest
import torch

import dms
from dms import checkpoint, models
from dms.card_sections import join_card, set_section, split_card
from dms.evaluation.command import evaluate_folder
from dms.operating_points import policy_label, write_points
from dms.retrofitting import gate_parameters

SMALL = {"length": 192, "num_documents": 3, "num_items": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = models.load_base("builtin:tiny", "float32", "cpu")
    dms.retrofit(model, dms.DMSConfig(window=8, scale=1.0, offset=0.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 0.3, generator=generator)
    out = tmp_path_factory.mktemp("points") / "model"
    return checkpoint.save(model, out, tokenizer=models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=2.0)


def test_each_bias_is_measured_and_written(folder, tmp_path, capsys):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n\n## How to load it\n\nso\n", encoding="utf-8")
    result = evaluate_folder(str(folder), **SMALL, evict_bias=[-3.0, 0.0, 3.0, 0.0], out=str(tmp_path / "rows.json"), card=True)
    names = ["dense", *(f"{policy} {bias}" for bias in ("-3", "0", "+3") for policy in ("dms", "sliding_window"))]
    assert list(result["policies"]) == names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    ratios = [result["policies"][f"dms {bias}"]["cr_decided"] for bias in ("-3", "0", "+3")]
    assert 1.0 <= ratios[0] < ratios[1] < ratios[2]
    for bias in ("-3", "0", "+3"):
        budget, window = (result["policies"][f"{policy} {bias}"]["cr"] for policy in ("dms", "sliding_window"))
        assert window == pytest.approx(budget, rel=0.05)

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(row["policy"], row["evict_bias"]) for row in rows} == {
        ("dense", None),
        *((policy, bias) for policy in ("dms", "sliding_window") for bias in (-3.0, 0.0, 3.0)),
    }
    # One bias alone gives what it gives among others.
    alone = evaluate_folder(str(folder), **SMALL, evict_bias=[3.0], out=None)
    assert list(alone["policies"]) == ["dense", "dms", "sliding_window"]
    for figure in ("bits_per_byte", "recall", "cr", "cr_decided"):
        assert alone["policies"]["dms"][figure] == result["policies"]["dms +3"][figure]

    fields, body = split_card((folder / "README.md").read_text(encoding="utf-8"))
    assert fields == {"license": "mit"}
    assert body.index("# A model") < body.index("## Operating points") < body.index("## How to load it")
    figures = result["policies"]["dms +3"]
    line = f"| dms | 3 | {figures['cr_decided']:.2f} | {figures['cr']:.2f} | {figures['bits_per_byte']:.4f} | {figures['recall']:.4f} |"
    assert line in body and body.count("| dms |") == body.count("| sliding_window |") == 3
    # Measured anew, they replace what stands there.
    evaluate_folder(str(folder), **SMALL, evict_bias=[1.0], out=None, card=True)
    body = (folder / "README.md").read_text(encoding="utf-8")
    assert body.count("## Operating points") == 1 and body.count("| dms |") == 1 and "so\n" in body


def test_a_bias_that_is_no_number(folder):
    with pytest.raises(ValueError, match="--evict-bias is"):
        evaluate_folder(str(folder), **SMALL, evict_bias=[float("nan")], out=None)


def test_a_folder_without_a_card_gets_one(tmp_path):
    point = {"policy": "dense", "evict_bias": None, "cr_decided": 1.0, "cr": 1.0, "bits_per_byte": 1.5, "recall": None, "memory": None}
    text = write_points(tmp_path, [point], length=64).read_text(encoding="utf-8")
    assert text.startswith("## Operating points\n") and "| dense | – | 1.00 | 1.00 | 1.5000 | – |" in text


@pytest.mark.parametrize(("bias", "label"), [(None, "dms"), (0.0, "dms 0"), (1.5, "dms +1.5"), (-2.0, "dms -2")])
def test_labels(bias, label):
    assert policy_label("dms", bias) == label


CARD = """# Title

Words.

## One

```sh
## not a heading
```

## Two

Last.
"""


def test_sections():
    replaced = set_section(CARD, "One", "new")
    assert "## One\n\nnew\n\n## Two\n\nLast.\n" in replaced and "not a heading" not in replaced
    assert set_section(CARD, "Three", "x", before=("Two", "One")).index("## Three") < CARD.index("## One") + 1
    assert set_section(CARD, "Three", "x").endswith("Last.\n\n## Three\n\nx\n")
    assert set_section("", "Only", "x") == "## Only\n\nx\n"
    # Twice is once.
    assert set_section(replaced, "One", "new") == replaced


def test_front_matter_comes_back_as_it_was():
    fields = {"license": "mit", "tags": ["a", "b"]}
    assert split_card(join_card(fields, CARD)) == (fields, "\n" + CARD)
    assert split_card(CARD) == ({}, CARD)
    assert join_card({}, CARD) == CARD
