"""Attention by documents in training: packed documents are as each alone, and rows that processes share as whole rows."""

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
    # The last layer attends to the keys and values of the first.
    "gemma4_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 9,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 83,
    },
    # Layers without gates attend within a window; scores are capped.
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9},
    # A sink logit in each head's denominator.
    "opt": {"num_attention_heads": 4},
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
    """Figures and gradients of a step that processes share, summed over them."""
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
    pytest.param("llama", 2, {}, marks=pytest.mark.slow),
    ("llama-one-kv-head", 2, {"alignment": "next"}),
    pytest.param("llama", 4, {"alignment": "next", "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("llama-one-kv-head", 4, {"granularity": "layer", "trainable": "all"}, marks=pytest.mark.slow),
    pytest.param("llama", 2, {"trainable": "all", "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("gemma2", 2, {"alignment": "next", "checkpointing": True, "trainable": "all"}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", 2, {"trainable": "all", "packed": False}, marks=pytest.mark.slow),
    pytest.param("gemma4_text", 2, {"trainable": "all", "checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("gemma4_text", 2, {"alignment": "next"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "processes", "settings"), CASES)
def test_a_divided_step_is_the_step(family, processes, settings, tmp_path):
    whole, expected = take_step(family, settings)
    divided, gradients = run(family, processes, tmp_path, **settings)
    assert 0 < whole["evicted"] < whole["decided"] and whole["compression"] > 0.01 and whole["kl"] > 1e-4
    assert divided["decided"] == whole["decided"] and divided["evicted"] == whole["evicted"]
    for name in ("loss", "kl", "compression"):
        assert divided[name] == pytest.approx(whole[name], rel=1e-5 if family == "gpt_oss" else 1e-6), name
    largest = 0.0
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        largest = max(largest, float((gradients[name] - gradient).abs().max() / gradient.abs().max()))
    print(f"\n{family} {processes} {settings}: loss {divided['loss'] - whole['loss']:.1e}, gradients {largest:.1e} of their largest")
    # transformers' eager attention has a float32 softmax.
    assert largest < {"gemma2": 2e-5, "gpt_oss": 5e-4}.get(family, 2e-6)


def make_models(family, settings):
    """A small random model with gates, and a copy as teacher where every weight trains."""
    import torch
    import transformers

    import dms
    from dms.retrofitting import gate_parameters

    torch.manual_seed(0)
    sizes = {"vocab_size": 83, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 128}
    if family == "opt":
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    config = transformers.AutoConfig.for_model(family.split("-")[0], pad_token_id=0, **sizes, **FAMILIES[family])
    # In float64, gates aside: a small divergence of alike distributions, and its gradients, would drown in float32's rounding.
    model = transformers.AutoModelForCausalLM.from_config(config)
    if family != "gpt_oss":
        # Its experts' product has no float64.
        model = model.double()
    for parameter in model.parameters():
        # Larger than at the start of training: attention that weighs its keys alike would not tell borders apart.
        parameter.data.mul_(2.0)
    teacher = copy.deepcopy(model).requires_grad_(False) if settings.get("trainable") == "all" else None
    method = {key: settings[key] for key in ("alignment", "granularity") if key in settings}
    dms.retrofit(model, dms.DMSConfig(window=4, sinks=1, **method))
    for gate in gate_parameters(model).values():
        gate.data.add_(0.02 * torch.randn(gate.shape))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        module.dropout = 0.0
    model.config.use_cache = False
    if settings.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if teacher is None:
        model.requires_grad_(False)
        for gate in gate_parameters(model).values():
            gate.requires_grad_(True)
    return model, teacher


def make_batch(lengths):
    """Rows of documents of these lengths; those of 4 tokens are padding."""
    import torch

    segment, position = torch.zeros(len(lengths), 96, dtype=torch.long), torch.zeros(len(lengths), 96, dtype=torch.long)
    for row, documents in enumerate(lengths):
        ends = torch.tensor(documents).cumsum(0).tolist()
        for number, (length, end) in enumerate(zip(documents, ends, strict=True), 1):
            segment[row, end - length : end] = 0 if length == 4 else number
            position[row, end - length : end] = torch.arange(length)
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 83, segment.shape, generator=generator),
        "segment_ids": segment,
        "position_ids": position,
        "loss_mask": torch.rand(segment.shape, generator=generator) > 0.2,
        "number": torch.arange(len(lengths)) + 7,
    }


def step(model, teacher, batch, predictions, rows):
    from dms_train.step import HeadLoss, Normalizer, distill_step

    return distill_step(
        model,
        teacher,
        batch if rows is None else rows.divide(batch),
        head_loss=HeadLoss(model, teacher, beta=0.0, chunk=16),
        attention=rows,
        target=0.9,
        normalizer=Normalizer(predictions, len(batch["number"])),
        seed=3,
        compression_weight=2.0,
    )


@pytest.mark.parametrize(("window", "shape"), [(3, ()), ([3], (1,)), ([1, 3, 6], (3,))])
def test_decisions_for_several_windows_go_with_their_heads(window, shape):
    import torch

    from dms.masks import Tokens
    from dms.training.packed_attention import PackedAttention
    from dms_kernels import gated_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    log_keep = -5 * torch.rand(2, 12, 2, *shape, generator=generator)
    tokens = Tokens(torch.tensor([[1] * 7 + [2] * 5, [1] * 10 + [0] * 2], dtype=torch.int32), torch.zeros(2, 12, dtype=torch.int32))
    options = {"log_keep_BSH": log_keep, "tokens": tokens, "window": window, "sinks": 1, "alignment": "own"}
    out = PackedAttention().train_attention(q, k, v, **options, scaling=0.5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = gated_attention(q, k, v, log_keep, window=window, scale=0.5, segment_ids=tokens.segment_BT, sinks=1)
    assert torch.equal(out, want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "opt", "gemma4_text"])
def test_packed_documents_are_as_those_documents_alone(family, monkeypatch):
    """The KL of each family's teacher and student, where transformers' masks would let gpt_oss's and opt's documents meet."""
    import torch

    from dms.training.packed_attention import PackedAttention

    # Noise goes by places in the row.
    monkeypatch.setattr(
        "dms.training.soft_decisions.logistic_noise", lambda sequence_B, tokens, heads, **_: torch.zeros(len(sequence_B), tokens, heads)
    )
    model, _ = make_models(family, {})
    lengths = [37, 50, 5, 4]
    batch = make_batch([lengths])
    predictions = int(((batch["segment_ids"] > 0) & batch["loss_mask"]).sum())
    packed = step(model, None, batch, predictions, PackedAttention())
    alone, end = 0.0, 0
    for length in lengths[:3]:
        part = {key: value[:, end : end + length] if value.dim() == 2 else value for key, value in batch.items()}
        part["segment_ids"] = torch.ones_like(part["segment_ids"])
        alone += float(step(model, None, part, predictions, None).kl)
        end += length
    assert float(packed.kl) == pytest.approx(alone, rel=1e-4 if family == "gpt_oss" else 1e-6)
    assert alone > 1e-4


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "tokens", "message"),
    [
        (4, 2, 3, 96, "4 query and 2 KV heads, which 3 processes cannot share evenly; choose one of 2, 4"),
        (4, 2, 2, 97, "data.length 97, which it does not divide"),
        (12, 6, 4, 96, "choose one of 2, 3, 6, 12"),
    ],
)
def test_what_cannot_be_shared_is_refused(heads, kv_heads, size, tokens, message):
    from dms.training.packed_attention import check_sharing

    with pytest.raises(ValueError, match=message):
        check_sharing(_llama(num_attention_heads=heads, num_key_value_heads=kv_heads), size, tokens, {})


def _llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    import dms

    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 83, "max_position_embeddings": 128}
    return dms.retrofit(LlamaForCausalLM(LlamaConfig(**sizes, **config)), dms.DMSConfig(window=4))


def test_heads_are_counted_in_the_layers():
    """Full-attention layers have three KV heads, of which the configuration's two say nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import dms
    from dms.training.packed_attention import check_sharing

    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_global_key_value_heads": 3, "attention_k_eq_v": True}
    sizes = FAMILIES["gemma4_text"] | {"num_kv_shared_layers": 0, "hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 83}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **(sizes | heads)))
    dms.retrofit(model, dms.DMSConfig(window=4))
    with pytest.raises(ValueError, match="has 6 query and 3 KV heads, which 2 processes cannot share evenly; choose one of 6"):
        check_sharing(model, 2, 96, model.dms.skipped)


def test_other_kinds_of_layers_are_refused():
    from dms.training.packed_attention import check_sharing

    model = _llama(num_attention_heads=4, num_key_value_heads=2)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match=r"not computed here \(chunked_attention\)"):
        check_sharing(model, 2, 96, {})


def take_step(family: str, settings: dict, group=None) -> tuple[dict, dict]:
    """Figures and gradients of a step of a small random model on packed documents, one of them across every border.

    group: the processes that share the rows; None: this one alone.
    """
    from dms.training.packed_attention import PackedAttention, check_sharing

    model, teacher = make_models(family, settings)
    batch = make_batch([[37, 50, 5, 4] if settings.get("packed", True) else [92, 4], [96]])
    predictions = int(((batch["segment_ids"] > 0) & batch["loss_mask"]).sum())
    rows = None
    if group is not None:
        rows = PackedAttention(group)
        check_sharing(model, group.size(), 96, model.dms.skipped)
    output = step(model, teacher, batch, predictions, rows)
    output.loss.backward()
    figures = {name: float(getattr(output, name).detach()) for name in ("loss", "kl", "compression", "evicted", "decided")}
    return figures, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(family: str, store: str, out: str, settings: dict) -> None:
    """One process of several."""
    import torch
    import torch.distributed as dist

    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=size)
    figures, gradients = take_step(family, settings, dist.group.WORLD)
    torch.save({"figures": figures, "gradients": gradients}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
