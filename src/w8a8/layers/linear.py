"""QuantLinear: the layer that takes the place of `nn.Linear`.

What it computes is one of three things, and `mode` says which:

- INTEGER: the activation is quantised, codes are multiplied and summed as integers, the sum is scaled.
- SIMULATED: float arithmetic that shows what a scheme costs, for every scheme.  Where integers could run
  the scheme, the float arithmetic is done on the codes in pieces small enough to be exact, so that the
  simulation returns the integer layer's very bits.  Elsewhere operands are quantised and dequantised and
  multiplied in float32.  Its gradient goes straight through the rounding (`w8a8.layers.straight_through`).
- WEIGHT_ONLY: the activation stays float; the int8 weight is dequantised and multiplied in its dtype, with the
  gradients of that product.

What it holds, and how that goes to files and back, is `QuantLayer`.  `weight_sqnr_db` says what quantising did to
the weight (`w8a8.core.row_sample`); None where the codes came from a file.
"""

import enum
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w8a8 import kernels
from w8a8.core.affine import QParams
from w8a8.core.scheme import MAX_CODE_BITS, PerGroup, PerTensor, PerToken, QuantSpec, Scheme, largest_k
from w8a8.core.tokens import fake_quantize_tokens
from w8a8.defaults import without_autocast
from w8a8.errors import ModelError, SchemeError
from w8a8.kernels import native, reference
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.straight_through import straight_through
from w8a8.layers.weights import make_weight

_LAYER_NUMBERS = itertools.count()


class Mode(enum.Enum):
    """What the layer computes; see the module's docstring."""

    INTEGER = "integer"
    SIMULATED = "simulated"
    WEIGHT_ONLY = "weight-only"


class QuantLinear(QuantLayer):
    """A linear layer with a quantised weight.  Made by `from_float`, or empty, to be filled from a file.

    Args:
        in_features: K.
        out_features: N.
        scheme: What to quantise and how.
        bias: The dtype of the bias, or None: no bias.
        simulated: Ask for float arithmetic, see `Mode`.
        kernel: The kernel to run, or "auto": the first one that can.
        strict: Raise where the kernel that was asked for cannot run, instead of running another.
        device: Where the empty buffers are made, whatever the process's default is; "meta" makes none.
        was_conv1d: The float layer was transformers' `Conv1D`, which other loaders do not take for linear.
        dtype: Of the float weight; `weight.dtype` tells it.

    Raises:
        SchemeError: the scheme cannot be executed and is not to be simulated; K is too large for int32
            sums or does not divide into groups.
        KernelError: no kernel has this name.
    """

    @torch.inference_mode(False)  # where a layer is made says nothing of where it is used
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
        device: torch.device | str = "cpu",
        was_conv1d: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kernels.check_name(kernel)
        mode = _mode(scheme, in_features, simulated=simulated)
        integer = mode is Mode.INTEGER
        super().__init__(
            in_features, out_features, scheme, bias=bias, integer=integer, kernel=kernel, device=device, dtype=dtype
        )
        self.mode = mode
        self.strict = strict
        self.was_conv1d = was_conv1d
        if scheme.activations is not None:
            self._grid = _grid(scheme.activations)
        if integer:
            self._call = self._native_call()
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
        biased = None if bias is None else bias.dtype
        return cls(k, n, scheme, bias=biased, device="meta", was_conv1d=conv1d, dtype=weight.dtype, **options)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()  # inside of the line above, which ends it
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
        layer.take_weight(make_weight(weight, scheme.weights))
        layer.bias = None if bias is None else bias.detach().clone()
        layer.set_input_params(input_params)
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
            if packed is not None and native.takes(packed, self._kernel) and not torch.compiler.is_compiling():
                y = native.direct(x, self._buffers, self._call)
                if y is not None:
                    kernels.count(self._number, native.NATIVE.name)
                    return y
            return kernels.int8_linear(self._request(x), self._kernel, self.strict, self._number)
        kernels.check_input(x, self.out_features, self.in_features)
        if self.mode is Mode.WEIGHT_ONLY:
            with without_autocast(x.device):
                return F.linear(x, self.dequantized_weight().to(x.dtype), _cast(self.bias, x.dtype))
        return straight_through(x, self.bias, self)

    def kernel_calls(self) -> dict[str, int]:
        """The layer's page of the ledger: how often each kernel ran."""
        return kernels.calls(self._number)

    def extra_repr(self) -> str:
        runs = self.mode.value
        if self.mode is Mode.INTEGER:
            runs = f"kernel={self._kernel_that_runs()}" + (" (auto)" if self.kernel == kernels.AUTO else "")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, {runs}"
        )

    def _kernel_that_runs(self) -> str:
        """Of an ordinary input; of a layer that has no values yet, the first one here."""
        if self._device is None or self._device.type == "meta":
            return kernels.first_choice(self.kernel)
        x = torch.zeros(1, self.in_features, dtype=torch.float32, device=self._device)
        return kernels.that_runs(self.kernel, self._request(x))

    def _native_call(self) -> native.Call:
        bits, per_token, symmetric = self._grid
        return native.call_of(
            self.out_features,
            self.in_features,
            per_channel=not isinstance(self.scheme.weights.granularity, PerTensor),
            bits=bits,
            per_token=per_token,
            static=self.scheme.static,
            symmetric=symmetric,
        )

    def _request(self, x: Tensor) -> kernels.LinearRequest:
        """The op's operands, past `nn.Module.__getattr__`, which would take longer than a small layer's product."""
        buffers: dict[str, Any] = self._buffers
        packed = buffers["packed_weight"]
        return kernels.LinearRequest(
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

    def values(self, x: Tensor) -> Tensor:
        """What the simulated layer computes: exact where integers could run the scheme, ordinary float32 elsewhere."""
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        if self.scheme.integer_executable:
            y = reference.linear(self._request(rows))
        else:
            spec = self.scheme.activations
            static = None if self.input_scale is None else QParams(self.input_scale, self.input_zero_point)
            values = rows.to(torch.float32) if spec is None else fake_quantize_tokens(rows, spec, static)
            y = F.linear(values, self.dequantized_weight(), _cast(self.bias, torch.float32)).to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def clamps(self, x: Tensor) -> Tensor | None:
        """Where the ends of a static grid clamp the input, in its shape; None where the grid is made from it."""
        spec = self.scheme.measured
        if spec is None:
            return None
        assert self.input_scale is not None, "a static grid has its scale"
        codes = torch.round(x.to(torch.float32) / self.input_scale)
        if self.input_zero_point is not None:
            codes = codes + self.input_zero_point
        return (codes < spec.qmin) | (codes > spec.qmax)

    def _take_number(self) -> None:
        self._number = next(_LAYER_NUMBERS)
        weakref.finalize(self, kernels.forget, self._number)

    def __setstate__(self, state: dict[str, object]) -> None:  # a copy has its own page in the ledger
        super().__setstate__(state)
        self._take_number()


def float_operands(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as (N, K), a view, and the bias of `nn.Linear` or transformers' `Conv1D`.

    Raises:
        SchemeError: the module is neither; its weight is not there (meta) or not float.
    """
    if not is_linear(linear):
        raise SchemeError(f"expected nn.Linear or transformers' Conv1D, found {type(linear).__name__}")
    why = not_plain(linear)
    if why is not None:
        raise SchemeError(f"{why}; give the layer a plain tensor, or leave it float")
    layer: Any = linear
    weight, bias = layer.weight.detach(), layer.bias
    if is_conv1d(linear):
        weight = weight.t()
    if weight.is_meta:
        raise SchemeError("the weight is on the meta device: it has no values yet; load the model first")
    if weight.device.type == "cpu" and weight.layout is torch.strided and weight.numel() and weight.data_ptr() == 0:
        raise SchemeError(
            f"the memory of the weight {tuple(weight.shape)} was let go, as sharded training does; gather it first"
        )
    return weight, bias


def not_plain(linear: nn.Module) -> str | None:
    """Which of a layer's tensors may have its values elsewhere than in its own memory; None where none has.

    A DTensor has a part of them, torchao's tensors have codes: what a subclass of `torch.Tensor` holds is its own.
    """
    for name in ("weight", "bias"):
        # past `linear.weight`, which may be made anew at each look, and changed by it (spectral_norm)
        kind = type(linear._parameters.get(name, linear.__dict__.get(name)))
        if kind not in (Tensor, nn.Parameter, type(None)):
            return f"its {name} is a {kind.__module__}.{kind.__qualname__}, a subclass of torch.Tensor"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something was registered to run when a module is called, differentiated, saved or loaded."""
    return any(held for key, held in vars(module).items() if key.startswith("_") and key.endswith("_hooks"))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """N and K of a linear layer, float or quantised."""
    if isinstance(linear, nn.Linear | QuantLinear):
        return linear.out_features, linear.in_features
    k, n = linear.get_parameter("weight").shape
    return n, k


def is_linear(module: nn.Module) -> bool:
    """Whether this is a float linear layer: `nn.Linear`, a subclass of it, or `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def check_materialised(model: nn.Module) -> None:
    """Raise `ModelError` where a module waits for its first input to know the shapes of its parameters."""
    for name, module in model.named_modules():
        if any(nn.parameter.is_lazy(tensor) for tensor in module._parameters.values()):
            raise ModelError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters without a shape, which they get from "
                "the first input: call the model once, then quantise it"
            )


def check_module(model: object) -> None:
    """Raise `ModelError` where a model is no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, found {type(model).__name__}: load the model first")


def quant_linears(model: nn.Module) -> Iterable[tuple[str, QuantLinear]]:
    """Name and layer of every `QuantLinear` in the model, each once."""
    check_module(model)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def ledger(model: nn.Module) -> dict[str, dict[str, int]]:
    """How often each kernel ran, for every integer layer of the model by name; `ModelError` where it is no module."""
    return {name: layer.kernel_calls() for name, layer in quant_linears(model) if layer.mode is Mode.INTEGER}


def uncalled(model: nn.Module) -> list[str]:
    """The integer layers that no forward has called so far, which is how to see that a model goes another way.

    A layer whose model never calls it in any forward may be held, or computed with, where nobody looked.
    """
    return [name for name, calls in ledger(model).items() if not calls]


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
    limit = largest_k(activations.reach, weights.reach)
    if k > limit:
        raise SchemeError(
            f"K={k} could overflow the int32 sum, which holds K up to {limit} for {scheme}; use simulated=True"
        )
    return Mode.INTEGER


def _grid(spec: QuantSpec) -> tuple[int, bool, bool]:
    """What the op is told of the activation: bits, per token, symmetric."""
    return spec.bits, isinstance(spec.granularity, PerToken), spec.symmetric


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
