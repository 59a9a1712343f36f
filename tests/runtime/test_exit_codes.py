"""Tests of exit codes, of who prints errors, and of signals."""

from __future__ import annotations

import os
import signal

import pytest

from align.errors import DataError
from align.runtime import exit_codes, signals


@pytest.fixture(autouse=True)
def restored_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (DataError("a.csv:1: no rows", "b.csv: missing"), 2, "a.csv:1: no rows\nb.csv: missing\n"),
        (signals.Interrupted("SIGTERM"), 130, "interrupted: the same command resumes from the last checkpoint\n"),
    ],
)  # fmt: skip
def test_known_errors_have_an_exit_code_and_no_traceback(error, code, stderr, capsys):
    with pytest.raises(SystemExit) as exit_info:
        exit_codes.guarded(raising(error))
    assert (exit_info.value.code, capsys.readouterr().err) == (code, stderr)


def test_internal_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        exit_codes.guarded(raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (DataError("a.csv: no rows"), 2, "process 1: a.csv: no rows\n"),
        (signals.Interrupted("SIGTERM"), 130, ""),
    ],
)
def test_other_ranks_give_rank_0_time_to_print_first(error, code, stderr, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    waits, exits = [], []
    monkeypatch.setattr(exit_codes.time, "sleep", waits.append)
    monkeypatch.setattr(exit_codes.os, "_exit", exits.append)
    exit_codes.guarded(raising(error))
    assert exits == [code]
    assert waits == ([exit_codes.SECONDS_FOR_RANK_0] if code == 2 else [])
    assert capsys.readouterr().err == stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_at_once_outside_a_deferred_block(number):
    signals.install()
    with pytest.raises(signals.Interrupted, match=number.name):
        os.kill(os.getpid(), number)


def test_in_a_deferred_block_the_first_signal_is_a_request_and_the_second_raises():
    signals.install()
    with pytest.raises(signals.Interrupted), signals.deferred() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.requested()
    with signals.deferred():
        assert not signals.requested()
