"""All plotting of the 2-D laboratory."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image
from torch import Tensor

LIMIT = 1.6  # half the width of a panel, in data units


def _rendered(figure: plt.Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return Image.open(buffer)


def _scatter(axis: plt.Axes, points: Tensor, title: str) -> None:
    axis.scatter(*points.T, s=1.5, alpha=0.5, linewidths=0, color="tab:blue")
    axis.set(title=title, xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])


def scatter(points: Tensor) -> Image.Image:
    """One panel of points (n, 2)."""
    figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
    _scatter(axis, points, f"{len(points)} points")
    return _rendered(figure)


def overview(panels: dict[str, Tensor], paths: Tensor, chords: Tensor) -> Image.Image:
    """A panel for each named batch of points, and one of PF-ODE `paths` (times, n, 2) with their sub-path lines.

    `chords` (sub-paths, 2, n, 2) are the two ends of each line.
    """
    rows = max(2, -(-(len(panels) + 1) // 6))
    columns = -(-(len(panels) + 1) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.1 * rows), layout="constrained", squeeze=False)
    axes = list(axes.flat)
    for axis, (title, points) in zip(axes, panels.items(), strict=False):
        _scatter(axis, points, title)
    last = axes[len(panels)]
    last.plot(*paths.movedim(2, 0), color="tab:blue", lw=1.5, label="PF-ODE", zorder=2)
    for i in range(chords.shape[2]):
        last.plot(*chords[:, :, i].permute(2, 1, 0), color="tab:red", lw=1, label="x_γ, Eq. 12", zorder=3)
        last.plot(*chords[:, 0, i].T, "k.", ms=4, label="sub-path ends", zorder=4)
    last.set(title="trajectories and their sub-paths", xticks=[], yticks=[])
    last.set_aspect("equal", adjustable="datalim")
    handles = dict(zip(*last.get_legend_handles_labels()[::-1], strict=True))  # one entry a label
    last.legend(handles.values(), handles.keys(), loc="best", fontsize=7, frameon=False)
    for axis in axes[len(panels) + 1 :]:
        axis.set_axis_off()
    return _rendered(figure)


class Panel(NamedTuple):
    """Curves with a spread: {name: (x, mean, deviation)}, each (n,)."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]]
    xscale: str = "linear"
    yscale: str = "log"
    ticks: Sequence[float] | None = None  # of x


def curves(*panels: Panel) -> Image.Image:
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for i, (name, (x, mean, deviation)) in enumerate(panel.series.items()):
            style = {"color": f"C{i % 10}", "marker": "." if len(x) < 20 else None, "ls": "--" if i > 9 else "-"}
            axis.plot(x, mean, label=name, **style)
            if deviation is not None:
                low, high = zip(*((m - d, m + d) for m, d in zip(mean, deviation, strict=True)), strict=True)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.xscale, yscale=panel.yscale)
        if panel.ticks:
            axis.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        if panel.yscale == "log":
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        columns = max(1, min(3, 102 // (6 + max(map(len, panel.series)))))  # as many names as fit below an axis
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, fontsize=7)
    return _rendered(figure)


def dots(columns: dict[str, dict[str, tuple[float, float]]]) -> Image.Image:
    """A panel for each column, {name: (mean, deviation)}, a line for each name."""
    names = list(next(iter(columns.values())))
    size = (2.2 + 3 * len(columns), 0.9 + 0.24 * len(names))
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, (column, values) in zip(axes.flat, columns.items(), strict=True):
        mean, deviation = zip(*values.values(), strict=True)
        axis.errorbar(mean, names, xerr=deviation, fmt=".", color="tab:blue", ecolor="tab:gray", capsize=2)
        axis.set(title=column, xlim=(0, None))
        axis.grid(axis="y", alpha=0.3)
    axes.flat[0].invert_yaxis()
    return _rendered(figure)


def below(*pictures: Image.Image) -> Image.Image:
    """One picture of several, one below the other."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return whole
