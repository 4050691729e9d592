"""Small models of families that tests name, made from their configurations."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dms.io import base_models

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


def wider_model(folder: Path, base: Path, **changes) -> str:
    """A folder with a random model of another's tokenizer and half as wide again."""
    saved = json.loads((base / "config.json").read_text())
    torch.manual_seed(7)
    config = LlamaConfig(**{**saved, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "dtype": None, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    base_models.load_tokenizer(str(base)).save_pretrained(folder)
    return str(folder)
