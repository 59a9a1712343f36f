"""Tools, tool calls and reasoning in chat templates: written as transformers does, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from models.test_conversations import make_tokenizer

from align.config.training import DPO
from align.errors import UserError
from align.models import tokenization, turn_fields
from align.models.chat_templates import ChatTemplate
from align.pipeline import row_tokens

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ARGUMENTS = {"city": 'Zürich "West"', "days": 2}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
TOOLS = [{"type": "function", "function": {**FUNCTION, "description": "Weather of a city."}}]
ASK = {"role": "user", "content": "Rain?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"rain": "none"}', "name": "weather", "tool_call_id": None}
ANSWER = {"role": "assistant", "content": "No rain."}
REASONED = {**ANSWER, "reasoning_content": "The result is none."}
ASK_WITH_TOOLS = {**ASK, "tools": json.dumps(TOOLS)}

# Shortened templates with the structure of real ones.
HERMES = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = HERMES.replace(
    "{{- '<|im_start|>' + m.role + '\n' + m.content }}",
    """{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}
{{- m.content }}""",
)
OPENS_THINK = QWEN3.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
)
CLOSES_THINK = QWEN3.replace(
    "'<|im_start|>assistant\n' }}{% endif",
    "'<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif",
)
QWQ = HERMES.replace(  # the header and a call begin with the same character
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
)
R1 = QWQ.replace("<|im_start|>' + m.role + '\n'", "<|im_start|>' + m.role").replace(
    "assistant\n<think>", "assistant<think>"
)
THINKS_IN_ANSWERS = OPENS_THINK.replace("and loop.last", "and loop.last and not m.tool_calls")
LLAMA = """
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>ipython\n' + (m.content | tojson) + '<|im_end|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('Only one call.') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|im_start|>assistant\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if loop.first and tools %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{{- m.content | trim + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
CONCATENATED = """
{%- for t in tools or [] %}{{ t.function.name }}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls %}{{ call.function.name + '\n' + call.function.arguments + '\n' }}{% endfor %}
{{- '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
FIRST_CALL = HERMES.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
NO_CALLS = HERMES.replace("in m.tool_calls", "in []")
NAME_ONLY = HERMES.replace("{{- call.function.arguments | tojson }}", "{{- '{}' }}")
NO_RESULTS = HERMES.replace(
    "{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}"
)
KNOWN_NAMES = HERMES.replace(
    "in m.tool_calls %}",
    "in m.tool_calls %}{% if call.function.name != 'weather' %}{{ raise_exception('No.') }}{% endif %}",
)
IN_ROME = {"role": "user", "content": "Weather in Rome?", "tools": json.dumps(TOOLS)}
CALL_OF_ROME = {
    **CALLS,
    "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}
JSON_CALL = '{"name": "weather", "arguments": {"city": "Zürich \\"West\\"", "days": 2}}'
THINK = "<think>\nThe result is none.\n</think>\n\n"


def tokenizer_of(template: str) -> Any:
    return make_tokenizer(template, eos="<|im_end|>")


def real_tokenizer(name: str) -> Any:
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return make_tokenizer(text.replace('strftime_now("%Y-%m-%d")', "'today'"))


def completion_of(template: str, prompt: list[Any], completion: Any) -> str:
    """The completion that is trained on, behind the prompt that is sampled from."""
    tokenizer = tokenizer_of(template)
    (row,) = tokenization.tokenize_rows(tokenizer, [prompt], [[completion]])
    assert row.ids[: row.start] == tokenization.tokenize_prompts(tokenizer, [prompt])[0]
    return str(tokenizer.decode(row.ids[row.start :]))


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "written"),
    [
        (HERMES, [ASK_WITH_TOOLS], CALLS, f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
        (HERMES, [ASK_WITH_TOOLS, CALLS, RESULT], ANSWER, "No rain."),
        (QWEN3, [ASK_WITH_TOOLS, CALLS, RESULT], REASONED, f"{THINK}No rain."),
        (QWEN3, [ASK], {**CALLS, "content": "Wait.", "reasoning_content": "The result is none."},
         f"{THINK}Wait.<tool_call>\n{JSON_CALL}\n</tool_call>"),
        (QWEN3, [ASK, REASONED, ASK], ANSWER, "<think>\n\n</think>\n\nNo rain."),
        (OPENS_THINK, [ASK], REASONED, THINK.removeprefix("<think>\n") + "No rain."),
        (CLOSES_THINK, [ASK], ANSWER, "No rain."),
        (KNOWN_NAMES, [ASK_WITH_TOOLS], CALLS, f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
        (QWQ, [ASK_WITH_TOOLS], CALLS, f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
        (R1, [ASK_WITH_TOOLS], CALLS, f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
        (R1, [ASK_WITH_TOOLS, CALLS, RESULT], {**CALLS, "content": "<b>"},
         f"<b><tool_call>\n{JSON_CALL}\n</tool_call>"),
        (LLAMA, [ASK_WITH_TOOLS, CALLS, RESULT], CALLS, JSON_CALL.replace("arguments", "parameters")),
        (CONCATENATED, [ASK_WITH_TOOLS], CALLS, f"weather\n{json.dumps(ARGUMENTS, ensure_ascii=False)}\n"),
    ],
)  # fmt: skip
def test_a_policy_writes_calls_and_reasoning_as_its_template(
    template: str, prompt: list[Any], completion: Any, written: str
):
    assert completion_of(template, prompt, completion) == f"{written}<|im_end|>"


NO_TOOLS = tokenization.CHATML
REFUSALS = [
    ("tools that are not written", NO_TOOLS, [ASK_WITH_TOOLS], ANSWER, "the tool `weather`"),
    ("a call that is not written", NO_TOOLS, [ASK], CALLS, "the call of `weather` of turn 2 (assistant)"),
    ("reasoning that is not written", HERMES, [ASK], REASONED, "`reasoning_content` of turn 2 (assistant)"),
    ("earlier reasoning that the template never writes", HERMES, [ASK, REASONED, ASK], ANSWER,
     "`reasoning_content`"),
    ("text that is left out beside a call", LLAMA, [ASK], {**CALLS, "content": "Wait."},
     "the text of turn 2 (assistant)"),
    ("the second call of a turn", FIRST_CALL, [ASK], {**CALLS, "tool_calls": [CALL, CALL]},
     "the call of `weather` of turn 2 (assistant)"),
    ("the second call, which the template refuses", LLAMA, [ASK], {**CALLS, "tool_calls": [CALL, CALL]},
     "Only one call."),
    ("a result that is not written", HERMES.replace("m.content + '\n</tool", "'\n</tool"),
     [ASK, CALLS, RESULT], ANSWER, "the text of turn 3 (tool)"),
    ("arguments that are not written", HERMES.replace("call.function.arguments | tojson", "'{}'"),
     [ASK], CALLS, "the argument `city` of the call of `weather` of turn 2 (assistant)"),
    ("a call without the beginning of the reasoning that answers have", THINKS_IN_ANSWERS, [ASK], CALLS,
     "writes other text before sampling"),
    ("a call whose name is in the tools and whose argument in the question", NO_CALLS,
     [IN_ROME, CALL_OF_ROME, RESULT], ANSWER,
     "the call of `weather` of turn 2 (assistant)"),
    ("arguments whose names are in the tools and whose values in the question", NAME_ONLY,
     [IN_ROME, CALL_OF_ROME, RESULT], ANSWER,
     "the argument `city` of the call of `weather` of turn 2 (assistant)"),
    ("a result that is in the question", NO_RESULTS,
     [IN_ROME, CALL_OF_ROME, {"role": "tool", "content": "Rome"}], ANSWER, "the text of turn 3 (tool)"),
    ("a tool that is in the question", NO_TOOLS, [{**IN_ROME, "content": "weather"}], ANSWER,
     "the tool `weather`"),
    ("reasoning that is in the question", HERMES, [ASK], {**ANSWER, "reasoning_content": "Rain?"},
     "`reasoning_content` of turn 2 (assistant)"),
    ("reasoning behind a prompt that ends it", CLOSES_THINK, [ASK], REASONED,
     "writes other text before sampling"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "prompt", "completion", "message"),
                         [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])  # fmt: skip
def test_a_template_that_leaves_out_a_part_of_a_row_is_refused(
    template: str, prompt: list[Any], completion: Any, message: str
):
    tokenizer = tokenizer_of(template)
    with pytest.raises(UserError) as error:
        tokenization.tokenize_rows(tokenizer, [prompt], [[completion]])
    (line,) = error.value.lines
    assert message in line and line.startswith("folder: ") and "chat_template_path" in line
    with (
        pytest.raises(UserError, match="chat_template_path"),
        tokenization.rows_for_trl(tokenizer, end_repair=None),
    ):
        tokenizer.apply_chat_template([*prompt, completion], tokenize=True)
    if any(map(turn_fields.has_more_than_text, prompt)) or "tools" in prompt[0]:
        with pytest.raises(UserError):  # PPO, `sample` and `evaluate` read the prompt only
            tokenization.tokenize_prompts(tokenizer, [prompt])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "gptoss", "lfm2_2_5"])
def test_real_templates_are_written_as_by_transformers(name: str):
    tokenizer = real_tokenizer(name)
    template = tokenization.conversations(tokenizer).template
    objects = {
        **CALLS,
        "tool_calls": [{**CALL, "function": {**CALL["function"], "arguments": ARGUMENTS}}],
    }
    result = {key: value for key, value in RESULT.items() if value is not None}
    for stored, plain in (
        ([ASK_WITH_TOOLS, CALLS], [ASK, objects]),
        ([ASK_WITH_TOOLS, CALLS, RESULT, ANSWER], [ASK, objects, result, ANSWER]),
    ):
        expected = tokenizer.apply_chat_template(plain, tools=TOOLS, tokenize=False)
        assert template.render(stored) == expected


def test_reasoning_in_the_text_is_refused_behind_a_prompt_that_ends_it():
    def trained(template: str, content: str) -> str:
        tokenizer = tokenizer_of(template)
        turns = [{"role": "assistant", "content": content}]
        ((row,),) = tokenization.conversations(tokenizer).trained_rows(
            [[ASK]], [turns], train_on="last"
        )
        ((start, end),) = row.turns
        return str(tokenizer.decode(row.ids[start:end]))

    inline = "<think>\nwhy\n</think>\n\nfour"
    with pytest.raises(UserError, match=r"writes other text before sampling, '.*</think>"):
        trained(CLOSES_THINK, inline)
    assert trained(CLOSES_THINK, "<think>\n\n</think>\n\nfour") == "four<|im_end|>"
    assert trained(CLOSES_THINK, "four") == "four<|im_end|>"
    assert trained(HERMES, inline) == f"{inline}<|im_end|>"
    assert turn_fields.shape({"role": "assistant", "content": inline}) != turn_fields.shape(ANSWER)
    # A policy may write it, and rows of sampled text have the tokens that were sampled.
    answer = {"role": "assistant", "content": inline}
    (row,) = tokenization.tokenize_rows(tokenizer_of(CLOSES_THINK), [[ASK]], [[answer]])
    assert tokenizer_of(CLOSES_THINK).decode(row.ids[row.start :]) == f"{inline}<|im_end|>"


def test_reasoning_has_the_name_that_the_template_reads():
    tokenizer = real_tokenizer("gptoss")  # it reads `thinking`
    expected = tokenizer.apply_chat_template(
        [ASK, {**ANSWER, "thinking": "Because."}], tokenize=False
    )
    template = tokenization.conversations(tokenizer).template
    assert template.render([ASK, {**ANSWER, "reasoning_content": "Because."}]) == expected
    assert "Because." in expected


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>"])
def test_special_tokens_in_arguments_tools_and_reasoning_stay_text(mark: str):
    tokenizer = tokenizer_of(QWEN3)
    tools = [{"type": "function", "function": {"name": "weather", "description": mark}}]
    call = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"city": mark})}}
    prompt = [{**ASK, "tools": json.dumps(tools)}]
    completion = {**CALLS, "tool_calls": [call], "reasoning_content": mark}
    (row,) = tokenization.tokenize_rows(tokenizer, [prompt], [[completion]])
    text = tokenizer.decode(row.ids)
    assert text.count(mark) == 3 + text.replace(f'"{mark}"', "").replace(f"\n{mark}\n", "").count(
        mark
    )
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [row.ids.count(i) for i in ids] == [3, 3]  # system with the tools, user, assistant
    assert tokenization.conversations(tokenizer).contains_control_token([completion])


def test_arguments_are_json_where_a_template_writes_text():
    for template in ("{{ messages[0].tool_calls[0].function.arguments }}",
                     "{{ '' ~ messages[0].tool_calls[0].function.arguments }}",
                     "{{ messages[0].tool_calls[0].function.arguments + '' }}"):  # fmt: skip
        name = "{{ messages[0].tool_calls[0].function.name }}"
        assert ChatTemplate(f"{name} {template}", "x").render([CALLS]) == (
            f"weather {json.dumps(ARGUMENTS, ensure_ascii=False)}"
        )


def test_lengths_count_tools_and_reasoning_of_all_rows():
    template = tokenization.conversations(tokenizer_of(QWEN3))
    model = row_tokens.TokenizedModel(template, positions=600)
    many = json.dumps(TOOLS * 6)
    prompts = [row_tokens.Sequences([turn], ()) for turn in (ASK, {**ASK, "tools": many})]
    assert row_tokens.count_long_prompts(prompts, model, 10) == 1
    rows = [row_tokens.Sequences([ASK], ([ANSWER],))] * 401
    reasoned = {**ANSWER, "reasoning_content": "because " * 100}
    rows[1] = row_tokens.Sequences([ASK], ([reasoned],))  # not one of the sample of every second
    counts = row_tokens.count(DPO(model="m", trainer={"max_length": 300}), rows, model)
    assert counts.truncated == 1
