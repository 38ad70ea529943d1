"""All plotting of the 2-D laboratory."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
    columns = (len(panels) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6.2), layout="constrained", squeeze=False)
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
