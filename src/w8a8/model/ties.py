"""Which layers share a weight by what the model says, and what becomes of that when one of them is quantised.

transformers ties by a table of the model's class (`_tied_weights_keys`), wherever the config's `tie_word_embeddings` is
true, and does it again whenever it likes.  A quantised layer is a copy and takes no part in it any more: it leaves the
table of this model.  The flag becomes False where nothing else hangs on it, for readers that go by the flag alone.
Where something does (BART's two embeddings), it stays: transformers does not tie what a file has twice.
"""

from collections.abc import Collection

from torch import nn

from w8a8.model.kinds import output_config
from w8a8.model.pretrained import Config, Pretrained, is_pretrained


def untie(model: nn.Module, layers: Collection[str]) -> None:
    """`forget`, and have the configs, which are changed, say so where nothing else is tied by them."""
    for config in forget(model, layers):
        if not any(part.config is config and part.get_expanded_tied_weights_keys() for _, part in _parts(model)):
            for each in (config, output_config(config)):
                if getattr(each, "tie_word_embeddings", False):
                    each.tie_word_embeddings = False


def forget(model: nn.Module, layers: Collection[str]) -> list[Config]:
    """Take layers out of what the model ties, in its tables; the configs, not changed, of the parts that tied them."""
    configs = []
    for prefix, part in _parts(model):

        def stays(pair: tuple[str, str], prefix: str = prefix) -> bool:
            return not any((prefix + name).rpartition(".")[0] in layers for name in pair)

        own = part.get_expanded_tied_weights_keys()
        left = dict(filter(stays, own.items()))
        if hasattr(part, "all_tied_weights_keys"):  # not a part whose class leaves out `post_init`
            part.all_tied_weights_keys = dict(filter(stays, part.all_tied_weights_keys.items()))
        if left != own:
            part._tied_weights_keys = left
            configs.append(part.config)
    return configs


def _parts(model: nn.Module) -> list[tuple[str, Pretrained]]:
    """The model and those in it that are models of transformers, each with what its names begin with."""
    named = model.named_modules()
    return [(f"{name}." if name else "", part) for name, part in named if is_pretrained(part)]
