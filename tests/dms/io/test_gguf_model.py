"""GGUF files as bases: the model that the file holds and no other, by the names that commands take."""

import hashlib
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import dms
from dms import hf_compat
from dms.io import base_models, checkpoint, gguf_file
from dms.io.quantization import quant_method
from dms.io.weights import base_hash

gguf = pytest.importorskip("gguf")

import gguf_writing  # noqa: E402 - needs gguf


@pytest.fixture(scope="module")
def embedded():
    return base_models.load_base("builtin:tiny", "float32", "cpu"), base_models.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def file(embedded, tmp_path_factory):
    """The embedded model in a mixture of types."""
    return gguf_writing.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *embedded)


@pytest.fixture
def write(embedded, tmp_path):
    """`write(values=..., tensors=..., ...)`: such a file of the embedded model in float32, and its name."""

    def write(**options):
        kinds = options.pop("kinds", lambda _: gguf.GGMLQuantizationType.F32)
        return str(gguf_writing.write(tmp_path / "one.gguf", *embedded, kinds=kinds, **options))

    return write


def test_a_file_has_no_device_map(file):
    with pytest.raises(ValueError, match=r"device_map was given and .* is a GGUF file.*write it as a folder first"):
        base_models.load_base(str(file), device_map="auto")


def test_every_weight_is_what_gguf_dequantises(file, embedded):
    model = base_models.load_base(str(file), device="cpu")
    assert model.dtype == torch.float32 and not any(p.requires_grad is False for p in model.parameters())
    config = model.config
    by_name = dict(model.named_parameters())
    theirs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    for name, ours in gguf_writing.weights_of(model).items():
        assert torch.equal(torch.from_numpy(ours), torch.from_numpy(theirs.pop(name).copy())), name
    assert not theirs and len(by_name) == len(list(embedded[0].parameters()))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size) == (4, 2, 32, 2048)


def test_weights_in_float32_are_the_original(write, embedded):
    model = base_models.load_base(write(), device="cpu")
    for (name, ours), theirs in zip(model.named_parameters(), embedded[0].parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, embedded[0](ids).logits)


def test_it_is_an_ordinary_model_with_or_without_gates(file, tmp_path):
    """Holds gguf_model.load: told to dequantise, transformers leaves a model that is saved as any other, in every supported release."""
    model = base_models.load_base(str(file), device="cpu")
    assert hf_compat.loaded_from(model.config) == str(file)
    assert quant_method(model.config) is None and not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer") and {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {torch.nn.Linear}
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    dms.retrofit(model, dms.DMSConfig(window=4))
    tokenizer = base_models.load_tokenizer(str(file))
    checkpoint.save(model, tmp_path / "gated", tokenizer=tokenizer, base_name=str(file), target_cr=2.0)
    gated = dms.load(tmp_path / "gated", device="cpu", mode="dense")
    ids = tokenizer("def read(path):\n    return 42", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected) and torch.equal(gated(ids).logits, expected)
    assert again.dtype == gated.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "gated").chat_template == gguf_writing.CHAT


def test_gates_belong_to_the_file(file, tmp_path, write):
    model = base_models.load_base(str(file), device="cpu")
    dms.retrofit(model, dms.DMSConfig(window=4))
    digest = base_hash(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()[:32]
    checkpoint.save_gates(model, tmp_path / "gates", base_name=str(file), base_digest=digest, target_cr=2.0)
    with safe_open(tmp_path / "gates" / "gates.safetensors", framework="pt") as f:
        assert f.metadata()["base_hash"] == digest and f.metadata()["base_name"] == str(file)
    loaded = dms.load(tmp_path / "gates", base=str(file), device="cpu")
    assert loaded.dms.mode == "evict"
    with pytest.raises(ValueError, match="these gates belong to another base"):
        dms.load(tmp_path / "gates", base=write(), device="cpu")
    with pytest.raises(ValueError, match=r"tiny.gguf is a model without gates; retrofit it \(`dms retrofit RECIPE model=\S+tiny.gguf`\)"):
        dms.load(file)


def test_bfloat16_stays_and_float16_widens(write):
    kinds = gguf.GGMLQuantizationType
    for kind, dtype in ((kinds.BF16, torch.bfloat16), (kinds.F16, torch.float32)):
        name = write(kinds=lambda name, kind=kind: kinds.F32 if "norm" in name else kind)
        assert base_models.load_config(name).dtype == dtype
        assert base_models.is_saved_bfloat16(base_models.load_config(name)) == (dtype == torch.bfloat16)
        assert {p.dtype for p in base_models.load_base(name, device="cpu").parameters()} == {dtype}


def test_a_configuration_is_read_from_the_header_alone(file, monkeypatch):
    def forbidden(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr(gguf, "dequantize", forbidden)
    config = base_models.load_config(str(file))
    assert config.dtype == torch.float32 and config.vocab_size == 2048 and config.tie_word_embeddings
    assert "a test" not in str(config.to_dict()) and config.name_or_path == str(file)


def test_names(file, tmp_path):
    assert base_models.resolve_model(str(file)) == base_models.ModelSource(str(file.parent), "tiny.gguf")
    hub = base_models.resolve_model("acme/small-GGUF:sub/small.Q4_K_M.gguf")
    assert hub == base_models.ModelSource("acme/small-GGUF", "sub/small.Q4_K_M.gguf")
    assert base_models.local_weights("acme/small-GGUF:small.gguf") is None
    assert base_models.local_weights(str(file)) == file
    with pytest.raises(ValueError, match=r"tinny.gguf does not exist; there is tiny.gguf; name FOLDER/FILE.gguf, or HUB-ID:FILE.gguf"):
        base_models.resolve_model(str(file.with_name("tinny.gguf")))
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"folder without config.json; name one of its GGUF files, such as .*a.gguf"):
        base_models.resolve_model(str(tmp_path))


def test_a_file_of_the_hub(file, monkeypatch):
    import transformers.utils

    asked = []
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *names, **options: asked.append((*names, options)) or str(file))
    assert base_models.load_config("acme/small:sub/tiny.gguf").vocab_size == 2048
    assert base_models.local_weights("acme/small:sub/tiny.gguf") == file
    assert {names[:2] for names in asked} == {("acme/small", "sub/tiny.gguf")}
    assert asked[-1][2] == {"local_files_only": True} and asked[0][2] == {"local_files_only": False}
    assert base_models.load_tokenizer("acme/small:sub/tiny.gguf").name_or_path == "acme/small:sub/tiny.gguf"


def test_a_file_that_the_hub_does_not_have(monkeypatch):
    import transformers.utils

    def missing(*_, **__):
        raise OSError("acme/small does not appear to have a file named small.gguf.\nmore")

    monkeypatch.setattr(transformers.utils, "cached_file", missing)
    with pytest.raises(ValueError, match=r"model 'acme/small:small.gguf' cannot be loaded: OSError: acme/small does not appear") as caught:
        base_models.load_config("acme/small:small.gguf")
    assert "\n" not in str(caught.value)


def test_without_the_package(file, monkeypatch):
    monkeypatch.setattr("dms.requirements.find_spec", lambda name: None if name == "gguf" else object())
    for load in (base_models.load_config, base_models.load_tokenizer, base_models.load_base):
        with pytest.raises(RuntimeError, match=r"a GGUF file needs gguf, which is not installed; pip install 'dms-retrofit\[gguf\]'"):
            load(str(file))


def refusal(name):
    with pytest.raises(ValueError) as caught:
        base_models.load_base(name, device="cpu")
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_other_architectures_are_named(write, tmp_path):
    data = bytearray(Path(write()).read_bytes())
    at = data.index(b"llama")
    data[at : at + 5] = b"lamma"
    (tmp_path / "other.gguf").write_bytes(data)
    assert "architecture lamma is not supported yet" in refusal(str(tmp_path / "other.gguf"))


def test_what_transformers_would_leave_out_is_refused(write, embedded):
    experts = torch.zeros(4, 8, 128).numpy()
    assert "LlamaForCausalLM has a place for" in refusal(write(tensors={"blk.0.ffn_gate_exps.weight": experts}))
    assert "llama.attention.sliding_window 512, for which it has None" in refusal(write(values={"llama.attention.sliding_window": 512}))
    assert "its rotary scaling 'longrope'" in refusal(write(values={"llama.rope.scaling.type": "longrope"}))
    factors = torch.linspace(1, 3, 16).numpy()
    assert "its rotary factors 'rope_freqs.weight'" in refusal(write(tensors={"rope_freqs.weight": factors}))
    assert "its rotary factors 'rope_factors_long.weight'" in refusal(write(tensors={"rope_factors_long.weight": factors}))


def test_missing_weights_are_refused(embedded, tmp_path, monkeypatch):
    whole = gguf_writing.weights_of
    monkeypatch.setattr(gguf_writing, "weights_of", lambda model: {n: w for n, w in whole(model).items() if n != "blk.1.ffn_up.weight"})
    name = str(gguf_writing.write(tmp_path / "part.gguf", *embedded))
    assert "1 of the model's are not found in it, such as model.layers.1.mlp.up_proj.weight" in refusal(name)


def llama3_factors(theta, dim, factor):
    """By the formula of Llama 3.1, one frequency at a time."""
    found = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (index / dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


def test_rotary_scaling_is_carried_over(write):
    assert base_models.load_config(write()).rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert base_models.load_config(write(values=scaling)).rope_parameters == {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 1024}
    rope = base_models.load_config(write(values=scaling)).rope_parameters
    assert rope["rope_type"] == "yarn" and rope["original_max_position_embeddings"] == 1024
    factors = llama3_factors(100000.0, 32, 8.0)
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any()
    model = base_models.load_base(write(tensors={"rope_freqs.weight": factors.numpy()}), device="cpu")
    assert model.config.rope_parameters["rope_type"] == "llama3" and model.config.rope_parameters["factor"] == 8.0
    plain = 1 / 100000.0 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / factors)
    ones = torch.ones(16).numpy()
    assert base_models.load_config(write(tensors={"rope_freqs.weight": ones})).rope_parameters["rope_type"] == "default"


def test_gemma_is_completed(tmp_path):
    def config(**changes):
        writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
        said = {"context_length": 256, "block_count": 62, "embedding_length": 96, "feed_forward_length": 64, "attention.head_count": 4}
        said |= {"attention.head_count_kv": 2, "attention.key_length": 32, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6}
        for key, value in (said | changes).items():
            gguf_writing.add(writer, f"gemma3.{key}", value)
        writer.add_tensor("token_embd.weight", torch.zeros(50, 96).numpy())
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            step()
        return base_models.load_config(str(tmp_path / "gemma.gguf"))

    scaled = config(**{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 64})
    assert scaled.model_type == "gemma3_text" and scaled.vocab_size == 50 and scaled.sliding_window == 64
    assert scaled.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert scaled.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    # The model of 27 B scales queries by its width.
    assert scaled.query_pre_attn_scalar == 24 and config(block_count=12).query_pre_attn_scalar == 256
    with pytest.raises(gguf_file.GGUFError, match=r"gemma3.final_logit_softcapping 30.0, for which it has None"):
        config(final_logit_softcapping=30.0)


def damaged(data, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(gguf_file.GGUFError, match=r"damaged\.gguf") as caught:
        gguf_file.read_header(path)
    said = str(caught.value)
    assert "\n" not in said
    for load in (base_models.load_config, base_models.load_tokenizer, base_models.load_base):
        with pytest.raises(ValueError) as caught:
            load(str(path))
        assert str(caught.value) == said
    return said


def test_damaged_files(file, tmp_path):
    data = file.read_bytes()
    assert "is no GGUF file: it begins with b'version '" in damaged(b"version https://git-lfs.github.com/spec/v1", tmp_path)
    assert "is no GGUF file: it begins with b''" in damaged(b"", tmp_path)
    assert f"is truncated: it ends after {len(data) - 1000:,} bytes, and its weights need {len(data):,}" in damaged(data[:-1000], tmp_path)
    for length in (4, 20, 24, 100, 20000):
        assert f"it ends after {length:,} bytes, and that is within its header; fetch it again" in damaged(data[:length], tmp_path)
    assert "of version 50331648, and versions 2 and 3 are read" in damaged(data[:4] + struct.pack(">I", 3) + data[8:], tmp_path)
    at = data.index(b"llama.block_count") + len("llama.block_count")
    assert "a value of the unknown type 77" in damaged(data[:at] + struct.pack("<I", 77) + data[at + 4 :], tmp_path)
    at = data.index(b"general.name") + len("general.name")
    assert "within its header" in damaged(data[:at] + struct.pack("<IQ", 8, 2**60) + data[at + 12 :], tmp_path)
    assert "within its header" in damaged(data[:at] + struct.pack("<IIQ", 9, 8, 2**60) + data[at + 16 :], tmp_path)
    assert "is no UTF-8" in damaged(data.replace(b"a test", b"\xff test"), tmp_path)
    at = data.index(b"token_embd.weight") + len("token_embd.weight")
    assert "has 90 dimensions" in damaged(data[:at] + struct.pack("<I", 90) + data[at + 4 :], tmp_path)
    assert "of type 99, which the installed gguf does not know" in damaged(
        data[: at + 20] + struct.pack("<I", 99) + data[at + 24 :], tmp_path
    )


def test_parts_and_files_without_weights(write, tmp_path):
    with pytest.raises(ValueError, match=r"is one of 3 parts; join them into one file"):
        base_models.load_config(write(values={"split.count": 3}))
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ValueError, match=r"holds no tensors, such as a vocabulary alone"):
        base_models.load_config(str(tmp_path / "vocabulary.gguf"))


def test_licences(write):
    assert gguf_file.read_header(write()).license == "apache-2.0"
    assert gguf_file.read_header(write(values={"general.license": "See the file LICENSE"})).license is None
    assert gguf_file.read_header(write(values={"general.license": None})).license is None
