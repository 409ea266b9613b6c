"""Our directories in vLLM: what the preflight says of each, whether vLLM runs it, and whether it computes the same.

    python bench/vllm_peer.py --peer-python PATH    measure, and write bench/results/MACHINE/vllm_peer.json
    python bench/vllm_peer.py --only opt            those whose names begin so, to try; nothing is written
    python bench/vllm_peer.py --show                print the table of the results that are there

vLLM pins older versions than w8a8's tests use, so it has an environment of its own, and PATH is that one's interpreter:
`make bench-vllm` makes one, with vLLM built for CPUs.  Kernels of that build are not those of GPUs: what it has no
kernel for is told as such, and counts neither for the preflight nor against it.

The models are the shipped OPT and random small ones, each in several schemes, some of them such as the preflight
refuses.  `w8a8.save` writes them; vLLM, a process for each, opens the directory in float32 and scores the same tokens.
Told are the perplexity of `w8a8.load` and vLLM's over it, and the difference of their log-probabilities per token.  The
float models beside them tell how far the two programs differ without quantisation.  A code that lies between two
integers may fall to either side where sums are taken in another order, so single tokens differ by more than rounding.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe_machine, keep, results_of

ROOT = Path(__file__).parents[1]
VOCABULARY, LENGTH, WINDOWS = 512, 64, 4
NO_KERNEL = ("Failed to find a kernel", "No Int8 MoE backend supports")
"""What vLLM says where the format is understood and this build cannot run it."""
Case = tuple[str, Callable[[], Any], Any, dict[str, Any]]
"""The name, the float model's maker, the scheme or None, and the other arguments of `w8a8.quantize`."""


def models() -> dict[str, Callable[[], Any]]:
    """What makes each float model."""
    import transformers

    from w8a8.demo.run import demo_model

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }

    def random(family: str, **others: Any) -> Callable[[], Any]:
        config = getattr(transformers, f"{family}Config")(**sizes | tokens | others)
        return lambda: getattr(transformers, f"{family}ForCausalLM")(config)

    grouped = {"num_key_value_heads": 2}
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=2, n_head=4, n_positions=256, **tokens)
    return {
        "opt": lambda: demo_model().model,
        "llama": random("Llama", **grouped),
        "llama-bias": random("Llama", **grouped, attention_bias=True, mlp_bias=True),
        "llama-tied": random("Llama", **grouped, tie_word_embeddings=True),
        "llama-264": random("Llama", **grouped, hidden_size=264, intermediate_size=520, head_dim=64),
        "qwen2": random("Qwen2", **grouped),
        "qwen3": random("Qwen3", **grouped, head_dim=64),
        "phi3": random("Phi3", **grouped),
        "gemma2": random("Gemma2", **grouped, head_dim=64),
        "gpt-neox": random("GPTNeoX"),
        "falcon": random("Falcon", new_decoder_architecture=True, num_kv_heads=2),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),
        "olmoe": random("Olmoe", num_experts=8),
        "mixtral": random("Mixtral", **grouped, num_local_experts=4),
        "qwen3-moe": random(
            "Qwen3Moe", **grouped, head_dim=64, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2
        ),
    }


def cases() -> Iterator[Case]:
    """Every directory: float ones, families and schemes, selections, and what the preflight refuses."""
    from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme

    made = models()
    tokens, whole = QuantSpec(8, PerToken()), QuantSpec(8, PerTensor())
    for model in ("opt", "llama", "qwen3-moe"):
        yield f"{model} float", made[model], None, {}
    for model in ("opt", "llama", "qwen2", "qwen3", "phi3", "gemma2", "gpt-neox"):
        for scheme in ("w8a8", "w8a8-asym", "w8a8-static", "w8a8-o3"):
            yield f"{model} {scheme}", made[model], scheme, {}
    yield "falcon w8a8", made["falcon"], "w8a8", {}
    yield "llama w8a8-o1", made["llama"], "w8a8-o1", {}
    yield "llama w8a8-static, smoothed", made["llama"], "w8a8-static", {"smooth": 0.5}
    yield "llama-bias w8a8-asym", made["llama-bias"], "w8a8-asym", {}
    yield "llama-tied w8a8", made["llama-tied"], "w8a8", {}
    yield "llama w8a8, MLP w8a8-asym", made["llama"], {"*.mlp.*": "w8a8-asym", "*": "w8a8"}, {}
    yield "llama w8a8, first block float", made["llama"], "w8a8", {"exclude": ["*.layers.0.*"]}
    yield "llama w8a8, down_proj float", made["llama"], "w8a8", {"exclude": ["*.down_proj"]}
    yield "llama w8a8, int8 head", made["llama"], "w8a8", {"head": "int8"}
    yield "llama-264 w8a8", made["llama-264"], "w8a8", {}
    for model in ("qwen3-moe", "olmoe", "mixtral"):
        yield f"{model} w8a8, experts float", made[model], "w8a8", {"exclude": ["*.experts.*"]}
    for model in ("qwen3-moe", "mixtral"):
        yield f"{model} w8a8", made[model], "w8a8", {}
    yield "llama w8a16", made["llama"], "w8a16", {}
    yield "mixtral w8a16", made["mixtral"], "w8a16", {}
    yield "llama w8a8-tensor", made["llama"], "w8a8-tensor", {}
    yield "llama, weights with zero points", made["llama"], Scheme(QuantSpec(8, PerChannel(), False), tokens), {}
    yield "llama, weights in groups", made["llama"], Scheme(QuantSpec(8, PerGroup(64)), tokens), {}
    yield "llama, weights of 4 bits", made["llama"], Scheme(QuantSpec(4, PerChannel()), tokens), {}
    yield "llama, weight-only with one scale", made["llama"], Scheme(whole, None), {}
    yield "llama w8a8, q_proj float", made["llama"], "w8a8", {"exclude": ["*.q_proj"]}
    yield "llama w8a8, gate_proj float", made["llama"], "w8a8", {"exclude": ["*.gate_proj"]}
    yield "llama w8a8, q_proj w8a8-asym", made["llama"], {"*.q_proj": "w8a8-asym", "*": "w8a8"}, {}
    yield "mixtral w8a8-o1", made["mixtral"], "w8a8-o1", {}
    yield "mixtral w8a8-static", made["mixtral"], "w8a8-static", {}
    yield "qwen3-moe w8a8, an expert float", made["qwen3-moe"], "w8a8", {"exclude": ["*.experts.3.*"]}
    yield "gpt2 w8a8", made["gpt2"], "w8a8", {}
    yield "llama-264 w8a8-asym", made["llama-264"], "w8a8-asym", {}


def measure(peer: str, only: str) -> dict[str, Any]:
    """Make every directory, score it here, and have vLLM score it."""
    import torch

    from w8a8.demo.corpus import held_out_text
    from w8a8.demo.run import demo_model
    from w8a8.evaluation import encode

    text = encode(demo_model().tokenizer, held_out_text()).ids[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
    noise = torch.randint(3, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    records = []
    for name, make, scheme, options in cases():
        if name.startswith(only):
            with tempfile.TemporaryDirectory() as directory:
                record = score(Path(directory), make, scheme, options, text if name.startswith("opt ") else noise, peer)
            records.append({"name": name, **record})
            print(row(records[-1]), flush=True)
    if not records:
        raise SystemExit(f"--only {only!r} begins no name")
    found = subprocess.run([peer, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout
    return {"machine": describe_machine() | json.loads(found), "records": records}


_VERSIONS = """
import json
from importlib.metadata import version
import vllm
print(json.dumps({"vllm": vllm.__version__, "its transformers": version("transformers")}))
"""


def score(directory: Path, make: Callable[[], Any], scheme: Any, options: dict[str, Any], ids: Any, peer: str) -> Any:
    """One directory: the preflight's word, our perplexity, and vLLM's answer."""
    import torch

    import w8a8
    from w8a8.checkpoint.vllm import foresee_as_it_is

    torch.manual_seed(0)
    model, saved = make().eval(), directory / "saved"
    refused: list[str] = []
    if scheme is None:
        model.save_pretrained(saved)
    else:
        static = isinstance(scheme, str) and scheme in ("w8a8-static", "w8a8-o3")
        result = w8a8.quantize(model, scheme, **options, **({"calibration": [ids]} if static else {}))
        w8a8.save(result.model, saved)
        model = w8a8.load(saved)
        refused = [finding.what for finding in foresee_as_it_is(model) if finding.refused]
    with torch.no_grad():
        scores = model(ids).logits.double().log_softmax(-1)[:, :-1]
    ours = scores.gather(-1, ids[:, 1:, None]).flatten().tolist()
    (directory / "ids.json").write_text(json.dumps(ids.tolist()))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [peer, __file__, "--child", str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    record = {"refused": refused, "perplexity": math.exp(-sum(ours) / len(ours))}
    answer = directory / "answer.json"
    if not answer.exists():
        return record | {"error": last_error(done.stderr + done.stdout)}
    theirs = json.loads(answer.read_text())
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return record | {
        "ratio": math.exp((sum(ours) - sum(theirs)) / len(ours)),
        "median": median(apart),
        "largest": max(apart),
    }


def last_error(output: str) -> str:
    """The last line that names an error, without what the process puts before it."""
    named = re.findall(r"^(?:\[rank0\]: |\(.*\) )*((?:\w+\.)*\w*Error\b.*)$", output, re.MULTILINE)
    return str(named[-1] if named else output.strip().rpartition("\n")[2])[:200]


def child(directory: Path) -> None:
    """In vLLM's environment: score the tokens, and leave the log-probabilities in answer.json."""
    from vllm import LLM, SamplingParams

    ids = json.loads((directory / "ids.json").read_text())
    model = LLM(
        model=str(directory / "saved"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2 * len(ids[0]),
        max_num_batched_tokens=1024,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found = model.generate([{"prompt_token_ids": window} for window in ids], sampling)
    answer = [
        scores[token].logprob
        for window, output in zip(ids, found, strict=True)
        for token, scores in zip(window[1:], output.prompt_logprobs[1:], strict=True)
    ]
    (directory / "answer.json").write_text(json.dumps(answer))


def verdict(record: dict[str, Any]) -> str:
    """What vLLM did, in a few words."""
    if "error" not in record:
        return "runs"
    if any(words in record["error"] for words in NO_KERNEL):
        return "no kernel in this build"
    return "refuses"


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [record["name"], "refuses" if record["refused"] else "runs", verdict(record)]
    if "error" in record:
        cells += ["", "", ""]
    else:
        cells += [f"{record['ratio'] - 1:+.1e}", f"{record['median']:.0e}", f"{record['largest']:.0e}"]
    return "| " + " | ".join(cells) + " |"


def table(result: dict[str, Any]) -> str:
    """All records as Markdown."""
    head = [
        "model and scheme",
        "preflight",
        "vLLM",
        "perplexity, vLLM / ours - 1",
        "median",
        "largest difference, nats",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * 3]
    return "\n".join([*lines, *map(row, result["records"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=ROOT / ".venv-vllm" / "bin" / "python", help="of vLLM's environment")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--child", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    if arguments.show:
        result = results_of("vllm_peer")[0]
    else:
        result = measure(str(arguments.peer_python), arguments.only)
        if not arguments.only:
            keep("vllm_peer", result)
    print("\n" + table(result))
    if sys.stdout.isatty():
        for record in result["records"]:
            if "error" in record:
                print(f"{record['name']}: {record['error']}")


if __name__ == "__main__":
    main()
