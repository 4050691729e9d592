"""A teacher's most probable tokens on disk, found by the content of a sequence: sweeps over recipes skip the teacher's pass.

    FOLDER/manifest.json       whose they are: base, vocabulary, how many tokens, precision
    FOLDER/NAME.safetensors    a shard: for each of its rows, by key, ids [T, K], log_probs [T, K] and log_tail [T]
    FOLDER/NAME.json           its rows, each with a hash of its tensors; written last, so that a shard without it does not count
    FOLDER/NAME.whole          every row of a run of that name is there

Letters: B rows, T tokens of a row, K tokens known of each distribution.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dms.io.files import save_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# What `TeacherCache.add_to` adds to a batch: [B, T, K], [B, T, K] and [B, T].
BATCH_KEYS = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
_NAMES = ("ids", "log_probs", "log_tail")
_COMMAND = "write it with dms cache-teacher and this recipe, with the same overrides"


@dataclass(frozen=True)
class Teacher:
    """Whose distributions a cache holds. base_hash: of its weights. top_k: K. precision: of its forward passes."""

    base: str
    base_hash: str
    vocab_size: int
    top_k: int
    precision: str
    dtype: str = "float16"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class _Place:
    """Where a row lies, and the hash of its tensors."""

    shard: Path
    digest: str


def row_key(input_ids_T: torch.Tensor, segment_ids_T: torch.Tensor) -> str:
    """A hash of what a teacher reads: the tokens, which are padding, and where documents begin, however they are numbered."""
    begins_T = torch.ones_like(segment_ids_T, dtype=torch.uint8)
    begins_T[1:] = segment_ids_T[1:] != segment_ids_T[:-1]
    layout_T = begins_T + 2 * (segment_ids_T > 0).byte()
    digest = hashlib.sha256(input_ids_T.int().cpu().numpy().tobytes())
    digest.update(layout_T.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


class TeacherCache:
    """Reads and adds to a cache. Any number of processes may read, and write rows of their own, at the same time."""

    def __init__(self, folder: Path, teacher: Teacher):
        self.folder, self.teacher = folder, teacher
        self._rows: dict[str, _Place] = {}
        for description in sorted(folder.glob("*.json")):
            if description.name != MANIFEST:
                self._rows.update(_rows_of(description))

    @staticmethod
    def open(path: str, wanted: Teacher) -> "TeacherCache":
        """The cache of a teacher, of as many tokens as wanted or more; of more, the most probable are used.

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
        """For writing. Raises ValueError for a folder that holds something else, or a cache that this teacher cannot add to."""
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
                "a smaller number can be used with it, but not added; choose the same, or another folder"
            )
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def mark(self, run: str) -> None:
        """Note that every row of a run is in the shards that are there now."""
        _write_text(self.folder / f"{run}.whole", json.dumps(sorted(self._shards())))

    def is_marked(self, run: str) -> bool:
        """Whether that was noted, and none of those shards is gone or cut since."""
        try:
            return set(json.loads((self.folder / f"{run}.whole").read_text(encoding="utf-8"))) <= self._shards()
        except (OSError, ValueError):
            return False

    def _shards(self) -> set[str]:
        return {place.shard.name for place in self._rows.values()}

    def check_all(self, rows: Iterable[dict[str, torch.Tensor]]) -> None:
        """Raises ValueError where rows of a run are missing."""
        missing = total = 0
        for row in rows:
            total += 1
            missing += row_key(row["input_ids"], row["segment_ids"]) not in self
        if missing:
            raise ValueError(f"the teacher cache '{self.folder}' lacks {missing} of the run's {total} sequences; {_COMMAND}")

    def add_to(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, input_ids and segment_ids [B, T], with what its teacher said: BATCH_KEYS.

        Raises:
            ValueError: a row that the cache lacks, or that is damaged.
        """
        keys = [row_key(ids_T, segment_T) for ids_T, segment_T in zip(batch["input_ids"], batch["segment_ids"], strict=True)]
        rows = [self._read(key) for key in keys]
        return {**batch, **{name: torch.stack(parts) for name, parts in zip(BATCH_KEYS, zip(*rows, strict=True), strict=True)}}

    def write_shard(self, rows: dict[str, tuple[torch.Tensor, ...]]) -> Path:
        """Write rows, by key: ids [T, K] integers, log_probs [T, K] and log_tail [T]. All of them count afterwards, or none."""
        id_dtype = torch.uint16 if self.teacher.vocab_size <= 2**16 else torch.int32
        tensors, digests = {}, {}
        for key, (ids, log_probs, log_tail) in rows.items():
            values = ids.to(id_dtype), log_probs.half(), log_tail.half()
            row = [x.cpu().contiguous() for x in values]
            digests[key] = _digest(row)
            tensors |= {f"{key}.{name}": x for name, x in zip(_NAMES, row, strict=True)}
        # Named by what it holds: processes that write different rows never meet.
        shard = self.folder / f"{next(iter(rows))}.safetensors"
        unfinished = shard.with_name(f".{shard.stem}.{os.getpid()}.new")
        save_tensors(tensors, unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(shard)
        description = {"bytes": shard.stat().st_size, "rows": digests}
        _write_text(shard.with_suffix(".json"), json.dumps(description))
        self._rows |= {key: _Place(shard, digest) for key, digest in digests.items()}
        return shard

    def _read(self, key: str) -> list[torch.Tensor]:
        if key not in self._rows:
            raise ValueError(f"the teacher cache '{self.folder}' lacks a sequence of this run; {_COMMAND}")
        place = self._rows[key]
        problem = "its content is not what was written"
        try:
            with safe_open(str(place.shard), framework="pt") as file:
                row = [file.get_tensor(f"{key}.{name}") for name in _NAMES]
        except (SafetensorError, OSError) as error:
            row, problem = [], str(error)
        if not row or _digest(row) != place.digest:
            raise ValueError(f"{place.shard} is damaged ({problem}); delete it and its .json, and {_COMMAND}")
        ids_TK, log_probs_TK, log_tail_T = row[0].int(), row[1].float(), row[2].float()
        K = self.teacher.top_k
        if ids_TK.shape[1] > K:
            log_tail_T = torch.cat([log_probs_TK[:, K:], log_tail_T[:, None]], dim=1).logsumexp(1)
        return [ids_TK[:, :K], log_probs_TK[:, :K], log_tail_T]


def _check_same(folder: Path, found: Teacher, wanted: Teacher) -> None:
    if found.format_version != FORMAT_VERSION or found.dtype != wanted.dtype:
        raise ValueError(
            f"'{folder}' was written by another version of dms (format {found.format_version}); {_COMMAND} into another folder"
        )
    for what in ("base_hash", "vocab_size", "precision"):
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


def _rows_of(description: Path) -> dict[str, _Place]:
    """A shard's rows; none where it is not as it was written, so that it is written again."""
    shard = description.with_suffix(".safetensors")
    try:
        written = json.loads(description.read_text(encoding="utf-8"))
        is_whole = shard.stat().st_size == written["bytes"]
    except (OSError, ValueError, KeyError):
        return {}
    return {key: _Place(shard, digest) for key, digest in written["rows"].items()} if is_whole else {}


def _is_unfinished(file: Path) -> bool:
    return file.name.startswith(".") and file.suffix == ".new"


def _digest(row: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in row:
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
