"""Checks the files of a local folder in Hugging Face's format and reads its JSON with limits. Loads no weights.

Such a folder is often untrusted. The readers of weights (ours, safetensors, transformers) open files by names that are
listed in the folder itself.
"""

import os
import stat
from pathlib import Path
from typing import Any

from maas_ray.errors import ModelError
from maas_ray.foreign.documents import Malformed, read_json
from maas_ray.foreign.files import Unreadable, read_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 16 << 20
"""Maximum size of a JSON file and of a weight file's header: enough for 100,000 tensors in one file."""
_READ = (CONFIG, "generation_config.json", "adapter_config.json")
_CACHE = ("snapshots", "blobs")
"""Folders of Hugging Face's cache: a revision consists of links to shared files, which are named by their content."""


def check_folder(folder: Path) -> None:
    """Checks a folder before anything in it is loaded.

    Args:
        folder: an existing directory.

    Raises:
        ModelError: a weight or configuration file is a link to a file outside the folder or not a regular file, JSON
            is malformed or too large, or an index names a file in another folder.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == _CACHE[0]:
        roots.append(root.parent.parent / _CACHE[1])
    for entry in sorted(os.listdir(root)):
        is_json = entry in _READ or entry.endswith(".index.json")
        if not is_json and not entry.endswith(".safetensors"):
            continue
        path = root / entry
        _refuse_outside(path, roots, f"{folder}/{entry}")
        if is_json:
            document = read_object_file(path)
            if entry.endswith(".index.json"):
                files_of_index(document, f"{folder}/{entry}")


def read_object_file(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises `ModelError`: the file does not exist, is malformed or too large."""
    try:
        return read_object(read_file(path, MAX_JSON_BYTES), str(path))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; give a folder that contains it") from error
    except Unreadable as error:
        raise ModelError(f"{path} cannot be read: it {error}") from error


def read_object(data: bytes, source: str) -> dict[str, Any]:
    """Parses the object in a JSON text; `source` is its name in messages. Raises `ModelError`."""
    if len(data) > MAX_JSON_BYTES:
        raise too_large(source, len(data))
    try:
        document = read_json(data)
    except Malformed as error:
        raise ModelError(f"{source} cannot be read: it {error}; copy the whole folder again") from error
    if not isinstance(document, dict):
        raise ModelError(f"{source} contains a {type(document).__name__}; expected an object")
    return document


def files_of_index(document: dict[str, Any], source: str) -> set[str]:
    """The weight files that an index names. Raises `ModelError`: it names none, or one in another folder."""
    by_weight = document.get("weight_map")
    if not isinstance(by_weight, dict) or not all(isinstance(name, str) for name in by_weight.values()):
        raise ModelError(
            f"cannot read {source}: it has no weight_map from weights to files; copy the whole folder again"
        )
    names = set(by_weight.values())
    for name in sorted(names):
        if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise ModelError(f"{source} names the file {name[:120]!r}; only files in the same folder are read")
    return names


def too_large(source: str, size: int) -> ModelError:
    """The error for a JSON text that is too large."""
    return ModelError(f"{source} has {size} bytes; the limit is {MAX_JSON_BYTES} bytes")


def _refuse_outside(path: Path, roots: list[Path], shown: str) -> None:
    try:
        found = path.resolve(strict=True)
        status = found.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
        raise ModelError(f"{shown} is a broken link; copy the file itself into the folder (cp -L)") from error
    if not any(found.is_relative_to(root) for root in roots):
        raise ModelError(
            f"{shown} is a link to a file outside the folder; copy the file itself into the folder (cp -L)"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{shown} is not a regular file")
