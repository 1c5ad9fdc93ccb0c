"""What is proved and measured, one function per section. Each returns its lines; what it cannot do it raises."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.plain import PlainTraining, build
from benchmarks.gpu.setting import Setting, Size, Trainer, tokens_of
from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import newest_checkpoint, open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.save import Snapshot
from maas_ray.data.spec.features import Features
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.store.objects import open_store
from maas_ray.train.loop.deterministic import use_deterministic_kernels
from maas_ray.train.ranks.throughput_meter import count_flops, peak_tflops
from maas_ray.train.state.restore import MODEL, restore, tensors_of

PREFIX = "checkpoints/gpu"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: what was measured or proved.
        value: as it is shown.
        goal: what must hold; empty: a figure for information.
        is_met: whether it holds; None without a goal, or where the device has no say about it.
        figures: all numbers behind the value.
    """

    name: str
    value: str
    goal: str = ""
    is_met: bool | None = None
    figures: dict[str, Any] | None = None


def step(setting: Setting, precision: str) -> Iterator[Line]:
    """Tokens per second and MFU of the product's loop against plain PyTorch, in turns on the same device."""
    size = setting.large
    with Trainer(setting, size, precision=precision) as ours:
        plain = _plain(setting, size, ours, precision)
        yield _same_logits(ours, plain, setting)
        mine, theirs, cpu_mine, cpu_theirs = [], [], [], []
        ours.advance(2)
        plain.advance(2)
        for _ in range(setting.pairs):
            seconds, cpu_s = _timed(setting, lambda: ours.advance(setting.steps))
            mine.append(setting.steps * size.tokens / seconds)
            cpu_mine.append(cpu_s / setting.steps)
            seconds, cpu_s = _timed(setting, lambda: plain.advance(setting.steps))
            theirs.append(setting.steps * size.tokens / seconds)
            cpu_theirs.append(cpu_s / setting.steps)
        ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
        ratio, rate = statistics.median(ratios), statistics.median(mine)
        parameters = sum(weight.numel() for weight in ours.state.weights)
        yield Line(f"{precision}: parameters", f"{parameters / 1e6:,.0f} M")
        yield Line(
            f"{precision}: tokens/s against plain PyTorch",
            f"{ratio:.3f} ({min(ratios):.3f}–{max(ratios):.3f}); {rate:,.0f} tokens/s",
            "≥ 0.98",
            ratio >= 0.98 if setting.is_gpu else None,
            {"ours": mine, "plain": theirs, "cpu_s_ours": cpu_mine, "cpu_s_plain": cpu_theirs},
        )
        flops, peak = count_flops(ours.spec, ours.features), peak_tflops(ours.spec, setting.device)
        if flops is None:
            raise RuntimeError("the operations of the decoder cannot be counted")
        if peak is None:
            yield Line(f"{precision}: MFU", "the peak of this device is not known")
            return
        mfu = rate / size.seq_len * flops / (peak * 1e12)
        goal = "≥ 45 %" if precision == "bf16" else ""
        yield Line(
            f"{precision}: MFU", f"{100 * mfu:.1f} % of {peak:,.0f} TFLOP/s", goal, mfu >= 0.45 if goal else None
        )


def resume(setting: Setting) -> Iterator[Line]:
    """A run with deterministic kernels, interrupted, saved and restored, ends with the bits of the uninterrupted one."""
    fields = {"deterministic": True, "model": _with_dropout(setting.small)}
    with _deterministic(), tempfile.TemporaryDirectory() as directory:
        with Trainer(setting, setting.small, **fields) as whole:
            whole.advance(8)
            expected = {name: value.cpu().clone() for name, value in tensors_of(whole.state).items()}
        store = open_store(directory)
        with Trainer(setting, setting.small, **fields) as first:
            checkpointer = AsyncCheckpointer(store, PREFIX)
            first.advance(4, lambda done: checkpointer.save(_snapshot(first, done)))
            checkpointer.wait(is_strict=True)
            checkpointer.close()
        second = Trainer(setting, setting.small, **fields)
        committed = open_checkpoint(store, PREFIX, newest_checkpoint(store, PREFIX))
        saved = read_saved(committed)
        restore(second.state, saved.step, read_index(committed), lambda tensors: load_into(committed, tensors))
        second.done = saved.step
        with second:
            second.advance(4)
            found = {name: value.cpu() for name, value in tensors_of(second.state).items()}
        differing = [name for name in expected if not torch.equal(expected[name], found[name])]
        yield Line(
            "resumed run: tensors equal to the uninterrupted one's, bit by bit",
            f"{len(expected) - len(differing)} of {len(expected)}",
            "all",
            not differing,
            {"differing": differing[:5]},
        )
        with Trainer(setting, setting.small, **{**fields, "seed": 1}) as other:
            other.advance(8)
            differs = any(
                not torch.equal(expected[name], value.cpu()) for name, value in tensors_of(other.state).items()
            )
        yield Line("planted: another seed is noticed", "yes" if differs else "no", "yes", differs)


def background_save(setting: Setting) -> Iterator[Line]:
    """How long a save stops the loop, what it costs the steps beside it, and that it stores what was there."""
    with tempfile.TemporaryDirectory() as directory, Trainer(setting, setting.small, precision="bf16") as trainer:
        store = open_store(directory)
        checkpointer = AsyncCheckpointer(store, PREFIX)
        trainer.state.optimizer.register_step_pre_hook(lambda *_: checkpointer.staged())
        trainer.advance(3)
        alone, beside, stalls = [], [], []

        def save(done: int) -> None:
            began_s = time.perf_counter()
            snapshot = _snapshot(trainer, done)
            checkpointer.save(snapshot, steady=snapshot.tensors.keys())
            stalls.append(time.perf_counter() - began_s)

        for _ in range(setting.pairs):
            alone.append(_timed(setting, lambda: trainer.advance(setting.steps))[0])
            trainer.advance(1, save)
            expected = trainer.weights()
            step_saved = trainer.done
            beside.append(_timed(setting, lambda: trainer.advance(setting.steps))[0])
            checkpointer.wait(is_strict=True)
        checkpointer.close()
        stored = read_tensors(open_checkpoint(store, PREFIX, step_saved), MODEL)
        is_equal = all(torch.equal(stored[name], value) for name, value in expected.items())
        size_mb = sum(value.nbytes for value in tensors_of(trainer.state).values()) / 1e6
        yield Line(
            "background save: stall of the loop",
            f"{1000 * statistics.median(stalls):.1f} ms for {size_mb:,.0f} MB",
            figures={"stall_s": stalls},
        )
        yield Line(
            "background save: steps beside it against steps alone",
            f"{statistics.median(b / a for a, b in zip(alone, beside, strict=True)):.2f}",
            figures={"alone_s": alone, "beside_s": beside},
        )
        yield Line("background save: stored weights equal those at the save", str(is_equal), "True", is_equal)


def compiled(setting: Setting) -> Iterator[Line]:
    """Compilation block by block: speed against eager, and that it trains the same to rounding."""
    with (
        Trainer(setting, setting.small, precision="bf16") as eager,
        Trainer(setting, setting.small, precision="bf16", performance={"compile": True}) as fused,
    ):
        began_s = time.perf_counter()
        fused.advance(1)
        setting.wait()
        first_s = time.perf_counter() - began_s
        eager.advance(1)
        ratios = []
        for _ in range(setting.pairs):
            slow = _timed(setting, lambda: eager.advance(setting.steps))[0]
            ratios.append(slow / _timed(setting, lambda: fused.advance(setting.steps))[0])
        worst = max(
            float((one.float() - other.float()).abs().max())
            for one, other in zip(eager.weights().values(), fused.weights().values(), strict=True)
        )
        yield Line("compile: steps/s against eager", f"{statistics.median(ratios):.2f}; first step {first_s:.0f} s")
        limit = 1.1 * 3e-4 * 2 * eager.done  # two runs of AdamW differ by at most the sum of their updates
        yield Line("compile: largest difference of a weight", f"{worst:.1e}", f"≤ {limit:.1e}", worst <= limit)


def activation_memory(setting: Setting) -> Iterator[Line]:
    """Peak memory with and without activation checkpointing, whose values are the same bits."""
    peaks, weights = {}, {}
    with _deterministic():
        for kind in ("none", "selective", "full"):
            fields = {"deterministic": True, "performance": {"activation_checkpointing": kind}}
            with Trainer(setting, setting.small, **fields) as trainer:
                if setting.is_gpu:
                    torch.cuda.reset_peak_memory_stats(setting.device)
                trainer.advance(3)
                setting.wait()
                peaks[kind] = torch.cuda.max_memory_allocated(setting.device) / 1e6 if setting.is_gpu else 0.0
                weights[kind] = trainer.weights()
    for kind in ("selective", "full"):
        same = all(torch.equal(value, weights[kind][name]) for name, value in weights["none"].items())
        yield Line(f"activation checkpointing {kind}: weights equal bit by bit", str(same), "True", same)
        if setting.is_gpu:
            yield Line(
                f"activation checkpointing {kind}: peak memory",
                f"{peaks[kind]:,.0f} of {peaks['none']:,.0f} MB",
                "less",
                peaks[kind] < peaks["none"],
            )


def optimizers(setting: Setting) -> Iterator[Line]:
    """Seconds of an update by implementation, of the same weights with the same gradients."""
    seconds: dict[str, float] = {}
    for kind in ("fused", "foreach", "loop"):
        with Trainer(
            setting, setting.small, optimizer={"name": "adamw", "lr": 3e-4, "implementation": kind}
        ) as trainer:
            trainer.advance(1)
            for weight in trainer.state.weights:
                weight.grad = torch.ones_like(weight)
            times = [_timed(setting, lambda: _several(trainer.state.optimizer.step))[0] for _ in range(setting.pairs)]
            seconds[kind] = statistics.median(times) / UPDATES
    shown = ", ".join(f"{kind} {1000 * value:.2f} ms" for kind, value in seconds.items())
    is_fastest = seconds["fused"] <= 1.05 * min(seconds.values())
    yield Line("optimizer step of AdamW", shown, "fused is fastest", is_fastest if setting.is_gpu else None, seconds)


def collectives(setting: Setting) -> Iterator[Line]:
    """The process group of a run with one rank: the backend starts, computes and ends."""
    backend = "nccl" if setting.is_gpu else "gloo"
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(backend, init_method=f"file://{directory}/meet", rank=0, world_size=1)
        try:
            values = torch.arange(8.0, device=setting.device)
            dist.all_reduce(values)
            gathered = [torch.empty_like(values)]
            dist.all_gather(gathered, values)
            is_right = torch.equal(gathered[0].cpu(), torch.arange(8.0))
            with Trainer(setting, setting.small, precision="bf16") as trainer:
                trainer.advance(2)
            yield Line(f"{backend} with one rank: collectives and two steps", str(is_right), "True", is_right)
        finally:
            dist.destroy_process_group()


def export(setting: Setting) -> Iterator[Line]:
    """A network trained on the device, exported to ONNX on the CPU, computes what it computed on the device."""
    from maas_ray.export.onnx_export import export as to_onnx
    from maas_ray.export.parity import check_parity

    names = [f"x{number}" for number in range(16)]
    columns = [{"kind": "numeric", "name": name} for name in names]
    features = Features.model_validate({"columns": columns, "task": "regression", "target": "y"})
    torch.manual_seed(0)
    net = build_model(ModelSpec.model_validate({"name": "mlp"}), features.row, features.num_outputs).to(setting.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    rows = torch.randn(256, len(names), device=setting.device)
    for _ in range(50):
        optimizer.zero_grad()
        ((net(rows)[:, 0] - rows.sum(1)) ** 2).mean().backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        on_device = net(rows).cpu()
        on_cpu = net.cpu()(rows.cpu())
    graph, _ = to_onnx(net, features)
    report = check_parity(net, features, graph, [column.numpy() for column in rows.cpu().split(1, dim=1)])
    difference = float((on_device - on_cpu).abs().max())
    yield Line("export of a network trained here: gate", f"largest error {report['max_abs_error']:.1e}", "passes", True)
    yield Line("the same network on this device and on the CPU", f"{difference:.1e}", "≤ 1e-2", difference <= 1e-2)


SECTIONS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "resume": resume,
    "collectives": collectives,
    "activations": activation_memory,
    "save": background_save,
    "optimizers": optimizers,
    "export": export,
    "bf16": lambda setting: step(setting, "bf16"),
    "fp32": lambda setting: step(setting, "fp32"),
    "compile": compiled,
}
"""In this order: what proves comes first, what takes long last."""

UPDATES = 5
"""Updates of one timing of an optimizer."""


def _several(update: Callable[[], Any]) -> None:
    for _ in range(UPDATES):
        update()


def _timed(setting: Setting, work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    setting.wait()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    setting.wait()
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def _plain(setting: Setting, size: Size, ours: Trainer, precision: str) -> PlainTraining:
    inner = next(module for name, module in ours.state.parts[0].named_modules() if name.endswith("mlp.gate"))
    model = build(size.layers, size.heads, size.width, inner.weight.shape[0], size.seq_len, size.vocab_size)
    model.load_state_dict(ours.state.parts[0].state_dict())  # strict: the same architecture
    ids, targets = (torch.from_numpy(values) for values in tokens_of(size))
    if setting.is_gpu:
        ids, targets = ids.pin_memory(), targets.pin_memory()
    return PlainTraining(model.to(setting.device), ids, targets, size.rows, precision)


def _same_logits(ours: Trainer, plain: PlainTraining, setting: Setting) -> Line:
    ids = torch.from_numpy(tokens_of(ours.size, 1)[0]).to(setting.device)
    with torch.no_grad():
        mine, theirs = ours.state.parts[0].eval()(ids), plain.model.eval()(ids)
    ours.state.train()
    plain.model.train()
    error = float((mine - theirs).abs().max())
    return Line("the peer is the same network: largest difference of a logit", f"{error:.1e}", "≤ 2e-2", error <= 2e-2)


def _snapshot(trainer: Trainer, done: int) -> Snapshot:
    return Snapshot(step=done, cursor=done * trainer.plan.global_size, tensors=tensors_of(trainer.state))


def _with_dropout(size: Size) -> dict[str, Any]:
    return {
        "name": "decoder",
        "params": {"layers": size.layers, "heads": size.heads, "width": size.width, "dropout": 0.1},
    }


@contextmanager
def _deterministic() -> Iterator[None]:
    use_deterministic_kernels(True)
    try:
        yield
    finally:
        use_deterministic_kernels(False)
