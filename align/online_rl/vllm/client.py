"""The calls of a vLLM server that online RL needs: completions as tokens, and updates of weights.

All requests run in one thread with an event loop, so that a failed run need not wait for requests
that are under way. A request has a bounded time, also where the server sends its answer in small
pieces, and an answer a bounded size. No request is sent a second time: a weight update that is
repeated would wait for weights that nobody sends. A run that ends resumes from its checkpoint.

Left out: the weights themselves, which travel over NCCL (:mod:`align.online_rl.vllm.weights`).
"""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from align.errors import UserError, printable
from align.online_rl.vllm.completion import (
    Completion,
    InvalidCompletionError,
    read_completion,
    sampling_settings,
)

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

MAX_REQUESTS = 256
"""Requests to the server at the same time, from each process."""
LARGEST_ANSWER = 64 * 2**20
"""Bytes of an answer."""
_RESUMES = "start the server again and run the same command, which resumes"
_OTHER = "set `vllm_url` to a vLLM server"
_SERVE = (
    "start it with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config "
    '\'{"backend": "nccl"}\' --logprobs-mode processed_logprobs`'
)


class Client:
    """A vLLM server at ``url``, which answers each request within ``timeout`` seconds.

    Raises:
        UserError: The server cannot be reached, is not set up for online RL, or gives an answer
            that is none. Every method raises it, on one line that names the address.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(MAX_REQUESTS)
        self._http: httpx2.AsyncClient | None = None
        threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
        stop = self._loop.stop
        weakref.finalize(self, self._loop.call_soon_threadsafe, stop).atexit = False
        self.model = self._read("/v1/models", lambda answer: str(answer["data"][0]["id"]))
        """Name of the model that the server lists first."""

    def check_setup(self) -> None:
        """Check that the server can receive weights, and returns the probabilities it samples from.

        Raises:
            UserError: It was started without an option that this needs.
        """
        answer = self._read(
            "/server_info",
            lambda answer: dict(answer["vllm_config"]),
            {"config_format": "json"},
            repair=_SERVE,
        )
        if not answer.get("weight_transfer_config"):
            raise self.error("/server_info", "the server has no engine to receive weights", _SERVE)
        model_config = answer.get("model_config")
        mode = model_config.get("logprobs_mode") if isinstance(model_config, dict) else None
        if mode != "processed_logprobs":
            reason = f"the server has `--logprobs-mode {mode}`, before temperature"
            raise self.error("/server_info", reason, _SERVE)

    def world_size(self) -> int:
        """Workers of the server; each receives the weights."""
        return self._read(
            "/get_world_size", lambda answer: int(answer["world_size"]), repair=_SERVE
        )

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> Future[Any]:
        """Let the workers of the server join the group over which weights are sent."""
        return self._send("POST", "/init_weight_transfer_engine", {"init_info": dict(init_info)})

    def pause(self) -> None:
        """Freeze the requests of the server; new ones wait as well."""
        self._send("POST", "/pause", params={"mode": "keep"}).result()

    def start_weight_update(self) -> None:
        """Prepare the workers for weights."""
        self._send("POST", "/start_weight_update", {}).result()

    def update_weights(self, update_info: Mapping[str, Any]) -> Future[Any]:
        """Let the workers receive weights; it ends when they have received all of them."""
        return self._send("POST", "/update_weights", {"update_info": dict(update_info)})

    def finish_weight_update(self) -> None:
        """Put the received weights to use."""
        self._send("POST", "/finish_weight_update", {}).result()

    def reset_prefix_cache(self) -> None:
        """Forget keys and values that the last weights computed, also those of frozen requests."""
        path = "/reset_prefix_cache"
        answer = self._send("POST", path, params={"reset_running_requests": "true"}).result()
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise self.error(
                path, f"not done: {_excerpt(answer)}", "stop what else uses the server"
            )

    def resume(self) -> None:
        """Continue frozen requests, and start new ones."""
        self._send("POST", "/resume").result()

    def complete(
        self,
        prompt: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
        stops: set[int],
        seed: int,
    ) -> Future[Completion]:
        """Request one completion, with its own seed."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            **sampling_settings(
                temperature=temperature, max_tokens=max_tokens, stops=stops, seed=seed
            ),
            "return_token_ids": True,
        }

        def read(answer: Any) -> Completion:
            return read_completion(answer, max_tokens=max_tokens, stops=stops)

        return self._submit("POST", "/v1/completions", body, {}, read, _OTHER)

    def error(self, path: str, reason: str, repair: str) -> UserError:
        """An error of the server at an address, on one line."""
        line = f"vllm_url: {self.url}{path}: {' '.join(reason.split())}; {repair}"
        return UserError(printable(line))

    def _read(
        self,
        path: str,
        read: Callable[[Any], T],
        params: Mapping[str, str] | None = None,
        repair: str = _OTHER,
    ) -> T:
        return self._submit("GET", path, None, params or {}, read, repair).result()

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Future[Any]:
        return self._submit(method, path, body, params or {}, lambda answer: answer, _SERVE)

    def _submit(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        params: Mapping[str, str],
        read: Callable[[Any], T],
        repair: str,
    ) -> Future[T]:
        request = self._request(method, path, body, params, read, repair)
        return asyncio.run_coroutine_threadsafe(request, self._loop)

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        params: Mapping[str, str],
        read: Callable[[Any], T],
        repair: str,
    ) -> T:
        import httpx2

        content = None if body is None else json.dumps(body).encode()
        try:
            async with self._free, asyncio.timeout(self.timeout):
                status, received = await self._exchange(method, path, content, params)
        except TimeoutError:
            reason = f"no complete answer in {self.timeout:g} seconds"
            raise self.error(path, reason, f"raise `vllm_timeout`, or {_RESUMES}") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError):
            raise self.error(path, "not a valid address", "correct `vllm_url`") from None
        except httpx2.ConnectError as error:
            raise self.error(path, f"no server answers ({error})", _RESUMES) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = f"the connection was lost ({str(error) or type(error).__name__})"
            raise self.error(path, reason, _RESUMES) from None
        if not 200 <= status < 300:
            repair = repair if status == 404 else "see the log of the server"
            raise self.error(path, f"HTTP {status}: {_message(received)}", repair)
        try:
            return read(json.loads(received))
        except InvalidCompletionError as error:
            raise self.error(path, error.reason, error.repair) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = f"an answer that vLLM does not give: {_excerpt(received)}"
            raise self.error(path, reason, _OTHER) from None

    async def _exchange(
        self, method: str, path: str, content: bytes | None, params: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """Send a request, and receive its answer as far as it may be long."""
        import httpx2

        if self._http is None:
            # A connection for each request, so that none is left open in the end.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            headers = {"Content-Type": "application/json"}
            self._http = httpx2.AsyncClient(timeout=None, limits=limits, headers=headers)
        url, received = f"{self.url}{path}", bytearray()
        async with self._http.stream(method, url, content=content, params=params) as response:
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > LARGEST_ANSWER:
                    raise httpx2.DecodingError(f"an answer of more than {LARGEST_ANSWER} bytes")
            return response.status_code, bytes(received)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop until it is stopped, which happens when its client is no longer used."""
    loop.run_forever()
    loop.close()


def _message(received: bytes) -> str:
    """The message in the answer to a request that failed, or its beginning."""
    try:
        return " ".join(str(json.loads(received)["error"]["message"]).split())[:300]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _excerpt(received)


def _excerpt(answer: object) -> str:
    """The beginning of an answer, on one line."""
    text = answer[:2000].decode(errors="replace") if isinstance(answer, bytes) else str(answer)
    return repr(" ".join(text.split())[:200])
