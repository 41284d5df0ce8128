"""A finished comparison on paper: a table, a csv file, a grid of pictures, a plot of errors.

Knows :class:`~diffusers_sde.comparison.engine.Comparison` and matplotlib.  Knows neither models nor solvers.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_sde.comparison.engine import Comparison
from diffusers_sde.sampler_names import SAMPLERS

COLUMNS = ("sampler", "nfe", "seconds", "rmse_mean", "rmse_median")


def rows(comparison: Comparison, missing: str = "") -> Iterator[tuple[str, ...]]:
    """The table in strings, ``missing`` where there is no error."""
    for r in comparison.by_sampler:
        errors = (missing if e is None else f"{e:.5f}" for e in (r.mean, r.median))
        yield (r.sampler, str(r.nfe), f"{r.seconds:.2f}", *errors)


def format_table(comparison: Comparison) -> str:
    """The table for a terminal, with the reference and its own error below."""
    lines = [COLUMNS, *rows(comparison, missing="-")]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    n = comparison.reference_steps
    text.append(
        f"rmse: per image, pixels in [-1, 1], to the ODE's solution from the same noise ({n} evaluations; {n // 2} of "
        f"them differ by {comparison.reference_error:.5f}).  '-': a stochastic sampler has no such error."
    )
    for name in comparison.samplers:
        reasons = [comparison.absence(name, n) for n in comparison.budgets]
        text += [f"{name}: {', '.join(filter(None, reasons))}."] if any(reasons) else []
    return "\n".join(text)


def write_csv(comparison: Comparison, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows(comparison))


# by name, so that two plots agree
COLOURS = {
    "calibrated": "#111111",
    "pf-ode": "#d1495b",
    "dpm-solver": "#e58f1c",
    "reverse-sde": "#8e44ad",
    "ddim": "#7f8c8d",
    "euler": "#a0785a",
    "dpm++2m": "#1f77b4",
    "dpm++2m-karras": "#4bacc6",
    "unipc": "#2e8b57",
    "deis": "#6a7f10",
    "heun": "#34495e",
}


def montage(images: torch.Tensor, gap: int) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] side by side, (H, N (W + gap) - gap, 3) in [0, 1], white between them."""
    x = torch.nan_to_num(images / 2 + 0.5).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    x = torch.nn.functional.pad(x, (0, gap), value=1.0)
    return torch.cat(list(x), dim=-1)[..., : -gap or None].movedim(0, -1).numpy()


FULL_DIFFERENCE = 0.6  # of pixels in [-1, 1]: as dark as a difference gets


def difference_montage(images: torch.Tensor, reference: torch.Tensor, gap: int) -> np.ndarray:
    """Where images differ from their reference, mean over channels: white for not at all, dark red from
    :data:`FULL_DIFFERENCE` on; side by side as in :func:`montage`."""
    from matplotlib import colormaps

    size = ((images - reference).abs().mean(1) / FULL_DIFFERENCE).nan_to_num(1.0).clamp(0, 1)
    coloured = torch.from_numpy(colormaps["Reds"](size.numpy())[..., :3]).movedim(-1, 1).float()
    return montage(torch.where(size[:, None] > 0, coloured, torch.ones(())) * 2 - 1, gap)


def draw_grid(comparison: Comparison, path: Path, shown: int = 4, differences: bool = False) -> None:
    """Rows: the reference and each sampler; columns: evaluations; up to ``shown`` images and the error in each cell,
    with ``differences`` also where each image differs from the reference."""
    from matplotlib.figure import Figure

    names, budgets, reference = comparison.samplers, comparison.budgets, comparison.reference
    assert reference is not None
    keep = np.unique(np.linspace(0, len(reference) - 1, min(shown, len(reference))).round()).astype(int)
    height, width = reference.shape[2:]
    gap = max(width // 16, 1)
    cell_width = 2.7 * len(keep) / 4
    cell_height = cell_width * height / (len(keep) * (width + gap) - gap)
    heights = [1, *(2 if differences and not SAMPLERS[name].stochastic else 1 for name in names)]
    figure = Figure(
        figsize=(1.45 + (cell_width + 0.2) * len(budgets), cell_height * sum(heights) + 0.24 * len(heights) + 0.3),
        facecolor="white",
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(len(names) + 1, len(budgets), squeeze=False, height_ratios=heights)
    for i, name in enumerate([None, *names]):
        for ax, n in zip(axes[i], budgets, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            result = None if name is None else comparison.cell(name, n)
            if name is not None and result is None:
                reason = comparison.absence(name, n)
                ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="#888888", fontsize=9)
                continue
            images = reference if result is None else result.images
            pixels = montage(images[keep], gap)
            if differences and result is not None and result.mean is not None:
                pixels = np.concatenate([pixels, difference_montage(images[keep], reference[keep], gap)])
            ax.imshow(pixels, interpolation="nearest" if width <= 64 else "antialiased")
            if result is None:
                ax.set_title(f"{n} evaluations", fontsize=12, fontweight="bold", pad=7)
                continue
            caption = [] if result.mean is None else [f"error {result.mean:.3f}"]
            caption += [f"{result.nfe} evaluations"] if result.nfe != n else []
            first = result.mean is not None and result.mean == comparison.best(n)
            ax.set_xlabel(", ".join(caption), fontsize=9, labelpad=2, color="black" if first else "#666666")
            ax.xaxis.label.set_fontweight("bold" if first else "normal")
        axes[i, 0].set_ylabel(
            f"reference\n{comparison.reference_steps} evaluations" if name is None else row_label(name),
            rotation=0, ha="right", va="center", fontsize=11, labelpad=8,
        )  # fmt: skip
        axes[i, 0].yaxis.label.set_fontweight("bold" if name and SAMPLERS[name].ours else "normal")
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08)


def row_label(name: str) -> str:
    """A sampler's name, and below it where it comes from."""
    return f"{name}\n({SAMPLERS[name].label})"


def draw_errors(comparison: Comparison, path: Path) -> None:
    """Mean error against evaluations, log-log, one line per deterministic sampler, named at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    ends = {}
    for name in comparison.samplers:
        points = [(r.nfe, r.mean) for r in comparison.by_sampler if r.sampler == name and r.mean is not None]
        points = [(n, e) for n, e in points if math.isfinite(e) and e > 0]
        if points:
            style: dict[str, Any] = {"lw": 2.4, "ls": "-"} if SAMPLERS[name].ours else {"lw": 1.6, "ls": "--"}
            ax.plot(*zip(*points, strict=True), marker="o", ms=5, color=COLOURS[name], label=name, **style)
            ends[name] = points[-1]
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="RMSE to the exact ODE solution")
    ax.xaxis.set_major_locator(FixedLocator(comparison.budgets))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.grid(color="#dddddd", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if not ends:
        ax.text(0.5, 0.5, "stochastic samplers have no error", transform=ax.transAxes, ha="center", color="#666666")
    low, high = np.log(ax.get_ylim())
    at = {name: (math.log(e) - low) / (high - low) for name, (_, e) in ends.items()}
    for name, y in spread(at, 0.062).items():
        label = name if SAMPLERS[name].ours else f"{name} (diffusers)"
        ax.annotate(
            label, (1.02, y), xycoords="axes fraction", va="center", color=COLOURS[name],
            fontweight="bold" if SAMPLERS[name].ours else "normal",
        )  # fmt: skip
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08)


def spread(positions: Mapping[str, float], gap: float) -> dict[str, float]:
    """Positions in [0, 1] moved apart to at least ``gap``, in their order and around where they were."""
    names = sorted(positions, key=lambda k: positions[k])
    y = np.array([positions[k] for k in names])
    for _ in range(200):
        overlap = np.clip(gap - np.diff(y), 0, None) / 2
        y[:-1] -= overlap
        y[1:] += overlap
    return dict(zip(names, y.tolist(), strict=True))


def write(comparison: Comparison, output: Path, differences: bool = False) -> None:
    """Write ``results.csv``, ``grid.png`` (with ``differences``, see :func:`draw_grid`) and ``error.png``, all of them
    or none."""
    existing = next(p for p in output.absolute().parents if p.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{output.name}-") as folder:
        made: dict[str, Callable[[Comparison, Path], None]] = {
            "results.csv": write_csv,
            "grid.png": functools.partial(draw_grid, differences=differences),
            "error.png": draw_errors,
        }
        for name, make in made.items():
            make(comparison, Path(folder) / name)
        output.mkdir(parents=True, exist_ok=True)
        for name in made:
            os.replace(Path(folder) / name, output / name)
