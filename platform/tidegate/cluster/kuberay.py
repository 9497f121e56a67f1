"""Clusters on Kubernetes: KubeRay's RayCluster, or a RayJob that makes one for a single job."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from tidegate.cluster.config import Cluster, Kubernetes, Machine, Pool
from tidegate.cluster.versions import ray_version
from tidegate.config import JobFile
from tidegate.train.job import Job

__all__ = ["KUBERAY_VERSION", "manifest"]

KUBERAY_VERSION = "1.7.0"
"""The oldest operator that knows all of these fields; its schemas are in tests/cluster/."""

_USER = 1000  # of the image
_HOUR_S = 3600
_JOB_FOLDER = "/etc/tidegate/job"
"""On the head, where the ConfigMap of a RayJob has its files."""
_SAVE_S = 30
"""From the end of a drain until the pod is killed: Ray ends its processes."""


def manifest(cluster: Cluster, job: JobFile | None = None) -> list[dict[str, Any]]:
    """Manifests for `kubectl apply`.

    Args:
        cluster: of provider kubernetes.
        job: of a RayJob, with a ConfigMap of its files; None: a RayCluster that stays.
    """
    provider = cluster.provider
    assert isinstance(provider, Kubernetes)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    if provider.queue:
        labels["kueue.x-k8s.io/queue-name"] = provider.queue
        if cluster.autoscales:  # otherwise Kueue admits a fixed size only
            annotations["kueue.x-k8s.io/elastic-job"] = "true"
    if provider.priority:
        labels["kueue.x-k8s.io/priority-class"] = provider.priority
    metadata: dict[str, Any] = {"name": cluster.name, "namespace": provider.namespace}
    metadata |= {"labels": labels} if labels else {}
    metadata |= {"annotations": annotations} if annotations else {}
    spec = _cluster_spec(cluster, provider)
    if job is None:
        return [{"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}]
    files = _files(job)
    *_, file = files
    name, job_dir = job.load(Job).config.name, str(job.paths[-1].parent)
    _mount_files(spec["headGroupSpec"]["template"]["spec"], cluster, files)
    spec = {
        # By its name the run goes on, in a retry or in another RayJob.
        "entrypoint": shlex.join(
            ["tidegate", "train", f"{_JOB_FOLDER}/{file}", "--name", name, "--job-dir", job_dir, "--address", "auto"]
        ),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 1,  # the driver is lost with its head
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _HOUR_S,
        "rayClusterSpec": spec,
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _config_map(cluster), "namespace": provider.namespace},
        "data": {f"{index}.yaml": text for index, text in enumerate(files.values())},
    }
    return [config_map, {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}]


def _files(job: JobFile) -> dict[str, str]:
    """Texts of the job's files by their paths as they stand to each other, the job's own last."""
    whole = [Path(os.path.normpath(path.absolute())) for path in job.paths]
    above = os.path.commonpath([path.parent for path in whole])
    return {path.relative_to(above).as_posix(): path.read_text(encoding="utf-8") for path in whole}


def _config_map(cluster: Cluster) -> str:
    return f"{cluster.name}-job"


def _mount_files(pod: dict[str, Any], cluster: Cluster, files: dict[str, str]) -> None:
    items = [{"key": f"{index}.yaml", "path": path} for index, path in enumerate(files)]
    pod["volumes"].append({"name": "job", "configMap": {"name": _config_map(cluster), "items": items}})
    pod["containers"][0]["volumeMounts"].append({"name": "job", "mountPath": _JOB_FOLDER, "readOnly": True})


def _cluster_spec(cluster: Cluster, provider: Kubernetes) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "rayVersion": ray_version(),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": cluster.autoscales,
        "headGroupSpec": _head(cluster, provider),
        "workerGroupSpecs": [_workers(cluster, provider, name, pool) for name, pool in cluster.pools.items()],
    }
    if cluster.autoscales:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": round(cluster.idle_timeout_minutes * 60),
            "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1Gi"}},
        }
    if provider.redis:
        options: dict[str, Any] = {"redisAddress": provider.redis}
        if provider.redis_secret_name:
            reference = {"name": provider.redis_secret_name, "key": "password"}
            options["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
        spec["gcsFaultToleranceOptions"] = options
    return spec


def _head(cluster: Cluster, provider: Kubernetes) -> dict[str, Any]:
    assert cluster.head is not None
    container = _container(cluster, cluster.head, "ray-head", cluster.environment, _limits(cluster.head))
    ports = {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    pod = _pod(cluster, provider, cluster.head, container)
    off_spot = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in provider.spot_label.items()]
    if off_spot:
        terms = {"nodeSelectorTerms": [{"matchExpressions": off_spot}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return {"rayStartParams": {}, "template": {"spec": pod}}  # KubeRay opens the dashboard to the pod's network


def _workers(cluster: Cluster, provider: Kubernetes, name: str, pool: Pool) -> dict[str, Any]:
    limits = _limits(pool) | {key: str(number) for key, number in provider.device_resources.items()}
    environment = cluster.environment
    if pool.gpus:
        limits["nvidia.com/gpu"] = str(pool.gpus)
    if pool.spot:  # the node's end reaches Ray as SIGTERM to its pod, upon which it drains for so long
        environment = environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(provider.spot_drain_s)}
    pod = _pod(cluster, provider, pool, _container(cluster, pool, "ray-worker", environment, limits))
    pod["terminationGracePeriodSeconds"] = (provider.spot_drain_s if pool.spot else 30) + _SAVE_S
    if pool.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    labels = {"ray.io/market-type": "spot" if pool.spot else "on-demand"}
    labels |= {"ray.io/accelerator-type": pool.gpu} if pool.gpu else {}
    if pool.spot:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | provider.spot_label
        pod["tolerations"] = pod.get("tolerations", []) + [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in provider.spot_label.items()
        ]
    return {
        "groupName": name,
        "replicas": pool.min_nodes,
        "minReplicas": pool.min_nodes,
        "maxReplicas": pool.max_nodes,
        "rayStartParams": {},
        "labels": labels,
        "template": {"spec": pod},
    }


def _limits(machine: Machine) -> dict[str, str]:
    return {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}


def _container(
    cluster: Cluster, machine: Machine, name: str, environment: dict[str, str], limits: dict[str, str]
) -> dict[str, Any]:
    return {
        "name": name,
        "image": cluster.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        # The same of both: no other pod takes a worker's cores or memory, and Ray counts what it has.
        "resources": {"limits": limits, "requests": limits | {"ephemeral-storage": f"{machine.disk_gb // 2}G"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "tidegate", "mountPath": cluster.storage.path},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _pod(cluster: Cluster, provider: Kubernetes, machine: Machine, container: dict[str, Any]) -> dict[str, Any]:
    if cluster.storage.nfs:
        server, _, export = cluster.storage.nfs.partition(":")
        shared: dict[str, Any] = {"nfs": {"server": server, "path": export}}
    else:
        shared = {"persistentVolumeClaim": {"claimName": provider.claim}}
    pod: dict[str, Any] = {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER},
        "volumes": [
            {"name": "tidegate", **shared},
            # Ray's object store and NCCL; Kubernetes gives 64 MiB.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(machine.memory_gib // 3, 1)}Gi"}},
        ],
    }
    if machine.instance:
        pod["nodeSelector"] = {"node.kubernetes.io/instance-type": machine.instance}
    return pod
