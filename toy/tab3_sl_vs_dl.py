"""Table 3: LCM, DL and SL at equal budget."""

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant

ENDS = {"k = 20": "--k 20", "k = 100": "--k 100"}  # both with k_φ = 20: one solver step, or five
METHODS = {
    "LCM": "--ode lcm",
    "DL": "--ode dl --gamma_conditioning embedding",
    "SL": "--ode sl --gamma_conditioning embedding",
    "SL, exact σ": "--ode sl --sigma exact --gamma_conditioning embedding",
    "DL, t'": "--ode dl",
    "SL, t'": "--ode sl",
    "SL, exact σ, t'": "--ode sl --sigma exact",
}
VARIANTS = {f"{m}, {k}": Variant(f"{flags} {end}") for k, end in ENDS.items() for m, flags in METHODS.items()} | {
    "SL, k = 100, 4 γ": Variant("--k 100 --gamma_conditioning embedding --gamma_draws 4"),
    "SL, t', k = 100, 2 γ": Variant("--k 100 --gamma_draws 2"),
    "SL, t', k = 100, 4 γ": Variant("--k 100 --gamma_draws 4"),
    "SL, k = 100, half of γ at 1": Variant("--k 100 --gamma_conditioning embedding --gamma_at_one 0.5"),
    "SL, t', k = 100, half of γ at 1": Variant("--k 100 --gamma_at_one 0.5"),
}


def picture(found: Findings) -> Image.Image:
    columns = [column for column in found.columns() if column == "map error" or not column.startswith(("map", "MMD"))]
    return plots.dots({c: {name: found.last(name, c) for name in found.rows} for c in columns})


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
