"""Compacted caches of system prompts and documents on disk, so that reading one again becomes reading a file.

Files lie in FOLDER/<what made them>/<number of tokens>-<hash of the tokens>.safetensors, as `DMSCache.save` writes them, with a hash of their
contents. Letters: T tokens.
"""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dms.cache.cache import DMSCache
from dms.cache.layer import CompactedLayer
from dms.cache.serialization import UnreadableCache, fingerprint
from dms.hf_compat import cache_argument
from dms.modes import state_of
from dms.placement import compute_device

_SUFFIX = ".safetensors"


class PrefixStore:
    """Caches by what made them: the tokens, the model's weights and gates, windows, dtype and `evict_bias`, and the cache's `page_size` and `kv_dtype`.

    What was used longest ago goes where `max_bytes` would be exceeded. Several processes may share a folder, and any of them may end at any
    moment: a file is there whole or not at all, and one that was damaged is dropped with a warning. Unix alone (flock).

    Args:
        folder: made where it is not there; its files are this store's to delete.
        max_bytes: of all files together. While one is written, there may be as much more as it takes.

    Raises:
        ValueError: a `max_bytes` below 1.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; give the bytes that the store may take, such as 10 * 2**30")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def read(self, model: Any, ids: Sequence[int] | torch.Tensor) -> DMSCache:
        """A cache that has read the tokens [T] or [1, T]: of their longest beginning that is stored, a file, and the rest by the model; it is then
        stored. Go on with it: `model.generate(ids_of_more, past_key_values=cache)`, where ids_of_more begins with these tokens.

        Raises:
            ValueError: no tokens, or those of several sequences.
        """
        tokens = _tokens(ids)
        found = self.get(model, tokens)
        cache, known = (DMSCache(model), 0) if found is None else found
        if known == len(tokens):
            return cache
        # Before the model reads, which may take long: its bias is of now.
        folder = self._folder_of(model, cache)
        rest_1T = torch.tensor([tokens[known:]], device=compute_device(model))
        for part in rest_1T.split(state_of(model).prefill_chunk or rest_1T.shape[1], 1):
            model(input_ids=part, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
        self._put(folder, tokens, cache)
        return cache

    def get(self, model: Any, ids: Sequence[int] | torch.Tensor, **options: Any) -> tuple[DMSCache, int] | None:
        """The cache of the longest beginning of the tokens that is stored, and of how many tokens it is; None: of none.

        options: as of `DMSCache`; with a `page_size` or `kv_dtype`, of caches that have it.

        Raises:
            ValueError: options that `DMSCache` refuses.
        """
        tokens, folder = _tokens(ids), self._folder_of(model, DMSCache(model, **options))
        stored = {path.name for path in folder.glob(f"*{_SUFFIX}")} if folder.is_dir() else set()
        lengths = {int(name.partition("-")[0]) for name in stored}
        names = _names(tokens, sorted(length for length in lengths if length <= len(tokens)))
        for length, name in reversed(names):
            if name not in stored:
                continue
            path = folder / name
            try:
                cache = DMSCache.load(path, model, **options)
            except UnreadableCache as error:
                # Where it is gone, another process made room meanwhile.
                if path.exists():
                    warnings.warn(f"dropped from the prefix store: {error}", stacklevel=2)
                    path.unlink(missing_ok=True)
                continue
            _touch(path)
            return cache, length
        return None

    def put(self, model: Any, ids: Sequence[int] | torch.Tensor, cache: DMSCache) -> bool:
        """Store the cache of one sequence, which has read these tokens and no others, with the `evict_bias` that the model has now. False, with a
        warning: it alone exceeds `max_bytes`.

        Raises:
            ValueError: a cache of several sequences, or of other tokens than so many.
        """
        tokens = _tokens(ids)
        held = cache.get_seq_length()
        if cache.batch_size != 1 or held != len(tokens):
            raise ValueError(
                f"the cache has {cache.batch_size} sequences of {held} tokens, and {len(tokens)} tokens were given; store a cache of one sequence "
                "when it has read just these"
            )
        return self._put(self._folder_of(model, cache), tokens, cache)

    def _put(self, folder: Path, tokens: list[int], cache: DMSCache) -> bool:
        ((_, name),) = _names(tokens, [len(tokens)])
        path = folder / name
        with self._locked():
            self._sweep()
            if path.exists():
                _touch(path)
                return True
            folder.mkdir(exist_ok=True)
            cache.save(path)
            if path.stat().st_size > self.max_bytes:
                size = path.stat().st_size
                path.unlink()
                warnings.warn(
                    f"not stored: the cache of {len(tokens)} tokens takes {size} bytes, and max_bytes is {self.max_bytes}", stacklevel=3
                )
                return False
            self._make_room(path)
        return True

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, _, size in self._files())

    def _folder_of(self, model: Any, cache: DMSCache) -> Path:
        """Of what this model reads into caches of this one's kind."""
        state = state_of(model)
        layer = next(layer for layer in cache.layers if isinstance(layer, CompactedLayer))
        made_by = {
            "model": fingerprint(state),
            "dms": state.config.to_dict(),
            "page_size": layer.page_size,
            "kv_dtype": layer.kv_dtype,
            "evict_bias": state.evict_bias,
        }
        return self.folder / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]

    def _files(self) -> list[tuple[int, Path, int]]:
        """Time of the last use in ns, path and bytes of each, the oldest first."""
        found = []
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, path, status.st_size))
        return sorted(found)

    def _make_room(self, newest: Path) -> None:
        files = self._files()
        total = sum(size for _, _, size in files)
        for _, path, size in files:
            if total <= self.max_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size

    def _sweep(self) -> None:
        """What writers that ended in the middle have left: whoever holds the lock is the only one that writes."""
        for path in self.folder.glob("*/.*.unfinished"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A process that ends lets it go, however it ends.
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _tokens(ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(ids, torch.Tensor):
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1:
            raise ValueError(f"the tokens have shape {list(ids.shape)}; give those of one sequence, [T] or [1, T]")
        ids = ids.tolist()
    if not len(ids):
        raise ValueError("there are no tokens; give at least one")
    return [int(token) for token in ids]


def _names(tokens: list[int], lengths: list[int]) -> list[tuple[int, str]]:
    """Rising lengths, and the file name of each so long beginning of the tokens."""
    digest, before, names = hashlib.sha256(), 0, []
    for length in lengths:
        digest.update(b"".join(token.to_bytes(8, "little") for token in tokens[before:length]))
        before = length
        names.append((length, f"{length}-{digest.hexdigest()[:32]}{_SUFFIX}"))
    return names


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:
        return
