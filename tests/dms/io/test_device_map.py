"""Weights that a device_map keeps in host memory or on disk: the model is the same in all it computes, and is saved a file at a time."""

import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file

import dms
from dms.evaluation.engine.resume import describe_model
from dms.io import base_models, checkpoint
from dms.io.device_map import completed
from dms.io.gates_file import read_gates
from dms.lm_head import make_logits
from dms.placement import compute_device, is_offloaded

accelerate = pytest.importorskip("accelerate")

# What is not named is in host memory, which on a machine without a GPU is where it computes.
SOME = {"": "cpu", "model.layers.1": "disk"}
ALL = {"": "disk"}


@pytest.fixture(scope="module")
def folders(build_model, open_gates, tmp_path_factory):
    """`folders(family, **config)` -> (a folder with weights and gates, its base, the gates alone)."""
    made = {}

    def of(family: str, gate: str = "linear", **config):
        key = (family, gate, *sorted(config.items()))
        if key not in made:
            where = tmp_path_factory.mktemp(family)
            build_model(family, **config).save_pretrained(where / "base")
            base = base_models.load_base(str(where / "base"), device="cpu")
            model = dms.retrofit(base, dms.DMSConfig(window=4, scale=1.0, offset=0.0, gate=gate))
            model = model if gate != "linear" else open_gates(model)
            dms.save(model, where / "model", base_name="acme/base", target_cr=2.0)
            digest = read_gates(where / "model")[1]["base_hash"]
            checkpoint.save_gates(model, where / "gates", base_name="acme/base", base_digest=digest, target_cr=2.0)
            made[key] = where / "model", where / "base", where / "gates"
        return made[key]

    return of


def weights_in(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def outputs(model, ids):
    """Logits with and without a cache, generated tokens, and what the cache then holds."""
    cache = dms.DMSCache(model)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    parts = model(ids[:, :17]), model(ids, use_cache=False)
    return [*(part.logits for part in parts), tokens, make_logits(model, parts[1].logits.new_ones(2, model.config.hidden_size))], cache


@pytest.mark.parametrize(
    ("family", "config", "places"),
    [
        ("llama", {}, SOME),
        ("llama", {"tie_word_embeddings": True}, ALL),
        ("llama", {"tie_word_embeddings": True}, {"": "cpu", "model.embed_tokens": "disk"}),
        # With layers that have no gates, and with weights that its files hold in another form.
        ("gemma2", {}, SOME),
        ("qwen3_moe", {}, ALL),
        ("llama", {"gate": "borrowed"}, ALL),
    ],
)
def test_a_model_in_parts_is_the_same_model(family, config, places, folders, tmp_path):
    folder, base, gates = folders(family, **config)
    plain = dms.load(folder, device="cpu")
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, cache = outputs(plain, ids)
    assert cache.report().alive < cache.report().seen
    for path, named in ((folder, None), (gates, str(base))):
        if named and config.get("gate"):
            continue
        model = dms.load(path, base=named, device_map=places, offload_folder=tmp_path / "aside")
        assert is_offloaded(model) and not is_offloaded(plain) and compute_device(model) == torch.device("cpu")
        assert all(not parameter.is_meta for layer in model.dms.layers for parameter in layer.gate.parameters())
        found, own = outputs(model, ids)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert own.report() == cache.report()
        # What is known by its weights is known as the same.
        assert describe_model(model) == describe_model(plain)
        own.save(tmp_path / "cache")
        read = [dms.DMSCache.load(tmp_path / "cache", one).report() for one in (model, plain)]
        assert read[0] == read[1] and read[0].alive == cache.report().alive
    dms.save(model, tmp_path / "again", base_name="acme/base", target_cr=2.0, max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert same(weights_in(tmp_path / "again"), weights_in(folder))
    assert read_gates(tmp_path / "again")[1] == read_gates(folder)[1]
    again = dms.load(tmp_path / "again", device="cpu")
    assert all(torch.equal(one, other) for one, other in zip(outputs(again, ids)[0], expected, strict=True))


def test_the_room_that_there_is_decides(folders):
    folder, _, _ = folders("llama")
    model = dms.load(folder, device_map="auto", max_memory={"cpu": "150KB"})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    ids = torch.randint(2, 97, (2, 40))
    assert torch.equal(model(ids).logits, dms.load(folder, device="cpu")(ids).logits)
    # Where all has room, nothing is kept elsewhere.
    assert not is_offloaded(dms.load(folder, device_map="auto"))


def test_batches_and_stored_prefixes(folders, tmp_path):
    folder, _, _ = folders("llama")
    plain, model = dms.load(folder, device="cpu"), dms.load(folder, device_map=ALL)
    prompts = [list(range(2, 30)), list(range(5, 19)), list(range(40, 90))]

    def batch(which):
        return sorted((one.prompt, one.tokens) for one in dms.generate_batch(which, prompts, max_batch_size=2, max_new_tokens=6))

    assert batch(model) == batch(plain)
    # A store that the one has filled is the other's too.
    store = dms.PrefixStore(tmp_path / "prefixes", max_bytes=2**24)
    first = store.read(plain, prompts[2])
    assert store.get(model, prompts[2])[1] == len(prompts[2])
    assert store.read(model, [*prompts[2], 3]).get_seq_length() == first.get_seq_length() + 1


def test_no_more_than_a_file_of_weights_is_in_memory(folders, tmp_path, monkeypatch):
    folder, _, _ = folders("llama", num_hidden_layers=12)
    alive = {"now": 0, "most": 0}
    read = accelerate.utils.OffloadedWeightsLoader.__getitem__

    def free(size):
        alive["now"] -= size

    def counted(self, key):
        tensor = read(self, key)
        alive["now"] += tensor.nbytes
        alive["most"] = max(alive.values())
        weakref.finalize(tensor, free, tensor.nbytes)
        return tensor

    monkeypatch.setattr(accelerate.utils.OffloadedWeightsLoader, "__getitem__", counted)
    model = dms.load(folder, device_map=ALL)
    whole, largest = sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())
    assert alive["most"] <= 2 * largest
    model(torch.ones(1, 9, dtype=torch.long))
    assert 0 < alive["most"] < whole / 8
    alive["most"] = alive["now"]
    model.save_pretrained(tmp_path / "out", max_shard_size=whole // 6)
    assert largest < alive["most"] < whole / 4 and alive["now"] < largest
    assert same(weights_in(tmp_path / "out"), weights_in(folder))


def test_files_are_small_unless_said_otherwise(folders, tmp_path, monkeypatch):
    folder, _, _ = folders("llama")
    given = []
    own = type(dms.load(folder, device="cpu"))._own_class
    monkeypatch.setattr(own, "save_pretrained", lambda self, folder, **options: given.append(options.get("max_shard_size")) or stop())

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    for places, options in (({"device": "cpu"}, {}), ({"device_map": SOME}, {}), ({"device_map": SOME}, {"max_shard_size": "3GB"})):
        with pytest.raises(Stop):
            dms.save(dms.load(folder, **places), tmp_path / "out", base_name="acme/base", **options)
    assert given == [None, "1GB", "3GB"]


def test_its_own_files_are_not_written_over(folders):
    folder, _, _ = folders("llama")
    before = weights_in(folder)
    model = dms.load(folder, device_map=SOME)
    for save in (lambda: model.save_pretrained(folder), lambda: dms.save(model, folder, base_name="acme/base")):
        with pytest.raises(ValueError, match=r"are on disk .* save it into another folder"):
            save()
    assert same(weights_in(folder), before)


def test_steps_are_not_captured(folders):
    folder, _, _ = folders("llama")
    with pytest.raises(ValueError, match=r"reserve_tokens was given, and weights of LlamaForCausalLM are kept .*leave reserve_tokens out"):
        dms.DMSCache(dms.load(folder, device_map=SOME), reserve_tokens=64)
    assert dms.DMSCache(dms.load(folder, device_map="auto"), reserve_tokens=64).reserve_tokens == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "atuo"}, r"device_map is 'atuo' \(did you mean 'auto'\?\); give one of auto, balanced"),
        ({"device_map": "cuda"}, r"device=\.\.\. puts all of a model on one device"),
        ({"device_map": {}}, r"device_map is \{\}; give one of"),
        ({"device_map": 3}, "device_map is 3; give one of"),
        ({"device_map": {"": "dsik"}}, "device_map has '': 'dsik'; give modules by name"),
        ({"device_map": {"": "meta"}}, "device_map has '': 'meta'"),
        ({"device_map": {"": -1}}, "device_map has '': -1"),
        (
            {"device_map": {"": "cpu", "model.layer.1": "disk"}},
            r"'model\.layer\.1', which is no module of .*did you mean 'model\.layers\.1'",
        ),
        (
            {"device_map": {"model.layers.1": "disk"}},
            r"device_map has no place for model\.embed_tokens of LlamaForCausalLM; name it, or ''",
        ),
        ({"device_map": "auto", "device": "cpu"}, "device is 'cpu'.*give one of them"),
        ({"device_map": "auto", "mode": "train"}, "mode is 'train' and device_map was given"),
        ({"offload_folder": "x"}, r"offload_folder has no effect without device_map.*--device-map auto"),
        ({"offload_folder": "x", "max_memory": {}}, "max_memory and offload_folder have no effect"),
    ],
)
def test_what_cannot_be_followed_is_refused(options, said, folders):
    folder, _, _ = folders("llama")
    with pytest.raises(ValueError, match=said):
        dms.load(folder, **options)


def test_bases_that_stay_on_one_device(folders, tmp_path, monkeypatch):
    _, base, gates = folders("llama")
    with pytest.raises(ValueError, match=r"weights of .* are quantised \(nf4\).*leave device_map out"):
        base_models.load_base(str(base), quantize="nf4", device_map="auto")
    packed = base_models.load_config(str(base))
    packed.quantization_config = {"quant_method": "fp8"}
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"quantised \(fp8\)"):
        base_models.load_base(str(tmp_path / "packed"), device_map="auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("dms.requirements.find_spec", lambda module: None)
    with pytest.raises(RuntimeError, match="device_map needs accelerate, which is not installed"):
        dms.load(gates, base=str(base), device_map="auto")


def test_a_map_is_completed(build_model):
    model = build_model("llama", num_hidden_layers=11)
    # transformers reads "model.layers.1" as the beginning of "model.layers.10" too.
    found = completed(model, {"": "cpu", "model.layers.1": "disk"})
    assert found["model.layers.1"] == "disk" and found["model.layers.10"] == "cpu" and "model" not in found and "" not in found
    assert completed(model, {"": 0}) == {"": 0} and completed(model, "auto") == "auto"
    assert completed(model, {"model": 0, "lm_head": "cpu"}) == {"model": 0, "lm_head": "cpu"}
    tied = build_model("llama", tie_word_embeddings=True)
    assert completed(tied, {"": 0, "model.embed_tokens": "disk"})["lm_head"] == "disk"
    with pytest.raises(ValueError, match=r"puts lm_head on cpu and model on 0, and both share .*give them one place"):
        completed(tied, {"": 0, "lm_head": "cpu"})
    sinks = build_model("gpt_oss")
    with pytest.raises(ValueError, match=r"device_map divides model\.layers\.0\.self_attn .*which has weights of its own"):
        completed(sinks, {"": 0, "model.layers.0.self_attn.q_proj": "cpu"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gpu_host_memory_and_disk(family, folders, tmp_path):
    """Weights on the GPU, beside it and on disk, computed on the GPU."""
    folder, _, _ = folders(
        family, num_hidden_layers=4, **({"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma2" else {})
    )
    plain = dms.load(folder, device="cuda")
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0)).to("cuda")
    expected, cache = outputs_on_gpu(plain, ids)
    for places in ({"": 0, "model.layers.1": "cpu", "model.layers.3": "disk"}, {"": "cpu", "model.layers.0": 0, "model.layers.3": "disk"}):
        model = dms.load(folder, device_map=places)
        assert is_offloaded(model) and compute_device(model) == torch.device("cuda:0")
        assert all(parameter.is_cuda for layer in model.dms.layers for parameter in layer.gate.parameters())
        found, own = outputs_on_gpu(model, ids)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and own.report() == cache.report()
        # Tokens that are elsewhere are brought too.
        assert torch.equal(model(ids.cpu()).logits.to("cuda"), plain(ids).logits)
        own.save(tmp_path / "cache")
        assert dms.DMSCache.load(tmp_path / "cache", model).report().alive == cache.report().alive
        model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
        assert same(weights_in(tmp_path / "again"), weights_in(folder))
        with pytest.raises(ValueError, match="reserve_tokens was given"):
            dms.DMSCache(model, reserve_tokens=64)


@torch.no_grad()
def outputs_on_gpu(model, ids):
    cache = dms.DMSCache(model)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    return [model(ids).logits, tokens], cache
