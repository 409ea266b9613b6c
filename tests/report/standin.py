"""Records of models that were not run: a stand-in of any depth, with every part of the schema filled."""

import math
import random
from typing import Any

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
COLUMNS = 128


def standin(blocks: int = 32, *, seed: int = 0) -> dict[str, Any]:
    """A Llama of so many blocks, seven linears each, whose early down projections are bad."""
    rng = random.Random(seed)
    layers = [_layer(f"model.layers.{block}.{path}", block, rng) for block in range(blocks) for path in SHAPES]
    alone = [x["name"] for x in sorted(layers, key=lambda x: -x["kl_alone"])]
    spared = [x["name"] for x in sorted(layers, key=lambda x: -(x["kl_spared"] or 0))]
    bytes_after = 6_800_000_000
    points = [
        {
            "bytes": bytes_after + i * 300_000_000,
            "predicted_kl_nats": 0.02 * math.exp(-i / 2),
            "measured_kl_nats": 0.021 * math.exp(-i / 2.1) if i % 2 == 0 else None,
        }
        for i in range(9)
    ]
    return {
        "schema": 1,
        "headline": {
            "model": f"Llama stand-in of {blocks} blocks",
            "scheme": "w8a8-static",
            "verdict": "Perplexity is worse than the float model's by 0.412 % to 0.903 % (95 %).",
            "bytes_before": 2 * bytes_after,
            "bytes_after": bytes_after,
            "tok_per_s_before": 4.2,
            "tok_per_s_after": 18.6,
            "perplexity_float": {"mean": 7.3312, "low": 7.101, "high": 7.57},
            "perplexity_quantized": {"mean": 7.3794, "low": 7.148, "high": 7.62},
            "bits_per_byte_float": {"mean": 0.6712, "low": 0.66, "high": 0.682},
            "bits_per_byte_quantized": {"mean": 0.6734, "low": 0.662, "high": 0.684},
            "kl_mean_nats": {"mean": 0.0112, "low": 0.0104, "high": 0.0121},
            "kl_p99_nats": {"mean": 0.1131, "low": 0.101, "high": 0.127},
            "top1_agreement": {"mean": 0.9631, "low": 0.961, "high": 0.9652},
        },
        "coverage": _coverage(layers),
        "layers": layers,
        "rankings": {
            "kl_alone": alone,
            "kl_spared": spared,
            "disagree": [n for n in alone[:12] if n not in spared[:12]],
        },
        "channels": [_channels(layer, seed) for layer in layers],
        "histograms": [_histogram(name, what, rng) for name in alone[:4] for what in ("weight", "input")],
        "smoothing": {"kept": "searched", "groups": [g for block in range(blocks) for g in _groups(block, rng)]},
        "budget": {"points": points, "chosen": 3, "constraint": "at most 0.5 % of the float model's perplexity lost"},
        "remedies": [
            {"layer": alone[0], "remedy": "leave in float", "gain_kl_nats": 0.0031},
            {"layer": alone[1], "remedy": "activations per token", "gain_kl_nats": 0.0012},
            {"layer": alone[2], "remedy": "smoothing, alpha 0.85", "gain_kl_nats": None},
        ],
        "reproduce": {
            "command": "w8a8 quantize stand-in -o out --scheme w8a8-static --calib text.txt --seed 0",
            "seed": 0,
            "versions": {"w8a8": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "hashes": {
                "model.safetensors (SHA-256)": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
            },
            "machine": {"processor": "AMD EPYC (Zen 4)", "cores": "2"},
        },
    }


def _layer(name: str, block: int, rng: random.Random) -> dict[str, Any]:
    kind = name.rpartition(".")[2]
    bad = kind == "down_proj" and block < 3
    base = (14 if bad else 34) + rng.gauss(0, 1.5) - (4 if kind == "o_proj" else 0)
    alone = 10 ** (-base / 10 + rng.gauss(0, 0.15))
    return {
        "name": name,
        "kind": kind,
        "block": block,
        "shape": list(SHAPES[name.split(".", 3)[3]]),
        "scheme": "w8a8-static",
        "weight_sqnr_db": 40 + rng.gauss(0, 1),
        "input_sqnr_db": base + 3 + rng.gauss(0, 0.5),
        "output_sqnr_db": base,
        "cosine": 1 - 10 ** (-base / 10) / 2,
        "saturated_share": abs(rng.gauss(0, 1e-4)),
        "dead_share": 0.0,
        "outlier_ratio": 10 ** rng.uniform(0.5, 3 if bad else 1.5),
        "kl_alone": alone,
        "kl_spared": None if rng.random() < 0.05 else alone * 10 ** rng.gauss(0, 0.2),
    }


def _coverage(layers: list[dict[str, Any]]) -> dict[str, Any]:
    modules = [
        {
            "name": x["name"],
            "kind": "QuantLinear",
            "shape": x["shape"],
            "parameters": math.prod(x["shape"]),
            "bytes": math.prod(x["shape"]) + 4 * x["shape"][0],
            "macs": math.prod(x["shape"]),
            "scheme": x["scheme"],
            "reason": None,
        }
        for x in layers
    ]
    head = {"name": "lm_head", "kind": "Linear", "shape": [32000, 4096], "parameters": 131072000, "bytes": 262144000,
            "macs": 131072000, "scheme": None, "reason": "the output head, which vLLM wants in float"}  # fmt: skip
    parts = {"quantized": modules, "float": [head], "all": [*modules, head]}
    totals = {
        name: {"modules": len(part), **{key: sum(m[key] for m in part) for key in ("parameters", "bytes", "macs")}}
        for name, part in parts.items()
    }
    return {"totals": totals, "modules": parts["all"]}


def _channels(layer: dict[str, Any], seed: int) -> dict[str, Any]:
    """q, k and v read one tensor, and so do gate and up."""
    tensor = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(layer["kind"], layer["kind"])
    rng = random.Random(f"{seed} {layer['block']} {tensor}")
    before = [round(math.exp(rng.gauss(0, 0.5)), 3) for _ in range(COLUMNS)]
    for place in (7, 70):
        before[place] *= 40 if layer["kind"] != "o_proj" else 1
    after = [round(v**0.4, 3) for v in before]
    return {"layer": layer["name"], "before": before, "after": after if layer["kind"] != "o_proj" else None}


def _histogram(layer: str, what: str, rng: random.Random) -> dict[str, Any]:
    width = 0.02 if what == "weight" else 0.4
    edges = [round((i - 32) * width, 6) for i in range(65)]
    counts = [round(1e5 * math.exp(-(((i - 31.5) / 7) ** 2))) + rng.randrange(2) for i in range(64)]
    return {
        "layer": layer,
        "what": what,
        "edges": edges,
        "counts": counts,
        "scale": 32 * width / 127,
        "qmax": 127,
        "qmin": None if what == "weight" else -128,
        "zero_point": 0 if what == "weight" else -3,
    }


def _groups(block: int, rng: random.Random) -> list[dict[str, Any]]:
    made = []
    for source, readers in (
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("self_attn.v_proj", ["self_attn.o_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.up_proj", ["mlp.down_proj"]),
    ):
        error = 10 ** rng.uniform(-4, -2)
        alone = source == "self_attn.v_proj"
        made.append(
            {
                "source": f"model.layers.{block}.{source}",
                "readers": [f"model.layers.{block}.{reader}" for reader in readers],
                "alpha": None if alone else round(rng.choice(range(4, 18)) * 0.05, 2),
                "error_before": error,
                "error_after": error if alone else error * rng.uniform(0.2, 0.9),
                "reason": "grouped heads share its channels" if alone else None,
            }
        )
    return made
