"""`tidegate show` and `tidegate tokenize`: the numbers and marks that they print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tidegate.config import load
from tidegate.data import TokenDataset
from tidegate.launch.show import show_job, tokenize_job
from tidegate.launch.state import StateDir
from tidegate.model.flops import costs, total
from tidegate.train.job import Job

DEMO = Path(__file__).resolve().parents[3] / "jobs" / "demo.yaml"


@pytest.fixture
def shown(capsys):
    """`shown(path, *overrides)`: the lines that show_job prints."""

    def shown(path: Path, *overrides: str) -> list[str]:
        show_job(path, list(overrides))
        return capsys.readouterr().out.splitlines()

    return shown


def document(lines: list[str]) -> list[str]:
    return lines[: next(number for number, line in enumerate(lines) if line.startswith("┏"))]


def table(lines: list[str]) -> dict[str, list[str]]:
    """The first one."""
    lines = lines[: next(number for number, line in enumerate(lines) if line.startswith("└"))]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def marked(lines: list[str]) -> list[str]:
    return [line.strip().removesuffix("  # changed") for line in document(lines) if line.endswith("  # changed")]


def test_the_document_is_the_resolved_job(shown):
    lines = document(shown(DEMO, "train.seed=7"))
    assert Job.model_validate(yaml.safe_load("\n".join(lines))) == load(DEMO, Job, ["train.seed=7"]).config


def test_changes_are_marked_and_nothing_else(shown, tmp_path):
    (tmp_path / "base.yaml").write_text(DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "job.yaml").write_text(
        "extends: base.yaml\nname: other\ntrain: {precision: fp32, seed: 3}\noptimizer: {betas: [0.8, 0.9]}\n"
        "model: {ffn: {kind: dense, hidden_dim: 8}}\nparallel: {expert: 1}\n",
        encoding="utf-8",
    )
    assert marked(shown(DEMO)) == []
    assert marked(shown(tmp_path / "job.yaml", "data.domains.1.weight=3")) == [
        "name: other",
        "kind: dense",
        "hidden_dim: 8",
        "weight: 3.0",
        "betas: [0.8, 0.9]",
        "seed: 3",
        "expert: 1",
    ]


def test_memory_is_shown_by_part_and_adds_up(shown):
    lines = shown(DEMO.parent / "h100.yaml")
    rows = table(lines[next(number for number, line in enumerate(lines) if "memory of a GPU" in line) :])
    state = ["weights", "gradient sums", "master weights", "moments"]
    assert [*rows] == [*state, "activations", "working", "margin", "peak"]
    gib = [float(value) for (value,) in rows.values()]
    params = total(load(DEMO.parent / "h100.yaml", Job).config.model, 2048).params
    assert gib[:4] == pytest.approx([size * params / 2**30 for size in (2, 4, 4, 8)], abs=0.006)
    assert gib[-1] == pytest.approx(sum(gib[:-1]), abs=0.04)


def test_the_table_holds_every_cost_and_the_total(shown):
    job: Job = load(DEMO, Job).config
    rows, whole = costs(job.model, 256), total(job.model, 256)
    cells = table(shown(DEMO))
    for row in [*rows, whole]:
        found = next(cells[name] for name in cells if row.field.startswith(name) and name)
        assert found[:2] == [f"{row.params:,}", f"{row.active_params:,}"], row
        assert found[3] == f"{row.flops_per_token:,.0f}", row
    assert cells["total"][2] == cells["total"][4] == "100.0%"
    shares = [float(values[2].rstrip("%")) for name, values in cells.items() if name != "total" and values[2]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_the_summary_by_hand(shown):
    """The numbers of the demo, from its file: 1.2 M tokens in steps of 16 sequences of 256."""
    lines = shown(DEMO, "train.micro_batch=2", "resources.workers=4")
    cost = total(load(DEMO, Job).config.model, 256)
    assert (
        "layout: 4 workers, EP 2 x DP 2, ZeRO 1, fp32, PyTorch kernels; accumulation M=2, micro-batch 2, "
        "global batch 16 sequences = 4,096 tokens" in lines
    )
    tokens = 293 * 4096
    assert f"length: 293 steps, 1,200,128 tokens, {tokens / cost.active_params:.3g} tokens an active parameter" in lines
    assert f"training: {cost.flops_per_token * tokens:.3e} FLOPs" in lines
    assert any(line.startswith(f"checkpoint: about {cost.params * 16 / 1e9:.3g} GB") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "priced"),
    [
        ((), False),  # M = 1
        (("train.micro_batch=2",), True),
        (("train.micro_batch=2", "balance.counts=running"), False),
        (("train.micro_batch=2", "balance.scope=micro_batch"), False),
        (("train.micro_batch=2", "balance.loss_weight=0"), False),
        (("train.micro_batch=2", "parallel.expert=1", "model.ffn={kind: dense, hidden_dim: 8}"), False),
    ],
)
def test_the_counting_pass_is_priced_when_there_is_one(shown, overrides, priced):
    lines = [line for line in shown(DEMO, *overrides) if line.startswith("balance: ") and "forward" in line]
    assert len(lines) == priced
    if priced:
        flops = total(load(DEMO, Job).config.model, 256).flops_per_token * 293 * 4096 / 3
        assert "M=4" in lines[0]
        assert f"({flops:.3e})" in lines[0]
        assert "balance.counts=running" in lines[0]


def test_an_elastic_job_says_on_how_many_workers_it_may_run(shown):
    line = "elastic: as many workers as there is room for, of 2, 4"
    small = ("train.micro_batch=2", "parallel.expert=2")
    assert line in shown(DEMO, "resources.workers=4", "resources.min_workers=2", *small)
    assert not any(line.startswith("elastic") for line in shown(DEMO))


def test_show_imports_neither_ray_nor_deepspeed():
    code = (
        "import sys; from pathlib import Path; from tidegate.launch.show import show_job; "
        "show_job(Path(sys.argv[1]), []); print([n for n in ('ray', 'deepspeed', 'mlflow') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEMO)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_tokenize_says_what_the_shards_hold(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            text = " ".join(f"{name}{number * word % 37}" for word in range(60))
            (tmp_path / name / f"{number}.txt").write_text(text, encoding="utf-8")
    state = StateDir(tmp_path / "state")
    (tmp_path / "job.yaml").write_text(DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    overrides = [
        "data.domains=[{name: a, paths: ['{job}/a/*.txt'], held_out: 0.2}, {name: b, paths: ['{job}/b/*.txt']}]",
        "data.tokenizer.vocab_size=300",
        "data.sequence_length=16",
    ]
    tokenize_job(tmp_path / "job.yaml", overrides, state)
    first = capsys.readouterr().out
    assert "data: train tokenizer" in first
    (folder,) = (path for path in state.data.iterdir() if path.name.startswith("tokens-"))
    manifest = TokenDataset.open(folder).manifest
    assert str(folder) in first
    assert re.search(rf"tokenizer: train, {manifest.tokenizer.vocab_size} tokens of model\.vocab_size=4,096", first)
    cells = table(first.splitlines())
    assert list(cells) == ["a", "b", "total"]
    for domain in manifest.domains:
        splits = (domain.train, domain.held_out)
        assert cells[domain.name] == [f"{number:,}" for s in splits for number in (s.documents, s.tokens)]
    assert cells["a"][2] == "4", "a fifth of 20 documents is held out"
    assert cells["total"][1] == f"{sum(domain.train.tokens for domain in manifest.domains):,}"
    tokenize_job(tmp_path / "job.yaml", overrides, state)
    again = capsys.readouterr().out
    assert "data: train tokenizer" not in again, "the second call finds the shards"
    assert table(again.splitlines()) == cells


def test_unit_gates_say_what_they_keep(shown):
    """4 layers of 4 heads of 3 * 128 * 32 parameters, the third being the head's gate."""
    gates = "model.units={over: [heads], keep: 0.25, method: {kind: hard_concrete}, freeze_tokens: 600000}"
    lines = shown(DEMO, gates)
    assert (
        "unit gates: keep 0.25 of 16 units (heads, hard_concrete), 49,152 of 196,608 parameters; the mask is fixed at "
        "600,000 tokens"
    ) in lines
    assert table(lines)["units (hard_concrete)"][:2] == ["16", "0"]
    assert not any(line.startswith("unit gates") for line in shown(DEMO))
