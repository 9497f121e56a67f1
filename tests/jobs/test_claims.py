"""Claims: what their tables say of runs, and that the simulated gates are those of the routers."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tidegate.config import load
from tidegate.train.job import Job

CLAIMS = Path(__file__).resolve().parents[2] / "jobs" / "claims"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims_{Path(name).stem}", CLAIMS / name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run, plots, estimate = script("run.py"), script("plots.py"), script("estimation_rates/estimate.py")


@pytest.mark.parametrize("folder", [path.parent for path in sorted(CLAIMS.glob("*/claim.json"))], ids=lambda p: p.name)
def test_every_claim_has_its_arms_and_a_table_in_its_page(folder: Path) -> None:
    claim = run.read_claim(folder)
    assert len(run.arms(folder)) >= 2
    assert claim.columns
    page = (folder / "README.md").read_text(encoding="utf-8")
    for arm in run.arms(folder):
        assert f"| [{arm}]({arm}.yaml) |" in page


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        ('{"columns": {}}', "baseline"),
        ('{"baseline": "b", "columns": {}}', "baseline='b' is none of a, c"),
        ('{"baseline": "a", "columns": {}, "rows": {}}', "rows"),
    ],
)
def test_a_claim_with_a_mistake_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    for name in ("a", "c", "base"):
        (tmp_path / f"{name}.yaml").touch()
    (tmp_path / "claim.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        run.read_claim(tmp_path)


class Run:
    def history(self) -> pd.DataFrame:
        steps = range(1, 9)
        return pd.DataFrame(
            {
                "val/loss": [math.nan] * 6 + [5.0, 3.0],
                "moe/0/maxvio": [9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
                "moe/1/maxvio": [float(step) for step in steps],
            }
        )


def test_a_column_is_of_the_last_records_and_of_all_layers() -> None:
    columns = {"loss": "val/loss", "maxvio": "moe/*/maxvio", "gate": "attention/*/gate_mean"}
    row = run.read(Run(), run.Claim("a", columns))
    assert row["loss"] == 3.0, "the last evaluation alone"
    assert row["maxvio"] == pytest.approx((3.0 + 6.0) / 2)
    assert math.isnan(row["gate"])


def test_differences_are_of_equal_seeds() -> None:
    nan = math.nan
    results = {
        "a": {0: {"loss": 1.0, "gate": nan}, 1: {"loss": 3.0, "gate": nan}},
        "b": {0: {"loss": 1.5, "gate": 0.5}, 1: {"loss": 3.5, "gate": 0.5}},
    }
    lines = run.table(results, run.Claim("a", {"loss": "val/loss", "gate": "attention/*/gate_mean"}))
    assert lines[2] == "| [a](a.yaml) | 2.000 (1.414) | - |"
    assert lines[3] == "| [b](b.yaml) | 2.500 (1.414); +0.500 (0.000) | 0.500 (0.000); - |"


def test_pictures_show_every_run(tmp_path: Path) -> None:
    rows = {"0": {"loss": 1.0, "step": None}, "1": {"loss": math.nan, "step": 3}}
    (tmp_path / "results.json").write_text(json.dumps({"results": {"a": rows, "b": rows}}))
    plots.draw_columns(tmp_path)
    assert plots.plt.imread(tmp_path / "results.png").std() > 0

    class Stored:
        def __init__(self, layers: int) -> None:
            self.layers = layers

        def artifact(self, name: str) -> bytes | None:
            file = io.BytesIO()
            np.savez(file, steps=[1, 2], domains=["p", "q"], load_SDLE=np.full((2, 2, self.layers, 4), 0.25))
            return file.getvalue() if self.layers else None

    plots.draw_experts(tmp_path, {"dense": Stored(0)})
    assert not (tmp_path / "experts.png").exists()
    plots.draw_experts(tmp_path, {"dense": Stored(0), "small": Stored(1), "large": Stored(2)})
    assert plots.plt.imread(tmp_path / "experts.png").std() > 0


def test_text_of_ones_own_is_a_domain_a_file(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl.zst", "notes.md"):
        (tmp_path / name).touch()
    job = load(CLAIMS / "balance_scope" / "sequence.yaml", Job, run.text_of(tmp_path)).config
    assert [domain.name for domain in job.data.domains] == ["one", "two"]
    assert job.data.domains[1].paths == (str(tmp_path / "two.jsonl.zst"),)


def test_recall_is_asked_once_and_again_of_another_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CLAIMS / "hybrid_ratio"
    claim = run.read_claim(folder)
    path, called = tmp_path / "recall" / "claim-hybrid-linear-32-8-64.json", []

    def call(command: list[str]) -> None:
        called.append(command)
        config = load(
            folder / "linear.yaml", Job, [command[i + 1] for i, word in enumerate(command) if word == "--set"]
        )
        rows = [{"seed": 0, "accuracy": 0.1, "reached": None}, {"seed": 1, "accuracy": 0.99, "reached": 300}]
        model = config.config.model.model_dump(mode="json")
        path.parent.mkdir(exist_ok=True)
        about = {"commit": None, "steps": claim.recall["steps"], "rates": [1e-3, 3e-3], "model": model}
        path.write_text(json.dumps(about | {"seeds": rows}))

    monkeypatch.setattr(run, "_call", call)
    for overrides in ([], [], ["model.width=32"]):
        found = run.recall(folder, "linear", claim, 2, tmp_path, overrides)
        assert found.commit == "unknown"
        assert found.rows[1] == {"recall accuracy": 0.99, "seeds at 0.99": 1.0, "step": 300}
        assert found.rows[0] == {"recall accuracy": 0.1, "seeds at 0.99": 0.0, "step": None}
    assert len(called) == 2
    assert called[0][3:] == [
        *("recall", str(folder / "linear.yaml"), "--seeds", "2", "--length", "32", "--pairs", "8", "--vocab", "64"),
        *("--steps", "400", "--rates", "1e-3,3e-3", "--state-dir", str(tmp_path)),
    ]
    assert claim.headings == ["held-out loss", "recall accuracy", "seeds at 0.99"]


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_simulated_top_k_gate_is_the_routers(top: int) -> None:
    from tidegate.model.clock import STILL
    from tidegate.model.initialisation import Draw
    from tidegate.model.routers import RouterContext, RouterShape
    from tidegate.model.routers.top_k import SoftmaxTopKConfig

    torch.manual_seed(0)
    router: Any = SoftmaxTopKConfig().build(RouterShape(width=2, num_experts=4, top_k=top, std=1.0))
    router.init_weights(Draw(0, "router"))
    x_N2 = torch.randn(50, 2)
    context = RouterContext(
        torch.ones(1, 50, dtype=torch.bool), torch.zeros(1, 50).long(), torch.zeros(1).long(), STILL
    )
    routing = router.eval()(x_N2, context)
    expected_NE = torch.zeros(50, 4).scatter(1, routing.experts_NS, routing.weights_NS.detach())
    gate = estimate.top_k(top)
    found_NE = gate((x_N2 @ router.weight.T).double(), estimate.ONE, 0.0).exp()
    torch.testing.assert_close(found_NE.float(), expected_NE, rtol=1e-4, atol=1e-5)
    nearly_NE = gate((x_N2 @ router.weight.T).double(), estimate.ONE, 1e-4).exp()
    assert (nearly_NE - found_NE).abs().amax(dim=1).median() < 1e-6, "softness goes to the gate itself"


def test_densities_add_up_to_one_and_fits_are_better_than_the_truth() -> None:
    for setting in estimate.SETTINGS.values():
        x_N, y_G = torch.linspace(-3, 3, 7, dtype=torch.float64), torch.linspace(-25, 25, 5001, dtype=torch.float64)
        density_NG = estimate.log_density(setting.truth, setting.gate, x_N, y_G.expand(7, -1)).exp()
        torch.testing.assert_close(torch.trapezoid(density_NG, y_G, dim=-1), torch.ones(7, dtype=torch.float64))
        assert estimate.hellinger(setting, setting.truth) == 0
    setting = estimate.SETTINGS["temperature after tanh"]
    x_N, y_N1 = estimate.sample(setting.truth, setting.gate, 400, torch.Generator().manual_seed(1))
    fitted = estimate.fit(setting.start, setting.gate, True, x_N, y_N1)
    likely = [estimate.log_density(p, setting.gate, x_N, y_N1).mean() for p in (fitted, setting.truth)]
    assert likely[0] > likely[1]


def test_the_rate_is_a_half_and_a_temperature_has_none() -> None:
    sizes, rates = [500, 8000], {}
    for name in ("temperature", "temperature after tanh"):
        fits = [[estimate.measure(estimate.SETTINGS[name], size, seed) for seed in range(6)] for size in sizes]
        for error in ("density", "temperature"):
            rates[name, error] = estimate.slope(sizes, np.array([[fit[error] for fit in row] for row in fits]))
    assert rates["temperature", "density"] == pytest.approx(-0.5, abs=0.15)
    assert rates["temperature after tanh", "density"] == pytest.approx(-0.5, abs=0.15)
    assert rates["temperature", "temperature"] > -0.25, "any temperature, with scores to match, is the same gate"
    assert rates["temperature after tanh", "temperature"] < -0.35
