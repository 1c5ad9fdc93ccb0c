"""Medians, spread and ratios of collected results, as Markdown. Measures nothing."""

from collections.abc import Callable

from benchmarks.figures import MAX_FOREIGN_CPUS, Figure, Results, Spread, must_reach, spread


def _steps(body: str, layout: str) -> Callable[[Results], Spread | None]:
    def find(results: Results) -> Spread | None:
        points = [one for one in results.get("steps", []) if (one["body"], one["layout"]) == (body, layout)]
        return spread(pair["ours_s"] / pair["plain_s"] for point in points for pair in point["pairs"])

    return find


def _start(side: str) -> Callable[[Results], Spread | None]:
    return lambda results: spread(one[f"{side}_s"] for one in results.get("start", []) if not one["is_first"])


def _has_cpu(pair: dict[str, float], *names: str) -> bool:
    """Whether a pair has these CPU times; a turn in which a rank ended has none, or a negative one."""
    return all(pair.get(name, 0.0) > 0 for name in names)


def _text(find: Callable[[dict[str, float]], float]) -> Callable[[Results], Spread | None]:
    return lambda results: spread(find(pair) for pair in results.get("text", []))


def _text_time(results: Results) -> Spread | None:
    return spread(pair["ours_s"] / pair["plain_s"] for one in results.get("text", []) for pair in one["pairs"])


def _overhead(results: Results) -> Spread | None:
    pairs = results.get("checkpoints", {}).get("pairs", [])
    return spread(100 * (pair["with_s"] / pair["without_s"] - 1) for pair in pairs)


def _saving(find: Callable[[dict[str, float]], float]) -> Callable[[Results], Spread | None]:
    return lambda results: spread(map(find, results.get("checkpoints", {}).get("saving", {}).get("rounds", [])))


def _read(results: Results) -> Spread | None:
    found = results.get("checkpoints", {}).get("saving", {}).get("read_per_needed", {})
    return spread(one["ratio"] for one in found.values())


FIGURES = (
    *(Figure(f"step time against a plain torchrun script, {body}, {layout}, 2 ranks", 1.02, 1.0, _steps(body, layout), is_upper_bound=True) for body in ("mlp", "decoder") for layout in ("ddp", "fsdp2")),
    Figure("command to first step on a running cluster, 2 ranks", 12, 7, _start("ours"), is_upper_bound=True, unit=" s"),
    Figure("characters of a text, validation loss", 1.90, 1.85, _text(lambda pair: pair["ours_loss"]), is_upper_bound=True),
    Figure("the same, 2,000 steps against one file of PyTorch", 1.0, 1.0, _text_time, is_upper_bound=True),
    Figure("resnet18 on images, 3 epochs, 2 ranks: test accuracy", 0.97, 0.985, lambda results: spread(one["accuracy"] for one in results.get("images", []))),
    Figure("a Llama-shaped model against a script in torchtitan's order, step time", 1.0, 0.9, lambda results: spread(pair["ours_s"] / pair["plain_s"] for pair in results.get("titan", {}).get("pairs", [])), is_upper_bound=True),
    Figure("overhead of a checkpoint every 50 steps", 3.5, 1.0, _overhead, unit=" %", is_upper_bound=True),
    Figure("step stall of a save in the background against one that is waited for", 0.1, 1 / 30, _saving(lambda one: one["stall_s"] / one["waited_s"]), is_upper_bound=True),
    Figure("save bandwidth against writing and fsyncing random bytes, whichever of two ways is faster", 0.8, 0.95, _saving(lambda one: min(one["disk_s"].values()) / one["waited_s"])),
    Figure("bytes read against bytes needed when resharding", 1.1, 1.0, _read, is_upper_bound=True),
)  # fmt: skip
"""What must be reached, in the order it is shown."""


def markdown(results: Results) -> str:
    """The table, with machine, versions and date."""
    return "\n\n".join(part for part in (_head(results), must_reach(FIGURES, results), _notes(results)) if part) + "\n"


def _head(results: Results) -> str:
    machine, settings = results.get("machine", {}), results.get("settings", {})
    versions = ", ".join(f"{name} {text}" for name, text in results.get("versions", {}).items())
    return (
        f"{results.get('date', '')}; {machine.get('cpus', '?')} CPUs ({machine.get('cpu', '?')}), one thread per rank; "
        f"up to {settings.get('pairs', '?')} pairs in turns, median (least–greatest).\nVersions: {versions}."
    )


def _notes(results: Results) -> str:
    notes = []
    for side, what in (("plain", "torchrun and the plain script"), ("bare_ray", "bare Ray Train")):
        if found := _start(side)(results):
            notes.append(f"- command to first step: {what} {found.text(lambda value: f'{value:.1f} s')}")
    notes += [
        f"- first run on its cluster: {one['ours_s']:.1f} s" for one in results.get("start", []) if one["is_first"]
    ]
    if plain := _text(lambda pair: pair["plain_loss"])(results):
        notes.append(f"- one file of PyTorch, validation loss: {plain.text(lambda value: f'{value:.3f}')}")
    titan = [{"body": "decoder", "layout": "torchtitan's order", **results["titan"]}] if "titan" in results else []
    text = [{"body": "characters", "layout": "one process", **one} for one in results.get("text", [])]
    for point in results.get("steps", []) + titan + text:
        pairs = point["pairs"]
        both = [spread(pair[side] for pair in pairs) for side in ("ours_s", "plain_s")]
        shown = " / ".join(one.text(lambda value: f"{1000 * value:.1f}") if one else "-" for one in both)
        notes.append(f"- {point['body']}, {point['layout']}, {len(pairs)} pairs: ms a step, ours / plain: {shown}")
        counted = [pair for pair in pairs if _has_cpu(pair, "ours_cpu_s", "plain_cpu_s")]
        used = [spread(1000 * pair[side] for pair in counted) for side in ("ours_cpu_s", "plain_cpu_s")]
        ratio = spread(pair["ours_cpu_s"] / pair["plain_cpu_s"] for pair in counted)
        if lost := sum("ours_cpu_s" in pair for pair in pairs) - len(counted):
            notes.append(f"- {point['body']}, {point['layout']}: {lost} pairs without a CPU time are left out of it")
        if ratio and used[0] and used[1]:
            notes.append(
                f"- {point['body']}, {point['layout']}: ms of CPU a step and rank, ours / plain: "
                f"{used[0].median:.1f} / {used[1].median:.1f}, ratio {ratio.text(lambda value: f'{value:.3g}')}"
            )
    saves = results.get("checkpoints", {}).get("pairs", [])
    counted = [one for one in saves if _has_cpu(one, "with_cpu_s", "without_cpu_s")]
    if lost := sum("with_cpu_s" in one for one in saves) - len(counted):
        notes.append(f"- a checkpoint every 50 steps: {lost} pairs without a CPU time are left out of it")
    if cost := spread(100 * (one["with_cpu_s"] / one["without_cpu_s"] - 1) for one in counted):
        notes.append(
            f"- a checkpoint every 50 steps, CPU time of the ranks: {cost.text(lambda value: f'{value:.1f} %')} more"
        )
    if slower := _saving(lambda one: 1000 * one["slower_s"])(results):
        notes.append(
            f"- a step of 250 ms computes longer beside a save by: {slower.text(lambda value: f'{value:.0f} ms')}"
        )
    if (busy := results.get("foreign_cpus", 0.0)) > MAX_FOREIGN_CPUS:
        notes.append(f"- NOT TO BE TRUSTED: other programs used up to {busy:.1f} CPUs meanwhile")
    return "\n".join(notes)
