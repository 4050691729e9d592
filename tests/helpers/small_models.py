"""Small models of families that tests name, made from their configurations."""

import pytest
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def small_model(family: str, **options):
    """In eval mode; skips the test where this transformers has no such family."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | options))).eval()
