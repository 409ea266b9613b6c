"""w8a8: the linear layers of PyTorch language models in 8-bit integers.

    result = w8a8.quantize(model)       # in place
    print(result.coverage)              # what was quantised, what was not, and why not
    w8a8.save(model, "directory")       # a directory that transformers and vLLM load
    model = w8a8.load("directory")      # or anybody's compressed-tensors W8A8

Names are imported when they are first used, so that `import w8a8` needs no torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from w8a8._version import __version__ as __version__

if TYPE_CHECKING:
    from w8a8 import dataflow, functional, kernels
    from w8a8.analysis import Allocation, Budget, Sensitivity, allocate, sensitivity
    from w8a8.analysis.remedy import remedies
    from w8a8.analysis.study import study
    from w8a8.calibration import observers
    from w8a8.calibration.calibrate import collect
    from w8a8.calibration.data import Calibration
    from w8a8.calibration.observers import MSE, OBSERVERS, AbsMax, MinMax, Percentile
    from w8a8.calibration.reservoir import Reservoir
    from w8a8.checkpoint import load, push_to_hub, save
    from w8a8.core import affine
    from w8a8.core.affine import QParams, QTensor, dequantize, fake_quantize, l2_error, qparams, sqnr_db
    from w8a8.core.scheme import (
        PRESETS,
        PerChannel,
        PerColumn,
        PerGroup,
        PerTensor,
        PerToken,
        QuantSpec,
        Scheme,
    )
    from w8a8.directories import quantize_directory
    from w8a8.errors import W8A8Error
    from w8a8.hf import W8A8Config, disable, enable, enabled
    from w8a8.jobs.comparison import Compared, ModelPair, compare_models
    from w8a8.jobs.diagnosis import Diagnosis, diagnose
    from w8a8.jobs.page import MeasuredLayers, measure_layers, page_records
    from w8a8.jobs.quantization import Made, quantize_to
    from w8a8.jobs.request import BudgetSearch, CalibrationText, Job
    from w8a8.jobs.watching import Watcher
    from w8a8.layers.linear import QuantLinear, ledger
    from w8a8.model.choice import unstack_experts_
    from w8a8.model.coverage import Coverage
    from w8a8.pipeline import Result, quantize, simulate
    from w8a8.report.records import Remedy
    from w8a8.report.smoothed import SmoothReport
    from w8a8.smoothing import outliers
    from w8a8.smoothing.smooth import smooth_, smooth_scales

_HOME = {
    "QParams": "core.affine",
    "QTensor": "core.affine",
    "dequantize": "core.affine",
    "fake_quantize": "core.affine",
    "l2_error": "core.affine",
    "qparams": "core.affine",
    "sqnr_db": "core.affine",
    "Allocation": "analysis",
    "Budget": "analysis",
    "allocate": "analysis",
    "Remedy": "report.records",
    "remedies": "analysis",
    "Sensitivity": "analysis",
    "sensitivity": "analysis",
    "Calibration": "calibration.data",
    "W8A8Config": "hf",
    "disable": "hf",
    "enable": "hf",
    "enabled": "hf",
    "quantize_directory": "directories",
    "collect": "calibration.calibrate",
    "load": "checkpoint",
    "push_to_hub": "checkpoint",
    "save": "checkpoint",
    "unstack_experts_": "model.choice",
    "Coverage": "model.coverage",
    "W8A8Error": "errors",
    "study": "analysis.study",
    "QuantLinear": "layers.linear",
    "ledger": "layers.linear",
    "MSE": "calibration.observers",
    "OBSERVERS": "calibration.observers",
    "AbsMax": "calibration.observers",
    "MinMax": "calibration.observers",
    "Percentile": "calibration.observers",
    "Result": "pipeline",
    "quantize": "pipeline",
    "simulate": "pipeline",
    "Reservoir": "calibration.reservoir",
    "PRESETS": "core.scheme",
    "PerChannel": "core.scheme",
    "PerColumn": "core.scheme",
    "PerGroup": "core.scheme",
    "PerTensor": "core.scheme",
    "PerToken": "core.scheme",
    "QuantSpec": "core.scheme",
    "Scheme": "core.scheme",
    "SmoothReport": "report.smoothed",
    "smooth_": "smoothing.smooth",
    "smooth_scales": "smoothing.smooth",
    "Made": "jobs.quantization",
    "quantize_to": "jobs.quantization",
    "BudgetSearch": "jobs.request",
    "CalibrationText": "jobs.request",
    "Job": "jobs.request",
    "Watcher": "jobs.watching",
    "Compared": "jobs.comparison",
    "ModelPair": "jobs.comparison",
    "compare_models": "jobs.comparison",
    "MeasuredLayers": "jobs.page",
    "measure_layers": "jobs.page",
    "page_records": "jobs.page",
    "Diagnosis": "jobs.diagnosis",
    "diagnose": "jobs.diagnosis",
}
_MODULES = {
    "affine": "core.affine",
    "dataflow": "dataflow",
    "functional": "functional",
    "kernels": "kernels",
    "observers": "calibration.observers",
    "outliers": "smoothing.outliers",
}

__all__ = [
    "MSE",
    "OBSERVERS",
    "PRESETS",
    "AbsMax",
    "Allocation",
    "Budget",
    "BudgetSearch",
    "Calibration",
    "CalibrationText",
    "Compared",
    "Coverage",
    "Diagnosis",
    "Job",
    "Made",
    "MeasuredLayers",
    "MinMax",
    "ModelPair",
    "PerChannel",
    "PerColumn",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "QParams",
    "QTensor",
    "QuantLinear",
    "QuantSpec",
    "Remedy",
    "Reservoir",
    "Result",
    "Scheme",
    "Sensitivity",
    "SmoothReport",
    "W8A8Config",
    "W8A8Error",
    "Watcher",
    "affine",
    "allocate",
    "collect",
    "compare_models",
    "dataflow",
    "dequantize",
    "diagnose",
    "disable",
    "enable",
    "enabled",
    "fake_quantize",
    "functional",
    "kernels",
    "l2_error",
    "ledger",
    "load",
    "measure_layers",
    "observers",
    "outliers",
    "page_records",
    "push_to_hub",
    "qparams",
    "quantize",
    "quantize_directory",
    "quantize_to",
    "remedies",
    "save",
    "sensitivity",
    "simulate",
    "smooth_",
    "smooth_scales",
    "sqnr_db",
    "study",
    "unstack_experts_",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"w8a8.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"w8a8.{_MODULES[name]}")
    if importlib.util.find_spec(f"w8a8.{name}"):  # a room: w8a8.evaluation, w8a8.report
        return importlib.import_module(f"w8a8.{name}")
    raise AttributeError(f"module 'w8a8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
