"""Files of masks: what is written is read, and what is something else is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tidegate.cli import train as command
from tidegate.config import ConfigError, load
from tidegate.train.job import Job
from tidegate.train.masks import MaskFile, check_mask, held_masks, write_masks

W2 = "blocks.1.ffn.experts.w2"


def test_a_file_gives_back_whole_masks_and_some_rows(tmp_path: Path) -> None:
    mask = torch.rand(5, 3, 7) < 0.5
    write_masks(tmp_path / "m.safetensors", {W2: mask})
    masks = MaskFile(tmp_path / "m.safetensors")
    assert torch.equal(masks.read(W2), mask)
    assert torch.equal(masks.read(W2, slice(1, 3)), mask[1:3])
    assert (masks.kept, masks.problem()) == (int(mask.sum()), None)


def test_a_file_that_cannot_mask_the_model_is_refused(tmp_path: Path, tiny_job: Callable[..., Path]) -> None:
    path, job = tmp_path / "m.safetensors", tiny_job()

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=rf"train.mask=.*m.safetensors: {match}"):
            check_mask(load(job, Job, [f"train.mask={path}"]).config)

    refused("cannot be read as a file of masks")
    path.write_bytes(b"something else")
    refused("cannot be read as a file of masks")
    save_file({W2: torch.zeros(4, 32, 16)}, path, metadata={"kept": "0"})
    refused(f"{W2} is F32, not BOOL: no mask")
    write_masks(path, {W2: torch.ones(4, 32, 8, dtype=torch.bool)})
    refused(rf"masks {W2} \[4, 32, 8\], which is of shape \[4, 32, 16\] there")
    write_masks(path, {"norm.weight": torch.ones(32, dtype=torch.bool)})
    refused(r"masks norm.weight \[32\], which is not to be pruned there")
    write_masks(path, {W2: torch.ones(4, 32, 16, dtype=torch.bool)})
    assert held_masks(load(job, Job, [f"train.mask={path}"]).config) is not None
    content = bytearray(path.read_bytes())
    content[-3] = 0
    path.write_bytes(content)
    refused("keeps 2047 weights, but 2048 were written")
    with pytest.raises(ConfigError, match="keeps 2047 weights"):
        command(job, [f"train.mask={path}"], local=True, state_dir=tmp_path / "state")
    assert not (tmp_path / "state" / "runs").exists()
