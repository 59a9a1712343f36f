"""The prompt of a language model that compares two completions, from a Jinja template.

The template writes ``prompt``, ``first`` and ``second``, the texts that are compared;
``criterion``, the question of a rubric's criterion or nothing; ``columns``, further columns of the
prompt's row; and ``boundary``, a mark that none of the texts contains. The format of the answer is
appended.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.data.rows import turn_text
from align.errors import DataError, UserError, did_you_mean
from align.judges.base import Messages, Pair
from align.judges.verdicts import ANSWER_FORMAT

BUILT_IN = Path(__file__).with_name("pairwise_prompt.jinja")
VARIABLES = ("prompt", "first", "second", "criterion", "columns", "boundary")
LARGEST_TEMPLATE = 256 * 1024


class JudgePrompt:
    """A template, read from a file."""

    def __init__(self, path: Path | None, *, with_criterion: bool) -> None:
        """Read the template at ``path``, or the built-in one, and check it.

        Raises:
            UserError: There is no such file, it is no template, or a variable is unknown or
                missing.
        """
        self._path = path or BUILT_IN
        self._text = _read_text(self._path)
        try:
            tree = self._environment.parse(self._text)
            variables = jinja2.meta.find_undeclared_variables(tree)
            self._template = self._environment.from_string(self._text)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", 1)
            raise UserError(
                f"{self._path}:{line}: the template is malformed: {_one_line(error)}"
            ) from None
        lines = [
            f"{self._path}: unknown variable `{name}`{did_you_mean(name, VARIABLES)}; known: "
            f"{', '.join(VARIABLES)}"
            for name in sorted(variables - set(VARIABLES))
        ]
        for name in ("first", "second", *["criterion"] * with_criterion):
            if name not in variables:
                lines.append(f"{self._path}: the template must write {{{{ {name} }}}}")
        if lines:
            raise UserError(*lines)

    @cached_property
    def _environment(self) -> jinja2.Environment:
        return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)

    def render(self, pair: Pair, criterion: str | None = None) -> list[dict[str, Any]]:
        """The messages of the request that compares a pair.

        Raises:
            DataError: The template writes what this row does not have.
        """
        prompt, first, second = (text_of(each) for each in (pair.prompt, pair.first, pair.second))
        # No text can contain the digest of itself, so no completion can write the mark.
        texts = "\0".join([prompt, *sorted([first, second])])
        boundary = hashlib.sha256(texts.encode(errors="surrogatepass")).hexdigest()[:12]
        try:
            text = self._template.render(
                prompt=prompt,
                first=first,
                second=second,
                criterion=criterion,
                columns=dict(pair.columns),
                boundary=boundary,
            )
        except Exception as error:  # a template can raise anything, such as TypeError
            beginning = " ".join(prompt.split())[:50]
            raise DataError(
                f"{self._path}: cannot be written for the prompt {beginning!r}: {_one_line(error)}"
            ) from None
        return [{"role": "user", "content": f"{text.strip()}\n\n{ANSWER_FORMAT}"}]


def text_of(messages: Messages) -> str:
    """The text of a prompt or a completion. Of several messages, each begins with its role.

    The tools of a conversation come first, as JSON; a turn includes its reasoning and its calls.
    """
    tools = [f"tools: {message['tools']}" for message in messages[:1] if message.get("tools")]
    if len(messages) == 1:
        return "\n\n".join([*tools, turn_text(messages[0])])
    return "\n\n".join([*tools, *(f"{each['role']}: {turn_text(each)}" for each in messages)])


def _read_text(path: Path) -> str:
    repair = "name a file with a Jinja template"
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; {repair}")
        with path.open("rb") as file:
            content = file.read(LARGEST_TEMPLATE + 1)
        if len(content) > LARGEST_TEMPLATE:
            raise UserError(f"{path}: larger than {LARGEST_TEMPLATE // 1024} KiB; {repair}")
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; {repair}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {repair}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
