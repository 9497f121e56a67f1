"""`tidegate cluster`. Everything heavy is imported inside the commands, as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.options import Overrides, StateOption

__all__ = ["cluster"]

cluster = typer.Typer(no_args_is_help=True, help="Start a Ray cluster in a cloud, on hosts, on Kubernetes or in Slurm.")

ClusterFile = Annotated[str, typer.Argument(help="A file of cluster/, without .yaml, or a path", show_default=False)]
ClusterName = Annotated[str, typer.Argument(help="Of a cluster that was started from here", show_default=False)]
Nodes = Annotated[int | None, typer.Option(help="Worker nodes to begin with [default: none until jobs ask]")]
ClusterJob = Annotated[Path | None, typer.Option(help="A job that must fit; on Kubernetes, a RayJob of it")]
Minutes = Annotated[float, typer.Option(help="Give up after so many minutes", min=0.1)]


@cluster.command()
def render(
    name: ClusterFile,
    overrides: Overrides = [],  # noqa: B006
    nodes: Nodes = None,
    job: ClusterJob = None,
    out: Annotated[Path | None, typer.Option(help="File to write [default: standard output]")] = None,
    state_dir: StateOption = None,
) -> None:
    """Print what Ray's launcher, kubectl or sbatch reads for a cluster."""
    from tidegate.launch.cluster import render_cluster
    from tidegate.launch.state import default_state_dir

    render_cluster(name, overrides, nodes, job, out, (state_dir or default_state_dir()).absolute())


@cluster.command()
def up(
    name: ClusterFile,
    overrides: Overrides = [],  # noqa: B006
    nodes: Nodes = None,
    job: ClusterJob = None,
    minutes: Minutes = 30,
    state_dir: StateOption = None,
) -> None:
    """Start a cluster, or change one that runs; one that does not start is taken down again."""
    from tidegate.launch.cluster import cluster_up
    from tidegate.launch.state import open_state

    if not cluster_up(name, overrides, nodes, job, open_state(state_dir), minutes * 60):
        raise typer.Exit(1)


@cluster.command()
def down(name: ClusterName, minutes: Minutes = 30, state_dir: StateOption = None) -> None:
    """Take a cluster down, with all its nodes."""
    from tidegate.launch.cluster import cluster_down
    from tidegate.launch.state import open_state

    if not cluster_down(name, open_state(state_dir), minutes * 60):
        raise typer.Exit(1)


@cluster.command()
def status(name: ClusterName, state_dir: StateOption = None) -> None:
    """Show the nodes of a cluster."""
    from tidegate.launch.cluster import cluster_status
    from tidegate.launch.state import open_state

    if not cluster_status(name, open_state(state_dir)):
        raise typer.Exit(1)
