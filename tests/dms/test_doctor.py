"""`dms doctor`: every row is filled, a dying bfloat16 matmul is diagnosed, and only required pieces fail the command."""

import json
import resource
import signal
import subprocess
import sys

import pytest

from dms import doctor
from dms.doctor import BFLOAT16_PROBE, DEEPSPEED_PROBE, DEVICE_PROBE, Environment, Ran

DIED, FAST = Ran(-signal.SIGILL), Ran(0, '{"times": 0.4, "has_gpu": false}')
CPU_ALONE = {"cuda": None, "hip": None, "threads": 2, "gpus": []}
WITH_GPU = {"cuda": "13.0", "hip": None, "threads": 2, "gpus": [{"name": "H200", "bytes": 141 * 2**30, "capability": [9, 0]}]}
OPS = {"adam": True, "aio": True}


@pytest.fixture(scope="module")
def collected():
    """The checks of this machine by name, and the processor seconds that they took in processes of their own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {check.name: check for check in doctor.collect()}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def checks(collected):
    return collected[0]


def examine(versions=None, *, devices=None, ops=None, bfloat16=None, variables=None, commands=("c++", "ninja")):
    """The checks, by name, of a machine with these packages, devices and commands.

    devices, ops: what the probes of torch and DeepSpeed print, or how their processes end. bfloat16: how a matmul ends with the variables
    that it was given.
    """
    versions = {"torch": "2.13.0", "transformers": "5.24.0"} if versions is None else versions

    def run(code, added):
        if code == BFLOAT16_PROBE:
            return FAST if bfloat16 is None else bfloat16(added)
        given = {DEVICE_PROBE: CPU_ALONE if devices is None else devices, DEEPSPEED_PROBE: OPS if ops is None else ops}[code]
        return given if isinstance(given, Ran) else Ran(0, f"a warning\n{json.dumps(given)}\nmore\n")

    # The path of a command that exists: the C++ compiler is asked for its version.
    path_of = dict.fromkeys(commands, sys.executable).get
    environment = Environment(variables=variables or {}, version_of=versions.get, path_of=path_of, run=run)
    return {check.name: check for check in doctor.collect(environment)}


def test_this_machine_has_what_is_required(checks):
    for name in ("Python", "torch", "transformers"):
        assert checks[name].status == "ok", checks[name]
        assert checks[name].required


def test_collect_is_quick(collected):
    """Processor time, since waiting says more about the other workers; 5 s as measured, the limit is four times that."""
    assert 0.5 < collected[1] < 20


def test_every_row_says_what_it_costs(checks):
    assert {"CPU", "C++ compiler", "Python headers", "ninja", "bfloat16 matmul (CPU)", "Triton", "DeepSpeed", "wandb", "datasets"} <= set(
        checks
    )
    assert any(check.name.startswith("GPU") for check in checks.values())
    for check in checks.values():
        assert check.found or check.status != "ok", check
        assert check.cost or check.status == "ok", check


def test_bfloat16_agrees_with_the_table(checks):
    works, check = doctor.try_bfloat16(), checks["bfloat16 matmul (CPU)"]
    assert (works is not None) == check.found.startswith("works") and (works is None or 0 < works.times < 1000)


def test_a_dead_probe_does_not_take_us_along():
    assert doctor.run_python("import os, signal; os.kill(os.getpid(), signal.SIGILL)", {}) == DIED


def test_a_probe_gets_its_variables(monkeypatch):
    monkeypatch.setenv("DMS_OTHER", "too")
    ran = doctor.run_python("import os; print(os.environ['DMS_PROBE'], os.environ['DMS_OTHER'])", {"DMS_PROBE": "seen"})
    assert (ran.code, ran.out.strip()) == (0, "seen too")


def test_a_machine_without_anything():
    found = examine({}, commands=())
    assert {name for name, check in found.items() if check.required and check.status == "missing"} == {"torch", "transformers"}
    assert found["lm_eval"].cost == "no `dms evaluate --lm-eval`; pip install 'dms-retrofit[evaluate]'"
    assert found["DeepSpeed"].cost.endswith("; pip install 'dms-retrofit[deepspeed]'")
    assert found["C++ compiler"].status == "missing" and not found["C++ compiler"].required
    assert "apt-get install g++" in found["C++ compiler"].cost
    assert "no fused kernels" in found["Triton"].cost


def test_torch_that_does_not_import():
    found = examine(devices=Ran(1, err="Traceback\nImportError: no libfoo"))["torch"]
    assert (found.status, found.required) == ("missing", True) and "ImportError: no libfoo" in found.found


@pytest.mark.parametrize(
    ("version", "status", "cost"),
    [
        ("2.10.9", "missing", "too old; pip install 'torch>=2.11,<2.15'"),
        ("2.11", "ok", ""),
        ("2.14.0.dev20260101+cu130", "ok", ""),
        ("2.15.0", "warn", "not tested; if anything fails, pip install 'torch>=2.11,<2.15'"),
        ("of our own", "ok", ""),
    ],
)
def test_a_version_beside_those_that_were_tested(distribution, version, status, cost):
    distribution(["torch>=2.11,<2.15"])
    check = examine({"torch": version})["torch"]
    assert check.found.startswith(f"{version} (tested: >=2.11,<2.15)")
    assert (check.status, check.cost) == (status, cost)


def test_devices():
    found = examine(devices=WITH_GPU)
    assert found["torch"].found.endswith("CUDA 13.0")
    assert (found["GPU 0"].found, found["GPU 0"].status) == ("H200, 141 GiB, compute capability 9.0", "ok")
    assert "tiny recipes" in examine()["GPU"].cost
    assert "driver" in examine(commands=("nvidia-smi",))["GPU"].cost


def test_the_amx_trap_is_named_with_its_cure():
    check = examine(bfloat16=lambda variables: FAST if variables == doctor.AMX_CURE else DIED)["bfloat16 matmul (CPU)"]
    assert check.status == "warn"
    assert "SIGILL" in check.found
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16" in check.cost


def test_bfloat16_that_is_emulated():
    check = examine(bfloat16=lambda variables: Ran(0, '{"times": 8.4, "has_gpu": false}'))["bfloat16 matmul (CPU)"]
    assert (check.status, check.found) == ("warn", "works, in 8.4 times the time of float32") and "take 8 times as long" in check.cost
    assert examine()["bfloat16 matmul (CPU)"].status == "ok"


def test_bfloat16_that_nothing_cures():
    check = examine(bfloat16=lambda variables: DIED)["bfloat16 matmul (CPU)"]
    assert check.status == "warn"
    assert "precision=fp32" in check.cost


DEEPSPEED = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_deepspeed_and_its_operators():
    found = examine(DEEPSPEED)
    assert [found[name].status for name in ("DeepSpeed", "DeepSpeedCPUAdam", "NVMe offload")] == ["ok"] * 3
    found = examine(DEEPSPEED, ops={"adam": False, "aio": False})
    assert "no libaio headers" in found["NVMe offload"].found and found["DeepSpeedCPUAdam"].status == "warn"


def test_deepspeed_that_does_not_import_is_a_warning():
    found = examine(DEEPSPEED, ops=Ran(1, err="ImportError: no libfoo"))
    assert found["DeepSpeed"].status == "warn" and "no libfoo" in found["DeepSpeed"].found
    assert "NVMe offload" not in found


def test_deepspeed_without_a_compiler_has_no_offload():
    found = examine(DEEPSPEED, commands=("ninja",))
    assert found["DeepSpeedCPUAdam"].status == found["NVMe offload"].status == "warn"


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_wandb_says_whether_there_is_a_key(tmp_path, key):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {key}\n" if key else "")
    netrc.chmod(0o600)
    found = examine({"wandb": "0.31.0"}, variables={"NETRC": str(netrc)})["wandb"].found
    assert found.endswith("with a key" if key else "no key")
    assert "0000" not in found
    assert examine({"wandb": "0.31.0"}, variables={"WANDB_API_KEY": "1"})["wandb"].found.endswith("with a key")
    assert examine({"wandb": "0.31.0"}, variables={"WANDB_MODE": "offline"})["wandb"].found.endswith("WANDB_MODE=offline")


def test_what_kernels_run_on():
    versions = {"torch": "2.13.0", "triton": "3.6.0"}
    assert examine(versions, devices=WITH_GPU)["Triton"].status == "ok"
    assert "no GPU" in examine(versions)["Triton"].cost
    assert "slow" in examine(versions, variables={"TRITON_INTERPRET": "1"})["Triton"].cost
    check = examine(versions, devices=WITH_GPU, variables={"DMS_KERNELS": "reference"})["Triton"]
    assert check.status == "warn" and "unset it" in check.cost


@pytest.mark.parametrize(("required", "code"), [(True, 1), (False, 0)])
def test_exit_code(capsys, required, code):
    assert doctor.show([doctor.Check(name="part", found="", status="missing", cost="nothing works", required=required)]) == code
    shown = capsys.readouterr()
    assert "part" in shown.out
    assert ("part" in shown.err) == required


def test_import_is_light():
    code = "import sys, dms.doctor; assert not {'torch', 'transformers', 'deepspeed', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
