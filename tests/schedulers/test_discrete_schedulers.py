"""Schedulers of tokens on an oracle that says every conditional exactly: what they cost, and in whose pipelines they
run.

Lu: arXiv:2607.01693, chapter 7.
"""

import itertools
import types

import diffusers
import numpy as np
import pytest
import torch
import transformers
from contract_helpers import seeded
from helpers import order_of
from token_laws import (
    INITIAL,
    MASK,
    MILD,
    TRANSITION,
    chain,
    entropy_of,
    frequencies,
    law_of_sampler,
    noisy_law,
    process_of,
    total_variation,
    true_law,
)

from diffusers_sde import MarkovChainModel, MaskedDiffusionScheduler, UniformDiffusionScheduler
from diffusers_sde.discrete.leaps import log_odds, survival
from diffusers_sde.schedulers.discrete import Row
from diffusers_sde.schedulers.masked_diffusion import ALGORITHMS

CLASSES = {"masked": MaskedDiffusionScheduler, "uniform": UniformDiffusionScheduler}
MODEL = MarkovChainModel(INITIAL, TRANSITION)


def interior(count, two_stages):
    """``count`` evaluations between survival 0.1 and 0.9, equally spaced."""
    alphas = np.linspace(0.1, 0.9, count // (1 + two_stages) + 1)
    rows = []
    for start, end in itertools.pairwise(alphas):
        if two_stages:
            middle = survival((log_odds(start) + log_odds(end)) / 2)
            rows += [Row(1 - start, start, end, "first"), Row(1 - middle, start, end, "second")]
        else:
            rows.append(Row(1 - start, start, end))
    return rows


def errors(noise, algorithm, counts, transition=MILD):
    process, oracle = process_of(noise), chain(3, transition)
    truth = noisy_law(oracle, process, 0.9)
    rows = [interior(count, algorithm == "theta_trapezoidal") for count in counts]
    scheduler = CLASSES[noise](algorithm_type=algorithm)
    return [total_variation(law_of_sampler(scheduler, oracle, process, r), truth) for r in rows]


def sampled(scheduler, calls, n=6000, length=4, x=None, **options):
    """Samples (n, length) of the oracle's model, and the calls that they took."""
    scheduler.set_timesteps(calls)
    generator, x = seeded(), torch.full((n, length), MASK) if x is None else x
    for used, t in enumerate(scheduler.timesteps):
        if not bool((x == MASK).any()):
            return x, used
        logits = MODEL(x).logits
        x = scheduler.step(logits, t, x, mask_token_id=MASK, generator=generator, **options).prev_sample
    return x, len(scheduler.timesteps)


def chi_squared(x, law):
    """Of as many degrees of freedom as there are sequences, less one."""
    return float(((frequencies(x, 3) - law) ** 2 / law).sum() * len(x))


# -- orders of convergence --


@pytest.mark.parametrize("noise", CLASSES)
@pytest.mark.parametrize("algorithm", ["ancestral", "tau_leaping"])
def test_ancestral_steps_and_tau_leaping_are_of_first_order(noise, algorithm):
    """Lu, 7; Ren et al. 2024, arXiv:2410.03601."""
    np.testing.assert_allclose(order_of(errors(noise, algorithm, (16, 32))), 1, atol=0.07)


@pytest.mark.parametrize("noise", CLASSES)
def test_the_theta_trapezoidal_method_is_of_second_order(noise):
    """Ren et al. 2025, arXiv:2502.00234, theorem 5.4, on a chain whose rates change too little for the positive part to
    act."""
    found = order_of(errors(noise, "theta_trapezoidal", (16, 32)))
    np.testing.assert_allclose(found, 1.92, atol=0.06)


def test_where_the_positive_part_acts_the_second_order_is_lost_but_not_the_gain():
    first, second = errors("masked", "theta_trapezoidal", (16, 32), TRANSITION)
    assert np.log2(first / second) < 1.5
    assert second < 0.5 * errors("masked", "ancestral", (32,), TRANSITION)[0]


@pytest.mark.parametrize("noise", CLASSES)
def test_from_pure_noise_to_data_two_stages_beat_one_with_the_same_calls(noise):
    process, oracle = process_of(noise), chain(3)
    truth, cls = true_law(oracle, process), CLASSES[noise]
    one, two = (
        total_variation(law_of_sampler(cls(algorithm_type=a), oracle, process, 16), truth)
        for a in ("ancestral", "theta_trapezoidal")
    )
    assert two < 0.6 * one


def test_out_of_uniform_noise_two_stages_need_half_of_the_stock_schedulers_calls():
    """16 against 32 of DiscreteDDIMScheduler, whose law is that of ancestral steps."""
    process, oracle = process_of("uniform"), chain(3)
    truth = true_law(oracle, process)
    ours = law_of_sampler(UniformDiffusionScheduler("theta_trapezoidal"), oracle, process, 16)
    stock = law_of_sampler(UniformDiffusionScheduler("ancestral"), oracle, process, 32)
    assert total_variation(ours, truth) < 0.8 * total_variation(stock, truth)


# -- one call a token --


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a not in ("ancestral", "tau_leaping", "confidence")])
def test_one_token_a_call_is_exact_in_every_order_that_does_not_look_at_the_draw(algorithm):
    """First-hitting is the process itself (Zheng et al. 2024, arXiv:2409.02908, proposition 4.1); any other order is
    one of autoregression.  Two stages are not exact and left out."""
    if algorithm == "theta_trapezoidal":
        return
    x, _ = sampled(MaskedDiffusionScheduler(algorithm_type=algorithm, entropy_bound=0.0), 4)
    assert chi_squared(x, true_law(chain(4), process_of("uniform"))) < 130  # 80 degrees of freedom


def test_the_confidence_order_is_the_worst_of_all_with_a_fraction_of_the_entropy():
    """Five positions, five calls: every order but one is at the truth's noise; the popular one keeps less than a third
    of the entropy, and more calls do not help."""
    truth = true_law(chain(5), process_of("uniform"))
    laws = {
        name: frequencies(sampled(MaskedDiffusionScheduler(algorithm_type=name), 5, 3000, 5)[0], 3)
        for name in ("ancestral", "first_hitting", "entropy", "confidence")
    }
    distance = {name: total_variation(law, truth) for name, law in laws.items()}
    assert distance["first_hitting"] < 0.1 and distance["entropy"] < 0.1  # 0.08 is what 3000 exact samples have
    assert distance["ancestral"] == pytest.approx(0.163, abs=0.02)
    assert distance["confidence"] > 0.55
    assert entropy_of(laws["confidence"]) < entropy_of(truth) / 3 < entropy_of(laws["entropy"]) / 2.5
    more = frequencies(sampled(MaskedDiffusionScheduler(algorithm_type="confidence"), 15, 500, 5)[0], 3)
    assert total_variation(more, truth) > 0.55


def test_the_entropy_bound_stops_when_everything_is_sure():
    """A chain that repeats its first token: one call for that, one for all others."""
    model = MarkovChainModel([0.5, 0.5], [[1, 0], [0, 1]])
    scheduler = MaskedDiffusionScheduler(algorithm_type="entropy_bound", entropy_bound=0.1)
    scheduler.set_timesteps(8)
    x = torch.full((5, 6), 2)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(model(x).logits, t, x, mask_token_id=2, generator=seeded()).prev_sample
    assert bool((x == x[:, :1]).all()) and bool((x < 2).all())


def test_given_tokens_are_not_masked_again():
    given = torch.tensor([True, False, False, False])
    x = torch.tensor([[1, MASK, MASK, MASK]]).expand(50, -1)
    scheduler = MaskedDiffusionScheduler(algorithm_type="ancestral", remasking=1.0)
    assert bool((sampled(scheduler, 8, x=x, prompt_mask=given)[0][:, 0] == 1).all())


# -- given tokens --


@pytest.mark.parametrize("algorithm", ["first_hitting", "entropy", "stride"])
def test_infilling_has_the_conditional_law(algorithm):
    """``p(x^1, x^2 | x^0 = 1, x^3 = 0)``: given tokens are evidence (Lu, 7)."""
    x, _ = sampled(
        MaskedDiffusionScheduler(algorithm_type=algorithm), 2, x=torch.tensor([[1, MASK, MASK, 0]]).expand(6000, -1)
    )
    law = chain(4).table().probabilities[1, :, :, 0].flatten()
    shares = frequencies(x[:, 1:3], 3)
    np.testing.assert_allclose(shares, law / law.sum(), atol=0.02)
    assert bool((x[:, 0] == 1).all()) and bool((x[:, 3] == 0).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_given_tokens_stay(algorithm):
    x = torch.tensor([[1, MASK, MASK, 0]]).expand(20, -1)
    found, _ = sampled(MaskedDiffusionScheduler(algorithm_type=algorithm), 5, x=x)
    assert bool((found[:, [0, 3]] == torch.tensor([1, 0])).all()) and bool((found < MASK).all())


# -- the contract --


def test_a_step_is_told_by_its_time_or_its_number():
    scheduler = MaskedDiffusionScheduler(noise_schedule="cosine")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.dtype == torch.float32 and float(scheduler.timesteps[0]) == 1
    assert bool((scheduler.timesteps > 0).all())
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.row(t) == scheduler.row(i) == scheduler.row(torch.tensor(i)) == scheduler.row(float(t))
    assert scheduler.row(9) == scheduler.row(4)


@pytest.mark.parametrize("algorithm", ["ancestral", "theta_trapezoidal"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7])
def test_as_many_calls_are_made_as_are_asked_for(calls, algorithm):
    scheduler = MaskedDiffusionScheduler(algorithm_type=algorithm)
    scheduler.set_timesteps(calls)
    assert len(scheduler.timesteps) == calls
    assert bool((scheduler.timesteps.diff() < 0).all())
    x, used = sampled(scheduler, calls, 50)
    assert bool((x < MASK).all()) and used <= calls


def test_the_mask_is_never_drawn_and_its_absence_is_named():
    scheduler = MaskedDiffusionScheduler(num_inference_steps=1)
    logits = torch.zeros(2, 3, 4)
    logits[..., MASK] = 50.0
    x = torch.full((2, 3), MASK)
    assert bool((scheduler.step(logits, 0, x, mask_token_id=MASK).prev_sample < MASK).all())
    with pytest.raises(ValueError, match="mask_token_id"):
        scheduler.step(logits, 0, x)


def test_two_stages_out_of_order_are_refused():
    scheduler = MaskedDiffusionScheduler(algorithm_type="theta_trapezoidal", num_inference_steps=4)
    x = torch.full((1, 4), MASK)
    with pytest.raises(ValueError, match="second stage"):
        scheduler.step(MODEL(x).logits, 2, x, mask_token_id=MASK)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"algorithm_type": "best"}, "algorithm_type"),
        ({"theta": 1.0}, "theta"),
        ({"remasking": 0.5}, "remasking"),
        ({"noise_schedule": "steep"}, "noise_schedule"),
    ],
)
def test_wrong_settings_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        MaskedDiffusionScheduler(**options)


def test_one_generator_one_text():
    scheduler = MaskedDiffusionScheduler()
    assert torch.equal(sampled(scheduler, 3, 20)[0], sampled(scheduler, 3, 20)[0])


def test_stock_configs_become_ours_and_ours_are_saved(tmp_path):
    ours = MaskedDiffusionScheduler.from_config(diffusers.BlockRefinementScheduler(block_length=7).config)
    assert ours.config.block_length == 7
    MaskedDiffusionScheduler(algorithm_type="entropy", temperature=0.7).save_pretrained(tmp_path)
    again = MaskedDiffusionScheduler.from_pretrained(tmp_path)
    assert (again.config.algorithm_type, again.config.temperature) == ("entropy", 0.7)


def test_uniform_ancestral_steps_have_the_law_of_the_stock_scheduler():
    """DiscreteDDIMScheduler draws a clean token, then a route; the law of both together is the posterior."""
    logits = torch.tensor([[[0.2, 1.0, -0.5]]])
    x, n = torch.tensor([[2]]), 20000
    ours, stock = UniformDiffusionScheduler(), diffusers.DiscreteDDIMScheduler()
    shares = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(4)
        drawn = scheduler.step(
            logits.expand(n, 1, 3), 1, x.expand(n, 1), temperature=1.0, generator=seeded()
        ).prev_sample
        shares.append(torch.bincount(drawn[:, 0], minlength=3) / n)
    np.testing.assert_allclose(*shares, atol=0.015)


# -- diffusers' pipelines --


class Tokenizer:
    """What the pipelines ask of one."""

    eos_token_id, mask_token_id, chat_template = None, MASK, None

    def apply_chat_template(self, *args, **kwargs):
        return {"input_ids": torch.tensor([[0, 1]])}


@pytest.mark.parametrize("algorithm", ["first_hitting", "entropy", "ancestral"])
def test_llada2_samples_the_oracle_with_our_scheduler(algorithm):
    """Blocks of the chain one after the other, with the law of the chain where one token is drawn a call."""
    pipe = diffusers.LLaDA2Pipeline(MODEL, MaskedDiffusionScheduler(algorithm_type=algorithm), Tokenizer())
    pipe.set_progress_bar_config(disable=True)
    start = torch.full((3000, 1), 1)
    out = pipe(
        input_ids=start, gen_length=3, block_length=2, num_inference_steps=2, temperature=1.0, output_type="seq",
        generator=seeded(),
    ).sequences  # fmt: skip
    assert out.shape == (3000, 3) and bool((out < MASK).all())
    law = chain(4).table().probabilities[1].flatten()
    if algorithm != "ancestral":
        np.testing.assert_allclose(frequencies(out, 3), law / law.sum(), atol=0.03)


def test_a_text_that_ended_is_left_alone():
    scheduler = MaskedDiffusionScheduler()
    x = torch.tensor([[0, 2, 1, MASK], [0, MASK, 2, 1], [2, 1, 1, 1]])
    known = torch.zeros(3, dtype=torch.bool)
    found = scheduler.check_eos_finished(x, x, x > 0, known, eos_token_id=2, mask_token_id=MASK, prompt_length=1)
    assert found.tolist() == [True, False, False]


@pytest.mark.parametrize("algorithm", ["ancestral", "tau_leaping", "theta_trapezoidal"])
def test_diffusion_gemma_writes_with_our_scheduler_what_its_decoder_is_sure_of(algorithm):
    pipe = diffusers.DiffusionGemmaPipeline(
        gemma_like(), UniformDiffusionScheduler(algorithm_type=algorithm), Tokenizer()
    )
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a", gen_length=8, num_inference_steps=5, temperature=1.0, output_type="seq", generator=seeded())
    assert out.sequences.tolist() == [[0, 1, 2, 0] * 2]


def gemma_like():
    """A model with the parts of DiffusionGemma that its pipeline touches, sure of 0, 1, 2, 0 on its canvas."""

    class Model(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def __init__(self):
            super().__init__()
            text = transformers.LlamaConfig(vocab_size=3, num_hidden_layers=1)
            self.config = types.SimpleNamespace(canvas_length=4, get_text_config=lambda decoder: text)
            decoder = types.SimpleNamespace(create_diffusion_decoder_attention_mask=lambda **kwargs: None)
            self.model = types.SimpleNamespace(encoder=lambda **kwargs: None, decoder=decoder)

        def forward(self, decoder_input_ids, **kwargs):
            sure = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3)
            return types.SimpleNamespace(logits=60.0 * sure)

    return Model()
