"""The embedded model on the Triton kernels, in the interpreter, against plain PyTorch: a training step, generation, an exported folder.

Window 8, 64 tokens, about half of them evicted in every layer.
"""

import json
import os

import pytest
import torch
from dms_train.step import HeadLoss, Normalizer, distill_step
from safetensors.torch import load_file

import dms
import dms_kernels
from dms.cache.fused_store import FusedStore
from dms.export.folder import export
from dms.io import base_models, checkpoint
from dms.modes import state_of
from dms.retrofitting import gate_parameters

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU the kernels are compiled, see tests/dms_kernels"
)

LENGTH, NEW = 64, 8


def make_prompt(batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 2000, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def evicts_much(tiny, tmp_path_factory):
    """The embedded model with gates that evict more than a quarter in every layer."""
    model = dms.load(tiny, device="cpu", dtype="float32")
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            parameter.add_(1.0 if name.endswith("bias") else 0.0)
    folder = tmp_path_factory.mktemp("much") / "model"
    return checkpoint.save(model, folder, tokenizer=base_models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=2.0)


@pytest.fixture
def on(monkeypatch):
    """`on("triton")`: that implementation from now on, calls counted anew."""

    def choose(implementation: str) -> None:
        monkeypatch.setenv("DMS_KERNELS", implementation)
        dms_kernels.reset_calls()

    return choose


def train_step(model) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gates = gate_parameters(model)
    for parameter in gates.values():
        parameter.requires_grad_(True)
    ids = make_prompt()
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(LENGTH)[None],
        "segment_ids": torch.ones_like(ids, dtype=torch.int32),
        "loss_mask": torch.ones_like(ids, dtype=torch.bool),
        "number": torch.tensor([5]),
    }
    output = distill_step(
        model,
        None,
        batch,
        head_loss=HeadLoss(model, None, beta=0.0, chunk=50),
        target=0.9,
        normalizer=Normalizer(LENGTH, 1),
        seed=3,
        compression_weight=1.0,
    )
    output.loss.backward()
    figures = {"loss": output.loss.item(), "kl": output.kl.item(), "least_layer": output.head_rate_LH.mean(1).min().item()}
    return figures, {name: parameter.grad.clone() for name, parameter in gates.items()}


@pytest.mark.slow
def test_a_training_step(evicts_much, on):
    model = dms.load(evicts_much, device="cpu", dtype="float32")
    on("reference")
    figures, gradients = train_step(model)
    calls = dms_kernels.calls()
    on("triton")
    found, found_gradients = train_step(model)
    layers = len(state_of(model).layers)
    assert {name: set(by) for name, by in calls.items()} == {"gated_attention": {"reference"}, "distill_loss": {"reference"}}
    on_kernels = {"gated_attention": layers, "gated_attention_backward": layers, "distill_loss": 1}
    assert dms_kernels.calls() == {name: {"triton": number} for name, number in on_kernels.items()}
    assert calls["gated_attention"]["reference"] == layers
    assert figures["least_layer"] > 0.25 and figures["kl"] > 0.1
    assert found == pytest.approx(figures, rel=1e-5)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (found_gradients[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


@torch.no_grad()
def generate(model, ids: torch.Tensor, **options) -> tuple[torch.Tensor, object]:
    out = model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, pad_token_id=0, **options
    )
    return out.sequences[:, ids.shape[1] :], out.past_key_values


@pytest.mark.slow
def test_generation(evicts_much, on):
    model = dms.load(evicts_much, device="cpu", dtype="float32")
    on("reference")
    tokens, cache = generate(model, make_prompt())
    layers = len(state_of(model).layers)
    assert dms_kernels.calls() == {"cached_attention": {"reference": layers * NEW}}
    on("triton")
    found, fused = generate(model, make_prompt())
    calls = dms_kernels.calls()
    assert torch.equal(found, tokens)
    assert all(isinstance(layer.store, FusedStore) for layer in fused.compacted_layers().values())
    # The last token is not read, the first comes of the prompt.
    assert calls == {
        "append": {"triton": layers * (NEW - 1)},
        "paged_decode": {"triton": layers * (NEW - 1)},
        "sparse_prefill": {"triton": layers},
        "store_survivors": {"triton": layers},
    }
    report, fused_report = cache.report(), fused.report()
    assert (fused_report.alive, fused_report.seen, fused_report.cr_decided) == (report.alive, report.seen, report.cr_decided)
    assert fused_report.cr_LH == report.cr_LH and fused_report.pages_used == report.pages_used
    assert min(min(heads) for heads in report.cr_LH) > 1.0
    for layer in fused.compacted_layers().values():
        assert layer.store.evicted.sum() >= 0.25 * layer.store.decided.sum() * layer.store.evicted.shape[1]
        layer.store.check()


_CODE = """
import json, os, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
ids = torch.randint(2, 2000, (1, length), generator=torch.Generator().manual_seed(0))
dispatch = next(module for name, module in sys.modules.items() if name.endswith("dms_kernels_dispatch"))
found, tokens = {}, {}
for implementation in ("reference", "triton"):
    os.environ["DMS_KERNELS"] = implementation
    dispatch.reset_calls()
    tokens[implementation] = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)[0, length:].contiguous()
    found[implementation] = dispatch.calls()
save_file(tokens, out)
print(json.dumps({"calls": found, "ours": [name for name in sys.modules if name.split(".")[0] in ("dms", "dms_kernels")], "from": dispatch.__name__}))
"""


@pytest.mark.slow
def test_an_exported_folder_has_its_own_copy(evicts_much, on, tmp_path, run_without_us):
    model = dms.load(evicts_much, device="cpu", dtype="float32")
    on("reference")
    tokens, _ = generate(model, make_prompt())
    export(evicts_much, tmp_path / "out")
    printed = run_without_us(
        _CODE, tmp_path / "hub", keep=["triton"], folder=str(tmp_path / "out"), length=LENGTH, new=NEW, out=str(tmp_path / "tokens")
    )
    facts, found = json.loads(printed.splitlines()[-1]), load_file(tmp_path / "tokens")
    layers = len(state_of(model).layers)
    assert facts["ours"] == [] and facts["from"].startswith("transformers_modules.")
    assert torch.equal(found["reference"], tokens[0]) and torch.equal(found["triton"], tokens[0])
    assert set(facts["calls"]["reference"]) == {"cached_attention"}
    assert facts["calls"]["triton"]["paged_decode"] == {"triton": layers * (NEW - 1)}
    assert facts["calls"]["triton"]["sparse_prefill"] == {"triton": layers}
