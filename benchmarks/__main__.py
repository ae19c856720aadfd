"""The command line: `python -m benchmarks NAME [--quick] [--output PATH]`."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from .environment import environment

BENCHMARKS = {"pursuit": "selecting prototypes: speed against the released formulation, and scale"}
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure, print a table, write the numbers as JSON.",
        epilog="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()),
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer repetitions and smaller sizes, to see that it works; not for quoting",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"JSON file (default: {RESULTS.name}/NAME.json beside this file; none with --quick)",
    )
    arguments = parser.parse_args()
    benchmark = importlib.import_module(f".{arguments.name}", __package__)
    described = environment()  # before anything runs, so that the load average is that of others
    results = {
        "benchmark": arguments.name,
        "quick": arguments.quick,
        "environment": described,
        **benchmark.run(quick=arguments.quick),
    }
    print(benchmark.table(results))
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS / f"{arguments.name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {output}")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
