"""`dms generate-data`: the dense model's own completions of prompts, as data to retrofit it on.

Record n is sample n % samples of prompt n // samples. Its random numbers are functions of n and the seed, and batches begin at
multiples of their size: a run that was killed and repeated writes the same file as one that was not.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dms.console import make_console
from dms.generation import draw_tokens
from dms.io import base_models
from dms.io.vocabulary import num_embeddings, padding_id
from dms.io.weights import base_hash
from dms_train.data.loader import open_reader
from dms_train.data.settings import Data, Prompts
from dms_train.data.shards import Record
from dms_train.data.source_reader import BuiltinReader, Cursor, Reader
from dms_train.data.tokenization import BadRecord, Chats, Ids, RecordFormat, Render, Rendered, everything, rendering, string_of
from dms_train.generated_file import GeneratedFile, GeneratedRecord, GenerationLine
from dms_train.recipe import GenerateRecipe


def run(recipe: GenerateRecipe, console: Console | None = None) -> dict[str, int]:
    """Write the file, or what is missing of it -> how many records ended for which reason.

    Raises:
        ValueError: a model, prompts or an output file that do not fit the recipe, before anything is written.
    """
    console = console or make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    tokenizer = base_models.load_tokenizer(recipe.model)
    reader = _open_prompts(tokenizer, recipe, say)
    prompts = _once(reader, recipe, say)
    # The first prompt is read before the model is loaded: it shows what is wrong with the data at once.
    prompts = chain(list(islice(prompts, 1)), prompts)
    with GeneratedFile(recipe, _sources(recipe, reader)) as output:
        if output.num_records:
            say(f"{output.path} holds {output.num_records} records of this recipe: continuing from there")
        model = _load(recipe)
        samples = islice(_samples(prompts, recipe), output.num_records, None)
        total = None if recipe.num_prompts is None else recipe.num_prompts * recipe.samples
        with GenerationLine(console, total, output.num_records) as line:
            while batch := list(islice(samples, recipe.batch_size)):
                made = _complete(model, tokenizer, recipe, batch)
                output.append(made)
                line.update(output.num_records, sum(record.completion_tokens for record in made))
        if total is not None and output.num_records < total:
            say(f"prompts ran out: {output.num_records // recipe.samples} of the {recipe.num_prompts} asked for")
        reasons = ", ".join(f"{count} ended by {reason}" for reason, count in sorted(output.reasons.items()))
        say(f"wrote {output.path}: {output.num_records} records ({reasons or 'none'})")
        return dict(output.reasons)


def _load(recipe: GenerateRecipe) -> Any:
    has_gpu = torch.cuda.is_available()
    dtype = {"fp32": "float32", "bf16": "bfloat16", "auto": "auto" if has_gpu else "float32"}[recipe.precision]
    model = base_models.load_base(recipe.model, dtype)
    # transformers fills what a call leaves open from these: the recipe's sampling would be mixed with what the model's authors recommend.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def _sources(recipe: GenerateRecipe, reader: Reader | BuiltinReader) -> str:
    """A hash of the files of prompts and weights."""
    weights = base_models.local_weights(recipe.model)
    found = [reader.fingerprint(), None if weights is None else base_hash(weights)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def _open_prompts(tokenizer: Any, recipe: GenerateRecipe, say: Callable[[str], None]) -> Reader | BuiltinReader:
    """A reader of the prompts. Raises ValueError for prompts that cannot be used."""
    prompts = recipe.prompts
    config = base_models.load_config(recipe.model)
    context = config.get_text_config().max_position_embeddings
    most = context - recipe.max_new_tokens
    if most < (prompts.tokens or 1):
        raise ValueError(
            f"prompts of {prompts.tokens or 1} tokens and max_new_tokens {recipe.max_new_tokens} exceed the {context} tokens of {recipe.model}'s "
            "context; shorten one of them"
        )
    # Only bad_shards and, of a built-in document, the length matter here: it is as long as prompt and completion.
    data = Data(source="builtin", length=max(8, (prompts.tokens or 0) + recipe.max_new_tokens), bad_shards=recipe.bad_shards)
    render = None if prompts.source == "builtin" else prompt_render(tokenizer, prompts, most)
    return open_reader(tokenizer, prompts, 0, data, recipe.seed, num_embeddings(config), say, render)


def _once(reader: Reader | BuiltinReader, recipe: GenerateRecipe, say: Callable[[str], None]) -> Iterator[list[int]]:
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


class _Sample(NamedTuple):
    """A completion to make."""

    number: int
    prompt: list[int]


def _samples(prompts: Iterator[list[int]], recipe: GenerateRecipe) -> Iterator[_Sample]:
    for prompt_number, ids in enumerate(prompts):
        for sample in range(recipe.samples):
            yield _Sample(prompt_number * recipe.samples + sample, ids)


class _KeyedSampling(LogitsProcessor):
    """Draws each sample's next token with that sample's own random numbers, and leaves no other token."""

    def __init__(self, recipe: GenerateRecipe, numbers: list[int]):
        self.temperature, self.top_p = recipe.temperature, recipe.top_p
        self.draws = [Random(f"{recipe.seed}:{number}") for number in numbers]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        token_B = draw_tokens(scores, [draw.random() for draw in self.draws], temperature=self.temperature, top_p=self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B[:, None], 0.0)


@torch.no_grad()
def _complete(model: Any, tokenizer: Any, recipe: GenerateRecipe, batch: list[_Sample]) -> list[GeneratedRecord]:
    """The records of a batch; prompts are padded on the left."""
    width = max(len(sample.prompt) for sample in batch)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    pad = padding_id(tokenizer, num_embeddings(model.config))
    padding = [width - len(sample.prompt) for sample in batch]
    input_ids = torch.tensor([[pad] * left + sample.prompt for left, sample in zip(padding, batch, strict=True)], device=model.device)
    mask = torch.tensor([[0] * left + [1] * (width - left) for left in padding], device=model.device)
    sampling = [_KeyedSampling(recipe, [sample.number for sample in batch])] if recipe.temperature > 0 else []
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=recipe.max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad, use_cache=True
    )
    sequences = model.generate(
        input_ids=input_ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(sampling)
    )
    return [_record(tokenizer, sample, new, ends) for sample, new in zip(batch, sequences[:, width:].tolist(), strict=True)]


def _record(tokenizer: Any, sample: _Sample, new: list[int], ends: set[int]) -> GeneratedRecord:
    stop = next((place for place, token in enumerate(new) if token in ends), None)
    completion = new if stop is None else new[:stop]
    texts = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in (sample.prompt, completion)]
    return GeneratedRecord(
        number=sample.number,
        prompt=texts[0],
        completion=texts[1],
        text=texts[0] + texts[1],
        finish_reason="length" if stop is None else "eos",
        prompt_tokens=len(sample.prompt),
        completion_tokens=len(completion),
    )


def prompt_render(tokenizer: Any, prompts: Prompts, most: int) -> Render:
    """most: tokens that a prompt may have; longer ones are left out. Raises ValueError as `make_render`."""
    format: RecordFormat = _ChatPrompts(tokenizer, prompts) if prompts.messages is not None else _TextPrompts(tokenizer, prompts)
    render = rendering(prompts, format)

    def each(records: list[Record]) -> list[Rendered]:
        return [_fitting(made, prompts.tokens, most) for made in render(records)]

    return each


def _fitting(made: Rendered, asked: int | None, most: int) -> Rendered:
    if made.left_out:
        return made
    if asked is not None and len(made.ids) < asked:
        return Rendered(made.where, left_out="shorter than prompts.tokens")
    ids = made.ids if asked is None else made.ids[:asked]
    return made._replace(ids=ids) if len(ids) <= most else Rendered(made.where, left_out="longer than the context leaves room for")


class _TextPrompts:
    """The text of one column."""

    def __init__(self, tokenizer: Any, prompts: Prompts):
        self.ids, self.column = Ids(tokenizer), prompts.prompt or prompts.field

    def text(self, values: dict[str, Any]) -> str:
        return string_of(values, self.column, "prompts")

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        return [everything(ids) for ids in self.ids.begin([record[self.column] for record in records])]


class _ChatPrompts(Chats):
    """A chat up to its last answer."""

    def tokenize(self, records: list[dict[str, Any]]) -> list[Rendered]:
        return [self._prompt(record) for record in records]

    def _prompt(self, record: dict[str, Any]) -> Rendered:
        turns = self.turns(record)
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        # A chat that ends with a question is a prompt as it is.
        before = turns[: answers[-1]] if answers and answers[-1] == len(turns) - 1 else turns
        try:
            if not before:
                raise BadRecord("begins with its only answer: there is no prompt")
            text = self.template(before, self.options(record), with_prompt=True)
        except BadRecord as error:
            return Rendered("", left_out="bad", problem=str(error))
        return everything(self.tokenizer(text, add_special_tokens=False)["input_ids"])
