"""Draw the results: `python -m benchmarks.plot [--results FOLDER] [--out FILE.png]`, in `kernels/`.

Left, how near to its floor each op is at each shape, and its best peer. Right, the roofline of the device: only the
cases that count FLOPs have a place on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import BANDWIDTH, COMPUTE

__all__ = ["Measured", "draw", "read"]

_OURS = ("chosen", "triton")
"""How ours is called: the path that the op chooses where there are two, else the kernel; variants add a comma."""


class Measured(NamedTuple):
    """An op at a shape: rows of `harness.Result`."""

    label: str
    ours: dict[str, Any]
    peer: dict[str, Any] | None
    """The fastest that is not ours, plain PyTorch included."""


def read(folder: Path) -> tuple[list[Measured], str]:
    """The cases of a folder's JSON files, and the devices and commits that they name."""
    cases, places = [], {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in document["results"]:
            sizes = [f"{name}{'' if type(size) is int else '='}{size}" for name, size in row["shape"].items()]
            grouped.setdefault(" ".join([row["op"], *sizes]), []).append(row)
        for label, rows in grouped.items():
            ran = {row["implementation"]: row for row in rows if row["ms"] is not None}
            ours = next((ran[name] for name in _OURS if name in ran), None)
            if ours is None:
                continue
            peers = [row for name, row in ran.items() if name.split(",")[0] not in _OURS]
            cases.append(Measured(label, ours, min(peers, key=lambda row: row["ms"], default=None)))
        place = document["environment"]
        places[f"{place['device']}, commit {place['commit'][:7]}"] = None
    return cases, "; ".join(places)


def _share(row: dict[str, Any]) -> float:
    return 100 * row["floor_ms"] / row["ms"]


def draw(cases: Sequence[Measured], title: str, out: Path) -> None:
    """Write the picture; its kind follows the name."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(17, max(5.0, 0.36 * len(cases) + 1.5)), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title)
    for place, case in enumerate(cases):
        for row, color, shift in ((case.ours, "tab:blue", -0.2), (case.peer, "tab:gray", 0.2)):
            if row is None:
                continue
            left.barh(place + shift, _share(row), height=0.38, color=color)
            name = "" if row is case.ours else f" {row['implementation']}"
            left.text(_share(row) + 1, place + shift, f"{_share(row):.0f}{name}", va="center", fontsize=7)
    left.axvline(100, color="black", lw=0.8, ls=":", zorder=0)
    left.margins(y=0.01)
    left.set_yticks(range(len(cases)), [case.label for case in cases], fontsize=8)
    left.invert_yaxis()
    left.set(title="percent of floor: ours (blue), best peer (gray)", xlabel="floor time / measured time (%)")
    left.set_xlim(0, max([100.0, *(_share(row) for case in cases for row in case[1:] if row)]) * 1.15)

    ridge = COMPUTE / BANDWIDTH
    counted = [case for case in cases if case.ours["flops"]]
    intensity = [case.ours["flops"] / case.ours["bytes"] for case in counted]
    ends = min([ridge / 10, *intensity]) / 2, max([ridge * 10, *intensity]) * 2
    right.plot([ends[0], ridge, ends[1]], [BANDWIDTH * ends[0] / 1e12, COMPUTE / 1e12, COMPUTE / 1e12], "k-", lw=1)
    colors = dict(zip(dict.fromkeys(case.ours["op"] for case in counted), plt.cm.tab10.colors, strict=False))
    named = set()
    for case, x in zip(counted, intensity, strict=True):
        op = case.ours["op"]
        rate = case.ours["flops"] / case.ours["ms"] / 1e9
        right.plot(x, rate, "o", color=colors[op], label=None if op in named else op)
        named.add(op)
    if named:
        right.legend(loc="lower right")
    right.set(
        title=f"roofline: {BANDWIDTH / 1e12:.1f} TB/s, {COMPUTE / 1e12:.0f} TFLOP/s (measured); ours",
        xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s", xscale="log", yscale="log",
    )  # fmt: skip
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=here, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=here / "roofline.png")
    arguments = parser.parse_args()
    cases, title = read(arguments.results)
    if not cases:
        parser.error(f"{arguments.results}: no measured case in a JSON file; run python -m benchmarks first")
    draw(cases, title, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
