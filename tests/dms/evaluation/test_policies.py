"""Each training-free policy against a brute-force trace: plain loops over positions that follow its paper, on recorded queries and keys."""

import functools
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dms.cache import DMSCache
from dms.evaluation.engine.decode import read, read_whole_prompt
from dms.evaluation.policies import TRAINING_FREE, make_policy, make_policy_cache
from dms.evaluation.policies import rotation as rotation_module
from dms.evaluation.policies.cache import PolicyLayer
from dms.evaluation.policies.rotation import NoRotation, rotations
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
            self.layers[id(layer)][-1]["alive"] = alive_positions(layer)

        monkeypatch.setattr(PolicyLayer, "attend", recording)
        monkeypatch.setattr(PolicyLayer, "end_reading", ending)


def alive_positions(layer: PolicyLayer) -> list[list[list[int]]]:
    """By row and head."""
    rows = zip(layer.position_BHS, layer.alive_BHS, strict=True)
    return [[p_S[alive_S].tolist() for p_S, alive_S in zip(p_HS, alive_HS, strict=True)] for p_HS, alive_HS in rows]


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


# Each gives, for each head, the scores of living entries and those that stay in any case.


def h2o(traces, weights, options):
    for trace, by_query in zip(traces, weights, strict=True):
        for w_GS in by_query:
            for p, w in zip(trace.alive, w_GS.sum(0), strict=True):
                trace.received[p] = trace.received.get(p, 0.0) + w
    return [(trace.received, set(trace.alive[-(BUDGET // 2) :])) for trace in traces]


def tova(traces, weights, options):
    mean = {p: np.mean([by_query[-1][:, i].mean() for by_query in weights]) for i, p in enumerate(traces[0].alive)}
    return [(mean, set()) for _ in traces]


def snapkv(traces, weights, options):
    found = []
    for trace, by_query in zip(traces, weights, strict=True):
        window = min(32, BUDGET // 2)
        last = by_query[-window:]
        before = trace.alive[:-window]
        votes = [np.mean([sum(w_GS[g][i] for w_GS in last) for g in range(len(last[0]))]) for i in range(len(before))]
        # Five neighbours, the places beyond the ends counted as 0.
        pooled = {p: sum(votes[j] for j in range(i - 2, i + 3) if 0 <= j < len(votes)) / 5 for i, p in enumerate(before)}
        found.append((pooled, set(trace.alive[-window:])))
    return found


def keydiff(traces, weights, options):
    found = []
    for trace in traces:
        units = {p: trace.k[p] / np.linalg.norm(trace.k[p]) for p in trace.alive}
        anchor = sum(units.values()) / len(units)
        found.append(({p: -float(u @ anchor) / np.linalg.norm(anchor) for p, u in units.items()}, set()))
    return found


@functools.cache
def rotation(position: int, D: int) -> np.ndarray:
    """[D, D], of all families here: halves are rotated against each other."""
    angle = position * 10000.0 ** -(np.arange(0, D, 2) / D)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return np.block([[cos, -sin], [sin, cos]])


@functools.cache
def mean_rotation(first: int, D: int) -> np.ndarray:
    """[D, D]: over 512 positions."""
    return sum(rotation(first + j, D) for j in range(512)) / 512


def expected_attention(traces, weights, options):
    found, scale = [], options["scale"]
    for trace in traces:
        end, D = len(trace.k), len(trace.k[0])
        ahead = mean_rotation(end, D)
        others, share = [p for p in trace.alive if p >= 4], 0.0
        for g in range(len(trace.queries[0])):
            # Rotations are orthogonal.
            q = np.array([rotation(p, D).T @ trace.queries[p][g] for p in range(4, end)])
            mean, covariance = ahead @ q.mean(0), ahead @ np.cov(q.T, bias=True) @ ahead.T
            z = np.array([scale * mean @ trace.k[p] + scale**2 / 2 * trace.k[p] @ covariance @ trace.k[p] for p in others])
            share = share + np.exp(z - z.max()) / np.exp(z - z.max()).sum() / len(trace.queries[0])
        found.append(({p: float(x) * np.linalg.norm(trace.v[p]) for p, x in zip(others, share, strict=True)}, {0, 1, 2, 3}))
    return found


def kvzip(traces, weights, options):
    for trace, by_query in zip(traces, weights, strict=True):
        for p, w in zip(trace.alive, by_query[-1].max(0), strict=True):
            trace.received[p] = max(trace.received.get(p, 0.0), 0.0 if p == trace.alive[-1] else w)
    return stays_of_kvzip(traces)


def stays_of_kvzip(traces):
    return [(trace.received, {0, 1, 2, 3, *trace.alive[-(BUDGET // 2) :]}) for trace in traces]


def hear_again(traces, note, sinks) -> None:
    """Put into `received` the largest attention that a query of the second reading gave each entry of the prompt, for one row of each head."""
    G, P = note["q"].shape[0] // len(traces), len(traces[0].k)
    for h, trace in enumerate(traces):
        both = Trace()
        both.k, both.alive = [*trace.k, *note["k"][h]], list(range(P + note["k"].shape[1]))
        heads = slice(h * G, (h + 1) * G)
        for n in range(note["k"].shape[1]):
            w_GS = weights_of(note["q"][heads, n], P + n, both, note["options"], None if sinks is None else sinks[heads])
            for p in range(P):
                trace.received[p] = max(trace.received.get(p, 0.0), w_GS[:, p].max())


def lowest(traces, scored) -> None:
    """Drop of each head, one at a time, the living entry of the lowest score; of equal ones the oldest."""
    for trace, (score, stays) in zip(traces, scored, strict=True):
        while len(trace.alive) > BUDGET:
            candidates = [p for p in trace.alive if p not in stays and p != trace.alive[-1]]
            trace.alive.remove(min(candidates, key=lambda p: (score[p], p)))


def lowest_of_all(traces, scored) -> None:
    """The same over all heads of a layer, but a head's best fifth of the budget stays."""
    droppable = []
    for h, (trace, (score, stays)) in enumerate(zip(traces, scored, strict=True)):
        finite = {p: math.inf if p in stays or p == trace.alive[-1] else score[p] for p in trace.alive}
        best = sorted(finite, key=lambda p: (finite[p], p))[-(BUDGET // 5) :]
        droppable += [(finite[p], h, p) for p in trace.alive if p not in best and finite[p] < math.inf]
    surplus = sum(len(trace.alive) for trace in traces) - BUDGET * len(traces)
    for _, h, p in sorted(droppable)[: max(0, surplus)]:
        traces[h].alive.remove(p)


SCORES = {"h2o": h2o, "tova": tova, "snapkv": snapkv, "keydiff": keydiff, "expected_attention": expected_attention, "kvzip": kvzip}
ADA = ("ada_snapkv", "ada_expected_attention", "ada_kvzip")
TRACED = [
    pytest.param(name, family, marks=[pytest.mark.slow] if family != "llama" and name in ("expected_attention", *ADA) else [])
    for name in (*SCORES, *ADA)
    for family in ("llama", "gemma2", "gpt_oss")
]
LOOKS_AT = {"h2o": None, "tova": 1, "snapkv": BUDGET // 2}


def replay(name: str, notes: list[dict], again: dict | None, sinks) -> None:
    """Walk through a layer's forwards and hold what it kept, and what it gave back, to the trace. again: the second reading of the prompt."""
    scores, drop = SCORES[name.removeprefix("ada_")], lowest_of_all if name.startswith("ada_") else lowest
    B, Hq = notes[0]["q"].shape[:2]
    H = notes[0]["k"].shape[1]
    G = Hq // H
    traces = [[Trace() for _ in range(H)] for _ in range(B)]
    for number, note in enumerate(notes):
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
                looked = LOOKS_AT.get(name.removeprefix("ada_"), 1) or num_new
                places = range(max(0, len(trace.k) - looked), len(trace.k))
                weights.append([weights_of(trace.queries[p], p, trace, options, sinks_G) for p in places])
            if again is None or number > 0:
                drop(traces[b], scores(traces[b], weights, options))
            assert note["alive"][b] == [trace.alive for trace in traces[b]]
            if again is not None and number == 0:
                hear_again(traces[b], {**again, "q": again["q"][b], "k": again["k"][b]}, sinks)
                drop(traces[b], stays_of_kvzip(traces[b]))


@pytest.mark.parametrize(("name", "family"), TRACED)
@torch.no_grad()
def test_traces(name, family, build_gated, make_batch, monkeypatch):
    # In float64 no two scores are the same but for rounding; gpt_oss's experts have no float64.
    model = build_gated(family) if family == "gpt_oss" else build_gated(family).double()
    recorder = Recorder(monkeypatch)
    set_mode(model, "evict")
    cache, kind = make_policy_cache(model, name, BUDGET), TRAINING_FREE[name]
    ids, at = make_batch(2, 70)["input_ids"], 0
    prompt = [54] if kind.reads_whole_prompt else [30, 7, 17]
    for size in (*prompt, *[1] * 16):
        model(ids[:, at : at + size], past_key_values=cache)
        if at == 0:
            assert cache.finish_prompt(model, ids[:, :size]) == kind.rereads_prompt
        at += size
    modules = [layer.module for layer in model.dms.layers]
    of_layers = list(recorder.layers.values())
    assert len(of_layers) == len(modules) * (1 + kind.rereads_prompt)
    for number, module in enumerate(modules):
        sinks = getattr(module, "sinks", None)
        again = of_layers[len(modules) + number][0] if kind.rereads_prompt else None
        replay(name, of_layers[number], again, None if sinks is None else sinks.double().numpy())
    for layer in cache.compacted_layers().values():
        alive_BH = layer.entries_alive()
        assert alive_BH.sum(1).unique().tolist() == [BUDGET * alive_BH.shape[1]]
        assert alive_BH.tolist() == [[len(head) for head in row] for row in alive_positions(layer)] and int(alive_BH.min()) >= BUDGET // 5
    uneven = any((layer.entries_alive() != BUDGET).any() for layer in cache.compacted_layers().values())
    assert uneven == (name in ADA)
    if kind.rereads_prompt:
        # What came the second time was the prompt, after itself.
        set_mode(model, "dense")
        keys = DynamicCache(config=model.config)
        model(ids[:, :54].repeat(1, 2), past_key_values=keys)
        for note, layer in zip(of_layers[len(modules) :], model.dms.layers, strict=True):
            assert np.allclose(note[0]["k"], _numpy(keys.layers[layer.index].keys[:, :, 54:]), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_second_reading_in_parts(family, build_gated, make_batch, monkeypatch):
    """However many tokens a forward of it has, and however many weights are found at once, it hears the same. The families: plain, soft caps, sinks."""
    model, ids = build_gated(family), make_batch(2, 54)["input_ids"]
    set_mode(model, "evict")
    heard = []
    for num_tokens, num_weights in [(54, 2**21), (17, 2**21), (17, 1500), (54, 1)]:
        monkeypatch.setattr("dms.evaluation.policies.cache._REREAD_TOKENS", num_tokens)
        monkeypatch.setattr("dms.evaluation.policies.cache._NEAR_WEIGHTS", num_weights)
        cache = make_policy_cache(model, "kvzip", BUDGET)
        model(ids, past_key_values=cache)
        heard.append(cache.hear_prompt(model, ids))
    for again in heard[1:]:
        torch.testing.assert_close(again, heard[0], rtol=1e-4, atol=1e-6)


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
def test_random_attention_keeps_the_prompt(build_gated, make_batch):
    """The prompt, the newest half of the budget, and of the others a draw that is made anew at each step, in each head by itself."""
    model, num_prompt, length, num_recent = build_gated("llama"), 6, 40, BUDGET // 2
    ids, held = make_batch(2, length)["input_ids"], torch.zeros(length)
    set_mode(model, "evict")
    for seed in range(8):
        cache = make_policy_cache(model, "random_attention", BUDGET, seed)
        for part in ids.split([num_prompt, *[1] * (length - num_prompt)], 1):
            model(part, past_key_values=cache)
        for layer in cache.compacted_layers().values():
            assert layer.entries_alive().unique().tolist() == [BUDGET]
            assert len(set(map(tuple, layer.position_BHS.flatten(0, 1).tolist()))) > 1
            held += torch.bincount(layer.position_BHS.flatten(), minlength=length)
    num = 8 * 2 * 2 * 2
    assert (held[:num_prompt] == num).all() and (held[-num_recent:] == num).all()
    # Four places for the others: each draw keeps four of five.
    num_left = BUDGET - num_prompt - num_recent
    last = length - num_recent
    p = torch.tensor([(num_left / (num_left + 1)) ** min(last - place, last - num_prompt - num_left) for place in range(num_prompt, last)])
    assert held[num_prompt:last].sum() == num * num_left
    assert ((held[num_prompt:last] / num - p).abs() < 5 * (p * (1 - p) / num).sqrt()).all()


@torch.no_grad()
def test_random_attention_keeps_the_beginning_of_a_prompt_that_does_not_fit(build_gated, make_batch):
    model = build_gated("llama")
    set_mode(model, "evict")
    cache = make_policy_cache(model, "random_attention", BUDGET)
    for part in make_batch(2, 60)["input_ids"].split([50, *[1] * 10], 1):
        model(part, past_key_values=cache)
    for layer in cache.compacted_layers().values():
        for head in layer.position_BHS.flatten(0, 1).tolist():
            assert head[:9] == list(range(9)) and head[10:] == list(range(50, 60))


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


@torch.no_grad()
def test_a_fork_of_uneven_heads(build_gated, make_batch):
    model, ids = build_gated("llama"), make_batch(1, 80)["input_ids"]
    set_mode(model, "evict")
    cache = make_policy_cache(model, "ada_expected_attention", BUDGET)
    model(ids[:, :60], past_key_values=cache)
    forks, ends = [cache.fork(), cache], []
    for fork in forks:
        for part in ids[:, 60:].split(1, 1):
            model(part, past_key_values=fork)
        ends.append([alive_positions(layer) for layer in fork.compacted_layers().values()])
    assert ends[0] == ends[1]


@torch.no_grad()
def test_a_prompt_that_must_be_read_twice(build_gated, make_batch):
    model, ids = build_gated("llama", max_position_embeddings=100), make_batch(1, 51)["input_ids"]
    set_mode(model, "evict")
    cache = make_policy_cache(model, "kvzip", BUDGET)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"KVzip reads a prompt twice, .* 100 tokens does not hold twice 51; give documents of at most 50"):
        cache.finish_prompt(model, ids)
    with pytest.raises(ValueError, match="finish_prompt was given 50 tokens, and 51 were read"):
        cache.finish_prompt(model, ids[:, 1:])
    with pytest.raises(ValueError, match="call finish_prompt"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gemma3n_text", "gpt_oss", "cohere", "cohere2", "qwen3", "gpt2", "phi", "olmo2"]
)
@torch.no_grad()
def test_rotations_are_those_of_the_model(family, build_gated):
    """Of one query at several positions, seen in the model: undone it is the same, and the mean of its rotations is `ahead`."""
    model = build_gated(family)
    if family in ("gpt2", "phi"):
        with pytest.raises(ValueError, match=r"how .* rotates its queries is not known here"):
            rotations(model)
        return
    position = torch.tensor([3, 4, 5])
    seen = rotation_module._same_queries(model, position.tolist())
    for layer, rotation in zip(model.dms.layers, rotations(model).values(), strict=True):
        query_PH1D = seen[layer]
        before = torch.stack([rotation.undo(q[None], p[None])[0] for q, p in zip(query_PH1D, position, strict=True)])
        torch.testing.assert_close(before, before[:1].expand_as(before), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rotation.ahead(before[:1], 3, 3), query_PH1D.mean(0, keepdim=True), rtol=1e-4, atol=1e-4)
        assert isinstance(rotation, NoRotation) == (family == "cohere2")


def test_frequencies_that_depend_on_the_length_are_refused(build_gated):
    model = build_gated("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="depend on a text's length"):
        make_policy_cache(model, "expected_attention", BUDGET)


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


WHOLE = [name for name, kind in TRAINING_FREE.items() if kind.reads_whole_prompt]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_prompt_read_once_for_all_policies_is_as_each_would_read_it(family, build_gated, make_batch):
    """Whole readings, and second ones, are shared: what is held after the prompt, and all that follows, is the same to the bit."""
    model, ids = build_gated(family), make_batch(2, 70)["input_ids"]
    budgets = (12, BUDGET)
    prompt = read_whole_prompt(model, ids, 54)
    for budget in budgets:
        for name in WHOLE:
            shared = prompt.begin(make_policy(model, name, budget, 3), nullcontext)
            assert shared.has_reread == TRAINING_FREE[name].rereads_prompt
            alone = read(model, ids, 54, make_policy_cache(model, name, budget, 3), chunk=None)
            beside = read(model, ids, 54, shared, chunk=None, prompt=prompt)
            for field in ("nll_BN", "entries_B", "reads_B", "peak_B"):
                assert torch.equal(getattr(alone, field), getattr(beside, field)), (name, field)
            assert (alone.bytes, alone.num_seen, alone.evicted) == (beside.bytes, beside.num_seen, beside.evicted)
            assert beside.seconds > prompt.seconds > 0


@pytest.mark.parametrize("kind", ["dense", "dms", "sliding_window", "tova"])
@torch.no_grad()
def test_what_follows_a_prompt_is_read_in_parts_as_token_by_token(kind, build_gated, make_batch):
    """To the same figures where gates decide, or nobody does; other policies hold up to a part more."""
    model, ids = build_gated("llama"), make_batch(2, 70)["input_ids"]

    def found(decode_chunk):
        made = {"dense": lambda: DynamicCache(config=model.config), "dms": lambda: DMSCache(model)}
        cache = made[kind]() if kind in made else make_policy_cache(model, kind, BUDGET)
        return read(model, ids, 20, cache, chunk=7, decode_chunk=decode_chunk, keep_logits=True)

    in_parts, one_by_one = found(16), found(1)
    assert in_parts.num_seen == one_by_one.num_seen and torch.equal(in_parts.entries_B, one_by_one.entries_B)
    if kind == "tova":
        assert (in_parts.peak_B > one_by_one.peak_B).all() and (in_parts.peak_B <= BUDGET + 16).all()
        return
    assert torch.allclose(in_parts.logits_BNV, one_by_one.logits_BNV, atol=1e-5)
    if kind != "sliding_window":
        assert torch.equal(in_parts.entries_mean_B, one_by_one.entries_mean_B)
    if kind == "dense":
        assert torch.equal(in_parts.reads_B, one_by_one.reads_B)
