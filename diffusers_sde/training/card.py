"""What a training leaves beside the weights: the loss curve and the model card.

Knows files, matplotlib and the card's text.  Knows no tensors.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CURVE = ("step", "loss", "learning_rate")


def start_curve(file: Path, resumed_step: int, columns: Sequence[str] = CURVE) -> None:
    """Begin ``loss.csv``, or cut it to the steps that a resumed training does not make again; likewise a file with
    other columns, the first of which is the step."""
    rows = [row for row in read_curve(file) if row[0] <= resumed_step] if file.exists() else []
    unfinished = file.with_name(f".{file.name}.unfinished")
    with open(unfinished, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
    unfinished.replace(file)


def extend_curve(file: Path, step: int, *values: float) -> None:
    """Append a row: the step, then of ``loss.csv`` the mean loss since the row before and the learning rate."""
    with open(file, "a", newline="") as stream:
        csv.writer(stream).writerow((step, *(f"{value:.8g}" for value in values)))


def read_curve(file: Path) -> list[tuple[Any, ...]]:
    """Rows ``(step, number, ...)``; a line cut off by a kill is left out."""
    rows: list[tuple[Any, ...]] = []
    with open(file, newline="") as stream:
        head, *lines = csv.reader(stream)
        for row in lines:
            try:
                rows.append((int(row[0]), *(float(value) for value in row[1:])))
            except (ValueError, IndexError):
                continue
    return [row for row in rows if len(row) == len(head)]


def draw_curve(rows: list[tuple[Any, ...]], file: Path) -> None:
    """Loss against steps, in means of up to 200 equal stretches."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    steps, losses = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    stretches = np.array_split(np.arange(len(steps)), min(200, len(steps)))
    ax.plot([steps[s].mean() for s in stretches], [losses[s].mean() for s in stretches], color="#1f77b4", linewidth=1.4)
    ax.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    ax.grid(alpha=0.25, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def draw_rewards(rows: list[tuple[Any, ...]], file: Path) -> None:
    """The mean reward of each rollout with its spread, and the divergence from the start beneath it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.4), facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, rewards, spreads, divergences = zip(*rows, strict=True)
    low, high = ([r + sign * s for r, s in zip(rewards, spreads, strict=True)] for sign in (-1, 1))
    above.fill_between(steps, low, high, color="#1f77b4", alpha=0.2, linewidth=0)
    above.plot(steps, rewards, color="#1f77b4", linewidth=1.4)
    below.plot(steps, divergences, color="#d62728", linewidth=1.4)
    above.set(ylabel="reward, mean and spread")
    below.set(xlabel="optimizer step", ylabel="KL to the start, nats")
    for ax in (above, below):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


_CARD = """---
library_name: diffusers
tags: [diffusers, diffusers_sde{tags}]
{base}---

# {title}

{what}

{samples}## Training

{facts}

Command:

```bash
{command}
```

{rewards}{loss}## Use

```python
{snippet}
```
"""

_SNIPPETS = {
    "classifier": """from diffusers_sde import NoisyClassifierModel

classifier = NoisyClassifierModel.from_pretrained({name})
logits = classifier(noisy_images, timesteps)  # log p(class | x_t) up to a constant, (N, classes)""",
    "masked": """import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    {name}, custom_pipeline="pipelines/text_generation.py", trust_remote_code=True
)
pipe.scheduler = diffusers_sde.MaskedDiffusionScheduler.from_config(pipe.scheduler.config)
print(pipe("And God said, ", gen_length=100, num_inference_steps=50).texts[0])""",
    "embedding": """import torch
from diffusers import DDPMPipeline
from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.methods.word_embeddings import embedding_denoiser, words_of
from diffusers_sde.sampling import sample
from transformers import AutoTokenizer

pipe = DDPMPipeline.from_pretrained({name})
scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(20)
made = sample(embedding_denoiser(pipe.unet), scheduler, torch.randn(4, 1, {length}, {dimension}))
tokenizer = AutoTokenizer.from_pretrained({name}, subfolder="tokenizer")
print(tokenizer.batch_decode(words_of(made, pipe.unet)))""",
    "autoencoder": """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained({name})
latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor  # of images (N, {channels}, H, W) in [-1, 1]
images = vae.decode(latents / vae.config.scaling_factor).sample""",
    "flow_map": """import torch
import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})
scheduler = pipe.scheduler  # FlowMapScheduler
scheduler.set_timesteps(2)
x = torch.randn(3, {channels}, {size}, {size})
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t{target}).sample, t, x).prev_sample  # in [-1, 1]""",
    "class_flow_map": """import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})  # a ClassConditionalPipeline
images = pipe({shown}, num_inference_steps=2).images""",
    "unconditional": """import torch
import diffusers_sde
from diffusers import DDPMPipeline
from diffusers_sde.sampling import network_denoiser, sample

pipe = DDPMPipeline.from_pretrained({name})
scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(10)
noise = torch.randn(4, {channels}, {size}, {size})
images = sample(network_denoiser(pipe.unet), scheduler, noise)  # (4, {channels}, {size}, {size}) in [-1, 1]""",
    "class": """import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})  # a ClassConditionalPipeline
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
images = pipe({shown}, num_inference_steps=10, guidance_scale=2.0).images""",
    "pipeline": """import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
images = pipe({condition}, num_inference_steps=10).images""",
    "lora": """import diffusers_sde
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base_model})
pipe.load_lora_weights({name})
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
images = pipe({condition}, num_inference_steps=10).images""",
}


def write_card(
    folder: Path,
    *,
    title: str,
    what: str,
    facts: dict[str, Any],
    command: str,
    kind: str,
    values: dict[str, Any],
    base_model: str | None = None,
    hide: Callable[[str], str] = lambda text: text,
) -> None:
    """``README.md`` of a model: what it is, how it was trained, its curves, how to sample it.

    ``kind`` names the sampling snippet (unconditional, class, flow_map, class_flow_map, classifier, autoencoder,
    masked, embedding, pipeline, lora), ``values`` fill it in, strings quoted.  The card shows ``samples.png`` or
    ``samples.txt``, ``rewards.png`` and ``loss.png`` where they are in ``folder``.  ``base_model`` is named to the Hub
    where it is a model of the Hub.  ``hide`` takes secrets out of the text.
    """

    def shown(title: str, file: str) -> str:
        return f"![{title}]({file})\n\n" if (folder / file).exists() else ""

    texts = folder / "samples.txt"
    samples = f"Samples:\n\n```text\n{texts.read_text(encoding='utf-8')}```\n\n" if texts.exists() else ""
    of_hub = base_model is not None and base_model.count("/") == 1 and not Path(base_model).exists()
    base = f"base_model: {json.dumps(base_model)}\n" if of_hub else ""
    tags = ", lora" if kind == "lora" else ""
    text = _CARD.format(
        tags=tags,
        base=base,
        title=title,
        what=what,
        facts="\n".join(f"* **{key}**: {value}" for key, value in facts.items()),
        samples=samples or shown("Samples", "samples.png"),
        rewards=shown("Reward", "rewards.png"),
        loss=shown("Loss", "loss.png"),
        command=command,
        snippet=_SNIPPETS[kind].format(base_model=json.dumps(base_model), **values),
    )
    (folder / "README.md").write_text(hide(text), encoding="utf-8")
