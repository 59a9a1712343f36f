"""Tests of what `align export` does with a folder, by stand-ins for llama.cpp and the Hub."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers import tiny_models
from typer.testing import CliRunner

from align.cli import publish
from align.cli.main import app
from align.errors import UserError

CONVERTER = """
import pathlib, sys
folder, _, target, _, kind = sys.argv[1:]
config = pathlib.Path(folder, "config.json").read_text()
{action}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_models.world(tmp_path_factory.getbasetemp()).sft


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A function that makes the stand-in of the converter do something."""

    def make(action: str) -> None:
        script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(CONVERTER.format(action=action))
        monkeypatch.setenv("LLAMA_CPP", str(script.parent))

    return make


@pytest.fixture
def hub(monkeypatch):
    """Calls of the stand-in of the Hub's client."""
    calls: list[tuple] = []

    class Api:
        def create_repo(self, *arguments, **options):
            calls.append(("create", arguments, options))

        def upload_folder(self, **options):
            files = sorted(path.name for path in options["folder_path"].iterdir())
            calls.append(("upload", options["repo_id"], files))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(publish.hub, "is_offline", lambda: False)
    monkeypatch.setattr(publish.hub, "hub_is_reachable", lambda: True)
    return calls


def export(policy, *arguments: str):
    result = CliRunner().invoke(app, ["export", str(policy), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_policy_is_converted_and_uploaded(policy, tmp_path, converter, hub):
    converter("pathlib.Path(target).write_text(f'{kind} ' + config)")
    out, gguf = tmp_path / "out", tmp_path / "model.gguf"
    result = export(policy, str(out), "--gguf", str(gguf), "--push-to-hub", "me/m", "--private")
    assert result.stdout.splitlines() == [str(gguf), "https://hub/commit"]
    assert gguf.read_text() == "auto " + (out / "config.json").read_text()
    created, uploaded = hub
    assert created == ("create", ("me/m",), {"private": True, "exist_ok": True})
    assert uploaded[:2] == ("upload", "me/m")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*uploaded[2]}


@pytest.mark.parametrize("action", ["sys.exit('unknown architecture')", "raise SystemExit(3)", ""])
def test_a_converter_that_fails_leaves_the_folder_and_no_file(policy, tmp_path, converter, action):
    converter(action)
    gguf = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"converter failed: .*; .*out is complete") as error:
        export(policy, str(tmp_path / "out"), "--gguf", str(gguf))
    assert len(error.value.lines) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gguf", "model.bin", "expected a file name ending in .gguf"),
        ("--gguf", "none/model.gguf", "in an existing folder"),
        ("--push-to-hub", "a b", "expected OWNER/NAME"),
    ],
)
def test_what_cannot_be_written_is_refused_before_merging(
    policy, tmp_path, monkeypatch, converter, hub, option, value, message
):
    monkeypatch.chdir(tmp_path)
    converter("")
    with pytest.raises(UserError, match=message):
        export(policy, "out", option, value)
    assert not (tmp_path / "out").exists()


def test_all_places_that_cannot_be_written_are_named_at_once(policy, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    (tmp_path / "out").mkdir()
    options = ("--gguf", str(tmp_path / "m.bin"), "--push-to-hub", "a b")
    with pytest.raises(UserError) as raised:
        export(policy, str(tmp_path / "out"), *options)
    places = (f"{tmp_path / 'out'}: exists already", f"--gguf {tmp_path / 'm.bin'}: expected",
              "--gguf: no convert_hf_to_gguf.py", "--push-to-hub a b: expected OWNER/NAME")  # fmt: skip
    lines = raised.value.lines
    assert len(lines) == 4 and all(
        line.startswith(p) for line, p in zip(lines, places, strict=True)
    )


def test_a_missing_converter_token_or_hub_is_named(policy, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"no convert_hf_to_gguf.py on the path; install llama"):
        export(policy, out, "--gguf", str(tmp_path / "m.gguf"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token is stored; log in with `hf auth login`"):
        export(policy, out, "--push-to-hub", "me/m")
    monkeypatch.setattr(publish.hub, "is_offline", lambda: True)
    with pytest.raises(UserError, match="the Hub cannot be reached; `hf upload`"):
        export(policy, out, "--push-to-hub", "me/m")
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_the_hub_is_one_line(policy, tmp_path, monkeypatch, hub):
    def refuse(self, *arguments, **options):
        raise OSError("403\nForbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"me/m: 403 Forbidden; .*out is complete"):
        export(policy, str(tmp_path / "out"), "--push-to-hub", "me/m")
