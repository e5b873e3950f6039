"""An OpenAI-compatible server that says what a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


Reply = tuple[int, str] | str  # a status with a body, or what the model says


@dataclass
class Server:
    """Answers every question by `answer(question, how often it was asked before)`."""

    url: str = ""
    answer: Callable[[str, int], Reply] = lambda question, before: "1"
    requests: list[dict[str, Any]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def chat_server() -> Iterator[Server]:
    """On a free port, with a thread for each request."""
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            with lock:
                before = state.questions.count(question)
                state.questions.append(question)
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
            reply = state.answer(question, before)
            status, text = reply if isinstance(reply, tuple) else (200, completion(reply))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
                text = ""
            self.end_headers()
            with suppress(BrokenPipeError):  # the one who asked has given up
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()
