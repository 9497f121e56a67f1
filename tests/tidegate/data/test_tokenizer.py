from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tidegate.config import ConfigError
from tidegate.data.config import TokenizerFile, TrainedTokenizer
from tidegate.data.tokenizer import load_tokenizer, token_bytes, tokenizer_file, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 3


def test_specials_come_first_and_any_text_round_trips() -> None:
    built = train_tokenizer(TrainedTokenizer(vocab_size=270), TEXTS)
    assert built.tokenizer.get_vocab_size() == 270
    assert [built.tokenizer.id_to_token(index) for index in (0, 1)] == ["<|endoftext|>", "<|pad|>"]
    assert built.eot_id == 0
    for text in ("the cat", " leading", "\u4e16\u754c \U0001f30a\r\n\t", "never \x00 seen"):
        ids = built.tokenizer.encode(text, add_special_tokens=False).ids
        assert built.tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids)


def test_a_document_that_quotes_the_separator_is_not_cut_there() -> None:
    built = train_tokenizer(TrainedTokenizer(vocab_size=270), TEXTS)
    text = "before <|endoftext|> after"
    ids = built.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert built.eot_id not in ids
    assert built.tokenizer.decode(ids) == text


def test_training_is_deterministic_and_the_hash_is_that_of_the_file() -> None:
    first, again = (train_tokenizer(TrainedTokenizer(vocab_size=270), TEXTS) for _ in range(2))
    other = train_tokenizer(TrainedTokenizer(vocab_size=269), TEXTS)
    assert first.document == again.document
    assert first.sha256 == hashlib.sha256(first.document).hexdigest() != other.sha256
    assert load_tokenizer(first.document, "x").tokenizer.encode("the mat").ids == first.tokenizer.encode("the mat").ids


def test_truncation_of_a_loaded_tokenizer_is_switched_off() -> None:
    tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=270), TEXTS).tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    loaded = load_tokenizer(tokenizer.to_str().encode(), "x").tokenizer
    assert loaded.decode(loaded.encode("the cat sat on the mat").ids) == "the cat sat on the mat"


def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    bare = Tokenizer(models.BPE()).to_str().encode()
    with pytest.raises(ConfigError, match=r"t\.json: has no <\|endoftext\|> token"):
        load_tokenizer(bare, "t.json")
    with pytest.raises(ConfigError, match=r"t\.json: not a tokenizer\.json"):
        load_tokenizer(b"\xff", "t.json")
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path: cannot read .*gone\.json"):
        tokenizer_file(TokenizerFile(kind="file", path="{job}/gone.json"), tmp_path)


BUILT = train_tokenizer(
    TrainedTokenizer(vocab_size=300), [*TEXTS, "\u4e16\u754c \u4e16\u754c \u043c\u0438\u0440 caf\u00e9 caf\u00e9"]
)


@given(st.text(max_size=63))
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_a_texts_tokens_add_up_to_it(text: str) -> None:
    num_bytes_V = token_bytes(BUILT.document, 301)
    assert num_bytes_V is not None
    ids = BUILT.tokenizer.encode(text, add_special_tokens=False).ids
    assert num_bytes_V[ids].sum() == len(text.encode())


def test_the_separator_has_no_bytes_and_a_longer_vocabulary_ends_in_zeros() -> None:
    num_bytes_V = token_bytes(BUILT.document, 301)
    assert num_bytes_V is not None
    assert num_bytes_V.shape == (301,)
    assert num_bytes_V[BUILT.eot_id] == num_bytes_V[300] == 0
    assert num_bytes_V.max() >= 3, "merges are longer than a byte"


def test_tokens_without_a_length_of_their_own_are_not_counted() -> None:
    words = Tokenizer(models.WordLevel({"caf\u00e9": 0, "un ": 1}, unk_token="un "))
    assert token_bytes(words.to_str().encode(), 2) is None
    words.decoder = decoders.ByteLevel()
    assert token_bytes(words.to_str().encode(), 2) is None, "a space is no token of bytes"
