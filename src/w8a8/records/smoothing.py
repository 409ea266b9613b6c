"""What smoothing did to a model, group by group."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from w8a8.errors import few


@dataclass(frozen=True)
class GroupReport:
    """What became of one source when it was to be smoothed.

    source: The module that makes the tensor.
    readers: The modules that read it.
    alpha: How far it was smoothed; None: not at all.
    error_before, error_after: Relative output errors of its quantised linears under the scheme, summed, on tokens that
        its scales were not made from (see `w8a8.smoothing.alpha`); None where they were not measured.
    change: The relative change of the block's float output, as the gate saw it; None where nothing was folded.
    reason: Why it was not smoothed; None where it was.
    """

    source: str
    readers: tuple[str, ...]
    alpha: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    change: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Score:
    """One way to smooth, quantised: see `w8a8.smoothing.contest`.  Infinite where outputs are not finite."""

    distance: float
    loss_nats: float | None


@dataclass(frozen=True)
class SmoothReport:
    """What smoothing did to a model.

    scheme: The name of the scheme it was meant for.
    alpha: As asked: a number, or "auto".
    calibration: What was calibrated on.
    groups: Every group, in the order of the forward.
    refused: Sources that cannot be folded, each with its reason.
    change: The relative change of the model's float output on the probe.
    bound: What it may have been.
    scores: Of the contest: "none", an alpha or "searched", and its score; where it was asked first what could be
        gained, "left float" too, and where that was nothing these two alone.  Empty without contest.
    kept: What won it; None where there was none.
    """

    scheme: str
    alpha: float | str
    calibration: str
    groups: tuple[GroupReport, ...]
    refused: tuple[GroupReport, ...]
    change: float
    bound: float
    scores: dict[str, Score] = field(default_factory=dict)
    kept: str | None = None

    @property
    def smoothed(self) -> tuple[GroupReport, ...]:
        """The groups that were folded."""
        return tuple(group for group in self.groups if group.reason is None)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"Smoothed {len(self.smoothed)} of {len(self.groups)} groups for {self.scheme}, alpha {self.alpha}, on "
            f"{self.calibration}; the float output changed by {self.change:.1e} (relative, bound {self.bound:.1e}).",
        ]
        if self.scores:
            lines.append(f"  {'whole model quantised':>22} {'distance':>9} {'loss, nats':>11}")
        for name, score in self.scores.items():
            loss = "" if score.loss_nats is None else f"{score.loss_nats:.5f}"
            lines.append(f"  {name:>22} {score.distance:>9.2e} {loss:>11}" + ("  kept" if name == self.kept else ""))
        if self.groups:
            lines.append(f"{'alpha':>6} {'error was':>10} {'is':>9} {'change':>9}  source -> readers")
        for g in self.groups:
            alpha = "none" if g.alpha is None else f"{g.alpha:.2f}"
            why = "" if g.reason is None else f": {g.reason}"
            lines.append(
                f"{alpha:>6} {_figure(g.error_before):>10} {_figure(g.error_after):>9} {_figure(g.change):>9}  "
                f"{g.source} -> {_short(g.readers, g.source)}{why}"
            )
        read = [g for g in self.refused if g.readers]
        lines += [f"  cannot be folded: {g.source} -> {_short(g.readers, g.source)}: {g.reason}" for g in read]
        if len(self.refused) > len(read):
            lines.append(
                f"  {len(self.refused) - len(read)} more sources have no linear to be folded into: "
                "`w8a8 inspect MODEL --pairs` has the reasons"
            )
        return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _short(readers: Sequence[str], source: str) -> str:
    """Readers without the path they share with the source."""
    shared = source.rpartition(".")[0]
    return few((name.removeprefix(f"{shared}.") for name in readers), 4, counted=True)
