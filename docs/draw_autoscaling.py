"""Draws docs/autoscaling.png: the number of machines over the time of two stories that tests tell on a real autoscaler.

TIDEGATE_TIMELINES=FOLDER python -m pytest tests/tidegate/launch/test_autoscaling.py
python docs/draw_autoscaling.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TITLES = {"job": "a job of 1 to 2 workers, one a machine", "sweep": "a sweep, two trials at a time"}


def draw(folder: Path, out: Path) -> None:
    figure, panels = plt.subplots(len(TITLES), figsize=(11, 6), layout="constrained")
    for panel, (story, title) in zip(panels, TITLES.items(), strict=True):
        told = json.loads((folder / f"{story}.json").read_text(encoding="utf-8"))
        seconds, machines = zip(*told["machines"], strict=True)
        panel.step(seconds, machines, where="post", color="tab:blue")
        panel.fill_between(seconds, machines, step="post", alpha=0.15, color="tab:blue")
        events = told["events"]
        for number, (second, _) in enumerate(events, 1):
            panel.axvline(second, color="grey", linewidth=0.6)
            panel.text(second, 3.2 + 0.25 * (number % 2), f" {number}", fontsize=9)
        listed = "\n".join(f"{number}  {what}" for number, (_, what) in enumerate(events, 1))
        panel.text(1.02, 0.98, listed, transform=panel.transAxes, fontsize=9, va="top")
        panel.set(title=title, xlabel="seconds", ylabel="machines beside the head", ylim=(0, 3.6), yticks=[0, 1, 2, 3])
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_name("autoscaling.png"))
