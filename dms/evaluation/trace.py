"""One document, token by token: what each gate decided and which answers came out right."""

import torch

from dms import report
from dms.evaluation.scoring import predict
from dms.evaluation.tasks import Document
from dms.retrofitting import set_mode, state_of


@torch.no_grad()
def trace_document(model, tokenizer, document: Document, title: str = "") -> "report.DocumentTrace":
    """Run one document in evict mode and collect each gate's probability, aligned to the token that it rules."""
    set_mode(model, "evict")
    state, device = state_of(model), next(model.parameters()).device
    ids = torch.tensor([document.input_ids], device=device)
    right = predict(model, ids, use_cache=False).right_BT[0].tolist()
    shift = state.config.alignment == "next"
    probabilities = []
    for index in sorted(state.forward.logits):
        prob_HT = torch.sigmoid(state.forward.logits[index][0].float()).T.tolist()
        probabilities.append([[*row[1:], None] if shift else row for row in prob_HT])
    return report.DocumentTrace(
        tokens=[tokenizer.decode([token]) for token in document.input_ids],
        evict_prob_LHT=probabilities,
        answers=[(a.start, a.end, all(right[a.start - 1 : a.end - 1])) for a in document.answers],
        layer_indices=sorted(state.forward.logits),
        title=title,
        window=state.config.window,
        sinks=state.config.sinks,
        prompt=getattr(document, "prompt", None),
    )
