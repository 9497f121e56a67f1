"""A checkpoint's weights in use as one model's, from any layout of expert parallelism and ZeRO, on one process.

DeepSpeed keeps the weights in use beside the optimizer's shards: one file for all that every rank has, and one a layer
and expert (slice). So nothing has to be put together but experts, and no optimizer shard is read. Experts that live in
the host's memory are files of ours, a rank and layer, that hold fp32 master weights: each replica has a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tidegate.config import ConfigError
from tidegate.model.decoder import ModelConfig
from tidegate.model.moe import MoEConfig
from tidegate.model.weights import ALL, Spec, Weights, misfits, specs_of
from tidegate.parallel.engine import experts_file
from tidegate.parallel.expert_layout import Layout, Piece
from tidegate.parallel.snapshot import Fetch, read_plain

__all__ = ["CheckpointWeights"]

_SHARED = "state/mp_rank_00_model_states.pt"
_EXPERT_NAME = re.compile(r"blocks\.(\d+)\.ffn\.experts\.(w[123])")


class CheckpointWeights(Weights):
    """The weights in use of a checkpoint: bf16 in bf16 training, fp32 in fp32 training; controllers as they are.

    Args:
        fetch: opens a file of the checkpoint.
        files: names of all there are.
        model: the architecture.
        layout: `resources.workers`, `parallel.expert` and `parallel.offload` that it was written at.

    Raises:
        ConfigError: a file that the layout promises is missing, or the files do not hold the model's tensors, each
            once and with its shape.
    """

    def __init__(self, fetch: Fetch, files: Iterable[str], model: ModelConfig, layout: Mapping[str, Any]) -> None:
        self._fetch = fetch
        self._moe = model.ffn if isinstance(model.ffn, MoEConfig) else None
        wanted = specs_of(model)
        self._experts = {name: spec for name, spec in wanted.items() if self._moe and _EXPERT_NAME.fullmatch(name)}
        self._workers, self._expert_size = layout["resources.workers"], layout["parallel.expert"]
        self._on_host = layout["parallel.offload"] == "experts"
        missing = sorted(self._promised(model.num_layers) - set(files))
        if missing:
            more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
            raise ConfigError(f"{missing[0]}{more}: missing from the checkpoint, whose weights are not whole without")
        self._shared: dict[str, torch.Tensor] = {
            name: tensor for name, tensor in read_plain(fetch, _SHARED)["module"].items() if name not in _unused(wanted)
        }
        self._dtype = self._shared["embedding.weight"].dtype
        held = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._shared.items()}
        problems = misfits(held, {name: spec for name, spec in wanted.items() if name not in self._experts})
        if problems:
            raise ConfigError(f"{_SHARED}: {problems[0]}: the file is not of this model")
        self._specs = {
            name: Spec(spec.shape, self._dtype if name in self._experts else held[name].dtype, spec.trained)
            for name, spec in wanted.items()
        }
        self._layer: tuple[int, dict[str, torch.Tensor]] | None = None
        """The layer whose experts were read last, with them."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        match = _EXPERT_NAME.fullmatch(name)
        if match is None or name not in self._experts:
            return self._shared[name][rows].clone() if rows != ALL else self._shared[name].clone()
        layer = int(match[1])
        if self._layer is None or self._layer[0] != layer:
            self._layer = None  # two layers at a time would be too much
            self._layer = layer, self._from_host(layer) if self._on_host else self._from_files(layer)
        return self._layer[1][match[2]][rows].clone()

    def _promised(self, num_layers: int) -> set[str]:
        """Files that must be there."""
        promised = {_SHARED}
        for layer in range(num_layers if self._moe else 0):
            if self._on_host:
                promised |= {experts_file(rank, layer) for rank in range(self._workers)}
            elif self._moe is not None:
                promised |= {_expert_file(layer, expert) for expert in range(self._moe.num_slices)}
        return promised

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of the expert tensors of a layer."""
        prefix = f"blocks.{layer}.ffn.experts."
        return {name.removeprefix(prefix): s.shape for name, s in self._experts.items() if name.startswith(prefix)}

    def _from_files(self, layer: int) -> dict[str, torch.Tensor]:
        """Each expert's own file, in the order of experts."""
        assert self._moe is not None
        shapes = self._shapes(layer)
        found = {name: torch.empty(shape, dtype=self._dtype) for name, shape in shapes.items()}
        for expert in range(self._moe.num_slices):
            file = _expert_file(layer, expert)
            held = {
                key.rpartition(".")[0].rpartition(".")[2]: tensor
                for key, tensor in read_plain(self._fetch, file).items()
            }
            for name, shape in shapes.items():
                if name not in held or tuple(held[name].shape) != shape[1:]:
                    got = list(held[name].shape) if name in held else "nothing"
                    raise ConfigError(f"{file}: {name} is {got}, not {list(shape[1:])}: the file is not of this model")
                found[name][expert] = held[name]
        return found

    def _from_host(self, layer: int) -> dict[str, torch.Tensor]:
        """The parts of each rank's replicas behind one another, and ranks in the order of their experts."""
        shapes = self._shapes(layer)
        replicas = self._workers // self._expert_size
        by_rank: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
        for expert_rank in range(self._expert_size):
            pieces = {n: Piece((s[0] // self._expert_size, *s[1:]), decayed=False) for n, s in shapes.items()}
            layout = Layout(pieces, replicas)
            files = [experts_file(expert_rank + self._expert_size * replica, layer) for replica in range(replicas)]
            master_n = torch.cat([read_plain(self._fetch, file)["master"] for file in files])
            if master_n.numel() != layout.padded:
                raise ConfigError(f"{files[0]}: {master_n.numel()} numbers, not {layout.padded}: not of this model")
            for name, (start, stop, piece) in zip(shapes, layout.places(), strict=True):
                by_rank[name].append(master_n[start:stop].view(piece.shape).to(self._dtype))
        return {name: torch.cat(parts) for name, parts in by_rank.items()}


def _expert_file(layer: int, expert: int) -> str:
    return f"state/layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def _unused(wanted: Mapping[str, Spec]) -> set[str]:
    """Names in the shared file that mean nothing: the third matrix of experts that have none."""
    return {name.replace(".w1", ".w3") for name in wanted if _EXPERT_NAME.fullmatch(name)} - set(wanted)
