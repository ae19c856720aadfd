"""The commands `ops` and `step`: every row of the registry, and how a result is printed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .cases import END_TO_END, OPS, Builder, Setting
from .measure import LIBRARY, QUICK, Effort, run_case
from .scene import QUICK as QUICK_SIZE
from .scene import Size


def run_registry(
    registry: Mapping[str, Builder],
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> dict[str, Any]:
    size = replace(QUICK_SIZE if quick else Size(), dtype=dtype)
    effort = QUICK if quick else Effort(seconds=5.0 if device.type == "cuda" else 15.0)
    cases = []
    for build in registry.values():
        torch.compiler.reset()
        case, largest = build(Setting(device, size, compiled))
        cases.append(run_case(case, device, effort, largest, judged=not quick))
        del case, largest
    return {"size": size.words(), "cases": cases, "passed": all(case["gate"] for case in cases)}


def ops(**options: Any) -> dict[str, Any]:
    return run_registry(OPS, **options)


def step(**options: Any) -> dict[str, Any]:
    return run_registry(END_TO_END, **options)


def milliseconds(part: Mapping[str, Any]) -> str:
    low, high = (1e3 * q for q in part["quartiles_s"])
    return f"{1e3 * part['median_s']:.3g} ({low:.3g}-{high:.3g})"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.3g}"


def number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


VERDICT = {True: "met", False: "MISSED", None: ""}


def described(where: Mapping[str, Any]) -> str:
    gpu = where.get("gpu")
    processor = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    return (
        f"{gpu['name'] + '; ' if gpu else ''}{processor}, load {where['load_average']}, torch "
        f"{where['torch']}, commit {where['commit']}, {where['date']}"
    )


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"]), results["size"]]
    for case in results["cases"]:
        rows = case["contestants"]
        mine = rows.get(LIBRARY, {})
        lines += [
            "",
            f'{case["name"]}: {case["what"]}; the library in its form "{case["form"]}"',
            f"  at the least {case['bytes'] / 1e6:.4g} MB ({case['bytes_how']})",
            f"  {case['flops'] / 1e9:.3g} GFLOP ({case['flops_how']}); the copy moves "
            f"{case['copy']['bytes_per_s'] / 1e9:.3g} GB/s, into fresh memory "
            f"{case['copy']['fresh_bytes_per_s'] / 1e9:.3g}",
            f"  {'':22}{'ms':>26}{'device ms':>24}{'peak MiB':>10}{'of copy':>9}{'ours is':>16}"
            "  same answer",
        ]
        for name, row in rows.items():
            if "failed" in row:
                lines.append(f"  {name:22} failed: {row['failed']}")
                continue
            ratio, device = "", ""
            if name != LIBRARY and "wall" in mine:
                key = "device" if "device" in row and "device" in mine else "wall"
                times = row[key]["median_s"] / mine[key]["median_s"]
                ratio = f"{times:.2f}x {'faster' if times >= 1 else 'SLOWER'}"
            if "device" in row:
                device = milliseconds(row["device"])
            same = "yes" if row.get("gate", True) else "NO"
            lines.append(
                f"  {name:22}{milliseconds(row['wall']):>26}{device:>24}"
                f"{mebibytes(row['peak_bytes']):>10}{row['of_copy_bandwidth']:>8.1%} {ratio:>15}"
                f"  {same} ({row['difference']:.0e})"
            )
        for bar in case["bars"]:
            # A speed-up without a bar stands in its rival's row.
            if bar["bar"] is not None or bar["measure"] in ("memory", "extra"):
                against = f"({bar['bar']})" if bar["bar"] else ""
                lines.append(
                    f"  {VERDICT[bar['met']]:8}{number(bar['measured'])} {bar['what']} {against}"
                )
    return "\n".join(lines)
