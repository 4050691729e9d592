"""Tasks for lm-evaluation-harness from BIG-bench's files, for scripts/fetch_tasks.sh; and, beside the tasks, how their answers are scored.

convert SDIST OUT  writes OUT/*.jsonl, OUT/*.yaml, OUT/LICENCES.md and this file from bigbench's source distribution; nothing of it is run
check FOLDER       compares a folder with its tasks.json

Context decides every answer: a conversation about a story (CoQA), one of eight newspaper passages (SQuAD-shifts), a passage that contradicts what
models know (contextual_parametric_knowledge_conflicts), and a rule that only the examples tell (dates in a form of their own, negation).
"""

import collections
import hashlib
import json
import re
import shutil
import string
import sys
import tarfile
from pathlib import Path
from random import Random

SEED = 7
NUM_DOCUMENTS = 200
NUM_PASSAGES = 8
# Words of a passage that contradicts; with four examples a request stays below 2,048 tokens.
CONFLICT_WORDS = (60, 160)
FOLDER = "bigbench/benchmark_tasks"
COQA = f"{FOLDER}/coqa_conversational_question_answering/coqa.test.json"
SQUAD = f"{FOLDER}/squad_shifts/nyt_v1.0.json"
CONFLICTS = f"{FOLDER}/contextual_parametric_knowledge_conflicts/task.json"
DATES = f"{FOLDER}/unnatural_in_context_learning/dates_unnatural_form/task.json"
NEGATION = f"{FOLDER}/linguistic_mappings/sentence_negation_json/task.json"
FEWSHOT = {"reading_conflicts": 4, "fewshot_dates": 30, "fewshot_negation": 40}
NEW_TOKENS = {"fewshot_dates": 16}

LICENCES = """# Where these tasks come from

BIG-bench 1.0.0 (Apache-2.0), https://github.com/google/BIG-bench, and in it:

- `reading_coqa`: CoQA, https://stanfordnlp.github.io/coqa: passages of Gutenberg and Wikipedia (CC BY-SA 4.0), MCTest (MSR-LA), RACE (its own licence),
  CNN (Apache-2.0), Reddit and science articles, as that page says.
- `reading_squad`: SQuAD-shifts, https://modestyachts.github.io/squadshifts-website, CC BY 4.0; articles of the New York Times.
- `reading_conflicts`, `fewshot_dates`, `fewshot_negation`: BIG-bench's own, Apache-2.0; the first made of Natural Questions (CC BY-SA 3.0).

{canary}
"""
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, examples: {examples}}}}}
test_split: test
fewshot_split: examples
fewshot_config: {{sampler: first_n}}
num_fewshot: {num_fewshot}
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answers[0]}}}}"
fewshot_delimiter: "{delimiter}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {new_tokens}, do_sample: false}}
process_results: !function reading_tasks.score
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: f1, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
GROUP = """group: reading
task: [{names}]
aggregate_metric_list:
  - {{metric: f1, aggregation: mean, weight_by_size: false, filter_list: none}}
metadata: {{version: 1}}
"""


# Answers, as SQuAD's and CoQA's own evaluations compare them.


def plain_words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(given: str, right: str) -> float:
    """Harmonic mean of the shares of words that two answers have in common."""
    given_words, right_words = plain_words(given), plain_words(right)
    if not given_words or not right_words:
        return float(given_words == right_words)
    common = sum((collections.Counter(given_words) & collections.Counter(right_words)).values())
    return 2.0 * common / (len(given_words) + len(right_words))


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """The harness calls this with a document and what was generated: the best over the right answers."""
    given, answers = results[0].strip(), doc["answers"]
    exact = any(plain_words(given) == plain_words(right) for right in answers)
    return {"exact_match": float(exact), "f1": max(word_f1(given, right) for right in answers)}


# Documents: {"prompt": up to where the answer begins, "answers": [...]}, examples for few-shot first.


def conversations(data: dict, rng: Random) -> list[dict]:
    """A story, all turns but the last with their answers, and the last question."""
    found = []
    for one in data["data"]:
        others = one.get("additional_answers", {}).values()
        asked = [turn["input_text"] for turn in one["questions"]]
        answered = [turn["input_text"] for turn in one["answers"]]
        if len(asked) < 10:
            continue
        turns = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in zip(asked[:-1], answered[:-1], strict=True))
        answers = [answered[-1], *(other[-1]["input_text"] for other in others if len(other) == len(asked))]
        found.append({"prompt": f"{one['story'].strip()}\n\n{turns}Q: {asked[-1]}\nA:", "answers": list(dict.fromkeys(answers))})
    return rng.sample(found, len(found))


def passages(data: dict, rng: Random) -> list[dict]:
    """Passages of as many articles, and a question about one of them."""
    articles = [article["paragraphs"] for article in data["data"] if any(paragraph["qas"] for paragraph in article["paragraphs"])]
    found = []
    for number in range(min(NUM_DOCUMENTS, len(articles))):
        others = rng.sample([other for other in range(len(articles)) if other != number], min(NUM_PASSAGES, len(articles)) - 1)
        asked = rng.choice([paragraph for paragraph in articles[number] if paragraph["qas"]])
        chosen = [rng.choice(articles[other])["context"] for other in others]
        chosen.insert(rng.randrange(len(chosen) + 1), asked["context"])
        question = rng.choice(asked["qas"])
        text = "".join(f"{' '.join(passage.split())}\n\n" for passage in chosen)
        answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
        found.append({"prompt": f"{text}Question: {question['question'].strip()}\nAnswer:", "answers": answers})
    return found


def conflicts(data: dict, rng: Random) -> list[dict]:
    """A passage in which a name was replaced, and a question that it answers."""
    found = []
    for example in data["examples"]:
        question, _, context = example["input"].strip().partition("\nContext:")
        context = " ".join(context.split())
        if CONFLICT_WORDS[0] <= len(context.split()) <= CONFLICT_WORDS[1] and example["target"] in context:
            prompt = f"{context}\n{question.strip()}\nAnswer:"
            found.append({"prompt": prompt, "answers": [example["target"]]})
    return rng.sample(found, len(found))


def dates(data: dict, rng: Random) -> list[dict]:
    """Of answers that are all dates the loader of JSON makes times; a full stop, which scoring does not see, keeps them texts."""
    found = []
    for example in data["examples"]:
        answer = example["target"]
        found.append({"prompt": f"{example['input'].strip()} ->", "answers": [answer, f"{answer}."]})
    return rng.sample(found, len(found))


def negation(data: dict, rng: Random) -> list[dict]:
    found = [{"prompt": f"John thinks {example['input']}, but", "answers": [example["target"]]} for example in data["examples"]]
    return rng.sample(found, len(found))


TASKS = {
    "reading_coqa": (COQA, conversations),
    "reading_squad": (SQUAD, passages),
    "reading_conflicts": (CONFLICTS, conflicts),
    "fewshot_dates": (DATES, dates),
    "fewshot_negation": (NEGATION, negation),
}


def read_sdist(sdist: Path) -> dict[str, dict]:
    """The files of TASKS, by their paths without the first folder."""
    wanted, found = {path for path, _ in TASKS.values()}, {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if path in wanted:
                found[path] = json.load(archive.extractfile(member))
    if missing := sorted(wanted - set(found)):
        sys.exit(f"reading_tasks: {sdist.name} has no {', '.join(missing)}")
    return found


def convert(sdist: Path, out: Path) -> None:
    files = read_sdist(sdist)
    canary = f"BIG-bench asks: {files[DATES]['canary']}"
    for name, (path, make) in TASKS.items():
        documents, num_fewshot = make(files[path], Random(SEED)), FEWSHOT.get(name, 0)
        # The harness wants a split of examples where none is used, too.
        examples, documents = documents[: max(1, num_fewshot)], documents[max(1, num_fewshot) :][:NUM_DOCUMENTS]
        for part, rows in (("examples", examples), ("test", documents)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (out / f"{name}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "LICENCES.md").write_text(LICENCES.format(canary=canary), encoding="utf-8")
    shutil.copy(__file__, out / "reading_tasks.py")
    digests = {path.name: digest_of(path) for path in sorted(out.iterdir())}
    (out / "tasks.json").write_text(json.dumps({"sha256": digests}, indent=1) + "\n")


def place(folder: Path) -> None:
    """Write the YAML files, which name the folder that they lie in."""
    for name in TASKS:
        fields = {part: json.dumps(str(folder / f"{name}.{part}.jsonl")) for part in ("test", "examples")}
        delimiter = "\\n\\n" if name.startswith("reading") else "\\n"
        fields |= {"num_fewshot": FEWSHOT.get(name, 0), "new_tokens": NEW_TOKENS.get(name, 32), "delimiter": delimiter}
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, **fields), encoding="utf-8")
    (folder / "reading.yaml").write_text(GROUP.format(names=", ".join(TASKS)), encoding="utf-8")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(folder: Path) -> None:
    for file, digest in json.loads((folder / "tasks.json").read_text())["sha256"].items():
        if not (folder / file).is_file() or digest_of(folder / file) != digest:
            sys.exit(f"reading_tasks: {folder / file} is missing, or is not the file that was written (sha256 {digest})")
    # A folder that was moved names its new place.
    place(folder)
    for name in TASKS:
        rows = [json.loads(line) for line in (folder / f"{name}.test.jsonl").read_text(encoding="utf-8").split("\n") if line]
        words = sum(len(row["prompt"].split()) for row in rows) // max(1, len(rows))
        print(f"fetch: {name}: {len(rows)} documents of {words} words, after {FEWSHOT.get(name, 0)} examples", file=sys.stderr)
    print(f"fetch: next: dms evaluate MODEL --tasks none --lm-eval reading --include-path {folder}", file=sys.stderr)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"convert": convert, "check": check}[command](*map(Path, paths))
