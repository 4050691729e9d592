"""`dms analyze`: figures that can be reckoned by hand, what it prints, writes and draws, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dms_train.cli import app
from said import says
from transformers import AutoConfig
from typer.testing import CliRunner

from dms.config import DMSConfig
from dms.costs import analysis_table as table
from dms.costs import hardware, inference
from dms.costs.analysis import analyze
from dms.costs.flops import visible_pairs
from dms.costs.inference import Machine
from dms.costs.kv import KV, entries_seen
from dms.costs.operators import Weight
from dms.costs.roofline import Roofline
from dms.costs.shapes import measure

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
H100 = hardware.load().gpu("h100-80")
ROOF = Roofline.of(H100)


def read(name, num_layers=None):
    """A packaged configuration, with its first layers alone where their number is given."""
    config = AutoConfig.from_pretrained(str(CONFIGS / f"{name}.json"))
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        config.layer_types = config.layer_types[:num_layers]
    return config


@pytest.fixture(scope="module")
def llama():
    return measure(read("Llama-3.1-8B"), DMSConfig())


# Figures by hand. Llama-3.1-8B: 8,030,261,248 parameters, of which an embedding of 128,256 x 4,096 is not read; 32 layers with
# 8 KV heads of 128. Qwen3-8B: 8,190,735,360, 151,936 x 4,096, 36 layers with 8 heads of 128.
BY_HAND = {
    "Llama-3.1-8B": (2 * (8_030_261_248 - 128_255 * 4096), 32 * 8 * 2 * 128 * 2),
    "Qwen3-8B": (2 * (8_190_735_360 - 151_935 * 4096), 36 * 8 * 2 * 128 * 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_where_kv_overtakes_weights(name, capsys):
    weights, entry = BY_HAND[name]
    shape = measure(read(name), DMSConfig())
    found = inference.overtaken_at(shape, KV(), Machine(), 1)
    assert found == -(-weights // entry)
    # Of what is beyond the window an eighth is read, and gates are read too (float32, 8 outputs a layer).
    gates = 4 * len(shape.attentions) * 8 * (4096 + 1)
    evicting = inference.overtaken_at(shape, KV(cr=8), Machine(), 1)
    assert evicting == pytest.approx(257 + 8 * ((weights + gates) / entry - 257), rel=0.001)
    with capsys.disabled():
        print(f"\n{name}: KV overtakes weights at {found:,} tokens, at CR 8 at {evicting:,}")


def test_a_decoding_step(llama):
    weights, entry = BY_HAND["Llama-3.1-8B"]
    step = inference.decode(llama, KV(), Machine(), 1, 32768)
    assert (step.weights, step.kv_read, step.kv_written) == (weights, 32768 * entry, entry)
    # Two FLOPs a matrix number (norms are none), and 4 D for each pair and query head. Rotations take a few products as well.
    norms = 65 * 4096
    assert step.flops == pytest.approx(weights - 2 * norms, rel=1e-4)
    assert step.attention_flops == 4 * 128 * 32 * 32 * 32768
    assert step.seconds(ROOF).total == step.bytes / 3.35e12 and step.binds(ROOF) == "weights"
    assert step.intensity == pytest.approx(1.67, abs=0.01)
    more = inference.decode(llama, KV(), Machine(), 64, 32768)
    assert more.weights == weights + 2 * 63 * 4096 and more.kv_read == 64 * step.kv_read and more.binds(ROOF) == "KV"


def test_a_prompt(llama):
    once = inference.prefill(llama, KV(), Machine(), 1, 8192)
    assert once.attention_flops == 4 * 128 * 32 * 32 * 8192 * 8193 / 2
    # The head is multiplied for the last token alone.
    matrices, head = 8_030_261_248 - 128_256 * 4096 - 65 * 4096, 128_256 * 4096
    assert once.flops == pytest.approx(2 * (8192 * (matrices - head) + head), rel=1e-4)
    assert once.binds(ROOF) == "compute" and once.seconds(ROOF).total == once.all_flops / 989e12
    evicted = inference.prefill(llama, KV(cr=8), Machine(), 1, 8192)
    assert evicted.attention_flops < 0.2 * once.attention_flops and evicted.kv_written < 0.2 * once.kv_written


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "window", "keep"), [(50, 7, 0.0), (50, 0, 0.5), (50, 50, 0.3), (5, 9, 0.5), (1, 0, 1.0), (64, 16, 1.0)])
def test_pairs_by_brute_force(tokens, window, keep, causal):
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    far = torch.where(distance.abs() <= window, 1.0, keep)
    seen = torch.where(distance >= 0, far, 0.0) if causal else far
    assert visible_pairs(tokens, window, keep, causal) == pytest.approx(float(seen.sum(dtype=torch.float64)))


def test_what_fits(llama):
    for kv in (KV(), KV(cr=8), KV(cr=8, dtype="int8"), KV(cr=8, dtype="int4")):
        batch = inference.largest_batch(llama, kv, Machine(), H100.memory, 32768)
        assert inference.held(llama, kv, Machine(), batch, 32768) <= 80e9 < inference.held(llama, kv, Machine(), batch + 1, 32768)
        context = inference.largest_context(llama, kv, Machine(), H100.memory, batch)
        assert inference.held(llama, kv, Machine(), batch, context) <= 80e9 < inference.held(llama, kv, Machine(), batch, context + 1)
        assert context >= 32768
    assert inference.largest_batch(llama, KV(), Machine(), 10e9, 4096) == 0


def test_weights_as_bytes_and_shared_by_gpus(llama):
    one, bytes_, four = (inference.decode(llama, KV(), machine, 8, 8192) for machine in (Machine(), Machine(weight_bits=8), Machine(num=4)))
    assert bytes_.weights == pytest.approx(one.weights / 2, rel=1e-3) and bytes_.all_flops == one.all_flops
    for name, value in vars(one).items():
        assert vars(four)[name] == pytest.approx(value / 4, rel=1e-9), name
    # Eight KV heads on 16 GPUs: two have the same one.
    sixteen = inference.decode(llama, KV(), Machine(num=16), 8, 8192)
    assert sixteen.kv_read == one.kv_read / 8 and sixteen.attention_flops == one.attention_flops / 16


def test_weights_in_4_bits(llama):
    one, four = (inference.decode(llama, KV(), machine, 8, 8192) for machine in (Machine(weight_bits=16), Machine(weight_bits=4)))
    # A 16-bit scale for each 128.
    assert four.weights == pytest.approx(one.weights * (4 + 16 / 128) / 16, rel=2e-3) and four.all_flops == one.all_flops


def test_weights_are_as_the_configuration_packs_them(tmp_path):
    values = json.loads((CONFIGS / "Qwen3-0.6B.json").read_text()) | {"num_hidden_layers": 2}
    config, out = tmp_path / "config.json", tmp_path / "out.json"
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    config.write_text(json.dumps(values | {"quantization_config": settings}))

    def weights_bytes(*options):
        result = run(config, "--json", out, "--context", 4096, *options)
        assert result.exit_code == 0, result.output
        return result.output, json.loads(out.read_text())

    printed, packed = weights_bytes()
    assert says(printed, "of weights at gptq 4-bit, the rest 16 bits") and packed["weight_bits"] == 4
    linear = 2 * (1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072)
    columns = 2 * (1024 * 3 + 2048 + 2 * 1024 + 3072)
    # Half a byte a number, a 16-bit scale and a 4-bit zero for 64 of them, and each column's group; the tied embedding is whole.
    assert packed["weights_bytes"] == linear * (0.5 + 2.5 / 64) + 4 * columns + 2 * (packed["parameters"] - linear)
    _, whole = weights_bytes("--weight-bits", 16)
    assert whole["weights_bytes"] == 2 * packed["parameters"] and whole["weight_bits"] == 16
    config.write_text(json.dumps(values | {"quantization_config": {"quant_method": "hqq"}}))
    result = run(config, "--context", 4096)
    assert "quantised by 'hqq'" in str(result.exception) and "say with --weight-bits how wide the matrices are" in str(result.exception)
    assert weights_bytes("--weight-bits", 4)[1]["weights_bytes"] < whole["weights_bytes"]


def test_experts_are_packed_with_the_kinds_that_pack_them():
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
    }
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 128}
    settings = {"fp8": {"quant_method": "fp8"}, "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    fp8, int8 = (
        measure(AutoConfig.for_model("qwen3_moe", **sizes, quantization_config=one), DMSConfig(window=16)) for one in settings.values()
    )
    experts = 4 * 3 * 128 * 128
    # bitsandbytes packs linear layers, which experts are not. FP8: a byte a number, and a float32 for each block of 128 x 128.
    assert fp8.num_packed - int8.num_packed == experts
    assert sum(weight.packed for weight in fp8.weights if weight.num_experts) == experts + 4 * 3 * 4


def test_layers_that_slide():
    shape = measure(read("gpt-oss-20b", 4), DMSConfig(window=128))
    assert [(layer.window, layer.gated) for layer in shape.attentions[:2]] == [(128, False), (None, True)]
    sliding, full = shape.attentions[:2]
    assert entries_seen(sliding, KV(cr=8, window=128), 4096) == 128 == entries_seen(sliding, KV(), 4096)
    assert entries_seen(full, KV(cr=8, window=128), 4096) == 129 + (4096 - 129) / 8
    # Two matrices of experts a layer, of whose 32 four are read for a token.
    experts = [weight for weight in shape.weights if weight.use == "experts"]
    assert len(experts) == 8 and {(w.num_experts, w.rows / shape.tokens) for w in experts} == {(32, 4.0)}
    one, many = (inference.read_weights(shape, KV(), Machine(), batch) for batch in (1, 64))
    assert one < 0.5 * many and many == pytest.approx(2 * shape.parameters - 2 * 201_088 * 2880, rel=0.01)


def test_state_of_linear_attention():
    """It does not grow, and does not come under eviction."""
    config = AutoConfig.for_model(
        "lfm2", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=99
    )
    config.layer_types = ["conv", "full_attention", "conv"]
    shape = measure(config, DMSConfig())
    assert [layer.layer for layer in shape.attentions] == [1] and shape.inference.state == 2 * 64 * config.conv_L_cache * 2
    short, long = (inference.decode(shape, KV(), Machine(), 4, context) for context in (100, 10_000))
    assert short.state == long.state == 2 * 4 * shape.inference.state and long.kv_read == 100 * short.kv_read


def test_chunks_and_experts_that_are_all_multiplied():
    config = AutoConfig.for_model(
        "llama4_text", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=99
    )
    config.intermediate_size = config.intermediate_size_mlp = 64
    shape = measure(config, DMSConfig())
    assert [(layer.window, layer.gated) for layer in shape.attentions] == [(8192, False)] * 3 + [(None, True)]
    notes = analyze(shape, "h100-80", H100, batches=[1]).notes
    assert any(f"all {config.num_local_experts} experts" in note for note in notes)


def test_a_bound_that_never_comes(llama):
    bounded = replace(llama, attentions=[replace(layer, window=128, gated=False) for layer in llama.attentions])
    assert inference.overtaken_at(bounded, KV(), Machine(), 1) is None
    assert inference.largest_context(bounded, KV(), Machine(), H100.memory, 1) is None


# The command.


def run(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_prints_writes_and_draws(tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = run(CONFIGS / "Llama-3.1-8B.json", "--gpu", "h100-80", "--json", out, "--plot", picture)
    assert result.exit_code == 0, result.output
    for words in (
        "KV reads overtake weight reads at 114,517 tokens (batch 1), 14,315 tokens (batch 8)",
        "ridge point 295 FLOPs a byte",
        "not measured",
    ):
        assert says(result.output, words), result.output
    values = json.loads(out.read_text())
    assert values["name"] == "Llama-3.1-8B" and values["gpu"]["ridge"] == pytest.approx(989 / 3.35)
    # Two phases, dense and four ratios, three KV dtypes, four batches, six contexts.
    assert len(values["points"]) == 2 * 5 * 3 * 4 * 6
    for one in values["points"]:
        parts = [one[f"{name}_bytes"] for name in ("weights", "kv_read", "kv_written", "state", "activations")]
        assert one["bytes"] == pytest.approx(sum(parts))
        assert one["seconds"] == max((one["linear_flops"] + one["attention_flops"]) / 989e12, one["bytes"] / 3.35e12)
    (dense,) = [one for one in values["limits"] if one["policy"] == "dense" and one["kv_dtype"] == "model"]
    assert dense["overtaken_at"]["1"] == 114_517
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 50_000


def test_every_number_of_the_table_is_the_points(llama):
    found = analyze(llama, "h100-80", H100, contexts=[32768], batches=[8], ratios=[8.0])
    lines = table.headlines("it", found)
    dense, evicting = (found.point("decode", kv, 8, 32768).tokens_per_second for kv in (KV(), KV(cr=8)))
    assert f"batch 8 at 32K: at most {dense:,.0f} tokens/s dense, {evicting:,.0f} at CR 8" in "\n".join(lines)
    assert (round(dense), round(evicting)) == (542, 1368)


def test_a_recipe_brings_model_and_window(tmp_path):
    out = tmp_path / "out.json"
    result = run("tiny/retrofit", "--json", out, "--batch", 1)
    assert result.exit_code == 0, result.output
    values = json.loads(out.read_text())
    assert all(one["window"] == [32, 128, 512] for one in values["limits"]) and values["context"] == 2048
    assert {one["context"] for one in values["points"]} == {2048} and says(result.output, "model's own, 2,048 tokens")


def test_a_retrofitted_model_brings_its_window(tmp_path):
    config = read("Qwen3-0.6B", 2).to_dict() | {"dms": DMSConfig(window=77).to_saved()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(tmp_path, "--json", tmp_path / "out.json", "--batch", 1, "--context", 4096)
    assert result.exit_code == 0, result.output
    assert {one["window"] for one in json.loads((tmp_path / "out.json").read_text())["limits"]} == {77}


def test_another_window_leaves_the_rest_as_it_is(tmp_path, monkeypatch):
    saved = DMSConfig(window=77, granularity="layer", alignment="next", sinks=4)
    config = read("Qwen3-0.6B", 2).to_dict() | {"dms": saved.to_saved()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    measured = []
    monkeypatch.setattr(
        "dms_train.analyze_command.measure", lambda values, dms, **options: measured.append(dms) or measure(values, dms, **options)
    )
    result = run(tmp_path, "--batch", 1, "--context", 4096, "--window", 99)
    assert result.exit_code == 0, result.output
    assert measured == [replace(saved, window=99)]


def test_several_windows_of_a_retrofitted_model(tmp_path):
    windows = [64, 512, 2048]
    for name, window in (("one", 64), ("three", windows)):
        config = read("Qwen3-0.6B", 2).to_dict() | {"dms": DMSConfig(window=window).to_saved()}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        result = run(tmp_path / f"{name}.json", "--batch", 1, "--context", 16384, "--cr", 8, "--json", tmp_path / f"{name}.out")
        assert result.exit_code == 0, result.output
    assert says(
        result.output,
        "CR: one token in so many stays for good, the others leave after 64, 512 and 2,048 tokens alike; the last 65 are there",
    )
    one, three = (json.loads((tmp_path / f"{name}.out").read_text()) for name in ("one", "three"))
    assert three["gate_parameters"] == 3 * one["gate_parameters"]
    assert {str(limit["window"]) for limit in three["limits"]} == {str(windows)} and one["limits"][0]["window"] == 64
    held = [
        [
            point["kv_read_bytes"]
            for point in found["points"]
            if (point["phase"], point["cr_decided"], point["kv_dtype"]) == ("decode", 8.0, "model")
        ]
        for found in (one, three)
    ]
    more = 7 / 24 * (448 + 1984)
    assert held[1][0] / held[0][0] == pytest.approx((65 + (16384 - 65) / 8 + more) / (65 + (16384 - 65) / 8), rel=0.03)


def test_an_encoder(tmp_path):
    AutoConfig.for_model("bert").to_json_file(str(tmp_path / "bert.json"), use_diff=False)
    result = run(tmp_path / "bert.json", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert says(result.output, "nothing to decode")
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["encoder"] and {one["phase"] for one in values["points"]} == {"prefill"}
    # All pairs: nobody is hidden from anybody.
    (one,) = [one for one in values["points"] if one["batch"] == 1]
    assert one["attention_flops"] == 4 * 64 * 12 * 12 * 512**2 and one["kv_written_bytes"] == 0


def test_an_encoder_whose_output_has_no_field_for_a_cache():
    config = AutoConfig.for_model("modernbert", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    shape = measure(config, DMSConfig(window=16))
    assert shape.is_encoder and len(shape.attentions) == 2 and shape.inference.decode is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["Qwen3-8B.json", "--gpu", "h10"], ["unknown GPU 'h10'", "did you mean 'h100-80'"]),
        (["Qwen3-8B.json", "--context", "65536"], ["context is 65,536", "40,960"]),
        (["Qwen3-8B.json", "--cr", "1"], ["ratio is 1", "above 1"]),
        (["Qwen3-8B.json", "--kv-dtype", "int5"], ["a KV dtype is 'int5' (did you mean 'int", "model, int8, fp8, int4"]),
        (["Qwen3-8B.json", "--window", "50000"], ["window is 50000", "40960"]),
        (["Qwen3-8B.json", "--weight-bits", "5"], ["--weight-bits is 5; give 16, 8 or 4"]),
        (["Qwen3-8B.json", "--json", "/nowhere/a.json"], ["/nowhere does not exist"]),
        (["nothing.json"], ["nothing.json is not a file"]),
    ],
)
def test_what_is_refused(arguments, parts):
    result = run(CONFIGS / arguments[0], *arguments[1:])
    assert isinstance(result.exception, ValueError), result.output
    for part in parts:
        assert part in str(result.exception)


def test_what_does_not_fit(llama):
    small = replace(H100, memory=7e9)
    with pytest.raises(ValueError, match=r"does not fit 1 x .*: 16\.1 GB of weights.*4 such GPUs would hold it \(--num 4\)"):
        analyze(llama, "small", small)
    assert analyze(llama, "small", small, machine=Machine(num=4), batches=[1]).limits[0].largest_batch[4096] > 0
    with pytest.raises(ValueError, match="64 GPUs, and LlamaForCausalLM has 32 query heads"):
        analyze(llama, "small", small, machine=Machine(num=64))


@pytest.mark.parametrize(
    ("family", "part"), [("t5", "encoder-decoder"), ("mamba2", "no KV cache to analyse"), ("deepseek_v3", "latent attention")]
)
def test_models_that_cannot_be_analysed(family, part):
    with pytest.raises(ValueError, match=part):
        measure(AutoConfig.for_model(family, num_hidden_layers=1), DMSConfig())


def test_what_cannot_evict_says_so():
    config = AutoConfig.for_model("mistral", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config.sliding_window = 512
    shape = measure(config, DMSConfig())
    assert "no layer has full attention" in shape.why_dense
    found = analyze(shape, "h100-80", H100, batches=[1])
    assert {kv.cr for kv in found.caches} == {None} and any("dense only" in note for note in found.notes)
    with pytest.raises(ValueError, match="cannot evict"):
        analyze(shape, "h100-80", H100, ratios=[8.0])


def test_weights_of_a_step_by_use():
    assert inference.experts_met(32, 4, 1) == pytest.approx(4) and inference.experts_met(32, 4, 10_000) == pytest.approx(32)
    shape = measure(read("Qwen3-0.6B", 2), DMSConfig())
    assert all(isinstance(weight, Weight) for weight in shape.weights)
    # Tied: the embedding is the head, and is read in whole.
    assert inference.read_weights(shape, KV(), Machine(), 1) == 2 * shape.parameters
