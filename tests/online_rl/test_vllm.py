"""Sampling by a vLLM server: a stand-in checks every call, and receives and uses the weights."""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models, vllm_modules, vllm_server
from helpers.vllm_server import UPDATE, VLLMServer, choice, send
from torch.testing import assert_close

from align.errors import UserError
from align.functional.policy_gradient import importance_weights
from align.models import loading
from align.online_rl.completions import Completions
from align.online_rl.experience import align_sampler_logps
from align.online_rl.sampler_agreement import compare
from align.online_rl.vllm import server as server_mode
from align.online_rl.vllm import weights

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 40}
  ppo:
    rewards: ["align.rewards.gold:rewards"]
    steps: 2
    batch_size: 4
    max_new_tokens: 6
    eval_steps: 2
    n_eval_prompts: 2
    eval_split: test
    sampler: vllm
    vllm_timeout: 20
"""
BEFORE = [
    ("/v1/models", ""),
    ("/server_info", "config_format=json"),
    ("/get_world_size", ""),
    ("/init_weight_transfer_engine", ""),
]

SEEDS = [2**40 + k for k in range(4)]  # more bits than vLLM takes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def server(world: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMServer]:
    """A stand-in with the SFT model; no call may differ from what vLLM documents."""
    groups = vllm_modules.install(monkeypatch)
    monkeypatch.setattr(weights, "DEVICE", "cpu")
    with vllm_server.serving(world.sft, groups) as running:
        yield running
    assert running.violations == []


def sampler_of(
    models: Any, server: VLLMServer, *, stops: set[int] | None = None, **settings: Any
) -> server_mode.ServerSampler:
    defaults = {"vllm_timeout": 10, "max_new_tokens": 5}
    config = ppo_fixtures.ppo_config(sampler="vllm", vllm_url=server.url, **defaults | settings)
    stops = {models.tokenizer.eos_token_id} if stops is None else stops
    return server_mode.connect(config, models.policy, stops, torch.device("cpu"))


def test_every_call_is_as_documented_and_the_server_samples_with_the_merged_weights(world, server):
    models = ppo_fixtures.build_models(world.lora, [], lora=True)
    stops = set(range(40, 60))
    sampler = sampler_of(
        models, server, stops=stops, temperature=0.7, lora=tiny_models.LORA, max_new_tokens=8
    )
    assert server.calls == BEFORE
    prompts = [[4, 5], [6], [6], [6]]
    completions = sampler.generate(prompts, seeds=SEEDS)
    assert server.calls[4:10] == UPDATE
    assert server.calls[10:] == [("/v1/completions", "")] * 4
    merged = loading.load_merged(world.lora, dtype="float32")
    original = loading.load_merged(world.sft, dtype="float32").state_dict()
    for name, weight in server.model.state_dict().items():
        assert_close(weight, merged.state_dict()[name])
    assert any(not torch.equal(w, original[k]) for k, w in server.model.state_dict().items())

    assert completions.prompts == prompts
    assert completions.finished == [row[-1] in stops for row in completions.completions]
    assert completions.sampler_logps is not None
    for row, prompt, logps in zip(
        completions.rows, prompts, completions.sampler_logps, strict=True
    ):
        with torch.no_grad():
            expected = (merged(torch.tensor([row])).logits[0] / 0.7).log_softmax(-1)
        own = [float(expected[i - 1, row[i]]) for i in range(len(prompt), len(row))]
        assert_close(torch.tensor(logps), torch.tensor(own))

    requests = [body for path, body in server.bodies if path == "/v1/completions"]
    assert Counter(tuple(r["prompt"]) for r in requests) == Counter(map(tuple, prompts))
    assert {(r["temperature"], r["max_tokens"]) for r in requests} == {(0.7, 8)}
    assert all(r["stop_token_ids"] == sorted(stops) for r in requests)
    # With one seed, equal prompts would get equal completions.
    assert len({r["seed"] for r in requests}) == 4
    assert sampler.generate(prompts, seeds=SEEDS).rows == completions.rows


def test_the_servers_log_probabilities_become_capped_importance_weights():
    completions = Completions([[4, 5], [6]], [[7, 8], [9]], [False, False], [[-1.0, -3.0], [-2.0]])
    logps = torch.tensor([[0.0, -1.5, -0.5], [-2.0, 0.0, 0.0]])
    theirs = align_sampler_logps(completions, logps)
    assert theirs is not None
    assert theirs.tolist() == [[0.0, -1.0, -3.0], [-2.0, 0.0, 0.0]]
    # e^(-1.5 + 1) = 0.6065; e^(-0.5 + 3) = 12.2, capped at 2; equal ones weigh exactly 1
    capped = importance_weights(logps, theirs, cap=2.0)
    assert_close(capped, torch.tensor([[1.0, 0.6065307, 2.0], [1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("updates", [True, False], ids=["merged weights", "weights of the base"])
def test_the_server_is_compared_with_the_policy_before_the_first_step(
    world, server, monkeypatch: pytest.MonkeyPatch, updates: bool
):
    models = ppo_fixtures.build_models(world.lora, [], lora=True, temperature=0.7)
    ppo_fixtures.perturb(models, scale=0.3)
    sampler = sampler_of(models, server, temperature=0.7, lora=tiny_models.LORA)
    if not updates:
        monkeypatch.setattr(sampler.channel, "send", lambda model: None)
    agreement = compare(sampler.config, models, sampler, [[4, 5, 6], [7, 8]], seed=0)
    if updates:
        agreement.check(sampler.config)
        assert agreement.mean < 1e-5
        assert agreement.n_tokens <= 32
    else:
        with pytest.raises(UserError, match=r"explains at most 0\.1; .*processed_logprobs"):
            agreement.check(sampler.config)


def write_recipe(folder: Path, model: Path, url: str) -> None:
    text = RECIPE + f"    model: {model}\n    vllm_url: {url}\n"
    (folder / "recipe.yaml").write_text(text)


def test_a_recipe_trains_with_a_server(world, server, tmp_path: Path, launch: Any):
    write_recipe(tmp_path, world.sft, server.url)
    done = launch("recipe.yaml")
    assert done.code == 0, done.err
    assert ("/health", "") in server.calls
    # before the run, twice in evaluations and in each of two steps
    assert server.version == 5
    assert len([call for call in server.calls if call == ("/v1/completions", "")]) >= 12
    (file,) = tmp_path.glob("**/ppo*/metrics.jsonl")
    line = json.loads(file.read_text().splitlines()[1])
    assert line["sampler/ratio_mean"] == pytest.approx(1, abs=1e-4)


def answer(content: bytes, status: int = 200) -> Any:
    return lambda handler: send(handler, status, content)


def completion(*choices: Any) -> Any:
    return answer(json.dumps({"choices": list(choices)}).encode())


def stall(handler: Any) -> None:
    time.sleep(2.0)


def trickle(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def drop(handler: Any) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


GOOD = choice([7, 8, 2], [-0.5, -1.0, -0.25])
ENDS = {"max_new_tokens": 5, "stops": {2}}


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/v1/completions", answer(b"<html>"), "an answer that vLLM does not give: '<html>'"),
        ("/v1/completions", answer(b"[1]"), "an answer without `choices`"),
        ("/v1/completions", completion(), "0 completions where 1 was requested"),
        ("/v1/completions", completion(GOOD, GOOD), "2 completions where 1 was requested"),
        ("/v1/completions", completion(GOOD | {"token_ids": None}), "without `token_ids`"),
        ("/v1/completions", completion(GOOD | {"logprobs": None}), "`logprobs.token_logprobs`"),
        ("/v1/completions", completion(choice([], [])), "a completion without tokens"),
        (
            "/v1/completions",
            completion(GOOD | {"token_ids": [7, 2]}),
            "2 tokens with 3 log-probabilities",
        ),
        ("/v1/completions", completion(choice([7, True], [-1, -1])), "no number: True"),
        ("/v1/completions", completion(choice([7, 2], [-1, math.nan])), "that is none: nan"),
        ("/v1/completions", completion(choice([7, 2], [-1, 0.5])), "that is none: 0.5"),
        ("/v1/completions", completion(choice([2, 2], [-1, -1])), "tokens after the one"),
        (
            "/v1/completions",
            completion(choice([7, 8], [-1, -1], "abort")),
            r"ends after 2 of 5 tokens without a token that ends it \(abort\)",
        ),
        ("/v1/completions", stall, "no complete answer in 1 seconds; raise `vllm_timeout`"),
        ("/v1/completions", trickle, "no complete answer in 1 seconds"),
        ("/v1/completions", drop, "the connection was lost"),
        (
            "/v1/completions",
            answer(b'{"error": {"message": "out\\nof memory"}}', 500),
            "HTTP 500: out of memory; see the log of the server",
        ),
        ("/v1/models", answer(b'{"data": []}'), "an answer that vLLM does not give"),
        ("/server_info", answer(b"", 404), "HTTP 404: ''; start it with `VLLM_SERVER_DEV_MODE=1"),
        ("/get_world_size", answer(b"{}"), "an answer that vLLM does not give: '{}'"),
        ("/pause", drop, "the connection was lost"),
        ("/start_weight_update", answer(b"<html>"), "an answer that vLLM does not give: '<html>'"),
        ("/start_weight_update", drop, "the connection was lost"),
        ("/update_weights", answer(b"no", 500), "HTTP 500: 'no'"),
        ("/update_weights", drop, "the connection was lost"),
        ("/update_weights", stall, "no complete answer in 1 seconds"),
        ("/update_weights", answer(b"{}"), "the weights were not sent"),
        ("/finish_weight_update", answer(b"<html>"), "an answer that vLLM does not give: '<html>'"),
        ("/finish_weight_update", drop, "the connection was lost"),
        ("/reset_prefix_cache", answer(b'{"success": false}'), "not done: .* else uses the server"),
        ("/resume", answer(b"<html>"), "an answer that vLLM does not give: '<html>'"),
        ("/resume", drop, "the connection was lost"),
        ("/init_weight_transfer_engine", answer(b"no", 500), "HTTP 500: 'no'"),
        ("/init_weight_transfer_engine", stall, "no complete answer in 1 seconds"),
    ],
)
def test_a_wrong_answer_a_stall_or_a_lost_connection_is_one_line(
    world, server, path: str, fault: Any, message: str
):
    models = ppo_fixtures.build_models(world.sft, [], lora=False)
    server.faults[path] = fault
    seconds = 1.0 if fault in (stall, trickle) else 2.0
    with pytest.raises(UserError, match=message) as error_info:
        sampler_of(models, server, vllm_timeout=seconds, **ENDS).generate(
            [[4, 5], [6]], seeds=[0, 1]
        )
    (line,) = error_info.value.lines
    assert line.startswith(f"vllm_url: {server.url}{path}: ") and "\n" not in line


@pytest.mark.parametrize("fault", [answer(b"[]"), drop], ids=["wrong answer", "lost connection"])
def test_a_run_ends_with_one_line_and_exit_code_2(
    world, server, tmp_path: Path, launch: Any, fault: Any
):
    server.faults["/v1/completions"] = fault
    write_recipe(tmp_path, world.sft, server.url)
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert f"ppo.vllm_url: {server.url}/v1/completions: " in line


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"weight_transfer_config": None}, "the server has no engine to receive weights"),
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "--logprobs-mode raw_logprobs"),
    ],
)
def test_a_server_that_is_not_set_up_is_refused(world, server, info: Any, message: str):
    models = ppo_fixtures.build_models(world.sft, [], lora=False)
    server.info |= info
    with pytest.raises(UserError, match=f"/server_info: .*{message}.*start it with"):
        sampler_of(models, server)


def test_weights_that_cannot_be_read_end_the_update(world, server, monkeypatch):
    models = ppo_fixtures.build_models(world.sft, [], lora=False)
    sampler = sampler_of(models, server)
    passes = iter([weights.merged_weights(models.policy.model)])
    monkeypatch.setattr(weights, "merged_weights", lambda model: next(passes))
    with pytest.raises(UserError, match=r"/update_weights: the weights were not sent \(.*; see"):
        sampler.generate([[4]], seeds=[0])
    assert server.group is not None
    for tensor in loading.load_merged(world.sft, dtype="float32").parameters():
        server.group.broadcast(tensor)  # the server need not wait until the test ends


def test_a_missing_server_is_reported_before_training(world, tmp_path: Path, launch: Any):
    write_recipe(tmp_path, world.sft, "http://127.0.0.1:9")
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.vllm_url: http://127.0.0.1:9: no server answers" in done.err
    assert "running" not in done.out


def test_without_vllm_or_a_gpu_the_error_names_it(world, server, monkeypatch: pytest.MonkeyPatch):
    models = ppo_fixtures.build_models(world.sft, [], lora=False)
    monkeypatch.undo()  # the modules of the stand-in
    with pytest.raises(UserError, match=r"vLLM 0\.28 to 0\.33 is not installed"):
        sampler_of(models, server)
    vllm_modules.install(monkeypatch)
    with pytest.raises(UserError, match="which needs a GPU, and the policy is on cpu"):
        sampler_of(models, server)
