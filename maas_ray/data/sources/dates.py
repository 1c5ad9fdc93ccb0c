"""Reads dates and times as seconds since 1970 (UTC), and computes the numbers that a model is given from them.

Times without a zone are UTC. The calendar is the Gregorian one, computed as in Howard Hinnant's "chrono-compatible
low-level date algorithms" (civil_from_days), in float64, which is exact for whole days.
"""

import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.sources.number_text import MAX_EXAMPLES, Doubles, short
from maas_ray.data.spec.features import DateEncoding

DAY_S = 86400.0
_ISO = re.compile(r"\d{4}([-/])\d{2}\1\d{2}([T ].*)?")


def is_date(kind: pa.DataType) -> bool:
    """Whether a type is a date or a time stamp."""
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def read_dates(column: pa.ChunkedArray, form: str | None = None) -> Doubles:
    """Reads dates as float64 seconds since 1970, with a resolution of microseconds.

    Args:
        column: text, dates or time stamps.
        form: a format of `datetime.strptime`; None: ISO 8601, also with slashes.
    """
    if is_date(column.type):
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        stamps = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
        values = stamps.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64) / 1e6
        return Doubles(values, np.zeros(len(values), dtype=np.bool_))
    trimmed = pc.utf8_trim_whitespace(column)
    trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    encoded = pc.dictionary_encode(trimmed.combine_chunks() if isinstance(trimmed, pa.ChunkedArray) else trimmed)
    texts = encoded.dictionary.to_pylist()
    parsed = np.array([*(_seconds(text, form) for text in texts), np.nan])
    is_failed = np.isnan(parsed)
    is_failed[-1] = False
    places = pc.fill_null(encoded.indices, len(texts)).to_numpy(zero_copy_only=False)
    examples = tuple(short(texts[place]) for place in np.flatnonzero(is_failed)[:MAX_EXAMPLES])
    return Doubles(parsed[places], is_failed[places], examples)


def calendar(xp: Any, seconds: Any, encoding: DateEncoding, origin: Any) -> Any:
    """The numbers of each date, float32 [N, len(DATE_PARTS[encoding])]; NaN stays NaN.

    Args:
        xp: numpy or torch, the module of `seconds`; the exported graph is traced from torch.
        seconds: float64 [N, 1].
        encoding: what to compute.
        origin: seconds from which `epoch` counts days: a float64, or a tensor of it.
    """
    if encoding == "epoch":
        return _float32(xp, (seconds - origin) / DAY_S)
    days = xp.floor(seconds / DAY_S)
    hour = (seconds - days * DAY_S) / 3600.0
    weekday = (days + 3.0) - xp.floor((days + 3.0) / 7.0) * 7.0  # 1970-01-01 was a Thursday; 0: Monday
    shifted = days + 719468.0
    era = xp.floor(shifted / 146097.0)
    day_of_era = shifted - era * 146097.0
    year_of_era = xp.floor(
        (day_of_era - xp.floor(day_of_era / 1460.0) + xp.floor(day_of_era / 36524.0) - xp.floor(day_of_era / 146096.0))
        / 365.0
    )
    day_of_year = day_of_era - (
        365.0 * year_of_era + xp.floor(year_of_era / 4.0) - xp.floor(year_of_era / 100.0)
    )  # from March 1
    from_march = xp.floor((5.0 * day_of_year + 2.0) / 153.0)
    day = day_of_year - xp.floor((153.0 * from_march + 2.0) / 5.0) + 1.0
    is_early = xp.floor(from_march / 10.0)  # 1 in January and February, which belong to the next year
    month = from_march + 3.0 - 12.0 * is_early
    year = year_of_era + era * 400.0 + is_early
    if encoding == "parts":
        return _float32(xp, _join(xp, [year, month, day, weekday, hour]))
    in_year = _float32(xp, day_of_year / 365.25)
    in_week, in_day = _float32(xp, (weekday + hour / 24.0) / 7.0), _float32(xp, hour / 24.0)
    turns = [np.float32(2 * np.pi).item() * phase for phase in (in_year, in_week, in_day)]
    return _join(xp, [wave(turn) for turn in turns for wave in (xp.sin, xp.cos)])


def _join(xp: Any, parts: list[Any]) -> Any:
    return xp.concatenate(parts, 1)


def _float32(xp: Any, values: Any) -> Any:
    return values.astype(np.float32) if xp is np else values.to(xp.float32)


def _seconds(text: str, form: str | None) -> float:
    try:
        if form is not None:
            found = datetime.strptime(text, form)
        elif _ISO.fullmatch(text):
            found = datetime.fromisoformat(text.replace("/", "-", 2))
        else:
            return np.nan
    except ValueError:
        return np.nan
    found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return found.timestamp()
