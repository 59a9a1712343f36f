"""Tests of exit codes, of who prints errors, and of signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from align.errors import DataError
from align.rewards import containment
from align.runtime import exit_codes, out_of_memory, signals


@pytest.fixture(autouse=True)
def restored_handlers(monkeypatch):
    monkeypatch.setattr(signals, "_stop", signals._Stop())  # `install` replaces it
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where pytest runs under nohup
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
        (signals.Interrupted("SIGTERM"), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/x.pt"), 2, "a/x.pt: cannot be written or read: No space left on device; free space or change permissions\n"),
    ],
)  # fmt: skip
def test_known_errors_have_an_exit_code_and_no_traceback(error, code, stderr, capsys):
    with pytest.raises(SystemExit) as exit_info:
        exit_codes.guarded(raising(error))
    assert (exit_info.value.code, capsys.readouterr().err) == (code, stderr)


@pytest.mark.parametrize(
    ("error", "device", "request_"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "cuda:1, which has 80 GB", " (2.50 GiB more were asked for)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "cuda:1, which has 80 GB", ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000 bytes."), "the machine", " (4.1 MB more were asked for)"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "the machine", " (7.28 TiB more were asked for)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine", ""),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_one_line_that_names_the_memory(
    error, device, request_, capsys, monkeypatch
):
    monkeypatch.setattr(out_of_memory, "_gpu", lambda: ("cuda:1", 80_000_000_000))
    monkeypatch.setattr(out_of_memory, "_machine", lambda: ("the machine", None))
    wrapped = ValueError("a library's own error")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        with pytest.raises(SystemExit) as exit_info:
            exit_codes.guarded(raising(raised))
        line = capsys.readouterr().err
        assert (exit_info.value.code, line.count("\n")) == (2, 1)
        assert line.startswith(f"out of memory on {device}{request_}; use smaller batches")


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "none")])
def test_internal_errors_pass_through(error):
    with pytest.raises(type(error)):
        exit_codes.guarded(raising(error))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda file: Path(file).write_text("1"), id="Python"),
        pytest.param(lambda file: torch.save({"a": torch.zeros(9999)}, file), id="torch"),
        pytest.param(lambda file: Tokenizer(WordLevel({}, "")).save(file), id="tokenizers"),
    ],
)
def test_a_full_disk_is_described_whichever_library_writes(write):
    with pytest.raises(Exception) as error_info:
        write("/dev/full")
    line = exit_codes.describe_failed_write(error_info.value)
    assert line is not None
    assert "\n" not in line


def test_a_lost_process_ends_the_others_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(exit_codes.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as exit_info:
        exit_codes.guarded(raising(RuntimeError("[gloo/tcp] Connection closed by peer [::1]:80")))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("another process of this run has ended; ")


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


ENDS = """
import atexit, sys
from align.runtime.exit_codes import guarded

class Kept:
    def __del__(self):
        print("interpreter taken down")

kept = Kept()
guarded(lambda: (atexit.register(print, "tracker closed"), {end}))
"""


@pytest.mark.parametrize(
    ("end", "code"), [("None", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_ends_after_the_trackers_and_before_the_interpreter_is_taken_down(
    processes, end, code
):
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", ENDS.format(end=end)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == code, run.stderr
    last = ["interpreter taken down"] if processes == 1 else []
    assert run.stdout.splitlines() == ["tracker closed", *last]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_raises_at_once_outside_a_deferred_block(number):
    signals.install()
    with pytest.raises(signals.Interrupted, match=number.name):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_copies_of_a_signal_interrupt_neither_the_checkpoint_nor_the_cleanup(number):
    signals.install()
    with signals.deferred() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), number)  # from the launcher, or to the process group
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), number)  # while the rest of the step is done
    assert signals.requested()


def test_after_two_seconds_ctrl_c_stops_at_once_and_sigterm_does_not(monkeypatch):
    signals.install()
    exits = []
    monkeypatch.setattr(signals, "_exit_process", exits.append)
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert exits == []
    with pytest.raises(signals.Interrupted):  # the cleanup after the exception hangs
        os.kill(os.getpid(), signal.SIGINT)
    assert exits == [130]


def test_code_of_a_recipe_cannot_keep_ctrl_c_from_ending_the_process(monkeypatch):
    signals.install()
    exits = []
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    # As after an exception that the code has caught; the real function would end this process.
    monkeypatch.setattr(signals._stop, "raised", True)
    monkeypatch.setattr(signals._stop, "requested", True)
    original = signals._exit_process
    assert original is os._exit
    monkeypatch.setattr(signals, "_exit_process", exits.append)
    with containment.contained("f", "repair it", seconds=9.0):
        assert os._exit is not original  # refuses to exit
        with pytest.raises(signals.Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert exits == [130]


def test_copies_of_a_signal_do_not_kill_the_interpreter_while_it_shuts_down():
    with pytest.raises(SystemExit):
        exit_codes.guarded(raising(signals.Interrupted("SIGTERM")))
    # Python resets its own handlers then, but not ignored signals.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not signals.requested()
