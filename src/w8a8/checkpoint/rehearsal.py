"""The whole way to a saved directory, gone on a model of one block before it is gone on the real one.

Saving comes last, after hours perhaps, and is where a model's class, its tokenizer or the disk show what they do not
do. The stand-in is of the same class and widths, with one block and hardly a vocabulary.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from w8a8 import convert
from w8a8.checkpoint.writer import save
from w8a8.errors import CheckpointError, W8A8Error
from w8a8.experts import unstacked
from w8a8.linear import quant_linears
from w8a8.scheme import Scheme

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_VOCABULARY = 8


def rehearse(model: Any, scheme: Scheme, target: Path, tokenizer: Any = None) -> None:
    """Quantise and save a stand-in for a model beside the target, look at the result, and remove it.

    Args:
        model: A transformers model, with or without values.  Not modified.
        scheme: What is quantised, and how.  A static one is saved with scales of 1.
        target: Where the model will go.
        tokenizer: Saved along where given.

    Raises:
        CheckpointError: something on the way fails; nothing long has started then.
    """
    small = _stand_in(model)
    convert.swap(small, unstacked(small)[0])
    layers = convert.build(small, convert.select(small), scheme, input_params=_ones(small, scheme))
    convert.swap(small, layers)
    place = next(parent for parent in target.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.rehearsal-", dir=place) as directory:
        try:
            save(small, Path(directory) / "model", tokenizer)
        except (W8A8Error, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be saved: a model of one block of it failed with "
                f"{type(error).__name__}: {error}"
            ) from error
    assert any(quant_linears(small)), "something was quantised"


def _stand_in(model: Any) -> Any:
    """One block of random values, in the class and the dtype of the model."""
    config = copy.deepcopy(model.config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in _DEPTHS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
        kinds = getattr(part, "layer_types", None)
        if isinstance(kinds, list):
            part.layer_types = kinds[:1]
        part.vocab_size, part.pad_token_id = _VOCABULARY, None
    with init_empty_weights(include_buffers=False):
        small = type(model)._from_config(config, dtype=model.dtype)
    small.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in small.parameters():
            tensor.fill_(1.0)
    small.tie_weights()
    return small.eval()


def _ones(model: Any, scheme: Scheme) -> Any:
    from w8a8.affine import QParams

    if not scheme.static or scheme.activations is None:
        return None
    zero = None if scheme.activations.symmetric else torch.zeros(1, dtype=torch.int32)
    return dict.fromkeys(convert.select(model).chosen, QParams(torch.ones(1), zero))
