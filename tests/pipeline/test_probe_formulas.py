"""The parts of planned times by hand: every measured call takes a known time of a test's clock.

Each cost is proportional to something that the test counts itself: rows, tokens, steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.completions import Label, Sample
from align.config.control.policy_gradient import PolicyGradient
from align.config.evaluate import Evaluate
from align.config.online_rl_stages import PPO
from align.config.stages import STAGES
from align.config.training import DPO, KTO, SFT, Reward
from align.data import tables
from align.online_rl.completions import Completions
from align.online_rl.prompts import Prompts
from align.pipeline.probe import control, inference, online_rl, training
from align.pipeline.probe.data import SampledData
from align.pipeline.probe.sampling import Lengths, SamplingSpeed
from align.pipeline.probe.timing import Seconds, Stopwatch


class Clock:
    """A clock that only the measured calls advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def assert_parts(parts: dict[str, Seconds], expected: dict[str, float | tuple[float, float]]):
    """Compare parts with times, or with ranges."""
    found = {name: (seconds.least, seconds.most) for name, seconds in parts.items()}
    pairs = {k: v if isinstance(v, tuple) else (v, v) for k, v in expected.items()}
    assert found.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert found[name] == pytest.approx(pair, rel=1e-6), name


# Online RL

FORWARD, SCORE, PASS, OPTIMIZER = 0.01, 0.002, 0.03, 0.7  # seconds a token, and a step
READ, NEW = 0.001, 0.004  # seconds a token of the distinct prompts, and a new token
CONSTRUCT, CHECKPOINT, SAVE = 7.0, 2.0, 3.0
PROMPT, EXPECTED, MOST = 20, 10, 40  # tokens


@dataclass
class FakeSampler:
    """A sampler that takes its time; its policy must be in mixed precision."""

    trainer: FakeOnlineTrainer
    stops: set[int] = field(default_factory=lambda: {0})

    def generate(self, rows: Any, *, seeds: Any) -> None:
        assert self.trainer.precise and not self.stops
        n = self.trainer.models.policy.model.generation_config.max_new_tokens
        distinct = {tuple(row) for row in rows}
        self.trainer.clock.work(READ * sum(map(len, distinct)) + NEW * n * len(rows))


class FakeOnlineTrainer:
    """A trainer whose calls take a time per token."""

    def __init__(self, config: PPO, clock: Clock) -> None:
        clock.work(CONSTRUCT)
        self.config, self.clock, self.precise = config, clock, False
        model = SimpleNamespace(generation_config=SimpleNamespace())
        self.models = SimpleNamespace(
            tokenizer=range(100),
            policy=SimpleNamespace(model=model),
            mixed_precision=self.mixed_precision,
        )
        self.prompts = Prompts([{}] * 8, [[k] * PROMPT for k in range(8)])
        self.sampler = FakeSampler(self)
        self.scorer = SimpleNamespace(score=self.score)
        self.optimizer = SimpleNamespace(
            param_groups=[], step=lambda: clock.work(OPTIMIZER), zero_grad=lambda: None
        )

    @contextlib.contextmanager
    def mixed_precision(self) -> Iterator[None]:
        self.precise = True
        yield
        self.precise = False

    def set_train_mode(self, train: bool) -> None:
        pass

    def score(self, completions: Completions, rows: Any) -> None:
        assert self.precise
        self.clock.work(SCORE * sum(map(len, completions.rows)))

    def update(self, step: int, rollout: Completions) -> None:
        assert step == self.config.steps_without_policy
        assert (self.config.epochs, self.config.minibatches) == (1, 1)
        assert self.config.least_completions == 1
        self.clock.work(PASS * sum(map(len, rollout.rows)) + OPTIMIZER)

    def save_policy(self) -> None:
        self.clock.work(SAVE)


@pytest.fixture
def fake_ppo(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """The probe's trainer is a fake."""

    def experience(models: Any, completions: Completions, *, batch_size: int) -> Completions:
        clock.work(FORWARD * sum(map(len, completions.rows)))
        return completions

    def rollout(experience: Completions, scores: Any, *_: Any, **__: Any) -> Completions:
        assert len(scores) == len(experience.rows)
        return experience

    def build(config: PPO, *_: Any) -> FakeOnlineTrainer:
        return FakeOnlineTrainer(config, clock)

    monkeypatch.setattr(online_rl, "OnlineRLTrainer", build)
    monkeypatch.setattr(online_rl, "LocalSampler", FakeSampler)
    monkeypatch.setattr(online_rl, "compute_experience", experience)
    monkeypatch.setattr(online_rl, "make_rollout", rollout)
    monkeypatch.setattr(online_rl, "expected_lengths", lambda *_: Lengths(EXPECTED, MOST))
    monkeypatch.setattr(online_rl.checkpoint, "save", lambda *_: clock.work(CHECKPOINT))


PPO_SETTINGS: dict[str, Any] = {
    "model": "m",
    "rewards": ["r"],
    "steps": 5,
    "batch_size": 16,
    "n_completions": 2,
    "max_new_tokens": MOST,
    "epochs": 3,
    "minibatches": 2,
    "prefix_sharing": False,
    "save_steps": 2,
}


@pytest.mark.parametrize(
    ("settings", "checkpoints", "evaluations"),
    [
        # after steps 2 and 4; before the first step and after 2, 4 and 5
        pytest.param({"eval_steps": 2, "n_eval_prompts": 24}, 2, 4, id="an uneven end"),
        # after step 2: the last one writes the policy; before the first step and after 2 and 4
        pytest.param({"steps": 4, "eval_steps": 2, "n_eval_prompts": 24}, 1, 3, id="an even end"),
        # the rule compares pairs of 32 prompts, drawn from 24, after steps 2 and 4
        pytest.param(
            {"steps": 4, "eval_steps": 2, "n_eval_prompts": 32, "stop": {"judge": "gold"}},
            1, 3, id="a stop rule",
        ),
        pytest.param({"critic_warmup_steps": 1}, 2, 0, id="not evaluated"),
        pytest.param({"kind": "rloo"}, 2, 0, id="without a critic"),
    ],
)  # fmt: skip
def test_the_time_of_ppo(
    tmp_path: Path, clock: Clock, fake_ppo: None, settings: Any, checkpoints: int, evaluations: int
):
    settings = PPO_SETTINGS | settings
    config: Any = STAGES[settings.pop("kind", "ppo")](**settings)
    data = SampledData(tmp_path, {("prompts", config.eval_split): 24, ("prompts", "train"): 100})
    time = online_rl.measure(config, {}, data, tmp_path, Stopwatch(clock))

    def all_rows(per_token: float, n: int) -> float:
        return per_token * config.batch_size * (PROMPT + n)

    sampled = [READ * 8 * PROMPT + NEW * n * config.batch_size for n in (EXPECTED, MOST)]
    scored = [all_rows(FORWARD + SCORE, n) for n in (EXPECTED, MOST)]
    updated = [
        config.epochs * (all_rows(PASS, n) + config.minibatches * OPTIMIZER)
        for n in (EXPECTED, MOST)
    ]
    expected: dict[str, Any] = {
        "load": CONSTRUCT,
        "save": SAVE + checkpoints * CHECKPOINT,
    }
    for name, once in (("sample", sampled), ("score", scored), ("update", updated)):
        expected[name] = (config.steps * once[0], config.steps * once[1])
    if evaluations:
        share = evaluations * 24 / config.batch_size
        expected["evaluate"] = tuple(
            share * (one + other) for one, other in zip(sampled, scored, strict=True)
        )
    if config.stop:
        pairs = (evaluations - 1) * 32
        expected["stop"] = tuple(2 * pairs / config.batch_size * one for one in sampled)
        assert time.remark == "without the judge of `stop`"
    assert_parts(time.parts, expected)


def test_the_tokens_of_ppo_are_those_that_the_model_computes(
    tmp_path: Path, clock: Clock, fake_ppo: None
):
    """Two completions share their prompt of 20 tokens: 10 of 16 rows' 30 tokens differ."""
    for sharing, tokens in ((False, 16 * 30), (True, 8 * 20 + 16 * 10)):
        config = PPO(**PPO_SETTINGS | {"prefix_sharing": sharing})
        trainer: Any = FakeOnlineTrainer(config, clock)
        made = online_rl._OnlineRLProbe(config, trainer, Lengths(EXPECTED, MOST), Stopwatch(clock))
        # random tokens of two completions may begin equally
        assert made._step_tokens(10, 16) == pytest.approx(tokens, abs=3)


# Stages of TRL


@dataclass
class FakeTrainer:
    """A trainer of TRL whose calls take a time per token."""

    clock: Clock
    train_dataset: Any
    args: Any
    ref_model: Any = None
    model: Any = field(default_factory=SimpleNamespace)
    processing_class: Any = None
    optimizer: Any = None
    _train_batch_size: int = 0

    def __post_init__(self) -> None:
        state = {0: {"exp_avg": torch.zeros(50), "step": 1}}
        self.optimizer = SimpleNamespace(
            step=lambda: self.clock.work(OPTIMIZER), zero_grad=lambda: None, state=state
        )
        self.accelerator = SimpleNamespace(
            prepare=lambda *parts: parts,
            clip_grad_norm_=lambda *_: self.clock.work(0.1),
            unwrap_model=lambda model: model,
        )
        self.model.parameters = list

    def create_optimizer(self) -> None:
        pass

    def get_train_dataloader(self) -> Iterator[dict[str, Any]]:
        size = self._train_batch_size
        for k in range(0, len(self.train_dataset), size):
            rows = list(self.train_dataset)[k : k + size]
            tensors = [torch.tensor(row) for row in rows]
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
            yield {"input_ids": ids, "attention_mask": (ids >= 0).long()}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def _work(self, per_token: float, inputs: dict[str, Any]) -> None:
        self.clock.work(per_token * int(inputs["attention_mask"].sum()))

    def training_step(self, model: Any, inputs: dict[str, Any]) -> None:
        self._work(PASS, inputs)

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> None:
        self._work(FORWARD, inputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> None:
        self._work(SCORE, inputs)

    def save_model(self, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(bytes(100))
        self.clock.work(SAVE)


class TokenRows(list[list[int]]):
    """Rows of a data set, which get the log-probabilities of a reference."""

    def add_column(self, name: str, values: list[float]) -> TokenRows:
        assert len(values) == len(self)
        return self


def schedule(name: str, **settings: Any) -> Any:
    return SimpleNamespace(
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        num_train_epochs=1,
        save_strategy=SimpleNamespace(value=name),
        eval_strategy=SimpleNamespace(value=name),
        save_steps=4,
        eval_steps=6,
        eval_on_start=name != "no",
        logging_steps=1,
        **settings,
    )


SMALL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}


def probed(
    config: Any,
    clock: Clock,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    strategy: str = "no",
    counts: dict[tuple[str, str], int],
    n_rows: int = 12,
) -> tuple[dict[str, Seconds], list[list[int]]]:
    """The parts of a stage with a fake trainer of some rows, and the tokens of these rows.

    Each table has 16 sampled rows. Rows are of different lengths and differ in the first token.
    """
    from datasets import Dataset

    for kind, split in counts:
        turns = [{"role": "user", "content": "Hi"}]
        columns = ("prompt", "completion", "chosen", "rejected")
        tables.write([dict.fromkeys(columns, turns)] * 16, tables.table_file(folder, kind, split))
    rows = TokenRows([[k] * (10 + 7 * k % 12) for k in range(n_rows)])
    trainer = FakeTrainer(clock, rows, schedule(strategy))

    def tokenize(row: Any) -> Any:
        clock.work(2.0)
        return row

    def build(*_: Any) -> FakeTrainer:
        clock.work(CONSTRUCT)
        Dataset.from_dict({"a": [1]}).map(tokenize, new_fingerprint="a")
        return trainer

    monkeypatch.setattr(training, "stage_module", lambda kind: SimpleNamespace(build=build))
    monkeypatch.setattr(training.reference_logps, "can_precompute", lambda _: True)
    monkeypatch.setattr(training.tokenization, "save_end_tokens", lambda *_: None)
    monkeypatch.setattr(
        training.tokenization,
        "tokenize_for_reward",
        lambda _, prompts, __: [[0] * 30] * len(prompts),
    )
    data = SampledData(folder, counts)
    time = training.measure(config, "stage", {}, data, folder, Stopwatch(clock))
    return time.parts, rows


def train_seconds(rows: list[list[int]], steps: int) -> float:
    """Seconds of steps with two batches of four rows of mean length."""
    mean = sum(map(len, rows)) / len(rows)
    return steps * (8 * mean * PASS + OPTIMIZER + 0.1)


@pytest.mark.filterwarnings("ignore")
def test_the_time_of_sft(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """160 rows of which 16 are sampled and 4 of these lost: 120 rows, 15 steps of 8.

    Checkpoints follow steps 4, 8, 12 and 15, evaluations steps 0, 6, 12 and 15.
    """
    counts = {("demonstrations", "train"): 160, ("demonstrations", "validation"): 20}
    parts, rows = probed(
        SFT(model="m", trainer=SMALL), clock, tmp_path, monkeypatch, strategy="steps", counts=counts
    )
    mean = sum(map(len, rows)) / 12
    assert_parts(parts, {
        "load": CONSTRUCT,
        "tokenize": 10 * 2.0,
        "train": train_seconds(rows, 15),
        "evaluate": 4 * 20 * mean * FORWARD,
        "save": SAVE + 4 * 3 * SAVE,  # 200 bytes of the optimizer, and 100 of the weights
    })  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_time_of_dpo_has_one_pass_of_the_reference(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    counts = {("pairs", "train"): 160, ("pairs", "validation"): 20}
    parts, rows = probed(
        DPO(model="m", trainer=SMALL), clock, tmp_path, monkeypatch, strategy="epoch", counts=counts
    )
    mean = sum(map(len, rows)) / 12
    assert_parts(parts, {
        "load": CONSTRUCT,
        "tokenize": 10 * 2.0,
        "reference": 120 * mean * SCORE,
        "train": train_seconds(rows, 15),
        "evaluate": 2 * 20 * mean * SCORE,  # before the first step and after the epoch
        "save": SAVE + 3 * SAVE,
    })  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_time_of_kto_counts_two_rows_of_a_pair(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """32 + 16 sampled rows stand for 2 * 48 + 96 = 192: 12 of them for 48, which are 6 steps."""
    counts = {("pairs", "train"): 48, ("unpaired", "train"): 96}
    parts, rows = probed(KTO(model="m", trainer=SMALL), clock, tmp_path, monkeypatch, counts=counts)
    assert_parts(parts, {
        "load": CONSTRUCT,
        "tokenize": 4 * 2.0,
        "train": train_seconds(rows, 6),
        "save": SAVE,
    })  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("demonstrations", "centered"),
    [
        pytest.param(500, 500, id="all demonstrations"),
        pytest.param(9_999, 2_048, id="at most 2,048"),
        pytest.param(0, 160, id="the chosen completions of pairs"),
    ],
)
def test_the_time_of_a_reward_model_has_its_scores(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    demonstrations: int,
    centered: int,
):
    counts = {("pairs", "train"): 160, ("pairs", "test"): 40}
    counts |= {("demonstrations", "train"): demonstrations} if demonstrations else {}
    parts, rows = probed(
        Reward(model="m", trainer=SMALL), clock, tmp_path, monkeypatch, counts=counts
    )
    assert_parts(parts, {
        "load": CONSTRUCT,
        "tokenize": 10 * 2.0,
        "train": train_seconds(rows, 15),
        "save": SAVE,
        "score": CONSTRUCT + 30 * (centered + 2 * 40) * FORWARD,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "steps", "times"),
    [(4, 12, 3), (4, 13, 4), (20, 13, 1), (0.25, 12, 4), (0.3, 9, 3), (0.01, 9, 9)],
)
def test_something_every_few_steps_is_also_done_after_the_last_one(
    interval: float, steps: int, times: int
):
    assert training._occasions(interval, steps) == times
    every = interval if interval >= 1 else math.ceil(interval * steps)
    assert times == sum(step % every == 0 or step == steps for step in range(1, steps + 1))


# Stages without gradients

SPEED = SamplingSpeed(batch=4, prompt=1.0, token=0.1, context=0.0, prompt_tokens=30.0)
SAMPLED = (1.0 + 0.1 * EXPECTED, 1.0 + 0.1 * MOST)
"""Seconds of a batch."""
COUNTS = {("prompts", "test"): 40, ("pairs", "test"): 80, ("completions", "train"): 300}


@pytest.fixture
def fake_inference(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Loading takes 7 s; the log-probability of a row 0.25 s, its score 0.5 s."""

    def judging(config: Any, inputs: Any, rows: Any, n_rows: int, watch: Any) -> Any:
        return {"judge": Seconds.exactly(0.5 * n_rows)}

    monkeypatch.setattr(inference, "load_policy", lambda *_, **__: clock.work(CONSTRUCT))
    monkeypatch.setattr(
        inference, "sampling_speed", lambda *_: (SPEED, Lengths(float(EXPECTED), MOST))
    )
    monkeypatch.setattr(inference, "_logps_seconds_per_row", lambda *_: 0.25)
    monkeypatch.setattr(inference, "completed_rows", lambda data: [])
    monkeypatch.setattr(inference, "_judging", judging)


@pytest.mark.parametrize(("limit", "prompts"), [(None, 40), (10, 10), (99, 40)])
def test_the_time_of_sample(
    tmp_path: Path, clock: Clock, fake_inference: None, limit: int | None, prompts: int
):
    config = Sample(model="m", split="test", n_prompts=limit, n_completions=2)
    data = SampledData(tmp_path, COUNTS)
    time = inference.measure_sample(config, {"model": "m"}, data, Stopwatch(clock))
    batches = prompts * 2 / 4
    assert_parts(
        time.parts, {"load": CONSTRUCT, "sample": (batches * SAMPLED[0], batches * SAMPLED[1])}
    )


def test_the_time_of_label(tmp_path: Path, clock: Clock, fake_inference: None):
    config = Label(completions="sample", judge="gold")
    time = inference.measure_label(config, {}, SampledData(tmp_path, COUNTS), Stopwatch(clock))
    assert_parts(time.parts, {"judge": 0.5 * 300})


@pytest.mark.parametrize("baseline", ["a model", "reference"])
def test_the_time_of_evaluate(tmp_path: Path, clock: Clock, fake_inference: None, baseline: str):
    """10 of 40 prompts, two completions each, and 20 of 80 pairs.

    A baseline that is a model is sampled twice, and its policies' completions are read by it too.
    """
    is_model = baseline != "reference"
    config = Evaluate(
        policies=["a", "b"], baseline="c" if is_model else baseline, judge="gold",
        implicit_rewards=is_model, n_prompts=10, n_completions=2,
    )  # fmt: skip
    inputs: dict[str, Path | str] = {"policies.0": "a", "policies.1": "b", "prompts": "p"}
    inputs |= {"baseline": "c"} if is_model else {}
    data = SampledData(tmp_path, COUNTS)
    time = inference.measure_evaluate(config, inputs, data, Stopwatch(clock))
    models, samples = (3, 4) if is_model else (2, 2)
    batches = samples * 20 / 4
    reads = models + (models - 1 if is_model else 0)
    drift = 0.25 * 20 * reads
    expected: dict[str, Any] = {
        "load": models * CONSTRUCT,
        "sample": (batches * SAMPLED[0], batches * SAMPLED[1]),
        "drift": (drift, drift * (30 + MOST) / (30 + EXPECTED)),
        "judge": 0.5 * 20 * samples,
    }
    if is_model:
        expected["pairs"] = 0.25 * 2 * 20 * models
    assert_parts(time.parts, expected)


def test_seconds_per_row_are_those_of_rows_of_mean_length(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """Rows of 1 to 9 and of 96 tokens: those of median length are measured."""
    pairs = [("p", "x" * n) for n in (5, 1, 2, 3, 4, 6, 7, 8, 9, 96)]
    monkeypatch.setattr(
        inference.tokenization,
        "tokenize_rows",
        lambda _, prompts, completions: [SimpleNamespace(ids=c) for c in completions],
    )
    watch = Stopwatch(clock)

    def score(size: int) -> float:
        part = inference._typical(pairs, size)
        assert len(part) == size and all(len(c) < 96 for _, c in part)
        return watch.once(lambda: clock.work(0.1 * sum(len(c) for _, c in part)))

    per_row = inference._per_row(score, pairs, 4, None, watch)
    assert per_row == pytest.approx(0.1 * 14.1)  # 141 tokens of 10 rows


def test_the_time_of_control(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """An update of 100 steps takes half a second, the first one 5 s; there are three seeds."""

    class Trainer:
        steps = 0
        done = False

        def __init__(self, *_: Any) -> None:
            pass

        def train_step(self) -> None:
            clock.work(0.5 if self.steps else 5.0)
            self.steps += 100

    monkeypatch.setattr(control, "build_trainer", Trainer)
    monkeypatch.setattr(control.spaces, "inspect_env", lambda *_: None)
    config = PolicyGradient(environment="CartPole-v1", steps=10_000, seeds=[0, 1, 2])
    time = control.measure(config, Stopwatch(clock))
    assert_parts(time.parts, {"train": 3 * 10_000 / 100 * 0.5})
    assert time.measured == "400 steps"
