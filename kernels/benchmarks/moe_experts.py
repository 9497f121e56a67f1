"""`moe_experts` with the sort before it: the whole routed feed-forward behind the router.

Peers bring their own router, a hundredth of their time.
Letters: T tokens, D width, F expert width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from benchmarks.harness import Case, Floor
from tidegate_kernels.choice import chosen
from tidegate_kernels.moe_dispatch import place
from tidegate_kernels.moe_experts import moe_experts


def cases() -> Iterator[Case]:
    yield _case(16384, 2048, 1024, 64, 8)
    yield _case(16384, 2048, 768, 128, 8)
    yield _case(16384, 2048, 1024, 64, 8, skew=4.0)
    yield _case(32768, 1024, 512, 32, 4)
    yield _case(8192, 1536, 264, 60, 6)


def _case(T: int, D: int, F: int, E: int, K: int, skew: float = 1.0) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        w1, w3, w2 = (
            (torch.randn(E, *shape, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
            for shape in ((F, D), (F, D), (D, F))
        )
        x, upstream = (torch.randn(T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weights = torch.rand(T * K, device="cuda").requires_grad_()
        return x.requires_grad_(), weights, w1, w3, w2, _choices(T, E, K, skew), upstream

    def run(x: torch.Tensor, weights: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor,
            expert_A: torch.Tensor) -> torch.Tensor:  # fmt: skip
        return moe_experts(x, weights, place(expert_A, E, per_row=K), w1, w3, w2)

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        with chosen("reference"):
            return run(*arguments)

    peers: dict[str, Callable[..., Any]] = {}
    if skew == 1.0:  # their routers choose for themselves
        peers = {
            "transformers grouped_mm": _lazily(lambda: _transformers(D, F, E, K)),
            "DeepSpeed AutoEP fused": _lazily(lambda: _autoep(D, F, E, K)),
        }
    shape = {"T": T, "D": D, "F": F, "E": E, "K": K} | ({"skew": skew} if skew != 1.0 else {})
    # x, output and their gradients once, the weights and theirs, gate and up written and read.
    moved = 2 * (4 * T * D + 6 * E * D * F + 4 * T * K * F)
    floor = Floor(bytes=moved, flops=18 * T * K * D * F)
    target = {(1024, 1.0): 744 / 480, (768, 1.0): 744 / 430, (1024, 4.0): 744 / (0.85 * 480)}.get((F, skew))
    return Case(
        "moe_experts", shape, floor, inputs, {"triton": run, "reference": reference, **peers}, target, graph=False
    )


def _choices(T: int, E: int, K: int, skew: float) -> torch.Tensor:
    """(T K,) experts; with a skew, one expert in eight is chosen that much more often than the mean."""
    share_E = torch.ones(E, device="cuda")
    if skew != 1.0:
        hot = E // 8
        share_E[:hot] = skew
        share_E[hot:] = (E - skew * hot) / (E - hot)
    # Independent draws without replacement: Gumbel keys. Shares are then met nearly, as K is small against E.
    keys_TE = share_E.log() - (-torch.rand(T, E, device="cuda").log()).log()
    return keys_TE.topk(K, dim=1).indices.flatten()


def _lazily(build: Callable[[], Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
    class Peer:
        @property
        def weights(self) -> list[torch.Tensor]:
            return build().weights  # type: ignore[attr-defined]

        def __call__(self, x: torch.Tensor, *ours: torch.Tensor) -> torch.Tensor:
            return build()(x)

    return Peer()


class _Layer:
    """A peer's layer as a function of x, with the weights whose gradients it has to compute."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer, self.weights = layer, [p for p in layer.parameters() if p.requires_grad]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).view_as(x)


@lru_cache(maxsize=1)
def _transformers(D: int, F: int, E: int, K: int) -> _Layer:
    return _Layer(_qwen(D, F, E, K).model.layers[0].mlp)


@lru_cache(maxsize=1)
def _autoep(D: int, F: int, E: int, K: int) -> _Layer:
    import os

    import deepspeed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("nccl")
    model = _qwen(D, F, E, K)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "expert_parallel": {
                "enabled": True,
                "autoep_size": 1,
                "preset_model": "qwen3_moe",
                "has_shared_experts": False,
                "shared_experts_gate_pattern": None,
                "combine_impl": "fused_weighted_sum",
                "gate_up_impl": "fused",
            },
        },
    )
    return _Layer(engine.module.model.layers[0].mlp)


def _qwen(D: int, F: int, E: int, K: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=D // 128, num_key_value_heads=D // 128,
        head_dim=128, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, intermediate_size=F,
        norm_topk_prob=True, decoder_sparse_step=1,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model
