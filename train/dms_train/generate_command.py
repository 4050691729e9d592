"""`dms generate`: stream text and say what its cache holds."""

import time

from rich.console import Console

from dms.io import base_models as models
from dms.io import checkpoint
from dms.io.vocabulary import check_tokens, num_embeddings


def stream(folder: str, prompt: str, *, max_new_tokens: int, temperature: float, evict_bias: float, kv_dtype: str | None = None) -> dict:
    """Generate from a retrofitted folder, printing as it goes; returns the cache's report.

    Raises:
        ValueError: a folder without gates, an empty prompt, or another kv_dtype than int8.
    """
    model = checkpoint.load(folder, evict_bias=evict_bias)
    model.dms.kv_dtype = kv_dtype
    tokenizer = models.load_tokenizer(folder)
    import torch
    from transformers import TextStreamer

    from dms.cache.stats import cache_stats
    from dms.hf_compat import output_cache

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token of text")
    check_tokens(inputs["input_ids"][0].tolist(), tokenizer, num_embeddings(model.config), "the prompt")
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs, return_dict_in_generate=True, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer), **sampling
        )
    seconds = time.perf_counter() - start
    report = cache_stats(output_cache(output), warn=True)
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    Console(stderr=True).print(f"{new} tokens in {seconds:.1f} s; {report}", highlight=False)
    return report.to_dict()
