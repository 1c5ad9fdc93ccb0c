"""Dates: the calendar of the training equals Python's and, through torch, that of the exported graph."""

from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest
import torch

from maas_ray.data.sources.dates import calendar, read_dates
from maas_ray.data.spec.features import DATE_PARTS


def test_text_dates_and_time_stamps_are_seconds() -> None:
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC).timestamp()
    texts = ["2024-02-29T12:00", "2024/02/29 12:00:00", "2024-02-29T13:00+01:00", None, "", "29.2.2024", "20240229"]
    found = read_dates(pa.chunked_array([pa.array(texts)]))
    assert found.values[:3].tolist() == [noon] * 3
    assert np.isnan(found.values[3:]).all()
    assert found.failed.tolist() == [False] * 5 + [True] * 2
    assert found.examples == ("29.2.2024", "20240229")
    assert read_dates(pa.chunked_array([["29.2.2024"]]), "%d.%m.%Y").values.tolist() == [noon - 12 * 3600]
    zone = timezone(timedelta(hours=2))
    for kind, value in ((pa.timestamp("ns"), datetime(2024, 2, 29, 12)), (pa.date32(), date(2024, 2, 29))):
        seconds = read_dates(pa.chunked_array([pa.array([value, None], kind)])).values
        assert seconds[0] == (noon if kind != pa.date32() else noon - 12 * 3600)
        assert np.isnan(seconds[1])
    stamped = pa.array([datetime(2024, 2, 29, 14, tzinfo=zone)], pa.timestamp("us", "+02:00"))
    assert read_dates(pa.chunked_array([stamped])).values[0] == noon


def test_the_parts_are_those_of_the_calendar() -> None:
    start = datetime(1899, 12, 28, 6, 30, tzinfo=UTC)
    days = [start + timedelta(days=17 * i) for i in range(6000)]
    seconds = np.array([[day.timestamp()] for day in days])
    expected = [[day.year, day.month, day.day, day.weekday(), 6.5] for day in days]
    assert np.array_equal(calendar(np, seconds, "parts", 0.0), np.array(expected, np.float32))


@pytest.mark.parametrize("encoding", list(DATE_PARTS))
def test_torch_computes_the_same_parts(encoding: str) -> None:
    seconds = np.array([[0.0], [1709164800.5], [-1e9], [4102444800.0], [np.nan]])
    one = calendar(np, seconds, encoding, 1e9)  # type: ignore[arg-type]
    two = calendar(torch, torch.from_numpy(seconds), encoding, 1e9).numpy()  # type: ignore[arg-type]
    assert one.dtype == two.dtype == np.float32
    assert one.shape == (5, len(DATE_PARTS[encoding]))  # type: ignore[index]
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert np.isnan(one[4]).all()
