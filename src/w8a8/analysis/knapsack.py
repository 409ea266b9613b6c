"""The multiple-choice knapsack: one option for each group of layers, under a limit of bytes or of KL.

    limit of bytes    least KL,     bytes <= limit
    limit of KL       least bytes,  KL <= bound

Costs are measured elsewhere and add up.  Solved exactly by scipy's `milp` (HiGHS).  A greedy choice by KL per byte was
the alternative without scipy; it misses limits by up to a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from w8a8.errors import ModelError, SchemeError
from w8a8.records.layers import Choice

CURVE = 9
"""Points of a curve of choices."""


@dataclass(frozen=True)
class GroupCosts:
    """Layers that move together, and what each option costs them; the last option is "float".

    Lookup tables are a group too, with one option, what they become.

    bytes: Of the group's tensors.  kl_nats: Per token, with this group alone quantised.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]
    bytes: tuple[int, ...]
    kl_nats: tuple[float, ...]


def solve(
    groups: Sequence[GroupCosts], fixed: int = 0, *, limit: int | None = None, kl_bound: float | None = None
) -> tuple[str, ...]:
    """The option of each group: the least KL in so many bytes, or the fewest bytes of so little KL.

    Args:
        fixed: Bytes beside those of the groups.
        limit: Of all bytes; or
        kl_bound: nats per token.

    Raises:
        SchemeError: no choice keeps to the limit; the message says which bytes can be reached.
        ModelError: scipy is not installed.
    """
    import numpy as np

    milp, bounds, linear_constraint = milp_of_scipy()
    sizes = np.array([size for group in groups for size in group.bytes], dtype=np.float64)
    costs = np.array([max(0.0, kl) for group in groups for kl in group.kl_nats])
    lengths = [len(group.options) for group in groups]
    one_each = np.repeat(np.eye(len(groups)), lengths, axis=1)  # a row for each group, 1 where its options lie
    if limit is not None:
        least = fixed + sum(min(group.bytes) for group in groups)
        if limit < least:
            raise SchemeError(
                f"a budget of {limit:,} bytes cannot be kept: with every layer as small as it gets the model has "
                f"{least:,}, {fixed:,} of them in tensors that are not to be quantised; allow that, or include more"
            )
        row, most = sizes, float(limit - fixed)
        objective = costs / max(float(costs.max()), 1e-30)
    else:
        assert kl_bound is not None, "one of the two limits"
        row, most = costs, kl_bound
        # of choices of equal bytes the one of least KL
        objective = sizes / sizes.sum() + 1e-6 * costs / max(float(costs.sum()), 1e-30)
    scale = max(most, float(row.max()), 1e-30)  # the solver's tolerance is absolute
    found = milp(
        objective,
        constraints=[
            linear_constraint(one_each, 1, 1),
            linear_constraint(row[None] / scale, -np.inf, most / scale),
        ],
        integrality=np.ones(len(sizes)),
        bounds=bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise SchemeError(f"no choice keeps to the budget ({found.message}); allow more, or exclude less")
    shares = np.split(found.x, np.cumsum(lengths)[:-1])
    return tuple(group.options[int(np.argmax(share))] for group, share in zip(groups, shares, strict=True))


def total(groups: Sequence[GroupCosts], picked: Sequence[str], fixed: int) -> Choice:
    """Bytes and KL of a choice, added up."""
    places = [group.options.index(option) for group, option in zip(groups, picked, strict=True)]
    size = fixed + sum(group.bytes[i] for group, i in zip(groups, places, strict=True))
    return Choice(size, sum(group.kl_nats[i] for group, i in zip(groups, places, strict=True)))


def curve(groups: Sequence[GroupCosts], fixed: int) -> tuple[Choice, ...]:
    """Choices between the smallest and the float model, at evenly spaced limits."""
    least = sum(min(group.bytes) for group in groups)
    most = sum(group.bytes[-1] for group in groups)
    limits = [fixed + least + (most - least) * i // (CURVE - 1) for i in range(CURVE)]
    return tuple(total(groups, solve(groups, fixed, limit=limit), fixed) for limit in limits)


def milp_of_scipy() -> tuple[Any, Any, Any]:
    """scipy's solver and what it is given; `ModelError` where scipy is not installed."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ModelError(
            f"a budget was asked for, which scipy's milp keeps, and scipy cannot be imported: {error}; "
            "pip install 'w8a8[budget]'"
        ) from error
    return milp, Bounds, LinearConstraint
