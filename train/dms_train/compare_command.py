"""`dms compare`: what a model writes after given prompts, dense and evicting, on one page to be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dms_train.environment import prepare

_SHOWN = 600


def compare(
    model: Annotated[str, typer.Argument(help="A retrofitted model folder, such as RUN/model, or gates alone (with --base).")],
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS.jsonl", help="prompt, or messages (a chat), in each line.")],
    out: Annotated[str, typer.Option(metavar="PAGE.md", help="The page to write.")],
    evict_bias: Annotated[
        list[float] | None, typer.Option(help="Added to every gate's logit, so that above 0 more is evicted; repeat it. Default: 0.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 200,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Where MODEL is gates alone: the model that they go with.")] = None,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Accept another form of the model that the gates were trained on.")
    ] = False,
) -> None:
    """Write what a model says to each prompt, dense and evicting, side by side on a page."""
    prepare("auto")
    from dms.errors import writing

    with writing(out):
        run(model, prompts, out, evict_bias or [0.0], max_new_tokens=max_new_tokens, base=base, other_base=other_base)


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    text: str
    words: str
    """Of the cache at its end."""


def run(
    model_name: str,
    prompts: str,
    out: str,
    evict_biases: Sequence[float],
    *,
    max_new_tokens: int,
    base: str | None = None,
    other_base: bool = False,
) -> None:
    """As the command; greedy decoding.

    Raises:
        ValueError: a file that is no JSONL of prompts, by its line; messages without a chat template; prompts beyond the context.
    """
    from dms.console import make_console
    from dms.io import base_models, checkpoint

    tokenizer = base_models.load_tokenizer(base or model_name)
    given = _read(prompts, tokenizer)
    model = checkpoint.load(model_name, base=base, other_base=other_base)
    context = model.config.get_text_config().max_position_embeddings
    for number, (_, ids) in enumerate(given, 1):
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"{prompts}, line {number} has {len(ids)} tokens, and with {max_new_tokens} new ones it is above the model's context of {context}"
            )
    console, parts, same = make_console(), [], dict.fromkeys(evict_biases, 0)
    for number, (shown, ids) in enumerate(given, 1):
        dense = _answer(model, tokenizer, ids, None, max_new_tokens)
        parts += [
            f"\n## {number}. {len(ids):,} tokens\n",
            _quoted(shown),
            f"\n**dense** ({len(dense.tokens)} tokens)\n",
            _quoted(dense.text),
        ]
        for bias in evict_biases:
            answer = _answer(model, tokenizer, ids, bias, max_new_tokens)
            parted = next((at for at, (a, b) in enumerate(zip(answer.tokens, dense.tokens, strict=False)) if a != b), None)
            is_same = answer.tokens == dense.tokens
            same[bias] += is_same
            words = (
                "the same" if is_same else f"the same for {min(len(answer.tokens), len(dense.tokens)) if parted is None else parted} tokens"
            )
            parts.append(f"\n**evict_bias {bias:+g}**: {words}; {answer.words}\n")
            parts += [] if is_same else [_quoted(answer.text)]
            console.print(f"{number} of {len(given)}, evict_bias {bias:+g}: {words}; {answer.words}", highlight=False)
    totals = ", ".join(f"at evict_bias {bias:+g} {count} of {len(given)} answers are the dense model's" for bias, count in same.items())
    head = f"# {model_name} beside itself, dense\n\nGreedy decoding, at most {max_new_tokens} tokens; {totals}.\n"
    Path(out).write_text(head + "\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"wrote {out}: {totals}", highlight=False)


def _read(path: str, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Of each line what is shown of it, and its tokens."""
    import json

    from dms_train.chat import render, require_template

    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; name a JSONL file with prompt, or messages, in each line")
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise ValueError(f"{where}: give an object with either prompt or messages")
        if "prompt" in row:
            shown, ids = row["prompt"], tokenizer(row["prompt"])["input_ids"]
        else:
            require_template(tokenizer)
            shown, ids = row["messages"][-1]["content"], render(tokenizer, row["messages"])
        if not ids:
            raise ValueError(f"{where} is empty; give at least one token of text")
        found.append((shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} [...] {shown[-_SHOWN // 2 :]}", list(ids)))
    if not found:
        raise ValueError(f"{path} holds no prompts; give one in each line")
    return found


def _answer(model: Any, tokenizer: Any, ids: list[int], bias: float | None, max_new_tokens: int) -> _Answer:
    import torch

    from dms.hf_compat import output_cache
    from dms.modes import set_mode
    from dms_train.chat import describe_cache, stop_tokens

    set_mode(model, "dense" if bias is None else "evict")
    options: dict[str, Any] = {} if bias is None else {"evict_bias": bias}
    if stops := sorted(stop_tokens(model, tokenizer)):
        options["eos_token_id"] = stops
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
    cache = output_cache(output)
    assert cache is not None, "generate was asked for a cache"
    tokens = output.sequences[0, len(ids) :].tolist()
    return _Answer(tokens, tokenizer.decode(tokens, skip_special_tokens=True), describe_cache(cache))


def _quoted(text: str) -> str:
    """As a quotation of Markdown, whatever stands in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"
