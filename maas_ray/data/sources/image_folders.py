"""Finds the images in a directory: one folder per class, or a folder per split that contains one per class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs

from maas_ray.data.sources.files import EXTENSIONS, File, extension_of, filesystem, list_files
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.split import SplitSpec
from maas_ray.errors import DataError

FOLDER = "split folder"
"""Name of the column with the split that the folders give."""
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders, in any case, that are splits if they contain a folder per class."""
MAX_EXAMPLES = 5


@dataclass(frozen=True)
class ImageFolder:
    """The images of a data set, and the files that are left out."""

    files: list[File]
    """Sorted by path."""
    has_splits: bool = False
    """Whether each image is in the folder of its class in the folder of its split."""
    skipped: list[str] = field(default_factory=list)
    """Files that are no images, such as Thumbs.db and README.md, relative to the directory."""
    nested: list[str] = field(default_factory=list)
    """Images in folders inside a class folder, relative to the directory."""

    def report(self) -> dict[str, Any]:
        """The counts for the report of the data set, with some examples."""
        return {
            "images_read": len(self.files),
            "files_skipped": {"no_image": len(self.skipped), "in_nested_folder": len(self.nested)},
            "examples_skipped": [*self.skipped[:MAX_EXAMPLES], *self.nested[:MAX_EXAMPLES]],
        }


def find_images(spec: DataSpec) -> ImageFolder | None:
    """The images that the data URI names; None: it names other files.

    Raises:
        DataError: the URI cannot be accessed, or its folders are no data set of images although the format says so.
    """
    if spec.format not in ("auto", "images"):
        return None
    system, path = filesystem(spec, spec.uri)
    is_pattern = any(sign in path for sign in "*?[")
    try:
        if is_pattern or system.get_file_info(path).type != fs.FileType.Directory:
            return _of_files(spec, list_files(spec))
        top = system.get_file_info(fs.FileSelector(path))
        loose = [entry for entry in top if entry.type == fs.FileType.File]
        if spec.format == "auto" and any(_is_other_data(entry.path) for entry in loose):
            return None
        folders = [entry for entry in top if entry.type == fs.FileType.Directory and not _is_hidden(entry.base_name)]
        if any(_is_image(entry.path) for entry in loose) or not _contains_images(spec, system, folders):
            return _of_files(spec, [_file(entry) for entry in loose if not _is_hidden(entry.base_name)])
        entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise DataError(f"cannot list {spec.uri}: {error}") from error
    return _arrange(spec, path.rstrip("/"), [entry for entry in entries if entry.type == fs.FileType.File])


def with_folders(spec: DataSpec, found: ImageFolder) -> DataSpec:
    """The spec whose split column is the split folder, if the folders are splits.

    Raises:
        DataError: the spec divides the rows in another way too.
    """
    if not found.has_splits or spec.split.column == FOLDER:
        return spec
    if given := [name for name in ("column", "stratify", "group", "order_by", "fold") if getattr(spec.split, name)]:
        raise DataError(
            f"the folders of {spec.uri} are splits, which split.{given[0]} would divide again; remove split.{given[0]}, "
            "or name the images of all splits by a glob, such as */*/*, to mix them"
        )
    return spec.model_copy(update={"split": SplitSpec(column=FOLDER)})


def _of_files(spec: DataSpec, files: Sequence[File]) -> ImageFolder | None:
    images = [file for file in files if _is_image(file.path)]
    others = [file.path for file in files if not _is_image(file.path)]
    if not images or (spec.format == "auto" and any(map(_is_other_data, others))):
        return None
    return ImageFolder(images, skipped=[path.rpartition("/")[2] for path in others])


def _arrange(spec: DataSpec, root: str, entries: Sequence[Any]) -> ImageFolder:
    names = {entry.path: entry.path[len(root) + 1 :] for entry in entries}
    images = [
        entry
        for entry in entries
        if _is_image(entry.path) and not any(_is_hidden(part) for part in names[entry.path].split("/"))
    ]
    depths = Counter(names[entry.path].count("/") for entry in images)
    tops = {names[entry.path].partition("/")[0] for entry in images if "/" in names[entry.path]}
    are_splits = bool(tops) and all(name.lower() in SPLIT_FOLDERS for name in tops)
    if are_splits and depths[1] and not depths[2]:
        raise DataError(
            f"{spec.uri} has the folders {', '.join(sorted(tops))}, which contain images instead of a folder per class; "
            "put each image into the folder of its class"
        )
    depth = 2 if are_splits and depths[2] else 1
    chosen = [entry for entry in images if names[entry.path].count("/") == depth]
    if not chosen:
        raise DataError(f"{spec.uri} has no images in folders of classes; expected {spec.uri}/CLASS/NAME.jpg")
    if depth == 2 and not any(SPLIT_FOLDERS[name.lower()] == "train" for name in tops):
        raise DataError(
            f"{spec.uri} has the folders {', '.join(sorted(tops))}, but no folder train; name it, or name the images by "
            "a glob, such as */*/*, to split them anew"
        )
    kept = {entry.path for entry in images}
    return ImageFolder(
        sorted((_file(entry) for entry in chosen), key=lambda file: file.path),
        has_splits=depth == 2,
        skipped=sorted(names[entry.path] for entry in entries if entry.path not in kept),
        nested=sorted(names[entry.path] for entry in images if names[entry.path].count("/") != depth),
    )


def _contains_images(spec: DataSpec, system: Any, folders: Sequence[Any]) -> bool:
    """Whether there are images one or two folders below, judged by the first folders that contain any file."""
    if spec.format == "images":
        return bool(folders)
    for folder in folders[:MAX_EXAMPLES]:
        below = system.get_file_info(fs.FileSelector(folder.path))
        if any(_is_image(entry.path) for entry in below):
            return True
        if any(entry.type == fs.FileType.File and _is_other_data(entry.path) for entry in below):
            return False
        for inner in [entry for entry in below if entry.type == fs.FileType.Directory][:MAX_EXAMPLES]:
            if any(_is_image(entry.path) for entry in system.get_file_info(fs.FileSelector(inner.path))):
                return True
    return False


def _file(entry: Any) -> File:
    return File(entry.path, entry.size or 0, entry.mtime_ns or 0)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_image(path: str) -> bool:
    return EXTENSIONS.get(extension_of(path) or "") == "images"


def _is_other_data(path: str) -> bool:
    """Whether a file is data in another format; a text such as README.txt is not."""
    name = path.rpartition("/")[2]
    kind = EXTENSIONS.get(extension_of(name) or "")
    return kind not in (None, "images") and not _is_hidden(name) and not name.lower().startswith(("readme", "license"))
