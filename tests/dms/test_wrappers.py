"""Text decoders inside other classes: text is evicted from, images are read in dense mode alone, and neither shifts the other."""

import copy
import json
import shutil

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, Cohere2ForCausalLM, Cohere2VisionForConditionalGeneration
from wrappers import PROCESSOR, VISION, WRAPPERS, build_wrapper, image_inputs, wrapper_config, write_wrapper

import dms
from dms.builtin import builtin_models
from dms.hf_compat import cache_argument, output_cache
from dms.io import base_models, checkpoint
from dms.lm_head import difference_of_head, find_head, text_decoder
from dms.modes import set_mode
from dms.retrofitting import gate_parameters

METHOD = dms.DMSConfig(window=4, scale=1.0, offset=0.0)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 2000, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def mask(ids):
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return mask


@pytest.fixture(scope="module")
def build(open_gates):
    """`build(model_type)`: a retrofitted one with open gates."""
    return lambda model_type: open_gates(dms.retrofit(build_wrapper(model_type), METHOD))


@torch.no_grad()
def _in_parts(model, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of a prompt of `first` tokens and of the others, one by one."""
    out = model(input_ids=ids[:, :first], use_cache=True)
    cache, logits = output_cache(out), [out.logits]
    for token in ids[:, first:].split(1, 1):
        logits.append(model(input_ids=token, use_cache=True, **cache_argument(model, cache)).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("model_type", WRAPPERS)
@torch.no_grad()
def test_text_is_evicted_from(model_type, ids, mask, open_gates):
    model = build_wrapper(model_type)
    given = {"input_ids": ids, "attention_mask": mask}
    dense = [model(**given).logits, model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)]
    dms.retrofit(model, METHOD)
    num_gated, num_layers = WRAPPERS[model_type].layers
    assert len(model.dms.layers) == num_gated and len(model.dms.skipped) == num_layers - num_gated
    assert all("language_model" in layer.name for layer in model.dms.layers)
    assert text_decoder(model) is model.dms.decoder and difference_of_head(model, ids[:1]) is None
    assert torch.equal(model(**given).logits, dense[0])

    set_mode(model, "evict")
    model.dms.evict_bias = -1e4
    torch.testing.assert_close(model(**given).logits[mask > 0], dense[0][mask > 0], atol=1e-4, rtol=0)
    assert torch.equal(model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False), dense[1])

    model.dms.evict_bias = 0.0
    open_gates(model)
    masked = model(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(masked, dense[0], atol=1e-2)
    torch.testing.assert_close(_in_parts(model, ids, 20), masked, atol=1e-4, rtol=0)
    # Each step reads the whole text again: the reference of what generate does with a cache.
    text, seen = ids, mask
    for _ in range(6):
        logits = model(input_ids=text, attention_mask=seen, use_cache=False).logits[:, -1]
        logits[:, 0] = -torch.inf
        text, seen = torch.cat([text, logits.argmax(-1)[:, None]], 1), torch.cat([seen, seen[:, -1:]], 1)
    assert torch.equal(model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False), text)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_gradients_reach_every_gate(model_type, ids, build):
    model = build(model_type).train()
    set_mode(model, "train")
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gate_parameters(model).values())


@pytest.mark.parametrize("model_type", ["llava", "llama4", "qwen2_5_vl", "gemma3", "mllama"])
@torch.no_grad()
def test_images_are_read_in_dense_mode_alone(model_type, open_gates):
    model = build_wrapper(model_type)
    given = image_inputs(model)
    options = {"max_new_tokens": 3, "do_sample": False}
    dense = model(**given).logits, model.generate(**given, **options)
    assert not torch.allclose(dense[0], model(**given | {"pixel_values": -given["pixel_values"]}).logits, atol=1e-3)
    open_gates(dms.retrofit(model, METHOD))
    for _ in range(2):
        assert torch.equal(model(**given).logits, dense[0]) and torch.equal(model.generate(**given, **options), dense[1])
        for mode in ("train", "evict"):
            set_mode(model, mode)
            with pytest.raises(
                ValueError, match=r"was given images, video or sound \((pixel_values|image_\w+)\); gates are for text: set_mode"
            ):
                model(**given)
        # It encodes images before the first pass, and hands on what it made of them.
        with pytest.raises(ValueError, match=r"was given images, video or sound \(\w+\); gates are for text: set_mode"):
            model.generate(**given, **options)
        set_mode(model, "dense")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values_videos", torch.zeros(4, 1176)),
        ("mm_encoder_outputs", {"image": torch.zeros(1, 64)}),
        ("mm_token_type_ids", torch.tensor([[0, 1, 1, 0]])),
    ],
)
def test_every_way_to_bring_more_than_text(name, value, build):
    model = build("qwen2_5_vl")
    ids = torch.tensor([[5, 6, 7, 8]])
    set_mode(model, "evict")
    with pytest.raises(ValueError, match=rf"was given images, video or sound \({name}\)"):
        model(input_ids=ids, **{name: value})
    expected = model(input_ids=ids).logits
    # What processors and `generate` give with text alone.
    empty = {"mm_encoder_outputs": {}, "mm_token_type_ids": torch.zeros_like(ids), "pixel_values": None}
    assert torch.equal(model(input_ids=ids, **empty).logits, expected)


@torch.no_grad()
def test_images_read_before_shift_no_positions_of_text(ids, build):
    """M-RoPE: an image takes fewer positions than it has tokens, and the model remembers by how many."""
    model = build("qwen2_5_vl")
    set_mode(model, "evict")
    expected = _in_parts(model, ids, 20)
    greedy = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    set_mode(model, "dense")
    model(**image_inputs(model))
    kept = model.model.rope_deltas
    assert kept is not None and int(kept.abs().max()) > 0
    set_mode(model, "evict")
    torch.testing.assert_close(_in_parts(model, ids, 20), expected, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), greedy)
    # A conversation goes on as it would have been read at once.
    turn = model.generate(input_ids=ids[:, :30], max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    model.model.rope_deltas = kept
    again = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, past_key_values=output_cache(turn))
    assert torch.equal(again, greedy)
    # What the dense conversation needs is still there, after a pass that failed too.
    with pytest.raises(ValueError, match="was given images"):
        model(**image_inputs(model))
    assert model.model.rope_deltas is kept


def test_a_copy_is_independent(ids, build):
    model = build("qwen3_vl")
    set_mode(model, "evict")
    expected = model(input_ids=ids, use_cache=False).logits
    twin = copy.deepcopy(model)
    set_mode(model, "dense")
    assert torch.equal(twin(input_ids=ids, use_cache=False).logits, expected)


# The others differ in nothing that saving sees; whole runs save all of them.
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llama4"])
def test_saved_and_loaded_it_is_what_it_was(model_type, ids, open_gates, tmp_path):
    base = write_wrapper(model_type, tmp_path / "base")
    model = base_models.load_base(str(base), device="cpu")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert type(model).__name__ == WRAPPERS[model_type].name and any("vision" in name or "visual" in name for name in whole)
    open_gates(dms.retrofit(model, METHOD))
    checkpoint.save(model, tmp_path / "out", tokenizer=base_models.load_tokenizer(str(base)), base_name=str(base))
    loaded = dms.load(tmp_path / "out", device="cpu")
    assert type(loaded).__name__ == type(model).__name__ and loaded.dms.mode == "evict"
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in whole.items())
    set_mode(model, "evict")
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
    assert {name: json.loads((tmp_path / "out" / name).read_text()) for name in PROCESSOR} == PROCESSOR
    # Saved once more, from where it was loaded.
    checkpoint.save(loaded, tmp_path / "again", base_name=str(base))
    checkpoint.save(loaded, tmp_path / "out", base_name=str(base))
    for folder in ("out", "again"):
        assert {name: json.loads((tmp_path / folder / name).read_text()) for name in PROCESSOR} == PROCESSOR


def test_from_the_hub_what_prepares_images_comes_along(monkeypatch, tmp_path):
    """Fetched with the weights, since a run saves its model hours later."""
    commit, repo = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--acme--pictures"
    write_wrapper("llava", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    fetched = []
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: (fetched.append((args, kwargs)), fetch(*args, **kwargs))[1]
    )
    model = base_models.load_base("acme/pictures", device="cpu")
    assert fetched == [(("acme/pictures",), {"allow_patterns": list(base_models.PROCESSOR_FILES)})]
    checkpoint.save(dms.retrofit(model, METHOD), tmp_path / "out", base_name="acme/pictures")
    assert all((tmp_path / "out" / name).is_file() for name in PROCESSOR)
    # Not where a model is of text alone.
    shutil.rmtree(repo / "snapshots" / commit)
    shutil.copytree(builtin_models()["tiny"], repo / "snapshots" / commit)
    base_models.load_base("acme/pictures", device="cpu")
    assert len(fetched) == 1


def test_where_it_was_loaded_from_is_gone(tmp_path):
    base = write_wrapper("llava", tmp_path / "base")
    model = dms.retrofit(base_models.load_base(str(base), device="cpu"), METHOD)
    shutil.rmtree(base)
    checkpoint.save(model, tmp_path / "out", base_name="acme/pictures")
    assert (tmp_path / "out" / "gates.safetensors").is_file()


def test_the_head_is_that_of_the_class_around():
    """Cohere 2 Vision leaves out the scale that its text decoder's configuration names."""
    config = wrapper_config("llava")
    text = config.text_config.to_dict() | {"model_type": "cohere2", "logit_scale": 0.25, "layer_types": ["full_attention"] * 2}
    around = AutoConfig.for_model("cohere2_vision", text_config=text, vision_config=VISION, image_token_id=2040)
    for config, cls, scale in (
        (around, Cohere2VisionForConditionalGeneration, 1.0),
        (around.text_config, Cohere2ForCausalLM, 0.25),
    ):
        model = cls(config).eval()
        assert find_head(model).logit_scale == scale
        assert difference_of_head(model, torch.arange(2, 20)[None]) is None
