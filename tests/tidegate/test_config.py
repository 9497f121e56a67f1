"""Job files: what they come to, and what an error says. Every message names file, field and value."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tidegate.config import Config, ConfigError, diff, flatten, load, load_stored
from tidegate.model.routers import RouterConfig
from tidegate.train.job import Job

ROUTERS = ", ".join(repr(config.model_fields["kind"].default) for config in get_args(get_args(RouterConfig)[0]))
DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the demo job as `base.yaml`; jobs are named relative to it, as on a command line."""
    (tmp_path / "base.yaml").write_text(DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder) -> Callable[..., str]:
    def write(text: str, name: str = "job.yaml") -> str:
        (folder / name).write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def message(write) -> Callable[..., str]:
    """The error of a job that extends base.yaml and adds `text`."""

    def message(text: str, *overrides: str, extends: str = "extends: base.yaml\n") -> str:
        with pytest.raises(ConfigError) as caught:
            load(write(extends + text), Job, overrides)
        return str(caught.value)

    return message


# --- errors --------------------------------------------------------------------------------------------------

UNKNOWN = {
    "top level": ("modle: {width: 3}", "modle: unknown field (got a mapping); did you mean 'model'?"),
    "moved": ("train: {save_every: 8}", "train.save_every: is called checkpoint.every now (got 8)"),
    "moved elsewhere": (
        "resources: {keep_checkpoints: 3}",
        "resources.keep_checkpoints: is called checkpoint.keep_last now (got 3)",
    ),
    "nested": ("train: {microbatch: 8}", "train.microbatch: unknown field (got 8); did you mean 'micro_batch'?"),
    "in a variant": (
        "model: {attention: {gate: {kind: value, granularitty: headwise}}}",
        "model.attention.gate.granularitty: unknown field (got 'headwise'); did you mean 'granularity'?",
    ),
    "in another variant": (
        "model: {ffn: {kind: dense, hiden_dim: 64, hidden_dim: 64}}\nparallel: {expert: 1}",
        "model.ffn.hiden_dim: unknown field (got 64); did you mean 'hidden_dim'?",
    ),
    "in a list": (
        "data: {domains: [{name: a, pths: [x], paths: [y]}]}",
        "data.domains.0.pths: unknown field (got ['x']); did you mean 'paths'?",
    ),
    "nothing near": (
        "parallel: {zzz: 1}",
        "parallel.zzz: unknown field (got 1); known here: expert, sequence, zero_stage, gradients_at_once, all_to_all, "
        "offload, offload_folder",
    ),
    "kind": (
        "model: {ffn: {router: {kind: softmax_topk}}}",
        "model.ffn.router: unknown kind 'softmax_topk', one of " + ROUTERS + "; did you mean 'softmax_top_k'?",
    ),
    "kind of many names": (
        "model: {attention: {gate: {kind: sdpa_outptu}}}",
        "model.attention.gate: unknown kind 'sdpa_outptu', one of 'none', 'sdpa_output', 'value', 'key', 'query', "
        "'dense_output'; did you mean 'sdpa_output'?",
    ),
    "kind like no other": (
        "optimizer: {schedule: {kind: zzz}}",
        "optimizer.schedule: unknown kind 'zzz', one of 'cosine', 'wsd'",
    ),
    "word": (
        "train: {seed: soon}",
        "train.seed: Input should be a valid integer, unable to parse string as an integer (got 'soon')",
    ),
    "mapping": ("train: {seed: {a: 1}}", "train.seed: Input should be a valid integer (got a mapping)"),
    "fraction": (
        "train: {micro_batch: 1.5}",
        "train.micro_batch: Input should be a valid integer, got a number with a fractional part (got 1.5)",
    ),
    "range": ("resources: {workers: 0}", "resources.workers: Input should be greater than or equal to 1 (got 0)"),
    "infinite": ("optimizer: {eps: .inf}", "optimizer.eps: Input should be a finite number (got inf)"),
    "choice": ("train: {precision: fp16}", "train.precision: Input should be 'fp32' or 'bf16' (got 'fp16')"),
    "key": ("train: {1: 2}", "train.1: Keys should be strings (got 1)"),
    "missing in a new variant": ("model: {ffn: {kind: dense}}", "model.ffn.hidden_dim: Field required"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_wrong_field(message, case):
    text, expected = UNKNOWN[case]
    assert message(text) == f"job.yaml: {expected}"


def test_a_missing_kind_lists_them(message):
    text = re.sub(r"kind: sdpa_output, ", "", DEMO.read_text(encoding="utf-8"))
    assert message(text, extends="") == (
        "job.yaml: model.attention.gate: needs `kind`, one of 'none', 'sdpa_output', 'value', 'key', 'query', "
        "'dense_output'"
    )


def test_every_problem_is_told_at_once(message):
    lines = message("train: {sed: 1, micro_batch: x}", "resources.workers=-1").splitlines()
    assert [line.split(": ")[:2] for line in sorted(lines)] == [
        ["--set resources.workers=-1", "resources.workers"],
        ["job.yaml", "train.micro_batch"],
        ["job.yaml", "train.sed"],
    ]


def test_missing_sections_are_the_asked_files(message, write):
    write("train: {seed: 1}", "fragment.yaml")
    lines = message("name: x", extends="extends: fragment.yaml\n").splitlines()
    assert lines[:3] == [f"job.yaml: {field}: Field required" for field in ("model", "data", "optimizer")]
    assert lines[3] == "fragment.yaml: train.tokens: Field required"


FILES = {
    "no file": (None, "no such job file: job.yaml"),
    "a folder": ("/", "cannot read job.yaml: [Errno 21] Is a directory: 'job.yaml'"),
    "syntax": ("train: [1", "job.yaml: not valid YAML: while parsing a flow sequence"),
    "tab": ("train:\n\tseed: 1", "job.yaml: not valid YAML: while scanning for the next token found character '\\t'"),
    "repeated key": ("name: a\nmodel: {}\nname: b", "job.yaml: not valid YAML: key 'name' stands twice"),
    "repeated nested key": ("train:\n  seed: 1\n  seed: 2", "job.yaml: not valid YAML: key 'seed' stands twice"),
    "template": ("name: {{name}}", "job.yaml: not valid YAML: while constructing a mapping"),
    "no such day": ("name: 2024-13-45", "job.yaml: not valid YAML: month must be in 1..12"),
    "empty": ("", "job.yaml: a job file is a mapping, got NoneType"),
    "list": ("- 1", "job.yaml: a job file is a mapping, got list"),
    "not text": (b"\xff\xfe\x00", "cannot read job.yaml: 'utf-8' codec"),
    "extends a number": ("extends: [a, 1]", "job.yaml: extends: needs a file name or a list of them, got ['a', 1]"),
    "extends a mapping": ("extends: {a: 1}", "job.yaml: extends: needs a file name or a list of them, got {'a': 1}"),
    "missing base": ("extends: gone.yaml", "job.yaml: extends: no such job file: gone.yaml"),
}


@pytest.mark.parametrize("case", FILES)
def test_an_unreadable_file(folder, case):
    content, expected = FILES[case]
    if content == "/":
        (folder / "job.yaml").mkdir()
    elif content is not None:
        (folder / "job.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load("job.yaml", Job)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_circular_extends(write):
    write("extends: b.yaml", "a.yaml")
    write("extends: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"^a\.yaml: extends: goes in a circle \(.*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load("a.yaml", Job)


OVERRIDES = {
    "name": "--set name: write it as a.b=value",
    "=3": "--set =3: write it as a.b=value",
    "train..seed=3": "--set train..seed=3: write it as a.b=value",
    "train.seed=[1": "--set train.seed=[1: the value is not YAML: while parsing a flow sequence",
    "name=2024-13-45": "--set name=2024-13-45: the value is not YAML: month must be in 1..12",
    "train.sede=3": "--set train.sede=3: train.sede: unknown field (got 3); did you mean 'seed'?",
    "trian.seed=3": "--set trian.seed=3: trian: unknown field (got a mapping); did you mean 'train'?",
    "name.x=1": "--set name.x=1: name: Input should be a valid string (got a mapping)",
    "train.seed=x": "--set train.seed=x: train.seed: Input should be a valid integer",
    "data.domains.9.weight=1": "--set data.domains.9.weight=1: data.domains is a list of 4 items; '9' is not one of",
    "data.domains.prose.weight=1": "--set data.domains.prose.weight=1: data.domains is a list of 4 items; 'prose' is",
    "data.domains.²=1": "--set data.domains.²=1: data.domains is a list of 4 items; '²' is not one of them",
    "data.domains.1.weight=-1": "--set data.domains.1.weight=-1: data.domains.1.weight: Input should be greater than 0",
    "data.domains.-1.weight=1": "--set data.domains.-1.weight=1: data.domains is a list of 4 items; '-1' is not one",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override(message, override):
    assert message("", override).startswith(OVERRIDES[override])


# --- where a value was written -------------------------------------------------------------------------------


def test_a_bad_value_is_the_bases_if_it_stands_there(write):
    write(DEMO.read_text(encoding="utf-8").replace("micro_batch: 8", "micro_batch: none"), "bad.yaml")
    with pytest.raises(ConfigError, match=r"^bad\.yaml: train\.micro_batch: .* \(got 'none'\)$"):
        load(write("extends: bad.yaml\ntrain: {seed: 3}"), Job)


def test_a_bad_kind_is_the_files_that_wrote_it(message, write):
    write("extends: base.yaml\nmodel: {attention: {gate: {kind: valeu}}}", "middle.yaml")
    expected = "model.attention.gate: unknown kind 'valeu'"
    assert message("train: {seed: 1}", extends="extends: middle.yaml\n").startswith(f"middle.yaml: {expected}")
    assert message("", "model.attention.gate.kind=valeu").startswith(
        f"--set model.attention.gate.kind=valeu: {expected}"
    )


def test_a_bad_kind_over_a_base_without_one_is_not_the_bases(message, write):
    write(DEMO.read_text(encoding="utf-8").replace("{kind: sdpa_output, granularity", "{granularity"), "half.yaml")
    text = "model: {attention: {gate: {kind: valeu}}}"
    assert message(text, extends="extends: half.yaml\n").startswith("job.yaml: model.attention.gate: unknown kind 'va")


def test_a_replaced_value_is_the_replacers(message):
    """What stood below a replaced value must not be blamed."""
    assert message("data: {tokenizer: {kind: file}}") == "job.yaml: data.tokenizer.path: Field required"
    assert message("train: 3").startswith("job.yaml: train: ")
    shorter = "data.domains=[{name: a, paths: [x], weight: -2}]"
    assert message("", "data.domains.0.weight=3", shorter).startswith(f"--set {shorter}: data.domains.0.weight: ")


@pytest.mark.parametrize(
    ("text", "overrides", "start"),
    [
        ("parallel: {expert: 3}", (), "job.yaml, base.yaml: parallel.expert=3 does not divide resources.workers=2"),
        ("", ("parallel.expert=3",), "--set parallel.expert=3, base.yaml: parallel.expert=3 does not divide"),
        ("resources: {workers: 3}\nparallel: {expert: 2}", (), "job.yaml, base.yaml: train.batch_tokens=4096 is"),
        ("parallel: {expert: 4}\nresources: {workers: 2}", (), "job.yaml: parallel.expert=4 does not divide"),
        ("model: {ffn: {top_k: 9}}", (), "job.yaml, base.yaml: model.ffn: top_k=9 is more than num_experts=8"),
        ("", ("model.ffn.top_k=9", "train.seed=1"), "--set model.ffn.top_k=9, base.yaml: model.ffn: top_k=9 is more"),
    ],
)
def test_a_conflict_names_the_places_of_all_its_values(message, text, overrides, start):
    written = message(text, *overrides)
    sources, rest = written.split(": ", 1)
    expected_sources, expected_rest = start.split(": ", 1)
    assert set(sources.split(", ")) == set(expected_sources.split(", "))
    assert rest.startswith(expected_rest)


# --- what a job comes to -------------------------------------------------------------------------------------


def test_a_chain_of_files_and_overrides_wins_in_order(write):
    write("extends: base.yaml\ntrain: {seed: 1, log_every: 1}\nname: middle", "middle.yaml")
    name = write("extends: middle.yaml\ntrain: {seed: 2}")
    config: Job = load(name, Job).config
    assert (config.name, config.train.seed, config.train.log_every, config.train.micro_batch) == ("middle", 2, 1, 8)
    overridden: Job = load(name, Job, ["train.seed=3", "train.seed=4"]).config
    assert overridden.train.seed == 4, "the last --set wins"
    assert overridden.train.log_every == 1


def test_several_files_lie_over_each_other_in_order(write):
    write("extends: base.yaml\ntrain: {seed: 1, log_every: 1}\nname: left", "left.yaml")
    write("train: {seed: 2, eval_every: 7}\nname: right", "right.yaml")
    loaded = load(write("extends: [left.yaml, right.yaml]\ntrain: {log_every: 3}"), Job)
    train = loaded.config.train
    assert (loaded.config.name, train.seed, train.log_every, train.eval_every) == ("right", 2, 3, 7)
    assert train.micro_batch == 8, "of the base of the first"
    assert loaded.overrides["train.seed"] == 2
    with pytest.raises(ConfigError, match=r"extends: goes in a circle \(.*job\.yaml -> .*job\.yaml\)"):
        load(write("extends: [left.yaml, job.yaml]"), Job)


def test_extends_is_relative_to_the_file(folder, write):
    (folder / "deep").mkdir()
    (folder / "deep" / "job.yaml").write_text("extends: ../base.yaml\nname: deep", encoding="utf-8")
    assert load("deep/job.yaml", Job).config.name == "deep"


def test_job_is_the_folder_of_the_file_that_says_so(folder, write):
    (folder / "deep").mkdir()
    write("extends: base.yaml\ndata: {domains: [{name: a, paths: ['{job}/a/*.txt', /b, '{stdlib}/c']}]}", "job.yaml")
    (folder / "deep" / "job.yaml").write_text("extends: ../job.yaml", encoding="utf-8")
    (folder / "deep" / "again.yaml").write_text(
        "extends: [../job.yaml, job.yaml]\ndata: {tokenizer: {kind: file, path: '{job}/t.json'}}", encoding="utf-8"
    )
    deep: Job = load("deep/job.yaml", Job).config
    assert deep.data.domains[0].paths == ("{job}/../a/*.txt", "/b", "{stdlib}/c")
    again: Job = load("deep/again.yaml", Job, ["train.init_from='{job}/x'"]).config
    assert again.data.domains[0].paths == deep.data.domains[0].paths
    assert (again.data.tokenizer.path, again.train.init_from) == ("{job}/t.json", "{job}/x")


def test_another_kind_replaces_the_whole_mapping(write):
    name = write("extends: base.yaml\nmodel: {ffn: {kind: dense, hidden_dim: 77}}\nparallel: {expert: 1}")
    loaded = load(name, Job)
    assert loaded.config.model.ffn.model_dump() == {"kind": "dense", "hidden_dim": 77, "activation": "swiglu"}
    assert loaded.overrides == {
        "model.ffn.kind": "dense",
        "model.ffn.hidden_dim": 77,
        "parallel.expert": 1,
        "model.ffn.num_experts": None,
        "model.ffn.top_k": None,
        "model.ffn.expert_dim": None,
        "model.ffn.router.kind": None,
        "model.ffn.shared.num": None,
    }


def test_the_same_kind_is_laid_over(write):
    name = write("extends: base.yaml\nmodel: {ffn: {kind: moe, top_k: 3}}")
    ffn = load(name, Job).config.model.ffn
    assert (ffn.top_k, ffn.num_experts, ffn.shared.num) == (3, 8, 1)


def test_a_list_replaces_a_list(write):
    name = write("extends: base.yaml\ndata: {domains: [{name: only, paths: [x.txt]}]}")
    domains = load(name, Job).config.data.domains
    assert [(d.name, d.paths, d.held_out) for d in domains] == [("only", ("x.txt",), 0.02)], "0.02 is the default"


def test_an_override_reaches_into_a_list(write):
    loaded = load("base.yaml", Job, ["data.domains.1.weight=3", "data.domains.1.held_out=0.5"])
    assert [d.weight for d in loaded.config.data.domains] == [1.0, 3.0, 1.0, 0.5]
    assert loaded.overrides == {"data.domains.1.weight": 3, "data.domains.1.held_out": 0.5}


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "0.3e-3", "+3e-4", "0.0003", "30_0e-6"])
def test_numbers_with_an_exponent_are_numbers(write, text):
    name = write(f"extends: base.yaml\noptimizer: {{schedule: {{peak: {text}}}}}")
    assert load(name, Job).overrides == {"optimizer.schedule.peak": pytest.approx(3e-4)}
    loaded = load("base.yaml", Job, [f"optimizer.schedule.peak={text}", "train.tokens=2e6"])
    assert loaded.config.optimizer.schedule.peak == pytest.approx(3e-4)
    assert loaded.config.train.tokens == 2_000_000


def test_an_override_may_be_a_mapping_or_empty(write):
    loaded = load("base.yaml", Job, ["balance={scope: sequence, z_loss_weight: 0}", "checkpoint.storage="])
    assert loaded.config.balance.model_dump() == {
        "scope": "sequence",
        "loss_weight": 0.01,
        "counts": "exact",
        "z_loss_weight": 0.0,
        "bias_rate": 0.0,
        "budget": None,
    }
    assert loaded.config.checkpoint.storage is None


def test_yaml_merge_keys_work(write):
    text = DEMO.read_text(encoding="utf-8").replace("    - {name: prose,", "    - &text {weight: 2, name: prose,")
    text = text.replace("- {name: math, paths", "- {<<: *text, name: math, paths")
    domains = load(write(text), Job).config.data.domains
    assert [(d.name, d.weight) for d in domains][::2] == [("prose", 2.0), ("math", 2.0)]


def test_overrides_hold_only_what_changed_against_the_outermost_base(write):
    write("extends: base.yaml\ntrain: {seed: 1}\nresources: {workers: 2}", "middle.yaml")
    name = write("extends: middle.yaml\nname: leaf\ntrain: {seed: 2, precision: fp32}")
    assert load(name, Job).overrides == {"name": "leaf", "train.seed": 2}
    again = load(name, Job, ["train.log_every=10", "train.batch_tokens=8192"])
    assert again.overrides == {"name": "leaf", "train.seed": 2, "train.batch_tokens": 8192}


def test_a_job_that_extends_nothing_is_its_own_base():
    assert load(DEMO, Job).overrides == {}
    assert load(DEMO, Job, ["train.seed=9", "train.precision=fp32"]).overrides == {"train.seed": 9}


# --- flatten and diff ----------------------------------------------------------------------------------------


def test_flatten():
    nested = {"a": {"b": 1, "e": {}}, "c": [{"d": 2}, 3], "f": [1, 2], "g": None}
    assert flatten(nested) == {"a.b": 1, "a.e": {}, "c.0.d": 2, "c.1": 3, "f": [1, 2], "g": None}


def apply(changes: dict[str, Any], before: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    return {key: value for key, value in (before | changes).items() if key not in gone}


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.seed=5"],
        ["model.attention.gate={kind: none}"],
        ["data.domains=[{name: only, hub: x/y}]", "checkpoint.storage=s3://b"],
        ["model.ffn={kind: dense, hidden_dim: 3}", "parallel.expert=1"],
    ],
)
def test_a_diff_applied_to_the_before_gives_the_after(overrides):
    before, after = load(DEMO, Job).config, load(DEMO, Job, overrides).config
    changes = diff(before, after)
    gone = {key for key, value in changes.items() if value is None} - flatten(after).keys()
    assert apply(changes, flatten(before), gone) == flatten(after)
    assert diff(before, before) == {}
    assert diff({}, after) == flatten(after)
    unchanged = flatten(before).keys() & flatten(after).keys() - changes.keys()
    assert len(unchanged) > 20
    assert not any(flatten(before)[key] != flatten(after)[key] for key in unchanged)


# --- stored configs ------------------------------------------------------------------------------------------


def test_a_stored_job_comes_back_equal(folder):
    job = load(DEMO, Job, ["optimizer.eps=1e-7", "optimizer.schedule.peak=1e-5", "data.seed=3"]).config
    stored = job.model_dump_json(indent=2)
    assert load_stored(stored, Job, "job.json") == job
    (folder / "job.json").write_text(stored, encoding="utf-8")
    resumed = load("job.json", Job, ["train.seed=4"])
    assert resumed.overrides == {"train.seed": 4}
    assert diff(job, resumed.config) == {"train.seed": 4}
    as_yaml = yaml.safe_dump(job.model_dump(mode="json"))
    (folder / "job.yaml").write_text(as_yaml, encoding="utf-8")
    assert load("job.yaml", Job).config == job


def test_a_stored_job_that_is_broken():
    with pytest.raises(
        ConfigError, match=r"^runs/x/job\.json: not JSON \(Expecting value: line 1 column 1 \(char 0\)\)$"
    ):
        load_stored("", Job, "runs/x/job.json")
    with pytest.raises(ConfigError, match=r"(?m)^runs/x/job\.json: model: Field required$"):
        load_stored("{}", Job, "runs/x/job.json")


def test_configs_cannot_be_changed():
    class Section(Config):
        number: int = 1

    with pytest.raises(ValueError, match="frozen"):
        Section().number = 2  # type: ignore[misc]
