"""lm-evaluation-harness on an exported folder: eviction acts in what it scores, and the scores are those computed by hand."""

import json
import random

import pytest
import torch
import yaml

import dms
from dms.export.folder import export
from dms.io import base_models

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'dms-retrofit[evaluate]'")

TASKS = {
    "recall_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "recall_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[label] | trim}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [{"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d{3})"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


NAMES = ("amber-osprey", "goose-snow", "petal-adobe", "oasis-laurel", "kelp-nectar", "orchid-autumn", "coyote-pearl", "sapphire-beaver")


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Records in the embedded model's own form, the first of which is asked for at the end: dense, it knows every answer."""
    rng = random.Random(0)
    found = []
    for _ in range(6):
        names, values = rng.sample(NAMES, 4), rng.sample(range(100, 400), 7)
        records = "".join(
            f"\n#: ${name} {value}\n        self.step_{rng.randint(10, 99)} = {rng.randint(1, 9)}"
            for name, value in zip(names, values, strict=False)
        )
        choices = [f" {value}" for value in (values[0], *values[4:])]
        found.append({"text": f"<|endoftext|>{records}\n#? ${names[0]}", "choices": choices, "label": 0})
    return found


@pytest.fixture(scope="module")
def results(tiny, documents, tmp_path_factory):
    """(folder, what lm-eval returns)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    root = tmp_path_factory.mktemp("harness")
    with open(root / "documents.jsonl", "w") as f:
        f.writelines(json.dumps(document) + "\n" for document in documents)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "documents.jsonl")}}, "test_split": "test"}
    for name, task in TASKS.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    export(tiny, root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets")
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(root / "model"), "trust_remote_code": True, "dtype": "float32"},
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(root), include_defaults=False),
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
            log_samples=True,
        )
    return root / "model", found


@torch.no_grad()
def log_likelihoods(model, tokenizer, document) -> list[float]:
    values = []
    for choice in document["choices"]:
        ids = tokenizer.encode(document["text"] + choice, add_special_tokens=False)
        start = len(tokenizer.encode(document["text"], add_special_tokens=False))
        log_probs = model(torch.tensor([ids[:-1]])).logits.float().log_softmax(-1)[0, start - 1 :]
        values.append(log_probs.gather(1, torch.tensor(ids[start:])[:, None]).sum().item())
    return values


def test_likelihoods_are_those_of_the_evicting_model(results, documents):
    folder, found = results
    model, tokenizer = dms.load(folder, device="cpu"), base_models.load_tokenizer(str(folder))
    samples = sorted(found["samples"]["recall_choice"], key=lambda sample: sample["doc_id"])
    scored = torch.tensor([[float(response[0]) for response in sample["filtered_resps"]] for sample in samples])
    by_hand = torch.tensor([log_likelihoods(model, tokenizer, document) for document in documents])
    torch.testing.assert_close(scored, by_hand, rtol=0, atol=1e-3)
    dms.set_mode(model, "dense")
    dense = torch.tensor([log_likelihoods(model, tokenizer, document) for document in documents])
    assert (scored - dense).abs().mean() > 0.3
    accuracy, without_eviction = ((values.argmax(1) == 0).double().mean().item() for values in (by_hand, dense))
    assert found["results"]["recall_choice"]["acc,none"] == pytest.approx(accuracy)
    assert accuracy < without_eviction == 1.0


@torch.no_grad()
def test_generations_are_those_of_the_evicting_model(results, documents):
    folder, found = results
    model, tokenizer = dms.load(folder, device="cpu"), base_models.load_tokenizer(str(folder))

    def continued(document):
        ids = tokenizer(document["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]

    def share(texts):
        # The model was not taught what follows an answer: more digits may.
        return sum(text.startswith(document["choices"][0]) for text, document in zip(texts, documents, strict=True)) / len(texts)

    samples = sorted(found["samples"]["recall_generation"], key=lambda sample: sample["doc_id"])
    generated = [sample["resps"][0][0] for sample in samples]
    assert generated == [continued(document) for document in documents]
    assert found["results"]["recall_generation"]["exact_match,number"] == pytest.approx(share(generated))
    dms.set_mode(model, "dense")
    assert share(generated) < share([continued(document) for document in documents]) == 1.0
