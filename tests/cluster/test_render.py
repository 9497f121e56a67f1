"""Every cluster file renders, and what it renders to is what Ray's launcher, KubeRay and bash accept."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from tidegate.cluster import cluster_files, load_cluster, render
from tidegate.cluster.config import Hosts, Kubernetes, Slurm
from tidegate.cluster.kuberay import KUBERAY_VERSION
from tidegate.config import ConfigError, load
from tidegate.train.job import Job

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(cluster_files())
KINDS = {name: load_cluster(name).provider.kind for name in NAMES}
LAUNCHED = [name for name in NAMES if KINDS[name] in ("aws", "gcp", "azure", "hosts")]
ON_KUBERNETES = [name for name in NAMES if KINDS[name] == "kubernetes"]
SPOT = ["--set", "pools.gpu.spot=true"]
PINNED_RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def document(name, *overrides, nodes=None, job=None, auth=Path("/nowhere/ray")):
    return documents(name, *overrides, nodes=nodes, job=job, auth=auth)[-1]


def documents(name, *overrides, nodes=None, job=None, auth=Path("/nowhere/ray")):
    return list(yaml.safe_load_all(render(load_cluster(name, overrides, nodes), auth, job)))


def problem(name, *overrides, nodes=None, job=None):
    with pytest.raises(ConfigError) as error:
        render(load_cluster(name, overrides, nodes), Path("/nowhere"), job)
    return str(error.value)


def as_ray_reads_it(name, *overrides, **options):
    """With Ray's defaults filled in and its own checks passed."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(document(name, *overrides, **options))
    validate_config(config)
    return config


@functools.cache
def kuberay(kind):
    """A validator of KubeRay's schema, in which a field that it does not know is an error."""
    folder = Path(__file__).parent / f"kuberay-{KUBERAY_VERSION}"
    schema = json.loads(gzip.decompress((folder / f"ray.io_{kind.lower()}s.json.gz").read_bytes()))
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema):
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


# --- Ray's launcher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_what_its_launcher_gets(name):
    cluster, config = load_cluster(name, nodes=2), as_ray_reads_it(name, nodes=2)
    (pool,) = cluster.pools.values()
    assert config["cluster_name"] == name
    assert config["max_workers"] == pool.max_nodes
    workers = [node for key, node in config["available_node_types"].items() if key != config["head_node_type"]]
    if not isinstance(cluster.provider, Hosts):  # Ray makes one type of all hosts
        assert [(node["min_workers"], node["max_workers"], node["resources"]) for node in workers] == [
            (2, pool.max_nodes, {"CPU": pool.cpus, "GPU": pool.gpus})
        ]


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_head_is_closed_and_of_this_ray(name):
    config = as_ray_reads_it(name)
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "export RAY_AUTH_MODE=token" in start
    assert config["file_mounts"] == {"~/.ray": "/nowhere/ray"}
    commands = config["head_setup_commands"] + config["worker_setup_commands"]
    assert sum(f"version {PINNED_RAY}'" in command for command in commands) == 2, "both check the version"
    assert not any("wheels/latest" in command for command in commands), "Ray's default is its newest build"


@pytest.mark.parametrize("name", ["aws-h100", "gcp-h100", "azure-h100"])
def test_spot_is_for_workers_only(name):
    def asks_for_spot(node):
        text = json.dumps(node["node_config"]).lower()
        return '"spot"' in text

    for overrides, wanted in (((), False), (("pools.gpu.spot=true",), True)):
        types = document(name, *overrides)["available_node_types"]
        assert not asks_for_spot(types["head"])
        assert asks_for_spot(types["gpu"]) == wanted
        assert types["gpu"]["labels"]["ray.io/market-type"] == ("spot" if wanted else "on-demand")


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_a_spot_file_is_its_base_and_one_word(name):
    spot, base = load_cluster(f"{name}-spot-h100"), load_cluster(f"{name}-h100", ["pools.gpu.spot=true"])
    assert spot.model_copy(update={"name": base.name}) == base


def test_efa_has_one_card_for_ip_and_every_card_for_itself():
    gpu = document("aws-h100", "provider.subnet=subnet-1", "provider.security_groups=[sg-1]")["available_node_types"][
        "gpu"
    ]
    cards = gpu["node_config"]["NetworkInterfaces"]
    places = [(card["NetworkCardIndex"], card["DeviceIndex"]) for card in cards]
    assert len(cards) == 33
    assert len(set(places)) == 33
    assert [card["InterfaceType"] for card in cards] == ["interface"] + ["efa-only"] * 32
    assert {card["SubnetId"] for card in cards} == {"subnet-1"}
    assert "SubnetIds" not in gpu["node_config"], "Ray takes one or the other"
    assert "--device=/dev/infiniband" in gpu["docker"]["worker_run_options"]


def test_tcpx_has_four_networks_beside_the_first():
    gpu = document("gcp-h100")["available_node_types"]["gpu"]
    assert len(gpu["node_config"]["networkInterfaces"]) == 5
    assert any("NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=eth1,eth2,eth3,eth4" in o for o in gpu["docker"]["worker_run_options"])
    assert any("mount -t nfs4" in command for command in gpu["initialization_commands"])  # they replace the common ones


def test_what_a_pool_says_itself_wins():
    gpu = document("aws-h100", "pools.gpu.node_config={KeyName: mine, InstanceType: p5.4xlarge}")
    node = gpu["available_node_types"]["gpu"]["node_config"]
    assert (node["KeyName"], node["InstanceType"]) == ("mine", "p5.4xlarge")


def test_hosts_without_an_image_are_set_up_by_their_own_commands():
    config = as_ray_reads_it("on-prem", "image=null", "setup=['. /opt/t/bin/activate']", "env={A: x y}", nodes=1)
    assert "docker" not in config or not config["docker"]
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". /opt/t/bin/activate && ")
    assert "export A='x y' && " in config["worker_start_ray_commands"][-1]
    assert config["provider"]["worker_ips"] == ["gpu1.change-me", "gpu2.change-me"]


# --- KubeRay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("name", ON_KUBERNETES)
def test_kuberay_accepts_the_manifests(name, spot):
    if name in ("kuberay", "kuberay-kueue") and spot:
        assert "provider.spot_label" in problem(name, "pools.gpu.spot=true")
        return
    overrides = [f"pools.gpu.spot={str(spot).lower()}"]
    kuberay("RayCluster").validate(document(name, *overrides))
    job = document(name, *overrides, job=Path("jobs/h100.yaml"))
    kuberay("RayJob").validate(job)
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert (pod["volumes"].pop()["name"], pod["containers"][0]["volumeMounts"].pop()["name"]) == ("job", "job")
    assert job["spec"]["rayClusterSpec"] == document(name, *overrides)["spec"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PINNED_RAY


def test_the_schemas_refuse_what_kuberay_does_not_know():
    for path, value in (
        (("autoscalerOptions", "version"), "v3"),
        (("autoscalerOptions", "verson"), "v2"),
        (("authOptions", "mode"), "on"),
    ):
        broken = document("kuberay")
        broken["spec"][path[0]][path[1]] = value
        with pytest.raises(jsonschema.ValidationError):
            kuberay("RayCluster").validate(broken)


def test_a_spot_pod_finds_its_node_and_the_head_avoids_it():
    spec = document("kuberay-eks", "pools.gpu.spot=true")["spec"]
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    assert worker["nodeSelector"] == {
        "node.kubernetes.io/instance-type": "p5.48xlarge",
        "eks.amazonaws.com/capacityType": "SPOT",
    }
    assert {(t["key"], t.get("value")) for t in worker["tolerations"]} == {
        ("nvidia.com/gpu", None),
        ("eks.amazonaws.com/capacityType", "SPOT"),
    }
    terms = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms == [
        {"matchExpressions": [{"key": "eks.amazonaws.com/capacityType", "operator": "NotIn", "values": ["SPOT"]}]}
    ]
    (container,) = worker["containers"]
    drain = next(e["value"] for e in container["env"] if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert int(drain) < worker["terminationGracePeriodSeconds"]
    limits = container["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["vpc.amazonaws.com/efa"]) == ("8", "32")


def test_pods_run_as_nobody_special_with_a_token_and_shared_memory():
    spec = document("kuberay")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mnt/tidegate", "/dev/shm"}
        assert container["resources"]["limits"].items() <= container["resources"]["requests"].items()


def test_a_queue_admits_a_fixed_size_whole_and_an_elastic_one_in_slices():
    fixed = document("kuberay-kueue", "provider.priority=high")
    assert fixed["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "tidegate",
        "kueue.x-k8s.io/priority-class": "high",
    }
    assert not fixed["spec"]["enableInTreeAutoscaling"]
    assert "autoscalerOptions" not in fixed["spec"]
    elastic = document("kuberay-kueue", "pools.gpu.min_nodes=0")
    assert elastic["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert elastic["spec"]["autoscalerOptions"]["version"] == "v2"


def test_a_head_goes_on_from_redis_with_its_password_in_a_secret():
    options = document("kuberay-kueue")["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis-password", "key": "password"}
    assert "gcsFaultToleranceOptions" not in document("kuberay")["spec"]


def test_nfs_is_mounted_in_place_of_a_claim():
    overrides = ["provider.claim=null", "storage.nfs=10.0.0.9:/x"]
    volumes = document("kuberay", *overrides)["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volumes[0] == {"name": "tidegate", "nfs": {"server": "10.0.0.9", "path": "/x"}}


def test_a_rayjob_brings_its_files_and_goes_on_with_its_run(tmp_path):
    (tmp_path / "mine").mkdir()
    h100 = os.path.relpath(ROOT / "jobs" / "h100.yaml", tmp_path)
    (tmp_path / "base.yaml").write_text(f"extends: {h100}\ntrain: {{seed: 7}}\n")
    mine = tmp_path / "mine" / "job.yaml"
    mine.write_text("name: mine\nextends: ../base.yaml\n")
    config_map, job = documents("kuberay-eks", "provider.namespace=lab", job=mine)
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = (each["configMap"] for each in pod["volumes"] if each["name"] == "job")
    assert (volume["name"], "lab") == tuple(config_map["metadata"].values())
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "job")
    _, _, file, *rest = shlex.split(job["spec"]["entrypoint"])
    assert rest == ["--name", "mine", "--job-dir", str(tmp_path / "mine"), "--address", "auto"]
    copies = tmp_path / "copies"
    for item in volume["items"]:  # as the kubelet does
        path = copies / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_map["data"][item["key"]])
    there = copies / Path(file).relative_to(mount["mountPath"])
    assert load(there, Job).config == load(mine, Job).config


@pytest.mark.parametrize("name", ["kuberay-eks", "aws-h100", "slurm"])
def test_all_nodes_know_the_bucket_for_checkpoints(name):
    said = render(load_cluster(name, ["storage.bucket=s3://b/x"]), Path("/nowhere"))
    assert re.search(r"TIDEGATE_STORAGE(=|\n +value: )s3://b/x", said)
    assert "TIDEGATE_STORAGE" not in render(load_cluster(name, ["storage.bucket=null"]), Path("/nowhere"))


# --- bad input -----------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_what_there_is():
    message = problem("aws-h1000")
    assert message.startswith("aws-h1000: no such cluster; there are: aws-a100, ")
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("aws-h100", ["pools.gpu.maxnodes=3"], "--set pools.gpu.maxnodes=3: pools.gpu.maxnodes: unknown field (got 3)"),
        ("aws-h100", ["head.spot=true"], "head.spot: unknown field"),
        ("aws-h100", ["pools.gpu.min_nodes=9"], "min_nodes=9 is more than max_nodes=8"),
        ("aws-h100", ["pools.gpu.gpus=0"], "gpu=H100 and gpus=0 exclude each other"),
        ("aws-h100", ["pools.gpu.fabric=tcpx"], "pools.gpu.fabric=tcpx is not known with provider.kind=aws"),
        ("aws-h100", ["provider.subnet=null"], "EFA needs provider.subnet"),
        ("aws-h100", ["pools.gpu.instance=null"], "pools.gpu.instance=None"),
        ("aws-h100", ["storage.nfs=null"], "storage.nfs=None"),
        ("aws-h100", ["storage.path=mnt"], "storage.path: must be an absolute path below / (got 'mnt')"),
        ("aws-h100", ["storage.path='/mnt/$(id)'"], "holds a character that a shell would read"),
        ("aws-h100", ["env={my-name: x}"], "env.my-name"),
        ("aws-h100", ["env.HF_TOKEN=x"], "env.HF_TOKEN: holds a secret"),
        ("aws-h100", ["name=Aws_H100"], "name: "),
        ("gcp-h100", ["provider.data_subnets=[a]"], "four provider.data_subnets (got 1)"),
        ("on-prem", ["pools.gpu.max_nodes=3"], "pools.gpu.max_nodes=3 is more than the 2 hosts in provider.workers"),
        ("on-prem", ["pools.gpu.spot=true"], "pools.gpu.spot=True: provider.kind=hosts has no spot machines"),
        ("kuberay", ["storage.nfs=10.0.0.9:/x"], "provider.claim=change-me: one of them"),
        ("kuberay", ["image=null"], "image=None: pods need one"),
        ("slurm", ["head={cpus: 1, memory_gib: 1}"], "provider.kind=slurm has one pool (got 1) and no head: section"),
        ("slurm", ["provider.kind=pbs"], "unknown kind 'pbs'"),
    ],
)
def test_a_mistake_is_named_with_field_and_value(name, overrides, says):
    assert says in problem(name, *overrides)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {ROOT}/cluster/aws-h100.yaml\npools:\n  gpu: {{gpu: H1000}}\n")
    assert problem(str(file)).startswith(f"{file}: pools.gpu.gpu: ")


def test_more_nodes_than_a_pool_may_have():
    assert "pools.gpu.max_nodes=8; for more, --set pools.gpu.max_nodes=9" in problem("aws-h100", nodes=9)
    assert "--nodes 0" in problem("aws-h100", nodes=0)
    assert load_cluster("aws-h100", ["pools.gpu.max_nodes=9"], nodes=9).max_gpus == 72


def test_nodes_of_several_pools_are_said_by_name():
    more = "pools.cpu={gpu: null, gpus: 0, cpus: 8, memory_gib: 32, instance: m7i.2xlarge, max_nodes: 3}"
    assert "--set pools.gpu.min_nodes=2" in problem("aws-h100", more, nodes=2)
    assert set(as_ray_reads_it("aws-h100", more)["available_node_types"]) == {"head", "gpu", "cpu"}


def test_a_gpu_job_needs_a_pool_with_gpus():
    no_gpus = ["pools.gpu.gpu=null", "pools.gpu.gpus=0"]
    assert "resources.gpu=True, but no pool" in problem("kuberay", *no_gpus, job=Path("jobs/h100.yaml"))
    document("kuberay", *no_gpus, job=Path("jobs/demo.yaml"))


def test_a_job_is_not_larger_than_all_nodes(tmp_path):
    job = tmp_path / "large.yaml"
    job.write_text(f"extends: {ROOT}/jobs/h100.yaml\nresources: {{workers: 2}}\ntrain: {{micro_batch: 8}}\n")
    one_gpu = ["pools.gpu.gpus=1", "pools.gpu.max_nodes=1"]
    assert "2 of resources.cpus_per_worker=8 with a GPU each, is more than the 1" in problem(
        "aws-h100", *one_gpu, job=job
    )
    document("aws-h100", "pools.gpu.gpus=1", "pools.gpu.max_nodes=2", job=job)


@pytest.mark.parametrize("name", NAMES)
def test_plan_knows_the_gpus_of_every_file(name):
    from tidegate.plan import parse_gpus

    cluster = load_cluster(name)
    hardware = parse_gpus(cluster.gpus)
    assert str(hardware) == cluster.gpus == f"{cluster.max_gpus}x{cluster.pools['gpu'].gpu}"
    assert hardware.gpu.gpus_per_node == cluster.pools["gpu"].gpus == cluster.of_gpus["gpus_per_node"]


def test_plan_takes_nodes_and_network_of_the_cluster(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from tidegate.cli import app
    from tidegate.plan import report

    taken = []
    monkeypatch.setattr(report, "plan_job", lambda job, overrides, hardware, *rest: taken.append(hardware))
    (tmp_path / "half.yaml").write_text(f"extends: {ROOT}/cluster/gcp-h100.yaml\npools: {{gpu: {{gpus: 4}}}}\n")
    for name in (str(tmp_path / "half.yaml"), "gcp-h200", "aws-h100"):
        done = CliRunner().invoke(app, ["plan", "jobs/h100.yaml", "--cluster", name])
        assert not done.exit_code, done.output
    half, rdma, aws = taken
    assert (str(half), half.gpu.gpus_per_node, half.gpu.network_gb_per_s) == ("32xH100", 4, 12.5)
    assert rdma.gpu.network_gb_per_s < 25, "its fast network has no setting here"
    assert (aws.gpu.gpus_per_node, aws.gpu.network_gb_per_s) == (8, 50.0)


def test_plan_takes_gpus_of_one_kind():
    a100 = "pools.old={gpu: A100, gpus: 8, cpus: 96, memory_gib: 1152, instance: p4de.24xlarge, max_nodes: 1}"
    with pytest.raises(ConfigError, match="cluster aws-h100 has GPUs of A100 and H100; plan takes one"):
        _ = load_cluster("aws-h100", [a100]).gpus
    with pytest.raises(ConfigError, match="of no kind"):
        _ = load_cluster("slurm", ["pools.gpu.gpu=null", "pools.gpu.gpus=0"]).gpus


def test_the_readmes_own_file_is_complete(tmp_path):
    (example,) = re.findall(r"^# mine\.yaml.*?(?=^```)", (ROOT / "cluster/README.md").read_text(), re.M | re.S)
    file = tmp_path / "mine.yaml"
    file.write_text(example.replace("cluster/", f"{ROOT}/cluster/"))
    cluster = load_cluster(str(file))
    assert (cluster.name, cluster.to_fill_in) == ("mine", [])
    assert cluster.pools["gpu"].spot


def test_the_readme_knows_every_file():
    named = set(re.findall(r"`([a-z0-9-]+)`", (ROOT / "cluster/README.md").read_text().split("```")[0]))
    assert named == set(NAMES)


def test_what_only_the_owner_knows_is_listed():
    assert load_cluster("slurm").to_fill_in == ["provider.partition"]
    assert load_cluster("slurm", ["provider.partition=gpu"]).to_fill_in == []
    assert "provider.data_subnets" in load_cluster("gcp-h100").to_fill_in  # in a list


def test_the_rendered_text_is_plain():
    for name in NAMES:
        text = render(load_cluster(name), Path("/nowhere"))
        assert "&id0" not in text
        assert "!!" not in text
    assert isinstance(load_cluster("slurm").provider, Slurm)
    assert isinstance(load_cluster("kuberay").provider, Kubernetes)


def test_the_slurm_script_is_bash():
    for overrides in ([], ["image=r/t:1"], ["provider.account=a", "provider.options=[--qos=high]"]):
        script = render(load_cluster("slurm", overrides, nodes=3), Path("/nowhere"))
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)
        assert "%%" not in script
        assert "#SBATCH --nodes=3\n" in script
    assert "#SBATCH --qos=high\n" in script
