"""What a cluster file says: a head, pools of workers, what they share, and who provides the machines."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tidegate.config import Config, ConfigError, flatten

__all__ = [
    "Aws",
    "Azure",
    "Cluster",
    "Fabric",
    "Gcp",
    "GpuKind",
    "Head",
    "Hosts",
    "Kubernetes",
    "Machine",
    "Pool",
    "Provider",
    "Slurm",
    "Storage",
]

GpuKind = Literal["H100", "H200", "A100", "B200"]
Fabric = Literal["none", "efa", "tcpx", "infiniband"]
_NAME = r"^[a-z][a-z0-9-]{0,39}$"  # becomes names of machines, pods and labels
_UNSAFE = set("\"'`$\\\n;&|<>(){}*?! ")  # in a path or an address that is written into a shell command
_PLACEHOLDER = "change-me"


class Machine(Config):
    """A kind of node."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    disk_gb: int = Field(default=200, ge=30)
    """Its boot disk. The image takes 20 GB."""
    instance: str | None = None
    """The cloud's name of the machine; in Kubernetes the label node.kubernetes.io/instance-type."""


class Head(Machine):
    """The node of Ray's control store, dashboard and drivers: never spot, since the cluster is lost with it."""


class Pool(Machine):
    """Workers of one kind, of which there are as many as jobs ask for."""

    gpu: GpuKind | None
    gpus: int = Field(ge=0, le=16)
    """On a node."""
    spot: bool = False
    """Cheaper, and may be taken away with a short notice: docs/elastic.md."""
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(ge=1)
    fabric: Fabric = "none"
    """The network between nodes that NCCL needs settings for."""
    interfaces: int = Field(default=1, ge=1, le=32)
    """Network cards of the fabric, with `efa`."""
    network_gb_per_s: float | None = Field(default=None, gt=0)
    """Of a GPU to other nodes, GB/s in one direction, for `tidegate plan`; None: what its kind has elsewhere."""
    node_config: dict[str, Any] = Field(default_factory=dict)
    """Laid over what Ray's launcher asks its cloud for, in the cloud's own words."""

    @model_validator(mode="after")
    def _consistent(self) -> Pool:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes={self.min_nodes} is more than max_nodes={self.max_nodes}; raise max_nodes too")
        if (self.gpu is None) != (self.gpus == 0):
            raise ValueError(f"gpu={self.gpu} and gpus={self.gpus} exclude each other")
        return self


class Storage(Config):
    """What all nodes share."""

    path: str = "/mnt/tidegate"
    """Where, on every node; the state directory and the data are below."""
    nfs: str | None = None
    """What is mounted there, as SERVER:/EXPORT (EFS, Filestore, Azure Files, any NFS 4.1); None: something is."""
    bucket: str | None = Field(default=None, pattern=r"^(s3|gs|abfs|abfss)://[^\s]+$")
    """Where checkpoints go, as TIDEGATE_STORAGE of every node, unless the job says elsewhere; None: below `path`."""

    @field_validator("path", "nfs", "bucket")
    @classmethod
    def _fits_a_command(cls, value: str | None) -> str | None:
        if value is not None and _UNSAFE & set(value):
            raise ValueError("holds a character that a shell would read")
        return value

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not PurePosixPath(value).is_absolute() or len(PurePosixPath(value).parts) < 2:
            raise ValueError("must be an absolute path below /")
        return value

    @field_validator("nfs")
    @classmethod
    def _server_and_export(cls, value: str | None) -> str | None:
        if value is not None and ":/" not in value:
            raise ValueError("is written SERVER:/EXPORT")
        return value


class Aws(Config):
    kind: Literal["aws"]
    region: str
    zones: tuple[str, ...] = Field(min_length=1)
    """Tried in this order; the fast network does not leave a zone."""
    ami: str
    """With the GPU driver, Docker, NVIDIA's container toolkit and EFA."""
    subnet: str | None = None
    security_groups: tuple[str, ...] = ()
    instance_profile: str | None = None
    """The IAM role by which nodes read and write the bucket."""
    ssh_user: str = "ubuntu"


class Gcp(Config):
    kind: Literal["gcp"]
    project: str
    region: str
    zone: str
    source_image: str
    """With the GPU driver, Docker and NVIDIA's container toolkit."""
    subnet: str | None = None
    data_subnets: tuple[str, ...] = ()
    """Of the four networks that carry GPUDirect-TCPX."""
    ssh_user: str = "ubuntu"


class Azure(Config):
    kind: Literal["azure"]
    location: str
    resource_group: str
    image: tuple[str, str, str, str]
    """Publisher, offer, SKU and version; with the GPU driver, Docker, NVIDIA's container toolkit and InfiniBand."""
    ssh_user: str = "ubuntu"


class Hosts(Config):
    """Machines that are there already and answer to SSH."""

    kind: Literal["hosts"]
    head: str
    workers: tuple[str, ...]
    ssh_user: str
    ssh_private_key: str | None = None
    port: int = Field(default=6379, ge=1024, le=65535)
    """Of Ray's control store."""


class Kubernetes(Config):
    """KubeRay's operator makes the pods."""

    kind: Literal["kubernetes"]
    namespace: str = "default"
    claim: str | None = None
    """The PersistentVolumeClaim (ReadWriteMany) at `storage.path`, unless `storage.nfs` is."""
    queue: str | None = None
    """The Kueue LocalQueue that admits the cluster whole or not at all."""
    priority: str | None = None
    """The Kueue WorkloadPriorityClass."""
    spot_label: dict[str, str] = Field(default_factory=dict)
    """What spot nodes are labelled with here, and tainted with where they are."""
    spot_drain_s: int = Field(default=20, ge=0, le=600)
    """From the notice to the end of a spot node, less a few seconds."""
    device_resources: dict[str, int] = Field(default_factory=dict)
    """More devices of a worker, such as vpc.amazonaws.com/efa: 32."""
    redis: str | None = None
    """HOST:PORT of the Redis that a new head goes on from; None: the cluster is lost with its head."""
    redis_secret_name: str | None = None
    """The Secret that has its password under the key `password`."""


class Slurm(Config):
    """One batch job is one cluster; its first node is the head too."""

    kind: Literal["slurm"]
    partition: str
    account: str | None = None
    time_limit: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$")
    options: tuple[str, ...] = ()
    """More #SBATCH lines, such as --qos=high."""


Provider = Annotated[Aws | Gcp | Azure | Hosts | Kubernetes | Slurm, Field(discriminator="kind")]

_FABRICS: dict[str, tuple[Fabric, ...]] = {
    "aws": ("none", "efa"),
    "gcp": ("none", "tcpx"),
    "azure": ("none", "infiniband"),
    "hosts": ("none", "infiniband"),
    "kubernetes": ("none",),
    "slurm": ("none", "infiniband"),
}


class Cluster(Config):
    name: str = Field(pattern=_NAME)
    """By which `up`, `down` and `status` know it; that of its file, unless --set says otherwise."""
    image: str | None
    """The container image of every node; None: nodes have Tidegate installed, and `setup` says how to reach it."""
    setup: tuple[str, ...] = ()
    """Shell commands before Ray is started on a node, such as `. /opt/tidegate/bin/activate`."""
    head: Head | None = None
    """None where the provider names it or has none of its own: hosts, slurm."""
    pools: dict[Annotated[str, Field(pattern=_NAME)], Pool] = Field(min_length=1)
    storage: Storage = Storage()
    env: dict[Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")], str] = Field(default_factory=dict)
    """The environment of every node, such as MLFLOW_TRACKING_URI. Secrets come in other ways: cluster/README.md."""
    idle_timeout_minutes: float = Field(default=15, gt=0)
    """An idle worker node goes after so long; longer than one takes to start, or nodes come and go for ever."""
    provider: Provider

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        kind = self.provider.kind
        for name, pool in self.pools.items():
            if pool.fabric not in _FABRICS[kind]:
                raise ValueError(f"pools.{name}.fabric={pool.fabric} is not known with provider.kind={kind}")
            if pool.spot and kind in ("hosts", "slurm"):
                raise ValueError(f"pools.{name}.spot=True: provider.kind={kind} has no spot machines")
            if pool.node_config and kind not in ("aws", "gcp", "azure"):
                raise ValueError(f"pools.{name}.node_config is for clouds, not for provider.kind={kind}")
            if pool.instance is None and kind in ("aws", "gcp", "azure"):
                raise ValueError(f"pools.{name}.instance=None: provider.kind={kind} needs one")
        self._check_head()
        self._check_storage()
        self._check_provider()
        return self

    def _check_head(self) -> None:
        kind = self.provider.kind
        if kind in ("hosts", "slurm"):
            if self.head is not None or len(self.pools) != 1:
                raise ValueError(f"provider.kind={kind} has one pool (got {len(self.pools)}) and no head: section")
        elif self.head is None:
            raise ValueError(f"head=None: provider.kind={kind} needs one")
        elif self.head.instance is None and kind != "kubernetes":
            raise ValueError(f"head.instance=None: provider.kind={kind} needs one")

    def _check_storage(self) -> None:
        provider, storage = self.provider, self.storage
        if provider.kind in ("aws", "gcp", "azure") and storage.nfs is None:
            raise ValueError(f"storage.nfs=None: machines of provider.kind={provider.kind} share nothing by themselves")
        if isinstance(provider, Kubernetes) and (storage.nfs is None) == (provider.claim is None):
            raise ValueError(
                f"storage.nfs={storage.nfs} and provider.claim={provider.claim}: one of them is mounted at storage.path"
            )

    def _check_provider(self) -> None:
        provider = self.provider
        fabrics = {pool.fabric for pool in self.pools.values()}
        if isinstance(provider, Aws) and "efa" in fabrics and not (provider.subnet and provider.security_groups):
            raise ValueError("EFA needs provider.subnet and provider.security_groups")
        if isinstance(provider, Gcp) and "tcpx" in fabrics and len(provider.data_subnets) != 4:
            raise ValueError(f"GPUDirect-TCPX needs four provider.data_subnets (got {len(provider.data_subnets)})")
        if isinstance(provider, Gcp) and "tcpx" in fabrics and not provider.subnet:
            raise ValueError("GPUDirect-TCPX needs provider.subnet")
        if isinstance(provider, Hosts):
            (name, pool), *_ = self.pools.items()
            if pool.max_nodes > len(provider.workers):
                raise ValueError(
                    f"pools.{name}.max_nodes={pool.max_nodes} is more than the {len(provider.workers)} hosts in "
                    "provider.workers"
                )
        if isinstance(provider, Kubernetes):
            if self.image is None:
                raise ValueError("image=None: pods need one")
            if self.setup:
                raise ValueError("setup is for nodes without an image; provider.kind=kubernetes takes none")
            if any(pool.spot for pool in self.pools.values()) and not provider.spot_label:
                raise ValueError("a spot pool needs provider.spot_label, to find such nodes by")
            if provider.priority and not provider.queue:
                raise ValueError(f"provider.priority={provider.priority} is Kueue's; name provider.queue too")
            if provider.redis_secret_name and not provider.redis:
                raise ValueError(f"provider.redis_secret_name={provider.redis_secret_name}, but provider.redis=None")

    @property
    def max_nodes(self) -> int:
        """Workers at most."""
        return sum(pool.max_nodes for pool in self.pools.values())

    @property
    def max_gpus(self) -> int:
        return sum(pool.max_nodes * pool.gpus for pool in self.pools.values())

    @property
    def gpus(self) -> str:
        """With all nodes, as `tidegate plan` takes it: 64xH100.

        Raises:
            ConfigError: there are none, or of several kinds, between which a job is not split.
        """
        kinds = sorted({pool.gpu for pool in self.pools.values() if pool.gpu})
        if len(kinds) != 1:
            raise ConfigError(f"cluster {self.name} has GPUs of {' and '.join(kinds) or 'no kind'}; plan takes one")
        return f"{self.max_gpus}x{kinds[0]}"

    @property
    def of_gpus(self) -> dict[str, float]:
        """What `tidegate plan` takes in place of what it knows of a GPU; of pools that differ, what is least."""
        pools = [pool for pool in self.pools.values() if pool.gpu]
        networks = [pool.network_gb_per_s for pool in pools if pool.network_gb_per_s]
        network = {"network_gb_per_s": min(networks)} if networks else {}
        return {"gpus_per_node": min(pool.gpus for pool in pools), **network}

    @property
    def autoscales(self) -> bool:
        return any(pool.min_nodes < pool.max_nodes for pool in self.pools.values())

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of Ray on the cluster."""
        ours = {
            "RAY_AUTH_MODE": "token",
            "TIDEGATE_STATE": f"{self.storage.path}/state",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        ours |= {"TIDEGATE_STORAGE": self.storage.bucket} if self.storage.bucket else {}
        return ours | self.env

    @property
    def to_fill_in(self) -> list[str]:
        """Fields whose values only the owner of the account knows and has not given yet."""
        values = {name: value if isinstance(value, list) else [value] for name, value in flatten(self).items()}
        return [name for name, items in values.items() if any(_PLACEHOLDER in str(item) for item in items)]
