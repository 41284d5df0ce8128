"""Text-to-image from captions alone: a tokenizer made of them, a new pipeline, and its text encoder in training.

Knows transformers' CLIP classes and ``StableDiffusionPipeline``.  Knows nothing of losses, data sets or optimizers.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_sde.errors import UsageError
from diffusers_sde.training.networks import Task

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
SHORTEST_PROMPT = 16  # tokens that a prompt may have at least, with start and end


def make_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A stock ``CLIPTokenizer`` in whose vocabulary every word of the captions is one piece; another word falls apart
    into pieces of such words and, where none fits, into the bytes of its characters.

    A function of the captions, whatever the process (the trainers of ``tokenizers`` break ties at random), so that a
    resumed training numbers words as it did.  Prompts are padded and cut to the longest caption, at least to 16 tokens,
    in multiples of 8.
    """
    rules = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    split = [rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(caption)) for caption in captions]
    merges = learn_merges(Counter(word for words in split for word, _ in words))
    characters = sorted(ByteLevel.alphabet())
    pieces = [START, END, *characters, *(c + WORD_END for c in characters), *(a + b for a, b in merges)]
    longest = max(len(words) for words in split) + 2
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        model_max_length=max(SHORTEST_PROMPT, 8 * -(-longest // 8)),
    )


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2015, arXiv:1508.07909) until every word is one piece: always the most frequent
    pair of neighbouring pieces, the first in alphabetical order among equals.

    Args:
        words: how often each word occurs.
    """
    spelled = {word: [*word[:-1], word[-1] + WORD_END] for word in sorted(words)}
    frequency: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def count(word: str, sign: int) -> set[tuple[str, str]]:
        pairs = list(itertools.pairwise(spelled[word]))
        for pair in pairs:
            frequency[pair] += sign * words[word]
            (holders[pair].add if sign > 0 else holders[pair].discard)(word)
        return set(pairs)

    for word in spelled:
        count(word, 1)
    heap = [(-number, pair) for pair, number in frequency.items()]
    heapq.heapify(heap)
    merges: dict[tuple[str, str], None] = {}  # in their order; a pair may come up again through other merges
    while heap:
        number, pair = heapq.heappop(heap)
        if frequency[pair] != -number or not number:
            continue  # outdated: the pair was pushed again when its number changed
        merges[pair] = None
        changed = set()
        for word in list(holders[pair]):
            changed |= count(word, -1)
            spelled[word] = merged(spelled[word], pair)
            changed |= count(word, 1)
        for other in changed - {pair}:
            heapq.heappush(heap, (-frequency[other], other))
    return list(merges)


def merged(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """``pieces`` with every occurrence of ``pair``, from the left, made one piece."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextModel:
    """A new ``CLIPTextModel`` for the vocabulary and the prompt length of ``tokenizer``; heads of 32 channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_autoencoder(source: str) -> diffusers.AutoencoderKL:
    """The autoencoder of a folder or of the Hub, or that of a pipeline there; frozen.

    Raises:
        UsageError: where there is none.
    """
    subfolder = "vae" if (Path(source) / "vae").is_dir() else None
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--vae_model_name_or_path {source} holds no AutoencoderKL: pass the folder of one."
        ) from error
    return vae.float().requires_grad_(False).eval()


def default_text_network(sample_size: int, channels: int) -> diffusers.UNet2DConditionModel:
    """A ``UNet2DConditionModel`` for small latents: widths 64, 96, 160, one layer a block, attention to the text below
    the first level; 7.3 M parameters.

    Raises:
        UsageError: for a side that does not halve twice.
    """
    if sample_size % 4:
        raise UsageError(
            f"Latents of {sample_size}x{sample_size} do not fit the default network: pass a --resolution that makes "
            "their side a multiple of 4, or --model_config."
        )
    return diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        norm_num_groups=16,
        attention_head_dim=(2, 3, 5),  # diffusers' name for the number of heads
        cross_attention_dim=128,
    )


def new_pipeline(
    vae: Any, network: Any, scheduler: Any, captions: Sequence[str], side: float
) -> diffusers.StableDiffusionPipeline:
    """A ``StableDiffusionPipeline`` of an autoencoder and a new network, with a tokenizer and a new text encoder made
    for ``captions`` and for the width that the network attends to.

    Args:
        side: of the latents of the training images.

    Raises:
        UsageError: for a network that does not attend to text or does not fit the latents.
    """
    if not isinstance(network, diffusers.UNet2DConditionModel):
        raise UsageError(
            f"A new text-to-image model needs a UNet2DConditionModel, not a {type(network).__name__}: correct "
            "--model_config, or leave it out."
        )
    if network.config.in_channels != vae.config.latent_channels:
        raise UsageError(
            f"The network takes {network.config.in_channels} channels, the latents have {vae.config.latent_channels}: "
            "correct --model_config, or leave it out."
        )
    if network.config.sample_size != side:
        raise UsageError(
            f"The network makes latents of side {network.config.sample_size}, those of the training images have "
            f"{side:g}: pass another --resolution, or correct --model_config."
        )
    tokenizer = make_tokenizer(captions)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, network.config.cross_attention_dim),
        tokenizer=tokenizer,
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TextConditioned(torch.nn.Module):
    """A network and the text encoder before it as one module, called with token numbers in place of embeddings."""

    def __init__(self, network: Any, text_encoder: Any):
        super().__init__()
        self.network, self.text_encoder = network, text_encoder

    def forward(self, x: torch.Tensor, *, input_ids: torch.Tensor, **arguments: Any) -> Any:
        """The network's output for states ``x`` and prompts of token numbers (N, length)."""
        return self.network(x, encoder_hidden_states=self.text_encoder(input_ids)[0], **arguments)


def with_text_encoder(task: Task) -> Task:
    """``task`` whose text encoder is trained too.

    Raises:
        UsageError: where the network is given anything but the last hidden states of one text encoder.
    """
    encoder, tokenizer = (getattr(task.pipe, name, None) for name in ("text_encoder", "tokenizer"))
    refusal = UsageError(
        f"The text encoder of {type(task.pipe).__name__} cannot be trained, only a single one whose hidden states the "
        "network attends to, as Stable Diffusion's: leave out --train_text_encoder."
    )
    if encoder is None or tokenizer is None:
        raise refusal

    def condition(labels: Sequence[int | None] | None, captions: Sequence[str | None] | None) -> dict[str, Any]:
        texts = [caption or "" for caption in captions or ()]
        tokens = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return {"input_ids": tokens.input_ids.to(encoder.device)}

    given = task.condition(None, ["a"])
    with torch.no_grad():
        expected = encoder(condition(None, ["a"])["input_ids"])[0]
    embeddings = given.pop("encoder_hidden_states", None)
    if embeddings is None or embeddings.shape != expected.shape or not torch.allclose(embeddings, expected, atol=1e-4):
        raise refusal
    if any(value is not None for value in given.values()):
        raise refusal
    encoder.requires_grad_(True)
    return dataclasses.replace(task, condition=condition, trained=TextConditioned(task.network, encoder))
