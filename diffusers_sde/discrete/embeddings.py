r"""Words as points: Gaussian diffusion of token embeddings.

Knows what a noisy embedding ``x = alpha e_w + sigma eps`` says of its word, the data prediction that follows, rounding
and clamping, the joint loss of embeddings and rounding, and the bound on the likelihood of the words (Fu & Wang,
arXiv:2605.22586, section 9; Li et al. 2022, arXiv:2205.14217; Dieleman et al. 2022, arXiv:2211.15089).  Tensors (N, L,
d); knows no path, no network and no sampler.
"""

from __future__ import annotations

import torch


def word_evidence(x: torch.Tensor, embeddings: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The likelihood of every word at every position, ``N(x; alpha e_w, sigma^2 I)`` over that of the likeliest one:
    what an oracle of token sequences takes as evidence, (N, L, V).

    Args:
        x: noisy embeddings (N, L, d).
        embeddings: e (V, d).
        alpha, sigma: of x; sigma > 0.
    """
    logs = -0.5 * torch.cdist(x.double(), alpha * embeddings.double().expand(len(x), -1, -1)).square() / sigma**2
    return (logs - logs.amax(-1, keepdim=True)).exp()


def expected_embedding(laws: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """``E[x_0|x] = sum_w p(w|x) e_w`` (N, L, d), of laws of the words (N, L, V): the data prediction of a network that
    classifies words."""
    return laws @ embeddings.to(laws)


def rounded(x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The words (N, L) whose embeddings are nearest."""
    return torch.cdist(x.double(), embeddings.double().expand(len(x), -1, -1)).argmin(-1)


def clamped(x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The nearest embeddings themselves: the data prediction that commits to a word in every step (Li et al. 2022,
    section 4.3)."""
    return embeddings.to(x)[rounded(x, embeddings)]


def normalised(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (V, d) of mean square 1 each, so that the joint loss cannot shrink the noise away by growing them
    (Dieleman et al. 2022, section 3.1)."""
    return embeddings * (embeddings.shape[-1] ** 0.5 / embeddings.norm(dim=-1, keepdim=True))


def joint_loss(
    logits: torch.Tensor, words: torch.Tensor, embeddings: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What embeddings and network are trained on together, (N,): the weighted squared error of the data prediction and
    the cross entropy of the words, the mean over positions (Li et al. 2022, equation 2).

    Args:
        logits: of the words, (N, L, V).
        words: (N, L).
        embeddings: (V, d); their gradient is part of the loss's.
        weights: of the squared error (N,).
    """
    prediction = expected_embedding(logits.float().softmax(-1), embeddings)
    error = (prediction - embeddings[words]).square().mean((1, 2))
    return weights * error + torch.nn.functional.cross_entropy(logits.float().mT, words, reduction="none").mean(-1)


def bound_density(prediction: torch.Tensor, x0: torch.Tensor, snr: float) -> torch.Tensor:
    r"""What half log-SNR lambda adds to the bound, ``SNR |x_0 - D|^2`` (N,), summed over positions:

        -log p(w) <= -log p(w|x_clean) + \int SNR E|x_0 - D|^2 d lambda + KL(q(x_T|x_0) || p(x_T))

    (Kingma et al. 2021, arXiv:2107.00630, equation 15, with ``SNR = exp(2 lambda)``; the first term is the cross
    entropy of the words at the cleanest level)."""
    return snr * (prediction - x0).square().flatten(1).sum(-1)
