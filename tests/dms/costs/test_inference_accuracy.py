"""What is reckoned against what real passes do on a CPU: FLOPs counted operator by operator, weights by the modules that ran,
experts by what the router picked, bytes of the cache by the tensors that it holds."""

import os
from dataclasses import replace

# Where AMX is advertised but unusable, a bfloat16 matmul dies with SIGILL; read by oneDNN at its first use.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dms
from dms.cache import CompactedLayer, DMSCache, held_bytes
from dms.config import DMSConfig
from dms.costs import inference, kv, torch_compat
from dms.costs.kv import KV
from dms.costs.operators import grouped_flops
from dms.costs.shapes import measure
from dms.evaluation.engine.entries import count_entries, memory_of_cache
from dms.hf_compat import cache_argument

WITHIN = 0.02
MACHINE = inference.Machine()
_SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256, "vocab_size": 500}
_SMALL |= {"max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": _GQA | {"tie_word_embeddings": False},
    "gemma3_text": _GQA | _SLIDING,
    "mixtral": _GQA | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": _GQA | _SLIDING | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_next": _GQA
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 64},
    "lfm2": _GQA | {"layer_types": ["conv", "full_attention"] * 2},
    "gpt2": {},
    "bert": {},
    "modernbert": {},
}
SLOW = ("mixtral", "gpt_oss", "qwen3_next", "lfm2", "gpt2", "modernbert")


def families(*names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def config_of(family, **changes):
    return AutoConfig.for_model(family, **_SMALL | FAMILIES[family] | changes)


def build(config, attention="eager", headless=False):
    torch.manual_seed(0)
    maker = AutoModel if headless else AutoModelForCausalLM
    return maker.from_config(config, attn_implementation=attention).eval()


def counted_flops(run):
    grouped = {torch_compat.grouped_product(): lambda *a, out_shape=None, **k: grouped_flops(*a)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        run()
    return counter.get_total_flops()


def tell(capsys, what, reckoned, counted):
    with capsys.disabled():
        print(f"\n{what}: reckoned {reckoned:.6g}, counted {counted:.6g}, {reckoned / counted - 1:+.2%}")
    assert reckoned == pytest.approx(counted, rel=WITHIN)


def with_all_pairs(shape):
    """As eager attention computes: every query by every key, and what nobody sees is masked."""
    return replace(shape, attentions=[replace(layer, causal=False, window=None) for layer in shape.attentions])


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_flops_of_a_prompt(family, capsys):
    config, B, T = config_of(family), 2, 512
    shape = measure(config, DMSConfig(window=16))
    model = build(config, headless=shape.is_encoder)
    ids = torch.randint(3, 500, (B, T))
    options = {} if shape.is_encoder else {"logits_to_keep": 1}
    counted = counted_flops(lambda: model(input_ids=ids, **options))
    tell(capsys, f"{family}, FLOPs of a prompt", inference.prefill(with_all_pairs(shape), KV(), MACHINE, B, T).all_flops, counted)


@pytest.mark.parametrize("family", families(*[name for name in FAMILIES if "bert" not in name]))
def test_flops_of_a_decoding_step(family, capsys):
    config, B, T = config_of(family), 3, 257
    shape, model = measure(config, DMSConfig(window=16)), build(config)
    ids = torch.randint(3, 500, (B, T))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    counted = counted_flops(lambda: model(input_ids=ids[:, -1:], past_key_values=cache))
    tell(capsys, f"{family}, FLOPs of a step", inference.decode(shape, KV(), MACHINE, B, T).all_flops, counted)


@pytest.mark.parametrize("num_heads", [8, 2, 1])
def test_bytes_of_a_dense_cache(num_heads):
    """Multi-head, grouped, multi-query; a sliding layer beside a full one."""
    config = config_of("gemma3_text", num_key_value_heads=num_heads)
    shape, model = measure(config, DMSConfig(window=16)), build(config).bfloat16()
    with torch.no_grad():
        cache = model(input_ids=torch.randint(3, 500, (2, 300)), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert sum(2 * layer.num_heads * kv.held_bytes(layer, KV(), 300) for layer in shape.attentions) == held


# Weights.


def ran(model, run):
    """Parameters of the modules that ran, as {id: parameter}; of those that only their parents use as well."""
    used, hooks = {}, []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            hooks.append(module.register_forward_hook(lambda *_, own=own: used.update({id(p): p for p in own})))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return used


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), *((name, True) for name in ("gemma3_text", "gpt2"))])
def test_weights_that_a_step_reads(family, tied, capsys):
    config, B = config_of(family, tie_word_embeddings=tied), 3
    shape, model = measure(config, DMSConfig(window=16)), build(config)
    used = ran(model, lambda: model(input_ids=torch.randint(3, 500, (B, 1))))
    gathered = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if tied:
        # The head reads all of it.
        del gathered[id(model.get_output_embeddings().weight)]
    whole = sum(p.numel() for key, p in used.items() if key not in gathered)
    rows = sum(B * p.shape[1] for p in gathered.values())
    tell(capsys, f"{family}, weights of a step", inference.read_weights(shape, KV(), MACHINE, B), 2 * (whole + rows))
    assert inference.resident_weights(shape, KV(), MACHINE) == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("batch", [8, 64])
def test_experts_that_a_step_reads(batch, capsys):
    """Distinct ones that the router picks in real forwards, layer by layer."""
    config = AutoConfig.for_model(
        "qwen3_moe", **_SMALL | _GQA | {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "vocab_size": 8000}
    )
    shape, model = measure(config, DMSConfig(window=16)), build(config)
    experts = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
    # Tokens in all directions alike and experts at right angles: none is picked more often than another, as is assumed.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=5.0)
    for router in (m for m in model.modules() if type(m).__name__.endswith("Router")):
        torch.nn.init.orthogonal_(router.weight)
    met = []
    hooks = [m.register_forward_pre_hook(lambda _, args: met.append(len(args[1].unique()))) for m in experts]
    num_steps = max(4, 240 // batch)
    with torch.no_grad():
        for _ in range(num_steps):
            model(input_ids=torch.randint(3, config.vocab_size, (batch, 1)))
    for hook in hooks:
        hook.remove()
    assert len(met) == num_steps * config.num_hidden_layers == num_steps * len(experts)
    size = sum(p.numel() for p in experts[0].parameters()) / config.num_experts
    others = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name) - config.vocab_size * config.hidden_size
    counted = 2 * (others + batch * config.hidden_size + size * config.num_hidden_layers * sum(met) / len(met))
    tell(capsys, f"experts of a step of {batch}", inference.experts_met(32, 4, batch), sum(met) / len(met))
    tell(capsys, f"weights of a step of {batch}", inference.read_weights(shape, KV(), MACHINE, batch), counted)


# Evicting.


def evicting(config, share, window=32, dtype=torch.float32):
    """A model whose random gates evict about that share."""
    model = dms.retrofit(build(config, "sdpa"), DMSConfig(window=window))
    generator = torch.Generator().manual_seed(1)
    for layer in model.dms.layers:
        gate = layer.module.dms_gate
        with torch.no_grad():
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / config.hidden_size**0.5)
    model = model.to(dtype)
    dms.set_mode(model, "evict")
    # Logits are about normal, 100 wide: where the share lies.
    model.dms.evict_bias = 5.0 + 100.0 * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(share)))
    return model


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 0.75, pytest.param(0.875, marks=pytest.mark.slow)])
def test_pairs_of_a_prompt(share, capsys):
    """By brute force from what the gates decided: a key is computed with where it is in the window or was kept."""
    config, T, w = config_of("llama"), 2048, 32
    model = evicting(config, share, w)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 500, (1, T)), use_cache=False)
    evicted = model.dms.forward.evicted
    distance = torch.arange(T)[:, None] - torch.arange(T)
    counted = num_evicted = num_heads = 0
    for evicted_BTH in evicted.values():
        for evicted_T in evicted_BTH[0].T:
            counted += int(((distance >= 0) & ((distance <= w) | ~evicted_T)).sum())
            num_evicted, num_heads = num_evicted + int(evicted_T.sum()), num_heads + 1
    ratio = 1 / (1 - num_evicted / (num_heads * T))
    assert ratio > 1.5
    layer = measure(config, DMSConfig(window=w)).attentions[0]
    tell(capsys, f"pairs at CR {ratio:.2f}", num_heads * kv.prompt_pairs(layer, KV(cr=ratio, window=w), T), counted)


def _kv_dtypes(*slow):
    """What pages may hold. Those that the cache does not take yet are expected to be refused, and run as soon as it takes them."""

    def refused(name):
        try:
            CompactedLayer(DMSConfig(window=16), kv_dtype=name)
        except ValueError:
            return True
        return False

    def marks(name):
        waits = pytest.mark.xfail(refused(name), reason=f"the cache has no pages of {name} yet", raises=ValueError, strict=True)
        return [waits, pytest.mark.slow] if name in slow else [waits]

    return [pytest.param(name, marks=marks(name)) for name in (None, "int8", "fp8", "int4")]


def _tensors(layer):
    return layer.held_tensors() if isinstance(layer, CompactedLayer) else [layer.keys, layer.values]


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_dtype", _kv_dtypes("fp8"))
@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), pytest.param(0.75, marks=pytest.mark.slow), 0.875])
def test_bytes_of_an_evicting_cache(family, kv_dtype, share, capsys):
    """Rings, pages, tables and counts, after a real prefill. (Until the first step transformers' sliding layers are views of the whole
    prompt's keys; what is seen of them is counted.)"""
    config, B, T, w = config_of(family, head_dim=64), 2, 4096, 64
    model = evicting(config, share, w, torch.bfloat16)
    cache = DMSCache(model, kv_dtype=kv_dtype)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 500, (B, T)), past_key_values=cache, logits_to_keep=1)
    report = cache.report(warn=False)
    if family == "llama":
        held = held_bytes(cache)
    else:
        held = sum(x.nbytes for layer in cache.layers for x in _tensors(layer))
    shape = measure(config, DMSConfig(window=w))
    chosen = KV(cr=report.cr_decided, dtype=kv_dtype or "model", window=w)
    reckoned = B * (inference.sequence_bytes(shape, chosen, MACHINE, T) - 2 * shape.inference.decode.numbers / len(shape.attentions))
    tell(capsys, f"{family}, {kv_dtype}, CR {report.cr_decided:.2f}: bytes held", reckoned, held)
    alive = sum(int(layer.entries_alive().sum()) for layer in cache.compacted_layers().values())
    entries = sum(B * layer.num_heads * kv.entries_seen(layer, chosen, T) for layer in shape.attentions if layer.gated)
    tell(capsys, "entries alive", entries, alive)
    # What a step reads is what is alive, and no page's empty half.
    read = sum(B * layer.num_heads * kv.read_bytes(layer, chosen, T) for layer in shape.attentions)
    plain = sum(layer.num_heads * B * 4 * 64 for layer in shape.attentions if not layer.gated)
    tell(capsys, "bytes read", read, report.bytes_alive + plain)


def with_lifetimes(config, lifetimes, dtype):
    """A model whose gates draw the class of each token and head by these shares."""
    model = dms.retrofit(build(config, "sdpa"), DMSConfig(window=lifetimes.windows)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    shares = torch.tensor([lifetimes.stay, *lifetimes.leave])

    def draw(gate, args, logits_BTHK):
        # Class 0 stays: no decision evicts it.
        class_BTH = torch.multinomial(shares, logits_BTHK[..., 0].numel(), True, generator=generator).view(logits_BTHK.shape[:3])
        return torch.stack([(class_BTH == j + 1).float() * 2 - 1 for j in range(len(lifetimes.windows))], -1)

    for layer in model.dms.layers:
        layer.gate.register_forward_hook(draw)
    dms.set_mode(model, "evict")
    return model


@pytest.mark.parametrize("kv_dtype", _kv_dtypes("int8", "fp8"))
def test_entries_and_bytes_of_several_windows(kv_dtype, capsys):
    config, B, T = config_of("llama", head_dim=64), 1, 2048
    chosen = KV(cr=8.0, dtype=kv_dtype or "model", window=(64, 192, 512), page_size=16)
    model = with_lifetimes(config, chosen.lifetimes, torch.bfloat16)
    shape = measure(config, DMSConfig(window=chosen.windows))
    assert shape.gates == sum(p.numel() for layer in model.dms.layers for p in layer.gate.parameters())
    model.dms.kv_dtype, model.dms.page_size = kv_dtype, 16
    cache = DMSCache(model)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 500, (B, T)), use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    alive = int(count_entries(model, cache)[0].sum())
    entries = sum(B * layer.num_heads * kv.entries_seen(layer, chosen, T) for layer in shape.attentions)
    tell(capsys, "entries alive", entries, alive)
    if memory_of_cache(cache) == "compacted":
        reckoned = B * (inference.sequence_bytes(shape, chosen, MACHINE, T) - 2 * shape.inference.decode.numbers / len(shape.attentions))
        tell(capsys, f"{kv_dtype}, bytes held", reckoned, held_bytes(cache))


@pytest.mark.parametrize("share", [0.5, 0.875])
def test_flops_of_an_evicting_step(share, capsys):
    config, B, T, w = config_of("llama"), 2, 1024, 32
    model = evicting(config, share, w)
    ids = torch.randint(3, 500, (B, T))
    # The reference multiplies last pages in whole: small ones, of which little is empty.
    cache = DMSCache(model, page_size=16)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    counted = counted_flops(lambda: model(input_ids=ids[:, -1:], past_key_values=cache))
    chosen = KV(cr=cache.report().cr_decided, window=w)
    tell(
        capsys,
        f"FLOPs of a step at CR {chosen.cr:.2f}",
        inference.decode(measure(config, DMSConfig(window=w)), chosen, MACHINE, B, T).all_flops,
        counted,
    )
