"""A run whose checkpoints' disk fills up or turns read-only under it, on a small file system of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tidegate.train.checkpoint_store import CheckpointStore
from tidegate.train.storage import Storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    (disk / "ballast").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "advice"),
    [
        (fill, "no space left; free some, or keep fewer with checkpoint.keep_last"),
        (make_read_only, "change its permissions or set checkpoint.storage"),
    ],
)
def test_the_run_ends_with_what_to_do_and_goes_on_afterwards(
    small_disk: Path, tmp_path: Path, tiny_job: Callable[..., Path], fail: Callable[[Path], None], advice: str
) -> None:
    job = tiny_job(train={"tokens": 512 * 2000, "log_every": 5}, checkpoint={"every": 5, "storage": str(small_disk)})
    command = [sys.executable, "-m", "tidegate.cli", "train", "--local", "--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen([*command, str(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step 15/"):
                fail(small_disk)
                break
        printed = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 2, printed
    assert f"tidegate: {small_disk}/tiny-1-" in printed
    assert advice in printed
    (folder,) = small_disk.glob("tiny-1-*")
    store = CheckpointStore(Storage(folder))
    last = store.valid()[-1]
    assert last.step >= 5
    assert store.damage(last.name) == []

    make_room(small_disk)
    more = ["--set", f"train.tokens={512 * (last.step + 10)}", "--resume", "tiny-1"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the newest is of step {last.step}" in done.stdout
