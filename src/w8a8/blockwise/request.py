"""What is asked of every block: the scheme, the data, and what is done with them; and what of it decides the bytes."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from w8a8.calibration.calibrate import checked_observer
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer
from w8a8.core.scheme import Scheme
from w8a8.errors import CheckpointError, SchemeError
from w8a8.smoothing.way import AUTO, NONE, SEARCHED, Smoothing
from w8a8.streaming.team import processes

PLAIN, FOLDED = "plain", "folded"  # what the blocks returned before any fold, and after


@dataclass(frozen=True)
class Request:
    """What is asked of every block."""

    scheme: Scheme
    calibration: Calibration
    observer: str | Callable[[], Observer]
    smoothing: Smoothing

    @property
    def chains(self) -> tuple[str, ...]:
        """The kinds of activations that pass from block to block."""
        return (PLAIN, FOLDED) if self.smoothing != NONE and self.scheme.static else (PLAIN,)


def request_of(
    scheme: Scheme,
    calibration: Calibration,
    observer: str | Callable[[], Observer],
    smooth: Smoothing | str | float | None,
) -> Request:
    """What is asked, checked as far as can be before a file is opened."""
    if processes() > 1:
        raise CheckpointError(
            f"calibration block by block goes from each block to the next, and {processes()} processes were started: "
            "run it without torchrun"
        )
    if not calibration.batches:
        raise SchemeError(
            f"{calibration.description} is a loop: block by block the batches must be known; give texts, ids or batches"
        )
    way = Smoothing.asked(smooth, calibrated=True)
    way = SEARCHED if way == AUTO else way
    if scheme.measured is not None:
        checked_observer(observer, scheme.measured)
    elif way == NONE:
        raise SchemeError(
            f"the scheme {scheme.name} without smoothing does not use calibration data: leave --calib out, and it is "
            "streamed tensor by tensor"
        )
    return Request(scheme, calibration, observer, way)


def told_of(request: Request) -> dict[str, str]:
    """What else decides the bytes: the data, what is done with it, and what computes it."""
    data = hashlib.sha256()
    for batch in request.calibration.batches:
        values = batch if isinstance(batch, tuple) else (batch,) if isinstance(batch, Tensor) else batch
        named = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in named:
            data.update(f"{key} ".encode())
            data.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    observer = request.observer if isinstance(request.observer, str) else repr(request.observer())
    return {
        "calibration": f"{request.calibration.description}, digest {data.hexdigest()[:16]}",
        "observer": observer,
        "smoothing": str(None if request.smoothing == NONE else request.smoothing.told),
        "arithmetic": f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    }


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return f"{values.dtype} {tuple(values.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes()
