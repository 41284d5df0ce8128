"""``diffusers-sde bench --sections text``: samplers of tokens on a chain that says every conditional exactly.

Knows this package's discrete schedulers and diffusers' own, and a chain whose law is a table.  Prints for each number
of network calls the distance in total variation between the samples and the law, and their entropy; asserts nothing.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from diffusers_sde.benchmarks.common import print_table
from diffusers_sde.discrete.oracles import JointTable
from diffusers_sde.models.token_oracle import MarkovChainModel
from diffusers_sde.schedulers import MaskedDiffusionScheduler, UniformDiffusionScheduler
from diffusers_sde.schedulers.masked_diffusion import ALGORITHMS

INITIAL = [0.5, 0.3, 0.2]
TRANSITION = [[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]]
LENGTH, SAMPLES = 6, 10000
CALLS = (2, 3, 4, 6, 12, 24)


def measure(seed: int = 0) -> None:
    """Masked noise, then uniform noise."""
    law = MarkovChainModel(INITIAL, TRANSITION).chain(LENGTH).table()
    exact = law.sample(SAMPLES, torch.Generator().manual_seed(seed))
    floor, own = compare(exact, law), float(torch.special.entr(law.probabilities).sum())
    stock: dict[str, Any] = {
        "diffusers BlockRefinement": diffusers.BlockRefinementScheduler(threshold=1.0, editing_threshold=None),
        "diffusers BlockRefinement, greedy": diffusers.BlockRefinementScheduler(threshold=1.0),
    }
    ours = {name: MaskedDiffusionScheduler(algorithm_type=name) for name in ALGORITHMS}
    masked = {**stock, **ours, "ancestral, remasking 0.1": MaskedDiffusionScheduler("ancestral", remasking=0.1)}
    header = ["", *(f"{n} calls" for n in CALLS)]
    note = f"total variation / entropy; {SAMPLES} exact samples have {floor[0]:.3f}, the law {own:.2f} nats"
    rows = [[name, *(cell(from_masks(s, n, "greedy" in name, seed), law) for n in CALLS)] for name, s in masked.items()]
    print_table(f"Chain of {LENGTH} tokens out of masks: {note}", header, rows)
    uniform = {
        "diffusers DiscreteDDIM": diffusers.DiscreteDDIMScheduler(),
        "diffusers EntropyBound": diffusers.EntropyBoundScheduler(),
        **{name: UniformDiffusionScheduler(name) for name in ("ancestral", "tau_leaping", "theta_trapezoidal")},
    }
    rows = [[name, *(cell(from_uniform(s, n, seed), law) for n in CALLS)] for name, s in uniform.items()]
    print_table(f"The same out of uniform noise: {note}", header, rows)


def compare(x: torch.Tensor, law: JointTable) -> tuple[float, float]:
    """Total variation between samples (N, L) and a law, and the samples' entropy in nats."""
    powers = law.vocabulary ** torch.arange(law.length - 1, -1, -1)
    shares = torch.bincount((x * powers).sum(-1), minlength=law.probabilities.numel()).double() / len(x)
    return float((shares - law.probabilities.flatten()).abs().sum() / 2), float(torch.special.entr(shares).sum())


def cell(x: torch.Tensor, law: JointTable) -> str:
    """The same as one cell of a table."""
    distance, entropy = compare(x, law)
    return f"{distance:.3f} / {entropy:.2f}"


def from_masks(scheduler: Any, calls: int, greedy: bool, seed: int) -> torch.Tensor:
    """Samples (N, L) of a scheduler of masked noise with the exact network."""
    model, generator = MarkovChainModel(INITIAL, TRANSITION), torch.Generator().manual_seed(seed)
    mask = model.mask_token_id
    x = torch.full((SAMPLES, LENGTH), mask)
    scheduler.set_timesteps(calls, block_length=LENGTH)
    for number in range(calls):
        if not bool((x == mask).any()):
            break
        x = scheduler.step(
            model(x).logits, number, x, mask_token_id=mask, temperature=0.0 if greedy else 1.0, generator=generator
        ).prev_sample
    return x


def from_uniform(scheduler: Any, calls: int, seed: int) -> torch.Tensor:
    """Samples (N, L) of a scheduler of uniform noise with the exact network, which is told the time."""
    model, generator = MarkovChainModel(INITIAL, TRANSITION, "uniform"), torch.Generator().manual_seed(seed)
    x = torch.randint(len(INITIAL), (SAMPLES, LENGTH), generator=generator)
    scheduler.set_timesteps(calls)
    told = {} if isinstance(scheduler, diffusers.EntropyBoundScheduler) else {"temperature": 1.0}
    for number, t in enumerate(scheduler.timesteps):
        # the linear schedule, which diffusers' schedulers have without saying so
        alpha = 1 - float(t) if t.is_floating_point() else number / calls
        logits = model(x, alpha=max(alpha, 0.0)).logits
        x = scheduler.step(logits, number, x, generator=generator, **told).prev_sample
    return x
