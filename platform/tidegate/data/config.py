"""The `data:` section of a job. Imports pydantic only, so that reading a job stays fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tidegate.config import Config

__all__ = ["DataConfig", "DomainConfig", "TokenizerConfig", "TokenizerFile", "TrainedTokenizer"]

NUM_BYTES_AND_SPECIALS = 258


class DomainConfig(Config):
    """One kind of text, with its own weight in the mixture and its own held-out split."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Goes into metric names and shard file names."""
    hub: str | None = Field(None, min_length=1)
    """A Hugging Face hub dataset (or a local folder laid out as one); or give `paths`."""
    hub_config: str | None = None
    split: str = "train"
    """The hub split to read; Tidegate cuts its own held-out part from it."""
    paths: tuple[str, ...] = ()
    """Globs of .parquet, .jsonl[.gz|.xz|.zst|.bz2] (a document per row) or any other UTF-8 text (a document per
    file). `{stdlib}` is Python's standard library, `{job}` the folder of the file that says it."""
    text_field: str = "text"
    """The column of parquet, jsonl and hub rows that holds the document."""
    weight: float = Field(1.0, gt=0)
    """Share of the training sequences, relative to the other domains."""
    held_out: float = Field(0.02, gt=0, le=0.5)
    """Fraction of the domain's documents that training never sees."""
    max_chars: int | None = Field(None, ge=1)
    """Stop reading after this many characters; files come in an order drawn from `seed`."""

    @model_validator(mode="after")
    def _one_source(self) -> DomainConfig:
        if (self.hub is None) == (not self.paths):
            raise ValueError(f"domain {self.name!r} needs exactly one of hub: and paths:")
        if self.hub is None and (self.hub_config is not None or self.split != "train"):
            raise ValueError(f"domain {self.name!r}: hub_config: and split: mean something only with hub:")
        return self


class TrainedTokenizer(Config):
    """Train a byte-level BPE on the training split of all domains."""

    kind: Literal["train"] = "train"
    vocab_size: int = Field(ge=NUM_BYTES_AND_SPECIALS)
    """Upper bound: 256 bytes, 2 specials, and as many merges as fit and as the text supports."""


class TokenizerFile(Config):
    """Take a Hugging Face `tokenizer.json`; it must know `<|endoftext|>`."""

    kind: Literal["file"]
    path: str
    """Relative to the current directory; `{job}` is the folder of the file that says it."""


TokenizerConfig = Annotated[TrainedTokenizer | TokenizerFile, Field(discriminator="kind")]


class DataConfig(Config):
    """What to train on, how it is cut into tokens and sequences, and in which order it comes."""

    domains: tuple[DomainConfig, ...] = Field(min_length=1)
    tokenizer: TokenizerConfig
    sequence_length: int = Field(ge=2)
    """Label positions per sequence, in tokens; a sequence occupies one token more."""
    documents: Literal["isolate", "join"] = "isolate"
    """`isolate`: no attention and no loss across document boundaries; `join`: a sequence is one document."""
    max_document_chars: int = Field(20_000, ge=1)
    """Longer documents are cut here, at a newline where one is near; otherwise one file can fill a domain."""
    seed: int = Field(0, ge=0)
    """Of the document shuffle, the held-out split and the order of training."""
    eval_sequences: int = Field(32, ge=1)
    """Held-out sequences scored per domain."""

    @model_validator(mode="after")
    def _unique_names(self) -> DataConfig:
        names = [domain.name for domain in self.domains]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two domains share the name {repeated[0]!r}")
        return self
