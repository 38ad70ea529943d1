"""python -m toy.fig2c_error

Figure 2(c): the error between neighbouring points of the PF-ODE, and the cumulative error, by time.

The paper's theory: if f(x_t, t) and f(x_s, s) are close for all neighbours on a trajectory, their sum bounds how far
f(x_T, T) is from the trajectory's end. In 2-D both sides are measured, on trajectories and their ends as they are.
"""

import functools
import itertools

import torch
from PIL import Image
from torch import Tensor

from data import program
from splam import ConsistencyFunction, multiple_estimation
from teacher import DiffusionModel
from toy import plots
from toy.fig2b_convergence import STUDENTS as VARIANTS
from toy.laboratory import Bench, Findings, Laboratory, quality

TIMES = list(range(999, 100, -20))  # as the paper's figure: 20 apart, and not below 100


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def trajectories(bench: Bench) -> list[Tensor]:
    """x_t at TIMES, (samples, ...) each, from the samples' noises along the PF-ODE, in the smallest DDIM steps."""
    model, x = bench.model, bench.noise.to(bench.model.device)
    denoise = functools.partial(model.predict, cond=model.condition(bench.labels.to(x.device)), w=bench.w)
    states, size = [x], len(model.schedule) // model.many_steps
    for start, end in itertools.pairwise(TIMES):
        t, s = (torch.full((len(x),), time, device=x.device) for time in (start, end))
        states.append(multiple_estimation(denoise, model.schedule, states[-1], t, s, start - end, size))
    return states


def rms(difference: Tensor) -> float:
    """The root of the mean squared length of (B, ...)."""
    return difference.flatten(1).square().sum(1).mean().sqrt().item()


@torch.no_grad()
def errors(bench: Bench, student: DiffusionModel) -> dict:
    """`quality`; and by time the RMS distances of f(x_t, t) to f at the next time, and to the trajectory's end."""
    function = ConsistencyFunction(student.network, student.schedule, student.prediction_type)
    cond, path = student.condition(bench.labels.to(student.device)), trajectories(bench)
    f = [function(x, torch.full((len(x),), t, device=x.device), **cond) for t, x in zip(TIMES, path, strict=True)]
    neighbours, end = [rms(a - b) for a, b in itertools.pairwise(f)], [rms(x0.cpu() - bench.endpoint) for x0 in f]
    sums = {"sum of neighbours": sum(neighbours), "RMS to the end": end[0]}
    return {**quality(bench, student), **sums, "neighbours": neighbours, "end": end}


def picture(found: Findings) -> Image.Image:
    """A panel for neighbours, and one for the end."""
    titles = {"neighbours": "f(x_t, t) to f at t - 20", "end": "f(x_t, t) to the trajectory's end"}
    times = {"neighbours": TIMES[:-1], "end": TIMES}
    return plots.curves(*(plots.Panel(titles[c], "t", "RMS distance", found.curves(c, times[c])) for c in titles))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture, errors)


if __name__ == "__main__":
    main()
