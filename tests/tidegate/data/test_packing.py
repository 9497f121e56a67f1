from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tidegate.config import ConfigError
from tidegate.data.config import DataConfig
from tidegate.data.packing import check_lengths, num_windows, read_windows
from tidegate.data.shards import TokenDataset

E = 0


def test_documents_and_mask_at_boundaries(write_dataset: Callable[..., TokenDataset]) -> None:
    # Windows of 5 + 1: [5 6 E 7 E 8] [8 9 9 9 9 E] [E 4 E E E 3]; the second starts on the last token of the first.
    stream = [5, 6, E, 7, E, 8, 9, 9, 9, 9, E, 4, E, E, E, 3]
    dataset = write_dataset({"a": ([stream], [stream])})
    places = [(0, "train", window) for window in range(3)]
    read = read_windows(dataset, places, sequence_length=5, documents="isolate")
    assert read.tokens_BT1.tolist() == [[5, 6, E, 7, E, 8], [8, 9, 9, 9, 9, E], [E, 4, E, E, E, 3]]
    assert read.documents_BT.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 2, 3]]
    assert read.loss_mask_BT.tolist() == [
        [True, True, False, True, False],
        [True, True, True, True, True],
        [False, True, False, False, False],
    ]
    assert (read.tokens_BT1.dtype, read.documents_BT.dtype, read.loss_mask_BT.dtype) == (np.int64, np.int32, np.bool_)

    joined = read_windows(dataset, places, sequence_length=5, documents="join")
    assert joined.tokens_BT1.tolist() == read.tokens_BT1.tolist()
    assert not joined.documents_BT.any()
    assert joined.loss_mask_BT.all()


@pytest.mark.parametrize("sequence_length", [2, 3, 7, 16, 63])
def test_windows_reassemble_the_stream(sequence_length: int, two_domains: TokenDataset) -> None:
    stream = two_domains.stream(0, "train")
    count = num_windows(len(stream), sequence_length)
    places = [(0, "train", window) for window in range(count)]
    tokens_BT1 = read_windows(two_domains, places, sequence_length=sequence_length, documents="join").tokens_BT1
    whole = stream.read(0, len(stream))
    assert np.array_equal(tokens_BT1[:, :-1].reshape(-1), whole[: count * sequence_length])
    assert np.array_equal(tokens_BT1[:, 1:].reshape(-1), whole[1 : count * sequence_length + 1])
    left = len(stream) - 1 - count * sequence_length
    assert 0 <= left < sequence_length, "not a window more would fit"


def test_the_number_of_windows_at_the_edges() -> None:
    assert [num_windows(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_a_domain_too_small_for_one_sequence_is_named(
    two_domains: TokenDataset, loader_config: Callable[..., DataConfig]
) -> None:
    # b holds 16 held-out tokens: 14 and two ends of text.
    assert len(two_domains.stream(1, "held_out")) == 16
    check_lengths(two_domains, loader_config({"a": 1, "b": 1}, sequence_length=15))
    message = r"data\.domains\.b: its held_out split has 16 tokens, one sequence takes 17 .*sequence_length 16"
    with pytest.raises(ConfigError, match=message):
        check_lengths(two_domains, loader_config({"a": 1, "b": 1}, sequence_length=16))
