"""Reference vectors: an implementation in numpy, from their page alone, gives the same decisions, visibility, entries and attention."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dms
from dms.export.folder import export
from dms.export.reference_vectors import check_exportable, check_reference_vectors, prompt_lengths, read_reference_vectors
from dms.io import base_models, checkpoint
from dms.io.gates_file import read_gates


@pytest.fixture(scope="module")
def exported(tiny_folder, random_folder, tmp_path_factory, request):
    """`exported(case)`: a folder with reference vectors."""
    made = {}

    def make(case):
        if case in made:
            return made[case]
        root = tmp_path_factory.mktemp(case)
        if case in ("tiny", "lifetimes", "mixed", "following"):
            source = request.getfixturevalue(case)
        elif case == "sinks":
            source = tiny_folder(sinks=3, alignment="next", granularity="layer", scale=4.0, offset=1.0)
        elif case == "all":
            source = tiny_folder(window=(0, 3, 20), sinks=2, alignment="next", granularity="layer")
        elif case == "normalised":
            source = random_folder("olmo2", num_key_value_heads=2)
        elif case == "sink logits":
            layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
            source = random_folder("gpt_oss", num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, **layers)
        else:
            assert case == "capped"
            layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "attn_logit_softcapping": 3.0}
            source = random_folder("gemma2", num_key_value_heads=2, head_dim=16, **layers)
        export(source, root / "out", reference_vectors=True)
        made[case] = root / "out"
        return made[case]

    return make


# The page, in numpy.


def gate(x_TM, weight_OM, bias_O, *, heads, about, normalize):
    """[T, H, K] logits."""
    x = x_TM.astype(np.float64)
    if normalize:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    logits_TO = about["scale"] * (x @ weight_OM.T.astype(np.float64) + bias_O) - about["offset"]
    per_head = logits_TO.reshape(len(x), -1, about["num_windows"])
    return np.repeat(per_head, heads, axis=1) if about["granularity"] == "layer" else per_head


def decide(logits_THK, alignment):
    evict = logits_THK > 0
    if alignment == "next":
        evict = np.concatenate([evict[1:], np.zeros_like(evict[:1])])
    return evict


def sees(evict_THK, windows, sinks):
    """[H, T queries, T keys] bool."""
    T, H, _ = evict_THK.shape
    seen = np.zeros((H, T, T), bool)
    for h in range(H):
        for q in range(T):
            for k in range(q + 1):
                seen[h, q, k] = k < sinks or all(not evict_THK[k, h, j] or q - k <= w for j, w in enumerate(windows))
    return seen


def stored(evict_THK, windows, sinks, h):
    """Yields after each token the keys that the ring and the lists of head h hold."""
    ring, lists = [], {None: [], **{j: [] for j in range(1, len(windows))}}
    for token in range(len(evict_THK)):
        ring.append(token)
        if len(ring) > windows[0] + 1:
            gone = ring.pop(0)
            first = next((j for j in range(len(windows)) if evict_THK[gone, h, j]), None) if gone >= sinks else None
            if first != 0:
                lists[first].append(gone)
        for j in range(1, len(windows)):
            while lists[j] and lists[j][0] + windows[j] < token:
                lists[j].pop(0)
        yield sorted([*ring, *(key for keys in lists.values() for key in keys)])


def attend(query_QHD, key_THD, value_THD, seen_HQT, *, scale, softcap, sink_logits):
    group = query_QHD.shape[1] // key_THD.shape[1]
    out = np.zeros((*query_QHD.shape[:2], value_THD.shape[-1]))
    for i in range(query_QHD.shape[1]):
        keys, values = key_THD[:, i // group].astype(np.float64), value_THD[:, i // group].astype(np.float64)
        scores = scale * query_QHD[:, i].astype(np.float64) @ keys.T
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.where(seen_HQT[i // group], np.exp(scores - scores.max()), 0)
        total = weights.sum(-1, keepdims=True) + (0 if sink_logits is None else np.exp(sink_logits[i] - scores.max()))
        out[:, i] = weights / total @ values
    return out


SLOW = ["tiny", "sinks", "all", "mixed", "following", "normalised", "sink logits", "capped"]


@pytest.mark.parametrize("case", ["lifetimes", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_an_implementation_from_the_page_alone_agrees(case, exported):
    out = exported(case)
    about = json.loads((out / "reference_vectors" / "vectors.json").read_text())
    tensors, gates = load_file(out / "reference_vectors" / "vectors.safetensors"), load_file(out / "gates.safetensors")
    windows, method = about["windows"], about["dms"] | {"num_windows": len(about["windows"])}
    evicted, kept, gone = 0, 0, 0
    for text in about["cases"]:
        for layer in about["layers"]:
            name = f"{text['name']}.layers.{layer['index']}"
            logits = tensors[f"{name}.gate_logits"]
            assert logits.shape == (text["length"], layer["kv_heads"], len(windows)) and logits.dtype == np.float32
            if f"{name}.gate_input" in tensors:
                weight, bias = (gates[f"layers.{layer['index']}.gate.{part}"] for part in ("weight", "bias"))
                found = gate(
                    tensors[f"{name}.gate_input"], weight, bias, heads=layer["kv_heads"], about=method, normalize=layer["normalize"]
                )
                rows = logits[tensors[f"{text['name']}.gate_input_positions"]]
                assert np.abs(found - rows).max() <= about["tolerance"] * np.abs(logits).max()
                assert len(rows) == text["length"] or len(rows) * weight.shape[1] > 2**12
                if len(rows) == text["length"]:
                    # From inputs to visibility without a number of theirs between.
                    logits = found
            evict = decide(logits, method["alignment"])
            assert np.array_equal(evict, tensors[f"{name}.decisions"].astype(bool))
            seen = sees(evict, windows, method["sinks"])
            last = seen.shape[1] - 1 - seen[:, ::-1].argmax(1).T
            assert np.array_equal(last, tensors[f"{name}.visible_until"])
            assert np.array_equal(seen.sum(-1).T, tensors[f"{name}.entries"])
            for h in range(layer["kv_heads"]):
                for token, keys in enumerate(stored(evict, windows, method["sinks"], h)):
                    assert keys == np.flatnonzero(seen[h, token]).tolist()
            evicted, kept, gone = evicted + evict.sum(), kept + (~evict).sum(), gone + (last < len(evict) - 1).sum()
            if (text["name"], layer["index"]) == (about["attention"]["case"], about["attention"]["layer"]):
                positions = tensors["attention.query_positions"]
                given = {part: tensors[f"attention.{part}"] for part in ("query", "key", "value")}
                wanted = tensors["attention.output"]
                options = {part: about["attention"][part] for part in ("scale", "softcap")}
                options["sink_logits"] = tensors.get("attention.sink_logits")
                found = attend(*given.values(), seen[:, positions], **options)
                assert np.abs(found - wanted).max() <= about["tolerance"] * np.abs(wanted).max()
                blind = attend(*given.values(), np.tril(np.ones_like(seen))[:, positions], **options)
                assert np.abs(blind - wanted).max() > 10 * about["tolerance"] * np.abs(wanted).max(), "eviction changes nothing here"
    assert evicted and kept and gone
    assert (about["attention"]["softcap"] is not None) == (case == "capped")
    assert ("attention.sink_logits" in tensors) == (case == "sink logits")
    assert any(layer["normalize"] for layer in about["layers"]) == (case == "normalised")


@pytest.mark.parametrize("case", ["lifetimes", pytest.param("following", marks=pytest.mark.slow)])
def test_logits_and_continuation_are_the_model_s(case, exported):
    out = exported(case)
    about, tensors = read_reference_vectors(out)
    model = dms.load(out, device="cpu")
    for text in about["cases"]:
        name, length = text["name"], text["prompt_length"]
        tokens = tensors[f"{name}.tokens"][None].long()
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(model.generate(tokens[:, :length], **options), tokens)
        with torch.no_grad():
            torch.testing.assert_close(
                model(tokens[:, :length], use_cache=False).logits[0, -1], tensors[f"{name}.logits"], rtol=0, atol=2e-3
            )


def test_the_texts_cross_ring_windows_and_sinks(exported):
    assert list(prompt_lengths(dms.DMSConfig(window=(0, 3, 20), sinks=2), None).values()) == [1, 4, 70]
    assert list(prompt_lengths(dms.DMSConfig(window=2000, sinks=4), None).values()) == [1001, 2006, 2032]
    about, tensors = read_reference_vectors(exported("lifetimes"))
    lengths = [(case["name"], case["prompt_length"], case["length"]) for case in about["cases"]]
    assert lengths == [("short", 3, 19), ("ring", 6, 22), ("long", 88, 104)]
    tokenizer = base_models.load_tokenizer("builtin:tiny")
    for name, length, _ in lengths:
        prompt = set(tensors[f"{name}.tokens"][:length].tolist())
        assert not prompt & set(tokenizer.added_tokens_decoder) and max(prompt) < tokenizer.vocab_size


def test_a_folder_with_vectors_is_an_ordinary_one(exported, tiny, tmp_path):
    out = exported("lifetimes")
    names = {path.name for path in (out / "reference_vectors").iterdir()}
    assert names == {"vectors.safetensors", "vectors.json", "README.md"}
    assert {path.name for path in out.glob("*.safetensors")} == {"gates.safetensors", "model.safetensors"}
    assert sum(path.stat().st_size for path in (out / "reference_vectors").iterdir()) < 8e6
    page = (out / "reference_vectors" / "README.md").read_text()
    assert "`long` (a prompt of 88 tokens, 104 in all)" in page and "{" not in page.replace("layers.{i}.gate", "")
    export(out, tmp_path / "again", format="merged")
    assert not (tmp_path / "again" / "reference_vectors").exists()


@pytest.mark.slow
def test_the_check_finds_what_differs(exported, tmp_path):
    out = exported("tiny")
    differences = check_reference_vectors(out)
    assert set(differences) > {"tokens", "decisions", "visible_until", "entries", "logits", "gate_logits", "gate_input", "output"}
    assert max(differences.values()) < 1e-6
    changed = shutil.copytree(out, tmp_path / "changed")
    path = changed / "reference_vectors" / "vectors.safetensors"
    before = load_file(path)
    layer = json.loads((changed / "reference_vectors" / "vectors.json").read_text())["layers"][1]["index"]
    for name, change, message in (
        (f"long.layers.{layer}.decisions", lambda x: 1 - x, r"decisions differs at \[0, 0, 0\]: \d+ decisions, of logits down to"),
        (f"ring.layers.{layer}.entries", lambda x: x + 1, r"entries differs by 1 at \[0, 0\]: 2 is expected, 1 was computed"),
        ("attention.output", lambda x: x * 1.01, r"attention.output differs by \S+ at \["),
        ("short.logits", lambda x: x[:-1], r"short.logits is torch.float32 \[\d+\], and was computed as torch.float32 \[\d+\]"),
    ):
        save_file(before | {name: change(before[name])}, path)
        with pytest.raises(ValueError, match=message):
            check_reference_vectors(changed)
    save_file({name: tensor for name, tensor in before.items() if name != "attention.key"}, path)
    with pytest.raises(ValueError, match=r"holds other tensors than this model gives: attention\.key"):
        check_reference_vectors(changed)


def test_vectors_of_others_are_refused(exported, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"has no reference_vectors/vectors.json with vectors.safetensors; dms export"):
        check_reference_vectors(tiny)
    changed = shutil.copytree(exported("lifetimes"), tmp_path / "changed")
    path = changed / "reference_vectors" / "vectors.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"gates_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was made with other gates"):
        check_reference_vectors(changed)
    path.write_text(json.dumps(about | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version is 2, and this version of dms reads 1"):
        check_reference_vectors(changed)


def test_models_that_can_have_none_are_refused(tiny, tmp_path):
    for format in ("gates", "nvidia", "hipengine"):
        with pytest.raises(ValueError, match=f"a folder of --format {format} does not hold as dms loads it; choose --format hf or merged"):
            export(tiny, tmp_path / "out", format=format, reference_vectors=True)
    with pytest.raises(ValueError, match=r"computes with packed weights, .* export the gates on the base that was not packed \(--base\)"):
        check_exportable(tiny, read_gates(tiny)[1] | {"base_form": "nf4"})
    for window, context in ((2048, None), (400, 410)):
        with pytest.raises(
            ValueError, match=rf"passes the longest window, {window} tokens, with 16 tokens more, and at most {context or 2048} fit"
        ):
            prompt_lengths(dms.DMSConfig(window=window), context)


@pytest.mark.slow
def test_gates_that_were_not_trained_are_refused_and_leave_nothing(tmp_path):
    model = dms.retrofit(base_models.load_base("builtin:tiny", "float32", "cpu"), dms.DMSConfig(window=8))
    source = checkpoint.save(model, tmp_path / "untrained", base_name="builtin:tiny")
    with pytest.raises(ValueError, match=r"all [\d,]+ decisions of the gates in these texts are to keep, .* train the gates first"):
        export(source, tmp_path / "out", reference_vectors=True)
    assert not (tmp_path / "out").exists()
