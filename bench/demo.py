"""The README's table: `w8a8 demo`, written down with the machine and the date.

python bench/demo.py            measure, and write bench/results/MACHINE/demo.json
python bench/demo.py --show     print the table of the results that are there
"""

import argparse
from typing import Any

from machine import describe_machine, keep, results_of


def table(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "| scheme | simulated perplexity | perplexity, saved and loaded | change | same top token | weights on disk |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["report"]["rows"]:
        simulated = row["simulated_perplexity"]
        change = row["perplexity"] / result["report"]["float_perplexity"] - 1
        lines.append(
            f"| {row['scheme']} | {'' if simulated is None else f'{simulated:.4f}'} | {row['perplexity']:.4f} | "
            f"{100 * change:+.3f} % | {100 * row['top1_agreement']:.2f} % | {row['bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def measure() -> dict[str, Any]:
    """Run the demo."""
    from w8a8.core.plain import plain
    from w8a8.demo.run import run_demo

    return {"machine": describe_machine(), "report": plain(run_demo())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    if parser.parse_args().show:
        result = results_of("demo")[0]
    else:
        result = measure()
        keep("demo", result)
    print(table(result))


if __name__ == "__main__":
    main()
