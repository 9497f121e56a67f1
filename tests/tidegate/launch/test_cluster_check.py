"""A Ray cluster of this machine with sick nodes: each is named with what is wrong, in time, and gets no workers."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tidegate.config import ConfigError, load
from tidegate.launch import cluster_check
from tidegate.launch.cluster_check import Seen, examine_cluster, unfit_nodes
from tidegate.launch.cluster_nodes import Node
from tidegate.launch.node_report import NodeReport, versions
from tidegate.train.job import Job
from tidegate.train.nvml import GpuState

HERE = versions()


class Nodes(NamedTuple):
    address: str
    well: Any
    other_version: Any
    no_storage: Any
    home: Path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs, and nodes of one, two and one; `~` is another folder on the last."""
    import ray
    from ray.cluster_utils import Cluster

    fake = tmp_path_factory.mktemp("packages")
    (fake / "mlflow-0.1.dist-info").mkdir()
    (fake / "mlflow-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 0.1\n")
    path = os.pathsep.join(filter(None, [str(fake), os.environ.get("PYTHONPATH")]))
    home, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    well = {"HOME": str(home)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "env_vars": well})
    try:
        other, far = well | {"PYTHONPATH": path}, {"HOME": str(elsewhere)}
        added = [cluster.add_node(num_cpus=1 + (env is other), env_vars=env) for env in (well, other, far)]
        ray.init(address=cluster.address, log_to_driver=False)
        yield Nodes(cluster.address, *added, home)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def home(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that this machine and all nodes but one find as `~/shared`."""
    monkeypatch.setenv("HOME", str(nodes.home))
    folder = nodes.home / "shared"
    folder.mkdir(exist_ok=True)
    yield folder
    assert not [*folder.iterdir()], "what was written to look is gone"


def rows(text: str, node: Any) -> dict[str, str]:
    """status -> found, of one node."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    found: dict[str, str] = {}
    last = ("", "")
    for name, status, said, _ in cells:
        last = (name, status) if status else last
        if node.node_id[:8] in last[0]:
            found[last[1]] = f"{found.get(last[1], '')} {said}".strip()
    return found


@pytest.mark.ray
def test_the_table_names_what_is_wrong_with_which_node(
    nodes: Nodes, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    begun = time.monotonic()
    assert not examine_cluster(nodes.address, tmp_path / "state", "~/shared", {})
    assert time.monotonic() - begun < cluster_check.ANSWER_WITHIN_S
    text = capsys.readouterr().out
    well = rows(text, nodes.well)
    assert "FAIL" not in well
    for said in ("versions as here", f"{tmp_path}/state is shared", "MLflow reachable", "GB of disk free"):
        assert said in well["ok"], said
    assert rows(text, nodes.other_version)["FAIL"] == f"mlflow 0.1, here {HERE['mlflow']}"
    assert rows(text, nodes.no_storage)["FAIL"] == "~/shared is not the folder that the other machines see"
    assert re.search(r"\d\.\d\d GB/s with other nodes", well["ok"])
    assert re.search(r"all nodes .* 3 ranks: all-reduce [\d.]+ GB/s, all-to-all [\d.]+ GB/s of each rank", text)
    assert well["warn"].startswith("RAY_AUTH_MODE=disabled"), "as tests/conftest.py sets it"


@pytest.mark.ray
def test_a_job_is_kept_off_unfit_nodes_or_refused(
    nodes: Nodes, tiny_job: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    def unfit(trials: int = 1, **resources: int) -> tuple[set[str], str]:
        said: list[str] = []
        overrides = [f"resources.{name}={value}" for name, value in resources.items()]
        job = load(tiny_job(train={"micro_batch": 1}), Job, overrides).config
        folders = [str(tmp_path / "state"), "~/shared"]
        tracking = f"sqlite:///{tmp_path}/mlflow.db"
        return {*unfit_nodes(job, nodes.address, folders, tracking, said.append, trials)}, "\n".join(said)

    left_out, said = unfit(workers=2, min_workers=1)
    assert left_out == {nodes.other_version.node_id, nodes.no_storage.node_id}
    assert f"mlflow 0.1, here {HERE['mlflow']}" in said
    assert unfit(workers=1) == (set(), ""), "one worker is no job on several nodes"
    assert unfit(trials=2, workers=1)[0] == left_out, "a sweep of such jobs is one"
    refused = rf"({nodes.no_storage.node_id[:8]}).*resources.workers=2 does not fit: there is room for 1 workers"
    with pytest.raises(ConfigError, match=refused):
        unfit(workers=2)


@pytest.mark.ray
def test_a_frozen_node_is_named_in_time(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_check, "ANSWER_WITHIN_S", 12.0)
    monkeypatch.setenv("COLUMNS", "250")
    raylet = nodes.other_version.all_processes["raylet"][0].process
    raylet.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        assert not examine_cluster(nodes.address, tmp_path / "state", None, {})
    finally:
        raylet.send_signal(signal.SIGCONT)
    assert time.monotonic() - begun < 25
    text = capsys.readouterr().out
    assert rows(text, nodes.other_version)["FAIL"] == "does not answer (waited 12 s)"
    assert "FAIL" not in rows(text, nodes.well)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_workers_run_on_the_other_nodes(
    nodes: Nodes, tiny_job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray._private.state

    from tidegate.launch.run import Request, run
    from tidegate.launch.state import StateDir

    overrides = ["resources.workers=4", "resources.min_workers=1", "train.micro_batch=1", "train.tokens=1024"]
    ran = run(Request(tiny_job(), overrides, StateDir(tmp_path / "state"), address=nodes.address, page=False))
    assert ran.outcome.finished
    assert f"({nodes.other_version.node_id[:8]})" in capsys.readouterr().out
    actors = ray._private.state.actors().values()
    there = [actor["Address"]["NodeID"] for actor in actors if "RayTrainWorker" in actor["ActorClassName"]]
    assert set(there) == {nodes.well.node_id, nodes.no_storage.node_id}
    assert len(there) == 2, "as there is room for on these"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
def test_trials_run_on_the_other_nodes(
    nodes: Nodes, tiny_job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray._private.state

    from tidegate.launch.state import StateDir
    from tidegate.tune.sweep import SweepRequest, sweep

    before = {*ray._private.state.actors()}
    search = {"space": {"optimizer.weight_decay": {"choice": [0.1, 0.2, 0.3]}}, "trials": 1, "finalists": 1, "seeds": 1}
    job = tiny_job(search=search, train={"tokens": 1024, "micro_batch": 1})
    done = sweep(SweepRequest(job, [], [], StateDir(tmp_path / "state"), address=nodes.address))
    assert {result.status for result in done.results()} == {"finished"}, done.results()
    assert f"({nodes.other_version.node_id[:8]})" in capsys.readouterr().out
    actors = [actor for key, actor in ray._private.state.actors().items() if key not in before]
    there = {actor["Address"]["NodeID"] for actor in actors if "ImplicitFunc" in actor["ActorClassName"]}
    assert there, actors
    assert there <= {nodes.well.node_id, nodes.no_storage.node_id}


def seen(clock_s: float = 0.0, within_s: float = 0.001, **fields: Any) -> Seen:
    report = NodeReport(HERE, {}, "reachable: x", 10**12, 10**12, [], "token")
    return Seen(report._replace(**fields), clock_s, within_s)


HEAD = Node("a" * 56, "10.0.0.1", {"node:__internal_head__": 1.0})
OTHER = Node("b" * 56, "10.0.0.2", {"CPU": 2.0})
H100 = GpuState("NVIDIA H100", "570.1", 1980, 1980, False, (), 0)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({}, "ok", ""),
        ({"clock_s": 99.9}, "ok", ""),
        ({"clock_s": 102.0}, "warn", "clock +2.000 s from the head's"),
        ({"clock_s": 102.0, "within_s": 1.5}, "ok", ""),
        ({"clock_s": 39.0}, "FAIL", "clock -61.000 s"),
        ({"disk_bytes": 4 * 10**9}, "warn", "4.0 GB of disk free"),
        ({"memory_bytes": 10**9}, "warn", "1.0 GB of memory free"),
        ({"tracking": "not reachable: http://x"}, "FAIL", "MLflow not reachable: http://x"),
        ({"auth": "disabled"}, "warn", "RAY_AUTH_MODE=disabled"),
        ({"auth": None}, "warn", "RAY_AUTH_MODE is not set"),
        ({"versions": HERE | {"torch": f"{HERE['torch'].partition('+')[0]}+cu999"}}, "ok", ""),
        ({"versions": HERE | {"python": HERE["python"] + "9"}}, "ok", ""),
        ({"versions": HERE | {"ray": "1.0"}}, "FAIL", f"ray 1.0, here {HERE['ray']}"),
        ({"versions": HERE | {"tidegate's code": "0123"}}, "FAIL", "tidegate's code 0123, here"),
        ({"gpus": [H100]}, "ok", ""),
        ({"gpus": [H100._replace(clock_mhz=345, idle=True)]}, "ok", ""),
        ({"gpus": [H100, H100._replace(clock_mhz=1000)]}, "warn", "GPU 1: NVIDIA H100, driver 570.1, 1000 of 1980"),
        ({"gpus": [H100._replace(slowed_by=("power brake",))]}, "FAIL", "slowed by power brake"),
        ({"gpus": [H100._replace(uncorrected_errors=3)]}, "FAIL", "3 uncorrected ECC errors"),
    ],
)
def test_what_is_too_much(fields: dict[str, Any], status: str, said: str) -> None:
    """The head's clock is 100 s ahead of this machine's."""
    found = cluster_check._judge({HEAD: seen(clock_s=100.0), OTHER: seen(**{"clock_s": 100.0} | fields)})
    assert {finding.status for finding in found[HEAD.id]} == {"ok"}
    bad = [finding for finding in found[OTHER.id] if finding.status != "ok"]
    assert [finding.status for finding in bad] == ([] if status == "ok" else [status])
    assert all(said in finding.found and finding.fix for finding in bad)
