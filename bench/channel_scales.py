"""Whether a scale per channel, applied where a layer's input is quantised, is worth a kernel: simulated by alphas.

    python bench/channel_scales.py DIR [--texts 300] [--alphas 0.3,0.4,0.5,0.6,0.7]

DIR is a directory of sentence-transformers with a float BERT in it (`encoder_schemes` says where all-MiniLM-L6-v2 is).
A layer that reads x and has the weights W reads x / s instead, in integers, and has W s, with s of each channel
absmax(x)**alpha / absmax(W)**(1 - alpha) (SmoothQuant, arXiv:2211.10438, equation 4), absmax(x) over 64 docstrings.
The rounding of an input and of a weight is as a kernel with such scales would have it.  What is lost is 1 - cosine
of the embeddings to the float model's, of other docstrings, paired by text with the same scheme without scales.
"""

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import w8a8
from encoder_schemes import CALIBRATION, Divided, docstrings
from machine import describe_machine, keep, versions
from w8a8.core.scheme import Scheme
from w8a8.evaluation.encoders import rowwise_cosine
from w8a8.evaluation.intervals import Bootstrap

SCHEMES = ("w8a8", "w8a8-asym")


def absmax_of_inputs(model: Any, names: list[str], texts: list[str]) -> dict[str, torch.Tensor]:
    """(K,) of each layer, over all tokens, padding too."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        most = x.detach().abs().flatten(0, -2).amax(0)
        found[name] = torch.maximum(found[name], most) if name in found else most

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name in names
    ]
    model.encode(texts, batch_size=8, show_progress_bar=False)
    for hook in hooks:
        hook.remove()
    return found


def scaled(model: Any, scheme: str, ranges: dict[str, torch.Tensor], alpha: float) -> Any:
    """A copy in integers whose layers divide their inputs."""
    model = copy.deepcopy(model)
    for name, most in ranges.items():
        layer = model.get_submodule(name)
        weight = layer.weight.detach().abs().amax(0)
        scales = most.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)
        with torch.no_grad():
            layer.weight.mul_(scales)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Divided(layer, scales))
    w8a8.quantize(model, scheme)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--alphas", default="0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(asked.directory, device="cpu")
    found = [f"{text.summary} {text.body}" for text in docstrings(asked.texts + CALIBRATION)]
    texts, others = found[: asked.texts], found[asked.texts :]
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and ".encoder." in f".{name}."]
    ranges = absmax_of_inputs(model, names, others)
    exact = model.encode(texts, batch_size=8, show_progress_bar=False)
    rows: dict[str, dict[str, Any]] = {}
    lost: dict[str, Any] = {}
    for scheme in SCHEMES:
        for alpha in (None, *map(float, asked.alphas.split(","))):
            name = scheme if alpha is None else f"{scheme}, alpha {alpha:g}"
            if alpha is None:
                other = copy.deepcopy(model)
                w8a8.quantize(other, scheme)
            else:
                other = scaled(model, scheme, ranges, alpha)
            ours = other.encode(texts, batch_size=8, show_progress_bar=False)
            lost[name] = 1 - rowwise_cosine(np.asarray(ours), np.asarray(exact))
            draw = Bootstrap(len(texts))
            share = draw.ratio(lost[name].tolist(), lost[scheme].tolist())
            rows[name] = {
                "lost": float(lost[name].mean()),
                "worst": float(lost[name].max()),
                "of_unscaled": [share.mean, share.low, share.high],
            }
            told = f"{share.mean:.2f} ({share.low:.2f} to {share.high:.2f})"
            print(f"{name}: 1 - cosine {rows[name]['lost']:.5f}, at most {rows[name]['worst']:.4f}, {told} of unscaled")
    result = {
        "machine": describe_machine(),
        "versions": versions(),
        "model": asked.directory.rstrip("/").rpartition("/")[2],
        "texts": len(texts),
        "layers": len(names),
        "scheme": {name: str(Scheme.of(name)) for name in SCHEMES},
        "rows": rows,
    }
    keep("channel_scales", result, asked.output)


if __name__ == "__main__":
    main()
