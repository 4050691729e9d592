"""`dms generate-data`: what the dense model itself would say, as data to retrofit it on.

Row n is the sample n % samples of prompt n // samples. Its random numbers are functions of n and the seed, and batches begin at
multiples of their size: a run that was killed goes on to the same file as one that was not.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from random import Random
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dms.console import make_console
from dms.generation import draw_tokens
from dms.io import base_models as models
from dms.io.vocabulary import num_embeddings, padding_id
from dms.io.weights import base_hash
from dms_train.data.loader import open_reader
from dms_train.data.prompts import prompt_render
from dms_train.data.source_reader import Cursor
from dms_train.generate_recipe import GenerateRecipe
from dms_train.generated_file import Line, Output


def run(recipe: GenerateRecipe, console: Console | None = None) -> dict[str, int]:
    """Write the file, or what is missing of it; how many rows ended for which reason.

    Raises:
        ValueError: a model, prompts or an output file that do not fit the recipe, before anything is written.
    """
    console = console or make_console()
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    tokenizer = models.load_tokenizer(recipe.model)
    reader = _open_prompts(tokenizer, recipe, say)
    prompts = _once(reader, recipe, say)
    # What is wrong with the first is said before a model is loaded.
    prompts = chain(list(islice(prompts, 1)), prompts)
    with Output(recipe, _sources(recipe, reader)) as output:
        if output.num_rows:
            say(f"{output.path} holds {output.num_rows} rows of this recipe: going on from there")
        model = _load(recipe)
        rows = islice(_numbered(prompts, recipe), output.num_rows, None)
        total = None if recipe.num_prompts is None else recipe.num_prompts * recipe.samples
        with Line(console, total, output.num_rows) as line:
            while batch := list(islice(rows, recipe.batch_size)):
                made = _complete(model, tokenizer, recipe, batch)
                output.append(made)
                line.update(output.num_rows, sum(row["completion_tokens"] for row in made))
        if total is not None and output.num_rows < total:
            say(f"prompts ran out: {output.num_rows // recipe.samples} of the {recipe.num_prompts} asked for")
        reasons = ", ".join(f"{count} ended by {reason}" for reason, count in sorted(output.reasons.items()))
        say(f"wrote {output.path}: {output.num_rows} rows ({reasons or 'none'})")
        return dict(output.reasons)


def _load(recipe: GenerateRecipe) -> Any:
    has_gpu = torch.cuda.is_available()
    dtype = {"fp32": "float32", "bf16": "bfloat16", "auto": "auto" if has_gpu else "float32"}[recipe.precision]
    model = models.load_base(recipe.model, dtype)
    # It is to say what it would say, not what its authors recommend: transformers fills what a call leaves open from these.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def _sources(recipe: GenerateRecipe, reader: Any) -> str:
    """A hash of the files of prompts and weights."""
    folder = models.local_folder(recipe.model)
    found = [reader.fingerprint(), None if folder is None else base_hash(folder)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def _open_prompts(tokenizer: Any, recipe: GenerateRecipe, say: Any) -> Any:
    """A reader of the prompts. Raises ValueError for prompts that cannot be used."""
    from transformers import AutoConfig

    from dms_train.data.settings import Data

    prompts = recipe.prompts
    config = AutoConfig.from_pretrained(models.resolve_model(recipe.model))
    context = config.get_text_config().max_position_embeddings
    most = context - recipe.max_new_tokens
    if most < (prompts.tokens or 1):
        raise ValueError(
            f"prompts of {prompts.tokens or 1} tokens and max_new_tokens {recipe.max_new_tokens} exceed the {context} tokens of {recipe.model}'s "
            "context; shorten one of them"
        )
    # What of the section `data` matters to a reader; a built-in document is as long as prompt and completion.
    data = Data(source="builtin", length=max(8, (prompts.tokens or 0) + recipe.max_new_tokens), bad_shards=recipe.bad_shards)
    render = None if prompts.source == "builtin" else prompt_render(tokenizer, prompts, most)
    return open_reader(tokenizer, prompts, 0, data, recipe.seed, num_embeddings(config), say, render)


def _once(reader: Any, recipe: GenerateRecipe, say: Any) -> Iterator[list[int]]:
    """Token ids of each prompt, every one once."""
    left_out: Counter[str] = Counter()
    found = 0
    for outcome in reader.documents(Cursor()):
        document = outcome.document
        if document is None:
            left_out[outcome.left_out] += 1
        elif document.cursor.epoch > 0 or found == recipe.num_prompts:
            break
        else:
            found += 1
            yield document.arrays()[0][: recipe.prompts.tokens].tolist()
    for why, count in left_out.items():
        say(f"left out {count} prompts: {why.replace('_', ' ')}")


def _numbered(prompts: Iterator[list[int]], recipe: GenerateRecipe) -> Iterator[tuple[int, list[int]]]:
    for prompt_number, ids in enumerate(prompts):
        for sample in range(recipe.samples):
            yield prompt_number * recipe.samples + sample, ids


class _KeyedSampling(LogitsProcessor):
    """Draws each row's next token with that row's own random numbers, and leaves no other token."""

    def __init__(self, recipe: GenerateRecipe, numbers: list[int]):
        self.temperature, self.top_p = recipe.temperature, recipe.top_p
        self.draws = [Random(f"{recipe.seed}:{number}") for number in numbers]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token_B = draw_tokens(scores, [draw.random() for draw in self.draws], temperature=self.temperature, top_p=self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B[:, None], 0.0)


@torch.no_grad()
def _complete(model: Any, tokenizer: Any, recipe: GenerateRecipe, batch: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    """The rows of a batch; prompts are padded on the left."""
    width = max(len(ids) for _, ids in batch)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    pad = padding_id(tokenizer, num_embeddings(model.config))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in batch], device=model.device)
    sampling = [_KeyedSampling(recipe, [number for number, _ in batch])] if recipe.temperature > 0 else []
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=recipe.max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad, use_cache=True
    )
    sequences = model.generate(
        input_ids=input_ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(sampling)
    )
    return [_row(tokenizer, number, ids, new, ends) for (number, ids), new in zip(batch, sequences[:, width:].tolist(), strict=True)]


def _row(tokenizer: Any, number: int, prompt: list[int], new: list[int], ends: set[int]) -> dict[str, Any]:
    stop = next((place for place, token in enumerate(new) if token in ends), None)
    said = new if stop is None else new[:stop]
    texts = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in (prompt, said)]
    return {
        "number": number,
        "prompt": texts[0],
        "completion": texts[1],
        "text": texts[0] + texts[1],
        "finish_reason": "length" if stop is None else "eos",
        "prompt_tokens": len(prompt),
        "completion_tokens": len(said),
    }
