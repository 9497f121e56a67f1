"""The picture of benchmark results, from a made-up file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def row(op: str, implementation: str, ms: float | None, flops: float = 0.0, **shape: Any) -> dict[str, Any]:
    result = {"op": op, "shape": shape, "implementation": implementation, "floor_ms": 1.0, "bytes": 3e9}
    return result | {"flops": flops, "ms": ms}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [
        row("norm", "triton", 1.25, N=16, adds=True),
        row("norm", "reference", 4.0, N=16, adds=True),
        row("norm", "Liger", 2.0, N=16, adds=True),
        row("attention", "triton", 3.0, 7e11, T=8),
        row("attention", "chosen", 2.0, 7e11, T=8),
        row("attention", "triton, deep", 1.0, 7e11, T=8),
        row("attention", "peer", None, 7e11, T=8),
        row("broken", "triton", None, T=8),
    ]
    document = {"environment": {"device": "GPU of paper", "commit": "0123456789"}, "results": rows}
    (tmp_path / "made_up.json").write_text(json.dumps(document))
    return tmp_path


def test_ours_and_the_best_peer_of_each_case(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KERNELS))
    from benchmarks.plot import read

    cases, title = read(results)
    assert title == "GPU of paper, commit 0123456"
    assert [(c.label, c.ours["implementation"], c.peer and c.peer["implementation"]) for c in cases] == [
        ("norm N16 adds=True", "triton", "Liger"),
        ("attention T8", "chosen", None),
    ]


def test_draws(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(KERNELS))
    from benchmarks.plot import main

    picture = results / "r.png"
    monkeypatch.setattr("sys.argv", ["plot", "--results", str(results), "--out", str(picture)])
    main()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (results / "made_up.json").unlink()
    with pytest.raises(SystemExit):
        main()
    assert "no measured case in a JSON file; run python -m benchmarks first" in capsys.readouterr().err
