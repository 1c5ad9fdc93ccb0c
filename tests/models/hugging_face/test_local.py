"""Untrusted folders in Hugging Face's format: every reader rejects paths that lead outside."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from maas_ray.errors import ModelError
from maas_ray.models.hugging_face.folder import HfFolder
from maas_ray.models.hugging_face.local import MAX_JSON_BYTES, check_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models--a--b" / "snapshots" / "0123"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": torch.arange(6.0).view(2, 3)}, path / "model.safetensors")
    return path


def _deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def _large(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)


def _long_number(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")


def _pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _link(folder: Path) -> None:
    secret = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    (folder / "model.safetensors").symlink_to(secret)


def _broken_link(folder: Path) -> None:
    (folder / "other.safetensors").symlink_to("other.safetensors")


def _blobs_elsewhere(folder: Path) -> None:
    outside = folder.parent.parent.parent / "outside"
    outside.mkdir()
    (folder / "config.json").rename(outside / "c")
    (folder.parent.parent / "blobs").symlink_to(outside)
    (folder / "config.json").symlink_to("../../blobs/c")


def _index(document: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_deep, "nested too deep"),
        (_large, "the limit is"),
        (_long_number, "digits"),
        (_pipe, "not a regular file"),
        (_link, "outside the folder"),
        (_broken_link, "is a broken link"),
        (_blobs_elsewhere, "outside the folder"),
        (_index({"weight_map": {"w": "../../x.safetensors"}}), "only files in the same folder"),
        (_index({"weight_map": {"w": ["x"]}}), "no weight_map"),
        (_index([]), "contains a list; expected an object"),
    ],
)
def test_a_folder_that_leads_astray_is_refused(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=message):
        HfFolder(str(folder))
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_links_inside_the_folder_and_of_the_cache_are_followed(folder: Path) -> None:
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / f"of-{name}")
        (folder / name).symlink_to(f"../../blobs/of-{name}")
    opened = HfFolder(str(folder))
    assert opened.config == {"model_type": "llama"}
    assert torch.equal(opened.read("w", (0, 0), (2, 3)), torch.arange(6.0).view(2, 3))


def _header(folder: Path, header: bytes, size: int = 64) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    "about",
    [
        '{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[1],"data_offsets":[0.0,4.0]}',
        '{"dtype":"F32","shape":[true],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":' + json.dumps([10**3000] * 1000) + ',"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":' + json.dumps([1] * 1000) + ',"data_offsets":[0,4]}',
        '{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[1],"data_offsets":[64,68]}',
        '{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"v":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_header_that_describes_no_file_is_refused(folder: Path, about: str) -> None:
    _header(folder, b'{"w":%b}' % about.encode())
    with pytest.raises(ModelError, match="as safetensors"):
        _ = HfFolder(str(folder)).weights


def test_a_header_is_read_only_up_to_its_limit(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((MAX_JSON_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_JSON_BYTES * 2)
    with pytest.raises(ModelError, match="its header has"):
        _ = HfFolder(str(folder)).weights
