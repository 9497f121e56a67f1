"""The layer with a sink in its softmax, against its formula, with all gradients.

Letters: H query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tidegate.model.attention import Attention, AttentionConfig, rotary_table
from tidegate_kernels.gated_attention import Documents


def module_with(softmax: str, initialise: Callable[..., nn.Module]) -> Attention:
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, softmax=softmax)
    module = Attention(config, 12, norm_eps=1e-6, std=0.3, out_std=0.3)
    initialise(module)
    return module


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softmax", ["plain", "off_by_one", "learnable_sink"])
def test_the_layer(
    softmax: str, packed: bool, initialise: Callable[..., nn.Module], exact_attention: Callable[..., Any]
) -> None:
    module = module_with(softmax, initialise)
    if module.sink is not None:
        assert not module.sink.any(), "starts as off-by-one"
        nn.init.normal_(module.sink)
    ids = (torch.arange(63) // 9).expand(2, -1) if packed else None
    x, g = torch.randn(2, 63, 12, requires_grad=True), torch.randn(2, 63, 12)
    documents = None if ids is None else Documents(ids)
    out = module(x, rotary_table(63, 6, 10_000.0, torch.device("cpu")), documents).y_BTD
    out.backward(g)
    exact = exact_attention(module, x, g, ids)
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.x_grad, rtol=1e-4, atol=1e-4)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.double(), exact.grads[name], rtol=1e-4, atol=1e-3)


def test_off_by_one_is_a_sink_of_zero_that_is_not_learned(initialise: Callable[..., nn.Module]) -> None:
    fixed, learned, plain = (module_with(kind, initialise) for kind in ("off_by_one", "learnable_sink", "plain"))
    assert fixed.state_dict().keys() == plain.state_dict().keys()
    assert learned.state_dict().keys() - plain.state_dict().keys() == {"sink"}
    x, table = torch.randn(2, 63, 12), rotary_table(63, 6, 10_000.0, torch.device("cpu"))
    assert torch.equal(fixed(x, table, None)[0], learned(x, table, None)[0])
    assert (fixed(x, table, None)[0] - plain(x, table, None)[0]).abs().max() > 1e-2
