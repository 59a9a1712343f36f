"""A server with the addresses of vLLM 0.31 and 0.33 that online RL uses, on the loopback device.

It samples from a model of transformers, one token at a time. Like vLLM it freezes requests when it
is paused, receives weights, and continues. A request that vLLM would refuse, or that comes out of
order, gets status 400 and is recorded in :attr:`VLLMServer.violations`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch

from align.models import loading
from helpers.vllm_modules import AnyGroups, Group, RemoteGroup

UPDATE = [
    ("/pause", "mode=keep"),
    ("/start_weight_update", ""),
    ("/update_weights", ""),
    ("/finish_weight_update", ""),
    ("/reset_prefix_cache", "reset_running_requests=true"),
    ("/resume", ""),
]
"""The calls of an update of the weights, in order."""
COMPLETION = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "logprobs": 0,
    "return_token_ids": True,
}
"""Fields of a request for a completion whose values are always the same."""
Answer = Callable[[BaseHTTPRequestHandler], None]


class VLLMServer:
    """A model behind the addresses of vLLM, and what happened."""

    def __init__(self, model: Any, groups: AnyGroups) -> None:
        self.model, self.groups = model, groups
        self.url = ""
        self.group: Group | RemoteGroup | None = None
        self.version = 0
        """Updates of the weights so far."""
        self.calls: list[tuple[str, str]] = []
        """Path and query of each request."""
        self.bodies: list[tuple[str, Any]] = []
        self.started: list[tuple[tuple[int, ...], int]] = []
        """Prompt of each completion, and the version of the weights when its request came."""
        self.violations: list[str] = []
        self.faults: dict[str, Answer] = {}
        """What answers in place of the server at a path."""
        self.info: dict[str, Any] = {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
        }
        self.cache_is_reset = True
        """What ``/reset_prefix_cache`` returns."""
        self.updates: list[str] = []
        """Calls of the present update so far."""
        self._running = threading.Event()
        self._running.set()
        self._lock = threading.Lock()

    def answer(self, path: str, query: str, body: Any) -> Any:
        """The answer to a request.

        Raises:
            ValueError: vLLM would refuse it, or it is out of order.
        """
        order = [name for name, _ in UPDATE]
        if path in order:
            place = order.index(path)
            _check(self.updates == order[:place], f"{path} after {self.updates}")
            _check((path, query) == UPDATE[place], f"{path}?{query}")
            self.updates = [] if path == order[-1] else [*self.updates, path]
        method = getattr(self, path.rpartition("/")[2], None)
        _check(method is not None, f"no such address: {path}")
        return method(body) if query == "" or path in order else method(body, query)

    def models(self, body: None) -> Any:
        return {"object": "list", "data": [{"id": "the-model", "object": "model"}]}

    def health(self, body: None) -> Any:
        return {}

    def server_info(self, body: None, query: str) -> Any:
        _check(query == "config_format=json", query)
        return {"vllm_config": self.info, "vllm_env": {}, "system_env": {}}

    def get_world_size(self, body: None) -> Any:
        return {"world_size": 1}

    def init_weight_transfer_engine(self, body: Any) -> Any:
        info = body["init_info"]
        keys = {"master_address", "master_port", "rank_offset", "world_size", "packed"}
        _check(body.keys() == {"init_info"} and info.keys() == keys, str(body))
        _check((info["rank_offset"], info["packed"]) == (1, True), str(info))
        self.group = self.groups.join(info["master_port"])
        return {"message": "Weight transfer initialized"}

    def pause(self, body: None) -> Any:
        self._running.clear()
        with self._lock:  # the token that is being computed
            return {"status": "paused"}

    def start_weight_update(self, body: Any) -> Any:
        _check(self.group is not None and body == {}, str(body))
        return {"message": "Weight update started"}

    def update_weights(self, body: Any) -> Any:
        info = body["update_info"]
        keys = {"names", "dtype_names", "shapes"}
        _check(body.keys() == {"update_info"} and info.keys() == keys, str(body))
        assert self.group is not None
        parameters = dict(self.model.named_parameters())
        for name, dtype, shape in zip(
            info["names"], info["dtype_names"], info["shapes"], strict=True
        ):
            tensor = self.group.receive()
            _check((str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape), name)
            parameters.pop(name).data.copy_(tensor)
        _check(not parameters, f"not sent: {list(parameters)}")
        return {"message": "Weights updated"}

    def finish_weight_update(self, body: Any) -> Any:
        _check(body == {}, str(body))
        self.version += 1
        return {"message": "Weight update finished"}

    def reset_prefix_cache(self, body: None) -> Any:
        return {"success": self.cache_is_reset}

    def resume(self, body: None) -> Any:
        self._running.set()
        return {"status": "resumed"}

    def completions(self, body: Any) -> Any:
        keys = {"model", "prompt", "max_tokens", "temperature", "seed", "stop_token_ids"}
        _check(body.keys() == keys | COMPLETION.keys(), str(body.keys()))
        _check({key: body[key] for key in COMPLETION} == COMPLETION, str(body))
        _check(body["model"] == "the-model", body["model"])
        self.started.append((tuple(body["prompt"]), self.version))
        ids, logps = list(body["prompt"]), []
        generator = torch.Generator().manual_seed(body["seed"])
        reason = "length"
        for _ in range(body["max_tokens"]):
            self._running.wait()
            with self._lock, torch.inference_mode():
                logits = self.model(torch.tensor([ids])).logits[0, -1]
            distribution = (logits / body["temperature"]).log_softmax(-1)
            ids.append(int(distribution.exp().multinomial(1, generator=generator)))
            logps.append(float(distribution[ids[-1]]))
            if ids[-1] in body["stop_token_ids"]:
                reason = "stop"
                break
        tokens = ids[len(body["prompt"]) :]
        return {"choices": [choice(tokens, logps, reason)]}


def choice(tokens: list[int], logps: list[float], finish_reason: str = "stop") -> dict[str, Any]:
    """A completion as vLLM returns it."""
    names = [f"token_id:{token}" for token in tokens]
    logprobs = {
        "text_offset": [0] * len(tokens),
        "token_logprobs": logps,
        "tokens": names,
        "top_logprobs": [{name: logp} for name, logp in zip(names, logps, strict=True)],
    }
    return {
        "index": 0,
        "text": "",
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": None,
        "token_ids": tokens,
        "prompt_token_ids": None,
    }


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    """Send a complete response."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@contextlib.contextmanager
def serving(folder: Path, groups: AnyGroups) -> Iterator[VLLMServer]:
    """A server with the model of a folder, within this block."""
    server = VLLMServer(loading.load_merged(folder, dtype="float32").eval(), groups)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            address = urlsplit(self.path)
            assert parse_qsl(address.query, strict_parsing=True) or not address.query
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(content) if content else None
            server.calls.append((address.path, address.query))
            server.bodies.append((address.path, body))
            self.body = body
            if fault := server.faults.get(address.path):
                fault(self)
                return
            try:
                answer = server.answer(address.path, address.query, body)
                status = 200
            except Exception as error:
                server.violations.append(f"{type(error).__name__}: {error}")
                answer, status = {"error": {"message": str(error)}}, 400
            send(self, status, json.dumps(answer).encode())

        do_GET = do_POST = handle_request  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256  # connections that arrive at once

    http = Listener(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server._running.set()
        http.shutdown()
        http.server_close()
        thread.join()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
