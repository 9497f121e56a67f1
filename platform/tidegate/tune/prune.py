"""`tidegate prune`: iterative magnitude pruning with rewinding, as a chain of runs, and its control.

The dense run; then, round after round, the smallest of the weights left are masked, the others go back to what they
were at the rewind point, and training goes on from there; at last the last mask once more with other initial weights.
If that trains as well, the sparse structure is what matters, not the weights it was found with. Source: Frankle &
Carbin 2019 (arXiv 1803.03635), with rewinding as in Frankle et al. 2020 (arXiv 1912.05671).

<state>/prunes/<name>/
  sweep.json, trials/               as of a sweep: a file a run
  rewind/                           the dense run's weights at the rewind point, as `tidegate export` writes them
  masks/round_01.safetensors        what a round trains
  report.md, pruning.png
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tidegate.config import ConfigError, load
from tidegate.launch.export import export_run, open_checkpoint
from tidegate.launch.report import Reporter
from tidegate.launch.state import StateDir
from tidegate.model.masks import prunable, prune_smallest
from tidegate.track import finish_run, log_file, run_url
from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.job import Job
from tidegate.train.masks import MaskFile, write_masks
from tidegate.train.prune import PruneConfig
from tidegate.train.storage import Storage
from tidegate.tune.pictures import draw_pruning
from tidegate.tune.report import console_of_width
from tidegate.tune.run_trial import Task, left_out, open_parent, run_trial
from tidegate.tune.trials import Result, SweepFolder, SweepRecord, Trial

__all__ = ["PruneRequest", "prune_in_rounds"]

METRIC = "val/loss"


class PruneRequest(NamedTuple):
    """What the command line asked for."""

    job_file: Path | None
    """None when resuming."""
    overrides: Sequence[str]
    state: StateDir
    resume: str | None = None
    address: str | None = None


class _Chain(NamedTuple):
    folder: SweepFolder
    state: StateDir
    base: Job
    config: PruneConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def total(self) -> int:
        """Weights of the matrices that are pruned."""
        return sum(map(prod, self.shapes.values()))

    def kept(self, trial: Trial) -> int:
        """Of them, those that a run trains."""
        return self.config.kept(self.total, min(trial.number, self.config.rounds))


def prune_in_rounds(request: PruneRequest) -> SweepFolder:
    """Run what is left of a chain, new or resumed, and report.

    Raises:
        ConfigError: the job has no `prune:` section or changed since the chain began, or a run did not come to its
            end; the chain can be resumed then.
    """
    from tidegate.launch.ray_train import connect  # Ray takes seconds

    chain = _open(request)
    folder, base, record = chain.folder, chain.base, chain.folder.read()
    connect(request.address, base)
    without = left_out(base, request.address, request.state)
    console, say = console_of_width(), Reporter(base).say
    parent = open_parent(folder, base, request.state, say)
    say(f"chain {folder.name}: {len(record.trials)} runs; {run_url(parent)}")
    where = Path(record.job_file), record.overrides, folder.folder, request.state.root
    # On Ray's workers even if it is one: DeepSpeed starts once in a process.
    task = Task(*where, parent.run_id, METRIC, base.train.tokens, alone=False, judged=False, without=without)
    finished = False
    try:
        for trial in record.trials:
            if not any(result.trial == trial and result.status == "finished" for result in folder.results()):
                _run(chain, trial, task)
        _report(chain, console)
        for name in ("report.md", "pruning.png"):
            log_file(parent, folder.folder / name)
        finished = True
    finally:
        finish_run(parent, "FINISHED" if finished else "KILLED")
    return folder


def _open(request: PruneRequest) -> _Chain:
    prunes = request.state.root / "prunes"
    if request.resume is not None:
        folder = SweepFolder.existing(prunes, request.resume)
        record = folder.read()
        base = load(record.job_file, Job, [*record.overrides, *request.overrides]).config
        folder.refuse_another(base)
    else:
        assert request.job_file is not None
        base = load(request.job_file, Job, request.overrides).config
    if base.prune is None:
        raise ConfigError(f"{request.job_file}: has no prune: section, which says how much to prune (docs/prune.md)")
    if request.job_file is not None:
        folder = SweepFolder.new(prunes, base.name)
        (folder.folder / "masks").mkdir()
        folder.write(
            SweepRecord(
                job_file=str(request.job_file.absolute()),
                job=base.model_dump(mode="json"),
                overrides=tuple(request.overrides),
                budgets=(),
                trials=tuple(_trials(base, base.prune, folder.folder.absolute())),
            )
        )
    return _Chain(folder, request.state, base, base.prune, prunable(base.model, base.prune.over))


def _trials(base: Job, config: PruneConfig, folder: Path) -> Iterator[Trial]:
    """The dense run, the rounds, and the control."""
    rewind, seed = config.rewind_tokens, base.train.seed
    at: dict[str, Any] = {"checkpoint.at_tokens": rewind} if rewind else {}
    yield Trial(number=0, values={"prune": None, **at}, seed=seed, kind="base")
    begins: dict[str, Any] = {}
    if rewind:
        begins = {
            "train.init_from": str(folder / "rewind"),
            "train.from_tokens": rewind,
            "train.upcycle_noise": 0.0,
        }
    for number in range(1, config.rounds + 1):
        values = {"prune": None, "train.mask": str(_mask_file(folder, number)), **begins}
        yield Trial(number=number, values=values, seed=seed, kind="round")
    if config.control:
        fresh = {"train.init_from": None, "train.upcycle_noise": 0.0}
        values = {"prune": None, "train.mask": str(_mask_file(folder, config.rounds)), **fresh}
        yield Trial(number=config.rounds + 1, values=values, seed=seed + 1, kind="control")


def _mask_file(folder: Path, number: int) -> Path:
    return folder / "masks" / f"round_{number:02d}.safetensors"


def _run(chain: _Chain, trial: Trial, task: Task) -> None:
    """One run of the chain, to its end."""
    folder = chain.folder
    if trial.kind == "round":
        _prepare(chain, trial)
    known = [result for result in folder.results() if result.trial.number == trial.number]
    result = known[0] if known else Result(trial=trial, run="", status="proposed")
    folder.put(result.model_copy(update={"status": "running", "error": ""}))  # one that failed goes on
    run_trial(trial.number, task)
    result = folder.result(trial.number)
    if result.status != "finished":
        raise ConfigError(
            f"{folder.name}: run {trial.number} of the chain ({result.run or 'not begun'}) did not come to its end: "
            f"{result.error or 'it was stopped'}; tidegate prune --resume {folder.name} goes on with it"
        )


def _prepare(chain: _Chain, trial: Trial) -> None:
    """Write what a round begins with: the rewind point's weights, once, and its mask."""
    folder, rewind = chain.folder.folder, chain.folder.folder / "rewind"
    if chain.config.rewind_tokens and not rewind.exists():
        dense = chain.folder.result(0).run
        export_run(dense, chain.state, "tidegate", _rewind_point(chain, dense), rewind)
    file = _mask_file(folder, trial.number)
    if file.exists():
        return
    before = MaskFile(_mask_file(folder, trial.number - 1)) if trial.number > 1 else None
    weights = open_checkpoint(chain.folder.result(trial.number - 1).run, chain.state).weights
    if before is not None:
        moved = [name for name in chain.shapes if weights.read(name)[~before.read(name)].any()]
        assert not moved, f"training moved weights of {moved[0]} that were pruned"
    write_masks(file, prune_smallest(weights, chain.shapes, before, chain.kept(trial)))


def _rewind_point(chain: _Chain, run: str) -> str:
    """The name of the dense run's checkpoint at the rewind point."""
    location = chain.state.run(run).read().checkpoints
    wanted = chain.config.rewind_tokens
    for entry in CheckpointStore(Storage(location)).valid():
        if entry.manifest is not None and entry.manifest.tokens == wanted:
            return entry.name
    raise ConfigError(
        f"{location}: there is no checkpoint of {wanted} tokens, prune.rewind_tokens; begin another chain"
    )


def _report(chain: _Chain, console: Console) -> None:
    """Print the table and write it, with a picture, beside the chain."""
    results = {result.trial.number: result for result in chain.folder.results()}
    table = Table("run", "what", "kept", "of the weights", METRIC, "tokens trained on")
    tickets: dict[float, float] = {}
    control: tuple[float, float] | None = None
    for result in results.values():
        trial, kept = result.trial, chain.kept(result.trial)
        assert result.value is not None
        share = kept / chain.total
        if trial.kind == "control":
            control = share, result.value
        else:
            tickets[share] = result.value
        what = {"base": "dense", "round": f"round {trial.number}"}.get(trial.kind, "other initial weights")
        trained = chain.base.train.tokens - trial.values.get("train.from_tokens", 0)
        table.add_row(result.run, what, f"{kept:,}", f"{100 * share:.2f} %", f"{result.value:.4f}", f"{trained:,}")
    lines = []
    if control is not None:
        share, value = control
        lines.append(
            f"with {100 * share:.2f} % of the weights, {METRIC} is {tickets[share]:.4f} from the rewind point and "
            f"{value:.4f} from other initial weights; dense it is {tickets[1.0]:.4f} (one seed each)"
        )
    draw_pruning(chain.folder.folder / "pruning.png", tickets, control, METRIC)
    with (chain.folder.folder / "report.md").open("w", encoding="utf-8") as file:
        for out in (console, Console(file=file, width=160)):
            out.print(table)
            for line in lines:
                out.print(line, soft_wrap=True)
