"""What decides whether SPLAM is better than LCM? The size of the network."""

import functools

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory
from toy.mlp import PointMLP
from toy.what_decides import METHODS, setting

WIDTHS = [16, 32, 64]
VARIANTS = setting("128 units")  # as everywhere else
for width in WIDTHS:
    VARIANTS |= setting(f"{width} units", changes={"toy.points.PointMLP": functools.partial(PointMLP, width=width)})


def picture(found: Findings) -> Image.Image:
    widths = [*WIDTHS, 128]
    lines = {method: {width: f"{method}: {width} units" for width in widths} for method in METHODS}
    columns = found.columns()[:3]
    return plots.curves(*(plots.Panel(c, "units", "", found.lines(lines, c), "log", ticks=widths) for c in columns))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
