"""The expert-parallel layer: Tidegate's MoE in the shape that DeepSpeed's engine recognises.

DeepSpeed 0.19 reduces gradients, partitions optimizer state and writes checkpoints by two signs: the module is an
`AutoEPMoELayer`, and its parameters carry tags. `ExpertParallelMoE` is such a module, built directly (no model
surgery), with our router, experts and statistics. All that we use of DeepSpeed's private parts is in this file;
tests/tidegate/parallel/test_deepspeed_contract.py says so when a new DeepSpeed changes them.

What is spread are slices, the feed-forwards of equal width that experts are made of: one each, unless sizes differ.

Letters: N rows, M rows that came from all ranks, D width, E slices of the model, R ranks of the expert-parallel group,
e slices of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_folding import mark_autoep_folding_router_parameter
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch.distributed.nn.functional import all_gather

from tidegate.model.decoder import Decoder
from tidegate.model.dispatch import Dispatch
from tidegate.model.moe import Experts, Meanwhile, MoE, MoEConfig, nothing
from tidegate.model.routers import RouterContext, Routing
from tidegate.model.routers.sinkhorn import Sinkhorn
from tidegate.parallel.all_to_all import AllToAll, HierarchicalAllToAll, NodeGroups
from tidegate.parallel.exchange import Exchange

__all__ = ["ExpertParallelMoE", "SpreadMoE", "join_expert_groups", "replica_group", "tag_parameters"]


class SpreadMoE(MoE):
    """`MoE` whose experts are spread over the `expert_size` ranks of a group; equal to `MoE` in what it computes.

    Args:
        config, width, std, out_std: as for `MoE`.
        layer, vocab_size, keep_rows: as for `MoE`.
        expert_size: R; divides the number of slices and the world size.
        expert_rank: this rank's place in its group; holds experts `expert_rank * e .. (expert_rank + 1) * e`.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        std: float,
        out_std: float,
        *,
        layer: int = 0,
        vocab_size: int = 0,
        keep_rows: bool = False,
        expert_size: int,
        expert_rank: int,
    ) -> None:
        self._local = (config.num_slices // expert_size, expert_rank)
        self._nodes: NodeGroups | None = None
        super().__init__(config, width, std, out_std, layer=layer, vocab_size=vocab_size, keep_rows=keep_rows)
        self.num_experts = config.num_slices
        self.num_local_experts = config.num_slices // expert_size
        self.hidden_size = width
        self.ep_size = expert_size
        self.ep_rank = expert_rank
        self.ep_group_name = f"ep_size_{expert_size}"
        self.ep_group = None  # the engine sets it, through the inherited set_deepspeed_parallelism
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, expert_size
        )
        self.combine_impl = "weighted_sum"
        self.comm_backend = "comm"
        self.folding_group_handles = None
        self.tp_group = None
        self.expert_bias = None
        self.load_balance_coeff = None

    def build_experts(self, width: int, std: float, out_std: float) -> Experts:
        num_local, expert_rank = self._local
        first, activation = num_local * expert_rank, self.config.activation
        return Experts(num_local, width, self.config.expert_dim, std, out_std, first, activation)

    def mix(
        self, x_ND: torch.Tensor, dispatch: Dispatch, channels_EF: torch.Tensor | None, meanwhile: Meanwhile = nothing
    ) -> torch.Tensor:
        """Send every row once to each rank that holds experts of its, mix there, and add up what comes back.

        What is to be done meanwhile is done while rows travel, and so is its backward pass.
        """
        if self.ep_size == 1:
            return super().mix(x_ND, dispatch, channels_EF, meanwhile)
        nodes = self._nodes
        all_to_all = AllToAll(self.ep_group) if nodes is None else HierarchicalAllToAll(nodes)
        exchange = Exchange(dispatch, self.ep_size, all_to_all)
        rows = exchange.send(x_ND)
        meanwhile()
        mixed_MD = super().mix(rows(), exchange.received, channels_EF)
        return exchange.send_back(mixed_MD)

    def join_nodes(self, nodes: NodeGroups | None) -> None:
        """Exchange rows within a node first, then across; None: in one step."""
        self._nodes = nodes

    def route(self, x_BTD: torch.Tensor, context: RouterContext) -> Routing:
        router = self.router
        if isinstance(router, Sinkhorn) and router.config.plan_over == "expert_group" and self.ep_size > 1:
            router.gather_rows = self._gather_rows
            router.rank_in_group = self.ep_rank
        return super().route(x_BTD, context)

    def _gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, ...) of this rank to (R, N, ...) of the group; gradients come back to the rank that sent the rows."""
        return torch.stack(all_gather(rows, group=self.ep_group))


class ExpertParallelMoE(SpreadMoE, AutoEPMoELayer):
    """A spread mixture whose experts DeepSpeed reduces, partitions and saves."""

    def tag_parameters(self) -> None:
        """Tell DeepSpeed which parameters are expert-parallel. Call when they are allocated for good."""
        weight: Any  # the tags are plain attributes
        mine = list(autoep_experts_for_rank(self.expert_placement_descriptor, self.ep_rank))
        for weight in (self.experts.w1, self.experts.w2, self.experts.w3):
            logical_shape = [self.num_experts, *weight.shape[1:]]
            affine_map = autoep_placement_to_affine_map(self.expert_placement_descriptor, logical_shape)
            universal = {
                AUTOEP_EXPERT_PLACEMENT: self.expert_placement_descriptor,
                AFFINE_MAP: affine_map.to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: mine,
            }
            setattr(weight, DS_AUTOEP_UC_META, universal)
            weight.allreduce = False
            weight.group_name = self.ep_group_name
            weight.ds_zero_placement_family = "autoep_expert"
            weight.ds_zero_partition_group_name = self.ep_group_name
        for weight in self.router.parameters() if self.router is not None else ():
            weight.allreduce = True
            mark_autoep_folding_router_parameter(weight)
            weight.ds_zero_placement_family = "replicated"


def join_expert_groups(layer: SpreadMoE) -> None:
    """Give the layer its process group as DeepSpeed makes it; DeepSpeed's engine need not know the layer's class."""
    AutoEPMoELayer.set_deepspeed_parallelism(layer)


def replica_group(layer: SpreadMoE) -> Any:
    """The process group of the ranks that hold the same experts as this one."""
    return groups._get_expert_data_parallel_group(layer.ep_group_name)


def tag_parameters(model: Decoder) -> None:
    """Tag the parameters of every expert-parallel layer of the model."""
    for module in model.modules():
        if isinstance(module, ExpertParallelMoE):
            module.tag_parameters()
