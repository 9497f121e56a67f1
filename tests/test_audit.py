"""`make audit` against a database on this machine that speaks as OSV does."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
OLD_YAML = {"pyyaml": "CVE-2020-1747"}


@contextlib.contextmanager
def database(vulnerable: Mapping[str, str]) -> Iterator[str]:
    """The URL of a database that knows one vulnerability each of these packages."""

    class Database(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            package, version = query["package"], query["version"]
            known = package["name"] in vulnerable and (package["name"] != "pyyaml" or version == "5.3")
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}]
            found = {
                "id": "GHSA-0000",
                "aliases": [vulnerable.get(package["name"], "")],
                "summary": "it is bad",
                "affected": [{"package": package, "ranges": ranges, "versions": [version]}],
            }
            body = json.dumps({"vulns": [found]} if known else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OSV_URL": url}
    return subprocess.run([sys.executable, AUDIT], env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_database_it_says_that_nothing_was_audited() -> None:
    done = audit("http://127.0.0.1:1/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("not audited: no vulnerability database reachable (http://127.0.0.1:1/: ")
    with database({}) as url:
        done = audit(url)
    assert done.returncode == 0
    assert "not audited: no vulnerability database reachable" in done.stdout
    assert "it does not know CVE-2020-1747" in done.stdout


@pytest.mark.parametrize(
    ("vulnerable", "status"), [({}, 0), ({"ray": "CVE-2023-48022"}, 0), ({"torch": "CVE-1999-0001"}, 1)]
)
def test_with_one_it_fails_on_what_is_not_accepted(vulnerable: dict[str, str], status: int) -> None:
    with database(OLD_YAML | vulnerable) as url:
        done = audit(url)
    assert done.returncode == status, done.stdout + done.stderr
    assert "not audited" not in done.stdout
    assert ("CVE-1999-0001" in done.stdout) == bool(status)
