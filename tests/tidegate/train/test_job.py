"""A job as a whole: what follows from it, and values that do not go together (both are named, with the way out)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.config import ConfigError, load
from tidegate.train.job import Job

DEMO = Path(__file__).resolve().parents[3] / "jobs" / "demo.yaml"  # 8 experts, 2 workers, 16 sequences of 256


def demo(*overrides: str) -> Job:
    return load(DEMO, Job, overrides).config


DENSE = "model.ffn={kind: dense, hidden_dim: 64}"
CONFLICTS = {
    "EP and workers": (
        ["parallel.expert=3"],
        "parallel.expert=3 does not divide resources.workers=2; use one of [1, 2]",
    ),
    "EP over workers": (
        ["parallel.expert=4"],
        "parallel.expert=4 does not divide resources.workers=2; use one of [1, 2]",
    ),
    "SP and workers": (
        ["parallel.sequence=4", "model.attention.num_kv_heads=4"],
        "parallel.sequence=4 does not divide resources.workers=2; use one of [1, 2]",
    ),
    "SP and tokens": (
        ["parallel.sequence=2", "train.batch_tokens=4080", "data.sequence_length=255"],
        "parallel.sequence=2 does not divide data.sequence_length=255; change one of them",
    ),
    "SP and heads": (
        ["parallel.sequence=2", "model.attention.num_kv_heads=1"],
        "parallel.sequence=2 does not divide model.attention.num_kv_heads=1; change one of them",
    ),
    "SP and value heads": (
        ["parallel.sequence=2", "model.attention.num_value_heads=1"],
        "parallel.sequence=2 does not divide model.attention.num_value_heads=1; change one of them",
    ),
    "SP and the largest logits": (
        ["parallel.sequence=2", "model.attention.qk_norm=false", "model.attention.qk_clip=30"],
        "parallel.sequence=2 does not go with model.attention.qk_clip=30; change one of them",
    ),
    "SP and a mask of its own": (
        ["parallel.sequence=2", "model.layers=best", "model.mixers={best: {kind: dynamic_mask, keep: 8}}"],
        "parallel.sequence=2 does not go with model.mixers.best.kind=dynamic_mask; change one of them",
    ),
    "SP and a router that looks around": (
        ["parallel.sequence=2", "model.ffn.router={kind: decoupled}"],
        "parallel.sequence=2 does not go with model.ffn.router.kind=decoupled; change one of them",
    ),
    "SP and a balance of parts": (
        ["parallel.sequence=2", "balance.scope=sequence"],
        "parallel.sequence=2 does not go with balance.scope=sequence; change one of them",
    ),
    "SP and unit gates": (
        ["parallel.sequence=2", "model.units={over: [channels], keep: 0.5, method: {kind: random}}"],
        "parallel.sequence=2 does not go with model.units.over=['channels']; change one of them",
    ),
    "SP and fewer workers": (
        ["parallel.sequence=2", "resources.min_workers=1"],
        "parallel.sequence=2 does not go with resources.min_workers=1; change one of them",
    ),
    "EP and experts": (
        ["model.ffn.num_experts=7"],
        "parallel.expert=2 does not divide model.ffn.num_experts=7; use one of [1, 7]",
    ),
    "EP without experts": (
        [DENSE],
        "parallel.expert=2 needs experts, but model.ffn.kind=dense; set parallel.expert=1",
    ),
    "nothing to exchange": (
        ["parallel.expert=1", "parallel.all_to_all=hierarchical"],
        "parallel.all_to_all=hierarchical has no rows to exchange at parallel.expert=1; use parallel.all_to_all=plain",
    ),
    "offload without ZeRO": (
        ["parallel.offload=optimizer", "parallel.zero_stage=0"],
        "parallel.offload=optimizer needs ZeRO, but parallel.zero_stage=0; use parallel.zero_stage=2",
    ),
    "experts on the host at another stage": (
        ["parallel.offload=experts", "parallel.zero_stage=2"],
        "parallel.offload=experts works at parallel.zero_stage=1 only, not at 2; use parallel.zero_stage=1",
    ),
    "experts on the host in fp32": (
        ["parallel.offload=experts", "train.precision=fp32"],
        "parallel.offload=experts works with train.precision=bf16 only, not with fp32; use train.precision=bf16",
    ),
    "no experts for the host": (
        [DENSE, "parallel.expert=1", "parallel.offload=experts"],
        "parallel.offload=experts needs experts, but model.ffn.kind=dense; use parallel.offload=optimizer",
    ),
    "gates over experts on the host": (
        [
            "parallel.offload=experts",
            "train.precision=bf16",
            "model.units={over: [experts], method: {kind: random}}",
        ],
        "parallel.offload=experts has no weights at hand that model.units.over=['experts'] could be gates of; remove "
        "model.units or use parallel.offload=optimizer",
    ),
    "two passes over experts on the host": (
        ["parallel.offload=experts", "train.precision=bf16", "model.ffn.router={kind: thor}"],
        "parallel.offload=experts takes one gradient of a layer a micro-batch, but model.ffn.router.kind=thor runs two "
        "forward passes; use another router or parallel.offload=optimizer",
    ),
    "a folder for nothing": (
        ["parallel.offload_folder=/disk"],
        "parallel.offload_folder=/disk holds experts, but parallel.offload=none; use parallel.offload=experts or "
        "remove the folder",
    ),
    "gradients at once with offload": (
        ["train.precision=bf16", "parallel.gradients_at_once=2", "parallel.offload=optimizer"],
        "parallel.gradients_at_once=2 has no effect with parallel.offload=optimizer, whose gradients take another "
        "path; set it to 1",
    ),
    "moments in bf16 at another stage": (
        ["train.precision=bf16", "parallel.zero_stage=2", "optimizer.state=bf16"],
        "optimizer.state=bf16 needs train.precision=bf16, parallel.zero_stage=1 and parallel.offload=none or experts, "
        "not bf16, 2 and none; set it to fp32",
    ),
    "gradients at once at another stage": (
        ["train.precision=bf16", "parallel.zero_stage=2", "parallel.gradients_at_once=2"],
        "parallel.gradients_at_once=2 acts with train.precision=bf16 at parallel.zero_stage=1 only, not with bf16 at "
        "2; set it to 1",
    ),
    "gradients of more micro-batches than there are": (
        ["train.precision=bf16", "parallel.gradients_at_once=4", "train.micro_batch=4"],
        "parallel.gradients_at_once=4 is more than the 2 micro-batches of a step (train.batch_tokens=4096, "
        "train.micro_batch=4, resources.workers=2); set it to 2 at most",
    ),
    "batch and sequence": (
        ["train.batch_tokens=4000"],
        "train.batch_tokens=4000 is not a multiple of data.sequence_length=256; use 4096",
    ),
    "batch under a sequence": (
        ["train.batch_tokens=63"],
        "train.batch_tokens=63 is not a multiple of data.sequence_length=256; use 256",
    ),
    "batch and micro-batches": (
        ["train.micro_batch=3"],
        "train.batch_tokens=4096 is 16 sequences, which train.micro_batch=3 x resources.workers=2 does not divide; "
        "change one of the three",
    ),
    "batch under the micro-batches": (
        ["train.micro_batch=16"],
        "train.batch_tokens=4096 is 16 sequences, which train.micro_batch=16 x resources.workers=2 does not divide; "
        "change one of the three",
    ),
    "kv heads": (
        ["model.attention.num_kv_heads=3"],
        "model.attention: num_kv_heads=3 does not divide num_heads=4; use a divisor of 4",
    ),
    "more kv heads than heads": (
        ["model.attention.num_kv_heads=8"],
        "model.attention: num_kv_heads=8 does not divide num_heads=4; use a divisor of 4",
    ),
    "odd head": (["model.attention.head_dim=33"], "model.attention: head_dim=33 is odd; rotary positions need pairs"),
    "gate": (
        ["model.attention.gate={kind: dense_output, granularity: headwise}"],
        "model.attention.gate: granularity=headwise heads=specific does not fit kind=dense_output: heads are mixed "
        "after the output projection; use granularity=elementwise heads=specific",
    ),
    "top_k": (
        ["model.ffn.top_k=9"],
        "model.ffn: top_k=9 is more than num_experts=8; choose top_k <= num_experts",
    ),
    "vocabulary": (
        ["data.tokenizer.vocab_size=5000"],
        "data.tokenizer.vocab_size=5000 is more than model.vocab_size=4096; make them equal",
    ),
    "warm-up": (
        ["optimizer.schedule.warmup_tokens=1200000"],
        "optimizer.schedule.warmup_tokens=1200000 leaves nothing of train.tokens=1200000",
    ),
    "decay": (
        ["optimizer.schedule={kind: wsd, peak: 1e-3, warmup_tokens: 400000, decay_tokens: 800001}"],
        "optimizer.schedule.warmup_tokens=400000 and decay_tokens=800001 are more than train.tokens=1200000",
    ),
    "bias of a dense model": (
        [DENSE, "parallel.expert=1", "balance.bias_rate=1e-3"],
        "balance.bias_rate=0.001 needs experts, but model.ffn.kind=dense",
    ),
    "unit gates that never freeze": (
        ["model.units={over: [heads], method: {kind: knapsack}, freeze_tokens: 1200000}"],
        "model.units.freeze_tokens=1200000 is not below train.tokens=1200000",
    ),
    "dropped experts and bias balancing": (
        ["balance.bias_rate=1e-3", "model.units={over: [experts], method: {kind: random}}"],
        "balance.bias_rate=0.001 would count the experts that model.units.over=['experts'] drops as idle; set it to 0",
    ),
    "budget of few blocks": (
        ["model.units={over: [blocks], keep: 0.4, method: {kind: random}}"],
        "model: units.keep=0.4 is not within 1% of any choice among 4 of 509,248 parameters; nearest: 0.2500 and "
        "0.5000",
    ),
    "groups do not divide": (
        ["model.ffn.router={groups: {num: 3, keep: 1}}"],
        "model.ffn: router.groups.num=3 does not divide num_experts=8",
    ),
    "groups too few": (
        ["model.ffn.router={groups: {num: 8, keep: 1}}"],
        "model.ffn: router.groups.keep=1 groups hold 1 experts, fewer than top_k=2",
    ),
    "groups kept": (
        ["model.ffn.router={groups: {num: 4, keep: 5}}"],
        "model.ffn: router.groups.keep=5 is more than router.groups.num=4",
    ),
    "quantile and groups": (
        ["model.ffn.router={quantile: {}, groups: {num: 4, keep: 2}}"],
        "model.ffn: router.quantile balances a free choice of experts, which router.groups limits: loads would "
        "stay uneven; remove one, or balance groups by balance.bias_rate",
    ),
    "quantile of all": (
        ["model.ffn.router={quantile: {}}", "model.ffn.top_k=8"],
        "model.ffn: router.quantile balances a choice, but top_k=8 of num_experts=8 is none; remove one",
    ),
    "quantile and bias": (
        ["model.ffn.router={quantile: {}}", "balance.bias_rate=0.001"],
        "balance.bias_rate=0.001 and model.ffn.router.quantile would both set the selection bias; use one",
    ),
    "bias without selection": (
        ["model.ffn.router={kind: hash}", "balance.bias_rate=0.001"],
        "balance.bias_rate=0.001 moves a selection bias, which model.ffn.router.kind=hash does not have; use a "
        "top-k router, or balance.bias_rate=0",
    ),
    "future": (
        ["model.ffn.router={kind: expert_choice}"],
        "model.ffn.router: kind=expert_choice lets a token's experts depend on later tokens, which leaks the "
        "labels into a causal model; use kind=expert_threshold, or set allow_future_leak=true if that is what you"
        " study",
    ),
    "block before": (
        ["model.ffn.router={reads: previous_block}", "model.num_layers=1"],
        "model: ffn.router.reads=previous_block, but num_layers=1 has no block before another",
    ),
    "anneal": (
        ["model.ffn.router={kind: dense_to_sparse, anneal_tokens: 1200001}"],
        "model.ffn.router.anneal_tokens=1200001 is more than train.tokens=1200000: the router would never be "
        "sparse in training and always in evaluation",
    ),
    "cools": (
        ["model.ffn.router={kind: dense_to_sparse, anneal_tokens: 100, tau_end: 3}"],
        "model.ffn.router: tau_end=3.0 is not below tau_start=2.0",
    ),
    "search": (
        ["model.ffn.router={kind: comet, search: {tokens: 1200001}}"],
        "model.ffn.router.search.tokens=1200001 is more than train.tokens=1200000: the order of experts would "
        "never be fixed",
    ),
    "sizes": (
        ["model.ffn.sizes=[{num: 4, times: 2}]"],
        "model.ffn: sizes name 4 experts, but num_experts=8",
    ),
    "identities": (
        ["model.ffn.sizes=[{num: 8, times: 0}]"],
        "model.ffn: sizes name only identities (times=0); at least one expert needs times >= 1",
    ),
    "EP and slices": (
        ["model.ffn.sizes=[{num: 7, times: 1}, {num: 1, times: 0}]"],
        "parallel.expert=2 does not divide the sum of num * times in model.ffn.sizes=7; use one of [1, 7]",
    ),
    "poly_norm": (
        ["model.ffn.sizes=[{num: 8, times: 2}]", "model.ffn.activation=poly_norm"],
        "model.ffn: activation=poly_norm normalises over all hidden units of an expert, which sizes with times > "
        "1 store in slices; use times <= 1 or another activation",
    ),
    "budget even": (
        ["balance.budget={target: 0.5}"],
        "balance.budget.target=0.5 needs experts of several widths, but model.ffn.sizes makes all equal; set "
        "model.ffn.sizes",
    ),
    "budget far": (
        ["model.ffn.sizes=[{num: 6, times: 2}, {num: 2, times: 1}]", "balance.budget={target: 0.3}"],
        "balance.budget.target=0.3 is out of reach: with model.ffn.top_k=2 of these model.ffn.sizes an assignment"
        " costs between 0.5 and 1 of the widest expert",
    ),
    "budget unlearned": (
        [
            "model.ffn.sizes=[{num: 6, times: 2}, {num: 2, times: 1}]",
            "balance.budget={target: 0.7}",
            "model.ffn.router={kind: random}",
        ],
        "balance.budget.target=0.7 cannot act: model.ffn.router.kind=random learns nothing",
    ),
    "oracle k": (
        ["train.oracle_sequences=2"],
        "train.oracle_sequences=2 tries one expert a layer, but model.ffn.top_k=2; use 1",
    ),
    "oracle paths": (
        ["model.ffn.router.renormalize=false", "train.oracle_sequences=2", "model.ffn.top_k=1", "model.num_layers=5"],
        "train.oracle_sequences=2 would try model.ffn.num_experts=8 to the power of model.num_layers=5 = 32768 "
        "paths, more than 6561",
    ),
    "qk": (
        ["model.attention.qk_clip=100"],
        "model.attention: qk_clip=100 with qk_norm=true: the norm bounds logits by sqrt(head_dim) = 5.7 times its"
        " weights and takes any scaling out; set qk_norm=false or no qk_clip",
    ),
    "units router": (
        [
            "model.units={over: [experts], keep: 0.5, freeze_tokens: 400000, method: {kind: hard_concrete}}",
            "model.ffn.router={kind: hash}",
        ],
        "model: units.over=['experts'] closes experts in a router's logits, which ffn.router.kind=hash does not "
        "know; use a top-k router",
    ),
    "a weight of one": (
        ["model.ffn.top_k=1"],
        "model.ffn.top_k=1 with model.ffn.router.kind=softmax_top_k divides a token's one weight by itself, so that "
        "the router learns nothing from the loss; use a top-k router with renormalize: false",
    ),
    "oracle of a ragged router": (
        ["model.ffn.top_k=1", "model.num_layers=2", "model.ffn.router.kind=top_p", "train.oracle_sequences=2"],
        "train.oracle_sequences=2 steers a top-k router over all experts; it does not fit "
        "model.ffn.router.kind=top_p or gates over experts",
    ),
    "ReLU at another scope": (
        ["model.ffn.router.kind=relu", "balance.scope=sequence"],
        "balance.scope=sequence does not fit model.ffn.router.kind=relu, which steers by the global batch; use "
        "balance.scope=global_batch",
    ),
    "two masks a step": (
        ["model.ffn.router.kind=thor", "model.units={over: [heads], method: {kind: random}}"],
        "model: units.over=['heads'] does not fit ffn.router.kind=thor, whose two passes a step would draw two masks",
    ),
    "best without evaluation": (
        ["train.eval_every=150", "checkpoint={every: 100, keep_best: {n: 2}}"],
        "checkpoint.keep_best.metric=val/loss is measured every train.eval_every=150 steps, which checkpoint.every=100 "
        "misses; make one a multiple of the other",
    ),
    "best without a record": (
        ["train.log_every=7", "checkpoint={every: 10, keep_best: {metric: train/loss}}"],
        "checkpoint.keep_best.metric=train/loss is measured every train.log_every=7 steps, which checkpoint.every=10 "
        "misses; make one a multiple of the other",
    ),
    "a beginning between two steps": (
        ["train.from_tokens=5000"],
        "train.from_tokens=5000 is not a multiple of train.batch_tokens=4096 below train.tokens=1200000; use 4096",
    ),
    "a rewind point at the end": (
        ["prune.rewind_tokens=1228800"],
        "prune.rewind_tokens=1228800 is not a multiple of train.batch_tokens=4096 below train.tokens=1200000; use "
        "1196032",
    ),
    "masks over experts on the host": (
        ["parallel.offload=experts", "train.precision=bf16", "train.mask=m.safetensors"],
        "train.mask=m.safetensors holds weights at zero by their gradients, which go another way with "
        "parallel.offload=experts; use parallel.offload=none or optimizer",
    ),
    "two masks": (
        ["prune.rewind_tokens=0", "train.mask=m.safetensors"],
        "prune sets train.mask=m.safetensors and train.from_tokens=0 itself; leave them out",
    ),
    "pruning what is not there": (
        ["parallel.expert=1", "prune.rewind_tokens=0", DENSE],
        "prune.over=['attention', 'ffn', 'experts']: the model has no experts with model.ffn.kind=dense; remove it",
    ),
    "domains": (
        ["data.domains.1.name=prose"],
        "data: two domains share the name 'prose'",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_values_that_do_not_go_together(case):
    overrides, expected = CONFLICTS[case]
    with pytest.raises(ConfigError) as caught:
        demo(*overrides)
    assert str(caught.value).endswith(f": {expected}")
    assert str(caught.value).count("\n") == 0
    if case != "domains":  # its message has no field=value
        assert f"--set {overrides[-1]}" in str(caught.value) or str(DEMO) in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.ffn.top_k=8"],
        ["model.ffn.num_experts=1", "model.ffn.top_k=1", "parallel.expert=1"],
        ["model.attention.num_kv_heads=1"],
        ["optimizer.schedule={kind: wsd, peak: 1e-3, warmup_tokens: 400000, decay_tokens: 800000}"],
        ["resources.workers=6", "parallel.expert=2", "train.batch_tokens=12288"],
        [DENSE, "parallel.expert=1"],
        ["model.units={over: [blocks], keep: 0.75, method: {kind: polarization}, freeze_tokens: 1199999}"],
        ["model.units={over: [heads, experts], method: {kind: nested, keeps: [0.25, 0.5]}}"],
    ],
)
def test_values_at_the_edge_go_together(overrides):
    assert isinstance(demo(*overrides), Job)


def test_consequences():
    job = demo()
    assert (job.global_batch, job.accumulation, job.total_steps, job.num_experts) == (16, 1, 293, 8)
    job = demo("train.micro_batch=2", "resources.workers=4", "train.tokens=1200129")
    assert (job.accumulation, job.total_steps) == (2, 294), "the last step may overshoot, never fall short"
    assert demo("train.tokens=1", "optimizer.schedule.warmup_tokens=0").total_steps == 1
    assert demo("train.tokens=4096", "optimizer.schedule.warmup_tokens=0").total_steps == 1
    assert demo(DENSE, "parallel.expert=1").num_experts is None


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_batch_is_the_same_at_any_world_size(workers):
    job = demo(f"resources.workers={workers}", "parallel.expert=1", "train.micro_batch=2")
    assert job.accumulation * job.train.micro_batch * workers == job.global_batch == 16


@pytest.mark.parametrize("name", ["Demo", "my job", "-x", "a/b", "", "ümlaut"])
def test_names_that_no_folder_should_have(name):
    with pytest.raises(ConfigError, match=r"name: String should match pattern .* \(got "):
        demo(f"name={name!r}")
