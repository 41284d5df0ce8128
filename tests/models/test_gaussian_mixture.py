"""The mixture oracle as a diffusers model: what it says to pipelines, in their dtypes, and how it is saved."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import randn, relative, seeded

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler

ONE = {"weights": [0.3, 0.6, 0.1], "means": [[-1.0], [0.5], [2.0]], "covariances": [0.05, 0.2, 0.5]}
TWO = {
    "weights": [2.0, 1.0, 1.0],
    "means": [[-1.0, 0.3], [0.8, -0.4], [0.0, 1.0]],
    "covariances": [[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.3]], [[0.2, 0.0], [0.0, 0.1]]],
}
KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "score"]


def test_conditioning_keeps_the_process():
    """The conditioned mixture is a network for the same process, and for samples of the same shape."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1, process={"prediction_type": "v_prediction"})
    v = torch.tensor([1.0, 0.0])
    for other in (model.tilted(v), model.posterior(v[None], torch.tensor([0.0]), 0.5)):
        assert other.sample_shape == (2, 1, 1)
        alpha, sigma = (float(a) for a in model.path.alpha_sigma(400.0))
        x = randn(3, 2, 1, 1, dtype=torch.float64)
        torch.testing.assert_close(other(x, 400).sample, v_of(other, x, alpha, sigma))


def v_of(model, x, alpha, sigma):
    """alpha eps - sigma x_0."""
    mean = model.posterior_mean(x, alpha, sigma)
    return alpha * (x - alpha * mean) / sigma - sigma * mean


def test_samples_follow_their_generator():
    """The same generator seed gives the same samples."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1)
    assert torch.equal(model.sample(5, seeded(3)), model.sample(5, seeded(3)))
    assert model.sample(5, seeded(3)).shape == (5, 2, 1, 1)


# -- as a network --


@pytest.mark.parametrize("kind", KINDS)
def test_forward_says_what_its_process_says(kind):
    """``forward`` is the exact prediction of the process's type, from D and E[eps|x_t] = (x - alpha D)/sigma."""
    model = GaussianMixtureModel(**TWO, process={"prediction_type": kind})
    x = randn(4, 1, 1, 2, dtype=torch.float64)
    alpha, sigma = (float(a) for a in model.path.alpha_sigma(300.0))
    mean = model.posterior_mean(x, alpha, sigma)
    eps = (x - alpha * mean) / sigma
    expected = {
        "epsilon": eps,
        "sample": mean,
        "v_prediction": alpha * eps - sigma * mean,
        "flow_prediction": eps - mean,
        "score": -eps / sigma,
    }[kind]
    torch.testing.assert_close(model(x, 300).sample, expected)
    assert torch.equal(model(x, 300, return_dict=False)[0], model(x, 300).sample)


def test_forward_of_edm():
    """Under EDM it is the preconditioned output: EDMEuler's ``precondition_outputs`` turns it into E[x_0|x_t]."""
    model = GaussianMixtureModel(**TWO, process={"sigma_data": 0.5})
    stock = diffusers.EDMEulerScheduler()
    sigma = 1.7
    x = sigma * randn(4, 1, 1, 2, dtype=torch.float64)
    said = model(x, 0.25 * math.log(sigma)).sample
    torch.testing.assert_close(stock.precondition_outputs(x, said, sigma), model.posterior_mean(x, 1.0, sigma))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    """Results have the sample's dtype and are exact up to rounding to it, whatever the model was cast to."""
    model = GaussianMixtureModel(**TWO).to(dtype)
    x = randn(8, 1, 1, 2).to(dtype)
    out = model(x, 500).sample
    expected = GaussianMixtureModel(**TWO)(x.double(), 500).sample
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))


def test_one_timestep_per_sample():
    """A batch of timesteps gives each sample its own noise level (and keeps labels with their samples)."""
    model = GaussianMixtureModel(**TWO)
    x, times, labels = randn(4, 1, 1, 2), torch.tensor([10, 400, 400, 999]), torch.tensor([0, 3, 1, 2])
    out = model(x, times, labels).sample
    for i in range(4):
        torch.testing.assert_close(out[i : i + 1], model(x[i : i + 1], times[i], labels[i : i + 1]).sample)


def test_fractional_timesteps():
    """Between integer timesteps the prediction is that of the path in between."""
    model = GaussianMixtureModel(**TWO)
    x = randn(4, 1, 1, 2, dtype=torch.float64)
    alpha, sigma = (float(a) for a in model.path.alpha_sigma(300.5))
    torch.testing.assert_close(model(x, 300.5).sample, (x - alpha * model.posterior_mean(x, alpha, sigma)) / sigma)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": [0.5, 0.5]},
        {"weights": [0.5, 0.5, 0.0]},
        {"weights": [[0.3, 0.6, 0.1]]},
        {"means": [[0.0], [1.0]]},
        {"means": [0.0, 1.0, 2.0]},
        {"covariances": [1.0, 1.0]},
        {"covariances": [[1.0, 1.0]] * 3},
        {"covariances": [[[1.0, 0.0], [0.0, 1.0]]] * 3},
        {"in_channels": 2},
        {"sample_size": 3},
    ],
    ids=str,
)
def test_bad_arguments(changes):
    """Arguments that do not fit raise ValueError at once."""
    with pytest.raises(ValueError):
        GaussianMixtureModel(**{**ONE, **changes})


def test_bad_sample_shape():
    """A sample of the wrong dimension is refused with both sizes in the message, not broadcast."""
    with pytest.raises(ValueError):
        GaussianMixtureModel(**ONE)(randn(2, 1, 1, 3), 10)
    with pytest.raises(ValueError):
        GaussianMixtureModel(**TWO)(randn(2, 1, 1, 1), 10)


def test_bad_labels():
    """Neither one label nor one per sample, or a label beyond K: refused, not broadcast or clipped."""
    model, x = GaussianMixtureModel(**TWO), randn(3, 1, 1, 2)
    with pytest.raises(ValueError):
        model(x, 10, torch.tensor([0, 1]))
    with pytest.raises((ValueError, RuntimeError)):
        model(x, 10, torch.tensor([4, 0, 0]))


def test_bad_prediction_type():
    """A process with an unknown prediction type is refused, at the latest when asked for a prediction."""
    with pytest.raises(ValueError, match="noise"):
        GaussianMixtureModel(**ONE, process={"prediction_type": "noise"})(randn(1, 1, 1, 1), 10)


# -- as a diffusers model --


def test_save_and_load(tmp_path):
    """``from_pretrained`` restores the mixture, its process and its shape exactly."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1, process={"prediction_type": "v_prediction"})
    model.save_pretrained(tmp_path)
    again = GaussianMixtureModel.from_pretrained(tmp_path)
    x = randn(3, 2, 1, 1)
    assert again.sample_shape == model.sample_shape
    assert torch.equal(again(x, 321).sample, model(x, 321).sample)


def test_half_precision_load(tmp_path):
    """Loading with a dtype rounds nothing in the oracle and gives the pipeline that dtype."""
    model = GaussianMixtureModel(**TWO)
    model.save_pretrained(tmp_path)
    half = GaussianMixtureModel.from_pretrained(tmp_path, dtype=torch.float16)
    x = randn(3, 1, 1, 2)
    assert half.dtype == torch.float16
    assert torch.equal(half(x, 321).sample, model(x, 321).sample)


def test_in_ddpm_pipeline():
    """In DDPMPipeline the pictures have the mixture's mean and standard deviation (its images are (x + 1)/2)."""
    d = 3 * 8 * 8
    model = GaussianMixtureModel([0.5, 0.5], [[0.4] * d, [-0.4] * d], [0.01, 0.01], in_channels=3, sample_size=8)
    pipe = diffusers.DDPMPipeline(model, ProbabilityFlowScheduler(grid="log_snr"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=32, generator=seeded(), num_inference_steps=30, output_type="np").images
    assert images.shape == (32, 8, 8, 3)
    means = 2 * images.mean((1, 2, 3)) - 1
    assert np.abs(np.abs(means) - 0.4).max() < 0.05
    assert 4 < (means > 0).sum() < 28  # both components
    assert (2 * images).std((1, 2, 3)).mean() == pytest.approx(0.1, rel=0.1)


def test_in_ddpm_pipeline_with_stock_scheduler():
    """A stock scheduler sees an ordinary epsilon network."""
    d = 3 * 8 * 8
    model = GaussianMixtureModel([1.0], [[0.4] * d], [0.01], in_channels=3, sample_size=8)
    pipe = diffusers.DDPMPipeline(model, diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = torch.as_tensor(pipe(batch_size=8, generator=seeded(), num_inference_steps=20, output_type="np").images)
    assert relative(2 * images - 1, torch.full_like(images, 0.4)) < 0.3


def test_in_a_saved_pipeline(tmp_path):
    """A pipeline names it by the package, and loads it from there with the same predictions."""
    model = GaussianMixtureModel(**TWO, in_channels=2, sample_size=1)
    diffusers.DDPMPipeline(model, ProbabilityFlowScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers_sde", "GaussianMixtureModel"]
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path).unet
    x = randn(3, 2, 1, 1)
    assert type(again) is GaussianMixtureModel
    assert torch.equal(again(x, 321).sample, model(x, 321).sample)
