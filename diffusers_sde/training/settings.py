"""The settings of a training: one frozen, typed object, and the command line that spells it.

Knows every setting's name (as in diffusers' examples), type, default and meaning; the argument parser is made from
them.  Knows neither tensors nor models: importing it costs nothing, so that help and wrong arguments are answered at
once.  What the settings may be together stands in :mod:`.arguments`.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from diffusers_sde.argument_parser import Formatter, Parser
from diffusers_sde.training.secrets import redact

# fmt: off
Objective = Literal[
    "denoising", "rectification", "consistency", "mean_flow", "classifier", "autoencoder", "masked", "embedding",
    "grpo", "adjoint_matching", "nft",
]
# fmt: on
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "score"]
ForwardPath = Literal["from_model", "vp", "scaled_linear", "cosine", "ve", "edm", "flow"]
LossWeighting = Literal["none", "min_snr", "soft_min_snr", "edm", "sigma_sqrt", "cosmap", "likelihood"]
TimeSampling = Literal["uniform", "logit_normal", "lognormal", "mode", "stratified"]
ErrorMeasure = Literal["l2", "huber"]
MixedPrecision = Literal["no", "fp16", "bf16"]
SavePrecision = Literal["fp32", "fp16", "bf16"]
Tracker = Literal["tensorboard", "trackio", "wandb", "none"]
LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]

REWARDED = ("grpo", "adjoint_matching", "nft")  # the objectives that make their own pictures

LAUNCH = "accelerate launch --quiet -m diffusers_sde.train"  # quiet: no traceback of the launcher behind an error

MODEL = "model"
DATA = "data"
OBJECTIVE = "objective (independent axes of one regression)"
REWARD = "reward fine-tuning (objectives grpo, adjoint_matching, nft)"
OPTIMIZATION = "optimization"
OUTPUT = "output"
VALIDATION = "validation, sampled with this package's schedulers"


def option(group: str, default: Any, help: str | None = None, *, positive: bool = False, secret: bool = False) -> Any:
    """A field of :class:`Settings`.

    Args:
        group: heading of the help text.
        default: of the command line; None where the value is left out or follows from other settings.
        help: what the setting means, and what None means.
        positive: whether a value must be greater than 0.
        secret: whether nobody may be shown the value.
    """
    metadata = {"group": group, "help": help, "positive": positive, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a training was asked for, each field a command-line argument of the same name.

    Made by :func:`.arguments.read_settings`, which puts a value where a default follows from other settings.
    """

    pretrained_model_name_or_path: str | None = option(
        MODEL, None, "Hub id or folder of a pipeline to fine-tune. Default: a new network."
    )
    revision: str | None = option(MODEL, None, "Revision of the pretrained model.")
    variant: str | None = option(MODEL, None, "Variant of the pretrained model's files, for example fp16.")
    model_config: str | None = option(
        MODEL, None, "JSON file or folder: config of a new network. Default: one that fits --resolution."
    )
    vae_model_name_or_path: str | None = option(
        MODEL,
        None,
        "Autoencoder of a new text-to-image model (Stable Diffusion's pipeline), whose text encoder is new.",
    )
    train_text_encoder: bool = option(
        MODEL, False, "Train the text encoder with the network (with --rank: LoRA on it)."
    )
    rank: int | None = option(
        MODEL, None, "Rank of LoRA adapters (through peft); the network itself stays as it is.", positive=True
    )
    teacher_model_name_or_path: str | None = option(
        MODEL,
        None,
        "Pipeline to distil a flow map from (without it: consistency training), or whose ODE to rectify.",
    )

    train_data_dir: str | None = option(
        DATA,
        None,
        "Image folder: class sub-folders are labels; metadata.jsonl or .csv ('text') or text files have captions.",
    )
    dataset_name: str | None = option(DATA, None, "Hub id (or folder) of a data set, instead of --train_data_dir.")
    prompt_file: str | None = option(
        DATA, None, "Reward fine-tuning: text file, one prompt a line. Default: captions of the data, or all classes."
    )
    streaming: bool = option(DATA, False, "Stream the Hub data set; needs --max_train_steps.")
    image_column: str = option(DATA, "image", "Column of a Hub data set.")
    caption_column: str = option(DATA, "text", "Column of a Hub data set or of metadata.jsonl or .csv.")
    text_column: str = option(DATA, "text", "Text: column of a data set; of a folder with text files, those.")
    prefix_column: str | None = option(DATA, None, "Text: column of what stands before it and is given, as a prompt.")
    tokenizer_name_or_path: str | None = option(
        DATA, None, "Text: tokenizer of transformers. Default: one of the characters that the data has."
    )
    sequence_length: int = option(DATA, 128, "Text: tokens of a sequence.", positive=True)
    label_column: str = option(DATA, "label", "Column of a Hub data set.")
    resolution: int | None = option(
        DATA, None, "Side of the training images. Default: the model's, else 64.", positive=True
    )
    center_crop: bool = option(DATA, False, "Crop at the centre instead of anywhere.")
    random_flip: bool = option(DATA, False, "Flip half of the images horizontally.")
    cache_latents: bool = option(DATA, False, "Latent models: encode every image once, into --output_dir.")
    num_held_out_images: int = option(
        DATA, 0, "Autoencoders and text: images or sequences never trained on, to measure the result on."
    )
    dataloader_num_workers: int = option(DATA, 0, "Processes that read images; 0: the training process.")

    objective: Objective = option(OBJECTIVE, "denoising", "What to train.")
    prediction_type: PredictionType | None = option(
        OBJECTIVE, None, "Target. Default: the model's, else that of the path."
    )
    path: ForwardPath = option(
        OBJECTIVE,
        "from_model",
        "Forward process; from_model is vp for a new network, scaled_linear for a new latent one.",
    )
    loss_weighting: LossWeighting = option(OBJECTIVE, None, "Weight of each noise level. Default: none.")
    snr_gamma: float = option(
        OBJECTIVE, None, "Gamma of min_snr (which it implies) and soft_min_snr. Default: 5.", positive=True
    )
    time_sampling: TimeSampling = option(OBJECTIVE, "uniform", "Distribution of the training times.")
    time_mean: float = option(
        OBJECTIVE, None, "Mean of logit_normal (default 0) and of lognormal's log noise level (-1.2)."
    )
    time_std: float = option(OBJECTIVE, None, "Standard deviation of the same. Default: 1 and 1.2.", positive=True)
    loss: ErrorMeasure = option(OBJECTIVE, "l2", "Error measure.")
    huber_c: float = option(OBJECTIVE, 0.1, "Where Huber's loss turns linear.", positive=True)
    label_dropout: float = option(OBJECTIVE, 0.1, "Share of labels or captions dropped, for guidance.")
    distillation_steps: int = option(
        OBJECTIVE,
        40,
        "Flow maps: the two times matched are 1/N apart; rectification: steps of the teacher.",
        positive=True,
    )
    guidance_scale: float = option(
        OBJECTIVE,
        1.0,
        "Flow maps and rectification: guidance of the teacher; grpo and adjoint_matching: of the sampler that learns.",
    )

    sharpness_weight: float = option(OBJECTIVE, 1.0, "Autoencoders: weight of the error of edges and lines.")
    kl_weight: float = option(OBJECTIVE, 1e-4, "Autoencoders: weight of the latents' divergence from N(0, I).")

    reward: list[str] | None = option(
        REWARD,
        None,
        "One or several of module:function, file.py:function, agreement, brightness, saturation, symmetry: a function "
        "of pictures in [0, 1], prompts and labels, one number each.",
    )
    reward_weights: list[float] | None = option(REWARD, None, "A weight for each reward. Default: 1.")
    kl_coefficient: float = option(
        REWARD, 0.01, "Beta of the law p(x) exp(reward(x)/beta) that is learned: reward a nat away from the start."
    )
    rollout_steps: int = option(REWARD, 10, "Network evaluations of a rollout.", positive=True)
    rollout_tau: float | None = option(
        REWARD, None, "Noise level of the rollouts. Default: 1, which forgets the first noise; 0 (ODE) for nft."
    )
    rollout_data_std: float = option(
        REWARD, 0.0, "Data scale of the rollouts' steps: exact in law for normal data of this scale; 0: DDPM's steps."
    )
    group_size: int = option(REWARD, 8, "Pictures of one prompt or class, compared with each other.", positive=True)
    window_size: int | None = option(
        REWARD,
        None,
        "Steps of a rollout that are trained (nft: noised states of a picture); the window moves on by one each "
        "rollout, and of grpo only its steps draw noise. Default: all.",
        positive=True,
    )
    updates_per_rollout: int = option(REWARD, 1, "Optimizer steps on the pictures of one rollout.", positive=True)
    clip_range: float = option(REWARD, 0.2, "grpo: how far from 1 a likelihood ratio is followed.", positive=True)

    train_batch_size: int = option(OPTIMIZATION, 16, "Images per step and process.", positive=True)
    max_train_steps: int | None = option(
        OPTIMIZATION, None, "Optimizer steps. Default: from --num_train_epochs.", positive=True
    )
    num_train_epochs: int = option(
        OPTIMIZATION, 100, "Passes over the data if --max_train_steps is not given.", positive=True
    )
    gradient_accumulation_steps: int = option(OPTIMIZATION, 1, "Batches per optimizer step.", positive=True)
    learning_rate: float = option(OPTIMIZATION, 1e-4, positive=True)
    lr_scheduler: LearningRateSchedule = option(
        OPTIMIZATION, "cosine", "A schedule of diffusers.optimization, by optimizer steps."
    )
    lr_warmup_steps: int | None = option(
        OPTIMIZATION, None, "Optimizer steps of warm-up. Default: 500, at most a tenth of the training."
    )
    adam_beta1: float = option(OPTIMIZATION, 0.9)
    adam_beta2: float = option(OPTIMIZATION, 0.99)
    adam_weight_decay: float = option(OPTIMIZATION, 0.01)
    adam_epsilon: float = option(OPTIMIZATION, 1e-8)
    max_grad_norm: float = option(OPTIMIZATION, 1.0, positive=True)
    mixed_precision: MixedPrecision | None = option(OPTIMIZATION, None, "Default: as set by accelerate config.")
    gradient_checkpointing: bool = option(OPTIMIZATION, False, "Less memory, more time.")
    use_ema: bool = option(OPTIMIZATION, False, "Average the weights; the average is what is saved and validated.")
    ema_sigma_rel: float = option(OPTIMIZATION, 0.1, "Relative width of the average's power-function profile.")
    seed: int = option(OPTIMIZATION, 0, "Everything random follows from it.")

    output_dir: str = option(
        OUTPUT, dataclasses.MISSING, "Gets the model, its card, the loss curve, checkpoints and samples."
    )
    checkpointing_steps: int = option(OUTPUT, 500, "Optimizer steps between checkpoints.", positive=True)
    checkpoints_total_limit: int | None = option(OUTPUT, None, "Checkpoints to keep. Default: all.", positive=True)
    resume_from_checkpoint: str | None = option(
        OUTPUT, None, "'latest' or a checkpoint; what it cannot find is an error."
    )
    stop_after_steps: int | None = option(
        OUTPUT, None, "Sitting: checkpoint and stop after so many more steps.", positive=True
    )
    save_precision: SavePrecision = option(OUTPUT, "fp32", "Of the final weights.")
    logging_steps: int = option(OUTPUT, 10, "Optimizer steps between lines of the tracker.", positive=True)
    logging_dir: str = option(OUTPUT, "logs", "Tracker's folder inside --output_dir.")
    report_to: Tracker = option(OUTPUT, "tensorboard", "Tracker of loss, learning rate and samples.")
    push_to_hub: bool = option(OUTPUT, False, "Upload the result.")
    hub_model_id: str | None = option(OUTPUT, None, "Repository to upload to. Default: the name of --output_dir.")
    hub_token: str | None = option(OUTPUT, None, "Default: the one of hf auth login.", secret=True)
    dry_run: bool = option(OUTPUT, False, "Print the resolved plan and stop.")

    validation_steps: int | None = option(
        VALIDATION, None, "Optimizer steps between sample sheets. Default: only at the end.", positive=True
    )
    validation_prompts: list[str] | None = option(VALIDATION, None, "Prompts of a text-to-image model.")
    num_validation_images: int = option(VALIDATION, 20, "Images per sheet (or texts), always the same noise; 0: none.")
    validation_inference_steps: int = option(
        VALIDATION, None, "Default: 20, 4 for flow maps, 64 for masked text.", positive=True
    )
    validation_guidance_scale: float = option(VALIDATION, 2.0, "Of conditional models.")

    @property
    def data_source(self) -> str:
        """The image folder, or the name of the data set."""
        return self.train_data_dir or self.dataset_name or ""

    @property
    def rewarded(self) -> bool:
        """Whether the network learns from the rewards of its own pictures."""
        return self.objective in REWARDED

    @property
    def stochastic_steps(self) -> int:
        """How many steps of a rollout draw noise if all may: without a data scale the last one returns x_0."""
        return self.rollout_steps - (self.rollout_data_std == 0)

    @property
    def parts(self) -> int:
        """How many losses a batch has, one after the other."""
        if not self.rewarded:
            return 1
        return self.window_size or (self.rollout_steps if self.objective == "nft" else self.stochastic_steps)

    @property
    def axes(self) -> str:
        """The objective in words."""
        if self.rewarded:
            weights = self.reward_weights or [1.0] * len(self.reward or [])
            rewards = " + ".join(f"{w:g} {name}" for w, name in zip(weights, self.reward or [], strict=True))
            return f"{self.objective}, reward {rewards}, KL coefficient {self.kl_coefficient:g}"
        if self.objective == "autoencoder":
            return f"autoencoder, loss {self.loss}, sharpness {self.sharpness_weight}, KL {self.kl_weight}"
        if self.objective == "masked":
            return f"masked, any-order bound, numbers of masks {self.time_sampling}"
        return f"{self.objective}, weighting {self.loss_weighting}, times {self.time_sampling}, loss {self.loss}"

    def public(self) -> dict[str, Any]:
        """The settings that trackers may show: single numbers and words, without secrets."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["secret"]}
        words = {name: self.redacted(value) if isinstance(value, str) else value for name, value in shown.items()}
        return {name: value for name, value in words.items() if isinstance(value, int | float | str)}

    def redacted(self, text: str) -> str:
        """``text`` without secrets, those of the settings and any others."""
        return redact(text, *(getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["secret"]))


def build_parser() -> argparse.ArgumentParser:
    """The command line: an argument for each field of :class:`Settings`, of its type, default and choices."""
    parser = Parser(
        prog=LAUNCH,
        description="Train, fine-tune, LoRA-tune or distil a diffusion or flow model.",
        formatter_class=Formatter,
    )
    hints = typing.get_type_hints(Settings)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(f"--{field.name}", help=field.metadata["help"], **_argument(field, hints[field.name]))
    return parser


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """The keywords of ``add_argument`` for a field of this type."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": "store_true"}
    keywords: dict[str, Any] = (
        {"required": True} if field.default is dataclasses.MISSING else {"default": field.default}
    )
    if get_origin(hint) is Literal:
        return {**keywords, "choices": get_args(hint)}
    if get_origin(hint) is list:
        return {**keywords, "type": get_args(hint)[0], "nargs": "+"}
    return {**keywords, "type": hint}
