"""The command line: `python -m benchmarks NAME [options]`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import compare, methods, pursuit, ranks, report, scaling, shares, suite, training, waits
from .environment import environment

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BENCHMARKS: dict[str, tuple[str, Callable[..., dict[str, Any]], Callable[..., str]]] = {
    "ops": ("each op against its rivals", suite.ops, suite.table),
    "step": ("the full RDM step against the released formulation", suite.step, suite.table),
    "methods": ("every method beside its plain formulation", methods.run, methods.table),
    "scaling": ("boxes, image side, instances of the pursuit", scaling.run, scaling.table),
    "training": ("the share of KD in a torchvision training step", training.run, training.table),
    "waits": ("whether a step makes the host wait for the GPU", waits.run, waits.table),
    "ranks": ("a refresh of the prototypes on several ranks", ranks.run, ranks.table),
    "shares": ("what kd.calibrate sets on digit scenes", shares.run, shares.table),
    "pursuit": ("selecting prototypes, against the released", pursuit.run, pursuit.table),
}


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure, print a table, write the numbers as JSON.",
    )
    commands = described.add_subparsers(dest="name", required=True)
    for name, (what, _, _) in BENCHMARKS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            "--quick",
            action="store_true",
            help="fewer repetitions and tiny sizes, to see that it works; not for quoting",
        )
        command.add_argument(
            "--output",
            type=Path,
            help="JSON file (default: NAME_DEVICE.json in results/ beside this file, "
            "pursuit.json for the pursuit; none with --quick or --only)",
        )
        if name == "methods":
            command.add_argument(
                "--only",
                nargs="+",
                choices=methods.names(),
                default=(),
                metavar="NAME",
                help=f"some of {', '.join(methods.names())}; nothing is written by default, "
                "rows of others are kept in a file that is named",
            )
            command.add_argument(
                "--seconds",
                type=float,
                default=methods.SECONDS,
                help="for each contestant (default: %(default)s)",
            )
        if name == "pursuit":
            continue
        command.add_argument(
            "--device",
            choices=("cpu", "cuda"),
            default="cuda" if torch.cuda.is_available() else "cpu",
        )
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the maps")
        command.add_argument(
            "--no-compile",
            action="store_true",
            help="leave torch.compile out, which needs a compiler and its time",
        )
    reporting = commands.add_parser("report", help="results files to docs/benchmarks.md and plots")
    reporting.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    reporting.add_argument("--page", type=Path, default=report.PAGE)
    comparing = commands.add_parser(
        "compare", help="name what got slower; exit status 1 if anything did"
    )
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--threshold", type=float, default=0.1, help="growth that is tolerated")
    return described


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.name == "report":
        return report.main(arguments.results, arguments.page)
    if arguments.name == "compare":
        return compare.main(arguments.old, arguments.new, arguments.threshold)
    _, run, table = BENCHMARKS[arguments.name]
    device, file = None, arguments.name
    if arguments.name != "pursuit":
        device = torch.device(arguments.device)
        dtype = "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
        file = f"{file}{dtype}_{device.type}"
        run = partial(
            run,
            device=device,
            dtype=DTYPES[arguments.dtype],
            compiled=not arguments.no_compile,
        )
    if arguments.name == "methods":
        run = partial(run, only=arguments.only, seconds=arguments.seconds)
    # Before anything runs, so that the load average is that of others.
    described = environment(device)
    results = {
        "benchmark": arguments.name,
        "quick": arguments.quick,
        "environment": described,
        **run(quick=arguments.quick),
    }
    output = arguments.output
    if arguments.name == "methods":
        methods.date(results, described)
        if arguments.only and output is not None and output.exists():
            methods.keep_others(results, json.loads(output.read_text(encoding="utf-8")))
    print(table(results))
    if output is None and not arguments.quick and not getattr(arguments, "only", ()):
        output = RESULTS / f"{file}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {output}")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
