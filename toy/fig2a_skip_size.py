"""Figure 2(a): quality against the skipping step size k, with and without multiple estimation (ME).

Sub-paths start on a grid of 50 times, 20 apart. Where k is a multiple of 20 they also end on it; for k = 50 a grid of
20 times does that (and what_decides_grid leaves it out).
"""

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant

SIZES = [20, 50, 100, 200]
METHODS = {"LCM": "--ode lcm", "SPLAM": "--gamma_conditioning embedding", "SPLAM, t'": "--gamma_conditioning time"}


def name(method: str, k: int, several: bool) -> str:
    return f"{method}{' + ME' * (several and k > 20)}, k = {k}"  # k = 20 is one solver step in any case


def flags(method: str, k: int, several: bool) -> str:
    solver_step = k if not several else 25 if k == 50 else 20  # k_φ: the paper's 20, but it must divide k
    return f"{METHODS[method]} --k {k} --solver_step {solver_step}"


VARIANTS = {
    name(method, k, several): Variant(flags(method, k, several) + " --num_ddim_timesteps 20" * (k == 50))
    for method in METHODS
    for several in (False, True)
    for k in SIZES
}


def picture(found: Findings) -> Image.Image:
    lines = {
        f"{method}{' + ME' * several}": {k: name(method, k, several) for k in SIZES}
        for several in (False, True)
        for method in METHODS
    }
    columns = found.columns()[:3]
    return plots.curves(*(plots.Panel(c, "k", "", found.lines(lines, c), "log", ticks=SIZES) for c in columns))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
