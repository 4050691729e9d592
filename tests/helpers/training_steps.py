"""A training step of a random model on a CPU, for tests that hold plans against what is there."""

from dataclasses import replace

import torch
from dms_train import models as students
from dms_train.plan_command import choice_of, job_of
from dms_train.recipe import RetrofitRecipe
from dms_train.step import HeadLoss, Normalizer, distill_step

from dms.costs import activations, memory, shapes
from dms.training.packed_attention import local_rows

SMALL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192, "hidden_size": 256}


def make_recipe(length, base_lr=None, **changes):
    values = {
        "model": "random",
        "output_dir": "nowhere",
        "target_cr": 4,
        "dms": {"window": 16},
        "data": {"source": "builtin", "length": length},
        "optimizer": {"lr": 1e-3, "base_lr": base_lr},
        "steps": 4,
        "batch_size": 1,
    }
    return RetrofitRecipe.model_validate(values | changes)


def make_batch(recipe):
    B, T = recipe.micro_batch_size, recipe.data.length
    # Two documents, where there may be several: that changes nothing in what lives.
    first = T // 3 if recipe.data.packs else T
    return {
        "input_ids": torch.randint(2, 1000, (B, T), generator=torch.Generator().manual_seed(0)),
        "segment_ids": (1 + (torch.arange(T) >= first).long()).repeat(B, 1),
        "position_ids": torch.cat([torch.arange(first), torch.arange(T - first)]).repeat(B, 1),
        "loss_mask": torch.ones(B, T, dtype=torch.bool),
        "number": torch.arange(B),
    }


def take_step(model, teacher, batch, recipe):
    B, T = batch["input_ids"].shape
    attention = local_rows(model, packs=True) if recipe.data.packs else None
    options = {"normalizer": Normalizer(B * T, B), "attention": attention, "target": 0.5, "seed": 0, "compression_weight": 1.0}
    head_loss = HeadLoss(model, teacher, beta=0.0, chunk=recipe.loss_chunk)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss = distill_step(model, teacher, batch if attention is None else attention.divide(batch), head_loss=head_loss, **options).loss
    loss.backward()


def plan_step(model, recipe, packing=None):
    """What is planned of a step on a CPU, in float32 weights: bytes by kind without what is not tensors, and the model's shape.

    model: on the meta device, with nothing attached; of no use afterwards. packing: how its base is quantised.
    """
    job = job_of(recipe)
    students.equip(model, recipe.model_copy(update={"activation_checkpointing": False}))
    shape = shapes.measure_training(model, packing)
    if recipe.data.packs:
        shape = replace(shape, attention=shapes.PACKED_ATTENTION)
    given = activations.MicroBatch(
        batch=job.micro_batch_size,
        length=job.length,
        weight_dtype=torch.float32,
        autocast=recipe.precision == "bf16",
        kernels=False,
        packed_attention=recipe.data.packs,
    )
    made = activations.measure(model, shape, given)[1]
    itemsize = memory.ItemSize.of(job, saved_bfloat16=False)
    found = memory.of_choice(shape, job, choice_of(recipe), made, itemsize, num_gpus=1, gpus_per_node=1, kernels=False, reserve=False)
    return found, shape
