"""What a cluster's head has, for `tidegate submit`: runs there as text, before anything is installed or sent.

Standard library only. The argument is JSON: `packages` and `paths` to look for, and `state`, the state directory or
None. The answer is one line of JSON behind `MARK`.
"""

import glob
import importlib.metadata
import json
import os
import platform
import sys

MARK = "tidegate-head "


def look(wanted):  # type: ignore[no-untyped-def]
    """The answer. No annotations: the cluster's Python may be an old one."""

    def version(package):  # type: ignore[no-untyped-def]
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    state = wanted["state"] or os.environ.get("TIDEGATE_STATE")
    above = state or ""
    while above and not os.path.lexists(above):
        above = os.path.dirname(above)
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in wanted["packages"]},
        "missing": [path for path in wanted["paths"] if not glob.glob(path, recursive=True)],
        "state": state,
        "writable": os.path.isdir(above) and os.access(above, os.W_OK),
    }


if __name__ == "__main__":
    print(MARK + json.dumps(look(json.loads(sys.argv[1]))))
