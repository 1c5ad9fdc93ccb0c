"""Which files of a directory are the images of a data set, in which class and in which split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maas_ray.data.prepare import prepare
from maas_ray.data.sources.image_folders import find_images
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from maas_ray.store.objects import ObstoreStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _spec(root: Path, **fields: Any) -> DataSpec:
    return DataSpec.model_validate({"uri": str(root), "task": "classification", **fields})


def _image(path: Path, value: int = 0, *, color: bool = False, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if color else "L", size, (value, 0, 0) if color else value).save(path)


def _classes(root: Path, *, each: int = 4) -> None:
    for i in range(2 * each):
        _image(root / ("cat", "dog")[i % 2] / f"{i}.png", 10 * i)


def test_files_that_are_no_images_are_skipped_and_counted(tmp_path: Path, file_store: ObstoreStore) -> None:
    _classes(tmp_path)
    for name in ("README.md", ".DS_Store", "cat/Thumbs.db", "cat/.DS_Store", "dog/notes.txt", "readme.txt"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "bird").mkdir()
    _image(tmp_path / "cat" / "kittens" / "a.png")
    found = find_images(_spec(tmp_path))
    assert found is not None
    assert [Path(file.path).name for file in found.files] == [
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "1.png",
        "3.png",
        "5.png",
        "7.png",
    ]
    assert found.nested == ["cat/kittens/a.png"]
    dataset = prepare(_spec(tmp_path), file_store)
    assert dataset.features.labels == ("cat", "dog")
    about = dataset.report["images"]
    assert about["images_read"] == 8
    assert about["files_skipped"] == {"no_image": 6, "in_nested_folder": 1}
    assert "cat/Thumbs.db" in about["examples_skipped"]


def test_folders_of_splits_are_the_splits(tmp_path: Path, file_store: ObstoreStore) -> None:
    for split, number in (("train", 6), ("val", 2), ("test", 4)):
        for i in range(number):
            _image(
                tmp_path / split / ("cat", "dog")[i % 2] / f"{split}{i}.png", {"train": 1, "val": 2, "test": 3}[split]
            )
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"junk")
    dataset = prepare(_spec(tmp_path), file_store)
    assert dataset.num_rows == {"train": 6, "validation": 2, "test": 4}
    assert dataset.features.labels == ("cat", "dog")
    for split, value in (("train", 1), ("validation", 2), ("test", 3)):
        assert (dataset.read(split).columns[0] == value).all()
    mixed = prepare(_spec(tmp_path / "*" / "*" / "*"), file_store)
    assert sum(mixed.num_rows.values()) == 12
    assert mixed.num_rows["validation"] == 1
    with pytest.raises(DataError, match=r"which split.stratify would divide again"):
        prepare(_spec(tmp_path, split={"stratify": True}), file_store)


def test_folders_named_like_splits_without_classes_are_refused(tmp_path: Path, file_store: ObstoreStore) -> None:
    for i in range(4):
        _image(tmp_path / ("train", "val")[i % 2] / f"{i}.png")
    with pytest.raises(DataError, match="contain images instead of a folder per class"):
        prepare(_spec(tmp_path), file_store)
    (tmp_path / "train").rename(tmp_path / "training data")  # a class may have any other name
    assert prepare(_spec(tmp_path, split={"validation": 0, "test": 0}), file_store).features.labels == (
        "training data",
        "val",
    )


def test_without_a_folder_train_the_splits_are_refused(tmp_path: Path, file_store: ObstoreStore) -> None:
    for i in range(4):
        _image(tmp_path / ("val", "test")[i % 2] / "cat" / f"{i}.png")
    with pytest.raises(DataError, match="but no folder train"):
        prepare(_spec(tmp_path), file_store)


@pytest.mark.parametrize(("num_color", "channels"), [(0, 1), (1, 3)])
def test_one_image_with_colors_makes_every_row_colored(
    tmp_path: Path, file_store: ObstoreStore, num_color: int, channels: int
) -> None:
    _classes(tmp_path)  # the first files are gray
    for i in range(num_color):
        _image(tmp_path / "dog" / f"z{i}.png", 200, color=True, size=(6, 4))
    dataset = prepare(_spec(tmp_path, split={"validation": 0, "test": 0}), file_store)
    assert dataset.features.row.shape == (channels, 2, 3)
    assert {name: dataset.report["images"][name] for name in ("gray", "color", "scaled")} == {
        "gray": 8, "color": num_color, "scaled": num_color
    }  # fmt: skip
    if num_color:
        assert (dataset.read("train").columns[0] == np.array([200, 0, 0])[:, None, None]).all((1, 2, 3)).any()
    assert prepare(_spec(tmp_path, image={"channels": 1}), file_store).features.row.shape == (1, 2, 3)


def test_a_directory_of_tables_is_no_directory_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    _image(tmp_path / "pictures" / "a.png")
    assert find_images(_spec(tmp_path)) is None
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "a.csv").write_text("x,y\n1,2\n")
    assert find_images(_spec(tmp_path / "2024" / "*.csv")) is None


def test_one_folder_of_images_is_one_class(tmp_path: Path, file_store: ObstoreStore) -> None:
    _classes(tmp_path)
    with pytest.raises(DataError, match="single class 'cat'"):
        prepare(_spec(tmp_path / "cat", split={"validation": 0, "test": 0}), file_store)


def test_images_that_are_too_deep_are_no_data_set(tmp_path: Path, file_store: ObstoreStore) -> None:
    _image(tmp_path / "x" / "y" / "z" / "a.png")
    with pytest.raises(DataError, match="has no images in folders of classes"):
        prepare(_spec(tmp_path, format="images"), file_store)
