"""What of a model is quantised, what is not, and why not: module by module, and in sums."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from w8a8.errors import few

TABLE = "QuantEmbedding"
"""The kind of a lookup table that is quantised."""


@dataclass(frozen=True)
class Totals:
    """Sums over modules; `macs` are multiply-adds per token."""

    modules: int
    parameters: int
    bytes: int
    macs: int


@dataclass(frozen=True)
class ModuleCoverage:
    """One module that holds parameters.  `reason` says why it is float; None for a quantised one.

    `weight_sqnr_db` is of a weight that was quantised by this call, on a sample of its rows (`w8a8.core.row_sample`):
    +inf where that lost nothing, None where it was not measured, and in JSON for both.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    macs: int
    scheme: str | None
    reason: str | None
    weight_sqnr_db: float | None = None


@dataclass(frozen=True)
class Coverage:
    """Every parameter-holding module of a model, quantised or left, in the model's order."""

    modules: tuple[ModuleCoverage, ...]

    @property
    def quantized(self) -> tuple[ModuleCoverage, ...]:
        """The modules that became `QuantLinear` or `QuantEmbedding`."""
        return tuple(m for m in self.modules if m.reason is None)

    @property
    def left(self) -> tuple[ModuleCoverage, ...]:
        """The modules that stayed float, each with its reason."""
        return tuple(m for m in self.modules if m.reason is not None)

    def left_by_reason(self) -> dict[str, list[ModuleCoverage]]:
        """The modules that stayed float, grouped."""
        groups: dict[str, list[ModuleCoverage]] = {}
        for module in self.left:
            groups.setdefault(module.reason or "", []).append(module)
        return groups

    def worst_weights(self, count: int = 10) -> tuple[ModuleCoverage, ...]:
        """The quantised modules whose weights lost most, those of the lowest SQNR first."""
        measured = [m for m in self.quantized if m.weight_sqnr_db is not None]
        return tuple(sorted(measured, key=lambda m: m.weight_sqnr_db or 0.0)[:count])

    def with_weight_sqnr(self, found: Mapping[str, float]) -> "Coverage":
        """The same with the SQNR of weights, in dB, by the names of their modules."""
        return Coverage(tuple(replace(m, weight_sqnr_db=found.get(m.name)) for m in self.modules))

    def totals(self) -> dict[str, Totals]:
        """Sums for `"quantized"`, `"float"` and `"all"`."""
        groups = {"quantized": self.quantized, "float": self.left, "all": self.modules}
        return {
            name: Totals(
                len(group), sum(m.parameters for m in group), sum(m.bytes for m in group), sum(m.macs for m in group)
            )
            for name, group in groups.items()
        }

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON, which has no infinity: the SQNR of a weight that lost nothing is None."""
        return {
            "totals": {name: asdict(totals) for name, totals in self.totals().items()},
            "modules": [
                asdict(replace(m, weight_sqnr_db=None) if m.weight_sqnr_db == math.inf else m) for m in self.modules
            ],
        }

    def __str__(self) -> str:
        totals = self.totals()
        done, every = totals["quantized"], totals["all"]
        lines = [
            f"{done.modules} of {every.modules} modules quantised: "
            f"{percentage(done.parameters, every.parameters)} of the parameters, "
            f"{percentage(done.macs, every.macs)} of the multiply-adds; {megabytes(every.bytes)} in all"
        ]
        for reason, modules in self.left_by_reason().items():
            count = sum(m.parameters for m in modules)
            names = few(m.name for m in modules)
            lines.append(f"  float: {names} ({len(modules)}, {count:,} parameters): {reason}")
        return "\n".join(lines)


def megabytes(count: int) -> str:
    """In words: `12.34 MB`."""
    return f"{count / 1e6:.2f} MB"


def percentage(part: int, whole: int) -> str:
    """In words: `12.3 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
