"""Signals as exceptions and as states to poll, in separate processes: the test runner keeps its own handlers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.root import ROOT

START = "import os, signal, sys, threading, time; from maas_ray.process import interrupts as i; [signal.signal(n, signal.default_int_handler if n == 2 else signal.SIG_DFL) for n in i.SIGNALS]\nme = os.getpid()\n"


def run(script: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_is_an_exception_that_ends_blocks_in_order(number: signal.Signals) -> None:
    done = run(
        f"i.take_over()\ntry:\n    try:\n        os.kill(me, {int(number)}); time.sleep(60)\n"
        "    finally:\n        print('undone')\n"
        "except KeyboardInterrupt as error:\n    print(error.number.name, i.last().name, i.exit_code(error.number))\n"
    )
    assert done.stdout.split() == ["undone", number.name, number.name, str(128 + number)], done.stderr


def test_a_held_block_runs_to_its_end_before_the_signal_acts() -> None:
    done = run(
        "i.take_over()\ntry:\n    with i.held() as held:\n        os.kill(me, 15); os.kill(me, 2); time.sleep(0.1)\n"
        "        print('whole', held.count)\n    print('never')\n"
        "except KeyboardInterrupt as error:\n    print(error.number.name)\n"
    )
    assert done.stdout.split()[:2] == ["whole", "2"]
    assert done.stdout.split()[2] in ("SIGINT", "SIGTERM")


def test_an_open_part_of_a_held_block_can_be_interrupted() -> None:
    done = run(
        "i.take_over()\ntry:\n    with i.held() as held:\n        try:\n            with held.open():\n"
        "                os.kill(me, 15); time.sleep(60)\n"
        "        except KeyboardInterrupt:\n            os.kill(me, 15); time.sleep(0.1); print('undone', held.count)\n"
        "except KeyboardInterrupt as error:\n    print(error.number.name)\n"
    )
    assert done.stdout.split() == ["undone", "2", "SIGTERM"], done.stderr


def test_without_take_over_a_held_signal_has_its_own_effect_afterwards() -> None:
    done = run("with i.held():\n    os.kill(me, 15); time.sleep(0.1); print('whole', flush=True)\nprint('never')\n")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.split() == ["whole"]


def test_the_first_signal_can_be_polled_and_the_second_one_raises() -> None:
    done = run(
        "i.take_over()\nwith i.told_to_end() as told:\n    os.kill(me, 15); time.sleep(0.1); print(told.number.name)\n"
        "    try:\n        os.kill(me, 2); time.sleep(60)\n    except KeyboardInterrupt as error:\n        print(error.number.name)\n"
    )
    assert done.stdout.split() == ["SIGTERM", "SIGINT"], done.stderr


def test_handlers_of_other_libraries_are_removed_and_no_signal_is_lost() -> None:
    """Ray installs handlers when a driver connects; a signal during that time is delivered afterwards."""
    done = run(
        "i.take_over()\ntry:\n    with i.kept():\n        signal.signal(15, signal.SIG_DFL); os.kill(me, 15); print('still here', flush=True)\n"
        "    time.sleep(60)\nexcept KeyboardInterrupt as error:\n    print(error.number.name)\n"
    )
    assert done.stdout.splitlines() == ["still here", "SIGTERM"], done.stderr


def test_other_threads_change_nothing() -> None:
    done = run(
        "def work():\n    with i.held() as held, i.told_to_end(), i.kept():\n        i.take_over()\n        print(signal.getsignal(15) is signal.SIG_DFL)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
    )
    assert done.stdout.split() == ["True"], done.stderr


def test_a_main_thread_that_does_not_respond_is_not_waited_for() -> None:
    """It is blocked in code that handles no signals: here a C lock that is never released."""
    script = (
        "i.STUCK_S = 0.5\ni.take_over(lambda number: (print(number.name, flush=True), os._exit(7)))\n"
        "import ctypes\nlibc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\nprint('ready', flush=True)\n"
        "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", START + script], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (7, "SIGTERM\n")
