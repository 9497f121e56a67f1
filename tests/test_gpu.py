"""What only a CUDA device can show; `pytest -m gpu` there. CI has none and skips these, with the reason."""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tidegate.model.attention import AttentionConfig
from tidegate.model.clock import Clock
from tidegate.model.decoder import Decoder, ModelConfig, materialize
from tidegate.model.moe import MoEConfig, SharedExpertsConfig
from tidegate.model.norms import GatedNormConfig
from tidegate.model.unit_gates.export import export
from tidegate.train.instruments import EnergyMeter, Memory, StepTimer, record_trace
from tidegate_kernels.choice import choose
from tidegate_kernels.gated_attention import Documents
from tidegate_kernels.gated_attention.sdpa import BACKENDS, attend_with_sink
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
    mask = Documents(documents).mask if masked else None

    def attend(backends: list[SDPBackend], *args: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(*args, attn_mask=mask, is_causal=not masked, enable_gqa=True)

    truth = attend([SDPBackend.MATH], q.double(), k.double(), v.double())
    plain = attend([SDPBackend.MATH], q, k, v)
    assert relative_error(attend(BACKENDS, q, k, v), truth) <= 2 * relative_error(plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 63, 257])
def test_attention_with_a_sink_is_within_twice_the_error_of_its_formula(
    length: int, masked: bool, dtype: torch.dtype
) -> None:
    """cuDNN, flash and memory-efficient kernels, whichever takes the inputs, with every gradient."""
    torch.manual_seed(0)
    shapes = [(2, length, 4, 64), (2, length, 2, 64), (2, length, 2, 64), (4,)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    documents = torch.arange(length, device="cuda").div(50, rounding_mode="floor").expand(2, -1)
    mask = Documents(documents).mask if masked else None
    upstream = torch.randn(shapes[0], device="cuda", dtype=dtype)
    visible = torch.ones(length, length, dtype=torch.bool, device="cuda").tril() if mask is None else mask

    def formula(q, k, v, mask, sink):  # type: ignore[no-untyped-def]
        k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        logits = torch.einsum("bthd,bshd->bhts", q, k).div(8).masked_fill(~visible, -torch.inf)
        logits = torch.cat([logits, sink[:, None, None].expand(2, -1, length, 1)], dim=-1)
        return torch.einsum("bhts,bshd->bthd", logits.softmax(dim=-1)[..., :-1], v)

    def run(op, dtype):  # type: ignore[no-untyped-def]
        q, k, v, sink = (t.to(dtype).requires_grad_() for t in inputs)
        out = op(q, k, v, mask, sink)
        return out.detach(), *torch.autograd.grad(out, (q, k, v, sink), upstream.to(dtype))

    results = (run(formula, torch.float64), run(formula, dtype), run(attend_with_sink, dtype))
    for name, truth, plain, ours in zip(("out", "dq", "dk", "dv", "dsink"), *results, strict=True):
        # fp32: the kernels sum in another order than the formula, both at the last digits.
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 5e-6, name


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("activation", ["poly_norm", "relu2"])
def test_the_variants_score_on_the_gpu_as_on_the_cpu(activation: str, isolate: bool) -> None:
    """Sinks, DiffQKV, gated norms, polynomial experts, the largest logits and observations, in bf16 against fp32."""
    config = CONFIG.model_copy(
        update={
            "attention": AttentionConfig(
                num_heads=4,
                num_kv_heads=2,
                num_value_heads=4,
                augmented_query=96,
                head_dim=32,
                qk_norm=False,
                qk_clip=100,
                softmax="learnable_sink",
            ),
            "ffn": CONFIG.ffn.model_copy(update={"activation": activation}),
            "norm": GatedNormConfig(),
        }
    )
    cpu = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    gpu = materialize(lambda: Decoder(config), torch.device("cuda"), seed=0)
    gpu.load_state_dict(cpu.state_dict())
    gpu.bfloat16()
    torch.manual_seed(1)
    tokens = torch.randint(0, 503, (2, 129))
    counted = torch.ones(2, 128, dtype=torch.bool)
    documents = torch.arange(128).div(40, rounding_mode="floor").expand(2, -1) if isolate else None
    args = (tokens[:, :-1], tokens[:, 1:], counted, documents)
    expected = cpu(*args, observe="all")
    output = gpu(*(a.cuda() if a is not None else None for a in args), observe="all")
    torch.testing.assert_close(output.nll_B.cpu() / 128, expected.nll_B / 128, atol=5e-3, rtol=0)
    for name, one, other in zip(output.attention._fields, output.attention, expected.attention, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=2e-2, rtol=2e-2, msg=lambda m, name=name: f"{name}: {m}")
    output.nll.backward()
    assert all(torch.isfinite(p.grad).all() for p in gpu.parameters())


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
    output.nll.backward()
    assert all(torch.isfinite(p.grad).all() for p in gpu.parameters())


def test_recomputing_activations_changes_neither_losses_nor_counts() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 503, (2, 129), device="cuda")
    counted = torch.ones(2, 128, dtype=torch.bool, device="cuda")
    results = []
    for recompute in (False, True):
        model = materialize(lambda r=recompute: Decoder(CONFIG, recompute=r), torch.device("cuda"), seed=0).bfloat16()
        output = model(tokens[:, :-1], tokens[:, 1:], counted)
        output.nll.backward()
        results.append((output.nll_B.detach(), output.stats.counts_BE, model.blocks[0].ffn.router.weight.grad))
    for plain, recomputed in zip(*(result[:2] for result in results), strict=True):
        torch.testing.assert_close(recomputed, plain, atol=0, rtol=1e-2)
    # Recomputation sums the stream of a block on its own, so its gradient is rounded to bf16 once more.
    assert relative_error(results[1][2], results[0][2]) < 1e-2


UNIT_GATES = [
    {"kind": "straight_through"},
    {"kind": "reinforce"},
    {"kind": "hard_concrete"},
    {"kind": "continuation"},
    {"kind": "knapsack"},
    {"kind": "polarization"},
    {"kind": "random"},
    {"kind": "dynamic_sparse", "growth": "random", "every": 1},
    {"kind": "nested", "keeps": [0.5, 1.0]},
]


@pytest.mark.parametrize("over", [["heads", "channels"], ["heads", "experts"], ["blocks"]], ids="-".join)
@pytest.mark.parametrize("method", UNIT_GATES, ids=lambda method: method["kind"])
def test_unit_gates_choose_on_cuda_as_on_the_cpu(method: dict[str, object], over: list[str]) -> None:
    """The same masks from the same state; bf16 steps with recomputation; an exported model with the same losses."""
    if method["kind"] == "polarization" and "channels" in over:
        pytest.skip("refused: a gate for every token, expert and channel")
    fixed = method["kind"] in ("random", "nested")
    units = {"over": over, "keep": 0.5, "method": method, "freeze_tokens": None if fixed else 300}
    config = ModelConfig.model_validate({**CONFIG.model_dump(), "num_layers": 4, "init_std": 0.1, "units": units})
    cpu = materialize(lambda: Decoder(config), torch.device("cpu"), seed=0)
    gpu = materialize(lambda: Decoder(config, recompute=True), torch.device("cuda"), seed=0)
    gpu.load_state_dict(cpu.state_dict())
    torch.manual_seed(0)
    tokens, labels = torch.randint(503, (2, 2, 65), device="cuda").unbind()
    counted = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(gpu.units.hard_mask().cpu(), cpu.units.hard_mask())
    gpu.bfloat16()
    for step in (1, 2, 3):
        clock = Clock(step, 100 * step, 0)
        output = gpu(tokens, labels, counted, clock=clock)
        (output.nll / 130 + output.unit_penalty).backward()
        gpu.units.update(gpu, clock, output.nll.detach() / 130, lambda _: None)
    assert all(p.grad.isfinite().all() for p in gpu.parameters() if p.grad is not None)
    assert gpu.units.frozen == (method["kind"] != "nested")
    gpu.float().eval()
    costs = gpu.units.units.costs(torch.device("cuda"))
    assert abs(float((gpu.units.hard_mask() * costs).sum()) / gpu.units.units.total_cost - 0.5) <= 0.01
    # fp32 sums of other lengths, and without the fused kernels' bf16: grouped_mm takes fp32 through its reference.
    torch.testing.assert_close(
        export(gpu)(tokens, labels, counted).nll_B, gpu(tokens, labels, counted).nll_B, rtol=1e-4, atol=1e-3
    )


def test_the_instruments_read_the_device() -> None:
    """A product of known kernels, and a host that sleeps while the device has nothing to do."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    meter, timer = EnergyMeter(device), StepTimer(device)

    def step() -> None:
        for _ in range(63):
            torch.mm(x, x)
        torch.cuda.synchronize()
        time.sleep(0.05)

    product = timer.during(lambda: "forward", lambda: [torch.mm(x, x) for _ in range(63)])
    Memory.restart(device)
    trace, before_j = record_trace(step, device), meter.read_j()
    for _ in range(2):
        timer.begin_step()
        product()
    one, other = timer.read()
    assert max(trace.kernels, key=lambda kernel: kernel.launches).launches == 63
    assert sum(kernel.seconds for kernel in trace.kernels) == pytest.approx(trace.busy_s, rel=0.01)
    assert trace.gaps_s > 0.05
    assert trace.communication_s == 0
    # 63 products of 137 GFLOP: not below what 2 PFLOP/s would take, and the two clocks agree.
    assert trace.busy_s > 63 * 2 * 4096**3 / 2e15
    assert other["forward"] == pytest.approx(trace.busy_s, rel=0.5)
    assert one["forward"] > 0
    memory = Memory.peak(device)
    assert memory is not None
    assert x.nbytes < memory.allocated_bytes <= memory.reserved_bytes
    assert meter.missing is None, meter.missing
    assert meter.read_j() >= before_j > 0


# --- experts in the host's memory

STORED = CONFIG.model_copy(
    update={"num_layers": 6, "ffn": MoEConfig(num_experts=13, top_k=3, expert_dim=512), "width": 512}
)
_CYCLES = 5_000_000  # a few milliseconds: longer than anything else here takes


def steps_with_stored_experts(cases: list[tuple[bool, str]]) -> list[tuple[list[list[float]], int]]:
    """Losses and norms of three steps of two micro-batches, and the most memory of the last two.

    Args:
        cases: whether activations are recomputed, and what is slowed down so that missing waits show: the copies `up`
            or `down`, the computation `compute`, or nothing; `off` keeps experts on the GPU.
    """
    from tidegate.parallel import collectives
    from tidegate.parallel.config import ParallelConfig
    from tidegate.parallel.engine import Engine
    from tidegate.parallel.stored_moe import StoredMoE

    torch.distributed.destroy_process_group()
    collectives.start(alone=True)
    choose("auto")
    adam = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "gradient_clip": 0.3}
    found = []
    for recompute, slow in cases:
        layout = ParallelConfig(offload="none" if slow == "off" else "experts")
        engine = Engine(
            STORED, layout, precision="bf16", seed=0, micro_batch=4, accumulation=2, recompute=recompute, **adam
        )
        if slow in ("up", "down"):
            assert engine.store is not None
            lane = engine.store.arrivals if slow == "up" else engine.store._down

            def late(target, source, lane=lane, copy=lane.copy):  # type: ignore[no-untyped-def]
                with torch.cuda.stream(lane._stream):
                    torch.cuda._sleep(_CYCLES)
                copy(target, source)

            lane.copy = late
        if slow == "compute":
            for module in engine.model.modules():
                if isinstance(module, StoredMoE):
                    module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(_CYCLES))
        rows = []
        for step in range(3):
            engine.set_learning_rate(1e-3)
            if step == 1:
                torch.cuda.reset_peak_memory_stats()
            total = torch.zeros((), device="cuda")
            for micro_batch in range(2):
                generator = torch.Generator().manual_seed(2 * step + micro_batch)
                tokens = torch.randint(0, 503, (4, 129), generator=generator).cuda()
                counted = torch.ones(4, 128, dtype=torch.bool, device="cuda")
                loss = engine.forward(tokens[:, :-1], tokens[:, 1:], counted).nll / 512
                engine.backward(loss)
                engine.step()
                total += loss.detach()
            rows.append([float(total), float(engine.gradient_norm())])
        found.append((rows, torch.cuda.max_memory_allocated()))
        del engine, loss
        gc.collect()
    return found


def test_stored_experts_train_as_those_on_the_gpu(on_ranks) -> None:  # type: ignore[no-untyped-def]
    """Whatever is slow. Before the first update losses have the same bits; after it AdamW rounds elsewhere."""
    cases = [(r, slow) for r in (False, True) for slow in ("off", "nothing", "up", "down", "compute")]
    ((*runs,),) = on_ranks(1, steps_with_stored_experts, cases)
    for first in (0, 5):
        rows, _ = runs[first]
        assert len({loss for loss, _ in rows}) == 3
        for case, (stored, _) in list(zip(cases, runs, strict=True))[first + 1 : first + 5]:
            assert stored[0][0] == rows[0][0], case
            assert stored[0][1] == pytest.approx(rows[0][1], rel=1e-5), case
            torch.testing.assert_close(
                torch.tensor(stored), torch.tensor(rows), rtol=2e-3, atol=0, msg=lambda m, at=case: f"{at}: {m}"
            )


def test_stored_experts_leave_the_gpu(on_ranks) -> None:  # type: ignore[no-untyped-def]
    """Two of six layers are there; what stays away is 18 bytes a parameter of theirs, and 12 of the two. AdamW has some
    chunks of them there at the largest moment."""
    from tidegate.parallel.streamed_adamw import CHUNK, SLOTS

    # Each in a process of its own: what is left of an engine would count.
    (((_, off),), ((_, on),)) = (
        on_ranks(1, steps_with_stored_experts, [(True, slow)])[0] for slow in ("off", "nothing")
    )
    layer = 13 * 3 * 512 * 512
    assert off - on == pytest.approx(18 * 6 * layer - 6 * 2 * layer - SLOTS * 18 * min(CHUNK, layer), rel=0.1)


def test_a_snapshot_of_device_tensors_lies_in_pinned_memory_that_stays() -> None:
    from tidegate.parallel.snapshot import _Copier

    buffers: dict[tuple[str, int], torch.Tensor] = {}
    weight = torch.randn(1 << 20, device="cuda")
    before = weight.cpu()
    first = _Copier("file", buffers).on_host({"weight": weight, "part": weight[10:20], "number": weight[0]})
    weight.zero_()  # queued behind the copies
    torch.cuda.synchronize()
    assert torch.equal(first["weight"], before)
    assert torch.equal(first["part"], before[10:20])
    assert first["number"] == before[0]
    assert first["weight"].is_pinned()
    second = _Copier("file", buffers).on_host({"weight": weight})
    torch.cuda.synchronize()
    assert second["weight"] is first["weight"]
    assert not second["weight"].any()


def losses_of_a_run(folder: str, job_file: str) -> list[dict[int, float]]:
    """By step: of a whole run, and of one that goes on from the first one's checkpoint in the middle."""
    from pathlib import Path
    from shutil import copytree, rmtree

    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.parallel import collectives
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train

    torch.distributed.destroy_process_group()
    collectives.start(alone=True)
    job = load(job_file, Job).config
    dataset = prepare(job.data, cache_dir=Path(folder, "data"), job_dir=Path(job_file).parent)
    runs = []
    for name in ("whole", "resumed"):
        place = Path(folder, name)
        if name == "resumed":
            copytree(Path(folder, "whole"), place)
            newest = sorted(place.glob("step_*"))[-1]
            rmtree(newest)
        losses: dict[int, float] = {}

        def record(record, losses=losses) -> None:  # type: ignore[no-untyped-def]
            if "train/loss" in record.metrics:
                losses[record.step] = record.metrics["train/loss"]

        train(job, World(Path(dataset), str(place), record, print, lambda: False))
        runs.append(losses)
        gc.collect()
    return runs


def test_a_bf16_run_goes_on_from_its_checkpoint_within_a_tolerance(on_ranks, tiny_job, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Atomic additions round in an order of their own; everything else is restored to the bit."""
    job = tiny_job(
        model={
            "width": 64,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
            "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 64, "shared": {"num": 1}},
        },
        train={"tokens": 512 * 16, "precision": "bf16"},
        optimizer={"schedule": {"kind": "cosine", "peak": 3e-3, "warmup_tokens": 512}, "state": "bf16"},
        checkpoint={"every": 8},
        resources={"workers": 1, "gpu": torch.cuda.is_available()},
    )
    ((whole, resumed),) = on_ranks(1, losses_of_a_run, str(tmp_path), str(job))
    assert sorted(whole) == list(range(1, 17))
    assert sorted(resumed) == list(range(9, 17))
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=2e-3), step
