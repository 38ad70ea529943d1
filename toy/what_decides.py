"""python -m toy.what_decides width        (or grid, data, teacher, recipe; solver, metric, rate, sampling)

What decides whether SPLAM is better than LCM? And what makes either better? One change at a time.

All these students have k = 100 and five solver steps unless a change says otherwise. So LCM and SPLAM differ in γ
alone: it is always 1, or uniform. Other factors have figures of their own: k and multiple estimation (fig2a),
training time (fig2b), w (fig3), σ (appb).
"""

import torch
from PIL import Image
from torch import Tensor

from data import Points, program
from splam import GAMMA_DIM, Draws, draw, gamma_embedding
from teacher import DiffusionModel
from toy import plots, tab3_sl_vs_dl
from toy.fig2a_skip_size import METHODS
from toy.laboratory import ETAS, Bench, Findings, Laboratory, Variant, less_noise, quality


def few_points(data: str) -> Points:
    """256 points to train on."""
    points = Points(data)
    points.samples, points.labels = points.samples[:256], points.labels[:256]
    return points


def late_gamma(*arguments, **options) -> Draws:
    """γ between 0.5 and 1."""
    draws = draw(*arguments, **options)
    return draws._replace(gamma=0.5 + draws.gamma / 2)


def sharp_embedding(gamma: Tensor) -> Tensor:
    """The frequencies of LCM's guidance embedding, up to 1000 radians, but zero at γ = 1 like ours."""
    angle = 1000 * (1 - gamma.float())[:, None] * torch.logspace(0, -4, GAMMA_DIM // 2, device=gamma.device)
    return torch.cat([angle.sin(), angle.cos() - 1], dim=1)


def large_embedding(gamma: Tensor) -> Tensor:
    """As if the γ-projection learnt 30 times faster: AdamW moves a weight by the same step whatever its input is."""
    return 30 * gamma_embedding(gamma)


# Each table: a setting's name, and what it changes for each of the METHODS, or only for some of them.
GAMMA, PAPER = ("SPLAM", "SPLAM, t'"), ("SPLAM",)
HALF = {"SPLAM, t', half of γ at 1": "--gamma_conditioning time --gamma_at_one 0.5"}
BEST = ("LCM", *HALF)
SECOND_ORDER = "--solver dpmsolver++ --solver_step 100"
SETTINGS = {
    "width": {"128 units": Variant()} | {f"{n} units": Variant(network={"width": n}) for n in (16, 32, 64)},
    "grid": {
        "as it is": Variant(),
        "10 starts": Variant("--num_ddim_timesteps 10"),
        "1000 starts": Variant("--num_ddim_timesteps 1000"),
        "k = 50": Variant("--k 50 --solver_step 25 --num_ddim_timesteps 20"),
        # On the grid of 50 starts, 20 apart, each of these ends at a time where none starts.
        "k = 50, off the grid": Variant("--k 50 --solver_step 25"),
    },
    "data": {
        "as it is": Variant(),
        "spiral": Variant("--pretrained_teacher_model ideal:spiral"),
        "256 points of data": Variant(dataset=few_points),
    },
    "teacher": {
        "as it is": Variant(),
        "trained teacher": Variant("--pretrained_teacher_model toy:8gaussians"),
        "poor teacher": Variant("--pretrained_teacher_model toy:8gaussians", teacher="--max_train_steps 300"),
    },
    "recipe": {
        "as it is": Variant(),
        "EMA 0": Variant("--ema_decay 0"),
        "EMA 0.99": Variant("--ema_decay 0.99"),
        "half of γ at 1": (Variant("--gamma_at_one 0.5"), GAMMA),
        "γ above 0.5": (Variant(parts={"draw": late_gamma}), GAMMA),
        "sharp embedding": (Variant(parts={"embed": sharp_embedding}), PAPER),
        "embedding x 30": (Variant(parts={"embed": large_embedding}), PAPER),
    },
    "solver": {
        "DDIM x 5": (Variant(), BEST),
        "DDIM x 2": (Variant("--solver_step 50"), BEST),
        "2S x 1": (Variant(SECOND_ORDER), BEST),
        "2S x 1, k = 200": (Variant("--k 200 --solver dpmsolver++ --solver_step 200"), BEST),
    },
    # All below with the second-order solver.
    "metric": {name: (Variant(f"{SECOND_ORDER} --metric {name}"), BEST) for name in ("huber", "huber_sample", "l2")},
    "rate": {
        rate: (Variant(f"{SECOND_ORDER} --learning_rate {rate}"), BEST) for rate in ("1e-4", "3e-4", "1e-3", "3e-3")
    },
}
SETTINGS["sampling"] = {name: SETTINGS["solver"][name] for name in ("DDIM x 5", "2S x 1", "2S x 1, k = 200")}
SECOND_TIMES = (299, 499, 699, 899)


def sampling_quality(bench: Bench, student: DiffusionModel) -> dict[str, float]:
    """`quality`; and for two steps by another second time or less fresh noise, distance and, where it is defined, map
    error."""
    values, last = quality(bench, student), len(student.schedule) - 1
    for second in SECOND_TIMES:
        for eta in ETAS:
            samples = bench.sample(student, 2, eta=eta, timesteps=(last, second))
            values |= less_noise(bench, samples, f"then t = {second}", eta)
    return values


def variants(question: str) -> dict[str, Variant]:
    """The students of one table."""
    students = {}
    for name, setting in SETTINGS[question].items():
        variant, methods = setting if type(setting) is tuple else (setting, METHODS)
        for method in methods:
            students[f"{method}: {name}"] = variant._replace(flags=f"{(METHODS | HALF)[method]} {variant.flags}")
    return students


def picture(found: Findings) -> Image.Image:
    """Map error, its 95th percentile and W2 of each student."""
    return plots.dots(found.summary(), found.columns()[:3])


def by_second_time(found: Findings) -> Image.Image:
    """Two steps by their second time: a panel for each η, and one for the map error of η = 0."""
    distance = found.columns()[2].partition(",")[0]  # W2 of points, the Fréchet distance of images
    shown = [(distance, eta) for eta in ETAS] + [("map error", ETAS[0])]
    panels = []
    for measure, eta in shown:
        lines = {}
        for name in found.rows:
            columns = [f"{measure}, then t = {second}, η = {eta:g}" for second in SECOND_TIMES]
            lines[name] = (SECOND_TIMES, *zip(*(found.last(name, column) for column in columns), strict=True))
        panels.append(plots.Panel(f"{measure}, η = {eta:g}", "second time", "", lines, yscale="linear"))
    return plots.curves(*panels)


PICTURES = {question: tab3_sl_vs_dl.picture for question in ("solver", "metric", "rate")}
PICTURES["sampling"] = by_second_time


@program
def main() -> None:
    laboratory = Laboratory(__file__, __doc__, questions=SETTINGS)
    question = laboratory.args.question
    measure = sampling_quality if question == "sampling" else quality
    laboratory.report(variants(question), PICTURES.get(question, picture), measure)


if __name__ == "__main__":
    main()
