"""What the tabs of the Space compute, without a browser: inputs, sheets, programs, paths, particles, budgets."""

from __future__ import annotations

import base64
import csv
import functools
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from space import compare, error_lab, gpu, inputs, models, pictures, playground, trajectory, turns
from space.recording import record
from space_helpers import DEMO

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler
from diffusers_sde.assets import EXAMPLE_PROMPTS
from diffusers_sde.comparison import engine
from diffusers_sde.errors import UsageError
from diffusers_sde.sampler_names import SAMPLERS
from diffusers_sde.sampling import network_denoiser, sample

SMALL = {
    "model": "fashion",
    "samplers": ["unipc", "reverse-sde"],
    "budgets": [2, 3],
    "images": 2,
    "choice": "bag",
    "seed": 3,
}


@pytest.fixture(scope="module")
def quick() -> pytest.MonkeyPatch:
    """A reference that is good enough to be told from what it judges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "REFERENCE_STEPS", 12)
        yield patch


@pytest.fixture(scope="module")
def sheets(quick: pytest.MonkeyPatch) -> list[compare.Sheet]:
    return list(compare.sheets(compare.checked(**SMALL)))


# -- inputs --


def test_computation_needs_no_gradio() -> None:
    modules = "compare trajectory playground error_lab models inputs pictures gpu recording turns"
    code = f"import sys; sys.path.insert(0, {str(DEMO)!r})\n"
    code += "".join(f"import space.{name}\n" for name in modules.split())
    code += "assert not {'gradio', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", ["", "0", "101", "5, x", "1 2 3 4 5 6", "nan", "5.5", [-1], None])
def test_budgets_are_refused_with_a_remedy(bad: object) -> None:
    with pytest.raises(UsageError, match="evaluations"):
        inputs.budgets(bad)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_budgets_are_sorted_and_distinct(values: list[int]) -> None:
    assert inputs.budgets(", ".join(map(str, values))) == inputs.budgets(values) == sorted(set(values))


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"seed": 2**31},
        {"seed": 0.5},
        {"guidance": 21},
        {"guidance": float("nan")},
        {"samplers": []},
        {"samplers": ["pf-ode", "x"]},
        {"samplers": list(SAMPLERS)},
        {"images": 9},
        {"prompt": "a" * 301},
        {"model": "x"},
        {"model": "fashion", "choice": "x"},
        {"budgets": [99, 100], "images": 8, "samplers": ["pf-ode", "unipc", "ddim", "deis"]},  # 6,368 evaluations
    ],
)
def test_compare_refuses_what_it_cannot_do(bad: dict) -> None:
    with pytest.raises(UsageError):
        compare.checked(**bad)


def test_unavailable_models_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_gpu", lambda: False)
    assert models.unavailable(models.MODELS["fashion"]) is None
    assert models.unavailable(models.MODELS["sdxl"]) == "needs a GPU"
    with pytest.raises(UsageError, match="needs a GPU"):
        models.find("sdxl")
    absent = replace(models.MODELS["fashion"], key="absent", source="absent")
    assert "not part" in (models.unavailable(absent) or "")


def test_a_model_that_fails_to_load_is_greyed_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = models.Model("broken", "Broken", "nobody/nothing")  # neither here nor on an offline Hub
    monkeypatch.setattr(models, "_failed", {})
    with pytest.raises(UsageError, match="Broken could not be loaded"):
        models.shared_pipeline(broken)
    assert models.unavailable(broken) == "could not be loaded"


def test_time_on_a_gpu_grows_with_steps_and_samplers() -> None:
    one = gpu.duration("sdxl", [20], 1, 64)
    assert gpu.duration("sdxl", [20, 40], 1, 64) > one < gpu.duration("sdxl", [20], 2, 64) <= gpu.LONGEST


# -- compare --


def test_a_sheet_fills_cell_by_cell_with_true_evaluations(sheets: list[compare.Sheet]) -> None:
    states = [sheet.comparison for sheet in sheets]
    done = [state.done for state in states]
    assert done == sorted(done) and done[-1] == states[-1].total and len(states[1].results) == 1
    assert [(r.sampler, r.nfe) for r in states[-1].results] == [
        ("unipc", 2), ("reverse-sde", 2), ("unipc", 3), ("reverse-sde", 3)
    ]  # fmt: skip
    assert all(r.seconds > 0 for r in states[-1].results) and states[-1].finished


def test_the_space_compares_as_the_command_does(sheets: list[compare.Sheet]) -> None:
    """One engine: the same cells, reference and errors as ``diffusers-sde compare`` finds."""
    final = sheets[-1].comparison
    *_, expected = engine.compare(compare.problem_of(sheets[-1].request), SMALL["samplers"], SMALL["budgets"])
    assert [(r.sampler, r.budget, r.mean) for r in final.results] == [
        (r.sampler, r.budget, r.mean) for r in expected.results
    ]
    assert (final.reference_steps, final.reference_error) == (expected.reference_steps, expected.reference_error)


def test_a_reference_is_kept_for_other_samplers_on_the_same_noise(quick: pytest.MonkeyPatch) -> None:
    request = compare.checked(**SMALL)
    *_, first = compare.sheets(request)
    quick.setattr(compare, "reference_scheduler", None)
    *_, second = compare.sheets(replace(request, samplers=("ddim",)))
    assert second.comparison.reference is first.comparison.reference


def test_the_samplers_of_the_model_are_compared_where_none_are_named() -> None:
    assert compare.choices("fashion")[1] == ["calibrated", "pf-ode", "dpm++2m", "unipc"]
    sheet = next(compare.sheets(compare.checked(model="fashion", budgets=[5, 7])))
    assert sheet.comparison.samplers == ("calibrated", "pf-ode", "dpm++2m", "unipc")
    unloaded, chosen = compare.choices("sana")
    assert "calibrated" not in unloaded and chosen == ["pf-ode", "dpm++2m", "unipc", "ddim"]


def test_the_page_says_where_a_calibrated_sampler_is_not_offered() -> None:
    """At 7 evaluations it would be the exact solver under another's name."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
    from space import compare_tab

    sheet = next(compare.sheets(compare.checked(model="fashion", samplers=["calibrated", "unipc"], budgets=[5, 7])))
    assert ("calibrated", 7) not in sheet.comparison.jobs and len(sheet.comparison.jobs) == 3
    page = compare_tab.render(sheet)
    assert page.count("not calibrated for 7") == 1 and "not calibrated for 5" not in page


def test_a_pipeline_of_ones_own_shares_weights_and_nothing_that_a_request_changes() -> None:
    shared = models.shared_pipeline(models.MODELS["fashion"])
    own = models.own_pipeline(shared)
    assert own.unet.conv_in.weight is shared.unet.conv_in.weight and own.name_or_path == shared.name_or_path
    own.unet.forward = None  # as capture does while it asks a pipeline for its condition
    own.scheduler.set_timesteps(3)
    own.scheduler = ProbabilityFlowScheduler.from_config(shared.scheduler.config)
    assert shared.unet.forward is not None and len(shared.scheduler.timesteps) == 1000
    assert type(shared.scheduler).__name__ == "DDPMScheduler"


@pytest.mark.parametrize("sampler", ["unipc", "reverse-sde"])
def test_the_program_of_a_cell_makes_its_pixels(sheets: list[compare.Sheet], sampler: str) -> None:
    names: dict = {}
    exec(compare.program(sheets[-1].request, sampler, 3), names)
    torch.testing.assert_close(names["images"], sheets[-1].comparison.cell(sampler, 3).images, rtol=0, atol=0)


def test_the_program_of_a_calibrated_cell_makes_its_pixels() -> None:
    request, names = compare.checked(model="fashion", samplers=["calibrated"], budgets=[5], images=1), {}
    exec(compare.program(request, "calibrated", 5), names)
    problem = models.problem("fashion", seed=0, guidance=2.0, images=1)
    torch.testing.assert_close(names["images"], engine.solve_cell(problem, "calibrated", 5).images, rtol=0, atol=0)


def test_a_cancelled_comparison_stops_between_cells(quick: pytest.MonkeyPatch) -> None:
    calls = []
    quick.setattr(engine, "solve_cell", lambda *a, solve=engine.solve_cell: (calls.append(a), solve(*a))[1])
    stream = compare.sheets(compare.checked(**SMALL))
    next(stream), next(stream)
    stream.close()
    assert len(calls) == 1


def test_files_hold_every_cell(sheets: list[compare.Sheet], tmp_path) -> None:
    picture, table = compare.write_files(sheets[-1], tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [row["nfe"] for row in csv.DictReader(table.open())] == ["2", "3", "2", "3"]


def test_what_the_page_shows_and_offers_is_in_the_page(sheets: list[compare.Sheet]) -> None:
    """The server keeps no file, and of a sheet what any page may ask for again."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
    from space import compare_tab

    request = sheets[-1].request
    _, program, pictures = compare_tab.choose(request, "unipc · 3", compare_tab.REFERENCE)
    left, right = re.findall('src="data:image/png;base64,([^"]+)"', pictures)
    assert "UniPCMultistepScheduler" in program and left != right
    png, table = (base64.b64decode(data) for data in re.findall('base64,([^"]+)', compare_tab.files(sheets[-1])))
    assert png[:4] == b"\x89PNG" and table.startswith(b"sampler,nfe,seconds")
    assert not any(isinstance(value, str) for value in compare_tab.choose(None, "unipc · 2", compare_tab.REFERENCE))


def test_only_the_last_sheets_are_kept() -> None:
    recent = compare.Recent(2)
    for key in "abc":
        recent.put(key, key.upper())
    assert [recent.get(key) for key in "abc"] == [None, "B", "C"]


def test_pictures_keep_their_pixels() -> None:
    image = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)
    row = np.asarray(pictures.picture(image, gap=1))
    assert row.shape == (4, 9, 3) and (row[:, 4] == 255).all()
    np.testing.assert_allclose(row[:, :4, 0] / 127.5 - 1, image[0, 0], atol=1 / 127)
    assert pictures.data_uri(pictures.picture(image)).startswith("data:image/png;base64,")


# -- text --


def test_pictures_from_text_are_those_of_the_prompt_or_of_the_examples() -> None:
    assert models.prompts_of(" a cat ", 2) == ["a cat"] * 2
    assert models.prompts_of("", 9) == [*EXAMPLE_PROMPTS, EXAMPLE_PROMPTS[0]]


def test_the_program_of_a_picture_from_text_makes_its_pixels() -> None:
    request, names = compare.checked(prompt="it's a rocket", images=2, seed=4), {}
    exec(compare.program(request, "unipc", 2), names)
    cell = engine.solve_cell(compare.problem_of(request), "unipc", 2)
    pixels = np.stack([np.asarray(image) for image in names["images"]]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(pixels, cell.images, atol=1 / 127)  # a picture has 8 bits


def test_a_way_in_latents_ends_in_the_picture_of_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ODE from the same noise: the last frame, decoded, is what the pipeline's own call makes."""
    monkeypatch.setattr(trajectory, "MAX_FRAMES", 3)
    request = trajectory.checked(prompt="rocket", seed=2, steps=4, tau=0, guidance=3)
    first = next(trajectory.journey(request))
    pipe = models.own_pipeline(models.shared_pipeline(models.MODELS["emoji"]))
    pipe.scheduler = trajectory.solver(pipe.scheduler.config, 0, 0)
    generator = torch.Generator().manual_seed(2)
    expected = pipe("rocket", guidance_scale=3, num_inference_steps=4, generator=generator, output_type="pt").images
    torch.testing.assert_close(first.frames[-1].clean.clamp(-1, 1), expected * 2 - 1, atol=1e-4, rtol=0)
    levels = [frame.log_snr for frame in first.frames]
    assert len(levels) == 3 and levels == sorted(levels) and first.frames[0].state.shape == (1, 3, 64, 64)


# -- turns --


def counted(tick: Any, n: int) -> Iterator[int]:
    for i in range(n):
        tick()
        yield i


def test_what_nobody_waits_for_stops_at_the_next_evaluation() -> None:
    evaluations, shared = [], turns.Turns(1)

    def long(tick: Any) -> Iterator[int]:
        for i in range(100):
            evaluations.append(i)
            tick()
        yield 0

    with pytest.raises(turns.Abandoned):
        list(turns.in_turn(long, lambda: len(evaluations) < 3, shared))
    assert evaluations == [0, 1, 2]
    assert list(turns.in_turn(functools.partial(counted, n=2), turns=shared)) == [0, 1]  # its place is free again


def test_a_light_request_goes_before_one_that_has_computed_for_long() -> None:
    """Its ten evaluations are over when the other one's hundred have hardly begun."""
    shared, order = turns.Turns(1), []

    def work(name: str, n: int) -> Any:
        def make(tick: Any) -> Iterator[None]:
            for _ in range(n):
                time.sleep(0.003)
                order.append(name)
                tick()
            yield

        return threading.Thread(target=lambda: list(turns.in_turn(make, turns=shared)))

    heavy, light = work("heavy", 100), work("light", 10)
    heavy.start()
    while len(order) < 20:
        time.sleep(0.001)
    light.start()
    light.join(), heavy.join()
    assert order.index("light") < 40 and order[::-1].index("light") > 60 and len(order) == 110


# -- trajectory --


def test_a_recording_ends_where_sampling_ends() -> None:
    model = GaussianMixtureModel([1.0, 1.0], [[1.0, 0.0], [-1.0, 0.5]], [0.1, 0.2])
    noise = torch.randn(5, 1, 1, 2, dtype=torch.float64)
    scheduler = ProbabilityFlowScheduler()
    scheduler.set_timesteps(7)
    found = record(network_denoiser(model), scheduler, noise)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(found.states[-1], sample(network_denoiser(model), scheduler, noise))
    assert found.states.shape == (8, 5, 1, 1, 2) and found.clean.shape[0] == 7
    assert (np.diff(found.levels.log_snr) > 0).all() and np.isposinf(found.levels.log_snr[-1])


def test_the_picture_of_the_sde_stays_from_20_to_40_steps_and_ancestral_does_not() -> None:
    """A picture near a boundary between two shapes may flip (seed 1 does), so on average over seeds."""
    unlike: dict[str, list[float]] = {kind: [] for kind in trajectory.STAYING}
    for seed in range(3):
        *_, state = trajectory.journey(trajectory.checked(model="fashion", steps=5, tau=1.0, seed=seed))
        for kind, values in unlike.items():
            values.append(1 - trajectory.likeness(state.staying[kind, 20], state.staying[kind, 40]))
    ode, sde, ancestral = (np.mean(unlike[kind]) for kind in ("ODE", "SDE", "Euler ancestral"))
    assert ode < 0.02 and sde < 0.5 * ancestral
    assert set(state.dial) == set(trajectory.TAUS) and state.done == state.total


# -- playground --


@pytest.mark.parametrize("name", playground.DISTRIBUTIONS)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_particles_reach_the_data(name: str, tau: float) -> None:
    found = playground.flow(playground.checked(distribution=name, tau=tau, steps=40, particles=600, seed=1))
    assert found.distance < 2.5 * found.floor + 0.05


def test_densities_are_normalised_and_scores_are_their_gradients() -> None:
    model = playground.DISTRIBUTIONS["clusters"]()
    cell = (2 * playground.EXTENT / (playground.RESOLUTION - 1)) ** 2
    assert playground.density(model).sum() * cell == pytest.approx(1, abs=0.02)
    points, field = playground.score_field(model, 0.8, 0.6)
    x = torch.from_numpy(points)[:, None, None].requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(x, 0.8, 0.6).sum(), x)
    np.testing.assert_allclose(field, 0.6 * gradient.reshape(-1, 2), atol=1e-9)


def test_guidance_of_scale_one_and_monte_carlo_sample_the_component() -> None:
    found = playground.guided(
        playground.checked(distribution="clusters", component=1, scale=1.0, particles=800, steps=40)
    )
    assert max(found.distances) < 3 * found.floor + 0.03


def test_monte_carlo_samples_the_tilted_law_that_guidance_misses() -> None:
    """Lu, arXiv:2607.01693, section 8."""
    found = playground.guided(
        playground.checked(distribution="clusters", component=1, scale=4.0, particles=800, steps=40)
    )
    assert found.distances[1] < 0.5 * found.distances[0]
    assert ((found.effective > 0) & (found.effective <= 1 + 1e-9)).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=60))
def test_any_drawing_is_a_distribution(points: list) -> None:
    model = playground.from_points([list(p) for p in points])
    assert np.isfinite(playground.density(model)).all() and len(model.config.weights) <= 24


def test_a_tilted_law_at_the_border_is_not_cut_off() -> None:
    points = [[2.5, v] for v in (-2.0, 0.0, 2.0)]
    model = playground.mixture(playground.checked(distribution="drawn", points=points))
    law = playground.tilted_density(model, playground.conditional_law(model, 0), 1.0)
    mass, u = law.sum(0) / law.sum(), playground.axis(len(law), playground.WIDE)
    mean, covariance = model.config.means[0], model.covariances[0]
    assert mass @ u == pytest.approx(mean[0], abs=1e-3)
    assert mass @ (u - mean[0]) ** 2 == pytest.approx(float(covariance[0, 0]), rel=0.05)


@pytest.mark.parametrize("bad", [None, "[]", "x", [[1]], [[float("nan"), 0]], [[0, 0]] * 401])
def test_a_bad_drawing_is_refused(bad: object) -> None:
    with pytest.raises(UsageError, match="Draw"):
        playground.checked(distribution="drawn", points=bad, component=0)


@pytest.mark.parametrize("bad", [{"steps": 101}, {"tau": 3}, {"particles": 2000}, {"grid": "x"}, {"component": 99}])
def test_playground_refuses_what_it_cannot_do(bad: dict) -> None:
    with pytest.raises(UsageError):
        playground.checked(**bad)


# -- error lab --


def test_a_fitted_slope_is_the_order() -> None:
    points = [(n, 3.0 * n**-2.5) for n in (5, 10, 20, 40, 80)]
    assert error_lab.fit_slope(points) == pytest.approx(2.5)
    assert error_lab.fit_slope(points, floor=1.0) is None


def test_orders_show_in_the_slopes() -> None:
    *_, found = error_lab.curves("mixture", ["pf-ode", "ddim"], 0)
    assert found.slope("ddim") == pytest.approx(1, abs=0.35)
    assert found.slope("pf-ode") > 1.8


@pytest.mark.parametrize("bad", [("x", ["ddim"]), ("mixture", ["ddpm"]), ("mixture", [])])
def test_error_lab_refuses_what_has_no_error(bad: tuple) -> None:
    with pytest.raises(UsageError):
        list(error_lab.curves(*bad, 0))


def test_the_whole_error_is_at_most_the_stack() -> None:
    for score in (0.0, 0.1):
        found = error_lab.budget(error_lab.checked_dials(noise=4, score=score))
        for parts in found.parts:
            assert parts["together"] <= sum(parts[source] for source in error_lab.SOURCES) + 1e-6
            assert (parts["score"] < 1e-5) == (score == 0)


def test_each_dial_moves_its_own_part() -> None:
    plain = error_lab.budget(error_lab.Dials()).parts
    noisier = error_lab.budget(error_lab.Dials(noise=40)).parts
    assert noisier[2]["initialisation"] < 0.5 * plain[2]["initialisation"]
    assert plain[3]["discretisation"] < 0.3 * plain[0]["discretisation"]


def test_the_process_of_a_noise_level_ends_there() -> None:
    for noise in (2, 8, 40):
        path = ProbabilityFlowScheduler(beta_end=error_lab.beta_end(noise)).path
        assert np.exp(-path.log_snr(path.noisiest)) == pytest.approx(noise, rel=1e-6)


def test_the_table_holds_both_parts() -> None:
    *_, found = error_lab.curves("mixture", ["ddim"], 0)
    made_of = error_lab.budget(error_lab.Dials())
    rows = list(csv.DictReader(io.StringIO(error_lab.as_csv(found, made_of))))
    assert {row["part"] for row in rows} == {"error", "slope", "budget"}
    assert len(rows) == len(error_lab.NFES["mixture"]) + 1 + 4 * len(error_lab.BUDGET_STEPS)
