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
    """A panel for each named batch of points, and one of PF-ODE `paths` (times, n, 2) with their sub-path `chords`
    (sub-paths, γ, n, 2)."""
    columns = (len(panels) + 2) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6.2), layout="constrained", squeeze=False)
    axes = list(axes.flat)
    for axis, (title, points) in zip(axes, panels.items(), strict=False):
        _scatter(axis, points, title)
    last = axes[len(panels)]
    for i in range(paths.shape[1]):
        last.plot(*paths[:, i].T, color="tab:blue", lw=1.2, label="PF-ODE" if i == 0 else None)
        for j, chord in enumerate(chords):
            first = i == 0 and j == 0
            last.plot(*chord[:, i].T, color="tab:red", lw=1, ls=(0, (2, 1.5)), label="sub-path line" if first else None)
            last.plot(*chord[[0, -1], i].T, "k.", ms=3)
    last.set(title="teacher's trajectories", aspect="equal", xticks=[], yticks=[])
    last.legend(loc="best", fontsize=7, frameon=False)
    for axis in axes[len(panels) + 1 :]:
        axis.set_axis_off()
    return _rendered(figure)
