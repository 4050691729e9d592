"""Documents that can be told apart, files that hold them, and what micro-batches hold of them."""

import bz2
import gzip
import lzma
from random import Random


def texts(count, seed=0, low=3, high=60):
    """Documents of different lengths, none like another."""
    rng = Random(seed)
    return [f"document {seed}.{number} " + "word " * rng.randint(low, high) for number in range(count)]


def compress(path, content):
    """Write bytes as the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESSED[path.suffix.removeprefix(".")](content))
    return path


def _zstd(content):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as opened:
        opened.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd}


def documents_of(batches):
    """The pieces of micro-batches: (ids, whether each token's prediction counts), padding left out."""
    found = []
    for batch in batches:
        for ids, segment, counted in zip(batch["input_ids"], batch["segment_ids"], batch["loss_mask"], strict=True):
            for number in range(1, int(segment.max()) + 1):
                inside = segment == number
                found.append((tuple(ids[inside].tolist()), tuple(counted[inside].tolist())))
    return found
