"""python -m toy.fig2a_skip_size

Figure 2(a): quality against the skipping step size k, with and without multiple estimation (ME).

Sub-paths start on a grid of 50 times, 20 apart. Where k is a multiple of 20 they also end on it. For k = 50 a grid of
20 times does that; what happens otherwise is shown by what_decides grid.
"""

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant

SIZES = [20, 50, 100, 200]
METHODS = {"LCM": "--ode lcm", "SPLAM": "--gamma_conditioning embedding", "SPLAM, t'": "--gamma_conditioning time"}


def name(method: str, k: int, several: bool) -> str:
    """A student's; k = 20 is one solver step in any case."""
    return f"{method} + ME, k = {k}" if several and k > 20 else f"{method}, k = {k}"


def flags(method: str, k: int, several: bool) -> str:
    """A student's. The paper's solver step of 20 must divide k."""
    solver_step = k if not several else 25 if k == 50 else 20
    grid = "--num_ddim_timesteps 20" if k == 50 else ""
    return f"{METHODS[method]} --k {k} --solver_step {solver_step} {grid}"


VARIANTS = {
    name(method, k, several): Variant(flags(method, k, several))
    for method in METHODS
    for several in (False, True)
    for k in SIZES
}


def picture(found: Findings) -> Image.Image:
    """A panel for the map error, one for its 95th percentile, and one for W2."""
    lines = {
        f"{method} + ME" if several else method: {k: name(method, k, several) for k in SIZES}
        for several in (False, True)
        for method in METHODS
    }
    columns = found.columns()[:3]
    return plots.curves(*(plots.Panel(c, "k", "", found.ends(lines, c), "log", ticks=SIZES) for c in columns))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
