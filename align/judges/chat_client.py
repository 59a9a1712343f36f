"""A client of servers with the chat completions interface of OpenAI.

A request has a bounded time, also where the server sends its answer in small pieces, and answers
have a bounded size. Rate limits, server errors, timeouts and lost connections are tried again. What
another attempt cannot change is a ``UserError`` at once. The API key is a header of requests and
nothing else: it is removed from every text that comes back.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from align.config.judges import Server
from align.errors import UserError, printable
from align.runtime.progress import LOGGER

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

LARGEST_ANSWER = 4 * 2**20
"""Bytes of an answer, after it is decompressed."""
LONGEST_WAIT_SECONDS = 60.0
"""Longest wait before another attempt, also where the server sends a longer ``Retry-After``."""
FIRST_WAIT_SECONDS = 2.0
"""Wait before the second attempt. It doubles with each further one."""
LIST_SECONDS = 5.0
"""Longest time until a complete list of models."""
SHORTEST_PIECE = 8
"""Characters of the API key that are removed from a text even without the others."""
LONGEST_MESSAGE = 10_000
"""Characters of a message of the server that are read."""
_AGAIN = (408, 409, 425, 429)
_TOO_LONG = re.compile(r"context.{0,12}(length|size|window)|too (long|large)", re.IGNORECASE)


class RequestFailedError(Exception):
    """A request without a usable answer; others may succeed."""

    def __init__(
        self,
        reason: str,
        *,
        again: bool,
        wait: float | None = None,
        reached: bool = True,
        repair: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        """Whether another attempt may succeed."""
        self.wait = wait
        """Seconds until the next attempt, if the server names them."""
        self.reached = reached
        """Whether a connection with the server was made."""
        self.repair = repair
        """What to change if other requests fail in the same way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The first choice of an answer, and the tokens that it took."""

    choice: Mapping[str, Any]
    input_tokens: int
    output_tokens: int


def read_key(variable: str | None) -> str | None:
    """The API key in the environment variable called ``variable``.

    Raises:
        UserError: The variable is not set, or has characters that no key has.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"api.key_variable: the environment variable {variable} is not set; set it to the API "
            "key, or remove `key_variable` if the server needs none"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"api.key_variable: the environment variable {variable} has characters that no API "
            "key has; set it to the key alone"
        )
    return key


class Redactor:
    """Removes an API key, and long parts of it, from texts that come from a server."""

    def __init__(self, key: str | None) -> None:
        self._key = key or ""
        last = len(self._key) - SHORTEST_PIECE
        self._pieces = {self._key[i : i + SHORTEST_PIECE] for i in range(last + 1)}

    def remove(self, text: object) -> str:
        """A text without the key, and without half pairs of UTF-16, which no file can hold."""
        words = str(text).encode(errors="replace").decode()
        if not self._pieces:
            return words.replace(self._key, "***") if self._key else words
        hidden: set[int] = set()
        for i in range(len(words) - SHORTEST_PIECE + 1):
            if words[i : i + SHORTEST_PIECE] in self._pieces:
                hidden.update(range(i, i + SHORTEST_PIECE))
        if not hidden:
            return words
        shown = ["\0" if i in hidden else char for i, char in enumerate(words)]
        return re.sub("\0+", "***", "".join(shown))

    def one_line(self, text: object) -> str:
        """The beginning of a text on one line, without the key."""
        words = self.remove(str(text)[:LONGEST_MESSAGE]).split()
        return printable(" ".join(words)[:300])


class ChatClient:
    """Sends requests to one server, within ``async with``."""

    def __init__(self, server: Server, key: str | None) -> None:
        self.server = server
        self.url = f"{server.base_url}/chat/completions"
        self.n_requests = 0
        """Requests that were sent, with further attempts."""
        self.answered = False
        """Whether the server has answered a request, so that the settings are valid."""
        self.redact = Redactor(key)
        """Removes the API key from texts."""
        self._key = key
        self._resume_at = 0.0  # a rate limit holds for all requests
        self._client: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> ChatClient:
        import httpx2

        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
            # Its debugging output has the headers of answers, which may repeat the key.
            logging.getLogger("httpcore2").setLevel(logging.INFO)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            self._client = httpx2.AsyncClient(
                headers=headers,
                timeout=None,
                limits=limits,
                verify=self.url.startswith("https:"),  # reading certificates takes 0.1 s
            )
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            raise UserError(
                f"{self.url}: the proxy or the certificates that environment variables name cannot "
                f"be used: {self.redact.one_line(error)}"
            ) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def complete(self, body: Mapping[str, Any]) -> Answer:
        """Send a request until it is answered, and at most ``max_retries`` times again.

        Raises:
            RequestFailedError: There is no usable answer to this request.
            UserError: The server accepts no such request.
        """
        failures = 0
        while True:
            pause = self._resume_at - time.monotonic()
            if pause > 0:  # not all requests at the same moment
                await asyncio.sleep(pause + FIRST_WAIT_SECONDS * random.random())
            try:
                return await self._attempt(body)
            except RequestFailedError as error:
                failures += 1
                if not error.again or failures > self.server.max_retries:
                    error.reason += f" (attempt {failures})" * (failures > 1)
                    raise
                if error.wait is not None:
                    wait = min(error.wait, LONGEST_WAIT_SECONDS)
                    self._resume_at = max(self._resume_at, time.monotonic() + wait)
            wait = min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def list_models(self) -> list[str]:
        """Names of the models that the server lists; empty if it has no such list.

        Raises:
            RequestFailedError: No server answers.
            UserError: The server refuses the API key.
        """
        url = f"{self.server.base_url}/models"
        seconds = min(LIST_SECONDS, self.server.timeout_seconds)
        response, content = await self._send("GET", url, None, seconds)
        # 403: the key may be one that must not list models.
        if response.status_code == 401 or response.is_redirect:
            raise self._refusal(response, content, url)
        try:
            return [str(model["id"]) for model in json.loads(content)["data"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            return []

    async def _attempt(self, body: Mapping[str, Any]) -> Answer:
        """Send a request once."""
        self.n_requests += 1
        content, seconds = json.dumps(body).encode(), self.server.timeout_seconds
        response, received = await self._send("POST", self.url, content, seconds)
        if not response.is_success:
            raise self._refusal(response, received, self.url)
        answer = self._read_answer(received, response.headers.get("Content-Type", ""))
        self.answered = True
        return answer

    async def _send(
        self, method: str, url: str, content: bytes | None, seconds: float
    ) -> tuple[httpx2.Response, bytes]:
        """Send a request once, and receive all of its answer within ``seconds``."""
        import httpx2

        assert self._client is not None
        try:
            async with asyncio.timeout(seconds):
                async with self._client.stream(method, url, content=content) as response:
                    return response, await _read(response)
        except TimeoutError:
            reason = f"no complete answer in {seconds:g} seconds"
            raise RequestFailedError(reason, again=True) from None
        except (httpx2.InvalidURL, UnicodeError):
            raise UserError(f"{url}: not a valid address; correct `base_url`") from None
        except httpx2.ConnectError as error:
            again = "CERTIFICATE_VERIFY_FAILED" not in str(error)
            reason = f"cannot connect: {self.redact.one_line(error)}"
            raise RequestFailedError(reason, again=again, reached=False) from None
        except httpx2.DecodingError:
            raise RequestFailedError("the compressed answer is damaged", again=True) from None
        except httpx2.TransportError as error:
            reason = self.redact.one_line(error) or type(error).__name__
            raise RequestFailedError(f"the connection was lost: {reason}", again=True) from None

    def _read_answer(self, content: bytes, content_type: str) -> Answer:
        """The answer in the body of a response."""
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            self._check_model(data.get("model"))
            usage = data.get("usage") or {}
            tokens = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            if not isinstance(choice, dict):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            kind = content_type.partition(";")[0].strip() or "no content type"
            reason = (
                f"no chat completion: {self.redact.one_line(content.decode(errors='replace'))!r:.100} "
                f"({kind}); `base_url` usually ends in /v1"
            )
            raise RequestFailedError(reason, again=True) from None
        counts = [n if isinstance(n, int) and 0 < n < 10**9 else 0 for n in tokens]
        return Answer(choice, *counts)

    def _check_model(self, name: object) -> None:
        """Warn once about a server that answers as another model than the requested one."""
        asked, answering = (
            str(each).rpartition("/")[2].lower() for each in (self.server.model, name)
        )
        if name and asked not in answering and answering not in asked and not self.answered:
            LOGGER.warning(
                "%s: the server answers as model `%s`, not `%s`",
                self.url,
                self.redact.one_line(name),
                self.server.model,
            )

    def _refusal(self, response: httpx2.Response, content: bytes, url: str) -> Exception:
        """The error for a response that is no success."""
        status = response.status_code
        detail = self.redact.one_line(_error_message(content))
        reason = f"HTTP {status}" + f": {detail}" * bool(detail)
        if status == 402 or "insufficient_quota" in detail:
            return UserError(f"{url}: {reason}; the account has no quota left")
        no_target = status < 400 and not response.has_redirect_location
        if status in _AGAIN or status >= 500 or no_target:
            wait = retry_after_seconds(response.headers.get("Retry-After"))
            return RequestFailedError(reason, again=True, wait=wait)
        if status in (400, 413, 422):
            # The text of this request, such as its length; or the settings of all of them.
            repair = "" if _TOO_LONG.search(detail) else self._repair(status, response)
            return RequestFailedError(reason, again=False, repair=repair)
        return UserError(f"{url}: {reason}; {self._repair(status, response)}")

    def _repair(self, status: int, response: httpx2.Response) -> str:
        """What to change after a response that forbids all requests."""
        if response.is_redirect:
            target = self.redact.one_line(response.headers.get("Location", "").partition("?")[0])
            return f"the server redirects to {target!r}; correct `base_url`"
        if status in (401, 403):
            variable = self.server.key_variable
            if variable is None:
                return "name the environment variable with the API key in `key_variable`"
            return f"correct the API key in the environment variable {variable}"
        if status in (404, 405):
            return (
                f"correct `base_url`, which usually ends in /v1, or `model` ({self.server.model})"
            )
        return (
            "correct the settings under `api`, such as `model`, `structured_output`, `extra_body`"
        )


async def _read(response: httpx2.Response) -> bytes:
    """The body of a response, up to :data:`LARGEST_ANSWER`."""
    if "text/event-stream" in response.headers.get("Content-Type", ""):
        reason = "the server streams its answer, although `stream: false` was requested"
        raise RequestFailedError(reason, again=False)
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > LARGEST_ANSWER:
            reason = f"the answer is larger than {LARGEST_ANSWER // 2**20} MiB"
            raise RequestFailedError(reason, again=False)
    return bytes(content)


def run(function: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function to its end, also inside the event loop of a notebook."""
    try:
        asyncio.get_running_loop()
        in_notebook = True
    except RuntimeError:
        in_notebook = False
    if not in_notebook:
        return asyncio.run(function())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(function())).result()


def _error_message(content: bytes) -> str:
    """The message of an error in the formats of common servers, else the body itself."""
    text = content.decode(errors="replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return "an HTML page" if text.lstrip()[:1] == "<" else text
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return str(error)
    words = [error.get(key) for key in ("code", "message", "detail")]
    return ": ".join(str(word) for word in words if word) or text


def retry_after_seconds(header: str | None) -> float | None:
    """The wait that a ``Retry-After`` header names: seconds, or a date. None if it has neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except (ValueError, TypeError, OverflowError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return None if math.isnan(seconds) else max(0.0, seconds)
