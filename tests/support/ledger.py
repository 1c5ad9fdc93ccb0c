"""Joins what callers saw with what replicas wrote down: what was lost, failed, duplicated, wrong or a phantom.

Fails closed: a run in which less happened than planned, a caller without an end, or an answer without a record (but
for the moments around a kill, when a replica takes its last lines with it) is no proof. Knows no HTTP and no Ray.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

NO_ANSWER = 0


DEADLINE_GRACE_S = 1.0
"""How much later than its deadline an attempt may end."""


class VoidRun(AssertionError):
    """Less happened than was planned: whatever the callers saw proves nothing."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One time that a call was sent."""

    sent_s: float
    ended_s: float
    deadline_s: float
    """Time that the request itself allowed for its answer."""
    status: int
    """As in `Call`."""

    @property
    def is_late(self) -> bool:
        """Ended, with whatever answer, later than `DEADLINE_GRACE_S` after its deadline."""
        return self.ended_s - self.sent_s > self.deadline_s + DEADLINE_GRACE_S


@dataclass(frozen=True, slots=True)
class Call:
    """One request as its caller saw it; times are of one monotonic clock, in seconds."""

    id: str
    sent_s: float
    ended_s: float
    status: int
    """Of HTTP; `NO_ANSWER` if the connection broke or the time was up."""
    answered_id: str = ""
    """The id that the answer names."""
    version: int = 0
    """The version that the answer names; 0: none."""
    digest: str = ""
    """Of the values in the answer."""
    error: str = ""
    """What broke, or the text of a refusal."""
    retry_after_s: float | None = None
    """What a refusal says about when to ask again."""
    attempts: tuple[Attempt, ...] = ()
    """Each time that it was sent, where its caller gives deadlines and repeats; the last one ended the call."""
    front: str = ""
    """Address of the front that ended the call, where there are several."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request as a replica wrote it down when it had ended."""

    id: str
    status: int
    replica: str = ""


def digest(values: Iterable[float]) -> str:
    """A short name for the values of an answer, whatever their form in JSON."""
    return sha256(json.dumps([float(value) for value in values]).encode()).hexdigest()[:16]


def read_records(pattern: str) -> list[Record]:
    """The records in all files of a glob pattern, one JSON object in each line: `request_id`, `status`, `replica`.

    Raises:
        VoidRun: there is no such file, or a line is not a record. Half a line at the end of a file is a dying replica's.
    """
    paths = sorted(glob(pattern))
    if not paths:
        raise VoidRun(f"no record of any replica at {pattern}")
    records = []
    for path in paths:
        *lines, last = Path(path).read_text().split("\n")
        for line in lines:
            try:
                found = json.loads(line)
                records.append(Record(found["request_id"], int(found["status"]), str(found.get("replica", ""))))
            except (ValueError, KeyError, TypeError) as error:
                raise VoidRun(f"{path} has a line that is not a record: {line[:200]!r}") from error
        if last.endswith("}"):
            raise VoidRun(f"{path} ends without a line end, though its last record is whole")
    return records


@dataclass(frozen=True)
class Verdict:
    """Ids by what is wrong with them; each name as the ledger's documentation defines it."""

    num_calls: int
    failed: tuple[str, ...]
    """The caller got a status other than 200, and no replica says that it answered with 200."""
    lost: tuple[str, ...]
    """The caller got no answer at all, or a refusal although a replica says that it answered with 200."""
    wrong: tuple[str, ...]
    """The values are not what the answering version computes for this input, or the answer belongs to another call."""
    duplicated: tuple[str, ...]
    """Two records of one id that both ended with 200, or one id that two callers used."""
    phantoms: tuple[str, ...]
    """Ids in answers or records that no caller ever sent."""
    unrecorded: tuple[str, ...]
    """Answered with 200, though no replica knows of it and no kill explains that."""
    late: tuple[str, ...] = ()
    """Some attempt ended later than its deadline allows."""

    @property
    def faults(self) -> dict[str, tuple[str, ...]]:
        """What is not empty."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "num_calls"}
        return {name: ids for name, ids in found.items() if ids}

    def __str__(self) -> str:
        if self.faults:
            return f"of {self.num_calls} calls: " + ", ".join(f"{len(ids)} {name}" for name, ids in self.faults.items())
        bound = 3 / max(1, self.num_calls)
        return f"0 of {self.num_calls} calls failed, lost or wrong; 95 % upper bound {bound:.1e}"


def judge(
    calls: Sequence[Call],
    records: Sequence[Record],
    right: Callable[[str, int], str | None],
    *,
    events: Mapping[str, tuple[int, int]],
    kills_s: Sequence[float] = (),
    grace_s: float = 2.0,
    may_repeat: Callable[[Call], bool] = lambda call: False,
) -> Verdict:
    """What the history says.

    Args:
        calls: every request that was sent.
        records: every request that a replica ended.
        right: the digest of the right answer to an id by a version; None: that version must never answer.
        events: for each kind of event how many happened and how many were planned.
        kills_s: when a replica was killed.
        grace_s: how long before and after a kill its replica's last lines may be missing.
        may_repeat: whether two replicas may have run a call: its pool allows that, and something happened to the first.

    Raises:
        VoidRun: no calls, or fewer events than planned.
    """
    missing = {name: f"{happened} of {planned}" for name, (happened, planned) in events.items() if happened < planned}
    if missing or not calls:
        raise VoidRun(f"the run proves nothing: {missing or 'nobody called'}")
    sent = Counter(call.id for call in calls)
    answered = Counter(record.id for record in records if record.status == 200)
    recorded = {record.id for record in records}
    failed, lost, wrong, phantoms, unrecorded = [], [], [], [], []
    for call in calls:
        if call.status == NO_ANSWER or (call.status != 200 and call.id in answered):
            lost.append(call.id)
        elif call.status != 200:
            failed.append(call.id)
        elif call.answered_id not in sent:
            phantoms.append(call.answered_id)
        elif call.answered_id != call.id or call.digest != right(call.id, call.version):
            wrong.append(call.id)
        elif call.id not in recorded and not any(abs(call.ended_s - kill_s) <= grace_s for kill_s in kills_s):
            unrecorded.append(call.id)
    repeatable = {call.id for call in calls if answered[call.id] > 1 and may_repeat(call)}
    twice = [id for id, num_times in sent.items() if num_times > 1]
    twice += [id for id, num_times in answered.items() if num_times > 1 and sent[id] == 1 and id not in repeatable]
    phantoms += sorted(recorded - set(sent))
    late = [call.id for call in calls if any(attempt.is_late for attempt in call.attempts)]
    found = (failed, lost, wrong, twice, phantoms, unrecorded, late)
    return Verdict(len(calls), *(tuple(ids) for ids in found))


def save_history(path: Path, calls: Sequence[Call], records: Sequence[Record], notes: Mapping[str, Any]) -> None:
    """Everything that a verdict was made from, one JSON object in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(json.dumps({"notes": dict(notes)}) + "\n")
        for call in calls:
            file.write(json.dumps({"call": asdict(call)}) + "\n")
        for record in records:
            file.write(json.dumps({"record": asdict(record)}) + "\n")
