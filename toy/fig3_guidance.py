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

SCALES = [0, 1, 2, 4, 8]  # w; the paper has 3 and 8
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
    mixture, ratios = bench.model.mixture, []

    def variance(x: Tensor) -> Tensor:
        return (x - x.mean(0)).square().sum(1).mean()

    for c in range(mixture.num_classes):
        # The variance of the data of a class is that of its components' means, and std² in each of the two dimensions.
        data = variance(mixture.means[mixture.classes == c]) + 2 * mixture.std**2
        ratios.append(variance(points[bench.labels == c]).sqrt() / data.sqrt())
    probability = mixture.class_probabilities(points).gather(1, bench.labels[:, None])
    return probability.mean().item(), torch.stack(ratios).mean().item()


def guided_quality(bench: Bench, student: DiffusionModel) -> dict[str, float]:
    """`quality`, and fidelity and diversity of one step and of the guided PF-ODE, where the mixture is known."""
    values = quality(bench, student)
    if len(student.shape) == 1:  # of images the density is not known
        for name, points in {"student": bench.sample(student, 1), "PF-ODE": bench.endpoint}.items():
            values[f"fidelity, {name}"], values[f"diversity, {name}"] = fidelity_and_diversity(bench, points)
    return values


def picture(found: Findings) -> Image.Image:
    """A panel for the map error; and where they are known, for fidelity and diversity."""
    students = {method: {w: f"{method}, w = {w}" for w in SCALES} for method in METHODS}
    lines = found.ends(students, "map error")
    panels = [plots.Panel("distance to where the guided PF-ODE ends", "w", "map error", lines)]
    for column, label in {"fidelity": "probability of the class", "diversity": "spread, relative to the data"}.items():
        if f"{column}, student" in found.columns():
            lines = found.ends(students, f"{column}, student")
            # The target is the same in every row of a w; it is drawn once.
            lines["PF-ODE"] = next(iter(found.ends(students, f"{column}, PF-ODE").values()))
            panels.append(plots.Panel(f"{column} of one step", "w", label, lines, yscale="linear"))
    return plots.curves(*panels)


@program
def main() -> None:
    laboratory = Laboratory(__file__, __doc__, pretrained_teacher_model="ideal:clouds", budget=14000)
    laboratory.report(VARIANTS, picture, guided_quality)


if __name__ == "__main__":
    main()
