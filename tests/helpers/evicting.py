"""The embedded model with random gates that evict about half of what leaves their window."""

import torch

import dms
from dms.io import base_models
from dms.retrofitting import gate_parameters


def embedded(window: int | tuple[int, ...] = 8, std: float = 0.3, **options):
    """(model, tokenizer)."""
    model = base_models.load_base("builtin:tiny", "float32", "cpu")
    dms.retrofit(model, dms.DMSConfig(window=window, scale=1.0, offset=0.0, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            parameter.normal_(0, std if name.endswith("weight") else 0.1, generator=generator)
    return model, base_models.load_tokenizer("builtin:tiny")
