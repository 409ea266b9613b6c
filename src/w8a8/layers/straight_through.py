"""The gradient of a simulated layer: straight through the rounding.

    y = s (sum_k q_x(x) q_w) + b      dy/dx := W~ where x lies on its grid, 0 where the grid's ends clamp it

Rounding has a derivative of 0 nearly everywhere, so the identity stands for it (Bengio et al. 2013, arXiv:1308.3432;
Krishnamoorthi 2018, arXiv:1806.08342, section 2.4): what is differentiated is the float layer of the dequantised weight
W~.  Scales and zero points count as constants, dynamic ones too; only a static grid clamps.  The values of y are those
of the layer without a derivative, to the bit.  Derivatives go to x and to the bias; codes have none.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from w8a8.defaults import without_autocast


class Layer(Protocol):
    """What is asked of the layer."""

    def values(self, x: Tensor) -> Tensor:
        """The output (..., N) in the dtype of x (..., K)."""

    def dequantized_weight(self) -> Tensor:
        """(N, K) float32."""

    def clamps(self, x: Tensor) -> Tensor | None:
        """Where the grid's ends clamp the input, in its shape; None where they never do."""


def straight_through(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    """A layer's output for a float (..., K), with its derivatives where they are asked for."""
    given = [t for t in (x, bias) if t is not None]
    derived = (
        (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    with without_autocast(x.device):
        if not derived:
            return layer.values(x)
        y: Tensor = _StraightThrough.apply(x, bias, layer)  # type: ignore[no-untyped-call]
        return y


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        return layer.values(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.layer = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].to(torch.float32)  # (..., N)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            with without_autocast(x.device):  # `backward` may be called inside
                of_x = _unclamped(gradient @ ctx.layer.dequantized_weight(), x, ctx.layer).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return of_x, of_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (x,) = ctx.saved_tensors
        weight = ctx.layer.dequantized_weight()
        of_x, of_bias = tangents[:2]
        out = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.float32, device=x.device)
        if of_x is not None:
            with without_autocast(x.device):
                out = out + _unclamped(of_x.to(torch.float32), x, ctx.layer) @ weight.t()
        if of_bias is not None:
            out = out + of_bias.to(torch.float32)
        return out.to(x.dtype)


def _unclamped(derivative: Tensor, x: Tensor, layer: Layer) -> Tensor:
    clamped = layer.clamps(x)
    return derivative if clamped is None else derivative.masked_fill(clamped, 0.0)
