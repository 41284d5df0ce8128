"""Continuous-time Markov chains on tokens: forward laws, reversal, the bound, and the oracles they are checked with.

Lu: arXiv:2607.01693, chapter 7.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from contract_helpers import seeded
from scipy.linalg import expm
from token_laws import INITIAL, MASK, all_states, chain, clean_laws, joint, noisy_law, process_of

from diffusers_sde.discrete.bounds import any_order_loss, bound_density, masked_weight, terminal_divergence
from diffusers_sde.discrete.categorical import entropy, quantile, shape_logits
from diffusers_sde.discrete.leaps import (
    first_hitting,
    log_odds,
    remasking_probability,
    survival,
    tau_leap,
    unmasking_probability,
)
from diffusers_sde.discrete.oracles import JointTable, MarkovChain
from diffusers_sde.discrete.orders import entropy_bounded, priorities, stride_ranks, unmasked_count
from diffusers_sde.discrete.schedules import SCHEDULES, noise_schedule

NOISES = ("masked", "uniform")
EYE = torch.eye(3, dtype=torch.float64)


def close(found, expected, atol=1e-10):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=atol)


def forward_generator(process):
    return process.stationary.expand(process.states, -1) - torch.eye(process.states)


# -- forward --


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_its_slope_and_its_inverse_belong_together(name):
    schedule, t = noise_schedule(name), np.linspace(0.05, 0.95, 7)
    close(schedule.time(schedule.alpha(t)), t)
    close(schedule.slope(t), (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6, 1e-7)
    close(schedule.rate(t), -schedule.slope(t) / schedule.alpha(t))
    assert schedule.alpha(0.0) > 0.999 and schedule.alpha(1.0) < 1e-8


@pytest.mark.parametrize("noise", NOISES)
def test_the_marginal_solves_the_forward_equation(noise):
    """``q(x_t|x_0) = exp(\\int beta Q)`` with ``Q = 1 pi^T - I`` is ``alpha delta + (1 - alpha) pi`` (Lu, 7)."""
    process, alpha = process_of(noise), 0.3
    expected = expm(-math.log(alpha) * forward_generator(process).numpy())
    close(process.marginal(torch.eye(process.states, dtype=torch.float64), alpha), expected)
    x = torch.arange(process.states)
    close(process.likelihood(x, alpha), expected.T)


@pytest.mark.parametrize("noise", NOISES)
def test_noised_tokens_have_the_marginal(noise):
    process = process_of(noise)
    x = process.noised(torch.zeros(20000, dtype=torch.int64), 0.6, seeded())
    law = process.marginal(torch.eye(process.states, dtype=torch.float64)[:1], 0.6)[0]
    close(torch.bincount(x, minlength=process.states) / 20000, law, 0.012)


@pytest.mark.parametrize("noise", NOISES)
def test_the_bridge_is_bayes_rule(noise):
    """``q(x_s|x_t, x_0) = q(x_t|x_s) q(x_s|x_0)/q(x_t|x_0)`` (Lu, 7; Austin et al. 2021, arXiv:2107.03006)."""
    process, alpha_t, alpha_s = process_of(noise), 0.2, 0.5
    eye = torch.eye(process.states, dtype=torch.float64)
    first, second = process.marginal(eye, alpha_s), process.marginal(eye, alpha_t / alpha_s)
    whole = process.marginal(eye, alpha_t)
    for x0, x_t in itertools.product(range(3), range(process.states)):
        if whole[x0, x_t] > 0:
            found = process.bridge(torch.tensor([x_t]), torch.tensor([x0]), alpha_t, alpha_s)[0]
            close(found, first[x0] * second[:, x_t] / whole[x0, x_t])


# -- reversal --


@pytest.mark.parametrize("noise", NOISES)
def test_the_concrete_score_of_the_denoiser_is_the_ratio_of_the_marginals(noise):
    """``E[q(y|x_0^l)/q(x^l|x_0^l) | x] = p_t(x with x^l = y)/p_t(x)`` (Lou et al. 2023, arXiv:2310.16834, 3.1)."""
    process, oracle, alpha = process_of(noise), chain(3), 0.4
    x, law = all_states(process, 3), noisy_law(oracle, process, alpha)
    table = law.reshape((process.states,) * 3)
    found = process.ratios(x, clean_laws(oracle, process, x, alpha), alpha)
    for l, y in itertools.product(range(3), range(process.states)):  # noqa: E741
        changed = x.clone()
        changed[:, l] = y
        reachable = process.made(x[:, l])  # the reverse chain leaves no other state
        close(found[reachable, l, y], (table[tuple(changed.T)] / law)[reachable], 1e-9)


@pytest.mark.parametrize("noise", NOISES)
def test_reverse_rates_balance_the_forward_flow(noise):
    """``p_t(x) R(x -> y) = p_t(y) Q(y -> x)`` for every jump: the chain run backwards (Lu, 7)."""
    process, oracle, alpha, beta = process_of(noise), chain(2), 0.55, 1.7
    x, law = all_states(process, 2), noisy_law(oracle, process, alpha)
    rates = process.reverse_rates(x, clean_laws(oracle, process, x, alpha), alpha, beta)
    table = law.reshape((process.states,) * 2)
    for l, y in itertools.product(range(2), range(process.states)):  # noqa: E741
        changed = x.clone()
        changed[:, l] = y
        jump = x[:, l] != y
        flow = table[tuple(changed.T)] * beta * process.stationary[x[:, l]]
        close((law * rates[:, l, y])[jump], flow[jump])
        close(rates[~jump, l, y], 0)


@pytest.mark.parametrize("noise", NOISES)
def test_the_posterior_of_a_single_token_carries_one_marginal_to_the_other(noise):
    """Ancestral sampling is exact where there is nothing to factorise, from pure noise too."""
    process, oracle = process_of(noise), JointTable(INITIAL)
    states = all_states(process, 1)
    for alpha_t, alpha_s in ((0.0, 0.5), (0.3, 0.8), (0.6, 1.0)):
        law = process.posterior(states, clean_laws(oracle, process, states, alpha_t), alpha_t, alpha_s)[:, 0]
        close(noisy_law(oracle, process, alpha_t) @ law, noisy_law(oracle, process, alpha_s))


def test_tokens_among_masks_stay_whatever_a_network_says():
    process, wrong = process_of("masked"), torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    for alpha in (0.0, 0.4):
        close(process.posterior(torch.tensor([0]), wrong, alpha, 0.9), [[1, 0, 0, 0]])
        close(process.reverse_rates(torch.tensor([0]), wrong, max(alpha, 0.1)), np.zeros((1, 4)))


# -- the bound --


def integrated(process, oracle, x0, model, schedule, nodes=40):
    """The bound of a sequence, the integral over the clock of leaps by Gauss-Legendre, the mean over states exactly."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    ends = [float(schedule.time(survival(c))) for c in (12.0, -12.0)]
    low, high = math.log(ends[0] / (1 - ends[0])), math.log(ends[1] / (1 - ends[1]))
    x, total = all_states(process, oracle.length), 0.0
    for u, w in zip((points + 1) / 2 * (high - low) + low, weights * (high - low) / 2, strict=True):
        t = survival(u)
        alpha, rate = float(schedule.alpha(t)), float(schedule.rate(t))
        law = joint(
            process.marginal(EYE[x0] if process.states == 3 else torch.nn.functional.pad(EYE[x0], (0, 1)), alpha)[None]
        )
        density = bound_density(process, x, x0.expand(len(x), -1), model(x, alpha), alpha, rate)
        total += w * t * (1 - t) * float((law[0] * torch.where(law[0] > 0, density, 0.0)).sum())
    return total


@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_of_the_exact_denoiser_is_the_likelihood_under_every_schedule(noise):
    """The reversal of an exactly known chain leaves no gap (Lou et al. 2023, theorem 3.6; Lu, 7)."""
    process, oracle, x0 = process_of(noise), chain(2), torch.tensor([1, 2])
    expected = -float(oracle.log_density(x0[None]))
    for name in ("linear", "cosine", "square"):
        model = lambda x, alpha: clean_laws(oracle, process, x, alpha)  # noqa: E731
        close(integrated(process, oracle, x0, model, noise_schedule(name)), expected, 2e-4)


def wrong_laws(process, x):
    """A denoiser that is not exact: two chains' mean, off the joint law."""
    return 0.5 * clean_laws(chain(3), process, x, 0.5) + 0.5 * clean_laws(
        MarkovChain([1, 1, 1], [[1, 2, 3]] * 3, 3), process, x, 0.5
    )


def test_the_masked_bound_of_any_denoiser_is_one_under_every_schedule_and_the_mean_over_orders():
    """``\\int w(t) E[sum of cross entropies]`` with ``w = -alpha'/(1 - alpha)``: the same for linear and cosine noise,
    and the mean of ``-log p`` over all orders of autoregression (Shi et al. 2024, arXiv:2406.04329, 4; Ou et al. 2024,
    arXiv:2406.03736, theorem 2)."""
    process, oracle, x0 = process_of("masked"), chain(3), torch.tensor([0, 2, 1])
    orders = []
    for order in itertools.permutations(range(3)):
        x, total = torch.full((1, 3), MASK), 0.0
        for l in order:  # noqa: E741
            total -= math.log(float(wrong_laws(process, x)[0, l, x0[l]]))
            x[0, l] = x0[l]
        orders.append(total)
    assert np.ptp(orders) > 0.05  # each order has a bound of its own
    for name in ("linear", "cosine"):
        found = integrated(process, oracle, x0, lambda x, _: wrong_laws(process, x), noise_schedule(name))
        assert found == pytest.approx(np.mean(orders), abs=2e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_under_masking_the_score_entropy_is_a_weighted_cross_entropy(name):
    process, schedule, t = process_of("masked"), noise_schedule(name), 0.37
    x, x0 = torch.tensor([[MASK, 2, MASK]]), torch.tensor([[0, 2, 1]])
    clean = wrong_laws(process, x)
    found = bound_density(process, x, x0, clean, float(schedule.alpha(t)), float(schedule.rate(t)))
    cross_entropy = -float(clean[0, 0, 0].log() + clean[0, 2, 1].log())
    close(found, [masked_weight(schedule, t) * cross_entropy])


def test_the_mean_cross_entropy_with_a_uniform_number_of_masks_is_the_bound_per_token():
    process, x0, total = process_of("masked"), torch.tensor([0, 2, 1]), 0.0
    for count in (1, 2, 3):
        chosen = list(itertools.combinations(range(3), count))
        for positions in chosen:
            masked = torch.zeros(1, 3, dtype=torch.bool)
            masked[0, list(positions)] = True
            logits = wrong_laws(process, torch.where(masked, MASK, x0)).log()
            total += float(any_order_loss(logits, x0[None], masked)) / len(chosen) / 3
    bound = integrated(process, chain(3), x0, lambda x, _: wrong_laws(process, x), noise_schedule("linear"))
    assert 3 * total == pytest.approx(bound, abs=2e-4)


def test_what_a_schedule_leaves_at_its_end_is_counted():
    process, x0 = process_of("uniform"), torch.tensor([[0, 1]])
    law = 0.2 * EYE[0] + 0.8 / 3
    close(terminal_divergence(process, x0, 0.2), [2 * float((law * (law * 3).log()).sum())])
    close(terminal_divergence(process, x0, 0.0), [0.0])


# -- oracles --


def test_forward_backward_is_enumeration():
    oracle = chain(4)
    x = torch.tensor([[0, MASK, MASK, 1], [MASK, MASK, 2, MASK], [MASK] * 4])
    for noise, states in (("masked", x), ("uniform", x % 3)):
        evidence = process_of(noise).likelihood(states, 0.35)[..., :3]
        close(oracle.posterior(evidence), oracle.table().posterior(evidence))
    every = oracle.table().sequences
    close(oracle.log_density(every).exp(), oracle.table().probabilities.flatten())


def test_the_table_knows_conditionals_samples_and_tilts():
    table = JointTable([[0.1, 0.2], [0.3, 0.4]])
    seen = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])  # the second token is 1
    close(table.posterior(seen), [[[1 / 3, 2 / 3], [0, 1]]])
    shares = torch.bincount(table.sample(20000, seeded()) @ torch.tensor([2, 1])) / 20000
    close(shares, [0.1, 0.2, 0.3, 0.4], 0.012)
    tilted = table.tilted(lambda x: x.sum(1), math.log(2.0)).probabilities.flatten()
    close(tilted, np.array([0.1, 0.4, 0.6, 1.6]) / 2.7)
    with pytest.raises(ValueError, match="non-negative"):
        JointTable([[0.5, -0.1], [0.3, 0.3]])


# -- draws --


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Five thousand tokens of probability 1e-8 beside a certain one: each has its own stretch of the distribution
    function.  In float32 most have none, and Gumbel noise in float32 is at most 16.64, less than the 18.4 that they
    need to win (Zheng et al. 2024, arXiv:2409.02908, section 4)."""
    rare, count = 1e-8, 5000
    for first in (True, False):
        laws = torch.full((count + 1,), rare, dtype=torch.float64)
        certain = 0 if first else count
        laws[certain] = 1 - count * rare
        begin = 1 - count * rare if first else 0.0
        u = begin + rare * (torch.arange(0, count, 97, dtype=torch.float64) + 0.5)
        close(quantile(laws.expand(len(u), -1), u), torch.arange(0, count, 97) + first)
    single = torch.cat([torch.tensor([1 - count * rare]), torch.full((count,), rare)])
    assert int((single.cumsum(0).diff() > 0).sum()) < count / 4
    assert -math.log(-math.log(1 - 2.0**-24)) < -math.log(rare)


def test_impossible_tokens_are_never_drawn():
    laws = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(3, -1)
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert quantile(laws, u).tolist() == [1, 3, 3]


def test_temperature_nucleus_and_rank_shape_a_law():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    close(shape_logits(logits), [0.5, 0.3, 0.15, 0.05], 1e-7)
    close(shape_logits(logits, 0.5), np.array([25, 9, 2.25, 0.25]) / 36.5, 1e-7)
    close(shape_logits(logits, 0.0), [1, 0, 0, 0])
    close(shape_logits(logits, top_p=0.6), [0.625, 0.375, 0, 0], 1e-7)
    close(shape_logits(logits, top_k=3), np.array([0.5, 0.3, 0.15, 0]) / 0.95, 1e-7)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            shape_logits(logits, **wrong)


# -- leaps and orders --


def test_a_leap_is_the_chain_whose_rates_stay():
    """``exp(h A)`` with rates that depend on the target alone."""
    rates = torch.tensor([0.0, 0.7, 0.4], dtype=torch.float64)
    generator = torch.zeros(3, 3, dtype=torch.float64)
    generator[0] = rates
    generator[0, 0] = -rates.sum()  # the states that it leaps to are left no more
    close(tau_leap(torch.tensor([0]), rates[None], 0.8), expm(0.8 * generator.numpy())[:1])
    assert survival(log_odds(0.3)) == pytest.approx(0.3)


def test_the_next_token_is_hit_when_the_first_of_n_clocks_rings():
    """``P(alpha_tau > a) = ((1 - a)/(1 - alpha))^n``: n masks that leave independently (arXiv:2409.02908)."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    hit = first_hitting(torch.full((1000,), 4), torch.full((1000,), 0.2, dtype=torch.float64), u)
    for a in (0.3, 0.6):
        assert float((hit > a).double().mean()) == pytest.approx(((1 - a) / 0.8) ** 4, abs=1e-3)


def test_masking_again_keeps_the_marginals():
    """Of ``alpha_t delta_{x_0} + (1 - alpha_t) delta_mask`` every step makes that of alpha_s (arXiv:2503.00307)."""
    for strength, alpha_t, alpha_s in itertools.product((0.0, 0.4, 1.0), (0.0, 0.3), (0.5, 0.9)):
        sigma = remasking_probability(strength, alpha_t, alpha_s)
        unmasked = alpha_t * (1 - sigma) + (1 - alpha_t) * unmasking_probability(alpha_t, alpha_s, sigma)
        assert unmasked == pytest.approx(alpha_s) and 0 <= unmasking_probability(alpha_t, alpha_s, sigma) <= 1


def test_orders_prefer_what_their_names_say():
    laws = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.3, 0.2], [0.6, 0.2, 0.2]]], dtype=torch.float64)
    tokens = torch.tensor([[0, 2, 1]])
    first = {name: int(priorities(name, laws, tokens).argmax()) for name in ("max_probability", "margin", "entropy")}
    assert first == {"max_probability": 2, "margin": 2, "entropy": 0}
    assert int(priorities("confidence", laws, tokens).argmax()) == 0
    assert int(priorities("left_to_right", laws, tokens).argmax()) == 0
    with pytest.raises(ValueError, match="unknown"):
        priorities("alphabetical", laws, tokens)


def test_the_stride_keeps_neighbours_apart():
    assert stride_ranks(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    early = stride_ranks(100).argsort()[:25].sort().values
    assert int(early.diff().min()) >= 3


def test_a_step_unmasks_the_share_of_the_process():
    masked = torch.ones(1, 6, dtype=torch.bool)
    counts = []
    for k in range(6):
        counts.append(int(unmasked_count(masked, k / 6, (k + 1) / 6)))
        masked[0, : sum(counts)] = False
    assert counts == [1] * 6


def test_what_is_taken_together_loses_no_more_than_the_entropy_bound():
    """The joint divergence of independent draws is at most the sum of entropies without the largest: the accepted set
    is the largest of the surest (arXiv:2505.24857)."""
    laws = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5]]], dtype=torch.float64)
    own = entropy(laws)[0]
    masked = torch.tensor([[True, True, True, True]])
    for bound, count in ((0.0, 2), (float(own[1]) + 1e-9, 3), (5.0, 4)):
        assert int(entropy_bounded(laws, masked, bound).sum()) == count
    masked[0, 0] = False
    assert entropy_bounded(laws, masked, 0.0).tolist() == [[False, True, False, False]]
