"""What real chat templates do beyond writing turns: each stage reads the tokens of a policy.

The templates have the structure of real ones: SmolLM2, Phi-3, Gemma, Mistral, Qwen3 and DeepSeek.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.chat_tokenizers import make_tokenizer

from align.config.data import Prepare
from align.errors import UserError
from align.models import tokenization, tokenizer_files
from align.training import token_view

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>a</think>two"},
    {"role": "user", "content": "three"},
]
ANSWER = [{"role": "assistant", "content": "four"}]

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = f"{{% for m in messages %}}{TURN}{{% endfor %}}{HEADER}"
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif -%}"
    "<s>{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}[INST] {{ system }}\n\n{{ m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Trap(NamedTuple):
    """A template, and what the stages read of :data:`CHAT` with :data:`ANSWER`."""

    template: str
    prompt: str
    """The prompt of every stage; of PPO, all of the row."""
    completion: str
    """The completion of DPO, KTO and the reward model."""
    sft: list[list[str]]
    """The trained turns of each token row of SFT."""
    options: dict[str, Any] = {}  # noqa: RUF012


BOTH = ["<think>a</think>two<|im_end|>", "four<|im_end|>"]
CHATML_PROMPT = (
    "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>a</think>two<|im_end|>\n"
    "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
)
CHATML_OPTIONS = {"eos": "<|im_end|>"}
TRAPS = {
    "no generation markers, a line feed behind the end": Trap(
        CHATML, CHATML_PROMPT, "four<|im_end|>", [BOTH], CHATML_OPTIONS
    ),
    "bos opens every turn, and a system turn is inserted unasked": Trap(
        "{% if messages[0].role != 'system' %}{{ bos_token }}system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}",
        f"<|im_start|>system\nBe kind.<|im_end|>\n{CHATML_PROMPT}",
        "four<|im_end|>",
        [BOTH],
        CHATML_OPTIONS | {"bos": "<|im_start|>"},
    ),
    "another eos behind the end": Trap(
        CHATML.replace(HEADER, f"{{% if not add_generation_prompt %}}</s>{{% endif %}}{HEADER}"),
        CHATML_PROMPT,
        "four<|im_end|>",
        [BOTH],
        {"listed": ("<|im_end|>",)},
    ),
    "earlier reasoning is dropped": Trap(
        DROPS + HEADER,
        CHATML_PROMPT.replace("<think>a</think>", ""),
        "four<|im_end|>",
        [BOTH[:1], BOTH[1:]],
        CHATML_OPTIONS,
    ),
    "the generation prompt begins the reasoning": Trap(
        (DROPS + HEADER).replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        CHATML_PROMPT.replace("<think>a</think>", "") + "<think>\n",
        "four<|im_end|>",
        [["a</think>two<|im_end|>"], ["four<|im_end|>"]],
        CHATML_OPTIONS,
    ),
    "a space before the answer": Trap(
        MISTRAL,
        "<s>[INST] one[/INST] <think>a</think>two</s>[INST] three[/INST]",
        " four</s>",
        [[" <think>a</think>two</s>", " four</s>"]],
    ),
    "the end of a turn is not eos": Trap(
        GEMMA,
        "<s><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n<think>a</think>two"
        "<end_of_turn>\n<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n",
        "four<end_of_turn>",
        [["<think>a</think>two<end_of_turn>", "four<end_of_turn>"]],
        {"listed": ("<end_of_turn>",)},
    ),
}


def trap_tokenizer(trap: Trap) -> Any:
    options = dict(trap.options)
    bos = options.pop("bos", "<s>")
    tokenizer = make_tokenizer(trap.template, **options)
    tokenizer.bos_token = bos
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turns(tokenizer: Any, rows: list[Any]) -> list[list[str]]:
    return [[tokenizer.decode(row.ids[a:b]) for a, b in row.turns] for row in rows]


@pytest.mark.parametrize("name", TRAPS)
def test_all_stages_read_what_a_policy_reads_and_writes(name: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    tokenizer = trap_tokenizer(trap)
    (ppo,) = tokenization.tokenize_prompts(tokenizer, [CHAT])
    assert tokenizer.decode(ppo) == trap.prompt
    (reward,) = tokenization.tokenize_for_reward(tokenizer, [CHAT], [ANSWER])
    assert tokenizer.decode(reward) == trap.prompt + trap.completion
    with tokenization.rows_for_trl(tokenizer, end_repair="add it"):  # TRL's calls of DPO and KTO
        prompt = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
        row = tokenizer.apply_chat_template(CHAT + ANSWER, tokenize=True)
    assert prompt["input_ids"] == ppo and row["input_ids"] == reward
    conversations = tokenization.conversations(tokenizer)
    (rows,) = conversations.trained_rows([CHAT], [ANSWER], train_on="all")
    assert turns(tokenizer, rows) == trap.sft
    assert rows[-1].ids == reward
    (last,) = conversations.trained_rows([CHAT], [ANSWER], train_on="last")
    assert turns(tokenizer, last) == [[trap.completion]]
    # a finished answer is read as the policy wrote it
    answer = [{"role": "assistant", "content": trap.completion.rpartition("<")[0]}]
    assert tokenization.tokenize_for_reward(tokenizer, [CHAT], [answer]) == [reward]
    # `align check` reads the files of the folder
    tokenizer.save_pretrained(tmp_path)
    ends = sorted(tokenization.end_tokens(tokenizer))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    read = tokenizer_files.read_conversations(tmp_path)
    assert read is not None
    assert read.trained_rows([CHAT], [ANSWER], train_on="all") == [rows]


@pytest.mark.parametrize(
    ("template", "prompt", "sft"),
    [
        pytest.param(
            MISTRAL,
            "<s>[INST] one[/INST] <think>a</think>two</s>[INST] Be brief.\n\nthree[/INST]",
            [[" <think>a</think>two</s>"], [" four</s>"]],
            id="into the last user turn, until it is answered",
        ),
        pytest.param(
            GEMMA.replace("<end_of_turn>", "</s>"),
            "<s><start_of_turn>user\nBe brief.\n\none</s>\n<start_of_turn>model\n<think>a</think>two"
            "</s>\n<start_of_turn>user\nthree</s>\n<start_of_turn>model\n",
            [["<think>a</think>two</s>", "four</s>"]],
            id="into the first user turn",
        ),
    ],
)
def test_a_system_turn_that_is_written_elsewhere(
    template: str, prompt: str, sft: list[list[str]]
) -> None:
    tokenizer = make_tokenizer(template)
    tokenizer.bos_token = "<s>"
    chat = [SYSTEM, *CHAT]
    (row,) = tokenization.tokenize_for_reward(tokenizer, [chat], [ANSWER])
    assert tokenizer.decode(row) == prompt + sft[-1][-1]
    conversations = tokenization.conversations(tokenizer)
    (rows,) = conversations.trained_rows([chat], [ANSWER], train_on="all")
    assert turns(tokenizer, rows) == sft and rows[-1].ids == row
    sampled = [{"role": "assistant", "content": sft[-1][-1].removesuffix("</s>")}]
    assert tokenization.tokenize_for_reward(tokenizer, [chat], [sampled]) == [row]
    short = [SYSTEM, CHAT[0]]
    (row,) = tokenization.tokenize_for_reward(tokenizer, [short], [ANSWER])
    assert tokenizer.decode(row).endswith(
        f"Be brief.\n\none{prompt[prompt.rfind('three') + 5 :]}" + sft[-1][-1]
    )


def test_a_system_turn_that_is_refused_is_an_error_in_every_stage() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    tokenizer = make_tokenizer(refuses + CHATML, eos="<|im_end|>")
    conversations = tokenization.conversations(tokenizer)
    chat = [SYSTEM, *CHAT]
    for call in (
        lambda: conversations.prompts([chat]),
        lambda: conversations.rows([chat], [ANSWER]),
        lambda: conversations.trained_rows([chat], [ANSWER], train_on="all"),
    ):
        with pytest.raises(UserError, match=r"roles system, user.*: No system\.; remove such rows"):
            call()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "reward"])
def test_where_pad_is_eos_the_end_is_trained(stage: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "one", "chosen": "a longer answer than others", "rejected": "two"},
        {"prompt": "three", "chosen": "four", "rejected": "a longer answer than four"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Prepare(source=str(file), test_fraction=0.0)
    shown = token_view.tokenized_rows(settings, stage, str(tmp_path / "model"), 2)
    assert len(shown) == {"dpo": 4, "reward": 4}.get(stage, 2)
    for row in shown:
        assert row.tokens[-1] == "<|im_end|>" and row.trained[-1]
        assert row.tokens.count("<|im_end|>") == 2  # of the user's turn and of the answer
        assert "is included and trained" in row.remark
