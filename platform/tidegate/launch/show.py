"""`tidegate show` and `tidegate tokenize`: what a job is and costs, and what its data came to, before it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from tidegate.config import load
from tidegate.launch.preflight import checkpoint_bytes_per_parameter
from tidegate.model.decoder import ModelConfig, unit_gates_on_meta
from tidegate.model.flops import Cost, costs, kv_cache_bytes, state_bytes, total
from tidegate.model.moe import MoEConfig
from tidegate.model.unit_gates import UnitGatesConfig
from tidegate.train.job import Job
from tidegate.train.memory import predict

if TYPE_CHECKING:
    from tidegate.data.shards import Manifest, TokenDataset
    from tidegate.launch.state import StateDir

__all__ = ["notes", "show_job", "tokenize_job"]

_PAGE_WIDTH = 110


def show_job(job: Path, overrides: Sequence[str]) -> None:
    """Print the resolved job with what `extends:` and `--set` changed marked, its costs, memory and layout.

    Raises:
        ConfigError: the job is not valid.
    """
    loaded = load(job, Job, overrides)
    config: Job = loaded.config
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PAGE_WIDTH  # a pipe has no width; rich would fold the table at 80
    for line in _marked(config.model_dump(mode="json"), loaded.overrides):
        console.print(line, soft_wrap=True, markup=False)
    console.print(_cost_table(config))
    console.print(_memory_table(config))
    for line in [*_summary(config), *notes(config)]:
        console.print(line, soft_wrap=True, markup=False)


def tokenize_job(job: Path, overrides: Sequence[str], state: StateDir, bench: bool = False) -> None:
    """Build the job's token shards, or find them, and print what they hold.

    Args:
        job: the file.
        overrides: of `--set`.
        state: where the shards live.
        bench: measure also how fast this machine makes tokens and batches.

    Raises:
        ConfigError: the job is not valid, or its text cannot be read.
    """
    from tidegate.data import TokenDataset
    from tidegate.launch.report import Reporter
    from tidegate.launch.run import prepare_data

    config: Job = load(job, Job, overrides).config
    reporter = Reporter(config)
    folder = prepare_data(config, state, job.absolute().parent, reporter)
    dataset = TokenDataset.open(folder, verify=False)
    manifest = dataset.manifest
    reporter.say(f"tokens: {folder}")
    tokenizer = manifest.tokenizer
    reporter.say(
        f"tokenizer: {tokenizer.config.kind}, {tokenizer.vocab_size:,} tokens of model.vocab_size="
        f"{config.model.vocab_size:,}, sha256 {tokenizer.sha256[:16]}"
    )
    reporter.console.print(_domain_table(manifest))
    if bench:
        for line in _data_speed(config, dataset, job.absolute().parent):
            reporter.say(line)


def _data_speed(job: Job, dataset: TokenDataset, job_dir: Path) -> Iterator[str]:
    from tidegate.data.speed import loading_speed, tokenizing_speed

    tokenizing = tokenizing_speed(dataset, job.data, job_dir=job_dir)
    yield (
        f"tokenizing: {tokenizing.tokens_per_s:,.0f} tokens/s a core, {tokenizing.bytes_per_s / 1e6:.2f} MB/s of text "
        f"({tokenizing.sample_tokens:,} tokens, {tokenizing.sample_bytes / 1e6:.1f} MB)"
    )
    batch, workers = job.train.micro_batch, job.resources.workers
    loading = loading_speed(dataset, job.data, global_batch=job.global_batch, micro_batch=batch, world_size=workers)
    yield (
        f"loading: {loading:,.0f} tokens/s of one rank of {workers}, sequence {job.data.sequence_length:,}, "
        f"micro-batch {batch}, accumulation {job.accumulation}"
    )


class _Dumper(yaml.SafeDumper):
    """A field a line; a list of plain values stays on the line of its field."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = not any(isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


def _marked(resolved: Mapping[str, Any], changed: Mapping[str, Any]) -> Iterator[str]:
    """The YAML of the resolved job; lines that hold a changed value end in `# changed`."""
    text = yaml.dump(resolved, Dumper=_Dumper, sort_keys=False, width=_PAGE_WIDTH, allow_unicode=True)
    places = dict(_places(yaml.compose(text, Loader=yaml.SafeLoader), ""))
    marked = {places[path] for path in changed if path in places}  # fields of a replaced variant have no line
    for number, line in enumerate(text.splitlines()):
        yield f"{line}  # changed" if number in marked else line


def _places(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """The path of every value in a document, as `flatten` writes it, and the line that it starts in."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), value, value) for index, value in enumerate(node.value)]
    for name, start, value in children:
        path = f"{prefix}.{name}" if prefix else name
        yield path, start.start_mark.line
        yield from _places(value, path)


def _cost_table(job: Job) -> Table:
    rows, whole = costs(job.model, job.data.sequence_length), total(job.model, job.data.sequence_length)
    table = Table(Column("field", overflow="fold"))
    for name in ("parameters", "active", "share", "training FLOPs a token", "share"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row, whole))
    table.add_section()
    table.add_row(*_cells(whole, whole))
    return table


def _cells(row: Cost, whole: Cost) -> tuple[str, ...]:
    return (
        row.field,
        f"{row.params:,}",
        f"{row.active_params:,}",
        f"{row.params / whole.params:.1%}",
        f"{row.flops_per_token:,.0f}",
        f"{row.flops_per_token / whole.flops_per_token:.1%}",
    )


def _memory_table(job: Job) -> Table:
    prediction = predict(job)
    device = "GPU" if job.resources.gpu else "worker"
    table = Table(Column(f"memory of a {device}, predicted"), Column("GiB", justify="right"))
    for name, size in prediction.parts.items():
        if size:
            table.add_row(name.replace("_", " "), f"{size / 2**30:,.2f}")
    table.add_section()
    table.add_row("peak", f"{prediction.total / 2**30:,.2f}")
    elsewhere = {"on the host beside it": prediction.host, "in parallel.offload_folder": prediction.disk}
    if any(elsewhere.values()):
        table.add_section()
    for name, size in elsewhere.items():
        if size:
            table.add_row(name, f"{size / 2**30:,.2f}")
    return table


def _summary(job: Job) -> Iterator[str]:
    cost = total(job.model, job.data.sequence_length)
    train = job.train
    tokens = job.total_steps * train.batch_tokens
    yield (
        f"layout: {job.resources.workers} workers, {job.layout}; accumulation M={job.accumulation}, micro-batch "
        f"{train.micro_batch}, global batch {job.global_batch:,} sequences = {train.batch_tokens:,} tokens"
    )
    if job.resources.min_workers is not None:
        yield f"elastic: as many workers as there is room for, of {', '.join(map(str, job.world_sizes))}"
    per_parameter = tokens / cost.active_params
    yield f"length: {job.total_steps:,} steps, {tokens:,} tokens, {per_parameter:.3g} tokens an active parameter"
    yield f"training: {cost.flops_per_token * tokens:.3e} FLOPs"
    each, keep = checkpoint_bytes_per_parameter(job), job.checkpoint.kept
    size_gb = cost.params * each / 1e9
    yield (
        f"checkpoint: about {size_gb:.3g} GB ({each} bytes a parameter), {size_gb * (keep + 1):.3g} GB "
        f"for {keep} that stay (checkpoint.keep_last={job.checkpoint.keep_last}) and the one being written"
    )
    yield (
        f"context at inference: {kv_cache_bytes(job.model):,} bytes of keys and values a token (bf16), "
        f"{state_bytes(job.model):,} bytes of state a sequence"
    )
    if job.model.units is not None:
        yield _unit_gates(job.model, job.model.units)
    if job.num_experts is not None and job.counts_first:
        yield (
            f"balance: scope=global_batch counts=exact with M={job.accumulation} runs one more forward pass a step to "
            f"count, about a third of the model FLOPs ({cost.flops_per_token * tokens / 3:.3e}); "
            "balance.counts=running does without it"
        )


def _unit_gates(model: ModelConfig, gates: UnitGatesConfig) -> str:
    units = unit_gates_on_meta(model).units
    end = "" if gates.freeze_tokens is None else f"; the mask is fixed at {gates.freeze_tokens:,} tokens"
    return (
        f"unit gates: keep {gates.keep:g} of {units.num:,} units ({', '.join(gates.over)}, {gates.method.kind}), "
        f"{gates.keep * units.total_cost:,.0f} of {units.total_cost:,} parameters{end}"
    )


def notes(job: Job) -> Iterator[str]:
    """What a user should know of the job's router before it trains; a warning first."""
    ffn, balance = job.model.ffn, job.balance
    if not isinstance(ffn, MoEConfig):
        return
    kind, capabilities = f"model.ffn.router.kind={ffn.router.kind}", ffn.capabilities
    if not capabilities.causal:
        yield (
            f"WARNING: {kind} LEAKS FUTURE TOKENS: an expert picks among later tokens too. Losses and perplexities of "
            "this run are not those of a language model, and it cannot generate text"
        )
    if not capabilities.learned and balance.loss_weight > 0:
        yield f"balance: {kind} learns nothing; balance.loss_weight={balance.loss_weight} has no effect"
    if capabilities.own_balance_weight:
        yield f"balance: {kind} weighs its balance loss itself; balance.loss_weight={balance.loss_weight} has no effect"
    if not capabilities.z_loss and balance.z_loss_weight > 0:
        yield f"balance: {kind} has no logits for balance.z_loss_weight={balance.z_loss_weight} to act on"
    if capabilities.dense_phase:
        yield (
            f"router: {kind} uses up to all {ffn.num_experts} experts a token early in training, "
            f"{ffn.num_experts / ffn.top_k:.3g} times top_k={ffn.top_k}; memory and time of those steps follow"
        )
    if capabilities.training_branch:
        yield f"router: {kind} routes otherwise in training (noise, a plan); evaluation is plain top-k"
    if capabilities.ragged:
        yield f"router: {kind} uses a varying number of experts a token: one host sync a layer and pass"
    if capabilities.double_forward:
        yield f"router: {kind} runs two forward passes a training step; model FLOPs count one"
    if capabilities.needs_global_batch:
        yield (
            f"router: {kind} decides over the tokens that a rank holds: results depend on resources.workers and "
            "train.micro_batch"
        )


def _domain_table(manifest: Manifest) -> Table:
    table = Table("domain")
    for name in ("train documents", "train tokens", "held-out documents", "held-out tokens"):
        table.add_column(name, justify="right")
    rows = [
        (d.name, d.train.documents, d.train.tokens, d.held_out.documents, d.held_out.tokens) for d in manifest.domains
    ]
    for name, *numbers in rows:
        table.add_row(name, *(f"{number:,}" for number in numbers))
    table.add_section()
    table.add_row("total", *(f"{sum(column):,}" for column in list(zip(*rows, strict=True))[1:]))
    return table
