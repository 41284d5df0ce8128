"""The Brownian path: its weights, its normals, and what a picture does and does not depend on."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import EDM, FLOW, VP, gaussian, loop, randn, relative, sample, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusers_sde import DPMSolverScheduler, ReverseSDEScheduler, noise
from diffusers_sde.noise import (
    brownian_weights,
    combine,
    normals,
    seeds_from_generator,
    seeds_from_int,
    seeds_from_latents,
)

SHAPE = (4, 3, 8, 8)


def dot(left, right):
    left, right = dict(left), dict(right)
    return math.fsum(w * right.get(k, 0.0) for k, w in left.items())


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@st.composite
def grids_with_tau(draw):
    """Up to 24 steps of 1e-3 to 4 in log-SNR within [-10, 7.5], wider than any schedule in use, and tau."""
    steps = draw(st.lists(st.floats(1e-3, 4.0), min_size=2, max_size=24))
    grid = draw(st.floats(-10.0, 0.0)) + np.cumsum([0.0, *steps])
    grid = grid[grid <= 7.5]
    tau = st.floats(0.05, 2.0)
    return grid, draw(st.one_of(tau, st.lists(tau, min_size=len(grid) - 1, max_size=len(grid) - 1)))


def worst_correlation(grid, tau, data_std):
    weights = brownian_weights(grid, tau=tau, data_std=data_std)
    return max((abs(dot(left, right)) for left, right in itertools.combinations(weights, 2)), default=0.0)


@settings(max_examples=100, deadline=None)
@given(grids_with_tau(), st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf]))
def test_steps_have_unit_variance(grid_and_tau, data_std):
    """The squared weights of every step sum to one."""
    for weights in brownian_weights(grid_and_tau[0], tau=grid_and_tau[1], data_std=data_std):
        assert abs(dot(weights, weights) - 1) < 1e-12


@settings(max_examples=100, deadline=None)
@given(grids_with_tau(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_steps_are_independent(grid_and_tau, data_std):
    """Different steps of one grid are orthogonal."""
    assert worst_correlation(*grid_and_tau, data_std) < 1e-11


def test_steps_of_noise_prediction_are_independent():
    """The same at data_std = inf, where the clock -s^2 spans 14 decades."""
    assert worst_correlation(np.linspace(-5, 5, 41), 1.0, math.inf) < 1e-11


def test_infinite_ends():
    """A grid from zero SNR to clean data has unit-variance, independent steps."""
    weights = brownian_weights([-math.inf, -2.0, 0.0, 3.0, math.inf], data_std=0.5)
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        assert dot(weights[i], weights[j]) == pytest.approx(float(i == j), abs=1e-11)


def test_steps_at_the_ends_of_the_span_are_steps_like_others():
    """Half log-SNRs -16 to 16, their first and last cells included: unit variance, independent."""
    weights = brownian_weights([-16.0, -15.9, -15.7, -15.2, -3.0, 15.2, 15.7, 15.9, 16.0], tau=0.25)
    for i, j in itertools.combinations_with_replacement(range(8), 2):
        assert dot(weights[i], weights[j]) == pytest.approx(float(i == j), abs=1e-10)


def test_a_clock_that_stands_still_draws_no_noise():
    """At data_std = 1000 the noise level no longer shows beside the data beyond log-SNR 10, to the last bit."""
    weights = brownian_weights([0.0, 3.0, 12.0, 12.3, 14.0], data_std=1000.0)
    assert [len(w) > 0 for w in weights] == [True, True, False, False]
    assert brownian_weights([-3.0, 8.0, 15.0], tau=[1.0, 4.0], data_std=1e10) == [(), ()]  # its slope underflows too


def test_empty_step_has_no_noise():
    """A step of no length has no weights; its neighbours are those of the grid without it."""
    double = brownian_weights([-2.0, 0.5, 0.5, 3.0])
    assert double[1] == ()
    assert [double[0], double[2]] == brownian_weights([-2.0, 0.5, 3.0])


def refined(grid, parts):
    """The grid with every step cut into equal parts."""
    return np.interp(np.arange(parts * (len(grid) - 1) + 1) / parts, np.arange(len(grid)), grid)


def uneven_grid(length, seed):
    """Up to 20 steps of 0.7 to 1.3 times a length, from about log-SNR -5 to at most 7.5, anywhere between the tree's
    places."""
    numbers = np.random.default_rng(seed)
    grid = numbers.uniform(-5, -4) + np.cumsum(numbers.uniform(0.7, 1.3, 20) * length)
    return grid[grid <= 7.5]


def weights_and_sums(grid, parts, tau, data_std):
    """For each step: its weights, those of its parts, and the share of the variance of each part by the clock C."""
    fine = refined(grid, parts)
    coarse, small = (brownian_weights(g, tau=tau, data_std=data_std) for g in (grid, fine))
    share = np.diff((data_std**2 + np.exp(-2 * fine)) ** -(tau**2)).reshape(-1, parts)
    share = np.sqrt(share / share.sum(1, keepdims=True))
    return [(w, small[parts * i : parts * (i + 1)], share[i]) for i, w in enumerate(coarse)]


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("data_std", [0.0, 0.5])
@pytest.mark.parametrize("parts", [2, 3])
def test_increment_is_the_sum_of_its_refinement(tau, data_std, parts):
    """A coarse increment of W(C) is the sum of the fine ones, scaled by their shares of the clock C, where these are a
    quarter of log-SNR or longer, wherever the nodes lie."""
    for seed in range(5):
        for whole, small, share in weights_and_sums(uneven_grid(parts * 0.36, seed), parts, tau, data_std):
            assert sum(s * dot(part, whole) for s, part in zip(share, small, strict=True)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("length", [0.4, 0.25, 0.1, 0.03])
def test_short_increments_are_nearly_the_sums_of_their_halves(length):
    """Where halves are shorter than that, the correlation is 0.8 or more and 0.92 on average, at any length."""
    steps = [step for seed in range(10) for step in weights_and_sums(uneven_grid(length, seed), 2, 1.0, 0.0)]
    correlations = [
        sum(s * dot(part, whole) for s, part in zip(share, small, strict=True)) for whole, small, share in steps
    ]
    assert min(correlations) > 0.8
    assert np.mean(correlations) > 0.92


def test_a_value_of_noise_costs_about_six_normals():
    """README: on average over the steps of the default grids, between 4 and 8."""
    means = []
    for process, n in itertools.product((VP, FLOW, EDM), (10, 20, 40)):
        scheduler = ReverseSDEScheduler(**process)
        scheduler.set_timesteps(n)
        means.append(np.mean([len(weights) for weights in brownian_weights(scheduler.levels.log_snr)[:-1]]))
    assert min(means) > 4 and max(means) < 8
    assert np.mean(means) == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("how", [{"final": "exact"}, {"grid": "linspace"}, {"grid": "karras"}], ids=str)
def test_same_picture_at_any_number_of_steps(process, tau, how):
    """One seed, one picture: on data N(0, data_std^2), where each run is exact in law, runs of 10, 20 and 40 steps
    correlate at 0.98 or more, if they go all the way to the data."""
    scheduler = ReverseSDEScheduler(**process, tau=tau, data_std=0.5, **how)
    x = randn(4, 3, 16, 16)
    fine = sample(scheduler, x, 40)
    assert cosine(sample(scheduler, x, 20), fine) >= 0.98
    assert cosine(sample(scheduler, x, 10), fine) >= 0.98


@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_defaults_keep_the_picture(process):
    """With default settings runs of 20 and 40 steps correlate at 0.98 or more, 10 and 40 at 0.9 (stock samplers:
    test_stock_sde_changes_the_picture)."""
    scheduler = ReverseSDEScheduler(**process)
    x = randn(4, 3, 16, 16)
    fine = sample(scheduler, x, 40)
    assert cosine(sample(scheduler, x, 20), fine) >= 0.98
    assert cosine(sample(scheduler, x, 10), fine) >= 0.9


@pytest.mark.parametrize("stock", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_stock_sde_changes_the_picture(stock):
    """What the Brownian path repairs: diffusers' SDE samplers, same seed, 20 and 40 steps."""
    kwargs = {"algorithm_type": "sde-dpmsolver++"} if stock.startswith("DPM") else {}
    scheduler = getattr(diffusers, stock)(**VP, **kwargs)
    x, ours = randn(4, 3, 16, 16), ReverseSDEScheduler(**VP)

    def run(n):
        scheduler.set_timesteps(n)
        y, noise = x * scheduler.init_noise_sigma, seeded(1)
        for t in scheduler.timesteps:
            unit = y if stock.startswith("DPM") else scheduler.scale_model_input(y, t)
            y = scheduler.step(gaussian(ours)(unit, t), t, y, generator=noise, return_dict=False)[0]
        return y

    assert cosine(run(20), run(40)) < 0.6


def test_noise_decides_the_picture():
    """The correlation is the noise's doing: with other seeds the same latents end somewhere else."""
    x = randn(4, 3, 16, 16)
    a, b = (sample(ReverseSDEScheduler(**VP, noise_seed=seed), x, 20) for seed in (1, 2))
    assert abs(cosine(a, b)) < 0.1


@pytest.mark.parametrize("corrector", [True, False])
def test_refinement_converges(corrector):
    """Strong convergence: the distance to a 160-step run of the same path shrinks with the number of steps."""
    scheduler = ReverseSDEScheduler(**VP, corrector=corrector)
    x = randn(4, 3, 8, 8)
    fine = sample(scheduler, x, 160)
    errors = [relative(sample(scheduler, x, n), fine) for n in (10, 20, 40, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("given", ["latents", "generators"])
def test_batch_of_four_is_four_batches_of_one(given):
    """A sample does not depend on its neighbours, bit for bit."""
    x = randn(*SHAPE)

    def run(part, index):
        generators = [seeded(k) for k in index] if given == "generators" else None
        return sample(ReverseSDEScheduler(**VP), part, 6, generator=generators)

    whole = run(x, range(4))
    for k in range(4):
        assert torch.equal(whole[k : k + 1], run(x[k : k + 1], [k]))


def test_same_latents_same_picture():
    """Without a generator the latents are the seed, in another scheduler too."""
    x = randn(*SHAPE)
    assert torch.equal(sample(ReverseSDEScheduler(**VP), x, 6), sample(ReverseSDEScheduler(**VP), x.clone(), 6))


def test_different_latents_different_noise():
    """A change of one element in the last place gives independent noise."""
    x = randn(1, 3, 32, 32)
    y = x.clone()
    y[0, 0, 0, 0] = torch.nextafter(y[0, 0, 0, 0], torch.tensor(9.0))
    a, b = (normals(seeds_from_latents(v), 1, v.shape) for v in (x, y))
    assert abs(cosine(a, b)) < 4 / math.sqrt(x.numel())


def test_latents_are_hashed_with_their_places():
    """Permuted latents are other latents."""
    x = randn(1, 3, 8, 8)
    assert seeds_from_latents(x) != seeds_from_latents(x.flip(-1))


def test_global_random_state_is_left_alone():
    """Sampling draws nothing from torch's global generator."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(ReverseSDEScheduler(**VP), randn(*SHAPE), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_generator_decides():
    """The same generator seed gives the same picture, another seed another one."""
    x = randn(*SHAPE)
    scheduler = ReverseSDEScheduler(**VP)
    a, b, c = (sample(scheduler, x, 6, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert abs(cosine(a, c)) < 0.3


def test_one_generator_gives_every_sample_its_own_noise():
    """Equal latents in one batch with a single generator do not end in equal pictures."""
    x = randn(1, 3, 8, 8).expand(3, -1, -1, -1).contiguous()
    out = sample(ReverseSDEScheduler(**VP), x, 6, generator=seeded())
    assert max(abs(cosine(out[i], out[j])) for i, j in [(0, 1), (0, 2), (1, 2)]) < 0.5


def test_list_of_generators():
    """With a list, sample k follows generator k wherever it stands in the batch; a list of one is that generator."""
    x = randn(1, 3, 8, 8).expand(3, -1, -1, -1).contiguous()
    scheduler = ReverseSDEScheduler(**VP)
    a = sample(scheduler, x, 6, generator=[seeded(k) for k in (0, 1, 2)])
    b = sample(scheduler, x, 6, generator=[seeded(k) for k in (2, 0, 1)])
    assert torch.equal(a, b[[1, 2, 0]])
    single = sample(scheduler, x, 6, generator=seeded(4))
    assert torch.equal(single, sample(scheduler, x, 6, generator=[seeded(4)]))


def test_wrong_number_of_generators():
    """Neither one generator nor one per sample: a ValueError that says both numbers."""
    with pytest.raises(ValueError, match="2 generators for a batch of 4"):
        sample(ReverseSDEScheduler(**VP), randn(*SHAPE), 3, generator=[seeded(0), seeded(1)])


@pytest.mark.parametrize("make", [ReverseSDEScheduler, DPMSolverScheduler], ids=lambda cls: cls.__name__)
def test_noise_seed(make):
    """config.noise_seed fixes the noise for all latents; a generator goes before it."""
    kwargs = {"algorithm_type": "sde-dpmsolver++"} if make is DPMSolverScheduler else {}
    scheduler = make(**VP, noise_seed=7, **kwargs)
    x = randn(*SHAPE)

    def increments(x, **given):
        scheduler.set_timesteps(6)
        t = scheduler.timesteps[0]
        out = scheduler.step(gaussian(scheduler)(x, t), t, x, **given)
        return (out.prev_sample - out.prev_sample_mean) / out.noise_std

    torch.testing.assert_close(increments(x), increments(randn(*SHAPE, seed=1)), atol=1e-4, rtol=0)
    assert abs(cosine(increments(x), increments(x, generator=seeded(7)))) < 0.2
    assert abs(cosine(increments(x)[0], increments(x)[1])) < 0.3


@pytest.mark.parametrize("data_std", [None, 0.5])
def test_start_in_the_middle_draws_the_same_increments(data_std):
    """A run that begins at step k uses the noise that the full run has there."""
    scheduler = ReverseSDEScheduler(**VP, noise_seed=1, solver_order=1, corrector=False, data_std=data_std)
    states = []
    whole = sample(scheduler, randn(*SHAPE), 8, states=states)
    for k in range(8):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(k)
        torch.testing.assert_close(loop(scheduler, states[k], start=k), whole, atol=1e-6, rtol=1e-6)


def test_noise_has_the_stated_standard_deviation():
    """``prev_sample - prev_sample_mean`` is ``noise_std`` times a standard normal."""
    scheduler = ReverseSDEScheduler(**VP)
    scheduler.set_timesteps(5)
    x = randn(1, 3, 128, 128)
    for t in scheduler.timesteps:
        out = scheduler.step(gaussian(scheduler)(x, t), t, x)
        if out.noise_std:
            z = ((out.prev_sample - out.prev_sample_mean) / out.noise_std).flatten()
            assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * len(z))
        else:
            assert torch.equal(out.prev_sample, out.prev_sample_mean)
        x = out.prev_sample
    assert out.noise_std == 0


# -- normals --

MANY = torch.Size((8, 4, 128, 128))


def drawn(seed=0, node=1, shape=MANY):
    return normals(seeds_from_int(seed, shape[0], torch.device("cpu")), node, shape)


GOLDEN = 0x9E3779B97F4A7C15


def signed(x):
    return (x + 2**63) % 2**64 - 2**63


def mixed(x):
    """splitmix64's finaliser (Steele et al. 2014) on signed integers, whose shifts are arithmetic."""
    x = signed(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = signed((x ^ (x >> shift)) * factor)
    return x ^ (x >> 31)


def word(x):
    return (x + 2**31) % 2**32 - 2**31


def bytes_of_node(seed, node, count):
    """The ``count`` bytes of a node, and the number from -1 to 1 by which its tile is scaled."""
    factor, summand = (mixed((2 * node + k) * GOLDEN) for k in (0, 1))
    key = signed(signed(seed * signed(2 * (factor | 1))) + (summand | 1))
    times, plus = word(key), key >> 32
    found = []
    for place in range(1, count // 4 + 1):
        x = word(word(mixed(place * GOLDEN)) * times + plus)
        x = word((x ^ (x >> 15)) * 0x2C1B3C6D)
        found += [(x >> shift & 0xFF ^ 0x80) - 0x80 for shift in (0, 8, 16, 24)]
    return np.array(found), times / 2**31


def walsh(n):
    """Q of 16 elements: a Hadamard matrix, its rows with the signs of a bent function."""
    k = range(n)
    sign = [(-1) ** ((i & i >> 1 ^ i >> 2 & i >> 3) & 1) for i in k]
    return np.array([[sign[i] * (-1) ** bin(i & j).count("1") for j in k] for i in k]) / math.sqrt(n)


@pytest.mark.parametrize("node", [1, 77, (1 << 40) + 12345])
def test_normals_are_hashed_bytes_under_an_orthogonal_transform(node):
    """One seed, one picture, in every version: seeds hash(hash(seed) + k); elements i apart by a sixteenth of the
    sample and by a 256th are transformed; all is exact in integers, 2^13 to a standard deviation."""
    found = normals(seeds_from_int(9, 2, torch.device("cpu")), node, (2, 500))
    for k in range(2):
        uniform, spread = bytes_of_node(mixed(mixed(9) + k), node, 512)
        whole = np.float32(round(2**20 / math.sqrt((256**2 - 1) / 12)))
        weight = np.round(whole * (1 + spread * math.sqrt(0.9 / 512)))
        sums = np.round((weight * uniform + whole / 2) / 128).reshape(16, 16, 2)
        exact = np.einsum("ij,kl,jlb->ikb", walsh(16), walsh(16), sums) / 2**13
        np.testing.assert_array_equal(found[k].numpy(), exact.ravel()[:500].astype(np.float32))


def test_large_samples_are_cut_into_tiles():
    """Beyond 2^14 elements each tile has a seed of its own, hash(seed + tile golden)."""
    whole = normals(seeds_from_int(9, 2, torch.device("cpu")), 3, (2, 40000))
    for k, tile in itertools.product(range(2), range(3)):
        seed = mixed(mixed(mixed(9) + k) + tile * GOLDEN)
        part = normals(torch.tensor([seed]), 3, (1, 2**14))[0]
        assert torch.equal(whole[k, tile * 2**14 : (tile + 1) * 2**14], part[: 40000 - tile * 2**14])


def test_words_of_a_tile_have_different_places():
    """Two words of one place would be the same for all seeds and nodes."""
    places = [word(mixed(place * GOLDEN)) for place in range(1, 2**12 + 1)]
    assert len(set(places)) == 2**12


def test_what_is_constant_is_a_sum_of_all_bytes():
    """The mean of a column of 256 elements is no single byte: its kurtosis is that of a sum, not 1.8."""
    weights = np.kron(walsh(16), walsh(16)).T @ np.full(256, 1 / 16)
    np.testing.assert_allclose(np.abs(weights), 1 / 16, rtol=1e-12)


def test_the_norm_of_a_noise_varies_as_that_of_normals():
    """Variance 2/n of the mean square over n elements, though squares of uniforms have 0.8/n, within 4 errors."""
    n, samples = 1024, 4096
    squares = normals(seeds_from_int(0, samples, torch.device("cpu")), 5, (samples, n)).double().square().mean(1)
    assert float(squares.var()) * n / 2 == pytest.approx(1, abs=4 * math.sqrt(2 / samples))


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    """On a GPU: what torch.compile cannot do is done as on the host, and not tried again."""
    tries = []

    def broken(function, **how):
        def compiled(*arguments):
            tries.append(how)
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    on_gpu = noise._tile_noise_on.__wrapped__("cuda")
    shape, seeds = (2, 512), seeds_from_int(4, 2, torch.device("cpu"))
    out = torch.empty(shape)
    row, tables = noise._row(((7, 1.0),), 512, seeds.device), noise._rotations(seeds.device)
    for _ in range(2):
        on_gpu(out.zero_(), seeds, *row, noise._places(128, seeds.device), *tables)
        assert torch.equal(out, normals(seeds, 7, shape))
    assert tries == [{"dynamic": True}]


def test_threads_do_not_share_memory():
    """Samples made at the same time are those made one after the other."""
    weights, seeds = ((5, 0.6), (70, 0.8)), [seeds_from_int(k, 4, torch.device("cpu")) for k in range(8)]

    def make(which):
        return combine(weights, which, (4, 3, 64, 64))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, seeds * 4))
    assert all(torch.equal(made, make(which)) for made, which in zip(together, seeds * 4, strict=True))


def test_seeds_of_a_generator_are_hashes_of_its_integers_of_both_signs():
    """One generator for all samples gives as many integers, one for each sample one integer each."""
    one = seeds_from_generator(seeded(3), 8, torch.device("cpu"))
    integers = torch.randint(-(2**62), 2**62, (8,), generator=seeded(3)).tolist()
    assert one.tolist() == [mixed(x) for x in integers] and min(integers) < 0 < max(integers)
    each = seeds_from_generator([seeded(3), seeded(4)], 2, torch.device("cpu"))
    first = [torch.randint(-(2**62), 2**62, (1,), generator=seeded(s)).item() for s in (3, 4)]
    assert each.tolist() == [mixed(x) for x in first]


def test_seeds_live_where_they_are_asked_for():
    assert seeds_from_int(3, 4, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("node", [1, 2, 3, 1 << 20, (1 << 40) + 12345])
def test_normals_are_standard(node):
    """Mean, variance, skewness and kurtosis of half a million values are within four standard errors."""
    z = drawn(node=node).double().flatten()
    n = len(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(z.numpy())) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z.numpy())) < 4 * math.sqrt(24 / n)


@pytest.mark.parametrize("node", [1, 5, 1 << 20])
def test_normals_pass_kolmogorov_smirnov(node):
    """The distribution function is the normal one."""
    z = drawn(seed=1, node=node).flatten().double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3


def correlation_is_zero(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return abs(float((a * b).mean())) * math.sqrt(len(a)) < 4.5


@pytest.mark.parametrize("other", [2, 3, 4, 7, 1 << 20, (1 << 40) + 1])
def test_nodes_are_independent(other):
    """Values at different nodes of the tree neither correlate nor do their squares."""
    a, b = drawn(node=1), drawn(node=other)
    assert correlation_is_zero(a, b)
    assert correlation_is_zero((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2))


@pytest.mark.parametrize("lag", [1, 2, 64, 128, 1024, 16384, 32768])
def test_elements_are_independent(lag):
    """Nor do the elements of one sample (64 and 1024 apart are elements of one transform)."""
    z = drawn().flatten(1)
    a, b = z[:, :-lag], z[:, lag:]
    assert correlation_is_zero(a, b)
    assert correlation_is_zero((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2))


def test_samples_of_a_batch_are_independent():
    """Nor do the samples of a batch."""
    z = drawn()
    assert all(correlation_is_zero(z[i], z[j]) for i, j in itertools.combinations(range(len(z)), 2))


def test_consecutive_seeds_are_independent():
    """Nor do noise seeds that differ by one, nor generators that do."""
    z = [drawn(seed=s, shape=torch.Size((1, 4, 128, 128))) for s in range(6)]
    seeds = [seeds_from_generator(seeded(s), 1, torch.device("cpu")) for s in range(6)]
    z += [normals(s, 1, torch.Size((1, 4, 128, 128))) for s in seeds]
    assert all(correlation_is_zero(a, b) for a, b in itertools.combinations(z, 2))


def test_seeds_times_nodes_do_not_collide():
    """No (seed, node) pair of a large table repeats another's noise, as an additive key would."""
    seeds = seeds_from_int(0, 64, torch.device("cpu"))
    first = torch.cat([normals(seeds, node, torch.Size((64, 4))) for node in range(1, 257)])
    assert len({tuple(row) for row in first.tolist()}) == 64 * 256


def test_odd_shapes():
    """An element does not depend on what the tensor's other dimensions are called, and odd sizes work."""
    seeds = seeds_from_int(0, 2, torch.device("cpu"))
    assert normals(seeds, 1, torch.Size((2, 7))).shape == (2, 7)
    assert torch.equal(normals(seeds, 1, torch.Size((2, 3, 5))).flatten(1), normals(seeds, 1, torch.Size((2, 15))))


def test_combine_is_the_weighted_sum():
    """``combine`` adds weight times normals of each node, up to the rounding of sums to 2^-13 and of weights to
    2^-14."""
    seeds = seeds_from_int(0, 2, torch.device("cpu"))
    shape = torch.Size((2, 500))
    expected = 0.6 * normals(seeds, 1, shape) + 0.8 * normals(seeds, 9, shape)
    gap = combine([(1, 0.6), (9, 0.8)], seeds, shape) - expected
    assert gap.std() < 2**-13 and gap.abs().max() < 5 * 2**-13
