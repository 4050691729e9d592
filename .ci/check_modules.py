"""Imports every module of the installed project. With the base dependencies alone all of inference must import; others may lack what an
extra brings, and nothing else."""

import importlib
import pkgutil
import sys

import dms_train

import dms
import dms_kernels
import dms_vllm

# Module -> the packages that it may lack. What is not named here is inference, and the command line.
MAY_LACK = {
    "dms_train": {"accelerate"},
    "dms.report": {"matplotlib"},
    "dms.evaluation.engine.lm_eval_model": {"lm_eval"},
    "dms_vllm": {"vllm", "prometheus_client"},
    "dms_kernels": {"triton"},
}


def lacking(name: str) -> str | None:
    """The package that a module cannot be imported for."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(missing, ModuleNotFoundError):
            raise
        return missing.name.split(".")[0]
    return None


# What says that it is not what was looked for.
REFUSES = {"dms.core"}

packages = (dms, dms_train, dms_vllm, dms_kernels)
names = sorted({found.name for package in packages for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")} - REFUSES)
lack = {name: package for name in names if (package := lacking(name))}
wrong = {
    name: package
    for name, package in lack.items()
    if not any(package in allowed and f"{name}.".startswith(f"{prefix}.") for prefix, allowed in MAY_LACK.items())
}
print(f"{len(names)} modules; cannot be imported: {lack}")
if wrong:
    sys.exit(f"modules that need more than the base dependencies: {wrong}")
