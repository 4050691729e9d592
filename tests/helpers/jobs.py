"""Runs in processes of their own, to be cut off at will."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml


def read_metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be in the writing.
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Job:
    """`dms retrofit` of a recipe in processes of its own: alone, or several through the launcher."""

    def __init__(self, values: dict, processes: int = 1, *arguments: str):
        self.folder = Path(values["output_dir"])
        recipe = self.folder.with_name(f"{self.folder.name}.yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(values))
        alone = ["dms_train.cli", "retrofit", str(recipe)]
        command = [sys.executable, "-m", *(alone if processes == 1 else ["dms_train.launch", str(recipe), "--gpus", str(processes)])]
        # The same number of threads everywhere, or sums come out in another order.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
        self.log = recipe.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_for_step(self, step: int, timeout: float = 180.0) -> None:
        deadline = time.monotonic() + timeout
        while len(read_metrics(self.folder)) < step:
            assert self.process.poll() is None, f"ended before step {step}: {self.output}"
            assert time.monotonic() < deadline, f"no step {step} in time: {self.output}"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> "Job":
        self.process.send_signal(number)
        return self

    def wait(self, timeout: float = 300.0) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def ranks(self) -> dict[int, int]:
        """The launcher's processes: their numbers by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {int(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0]): int(pid) for pid in children}


def trajectory(folder):
    return [(m["step"], m["loss"], m["grad_norm"], m["cr_decided"], m["tokens"]) for m in read_metrics(folder)]
