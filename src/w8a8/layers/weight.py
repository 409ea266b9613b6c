"""What `layer.weight` is of a quantised layer.

A model's code may read `layer.weight` of what it believes to be `nn.Linear`.  Most of it asks in what dtype or on which
device the layer computes (`x.to(self.proj.weight.dtype)`), and gets the answer that the float layer gave.  Some of it
multiplies by the weight, and with int8 codes the result would be wrong by a factor of a thousand without a word.  So
it is no tensor: it tells what a float weight would tell, and everything else is an error.

Such layers are found before they are quantised and stay float (`w8a8.model.usage`); this is for code that is not seen
there, and for the user's own.  The codes are `layer.codes`, what they stand for is `layer.dequantized_weight()`, and
the state dict has the codes under the name "weight".
"""

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch

from w8a8.errors import WeightError


class Weight:
    """The weight of a quantised layer, as far as it can be told without being one.

    Args:
        shape: (N, K).
        dtype: That of the float weight.
    """

    ndim = 2
    requires_grad = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    @property
    def is_meta(self) -> bool:
        """Whether the codes are on the meta device."""
        return self.device.type == "meta"

    @property
    def is_cuda(self) -> bool:
        """Whether the codes are on a GPU of CUDA's."""
        return self.device.type == "cuda"

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its two numbers."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2."""
        return 2

    def numel(self) -> int:
        """N times K."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As the float weight is; the codes are not."""
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: object) -> NoReturn:
        raise _refused(f"{place!r} of it was asked for")

    def __getattr__(self, name: str) -> NoReturn:
        raise _refused(f".{name} of it was asked for")

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> NoReturn:
        """Called by every function of torch that is handed one."""
        raise _refused(f"it was handed to {getattr(function, '__name__', function)}")

    def __repr__(self) -> str:
        return f"<the weight of a quantised layer: {tuple(self.shape)}, {self.dtype} before, {self.device}>"


def _refused(what: str) -> WeightError:
    return WeightError(
        f"{what}, and the weight of a quantised layer is no float tensor: it has int8 codes (layer.codes), which stand "
        "for layer.dequantized_weight(); where a model's own code asks, quantise it with exclude=[LAYER]"
    )
