"""Checkpointed layers: attention is not run again, and what waits for the backward can wait in host memory."""

import gc

import pytest
import torch

from dms.masks import Tokens
from dms.modes import Noise, set_mode
from dms.retrofitting import gate_parameters
from dms.training import offload
from dms_kernels import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


@pytest.fixture
def build(build_gated):
    def build(family="llama", checkpointing=True, offloads=False, **options):
        # Biases and sinks come from torch's own generator.
        torch.manual_seed(0)
        model = build_gated(family, tau=1.0, **options).train()
        model.dms.offload_activations = offloads
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    return build


def packed():
    """Two rows: documents of 20 and 12 tokens, and one of 9 among padding."""
    segment = torch.tensor([[1] * 20 + [2] * 12, [0] * 5 + [1] * 9 + [0] * 18], dtype=torch.int32)
    position = torch.cat([torch.arange(n) for n in (20, 12, 5, 9, 18)]).view(2, 32)
    ids = torch.randint(2, 97, (2, 32), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "position_ids": position}, Tokens(segment, position.int())


def forward(model):
    batch, tokens = packed()
    set_mode(model, "train", Noise(7, torch.tensor([4, 9])), tokens)
    logits = model(**batch, use_cache=False).logits
    forward = model.dms.forward
    share = sum(forward.evicted_count.values()) / sum(forward.decided_count.values())
    return logits.log_softmax(-1)[..., 0].mean().neg() + share.mean(), forward


def gradients(model, backwards=1):
    """Gradients of everything that trains, and how often attention's forward ran in each gated layer."""
    dispatch.reset_calls()
    model.zero_grad()
    loss, _ = forward(model)
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    number = dispatch.calls()["gated_attention"]["reference"] / len(model.dms.layers)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, number


@pytest.mark.parametrize("offloads", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"granularity": "layer", "alignment": "next"}),
        ("llama", {"alignment": "next", "sinks": 2}),
        # Softcap; a sink logit and layers without gates; a parallel layer; experts, whose routing must not change either.
        ("gemma2", {}),
        ("gpt_oss", {}),
        ("gpt_neox", {}),
        ("qwen3_moe", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "own",
)
def test_attention_is_not_run_again(family, options, offloads, build):
    want, once = gradients(build(family, checkpointing=False, **options))
    actual, number = gradients(build(family, offloads=offloads, **options))
    assert once == number == 1
    assert actual.keys() == want.keys() and any("dms_gate" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("offloads", [False, True])
def test_a_retained_graph_runs_it_again_from_the_second_backward_on(offloads, build):
    once, _ = gradients(build(offloads=offloads))
    thrice, number = gradients(build(offloads=offloads), backwards=3)
    assert number == 3
    for name, gradient in once.items():
        torch.testing.assert_close(thrice[name], 3 * gradient, rtol=1e-5, atol=1e-6)


def test_what_was_kept_is_freed_as_soon_as_used(build):
    model = build(num_hidden_layers=3)
    loss, passed = forward(model)
    assert sorted(passed.first_passes) == [0, 1, 2]
    seen = []
    for layer in model.dms.layers:
        layer.module.dms_gate.register_forward_hook(lambda *_: seen.append(sorted(passed.first_passes)))
    loss.backward()
    assert seen == [[0, 1, 2], [0, 1], [0]] and not passed.first_passes


def test_nothing_is_kept_without_checkpointing_or_gradients(build):
    _, passed = forward(build(checkpointing=False))
    assert not passed.first_passes
    model = build(offloads=True)
    with torch.no_grad():
        _, passed = forward(model)
    assert not passed.first_passes and passed.store is None


@pytest.fixture
def spied(monkeypatch):
    """Every tensor that was put into a store, and every one that was fetched."""
    put, got = [], []

    def spy(name, seen):
        original = getattr(offload.HostStore, name)

        def method(store, argument):
            result = original(store, argument)
            seen.append(result)
            return result

        monkeypatch.setattr(offload.HostStore, name, method)

    spy("put", put)
    spy("get", got)
    return put, got


def test_inputs_and_attention_outputs_rest_in_the_store(build, spied):
    put, got = spied
    loss, _ = forward(build(offloads=True, num_hidden_layers=4))
    shapes = [(2, 32, 64), (2, 32, 4, 16), (2, 4, 32)]
    assert [tuple(resting.far.shape) for resting in put] == shapes * 4
    # The last two layers' have not left.
    assert [resting.near is None for resting in put] == [True] * 6 + [False] * 6
    loss.backward()
    assert [tuple(tensor.shape) for tensor in got] == shapes * 4
    for number, tensor in enumerate(got):
        layer = 3 - number // 3
        assert torch.equal(tensor, put[3 * layer + number % 3].far)


def test_tensors_leave_their_device_and_come_back_the_same():
    store, tensors, resting = offload.HostStore(), [], []
    for number in range(4):
        store.begin_group()
        tensors.append(torch.full((3, 2), float(number)))
        resting.append(store.put(tensors[-1]))
    assert [r.near is None for r in resting] == [True, True, False, False]
    assert all(r.far.data_ptr() != x.data_ptr() for r, x in zip(resting, tensors, strict=True))
    for number in (3, 2):
        assert store.get(resting[number]).data_ptr() == tensors[number].data_ptr()
    # The one before is on its way by now; the one before that is not.
    assert [r.near is None for r in resting] == [True, False, True, True]
    # What is far is what was put, not what became of it.
    tensors[1].fill_(-1.0)
    for number in (1, 0, 1):
        assert torch.equal(store.get(resting[number]), torch.full((3, 2), float(number)))


def test_each_tensor_comes_back_once(build, monkeypatch):
    returns = []
    original = offload.HostStore._begin_return

    def count(store, resting):
        if resting.near is None:
            returns.append(id(resting))
        original(store, resting)

    monkeypatch.setattr(offload.HostStore, "_begin_return", count)
    loss, _ = forward(build(offloads=True, num_hidden_layers=6))
    loss.backward()
    # Three of each layer; those of the last two had not left.
    assert len(returns) == len(set(returns)) == 3 * 4


def test_a_store_holds_nothing_that_is_not_asked_for_any_more(build):
    model = build(offloads=True)
    loss, passed = forward(model)
    references = [r for group in passed.store._groups for r in group]
    assert len(references) == 3 * 2 and all(r() is not None for r in references)
    loss.backward()
    del loss
    gc.collect()
    assert all(r() is None for r in references)


def test_gates_train_alike_with_offloading(build):
    """Several steps, with forwards of a teacher in between."""
    courses = []
    for offloads in (False, True):
        model = build(offloads=offloads)
        model.requires_grad_(False)
        gates = list(gate_parameters(model).values())
        for parameter in gates:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(gates, lr=0.1)
        course = []
        for _ in range(3):
            loss, _ = forward(model)
            set_mode(model, "dense")
            with torch.no_grad():
                model(packed()[0]["input_ids"], use_cache=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        courses.append(course)
    assert courses[0] == courses[1] and len(set(courses[0])) == 3
