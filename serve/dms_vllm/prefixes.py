"""Which prefixes of requests are kept for others that begin alike, and which of them goes first. Plain Python."""

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Prefix:
    name: str
    salt: str | None
    """Only requests with the same one may begin from it."""
    tokens: tuple[int, ...]
    digest: int


class Prefixes:
    """Prefixes by their tokens, in order of their last use."""

    def __init__(self) -> None:
        self.by_name: OrderedDict[str, Prefix] = OrderedDict()
        self._by_digest: dict[int, Prefix] = {}
        self._names = count()

    def find(self, tokens: Sequence[int], salt: str | None, most: int, besides: Container[str] = ()) -> Prefix | None:
        """The longest that the tokens begin with, of at most so many, and not of the names `besides`; it is then the last used."""
        found = None
        for digest in digests(tokens[:most], salt):
            prefix = self._by_digest.get(digest)
            if (
                prefix is not None
                and prefix.name not in besides
                and prefix.salt == salt
                and prefix.tokens == tuple(tokens[: len(prefix.tokens)])
            ):
                found = prefix
        if found is not None:
            self.by_name.move_to_end(found.name)
        return found

    def add(self, tokens: Sequence[int], salt: str | None) -> Prefix | None:
        """A new prefix of one token or more, the last used; None where these tokens have one."""
        *_, digest = digests(tokens, salt)
        if digest in self._by_digest:
            return None
        prefix = Prefix(f"prefix {next(self._names)}", salt, tuple(tokens), digest)
        self.by_name[prefix.name] = self._by_digest[digest] = prefix
        return prefix

    def drop(self, name: str) -> None:
        del self._by_digest[self.by_name.pop(name).digest]

    def oldest_first(self) -> list[str]:
        """Names, those first whose last use is longest ago."""
        return list(self.by_name)


def digests(tokens: Sequence[int], salt: str | None) -> Iterator[int]:
    """Of the first token, of the first two, and so on."""
    digest = hash(("prefix", salt))
    for token in tokens:
        digest = hash((digest, token))
        yield digest
