"""Tests of `align chat`, `align env` and the options of `align run` that need no launcher."""

from __future__ import annotations

import importlib
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import tiny_models

import align
from align import __version__
from align.cli import chat, data, env, launcher, main, plan
from align.config.recipe import read_recipe
from align.errors import ArtifactError, RecipeError, UserError
from align.models import tokenization
from align.runtime import artifacts


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.world(tmp_path_factory.getbasetemp()).sft


def chat_with(policy, lines, monkeypatch, capsys, *, names=("sft",), **options):
    """The conversations before each answer, and what is printed."""
    conversations = []
    tokenize = tokenization.tokenize_prompts

    def recording(tokenizer, prompts):
        conversations.append(list(prompts[0]))
        return tokenize(tokenizer, prompts)

    monkeypatch.setattr(tokenization, "tokenize_prompts", recording)
    text = "".join(f"{line}\n" for line in lines)
    stdin = io.BytesIO(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, errors="surrogateescape"))
    sampling = chat.Sampling(temperature=1.0, max_new_tokens=24)
    chat.chat(dict.fromkeys(names, policy), sampling, **options)
    return conversations, capsys.readouterr()


def test_a_conversation_grows_until_an_empty_line(policy, monkeypatch, capsys):
    conversations, output = chat_with(
        policy, ["I need one calm sentence.", "And one more.", "", "I need one calm sentence."],
        monkeypatch, capsys,
    )  # fmt: skip
    first, second, third = conversations
    assert first == third == [{"role": "user", "content": "I need one calm sentence."}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    answer = second[1]["content"]
    assert answer
    assert output.out.startswith(answer)
    assert "an empty line starts a new conversation" in output.err


def test_every_conversation_begins_with_the_system_turn(policy, monkeypatch, capsys):
    lines = ["I need one calm sentence.", "", "Again."]
    conversations, _ = chat_with(policy, lines, monkeypatch, capsys, system="Be brief.")
    assert [[turn["role"] for turn in each] for each in conversations] == [["system", "user"]] * 2
    assert conversations[1][0] == {"role": "system", "content": "Be brief."}


def test_two_policies_answer_every_line_as_each_would_alone(policy, monkeypatch, capsys):
    lines = ["I need one calm sentence.", "And one more."]
    _, alone = chat_with(policy, lines, monkeypatch, capsys)
    answers = alone.out.splitlines()
    _, both = chat_with(policy, lines, monkeypatch, capsys, names=("sft", "dpo"))
    assert both.out.splitlines() == [
        "sft:", answers[0], "dpo:", answers[0], "sft:", answers[1], "dpo:", answers[1],
    ]  # fmt: skip
    assert "sft and dpo: an empty line starts" in both.err


def test_ctrl_c_leaves_without_a_traceback(policy, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_read_line", interrupt)
    chat.chat({"sft": policy}, chat.Sampling())
    assert capsys.readouterr().err.endswith("exits\n\n")


def test_bytes_that_are_no_text_are_replaced(policy, monkeypatch, capsys):
    conversations, _ = chat_with(policy, ["a\udcff"], monkeypatch, capsys)
    assert conversations == [[{"role": "user", "content": "a\N{REPLACEMENT CHARACTER}"}]]


def test_env_lists_versions_and_optional_packages():
    facts = env.describe()
    assert facts["align"] == __version__
    assert facts["vllm"] == "not installed"
    assert all(isinstance(value, str) and value for value in facts.values())
    assert list(facts)[:4] == ["align", "commit", "platform", "python"]


def test_a_missing_launch_configuration_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  prepare: {source: embedded}\n")
    with pytest.raises(RecipeError, match=r"two_gpus\.yaml: no such launch configuration"):
        main.run(recipe, config=tmp_path / "two_gpus.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a mapping"),
        ("- 1\n", "expected a mapping"),
        ("stages:\n  sft: {}\n", "`distributed_type` must be specified"),
        ("a: [\n", "while parsing"),
    ],
    ids=["empty", "list", "recipe", "not YAML"],
)
def test_a_file_that_is_no_launch_configuration_is_an_error_of_one_line(tmp_path, text, reason):
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"launch\.yaml: not a launch configuration") as error:
        launcher.check_launch_configuration(file)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["cpu", "single_gpu", "multi_gpu", "zero2", "zero3", "fsdp2", "multi_node"]
)
def test_the_shipped_launch_configurations_are_valid(name):
    root = Path(__file__).parents[2]
    launcher.check_launch_configuration(root / "accelerate_configs" / f"{name}.yaml")


def test_a_system_turn_that_the_template_does_not_write_is_an_error_before_the_first_line(
    policy, tmp_path, monkeypatch, capsys
):
    others = shutil.ignore_patterns("artifact.json")  # a model of another origin
    shutil.copytree(policy, tmp_path / "policy", ignore=others)
    template = tokenization.CHATML.replace("in messages", "in messages if message.role != 'system'")
    (tmp_path / "policy" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"^--system: .* turn 1 \(system\) .*, or leave it out$"):
        chat_with(tmp_path / "policy", [], monkeypatch, capsys, system="Be brief.")
    chat_with(tmp_path / "policy", [], monkeypatch, capsys)


@pytest.mark.parametrize("command", ["chat", "data show"])
def test_without_a_network_a_hub_model_is_rejected_before_any_retry(tmp_path, monkeypatch, command):
    monkeypatch.setattr("align.runtime.hub.hub_is_reachable", lambda: False)
    with pytest.raises(ArtifactError, match=r"owner/name: .*the Hub cannot be reached; name a"):
        if command == "chat":
            main.chat("owner/name", runs=tmp_path)
        else:
            data.data_show("embedded", model="owner/name")


def test_a_missing_gguf_file_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: main.chat("a.gguf", runs=tmp_path),
        lambda: data.data_show("embedded", model="a.gguf"),
    ):
        with pytest.raises(
            UserError, match=r"a\.gguf: no such file; name a GGUF file that exists$"
        ):
            call()


def test_a_command_names_all_of_its_wrong_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main.chat("sft", runs=tmp_path, compare="dpo", quantization="int8")
    starts = ("--quantization int8", f"{tmp_path}: no finished", f"{tmp_path}: no finished")
    lines = raised.value.lines
    assert all(line.startswith(s) for line, s in zip(lines, starts, strict=True)), lines
    with pytest.raises(UserError) as raised:
        data.data_show("embedded", ["sede=1"], stage="label", train_on="none")
    starts = ("--stage label", "--train-on none", "--model: missing", "command line: prepare.sede")
    lines = raised.value.lines
    assert all(line.startswith(s) for line, s in zip(lines, starts, strict=True)), lines
    Path("r.yaml").write_text("stages: {prepare: {sorce: embedded}}\n")
    with pytest.raises(UserError) as raised:
        main.run(Path("r.yaml"), runs=tmp_path / "runs", config=Path("none.yaml"))
    assert [line.partition(": ")[0] for line in raised.value.lines] == ["r.yaml:1", "none.yaml"]


def test_a_stage_that_is_no_policy_is_named_with_its_kind(tmp_path):
    folder = tmp_path / "prepare-0123456789ab"
    folder.mkdir()
    record = artifacts.Artifact(
        "prepare", "prepare", "0123456789ab", {}, {}, {}, {}, None, None, 1, 1.0, None
    )
    artifacts.write_artifact(folder, record)
    with pytest.raises(ArtifactError, match="`prepare`; the stage `prepare` is of kind `prepare`"):
        main.chat("prepare", runs=tmp_path)


def test_plan_and_check_count_one_stage(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  prepare: {source: embedded, max_rows: 40}\n")
    plan.plan(recipe, runs=tmp_path)
    plan.check(recipe, runs=tmp_path)
    output = capsys.readouterr().out
    assert output.count(": 1 stage") == 2
    assert "1 stages" not in output


def test_the_probe_measures_one_process_only(tmp_path):
    with pytest.raises(UserError, match="--processes: 2 processes, but --probe measures one"):
        plan.plan(Path("dpo"), runs=tmp_path, processes=2, probe=True)
    file = Path(__file__).parents[2] / "accelerate_configs/multi_gpu.yaml"
    with pytest.raises(UserError, match=r"--config .*multi_gpu\.yaml: 8 processes, but --probe"):
        plan.plan(Path("dpo"), runs=tmp_path, config=file, probe=True)


def test_the_number_of_processes_replaces_that_of_the_launch_configuration(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n  prepare: {source: embedded, max_rows: 600}\n"
        "  sft:\n    model: {num_hidden_layers: 1}\n"
        "    trainer: {per_device_train_batch_size: 1, max_length: 64}\n"
    )
    file = Path(__file__).parents[2] / "accelerate_configs/multi_gpu.yaml"

    def steps(**options: int) -> int:
        plan.plan(recipe, runs=tmp_path, config=file, **options)
        row = re.search(r"sft-\S+ +run +[\d,]+ +([\d,]+)", capsys.readouterr().out)
        assert row is not None
        return int(row[1].replace(",", ""))

    assert steps() * 4 == pytest.approx(steps(processes=2), abs=8)


def test_a_plan_fits_80_columns_and_shows_names_as_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plan.plan(Path("iterated_dpo"), ["prepare.max_rows=200"], runs=tmp_path / "runs [/v1]")
    output = capsys.readouterr().out
    assert re.search(r"onpolicy_dpo-[0-9a-f]{12} +run .* MB", output)
    assert "[/v1]" in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("runs", ["~", "~/my runs"])
def test_the_folder_of_runs_may_begin_with_the_home_directory(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["chat", "sft", f"--runs={runs}"]
    with pytest.raises(ArtifactError, match=f"^{tmp_path / runs.removeprefix('~').lstrip('/')}: "):
        main.app(arguments, standalone_mode=False)


@pytest.mark.parametrize("runs", ["", " ", "a\nb", "a\x1bb"])
def test_a_folder_of_runs_has_a_name_without_control_characters(runs, capsys):
    with pytest.raises(SystemExit) as raised:
        main.app(["chat", "sft", f"--runs={runs}"])
    assert raised.value.code == 2
    assert "names no folder; name one, such as runs" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_whose_name_has_a_line_break_is_refused(tmp_path):
    recipe = tmp_path / "a\nb.yaml"
    recipe.write_text("stages:\n  prepare: {source: embedded}\n")
    with pytest.raises(RecipeError, match="the name has a line break or control character"):
        read_recipe(recipe)


def test_a_source_whose_name_has_a_control_character_is_refused():
    with pytest.raises(
        RecipeError, match=r"'a\\x1b\[31m.jsonl': a line break or control character"
    ):
        data.prepare_config("a\x1b[31m.jsonl", None)


def test_invalid_overrides_are_reported_before_the_launcher_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "launch", pytest.fail)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  prepare: {source: embedded}\n")
    with pytest.raises(RecipeError, match="did you mean `max_rows`"):
        main.run(recipe, ["prepare.max_row=3"])


@pytest.mark.parametrize(("code", "shell_code"), [(2, 2), (1, 1), (-9, 137), (-15, 143)])
def test_a_run_killed_by_a_signal_exits_as_in_a_shell(code, shell_code, monkeypatch):
    import subprocess

    from accelerate.commands import launch as accelerate_launch

    from align.cli import launcher

    def fail(arguments):
        raise subprocess.CalledProcessError(code, "run")

    monkeypatch.setattr(accelerate_launch, "launch_command", fail)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    assert launcher.launch(["run.py"]) == shell_code


def test_the_script_cannot_be_imported_in_place_of_the_function():
    with pytest.raises(ImportError, match="call the function"):
        importlib.import_module("align.run")
    assert callable(align.run)
