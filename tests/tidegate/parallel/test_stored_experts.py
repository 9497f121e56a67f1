"""Experts in the host's memory train as experts on the device do, in real processes under the real engine.

Without the clip, whose norm is summed in another order, training is the same to the bit: what is fetched, kept, summed,
reduced and moved is exact.
"""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tidegate.data.loader import StepBatch
from tidegate.model.balance import BalanceConfig, Balancer
from tidegate.model.clock import Clock
from tidegate.model.decoder import ModelConfig
from tidegate.parallel import collectives, expert_store
from tidegate.parallel.config import ParallelConfig
from tidegate.parallel.expert_layout import Layout, Piece
from tidegate.parallel.expert_store import ExpertStore, StoreSettings
from tidegate.parallel.prefetch import Lane, Ring
from tidegate.parallel.streamed_adamw import Moved, StreamedAdamW
from tidegate_kernels.adamw import Rates, adamw, step_factors
from tidegate_kernels.choice import chosen

SEQUENCES, LENGTH, VOCAB = 8, 17, 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "width": 32,
    "num_layers": 5,  # more than there are buffers
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "init_std": 0.1,
}
MOE = {"kind": "moe", "num_experts": 6, "top_k": 2, "expert_dim": 24, "shared": {"num": 1}}


def model_of(num_layers: int = 5, **ffn: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "num_layers": num_layers, "ffn": {**MOE, **ffn}})


FIVE, THREE = model_of(), model_of(3)
# A third tensor that is no matrix and is not decayed; none; one layer; experts of several slices.
POLY, RELU2, ONE = model_of(2, activation="poly_norm"), model_of(3, activation="relu2"), model_of(1)
UNEVEN = model_of(3, num_experts=4, sizes=[{"num": 1, "times": 0}, {"num": 2, "times": 1}, {"num": 1, "times": 3}])
PRE_GATED = model_of(4, router={"kind": "softmax_top_k", "reads": "previous_block"})


def part_of(step: int, accumulation: int) -> StepBatch:
    """This rank's part of a step, in which sequences draw from different parts of the vocabulary."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.arange(SEQUENCES)[:, None] * 9 + torch.randint(0, 30, (SEQUENCES, LENGTH + 1), generator=generator)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8
    mine = torch.arange(SEQUENCES).view(accumulation, collectives.world_size(), -1)[:, collectives.rank()]
    return StepBatch(tokens[mine], torch.zeros_like(tokens[mine][..., 1:]), counted[mine], torch.zeros_like(mine), mine)


def clock_at(step: int) -> Clock:
    return Clock(step + 1, (step + 1) * SEQUENCES * LENGTH, seed=0)


def engine_for(
    model: ModelConfig,
    accumulation: int,
    *,
    offload: Any,
    expert: int = 1,
    clip: float = 0.0,
    recompute: bool = False,
    folder: str | None = None,
    moments: Any = "fp32",
) -> Any:
    from tidegate.parallel.engine import Engine

    return Engine(
        model,
        ParallelConfig(expert=expert, offload=offload, offload_folder=folder),
        precision="bf16",
        seed=0,
        micro_batch=1,
        accumulation=accumulation,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        gradient_clip=clip,
        recompute=recompute,
        optimizer_state=moments,
    )


def train(engine: Any, accumulation: int, steps: range, bad: int = -1) -> list[list[float]]:
    """Per step: losses summed over ranks and the gradient norm, which is not finite in a bad step."""
    from tidegate.train.step import train_step, update_routers

    balance = BalanceConfig(loss_weight=0.1, bias_rate=0.01)
    model = engine.model.config.ffn
    balancer = Balancer(balance, collectives.all_reduce, collectives.world_size(), accumulation, model)
    found = []
    for step in steps:
        engine.set_learning_rate(1e-2)
        spoilt = step == bad and collectives.rank() == 0
        hook = engine.model.norm.weight.register_hook(lambda g: g * torch.inf) if spoilt else None
        result = train_step(engine, balancer, part_of(step, accumulation), clock_at(step), isolate=True)
        if hook is not None:
            hook.remove()
        losses = torch.stack(result.losses[:3])
        update_routers(engine.model, balancer, clock_at(step), balance.bias_rate)
        collectives.all_reduce(losses)
        found.append([*losses.tolist(), float(engine.gradient_norm())])
    return found


Case = tuple[ModelConfig, int, int, bool]  # model, expert, accumulation, recompute


def on_and_off(cases: list[Case], clip: float) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Per case: three steps with experts on the device, and with experts on the host."""
    found = []
    for model, expert, accumulation, recompute in cases:
        on, off = (
            train(
                engine_for(model, accumulation, offload=offload, expert=expert, clip=clip, recompute=recompute),
                accumulation,
                range(3),
            )
            for offload in ("experts", "none")
        )
        found.append((on, off))
    return found


ALONE: list[Case] = [
    (FIVE, 1, 2, False),
    (FIVE, 1, 2, True),
    (POLY, 1, 1, False),
    (RELU2, 1, 1, True),
    (ONE, 1, 2, True),
    (UNEVEN, 1, 1, False),
    (PRE_GATED, 1, 2, False),
    (PRE_GATED, 1, 2, True),
]
SPREAD: list[Case] = [(FIVE, 2, 2, True), (FIVE, 1, 2, False), (POLY, 1, 1, True), (POLY, 2, 1, False)]


def assert_same_training(runs: list[Any]) -> None:
    for case, (on, off) in enumerate(runs):
        a, b = torch.tensor(on), torch.tensor(off)
        assert torch.equal(a[:, :3], b[:, :3]), case
        torch.testing.assert_close(a[:, 3], b[:, 3], rtol=1e-5, atol=0)  # norms by layer, and over all layers
        assert len(set(b[:, 0].tolist())) == 3, "nothing trained"


def test_losses_are_the_same_to_the_bit(on_ranks: Any) -> None:
    assert_same_training(on_ranks(1, on_and_off, ALONE, 0.0)[0])


def test_losses_are_the_same_to_the_bit_on_two_ranks(on_ranks: Any) -> None:
    """EP 2, and two replicas that share the optimizer's part."""
    for rank in on_ranks(2, on_and_off, SPREAD, 0.0):
        assert_same_training(rank)


def test_with_clipping_losses_are_close(on_ranks: Any) -> None:
    """The last digit of a factor now and then rounds a bf16 weight to its other neighbour, 1 in 256."""
    for rank in on_ranks(2, on_and_off, SPREAD[:2], 0.3):
        for on, off in rank:
            torch.testing.assert_close(torch.tensor(on), torch.tensor(off), rtol=2e-3, atol=1e-4)
            assert on[0][:3] == off[0][:3], "the first step has not moved anything yet"


def triton_steps() -> list[list[list[float]]]:
    with chosen("triton"):
        return [train(engine_for(THREE, 1, offload=offload), 1, range(2)) for offload in ("experts", "none")]


@pytest.mark.long
def test_the_kernels_of_a_gpu_keep_no_weights(on_ranks: Any) -> None:
    ((on, off),) = on_ranks(1, triton_steps)
    torch.testing.assert_close(torch.tensor(on), torch.tensor(off), rtol=1e-3, atol=1e-4)


def experts_fetched(accumulation: int, recompute: bool) -> tuple[list[int], int, list[Any]]:
    """Numbers that one step of a pre-gated model brings to the device, and of all of a layer; and the training."""
    early = model_of(5, num_experts=64, router={"kind": "softmax_top_k", "reads": "previous_block"})
    engines = [engine_for(early, accumulation, offload=offload, recompute=recompute) for offload in ("experts", "none")]
    store, moved = engines[0].store, []
    copy = store.arrivals.copy

    def counted(target: torch.Tensor, source: torch.Tensor) -> None:
        if source.dtype == torch.bfloat16:
            moved.append(source.numel())
        copy(target, source)

    store.arrivals.copy = counted
    runs = [train(engine, accumulation, range(3)) for engine in engines]
    return moved, 64 * 3 * 32 * 24, [tuple(runs)]


@pytest.mark.parametrize("recompute", [False, True])
def test_of_a_pre_gated_layer_only_chosen_experts_are_fetched(on_ranks: Any, recompute: bool) -> None:
    """34 tokens choose some 40 of 64 experts; only the first layer reads what it routes by itself."""
    ((moved, layer, runs),) = on_ranks(1, experts_fetched, 4, recompute)
    assert_same_training(runs)
    # Whole layers at most, of 12 micro-batches: all in the counting pass, and three in each direction of the other.
    whole = 12 * (5 + 3 + 3)
    assert sum(moved) < 0.8 * whole * layer
    assert moved.count(layer) == 1 + 12 * 2 + 3, "the first layer: at once, in both kinds of passes, after each step"


def layers_fetched() -> tuple[list[int], list[int]]:
    """Of a model of five layers with two buffers: layers fetched by a training pass, and then by two of evaluation."""
    engine = engine_for(FIVE, 1, offload="experts")
    fetched: list[int] = []
    copy, hosts = engine.store.arrivals.copy, [layer.weights_n.data_ptr() for layer in engine.store._layers]

    def noted(target: torch.Tensor, source: torch.Tensor) -> None:
        if source.data_ptr() in hosts:
            fetched.append(hosts.index(source.data_ptr()))
        copy(target, source)

    engine.store.arrivals.copy = noted
    batch = part_of(0, 1)
    tokens, counted = batch.tokens_MBT1[0], batch.loss_mask_MBT[0]
    arguments = tokens[:, :-1], tokens[:, 1:], counted
    engine.backward(engine.forward(*arguments).nll)
    training, fetched[:] = list(fetched), []
    with torch.no_grad():
        for _ in range(2):
            engine.forward(*arguments)
    return training, fetched


def test_each_pass_fetches_what_the_last_one_left_away(on_ranks: Any) -> None:
    ((training, evaluation),) = on_ranks(1, layers_fetched)
    assert training == [0, 1, 2, 3, 4, 2, 1, 0]
    assert evaluation == [2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_a_router_that_changes_its_mind_is_found_out() -> None:
    from tidegate.parallel.stored_moe import used_experts

    settings = StoreSettings((0.9, 0.95), 1e-8, 0.1, 1, 0, None, torch.float32)
    store = ExpertStore(torch.device("cpu"), settings)
    store.add({"w1": Piece((3, 2), True)})
    chosen_E = torch.tensor([True, False, True])
    store.check(used_experts(torch.tensor([[0, 2], [2, 0]]), 3), chosen_E)
    store.step(torch.tensor(1.0), torch.tensor(1.0), 0.1)
    slots = torch.tensor([[True, False], [True, True]])
    store.check(used_experts(torch.tensor([[0, 1], [2, 0]]), 3, slots), chosen_E)
    store.step(torch.tensor(1.0), torch.tensor(1.0), 0.1)
    store.check(used_experts(torch.tensor([[0, 1], [2, 0]]), 3), chosen_E)
    with pytest.raises(AssertionError, match="announced"):
        store.step(torch.tensor(1.0), torch.tensor(1.0), 0.1)


# --- one step, and checkpoints


class Bad(NamedTuple):
    norms: list[float]
    untouched: bool
    """Weights, moments and step counts are the same after the bad step as before."""
    moved: bool


def step_with_infinite_gradients() -> list[Bad]:
    """The dense gradients of one rank are infinite in the second of three steps."""
    found = []
    for expert in (1, 2):
        engine, norms, states = engine_for(FIVE, 1, offload="experts", expert=expert, clip=0.3), [], []
        for step in range(3):
            norms.append(train(engine, 1, range(step, step + 1), bad=1)[0][3])
            state = [value for layer in engine.store.state() for value in layer.values()]
            states.append([torch.as_tensor(value).clone() for value in state])
        before, bad, after = states
        found.append(Bad(norms, all(map(torch.equal, before, bad)), not any(map(torch.equal, bad, after))))
    return found


def test_a_step_with_infinite_gradients_elsewhere_moves_no_expert(on_ranks: Any) -> None:
    for rank in on_ranks(2, step_with_infinite_gradients):
        for result in rank:
            assert result.untouched
            assert result.moved
            assert [math.isfinite(norm) for norm in result.norms] == [True, False, True]


def continue_from_checkpoint(folder: str) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Per size of the expert-parallel group, with its dtype of moments: steps 3 and 4 straight through, and from a
    checkpoint after step 2; the resumed engine keeps its master weights in files."""
    found = []
    for expert, moments in ((1, "fp32"), (2, "bf16")):
        case: dict[str, Any] = {"expert": expert, "clip": 0.3, "moments": moments}
        files = Path(folder) / str(expert)
        files.mkdir(exist_ok=True)
        names: list[str] = []

        def put(name: str, content: Any, files: Path = files, names: list[str] = names) -> None:
            names.append(name)
            (files / name).parent.mkdir(exist_ok=True)
            torch.save(content, files / name)

        engine = engine_for(FIVE, 2, offload="experts", **case)
        train(engine, 2, range(3))
        engine.save(put, {"step": 3})
        straight = train(engine, 2, range(3, 5))
        resumed = engine_for(FIVE, 2, offload="experts", folder=folder, **case)
        everyone = [name for names in collectives.gather(names) for name in names]
        assert resumed.load(lambda name, files=files: (files / name).open("rb"), everyone) == {"step": 3}
        found.append((straight, train(resumed, 2, range(3, 5))))
    return found


def test_a_checkpoint_continues_bitwise_and_with_weights_in_files(on_ranks: Any, tmp_path: Path) -> None:
    for rank in on_ranks(2, continue_from_checkpoint, str(tmp_path)):
        for straight, resumed in rank:
            assert resumed == straight
    assert not list(tmp_path.glob("tidegate-*")), "files of the experts are left"


# --- parts


def test_a_layout_says_where_experts_lie() -> None:
    pieces = {"w1": Piece((3, 2, 2), True), "w2": Piece((3, 5), True), "w3": Piece((3, 1), False)}
    layout = Layout(pieces, 4)
    assert (layout.num_experts, layout.numbers, layout.padded) == (3, 30, 32)
    assert layout.ranges(frozenset({0, 1, 2})) == [(0, 32)], "with the padding"
    assert layout.ranges(frozenset({0, 1})) == [(0, 8), (12, 22), (27, 29)]
    assert layout.ranges(frozenset({2, 0})) == [(0, 4), (8, 17), (22, 28), (29, 30)]
    for expert in range(3):
        flat = torch.zeros(32)
        for start, stop in layout.ranges(frozenset({expert})):
            flat[start:stop] = 1
        for begins, ends, piece in layout.places():
            assert flat[begins:ends].view(piece.shape).flatten(1).all(dim=1).nonzero().tolist() == [[expert]]


def ring_of(num_layers: int, num: int) -> tuple[Ring, list[torch.Tensor], Lane]:
    hosts = [torch.full((6,), float(layer)) for layer in range(num_layers)]
    cpu = torch.device("cpu")
    ranges = [lambda experts: [(2 * expert, 2 * expert + 2) for expert in sorted(experts)]] * num_layers
    lane = Lane(cpu)
    return Ring(hosts, num, cpu, ranges, lane), hosts, lane


ALL = frozenset(range(3))


def test_a_ring_keeps_what_was_used_last() -> None:
    ring, hosts, _ = ring_of(4, 2)
    assert ring.get(0, ALL).tolist() == [0.0] * 6
    ring.prefetch(1, ALL)
    hosts[0].fill_(7)  # nobody says so: what is here stays
    hosts[1].fill_(7)
    assert ring.get(1, ALL).tolist() == [1.0] * 6
    assert ring.get(0, ALL).tolist() == [0.0] * 6
    assert ring.get(2, ALL).tolist() == [2.0] * 6  # in the place of 1
    assert ring.get(0, ALL).tolist() == [0.0] * 6
    assert ring.get(1, ALL).tolist() == [7.0] * 6
    ring.forget()
    assert ring.get(0, ALL).tolist() == [7.0] * 6


def test_a_ring_fetches_the_experts_that_are_missing() -> None:
    ring, hosts, _ = ring_of(1, 2)
    assert ring.get(0, frozenset({1}))[2:4].tolist() == [0.0] * 2
    hosts[0].fill_(7)
    assert ring.get(0, frozenset({1, 2})).tolist()[2:] == [0.0] * 2 + [7.0] * 2


def test_a_ring_writes_back_what_was_overwritten() -> None:
    ring, hosts, lane = ring_of(3, 2)
    ring.overwrite(1, ALL).fill_(5)
    ring.write_back(1, 2, 4, lane)
    assert hosts[1].tolist() == [1.0, 1.0, 5.0, 5.0, 1.0, 1.0]
    assert ring.get(1, ALL).tolist() == [5.0] * 6, "and it is still here"
    ring.get(0, ALL), ring.get(2, ALL)
    assert ring.get(1, ALL).tolist() == hosts[1].tolist()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1, 63, 1000])
def test_streamed_adamw_is_adamw(numbers: int, moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, parts and steps, to the bit; gradients stay."""
    monkeypatch.setattr("tidegate.parallel.streamed_adamw.CHUNK", 64)
    torch.manual_seed(numbers)
    mean, square = torch.zeros(2, numbers, dtype=moments)
    ours = Moved(torch.randn(numbers), torch.zeros(numbers, dtype=torch.bfloat16), torch.zeros(numbers), mean, square)
    theirs = Moved(*(x.clone() for x in ours))
    rates, middle = Rates(0.01, (0.9, 0.95), 1e-8, 0.1), numbers // 3
    for step in (1.0, 2.0, 3.0):
        gradients_N = torch.randn(numbers) * 10 ** torch.linspace(-4, 1, numbers)
        factors = step_factors(torch.tensor(step), rates.betas, torch.tensor(0.3), torch.tensor(0.0))
        for state in (ours, theirs):
            state.gradients_N.copy_(gradients_N)
        streamed = StreamedAdamW(torch.device("cpu"), ours)
        streamed.move(ours.part(0, middle), factors, rates, 7)
        streamed.move(ours.part(middle, numbers), factors, rates, 7 + middle)
        streamed.finish()
        adamw(*theirs, factors, rates, place=7)
        for name, one, other in zip(Moved._fields, ours, theirs, strict=True):
            assert torch.equal(one, other), name
    assert ours.mean_N.any()
    assert torch.equal(ours.gradients_N, gradients_N)


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{tmp_path}.*No space left"):
        expert_store.zeros(tmp_path, "layer0.master", 10, torch.float32)
    assert not list(tmp_path.iterdir())
