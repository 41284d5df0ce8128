"""Going on from a checkpoint: from which, with which settings, and only if nothing in it can run code."""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_helpers import common, losses, make_images, tiny_config, train_here

from diffusers_sde.training import loop
from diffusers_sde.training.checkpoints import checkpoints, find_damage, seal
from diffusers_sde.training.losses import make_loss
from diffusers_sde.training.state import PROGRESS

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an average, checkpoints after 2, 4 and 6, and the result."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train_here(arguments(data, output, config)) == 0
    return output


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same, killed after step 5."""
    output = tmp_path / "out"
    output.mkdir()
    for name in ("checkpoint-2", "checkpoint-4", "loss.csv"):
        (shutil.copytree if name != "loss.csv" else shutil.copy)(whole / name, output / name)
    return output


def arguments(data: Path, output: Path, config: Path | None, **options: object) -> list[str]:
    return common(data, output, config, 6, **{"use_ema": True, **options})


def resume(data: Path, output: Path, config: Path | None, **options: object) -> int:
    return train_here(arguments(data, output, config, **{"resume_from_checkpoint": "latest", **options}))


def names(output: Path) -> list[str]:
    return sorted(p.name for p in output.glob("*checkpoint*"))


# -- from which --


@pytest.mark.parametrize("file", ["optimizer.bin", PROGRESS])
def test_the_newest_one_cut_off_falls_back_to_the_one_before_and_ends_the_same_bit_for_bit(
    data: Path, config: Path, whole: Path, stopped: Path, capsys, file: str
) -> None:
    size = (stopped / "checkpoint-4" / file).stat().st_size
    os.truncate(stopped / "checkpoint-4" / file, size // 2)
    (stopped / ".checkpoint-6.unfinished").mkdir()
    assert resume(data, stopped, config) == 0
    assert f"Going on from checkpoint-2: checkpoint-4 is damaged ({file} has" in capsys.readouterr().err
    assert names(stopped) == ["checkpoint-2", "checkpoint-4", "checkpoint-4.damaged", "checkpoint-6"]
    assert losses(stopped) == losses(whole)
    assert filecmp.cmp(stopped / WEIGHTS, whole / WEIGHTS, shallow=False)


def test_one_that_is_named_and_damaged_is_refused_with_what_is_wrong(
    data: Path, config: Path, stopped: Path, capsys
) -> None:
    (stopped / "checkpoint-4/optimizer.bin").unlink()
    assert resume(data, stopped, config, resume_from_checkpoint="checkpoint-4") == 2
    said = capsys.readouterr().err
    assert "checkpoint-4: optimizer.bin is missing" in said and said.count("\n") == 1


def test_from_an_older_one_under_a_limit_the_new_ones_are_kept_and_latest(
    data: Path, config: Path, whole: Path, stopped: Path, capsys
) -> None:
    """The abandoned way goes, not the new one."""
    options = {"checkpoints_total_limit": 2, "checkpointing_steps": 1}
    assert resume(data, stopped, config, resume_from_checkpoint="checkpoint-2", stop_after_steps=1, **options) == 0
    assert "checkpoint-4.abandoned" in capsys.readouterr().out
    assert names(stopped) == ["checkpoint-2", "checkpoint-3"]
    assert resume(data, stopped, config, **options) == 0
    assert "Resumed from checkpoint-3" in capsys.readouterr().out
    assert names(stopped) == ["checkpoint-5", "checkpoint-6"]
    assert losses(stopped) == losses(whole)
    assert filecmp.cmp(stopped / WEIGHTS, whole / WEIGHTS, shallow=False)


# -- with which settings --


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, ["--seed 0 (now 1)"]),
        ({"prediction_type": "v_prediction"}, ["--prediction_type epsilon (now v_prediction)"]),
        ({"path": "cosine"}, ["--path VariancePreserving with log_snr"]),
        ({"train_batch_size": 2}, ["images per step 4 (now 2)"]),
        ({"gradient_accumulation_steps": 2}, ["images per step 4 (now 8)"]),
        ({"use_ema": None}, ["--use_ema on (now off)"]),
        ({"ema_sigma_rel": 0.2}, ["--ema_sigma_rel 0.1 (now 0.2)"]),
        ({"objective": "consistency"}, ["--objective denoising (now consistency)"]),
        ({"train_data_dir": "other"}, ["data of 64 images, 2 classes", "(now 64 images, 2 classes"]),
        ({"model_config": "other"}, ["attention_head_dim of the network 8 (now 4)"]),
        ({"seed": 1, "train_batch_size": 8}, ["--seed 0 (now 1)", "images per step 4 (now 8)"]),
    ],
)
def test_what_would_change_the_meaning_of_the_numbers_is_refused_in_one_sentence(
    data: Path, config: Path, stopped: Path, tmp_path: Path, capsys, options: dict[str, object], said: list[str]
) -> None:
    if "train_data_dir" in options:
        options = {"train_data_dir": make_images(tmp_path / "other", size=18)}
    if "model_config" in options:
        options = {"model_config": tiny_config(tmp_path / "other", attention_head_dim=4)}
    assert resume(data, stopped, config, **options) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("diffusers_sde.train: checkpoint-4 was made with ") and problem.count("\n") == 1
    assert all(part in problem for part in said)
    assert names(stopped) == ["checkpoint-2", "checkpoint-4"]


def test_two_ways_to_say_the_same_are_the_same(
    data: Path, config: Path, whole: Path, stopped: Path, tmp_path: Path, capsys
) -> None:
    """Folders that were moved, defaults that are written out, half of the batch twice."""
    shutil.copytree(data, tmp_path / "moved")
    shutil.copy(config, tmp_path / "moved.json")
    options = {"prediction_type": "epsilon", "path": "vp", "train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert resume(tmp_path / "moved", stopped, tmp_path / "moved.json", **options) == 0
    assert "Resumed from checkpoint-4.\n" in capsys.readouterr().out
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)


def test_the_learning_rate_of_a_resumed_training_is_the_one_asked_for_now(
    data: Path, config: Path, stopped: Path, capsys
) -> None:
    """Not the one that Accelerate's state of the optimizer brings back; with the place in the schedule unchanged."""
    options = {"learning_rate": 2e-5, "lr_scheduler": "linear", "lr_warmup_steps": 1, "adam_weight_decay": 0.5}
    assert resume(data, stopped, config, stop_after_steps=1, **options) == 0
    said = capsys.readouterr().out
    for change in ("--learning_rate 0.001 (now 2e-05)", "--lr_scheduler cosine (now linear)"):
        assert change in said
    last = (stopped / "loss.csv").read_text().splitlines()[-1].split(",")
    assert int(last[0]) == 5 and float(last[2]) == pytest.approx(2e-5 * (6 - 4) / (6 - 1))
    group = torch.load(stopped / "checkpoint-5/optimizer.bin")["param_groups"][0]
    assert group["lr"] == pytest.approx(2e-5 * (6 - 5) / (6 - 1)) and group["weight_decay"] == 0.5


# -- nothing that runs --


class Bomb:
    """What runs code when it is read as a pickle."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def write_pickle(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


def test_a_checkpoint_holds_no_pickles_but_those_of_accelerate(whole: Path) -> None:
    files = {p.name for p in (whole / "checkpoint-6").iterdir()}
    own = {"training.json", "average.safetensors", "checksums.json"}
    assert files == own | {"model.safetensors", "optimizer.bin", "random_states_0.pkl"}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, torch.save) for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl")),
        *((name, write_pickle) for name in ("scheduler.bin", "pytorch_model.bin", ".metadata")),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    data: Path, config: Path, stopped: Path, tmp_path: Path, capsys, name: str, write: Callable
) -> None:
    checkpoint, ran = stopped / "checkpoint-4", tmp_path / "ran"
    if name == "pytorch_model.bin":  # what Accelerate falls back to
        (checkpoint / "model.safetensors").unlink()
    write(Bomb(ran), checkpoint / name)
    (checkpoint / "checksums.json").unlink()
    seal(checkpoint)
    assert resume(data, stopped, config) == 2
    said = capsys.readouterr().err
    assert f"{name} holds more than tensors and numbers" in said and said.count("\n") == 1
    assert not ran.exists()
    torch.load(checkpoint / name, weights_only=False) if write is torch.save else pickle.loads(
        (checkpoint / name).read_bytes()
    )
    assert ran.exists()  # it would have


def test_a_state_that_does_not_fit_is_one_sentence(data: Path, config: Path, stopped: Path, capsys) -> None:
    for change in ({"step": "4"}, {"made_with": None}):
        file = stopped / "checkpoint-4" / PROGRESS
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        (stopped / "checkpoint-4/checksums.json").unlink()
        seal(stopped / "checkpoint-4")
        assert resume(data, stopped, config) == 2
        said = capsys.readouterr().err
        assert PROGRESS in said and said.count("\n") == 1


# -- only good ones --


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets an optimizer step end with other weights."""
    step = loop.optimizer_step

    def arrange(at: int, change: Callable[[torch.Tensor], object]) -> None:
        def with_change(session, *args):
            done = step(session, *args)
            if session.progress.step == at:
                with torch.no_grad():
                    change(session.network.conv_out.weight)
            return done

        monkeypatch.setattr(loop, "optimizer_step", with_change)

    yield arrange


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight[0].fill_(float("nan")), "their loss is nan"),
        (lambda weight: weight.fill_(float("inf")), "their loss is nan"),
        (lambda weight: weight.mul_(1e4), "that of the training was at most"),
    ],
)
def test_weights_that_break_in_the_last_step_are_neither_kept_nor_saved(
    data: Path, config: Path, tmp_path: Path, capsys, broken, change, said: str
) -> None:
    """After the last loss, which is that of the step before: they would have been saved with status 0."""
    broken(6, change)
    output = tmp_path / "out"
    assert train_here(arguments(data, output, config)) == 1
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "The weights after step 6 are broken" in problem and said in problem
    assert f"the last good checkpoint is {output / 'checkpoint-4'}" in problem and "--learning_rate" in problem
    assert names(output) == ["checkpoint-2", "checkpoint-4"] and not (output / "model_index.json").exists()


def test_an_average_that_holds_broken_weights_is_not_kept_although_the_weights_are_good_again(
    data: Path, config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.optimizer_step

    def polluted(session, *args):
        done = step(session, *args)
        if session.progress.step == 3:
            session.ema.average[0].mul_(1e30)
        return done

    monkeypatch.setattr(loop, "optimizer_step", polluted)
    assert train_here(arguments(data, tmp_path / "out", config)) == 1
    assert "The weights after step 4 are broken" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(
    data: Path, config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rough(*args, **kwargs):
        loss = make_loss(*args, **kwargs)

        def with_endless_slope(network, batch):
            value = loss(network, batch)
            return value + torch.sqrt((value - value.detach()).abs())  # 0 of infinite slope

        return with_endless_slope

    monkeypatch.setattr("diffusers_sde.training.command.make_loss", rough)
    assert train_here(arguments(data, tmp_path / "out", config)) == 1
    assert "The gradient is nan at step 1: start anew (there is no checkpoint yet)" in capsys.readouterr().err


def test_a_diverged_training_goes_on_from_its_last_good_checkpoint_with_a_smaller_learning_rate(
    data: Path, config: Path, tmp_path: Path, capsys
) -> None:
    """What the message tells to do works."""
    output = tmp_path / "out"
    assert train_here(arguments(data, output, config, stop_after_steps=2)) == 0
    assert resume(data, output, config, learning_rate=1e30) == 1
    assert "checkpoint-2" in capsys.readouterr().err
    assert resume(data, output, config, learning_rate=1e-4) == 0
    assert all(find_damage(folder) is None for folder in checkpoints(output))
    assert [p.name for p in checkpoints(output)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
