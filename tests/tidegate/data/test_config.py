from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tidegate.data.config import DataConfig, DomainConfig, TokenizerFile, TrainedTokenizer

TOKENIZER = {"kind": "train", "vocab_size": 300}


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"name": "a"}, "exactly one of hub: and paths:"),
        ({"name": "a", "hub": "x/y", "paths": ["*.txt"]}, "exactly one of hub: and paths:"),
        ({"name": "a", "paths": ["*.txt"], "split": "test"}, "only with hub:"),
        ({"name": "A", "paths": ["*.txt"]}, "pattern"),
        ({"name": "a", "paths": ["*.txt"], "weight": 0}, "greater than 0"),
        ({"name": "a", "paths": ["*.txt"], "held_out": 0.51}, "less than or equal to 0.5"),
    ],
)
def test_a_wrong_domain_is_refused(domain: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DomainConfig.model_validate(domain)


def test_domain_names_are_unique() -> None:
    domain = {"name": "a", "paths": ["*.txt"]}
    with pytest.raises(ValidationError, match="two domains share the name 'a'"):
        DataConfig.model_validate({"domains": [domain, domain], "tokenizer": TOKENIZER, "sequence_length": 8})


def test_the_kind_chooses_the_tokenizer_config() -> None:
    fields = {"domains": [{"name": "a", "hub": "x/y"}], "sequence_length": 8}
    trained = DataConfig.model_validate(fields | {"tokenizer": TOKENIZER})
    loaded = DataConfig.model_validate(fields | {"tokenizer": {"kind": "file", "path": "t.json"}})
    assert trained.tokenizer == TrainedTokenizer(vocab_size=300)
    assert loaded.tokenizer == TokenizerFile(kind="file", path="t.json")
    with pytest.raises(ValidationError, match="258"):
        TrainedTokenizer(vocab_size=257)


def test_importing_the_config_stays_cheap() -> None:
    heavy = "{'torch', 'numpy', 'datasets', 'tokenizers', 'ray'}"
    program = f"import sys, tidegate.data.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
