"""lm-evaluation-harness on our models: what it is told against plain forward passes, and a task of its own files.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from typer.testing import CliRunner

from tidegate import cli
from tidegate.config import ConfigError
from tidegate.model.decoder import Decoder, ModelConfig, materialize

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'tidegate[eval]'"
)
LENGTH = 11
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: ["a", "b c"]
metric_list: [{metric: acc}]
"""


@pytest.fixture
def harness(seeded_single_thread: None) -> Any:
    """`(isolate) -> (adapter, model)`; a token a letter, and the end of text is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is not ours
        from tidegate.launch.lm_eval import HarnessModel
    vocabulary = {letter: place + 1 for place, letter in enumerate(LETTERS)} | {"<|endoftext|>": 0}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    sizes = {"vocab_size": len(vocabulary), "width": 16, "num_layers": 2, "init_std": 0.4}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    ffn = {"kind": "moe", "num_experts": 4, "top_k": 2, "expert_dim": 8}
    config = ModelConfig.model_validate({**sizes, "attention": heads, "ffn": ffn})
    model = materialize(partial(Decoder, config), torch.device("cpu"), seed=3).eval()

    def make(isolate: bool) -> Any:
        return HarnessModel(model, tokenizer, 0, LENGTH, isolate), model

    return make


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) + 1 for letter in text]


def by_hand(model: Decoder, context: str, continuation: str, isolate: bool) -> tuple[float, bool]:
    """A pass for each token, of the last tokens before it that fit where its piece ends."""
    before, scored = ids(context) or [0], ids(continuation)
    tokens, nats, greedy = [*before, *scored], 0.0, True
    for place in range(len(scored)):
        piece_end = min(place // LENGTH * LENGTH + LENGTH, len(scored))
        first = max(0, len(before) + piece_end - LENGTH - 1)
        seen = torch.tensor([tokens[first : len(before) + place]])
        documents = None
        if isolate:
            documents = (seen != 0).cumsum(dim=1).clamp(max=1) if seen[0, 0] == 0 else torch.zeros_like(seen)
        label = torch.tensor([scored[place]])
        counted, labels = torch.ones_like(seen, dtype=torch.bool), torch.full_like(seen, int(label))
        nats -= float(model(seen, labels, counted, documents).nll_BT[0, -1])
        options = [
            float(model(seen, torch.full_like(seen, token), counted, documents).nll_BT[0, -1]) for token in range(29)
        ]
        greedy &= min(range(29), key=options.__getitem__) == int(label)
    return nats, greedy


@needs_harness
@pytest.mark.parametrize("isolate", [False, True])
def test_loglikelihoods_are_sums_of_plain_passes(isolate: bool, harness: Any) -> None:
    """Odd lengths in one batch, nothing given, more than fits, and a continuation that alone does not fit."""
    adapter, model = harness(isolate)
    asked_for = [
        ("", "abc"), ("a", "b"), ("hello ", "you two"), ("one\ntwo three four", "five"),
        ("x", "abcdefghijklmnopqrstuvw"),
        ("abcdefghijk", "l"), ("", LETTERS.replace(" ", "")),
    ]  # fmt: skip
    best = adapter.generate_until([asked("hello", {"until": [], "max_gen_toks": 3})])[0]
    asked_for.append(("hello", best))
    found = adapter.loglikelihood([asked(*each) for each in asked_for], disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(asked_for, found, strict=True):
        if context != context.rstrip():  # the harness moves spaces
            stripped = context.rstrip()
            context, continuation = stripped, context[len(stripped) :] + continuation
        expected = by_hand(model, context, continuation, isolate)
        assert nats == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]
    assert found[-1][1], "what greedy decoding says is greedy"
    rolling = adapter.loglikelihood_rolling([asked("abc"), asked(LETTERS.replace(" ", ""))])
    assert rolling == pytest.approx([found[0][0], found[6][0]], rel=1e-5)


@needs_harness
def test_answers_end_at_stop_strings(harness: Any) -> None:
    adapter, _ = harness(False)
    contexts = ["hello", "world", "a", "", "one two three four"]
    whole = adapter.generate_until([asked(each, {"until": [], "max_gen_toks": 9}) for each in contexts])
    assert max(map(len, whole)) == 9
    for context, text in zip(contexts, whole, strict=True):
        for stop in filter(None, {text[2:4], text[5:6], text}):
            (cut,) = adapter.generate_until([asked(context, {"until": ["%%", stop], "max_gen_toks": 9})])
            assert cut == text[: text.index(stop)]
    with pytest.raises(ConfigError, match="here they are greedy"):
        adapter.generate_until([asked("a", {"do_sample": True, "temperature": 0.7})])


def test_tasks_and_the_suite_go_together() -> None:
    for arguments in (["--suite", "lm_eval"], ["--tasks", "arc_easy"]):
        result = CliRunner().invoke(cli.app, ["probe", "nothing", *arguments])
        assert isinstance(result.exception, ConfigError)
        assert "--suite lm_eval and --tasks go together" in str(result.exception)


@pytest.mark.slow
def test_a_trained_run_and_its_export_answer_a_task(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    state = ["--state-dir", str(tmp_path / "state")]

    def tidegate(*arguments: str, fails: bool = False) -> str:
        command = [sys.executable, "-m", "tidegate.cli", *arguments, *state]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
        return ended.stderr if fails else ended.stdout

    tidegate("train", str(tiny_job(train={"tokens": 2048})), "--local")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "letters.yaml").write_text(TASK)
    (tasks / "letters.jsonl").write_text("".join(json.dumps({"text": "ab" * place}) + "\n" for place in range(1, 8)))
    asked_for = "--suite", "lm_eval", "--tasks", str(tasks)
    if importlib.util.find_spec("lm_eval") is None:
        assert "pip install 'tidegate[eval]'" in tidegate("probe", "tiny-1", *asked_for, fails=True)
        pytest.skip("lm-eval is not installed: pip install 'tidegate[eval]'")
    printed = tidegate("probe", "tiny-1", *asked_for)
    found = json.loads((tmp_path / "state" / "probes" / "tiny-1-step4.json").read_text())
    assert "letters" in printed
    assert set(found) == {"run", "checkpoint", "step", "tokens", "sequences", "lm_eval"}
    assert 0 <= found["lm_eval"]["letters"]["acc,none"] <= 1

    tidegate("export", "tiny-1", "--out", str(tmp_path / "export"))
    tidegate("probe", str(tmp_path / "export"), *asked_for)
    of_export = json.loads((tmp_path / "state" / "probes" / "export.json").read_text())
    assert of_export["lm_eval"].keys() == found["lm_eval"].keys()
    (tasks / "letters.jsonl").unlink()
    assert "the data cannot be reached" in tidegate("probe", "tiny-1", *asked_for, fails=True)
    assert "neither a folder of tasks" in tidegate(
        "probe", "tiny-1", "--suite", "lm_eval", "--tasks", "no_such_task", fails=True
    )
