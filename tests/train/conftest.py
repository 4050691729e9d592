"""A tiny random model folder with a real tokenizer, a recipe for it, and ways to run it here or in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    from dms.train.tokenizer import train_tokenizer

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


def read_metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be in the writing.
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Job:
    """`dms retrofit` of a recipe in processes of its own: alone, or several through the launcher."""

    def __init__(self, values: dict, processes: int = 1, *arguments: str):
        self.folder = Path(values["output_dir"])
        recipe = self.folder.with_name(f"{self.folder.name}.yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(values))
        alone = ["dms.train.cli", "retrofit", str(recipe)]
        command = [sys.executable, "-m", *(alone if processes == 1 else ["dms.train.launch", str(recipe), "--gpus", str(processes)])]
        # The same number of threads everywhere, or sums come out in another order.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
        self.log = recipe.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_for_step(self, step: int, timeout: float = 180.0) -> None:
        deadline = time.monotonic() + timeout
        while len(read_metrics(self.folder)) < step:
            assert self.process.poll() is None, f"ended before step {step}: {self.output}"
            assert time.monotonic() < deadline, f"no step {step} in time: {self.output}"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> "Job":
        self.process.send_signal(number)
        return self

    def wait(self, timeout: float = 300.0) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()

    @property
    def output(self) -> str:
        return self.log.read_text()
