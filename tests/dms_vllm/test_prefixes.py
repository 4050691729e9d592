"""Which prefix a request begins from, and which goes first."""

import random

import pytest

from dms_vllm import prefixes as module
from dms_vllm.prefixes import Prefixes


@pytest.fixture
def kept():
    prefixes = Prefixes()
    for length in (4, 8, 6):
        assert prefixes.add(range(length), None).tokens == tuple(range(length))
    return prefixes


def test_the_longest_is_found(kept):
    found = lambda tokens, most, salt=None: (prefix := kept.find(tokens, salt, most)) and len(prefix.tokens)  # noqa: E731
    assert found(list(range(20)), 19) == 8
    assert found(list(range(8)), 7) == 6, "the last token's logits are wanted"
    assert found([0, 1, 2, 3, 4, 5, 99, 7, 8], 8) == 6
    assert found(list(range(20)), 3) is None and found([1, 2, 3, 4, 5], 4) is None and found([], 0) is None


def test_those_that_a_step_makes_are_not_found_in_it(kept):
    longest = kept.find(list(range(20)), None, 19)
    assert len(kept.find(list(range(20)), None, 19, besides={longest.name}).tokens) == 6
    assert kept.find(list(range(20)), None, 19, besides=dict.fromkeys(kept.by_name)) is None


def test_other_salts_have_their_own(kept):
    assert kept.find(list(range(9)), "team a", 8) is None
    own = kept.add(range(5), "team a")
    assert kept.find(list(range(9)), "team a", 8) is own and kept.find(list(range(9)), "team b", 8) is None
    assert len(kept.find(list(range(9)), None, 8).tokens) == 8


def test_nothing_is_kept_twice(kept):
    assert kept.add([0, 1, 2, 3], None) is None and len(kept.by_name) == 3
    name = kept.find([0, 1, 2, 3, 50], None, 4).name
    kept.drop(name)
    assert kept.find([0, 1, 2, 3, 50], None, 4) is None
    assert kept.add([0, 1, 2, 3], None).name != name, "what is told of a dropped one must not be taken for it"


def test_the_last_used_goes_last(kept):
    by_length = {len(prefix.tokens): name for name, prefix in kept.by_name.items()}
    assert kept.oldest_first() == [by_length[n] for n in (4, 8, 6)]
    kept.find([0, 1, 2, 3, 77], None, 4)
    assert kept.oldest_first() == [by_length[n] for n in (8, 6, 4)]
    kept.find([77], None, 1)
    kept.add([0, 1, 2, 3, 4, 5], None)
    assert kept.oldest_first() == [by_length[n] for n in (8, 6, 4)], "neither a request without a prefix nor one that is kept is a use"


def test_equal_digests_never_give_others_tokens(monkeypatch):
    monkeypatch.setattr(module, "digests", lambda tokens, salt: (0 for _ in tokens))
    prefixes = Prefixes()
    first = prefixes.add([1, 2], "a")
    assert prefixes.add([3, 4], "a") is None
    assert prefixes.find([3, 4, 5], "a", 2) is None and prefixes.find([1, 2, 5], "b", 2) is None
    assert prefixes.find([1, 2, 5], "a", 2) is first


@pytest.mark.parametrize("seed", range(20))
def test_random_ones_against_a_search_of_all(seed):
    rng, prefixes, plain = random.Random(seed), Prefixes(), {}
    tokens = lambda: [rng.randrange(2) for _ in range(rng.randrange(1, 9))]  # noqa: E731
    for _ in range(200):
        salt, given = rng.choice([None, "a"]), tokens()
        if rng.random() < 0.3 and plain:
            key = rng.choice(sorted(plain, key=str))
            prefixes.drop(plain.pop(key))
        elif rng.random() < 0.5:
            prefix = prefixes.add(given, salt)
            assert (prefix is None) == ((salt, tuple(given)) in plain)
            if prefix is not None:
                plain[salt, tuple(given)] = prefix.name
        else:
            most = rng.randrange(len(given) + 1)
            longest = max((n for n in range(1, most + 1) if (salt, tuple(given[:n])) in plain), default=0)
            found = prefixes.find(given, salt, most)
            assert (found.name if found else None) == plain.get((salt, tuple(given[:longest])))
    assert set(prefixes.oldest_first()) == set(plain.values())
