"""The command line. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli_cluster import cluster
from tidegate.options import (
    CheckpointOption,
    Dashboard,
    JobFile,
    Overrides,
    RunName,
    StateOption,
    StateThere,
    Submitted,
    Wait,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain mixture-of-experts language models with gated attention.",
)

kernels = typer.Typer(no_args_is_help=True, help="Show or measure the block sizes that the Triton kernels take.")
app.add_typer(kernels, name="kernels")

app.add_typer(cluster, name="cluster")


@app.command()
def train(
    job: Annotated[Path | None, typer.Argument(help="YAML job file; none with --resume", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006 - typer wants a list
    workers: Annotated[int | None, typer.Option(help="Short for --set resources.workers=N", show_default=False)] = None,
    paranoid: Annotated[
        int | None,
        typer.Option(help="Compare ranks every N steps: --set guards.compare_replicas_every=N", show_default=False),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the loop in this process, without Ray")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one")] = None,
    resume: Annotated[str | None, typer.Option(help="Continue this run from its last checkpoint")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; if one of this name has begun, it goes on")] = None,
    job_dir: Annotated[
        Path | None, typer.Option(help="What {job} stands for [default: the job file's folder]", show_default=False)
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Short for --set train.init_from=FOLDER: begin with its weights")
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Train a job on Ray, or with --local in this process."""
    import json

    from tidegate.config import ConfigError
    from tidegate.launch.run import Request, run

    if local and address:
        raise ConfigError(f"--local and --address {address} exclude each other")
    if job and resume:
        raise ConfigError(f"{job} and --resume {resume} exclude each other; change a resumed run with --set")
    if name and resume:
        raise ConfigError(f"--name {name} and --resume {resume} exclude each other")
    extra = [f"resources.workers={workers}"] if workers is not None else []
    extra += [f"guards.compare_replicas_every={paranoid}"] if paranoid is not None else []
    extra += [f"train.init_from={json.dumps(str(init_from.absolute()))}"] if init_from else []
    ran = run(Request(job, [*overrides, *extra], _state(state_dir), resume, name, job_dir, local, address))
    if ran.outcome.stopped:
        # As of `timeout` where a limit ended it, or of a process that SIGTERM ended.
        raise typer.Exit(124 if ran.limit else 143)


@app.command()
def submit(
    job: JobFile,
    overrides: Overrides = [],  # noqa: B006
    address: Dashboard = None,
    name: Annotated[
        str | None, typer.Option(help="Of the run; if it stopped or failed it goes on [default: the job's]")
    ] = None,
    job_dir: Annotated[
        str | None, typer.Option(help="What {job} stands for there [default: the job file's folder]")
    ] = None,
    wait: Wait = False,
    state_dir: StateThere = None,
) -> None:
    """Submit a job to a Ray cluster: once, however often this is called."""
    from tidegate.launch.submit import Submit, submit

    raise typer.Exit(submit(job, Submit(address, overrides, name, state_dir, job_dir, wait)))


@app.command()
def resume(
    name: Submitted,
    overrides: Overrides = [],  # noqa: B006
    address: Dashboard = None,
    wait: Wait = False,
    state_dir: StateThere = None,
) -> None:
    """Submit a run again that stopped or failed on a cluster: it goes on from its last checkpoint."""
    from tidegate.launch.submit import Submit, resume

    raise typer.Exit(resume(name, Submit(address, overrides, state_dir=state_dir, wait=wait)))


@app.command()
def jobs(address: Dashboard = None) -> None:
    """List what was submitted to a Ray cluster."""
    from tidegate.launch.submissions import list_jobs

    list_jobs(address)


@app.command()
def logs(name: Submitted, address: Dashboard = None, wait: Wait = False) -> None:
    """Print what a submitted job has printed."""
    from tidegate.launch.submissions import show_logs

    raise typer.Exit(show_logs(address, name, wait=wait))


@app.command()
def stop(name: Submitted, address: Dashboard = None) -> None:
    """Have a submitted job save and end."""
    from tidegate.launch.submissions import stop_job

    raise typer.Exit(stop_job(address, name))


@app.command()
def tune(
    job: Annotated[Path | None, typer.Argument(help="YAML job file with a search: section", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006
    budget: Annotated[list[str], typer.Option(help="Such as active_params<=300M; repeatable", show_default=False)] = [],  # noqa: B006
    trials: Annotated[int | None, typer.Option(help="Short for --set search.trials=N", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates and what they cost")] = False,
    resume: Annotated[str | None, typer.Option(help="Go on with this sweep", show_default=False)] = None,
    concurrent: Annotated[
        int | None,
        typer.Option(help="Trials at a time [default: as many as fit]", show_default=False, min=1),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Resume although the job changed")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one")] = None,
    state_dir: StateOption = None,
) -> None:
    """Search a job's space under a budget: every candidate a run, the best again with other seeds."""
    from tidegate.config import ConfigError
    from tidegate.tune.sweep import SweepRequest, show_candidates, sweep

    if (job is None) == (resume is None):
        raise ConfigError("name a job file, or --resume SWEEP")
    extra = [f"search.trials={trials}"] if trials is not None else []
    request = SweepRequest(job, [*overrides, *extra], budget, _state(state_dir), resume, force, address, concurrent)
    if dry_run:
        show_candidates(request)
    else:
        sweep(request)


@app.command()
def prune(
    job: Annotated[Path | None, typer.Argument(help="YAML job file with a prune: section", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[str | None, typer.Option(help="Go on with this chain", show_default=False)] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one")] = None,
    state_dir: StateOption = None,
) -> None:
    """Train, prune the smallest weights, rewind and train again, round after round: a run each."""
    from tidegate.config import ConfigError
    from tidegate.tune.prune import PruneRequest, prune_in_rounds

    if (job is None) == (resume is None):
        raise ConfigError("name a job file, or --resume CHAIN")
    prune_in_rounds(PruneRequest(job, overrides, _state(state_dir), resume, address))


@app.command()
def front(
    sweep: Annotated[str, typer.Argument(help="Name of a sweep, as tune prints it", show_default=False)],
    write: Annotated[
        Path | None,
        typer.Option(help="Write the best as a job, such as jobs/found/NAME.yaml", show_default=False),
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Print and plot what a sweep has found, finished or not."""
    from tidegate.tune.sweep import show_front

    show_front(sweep, _state(state_dir), write)


@app.command()
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Names or MLflow ids of runs", show_default=False)] = None,
    experiment: Annotated[str | None, typer.Option(help="Also all runs of it, or those that --filter finds")] = None,
    filter: Annotated[str, typer.Option(help="In MLflow's syntax, such as \"tags.gate = 'none'\"")] = "",
    metric: Annotated[list[str], typer.Option(help="More than the usual ones; repeatable")] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Compare losses over other tokens or other text too")] = False,
    out: Annotated[Path, typer.Option(help="Folder for compare.html and compare.csv")] = Path(),
    store: Annotated[str | None, typer.Option(help="URI of an MLflow store [default: as train would use]")] = None,
    state_dir: StateOption = None,
) -> None:
    """What differs between runs, and which is better after as many tokens and after as many FLOPs."""
    from tidegate.launch.compare import compare, wanted_runs

    found = wanted_runs(runs or [], _state(state_dir), store, experiment, filter)
    compare(found, force=force, more=metric, out=out)


@app.command()
def checkpoints(
    run: RunName,
    state_dir: StateOption = None,
) -> None:
    """List the checkpoints of a run: step, tokens, size, metrics, and what is wrong with one."""
    from tidegate.launch.checkpoints import list_checkpoints

    list_checkpoints(run, _state(state_dir))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Name of a run, or its MLflow id", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="File to write [default: RUN.html]", show_default=False)] = None,
    store: Annotated[str | None, typer.Option(help="URI of an MLflow store [default: as train would use]")] = None,
    state_dir: StateOption = None,
) -> None:
    """Write the page of a run, training or not: one HTML file that needs no network."""
    from tidegate.launch.run_page import write_report

    print(write_report(run, _state(state_dir), out, store))


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Checkpoint, all of a run's, or an export", show_default=False)],
) -> None:
    """Read checkpoints or an export again and name every file that changed; exit status 1 if one did."""
    from tidegate.launch.checkpoints import verify_checkpoints

    if not verify_checkpoints(path):
        raise typer.Exit(1)


@app.command()
def export(
    run: RunName,
    format: Annotated[str, typer.Option(help="tidegate, or hf: for Hugging Face transformers")] = "tidegate",
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write [default: exports/ in the state directory]", show_default=False),
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Write a run's weights as one model in safetensors files, from any layout; train --init-from reads them."""
    from tidegate.launch.export import export_run
    from tidegate.launch.lineage import record_export

    state = _state(state_dir)
    if not record_export(run, state, *export_run(run, state, format, checkpoint, out)):
        print("not entered in MLflow, which does not answer")


@app.command()
def generate(
    run: RunName,
    prompt: Annotated[str, typer.Option(help="To go on from; without, a document begins", show_default=False)] = "",
    tokens: Annotated[int, typer.Option(help="How many are new")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn, above temperature 0")] = 0,
    checkpoint: CheckpointOption = None,
    state_dir: StateOption = None,
) -> None:
    """Continue a prompt with a run's weights, on the CPU."""
    from tidegate.launch.generate import generate_text

    print(generate_text(run, _state(state_dir), checkpoint, prompt, tokens, temperature, seed))


@app.command()
def probe(
    run: RunName,
    suite: Annotated[
        str, typer.Option(help="Which of sink, experts, long, recall, samples and lm_eval, with commas")
    ] = "sink,experts,long,recall,samples",
    sequences: Annotated[int, typer.Option(help="Held-out sequences that each probe reads, at most")] = 32,
    checkpoint: CheckpointOption = None,
    device: Annotated[str, typer.Option(help="Such as cuda")] = "cpu",
    tasks: Annotated[str | None, typer.Option(help="Of lm_eval: a folder of them, or names with commas")] = None,
    state_dir: StateOption = None,
) -> None:
    """Ask a run's weights: attention sinks, what experts know, longer contexts, recall, samples."""
    from tidegate.launch.probe import probe_run

    print(probe_run(run, _state(state_dir), suite.split(","), sequences, checkpoint, device, tasks))


@app.command()
def recall(
    job: JobFile,
    overrides: Overrides = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="How many models, of seeds from 0 on", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of 64 sequences, at most", min=1)] = 1000,
    rates: Annotated[str, typer.Option(help="Of learning, with commas; each until one does")] = "3e-3,1e-3",
    length: Annotated[int, typer.Option(help="Tokens of a sequence, at least four a pair")] = 48,
    pairs: Annotated[int, typer.Option(help="Keys with their values in a sequence", min=1)] = 6,
    vocab: Annotated[int, typer.Option(help="Half are keys and half values")] = 128,
    device: Annotated[str, typer.Option(help="Such as cuda")] = "cpu",
    state_dir: StateOption = None,
) -> None:
    """Train a job's stack on associative recall instead of text: can it learn to recall, and how much does it hold?"""
    from tidegate.launch.recall import RecallRequest, recall_job

    print(
        recall_job(RecallRequest(job, overrides, seeds, steps, rates, length, pairs, vocab, device), _state(state_dir))
    )


@app.command()
def register(
    run: RunName,
    name: Annotated[str, typer.Option(help="Of the model in MLflow's registry", show_default=False)],
    alias: Annotated[
        str | None, typer.Option(help="Such as champion: moved to this version", show_default=False)
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Make a run's newest export, or else its newest checkpoint, a version of a model in MLflow's registry."""
    from tidegate.launch.lineage import register_run

    register_run(run, _state(state_dir), name, alias)


@app.command()
def bench(
    job: JobFile,
    overrides: Overrides = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps that count, after a warm-up")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write everything measured as JSON", show_default=False)] = None,
    against: Annotated[
        list[Path], typer.Option(help="Compare with an earlier result; repeatable", show_default=False)
    ] = [],  # noqa: B006
    commit: Annotated[
        str | None, typer.Option(help="What is measured [default: the commit here]", show_default=False)
    ] = None,
) -> None:
    """Time a job's optimizer step on random tokens, and say where the time goes."""
    from tidegate.launch.bench import bench_job

    bench_job(job, overrides, steps=steps, out=out, against=against, commit=commit)


@app.command()
def show(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Print the resolved job and what each field costs."""
    from tidegate.launch.show import show_job

    show_job(job, overrides)


@app.command()
def plan(
    job: JobFile,
    gpus: Annotated[str | None, typer.Option(help="Such as 256xH100", show_default=False)] = None,
    cluster: Annotated[
        str | None, typer.Option(help="All nodes of a file of cluster/ instead", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Such as 1T [default: as many as the job says]", show_default=False)
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    hardware: Annotated[
        Path | None, typer.Option(help="YAML of GPUs, links and prices over the shipped ones", show_default=False)
    ] = None,
    scaling: Annotated[
        Path | None, typer.Option(help="Draw 1 to 4,096 GPUs: FILE.html or FILE.png", show_default=False)
    ] = None,
) -> None:
    """Predict on GPUs that nobody has rented yet: the fastest layout that fits, its speed, time, money and energy."""
    from tidegate.cluster import load_cluster
    from tidegate.config import ConfigError
    from tidegate.plan import parse_gpus
    from tidegate.plan.report import plan_job
    from tidegate.quantities import parse_count

    if (gpus is None) == (cluster is None):
        raise ConfigError("name --gpus 256xH100 or --cluster NAME")
    if cluster is not None:
        nodes = load_cluster(cluster)
        on = parse_gpus(nodes.gpus, hardware)
        on = on._replace(gpu=on.gpu.model_copy(update=nodes.of_gpus))
    else:
        on = parse_gpus(gpus or "", hardware)
    count = None if tokens is None else parse_count(tokens, "--tokens")
    plan_job(job, overrides, on, count, scaling)


@app.command(name="list")
def list_(what: Annotated[str, typer.Argument(help="routers, gates or balance", show_default=False)]) -> None:
    """List what a job can choose from, with one line and the paper of each."""
    from tidegate.launch.listing import list_choices

    list_choices(what)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file."""
    import json

    from tidegate.train.job import Job

    print(json.dumps(Job.model_json_schema(), indent=2))


@app.command()
def tokenize(
    job: JobFile,
    overrides: Overrides = [],  # noqa: B006
    bench: Annotated[bool, typer.Option("--bench", help="Then measure the tokenizer and the loader")] = False,
    state_dir: StateOption = None,
) -> None:
    """Train or load the job's tokenizer and build its token shards."""
    from tidegate.launch.show import tokenize_job

    tokenize_job(job, overrides, _state(state_dir), bench)


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster to look for")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Join it and look at each of its nodes")] = False,
    storage: Annotated[
        str | None, typer.Option(help="With --cluster: checkpoint.storage of the jobs, beside the state directory")
    ] = None,
    state_dir: StateOption = None,
) -> None:
    """Check versions, devices, compiler, storage, ports, Ray and MLflow; with --cluster, on each of its nodes."""
    from tidegate.launch.state import default_state_dir

    folder = (state_dir or default_state_dir()).absolute()
    if cluster:
        from tidegate.launch.cluster_check import examine_cluster
        from tidegate.launch.cluster_links import Link
        from tidegate.plan.hardware import load_gpus

        links = {name: Link(gpu.nvlink_gb_per_s, gpu.network_gb_per_s) for name, gpu in load_gpus().items()}
        healthy = examine_cluster(address or "auto", folder, storage, links)
    else:
        from tidegate.launch.doctor import examine

        healthy = examine(address, folder)
    if not healthy:
        raise typer.Exit(1)


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 5000,
    state_dir: StateOption = None,
) -> None:
    """Open the MLflow UI on the state directory."""
    from tidegate.launch.state import default_state_dir
    from tidegate.track import serve_ui

    raise typer.Exit(serve_ui(state_dir or default_state_dir(), host, port))


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="Name of a run, as train prints it, or its MLflow id", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Print it as it is now")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks", min=0.1)] = 5.0,
    store: Annotated[str | None, typer.Option(help="URI of an MLflow store [default: as train would use]")] = None,
    state_dir: StateOption = None,
) -> None:
    """Watch a run in the terminal: losses, balance by layer, speed, checkpoints, events."""
    from tidegate.launch.watch import watch

    watch(run, _state(state_dir), store, once=once, every_s=every)


@app.command()
def dash(
    port: Annotated[int, typer.Option(help="Of Prometheus", min=1, max=65535)] = 9090,
    grafana_port: Annotated[int, typer.Option(help="Of Grafana", min=1, max=65535)] = 3000,
    state_dir: StateOption = None,
) -> None:
    """Start Prometheus, and Grafana if installed, on this machine's Rays, with Tidegate's alerts and dashboards."""
    from tidegate.launch.dash import serve_dashboards

    try:
        serve_dashboards(_state(state_dir).root, port, grafana_port)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@kernels.command(name="tune")
def tune_kernels(
    kernel: Annotated[list[str], typer.Option(help="Only this one; repeatable", show_default=False)] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Where to write [default: what kernels read on this device]", show_default=False)
    ] = None,
) -> None:
    """Measure block sizes on this machine's CUDA device; minutes a kernel."""
    from tidegate.launch.kernels import tune_kernels

    tune_kernels(kernel, out)


@kernels.command(name="show")
def show_kernels() -> None:
    """Print which file of block sizes is in use, and its entries."""
    from tidegate.launch.kernels import show_kernels

    show_kernels()


def _state(state_dir: Path | None):  # type: ignore[no-untyped-def]
    from tidegate.launch.state import open_state

    return open_state(state_dir)


def main() -> None:
    """Entry point: a user's mistake is one screen on standard error and exit status 2."""
    try:
        app()
    except ValueError as error:
        from tidegate.config import ConfigError  # pydantic comes with it, which --help need not wait for

        if not isinstance(error, ConfigError):
            raise
        print(f"tidegate: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
