"""No number without what computes it: the pipelines' table by tests that quote it, the other tables by the bench."""

import ast
import re
from pathlib import Path

import pytest
from stated import README

from diffusers_sde.benchmarks.command import SECTIONS

NUMBER = re.compile(r"(?<![\w.])\d*\.?\d+(?:e-?\d+)?(?![\w.])")
PIPELINES = [row.split(" | ") for row in README.splitlines() if row.startswith("| [`") and "](pipelines/" in row]


def quoted():
    """What the tests quote: the arguments of ``stated``."""
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stated":
                yield ast.literal_eval(node.args[0])


@pytest.mark.parametrize("row", PIPELINES, ids=lambda row: row[0])
def test_what_was_measured_of_a_pipeline_is_quoted_by_the_test_that_computes_it(row):
    assert NUMBER.search(row[2]) and row[2] in set(quoted())


def test_sections_that_measure_exist():
    """Every bench section and option that README names as the source of a table is one of the command's."""
    patterns = (r"diffusers-sde bench --sections ((?:[a-z]+ ?)+)", r"sections `([a-z ]+)`")
    named = [names for pattern in patterns for names in re.findall(pattern, README)]
    assert len(named) >= 3
    assert {name for names in named for name in names.split()} <= set(SECTIONS)
