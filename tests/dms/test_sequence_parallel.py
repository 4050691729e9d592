"""A step on rows that two or four processes share is the step on whole rows: loss, counts and every gradient."""

import copy
import json
import os
import subprocess
import sys

import pytest

FAMILIES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    # Fewer KV heads than processes: keys, values and gates are replicated, and counted once.
    "llama-one-kv-head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    # Layers without gates attend within a window; scores are capped.
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9},
    # A sink logit in each head's denominator; transformers lets its packed documents see each other.
    "gpt_oss": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 9,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def run(family, processes, tmp_path, **settings):
    """The figures of every process, and the gradients summed over them."""
    name = f"{family}-{processes}-{len(list(tmp_path.iterdir()))}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
    store = tmp_path / f"{name}.store"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, family, str(store), str(tmp_path / f"{name}.{rank}"), json.dumps(settings)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in started:
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
    import torch

    parts = [torch.load(tmp_path / f"{name}.{rank}") for rank in range(processes)]
    figures = {key: sum(part["figures"][key] for part in parts) for key in parts[0]["figures"]}
    return figures, {key: sum(part["gradients"][key] for part in parts) for key in parts[0]["gradients"]}


CASES = [
    ("llama", 2, {}),
    ("llama-one-kv-head", 2, {"alignment": "next"}),
    pytest.param("llama", 4, {"alignment": "next", "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("llama-one-kv-head", 4, {"granularity": "layer", "trainable": "all"}, marks=pytest.mark.slow),
    pytest.param("llama", 2, {"trainable": "all", "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("gemma2", 2, {"alignment": "next", "checkpointing": True, "trainable": "all"}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", 2, {"trainable": "all", "packed": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "processes", "settings"), CASES)
def test_a_divided_step_is_the_step(family, processes, settings, tmp_path):
    whole, expected = run(family, 1, tmp_path, **settings)
    divided, gradients = run(family, processes, tmp_path, **settings)
    assert 0 < whole["evicted"] < whole["decided"] and whole["compression"] > 0.01 and whole["kl"] > 1e-4
    assert divided["decided"] == whole["decided"] and divided["evicted"] == whole["evicted"]
    for name in ("loss", "kl", "compression"):
        assert divided[name] == pytest.approx(whole[name], rel=1e-5), name
    largest = 0.0
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        largest = max(largest, float((gradients[name] - gradient).abs().max() / gradient.abs().max()))
    print(f"\n{family} {processes} {settings}: loss {divided['loss'] - whole['loss']:.1e}, gradients {largest:.1e} of their largest")
    # transformers' own sliding attention sums otherwise than ours.
    assert largest < (5e-4 if family in ("gemma2", "gpt_oss") else 5e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "tokens", "message"),
    [
        (4, 2, 3, 96, "4 query and 2 KV heads, which 3 processes cannot share evenly; choose one of 2, 4"),
        (4, 2, 2, 97, "data.length 97, which it does not divide"),
        (12, 6, 4, 96, "choose one of 2, 3, 6, 12"),
    ],
)
def test_what_cannot_be_shared_is_refused(heads, kv_heads, size, tokens, message):
    from transformers import LlamaConfig

    from dms.sequence_parallel import check

    class Model:
        config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=48)

    with pytest.raises(ValueError, match=message):
        check(Model(), size, tokens, {})


def test_other_kinds_of_layers_are_refused():
    from transformers import LlamaConfig

    from dms.sequence_parallel import check

    class Model:
        config = LlamaConfig(
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"]
        )

    with pytest.raises(ValueError, match=r"not computed here \(chunked_attention\)"):
        check(Model(), 2, 96, {})


def main(family: str, store: str, out: str, settings: dict) -> None:
    """One process: a step of a small random model on packed documents, one of them across every border."""
    import torch
    import torch.distributed as dist
    import transformers

    import dms
    from dms.retrofitting import gate_parameters
    from dms.sequence_parallel import Shards, check
    from dms.train.step import HeadLoss, Normalizer, distill_step

    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=size)
    torch.manual_seed(0)
    sizes = {"vocab_size": 83, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 128}
    config = transformers.AutoConfig.for_model(family.split("-")[0], pad_token_id=0, **sizes, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Larger than at the start of training: attention that weighs its keys alike would not tell borders apart.
        parameter.data.mul_(2.0)
    teacher = copy.deepcopy(model).requires_grad_(False) if settings.get("trainable") == "all" else None
    method = {key: settings[key] for key in ("alignment", "granularity") if key in settings}
    dms.retrofit(model, dms.DMSConfig(window=4, sinks=1, **method))
    for gate in gate_parameters(model).values():
        gate.data.add_(0.02 * torch.randn(gate.shape))
    model.train()
    model.config.use_cache = False
    if settings.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if teacher is None:
        model.requires_grad_(False)
        for gate in gate_parameters(model).values():
            gate.requires_grad_(True)

    lengths = [[37, 50, 5, 4] if settings.get("packed", True) else [92, 4], [96]]
    segment, position = torch.zeros(2, 96, dtype=torch.long), torch.zeros(2, 96, dtype=torch.long)
    for row, documents in enumerate(lengths):
        ends = torch.tensor(documents).cumsum(0).tolist()
        for number, (length, end) in enumerate(zip(documents, ends, strict=True), 1):
            segment[row, end - length : end], position[row, end - length : end] = number, torch.arange(length)
    # The first row ends in padding.
    segment[0, 92:] = 0
    batch = {
        "input_ids": torch.randint(1, 83, (2, 96)),
        "segment_ids": segment,
        "position_ids": position,
        "loss_mask": torch.rand(2, 96) > 0.2,
        "number": torch.tensor([7, 12]),
    }
    predictions = int(((segment > 0) & batch["loss_mask"]).sum())
    shards = None
    if size > 1:
        shards = Shards(dist.group.WORLD)
        check(model, size, 96, model.dms.skipped)
        batch = shards.divide(batch)
    loss = HeadLoss(model, teacher, beta=0.0, chunk=16)
    options = {"target": 0.9, "normalizer": Normalizer(predictions, 2), "seed": 3, "compression_weight": 2.0}
    output = distill_step(model, teacher, batch, head_loss=loss, shards=shards, **options)
    output.loss.backward()
    figures = {name: float(getattr(output, name).detach()) for name in ("loss", "kl", "compression", "evicted", "decided")}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"figures": figures, "gradients": gradients}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
