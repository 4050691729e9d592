"""`dms export --reference-vectors`: what goes into gates and cache, and what must come out, for those who implement them in an engine.

The masked reference of evict mode (arXiv 2506.05345 section 3.1) reads texts of random tokens in float32, and a compacted cache must agree with
it. `dms/export/specification.py` says what the tensors mean, and how each follows from the others.

Shapes: T tokens of a text, H KV heads, Hq query heads, K windows, D head dim, M model dim, V vocabulary, S sampled tokens, Q queries.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import dms
from dms import hf_compat, masks
from dms.attention import evict_attention, evict_pass, scale_of
from dms.cache import DMSCache
from dms.config import DMSConfig
from dms.export.specification import specification
from dms.io import base_models, checkpoint
from dms.io.gates_file import read_config, read_gates
from dms.io.quantization import is_packed
from dms.io.weights import GATES_FILE, save_tensors, sha256
from dms.layer_discovery import AttentionLayer
from dms.modes import reading, state_of

FOLDER = "reference_vectors"
TENSORS_FILE, DESCRIPTION_FILE = "vectors.safetensors", "vectors.json"
FORMAT = 1
# Greedily, after each prompt.
CONTINUATION = 16
# Of the longest text, which all windows must fit in: its logits are computed at once.
MAX_TOKENS = 2048
MAX_BYTES = 64 * 2**20
# The inputs of all gates together; as many tokens of the longest text as that holds.
_GATE_INPUT_BYTES = 4 * 2**20
# Tokens of the longest prompt that are gone for its last one, whatever their window.
_BEYOND = 48
_SEED = 20250605
# Of the largest absolute value in a tensor: what another machine's order of summation may change.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Case:
    """A prompt with its continuation, as the reference read it."""

    ids_T: torch.Tensor
    logits_TV: torch.Tensor
    gate_input: dict[int, torch.Tensor]
    """By layer, as the next two: [T, M], what its gate read."""
    gate_logits: dict[int, torch.Tensor]
    """[T, H, K]."""
    evicted: dict[int, torch.Tensor]
    """[T, H, K] bool, aligned to the token that they are for."""
    attention: dict[str, Any]
    """Of the layer that was asked for: query, key, value, output, and what else attention was given."""


def prompt_lengths(config: DMSConfig, context: int | None) -> dict[str, int]:
    """Tokens of each prompt: "short" ends within the ring, at the last token of "ring" the first one is gone, "long" passes every window.

    context: the model's, in tokens; None: it has no limit.

    Raises:
        ValueError: windows that do not fit into the context, or into MAX_TOKENS.
    """
    first, last = config.windows[0], config.windows[-1]
    room = MAX_TOKENS if context is None else min(context, MAX_TOKENS)
    beyond = min(_BEYOND, room - CONTINUATION - last - config.sinks)
    if beyond < 2:
        raise ValueError(
            f"reference vectors need a text that passes the longest window, {last} tokens, with {CONTINUATION} tokens more, and at most {room} "
            f"fit here (the model's context is {context}, and vectors end at {MAX_TOKENS}); save the model with shorter windows (dms.load(..., window=...)) and export that"
        )
    return {"short": first // 2 + 1, "ring": config.sinks + first + 2, "long": config.sinks + last + beyond}


def check_exportable(model: str | Path, metadata: Mapping[str, str]) -> None:
    """Raises ValueError where a model folder can have no reference vectors, before anything is computed. metadata: of its gates file."""
    config = base_models.load_config(str(model))
    if is_packed(config) or metadata.get("base_form"):
        raise ValueError(
            f"{model} computes with packed weights, whose rounding is their kernels'; reference vectors are for plain weights: export the gates "
            "on the base that was not packed (--base), or leave out --reference-vectors"
        )
    dms_config = read_config(metadata, getattr(config, "dms", None), Path(model))
    if dms_config.is_borrowed:
        raise ValueError(
            f"{model} has gates that are channels of the queries ({dms_config.gate}), and reference vectors describe linear ones; leave out "
            "--reference-vectors"
        )
    prompt_lengths(dms_config, getattr(config.get_text_config(), "max_position_embeddings", None))


def write_reference_vectors(folder: str | Path) -> list[Path]:
    """Write reference vectors into an exported model folder, as `reference_vectors/`; computed on the CPU. Returns the files.

    Raises:
        ValueError: a model without gates, packed weights, windows that do not fit, gates that evict nothing or everything, or more than
            MAX_BYTES of vectors.
    """
    folder = Path(folder)
    check_exportable(folder, read_gates(folder)[1])
    model = checkpoint.load(folder, dtype="float32", device="cpu")
    state = state_of(model)
    lengths = prompt_lengths(state.config, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    ids = _ordinary_ids(model, folder)
    prompts = {}
    for number, (name, length) in enumerate(lengths.items()):
        generator = torch.Generator().manual_seed(_SEED + number)
        prompts[name] = ids[torch.randint(len(ids), (length,), generator=generator)]
    tensors, description = compute(model, prompts)
    description = {"format_version": FORMAT, "dms_version": dms.__version__, "gates_sha256": sha256(folder / GATES_FILE)} | description
    out = folder / FOLDER
    out.mkdir()
    written = [save_tensors(tensors, out / TENSORS_FILE), out / DESCRIPTION_FILE, out / "README.md"]
    written[1].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    written[2].write_text(specification(description), encoding="utf-8")
    return written


def check_reference_vectors(folder: str | Path) -> dict[str, float]:
    """Compute a folder's reference vectors again, from its prompts, and compare: whole numbers exactly, others within TOLERANCE.

    Returns the largest difference of each kind of tensor, such as {"gate_logits": 3e-6}.

    Raises:
        ValueError: none there, damaged ones, those of other gates or of another format, or the first tensor that differs.
    """
    folder = Path(folder)
    description, expected = read_reference_vectors(folder)
    if description["gates_sha256"] != sha256(folder / GATES_FILE):
        raise ValueError(f"{folder / FOLDER} was made with other gates than {folder / GATES_FILE}; write it again with --reference-vectors")
    model = checkpoint.load(folder, dtype="float32", device="cpu")
    prompts = {case["name"]: expected[f"{case['name']}.tokens"][: case["prompt_length"]].long() for case in description["cases"]}
    found, _ = compute(model, prompts)
    if missing := sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{folder / FOLDER} holds other tensors than this model gives: {', '.join(missing[:4])}")
    differences: dict[str, float] = {}
    for name, tensor in expected.items():
        difference = _difference(name, tensor, found[name], expected)
        kind = name.rpartition(".")[2]
        differences[kind] = max(differences.get(kind, 0.0), difference)
    return differences


def read_reference_vectors(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors that lie in a model folder.

    Raises:
        ValueError: none there, a damaged file, or another format.
    """
    out = Path(folder, FOLDER)
    if not (out / DESCRIPTION_FILE).is_file() or not (out / TENSORS_FILE).is_file():
        raise ValueError(f"{folder} has no {FOLDER}/{DESCRIPTION_FILE} with {TENSORS_FILE}; dms export ... --reference-vectors writes them")
    description = json.loads((out / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    if description.get("format_version") != FORMAT:
        raise ValueError(f"{out}: format_version is {description.get('format_version')!r}, and this version of dms reads {FORMAT}")
    try:
        with safe_open(str(out / TENSORS_FILE), framework="pt") as f:
            return description, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{out / TENSORS_FILE} is damaged: {error}") from error


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor, all_expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of two tensors; raises ValueError where it is too large."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        raise ValueError(f"{name} is {expected.dtype} {list(expected.shape)}, and was computed as {found.dtype} {list(found.shape)}")
    apart = (expected.double() - found.double()).abs()
    largest = float(apart.max()) if apart.numel() else 0.0
    if not largest:
        return 0.0
    place = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    if name.endswith(".decisions"):
        logit = float(all_expected[name.removesuffix("decisions") + "gate_logits"].abs()[apart > 0].min())
        raise ValueError(
            f"{name} differs at {list(place)}: {int((apart > 0).sum())} decisions, of logits down to {logit:.2g} (beside 0 a logit may fall either way "
            "on another machine)"
        )
    if not expected.is_floating_point() or largest > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{name} differs by {largest:.3g} at {list(place)}: {expected[place].item()} is expected, {found[place].item()} was computed"
        )
    return largest


def _ordinary_ids(model: Any, folder: Path) -> torch.Tensor:
    """The token ids of ordinary text: no special, added or padding ones, and none that stand for images."""
    num_ids = model.get_input_embeddings().weight.shape[0]
    special = _named_ids(model.config.to_dict())
    # Where there are no files, some families would get an empty tokenizer.
    if any(folder.glob("tokenizer*")):
        tokenizer = base_models.load_tokenizer(str(folder))
        special |= set(tokenizer.added_tokens_decoder)
        num_ids = min(num_ids, tokenizer.vocab_size)
    return torch.tensor([id for id in range(num_ids) if id not in special])


def _named_ids(config: Mapping[Any, Any]) -> set[int]:
    """The ids that a configuration names, such as eos_token_id and image_token_index."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _named_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            found |= {id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)}
    return found


@torch.no_grad()
def compute(model: Any, prompts: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, and what describes them, of a retrofitted float32 model in evict mode.

    prompts: by name, int64 [P]; the last one's attention and gate inputs are recorded too.

    Raises:
        ValueError: gates that evict nothing, or everything, or too many bytes.
        RuntimeError: the compacted cache chooses other tokens than the masked reference.
    """
    state = state_of(model)
    tensors: dict[str, torch.Tensor] = {}
    cases = []
    *_, longest = prompts
    for name, prompt in prompts.items():
        with reading(model, len(prompt) + CONTINUATION):
            ids, entries = _continue(model, prompt)
            case = _read(model, ids)
            _check_continuation(name, case, len(prompt))
            if name == longest:
                layer = _most_mixed(case, state.layers)
                case = _read(model, ids, layer)
        tensors |= {f"{name}.tokens": ids.int(), f"{name}.logits": case.logits_TV[len(prompt) - 1].clone()}
        for index in case.gate_logits:
            tensors |= {f"{name}.layers.{index}.{kind}": tensor for kind, tensor in _decided(case, index, state.config).items()}
            # The compacted cache holds what the mask shows.
            assert index not in entries or torch.equal(entries[index], tensors[f"{name}.layers.{index}.entries"][-1])
        cases.append({"name": name, "prompt_length": len(prompt), "length": len(ids)})
    decisions = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith(".decisions")])
    if decisions.min() == decisions.max():
        raise ValueError(
            f"all {decisions.numel():,} decisions of the gates in these texts are to {'evict' if decisions.any() else 'keep'}, and reference vectors "
            "of them would test nothing; train the gates first"
        )
    tensors |= _gate_inputs(longest, case) | _attention(case, len(prompts[longest]))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_BYTES:
        raise ValueError(
            f"reference vectors of {type(model).__name__} take {size / 2**20:,.0f} MiB, and at most {MAX_BYTES // 2**20} are written: "
            f"{cases[-1]['length']} tokens in {len(state.layers)} layers; save the model with shorter windows (dms.load(..., window=...)) and export that"
        )
    attention = {"case": longest, "layer": layer.index} | {name: case.attention[name] for name in ("scale", "softcap")}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return tensors, _describe(model, tensors, {"cases": cases, "attention": attention})


def _describe(model: Any, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in vectors.json. texts: the cases, and which attention was recorded."""
    state = state_of(model)
    logits = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith(".gate_logits")])
    return {
        "model": type(model).__name__,
        "dms": state.config.to_saved(),
        "windows": list(state.config.windows),
        **texts,
        "layers": [
            {"index": layer.index, "kv_heads": layer.num_heads, "query_heads": layer.num_query_heads, "normalize": layer.gate.normalize}
            for layer in state.layers
        ],
        "smallest_gate_logit": float(logits.abs().min()),
        "tolerance": TOLERANCE,
        "tensors": {name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors.items()},
    }


def _continue(model: Any, prompt_P: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Read a prompt, choose CONTINUATION tokens greedily, and read them: all ids, and by layer the entries that a compacted cache then holds,
    [H]; none where the model takes no cache that it did not make."""
    ids = prompt_P
    if not state_of(model).takes_cache:
        for _ in range(CONTINUATION):
            ids = torch.cat([ids, model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
        return ids, {}
    cache = DMSCache(model)
    new = prompt_P
    while True:
        logits = model(input_ids=new[None], use_cache=True, **hf_compat.cache_argument(model, cache)).logits
        if len(ids) == len(prompt_P) + CONTINUATION:
            return ids, {index: layer.entries_alive()[0].int() for index, layer in cache.compacted_layers().items()}
        new = logits[0, -1:].argmax(-1)
        ids = torch.cat([ids, new])


def _read(model: Any, ids_T: torch.Tensor, layer: AttentionLayer | None = None) -> _Case:
    """Read a text without a cache. layer: whose attention is recorded."""
    state = state_of(model)
    gate_input: dict[int, torch.Tensor] = {}
    recorded: dict[str, Any] = {}

    def note(query, key, value, **options):
        out = evict_attention(query, key, value, **options)
        # Layers that follow the one asked for come to its decisions later.
        if layer is not None and not recorded and options["evicted_BSH"] is evict_pass(model).evicted.get(layer.index):
            recorded.update(query=query[0], key=key[0], value=value[0], output=out[0], sink_logits=options.get("s_aux"))
            recorded.update(scale=scale_of(options.get("scaling"), query), softcap=options.get("softcap"))
        return out

    def keep_input(index: int):
        return lambda _, args: gate_input.update({index: args[0][0].float()})

    hooks = [one.gate.register_forward_pre_hook(keep_input(one.index)) for one in state.layers]
    before, state.masked_attention = state.masked_attention, note
    try:
        logits = model(input_ids=ids_T[None], use_cache=False).logits
    finally:
        state.masked_attention = before
        for hook in hooks:
            hook.remove()
    forward = evict_pass(model)
    several = len(state.config.windows) > 1
    gate_logits, evicted = (
        {index: (tensor[0] if several else tensor[0, ..., None]).contiguous() for index, tensor in found.items()}
        for found in (forward.logits, forward.evicted)
    )
    return _Case(ids_T, logits[0].float(), gate_input, gate_logits, evicted, recorded)


def _check_continuation(name: str, case: _Case, prompt_length: int) -> None:
    chosen = case.logits_TV[prompt_length - 1 : -1].argmax(-1)
    if not torch.equal(chosen, case.ids_T[prompt_length:]):
        place = int((chosen != case.ids_T[prompt_length:]).nonzero()[0])
        raise RuntimeError(
            f"after {place} tokens of the prompt {name!r} the compacted cache goes on with {int(case.ids_T[prompt_length + place])} and the masked "
            f"reference with {int(chosen[place])}: either two logits are equal within rounding, or one of the two is wrong on this machine"
        )


def _most_mixed(case: _Case, layers: list[AttentionLayer]) -> AttentionLayer:
    """The layer whose gates evict closest to half of the tokens."""
    return min(layers, key=lambda layer: abs(float(case.evicted[layer.index].float().mean()) - 0.5))


def _decided(case: _Case, index: int, config: DMSConfig) -> dict[str, torch.Tensor]:
    """What follows from a layer's gate: logits, decisions, until when each key is visible, and how many entries there are."""
    evicted = case.evicted[index]
    tokens = masks.locate_tokens(1, len(evicted), evicted.device, None, None, None)
    given = evicted[None] if len(config.windows) > 1 else evicted[None, ..., 0]
    rules: dict[str, Any] = {"window": config.window, "sinks": config.sinks}
    position_T1 = tokens.position_BT[0][:, None].long()
    return {
        "gate_logits": case.gate_logits[index],
        "decisions": evicted.to(torch.uint8),
        "visible_until": (position_T1 + masks.alive_steps(tokens, given, **rules)[0] - 1).int(),
        "entries": masks.visible(tokens, tokens, given, **rules)[0].sum(-1).T.int(),
    }


def _gate_inputs(name: str, case: _Case) -> dict[str, torch.Tensor]:
    """What the gates of a text read, at as many of its tokens as fit, spread evenly."""
    length = len(case.ids_T)
    row_bytes = sum(tensor[0].nbytes for tensor in case.gate_input.values())
    count = max(1, min(length, _GATE_INPUT_BYTES // row_bytes))
    sampled = torch.arange(count) * length // count
    inputs = {f"{name}.layers.{index}.gate_input": tensor[sampled] for index, tensor in case.gate_input.items()}
    return {f"{name}.gate_input_positions": sampled.int()} | inputs


def _attention(case: _Case, prompt_length: int) -> dict[str, torch.Tensor]:
    """The attention of the recorded layer for the prompt's last token and the continuation."""
    found, queries = case.attention, slice(prompt_length - 1, None)
    tensors = {
        "query_positions": torch.arange(len(case.ids_T))[queries].int(),
        "query": found["query"].transpose(0, 1)[queries],
        "key": found["key"].transpose(0, 1),
        "value": found["value"].transpose(0, 1),
        "output": found["output"][queries],
    }
    if found["sink_logits"] is not None:
        tensors["sink_logits"] = found["sink_logits"].detach().float().flatten()
    return {f"attention.{name}": tensor.clone() for name, tensor in tensors.items()}
