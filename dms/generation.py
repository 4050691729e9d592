"""`dms generate`: stream text and say what its cache holds."""

import time

from rich.console import Console

from dms import checkpoint, models


def stream(folder: str, prompt: str, *, max_new_tokens: int, temperature: float, evict_bias: float) -> dict:
    """Generate from a retrofitted folder, printing as it goes; returns the cache's report.

    Raises:
        ValueError: a folder without gates, or an empty prompt.
    """
    model = checkpoint.load(folder, evict_bias=evict_bias)
    tokenizer = models.load_tokenizer(folder)
    import torch
    from transformers import TextStreamer

    from dms.cache import DMSCache

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token of text")
    inputs.pop("token_type_ids", None)
    cache = DMSCache(model)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer), **sampling
        )
    seconds = time.perf_counter() - start
    report = cache.report()
    new = output.shape[1] - inputs["input_ids"].shape[1]
    Console(stderr=True).print(f"{new} tokens in {seconds:.1f} s; {report}", highlight=False)
    return report.to_dict()
