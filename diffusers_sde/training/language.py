"""The training of a masked diffusion of text: tokenizer, network, process, loss, what is measured and sampled.

Knows transformers' bidirectional encoders and diffusers' pipeline of them; the bound that is trained on stands in
:mod:`diffusers_sde.discrete.bounds`, diffusion of embeddings in :mod:`.embedding_language`.  Knows nothing of
optimizers or checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from diffusers_sde.discrete.bounds import any_order_loss
from diffusers_sde.errors import UsageError
from diffusers_sde.loading import load_pipeline
from diffusers_sde.schedulers import MaskedDiffusionScheduler
from diffusers_sde.training.networks import Task, read_model_config
from diffusers_sde.training.randomness import generator_of, seed_of
from diffusers_sde.training.samples import Selection, TrainingData
from diffusers_sde.training.sequences import Sequences, character_tokenizer, pack, pair, read_documents
from diffusers_sde.training.settings import Settings

MEASURED = 512  # sequences that the bound is measured on, if there are so many
MEASURED_AT_ONCE = 32
NOISE_STREAM, MEASURE_STREAM, SAMPLES_STREAM = 1, 5, 6  # streams of random numbers


@dataclass
class LanguageTask(Task):
    """A network with logits of every position's clean token, trained on masked sequences; ``words`` tokenizes."""

    words: Any = None

    @property
    def forward_process(self) -> str:
        """The process in words."""
        return "absorbing (masked), every noise schedule"

    @property
    def process_facts(self) -> dict[str, Any]:
        """What a checkpoint says of the process."""
        return {"process": "absorbing", "vocabulary": len(self.tokenizer)}

    @property
    def card_values(self) -> dict[str, Any]:
        """What the card's snippet is filled in with."""
        return {"mask": json.dumps(self.tokenizer.mask_token)}

    @property
    def tokenizer(self) -> Any:
        """Of the text."""
        return self.words

    def bits_per_token(self, settings: Settings, data: TrainingData, count: int) -> float:
        """The bound on ``-log2 p`` per learned token, of ``count`` sequences of ``data`` spread evenly over it."""
        device, total = self.network.device, 0.0
        for rows, items in items_of(data, count):
            x0 = torch.stack([item["input_ids"] for item in items]).to(device)
            generators = [generator_of(settings.seed, i, MEASURE_STREAM) for i in rows]
            keys = torch.stack([torch.rand(x0.shape[1], generator=g) for g in generators])
            first = torch.tensor([item.get("prefix_length", 0) for item in items])
            learned = torch.arange(x0.shape[1]) >= first[:, None]
            # the golden ratio spreads any number of consecutive rows evenly
            u = torch.tensor([(i * 0.6180339887498949) % 1 for i in rows], dtype=torch.float64)
            masked = drawn_masks(u, keys, learned).to(device)
            x = torch.where(masked, self.tokenizer.mask_token_id, x0)
            total += float(any_order_loss(self.network(input_ids=x).logits, x0, masked).sum())
        return total / count / math.log(2)

    def sample_texts(self, settings: Settings) -> list[str]:
        """``num_validation_images`` texts from masks alone, in ``validation_inference_steps`` calls of the
        first-hitting sampler; the same random numbers in every call."""
        count, length = settings.num_validation_images, settings.sequence_length
        mask, generator = self.tokenizer.mask_token_id, generator_of(settings.seed, 0, SAMPLES_STREAM)
        scheduler = MaskedDiffusionScheduler(mask_token_id=mask)
        scheduler.set_timesteps(min(settings.validation_inference_steps, length))
        x = torch.full((count, length), mask, device=self.network.device)
        for t in scheduler.timesteps:
            x = scheduler.step(self.network(input_ids=x).logits, t, x, generator=generator).prev_sample
        return self.tokenizer.batch_decode(x, skip_special_tokens=True)


def build(settings: Settings, make: Callable[[Any], LanguageTask] | None = None) -> tuple[LanguageTask, Sequences]:
    """The network with its pipeline, a new one or a pretrained one, and the sequences that it is trained on.

    Args:
        make: another task of a tokenizer than that of masked text.

    Raises:
        UsageError: for a tokenizer without a mask, a network without logits of tokens, and data without text.
    """
    texts, prefixes = read_documents(settings.data_source, settings.text_column, settings.prefix_column)
    pipe = None
    if settings.pretrained_model_name_or_path:
        pipe = load_text_pipeline(settings.pretrained_model_name_or_path, settings.revision)
        if not isinstance(getattr(pipe, "model", None), torch.nn.Module) or getattr(pipe, "tokenizer", None) is None:
            raise UsageError(
                f"{type(pipe).__name__} has no model of tokens with a tokenizer: pass a pipeline of masked diffusion."
            )
    tokenizer = pipe.tokenizer if pipe else new_tokenizer(settings, [*texts, *(prefixes or ())])
    if tokenizer.mask_token_id is None:
        raise UsageError(f"{type(tokenizer).__name__} has no mask token: pass another --tokenizer_name_or_path.")
    length = settings.sequence_length
    data = pack(tokenizer, texts, length) if prefixes is None else pair(tokenizer, prefixes, texts, length)
    torch.manual_seed(seed_of(settings.seed))  # of the weights
    if make is not None:
        return make(tokenizer), data
    if pipe is None:
        network = new_network(settings.model_config, len(tokenizer), length, tokenizer.pad_token_id)
        scheduler = diffusers.BlockRefinementScheduler(block_length=length, num_inference_steps=length)
        pipe = diffusers.LLaDA2Pipeline(model=network, scheduler=scheduler, tokenizer=tokenizer)
    return LanguageTask(pipe, "model", pipe.model, lambda labels, captions: {}, words=tokenizer), data


def load_text_pipeline(name: str, revision: str | None) -> Any:
    """A pipeline by name with its tokenizer, which diffusers' pipeline of masked diffusion does not load by itself."""
    where = name if Path(name).is_dir() or name.count("/") == 1 else None
    if where is None or (Path(name).is_dir() and not (Path(name) / "tokenizer").is_dir()):
        return load_pipeline(name, revision=revision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, subfolder="tokenizer", revision=revision or "main")
    return load_pipeline(name, revision=revision, tokenizer=tokenizer)


def save_tokenizer(task: LanguageTask, folder: Path) -> None:
    """Write the tokenizer beside the other components: diffusers' pipeline of masked diffusion names it in its index
    but leaves it out."""
    task.tokenizer.save_pretrained(folder / "tokenizer")


def new_tokenizer(settings: Settings, texts: Sequence[str]) -> Any:
    """One of transformers by name, or one whose tokens are the characters of the texts."""
    name = settings.tokenizer_name_or_path
    if name is None:
        return character_tokenizer(texts)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{name} is no tokenizer that can be loaded ({reason}): pass a folder or a hub id.") from error


def new_network(model_config: str | None, vocabulary: int, length: int, padding: int | None) -> Any:
    """A new bidirectional encoder of transformers with logits of tokens.

    The default is a ``ModernBertForMaskedLM`` of 6 layers, 160 wide, with 5 heads of 32 channels that all attend to the
    whole sequence: 1.3 million parameters with an alphabet.

    Args:
        model_config: JSON file or folder of a config that names its ``model_type``; None: the default.
        vocabulary: number of tokens.
        length: of the sequences.
        padding: the number of the padding token.

    Raises:
        UsageError: for a config of no model with logits of tokens, or of one for shorter sequences.
    """
    asked = {"vocab_size": vocabulary, "pad_token_id": padding}
    if model_config is None:
        nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        config: Any = transformers.ModernBertConfig(
            **asked,
            **nothing,
            hidden_size=160,
            num_hidden_layers=6,
            num_attention_heads=5,
            intermediate_size=320,
            max_position_embeddings=max(512, length),
            global_attn_every_n_layers=1,
        )
        return transformers.ModernBertForMaskedLM(config)
    values = read_model_config(model_config)
    try:
        config = transformers.AutoConfig.for_model(**{**values, **asked})
        network = transformers.AutoModelForMaskedLM.from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--model_config {model_config} is no bidirectional encoder of transformers ({error}): name a model_type "
            "such as bert or modernbert."
        ) from error
    if getattr(config, "max_position_embeddings", length) < length:
        raise UsageError(
            f"--model_config {model_config} is for {config.max_position_embeddings} tokens: pass a --sequence_length "
            "of no more."
        )
    return network


# -- the loss --


def masked_loss(settings: Settings, task: LanguageTask, network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """:func:`diffusers_sde.discrete.bounds.any_order_loss`, the mean over a batch, in nats per token.

    The number of masks of a sequence is uniform (stratified over the batch's positions with ``--time_sampling
    stratified``), which ones are drawn from the generator of its position.  A prefix is never masked and never
    learned, but for a share ``label_dropout`` of them, hidden behind masks that are not learned either: what guidance
    compares with.
    """
    x0 = batch["input_ids"].to(task.network.device)
    generators = [generator_of(settings.seed, int(p), NOISE_STREAM) for p in batch["positions"]]
    numbers = torch.stack([torch.rand(2 + x0.shape[1], generator=g, dtype=torch.float64) for g in generators])
    u, dropped, keys = numbers[:, 0], numbers[:, 1] < settings.label_dropout, numbers[:, 2:]
    if settings.time_sampling == "stratified":
        u = (batch["positions"] % len(u) + u) / len(u)
    learned = torch.ones_like(keys, dtype=torch.bool)
    if "prefix_length" in batch:
        learned = torch.arange(x0.shape[1]) >= batch["prefix_length"][:, None]
    masked = drawn_masks(u, keys, learned)
    hidden = masked | (~learned & dropped[:, None])
    x = torch.where(hidden.to(x0.device), task.tokenizer.mask_token_id, x0)
    return any_order_loss(network(input_ids=x).logits, x0, masked.to(x0.device)).mean()


def drawn_masks(u: torch.Tensor, keys: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Which positions are masked, (N, L): of the ``m`` learned ones of a row ``floor(u m) + 1``, those of the smallest
    keys.

    Args:
        u: (N,) uniform in [0, 1).
        keys: (N, L) uniform.
        learned: (N, L) bool.
    """
    count = (u * learned.sum(-1)).floor() + 1
    ranks = torch.where(learned, keys, torch.inf).argsort(-1).argsort(-1)
    return (ranks < count[:, None]) & learned


# -- what is measured --


def items_of(data: TrainingData, count: int) -> Iterator[tuple[range, list[Any]]]:
    """``count`` items of ``data`` spread evenly over it, a few at a time with their numbers."""
    for start in range(0, count, MEASURED_AT_ONCE):
        rows = range(start, min(start + MEASURED_AT_ONCE, count))
        yield rows, [data.item(i * len(data) // count, 0) for i in rows]


@torch.no_grad()
def measure(settings: Settings, task: LanguageTask, data: TrainingData) -> dict[str, str]:
    """The bound on held-out sequences (else on training ones), for the card."""
    count = min(MEASURED, len(data))
    kind = "held-out" if isinstance(data, Selection) else "training"
    tokens = set(task.tokenizer.get_vocab()) - set(task.tokenizer.all_special_tokens)
    unit = "character" if all(len(token) == 1 for token in tokens) else "token"
    bits = task.bits_per_token(settings, data, count)
    return {"Bound": f"{bits:.3f} bits per {unit} on {count} {kind} sequences"}
