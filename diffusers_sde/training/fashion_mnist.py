"""Train the embedded default model: a class-conditional noise predictor on Fashion-MNIST.

Knows one data set (the IDX files of Fashion-MNIST, MIT licence) and one plain training loop: the noise-prediction
loss ``E |eps_theta(alpha x0 + sigma eps, t, y) - eps|^2`` (Ho et al. 2020, eq. 14) with the label replaced by the
null class 10 % of the time (Ho & Salimans 2022, algorithm 1).  Knows nothing of samplers.

    apt-get install dataset-fashion-mnist
    python -m diffusers_sde.training.fashion_mnist --output_dir model --max_minutes 60
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL_CLASS = len(CLASSES)


def read_images(folder: str | Path, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(N, 1, 32, 32)`` in [-1, 1] (28x28 padded with black) and labels ``(N,)`` from the IDX files."""
    folder = Path(folder)
    names = [folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"]
    for name in names:
        if not name.exists():
            raise FileNotFoundError(f"{name} is missing: `apt-get install dataset-fashion-mnist` or pass --data_dir.")
    images, labels = (gzip.decompress(name.read_bytes()) for name in names)
    pixels = torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    return pixels.float() / 127.5 - 1, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def build_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=20,
        num_class_embeds=NULL_CLASS + 1,
    )


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    images, labels = read_images(args.data_dir)
    scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
    start = args.pretrained_model_name_or_path
    unet = DDPMPipeline.from_pretrained(start).unet.float() if start else build_network()
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=0.01)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    began, losses, step = time.monotonic(), [], 0
    while (elapsed := (time.monotonic() - began) / 60) < args.max_minutes and step < args.max_train_steps:
        done = max(elapsed / args.max_minutes, step / args.max_train_steps)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        index = torch.randint(len(images), (args.train_batch_size,))
        x0, y = images[index], labels[index].clone()
        y[torch.rand(len(y)) < args.label_dropout] = NULL_CLASS
        eps, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = unet(scheduler.add_noise(x0, eps, t), t, y).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} minute {elapsed:.1f} loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 1000 == 0:
            save(average, scheduler, output, losses)
    save(average, scheduler, output, losses)


def save(unet: UNet2DModel, scheduler: DDPMScheduler, output: Path, losses: list[float]) -> None:
    """Write the pipeline (float16, stock format) and the loss curve, in means of 100 steps."""
    DDPMPipeline(unet=copy.deepcopy(unet).half(), scheduler=scheduler).save_pretrained(output)
    with open(output / "loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows((i + 100, f"{np.mean(losses[i : i + 100]):.5f}") for i in range(0, len(losses) - 99, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--pretrained_model_name_or_path", help="Go on from this model instead of a new network.")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--label_dropout", type=float, default=0.1)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--max_minutes", type=float, default=60.0)
    parser.add_argument("--max_train_steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
