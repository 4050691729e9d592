"""Each training-free policy against a brute-force trace: plain loops over positions that follow its paper, on recorded queries and keys."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dms.evaluation.policies import TRAINING_FREE, make_policy_cache
from dms.evaluation.policies.cache import PolicyLayer
from dms.modes import set_mode

BUDGET = 20


class Recorder:
    """What every forward of one layer was given, and what it held afterwards."""

    def __init__(self, monkeypatch):
        self.layers: dict[int, list[dict]] = {}
        attend, end_reading = PolicyLayer.attend, PolicyLayer.end_reading

        def recording(layer, query, **options):
            k, v = layer.pending.k.clone(), layer.pending.v.clone()
            out = attend(layer, query, **options)
            note = {"q": query, "k": k, "v": v, "out": out, "options": options}
            self.layers.setdefault(id(layer), []).append({name: _numpy(value) for name, value in note.items()})
            return out

        def ending(layer):
            end_reading(layer)
            self.layers[id(layer)][-1]["alive"] = layer.position_BHS.tolist()

        monkeypatch.setattr(PolicyLayer, "attend", recording)
        monkeypatch.setattr(PolicyLayer, "end_reading", ending)


def _numpy(value):
    return value.double().numpy() if isinstance(value, torch.Tensor) else value


class Trace:
    """One row and KV head of one layer: its texts' keys and values by position, and which positions live."""

    def __init__(self):
        self.k, self.v, self.alive, self.received, self.queries = [], [], [], {}, []


def weights_of(q_GD, position: int, trace: Trace, options, sinks_G) -> np.ndarray:
    """[G, alive]: softmax of a query at `position` over the living entries that it can see."""
    found = []
    for g, q_D in enumerate(q_GD):
        scores = []
        for p in trace.alive:
            score = float(q_D @ trace.k[p]) * options["scale"] if p <= position else -math.inf
            scores.append(options["softcap"] * math.tanh(score / options["softcap"]) if options["softcap"] and p <= position else score)
        exps = [math.exp(score) for score in scores]
        found.append(np.array(exps) / (sum(exps) + (math.exp(sinks_G[g]) if sinks_G is not None else 0.0)))
    return np.array(found)


def lowest(trace: Trace, score: dict[int, float], protected: set[int]) -> None:
    """Drop, one at a time, the living entry of the lowest score; of equal ones the oldest."""
    while len(trace.alive) > BUDGET:
        candidates = [p for p in trace.alive if p not in protected and p != trace.alive[-1]]
        trace.alive.remove(min(candidates, key=lambda p: (score[p], p)))


def h2o(traces, weights, new):
    for trace, by_query in zip(traces, weights, strict=True):
        for w_GS in by_query:
            for p, w in zip(trace.alive, w_GS.sum(0), strict=True):
                trace.received[p] = trace.received.get(p, 0.0) + w
        lowest(trace, trace.received, set(trace.alive[-(BUDGET // 2) :]))


def tova(traces, weights, new):
    mean = {p: np.mean([by_query[-1][:, i].mean() for by_query in weights]) for i, p in enumerate(traces[0].alive)}
    for trace in traces:
        lowest(trace, mean, set())


def snapkv(traces, weights, new):
    for trace, by_query in zip(traces, weights, strict=True):
        window = min(32, BUDGET // 2)
        last = by_query[-window:]
        before = trace.alive[:-window]
        votes = [np.mean([sum(w_GS[g][i] for w_GS in last) for g in range(len(last[0]))]) for i in range(len(before))]
        # Five neighbours, the places beyond the ends counted as 0.
        pooled = {p: sum(votes[j] for j in range(i - 2, i + 3) if 0 <= j < len(votes)) / 5 for i, p in enumerate(before)}
        lowest(trace, pooled, set(trace.alive[-window:]))


def keydiff(traces, weights, new):
    for trace in traces:
        units = {p: trace.k[p] / np.linalg.norm(trace.k[p]) for p in trace.alive}
        anchor = sum(units.values()) / len(units)
        lowest(trace, {p: -float(u @ anchor) / np.linalg.norm(anchor) for p, u in units.items()}, set())


BRUTE_FORCE = {"h2o": h2o, "tova": tova, "snapkv": snapkv, "keydiff": keydiff}
LOOKS_AT = {"h2o": None, "tova": 1, "snapkv": BUDGET // 2}


def replay(name: str, notes: list[dict], sinks) -> None:
    """Walk through a layer's forwards and hold what it kept, and what it gave back, to the trace."""
    B, Hq = notes[0]["q"].shape[:2]
    H = notes[0]["k"].shape[1]
    G = Hq // H
    traces = [[Trace() for _ in range(H)] for _ in range(B)]
    for note in notes:
        options, num_new = note["options"], note["q"].shape[2]
        for b in range(B):
            weights = []
            for h, trace in enumerate(traces[b]):
                sinks_G = None if sinks is None else sinks[h * G : (h + 1) * G]
                first = len(trace.k)
                for n in range(num_new):
                    trace.k.append(note["k"][b, h, n])
                    trace.v.append(note["v"][b, h, n])
                    trace.alive.append(first + n)
                    trace.queries.append(note["q"][b, h * G : (h + 1) * G, n])
                for n in range(num_new):
                    w_GS = weights_of(trace.queries[first + n], first + n, trace, options, sinks_G)
                    expected = w_GS @ np.array([trace.v[p] for p in trace.alive])
                    assert np.allclose(note["out"][b, n, h * G : (h + 1) * G], expected, atol=1e-5), "what attention read"
                looked = LOOKS_AT.get(name, 1) or num_new
                places = range(max(0, len(trace.k) - looked), len(trace.k))
                weights.append([weights_of(trace.queries[p], p, trace, options, sinks_G) for p in places])
            BRUTE_FORCE[name](traces[b], weights, num_new)
            assert note["alive"][b] == [trace.alive for trace in traces[b]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", sorted(BRUTE_FORCE))
@torch.no_grad()
def test_traces(name, family, build_gated, make_batch, monkeypatch):
    # In float64 no two scores are the same but for rounding; gpt_oss's experts have no float64.
    model = build_gated(family) if family == "gpt_oss" else build_gated(family).double()
    recorder = Recorder(monkeypatch)
    set_mode(model, "evict")
    cache = make_policy_cache(model, name, BUDGET)
    ids, at = make_batch(2, 70)["input_ids"], 0
    prompt = [54] if TRAINING_FREE[name].reads_whole_prompt else [30, 7, 17]
    for size in (*prompt, *[1] * 16):
        model(ids[:, at : at + size], past_key_values=cache)
        at += size
    modules = [layer.module for layer in model.dms.layers]
    assert len(recorder.layers) == len(modules)
    for module, notes in zip(modules, recorder.layers.values(), strict=True):
        sinks = getattr(module, "sinks", None)
        replay(name, notes, None if sinks is None else sinks.double().numpy())
    for layer in cache.compacted_layers().values():
        assert layer.entries_alive().unique().tolist() == [BUDGET]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("sizes", [[70], [30, 7, 17, *[1] * 16]])
@torch.no_grad()
def test_a_sliding_window_is_a_mask(family, sizes, build_gated, make_batch):
    """In a forward of any length each query sees the first 4 tokens and the latest, as many as the budget: as gates that evict everything say."""
    model, ids = build_gated(family), make_batch(2, 70)["input_ids"]
    set_mode(model, "evict")
    cache = make_policy_cache(model, "sliding_window", BUDGET)
    found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)
    for layer in cache.compacted_layers().values():
        assert layer.entries_alive().unique().tolist() == [BUDGET]
    model.dms.config = replace(model.dms.config, window=BUDGET - 5, sinks=4, alignment="own")
    model.dms.evict_bias = math.inf
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_random_keeps_a_uniform_sample(build_gated, make_batch):
    model, held = build_gated("llama"), torch.zeros(60)
    set_mode(model, "evict")
    for seed in range(20):
        cache = make_policy_cache(model, "random", BUDGET, seed)
        ids = make_batch(2, 60)["input_ids"]
        for part in ids.split([40, 10, *[1] * 10], 1):
            model(part, past_key_values=cache)
        for layer in cache.compacted_layers().values():
            held += torch.bincount(layer.position_BHS.flatten(), minlength=60)
    # 20 seeds x 2 layers x 2 rows x 2 heads, each token with probability 19 / 59, the newest always.
    num, p = 160, (BUDGET - 1) / 59
    assert held[59] == num
    assert abs(held[:59].mean() / num - p) < 1e-6
    assert ((held[:59] / num - p).abs() < 5 * math.sqrt(p * (1 - p) / num)).all()


@torch.no_grad()
def test_entries_are_freed(build_gated, make_batch):
    model = build_gated("llama")
    set_mode(model, "evict")
    ids = make_batch(1, 500)["input_ids"]
    held = {}
    for budget in (500, 50):
        cache = make_policy_cache(model, "h2o", budget)
        for part in ids.split(20, 1):
            model(part, past_key_values=cache)
        held[budget] = cache.report(warn=False)
    assert held[500].alive == held[500].seen and held[50].alive * 10 == held[50].seen
    assert held[50].bytes < held[500].bytes / 3


@torch.no_grad()
def test_a_fork_goes_its_own_way(build_gated, make_batch):
    model = build_gated("llama")
    set_mode(model, "evict")
    ids = make_batch(1, 80)["input_ids"]

    def end(cache, tokens) -> list:
        for part in tokens.split(1, 1):
            model(part, past_key_values=cache)
        return [layer.position_BHS.tolist() for layer in cache.compacted_layers().values()]

    first, alone = make_policy_cache(model, "h2o", BUDGET), make_policy_cache(model, "h2o", BUDGET)
    for cache in (first, alone):
        model(ids[:, :60], past_key_values=cache)
    other = first.fork()
    end(other, ids[:, 60:].flip(1))
    assert end(first, ids[:, 60:]) == end(alone, ids[:, 60:])


@pytest.mark.parametrize("name", sorted(set(TRAINING_FREE) - {"sliding_window"}))
def test_what_policies_refuse(name, build_gated, make_batch):
    model = build_gated("llama")
    set_mode(model, "evict")
    with pytest.raises(ValueError, match="without padding"):
        model(**make_batch(2, 20, left=[0, 5]), past_key_values=make_policy_cache(model, name, BUDGET))


@pytest.mark.parametrize("name", sorted(TRAINING_FREE))
def test_a_budget_of_nothing_is_refused(name, build_gated):
    with pytest.raises(ValueError, match="the budget is 0 entries"):
        make_policy_cache(build_gated("llama"), name, 0)
