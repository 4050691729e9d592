"""The profile against plain counting, and against what a compacted cache holds."""

import json
from random import Random

import pytest
import torch
from evicting import embedded

import dms
from dms.cache.stats import cache_stats
from dms.evaluation.data.tasks import make_document
from dms.evaluation.data.text_sources import StdlibText
from dms.evaluation.engine import gate_profile
from dms.evaluation.engine.gate_profile import num_passes, write_profile
from dms.io import base_models
from dms.modes import set_mode, state_of
from dms.report import DocumentTrace
from dms.report.decisions import GateProfile
from dms.retrofitting import gate_parameters

LENGTHS = (96, 130)
WINDOW, SINKS = 6, 2


@pytest.fixture(scope="module", params=["own", "next"])
def model(request):
    model = base_models.load_base("builtin:tiny", "float32", "cpu")
    dms.retrofit(model, dms.DMSConfig(window=WINDOW, sinks=SINKS, scale=1.0, offset=0.0, alignment=request.param))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate_parameters(model).values():
            parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return base_models.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def documents(tokenizer):
    text = StdlibText(held_out=True)
    return [make_document(tokenizer, text, length=n, rng=Random(n), num_items=2, strict=False) for n in LENGTHS]


@pytest.fixture(scope="module")
def written(model, tokenizer, documents, tmp_path_factory):
    out, calls = tmp_path_factory.mktemp("profile"), []
    model.dms.evict_bias = 0.25
    paths = write_profile(model, tokenizer, documents, out, points=[1.0, 0.0], progress=calls.append)
    assert (model.dms.mode, model.dms.evict_bias) == ("dense", 0.25), "as it was"
    model.dms.evict_bias = 0.0
    assert len(calls) == num_passes(2, 2)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def decisions(model, document, bias):
    """[L][T][H] of None (undecided), True or False, written out from the gates' logits."""
    state = state_of(model)
    set_mode(model, "evict")
    state.evict_bias = bias
    with torch.no_grad():
        model(input_ids=torch.tensor([document.input_ids]), use_cache=False)
    state.evict_bias = 0.0
    found = []
    for index in sorted(state.forward.logits):
        hard = (state.forward.logits[index][0] > 0).tolist()
        found.append([*hard[1:], [None] * len(hard[0])] if state.config.alignment == "next" else hard)
    set_mode(model, "dense")
    return found


def alive_at(found, layer, head, query):
    return sum(k < SINKS or query - k <= WINDOW or not found[layer][k][head] for k in range(query + 1))


@pytest.mark.parametrize("point", [0, 1])
def test_the_profile_is_what_one_counts(model, documents, written, point):
    profile, _ = written
    told = profile["points"][point]
    assert told["evict_bias"] == (1.0, 0.0)[point] and profile["length"] == 130 and profile["num_documents"] == 2
    all_found = [decisions(model, document, told["evict_bias"]) for document in documents]
    num_layers, num_heads = len(all_found[0]), len(all_found[0][0][0])
    for layer in range(num_layers):
        for head in range(num_heads):
            said = [row[head] for found in all_found for row in found[layer] if row[head] is not None]
            assert told["evicted_LH"][layer][head] == pytest.approx(sum(said) / len(said), rel=1e-4)
            alive = sum(alive_at(found, layer, head, len(found[0]) - 1) for found in all_found)
            assert told["cr_LH"][layer][head] == pytest.approx(sum(LENGTHS) / alive, rel=1e-4)
    for position, cr in list(zip(told["positions"], told["cr_at"], strict=True))[::9]:
        reached = [found for found in all_found if len(found[0]) > position]
        alive = sum(alive_at(found, i, h, position) for found in reached for i in range(num_layers) for h in range(num_heads))
        assert cr == pytest.approx((position + 1) * num_layers * num_heads * len(reached) / alive, rel=1e-4)
    for part in told["bins"][::5]:
        said = [x for found in all_found for layer in found for row in layer[part["start"] : part["end"]] for x in row if x is not None]
        assert part["evicted"] == pytest.approx(sum(said) / len(said), abs=1e-4)
    assert told["positions"][-1] == 129 and told["bins"][-1]["end"] == 130


def test_the_profile_is_what_the_cache_holds(model, documents, written):
    told = written[0]["points"][1]
    cache = dms.DMSCache(model)
    set_mode(model, "evict")
    with torch.no_grad():
        model(input_ids=torch.tensor([documents[1].input_ids]), past_key_values=cache)
    set_mode(model, "dense")
    assert told["cr_at"][-1] == pytest.approx(cache_stats(cache, warn=False).cr, rel=1e-4), "the longer document alone reaches the end"


def test_traces_are_of_the_point_nearest_to_the_training(model, documents, written):
    _, traces = written
    assert traces["evict_bias"] == 0.0 and len(traces["documents"]) == 2
    read = [DocumentTrace.from_dict(document) for document in traces["documents"]]
    for trace, document in zip(read, documents, strict=True):
        found = decisions(model, document, 0.0)
        assert len(trace.tokens) == len(document.input_ids) and (trace.window, trace.sinks) == (WINDOW, SINKS)
        assert [(start, end) for start, end, _ in trace.answers] == [(a.start, a.end) for a in document.answers]
        for layer, heads in enumerate(trace.evict_prob_LHT):
            for head, probs in enumerate(heads):
                assert [None if p is None else p > 0.5 for p in probs] == [row[head] for row in found[layer]]
    assert read[0].title == "document 1"


@torch.no_grad()
def test_several_windows_are_told_apart(tokenizer, documents, tmp_path):
    model, _ = embedded((4, 12, 40), sinks=SINKS)
    paths = write_profile(model, tokenizer, documents, tmp_path, points=[0.0])
    told, traces = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    profile = GateProfile.from_dict(told)
    (point,) = profile.points
    assert profile.window == [4, 12, 40] and json.loads(json.dumps(profile.to_dict())) == told
    set_mode(model, "evict")
    firsts: dict[int, list] = {}
    for document, saved in zip(documents, traces["documents"], strict=True):
        trace = DocumentTrace.from_dict(saved)
        assert list(trace.windows) == [4, 12, 40] and trace.window == 4
        model(input_ids=torch.tensor([document.input_ids]), use_cache=False)
        for layer, (index, evicted) in enumerate(sorted(model.dms.forward.evicted.items())):
            # Of each token and head the first decision that evicts it.
            first = [[row.index(True) + 1 if any(row) else 0 for row in heads] for heads in evicted[0].tolist()]
            firsts.setdefault(index, []).extend(first)
            for head in range(evicted.shape[2]):
                assert trace.class_LHT[layer][head] == "".join(str(row[head]) for row in first)
    for layer, index in enumerate(point.layer_indices):
        for head, shares in enumerate(point.class_LHK[layer]):
            column = [row[head] for row in firsts[index]]
            assert shares == pytest.approx([column.count(j) / len(column) for j in (1, 2, 3)], abs=1e-4)
            assert point.evicted_LH[layer][head] == pytest.approx(sum(shares), abs=1e-4)


def test_it_does_not_read_every_pair_of_tokens(model, tokenizer, documents, tmp_path, monkeypatch):
    """Of 8,192 tokens the masked reference takes longer than all that is measured."""
    monkeypatch.setattr("dms.attention.evict_attention", lambda *args, **kwargs: pytest.fail("the masked reference is read"))
    write_profile(model, tokenizer, documents[:2], tmp_path, points=[0.0])
    assert state_of(model).masked_attention is None


def test_points_that_are_known_are_not_measured_again(model, tokenizer, documents, tmp_path, monkeypatch):
    measured, calls = [], []
    profile = gate_profile._profile
    monkeypatch.setattr(gate_profile, "_profile", lambda *args: measured.append(args[2]) or profile(*args))

    def points_of(points, chosen=documents, given=model):
        path, _ = write_profile(given, tokenizer, chosen, tmp_path, points=points, progress=calls.append)
        return {point["evict_bias"]: point for point in json.loads(path.read_text())["points"]}

    first = points_of([0.0])
    both = points_of([2.0, 0.0])
    assert list(both) == [2.0, 0.0] and both[0.0] == first[0.0] and measured == [0.0, 2.0]
    assert len(calls) == num_passes(2, 1) + num_passes(2, 2)
    assert list(points_of([1.0])) == [1.0, 2.0, 0.0]
    assert list(points_of([0.0], documents[:1])) == [0.0]
    assert list(points_of([1.0], given=embedded(WINDOW, sinks=SINKS + 1)[0])) == [1.0]


def test_a_profile_needs_something_to_profile(model, tokenizer, documents, tmp_path):
    for chosen, points, titles, message in (
        ([], [0.0], None, "0 documents"),
        (documents, [], None, r"points \[\]"),
        (documents, [0.0], ["a"], "1 titles for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            write_profile(model, tokenizer, chosen, tmp_path, points=points, titles=titles)
    assert not list(tmp_path.iterdir())
