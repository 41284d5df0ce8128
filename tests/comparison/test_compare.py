"""``diffusers-sde compare``: what it writes, what its errors mean, and what it refuses before it starts."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, calibrate, named_samplers
from diffusers_sde.assets import EXAMPLE_PROMPTS
from diffusers_sde.cli import main
from diffusers_sde.comparison import engine, problems, report
from diffusers_sde.errors import UsageError
from diffusers_sde.loading import load_pipeline
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, FAMILIES, SAMPLERS
from diffusers_sde.sampling import spread_labels

COMPONENTS, DIM = 5, 16
FILES = ["error.png", "grid.png", "results.csv"]


def mixture(scheduler):
    """The exact network for a mixture on 4x4 images, under the process of ``scheduler``."""
    g = torch.Generator().manual_seed(3)
    means = (torch.randn(COMPONENTS, DIM, generator=g) * 0.5).tolist()
    process = dict(ProbabilityFlowScheduler.from_config(scheduler.config).config)
    model = GaussianMixtureModel([1.0] * COMPONENTS, means, [0.05] * COMPONENTS, sample_size=4, process=process)
    return diffusers.DDPMPipeline(unet=model, scheduler=scheduler)


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "mixture"
    mixture(diffusers.DDPMScheduler()).save_pretrained(folder)  # clips samples, which no sampler here may do
    return str(folder)


@pytest.fixture(scope="module")
def classes_folder(tmp_path_factory):
    """A random network with three classes, the last of them null."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    folder = tmp_path_factory.mktemp("model") / "classes"
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def run(*arguments):
    return main(["compare", *map(str, arguments)])


def table(folder):
    with open(Path(folder) / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def finished(problem, names, budgets, **options):
    """The last state of a comparison."""
    *_, state = engine.compare(problem, names, budgets, **options)
    return state


def errors(problem, names, budgets):
    return {(r.sampler, r.budget): r.mean for r in finished(problem, names, budgets).results}


# -- what comes out --


def test_writes_pictures_and_table(mixture_folder, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    samplers = ["pf-ode", "heun", "euler-a"]
    assert run("--model", mixture_folder, "--samplers", *samplers, "--steps", 10, 4, 10, "--output_dir", out) == 0
    assert sorted(os.listdir(out)) == FILES
    assert os.listdir(out.parent) == ["b"]
    for name in FILES[:2]:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 200 and len(image.getcolors(1 << 20)) > 20
    rows = table(out)
    assert list(rows[0]) == ["sampler", "nfe", "seconds", "rmse_mean", "rmse_median"]
    # two-stage: 2 steps - 1 evaluations, the largest odd number that is not more than asked for
    counts = {"pf-ode": ["4", "10"], "heun": ["3", "9"], "euler-a": ["4", "10"]}
    assert [(r["sampler"], r["nfe"]) for r in rows] == [(name, n) for name in samplers for n in counts[name]]
    for r in rows:
        assert float(r["seconds"]) >= 0
        assert (r["rmse_mean"] == r["rmse_median"] == "") == (r["sampler"] == "euler-a")
        assert r["sampler"] == "euler-a" or 0 < float(r["rmse_mean"]) < 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:7]] == [[r["sampler"], r["nfe"]] for r in rows]
    assert printed[5].split()[-2:] == ["-", "-"]


def test_evaluations_are_counted_true(mixture_folder):
    pipe = load_pipeline(mixture_folder)
    problem, calls = problems.make_problem(pipe, num_images=1, seed=0), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    for name in (name for name in SAMPLERS if not SAMPLERS[name].learned):  # this model has none
        sampler = SAMPLERS[name]
        for n in (1, 4, 5):
            calls.clear()
            scheduler, ticks = named_samplers.make_scheduler(name, problem.config), []
            problem.solve(scheduler, sampler.steps(n), lambda ticks=ticks: ticks.append(1))
            assert len(calls) == len(ticks) == len(scheduler.timesteps) == sampler.evaluations(n) <= n, name


def test_same_seed_same_table(classes_folder, tmp_path):
    def run_with(name, *more):
        arguments = ["--samplers", "pf-ode", "reverse-sde", "unipc", "--steps", 3, 6, "--reference_steps", 12, *more]
        assert run("--model", classes_folder, *arguments, "--output_dir", tmp_path / name) == 0
        return [{k: v for k, v in row.items() if k != "seconds"} for row in table(tmp_path / name)]

    first = run_with("one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine.txt").write_text("stays")
    assert run_with("two") == first == run_with("two", "--guidance_scale", 2)
    assert sorted(os.listdir(tmp_path / "two")) == sorted([*FILES, "mine.txt"])
    assert run_with("three", "--seed", 1) != first != run_with("four", "--guidance_scale", 1)


def test_stochastic_samplers_alone_still_draw(mixture_folder, tmp_path):
    assert run("--model", mixture_folder, "--samplers", "ddpm", "--steps", 3, "--output_dir", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def test_default_samplers_of_each_process():
    assert set(DEFAULT_SAMPLERS) == set(FAMILIES)
    for family, names in DEFAULT_SAMPLERS.items():
        assert len(names) >= 5 and all(family in SAMPLERS[name].classes for name in names), family
    assert {name for name in SAMPLERS if SAMPLERS[name].ours} == {
        "calibrated",
        "pf-ode",
        "dpm-solver",
        "reverse-sde",
    }
    # every line of the error plot has a colour of its own
    drawn = [name for name, s in SAMPLERS.items() if not s.stochastic]
    assert len({report.COLOURS[name] for name in drawn}) == len(drawn)


# -- what the errors mean --


def test_errors_on_the_oracle(mixture_folder):
    problem = problems.make_problem(load_pipeline(mixture_folder), num_images=8, seed=0)
    e = errors(problem, ["pf-ode", "ddim"], [5, 10, 20, 40])
    assert e["pf-ode", 5] > e["pf-ode", 10] > e["pf-ode", 20] > e["pf-ode", 40]
    assert e["pf-ode", 20] < e["ddim", 20]


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(clip_sample=True),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, thresholding=True),
        # what the saved solver was set to is not what a named sampler is
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, solver_order=3),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.EDMEulerScheduler(),
    ],
    ids=["ddpm", "scaled", "sde", "flow", "edm"],
)
def test_all_samplers_solve_the_same_equation(scheduler):
    """With many steps every deterministic sampler arrives at the same images; the reference is there already."""
    problem = problems.make_problem(mixture(scheduler), num_images=4, seed=1)
    names = [name for name in engine.default_samplers(problem, [200]) if not SAMPLERS[name].stochastic]
    result = finished(problem, names, [200], reference_steps=400)
    assert result.reference_error < 2e-3
    assert {r.sampler: r.mean for r in result.results if r.mean > 0.03} == {}


def test_every_run_has_the_same_start_and_noise_of_its_own(mixture_folder):
    class Spy:
        timesteps = (0,)

        def set_timesteps(self, n, device=None):
            pass

        def step(self, model_output, timestep, sample, generator, return_dict):
            self.start = sample
            return (torch.randn(sample.shape, generator=generator),)

    problem = problems.make_problem(load_pipeline(mixture_folder), num_images=3, seed=0)
    spies = [Spy(), Spy()]
    first, second = (problem.solve(spy, 1, lambda: None) for spy in spies)
    assert torch.equal(spies[0].start, spies[1].start) and torch.equal(first, second)
    # a generator seeded like the start would add the start again
    assert not torch.equal(first, spies[0].start)


def test_pipelines_run_through_their_call(tmp_path):
    prompt = "a cat on a mat"
    for name, prompted, scale in (("sd", True, 3.0), ("dit", False, None)):
        pipe = PIPELINES[name]()[0]
        problem = problems.make_problem(
            pipe, num_images=2, seed=0, prompt=prompt if prompted else None, guidance_scale=scale
        )
        result = finished(problem, ["pf-ode", "ddim", "euler-a"], [2, 8], reference_steps=24)
        e = {(r.sampler, r.budget): r.mean for r in result.results}
        assert result.reference.shape == (2, 3, 16, 16) and e["pf-ode", 8] < e["pf-ode", 2]
        assert e["pf-ode", 8] < e["ddim", 8] and e["euler-a", 8] is None
        report.write(result, tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == FILES


# -- what is refused --


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samplers", "pf-ode", "magic"], ["'magic'", "unipc"]),
        (["--samplers"], ["--samplers is empty", "unipc"]),
        (["--steps"], ["--steps is empty", "--steps 5 10 20"]),
        (["--steps", "5", "0"], ["at least 1", "not 0"]),
        (["--steps", "five"], ["--steps", "five"]),
        (["--num_images", "0"], ["--num_images", "at least 1"]),
        (["--reference_steps", "30"], ["--reference_steps", "40"]),
        (["--guidance_scale", "2"], ["class-conditional", "leave out --guidance_scale"]),
        (["--prompt", "a cat"], ["no prompt", "leave out --prompt"]),
        (["--steps", "2000", "--samplers", "ddim"], ["ddim", "2000"]),
        (["--model", "/nowhere/at/all"], ["/nowhere/at/all", "does not exist", "hub id"]),
        (["--wrong"], ["--wrong"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and value[0].startswith("--") else "",
)
def test_refuses_in_one_sentence_and_leaves_nothing(arguments, words, mixture_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", mixture_folder, "--output_dir", out, *arguments) == 2
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if line.startswith("diffusers-sde")]
    assert len(message) == 1 and all(word in message[0] for word in words), captured.err
    assert captured.out == "" and "Traceback" not in captured.err
    assert os.listdir(tmp_path) == []


def test_refuses_models_that_are_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "X"]}')

    def unreachable(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.chdir(tmp_path)
    for model, reason in [
        ("./empty", "./empty is no pipeline"),
        ("./broken", "./broken is a broken pipeline folder"),
        ("./missing", "./missing does not exist"),
        ("someone/nothing", "someone/nothing is no folder and could not be had from the Hub (OSError: no network)"),
    ]:
        if model.startswith("someone"):
            monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", unreachable)
        assert run("--model", model, "--output_dir", "out") == 2
        message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffusers-sde")]
        assert len(message) == 1 and reason in message[0]
        assert sorted(os.listdir(tmp_path)) == ["broken", "empty"]


def test_refuses_an_output_that_is_a_file(mixture_folder, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out in (taken, taken / "below"):
        assert run("--model", mixture_folder, "--output_dir", out) == 2
        assert "is a file, pass another folder" in capsys.readouterr().err
    assert taken.read_text() == "mine" and os.listdir(tmp_path) == ["taken"]


def test_samplers_that_do_not_fit_the_process():
    flow = problems.make_problem(mixture(diffusers.FlowMatchEulerDiscreteScheduler()), num_images=1, seed=0)
    with pytest.raises(UsageError, match="euler-a does not fit this model: diffusers has no flow matching form"):
        engine.check_samplers(["pf-ode", "euler-a"], [5], flow)
    zero_snr = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    problem = problems.make_problem(mixture(zero_snr), num_images=1, seed=0)
    with pytest.raises(UsageError, match="HeunDiscreteScheduler ignores rescale_betas_zero_snr"):
        engine.check_samplers(["heun"], [5], problem)
    # a diffusers bug (issue 12771), found before the network runs
    with pytest.raises(UsageError, match="dpm\\+\\+2m-karras cannot run with 5 evaluations"):
        engine.check_samplers(["dpm++2m-karras"], [5], problem)


def test_prompts_are_dealt_out_over_the_images(monkeypatch):
    """One for all, several in turn, the examples where there is none."""
    pipe, asked = PIPELINES["sd"]()[0], []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kw: asked.append(args[0]) or encode(*args, **kw))
    for prompt in ("a cat", ["a cat", "a dog"], None):
        problem = problems.make_problem(pipe, num_images=3, seed=0, guidance_scale=1.0, prompt=prompt)
        problem.solve(named_samplers.make_scheduler("ddim", problem.config), 1, lambda: None)
    assert asked == [["a cat"] * 3, ["a cat", "a dog", "a cat"], list(EXAMPLE_PROMPTS[:3])]


def test_pipelines_without_what_they_need():
    dit = PIPELINES["dit"]()[0]
    with pytest.raises(UsageError, match="takes no prompt"):
        problems.make_problem(dit, num_images=1, seed=0, prompt="a cat")


def test_failure_while_sampling_leaves_nothing(mixture_folder, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(report, "draw_errors", fails)
    with pytest.raises(RuntimeError):
        run("--model", mixture_folder, "--steps", 2, "--samplers", "ddim", "--output_dir", tmp_path / "a" / "out")
    assert os.listdir(tmp_path) == []


# -- small parts --


def test_labels_are_spread():
    assert spread_labels(3, 10) == [0, 4, 9] and spread_labels(1, 10) == [0]
    assert spread_labels(10, 10) == list(range(10)) and spread_labels(12, 10)[-2:] == [0, 1]


def test_names_at_the_ends_of_lines_do_not_overlap():
    y = report.spread({"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.9}, 0.06)
    ordered = [y[k] for k in "abc"]
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.055
    assert y["d"] == 0.9 and math.isclose(sum(ordered), 1.51, abs_tol=1e-6)


def test_module_runs_and_reports_its_status(tmp_path):
    command = [sys.executable, "-m", "diffusers_sde.cli", "compare", "--steps", "0", "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "--steps must be at least 1" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and os.listdir(tmp_path) == []


# -- the calibrated sampler --


def test_calibrated_scheduler_beside_the_model_is_shown_by_default(mixture_folder, tmp_path, capsys):
    """It lies in ``<model>/calibrated`` and wins at a number of steps that it was calibrated for; a model without one
    is shown without it, and asking for it says how to make one."""
    folder = tmp_path / "model"
    shutil.copytree(mixture_folder, folder)
    plain = problems.make_problem(load_pipeline(str(folder)), num_images=8, seed=1)
    assert "calibrated" not in engine.default_samplers(plain, [5])
    assert run("--model", folder, "--samplers", "calibrated", "--steps", 5, "--output_dir", tmp_path / "out") == 2
    assert "diffusers-sde calibrate" in capsys.readouterr().err

    pipe = load_pipeline(str(folder))
    options = {"num_samples": 32, "budget": 0, "batch_size": 16, "progress": False}
    calibrate(pipe, num_inference_steps=5, **options).save_pretrained(folder / "calibrated")
    problem = problems.make_problem(load_pipeline(str(folder)), num_images=8, seed=1)
    assert engine.default_samplers(problem, [5])[0] == "calibrated"
    found = errors(problem, ["calibrated", "pf-ode", "unipc"], [5])
    assert found["calibrated", 5] == min(found.values())


def test_calibrated_scheduler_of_another_process_is_refused(mixture_folder, tmp_path):
    pipe = load_pipeline(mixture_folder)
    options = {"num_samples": 16, "budget": 0, "batch_size": 16, "progress": False}
    calibrate(pipe, num_inference_steps=4, **options).save_pretrained(tmp_path / "calibrated")
    config = {**pipe.scheduler.config, "calibrated": str(tmp_path / "calibrated")}
    named_samplers.make_scheduler("calibrated", config)
    with pytest.raises(UsageError, match="beta_end"):
        named_samplers.make_scheduler("calibrated", {**config, "beta_end": 0.03})


@pytest.fixture(scope="module")
def embedded():
    return problems.make_problem(load_pipeline("fashion_mnist"), num_images=1, seed=0)


def test_a_calibrated_sampler_is_offered_where_it_was_learned(embedded):
    """Elsewhere it is the exact solver on an interpolated grid, which is another row of the sheet already."""
    assert engine.offered("calibrated", 5, embedded) and not engine.offered("calibrated", 7, embedded)
    assert engine.offered("unipc", 7, embedded)
    with pytest.raises(UsageError, match="4, 5, 6, 8, 10 evaluations: choose one of these numbers"):
        engine.check_samplers(["calibrated"], [20, 30], embedded)
    assert "calibrated" in engine.default_samplers(embedded, [7, 8]) and "calibrated" not in engine.default_samplers(
        embedded, [7, 20]
    )


def test_a_sheet_says_where_a_calibrated_sampler_is_not_offered(embedded, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a calibrated scheduler warns where it is run at another number
        state = finished(embedded, ["calibrated", "pf-ode"], [3, 4, 7], reference_steps=14)
    assert state.jobs == (("pf-ode", 3), ("calibrated", 4), ("pf-ode", 4), ("pf-ode", 7))
    assert [(r.sampler, r.budget) for r in state.by_sampler] == sorted(state.jobs)
    assert "calibrated: not calibrated for 3, not calibrated for 7." in report.format_table(state).splitlines()
    assert state.absence("calibrated", 4) is None and state.absence("pf-ode", 7) is None
    report.write(state, tmp_path / "out")
    assert [(r["sampler"], r["nfe"]) for r in table(tmp_path / "out")] == [(n, str(k)) for n, k in sorted(state.jobs)]


def test_a_calibrated_table_that_lost_to_the_exact_solver_is_not_offered(embedded, tmp_path):
    """Its entry holds the exact solver: a cell of that name would be another's."""
    config = json.loads((Path(embedded.config["calibrated"]) / "scheduler_config.json").read_text())
    entry = config["calibration"]["tables"]["5"]
    entry |= {
        "rows": None,
        "tau": None,
        "errors": {**entry["errors"], "lost": 1.0, "held_out": entry["errors"]["exact"]},
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    problem = dataclasses.replace(embedded, config={**embedded.config, "calibrated": str(tmp_path)})
    assert [n for n in range(1, 12) if engine.offered("calibrated", n, problem)] == [4, 6, 8, 10]


# -- the states of a comparison --


def test_states_show_one_more_solution_each_and_errors_as_soon_as_there_is_a_reference(mixture_folder):
    problem, ticks = problems.make_problem(load_pipeline(mixture_folder), num_images=2, seed=0), []
    states = list(engine.compare(problem, ["ddim", "euler-a"], [4, 2], reference_steps=8, tick=lambda: ticks.append(1)))
    assert [len(s.results) for s in states] == [0, 1, 1, 2, 3, 4, 4]
    assert [s.done for s in states] == [0, 2, 10, 12, 16, 20, 24]
    assert len(ticks) == states[0].total == states[-1].done
    assert [s.finished for s in states] == [False] * 6 + [True]
    assert [r.mean is None for r in states[1].results] == [True] and states[1].reference is None
    reference = states[2].reference
    expected = (states[2].results[0].images - reference).double().square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(torch.from_numpy(states[2].results[0].errors), expected)
    assert states[-1].cell("euler-a", 4).errors is None and states[-1].best(4) == states[-1].cell("ddim", 4).mean
    coarse = problem.solve(named_samplers.reference_scheduler(problem.config), 4, lambda: None)
    difference = (coarse - reference).double().square().mean((1, 2, 3)).sqrt().mean()
    assert states[-1].reference_error == pytest.approx(float(difference))


def test_a_comparison_that_is_left_computes_nothing_more(mixture_folder):
    problem, solved = problems.make_problem(load_pipeline(mixture_folder), num_images=1, seed=0), []
    watched = dataclasses.replace(problem, solve=lambda *a: (solved.append(a), problem.solve(*a))[1])
    states = engine.compare(watched, ["ddim"], [2, 3])
    next(states)
    assert solved == []
    next(states)
    states.close()
    assert [steps for _, steps, _ in solved] == [1, 2]  # one evaluation that warms up, and the first cell


def test_a_known_reference_is_not_solved_again(mixture_folder):
    problem = problems.make_problem(load_pipeline(mixture_folder), num_images=1, seed=0)
    once = finished(problem, ["ddim"], [3])
    assert once.reference_steps == engine.REFERENCE_STEPS == 100
    again = finished(problem, ["ddim"], [3], solve_reference=lambda n: once.reference + (n == 50))
    assert again.results[0].mean == once.results[0].mean and again.reference_error == pytest.approx(1)


def test_the_reference_has_at_least_twice_the_evaluations_of_a_cell():
    assert engine.reference_steps_for([5, 20]) == 100 and engine.reference_steps_for([80, 5]) == 160
