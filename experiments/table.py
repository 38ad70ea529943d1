"""The experiments, and their students.

    fig2a              quality by the length k of a sub-path, with and without multiple estimation (ME)
    fig2b              quality by training steps, and by the network evaluations that they cost
    fig2c              the error between neighbours of the PF-ODE, and to its end, by time
    fig3               what the guidance scale w buys and costs
    tab3               LCM, DL and SL; also with what this project adds
    appb               the linear and the Markov σ: which is right, what it changes
    flow               the lines on the path of flow matching, beyond the paper
    gaussian           where training ends, reached beside predicted, if the data are one Gaussian

    decides-width      whether SPLAM or LCM is ahead, by one change at a time: the network's width,
    decides-grid       times where sub-paths start and end,
    decides-data       the data,
    decides-teacher    the teacher,
    decides-recipe     the average, the distribution of γ
    decides-solver     what makes either better: the solver,
    decides-metric     the metric,
    decides-rate       the learning rate

    symptoms           a healthy run, and runs with one mistake each

All other flags are distill.py's, for all students. On two CPU cores an experiment takes minutes, with --quick seconds.
`python -m experiments.verdict` says what the records say of the paper's claims.
"""

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from experiments.laboratory import QUALITY, TRAINING, Bench, Experiment, Findings, Variant, quality
from sample import SeededNoise
from splam import METRICS, SIGMA_FORMS, Denoiser, Schedule, multiple_estimation, sub_path_point
from teacher import DiffusionModel, PointModel
from toy import plots

# ---------------------------------------------------------------------------------------------------------------------
# The students. What no variant changes is distill.py's default: k = 100 in five solver steps, 50 starts, huber.
# ---------------------------------------------------------------------------------------------------------------------

# SPLAM is the paper's, which embeds γ. With t' the network is told that time instead, and of "half" half of the γ are 1
# (improved.py).
TOLD_GAMMA = {"SPLAM": "", "SPLAM, t'": "--improved time"}
METHODS = {"LCM": "--ode lcm"} | TOLD_GAMMA


def each(methods: dict[str, str], settings: dict[str, str | Variant]) -> dict[str, Variant]:
    """Each method in each setting. Names and flags are joined."""
    variants = {}
    for method, flags in methods.items():
        for name, setting in settings.items():
            more = Variant(setting) if isinstance(setting, str) else setting
            variants[method + name] = more._replace(flags=f"{flags} {more.flags}".strip())
    return variants


# Figure 2(a). Sub-paths start on a grid of 50 times, 20 apart. Where k is a multiple of 20 they also end on it, and for
# k = 50 a grid of 20 times does that. With ME the solver's steps are 20 long, or 25, which divides 50.
FIFTY = "--k 50 --num_ddim_timesteps 20"
SIZES = {", k = 20": "--k 20", ", k = 50": f"{FIFTY} --solver_step 50"}
SIZES |= {", k = 100": "--k 100 --solver_step 100", ", k = 200": "--k 200 --solver_step 200"}
SIZES |= {" + ME, k = 50": f"{FIFTY} --solver_step 25", " + ME, k = 100": "--k 100", " + ME, k = 200": "--k 200"}
FIG2A = each(METHODS, SIZES)

# Figure 2(b) and (c). The paper compares by steps. A step of k = 100 costs nine evaluations, one of k = 20 five.
ENDS = {", k = 20": "--k 20", ", k = 100": "--k 100"}  # one solver step, or five
FIG2C = each(METHODS, ENDS)
FIG2B = FIG2C | {"SPLAM, t', half, k = 100": Variant("--improved time half")}

# Figure 3, on two labelled moons, so wide that they overlap. The paper has w = 3 and 8.
SCALES = [0, 1, 2, 4, 8]
FIG3 = each(METHODS, {f", w = {w}": Variant(f"--guidance_w {w}", teacher="--class_conditional") for w in SCALES})

# Table 3.
LINES = {"DL": "--ode dl", "SL": "", "SL, Markov σ": "--sigma markov"}
LINES |= {f"{line}, t'": f"{flags} --improved time" for line, flags in LINES.items()}
TAB3 = each({"LCM": "--ode lcm"} | LINES, ENDS)
TAB3 |= {"SL, half, k = 100": Variant("--improved half"), "SL, t', half, k = 100": Variant("--improved time half")}

# Flow matching.
FLOW = each({"LCM": "--ode lcm", "DL": "--ode dl", "SL": ""}, ENDS)

# What decides: one change at a time.
SAME = {"": ""}
WIDTH = each(METHODS, SAME | {f": {n} units, not 128": Variant(network={"width": n}) for n in (16, 32, 64)})
GRID = each(METHODS, SAME | {": 10 starts": "--num_ddim_timesteps 10", ": k = 50": f"{FIFTY} --solver_step 25"})
# On the grid of 50 starts these sub-paths end where none starts. LCM's target is never trained there: it is refused.
OFF_GRID = "--k 50 --solver_step 25"
GRID |= each(TOLD_GAMMA, {": k = 50, off the grid": OFF_GRID})
DATA = each(METHODS, SAME | {": a spiral": "--pretrained_teacher_model ideal:spiral"})
MLP = Variant("--pretrained_teacher_model toy:8gaussians")
POOR = MLP._replace(teacher="--max_train_steps 300")
TEACHER = each(METHODS, SAME | {": trained teacher": MLP, ": poor teacher": POOR})
RECIPE = each(METHODS, SAME | {": EMA 0": "--ema_decay 0", ": EMA 0.99": "--ema_decay 0.99"})
RECIPE |= {"SPLAM: half": Variant("--improved half"), "SPLAM, t': half": Variant("--improved time half")}

# What makes either better.
FIRST = {"LCM": "--ode lcm", "SPLAM, t', half": "--improved time half"}
SECOND = {"LCM, second order": "--ode lcm --improved second_order", "SPLAM, t', half, second order": "--improved"}
SOLVER = each(FIRST, {": DDIM x 5": "", ": DDIM x 2": "--solver_step 50"})
SOLVER |= each(SECOND, SAME | {", k = 200": "--k 200"})
METRIC = each(SECOND | {"SPLAM": ""}, {f": {metric}": f"--metric {metric}" for metric in METRICS})
RATE = each(SECOND, {f": {rate}": f"--learning_rate {rate}" for rate in ("1e-4", "3e-4", "1e-3", "3e-3")})

# A healthy student, and others with one mistake each. guidance_scale 1 is w = 0. The students with a w have two classes
# that overlap, since guidance needs some.
CLOUDS = "--pretrained_teacher_model ideal:clouds --guidance_w"
MISTAKES = {
    "healthy": "",
    "learning rate x 10": "--learning_rate 1e-2",
    "learning rate / 10": "--learning_rate 1e-4",
    "EMA 0": "--ema_decay 0",
    "EMA 0.999": "--ema_decay 0.999",
    "Markov σ with time": "--sigma markov",
    "ends off the grid, with embedding": f"{OFF_GRID} --improved half",
    "k = 200, one solver step": "--k 200 --solver_step 200",
    "guidance_scale 1 meant": Variant(f"{CLOUDS} 0", teacher="--class_conditional"),
    "and w = 1 typed": Variant(f"{CLOUDS} 1", teacher="--class_conditional"),
    "wrong prediction type": MLP._replace(claims="epsilon"),
}
SYMPTOMS = each({"": "--improved time"}, MISTAKES)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 2(c)
#
# A consistency function would have f(x_t, t) = f(x_s, s) for all neighbours t, s on a trajectory. The paper adds up
# what is left of that (Eq. 6) along the trajectory, and so bounds how far f(x_T, T) is from the trajectory's end. That
# is why it wants each of these errors to be small. Here both sides are measured, on trajectories of the teacher.
# ---------------------------------------------------------------------------------------------------------------------

TIMES = list(range(999, 100, -20))  # as the paper's figure: 20 apart, and not below 100


def rms(difference: Tensor) -> float:
    """The root mean square, over samples, of the length of a difference (samples, ...)."""
    return difference.flatten(1).square().sum(1).mean().sqrt().item()


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def trajectories(place: Bench) -> list[Tensor]:
    """x_t at TIMES, (samples, ...) each, from the samples' noises along the PF-ODE, in the smallest DDIM steps."""
    model, states = place.model, [SeededNoise(place.model.shape, place.seeds, place.model.device)()]
    denoise = partial(model.predict, cond=model.condition(place.labels), w=place.w)
    size = len(model.schedule) // model.many_steps
    for start, end in itertools.pairwise(TIMES):
        t, s = (torch.full((len(states[0]),), time, device=model.device) for time in (start, end))
        states.append(multiple_estimation(denoise, model.schedule, states[-1], t, s, start - end, size))
    return states


@torch.no_grad()
def errors(place: Bench, student: DiffusionModel) -> dict:
    """`quality`; and by time the RMS distances of f(x_t, t) to f at the next time, and to the trajectory's end."""
    cond, f = student.condition(place.labels), []
    for time, x in zip(TIMES, trajectories(place), strict=True):
        f.append(student.predict(x, torch.full((len(x),), time, device=x.device), cond)[0])
    to_next = [rms(here - following) for here, following in itertools.pairwise(f)]
    to_end = [rms(here - place.endpoint.to(here.device)) for here in f[:-1]]
    sums = {"sum of neighbours": sum(to_next), "RMS to the end": to_end[0]}
    return {**quality(place, student), **sums, "t": TIMES[:-1], "f to its neighbour": to_next, "f to the end": to_end}


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3: the scale w buys fidelity to the class, and costs diversity within it
# ---------------------------------------------------------------------------------------------------------------------


def fidelity_and_diversity(place: Bench, points: Tensor) -> tuple[float, float]:
    """The mean probability of the class that was asked for; and the RMS distance to the mean of all samples of a class,
    divided by that of the data."""
    mixture, labels, ratios = place.model.mixture, torch.tensor(place.labels), []
    for c in range(mixture.num_classes):
        # The variance of the data of a class is that of its components' means, and std² in each of the two dimensions.
        data = mixture.means[mixture.classes == c].var(0, correction=0).sum() + 2 * mixture.std**2
        ratios.append((points[labels == c].var(0, correction=0).sum() / data).sqrt())
    probability = mixture.class_probabilities(points).gather(1, labels[:, None])
    return probability.mean().item(), torch.stack(ratios).mean().item()


def guided_quality(place: Bench, student: DiffusionModel) -> dict[str, float]:
    """`quality`, and fidelity and diversity of one step and of the guided PF-ODE, where the mixture is known."""
    values = quality(place, student)
    if len(student.shape) == 1:  # of images the density is not known
        for name, points in {"student": place.sampler(student, 1, 0.0, None)[0], "PF-ODE": place.endpoint}.items():
            values[f"fidelity, {name}"], values[f"diversity, {name}"] = fidelity_and_diversity(place, points)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Appendix B. Which σ_γ is right depends on how the ends of a sub-path are coupled: the Markov form assumes that x_t was
# made from x_s by fresh noise (Eq. 20), and training makes x_s from x_t by DDIM.
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def markov_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """x_s as the Markov chain has it, given x_t and the teacher's x_0: `multiple_estimation` with DDPM's ancestral
    steps in the place of DDIM's, so with fresh noise in each.

    Each step draws x at t_next from its distribution given x_t and x_0. Its noise is no longer that of x_t, and the
    ends of a sub-path are coupled as Eq. 20 says, as far as x̂_0 is right.
    """
    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        x0, eps = denoise(x, t)
        (alpha_t, sigma_t), (alpha, sigma) = schedule.at(t, x.ndim), schedule.at(t_next, x.ndim)
        fresh = sigma / sigma_t * (1 - (alpha_t / alpha) ** 2).clamp_min(0).sqrt()  # the posterior's deviation
        x = alpha * x0 + (sigma**2 - fresh**2).clamp_min(0).sqrt() * eps + fresh * torch.randn_like(x)
        t = t_next
    return x


APPB = {}
for coupling, solver in {"DDIM": multiple_estimation, "Markov": markov_estimation}.items():
    for form in SIGMA_FORMS:
        APPB |= each(TOLD_GAMMA, {f": {coupling}, {form} σ": Variant(f"--sigma {form}", parts={"solver": solver})})
GAMMAS = torch.linspace(0, 1, 11)[1:]  # at γ = 0, x_γ is r x_s, which is mapped as x_s is: nothing is left


@torch.no_grad()
def residual(model: PointModel, solver: Callable, solver_step: int, form: str, t: int = 599, k: int = 100) -> Tensor:
    """By γ, the RMS of F(x_γ) - F(x_s) for the F that cannot be improved, the PF-ODE's own map: what is left of Eq. 17.

    F knows x_γ by α_γ and σ_γ: a wrong σ_γ starts the PF-ODE at a wrong time. The sub-paths go from t to t - k. The
    notebook draws this.
    """
    torch.manual_seed(0)
    x0, _ = model.mixture.sample(1024, torch.default_generator)
    t = torch.full((len(x0),), t)
    s, (alpha, sigma), (alpha_s, sigma_s) = t - k, model.schedule.at(t, 2), model.schedule.at(t - k, 2)
    x_t = alpha * x0 + sigma * torch.randn_like(x0)
    x_s = solver(partial(model.predict, cond={}), model.schedule, x_t, t, s, k, solver_step)
    end, left = model.mixture.endpoint(x_s, alpha_s[:1], sigma_s[:1]), []
    for gamma in GAMMAS:
        point = sub_path_point(x_t, x_s, t, s, gamma.expand(len(x0)), model.schedule, "sl", form)
        left.append(rms(model.mixture.endpoint(point.x, point.alpha[:1], point.sigma[:1]) - end))
    return torch.tensor(left)


# ---------------------------------------------------------------------------------------------------------------------
# Where training ends, if the data are one Gaussian: docs/equations.md, note 16
#
# There every student is linear, F(z) = G z, and so is the map to be distilled, G*. The note predicts G/G* on Stable
# Diffusion's schedule, for a student that has trained without end, and tests/test_improved.py computes it.
# ---------------------------------------------------------------------------------------------------------------------

PREDICTED = {
    "LCM, k = 20": ("--ode lcm --k 20", 0.9729),
    "LCM": ("--ode lcm", 0.9729),
    "SPLAM": ("", 0.9729),
    "SPLAM, t', k = 20": ("--improved time --k 20", 0.9652),
    "SPLAM, t', half": ("--improved time half", 0.9614),
    "SPLAM, t'": ("--improved time", 0.9397),
    "SPLAM, t', Markov σ": ("--improved time --sigma markov", 0.379),
}
ONE_GAUSSIAN = Variant("--pretrained_teacher_model ideal:gaussian --metric l2 --lr_scheduler cosine")
ONE_GAUSSIAN = ONE_GAUSSIAN._replace(teacher="--beta_start 0.00085 --beta_end 0.012")
GAUSSIAN = each({name: flags for name, (flags, _) in PREDICTED.items()}, {"": ONE_GAUSSIAN})


def shrinkage(place: Bench, student: DiffusionModel) -> dict[str, float]:
    """1 - G/G*, by how much a student pulls samples to the mean."""
    samples, end = place.sampler(student, 1, 0.0, None)[0], place.endpoint
    return {"1 - G/G*": 1 - ((samples * end).sum() / end.square().sum()).item()}


def beside_prediction(found: Findings) -> Image.Image:
    """What the seeds reached, over what is predicted; on the diagonal both are the same."""
    # G* is measured by 1000 DDIM steps, which pull to the mean by a twentieth of what the 50 of LCM's fixed point do.
    lines, measured = {"as predicted": ([0.02, 0.7], [0.02, 0.7], None)}, PREDICTED["LCM"][1] ** (1 / 20)
    for name in found.rows:
        reached = found.of(name, "1 - G/G*")[:, -1].tolist()
        lines[name] = [1 - PREDICTED[name][1] / measured] * len(reached), reached, None
    scale = {"xscale": "log", "ticks": [0.02, 0.05, 0.1, 0.2, 0.5]}
    return plots.curves(plots.Panel("data of one Gaussian: 1 - G/G*", "predicted", "reached", lines, **scale))


# ---------------------------------------------------------------------------------------------------------------------
# The experiments
# ---------------------------------------------------------------------------------------------------------------------


# What is drawn: the columns over each x. Where nothing is said, it is a line of dots for each student.
SIZE, TIME = {"k": QUALITY}, {"t": ["f to its neighbour", "f to the end"]}
COST, SEEN = {"step": ["map error"], "evaluations": QUALITY}, {"step": [*TRAINING, "map error"]}
SCALE = {"w": ["map error", "fidelity, student", "diversity, student"]}
HALVES, TWELFTHS = [2.0**-i for i in range(7)], [i / 12 for i in range(1, 13)]  # of the training
CLASSES = {"pretrained_teacher_model": "ideal:clouds", "budget": 14000}
EXPERIMENTS = {
    "fig2a": Experiment(FIG2A, partial(Findings.curves, over=SIZE, xscale="log", ticks=[20, 50, 100, 200])),
    "fig2b": Experiment(
        FIG2B, partial(Findings.curves, over=COST, xscale="log"), at=HALVES, defaults={"budget": 36000}
    ),
    "fig2c": Experiment(FIG2C, partial(Findings.curves, over=TIME), errors),
    "fig3": Experiment(FIG3, partial(Findings.curves, over=SCALE, yscale="linear"), guided_quality, defaults=CLASSES),
    "tab3": Experiment(TAB3),
    "appb": Experiment(APPB),
    "decides-width": Experiment(WIDTH),
    "decides-grid": Experiment(GRID),
    "decides-data": Experiment(DATA),
    "decides-teacher": Experiment(TEACHER),
    "decides-recipe": Experiment(RECIPE),
    "decides-solver": Experiment(SOLVER),
    "decides-metric": Experiment(METRIC, at=(1 / 8, 1)),
    "decides-rate": Experiment(RATE),
    "flow": Experiment(FLOW, defaults={"pretrained_teacher_model": "flow:8gaussians"}),
    "gaussian": Experiment(GAUSSIAN, beside_prediction, shrinkage, defaults={"seeds": 3, "budget": 45000}),
    "symptoms": Experiment(SYMPTOMS, partial(Findings.curves, over=SEEN), at=TWELFTHS, defaults={"seeds": 2}),
}
