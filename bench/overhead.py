"""Where the time of a small call and of a token goes.

    python bench/overhead.py

First the cost of a call: a 32 x 64 layer at one row, whose product takes a microsecond, through `QuantLinear.forward`,
through PyTorch's dispatcher, and float.  Then decoding with OPT-125m's shape, batch 1, head in int8: the whole token,
the part inside linear layers, and what remains when these are replaced by stubs.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import w8a8
from machine import describe_machine
from model import PROMPT, Decoder, opt_125m
from w8a8.kernels import ops
from w8a8.linear import QuantLinear

TOKENS = 60


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The best of five means of 5,000 calls."""
    means = []
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5000):
                call(x)
            means.append((time.perf_counter() - start) / 5000)
    return 1e6 * min(means)


def milliseconds_per_token(model: nn.Module, ids: Tensor) -> float:
    with torch.inference_mode():
        decoder = Decoder(model, ids)
        return 1e3 * statistics.median([decoder.token() for _ in range(TOKENS)][5:])


def main() -> None:
    print(describe_machine(), "\n")
    linear, x = nn.Linear(64, 32), torch.randn(1, 1, 64)
    layer = QuantLinear.from_float(linear)
    operands = layer._operands(x)
    print(f"QuantLinear.forward           {microseconds(layer, x):6.1f} us a call")
    through = microseconds(lambda x: ops._op(x, *operands[1:], "auto", False, 0), x)
    direct = microseconds(lambda x: ops._int8_linear(x, *operands[1:], "auto", False, 0), x)
    print(f"the op through the dispatcher {through:6.1f} us, directly {direct:.1f}")
    print(f"nn.Linear, float32            {microseconds(linear, x):6.1f} us\n")

    model = opt_125m().eval()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    print(f"float32                       {milliseconds_per_token(model, ids):6.1f} ms a token")
    quantized = w8a8.quantize(copy.deepcopy(model), head="int8").model
    print(f"ours, head in int8            {milliseconds_per_token(quantized, ids):6.1f} ms")
    forward, inside = QuantLinear.forward, [0.0]

    def timed(self: QuantLinear, x: Tensor) -> Tensor:
        start = time.perf_counter()
        y = forward(self, x)
        inside[0] += time.perf_counter() - start
        return y

    QuantLinear.forward = timed
    with torch.inference_mode():
        decoder = Decoder(quantized, ids)
        inside[0] = 0.0
        for _ in range(TOKENS):
            decoder.token()
    codes = sum(
        layer.in_features * layer.out_features for layer in quantized.modules() if isinstance(layer, QuantLinear)
    )
    calls = sum(isinstance(layer, QuantLinear) for layer in quantized.modules())
    print(f"  inside {calls} linear layers     {1e3 * inside[0] / TOKENS:6.1f} ms, for {codes / 1e6:.0f} MB of codes")
    QuantLinear.forward = lambda self, x: x.new_zeros((*x.shape[:-1], self.out_features))
    print(f"  with stubs for them         {milliseconds_per_token(quantized, ids):6.1f} ms")


if __name__ == "__main__":
    main()
