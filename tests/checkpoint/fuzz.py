"""Damage directories for as many cases as asked for: what `make test-all` runs.

    python -m tests.checkpoint.fuzz [--cases 10000] [--seed 0]

A seeded loop over the mutations of the hypothesis test, which know the format; `tests.checkpoint.fuzz_atheris` is
guided by coverage instead, where there is atheris.
"""

import argparse
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers

import w8a8
from tests.checkpoint.mutations import MUTATIONS, outcome
from tests.checkpoint.test_hostile import SCHEMES, TINY
from tests.conftest import llama


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    seen: Counter[tuple[str, str]] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as room:
        originals = []
        for name, scheme in SCHEMES.items():
            path, model = Path(room) / name, llama(**TINY)
            if scheme is None:
                model.save_pretrained(path, max_shard_size="3KB")
            else:
                w8a8.save(w8a8.quantize(model, scheme).model, path, max_shard_size="2KB")
            originals.append((path, w8a8.load(path).state_dict()))
        for case in range(arguments.cases):
            draw = random.Random(f"{arguments.seed} {case}")
            (path, expected), mutation = draw.choice(originals), draw.choice(sorted(MUTATIONS))
            try:
                seen[mutation, outcome(path, expected, Path(room) / "scratch", mutation, draw)] += 1
            except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
                failed += 1
                print(f"case {case}: {mutation} of {path.name}", file=sys.stderr)  # noqa: T201
                traceback.print_exc()
    for (mutation, result), count in sorted(seen.items()):
        print(f"{mutation:15} {result:17} {count:6}")  # noqa: T201
    print(f"{arguments.cases} cases, {failed} neither a W8A8Error nor the original model")  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
