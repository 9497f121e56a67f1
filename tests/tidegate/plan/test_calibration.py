"""What the plan predicts of steps that were measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tidegate.plan.measurements import Measurement, measurements
from tidegate.train.memory import predict

SCRIPT = Path(__file__).resolve().parents[3] / "docs" / "plan_calibration.py"
HELD_OUT = [row for row in measurements() if row.fit is None]


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    return module


def test_efficiencies_are_what_the_script_gives(calibration: ModuleType) -> None:
    assert calibration.written(calibration.fit()) == calibration.EFFICIENCY.read_text(encoding="utf-8")


def test_the_tables_are_what_the_script_gives(calibration: ModuleType) -> None:
    page = calibration.PAGE.read_text(encoding="utf-8")
    assert calibration.tables(page) == page


def test_most_rows_are_held_out() -> None:
    assert len(HELD_OUT) > len(measurements()) * 2 / 3
    assert {"1xH200", "2xH100"} <= {row.gpus for row in HELD_OUT}


@pytest.mark.parametrize("row", measurements(), ids=lambda row: "-".join([row.job, row.gpus, *row.set]))
def test_steps_and_peaks_are_predicted(calibration: ModuleType, row: Measurement) -> None:
    job = calibration.job_of(row)
    seconds = calibration.timed(row, calibration.measured_efficiency()).total
    assert seconds == pytest.approx(row.step_s, rel=0.15)
    if row.peak_gib is not None:
        assert predict(job).total / 2**30 == pytest.approx(row.peak_gib, rel=0.10)


def test_communication_of_two_gpus_is_predicted(calibration: ModuleType) -> None:
    """48 ms, held out: the share of NVLink was fitted to rings, and this is mostly an exchange of rows."""
    (row,) = (row for row in HELD_OUT if row.gpus == "2xH100")
    time = calibration.timed(row, calibration.measured_efficiency())
    assert time.all_to_all + time.gradients_and_weights == pytest.approx(0.048, rel=0.15)
