"""Configuration of judges, which ``evaluate`` and ``label`` share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from align.config.base import Config

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*\Z")
_OWN_FIELDS = ("model", "messages", "stream", "n", "response_format")
"""Fields of a request that cannot be set with ``extra_body``."""


class FunctionJudge(Config):
    """Scores of a Python function."""

    function: str
    """The function, written ``module:function``, with the signature of reward functions."""


class AnnotationJudge(Config):
    """Decisions of people about pairs of completions."""

    annotations: str
    """A file of annotations, or a folder with such files."""


class Server(Config):
    """A server with the chat completions interface of OpenAI, and how requests are sent to it."""

    base_url: str
    """Address below which ``/chat/completions`` answers, such as ``http://localhost:8000/v1``."""
    model: str = Field(min_length=1)
    """Name of the model, as the server knows it."""
    key_variable: str | None = None
    """Name of the environment variable with the API key, such as ``OPENAI_API_KEY``. Default: no
    key is sent."""
    prompt: str | None = None
    """A file with a Jinja template for the judge's instructions. Default: the built-in one."""
    structured_output: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How an answer in JSON is requested: ``none`` only describes it in the prompt, for servers
    without ``response_format``."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer in tokens. A longer one gives no verdict."""
    extra_body: dict[str, Any] = Field({})
    """Further fields of each request, such as ``seed`` or ``reasoning_effort``; null removes a
    field."""
    n_verdicts: int = Field(1, ge=1)
    """Verdicts per pair and order. From 2 on, the judge's agreement with itself is measured."""
    concurrency: int = Field(8, ge=1, le=1000)
    """Largest number of requests at the same time."""
    timeout_seconds: float = Field(60.0, gt=0.0)
    """Longest time until a complete answer to one request."""
    max_retries: int = Field(5, ge=0)
    """Further attempts after a rate limit, a server error, a timeout or a lost connection."""
    input_price: float | None = Field(None, ge=0.0)
    """Price of a million input tokens, in any currency."""
    output_price: float | None = Field(None, ge=0.0)
    """Price of a million output tokens, in the same currency."""

    @field_validator("base_url")
    @classmethod
    def _check_address(cls, address: str) -> str:
        """Refuse an address that is not usable, without repeating it: it may contain a password."""
        expected = "expected an address such as http://localhost:8000/v1"
        try:
            parts = urlsplit(address)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError(f"{expected}, got one with a malformed host or port") from None
        if parts.scheme not in ("http", "https") or not host or re.search(r"\s", address):
            raise ValueError(f"{expected}: http:// or https:// and a host, without spaces")
        if "@" in parts.netloc:
            raise ValueError(
                "contains a user name or password; remove it, and name the environment variable "
                "with the key in `key_variable`"
            )
        if parts.query or parts.fragment:
            raise ValueError(f"{expected}, got one with `?` or `#`; remove that part")
        address = address.rstrip("/")
        if address.endswith("/chat/completions"):
            raise ValueError("remove /chat/completions from the end; it is added to each request")
        return address

    @field_validator("key_variable")
    @classmethod
    def _check_variable(cls, name: str | None) -> str | None:
        """Refuse what may be the key itself, without repeating it."""
        if name is not None and not _VARIABLE.match(name):
            raise ValueError(
                "expected the name of an environment variable in upper case, such as "
                "OPENAI_API_KEY, not the key itself: a recipe is stored with the results"
            )
        return name

    @model_validator(mode="after")
    def _check_prices_and_fields(self) -> Server:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("set both `input_price` and `output_price`, or neither")
        for field in _OWN_FIELDS:
            if field in self.extra_body:
                raise ValueError(f"`extra_body` cannot set `{field}`; remove it")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("`extra_body` must consist of values that JSON has") from None
        return self


class ServerJudge(Config):
    """A language model behind an API that compares two completions."""

    api: Server
    rubric: str | None = None
    """A YAML file with criteria and their weights, each answered separately. Default: one verdict
    about the whole completion."""

    @property
    def name(self) -> str:
        """What tables call the judge: its model, and its rubric."""
        return self.api.model + (f" by {Path(self.rubric).stem}" if self.rubric else "")


JudgeConfig = str | FunctionJudge | AnnotationJudge | ServerJudge
"""``gold``, a reward model, or one of the other judges."""
