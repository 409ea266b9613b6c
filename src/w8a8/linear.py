"""QuantLinear: the layer that takes the place of `nn.Linear`.

What it computes is one of three things, and `mode` says which:

- INTEGER: the activation is quantised, codes are multiplied and summed as integers, the sum is scaled.
- SIMULATED: float arithmetic that shows what a scheme costs, for every scheme.  Where integers could run
  the scheme, the float arithmetic is done on the codes in pieces small enough to be exact, so that the
  simulation returns the integer layer's very bits.  Elsewhere operands are quantised and dequantised and
  multiplied in float32.
- WEIGHT_ONLY: the activation stays float; the int8 weight is dequantised and multiplied in its dtype.

The buffers carry the names and shapes of a compressed-tensors file, so that `state_dict` is the file:

    weight             (N, K) int8 codes; where a simulated grid is wider than 8 bits, its float32 values,
                       and then there is no weight_scale and no weight_zero_point.  In the state dict of a weight-only
                       layer it is weight_packed and weight_shape (`w8a8.packed`)
    weight_scale       (1,), (N, 1), (N, G) or, per column, (1, K) float32
    weight_zero_point  as weight_scale, int32; only where weights are asymmetric
    bias               (N,) in the dtype of the float layer
    input_scale        (1,) float32, and input_zero_point (1,) int32: only where activations are static

`weight_sum` (N, G) int32 is derived from the weight and stays out of the state dict.

Where the native kernel runs the layer, the codes lie packed for it (`packed_weight`) instead of row-major: in memory
they exist once.  `layer.weight` and the state dict are then row-major copies, made when asked for.

`weight_sqnr_db` says what quantising did to the weight (`w8a8.row_sample`); None where the codes came from a file.
"""

import enum
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w8a8 import kernels
from w8a8.affine import (
    QParams,
    QTensor,
    dequantize,
    fake_quantize,
)
from w8a8.errors import SchemeError
from w8a8.kernels import native, reference
from w8a8.kernels.weights import quantize_weight
from w8a8.packed import SHAPE, WORDS, as_words, in_words, unpack_rows, words
from w8a8.row_sample import weight_sqnr_db
from w8a8.scheme import (
    MAX_CODE_BITS,
    Granularity,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
)
from w8a8.tokens import fake_quantize_tokens

_LAYER_NUMBERS = itertools.count()


class Mode(enum.Enum):
    """What the layer computes; see the module's docstring."""

    INTEGER = "integer"
    SIMULATED = "simulated"
    WEIGHT_ONLY = "weight-only"


class QuantLinear(nn.Module):
    """A linear layer with a quantised weight.  Made by `from_float`, or empty, to be filled from a file.

    Args:
        in_features: K.
        out_features: N.
        scheme: What to quantise and how.
        bias: The dtype of the bias, or None: no bias.
        simulated: Ask for float arithmetic, see `Mode`.
        kernel: The kernel to run, or "auto": the first one that can.
        strict: Raise where the kernel that was asked for cannot run, instead of running another.
        device: Where the empty buffers are made; "meta" makes none.
        was_conv1d: The float layer was transformers' `Conv1D`, which other loaders do not take for linear.

    Raises:
        SchemeError: the scheme cannot be executed and is not to be simulated; K is too large for int32
            sums or does not divide into groups.
        KernelError: no kernel has this name.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    packed_weight: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_sqnr_db: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: torch.dtype | None,
        simulated: bool = False,
        kernel: str = kernels.AUTO,
        strict: bool = False,
        device: torch.device | str | None = None,
        was_conv1d: bool = False,
    ) -> None:
        super().__init__()
        kernels.check_name(kernel)
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.mode = _mode(scheme, in_features, simulated=simulated)
        self.kernel = kernel
        self.strict = strict
        self.was_conv1d = was_conv1d
        self.in_words = in_words(scheme)  # what the state dict has of the codes
        spec, activations = scheme.weights, scheme.activations
        self._grid = () if activations is None else _grid(activations)
        if self.mode is Mode.INTEGER:
            self._call = self._native_call()

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        scale_shape = _scale_shape(spec.granularity, out_features, in_features)
        has_codes = spec.bits <= MAX_CODE_BITS
        static = activations is not None and not activations.dynamic
        buffers = {
            "weight": empty(torch.int8 if has_codes else torch.float32, out_features, in_features),
            "weight_scale": empty(torch.float32, *scale_shape) if has_codes else None,
            "weight_zero_point": empty(torch.int32, *scale_shape) if has_codes and not spec.symmetric else None,
            "bias": None if bias is None else empty(bias, out_features),
            "input_scale": empty(torch.float32, 1) if static else None,
            "input_zero_point": (
                empty(torch.int32, 1) if activations is not None and static and not activations.symmetric else None
            ),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        groups = scale_shape[1] if isinstance(spec.granularity, PerGroup) else 1
        self.register_buffer("weight_sum", empty(torch.int32, out_features, groups), persistent=False)
        self.register_buffer("packed_weight", None, persistent=False)
        self._take_number()

    @classmethod
    def in_place_of(cls, linear: nn.Module, scheme: Scheme, **options: Any) -> "QuantLinear":
        """An empty layer in the shape of a float one, on the meta device, to be filled.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`, with or without values.  Not modified, not kept.
            scheme: What to quantise and how.
            options: simulated, kernel and strict, as for the class.

        Raises:
            SchemeError, KernelError: as the class.
        """
        weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
        conv1d = is_conv1d(linear)
        k, n = weight.shape if conv1d else reversed(weight.shape)
        dtype = None if bias is None else bias.dtype
        return cls(k, n, scheme, bias=dtype, device="meta", was_conv1d=conv1d, **options)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        linear: nn.Module,
        scheme: Scheme | str = "w8a8",
        *,
        simulated: bool = False,
        kernel: str = kernels.AUTO,
        strict: bool = False,
        input_params: QParams | None = None,
    ) -> "QuantLinear":
        """Quantise a float layer, once.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`, whose weight is (K, N).  Not modified, not kept.
            scheme: A scheme or a preset's name.
            simulated, kernel, strict: As for the class.
            input_params: The grid of the activation, one element each, where the scheme's is static.

        Returns:
            A new layer on the device of `linear`, in evaluation mode or not, as `linear` is.

        Raises:
            SchemeError: not such a layer; the scheme does not fit it; a static scheme without its grid.
            NonFiniteError: the weight holds a NaN or an infinity.
        """
        scheme = Scheme.of(scheme)
        weight, bias = float_operands(linear)
        layer = cls.in_place_of(linear, scheme, simulated=simulated, kernel=kernel, strict=strict)
        spec = scheme.weights
        if spec.bits > MAX_CODE_BITS:
            values = fake_quantize(weight.to(torch.float32), spec)
            layer.weight_sqnr_db = weight_sqnr_db(weight, values)
            layer.set_codes(values)
        else:
            q = quantize_weight(weight, spec)
            layer.weight_sqnr_db = weight_sqnr_db(weight, q)
            layer.set_codes(q.codes)
            layer.weight_scale = q.scale.reshape(layer.weight_scale.shape)
            if q.zero_point is not None:
                layer.weight_zero_point = q.zero_point.reshape(layer.weight_scale.shape)
        layer.bias = None if bias is None else bias.detach().clone()
        layer._set_input_params(input_params)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: (..., K), any float dtype and strides.  Not modified.

        Returns:
            (..., N) in the dtype of `x`.  A token with a NaN or an infinity comes out as NaN.

        Raises:
            SchemeError: the last axis is not K, or `x` is not float.
            KernelError: `strict`, and the kernel that was asked for cannot run this input.
        """
        if self.mode is Mode.INTEGER:
            packed = self._buffers["packed_weight"]
            if packed is not None and native.takes(packed, self.kernel) and not torch.compiler.is_compiling():
                y = native.direct(x, self._buffers, self._call)
                if y is not None:
                    kernels.count(self._number, native.NATIVE.name)
                    return y
            return kernels.int8_linear(*self._operands(x), self.kernel, self.strict, self._number)
        kernels.check_input(x, self.out_features, self.in_features)
        if self.mode is Mode.WEIGHT_ONLY:
            return F.linear(x, self.dequantized_weight().to(x.dtype), _cast(self.bias, x.dtype))
        return self._simulate(x)

    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, a new (N, K) float32 tensor."""
        if self.weight.dtype is torch.float32:
            return self.weight.clone()
        return dequantize(QTensor(self.weight, self.weight_scale, self.weight_zero_point))

    def set_codes(self, codes: Tensor) -> None:
        """Take a weight: derive its sums, and pack it where the native kernel is to run the layer.

        Args:
            codes: (N, K) int8, row-major; float32 where a simulated grid is wider than 8 bits.  Kept, not copied,
                unless it is packed.
        """
        self._buffers["packed_weight"] = None
        self._buffers["weight"] = codes
        groups = self.weight_sum.shape[1]
        if codes.is_meta or self.mode is not Mode.INTEGER:
            self.weight_sum = codes.new_zeros((self.out_features, groups), dtype=torch.int32)
        elif self._packs(codes):
            self._buffers["packed_weight"], self.weight_sum = native.pack(codes)
            del self._buffers["weight"]
        else:
            self.weight_sum = _sums(codes.view(self.out_features, groups, self.in_features // groups))

    def _packs(self, codes: Tensor) -> bool:
        activations = self.scheme.activations
        assert activations is not None, "an integer layer has integer activations"
        groups = self.weight_sum.shape[1]
        return (
            codes.device.type == "cpu"
            and self.scheme.weights.symmetric
            and native.can_pack(self.out_features, self.in_features, groups, symmetric=activations.symmetric)
            and kernels.first_choice(self.kernel) == native.NATIVE.name
        )

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and (packed := self._buffers.get("packed_weight")) is not None:
            return kernels.unpack(packed, self.out_features, self.in_features)
        return super().__getattr__(name)

    def kernel_calls(self) -> dict[str, int]:
        """The layer's page of the ledger: how often each kernel ran."""
        return kernels.calls(self._number)

    def extra_repr(self) -> str:
        runs = self.mode.value
        if self.mode is Mode.INTEGER:
            runs = f"kernel={kernels.first_choice(self.kernel)}" + (" (auto)" if self.kernel == kernels.AUTO else "")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, {runs}"
        )

    def _native_call(self) -> native.Call:
        activations = self.scheme.activations
        assert activations is not None, "an integer layer has integer activations"
        bits, per_token, symmetric = _grid(activations)
        return native.call_of(
            self.out_features,
            self.in_features,
            per_channel=not isinstance(self.scheme.weights.granularity, PerTensor),
            bits=bits,
            per_token=per_token,
            static=not activations.dynamic,
            symmetric=symmetric,
        )

    def _operands(self, x: Tensor) -> tuple[Any, ...]:
        """The op's operands, past `nn.Module.__getattr__`, which would take longer than a small layer's product."""
        buffers = self._buffers
        packed = buffers["packed_weight"]
        return (
            x,
            buffers["weight"] if packed is None else packed,
            buffers["weight_scale"],
            buffers["weight_sum"],
            buffers["weight_zero_point"],
            buffers["bias"],
            buffers["input_scale"],
            buffers["input_zero_point"],
            *self._grid,
            self.in_features,
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed_weight is not None:
            destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_words:
            stored = as_words(destination.pop(prefix + "weight"))
            destination.update({prefix + key: value for key, value in stored.items()})

    def _simulate(self, x: Tensor) -> Tensor:
        """Float arithmetic: exact where integers could run the scheme, ordinary float32 elsewhere."""
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        if self.scheme.integer_executable:
            request = kernels.LinearRequest(rows, *self._operands(x)[1:-1])
            y = reference.linear(request)
        else:
            spec = self.scheme.activations
            static = None if self.input_scale is None else QParams(self.input_scale, self.input_zero_point)
            values = rows.to(torch.float32) if spec is None else fake_quantize_tokens(rows, spec, static)
            y = F.linear(values, self.dequantized_weight(), _cast(self.bias, torch.float32)).to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _set_input_params(self, params: QParams | None) -> None:
        activations = self.scheme.activations
        if activations is None or activations.dynamic:
            if params is not None:
                raise SchemeError(f"input_params were given, but the activations are not static: {self.scheme}")
            return
        if params is None:
            raise SchemeError(
                f"static activations need their grid: {self.scheme}; give input_params=QParams(scale, zero_point) "
                "measured on calibration data, or use a dynamic scheme"
            )
        if not bool((torch.isfinite(params.scale) & (params.scale > 0)).all()):
            raise SchemeError(f"input_params have the scale {params.scale.tolist()}, which is not positive and finite")
        zero_point = params.zero_point
        if zero_point is not None and bool(((zero_point < activations.qmin) | (zero_point > activations.qmax)).any()):
            raise SchemeError(
                f"input_params have the zero point {zero_point.tolist()}, "
                f"outside {activations.qmin}..{activations.qmax}"
            )
        if params.scale.numel() != 1 or (params.zero_point is None) != activations.symmetric:
            raise SchemeError(
                f"input_params have {params.scale.numel()} scales and "
                f"{'no' if params.zero_point is None else 'a'} zero point; {self.scheme} takes one scale and "
                f"{'no' if activations.symmetric else 'a'} zero point"
            )
        self.input_scale = params.scale.detach().to(self.weight.device, torch.float32, copy=True).reshape(1)
        if params.zero_point is not None:
            self.input_zero_point = params.zero_point.detach().to(self.weight.device, torch.int32, copy=True).reshape(1)

    def _take_number(self) -> None:
        self._number = next(_LAYER_NUMBERS)
        weakref.finalize(self, kernels.forget, self._number)

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy has its own page in the ledger
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_number()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantLinear":
        """Move with the model, but keep the grid float32 through `.half()` and `.to(dtype)`."""
        probe = fn(torch.empty(0, dtype=torch.int8, device=self.weight_sum.device))
        if self.packed_weight is not None and probe.device.type != "cpu":
            self._buffers["weight"], self._buffers["packed_weight"] = self.weight, None
        before = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            assert after is not None, "a move does not drop buffers"
            if after.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        if self.packed_weight is None and self.weight_sum.device.type == "cpu":  # moved here, perhaps
            self.set_codes(self.weight)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take codes as int8 or in words; refuse a float weight, which a copy would truncate without telling."""
        if self.in_words and prefix + WORDS in state_dict:
            state_dict = dict(state_dict)
            stored, want = state_dict.pop(prefix + WORDS), (self.out_features, words(self.in_features, 8))
            shape = state_dict.pop(prefix + SHAPE, None)
            if stored.dtype is not torch.int32 or stored.shape != want:
                error_msgs.append(
                    f"{prefix}{WORDS} is {stored.dtype} of shape {tuple(stored.shape)}, expected int32 of shape {want}"
                )
                return
            if shape is not None and shape.tolist() != [self.out_features, self.in_features]:
                error_msgs.append(
                    f"{prefix}{SHAPE} is {shape.tolist()}, expected {[self.out_features, self.in_features]}"
                )
                return
            state_dict[prefix + "weight"] = unpack_rows(stored.contiguous(), 8, self.in_features)
        holds = torch.int8 if self.scheme.weights.bits <= MAX_CODE_BITS else torch.float32
        given = state_dict.get(prefix + "weight")
        if given is not None and given.dtype is not holds:
            error_msgs.append(
                f"{prefix}weight is {given.dtype}, this QuantLinear holds {holds}: "
                "load the float weights into the float model and quantise that"
            )
            return
        if self.packed_weight is not None:
            self._buffers["weight"], self._buffers["packed_weight"] = self.weight, None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.set_codes(self.weight)
        self.weight_sqnr_db = None


def float_operands(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as (N, K), a view, and the bias of `nn.Linear` or transformers' `Conv1D`.

    Raises:
        SchemeError: the module is neither; its weight is not there (meta) or not float.
    """
    if isinstance(linear, nn.Linear):
        weight, bias = linear.weight.detach(), linear.bias
    elif is_conv1d(linear):
        conv: Any = linear
        weight, bias = conv.weight.detach().t(), conv.bias
    else:
        raise SchemeError(f"expected nn.Linear or transformers' Conv1D, found {type(linear).__name__}")
    if weight.is_meta:
        raise SchemeError("the weight is on the meta device: it has no values yet; load the model first")
    return weight, bias


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def quant_linears(model: nn.Module) -> Iterable[tuple[str, QuantLinear]]:
    """Name and layer of every `QuantLinear` in the model, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def ledger(model: nn.Module) -> dict[str, dict[str, int]]:
    """How often each kernel ran, for every integer layer of the model by name."""
    return {name: layer.kernel_calls() for name, layer in quant_linears(model) if layer.mode is Mode.INTEGER}


def _mode(scheme: Scheme, k: int, *, simulated: bool) -> Mode:
    weights, activations = scheme.weights, scheme.activations
    if isinstance(weights.granularity, PerGroup) and k % weights.granularity.size:
        raise SchemeError(f"K={k} does not divide into groups of {weights.granularity.size}")
    if simulated:
        return Mode.SIMULATED
    if activations is None and weights.bits <= MAX_CODE_BITS:
        return Mode.WEIGHT_ONLY
    if scheme.not_executable_because is not None:
        raise SchemeError(f"{scheme} cannot run in integers: {scheme.not_executable_because}")
    assert activations is not None, "weight-only schemes have left above"
    reach = activations.qmax - activations.qmin if not activations.symmetric else activations.qmax
    limit = 2**31 // (reach * (weights.qmax if weights.symmetric else weights.qmax - weights.qmin))
    if k >= limit:
        raise SchemeError(f"K={k} could overflow the int32 sum, which holds K < {limit} here; use simulated=True")
    return Mode.INTEGER


def _sums(codes: Tensor) -> Tensor:
    """Sums along the last axis, int32."""
    if codes.device.type != "cpu":
        return codes.sum(-1, dtype=torch.int32)
    # 6.5 GB/s where torch, which makes an int32 copy of the weight first, reads 0.24 GB/s (torch 2.13, one layer)
    return torch.from_numpy(np.add.reduce(codes.numpy(), axis=-1, dtype=np.int32))


def _grid(spec: QuantSpec) -> tuple[int, bool, bool]:
    """What the op is told of the activation: bits, per token, symmetric."""
    return spec.bits, isinstance(spec.granularity, PerToken), spec.symmetric


def _scale_shape(granularity: Granularity, n: int, k: int) -> tuple[int, ...]:
    match granularity:
        case PerTensor():
            return (1,)
        case PerColumn():
            return (1, k)
        case PerGroup(size):
            return (n, k // size)
        case PerChannel() | PerToken():
            return (n, 1)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
