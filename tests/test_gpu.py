"""What only a CUDA device can show; `pytest -m gpu` there. CI has none and skips these, with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.model.attention import AttentionConfig, document_mask
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.moe import MoEConfig, SharedExpertsConfig
from tidegate_kernels.grouped_mm import grouped_mm
from tidegate_kernels.grouped_mm import reference as grouped_mm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = ModelConfig(
    vocab_size=503,
    width=128,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
    ffn=MoEConfig(num_experts=7, top_k=3, expert_dim=64, shared=SharedExpertsConfig(num=1)),
)


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("counts", [[1, 0, 63, 1000, 7], [0, 0, 0, 5, 0], [17, 33, 65, 129, 1]])
def test_grouped_mm_is_within_twice_the_error_of_a_loop_of_bf16_products(counts: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(len(counts), 48, 64, device="cuda", dtype=torch.bfloat16)
    sizes = torch.tensor(counts, device="cuda")
    upstream = torch.randn(sum(counts), 48, device="cuda", dtype=torch.bfloat16)

    def run(op, dtype):  # type: ignore[no-untyped-def]
        a, b = (t.to(dtype).requires_grad_() for t in (x, w))
        out = op(a, b.transpose(1, 2), sizes)
        return out.detach(), *torch.autograd.grad(out, (a, b), upstream.to(dtype))

    truths = run(grouped_mm_reference.grouped_mm, torch.float64)
    plain = run(grouped_mm_reference.grouped_mm, torch.bfloat16)
    ours = run(grouped_mm, torch.bfloat16)
    for name, truth, reference, actual in zip(("out", "dx", "dw"), truths, plain, ours, strict=True):
        assert relative_error(actual, truth) <= 2 * relative_error(reference, truth) + 1e-6, name
    empty = [group for group, count in enumerate(counts) if count == 0]
    assert torch.count_nonzero(ours[2][empty]) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_preferred_attention_backends_agree_with_the_plain_one(masked: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 257, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 257, 64, device="cuda", dtype=torch.bfloat16)
    documents = torch.arange(257, device="cuda").div(50, rounding_mode="floor").expand(2, -1)
    mask = document_mask(documents) if masked else None

    def attend(backends: list[SDPBackend], *args: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(*args, attn_mask=mask, is_causal=not masked, enable_gqa=True)

    from tidegate.model.attention import _BACKENDS

    truth = attend([SDPBackend.MATH], q.double(), k.double(), v.double())
    plain = attend([SDPBackend.MATH], q, k, v)
    assert relative_error(attend(_BACKENDS, q, k, v), truth) <= 2 * relative_error(plain, truth)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_bf16_model_on_the_gpu_scores_like_an_fp32_model_on_the_cpu(isolate: bool) -> None:
    cpu = materialize(lambda: Decoder(CONFIG), torch.device("cpu"), seed=0)
    gpu = materialize(lambda: Decoder(CONFIG), torch.device("cuda"), seed=0)
    gpu.load_state_dict(cpu.state_dict())
    gpu.bfloat16()
    assert all(block.ffn.router.expert_bias.dtype == torch.float32 for block in gpu.blocks)
    torch.manual_seed(1)
    tokens = torch.randint(0, 503, (2, 129))
    counted = torch.rand(2, 128) > 0.2
    documents = torch.arange(128).div(40, rounding_mode="floor").expand(2, -1) if isolate else None
    args = (tokens[:, :-1], tokens[:, 1:], counted, documents)
    nll_cpu = cpu(*args).nll_B / counted.sum(1)
    output = gpu(*(a.cuda() if a is not None else None for a in args))
    torch.testing.assert_close(output.nll_B.cpu() / counted.sum(1), nll_cpu, atol=5e-3, rtol=0)
    assert float(output.stats.counts_BE.sum()) == float(counted.sum()) * 3 * 2
    output.nll_B.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in gpu.parameters())


def test_recomputing_activations_changes_neither_losses_nor_counts() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 503, (2, 129), device="cuda")
    counted = torch.ones(2, 128, dtype=torch.bool, device="cuda")
    results = []
    for recompute in (False, True):
        model = materialize(lambda r=recompute: Decoder(CONFIG, recompute=r), torch.device("cuda"), seed=0).bfloat16()
        output = model(tokens[:, :-1], tokens[:, 1:], counted)
        output.nll_B.sum().backward()
        results.append((output.nll_B.detach(), output.stats.counts_BE, model.blocks[0].ffn.router.weight.grad))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=0, rtol=1e-2)
