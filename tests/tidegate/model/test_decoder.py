"""The whole model: initial values, loss, documents, and what `flops.py` says it costs.

Letters: L layers, B sequences, T tokens, D width, V vocabulary, H query heads, G key/value heads, d head width, E
experts, K chosen experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from tidegate.model import flops
from tidegate.model.attention import rotary_table
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.initialisation import Draw
from tidegate.model.moe import Experts, MoE, MoEConfig
from tidegate.model.routers import RouterContext
from tidegate_kernels.choice import chosen

CPU = torch.device("cpu")
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
MIXTURE = {"kind": "moe", "num_experts": 7, "top_k": 3, "expert_dim": 8}
DENSE = {"kind": "dense", "hidden_dim": 13}

VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"ffn": DENSE},
    "dense_tied": {"ffn": DENSE, "tie_embeddings": True},
    "sigmoid": {"ffn": {**MIXTURE, "router": {"kind": "sigmoid_top_k"}}},
    "shared": {"ffn": {**MIXTURE, "shared": {"num": 2}}},
    "shared_gated": {"ffn": {**MIXTURE, "shared": {"num": 1, "gate": True}}},
    "one_layer_one_expert": {"num_layers": 1, "ffn": {**MIXTURE, "num_experts": 1, "top_k": 1}},
    "no_gate": {"attention": {**HEADS, "gate": {"kind": "none"}}},
    "no_qk_norm": {"attention": {**HEADS, "qk_norm": False}},
    "headwise": {"attention": {**HEADS, "gate": {"kind": "sdpa_output", "granularity": "headwise"}}},
    "value_headwise": {"attention": {**HEADS, "gate": {"kind": "value", "granularity": "headwise"}}},
    "key": {"attention": {**HEADS, "gate": {"kind": "key"}}},
    "query_shared": {"attention": {**HEADS, "gate": {"kind": "query", "heads": "shared"}}},
    "dense_output": {"attention": {**HEADS, "gate": {"kind": "dense_output"}}},
    "constant": {"attention": {**HEADS, "gate": {"kind": "sdpa_output", "input": "constant"}}},
    "constant_headwise": {
        "attention": {**HEADS, "gate": {"kind": "value", "input": "constant", "granularity": "headwise"}}
    },
    "off_by_one": {"attention": {**HEADS, "softmax": "off_by_one"}},
    "learnable_sink": {"attention": {**HEADS, "softmax": "learnable_sink"}},
    "qk_clip": {"attention": {**HEADS, "qk_norm": False, "qk_clip": 100}},
    "gated_norm": {"norm": {"kind": "gated", "rank": 5}},
    "pre_affine": {"norm": {"kind": "pre_affine"}, "ffn": DENSE},
    "geglu": {"ffn": {**MIXTURE, "activation": "geglu"}},
    "relu2": {"ffn": {**MIXTURE, "activation": "relu2", "shared": {"num": 2, "gate": True}}},
    "poly_norm": {"ffn": {**MIXTURE, "activation": "poly_norm", "shared": {"num": 1}}},
    "poly_relu_dense": {"ffn": {**DENSE, "activation": "poly_relu"}},
    "value_heads": {"attention": {**HEADS, "num_value_heads": 4}},
    "augmented_query": {"attention": {**HEADS, "num_value_heads": 4, "augmented_query": 20}},
    "few_value_heads": {"attention": {**HEADS, "num_value_heads": 1, "gate": {"kind": "value"}}},
    "wide_heads_tied": {"tie_embeddings": True, "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 20}},
}
KDA = {"kind": "kda", "num_heads": 2, "key_dim": 6, "value_dim": 10}
MLSTM = {"kind": "scalar_gated", "num_heads": 3, "key_dim": 4, "value_dim": 8, "input_gate": True}
VARIANTS["hybrid"] = {"layers": "2 x kda, attention", "num_layers": 3, "mixers": {"kda": KDA}}
WINDOW = {"kind": "sliding_window", "window": 9}
VARIANTS["sliding_window"] = {"layers": "3 x local, attention", "num_layers": 4, "mixers": {"local": WINDOW}}
VARIANTS["decoder_hybrid_decoder"] = {
    "layers": "mine, kda, attention, unit, local, unit",
    "num_layers": 6,
    "mixers": {"mine": MLSTM, "kda": KDA, "unit": {"kind": "gmu"}, "local": WINDOW},
}
VARIANTS["cross_attention"] = {
    "layers": "kda, attention, unit, shared",
    "num_layers": 4,
    "mixers": {"kda": KDA, "unit": {"kind": "gmu"}, "shared": {"kind": "cross_attention"}},
}
VARIANTS["no_attention"] = {
    "layers": "[mine, yours] x 1",
    "num_layers": 2,
    "mixers": {"mine": {**KDA, "kind": "gla", "conv": 0}, "yours": MLSTM},
}
BEST = {"kind": "dynamic_mask", "keep": 9}
VARIANTS["value_heads_of_each"] = {
    "layers": "local, best, attention",
    "num_layers": 3,
    "mixers": {"local": WINDOW, "best": BEST},
    "attention": {**HEADS, "num_value_heads": 4},
}
VARIANTS["dynamic_mask"] = {"layers": "3 x best, attention", "num_layers": 4, "mixers": {"best": BEST}}
VARIANTS["gam"] = {"layers": "bank, attention", "num_layers": 2, "mixers": {"bank": {"kind": "gam", "slots": 5}}}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())

MakeConfig = Callable[..., ModelConfig]
LastNorm = Callable[[Decoder], list[Any]]


def build(config: ModelConfig, seed: int = 0) -> Decoder:
    return materialize(lambda: Decoder(config), CPU, seed)


def batch(length: int = 63, vocab_size: int = 101) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, labels and which tokens count."""
    tokens, labels = torch.randint(vocab_size, (2, 2, length)).unbind()
    return tokens, labels, torch.rand(2, length) < 0.7


# --- initial values


@every_variant
def test_every_value_is_initialised_and_depends_on_the_seed(changes: dict[str, Any], model_config: MakeConfig) -> None:
    """Memory is poisoned with NaN; building on meta or directly gives the same values."""
    config = model_config(**changes)
    model, other = build(config, seed=1), build(config, seed=2)
    direct = Decoder(config)
    direct.init_weights(1)
    state = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in direct.state_dict().items())
    for name, tensor in other.state_dict().items():
        given = ("norm.weight", "norm.scale", "expert_bias", "gate.constant", "sink", "coefficients")
        given += ("rule.bias", "forget_bias", "write_bias", "bias_scale")
        drawn = not name.endswith(given)
        if config.ffn.activation in ("relu2", "poly_norm") and name.endswith("experts.w3"):
            drawn = False
        assert torch.equal(tensor, state[name]) != drawn, name


def test_standard_deviations(model_config: MakeConfig) -> None:
    """0.02 inside, 0.02 / sqrt(2 L) for what writes to the residual stream; norms are 1 and biases 0."""
    config = model_config(num_layers=3, ffn={**MIXTURE, "shared": {"num": 2, "gate": True}}, init_std=0.02)
    seen = set()
    for name, tensor in build(config).state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("expert_bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        else:
            writes = name.endswith(("wo.weight", "w2.weight", "experts.w2"))
            std = 0.02 / math.sqrt(6) if writes else 0.02
            seen.add(writes)
            n = tensor.numel()
            assert abs(tensor.std().item() - std) < 5 * std / math.sqrt(2 * n), name
            assert abs(tensor.mean().item()) < 5 * std / math.sqrt(n), name
            assert tensor.abs().max() < 6 * std, name
    assert seen == {True, False}


def test_no_two_tensors_are_drawn_alike(model_config: MakeConfig) -> None:
    """Layers, the matrices of a layer and the experts of a matrix all have a stream of their own."""
    state = build(model_config(ffn={**MIXTURE, "shared": {"num": 1}})).state_dict()
    rows: list[torch.Tensor] = []
    for name, tensor in state.items():
        if not name.endswith(("norm.weight", "expert_bias")):
            rows += [part.flatten()[:24] for part in (tensor if ".experts.w" in name else [tensor])]
    heads = torch.stack(rows) / torch.stack(rows).norm(dim=1, keepdim=True)
    overlap = (heads @ heads.T - torch.eye(len(rows))).abs().max()
    assert overlap < 0.9, "24 independent numbers do not correlate like this"


def test_adding_a_parameter_changes_no_other(model_config: MakeConfig) -> None:
    plain = build(model_config(attention={**HEADS, "gate": {"kind": "none"}})).state_dict()
    gated = build(model_config(ffn={**MIXTURE, "shared": {"num": 1}})).state_dict()
    assert plain.keys() < gated.keys()
    assert all(torch.equal(tensor, gated[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(("num", "first"), [(2, 4), (7, 0), (1, 6)])
def test_a_shard_of_experts_draws_its_own_rows(num: int, first: int, model_config: MakeConfig) -> None:
    class Shard(MoE):
        def build_experts(self, width: int, std: float, out_std: float) -> Experts:
            return Experts(num, width, self.config.expert_dim, std, out_std, first=first)

    config = model_config()
    full = build(config, seed=3).state_dict()
    sharded = materialize(lambda: Decoder(config, moe=Shard), CPU, 3).state_dict()
    assert sharded.keys() == full.keys()
    for name, tensor in sharded.items():
        expected = full[name][first : first + num] if ".experts.w" in name else full[name]
        assert torch.equal(tensor, expected), name
    alone = Experts(num, 24, 8, 0.02, config.out_std, first=first)
    alone.init_weights(Draw(3, "blocks.1.ffn.experts"))
    assert torch.equal(alone.w2, full["blocks.1.ffn.experts.w2"][first : first + num])


def test_a_draw_depends_on_seed_path_name_and_row_alone() -> None:
    def draw(seed: int = 0, path: str = "a.b", name: str = "w", row: int = 0) -> torch.Tensor:
        tensor = torch.empty(63)
        Draw(seed, path).normal_(tensor, 0.5, name, row)
        return tensor

    first = draw()
    torch.manual_seed(5)  # the global generator has no say
    assert torch.equal(draw(), first)
    assert torch.equal(draw(path="a", name="b.w"), first), "the parameter's full name is the same"
    for other in (draw(seed=1), draw(path="a.c"), draw(name="v"), draw(row=1)):
        assert not torch.equal(other, first)
    state = torch.get_rng_state()
    Draw(0, "a").normal_(torch.empty(3), 1.0, "w")
    assert torch.equal(torch.get_rng_state(), state)


# --- forward


@pytest.mark.parametrize("length", [1, 63])
@every_variant
def test_every_variant_trains(changes: dict[str, Any], length: int, model_config: MakeConfig) -> None:
    """Loss near ln V at the start, a finite gradient for every parameter, and lower loss after a small step."""
    model = build(model_config(**changes))
    tokens, labels, _ = batch(length)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    output = model(tokens, labels, counted)
    loss = output.nll / counted.sum()
    # Logits are N(0, D std^2) = N(0, 0.1^2), which adds 0.005; one sequence of one token scatters by 0.1.
    assert abs(loss.item() - math.log(101)) < (0.05 if length > 1 else 0.5)
    assert (output.stats is None) == (changes.get("ffn", {}).get("kind") == "dense")
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    for name, parameter in model.named_parameters():
        # One expert or one token leaves nothing to route, to attend to or to forget.
        silent = (".router." in name and model.config.ffn.num_experts == 1) or (
            length == 1 and name.split("attention.")[-1].startswith(("wq", "augment", "wk", "q_norm", "k_norm", "gate"))
        )
        silent |= length == 1 and (".mixer.rule." in name or name.endswith(("w_bias.weight", "bias_scale")))
        assert parameter.grad is not None or silent, name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or silent, name
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 / norm * parameter.grad
        after = model(tokens, labels, counted).nll / counted.sum()
    assert after < loss


@pytest.mark.parametrize(
    "variant",
    [
        "moe",
        "dense",
        "no_qk_norm",
        "key",
        "gated_norm",
        "pre_affine",
        "poly_norm",
        "value_heads",
        "augmented_query",
        "cross_attention",
    ],
)
def test_kernels_compute_the_same(variant: str, model_config: MakeConfig) -> None:
    """Losses and gradients of the Triton kernels are those of the reference."""
    model = build(model_config(init_std=0.2, **VARIANTS[variant]))
    inputs = batch(17)
    results = []
    for kernels in ("reference", "triton"):
        with chosen(kernels):
            nll = model(*inputs).nll
            results.append((nll, *torch.autograd.grad(nll, list(model.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_nll_is_cross_entropy_of_the_counted_labels(tied: bool, model_config: MakeConfig, last_norm: LastNorm) -> None:
    model = build(model_config(tie_embeddings=tied, init_std=0.3))
    seen = last_norm(model)
    tokens, labels, counted = batch()
    nll_B = model(tokens, labels, counted).nll_B
    assert nll_B.dtype == torch.float32
    head = model.embedding.weight if model.head is None else model.head.weight
    logits = (seen[0].normalised @ head.T).double()
    for b in range(2):
        expected = functional.cross_entropy(logits[b, counted[b]], labels[b, counted[b]], reduction="sum")
        torch.testing.assert_close(nll_B[b].double(), expected, rtol=1e-5, atol=1e-4)
    nothing = model(tokens, labels, torch.zeros_like(counted))
    assert not nothing.nll_B.any()
    assert not any(field.any() for field in nothing.stats[:4])


def test_uncounted_labels_have_no_say(model_config: MakeConfig) -> None:
    model = build(model_config())
    tokens, labels, counted = batch()
    other = torch.where(counted, labels, (labels + 1) % 101)
    assert torch.equal(model(tokens, labels, counted).nll_B, model(tokens, other, counted).nll_B)
    assert not torch.equal(model(tokens, labels, ~counted).nll_B, model(tokens, other, ~counted).nll_B)


@pytest.mark.parametrize("ffn", [DENSE, MIXTURE], ids=["dense", "moe"])
def test_blocks_add_attention_then_feed_forward(
    ffn: dict[str, Any], model_config: MakeConfig, last_norm: LastNorm
) -> None:
    """Pre-norm residual blocks, written out."""
    model = build(model_config(ffn=ffn, init_std=0.3))
    tokens, labels, counted = batch()
    seen = last_norm(model)
    model(tokens, labels, counted)
    h = model.embedding.weight[tokens]
    for block in model.blocks:
        h = h + block.attention(block.attention_norm(h), rotary_table(63, 6, 10_000.0, CPU), None)[0]
        x = block.ffn_norm(h)
        h = h + (block.ffn(x) if ffn is DENSE else block.ffn(x, RouterContext.alone(counted))[0])
    assert torch.equal(seen[0].total, h)


def test_tied_embeddings_are_one_tensor(model_config: MakeConfig) -> None:
    tied, untied = build(model_config(tie_embeddings=True)), build(model_config())
    assert tied.head is None
    assert "head.weight" not in tied.state_dict()
    assert "head.weight" in untied.state_dict()
    tokens, labels, counted = batch()
    labels[:], tokens[:] = 7, 3
    for model, used_as_head in ((tied, True), (untied, False)):
        model(tokens, labels, counted).nll.backward()
        assert model.embedding.weight.grad is not None
        rows = model.embedding.weight.grad.any(dim=1)
        assert rows[3]
        assert rows[[0, 7, 100]].all() == used_as_head


def test_later_tokens_change_no_earlier_loss(model_config: MakeConfig) -> None:
    model = build(model_config(init_std=0.3))
    tokens, labels, _ = batch()
    counted = (torch.arange(63) < 20).expand(2, -1)
    other = torch.where(counted, tokens, torch.randint(101, (2, 63)))
    one, two = model(tokens, labels, counted), model(other, labels, counted)
    torch.testing.assert_close(one.nll_B, two.nll_B, rtol=1e-6, atol=1e-5)
    for field, same in zip(one.stats, two.stats, strict=True):
        torch.testing.assert_close(field, same, rtol=1e-5, atol=1e-5)


@every_variant
def test_no_documents_are_one_document(changes: dict[str, Any], model_config: MakeConfig) -> None:
    model = build(model_config(init_std=0.1, **changes))
    tokens, labels, counted = batch()
    joined = model(tokens, labels, counted)
    one = model(tokens, labels, counted, torch.full((2, 63), 4))
    torch.testing.assert_close(one.nll_B, joined.nll_B, rtol=1e-5, atol=1e-4)
    apart = model(tokens, labels, counted, torch.arange(63).expand(2, -1) // 5)
    assert (apart.nll_B - joined.nll_B).abs().max() > 1e-3


def test_packed_documents_equal_separate_ones(model_config: MakeConfig) -> None:
    """Through attention, routing and loss: a window of two documents is the two windows."""
    model = build(model_config(init_std=0.1))
    tokens, labels, counted = batch()
    packed = model(tokens, labels, counted, (torch.arange(63) >= 20).long().expand(2, -1))
    parts = [model(tokens[:, part], labels[:, part], counted[:, part]) for part in (slice(0, 20), slice(20, None))]
    torch.testing.assert_close(packed.nll_B, parts[0].nll_B + parts[1].nll_B, rtol=1e-5, atol=1e-4)
    for whole, first, second in zip(packed.stats[:4], parts[0].stats[:4], parts[1].stats[:4], strict=True):
        torch.testing.assert_close(whole, first + second, rtol=1e-5, atol=1e-4)


def test_statistics_are_stacked_in_the_order_of_the_layers(model_config: MakeConfig) -> None:
    model = build(model_config(num_layers=3))
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.ffn.router.expert_bias[layer] = 100.0
    tokens, labels, counted = batch()
    counts_LBE = model(tokens, labels, counted).stats.counts_BE
    assert counts_LBE.shape == (3, 2, 7)
    for layer in range(3):
        assert torch.equal(counts_LBE[layer, :, layer], counted.sum(dim=1).float())
    assert torch.equal(counts_LBE.sum(dim=-1), 3.0 * counted.sum(dim=1).expand(3, -1))


def test_bf16_model_keeps_losses_and_statistics_in_fp32(model_config: MakeConfig) -> None:
    model = build(model_config())
    tokens, labels, counted = batch()
    exact = model(tokens, labels, counted)
    output = model.bfloat16()(tokens, labels, counted)
    assert {output.nll_B.dtype, *(field.dtype for field in output.stats[:4])} == {torch.float32}
    # bf16 weights move logits of size 0.1 by 4e-4 each: some 40 labels a sequence, hardly correlated.
    torch.testing.assert_close(output.nll_B, exact.nll_B, rtol=0, atol=0.1)
    assert model.blocks[0].ffn.router.expert_bias.dtype == torch.float32


# --- costs


@every_variant
def test_parameters_are_as_many_as_flops_says(changes: dict[str, Any], model_config: MakeConfig) -> None:
    config = model_config(**changes)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == flops.total(config, 128).params
    rows = flops.costs(config, 128)
    for index in (1, 2, 3):
        assert sum(row[index] for row in rows) == flops.total(config, 128)[index]
    assert len({row.field for row in rows}) == len(rows)


@every_variant
def test_active_parameters_leave_out_look_ups_and_idle_experts(
    changes: dict[str, Any], model_config: MakeConfig
) -> None:
    config = model_config(**changes)
    with torch.device("meta"):
        model = Decoder(config)
    idle = 0 if config.tie_embeddings else model.embedding.weight.numel()
    if isinstance(config.ffn, MoEConfig):
        share = 1 - config.ffn.top_k / config.ffn.num_experts
        idle += round(share * sum(p.numel() for block in model.blocks for p in block.ffn.experts.parameters()))
    assert flops.total(config, 128).active_params == flops.total(config, 128).params - idle


def test_flops_of_a_hybrid_by_hand(model_config: MakeConfig) -> None:
    """Two KDA blocks of 2 heads with keys of 6 and values of 10, and one that attends, at T = 64."""
    config = model_config(**VARIANTS["hybrid"])
    plain = model_config(num_layers=3)
    D, H, K, V, W = config.width, 2, 6, 10, 4
    channels = H * (2 * K + V)
    # q, k and v; their convolution; decays in two steps of rank K, write strengths; the output's gate; the output.
    matrices = D * channels + W * channels + D * K + K * H * K + D * H + D * H * V + H * V * D
    state = 3 * 3 * 2 * H * K * V
    rows = {row.field: row for row in flops.costs(config, 64)}
    assert rows["mixers.kda (kda)"].flops_per_token == 2 * 6 * matrices
    assert rows["mixers.kda (state)"] == flops.Cost("mixers.kda (state)", 0, 0, 2 * state)
    attention = {row.field: row for row in flops.costs(plain, 64) if row.field.startswith("attention")}
    assert all(rows[field].flops_per_token * 3 == row.flops_per_token for field, row in attention.items())
    assert flops.kv_cache_bytes(config) * 3 == flops.kv_cache_bytes(plain) == 3 * 2 * 2 * 2 * 6
    assert flops.state_bytes(config) == 2 * (4 * H * K * V + 2 * 3 * channels)
    assert flops.state_bytes(plain) == 0


def test_a_dynamic_mask_costs_a_window_and_its_biases(model_config: MakeConfig) -> None:
    """Of as many keys; a matrix from 2 x 6 values to 2 biases and their scales in each of three blocks."""
    config, window = model_config(**VARIANTS["dynamic_mask"]), model_config(**VARIANTS["sliding_window"])
    rows, others = flops.costs(config, 64), flops.costs(window, 64)
    (bias,) = (row for row in rows if row not in others)
    assert bias == ("mixers.best (dynamic_mask)", 3 * (12 * 2 + 2), 3 * (12 * 2 + 2), 3 * 6 * 12 * 2)
    assert [row for row in rows if row in others] == others
    assert flops.kv_cache_bytes(config) == flops.kv_cache_bytes(window)
    assert flops.state_bytes(config) == flops.state_bytes(window) + 3 * 9 * 2 * 4


def test_flops_of_a_gam_by_hand(model_config: MakeConfig) -> None:
    """Of a block with 5 slots, which are read twice; its state are two tokens in bf16."""
    config, D = model_config(**VARIANTS["gam"]), 24
    (row,) = (row for row in flops.costs(config, 64) if row.field.startswith("mixers"))
    assert row == ("mixers.bank (gam)", (params := D * (3 + 5 + 2 * D)), params, 6 * (params + 5 * D))
    assert flops.state_bytes(config) == 2 * 2 * D
    assert flops.kv_cache_bytes(config) * 2 == flops.kv_cache_bytes(model_config())


def test_flops_of_a_window_by_hand(model_config: MakeConfig) -> None:
    """Three blocks of four see 9 tokens, at T = 64: the first 8 of a sequence see fewer."""
    config, plain = model_config(**VARIANTS["sliding_window"]), model_config(num_layers=4)
    H, d, T = 4, 6, 64
    scores, whole = (
        next(row for row in flops.costs(each, T) if row.field == "attention (scores)").flops_per_token
        for each in (config, plain)
    )
    assert whole == 4 * 6 * T * H * d
    assert scores == pytest.approx(3 * 12 * (9 - 9 * 9 / 2 / T) * H * d + whole / 4)
    others = [row for row in flops.costs(plain, T) if row.field != "attention (scores)"]
    assert [row for row in flops.costs(config, T) if row.field != "attention (scores)"] == others
    assert flops.kv_cache_bytes(config) * 4 == flops.kv_cache_bytes(plain)
    assert flops.state_bytes(config) == 3 * 9 * 2 * 2 * 2 * 6
    longer = flops.total(config, 2 * T).flops_per_token - flops.total(config, T).flops_per_token
    assert longer == pytest.approx(6 * T * H * d + 3 * 12 * 81 / (4 * T) * H * d)


def test_a_window_reaches_as_far_as_its_layers_are_many(model_config: MakeConfig) -> None:
    """Two layers of three tokens: a change reaches four tokens on, and no further; a window of all is attention."""
    local = {"kind": "sliding_window", "window": 3}
    model = build(model_config(num_layers=2, layers="local", mixers={"local": local}, ffn=DENSE, init_std=0.3))
    tokens, labels, counted = batch(length=20)
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 101
    before, after = (model(each, labels, counted).nll_BT for each in (tokens, other))
    assert (before != after).any(dim=0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    wide = model_config(num_layers=2, layers="local", mixers={"local": {**local, "window": 20}})
    both = (build(config)(tokens, labels, counted).nll_BT for config in (wide, model_config(num_layers=2)))
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


def test_flops_by_hand(model_config: MakeConfig) -> None:
    """6 FLOPs for every active number of a matrix, and 6 T H d for the causal half of scores and their use."""
    config = model_config(ffn={**MIXTURE, "shared": {"num": 2, "gate": True}})
    V, D, L, H, G, d, E, K, F, T = 101, 24, 2, 4, 2, 6, 7, 3, 8, 63
    attention = D * H * d + 2 * D * G * d + H * d * D + D * H * d  # query, key and value, output, gate
    mixture = D * E + K * 3 * D * F + 2 * 3 * D * F + D  # router, chosen, shared and their gate
    assert attention == 2304
    assert mixture == 3072
    # Row t attends to t + 1 of T keys, T / 2 on average; 2 products, 2 FLOPs, 3 passes.
    expected = 6 * (L * (attention + mixture) + V * D) + L * (T / 2) * H * d * 2 * 2 * 3
    assert expected == 6 * (2 * 5376 + 2424) + 2 * 9072
    assert flops.total(config, T).flops_per_token == expected
    assert flops.total(config, 2 * T).flops_per_token == expected + 2 * 9072


def test_value_heads_cost_what_key_heads_cost(model_config: MakeConfig) -> None:
    """Two value heads more, in two blocks: a matrix of 24 x 12 and 12 numbers of a token's cache each."""
    more, plain = model_config(**VARIANTS["value_heads"]), model_config()
    one, other = flops.total(more, 63), flops.total(plain, 63)
    assert one.params - other.params == one.active_params - other.active_params == 2 * 24 * 12
    assert one.flops_per_token - other.flops_per_token == 6 * 2 * 24 * 12
    assert flops.kv_cache_bytes(plain) == 2 * 2 * 2 * 2 * 6
    assert flops.kv_cache_bytes(more) == 2 * 2 * (2 + 4) * 6
    each, of_two = (
        model_config(**(VARIANTS["value_heads_of_each"] | {"attention": {**HEADS, "num_value_heads": number}}))
        for number in (4, 2)
    )
    assert flops.state_bytes(each) - flops.state_bytes(of_two) == 2 * 9 * 2 * 2 * 6 + 9 * 4 * 2
    # Sigma's 4 key heads and 16 value heads, against 16 of both: 37.5 % less (arXiv 2501.13629).
    sigma, grouped = (
        flops.kv_cache_bytes(
            model_config(attention={"num_heads": 32, "num_kv_heads": keys, "num_value_heads": 16, "head_dim": 64})
        )
        for keys in (4, 16)
    )
    assert sigma == 0.625 * grouped


def test_augmented_queries_cost_their_matrices_and_no_cache(model_config: MakeConfig) -> None:
    """Three matrices of 20 x 24 in two blocks, of 4 heads of 6."""
    more, plain = model_config(**VARIANTS["augmented_query"]), model_config(**VARIANTS["value_heads"])
    one, other = flops.total(more, 63), flops.total(plain, 63)
    assert one.params - other.params == one.active_params - other.active_params == 2 * 3 * 20 * 24
    assert one.flops_per_token - other.flops_per_token == 6 * 2 * 3 * 20 * 24
    assert one.params == sum(parameter.numel() for parameter in build(more).parameters())
    assert flops.kv_cache_bytes(more) == flops.kv_cache_bytes(plain)


def test_a_gate_costs_what_its_projection_costs(model_config: MakeConfig) -> None:
    """Elementwise at the SDPA output costs as much as the query projection; a constant multiplies with nothing."""
    plain = flops.total(model_config(attention={**HEADS, "gate": {"kind": "none"}}), 63).flops_per_token
    extra = {
        name: flops.total(model_config(**VARIANTS[name]), 63).flops_per_token - plain
        for name in ("moe", "headwise", "constant", "dense_output")
    }
    assert extra == {"moe": 6 * 2 * 24 * 24, "headwise": 6 * 2 * 24 * 4, "constant": 0, "dense_output": 6 * 2 * 24 * 24}


def test_activations_and_norms_cost_their_matrices(model_config: MakeConfig) -> None:
    """Ungated experts lack one of three matrices; a gated norm has two of rank r, at 2 L + 1 places."""
    plain = flops.total(model_config(), 63)
    cost = {
        name: flops.total(model_config(**changes), 63)
        for name, changes in {
            "relu2": {"ffn": {**MIXTURE, "activation": "relu2"}},
            "poly_norm": {"ffn": {**MIXTURE, "activation": "poly_norm"}},
            "gated": {"norm": {"kind": "gated", "rank": 5}},
            "pre_affine": {"norm": {"kind": "pre_affine"}},
            "sink": {"attention": {**HEADS, "softmax": "learnable_sink"}},
        }.items()
    }
    params = {name: row.params - plain.params for name, row in cost.items()}
    extra = {name: row.flops_per_token - plain.flops_per_token for name, row in cost.items()}
    assert params == {
        "relu2": -2 * 7 * 24 * 8,
        "poly_norm": -2 * 7 * (24 * 8 - 4),
        "gated": 5 * 2 * 24 * 5,
        "pre_affine": 5 * 24,
        "sink": 2 * 4,
    }
    assert extra == {
        "relu2": -6 * 2 * 3 * 24 * 8,
        "poly_norm": -6 * 2 * 3 * 24 * 8,
        "gated": 6 * 5 * 2 * 24 * 5,
        "pre_affine": 0,
        "sink": 0,
    }


def test_a_routers_own_penalty_is_not_paid_for_a_dropped_block(model_config: MakeConfig) -> None:
    units = {"over": ["blocks"], "keep": 0.5, "method": {"kind": "random"}}
    router = {"kind": "dselect_k"}
    model = build(model_config(ffn={**MIXTURE, "router": router}, units=units))
    tokens, labels, counted = batch()
    kept = model.units.hard_mask().bool()
    penalties_LB = model(tokens, labels, counted).stats.penalty_sums_B
    assert kept.sum() == 1
    assert (penalties_LB[kept] > 0).all()
    assert not penalties_LB[~kept].any()
