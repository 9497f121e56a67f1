"""Masked weights under the real engine, in real gloo processes: exactly zero after any step, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.clock import Clock
from tidegate.model.decoder import ModelConfig
from tidegate.model.masks import masks_here, prunable
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig
from tidegate.train.masks import MaskFile, write_masks

SEQUENCES, LENGTH, STEPS = 4, 17, 3
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 61,
        "width": 16,
        "num_layers": 2,
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "qk_norm": False, "qk_clip": 0.01},
        "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 24, "shared": {"num": 1}},
        "init_std": 0.1,
    }
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero_0": {"zero_stage": 0},
    "zero_0_bf16": {"zero_stage": 0, "precision": "bf16"},
    "zero_1": {"zero_stage": 1},
    "zero_1_bf16": {"zero_stage": 1, "precision": "bf16"},
    "zero_1_bf16_moments": {"zero_stage": 1, "precision": "bf16", "state": "bf16"},
    "zero_2": {"zero_stage": 2},
    "offload": {"zero_stage": 1, "precision": "bf16", "offload": "optimizer"},
}


def mask_file(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    shapes = prunable(MODEL, ("attention", "ffn", "experts"))
    write_masks(folder / "m.safetensors", {n: torch.rand(s, generator=generator) < 0.4 for n, s in shapes.items()})
    return folder / "m.safetensors"


def engine_for(layout: dict[str, Any], masks: MaskFile | None) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        MODEL,
        ParallelConfig(expert=2, zero_stage=layout["zero_stage"], offload=layout.get("offload", "none")),
        precision=layout.get("precision", "fp32"),
        seed=3,
        micro_batch=1,
        accumulation=SEQUENCES // collectives.world_size(),
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        gradient_clip=1.0,
        optimizer_state=layout.get("state", "fp32"),
        recompute=False,
        masks=masks,
    )


def trained(file: str, layout: dict[str, Any]) -> dict[str, tuple[bool, bool, float]]:
    """Of each masked parameter: whether it began as the unmasked engine's times the mask, and what is masked is zero
    after training; the share of the others that moved."""
    from tidegate.train.step import train_step

    masks = MaskFile(Path(file))
    plain = {n: p.detach().clone() for n, p in engine_for(layout, None).model.named_parameters()}
    engine = engine_for(layout, masks)
    held = masks_here(engine.model, masks)
    assert held.keys() == masks.specs.keys()
    begins = {name: torch.equal(each.parameter, plain[name] * each.mask) for name, each in held.items()}
    engine.set_learning_rate(0.01)
    mine = torch.arange(SEQUENCES).view(-1, collectives.world_size(), 1)[:, collectives.rank()]
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 61, (SEQUENCES, LENGTH + 1), generator=generator)[mine]
        documents = torch.zeros(*mine.shape, LENGTH, dtype=torch.int32)
        batch = StepBatch(tokens, documents, torch.ones_like(documents, dtype=torch.bool), torch.zeros_like(mine), mine)
        train_step(engine, None, batch, Clock(step, 100 * step, 0), isolate=False)
    seen = {}
    for name, (parameter, mask) in held.items():
        moved = (parameter != plain[name])[mask].float().mean()
        seen[name] = begins[name], bool((parameter[~mask] == 0).all()), float(moved)
    return seen


def trained_in_all(file: str) -> dict[str, dict[str, tuple[bool, bool, float]]]:
    return {case: trained(file, layout) for case, layout in LAYOUTS.items()}


@pytest.mark.slow
def test_masked_weights_stay_exactly_zero_and_the_others_train(
    tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    for by_case in on_ranks(2, trained_in_all, str(mask_file(tmp_path))):  # once: what takes time is to start
        for case, seen in by_case.items():
            for name, (begins, zero, moved) in seen.items():
                assert begins, f"{case}: {name} does not begin as its mask says"
                assert zero, f"{case}: {name} has weights that came back"
                assert moved > 0.5, f"{case}: {name} hardly moved"
