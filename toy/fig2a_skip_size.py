"""Figure 2(a): quality against the skipping step size k, with and without multiple estimation."""

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant

SIZES = [20, 50, 100, 200]
METHODS = {"LCM": "--ode lcm", "SPLAM": "--gamma_conditioning embedding", "SPLAM, t'": "--gamma_conditioning time"}


def solver_step(k: int) -> int:
    """k_φ of multiple estimation: the paper's 20, but it must divide k."""
    return 25 if k == 50 else 20


def name(method: str, k: int, several: bool) -> str:
    return f"{method}{' + ME' * (several and k > 20)}, k = {k}"  # k = 20 is one solver step in any case


VARIANTS = {
    name(method, k, several): Variant(f"{flags} --k {k} --solver_step {solver_step(k) if several else k}")
    for method, flags in METHODS.items()
    for several in (False, True)
    for k in SIZES
}


def picture(found: Findings) -> Image.Image:
    def line(method: str, several: bool, column: str) -> tuple:
        return SIZES, *zip(*(found.last(name(method, k, several), column) for k in SIZES), strict=True)

    lines = {f"{method}{' + ME' * several}": (method, several) for several in (False, True) for method in METHODS}
    panels = [
        plots.Panel(column, "k", "", {title: line(*which, column) for title, which in lines.items()}, xscale="log")
        for column in found.columns()[:3]
    ]
    return plots.curves(*panels)


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
