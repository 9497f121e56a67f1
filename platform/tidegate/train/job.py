"""The job: everything that one run is, validated as a whole before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from tidegate.config import Config
from tidegate.data.config import DataConfig, TrainedTokenizer
from tidegate.model.balance import BalanceConfig, Balancer, balance_problem
from tidegate.model.decoder import ModelConfig
from tidegate.model.masks import prunable
from tidegate.model.mixers import DynamicMaskConfig
from tidegate.model.moe import MoEConfig
from tidegate.model.routers.comet import CometConfig
from tidegate.model.routers.dense_to_sparse import DenseToSparseConfig
from tidegate.parallel.config import ParallelConfig
from tidegate.track.config import TrackConfig
from tidegate.train.guards import GuardsConfig
from tidegate.train.limits import LimitsConfig
from tidegate.train.oracle import LARGEST_ENUMERATION
from tidegate.train.prune import PruneConfig
from tidegate.train.retention import CheckpointConfig
from tidegate.train.schedule import ScheduleConfig
from tidegate.train.search import SearchConfig
from tidegate_kernels.choice import Kernels, interpreted

__all__ = ["Job", "OptimizerConfig", "ResourcesConfig", "TrainConfig"]


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019)."""

    schedule: ScheduleConfig
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices; norms and gate constants are not decayed."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 is off."""
    state: Literal["fp32", "bf16"] = "fp32"
    """Dtype of both moments; bf16 ones are rounded stochastically and save 4 bytes a weight."""


class TrainConfig(Config):
    tokens: int = Field(ge=1)
    """Training ends with the step that reaches this many tokens."""
    pause_at_tokens: int | None = Field(default=None, ge=1)
    """The run stops, evaluated and saved, with the step that reaches so many, to be resumed with other settings and
    another pause, or none; schedules go by `tokens` all the same."""
    batch_tokens: int = Field(ge=1)
    """Tokens an optimizer step, over all ranks and accumulation steps: the same at any world size."""
    micro_batch: int = Field(ge=1)
    """Sequences a rank takes at a time; accumulation follows from it."""
    precision: Literal["fp32", "bf16"] = "bf16"
    init_from: str | None = None
    """Folder that `tidegate export` or transformers' `save_pretrained` wrote, whose weights a new run begins with;
    `{job}` is the job's folder. A dense model's become experts if `model.ffn.kind=moe` (docs/export.md)."""
    upcycle_noise: float = Field(default=0.0, ge=0)
    """Of copies that a dense feed-forward becomes: standard deviation of added noise, in units of a matrix's own."""
    from_tokens: int = Field(default=0, ge=0)
    """A new run begins as if it had trained on so many tokens: schedule, data and all that anneals go on from there."""
    mask: str | None = None
    """File of masks that `tidegate prune` wrote: masked weights begin as zero and stay so."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights; the order of the data has its own, data.seed."""
    recompute: bool = False
    """Run each block again in the backward pass instead of keeping its activations."""
    keep_rows: bool = False
    """Keep the rows that experts read, in expert order, instead of spreading them again in the backward pass: a little
    faster for top_k x model.width numbers a token and layer. PyTorch's kernels keep them always."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two records; each costs one host sync and the observation of its step (docs/measurements.md)."""
    eval_every: int = Field(default=100, ge=1)
    samples: int = Field(default=0, ge=0)
    """At every evaluation the model continues the beginnings of so many held-out sequences of each domain, for people
    to read: `tidegate report` shows them."""
    oracle_sequences: int = Field(default=0, ge=0)
    """Held-out sequences on which the last evaluation tries every path through the experts; 0: none. For one expert a
    token and few layers, see `train/oracle.py`."""

    moved: ClassVar[dict[str, str]] = {"save_every": "checkpoint.every"}

    @property
    def end_tokens(self) -> int:
        """Where this start of the run ends."""
        return self.tokens if self.pause_at_tokens is None else self.pause_at_tokens

    @model_validator(mode="after")
    def _pauses_before_the_end(self) -> TrainConfig:
        if self.end_tokens > self.tokens:
            raise ValueError(
                f"pause_at_tokens={self.pause_at_tokens} is more than tokens={self.tokens}; set it to null"
            )
        return self


class ResourcesConfig(Config):
    workers: int = Field(default=1, ge=1)
    """Processes, one GPU each if `gpu`."""
    min_workers: int | None = Field(default=None, ge=1)
    """The run starts and goes on with as few as these while there are no more, and with up to `workers` when there are:
    docs/elastic.md."""
    gpu: bool = False
    cpus_per_worker: int = Field(default=1, ge=1)
    price_per_hour: float | None = Field(default=None, gt=0)
    """Of a worker, with its GPU if it has one, in any currency; without it only hours are counted: docs/cost.md."""
    max_failures: int = Field(default=0, ge=-1)
    """How often Ray restarts the workers from the last checkpoint; -1 is without end."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """How often it does so after a notice that a worker's machine will be taken away; these are no failures."""
    wait_minutes: float = Field(default=30, gt=0)
    """For machines that an autoscaler should bring, at the start and after a loss, until the run is refused or ends."""
    spot_notices: Literal["none", "aws", "gcp", "azure"] = "none"
    """The cloud whose metadata server each worker's machine asks whether it will be taken away."""

    moved: ClassVar[dict[str, str]] = {"storage": "checkpoint.storage", "keep_checkpoints": "checkpoint.keep_last"}


class Job(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    model: ModelConfig
    balance: BalanceConfig = BalanceConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    parallel: ParallelConfig = ParallelConfig()
    resources: ResourcesConfig = ResourcesConfig()
    limits: LimitsConfig = LimitsConfig()
    track: TrackConfig = TrackConfig()
    search: SearchConfig | None = None
    prune: PruneConfig | None = None
    kernels: Kernels = "auto"
    """Fused Triton kernels or plain PyTorch; `auto`: Triton on a GPU, PyTorch on a CPU."""

    @property
    def runs_triton(self) -> bool:
        return self.kernels == "triton" or (self.kernels == "auto" and self.resources.gpu)

    @property
    def global_batch(self) -> int:
        """Sequences an optimizer step."""
        return self.train.batch_tokens // self.data.sequence_length

    @property
    def accumulation(self) -> int:
        """Micro-batches a step on each rank."""
        return self.global_batch * self.parallel.sequence // (self.train.micro_batch * self.resources.workers)

    @property
    def total_steps(self) -> int:
        return -(-self.train.tokens // self.train.batch_tokens)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, ascending: the batch divides among them, and they are a multiple or
        a divisor of `parallel.expert`."""
        most, expert = self.resources.workers, self.parallel.expert
        passes = self.global_batch // self.train.micro_batch
        sizes = range(self.resources.min_workers or most, most + 1)
        return tuple(n for n in sizes if passes % n == 0 and (n % expert == 0 or expert % n == 0))

    def at_world_size(self, workers: int) -> Job:
        """The job on one of its `world_sizes`: the same steps. Expert parallelism shrinks only where it must."""
        assert workers in self.world_sizes, (workers, self.world_sizes)
        resources = self.resources.model_copy(update={"workers": workers, "min_workers": None})
        parallel = self.parallel.model_copy(update={"expert": min(self.parallel.expert, workers)})
        return self.model_copy(update={"resources": resources, "parallel": parallel})

    @property
    def layout(self) -> str:
        """For people: how the run is laid over its workers."""
        replicas = self.resources.workers // self.parallel.expert
        sequences = f", SP {self.parallel.sequence}" if self.parallel.sequence > 1 else ""
        kernels = "Triton" if self.runs_triton else "PyTorch"
        offload = "" if self.parallel.offload == "none" else f", {self.parallel.offload} on the host"
        return (
            f"EP {self.parallel.expert} x DP {replicas}{sequences}, ZeRO {self.parallel.zero_stage}{offload}, "
            f"{self.train.precision}, {kernels} kernels"
        )

    @property
    def counts_first(self) -> bool:
        """Whether a step begins with a forward pass over all of its micro-batches that counts choices."""
        moe = self.model.ffn if isinstance(self.model.ffn, MoEConfig) else None
        return Balancer(
            self.balance, lambda _: None, self.resources.workers, self.accumulation, moe
        ).needs_counting_pass

    @property
    def num_experts(self) -> int | None:
        return self.model.ffn.num_experts if isinstance(self.model.ffn, MoEConfig) else None

    @model_validator(mode="after")
    def _batch_divides(self) -> Job:
        train, length, workers = self.train, self.data.sequence_length, self.resources.workers
        if train.batch_tokens % length:
            near = max(1, round(train.batch_tokens / length)) * length
            raise ValueError(
                f"train.batch_tokens={train.batch_tokens} is not a multiple of data.sequence_length={length}; "
                f"use {near}"
            )
        if self.global_batch * self.parallel.sequence % (train.micro_batch * workers):
            shared = f" / parallel.sequence={self.parallel.sequence}" if self.parallel.sequence > 1 else ""
            raise ValueError(
                f"train.batch_tokens={train.batch_tokens} is {self.global_batch} sequences, which train.micro_batch="
                f"{train.micro_batch} x resources.workers={workers}{shared} does not divide; change one of the three"
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> Job:
        ranks = self.parallel.sequence
        if ranks == 1:
            return self
        model, length, what = self.model, self.data.sequence_length, f"parallel.sequence={ranks}"
        numbers = {"data.sequence_length": length}
        if model.windows:
            numbers["model.attention.num_kv_heads"] = model.attention.num_kv_heads
            numbers["model.attention.num_value_heads"] = model.attention.value_heads
        for name, number in numbers.items():
            if number % ranks:
                raise ValueError(f"{what} does not divide {name}={number}; change one of them")
        for other in self._not_with_shared_sequences():
            raise ValueError(f"{what} does not go with {other}; change one of them")
        return self

    def _not_with_shared_sequences(self) -> Iterator[str]:
        """What looks at the whole of a sequence, or would count a part of it as one."""
        model = self.model
        for name, mixer in model.mixers.items():
            if isinstance(mixer, DynamicMaskConfig):
                yield f"model.mixers.{name}.kind={mixer.kind}"
        if model.attention.qk_clip is not None:
            yield f"model.attention.qk_clip={model.attention.qk_clip:g}"
        if model.units is not None:
            yield f"model.units.over={list(model.units.over)}"
        if model.self_tune is not None:
            yield "model.self_tune"
        if isinstance(model.ffn, MoEConfig):
            router, able = model.ffn.router, model.ffn.capabilities
            if able.needs_global_batch or able.needs_token_ids or not able.causal or router.kind == "decoupled":
                yield f"model.ffn.router.kind={router.kind}"
            if self.balance.scope != "global_batch":
                yield f"balance.scope={self.balance.scope}"
        if self.train.oracle_sequences:
            yield f"train.oracle_sequences={self.train.oracle_sequences}"
        if self.resources.min_workers is not None:
            yield f"resources.min_workers={self.resources.min_workers}"

    @model_validator(mode="after")
    def _layout_fits(self) -> Job:
        ffn, what = self.model.ffn, "model.ffn.num_experts"
        spread = ffn.num_slices if isinstance(ffn, MoEConfig) else None
        if isinstance(ffn, MoEConfig) and ffn.sizes:
            what = "the sum of num * times in model.ffn.sizes"
        problem = self.parallel.problem(self.resources.workers, spread, what)
        if problem:
            raise ValueError(problem)
        if self.optimizer.state == "bf16" and (
            self.train.precision != "bf16" or self.parallel.zero_stage != 1 or self.parallel.offload == "optimizer"
        ):
            raise ValueError(
                "optimizer.state=bf16 needs train.precision=bf16, parallel.zero_stage=1 and parallel.offload=none or "
                f"experts, not {self.train.precision}, {self.parallel.zero_stage} and {self.parallel.offload}; set it "
                "to fp32"
            )
        at_once = self.parallel.gradients_at_once
        if at_once > 1 and (self.parallel.zero_stage != 1 or self.train.precision != "bf16"):
            raise ValueError(
                f"parallel.gradients_at_once={at_once} acts with train.precision=bf16 at parallel.zero_stage=1 only, "
                f"not with {self.train.precision} at {self.parallel.zero_stage}; set it to 1"
            )
        if at_once > 1 and self.parallel.offload == "optimizer":
            raise ValueError(
                f"parallel.gradients_at_once={at_once} has no effect with parallel.offload=optimizer, whose gradients "
                "take another path; set it to 1"
            )
        if at_once > self.accumulation:
            raise ValueError(
                f"parallel.gradients_at_once={at_once} is more than the {self.accumulation} micro-batches of a step "
                f"(train.batch_tokens={self.train.batch_tokens}, train.micro_batch={self.train.micro_batch}, "
                f"resources.workers={self.resources.workers}); set it to {self.accumulation} at most"
            )
        return self

    @model_validator(mode="after")
    def _elastic_fits(self) -> Job:
        fewest, most = self.resources.min_workers, self.resources.workers
        if fewest is None:
            return self
        if fewest > most:
            raise ValueError(f"resources.min_workers={fewest} is more than resources.workers={most}; lower it")
        if self.parallel.zero_stage == 0 or self.parallel.offload == "experts":
            raise ValueError(
                f"resources.min_workers={fewest} changes the layout of a run, which works neither at "
                f"parallel.zero_stage=0 nor with parallel.offload=experts, here {self.parallel.zero_stage} and "
                f"{self.parallel.offload}; remove resources.min_workers or change those"
            )
        return self

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Job:
        limited = {"limits.max_money": self.limits.max_money, "search.max_money": self.search and self.search.max_money}
        for name, value in limited.items():
            if value is not None and self.resources.price_per_hour is None:
                raise ValueError(f"{name}={value:g} needs resources.price_per_hour, what a worker costs")
        return self

    @model_validator(mode="after")
    def _tokens_are_steps(self) -> Job:
        batch, tokens = self.train.batch_tokens, self.train.tokens
        named = {"train.from_tokens": self.train.from_tokens}
        if self.prune is not None:
            named["prune.rewind_tokens"] = self.prune.rewind_tokens
        for name, value in named.items():
            if value % batch or value >= tokens:
                raise ValueError(
                    f"{name}={value} is not a multiple of train.batch_tokens={batch} below train.tokens={tokens}; use "
                    f"{min(round(value / batch), -(-tokens // batch) - 1) * batch}"
                )
        return self

    @model_validator(mode="after")
    def _weights_can_be_masked(self) -> Job:
        what = f"train.mask={self.train.mask}"
        if self.train.mask is None and self.prune is not None:
            what = f"prune.over={list(self.prune.over)}"
        if self.train.mask is None and self.prune is None:
            return self
        if self.parallel.offload == "experts":
            raise ValueError(
                f"{what} holds weights at zero by their gradients, which go another way with parallel.offload="
                "experts; use parallel.offload=none or optimizer"
            )
        if self.prune is None:
            return self
        if self.train.mask is not None or self.train.from_tokens:
            raise ValueError(
                f"prune sets train.mask={self.train.mask} and train.from_tokens={self.train.from_tokens} itself; leave "
                "them out"
            )
        for kind in self.prune.over:
            if not prunable(self.model, (kind,)):
                raise ValueError(
                    f"prune.over={list(self.prune.over)}: the model has no {kind} with model.ffn.kind="
                    f"{self.model.ffn.kind}; remove it"
                )
        return self

    @model_validator(mode="after")
    def _noise_has_copies(self) -> Job:
        if self.train.upcycle_noise > 0 and (self.train.init_from is None or self.model.ffn.kind != "moe"):
            raise ValueError(
                f"train.upcycle_noise={self.train.upcycle_noise} is for experts that are copies of a dense model's "
                f"feed-forward, not for train.init_from={self.train.init_from} model.ffn.kind={self.model.ffn.kind}; "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Job:
        best, every, train = self.checkpoint.keep_best, self.checkpoint.every, self.train
        if best is None:
            return self
        name = "eval_every" if best.metric.startswith("val/") else "log_every"
        measured = getattr(train, name)
        if every % measured and measured % every:
            raise ValueError(
                f"checkpoint.keep_best.metric={best.metric} is measured every train.{name}={measured} steps, which "
                f"checkpoint.every={every} misses; make one a multiple of the other"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_elsewhere(self) -> Job:
        if self.parallel.offload != "experts":
            return self
        if self.train.precision != "bf16":
            raise ValueError(
                f"parallel.offload=experts works with train.precision=bf16 only, not with {self.train.precision}; "
                "use train.precision=bf16"
            )
        if self.model.self_tune is not None:
            raise ValueError(
                "parallel.offload=experts has no weights at hand that the gates of model.self_tune.tuned="
                f"{list(self.model.self_tune.tuned)} could scale; remove it or use parallel.offload=optimizer"
            )
        if self.model.units is not None:
            raise ValueError(
                f"parallel.offload=experts has no weights at hand that model.units.over={list(self.model.units.over)} "
                "could be gates of; remove model.units or use parallel.offload=optimizer"
            )
        ffn = self.model.ffn
        if isinstance(ffn, MoEConfig) and ffn.capabilities.double_forward:
            raise ValueError(
                f"parallel.offload=experts takes one gradient of a layer a micro-batch, but model.ffn.router.kind="
                f"{ffn.router.kind} runs two forward passes; use another router or parallel.offload=optimizer"
            )
        return self

    @model_validator(mode="after")
    def _kernels_run(self) -> Job:
        if self.kernels == "triton" and not (self.resources.gpu or interpreted()):
            raise ValueError(
                "kernels=triton needs resources.gpu=true, or the interpreter for a test (TRITON_INTERPRET=1); "
                "use kernels=auto"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> Job:
        tokenizer = self.data.tokenizer
        if isinstance(tokenizer, TrainedTokenizer) and tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size={tokenizer.vocab_size} is more than "
                f"model.vocab_size={self.model.vocab_size}; make them equal"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Job:
        schedule, tokens = self.optimizer.schedule, self.train.tokens
        if schedule.warmup_tokens >= tokens:
            raise ValueError(
                f"optimizer.schedule.warmup_tokens={schedule.warmup_tokens} leaves nothing of train.tokens={tokens}"
            )
        if schedule.kind == "wsd" and schedule.warmup_tokens + schedule.decay_tokens > tokens:
            raise ValueError(
                f"optimizer.schedule.warmup_tokens={schedule.warmup_tokens} and decay_tokens={schedule.decay_tokens} "
                f"are more than train.tokens={tokens}"
            )
        return self

    @model_validator(mode="after")
    def _balance_fits(self) -> Job:
        problem = balance_problem(self.balance, self.model.ffn if isinstance(self.model.ffn, MoEConfig) else None)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _self_tuning_acts(self) -> Job:
        tuning = self.model.self_tune
        if tuning is None:
            return self
        if "balance_scale" in tuning.tuned and self.balance.loss_weight == 0:
            raise ValueError(
                "model.self_tune.tuned.balance_scale is a factor of balance.loss_weight=0; set that above 0"
            )
        if tuning.warmup_tokens >= self.train.tokens:
            raise ValueError(
                f"model.self_tune.warmup_tokens={tuning.warmup_tokens} is not below train.tokens={self.train.tokens}"
            )
        return self

    @model_validator(mode="after")
    def _units_fit_training(self) -> Job:
        units = self.model.units
        if units is None:
            return self
        if units.freeze_tokens is not None and units.freeze_tokens >= self.train.tokens:
            raise ValueError(
                f"model.units.freeze_tokens={units.freeze_tokens} is not below train.tokens={self.train.tokens}"
            )
        if "blocks" in units.over and self.balance.budget is not None:
            raise ValueError(
                f"balance.budget.target={self.balance.budget.target} would count the experts of blocks that "
                f"model.units.over={list(units.over)} drops; use one of the two"
            )
        if "experts" in units.over and self.balance.bias_rate > 0:
            raise ValueError(
                f"balance.bias_rate={self.balance.bias_rate} would count the experts that model.units.over="
                f"{list(units.over)} drops as idle; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _router_can_learn(self) -> Job:
        ffn = self.model.ffn
        if isinstance(ffn, MoEConfig) and ffn.weighs_by_one:
            raise ValueError(
                f"model.ffn.top_k=1 with model.ffn.router.kind={ffn.router.kind} divides a token's one weight by "
                "itself, so that the router learns nothing from the loss; use a top-k router with renormalize: false"
            )
        return self

    @model_validator(mode="after")
    def _oracle_can_try_all(self) -> Job:
        ffn, wanted = self.model.ffn, self.train.oracle_sequences
        if wanted == 0:
            return self
        if not isinstance(ffn, MoEConfig):
            raise ValueError(f"train.oracle_sequences={wanted} needs experts, but model.ffn.kind=dense")
        if ffn.top_k != 1:
            raise ValueError(
                f"train.oracle_sequences={wanted} tries one expert a layer, but model.ffn.top_k={ffn.top_k}; use 1"
            )
        if not ffn.capabilities.selection_bias or (self.model.units is not None and "experts" in self.model.units.over):
            raise ValueError(
                f"train.oracle_sequences={wanted} steers a top-k router over all experts; it does not fit "
                f"model.ffn.router.kind={ffn.router.kind} or gates over experts"
            )
        if wanted > self.train.micro_batch:
            raise ValueError(
                f"train.oracle_sequences={wanted} is more than train.micro_batch={self.train.micro_batch}, what a "
                "device takes at a time"
            )
        paths = ffn.num_experts**self.model.num_layers
        if paths > LARGEST_ENUMERATION:
            raise ValueError(
                f"train.oracle_sequences={wanted} would try model.ffn.num_experts={ffn.num_experts} to the power of "
                f"model.num_layers={self.model.num_layers} = {paths} paths, more than {LARGEST_ENUMERATION}"
            )
        return self

    @model_validator(mode="after")
    def _annealing_ends(self) -> Job:
        router = self.model.ffn.router if isinstance(self.model.ffn, MoEConfig) else None
        if isinstance(router, DenseToSparseConfig) and router.anneal_tokens > self.train.tokens:
            raise ValueError(
                f"model.ffn.router.anneal_tokens={router.anneal_tokens} is more than train.tokens={self.train.tokens}: "
                "the router would never be sparse in training and always in evaluation"
            )
        if isinstance(router, CometConfig) and router.search is not None and router.search.tokens > self.train.tokens:
            raise ValueError(
                f"model.ffn.router.search.tokens={router.search.tokens} is more than train.tokens={self.train.tokens}: "
                "the order of experts would never be fixed"
            )
        return self
