"""The whole way to a saved directory, gone on a model of one block before it is gone on the real one.

Saving comes last, after hours perhaps, and is where a model's class, its tokenizer or the disk show what they do not
do. The stand-in is of the same class and widths, with one block and hardly a vocabulary.

Not every config can be cut down so: some say of each layer what it is, or check one number against another.  Whether
the stand-in makes sense is seen before anything is asked of it, by making it of its own config twice, the second time
from a file.  Where it does not there is no rehearsal, which is told, and no reason to stop: what is written in the end
is looked at in any case.
"""

import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from w8a8.checkpoint.architecture import LOADING_ERRORS
from w8a8.checkpoint.writer import save
from w8a8.core.affine import QParams
from w8a8.core.scheme import Scheme
from w8a8.defaults import usual_defaults
from w8a8.errors import CheckpointError, W8A8Error
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice
from w8a8.model.kinds import input_config, output_config
from w8a8.model.pretrained import Pretrained, Tokenizer
from w8a8.model.swapping import build

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_VOCABULARY = 8


def rehearse(model: Pretrained, scheme: Scheme, target: Path, tokenizer: Tokenizer | None = None) -> str | None:
    """Quantise and save a stand-in for a model beside the target, look at the result, and remove it.

    Args:
        model: A transformers model, with or without values.  Not modified.
        scheme: What is quantised, and how.  A static one is saved with scales of 1.

    Returns:
        Why there was no rehearsal, where a stand-in cannot be made of this model; else None.

    Raises:
        CheckpointError: something on the way fails; nothing long has started then.
    """
    place = next(parent for parent in target.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.rehearsal-", dir=place) as directory:
        made = _quantised_stand_in(model, scheme, Path(directory) / "config")
        try:
            if not isinstance(made, str):
                save(made, Path(directory) / "model", tokenizer)
            elif tokenizer is not None:
                tokenizer.save_pretrained(Path(directory) / "model")
        except (W8A8Error, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            what = "its tokenizer" if isinstance(made, str) else "a model of one block of it"
            raise CheckpointError(
                f"{type(model).__name__} cannot be saved: {what} failed with {type(error).__name__}: {error}"
            ) from error
    return made if isinstance(made, str) else None


def _quantised_stand_in(model: Pretrained, scheme: Scheme, place: Path) -> Pretrained | str:
    """The stand-in, quantised, its config in a directory to be made; or a sentence on why there is none."""
    try:
        small = _stand_in(model)
        small.config.save_pretrained(place)
        with usual_defaults(), init_empty_weights(include_buffers=False):
            again = type(model)._from_config(type(small.config).from_pretrained(place))
        if _shapes(again) != _shapes(small):
            return f"a {type(model).__name__} of one block is another model when it is read again"
        choice = Choice.of(small, scheme)
        with choice.unstacked():
            layers = build(small, choice.schemes, input_params=_ones(choice.schemes, scheme))
    except LOADING_ERRORS as error:
        said = " ".join(str(error).split())[:200]
        return f"no {type(model).__name__} of one block can be made ({type(error).__name__}: {said})"
    choice.enact(layers)
    assert any(quant_linears(small)), "something was quantised"
    return small


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """What tells one model from another of its class.

    Names do not: Moshi gives its depth decoder its own vocabulary whenever its config is read.
    """
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _stand_in(model: Pretrained) -> Pretrained:
    """One block of random values, in the class and the dtype of the model."""
    config = copy.deepcopy(model.config)
    for part in {id(c): c for c in (config, input_config(config), output_config(config))}.values():
        depths = {name: depth for name in _DEPTHS if type(depth := getattr(part, name, None)) is int}
        for name, value in list(vars(part).items()):  # what says of each layer what it is
            if isinstance(value, list) and len(value) in depths.values():
                setattr(part, name, value[:1])
        for name in depths:
            setattr(part, name, 1)
        part.vocab_size, part.pad_token_id = _VOCABULARY, None
    with usual_defaults(), init_empty_weights(include_buffers=False):
        small: Pretrained = type(model)._from_config(config, dtype=model.dtype)
    small.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in small.parameters():
            tensor.fill_(1.0)
    small.tie_weights()
    small.eval()
    return small


def _ones(names: Iterable[str], scheme: Scheme) -> dict[str, QParams] | None:
    if scheme.measured is None:
        return None
    zero = None if scheme.measured.symmetric else torch.zeros(1, dtype=torch.int32, device="cpu")
    return dict.fromkeys(names, QParams(torch.ones(1, dtype=torch.float32, device="cpu"), zero))
