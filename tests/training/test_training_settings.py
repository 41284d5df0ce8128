"""The settings of a training and the command line that spells them; what starting the package costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from diffusers_sde import cli
from diffusers_sde.errors import UsageError
from diffusers_sde.prediction import PREDICTION_TYPES
from diffusers_sde.training import networks, settings
from diffusers_sde.training.arguments import make_settings, read_settings
from diffusers_sde.training.settings import Settings, build_parser

LEAST = ["--train_data_dir", "data", "--output_dir", "out", "--report_to", "none"]


def in_new_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["diffusers_sde.train", "diffusers_sde.cli"])
@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--no_such_flag"], 2)])
def test_help_and_wrong_flags_are_answered_within_a_second_of_cpu_without_torch(
    module: str, words: list[str], status: int
) -> None:
    program = f"""
import resource, runpy, sys
sys.argv[1:] = {words}
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    status = stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "diffusers", "accelerate", "numpy") if name in sys.modules]
print("\\n", status, heavy, used.ru_utime + used.ru_stime < 1)"""
    assert in_new_process(program).splitlines()[-1].strip() == f"{status} [] True"


@pytest.mark.parametrize("first", ["diffusers_sde", "diffusers.pipelines.pipeline_loading_utils"])
def test_the_package_is_known_to_the_pipeline_loader_whichever_is_imported_first_and_finds_its_names(
    first: str,
) -> None:
    program = f"""
import {first}
import diffusers_sde
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
for name in diffusers_sde.__all__:
    assert getattr(diffusers_sde, name).__name__ == name and name in dir(diffusers_sde)
print(sorted(LOADABLE_CLASSES["diffusers_sde"]), hasattr(diffusers_sde, "no_such_name"))"""
    assert in_new_process(program) == "['ModelMixin', 'SchedulerMixin'] False"


def test_every_setting_is_an_argument_of_its_own_type() -> None:
    read = read_settings(LEAST)
    hints = get_type_hints(Settings)
    actions = {action.dest for action in build_parser()._actions} - {"help"}
    assert actions == {field.name for field in dataclasses.fields(Settings)}
    for name in actions:
        value = getattr(read, name)
        allowed = get_args(hints[name]) or (hints[name],)
        assert value in allowed or (value is None and type(None) in allowed) or type(value) in allowed, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lerning_rate 1", "there is no --lerning_rate: did you mean --learning_rate?"),
        ("--output-dir x", "there is no --output-dir: did you mean --output_dir?"),
        ("--batch_size=4", "there is no --batch_size: did you mean --train_batch_size?"),
        ("--max_train 4", "there is no --max_train: did you mean --max_train_steps?"),  # an abbreviation
        ("--qqqqqqqq", "there is no --qqqqqqqq: --help lists what there is."),
        ("-n 4", "there is no -n: --help lists what there is."),
        ("--seed 1 2", "a word after --seed belongs to no flag: put what has spaces into quotes, or leave it out."),
    ],
)
def test_a_wrong_flag_is_one_sentence_with_the_nearest_right_one(words: str, said: str, capsys) -> None:
    """Even where what must be given is missing, for it may be what was meant."""
    for others in (LEAST, []) if "seed" not in words else (LEAST,):
        with pytest.raises(SystemExit) as stop:
            read_settings([*others, *words.split()])
        assert stop.value.code == 2 and capsys.readouterr().err == f"{settings.LAUNCH}: {said}\n"


def test_a_wrong_flag_of_a_subcommand_is_told_in_the_same_way(capsys) -> None:
    assert cli.main(["prepare", "noto-emoji", "--output", "x"]) == 2
    assert (
        capsys.readouterr().err
        == "diffusers-sde prepare noto-emoji: there is no --output: did you mean --output_dir?\n"
    )


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_settings(LEAST).seed = 1  # type: ignore[misc]


def test_the_names_of_processes_and_predictions_are_those_of_the_theory() -> None:
    assert get_args(settings.PredictionType) == PREDICTION_TYPES
    for path in set(get_args(settings.ForwardPath)) - {"from_model"}:
        assert networks.process_scheduler(path, "v_prediction").config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"loss_weighting": "none", "time_mean": 0.0, "time_std": 1.0, "validation_inference_steps": 20}),
        ("--snr_gamma 3", {"loss_weighting": "min_snr", "snr_gamma": 3.0}),
        ("--loss_weighting soft_min_snr", {"loss_weighting": "soft_min_snr", "snr_gamma": 5.0}),
        ("--time_sampling lognormal", {"time_mean": -1.2, "time_std": 1.2}),
        ("--time_sampling lognormal --time_std 2", {"time_mean": -1.2, "time_std": 2.0}),
        ("--prediction_type score", {"prediction_type": "score"}),
        ("--validation_prompts a b", {"validation_prompts": ["a", "b"]}),
        ("--objective mean_flow", {"validation_inference_steps": 4}),
    ],
)
def test_defaults_follow_from_other_settings(words: str, expected: dict[str, object]) -> None:
    read = read_settings([*LEAST, *words.split()])
    assert {name: getattr(read, name) for name in expected} == expected


def test_trackers_are_shown_numbers_and_words_and_not_the_token_of_the_hub() -> None:
    read = read_settings([*LEAST, "--hub_token", "secret", "--validation_prompts", "a", "b"])
    assert read.hub_token == "secret" and "secret" not in map(str, read.public().values())
    assert read.public()["train_data_dir"] == "data" and read.public()["use_ema"] is False
    assert all(isinstance(value, int | float | str) for value in read.public().values())


def test_settings_made_in_python_are_checked_as_those_of_the_command_line() -> None:
    values = vars(build_parser().parse_args(LEAST))
    assert make_settings(values) == read_settings(LEAST)
    with pytest.raises(UsageError, match="--rank adds LoRA adapters"):
        make_settings({**values, "rank": 4})
