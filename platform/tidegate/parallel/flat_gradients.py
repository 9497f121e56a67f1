"""bf16 training at ZeRO 1 without DeepSpeed's passes over gradients that nobody needs.

`BF16_Optimizer` of DeepSpeed 0.19 already keeps fp32 gradients flat, a buffer for each parameter group. What it does to
them took a fifth of a large model's step: the bf16 gradients of a micro-batch stay, are zeroed, are added to by
autograd, cast to new fp32 tensors and added; the sums are concatenated, all-reduced and copied back, whole on every
rank; norms and the clip are passes of their own, and the host waits for them. `FlatGradients` takes over its hot path:

- a gradient is added to its sum, in one pass, as soon as autograd has it, and let go; of an embedding only the rows of
  the micro-batch's tokens are computed and added;
- sums are reduce-scattered in place: a rank receives the part whose weights it updates;
- one norm a group; the average over ranks and the clip are a factor inside AdamW, and so is the decision to skip a step
  whose gradients are not finite. The host waits for nothing;
- AdamW writes the bf16 weights too.

State, checkpoints and the layout of everything stay DeepSpeed's.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from tidegate.parallel.expert_store import ExpertStore
from tidegate_kernels.adamw import Rates, adamw, step_factors
from tidegate_kernels.gradient_sum import add_gradients, add_rows

__all__ = ["FlatGradients"]


class FlatGradients(BF16_Optimizer):
    """`BF16_Optimizer` with another path from a gradient to the optimizer; made from one by `take_over`."""

    _started: list[set[int]]
    """Of each group, which parameters have a sum in this step."""
    _held: list[dict[int, list[torch.Tensor]]]
    """Of each group, by parameter, gradients that wait for those of the next micro-batches."""
    _at_once: int
    """Gradients that are added in one pass."""
    _moments: torch.dtype
    """Of AdamW's running means."""
    _average_over: int
    """Ranks whose gradients the reduction sums."""
    _experts: ExpertStore | None
    """Weights that are elsewhere, but belong to the same step."""

    @classmethod
    def take_over(
        cls, optimizer: Any, *, at_once: int, moments: torch.dtype, experts: ExpertStore | None = None
    ) -> None:
        """Turn DeepSpeed's optimizer, fresh from `deepspeed.initialize`, into this one.

        Args:
            at_once: keep gradients until there are those of so many micro-batches, and add them in one pass.
            moments: fp32, or bf16, which are rounded stochastically.
            experts: that DeepSpeed does not know of; they are clipped, skipped and moved with the others.
        """
        assert type(optimizer) is BF16_Optimizer, type(optimizer)
        assert optimizer.grad_acc_dtype == torch.float32, optimizer.grad_acc_dtype
        optimizer.__class__ = cls
        optimizer._started = [set() for _ in optimizer.bf16_groups]
        optimizer._held = [defaultdict(list) for _ in optimizer.bf16_groups]
        optimizer._at_once = at_once
        optimizer._moments = moments
        optimizer._experts = experts
        optimizer._average_over = dist.get_world_size(optimizer.dp_process_group)
        for group, parameters in enumerate(optimizer.bf16_groups):
            for index, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(partial(optimizer._add, group, index))

    @torch.no_grad()
    def _add(self, group: int, index: int, parameter: torch.Tensor) -> None:
        """Take a micro-batch's gradient from its parameter."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        if gradient.is_sparse:
            self._sum_rows(group, index, gradient)
            return
        held = self._held[group][index]
        held.append(gradient.reshape(-1))
        if len(held) == self._at_once:
            self._sum(group, index)

    def _sum(self, group: int, index: int) -> None:
        """Add what is held of a parameter."""
        started = self._started[group]
        total, gradients = self.fp32_groups_gradients[group][index], self._held[group].pop(index)
        add_gradients(total, gradients, first=index not in started)
        started.add(index)

    def _sum_rows(self, group: int, index: int, gradient: torch.Tensor) -> None:
        total, started = self.fp32_groups_gradients[group][index].view(gradient.shape), self._started[group]
        if index not in started:
            total.zero_()
            started.add(index)
        add_rows(total, gradient._indices()[0], gradient._values())

    def backward_prologue(self) -> None:
        pass

    def backward_epilogue(self, *args: Any, **keywords: Any) -> None:
        pass

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Sum over ranks; the engine calls it after the last micro-batch of a step."""
        assert not pipeline_parallel
        for group, gradients in enumerate(self.fp32_groups_gradients):
            for index, total in enumerate(gradients):
                if index in self._held[group]:  # micro-batches left over
                    self._sum(group, index)
                if index not in self._started[group]:
                    total.zero_()
            self._started[group].clear()
            ranks = self.real_dp_process_group[group]
            if dist.get_world_size(ranks) > 1:
                flat, mine = self.fp32_groups_gradients_flat[group], self.fp32_groups_gradient_flat_partition[group]
                dist.reduce_scatter_tensor(mine, flat, group=ranks)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, AdamW on this rank's part of the weights, and the parts of the others."""
        norm = self._norm()
        self._global_grad_norm = norm
        scale = torch.full_like(norm, 1 / self._average_over)
        if self.clip_grad > 0:
            scale = scale * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        skip = norm.isfinite().logical_not().float()
        states = [self._state(weights) for weights in self.fp32_groups_flat_partition]
        torch._foreach_add_([state["step"] for state in states], 1 - skip)
        groups = self.optimizer.param_groups
        factors = step_factors(states[0]["step"], groups[0]["betas"], scale, skip)  # alike for all groups
        before = 0  # weights of the groups before
        for index, (group, state) in enumerate(zip(groups, states, strict=True)):
            ranks = self.real_dp_process_group[index]
            rank = dist.get_rank(ranks)
            mine = self.bf16_partitioned_groups[index][rank]
            adamw(
                self.fp32_groups_flat_partition[index],
                mine,
                self.fp32_groups_gradient_flat_partition[index],
                state["exp_avg"],
                state["exp_avg_sq"],
                factors,
                Rates(group["lr"], group["betas"], group["eps"], group["weight_decay"]),
                place=before + rank * len(mine),
            )
            before += self.bf16_groups_flat[index].numel()
            if dist.get_world_size(ranks) > 1:
                dist.all_gather_into_tensor(self.bf16_groups_flat[index], mine, group=ranks)
        if self._experts is not None:
            self._experts.step(scale, skip, groups[0]["lr"])
        self._lazy_init_hp_params_optimizer_state()

    def _state(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Moments and step count of a part, under the names that `torch.optim.AdamW` gives them."""
        state = self.optimizer.state[weights]
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weights, dtype=self._moments) for _ in range(2))
        return state

    def load_state_dict(self, *args: Any, **keywords: Any) -> None:
        super().load_state_dict(*args, **keywords)
        for state in self.optimizer.state.values():  # PyTorch gives moments the dtype of the weights
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(self._moments)

    def _norm(self) -> torch.Tensor:
        """() of the averaged gradients of all parameters, each counted once: it lies on one rank."""
        norms = [torch.linalg.vector_norm(part) for part in self.fp32_groups_gradient_flat_partition]
        if self._experts is not None:
            norms.append(self._experts.gradient_norm())
        square = torch.stack(norms).square().sum()
        if self._average_over > 1:
            dist.all_reduce(square, group=self.dp_process_group)
        return square.sqrt() / self._average_over

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a gradient goes when it is added, and the first of a step overwrites its sum."""
