"""How a calibration is written in a scheduler config: plain numbers and lists, and the version of their arrangement.

Knows the keys of the file.  Knows no scheduler, nothing of how tables are learned, and not when they apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_sde.grids import Nodes
from diffusers_sde.tables import Row, Table

FORMAT_VERSION = 1  # counts up with every change of the keys below or of their meaning


def check_format(calibration: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a calibration is written in a format that is read here.

    One without a ``format_version`` is of the first format, from before it was counted.
    """
    version = calibration.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"This calibration is written in format {version} and this version of diffusers_sde reads format "
            f"{FORMAT_VERSION}: update diffusers_sde, or make the calibration again with diffusers_sde.calibrate."
        )


def written_calibration(
    process: Mapping[str, Any], data_std: float, stochastic: bool, entries: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """A calibration as it is written in a config.

    Args:
        process: the keys that must agree for it to apply.
        data_std: the data scale that says what F is in all rows.
        stochastic: whether it is a grid and tau of the reverse SDE.
        entries: for each number of steps what :func:`written_entry` made.
    """
    return {
        "format_version": FORMAT_VERSION,
        "process": dict(process),
        "data_std": data_std,
        "stochastic": stochastic,
        "tables": {str(n): dict(entry) for n, entry in entries.items()},
    }


def written_entry(
    nodes: Nodes, table: Table | None, tau: list[float] | None, errors: Mapping[str, Any]
) -> dict[str, Any]:
    """One number of steps as it is written in a config.

    Args:
        nodes: times at which the network is evaluated, and the levels of the states.
        table: its learned rows; None: the exact solver runs on these nodes.
        tau: one noise level a step, None without noise.
        errors: what was measured, by name.
    """
    entry: dict[str, Any] = {k: [float(v) for v in getattr(nodes, k)] for k in ("time", "alpha", "sigma")}
    entry["rows"] = None if table is None else [[row.a, *row.b] for row in table.rows]
    entry["tau"] = None if tau is None else [float(t) for t in tau]
    entry["errors"] = dict(errors)
    return entry


def entry_nodes(entry: Mapping[str, Any]) -> Nodes:
    """The nodes of a written entry."""
    return Nodes(*(np.asarray(entry[k], np.float64) for k in ("time", "alpha", "sigma")))


def entry_table(entry: Mapping[str, Any], data_std: float) -> Table | None:
    """The learned table of a written entry; None where it has none."""
    if entry["rows"] is None:
        return None
    columns = zip(entry["time"], entry["alpha"], entry["sigma"], entry["rows"], strict=False)
    return Table(tuple(Row(t, a, s, row[0], tuple(row[1:]), 0.0) for t, a, s, row in columns), data_std)
