"""The launch scripts, by what they would run: their dry runs, and SLURM with stand-ins for its commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "scripts" / "slurm.sbatch"
BIN = Path(sys.executable).parent
# Against a hang only; nothing here takes as long unless the machine is overloaded.
DEADLINE = 90


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run a script without set-up, on a machine without GPUs and SLURM unless variables otherwise."""
    hidden = {name for name in os.environ if name.startswith("SLURM_")} | {"OMP_NUM_THREADS", "DS_ACCELERATOR"}
    base = {name: value for name, value in os.environ.items() if name not in hidden}
    base |= {"DMS_SKIP_SETUP": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def _run(script: str | Path, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "scripts" / script), *args]
        return subprocess.run(
            command, cwd=tmp_path, env=base | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
        )

    return _run


def processes(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the command of each line of a dry run."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "env"
        variables = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        found.append((variables, words))
    return found


def expected(rank: int, *, local_rank: int, per_node: int, node_rank: int = 0, nodes: int = 1, host: str = "127.0.0.1", port: str) -> dict:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(per_node * nodes),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(node_rank),
        "NODE_RANK": str(node_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "DMS_LAUNCHED": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // per_node)),
        "DS_ACCELERATOR": "cpu",
    }


def retrofit(*args: str) -> list[str]:
    return ["-m", "dms_train.cli", "retrofit", *args]


@pytest.mark.parametrize("order", ["before", "after"])
def test_launch_node_dry_run(run_script, order):
    options, words = ["--gpus", "2", "--dry-run"], ["tiny/retrofit", "output_dir=a run", "target_cr=8"]
    done = run_script("launch_node.sh", *(options + words if order == "before" else words + options))
    assert done.returncode == 0, done.stderr
    found = processes(done.stdout)
    port = found[0][0]["MASTER_PORT"]
    assert [variables for variables, _ in found] == [expected(rank, local_rank=rank, per_node=2, port=port) for rank in range(2)]
    assert all(command[1:] == retrofit(*words) for _, command in found)
    assert Path(found[0][1][0]).name.startswith("python")


def test_what_is_set_stays_set(run_script):
    done = run_script("launch_node.sh", "--dry-run", "tiny/retrofit", OMP_NUM_THREADS="7", DS_ACCELERATOR="xpu")
    ((variables, _),) = processes(done.stdout)
    assert (variables["OMP_NUM_THREADS"], variables["DS_ACCELERATOR"]) == ("7", "xpu")
    assert "no GPU seen: one process" in done.stderr


def test_with_gpus_there_is_a_process_for_each(run_script):
    found = processes(run_script("launch_node.sh", "--dry-run", "tiny/retrofit", CUDA_VISIBLE_DEVICES="4,5,6").stdout)
    assert [variables["LOCAL_RANK"] for variables, _ in found] == ["0", "1", "2"]
    assert "DS_ACCELERATOR" not in found[0][0]


def test_launch_multinode_dry_run(run_script):
    where = ["--nodes", "3", "--node-rank", "2", "--host", "head", "--port", "29500"]
    done = run_script("launch_multinode.sh", *where, "tiny/retrofit", "--gpus", "2", "--dry-run", "steps=3")
    assert done.returncode == 0, done.stderr
    found = processes(done.stdout)
    shape = dict(per_node=2, node_rank=2, nodes=3, host="head", port="29500")
    assert [variables for variables, _ in found] == [expected(4 + i, local_rank=i, **shape) for i in range(2)]
    assert all(command[1:] == retrofit("tiny/retrofit", "steps=3") for _, command in found)


def srun_command(*, nodes: str, host: str, port: str, cpus: str, words: list[str]) -> list[str]:
    return [
        *("env", "DMS_SKIP_SETUP=1", "srun", "--kill-on-bad-exit=0", "--wait=0", f"--cpus-per-task={cpus}"),
        *("bash", "-c", 'exec "$0" "$@" --node-rank "$SLURM_NODEID"', str(ROOT / "scripts" / "launch_multinode.sh"), words[0]),
        *("--nodes", nodes, "--host", host, "--port", port, "resume=auto", *words[1:]),
    ]


@pytest.mark.parametrize("order", ["before", "after"])
def test_slurm_dry_run_outside_slurm(run_script, order):
    words = ["tiny/retrofit", "output_dir=a 'run'", "save.at_cr=[2]"]
    done = run_script("slurm.sbatch", *(["--dry-run", *words] if order == "before" else [*words, "--dry-run"]))
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == srun_command(nodes="2", host="FIRST_HOST", port="10000", cpus="64", words=words)


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol, the script where SLURM puts it, and the variables of a job."""
    tools, spool = tmp_path / "bin", tmp_path / "spool" / "job12345"
    tools.mkdir()
    spool.mkdir(parents=True)
    shutil.copy(SBATCH, spool / "slurm_script")
    # As on the second node: drops its own options, and has the launcher print what it would start.
    srun = 'while [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=1 "$@" --dry-run --gpus 2 || exit\nexit "${SRUN_CODE:-0}"'
    scontrol = f'if [[ "$1" == show ]]; then printf "n7\\nn8\\n"; else echo "$*" >> "{tmp_path}/requeued"; fi'
    for name, body in (("srun", srun), ("scontrol", scontrol)):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    env = {
        "PATH": f"{tools}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    return spool / "slurm_script", env


def test_slurm_dry_run_in_a_job(run_script, slurm):
    script, env = slurm
    done = run_script(script, "--dry-run", "tiny/retrofit", **env)
    assert shlex.split(done.stdout) == srun_command(nodes="2", host="n7", port="14690", cpus="16", words=["tiny/retrofit"])


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("75", True), ("137", False)])
def test_a_slurm_job_that_stopped_after_saving_queues_itself_again(run_script, slurm, tmp_path, code, requeued):
    script, env = slurm
    done = run_script(script, "tiny/retrofit", "steps=3", **env, SRUN_CODE=code)
    assert done.returncode == int(code), done.stderr
    shape = dict(per_node=2, node_rank=1, nodes=2, host="n7", port="14690")
    found = processes(done.stdout)
    assert [variables for variables, _ in found] == [expected(2 + i, local_rank=i, **shape) for i in range(2)]
    assert found[0][1][1:] == retrofit("tiny/retrofit", "resume=auto", "steps=3")
    record = tmp_path / "requeued"
    assert (record.read_text() if record.exists() else "") == ("requeue 12345\n" if requeued else "")


def test_slurm_reads_the_directives():
    """SLURM stops looking for them at the first command."""
    text = SBATCH.read_text()
    head = text[: text.index("set -euo")]
    assert text.count("\n#SBATCH ") == head.count("\n#SBATCH ")
    for directive in ("--requeue", "--open-mode=append", "--signal=USR1@120", "--ntasks-per-node=1"):
        assert f"\n#SBATCH {directive}\n" in head


@pytest.mark.parametrize("script", ["launch_node.sh", "launch_multinode.sh", "slurm.sbatch"])
@pytest.mark.parametrize("args", [(), ("tiny/retrofit", "--gpuss", "2"), ("--dry-run",), ("--help",)])
def test_a_wrong_call_prints_the_usage(run_script, script, args):
    done = run_script(script, *args)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("usage: ") and f"scripts/{script}" in done.stderr


def test_a_slurm_script_outside_slurm_says_what_to_do(run_script):
    done = run_script("slurm.sbatch", "tiny/retrofit")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_the_slurm_script_is_executable_and_parses():
    assert os.access(SBATCH, os.X_OK)
    subprocess.run(["bash", "-n", SBATCH], check=True)
