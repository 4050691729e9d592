"""What gates do by position, within a document and alone."""

import pytest
import torch
from dms_train.trial_drift import drift

import dms
from dms.io import base_models
from dms.retrofitting import gate_parameters


@pytest.mark.parametrize("windows", [{"window": 4}, {"window": [4, 12]}])
def test_shares_and_divergence_by_position(tiny_folder, windows):
    model = dms.retrofit(base_models.load_base(str(tiny_folder), "float32"), dms.DMSConfig(**windows)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in gate_parameters(model).items():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator) if name.endswith("weight") else 0.05)
    documents = torch.randint(2, 500, (2, 48), generator=generator).tolist()
    found = drift(model, documents, [0, 16, 32, 48])
    assert found.evicted_LHQ.shape == found.evicted_alone_LHQ.shape == (2, 2, 3)
    assert 0.05 < found.evicted_LHQ.mean() < 0.95
    # The first range has nothing before it; the first layer's gates read embeddings, which no position changes.
    assert torch.equal(found.evicted_LHQ[..., 0], found.evicted_alone_LHQ[..., 0])
    assert torch.equal(found.evicted_LHQ[0], found.evicted_alone_LHQ[0])
    assert float(found.kl_Q[0]) == pytest.approx(float(found.kl_alone_Q[0]), abs=1e-6) and (found.kl_Q > 0).all()
    model.dms.evict_bias = -1e9
    nothing = drift(model, documents, [0, 16, 32, 48])
    assert nothing.evicted_LHQ.sum() == 0 and torch.allclose(nothing.kl_Q, torch.zeros(3), atol=1e-6)
