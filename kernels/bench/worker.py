"""One operation's process: takes jobs as lines of JSON, answers each with lines of JSON, the last {"done": true}.

`python -m bench.worker OPERATION`. A crash ends this process and nothing else; `bench.children` holds the other end.
"""

import faulthandler
import json
import os
import signal
import sys

from bench import dry
from bench.shapes import Shape

_POISONED = 3


def main() -> int:
    # What libraries print on standard output must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    # Where it was goes to standard error: at a crash, and when the parent asks because this takes too long.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    operation = sys.argv[1]
    faults, work = dry.Faults(operation), _work()

    def answer(**values) -> None:
        answers.write(json.dumps(values) + "\n")

    def answer_and_go_on(problem: str | None, poisoned: bool, **values) -> None:
        """Ends this process, for another to go on, where nothing after this failure could be right."""
        answer(**values)
        if problem and (poisoned or not work.is_alive()):
            # Without what libraries would still ask of the GPU.
            os._exit(_POISONED)

    problem = work.no_device()
    answer(machine=None if problem else work.machine(), problem=problem)
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "nothing":
            pass
        elif job["do"] == "ceilings":
            faults.reach("ceilings")
            answer(ceilings=work.ceilings())
        elif job["do"] == "check":
            shape = Shape(**job["shape"])
            found, fault = work.check(shape), faults.reach("check")
            if fault:
                found = {"error": 1.0, "problem": f"parity: planted, at {shape.name}"}
            answer_and_go_on(found["problem"], fault == "poison", check=found)
        else:
            shape, planted = Shape(**job["shape"]), []

            def before(name: str, side: str = job["side"], planted: list = planted) -> None:
                answer(begins=name)
                planted.append(faults.reach(side))

            for result in work.time(shape, job["side"], compare=job["compare"], skip=job["skip"], before=before):
                if poisoned := planted[-1] == "poison":
                    result |= {"ms": None, "problem": "RuntimeError: planted"}
                answer_and_go_on(result["problem"], poisoned, result=result)
        answer(done=True)
    return 0


def _work():
    mode = dry.mode()
    if mode == "fake":
        return dry.Fake()
    # Rather no row than one of plain PyTorch under the kernels' name.
    os.environ["DMS_KERNELS"] = "triton" if mode is None else "reference"
    from bench.run import Measurement

    if mode is None:
        return Measurement()
    import time

    import torch

    def measure(competitor, calls) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e3 * (time.perf_counter() - start) / len(calls)

    torch.set_num_threads(1)
    return Measurement("cpu", torch.float32, measure)


if __name__ == "__main__":
    sys.exit(main())
