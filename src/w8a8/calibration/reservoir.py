"""A bounded, uniform sample of the tokens of a stream.

Each token gets a random key when it comes, and the tokens with the largest keys are kept (Efraimidis and
Spirakis 2006, algorithm A-Res with equal weights): after any number of updates every token seen so far is
kept with the same probability.  Vitter's algorithm R draws the same sample with less randomness, but token
by token; keys are drawn and compared for a whole tensor at a time, and once the reservoir is full only the
few rows that enter it are copied.

Keys come from a generator of the reservoir's own, in the order of the tokens.  So the sample depends on the
seed and on the data, not on the batching, and reservoirs of one seed hold the same tokens at every layer
that sees them all.
"""

import torch
from torch import Tensor

from w8a8.errors import CalibrationError


class Reservoir:
    """At most `size` tokens of a stream, each kept with the same probability.

    Args:
        size: R, how many tokens are kept.
        seed: Of the keys.

    Raises:
        CalibrationError: `size` is not positive.
    """

    def __init__(self, size: int = 512, *, seed: int = 0) -> None:
        if size < 1:
            raise CalibrationError(f"a reservoir keeps at least one token, found size={size}; 512 is common")
        self.size = size
        self.tokens = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self._rows: Tensor | None = None

    @torch.inference_mode(False)  # what is kept is changed later, maybe outside of a mode that holds now
    @torch.no_grad()  # inside of the line above, which ends it
    def update(self, x: Tensor) -> None:
        """Let the tokens of one tensor compete for their places.

        Args:
            x: (..., K), any dtype, device and strides; the kept rows are copies.  Not modified.

        Raises:
            CalibrationError: K is not that of the tensors before.
        """
        if self._rows is None:
            self._rows = x.new_empty((0, x.shape[-1]))
        if x.shape[-1] != self._rows.shape[-1]:
            raise CalibrationError(
                f"a reservoir of {self._rows.shape[-1]} channels was given {x.shape[-1]}: keep one for each layer"
            )
        seen = x.reshape(-1, x.shape[-1])
        self.tokens += len(seen)
        drawn = torch.rand(len(seen), dtype=torch.float64, generator=self._generator, device="cpu")
        free = self.size - len(self._keys)
        threshold = -1.0 if free else float(self._keys.min())
        candidates = (drawn > threshold).nonzero()[:, 0]
        if not len(candidates):
            return
        keys = torch.cat([self._keys, drawn[candidates]])
        winners = keys.topk(min(self.size, len(keys))).indices
        held = len(self._keys)
        stay, enter = winners[winners < held], winners[winners >= held] - held
        rows = seen[candidates[enter].to(seen.device)]
        if len(self._keys) < self.size:  # still growing, so nothing is thrown out but what never entered
            self._keys = torch.cat([self._keys[stay], keys[enter + held]])
            self._rows = torch.cat([self._rows[stay.to(seen.device)], rows])
            return
        out = torch.ones(held, dtype=torch.bool, device="cpu")
        out[stay] = False
        places = out.nonzero()[:, 0]
        self._keys[places] = keys[enter + held]
        self._rows[places.to(seen.device)] = rows

    @property
    def rows(self) -> Tensor:
        """The kept tokens, (at most R, K), a new tensor in the dtype and on the device of the data.

        Their order is random, and the same however the data was cut into batches.

        Raises:
            CalibrationError: no token was seen.
        """
        if self._rows is None or not len(self._rows):
            raise CalibrationError("the reservoir has seen no token: run the calibration first")
        return self._rows[self._keys.argsort().to(self._rows.device)]
