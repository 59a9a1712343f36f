"""Invalid input: each case exits with code 2 and a line with the place, the key and the repair."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from align.runtime import checksums

Files = Mapping[str, str | bytes]
Launch = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[2]
PREPARE = "prepare: {source: embedded, test_fraction: 0.1, max_rows: 40}"
SFT = "sft: {model: {vocab_size: 512}, trainer: {bf16: false}}"
DPO = "dpo: {model: sft}"


def recipe(*stages: str) -> str:
    """A recipe with ``stages:`` in line 1, and one line for each stage."""
    return "\n".join(["stages:", *(f"  {stage}" for stage in stages)]) + "\n"


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def invalid(
    phrase: str,
    text: str | bytes,
    *expected: str,
    files: Files | None = None,
    arguments: tuple[str, ...] = (),
) -> Any:
    """One case: one line of the output contains all of ``expected`` (place, key, error, repair)."""
    files = {"recipe.yaml": text, **(files or {})}
    return pytest.param(files, ("recipe.yaml", *arguments), expected, id=phrase)


def check(code: int, out: str, err: str, expected: tuple[str, ...]) -> None:
    assert code == 2, out + err
    assert "Traceback" not in out + err
    assert any(all(piece in line for piece in expected) for line in err.splitlines()), err
    assert [line for line in err.splitlines() if repeats_key(line)] == []


def repeats_key(line: str) -> bool:
    """Whether the message after the place begins with the key of the place, or with its end."""
    place = re.match(r".*?(?::\d+|command line): ([\w.]+): ([\w.]+): ", line)
    return place is not None and f".{place[1]}".endswith(f".{place[2]}")


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


# Keys and values

KEYS = [
    invalid(
        "a misspelled key",
        recipe(PREPARE, SFT, "dpo: {model: sft, bta: 0.2}"),
        "recipe.yaml:4: dpo.bta: unknown key; did you mean `beta`?",
    ),
    invalid(
        "a misspelled key in a mapping below a stage",
        recipe(PREPARE, "sft: {model: {vocab_sise: 512}}"),
        "recipe.yaml:3: sft.model.vocab_sise: unknown key; did you mean `vocab_size`?",
    ),
    invalid(
        "a key without a similar one",
        recipe(PREPARE, SFT, "dpo: {model: sft, lora: {zzz: 1}}"),
        "recipe.yaml:4: dpo.lora.zzz: unknown key; known: r, alpha, dropout, target_modules",
    ),
    invalid(
        "a field of the trainer on the stage",
        recipe(PREPARE, SFT, "dpo: {model: sft, learning_rate: 0.1}"),
        "recipe.yaml:4: dpo.learning_rate: unknown key",
        "TRL's DPOConfig; put it under `trainer:`",
    ),
    invalid(
        "a misspelled field of the trainer",
        recipe(PREPARE, "sft:", "  model: {}", "  trainer:", "    learning_rat: 0.1"),
        "recipe.yaml:6: sft.trainer.learning_rat: no field of TRL's SFTConfig",
        "did you mean `learning_rate`?",
    ),
    invalid(
        "a field of DPO on SFT",
        recipe(PREPARE, "sft: {model: {}, trainer: {label_smoothing: 0.1}}"),
        "recipe.yaml:3: sft.trainer.label_smoothing: no field of TRL's SFTConfig",
        "did you mean `label_smoothing_factor`?",
    ),
    invalid(
        "a key of the stage under trainer",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {lora: {r: 8}}}"),
        "recipe.yaml:4: dpo.trainer.lora: no field of TRL's DPOConfig",
        "`lora` is a key of the stage",
    ),
    invalid(
        "the seed under trainer",
        recipe(PREPARE, "sft: {model: {}, trainer: {seed: 1}}"),
        "recipe.yaml:3: sft.trainer.seed: cannot be set under `trainer`; set `seed` on the stage",
    ),
    invalid(
        "an output folder",
        recipe(PREPARE, "sft: {model: {}, trainer: {output_dir: out}}"),
        "recipe.yaml:3: sft.trainer.output_dir: cannot be set under `trainer`",
        "`--runs`",
    ),
    invalid(
        "an unknown key at the top",
        "stage:\n  prepare: {source: embedded}\n",
        "recipe.yaml:1: stage: unknown key; did you mean `stages`?",
    ),
    invalid(
        "a stage at the top",
        recipe(PREPARE) + "dpo: {model: sft}\n",
        "recipe.yaml:3: dpo: unknown key; a stage goes under `stages:`",
    ),
    invalid(
        "a duplicate key",
        recipe("prepare:", "  source: embedded", "  test_fraction: 0.1", "  source: other"),
        "recipe.yaml:5: stages.prepare: duplicate key `source`, first in line 3; remove one",
    ),
    invalid(
        "a missing required key",
        recipe(PREPARE, SFT, "dpo: {beta: 0.2}"),
        "recipe.yaml:4: dpo.model: missing; it has no default",
    ),
    invalid(
        "an unknown column name",
        recipe("prepare: {source: embedded, columns: {choosen: better}}"),
        "recipe.yaml:2: prepare.columns.choosen: not a column of Align; did you mean `chosen`?",
    ),
]

VALUES = [
    invalid(
        "a number that YAML reads as text",
        recipe(PREPARE, SFT, "dpo: {model: sft, beta: 5e-2}"),
        "recipe.yaml:4: dpo.beta: expected a number, got the text '5e-2'",
        "write 5.0e-2",
    ),
    invalid(
        "a learning rate that YAML reads as text",
        recipe(PREPARE, "sft: {model: {}, trainer: {learning_rate: 5e-7}}"),
        "recipe.yaml:3: sft.trainer.learning_rate: expected a number, got the text '5e-7'",
        "write 5.0e-7",
    ),
    invalid(
        "a number in quotes",
        recipe(PREPARE, "sft: {model: {vocab_size: '512'}}"),
        "recipe.yaml:3: sft.model.vocab_size: expected a whole number, got the text '512'",
        "write it without quotes",
    ),
    invalid(
        "a fraction for a whole number",
        recipe("prepare: {source: embedded, max_rows: 1.5}"),
        "recipe.yaml:2: prepare.max_rows: expected a whole number, got 1.5",
    ),
    invalid(
        "no where text is expected",
        recipe(PREPARE, SFT, "dpo: {model: no}"),
        "recipe.yaml:4: dpo.model: expected text, got no, which YAML reads as false",
        "write 'no' in quotes",
    ),
    invalid(
        "no as an evaluation strategy",
        recipe(PREPARE, "sft: {model: {}, trainer: {eval_strategy: no}}"),
        "recipe.yaml:3: sft.trainer.eval_strategy: expected text, got no",
        "write 'no' in quotes",
    ),
    invalid(
        "text for true or false",
        recipe(PREPARE, "sft: {model: {}, trainer: {bf16: please}}"),
        "recipe.yaml:3: sft.trainer.bf16: expected true or false, got the text 'please'",
    ),
    invalid(
        "true for a mapping",
        recipe(PREPARE, SFT, "dpo: {model: sft, lora: true}"),
        "recipe.yaml:4: dpo.lora: expected a mapping (key: value), got true",
    ),
    invalid(
        "a text for a list",
        recipe(PREPARE, SFT, "evaluate: {policies: sft, baseline: sft, judge: gold}"),
        "recipe.yaml:4: evaluate.policies: expected a list, got the text 'sft'",
    ),
    invalid(
        "a list for a stage",
        recipe("prepare: [embedded]"),
        "recipe.yaml:2: prepare: expected a mapping (key: value), got a list",
    ),
    invalid(
        "a number that is too small",
        recipe(PREPARE, SFT, "dpo: {model: sft, beta: 0}"),
        "recipe.yaml:4: dpo.beta: must be greater than 0, got 0",
    ),
    invalid(
        "a negative learning rate",
        recipe(PREPARE, "sft: {model: {}, trainer: {learning_rate: -0.1}}"),
        "recipe.yaml:3: sft.trainer.learning_rate: must be at least 0, got -0.1",
    ),
    invalid(
        "fractions that leave no training rows",
        recipe("prepare: {source: embedded, test_fraction: 0.5, validation_fraction: 0.5}"),
        "recipe.yaml:2: prepare: `test_fraction` and `validation_fraction`",
        "must sum to less than 1",
    ),
    invalid(
        "an unknown choice",
        recipe(PREPARE, "sft: {model: {}, dtype: bf16}"),
        "recipe.yaml:3: sft.dtype: expected 'float32' or 'bfloat16', got the text 'bf16'",
        "did you mean `bfloat16`?",
    ),
    *(
        invalid(
            f"bfloat16 in full fine-tuning: {stage}",
            recipe(PREPARE, SFT, f"{stage}: {{model: {start}, dtype: bfloat16}}"),
            f"recipe.yaml:4: {stage}: `dtype: bfloat16` rounds small updates to zero",
            "(mixed precision: `trainer: {bf16: true}`), or set `lora`",
        )
        for stage, start in (("dpo", "sft"), ("kto", "sft"), ("reward", "sft"))
    ),
    invalid(
        "bfloat16 in full fine-tuning: sft",
        recipe(PREPARE, "sft: {model: {}, dtype: bfloat16}"),
        "recipe.yaml:3: sft: `dtype: bfloat16` rounds small updates to zero",
    ),
    invalid(
        "an unknown loss",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {loss_type: sigmod}}"),
        "recipe.yaml:4: dpo.trainer.loss_type: no such loss_type: sigmod",
        "did you mean `sigmoid`?",
    ),
    invalid(
        "an unknown loss in a list",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {loss_type: [sft, bco_par]}}"),
        "recipe.yaml:4: dpo.trainer.loss_type.1: no such loss_type: bco_par",
        "did you mean `bco_pair`?",
    ),
    invalid(
        "an unknown divergence",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {f_divergence_type: kl}}"),
        "recipe.yaml:4: dpo.trainer.f_divergence_type: no such f_divergence_type: kl",
        "known: reverse_kl, forward_kl, js_divergence, alpha_divergence",
    ),
]

MEANING = [
    invalid(
        "exo_pair without label smoothing",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {loss_type: exo_pair}}"),
        "recipe.yaml:4: dpo.trainer.loss_type: `exo_pair`",
        "set `label_smoothing` above 0",
    ),
    invalid(
        "another chat template for a reward model than for its policy",
        recipe(PREPARE, SFT, "reward: {model: sft, trainer: {eos_token: <|im_end|>}}"),
        "recipe.yaml:4: reward.trainer.eos_token: a reward model reads the tokens of its policy",
        "set this key in the `sft` stage",
    ),
    invalid(
        "evaluation during training without a validation split",
        recipe(PREPARE, "sft: {model: {}, trainer: {eval_strategy: steps}}"),
        "recipe.yaml:3: sft.trainer.eval_strategy: `prepare` has no validation split",
        "set `prepare.validation_fraction` above 0",
    ),
    invalid(
        "evaluate on a split that is not held out",
        recipe(
            PREPARE,
            SFT,
            "evaluate: {policies: [sft], baseline: sft, judge: gold, split: validation}",
        ),
        "recipe.yaml:4: evaluate.split: `prepare` has no validation split",
        "set `prepare.validation_fraction` above 0",
    ),
    invalid(
        "evaluate with nothing to measure",
        recipe(PREPARE, SFT, "evaluate: {policies: [sft], baseline: sft}"),
        "recipe.yaml:4: evaluate: nothing to measure; set `judge`, or",
    ),
    invalid(
        "a duplicate policy",
        recipe(PREPARE, SFT, "evaluate: {policies: [sft, sft], baseline: sft, judge: gold}"),
        "recipe.yaml:4: evaluate.policies: `sft` is listed more than once; list it once",
    ),
    invalid(
        "adapters on a new model",
        recipe(PREPARE, "sft: {model: {}, lora: {r: 8}}"),
        "recipe.yaml:3: sft: `lora` freezes the weights, which are random in a new model; remove `lora`",
    ),
    invalid(
        "another shape for an adapter that is trained further",
        recipe(
            PREPARE, "sft: {model: a/b, lora: {r: 8}}", "dpo: {model: sft, lora: {r: 4, alpha: 8}}"
        ),
        "recipe.yaml:4: dpo.lora: training continues with the adapter of `sft`",
        "without `lora` the adapter is merged",
    ),
    invalid(
        "another shape for an adapter that a second sft trains further",
        recipe(
            PREPARE,
            "sft: {model: a/b, lora: {r: 8}}",
            "sft_2: {stage: sft, model: sft, lora: {r: 4}}",
        ),
        "recipe.yaml:4: sft_2.lora: training continues with the adapter of `sft`",
    ),
    invalid(
        "dropout of adapters where TRL switches it off",
        recipe(PREPARE, "dpo: {model: a/b, lora: {dropout: 0.1}}"),
        "recipe.yaml:3: dpo.lora.dropout: no effect, because this stage trains without dropout; "
        "remove it, or set `trainer: {disable_dropout: false}`",
    ),
    invalid(
        "batches that are not even",
        recipe(
            PREPARE,
            "dpo: {model: a/b, trainer: {accelerator_config: {even_batches: false}}}",
        ),
        "recipe.yaml:3: dpo.trainer.accelerator_config.even_batches: processes with fewer batches",
    ),
    invalid(
        "dropout of adapters in ppo",
        recipe(
            PREPARE,
            "ppo: {model: a/b, rewards: [a:b], steps: 1, batch_size: 2, lora: {dropout: 0.1}}",
        ),
        "recipe.yaml:3: ppo.lora.dropout: no effect, because this stage trains without dropout; "
        "remove it",
    ),
    invalid(
        "attention heads that do not divide the width",
        recipe(PREPARE, "sft: {model: {hidden_size: 100}}"),
        "recipe.yaml:3: sft.model: `hidden_size` (100) must be a multiple of twice",
    ),
]

REFERENCES = [
    invalid(
        "a misspelled stage as input",
        recipe(PREPARE, SFT, "dpo: {model: stf}"),
        "recipe.yaml:4: dpo.model: no earlier stage `stf`; did you mean `sft`?",
    ),
    invalid(
        "an input that runs later",
        recipe(PREPARE, "dpo: {model: sft}", SFT),
        "recipe.yaml:3: dpo.model: stage `sft` does not precede `dpo`",
    ),
    invalid(
        "an input of the wrong kind",
        recipe(PREPARE, SFT, "dpo: {model: sft, pairs: sft}"),
        "recipe.yaml:4: dpo.pairs: stage `sft` is of kind `sft`; expected prepare",
    ),
    invalid(
        "a missing default input",
        recipe(SFT),
        "recipe.yaml:2: sft.demonstrations: no earlier stage `prepare`",
    ),
    invalid(
        "a missing model folder",
        recipe(PREPARE, "sft: {model: ./models/tiny}"),
        "recipe.yaml:3: sft.model: no such folder: ./models/tiny; name an earlier stage",
    ),
    invalid(
        "a missing second policy",
        recipe(PREPARE, SFT, "evaluate: {policies: [sft, dpo], baseline: sft, judge: gold}"),
        "recipe.yaml:4: evaluate.policies.1: no earlier stage `dpo`; earlier stages that fit: sft",
    ),
    invalid(
        "a reward model without a stage that trains it",
        recipe(PREPARE, SFT, "ppo: {model: sft, rewards: [reward], steps: 1, batch_size: 4}"),
        "recipe.yaml:4: ppo.rewards.0: no earlier stage `reward`; earlier stages that fit: none",
        "a function is module:function",
    ),
    invalid(
        "a text for a list of rewards",
        recipe(PREPARE, SFT, "ppo: {model: sft, rewards: reward, steps: 1, batch_size: 4}"),
        "recipe.yaml:4: ppo.rewards: expected a list, got the text 'reward'",
        "(a list of one item is written [reward])",
    ),
    invalid(
        "the beginning of a key",
        recipe("control: {env: CartPole-v1, steps: 100}"),
        "recipe.yaml:2: control.env: unknown key; did you mean `environment`?",
    ),
    invalid(
        "a forced stage that is not needed",
        recipe(PREPARE, SFT, "dpo: {model: sft}"),
        "--force dpo: `--until sft` does not need this stage; remove one of the two",
        arguments=("--until", "sft", "--force", "dpo"),
    ),
    invalid(
        "the home folder of an unknown user",
        recipe(PREPARE, "sft: {model: ~nobody-of-this-name/model}"),
        "recipe.yaml:3: sft.model: invalid path",
        "name an earlier stage, or a folder",
    ),
]

RECIPES = [
    invalid(
        "an unknown kind of stage",
        recipe(PREPARE, "dop: {model: sft}"),
        "recipe.yaml:3: dop: no kind of stage is called `dop`; did you mean `dpo`?",
    ),
    invalid(
        "another name without a kind",
        recipe(PREPARE, SFT, "low_beta: {model: sft}"),
        "recipe.yaml:4: low_beta: no kind of stage is called `low_beta`",
        "needs `stage: KIND`",
    ),
    invalid(
        "another name with an unknown kind",
        recipe(PREPARE, SFT, "low_beta: {stage: DPO, model: sft}"),
        "recipe.yaml:4: low_beta.stage: expected a kind of stage, got the text 'DPO'",
        "known: prepare, sft, dpo, reward, kto, ppo, grpo, rloo, reinforce, sample, label, evaluate",
    ),
    invalid(
        "a stage's name in capitals",
        recipe("Prepare: {source: embedded}"),
        "recipe.yaml:2: Prepare: the name of a stage must consist of at most 64 lower-case letters, digits and _",
    ),
    invalid("an empty file", "", "recipe.yaml:1: expected a mapping with `stages:`, got nothing"),
    invalid(
        "a list for a recipe",
        "- prepare\n",
        "recipe.yaml:1: expected a mapping with `stages:`, got a list",
    ),
    invalid(
        "no stages", "stages:\n", "recipe.yaml:1: stages: expected a mapping of stages, got nothing"
    ),
    invalid(
        "an unclosed bracket",
        recipe("prepare: {source: embedded"),
        "recipe.yaml:3: not YAML: expected ',' or '}'",
    ),
    invalid(
        "a tab instead of spaces", "stages:\n\tprepare: {}\n", "recipe.yaml:2: not YAML: ", "'\\t'"
    ),
    invalid(
        "a merge key",
        "stages:\n  prepare: &a {source: embedded}\n  other: {<<: *a, stage: prepare}\n",
        "recipe.yaml:3: stages.other: `<<` is not supported; write the keys out",
    ),
    invalid("a recipe that is not text", b"\xff\xfe\x00", "recipe.yaml: cannot be read"),
    invalid(
        "a missing needed recipe",
        "needs: [stf.yaml]\n" + recipe(PREPARE),
        "recipe.yaml:1: needs: stf.yaml: no such recipe; there are recipe.yaml",
    ),
    invalid(
        "an error in a needed recipe",
        "needs: [first.yaml]\nstages: {}\n",
        "first.yaml:2: prepare.sorce: unknown key; did you mean `source`?",
        files={"first.yaml": recipe("prepare: {sorce: embedded}")},
    ),
    invalid(
        "recipes that need each other",
        "needs: [other.yaml]\n" + recipe(PREPARE),
        "other.yaml:1: needs: a cycle: recipe.yaml → other.yaml → recipe.yaml",
        "remove one of these `needs`",
        files={"other.yaml": "needs: [recipe.yaml]\n"},
    ),
    invalid(
        "a mapping for needs",
        "needs: {sft: true}\n" + recipe(PREPARE),
        "recipe.yaml:1: needs: expected a list of recipes, such as [sft.yaml], got a mapping",
    ),
    invalid(
        "one stage in two recipes",
        "needs: [first.yaml]\n" + recipe(PREPARE),
        "recipe.yaml:3: prepare: first.yaml:2 already has a stage of this name",
        "rename this one to `prepare_2:",
        files={"first.yaml": recipe(PREPARE)},
    ),
]

# The command line

WHOLE = recipe(PREPARE, SFT, DPO)
COMMANDS = [
    invalid(
        "an override of an unknown stage",
        WHOLE,
        "command line: dop.beta=0.2: no stage `dop`; did you mean `dpo`?",
        arguments=("dop.beta=0.2",),
    ),
    invalid(
        "an override of an unknown key",
        WHOLE,
        "command line: dpo.bet: unknown key; did you mean `beta`?",
        arguments=("dpo.bet=0.2",),
    ),
    invalid(
        "an override of the wrong type",
        WHOLE,
        "command line: dpo.beta: expected a number, got the text 'much'",
        arguments=("dpo.beta=much",),
    ),
    invalid(
        "an override of an unknown field of the trainer",
        WHOLE,
        "command line: dpo.trainer.max_step: no field of TRL's DPOConfig",
        "did you mean `max_steps`?",
        arguments=("dpo.trainer.max_step=3",),
    ),
    invalid(
        "an override without a value",
        WHOLE,
        "command line: dpo.beta: expected STAGE.KEY=VALUE, such as dpo.beta=0.2",
        arguments=("dpo.beta",),
    ),
    invalid(
        "an override of a key that no stage has",
        WHOLE,
        "command line: all.sede=1: no stage has a key `sede`",
        arguments=("all.sede=1",),
    ),
    invalid(
        "an override below a number",
        WHOLE,
        "command line: prepare.test_fraction.x: `prepare.test_fraction` has no keys below it",
        arguments=("prepare.test_fraction.x=1",),
    ),
    invalid(
        "until an unknown stage",
        WHOLE,
        "--until dop: no such stage; did you mean `dpo`?",
        arguments=("--until", "dop"),
    ),
    invalid(
        "force an unknown stage",
        WHOLE,
        "--force stf: no such stage; did you mean `sft`?",
        arguments=("--force", "stf"),
    ),
    invalid(
        "an unknown option",
        WHOLE,
        "No such option: --frce",
        "--force",
        arguments=("--frce", "all"),
    ),
    invalid(
        "a file instead of the runs folder",
        WHOLE,
        "taken: cannot be written (",
        "choose another folder with --runs",
        files={"taken": ""},
        arguments=("--runs", "taken"),
    ),
    invalid(
        "a runs folder that libraries read as an address",
        WHOLE,
        "runs-12:30: the libraries for tables read a path with `:` as an address",
        "choose another folder with --runs",
        arguments=("--runs", "runs-12:30"),
    ),
    invalid(
        "a runs folder that is not writable",
        WHOLE,
        "/proc/runs: cannot be written (",
        "choose another folder with --runs",
        arguments=("--runs", "/proc/runs"),
    ),
]

# Data

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(20)]


def data(
    phrase: str, source: str, *expected: str, files: Files | None = None, more: str = ""
) -> Any:
    """A case of one ``prepare`` stage, in line 2."""
    text = recipe(f"prepare: {{source: {source}{more}}}")
    return invalid(phrase, text, "recipe.yaml:2: prepare", *expected, files=files)


DATA = [
    data(
        "a missing data file",
        "pairs.jsonl",
        ".source: pairs.jsonl: no such file or folder; did you mean `pair.jsonl`?",
        files={"pair.jsonl": jsonl(*ROWS)},
    ),
    data(
        "missing demonstrations",
        "embedded",
        "demos.jsonl: no such file or folder",
        more=", demonstrations: demos.jsonl",
    ),
    data(
        "a misspelled embedded",
        "embeded",
        "embeded: no such file or folder",
        "did you mean `embedded`?",
    ),
    data(
        "a Hub data set while offline",
        "somebody/something",
        "somebody/something",
        "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a local file",
    ),
    data(
        "an invalid name of a data set",
        "what is this",
        "'what is this': not a file, a folder, or a Hub id (owner/name)",
    ),
    data(
        "an unknown kind of file",
        "pairs.txt",
        "pairs.txt: unknown file format; expected one of .jsonl",
        files={"pairs.txt": "hello"},
    ),
    data(
        "a folder without data",
        "folder",
        "folder: no data files (",
        "found `notes.md`",
        files={"folder/notes.md": "hello"},
    ),
    data(
        "a missing column",
        "pairs.jsonl",
        "pairs.jsonl: no column `rejected`; found `prompt`, `chosen`, `reject`",
        "map it with `columns: {rejected: reject}`",
        files={"pairs.jsonl": jsonl({"prompt": "p", "chosen": "c", "reject": "r"})},
    ),
    data(
        "columns mapped to a missing column",
        "pairs.jsonl",
        "columns: {rejected: wors}: no column `wors`; did you mean `worse`?",
        files={"pairs.jsonl": jsonl({"prompt": "p", "chosen": "c", "worse": "r"})},
        more=", columns: {rejected: wors}",
    ),
    data(
        "columns of an unknown format",
        "pairs.jsonl",
        "pairs.jsonl: found `a`; expected `prompt`, `chosen`, `rejected`",
        "map them with `columns: {prompt: ...}`",
        files={"pairs.jsonl": jsonl({"a": 1})},
    ),
    data(
        "empty completions",
        "pairs.jsonl",
        "pairs.jsonl: none of 20 pairs is usable: 20 blank completion",
        files={"pairs.jsonl": jsonl(*({**row, "chosen": " "} for row in ROWS))},
    ),
    data(
        "chosen equal to rejected",
        "pairs.jsonl",
        "pairs.jsonl: none of 20 pairs is usable: 20 chosen equals rejected",
        files={"pairs.jsonl": jsonl(*({**row, "rejected": row["chosen"]} for row in ROWS))},
    ),
    data(
        "transcripts read as completions",
        "pairs.jsonl",
        "pairs.jsonl: the rows are transcripts; read them with `reader: hh`",
        files={
            "pairs.jsonl": jsonl(
                dict.fromkeys(["chosen", "rejected"], "\n\nHuman: a\n\nAssistant: b")
            )
        },
    ),
    data(
        "plain columns read as transcripts",
        "pairs.jsonl",
        "`reader: hh` does not read them; set `reader: columns`",
        files={"pairs.jsonl": jsonl(*ROWS)},
        more=", reader: hh",
    ),
    data(
        "no completion labeled true",
        "labels.jsonl",
        "labels.jsonl: no completion is labeled true",
        "set `demonstrations` to another source",
        files={"labels.jsonl": jsonl({"prompt": "p", "completion": "c", "label": False})},
    ),
    data(
        "too few prompts to hold one out",
        "pairs.jsonl",
        "test_fraction: 0.001: none of 20 prompts is in split `test`",
        "raise it, set it to 0, add prompts or change `split_seed`",
        files={"pairs.jsonl": jsonl(*ROWS)},
        more=", test_fraction: 0.001",
    ),
    data(
        "a line that is not JSON",
        "pairs.jsonl",
        "pairs.jsonl:2: not JSON: ",
        "at column 1",
        files={"pairs.jsonl": jsonl(ROWS[0]) + "chosen,rejected\n"},
    ),
    data(
        "a line that is not an object",
        "pairs.jsonl",
        "pairs.jsonl:2: expected an object, got a list",
        files={"pairs.jsonl": jsonl(ROWS[0]) + "[1]\n"},
    ),
    data(
        "JSONL in a file named .json",
        "pairs.json",
        "pairs.json:2: not JSON: Extra data; a file with one object per line is JSONL: name it .jsonl",
        files={"pairs.json": jsonl(*ROWS)},
    ),
    data(
        "text in another encoding",
        "pairs.jsonl",
        "pairs.jsonl:1: not UTF-8 at byte 13; save it as UTF-8",
        files={"pairs.jsonl": '{"prompt": "é"}'.encode("latin-1")},
    ),
    data(
        "an empty data file",
        "pairs.jsonl",
        "pairs.jsonl: no rows; found 1 empty file",
        files={"pairs.jsonl": ""},
    ),
    data(
        "an incomplete download",
        "pairs.jsonl.gz",
        "pairs.jsonl.gz: a truncated or damaged gzip file",
        "download it again",
        files={"pairs.jsonl.gz": gzip.compress(jsonl(*ROWS).encode())[:-20]},
    ),
    data(
        "a plain file named .gz",
        "pairs.jsonl.gz",
        "pairs.jsonl.gz: not a gzip file; rename it",
        files={"pairs.jsonl.gz": jsonl(*ROWS)},
    ),
    data(
        "an unquoted comma",
        "pairs.csv",
        "pairs.csv:2: expected 3 cells, got 4; put text with commas in double quotes",
        files={"pairs.csv": "prompt,chosen,rejected\na,b,c,d\n"},
    ),
    data(
        "a duplicate column",
        "pairs.csv",
        "pairs.csv:1: two columns are named `chosen`; rename one",
        files={"pairs.csv": "prompt,chosen,chosen\na,b,c\n"},
    ),
    data(
        "a file that is not Parquet",
        "pairs.parquet",
        "pairs.parquet: not Parquet: ",
        files={"pairs.parquet": b"PAR1" * 4},
    ),
    data(
        "a source with a name that is too long",
        "x" * 300,
        "invalid path",
    ),
]

# Folders

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(32)
MODEL = {
    "base/config.json": json.dumps({"model_type": "llama"}),
    "base/model.safetensors": WEIGHTS,
    "base/tokenizer.json": "{}",
}


def finished(stage: str) -> str:
    """An ``artifact.json`` as a finished stage leaves it."""
    content = {
        "stage": stage,
        "name": stage,
        "digest": "0" * 64,
        "recipe": {},
        "inputs": {},
        "metrics": {},
        "versions": {},
        "commit": None,
        "seed": 0,
        "world_size": 1,
        "seconds": 1.0,
        "peak_memory_bytes": None,
    }
    return json.dumps(checksums.seal(content))


def model(phrase: str, changed: Mapping[str, str | bytes | None], *expected: str) -> Any:
    """A case of SFT on the folder ``base``, which differs from a whole one in some files."""
    files = {name: content for name, content in {**MODEL, **changed}.items() if content is not None}
    text = recipe(PREPARE, "sft: {model: ./base}")
    return invalid(phrase, text, "recipe.yaml:3: sft.model: ", *expected, files=files)


FOLDERS = [
    model(
        "a folder without a model",
        {"base/config.json": None},
        "base: no config.json, so it contains no model; set a folder in Hugging Face layout",
    ),
    model(
        "truncated weights",
        {"base/model.safetensors": WEIGHTS[:-8]},
        "base/model.safetensors: malformed or truncated: ",
        "download or save the model again",
    ),
    model(
        "a Git LFS pointer instead of weights",
        {"base/model.safetensors": "version https://git-lfs.github.com/spec/v1\n"},
        "base/model.safetensors: malformed or truncated: ",
    ),
    model(
        "no weights",
        {"base/model.safetensors": None},
        "base: no weights; expected model.safetensors",
    ),
    model(
        "one of several weight files missing",
        {
            "base/model.safetensors": None,
            "base/model.safetensors.index.json": json.dumps({"weight_map": {"w": "m-1-of-1.st"}}),
        },
        "base/m-1-of-1.st: missing, although model.safetensors.index.json lists it",
    ),
    model(
        "an index without weights",
        {"base/model.safetensors.index.json": "{}"},
        "base/model.safetensors.index.json: no `weight_map`; download or save the model again",
    ),
    model(
        "a truncated model configuration",
        {"base/config.json": '{"model_type": '},
        "base/config.json: cannot be read as JSON",
        "download or save the model again",
    ),
    model(
        "a model configuration that is a list",
        {"base/config.json": "[]"},
        "base/config.json: not a JSON object; save the model again",
    ),
    model(
        "a model without its tokenizer",
        {"base/tokenizer.json": None},
        "base: no tokenizer; expected tokenizer.json",
    ),
    invalid(
        "an unfinished stage as data",
        recipe("sft: {model: {}, demonstrations: ./runs/prepare-0123}"),
        "recipe.yaml:2: sft.demonstrations: runs/prepare-0123: no artifact.json",
        "so its stage is not finished; run its recipe again",
        files={"runs/prepare-0123/README.md": ""},
    ),
    invalid(
        "an unfinished stage as a model",
        recipe(PREPARE, "dpo: {model: ./base}"),
        "recipe.yaml:3: dpo.model: base: no artifact.json",
        "so its stage is not finished; run its recipe again",
        files={**MODEL, "base/.working": "{}"},
    ),
    invalid(
        "a finished stage of the wrong kind",
        recipe(PREPARE, "sft: {model: {}, demonstrations: ./base}"),
        "recipe.yaml:3: sft.demonstrations: base is a finished `dpo` stage; expected prepare",
        files={**MODEL, "base/artifact.json": finished("dpo")},
    ),
    invalid(
        "an artifact of another version",
        recipe(PREPARE, "dpo: {model: ./base}"),
        "recipe.yaml:3: dpo.model: base/artifact.json: has no checksum: damaged, or of an earlier version",
        "or run its stage with --force",
        files={**MODEL, "base/artifact.json": '{"stage": "sft"}'},
    ),
]

# Labels and samples

LABELS = [
    invalid(
        "batches of one for KTO",
        recipe(PREPARE, SFT, "kto: {model: sft, trainer: {per_device_train_batch_size: 1}}"),
        "recipe.yaml:4: kto.trainer.per_device_train_batch_size: must be at least 2, because every batch holds both labels, got 1",
    ),
    invalid(
        "a sampling strategy for KTO",
        recipe(PREPARE, SFT, "kto: {model: sft, trainer: {train_sampling_strategy: random}}"),
        "recipe.yaml:4: kto.trainer.train_sampling_strategy: rows are shuffled with `seed` in every epoch",
        "remove this key",
    ),
    invalid(
        "persistent workers for KTO",
        recipe(PREPARE, SFT, "kto: {model: sft, trainer: {dataloader_persistent_workers: true}}"),
        "recipe.yaml:4: kto.trainer.dataloader_persistent_workers: its workers would keep the order of the first epoch",
    ),
    invalid(
        "a weight of KTO under trainer",
        recipe(PREPARE, SFT, "kto: {model: sft, trainer: {desirable_weight: 2.0}}"),
        "recipe.yaml:4: kto.trainer.desirable_weight: cannot be set under `trainer`; set `desirable_weight` on the stage",
    ),
    invalid(
        "a weight of zero",
        recipe(PREPARE, SFT, "kto: {model: sft, undesirable_weight: 0.0}"),
        "recipe.yaml:4: kto.undesirable_weight: must be greater than 0, got 0.0",
    ),
    invalid(
        "KTO on demonstrations alone",
        recipe("prepare: {source: rows.jsonl}", SFT, "kto: {model: sft}"),
        "recipe.yaml:4: kto.preferences: the prepared data have no table unpaired-train or pairs-train",
        files={"rows.jsonl": jsonl(*({"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(40)))},
    ),
    invalid(
        "too few rejected completions for KTO",
        recipe("prepare: {source: rows.jsonl}", SFT, "kto: {model: sft}"),
        "recipe.yaml:4: kto.preferences: 2 undesirable of 38 completions are not enough for 5 batches",
        "set `per_device_train_batch_size` to 19 or more",
        files={"rows.jsonl": jsonl(*({"prompt": f"Say {i}.", "completion": f"{i}!", "label": i not in (0, 2)} for i in range(46)))},
    ),
    invalid(
        "several completions at temperature 0",
        recipe(PREPARE, SFT, "sample: {model: sft, temperature: 0.0}"),
        "recipe.yaml:4: sample: `temperature: 0.0` samples the same completion every time; raise it",
    ),
    invalid(
        "samples of a split that is not held out",
        recipe(PREPARE, SFT, "sample: {model: sft, split: validation}"),
        "recipe.yaml:4: sample.split: `prepare` has no validation split; set `prepare.validation_fraction` above 0",
    ),
    invalid(
        "labels without completions",
        recipe(PREPARE, SFT, "label: {judge: gold}"),
        "recipe.yaml:4: label.completions: no earlier stage `sample`",
    ),
    invalid(
        "an unknown judge",
        recipe(PREPARE, SFT, "sample: {model: sft}", "label: {judge: god}"),
        "recipe.yaml:5: label.judge: no earlier stage `god`",
    ),
    invalid(
        "a policy as the judge",
        recipe(PREPARE, SFT, "sample: {model: sft}", "label: {judge: sft}"),
        "recipe.yaml:5: label.judge: stage `sft` is of kind `sft`; expected reward",
    ),
    invalid(
        "a slope without label noise",
        recipe(PREPARE, SFT, "sample: {model: sft}", "label: {judge: gold, label_noise_slope: 2.0}"),
        "recipe.yaml:5: label: `label_noise_slope` has no effect without `label_noise: bradley_terry`; remove it",
    ),
    invalid(
        "DPO on completions without labels",
        recipe(PREPARE, SFT, "sample: {model: sft}", "dpo: {model: sft, pairs: sample}"),
        "recipe.yaml:5: dpo.pairs: stage `sample` is of kind `sample`; expected prepare or label",
    ),
]  # fmt: skip

# TRL

TRL = [
    invalid(
        "two precisions at once",
        recipe(PREPARE, "sft: {model: {}, trainer: {fp16: true, bf16: true}}"),
        "recipe.yaml:3: sft.trainer.fp16: at most one of `fp16` and `bf16` can be true",
    ),
    invalid(
        "an unknown evaluation strategy",
        recipe(
            "prepare: {source: embedded, validation_fraction: 0.1}",
            "sft: {model: {}, trainer: {bf16: false, eval_strategy: sometimes}}",
        ),
        "recipe.yaml:3: sft.trainer.eval_strategy: no such eval_strategy: sometimes; known: no, steps",
    ),
    invalid(
        "a model that is not available",
        recipe(PREPARE, "sft: {model: owner/name}"),
        "recipe.yaml:3: sft.model: owner/name: no such folder, not in the cache, and the Hub cannot be reached",
        "name a folder",
    ),
    invalid(
        "more weights than losses",
        recipe(PREPARE, SFT, "dpo: {model: sft, trainer: {loss_weights: [1.0, 1.0]}}"),
        "recipe.yaml:4: dpo.trainer.loss_weights: 2 weights for 1 of `loss_type`; list one for each",
    ),
]

ALL = KEYS + VALUES + MEANING + REFERENCES + RECIPES + COMMANDS + DATA + FOLDERS + LABELS + TRL


@pytest.mark.parametrize(("files", "arguments", "expected"), ALL)
def test_invalid_input_is_reported_with_its_place_and_its_repair(
    files: Files,
    arguments: tuple[str, ...],
    expected: tuple[str, ...],
    tmp_path: Path,
    launch: Launch,
):
    write(tmp_path, files)
    check(*launch(*arguments), expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("recipes/dop.yaml", "recipes/dop.yaml: no such recipe; there are recipes/dpo.yaml"),
        ("recipes", "recipes: a folder, not a recipe; there are recipes/dpo.yaml"),
    ],
)
def test_a_missing_recipe_is_reported_with_the_existing_ones(
    path: str, expected: str, tmp_path: Path, launch: Launch
):
    write(tmp_path, {"recipes/dpo.yaml": WHOLE})
    check(*launch(path), (expected,))


def test_all_errors_are_reported_at_once_in_the_order_of_their_lines(
    tmp_path: Path, launch: Launch
):
    stages = recipe(
        "prepare: {sorce: embedded}", "sft: {model: {}, seed: x}", "dpo: {model: stf, bta: 1}"
    )
    write(tmp_path, {"recipe.yaml": stages})
    code, _, err = launch("recipe.yaml", "dpo.beta=much")
    errors = [tuple(line.split(": ")[:2]) for line in err.splitlines()]
    assert code == 2
    assert [place for place, _ in errors] == [
        "recipe.yaml:2",
        "recipe.yaml:3",
        *["recipe.yaml:4"] * 2,
        "command line",
    ]
    assert {key for _, key in errors} == {
        "prepare.sorce",
        "sft.seed",
        "dpo.model",
        "dpo.bta",
        "dpo.beta",
    }


@pytest.mark.parametrize(("files", "arguments", "expected"), [KEYS[0], COMMANDS[9], FOLDERS[1]])
def test_the_script_itself_exits_with_2_and_no_traceback(
    files: Files, arguments: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path
):
    write(tmp_path, files)
    command = [sys.executable, str(ROOT / "align" / "run.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    check(done.returncode, done.stdout, done.stderr, expected)
    assert done.stdout == ""
