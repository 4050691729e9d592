"""Folders to serve. Without vLLM nothing here is collected but test_upstream.py, which says so as one skip."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = find_spec("vllm") is not None
OPTIONS: dict[str, dict] = {
    "one": {"window": 16, "sinks": 4},
    "three": {"window": (8, 24, 64)},
    "next": {"window": 16, "alignment": "next"},
}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not HERE and collection_path.name not in ("test_upstream.py", "serving"):
        return True
    return None


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders(name)`: the embedded model with random gates, as OPTIONS has them by name; or a folder that is there, by its path."""
    from served import make_folder

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            there = name not in OPTIONS
            made[name] = Path(name) if there else make_folder(tmp_path_factory.mktemp(name), **OPTIONS[name])
        return made[name]

    return folder
