"""Encoders, batch by length: ours, plain and fused, against what their users run today.

    python bench/encoders.py [--models minilm,bge-base] [--cells 1x16,8x64,mixed] [--peers ours,fused,...] [--seconds 1]
    python bench/encoders.py --go-on             # only cells that were not measured here yet

Random weights in the shapes of all-MiniLM-L6-v2, bge-base, a MiniLM cross-encoder, ViT-base and Whisper-tiny's encoder.
One process, one thread, the peers interleaved call by call; medians of the process's own processor time, which other
work on the machine disturbs least, with quartiles.  `mixed` is a batch of eight texts of 16 to 128 tokens, padded.  The
cosine of a peer is that of its outputs to the float model's, token by token, the least one.  A cell in which a call
of float32 takes longer than `--longest` is left out, which the table tells.

Peers: float32; bf16, the model in bfloat16; torch.ao's dynamic layers; ONNX Runtime with dynamic int8, weights per
channel; OpenVINO with NNCF, calibrated on the same kind of input; `ours`, it and w8a8-asym fused, and
`ours compiled`, by torch.compile's inductor.  What is not installed is told and left out.  Exports are made with a
dynamic batch and length by torch.onnx; pictures and sound have one length, so for them a cell is a batch.
"""

import argparse
import copy
import importlib.util
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import w8a8
from machine import describe_machine, keep, kept, versions

CELLS = ("1x16", "1x64", "1x256", "8x16", "8x64", "8x256", "32x16", "32x64", "32x256", "mixed")
MIXED = (16, 24, 32, 48, 64, 80, 96, 128)
FEWEST = 3
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


def _bert(hidden: int, layers: int, heads: int, kind: Any = BertModel) -> nn.Module:
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=1,
    )
    return kind(config)


def _whisper() -> nn.Module:
    return WhisperEncoder(WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "minilm": lambda: _bert(384, 6, 12),
    "bge-base": lambda: _bert(768, 12, 12),
    "cross-encoder": lambda: _bert(384, 6, 12, BertForSequenceClassification),
    "vit-base": lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
    "whisper-tiny": _whisper,
}


class Encoder(nn.Module):
    """A model that gives one tensor: its last hidden state, or its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        reads_text = len(inputs) > 1
        out = self.model(input_ids=inputs[0], attention_mask=inputs[1]) if reads_text else self.model(inputs[0])
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def inputs_of(model: str, cell: str) -> Inputs | None:
    """The inputs of a cell; None where there is no such cell."""
    batch, _, length = cell.partition("x")
    if model in ("vit-base", "whisper-tiny"):
        if length != "16":
            return None
        rows = int(batch)
        if model == "vit-base":
            return {"pixel_values": torch.randn(rows, 3, 224, 224)}
        return {"input_features": torch.randn(rows, 80, 3000)} if rows < 32 else None
    lengths = MIXED if cell == "mixed" else (int(length),) * int(batch)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(0, 30000, mask.shape), "attention_mask": mask}


def _torch(model: nn.Module) -> Run:
    return lambda inputs: model(*inputs.values())


def _bf16(model: nn.Module, _: Inputs) -> Run:
    model = model.to(torch.bfloat16)

    def run(inputs: Inputs) -> Tensor:
        return model(*(t.bfloat16() if t.is_floating_point() else t for t in inputs.values())).float()

    return run


def _torch_ao(model: nn.Module, _: Inputs) -> Run:
    import torch.ao.quantization as quantization

    torch.backends.quantized.engine = "onednn"
    how = {nn.Linear: quantization.per_channel_dynamic_qconfig}
    return _torch(quantization.quantize_dynamic(model, how))


def _ours(scheme: str, *, fuse: bool = False, compiled: bool = False) -> Callable[[nn.Module, Inputs], Run]:
    def make(model: nn.Module, _: Inputs) -> Run:
        w8a8.quantize(model, scheme, fuse=fuse)
        if compiled:
            model.compile(dynamic=True)
        return _torch(model)

    return make


def _exported(model: nn.Module, inputs: Inputs, path: Path) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length} if len(inputs) > 1 else {0: batch}
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        str(path),
        dynamo=False,
        input_names=list(inputs),
        output_names=["out"],
        dynamic_axes={name: {i: str(dim) for i, dim in axes.items()} for name in inputs},
        opset_version=17,
    )


def _onnxruntime(model: nn.Module, inputs: Inputs) -> Run:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, int8 = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        _exported(model, inputs, path)
        only = {"op_types_to_quantize": ["MatMul", "Gemm"]}
        quantize_dynamic(path, int8, per_channel=True, weight_type=QuantType.QInt8, **only)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        fed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def _openvino(model: nn.Module, inputs: Inputs) -> Run:
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _exported(model, inputs, path)
        found = openvino.Core().read_model(path)
        samples = [{name: t.numpy() for name, t in inputs.items()}] * 4
        found = nncf.quantize(found, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.Core().compile_model(found, "CPU", options).create_infer_request()

    def run(inputs: Inputs) -> Tensor:
        result = request.infer({name: t.numpy() for name, t in inputs.items()})
        return torch.from_numpy(np.array(next(iter(result.values()))))

    return run


PEERS: dict[str, Callable[[nn.Module, Inputs], Run]] = {
    "float32": lambda model, _: _torch(model),
    "ours": _ours("w8a8"),
    "ours fused": _ours("w8a8", fuse=True),
    "ours asym fused": _ours("w8a8-asym", fuse=True),
    "bf16": _bf16,
    "torch.ao": _torch_ao,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
    "ours compiled": _ours("w8a8", compiled=True),
}
NEEDS = {"ONNX Runtime": ("onnx", "onnxruntime"), "OpenVINO": ("onnx", "openvino", "nncf")}
NOT_BY_DEFAULT = {"ours compiled"}  # minutes of compiling for each model


def least_cosine(found: Tensor, wanted: Tensor, inputs: Inputs) -> float:
    """Of the outputs to the float model's, over the tokens that are no padding; of logits, over the whole batch."""
    if found.ndim == 2:
        return float(F.cosine_similarity(found.flatten().double(), wanted.flatten().double(), dim=0))
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(found.shape[:2]).bool()
    return float(F.cosine_similarity(found[seen].double(), wanted[seen].double(), dim=-1).min())


def measure(runs: dict[str, Run], inputs: Inputs, seconds: float, longest: float = math.inf) -> dict[str, Any]:
    """Interleaved calls of all peers on the inputs of one cell; or why there are none."""
    start = time.process_time()
    outputs = {"float32": runs["float32"](inputs).clone()}
    if (took := time.process_time() - start) > longest:
        return {"left_out": f"a call of float32 takes {took:.0f} s"}
    outputs |= {name: run(inputs).clone() for name, run in runs.items() if name != "float32"}
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, rounds = time.perf_counter(), 0
    while rounds < FEWEST or time.perf_counter() - begin < seconds:
        turn = rounds % len(runs)
        for name, run in [*runs.items()][turn:] + [*runs.items()][:turn]:
            start = time.process_time()
            run(inputs)
            times[name].append(time.process_time() - start)
        rounds += 1
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return {
        "rounds": rounds,
        "median_ms": {name: 1e3 * middle for name, (_, middle, _) in quartiles.items()},
        "quartiles_ms": {name: [1e3 * low, 1e3 * high] for name, (low, _, high) in quartiles.items()},
        "cosine": {name: least_cosine(y, outputs["float32"], inputs) for name, y in outputs.items()},
    }


def table(result: dict[str, Any]) -> str:
    """How many times as fast as float32 each peer is, cell by cell, and the least cosine to it over a model's cells."""
    peers = [name for name in result["peers"] if name != "float32"]
    head = "| model | batch | float32, ms | " + " | ".join(peers) + " |"
    lines = [head, "|---|---|---:|" + "---:|" * len(peers)]
    for model, cells in result["models"].items():
        for cell, record in sorted(cells.items(), key=lambda pair: CELLS.index(pair[0])):
            if "left_out" in record:
                lines.append(f"| {model} | {cell} | left out: {record['left_out']} |" + " |" * len(peers))
                continue
            ms = record["median_ms"]
            ratios = " | ".join(f"{ms['float32'] / ms[p]:.2f}x" if p in ms else "" for p in peers)
            lines.append(f"| {model} | {cell} | {ms['float32']:.2f} | {ratios} |")
        measured = [r["cosine"] for r in cells.values() if "cosine" in r]
        least = {p: min((cosine[p] for cosine in measured if p in cosine), default=None) for p in peers}
        told = " | ".join("" if value is None else f"{value:.4f}" for value in least.values())
        lines.append(f"| {model} | least cosine | | {told} |")
    return "\n".join(lines)


def summary(result: dict[str, Any], ours: str = "ours fused") -> str:
    """Geometric mean over all cells, and the worst cell, of the best peer's time divided by ours."""
    others = [p for p in result["peers"] if not p.startswith("ours")]
    ratios = {
        (model, cell): min(r["median_ms"][p] for p in others if p in r["median_ms"]) / r["median_ms"][ours]
        for model, cells in result["models"].items()
        for cell, r in cells.items()
        if "left_out" not in r
    }
    worst = min(ratios, key=lambda key: ratios[key])
    mean = statistics.geometric_mean(ratios.values())
    return (
        f"`{ours}` against the best of the others in each cell: {mean:.2f}x in the geometric mean, "
        f"{ratios[worst]:.2f}x in the worst cell ({', '.join(worst)})."
    )


def _has_all(record: dict[str, Any] | None, peers: list[str]) -> bool:
    return record is not None and ("left_out" in record or set(peers) <= record["median_ms"].keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--peers", default=",".join(name for name in PEERS if name not in NOT_BY_DEFAULT))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each cell, at least")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds that a call of float32 may take")
    parser.add_argument("--go-on", action="store_true", help="leave the cells as they are that have all of the peers")
    parser.add_argument("--output", type=Path, help="instead of bench/results/MACHINE/")
    parser.add_argument("--anew", action="store_true", help="forget the models that were measured here before")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations of the peers
    torch.set_num_threads(1)
    peers = list(dict.fromkeys(["float32", *arguments.peers.split(",")]))
    if unknown := [name for name in peers if name not in PEERS]:
        raise SystemExit(f"unknown peers: {unknown}; there are {', '.join(PEERS)}")
    for name in list(peers):
        if missing := [needed for needed in NEEDS.get(name, ()) if importlib.util.find_spec(needed) is None]:
            print(f"{name} is left out: {', '.join(missing)} cannot be imported; pip install 'w8a8[bench]'")
            peers.remove(name)
    result: dict[str, Any] = {} if arguments.anew or arguments.output else kept("encoders")
    models = result.get("models", {})
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        float_model = Encoder(MODELS[name]()).eval()
        cells = {cell: inputs for cell in arguments.cells.split(",") if (inputs := inputs_of(name, cell)) is not None}
        if not cells:
            continue
        example = next(
            (inputs for cell, inputs in cells.items() if not cell.startswith("1x")), next(iter(cells.values()))
        )
        done = models.setdefault(name, {})
        if arguments.go_on:
            cells = {cell: inputs for cell, inputs in cells.items() if not _has_all(done.get(cell), peers)}
            if not cells:
                continue
        with torch.no_grad():
            runs = {peer: PEERS[peer](copy.deepcopy(float_model), example) for peer in peers}
            for cell, inputs in cells.items():
                record = models[name][cell] = measure(runs, inputs, arguments.seconds, arguments.longest)
                told = [*dict.fromkeys(result.get("peers", []) + peers)]
                result = {
                    "machine": describe_machine(),
                    "versions": versions("onnxruntime", "openvino", "nncf"),
                    "peers": [peer for peer in PEERS if peer in told],
                    "models": models,
                }
                keep("encoders", result, arguments.output)  # a run that is ended loses one cell
                if "left_out" in record:
                    print(f"{name} {cell}: left out, {record['left_out']}", flush=True)
                    continue
                ms = record["median_ms"]
                ratios = "  ".join(f"{p} {ms['float32'] / t:.2f}x" for p, t in ms.items() if p != "float32")
                print(f"{name} {cell}: float32 {ms['float32']:.2f} ms; {ratios}", flush=True)
    print("\n" + summary(result))


if __name__ == "__main__":
    main()
