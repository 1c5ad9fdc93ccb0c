"""Medians, spread and ratios of collected results, as Markdown. Measures nothing."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.figures import MAX_FOREIGN_CPUS, Figure, Results, Spread, median_interval, must_reach, spread
from benchmarks.serving.commits import PREFIX

Point = dict[str, Any]


def ratios(point: Point, key: str = "per_s") -> Spread | None:
    """Ours divided by the peer's in each pair; the median of ratios, not the ratio of medians."""
    ours, peer = point["ours"], point["peer"]
    return spread(pair[ours][key] / pair[peer][key] for pair in point["pairs"] if pair[peer].get(key))


def absolute(point: Point, side: str, key: str) -> Spread | None:
    """Figures of one side over all pairs."""
    return spread(pair[side][key] for pair in point["pairs"] if pair[side].get(key) is not None)


def faults(point: Point) -> dict[str, int]:
    """Failed requests and wrong answers by side; empty if there were none."""
    found = {
        side: sum(pair[side].get("failed", 0) + pair[side].get("wrong", 0) for pair in point["pairs"])
        for side in (point["ours"], point["peer"])
    }
    return {side: count for side, count in found.items() if count}


def _points(
    results: Results, workload: str, peers: Iterable[str], clients: int | None, ours: str = "maas"
) -> list[Point]:
    names = set(peers)
    return [
        point
        for point in results["points"]
        if (point["workload"], point["ours"]) == (workload, ours)
        and point["peer"] in names
        and clients in (None, point["clients"])
        and point["pairs"]
    ]


def _against(
    workload: str, *peers: str, clients: int | None, key: str = "per_s", ours: str = "maas"
) -> Callable[[Results], Spread | None]:
    """The ratio against the best of `peers`, or, for a latency, against the only one."""

    def find(results: Results) -> Spread | None:
        found = [ratios(point, key) for point in _points(results, workload, peers, clients, ours)]
        return min((one for one in found if one), key=lambda one: one.median, default=None)

    return find


def _cost(clients: int, sketch: str, ours: str) -> Callable[[Results], Spread | None]:
    def find(results: Results) -> Spread | None:
        found = _against("tiny", sketch, clients=clients, ours=ours)(results)
        return found and Spread(1 - found.median, 1 - found.greatest, 1 - found.least, found.count)

    return find


def _lone(results: Results) -> Spread | None:
    run_s = results.get("engine_run_s")
    times = [
        pair["maas"]["p50_s"] - run_s
        for point in _points(results, "tiny", {point["peer"] for point in results["points"]}, 1)
        for pair in point["pairs"]
        if run_s is not None
    ]
    return spread(times)


def _overload(find: Callable[[dict[str, Any], str], float | None], factor: int) -> Callable[[Results], Spread | None]:
    def find_all(results: Results) -> Spread | None:
        rounds = results.get("overload", {}).get("rounds", [])
        return spread(value for one in rounds if (value := find(one, str(factor))) is not None)

    return find_all


def _goodput(one: dict[str, Any], factor: str) -> float:
    return float(one[factor]["goodput_per_s"] / one["peak_per_s"])


def _fast_refusals(one: dict[str, Any], factor: str) -> float | None:
    found = one[factor]
    refused = found["refused"] + found["refused_bare"]
    return float(found["refused_within_50_ms"] * found["refused"] / refused) if refused else None


def _memory(results: Results) -> Spread | None:
    found = results.get("memory")
    return None if found is None else spread([found["rss_bytes"]])


KEPT = 0.97
"""Of the other commit's requests per second: what a change may cost."""
_PYTHON_PEERS = ("mlserver", "mlserver-plain", "litserve", "bentoml")
FIGURES = (
    *(Figure(f"tiny JSON, req/s against Triton, {n} clients", 1.2, 2.0, _against("tiny", "triton", clients=n)) for n in (1, 32, 128)),
    Figure("tiny JSON against stock Ray Serve, 128 clients", 60, 120, _against("tiny", "ray", clients=128)),
    *(Figure(f"tiny JSON against the best of MLServer, LitServe, BentoML, {n} clients", 3, 6, _against("tiny", *_PYTHON_PEERS, clients=n)) for n in (1, 32, 128)),
    Figure("tiny JSON against bare uvicorn + onnxruntime, 32 clients (HAProxy on our side only)", 0.9, 1.2, _against("tiny", "uvicorn", clients=32)),
    *(Figure(f"mid MLP, 7 KB JSON, against Triton, {n} clients", 1.2, 1.7, _against("mid", "triton", clients=n)) for n in (32, 128)),
    Figure("602 KB binary image, MB/s against Triton, 8 clients", 1.2, 1.6, _against("image", "triton", clients=8)),
    Figure("1 to 16 JSON rows against Triton, 32 clients", 1.2, 1.7, _against("mixed", "triton", clients=32)),
    Figure("encoder, rows/s against raw onnxruntime at its best batch", 0.85, 0.95, _against("encoder", "raw", clients=None)),
    Figure("lone request, p50 minus engine run", 0.4e-3, 0.15e-3, _lone, is_upper_bound=True, scale=1e3, unit=" ms"),
    Figure("tiny JSON, p99 against Triton's, 32 clients", 1.3, 0.9, _against("tiny", "triton", clients=32, key="p99_s"), is_upper_bound=True),
    *(Figure(f"goodput of peak at {factor} x capacity", 0.9, 0.97, _overload(_goodput, factor)) for factor in (2, 10)),
    *(Figure(f"refusals with Retry-After within 50 ms at {factor} x capacity", 0.9, 0.97, _overload(_fast_refusals, factor)) for factor in (2, 10)),
    Figure("replica's resident memory", 300e6, 200e6, _memory, is_upper_bound=True, scale=1e-6, unit=" MB"),
    *(Figure(f"cost of every duty against the bare sketch, {n} clients", 0.15, 0.05, _cost(n, "sketch-replica", "maas"), is_upper_bound=True) for n in (1, 32, 128)),
    *(Figure(f"the same without HAProxy and Ray, {n} clients", 0.15, 0.05, _cost(n, "sketch", "maas-direct"), is_upper_bound=True) for n in (1, 32, 128)),
)  # fmt: skip
"""What must be reached, in the order it is shown."""


def markdown(results: Results) -> str:
    """Both tables, with machine, versions and date."""
    parts = [_head(results), *_commits(results), must_reach(FIGURES, results), _absolutes(results), *_notes(results)]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    machine, settings = results.get("machine", {}), results.get("settings", {})
    versions = {name: text for group in results.get("versions", {}).values() for name, text in group.items()}
    hidden = ("numpy", "orjson", "uvloop", "httptools", "pysimdjson")
    versions = {"maas-ray": results.get("maas_ray", "?")} | dict(sorted(versions.items()))
    shown = ", ".join(f"{name} {text}" for name, text in versions.items() if name not in hidden)
    return (
        f"{results.get('date', '')}; {machine.get('cpus', '?')} CPUs ({machine.get('cpu', '?')}) for the server and "
        f"the load together; {settings.get('load', '?')}; one engine thread each; {settings.get('pairs', '?')} pairs of "
        f"{settings.get('seconds') or 'at least 4'} s, median (least–greatest).\nVersions: {shown}."
    )


def _commits(results: Results) -> list[str]:
    """What a change did to the speed: one line for each point that was measured against another commit."""
    points = [point for point in results["points"] if point["peer"].startswith(PREFIX) and point["pairs"]]
    if not points:
        return []
    revisions = results.get("revisions", {})
    lines = [
        f"Ours is {revisions.get('maas', '?')}. Median of the pairs' ratios, in brackets where the true median is with a "
        f"probability of 95 %; kept: requests per second {KEPT:g} or more, CPU time a request {1 / KEPT:.2f} or less.",
        "",
        "| workload | clients | other | ours req/s | req/s, ours / other | CPU time a request, ours / other | |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        side = point["peer"]
        speed, cost = ([pair["maas"][key] / pair[side][key] for pair in point["pairs"]] for key in ("per_s", "cpu_us"))
        is_kept = statistics.median(speed) >= KEPT and statistics.median(cost) <= 1 / KEPT
        cells = [point["workload"], str(point["clients"]), f"{side.removeprefix(PREFIX)} ({revisions.get(side, '?')})"]
        cells.append(_shown(absolute(point, "maas", "per_s"), lambda value: f"{value:,.0f}"))
        for found in (speed, cost):
            low, high = median_interval(found)
            cells.append(f"{statistics.median(found):.3f} ({low:.3f}–{high:.3f})")
        lines.append(f"| {' | '.join(cells)} | {'kept' if is_kept else 'NOT KEPT'} |")
    return ["\n".join(lines)]


def _absolutes(results: Results) -> str:
    lines = [
        "| workload | clients | ours | peer | ours req/s | peer req/s | ratio | ours p50 / p99 ms | peer p50 / p99 ms | CPU µs a request, ours / peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in results["points"]:
        if not point["pairs"]:
            continue
        cells = [point["workload"], str(point["clients"]), point["ours"], point["peer"]]
        sides = (point["ours"], point["peer"])
        cells += [_shown(absolute(point, side, "per_s"), lambda value: f"{value:,.0f}") for side in sides]
        cells.append(_shown(ratios(point), lambda value: f"{value:.2f}"))
        for side in sides:
            times = [absolute(point, side, key) for key in ("p50_s", "p99_s")]
            cells.append(" / ".join(f"{1000 * one.median:.2f}" if one else "-" for one in times))
        cpu = [absolute(point, side, "cpu_us") for side in sides]
        cells.append(" / ".join(f"{one.median:.0f}" if one else "-" for one in cpu))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _notes(results: Results) -> list[str]:
    notes = []
    for point in results["points"]:
        for side, count in faults(point).items():
            notes.append(
                f"- {point['workload']}, {point['clients']} clients: {side} failed or answered wrongly {count} times"
            )
    stolen = [
        one.get("stolen_cpus", 0.0) for point in results["points"] for pair in point["pairs"] for one in pair.values()
    ]
    if stolen and max(stolen) > MAX_FOREIGN_CPUS:
        notes.append(
            f"- the host took {statistics.median(stolen):.2f} (at most {max(stolen):.2f}) CPUs away from this machine while it "
            "was measured: CPU time per request says more than requests per second"
        )
    if (busy := max((point.get("foreign_cpus", 0.0) for point in results["points"]), default=0.0)) > MAX_FOREIGN_CPUS:
        notes.append(f"- NOT TO BE TRUSTED: other programs used up to {busy:.1f} CPUs while this was measured")
    if memory := results.get("memory"):
        torch = "torch mapped" if memory["has_torch"] else "torch not mapped"
        notes.append(
            f"- replica: {memory['rss_bytes'] / 1e6:.0f} MB resident, {memory['uss_bytes'] / 1e6:.0f} MB its own, {torch}"
        )
    if starts := results.get("starts_s"):
        notes.append("- seconds to ready: " + ", ".join(f"{name} {value:.1f}" for name, value in starts.items()))
    return ["\n".join(notes)] if notes else []


def _shown(found: Spread | None, format_one: Callable[[float], str]) -> str:
    return found.text(format_one) if found else "-"
