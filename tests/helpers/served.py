"""What the tests of serving share: folders with random gates, prompts, the engine in a process of its own, and what `generate` says."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_models import small_model

import dms
from dms.io import base_models, checkpoint
from dms.retrofitting import gate_parameters

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "tests" / "serving" / "engine.py"
# Importing vLLM is most of it.
SECONDS = 600
# Folders with trained gates, for those who have some.
GIVEN = [name for name in os.environ.get("DMS_SERVE_FOLDERS", "").split(os.pathsep) if name]


def make_folder(folder: Path, window: int | tuple[int, ...], *, kept: float = 1 / 3.5, **options) -> Path:
    """The embedded model with random gates that keep this share of a text's decisions for good, unequal among heads."""
    model, tokenizer = base_models.load_base("builtin:tiny", "float32", "cpu"), base_models.load_tokenizer("builtin:tiny")
    dms.retrofit(model, dms.DMSConfig(window=window, scale=1.0, offset=0.0, **options))
    open_gates(model, torch.tensor([text(tokenizer, 600, seed=7)]), 0.3, kept)
    return checkpoint.save(model, folder / "model", tokenizer=tokenizer, base_name="builtin:tiny", target_cr=None)


def with_other_weights(folder: Path, to: Path) -> Path:
    """A copy of a folder, of whose weights the gates know nothing."""
    to = shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def make_sliding_folder(folder: Path) -> Path:
    """A random model, without a tokenizer, of which every other layer slides and has no gate."""
    torch.manual_seed(0)
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "query_pre_attn_scalar": 16}
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    model = small_model("gemma3_text", num_key_value_heads=2, head_dim=16, **layers, **ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    dms.retrofit(model, dms.DMSConfig(window=(6, 20), scale=1.0, offset=0.0))
    open_gates(model, torch.tensor([random_ids(400, seed=7)]), 0.5, 1 / 3)
    return checkpoint.save(model, folder / "model", base_name="acme/random-1b", target_cr=None)


def make_borrowed_folder(folder: Path, gate: str, family: str) -> Path:
    """A random model, without a tokenizer, whose gates borrow channels of the queries and keep about two fifths of all decisions."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    base = small_model(family, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **ids)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    text = torch.tensor([random_ids(400, seed=7)])
    found = logits_of(dms.retrofit(copy.deepcopy(base), borrowing(gate, 0.0)), text).flatten().sort().values
    near = found[int(0.38 * len(found)) : int(0.42 * len(found))]
    widest = near.diff().argmax()
    model = dms.retrofit(base, borrowing(gate, ((near[widest] + near[widest + 1]) / 2).item()))
    return checkpoint.save(model, folder / "model", base_name="acme/random-1b", target_cr=None)


def borrowing(gate: str, offset: float) -> dms.DMSConfig:
    return dms.DMSConfig(window=8, gate=gate, scale=1.0, offset=offset)


def open_gates(model, ids: torch.Tensor, std: float, kept: float) -> None:
    """Random gates that keep about this share of all decisions on these tokens, of which none is so close that rounding takes it."""
    generator, gates = torch.Generator().manual_seed(1), gate_parameters(model)
    with torch.no_grad():
        for name, parameter in gates.items():
            parameter.normal_(0, std if name.endswith("weight") else 0.1, generator=generator)
        logits = logits_of(model, ids).flatten().sort().values
        near = logits[int((kept - 0.02) * len(logits)) : int((kept + 0.02) * len(logits))]
        widest = near.diff().argmax()
        shift = -(near[widest] + near[widest + 1]) / 2
        for name, parameter in gates.items():
            if name.endswith("bias"):
                parameter.add_(shift)


def random_ids(num_tokens: int, seed: int) -> list[int]:
    """For `make_sliding_folder`."""
    rng = random.Random(seed)
    return [rng.randrange(2, 97) for _ in range(num_tokens)]


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Of each token, layer and head the logit by which it is evicted at all (the largest of several windows'), [B, T, L, H]."""
    found = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: found.append(out))
        for module in model.modules()
        if isinstance(module, dms.gates.AnyGate)
    ]
    dms.set_mode(model, "evict")
    model(ids)
    for hook in hooks:
        hook.remove()
    logits = torch.stack(found, 2)
    return logits.amax(-1) if logits.dim() == 5 else logits


def text(tokenizer, num_tokens: int, seed: int) -> list[int]:
    """Tokens of something like Python, which the embedded model has learned on."""
    rng = random.Random(seed)
    words = ["value", "index", "name", "result", "items", "key", "count", "left", "right", "node", "path", "line"]
    written = ""
    while len(ids := tokenizer(written)["input_ids"]) < num_tokens:
        a, b, c = rng.sample(words, 3)
        written += f"def {a}_{b}({b}, {c}={rng.randrange(100)}):\n    if {b} > {c}:\n        return {c} + {rng.randrange(10)}\n"
        written += f"    for {a} in {b}.{c}():\n        {c} = {a}_{c}({a}, {b}[{rng.randrange(10)}])\n    return {c}\n\n\n"
    return ids[:num_tokens]


@cache
def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    tokenizer = base_models.load_tokenizer("builtin:tiny")
    return [text(tokenizer, length, seed=100 * seed + number) for number, length in enumerate(lengths)]


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs vLLM: this checkout's code, offline, one thread, and nothing sent to anybody."""
    places = [str(ROOT / name) for name in ("serve", "", "train", "kernels")]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {
        "PYTHONPATH": os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return kept | own | more


def run_engine(folder: Path, given: dict, *, script: Path = ENGINE, **env: str) -> dict:
    """What tests/serving/engine.py, or another script, answers in a process of its own: engines do not share one well. folder: for its files."""
    code, said = _run(folder, given, script, env)
    assert code == 0, said[-6000:]
    return json.loads((folder / "answers.json").read_text())


def fail_to_start(folder: Path, given: dict) -> str:
    """What an engine says that must not start."""
    code, said = _run(folder, given, ENGINE, {})
    assert code != 0 and not (folder / "answers.json").exists(), "it started"
    return said


def _run(folder: Path, given: dict, script: Path, env: dict[str, str]) -> tuple[int, str]:
    asks, answers, said = (folder / name for name in ("asks.json", "answers.json", "said.txt"))
    asks.write_text(json.dumps(given))
    with said.open("w") as out:
        done = subprocess.run(
            [sys.executable, str(script), str(asks), str(answers)],
            env=environment(**{"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
    return done.returncode, said.read_text()


class Reference:
    """What `dms.load(folder).generate` adds to prompts, greedily and each by itself; remembers it."""

    def __init__(self, folder: Path, *, evict_bias: float = 0.0, kv_dtype: str | None = None, prefill_chunk: int | None = None):
        self.model = dms.load(folder, dtype="float32", device="cpu", evict_bias=evict_bias)
        self.model.dms.kv_dtype, self.model.dms.prefill_chunk = kv_dtype, prefill_chunk
        # It goes on, whatever it says.
        self.model.generation_config.eos_token_id = None
        self.known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def __call__(self, prompt: list[int], num_tokens: int) -> list[int]:
        key = (tuple(prompt), num_tokens)
        if key not in self.known:
            ids = self.model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
            self.known[key] = ids[0, len(prompt) :].tolist()
        return self.known[key]


@cache
def reference(folder: Path, evict_bias: float = 0.0, kv_dtype: str | None = None, prefill_chunk: int | None = None) -> Reference:
    return Reference(folder, evict_bias=evict_bias, kv_dtype=kv_dtype, prefill_chunk=prefill_chunk)


def dense_bytes(folder: Path, num_tokens: int) -> int:
    """Of keys and values in float32 of so many tokens, where nothing is evicted."""
    config = json.loads((folder / "config.json").read_text())
    return config["num_hidden_layers"] * config["num_key_value_heads"] * num_tokens * 2 * config["head_dim"] * 4
