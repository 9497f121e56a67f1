"""Clusters under Slurm: one batch script that starts Ray on the nodes of its allocation, runs, and ends it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from string import Template

from tidegate.cluster.config import Cluster, Slurm
from tidegate.cluster.versions import ray_version

__all__ = ["batch_script"]

_SCRIPT = Path(__file__).with_name("batch.sh")


class _Script(Template):
    """With `%%{name}` for a value: bash has other uses for `$`."""

    delimiter = "%%"


def batch_script(cluster: Cluster) -> str:
    """What `sbatch` reads. The number of nodes is the pool's `min_nodes`, or 1."""
    provider = cluster.provider
    assert isinstance(provider, Slurm)
    (pool,) = cluster.pools.values()
    options = {
        "job-name": cluster.name,
        "partition": provider.partition,
        "account": provider.account,
        "nodes": max(pool.min_nodes, 1),
        "ntasks-per-node": 1,
        "cpus-per-task": pool.cpus,
        "mem": f"{pool.memory_gib}G",
        "gpus-per-node": f"{pool.gpu.lower()}:{pool.gpus}" if pool.gpu else None,
        "time": provider.time_limit,
        "signal": "B:TERM@300",  # five minutes for the run to save
        "output": f"{cluster.name}-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in provider.options]
    container = ""
    if cluster.image:  # by the Pyxis plugin
        path = cluster.storage.path
        container = f"--container-image={shlex.quote(cluster.image)} --container-mounts={path}:{path} "
    return _Script(_SCRIPT.read_text(encoding="utf-8")).substitute(
        options="\n".join(lines),
        name=cluster.name,
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        setup="\n".join(cluster.setup),
        ray=ray_version(),
        storage=cluster.storage.path,
        container=container,
        cpus=pool.cpus,
        gpus=pool.gpus,
    )
