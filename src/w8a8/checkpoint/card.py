"""The model card of a saved directory, README.md: a pure function of plain facts, none of which is guessed.

A figure is in it only where it was measured.  What is measured later, or known later, such as the name on the hub,
comes into a card that is there: `with_measured` and `addressed` are functions from text to text.

The front matter is what the hub reads: https://huggingface.co/docs/hub/model-cards.  Licence, language and task are
repeated from the card of the float model where that has them, and left out where it has not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from w8a8.checkpoint.beside import SOURCE_README
from w8a8.checkpoint.vllm import VERSION, Finding
from w8a8.core.row_sample import ROWS
from w8a8.core.scheme import PRESETS
from w8a8.errors import few
from w8a8.records.coverage import TABLE, Coverage, megabytes, percentage

PLACE = "path/to/this/directory"
"""What a card calls its directory while that has no name on the hub."""

HOME = "https://github.com/w8a8/w8a8"

Told: TypeAlias = Mapping[str, str | list[str]]
"""Fields of front matter."""

_REPEATED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_COST = "## What it costs"
_WORST = 5


@dataclass(frozen=True)
class Origin:
    """The float model, as far as it is known.

    repository, commit: On the hub.
    bytes: Of the tensors in its files.
    told: The front matter of its card.
    card: Whether its card lies beside, as `SOURCE_README`.
    unread: Why the front matter of that could not be read.
    """

    repository: str | None = None
    commit: str | None = None
    bytes: int | None = None
    told: Told = field(default_factory=dict)
    card: bool = False
    unread: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    coverage: What is quantised and what is not.
    model: The name of the model's class.
    of_transformers: Whether transformers has that class.
    around: The class of sentence-transformers that the directory is of, where it is of one.
    conv1d: Whether `Conv1D` layers are among the quantised.
    findings: What vLLM would make of the directory.
    bytes: Of the tensors in its files.
    versions: Of w8a8 and what it rests on, by name.
    """

    coverage: Coverage
    model: str
    of_transformers: bool
    conv1d: bool
    findings: tuple[Finding, ...]
    bytes: int
    versions: Mapping[str, str]
    origin: Origin = Origin()
    around: str | None = None


@dataclass(frozen=True)
class Measured:
    """A comparison with the float model.

    on: What was compared on, a sentence.
    rows: Measure, value, and its interval.
    says: What they come to, a sentence.
    """

    on: str
    rows: tuple[tuple[str, str, str], ...]
    says: str = ""


def card(facts: Facts) -> str:
    """The card, with its front matter."""
    parts = (
        f"---\n{yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)}---\n",
        *_about(facts),
        *_float(facts.coverage),
        _COST,
        f"Not measured when this was saved. `w8a8 eval {PLACE} --text FILE --against FLOAT_MODEL` measures it.",
        *_running(facts),
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + ".",
        *_origin(facts.origin),
    )
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def front_matter(facts: Facts) -> dict[str, object]:
    told = facts.origin.told
    library = told.get("library_name")
    found: dict[str, object] = {"library_name": library if isinstance(library, str) else "transformers"}
    found |= {key: told[key] for key in _REPEATED if key in told}
    if facts.origin.repository is not None:
        found |= {"base_model": facts.origin.repository, "base_model_relation": "quantized"}
    schemes = _schemes(facts.coverage)
    widths = [width for width in ("int4", "int8") if any(width in _in_words(scheme) for scheme in schemes)]
    presets = [scheme for scheme in schemes if scheme in PRESETS]
    found["tags"] = list(dict.fromkeys(["w8a8", *widths, "compressed-tensors", *presets]))
    return found


def with_measured(text: str, measured: Measured) -> str | None:
    """The card with what was measured, in the place of what was there; None where the card has no such place."""
    section = [
        _COST,
        measured.on,
        _table(("measure", "value", "95 % interval"), measured.rows),
        *([measured.says] if measured.says else []),
    ]
    found = re.search(rf"^{re.escape(_COST)}$.*?(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    return text[: found.start()] + "\n\n".join(section) + "\n\n" + text[found.end() :]


def addressed(text: str, repository: str) -> str:
    """The card of a directory that is on the hub under this name."""
    return text.replace(PLACE, repository)


def _about(facts: Facts) -> Iterator[str]:
    coverage, origin = facts.coverage, facts.origin
    schemes, totals = _schemes(coverage), coverage.totals()
    done, every = totals["quantized"], totals["all"]
    name = facts.model if origin.repository is None else origin.repository.rpartition("/")[2]
    yield f"# {name}, quantised: {few(schemes)}"
    tables = sum(module.kind == TABLE for module in coverage.quantized)
    what = f"{done.modules - tables} linear layers" + (
        f" and {tables} lookup table{'s' * (tables > 1)}" if tables else ""
    )
    made = f"{facts.model} with {what} quantised, made by [w8a8]({HOME})"
    if origin.repository is not None:
        made += f" from [{origin.repository}](https://huggingface.co/{origin.repository})"
        made += f" at commit `{origin.commit}`" if origin.commit else ""
    yield f"{made}. The files are in the format of compressed-tensors."
    yield "## What is quantised"
    rows = [(_code(scheme), str(count), _in_words(scheme)) for scheme, count in schemes.items()]
    yield _table(("scheme", "layers", "what it is"), rows)
    size = f"Tensors in the files: {megabytes(facts.bytes)}"
    size += f"; in those of the float model: {megabytes(origin.bytes)}." if origin.bytes is not None else "."
    parameters, macs = percentage(done.parameters, every.parameters), percentage(done.macs, every.macs)
    yield f"{parameters} of the parameters and {macs} of the multiply-adds of a token are in these layers. {size}"
    worst = coverage.worst_weights(_WORST)
    if worst:
        yield (
            "The layers whose weights lost most, by the signal-to-noise ratio of the rounding, on at most "
            f"{ROWS} rows of each:"
        )
        lost = [
            (_code(m.name), "exact" if m.weight_sqnr_db == float("inf") else f"{m.weight_sqnr_db:.1f} dB")
            for m in worst
        ]
        yield _table(("layer", "weight SQNR"), lost)


def _float(coverage: Coverage) -> Iterator[str]:
    yield "## What stayed float, and why"
    rows = []
    for reason, modules in coverage.left_by_reason().items():
        names = few((_code(m.name) for m in modules), counted=True)
        rows.append((names, f"{sum(m.parameters for m in modules):,}", _cell(reason)))
    yield _table(("modules", "parameters", "why"), rows) if rows else "Nothing."


def _running(facts: Facts) -> Iterator[str]:
    yield "## How to run it"
    yield f"With [w8a8]({HOME}), each layer as its scheme says:"
    if facts.around is None:
        yield _block("python", f'import w8a8\n\nmodel = w8a8.load("{PLACE}")')
    else:
        imported = f"from sentence_transformers import {facts.around}\n\nimport w8a8"
        yield _block("python", f'{imported}\n\nw8a8.enable()\nmodel = {facts.around}("{PLACE}")')
        yield "`w8a8.load` gives the model in it by itself, without what the other modules do."
    yield "### In transformers"
    refused = _refused_by_transformers(facts)
    if refused is not None:
        yield refused
    else:
        opened = f'model = transformers.{facts.model}.from_pretrained("{PLACE}")'
        yield "With compressed-tensors installed, which turns the weights into floats at the first forward:"
        yield _block("python", f"import transformers\n\n{opened}")
        yield "After `w8a8.enable()` the same line keeps the integers, and runs them as `w8a8.load` does."
    yield "### In vLLM"
    yield from _in_vllm(facts.findings)


def _refused_by_transformers(facts: Facts) -> str | None:
    """Why no line of transformers is given; None where one is."""
    if not facts.of_transformers:
        return (
            f"transformers has no class {facts.model}; `w8a8.load` takes one that was registered with its Auto classes."
        )
    if facts.conv1d:
        return "Not by itself: there is no common format for quantised `Conv1D` layers, as here. `w8a8.load` runs it."
    if any(".experts." in module.name for module in facts.coverage.quantized):
        return (
            "Not by itself: it stops at experts that are quantised. After `w8a8.enable()`, or by `w8a8.load`, they run."
        )
    return None


def _in_vllm(findings: Sequence[Finding]) -> Iterator[str]:
    refused = [finding for finding in findings if finding.refused]
    if refused:
        yield f"Not by vLLM {VERSION}, whose source says so:"
        yield "\n".join(f"- {_cell(_said(finding))}" for finding in refused)
        return
    yield f"By what the source of vLLM {VERSION} asks of layers and schemes, it runs. It was not run for this card."
    yield _block("", f"vllm serve {PLACE}")
    if findings:
        yield "\n".join(f"- {_cell(_said(finding))}" for finding in findings)


def _said(finding: Finding) -> str:
    return f"{few(finding.layers, counted=True)}: {finding.what} ({finding.why}); {finding.instead}"


def _origin(origin: Origin) -> Iterator[str]:
    if not origin.card:
        return
    yield "## The card of the float model"
    text = f"[{SOURCE_README}]({SOURCE_README}), as it was."
    if origin.unread is not None:
        text += f" Its front matter cannot be read ({_cell(origin.unread)}), so no licence is repeated from it."
    yield text


def _schemes(coverage: Coverage) -> dict[str, int]:
    """How many layers have each scheme, the most first."""
    names = [module.scheme for module in coverage.quantized if module.scheme is not None]
    return {name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))}


def _in_words(scheme: str) -> str:
    """A scheme that is no preset is its own description."""
    return str(PRESETS[scheme].scheme) if scheme in PRESETS else scheme


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


def _code(text: str) -> str:
    """A name that cannot end its own quoting, nor the cell of a table."""
    return f"`{_cell(text).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    """Text from a model or a file on one line: neither markup of a page nor the end of a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
