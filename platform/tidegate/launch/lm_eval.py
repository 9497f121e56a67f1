"""EleutherAI's lm-evaluation-harness on a model of ours: `tidegate probe --suite lm_eval --tasks ...`.

Everything that a task asks is a document of its own, as in training; of what is longer than the training length, the
end is seen. Imported only where the extra `eval` is installed.

Letters: B rows, T tokens, N tokens that are scored, V vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from tidegate.config import ConfigError
from tidegate.model.decoder import Decoder

__all__ = ["HarnessModel", "task_results"]

_BATCH_TOKENS = 4096
"""Of the rows at a time: bounds the memory of their logits."""
_NEW_TOKENS = 256
"""Where a task says nothing; the harness' own number."""


class _Piece(NamedTuple):
    """Tokens of a request that one row scores."""

    request: int
    tokens: list[int]
    """Inputs and, one place on, labels."""
    scored: int
    """N: of the last labels."""


class HarnessModel(TemplateLM):
    """A decoder as the harness calls it.

    Args:
        model: in evaluation mode.
        tokenizer: of its text.
        eot_id: ends a document, and stands before one of which nothing is given.
        length: most tokens that are seen at once.
        isolate: attention stays inside documents, so that a document does not see the end of text before it.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, eot_id: int, length: int, isolate: bool) -> None:
        super().__init__()
        self._model, self.tokenizer, self._eot_id, self._length, self._isolate = (
            model,
            tokenizer,
            eot_id,
            length,
            isolate,
        )
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self._eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False).ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether each of its tokens is the likeliest."""
        pieces = [
            _Piece(number, *piece)
            for number, (_, context, continuation) in enumerate(requests)
            for piece in _pieces(context or [self._eot_id], continuation, self._length)
        ]
        pieces.sort(key=lambda piece: len(piece.tokens))
        found = [(0.0, True)] * len(requests)
        rows = max(1, _BATCH_TOKENS // self._length)
        for start in range(0, len(pieces), rows):
            batch = pieces[start : start + rows]
            for piece, (nats, greedy) in zip(batch, self._scored(batch), strict=True):
                total, all_greedy = found[piece.request]
                found[piece.request] = total + nats, all_greedy and greedy
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text from its first token on."""
        texts = [(("", text), [self._eot_id], self.tok_encode(text)) for (text,) in (each.args for each in requests)]
        return [nats for nats, _ in self._loglikelihood_tokens(texts)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, greedily, up to a stop string or the end of text."""
        alike: dict[tuple[int, str], list[int]] = defaultdict(list)  # rows of one length need no padding before them
        prompts = [self.tok_encode(each.args[0])[-self._length :] or [self._eot_id] for each in requests]
        for number, (prompt, each) in enumerate(zip(prompts, requests, strict=True)):
            alike[len(prompt), repr(each.args[1])].append(number)
        texts = [""] * len(requests)
        rows = max(1, _BATCH_TOKENS // self._length)
        for numbers in alike.values():
            settings = requests[numbers[0]].args[1]
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                for number, text in zip(batch, self._written([prompts[i] for i in batch], settings), strict=True):
                    texts[number] = text
        return texts

    @torch.no_grad()
    def _scored(self, batch: Sequence[_Piece]) -> list[tuple[float, bool]]:
        width = max(len(piece.tokens) for piece in batch)
        padded = [piece.tokens + [self._eot_id] * (width - len(piece.tokens)) for piece in batch]
        tokens_BT1 = torch.tensor(padded, device=self._device)
        num_inputs_B1 = torch.tensor([[len(piece.tokens) - 1] for piece in batch], device=self._device)
        counted_BT = torch.arange(width - 1, device=self._device) < num_inputs_B1
        first = min(len(piece.tokens) - 1 - piece.scored for piece in batch)
        logits = self._logits(tokens_BT1[:, :-1], counted_BT, slice(first, None))
        labels = tokens_BT1[:, first + 1 :]
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        likeliest = logits.argmax(dim=-1) == labels
        found = []
        for row, piece in enumerate(batch):
            end = len(piece.tokens) - 1 - first
            own = slice(end - piece.scored, end)
            found.append((-nll[row, own].double().sum().item(), bool(likeliest[row, own].all())))
        return found

    @torch.no_grad()
    def _written(self, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ConfigError(
                f"--tasks: one draws its answers ({settings}), here they are greedy; set do_sample: false"
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        tokens_BT = torch.tensor(prompts, device=self._device)
        new: list[list[int]] = [[] for _ in prompts]
        texts, ended = [""] * len(prompts), [False] * len(prompts)
        for _ in range(settings.get("max_gen_toks", _NEW_TOKENS)):
            seen_BT = tokens_BT[:, -self._length :]
            logits_BV = self._logits(seen_BT, torch.ones_like(seen_BT, dtype=torch.bool), slice(-1, None))[:, 0]
            next_B = logits_BV.argmax(dim=-1)
            tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
            for row, token in enumerate(next_B.tolist()):  # a host sync a token
                if ended[row]:
                    continue
                new[row] += [] if token == self._eot_id else [token]
                whole = self.tokenizer.decode(new[row], skip_special_tokens=False)
                texts[row] = whole[
                    : min((at for stop in stops if stop and (at := whole.find(stop)) >= 0), default=None)
                ]
                ended[row] = token == self._eot_id or texts[row] != whole
            if all(ended):
                break
        return texts

    def _logits(self, tokens_BT: torch.Tensor, counted_BT: torch.Tensor, places: slice) -> torch.Tensor:
        ends_BT = (tokens_BT == self._eot_id).int()
        documents_BT = ends_BT.cumsum(dim=1, dtype=torch.int32) - ends_BT if self._isolate else None
        return self._model.logits(tokens_BT, counted_BT, places, documents_BT)


def _pieces(context: list[int], continuation: list[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Each token of the continuation once, after as many before it as fit: in pieces of `length` and a rest."""
    tokens = [*context, *continuation]
    for start in range(0, len(continuation), length):
        scored = min(length, len(continuation) - start)
        end = len(context) + start + scored
        yield tokens[max(0, end - length - 1) : end], scored


def task_results(model: HarnessModel, tasks: str) -> dict[str, dict[str, float]]:
    """What the harness says of each task, metrics by name.

    Args:
        model: that is asked.
        tasks: a folder of task files, whose data files are relative to it; or names of the harness' tasks, with commas.

    Raises:
        ConfigError: there is no such task, or its data cannot be reached.
    """
    folder = Path(tasks).absolute() if Path(tasks).is_dir() else None
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    names = manager.all_subtasks if folder else tasks.split(",")
    if unknown := [name for name in names or [""] if name not in manager.all_tasks]:
        raise ConfigError(f"--tasks {tasks}: {', '.join(unknown)}: neither a folder of tasks nor one that lm-eval has")
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        try:
            manager.load(list(names))
        except (OSError, ValueError, LookupError) as error:  # datasets raises any of them
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--tasks {tasks}: the data cannot be reached: {first}") from error
        # Not 100,000 draws of a standard error.
        found = simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=1000, log_samples=False)
    finally:
        os.chdir(before)
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
