"""Few-step sampling of a student, and many-step sampling of its teacher from the same noise."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from tqdm import tqdm

import training
from data import BadInput, program, read_prompts, writable_folder
from kinds import Teacher
from splam import ConsistencyFunction, few_step_sample, few_step_times
from teacher import load

SCHEDULERS = ("lcm", "ddim", "dpmsolver++")


class SeededNoise:
    """Standard normal noise with a seed per sample, so that a sample does not depend on its batch or on the device."""

    def __init__(self, shape: tuple[int, ...], seeds: range, device: torch.device):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device)


def states(
    model: Teacher, noise: SeededNoise, steps: int, scheduler: str, cond: dict[str, Tensor], w: float
) -> Iterator[Tensor]:
    """The state after each step of one batch, the last of which is the sample.

    "lcm" is the student's sampler (Eq. 19, repeated): its states are predictions of x_0. "ddim" and "dpmsolver++" are
    diffusers' solvers of the PF-ODE, fed with the guided ε. They start at time N-1 ("trailing" spacing), where the
    noise really is pure, and do not clip x_0: that would be another ODE than the one that is distilled.
    """
    config, x = model.pipeline.scheduler.config, noise()
    if scheduler == "lcm":
        times = few_step_times(steps, len(model.schedule), model.original_inference_steps)
        function = ConsistencyFunction(model.network, model.schedule, model.prediction_type)
        yield from few_step_sample(function, model.schedule, x, times, noise, **cond)
        return
    kind = DDIMScheduler if scheduler == "ddim" else DPMSolverMultistepScheduler
    solver = kind.from_config(config, prediction_type="epsilon", timestep_spacing="trailing", clip_sample=False)
    solver.set_timesteps(steps, device=x.device)
    for t in solver.timesteps:
        _, eps = model.predict(x, t.expand(len(x)), cond, w)
        x = solver.step(eps, t, x).prev_sample
        yield x


@torch.no_grad()
def sample(
    model: Teacher,
    seeds: range,
    steps: int,
    scheduler: str | None = None,
    *,
    w: float = 0.0,
    prompts: Sequence[str] = (),
    batch_size: int = 1024,
    mixed_precision: str = "no",
) -> Tensor:
    """One sample for each seed, (len(seeds), ...) on the CPU. The seed s takes prompt s, modulo their number."""
    scheduler = scheduler or ("lcm" if model.is_student else "ddim")
    limit = model.original_inference_steps if scheduler == "lcm" else len(model.schedule)
    if not 1 <= steps <= limit:
        raise BadInput(f"{scheduler} takes 1 to {limit} steps, not {steps}")
    if w and scheduler == "lcm":
        raise BadInput("guidance is for the teacher: what a student was distilled with is in its weights")
    labels, device = model.labels(prompts), model.network.device
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    finished = []
    for batch in tqdm(batches, desc=f"{scheduler} {steps}", unit="batch", leave=False, disable=len(batches) == 1):
        label = labels[torch.tensor(batch) % len(labels)].to(device)
        with training.autocast(device, mixed_precision):
            noise, cond = SeededNoise(model.shape, batch, device), model.condition(label)
            *_, last = states(model, noise, steps, scheduler, cond, w)
        finished.append(model.decode(last).cpu())
    return torch.cat(finished)


@program
def main() -> None:
    p = argparse.ArgumentParser(prog="sample.py", description="Sample from a student or a teacher.")
    p.add_argument("model", help="pipeline folder or hub id")
    p.add_argument("--steps", type=int, default=4, help="network evaluations per sample (paper: 1 to 4)")
    p.add_argument("--scheduler", choices=SCHEDULERS, help="default: lcm for a student, ddim for a teacher")
    p.add_argument("--num_images", type=int, default=64)
    p.add_argument("--seed", type=int, default=0, help="of the first sample; sample i has the seed plus i")
    p.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    p.add_argument("--guidance_w", type=float, default=0.0, help="eps + w (eps - eps_uncond), for a teacher")
    p.add_argument("--batch_size", type=int, default=1024)
    p.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no")
    p.add_argument("--out", default="samples.png", help="a .png for one picture of all, else a folder for one each")
    args = p.parse_args()
    if args.num_images < 1 or args.batch_size < 1:
        raise BadInput("--num_images and --batch_size must be positive")
    out = Path(args.out)
    folder = writable_folder(out.parent if out.suffix == ".png" else out)
    model = load(args.model).to(training.process().device)
    samples = sample(
        model,
        range(args.seed, args.seed + args.num_images),
        args.steps,
        args.scheduler,
        w=args.guidance_w,
        prompts=read_prompts(args.prompts),
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
    )
    if out.suffix == ".png":
        model.picture(samples, columns=round(args.num_images**0.5)).save(out)
    else:
        for i, one in enumerate(samples):
            model.picture(one[None], columns=0).save(folder / f"{args.seed + i:06d}.png")
    print(out)


if __name__ == "__main__":
    main()
