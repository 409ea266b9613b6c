"""Code of others makes tensors for us as it was written: in float32 and on the CPU, whatever the process has set.

What the package makes names its dtype and device.  A model's class, a tokenizer or a loop of generation does not: they
take what `torch.set_default_dtype` and `torch.set_default_device` left.  Where such code is run for the package's own
ends (a model to be filled from files, a small trial, token ids), that would be another model, or one without values.
A model of the caller's that is called is left as the caller would call it.

Autocast is another such setting: it would round the operands of a product whose arithmetic is written down.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """float32 and the CPU for what is made without saying so; afterwards what it was.

    Where the CPU is what is taken anyway nothing is entered: a default device is a mode of PyTorch's dispatcher, and
    while there is one no block runs fused.
    """
    before, usual = torch.get_default_dtype(), torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if torch.get_default_device() == usual else usual:
            yield
    finally:
        torch.set_default_dtype(before)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Products on this device in the dtypes of their operands, whatever `torch.autocast` says around them."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
