"""What the policy keeps, over random histories of a run."""

from __future__ import annotations

import random

import pytest

from tidegate.train.retention import CheckpointConfig, KeepBest, Kept, retained


def history(rng: random.Random) -> list[Kept]:
    """Steps of 100 tokens, some of them saved, in any order of listing."""
    steps = rng.sample(range(1, 60), rng.randint(1, 25))
    losses = [{}, {"val/loss": 1.0}, {"val/loss": 2.0}, {"val/loss": 2.5}]
    return [Kept(f"step_{step:08d}-0", step, 100 * step, rng.choice(losses)) for step in steps]


def policy(rng: random.Random) -> CheckpointConfig:
    best = KeepBest(mode=rng.choice(["min", "max"]), n=rng.randint(1, 3))
    tokens = rng.choice([None, rng.randint(1, 700)])
    at = rng.choice([None, rng.randint(1, 6000)])
    return CheckpointConfig(
        keep_last=rng.randint(1, 4), keep_best=rng.choice([None, best]), keep_every_tokens=tokens, at_tokens=at
    )


@pytest.fixture(params=range(300))
def case(request: pytest.FixtureRequest) -> tuple[list[Kept], CheckpointConfig]:
    rng = random.Random(request.param)
    return history(rng), policy(rng)


def test_the_newest_and_the_best_stay_and_the_others_are_not_missed(
    case: tuple[list[Kept], CheckpointConfig],
) -> None:
    checkpoints, policy = case
    stay = retained(checkpoints, policy)
    by_age = sorted(checkpoints, key=lambda kept: kept.step)
    assert stay <= {kept.name for kept in checkpoints}
    assert {kept.name for kept in by_age[-policy.keep_last :]} <= stay
    measured = [kept for kept in by_age if kept.metrics]
    if policy.keep_best is not None and measured:
        pick = min if policy.keep_best.mode == "min" else max
        best = pick(kept.metrics["val/loss"] for kept in measured)
        assert next(kept.name for kept in measured if kept.metrics["val/loss"] == best) in stay, "of equals the older"
    if policy.keep_every_tokens is None:
        assert len(stay) <= policy.kept
    assert retained([kept for kept in checkpoints if kept.name in stay], policy) == stay
    assert retained(checkpoints[::-1], policy) == stay


def test_pruning_after_every_save_keeps_the_milestones_of_the_whole_run(
    case: tuple[list[Kept], CheckpointConfig],
) -> None:
    checkpoints, policy = case
    kept: list[Kept] = []
    milestones: dict[int, str] = {}
    for checkpoint in sorted(checkpoints, key=lambda one: one.step):
        kept.append(checkpoint)
        stay = retained(kept, policy)
        assert checkpoint.name in stay
        kept = [one for one in kept if one.name in stay]
        every = policy.keep_every_tokens
        if every is not None and checkpoint.tokens >= every:
            milestones.setdefault(checkpoint.tokens // every, checkpoint.name)
        if policy.at_tokens is not None and checkpoint.tokens >= policy.at_tokens:
            milestones.setdefault(-1, checkpoint.name)
    assert set(milestones.values()) <= {one.name for one in kept}
