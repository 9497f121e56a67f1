from __future__ import annotations

import pytest

from tidegate.config import ConfigError
from tidegate.data.config import DomainConfig
from tidegate.data.corpus import cut, split_corpus


def domain(**changes: object) -> DomainConfig:
    return DomainConfig.model_validate({"name": "a", "paths": ["unused"]} | changes)


def test_pieces_join_to_the_text_and_end_at_a_near_newline() -> None:
    assert list(cut("aaaaaa\nbbb\ncc", 8)) == ["aaaaaa\n", "bbb\ncc"]
    assert list(cut("a\nbbbbbbbbbb", 8)) == ["a\nbbbbbb", "bbbb"], "a newline in the first three quarters is too early"
    assert list(cut("a" * 17, 8)) == ["a" * 8, "a" * 8, "a"]
    assert list(cut("a" * 16, 8)) == ["a" * 8, "a" * 8]
    assert list(cut("ab", 1)) == ["a", "b"]


@pytest.mark.parametrize("max_chars", [1, 2, 3, 7, 64, 1000])
def test_no_piece_is_too_long_and_nothing_is_lost(max_chars: int) -> None:
    text = "".join(f"line {number}\n" for number in range(63))
    pieces = list(cut(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


def test_duplicates_are_dropped_and_every_piece_lands_in_one_split() -> None:
    texts = [str(number % 63) for number in range(1000)]
    corpus = split_corpus(domain(held_out=0.1), texts, max_document_chars=10, seed=0)
    assert sorted(corpus.train + corpus.held_out, key=int) == [str(number) for number in range(63)]
    assert len(corpus.held_out) == 6


def test_the_split_depends_on_the_seed_and_the_domain_only() -> None:
    texts = [str(number) for number in range(100)]
    first, again, other = (split_corpus(domain(), texts, max_document_chars=10, seed=seed) for seed in (3, 3, 4))
    renamed = split_corpus(domain(name="b"), texts, max_document_chars=10, seed=3)
    assert first == again
    assert first.train != sorted(first.train, key=int), "shuffled"
    assert first.train != other.train
    assert first.train != renamed.train


def test_each_split_has_a_piece_even_at_the_extremes() -> None:
    few = split_corpus(domain(held_out=0.001), ["one", "two"], max_document_chars=10, seed=0)
    half = split_corpus(domain(held_out=0.5), ["one", "two", "three"], max_document_chars=10, seed=0)
    assert (len(few.train), len(few.held_out)) == (1, 1)
    assert len(half.train) >= 1
    assert len(half.held_out) >= 1


def test_the_cap_is_exact_and_stops_reading() -> None:
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        for number in range(10**9):
            taken.append(number)
            yield f"{number:04d}"

    corpus = split_corpus(domain(max_chars=42), endless(), max_document_chars=10, seed=0)
    assert sum(len(piece) for piece in corpus.train + corpus.held_out) == 42
    assert len(taken) == 11


@pytest.mark.parametrize(("texts", "found"), [([], "no text"), (["same", "same"], "a single document")])
def test_a_domain_that_cannot_be_split_is_named(texts: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=f"data.domains.a: {found}"):
        split_corpus(domain(), texts, max_document_chars=10, seed=0)
