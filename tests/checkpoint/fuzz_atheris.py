"""Damage directories guided by coverage: what `make fuzz` runs, with libFuzzer's options.

    python -m tests.checkpoint.fuzz_atheris [-runs=10000] [-seed=1] [CORPUS]

An input is a byte that picks one file of one directory, and the bytes that take the place of its header or, where it
is JSON, of all of it.  The corpus begins with what the files hold.  Three mutations in four edit a value of the JSON,
as bytes alone hardly ever leave it whole; the fourth is libFuzzer's.  Only `w8a8.checkpoint` is instrumented, so inputs
are kept for what they reach in there.  Loading ends in a `W8A8Error` or in the model that was saved; where config.json
was changed, in any model.  Anything else stops the run, and libFuzzer writes the input to a file: give its name as the
argument to run it again.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import torch
import transformers

import w8a8.layers.weights  # what is imported before is not instrumented
import w8a8.model.choice

with atheris.instrument_imports(include=["w8a8"]):
    import w8a8.checkpoint.reader

import w8a8
from tests.checkpoint.mutations import ABSURD, CONFIG, INDEX, header_length, weights_of
from tests.checkpoint.test_hostile import SCHEMES, TINY
from tests.conftest import llama
from w8a8.errors import W8A8Error


class Place:
    """One file of a directory, and how to put other bytes into it."""

    def __init__(self, path: Path, expected: dict[str, torch.Tensor]) -> None:
        self.path, self.expected = path, expected
        self._whole = path.read_bytes()
        start = header_length(path) if path.suffix == ".safetensors" else len(self._whole)
        self.text, self._rest = self._whole[:start], self._whole[start:]

    def outcome(self, text: bytes) -> str:
        """What comes of loading the directory with this text in the file, which is then put back."""
        self._write(text + self._rest)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sizes of zero make torch warn
                model = w8a8.load(self.path.parent)
        except W8A8Error as error:
            return type(error).__name__
        finally:
            self._write(self._whole)
        if self.path.name != CONFIG:
            found = model.state_dict()
            assert found.keys() == self.expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in self.expected.items())
        return "loaded"

    def _write(self, data: bytes) -> None:
        """As another file of that name: a loaded model has the last one mapped."""
        self.path.unlink()
        self.path.write_bytes(data)


def places(room: Path) -> list[Place]:
    """Index, config and two shards of a directory for each kind."""
    found = []
    for name, scheme in SCHEMES.items():
        path, model = room / name, llama(**TINY)
        if scheme is None:
            model.save_pretrained(path, max_shard_size="3KB")
        else:
            w8a8.save(w8a8.quantize(model, scheme).model, path, max_shard_size="2KB")
        files = [path / CONFIG, path / INDEX, *weights_of(path)[:2]]
        found += [Place(file, w8a8.load(path).state_dict()) for file in files]
    return found


def edited(text: bytes, draw: random.Random, *, header: bool) -> bytes:
    """A JSON text in which one to three values, at any depth, are gone, absurd, elsewhere's or nearly the same.

    Raises:
        ValueError, RecursionError: it is no JSON any more.
    """
    whole = json.loads(text[8:] if header else text)
    for _ in range(draw.randint(1, 3)):
        found = list(_values(whole))
        if not found:
            break
        (place, key), (other, elsewhere) = draw.choice(found), draw.choice(found)
        value = place[key]
        match draw.randrange(5):
            case 0:
                del place[key]
            case 1:
                place[key] = draw.choice([*ABSURD, "re:(a|aa)+$", "re:model"])
            case 2:
                place[key] = other[elsewhere]
            case 3 if isinstance(place, dict) and isinstance(other, dict):
                place[draw.choice([elsewhere, f"{key}_packed", f"{key}_zero_point"])] = place.pop(key)
            case _:
                number = isinstance(value, int | float)
                place[key] = draw.choice([value + 1, value - 1, value * 2, -value] if number else [[value], str(value)])
    new = json.dumps(whole).encode()
    return len(new).to_bytes(8, "little") + new if header else new


def _values(value: object) -> Iterator[tuple[Any, Any]]:
    """Every value inside, as what holds it and where in there."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _values(inner)


def fuzz(room: Path, arguments: list[str]) -> None:
    """Run libFuzzer, which ends this process."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    targets = places(room)
    outcomes = os.open(room / "outcomes", os.O_WRONLY | os.O_CREAT)

    def one(data: bytes) -> None:
        if data:
            place = targets[data[0] % len(targets)]
            file = place.path.name if place.path.suffix == ".json" else "header"
            os.write(outcomes, f"{file:29} {place.outcome(data[1:])}\n".encode())

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.randrange(4) == 0:  # libFuzzer soon forgets originals that reach nothing of their own
            i = draw.randrange(len(targets))
            data = bytes([i]) + targets[i].text
        if data and draw.randrange(4):
            with contextlib.suppress(ValueError, RecursionError, OverflowError):
                header = targets[data[0] % len(targets)].path.suffix != ".json"
                return (data[:1] + edited(data[1:], draw, header=header))[:size]
        return bytes(atheris.Mutate(data, size))

    (room / "corpus").mkdir()
    for i, place in enumerate(targets):
        (room / "corpus" / str(i)).write_bytes(bytes([i]) + place.text)
    limits = ["-max_len=4096", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096"]
    files = [argument for argument in arguments if not argument.startswith("-")]
    again = any(Path(file).is_file() for file in files)  # a file is run alone; a directory takes what is new
    corpus = [] if again else [str(room / "corpus")]
    atheris.Setup([sys.argv[0], *limits, *arguments, *corpus], one, custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1:2] == ["--room"]:
        fuzz(Path(sys.argv[2]), sys.argv[3:])
    with tempfile.TemporaryDirectory() as room:
        began = time.perf_counter()
        command = [sys.executable, "-m", "tests.checkpoint.fuzz_atheris", "--room", room, *sys.argv[1:]]
        ended = subprocess.run(command, check=False).returncode
        outcomes = (Path(room) / "outcomes").read_text().splitlines()
        seconds = time.perf_counter() - began
    for outcome, count in sorted(Counter(outcomes).items()):
        print(f"{outcome:45} {count:6}")  # noqa: T201
    print(f"{len(outcomes)} cases in {seconds:.0f} s, {len(outcomes) / seconds:.0f} a second")  # noqa: T201
    return ended


if __name__ == "__main__":
    sys.exit(main())
