"""`dms generate-data`: the dense model's own completions of prompts, as data to retrofit it on.

Record n is sample n % samples of prompt n // samples. Its random numbers are functions of n and the seed: a run that was killed and
repeated writes the records that one in one go would have, up to the rounding of sums, which depends on what shares a batch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig

from dms.batching import Prompt, generate_batch, sample_seed
from dms.console import make_console
from dms.io import base_models
from dms.io.vocabulary import num_embeddings
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
        total = None if recipe.num_prompts is None else recipe.num_prompts * recipe.samples
        with GenerationLine(console, total, output.num_records) as line:
            for made in _in_order(_complete(model, tokenizer, recipe, prompts, output.num_records), output.num_records):
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


def _complete(model: Any, tokenizer: Any, recipe: GenerateRecipe, prompts: Iterator[list[int]], first: int) -> Iterator[GeneratedRecord]:
    """The records from number `first` on, as they end."""
    begun, done = divmod(first, recipe.samples)
    given: dict[int, list[int]] = {}
    missing = Counter[int]()

    def take() -> Iterator[Prompt]:
        for number, ids in enumerate(islice(prompts, begun, None), begun):
            samples = range(done if number == begun else 0, recipe.samples)
            given[number - begun], missing[number - begun] = ids, len(samples)
            yield Prompt(ids, [sample_seed(recipe.seed, number, sample) for sample in samples] if recipe.temperature > 0 else None)

    # The most probable token each time, where the temperature is 0.
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": recipe.temperature, "top_p": recipe.top_p, "top_k": 0} if recipe.temperature > 0 else {}
    )
    made = generate_batch(model, take(), max_batch_size=recipe.batch_size, max_new_tokens=recipe.max_new_tokens, **sampling)
    for prompt, sample, new, reason in made:
        number = (begun + prompt) * recipe.samples + sample + (done if prompt == 0 else 0)
        ids, completion = given[prompt], new[:-1] if reason == "eos" else new
        missing[prompt] -= 1
        if missing[prompt] == 0:
            del given[prompt], missing[prompt]
        texts = [tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False) for part in (ids, completion)]
        yield GeneratedRecord(
            number=number,
            prompt=texts[0],
            completion=texts[1],
            text=texts[0] + texts[1],
            finish_reason=reason,
            prompt_tokens=len(ids),
            completion_tokens=len(completion),
        )


def _in_order(records: Iterator[GeneratedRecord], number: int) -> Iterator[list[GeneratedRecord]]:
    """Records from `number` on in the order of their numbers, as soon as all before them have ended."""
    waiting: dict[int, GeneratedRecord] = {}
    for record in records:
        waiting[record.number] = record
        ready = []
        while number in waiting:
            ready.append(waiting.pop(number))
            number += 1
        if ready:
            yield ready


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
