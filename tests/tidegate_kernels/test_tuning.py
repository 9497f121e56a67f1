"""Block sizes from files: what is read, what is refused, and what a measurement would choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidegate_kernels import tuning
from tidegate_kernels.gated_attention import triton as attention
from tidegate_kernels.moe_experts import triton as experts
from tidegate_kernels.tuning import KERNELS, Blocks, TuningError, attention_size, blocks_of, file_of, load, tune

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(tuning.TUNED.glob("*.json"))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[torch.device]]:
    """Pretend that devices have a compute capability; returns those that were asked for it."""
    asked: list[torch.device] = []

    def pretend(major: int, minor: int) -> list[torch.device]:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: asked.append(device) or (major, minor))
        blocks_of.cache_clear()
        return asked

    yield pretend
    blocks_of.cache_clear()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_complete_and_written_as_save_writes_it(path: Path, tmp_path: Path) -> None:
    table = load(path)
    assert {kernel: tuple(entries) for kernel, entries in table.kernels.items()} == {
        kernel: sizes for kernel, (_, sizes) in KERNELS.items()
    }
    assert table.tuned_with["how"].startswith(("hand-chosen", "tidegate kernels tune"))
    tuning.save(tmp_path / "again.json", table)
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_an_architecture_takes_its_own_file_and_others_the_default(capability: Any) -> None:
    asked = capability(9, 0)
    expected = Blocks((128, 256, 64), 8, 3)
    assert [blocks_of("moe_experts.two_products", "all", GPU) for _ in range(3)] == [expected] * 3
    assert asked == [GPU]  # and not again
    assert file_of(GPU).name == "sm90.json"
    capability(8, 9)
    assert blocks_of("moe_experts.two_products", "all", GPU) == Blocks((64, 128, 64), 4, 3)
    asked.clear()
    assert blocks_of("gated_attention.keys", "fp32", CPU) == Blocks((16, 16), 4, 1)
    assert file_of(CPU).name == "default.json"
    assert not asked


@pytest.mark.parametrize(("d", "size"), [(1, "64"), (64, "64"), (65, "128"), (96, "128"), (129, "256"), (256, "256")])
def test_size_class_of_a_head(d: int, size: str) -> None:
    assert attention_size(d, torch.bfloat16) == size
    assert attention_size(d, torch.float32) == "fp32"


FORWARD = ("kernels", "gated_attention.forward")
WRONG = {
    "unknown kernel": (("kernels", "gated_attention.fwd"), {}, "kernels.gated_attention.fwd: unknown, it is {}; there"),
    "unknown size": ((*FORWARD, "512"), 1, "kernels.gated_attention.forward.512: unknown, it is 1; there must be 64,"),
    "missing": ((*FORWARD, "64"), None, "kernels.gated_attention.forward.64: missing; there must be 64, 128, 256"),
    "odd side": ((*FORWARD, "64", "block"), [96, 64], "forward.64.block=96 must be a power of two, at least 16"),
    "small side": ((*FORWARD, "64", "block"), [64, 8], "forward.64.block=8 must be a power of two, at least 16"),
    "sides": ((*FORWARD, "64", "block"), [64, 64, 64], "forward.64.block=[64, 64, 64]: give its 2 sides, m, n"),
    "no list": ((*FORWARD, "64", "block"), 64, "forward.64.block=64: give its 2 sides"),
    "warps": ((*FORWARD, "64", "warps"), 6, "forward.64.warps=6 must be a power of two, at least 1"),
    "true": ((*FORWARD, "64", "warps"), True, "forward.64.warps=True must be a power of two"),
    "stages": ((*FORWARD, "64", "stages"), 0, "forward.64.stages=0 must be an integer, at least 1"),
    "entry": ((*FORWARD, "64"), 3, "kernels.gated_attention.forward.64=3 is no object with block, warps, stages"),
    "device": (("tuned_with", "device"), None, "tuned_with.device: missing"),
}


@pytest.mark.parametrize(("keys", "value", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_refused(tmp_path: Path, keys: tuple[str, ...], value: Any, message: str) -> None:
    """None takes the field out."""
    document = json.loads(SHIPPED[0].read_text())
    section = document
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    if value is None:
        del section[keys[-1]]
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TuningError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TuningError, match=r"wrong\.json: (cannot be read|the file=\[\] is no object)"):
        load(path)


# --- choosing ------------------------------------------------------------------------------------------------

OLD, A_, B_, C_ = (Blocks((side, 64), 4, 2) for side in (16, 32, 64, 128))


def choose(times: dict[Blocks, list[float]], outputs: dict[Blocks, float] | None = None) -> tuple[Blocks, list[str]]:
    """`fastest` on two trials whose results are constants and whose times are given."""
    from triton.runtime.errors import OutOfResources

    lines: list[str] = []
    done: list[tuple[int, Blocks]] = []

    def trial(index: int) -> Callable[[Blocks], list[torch.Tensor]]:
        def run(blocks: Blocks) -> list[torch.Tensor]:
            value = (outputs or {}).get(blocks, 1.0)
            if value is None:
                raise OutOfResources(300_000, 232_448, "shared memory")
            done.append((index, blocks))
            return [torch.ones(3, device="cpu"), torch.full((3,), value, device="cpu")]

        return run

    def measure(call: Callable[[], object]) -> float:
        call()
        index, blocks = done[-1]
        return times[blocks][index]

    return tuning.fastest(OLD, list(times), [trial(0), trial(1)], measure, lines.append), lines


def test_the_fastest_over_both_shapes_is_taken() -> None:
    best, lines = choose({OLD: [1.0, 4.0], A_: [0.5, 6.0], B_: [0.9, 3.6], C_: [0.95, 3.7]})
    assert best == B_
    assert lines[0] == "  16 x 64, 4 warps, 2 stages: 1.0000, 4.0000 ms, the present one"
    assert lines[2] == "  64 x 64, 4 warps, 2 stages: 0.9000, 3.6000 ms, 0.900 of the present one"
    assert lines[-1] == "  -> 64 x 64, 4 warps, 2 stages"


@pytest.mark.parametrize(("time", "expected"), [(0.981, OLD), (0.979, A_), (1.2, OLD)])
def test_a_small_gain_changes_nothing(time: float, expected: Blocks) -> None:
    assert choose({OLD: [1.0, 1.0], A_: [time, time]})[0] == expected


def test_what_differs_or_does_not_fit_is_left_out() -> None:
    times = {OLD: [1.0, 1.0], A_: [0.1, 0.1], B_: [0.1, 0.1], C_: [0.9, 0.9]}
    best, lines = choose(times, {A_: 1.03, B_: None, C_: 1.01})
    assert best == C_
    assert lines[1] == "  32 x 64, 4 warps, 2 stages: left out, its result differs by 3.0e-02"
    assert "left out, out of resource: shared memory, Required: 300000" in lines[2]
    assert choose(times, {A_: float("nan"), B_: None, C_: float("inf")})[0] == OLD


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, capability: Any) -> None:
    """A pretended H100 whose attention kernels run fastest with the fewest rows; trials run nothing."""
    capability(9, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "H100 of paper")
    monkeypatch.setattr(
        tuning, "_trials", lambda *_: [lambda blocks: [torch.tensor(blocks.block, device="cpu") * 0 + 1]]
    )


@pytest.mark.usefixtures("device")
def test_tune_writes_the_kernels_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Blocks] = []

    def rows(call: Any) -> float:
        seen.append(call.args[0])
        return float(call.args[0].block[0])

    monkeypatch.setattr(tuning, "_difference", lambda *_: 0.0)
    lines: list[str] = []
    out = tmp_path / "new.json"
    assert tune(["gated_attention.keys"], out, lines.append, commit="abc", measure=rows) == out
    before, after = load(tuning.TUNED / "sm90.json"), load(out)
    keys = before.kernels["gated_attention.keys"]
    for size in ("64", "128", "256", "fp32"):
        fewest = min(choice.block[0] for choice in [keys[size], *tuning.candidates("gated_attention.keys", size)])
        assert after.kernels["gated_attention.keys"][size].block[0] == fewest
    assert after.kernels["gated_attention.keys"] != keys
    for kernel in set(KERNELS) - {"gated_attention.keys"}:
        assert after.kernels[kernel] == before.kernels[kernel]
    assert after.tuned_with["device"] == "H100 of paper"
    assert after.tuned_with["commit"] == "abc"
    assert after.tuned_with["how"] == "tidegate kernels tune"
    assert lines[0] == "gated_attention.keys 64"
    assert set(tuning.candidates("gated_attention.keys", "256")) < set(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.usefixtures("device")
def test_what_is_tuned_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def report(line: str) -> None:
        if line.startswith("gated_attention.queries"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_difference", lambda *_: 0.0)
    out = tmp_path / "new.json"
    kernels = ["gated_attention.keys", "gated_attention.queries"]
    with pytest.raises(KeyboardInterrupt):
        tune(kernels, out, report, commit="abc", measure=lambda call: call() and float(call.args[0].block[0]))
    before, after = load(tuning.TUNED / "sm90.json"), load(out)
    assert after.kernels["gated_attention.keys"] != before.kernels["gated_attention.keys"]
    assert after.kernels["gated_attention.queries"] == before.kernels["gated_attention.queries"]


@pytest.mark.usefixtures("device")
def test_a_file_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    out.write_text("before")

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TuningError, match=r"new\.json: cannot be written \(no space left\); choose another"):
        tune(["gated_attention.keys"], out, lambda _: None, commit="abc", measure=lambda _: 1.0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.json", "before")]


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit_the_kernel_and_hold_the_shipped_entry(kernel: str) -> None:
    sides, sizes = KERNELS[kernel]
    shipped = load(tuning.TUNED / "sm90.json").kernels[kernel]
    for size in sizes:
        choices = tuning.candidates(kernel, size)
        assert len(set(choices)) == len(choices) <= 16
        assert all(len(choice.block) == len(sides) for choice in choices)
        assert (shipped[size] in choices) == (size != "fp32")


OTHERS = {  # kernels that a trial runs as well, with the blocks that they have
    "gated_attention.forward": [],
    "gated_attention.keys": ["gated_attention.queries"],
    "gated_attention.queries": ["gated_attention.keys"],
    "moe_experts.two_products": [],
}


@pytest.mark.parametrize(("kernel", "others"), OTHERS.items(), ids=OTHERS.keys())
def test_a_trial_gives_its_kernel_the_blocks(kernel: str, others: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run on a device, at small shapes; blocks that agree pass the check."""
    device = torch.empty(0).device
    if kernel == "moe_experts.two_products":
        trial, blocks = tuning._products(40, 24, 40, 3, 2, device), [(32, 16, 16), (16, 32, 32)]
    else:
        trial, blocks = tuning._attention(kernel, 1, 20, 256, device, 15), [(16, 32), (32, 16)]
    asked: list[str] = []
    for module in (attention, experts):
        monkeypatch.setattr(module, "blocks_of", lambda name, *rest: asked.append(name) or blocks_of(name, *rest))
    one, other = (trial(Blocks(sides, 4, 1)) for sides in blocks)
    assert asked == others * 2
    assert tuning._difference(one, other) < tuning._CLOSE / 2
    assert tuning._difference([x * 1.03 for x in one], other) > tuning._CLOSE


def test_given_blocks_reach_the_kernels() -> None:
    """Results agree, and are not bit for bit the same: another order of sums."""
    q, k, v, g = (torch.randn(1, 70, heads, 16) for heads in (2, 1, 1, 2))
    one, other = Blocks((32, 32), 4, 1), Blocks((16, 64), 4, 1)
    results = []
    for blocks in (one, other):
        y, _, lse = attention.forward(q, k, v, None, None, None, blocks)
        results.append([y, *attention.backward(g, q, k, v, y, lse, None, None, blocks, blocks)[:3]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(actual, expected)
    ends = torch.tensor([3, 70], dtype=torch.int32)
    a, b = torch.randn(70, 72).bfloat16(), torch.randn(2, 72, 40).bfloat16()
    results = [experts.two_products(a, b, a, b, ends, Blocks(s, 4, 2)) for s in ((16, 32, 16), (32, 16, 64))]
    torch.testing.assert_close(*results, rtol=2**-7, atol=1e-2)
