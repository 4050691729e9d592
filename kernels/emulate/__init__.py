"""Compiled kernels without a GPU: the PTX that Triton makes for one, run on a CPU.

`emulating` (launching.py) runs the project's own launch functions so. parse.py reads PTX; machine.py runs one program of a kernel, all
threads at a time; instructions.py lists what is emulated, in arithmetic.py, conversion.py, access.py, warps.py, matrices.py and
asynchronous.py; memory.py has the checks. An instruction that is not known is an error that names it.

What is found, as an exception (`Finding`) at the instruction and its line in the kernel's source: accesses out of bounds, misaligned, or to
what nobody has written; products of 32-bit numbers that overflow; two warps that meet in shared memory without a barrier between, one
of them writing; reading what an asynchronous copy or product has not been waited for; warps that take part of themselves where all must;
programs that never end. Programs run in random order, if asked in turns.

What is not: hazards in global memory within a program, the order in which a GPU's memory shows one program's writes to another (fences
do nothing here), proxies' fences, what ptxas makes of the PTX, time.
"""

from emulate.findings import Finding, NotEmulatedError

__all__ = ["Finding", "NotEmulatedError"]
