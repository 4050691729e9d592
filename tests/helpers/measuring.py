"""What two models are compared by. Needs torch alone, so that it runs where dms is not installed."""

import torch


@torch.no_grad()
def measure(model) -> dict[str, torch.Tensor]:
    """Logits of one forward, without and with a cache, and greedy continuations; the second row is padded on the left."""
    ids = torch.randint(2, 97, (2, 48), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return {
        "forward": model(**given, use_cache=False).logits.float(),
        "cached": model(**given, use_cache=True).logits.float(),
        "greedy": model.generate(**given, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0),
    }
