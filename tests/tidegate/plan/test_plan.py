"""Whole plans of real jobs: what is chosen, what it says, and what cannot be."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate.cli import app
from tidegate.config import ConfigError, JobFile, load
from tidegate.model.flops import total
from tidegate.plan import Hardware, Plan, make_plan, parse_gpus
from tidegate.plan.efficiency import measured_efficiency
from tidegate.plan.report import bottleneck, chosen_flags, extrapolations
from tidegate.plan.step import StepTime, model_costs, step_time
from tidegate.train.job import Job
from tidegate.train.memory import predict

BENCH = Path(__file__).resolve().parents[3] / "jobs" / "bench"
SMALL = ["model.num_layers=2", "train.batch_tokens=1048576"]


def planned(gpus: str, *overrides: str, held: tuple[str, ...] = (), num: int = 3) -> Plan:
    file = JobFile(BENCH / "h100.yaml", [*SMALL, *overrides])
    return make_plan(file, parse_gpus(gpus), held=held, num=num)


def job_of(*overrides: str) -> Job:
    job: Job = load(BENCH / "h100.yaml", Job, [*SMALL, *overrides]).config
    return job


def timed(*overrides: str, **gpu: float) -> StepTime:
    kind = parse_gpus("1xH100").gpu.model_copy(update=gpu)
    return step_time(job_of(*overrides), kind, measured_efficiency())


def test_the_plan_is_a_job_that_fits_and_the_fastest_of_those_shown() -> None:
    plan = planned("8xH100")
    flags = " ".join(chosen_flags(plan.best)).replace("--set ", "").split()
    job = job_of(*flags)
    assert job.resources.workers == 8
    assert (job.parallel, job.train) == (plan.best.job.parallel, plan.best.job.train)
    assert predict(job).total == plan.best.memory.total <= plan.hardware.gpu.usable
    speeds = [each.tokens_per_s for each in (plan.best, *plan.others)]
    assert len(speeds) == 3
    assert speeds == sorted(speeds, reverse=True)
    flops = total(job.model, 4096).flops_per_token
    assert plan.mfu == pytest.approx(flops * plan.best.tokens_per_s / (8 * 989.4e12))


def test_no_layout_that_fits_is_faster() -> None:
    """Against all of them, one by one."""
    plan = planned("2xH100", "train.batch_tokens=65536", num=1)
    times = []
    for expert in (1, 2):
        for stage, at_once in ((1, 1), (1, 2), (1, 4)):
            for micro_batch in (1, 2, 4, 8):
                for recompute in ("true", "false"):
                    sets = [
                        "train.batch_tokens=65536", "resources.workers=2", f"parallel.expert={expert}",
                        f"parallel.zero_stage={stage}", f"parallel.gradients_at_once={at_once}",
                        f"train.micro_batch={micro_batch}", f"train.recompute={recompute}",
                    ]  # fmt: skip
                    try:
                        job = job_of(*sets)
                    except ConfigError:
                        continue
                    if predict(job).total <= plan.hardware.gpu.usable:
                        times.append(step_time(job, plan.hardware.gpu, measured_efficiency()).total)
    assert len(times) > 12
    assert plan.best.time.total == pytest.approx(min(times))


def test_less_memory_takes_another_layout() -> None:
    roomy = planned("1xH100")
    gpu = roomy.hardware.gpu
    tight = roomy.best.memory.total / 2**30 - 0.01 + gpu.reserved_gib
    hardware = Hardware(1, "H100", gpu.model_copy(update={"memory_gib": tight}))
    plan = make_plan(JobFile(BENCH / "h100.yaml", SMALL), hardware, num=1)
    assert plan.best.memory.total <= hardware.gpu.usable < roomy.best.memory.total
    assert plan.best.time.total >= roomy.best.time.total


def test_a_held_field_stays() -> None:
    plan = planned("8xH100", "parallel.expert=8", "train.recompute=true", held=("parallel.expert", "train.recompute"))
    for each in (plan.best, *plan.others):
        assert (each.job.parallel.expert, each.job.train.recompute) == (8, True)


def test_what_changes_training_is_not_chosen() -> None:
    """ZeRO 0 sums gradients in bf16: only who asks for it gets it."""
    sets = ("optimizer.state=fp32", "parallel.zero_stage=0")
    free, held = planned("8xH100", *sets, num=8), planned("8xH100", *sets, held=("parallel.zero_stage",))
    assert {each.job.parallel.zero_stage for each in (free.best, *free.others)} <= {1, 2}
    assert {each.job.parallel.zero_stage for each in (held.best, *held.others)} == {0}
    assert any("bf16: other training" in line for line in extrapolations(held))


def test_a_field_that_asks_for_a_micro_batch_gets_it() -> None:
    """And where none is large enough, the job says so."""
    zoo = BENCH.parent / "zoo" / "uneven.yaml"
    plan = make_plan(JobFile(zoo, ["train.precision=bf16"]), parse_gpus("1xH100"), num=6)
    assert {each.job.train.oracle_sequences for each in (plan.best, *plan.others)} == {8}
    assert min(each.job.train.micro_batch for each in (plan.best, *plan.others)) >= 8
    file = JobFile(zoo, ["train.precision=bf16", "train.micro_batch=2"])
    with pytest.raises(ConfigError, match=r"train\.oracle_sequences=8 is more than train\.micro_batch=2"):
        make_plan(file, parse_gpus("1xH100"), held=("train.micro_batch",))


def test_what_is_not_measured_is_not_planned() -> None:
    mixer = "model.mixers={mine: {kind: gla, num_heads: 4, key_dim: 64, value_dim: 64}}"
    with pytest.raises(ConfigError, match=r"model\.layers='mine, attention': how fast its mixers are has not been"):
        planned("1xH100", mixer, "model.layers='mine, attention'")


def test_hierarchical_is_for_whole_nodes() -> None:
    """A group of 12 would end in the middle of a node of 8."""
    sets = ("train.batch_tokens=3145728", "model.ffn.num_experts=48", "parallel.expert=%d")
    for expert, ways in ((12, {"plain"}), (16, {"plain", "hierarchical"})):
        held = [*SMALL, sets[0], sets[1], sets[2] % expert]
        plan = make_plan(JobFile(BENCH / "h100.yaml", held), parse_gpus("48xH100"), held=("parallel.expert",), num=40)
        assert {each.job.parallel.all_to_all for each in (plan.best, *plan.others)} == ways


def test_parts_of_a_step_by_hand() -> None:
    """Two layers of 64 experts of 2,048 x 1,024 on two GPUs, EP 2: 8 micro-batches of 16,384 tokens each."""
    sets = ["train.batch_tokens=262144", "resources.workers=2", "parallel.expert=2", "parallel.gradients_at_once=4"]
    time, efficiency, gpu = timed(*sets), measured_efficiency(), parse_gpus("1xH100").gpu
    cost = model_costs(job_of(*sets).model, 4096)
    assert cost.expert_params == 2 * 64 * 3 * 2048 * 1024
    assert cost.by_rows == 50304 * 2048
    nvlink, memory = 450e9 * efficiency.nvlink, 3.35e12 * efficiency.memory
    rows = 16384 * (1 - 0.5**8) * 2048 * 2  # bytes to the other rank
    exchanges = 2 * 8 * (4 * (5e-6 + rows / nvlink) + 6 * 5e-6)
    assert time.all_to_all == pytest.approx(exchanges, rel=1e-6)
    dense, mine = cost.dense_params, cost.expert_params / 2
    # Dense ones alone have a replica: fp32 sums there and bf16 weights back, half of them to the other rank.
    assert time.gradients_and_weights == pytest.approx(6 * dense / 2 / nvlink + 5e-6)
    # bf16 moments: 26 bytes a weight of the rank's part.
    assert time.optimizer == pytest.approx(26 * (dense / 2 + mine) / memory)
    # Eight gradients of 2 bytes in two passes; the first writes 4 bytes, the second reads and writes 8.
    assert time.gradient_sums == pytest.approx((16 + 4 + 8) * (dense + mine - cost.by_rows) / memory)
    assert time.head == pytest.approx(8 * 16384 * 6 * 50304 * 2048 / (efficiency.head * gpu.peak))


def test_recomputation_and_counting_take_a_third_more() -> None:
    plain, again = timed(), timed("train.recompute=true")
    counted = timed("balance.counts=exact")
    for each in (again, counted):
        assert each.experts == pytest.approx(4 / 3 * plain.experts)
        assert each.attention == pytest.approx(4 / 3 * plain.attention)
        assert (each.head, each.optimizer) == (plain.head, plain.optimizer)
    both = timed("train.recompute=true", "balance.counts=exact")
    assert both.projections == pytest.approx(5 / 3 * plain.projections)


def test_better_hardware_is_never_slower() -> None:
    random_ = random.Random(1)
    fields = ["peak_tflops", "memory_tb_per_s", "nvlink_gb_per_s", "network_gb_per_s"]
    for _ in range(40):
        workers = random_.choice([1, 2, 8, 64])
        sets = [
            f"resources.workers={workers}", "train.micro_batch=1", "parallel.gradients_at_once=1",
            f"parallel.expert={random_.choice([n for n in (1, 2, 8, 16) if workers % n == 0])}",
            f"train.recompute={random_.choice(['true', 'false'])}",
        ]  # fmt: skip
        field, factor = random_.choice(fields), random_.uniform(1, 4)
        before = timed(*sets)
        faster = timed(*sets, **{field: getattr(parse_gpus("1xH100").gpu, field) * factor})
        assert faster.total <= before.total * (1 + 1e-12), (sets, field, factor)


def test_more_gpus_are_faster_as_far_as_the_batch_goes() -> None:
    """At one batch; the search may always leave a GPU what it had."""
    speeds = [planned(f"{count}xH100", num=1).best.tokens_per_s for count in (1, 2, 4, 8, 16)]
    assert speeds == sorted(speeds)
    assert speeds[-1] < 16 * speeds[0]


def test_money_energy_and_time_are_of_the_tokens() -> None:
    file = JobFile(BENCH / "h100.yaml", SMALL)
    one, ten = (make_plan(file, parse_gpus("8xH100"), tokens, num=1) for tokens in (10**12, 10**13))
    assert ten.train_s == pytest.approx(10 * one.train_s)
    assert one.train_s == pytest.approx(1e12 / one.best.tokens_per_s)
    assert one.wall_s > one.train_s
    assert one.usd["specialist"] == pytest.approx(3.0 * one.gpu_hours)
    assert one.money is None, "without a price of the job's own"
    own = JobFile(BENCH / "h100.yaml", (*SMALL, "resources.price_per_hour=2.25"))
    priced = make_plan(own, parse_gpus("8xH100"), 10**12, num=1)
    assert priced.money == pytest.approx(2.25 * one.gpu_hours)
    # A GPU that is always busy takes 692 W, and its share of the machine 575.
    assert one.best.time.busy == 1
    assert one.machine_kwh == pytest.approx((692 + 575) * one.gpu_hours / 1e3)
    assert one.saves.mtbf_s == pytest.approx(50_700 * 3600 / 8)


def test_small_models_wait_for_the_host() -> None:
    plan = make_plan(JobFile(BENCH.parent / "h100.yaml", ()), parse_gpus("1xH100"), num=1)
    assert plan.best.time.waiting_for_host > 0
    assert plan.best.time.busy < 1
    launches = 8 * plan.best.job.accumulation
    assert plan.best.time.total == pytest.approx(launches * measured_efficiency().host_s_per_layer)
    assert "the host's speed" in " ".join(extrapolations(plan))
    sets = ("model.width=256", "train.micro_batch=1")
    found = planned("8xH100", *sets, held=("train.micro_batch",), num=1)
    assert bottleneck(found).startswith("the host")
    whole = found.best.time.total
    for part in ("elementwise", "unlisted"):
        small = found.best._replace(time=found.best.time._replace(**{part: 4 * whole}))
        assert bottleneck(found._replace(best=small)).startswith("norms, gates and other small kernels take 8")


def test_a_plan_says_what_nobody_measured() -> None:
    one = " ".join(extrapolations(planned("1xH100", num=1)))
    assert "measurement has" not in one
    assert "network" not in one
    far = " ".join(extrapolations(planned("16xA100", num=1)))
    for what in ("A100: shares of its peaks", "16 GPUs: the largest measurement has 2", "network between nodes"):
        assert what in far
    wide = list(extrapolations(planned("1xH100", "model.width=4096", num=1)))
    assert "model.width=4096: steps were measured from 1024 to 2048" in wide
    assert not any("expert_dim" in line for line in wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "256xH100"], r"32 sequences .* --set train\.batch_tokens=1048576, or take 32 GPUs"),
        (["--gpus", "3xH100"], r"or take 2 GPUs|or take 4 GPUs"),
        (["--gpus", "8xH100", "--set", "parallel.expert=3"], "parallel.expert=3 does not divide resources.workers=8"),
        (["--gpus", "8xH100", "--set", "model.ffn.num_experts=60", "--set", "parallel.expert=8"],
         "parallel.expert=8 does not divide model.ffn.num_experts=60"),
        (["--gpus", "8xH100", "--set", "resources.workers=4"], "resources.workers and --gpus 8xH100"),
        (["--gpus", "8xH100", "--set", "train.precision=fp32", "--set", "optimizer.state=fp32"],
         "train.precision=fp32: the plan knows speeds of bf16 only"),
        (["--gpus", "8xH100", "--set", "kernels=reference"], "kernels=reference"),
        (["--gpus", "8xH100", "--set", "parallel.offload=experts"], "parallel.offload=experts: the plan keeps"),
        (["--gpus", "8xH100", "--tokens", "1X"], "--tokens '1X' is not a count"),
        (["--gpus", "8xH100", "--scaling", "x.pdf"], r"--scaling x\.pdf"),
        (["--gpus", "8xH100", "--scaling", "nowhere/x.png"], "there is no folder nowhere"),
        (["--gpus", "8xH100", "--hardware", "nowhere.yaml"], r"--hardware nowhere\.yaml: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said(arguments: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["plan", str(BENCH / "h100.yaml"), *arguments])
    assert isinstance(outcome.exception, ConfigError), outcome.output
    assert re.search(message, str(outcome.exception)), outcome.exception


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    sets = ["model.num_layers=12", "optimizer.state=fp32"]
    with pytest.raises(ConfigError) as refused:
        planned("1xH100", *sets)
    message = str(refused.value)
    found = re.search(r"takes ([\d.]+) GiB of a GPU's 78.0, ([\d.]+) GiB too much", message)
    assert found is not None, message
    assert float(found[1]) - 78.0 == pytest.approx(float(found[2]), abs=0.06)
    assert "2 GPUs or --set optimizer.state=bf16 would fit" in message
    assert planned("2xH100", *sets, num=1).best.memory.total <= 78 * 2**30
    assert planned("1xH100", *sets, "optimizer.state=bf16", num=1).best.memory.total <= 78 * 2**30


def test_the_command_prints_a_plan_and_draws_it(tmp_path: Path) -> None:
    page, sets = (
        tmp_path / "scaling.html",
        ["model.num_layers=1", "train.batch_tokens=131072", "model.vocab_size=50304"],
    )
    arguments = ["plan", str(BENCH / "h100.yaml"), "--gpus", "8xH100", "--tokens", "1B", "--scaling", str(page)]
    outcome = CliRunner().invoke(app, [*arguments, *(part for each in sets for part in ("--set", each))])
    assert outcome.exception is None, outcome.output
    assert "on 8xH100: 1G tokens" in outcome.output
    for line in ("fastest layout: --set resources.workers=8", "MFU", "USD", "kWh", "checkpoint.every=", "bottleneck: "):
        assert line in outcome.output
    text = page.read_text(encoding="utf-8")
    assert "same tokens a step and GPU" in text
    assert "<script src" not in text
