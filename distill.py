"""Distil a teacher into a student of 1 to 4 steps with SPLAM: Algorithm 1 as a program.

python distill.py                                           two minutes on a laptop: 8 Gaussians
python distill.py --pretrained_teacher_model runs/cifar-teacher --data data/cifar10 --output_dir runs/cifar-student
accelerate launch distill.py ...                            the same on many GPUs
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

import training
from comparison import compare, machine, print_table
from data import BadInput, program, read_prompts, writable_folder
from kinds import Teacher
from sample import sample
from splam import ConsistencyFunction, Draws, draw, ema_update, splad_loss
from teacher import KINDS, fit_or_load, save_pipeline

STEPS = [1, 2, 4]
COMMON = {  # to both recipes of the paper; the batch of 1024 is 64 on each of 16 GPUs
    "solver_step": 20,
    "learning_rate": 8e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 10.0,
    "ema_decay": 0.95,
    "train_batch_size": 64,
    "gamma_conditioning": "embedding",
}
PRESETS = {
    "sd15": {
        "pretrained_teacher_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "k": 100,
        "guidance_w": 3.0,
        "metric": "huber",
        "max_train_steps": 6000,
        **COMMON,
    },
    "sd21-base": {
        "pretrained_teacher_model": "stabilityai/stable-diffusion-2-1-base",
        "k": 20,
        "guidance_w": 8.0,
        "metric": "l2",
        "max_train_steps": 80000,
        **COMMON,
    },
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="distill.py",
        description="Distil a diffusion model into a few-step student with SPLAM.",
        usage="distill.py [flags]",
        epilog=training.recipe_text("Defaults by kind of teacher", {k.__name__: k.recipe for k in KINDS.values()})
        + training.recipe_text("\nPresets, of which a flag that is given replaces its part", PRESETS),
        formatter_class=training.Help,
    )
    p.add_argument(
        "--pretrained_teacher_model",
        default="toy:8gaussians",
        help="toy:<name>, ideal:<name>, or folder or hub id of a diffusers pipeline; paper: SD1.5, SD2.1-base",
    )
    p.add_argument("--preset", choices=PRESETS, help="a recipe of the paper, printed below")
    training.add_data_arguments(p)
    group = p.add_argument_group("method")
    group.add_argument("--ode", choices=["sl", "dl", "lcm"], default="sl", help="Eq. 12, Eq. 26, or γ = 1; paper: sl")
    group.add_argument(
        "--sigma",
        choices=["approx", "exact"],
        default="approx",
        help="σ_γ of ends that share one noise, below Eq. 15, or of a Markov chain, Eq. 24; paper: approx",
    )
    group.add_argument(
        "--metric", choices=["l2", "huber"], default="huber", help="d of Eq. 17; paper: huber for SD1.5, l2 for SD2.1"
    )
    group.add_argument("--k", type=int, default=100, help="length of a sub-path in time steps; paper: 100, or 20")
    group.add_argument("--solver_step", type=int, default=20, help="k_φ of multiple estimation, Eq. 18; paper: 20")
    group.add_argument(
        "--num_ddim_timesteps", type=int, default=50, help="evenly spaced times where sub-paths start; paper: 50"
    )
    group.add_argument(
        "--guidance_w", type=float, default=0.0, help="w in ε + w (ε - ε_∅): w = 8 is guidance_scale 9; paper: 3, or 8"
    )
    group.add_argument("--ema_decay", type=float, default=0.95, help="of the target network θ⁻; paper: 0.95")
    group.add_argument(
        "--gamma_conditioning",
        choices=["embedding", "time"],
        default="time",
        help="the network is told γ, or the time with the same noise-to-signal ratio; paper: embedding",
    )
    group.add_argument(
        "--gamma_draws", type=int, default=1, help="γ for each solved sub-path, sharing the teacher's cost; paper: 1"
    )
    group.add_argument(
        "--gamma_at_one", type=float, default=0.0, help="share of draws with γ = 1, where sampling is; paper: 0"
    )
    group = p.add_argument_group("large networks")
    group.add_argument("--lora_rank", type=int, default=0, help="train a LoRA of this rank instead of all weights")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--torch_compile", action="store_true", help="compile teacher, student and target")
    training.add_arguments(p)
    group = p.add_argument_group("validation")
    group.add_argument("--validation_steps", type=int, help="steps between sample grids; 0 for none")
    group.add_argument("--num_eval_samples", type=int, help="samples a row of the closing table; 0 for no table")
    group.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    return p


def check(args: argparse.Namespace, teacher: Teacher) -> None:
    num_train_timesteps = len(teacher.schedule)
    training.check_positive(args, "k", "solver_step", "num_ddim_timesteps", "gamma_draws")
    if args.k % args.solver_step:
        raise BadInput(f"--k {args.k} is no multiple of --solver_step {args.solver_step}")
    if args.k >= num_train_timesteps:
        raise BadInput(f"--k must be smaller than the teacher's {num_train_timesteps} time steps")
    if num_train_timesteps % args.num_ddim_timesteps:
        raise BadInput(f"--num_ddim_timesteps must divide the teacher's {num_train_timesteps} time steps")
    if not 0 <= args.gamma_at_one < 1:
        raise BadInput(f"--gamma_at_one must be in [0, 1), not {args.gamma_at_one}; --ode lcm has γ = 1 alone")
    if args.ode == "lcm" and (args.gamma_draws > 1 or args.gamma_at_one):
        raise BadInput("--gamma_draws and --gamma_at_one are for --ode sl and dl: in LCM γ is always 1")
    if not 0 <= args.ema_decay < 1:
        raise BadInput(f"--ema_decay must be in [0, 1), not {args.ema_decay}")
    if args.guidance_w and not teacher.conditional:
        raise BadInput("--guidance_w needs a conditional teacher: this one has no labels")
    if args.data is None:
        raise BadInput("--data is missing: a folder of images, or images with captions")
    if args.num_eval_samples:
        teacher.reference(args.data, "train", None)  # or the closing table would fail, at the end
    if args.gradient_checkpointing and not getattr(teacher.network, "_supports_gradient_checkpointing", False):
        raise BadInput(f"--gradient_checkpointing: a {type(teacher.network).__name__} has none")


def forward_passes(args: argparse.Namespace) -> int:
    """The cost of one sample in a training step, in forward passes of the network, of which forward and backward
    together are three: teacher, target, student."""
    teacher = args.k // args.solver_step * (2 if args.guidance_w else 1)
    return teacher + 1 + args.gamma_draws * (3 + args.gradient_checkpointing)


class Distillation:
    """One run of Algorithm 1: its networks, data and optimizer. `python evaluate.py throughput` times its steps."""

    def __init__(self, args: argparse.Namespace, teacher: Teacher):
        self.args, self.teacher = args, teacher
        set_seed(args.seed)  # of the γ-projection's weights, before they are made
        network = teacher.copy_network(args.lora_rank)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        student = ConsistencyFunction(network, teacher.schedule, teacher.prediction_type, args.gamma_conditioning)
        self.target = copy.deepcopy(student).eval().requires_grad_(False)
        teacher.to(training.process().device, training.DTYPES[args.mixed_precision])
        self.run = training.Run(args, student, teacher.dataset(args), {"target": self.target})
        if args.torch_compile:
            for module in (network, self.target.network, teacher.network):
                module.compile()

    def loss(self, data: Tensor, label: Tensor, draws: Draws) -> Tensor:
        args, teacher = self.args, self.teacher
        with self.run.accelerator.autocast():
            x0, cond = teacher.prepare(data, label)
            return splad_loss(
                self.run.model,
                self.target,
                lambda x, t: teacher.predict(x, t, cond, args.guidance_w),
                teacher.schedule,
                x0,
                cond,
                draws,
                k=args.k,
                solver_step=args.solver_step,
                ode=args.ode,
                sigma=args.sigma,
                metric=args.metric,
            )

    def step(self, step: int, batches: Iterator) -> float:
        """The optimizer's step number `step`, and the target's; returns the loss."""
        run, teacher = self.run, self.teacher
        args, shape = self.args, (run.total_batch_size, *teacher.shape)
        times = len(teacher.schedule), args.num_ddim_timesteps
        draws = draw(shape, *times, run.generator(step), args.gamma_draws, args.gamma_at_one)
        pairs = zip(batches, run.split(draws), strict=True)
        loss = run.optimize(self.loss(*batch, Draws(*rows)) for batch, rows in pairs)
        ema_update(self.target, run.accelerator.unwrap_model(run.model), self.args.ema_decay)
        return loss

    def student(self) -> Teacher | None:
        """The few-step model as it is now: the target's weights at γ = 1. Every process calls, the main one gets it."""
        weights = training.gathered(self.target.plain_state_dict())
        if not self.run.accelerator.is_main_process:
            return None
        return self.teacher.student(weights, self.args.num_ddim_timesteps, self.args.lora_rank)


def configure(p: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Teacher]:
    """The flags, whose defaults are the preset's and the teacher's kind's, and the teacher."""
    first, _ = p.parse_known_args(arguments)
    preset = PRESETS.get(first.preset, {})
    p.set_defaults(**preset)
    first, _ = p.parse_known_args(arguments)
    teacher = fit_or_load(
        first.pretrained_teacher_model,
        writable_folder(first.output_dir) / "teacher",
        first.seed,
        first.mixed_precision,
        class_conditional=first.guidance_w != 0,
    )
    p.set_defaults(**{"data": teacher.default_data, **teacher.recipe, **preset})
    args = p.parse_args(arguments)
    check(args, teacher)
    return args, teacher


@program
def main() -> None:
    args, teacher = configure(parser())
    folder, prompts = Path(args.output_dir), read_prompts(args.prompts)
    distillation = Distillation(args, teacher)
    run = distillation.run
    for step, batches in run:
        run.log(step, loss=distillation.step(step, batches))
        run.checkpoint(step)
        if args.validation_steps and step % args.validation_steps == 0 and (student := distillation.student()):
            student.to(run.accelerator.device)
            grid = teacher.picture(sample(student, range(teacher.pictured), 4, prompts=prompts))
            grid.save(writable_folder(folder / "samples") / f"step-{step}.png")
    if student := distillation.student():
        finish(args, teacher, student, folder)


def finish(args: argparse.Namespace, teacher: Teacher, student: Teacher, folder: Path) -> None:
    """Saves the student, the picture, and metrics.json; prints the table."""
    save_pipeline(student.pipeline, folder)
    student.to(teacher.network.device)
    prompts = read_prompts(args.prompts)
    metrics = {"configuration": {**vars(args), "pretrained_teacher_model": teacher.name}, "machine": machine()}
    many = max(teacher.evaluation["teacher_steps"])
    if args.num_eval_samples:
        comparison = compare(
            {"student": student},
            teacher,
            args.data,
            steps=STEPS,
            teacher_steps=teacher.evaluation["teacher_steps"],
            num_samples=args.num_eval_samples,
            w=args.guidance_w,
            prompts=prompts,
        )
        print_table(comparison)
        samples = comparison.samples
        metrics |= {"rows": comparison.rows, "reference": comparison.reference}
    else:
        seeds = range(teacher.pictured)
        samples = {f"teacher, DDIM, {many} steps": sample(teacher, seeds, many, w=args.guidance_w, prompts=prompts)}
        samples |= {f"student, {n} step{'s' * (n > 1)}": sample(student, seeds, n, prompts=prompts) for n in STEPS}
    teacher.overview(samples, args.k).save(folder / "overview.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"{folder}/overview.png  {folder}/metrics.json")


if __name__ == "__main__":
    main()
