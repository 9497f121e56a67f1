"""A metadata server of each cloud, as documented, on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tidegate.launch.spot import Cloud, watch, will_be_taken

Answer = tuple[int, str]
TOKEN = "a-token"


class Metadata:
    """Answers by path; a request without what the cloud's documentation asks for is refused."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                known = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers and self.path == "/latest/api/token"
                self._answer((200, TOKEN) if known else (400, ""))

            def do_GET(self) -> None:
                metadata.asked.append(self.path)
                known = {
                    "/latest/": self.headers.get("X-aws-ec2-metadata-token") == TOKEN,
                    "/computeMetadata/": self.headers.get("Metadata-Flavor") == "Google",
                    "/metadata/": self.headers.get("Metadata") == "true",
                }
                allowed = any(self.path.startswith(root) and is_known for root, is_known in known.items())
                self._answer(metadata.answers.get(self.path, (404, "")) if allowed else (401, ""))

            def _answer(self, answer: Answer) -> None:
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1].encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    yield server
    server.close()


AWS = "/latest/meta-data/spot/instance-action"
GCP = "/computeMetadata/v1/instance/preempted"
AZURE = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


def azure(*events: tuple[str, str]) -> Answer:
    return 200, json.dumps(
        {"DocumentIncarnation": 2, "Events": [{"EventType": e, "Resources": [r]} for e, r in events]}
    )


@pytest.mark.parametrize(
    ("cloud", "answers", "taken"),
    [
        ("aws", {}, False),
        ("aws", {AWS: (200, '{"action": "terminate", "time": "2026-01-01T08:22:00Z"}')}, True),
        ("gcp", {GCP: (200, "FALSE\n")}, False),
        ("gcp", {GCP: (200, "TRUE\n")}, True),
        ("azure", {AZURE: azure()}, False),
        ("azure", {AZURE: azure(("Reboot", "me")), AZURE_NAME: (200, "me")}, False),
        ("azure", {AZURE: azure(("Preempt", "neighbour")), AZURE_NAME: (200, "me")}, False),
        ("azure", {AZURE: azure(("Preempt", "neighbour"), ("Preempt", "me")), AZURE_NAME: (200, "me")}, True),
    ],
)
def test_what_a_cloud_says(metadata: Metadata, cloud: Cloud, answers: dict[str, Answer], taken: bool) -> None:
    metadata.answers = answers
    assert will_be_taken(cloud, metadata.url) == taken


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_a_server_in_trouble_says_nothing(metadata: Metadata, cloud: Cloud) -> None:
    metadata.answers = dict.fromkeys((AWS, GCP, AZURE), (500, ""))
    with pytest.raises(OSError, match="500"):
        will_be_taken(cloud, metadata.url)
    metadata.answers = dict.fromkeys((AWS, GCP, AZURE), (200, "<html>"))
    if cloud != "gcp":
        with pytest.raises(ValueError, match="Expecting value"):
            will_be_taken(cloud, metadata.url)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_warning_is_passed_on_once_however_the_server_did_before(metadata: Metadata) -> None:
    warnings: list[float] = []
    with watch("gcp", lambda: warnings.append(time.monotonic()), metadata.url, every_s=0.02):
        until(lambda: len(metadata.asked) >= 2)  # 404
        metadata.answers = {GCP: (200, "FALSE")}
        asked = len(metadata.asked)
        until(lambda: len(metadata.asked) >= asked + 2)
        assert not warnings
        metadata.answers = {GCP: (200, "TRUE")}
        until(lambda: bool(warnings))
        asked = len(metadata.asked)
        time.sleep(0.1)
        assert len(metadata.asked) == asked
    assert len(warnings) == 1


def test_nobody_is_asked_once_the_run_ended(metadata: Metadata) -> None:
    with watch("gcp", lambda: None, metadata.url, every_s=0.02):
        until(lambda: len(metadata.asked) >= 1)
    asked = len(metadata.asked)
    time.sleep(0.1)
    assert len(metadata.asked) == asked
