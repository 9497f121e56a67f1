"""How a job is laid over processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tidegate.config import Config

__all__ = ["ParallelConfig"]


class ParallelConfig(Config):
    expert: int = Field(default=1, ge=1)
    """Ranks that share one copy of the experts (EP). Ranks r and r + 1 are neighbours in a group; the world is
    EP x expert-data-parallel, and every rank is data parallel for all other parameters."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that hold the same sequences, a run of their tokens each: for those that are too long for one. Neighbours
    like those of `expert`, and data parallel for all parameters; attention swaps tokens for heads (Ulysses), a linear
    mixer's state goes from rank to rank."""
    zero_stage: Literal[0, 1, 2] = 1
    """What DeepSpeed spreads over data-parallel ranks: 0 nothing, 1 optimizer state, 2 gradients too. With bf16, stages
    1 and 2 sum gradients in fp32; at 0 DeepSpeed sums them in bf16, which loses digits at large accumulation."""
    gradients_at_once: int = Field(default=1, ge=1, le=4)
    """With bf16 at stage 1: hold the gradients of so many micro-batches, 2 bytes a parameter each but for the last, and
    add them to the fp32 sums in one pass. The same bits; 2 take 40 % less memory traffic than 1, 4 take 60 % less."""
    all_to_all: Literal["plain", "hierarchical"] = "plain"
    """How rows travel to the ranks that hold their experts. `hierarchical`: to the ranks of a node first, then across
    nodes, in fewer and larger messages between nodes; the same bits. It acts where a group of `expert` ranks is larger
    than a node with several."""
    offload: Literal["none", "optimizer", "experts"] = "none"
    """`optimizer`: master weights and moments live in the host's memory, 18 bytes a parameter over the ranks that ZeRO
    spreads them on, and AdamW runs on the host's cores. Needs stage 1 or 2; stage 2 leaves least on the GPU.
    `experts`: all of the routed experts does, and their weights come to the GPU layer by layer, for models that do not
    fit. With bf16 at stage 1; docs/memory.md says from which micro-batch on it costs little time."""
    offload_folder: str | None = None
    """With `offload: experts`: a folder on a local disk for their master weights and moments, 12 bytes a parameter that
    the host's memory need not hold. Its files go with the process."""

    def problem(self, world_size: int, num_experts: int | None, what: str = "model.ffn.num_experts") -> str | None:
        """Why this layout cannot run, or None. `what` names the experts that are spread."""
        if world_size % self.expert:
            return (
                f"parallel.expert={self.expert} does not divide resources.workers={world_size}; "
                f"use one of {_divisors(world_size)}"
            )
        if world_size % self.sequence:
            return (
                f"parallel.sequence={self.sequence} does not divide resources.workers={world_size}; "
                f"use one of {_divisors(world_size)}"
            )
        if self.all_to_all == "hierarchical" and self.expert == 1:
            return (
                "parallel.all_to_all=hierarchical has no rows to exchange at parallel.expert=1; use "
                "parallel.all_to_all=plain"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            return "parallel.offload=optimizer needs ZeRO, but parallel.zero_stage=0; use parallel.zero_stage=2"
        if self.offload == "experts" and self.zero_stage != 1:
            return (
                f"parallel.offload=experts works at parallel.zero_stage=1 only, not at {self.zero_stage}; use "
                "parallel.zero_stage=1"
            )
        if self.offload == "experts" and num_experts is None:
            return "parallel.offload=experts needs experts, but model.ffn.kind=dense; use parallel.offload=optimizer"
        if self.offload_folder is not None and self.offload != "experts":
            return (
                f"parallel.offload_folder={self.offload_folder} holds experts, but parallel.offload={self.offload}; "
                "use parallel.offload=experts or remove the folder"
            )
        if num_experts is None and self.expert > 1:
            return f"parallel.expert={self.expert} needs experts, but model.ffn.kind=dense; set parallel.expert=1"
        if num_experts is not None and num_experts % self.expert:
            return (
                f"parallel.expert={self.expert} does not divide {what}={num_experts}; "
                f"use one of {_divisors(num_experts)}"
            )
        return None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
