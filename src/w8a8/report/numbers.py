"""How numbers read on the page: one way for each kind of value, wherever it stands."""

from collections.abc import Callable, Sequence

scientific, grouped, significant = "{:.2e}".format, "{:,}".format, "{:.4g}".format
"""How small figures read, counts, and what may be of any size."""

ABSENT = "\u2013"  # how a value that was not measured reads


def megabytes(count: int) -> str:
    """`12.30 MB`, or `1.23 GB`."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def times(more: float, less: float, what: str) -> str:
    """`2.00 times smaller`; empty where there is nothing to divide by."""
    return f"{more / less:.2f} times {what}" if less else ""


def rate(value: float) -> str:
    """Four digits, or all of a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def fixed(digits: int) -> Callable[[float], str]:
    """Reads a number with so many digits behind the point."""
    return f"{{:.{digits}f}}".format


def percent(value: float) -> str:
    """A share as `12.34 %`."""
    return f"{100 * value:.2f} %"


def by(shape: Sequence[int]) -> str:
    """`64 x 32`."""
    return " x ".join(map(str, shape))


def without(count: int, what: str) -> str:
    """How many a plot leaves out; empty where it has all."""
    return f"{count} {what} not drawn." if count else ""
