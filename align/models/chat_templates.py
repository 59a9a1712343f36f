"""Chat templates: a conversation as text, with one error for everything that a template does wrong.

A template comes from a model folder or the Hub. It runs in jinja's sandbox and for a limited time.
Only jinja2 is imported. Left out: tokens, which :mod:`align.models.conversations` computes.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.errors import UserError
from align.models import turn_fields

Message = Mapping[str, Any]
"""One turn of a conversation: its role, its content, and fields that a template may write."""

BREAK = "\ufdd0"
"""A noncharacter of Unicode that separates the characters of a special token within a message."""
SECONDS = 5.0
"""Longest time that a template may take for one conversation."""
MAX_LENGTH = 10_000_000
"""Longest text or list that a template may build by multiplication."""
MAX_PARTS = 3
"""Most missing parts of a conversation that an error lists."""
TODAY = datetime.datetime(2024, 7, 26)
"""What ``strftime_now`` formats: a real date would change the tokens of a run from day to day."""
REPAIR = (
    "set another template in the `sft` stage, `trainer: {chat_template_path: FILE.jinja}`, or "
    "correct the file `chat_template.jinja` of the tokenizer"
)
REPAIR_OF_NAMED = "correct it, or name another one in the `sft` stage, `trainer: {chat_template_path: FILE.jinja}`"
"""Repair of a template that a recipe names."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write."""

    text: str
    name: str
    """Folder or Hub id of the tokenizer, or the file of the template, for error messages."""
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """Values of ``bos_token``, ``eos_token`` and others."""
    repair: str = REPAIR
    """What a user can do about its faults."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """A conversation as text; ``add_generation_prompt`` appends the header of an answer.

        A prompt must have all of its turns. Without the header, a template may write a system turn
        elsewhere or not at all (Mistral's); no stage reads its turns from there.

        Raises:
            UserError: The template is malformed, refuses the conversation, takes too long, uses
                what the sandbox forbids, or leaves out a turn, tools, tool calls or reasoning.
        """
        tools = tools or turn_fields.tools_of(messages)
        text = self._render(messages, add_generation_prompt, tools)
        has_more = [*map(turn_fields.has_more_than_text, messages)]
        turns = [k for k, more in enumerate(has_more) if more or add_generation_prompt]
        if tools or any(has_more) or (turns and _may_omit(self.text, text, messages)):
            missing = self._missing(text, messages, add_generation_prompt, tools, turns)
            if missing:
                raise self._incomplete(text, messages, missing)
        return text

    def fault(self, what: str) -> UserError:
        """The error for a fault of the template, with its repair."""
        return UserError(f"{self.name}: its chat template {what}; {self.repair}")

    def _incomplete(
        self, text: str, messages: Sequence[Message], missing: Sequence[str]
    ) -> UserError:
        """The error for parts that the template leaves out."""
        contents = [str(message.get("content") or "").strip() for message in messages]
        if not any(content and content in text for content in contents):
            return self.fault(
                f"writes no text of the conversation {_beginning(messages)}, as that of a model "
                "for images may not"
            )
        parts = ", ".join(missing[:MAX_PARTS])
        if len(missing) > MAX_PARTS:
            parts += f" and {len(missing) - MAX_PARTS} further parts"
        return UserError(
            f"{self.name}: its chat template does not write {parts} in the conversation "
            f"{_beginning(messages)}; remove such rows from the source, or {self.repair}"
        )

    def _missing(
        self,
        text: str,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        turns: Sequence[int],
    ) -> list[str]:
        """The parts of ``turns`` that the template leaves out, in words.

        A template that refuses names of functions which it does not know is rendered without marks.
        """
        marked, marked_tools = turn_fields.marked(messages, tools)
        try:
            marked_text = self._render(marked, add_generation_prompt, marked_tools)
        except UserError:
            missing = list(turn_fields.not_written(text, messages, tools, turns))
        else:
            parts = turn_fields.not_written(marked_text, marked, marked_tools, turns)
            missing = [turn_fields.without_marks(part) for part in parts]
        if not missing and turn_fields.has_reasoning(messages):
            return [] if _writes_reasoning(self.text) else [f"`{turn_fields.REASONING[0]}`"]
        return missing

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None
    ) -> str:
        try:
            template = _compile(self.text)
            template.environment.deadline = time.monotonic() + SECONDS  # type: ignore[attr-defined]
            return template.render(
                messages=turn_fields.for_template(messages, self.text),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}: its chat template is malformed: line {error.lineno}: "
                f"{_one_line(error)}; {self.repair}"
            ) from None
        except Exception as error:  # a template can raise anything, such as OverflowError
            raise UserError(
                f"{self.name}: its chat template refuses a conversation of the roles "
                f"{', '.join(str(m.get('role')) for m in messages)} ({_beginning(messages)}): "
                f"{_reason(error)}; remove such rows from the source, or {self.repair}"
            ) from None


def _may_omit(template: str, text: str, prompt: Sequence[Message]) -> bool:
    """Whether the text of a prompt, whose turns have a text only, may lack one of them.

    One text may be part of another, so that the roles are rendered with other texts too.
    """
    contents = (str(turn.get("content") or "").strip() for turn in prompt)
    if not all(content in text for content in contents):
        return True
    return not _writes_turns(template, tuple(str(turn.get("role")) for turn in prompt))


@functools.lru_cache(maxsize=1024)
def _writes_turns(template: str, roles: tuple[str, ...]) -> bool:
    """Whether a template writes all turns of a prompt with these roles, if it accepts them."""
    turns = [{"role": role, "content": f"Turn{k}x"} for k, role in enumerate(roles)]
    try:
        text = ChatTemplate(template, "", _NO_TOKENS)._render(turns, True, None)
    except UserError:
        return True
    return all(turn["content"] in text for turn in turns)


_NO_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")


@functools.lru_cache(maxsize=32)
def _writes_reasoning(text: str) -> bool:
    """Whether a template writes the reasoning of a last turn."""
    probe = "ReasoningPlaceholder"
    turns: list[Message] = [
        {"role": "user", "content": "User"},
        {"role": "assistant", "content": "Assistant", turn_fields.REASONING[0]: probe},
    ]
    try:
        return probe in ChatTemplate(text, "", _NO_TOKENS)._render(turns, False, None)
    except UserError:
        return False


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates, which stops after a time limit."""

    intercepted_binops = frozenset({"*", "**"})
    deadline = float("inf")

    def check_time(self) -> None:
        """Stop a template that runs longer than :data:`SECONDS`; every loop and macro calls it."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes longer than {SECONDS:.0f} seconds")

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply, unless the result would be huge."""
        if operator == "**" and (abs(left) > MAX_LENGTH or abs(right) > 64):
            raise SecurityError("it computes a huge power")
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                if len(sequence) * count > MAX_LENGTH:
                    raise SecurityError("it repeats a text too often")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}``, with which templates mark the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """The marked text as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
    """Compile a template with the functions that transformers offers to templates."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": TODAY.strftime,
    }
    tree = environment.parse(text)
    blocks: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
    for node in blocks:
        check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(check).set_lineno(node.lineno))
    return jinja2.Template.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    """What a template raised, in words."""
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, jinja2.TemplateError):
        return _one_line(error)
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _beginning(messages: Sequence[Message]) -> str:
    """The beginning of the last turn that has a text, to find the row."""
    texts = [" ".join(str(message.get("content") or "").split()) for message in messages]
    text = next((text for text in reversed(texts) if text), "").replace(BREAK, "")
    return repr(text if len(text) < 50 else f"{text[:47]}…")
