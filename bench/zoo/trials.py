"""What is tried with each model, first in float, and what came of it.

A cell is a text: "yes", perhaps with a figure; "-", where the column does not apply; "float: " and transformers'
words, where the float model does not do it either; "refused: " and the reason, where the package says so in an error of
its own; "in memory: " and the reason, where streaming leaves the work to the way through memory; else what went wrong.
"""

import copy
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import w8a8
from w8a8.checkpoint.rehearsal import rehearse
from w8a8.core.scheme import Scheme
from w8a8.layers.linear import quant_linears
from w8a8.streaming.plan import UnplacedError
from zoo import inputs as given
from zoo.build import build
from zoo.compare import difference, differing, same

COLUMNS = {
    "integers": "integers = simulation",
    "loaded": "saved and loaded",
    "enabled": "`enable`",
    "streamed": "streamed = memory",
    "rehearsed": "rehearsal",
    "generates": "generates",
    "smooths": "smooths",
    "bfloat16": "bfloat16",
}
"""Each with its heading."""
YES, NONE, FLOAT, REFUSED, IN_MEMORY = "yes", "-", "float: ", "refused: ", "in memory: "
UNTRIED = ("not_built", "not_run", "nothing", "died")
"""Why a row has no columns: the reason is under one of these."""
NEW_TOKENS = 4

Row = dict[str, Any]


def row_of(model_type: str) -> Row:
    """Try everything with one model type, a key of `build.types()`."""
    row: Row = {}
    with tempfile.TemporaryDirectory() as directory:
        _Trial(model_type, row, Path(directory)).run()
    return row


def failures(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells that are neither as they should be nor shared with the float model, by column."""
    fine = (YES, NONE, FLOAT)
    also = {"smooths": (REFUSED,), "streamed": (IN_MEMORY,)}
    if "died" in row:
        return {"died": row["died"]}
    return {c: row[c] for c in COLUMNS if c in row and not row[c].startswith((*fine, *also.get(c, ())))}


def tried(row: Mapping[str, Any]) -> bool:
    """Whether there was a float model that runs, and something in it to quantise."""
    return not any(key in row for key in UNTRIED if key != "died")


class _Trial:
    def __init__(self, model_type: str, row: Row, directory: Path) -> None:
        self.model_type, self.row, self.directory = model_type, row, directory
        self.float_directory = directory / "float"
        self.quantized: Any = None

    def run(self) -> None:
        """Fill the row."""
        row = self.row
        try:
            model = build(self.model_type)
        except Exception as error:  # noqa: BLE001 - whatever transformers says is the result
            row["not_built"] = _said(error)
            return
        inputs = self._inputs(model)
        if inputs is None:
            return
        self.inputs, before = inputs, self.call_with(model, inputs)
        if any(t.isnan().any() or t.isposinf().any() for t in before if t.is_floating_point()):
            # minus infinity is what some classes write where there is no token to choose
            row["not_run"] = "the float model's output is not finite"
            return
        unsteady = same(before, self.call(model))
        float_loaded = self._attempt(lambda: self._float_files(model, before))
        if float_loaded == YES:  # as a user has it
            # with the class of configuration that the file names, as the command reads it, not the model class's own
            config = type(model.config).from_pretrained(self.float_directory)
            model = type(model).from_pretrained(self.float_directory, config=config).eval()
        self.model, self.before, self.from_files = model, before, float_loaded == YES
        writes = bool(getattr(model, "can_generate", lambda: False)())
        float_generates = self._attempt(lambda: self._float_generates(model)) if writes else NONE
        integers = self._attempt(self._integers)
        if integers.startswith(f"{REFUSED}SchemeError: there is nothing to quantise"):
            row["nothing"] = integers
            return
        row["integers"] = f"{FLOAT}its output is another each time: {unsteady}" if unsteady else integers
        row["rehearsed"] = self._attempt(self._rehearsed)
        row["loaded"] = self._after(float_loaded, self._loaded)
        row["enabled"] = self._after(float_loaded, self._enabled) if row["loaded"] == YES else NONE
        row["streamed"] = self._after(float_loaded, self._streamed)
        row["generates"] = self._after(float_generates, self._generates)
        row["smooths"] = self._attempt(self._smooths)
        row["bfloat16"] = self._after(YES, self._bfloat16)

    def _inputs(self, model: Any) -> dict[str, Tensor] | None:
        why: list[str] = []
        for guess in given.candidates(model):
            inputs = self._tried(model, guess, why)
            if inputs:
                self.row["inputs"] = sorted(inputs)
                return inputs
        self.row["not_run"] = why[0] if why else "no inputs are known for it"
        return None

    def _tried(self, model: Any, guess: given.Guess, why: list[str]) -> dict[str, Tensor] | None:
        try:
            inputs = guess()
            return inputs if inputs and self.call_with(model, inputs) else None
        except Exception as error:  # noqa: BLE001 - another guess may do
            why.append(_said(error))
            return None

    def _attempt(self, step: Callable[[], str]) -> str:
        """What a step says, or what it raises."""
        try:
            return step()
        except w8a8.W8A8Error as error:
            return REFUSED + _said(error)
        except Exception as error:  # noqa: BLE001 - whatever is raised is the result
            return f"{_said(error)} [{_place(error)}]"

    def _after(self, of_float: str, step: Callable[[], str]) -> str:
        """The same where the float model does it, and it runs in integers."""
        if of_float == NONE or self.quantized is None:
            return NONE
        return self._attempt(step) if of_float == YES else FLOAT + of_float

    def call(self, model: Any) -> list[Tensor]:
        """Its output for the inputs of the row."""
        return self.call_with(model, self.inputs)

    @staticmethod
    def call_with(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Every tensor of its output."""
        return given.tensors(given.called(model, inputs))

    def _float_files(self, model: Any, before: list[Tensor]) -> str:
        model.save_pretrained(self.float_directory)
        again = type(model).from_pretrained(self.float_directory).eval()
        return same(before, self.call(again)) or YES

    def _float_generates(self, model: Any) -> str:
        _written(model, self.inputs)
        return YES

    def _integers(self) -> str:
        simulated = w8a8.simulate(copy.deepcopy(self.model)).model
        quantized = copy.deepcopy(self.model)
        result = w8a8.quantize(quantized)
        self.row["share"], self.row["left"] = _share(result.coverage)
        self.after = self.call(quantized)
        self.quantized, self.simulated, self.coverage = quantized, simulated, result.coverage
        calls = {name: sum(kernels.values()) for name, kernels in result.ledger().items()}
        never = [name for name, count in calls.items() if not count]
        self.row["layers"] = len(calls)
        self.row["never_called"] = [len(never), *never[:3]]
        self.row["error"] = difference(self.before, self.after)
        return same(self.call(simulated), self.after) or YES

    def _rehearsed(self) -> str:
        rehearse(self.model, Scheme.of("w8a8"), self.directory / "rehearsal")
        return YES

    def _loaded(self) -> str:
        beside = self.float_directory if self.from_files else None  # with the card that goes with a directory
        w8a8.save(self.quantized, self.directory / "memory", beside=beside, covered=self.coverage)
        return same(self.after, self.call(w8a8.load(self.directory / "memory"))) or YES

    def _enabled(self) -> str:
        with w8a8.enabled():
            model = type(self.model).from_pretrained(self.directory / "memory").eval()
        if not any(quant_linears(model)):
            return "nothing in it is in integers"
        return same(self.after, self.call(model)) or YES

    def _streamed(self) -> str:
        try:
            w8a8.quantize_directory(self.float_directory, self.directory / "streamed")
        except UnplacedError as error:
            return IN_MEMORY + _said(error)
        memory = self.directory / "memory"
        if not memory.exists():
            return "there is nothing to compare with, as the model in memory was not saved"
        return differing(memory, self.directory / "streamed") or YES

    def _generates(self) -> str:
        return same([_written(self.simulated, self.inputs)], [_written(self.quantized, self.inputs)]) or YES

    def _smooths(self) -> str:
        report = w8a8.smooth_(copy.deepcopy(self.model), [self.inputs], alpha="searched")
        return f"{YES}, {len(report.smoothed)} of {len(report.groups)} groups"

    def _bfloat16(self) -> str:
        if self.from_files:  # as a user has it: casting a model also casts its rotary tables
            model = type(self.model).from_pretrained(self.float_directory, dtype=torch.bfloat16).eval()
        else:
            model = copy.deepcopy(self.model).to(torch.bfloat16)
        inputs = given.cast(self.inputs, torch.bfloat16)
        try:
            self.call_with(model, inputs)
        except Exception as error:  # noqa: BLE001 - the float model's failure
            return FLOAT + _said(error)
        simulated = w8a8.simulate(copy.deepcopy(model)).model
        w8a8.quantize(model)
        after = self.call_with(model, inputs)
        differ = same(self.call_with(simulated, inputs), after)
        if differ:
            return f"simulation: {differ}"
        if self.row["loaded"] == YES:
            w8a8.save(model, self.directory / "bfloat16")
            differ = same(after, self.call_with(w8a8.load(self.directory / "bfloat16"), inputs))
        return f"loaded: {differ}" if differ else YES


def _written(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a model goes on with."""
    torch.manual_seed(0)
    keys = {k: v for k, v in inputs.items() if k not in ("decoder_input_ids", "decoder_attention_mask")}
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        settings["decoder_start_token_id"] = 1
    with torch.no_grad():
        out = model.generate(**keys, **settings)
    return given.tensors(out)[0]


def _share(coverage: Any) -> tuple[float, dict[str, int]]:
    """Of the parameters of matrices, lookup tables left out, the share in integers; and why most others are not."""
    done = sum(m.shape[0] * m.shape[1] for m in coverage.quantized)
    left: dict[str, int] = {}
    for module in coverage.left:
        if len(module.shape) >= 2 and module.kind != "Embedding":
            reason = f"{module.kind}: " + re.sub(r"\d+", "N", module.reason or "")
            left[reason] = left.get(reason, 0) + module.parameters
    most = dict(sorted(left.items(), key=lambda item: -item[1])[:3])
    return round(done / (done + sum(left.values())), 4), most


def _said(error: BaseException) -> str:
    """An error in one line, without the names of directories here."""
    text = error.explain() if isinstance(error, w8a8.W8A8Error) else str(error)
    text = re.sub(r"(/[\w.+-]+)+/(?=[\w.+-])", "", " ".join(text.split()))
    text = re.sub(r"\.partial-\w+|0x[0-9a-f]+", "", text)
    return f"{type(error).__name__}: {text}"[:300]


def _place(error: BaseException) -> str:
    """The last places of a traceback: of this package, and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(Path(w8a8.__file__).parent))]
    chosen = [*ours[-1:], *frames[-1:]]
    return ", ".join(dict.fromkeys(f"{Path(f.filename).name}:{f.name}" for f in chosen))
