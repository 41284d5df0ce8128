"""What a sampling loop may not do: wait for the device, mix up threads, or change when it is copied on the way."""

import copy
import pickle
import threading

import pytest
import torch
from contract_helpers import CLASSES, EDM, FLOW, VP, by_every, by_process, gaussian, loop, randn, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sde import DPMSolverScheduler, ReverseSDEScheduler

META = torch.device("meta")
# Every way a table can be built: noise, stages, limits on x0, low precision.
SETTINGS = {
    "ode": ("ProbabilityFlowScheduler", {}),
    "ode4": ("ProbabilityFlowScheduler", {"solver_order": 4, "data_std": 0.5, "clock": "angle"}),
    "clipped": ("ProbabilityFlowScheduler", {"clip_sample": True}),
    "sde": ("ReverseSDEScheduler", {}),
    "sde_seeded": ("ReverseSDEScheduler", {"noise_seed": 3}),
    "dpm": ("DPMSolverScheduler", {"solver_order": 3, "singlestep": True}),
    "dpm_sde": ("DPMSolverScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
by_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def build(setting, process):
    name, kwargs = setting
    return next(c for c in CLASSES if c.__name__ == name)(**process, **kwargs)


class NoSync(TorchDispatchMode):
    """Fails on operations that wait for an accelerator: reading a value, shapes that depend on values, transfers."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "_to_copy")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        if name in self.waits and not (name == "_to_copy" and kwargs.get("device") is None):
            raise AssertionError(f"{name} waits for the device")
        self.seen.append(name)
        return func(*args, **kwargs)


def fake_model(x):
    return torch.empty_like(x)


def run_on_meta(scheduler, shape=(2, 4, 8, 8), dtype=torch.float32, start=0, **kwargs):
    """A loop as pipelines write it, on a device that has no values: reading one raises."""
    x = torch.empty(shape, device=META, dtype=dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps[start:]:
        inputs = scheduler.scale_model_input(x, t)
        x = scheduler.step(fake_model(inputs), t, x, return_dict=False, **kwargs)[0]
        assert x.device == META and x.dtype == dtype
    return x


def custom(process):
    return [0.9, 0.1, -0.3, -1.2] if process is EDM else [980.5, 700.25, 333.0, 20.0]


@by_setting
@by_process
def test_loop_without_values(process, setting):
    """The whole loop runs on the meta device, where nothing can be read back: set_timesteps, scaling, steps."""
    scheduler = build(setting, process)
    scheduler.set_timesteps(6, device=META)
    assert scheduler.timesteps.device == META
    assert run_on_meta(scheduler).shape == (2, 4, 8, 8)
    assert scheduler.step_index == 6


@by_every
@by_process
def test_custom_timesteps_without_values(process, cls):
    """The same with the caller's own timesteps, which need not be integers."""
    scheduler = cls(**process)
    scheduler.set_timesteps(timesteps=custom(process), device=META)
    run_on_meta(scheduler)
    assert scheduler.step_index == 4


@by_every
@by_process
def test_custom_sigmas_without_values(process, cls):
    """The same with the caller's own sigmas."""
    scheduler = cls(**process)
    scheduler.set_timesteps(sigmas=[0.0, 0.4, 0.7] if process is EDM else [0.9, 0.5, 0.1], device=META)
    run_on_meta(scheduler)
    assert scheduler.step_index == 3


@by_every
@by_process
@pytest.mark.parametrize("begin", [True, False], ids=["begin_index", "from_timestep"])
def test_start_in_the_middle_without_values(process, cls, begin):
    """Image to image: any start, with ``set_begin_index`` or from a slice of ``timesteps`` alone."""
    scheduler = cls(**process)
    scheduler.set_timesteps(6, device=META)
    if begin:
        scheduler.set_begin_index(2)
    run_on_meta(scheduler, start=2)
    assert scheduler.step_index == 6


@by_every
@by_process
def test_noising_without_values(process, cls):
    """``add_noise`` and ``scale_noise`` read nothing back: before, at the start of, and in the middle of a run."""
    scheduler = cls(**process)
    x, eps = torch.empty(2, 4, 8, 8, device=META), torch.empty(2, 4, 8, 8, device=META)
    times = torch.empty(2, device=META)
    assert scheduler.add_noise(x, eps, times).shape == x.shape
    scheduler.set_timesteps(5, device=META)
    assert scheduler.scale_noise(x, scheduler.timesteps[1:2].expand(2), eps).shape == x.shape
    scheduler.set_begin_index(1)
    assert scheduler.scale_noise(x, scheduler.timesteps[:1], eps).shape == x.shape
    for t in scheduler.timesteps[1:]:
        scheduler.step(fake_model(x), t, x)
        assert scheduler.add_noise(x, eps, t[None]).shape == x.shape


@pytest.mark.parametrize("many", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("process", [VP, FLOW, EDM], ids=["vp", "flow", "edm"])
def test_generator_of_another_device(process, many):
    """A generator on the CPU seeds a loop on another device, as pipelines allow."""
    scheduler = ReverseSDEScheduler(**process)
    scheduler.set_timesteps(4, device=META)
    run_on_meta(scheduler, generator=[seeded(0), seeded(1)] if many else seeded())
    assert scheduler.step_index == 4


@by_every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_values(cls, dtype):
    """Half precision runs there too, and stays half precision."""
    scheduler = cls(**VP)
    scheduler.set_timesteps(4, device=META)
    run_on_meta(scheduler, dtype=dtype)


@by_setting
@by_process
def test_steps_do_not_synchronise(process, setting):
    """No operation of any step, the first included, reads a value, depends on one, or moves a tensor to a device."""
    scheduler = build(setting, process)
    scheduler.set_timesteps(6)
    x, timesteps, model = randn(2, 4, 8, 8) * scheduler.init_noise_sigma, list(scheduler.timesteps), gaussian(scheduler)
    with NoSync() as watch:
        for i, t in enumerate(timesteps):
            scheduler.scale_model_input(x, t)
            with torch.utils._python_dispatch._disable_current_modes():
                output = model(x, scheduler._run.nodes.time[i])  # the network may do as it likes
            x = scheduler.step(output, t, x, return_dict=False)[0]
    assert "mul" in watch.seen  # the watch was on


@by_every
def test_the_watch_sees_synchronisation(cls):
    """A timestep that is not the scheduler's own must be read: the watch of these tests notices it."""
    scheduler = cls(**VP)
    scheduler.set_timesteps(6)
    x, t = randn(1, 4, 8, 8), scheduler.timesteps[0].clone()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        scheduler.step(x, t, x)


def test_few_operations_per_step():
    """A second-order step with corrector in float32 is at most eight tensor operations, two of them allocations of
    the size of the sample (stock UniPC: about a hundred operations); its trust is four more of that size, two norms and
    nine operations on one number a sample."""
    for options, most in (({"trust": False}, 8), ({}, 23)):
        scheduler = build(SETTINGS["ode"], {**VP, **options})
        scheduler.set_timesteps(6)
        x, timesteps = randn(2, 4, 8, 8), list(scheduler.timesteps)
        for t in timesteps[:3]:
            x = scheduler.step(x, t, x, return_dict=False)[0]
        with NoSync() as watch:
            scheduler.step(x, timesteps[3], x, return_dict=False)
        assert len(watch.seen) <= most, watch.seen


# -- threads --


def drive(scheduler, n, x, barrier=None):
    """A run of ``n`` steps; with a barrier the first five steps wait for the other thread, so that runs interleave."""
    scheduler.set_timesteps(n)
    model, x = gaussian(scheduler), x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        if barrier is not None and i < 5:
            barrier.wait(timeout=30)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x


@by_setting
@by_process
def test_two_threads_share_a_scheduler(process, setting):
    """Two interleaved runs of different lengths on one scheduler give, bit for bit, what they give alone."""
    scheduler = build(setting, process)
    jobs = [(5, randn(1, 4, 8, 8, seed=1)), (8, randn(2, 4, 8, 8, seed=2))]
    alone = [drive(scheduler, n, x) for n, x in jobs]
    for _ in range(3):
        together, barrier, failures = [None, None], threading.Barrier(2), []

        def work(k, together=together, barrier=barrier, failures=failures):
            try:
                together[k] = drive(scheduler, *jobs[k], barrier)
            except Exception as error:
                failures.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_another_thread_inherits_the_layout_only():
    """A thread that calls ``step`` without ``set_timesteps`` starts the last layout afresh and disturbs nothing."""
    scheduler = ReverseSDEScheduler(**VP)
    x = randn(1, 4, 8, 8)
    expected = drive(scheduler, 5, x)
    scheduler.set_timesteps(5)
    half = loop(scheduler, x, stop=2)
    found = []
    thread = threading.Thread(target=lambda: found.append(loop(scheduler, x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
    assert scheduler.step_index == 2
    assert torch.equal(loop(scheduler, half, start=2), expected)


# -- copies --


@by_setting
@by_process
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copy_continues(process, setting, copied):
    """A copy made in the middle of a run ends where the original does, and the two do not disturb each other."""
    scheduler = build(setting, process)
    expected = drive(scheduler, 6, randn(1, 4, 8, 8))
    scheduler.set_timesteps(6)
    half = loop(scheduler, randn(1, 4, 8, 8) * scheduler.init_noise_sigma, stop=3)
    twin = copied(scheduler)
    assert torch.equal(loop(twin, half, start=3), expected)
    assert twin.step_index == 6 and scheduler.step_index == 3
    assert torch.equal(loop(scheduler, half, start=3), expected)


@by_every
def test_copy_of_an_unused_scheduler(cls):
    """A scheduler that has not run yet can be copied and pickled."""
    scheduler = cls(**VP)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(drive(twin, 3, randn(1, 4, 8, 8)), drive(scheduler, 3, randn(1, 4, 8, 8)))


def test_second_run_does_not_remember_the_first():
    """``set_timesteps`` forgets history, seeds and indices: a run repeats bit for bit, also after one broken off."""
    for scheduler in (ReverseSDEScheduler(**VP), DPMSolverScheduler(**VP, solver_order=3)):
        first = drive(scheduler, 6, randn(1, 4, 8, 8))
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(1)
        loop(scheduler, randn(1, 4, 8, 8, seed=5), start=1, stop=4)
        assert torch.equal(drive(scheduler, 6, randn(1, 4, 8, 8)), first)
