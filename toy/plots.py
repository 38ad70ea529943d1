"""Plots of the 2-D toy and of the experiments. Each function returns a PIL image, made to be read 830 pixels wide."""

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
WIDTH = 8.3  # inches, at 100 pixels an inch on a page: 9 points are then 12 pixels
LIMIT = 1.6  # half the width of a panel of points, in data units


def _rendered(figure: plt.Figure) -> Image.Image:
    """The figure as a picture. It is closed: matplotlib would keep it in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    plt.close(figure)
    return Image.open(buffer)


def _scatter(axis: plt.Axes, points: Tensor, title: str) -> None:
    """All panels of points show the same square, so that they can be compared."""
    axis.scatter(*points.T, s=1.2, alpha=0.5, linewidths=0)
    title = textwrap.fill(title, 18)  # what is longer would reach into the next panel
    axis.set(title=title, xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])


def scatter(points: Tensor) -> Image.Image:
    """One panel of points (n, 2)."""
    figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
    _scatter(axis, points, f"{len(points)} points")
    return _rendered(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The picture: what models make of noise, and below it the PF-ODE with a sub-path and its line
# ---------------------------------------------------------------------------------------------------------------------

GAMMAS = torch.tensor([0, 0.25, 0.5, 0.75, 1])  # the points of the line that are marked


class SubPath(NamedTuple):
    """Trajectories of the PF-ODE from noise to data; the one at place `which` has the sub-path from time t to s."""

    x: Tensor  # (N, n, 2); place p in the first dimension is time N-1-p
    alpha: Tensor  # (N, 1), the signal at each place
    which: int
    t: int
    s: int
    line: Tensor  # x_γ at GAMMAS, from r x_s to x_t


@torch.no_grad()
def sub_path(denoise: Denoiser, schedule: Schedule, noise: Tensor, k: int) -> SubPath:
    """The trajectories that begin in `noise` (n, 2), and the sub-path of length k that shows best what its line is.

    DDIM steps of length 1 are the PF-ODE, as far as the eye can tell. How far a sub-path bends is how high it rises over
    its chord in z = x/α. Multiplied by α, that is a length in the plane of x. The sub-path that rises highest is shown.
    What turns back on itself, higher than 0.4 of its chord, is left out: there the chord means nothing to the eye.
    """
    states, last = [noise], len(schedule) - 1
    for time in range(last, 0, -1):
        t = torch.full((len(noise),), time, device=noise.device)
        states.append(multiple_estimation(denoise, schedule, states[-1], t, t - 1, k=1, solver_step=1))
    x, alpha = torch.stack(states).cpu(), schedule.alpha.cpu().flip(0)[:, None]
    k = min(k, last)
    begins = torch.arange(0, last - k + 1, 5)[:, None]
    pieces = (x / alpha[..., None])[begins + torch.arange(0, k + 1, max(1, k // 10))]  # (begins, points, n, 2)
    chord, rise = pieces[:, -1:] - pieces[:, :1], pieces - pieces[:, :1]
    length = chord.norm(dim=3)
    height = (chord[..., 0] * rise[..., 1] - chord[..., 1] * rise[..., 0]).abs() / length
    height, length = height.amax(1), length[:, 0]
    best = torch.where(height < 0.4 * length, height * alpha[begins[:, 0]], 0).argmax()
    begin, which = int(begins[best // len(noise)]), int(best % len(noise))
    t = torch.full((len(GAMMAS),), last - begin)
    ends = x[begin, which].expand(len(t), 2), x[begin + k, which].expand(len(t), 2)
    line = sub_path_point(*ends, t, t - k, GAMMAS, schedule, "sl", "linear").x
    return SubPath(x, alpha, which, last - begin, last - begin - k, line)


def overview(panels: dict[str, Tensor], path: SubPath) -> Image.Image:
    """A panel for each named batch of points (n, 2), at most six in a row. Below them the PF-ODE, whole, and one of its
    sub-paths close up: in x, and in z = x/α."""
    rows = math.ceil(len(panels) / 6)
    columns = math.ceil(len(panels) / rows)
    heights = [rows * (min(WIDTH / columns, 2.8) + 0.35), 3.1]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=heights)
    axes = above.subplots(rows, columns, squeeze=False)
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        _scatter(axis, points, title)
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    whole, in_x, in_z = below.subplots(1, 3)
    whole.plot(*path.x.movedim(2, 0), color="C3", lw=0.8)
    whole.plot(*path.x[-1].T, "C3o", ms=3)
    whole.set(title="PF-ODE, from noise to data (dots)", aspect="equal", xticks=[], yticks=[])
    _close_up(in_x, path, "x")
    _close_up(in_z, path, "z")
    # Where in the plane the close-up is.
    piece = path.x[len(path.x) - 1 - path.t : len(path.x) - path.s, path.which]
    whole.plot(*path.x[:, path.which].T, color="C0", lw=1)
    whole.plot(*piece.T, color="C0", lw=4)
    whole.indicate_inset(bounds=(*in_x.viewLim.p0, *in_x.viewLim.size), edgecolor="black", alpha=1)
    handles, names = in_x.get_legend_handles_labels()
    below.legend(handles, names, loc="outside lower right", ncols=2)
    return _rendered(figure)


def _close_up(axis: plt.Axes, path: SubPath, name: str) -> None:
    """One sub-path with its line. In x the line ends in r x_s, beside x_s. In z, where r is divided out, it ends in z_s:
    it is a chord of the curve."""
    begin, end = len(path.x) - 1 - path.t, len(path.x) - 1 - path.s
    curve, line = path.x[:, path.which], path.line
    if name == "z":
        curve, line = curve / path.alpha, line / path.alpha[begin]  # all of the line has the signal of its start
    piece = curve[begin : end + 1]
    axis.plot(*curve.T, color="C3", lw=1)
    axis.plot(*piece.T, color="C0", lw=3, label=f"PF-ODE from t = {path.t} to s = {path.s}")
    axis.plot(*line.T, color="C2", lw=1.5, ls="--", marker="o", ms=5, label=r"line $x_\gamma$, with its $\gamma$")
    axis.plot(*piece[-1], "C0s", ms=7)
    # A square around both, so that the panel's shape does not bend anything.
    both = torch.cat([piece, line])
    middle, half = (both.amax(0) + both.amin(0)) / 2, 0.68 * (both.amax(0) - both.amin(0)).max()
    limits = torch.stack([middle - half, middle + half], 1).tolist()
    axis.set(title="in x" if name == "x" else "in z = x/α", aspect="equal", xticks=[], yticks=[])
    axis.set(xlim=limits[0], ylim=limits[1])
    # Every γ beside its point, on the side of the line that the curve leaves free; names of the ends outside of all.
    along = line[-1] - line[0]
    across = torch.stack([-along[1], along[0]]) / along.norm()
    across = across * -((piece.mean(0) - line.mean(0)) @ across).sign()
    along = along / along.norm()
    for gamma, point in zip(GAMMAS.tolist(), line, strict=True):
        _write(axis, f"{gamma:g}", point, 13 * across, "C2")
    _write(axis, f"${name}_t$", line[-1], 14 * along, "black")
    if name == "x":
        _write(axis, "$r x_s$", line[0], -16 * along, "black")
    _write(axis, f"${name}_s$", piece[-1], -14 * along if name == "z" else 14 * (piece[-1] - line[0]).sign(), "black")


def _write(axis: plt.Axes, text: str, point: Tensor, offset: Tensor, color: str) -> None:
    """A text near a point, `offset` printer's points away."""
    where = {"xytext": offset.tolist(), "textcoords": "offset points", "ha": "center", "va": "center"}
    axis.annotate(text, point.tolist(), color=color, **where)
