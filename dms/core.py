"""Not part of this project: where NVIDIA's checkpoints look for their own package, which is named `dms` too.

Their code begins with `from dms.core import ...`. With `trust_remote_code=True` it would fail here without a reason.
"""

raise ImportError(
    "a DMS checkpoint's own code asks for NVIDIA's package dms, and the package dms that is installed is dms-retrofit, which runs such checkpoints "
    "without their code: `dms import CHECKPOINT OUT`, then dms.load(OUT). To run their code, use an environment without dms-retrofit"
)
