"""The LM head: from final hidden states to logits, so that losses and scores need never hold all logits at once.

Shapes: B batch, T tokens, M model dim, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dms import hf_compat
from dms.placement import at_hand
from dms.training.sharding import gathered


@dataclass(frozen=True)
class Head:
    """`softcap(logit_scale * (h W^T + b))`."""

    logit_scale: float
    softcap: float | None

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """The logits from h W^T + b."""
        logits = product if self.logit_scale == 1.0 else self.logit_scale * product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: Any) -> Head:
    """Read the head's scale and cap from the configuration (gemma2 caps, cohere multiplies, granite divides).

    Some multimodal models leave out what their text decoder's configuration asks for (Cohere 2 Vision).
    """
    text, owner = model.config.get_text_config(), None
    if text is not model.config:
        head = model.get_output_embeddings()
        owner = next((module for module in model.modules() if head in module.children()), None)

    def setting(name: str) -> float | None:
        value = getattr(text, name, None)
        return value if owner is None or hf_compat.forward_reads(type(owner), name) else None

    scale = float(setting("logit_scale") or 1.0)
    scaling = setting("logits_scaling")
    if scaling:
        scale /= float(scaling)
    return Head(scale, setting("final_logit_softcapping"))


def head_parameters(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, M] and bias [V], if there is one."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def text_decoder(model: Any) -> Any:
    """What gives the final hidden states of text, without the head, within whatever stands around it."""
    decoder = model.get_decoder()
    # Llama 4's is a whole model, with a head of its own.
    has_head = hasattr(decoder, "model") and decoder.get_output_embeddings() is not None
    return decoder.model if has_head else decoder


def hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Final hidden states [B, T, M] of the text decoder, after the last norm and before the head."""
    # Not the base model, which in multimodal models asks for images too.
    return text_decoder(model)(**inputs, use_cache=False).last_hidden_state


def make_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[..., M] -> [..., V]. Under ZeRO-3 all processes call it together."""
    with at_hand(model.get_output_embeddings()):
        weight, bias = head_parameters(model)
        with gathered(parameter for parameter in (weight, bias) if parameter is not None):
            return find_head(model).finish(nn.functional.linear(hidden, weight, bias))


@torch.no_grad()
def difference_of_head(model: Any, input_ids_BT: torch.Tensor) -> float | None:
    """The largest difference between the model's own logits and those of `find_head`; None where they are the same but for rounding."""
    logits = make_logits(model, hidden_states(model, {"input_ids": input_ids_BT}))
    own = model(input_ids=input_ids_BT, use_cache=False).logits
    difference = (logits.float() - own.float()).abs().max().item()
    return None if difference <= 1e-2 * max(1.0, own.float().abs().max().item()) else difference
