"""Writes Llama models as GGUF files, by the conventions of llama.cpp."""

import json
from collections.abc import Mapping

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def rotated(weight, num_heads):
    """Rows of a query or key projection as llama.cpp rotates them: pairs beside each other instead of half a head apart."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def weights_of(model) -> dict[str, np.ndarray]:
    """A Llama model's weights, in float32, by their names in a GGUF file."""
    config, found = model.config, {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = rotated(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            module, leaf = rest.rsplit(".", 1)
            found[f"blk.{index}.{NAMES[module]}.{leaf}"] = weight
        else:
            found[NAMES[name]] = weight
    return found


def kinds_of(name: str) -> gguf.GGMLQuantizationType:
    """A mixture as files have it."""
    kinds = gguf.GGMLQuantizationType
    if "norm" in name:
        return kinds.F32
    return kinds.Q8_0 if name == "token_embd.weight" else kinds.Q4_1 if "ffn" in name else kinds.F16


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, changes: Mapping) -> None:
    """The vocabulary of a byte-level tokenizer. changes: of what the file says, by key; None leaves it out."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: 3 if token["special"] else 4 for token in model["added_tokens"]}
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [added.get(token, 1) for token in tokens],
        "merges": [" ".join(pair) for pair in model["model"]["merges"]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": False,
    }
    for key, value in (values | dict(changes)).items():
        add(writer, f"tokenizer.ggml.{key}", value)


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    if value is not None:
        kind[type(value)](key, value)


def write(
    path,
    model,
    tokenizer=None,
    *,
    kinds=kinds_of,
    values: Mapping | None = None,
    tensors: Mapping | None = None,
    vocabulary: Mapping | None = None,
):
    """A Llama model as a GGUF file.

    values: added to the header, or in place of what it says (None: left out); vocabulary: the same of the tokenizer, without "tokenizer.ggml.".
    tensors: added, in float32.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    said = {
        "general.name": "a test",
        "general.license": "apache-2.0",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.chat_template": CHAT,
    }
    for key, value in (said | dict(values or {})).items():
        add(writer, key, value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, vocabulary or {})
    for name, weight in weights_of(model).items():
        kind = kinds(name)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path
