"""`dms doctor`: every row is filled, a dying bfloat16 matmul is diagnosed, and only required pieces fail the command."""

import os
import resource
import subprocess
import sys

import pytest

from dms import doctor

SIGILL = -4


@pytest.fixture(scope="module")
def collected():
    """The checks by name, and the processor seconds that they took in processes of their own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {check.name: check for check in doctor.collect()}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def checks(collected):
    return collected[0]


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


def test_bfloat16_probe_agrees_with_the_table(checks):
    assert doctor.bfloat16_works() == (checks["bfloat16 matmul (CPU)"].status == "ok")


@pytest.mark.skipif(not hasattr(os, "kill"), reason="needs signals")
def test_a_dead_probe_does_not_take_us_along():
    code, _, _ = doctor._run("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert code == SIGILL


def test_the_amx_trap_is_named_with_its_cure(monkeypatch):
    def run(code, env=None):
        return (0, "", "") if (env or {}).get("ONEDNN_MAX_CPU_ISA") == "AVX512_CORE_FP16" else (SIGILL, "", "")

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(doctor, "_run", run)
    check = doctor._bfloat16()
    assert check.status == "warn"
    assert "SIGILL" in check.found
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16" in check.cost
    assert not doctor.bfloat16_works()
    assert doctor.bfloat16_works(doctor.AMX_CURE)


def test_bfloat16_that_nothing_cures(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda code, env=None: (SIGILL, "", ""))
    check = doctor._bfloat16()
    assert check.status == "warn"
    assert "precision=fp32" in check.cost


def test_the_probe_passes_variables_on():
    code, out, _ = doctor._run("import os; print(os.environ['DMS_PROBE'])", {"DMS_PROBE": "seen"})
    assert (code, out.strip()) == (0, "seen")
    assert "DMS_PROBE" not in os.environ


def test_answer_is_found_among_noise():
    assert doctor._answer((0, 'a warning\n{"adam": true}\nmore\n', "")) == {"adam": True}
    assert doctor._answer((1, "", "Traceback\nImportError: no libfoo")) == {"error": "ImportError: no libfoo"}


def test_deepspeed_that_does_not_import_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.19.8")
    (check,) = doctor._deepspeed({"error": "ImportError: no libfoo"}, can_build=True)
    assert check.status == "warn"
    assert "no libfoo" in check.found


def test_deepspeed_without_a_compiler_has_no_offload(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.19.8")
    _, adam, nvme = doctor._deepspeed({"adam": True, "aio": True}, can_build=False)
    assert adam.status == nvme.status == "warn"


def test_no_compiler_is_missing_but_not_required(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor._compiler()
    assert check.status == "missing"
    assert "apt-get install g++" in check.cost
    assert not check.required


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
def test_a_version_beside_those_that_were_tested(monkeypatch, distribution, version, status, cost):
    distribution(["torch>=2.11,<2.15"])
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    check = doctor._package("torch", "nothing runs without it", required=True)
    assert (check.found, check.status, check.cost) == (f"{version} (tested: >=2.11,<2.15)", status, cost)


def test_what_is_not_installed_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert doctor._package("lm_eval", "no tasks").cost == "no tasks; pip install 'dms-retrofit[evaluate]'"
    assert doctor._deepspeed(None, can_build=True)[0].cost.endswith("; pip install 'dms-retrofit[deepspeed]'")


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_wandb_says_whether_there_is_a_key(monkeypatch, tmp_path, key):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "installed", lambda name: "0.31.0")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {key}\n" if key else "")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    found = doctor._wandb().found
    assert found.endswith("with a key" if key else "no key")
    assert "0000" not in found


@pytest.mark.parametrize(("required", "code"), [(True, 1), (False, 0)])
def test_exit_code(monkeypatch, capsys, required, code):
    rows = [doctor.Check(name="part", found="", status="missing", cost="nothing works", required=required)]
    monkeypatch.setattr(doctor, "collect", lambda: rows)
    assert doctor.main() == code
    shown = capsys.readouterr()
    assert "part" in shown.out
    assert ("part" in shown.err) == required


def test_import_is_light():
    code = "import sys, dms.doctor; assert not {'torch', 'transformers', 'deepspeed', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_that_are_turned_off_are_said(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "3.6.0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    gpu = {"gpus": [{"name": "H200"}]}
    monkeypatch.delenv("DMS_KERNELS", raising=False)
    assert doctor._triton(gpu).status == "ok"
    monkeypatch.setenv("DMS_KERNELS", "reference")
    check = doctor._triton(gpu)
    assert check.status == "warn" and "unset it" in check.cost
