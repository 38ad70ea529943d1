"""Few-step sampling of a student, and many-step sampling of its teacher from the same noise."""

import argparse
import json
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
def sample_batches(
    model: Teacher,
    seeds: Sequence[int],
    steps: int,
    scheduler: str | None = None,
    *,
    w: float = 0.0,
    prompts: Sequence[str] = (),
    batch_size: int | None = None,
    mixed_precision: str = "no",
) -> Iterator[Tensor]:
    """One sample for each seed, batch by batch on the CPU. The seed s takes prompt s, modulo their number."""
    scheduler, batch_size = scheduler or default_scheduler(model), batch_size or model.evaluation["batch_size"]
    limit = model.original_inference_steps if scheduler == "lcm" else len(model.schedule)
    if not 1 <= steps <= limit:
        raise BadInput(f"{scheduler} takes 1 to {limit} steps, not {steps}")
    if w and scheduler == "lcm":
        raise BadInput("guidance is for the teacher: what a student was distilled with is in its weights")
    labels, device = model.labels(prompts), model.network.device
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    for batch in tqdm(batches, desc=f"{scheduler} {steps}", unit="batch", leave=False, disable=len(batches) == 1):
        label = labels[torch.tensor(batch) % len(labels)].to(device)
        with training.autocast(device, mixed_precision):
            noise, cond = SeededNoise(model.shape, batch, device), model.condition(label)
            *_, last = states(model, noise, steps, scheduler, cond, w)
        yield model.decode(last).cpu()


def default_scheduler(model: Teacher) -> str:
    return "lcm" if model.is_student else "ddim"


def sample(model: Teacher, seeds: Sequence[int], steps: int, scheduler: str | None = None, **options) -> Tensor:
    """`sample_batches` as one tensor, (len(seeds), ...)."""
    return torch.cat(list(sample_batches(model, seeds, steps, scheduler, **options)))


def png(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def sample_to_folder(
    model: Teacher, seeds: Sequence[int], folder: Path, steps: int, scheduler: str | None = None, **options
) -> None:
    """Sample s becomes `folder`/s.png. What an interrupted call left is kept; several processes share the work."""
    state, record = training.process(), writable_folder(folder) / "samples.json"
    scheduler = scheduler or default_scheduler(model)
    weights = sum(parameter.double().abs().sum().item() for parameter in model.network.parameters())
    made = {"model": model.name, "weights": f"{weights:.6e}", "steps": steps, "scheduler": scheduler, **options}
    made.pop("batch_size", None)  # a sample does not depend on it
    text = json.dumps(made, indent=2)
    if record.is_file() and record.read_text() != text:
        raise BadInput(f"{folder} holds samples of another model, or made with other flags: see {record}")
    state.wait_for_everyone()
    if state.is_main_process:
        record.write_text(text)
    missing = [seed for seed in seeds[state.process_index :: state.num_processes] if not png(folder, seed).is_file()]
    done = iter(missing)
    for batch in sample_batches(model, missing, steps, scheduler, **options):
        for one, seed in zip(batch, done, strict=False):
            draft = png(folder, seed).with_suffix(".tmp")
            model.picture(one[None], columns=1).save(draft, "PNG")
            draft.replace(png(folder, seed))
    state.wait_for_everyone()


@program
def main() -> None:
    p = argparse.ArgumentParser(
        prog="sample.py",
        description="Sample from students and teachers, all from the same noise.",
        formatter_class=training.Help,
    )
    p.add_argument("models", nargs="+", help="pipeline folders or hub ids")
    p.add_argument("--steps", type=int, nargs="+", help="of students: network evaluations (default 4; paper: 1 to 4)")
    p.add_argument("--teacher_steps", type=int, nargs="+", help="of teachers (default 50)")
    p.add_argument("--scheduler", choices=SCHEDULERS, help="default: lcm for a student, ddim for a teacher")
    p.add_argument("--num_images", type=int, help="default: 64, or in a picture of several rows one row's")
    p.add_argument("--seed", type=int, default=0, help="of the first sample; sample i has the seed plus i")
    p.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    p.add_argument("--guidance_w", type=float, default=0.0, help="eps + w (eps - eps_uncond), for teachers")
    p.add_argument("--batch_size", type=int, help="default: by kind of model")
    p.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no")
    p.add_argument("--out", default="samples.png", help="a .png for one picture of all, else a folder for one each")
    args = p.parse_args()
    training.check_positive(args, "num_images", "batch_size")
    out, plan, steps = Path(args.out), [], {"lcm": args.steps or [4]}
    writable_folder(out.parent if out.suffix == ".png" else out)
    for name in args.models:
        model = load(name).to(training.process().device)
        scheduler = args.scheduler or default_scheduler(model)
        plan += [(model, scheduler, n) for n in steps.get(scheduler, args.teacher_steps or [50])]
    schedulers = {scheduler for _, scheduler, _ in plan}
    if schedulers == {"lcm"} and (args.guidance_w or args.teacher_steps):
        raise BadInput("--guidance_w and --teacher_steps are for teachers; a student has its guidance in its weights")
    if "lcm" not in schedulers and args.steps:
        raise BadInput("--steps is for students; a teacher takes --teacher_steps")
    seeds = range(args.seed, args.seed + (args.num_images or (64 if len(plan) == 1 else plan[0][0].columns)))
    prompts, rows = read_prompts(args.prompts), {}
    for model, scheduler, n in plan:
        w = 0.0 if scheduler == "lcm" else args.guidance_w
        options = {"w": w, "prompts": prompts, "batch_size": args.batch_size, "mixed_precision": args.mixed_precision}
        if out.suffix == ".png":
            name = f"{model.name}, {scheduler}, {n} step{'s' * (n > 1)}" + f", w = {w:g}" * bool(w)
            rows[name] = sample(model, seeds, n, scheduler, **options)
        else:
            folder = out if len(plan) == 1 else out / f"{Path(model.name).name}-{scheduler}-{n}"
            sample_to_folder(model, seeds, folder, n, scheduler, **options)
    if len(rows) == 1:
        model.picture(*rows.values(), columns=round(len(seeds) ** 0.5)).save(out)
    elif rows:
        model.overview(rows).save(out)
    print(out)


if __name__ == "__main__":
    main()
