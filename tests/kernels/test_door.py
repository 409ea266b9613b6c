"""The C++ door takes whatever Python hands it: a result, or an error in words; never a read of foreign memory.

These tests say more under AddressSanitizer (tests/native/Makefile, `make door`).
"""

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from w8a8.core.affine import QParams, quantize
from w8a8.core.scheme import PerChannel, PerTensor, QuantSpec, Scheme
from w8a8.errors import KernelError, SchemeError, W8A8Error
from w8a8.kernels import compiled, native
from w8a8.layers.linear import QuantLinear
from w8a8.layers.weights import quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore:kernel 'native' cannot run")  # what it refuses, another may run

K, N = 100, 33
STATIC = Scheme(QuantSpec(8, PerChannel()), QuantSpec(8, PerTensor(), symmetric=False, dynamic=False))
GRID = QParams(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32))


@pytest.fixture(params=["DLPack's table", "attributes"], autouse=True)
def _seen_by(request):
    """Both ways in which the door looks at tensors; older versions of torch have the second only."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if request.param == "attributes":
        compiled.loaded().prepare(None)
    elif table is None:
        pytest.skip("this torch has no such table")
    yield
    compiled.loaded().prepare(table)


class Harmless(Tensor):
    """A subclass that does nothing of its own."""


class Wrapper(Tensor):
    """A subclass whose values are another tensor's; its own memory does not exist."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return func(*bare, **(kwargs or {}))


def let_go(x):
    """What sharded training does with a weight that another process holds."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


X = {
    "float32": lambda x: x,
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "one axis": lambda x: x[0],
    "three axes": lambda x: x.view(2, 2, K),
    "many axes": lambda x: x.view(*[1] * 20, 4, K),
    "expanded": lambda x: x[:1].expand(7, K),
    "expanded in the middle": lambda x: x[:2].view(2, 1, K).expand(2, 3, K),
    "rows apart": lambda x: torch.cat([x, x], 1)[:, :K],
    "rows apart, bfloat16": lambda x: torch.cat([x, x], 1).bfloat16()[:, 1 : K + 1],
    "columns apart": lambda x: torch.cat([x, x], 1)[:, ::2],
    "one axis, apart": lambda x: torch.cat([x, x], 1)[0, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "backwards, by copy": lambda x: x.flip(0),
    "from an offset": lambda x: torch.cat([x.flatten(), x.flatten()])[1 : 4 * K + 1].view(4, K),
    "negated by a bit": torch._neg_view,
    "an imaginary part of a conjugate": lambda x: torch.complex(x, x).conj().imag,
    "one row, negated by a bit": lambda x: torch._neg_view(x[:1]),
    "no rows": lambda x: x[:0],
    "no rows, three axes": lambda x: x.new_empty(3, 0, K),
    "a parameter": nn.Parameter,
    "wants a gradient": lambda x: x.clone().requires_grad_(),
    "made in inference mode": lambda x: inference(x),
    "a subclass": lambda x: x.as_subclass(Harmless),
    "a wrapper": Wrapper,
}
WRONG = {
    "int8": lambda x: x.to(torch.int8),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "quantised": lambda x: quantised(x),
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: compressed(x),
    "mkldnn": lambda x: x.to_mkldnn(),
    "a scalar": lambda x: x.sum(),
    "one too many": lambda x: torch.cat([x, x], 1)[:, : K + 1],
    "one too few": lambda x: x[:, :-1],
    "no columns": lambda x: x[:, :0],
    "no memory": let_go,
    "not a tensor": lambda x: x.tolist(),
    "nothing": lambda x: None,
    "an array": lambda x: x.numpy(),
}


def quantised(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def compressed(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are "in beta state"
        return x.to_sparse_csr()


def inference(x):
    with torch.inference_mode():
        return x.clone()


def layer(scheme="w8a8", kernel="native"):
    params = GRID if scheme is STATIC else None
    return QuantLinear.from_float(nn.Linear(K, N), scheme, input_params=params, kernel=kernel)


def same_layer(q):
    other = layer(q.scheme, kernel="reference")
    other.load_state_dict(q.state_dict())
    return other


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", STATIC], ids=str)
def test_an_input_of_any_layout_gives_the_references_bits(name, scheme):
    q = layer(scheme)
    x = X[name](torch.randn(4, K))
    y = q(x)
    plain = (x.inner if isinstance(x, Wrapper) else x.detach().as_subclass(Tensor)).resolve_neg()
    expected = same_layer(q)(plain.clone(memory_format=torch.contiguous_format))
    assert y.dtype is expected.dtype
    assert torch.equal(y.detach().as_subclass(Tensor), expected)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("scheme", ["w8a8", STATIC], ids=str)
def test_an_input_that_is_none_is_a_python_error(name, scheme):
    x = WRONG[name](torch.randn(4, K))
    q = layer(scheme)
    for call in (q, lambda x: native.direct(x, q._buffers, q._call)):
        with contextlib.suppress(W8A8Error, RuntimeError, TypeError, AttributeError, NotImplementedError):
            assert call(x) is None, "only the door itself has an answer: to take the long way"


def test_eight_bits_of_float_are_a_float_dtype_too():
    q, x = layer(), torch.randn(4, K).to(torch.float8_e4m3fn)
    assert torch.equal(q(x).float(), q(x.float()).to(torch.float8_e4m3fn).float())


def test_an_input_without_values_is_an_error_or_has_none_itself():
    q = layer()
    with contextlib.suppress(RuntimeError):
        assert q(torch.empty(3, K, device="meta")).is_meta


def test_sparse_and_quantised_inputs_are_refused_in_words():
    with pytest.raises(SchemeError, match=r"the input is float32 of shape \(4, 100\), sparse_coo.*\.to_dense\(\)"):
        layer()(torch.randn(4, K).to_sparse())
    with pytest.raises(SchemeError, match="a linear layer takes float tensors"):
        layer()(quantised(torch.randn(4, K)))


BUFFERS = ["packed_weight", "weight_sum", "weight_scale", "bias", "input_scale", "input_zero_point"]
CHANGES = {
    "one element more": lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
    "one element less": lambda t: t.flatten()[:-1],
    "a single one": lambda t: t.flatten()[:1],
    "none": lambda t: t.flatten()[:0],
    "apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()),
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int8": lambda t: t.to(torch.int8),
    "int16": lambda t: t.to(torch.int16),
    "int32": lambda t: t.to(torch.int32),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "negated by a bit": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "no memory": let_go,
    "a subclass": lambda t: t.as_subclass(Harmless),
    "a wrapper": Wrapper,
    "wants a gradient": lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    "made in inference mode": inference,
    "not a tensor": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "missing": lambda t: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BUFFERS)
def test_a_changed_buffer_gives_the_references_bits_or_an_error(name, change):
    q, x = layer(STATIC), torch.randn(3, K)
    q._buffers[name] = CHANGES[change](q._buffers[name])
    below = compiled.loaded().linear
    outputs = [outcome(lambda: q(x)), outcome(lambda: below(x, q._buffers, *q._call, False))]
    for y in outputs:
        assert y is None or isinstance(y, Exception) or y.shape == (3, N)
    if not isinstance(outputs[0], Exception) and isinstance(q._buffers[name], Tensor) and name != "packed_weight":
        reference = layer(STATIC, kernel="reference")
        held = {key: q._buffers[key] for key in BUFFERS if key != "packed_weight"} | {"weight": q.codes}
        reference._buffers.update({key: plain(value) for key, value in held.items()})
        assert torch.equal(plain(outputs[0]), reference(x))


def outcome(call):
    try:
        return call()
    except (W8A8Error, RuntimeError, TypeError, AttributeError, AssertionError, LookupError) as error:
        return error


def plain(t):
    if t is None:
        return None
    bare = t.inner if isinstance(t, Wrapper) else t.detach().as_subclass(Tensor)
    return bare.resolve_neg().float() if bare.is_floating_point() else bare


def test_what_does_not_fit_is_named():
    q, x = layer(), torch.randn(3, K)
    q.weight_sum = q.weight_sum.long()
    with pytest.raises(
        KernelError,
        match=r"reads the layer's weight_sum as int32, 33 values in a row .* it is int64 of shape \(33, 1\)",
    ):
        q(x)
    q = layer()
    q.bias = q.bias[:-1]
    with pytest.raises(
        KernelError, match=r"the layer's bias as float32, 33 values in a row .* float32 of shape \(32,\)"
    ):
        q(x)
    q = layer()
    q.weight_scale = None
    with pytest.raises(KernelError, match="weight_scale as float32, 33 values in a row on the CPU, and it is missing"):
        native.direct(x, q._buffers, q._call)


def test_a_parameter_in_a_buffers_place_is_refused():
    """torch would move it to the parameters: the layer would run without a bias."""
    q = layer()
    with pytest.raises(SchemeError, match=r"bias of a quantised layer is a buffer .* value\.detach\(\)"):
        q.bias = nn.Parameter(torch.zeros(N))
    assert q._buffers["bias"] is not None


@pytest.mark.parametrize("n", [-(2**62), -1, 0, 1, 32, 34, 2**40, 2**62])
@pytest.mark.parametrize("k", [-(2**62), -1, 0, 1, K, 101, 104, 2**40, 2**62])
def test_sizes_that_are_not_the_layers_are_refused(n, k):
    q, linear = layer(), compiled.loaded().linear
    _, _, per_channel, mode, bits = q._call
    wide = torch.empty(1, 1).expand(2, k) if 0 < k < 2**41 else torch.randn(2, K)
    for x in (torch.randn(2, K), wide):
        with contextlib.suppress(KernelError, RuntimeError):
            assert linear(x, q._buffers, n, k, per_channel, mode, bits, False) is None


def test_calls_that_make_no_sense_are_python_errors():
    q, linear = layer(), compiled.loaded().linear
    x = torch.randn(1, K)
    n, k, per_channel, mode, bits = q._call
    for arguments in (
        (x, {}, 1),
        (x, [], n, k, per_channel, mode, bits, True),
        (x, q._buffers, "n", k, per_channel, mode, bits, True),
        (x, q._buffers, n, None, per_channel, mode, bits, True),
        (x, q._buffers, n, 2**70, per_channel, mode, bits, True),
    ):
        with pytest.raises((TypeError, OverflowError)):
            linear(*arguments)
    for wrong in ((mode, 99), (mode, 1), (77, bits), (-1, bits)):
        with pytest.raises((AssertionError, KernelError)):
            linear(x, q._buffers, n, k, per_channel, *wrong, False)
    with pytest.raises(KeyError, match="packed_weight"):
        linear(x, {}, n, k, per_channel, mode, bits, False)
    with pytest.raises(KernelError, match="input_scale"):  # a static mode, and no grid
        linear(x, q._buffers, n, k, per_channel, 4, bits, False)


class Interferes(torch.overrides.TorchFunctionMode):
    """Code that runs in the middle of the door: it changes the input and hands out another output."""

    def __init__(self, x, output):
        self.x, self.output = x, output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.new_empty:
            self.x.resize_(1)
            return self.output
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("output", [torch.empty(1), torch.empty(64, N, device="meta"), None, torch.empty(64, N).half()])
def test_memory_is_looked_at_after_the_last_code_of_others_ran(output):
    q = layer()
    x = torch.randn(64, K)
    with Interferes(x, output):
        assert native.direct(x, q._buffers, q._call) is None


def test_a_mode_of_functions_does_not_mislead():
    q, x = layer(), torch.randn(3, K)
    expected = q(x)
    with torch.device("meta"), FlopCounterMode(display=False):
        assert torch.equal(q(x), expected)
    with torch.device("meta"):
        assert torch.equal(q(x), expected)


def test_functorchs_wrappers_go_through_the_op():
    q, x = layer("w8a8-tensor"), torch.randn(5, 3, K)
    assert torch.equal(torch.func.vmap(q)(x), torch.stack([q(one) for one in x]))
    assert torch.equal(torch.func.vmap(q, in_dims=1)(x), torch.stack([q(x[:, i]) for i in range(3)]))
    biases = torch.randn(4, N)
    many = torch.func.vmap(lambda bias: torch.func.functional_call(q, {"bias": bias}, (x[0],)))(biases)
    for bias, y in zip(biases, many, strict=True):
        q.bias = bias
        assert torch.equal(q(x[0]), y)


PACKABLE = {
    "whole": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "rows apart": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "expanded": lambda w: w[:1].expand(40, w.shape[1]),
}
UNPACKABLE = {
    "float32": lambda w: w.float(),
    "uint8": lambda w: w.view(torch.uint8),
    "one axis": lambda w: w[0],
    "sparse": lambda w: w.to_sparse(),
    "meta": lambda w: w.to("meta"),
    "a subclass": lambda w: w.as_subclass(Harmless),
    "a wrapper": Wrapper,
    "no memory": let_go,
}


@pytest.mark.parametrize("name", [*PACKABLE, *UNPACKABLE])
def test_what_is_packed_is_int8_in_memory(name):
    w = torch.randint(-128, 128, (40, 30), dtype=torch.int8)
    if name in PACKABLE:
        w = PACKABLE[name](w)
        packed, sums = native.pack(w)
        assert torch.equal(packed.permute(0, 2, 1, 3).reshape(64, -1)[:40, :30], w)
        assert torch.equal(sums, w.sum(1, keepdim=True, dtype=torch.int32))
        return
    with pytest.raises(KernelError, match=r"a weight to pack is int8 of shape \(N, K\) on the CPU, found"):
        native.pack(UNPACKABLE[name](w))


@pytest.mark.parametrize("name", [*X, *WRONG])
def test_rows_are_quantised_natively_or_not_at_all(name):
    spec = QuantSpec(8, PerChannel())
    w = (X | WRONG)[name](torch.randn(4, K))
    if not isinstance(w, Tensor):
        return
    if name == "no memory":  # torch's own operations would read there
        assert native.quantize_rows(w, 8, per_row=True) is None
        linear = nn.Linear(K, 4)
        linear.weight.data = w
        with pytest.raises(SchemeError, match=r"the memory of the weight \(4, 100\) was let go"):
            QuantLinear.from_float(linear)
        return
    if name in X and w.ndim != 2:
        with pytest.raises(SchemeError, match=r"a weight is \(N, K\), found float32 of shape"):
            quantize_weight(w, spec)
        return
    refused = contextlib.suppress(W8A8Error, RuntimeError, NotImplementedError)
    with refused if name in WRONG else contextlib.nullcontext():
        found = quantize_weight(w, spec)
        bare = plain(w) if w.dtype is not torch.float64 else w
        assert torch.equal(plain(found.codes), quantize(bare.clone(), spec).codes)


def test_what_is_read_for_the_bandwidth_is_in_memory():
    assert compiled.peak_read(torch.zeros(1 << 16)) > 0
    for wrong in (torch.zeros(4, 4).t(), torch.zeros(4, device="meta"), torch.zeros(4).as_subclass(Harmless)):
        with pytest.raises(KernelError, match="what is read is a contiguous tensor on the CPU"):
            compiled.peak_read(wrong)


def test_a_bias_that_was_taken_away_is_not_one_that_was_never_there():
    """`torch.nn.utils.parametrize` takes the attribute away from the buffers."""

    class Doubled(nn.Module):
        def forward(self, t):
            return 2 * t

    q = layer()
    parametrize.register_parametrization(q, "bias", Doubled())
    with pytest.raises(KeyError, match="bias"):
        q(torch.randn(3, K))
