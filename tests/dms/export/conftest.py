"""Retrofitted folders with gates that evict, and a Python that has transformers and none of ours."""

import os
import subprocess
import sys
from pathlib import Path

# Where AMX is advertised but unusable, a bfloat16 matmul dies with SIGILL; read by oneDNN at its first use.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch

import dms
from dms.io import base_models, checkpoint
from dms.retrofitting import gate_parameters

HELPERS = Path(__file__).resolve().parents[2] / "helpers"
METHOD = {"window": 8, "scale": 1.0, "offset": 0.0}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache_of_code(tmp_path_factory):
    """Code that tests load stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def open_gates(model, std: float):
    """Random gates, so that about half of the tokens are evicted and heads differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gate_parameters(model).items():
            parameter.normal_(0, std if name.endswith("weight") else 0.1, generator=generator)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`tiny_folder(**config)`: a folder of the embedded model with random gates."""

    def make(**config) -> Path:
        model = base_models.load_base("builtin:tiny", "float32", "cpu")
        open_gates(dms.retrofit(model, dms.DMSConfig(**METHOD | config)), 0.3)
        folder = tmp_path_factory.mktemp("tiny") / "model"
        return checkpoint.save(model, folder, tokenizer=base_models.load_tokenizer("builtin:tiny"), base_name="builtin:tiny", target_cr=2.0)

    return make


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The embedded model with random gates."""
    return tiny_folder()


@pytest.fixture(scope="session")
def lifetimes(tiny_folder):
    """The embedded model with random gates of several windows."""
    return tiny_folder(window=(4, 12, 40))


_SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """`random_folder(family, method, **config)`: a folder of a small random model with random gates. method: settings beside METHOD."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str, method: dict | None = None, **config) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_SMALL | config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.12)
        open_gates(dms.retrofit(model, dms.DMSConfig(**METHOD | (method or {}))), 1.0)
        return checkpoint.save(model, tmp_path_factory.mktemp(family) / "model", base_name="acme/random-1b", target_cr=None)

    return make


@pytest.fixture(scope="session")
def mixed(random_folder):
    """A model with a layer that slides and one that is gated."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return random_folder("gemma3_text", num_key_value_heads=2, head_dim=16, **layers)


@pytest.fixture(scope="session")
def following(random_folder):
    """A model whose last layer attends to the keys and values of the second."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "num_kv_shared_layers": 2}
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    return random_folder("gemma4_text", vocab_size_per_layer_input=97, **layers, **sizes)


@pytest.fixture(scope="session")
def borrowed(random_folder):
    """A model whose gates are query channels, after a query norm."""
    return random_folder("qwen3", {"gate": "borrowed", "alignment": "next"}, num_key_value_heads=2, head_dim=16)


@pytest.fixture(scope="session")
def renamed(random_folder):
    """A model whose weights have other names on disk than in transformers."""
    return random_folder("gpt_neox")


@pytest.fixture(scope="session")
def run_without_us(tmp_path_factory):
    """`run_without_us(code, hub, **variables)`: what a fresh Python prints that lacks dms and more, and whose cache of code is
    empty. hub: the hub's cache, which is all that it has of it; keep: packages that it may have all the same."""

    def run(code: str, hub: Path, keep: tuple | list = (), **variables) -> str:
        given = "".join(f"{name} = {value!r}\n" for name, value in variables.items())
        folder = tmp_path_factory.mktemp("elsewhere")
        env = os.environ | {
            "PYTHONPATH": str(HELPERS),
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "KEEP_PACKAGES": ",".join(keep),
        }
        command = [sys.executable, "-c", f"import without_us\nimport torch\n\ntorch.set_num_threads(1)\n{given}{code}"]
        done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
