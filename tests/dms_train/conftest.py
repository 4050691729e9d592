"""A tiny random model folder with a real tokenizer, and a recipe for it."""

import signal
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """Tests that a shell runs in the background inherit that SIGINT is ignored, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    from dms_train.pretrain import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    tokenizer = train_tokenizer(1024, 512)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_values(tiny_folder):
    """make_values(output_dir, **changes) -> the smallest complete recipe, as a dictionary."""

    def make(output_dir, **changes):
        return {
            "model": str(tiny_folder),
            "output_dir": str(output_dir),
            "target_cr": 4,
            "dms": {"window": 8},
            "data": {"source": "builtin", "length": 192, "items": [2, 4]},
            "optimizer": {"lr": 2e-3, "warmup_steps": 1},
            "steps": 8,
            "batch_size": 4,
            "micro_batch_size": 2,
            "evaluation": {"num_documents": 8, "num_items": 3},
            "tracking": {"wandb": "off"},
            **changes,
        }

    return make


@pytest.fixture
def recipe_values(make_values, tmp_path):
    return make_values(tmp_path / "run")


@pytest.fixture
def run_dms(monkeypatch, capsys):
    """run_dms(*arguments): `dms ARGUMENTS` in this process -> (exit code, stdout, stderr)."""
    from dms_train import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dms", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
