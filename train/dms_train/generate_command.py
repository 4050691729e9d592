"""`dms generate`: a continuation or a conversation, by a retrofitted model, by gates with a base, or dense."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from dms.cache.page_pool import check_kv_dtype
from dms.cache.stats import cache_stats
from dms.hf_compat import output_cache
from dms.io import base_models, checkpoint
from dms.io.device_map import DeviceMap
from dms.io.vocabulary import check_tokens, num_embeddings
from dms.io.weights import GATES_FILE
from dms.modes import Mode
from dms.placement import compute_device
from dms_train.chat import Conversation, answer, converse, describe_cache, require_template


def run(
    name: str,
    prompt: str | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    base: str | None = None,
    other_base: bool = False,
    window: Sequence[int] | None = None,
    dense: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    evict_bias: float = 0.0,
    kv_dtype: str | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | None = None,
) -> dict[str, Any] | None:
    """Generate, printing as it goes -> the report of the last cache that evicts, None where there is none. As the command's options.

    Raises:
        ValueError: options that do not go together, a model without gates that is not to be dense, an empty prompt, or an unknown kv_dtype.
    """
    if prompt is None and not chat:
        raise ValueError("there is nothing to continue: give --prompt TEXT, or --chat for a conversation")
    if system is not None and not chat:
        raise ValueError("--system is for a conversation; add --chat, or put it into --prompt")
    if prompt == "":
        raise ValueError("the prompt is empty; give at least one token of text")
    if kv_dtype != "model":
        check_kv_dtype(kv_dtype)
    _check_model(name, base=base, other_base=other_base, dense=dense, evict_bias=evict_bias, kv_dtype=kv_dtype, window=window)
    # Before the weights, which may take minutes.
    tokenizer = base_models.load_tokenizer(base or name)
    if chat:
        require_template(tokenizer)
    placing: Any = {"device_map": device_map, "offload_folder": offload_folder}
    # A retrofitted folder without its gates is its dense model, unless they are channels of its weights.
    if dense and not checkpoint.is_borrowed(name):
        model = base_models.load_base(name, **placing)
    else:
        mode: Mode = "dense" if dense else "evict"
        model = checkpoint.load(name, base=base, other_base=other_base, mode=mode, evict_bias=evict_bias, window=window, **placing)
    if not dense and kv_dtype is not None:
        model.dms.kv_dtype = None if kv_dtype == "model" else kv_dtype
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if not chat:
        assert prompt is not None
        return _continue(model, tokenizer, prompt, max_new_tokens=max_new_tokens, **sampling)
    conversation = Conversation(model, tokenizer, max_new_tokens=max_new_tokens, system=system, **sampling)
    turn = converse(conversation) if prompt is None else answer(conversation, prompt)
    return None if turn is None or dense else cache_stats(turn.cache, warn=True).to_dict()


def _check_model(
    name: str, *, base: str | None, other_base: bool, dense: bool, evict_bias: float, kv_dtype: str | None, window: Sequence[int] | None
) -> None:
    if dense:
        options = {
            "--evict-bias": evict_bias != 0.0,
            "--kv-dtype": kv_dtype is not None,
            "--window": window is not None,
            "--base": base is not None,
            "--other-base": other_base,
        }
        if given := [option for option, is_given in options.items() if is_given]:
            raise ValueError(
                f"{', '.join(given)}: without effect in dense mode, which reads the model that is named; leave it out, or leave out --dense"
            )
    elif not (Path(name) / GATES_FILE).is_file():
        raise ValueError(
            f"{name} has no gates ({GATES_FILE} is missing); retrofit it (`dms retrofit RECIPE model={name}`) and name the folder that this "
            "wrote, such as RUN/model; import it where it is a DMS checkpoint of another project (`dms import`); or add --dense to generate from a model as it is"
        )
    elif base is None and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds gates alone; name the model that they go with: --base MODEL")


def _continue(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, **sampling: Any) -> dict[str, Any] | None:
    inputs = tokenizer(prompt, return_tensors="pt").to(compute_device(model))
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token of text")
    check_tokens(inputs["input_ids"][0].tolist(), tokenizer, num_embeddings(model.config), "the prompt")
    inputs.pop("token_type_ids", None)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs, return_dict_in_generate=True, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer), **sampling
        )
    seconds = time.perf_counter() - start
    cache = output_cache(output)
    assert cache is not None, "generate was asked for a cache"
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    evicts = getattr(model, "dms", None) is not None and model.dms.mode == "evict"
    report = cache_stats(cache, warn=True) if evicts else describe_cache(cache)
    Console(stderr=True).print(f"{new} tokens in {seconds:.1f} s; {report}", highlight=False)
    return cache_stats(cache, warn=False).to_dict() if evicts else None
