"""How far a model's outputs are from another's: for what predicts no tokens, an encoder of text, pictures or sound.

One output is compared, the first that holds floats; of a model with a head its logits.  A row is what stands along its
last axis: a token's state, a picture's scores.

    relative error   ||model - reference|| / ||reference||  over all rows together (Euclidean norms)
    cosine           of a row with the reference's, the mean over the rows, and the value that 99 % of them reach
    agreement        share of the rows whose largest entry is at the same place: of logits, the same label

Cosines are blind to a wrong scale, so the error stands beside them.  Intervals are 95 %, by the bootstrap over batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from w8a8.core.progress import Progress, tell
from w8a8.errors import ModelError
from w8a8.evaluation.intervals import Bootstrap, Estimate
from w8a8.model.inputs import ModelInputs, call, evaluating, seeded, tensors_in


@dataclass(frozen=True)
class OutputComparison:
    """See the module's docstring.

    output: What was compared: "logits", or the first float tensor by the name that the model gives it.
    agreement: None where the output is no logits.
    """

    output: str
    relative_error: Estimate
    cosine: Estimate
    cosine_p1: Estimate
    agreement: Estimate | None
    rows: int
    batches: int


@torch.no_grad()
def compare_outputs(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[ModelInputs],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> OutputComparison:
    """Run two models on the same inputs and compare what they return.

    Args:
        model: A quantised one, or any.  Not modified.
        reference: What it was made from.  Not modified.
        batches: Model inputs: mappings (keyword arguments), tensors or tuples (positional).

    Raises:
        ModelError: there is no batch; an output holds no float tensor, or is of another shape than the reference's, or
            not finite.
        CalibrationError: a model does not take a batch.
    """
    if not batches:
        raise ModelError("outputs were to be compared, and there is no batch: give at least one")
    squares: list[float] = []
    sizes: list[float] = []
    cosines: list[NDArray[np.float32]] = []
    same: list[float] = []
    name = ""
    for done, batch in enumerate(batches, start=1):
        (name, ours), (_, theirs) = _output(model, batch), _output(reference, batch)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{name} of {type(model).__name__} has shape {tuple(ours.shape)}, that of the reference "
                f"{tuple(theirs.shape)}: outputs can be compared of one architecture"
            )
        x, y = (t.reshape(-1, t.shape[-1]).to("cpu", torch.float64) for t in (ours, theirs))
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ModelError(f"{name} of batch {done - 1} is not finite in one of the models; try float32 or bfloat16")
        squares.append(float((x - y).square().sum()))
        sizes.append(float(y.square().sum()))
        cosines.append(nn.functional.cosine_similarity(x, y, dim=-1).to(torch.float32).numpy())
        same.append(float((x.argmax(-1) == y.argmax(-1)).sum()))
        tell(progress, done, len(batches), "comparing outputs")
    draw, rows = Bootstrap(len(squares), seed=seed), [len(values) for values in cosines]
    worst = draw.quantile([-values for values in cosines], 0.99)
    return OutputComparison(
        name,
        _root(draw.ratio(squares, sizes)) if sum(sizes) else Estimate(*(3 * [math.inf if sum(squares) else 0.0])),
        draw.ratio([float(values.astype(np.float64).sum()) for values in cosines], rows),
        Estimate(-worst.mean, -worst.high, -worst.low),
        draw.ratio(same, rows) if name == "logits" else None,
        sum(rows),
        len(rows),
    )


def _output(model: nn.Module, batch: ModelInputs) -> tuple[str, Tensor]:
    """The tensor that is compared, and its name."""
    with evaluating(model), seeded(model):
        out = call(model, batch)
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim and logits.is_floating_point():
        return "logits", logits
    named = out.items() if hasattr(out, "items") else [("the output", out)]
    for name, value in named:
        for tensor in tensors_in(value):
            if tensor.is_floating_point() and tensor.ndim:
                return str(name), tensor
    raise ModelError(f"the output of {type(model).__name__} holds no float tensor, so there is nothing to compare")


def _root(square: Estimate) -> Estimate:
    """Of an estimate of a square."""
    return Estimate(*(math.sqrt(max(value, 0.0)) for value in (square.mean, square.low, square.high)))
