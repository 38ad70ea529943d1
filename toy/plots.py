"""All plotting of the 2-D laboratory. Each function returns a PIL image."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no window
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


class SubPath(NamedTuple):
    """What `overview` draws of the PF-ODE: whole trajectories (times, n, 2); and of one of them, a sub-path from x_t
    to x_s with its signal α (times, 1), and the line x_γ (γs, 2) from r x_s to x_t."""

    trajectories: Tensor
    piece: Tensor
    alpha: Tensor
    line: Tensor
    title: str


def overview(panels: dict[str, Tensor], sub_path: SubPath) -> Image.Image:
    """A panel for each named batch of points, one of trajectories, and two of a sub-path: in x and in z = x/α."""
    columns = max(3, (len(panels) + 4) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6.2), layout="constrained")
    axes = list(axes.flat)
    for axis, (title, points) in zip(axes, panels.items(), strict=False):
        _scatter(axis, points, title)
    whole, in_x, in_z, *unused = axes[len(panels) :]
    whole.plot(*sub_path.trajectories.movedim(2, 0), color="tab:blue", lw=1)
    whole.plot(*sub_path.piece.T, color="black", lw=3)
    whole.set(title="PF-ODE, and one sub-path", aspect="equal", xticks=[], yticks=[])
    for axis, name, scale in ((in_x, "x", sub_path.alpha**0), (in_z, "z", sub_path.alpha)):
        piece, line = sub_path.piece / scale, sub_path.line / scale[0]  # all of the line has the signal of its start
        axis.plot(*piece.T, color="black", lw=2, label="PF-ODE")
        axis.plot(*line.T, color="tab:red", marker="|", ms=7, lw=1, label="line, γ = 0, 0.1 … 1")
        ends = {f"{name}_t": piece[0], f"{name}_s": piece[-1]} | ({"r x_s": line[0]} if name == "x" else {})
        for label, point in ends.items():
            axis.annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=9)
        axis.set(title=f"{sub_path.title} in {'x' if name == 'x' else 'z = x/α'}", xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(loc="best", fontsize=7, frameon=False)
    for axis in unused:
        axis.set_axis_off()
    return _rendered(figure)


class Panel(NamedTuple):
    """Curves with a spread: {name: (x, mean, deviation or None)}, each (n,)."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]]
    xscale: str = "linear"
    yscale: str = "log"
    ticks: Sequence[float] | None = None  # of x


def curves(*panels: Panel) -> Image.Image:
    """The panels side by side, each with the names of its curves below."""
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
    """A panel for each column, {name: (mean, deviation)}, with a line for each name."""
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
