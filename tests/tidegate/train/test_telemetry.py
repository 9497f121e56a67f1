"""What a record says, against the formulas on plain numbers; and the table of names against the code.

Letters: X domains, L layers, E experts, B sequences, T tokens.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tidegate.metric_path import parse_metric
from tidegate.model.balance import load_balancing_loss
from tidegate.model.decoder import Decoder, DecoderOutput, ModelConfig, materialize
from tidegate.model.observations import AttentionObservations
from tidegate.model.routers import Observe
from tidegate.train.limits import Spent
from tidegate.train.telemetry import Observer, Record, summarise

ROOT = Path(__file__).resolve().parents[3]
X, L, E, K, B, T, V = 3, 2, 5, 2, 4, 17, 61
DOMAINS = ("prose", "code", "absent")


def model() -> Decoder:
    config = ModelConfig.model_validate(
        {
            "vocab_size": V,
            "width": 16,
            "num_layers": L,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
            "ffn": {"kind": "moe", "num_experts": E, "top_k": K, "expert_dim": 8},
            "init_std": 0.5,
        }
    )
    return materialize(lambda: Decoder(config), torch.device("cpu"), seed=1)


def micro_batches(number: int, observe: Observe = "routing") -> list[tuple[DecoderOutput, Any, Any, Any]]:
    """Outputs, counted tokens and domains of several micro-batches, and the routings behind them."""
    generator, found, decoder = torch.Generator().manual_seed(0), [], model()
    for index in range(number):
        tokens = torch.randint(0, V, (B, T + 1), generator=generator)
        counted = torch.rand(B, T, generator=generator) < 0.7
        routings: list[Any] = []

        def keep(module: Any, args: Any, routing: Any, into: list[Any] = routings) -> None:
            into.append(routing)

        hooks = [block.ffn.router.register_forward_hook(keep) for block in decoder.blocks]
        with torch.no_grad():
            output = decoder(tokens[:, :-1], tokens[:, 1:], counted, observe=observe)
        for hook in hooks:
            hook.remove()
        domains = torch.tensor([index % 2, 0, 1, 1])
        found.append((output, counted, domains, routings))
    return found


def observed(batches: list[Any], ranks: int = 1) -> dict[str, float]:
    """The metrics of these micro-batches, dealt to ranks."""
    observers = [Observer(DOMAINS, K, range(L), rank, ranks) for rank in range(ranks)]
    for index, (output, counted, domains, _) in enumerate(batches):
        observers[index % ranks].add(output, counted.float().sum(dim=1), domains)
    vector = torch.stack([observer.vector() for observer in observers]).sum(dim=0)
    every = [observer.metrics(vector) for observer in observers]
    assert all(metrics == every[0] for metrics in every)
    return every[0]


def test_routing_metrics_are_those_of_every_token_of_the_step() -> None:
    batches = micro_batches(4)
    metrics = observed(batches)
    for layer in range(L):
        counted = torch.cat([counted.flatten() for _, counted, _, _ in batches])
        domain = torch.cat([domains.repeat_interleave(T) for _, _, domains, _ in batches])
        probs = torch.cat([routings[layer].probs_NE for *_, routings in batches]).double()
        logits = torch.cat([routings[layer].logits_NE for *_, routings in batches]).double()
        experts = torch.cat([routings[layer].experts_NS for *_, routings in batches])
        for name, rows in (("", counted), ("prose/", counted & (domain == 0)), ("code/", counted & (domain == 1))):
            loads = torch.bincount(experts[rows].flatten(), minlength=E).double()
            share = loads / loads.sum()
            expected = {
                "maxvio": loads.max() / loads.mean() - 1,
                "load_cv": (loads - loads.mean()).square().mean().sqrt() / loads.mean(),
                "dead_experts": (loads == 0).double().mean(),
                "load_entropy": -(share[share > 0] * share[share > 0].log()).sum(),
                "router_entropy": -(probs[rows] * probs[rows].log()).sum(dim=1).mean(),
                "logit_norm": logits[rows].square().sum(dim=1).sqrt().mean(),
                "top_k_share": probs[rows].gather(1, experts[rows]).sum(dim=1).mean(),
            }
            for metric, value in expected.items():
                assert metrics[f"moe/{layer}/{name}{metric}"] == pytest.approx(float(value), rel=1e-4), (name, metric)
        for expert in range(E):
            share = float((experts[counted] == expert).double().sum() / experts[counted].numel())
            assert metrics[f"moe/{layer}/load/{expert}"] == pytest.approx(share, rel=1e-5)
        assert metrics[f"moe/{layer}/experts_per_token"] == pytest.approx(K)

        joint = torch.zeros(2, E, dtype=torch.float64)
        for index in range(2):
            rows = counted & (domain == index)
            joint[index] = torch.bincount(experts[rows].flatten(), minlength=E).double()
        joint = joint / joint.sum(dim=1, keepdim=True) / 2
        independent = joint.sum(dim=0, keepdim=True) * 0.5
        information = float(torch.special.xlogy(joint, joint / independent).sum())
        assert metrics[f"moe/{layer}/domain_information"] == pytest.approx(information, abs=1e-6)

        # The covariance over micro-batches, by its definition: weights are the tokens that count.
        weights, fs, ps = [], [], []
        for _, mask, _, routings in batches:
            rows = mask.flatten()
            loads = torch.bincount(routings[layer].experts_NS[rows].flatten(), minlength=E).double()
            weights.append(rows.double().sum())
            fs.append(loads / loads.sum())
            ps.append(routings[layer].probs_NE[rows].double().mean(dim=0))
        weight, f, p = torch.stack(weights), torch.stack(fs), torch.stack(ps)
        weight = (weight / weight.sum())[:, None]
        covariance = E * ((weight * f * p).sum(0) - (weight * f).sum(0) * (weight * p).sum(0)).sum()
        assert metrics[f"moe/{layer}/lbl_covariance"] == pytest.approx(float(covariance), abs=1e-5)
    for name in ("maxvio", "dead_experts"):
        mean = sum(metrics[f"moe/{layer}/{name}"] for layer in range(L)) / L
        assert metrics[f"moe/{name}_mean"] == pytest.approx(mean)
    assert metrics["moe/top_k_share_floor"] == K / E
    assert not any("absent" in name for name in metrics), "a domain without tokens has no numbers"


def test_one_micro_batch_has_no_covariance_and_equal_domains_no_information() -> None:
    (batch,) = micro_batches(1)
    metrics = observed([batch])
    output, counted, domains, _ = batch
    # Both domains hold the same sequences.
    same = observed(
        [(output, counted, torch.zeros_like(domains), None), (output, counted, torch.ones_like(domains), None)]
    )
    for layer in range(L):
        assert metrics[f"moe/{layer}/lbl_covariance"] == pytest.approx(0, abs=1e-6)
        assert same[f"moe/{layer}/domain_information"] == pytest.approx(0, abs=1e-9)


def test_domains_with_experts_of_their_own_have_all_the_information() -> None:
    (output, counted, _, _), *_ = micro_batches(1)
    assert output.stats is not None
    counts = torch.zeros(L, B, E)
    counts[:, :2, 0], counts[:, 2:, 3] = 10.0, 40.0
    apart = output._replace(stats=output.stats._replace(counts_BE=counts))
    metrics = observed([(apart, counted, torch.tensor([0, 0, 1, 1]), None)])
    assert metrics["moe/0/domain_information"] == pytest.approx(math.log(2))


def test_ranks_do_not_matter() -> None:
    batches = micro_batches(4)
    alone = observed(batches)
    for ranks in (2, 4):
        together = observed(batches, ranks)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_attention_and_hidden_metrics_are_those_of_the_micro_batch_that_shows_them() -> None:
    (first, *_), later = micro_batches(1, "all"), micro_batches(3)[1:]
    metrics = observed([first, *later])
    output, seen = first[0], first[0].attention
    for block in range(L):
        assert metrics[f"attention/{block}/gate_mean"] == pytest.approx(float(seen.gate_mean_AH[block].mean()))
        for bin in range(20):
            assert metrics[f"attention/{block}/gate/{bin}"] == pytest.approx(float(seen.gate_bins_AN[block, bin]))
        for head in range(4):
            for name, values in (("gate_mean", seen.gate_mean_AH), ("gate_closed", seen.gate_closed_AH)):
                assert metrics[f"attention/{block}/head/{head}/{name}"] == pytest.approx(float(values[block, head]))
        assert metrics[f"attention/{block}/first_token"] == pytest.approx(float(seen.first_token_AH[block].mean()))
        assert metrics[f"attention/{block}/first_token_uniform"] == pytest.approx(
            float(seen.first_token_uniform_A[block])
        )
        assert metrics[f"attention/{block}/entropy"] == pytest.approx(float(seen.entropy_AH[block].mean()))
        assert metrics[f"hidden/{block}/max"] == pytest.approx(float(output.max_hidden_A[block]))
    sinks = (seen.first_token_importance_AH > 0.3).double().mean()
    assert metrics["attention/sink_heads"] == pytest.approx(float(sinks))
    assert metrics["hidden/max_mean"] == pytest.approx(sum(metrics[f"hidden/{b}/max"] for b in range(L)) / L)


def test_attention_is_the_mean_of_ranks_and_hidden_the_largest() -> None:
    batches = micro_batches(2, "all")
    metrics = observed(batches, ranks=2)
    seen = [output.attention for output, *_ in batches]
    both = AttentionObservations._make(torch.stack(field).mean(dim=0) for field in zip(*seen, strict=True))
    for block in range(L):
        assert metrics[f"attention/{block}/entropy"] == pytest.approx(float(both.entropy_AH[block].mean()))
        assert metrics[f"attention/{block}/first_token"] == pytest.approx(float(both.first_token_AH[block].mean()))
        largest = max(float(output.max_hidden_A[block]) for output, *_ in batches)
        assert metrics[f"hidden/{block}/max"] == pytest.approx(largest)
    sinks = (both.first_token_importance_AH > 0.3).double().mean()
    assert metrics["attention/sink_heads"] == pytest.approx(float(sinks))


def test_what_no_head_of_a_block_has_is_not_recorded() -> None:
    (batch,) = micro_batches(1, "all")
    seen = batch[0].attention
    gate = seen.gate_mean_AH.clone()
    gate[1, 2:] = torch.nan
    lacking = seen._replace(gate_mean_AH=gate, num_sampled=torch.zeros(()), later_AH=torch.zeros_like(seen.later_AH))
    metrics = observed([(batch[0]._replace(attention=lacking), *batch[1:])])
    assert metrics["attention/1/gate_mean"] == pytest.approx(float(gate[1, :2].mean()))
    assert "attention/1/head/1/gate_mean" in metrics
    assert "attention/1/head/2/gate_mean" not in metrics
    assert not any("first_token" in name or "sink" in name for name in metrics)
    none = seen._replace(gate_mean_AH=None, gate_closed_AH=None, gate_bins_AN=None)
    metrics = observed([(batch[0]._replace(attention=none), *batch[1:])])
    assert not any("gate" in name for name in metrics)
    assert "attention/1/entropy" in metrics


def test_even_loads_are_even() -> None:
    even = {name: float(value) for name, value in summarise(np.full(7, 12.0)).items()}
    assert even == pytest.approx({"maxvio": 0, "load_cv": 0, "dead_experts": 0, "load_entropy": math.log(7)}, abs=1e-6)
    nothing = summarise(np.zeros((3, 7)))
    assert all(value.shape == (3,) and np.isfinite(value).all() for value in nothing.values())


def test_the_largest_logit_is_that_of_the_step_and_not_a_mean() -> None:
    batches = micro_batches(3)
    for index, (output, counted, domains, routings) in enumerate(batches):
        logits = torch.full((L, 4), float(-index))
        batches[index] = (output._replace(max_logit_AH=logits), counted, domains, routings)
    for ranks in (1, 3):
        metrics = observed(batches, ranks)
        assert metrics["attention/0/max_logit"] == metrics["attention/1/max_logit"] == 0.0
    assert observed(batches[1:], 2)["attention/1/max_logit"] == -1.0
    assert "attention/0/max_logit" not in observed(micro_batches(1, "all")), "there is none without qk_clip"


def shown_by_a_step(path: str) -> tuple[list[tuple[bool, bool, bool]], dict[str, float], list[float]]:
    """What each micro-batch of an observed step shows, the step's metrics, and losses with and without observer."""
    from tidegate.config import load
    from tidegate.data.loader import StepBatch
    from tidegate.model.clock import Clock
    from tidegate.train.job import Job
    from tidegate.train.loop import build_balancer, build_engine
    from tidegate.train.step import train_step

    shown = []

    class Noting(Observer):
        def add(self, output: DecoderOutput, counted_B: torch.Tensor, domains_B: torch.Tensor) -> None:
            assert output.stats is not None
            parts = (output.stats.signals_B3, output.attention, output.max_hidden_A)
            shown.append(tuple(part is not None for part in parts))
            super().add(output, counted_B, domains_B)

    job = load(path, Job).config
    shape = (job.accumulation, job.train.micro_batch, job.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(shape[0] * shape[1]).view(shape[:2])
    batch = StepBatch(
        torch.randint(0, job.model.vocab_size, (*shape[:2], shape[2] + 1), generator=generator),
        torch.zeros(shape, dtype=torch.int32),
        torch.rand(shape, generator=generator) < 0.7,
        places % 2,
        places,
    )
    observer = Noting(("a", "b"), 2, range(2), 0, 1)
    losses = []
    for watching in (observer, None):
        result = train_step(
            build_engine(job), build_balancer(job), batch, Clock(1, 512, 0), isolate=True, observer=watching
        )
        losses.append(float(result.losses.nll))
    metrics = observer.metrics(observer.vector())
    assert metrics["moe/0/experts_per_token"] == pytest.approx(2)
    return shown, metrics, losses


def test_a_step_shows_all_of_its_first_micro_batch_and_the_routing_of_the_others(tiny_job: Any, on_ranks: Any) -> None:
    ((shown, metrics, losses),) = on_ranks(1, shown_by_a_step, str(tiny_job()))
    assert shown == [(True, True, True)] + 3 * [(True, False, False)]
    assert losses[0] == losses[1], "observing changes nothing"
    assert {"attention/1/entropy", "hidden/1/max", "moe/1/b/router_entropy"} <= metrics.keys()


def records_of_a_run(path: str, scratch: str) -> list[Record]:
    """All that a real run of a job records; in a process of its own, which DeepSpeed wants."""
    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train

    job = load(path, Job).config
    folder = prepare(job.data, cache_dir=Path(scratch) / "data", job_dir=Path(path).parent)
    records: list[Record] = []
    checkpoints = f"{scratch}/checkpoints-{len(os.listdir(scratch))}"  # a run of its own, not resumed
    train(job, World(folder, checkpoints, records.append, print, lambda: False))
    return records


@pytest.fixture
def recorded(tiny_job: Any, on_ranks: Any, tmp_path: Path) -> Any:
    """`recorded(**sections)`: names of the metrics of the tiny job with these sections laid over it."""

    def run(**sections: dict[str, Any]) -> set[str]:
        (records,) = on_ranks(1, records_of_a_run, str(tiny_job(**sections)), str(tmp_path))
        return {name for record in records for name in record.metrics}

    return run


def test_single_experts_heads_and_domains_come_with_evaluations(tiny_job: Any, on_ranks: Any, tmp_path: Path) -> None:
    path = tiny_job(train={"tokens": 10 * 512, "log_every": 2, "eval_every": 5})
    (records,) = on_ranks(1, records_of_a_run, str(path), str(tmp_path))
    trained = {record.step: set(record.metrics) for record in records if "train/loss" in record.metrics}
    assert list(trained) == [2, 4, 6, 8, 10]
    for record in records:
        if record.step in (2, 4, 8, 10) and "train/loss" in record.metrics:  # an evaluation came between 4 and 6
            spent_ms = {name: value for name, value in record.metrics.items() if name.startswith("time/")}
            assert min(spent_ms[f"time/{phase}_ms"] for phase in ("forward", "backward", "optimizer")) > 0
            interval_ms = 512 / record.metrics["speed/tokens_per_s"] * 1e3  # of a step, with saves and records
            assert 0.1 * interval_ms < sum(spent_ms.values()) < 1.01 * interval_ms
    detailed = [step for step, names in trained.items() if any(parse_metric(name).is_detail for name in names)]
    assert detailed == [6, 10], "of the evaluations after steps 5 and 10"
    for name in ("moe/1/load/3", "moe/1/digits/maxvio", "attention/0/head/3/gate_mean", "attention/1/gate/19"):
        assert parse_metric(name).is_detail
        assert name in trained[10]
    assert {"moe/1/maxvio", "attention/0/gate_mean", "hidden/1/max", "hidden/max_mean"} <= trained[2]


def test_the_table_holds_every_metric_and_no_other(recorded: Any) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert len(table) > 40
    gate = {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": False, "qk_clip": 100.0}}
    units = {"over": ["heads"], "keep": 0.5, "freeze_tokens": 512, "method": {"kind": "hard_concrete"}}
    base = {"vocab_size": 300, "width": 32, "num_layers": 2, "units": units, **gate}
    experts = {"kind": "moe", "num_experts": 4, "top_k": 1, "expert_dim": 16}
    sizes = [{"num": 2, "times": 1}, {"num": 2, "times": 0}]
    short = {"tokens": 1024, "eval_every": 100, "oracle_sequences": 2}
    schedule = {"schedule": {"kind": "cosine", "peak": 1e-3, "warmup_tokens": 0}}
    top_k = {"kind": "softmax_top_k", "renormalize": False}
    names = recorded(
        model={**base, "ffn": {**experts, "sizes": sizes, "router": top_k}},
        balance={"loss_weight": 0.01, "bias_rate": 0.0, "budget": {"target": 0.5}},
        optimizer=schedule,
        train=short,
    )
    names |= recorded(
        model={
            "ffn": {**experts, "router": {"kind": "top_p", "entropy_weight": 0.1}},
        },
        balance={"bias_rate": 0.0},
        train={"oracle_sequences": 0},
    )
    tuned = {"balance_scale": 1.0, "temperature": 1.0, "noise": 0.1, "dropout": 0.1}
    names |= recorded(model={"ffn": {**experts, "router": top_k}, "units": None, "self_tune": {"tuned": tuned}})
    found = {parse_metric(name).pattern for name in names}
    # On a CPU there is no peak to compare with, no driver to ask, and nothing that waits for the host.
    of_gpus = {"time/experts_ms"} | {
        f"system/<node>/gpu_{name}" for name in ("busy", "memory_gib", "power_w", "temperature_c")
    }
    of_launchers = set(Spent(money=0.0).metrics())
    assert found | {"speed/mfu", "speed/peak_tflops_per_device"} | of_gpus | of_launchers == table


def test_a_dense_job_records_no_experts(recorded: Any) -> None:
    names = recorded(
        model={
            "vocab_size": 300,
            "width": 32,
            "num_layers": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "ffn": {"kind": "dense", "hidden_dim": 32},
        },
        balance={"loss_weight": 0.01, "bias_rate": 0.0},
        train={"tokens": 1024, "eval_every": 100},
        optimizer={"schedule": {"kind": "cosine", "peak": 1e-3, "warmup_tokens": 0}},
    )
    assert not any(name.startswith(("moe/", "balance/")) for name in names)
    assert {"hidden/0/max", "attention/1/gate_mean", "train/loss_spikes"} <= names


def test_the_lbl_of_a_step_is_the_mean_of_its_layers() -> None:
    """`lbl_covariance` is what a micro-batch's loss adds to the global one."""
    batches = micro_batches(3)
    metrics = observed(batches)
    for layer in range(L):
        micro, tokens, counts, sums = 0.0, 0.0, torch.zeros(E), torch.zeros(E)
        for output, counted, *_ in batches:
            stats = output.stats
            own_counts, own_sums = stats.counts_BE[layer].sum(0), stats.prob_sums_BE[layer].sum(0)
            micro += float(load_balancing_loss(own_counts, own_sums, 1.0))
            tokens, counts, sums = tokens + float(counted.sum()), counts + own_counts, sums + own_sums
        difference = micro / tokens - float(load_balancing_loss(counts, sums, tokens))
        assert metrics[f"moe/{layer}/lbl_covariance"] == pytest.approx(difference, abs=1e-5)
