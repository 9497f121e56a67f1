"""Clusters of machines by Ray's own launcher: AWS, GCP, Azure, and hosts that are there already.

What Ray would fill in by itself is written out where its defaults do not fit: a dashboard that everybody reaches,
stopped machines that cost money, another version of Ray. Only what its autoscaler needs on the head is left to Ray.
"""

from __future__ import annotations

import shlex
from typing import Any

from tidegate.cluster.config import Aws, Azure, Cluster, Fabric, Gcp, Hosts, Machine, Pool
from tidegate.cluster.versions import ray_version

__all__ = ["launcher_config"]

_AUTH_FOLDER = "~/.ray"  # where Ray looks for the file auth_token; Docker follows changes in folders, not in files
_CHECK_TOKEN = (
    f"test -r {_AUTH_FOLDER}/auth_token || "
    "(echo 'the token cannot be read: the SSH user needs the id 1000, as in the image' >&2; exit 1)"
)
_PORT = 6379
_HEAD = "head"

_FABRIC_ENV: dict[Fabric, dict[str, str]] = {
    "none": {},
    # docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-start-nccl.html; the plugin is the AMI's
    "efa": {"FI_PROVIDER": "efa", "LD_LIBRARY_PATH": "/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib"},
    # docs.cloud.google.com/compute/docs/gpus/gpudirect
    "tcpx": {
        "LD_LIBRARY_PATH": "/usr/local/tcpx/lib64:/usr/local/nvidia/lib64",
        "NCCL_NET": "GPUDirectTCPX_v7",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_GPUDIRECTTCPX_CTRL_DEV": "eth0",
        "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "eth1,eth2,eth3,eth4",
        "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX": "/run/tcpx",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_CROSS_NIC": "0",
        "NCCL_NET_GDR_LEVEL": "PIX",
        "NCCL_P2P_PXN_LEVEL": "0",
    },
    # learn.microsoft.com/azure/virtual-machines/setup-infiniband
    "infiniband": {"NCCL_IB_PCI_RELAXED_ORDERING": "1", "UCX_TLS": "rc"},
}
_FABRIC_RUN_OPTIONS: dict[Fabric, list[str]] = {
    "none": [],
    "efa": ["--device=/dev/infiniband", "-v /opt/amazon:/opt/amazon:ro"],
    "tcpx": [
        "-v /var/lib/tcpx:/usr/local/tcpx:ro",
        "-v /var/lib/nvidia:/usr/local/nvidia:ro",
        "-v /run/tcpx:/run/tcpx",
    ],
    "infiniband": ["--device=/dev/infiniband"],
}
_TCPX_DAEMON = (  # receives for the GPUs; its NCCL plugin goes to /var/lib/tcpx
    "docker run --rm -v /var/lib:/var/lib us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/nccl-plugin-gpudirecttcpx "
    "install --install-nccl",
    "docker ps -q --filter name=tcpx-daemon | grep -q . || docker run --detach --rm --name tcpx-daemon --privileged "
    "--network=host -v /var/lib/nvidia/lib64:/usr/local/nvidia/lib64 -v /run/tcpx:/run/tcpx "
    "--env LD_LIBRARY_PATH=/usr/local/nvidia/lib64 us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/tcpgpudmarxd "
    "--gpu_nic_preset a3vm --gpu_shmem_type fd --uds_path /run/tcpx",
)


def launcher_config(cluster: Cluster, auth_folder: str) -> dict[str, Any]:
    """What `ray up` reads, as a mapping.

    Args:
        cluster: of provider aws, gcp, azure or hosts.
        auth_folder: on this machine, with the cluster's token in the file auth_token; it is copied to every node.
    """
    provider = cluster.provider
    config: dict[str, Any] = {
        "cluster_name": cluster.name,
        "max_workers": cluster.max_nodes,
        "upscaling_speed": float(max(cluster.max_nodes, 1)),  # a job's workers start together, so their nodes do too
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "file_mounts": {_AUTH_FOLDER: auth_folder},
        "initialization_commands": _mount(cluster),
        "setup_commands": [_with_setup(cluster, _check_version()), _CHECK_TOKEN],
        "head_start_ray_commands": [_with_setup(cluster, "ray stop"), _start_head(cluster)],
        "worker_start_ray_commands": [_with_setup(cluster, "ray stop"), _start_worker(cluster)],
    }
    if cluster.image:
        config["docker"] = _docker(cluster)
    if isinstance(provider, Hosts):
        (pool,) = cluster.pools.values()
        config["min_workers"] = pool.min_nodes
        config["provider"] = {"type": "local", "head_ip": provider.head, "worker_ips": list(provider.workers)}
        config["auth"] = {"ssh_user": provider.ssh_user}
        if provider.ssh_private_key:
            config["auth"]["ssh_private_key"] = provider.ssh_private_key
        return config
    assert isinstance(provider, (Aws, Gcp, Azure))
    assert cluster.head is not None
    config["auth"] = {"ssh_user": provider.ssh_user}
    config["provider"] = _PROVIDERS[provider.kind](provider)
    config["head_node_type"] = _HEAD
    node_types = {_HEAD: _node_type(cluster, cluster.head, None)}
    node_types |= {name: _node_type(cluster, pool, pool) for name, pool in cluster.pools.items()}
    config["available_node_types"] = node_types
    return config


def _node_type(cluster: Cluster, machine: Machine, pool: Pool | None) -> dict[str, Any]:
    """The head's, without a pool, or a pool's."""
    spot = pool is not None and pool.spot
    node_config = _NODE_CONFIGS[cluster.provider.kind](cluster.provider, machine, pool)
    entry: dict[str, Any] = {
        "resources": {"CPU": machine.cpus},
        "labels": {"ray.io/market-type": "spot" if spot else "on-demand"},
        "min_workers": pool.min_nodes if pool else 0,
        "max_workers": pool.max_nodes if pool else 0,
        "node_config": node_config,
    }
    if pool is None:
        return entry
    entry["node_config"] |= pool.node_config
    if pool.gpu:
        entry["resources"]["GPU"] = pool.gpus
        entry["labels"]["ray.io/accelerator-type"] = pool.gpu
    if pool.fabric != "none" and cluster.image:
        entry["docker"] = {"worker_run_options": _fabric_run_options(pool)}
    if pool.fabric == "tcpx":
        entry["initialization_commands"] = [*_mount(cluster), *_TCPX_DAEMON]
    return entry


def _docker(cluster: Cluster) -> dict[str, Any]:
    options = [
        "--ulimit nofile=65536:65536",
        "--ulimit memlock=-1",  # NCCL registers memory with network cards
        f"-v {cluster.storage.path}:{cluster.storage.path}",
    ]
    docker: dict[str, Any] = {
        "image": cluster.image,
        "container_name": "tidegate",
        "pull_before_run": True,
        "run_options": options,
    }
    if isinstance(cluster.provider, Hosts):
        (pool,) = cluster.pools.values()
        docker["worker_run_options"] = _fabric_run_options(pool)
    return docker


def _fabric_run_options(pool: Pool) -> list[str]:
    return _FABRIC_RUN_OPTIONS[pool.fabric] + [
        f"--env {name}={value}" for name, value in _FABRIC_ENV[pool.fabric].items()
    ]


# --- commands ------------------------------------------------------------------------------------------------


def _mount(cluster: Cluster) -> list[str]:
    """On the machine itself, before the container starts."""
    path, nfs = cluster.storage.path, cluster.storage.nfs
    if nfs is None:
        return []
    options = "nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport"
    return [
        "command -v mount.nfs4 || (sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common)",
        f"sudo mkdir -p {path} && (mountpoint -q {path} || sudo mount -t nfs4 -o {options} {nfs} {path})",
        f"sudo install -d -o 1000 -g 1000 {path}/state",  # the image's user
    ]


def _check_version() -> str:
    wanted = ray_version()
    return (
        f"ray --version | grep -qF 'version {wanted}' || "
        f"(echo 'Ray {wanted} is needed on every node, found:' $(ray --version) >&2; exit 1)"
    )


def _start_head(cluster: Cluster) -> str:
    # Ray's own default in clouds is a dashboard on 0.0.0.0.
    command = f"ray start --head --port={_port(cluster)} --dashboard-host=127.0.0.1"
    return _start(cluster, f"{command} --autoscaling-config=~/ray_bootstrap_config.yaml")


def _start_worker(cluster: Cluster) -> str:
    return _start(cluster, f"ray start --address=$RAY_HEAD_IP:{_port(cluster)}")


def _start(cluster: Cluster, command: str) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return _with_setup(cluster, " && ".join([*exports, "ulimit -n $(ulimit -Hn)", command]))


def _port(cluster: Cluster) -> int:
    return cluster.provider.port if isinstance(cluster.provider, Hosts) else _PORT


def _with_setup(cluster: Cluster, command: str) -> str:
    return " && ".join([*cluster.setup, command])


# --- clouds --------------------------------------------------------------------------------------------------


def _aws(provider: Aws) -> dict[str, Any]:
    # Ray would stop machines instead of ending them: their disks cost on.
    zones = ",".join(provider.zones)
    return {"type": "aws", "region": provider.region, "availability_zone": zones, "cache_stopped_nodes": False}


def _gcp(provider: Gcp) -> dict[str, Any]:
    return {
        "type": "gcp",
        "region": provider.region,
        "availability_zone": provider.zone,
        "project_id": provider.project,
    }


def _azure(provider: Azure) -> dict[str, Any]:
    return {"type": "azure", "location": provider.location, "resource_group": provider.resource_group}


def _aws_node(provider: Aws, machine: Machine, pool: Pool | None) -> dict[str, Any]:
    disk = {"VolumeSize": machine.disk_gb, "VolumeType": "gp3", "DeleteOnTermination": True}
    node: dict[str, Any] = {
        "InstanceType": machine.instance,
        "ImageId": provider.ami,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Instance metadata by token only; two hops, as containers are one further away.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if provider.instance_profile:
        node["IamInstanceProfile"] = {"Name": provider.instance_profile}
    if pool is not None and pool.fabric == "efa":
        node["NetworkInterfaces"] = _efa_interfaces(provider, pool.interfaces)
    else:
        if provider.subnet:
            node["SubnetIds"] = [provider.subnet]
        if provider.security_groups:
            node["SecurityGroupIds"] = list(provider.security_groups)
    if pool is not None and pool.spot:
        spot = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        node["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": spot}
    return node


def _efa_interfaces(provider: Aws, cards: int) -> list[dict[str, Any]]:
    """One for IP and, on every card, one for EFA.

    Source: docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-acc-inst-types.html
    """
    place: dict[str, Any] = {
        "SubnetId": provider.subnet,
        "Groups": list(provider.security_groups),
        "DeleteOnTermination": True,
    }
    first: dict[str, Any] = {"NetworkCardIndex": 0, "DeviceIndex": 0, "InterfaceType": "interface"}
    efa: list[dict[str, Any]] = [
        {"NetworkCardIndex": card, "DeviceIndex": 0 if card else 1, "InterfaceType": "efa-only"}
        for card in range(cards)
    ]
    return [interface | place for interface in (first, *efa)]


def _gcp_node(provider: Gcp, machine: Machine, pool: Pool | None) -> dict[str, Any]:
    boot = {"diskSizeGb": machine.disk_gb, "sourceImage": provider.source_image}
    node: dict[str, Any] = {
        "machineType": machine.instance,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": boot}],
    }
    if provider.subnet:
        subnets = [provider.subnet, *(provider.data_subnets if pool is not None and pool.fabric == "tcpx" else ())]
        node["networkInterfaces"] = [{"subnetwork": subnet, "nicType": "GVNIC"} for subnet in subnets]
        node["networkInterfaces"][0]["accessConfigs"] = [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}]
    if pool is not None:
        scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"}  # machines with GPUs cannot move
        if pool.spot:
            scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        node["scheduling"] = [scheduling]
    return node


def _azure_node(provider: Azure, machine: Machine, pool: Pool | None) -> dict[str, Any]:
    names = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
    parameters: dict[str, Any] = {
        "vmSize": machine.instance,
        "osDiskSize": machine.disk_gb,
        **dict(zip(names, provider.image, strict=True)),
    }
    if pool is None:
        parameters["availability_zone"] = "none"
    elif pool.spot:
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete"}
    return {"azure_arm_parameters": parameters}


_PROVIDERS: dict[str, Any] = {"aws": _aws, "gcp": _gcp, "azure": _azure}
_NODE_CONFIGS: dict[str, Any] = {"aws": _aws_node, "gcp": _gcp_node, "azure": _azure_node}
