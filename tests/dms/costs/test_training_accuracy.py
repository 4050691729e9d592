"""What is planned against what real steps take on a CPU: peak bytes of all tensors, and FLOPs counted operator by operator."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch
from dms_train import models as students
from dms_train.plan_command import job_of
from torch.utils.flop_counter import FlopCounterMode
from training_steps import SMALL, make_batch, make_recipe, plan_step, take_step
from transformers import AutoConfig, AutoModelForCausalLM

from dms.costs import flops, shapes
from dms.costs.job import Choice
from dms.costs.operators import LiveBytes
from dms.io.base_models import auto_class

SHAPES = {
    "large vocabulary": (
        ("llama", SMALL | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 16000}),
        {"micro_batch_size": 2, "batch_size": 2, "loss_chunk": 128, "length": 512},
    ),
    "tied embeddings, checkpointed": (
        ("qwen3", SMALL | {"intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4000, "tie_word_embeddings": True}),
        {"activation_checkpointing": True, "loss_chunk": 256, "length": 1024},
    ),
    "long": (
        ("mistral", SMALL | {"intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000, "sliding_window": None}),
        {"loss_chunk": 512, "length": 2048},
    ),
    "every weight trained": (
        ("llama", SMALL | {"intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4000}),
        {"trainable": "all", "loss_chunk": 128, "length": 256, "base_lr": 1e-5},
    ),
}
# The same in bfloat16 by autocast, which keeps casts of the weights.
_HALF = {"precision": "bf16", "loss_chunk": 128, "length": 512}
HALF = {
    "gates trained, bf16": (SHAPES["every weight trained"][0], _HALF),
    "every weight trained, bf16": (SHAPES["every weight trained"][0], _HALF | {"trainable": "all", "base_lr": 1e-5}),
    "the same, bf16, checkpointed": (
        SHAPES["every weight trained"][0],
        _HALF | {"trainable": "all", "base_lr": 1e-5, "activation_checkpointing": True},
    ),
}

_SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"], "sliding_window": 64}
PACKED = {
    "packed rows": (
        ("llama", SMALL | {"intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 3000}),
        {"length": 768, "loss_chunk": 128, "data": {"source": "text", "path": "nowhere", "length": 768}},
    ),
    "packed rows, eager and sliding": (
        (
            "gemma3_text",
            SMALL | _SLIDING | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 3000, "attn_implementation": "eager"},
        ),
        {"length": 768, "loss_chunk": 128, "data": {"source": "text", "path": "nowhere", "length": 768}},
    ),
}

# The last layers read the keys of layers 2 and 3, of their kind; embeddings for each layer.
_FOLLOWING = {
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 64,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 1000,
}

_READS_IMAGES = {
    "text_config": SMALL
    | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 3000}
    | {"cross_attention_layers": [1], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 48}
    | {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0], "vision_output_dim": 64},
    "image_token_index": 3000,
    "architectures": ["MllamaForConditionalGeneration"],
}

# Other families: their layers are run, not reckoned.
FAMILIES = {
    "sliding and full attention": (
        ("gemma3_text", SMALL | _SLIDING | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 3000}),
        {"length": 768, "loss_chunk": 128},
    ),
    "the same, checkpointed": (
        ("gemma3_text", SMALL | _SLIDING | {"intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 3000}),
        {"length": 768, "loss_chunk": 128, "activation_checkpointing": True},
    ),
    "layers that follow others": (
        ("gemma4_text", SMALL | _FOLLOWING | {"intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1000}),
        {"length": 768, "loss_chunk": 128},
    ),
    "a layer that text passes by, checkpointed": (
        ("mllama", _READS_IMAGES),
        {"length": 768, "loss_chunk": 128, "activation_checkpointing": True},
    ),
    "no rotary positions": (("gpt2", {"n_embd": 256, "n_head": 8, "n_layer": 4, "vocab_size": 3000}), {"length": 768, "loss_chunk": 128}),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind, recipe, device):
    family, shape = kind
    config = AutoConfig.for_model(family, **shape)
    with torch.device(device):
        model = auto_class(config).from_config(config)
        gates, base = students.equip(model, recipe)
        trained = {**gates, **base}
    return model, trained


def measured_bytes(kind, recipe):
    model, trained = build(kind, recipe, "cpu")
    teacher = None
    if recipe.trainable == "all":
        teacher = AutoModelForCausalLM.from_config(model.config).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    batch = make_batch(recipe)
    weights = [*model.parameters(), *model.buffers(), *(teacher.parameters() if teacher is not None else ())]
    with LiveBytes(*weights, *batch.values()) as live:
        take_step(model, teacher, batch, recipe)
        optimizer.step()
    if recipe.trainable == "all":
        # The first step has no moments yet; in the second they are there from the start.
        with live:
            take_step(model, teacher, batch, recipe)
            optimizer.step()
    return live.peak


def planned_bytes(kind, recipe):
    family, shape = kind
    config = AutoConfig.for_model(family, **shape)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return plan_step(model, recipe)[0].peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*list(SHAPES)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in [*list(SHAPES)[2:], *FAMILIES, *PACKED, *HALF])]
)
def test_peak_bytes(name, capsys):
    kind, changes = (SHAPES | FAMILIES | PACKED | HALF)[name]
    recipe = make_recipe(**changes)
    measured, planned = measured_bytes(kind, recipe), planned_bytes(kind, recipe)
    with capsys.disabled():
        print(f"\n{name}: planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.15)


# Groups of eight make the chunked route's blocks short, so that little of them is future.
LONG = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8192}
LONG |= {"intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 1000, "attn_implementation": "eager"}


def _in_place(total_shape, a_shape, b_shape, *_, **__):
    """PyTorch's counter does not know the product that adds in place."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@pytest.mark.parametrize("trainable", ["gates", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops(trainable, checkpointing, capsys):
    """Gates that evict nothing: the pair formula is then that of dense attention, and the chunked route's blocks waste little at
    this length. Eager attention in the teacher's pass, whose products are counted like any others."""
    base_lr = 1e-5 if trainable == "all" else None
    recipe = make_recipe(2048, base_lr, trainable=trainable, activation_checkpointing=checkpointing, loss_chunk=512)
    model, _ = build(("llama", LONG), recipe, "cpu")
    teacher = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager") if trainable == "all" else None
    shape = shapes.measure_training(model)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        take_step(model, teacher, make_batch(recipe), recipe)
    planned = flops.of_sequence(shape, job_of(recipe), checkpointing=checkpointing, route="chunked", keep=1.0)
    counted = counter.get_total_flops()
    with capsys.disabled():
        print(
            f"\n{trainable}, checkpointing {checkpointing}: planned {planned.total:.4g}, counted {counted:.4g}, {planned.total / counted - 1:+.2%}"
        )
    assert planned.total == pytest.approx(counted, rel=0.02)
    assert planned.attention > 0.3 * planned.total


def test_less_is_computed_the_more_is_evicted():
    recipe = make_recipe(4096)
    model, _ = build(("llama", LONG), recipe, "meta")
    shape, job = shapes.measure_training(model), job_of(recipe)
    attention = [flops.of_sequence(shape, job, checkpointing=False, keep=keep).student_attention for keep in (1.0, 1 / 2, 1 / 8)]
    # Two products of 2 D FLOPs for each pair, head and layer; the pairs by hand: T 4096, w 16, the query's own key beside it.
    assert attention[0] == 2 * 2 * 16 * 8 * 2 * 4096 * 4097 / 2
    assert attention[2] == 2 * 2 * 16 * 8 * 2 * (4079 * 4080 / 2 / 8 + 17 * 4096 - 17 * 16 / 2)
    assert attention[0] / attention[1] == pytest.approx(2, rel=0.02)


def test_checkpointing_trades_bytes_for_flops():
    kind, changes = SHAPES["tied embeddings, checkpointed"]
    recipe = make_recipe(**changes)
    used = {}
    for checkpointing in (False, True):
        chosen = recipe.model_copy(update={"activation_checkpointing": checkpointing})
        used[checkpointing] = planned_bytes(kind, chosen)
    assert used[True] < 0.8 * used[False]
    assert Choice(activation_checkpointing=True).activations == "ckpt"
