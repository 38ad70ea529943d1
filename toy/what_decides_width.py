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

    def panel(column: str) -> plots.Panel:
        ends = {method: [found.last(f"{method}: {width} units", column) for width in widths] for method in METHODS}
        lines = {method: (widths, *zip(*values, strict=True)) for method, values in ends.items()}
        return plots.Panel(column, "units", "", lines, xscale="log", ticks=widths)

    return plots.curves(*map(panel, found.columns()[:3]))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
