"""QuantEmbedding: the layer that takes the place of `nn.Embedding`, whose table is int8 with a scale for each row.

    y = (codes[ids] - zero_point[ids]) * scale[ids]    in float32, then one cast to the dtype of the float table

These are the values of the table that was quantised and dequantised, bit for bit; only the rows that are looked up are
ever float.  What it holds, and how that goes to files and back, is `QuantLayer`, with num_embeddings for N and
embedding_dim for K.  Files have the codes as int8 (`weight`), not in words: transformers 5.23 stops at a table in words
("'Embedding' object has no attribute 'weight'").  Words are read.

A head that has the same codes and scales, as one that was tied has, shares the codes: `share` lets the table hold the
head's own tensor, packed or not, and a row of a packed one is found by its place in the panels.  Not taken: a copy for
the lookup, which would hold what is often the largest weight of a model twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w8a8.core.scheme import MAX_CODE_BITS, PRESETS, PerColumn, Scheme
from w8a8.errors import SchemeError
from w8a8.kernels import AUTO
from w8a8.layers.buffers import QuantLayer, quant_layers
from w8a8.layers.weights import make_weight

TABLE = PRESETS["w8a16"].scheme
"""What a table gets here: symmetric int8, one scale for each row."""


class QuantEmbedding(QuantLayer):
    """A lookup table of codes.  Made by `from_float`, or empty, to be filled from a file.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        scheme: Of weights only; any that has codes, files of others have groups.
        padding_idx: As `nn.Embedding` has it, for code that asks; nothing here depends on it.
        device: Where the empty buffers are made, whatever the process's default is; "meta" makes none.
        dtype: Of what is looked up; `weight.dtype` tells it.

    Raises:
        SchemeError: the scheme has activations, which ids are not, or no codes; K does not divide into groups.
    """

    _shares = False  # whether the codes may be another layer's too

    @torch.inference_mode(False)  # where a layer is made says nothing of where it is used
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme = TABLE,
        *,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = scheme.weights
        if scheme.activations is not None:
            raise SchemeError(f"{scheme} is for products; a table is looked up by ids, and its scheme is weight-only")
        if weights.bits > MAX_CODE_BITS or isinstance(weights.granularity, PerColumn):
            raise SchemeError(f"{scheme} does not fit a table: it has codes of at most {MAX_CODE_BITS} bits, by rows")
        size = getattr(weights.granularity, "size", 1)
        if embedding_dim % size:
            raise SchemeError(f"K={embedding_dim} does not divide into groups of {size}")
        super().__init__(
            embedding_dim, num_embeddings, scheme, bias=None, integer=False, kernel=AUTO, device=device, dtype=dtype
        )
        self.padding_idx = padding_idx

    @classmethod
    def in_place_of(cls, table: nn.Module, scheme: Scheme = TABLE) -> "QuantEmbedding":
        """An empty layer in the shape of a float `nn.Embedding`, which is not modified, on the meta device."""
        weight: Tensor = table.get_parameter("weight")
        padding: Any = getattr(table, "padding_idx", None)
        n, k = weight.shape
        return cls(n, k, scheme, padding_idx=padding, device="meta", dtype=weight.dtype)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()  # inside of the line above, which ends it
    def from_float(cls, table: nn.Module, scheme: Scheme = TABLE) -> "QuantEmbedding":
        """Quantise a float table, once.

        Args:
            table: `nn.Embedding`.  Not modified, not kept.
            scheme: Of weights only.

        Returns:
            A new layer on the device of `table`, in evaluation mode or not, as `table` is.

        Raises:
            SchemeError: not a table; it has no values yet (meta); the scheme does not fit.
            NonFiniteError: the table holds a NaN or an infinity.
        """
        if not isinstance(table, nn.Embedding):
            raise SchemeError(f"expected nn.Embedding, found {type(table).__name__}")
        weight = table.weight.detach()
        if weight.is_meta:
            raise SchemeError("the table is on the meta device: it has no values yet; load the model first")
        layer = cls.in_place_of(table, scheme)
        layer.take_weight(make_weight(weight, scheme.weights))
        return layer.train(table.training)

    @property
    def num_embeddings(self) -> int:
        """N."""
        return self.out_features

    @num_embeddings.setter
    def num_embeddings(self, number: int) -> None:
        """Nothing: transformers says it again where a vocabulary is resized to what it is.

        Raises:
            SchemeError: to another number.
        """
        if number != self.out_features:
            raise SchemeError(
                f"num_embeddings={number} was set on a lookup table in int8 of {self.out_features} rows, whose number "
                "is fixed: resize the float model and quantise that"
            )

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up.

        Args:
            input: Ids, int32 or int64, of any shape.  Not modified.

        Returns:
            (..., K) in the dtype of the float table; it has no gradient.

        Raises:
            IndexError: an id is no row.
        """
        ids, zero_point = input.reshape(-1), self._buffers["weight_zero_point"]
        # first: it looks whether there are such rows, which a place in the panels does not
        scale = _of_rows(self._buffers["weight_scale"], ids)
        # `dequantize`, but nothing is written into: then the model that this is in can be one graph (`w8a8.optimize`)
        values = self._codes_of(ids).to(torch.float32).unflatten(-1, (scale.shape[-2], -1))  # (M, G, size)
        if zero_point is not None:
            values = values - _of_rows(zero_point, ids)
        found: Tensor = (values * scale).to(self.dtype)
        return found.view(*input.shape, self.embedding_dim)

    def _codes_of(self, ids: Tensor) -> Tensor:
        """(M, K) int8."""
        packed = self._buffers["packed_weight"]
        if packed is None:
            codes = self._buffers["weight"]
            assert codes is not None, "a layer has codes, or room for them"
            return F.embedding(ids, codes)
        panel = packed.shape[2]  # (P, S, 32, g)
        rows = packed.transpose(1, 2)[ids // panel, ids % panel]
        return rows.reshape(len(ids), rows.shape[1] * rows.shape[2])[:, : self.embedding_dim]

    def share(self, other: QuantLayer) -> bool:
        """Hold the codes of another layer in the place of one's own, if they are the same; whether they are."""
        mine, theirs = self._buffers["weight_scale"], other._buffers["weight_scale"]
        alike = (
            (self.num_embeddings, self.embedding_dim) == (other.out_features, other.in_features)
            and self.scheme.weights == other.scheme.weights
            and mine is not None
            and theirs is not None
            and mine.device == theirs.device
            and not mine.is_meta
        )
        if not alike or not torch.equal(mine, theirs) or not torch.equal(self.codes, other.codes):  # type: ignore[arg-type]
            return False
        for name in ("weight", "packed_weight"):
            self._buffers.pop(name, None)
            if name in other._buffers:
                self._buffers[name] = other._buffers[name]
        self._shares = True
        return True

    @property
    def _summed(self) -> int:
        return 0  # nothing is summed up

    @property
    def in_words(self) -> bool:
        """Never: see the module's docstring."""
        return False

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shares and self.packed_weight is None:
            # they are written for each who has them, and who writes takes tensors in one memory for one
            destination[prefix + "weight"] = self.codes.clone()

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._shares and self.packed_weight is None:  # filled in place, which another layer's codes are not for
            self._buffers["weight"] = self.codes.clone()
        self._shares = False
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, scheme={self.scheme.name}"


def _of_rows(grid: Tensor | None, ids: Tensor) -> Tensor:
    """What the rows have of a scale or a zero point, (M, G, 1); of one that is all rows', (1, 1)."""
    assert grid is not None, "codes have a scale"
    rows: Tensor = grid if grid.ndim == 1 else F.embedding(ids, grid)
    return rows.unsqueeze(-1)


def share_codes(model: nn.Module) -> None:
    """Have the tables of a model hold the codes of layers that have the same: heads, first, and other tables."""
    layers = [layer for _, layer in quant_layers(model)]
    others = sorted(layers, key=lambda layer: isinstance(layer, QuantEmbedding))
    for i, layer in enumerate(others):
        if isinstance(layer, QuantEmbedding):
            any(layer.share(other) for other in others[:i])
