"""The training script as its users run it: what it promises about resuming, processes, refusals and results."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import signal
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from training_helpers import common, launch, losses, make_images, tiny_config, train_here

import diffusers_sde
from diffusers_sde.assets import load_fashion_model
from diffusers_sde.training import card, command, launching
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.checkpoints import checkpoints, publish
from diffusers_sde.training.data import load_images
from diffusers_sde.training.plan import describe_rate, training_length

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without interruption, with dropout in the network, accumulation, and an average."""
    output = tmp_path_factory.mktemp("trained") / "out"
    assert train_here(resumable(data, output, config)) == 0
    return output


def resumable(data: Path, output: Path, config: Path, **options: object) -> list[str]:
    dropout = tiny_config(output.parent, dropout=0.2)
    return common(data, output, dropout, 8, use_ema=True, gradient_accumulation_steps=2, random_flip=True, **options)


# -- resuming --


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(
    data: Path, config: Path, trained: Path, tmp_path: Path
) -> None:
    assert train_here(resumable(data, tmp_path / "out", config, stop_after_steps=3)) == 0
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert train_here(resumable(data, tmp_path / "out", config, resume_from_checkpoint="latest")) == 0
    assert losses(tmp_path / "out") == losses(trained)
    assert filecmp.cmp(tmp_path / "out" / WEIGHTS, trained / WEIGHTS, shallow=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_resumes_bit_for_bit(
    data: Path, config: Path, trained: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM: a checkpoint of the step under way and status 143.  SIGKILL: the last complete checkpoint."""
    output = tmp_path / "out"
    process = launch(resumable(data, output, config))
    deadline = time.monotonic() + 120
    while not checkpoints(output) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.communicate(timeout=300)
    assert checkpoints(output) and not (output / WEIGHTS).exists(), "killed too late to show anything"
    assert train_here(resumable(data, output, config, resume_from_checkpoint="latest")) == 0
    assert losses(output) == losses(trained)
    assert filecmp.cmp(output / WEIGHTS, trained / WEIGHTS, shallow=False)


def test_a_missing_checkpoint_is_an_error_and_not_a_new_start(data: Path, config: Path, tmp_path: Path, capsys) -> None:
    """diffusers' examples print a line and silently start over."""
    for wanted in ("latest", "checkpoint-7"):
        arguments = common(data, tmp_path / "out", config, 2, resume_from_checkpoint=wanted)
        assert train_here(arguments) == 2
        assert "leave out --resume_from_checkpoint to start anew" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_earlier_training_is_not_overwritten(trained: Path, data: Path, config: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_here(common(data, trained, config, 2))
    assert stopped.value.code == 2 and "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_an_unfinished_checkpoint_never_counts_and_never_costs_an_old_one(tmp_path: Path) -> None:
    """diffusers' examples delete the oldest checkpoint before the new one is written."""

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    publish(tmp_path / "checkpoint-1", lambda folder: (folder / "state").write_text("x"))
    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "checkpoint-2", fails)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_old_checkpoints_are_pruned_to_the_limit(data: Path, config: Path, tmp_path: Path) -> None:
    assert train_here(common(data, tmp_path / "out", config, 8, checkpoints_total_limit=2)) == 0
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-8"]


def test_a_streamed_data_set_resumes_bit_for_bit(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = sorted(data.rglob("*.png"))
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": ["ab".index(file.parent.name) for file in files],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set/train.parquet")

    def stream(name: str, **options: object) -> list[str]:
        source = {"train_data_dir": None, "dataset_name": tmp_path / "set", "streaming": True}
        return common(data, tmp_path / name, config, 4, **source, **options)

    assert train_here(stream("whole")) == 0
    assert train_here(stream("part", stop_after_steps=2)) == 0
    assert train_here(stream("part", resume_from_checkpoint="latest")) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


# -- processes --


@pytest.mark.slow
def test_two_processes_are_one_with_a_doubled_batch(data: Path, config: Path, tmp_path: Path) -> None:
    """``accelerate launch --num_processes 2 --cpu -m diffusers_sde.train`` on 64 images, with sample sheets from both
    processes: the loss curve of one process with batch 8."""
    two = launch(common(data, tmp_path / "two", config, 6, num_validation_images=5), processes=2)
    said = two.communicate(timeout=300)[0]
    assert two.returncode == 0, said
    assert re.search(r"processes: +2", said)
    assert train_here(common(data, tmp_path / "one", config, 6, train_batch_size=8, num_validation_images=5)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_in_two_processes_is_said_once_and_by_no_launcher(config: Path, tmp_path: Path) -> None:
    process = launch(common(tmp_path / "missing", tmp_path / "out", config, 2, hub_token="hf_secret"), processes=2)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "Traceback" not in said and "hf_secret" not in said
    assert [line for line in said.splitlines() if "missing" in line] == [
        f"diffusers_sde.train: {tmp_path / 'missing'} does not exist: pass a folder of images or the name of a "
        "data set on the Hub."
    ]


@pytest.mark.parametrize(
    ("environment", "launcher", "expected"),
    [
        ({}, "python -m accelerate.commands.launch --num_processes 2 --cpu -m diffusers_sde.train", 2),
        ({}, "/x/bin/accelerate launch --cpu --num_processes 3 -m diffusers_sde.train --num_processes 9", 3),
        ({}, "/x/bin/accelerate-launch --cpu --num_processes 4 train.py", 4),
        ({"WORLD_SIZE": "2"}, "accelerate launch --num_processes 2 --cpu train.py", 1),
        ({"ACCELERATE_USE_CPU": "False"}, "accelerate launch --num_processes 2 train.py", 1),
        ({}, "bash train.sh", 1),
    ],
)
def test_processes_that_the_launcher_did_not_start_are_noticed(
    environment: dict[str, str], launcher: str, expected: int
) -> None:
    """Accelerate 1.15 starts one process for ``--cpu --num_processes 2`` and sets MASTER_PORT."""
    known = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", **environment}
    assert launching.requested_processes(known, launcher.split()) == expected


def test_the_learning_rate_follows_optimizer_steps_under_accumulation(data: Path, config: Path, tmp_path: Path) -> None:
    """diffusers' examples let Accelerate step the schedule once a process."""
    arguments = common(data, tmp_path / "out", config, 8, gradient_accumulation_steps=3, lr_scheduler="linear")
    assert train_here([*arguments, "--lr_warmup_steps", "0"]) == 0
    rates = [float(line.split(",")[2]) for line in (tmp_path / "out/loss.csv").read_text().splitlines()[1:]]
    assert rates == pytest.approx([1e-3 * (1 - k / 8) for k in range(8)], rel=1e-4)


# -- results --


def run_snippet(output: Path) -> dict:
    """Run the code of a model card."""
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    namespace: dict = {"noisy_images": torch.zeros(2, 1, 16, 16), "timesteps": torch.tensor([5.0, 9.0])}
    with contextlib.chdir(output.parent):
        exec(code, namespace)
    return namespace


def test_the_result_is_a_stock_pipeline_with_card_curve_and_samples(data: Path, config: Path, tmp_path: Path) -> None:
    arguments = common(data, tmp_path / "out", config, 4, num_validation_images=4, validation_inference_steps=3)
    assert train_here([*arguments, "--report_to", "tensorboard", "--save_precision", "fp16"]) == 0
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.unet.config.num_class_embeds == 3
    assert load_file(tmp_path / "out" / WEIGHTS)["conv_in.weight"].dtype == torch.float16
    text = (tmp_path / "out/README.md").read_text()
    assert "accelerate launch --quiet -m diffusers_sde.train --train_data_dir" in text
    for name in ("samples.png", "loss.png", "loss.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0 and (name == "loss.csv" or name in text)
    assert list((tmp_path / "out/logs").rglob("events.out.tfevents*"))
    namespace = run_snippet(tmp_path / "out")
    assert namespace["pipe"].class_names == ["a", "b"]
    assert [image.size for image in namespace["images"]] == [(16, 16)] * 2
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("path", "kind", "scheduler"),
    [
        ("vp", "epsilon", DDPMScheduler),
        ("cosine", "v_prediction", DDPMScheduler),
        ("flow", "flow_prediction", FlowMatchEulerDiscreteScheduler),
        ("edm", "epsilon", diffusers.EDMEulerScheduler),
        ("ve", "score", diffusers_sde.ProbabilityFlowScheduler),
        ("vp", "flow_prediction", diffusers_sde.ProbabilityFlowScheduler),
    ],
)
def test_every_path_trains_and_is_saved_with_its_process(
    data: Path, config: Path, tmp_path: Path, path: str, kind: str, scheduler: type
) -> None:
    arguments = common(data, tmp_path / "out", config, 2, path=path, prediction_type=kind, num_validation_images=2)
    assert train_here([*arguments, "--validation_inference_steps", "3"]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler) is scheduler
    ours = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    assert ours.config.prediction_type == kind


def test_training_lowers_the_loss(data: Path, config: Path, tmp_path: Path) -> None:
    arguments = common(data, tmp_path / "out", config, 60, train_batch_size=16, checkpointing_steps=60)
    assert train_here([*arguments, "--learning_rate", "3e-3", "--time_sampling", "stratified"]) == 0
    curve = list(losses(tmp_path / "out").values())
    assert sum(curve[-10:]) < 0.6 * sum(curve[:10])


def test_fine_tuning_the_embedded_model_lowers_its_loss_on_a_few_images(tmp_path: Path) -> None:
    """16 images of bars in ten classes' folders, which Fashion-MNIST has none of."""
    source = make_images(tmp_path / "bars", 16, 32)
    names = [f"{i}" for i in range(10)]
    for i, file in enumerate(sorted(source.rglob("*.png"))):
        target = tmp_path / "data" / names[i % 10] / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    model = tmp_path / "model"
    load_fashion_model().save_pretrained(model)
    arguments = common(tmp_path / "data", tmp_path / "out", None, 12, pretrained_model_name_or_path=model)
    assert train_here([*arguments, "--train_batch_size", "16", "--time_sampling", "stratified"]) == 0
    curve = list(losses(tmp_path / "out").values())
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])


@pytest.mark.parametrize(
    ("steps", "words", "expected"),
    [
        (6, "", 0),
        (60, "", 6),
        (10_000, "", 500),
        (60, "--lr_warmup_steps 20", 20),
        (6, "--lr_warmup_steps 500", 500),
    ],
)
def test_the_warm_up_is_a_tenth_of_a_short_training_or_what_was_said_with_a_warning(
    steps: int, words: str, expected: int
) -> None:
    settings = read_settings(f"--train_data_dir d --output_dir o --max_train_steps {steps} {words}".split())
    length = training_length(settings, range(100), 1)
    assert length.warm_up == expected
    assert ("never reached: pass fewer as --lr_warmup_steps" in describe_rate(settings, length)) == (expected > steps)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("objective", ["consistency", "mean_flow"])
def test_a_flow_map_is_distilled_and_sampled_in_one_two_and_four_steps(
    data: Path, trained: Path, tmp_path: Path, objective: str, teacher: bool
) -> None:
    options: dict[str, object] = {"pretrained_model_name_or_path": trained, "objective": objective}
    if teacher:
        options |= {"teacher_model_name_or_path": trained, "guidance_scale": 2.0}
    assert train_here(common(data, tmp_path / "out", None, 3, num_validation_images=2, **options)) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    scheduler = pipe.scheduler
    assert isinstance(scheduler, diffusers_sde.FlowMapScheduler) and scheduler.config.flow_map == objective
    for steps in (1, 2, 4):
        scheduler.set_timesteps(steps)
        x, labels = torch.randn(2, 1, 16, 16), torch.tensor([0, 1])
        for t in scheduler.timesteps:
            target = {"target_timestep": scheduler.target_timestep(t)} if objective == "mean_flow" else {}
            x = scheduler.step(pipe.unet(x, t, labels, **target).sample.detach(), t, x).prev_sample
        assert x.isfinite().all()
    assert len(run_snippet(tmp_path / "out")["images"]) == 2


def test_a_noisy_classifier_learns_the_labels(data: Path, trained: Path, tmp_path: Path) -> None:
    arguments = common(data, tmp_path / "out", None, 60, objective="classifier", pretrained_model_name_or_path=trained)
    options = "--train_batch_size 16 --learning_rate 3e-3 --time_sampling logit_normal --time_mean -2"
    assert train_here([*arguments, *options.split()]) == 0
    classifier = diffusers_sde.NoisyClassifierModel.from_pretrained(tmp_path / "out").eval()
    images = load_images(data, resolution=16, channels=1)
    items = [images.item(i, 0) for i in range(len(images))]
    with torch.no_grad():
        logits = classifier(torch.stack([item["pixel_values"] for item in items]), 20.0)
    right = logits.argmax(1) == torch.tensor([item["class_labels"] for item in items])
    assert right.float().mean() > 0.9
    assert run_snippet(tmp_path / "out")["logits"].shape == (2, 2)


def test_the_result_is_uploaded_without_checkpoints_and_logs(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict = {}

    class Hub:
        def __init__(self, token: str | None):
            seen["token"] = token

        def create_repo(self, name: str, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> None:
            files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
            kept = [f for f in files if not any(fnmatch(f, pattern) for pattern in ignore_patterns)]
            seen.update(repo_id=repo_id, kept=sorted(kept))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    arguments = common(
        data, tmp_path / "out", config, 2, push_to_hub=True, hub_token="hf_secret", num_validation_images=2
    )
    assert train_here([*arguments, "--report_to", "tensorboard", "--validation_inference_steps", "2"]) == 0
    assert seen["repo_id"] == "me/out" and seen["token"] == "hf_secret"
    assert {"README.md", "loss.csv", "loss.png", "model_index.json", "samples.png", WEIGHTS} <= set(seen["kept"])
    assert not any(name.startswith(("checkpoint", "logs", ".")) for name in seen["kept"])
    assert not any("hf_secret" in (tmp_path / "out" / name).read_text(errors="ignore") for name in seen["kept"])


def test_a_push_that_fails_says_where_the_model_is_and_how_to_push_it_later(
    data: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to\nhuggingface.co")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    options = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": "hf_secret"}
    assert train_here(common(data, tmp_path / "out", config, 2, **options)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"is saved in {tmp_path / 'out'}" in said and "no route to huggingface.co" in said
    assert f"`hf upload me/model {tmp_path / 'out'} . --exclude 'checkpoint-*/**'" in said and "hf_secret" not in said
    assert DDPMPipeline.from_pretrained(tmp_path / "out")


def test_the_metadata_of_a_card_are_yaml_and_name_only_models_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a: b").mkdir()
    values = {"name": '"t"', "condition": ""}
    what = {"title": "t", "what": "w", "facts": {}, "command": "c", "kind": "lora", "values": values}
    for base, named in (("me/model: one", "me/model: one"), (f"{tmp_path}/a: b", None), ("fashion_mnist", None)):
        card.write_card(tmp_path, **what, base_model=base)
        text = (tmp_path / "README.md").read_text()
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata.get("base_model") == named and metadata["tags"] == ["diffusers", "diffusers_sde", "lora"]
        assert f'from_pretrained("{base}")' in text


# -- refusals --


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_named(
    data: Path, config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = command.make_loss

    def breaks(*args, **kwargs):
        loss, calls = make(*args, **kwargs), []

        def later(network, batch):
            calls.extend([1] * network.training)  # of steps, not of checks
            return loss(network, batch) * (float("nan") if len(calls) > 5 else 1.0)

        return later

    monkeypatch.setattr(command, "make_loss", breaks)
    assert train_here(common(data, tmp_path / "out", config, 8)) == 1
    said = capsys.readouterr().err
    assert "The loss is nan at step 6" in said and f"checkpoint is {tmp_path / 'out/checkpoint-4'}" in said
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(data: Path, config: Path, tmp_path: Path, capsys) -> None:
    arguments = common(data, tmp_path / "out", config, 8, dry_run=True, gradient_accumulation_steps=2)
    assert train_here(arguments) == 0
    said = capsys.readouterr().out
    assert "64 images, 2 classes" in said and "8 optimizer steps of 4 x 2 images (1.0 epochs)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ("", "--train_data_dir"),
        ("--train_data_dir d --dataset_name e", "either --train_data_dir"),
        ("--dataset_name e --streaming", "--max_train_steps"),
        ("--train_data_dir d --snr_gamma 5 --loss_weighting edm", "leave out one"),
        ("--train_data_dir d --rank 4", "--pretrained_model_name_or_path"),
        ("--train_data_dir d --pretrained_model_name_or_path m --path vp", "leave out --path"),
        ("--train_data_dir d --train_batch_size 0", "must be positive"),
        ("--train_data_dir d --label_dropout 1", "label_dropout"),
        ("--train_data_dir d --use_ema --ema_sigma_rel 0.5", "ema_sigma_rel"),
        ("--train_data_dir d --teacher_model_name_or_path m", "consistency"),
        ("--train_data_dir d --objective consistency --guidance_scale 3", "--teacher_model_name_or_path"),
        ("--train_data_dir d --objective classifier --model_config c", "leave out --rank"),
    ],
)
def test_contradictory_arguments_get_one_sentence_with_the_remedy(
    arguments: str, remedy: str, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--output_dir", str(tmp_path / "out"), *arguments.split()])
    problem = capsys.readouterr().err
    assert stop.value.code == 2 and remedy in problem and problem.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"path": "flow", "prediction_type": "epsilon"}, "flow_prediction"),
        ({"loss_weighting": "likelihood", "loss": "huber"}, "--loss l2"),
        ({"model_config": "missing.json"}, "does not exist"),
        ({"train_data_dir": "missing"}, "check the name"),
        ({"cache_latents": True}, "leave it out"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, "pass another --hub_model_id"),
        ({"objective": "mean_flow", "teacher_model_name_or_path": "missing"}, "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    data: Path, config: Path, tmp_path: Path, capsys, options: dict[str, object], remedy: str
) -> None:
    assert train_here(common(data, tmp_path / "out", config, 2, **options)) == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_readme_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them runs in a small form in this file or in test_training_networks.py."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"`(?:T|accelerate launch .*?-m diffusers_sde\.train) (--.*?)`", readme)
    assert len(commands) >= 6
    for line in commands:
        assert read_settings(line.split()).output_dir, line
