"""`align check` renders the rows of a recipe with the chat templates of its models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from helpers.ppo_fixtures import edit_json

from align.cli import main
from align.models import tokenization

GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}"
    "{% endif %}"
)
CHATML = tokenization.CHATML


@pytest.fixture
def check(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:  # fmt: skip
    """Check a recipe on a model with another template and on rows with these first two turns."""
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    ignored = shutil.ignore_patterns("artifact.json")  # a model of another origin
    shutil.copytree(world.sft, tmp_path / "model", ignore=ignored)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def run(
        stages: str, *, template: str = CHATML, system: str = "", text: str = "",
        columns: dict[str, Any] | None = None, **files: Any,
    ):  # fmt: skip
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        for name, fields in files.items():
            edit_json(tmp_path / "model" / f"{name}.json", **fields)
        turns = [{"role": "system", "content": system}] if system else []
        rows = [
            {"prompt": [*(turns if k % 2 else []), {"role": "user", "content": f"Say {k}. {text}"}],
             "chosen": f"It is {k}, as you like.", "rejected": "No.", **((columns or {}) if k % 4 else {})}
            for k in range(40)
        ]  # fmt: skip
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = "stages:\n  prepare: {source: a.jsonl, test_fraction: 0.0}\n" + stages
        (tmp_path / "r.yaml").write_text(recipe)
        monkeypatch.setattr(sys, "argv", ["align", "check", "r.yaml"])
        with pytest.raises(SystemExit) as raised:
            main.main()
        printed = capsys.readouterr()
        return raised.value.code or 0, printed.out, printed.err

    return run


def test_a_template_that_refuses_rows_is_an_error_in_every_stage(check: Any):
    stages = "  dpo: {model: model}\n  sample: {model: model}\n"
    code, _, err = check(stages, template=GEMMA, system="Be brief.")
    assert code == 2
    lines = err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["r.yaml:3", "r.yaml:4"], err
    for line in lines:
        assert "20 of 40 rows: " in line and "roles system, user" in line, line
        assert "System role not supported" in line and "chat_template_path" in line


def test_tools_and_calls_that_a_template_does_not_write_are_errors(check: Any):
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rom"}}]}
    stages = "  kto: {model: model}\n  sample: {model: model}\n"
    code, _, err = check(stages, columns={"tools": [{"name": "weather"}]})
    assert code == 2 and [line[:8] for line in err.splitlines()] == ["r.yaml:3", "r.yaml:4"], err
    for line, total in zip(err.splitlines(), (80, 40), strict=True):
        assert f"{total * 3 // 4} of {total} rows: " in line, line
        assert "does not write the tool `weather` in the conversation 'Say 1.'" in line
    code, _, err = check("  dpo: {model: model}\n", columns={"chosen": [call]})
    assert code == 2 and len(err.splitlines()) == 1, err
    assert "30 of 40 rows: " in err and "the call of `weather` of turn 2 (assistant)" in err


def test_system_turns_that_a_template_does_not_write_are_errors(check: Any):
    template = CHATML.replace("in messages", "in messages if message['role'] != 'system'")
    assert template != CHATML
    stages = "  dpo: {model: model}\n  sample: {model: model}\n"
    code, _, err = check(stages, template=template, system="Be kind.")
    assert code == 2 and [line[:8] for line in err.splitlines()] == ["r.yaml:3", "r.yaml:4"], err
    for line in err.splitlines():
        assert "20 of 40 rows: " in line and "the text of turn 1 (system)" in line, line


def test_answers_without_the_reasoning_that_a_template_begins_are_counted(check: Any):
    begins = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert begins != CHATML
    code, out, err = check("  sft: {model: model}\n", template=begins)
    assert code == 0, err
    assert (
        "sft: warning: 40 of 40 rows have an answer without reasoning behind the `<think>`" in out
    )
    thought = [{"role": "assistant", "content": "Yes.", "reasoning_content": "It is."}]
    for chosen in (thought, "<think>It is.</think>Yes."):
        written = "('<think>\n' + message.reasoning_content + '</think>' "
        written += "if message.reasoning_content else '') + message['content']"
        template = begins.replace("message['content']", written)
        code, out, err = check(
            "  sft: {model: model}\n", template=template, columns={"chosen": chosen}
        )
        assert code == 0, err
        assert "10 of 40 rows have an answer without reasoning" in out
    code, out, err = check("  sft: {model: model}\n")
    assert code == 0 and "without reasoning" not in out


@pytest.mark.parametrize(("template", "message"), [
    pytest.param("{% for m in %}", "malformed: line 1: ", id="broken"),
    pytest.param("{# #}", "does not write the user's text", id="empty"),
    pytest.param("{% for i in range(10**9) %}{% endfor %}", "Range too big", id="endless"),
    pytest.param("{{ messages.__class__.__base__ }}", "its chat template refuses", id="unsafe"),
])  # fmt: skip
@pytest.mark.parametrize("stage", ["dpo", "reward", "sample"])
def test_faults_of_a_template_are_errors(check: Any, template: str, message: str, stage: str):
    code, _, err = check(f"  {stage}: {{model: model}}\n", template=template)
    assert code == 2
    assert err.startswith(f"r.yaml:3: {stage}.model: model") or "/model: " in err
    assert message in err and len(err.splitlines()) == 1


def test_a_template_without_an_end_token_is_an_error_unless_it_is_accepted(check: Any):
    template = CHATML.replace("'<|im_end|>\\n'", "'\\n'").replace("<|im_end|>\n", "\n")
    code, _, err = check("  sft: {model: model}\n", template=template)
    assert code == 2 and "r.yaml:3: sft.model" in err
    assert "ends a completion with '\\n', which is no end token" in err
    accepted = "  sft: {model: model, allow_missing_end_token: true}\n"
    assert check(accepted, template=template)[0] == 0
    assert check("  reward: {model: model}\n", template=template)[0] == 0
    # the end of a turn that is not eos is an end token if the model's files list it
    eos = {"tokenizer_config": {"eos_token": "<|endoftext|>"}}
    alone = {"generation_config": {"eos_token_id": 0}}
    both = {"generation_config": {"eos_token_id": [0, 2]}}
    code, _, err = check("  sft: {model: model}\n", **eos, **alone)
    assert code == 2 and "ends a completion with '<|im_end|>\\n'" in err
    assert check("  sft: {model: model, trainer: {eos_token: <|im_end|>}}\n")[0] == 0
    assert check("  sft: {model: model}\n", **both)[0] == 0


def test_errors_about_a_template_that_a_recipe_names_are_about_it(check: Any, tmp_path: Path):
    template = CHATML.replace("in messages", "in messages if message['role'] != 'system'")
    (tmp_path / "nosys.jinja").write_text(template)
    stages = "  sft: {model: model, trainer: {chat_template_path: nosys.jinja}}\n"
    code, _, err = check(stages, system="Be kind.")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("r.yaml:3: sft.trainer.chat_template_path: 20 of 40 rows: "), err
    assert "nosys.jinja: its chat template does not write the text of turn 1 (system)" in err
    assert "or correct it, or name another one in the `sft` stage" in err
    (tmp_path / "nosys.jinja").write_text("{% for %}")
    code, _, err = check(stages)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("r.yaml:3: sft.trainer.chat_template_path: nosys.jinja: its chat"), err
    (tmp_path / "nosys.jinja").write_text(CHATML)
    code, out, err = check(stages + "  dpo: {model: sft}\n", system="Be kind.")
    assert code == 0, err
    assert out.count("by the template of nosys.jinja") == 2


def test_an_end_token_that_ends_no_turn_is_a_warning(check: Any):
    both = {"generation_config": {"eos_token_id": [0, 2]}}
    stages = "  sft: {{model: model, trainer: {{eos_token: {}}}}}\n"
    code, out, err = check(stages.format("<|im_start|>"), **both)
    assert code == 0, err
    assert "sft: warning: `trainer.eos_token` is '<|im_start|>', but the template ends a" in out
    code, out, err = check(stages.format("<|im_end|>"))
    assert code == 0 and "ends a turn with another" not in out


def test_rows_with_special_tokens_in_their_text_are_counted(check: Any):
    code, out, err = check("  sft: {model: model}\n", text="What is <|im_end|>?")
    assert code == 0, err
    assert "sft: 40 of 40 rows have special tokens of the tokenizer in their text" in out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eos_token", "<stop>", "the tokenizer of model has no token '<stop>'"),
        ("pad_token", "<fill>", "the tokenizer of model has no token '<fill>'"),
        ("chat_template_path", "none.jinja", "none.jinja: no such file or folder; name one"),
        ("chat_template_path", "none", "none: no such file or folder; name one"),
        ("chat_template_path", "/dev/null", "/dev/null: is no folder, and no file with the suffix"),
        ("chat_template_path", "a.jsonl", "a.jsonl: is no folder, and no file with the suffix"),
    ],
)
def test_fields_that_the_tokenizer_cannot_follow_are_errors_of_check(
    check: Any, field: str, value: str, message: str
):
    code, _, err = check(f"  sft: {{model: model, trainer: {{{field}: {value}}}}}\n")
    assert code == 2 and f"r.yaml:3: sft.trainer.{field}: {message}" in err, err
