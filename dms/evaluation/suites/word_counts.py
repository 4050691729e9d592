"""Which words occur most often, after RULER's common and frequent words (arXiv 2404.06654).

    #: $amber-fox 317        an entry: the name of a list, and a word of it
    #? $amber-fox 317        the question: the word that the list holds most often

    common_words      of four words, one stands three times as often as each other
    frequent_words    of eight words, the n-th most frequent stands 1/n as often as the first

RULER asks for several words in any order. Here several lists are interleaved and one word of each is asked for, so that each question has
one answer that can be decoded token by token. The words are numbers, as in planted records. Documents of both kinds take turns.
"""

from dataclasses import replace
from random import Random

from dms.evaluation.data.document import EvaluationDocument, Frame, Text, Tokenizer, encode
from dms.evaluation.data.names import VALUES, draw_names
from dms.evaluation.data.tasks import QUESTION, RECORD
from dms.evaluation.suites.layout import Part, Question, lay_out, room_for_parts

NUM_WORDS = {"common_words": 4, "frequent_words": 8}
CHANCE = {task: 1 / count for task, count in NUM_WORDS.items()}
INSTRUCTION = "The lines above are entries of lists, each of a name and a word. Below is, for each list, the word that it holds most often."
_NUM_LISTS = {"common_words": 8, "frequent_words": 4}


def words(tokenizer: Tokenizer, *, length: int, num_documents: int, seed: int, text: Text, frame: Frame) -> list[EvaluationDocument]:
    """Documents of lists, up to 8 or up to 4 of them, whose entries are as many as fit. `text` is not read.

    Raises:
        ValueError: too short a length.
    """
    tasks = list(NUM_WORDS)
    return [
        _make(tokenizer, tasks[number % 2], Random(f"words:{seed}:{length}:{number}"), frame, length) for number in range(num_documents)
    ]


def counts(task: str, scale: int) -> list[int]:
    """How often each word of a list stands in it, the most frequent first."""
    if task == "common_words":
        return [3 * scale] + [scale] * (NUM_WORDS[task] - 1)
    return [max(1, round(2 * scale / rank)) for rank in range(1, NUM_WORDS[task] + 1)]


def _make(tokenizer: Tokenizer, task: str, rng: Random, frame: Frame, length: int) -> EvaluationDocument:
    names = draw_names(rng, unseen=True)
    for num_lists in range(_NUM_LISTS[task], 0, -1):
        lists = [_List(tokenizer, task, name, rng) for name in names[:num_lists]]
        room = room_for_parts(frame, [entry.question for entry in lists], length)
        if sum(entry.num_tokens(1) for entry in lists) <= room:
            break
    else:
        raise ValueError(f"{length} tokens hold no list of {sum(counts(task, 1))} entries with this tokenizer; lengthen the documents")
    scale = 1
    while sum(entry.num_tokens(scale + 1) for entry in lists) <= room:
        scale += 1
    numbered = [(number, entry) for number, one in enumerate(lists) for entry in one.entries(scale)]
    used = sum(len(entry) for _, entry in numbered)
    # Entries of a list that nobody asks for take what is left.
    rest = _List(tokenizer, task, names[num_lists], rng)
    while used + len(entry := rng.choice(rest.words)) <= room:
        numbered.append((num_lists, entry))
        used += len(entry)
    rng.shuffle(numbered)
    firsts = [next(at for at, (_, entry) in enumerate(numbered) if entry == one.words[0]) for one in lists]
    questions = [replace(one.question, evidence=first) for one, first in zip(lists, firsts, strict=True)]
    return lay_out(tokenizer, frame, [Part(entry) for _, entry in numbered], questions, length=length)


class _List:
    """One list: the tokens of an entry with each of its words, the most frequent first, and the question."""

    def __init__(self, tokenizer: Tokenizer, task: str, name: str, rng: Random):
        record, asks, name_tokens, line_end, *values = encode(
            tokenizer, [RECORD, QUESTION, f" ${name}", "\n", *(f" {value}" for value in rng.sample(VALUES, NUM_WORDS[task]))]
        )
        self.task = task
        self.words = [record + name_tokens + value + line_end for value in values]
        self.question = Question(task, asks + name_tokens, values[0], line_end, 0)

    def entries(self, scale: int) -> list[list[int]]:
        return [word for word, count in zip(self.words, counts(self.task, scale), strict=True) for _ in range(count)]

    def num_tokens(self, scale: int) -> int:
        return sum(len(entry) for entry in self.entries(scale))
