"""What the tests of the pipelines share: where they lie, and running a docstring's usage snippet."""

import ast
import re
from pathlib import Path

from diffusers import DiffusionPipeline

PIPELINES = Path(__file__).parents[1] / "pipelines"


def load(name, model):
    """A pipeline of the project on a model folder, without a progress bar."""
    file = str(PIPELINES / f"{name}.py")
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=file, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def snippet(name):
    """The Python block of a pipeline file's docstring, verbatim."""
    docstring = ast.get_docstring(ast.parse((PIPELINES / f"{name}.py").read_text()))
    (code,) = re.findall(r"```python\n(.*?)```", docstring, re.DOTALL)
    return code


def run_snippet(name, folder, monkeypatch):
    """Run the snippet in ``folder`` with ``pipelines`` beside it, as in a clone; returns its variables."""
    (folder / "pipelines").symlink_to(PIPELINES)
    monkeypatch.chdir(folder)
    variables = {}
    exec(compile(snippet(name), f"{name} snippet", "exec"), variables)
    return variables
