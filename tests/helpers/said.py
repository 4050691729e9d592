"""What was printed, wherever it was wrapped: width, colours and the length of a path belong to the machine."""

import re


def flat(text: str) -> str:
    """Without white space and colours."""
    return "".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def says(printed: str, words: object) -> bool:
    """Whether the words were printed. rich breaks a line at a space, and within a word that is longer than the line."""
    return flat(str(words)) in flat(printed)
