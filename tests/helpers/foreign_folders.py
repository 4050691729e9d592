"""DMS checkpoints as other projects write them, of tiny random models, and their rules in a plain forward pass: what imports are held against.

Shapes: T tokens, Hq query heads, H KV heads, G = Hq / H, D head dim, M model dim.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOW = 16
# What the code of theirs would be that must never run.
CODE = "raise SystemExit('the code of a checkpoint ran')\n"


def random_model(family: str, **config):
    """Weights and biases large enough to give logits of a few units, and norms that are not 1."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | config))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def write(folder: Path, model, *, tensors=None, config=None, files=None, card="") -> Path:
    """A plain folder of a model, with more tensors in it, more keys in its configuration, more files, and a card."""
    model.save_pretrained(folder)
    own = load_file(folder / "model.safetensors")
    save_file(own | (tensors or {}), folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text()) | (config or {})
    if "auto_map" in saved:
        del saved["architectures"]
    (folder / "config.json").write_text(json.dumps(saved))
    for name, text in ({"tokenizer_config.json": "{}"} | (files or {})).items():
        (folder / name).write_text(text)
    if card:
        (folder / "README.md").write_text(card)
    return folder


def nvidia_config(**changes):
    auto = {"AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS", "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS"}
    saved = {
        "dms_alpha_scale": 100.0,
        "dms_initial_alpha_offset": 5.0,
        "dms_window_size": WINDOW,
        "dms_paged_attention_block_size": 256,
        "dms_cr": 8,
        "dms_disable_eviction": False,
        "dms_separate_alpha": True,
        "dms_alpha_per": "head",
        "dms_tau": 0.1,
        "dms_manual_inference_mode": False,
        "dms_chunked_prefill": None,
        "dms_preallocate_for_tokens": 4096,
        "auto_map": auto,
    }
    return saved | changes


NVIDIA_CODE = {"configuration_qwen3_dms.py": CODE, "modeling_qwen3_dms.py": CODE}


def adapter_tensors(model, bias: bool = False):
    """NVIDIA's adapter of each layer."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for index in range(model.config.num_hidden_layers):
        name = f"model.layers.{index}.self_attn.dms_proj_alpha"
        tensors[f"{name}.weight"] = 0.05 * torch.randn(2, 64, generator=generator)
        tensors[f"{name}_norm.weight"] = 1 + 0.2 * torch.randn(64, generator=generator)
        if bias:
            tensors[f"{name}.bias"] = 0.1 * torch.randn(2, generator=generator)
    return tensors


def adapter_logits(model, tensors, *, per_layer: bool = False) -> Callable:
    """NVIDIA's rule: the residual before its layer's norm, normed anew -> logits [T, H]."""

    def logits(index, residual_TM, normed_TM, query_TqD):
        name = f"model.layers.{index}.self_attn.dms_proj_alpha"
        rms = residual_TM.square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt()
        found = (residual_TM / rms * tensors[f"{name}_norm.weight"]) @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)
        found = 100.0 * found - 5.0
        return found[:, :1].expand(-1, 2) if per_layer else found

    return logits


def channel_logits(scale: float = 100.0, offset: float = 5.0) -> Callable:
    """The borrowed channel's rule: the last one of each group's first query, after its norm and before rotation."""

    def logits(index, residual_TM, normed_TM, query_TqD):
        return scale * query_TqD[:, ::2, -1] - offset

    return logits


@torch.no_grad()
def plain_forward(model, ids_T, logits_of: Callable | None, *, window: int = WINDOW, alignment: str, zeroed: str = ""):
    """Logits [T, V], decisions [L, T, H] by the token that is ruled, and how many entries are alive at the end, by loops over the formulas.

    logits_of: None evicts nothing. zeroed: where the borrowed channel is 0: "" nowhere, "before" rotation, or "both".
    """
    hidden, T = model.model.embed_tokens(ids_T), len(ids_T)
    rotary = model.model.rotary_emb(hidden[None], torch.arange(T)[None])
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)[None]
    decided, alive = [], 0
    for index, block in enumerate(model.model.layers):
        attention, x = block.self_attn, block.input_layernorm(hidden)
        q, k, v = (proj(x).view(T, -1, 16) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        evicts_TH = torch.zeros(T, 2, dtype=torch.bool) if logits_of is None else logits_of(index, hidden, x, q) > 0
        if alignment == "next":
            # The gate at k + 1 rules k, the first one's rules nothing, and the last token is undecided.
            evicts_TH = torch.cat([evicts_TH[1:], torch.zeros(1, 2, dtype=torch.bool)])
        decided.append(evicts_TH)
        q = q.clone()
        if zeroed:
            q[:, ::2, -1] = 0
        q, k = (y[0] for y in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *rotary))
        if zeroed == "both":
            q = q.clone()
            q[::2, :, -1] = 0
        out = []
        for head in range(4):
            see_TT = (distance_TT >= 0) & ((distance_TT <= window) | ~evicts_TH[None, :, head // 2])
            scores = (q[head] @ k[head // 2].T / 4.0).masked_fill(~see_TT, float("-inf"))
            out.append(scores.softmax(-1) @ v[:, head // 2])
        alive += int(((distance_TT[-1][:, None] <= window) | ~evicts_TH).sum())
        hidden = hidden + attention.o_proj(torch.cat(out, -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden)), torch.stack(decided), alive
