"""python -m toy.tab3_sl_vs_dl

Table 3: LCM, DL and SL at equal budget.

The paper's table has FIDs of four steps. DL and SL are told γ by the paper's embedding, or, with a t', the time of
equal noise.
"""

from PIL import Image

from data import program
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant

ENDS = {"k = 20": "--k 20", "k = 100": "--k 100"}  # both with k_φ = 20: one solver step, or five
EMBEDDING = "--gamma_conditioning embedding"
METHODS = {
    "LCM": "--ode lcm",
    "DL": f"--ode dl {EMBEDDING}",
    "SL": f"--ode sl {EMBEDDING}",
    "SL, exact σ": f"--ode sl --sigma exact {EMBEDDING}",
    "DL, t'": "--ode dl",
    "SL, t'": "--ode sl",
    "SL, exact σ, t'": "--ode sl --sigma exact",
}
OPTIONS = {  # of this project, all with k = 100
    "SL, k = 100, 4 γ": f"{EMBEDDING} --gamma_draws 4",
    "SL, t', k = 100, 2 γ": "--gamma_draws 2",
    "SL, t', k = 100, 4 γ": "--gamma_draws 4",
    "SL, k = 100, half of γ at 1": f"{EMBEDDING} --gamma_at_one 0.5",
    "SL, t', k = 100, half of γ at 1": "--gamma_at_one 0.5",
}
VARIANTS = {f"{m}, {k}": Variant(f"{flags} {end}") for k, end in ENDS.items() for m, flags in METHODS.items()}
VARIANTS |= {name: Variant(f"--k 100 {flags}") for name, flags in OPTIONS.items()}


def picture(found: Findings) -> Image.Image:
    """A panel for the map error of one step, and one for the distance of each way to sample. Below, if there are
    prompts, one for how well each way follows them."""
    left_out = ("map error, ", "MMD")  # they are in the printed table
    distances = [c for c in found.columns() if not c.startswith((*left_out, "prompt"))]
    prompts = [c for c in found.columns() if c.startswith("prompt")]
    return plots.below(*(plots.dots(found.summary(), columns) for columns in (distances, prompts) if columns))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
