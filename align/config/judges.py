"""Configuration of judges, which ``evaluate`` and ``label`` share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator

from align.config.base import Config, Keys, Problem, between_keys, duplicates
from align.config.functions import ScoreFunction

PANEL = "panel"
"""Name of the mean over several judges in results."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*\Z")
_OWN_FIELDS = ("model", "messages", "stream", "n", "response_format")
"""Fields of a request that cannot be set with ``extra_body``."""
_SECRETS = ("api_key", "apikey", "api-key", "authorization", "access_token", "password", "secret")


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

    @between_keys
    def _check_prices_and_fields(self) -> Iterator[str]:
        if (self.input_price is None) != (self.output_price is None):
            yield "set both `input_price` and `output_price`, or neither"
        for field in self.extra_body:
            if field in _OWN_FIELDS:
                yield f"`extra_body` cannot set `{field}`; remove it"
            if field.lower() in _SECRETS:
                yield (
                    f"`extra_body` would store `{field}` with the results; name the environment "
                    "variable with the key in `key_variable`"
                )
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError):
            yield "`extra_body` must consist of values that JSON has"


class ServerJudge(Config):
    """A language model behind an API that compares two completions."""

    api: Server
    rubric: str | None = None
    """A YAML file with criteria and their weights, each answered separately. Default: one verdict
    about the whole completion."""

    @property
    def name(self) -> str:
        """What tables call the judge: its model, and the files of its prompt and rubric."""
        files = [Path(file).stem for file in (self.api.prompt, self.rubric) if file]
        return self.api.model + (f" ({', '.join(files)})" if files else "")


REQUEST_KEYS = frozenset(
    {
        "base_url",
        "key_variable",
        "concurrency",
        "timeout_seconds",
        "max_retries",
        "input_price",
        "output_price",
    }
)
"""Keys of a server that change no verdict, and are therefore not part of a digest."""
_MAPPINGS = {"function": "«function»", "annotations": "«annotations»", "api": "«api»"}


def _kind_of_judge(value: Any) -> str | None:
    """The tag of a judge in a recipe; None if it is no judge."""
    if isinstance(value, str):
        return "«text»"
    keys = value if isinstance(value, Mapping) else getattr(type(value), "model_fields", {})
    return next((tag for key, tag in _MAPPINGS.items() if key in keys), None)


JudgeConfig = Annotated[
    Annotated[str, Tag("«text»")]
    | Annotated[ScoreFunction, Tag("«function»")]
    | Annotated[AnnotationJudge, Tag("«annotations»")]
    | Annotated[ServerJudge, Tag("«api»")],
    Discriminator(
        _kind_of_judge,
        custom_error_type="judge",
        custom_error_message=(
            "expected `gold`, a reward model, or a mapping with `function`, `annotations` or `api`"
        ),
    ),
]
"""``gold``, a reward model, or one of the other judges."""
Judges = Annotated[
    Annotated[JudgeConfig, Tag("«one»")] | Annotated[list[JudgeConfig], Tag("«several»")],
    Discriminator(lambda value: "«several»" if isinstance(value, list) else "«one»"),
]
"""One judge, or a list of several."""


def by_key(judges: Judges | None) -> dict[str, JudgeConfig]:
    """Judges by their keys in the recipe: ``judge``, or ``judge.0`` and so on in a list."""
    if isinstance(judges, list):
        return {f"judge.{i}": judge for i, judge in enumerate(judges)}
    return {} if judges is None else {"judge": judges}


def judge_name(judge: JudgeConfig) -> str:
    """The name of a judge in results and tables."""
    if isinstance(judge, str):
        return judge
    if isinstance(judge, ScoreFunction):
        return judge.label
    return judge.annotations if isinstance(judge, AnnotationJudge) else judge.name


def judge_functions(judges: Judges | None) -> dict[Keys, ScoreFunction]:
    """The judges that are Python functions, by the key that names the function."""
    return {
        (*_keys(key), "function"): judge
        for key, judge in by_key(judges).items()
        if isinstance(judge, ScoreFunction)
    }


def server_judges(judges: Judges | None) -> dict[Keys, ServerJudge]:
    """The judges behind an API, by key."""
    return {
        _keys(key): judge for key, judge in by_key(judges).items() if isinstance(judge, ServerJudge)
    }


def judge_files(judges: Judges | None) -> dict[str, str]:
    """Files that judges read, by key."""
    files: dict[str, str | None] = {}
    for key, judge in by_key(judges).items():
        if isinstance(judge, AnnotationJudge):
            files[f"{key}.annotations"] = judge.annotations
        elif isinstance(judge, ServerJudge):
            files |= {f"{key}.rubric": judge.rubric, f"{key}.api.prompt": judge.api.prompt}
    return {key: file for key, file in files.items() if file is not None}


def judge_problems(judges: Judges | None) -> Iterator[Problem]:
    """Judges with the same name, and files that do not exist."""
    names = [judge_name(judge) for judge in by_key(judges).values()]
    if isinstance(judges, list) and not judges:
        yield Problem(("judge",), "expected at least one judge, got an empty list")
    for name in duplicates(names):
        yield Problem(("judge",), f"`{name}` is listed more than once; list it once")
    if PANEL in names and len(names) > 1:
        yield Problem(("judge",), f"`{PANEL}` is the name of the mean over judges; rename this one")
    for key, file in judge_files(judges).items():
        try:
            exists = Path(file).exists()
        except (OSError, ValueError):
            exists = False
        if not exists:
            yield Problem(_keys(key), f"no such file: {file}")


def digest_settings(judges: Judges | None) -> Any:
    """The settings of judges that can change a verdict, for a digest."""

    def settings(judge: JudgeConfig) -> Any:
        if isinstance(judge, ServerJudge):
            return judge.model_dump(exclude={"api": set(REQUEST_KEYS)})
        if isinstance(judge, ScoreFunction):
            return judge.digest_settings()
        return judge if isinstance(judge, str) else judge.model_dump()

    if isinstance(judges, list):
        return [settings(judge) for judge in judges]
    return None if judges is None else settings(judges)


def _keys(address: str) -> Keys:
    return tuple(int(part) if part.isdigit() else part for part in address.split("."))
