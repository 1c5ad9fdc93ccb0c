from pathlib import Path

import pytest
from pydantic import Field

from maas_ray.errors import SpecError
from maas_ray.spec import MAX_SPEC_BYTES, Spec, canonical_json, load_spec, parse_spec


class Wheel(Spec):
    radius: float = 1.0
    """In metres."""


class Axle(Spec):
    left: Wheel = Wheel()
    spokes: int | None = None


class Car(Spec):
    name: str
    axles: tuple[Axle, ...] = (Axle(),)
    engine: Wheel | None = None
    doors: int = Field(default=4, ge=2)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"nam": "a"}, "unknown key 'nam'; did you mean 'name'?"),
        (
            {"name": "a", "axles": [{"left": {"raduis": 2}}]},
            "unknown key 'axles.0.left.raduis'; did you mean 'radius'?",
        ),
        ({"name": "a", "engine": {"raduis": 2}}, "unknown key 'engine.raduis'; did you mean 'radius'?"),
        ({"name": "a", "zzz": 1}, "unknown key 'zzz'; known keys: axles, doors, engine, name"),
        ({}, "name: Field required"),
        ({"name": "a", "doors": 1}, "doors: Input should be greater than or equal to 2 (got 1)"),
        ([1], "expected a mapping of fields of Car, got list"),
        (None, "expected a mapping of fields of Car, got NoneType"),
    ],
)
def test_errors_are_reported_with_a_fix(document: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(Car, document)
    assert message in str(caught.value)


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(Car, {"nam": "a", "doors": 0})
    assert len(str(caught.value).splitlines()) == 3


def test_overrides_are_parsed_as_yaml_and_set_nested_fields(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    path.write_text("name: a\nengine: {radius: 3}\n")
    car = load_spec(Car, path, ["engine.radius=0.5", "doors=2", "name=b c"])
    assert (car.engine, car.doors, car.name) == (Wheel(radius=0.5), 2, "b c")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("doors", "is not an assignment"),
        ("=3", "is not an assignment"),
        ("name.x=3", "'name' is a value, not a section"),
        ("doors=[", "the value is not YAML"),
        ("dors=3", "unknown key 'dors'; did you mean 'doors'?"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(Car, {"name": "a"}, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"a: !!python/object/apply:os.system ['true']", "is not YAML"),
        (b"#" * (MAX_SPEC_BYTES + 1), f"the limit is {MAX_SPEC_BYTES}"),
        (b"", "expected a mapping"),
    ],
)
def test_a_file_without_a_spec_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "car.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_spec(Car, path)
    assert message in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the spec .*nowhere.yaml: No such file"):
        load_spec(Car, tmp_path / "nowhere.yaml")


def test_equal_specs_have_equal_digests_and_defaults_count() -> None:
    assert Car(name="a").digest() == parse_spec(Car, {"doors": 4, "name": "a"}).digest()
    assert Car(name="a").digest() != Car(name="b").digest()


def test_field_docstrings_are_in_the_json_schema() -> None:
    assert Car.model_json_schema()["$defs"]["Wheel"]["properties"]["radius"]["description"] == "In metres."


def test_canonical_json_is_sorted_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "ä"]}) == '{"a":[1.5,"ä"],"b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


class Pool(Spec):
    name: str
    timeout_s: float = 1.0


class Pools(Spec):
    pools: list[Pool]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pools.0.timeout_s=20", [20.0, 1.0]),
        ("pools.second.timeout_s=20", [1.0, 20.0]),
        ("pools.1={name: third, timeout_s: 7}", [1.0, 7.0]),
    ],
)
def test_an_override_sets_list_items_by_index_or_name(override: str, expected: list[float]) -> None:
    document = {"pools": [{"name": "first"}, {"name": "second"}]}
    assert [pool.timeout_s for pool in parse_spec(Pools, document, [override]).pools] == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pools.2.timeout_s=1", "no item '2' in the list; items: 0, 1, first, second"),
        ("pools.thrid.timeout_s=1", "no item 'thrid' in the list; items: 0, 1, first, second"),
        ("pools.0.name.x=1", "'name' is a value, not a section"),
    ],
)
def test_an_override_of_an_unknown_item_lists_existing_items(override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(Pools, {"pools": [{"name": "first"}, {"name": "second"}]}, [override])
