"""Configuration of judges, which ``evaluate`` and ``label`` share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config.base import Config


class FunctionJudge(Config):
    """Scores of a Python function."""

    function: str
    """The function, written ``module:function``, with the signature of reward functions."""


class AnnotationJudge(Config):
    """Decisions of people about pairs of completions."""

    annotations: str
    """A file of annotations, or a folder with such files."""


class Server(Config):
    """A server with the chat completions interface of OpenAI, and how it is asked."""

    base_url: str
    """Address below which ``/chat/completions`` answers, such as ``http://localhost:8000/v1``."""
    model: str
    """Name of the model, as the server knows it."""
    key_variable: str | None = None
    """Name of the environment variable with the API key. Default: no key is sent."""
    prompt: str | None = None
    """A file with a Jinja template for the judge's instructions. Default: the built-in one."""
    structured_output: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the server is asked to answer in JSON."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer in tokens."""
    n_verdicts: int = Field(1, ge=1)
    """Verdicts per pair and order. From 2 on, the judge's agreement with itself is measured."""
    concurrency: int = Field(8, ge=1)
    """Largest number of requests at the same time."""
    timeout_seconds: float = Field(60.0, gt=0.0)
    """Longest time until a complete answer to one request."""
    max_retries: int = Field(5, ge=0)
    """Further attempts after a rate limit, a server error, a timeout or a lost connection."""
    input_price: float | None = Field(None, ge=0.0)
    """Price of a million input tokens, in any currency."""
    output_price: float | None = Field(None, ge=0.0)
    """Price of a million output tokens."""


class ServerJudge(Config):
    """A language model behind an API that compares two completions."""

    api: Server
    rubric: str | None = None
    """A YAML file with criteria and their weights, each answered separately. Default: one verdict
    about the whole completion."""


JudgeConfig = str | FunctionJudge | AnnotationJudge | ServerJudge
"""``gold``, a reward model, or one of the other judges."""
