"""What is finished, so that the same command goes on where it was killed.

The result grows in a hidden directory beside its place, `.NAME.partial`, and takes its name when it is complete.
There, `fingerprint.json` holds everything that decides the bytes of the result, and each process appends a line to
its own `journal-RANK.jsonl` for every unit (a shard, or a block) that it has finished: the files, their sizes and
digests, and what the weights in them lost.  A line is written after the files are on the disk under their names; a line
that is torn was not finished and does not count.

A digest is the SHA-256 of a file's header and of the digests of its tensors, which can be had while tensors are
written in any order.  Resuming reads what is recorded again: a file that has changed since is made anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from w8a8.checkpoint.headers import read_header
from w8a8.errors import CheckpointError

FINGERPRINT = "fingerprint.json"
_CHUNK = 8 << 20


class _File(TypedDict):
    bytes: int
    digest: str


class _Line(TypedDict):
    unit: str
    files: dict[str, _File]
    weight_sqnr_db: dict[str, float]


class Journal:
    """The record of one job.

    Args:
        partial: The directory in which the result grows; made.
        fingerprint: What decides the bytes of the result, by names that a user understands.
        rank: Of this process among those that share the job.
        restart: Throw away what is there of another job, instead of refusing.

    Raises:
        CheckpointError: the directory is of another job; what differs is named.
    """

    def __init__(self, partial: Path, fingerprint: Mapping[str, str], rank: int = 0, *, restart: bool = False) -> None:
        self.partial = partial
        self._path = partial / f"journal-{rank}.jsonl"
        partial.mkdir(parents=True, exist_ok=True)
        known = partial / FINGERPRINT
        if known.exists() and not (restart and _read(known) != dict(fingerprint)):
            _check_same(_read(known), dict(fingerprint), partial)
        else:
            _empty(partial)
            write_whole(known, json.dumps(dict(fingerprint), indent=1))
        self._finished = _lines(partial)

    def done(self, unit: str) -> bool:
        """Whether a unit is recorded and its files are still what they were."""
        line = self._finished.get(unit)
        return line is not None and all(_is_still(self.partial / name, told) for name, told in line["files"].items())

    def record(self, unit: str, files: Mapping[str, str], weight_sqnr_db: Mapping[str, float] | None = None) -> None:
        """A unit is finished.

        Args:
            files: The digest of each of its files, which are in the directory and on the disk.

        Raises:
            CheckpointError: the disk is full.
        """
        told: dict[str, _File] = {
            name: {"bytes": (self.partial / name).stat().st_size, "digest": digest} for name, digest in files.items()
        }
        line: _Line = {"unit": unit, "files": told, "weight_sqnr_db": dict(weight_sqnr_db or {})}
        text = "\n" + json.dumps(line) + "\n"  # the line before may be torn
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(text.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._finished[unit] = line

    def weight_sqnr_db(self) -> dict[str, float]:
        """Of the layers of all units that any process has recorded, also before a kill."""
        return {name: db for line in _lines(self.partial).values() for name, db in line["weight_sqnr_db"].items()}

    def clear(self) -> None:
        """Remove the record itself: the directory is complete."""
        for path in (*self.partial.glob("journal-*.jsonl"), *self.partial.glob("lock-*")):
            path.unlink()
        (self.partial / FINGERPRINT).unlink()


@contextlib.contextmanager
def locked(partial: Path, rank: int = 0) -> Iterator[None]:
    """Nobody else has this rank of the same job while the block runs; `CheckpointError` where somebody has."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / f"lock-{rank}"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{partial} is being written by another process; wait for it, or stop it") from error
        yield


def digest_of(path: Path) -> str:
    """The digest of a safetensors file, read from the disk."""
    entries = read_header(path)
    with path.open("rb") as file:
        start = min((e.begin for e in entries.values()), default=path.stat().st_size)
        whole = hashlib.sha256(file.read(start))
        for entry in entries.values():
            one, left = hashlib.sha256(), entry.bytes
            while left:
                data = file.read(min(_CHUNK, left))
                one.update(data)
                left -= len(data)
            whole.update(one.digest())
    return whole.hexdigest()


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> CheckpointError:
    """What a user is told where a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path}: the disk is full; make room and run the same command again, it goes on where it stopped"
        )
    return CheckpointError(f"{path} cannot be written: {error.strerror}")


def _is_still(path: Path, told: _File) -> bool:
    if not path.is_file() or path.stat().st_size != told["bytes"]:
        return False
    try:
        return digest_of(path) == told["digest"]
    except CheckpointError:  # its header is damaged
        return False


def _empty(partial: Path) -> None:
    """Remove what an unfinished result left that has lost its fingerprint; locks stay."""
    for path in partial.iterdir():
        if path.is_file() and not path.name.startswith("lock-"):
            path.unlink()


def _lines(partial: Path) -> dict[str, _Line]:
    found: dict[str, _Line] = {}
    for path in sorted(partial.glob("journal-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # blank, or killed while it was written
                told = json.loads(line)
                if "weight_sqnr_db" in told:  # else of an earlier w8a8, which did not measure it
                    found[told["unit"]] = told
    return found


def _check_same(was: Mapping[str, str], now: Mapping[str, str], partial: Path) -> None:
    changed = [
        f"{key}: was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{partial} holds a part of another result, so it is not gone on with:\n    "
            + "\n    ".join(changed)
            + "\n  give what was given before, or start again (--force)"
        )


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove {path.parent} to start again") from error
    return dict(found)


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whoever else writes the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error
