"""Cards say what the rows say: figures, losses, front matter, and nothing for what is unknown."""

import re
from dataclasses import replace

import pytest
import yaml

from dms.evaluation.stats.rows import ResultRow
from dms.report.cards import write_pretrain_card, write_run_card
from dms.report.evidence import TrainingFacts

CONFIG = {"window": 48, "granularity": "head", "alignment": "own", "tau": 0.1, "scale": 100.0, "offset": 5.0, "sinks": 0}
RUN = {
    "target_cr": 4.0,
    "steps": 160,
    "tokens": 1_310_720,
    "training_seconds": 301.4,
    "device": "x86_64 CPU, 2 threads",
    "versions": {"dms": "0.1.0", "torch": "2.13.0"},
    "trainable": "gates",
    "beta": 0.0,
    "alignment": "own",
}
FIGURES = {
    "dense": {
        "bits_per_byte": 1.4213,
        "recall": 0.9981,
        "recall_q1": 1.0,
        "recall_q2": 0.9991,
        "recall_q3": 0.9972,
        "recall_q4": 0.9963,
        "copy": 0.61,
    },
    "dms": {
        "bits_per_byte": 1.4334,
        "recall": 0.9943,
        "recall_q1": 1.0,
        "recall_q2": 0.9992,
        "recall_q3": 0.9974,
        "recall_q4": 0.9825,
        "copy": 0.62,
    },
    "sliding_window": {
        "bits_per_byte": 1.689,
        "recall": 0.3176,
        "recall_q1": 0.91,
        "recall_q2": 0.2,
        "recall_q3": 0.1,
        "recall_q4": 0.05,
        "copy": 0.1,
    },
}
RATIOS = {"dense": (1.0, 1.0), "dms": (4.337, 3.912), "sliding_window": (None, 3.908)}


def make_rows(figures=FIGURES, length=1024, memory="masked", target_cr=4.0):
    """Rows as a run's evaluation writes them: a task's accuracy goes by the task's name."""
    unknown = dict.fromkeys(("model_hash", "recipe_hash", "ci_low", "ci_high", "bytes"))
    return [
        ResultRow(
            model="acme/base-1b",
            policy=policy,
            task="text" if name == "bits_per_byte" else name,
            metric=name if name == "bits_per_byte" else "accuracy",
            value=value,
            length=length,
            memory=None if policy == "dense" else memory,
            num_samples=1216,
            cr_decided=RATIOS[policy][0],
            cr=RATIOS[policy][1],
            target_cr=target_cr,
            seed=0,
            versions={},
            device="cpu",
            seconds=1.0,
            **unknown,
        )
        for policy, values in figures.items()
        for name, value in values.items()
    ]


def card(tmp_path, rows=None, **changes):
    arguments = {"base_name": "acme/base-1b", "base_license": "mit", "dms_config": CONFIG, "run": RUN, "data": "stories", **changes}
    arguments["run"] = TrainingFacts.from_result(arguments["run"])
    path = write_run_card(tmp_path, rows=make_rows() if rows is None else rows, **arguments)
    assert path == tmp_path / "README.md"
    return path.read_text(encoding="utf-8")


def front_matter(text):
    start, front, body = text.split("---\n", 2)
    assert start == "" and body.lstrip().startswith("# ")
    return yaml.safe_load(front)


def table(text, policy, number=0):
    """Row of a policy in the `number`-th table that has it, as column -> cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    headers = [row for row in cells if row[0] == "policy"]
    header = headers[number]
    after = cells[next(i for i, row in enumerate(cells) if row is header) :]
    row = next(row for row in after if row[0] == policy)
    assert len(row) == len(header)
    return dict(zip(header, row, strict=True))


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def changed(policy, **values):
    return {**FIGURES, policy: {**FIGURES[policy], **values}}


def test_front_matter(tmp_path):
    assert front_matter(card(tmp_path)) == {
        "base_model": "acme/base-1b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kv-cache", "dms"],
        "license": "mit",
    }


def test_front_matter_leaves_out_what_is_unknown(tmp_path):
    assert "license" not in front_matter(card(tmp_path, base_license=None))
    # The hub refuses a base_model that is no hub id.
    text = card(tmp_path, base_name="builtin:tiny")
    assert "base_model" not in front_matter(text) and "`builtin:tiny`" in text
    text = card(tmp_path, base_name="/home/someone/models/secret")
    assert "base_model" not in front_matter(text) and "/home/someone" not in text and "`secret`" in text
    assert front_matter(card(tmp_path, base_name="gpt2", base_license="no: 'yaml' #trick"))["license"] == "no: 'yaml' #trick"


def test_a_base_from_a_gguf_file(tmp_path):
    text = card(tmp_path, base_name="someone/models/base.Q4_1.gguf", base_sha256="12ab" * 16)
    assert f"dequantised from the GGUF file `base.Q4_1.gguf` (SHA-256 `{'12ab' * 16}`)" in text
    assert "base_model" not in front_matter(text) and "someone" not in text
    text = card(tmp_path, base_name="acme/base-GGUF:base.Q4_1.gguf", base_sha256="12ab" * 16)
    assert front_matter(text)["base_model"] == "acme/base-GGUF" and "`acme/base-GGUF:base.Q4_1.gguf` with gates" in text
    text = card(tmp_path, base_name="models/base.gguf")
    assert "base_model" not in front_matter(text) and "`base.gguf` with gates" in text and "dequantised" not in text


@pytest.mark.parametrize("policy", ["dense", "dms", "sliding_window"])
def test_table_is_the_rows(tmp_path, policy):
    text = card(tmp_path)
    row = table(text, policy)
    for name, value in FIGURES[policy].items():
        if name != "copy":
            column = name.replace("bits_per_byte", "bits per byte").replace("_", " ")
            assert row[column] == f"{value:.4f}"
    cr_decided, cr = RATIOS[policy]
    assert row["cr_decided"] == ("–" if cr_decided is None else f"{cr_decided:.2f}") and row["cr"] == f"{cr:.2f}"
    assert row["memory"] == ("–" if policy == "dense" else "masked")
    assert table(text, policy, number=1) == {"policy": policy, "copy": f"{FIGURES[policy]['copy']:.4f}"}
    assert "1216 questions" in text and "At 1024 tokens" in text


def test_every_number_in_the_results_is_measured(tmp_path):
    known = {f"{v:.4f}" for figures in FIGURES.values() for v in figures.values()} | {
        f"{v:.2f}" for pair in RATIOS.values() for v in pair if v
    }
    found = set(re.findall(r"\d+\.\d+", section(card(tmp_path), "What was measured")))
    assert found <= known and len(found) > 20


def test_where_it_loses(tmp_path):
    losses = section(card(tmp_path), "Where it loses")
    assert "worse in 3 of 7 figures" in losses
    lines = [line for line in losses.splitlines() if line.startswith("- ")]
    assert lines == [
        "- bits per byte: 0.012 higher, 0.85 % (1.4213 dense, 1.4334 dms)",
        "- recall: 0.0038 lower, 0.38 % (0.9981 dense, 0.9943 dms)",
        "- recall q4: 0.014 lower, 1.4 % (0.9963 dense, 0.9825 dms)",
    ]
    assert "No metric is worse" not in losses


def test_where_it_does_not_lose(tmp_path):
    figures = {**FIGURES, "dms": {**FIGURES["dense"], "bits_per_byte": 1.42, "recall": 0.999}}
    losses = section(card(tmp_path, make_rows(figures)), "Where it loses")
    assert "No metric is worse" in losses and "7 figures" in losses and "\n- " not in losses
    # The direction counts: a higher bits_per_byte is worse, however little.
    losses = section(card(tmp_path, make_rows(changed("dms", bits_per_byte=1.4214, recall=1.0, recall_q4=1.0))), "Where it loses")
    assert "worse in 1 of 7" in losses and "bits per byte: 0.0001 higher" in losses


def test_where_nothing_can_be_compared(tmp_path):
    losses = section(card(tmp_path, make_rows({"dms": FIGURES["dms"]})), "Where it loses")
    assert "no figures of dense and dms to compare" in losses and "No metric is worse" not in losses
    rows = [replace(row, metric="fancy_score") if row.task == "copy" else row for row in make_rows()]
    losses = section(card(tmp_path, rows), "Where it loses")
    assert "worse in 3 of 6" in losses and "Not compared" in losses and "copy fancy_score" in losses


def test_confidence_intervals(tmp_path):
    widths = {"recall": 0.01, "text": 0.001}
    rows = [
        replace(row, ci_low=row.value - widths[row.task], ci_high=row.value + widths[row.task]) if row.task in widths else row
        for row in make_rows()
    ]
    lines = [line for line in section(card(tmp_path, rows), "Where it loses").splitlines() if line.startswith("- ")]
    assert [line.endswith("intervals overlap") for line in lines] == [False, True, False]


def test_several_targets_and_lengths(tmp_path):
    eight = make_rows({"dms": FIGURES["dms"] | {"recall": 0.97}}, target_cr=8.0)
    text = card(tmp_path, [*make_rows(), *eight, *make_rows(changed("dms", recall=0.5), length=4096)])
    assert table(text, "dms, target CR 4")["recall"] == "0.9943" and table(text, "dms, target CR 8")["recall"] == "0.9700"
    losses = section(text, "Where it loses")
    assert "- recall (dms, target CR 8) at 1024 tokens: 0.028 lower" in losses
    assert "at 4096 tokens: 0.5 lower" in losses
    assert "measured at 1024, 4096 tokens" in text


def test_contradicting_rows_are_refused(tmp_path):
    rows = make_rows()
    assert card(tmp_path, [*rows, rows[1]]) == card(tmp_path, rows)
    with pytest.raises(ValueError, match=r"dense recall at length 1024 twice: 0.9981 and 0.1"):
        card(tmp_path, [*rows, replace(rows[1], value=0.1)])


def test_training_and_loading(tmp_path):
    text = card(tmp_path)
    how = section(text, "How it was trained")
    for part in (
        "data: stories",
        "ratio: 4\n",
        "steps: 160",
        "tokens: 1,310,720",
        "5 min 1 s",
        "x86_64 CPU, 2 threads",
        "dms 0.1.0, torch 2.13.0",
    ):
        assert part in how
    assert "the gates alone" in how and "beta 0: forward" in how and "`own`" in how and "window 48" in how
    assert 'model = dms.load("FOLDER")' in text and "import dms" in text
    assert "stays visible for 48 more tokens" in text and "packed" not in text
    packed = {name: card(tmp_path, run={**RUN, "trainable": name, "quantize": "nf4"}) for name in ("gates", "gates+lora")}
    assert "base: packed as `nf4` for the training; its weights are packed here too\n" in section(packed["gates"], "How it was trained")
    assert "`nf4` for the training; the adapters were merged into unpacked weights\n" in packed["gates+lora"]
    assert "beta 1: reverse" in card(tmp_path, run={**RUN, "beta": 1.0}) and "Jensen-Shannon" in card(tmp_path, run={**RUN, "beta": 0.5})


def test_unknown_values_are_left_out(tmp_path):
    text = card(tmp_path, rows=[], run={}, dms_config={}, data="")
    assert "None" not in text and "nan" not in text and section(text, "How it was trained").strip() == ""
    assert "Nothing was measured" in text and not re.search(r"\d\.\d{2,}", text.replace("2506.05345", ""))


def test_memory_is_said(tmp_path):
    assert "hidden from attention but not freed yet" in card(tmp_path)
    text = card(tmp_path, make_rows(memory="compacted"))
    assert "not freed yet" not in text and "really freed" in text and table(text, "dms")["memory"] == "compacted"


FACTS = {
    "architecture": "Llama, 4 layers, hidden 128",
    "parameters": 1_049_728,
    "context": 2048,
    "vocabulary": 2048,
    "num_files": 512,
    "length": 2048,
    "tokens": 45_000_000,
    "steps": 2500,
    "loss": 1.23456,
    "seconds": 2741.0,
    "device": "x86_64 CPU, 2 threads",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "results": {
        "bits_per_byte": 1.7512,
        "recall": 0.9871,
        "recall_questions": 1217,
        "recall_by_distance": [0.999, 0.991, 0.983, None],
        "by_task": {"chain_1": 0.8, "copy": 0.45},
        "cr": 1.0,
    },
}


def test_pretrain_card(tmp_path):
    text = write_pretrain_card(tmp_path, FACTS).read_text(encoding="utf-8")
    assert front_matter(text)["license"] == "apache-2.0" and front_matter(text)["tags"] == ["kv-cache", "dms"]
    cells = dict([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| "))
    assert cells == {
        "figure": "value",
        "bits per byte": "1.7512",
        "recall, 1,217 questions": "0.9871",
        "recall by distance, nearest quarter": "0.9990",
        "recall by distance, second": "0.9910",
        "recall by distance, third": "0.9830",
        "task chain_1": "0.8000",
        "task copy": "0.4500",
    }
    for part in (
        "1,049,728",
        "2048 tokens",
        "(3.11.7, 512 files)",
        "45,000,000",
        "2,500",
        "1.2346",
        "45 min 41 s",
        "x86_64 CPU",
        "hidden 128",
    ):
        assert part in text
    for part in (
        "` $amber`",
        "` 317`",
        "single dedicated tokens",
        "dms pretrain tiny/pretrain",
        "not a general language model",
        "Apache-2.0",
    ):
        assert part in text


def test_pretrain_card_names_tokens_that_exist():
    from dms.evaluation.data.names import FIRST_WORDS, VALUES

    assert "amber" in FIRST_WORDS and 317 in VALUES


def test_pretrain_card_leaves_out_what_is_unknown(tmp_path):
    text = write_pretrain_card(tmp_path, {"parameters": 5}).read_text(encoding="utf-8")
    assert "- parameters: 5" in text and "None" not in text and "steps" not in text and "Nothing was measured" in text and "()" not in text
    assert "(7 files)" in write_pretrain_card(tmp_path, {"num_files": 7}).read_text(encoding="utf-8")
