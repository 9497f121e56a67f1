"""DeepSpeed's engine behind the few calls that the training loop needs."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, MoEFactory, materialize
from tidegate.model.layers import FeedForward
from tidegate.model.masks import hold_gradients, masks_here, set_to_zero
from tidegate.model.moe import Experts
from tidegate.model.weights import Weights, load_weights
from tidegate.parallel import collectives
from tidegate.parallel.config import ParallelConfig

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.compiler
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger as deepspeed_logger

from tidegate.parallel.all_to_all import node_groups
from tidegate.parallel.expert import ExpertParallelMoE, SpreadMoE, tag_parameters
from tidegate.parallel.expert_store import ExpertStore, StoreSettings
from tidegate.parallel.flat_gradients import FlatGradients
from tidegate.parallel.master_weights import scale_rows
from tidegate.parallel.sequence import SequenceGroup
from tidegate.parallel.snapshot import Fetch, HostSnapshots, Put
from tidegate.parallel.stored_moe import StoredMoE, announce_early_routers

__all__ = ["Engine", "experts_file"]


class Engine:
    """A model under DeepSpeed: forward, backward, step, save, load.

    Args:
        model_config: the architecture; experts are spread over `parallel.expert` ranks.
        parallel: layout and ZeRO stage.
        precision: dtype of the weights in use; bf16 keeps fp32 master weights.
        seed: of the initial weights.
        micro_batch: sequences a rank takes at a time.
        accumulation: micro-batches a step.
        betas, eps, weight_decay: of AdamW; norms and constants are not decayed.
        gradient_clip: largest global gradient norm, 0 for none.
        optimizer_state: dtype of AdamW's moments; bf16 with bf16 weights at ZeRO 1 without offload.
        recompute: activation checkpointing of every block.
        keep_rows: rows in expert order are kept for the backward pass, not spread again.
        weights: what the model begins with in place of values drawn from the seed; master weights begin as them, in
            the precision in use.
        masks: bool, by name of a matrix; where False, its weight is zero and stays so.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        parallel: ParallelConfig,
        *,
        precision: Literal["fp32", "bf16"],
        seed: int,
        micro_batch: int,
        accumulation: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        gradient_clip: float,
        optimizer_state: Literal["fp32", "bf16"] = "fp32",
        recompute: bool,
        keep_rows: bool = False,
        weights: Weights | None = None,
        masks: Weights | None = None,
    ) -> None:
        self.device = collectives.default_device()
        expert_rank = collectives.rank() % parallel.expert
        self.sequence_ranks: SequenceGroup | None = None
        """Those that hold the same sequences, if they are several."""
        if parallel.sequence > 1:
            self.sequence_ranks = SequenceGroup(parallel.sequence)
        share: dict[str, Any] = {"expert_size": parallel.expert, "expert_rank": expert_rank, "keep_rows": keep_rows}
        moe: MoEFactory = partial(ExpertParallelMoE, **share)
        moments = torch.bfloat16 if optimizer_state == "bf16" else torch.float32
        self.store: ExpertStore | None = None
        """The routed experts, where they are not on the device."""
        if parallel.offload == "experts":
            replicas, replica = collectives.world_size() // parallel.expert, collectives.rank() // parallel.expert
            folder = None if parallel.offload_folder is None else Path(parallel.offload_folder)
            settings = StoreSettings(betas, eps, weight_decay, replicas, replica, folder, moments)
            self.store = ExpertStore(self.device, settings)
            moe = partial(StoredMoE, store=self.store, recompute=recompute, **share)
        model = materialize(lambda: Decoder(model_config, moe, recompute), self.device, seed)
        if weights is not None:
            load_weights(model, weights)
        held = {} if masks is None else masks_here(model, masks)
        set_to_zero(held.values())
        tag_parameters(model)
        announce_early_routers(model)
        optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True)
        _quiet_and_uncompiled(self.device)
        # Sums of bf16 gradients over micro-batches and ranks lose digits with every term; DeepSpeed sums in fp32 from
        # ZeRO 1 on.
        fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": gradient_clip if parallel.zero_stage else 0.0,
                "bf16": {"enabled": precision == "bf16"},
                "zero_optimization": {"stage": parallel.zero_stage, **self._offload(parallel)},
                "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own needs a compiler; torch's is fused too
                "zero_allow_untested_optimizer": True,
                "timers": {"throughput": {"enabled": False}},  # they wait for the device twice a micro-batch
                **(fp32_sums if precision == "bf16" and parallel.zero_stage > 0 else {}),
            },
        )
        hold_gradients(held.values())
        if precision == "bf16" and parallel.zero_stage == 1 and parallel.offload != "optimizer":
            at_once = parallel.gradients_at_once
            FlatGradients.take_over(self._engine.optimizer, at_once=at_once, moments=moments, experts=self.store)
            model.embedding.sparse_gradient = model.head is not None  # a tied head's gradient is dense
        if parallel.all_to_all == "hierarchical":
            nodes = node_groups(parallel.expert)
            for module in model.modules():
                if isinstance(module, SpreadMoE):
                    module.join_nodes(nodes)
        self._snapshots = HostSnapshots(self._engine, self.device)
        self._clip = gradient_clip
        self._own_norm: torch.Tensor | None = None
        self._clips_itself = parallel.zero_stage == 0
        self._offloads_optimizer = parallel.offload == "optimizer"
        self._expert_replicas = collectives.world_size() // parallel.expert

    def _offload(self, parallel: ParallelConfig) -> dict[str, Any]:
        if parallel.offload != "optimizer":
            return {}
        return {"offload_optimizer": {"device": "cpu", "pin_memory": self.device.type == "cuda"}}

    @property
    def model(self) -> Decoder:
        return self._engine.module

    def forward(self, *args: torch.Tensor | None, **keywords: Any) -> DecoderOutput:
        """`Decoder.forward` under the engine, on this rank's tokens of its sequences."""
        return self._engine(*args, sequence_ranks=self.sequence_ranks, **keywords)

    def own_tokens(self, x_BT: torch.Tensor) -> torch.Tensor:
        """This rank's part of what is there for every token of its sequences."""
        return x_BT if self.sequence_ranks is None else self.sequence_ranks.own(x_BT, 1).contiguous()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch; the engine averages over ranks and accumulation steps."""
        if self.store is not None:
            self.store.begin_backward(last=self._engine.is_gradient_accumulation_boundary())
        self._engine.backward(loss)

    def step(self) -> None:
        """After each backward; the optimizer moves after the last micro-batch of the step.

        A step whose gradients are not all finite, on any rank, changes nothing.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        if self._clips_itself and last:
            self._own_norm = self._clip_by_global_norm()
            # PyTorch's fused optimizers change nothing where this is 1; DeepSpeed's look for themselves.
            self._engine.optimizer.found_inf = self._own_norm.isfinite().logical_not().float()
        self._engine.step()  # a no-op until the last micro-batch of the step
        optimizer = self._engine.optimizer
        # With an offloaded optimizer DeepSpeed would add the gradients of the next step to those of a skipped one.
        if last and self._offloads_optimizer and optimizer.overflow:
            optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    def _clip_by_global_norm(self) -> torch.Tensor:
        """Clip the reduced gradients. Without ZeRO, DeepSpeed takes the norm over each rank's own experts only."""
        dense = torch.zeros((), device=self.device)
        experts = torch.zeros((), device=self.device)
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        for parameter, gradient in gradients:
            square = gradient.float().square().sum()
            if is_moe_param(parameter):
                experts += square
            else:
                dense += square
        collectives.all_reduce(experts)
        norm = (dense + experts / self._expert_replicas).sqrt()
        if self._clip > 0:
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(factor)
        return norm

    def scale_rows(self, weight: torch.nn.Parameter, factors_R: torch.Tensor) -> None:
        """Multiply each row of a weight that all ranks share, also in the optimizer's fp32 copy; all ranks call it."""
        scale_rows(self._engine.optimizer, weight, factors_R)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def gradient_norm(self) -> torch.Tensor:
        """Global norm before clipping, of the step just taken, () fp32 on the device; NaN before the first."""
        norm = self._own_norm if self._clips_itself else self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def bit_sums(self) -> dict[str, int]:
        """Sums of the bits of this rank's weights in use, its experts and its model's buffers; one host sync.

        Experts that are in `store` are not looked at.
        """
        parts: dict[str, list[torch.Tensor]] = {"weights": [], "experts": [], "router state": [*self.model.buffers()]}
        for parameter in self.model.parameters():
            parts["experts" if is_moe_param(parameter) else "weights"].append(parameter)
        sums = torch.zeros(len(parts), dtype=torch.int64, device=self.device)
        for total, tensors in zip(sums, parts.values(), strict=True):
            for place, tensor in enumerate(tensors, 1):
                total += place * _bits(tensor)  # by place, so that exchanged tensors show
        return dict(zip(parts, sums.tolist(), strict=True))

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def save(self, put: Put, state: dict[str, Any]) -> None:
        """Copy this rank's part of a checkpoint to host memory and, with it, the trainer's plain `state`.

        Args:
            put: takes each file's name and content, which stays as it is until the next `save`; but experts that are
                in `store` are not copied, and stay until the next `step` only.
        """
        self._snapshots.take(put, {"tidegate": state})
        if self.store is not None:
            for layer, content in enumerate(self.store.state()):
                put(experts_file(collectives.rank(), layer), content)

    def load(self, fetch: Fetch, names: Iterable[str], *, reshape: bool = False) -> dict[str, Any]:
        """Load a checkpoint; returns the trainer's `state`. Every rank calls it.

        Weights, moments and counts come from the checkpoint; AdamW's settings and the clip stay those of the job.

        Args:
            fetch: opens a file by the name that `put` got.
            names: of all ranks' files.
            reshape: it was written by another number of ranks, or at another expert parallelism, ZeRO stage, of 1 and
                2, or place of the optimizer; experts are not in `store`.
        """
        assert not (reshape and (self._clips_itself or self.store is not None))
        groups = self._engine.optimizer.param_groups
        settings = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in groups]
        restore = self._snapshots.restore_reshaped if reshape else self._snapshots.restore
        state = restore(fetch, names)
        for group, setting in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if not self._clips_itself:
            self._engine.optimizer.clip_grad = self._clip
        if self.store is not None:
            self.store.load_state(partial(_read_experts, fetch))
        return state["tidegate"]


def experts_file(rank: int, layer: int) -> str:
    """Name of what a rank saves of a layer's experts that live on its host."""
    return f"experts_rank_{rank:05d}_layer_{layer:03d}.pt"


def _read_experts(fetch: Fetch, layer: int) -> dict[str, Any]:
    with fetch(experts_file(collectives.rank(), layer)) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; vectors (norms, constants, sinks), coefficients of activations and self-tuning are not."""
    coefficients = {id(m.coefficients) for m in model.modules() if isinstance(m, Experts | FeedForward)}
    coefficients |= {id(p) for p in model.self_tuning.parameters()} if model.self_tuning is not None else set()
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in coefficients]
    vectors = [p for p in model.parameters() if p.ndim < 2 or id(p) in coefficients]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in groups if group["params"]]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """() int64, the sum of a tensor's bits as integers, which wraps."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64)


def _quiet_and_uncompiled(device: torch.device) -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed imports its Muon to ask whether AdamW is one, and Muon's decorators torch's compiler: seconds a process.
    with mock.patch.object(deepspeed.runtime.compiler, "compile", return_value=lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if device.type == "cpu":
        # Otherwise the CPU backend compiles a shared-memory all-reduce at first use (about 75 s, needs g++); gloo does.
        deepspeed.ops.__compatible_ops__ = {}
