"""``diffusers-sde bench --sections rewards``: what a reward costs in divergence, learned and by search.

A Gaussian mixture and a quadratic reward, whose tilted laws ``p exp(r/beta)/Z`` are known: no sampler has more reward
at its divergence from the start.  Learned (policy gradients, adjoint matching, DiffusionNFT: the losses of the training
script on a small correction of the exact network) and sampled without training (steering by particles, best of n).
What is learned lies below the frontier by the number of steps: a step of the learned chain is normal with the noise of
the start's, a step of the tilted law need not be.  Writes ``rewards.png`` and prints a table; asserts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.benchmarks.common import PROCESSES, print_table, sliced_wasserstein
from diffusers_sde.methods.control import estimate, log_normalizer, scheduler_kernel, twisted_smc
from diffusers_sde.prediction import to_model
from diffusers_sde.training.reinforcement import NoisedSample, Part, adjoint_steps, centred, policy_steps
from diffusers_sde.training.rollouts import Chain, make_chain, roll_out

MIXTURE = GaussianMixture([0.4, 0.35, 0.25], [[-0.7, -0.2], [0.5, 0.7], [0.4, -0.8]], [0.05, 0.08, 0.04])
GOAL = torch.tensor([0.9, 0.2], dtype=torch.float64)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PATHS = {"flow": FLOW, "VP": PROCESSES["linear"]}
BETAS = (0.5, 0.2, 0.08)
METHODS = ("grpo", "adjoint matching", "nft")
STEPS, DATA_STD, BATCH, GROUP, UPDATES, RATE = 16, 0.7, 256, 16, 100, 8e-3
DRAWN, POPULATIONS, PARTICLES, BEST_OF = 4096, 16, 512, (2, 4, 8, 16, 64)
_CLIP = 0.2


def reward(x: torch.Tensor) -> torch.Tensor:
    """``-|x - GOAL|^2 / 2`` (N,) of states (N, 2)."""
    return -0.5 * (x - GOAL.to(x.dtype)).square().sum(1)


def tilted(beta: float) -> GaussianMixture:
    """The law ``p exp(reward/beta) / Z``: that of the mixture given an observation of GOAL with variance beta."""
    return MIXTURE.posterior(torch.eye(2, dtype=torch.float64), GOAL, math.sqrt(beta))


def frontier(beta: float) -> tuple[float, float]:
    """Divergence and mean reward of the tilted law, ``KL = E[r]/beta - log Z``, in closed form."""
    law = tilted(beta)
    spread = law.covariances.diagonal(dim1=1, dim2=2).sum(1)
    mean = float((law.weights * -0.5 * ((law.means - GOAL).square().sum(1) + spread)).sum())
    log_z = float(MIXTURE.log_density(GOAL[None], 1.0, math.sqrt(beta))) + math.log(2 * math.pi * beta)
    return mean / beta - log_z, mean


class Corrected(torch.nn.Module):
    """The exact network of the mixture, its data prediction corrected by a small network that begins as 0."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.path, self.kind = chain.scheduler.path, chain.scheduler.config.prediction_type
        nn = torch.nn
        self.learned = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        torch.nn.init.zeros_(self.learned[-1].weight)
        torch.nn.init.zeros_(self.learned[-1].bias)

    def exact(self, x: torch.Tensor, time: float, correct: bool = False) -> torch.Tensor:
        """What the start says of states (N, 2)."""
        alpha, sigma = (float(v) for v in self.path.alpha_sigma(time))
        data = MIXTURE.posterior_mean(x.double(), alpha, sigma).to(x.dtype)
        if correct:
            rho = math.hypot(DATA_STD * alpha, sigma)
            level = x.new_tensor([alpha * DATA_STD / rho, sigma / rho]).expand(len(x), 2)
            seen = torch.cat([x / rho, level, x[:, :1] * x[:, 1:] / rho**2], 1)
            data = data + (sigma / rho) ** 2 * self.learned(seen)
        k_x, k_d = to_model(self.path, self.kind, alpha, sigma)
        return k_x * x + k_d * data

    def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
        return self.exact(x, time, correct=True)


def parts_of(method: str, chain: Chain, network: Corrected, beta: float, update: int) -> Sequence[Part]:
    """What a rollout teaches."""
    trajectory = roll_out(chain, network, torch.arange(BATCH) + update * BATCH, (2,))
    x0 = trajectory.states[-1]
    value = reward(x0)
    if method == "adjoint matching":
        return adjoint_steps(chain, trajectory, network.exact, (GOAL.to(x0) - x0) / beta)
    if method == "nft":
        return _noised(chain, network, x0, centred(value, BATCH), beta, update)
    with torch.no_grad():
        starts = {k: chain.step(network.exact, k, trajectory.states[k]) for k in trajectory.noisy}
    spread = float(value.std())
    return policy_steps(chain, trajectory, starts, value, GROUP, beta=beta, clip_range=_CLIP, spread=spread)


@torch.no_grad()
def _noised(
    chain: Chain, network: Corrected, x0: torch.Tensor, away: torch.Tensor, beta: float, update: int
) -> list[NoisedSample]:
    """Noised at each level of the chain, one after the other."""
    draw, greatest = torch.Generator().manual_seed(update), float(away.abs().max())
    levels, parts = chain.scheduler.levels, []
    for time, alpha, sigma in zip(*(v[:-1].tolist() for v in (levels.time, levels.alpha, levels.sigma)), strict=True):
        eps = torch.randn(x0.shape, generator=draw)
        x = alpha * x0 + sigma * eps
        k_x, k_d = to_model(network.path, network.kind, alpha, sigma)
        target = k_x * x + k_d * x0
        says = target, network(x, time), network.exact(x, time)
        weight = torch.full((len(x),), k_d**-2)  # of the error of x_0
        parts.append(NoisedSample(x, time, *says, 0.5 + 0.5 * away / greatest, weight, beta / greatest))
    return parts


def learn(method: str, process: dict[str, Any], beta: float, updates: int = UPDATES) -> tuple[Chain, Corrected]:
    """A network that has learned from ``updates`` rollouts, one optimizer step each."""
    torch.manual_seed(0)
    chain = make_chain(process, STEPS, data_std=DATA_STD)
    network = Corrected(chain)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in tqdm(range(updates), desc=f"{method}, beta {beta:g}", leave=False):
        loss = torch.stack([part.loss(network) for part in parts_of(method, chain, network, beta, update)]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return chain, network


@torch.no_grad()
def measured(chain: Chain, network: Corrected) -> tuple[float, torch.Tensor]:
    """Divergence of the trajectories from the start's, and the samples (N, 2)."""
    trajectory = roll_out(chain, network, torch.arange(DRAWN) + 10**9, (2,))
    steps = ((k, chain.step(network.exact, k, trajectory.states[k])) for k in trajectory.noisy)
    kl = sum(float(trajectory.steps[k].kl(start).mean()) for k, start in steps)
    return kl, trajectory.states[-1]


def steered(process: dict[str, Any], beta: float, seed: int) -> tuple[float, float]:
    """Divergence and mean reward of the law that particles sample."""
    chain = make_chain(process, STEPS, data_std=DATA_STD)
    exact, generator = Corrected(chain).exact, torch.Generator().manual_seed(seed)

    def denoiser(x: torch.Tensor, t: Any) -> torch.Tensor:
        return exact(x, float(t))

    noise = torch.randn(POPULATIONS, PARTICLES, 2, generator=generator)
    particles = twisted_smc(
        scheduler_kernel(denoiser, chain.scheduler),
        reward,
        noise * chain.scheduler.init_noise_sigma,
        steps=STEPS,
        beta=1 / beta,
        generator=generator,
        reorder=chain.scheduler.reorder,
    )
    mean = float(estimate(particles.rewards, particles)[0])
    return mean / beta - log_normalizer(particles)[0], mean


def best_of(n: int, seed: int) -> tuple[float, float]:
    """The same of the best of n samples: ``KL = log n - (n - 1)/n``."""
    samples = MIXTURE.sample(DRAWN * n, torch.Generator().manual_seed(seed))
    return math.log(n) - (n - 1) / n, float(reward(samples).reshape(-1, n).amax(1).mean())


def measure(seed: int = 0) -> None:
    """Learn and search at three strengths of the tilt, on a flow and on a variance preserving path."""
    rows: list[list[str]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for path, process in PATHS.items():
        for beta in BETAS:
            kl, mean = frontier(beta)
            exact, start = (law.sample(DRAWN, torch.Generator().manual_seed(seed)) for law in (tilted(beta), MIXTURE))
            moved, apart = float((exact.mean(0) - start.mean(0)).norm()), sliced_wasserstein(exact, start)
            rows.append([f"{path}, beta {beta:g}: exact", f"{mean:.3f}", f"{kl:.3f}", "", ""])
            for method in METHODS:
                found, x = measured(*learn(method, process, beta))
                got = float(reward(x).mean())
                off = float((x.double().mean(0) - exact.mean(0)).norm()) / moved
                rows.append([f"  {method}", f"{got:.3f}", f"{found:.3f}", f"{100 * off:.1f} %",
                             f"{100 * sliced_wasserstein(x, exact) / apart:.1f} %"])  # fmt: skip
                points.setdefault(f"{method}, {path}", []).append((found, got))
            points.setdefault(f"steering, {path}", []).append(steered(process, beta, seed))
    points["best of n"] = [best_of(n, seed) for n in BEST_OF]
    title = f"Reward and divergence from the start; distance to the tilted law relative to the start's ({STEPS} steps)"
    print_table(title, ["", "reward", "KL", "mean", "sliced Wasserstein"], rows)
    search = [(name, found) for name, found in points.items() if name.startswith(("steering", "best"))]
    table = [[name, f"{kl:.3f}", f"{mean:.3f}"] for name, found in search for kl, mean in found]
    print_table("Without training", ["", "KL", "reward"], table)
    draw(points, "rewards.png")


def draw(points: dict[str, list[tuple[float, float]]], file: str) -> None:
    """Reward against divergence, with the exact frontier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    line = [frontier(b) for b in torch.logspace(math.log10(0.02), 1.5, 60).tolist()]
    ax.plot(*zip(*line, strict=True), color="black", linewidth=1.2, label="exact tilt: the most at its KL")
    colours = {"grpo": "#1f77b4", "adjoint matching": "#d62728", "nft": "#2ca02c", "steering": "#9467bd"}
    for name, found in points.items():
        method, _, path = name.partition(", ")
        flow = path != "VP"
        style: dict[str, Any] = {"marker": "o" if flow else "s", "markerfacecolor": None if flow else "none"}
        ax.plot(*zip(*found, strict=True), linestyle="", color=colours.get(method, "#ff7f0e"), label=name, **style)
    ax.set(xlabel="KL to the start, nats", ylabel="mean reward", xlim=(0, None))
    ax.legend(fontsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
