"""Figure 2(c): the error between neighbouring points of the PF-ODE, and the cumulative error, by time.

The paper's theory: if f(x_t, t) and f(x_s, s) are close for all neighbours on a trajectory, their sum bounds how far
f(x_T, T) is from the trajectory's end. In 2-D both sides are measured, on trajectories and their ends as they are.
"""

import functools
import itertools

import torch
from PIL import Image
from torch import Tensor

from data import program
from kinds import Teacher
from splam import ConsistencyFunction, multiple_estimation
from toy import plots
from toy.fig2b_convergence import STUDENTS
from toy.laboratory import Bench, Findings, Laboratory, quality

VARIANTS = STUDENTS
TIMES = list(range(999, 100, -20))  # as the paper's figure: 20 apart, and not below 100


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def trajectories(bench: Bench) -> list[Tensor]:
    """x_t at TIMES, (samples, ...) each, from the samples' noises along the PF-ODE, in the smallest DDIM steps."""
    teacher, found = bench.teacher, [bench.noise.to(bench.device)]
    cond, size = teacher.condition(bench.labels.to(bench.device)), 1000 // max(teacher.evaluation["teacher_steps"])
    for start, end in itertools.pairwise(TIMES):
        t, s = (torch.full((len(bench.noise),), time, device=bench.device) for time in (start, end))
        found.append(
            multiple_estimation(
                lambda x, t: teacher.predict(x, t, cond, bench.w), teacher.schedule, found[-1], t, s, start - end, size
            )
        )
    return found


def rms(difference: Tensor) -> float:
    return difference.flatten(1).square().sum(1).mean().sqrt().item()


@torch.no_grad()
def errors(bench: Bench, student: Teacher) -> dict:
    """Also `quality`, and by time the RMS distances of f(x_t, t) to f at the next time, and to the trajectory's end."""
    function = ConsistencyFunction(student.network, student.schedule, student.prediction_type)
    cond, path = student.condition(bench.labels.to(bench.device)), trajectories(bench)
    f = [function(x, torch.full((len(x),), t, device=x.device), **cond) for t, x in zip(TIMES, path, strict=True)]
    neighbours, end = [rms(a - b) for a, b in itertools.pairwise(f)], [rms(x0.cpu() - bench.endpoint) for x0 in f]
    sums = {"sum of neighbours": sum(neighbours), "RMS to the end": end[0]}
    return {**quality(bench, student), **sums, "neighbours": neighbours, "end": end}


def picture(found: Findings) -> Image.Image:
    def panel(column: str, title: str) -> plots.Panel:
        values = {name: found.of(name, column)[:, -1] for name in found.rows}
        series = {name: (TIMES[: v.shape[1]], v.mean(0), v.std(0)) for name, v in values.items()}
        return plots.Panel(title, "t", "RMS distance", series)

    neighbours, end = panel("neighbours", "f(x_t, t) to f at t - 20"), panel("end", "f(x_t, t) to the trajectory's end")
    return plots.curves(neighbours, end)


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture, errors)


if __name__ == "__main__":
    main()
