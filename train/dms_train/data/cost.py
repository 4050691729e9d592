"""What a row costs to train on: a part that grows with its tokens, and attention, which grows with their square."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """In multiplications of a forward pass. token: of one token outside of attention. pair: of a query and a key that it sees, summed
    over the layers with full attention; sliding: over those that see the last `window` tokens only."""

    token: float
    pair: float
    sliding: float = 0.0
    window: int = 0

    def of_document(self, length: int) -> float:
        pairs = length * (length + 1) / 2
        beyond = max(0, length - self.window)
        return self.token * length + self.pair * pairs + self.sliding * (pairs - beyond * (beyond + 1) / 2)

    def of_row(self, lengths: list[int], row: int) -> float:
        """A row of so many tokens; what its documents leave is computed as one more."""
        return sum(map(self.of_document, lengths)) + self.of_document(row - sum(lengths))


def cost_of(config: Any) -> Cost:
    """A decoder's cost by its transformers configuration; mixtures of experts count the experts that a token goes through."""
    text = config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", None) or 1
    inner = (
        (getattr(text, "moe_intermediate_size", None) if experts > 1 else None) or getattr(text, "intermediate_size", None) or 4 * hidden
    )
    layer = hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * inner * experts
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None) or 0
    num_sliding = sum(kind == "sliding_attention" for kind in kinds) if window else 0
    pair = 2.0 * heads * head_dim
    return Cost(float(layers * layer + hidden * text.vocab_size), pair * (layers - num_sliding), pair * num_sliding, int(window))
