"""Every shape that is measured: the one list that the benchmarks, the table and their tests read."""

from dataclasses import dataclass, replace

# Heads and sizes of the models that shapes are named after. The small one has 7 query heads to a KV head.
MODELS = {
    "8B": {"Hq": 32, "H": 8, "D": 128, "M": 4096, "V": 151936},
    "1.7B": {"Hq": 16, "H": 8, "D": 128, "M": 2048, "V": 151936},
    "small": {"Hq": 14, "H": 2, "D": 64, "M": 896, "V": 151936},
}
# Names of competitors that are this project's begin so: "ours, int8 pages", and of the one that others are compared with "ours" or "ours: more".
_OURS = "ours"
OPERATIONS = ("attention", "prefill", "decode", "append", "loss")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One case. tokens: of a sequence (attention, prefill), in the cache (decode, append), or in all (loss). ratio: tokens
    per token kept beyond the last window, as a mean over heads; with several windows those that are not kept leave by each window alike. quick: in the short list too."""

    operation: str
    model: str
    tokens: int
    Hq: int
    H: int
    D: int
    M: int
    V: int
    batch: int = 1
    ratio: float = 1.0
    window: int = 512
    longer: tuple[int, ...] = ()
    """with several windows those after the first"""
    documents: int = 1
    """packed in a row, of unequal lengths"""
    page: int = 64
    beta: float = 0.0
    chunk: int = 2048
    quick: bool = False

    @property
    def name(self) -> str:
        tokens = f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)
        if self.operation == "loss":
            return f"{self.model} {tokens} x {self.V} x {self.M} beta {self.beta:g}"
        name = f"{self.model} batch {self.batch} {tokens} CR {self.ratio:g}"
        if self.longer:
            name += f" windows {','.join(map(str, self.windows))}"
        return name if self.documents == 1 else f"{name} {self.documents} documents"

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window, *self.longer)

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def document_lengths(self) -> list[int]:
        """Of a row: the first has half of the tokens, the second half of what is left, and so on; what is left at last, the last three share."""
        lengths, left = [], self.tokens
        for number in range(self.documents, 0, -1):
            lengths.append(left // 2 if number > 3 else left // number)
            left -= lengths[-1]
        return lengths

    def causal_pairs(self) -> int:
        """Of a query and a key of its document not after it, in one head of one row."""
        return sum(length * (length + 1) // 2 for length in self.document_lengths())

    def small(self) -> "Shape":
        """What stands for it where results are compared with float64 ones: all heads, but few tokens."""
        few = {
            "attention": {"tokens": 1000},
            "prefill": {"tokens": 1500},
            "decode": {"tokens": 2000, "batch": min(self.batch, 3)},
            "append": {"tokens": 600, "batch": min(self.batch, 3)},
            "loss": {"tokens": 700, "V": 20011, "M": 512, "chunk": 256},
        }
        return replace(self, **few[self.operation], **self._narrow(8, 24, 128), quick=False)

    def _narrow(self, *windows: int) -> dict:
        """As many windows as before; of one, the last of these."""
        few = windows[-len(self.windows) :]
        return {"window": few[0], "longer": few[1:]}

    def tiny(self) -> "Shape":
        """As small as it still has all its parts: for a CPU."""
        few = {"tokens": 90, **self._narrow(2, 5, 8), "batch": min(self.batch, 2), "Hq": self.Hq // self.H * 2, "H": 2, "D": 16}
        return replace(self, **few, page=16, M=24, V=101, chunk=32, quick=False)


def is_ours(competitor: str) -> bool:
    return competitor.replace(":", ",").split(",")[0] == _OURS


def is_main(competitor: str) -> bool:
    return competitor.split(":")[0] == _OURS


def _shape(operation: str, model: str, tokens: int, **options) -> Shape:
    return Shape(operation=operation, model=model, tokens=tokens, **MODELS[model], **options)


def _sequences(operation: str) -> list[Shape]:
    quick = {(32, 8), (32, 1)} if operation == "attention" else {(32, 8)}
    found = [
        _shape(operation, "8B", 1024 * length, ratio=ratio, quick=(length, ratio) in quick)
        for length in (32, 8, 16, 4, 64)
        for ratio in (8, 1, 4, 16)
    ]
    if operation == "attention":
        # As models are trained: gates that choose how long an entry stays, and several documents in a row.
        found.insert(2, _shape(operation, "8B", 1024 * 32, ratio=8, window=32, longer=(128, 512), quick=True))
        found.insert(3, _shape(operation, "8B", 1024 * 32, ratio=8, documents=8, quick=True))
    return found + [_shape(operation, model, 1024 * 16, ratio=8) for model in ("1.7B", "small")]


def _decode() -> list[Shape]:
    cases = [(1, 32, 8), (64, 32, 8), (1, 32, 1), (1, 8, 8), (1, 128, 8), (8, 32, 8), (16, 32, 4), (256, 8, 8), (256, 32, 16)]
    cases += [(64, 8, 4), (64, 32, 1), (32, 128, 16), (8, 128, 4), (4, 8, 16)]
    found = [
        _shape("decode", "8B", 1024 * length, batch=batch, ratio=ratio, quick=(batch, length, ratio) in {(1, 32, 8), (64, 32, 8)})
        for batch, length, ratio in cases
    ]
    found.insert(2, _shape("decode", "8B", 1024 * 32, batch=64, ratio=8, window=32, longer=(128, 512), quick=True))
    return found + [_shape("decode", model, 1024 * 32, batch=batch, ratio=8) for model in ("1.7B", "small") for batch in (1, 64)]


def _append() -> list[Shape]:
    return [_shape("append", "8B", 1024 * 32, batch=batch, ratio=8, quick=batch in (1, 64)) for batch in (1, 64, 8, 256)]


def _loss() -> list[Shape]:
    full = [_shape("loss", "8B", 1024 * 32, beta=beta, quick=beta == 0) for beta in (0.0, 0.5, 1.0)]
    return [*full, _shape("loss", "8B", 1024 * 4), _shape("loss", "1.7B", 1024 * 32)]


def all_shapes() -> list[Shape]:
    """The quick ones first, so that a budget cuts off what matters least."""
    found = [*_decode(), *_append(), *_loss(), *_sequences("prefill"), *_sequences("attention")]
    return [shape for shape in found if shape.quick] + [shape for shape in found if not shape.quick]
