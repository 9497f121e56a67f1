"""Training, loading and identifying the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tidegate.config import ConfigError
from tidegate.data.config import TokenizerFile, TrainedTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END_OF_TEXT", "PAD", "BuiltTokenizer", "load_tokenizer", "token_bytes", "tokenizer_file", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


class BuiltTokenizer(NamedTuple):
    """A tokenizer ready to encode, and the exact bytes of its `tokenizer.json`."""

    tokenizer: Tokenizer
    document: bytes
    eot_id: int

    @property
    def sha256(self) -> str:
        """What `sha256sum tokenizer.json` prints."""
        return hashlib.sha256(self.document).hexdigest()


def train_tokenizer(config: TrainedTokenizer, texts: Sequence[str]) -> BuiltTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) with `<|endoftext|>` = 0 and `<|pad|>` = 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return load_tokenizer(tokenizer.to_str(pretty=True).encode(), "the trained tokenizer")


def load_tokenizer(document: bytes, where: str) -> BuiltTokenizer:
    """Read a `tokenizer.json`.

    Args:
        document: the content of the file.
        where: names the file in errors.

    Raises:
        ConfigError: when it is no tokenizer, or has no `<|endoftext|>`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(document.decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for everything
        raise ConfigError(f"{where}: not a tokenizer.json ({error})") from error
    eot_id = tokenizer.token_to_id(END_OF_TEXT)
    if eot_id is None:
        raise ConfigError(f"{where}: has no {END_OF_TEXT} token, which separates documents")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that quotes "<|endoftext|>" is text: as a special token it would end the document there.
    tokenizer.encode_special_tokens = True
    return BuiltTokenizer(tokenizer, document, eot_id)


def tokenizer_file(config: TokenizerFile, job_dir: Path) -> bytes:
    """The content of the tokenizer file that a job names."""
    path = Path(config.path.replace("{job}", str(job_dir)))
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.tokenizer.path: cannot read {str(path)!r} ({error.strerror})") from error


def token_bytes(document: bytes, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Bytes of UTF-8 text that each token stands for; 0 for `<|endoftext|>`, which stands between texts.

    Exact for byte-level tokenizers, whose tokens are strings of bytes: the tokens of a text add up to its length, also
    where one ends within a character. Where the tokenizer normalises, it is the normalised text that is counted.

    Args:
        document: a `tokenizer.json`.
        vocab_size: V, at least one more than its largest id.

    Returns:
        (V,), or None for a tokenizer of another kind, whose tokens have no length of their own.
    """
    from tokenizers import pre_tokenizers

    content = json.loads(document)
    decoder = content.get("decoder") or {}
    if not any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part):
        return None
    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())  # a character a byte
    num_bytes_V = np.zeros(vocab_size, np.int64)
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    for token, index in content["model"]["vocab"].items():
        if index not in added and not alphabet.issuperset(token):
            return None
        num_bytes_V[index] = len(token)
    for index, text in added.items():
        num_bytes_V[index] = 0 if text == END_OF_TEXT else len(text.encode())
    return num_bytes_V
