"""What is asked of `w8a8.quantize_to`: one frozen value, refused where its parts contradict one another.

It says which of the three ways the work goes (`Job.way`).
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import observer_of
from w8a8.calibration.sources import SAMPLES
from w8a8.checkpoint.opening import NamedModel
from w8a8.checkpoint.vllm import Finding
from w8a8.core.scheme import AUTO, Scheme
from w8a8.errors import SchemeError
from w8a8.evaluation.scores import default_length
from w8a8.model.kinds import kind_of, usual_scheme
from w8a8.model.pretrained import Tokenizer
from w8a8.streaming.plan import SHARD_BYTES

_LONGEST_WINDOW = 512  # of calibration data, where nothing is said


class Way(enum.Enum):
    """How a model becomes a directory."""

    MEMORY = "loaded, quantised and saved"
    FILES = "from files to files, a piece of a tensor at a time"
    BLOCKS = "from files to files, block by block, with calibration data"


@dataclass(frozen=True)
class CalibrationText:
    """Calibration data that is drawn when the tokenizer of the model is there.

    source: A .txt or .jsonl file, or a data set on the hub.
    samples: Windows drawn from it.
    length: Tokens in a window; None is the model's context, at most 512.
    """

    source: str
    samples: int = SAMPLES
    length: int | None = None


@dataclass(frozen=True)
class BudgetSearch:
    """A scheme or float for each layer, under a budget.

    limit: As `w8a8.Budget.of` reads it: "12MB" of tensors in all, "0.5%" lost.
    text: The file or hub data set that costs are measured on.
    options: Presets to choose from, besides float; smoothing is for the first.
    """

    limit: str
    text: str
    options: Sequence[str] = ("w8a8", "w8a8-asym")


@dataclass(frozen=True)
class Job:
    """A model to be quantised to a directory.

    model: A directory or a hub id, float.
    output: The directory to write.
    scheme: As for `w8a8.quantize`, one for all layers; under a search not used.
    include, exclude, head, embeddings, observer, smooth: As for `w8a8.quantize`.
    calibration: For static schemes and for smoothing.
    seed: Of all that is drawn.
    search: Choose a scheme or float for each layer; None gives each the scheme.
    stream: From files to files, or not; None: wherever no data is needed and the files have the model's tensors.
    shard_bytes: Of a file of the result, where that is made from files without data.
    target: "vllm" stops before the work where vLLM would refuse the result.
    overwrite: Replace a checkpoint that is there already.
    dry_run: Stop before the first byte of what is streamed.
    eval_text: The file or hub data set on which the result is compared with the float model.
    report: The HTML file of a page about the result; with `eval_text` its layers are measured for that.
    command: What makes the result again, as the page says it; None: the call.
    push_to_hub, private: The repository to upload the result to, and whether a new one is private.
    dtype, trust_remote_code: As for `w8a8.NamedModel`.

    Raises:
        SchemeError: it contradicts itself, or has a static scheme and no data.
        CalibrationError: there is no such observer.
    """

    model: str
    output: Path
    scheme: Scheme | str = AUTO
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    head: str = "float"
    embeddings: str = "float"
    calibration: CalibrationText | None = None
    observer: str = "absmax"
    smooth: str | float | None = None
    seed: int = 0
    search: BudgetSearch | None = None
    stream: bool | None = None
    shard_bytes: int = SHARD_BYTES
    target: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    eval_text: str | None = None
    report: Path | None = None
    command: str | None = None
    push_to_hub: str | None = None
    private: bool = False
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        asked = None if self.scheme == AUTO else Scheme.of(self.scheme)
        if self.private and self.push_to_hub is None:
            raise SchemeError(
                "--private is of a new repository on the hub: give --push-to-hub OWNER/NAME, or leave it out"
            )
        if self.target not in (None, "vllm"):
            raise SchemeError(f"--target {self.target} is unknown; use vllm, or leave it out")
        observer_of(self.observer)
        if self.calibration is None and asked is not None:
            asked.check_without_data()
        if self.stream and self.search is not None:
            raise SchemeError("--budget measures a model in memory on --text FILE: give that, and leave out --stream")
        loads = self.dtype != "auto" or self.trust_remote_code
        if self.stream and self._takes_more and (self.calibration is None or loads):
            raise SchemeError(
                "--stream goes from files to files: smoothing takes --calib FILE, --dtype is that of the files, and "
                "remote code is for models in memory; give the one, leave out the other, or leave out --stream"
            )

    @property
    def named(self) -> NamedModel:
        """The model, and how it is opened."""
        return NamedModel(self.model, self.dtype, trust_remote_code=self.trust_remote_code)

    @cached_property
    def wanted(self) -> Scheme:
        """The scheme that is asked for, or where none is the usual one, for which the model's directory is opened."""
        if self.scheme != AUTO:
            return Scheme.of(self.scheme)
        return usual_scheme({kind_of(*self.named.directory.architecture)})

    @property
    def _takes_more(self) -> bool:
        """Whether headers, config.json and a piece of a tensor at a time are not enough."""
        smoothed = self.calibration is not None or self.smooth not in (None, "none")
        return smoothed or self.search is not None or self.dtype != "auto" or self.trust_remote_code

    @property
    def way(self) -> Way:
        """The way that it goes, but for a model whose files have other tensors than it has, which is loaded."""
        if self._takes_more:
            return Way.BLOCKS if self.stream else Way.MEMORY
        return Way.MEMORY if self.stream is False else Way.FILES

    def calibrate_on(self, model: nn.Module, tokenizer: Tokenizer | None) -> Calibration | None:
        """The calibration data, always the same; None where none was given.  The model (its context) may be empty."""
        drawn = self.calibration
        if drawn is None:
            return None
        length = drawn.length or min(default_length(model), _LONGEST_WINDOW)
        return Calibration.of(drawn.source, tokenizer, samples=drawn.samples, length=length, seed=self.seed)

    def check_target(self, found: Iterable[Finding]) -> None:
        """Raise `SchemeError` where the result is to be for vLLM and would be refused."""
        refused = [finding for finding in found if finding.refused]
        if self.target is not None and refused:
            raise SchemeError("\n  ".join(map(str, refused)))
