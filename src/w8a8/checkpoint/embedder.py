"""What follows the model in an embedder's directory: from its last states to a vector, as sentence-transformers does.

modules.json names the modules: the model, then pooling, dense layers, norms.  Those behind the model are
sentence-transformers' own, opened and run as they are; it is imported here, for such a directory only.  What is taken
for the embedder's vector so is what `encode` gives.  Poolings written down here were the alternative, and left out what
stands behind them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.checkpoint.architecture import LOADING_ERRORS
from w8a8.checkpoint.beside import class_around, folders_of
from w8a8.defaults import usual_defaults
from w8a8.errors import CheckpointError, ModelError
from w8a8.model.pretrained import Pretrained

_THEIRS = "sentence_transformers."


class Behind(nn.Module):
    """What follows the model, module after module, in float32 on the CPU."""

    def __init__(self, directory: Path, modules: list[nn.Module]) -> None:
        super().__init__()
        self.directory, self.parts = directory, nn.ModuleList(modules)

    @torch.inference_mode()
    def forward(self, states: Tensor) -> Tensor:
        """Vectors (B, W) of last states (B, T, C), none of which is of padding.

        Raises:
            ModelError: a module wants what last states alone do not give.
        """
        states = states.to("cpu", torch.float32)
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device="cpu")
        features = {"token_embeddings": states, "attention_mask": mask}
        part: nn.Module = self
        try:
            with usual_defaults():
                for part in self.parts:
                    features = part(features)
        except LOADING_ERRORS as error:
            raise ModelError(
                f"{self.directory}: {type(part).__name__} was to make a vector of last states of width "
                f"{states.shape[-1]}, and cannot ({type(error).__name__}: {error}); `w8a8 eval --data` asks the "
                "embedder as a whole"
            ) from error
        if "sentence_embedding" not in features:
            raise ModelError(
                f"{self.directory}: a vector was to be made of last states, and its modules make "
                f"{', '.join(features)}: sentence-transformers' Pooling makes one; add it to modules.json"
            )
        return features["sentence_embedding"]


class Embedder(nn.Module):
    """A model with what follows it: it gives vectors.

    Args:
        model: Not modified; what stands on its base model, a head, is not run.
    """

    def __init__(self, model: Pretrained, behind: Behind) -> None:
        super().__init__()
        self.model, self.behind = model, behind

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Of ids (B, T)."""
        return {"vectors": self.behind(self.model.base_model(input_ids=input_ids).last_hidden_state)}


def is_embedder(directory: Path) -> bool:
    """Whether something in a directory makes vectors of the model's last states.

    Raises:
        CheckpointError: modules.json is torn.
    """
    return class_around(directory) == "SentenceTransformer" and bool(folders_of(directory))


def open_behind(directory: Path) -> Behind | None:
    """What follows the model in a directory; None where it is no embedder's.

    Raises:
        CheckpointError: modules.json is torn, or a module cannot be read.
        ModelError: sentence-transformers cannot be imported; a module is none of its own.
    """
    if not is_embedder(directory):
        return None
    found = folders_of(directory)
    own = next((kind for _, kind in found if not kind.startswith(_THEIRS)), None)
    if own is not None:
        raise ModelError(
            f"{directory} has {own} behind the model, which is none of sentence-transformers' modules: code of others "
            "is not run for this; `w8a8 eval --data` with --trust-remote-code asks the embedder as a whole"
        )
    try:
        from sentence_transformers.util import import_from_string
    except ImportError as error:
        raise ModelError(
            f"{directory} is an embedder, whose vectors sentence-transformers makes, which cannot be imported "
            f"({error}): pip install 'w8a8[sentences]'"
        ) from error
    modules = []
    for folder, kind in found:
        try:
            with usual_defaults():
                module_class: Any = import_from_string(kind)
                module = module_class.load(str(directory), subfolder=str(folder), local_files_only=True)
        except LOADING_ERRORS as error:
            raise CheckpointError(
                f"{directory / folder}: sentence-transformers cannot open its {kind.rpartition('.')[2]} "
                f"({type(error).__name__}: {error}); copy the directory again"
            ) from error
        modules.append(module.to(torch.float32))
    return Behind(directory, modules).eval()
