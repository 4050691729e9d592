"""Where documents begin and end is found once for a batch: not by each layer, nor again by a recomputation or the backward."""

import pytest
import torch

from dms.masks import Tokens
from dms.modes import Noise, set_mode
from dms.training.packed_attention import PackedAttention
from dms_kernels import dispatch, gated_attention
from dms_kernels.gated_attention import Documents, documents, fused

pytestmark = [
    pytest.mark.skipif(not dispatch.is_interpreted(), reason="only the kernels ask for bounds; they run in Triton's interpreter"),
    # The older name works in every version supported.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]


@pytest.fixture
def calls(monkeypatch):
    """Fills with the ids whose documents were looked for, on the kernels."""
    pytest.importorskip("triton")
    found, search = [], documents.document_bounds

    def counted(segment_ids):
        found.append(segment_ids)
        return search(segment_ids)

    monkeypatch.setenv("DMS_KERNELS", "triton")
    for module in (documents, fused):
        monkeypatch.setattr(module, "document_bounds", counted)
    return found


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_once_for_all_layers_forward_and_backward(is_checkpointed, calls, build_gated, make_batch):
    model = build_gated("llama", tau=1.0)
    model.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(model.dms.layers) > 1
    dispatch.reset_calls()
    for number in (1, 2):
        batch = make_batch(1, 10, left=[2], seed=number)
        set_mode(model, "train", Noise(7, torch.tensor([number])))
        model(**batch, use_cache=False).logits.log_softmax(-1)[..., 0].mean().backward()
        assert len(calls) == number
    assert dispatch.calls()["gated_attention_backward"] == {"triton": 2 * len(model.dms.layers)}


def test_once_for_a_teacher_and_its_student(calls):
    """What is found in inference mode, the student's backward can keep."""
    tokens = Tokens(torch.tensor([[1] * 4 + [2] * 3 + [0]], dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32))
    q, k, v = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (2, 1, 1))
    rows = PackedAttention()
    options = {"tokens": tokens, "window": 2, "sinks": 0, "alignment": "own", "scaling": 0.5}
    with torch.inference_mode():
        rows.train_attention(q, k, v, log_keep_BSH=torch.zeros(1, 8, 1), **options)
    out = rows.train_attention(q, k, v, log_keep_BSH=torch.zeros(1, 8, 1), **options)
    out.sum().backward()
    assert len(calls) == 1 and q.grad.any()


def test_documents_are_as_their_ids():
    q, k, v = (torch.randn(1, 8, heads, 16) for heads in (2, 1, 1))
    ids = torch.tensor([[1] * 4 + [2] * 3 + [0]], dtype=torch.int32)
    options = {"log_keep": None, "window": 2, "scale": 0.5}
    # In plain PyTorch too.
    assert torch.equal(
        gated_attention(q, k, v, segment_ids=Documents(ids), **options), gated_attention(q, k, v, segment_ids=ids, **options)
    )
    with pytest.raises(ValueError, match=r"segment_ids must be \[B=1, T=8\]"):
        gated_attention(q, k, v, segment_ids=Documents(ids[:, 1:]), **options)
