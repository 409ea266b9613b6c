"""Every kernel against an oracle in Python's integers and numpy's float32, bit for bit."""

import math
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from tests.conftest import needs
from tests.kernels.conftest import HERE
from w8a8 import kernels
from w8a8.core.affine import QParams
from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.errors import KernelError, SchemeError
from w8a8.kernels import compiled, ops, reference, select, torch_cpu
from w8a8.layers.linear import QuantLinear

pytestmark = pytest.mark.kernels
SCHEMES = [
    Scheme(QuantSpec(bits, weights, weights_symmetric), QuantSpec(bits, activations, symmetric))
    for weights_symmetric in (True, False)
    for bits in (8, 4)
    for weights in (PerChannel(), PerTensor(), PerGroup(20))
    for activations in (PerToken(), PerTensor())
    for symmetric in (True, False)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layer(scheme, k=100, n=33, *, bias=True, **options):
    return QuantLinear.from_float(nn.Linear(k, n, bias=bias), scheme, **options)


def runs(kernel, scheme):
    """The native kernel has no groups and no weight zero points."""
    return kernel != "native" or (scheme.weights.symmetric and not isinstance(scheme.weights.granularity, PerGroup))


def oracle(q: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The contract in Python's integers and single float32 operations."""
    f32 = np.float32
    request = q._request(x.reshape(-1, x.shape[-1]))
    tokens = request.quantize_input()
    qx, sx = tokens.codes.numpy().astype(object), tokens.scale.numpy()
    zx = (
        np.zeros(len(qx), dtype=object) if tokens.zero_point is None else tokens.zero_point.numpy()[:, 0].astype(object)
    )
    qw = q.codes.numpy().astype(object)
    n, k = qw.shape
    sw = np.broadcast_to(
        q.weight_scale.numpy().reshape(-1, q.weight_sum.shape[1] if q.weight_scale.ndim == 2 else 1),
        (n, q.weight_sum.shape[1]),
    )
    zw = np.zeros(sw.shape, dtype=object)
    if q.weight_zero_point is not None:
        zw = np.broadcast_to(q.weight_zero_point.numpy().astype(object).reshape(-1, sw.shape[1]), sw.shape)
    size = k // sw.shape[1]
    y = np.empty((len(qx), n), dtype=f32)
    for m in range(len(qx)):
        for row in range(n):
            total = None
            for g in range(sw.shape[1]):
                piece = slice(g * size, (g + 1) * size)
                acc = int(((qx[m, piece] - zx[m]) * (qw[row, piece] - zw[row, g])).sum())
                part = f32(f32(f32(acc) * sx[m, 0]) * sw[row, g])
                total = part if total is None else f32(total + part)
            y[m, row] = total if q.bias is None else f32(total + f32(q.bias[row].item()))
    return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], n)


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [
        pytest.param(*kernel.values, scheme, marks=kernel.marks)
        for kernel in HERE
        for scheme in SCHEMES
        if runs(*kernel.values, scheme)
    ],
    ids=str,
)
def test_every_kernel_is_the_contract_bit_for_bit(kernel, scheme):
    q = layer(scheme, kernel=kernel, strict=True)
    x = torch.randn(5, 100) * 2
    assert torch.equal(q(x), oracle(q, x))
    assert q.kernel_calls() == {kernel: 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 100, 33), (17, 100, 7), (2, 1040, 64), (33, 64, 100)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kernels_agree_on_odd_shapes_and_dtypes(m, k, n, symmetric, dtype):
    scheme = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerToken(), symmetric))
    linear = nn.Linear(k, n).to(dtype)
    x = (torch.randn(m, k) * 3).to(dtype)
    able = [name for name, reason in kernels.available().items() if reason is None]
    outputs = {name: QuantLinear.from_float(linear, scheme, kernel=name, strict=True)(x) for name in able}
    for y in outputs.values():
        assert y.dtype is dtype
        assert torch.equal(y, outputs["reference"])
    assert torch.equal(outputs["reference"], oracle(QuantLinear.from_float(linear, scheme), x))


def paths() -> list[str]:
    """Every kernel that is here but the reference, the native one in each instruction set that is here."""
    found = [name for name, reason in kernels.available().items() if reason is None and name != "reference"]
    if "native" in found:
        sets = [f"native {name}" for name, reason in compiled.instruction_sets().items() if reason is None]
        found = [*(name for name in found if name != "native"), *sets]
    return found


@pytest.fixture
def path(request):
    """A kernel's name, with its instruction set forced where it has several."""
    kernel, _, isa = request.param.partition(" ")
    if isa:
        compiled.use_instruction_set(isa)
    yield kernel
    if isa:
        compiled.use_instruction_set(os.environ.get("W8A8_ISA") or None)


@pytest.mark.once
@pytest.mark.parametrize("path", paths(), indirect=True)
def test_many_random_cases_agree_with_the_reference(path):
    """Shapes, strides, dtypes, schemes and extreme values: 500 for each path, over 2,000 in all on AVX-512."""
    generator = np.random.default_rng(7)
    for case in range(500):
        m, n, groups, size = (int(generator.integers(1, hi)) for hi in (40, 70, 4, 90))
        k = groups * size
        weights = [PerChannel(), PerTensor(), PerGroup(size) if path != "native" else PerChannel()][case % 3]
        activations = QuantSpec(int(generator.integers(2, 9)), [PerToken(), PerTensor()][case % 2], bool(case % 5))
        linear = nn.Linear(k, n, bias=case % 4 != 0)
        wide = torch.randn(m, 2 * k) * 10.0 ** float(generator.integers(-44, 37))
        if case % 11 == 0:
            wide[int(generator.integers(0, m))] = 0.0
        if case % 13 == 0:
            wide[int(generator.integers(0, m)), 0] = [math.nan, math.inf, -math.inf][case % 3]
        x = [wide[:, :k], wide[:, ::2], wide[:, :k].t().contiguous().t(), wide[:1, :k].expand(m, k)][case % 4]
        x = x.to([torch.float32, torch.bfloat16, torch.float16][case % 7 % 3])
        scheme = Scheme(QuantSpec(8, weights), activations)
        y = QuantLinear.from_float(linear, scheme, kernel=path, strict=True)(x)
        expected = QuantLinear.from_float(linear, scheme, kernel="reference")(x)
        assert torch.equal(y.isnan(), expected.isnan()), (case, m, k, n, scheme)
        assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0)), (case, m, k, n, scheme)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_sums_do_not_overflow_or_saturate(kernel, symmetric):
    k = 65_000  # close to the limit with a zero point: (2**31 - 1) // (255 * 127)
    scheme = Scheme(QuantSpec(8, PerTensor()), QuantSpec(8, PerTensor(), symmetric))
    linear = nn.Linear(k, 2, bias=False)
    nn.init.ones_(linear.weight)
    linear.weight.data[1] = -1
    y = QuantLinear.from_float(linear, scheme, kernel=kernel, strict=True)(torch.ones(3, k))
    torch.testing.assert_close(y, torch.tensor([[k, -k]] * 3, dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-tensor"])
@pytest.mark.parametrize("large", [0.0, 0.02, 0.1, 1.0])
def test_neighbours_that_are_large_are_exact_however_many_there_are(large, scheme, kernel):
    """Where pairs of products are added in 16 bits, such pairs of codes are multiplied in another way."""
    x = 0.2 * torch.randn(9, 300)
    x[:, : int(300 * large)] = torch.sign(x[:, : int(300 * large)])
    x[1], x[2] = 1.0, -1.0  # rows of nothing else
    for rows in (x, x[3:], x[:1]):
        q = layer(scheme, 300, 40, kernel=kernel, strict=True)
        assert torch.equal(q(rows), oracle(q, rows))


@needs("native")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
def test_a_million_rows_of_nothing_but_large_neighbours_are_what_few_are(scheme):
    """What was counted of them overflowed on AVX2, and rows were written into one another."""
    row = torch.arange(1 << 20) % 7
    few = (1 + torch.arange(7.0))[:, None].expand(-1, 64)
    q = layer(scheme, 64, 1, kernel="native", strict=True)
    with torch.inference_mode():
        assert torch.equal(q(few[row]), oracle(q, few)[row])


@pytest.mark.parametrize("kernel", [kernel for kernel in HERE if kernel.values != ("native",)])
@pytest.mark.parametrize(
    ("activations", "lowest", "limit"),
    [
        (QuantSpec(8, PerToken()), -127, 133_144),
        (QuantSpec(8, PerToken()), -128, 132_104),
        (QuantSpec(8, PerTensor(), dynamic=False), -127, 132_104),
        (QuantSpec(8, PerTensor(), dynamic=False), -128, 131_071),
        (QuantSpec(8, PerToken(), symmetric=False), -127, 66_311),
        (QuantSpec(8, PerToken(), symmetric=False), -128, 65_793),
    ],
    ids=str,
)
def test_the_longest_sum_is_exact_and_a_longer_one_is_refused(kernel, activations, lowest, limit):
    """All codes at the end that reaches furthest; a file that brings -128 is refused where that is one too many."""
    scheme = Scheme(QuantSpec(8, PerTensor()), activations)

    def filled(k, weight):
        q = QuantLinear(k, 1, scheme, bias=None, kernel=kernel, strict=True)
        q.weight_scale.fill_(1.0)
        if q.input_scale is not None:
            q.input_scale.fill_(1.0)
        q.set_codes(torch.full((1, k), weight, dtype=torch.int8))
        return q

    grid = [activations.qmax, activations.qmin if not activations.dynamic else -activations.qmax]
    for x in (float(end) for end in grid):
        q = filled(limit, lowest)
        inputs = torch.full((1, limit), x)
        assert torch.equal(q(inputs), oracle(q, inputs))
    with pytest.raises(SchemeError, match=f"could overflow the int32 sum, which holds K up to {limit}"):
        filled(limit + 1, lowest)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("kernel", HERE)
def test_the_number_of_threads_changes_nothing(kernel, threads):
    q = layer("w8a8-asym", k=512, n=300, kernel=kernel, strict=True)
    x = torch.randn(3, 512)
    expected = q(x)
    torch.set_num_threads(threads)
    assert torch.equal(q(x), expected)


@pytest.mark.parametrize("kernel", HERE)
def test_codes_of_minus_128_from_other_peoples_files_are_taken(kernel):
    q = layer("w8a8", kernel=kernel, strict=True)
    q.set_codes(torch.full((33, 100), -128, dtype=torch.int8))
    x = torch.randn(4, 100)
    assert torch.equal(q(x), oracle(q, x))


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-tensor"])
def test_a_bad_token_makes_its_own_output_nan_and_no_other(name, bad, kernel):
    q = layer(name, kernel=kernel, strict=True)
    x = torch.randn(2, 3, 100)
    good = x.reshape(6, 100)[[0, 1, 2, 3, 5]]
    x[1, 1, 7] = bad
    y = q(x).reshape(6, 33)
    assert y[4].isnan().all()
    assert torch.equal(y[[0, 1, 2, 3, 5]], q(good))


@pytest.mark.parametrize("kernel", HERE)
def test_zero_and_subnormal_rows_are_exact(kernel):
    q = layer("w8a8", kernel=kernel, strict=True)
    x = torch.zeros(3, 100)
    x[1] = 1e-42
    assert torch.equal(q(x), q.bias.expand(3, 33))


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_grid_is_used_as_it_is(kernel, symmetric):
    scheme = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerTensor(), symmetric, dynamic=False))
    zero_point = None if symmetric else torch.tensor([-3], dtype=torch.int32)
    q = layer(scheme, kernel=kernel, strict=True, input_params=QParams(torch.tensor([0.01]), zero_point))
    x = torch.randn(4, 100)  # beyond 1.27: clamped
    assert torch.equal(q(x), oracle(q, x))


@pytest.mark.parametrize("kernel", [*HERE, "simulated"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_static_symmetric_grid_saturates_at_both_ends_of_the_codes(kernel, bits):
    """As compressed-tensors and vLLM do; a dynamic scale, made from the same values, never gets there."""
    options = {"simulated": True} if kernel == "simulated" else {"kernel": kernel, "strict": True}
    static = Scheme(QuantSpec(8, PerChannel()), QuantSpec(bits, PerTensor(), dynamic=False))
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.eye(4) * 127  # codes of 127, scales of 1
    x = torch.tensor([[-1e9, -(2.0 ** (bits - 1)) - 1, 1.0, 1e9]])
    q = QuantLinear.from_float(linear, static, input_params=QParams(torch.ones(1), None), **options)
    assert (q(x) / 127).tolist() == [[-(2 ** (bits - 1)), -(2 ** (bits - 1)), 1, 2 ** (bits - 1) - 1]]
    dynamic = QuantLinear.from_float(linear, Scheme(static.weights, QuantSpec(bits, PerTensor())), **options)
    reach = 2 ** (bits - 1) - 1
    assert (dynamic(x.clamp(-reach, reach)) / 127).tolist() == [[-reach, -reach, 1, reach]]


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100), (100,), (1, 100), (2, 3, 4, 100)])
def test_any_leading_shape_and_no_tokens_at_all(shape):
    q = layer("w8a8")
    x = torch.randn(shape)
    y = q(x)
    assert y.shape == (*shape[:-1], 33)
    assert torch.equal(y.reshape(-1, 33), q(x.reshape(-1, 100)))


def test_no_inputs_at_all_gives_the_bias():
    q = QuantLinear(0, 3, Scheme.of("w8a8"), bias=torch.float32)
    q.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    q.weight_scale.fill_(1.0)
    q.set_codes(q.codes)
    assert q(torch.empty(2, 0)).tolist() == [[1, 2, 3]] * 2


def test_a_wrong_last_axis_names_both_shapes():
    with pytest.raises(SchemeError, match=r"input has shape \(2, 99\), the weight \(N, K\) is \(33, 100\)"):
        layer("w8a8")(torch.randn(2, 99))


def test_the_exact_product_is_exact_at_its_bound():
    a = torch.full((1, 5000), 255.0)
    b = torch.full((2, 5000), -128, dtype=torch.int8)
    assert reference.exact_product(a, b).tolist() == [[-255 * 128 * 5000] * 2]


@pytest.mark.once
@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-tensor"])
def test_opcheck_passes(name):
    q = layer(name)
    results = torch.library.opcheck(ops._op, (*q._request(torch.randn(2, 3, 100)), "auto", False, 0))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.once
def test_the_op_compiles_without_a_graph_break():
    model = nn.Sequential(layer("w8a8"), nn.ReLU(), layer("w8a8-asym", k=33, n=8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 100)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.not_under("inference", reason="no derivative can be asked for in that mode")
@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("of", ["x", "bias"])
def test_a_gradient_is_refused_in_words(kernel, of):
    q, x = layer("w8a8", kernel=kernel), torch.randn(2, 100)
    (x if of == "x" else q.bias).requires_grad_()
    y = q(x)
    with pytest.raises(SchemeError, match="a gradient was asked of an integer layer"):
        y.sum().backward()


def forward_mode(q, x):
    with forward_ad.dual_level():
        q(forward_ad.make_dual(x, torch.ones_like(x)))


def forward_mode_of_the_bias(q, x):
    with forward_ad.dual_level():
        q.bias = forward_ad.make_dual(q.bias, torch.ones_like(q.bias))
        q(x)


def total(q):
    return lambda x: q(x).sum()


DERIVATIVES = {
    "forward mode": forward_mode,
    "forward mode of the bias": forward_mode_of_the_bias,
    "jvp": lambda q, x: torch.func.jvp(q, (x,), (x,)),
    "jvp of vmap": lambda q, x: torch.func.jvp(torch.func.vmap(q), (x,), (x,)),
    "vmap of jvp": lambda q, x: torch.func.vmap(lambda one: torch.func.jvp(q, (one,), (one,))[1])(x),
    "vjp": lambda q, x: torch.func.vjp(q, x)[1](torch.ones(2, 33)),
    "grad": lambda q, x: torch.func.grad(total(q))(x),
    "grad of vmap": lambda q, x: torch.func.grad(total(torch.func.vmap(q)))(x),
    "vmap of grad": lambda q, x: torch.func.vmap(torch.func.grad(total(q)))(x),
    "jacfwd": lambda q, x: torch.func.jacfwd(q)(x),
    "jacrev": lambda q, x: torch.func.jacrev(q)(x),
    "hessian": lambda q, x: torch.func.hessian(total(q))(x),
    "linearize": lambda q, x: torch.func.linearize(q, x),
    "of the bias": lambda q, x: torch.func.grad(lambda b: torch.func.functional_call(q, {"bias": b}, (x,)).sum())(
        q.bias
    ),
    "autograd.functional": lambda q, x: torch.autograd.functional.jacobian(q, x),
}


@pytest.mark.once
@pytest.mark.not_under("inference", reason="no derivative can be asked for in that mode")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_way_to_a_derivative_is_refused_in_words(derivative, kernel):
    q, x = layer("w8a8", kernel=kernel), torch.randn(2, 100)
    with pytest.raises(SchemeError, match="a gradient was asked of an integer layer, which has none"):
        DERIVATIVES[derivative](q, x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("kernel", HERE)
def test_a_level_of_derivatives_that_does_not_concern_the_layer_changes_nothing(kernel):
    q, x = layer("w8a8", kernel=kernel), torch.randn(2, 100)
    expected = q(x)
    with forward_ad.dual_level():
        assert torch.equal(q(x), expected)
    _, tangent = torch.func.jvp(lambda v: v.sum() * q(x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, 200 * expected)


def test_a_product_that_saturates_makes_torch_cpu_unavailable(monkeypatch):
    """What oneDNN does without VNNI: signed codes are shifted, and pairs of products are added in 16 bits."""

    def saturating(a, b):
        shift = 128 if a.dtype is torch.int8 else 0
        products = (a.to(torch.int32) + shift)[:, :, None] * b.to(torch.int32)[None]
        pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - shift * b.sum(0)).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    torch_cpu._left_dtype.cache_clear()
    try:
        assert "saturates" in torch_cpu._unavailable_because()
    finally:
        torch_cpu._left_dtype.cache_clear()


@needs("torch_cpu")
def test_a_product_that_is_a_plain_loop_makes_torch_cpu_unavailable(monkeypatch):
    """What PyTorch runs where oneDNN has nothing: far slower than the reference, with AVX2 alone."""
    monkeypatch.setattr(torch_cpu, "_times_float", lambda: 9.6)
    assert torch_cpu._unavailable_because() == (
        "torch._int_mm is a plain loop here, without VNNI: it takes 10 times as long as a float product"
    )
    codes = torch.ones((2, 2), dtype=torch.int8)
    assert torch_cpu.int8_product(codes, codes) is None


def test_whichever_of_two_products_takes_longer_is_seen(monkeypatch):
    """By a clock that only the products move."""
    now = [0.0]

    def taking(seconds, result):
        now[0] += seconds
        return result

    monkeypatch.setattr(torch_cpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch_cpu, "_left_dtype", lambda: torch.int8)
    monkeypatch.setattr(torch_cpu, "_product", lambda a, b: taking(12.0, a))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: taking(4.0, a))
    assert torch_cpu._times_float.__wrapped__() == 3.0


@needs("torch_cpu")
def test_the_signed_product_is_used_where_only_that_is_exact(monkeypatch):
    real = torch._int_mm

    def signed_only(a, b):
        if a.dtype is torch.uint8:
            raise RuntimeError("expected int8")
        return real(a, b)

    x = torch.randn(5, 100)
    scheme = Scheme.of("w8a8-asym")
    q = layer(scheme, kernel="torch_cpu", strict=True)
    expected = q(x)
    monkeypatch.setattr(torch, "_int_mm", signed_only)
    torch_cpu._left_dtype.cache_clear()
    try:
        assert torch_cpu._left_dtype() is torch.int8
        assert torch.equal(q(x), expected)
        symmetric = layer("w8a8", kernel="torch_cpu", strict=True)
        assert torch.equal(symmetric(x), oracle(symmetric, x))
    finally:
        torch_cpu._left_dtype.cache_clear()


def test_torch_cpu_refuses_what_is_not_on_the_cpu():
    q = layer("w8a8").to("meta")
    request = q._request(torch.empty(2, 100, device="meta"))
    assert "on meta" in torch_cpu.TORCH_CPU.refuses(request)


@pytest.mark.parametrize("kernel", [kernel for kernel in HERE if kernel.values != ("native",)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_zero_point_is_exact_to_the_last_k(kernel, symmetric):
    """All codes at one end and all zero points at the other: the largest sum that a K can have."""
    k = (2**31 - 1) // ((127 if symmetric else 255) * 255)
    scheme = Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken(), symmetric))
    q = QuantLinear(k, 3, scheme, bias=None, kernel=kernel, strict=True)
    codes = torch.full((3, k), 127, dtype=torch.int8)
    codes[1], codes[2, ::2] = -128, -128
    q.weight_scale.fill_(1.0)
    q.weight_zero_point = torch.tensor([[-128], [127], [5]], dtype=torch.int32)
    q.set_codes(codes)
    x = torch.ones(2, k)
    assert torch.equal(q(x), oracle(q, x))
    assert q(x)[0, 0] > 250.0 * k


def test_a_weight_zero_point_that_could_overflow_is_refused():
    scheme = Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken(), symmetric=False))
    with pytest.raises(SchemeError, match="holds K up to 33025"):
        QuantLinear(33_026, 2, scheme, bias=None, device="meta")
    assert QuantLinear(33_025, 2, scheme, bias=None, device="meta").in_features == 33_025


@needs("native")
def test_the_native_kernel_says_that_it_has_no_weight_zero_points():
    scheme = Scheme(QuantSpec(8, PerChannel(), symmetric=False), QuantSpec(8, PerToken()))
    with pytest.raises(KernelError, match="it has no weight zero points"):
        layer(scheme, kernel="native", strict=True)(torch.randn(2, 100))
    q = layer(scheme)
    q(torch.randn(2, 100))
    assert "native" not in q.kernel_calls()
    assert torch.equal(q.codes, q._buffers["weight"])


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("m", [1, 2, 17])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_a_single_row_column_or_k_is_as_exact_as_many(kernel, m, k, n):
    """Strides of (1, 1) do not say which axis is which: `nn.Linear(1, 8)` was misread."""
    for scheme in ("w8a8", "w8a8-asym", Scheme(QuantSpec(8, PerGroup(1)), QuantSpec(8, PerToken()))):
        if kernel == "native" and not runs(kernel, Scheme.of(scheme)):
            continue
        q = layer(scheme, k, n, kernel=kernel, strict=True)
        for x in (torch.randn(m, k), torch.randn(k, m).t(), torch.randn(m, 3 * k)[:, ::3]):
            assert torch.equal(q(x), oracle(q, x))


@pytest.mark.parametrize("swapped", ["rows", "columns"])
def test_a_product_that_misreads_strides_makes_torch_cpu_unavailable(monkeypatch, swapped):
    """A probe of equal codes would not see it."""
    real = torch._int_mm

    def misreads(a, b):
        if swapped == "rows" and a.shape[0] == 1:
            return real(a.flip(1), b)
        if swapped == "columns" and b.shape[1] > 1 and b.shape[0] == 1:
            return real(a, b[:, :1].expand(b.shape).contiguous())
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", misreads)
    torch_cpu._left_dtype.cache_clear()
    try:
        assert torch_cpu._unavailable_because() is not None
    finally:
        torch_cpu._left_dtype.cache_clear()


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("n", [1, 8])
def test_a_product_of_codes_takes_views(m, k, n):
    a, b = (torch.randint(-128, 128, (3 * k, rows), dtype=torch.int8) for rows in (m, n))
    for left, right in (
        (a[:k].t(), b[:k].t()),
        (a.t()[:, ::3], b.t()[:, ::3]),
        (a.t().contiguous()[:, k : 2 * k], b[:k].t()),
    ):
        product = torch_cpu.int8_product(left, right)
        if product is not None:
            assert torch.equal(product, (left.double() @ right.double().t()).to(torch.int32))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 17, 100), (40, 48, 515)])
def test_a_product_of_codes_is_exact(m, n, k):
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    a[0], b[0] = -128, -128  # what saturates, where it does
    kept = a.clone()
    product = torch_cpu.int8_product(a, b)
    if select.unavailable_because("torch_cpu") is not None:
        assert product is None
        return
    assert torch.equal(product, (a.to(torch.float64) @ b.to(torch.float64).t()).to(torch.int32))
    assert torch.equal(a, kept)
    assert torch_cpu.int8_product(a[:0], b) is None
