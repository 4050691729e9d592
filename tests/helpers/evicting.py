"""The embedded model with random gates that evict about half of what leaves their window."""

from pathlib import Path

import torch

import dms
from dms.io import base_models, checkpoint
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


def save_gated_tiny(folder: Path, window: int = 8) -> str:
    """A folder of the embedded model with gates that nobody has trained."""
    model = dms.retrofit(base_models.load_base("builtin:tiny", "float32", "cpu"), dms.DMSConfig(window=window))
    tokenizer = base_models.load_tokenizer("builtin:tiny")
    return str(checkpoint.save(model, folder / "model", tokenizer=tokenizer, base_name="builtin:tiny", target_cr=2.0))
