"""What a sensitivity analysis of all layers costs, on the shipped model.

python bench/sensitivity.py            measure, and write bench/results/MACHINE/sensitivity.json
python bench/sensitivity.py --show     print the summary of the results that are there
"""

import argparse
import time
from typing import Any

from machine import describe_machine, keep, results_of


def summary(result: dict[str, Any]) -> str:
    """One sentence."""
    return (
        f"{result['layers']} layers, {result['windows']} windows of {result['seq_len']} tokens, "
        f"{2 * result['layers']} changed models: {result['seconds']:.1f} s, once. The orders by KL alone and by KL "
        f"spared have the rank correlation {result['spearman']:.2f}, and {result['overlap']} of the {result['top']} "
        "worst in common."
    )


def measure() -> dict[str, Any]:
    """Analyse the shipped model on held-out text."""
    import torch

    from w8a8.analysis.layers import sensitivity
    from w8a8.demo.corpus import held_out_text
    from w8a8.demo.run import demo_model
    from w8a8.evaluation import encode

    opened = demo_model()
    text = encode(opened.tokenizer, held_out_text())
    start = time.perf_counter()
    found = sensitivity(opened.model, text)
    seconds = time.perf_counter() - start
    return {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "layers": len(found.layers),
        "windows": found.windows,
        "seq_len": found.seq_len,
        "kl_nats": found.kl_nats,
        "spearman": found.rankings.spearman,
        "overlap": found.rankings.overlap,
        "top": found.rankings.top,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    if parser.parse_args().show:
        result = results_of("sensitivity")[0]
    else:
        result = measure()
        keep("sensitivity", result)
    print(summary(result))


if __name__ == "__main__":
    main()
