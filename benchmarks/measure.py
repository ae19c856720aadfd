"""How everything here is measured: gate, warm-up, turns, quartiles, peak memory, bars."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from global_kd.ops.dispatch import backend

LIBRARY = "library"
COPY = "copy"  # one map copied to another: the yardstick of memory traffic
FRESH = "copy to fresh memory"  # likewise, with what the system takes to hand out new pages
Work = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Bar:
    """What a case has to reach, by kind of device; `None`: reported, no bar.

    `measure` is "speedup" (times faster than the rival), "memory" (share of the rival's peak,
    results included), "extra" (likewise beyond the results, the gradients that both have to
    return), "traffic" (times what the case's bytes take at the copy's bandwidth) or "share" (of the
    rival's time).
    """

    measure: str
    rival: str
    cpu: float | None = None
    cuda: float | None = None

    def judge(self, case: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
        """The bar beside the number; `met` is `None` where there is nothing to compare.

        No kind of device: sizes at which no bar holds.
        """
        needed = {"cpu": self.cpu, "cuda": self.cuda}[kind] if kind else None
        value = self._value(case)
        at_least = self.measure == "speedup"
        met = None
        if needed is not None and value is not None:
            met = value >= needed if at_least else value <= needed
        sign = "at least" if at_least else "at most"
        return {
            "what": {
                "speedup": f"times faster than {self.rival}",
                "memory": f"of the peak memory of {self.rival}, gradients included",
                "extra": f"of the peak memory of {self.rival}, beyond the gradients",
                "traffic": "times its bytes at copy bandwidth",
                "share": f"of the time of {self.rival}",
            }[self.measure],
            "measure": self.measure,
            "rival": self.rival,
            "bar": None if needed is None else f"{sign} {needed:.4g}",
            "bars": {"cpu": self.cpu, "cuda": self.cuda},
            "measured": value,
            "met": met,
        }

    def _value(self, case: Mapping[str, Any]) -> float | None:
        ours, rival = (case["contestants"].get(name, {}) for name in (LIBRARY, self.rival))
        if self.measure == "traffic":
            return case.get("times_copy")
        if self.measure in ("memory", "extra"):
            if "peak_bytes" not in ours or "peak_bytes" not in rival:
                return None
            mine, theirs = (
                x["peak_bytes"] - (x["result_bytes"] if self.measure == "extra" else 0)
                for x in (ours, rival)
            )
            return mine / theirs if theirs > 0 else None
        # Where both could be replayed from a CUDA graph, an op is judged by the device's time.
        key = "device" if "device" in ours and "device" in rival else "wall"
        if key not in ours or key not in rival:
            return None
        ratio = float(rival[key]["median_s"] / ours[key]["median_s"])
        return ratio if self.measure == "speedup" else 1 / ratio


@dataclass
class Case:
    """One row of the registry.

    Attributes:
        name: Of the case.
        what: Shapes and what is counted, in words.
        contestants: Each does the whole work, forward and backward, and returns the values and
            gradients. One named "library" is ours.
        reference: Whose values are right.
        tolerance: Of the largest entry of each output.
        bytes: That have to be moved at the least, for forward and backward together.
        bytes_how: Of what these are the sum.
        flops: Likewise.
        flops_how: Likewise.
        bars: What ours has to reach.
        graphs: Those that on a GPU are also replayed from a CUDA graph, which leaves the device's
            time alone; not those that make the host wait.
    """

    name: str
    what: str
    contestants: dict[str, Work]
    reference: str
    tolerance: float
    bytes: int
    bytes_how: str
    flops: int
    flops_how: str
    bars: list[Bar]
    graphs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each contestant, and bounds on its repetitions."""

    seconds: float = 10.0
    least: int = 5
    most: int = 50


QUICK = Effort(seconds=0.05, least=2, most=3)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(times: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_s": median, "quartiles_s": [low, high], "repetitions": len(times)}


# Seconds below which a contestant runs once more before its turn counts: its own memory is in the
# cache then, not that of the contestant before it.
_BRIEF = 0.02


def take_turns(
    contestants: Mapping[str, Callable[[], object]], device: torch.device, effort: Effort
) -> dict[str, dict[str, Any]]:
    """Seconds of each, measured in turns, so that a busy moment hits all of them.

    Slow ones run fewer times, spread over the rounds. On a GPU a turn is several calls between two
    synchronisations, so that the host runs ahead as it does in training.
    """

    def once(work: Callable[[], object], calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        return (time.perf_counter() - started) / calls

    calls, wanted, brief = {}, {}, set()
    for name, work in contestants.items():
        took = once(work, 1)  # warms up; compilers have compiled by now
        if took < effort.seconds:
            took = max(once(work, 1), 1e-7)
        if took < _BRIEF:
            brief.add(name)
        calls[name] = 1 if device.type == "cpu" else max(1, min(50, int(5e-3 / took)))
        turns = int(effort.seconds / (took * calls[name]))
        wanted[name] = max(effort.least, min(effort.most, turns))
    rounds = max(wanted.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for turn in range(1, rounds + 1):
            for name, work in contestants.items():
                if turn * wanted[name] // rounds > len(times[name]):
                    if name in brief:
                        work()
                    times[name].append(once(work, calls[name]))
    finally:
        gc.enable()
    return {name: spread(taken) for name, taken in times.items()}


def peak_memory(work: Work, device: torch.device) -> dict[str, int]:
    """Bytes that one run holds at once beyond what was there before, results included.

    On a GPU the caching allocator counts. On the CPU torch's profiler reports every allocation and
    release of torch's allocator, those inside fused and compiled kernels too; the sum of both over
    time has a peak. What libraries below torch take for themselves is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
            results = work()
        events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        held = peak = 0
        for _, change in sorted(changes, key=lambda each: each[0]):
            held += change
            peak = max(peak, held)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return {"peak_bytes": peak, "result_bytes": sum(storages.values())}


def replayed(work: Work, device: torch.device) -> Callable[[], object]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize(device)
    return graph.replay


def difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest error of any output, relative to that output's largest entry."""
    if len(mine) != len(theirs):
        raise ValueError(f"expected {len(theirs)} outputs, but got {len(mine)}")
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"expected the shape {tuple(b.shape)}, but got {tuple(a.shape)}")
        if not b.numel():
            continue
        gap = float((a.detach() - b.detach()).abs().max())
        worst = max(worst, gap / max(float(b.detach().abs().max()), 1e-12))
        if gap != gap:
            return float("inf")
    return worst


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def copying(like: Tensor) -> dict[str, Callable[[], object]]:
    source, target = like.detach().clone(), torch.empty_like(like)
    return {COPY: lambda: target.copy_(source), FRESH: source.clone}


def run_case(
    case: Case, device: torch.device, effort: Effort, largest: Tensor, *, judged: bool = True
) -> dict[str, Any]:
    """The gate, the peaks, the times and the bars of one case; `largest` is what the copy copies.

    `form` in the result is the one in which the library's ops ran.
    """
    say(f"{case.name}: {case.what}")
    expected = case.contestants[case.reference]()
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Work] = {}
    for name, work in case.contestants.items():
        try:
            gap = difference(work(), expected)
            gate = gap <= case.tolerance
            rows[name] = {"difference": gap, "gate": gate, **peak_memory(work, device)}
            running[name] = work
        except Exception as error:  # a rival that cannot run here is a result, too
            rows[name] = {"failed": first_line(error)}
            say(f"  {name} failed: {rows[name]['failed']}")
    del expected
    timed = take_turns({**running, **copying(largest)}, device, effort)
    copied, fresh = timed.pop(COPY), timed.pop(FRESH)
    for name, times in timed.items():
        rows[name]["wall"] = times
    if device.type == "cuda" and case.graphs:
        graphs = {}
        for name, work in ((name, running[name]) for name in case.graphs if name in running):
            try:
                graphs[name] = replayed(work, device)
            except Exception as error:
                rows[name]["no_graph"] = first_line(error)
                torch.cuda.synchronize(device)
        timed = take_turns({**graphs, **copying(largest)}, device, effort)
        copied, fresh = timed.pop(COPY), timed.pop(FRESH)
        for name, times in timed.items():
            rows[name]["device"] = times
        del graphs
    bandwidth = 2 * largest.nbytes / copied["median_s"]
    for row in rows.values():
        if "wall" in row:
            seconds = row.get("device", row["wall"])["median_s"]
            row["of_copy_bandwidth"] = case.bytes / seconds / bandwidth
            row["gflops"] = case.flops / seconds / 1e9
    result: dict[str, Any] = {
        "name": case.name,
        "what": case.what,
        "form": backend(largest),
        "reference": case.reference,
        "tolerance": case.tolerance,
        "bytes": case.bytes,
        "bytes_how": case.bytes_how,
        "flops": case.flops,
        "flops_how": case.flops_how,
        "copy": {
            **copied,
            "bytes_per_s": bandwidth,
            "map_bytes": largest.nbytes,
            "fresh_bytes_per_s": 2 * largest.nbytes / fresh["median_s"],
        },
        "contestants": rows,
        "gate": LIBRARY in running and all(row.get("gate", True) for row in rows.values()),
    }
    if "of_copy_bandwidth" in rows.get(LIBRARY, {}):
        result["times_copy"] = 1 / rows[LIBRARY]["of_copy_bandwidth"]
    result["bars"] = [bar.judge(result, device.type if judged else None) for bar in case.bars]
    return result
