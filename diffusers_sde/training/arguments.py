"""The arguments of the training script: names as in diffusers' examples, checked before any work is done.

Knows argparse and what each argument may be by itself; what needs the model or the data is checked where they are
known.  Knows no tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from diffusers_sde.cli import Formatter, Parser
from diffusers_sde.prediction import PREDICTION_TYPES
from diffusers_sde.training.networks import PATHS
from diffusers_sde.training.objectives import LOSS_WEIGHTINGS, LOSSES, TIME_SAMPLINGS

OBJECTIVES = ("denoising", "consistency", "mean_flow", "classifier")
TRACKERS = ("tensorboard", "trackio", "wandb", "none")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="accelerate launch -m diffusers_sde.train",
        description="Train, fine-tune, LoRA-tune or distil a diffusion or flow model.",
        formatter_class=Formatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="Hub id or folder of a pipeline to fine-tune. Default: a new network.")
    add("--revision", help="Revision of the pretrained model.")
    add("--variant", help="Variant of the pretrained model's files, for example fp16.")
    add("--model_config", help="JSON file or folder: config of a new network. Default: one that fits --resolution.")
    add("--rank", type=int, help="Rank of LoRA adapters (through peft); the network itself stays as it is.")
    add("--teacher_model_name_or_path", help="Pipeline to distil a flow map from; without it: consistency training.")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="Image folder: class sub-folders are labels, a metadata.jsonl has captions ('text').")
    add("--dataset_name", help="Hub id (or folder) of a data set, instead of --train_data_dir.")
    add("--streaming", action="store_true", help="Stream the Hub data set; needs --max_train_steps.")
    add("--image_column", default="image", help="Column of a Hub data set.")
    add("--caption_column", default="text", help="Column of a Hub data set or key of metadata.jsonl.")
    add("--label_column", default="label", help="Column of a Hub data set.")
    add("--resolution", type=int, help="Side of the training images. Default: the model's, else 64.")
    add("--center_crop", action="store_true", help="Crop at the centre instead of anywhere.")
    add("--random_flip", action="store_true", help="Flip half of the images horizontally.")
    add("--cache_latents", action="store_true", help="Latent models: encode every image once, into --output_dir.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read images; 0: the training process.")

    add = parser.add_argument_group("objective (independent axes of one regression)").add_argument
    add("--objective", choices=OBJECTIVES, default="denoising", help="What to train.")
    add("--prediction_type", choices=PREDICTION_TYPES, help="Target. Default: the model's, else that of the path.")
    add("--path", choices=PATHS, default="from_model", help="Forward process; from_model is vp for a new network.")
    add("--loss_weighting", choices=LOSS_WEIGHTINGS, help="Weight of each noise level. Default: none.")
    add("--snr_gamma", type=float, help="Gamma of min_snr (which it implies) and soft_min_snr. Default: 5.")
    add("--time_sampling", choices=TIME_SAMPLINGS, default="uniform", help="Distribution of the training times.")
    add("--time_mean", type=float, help="Mean of logit_normal (default 0) and of lognormal's log noise level (-1.2).")
    add("--time_std", type=float, help="Standard deviation of the same. Default: 1 and 1.2.")
    add("--loss", choices=LOSSES, default="l2", help="Error measure.")
    add("--huber_c", type=float, default=0.1, help="Where Huber's loss turns linear.")
    add("--label_dropout", type=float, default=0.1, help="Share of labels or captions dropped, for guidance.")
    add("--distillation_steps", type=int, default=40, help="Flow maps: the two times matched are 1/N apart.")
    add("--guidance_scale", type=float, default=1.0, help="Flow maps: guidance of the teacher.")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=16, help="Images per step and process.")
    add("--max_train_steps", type=int, help="Optimizer steps. Default: from --num_train_epochs.")
    add("--num_train_epochs", type=int, default=100, help="Passes over the data if --max_train_steps is not given.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step.")
    add("--learning_rate", type=float, default=1e-4)
    add("--lr_scheduler", default="cosine", help="A schedule of diffusers.optimization, by optimizer steps.")
    add("--lr_warmup_steps", type=int, default=500, help="Optimizer steps of warm-up.")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.99)
    add("--adam_weight_decay", type=float, default=0.01)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: as set by accelerate config.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    add("--use_ema", action="store_true", help="Average the weights; the average is what is saved and validated.")
    add("--ema_sigma_rel", type=float, default=0.1, help="Relative width of the average's power-function profile.")
    add("--seed", type=int, default=0, help="Everything random follows from it.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="Gets the model, its card, the loss curve, checkpoints and samples.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep. Default: all.")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint; what it cannot find is an error.")
    add("--stop_after_steps", type=int, help="Sitting: checkpoint and stop after so many more steps.")
    add("--save_precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="Of the final weights.")
    add("--logging_steps", type=int, default=10, help="Optimizer steps between lines of the tracker.")
    add("--logging_dir", default="logs", help="Tracker's folder inside --output_dir.")
    add("--report_to", choices=TRACKERS, default="tensorboard")
    add("--push_to_hub", action="store_true", help="Upload the result.")
    add("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")
    add("--hub_token", help="Default: the one of hf auth login.")
    add("--dry_run", action="store_true", help="Print the resolved plan and stop.")

    add = parser.add_argument_group("validation, sampled with this package's schedulers").add_argument
    add("--validation_steps", type=int, help="Optimizer steps between sample sheets. Default: only at the end.")
    add("--validation_prompts", nargs="+", help="Prompts of a text-to-image model.")
    add("--num_validation_images", type=int, default=20, help="Images per sheet, always the same noise; 0: no sheets.")
    add("--validation_inference_steps", type=int, help="Default: 20, 4 for flow maps.")
    add("--validation_guidance_scale", type=float, default=2.0, help="Of conditional models.")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check; wrong arguments end the program with one sentence and status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if problem := find_problem(args):
        parser.error(problem)
    if args.snr_gamma is not None and args.loss_weighting is None:
        args.loss_weighting = "min_snr"
    args.loss_weighting = args.loss_weighting or "none"
    if args.validation_inference_steps is None:
        args.validation_inference_steps = 4 if args.objective in ("consistency", "mean_flow") else 20
    args.snr_gamma = 5.0 if args.snr_gamma is None else args.snr_gamma
    lognormal = args.time_sampling == "lognormal"
    args.time_mean = (-1.2 if lognormal else 0.0) if args.time_mean is None else args.time_mean
    args.time_std = (1.2 if lognormal else 1.0) if args.time_std is None else args.time_std
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, whatever the model and the data are: a sentence with the remedy, or None."""
    if (args.train_data_dir is None) == (args.dataset_name is None):
        return "pass either --train_data_dir, a folder of images, or --dataset_name, a data set of the Hub."
    if args.streaming and args.max_train_steps is None:
        return "a streamed data set has no known length: pass --max_train_steps."
    if args.streaming and args.train_data_dir is not None:
        return "--streaming is for --dataset_name; a folder is read as it is needed anyway: leave it out."
    if args.snr_gamma is not None and args.loss_weighting not in (None, "min_snr", "soft_min_snr"):
        return f"--snr_gamma has no meaning for --loss_weighting {args.loss_weighting}: leave out one of them."
    if args.model_config and args.pretrained_model_name_or_path:
        return "pass either --model_config, for a new network, or --pretrained_model_name_or_path."
    if args.rank is not None and not args.pretrained_model_name_or_path:
        return "--rank adds LoRA adapters to a pretrained network: pass --pretrained_model_name_or_path."
    if args.path != "from_model" and args.pretrained_model_name_or_path:
        return "a pretrained network keeps its process: leave out --path (or train a new network)."
    maps = args.objective in ("consistency", "mean_flow")
    if args.teacher_model_name_or_path and not maps:
        return "--teacher_model_name_or_path is for --objective consistency and mean_flow: leave out one of them."
    if args.guidance_scale != 1.0 and not (maps and args.teacher_model_name_or_path):
        return "--guidance_scale builds the guidance of a teacher into a flow map: pass --teacher_model_name_or_path."
    if args.objective == "classifier" and (args.rank is not None or args.model_config):
        return "--objective classifier trains a small network of its own: leave out --rank and --model_config."
    positive = (
        "resolution train_batch_size max_train_steps num_train_epochs gradient_accumulation_steps learning_rate rank "
        "checkpointing_steps checkpoints_total_limit stop_after_steps validation_steps validation_inference_steps "
        "snr_gamma time_std huber_c max_grad_norm logging_steps distillation_steps"
    )
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            return f"--{name} must be positive, not {value}."
    if not 0 <= args.label_dropout < 1:
        return f"--label_dropout is a share in [0, 1), not {args.label_dropout}."
    if args.use_ema and not 0 < args.ema_sigma_rel <= 0.288:
        return f"--ema_sigma_rel must be in (0, 0.288], not {args.ema_sigma_rel}."
    if args.num_validation_images < 0 or args.dataloader_num_workers < 0 or args.lr_warmup_steps < 0:
        return "--num_validation_images, --dataloader_num_workers and --lr_warmup_steps cannot be negative."
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        return f"--report_to {args.report_to} needs that package: pip install {args.report_to}, or --report_to none."
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        return f"--output_dir {args.output_dir} is a file: pass a folder."
    holds = (output / "model_index.json").exists() or any(output.glob("checkpoint-*"))
    if holds and not args.resume_from_checkpoint and not args.dry_run:
        return (
            f"--output_dir {args.output_dir} holds an earlier training: pass --resume_from_checkpoint latest to go on, "
            "or another folder."
        )
    return None
