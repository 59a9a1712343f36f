"""The keys of a judge behind an API."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.config.judges import Server, ServerJudge


def server(**keys: Any) -> Server:
    return Server.model_validate({"base_url": "http://localhost:8000/v1", "model": "m", **keys})


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:8000/v1", "http:// or https:// and a host"),
        ("ftp://host/v1", "http:// or https:// and a host"),
        ("http://", "http:// or https:// and a host"),
        ("http://my host/v1", "without spaces"),
        ("http://host:99999/v1", "malformed host or port"),
        ("http://[::1/v1", "malformed host or port"),
        ("https://user:hunter2@host/v1", "user name or password"),
        ("https://host/v1?key=hunter2", "with `?` or `#`"),
        ("https://host/v1#hunter2", "with `?` or `#`"),
        ("https://host/v1/chat/completions", "remove /chat/completions"),
    ],
)
def test_a_wrong_address_is_an_error_that_does_not_repeat_it(address, message):
    with pytest.raises(ValidationError) as raised:
        server(base_url=address)
    (error,) = raised.value.errors()
    assert message in error["msg"] and "hunter2" not in error["msg"]


@pytest.mark.parametrize("address", ["http://[::1]:8000/v1", "https://api.example.com/v1/"])
def test_an_address_is_kept_without_a_slash_at_its_end(address):
    assert server(base_url=address).base_url == address.rstrip("/")


@pytest.mark.parametrize("value", ["sk-proj-abcDEF123", "hf_abcdefGHIJ", "gsk_x1", "$KEY", "", "a"])
def test_a_key_in_the_place_of_its_variable_is_not_repeated(value):
    with pytest.raises(ValidationError, match="not the key itself") as raised:
        server(key_variable=value)
    assert value == "" or f"'{value}" not in raised.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input_price": 1.0}, "set both"),
        ({"extra_body": {"model": "x"}}, "cannot set `model`"),
        ({"extra_body": {"stream": True}}, "cannot set `stream`"),
        ({"extra_body": {"API_KEY": "x"}}, "would store `API_KEY` with the results"),
        ({"extra_body": {"seed": float("inf")}}, "values that JSON has"),
        ({"model": ""}, "at least 1 character"),
        ({"timeout_seconds": 0.0}, "greater than 0"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"max_retries": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_errors(keys, message):
    with pytest.raises(ValidationError, match=message):
        server(**keys)


def test_a_judge_is_named_after_its_model_and_files():
    api = {"base_url": "http://x", "model": "org/judge"}
    strict = ServerJudge.model_validate({"api": api | {"prompt": "a/strict.jinja"}})
    brief = ServerJudge.model_validate(strict.model_dump() | {"rubric": "brief.yaml"})
    assert ServerJudge.model_validate({"api": api}).name == "org/judge"
    assert (strict.name, brief.name) == ("org/judge (strict)", "org/judge (strict, brief)")
