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
    """A panel for the map error, and one for each number of sampling steps. Below, if there are prompts, how often they
    were understood in as many."""
    # What is left out is in the printed table.
    columns = [c for c in found.columns() if not c.startswith(("map error, ", "MMD")) and "η" not in c]
    prompts = [c for c in columns if c.startswith("prompt")]
    rows = [[c for c in columns if c not in prompts], prompts]
    return plots.below(*(plots.dots(found.summary(), row) for row in rows if row))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
