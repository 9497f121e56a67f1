"""Learning-rate schedules against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tidegate.train.schedule import WarmupCosine, WarmupStableDecay

PEAK, WARMUP, DECAY, TOTAL = 3e-4, 1000, 3000, 10_001


def rates(schedule: WarmupCosine | WarmupStableDecay, start: int, stop: int) -> list[float]:
    return [schedule.at(tokens, TOTAL) for tokens in range(start, stop + 1)]


def cosine(final_fraction: float = 0.1, warmup_tokens: int = WARMUP) -> WarmupCosine:
    return WarmupCosine(peak=PEAK, final_fraction=final_fraction, warmup_tokens=warmup_tokens)


def wsd(final_fraction: float = 0.1, warmup_tokens: int = WARMUP) -> WarmupStableDecay:
    return WarmupStableDecay(peak=PEAK, final_fraction=final_fraction, warmup_tokens=warmup_tokens, decay_tokens=DECAY)


@pytest.mark.parametrize("schedule", [cosine(), wsd()], ids=["cosine", "wsd"])
def test_the_warm_up_is_a_line_from_zero_to_the_peak(schedule):
    for tokens in (0, 1, 63, 500, WARMUP):
        assert schedule.at(tokens, TOTAL) == pytest.approx(PEAK * tokens / WARMUP)
    rising = rates(schedule, 0, WARMUP)
    assert all(after > before for before, after in pairwise(rising))
    assert max(rates(schedule, 0, TOTAL)) == pytest.approx(PEAK)


@pytest.mark.parametrize("final_fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("make", [cosine, wsd])
@pytest.mark.parametrize("warmup_tokens", [0, WARMUP])
def test_the_end_is_the_final_fraction_and_stays(make, final_fraction, warmup_tokens):
    schedule = make(final_fraction, warmup_tokens)
    assert schedule.at(TOTAL, TOTAL) == pytest.approx(PEAK * final_fraction, abs=1e-12)
    assert schedule.at(TOTAL + 4096, TOTAL) == pytest.approx(PEAK * final_fraction, abs=1e-12)  # the last, whole batch


@pytest.mark.parametrize("make", [cosine, wsd])
def test_without_warm_up_the_first_token_is_at_the_peak(make):
    assert make(warmup_tokens=0).at(0, TOTAL) == pytest.approx(PEAK)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_cosine_by_formula(progress):
    total = WARMUP + 12_000
    rate = cosine().at(WARMUP + round(12_000 * progress), total)
    assert rate == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2))
    if progress == 0.5:
        assert rate == pytest.approx(PEAK * (1 + 0.1) / 2), "half way between the peak and the end"


def test_the_cosine_falls_after_the_warm_up():
    falling = rates(cosine(), WARMUP, TOTAL)
    assert all(after < before for before, after in pairwise(falling))


def test_wsd_is_flat_and_then_a_line():
    schedule = wsd()
    assert set(rates(schedule, WARMUP, TOTAL - DECAY)) == {PEAK}
    for into in (1, 63, 1000, DECAY):
        expected = PEAK * (1 - 0.9 * into / DECAY)
        assert schedule.at(TOTAL - DECAY + into, TOTAL) == pytest.approx(expected)
    falling = rates(schedule, TOTAL - DECAY, TOTAL)
    assert all(after < before for before, after in pairwise(falling))


def test_wsd_of_warm_up_and_decay_alone_touches_the_peak():
    total = WARMUP + DECAY
    assert wsd().at(WARMUP, total) == pytest.approx(PEAK)
    assert wsd().at(WARMUP - 1, total) < PEAK
    assert wsd().at(WARMUP + 1, total) < PEAK


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (WarmupCosine, "peak", 0),
        (WarmupCosine, "final_fraction", 1.5),
        (WarmupCosine, "warmup_tokens", -1),
        (WarmupStableDecay, "decay_tokens", 0),
    ],
)
def test_values_out_of_range_are_refused(make, field, value):
    fields = {"peak": PEAK} | ({"decay_tokens": DECAY} if make is WarmupStableDecay else {}) | {field: value}
    with pytest.raises(ValueError, match=rf"{field}\n.*Input should be"):
        make.model_validate(fields)
