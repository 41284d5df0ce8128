"""``diffusers-sde``: help and wrong arguments are answered before torch and diffusers are imported."""

import subprocess
import sys

import pytest

from diffusers_sde.cli import COMMANDS, MODULES, module_of

SCRIPT = """if True:
    import sys
    from diffusers_sde.cli import main
    try:
        status = main(sys.argv[1:])
    finally:
        assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
    sys.exit(status)
"""


def answer(*arguments):
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS), ["prepare", "noto-emoji"]], ids=str)
def test_help_is_answered_without_torch(arguments):
    done = answer(*arguments, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: diffusers-sde") and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: {compare"),
        (["wrong"], "invalid choice: 'wrong'"),
        *(([name, "--wrong"], "--wrong") for name in COMMANDS if name != "prepare"),
        (["prepare", "fashion-mnist"], "required: --output_dir"),
        (["compare", "--steps", "five"], "'five'"),
        (["compare", "--samplers", "magic"], "'magic' is unknown: use any of calibrated, pf-ode"),
        (["compare", "--steps", "0"], "--steps must be at least 1"),
        (["bench", "--sections", "magic"], "invalid choice: 'magic'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_in_one_line_without_torch(arguments, words):
    done = answer(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_every_command_declares_and_runs():
    assert set(COMMANDS) == set(MODULES)
    for name in COMMANDS:
        assert callable(module_of(name).add_arguments) and callable(module_of(name).run)
