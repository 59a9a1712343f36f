"""Keys of the offline algorithms: implicit Q-learning and behavior cloning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import Problem, Stage, between_keys, duplicates
from align.config.control.base import Control, PolicyShape
from align.config.inputs import Input

OWN_KEYS = ("expectile", "temperature", "tau")
"""Keys of ``iql`` alone."""


class Offline(Control):
    """IQL or behavior cloning on recorded steps; the environment only serves the evaluation."""

    code_version: ClassVar[int] = 1
    inputs: ClassVar = {"data": Input(("control",))}

    algorithm: Literal["iql", "behavior_cloning"]
    """Algorithm."""
    data: list[str] = Field(min_length=1)
    """Recorded steps: earlier ``control`` stages with ``record_steps``, or their folders. Those of
    all their seeds are one data set."""
    steps: int = Field(ge=1)
    """Updates per seed."""
    batch_size: int = Field(256, ge=1)
    """Steps of an update, sampled from the data."""
    learning_rate: float = Field(1e-3, gt=0.0)
    """Learning rate of all networks."""
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field([64, 64], min_length=1)
    """Widths of the hidden layers, with ReLU, of the policy and of the critics."""
    expectile: float | None = Field(None, gt=0.0, lt=1.0)
    """IQL: expectile of the action values that the value of a state estimates; toward 1 it is that
    of the best recorded action. Default: 0.7."""
    temperature: float | None = Field(None, ge=0.0)
    """IQL: recorded actions weigh ``exp(temperature * advantage)``, at most 100. Default: 3."""
    tau: float | None = Field(None, gt=0.0, le=1.0)
    """IQL: part of the trained weights in each update of the target networks. Default: 0.005."""

    @between_keys
    def _check_algorithm(self) -> Iterator[str]:
        for key in OWN_KEYS:
            if getattr(self, key) is not None and self.algorithm != "iql":
                yield (
                    f"`{key}` has no effect with `algorithm: {self.algorithm}`; remove it, or set "
                    "`algorithm: iql`"
                )

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Stages that are listed twice, record nothing, or act in another environment."""
        yield from super().problems(stages)
        for name in duplicates(self.data):
            yield Problem(("data",), f"`{name}` is listed more than once; list it once")
        others: defaultdict[str, dict[int, str]] = defaultdict(dict)
        for place, name in enumerate(self.data):
            source = stages.get(name)
            if not isinstance(source, Control):
                continue
            if not source.n_recorded_steps:
                message = f"the stage `{name}` records no steps; set `record_steps` there"
                yield Problem(("data", place), message)
            elif source.environment != self.environment:
                others[source.environment][place] = f"`{name}`"
        for environment, names in others.items():
            place = next(iter(names))
            keys = ("data", place) if len(names) < len(self.data) else ("environment",)
            sources = "stage" if len(names) == 1 else "stages"
            verb = "records" if len(names) == 1 else "record"
            yield Problem(
                keys,
                f"the {sources} {', '.join(names.values())} {verb} {environment}, but this stage "
                f"has {self.environment}; change one of them",
            )

    @property
    def value_expectile(self) -> float:
        """Expectile of the values."""
        return 0.7 if self.expectile is None else self.expectile

    @property
    def weight_temperature(self) -> float:
        """Temperature of the weights of recorded actions."""
        return 3.0 if self.temperature is None else self.temperature

    @property
    def target_rate(self) -> float:
        """Part of the trained weights in each update of the target networks."""
        return 0.005 if self.tau is None else self.tau

    @property
    def policy_shape(self) -> PolicyShape:
        """A perceptron with ReLU, and a distribution by the actions of the environment."""
        return PolicyShape(self.hidden_sizes, "relu", None)
