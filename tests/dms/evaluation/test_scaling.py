"""Chains and what they take: counted again from decisions, one query at a time; kept and resumed; compared at equal budget."""

import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evicting import embedded
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import dms
from dms.evaluation.data.problems import Problems, make_chains, read_problems
from dms.evaluation.engine import scaling
from dms.evaluation.engine.chains import Chain, Sampled, Sampling, sample_chains
from dms.evaluation.engine.resume import operate
from dms.evaluation.engine.scaling import check_scaling, run_scaling
from dms.evaluation.present.findings import Finding, scaling_findings
from dms.evaluation.present.tables import scaling_table
from dms.evaluation.stats.bootstrap import make_draws
from dms.evaluation.stats.equal_budget import Curve, EqualBudget, equal_budgets
from dms.evaluation.stats.rows import RowContext
from dms.retrofitting import gate_parameters

SETTINGS = {"max_k": 4, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 12, "seed": 3}
HOT = {"temperature": 2.0}
CONTEXT = RowContext(model="tiny", model_hash=None, recipe_hash=None, target_cr=None, seed=3, versions={}, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return embedded()


@pytest.fixture(scope="module")
def problems(tiny):
    return make_chains(tiny[1], num_problems=3, length=256, num_hops=3, num_chains=2)


def sample_one(model, tokenizer, ids, number, settings) -> Sampled:
    """A problem's chains."""
    ((found, sampled),) = sample_chains(model, tokenizer, [(number, ids)], settings)
    assert found == number
    return sampled


def sampling(problems, **changes) -> Sampling:
    return Sampling(**{**SETTINGS, "chains_at_once": SETTINGS["max_k"], "stop": problems.stop, **changes})


@torch.no_grad()
def held_by_hand(model, input_ids, chain, policy) -> list[int]:
    """Of the prompt's last query and of each decoded token's the keys that it may see, over layers and heads."""
    num_fed = len(chain.tokens) - (chain.ended != "eos")
    ids = [*input_ids, *chain.tokens[:num_fed]]
    queries = range(len(input_ids) - 1, len(ids))
    if policy == "dense":
        return [(query + 1) * sum(layer.num_heads for layer in model.dms.layers) for query in queries]
    dms.set_mode(model, "evict")
    model(input_ids=torch.tensor([ids]), use_cache=False)
    window = model.dms.config.window
    counts = []
    for query in queries:
        recent = torch.arange(query + 1) >= query - window
        seen = [recent[:, None] | ~evicted[0, : query + 1] for evicted in model.dms.forward.evicted.values()]
        counts.append(sum(int(mask.sum()) for mask in seen))
    return counts


@torch.no_grad()
def shared_by_hand(model, input_ids, policy) -> int:
    """Of the prompt what every later query sees, and no chain can evict: dense all of it, dms what is farther back than the window."""
    if policy == "dense":
        return len(input_ids) * sum(layer.num_heads for layer in model.dms.layers)
    dms.set_mode(model, "evict")
    model(input_ids=torch.tensor([input_ids]), use_cache=False)
    far = len(input_ids) - model.dms.config.window - 1
    return sum(int((~evicted[0, :far]).sum()) for evicted in model.dms.forward.evicted.values())


@pytest.mark.parametrize("policy", ["dense", "dms"])
@pytest.mark.parametrize("eos", [False, True])
def test_entries_are_those_that_each_query_sees(tiny, problems, policy, eos):
    model, tokenizer = tiny
    operate(model, policy, 0.0)
    before = model.generation_config.eos_token_id
    # Running text, which goes on in many ways.
    ids = problems.problems[0].input_ids[:120]
    wild = sampling(problems, temperature=1.5, top_p=1.0, max_new_tokens=24, stop=None if eos else "\n")
    try:
        if eos:
            # Something that some chains say, and some say early.
            first = sample_one(model, tokenizer, ids, 0, wild)
            model.generation_config.eos_token_id = [chain.tokens[5 + number] for number, chain in enumerate(first.chains)]
        found = sample_one(model, tokenizer, ids, 0, wild)
    finally:
        model.generation_config.eos_token_id = before
    assert len({len(chain.tokens) for chain in found.chains}) > 1
    assert {chain.ended for chain in found.chains} & ({"eos"} if eos else {"stop", "length"})
    assert 0 < found.shared == shared_by_hand(model, ids, policy)
    for chain in found.chains:
        assert chain.held == held_by_hand(model, ids, chain, policy)
        assert chain.seen == found.num_heads * (len(ids) + len(chain.held) - 1)
        assert (chain.evicted > 0) == (policy == "dms")


@pytest.mark.parametrize("policy", ["dense", "dms"])
def test_layers_without_gates_are_not_counted(tiny, policy):
    """A model of which one layer slides and the other is gated; the prompt is read in pieces."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **sizes, **layers, tie_word_embeddings=False, eos_token_id=None)
    model = dms.retrofit(AutoModelForCausalLM.from_config(config).eval(), dms.DMSConfig(window=8, scale=1.0, offset=0.0))
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 1.0)
    model.dms.prefill_chunk = 16
    operate(model, policy, 0.0)
    ids = tuple(torch.randint(3, 97, (50,)).tolist())
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0, "stop": None}
    found = sample_one(model, tiny[1], ids, 0, Sampling(max_k=3, chains_at_once=2, **settings))
    assert found.shared == shared_by_hand(model, ids, policy) <= 2 * len(ids)
    assert found.num_heads == 2 and len({tuple(chain.tokens) for chain in found.chains}) == 3
    for chain in found.chains:
        assert chain.held == held_by_hand(model, ids, chain, policy)
        assert (chain.held[-1] < chain.seen) == (policy == "dms")


@pytest.mark.parametrize("policy", ["dense", "dms"])
def test_a_chain_is_the_same_in_any_batch(tiny, problems, policy):
    model, tokenizer = tiny
    ids = problems.problems[1].input_ids
    operate(model, policy, 0.0)
    together = sample_one(model, tokenizer, ids, 1, sampling(problems))
    apart = sample_one(model, tokenizer, ids, 1, sampling(problems, chains_at_once=3))
    assert [vars(chain) for chain in together.chains] == [vars(chain) for chain in apart.chains]
    assert apart.shared == together.shared
    assert len({tuple(chain.tokens) for chain in together.chains}) > 1
    # Beside chains of other problems, with prompts of other lengths.
    several = [(0, problems.problems[0].input_ids[:77]), (1, ids), (4, problems.problems[2].input_ids[:130])]
    mixed = dict(sample_chains(model, tokenizer, several, sampling(problems, chains_at_once=6)))
    assert list(map(vars, mixed[1].chains)) == list(map(vars, together.chains)) and mixed[1].shared == together.shared
    assert set(mixed) == {0, 1, 4} and all(len(sampled.chains) == SETTINGS["max_k"] and sampled.seconds > 0 for sampled in mixed.values())
    other = sample_one(model, tokenizer, ids, 2, sampling(problems))
    assert [chain.tokens for chain in other.chains] != [chain.tokens for chain in together.chains]


def test_sampling_follows_the_models_distribution(tiny):
    """2,000 first tokens against the probabilities, cut at top_p."""
    model, tokenizer = tiny
    ids = tuple(tokenizer("self.")["input_ids"])
    dms.set_mode(model, "dense")
    with torch.no_grad():
        share = (model(input_ids=torch.tensor([ids])).logits[0, -1] / 1.2).softmax(-1)
    order = share.argsort(descending=True)
    kept = order[: int((share[order].cumsum(0) < 0.8).sum()) + 1]
    settings = {"temperature": 1.2, "top_p": 0.8, "max_new_tokens": 1, "seed": 0, "stop": None}
    first = []
    for number in range(10):
        found = sample_one(model, tokenizer, ids, number, Sampling(max_k=200, chains_at_once=200, **settings))
        first += [chain.tokens[0] if chain.tokens else model.generation_config.eos_token_id for chain in found.chains]
    assert set(first) <= set(kept.tolist())
    expected = share[kept] / share[kept].sum()
    drawn = torch.tensor([first.count(token) / len(first) for token in kept.tolist()])
    assert len(kept) > 5 and (drawn - expected).abs().sum() / 2 < 0.1


@pytest.fixture(scope="module")
def run(tiny, problems, tmp_path_factory):
    """(rows, folder) of dense, dms, and dms that never evicts."""
    out = tmp_path_factory.mktemp("scaling")
    rows = run_scaling(*tiny, problems, sampling(problems), [0.0, -100.0], context=CONTEXT, out=out, trained_length=128)
    return rows, out


def test_rows_follow_from_what_was_sampled(tiny, problems, run):
    rows, out = run
    model, tokenizer = tiny
    assert {(row.policy, row.evict_bias) for row in rows} == {("dense", None), ("dms", 0.0), ("dms", -100.0)}
    assert {row.metric for row in rows} == {f"{metric}@{k}" for metric in ("pass", "majority") for k in (1, 2, 4)}
    for policy, bias in (("dense", None), ("dms", 0.0)):
        operate(model, policy, bias)
        found = [sample_one(model, tokenizer, p.input_ids, n, sampling(problems)) for n, p in enumerate(problems.problems)]
        right = [
            [problems.rule.extract(tokenizer.decode(chain.tokens)) == problem.answer for chain in sampled.chains]
            for problem, sampled in zip(problems.problems, found, strict=True)
        ]
        ours = {row.metric: row for row in rows if (row.policy, row.evict_bias) == (policy, bias)}
        assert ours["pass@1"].value == pytest.approx(np.mean(right))
        assert ours["pass@4"].value == pytest.approx(np.mean([any(one) for one in right]))
        reads = [sum(sum(chain.held[1:]) for chain in sampled.chains) / sampled.num_heads for sampled in found]
        assert ours["pass@4"].entries_read == pytest.approx(np.mean(reads))
        assert ours["pass@1"].entries_read == pytest.approx(np.mean(reads) / 4)
        steps = [
            [s.shared + sum(c.held[t] - s.shared for c in s.chains if t < len(c.held)) for t in range(max(len(c.held) for c in s.chains))]
            for s in found
        ]
        assert ours["pass@4"].peak_entries == pytest.approx(np.mean([max(one) for one in steps]) / found[0].num_heads)
        assert ours["pass@1"].peak_entries < ours["pass@2"].peak_entries < ours["pass@4"].peak_entries
        assert ours["pass@4"].bytes is None and ours["pass@4"].batch_size == 4
    dense = next(row for row in rows if row.policy == "dense")
    assert dense.cr == 1.0 and dense.vs_dense is None and dense.memory is None
    saved = json.loads((out / "scaling.json").read_text())
    assert saved["settings"]["chat_template"] is False and saved["settings"]["problems"] == "chain_3"
    assert saved["rows"] == [row.to_dict() for row in rows]
    assert saved["words"] and all("evict_bias" in sentence for sentence in saved["words"])
    findings = [Finding.from_dict(finding) for finding in saved["findings"]]
    assert [(finding.length, finding.evict_bias) for finding in findings] == [(None, 0.0), (None, -100.0)]
    assert [sentence for finding in findings for sentence in finding.sentences] == saved["words"]
    equal = [EqualBudget.from_dict(found) for found in saved["equal_budget"]]
    assert scaling_findings(equal, "chain_3") == findings


def test_a_shared_prompt_is_held_once():
    """Two chains of two heads that share 8 entries; one ends a step before the other."""
    chains = [Chain([1] * (len(held) - 1), "eos", held, seen=20, evicted=0, decided=20) for held in ([10, 12], [10, 12, 14])]
    peaks = scaling.expected_peaks(Sampled(chains, num_heads=2, shared=8, step_ms=None, seconds=0.0))
    # Alone 12 or 14; together 8 + 4 + 4 at the second step.
    assert peaks.tolist() == [(12 + 14) / 2 / 2, 16 / 2]


def test_a_file_of_problems_is_scored(tiny, problems, tmp_path):
    model, tokenizer = tiny
    texts = [tokenizer.decode(p.input_ids) for p in problems.problems]
    lines = [{"prompt": text, "answer": float(p.answer)} for text, p in zip(texts, problems.problems, strict=True)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ours = read_problems(tmp_path / "mine.jsonl", tokenizer, answer_pattern=r"^\D*(\d+)", stop=["\n"])
    # The model knows these too well.
    rows = run_scaling(model, tokenizer, ours, sampling(ours, **HOT), [], context=CONTEXT, out=None)
    operate(model, "dense", None)
    right = []
    for number, problem in enumerate(ours.problems):
        for chain in sample_one(model, tokenizer, problem.input_ids, number, sampling(ours, **HOT)).chains:
            said = re.findall(r"\d+", tokenizer.decode(chain.tokens).split("\n")[0])
            right.append(said[:1] == [problems.problems[number].answer])
    assert 0 < sum(right) < len(right) and rows[0].value == pytest.approx(np.mean(right))
    assert {row.task for row in rows} == {"mine"} and rows[0].length is None and rows[0].chance == 0.0


def test_the_table_has_a_line_for_each_number_of_chains(run):
    rows, _ = run
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scaling_table(rows, "chains"))
    text = console.export_text()
    assert len(re.findall(r"^ *(dense|dms [+-]\d+) +[124] ", text, re.M)) == 9 and "evicted_nothing" in text


def test_a_policy_that_does_nothing_is_marked(run):
    rows, _ = run
    assert all(("evicted_nothing" in row.marks) == (row.evict_bias == -100.0) for row in rows)
    assert all(("beyond_training" in row.marks) == (row.policy == "dms") for row in rows)
    assert all("few_samples" in row.marks for row in rows)
    nothing = [row for row in rows if row.evict_bias == -100.0]
    assert all(row.cr == 1.0 and row.vs_dense.verdict == "not different" for row in nothing)


def test_a_run_goes_on_where_it_was(tiny, problems, run, tmp_path, monkeypatch):
    rows, out = run
    sampled = []

    def again(out, points=(0.0, -100.0), **changes):
        settings = sampling(problems, **changes)
        return run_scaling(*tiny, problems, settings, points, context=CONTEXT, out=out, trained_length=128)

    def counting(model, tokenizer, missing, settings):
        sampled.extend(number for number, _ in missing)
        return sample_chains(model, tokenizer, missing, settings)

    monkeypatch.setattr(scaling, "sample_chains", counting)
    assert again(out) == rows and not sampled

    gone, torn, *_ = sorted((out / "done").glob("scaling-*.json"))
    gone.unlink()
    torn.write_text(torn.read_text()[:50])
    resumed = again(out)
    assert len(sampled) == 2
    assert [replace(row, seconds=0.0, step_ms=None) for row in resumed] == [replace(row, seconds=0.0, step_ms=None) for row in rows]
    # What another setting or other gates would have said is not taken from there.
    again(out, temperature=0.5)
    assert len(sampled) == 2 + 9
    # Nor what a version that counted otherwise has kept.
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "_FORMAT", 2)
        again(out, points=[])
    assert len(sampled) == 2 + 9 + 3
    gate = tiny[0].dms.layers[0].module.dms_gate
    with torch.no_grad():
        gate.bias.add_(1e-3)
        again(out, points=[])
        gate.bias.sub_(1e-3)
    assert len(sampled) == 2 + 9 + 3 + 3


def test_mode_and_bias_are_left_as_they_were(tiny, problems):
    model, tokenizer = tiny
    dms.set_mode(model, "evict")
    model.dms.evict_bias = 0.25
    one = Problems("one", problems.problems[:1], problems.rule, problems.stop)
    settings = sampling(one, max_k=1, max_new_tokens=2, chains_at_once=1)
    run_scaling(model, tokenizer, one, settings, [1.0], context=CONTEXT, out=None)
    assert (model.dms.mode, model.dms.evict_bias) == ("evict", 0.25)
    model.dms.evict_bias = 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_k": 0}, "max_k is 0"),
        ({"max_k": 1000}, "1 to 512"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"points": [math.nan]}, "evict_bias"),
        ({"chains_at_once": 0}, "chains_at_once is 0"),
        ({"max_new_tokens": 1800}, "more than the model's context of 2048"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny, problems, given, said):
    points = given.pop("points", [0.0])
    with pytest.raises(ValueError, match=said):
        check_scaling(tiny[0], problems, sampling(problems, **given), points)
    with pytest.raises(ValueError, match=said):
        run_scaling(*tiny, problems, sampling(problems, **given), points, context=CONTEXT, out=None)


def curve(policy, values, cost) -> Curve:
    """Of twenty problems of two kinds and four chains. values: [2][K]; cost: of a chain."""
    costs = np.tile(cost * np.arange(1.0, 5.0), (20, 1))
    return Curve(policy, None if policy == "dense" else 0.0, {"pass": np.array(values * 10, dtype=float)}, costs, costs * 0.5)


def test_dms_gets_as_many_chains_as_the_budget_allows():
    dense = curve("dense", [[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6]], 10.0)
    better = curve("dms", [[0.5, 0.6, 0.7, 0.8]] * 2, 4.0)
    found = {(row.dense_k, row.budget): row for row in equal_budgets(dense, [better], [1, 2], make_draws(20, "test"))}
    one, two = found[1, "entries_read"], found[2, "entries_read"]
    assert (one.dms_k, one.dms_value, one.dms_cost, one.capped) == (2, pytest.approx(0.6), 8.0, False)
    versus = one.vs_dense
    assert versus.difference == pytest.approx(0.4) and 0.3 < versus.ci_low < 0.4 < versus.ci_high < 0.5
    assert versus.verdict == "better"
    assert (two.dms_k, two.capped) == (4, True)
    assert found[1, "peak_entries"].dms_k == 2
    (finding,) = scaling_findings(found.values(), "sums")
    (sentence,) = finding.sentences
    assert (
        "dense with 1 chain 0.200, dms with 2 0.600, better (+0.400" in sentence
        and "dense with 2 chains 0.300, dms with all 4, which take less, 0.800, better (" in sentence
    )
    dear = equal_budgets(dense, [curve("dms", [[0.5] * 4] * 2, 11.0)], [1], make_draws(20, "test"))
    assert dear[0].dms_k is None and "a single chain of dms takes more" in scaling_findings(dear, "sums")[0].sentences[0]


@pytest.mark.parametrize(("cost", "capped"), [(10.0, False), (9.0, False), (8.0, True), (4.0, True)])
def test_a_budget_is_left_over_where_one_more_chain_fits(cost, capped):
    """Four chains of dense take 40; five of dms 5 * cost."""
    dense, ours = (curve(policy, [[0.5] * 4] * 2, each) for policy, each in (("dense", 10.0), ("dms", cost)))
    rows = equal_budgets(dense, [ours], [4], make_draws(20, "test"))
    assert {(row.dms_k, row.capped) for row in rows} == {(4, capped)}
    (finding,) = scaling_findings(rows, "sums")
    (sentence,) = finding.sentences
    assert ("take less" in sentence) == capped and "dense with 4 chains 0.500" in sentence and "not different" in sentence
