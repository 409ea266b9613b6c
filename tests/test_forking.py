"""A child of fork quantises and runs, with every kernel; what would hang is killed, and fails."""

import os
import subprocess
import sys

import pytest

from w8a8 import kernels

PREPARE = """
import os, signal, types, torch
from torch import nn
from w8a8.layers.linear import QuantLinear
from w8a8.core.scheme import PerChannel, QuantSpec, Scheme

asymmetric = Scheme(QuantSpec(8, PerChannel(), symmetric=False), Scheme.of("w8a8").activations)
linear, x, big = nn.Linear(512, 512), torch.randn(64, 512), torch.randn(600, 600)

def compute(kernel, *schemes):
    "What is quantised, what is run in integers, and what is float."
    layers = [QuantLinear.from_float(linear, scheme, kernel=kernel) for scheme in schemes]
    return [t for layer in layers for t in (layer.codes, layer.weight_scale, layer(x))] + [big @ big, big.sum(0)]

def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(f, e) for f, e in zip(found, expected))

def in_child(work):
    "Whether work() came to True in a child of this process."
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs is killed, also where its parent was
        done = False
        try:
            done = work()
        finally:
            os._exit(0 if done else 1)
    return os.waitpid(pid, 0)[1] == 0

torch.set_num_threads(2)
"""


def run(code: str) -> list[str]:
    """The lines that the code prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_child_quantises_and_runs_as_its_parent_does_and_so_does_its_own_child():
    code = f"""
def works():
    found = compute(kernel, "w8a8", "w8a8-asym", "w8a8-o2", asymmetric)
    return same(found, expected) and torch.get_num_threads() == 2

for kernel in {list(kernels.KERNELS)}:
    expected = compute(kernel, "w8a8", "w8a8-asym", "w8a8-o2", asymmetric)
    print(kernel, in_child(works), works(), in_child(lambda: works() and in_child(works) and works()))
"""
    assert run(code) == [f"{kernel} True True True" for kernel in kernels.KERNELS]


@pytest.mark.slow
def test_where_proc_is_not_mounted_a_child_computes_too():
    code = """
import pathlib
from w8a8 import forking

read = pathlib.Path.read_text
pathlib.Path.read_text = lambda path, *a, **k: (_ for _ in ()).throw(FileNotFoundError(path))
forking._TASKS = pathlib.Path("/proc_is_not_mounted/self/task")

def works():
    return same(compute("reference", "w8a8"), expected)

expected = compute("reference", "w8a8")
print(in_child(works), in_child(lambda: works() and in_child(works) and works()))
"""
    assert run(code) == ["True True"]


@pytest.mark.slow
def test_where_the_team_cannot_be_let_go_a_child_computes_on_one_thread():
    code = """
from w8a8 import forking

def works():
    return torch.get_num_threads() == 1 and same(compute("reference", "w8a8"), expected)

expected = compute("reference", "w8a8")
for runtime in (types.SimpleNamespace(), types.SimpleNamespace(omp_pause_resource_all=lambda kind: -1)):
    forking._gnu_openmp = lambda: runtime
    print(in_child(works))
"""
    assert run(code) == ["True", "True"]
