"""Faults injected into real training runs, each of which must end as if nothing had happened.

    python tests/chaos/inject.py 200 --out docs/chaos.md

Each injection draws a layout, a kill point, a fault and a moment from its seed. It trains a tiny job in real processes
(gloo, DeepSpeed, the real checkpoint store on disk) until the fault strikes, starts it again until it ends by itself,
and compares with a run of the same layout that nothing happened to: every recorded number of every step and every byte
of the last checkpoint. Beside that no process may be left, and no file but the checkpoints that the job keeps.
`--seed N` repeats one injection.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

STEPS, SAVE_EVERY = 14, 2
LONGEST_S = 90.0
"""A start of a run that takes longer counts as hung."""


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "one rank, fp32": Layout(1, ("parallel.zero_stage=1",)),
    "one rank, bf16": Layout(1, ("train.precision=bf16", "optimizer.state=bf16")),
    "DP 2, ZeRO 2": Layout(2, ("parallel.zero_stage=2",)),
    "EP 2, ZeRO 1": Layout(2, ("parallel.expert=2",)),
    "EP 2, bf16": Layout(2, ("parallel.expert=2", "train.precision=bf16")),
    "EP 2 x DP 2": Layout(4, ("parallel.expert=2", "train.micro_batch=1")),
}
COMPUTE_FAULTS = ("killed", "power cut", "exception", "hang", "killed, then a byte flipped")
WRITE_FAULTS = ("killed", "power cut", "disk full", "killed, then a byte flipped")
POINTS = {
    "forward": COMPUTE_FAULTS,
    "all-to-all": COMPUTE_FAULTS,
    "backward": COMPUTE_FAULTS,
    "before the optimizer": COMPUTE_FAULTS,
    "after the optimizer": COMPUTE_FAULTS,
    "evaluation": COMPUTE_FAULTS,
    "data epoch change": ("killed", "power cut", "exception"),
    "checkpoint file opened": WRITE_FAULTS,
    "checkpoint file half-written": WRITE_FAULTS,
    "before the manifest": WRITE_FAULTS,
    "after the manifest": ("killed", "power cut", "killed, then a byte flipped"),
    "retention delete": ("killed", "power cut"),
}


class Fault(NamedTuple):
    layout: str
    point: str
    kind: str
    rank: int
    passing: int
    """The point is passed so many times before."""


def draw(seed: int) -> Fault:
    """Points in turn, so that each is tried as often; everything else at random."""
    chance = random.Random(seed)
    point = list(POINTS)[seed % len(POINTS)]
    fits = [name for name in LAYOUTS if point != "all-to-all" or name.startswith("EP")]
    layout = chance.choice(fits)
    passings = {"forward": 25, "backward": 25, "all-to-all": 60, "checkpoint file opened": 40, "evaluation": 3}
    passings |= {"checkpoint file half-written": 40, "data epoch change": 2, "retention delete": 6}
    return Fault(
        layout,
        point,
        chance.choice(POINTS[point]),
        # One rank writes manifests and deletes.
        0 if "manifest" in point or point == "retention delete" else chance.randrange(LAYOUTS[layout].ranks),
        chance.randrange(passings.get(point, 5)),
    )


# --- in a rank ---------------------------------------------------------------------------------------------------


class Striker:
    """Counts how often this rank passes the fault's point, and strikes in time."""

    def __init__(self, fault: Fault, folder: Path) -> None:
        self._fault, self._folder = fault, folder
        self._left = fault.passing
        self._lock = threading.Lock()

    def passes(self, point: str) -> None:
        if point != self._fault.point:
            return
        with self._lock:
            self._left -= 1
            if self._left != -1:
                return
        (self._folder / "struck").write_text(str(time.time()))
        if self._fault.kind.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault.kind == "power cut":
            (self._folder / "cut").touch()
        if self._fault.kind in ("power cut", "hang"):
            time.sleep(2 * LONGEST_S)
        if self._fault.kind == "disk full":
            raise OSError(errno.ENOSPC, "planted")
        raise RuntimeError("planted")

    def before(self, owner: Any, name: str, point: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)

        def planted(*arguments: Any, **keywords: Any) -> Any:
            if when(*arguments):
                self.passes(point)
            return real(*arguments, **keywords)

        setattr(owner, name, planted)

    def after(self, owner: Any, name: str, point: str, when: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def planted(*arguments: Any, **keywords: Any) -> Any:
            asked = when(*arguments)
            result = real(*arguments, **keywords)
            if asked:
                self.passes(point)
            return result

        setattr(owner, name, planted)


def plant(fault: Fault, folder: Path) -> None:
    """Put the striker where the point is; nothing else of the program is changed."""
    from tidegate.data.loader import TrainLoader
    from tidegate.parallel.all_to_all import Way
    from tidegate.parallel.engine import Engine
    from tidegate.train import loop
    from tidegate.train.checkpoint_store import MANIFEST, _Recorded
    from tidegate.train.storage import Storage

    striker = Striker(fault, folder)

    def last_micro_batch(engine: Engine) -> bool:
        return bool(engine._engine.is_gradient_accumulation_boundary())

    def is_manifest(storage: Storage, name: str, *_: Any) -> bool:
        return name.endswith(f"{MANIFEST}.writing")

    def is_of_checkpoint(storage: Storage, name: str, mode: str) -> bool:
        return mode == "wb" and name.startswith("step_")

    def new_epoch(loader: TrainLoader, domain: int, position: int) -> bool:
        from tidegate.data.packing import num_windows

        windows = num_windows(len(loader.dataset.stream(domain, "train")), loader.config.sequence_length)
        return position > 0 and position % windows == 0

    striker.before(Engine, "forward", "forward", lambda engine, *_: engine.model.training)
    striker.before(Way, "begin", "all-to-all")
    striker.before(Engine, "backward", "backward")
    striker.before(Engine, "step", "before the optimizer", last_micro_batch)
    striker.after(Engine, "step", "after the optimizer", last_micro_batch)
    striker.before(loop, "evaluate", "evaluation")
    striker.before(TrainLoader, "_window", "data epoch change", new_epoch)
    striker.before(Storage, "_open", "checkpoint file opened", is_of_checkpoint)
    striker.after(_Recorded, "write", "checkpoint file half-written", lambda *_: True)
    striker.before(Storage, "_rename", "before the manifest", is_manifest)
    striker.after(Storage, "_rename", "after the manifest", is_manifest)
    striker.before(Storage, "_remove", "retention delete")


def rank_main(rank: int, job_file: str, layout: Layout, folder: Path, start: int, fault: Fault | None) -> None:
    """One rank's life: train to the end, from the newest checkpoint that is there."""
    sys.stdout = sys.stderr = (folder / f"log_{start}_{rank}.txt").open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.ranks), TMPDIR=str(folder / "tmp"))
    os.environ["LOCAL_WORLD_SIZE"] = str(layout.ranks)
    tempfile.tempdir = None

    import torch

    from tidegate.config import load
    from tidegate.data import prepare
    from tidegate.train import watchdog
    from tidegate.train.job import Job
    from tidegate.train.loop import World, train

    torch.set_num_threads(1)
    watchdog._GRACE_S = 1.0
    meeting = f"file://{folder / f'meeting_{start}'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=layout.ranks)
    job = load(job_file, Job, [*layout.overrides, f"resources.workers={layout.ranks}"]).config
    dataset = prepare(job.data, cache_dir=Path(job_file).parent / "data", job_dir=Path(job_file).parent)
    if fault is not None and fault.rank == rank:
        plant(fault, folder)
    records = (folder / f"records_{start}.jsonl").open("a", buffering=1)

    def record(record: Any) -> None:
        records.write(json.dumps([record.step, record.tokens, time.time(), record.metrics]) + "\n")

    train(job, World(dataset, str(folder / "checkpoints"), record, print, lambda: False))


# --- around the ranks --------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """All that a run leaves, of which nothing may hang on what happened to it."""

    numbers: dict[tuple[int, str], set[float]]
    """By step and metric; more than one value where a step done again came out otherwise."""
    tokens: dict[int, set[int]]
    state: dict[str, str]
    """SHA-256 by file of the last checkpoint."""
    files: set[str]
    """In the folder of the run, less the names of attempts."""


class Recovery(NamedTuple):
    seconds: float
    """From the start of the processes to the first step that had not been done before."""
    steps: int
    """Done again."""


class Run:
    def __init__(self, context: Any, job_file: Path, layout: Layout, folder: Path) -> None:
        self._context, self._job_file, self._layout, self._folder = context, job_file, layout, folder
        (folder / "tmp").mkdir(parents=True)
        self._starts = 0
        self.began = 0.0

    def start(self, fault: Fault | None) -> bool:
        """Whether all ranks came to the end by themselves."""
        self.began = time.time()
        arguments = (str(self._job_file), self._layout, self._folder, self._starts, fault)
        ranks: list[BaseProcess] = [
            self._context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(self._layout.ranks)
        ]
        self._starts += 1
        for process in ranks:
            process.start()
        deadline = time.monotonic() + LONGEST_S
        try:
            while any(process.is_alive() for process in ranks):
                if (self._folder / "cut").exists():
                    (self._folder / "cut").unlink()
                    self._kill(ranks)
                assert time.monotonic() < deadline, "a rank hangs"
                time.sleep(0.01)
        finally:
            self._kill(ranks)
        return all(process.exitcode == 0 for process in ranks)

    @staticmethod
    def _kill(ranks: list[BaseProcess]) -> None:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()

    def flip_a_byte(self, chance: random.Random) -> None:
        """Of any file of the newest checkpoint that is complete, its manifest too; of none if it is the only one."""
        complete = sorted(self._folder.glob("checkpoints/step_*/manifest.json"))
        if len(complete) < 2:
            return
        path = chance.choice(sorted(p for p in complete[-1].parent.rglob("*") if p.is_file() and p.stat().st_size))
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

    def records(self, start: int) -> list[tuple[int, int, float, dict[str, float]]]:
        path = self._folder / f"records_{start}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(json.loads(line)) for line in lines if line.endswith("]")]

    def recovery(self) -> Recovery:
        """Of the last start."""
        done = {step for start in range(self._starts - 1) for step, *_ in self.records(start)}
        last = self.records(self._starts - 1)
        new = [moment for step, _, moment, _ in last if step > max(done, default=0)]
        again = {step for step, *_ in last} & done
        return Recovery((min(new) if new else time.time()) - self.began, len(again))

    def seen(self) -> Seen:
        numbers: dict[tuple[int, str], set[float]] = defaultdict(set)
        tokens: dict[int, set[int]] = defaultdict(set)
        for start in range(self._starts):
            for step, at, _, metrics in self.records(start):
                tokens[step].add(at)
                for name, value in metrics.items():
                    if not name.startswith(("speed/", "checkpoint/", "system/", "time/")):
                        numbers[step, name].add(repr(value))
        newest = sorted(self._folder.glob("checkpoints/step_*"))[-1]
        manifest = json.loads((newest / "manifest.json").read_text())
        state = {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".pt")}
        files = {
            path.relative_to(self._folder)
            for place in ("checkpoints", "tmp")
            for path in (self._folder / place).rglob("*")
        }
        plain = {"/".join(part.split("-")[0] for part in path.parts) for path in files if "stacks" not in str(path)}
        return Seen(dict(numbers), dict(tokens), state, plain)


def problems(found: Seen, expected: Seen) -> list[str]:
    """What differs from a run that nothing happened to."""
    said = []
    if found.tokens != expected.tokens:
        said.append(f"steps and tokens {found.tokens} are not {expected.tokens}")
    wrong = [key for key in expected.numbers if found.numbers.get(key) != expected.numbers[key]]
    if wrong or found.numbers.keys() - expected.numbers.keys():
        said.append(f"{len(wrong)} recorded numbers differ, the first is {wrong[:1]}")
    if found.state != expected.state:
        other = sorted(name for name in expected.state if found.state.get(name) != expected.state[name])
        said.append(f"files of the last checkpoint differ: {other}")
    if found.files != expected.files:
        said.append(f"files left: {sorted(found.files ^ expected.files)}")
    return said


class Result(NamedTuple):
    seed: int
    fault: Fault
    struck: bool
    problems: list[str]
    recovery: Recovery


def inject(context: Any, seed: int, job_file: Path, folder: Path, expected: Seen) -> Result:
    """One fault, and the run until its end."""
    fault = draw(seed)
    run = Run(context, job_file, LAYOUTS[fault.layout], folder)
    try:
        ended = run.start(fault)
        struck = (folder / "struck").exists()
        said = (
            []
            if struck != ended
            else ["the run ended by itself though it was struck" if struck else "it failed by itself"]
        )
        if fault.kind.endswith("flipped"):
            run.flip_a_byte(random.Random(seed))
        if not ended and not run.start(None):
            said.append("it does not resume")
        found = [] if said else problems(run.seen(), expected)
        return Result(seed, fault, struck, said + found, run.recovery())
    except AssertionError as error:
        return Result(seed, fault, (folder / "struck").exists(), [str(error)], Recovery(0.0, 0))


def write_job(folder: Path) -> Path:
    """Two small domains, one of which ends several times in a run."""
    chance = random.Random(0)
    for name, words, lines in (("letters", "abcdefgh", 4000), ("digits", "0123456789", 150)):
        text = "\n".join("".join(chance.choices(words, k=7)) for _ in range(lines))
        (folder / f"{name}.txt").write_text(text)
    domains = [{"name": name, "paths": [f"{{job}}/{name}.txt"], "held_out": 0.2} for name in ("letters", "digits")]
    batch = 512
    job = {
        "name": "chaos",
        "model": {
            "vocab_size": 300,
            "width": 32,
            "num_layers": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 16, "shared": {"num": 1}},
        },
        "balance": {"loss_weight": 0.01, "bias_rate": 0.001},
        "data": {
            "sequence_length": 64,
            "max_document_chars": 500,
            "eval_sequences": 2,
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "domains": domains,
        },
        "optimizer": {"schedule": {"kind": "cosine", "peak": 3e-3, "warmup_tokens": batch}, "gradient_clip": 0.5},
        "train": {
            "tokens": STEPS * batch,
            "batch_tokens": batch,
            "micro_batch": 2,
            "precision": "fp32",
            "log_every": 1,
            "eval_every": 5,
        },
        "checkpoint": {"every": SAVE_EVERY, "keep_last": 2},
        "guards": {"hang_after_s": 6.0},
    }
    path = folder / "chaos.yaml"
    path.write_text(json.dumps(job))
    return path


def table(results: list[Result]) -> str:
    rows = [
        "| kill point | faults | struck | survived | s to recover | steps done again |",
        "|---|---|---|---|---|---|",
    ]
    by_point: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_point[result.fault.point].append(result)
    for point, some in [*by_point.items(), ("all", results)]:
        struck = [result for result in some if result.struck]
        seconds = [result.recovery.seconds for result in struck] or [0.0]
        steps = [result.recovery.steps for result in struck] or [0]
        survived = sum(not result.problems for result in some)
        rows.append(
            f"| {point} | {len(some)} | {len(struck)} | {survived} | {statistics.median(seconds):.1f} (at most "
            f"{max(seconds):.1f}) | {statistics.median(steps):.0f} (at most {max(steps)}) |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", default=200, help="injections")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    seeds = (
        [arguments.seed] if arguments.seed is not None else range(arguments.first, arguments.first + arguments.number)
    )
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tidegate.train.loop", "tidegate.data", "tidegate.train.watchdog"])
    results: list[Result] = []
    expected: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory(prefix="tidegate-chaos-") as scratch:
        root = Path(scratch)
        job_file = write_job(root)
        for seed in seeds:
            fault = draw(seed)
            if fault.layout not in expected:
                run = Run(context, job_file, LAYOUTS[fault.layout], root / fault.layout)
                if not run.start(None):
                    raise SystemExit("\n".join(path.read_text() for path in (root / fault.layout).glob("log_*")))
                expected[fault.layout] = run.seen()
            folder = root / str(seed)
            result = inject(context, seed, job_file, folder, expected[fault.layout])
            results.append(result)
            said = "; ".join(result.problems) or ("survived" if result.struck else "not struck")
            print(f"{seed}: {', '.join(map(str, fault))}: {said}", flush=True)
            if result.problems:
                print("\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log_*"))), flush=True)
            shutil.rmtree(folder)
    print(table(results))
    if arguments.out:
        arguments.out.write_text(table(results) + "\n")
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
