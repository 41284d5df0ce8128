"""The rooms of the package: who may know whom, read from the imports themselves (those inside functions too).

Each module stands in one room, each room in one layer of :data:`LAYERS`.  A module may import from its own room and
from any layer below, so that no arrow goes up and rooms of one layer know nothing of each other.
"""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "diffusers_sde"

# The lowest layer first.  A room is a package, or a module of its own; the theory is one room of several modules.
# fmt: off
THEORY = {
    "paths", "prediction", "dynamics", "grids", "named_grids", "weights", "extrapolation", "tables", "noise",
    "analytic", "flow_maps", "published", "transitions",
}
# fmt: on
LAYERS = [
    {"theory", "discrete"},
    {"errors", "argument_parser", "registration", "sampler_names", "hub", "conditioning"},
    {"configs", "defaults"},
    {"stock_configs"},
    {"models"},
    {"sampling"},
    {"schedulers", "methods"},
    {"class_conditional", "guiders"},
    {"assets", "generation"},
    {"names", "named_samplers", "loading"},
    {"calibration", "comparison", "training"},
    {"benchmarks"},
    {"cli", "train"},
    {PACKAGE},
]


def name_of(path):
    """diffusers_sde/training/__init__.py -> diffusers_sde.training"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def trees_for_types(tree):
    """What only a type checker reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from node.body


def imported(tree):
    """The full names that a module imports anywhere, ``package.module`` or ``package.module.name``; with importlib also
    those named in strings, for so the command line and the package itself import what is asked for."""
    by_name = any(isinstance(n, ast.Import) and "importlib" in n.names[0].name for n in ast.walk(tree))
    skipped = {id(n) for top in trees_for_types(tree) for n in ast.walk(top)}
    for node in (n for n in ast.walk(tree) if id(n) not in skipped):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif by_name and isinstance(node, ast.Constant) and node.value in MODULES:
            yield node.value


def module_in(name):
    """The module that an imported full name is or comes from; None for one of another package."""
    return next((name.rsplit(".", i)[0] for i in range(2) if name.rsplit(".", i)[0] in MODULES), None)


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
ARROWS = {name: {m for m in map(module_in, imported(tree)) if m and m != name} for name, tree in TREES.items()}


def room_of(module):
    first = module.removeprefix(f"{PACKAGE}.").split(".")[0]
    return "theory" if first in THEORY else first


def layer_of(module):
    return next(i for i, rooms in enumerate(LAYERS) if room_of(module) in rooms)


def may_import(module, other):
    return room_of(module) == room_of(other) or layer_of(other) < layer_of(module)


def test_every_module_has_its_room():
    named = [room for layer in LAYERS for room in layer]
    assert len(named) == len(set(named))
    assert {room_of(module) for module in MODULES} == set(named)
    theory = {module for module in MODULES if room_of(module) == "theory" and "._" not in module}  # private parts apart
    assert theory == {f"{PACKAGE}.{m}" for m in THEORY}


def test_no_import_goes_up_or_across():
    wrong = [f"{m} -> {other}" for m, others in ARROWS.items() for other in others if not may_import(m, other)]
    assert wrong == []


def test_modules_import_in_no_circle():
    try:
        tuple(graphlib.TopologicalSorter(ARROWS).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_are_seen():
    """Imports of modules, of names, inside functions and by name: the four kinds that the graph is made of."""
    assert f"{PACKAGE}.weights" in ARROWS[f"{PACKAGE}.tables"]
    assert f"{PACKAGE}.loading" in ARROWS[f"{PACKAGE}.calibration.command"]
    assert f"{PACKAGE}.benchmarks.steps" in ARROWS[f"{PACKAGE}.benchmarks.command"]
    assert f"{PACKAGE}.calibration.command" in ARROWS[f"{PACKAGE}.cli"]


PURE = sorted({f"{PACKAGE}.{m}" for m in THEORY} | {m for m in MODULES if room_of(m) == "discrete"})


@pytest.mark.parametrize("module", PURE)
def test_theory_stands_on_torch_and_numpy_alone(module):
    used = {name.split(".")[0] for name in imported(TREES[module])}
    assert used - set(sys.stdlib_module_names) <= {PACKAGE, "torch", "numpy", "scipy"}


def test_theory_runs_without_diffusers():
    """Nor does importing it bring diffusers in by a way that no import statement shows."""
    names = ", ".join(PURE)
    code = f"import sys; sys.modules['diffusers'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", ["pipelines", "spaces_demo"])
def test_what_stands_on_the_package_imports_only_public_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            assert parts[0] != PACKAGE or not any(part.startswith("_") for part in parts), f"{path}: {name}"


def test_rooms_import_only_public_names_of_each_other():
    for module, tree in TREES.items():
        for name in imported(tree):
            source = module_in(name)
            if source and room_of(source) != room_of(module):
                assert not name.removeprefix(source).startswith("._"), f"{module}: {name}"


# -- what the text cites is there --


@pytest.mark.parametrize("folder", [PACKAGE, "pipelines", "spaces_demo", "tests"])
def test_documents_that_are_cited_lie_in_the_tree(folder):
    """Names in capitals, as that of the readme, and paths, in any text of the code."""
    document = re.compile(r"\b[A-Z]{2,}\.md\b|\b(?:pipelines|spaces_demo|tests|docs|shared)/[\w/]+\.\w+")
    for path in sorted((ROOT / folder).rglob("*.py")):
        for cited in document.findall(path.read_text()):
            assert any((ROOT / place / cited).is_file() for place in (".", ".github")), f"{path}: {cited}"


@pytest.mark.parametrize("folder", [PACKAGE, "pipelines"])
def test_what_docstrings_point_at_exists(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        text, room = path.read_text(), name_of(path).rsplit(".", 1)[0] if path.name != "__init__.py" else name_of(path)
        for cited in re.findall(rf":\w+:`~?((?:{PACKAGE})?\.[\w.]+|{PACKAGE})`", text):
            cited = room + cited if cited.startswith(".") else cited
            module, rest = cited, []
            while module not in MODULES:
                module, _, last = module.rpartition(".")
                assert module, f"{path}: {cited}"
                rest.insert(0, last)
            found = importlib.import_module(module)
            for name in rest:
                assert hasattr(found, name), f"{path}: {cited}"
                found = getattr(found, name)


@pytest.mark.parametrize("document", ["README.md", ".github/CONTRIBUTING.md", "spaces_demo/README.md"])
def test_links_of_the_documents_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target
