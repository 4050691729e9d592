"""The page beside reference vectors: what gates and cache are to compute, in formulas, and what each tensor holds."""

from collections.abc import Mapping
from typing import Any

_TEXT = """# Reference vectors of {model} with gates

For whoever implements learned KV-cache eviction (Dynamic Memory Sparsification, arXiv 2506.05345) in an inference engine: what goes into gates, cache
and attention, and what must come out. `vectors.safetensors` holds the tensors, `vectors.json` their shapes and these numbers. All was computed in
float32 on a CPU. The gates' weights are in `../gates.safetensors`, the model's in the folder above.

| | |
|---|---|
| windows w_1 < ... < w_K | {windows} |
| sinks | {sinks} |
| alignment | `{alignment}` |
| granularity | `{granularity}` |
| scale, offset | {scale}, {offset} |
| layers with gates | {layers} |
| texts | {cases} |

Letters: T tokens of a text, H KV heads, Hq query heads (head i reads KV head i // (Hq / H)), K windows, D head dim, M model dim, V vocabulary. Positions
count from 0 within a text.

## 1. Gate

Each layer with a gate has `layers.{{i}}.gate.weight` [O, M] and `.bias` [O], float32. `x` [T, M] is what the layer's attention reads, that is the hidden
states after the norm before attention, in float32 whatever the model computes in. Where `normalize` is true in `vectors.json` (models without such a
norm), first `x = x / sqrt(mean(x^2) + 1e-6)`, over M.

    logit[t, o] = scale * (x[t] . weight[o] + bias[o]) - offset

With granularity `head` O = H * K, and the logit of head h and window j (from 0) is `o = h * K + j`. With `layer` O = K: all heads have the logits of
`o = j`. -> `gate_logits` [T, H, K], from `gate_input`.

## 2. Decision

    evict[t, h, j] = logit[s, h, j] > 0

With alignment `own` s = t: a token's own gate decides for it. With `next` s = t + 1: the gate of the token after it does, and the last token of a text is
not decided yet, which counts as not evicted. -> `decisions` [T, H, K], by the token that they are for; 1 is evict. A decision is taken once and never
changes.

## 3. Visibility

Key k is visible to query q of the same text, in KV head h, if and only if

    k <= q and (k < sinks or, for every j: not evict[k, h, j] or q - k <= w[j])

-> `visible_until` [T, H]: the last query of this text that sees the key (it is visible to all queries from its own to that one), and `entries` [T, H]:
how many keys query q sees, which is how many entries a cache must hold once it has stored token q. The same holds in prefill and in decode.

## 4. Attention

Softmax over the visible keys of `scale_of_attention * q . k` (`attention.scale` in `vectors.json`), with scores capped to `c * tanh(score / c)` first where
`softcap` c is given, and with `exp(sink_logits[i])` added to the denominator of query head i where there are sink logits. Keys are the rotated ones, by the
positions in the text: what was evicted leaves no gap that is closed. -> `attention.output` [Q, Hq, D], before the output projection, from
`attention.query` [Q, Hq, D] at `attention.query_positions`, `attention.key` and `attention.value` [T, H, D], of layer {attention_layer} in the text
`{attention_case}`.

## 5. A cache that holds no more

One way to hold just the visible keys, with one physical length for each layer and KV head:

- a ring of the last w_1 + 1 tokens, the same for all heads, with each token's decisions (with `next` the newest one's come with its successor);
- when a token leaves the ring it is appended to a list of its head unless it is gone: with one window if it is kept, or one of the sinks; with
  several to the list of its lifetime, which is the first j that evicts it, and for good if none does. What the first window evicts is dropped;
- lists of finite lifetime are freed from the front: entry k leaves after query k + w_j. Pages per head make that cheap;
- attention reads ring and lists. Their order does not matter, since keys carry their rotation.

## 6. Tensors

| name | shape | dtype | |
|---|---|---|---|
| `CASE.tokens` | [T] | int32 | prompt, then {continuation} tokens chosen greedily from the model's logits, with eviction |
| `CASE.logits` | [V] | float32 | the model's, for the prompt's last token |
| `CASE.layers.I.gate_logits` | [T, H, K] | float32 | section 1 |
| `CASE.layers.I.decisions` | [T, H, K] | uint8 | section 2 |
| `CASE.layers.I.visible_until` | [T, H] | int32 | section 3 |
| `CASE.layers.I.entries` | [T, H] | int32 | section 3 |
| `{attention_case}.gate_input_positions` | [S] | int32 | tokens of which gate inputs are here |
| `{attention_case}.layers.I.gate_input` | [S, M] | float32 | x of section 1, before `normalize` |
| `attention.*` | | float32 | section 4 |

## 7. What to test

1. Gates: `gate_input` to `gate_logits`. 2. `gate_logits` to `decisions`, exactly. 3. `decisions` to `visible_until` and `entries`, exactly, in prefill at
once, in prefill in chunks, and token by token. 4. Query, key, value and `visible_until` to `output`. 5. The model from `tokens`: `logits`, and the
continuation, token for token.

Whole numbers are exact given what they follow from. Others are right within {tolerance} of the largest absolute value in their tensor, in float32. From the
model's own hidden states a decision may fall the other way where its logit is next to 0: the smallest absolute logit here is {smallest:.2g}. In
lower precision test 1 to 4 with the given inputs, and keep the gate itself in float32.

With dms installed, `dms.export.reference_vectors.check_reference_vectors(FOLDER)` computes all again and compares.
"""


def specification(description: Mapping[str, Any]) -> str:
    """The page for vectors with this description, as `dms.export.reference_vectors.compute` made it."""
    config, attention = description["dms"], description["attention"]
    first = description["cases"][0]
    return _TEXT.format(
        model=description["model"],
        windows=", ".join(map(str, description["windows"])),
        **{name: config[name] for name in ("sinks", "alignment", "granularity", "scale", "offset")},
        layers=", ".join(str(layer["index"]) for layer in description["layers"]),
        cases=", ".join(
            f"`{case['name']}` (a prompt of {case['prompt_length']} tokens, {case['length']} in all)" for case in description["cases"]
        ),
        continuation=first["length"] - first["prompt_length"],
        attention_layer=attention["layer"],
        attention_case=attention["case"],
        tolerance=description["tolerance"],
        smallest=description["smallest_gate_logit"],
    )
