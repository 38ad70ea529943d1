"""python -m toy.fig3_guidance

Figure 3: what the guidance scale w buys and costs: fidelity to the class, and diversity within it.

Two labelled moons, so wide that they overlap. The target of distillation is known: where the guided PF-ODE ends.
"""

import torch
from PIL import Image
from torch import Tensor

from data import program
from teacher import DiffusionModel
from toy import plots
from toy.laboratory import Bench, Findings, Laboratory, Variant, quality

SCALES = [0, 1, 2, 4, 8]
METHODS = {
    "LCM + ME": "--ode lcm",
    "SPLAM + ME": "--gamma_conditioning embedding",
    "SPLAM + ME, t'": "--gamma_conditioning time",
}
VARIANTS = {
    f"{method}, w = {w}": Variant(f"{flags} --guidance_w {w}", teacher="--class_conditional")
    for method, flags in METHODS.items()
    for w in SCALES
}


def fidelity_and_diversity(bench: Bench, points: Tensor) -> tuple[float, float]:
    """The mean probability of the class that was asked for; and the RMS distance to the mean of all samples of a class,
    divided by that of the data."""
    mixture, deviations = bench.model.mixture, []
    for c in range(mixture.num_classes):
        means = mixture.means[mixture.classes == c]
        data = ((means - means.mean(0)).square().sum(1).mean() + 2 * mixture.std**2).sqrt()
        ours = points[bench.labels == c]
        deviations.append((ours - ours.mean(0)).square().sum(1).mean().sqrt() / data)
    probability = mixture.class_probabilities(points).gather(1, bench.labels[:, None])
    return probability.mean().item(), torch.stack(deviations).mean().item()


def guided_quality(bench: Bench, student: DiffusionModel) -> dict[str, float]:
    """`quality`, and fidelity and diversity of one step and of the guided PF-ODE, where the mixture is known."""
    values = quality(bench, student)
    if len(student.shape) > 1:
        return values
    for name, points in {"student": bench.sample(student, 1), "PF-ODE": bench.endpoint}.items():
        values[f"fidelity, {name}"], values[f"diversity, {name}"] = fidelity_and_diversity(bench, points)
    return values


def picture(found: Findings) -> Image.Image:
    """A panel for the map error; and where they are known, for fidelity and diversity."""

    def series(column: str) -> dict:
        return found.ends({method: {w: f"{method}, w = {w}" for w in SCALES} for method in METHODS}, column)

    panels = [plots.Panel("distance to where the guided PF-ODE ends", "w", "map error", series("map error"))]
    for column, label in {"fidelity": "probability of the class", "diversity": "spread, relative to the data"}.items():
        if f"{column}, student" in found.columns():
            target = next(iter(series(f"{column}, PF-ODE").values()))
            lines = series(f"{column}, student") | {"PF-ODE": target}
            panels.append(plots.Panel(f"{column} of one step", "w", label, lines, yscale="linear"))
    return plots.curves(*panels)


@program
def main() -> None:
    laboratory = Laboratory(__file__, __doc__, pretrained_teacher_model="ideal:clouds", budget=14000)
    laboratory.report(VARIANTS, picture, guided_quality)


if __name__ == "__main__":
    main()
