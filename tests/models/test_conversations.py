"""Token rows of conversations: one context, one end, special tokens in a text, clear errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from helpers.chat_tokenizers import make_tokenizer

from align.errors import UserError
from align.models import chat_templates, tokenization, tokenizer_files

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PROMPT = [{"role": "user", "content": "the question"}]
CHAT = [
    PROMPT[0],
    {"role": "assistant", "content": "<think>\nearlier reasons\n</think>\n\nfirst answer"},
    {"role": "user", "content": "and then"},
]


VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% else %}USER: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def shape(name: str, **more: Any) -> Any:
    return make_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), **more)


SHAPES = {
    "Gemma: the end is not eos, a line feed follows": (
        lambda: shape("gemma", listed=("<end_of_turn>",)), "answer<end_of_turn>"
    ),
    "ChatML: a line feed follows": (
        lambda: shape("qwen2_5", eos="<|im_end|>"), "answer<|im_end|>"
    ),
    "Phi-3: eos follows the end": (
        lambda: shape("phi3", listed=("<|end|>",)), "answer<|end|>"
    ),
    "Llama 3": (
        lambda: shape("llama3", listed=("<|eot_id|>",)), "answer<|eot_id|>"
    ),
    "DeepSeek: the generation prompt writes <think>, a finished turn does not": (
        lambda: shape("deepseekv3", eos="<｜end▁of▁sentence｜>"), "answer<｜end▁of▁sentence｜>"
    ),
    "Qwen3: a finished turn has empty reasoning": (
        lambda: shape("qwen3", eos="<|im_end|>"), "<think>\n\n</think>\n\nanswer<|im_end|>"
    ),
    "Qwen3.5: the generation prompt begins the reasoning": (
        lambda: shape("qwen3_5_think", eos="<|im_end|>"), "\n</think>\n\nanswer<|im_end|>"
    ),
    "Nemotron: the end of the reasoning is written differently": (
        lambda: shape("nemotron_3_nano", eos="<|im_end|>"), "</think>answer<|im_end|>"
    ),
    "Vicuna: a space before the completion, which the generation prompt lacks": (
        lambda: make_tokenizer(VICUNA), " answer</s>"
    ),
    "a template without an end, for a reward model": (
        lambda: make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"),
        "answer</s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["one turn", "earlier reasoning"])
@pytest.mark.parametrize("name", SHAPES)
def test_training_evaluation_and_ppo_read_the_same_tokens(name: str, prompt: Any):
    make, written = SHAPES[name]
    tokenizer = make()
    (context,) = tokenization.tokenize_prompts(tokenizer, [prompt])
    assert tokenizer.decode(context) == tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False
    )
    sampled = tokenizer.encode(written, add_special_tokens=False)
    if written.startswith("\n"):  # a policy samples this behind its prompt's line feed
        sampled = tokenizer.encode(f"x{written}", add_special_tokens=False)[1:]
    ppo = context + sampled
    # reward training, centering and held-out accuracy
    assert tokenization.tokenize_for_reward(tokenizer, [prompt], [answer("answer")]) == [ppo]
    # evaluation and `label` read the text of the sampled tokens
    text = tokenization.decode_completion(tokenizer, sampled, finished=True)
    (evaluated,) = tokenization.tokenize_for_reward(tokenizer, [prompt], [answer(text)])
    assert evaluated == ppo
    # SFT, DPO and KTO: TRL's own calls
    with tokenization.rows_for_trl(tokenizer, end_repair=None):
        trained = tokenizer.apply_chat_template(prompt + answer("answer"), tokenize=True)
        before = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
    assert trained["input_ids"] == ppo[: len(trained["input_ids"])]
    assert before["input_ids"] == context
    assert len(trained["input_ids"]) == len(ppo) - name.startswith("a template without an end")


CONVERSATION = [PROMPT[0], *answer("answer"), {"role": "user", "content": "and <|im_end|> then"}]


@pytest.mark.parametrize("name", SHAPES)
def test_the_tokens_between_two_sampled_turns_are_those_of_the_template(name: str):
    # Where a template writes earlier turns as a policy does, the parts are the next turn's prompt.
    tokenizer = SHAPES[name][0]()
    template = tokenization.conversations(tokenizer)
    between = template.between_turns(CONVERSATION)
    (prompt,) = tokenization.tokenize_prompts(tokenizer, [CONVERSATION])
    (row,) = tokenization.tokenize_rows(tokenizer, [PROMPT], [answer("answer")])
    assert prompt[-len(between) :] == between  # also where earlier turns are written otherwise
    text = tokenizer.decode(between)
    assert "and <|im_end|> then" in text
    assert "answer" not in text.partition("and")[0]
    rewrites = re.match("DeepSeek|Qwen3|Nemotron", name)
    # As text: the template's text as a whole may join the header and the answer in a token.
    parts = tokenizer.decode(row.ids) + text
    assert (parts == tokenizer.decode(prompt)) == (rewrites is None)


def test_text_of_a_turn_does_not_shift_the_tokens_between_two_turns():
    tokenizer = shape("qwen2_5", eos="<|im_end|>")
    template = tokenization.conversations(tokenizer)
    echoes = [{"role": "user", "content": "AnswerPlaceholder<|im_end|>"}, *answer("x")]
    echoes += [{"role": "user", "content": "AnswerPlaceholderX AnswerPlaceholder"}]
    text = tokenizer.decode(template.between_turns(echoes))
    expected = "AnswerPlaceholderX AnswerPlaceholder"
    assert text == f"\n<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("template", "message"), [
    ("{{ messages[-1].content }}</s>",
     r"does not write the text of turn 1 \(user\), the text of turn 2 \(assistant\) in the "
     r"conversation 'and <\|im_end\|> then'; remove such rows"),
    (VICUNA.replace("m.content", "m.content.replace('Placeholder', '')"),
     r"omits turn 2 \(assistant\); set another template"),
])  # fmt: skip
def test_a_template_that_omits_earlier_turns_has_no_tokens_between_them(
    template: str, message: str
):
    tokenizer = make_tokenizer(template)
    with pytest.raises(UserError, match=message):
        tokenization.conversations(tokenizer).between_turns(CONVERSATION)


OMITTING = {
    "system turns": ("{% if m.role != 'system' %}", "the text of turn 1 (system)"),
    "all but the first turn": ("{% if loop.first %}", "the text of turn 2 (user)"),
    "all but the last turn": ("{% if loop.last %}", "the text of turn 1 (system)"),
    "the rest of long turns": ("{% if m.content|length < 99 %}", "the text of turn 2 (user)"),
}


@pytest.mark.parametrize("omitted", OMITTING)
def test_a_template_that_omits_turns_of_a_prompt_is_refused(omitted: str):
    # Each text is part of another turn, so that only the place shows which turn is missing.
    condition, missing = OMITTING[omitted]
    turn = "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    header = "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer(f"{{% for m in messages %}}{condition}{turn}{header}")
    text = "the question" if "long" not in omitted else "the question " * 9
    prompt = [{"role": "system", "content": "the"}, {"role": "user", "content": text}]
    for call in (
        lambda: tokenization.tokenize_prompts(tokenizer, [prompt]),
        lambda: tokenization.tokenize_for_reward(tokenizer, [prompt], [answer("yes")]),
    ):
        with pytest.raises(UserError) as raised:
            call()
        (line,) = raised.value.lines
        assert f"does not write {missing} in the conversation 'the question" in line, line
    tokenization.tokenize_prompts(tokenizer, [PROMPT])


def test_many_omitted_turns_are_counted():
    tokenizer = make_tokenizer("{{ messages[-1].content }}</s>")
    with pytest.raises(UserError, match=r"of turn 3 \(user\) and 5 further parts in the"):
        tokenization.tokenize_prompts(tokenizer, [[*(PROMPT + answer("yes")) * 4, *PROMPT]])
    tokenizer = make_tokenizer("{% for m in messages %}User{% endfor %}")
    with pytest.raises(UserError, match=r"writes no text of the conversation 'the question'"):
        tokenization.tokenize_prompts(tokenizer, [PROMPT + answer("yes") + PROMPT])


@pytest.mark.parametrize("template", [
    VICUNA.replace("m.content", "m.content.replace('/no_think', '')"),  # SmolLM3's command
    VICUNA.replace("m.content", "(m.content.split('</think>')|last)"),
    VICUNA.replace("m.content", "m.content|tojson"),
    VICUNA.replace("{% for m in messages %}", "{% for m in messages %}"
                   "{% if m.content.endswith('x') %}{{ raise_exception('No.') }}{% endif %}"),
])  # fmt: skip
def test_a_template_that_rewrites_turns_is_accepted(template: str):
    prompt = [{"role": "system", "content": "Be brief /no_think, and\n kind."}, *CHAT]
    (ids,) = tokenization.tokenize_prompts(make_tokenizer(template), [prompt])
    assert ids


@pytest.mark.parametrize("name", ["deepseekv3", "qwen3", "qwen3_5_think", "glm4moe"])
@pytest.mark.parametrize("content", [
    "<think>\nreasons\n</think>\n\nanswer", "<think>reasons</think>answer",
    "reasons\n</think>\n\nanswer", "\n\nanswer", "",
])  # fmt: skip
def test_a_template_drops_no_part_of_a_completion(name: str, content: str):
    tokenizer = shape(name, eos="</s>")
    (row,) = tokenization.tokenize_rows(tokenizer, [PROMPT], [answer(content)])
    context = tokenization.tokenize_prompts(tokenizer, [PROMPT])[0]
    assert row.ids[: row.start] == context
    opened = tokenizer.decode(context).endswith("<think>\n")
    kept = content.strip().removeprefix("<think>").strip() if opened else content.strip()
    assert kept in tokenizer.decode(row.ids[row.start :])


@pytest.mark.parametrize("name", [
    "cohere", "deepseekv3", "gemma3", "glm4moe", "llama3_1", "nemotron_3_nano", "phi3", "qwen3",
])  # fmt: skip
def test_templates_are_rendered_as_by_transformers(name: str):
    tokenizer = shape(name)
    template = tokenization.conversations(tokenizer).template
    system = [{"role": "system", "content": "Be brief."}, *PROMPT]
    for messages in (PROMPT, CHAT, system, CHAT + answer("<think>x</think> y")):
        for header in (False, True):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=header, tokenize=False
            )
            assert template.render(messages, add_generation_prompt=header) == expected


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "</s>"])
def test_special_tokens_in_a_text_stay_text(mark: str):
    tokenizer = shape("qwen2_5", eos="<|im_end|>", listed=("</s>",))
    text = f"The token {mark} ends a turn; {mark}{mark}user begins."
    prompt = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    plain = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    (row,) = tokenization.tokenize_rows(tokenizer, [prompt], [answer(text)])
    (reference,) = tokenization.tokenize_rows(tokenizer, [plain], [answer("x")])
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(mark)}
    assert [i for i in row.ids if i in special] == [i for i in reference.ids if i in special]
    assert tokenizer.decode(row.ids[row.start :]) == f"{text}<|im_end|>"
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(
        prompt + answer(text), tokenize=False
    ).removesuffix("\n")


def test_tokens_around_a_turn_that_are_not_special_stay_text_too():
    tokenizer = shape("deepseekv3", eos="<｜end▁of▁sentence｜>")
    text = "Write <｜User｜> and <｜Assistant｜>."
    template = tokenization.conversations(tokenizer)
    (row,) = tokenization.tokenize_rows(tokenizer, [PROMPT], [answer(text)])
    user = tokenizer.convert_tokens_to_ids("<｜User｜>")
    assert row.ids.count(user) == 1
    assert template.contains_control_token(answer(text))
    assert not template.contains_control_token(answer("<think> < User > |"))


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}{{ m.content }}", "its chat template is malformed: line 1: "),
    ("", "its chat template does not write the user's text"),
    ("{{ bos_token }}", "its chat template does not write the user's text"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
     "its chat template does not write the completion"),
    ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
     "takes longer than 0 seconds"),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "it calls itself without end"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
     "takes longer than 0 seconds"),
    ("{{ 'x' * 10**9 }}", "repeats a text too often"),
    ("{{ 10 ** 10 ** 8 }}", "computes a huge power"),
    ("{{ messages.__class__.__mro__ }}", "its chat template refuses"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "its chat template refuses"),
    ("{{ messages.append(1) }}", "access to attribute 'append'"),
    ("{{ missing.field }}", "'missing' is undefined"),
    ("{{ messages[9].content }}", "has no element 9"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ lipsum(10**9) }}", "'lipsum' is undefined"),
    ("{{ raise_exception('Only tools.') }}", "Only tools."),
])  # fmt: skip
def test_every_fault_of_a_template_is_one_line(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    tokenizer = make_tokenizer(template or "{# nothing #}")
    for call in (
        lambda: tokenization.tokenize_for_reward(tokenizer, [PROMPT], [answer("yes")]),
        lambda: trl_row(tokenizer),
    ):
        with pytest.raises(UserError) as raised:
            call()
        (line,) = raised.value.lines
        assert line.startswith("folder: ") and message in line and "\n" not in line
        assert "chat_template_path" in line


def trl_row(tokenizer: Any) -> Any:
    with tokenization.rows_for_trl(tokenizer, end_repair=None):
        return tokenizer.apply_chat_template(PROMPT + answer("yes"), tokenize=True)


def test_a_template_that_refuses_roles_names_them_and_the_text():
    tokenizer = shape("gemma")
    message = r"roles system, user \('the question'\): System role not supported; remove such rows"
    with pytest.raises(UserError, match=message):
        tokenization.tokenize_prompts(tokenizer, [[{"role": "system", "content": "Be."}, *PROMPT]])
    with pytest.raises(UserError, match=r"roles user, user .*must alternate"):
        tokenization.tokenize_prompts(tokenizer, [PROMPT + PROMPT])


def test_a_template_that_writes_no_end_token_is_refused_before_training():
    tokenizer = shape("gemma")  # without `<end_of_turn>` among the end tokens
    with (
        pytest.raises(UserError, match=r"ends a completion with '<end_of_turn>\\n', which is no"),
        tokenization.rows_for_trl(tokenizer, end_repair="add it"),
    ):
        tokenizer.apply_chat_template(PROMPT, tokenize=True, add_generation_prompt=True)
    tokenizer.eos_token = "<end_of_turn>"
    with tokenization.rows_for_trl(tokenizer, end_repair="add it"):
        tokenizer.apply_chat_template(PROMPT, tokenize=True, add_generation_prompt=True)
    assert "apply_chat_template" not in vars(tokenizer)


def test_the_date_in_a_template_does_not_change_the_tokens_from_day_to_day():
    tokenizer = shape("llama3_2")
    assert "26 Jul 2024" in tokenizer.decode(tokenization.tokenize_prompts(tokenizer, [PROMPT])[0])


@pytest.mark.parametrize(("files", "expected"), [
    ({"generation_config.json": {"eos_token_id": [1, 7]}, "config.json": {"eos_token_id": 2}}, {1, 7}),
    ({"config.json": {"eos_token_id": 2}}, {2}),
    ({"config.json": {"text_config": {"eos_token_id": [3]}}}, {3}),
    ({"generation_config.json": {}}, set()),
    ({}, set()),
])  # fmt: skip
def test_end_tokens_are_those_of_the_generation_config(
    tmp_path: Path, files: dict[str, Any], expected: set[int]
):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tokenization.listed_end_tokens(tmp_path) == expected


def test_an_adapter_has_the_end_tokens_of_its_base(tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    assert tokenization.listed_end_tokens(adapter) == {1, 7}
    # a reward model's adapter writes the end tokens of its policy into its own folder
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert tokenization.listed_end_tokens(adapter) == {5}


def test_token_ids():
    values = (None, 3, [4, 5], [], True)
    assert [sorted(tokenizer_files.token_ids(v)) for v in values] == [[], [3], [4, 5], [], []]


def test_a_folder_is_read_as_by_transformers(tmp_path: Path):
    for name in ("gemma", "deepseekv3", "qwen3"):
        folder = tmp_path / name
        shape(name, listed=("<end_of_turn>",)).save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [280, 281]}))
        loaded = tokenization.load_tokenizer(folder)
        read = tokenizer_files.read_conversations(folder)
        assert read is not None
        assert (read.ends, read.template.text) == (
            tokenization.end_tokens(loaded), loaded.chat_template
        )  # fmt: skip
        completions = [answer("answer"), answer("the <end_of_turn> </s> <｜User｜> reasons")]
        expected = tokenization.tokenize_rows(loaded, [PROMPT, PROMPT], completions)
        assert read.rows([PROMPT, PROMPT], completions) == expected


def test_a_folder_is_read_with_another_template_and_eos_as_trl_sets_them(tmp_path: Path):
    shape("gemma").save_pretrained(tmp_path / "base")
    shape("qwen2_5", eos="<|im_end|>").save_pretrained(tmp_path / "chatml")
    other = tokenizer_files.read_conversations(tmp_path / "base", template=tmp_path / "chatml")
    assert other is not None and other.end_of_turn().ended
    (tmp_path / "a.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    plain = tokenizer_files.read_conversations(tmp_path / "base", template=tmp_path / "a.jinja")
    assert plain is not None and plain.end_of_turn().ended
    turn = tokenizer_files.read_conversations(tmp_path / "base", eos_token="<end_of_turn>")
    assert turn is not None and turn.end_of_turn().ended
    own = tokenizer_files.read_conversations(tmp_path / "base")
    assert own is not None and not own.end_of_turn().ended
