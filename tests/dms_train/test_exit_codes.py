"""How commands end: a line and an exit code for whatever went wrong, and 0 for what went well wherever its words are printed."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import yaml
from dms_train import cli, exit_codes
from safetensors.torch import save_file

import dms.cache
from dms import errors as faults


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `dms ARGS` in this process -> (exit code, stderr); in place of preparing, the command does what is given."""

    def _run(does, *args):
        monkeypatch.setattr(cli, "prepare", lambda precision: does())
        monkeypatch.setattr(sys, "argv", ["dms", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    return _run


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=120)


# Letters that standard output lacks.

SAYS = r"""
    import sys
    from dms_train import cli, exit_codes
    cli.prepare = lambda precision: print("\xfcber \u2192 \u2713") or sys.exit(0)
    sys.argv = ["dms", "evaluate", "x"]
    cli.main()
"""
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        (C_LOCALE, b"?ber ? ?\n"),
        ({"PYTHONIOENCODING": "ascii"}, b"?ber ? ?\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\xfcber ? ?\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "über → ✓\n".encode()),
        ({"PYTHONIOENCODING": "ascii:backslashreplace"}, b"\\xfcber \\u2192 \\u2713\n"),
    ],
)
def test_letters_that_cannot_be_printed_are_replaced(environment, shown):
    done = python(SAYS, **environment)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr


def test_a_whole_run_is_printed_in_plain_letters(monkeypatch, make_values, tmp_path):
    """Rich's own lines and dots, and ours."""
    recipe, written = tmp_path / "recipe.yaml", io.BytesIO()
    recipe.write_text(yaml.safe_dump(make_values(tmp_path / "rün", steps=2, target_cr=1)))
    monkeypatch.setattr(sys, "argv", ["dms", "retrofit", str(recipe)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.stdout.flush()
    assert end.value.code == 0 and b"wrote " in written.getvalue() and b"/r?n/" in written.getvalue()


def test_the_launcher_prints_what_it_would_run_in_plain_letters():
    code = "from dms_train import launch; import sys; sys.exit(launch.main(['tiny/retrofit', 'output_dir=über', '--dry-run']))"
    done = python(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"'output_dir=?ber'" in done.stdout, done.stderr


# Ctrl-C.


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        (["generate", "x", "--prompt", "y"], False),
        (["retrofit", "tiny/retrofit"], False),
        (["export", "x", "y"], False),
        (["evaluate", "x"], True),
        (["pretrain", "tiny/pretrain"], True),
        (["generate-data", "tiny/generate"], True),
        (["cache-teacher", "tiny/retrofit"], True),
    ],
)
def test_ctrl_c_is_one_line(run, command, goes_on):
    code, err = run(lambda: signal.raise_signal(signal.SIGINT), *command)
    assert code == 130
    assert err.strip() == "dms: interrupted" + ("; the same command continues from what is saved" if goes_on else "")


def test_a_launched_process_ends_by_the_signal_so_that_the_launcher_sees_that_nothing_was_saved():
    code = """
        import signal, sys
        from dms_train import cli, exit_codes
        cli.prepare = lambda precision: signal.raise_signal(signal.SIGINT)
        sys.argv = ["dms", "retrofit", "tiny/retrofit"]
        cli.main()
    """
    done = python(code, DMS_LAUNCHED="1")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("context", "said"),
    [("listening", "saving after this step"), ("ignoring", "all steps are done, and what comes of them is not yet written")],
)
def test_the_second_ctrl_c_ends_at_once(context, said):
    code = f"""
        import signal
        from dms_train import stopping
        with stopping.{context}() as request:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            # What ends here may itself not be stopped.
            with stopping.ignoring():
                print(request and request.signal, flush=True)
                signal.raise_signal(signal.SIGINT)
        print("went on")
    """
    done = python(code)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.decode().split() == ["SIGINT" if context == "listening" else "None"]
    assert done.stderr.decode() == f"\ndms: {said}; Ctrl-C again ends the run at once\n"


def test_ctrl_c_is_as_before_after_the_steps():
    from dms_train.stopping import listening

    with listening():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
    """As a shell has it for what a script runs in the background."""
    code = """
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from dms_train.stopping import listening
        with listening() as request:
            signal.raise_signal(signal.SIGINT)
            print(request.signal)
    """
    assert python(code).stdout.split() == [b"None"]


# Errors that say too little.


@pytest.mark.parametrize(("error", "code", "word"), [(NotImplementedError, 1, "failed"), (ValueError, 2, "error")])
def test_an_error_without_words_says_its_type_and_place(run, error, code, word):
    def wordless():
        raise error

    number = wordless.__code__.co_firstlineno + 1
    found, err = run(wordless, "generate", "x", "--prompt", "y")
    assert found == code
    assert err.startswith(f"dms: {word}: {error.__name__} without a message, at {__file__}:{number} in wordless"), err


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "change the permissions"),
        (errno.EROFS, "choose another place"),
        (errno.EDQUOT, "your quota there is used up"),
    ],
)
def test_what_the_file_system_refuses_is_said_with_path_and_cure(run, number, cure):
    def refused():
        with faults.writing("a/folder"):
            raise OSError(number, os.strerror(number), "a/file")

    code, err = run(refused, "generate", "x", "--prompt", "y")
    assert code == 1 and f"dms: failed: {os.strerror(number)}: a/file; " in err and cure in err


def test_a_full_disk_is_named():
    with pytest.raises(OSError) as caught, faults.writing("a/folder"), open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    assert faults.describe(caught.value) == "No space left on device: a/folder; free space there, or write to another place"
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert f"No space left on device: at {__file__}:" in faults.describe(caught.value)


def test_errors_that_are_not_of_writing_are_not_blamed_on_what_was_written():
    for error in (ConnectionError("the hub cannot be reached"), OSError(errno.EIO, "Input/output error"), RuntimeError("os error")):
        with pytest.raises(type(error)) as caught, faults.writing("metrics.jsonl"):
            raise error
        assert caught.value is error and "metrics" not in faults.describe(error)


def test_full_disks_under_libraries_that_name_no_path(tmp_path, tiny_folder):
    """A limit on the size of files stands in for the disk: the errors are as real, in another number."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda path: save_file({"a": torch.zeros(10_000)}, path), lambda path: tokenizer.save(str(path))):
        with pytest.raises(OSError) as caught, faults.writing(tmp_path / "file"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                write(tmp_path / "file")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))


def test_a_file_that_was_asked_for_on_a_full_disk(run, tiny_folder):
    code, err = run(lambda: None, "plan", "tiny/retrofit", "--config", tiny_folder, "--json", "/dev/full")
    assert code == 1 and "dms: failed: No space left on device: /dev/full; free space there" in err, err


# A tmpfs of our own needs no root where users may have name spaces.
UNSHARE = ["unshare", "--map-root-user", "--mount"]
MAY_MOUNT = shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not MAY_MOUNT, reason="this system lets no user mount a small disk")
def test_a_run_on_a_small_disk(make_values, tmp_path):
    """It is full when the model is written."""
    disk, recipe = tmp_path / "small", tmp_path / "recipe.yaml"
    disk.mkdir()
    recipe.write_text(yaml.safe_dump(make_values(disk / "run", steps=2, target_cr=1)))
    mounted = [*UNSHARE, "sh", "-c", f'mount -t tmpfs -o size=100k tmpfs {disk} && exec "$0" "$@"']
    done = subprocess.run(
        [*mounted, sys.executable, "-m", "dms_train.cli", "retrofit", recipe], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"dms: failed: No space left on device: {disk / 'run'}" in done.stderr, done.stderr


def test_warnings_at_lines_of_ours_are_plain():
    before = warnings.formatwarning
    with exit_codes._plain_warnings():
        ours = [warnings.formatwarning(UserWarning("said"), UserWarning, file, 1) for file in (cli.__file__, dms.cache.__file__)]
        theirs = warnings.formatwarning(UserWarning("said"), UserWarning, __file__, 1)
    assert ours == ["dms: warning: said\n"] * 2 and f"{__file__}:1: UserWarning: said" in theirs
    assert warnings.formatwarning is before
