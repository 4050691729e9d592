"""The teacher cache: a teacher's top-k log-probabilities on disk, found by the content of a sequence, so that runs skip its forward pass.

    FOLDER/manifest.json       the teacher: base, vocabulary, K, precision
    FOLDER/NAME.safetensors    a shard: for each of its sequences, by key, ids [T, K], log_probs [T, K] and log_tail [T]
    FOLDER/NAME.json           its sequences, each with a hash of its tensors; written last: a shard without it does not count
    FOLDER/NAME.whole          every sequence of a run of that name is there

Letters: B sequences, T tokens of a sequence, K most probable tokens of each distribution.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dms.io.weights import save_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# What `TeacherCache.add_to` adds to a batch: [B, T, K], [B, T, K] and [B, T].
BATCH_KEYS = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
_NAMES = ("ids", "log_probs", "log_tail")
# Of one sequence: ids [T, K] integers, log_probs [T, K] and log_tail [T], the log-probability of all other tokens.
TopK = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_COMMAND = "write it with dms cache-teacher and this recipe, with the same overrides"


@dataclass(frozen=True)
class Teacher:
    """Whose distributions a cache holds; the fields are the manifest's keys."""

    base: str
    base_hash: str
    """Of its weights."""
    vocab_size: int
    top_k: int
    """K."""
    precision: str
    """Of its forward passes."""
    base_form: str | None = None
    """What its weights were packed into when they were loaded; None: as they are."""
    dtype: str = "float16"
    """Of the log-probabilities on disk."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class _Entry:
    """A sequence in the cache."""

    shard: Path
    digest: str
    """Hash of its tensors."""


def sequence_key(input_ids_T: torch.Tensor, segment_ids_T: torch.Tensor) -> str:
    """A hash of what a teacher reads: the tokens, which of them are padding, and where documents begin, however they are numbered."""
    begins_T = torch.ones_like(segment_ids_T, dtype=torch.uint8)
    begins_T[1:] = segment_ids_T[1:] != segment_ids_T[:-1]
    layout_T = begins_T + 2 * (segment_ids_T > 0).byte()
    digest = hashlib.sha256(input_ids_T.int().cpu().numpy().tobytes())
    digest.update(layout_T.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


class TeacherCache:
    """Reads a cache and adds to it. Any number of processes may read, and write different sequences, at the same time."""

    def __init__(self, folder: Path, teacher: Teacher):
        self.folder, self.teacher = folder, teacher
        self._entries: dict[str, _Entry] = {}
        for description in sorted(folder.glob("*.json")):
            if description.name != MANIFEST:
                self._entries.update(_entries_of(description))

    @staticmethod
    def open(path: str, wanted: Teacher) -> "TeacherCache":
        """A teacher's cache with the wanted K or a larger one; of a larger one the most probable tokens are used.

        Raises:
            ValueError: there is none, it is damaged, or another teacher's.
        """
        folder = Path(path).expanduser()
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"teacher_cache.path '{path}' holds no teacher cache; {_COMMAND}")
        try:
            found = Teacher(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / MANIFEST} cannot be read ({error}); delete the folder, and {_COMMAND}") from None
        _check_same(folder, found, wanted)
        return TeacherCache(folder, wanted)

    @staticmethod
    def open_or_make(path: str, teacher: Teacher) -> "TeacherCache":
        """The same for writing. Raises ValueError for a folder that holds something else, or a cache that this teacher cannot add to."""
        folder = Path(path).expanduser()
        if not (folder / MANIFEST).is_file():
            if folder.exists() and (not folder.is_dir() or any(not _is_unfinished(file) for file in folder.iterdir())):
                raise ValueError(f"teacher_cache.path '{path}' is not empty and holds no teacher cache; choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
            _write_text(folder / MANIFEST, json.dumps(asdict(teacher), indent=1))
        found = TeacherCache.open(path, teacher)
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["top_k"]
        if stored != teacher.top_k:
            raise ValueError(
                f"'{path}' holds {stored} tokens of each distribution and teacher_cache.top_k is {teacher.top_k}: "
                "a smaller number can be read from it, but not added to it; choose the same, or another folder"
            )
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def mark(self, run: str) -> None:
        """Note that every sequence of a run is in the shards that are there now."""
        _write_text(self.folder / f"{run}.whole", json.dumps(sorted(self._shards())))

    def is_marked(self, run: str) -> bool:
        """Whether that was noted, and all of those shards are still whole."""
        try:
            return set(json.loads((self.folder / f"{run}.whole").read_text(encoding="utf-8"))) <= self._shards()
        except (OSError, ValueError):
            return False

    def _shards(self) -> set[str]:
        return {entry.shard.name for entry in self._entries.values()}

    def check_all(self, sequences: Iterable[dict[str, torch.Tensor]]) -> None:
        """Raises ValueError where sequences of a run are missing."""
        missing = total = 0
        for sequence in sequences:
            total += 1
            missing += sequence_key(sequence["input_ids"], sequence["segment_ids"]) not in self
        if missing:
            raise ValueError(f"the teacher cache '{self.folder}' lacks {missing} of the run's {total} sequences; {_COMMAND}")

    def add_to(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, which has input_ids and segment_ids [B, T], with the teacher's log-probabilities added under BATCH_KEYS.

        Raises:
            ValueError: a sequence that the cache lacks, or that is damaged.
        """
        keys = [sequence_key(ids_T, segment_T) for ids_T, segment_T in zip(batch["input_ids"], batch["segment_ids"], strict=True)]
        read = [self._read(key) for key in keys]
        return {**batch, **{name: torch.stack(parts) for name, parts in zip(BATCH_KEYS, zip(*read, strict=True), strict=True)}}

    def write_shard(self, sequences: dict[str, TopK]) -> Path:
        """Write sequences, by key. Afterwards all of them count, or none."""
        id_dtype = torch.uint16 if self.teacher.vocab_size <= 2**16 else torch.int32
        tensors: dict[str, torch.Tensor] = {}
        digests: dict[str, str] = {}
        for key, (ids, log_probs, log_tail) in sequences.items():
            values = [x.cpu().contiguous() for x in (ids.to(id_dtype), log_probs.half(), log_tail.half())]
            digests[key] = _digest(values)
            tensors |= {f"{key}.{name}": x for name, x in zip(_NAMES, values, strict=True)}
        # Named by a key that it holds: processes that write different sequences never use the same name.
        shard = self.folder / f"{next(iter(sequences))}.safetensors"
        unfinished = shard.with_name(f".{shard.stem}.{os.getpid()}.new")
        save_tensors(tensors, unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(shard)
        description = {"bytes": shard.stat().st_size, "rows": digests}
        _write_text(shard.with_suffix(".json"), json.dumps(description))
        self._entries |= {key: _Entry(shard, digest) for key, digest in digests.items()}
        return shard

    def _read(self, key: str) -> list[torch.Tensor]:
        if key not in self._entries:
            raise ValueError(f"the teacher cache '{self.folder}' lacks a sequence of this run; {_COMMAND}")
        entry = self._entries[key]
        problem = "its content is not what was written"
        try:
            with safe_open(str(entry.shard), framework="pt") as file:
                values = [file.get_tensor(f"{key}.{name}") for name in _NAMES]
        except (SafetensorError, OSError) as error:
            values, problem = [], str(error)
        if not values or _digest(values) != entry.digest:
            raise ValueError(f"{entry.shard} is damaged ({problem}); delete it and its .json, and {_COMMAND}")
        ids_TK, log_probs_TK, log_tail_T = values[0].int(), values[1].float(), values[2].float()
        K = self.teacher.top_k
        if ids_TK.shape[1] > K:
            log_tail_T = torch.cat([log_probs_TK[:, K:], log_tail_T[:, None]], dim=1).logsumexp(1)
        return [ids_TK[:, :K], log_probs_TK[:, :K], log_tail_T]


def _check_same(folder: Path, found: Teacher, wanted: Teacher) -> None:
    if found.format_version != FORMAT_VERSION or found.dtype != wanted.dtype:
        raise ValueError(
            f"'{folder}' was written by another version of dms (format {found.format_version}); {_COMMAND} into another folder"
        )
    for what in ("base_hash", "base_form", "vocab_size", "precision"):
        if getattr(found, what) != getattr(wanted, what):
            raise ValueError(
                f"the teacher cache '{folder}' was written with {what} {getattr(found, what)!r} (of {found.base}) and this recipe has "
                f"{getattr(wanted, what)!r} (of {wanted.base}); choose another teacher_cache.path, and {_COMMAND}"
            )
    if wanted.top_k > found.top_k:
        raise ValueError(
            f"teacher_cache.top_k is {wanted.top_k} and '{folder}' holds {found.top_k} tokens of each distribution; "
            f"choose {found.top_k} or fewer, or another folder"
        )


def _entries_of(description: Path) -> dict[str, _Entry]:
    """A shard's sequences; none where its file is not as it was written, so that they are written again."""
    shard = description.with_suffix(".safetensors")
    try:
        written = json.loads(description.read_text(encoding="utf-8"))
        is_whole = shard.stat().st_size == written["bytes"]
    except (OSError, ValueError, KeyError):
        return {}
    return {key: _Entry(shard, digest) for key, digest in written["rows"].items()} if is_whole else {}


def _is_unfinished(file: Path) -> bool:
    return file.name.startswith(".") and file.suffix == ".new"


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
