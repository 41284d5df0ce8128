"""Text from captions alone: a tokenizer made of them, a new text encoder, and a text encoder in training.

Knows transformers' CLIP classes, and how a pipeline's network is given the text.  Knows nothing of losses, data sets or
optimizers.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_sde.conditioning import stack
from diffusers_sde.errors import UsageError
from diffusers_sde.training.networks import Task

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
SHORTEST_PROMPT = 16  # tokens that a prompt may have at least, with start and end


def make_tokenizer(captions: Sequence[str], multiple: int = 8, padding_side: str = "right") -> CLIPTokenizer:
    """A stock ``CLIPTokenizer`` in whose vocabulary every word of the captions is one piece; another word falls apart
    into pieces of such words and, where none fits, into the bytes of its characters.

    A function of the captions, whatever the process (the trainers of ``tokenizers`` break ties at random), so that a
    resumed training numbers words as it did.  Prompts are padded (on ``padding_side``) and cut to the longest caption,
    at least to 16 tokens, in multiples of ``multiple``.
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
        model_max_length=max(SHORTEST_PROMPT, multiple * -(-longest // multiple)),
        padding_side=padding_side,
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


def make_text_encoder(
    tokenizer: CLIPTokenizer, width: int, layers: int = 2, positions: int | None = None
) -> CLIPTextModel:
    """A new ``CLIPTextModel`` for the vocabulary of ``tokenizer`` and for prompts of ``positions`` tokens (None: of the
    tokenizer's longest); heads of 32 channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=positions or tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class TextConditioned(torch.nn.Module):
    """A network and the text encoder before it as one module, called with token numbers in place of embeddings.

    ``layer``: which of the encoder's hidden states the network attends to, None for its normalised last one.
    """

    def __init__(self, network: Any, text_encoder: Any, layer: int | None = None):
        super().__init__()
        self.network, self.text_encoder, self.layer = network, text_encoder, layer

    def forward(self, x: torch.Tensor, *, input_ids: torch.Tensor, **arguments: Any) -> Any:
        """The network's output for states ``x`` and prompts of token numbers (N, length)."""
        return self.network(x, encoder_hidden_states=embeddings(self.text_encoder, input_ids, self.layer), **arguments)


def embeddings(text_encoder: Any, input_ids: torch.Tensor, layer: int | None) -> torch.Tensor:
    """The hidden states (N, length, width) of a prompt's tokens: those of ``layer``, None for the normalised last."""
    if layer is None:
        return text_encoder(input_ids)[0]
    return text_encoder(input_ids, output_hidden_states=True).hidden_states[layer]


def with_text_encoder(task: Task) -> Task:
    """``task`` whose text encoder is trained too.

    Raises:
        UsageError: where what the network is told depends on the prompt in other ways than through hidden states of one
            text encoder (the last, or the last but one).
    """
    encoder, tokenizer = (getattr(task.pipe, name, None) for name in ("text_encoder", "tokenizer"))
    refusal = UsageError(
        f"The text encoder of {type(task.pipe).__name__} cannot be trained, only a single one whose hidden states the "
        "network attends to, as Stable Diffusion's: leave out --train_text_encoder."
    )
    if encoder is None or tokenizer is None:
        raise refusal

    def tokens(texts: Sequence[str]) -> torch.Tensor:
        length = tokenizer.model_max_length
        told = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return told.input_ids.to(encoder.device)

    given, other = (task.condition(None, [prompt]) for prompt in ("a", ""))
    expected = given.pop("encoder_hidden_states", None)
    other.pop("encoder_hidden_states", None)
    if expected is None or not same(given, other):
        raise refusal
    with torch.no_grad():
        layers = [layer for layer in (None, -2) if same(embeddings(encoder, tokens(["a"]), layer), expected)]
    if not layers:
        raise refusal
    encoder.requires_grad_(True)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(embeddings(encoder, tokens(["a"]), layers[0]).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)  # layers behind the one attended to have nothing to learn from

    def condition(labels: Sequence[int | None] | None, captions: Sequence[str | None] | None) -> dict[str, Any]:
        texts = [caption or "" for caption in captions or ()]
        return {"input_ids": tokens(texts), **stack([given] * len(texts))}

    return dataclasses.replace(task, condition=condition, trained=TextConditioned(task.network, encoder, layers[0]))


def same(first: Any, second: Any) -> bool:
    """Whether two conditions of a network are equal up to rounding."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.allclose(first, second, atol=1e-4)
    return bool(first is second or first == second)
