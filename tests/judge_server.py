"""A scripted server that speaks as much of OpenAI's protocol as judges need, and can fail in every way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-never-to-be-seen"
Reply = str | int | dict[str, Any]


class JudgeServer(ThreadingHTTPServer):
    """Answers every request by `reply`: with what is said, a whole body, a fault of `FAULTS` or a status."""

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def graded(self) -> list[tuple[str, str]]:
        """What was asked about, but for the trial."""
        return [pair for pair in map(material, self.requests) if pair[1] != "Four."]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[JudgeServer]:
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def material(body: dict[str, Any]) -> tuple[str, str]:
    """The prompt and the answer in a request, read as a judge that keeps to its frame reads them."""
    frame, text = (turn["content"] for turn in body["messages"])
    mark = frame.partition("two marks ")[2].partition(";")[0]
    _, prompt, _, answer, _ = text.split(mark)
    assert all(part[0] == part[-1] == "\n" for part in (prompt, answer))
    return prompt[1:-1], answer[1:-1]


FAULTS = {
    "html": ("text/html", "<html>Welcome</html>"),
    "broken": ("application/json", '{"choices": [{'),
    "empty": ("application/json", ""),
    "no choice": ("application/json", '{"choices": []}'),
    "no object": ("application/json", "[1]"),
    "no message": ("application/json", '{"choices": [{"message": null}]}'),
    "no text": ("application/json", '{"choices": [{"message": {"content": 4}}]}'),
    "no part": ("application/json", '{"choices": [{"message": {"content": [{"type": "image"}]}}]}'),
    "busy": ("application/json", '{"error": {"message": "overloaded"}}'),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        said = self.server.reply(body)
        if said == "slow":
            time.sleep(1)
        elif said == "hang up":
            self.close_connection = True
            return
        elif said == "drip":
            return self._drip()
        status, kind = 200, "application/json"
        if isinstance(said, int):
            # A careless server sends back what it was sent.
            status, content = said, json.dumps({"error": {"message": f"no, {self.headers['Authorization']}"}})
        elif isinstance(said, dict):
            content = json.dumps(said)
        elif said in FAULTS:
            kind, content = FAULTS[said]
        else:
            message = {"role": "assistant", "content": said}
            content = json.dumps(
                {
                    **{"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]},
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }
            )
        payload = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)
        self.server.answered.append(body)

    def _drip(self) -> None:
        """Send blanks until the client hangs up, as busy servers do that do not want it to."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        for _ in range(600):
            self.wfile.write(b"1\r\n \r\n")
            time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
