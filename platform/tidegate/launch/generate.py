"""`tidegate generate`: a run's weights continue a prompt, on the CPU."""

from __future__ import annotations

import torch

from tidegate.config import ConfigError, load_stored
from tidegate.launch.export import open_checkpoint, token_dataset
from tidegate.launch.state import StateDir
from tidegate.model.clock import Clock
from tidegate.train.generate import continued
from tidegate.train.job import Job

__all__ = ["generate_text"]


def generate_text(
    run: str, state: StateDir, checkpoint: str | None, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """The prompt and what the model makes of it.

    Args:
        run: its name.
        state: where it is.
        checkpoint: name of one of its checkpoints; None is the newest that is whole.
        prompt: any text; of none, the model begins a document.
        tokens: how many are new.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.

    Raises:
        ConfigError: a number is out of its range; there is no such run or checkpoint; its tokenizer has gone.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature:g}: must be a number from 0 on")
    folder = state.run(run)
    job = load_stored(folder.job_file.read_text(encoding="utf-8"), Job, str(folder.job_file))
    dataset = token_dataset(job, folder, state)
    if dataset is None:
        raise ConfigError(f"{run}: its token shards, and with them its tokenizer, are not in {state.data}")
    model = open_checkpoint(run, state, checkpoint).load()
    prompt_ids = dataset.tokenizer.encode(prompt, add_special_tokens=False).ids or [dataset.eot_id]
    heat_B = torch.tensor([temperature])
    new_BN = continued(model, torch.tensor([prompt_ids]), tokens, heat_B, Clock(0, 0, seed))
    return str(dataset.tokenizer.decode([*prompt_ids, *new_BN[0].tolist()], skip_special_tokens=False))
