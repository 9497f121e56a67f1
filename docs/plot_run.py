"""Draw a run from MLflow: `python docs/plot_run.py RUN [OUT.png]`, RUN as printed by `tidegate train`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mlflow
import numpy as np

from tidegate.launch.state import StateDir, default_state_dir


def main(name: str, out: str) -> None:
    record = StateDir(default_state_dir()).run(name).read()
    client = mlflow.MlflowClient(record.tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        load = np.load(client.download_artifacts(record.run_id, "expert_load.npz", scratch))
        summary = json.loads(Path(client.download_artifacts(record.run_id, "summary.json", scratch)).read_text())
    tokens = {point.step: point.value for point in client.get_metric_history(record.run_id, "tokens")}

    def history(metric: str) -> tuple[list[float], list[float]]:
        points = sorted(client.get_metric_history(record.run_id, metric), key=lambda point: point.step)
        return [tokens[p.step] / 1e6 for p in points], [p.value for p in points]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    left.plot(*history("train/loss"), color="black", lw=1)
    left.set(title="training loss (nats a token)", xlabel="M tokens")
    for color, domain in zip(plt.cm.tab10.colors, load["domains"], strict=False):
        middle.plot(*history(f"val/{domain}/ppl"), "o-", color=color, label=str(domain))
        middle.axhline(summary["unigram_perplexity"][domain], color=color, ls=":", lw=1)
    middle.set(title="held-out perplexity (dotted: unigram model)", xlabel="M tokens", yscale="log")
    middle.legend()
    load_DLE = load["load_SDLE"][-1]
    num_domains, num_layers, num_experts = load_DLE.shape
    picture = right.imshow(load_DLE.transpose(1, 0, 2).reshape(-1, num_experts) * 100, aspect="auto", cmap="viridis")
    labels = [f"{layer} {domain}" for layer in range(num_layers) for domain in load["domains"]]
    right.set(title="expert load by layer and domain (%)", xlabel="expert")
    right.set_yticks(range(num_domains * num_layers), labels, fontsize=7)
    figure.colorbar(picture, ax=right)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else f"{sys.argv[1]}.png")
