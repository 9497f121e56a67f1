"""Draw budget.png from results.json, both beside this file: `python jobs/claims/sparsity_budget/draw.py`.

Held-out loss minus that of dense at equal seeds, by the share of the units' parameters gated away; a dot a seed.
The losses themselves differ more between seeds, which hold out other documents, than between arms.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
LOSS = "held-out loss"
STYLES = {"learned": ("o-", "tab:orange"), "erk": ("s--", "tab:blue"), "small": ("^", "tab:green")}


def main() -> None:
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["results"]
    dense = results["dense"]
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for method, (style, color) in STYLES.items():
        differences = {
            int(arm.rpartition("_")[2]): [row[LOSS] - dense[seed][LOSS] for seed, row in seeds.items()]
            for arm, seeds in results.items()
            if arm.startswith(f"{method}_")
        }
        means = [statistics.mean(values) for values in differences.values()]
        axes.plot(list(differences), means, style, color=color, label=method, zorder=3)
        for percent, values in differences.items():
            axes.scatter([percent] * len(values), values, s=8, color=color, alpha=0.6)
    axes.axhline(0.0, color="black", ls=":", lw=1, label="dense")
    axes.set(xlabel="units' parameters gated away (%)", ylabel="held-out loss minus dense (nats)")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "budget.png", dpi=100)


if __name__ == "__main__":
    main()
