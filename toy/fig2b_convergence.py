"""python -m toy.fig2b_convergence

Figure 2(b): quality against training steps, and against the network evaluations that they cost.

The paper compares by steps. But a step of k = 100 with five solver steps costs nine evaluations, and one of k = 20
five.
"""

from PIL import Image

from data import program
from sample import n_steps
from toy import plots
from toy.laboratory import STEPS, Findings, Laboratory, Variant

STUDENTS = {
    "LCM, k = 20": Variant("--ode lcm --k 20"),
    "LCM + ME, k = 100": Variant("--ode lcm --k 100"),
    "SPLAM, k = 20": Variant("--k 20 --gamma_conditioning embedding"),
    "SPLAM + ME, k = 100": Variant("--k 100 --gamma_conditioning embedding"),
    "SPLAM + ME, t', k = 100": Variant("--k 100"),
}
VARIANTS = STUDENTS | {
    "SPLAM, t', k = 20": Variant("--k 20"),
    "SPLAM + ME, t', k = 100, 4 γ": Variant("--k 100 --gamma_draws 4"),
    "SPLAM + ME, t', k = 100, half of γ at 1": Variant("--k 100 --gamma_at_one 0.5"),
}
PARTS = [2.0**-i for i in range(7)]  # of the training, after which students are measured


def picture(found: Findings) -> Image.Image:
    """The map error by steps and by cost; below it the distance to the data by cost, for each number of steps."""
    error, _, distance, *_ = found.columns()
    by_cost = "network evaluations, in batches"
    distances = [f"{distance.partition(',')[0]}, {n_steps(n)}" for n in STEPS]
    above = [plots.Panel(error, "training steps", "", found.curves(error, "step"), "log")]
    above.append(plots.Panel(error, by_cost, "", found.curves(error, "evaluations"), "log"))
    below = [plots.Panel(c, by_cost, "", found.curves(c, "evaluations"), "log") for c in distances]
    return plots.below(plots.curves(*above), plots.curves(*below))


@program
def main() -> None:
    Laboratory(__file__, __doc__, budget=36000).report(VARIANTS, picture, at=PARTS)


if __name__ == "__main__":
    main()
