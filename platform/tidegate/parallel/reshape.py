"""A checkpoint loaded at another layout, through DeepSpeed's universal checkpoints: every parameter whole, in a folder.

`universal_checkpoint` takes the steps of DeepSpeed's `ds_to_universal` one by one. Called as a whole, that program

- unpickles whatever its files hold. Here they come from a reader that takes plain values only, are written again into
  a private folder, and DeepSpeed's steps see those;
- needs the whole checkpoint on the machine's disk; here a shard comes when it is its turn, and the ranks of a machine
  share the work;
- wants moments in fp32 and three tensors an expert. Moments in bf16 pass as fp32, which loses nothing, and an expert
  without a third tensor has none to convert.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.checkpoint import DeepSpeedCheckpoint, ds_to_universal
from deepspeed.checkpoint.autoep_universal import (
    consolidate_autoep_zero12_expert_states,
    get_autoep_zero12_expert_param_info,
)
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT, UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.base_optimizer import _get_universal_checkpoint_ep_info
from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

from tidegate.config import ConfigError
from tidegate.parallel import collectives

__all__ = ["load_universal", "universal_checkpoint"]

_MODEL = "mp_rank_00_model_states.pt"


class _Machine(NamedTuple):
    """This rank among those of its machine."""

    first: int
    """Rank of the machine's first."""
    place: int
    size: int

    @property
    def share(self) -> slice:
        return slice(self.place, None, self.size)


@contextmanager
def universal_checkpoint(read: Callable[[str], Any], names: Iterable[str], tag: str) -> Iterator[Path]:
    """A folder with the universal form of a checkpoint in `tag`, on each machine, while the context lasts.

    It takes 24 bytes a parameter of the folder for temporary files. Every rank enters and leaves.

    Args:
        read: content of a file, by its name.
        names: of all of the checkpoint's files.
        tag: the folder in the checkpoint that DeepSpeed wrote.

    Raises:
        ConfigError: the folder for temporary files has no room.
    """
    machine = _machine()
    made = tempfile.mkdtemp(prefix="tidegate-") if machine.place == 0 else ""
    folder = Path(collectives.gather(made)[machine.first])
    try:
        try:
            _convert(read, sorted(names), tag, folder, machine)
        except OSError as error:
            raise ConfigError(
                f"{folder}: a checkpoint of another layout passes through here and does not fit ({error}); set TMPDIR "
                "to a folder with room for 24 bytes a parameter"
            ) from error
        yield folder
        dist.barrier()  # all have read
    finally:
        if machine.place == 0:
            shutil.rmtree(folder)


def _convert(read: Callable[[str], Any], names: list[str], tag: str, folder: Path, machine: _Machine) -> None:
    source, fragments, target = folder / "source", folder / "fragments", folder / tag
    if machine.place == 0:
        for place in (source, fragments, target / "zero"):
            place.mkdir(parents=True)
        model = read(f"{tag}/{_MODEL}")
        torch.save({key: value for key, value in model.items() if key != "module"}, source / _MODEL)
        (target / _MODEL).touch()  # the engine looks for its name, and asks HostSnapshots for its content
        for name in names:
            if name.endswith("_optim_states.pt"):
                (source / Path(name).name).touch()
    dist.barrier()
    checkpoint = DeepSpeedCheckpoint(str(source))
    ds_to_universal._inject_missing_state(checkpoint)  # a dense model says nothing of its own
    per_file, layers, data_before_expert = ds_to_universal._aggregate_autoep_zero12_metadata(
        checkpoint.model_state_metadata
    )
    shapes = per_file[0]
    experts = get_autoep_zero12_expert_param_info(layers) if layers else {}
    experts = {name: info for name, info in experts.items() if name in shapes}
    for rank in range(checkpoint.dp_degree)[machine.share]:
        (path,) = checkpoint.get_zero_files(0, 0, rank)
        torch.save(_with_fp32_moments(read(f"{tag}/{Path(path).name}")), path)
        ds_to_universal.extract_zero_shards(str(fragments), checkpoint, (0, 0, rank))
        Path(path).unlink()
    dist.barrier()
    info = checkpoint.get_checkpoint_info(UNIVERSAL_CHECKPOINT_INFO)
    for name in sorted(shapes)[machine.share]:
        if name in experts:
            consolidate_autoep_zero12_expert_states(
                str(fragments), str(target), {name: experts[name]}, shapes, checkpoint.dp_degree, 1, data_before_expert
            )
        else:
            ds_to_universal.merge_tp_slices(info, str(target / "zero"), str(fragments), 1, (name, [shapes[name]]))
        shutil.rmtree(fragments / name)
    dist.barrier()


def load_universal(optimizer: Any, folder: Path) -> None:
    """This rank's parts of master weights and moments, and the steps.

    DeepSpeed's own function fails on a rank whose part of a group of weights is nothing but padding, and leaves steps
    on the host.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1 or 2.
        folder: of the tag.
    """
    expert_rank, expert_size = _get_universal_checkpoint_ep_info()
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for weights, group in zip(groups, optimizer.optimizer.param_groups, strict=True):
        (part,) = group["params"]
        for weight in weights:
            if weight._hp_mapping is not None:
                place = folder / "zero" / optimizer.param_names[weight]
                weight.load_hp_checkpoint_state(str(place), 0, 1, ep_rank=expert_rank, ep_size=expert_size)
        map_to_flat_opt_states(part, weights, optimizer.optimizer.state, ("exp_avg", "exp_avg_sq"))
        step = torch.load(folder / "zero" / optimizer.param_names[weights[0]] / "step.pt", weights_only=True)
        optimizer.optimizer.state[part]["step"] = step.to(part.device)


def _with_fp32_moments(shard: dict[str, Any]) -> dict[str, Any]:
    for state in shard[OPTIMIZER_STATE_DICT][BASE_OPTIMIZER_STATE]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].float()
    return shard


def _machine() -> _Machine:
    """Ranks of a machine follow one another, and the launcher counts them from 0 in LOCAL_RANK."""
    place = int(os.environ.get("LOCAL_RANK", "0"))
    first = collectives.rank() - place
    places = collectives.gather(place)
    assert places[first : first + place + 1] == list(range(place + 1)), places
    after = (other for other in range(first + 1, len(places)) if places[other] == 0)
    return _Machine(first, place, next(after, len(places)) - first)
