"""A scripted server with the chat completions interface of OpenAI, on the loopback device."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Request"], None]


@dataclass
class Request:
    """A request that arrived, and the ways to answer it."""

    handler: BaseHTTPRequestHandler
    number: int
    """How many requests arrived before it."""
    body: dict[str, Any]

    @property
    def question(self) -> str:
        """The text of the judge's prompt."""
        return self.body["messages"][-1]["content"]

    def send(self, status: int, content: bytes | str, **headers: str) -> None:
        """Send a complete response; underscores in names of headers are hyphens."""
        content = content.encode() if isinstance(content, str) else content
        self.handler.send_response(status)
        headers = {"Content_Type": "application/json", **headers}
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(content)))
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def error(self, status: int, message: str = "", **headers: str) -> None:
        """Send an error in OpenAI's format."""
        self.send(status, json.dumps({"error": {"message": message}}), **headers)

    def answer(self, content: Any, finish_reason: str = "stop", **message: Any) -> None:
        """Send a chat completion with this content of its message."""
        self.send(200, json.dumps(completion(content, finish_reason, **message)))

    def prefer(self, verdict: str, reason: str = "because") -> None:
        """Send a verdict in the requested format."""
        self.answer(json.dumps({"reason": reason, "verdict": verdict}))

    def drop(self) -> None:
        """Close the connection without a response."""
        self.handler.close_connection = True
        self.handler.connection.close()


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion, which took 10 tokens of input and 2 of output."""
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


@dataclass
class JudgeServer:
    """A running server: its address, and what arrived."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    models: list[str] | None = None
    """Models that it lists; None: it has no such list."""
    list_status: int = 404
    """The status in place of a list."""
    at_once: int = 0
    """Largest number of requests that were answered at the same time."""

    @property
    def n_requests(self) -> int:
        """Requests that arrived."""
        return len(self.bodies)


@contextlib.contextmanager
def judge_server(script: Script) -> Iterator[JudgeServer]:
    """Run a server that answers each request by calling ``script``."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each body waits 40 ms for an acknowledgment

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = server.n_requests
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.times.append(time.monotonic())
                running += 1
                server.at_once = max(server.at_once, running)
            try:
                script(Request(self, number, body))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    running -= 1

        def do_GET(self) -> None:
            request = Request(self, 0, {})
            server.headers.append(dict(self.headers))
            if server.models is None:
                request.error(server.list_status)
            else:
                models = [{"id": name, "object": "model"} for name in server.models]
                request.send(200, json.dumps({"object": "list", "data": models}))

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            pass  # clients that give up are expected

    with Server(("127.0.0.1", 0), Handler) as http:
        server = JudgeServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
