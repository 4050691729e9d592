"""How `dms evaluate` reads its command line: lists with commas, the settings file and overrides, and options that moved into the settings."""

from pathlib import Path

import typer

# Options of `dms evaluate` that are settings now, and their keys.
_MOVED = {
    "--num-documents": "num_documents",
    "--batch-size": "batch_size",
    "--prefill-chunk": "prefill_chunk",
    "--chat-template": "chat",
    "--seed": "seed",
    "--lm-eval-limit": "lm_eval.limit",
    "--num-fewshot": "lm_eval.num_fewshot",
    "--problems": "scaling.problems",
    "--num-problems": "scaling.num_problems",
    "--max-k": "scaling.max_k",
    "--chains-at-once": "scaling.chains_at_once",
    "--temperature": "scaling.temperature",
    "--top-p": "scaling.top_p",
    "--stop": "scaling.stop",
    "--max-new-tokens": "scaling.max_new_tokens",
    "--answer-pattern": "scaling.answer_pattern",
}


def split_settings(given: list[str]) -> tuple[str | None, list[str]]:
    """The settings file, if one is named, and the overrides.

    Raises:
        ValueError: an option that is a setting now, or two files.
    """
    for place, argument in enumerate(given):
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.partition("=")
        if option not in _MOVED:
            raise typer.BadParameter(f"no such option: {option}")
        if not equals:
            following = given[place + 1] if place + 1 < len(given) else ""
            value = "true" if option == "--chat-template" else following
        value = f'["{value}"]' if option == "--stop" else value
        raise ValueError(f"{option} moved to the settings: write {_MOVED[option]}={value or '...'} after the model, or in a SETTINGS.yaml")
    files = [argument for argument in given if "=" not in argument or Path(argument).is_file()]
    if len(files) > 1:
        raise ValueError(f"{', '.join(files)}: one settings file is read; give other settings as key=value")
    return (files[0] if files else None), [argument for argument in given if argument not in files]


def split_list(given: str) -> list[str]:
    """The items of a list with commas."""
    return [word.strip() for word in given.split(",") if word.strip()]


def split_numbers(option: str, given: str) -> list[int]:
    """As `split_list`, of whole numbers above 0.

    Raises:
        ValueError: anything else; option: the one that was given it.
    """
    words = split_list(given)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{option} is {given!r}; give numbers above 0 with commas between, such as 1024,2048")
    return [int(word) for word in words]
