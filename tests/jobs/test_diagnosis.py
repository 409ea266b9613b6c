import pytest
import torch

from tests.conftest import needs
from w8a8 import kernels
from w8a8.jobs import diagnosis
from w8a8.jobs.diagnosis import diagnose
from w8a8.kernels import compiled, native

pytestmark = pytest.mark.kernels


def test_versions_machine_and_kernels_are_told():
    found = diagnose()
    assert torch.__version__.startswith(found.versions["torch"])  # which may lack the build, as in 2.8.0+cu128
    assert found.machine["processor"]
    assert [k.name for k in found.kernels] == list(kernels.available())
    assert {k.name: k.available for k in found.kernels}["reference"]
    assert ("native kernel runs" in found.machine) == (native.unavailable_because() is None)


@needs("native")
def test_what_the_native_kernel_runs_on_is_told():
    machine = diagnose().machine
    assert machine["native kernel runs"].startswith(compiled.instruction_set())
    assert machine["native kernel's threads"].startswith("openmp")


@needs("native")
def test_whose_attention_runs_between_fused_layers_is_told(monkeypatch):
    for ours, told in ((True, "native"), (False, "PyTorch's")):
        monkeypatch.setattr(compiled, "multiplies_and_adds", lambda ours=ours: ours)
        assert diagnose().machine["attention between fused layers"].startswith(told)


def test_what_is_missing_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(
        kernels, "available", lambda: {"native": "not built", "torch_cpu": "no VNNI", "reference": None}
    )
    monkeypatch.setattr(diagnosis, "_PACKAGES", ("nobodys-package",))
    found = diagnose()
    assert found.versions["nobodys-package"] == "not installed"
    assert (found.kernels[0].available, found.kernels[0].reason) == (False, "not built")
    assert "native kernel runs" not in found.machine


def test_what_the_environment_asks_for_is_told(monkeypatch):
    for name in ("W8A8_KERNEL", "W8A8_ISA", "W8A8_NATIVE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert "the environment says" not in diagnose().machine
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("W8A8_KERNEL", "auto")
    assert diagnose().machine["the environment says"] == "W8A8_KERNEL=auto, OMP_NUM_THREADS=1"


def test_the_processor_is_named_without_linux_too(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis, "Path", lambda _: tmp_path / "nothing")
    assert diagnosis._processor()
