"""A retrofitted folder of the embedded model whose gates decide at random, and small settings to evaluate it with."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch

import dms
from dms.io import base_models, checkpoint
from dms.retrofitting import gate_parameters


@pytest.fixture(scope="session")
def save_gated(tmp_path_factory):
    """`save_gated(std=0.3, offset=0.0)`: a folder; the gates' weights are drawn with that deviation, and the logit is `x w - offset`."""

    def save(std: float = 0.3, offset: float = 0.0, trained_length: int | None = None):
        model = base_models.load_base("builtin:tiny", "float32", "cpu")
        dms.retrofit(model, dms.DMSConfig(window=8, scale=1.0, offset=offset))
        model.dms.trained_length = trained_length
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in gate_parameters(model).values():
                parameter.normal_(0, std, generator=generator)
        out = tmp_path_factory.mktemp("gated") / "model"
        return checkpoint.save(model, out, tokenizer=base_models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=2.0)

    return save


@pytest.fixture(scope="session")
def gated_folder(save_gated):
    return save_gated(trained_length=256)
