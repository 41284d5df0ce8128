"""How many random changes of a module's code do its tests notice?

    python .ci/mutation.py diffusers_sde/prediction diffusers_sde/paths --sample 40 --seed 0

draws mutants of the modules with ``mutmut`` 3, runs on each the tests that ``mutation.toml`` names for the modules and
that call the changed function, and prints how many were killed, with the others as differences.  Mutants that no
test can tell from the original are listed there with the reason and not counted.  Works on a copy of the tree in a
temporary folder.  Not mutated: decorated functions (properties, ``torch.no_grad``), messages, module constants.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

from mutmut import __main__ as mutmut
from mutmut import configuration
from mutmut.mutation import mutators
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).parents[1]
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def leave_out_what_proves_little() -> None:
    """Of mutmut's changes, those of texts (messages) and those to None (almost all fail at once)."""

    def dropped_arguments(call):
        return (c for c in mutators.operator_arg_removal(call) if len(c.args) < len(call.args))

    left_out = (mutators.operator_string, mutators.operator_assignment, mutators.operator_arg_removal)
    kept = [pair for pair in mutators.mutation_operators if pair[1] not in left_out]
    mutators.mutation_operators[:] = [*kept, (mutators.cst.Call, dropped_arguments)]


def copy_tree(folder: Path) -> None:
    """The files that git knows or would add, without the history."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for file in (folder / "pipelines").glob("*.py"):
        rename_while_imported(file, f"pipelines.{file.stem}")


def rename_while_imported(file: Path, name: str) -> None:
    """diffusers imports pipelines under names of its own; mutmut knows their functions by their path."""
    future = "from __future__ import annotations\n"
    begin = f'imported_as, __name__ = __name__, "{name}"\nsys.modules[__name__] = sys.modules[imported_as]\n'
    end = "\n\n__name__ = imported_as\n"
    file.write_text(file.read_text().replace(future, f"{future}import sys\n\n{begin}", 1) + end)


def files_of(module: str) -> list[Path]:
    path = Path(module)
    return sorted(path.glob("**/*.py")) if path.is_dir() else [path.with_suffix(".py")]


def changed_lines(name: str, path: Path) -> tuple[str, str]:
    """The lines that the mutant replaces, and their replacement."""
    lines = get_diff_for_mutant(name, path=path).splitlines()
    body = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return tuple(" ".join(line[1:].strip() for line in body if line.startswith(sign)) for sign in "-+")


def run(modules: list[str], size: int, seed: int, processes: int) -> None:
    files = {module: files_of(module) for module in modules}
    configuration._config = replace(
        configuration.config(),
        only_mutate=[str(path) for paths in files.values() for path in paths],
        pytest_add_cli_args_test_selection=sorted({test for module in modules for test in TABLE["tests"][module]}),
    )
    leave_out_what_proves_little()
    mutants, drawn = {}, {}
    for module, paths in files.items():
        mutants[module] = [
            (get_mutant_name(path, name), path)
            for path in paths
            for name in mutate_file_contents(str(path), path.read_text()).mutant_names
        ]
        drawn[module] = random.Random(f"{seed} {module}").sample(mutants[module], min(size, len(mutants[module])))
    mutmut._run([name for sample in drawn.values() for name, _ in sample], processes)
    equivalent = {(entry["line"], entry["mutant"]) for entry in TABLE.get("equivalent", [])}
    for module, sample in drawn.items():
        counts = dict.fromkeys(("killed", "equivalent", "survived"), 0)
        for name, path in sample:
            data = SourceFileMutationData(path=path)
            data.load()
            status = status_by_exit_code[data.exit_code_by_key[name]]
            before, after = changed_lines(name, path)
            if status in ("killed", "timeout", "segfault"):
                kind = "killed"
            elif (before, after) in equivalent:
                kind = "equivalent"
            else:
                kind = "survived"
                print(f"{status}: {name}\n  - {before}\n  + {after}")
            counts[kind] += 1
        numbers = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        share = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
        print(f"{module}: {len(sample)} of {len(mutants[module])} mutants, {numbers}: {share:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+", choices=sorted(TABLE["tests"]), metavar="module")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutation") as folder:
        copy_tree(Path(folder))
        os.chdir(folder)
        sys.path = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / ".ci")]
        run(arguments.modules, arguments.sample, arguments.seed, arguments.processes)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
