"""Reward fine-tuning by the training script: what it promises about resuming, processes, bad rewards and results."""

from __future__ import annotations

import copy
import filecmp
import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from training_helpers import TINY, launch, losses, train_here
from training_tasks import text_task

from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.errors import UsageError
from diffusers_sde.training import experience
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.card import read_curve
from diffusers_sde.training.checkpoints import checkpoints
from diffusers_sde.training.learner import Learner, frozen_start
from diffusers_sde.training.networks import pipeline_task
from diffusers_sde.training.parts import add_lora
from diffusers_sde.training.rewards import Reward, Spoiled, agreement, brightness, find_reward, saturation, total
from diffusers_sde.training.wishes import Wishes, make_wishes

OBJECTIVES = ("grpo", "adjoint_matching", "nft")
CHECKPOINT = "checkpoint-4/model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh network of two classes with dropout, 8x8."""
    torch.manual_seed(0)
    config = {**TINY, "sample_size": 8, "num_class_embeds": 3, "dropout": 0.3}
    network = diffusers.UNet2DModel.from_config(config)
    folder = tmp_path_factory.mktemp("model")
    ClassConditionalPipeline(network, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def words(model: Path, output: Path, objective: str = "grpo", **options: Any) -> list[str]:
    """Arguments of a short training."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": model, "output_dir": output, "objective": objective, "reward": "brightness",
        "max_train_steps": 8, "train_batch_size": 4, "group_size": 2, "rollout_steps": 3, "learning_rate": 1e-3,
        "lr_warmup_steps": 0, "num_validation_images": 0, "checkpointing_steps": 2, "logging_steps": 1,
        "report_to": "none", "kl_coefficient": 1e-4, **options,
    }  # fmt: skip
    return [w for key, value in values.items() for w in (f"--{key}", *([] if value is True else str(value).split()))]


# -- resuming and processes --


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(model: Path, tmp_path: Path, objective: str) -> None:
    """Two optimizer steps a rollout, a window that moves; of grpo two batches a step."""
    batches = 2 if objective == "grpo" else 1
    own = {"updates_per_rollout": 2, "gradient_accumulation_steps": batches, "window_size": 1}
    train = functools.partial(words, model, objective=objective, **own)
    assert train_here(train(output=tmp_path / "whole", stop_after_steps=4)) == 0
    assert train_here(train(output=tmp_path / "part", stop_after_steps=2)) == 0
    assert train_here(train(output=tmp_path / "part", stop_after_steps=2, resume_from_checkpoint="latest")) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    rows = [read_curve(tmp_path / name / "rewards.csv") for name in ("part", "whole")]
    assert rows[0] == rows[1] and [row[0] for row in rows[0]] == [1, 3]
    assert filecmp.cmp(tmp_path / "part" / CHECKPOINT, tmp_path / "whole" / CHECKPOINT, shallow=False)


@pytest.mark.slow
def test_two_processes_are_one_with_a_doubled_batch(model: Path, tmp_path: Path) -> None:
    """Of two groups, one on each process."""
    two = launch(words(model, tmp_path / "two", stop_after_steps=2, train_batch_size=2), processes=2)
    said = two.communicate(timeout=300)[0]
    assert two.returncode == 0, said
    assert train_here(words(model, tmp_path / "one", stop_after_steps=2)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4, abs=1e-5)
    rows = [read_curve(tmp_path / name / "rewards.csv") for name in ("one", "two")]
    for one, other in zip(*rows, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_a_bad_reward_in_two_processes_ends_both(model: Path, tmp_path: Path) -> None:
    """The picture is one of the second process."""
    bad = write_reward(tmp_path, "if any(label == 1 for label in labels): raise ValueError('odd')")
    process = launch(words(model, tmp_path / "out", train_batch_size=2, reward=bad), processes=2)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "raised ValueError (odd) for picture" in said and "Traceback" not in said


def test_groups_are_of_one_wish_and_processes_have_whole_ones() -> None:
    wishes = Wishes(framing(), 3, prompts=["a", "b"])
    asked = [item["caption"] for item in wishes.items(range(12), seed=0)]
    assert [len(set(asked[i : i + 3])) for i in range(0, 12, 3)] == [1] * 4
    assert {asked[0], asked[3]} == {asked[6], asked[9]} == {"a", "b"}
    with pytest.raises(SystemExit):
        read_settings(words(Path("m"), Path("o"), train_batch_size=4, group_size=3))


# -- rewards --


def write_reward(folder: Path, body: str) -> str:
    """A file with a reward that does this first, and its name."""
    lines = ["import torch", "def reward(images, prompts, labels):", f"    {body}", "    return images.mean((1, 2, 3))"]
    (folder / "own.py").write_text("\n".join(lines))
    return f"{folder / 'own.py'}:reward"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return torch.tensor([0.0, 1.0, float('nan'), 0.0])", "returned nan for picture 2 (label"),
        ("return images.mean()", "returned shape (): it must be (4,), one number a picture"),
        ("return 'good'", "returned str: it must return 4 numbers"),
        ("1 / 0", "raised ZeroDivisionError (division by zero) for picture 0"),
    ],
)
def test_a_bad_reward_is_named_with_step_and_picture(model: Path, tmp_path: Path, capsys, body: str, said: str) -> None:
    assert train_here(words(model, tmp_path / "out", reward=write_reward(tmp_path, body))) == 2
    error = capsys.readouterr().err
    assert f"At step 1 the reward {tmp_path / 'own.py'}:reward {said}" in error and "start anew" in error


def test_what_was_learned_before_a_bad_reward_is_not_lost(
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken at the third rollout, between two checkpoints: the training goes on from the second."""
    calls = []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return brightness(*arguments) if len(calls) != 3 else torch.full((4,), torch.nan)

    monkeypatch.setitem(experience.total.__globals__["BUILT_IN"], "brightness", broken)
    train = functools.partial(words, model, tmp_path / "out", checkpointing_steps=100)
    assert train_here(train(stop_after_steps=4)) == 2
    assert "At step 3 the reward brightness returned nan for picture 0" in (error := capsys.readouterr().err)
    assert "checkpoint-2" in error and [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert train_here(train(stop_after_steps=1, resume_from_checkpoint="latest")) == 0
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3]


def test_one_picture_that_raises_is_found_in_its_batch() -> None:
    def dark(images: torch.Tensor, prompts: Any, labels: Any) -> torch.Tensor:
        if bool((images.mean((1, 2, 3)) == 0).any()):
            raise ValueError("too dark")
        return images.mean((1, 2, 3))

    images = torch.ones(4, 1, 2, 2)
    images[3] = 0
    with pytest.raises(Spoiled, match=r"dark raised ValueError \(too dark\)") as found:
        total([Reward("dark", 1.0, dark)], images, ["a"] * 4, None)
    assert found.value.index == 3


def test_rewards_are_weighted_and_built_in_ones_are_what_they_say() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1.0  # red
    images[1, :, :, :2] = 1.0  # white on the left
    weighed = [Reward("brightness", 2.0, brightness), Reward("saturation", -1.0, saturation)]
    assert total(weighed, images, None, None).tolist() == pytest.approx([2 / 3 - 1, 1.0])
    assert find_reward("symmetry")(images, None, None).tolist() == pytest.approx([1.0, 0.0], abs=1e-3)
    assert find_reward("diffusers_sde.training.rewards:brightness") is brightness


def test_the_embedded_classifier_agrees_with_its_own_classes() -> None:
    """Pictures of the embedded model: the reward of the label that they were asked for is the greatest."""
    from diffusers_sde.assets import load_fashion_model

    pipe = load_fashion_model()
    pipe.set_progress_bar_config(disable=True)
    asked = [1, 5]
    made = pipe(asked, num_inference_steps=6, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    scores = torch.stack([agreement(made, None, [label] * 2) for label in range(10)])
    assert scores.argmax(0).tolist() == asked
    assert scores.exp().sum(0).tolist() == pytest.approx([1, 1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [("beauty", "There is no reward 'beauty'"), ("nowhere:f", "cannot be imported"), ("math:pi", "is no function")],
)
def test_rewards_that_do_not_exist_are_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_reward(name)


def test_adjoint_matching_asks_for_a_gradient(model: Path, tmp_path: Path, capsys) -> None:
    reward = write_reward(tmp_path, "images = images.detach()")
    assert train_here(words(model, tmp_path / "out", "adjoint_matching", reward=reward)) == 2
    assert "has no gradient: make it differentiable in the images, or use grpo or nft" in capsys.readouterr().err


# -- rollouts --


def learner_of(pipe: Any, objective: str = "grpo", **options: Any) -> Learner:
    task = pipeline_task(pipe, 2, captions=False)
    settings = read_settings(words(Path("m"), Path("o"), objective, **options))
    return Learner(settings, task, frozen_start(settings, task))


def batch_of(count: int = 4) -> dict[str, Any]:
    return {"positions": torch.arange(count), "class_labels": torch.arange(count) // 2 % 2}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_update_re_scores_the_rollout_with_the_ratio_one(model: Path, guidance: float) -> None:
    """With dropout in the network and guidance in the sampler; so that the divergence from the start is 0."""
    learner = learner_of(ClassConditionalPipeline.from_pretrained(model), guidance_scale=guidance)
    learner.task.network.train()
    batch = batch_of()
    learner.task.network.eval()
    own = experience.experience_of(learner, [Reward("b", 1.0, brightness)], batch, 0, learner.shape(8))
    parts = own.parts(experience.Spread(1.0, 1.0))
    predict = functools.partial(learner.predict(batch), learner.task.network)
    assert len(parts) == 2 and own.kl.tolist() == [0.0] * 4
    for part in parts:
        assert torch.equal(part.chain.step(predict, part.k, part.state).log_prob(part.next_state), part.log_prob)


def test_a_step_along_the_adjoint_raises_the_reward_of_the_same_noise(model: Path) -> None:
    """Through pictures and network, along the gradient of what one rollout has taught."""
    learner = learner_of(ClassConditionalPipeline.from_pretrained(model), "adjoint_matching", rollout_steps=4)
    network, batch = learner.task.network.eval(), batch_of(8)
    rewards, shape = [Reward("b", 1.0, brightness)], learner.shape(8)
    roll = functools.partial(experience.experience_of, learner, rewards, batch, 0, shape)
    before = roll()
    predict = functools.partial(learner.predict(batch), network)
    sum(part.loss(predict) for part in before.parts(experience.Spread(1.0, 1.0))).backward()
    with torch.no_grad():
        size = sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None).sqrt()
        for p in network.parameters():
            if p.grad is not None:
                p -= 0.02 * p.grad / size
    assert float(roll().rewards.mean()) > float(before.rewards.mean())


def test_windows_move_on_and_grpo_draws_noise_in_them_only(model: Path) -> None:
    learner = learner_of(ClassConditionalPipeline.from_pretrained(model), window_size=2, rollout_steps=5)
    windows = [experience.window_of(learner.settings, number) for number in range(4)]
    assert windows == [[0, 1], [1, 2], [2, 3], [0, 1]]
    chain = experience.chain_of(learner, windows[1])
    assert [tau > 0 for tau in chain.scheduler.config.tau] == [False, True, True, False, False]


def test_the_start_of_adapters_is_the_network_without_them() -> None:
    """LoRA on a text-to-image model: no copy, the same divergence."""
    task = text_task("cogview4")
    plain = copy.deepcopy(task)
    add_lora(task, 2)
    settings = read_settings(words(Path("m"), Path("o"), rank=2))
    learner = Learner(settings, task, frozen_start(settings, task))
    for name, parameter in task.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = {"positions": torch.arange(2), "caption": ["two dogs"] * 2}
    x, time = torch.randn(2, *learner.shape(16), generator=torch.Generator().manual_seed(0)), 500.0
    with torch.no_grad():
        ours, now = learner.start(batch)(x, time), learner.predict(batch)(task.network, x, time)
        before = Learner(settings, plain, plain).predict(batch)(plain.network, x, time)
    torch.testing.assert_close(ours, before)
    assert not torch.allclose(now, before)
    assert any(p.requires_grad for p in task.network.parameters())
    assert learner.pictures(x).shape == (2, 3, 16, 16) and 0 <= float(learner.pictures(x).min()) <= 1


# -- wishes --


def framing() -> Any:
    from diffusers_sde.training.framing import Framing

    return Framing(8, 3, True, False)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n\n  rocket \nred apple\n")
    pipe = text_task("cogview4").pipe
    assert make_wishes(pipe, framing(), 2, str(file), None).prompts == ["red apple", "rocket"]
    with pytest.raises(UsageError, match="pass --prompt_file, one prompt a line"):
        make_wishes(pipe, framing(), 2, None, None)
    file.write_text("\n")
    with pytest.raises(UsageError, match="has no prompts"):
        make_wishes(pipe, framing(), 2, str(file), None)


# -- results --


def test_the_result_says_what_was_reached(model: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    assert train_here(words(model, output, max_train_steps=2, dry_run=True)) == 0
    assert "2 classes, groups of 2, 3 evaluations at tau 1" in capsys.readouterr().out and not output.exists()
    own = {"num_validation_images": 2, "validation_inference_steps": 2, "reward": "brightness symmetry"}
    assert train_here(words(model, output, max_train_steps=2, reward_weights="1 0.5", **own)) == 0
    card = (output / "README.md").read_text()
    assert "grpo, reward 1 brightness + 0.5 symmetry, KL coefficient 0.0001" in card
    assert "**KL to the start**" in card and "![Reward](rewards.png)" in card and (output / "rewards.png").exists()
    assert (output / "samples/step-000000.png").exists() and (output / "samples/step-000002.png").exists()
    pipe = diffusers.DiffusionPipeline.from_pretrained(output)
    assert isinstance(pipe, ClassConditionalPipeline) and pipe.class_names is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": None}, "pass --reward"),
        ({"train_batch_size": 3}, "pass a multiple of --group_size"),
        ({"group_size": 1}, "at least 2"),
        ({"objective": "adjoint_matching", "rollout_tau": 0.5}, "leave out --rollout_tau"),
        ({"objective": "adjoint_matching", "kl_coefficient": 0}, "must be positive for adjoint matching"),
        ({"rollout_tau": 0}, "pass a positive --rollout_tau"),
        ({"objective": "nft", "guidance_scale": 2}, "leave out --guidance_scale"),
        ({"window_size": 3}, "only 2 steps of the rollout draw noise"),
        ({"rollout_steps": 1}, "more --rollout_steps"),
        ({"updates_per_rollout": 3}, "must be a multiple of --updates_per_rollout"),
        ({"reward_weights": "1 2"}, "2 numbers for 1 rewards"),
        ({"max_train_steps": None}, "pass --max_train_steps"),
        ({"prompt_file": "missing.txt"}, "does not exist"),
        ({"objective": "denoising", "train_data_dir": "d"}, "--reward is for --objective grpo"),
        ({"pretrained_model_name_or_path": None}, "pass --pretrained_model_name_or_path"),
        ({"kl_coefficient": -1}, "cannot be negative"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(options: dict[str, Any], said: str, capsys) -> None:
    values = {"model": "m", "output": "o", **options}
    given = words(values.pop("model"), values.pop("output"), **values)
    for name in [key for key, value in options.items() if value is None]:
        i = given.index(f"--{name}")
        del given[i : i + 2]
    with pytest.raises(SystemExit):
        read_settings(given)
    assert said in " ".join(capsys.readouterr().err.split())
