"""The command line: what it prints, that a user's mistake ends with status 2 and one message, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest

from tidegate import cli
from tidegate.config import load
from tidegate.data.config import TrainedTokenizer
from tidegate.data.tokenizer import train_tokenizer
from tidegate.model.flops import total
from tidegate.train.job import Job

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo.yaml"

JOB = """
name: tiny
model:
  vocab_size: 300
  width: 16
  num_layers: 1
  attention: {num_heads: 2, num_kv_heads: 1, head_dim: 8}
  ffn: {kind: moe, num_experts: 3, top_k: 2, expert_dim: 8}
data:
  sequence_length: 16
  tokenizer: {kind: train, vocab_size: 300}
  eval_sequences: 1
  domains: [{name: words, paths: ["{job}/text/*.txt"], held_out: 0.2}]
optimizer: {schedule: {kind: cosine, peak: 1e-3}}
train: {tokens: 2048, batch_tokens: 1024, micro_batch: 1, precision: fp32}
"""


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("TIDEGATE_STATE", raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with job.yaml and its text."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        text = " ".join(f"w{number * word % 37}" for word in range(60))
        (tmp_path / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tidegate(monkeypatch, capsys) -> Callable[..., Ended]:
    """Run the command line in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tidegate", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ended(ended.value.code or 0, out, err)

    return run


def process(*arguments: str, timeout_s: float = 60, **environment: str) -> Ended:
    """Run the command line as a user does."""
    code = "from tidegate.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | environment,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def leaves_nothing(state: Path) -> bool:
    """No run folder, no checkpoint and no MLflow store."""
    return not any((state / name).exists() for name in ("runs", "checkpoints", "mlflow"))


# --- help ----------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    heavy = ("torch", "ray", "mlflow", "pydantic", "deepspeed", "numpy", "datasets", "yaml")
    code = (
        "import sys\nsys.argv = ['tidegate', '--help']\nfrom tidegate.cli import main\n"
        f"try:\n    main()\nexcept SystemExit:\n    print([n for n in {heavy} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: tidegate [OPTIONS] COMMAND [ARGS]..." in done.stdout


def test_help_answers_at_once():
    times = []
    for _ in range(3):
        started = time.monotonic()
        assert process("--help").status == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1, times


def test_help_names_every_command(tidegate):
    shown = tidegate("--help")
    assert shown.status == 0
    for command in ("train", "show", "schema", "tokenize", "doctor", "kernels", "bench", "ui"):
        assert f" {command} " in shown.out
        assert tidegate(command, "--help").status == 0


# --- a user's mistake ----------------------------------------------------------------------------------------


def test_a_mistake_in_a_real_process(folder):
    (folder / "job.yaml").write_text(JOB.replace("num_experts: 3", "num_expert: 3"), encoding="utf-8")
    ended = process("train", "job.yaml")
    assert ended == Ended(
        2,
        "",
        "tidegate: job.yaml: model.ffn.num_experts: Field required\n"
        "job.yaml: model.ffn.num_expert: unknown field (got 3); did you mean 'num_experts'?\n",
    )
    assert not (folder / ".tidegate" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "gone.yaml"], "no such job file: gone.yaml"),
        (["train", "gone.yaml"], "no such job file: gone.yaml"),
        (["tokenize", "gone.yaml"], "no such job file: gone.yaml"),
        (["bench", "gone.yaml"], "no such job file: gone.yaml"),
        (["bench", "job.yaml", "--steps", "0"], "--steps 0: needs at least one"),
        (
            ["bench", "job.yaml", "--against", "job.yaml"],
            "--against job.yaml: not a result of tidegate bench "
            "(job.yaml: not JSON (Expecting value: line 2 column 1 (char 1)))",
        ),
        (["train"], "name a job file, or --resume RUN"),
        (["show", "job.yaml", "--set", "train.seed"], "--set train.seed: write it as a.b=value"),
        (
            ["show", "job.yaml", "--set", "train.sede=1"],
            "--set train.sede=1: train.sede: unknown field (got 1); did you mean 'seed'?",
        ),
        (
            ["train", "job.yaml", "--workers", "3", "--set", "resources.workers=2"],
            "job.yaml, --set resources.workers=3: train.batch_tokens=1024 is 64 sequences, which train.micro_batch=1 x "
            "resources.workers=3 does not divide; change one of the three",
        ),
        (
            ["train", "job.yaml", "--resume", "tiny-1"],
            "job.yaml and --resume tiny-1 exclude each other; change a resumed run with --set",
        ),
        (["train", "job.yaml", "--local", "--address", "auto"], "--local and --address auto exclude each other"),
    ],
)
def test_a_mistake_is_one_message_on_standard_error(folder, tidegate, arguments, expected):
    assert tidegate(*arguments) == Ended(2, "", f"tidegate: {expected}\n")
    assert leaves_nothing(folder / ".tidegate")


def test_a_wrong_option_is_typers_usage_error(tidegate):
    ended = tidegate("train", "--wokers", "3")
    assert (ended.status, ended.out) == (2, "")
    assert "--workers" in ended.err


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def bug() -> None:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "app", bug)
    with pytest.raises(ValueError, match=r"^ours$"):
        cli.main()


# --- commands ------------------------------------------------------------------------------------------------


def test_the_schema_takes_the_demo_and_refuses_an_unknown_key(tidegate):
    schema = json.loads(tidegate("schema").out)
    jsonschema.validators.validator_for(schema).check_schema(schema)
    document = load(DEMO, Job).config.model_dump(mode="json")
    jsonschema.validate(document, schema)
    for path in ((), ("train",), ("model", "attention", "gate"), ("data", "domains", 0)):
        wrong = json.loads(json.dumps(document))
        section = wrong
        for key in path:
            section = section[key]
        section["no_such_key"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    with pytest.raises(jsonschema.ValidationError, match="0 is less than the minimum of 1"):
        jsonschema.validate(document | {"resources": {"workers": 0}}, schema)


def test_show_prints_the_totals(tidegate):
    ended = tidegate("show", str(DEMO), "--set", "model.ffn.num_experts=10")
    job: Job = load(DEMO, Job, ["model.ffn.num_experts=10"]).config
    cost = total(job.model, job.data.sequence_length)
    assert ended.status == 0
    (row,) = (line for line in ended.out.splitlines() if line.startswith("│ total"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:] == [
        f"{cost.params:,}",
        f"{cost.active_params:,}",
        "100.0%",
        f"{cost.flops_per_token:,.0f}",
        "100.0%",
    ]


def test_tokenize_and_doctor_run(folder, tidegate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a cell of doctor's table is one line
    ended = tidegate("tokenize", "job.yaml", "--state-dir", "state")
    assert ended.status == 0
    assert "│ words" in ended.out
    assert len(list((folder / "state" / "data").glob("tokens-*"))) == 1
    assert leaves_nothing(folder / "state")
    ended = tidegate("tokenize", "job.yaml", "--bench", "--state-dir", "state")
    assert ended.status == 0
    assert re.search(r"tokenizing: [\d,]+ tokens/s a core, [\d.]+ MB/s of text", ended.out)
    assert re.search(
        r"loading: [\d,]+ tokens/s of one rank of 1, sequence 16, micro-batch 1, accumulation 64", ended.out
    )
    ended = tidegate("doctor", "--state-dir", "state")
    assert ended.status == ("FAIL" in ended.out)
    assert "layout version 1" in ended.out
    (folder / "state" / "VERSION").write_text("9\n", encoding="utf-8")
    ended = tidegate("doctor", "--state-dir", "state")
    assert ended.status == 1
    assert "FAIL" in ended.out


def test_kernels_show_names_the_file_and_its_entries(tidegate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = tidegate("kernels", "show")
    assert ended.status == 0
    assert ended.out.splitlines()[0].endswith("default.json")
    assert "moe_experts.two_products\n  all  64 x 128 x 64, 4 warps, 3 stages\n" in ended.out


def test_kernels_tune_needs_a_device_and_a_kernel_that_is_there(tidegate, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, expected in (
        ([], "tuning needs a CUDA device, this machine has none"),
        (["--kernel", "swiglu"], "kernel swiglu: unknown, one of gated_attention.forward, "),
    ):
        ended = tidegate("kernels", "tune", "--out", str(tmp_path / "new.json"), *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith(f"tidegate: {expected}")
        assert len(ended.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- known to fail before anything starts --------------------------------------------------------------------


def test_a_gpu_job_on_a_machine_without_one(folder, tidegate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tidegate("train", "job.yaml", "--set", "resources.gpu=true") == Ended(
        2,
        "",
        "tidegate: resources.gpu=True, but this machine has no CUDA device; use --set resources.gpu=false\n",
    )
    assert leaves_nothing(folder / ".tidegate")


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ((), "add --workers 1"),
        (
            ("--set", "parallel.expert=2", "--set", "model.ffn.num_experts=4"),
            "add --workers 1 --set parallel.expert=1",
        ),
    ],
)
def test_local_with_two_workers(folder, tidegate, overrides, hint):
    assert tidegate("train", "job.yaml", "--local", "--workers", "2", *overrides) == Ended(
        2, "", f"tidegate: --local runs one process, but resources.workers=2; {hint}\n"
    )
    assert leaves_nothing(folder / ".tidegate")


@pytest.mark.parametrize("storage", [None, "elsewhere/deep"])
def test_no_space_left(folder, tidegate, monkeypatch, storage):
    looked: list[Path] = []

    def full(path: Path) -> object:
        looked.append(Path(path))
        return namedtuple("Usage", "free")(free - 1)

    params = total(load("job.yaml", Job).config.model, 16).params
    free = params * 16 * (5 + 2 + 1)
    monkeypatch.setattr("shutil.disk_usage", full)
    arguments = ["train", "job.yaml", "--local", "--set", "checkpoint={keep_last: 5, keep_best: {n: 2}}"]
    ended = tidegate(*arguments, *(["--set", f"checkpoint.storage={storage}"] if storage else []))
    where = folder / (storage or ".tidegate/checkpoints")
    assert ended == Ended(
        2,
        "",
        f"tidegate: {where}: no space left for the checkpoints: {free / 1e9:.1f} GB for 7 that stay "
        f"(checkpoint.keep_last=5) and 1 being written; {free / 1e9:.1f} GB are free\n",
    )
    assert looked == [folder if storage else folder / ".tidegate"]
    assert leaves_nothing(folder / ".tidegate")
    free += 1
    monkeypatch.setattr("tidegate.launch.run.prepare_data", lambda *_: pytest.fail("reached the data"))
    with pytest.raises(pytest.fail.Exception, match="reached the data"):
        tidegate(*arguments)


def test_no_space_left_for_the_checkpoints_of_all_trials(folder, tidegate, monkeypatch):
    """The job as it stands, three candidates, and all reruns that there may be."""
    search = "\nsearch: {space: {balance.loss_weight: {choice: [0.1, 0.2, 0.3]}}, trials: 3, finalists: 2, seeds: 3}\n"
    (folder / "job.yaml").write_text(JOB + search, encoding="utf-8")
    job = load("job.yaml", Job).config
    assert job.search is not None
    runs = 1 + 3 + job.search.most_reruns
    needed = total(job.model, 16).params * 16 * (runs * 2 + 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(needed - 1))
    assert tidegate("tune", "job.yaml", "--concurrent", "3") == Ended(
        2,
        "",
        f"tidegate: {folder / '.tidegate/checkpoints'}: no space left for the checkpoints: {needed / 1e9:.1f} GB "
        f"for 2 that stay of each of {runs} runs (checkpoint.keep_last=2) and 3 being written; {needed / 1e9:.1f} GB "
        "are free\n",
    )
    assert not (folder / ".tidegate/sweeps").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(needed))
    monkeypatch.setattr("tidegate.tune.sweep._connect", lambda *_: pytest.fail("reached Ray"))
    with pytest.raises(pytest.fail.Exception, match="reached Ray"):
        tidegate("tune", "job.yaml", "--concurrent", "3")


def test_a_vocabulary_larger_than_the_models(folder, tidegate):
    built = train_tokenizer(TrainedTokenizer(vocab_size=300), [p.read_text() for p in (folder / "text").iterdir()])
    (folder / "tokenizer.json").write_bytes(built.document)
    size = built.tokenizer.get_vocab_size()
    arguments = ["train", "job.yaml", "--local", "--set", f"model.vocab_size={size - 1}", "--set"]
    ended = tidegate(*arguments, "data.tokenizer={kind: file, path: '{job}/tokenizer.json'}")
    assert ended.status == 2
    (dataset,) = (folder / ".tidegate" / "data").glob("tokens-*")
    assert ended.err == (
        f"tidegate: {dataset}: the tokenizer has {size} tokens, more than model.vocab_size={size - 1}\n"
    )
    assert leaves_nothing(folder / ".tidegate")


def test_a_state_directory_of_another_version(folder, tidegate):
    (folder / "state").mkdir()
    (folder / "state" / "VERSION").write_text("0\n", encoding="utf-8")
    assert tidegate("train", "job.yaml", "--state-dir", "state") == Ended(
        2,
        "",
        f"tidegate: {folder / 'state' / 'VERSION'}: state directory of layout version '0', this Tidegate writes '1'; "
        "choose another with --state-dir\n",
    )
    assert [path.name for path in (folder / "state").iterdir()] == ["VERSION"]


def test_a_state_directory_that_is_a_file(folder, tidegate):
    ended = tidegate("train", "job.yaml", "--state-dir", "job.yaml")
    assert ended.status == 2
    assert ended.err.startswith(f"tidegate: {folder / 'job.yaml'}: the state directory cannot be used: ")


def test_resuming_an_unknown_run_lists_those_there_are(folder, tidegate):
    runs = folder / ".tidegate" / "runs"
    assert tidegate("train", "--resume", "tiny-9") == Ended(
        2, "", f"tidegate: tiny-9: no such run in {runs}; there are: none\n"
    )
    for name in ("tiny-2", "tiny-1", "broken-1"):
        (runs / name).mkdir(parents=True)
    for name in ("tiny-2", "tiny-1"):
        (runs / name / "job.json").write_text("{}", encoding="utf-8")
    assert tidegate("train", "--resume", "tiny-9") == Ended(
        2, "", f"tidegate: tiny-9: no such run in {runs}; there are: tiny-1, tiny-2\n"
    )
    assert not (folder / ".tidegate" / "mlflow").exists()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_ray_cluster_that_is_not_there(folder, address):
    """ray.init itself waits two minutes for a dead address, and then ends the process with status 15."""
    started = time.monotonic()
    ended = process("train", "job.yaml", "--address", address)
    assert time.monotonic() - started < 30
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith(f"tidegate: --address {address}: no Ray cluster answers (")
    assert "refused" in ended.err
    assert "Traceback" not in ended.err
    assert leaves_nothing(folder / ".tidegate")


@pytest.mark.ray
@pytest.mark.slow
def test_more_workers_than_the_machine_has(folder):
    too_many = ["--workers", "64", "--set", "resources.cpus_per_worker=1000"]
    ended = process("train", "job.yaml", *too_many, timeout_s=120, RAY_AUTH_MODE="disabled")
    assert ended.status == 2
    message = ended.err.splitlines()[-1]
    assert message.startswith("tidegate: resources.workers=64 needs 64000 CPUs, as 64 x 1000 CPU; this machine has ")
    assert "Traceback" not in ended.err
    assert leaves_nothing(folder / ".tidegate")
