"""From the command line to :class:`.settings.Settings`: defaults that follow from other settings, and what does not
go together, refused before any work is done.

Knows what the settings may be whatever the model and the data are; what needs those is checked where they are known.
Imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers_sde.errors import UsageError
from diffusers_sde.training.settings import Settings, build_parser

FLOW_MAPS = ("consistency", "mean_flow")
TEXT = ("masked", "embedding")  # the objectives of text
TAUGHT = (*FLOW_MAPS, "rectification")  # the objectives that a teacher serves


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """Parse, complete and check; wrong arguments end the program with one sentence and status 2."""
    parser = build_parser()
    try:
        return make_settings(vars(parser.parse_args(argv)))
    except UsageError as error:
        parser.error(str(error))


def make_settings(values: dict[str, Any]) -> Settings:
    """Complete and checked settings from the values of the command line, None where nothing was given.

    Raises:
        UsageError: for what does not go together, see :func:`check`.
    """
    weighting, gamma = values["loss_weighting"], values["snr_gamma"]
    if gamma is not None and weighting not in (None, "min_snr", "soft_min_snr"):
        raise UsageError(f"--snr_gamma has no meaning for --loss_weighting {weighting}: leave out one of them.")
    lognormal = values["time_sampling"] == "lognormal"
    defaults = {
        "loss_weighting": "none" if gamma is None else "min_snr",
        "snr_gamma": 5.0,
        "time_mean": -1.2 if lognormal else 0.0,
        "time_std": 1.2 if lognormal else 1.0,
        "validation_inference_steps": {**dict.fromkeys(FLOW_MAPS, 4), "masked": 64}.get(values["objective"], 20),
    }
    settings = Settings(**{**values, **{name: value for name, value in defaults.items() if values[name] is None}})
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise ``UsageError``, a sentence with the remedy, for settings that are wrong whatever the model and the data
    are."""
    if problem := find_problem(settings):
        raise UsageError(problem)


def find_problem(settings: Settings) -> str | None:
    """What is wrong with the settings by themselves: a sentence with the remedy, or None."""
    sources = [s for s in (settings.train_data_dir, settings.dataset_name) if s is not None]
    if len(sources) != 1 and not (settings.rewarded and not sources):
        return "pass either --train_data_dir, a folder of images, or --dataset_name, a data set of the Hub."
    if settings.streaming and settings.max_train_steps is None:
        return "a streamed data set has no known length: pass --max_train_steps."
    if settings.streaming and settings.train_data_dir is not None:
        return "--streaming is for --dataset_name; a folder is read as it is needed anyway: leave it out."
    if settings.model_config and settings.pretrained_model_name_or_path:
        return "pass either --model_config, for a new network, or --pretrained_model_name_or_path."
    if settings.rank is not None and not settings.pretrained_model_name_or_path:
        return "--rank adds LoRA adapters to a pretrained network: pass --pretrained_model_name_or_path."
    if settings.path != "from_model" and settings.pretrained_model_name_or_path:
        return "a pretrained network keeps its process: leave out --path (or train a new network)."
    distilled = settings.teacher_model_name_or_path is not None
    if distilled and settings.objective not in TAUGHT:
        return (
            "--teacher_model_name_or_path is for --objective consistency, mean_flow and rectification: leave out one "
            "of them."
        )
    if settings.objective == "rectification" and not distilled:
        return "--objective rectification straightens the ODE of a teacher: pass --teacher_model_name_or_path."
    if settings.guidance_scale != 1.0 and not distilled and not settings.rewarded:
        return "--guidance_scale builds the guidance of a teacher into its student: pass --teacher_model_name_or_path."
    if settings.objective == "classifier" and (settings.rank is not None or settings.model_config):
        return "--objective classifier trains a small network of its own: leave out --rank and --model_config."
    return (
        find_wrong_autoencoder(settings)
        or find_wrong_language(settings)
        or find_wrong_text_model(settings)
        or find_wrong_reward(settings)
        or find_wrong_number(settings)
        or find_wrong_output(settings)
    )


def find_wrong_autoencoder(settings: Settings) -> str | None:
    """What does not go together with ``--objective autoencoder``, or goes only with it."""
    if settings.objective != "autoencoder":
        if settings.num_held_out_images and settings.objective not in TEXT:
            return "--num_held_out_images is for --objective autoencoder, masked and embedding: leave it out."
        return None
    process = {
        "--path": settings.path != "from_model",
        "--prediction_type": settings.prediction_type is not None,
        "--loss_weighting": settings.loss_weighting != "none",
        "--time_sampling": settings.time_sampling != "uniform",
    }
    for name, given in process.items():
        if given:
            return f"an autoencoder has no forward process: leave out {name}."
    model = {
        "--pretrained_model_name_or_path": settings.pretrained_model_name_or_path,
        "--vae_model_name_or_path": settings.vae_model_name_or_path,
        "--rank": settings.rank,
        "--train_text_encoder": settings.train_text_encoder or None,
        "--cache_latents": settings.cache_latents or None,
        "--streaming": settings.streaming or None,
    }
    for name, value in model.items():
        if value is not None:
            return f"--objective autoencoder trains a new autoencoder on images: leave out {name}."
    return None


def find_wrong_language(settings: Settings) -> str | None:
    """What does not go together with an objective of text, or goes only with one."""
    own = {
        "--tokenizer_name_or_path": settings.tokenizer_name_or_path,
        "--prefix_column": settings.prefix_column,
    }
    if settings.objective not in TEXT:
        first = next((name for name, value in own.items() if value is not None), None)
        return first and f"{first} is for --objective {' and '.join(TEXT)}: leave it out."
    others = {
        "--vae_model_name_or_path": settings.vae_model_name_or_path,
        "--train_text_encoder": settings.train_text_encoder or None,
        "--rank": settings.rank,
        "--resolution": settings.resolution,
        "--cache_latents": settings.cache_latents or None,
        "--streaming": settings.streaming or None,
    }
    for name, value in others.items():
        if value is not None:
            return f"--objective {settings.objective} trains a model of text: leave out {name}."
    if settings.pretrained_model_name_or_path and settings.tokenizer_name_or_path:
        return "a pretrained model keeps its tokenizer: leave out --tokenizer_name_or_path."
    if settings.objective == "embedding" and (settings.pretrained_model_name_or_path or settings.prefix_column):
        return "--objective embedding trains a new network on whole texts: use --objective masked for the others."
    process = {
        "--path": settings.path != "from_model",
        "--prediction_type": settings.prediction_type is not None,
        "--loss_weighting": settings.loss_weighting != "none",
        "--loss": settings.loss != "l2",
        "--time_sampling (but stratified)": settings.time_sampling not in ("uniform", "stratified"),
    }
    for name, given in process.items():
        if given and settings.objective == "masked":
            return f"the bound of masked text is the same for every process and weighting: leave out {name}."
    return None


def find_wrong_text_model(settings: Settings) -> str | None:
    """What does not go together with a new text-to-image model or the training of a text encoder."""
    if settings.vae_model_name_or_path and settings.pretrained_model_name_or_path:
        return "a pretrained pipeline keeps its autoencoder: leave out --vae_model_name_or_path."
    if settings.vae_model_name_or_path and not settings.train_text_encoder:
        return "a new text-to-image model starts with an untrained text encoder: pass --train_text_encoder too."
    if settings.train_text_encoder and not (settings.vae_model_name_or_path or settings.pretrained_model_name_or_path):
        return (
            "--train_text_encoder needs a text-to-image model: pass --pretrained_model_name_or_path, or "
            "--vae_model_name_or_path for a new one."
        )
    if settings.train_text_encoder and settings.objective != "denoising":
        return f"--train_text_encoder is for --objective denoising, not {settings.objective}: leave it out."
    return None


def find_wrong_reward(settings: Settings) -> str | None:
    """What does not go together with an objective that learns from rewards, or goes only with one."""
    if not settings.rewarded:
        for name, given in {"--reward": settings.reward, "--prompt_file": settings.prompt_file}.items():
            if given is not None:
                return f"{name} is for --objective grpo, adjoint_matching and nft: leave it out, or choose one of them."
        return None
    kind, batch, group = settings.objective, settings.train_batch_size, settings.group_size
    if not settings.reward:
        return f"--objective {kind} needs something to learn from: pass --reward."
    if settings.reward_weights is not None and len(settings.reward_weights) != len(settings.reward):
        return f"--reward_weights has {len(settings.reward_weights)} numbers for {len(settings.reward)} rewards."
    if not settings.pretrained_model_name_or_path:
        return f"--objective {kind} fine-tunes a model: pass --pretrained_model_name_or_path."
    if settings.max_train_steps is None:
        return f"--objective {kind} makes its own pictures and has no epochs: pass --max_train_steps."
    if settings.streaming or settings.cache_latents:
        return f"--objective {kind} reads no pictures: leave out --streaming and --cache_latents."
    if settings.prompt_file and settings.data_source:
        return "pass either --prompt_file or data whose captions are the prompts."
    if settings.prompt_file and not Path(settings.prompt_file).is_file():
        return f"--prompt_file {settings.prompt_file} does not exist: pass a text file with one prompt a line."
    if kind != "adjoint_matching" and batch % group:
        return (
            f"--train_batch_size {batch} would split groups of {group}: pass a multiple of --group_size, of which "
            "every process makes whole groups."
        )
    if kind != "adjoint_matching" and group < 2:
        return "--group_size must be at least 2: pictures are compared with others of their group."
    if kind == "adjoint_matching" and settings.rollout_tau not in (None, 1.0):
        return "adjoint matching is biased unless the rollout forgets its first noise: leave out --rollout_tau."
    if kind == "grpo" and settings.rollout_tau == 0:
        return "grpo learns from noise that the rollout draws: pass a positive --rollout_tau."
    if kind == "nft" and settings.guidance_scale != 1.0:
        return "nft trains the network as it is sampled, without guidance: leave out --guidance_scale."
    if kind != "nft" and settings.parts > settings.stochastic_steps:
        return (
            f"only {settings.stochastic_steps} steps of the rollout draw noise: pass a smaller --window_size or more "
            "--rollout_steps."
        )
    if kind != "nft" and settings.stochastic_steps < 1:
        return "a rollout of one step draws no noise to learn from: pass more --rollout_steps."
    for name in ("max_train_steps", "checkpointing_steps", "stop_after_steps", "validation_steps"):
        if (getattr(settings, name) or 0) % settings.updates_per_rollout:
            return f"--{name} must be a multiple of --updates_per_rollout, between whose steps a rollout is in use."
    return None


def find_wrong_number(settings: Settings) -> str | None:
    """What is wrong with a number by itself."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata["positive"] and value is not None and not value > 0:
            return f"--{field.name} must be positive, not {value}."
    if not 0 <= settings.label_dropout < 1:
        return f"--label_dropout is a share in [0, 1), not {settings.label_dropout}."
    if settings.use_ema and not 0 < settings.ema_sigma_rel <= 0.288:
        return f"--ema_sigma_rel must be in (0, 0.288], not {settings.ema_sigma_rel}."
    for name in (
        "num_validation_images",
        "num_held_out_images",
        "dataloader_num_workers",
        "sharpness_weight",
        "kl_weight",
        "kl_coefficient",
        "rollout_data_std",
    ):
        if getattr(settings, name) < 0:
            return f"--{name} cannot be negative."
    if settings.objective == "adjoint_matching" and settings.kl_coefficient == 0:
        return "--kl_coefficient must be positive for adjoint matching, whose target it divides."
    if settings.rollout_tau is not None and not 0 <= settings.rollout_tau <= 4:
        return f"--rollout_tau must be a number from 0 to 4, not {settings.rollout_tau:g}."
    if settings.lr_warmup_steps is not None and settings.lr_warmup_steps < 0:
        return "--lr_warmup_steps cannot be negative."
    return None


def find_wrong_output(settings: Settings) -> str | None:
    """What keeps the tracker or the output folder from being used."""
    tracker = settings.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        return f"--report_to {tracker} needs that package: pip install {tracker}, or --report_to none."
    output = Path(settings.output_dir)
    if output.exists() and not output.is_dir():
        return f"--output_dir {output} is a file: pass a folder."
    results = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")
    holds = any((output / name).exists() for name in results) or any(output.glob("checkpoint-*"))
    if holds and not settings.resume_from_checkpoint and not settings.dry_run:
        return (
            f"--output_dir {output} holds an earlier training: pass --resume_from_checkpoint latest to go on, "
            "or another folder."
        )
    return None
