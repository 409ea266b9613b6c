"""Directories in transformers' hands: the class that it has for compressed-tensors configurations looks first.

What `w8a8.load` runs becomes ours, everything else stays theirs.  `disable` puts theirs back.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import w8a8.decoding.attention  # noqa: F401 - attn_implementation="w8a8" is known from here on
from w8a8 import kernels
from w8a8.checkpoint.layout import runs_here
from w8a8.hf.quantizer import W8A8Config

_LOG = logging.getLogger(__name__)
_THEIRS = "compressed-tensors"


def enable(*, head: str = "float", embeddings: str = "float", kernel: str = kernels.AUTO, strict: bool = False) -> None:
    """Let transformers run compressed-tensors directories by this package, in this process.

    Whatever `w8a8.load` runs: 8-bit integer layers in integers, and weight-only ones, packed or not, with a float
    product and their weights in int8, where transformers would keep them decompressed.  What `load` does not run (fp8,
    reordered groups, quantised caches) is loaded by transformers as before, and so is everything after `disable`.
    Called twice, the second call says how what is loaded from then on is run.

    Args:
        head, embeddings, kernel, strict: As for `w8a8.load`.

    Raises:
        ModelError: `head` or `embeddings` is neither "float" nor "int8".
        KernelError: no kernel has this name.
    """
    options: dict[str, Any] = {"head": head, "embeddings": embeddings, "kernel": kernel, "strict": strict}
    W8A8Config(**options)  # it checks them
    theirs: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    ours: Any = _Ours(theirs.theirs if isinstance(theirs, _Ours) else theirs, options)
    AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = ours


def disable() -> None:
    """Undo `enable`."""
    ours = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    if isinstance(ours, _Ours):
        AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = ours.theirs


@contextlib.contextmanager
def enabled(
    *, head: str = "float", embeddings: str = "float", kernel: str = kernels.AUTO, strict: bool = False
) -> Iterator[None]:
    """`enable` for the length of a `with` block."""
    before = AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS]
    enable(head=head, embeddings=embeddings, kernel=kernel, strict=strict)
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[_THEIRS] = before


class _Ours:
    """Stands where transformers has its class for compressed-tensors configurations, and makes ours where it can."""

    def __init__(self, theirs: Any, options: Mapping[str, Any]) -> None:
        self.theirs = theirs
        self.options = options

    def from_dict(self, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The configuration that a file describes."""
        ours = runs_here(config_dict)
        _LOG.info("w8a8: this directory is run by %s", "w8a8" if ours else "transformers' own quantizer")
        if ours:
            return W8A8Config.from_dict(config_dict, **self.options, **kwargs)
        return self.theirs.from_dict(config_dict, **kwargs)
