"""Checkpoints as folders: whole or known to be damaged, one training to a folder, nothing lost when a disk is full."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_sde.errors import UsageError
from diffusers_sde.training import checkpoints as module
from diffusers_sde.training.checkpoints import (
    CHECKSUMS,
    NotWritten,
    checkpoints,
    clean_up,
    find_candidates,
    find_damage,
    first_whole,
    prune,
    publish,
    publish_into,
    set_aside,
)
from diffusers_sde.training.locking import NAME, locked


def write(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "state").write_bytes(b"0123456789")
    (folder / "part/weights").write_bytes(b"abc")


def make(output: Path, *steps: int) -> Path:
    for step in steps:
        publish(output / f"checkpoint-{step}", write)
    return output


def names(output: Path) -> list[str]:
    return sorted(p.name for p in output.iterdir())


def in_child(act: Callable[[], int]) -> int:
    """The exit status of a forked process that does nothing else."""
    child = os.fork()
    if not child:
        status = 99
        try:
            status = act()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- whole and damaged ones --


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "state").unlink(), "state is missing"),
        (lambda folder: os.truncate(folder / "state", 4), "state has 4 of 10 bytes"),
        (lambda folder: (folder / "part/weights").write_bytes(b"abd"), "part/weights has other content"),
        (lambda folder: (folder / CHECKSUMS).unlink(), "it has no checksums.json"),
        (lambda folder: os.truncate(folder / CHECKSUMS, 9), "it cannot be read"),
        (lambda folder: (folder / CHECKSUMS).write_text("[1]"), "it cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    make(tmp_path, 2, 4)
    assert first_whole(find_candidates(tmp_path, "latest")) == (tmp_path / "checkpoint-4", {})
    change(tmp_path / "checkpoint-4")
    found, damage = first_whole(find_candidates(tmp_path, "latest"))
    assert found.name == "checkpoint-2" and [*damage] == [tmp_path / "checkpoint-4"]
    assert said in damage[tmp_path / "checkpoint-4"]


def test_without_a_whole_checkpoint_each_one_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    make(tmp_path, 2, 4)
    (tmp_path / "checkpoint-2/state").unlink()
    (tmp_path / "checkpoint-4/part/weights").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4: part/weights is missing; checkpoint-2: state is missing"):
        first_whole(find_candidates(tmp_path, "latest"))
    with pytest.raises(ValueError, match="checkpoint-4: part/weights is missing"):
        first_whole(find_candidates(tmp_path, "checkpoint-4"))


def test_a_way_that_is_left_is_set_aside_and_goes_first_when_there_are_too_many(tmp_path: Path) -> None:
    """Resumed from step 4 of 2, 4, 6 and 8; the half-deleted 2 is no checkpoint any more either."""
    make(tmp_path, 2, 4, 6, 8)
    (tmp_path / "checkpoint-2/state").unlink()
    os.truncate(tmp_path / "checkpoint-8/state", 4)
    aside = set_aside(tmp_path, 4)
    assert [p.name for p in aside] == ["checkpoint-2.damaged", "checkpoint-6.abandoned", "checkpoint-8.damaged"]
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4"]
    make(tmp_path, 5)
    prune(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5", "checkpoint-6.abandoned"]
    prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    prune(tmp_path, None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_deletion_cut_short_leaves_no_checkpoint_and_what_it_leaves_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)  # killed before the first file is gone
        prune(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4"]
    (tmp_path / ".checkpoint-6.unfinished").mkdir()
    (tmp_path / ".loss.csv.unfinished").write_text("")
    assert len(names(tmp_path)) == 4
    clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]


# -- writing --


def test_a_problem_of_any_process_is_one_of_all_and_nothing_is_published(tmp_path: Path) -> None:
    make(tmp_path, 2)
    answers = iter([None, "disk full"])  # after the folder is made, after it is written
    with pytest.raises(NotWritten, match="disk full"):
        publish(tmp_path / "checkpoint-4", write, agree=lambda problem: next(answers))
    assert names(tmp_path) == ["checkpoint-2"]


def state_of_a_network(folder: Path) -> None:
    """The three ways in which a checkpoint is written."""
    (folder / "training.json").write_text("{}")
    save_file({"x": torch.zeros(20_000)}, folder / "model.safetensors")
    torch.save({"x": torch.zeros(40_000)}, folder / "optimizer.bin")


@pytest.mark.parametrize("room", [0, 1, 1000, 50_000, 100_000, 150_000])
def test_a_full_disk_costs_no_older_checkpoint_and_leaves_nothing_behind(tmp_path: Path, room: int) -> None:
    """A file that may not grow beyond ``room`` bytes; the last of the two takes 160 kB."""
    make(tmp_path, 2)

    def full() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            publish(tmp_path / "checkpoint-4", state_of_a_network)
        except NotWritten as error:
            return 0 if "MB are free" in str(error) else 1
        return 2

    assert in_child(full) == 0
    assert names(tmp_path) == ["checkpoint-2"] and find_damage(tmp_path / "checkpoint-2") is None


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    publish_into(tmp_path, write)

    def fails(folder: Path) -> None:
        (folder / "state").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(NotWritten, match="disk full"):
        publish_into(tmp_path, fails)
    assert names(tmp_path) == ["part", "state"] and (tmp_path / "state").read_bytes() == b"0123456789"


# -- one training to a folder --


def test_a_second_process_is_refused_while_the_first_is_there_and_told_which_it_is(tmp_path: Path) -> None:
    def second() -> int:
        try:
            with locked(tmp_path):
                return 1
        except UsageError as error:
            return 0 if f"Process {os.getppid()} " in str(error) else 2

    with locked(tmp_path):
        assert in_child(second) == 0
    assert names(tmp_path) == []
    assert in_child(second) == 1


def test_the_lock_of_a_killed_process_stands_in_nobodys_way(tmp_path: Path) -> None:
    def killed() -> int:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_child(killed) == -signal.SIGKILL
    assert names(tmp_path) == [NAME]
    with locked(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_reader_that_outlives_its_training_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As a worker of the data loader does for some seconds."""
    ready, done = os.pipe(), os.pipe()
    training = os.fork()
    if not training:
        with locked(tmp_path):
            if not os.fork():
                os.write(ready[1], b"x")
                os.read(done[0], 1)
                os._exit(0)
            signal.pause()
    os.read(ready[0], 1)
    os.kill(training, signal.SIGKILL)
    os.waitpid(training, 0)
    with locked(tmp_path):
        pass
    os.write(done[1], b"x")


def test_a_folder_that_cannot_be_written_into_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written into \(Not a directory\)"), locked(tmp_path / "file/out"):
        pass
    if os.geteuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(UsageError, match=r"cannot be written into \(Permission denied\)"), locked(tmp_path):
            pass
