"""From the name of a cluster file to what the provider's own tool reads."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tidegate.cluster.config import Cluster, Kubernetes, Slurm
from tidegate.cluster.kuberay import KUBERAY_VERSION, manifest
from tidegate.cluster.launcher import launcher_config
from tidegate.cluster.slurm import batch_script
from tidegate.cluster.versions import ray_version
from tidegate.config import ConfigError, JobFile, load
from tidegate.train.job import Job

__all__ = ["cluster_files", "find_cluster", "load_cluster", "render"]

_REPOSITORY = Path(__file__).resolve().parents[3] / "cluster"
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "tidegate" / "cluster"


class _Dumper(yaml.SafeDumper):
    """Without anchors and aliases, which are for machines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def cluster_files() -> dict[str, Path]:
    """The clusters that can be named: those of ./cluster, else of this repository, else of the wheel."""
    places = Path("cluster"), _REPOSITORY, _INSTALLED
    folder = next((place for place in places if any(place.glob("*.yaml"))), places[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_cluster(name: str) -> Path:
    """A cluster's file, by its name in cluster/ or by its path.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    known = cluster_files()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    raise ConfigError(f"{name}: no such cluster; there are: {', '.join(known) or 'none'}, or the path of a .yaml file")


def load_cluster(name: str, overrides: Sequence[str] = (), nodes: int | None = None) -> Cluster:
    """Read a cluster file, with `--set` and the number of worker nodes to begin with laid over it.

    Raises:
        ConfigError: what is wrong, with file, field and value.
    """
    path = find_cluster(name)
    overrides = [f"name={path.stem}", *overrides]
    cluster: Cluster = load(path, Cluster, overrides).config
    if nodes is None:
        return cluster
    if len(cluster.pools) != 1:
        raise ConfigError(
            f"--nodes {nodes}: {path} has the pools {', '.join(cluster.pools)}; say which, as in "
            f"--set pools.{next(iter(cluster.pools))}.min_nodes={nodes}"
        )
    ((pool_name, pool),) = cluster.pools.items()
    if not 1 <= nodes <= pool.max_nodes:
        raise ConfigError(
            f"--nodes {nodes}: {path} allows 1 to pools.{pool_name}.max_nodes={pool.max_nodes}; for more, "
            f"--set pools.{pool_name}.max_nodes={max(nodes, 1)}"
        )
    return load(path, Cluster, [*overrides, f"pools.{pool_name}.min_nodes={nodes}"]).config


def render(cluster: Cluster, auth_folder: Path, job: Path | None = None) -> str:
    """What `ray up`, `kubectl apply` or `sbatch` reads.

    Args:
        auth_folder: where this machine keeps the cluster's token, for Ray's launcher; it need not exist yet.
        job: a job file that must fit; in Kubernetes the result is a RayJob that trains it.

    Raises:
        ConfigError: the job cannot run on such a cluster.
    """
    if job is not None:
        check_job(cluster, job)
    if isinstance(cluster.provider, Slurm):
        return batch_script(cluster)
    if isinstance(cluster.provider, Kubernetes):
        documents = manifest(cluster, JobFile(job) if job else None)
        reader = f"KubeRay {KUBERAY_VERSION}: kubectl apply -f"
    else:
        documents = [launcher_config(cluster, str(auth_folder))]
        reader = f"Ray {ray_version()}: ray up"
    head = f"# Rendered by tidegate cluster render, for {reader}. At most {cluster.max_nodes} worker nodes"
    head += f", {cluster.max_gpus} GPUs.\n" if cluster.max_gpus else ".\n"
    return head + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def check_job(cluster: Cluster, path: Path) -> None:
    """Whether a job fits on the cluster when it has all its nodes.

    Raises:
        ConfigError: what is asked, what there is.
    """
    job: Job = load(path, Job).config
    least = job.world_sizes[0]
    if job.resources.gpu and not cluster.max_gpus:
        raise ConfigError(f"{path}: resources.gpu=True, but no pool of cluster {cluster.name} has GPUs")
    cpus = job.resources.cpus_per_worker
    room = 0
    for pool in cluster.pools.values():
        by_cpu = pool.cpus // cpus
        room += pool.max_nodes * (min(by_cpu, pool.gpus) if job.resources.gpu else by_cpu)
    if least > room:
        gpus = " with a GPU each" if job.resources.gpu else ""
        raise ConfigError(
            f"{path}: the least number of workers, {least} of resources.cpus_per_worker={cpus}{gpus}, is more than the "
            f"{room} that cluster {cluster.name} has room for with all its {cluster.max_nodes} nodes; raise "
            "pools.*.max_nodes"
        )
