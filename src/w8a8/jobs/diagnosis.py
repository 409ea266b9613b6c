"""What `w8a8 doctor` says: versions, processor, kernels."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from w8a8 import kernels
from w8a8._version import __version__
from w8a8.kernels import compiled
from w8a8.kernels.native import NATIVE

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "compressed-tensors", "sentence-transformers")
_VARIABLES = ("W8A8_KERNEL", "W8A8_ISA", "W8A8_NATIVE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class KernelStatus:
    """A kernel, and why it cannot run here, if so."""

    name: str
    about: str
    available: bool
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that decides how a model runs on this machine."""

    versions: dict[str, str]
    machine: dict[str, str]
    kernels: tuple[KernelStatus, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; kernels that need a probe are probed."""
    versions = {"w8a8": __version__, "python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}
    machine = {
        "platform": platform.platform(),
        "processor": _processor(),
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "cores, and threads torch uses": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }
    if asked := [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]:
        machine["the environment says"] = ", ".join(asked)
    if kernels.available()[NATIVE.name] is None:
        sets = compiled.instruction_sets()
        machine["native kernel has"] = ", ".join(name for name, reason in sets.items() if reason is None)
        machine["native kernel has not"] = "; ".join(f"{name}: {reason}" for name, reason in sets.items() if reason)
        machine["native kernel runs"] = _what_runs()
        ours = compiled.multiplies_and_adds()
        machine["attention between fused layers"] = "native" if ours else "PyTorch's: the CPU has no fused multiply-add"
        machine["native kernel prefetches"] = compiled.prefetching()
        machine["native kernel's threads"] = compiled.threading()
    statuses = (
        KernelStatus(name, kernels.KERNELS[name].about, reason is None, reason)
        for name, reason in kernels.available().items()
    )
    return Diagnosis(versions, machine, tuple(statuses))


def _what_runs() -> str:
    forced = os.environ.get("W8A8_ISA")
    if forced:
        return f"{forced}, as W8A8_ISA asks"
    *lines, last = compiled.choices()
    return "".join(f"{c.instruction_set} from {c.rows} rows and K = {c.k}, else " for c in lines) + last.instruction_set


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name, from Linux where the platform module has none."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
