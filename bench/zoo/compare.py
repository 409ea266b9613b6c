"""Whether two outputs, or two directories, are the same to the bit, and where they are not."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def same(one: list[Tensor], other: list[Tensor]) -> str | None:
    """None where the tensors agree bit for bit, else how they do not."""
    if len(one) != len(other):
        return f"{len(one)} tensors, and {len(other)}"
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} of {tuple(a.shape)}, and {b.dtype} of {tuple(b.shape)}"
        if not torch.equal(_bits(a), _bits(b)):
            worst = max(worst, relative(a, b))
    return f"differs by {worst:.1e}" if worst else None


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, of which NaN equals NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of the first; never 0, so that two zeros of unlike signs show.

    What is minus infinity in both, as a masked logit is, differs by nothing.
    """
    a, b = a.double(), b.double()
    away = torch.where(a == b, 0.0, a - b)
    return max(float(away.norm() / a[a.isfinite()].norm().clamp_min(1e-30)), 1e-300)


def difference(before: list[Tensor], after: list[Tensor]) -> float | None:
    """The largest relative error of the float tensors of an output, to three digits."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a.is_floating_point() and a.shape == b.shape]
    errors = [relative(a, b) for a, b in pairs if a.numel()]
    return float(f"{max(errors):.3g}") if errors else None


def differing(one: Path, other: Path) -> str | None:
    """None where the files of both directories are the same, else what is not."""
    names = [{path.name for path in directory.iterdir()} for directory in (one, other)]
    if names[0] != names[1]:
        return f"files of one only: {', '.join(sorted(names[0] ^ names[1]))}"
    for name in sorted(names[0]):
        if (one / name).read_bytes() != (other / name).read_bytes():
            how = _values if name.endswith(".json") else _tensors
            return f"{name}: {how(one / name, other / name)}"
    return None


def _values(one: Path, other: Path) -> str:
    unequal = list(_unequal(json.loads(one.read_text()), json.loads(other.read_text()), ""))
    return f"other values of {', '.join(unequal[:5])}" if unequal else "the same values in another order"


def _unequal(a: Any, b: Any, prefix: str) -> Any:
    for key in {**a, **b}:
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            yield from _unequal(a[key], b[key], f"{prefix}{key}.")
        elif (key in a, a.get(key)) != (key in b, b.get(key)):
            yield prefix + key


def _tensors(one: Path, other: Path) -> str:
    a, b = load_file(one), load_file(other)
    if a.keys() != b.keys():
        return f"tensors of one only: {', '.join(sorted(a.keys() ^ b.keys())[:4])}"
    unequal = [name for name in a if same([a[name]], [b[name]])]
    return f"other values of {', '.join(unequal[:4])}" if unequal else "the same tensors in another order"
