"""Plots of the 2-D toy and of the experiments. `overview`, `curves` and `dots` return PIL images, made to be read 830
pixels wide.

overview   batches of points; below them the PF-ODE with a sub-path and its line, which `sub_path` finds
curves     measured numbers over time, k or γ, with their spread
dots       measured numbers by name, with their spread
"""

import io
import math
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

from splam import Denoiser, Schedule, multiple_estimation, sub_path_point

# Ten colours that people with any colour vision can tell apart (Petroff 2021). Lines and markers differ as well.
plt.style.use(["petroff10", {"font.size": 9, "axes.titlesize": 9, "legend.frameon": False}])
LINES, MARKERS = ["-", "--", ":", "-."], "os^Dvx*"
WIDTH = 8.3  # inches. At 100 pixels an inch, letters of 9 points are 12 pixels high
LIMIT = 1.6  # half the width of a panel of points, in data units


def _rendered(figure: plt.Figure) -> Image.Image:
    """The figure as a picture. It is closed: matplotlib would keep it in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    plt.close(figure)
    return Image.open(buffer)


def _panels(figure, n: int, most: int, **options) -> list[plt.Axes]:
    """n axes of a figure or of a part of one, in as few rows as `most` in a row allow, and these of equal length."""
    rows = math.ceil(n / most)
    axes = figure.subplots(rows, math.ceil(n / rows), squeeze=False, **options).flat
    for unused in axes[n:]:
        unused.set_axis_off()
    return axes[:n]


# ---------------------------------------------------------------------------------------------------------------------
# The picture: what models make of noise, and below it the PF-ODE with a sub-path and its line
# ---------------------------------------------------------------------------------------------------------------------

GAMMAS = torch.tensor([0, 0.25, 0.5, 0.75, 1])  # the points of the line that are marked


class SubPath(NamedTuple):
    """Trajectories of the PF-ODE from noise to data, and one sub-path of the one called `which`."""

    x: Tensor  # (N, n, 2); place p of the first dimension is time N-1-p
    alpha: Tensor  # (N, 1), the signal at each place
    which: int
    begin: int  # the place of x_t
    end: int  # and of x_s
    line: Tensor  # (5, 2), x_γ at GAMMAS, from r x_s to x_t


@torch.no_grad()
def sub_path(denoise: Denoiser, schedule: Schedule, noise: Tensor, k: int) -> SubPath:
    """The trajectories that begin in `noise` (n, 2), and the sub-path of length k that shows best what its line is.

    DDIM steps of length 1 are the PF-ODE, as far as the eye can tell. The most bent sub-path is shown: the one that
    rises highest over its chord in z = x/α, times α, which is a length in the plane of x. Two kinds are left out.
    Higher than 0.4 of its chord, a sub-path turns back on itself. And where x_s is nearer to r x_s than a quarter of
    the line's length, the two cannot be told apart.
    """
    states, last = [noise], len(schedule) - 1
    for time in range(last, 0, -1):
        t = torch.full((len(noise),), time, device=noise.device)
        states.append(multiple_estimation(denoise, schedule, states[-1], t, t - 1, k=1, solver_step=1))
    x, alpha = torch.stack(states).cpu(), schedule.alpha.cpu().flip(0)[:, None]
    k = min(k, last)
    begins = torch.arange(0, last - k + 1, 5)
    # Points as complex numbers: turned until its chord is real, a sub-path has its heights as imaginary parts.
    z = (torch.view_as_complex(x) / alpha)[begins[:, None] + torch.arange(0, k + 1, max(1, k // 10))]
    chord = z[:, -1:] - z[:, :1]  # (begins, 1, n)
    height = ((z - z[:, :1]) * chord.conj() / chord.abs()).imag.abs().amax(1) * alpha[begins]
    length = chord[:, 0].abs() * alpha[begins]
    gap = (1 - alpha[begins] / alpha[begins + k]) * x[begins + k].norm(dim=2)
    best = torch.where((height < 0.4 * length) & (gap > 0.25 * length), height, 0).argmax()
    begin, which = int(begins[best // len(noise)]), int(best % len(noise))
    # Eq. 12 with both ends on the PF-ODE itself: the picture shows the line, without a solver's error.
    t = torch.full((len(GAMMAS),), last - begin)
    ends = x[begin, which].expand(len(t), 2), x[begin + k, which].expand(len(t), 2)
    line = sub_path_point(*ends, t, t - k, GAMMAS, schedule, "sl", "linear").x
    return SubPath(x, alpha, which, begin, begin + k, line)


def overview(panels: dict[str, Tensor], path: SubPath | None = None) -> Image.Image:
    """A panel for each named batch of points (n, 2), at most six in a row. With a `path`, below them the PF-ODE: whole,
    and one of its sub-paths close up, in x and in z = x/α."""
    rows = math.ceil(len(panels) / 6)
    columns = math.ceil(len(panels) / rows)
    # What is longer than its panel has several lines. The number of steps, after the last comma, begins a new one.
    split = [title.rsplit(", ", 1) for title in panels]
    titles = ["\n".join(textwrap.fill(part, 110 // columns) for part in parts) for parts in split]
    lines = 1 + max(title.count("\n") for title in titles)
    heights = [rows * (min(WIDTH / columns, 2.8) + 0.25 + 0.18 * lines), 3.15 if path else 0]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, *below = figure.subfigures(2 if path else 1, squeeze=False, height_ratios=heights[: 2 if path else 1]).flat
    for axis, title, points in zip(_panels(above, len(panels), 6), titles, panels.values(), strict=True):
        axis.scatter(*points.T, s=1.2, alpha=0.5, linewidths=0)
        # All show the same square, so that they can be compared.
        axis.set(title=title, xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    if path:
        _pf_ode(below[0], path)
    return _rendered(figure)


def _pf_ode(figure, path: SubPath) -> None:
    """Three panels: all trajectories, and the sub-path in x and in z."""
    whole, in_x, in_z = figure.subplots(1, 3)
    _close_up(in_x, path, "x")
    _close_up(in_z, path, "z")
    # Every second trajectory is enough; the one with the sub-path lies over them. The frame is what the close-up shows.
    whole.plot(*path.x[:, ::2].movedim(2, 0), color="C3", lw=0.8)
    whole.plot(*path.x[-1, ::2].T, "C3o", ms=3)
    whole.plot(*path.x[:, path.which].T, color="C3", lw=1.2)
    whole.plot(*path.x[path.begin : path.end + 1, path.which].T, color="C0", lw=4)
    whole.indicate_inset(bounds=(*in_x.viewLim.p0, *in_x.viewLim.size), edgecolor="black", alpha=1)
    whole.set(title="PF-ODE, from noise to data (dots)", aspect="equal", xticks=[], yticks=[])
    figure.legend(*in_x.get_legend_handles_labels(), loc="outside lower right", ncols=2)


def _close_up(axis: plt.Axes, path: SubPath, name: str) -> None:
    """One sub-path with its line. In x the line ends in r x_s, beside x_s. In z, where r is divided out, it ends in
    z_s: it is a chord of the curve."""
    curve, line, last = path.x[:, path.which], path.line, len(path.x) - 1
    if name == "z":
        curve, line = curve / path.alpha, line / path.alpha[path.begin]  # all of the line has the signal of its start
    piece = curve[path.begin : path.end + 1]
    axis.plot(*curve.T, color="C3", lw=1)
    axis.plot(*piece.T, color="C0", lw=3, label=f"PF-ODE from t = {last - path.begin} to s = {last - path.end}")
    axis.plot(*piece[-1], "C0s", ms=7)
    axis.plot(*line.T, "C2--o", lw=1.5, ms=5, label=r"line $x_\gamma$, with values of $\gamma$")
    # A square around both: with the same scale in both directions, nothing is bent by the panel's shape.
    both = torch.cat([piece, line])
    middle, half = (both.amax(0) + both.amin(0)) / 2, 0.68 * (both.amax(0) - both.amin(0)).max()
    (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
    axis.set(aspect="equal", xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axis.set_title("close up, in x" if name == "x" else "close up, in z = x/α")
    # Every γ stands on that side of the line which the curve leaves free, the names of the ends beyond them.
    along = line[-1] - line[0]
    across = torch.stack([-along[1], along[0]])
    across = -across if (piece.mean(0) - line.mean(0)) @ across > 0 else across
    texts = [(f"{gamma:g}", point, across, "C2") for gamma, point in zip(GAMMAS.tolist(), line, strict=True)]
    texts.append((f"${name}_t$", line[-1], along, "black"))
    texts.append(("$z_s$" if name == "z" else r"$r\,x_s$", line[0], -along, "black"))
    if name == "x":
        texts.append(("$x_s$", piece[-1], piece[-1] - line[0], "black"))
    for text, point, direction, color in texts:
        offset = (14 * direction / direction.norm()).tolist()  # in printer's points
        where = {"xytext": offset, "textcoords": "offset points", "ha": "center", "va": "center"}
        axis.annotate(text, point.tolist(), color=color, **where)


# ---------------------------------------------------------------------------------------------------------------------
# Plots of measured numbers
# ---------------------------------------------------------------------------------------------------------------------


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
    """The panels, at most three in a row. A name has one style in all of them, and below them is one legend."""
    # A style belongs to the place of a name among all of them: 10 colours, 7 markers, 4 kinds of line, so 140 styles.
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    columns = max(1, min(4, 120 // (8 + max(map(len, names)))))  # of the legend: as many names as fit
    height = 3 * math.ceil(len(panels) / 3) + 0.18 * math.ceil(len(names) / columns)
    figure, legend = plt.figure(figsize=(WIDTH, height), layout="constrained"), {}
    for axis, panel in zip(_panels(figure, len(panels), 3), panels, strict=True):
        for name, (x, mean, deviation) in panel.series.items():
            i, every = names.index(name), max(1, len(x) // 10)  # a marker at every so many values
            style = {"color": f"C{i % 10}", "ls": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
            (legend[name],) = axis.plot(x, mean, ms=4, lw=1.3, markevery=every, **style)
            if deviation is not None:
                mean, deviation = torch.as_tensor(mean), torch.as_tensor(deviation)
                axis.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.xscale, yscale=panel.yscale)
        axis.set_title(textwrap.fill(panel.title, 40))
        if panel.ticks:
            axis.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axis.set_xticks([], minor=True)
        if panel.yscale == "log":  # 1, 2 and 5 of each power of ten, written out: errors span little more than one
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=columns)
    return _rendered(figure)


def dots(summary: dict[str, dict[str, tuple[float, float]]], columns: Sequence[str]) -> Image.Image:
    """A panel for each column of {name: {column: (mean, deviation)}}, at most four in a row, with a line for each
    name."""
    rows = math.ceil(len(columns) / 4)
    figure = plt.figure(figsize=(WIDTH, rows * (0.6 + 0.2 * len(summary))), layout="constrained")  # lines of text
    for axis, column in zip(_panels(figure, len(columns), 4, sharey=True), columns, strict=True):
        mean, deviation = zip(*(values[column] for values in summary.values()), strict=True)
        axis.errorbar(mean, list(summary), xerr=deviation, fmt="o", ms=4, ecolor="C3", capsize=2)
        axis.set(title=column, xlim=(0, None), ylim=(len(summary) - 0.5, -0.5))  # the first name comes first
        axis.grid(axis="y", alpha=0.3)
    return _rendered(figure)
