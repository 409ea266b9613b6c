"""How far activations are scaled into weights, as it is asked for.

"none"       not at all
0.5          this alpha for all groups, the paper's
"searched"   for each group the alpha that costs it least, or none: `w8a8.smoothing.alpha`
"auto"       of these what is best for the quantised model as a whole: `w8a8.smoothing.contest`
"""

from dataclasses import dataclass

from w8a8.errors import SchemeError
from w8a8.smoothing.alpha import GRID, check_alpha


@dataclass(frozen=True)
class Smoothing:
    """One of them.

    told: As reports tell it.
    alphas: The candidates of a group; none where nothing is smoothed, or a contest decides.
    forced: A group takes its candidate whether or not it costs less than no smoothing.
    """

    told: float | str
    alphas: tuple[float, ...] = ()
    forced: bool = True

    @classmethod
    def of(cls, smooth: "Smoothing | str | float") -> "Smoothing":
        """The one that is written so; `SchemeError` where there is none, or it is a number that is no alpha."""
        if isinstance(smooth, Smoothing):
            return smooth
        for named in (NONE, SEARCHED, AUTO):
            if smooth == named.told:
                return named
        try:
            alpha = float(smooth) if isinstance(smooth, str) else smooth
        except ValueError:
            raise SchemeError(
                f"smooth={smooth!r} is unknown; use 'auto', 'searched', an alpha in 0..1, or 'none'"
            ) from None
        check_alpha(alpha)
        return cls(float(alpha), (float(alpha),))

    @classmethod
    def asked(cls, smooth: "Smoothing | str | float | None", *, calibrated: bool) -> "Smoothing":
        """The same, or where nothing is said "auto" with calibration data and "none" without.

        Raises:
            SchemeError: as `of`; or there is no data, and something is to be smoothed.
        """
        way = (AUTO if calibrated else NONE) if smooth is None else cls.of(smooth)
        if way != NONE and not calibrated:
            raise SchemeError(
                f"smooth={way.told!r} was asked for, which needs calibration data to see the outliers of activations: "
                "give calibration=, or smooth='none'"
            )
        return way


NONE = Smoothing("none")
SEARCHED = Smoothing("searched", GRID, forced=False)
AUTO = Smoothing("auto")
