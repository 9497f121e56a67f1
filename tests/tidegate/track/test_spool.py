"""The spool file, its replay, and how records are cut into requests."""

from __future__ import annotations

import pytest

from tidegate.config import ConfigError
from tidegate.track import replay_spool
from tidegate.track.delivery import Sender, next_batch
from tidegate.track.spool import Record, Spool, read_spool


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spools" / "rank0.jsonl"


def test_a_torn_spool_can_be_continued(spool):
    records = [Record(i, i, {"tokens": 1.0}) for i in range(4)]
    Spool(spool, "a").append(records[:2])
    with spool.open("a") as file:
        file.write('{"timest')
    assert read_spool(spool).torn
    again = Spool(spool, "a")
    assert again.load() == records[:2]
    again.append(records[2:])
    assert read_spool(spool) == ("a", records, False)


@pytest.mark.parametrize("text", ["", "no\n", '{"run_id": "a"}\n{"step": 1}\n{}\n', "[]\n"])
def test_files_that_are_no_spool_are_refused(tmp_path, uri, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ConfigError, match=f"cannot replay {tmp_path / 'x'}: .*not a metric spool"):
        replay_spool(tmp_path / "x", uri)
    with pytest.raises(ConfigError, match="cannot replay"):
        replay_spool(tmp_path / "missing", uri)


def test_replay_sends_only_what_is_missing(handle, spool, monkeypatch):
    records = [Record(1000 + i, i, {"loss": float(i), "tokens": float(i)}) for i in range(6)]
    Sender(handle.uri, handle.run_id).send(records[:4])
    Spool(spool, handle.run_id).append(records)
    sent: list[int] = []
    monkeypatch.setattr(Sender, "send", lambda self, batch: sent.extend(record.step for record in batch))
    assert replay_spool(spool, handle.uri) == 2
    assert sent == [4, 5]


def test_next_batch_takes_at_least_one_record():
    records = [Record(i, i, {str(k): 0.0 for k in range(size)}) for i, size in enumerate([1500, 400, 600, 1])]
    assert [record.step for record in next_batch(records)] == [0]
    assert [record.step for record in next_batch(records[1:])] == [1, 2]
    assert next_batch([]) == []
