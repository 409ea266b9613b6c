"""Which of a few ways to smooth makes the best quantised model: seen on the whole model, on calibration data.

The search (`alpha`) looks at one group at a time, and adds up errors that are not worth the same.  So at its end the
searched setting, one alpha for all groups (`CANDIDATES`) and no smoothing are each quantised and run.  Two things are
measured, on the same tokens for all:

    distance   ||quantised - float|| / ||float|| of the outputs (logits), on a few thousand tokens
    loss       of a causal language model: the mean of -log p(next token) in nats, the logarithm of its perplexity

Of the ways within `NEAR` times the least distance the one of least loss is kept; where there is no loss, the one of
least distance.  The distance alone does not see whereto the outputs moved: at 8 bits the rounding of the weights shifts
a perplexity by a tenth of a per cent either way, on all text alike.  The loss alone would follow data that the model
predicts badly: on random tokens, noise lowers it.

The price per way is a pass with quantised layers over at most `TOKENS` tokens, and with a static scheme one in float to
measure its grids.  Ways that fold the same are scored once.

What smoothing can gain is bounded by what the layers lose whose operands it scales.  Where these are few, as in models
whose norms come after the sums, of which only what reads the values folds, one more pass sees that: these layers left
float (`SPARED`).  If that does not bring the outputs nearer by more than `GAIN`, the ways differ by chance alone, and
none is kept.  Of a causal language model, in whose choice the loss has a say, this is not asked.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w8a8.calibration.calibrate import grids_of_schemes
from w8a8.calibration.data import Calibration
from w8a8.core.affine import QParams
from w8a8.core.scheme import Scheme
from w8a8.layers.linear import float_operands
from w8a8.model.inputs import ModelInputs, call, evaluating, seeded, tensors_in
from w8a8.model.swapping import build, swapped
from w8a8.records.smoothing import Score

CANDIDATES = (0.3, 0.5, 0.7, 0.85)
"""Alphas for all groups that compete with the searched ones."""

TOKENS = 65536
"""Tokens that the loss is measured on."""

COMPARED_TOKENS = 4096
"""Tokens that outputs are compared on."""

SPARED = "left float"
"""The score of a model whose layers that smoothing could help are float."""

FEW = 0.5
"""The share of the quantised weights below which it is asked first what smoothing can gain."""

GAIN = 0.9
"""How far the distance must fall with those layers left float, for a contest to be held.

All-MiniLM-L6-v2 on docstrings: 0.97 to 1.01 with w8a8, w8a8-asym and w8a8-static, and no way was better on other text
by more than 3 %; its contest took three quarters of smoothing's time.
"""

KEPT_BYTES = 1 << 28
"""Float outputs that are kept from one way to the next; more are computed again."""

NEAR = 1.25
"""How much farther from the float outputs than the nearest way one may be, to be kept for its loss."""


def winner(scores: Mapping[str, Score]) -> str:
    """The name of the best; of equals the first."""
    least = min(score.distance for score in scores.values())
    near = {name: score for name, score in scores.items() if score.distance <= NEAR * least}

    def key(name: str) -> float:
        score = near[name]
        return score.distance if score.loss_nats is None else score.loss_nats

    return min(near, key=key)


class Contest:
    """Scores the weights that a model has at the moment, quantised.

    Args:
        model: Float.  Not modified.
        calibration: Its first batches are run.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, scheme: Scheme, chosen: Sequence[str]) -> None:
        self.model = model
        self.scheme = scheme
        self.chosen = chosen
        batches = calibration.batches or (calibration.first(model),)
        self._predicts = self._predicts_tokens(batches[0])
        self._compared = _first(batches, COMPARED_TOKENS)
        self._scored = _first(batches, TOKENS) if self._predicts else self._compared
        self._data = Calibration(self._scored, calibration.description)
        # folds round the weights of a narrower dtype, and with them its outputs
        self._keeps = all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())
        self._exact: list[list[Tensor]] = []

    def score(self, *, spared: Collection[str] = ()) -> Score:
        """The score of the weights of now, whose float outputs are as before any fold; errors as `w8a8.simulate`.

        Args:
            spared: Of the chosen layers those that are left float.
        """
        schemes = {name: self.scheme for name in self.chosen if name not in spared}
        layers = build(
            self.model,
            schemes,
            simulated=not self.scheme.integer_executable,
            input_params=self._grids(schemes),
        )
        distance = self._distance(layers)
        if not self._predicts:
            return Score(distance, None)
        with swapped(self.model, layers):
            return Score(distance, self._loss_nats())

    def asks_first(self, helped: Collection[str]) -> bool:
        """Whether it is worth a pass to see what smoothing could gain at all."""
        weights = {name: float_operands(self.model.get_submodule(name))[0].numel() for name in self.chosen}
        few = sum(weights[name] for name in helped) < FEW * sum(weights.values())
        return few and not self._predicts and len(helped) < len(self.chosen)

    def _grids(self, schemes: Mapping[str, Scheme]) -> dict[str, QParams]:
        activations = self.scheme.activations
        observer = "absmax" if activations is None or activations.symmetric else "minmax"
        return grids_of_schemes(self.model, schemes, self._data, observer)

    def _loss_nats(self) -> float:
        """The mean over all predicted tokens of -log p."""
        total, count = 0.0, 0
        for batch in self._scored:
            logits, ids, counted = self._outputs(batch)[0], _ids(batch), _counted(batch)
            assert ids is not None, "the model predicts tokens"
            losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).to(torch.float32),
                ids[:, 1:].flatten().to(logits.device, torch.int64),
                reduction="none",
            )
            if counted is not None:
                losses = losses[counted[:, 1:].flatten().to(losses.device)]
            total += float(losses.to(torch.float64).sum())
            count += losses.numel()
        return total / count if count and math.isfinite(total) else math.inf

    def _distance(self, layers: Mapping[str, nn.Module]) -> float:
        """||quantised - float|| / ||float|| over all outputs."""
        distance, size = 0.0, 0.0
        for place, batch in enumerate(self._compared):
            exact = self._float_outputs(place, batch)
            with swapped(self.model, layers):
                outputs = self._outputs(batch)
            for new, old in zip(outputs, exact, strict=True):
                finite = torch.isfinite(old)
                distance += float((new - old)[finite].to(torch.float64).square().sum())
                size += float(old[finite].to(torch.float64).square().sum())
        return math.sqrt(distance / size) if size and math.isfinite(distance) else math.inf

    def _float_outputs(self, place: int, batch: ModelInputs) -> list[Tensor]:
        """Of a batch by its place: computed once, where they are few and a fold does not change them."""
        if place < len(self._exact):
            return self._exact[place]
        found = self._outputs(batch)
        kept = sum(t.nbytes for outputs in (*self._exact, found) for t in outputs)
        if self._keeps and place == len(self._exact) and kept <= KEPT_BYTES:
            self._exact.append([t.clone() for t in found])  # what a model returns it may write to again
        return found

    def _predicts_tokens(self, batch: ModelInputs) -> bool:
        """Whether the model is a causal language model whose logits stand beside the token ids of the batch.

        Those of a model that reads something else too (a picture, a soft prompt) are more than the ids, and which of
        them predicts which token is the model's to know: there is then no loss.
        """
        ids, model = _ids(batch), self.model
        generates = getattr(model, "can_generate", None)
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if ids is None or ids.shape[-1] < 2 or not callable(generates) or not generates() or encodes:
            return False
        logits = self._outputs(batch)[0]
        return logits.ndim == 3 and logits.shape[:2] == ids.shape and int(ids.max()) < logits.shape[2]

    @torch.no_grad()
    def _outputs(self, batch: ModelInputs) -> list[Tensor]:
        """The float tensors of the model's output; of a language model its logits come first."""
        with evaluating(self.model), seeded(self.model):
            out = call(self.model, batch)
        logits = [out.logits] if isinstance(getattr(out, "logits", None), Tensor) else tensors_in(out)
        return [t for t in logits if t.is_floating_point()]


def _first(batches: Sequence[ModelInputs], tokens: int) -> list[ModelInputs]:
    """The first batches, until they have so many tokens; at least one."""
    found: list[ModelInputs] = []
    seen = 0
    for batch in batches:
        if seen >= tokens:
            break
        found.append(batch)
        seen += _tokens(batch)
    return found


def _ids(batch: ModelInputs) -> Tensor | None:
    """The (B, T) token ids of a batch, if it has such."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in (torch.int64, torch.int32) else None


def _counted(batch: ModelInputs) -> Tensor | None:
    """(B, T) bool: the tokens that are no padding; None where all are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _tokens(batch: ModelInputs) -> int:
    """How many tokens a batch has: of ids all, of other tensors all but the last axis."""
    ids = _ids(batch)
    if ids is not None:
        return ids.numel()
    return max((t.shape[:-1].numel() for t in tensors_in(batch)), default=1)
