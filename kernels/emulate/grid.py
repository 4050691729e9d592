"""A kernel's programs, in random order, several of them at a time if asked."""

import numpy as np

from emulate.findings import Finding
from emulate.machine import Machine
from emulate.memory import GlobalMemory
from emulate.parse import Program

# Instructions of one program before another's turn.
_LONGEST_TURN = 200


def run_grid(
    program: Program,
    memory: GlobalMemory,
    grid: tuple[int, int, int],
    shared_bytes: int,
    parameters: dict[str, int],
    *,
    seed: int = 0,
    resident: int = 1,
    most_instructions: int = 50_000_000,
) -> int:
    """The number of instructions that were executed, of whole programs. resident: programs that take turns of random length; 1:
    one after the other. The order of programs is random in either case, as `seed` has it.

    Raises:
        Finding: see there; also where programs do not end.
        NotEmulatedError: an instruction that is not known.
    """
    rng = np.random.default_rng(seed)
    x, y, z = grid
    places = [(i % x, i // x % y, i // (x * y)) for i in rng.permutation(x * y * z).tolist()]
    machines = [Machine(program, memory, shared_bytes, parameters) for _ in range(min(resident, len(places)))]
    idle, busy = list(machines), []
    with np.errstate(all="ignore"):
        while places or busy:
            while places and idle:
                busy.append(idle.pop())
                busy[-1].start(places.pop(), grid)
            machine = busy[int(rng.integers(len(busy)))]
            if machine.run(int(rng.integers(1, _LONGEST_TURN)) if resident > 1 else _LONGEST_TURN):
                busy.remove(machine)
                idle.append(machine)
            executed = sum(each.num_executed for each in machines)
            if executed > most_instructions:
                raise Finding(f"{program.name} has not ended after {executed} instructions; programs may wait for each other for ever")
    return sum(each.num_executed for each in machines)
