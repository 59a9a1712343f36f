"""An error of a chat template about one row has the number of that row."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from helpers.preference_data import assistant, system, user, write_jsonl
from models.test_turn_fields import tokenizer_of

from align.config.data import Prepare
from align.config.training import DPO, KTO
from align.errors import UserError
from align.models import tokenization
from align.pipeline import row_tokens, template_checks
from align.training import token_view
from align.training.row_errors import naming_row

TEMPLATE = tokenization.CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if 'bad' in message['content'] %}"
    "{{ raise_exception('no ' + message['content']) }}{% endif %}",
)
PAIRS = [
    {
        "prompt": [*turns, user(f"Say {k}")],
        "chosen": [assistant(text)],
        "rejected": [assistant("x")],
    }
    for k, (turns, text) in enumerate([([], "a"), ([], "bad"), ([system("bad")], "b"), ([], "c")])
]


def test_check_names_the_first_row_of_each_shape_and_the_row_whose_text_is_refused():
    model = row_tokens.TokenizedModel(tokenization.conversations(tokenizer_of(TEMPLATE)), 600)
    assert model.conversations is not None
    for stage in (DPO(model="m"), KTO(model="m")):
        rows = row_tokens.rows_of(stage, {"pairs": {"train": PAIRS}})
        with pytest.raises(UserError) as error:
            template_checks.check_rows(model.conversations, rows)
        (line,) = error.value.lines
        n = len(rows)
        assert line.startswith(f"{n // 4} of {n} rows: row 3 of pairs-train: "), line
        with pytest.raises(UserError) as error:
            row_tokens.count(stage, rows, model)
        assert str(error.value).startswith("row 2 of pairs-train: "), error.value
        assert "no bad" in str(error.value)
    prompts = [row_tokens.Sequences([user(t * 500)], (), n, "prompts-test") for n, t in
               enumerate(("a ", "bad "), 1)]  # fmt: skip
    with pytest.raises(UserError, match=r"^row 2 of prompts-test: "):
        row_tokens.count_long_prompts(prompts, model, 10)


@pytest.mark.filterwarnings("ignore")
def test_sft_names_the_demonstration(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    shutil.copytree(world.sft, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"prompt": f"{k}", "completion": "bad" if k == 2 else "a"} for k in range(4)]
    config = Prepare(source=write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.0)
    with pytest.raises(UserError) as error:
        token_view.tokenized_rows(config, "sft", str(tmp_path / "model"), 4)
    assert str(error.value).startswith("row 3 of the training demonstrations: "), error.value


def test_an_error_that_no_row_has_alone_is_raised_as_it_is():
    def render(row: Any) -> None:
        if row == "b":
            raise UserError("first", "second")

    with pytest.raises(UserError) as error, naming_row("abb", render, str.upper):
        raise UserError("of all rows")
    assert error.value.lines == ("B: first", "B: second")
    with pytest.raises(UserError) as error, naming_row("ac", render, str.upper):
        raise UserError("of all rows")
    assert error.value.lines == ("of all rows",)
