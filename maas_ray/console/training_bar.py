"""A progress bar of a training, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from maas_ray.console.output import say


@contextmanager
def training_bar(run: str) -> Iterator[Callable[[Any], None]]:
    """Shows a progress bar during the block; yields the function to call with each progress report."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=say) as bar:
        task = bar.add_task(run, total=None, note="starting workers")

        def show(progress: Any) -> None:
            metrics = {"loss": progress.loss, **progress.metrics}
            shown = " ".join(f"{name} {value:.3g}" for name, value in metrics.items() if value is not None)
            note = f"step {progress.step}/{progress.total_steps} {shown}{_speed(progress)}".rstrip()
            bar.update(task, completed=progress.step, total=progress.total_steps, note=note)

        yield show


def _speed(progress: Any) -> str:
    if progress.samples_per_s is None:
        return ""
    rate, unit = (progress.tokens_per_s, "tokens") if progress.tokens_per_s else (progress.samples_per_s, "samples")
    share = f" mfu {progress.mfu:.1%}" if progress.mfu is not None else ""
    return f" {rate:,.0f} {unit}/s{share}"
