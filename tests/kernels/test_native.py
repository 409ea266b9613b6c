"""What only the native kernel has: packing, instruction sets, threads, and being absent."""

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import w8a8
from tests.conftest import llama, needs
from w8a8.core.affine import QParams
from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.errors import KernelError
from w8a8.kernels import compiled, native, unpack
from w8a8.layers.linear import QuantLinear, quant_linears

ROOT = Path(__file__).parents[2]
pytestmark = [needs("native"), pytest.mark.kernels]


@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (32, 4), (33, 101), (100, 64), (2048, 2048)])
def test_packing_is_undone_by_unpacking_and_pads_with_zeros(shape):
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed, sums = native.pack(weight)
    assert torch.equal(unpack(packed, *shape), weight)
    assert torch.equal(sums, weight.sum(1, keepdim=True, dtype=torch.int32))
    assert int(packed.abs().sum(dtype=torch.int64)) == int(weight.abs().sum(dtype=torch.int64))
    assert packed.data_ptr() % 64 == 0


@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (33, 101), (100, 64), (70, 768)])
def test_panels_hold_groups_of_k_side_by_side(shape):
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed, _ = native.pack(weight)
    panels, steps, width, group = packed.shape
    assert group in (4, 8)
    assert steps * group - shape[1] in range(64)
    padded = torch.zeros(panels * width, steps * group, dtype=torch.int8)
    padded[: shape[0], : shape[1]] = weight
    assert torch.equal(packed, padded.view(panels, width, steps, group).transpose(1, 2))


def test_a_strided_weight_is_packed_by_its_values():
    weight = torch.randint(-127, 128, (40, 30), dtype=torch.int8).t()
    assert torch.equal(unpack(native.pack(weight)[0], 30, 40), weight)


def test_the_codes_are_in_memory_once():
    q = QuantLinear.from_float(nn.Linear(96, 64), kernel="native")
    assert [name for name, b in q.named_buffers() if b.dtype is torch.int8] == ["packed_weight"]
    row_major = QuantLinear.from_float(nn.Linear(96, 64), kernel="reference")
    assert [name for name, b in row_major.named_buffers() if b.dtype is torch.int8] == ["weight"]


def test_the_state_dict_is_row_major_whichever_kernel_runs():
    linear = nn.Linear(100, 33)
    a, b = (QuantLinear.from_float(linear, kernel=kernel).state_dict() for kernel in ("native", "reference"))
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_packed_layer_loads_copies_moves_and_casts():
    first, second = (QuantLinear.from_float(nn.Linear(100, 33), kernel="native") for _ in range(2))
    x = torch.randn(3, 100)
    expected = first(x)
    second.load_state_dict(first.state_dict())
    assert second.packed_weight is not None
    assert torch.equal(second(x), expected)
    assert torch.equal(copy.deepcopy(first)(x), expected)
    weight = first.codes
    meta = copy.deepcopy(first).to("meta")
    assert meta.packed_weight is None
    assert meta.weight.shape == (33, 100)
    assert first.double().packed_weight is not None
    assert torch.equal(first.float()(x), expected)
    assert torch.equal(first.codes, weight)


@pytest.mark.parametrize("steps_group", [(26, 4), (13, 8)], ids=str)
def test_a_pickle_from_another_architecture_is_packed_anew(steps_group):
    """The pickle holds panels, and another machine's are laid out otherwise: read as ours they are wrong numbers."""
    q, x = QuantLinear.from_float(nn.Linear(100, 33), kernel="native"), torch.randn(3, 100)
    expected, (steps, group) = q(x), steps_group
    theirs = torch.zeros(64, steps * group, dtype=torch.int8)
    theirs[:33, :100] = q.codes
    q.packed_weight = theirs.view(2, 32, steps, group).transpose(1, 2).contiguous()
    loaded = pickle.loads(pickle.dumps(q))  # noqa: S301 - our own
    assert loaded.packed_weight.shape == native.packed_shape(33, 100)
    assert torch.equal(loaded(x), expected)


def direct(q: QuantLinear, x: torch.Tensor) -> torch.Tensor | None:
    return native.direct(x, q._buffers, q._call)


def test_an_eager_call_goes_past_the_dispatcher_whatever_the_shape():
    q = QuantLinear.from_float(nn.Linear(100, 33), kernel="native")
    reference = QuantLinear.from_float(nn.Linear(100, 33), kernel="reference")
    reference.load_state_dict(q.state_dict())
    wide = torch.randn(6, 200)
    for x in (torch.randn(100), torch.randn(2, 3, 4, 100), wide[:, :100], wide[:1, 100:].expand(5, 100)):
        y = direct(q, x)
        assert torch.equal(y, reference(x))
        assert y.shape == (*x.shape[:-1], 33)


def test_what_is_replaced_in_a_layer_is_seen_at_the_next_call():
    q = QuantLinear.from_float(nn.Linear(100, 33), kernel="native")
    x = torch.randn(3, 100)
    before, bias = direct(q, x), q.bias
    q.bias = bias + 1
    assert not torch.equal(direct(q, x), before)
    q.bias = bias.double()  # brought to float32 at each call
    assert torch.equal(direct(q, x), before)
    q.bias, q.weight_scale = None, q.weight_scale.bfloat16()
    bare = QuantLinear.from_float(nn.Linear(100, 33, bias=False), kernel="reference")
    bare.load_state_dict({"weight": q.codes, "weight_scale": q.weight_scale.float()})
    assert torch.equal(direct(q, x), bare(x))


def test_a_static_grid_may_be_changed_in_place():
    static = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerTensor(), symmetric=False, dynamic=False))
    params = QParams(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32))
    q = QuantLinear.from_float(nn.Linear(100, 33), static, input_params=params, kernel="native")
    reference = QuantLinear.from_float(nn.Linear(100, 33), static, input_params=params, kernel="reference")
    reference.load_state_dict(q.state_dict())
    x = torch.randn(3, 100)
    for layer in (q, reference):
        layer.input_scale.mul_(2)
        layer.input_zero_point.sub_(7)
    assert torch.equal(direct(q, x), reference(x))


class Sub(torch.Tensor):
    """A subclass, which may do anything when it is used."""


@pytest.mark.not_under("inference", reason="no derivative can be asked for in that mode")
def test_the_dispatcher_is_asked_where_it_has_something_to_do():
    q = QuantLinear.from_float(nn.Linear(100, 33), kernel="native")
    x = torch.randn(3, 100)
    assert direct(q, x) is not None
    wants_gradient = x.clone().requires_grad_()
    assert direct(q, wants_gradient) is None
    with torch.no_grad():
        assert direct(q, wants_gradient) is not None
    with FlopCounterMode(display=False):
        assert direct(q, x) is None
    assert direct(q, x.as_subclass(Sub)) is None
    assert direct(q, x.double()) is None
    assert direct(q, x.to("meta")) is None
    assert direct(q, torch.randn(3, 101)) is None
    assert direct(q, torch.randn(0, 100)) is None
    assert direct(q, torch.randn(100, 3).t()) is None
    assert direct(QuantLinear.from_float(nn.Linear(100, 33), kernel="reference"), x) is None


def test_another_kernel_asked_for_later_is_the_one_that_runs():
    q = QuantLinear.from_float(nn.Linear(100, 33), kernel="native")
    q.kernel = "reference"
    q(torch.randn(3, 100))
    assert q.kernel_calls() == {"reference": 1}


def test_the_door_refuses_calls_that_make_no_sense():
    linear = compiled.loaded().linear
    with pytest.raises(TypeError, match="linear takes"):
        linear(torch.randn(1, 4), {}, 1)
    with pytest.raises(TypeError, match="linear takes"):
        linear(torch.randn(1, 4), [], 4, 4, 1, 0, 8, True)
    q = QuantLinear.from_float(nn.Linear(100, 33), kernel="native")
    n, k, per_channel, mode, _ = q._call
    with pytest.raises(AssertionError, match="w8a8_linear: -1"):
        linear(torch.randn(1, 100), q._buffers, n, k, per_channel, mode, 99, True)


def test_what_the_kernel_has_not_is_run_by_another_and_said():
    grouped = Scheme(QuantSpec(8, PerGroup(20)), QuantSpec(8, PerToken()))
    q = QuantLinear.from_float(nn.Linear(100, 33), grouped, kernel="native", strict=True)
    with pytest.raises(KernelError, match="it has no groups along K"):
        q(torch.randn(2, 100))


def test_a_k_near_the_limit_falls_back():
    static = QuantSpec(8, PerTensor(), dynamic=False)
    for activations, k in ((QuantSpec(8), 132_104), (static, 131_071), (QuantSpec(8, symmetric=False), 65_793)):
        assert native.can_pack(4, k, 1, activations)
        assert not native.can_pack(4, k + 1, 1, activations)
    q = QuantLinear.from_float(nn.Linear(133_000, 2, bias=False))
    assert q.packed_weight is None
    q(torch.ones(1, 133_000))
    assert "native" not in q.kernel_calls()


def usable():
    if native.unavailable_because() is not None:
        return []
    return [name for name, reason in compiled.instruction_sets().items() if reason is None]


@pytest.fixture
def unforced():
    """The table decides, whatever W8A8_ISA says."""
    forced = os.environ.get("W8A8_ISA") or None
    compiled.use_instruction_set(None)
    yield
    compiled.use_instruction_set(forced)


@pytest.mark.usefixtures("unforced")
def test_instruction_sets_can_be_forced_and_the_impossible_is_refused():
    assert "portable" in usable()
    compiled.use_instruction_set("portable")
    assert compiled.instruction_set() == "portable"
    compiled.use_instruction_set(None)
    assert compiled.instruction_set() == compiled.choices()[0].instruction_set
    with pytest.raises(KernelError, match="instruction set 'mmx' cannot be used"):
        compiled.use_instruction_set("mmx")
    for name in set(compiled.instruction_sets()) - set(usable()):
        with pytest.raises(KernelError, match=re.escape(f"{name} ({compiled.instruction_sets()[name]})")):
            compiled.use_instruction_set(name)


@pytest.mark.usefixtures("unforced")
def test_the_table_names_only_what_this_cpu_has_and_ends_with_a_line_for_everything():
    lines = compiled.choices()
    assert {line.instruction_set for line in lines} <= set(usable())
    assert (lines[-1].rows, lines[-1].k) == (1, 1)
    assert all((line.rows, line.k) != (1, 1) for line in lines[:-1]), "nothing could reach the lines below"
    best = {"amx", "avx512vnni", "avxvnni", "avx2", "neon_i8mm", "neon_dot", "portable"} & set(usable())
    assert lines[0].instruction_set == [name for name in compiled.instruction_sets() if name in best][-1]


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("k", [3, 63, 64, 200])
def test_what_runs_is_what_the_table_says(k):
    q = QuantLinear.from_float(nn.Linear(k, 40), kernel="native", strict=True)
    for m in (1, 2, 3, 4, 5, 16, 17, 300):
        said = next(c.instruction_set for c in compiled.choices() if m >= c.rows and k >= c.k)
        before = compiled.runs()
        q(torch.randn(m, k))
        after = compiled.runs()
        assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {said: 1}


@pytest.mark.parametrize("name", usable())
def test_what_is_forced_runs(name, unforced):
    q = QuantLinear.from_float(nn.Linear(200, 40), kernel="native", strict=True)
    compiled.use_instruction_set(name)
    before = compiled.runs()[name]
    q(torch.randn(5, 200))
    assert compiled.runs()[name] == before + 1


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.once
def test_the_environment_forces_an_instruction_set():
    code = "from w8a8.kernels import compiled; print(compiled.instruction_set())"
    assert run(code, W8A8_ISA="portable").stdout == "portable\n"
    wrong = run(code, W8A8_ISA="mmx")
    assert wrong.returncode == 1
    assert "W8A8_ISA is 'mmx', which this CPU cannot run" in wrong.stderr


@pytest.mark.once
@pytest.mark.slow
def test_another_word_than_0_or_1_for_what_is_compiled_is_refused():
    wrong = run("from w8a8.kernels import compiled; compiled.unavailable_because()", W8A8_NATIVE="no")
    assert wrong.returncode == 1
    assert "W8A8_NATIVE is 'no'; set it to 0, to 1, or not at all" in wrong.stderr


@pytest.mark.slow
@pytest.mark.once
def test_torchs_own_threads_are_borrowed():
    code = (
        "import torch\nfrom w8a8.kernels import compiled\nprint(compiled.threading())\n"
        "print(sum('gomp' in line and line.rstrip().endswith(('.so', '.so.1')) and ' 00000000 ' in line "
        "for line in open('/proc/self/maps')))"
    )
    name, runtimes = run(code).stdout.splitlines()
    assert name.startswith("openmp ")
    assert "torch" in name
    assert runtimes == "1"


def test_several_python_threads_may_call_at_once():
    q = QuantLinear.from_float(nn.Linear(256, 300), kernel="native")
    inputs = [torch.randn(m, 256) for m in (1, 3, 17, 40)]
    expected = [q(x) for x in inputs]
    torch.set_num_threads(2)
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(50) if not torch.equal(q(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_subnormals_are_kept_whatever_the_process_asked_for():
    q = QuantLinear.from_float(nn.Linear(64, 40, bias=False), kernel="native")
    x = torch.full((1, 64), 3e-38)
    expected = q(x)
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(q(x), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.fixture
def absent(monkeypatch):
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr(compiled, "__file__", str(ROOT / "nowhere" / "native.py"))
    compiled.library.cache_clear()
    yield
    monkeypatch.undo()
    compiled.library.cache_clear()


@pytest.mark.usefixtures("absent")
def test_where_it_was_not_built_the_reason_says_how_to_get_it():
    assert "install a C++17 compiler" in native.unavailable_because()
    with pytest.raises(KernelError, match="the native kernel is not available: it was not built"):
        compiled.instruction_set()


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """Where the compiled file lies, when it is not the one that belongs to this package."""
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "native.py"))
    compiled.library.cache_clear()
    yield tmp_path / "_native.so"
    monkeypatch.undo()
    compiled.library.cache_clear()


def test_a_file_that_is_no_library_is_a_reason_not_a_crash(replaced):
    replaced.write_text("not a library")
    assert "_native.so cannot be loaded" in native.unavailable_because()


@pytest.mark.skipif(shutil.which("g++") is None, reason="a library of another version takes g++")
def test_the_file_of_another_version_is_known_before_anything_in_it_is_called(replaced):
    """It has none of the functions of this version, as an older one may lack some, or take other arguments."""
    code = f'extern "C" int w8a8_abi() {{ return {compiled.ABI - 1}; }}'
    command = ["g++", "-x", "c++", "-shared", "-fPIC", "-o", replaced, "-"]
    subprocess.run(command, input=code, text=True, check=True, timeout=60)
    assert native.unavailable_because() == "_native.so is of another version of w8a8; reinstall w8a8"


@pytest.mark.once
def test_a_compiled_model_gives_the_same_bits():
    model = w8a8.quantize(llama(), kernel="native").model
    ids = torch.randint(0, 96, (1, 8))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    layer = next(quant_linears(model))[1]
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        assert torch.equal(model(ids, use_cache=False).logits, expected)
