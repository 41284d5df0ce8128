"""What the calibration tests share: processes, a quick calibration of the mixture, and a taught set of samples."""

from helpers import LINEAR, mixture

from diffusers_sde import ProbabilityFlowScheduler, calibrate
from diffusers_sde.calibration.fit import TaughtSamples
from diffusers_sde.calibration.rollout import Evaluator
from diffusers_sde.calibration.sources import HELD_OUT, DenoiserSource
from diffusers_sde.calibration.store import Store
from diffusers_sde.calibration.teacher import Teacher
from diffusers_sde.sampling import network_denoiser, sample

SHAPE = (1, 1, 3)
VP = {**LINEAR, "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": 3.0}
EDM = {"sigma_data": 0.5, "prediction_type": "epsilon"}
QUIET = {"progress": False, "sample_shape": SHAPE}


def scheduler_of(process):
    return ProbabilityFlowScheduler(**process)


def denoiser_of(process, **guidance):
    return network_denoiser(mixture(**process), **guidance)


def calibrated(process=VP, steps=(4, 5), num_samples=32, **options):
    return calibrate(
        denoiser_of(process),
        scheduler=scheduler_of(process),
        num_inference_steps=steps,
        num_samples=num_samples,
        **{**QUIET, **options},
    )


def taught(process=VP, batches=2, size=16, nodes=24, store=None):
    """Training samples of the mixture with their teacher."""
    evaluator = Evaluator(scheduler_of(process).path, process["prediction_type"], 1.0)
    source = DenoiserSource(denoiser_of(process), SHAPE, size, 0)
    teacher = Teacher(evaluator, source, store or Store(), nodes)
    samples = TaughtSamples(evaluator, source, range(0, batches * size, size), teacher)
    teacher.run(samples.firsts, [HELD_OUT])
    return samples


def final(scheduler, n, noise, denoiser):
    scheduler.set_timesteps(n)
    return sample(denoiser, scheduler, noise)
