"""What SIGINT and SIGTERM do while a run trains."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys
from fastm3ae.training.interrupt import StopRequest

with StopRequest() as stop:
    assert stop.signal is None
    for at_once in {signals}:
        signal.pthread_sigmask(signal.SIG_BLOCK, at_once)
        for number in at_once:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, at_once)  # all have come before any is handled
        print("noted", stop.signal.name, flush=True)
print("left", flush=True)
for number in (signal.SIGINT, signal.SIGTERM):
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
"""


def run(*signals):
    command = [sys.executable, "-c", PROGRAM.format(signals=[[int(one) for one in some] for some in signals])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted(number):
    done = run([number])
    said = [f"{number.name}: finishing the step and saving; a second one stops at once", f"noted {number.name}", "left"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, said, "")


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([[signal.SIGINT], [signal.SIGTERM]], -signal.SIGTERM),
        ([[signal.SIGTERM], [signal.SIGTERM]], -signal.SIGTERM),
        ([[signal.SIGINT, signal.SIGTERM]], -signal.SIGTERM),
    ],
)
def test_the_second_ends_it(signals, status):
    done = run(*signals)
    assert (done.returncode, done.stderr) == (status, "") and "left" not in done.stdout


@pytest.mark.parametrize("signals", [[[signal.SIGTERM], [signal.SIGINT]], [[signal.SIGINT], [signal.SIGINT]]])
def test_ctrl_c_as_the_second_is_a_keyboard_interrupt(signals):
    done = run(*signals)
    assert done.returncode == -signal.SIGINT and done.stderr.splitlines()[-1] == "KeyboardInterrupt"


HELD_BACK = """
import signal
from contextlib import nullcontext
from fastm3ae.training.interrupt import StopRequest

class Workers:
    def __del__(self):
        for number in {signals}:
            signal.raise_signal(number)
        print("ended", flush=True)

with StopRequest(is_quiet=True) as stop:
    workers = Workers()
    with {block}:
        del workers
    print("noted", stop.signal.name, flush=True)
"""


def end_workers(*signals, block="stop.held_back()"):
    program = HELD_BACK.format(signals=[int(one) for one in signals], block=block)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("signals", "status", "said"),
    [
        ([signal.SIGINT], 0, ["ended", "noted SIGINT"]),
        ([signal.SIGINT, signal.SIGINT], -signal.SIGINT, ["ended"]),
        ([signal.SIGINT, signal.SIGTERM], -signal.SIGTERM, ["ended"]),
        ([signal.SIGTERM, signal.SIGINT], -signal.SIGINT, ["ended"]),
    ],
)
def test_held_back_they_act_afterwards(signals, status, said):
    done = end_workers(*signals)
    assert (done.returncode, done.stdout.splitlines()) == (status, said) and "ignored" not in done.stderr


def test_not_held_back_ctrl_c_would_be_forgotten():
    """The test above can fail: Python prints what a ``__del__`` raises, and goes on."""
    done = end_workers(signal.SIGINT, signal.SIGINT, block="nullcontext()")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["noted SIGINT"]) and "Exception ignored" in done.stderr
