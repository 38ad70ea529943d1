"""What decides whether SPLAM is better than LCM? Data, teacher and network, one changed at a time.

All students have k = 100 and five solver steps, so that LCM and SPLAM differ in γ alone: always 1, or uniform. Other
factors have scripts of their own: the recipe of training (what_decides_recipe), k and multiple estimation (fig2a),
training time (fig2b), w (fig3), σ (appb).
"""

import functools

from PIL import Image

from data import program
from toy import plots
from toy.fig2a_skip_size import METHODS
from toy.laboratory import Findings, Laboratory, Variant
from toy.mlp import PointMLP
from toy.points import Points


class FewPoints(Points):
    """256 points of training data."""

    def __init__(self, data: str, split: str):
        super().__init__(data, split)
        if split == "train":
            self.samples, self.labels = self.samples[:256], self.labels[:256]


def setting(name: str, *, only: tuple[str, ...] = tuple(METHODS), flags: str = "", **options) -> dict[str, Variant]:
    """Students of several methods under one change."""
    return {f"{method}: {name}": Variant(f"{METHODS[method]} {flags}", **options) for method in only}


VARIANTS = {
    **setting("as it is"),
    **setting("spiral", flags="--pretrained_teacher_model ideal:spiral"),
    **setting("trained teacher", flags="--pretrained_teacher_model toy:8gaussians"),
    **setting("poor teacher", flags="--pretrained_teacher_model toy:8gaussians", teacher="--max_train_steps 300"),
    **setting("256 points of data", changes={"toy.points.Points": FewPoints}),
    **setting("64 units", changes={"toy.points.PointMLP": functools.partial(PointMLP, width=64)}),
    **setting("32 units", changes={"toy.points.PointMLP": functools.partial(PointMLP, width=32)}),
    **setting("16 units", changes={"toy.points.PointMLP": functools.partial(PointMLP, width=16)}),
}


def picture(found: Findings) -> Image.Image:
    return plots.dots({c: {name: found.last(name, c) for name in found.rows} for c in found.columns()[:3]})


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
