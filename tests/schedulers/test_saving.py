"""Schedulers on disk: saved, loaded, in pipelines, by stock classes."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import (
    CLASSES,
    SHAPE,
    VP,
    by_class,
    by_every,
    by_process,
    in_fresh_process,
    randn,
    same_alphas,
    sample,
    seeded,
)

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler


@by_class
@by_process
def test_save_and_load(process, cls, tmp_path):
    """``save_pretrained`` and ``from_pretrained`` restore class, config and results, changed settings included."""
    kwargs = {"solver_order": 1, "grid": "linspace", "clip_sample": True, "trained_betas": [0.01, 0.02, 0.03]}
    for scheduler in (cls(**process), cls(**{**process, **kwargs})):
        scheduler.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert type(again) is cls
        drop = {"_use_default_values", "_diffusers_version", "_class_name"}
        assert {k: v for k, v in again.config.items() if k not in drop} == {
            k: v for k, v in scheduler.config.items() if k not in drop
        }
        n = min(3, len(scheduler))
        assert torch.equal(sample(again, randn(*SHAPE), n), sample(scheduler, randn(*SHAPE), n))


@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
def test_infinite_data_std_is_saved(cls, tmp_path):
    """data_std = inf (noise prediction) survives the way through JSON."""
    cls(data_std=math.inf).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.data_std == math.inf


@by_every
def test_saved_config_loads_into_stock(cls, tmp_path):
    """A stock class reads our file: same process."""
    scheduler = cls(**VP, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    again = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path)
    same_alphas(again, scheduler, rtol=2e-5, atol=1e-6)
    assert again.config.prediction_type == "v_prediction"


@by_every
def test_stock_folder_loads_into_ours(cls, tmp_path):
    """``from_pretrained`` on a stock scheduler's folder converts it."""
    diffusers.LCMScheduler().save_pretrained(tmp_path)
    same_alphas(cls.from_pretrained(tmp_path), diffusers.LCMScheduler(), rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_pipeline_loads_in_a_fresh_process(tmp_path):
    """``DiffusionPipeline.from_pretrained`` after ``import diffusers_sde`` restores scheduler and mixture: the same
    picture, bit for bit."""
    d = 3 * 4 * 4
    model = GaussianMixtureModel([0.5, 0.5], [[0.4] * d, [-0.4] * d], [0.01, 0.01], in_channels=3, sample_size=4)
    expected = {}
    for cls in CLASSES:
        pipe = diffusers.DDPMPipeline(model, cls(**VP))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / cls.__name__)
        image = pipe(batch_size=2, generator=seeded(), num_inference_steps=4, output_type="np").images
        expected[cls.__name__] = np.asarray(image).tobytes().hex()
    script = """if True:
        import json, sys, torch
        import diffusers_sde
        from diffusers import DiffusionPipeline
        out = {}
        for name in sys.argv[2:]:
            pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
            assert type(pipe.scheduler) is getattr(diffusers_sde, name), type(pipe.scheduler)
            assert type(pipe.unet) is diffusers_sde.GaussianMixtureModel, type(pipe.unet)
            generator = torch.Generator().manual_seed(0)
            image = pipe(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
            out[name] = image.tobytes().hex()
        print(json.dumps(out))
    """
    assert json.loads(in_fresh_process(script, tmp_path, *expected).splitlines()[-1]) == expected
