"""Asks the fronts of several hosts at a steady pace, whatever becomes of earlier questions, and keeps what failed."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import requests

from tests.support.hosts.host import Host
from tests.support.hosts.served import INFER, PORT, ROW

TIMEOUT_S = 15.0


class Asking:
    """A context manager; while it is entered, each front in turn gets a request every `1 / rate_per_s` seconds.

    Args:
        hosts: whose fronts are asked.
        rate_per_s: requests a second, of all together.
        path: of the infer route.
        body: of each request.
    """

    def __init__(self, hosts: Sequence[Host], rate_per_s: float = 10.0, path: str = INFER, body: Any = ROW) -> None:
        self.failures: list[str] = []
        self.num_answered = 0
        self._hosts = hosts
        self._pause_s = 1.0 / rate_per_s
        self._path = path
        self._body = body
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="asking")

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(2 * TIMEOUT_S)

    def _run(self) -> None:
        began_s, number = time.monotonic(), 0
        with ThreadPoolExecutor(64) as pool:
            for host in cycle(self._hosts):
                number += 1
                if self._is_over.wait(max(0.0, began_s + number * self._pause_s - time.monotonic())):
                    return
                pool.submit(self._ask, host)

    def _ask(self, host: Host) -> None:
        asked_s = time.monotonic()
        try:
            answer = requests.post(f"http://{host.address}:{PORT}{self._path}", json=self._body, timeout=TIMEOUT_S)
            said = "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"
        except requests.RequestException as error:
            said = type(error).__name__
        with self._lock:
            self.num_answered += not said
            if said:
                self.failures.append(f"{host.name} after {time.monotonic() - asked_s:.2f} s: {said}")
