"""A run belongs to its timesteps: threads, copies, second loops and interleaved runs do not mix, or are refused."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from contract_helpers import CLASSES, FLOW, VP, by_class, by_every, by_process, gaussian, laid_out, loop, randn, seeded

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPE = (2, 4, 8, 8)


def start(scheduler, seed=0):
    return randn(*SHAPE, seed=seed) * scheduler.init_noise_sigma


def alone(cls, process, n=6, seed=0, **kwargs):
    """What a run gives that nothing interferes with."""
    scheduler = laid_out(cls, n, **process)
    return loop(scheduler, start(scheduler, seed), **kwargs)


def halfway(scheduler, x, n=3):
    """The state after ``n`` steps."""
    return loop(scheduler, x, stop=n)


def in_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


# -- threads --


@by_every
@by_process
def test_steps_of_one_run_on_several_threads(process, cls):
    """Servers and generators take each step on whatever thread is free: the result is that of one thread."""
    scheduler = laid_out(cls, **process)
    model, x = gaussian(scheduler), start(scheduler)
    with ThreadPoolExecutor(3) as pool:
        barrier = threading.Barrier(3)
        for worker in [pool.submit(barrier.wait) for _ in range(3)]:  # three threads, all of them used
            worker.result()
        for t in scheduler.timesteps:
            x = pool.submit(lambda t=t, x=x: scheduler.step(model(x, t), t, x, return_dict=False)[0]).result()
    assert torch.equal(x, alone(cls, process))


@by_every
def test_a_worker_sees_the_new_grid(cls):
    """A thread that has run on an old grid and is handed timesteps of a new one steps on the new one."""
    scheduler = laid_out(cls, **VP)
    with ThreadPoolExecutor(1) as worker:
        worker.submit(lambda: loop(scheduler, start(scheduler))).result()
        scheduler.set_timesteps(9)
        timesteps, model, x = scheduler.timesteps, gaussian(scheduler), start(scheduler)
        assert len(worker.submit(lambda: scheduler.timesteps).result()) == 9
        for t in timesteps:
            x = worker.submit(lambda t=t, x=x: scheduler.step(model(x, t), t, x, return_dict=False)[0]).result()
    assert torch.equal(x, alone(cls, VP, 9))


@by_every
@by_process
def test_concurrent_requests(process, cls):
    """Several threads lay out and run grids of their own on one scheduler at the same time."""
    scheduler, barrier = cls(**process), threading.Barrier(4)

    def request(n):
        barrier.wait()
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps
        barrier.wait()  # everybody has laid out before anybody steps
        model, x = gaussian(scheduler), start(scheduler, n)
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        return x

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(request, (4, 5, 6, 7)))
    for n, x in zip((4, 5, 6, 7), found, strict=True):
        assert torch.equal(x, alone(cls, process, n, seed=n))


@by_every
def test_a_thread_keeps_its_own_layout(cls):
    """Between laying out and the first step a thread reads its own timesteps, whatever others lay out meanwhile."""
    scheduler = laid_out(cls, 5, **VP)
    in_thread(lambda: scheduler.set_timesteps(8))
    assert len(scheduler.timesteps) == 5 and scheduler.num_inference_steps == 5


# -- loops and runs on one scheduler --


@by_every
@by_process
def test_interleaved_runs(process, cls):
    """Two runs laid out one after the other, their steps taken in turn."""
    scheduler = cls(**process)
    model, runs = gaussian(scheduler), []
    for n in (5, 6):
        scheduler.set_timesteps(n)
        runs.append([start(scheduler, n), iter(scheduler.timesteps)])
    for _ in range(5):
        for run in runs:
            t = next(run[1])
            run[0] = scheduler.step(model(run[0], t), t, run[0], return_dict=False)[0]
    t = next(runs[1][1])
    last = scheduler.step(model(runs[1][0], t), t, runs[1][0], return_dict=False)[0]
    assert torch.equal(runs[0][0], alone(cls, process, 5, seed=5))
    assert torch.equal(last, alone(cls, process, 6, seed=6))


@by_every
def test_interleaved_runs_on_one_grid(cls):
    """Two loops over the same timesteps: each step goes on from the state that the run returned."""
    scheduler = laid_out(cls, **VP)
    model, states = gaussian(scheduler), [start(scheduler, 0), start(scheduler, 1)]
    for t in scheduler.timesteps:
        states = [scheduler.step(model(x, t), t, x, return_dict=False)[0] for x in states]
    for seed in (0, 1):
        assert torch.equal(states[seed], alone(cls, VP, seed=seed))


def test_interleaved_runs_that_cannot_be_told_apart():
    """Where the states were changed on the way (a batch in two chunks), nothing says whose step it is: refused."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    model, x = gaussian(scheduler), start(scheduler)
    with pytest.raises(ValueError, match="copy"):
        for t in scheduler.timesteps:
            parts = [scheduler.step(model(y, t), t, y, return_dict=False)[0] for y in x.chunk(2)]
            x = torch.cat(parts)


@by_every
@by_process
def test_a_second_loop_is_a_new_run(process, cls):
    """A second loop without ``set_timesteps`` has its own latents, its own noise, its own history."""
    scheduler = laid_out(cls, **process)
    loop(scheduler, start(scheduler, 0), generator=seeded(0))
    found = loop(scheduler, start(scheduler, 1), generator=seeded(1))
    assert torch.equal(found, alone(cls, process, seed=1, generator=seeded(1)))


@by_every
@by_process
@pytest.mark.parametrize("begin", [0, 2])
def test_a_loop_after_a_cancelled_one(process, cls, begin):
    """It begins where it begins, not where the other was left."""
    scheduler = laid_out(cls, **process)
    loop(scheduler, start(scheduler, 0), start=begin, stop=4)
    fresh = laid_out(cls, **process)
    expected = loop(fresh, start(scheduler, 1), start=begin)
    assert torch.equal(loop(scheduler, start(scheduler, 1), start=begin), expected)


@by_every
@by_process
def test_rows_left_out_are_refused(process, cls):
    """A step further down than the run stands, or one taken again, names the remedies."""
    scheduler = laid_out(cls, **process)
    model, x = gaussian(scheduler), halfway(scheduler, start(scheduler), 2)
    for row in (3, 1):
        t = scheduler.timesteps[row]
        with pytest.raises(ValueError, match="set_begin_index"):
            scheduler.step(model(x, t), t, x)
    assert torch.equal(loop(scheduler, x, start=2), alone(cls, process))


def test_a_value_of_another_row_is_refused():
    """The same for timesteps that are numbers: one of the grid that is not next."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    x = halfway(scheduler, start(scheduler), 2)
    with pytest.raises(ValueError, match="row 4 of a run that stands at row 2"):
        scheduler.step(x, float(scheduler.timesteps[4]), x)


def test_first_order_steps_need_no_order():
    """A table whose rows read nothing else can be run in any order, as DDIM can."""
    scheduler = laid_out(ProbabilityFlowScheduler, 5, **VP, solver_order=1, grid="trailing")
    theirs = diffusers.DDIMScheduler(**VP, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(5)
    for i in (0, 3, 1, 2, 2):
        x, output = randn(*SHAPE, seed=i), randn(*SHAPE, seed=9)
        found = scheduler.step(output, scheduler.timesteps[i], x).prev_sample
        torch.testing.assert_close(found, theirs.step(output, theirs.timesteps[i], x).prev_sample, atol=1e-5, rtol=1e-4)


# -- copies --

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
}


@by_every
@by_process
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_go_on_independently(process, cls, make):
    """A copy made in the middle of a run and the original both finish it, step by step in turn."""
    scheduler = laid_out(cls, **process)
    x = halfway(scheduler, start(scheduler))
    twin, y = make(scheduler), x.clone()
    model = gaussian(scheduler)
    for t, u in zip(scheduler.timesteps[3:], twin.timesteps[3:], strict=True):
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        y = twin.step(model(y, u), u, y, return_dict=False)[0]
    assert torch.equal(x, alone(cls, process)) and torch.equal(y, x)


@by_class
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_share_no_settings(cls, make):
    """What is written into a copy's config or sigmas, or laid out there, is the copy's alone."""
    scheduler = laid_out(cls, **VP)
    twin = make(scheduler)
    sigmas = scheduler.sigmas.clone()
    twin.sigmas[-1] = 0.5
    twin.config.prediction_type = "v_prediction"
    twin.set_timesteps(3)
    assert torch.equal(scheduler.sigmas, sigmas) and len(scheduler.timesteps) == 6
    assert scheduler.config.prediction_type == "epsilon"


@by_every
@pytest.mark.parametrize("same", [False, True], ids=["each its copy", "one copy for all"])
def test_saved_dictionaries(cls, same):
    """Panorama pipelines put a saved ``__dict__`` back before each view's step, all from one deep copy at first."""
    views, scheduler = 3, laid_out(cls, **VP)
    model, states = gaussian(scheduler), [start(scheduler, k) for k in range(views)]
    saved = [copy.deepcopy(scheduler.__dict__)] * views
    if not same:
        saved = [copy.deepcopy(scheduler.__dict__) for _ in range(views)]
    for t in scheduler.timesteps:
        for k in range(views):
            scheduler.__dict__.update(saved[k])
            states[k] = scheduler.step(model(states[k], t), t, states[k].clone(), return_dict=False)[0]
            saved[k] = copy.deepcopy(scheduler.__dict__)
    for k in range(views):
        assert torch.equal(states[k], alone(cls, VP, seed=k))


# -- memory --


def stored(scheduler, steps=3):
    """Weak references to the evaluations that a run keeps after some steps."""
    halfway(scheduler, start(scheduler), steps)
    return [weakref.ref(tensor) for tensor in scheduler._run.history]


@pytest.mark.parametrize("where", ["here", "another thread"])
def test_an_interrupted_run_is_forgotten(where):
    """Its evaluations are gone when the next run is laid out, in this thread or in another."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    references = stored(scheduler)
    assert references and all(reference() is not None for reference in references)
    lay_out = lambda: scheduler.set_timesteps(6)  # noqa: E731
    lay_out() if where == "here" else in_thread(lay_out)
    if where == "another thread":  # that run is current, this thread's has no holder
        in_thread(lambda: loop(scheduler, start(scheduler)))
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_released_run_is_refused():
    """A thread that comes back to a run that was given up is told so; a new run is fine."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    x = halfway(scheduler, start(scheduler))
    in_thread(lambda: scheduler.set_timesteps(5))
    with pytest.raises(ValueError, match="set_timesteps again"):
        scheduler.step(x, scheduler.timesteps[3], x)
    scheduler.set_timesteps(6)
    assert torch.equal(loop(scheduler, start(scheduler)), alone(ProbabilityFlowScheduler, VP))


def test_a_held_run_survives_others():
    """While somebody holds its timesteps a run goes on, whatever else is laid out and run."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    timesteps, model, x = scheduler.timesteps, gaussian(scheduler), start(scheduler)
    for t in timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        in_thread(lambda: (scheduler.set_timesteps(4), loop(scheduler, start(scheduler, 3))))
        scheduler.set_timesteps(3)
    assert torch.equal(x, alone(ProbabilityFlowScheduler, VP))


@by_every
def test_a_finished_run_keeps_nothing(cls):
    """After the last step no evaluation is stored."""
    scheduler = laid_out(cls, **FLOW)
    loop(scheduler, start(scheduler))
    assert len(scheduler.model_outputs) == 0 and scheduler._run.before is None


def test_reading_has_no_effect():
    """Attributes of a scheduler without a run describe the training grid and lay out nothing."""
    for cls in CLASSES:
        scheduler = cls(**VP)
        assert len(scheduler.timesteps) == 1000 and len(scheduler.sigmas) == 1001 and len(scheduler.levels) == 1001
        assert scheduler.num_inference_steps is None and scheduler.step_index is None
        assert not list(scheduler._runs)


def test_noise_of_a_run_taken_up_by_another_thread():
    """The noise path of a stochastic run follows it too."""
    scheduler = laid_out(ReverseSDEScheduler, **VP)
    x = halfway(scheduler, start(scheduler))
    timesteps = scheduler.timesteps[3:]
    model = gaussian(scheduler)

    def rest(x):
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        return x

    assert torch.equal(in_thread(rest, x), alone(ReverseSDEScheduler, VP))
