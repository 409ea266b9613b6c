"""w8a8: the linear layers of PyTorch language models in 8-bit integers.

    result = w8a8.quantize(model)       # in place
    print(result.coverage)              # what was quantised, what was not, and why not
    w8a8.save(model, "directory")       # a directory that transformers and vLLM load
    model = w8a8.load("directory")      # or anybody's compressed-tensors W8A8

Names are imported when they are first used, so that `import w8a8` needs no torch.  The one list of them is
the stub beside this file, which type checkers read too.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from w8a8._version import __version__ as __version__

# name -> the module that has it
_HOME = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if _HOME.get(name, "w8a8") != "w8a8":
        return getattr(__import__(_HOME[name], fromlist=[name]), name)  # `from home import name`, a module too
    if importlib.util.find_spec(f"w8a8.{name}"):  # a room: w8a8.evaluation, w8a8.report
        return importlib.import_module(f"w8a8.{name}")
    raise AttributeError(f"module 'w8a8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
