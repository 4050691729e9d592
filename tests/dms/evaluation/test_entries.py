"""Entries at the end, in the mean over positions and by lifetime, against what each query sees; of one window and of several."""

from functools import lru_cache

import pytest
import torch
from evicting import embedded

from dms import masks
from dms.attention import evict_pass
from dms.cache import DMSCache, masked_cache
from dms.evaluation.engine.entries import count_entries, count_shared, mean_of_budget, memory_of_cache
from dms.evaluation.engine.one_pass import read_in_one_pass
from dms.evaluation.engine.settings import EvaluationSettings
from dms.evaluation.engine.units import Unit, run_unit
from dms.evaluation.policies import QUICK_ONES, TRAINING_FREE
from dms.evaluation.stats.collect import RunFigures, collect
from dms.evaluation.stats.results import PolicyResult
from dms.evaluation.suites import make_suite
from dms.hf_compat import cache_argument
from dms.modes import set_mode

LENGTH = 96
CONFIGS = [{"window": 8}, {"window": (4, 12, 40)}, {"window": (4, 40), "alignment": "next", "sinks": 2}]


@lru_cache(maxsize=1)
def gated(number: int):
    """(model, tokenizer, two documents) of a configuration."""
    model, tokenizer = embedded(**CONFIGS[number])
    return model, tokenizer, make_suite("records", tokenizer, length=LENGTH, num_documents=2)


@torch.no_grad()
def seen_by_queries(model, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T] entries that each query sees, a head's in the mean, by the masks of a pass without a cache."""
    set_mode(model, "evict")
    model(input_ids=ids_BT, use_cache=False)
    found, config = evict_pass(model), model.dms.config
    see = [masks.visible(found.tokens, found.tokens, x, window=config.window, sinks=config.sinks) for x in found.evicted.values()]
    return torch.cat(see, 1).sum(-1).double().mean(1)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_one_pass_counts_what_queries_see(number):
    model, _, documents = gated(number)
    ids_BT = torch.tensor([document.input_ids for document in documents])
    seen_BT = seen_by_queries(model, ids_BT)
    result = read_in_one_pass(model, documents, "dms", budget=None, batch_size=1, chunk=16, seed=0)
    assert result.entries == pytest.approx(seen_BT[:, -1].tolist()) and result.entries_mean == pytest.approx(seen_BT.mean(1).tolist())
    found = collect([result])
    T = ids_BT.shape[1]
    assert found.cr == pytest.approx(T / float(seen_BT[:, -1].mean()))
    assert found.cr_mean == pytest.approx((T + 1) / 2 / float(seen_BT.mean()))
    assert found.memory == memory_of_cache(DMSCache(model)) == RunFigures.of("dms", found).memory
    assert (result.bytes is None) == (found.memory == "masked")
    # Of a result that an earlier version wrote.
    old = {name: value for name, value in result.to_dict().items() if name not in ("entries_mean", "memory", "class_share_LHK")}
    earlier = collect([PolicyResult.from_dict(old)])
    assert (earlier.cr_mean, earlier.entries_mean, RunFigures.of("dms", earlier).memory) == (None, None, "compacted")
    assert found.cr_decided("dms") == pytest.approx(earlier.cr_decided("dms"))


@pytest.mark.parametrize("number", range(len(CONFIGS)))
@torch.no_grad()
def test_shares_of_lifetimes_are_those_of_first_decisions(number):
    model, _, documents = gated(number)
    result = read_in_one_pass(model, documents, "dms", budget=None, batch_size=2, chunk=16, seed=0)
    set_mode(model, "evict")
    model(input_ids=torch.tensor([document.input_ids for document in documents]), use_cache=False)
    decided = slice(None, -1 if model.dms.config.alignment == "next" else None)
    K = len(model.dms.config.windows)
    for layer, evicted in enumerate(evict_pass(model).evicted.values()):
        decisions = evicted[:, decided].flatten(0, 1).reshape(-1, evicted.shape[2], K)
        for head in range(evicted.shape[2]):
            first = [row.index(True) if any(row) else K for row in decisions[:, head].tolist()]
            shares = [first.count(j) / len(first) for j in range(K)]
            assert result.evicted_share_LH[layer][head] == pytest.approx(sum(shares))
            assert K == 1 or result.class_share_LHK[layer][head] == pytest.approx(shares)
    assert (result.class_share_LHK is None) == (K == 1)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_decoding_counts_what_queries_see(number):
    """A prompt in parts, its last one a single token long, and then token by token."""
    model, _, documents = gated(number)
    given = min(document.prompt for document in documents)
    settings = EvaluationSettings(policies=["dense", "dms", "sliding_window", "tova"], batch_size=2, prefill_chunk=given - 1)
    results = run_unit(model, Unit("records", LENGTH, 0, documents), settings)
    # The last token is scored and not read.
    seen_BT = seen_by_queries(model, torch.tensor([document.input_ids[:-1] for document in documents]))
    dms = results["dms@0"]
    assert dms.entries == pytest.approx(seen_BT[:, -1].tolist()) and dms.entries_mean == pytest.approx(seen_BT.mean(1).tolist())
    assert dms.memory == memory_of_cache(DMSCache(model)) and (dms.bytes is None) == (dms.memory == "masked")
    T = LENGTH - 1
    assert results["dense"].entries_mean == [(T + 1) / 2] * 2 and results["dense"].memory is None
    for policy in ("sliding_window", "tova"):
        found, budget = results[f"{policy}@0"], round(sum(dms.entries) / 2)
        assert found.entries_mean == pytest.approx([sum(min(q + 1, budget) for q in range(T)) / T] * 2)
        assert found.memory == "compacted" and found.budget == budget
    assert collect([results["dense"]]).cr_mean == 1.0


def test_policies_that_run_by_name_count_alike():
    """The budget, in the mean over heads; what a prompt takes that is read whole, or twice; and what the first decoded token reads of it."""
    model, _, documents = gated(0)
    given, named = min(document.prompt for document in documents), [policy for policy in TRAINING_FREE if policy not in QUICK_ONES]
    results = run_unit(model, Unit("records", LENGTH, 0, documents), EvaluationSettings(policies=["dense", "dms", *named], batch_size=2))
    budget = round(sum(results["dms@0"].entries) / 2)
    assert budget < given
    for policy in named:
        found = results[f"{policy}@0"]
        assert found.entries == [budget] * 2 and found.reads == pytest.approx([budget + 1] * 2) and found.memory == "compacted"
        assert found.peak == [given * (1 + TRAINING_FREE[policy].rereads_prompt)] * 2


@pytest.mark.parametrize("policy", ["snapkv", "ada_kvzip"])
def test_one_pass_gives_some_policies_a_prompt_at_once(policy):
    model, _, documents = gated(0)
    results = [read_in_one_pass(model, documents, policy, budget=40, batch_size=2, chunk=chunk, seed=0) for chunk in (16, LENGTH)]
    assert results[0].entries == [40.0, 40.0]
    assert results[0].metrics == results[1].metrics


@pytest.mark.parametrize("alignment", ["own", "next"])
@torch.no_grad()
def test_masked_and_compacted_caches_count_alike(alignment):
    model, _ = embedded(alignment=alignment, sinks=3)
    set_mode(model, "evict")
    ids_BT = torch.randint(0, 200, (1, 60), generator=torch.Generator().manual_seed(0))
    counts = []
    for cache in (DMSCache(model), masked_cache(model)):
        model(input_ids=ids_BT, use_cache=True, **cache_argument(model, cache))
        counts.append((count_entries(model, cache).tolist(), count_shared(model, cache)))
    assert counts[0] == counts[1] and 0 < counts[0][1] < counts[0][0][0][0] < counts[0][0][1][0]


@pytest.mark.parametrize(("budget", "num_seen"), [(1, 1), (1, 9), (4, 9), (9, 9), (20, 9)])
def test_the_mean_of_a_budget(budget, num_seen):
    assert mean_of_budget(budget, num_seen) == pytest.approx(sum(min(q + 1, budget) for q in range(num_seen)) / num_seen)


def test_classes_are_first_decisions():
    decisions = torch.tensor([[[True, True], [True, False], [False, True], [False, False]]]).unsqueeze(2)
    assert masks.classes(decisions)[0, :, 0].tolist() == [1, 1, 2, 0]
    assert masks.classes(decisions[..., 0])[0, :, 0].tolist() == [1, 1, 0, 0]
