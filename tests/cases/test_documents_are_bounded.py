"""YAML alias bombs (over 40 s), deep YAML, integers of 5,000 digits and values that contain themselves ended in
untyped errors or had no limit; so did `--port 99999`. Each is a typed error, in little time and memory.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.cluster import choose_ports
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import SpecError
from maas_ray.foreign.documents import MAX_DEPTH, MAX_NODES, Malformed, read_json, read_yaml
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import MAX_SPEC_BYTES, Spec, load_spec, parse_spec
from maas_ray.train.spec.train import TrainSpec

SPECS: tuple[type[Spec], ...] = (DataSpec, TrainSpec, ServeSpec)
SOON_S = 30
"""Generous for a busy machine; the bombs took over 40 s on an idle one, or never ended."""


def bomb(levels: int = 9, width: int = 9, item: str = "lol", merge: bool = False) -> str:
    """An alias of aliases of aliases: `width ** levels` values in a few hundred bytes."""
    if merge:
        lines = [f"a0: &a0 {{k: {item}}}"]
        lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, levels + 1)]
    else:
        lines = [f"a0: &a0 [{', '.join([item] * width)}]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


def chain(levels: int) -> str:
    """Each value holds the one before: deep only after aliases."""
    return "\n".join(["- &a0 [x]", *(f"- &a{i} [*a{i - 1}]" for i in range(1, levels))])


BAD = {
    "alias bomb": bomb(),
    "alias bomb in mappings": bomb(merge=True),
    "alias bomb of flow mappings": bomb(8, 12, "{x: 1}"),
    "wide alias": "a: &a [" + "x, " * 2000 + "]\nb: [" + "*a, " * 2000 + "]",
    "one long text many times": f"a: &a {'x' * 100_000}\nb: [" + "*a, " * 150_000 + "]",
    "depth of lists": "[" * 100_000 + "]" * 100_000,
    "depth of unclosed lists": "[" * 500_000,
    "depth of mappings": "{a: " * 100_000,
    "depth of blocks": "\n".join(" " * i + "a:" for i in range(1000)),
    "depth of dashes": "- " * 100_000 + "x",
    "depth by aliases": chain(1000),
    "a list that holds itself": "a: &a [*a]",
    "a mapping that holds itself": "&a {b: *a}",
    "a value that holds itself far below": "&a {b: {c: [1, {d: *a}]}}",
    "a merge of itself": "&a {<<: *a, b: 1}",
    "an alias of nothing": "a: *nobody",
    "integer of 5,000 digits": "seed: " + "9" * 5000,
    "negative integer of 500,000 digits": "seed: -" + "9" * 500_000,
    "hexadecimal of 500,000 digits": "seed: 0x" + "f" * 500_000,
    "octal of 500,000 digits": "seed: 0" + "7" * 500_000,
    "binary of 500,000 digits": "seed: 0b" + "1" * 500_000,
    "sexagesimal of 300,000 digits": "seed: 1" + ":59" * 300_000,
    "sexagesimal fraction": "seed: 1" + ":59" * 300_000 + ".5",
    "float of 500,000 digits": "seed: 1." + "9" * 500_000,
    "a wrong tag of an integer": "seed: !!int hello",
    "a wrong tag of a float": "seed: !!float hello",
    "a wrong tag of a boolean": "seed: !!bool maybe",
    "a wrong tag of a date": "seed: !!timestamp soon",
    "a date that is none": "seed: 2026-99-99",
    "bytes that are none": "seed: !!binary '=='",
    "a tag of Python": "seed: !!python/object/apply:os.system [true]",
    "a key that is a list": "? [a, b]\n: 1",
    "a key that is a date": "2026-01-01: 1",
    "two documents": "a: 1\n---\na: 2",
    "more values than are read": "a: [" + "1," * (MAX_NODES + 1) + "]",
    "a zero byte": "a: \0",
    "not UTF-8": "a: \udcff",
    "a list": "[1, 2]",
    "a text": "hello",
    "nothing": "",
    "too many bytes": "a: " + "x" * MAX_SPEC_BYTES,
    "5,000 unknown keys": "\n".join(f"k{i}: 1" for i in range(5_000)),
    "a key of 500,000 characters": "x" * 500_000 + ": 1",
}


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Counting 100,000 values takes a second."""
    return (pytest.mark.fault,) if name == "more values than are read" else ()


@pytest.mark.parametrize(("kind", "name"), [(SPECS[number % 3], name) for number, name in enumerate(BAD)])
def test_a_hostile_spec_is_a_typed_error_soon(tmp_path: Path, kind: type[Spec], name: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(BAD[name].encode("utf-8", "surrogateescape"))
    started_s = time.monotonic()
    with pytest.raises(SpecError) as caught:
        load_spec(kind, path)
    assert time.monotonic() - started_s < SOON_S
    assert len(str(caught.value)) < 10_000, "the message does not repeat the file"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=_marks(name))
        for name in BAD
        if name not in ("not UTF-8", "a text", "nothing", "two documents")
    ],
)
def test_a_hostile_value_of_set_is_a_typed_error_soon(name: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(SpecError) as caught:
        parse_spec(DataSpec, {"uri": "x", "task": "regression"}, [f"split.seed={BAD[name]}"])
    assert time.monotonic() - started_s < SOON_S
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "override", ["", "=", "=1", "seed", "a" * 100_000 + "=1", ".".join(["a"] * 50_000) + "=1", "." * 1000 + "=1", "uri.x=1"]
)  # fmt: skip
def test_an_override_that_is_none_is_a_typed_error(override: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(DataSpec, {"uri": "x", "task": "regression"}, [override])
    assert len(str(caught.value)) < 10_000


def holds_itself() -> object:
    value: list[object] = []
    value.append(value)
    return value


def deep() -> object:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("make", [holds_itself, deep, lambda: {("a", "b"): 1}, lambda: 10**5000])
def test_a_malformed_document_is_a_typed_error(make: Callable[[], object]) -> None:
    with pytest.raises(SpecError):
        parse_spec(DataSpec, {"uri": "x", "task": "regression", "split": make()})


@pytest.mark.parametrize(
    "text",
    ["[" * 1_000_000, "{\"a\":" * 100_000, "9" * 5000, "[" + "-" + "9" * 1_000_000 + "]", "", "nan?", b"\xff\xfe\x00", b"\xff"],
)  # fmt: skip
def test_a_hostile_json_text_is_malformed(text: str | bytes) -> None:
    with pytest.raises(Malformed):
        read_json(text)


def test_what_people_write_is_read_as_before() -> None:
    text = """
    base: &base {lr: 0.1, betas: [0.9, 0.999]}
    run: {<<: *base, lr: 1e-3, names: [a, "b", 'c'], date: 2026-01-02, on: true, none: ~, big: 18446744073709551615}
    text: |
      two
      lines
    twice: [*base, *base]
    """
    found = read_yaml(text)
    assert found["run"]["betas"] == [0.9, 0.999]
    assert found["run"]["big"] == 2**64 - 1
    assert found["twice"] == [found["base"]] * 2
    assert found["text"] == "two\nlines\n"
    features = "\n".join(f"- column_{i}" for i in range(MAX_NODES // 2))
    assert len(read_yaml(features)) == MAX_NODES // 2
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert read_yaml(deep) is not None


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/zero")])
def test_a_spec_is_a_regular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        load_spec(DataSpec, tmp_path / "spec.yaml")


@pytest.mark.parametrize("port", [-1, 65536, 99999, 10**30])
def test_a_number_that_is_not_a_port_is_a_typed_error(port: int, tmp_path: Path) -> None:
    for options in ({"http": port}, {"dashboard": port}):
        with pytest.raises(SpecError, match="must be from 1 to 65535"):
            choose_ports(**options)
    for option in ("--port", "--dashboard-port"):
        result = CliRunner().invoke(app, ["up", f"{option}={port}", "--state-dir", str(tmp_path)])
        assert result.exit_code == 1
        assert "error[spec_invalid]" in result.stderr, result.stderr
