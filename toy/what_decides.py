"""One change at a time: what the scripts share that ask what decides whether SPLAM is better than LCM.

All their students have k = 100 and five solver steps unless a change says otherwise, so LCM and SPLAM differ in γ
alone: always 1, or uniform. Other factors have figures of their own: k and multiple estimation (fig2a), training time
(fig2b), w (fig3), σ (appb).
"""

from PIL import Image

from toy import plots
from toy.fig2a_skip_size import METHODS
from toy.laboratory import Findings, Variant


def setting(name: str, *, only: tuple[str, ...] = tuple(METHODS), flags: str = "", **options) -> dict[str, Variant]:
    """Students of several methods under one change."""
    return {f"{method}: {name}": Variant(f"{METHODS[method]} {flags}", **options) for method in only}


def picture(found: Findings) -> Image.Image:
    return plots.dots({c: {name: found.last(name, c) for name in found.rows} for c in found.columns()[:3]})
