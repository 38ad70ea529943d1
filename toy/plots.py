"""All plotting of the 2-D laboratory. Each function returns a PIL image."""

import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

LIMIT = 1.6  # half the width of a panel, in data units


def _rendered(figure: plt.Figure) -> Image.Image:
    """The figure as a picture. It is closed: matplotlib would keep it in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return Image.open(buffer)


def _scatter(axis: plt.Axes, points: Tensor, title: str) -> None:
    """All panels of points show the same square, so that they can be compared."""
    axis.scatter(*points.T, s=1.5, alpha=0.5, linewidths=0, color="tab:blue")
    title = textwrap.fill(title, 32)  # what is longer would reach into the next panel
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
    columns = max(3, (len(panels) + 4) // 2)  # two rows, for the batches and three more panels
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6.2), layout="constrained")
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        _scatter(axis, points, title)
    whole, in_x, in_z, *unused = axes.flat[len(panels) :]
    whole.plot(*sub_path.trajectories.movedim(2, 0), color="tab:blue", lw=1)
    whole.plot(*sub_path.piece.T, color="black", lw=3)
    whole.set(title="PF-ODE, and one sub-path", aspect="equal", xticks=[], yticks=[])
    for axis, name, scale in ((in_x, "x", sub_path.alpha**0), (in_z, "z", sub_path.alpha)):
        # In x the line starts at r x_s, beside the PF-ODE; in z, where r is divided out, it is a chord of the
        # PF-ODE's curve.
        piece, line = sub_path.piece / scale, sub_path.line / scale[0]  # all of the line has the signal of its start
        axis.plot(*piece.T, color="black", lw=2, label="PF-ODE")
        axis.plot(*line.T, color="tab:red", marker=".", ms=5, lw=1, label="line, γ = 0, 0.1 … 1")
        ends = {f"{name}_t": piece[0], f"{name}_s": piece[-1]} | ({"r x_s": line[0]} if name == "x" else {})
        for label, point in ends.items():
            axis.annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=9)
        title = f"{sub_path.title} in {'x' if name == 'x' else 'z = x/α'}"
        # A sub-path may be long and thin. So the axis shows more of the plane around it, in the panel's own shape.
        axis.set(title=title, xticks=[], yticks=[], adjustable="datalim", aspect="equal")
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
            # matplotlib has ten colours. A marker shows where a short curve was measured.
            style = {"color": f"C{i % 10}", "marker": "." if len(x) < 20 else None, "ls": "--" if i > 9 else "-"}
            axis.plot(x, mean, label=name, **style)
            if deviation is not None:
                mean, deviation = torch.as_tensor(mean), torch.as_tensor(deviation)
                axis.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.xscale, yscale=panel.yscale)
        if panel.ticks:
            axis.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axis.set_xticks([], minor=True)
        if panel.yscale == "log":  # 1, 2 and 5 of each power of ten, written out: errors span little more than one
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        # The legend is below the axis, where it hides no curve.
        columns = max(1, min(3, 102 // (6 + max(map(len, panel.series)))))  # as many names as fit below an axis
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, fontsize=7)
    return _rendered(figure)


def dots(summary: dict[str, dict[str, tuple[float, float]]], columns: Sequence[str]) -> Image.Image:
    """A panel for each column of {name: {column: (mean, deviation)}}, with a line for each name."""
    size = (2.2 + 3 * len(columns), 0.9 + 0.24 * len(summary))  # inches: room for names, and for lines of text
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=True):
        mean, deviation = zip(*(values[column] for values in summary.values()), strict=True)
        axis.errorbar(mean, list(summary), xerr=deviation, fmt=".", color="tab:blue", ecolor="tab:gray", capsize=2)
        axis.set(title=column, xlim=(0, None))
        axis.grid(axis="y", alpha=0.3)
    axes.flat[0].invert_yaxis()  # the axis is shared by all panels; the first name comes first
    return _rendered(figure)


def below(*pictures: Image.Image) -> Image.Image:
    """One picture of several, one below the other."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return whole
