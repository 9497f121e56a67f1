"""Known vulnerabilities of the versions in constraints.txt: `make audit`, which `make check` calls.

pip-audit asks the OSV database. Exit status 1 where it knows some. Where it cannot be reached, or does not know a
vulnerability that everyone knows, nothing was audited: that is said, and is no failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
DATABASE = os.environ.get("OSV_URL", "https://api.osv.dev/v1/query")
VULNERABLE = {"package": {"name": "pyyaml", "ecosystem": "PyPI"}, "version": "5.3"}  # CVE-2020-1747
ACCEPTED = {"CVE-2023-48022": "a Ray that asks for no token; Tidegate's asks and listens on loopback: docs/security.md"}


def main() -> int:
    request = urllib.request.Request(DATABASE, json.dumps(VULNERABLE).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            known = json.load(answer).get("vulns")
        problem = "" if known else "it does not know CVE-2020-1747"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    if problem:
        print(f"not audited: no vulnerability database reachable ({DATABASE}: {problem})")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--osv-url", DATABASE, "--progress-spinner", "off"]
    return subprocess.run(command + [word for name in ACCEPTED for word in ("--ignore-vuln", name)]).returncode


if __name__ == "__main__":
    sys.exit(main())
