"""The pipeline of text on an oracle and on a random network: what is given, guided, steered and drawn by whom."""

import functools
import importlib.util
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import seeded
from token_laws import INITIAL, MASK, TRANSITION, chain, frequencies

from diffusers_sde import MarkovChainModel, MaskedDiffusionScheduler, UniformDiffusionScheduler
from diffusers_sde.training.language import new_network
from diffusers_sde.training.sequences import character_tokenizer

MODEL = MarkovChainModel(INITIAL, TRANSITION)


@functools.cache
def pipeline_module():
    path = Path(__file__).parents[2] / "pipelines" / "text_generation.py"
    spec = importlib.util.spec_from_file_location("text_generation_pipeline", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def pipeline(scheduler=None, model=MODEL, tokenizer=None):
    pipe = pipeline_module().TextGenerationPipeline(model, scheduler or MaskedDiffusionScheduler(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def letters():
    """A random network of letters with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer(["abcd efg\n"])
    return pipeline(model=new_network(None, len(tokenizer), 16, tokenizer.pad_token_id).eval(), tokenizer=tokenizer)


# -- what is given --


@pytest.mark.parametrize("block_length", [None, 2])
def test_text_between_given_tokens_has_the_conditional_law(block_length):
    """Whole or in blocks: with one call a token both are the chain's own law."""
    x = pipeline()(torch.tensor([1, MASK, MASK, 0]), num_texts=4000, block_length=block_length, generator=seeded())
    law = chain(4).table().probabilities[1, :, :, 0].flatten()
    np.testing.assert_allclose(frequencies(x.sequences[:, 1:3], 3), law / law.sum(), atol=0.025)
    assert x.calls == ([2] if block_length is None else [1, 1])


def test_guidance_sharpens_the_prompt():
    """``p(x^1|x^0) (p(x^1|x^0)/p(x^1))^{w-1}`` for one token behind one given token; at w = 1 the conditional law, with
    the sign of guidance."""
    conditional = torch.tensor(TRANSITION[1], dtype=torch.float64)
    marginal = torch.tensor(INITIAL, dtype=torch.float64) @ torch.tensor(TRANSITION, dtype=torch.float64)
    for scale in (1.0, 2.5):
        x = pipeline()(torch.tensor([1]), gen_length=1, num_texts=8000, guidance_scale=scale, generator=seeded())
        law = conditional**scale * marginal ** (1 - scale)
        np.testing.assert_allclose(frequencies(x.sequences[:, 1:], 3), law / law.sum(), atol=0.02)


def test_a_reward_tilts_the_text():
    """The mean reward of one drawn text a population, near that of the tilted law."""
    pipe = pipeline(MaskedDiffusionScheduler(algorithm_type="ancestral"))

    def reward(x):
        return (x == 2).double().sum(-1)

    out = pipe(
        gen_length=3, num_inference_steps=9, num_texts=150, reward=reward, beta=1.5, num_particles=12,
        generator=seeded(),
    )  # fmt: skip
    table = chain(3).table()
    tilted = table.tilted(reward, 1.5)
    expected = float((tilted.probabilities.flatten() * reward(table.sequences)).sum())
    plain = float((table.probabilities.flatten() * reward(table.sequences)).sum())
    assert float(reward(out.sequences).mean()) == pytest.approx(expected, abs=0.25) and expected > plain + 0.7
    with pytest.raises(ValueError, match="ancestral"):
        pipeline(diffusers.BlockRefinementScheduler())(gen_length=3, reward=reward)


# -- whose scheduler --


def test_the_stock_block_scheduler_runs_here():
    pipe = pipeline(diffusers.BlockRefinementScheduler())
    x = pipe(torch.tensor([[1, MASK, MASK, 0]]), num_texts=5, num_inference_steps=2, generator=seeded()).sequences
    assert bool((x < MASK).all()) and bool((x[:, [0, 3]] == torch.tensor([1, 0])).all())


@pytest.mark.parametrize(
    "cls", [diffusers.DiscreteDDIMScheduler, diffusers.EntropyBoundScheduler, UniformDiffusionScheduler]
)
def test_schedulers_of_uniform_noise_write_what_a_network_is_sure_of(cls):
    class Sure(torch.nn.Module):
        config, mask_token_id = types.SimpleNamespace(vocab_size=3), MASK
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids):
            return types.SimpleNamespace(logits=60.0 * torch.nn.functional.one_hot(torch.arange(4) % 3, 3)[None])

    x = pipeline(cls(), Sure())(torch.tensor([[2, MASK, MASK, MASK]]), num_inference_steps=4, generator=seeded())
    assert x.sequences.tolist() == [[2, 1, 2, 0]]


# -- text --


def test_text_goes_in_and_out(letters):
    out = letters("ab" + 3 * letters.tokenizer.mask_token + "c", gen_length=2, generator=seeded())
    assert out.sequences.shape == (1, 8) and out.texts[0].startswith("ab")
    again = letters("ab" + 3 * letters.tokenizer.mask_token + "c", gen_length=2, generator=seeded(), return_dict=False)
    assert again[1] == out.texts
    seen = []
    letters(gen_length=4, callback_on_step_end=lambda pipe, step, t, values: seen.append(values["sequences"].shape))
    assert seen == [(1, 4)] * 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompt": "abc"}, "nothing to write"),
        ({"prompt": ["a", "bc"], "gen_length": 2}, "same number"),
        ({"gen_length": 2, "output_type": "words"}, "output_type"),
        ({"gen_length": -1}, "gen_length"),
        ({"gen_length": 2, "num_inference_steps": 0}, "num_inference_steps"),
        ({"gen_length": 2, "temperature": -1.0}, "temperature"),
        ({"prompt": torch.zeros(1, 2), "gen_length": 1}, "int64"),
    ],
)
def test_wrong_inputs_are_refused(letters, options, word):
    with pytest.raises(ValueError, match=word):
        letters(**options)
