"""Reward functions of a recipe: import, signature, columns and scores."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from align.config.functions import ScoreFunction
from align.errors import UserError
from align.rewards import containment, function_source, functions
from align.runtime import signals

MINE = ScoreFunction(function="mine:f")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes ``mine.py`` into the working directory; it is unloaded later."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(text)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be imported: AttributeError"),
        ("f = 3", "expected a function, got int"),
        ("def f(x): return x", "its parameters are x; define it as"),
        ("def f(", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('down')", "cannot be imported: RuntimeError: down (line 1 of "),
        ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0 (line 1 of "),
        ("import os; os._exit(0)", "cannot be imported: os._exit(0)"),
        ("async def f(prompts, completions): pass", "expected a function, got async function"),
        ("f = max", "its parameters are empty; define it as"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_rejected_in_one_line(
    module: Any, text: str, message: str
):
    module(text)
    with pytest.raises(UserError) as raised:
        functions.load_function("mine:f")
    assert len(raised.value.lines) == 1
    assert message in raised.value.lines[0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("None", "expected a list of numbers, got None"),
        ("[None]", "is None; a reward is a number"),
        (
            "['1']",
            "the score of 'a' \\(row 1 of 1, prompt ''\\) is str '1'; return a list of numbers",
        ),
        ("[[1.0]]", "the score of 'a' \\(row 1 of 1, prompt ''\\) is list"),
        ("[1j]", "the score of 'a' \\(row 1 of 1, prompt ''\\) is complex 1j"),
        ("'1'", "expected a list of numbers, got str '1'"),
        ("{1.0: 'a'}", "expected a list of numbers, got dict"),
        ("{1.0}", "expected a list of numbers, got set"),
        ("(1.0 for _ in completions)", "expected a list of numbers, got generator"),
        ("3", "expected a list of numbers, got int 3"),
        ("[]", "0 scores for 1 completion;"),
        ("[1.0, 2.0]", "2 scores for 1 completion;"),
        ("[float('nan')]", "scores must be finite"),
        ("[-float('inf')]", "scores must be finite"),
        ("[1e300]", "scores must be finite, at most 1e\\+15"),
        ("[10**400]", "scores must be finite"),
        ("torch.tensor([[1.0]])", "the score of 'a' \\(row 1 of 1, prompt ''\\) is list"),
        ("torch.tensor([float('nan')])", "scores must be finite"),
    ],
)
def test_the_scores_of_a_reward_function_are_checked(module: Any, scores: str, message: str):
    module(f"import torch\ndef f(prompts, completions): return {scores}")
    function = functions.load_function("mine:f")
    with pytest.raises(UserError, match=message) as raised:
        functions.call(MINE, function, [[]], ["a"], {"prompt_id": ["1"]})
    assert len(raised.value.lines) == 1


@pytest.mark.parametrize(
    "scores",
    [
        *("[1]", "(1.0,)", "[True]", "[Fraction(1)]", "torch.ones(1)", "[torch.tensor(1)]"),
        *("numpy.ones(1)", "[numpy.float32(1)]", "torch.ones(1, dtype=torch.bfloat16)"),
    ],
)
def test_numbers_of_any_library_are_scores(module: Any, scores: str):
    module(f"import numpy, torch\nfrom fractions import Fraction\ndef f(prompts, completions): return {scores}")  # fmt: skip
    function = functions.load_function("mine:f")
    assert functions.call(MINE, function, [[]], ["a"], {}) == [1.0]


@pytest.mark.parametrize(
    "missing", ["None", "float('nan')", "numpy.nan", "torch.tensor(torch.nan)"]
)
def test_a_judge_may_have_no_score(module: Any, missing: str):
    module(f"import numpy, torch\ndef f(prompts, completions): return [{missing}, 1]")
    function = functions.load_function("mine:f")
    scores = functions.judge(MINE, function, [[], []], ["a", "b"], {})
    assert math.isnan(scores[0]) and scores[1] == 1.0
    with pytest.raises(UserError):
        functions.call(MINE, function, [[], []], ["a", "b"], {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no\\nnumber')", "failed: ValueError: no number \\(line 3 of "),
        ("sys.exit(0)", "failed: SystemExit: 0"),
        ("os._exit(0)", r"failed: os\._exit\(0\)"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("raise GeneratorExit", "failed: GeneratorExit"),
        ("raise MemoryError", "failed: MemoryError"),
    ],
)
def test_a_reward_function_that_raises_or_exits_is_an_error_of_one_line(
    module: Any, monkeypatch: pytest.MonkeyPatch, body: str, message: str
):
    monkeypatch.setattr(containment.signal, "getsignal", lambda number: "the handler of a run")
    module(f"import os, sys\ndef f(prompts, completions):\n    {body}")
    function = functions.load_function("mine:f")
    exit_process = os._exit
    with pytest.raises(UserError, match=f"^mine:f: {message}") as raised:
        functions.call(MINE, function, [[]], ["a"], {})
    assert len(raised.value.lines) == 1
    assert os._exit is exit_process


def test_a_reward_function_that_does_not_return_is_named_in_the_log(
    module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(containment, "SECONDS_UNTIL_WARNING", 0.01)
    module("import time\ndef f(prompts, completions):\n    time.sleep(0.1)\n    return [1.0]")
    function = functions.load_function("mine:f")
    assert functions.call(MINE, function, [[]], ["a"], {}) == [1.0]
    assert "mine:f: failed: not returned after 0 seconds; the run waits" in caplog.text
    caplog.clear()
    module("def f(prompts, completions): return [1.0]")
    functions.call(MINE, functions.load_function("mine:f"), [[]], ["a"], {})
    assert not caplog.text


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("while True: pass", id="a loop"),
        pytest.param("time.sleep(30)", id="a wait"),
        pytest.param("re.match('(a|a)*b', 'a' * 60)", id="a regular expression"),
        pytest.param(
            "try: time.sleep(30)\n    except BaseException: time.sleep(30)",
            id="it catches the interruption once",
        ),
    ],
)
def test_a_function_that_does_not_return_in_time_ends_with_its_line_and_row(
    module: Any, monkeypatch: pytest.MonkeyPatch, body: str
):
    monkeypatch.setattr(containment, "SECONDS_BETWEEN_ATTEMPTS", 0.02)
    module(f"import re, time\ndef f(prompts, completions):\n    {body}\n    return [1.0]")
    config = ScoreFunction(function="mine:f", timeout_seconds=0.05)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError) as raised:
        functions.call(config, functions.load_function("mine:f"), [[]], ["a"], {})
    (line,) = raised.value.lines
    assert line.startswith("mine:f: failed: not returned after 0.05 seconds (line ")
    assert line.endswith(
        ".py); raise `timeout_seconds` if it needs longer; it failed with 'a' (row 1 of 1, prompt '')"
    )
    assert signal.getsignal(signal.SIGVTALRM) is before


@pytest.mark.parametrize(
    ("body", "message", "row"),
    [
        ("return [1 / len(text) for text in completions]", "failed: ZeroDivisionError", "fails with '' (row 3 of 4, prompt 'c')"),
        ("return [0.0 for text in completions if text]", "3 scores for 4 completions", "fails with '' (row 3 of 4, prompt 'c')"),
        ("sys.exit(len(completions))" , "failed: SystemExit: 4", "fails with 'x' (row 1 of 4, prompt 'a')"),
        ("return [0.0, 0.0, None, 0.0]", "is None; a reward is a number", "the score of '' (row 3 of 4, prompt 'c')"),
        ("return [0.0] * len(completions) if len(completions) < 3 else 'four'", "got str 'four'", "fails with 4 rows together and with none of them alone"),
    ],
)  # fmt: skip
def test_an_error_names_the_row_that_causes_it(module: Any, body: str, message: str, row: str):
    module(f"import sys\ndef f(prompts, completions):\n    {body}")
    prompts: Any = [[{"role": "user", "content": each}] for each in "abcd"]
    with pytest.raises(UserError) as raised:
        functions.call(MINE, functions.load_function("mine:f"), prompts, ["x", "xx", "", "y"], {})
    (line,) = raised.value.lines
    assert message in line
    assert row in line


def test_signals_pass_through_a_reward_function(module: Any, monkeypatch: pytest.MonkeyPatch):
    module("def f(prompts, completions): raise completions[0]")
    function = functions.load_function("mine:f")
    with pytest.raises(signals.Interrupted):
        functions.call(MINE, function, [[]], [signals.Interrupted()], {})  # type: ignore[list-item]
    monkeypatch.setattr(containment.signal, "getsignal", lambda number: signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        functions.call(MINE, function, [[]], [KeyboardInterrupt()], {})  # type: ignore[list-item]


def test_a_reward_function_changes_neither_its_arguments_nor_the_working_directory(
    module: Any, tmp_path: Path
):
    module(
        "import os\n"
        "def f(prompts, completions, level):\n"
        "    os.chdir('/')\n"
        "    prompts[0][0]['content'] = completions[0] = level[0] = 'changed'\n"
        "    return [1.0]\n"
    )
    prompts, completions, columns = [[{"role": "user", "content": "a"}]], ["b"], {"level": ["c"]}
    function = functions.load_function("mine:f")
    functions.call(MINE, function, prompts, completions, columns)
    assert (prompts, completions) == ([[{"role": "user", "content": "a"}]], ["b"])
    assert columns == {"level": ["c"]}
    assert Path.cwd() == tmp_path


def test_the_file_of_a_function_is_found_without_running_its_package(module: Any, tmp_path: Path):
    package = tmp_path / "mine" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "scores.py").write_text("")
    (tmp_path / "outer" / "space").mkdir(parents=True)  # namespace packages
    (tmp_path / "outer" / "space" / "scores.py").write_text("")
    assert functions.function_file("mine.inner.scores:f") == package / "scores.py"
    assert functions.function_file("mine.inner:f") == package / "__init__.py"
    assert functions.function_file("outer.space.scores:f") == tmp_path / "outer/space/scores.py"
    assert functions.function_file("align.rewards.gold:f") is not None
    for name in ("mine.none:f", "none.inner:f", "mine.inner.scores.f:f", "sys:f", ":f", "..a:f"):
        assert functions.function_file(name) is None
    assert functions.source_digest("mine.inner.scores:f") is not None
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be imported: .*mine.py has no function `f`"),
        (
            "def g(prompts, completions): return []\nff = g",
            "has no function `f`; did you mean `ff`",
        ),
        ("def f(x): return x", "its parameters are x; define it as"),
        ("if True:\n    def f(x, /, *y, **z): return x", "its parameters are x, y, z; define it"),
        ("def f(", "cannot be imported: SyntaxError"),
        ("\0", "cannot be imported: "),
    ],
)
def test_the_source_of_a_function_is_checked_without_running_it(
    module: Any, text: str, message: str
):
    module(f"{text}\nraise SystemExit")
    with pytest.raises(UserError, match=message) as raised:
        function_source.signature("mine:f")
    assert len(raised.value.lines) == 1
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "def f(prompts, completions, *, a, b=1): ...",
        "from os.path import *",
        "f: object = make()",
        "try:\n    import fast as f\nexcept ImportError:\n    f = None",
        "@wraps\ndef f(x): ...",
        "class f: ...",
        "exec('f = 1')",
    ],
)
def test_what_the_source_does_not_decide_is_accepted(module: Any, text: str):
    module(f"{text}\nraise SystemExit")
    known = function_source.signature("mine:f")
    assert known is None or known.required == ("prompts", "completions", "a")


def test_a_module_that_does_not_exist_is_known_without_an_import(module: Any):
    for name in ("no_such_module:f", "no.such.module:f", "xml.no_such:f"):
        with pytest.raises(UserError, match="cannot be imported: no module `"):
            function_source.signature(name)
    with pytest.raises(UserError, match="its parameters are"):
        function_source.signature("json:loads")


def test_the_answer_of_a_function_is_a_column_of_any_name_or_a_constant(module: Any):
    module("def f(prompts, completions, answer): return [len(each) for each in answer]")
    function = functions.load_function("mine:f")
    columns = {"prompt_id": ["1", "2"], "key": ["abc", "d"]}
    arguments = ([[], []], ["x", "y"], columns)
    named = ScoreFunction(function="mine:f", answer_column="key")
    assert functions.call(named, function, *arguments) == [3, 1]
    constant = ScoreFunction(function="mine:f", answer="ab")
    assert functions.call(constant, function, *arguments) == [2, 2]
    assert function_source.missing_columns(named, ["prompt_id"]) == ["key"]
    assert function_source.missing_columns(named, ["key"]) == []
    assert function_source.missing_columns(constant, []) == []
    assert function_source.missing_columns(MINE, ["key"]) == ["answer"]
    with pytest.raises(ValueError, match="`answer` and `answer_column` both set"):
        ScoreFunction(function="mine:f", answer="a", answer_column="b")


def test_missing_columns_of_a_reward_function_are_reported_before_training(
    module: Any, tmp_path: Path, launch: Any
):
    module("def f(prompts, completions, answer, level=1, **columns): return [0.0]")
    assert function_source.missing_columns(MINE, ["prompt_id"]) == ["answer"]
    assert function_source.missing_columns(MINE, ["prompt_id", "answer"]) == []
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n"
        "  prepare: {source: embedded, max_rows: 40}\n"
        "  sft: {model: {vocab_size: 300, hidden_size: 32}}\n"
        "  ppo: {model: sft, rewards: ['mine:f'], steps: 2, batch_size: 4}\n"
    )
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.rewards.0: mine:f requires the column `answer`" in done.err
    assert "sft: running" not in done.out
