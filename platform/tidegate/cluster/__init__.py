"""Descriptions of clusters, and what Ray's launcher, KubeRay or Slurm read for them. Nothing here imports Ray."""

from tidegate.cluster.config import Cluster
from tidegate.cluster.render import cluster_files, load_cluster, render

__all__ = ["Cluster", "cluster_files", "load_cluster", "render"]
