"""What trains of a model, beside its gates."""

import re

import pytest
import torch
import transformers
from dms_train import models
from dms_train.recipe import RetrofitRecipe
from wrappers import build_wrapper

import dms


def _gemma3():
    """A text decoder, and a tower that reads images."""
    text = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 128,
    }
    text |= {"num_hidden_layers": 6, "max_position_embeddings": 512, "sliding_window": 16}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def _mllama():
    """Of its decoder, a layer that attends to images."""
    return build_wrapper("mllama")


@pytest.mark.parametrize("trainable", ["gates", "gates+lora", "all"])
@pytest.mark.parametrize(
    ("build", "least", "reads_images"),
    [
        (_gemma3, {"gates": 2, "gates+lora": 80, "all": 60}, "vision|projector"),
        (_mllama, {"gates": 4, "gates+lora": 32, "all": 21}, r"vision|projector|language_model\..*layers\.1\."),
    ],
)
def test_what_reads_images_does_not_train(build, least, reads_images, trainable):
    multimodal = build()
    rates = {"lr": 1e-3} if trainable == "gates" else {"lr": 1e-3, "base_lr": 1e-4}
    data = {"source": "builtin", "length": 64}
    shared = {"model": "random", "output_dir": "nowhere", "target_cr": 4, "dms": {"window": 8}, "steps": 2, "batch_size": 2}
    gates, base = models.equip(multimodal, RetrofitRecipe(**shared, data=data, optimizer=rates, trainable=trainable))
    dms.set_mode(multimodal, "train")
    hidden = multimodal.get_decoder()(input_ids=torch.randint(3, 120, (1, 64)), use_cache=False).last_hidden_state
    counts = multimodal.dms.forward.evicted_count.values()
    ((hidden @ multimodal.get_output_embeddings().weight.T).square().sum() + sum(count.sum() for count in counts)).backward()
    trained = {**gates, **base}
    assert len(trained) >= least[trainable]
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    beside = {name: p for name, p in multimodal.named_parameters() if re.search(reads_images, name)}
    assert beside and not [name for name, p in beside.items() if p.requires_grad or "lora_" in name]
