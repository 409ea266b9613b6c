"""Which kernel runs, and what is told where another one was asked for."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import needs
from w8a8 import kernels
from w8a8.errors import KernelError
from w8a8.kernels import compiled, select
from w8a8.layers.linear import QuantLinear

pytestmark = pytest.mark.kernels
_CACHES = (select.preference, select.unavailable_because, select._usable, select._warn_once)


def layer(**options):
    return QuantLinear.from_float(nn.Linear(100, 33), **options)


@pytest.fixture(autouse=True)
def _asked_anew():
    """What is found out once per process is found out once per test."""
    for cached in _CACHES:
        cached.cache_clear()
    yield
    for cached in _CACHES:
        cached.cache_clear()


@pytest.fixture
def missing(monkeypatch):
    """Call with reasons by name: these kernels are not here, the others are."""

    def set_reasons(**reasons: str) -> None:
        monkeypatch.setattr(select, "unavailable_because", reasons.get)

    monkeypatch.delenv("W8A8_KERNEL", raising=False)
    return set_reasons


def test_the_order_is_the_same_on_every_processor(monkeypatch):
    monkeypatch.delenv("W8A8_KERNEL", raising=False)
    assert list(kernels.available()) == list(kernels.KERNELS) == ["native", "torch_cpu", "reference"]
    assert kernels.available()["reference"] is None


@pytest.mark.skipif(os.environ.get("W8A8_NATIVE") == "0", reason="W8A8_NATIVE is 0")
def test_what_was_compiled_can_run():
    """Else all tests of the native kernel would skip, and nobody would look why."""
    if list(Path(compiled.__file__).parent.glob("_native*.so")):
        assert kernels.available()["native"] is None


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_the_environment_says_what_auto_means(monkeypatch, missing, name):
    missing()
    monkeypatch.setenv("W8A8_KERNEL", name)
    assert next(iter(kernels.available())) == kernels.first_choice("auto") == name
    assert sorted(kernels.available()) == sorted(kernels.KERNELS)


@pytest.mark.parametrize("name", ["torch_cpu", "reference"])
def test_a_layer_runs_what_the_environment_says_and_one_that_names_its_kernel_runs_that(monkeypatch, name):
    if (reason := kernels.available()[name]) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("W8A8_KERNEL", name)
    select.preference.cache_clear()
    select._usable.cache_clear()
    q, named = layer(), layer(kernel="reference")
    q(torch.randn(2, 100))
    named(torch.randn(2, 100))
    assert q.packed_weight is None
    assert q.kernel_calls() == {name: 1}
    assert named.kernel_calls() == {"reference": 1}


@pytest.mark.parametrize("value", ["", "auto"])
def test_no_wish_in_the_environment_is_the_order_of_the_registry(monkeypatch, value):
    monkeypatch.setenv("W8A8_KERNEL", value)
    assert select.preference() == tuple(kernels.KERNELS)


@pytest.mark.once
def test_a_wrong_name_in_the_environment_lists_the_right_ones():
    code = "from torch import nn; from w8a8.layers.linear import QuantLinear; QuantLinear.from_float(nn.Linear(4, 4))"
    environment = {**os.environ, "W8A8_KERNEL": "natve"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert (
        "KernelError: the environment variable W8A8_KERNEL is 'natve', which is no kernel (closest: native); "
        "set it to 'auto', native, torch_cpu, reference, or not at all"
    ) in done.stderr


def test_the_choice_of_the_environment_that_is_not_here_is_told_once(monkeypatch, missing):
    missing(torch_cpu="no VNNI", native="not built")
    monkeypatch.setenv("W8A8_KERNEL", "torch_cpu")
    with pytest.warns(UserWarning, match=r"'torch_cpu' cannot run \(no VNNI\)"):
        q = layer()
    layer()(torch.randn(2, 100))  # a second warning would be an error here
    q(torch.randn(2, 100))
    assert q.kernel_calls() == {"reference": 1}


def test_what_was_not_asked_for_is_not_missed(monkeypatch, missing):
    missing(native="not built")
    monkeypatch.setenv("W8A8_KERNEL", "reference")
    q = layer()  # a warning would be an error here
    q(torch.randn(2, 100))
    assert q.kernel_calls() == {"reference": 1}


def test_strict_raises_where_the_kernel_cannot_run(missing):
    missing(torch_cpu="no VNNI", native="not built")
    for name, reason in (("torch_cpu", "no VNNI"), ("native", "not built")):
        q = layer(kernel=name, strict=True)
        with pytest.raises(KernelError, match=f"{name!r} was asked for with strict=True and cannot run: {reason}"):
            q(torch.randn(2, 100))
        assert q.kernel_calls() == {}


def test_without_strict_another_runs_with_one_warning_and_the_ledger_says_which(missing):
    missing(torch_cpu="no VNNI", native="not built")
    q = layer(kernel="torch_cpu")
    with pytest.warns(UserWarning, match=r"'torch_cpu' cannot run \(no VNNI\)"):
        q(torch.randn(2, 100))
    q(torch.randn(2, 100))  # a second warning would be an error here
    assert q.kernel_calls() == {"reference": 2}


def test_auto_takes_the_next_kernel_and_warns_once_that_the_native_one_is_missing(missing):
    missing(torch_cpu="no VNNI", native="not built")
    with pytest.warns(UserWarning, match=r"'native' cannot run \(not built\)"):
        q = layer()
    layer()(torch.randn(2, 100))  # a second warning would be an error here
    q(torch.randn(2, 100))
    assert q.kernel_calls() == {"reference": 1}
    assert q.packed_weight is None
    assert "kernel=reference (auto)" in repr(q)


def test_an_unknown_kernel_lists_the_known():
    with pytest.raises(KernelError, match=r"unknown kernel 'torch_gpu' \(closest: torch_cpu\)"):
        layer(kernel="torch_gpu")
    q = layer(kernel="reference")
    with pytest.raises(KernelError, match="unknown kernel 'onednn'"):
        q.kernel = "onednn"
    assert q.kernel == "reference"


@pytest.fixture
def unpackings(monkeypatch):
    """How many weights were brought back from panels."""
    real, seen = kernels.unpack, []
    monkeypatch.setattr(kernels, "unpack", lambda *args: seen.append(args) or real(*args))
    monkeypatch.setattr("w8a8.kernels.request.unpack", lambda *args: seen.append(args) or real(*args))
    return seen


@needs("native")
def test_a_kernel_that_is_asked_for_later_has_the_codes_laid_out_once(unpackings):
    q = layer(kernel="native")
    x = torch.randn(3, 100)
    expected = q(x)
    q.kernel = "reference"
    assert len(unpackings) == 1
    for _ in range(3):
        assert torch.equal(q(x), expected)
    assert len(unpackings) == 1
    assert q.packed_weight is None
    q.kernel = "native"
    assert q.packed_weight is not None
    assert torch.equal(q(x), expected)
    assert q.kernel_calls() == {"native": 2, "reference": 3}


@needs("native")
def test_a_pickle_is_laid_out_for_the_kernel_of_the_process_that_reads_it(monkeypatch, unpackings):
    monkeypatch.delenv("W8A8_KERNEL", raising=False)
    q = layer()
    x = torch.randn(3, 100)
    expected, packed = q(x), pickle.dumps(q)
    monkeypatch.setenv("W8A8_KERNEL", "reference")
    select.preference.cache_clear()
    select._usable.cache_clear()
    there = pickle.loads(packed)  # noqa: S301  our own
    assert len(unpackings) == 1
    assert torch.equal(there(x), expected)
    assert there.kernel_calls() == {"reference": 1}
    row_major = pickle.dumps(there)
    monkeypatch.delenv("W8A8_KERNEL")
    select.preference.cache_clear()
    select._usable.cache_clear()
    assert pickle.loads(row_major).packed_weight is not None  # noqa: S301  our own
    assert len(unpackings) == 1


@needs("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_no_input_has_a_packed_weight_unpacked(unpackings, dtype, strided):
    q = layer(kernel="native")
    x = torch.randn(3, 2, 100).to(dtype)
    y = q(x.transpose(0, 1) if strided else x)
    assert y.dtype is dtype
    assert q.kernel_calls() == {"native": 1}
    assert unpackings == []
