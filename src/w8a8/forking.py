"""A forked child may compute: torch's threads are let go before a fork, and started anew after it.

GNU's OpenMP runtime, which torch's wheels for Linux bring, keeps a team of threads and gives it the next loop.  fork
copies the runtime and not the threads, and a child that gives its team a loop waits for it for ever, in every torch
operation of some size.  So the team of the thread that forks is dismissed just before (`omp_pause_resource_all`, OpenMP
5.0), which leaves parent and child alike: each starts a team when it next needs one, in some tens of microseconds.
What cannot dismiss it (an older runtime, a fork inside a parallel loop) leaves the child one thread.

Other runtimes (LLVM's, Intel's) see to forks themselves, and so do the native kernel's own loops (csrc/parallel.cpp).

Not taken: one thread in every child, as torch's DataLoader has it, which is slower, and waits for ever again after the
next `torch.set_num_threads`.  Not reached: forks past Python's `os.fork`, and a child that was forked before this
module was imported, which `w8a8.core.affine` does.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_HARD = 2  # omp_pause_hard
_TASKS = Path("/proc/self/task")
_team_is_lost = False


class _Loaded(ctypes.Structure):
    """The head of what the C library tells of a file: where it is loaded, and its path."""

    _fields_ = (("address", ctypes.c_size_t), ("path", ctypes.c_char_p))


def _loaded_files() -> list[str]:
    """The paths of what is loaded in this process, told by the C library: /proc is not mounted everywhere."""
    found: list[str] = []
    look = getattr(ctypes.CDLL(None), "dl_iterate_phdr", None)
    if look is None:  # macOS, whose torch brings no GNU runtime
        return found
    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)

    def visit(file: "ctypes._Pointer[_Loaded]", size: int, data: int | None) -> int:
        found.append(os.fsdecode(file.contents.path or b""))
        return 0

    look(visitor(visit), None)
    return found


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """The GNU runtime that is in this process, torch's own where there are several; None where there is none."""
    paths = {path for path in _loaded_files() if "/libgomp" in path}
    return ctypes.CDLL(max(paths, key=lambda path: "/torch" in path), mode=os.RTLD_NOLOAD) if paths else None


def _dismiss() -> None:
    """Before the fork: send the team home."""
    global _team_is_lost
    runtime = _gnu_openmp()
    counted = _TASKS.is_dir()
    if _team_is_lost and not counted:  # and this process, a child, has done with one thread since
        return
    # a lone thread has no team; where the runtime believes in one, it was lost in an earlier fork and cannot be asked
    if runtime is None or (counted and len(list(_TASKS.iterdir())) == 1):
        _team_is_lost = False
        return
    pause = getattr(runtime, "omp_pause_resource_all", None)
    _team_is_lost = pause is None or pause(_HARD) != 0


def _settle() -> None:
    """In the child: do without a team that is lost."""
    if _team_is_lost:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_dismiss, after_in_child=_settle)
