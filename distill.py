"""Distil a diffusion model into a student of 1 to 4 steps with SPLAM: Algorithm 1 as a program.

    python distill.py                                         a minute on a laptop: 8 Gaussians in two dimensions
    python distill.py --pretrained_teacher_model runs/cifar10-teacher --data data/cifar10
    accelerate launch distill.py --preset sd15 --data 'laion/{00000..00999}.tar'

Read `Distillation.steps` first: it is the training loop, from top to bottom, with the lines of Algorithm 1 beside it.
What it calls stands in splam.py (the mathematics), teacher.py (the model) and training.py (batches, checkpoints, logs).

What the run leaves in --output_dir: the student as a pipeline folder that diffusers loads, overview.png (the teacher
and the student from the same noises), metrics.json (flags and the closing table), metrics.jsonl (loss, gradient
norm and learning rate of each step) and the last checkpoints.
"""

import argparse
import copy
import functools
import json
import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import Dataset

import splam
import training
from data import POINTS, program, read_prompts, refuse, writable_folder
from evaluate import Evaluation, compare, machine, network_seconds, print_comparison
from sample import n_steps, overview, picture, preview, sample
from splam import ConsistencyFunction, Draws, ema_update, splad_loss
from teacher import DiffusionModel, fit_or_load, save

log = logging.getLogger("distill")
STEPS = [1, 2, 4]  # in which a student is measured, as in the paper's tables

# ---------------------------------------------------------------------------------------------------------------------
# Recipes are command lines. The program reads, one after the other, the recipe of the teacher's kind, the presets that
# are named, and what was typed; a later value of a flag replaces an earlier one. What none of them mentions has the
# default of its flag.
# ---------------------------------------------------------------------------------------------------------------------

RECIPES = {
    # 2-D points: half a minute, after which one step is off by 4 % of the data's radius. A network this small takes a
    # large learning rate. A closing table costs seconds here, so there is one.
    "points": "--max_train_steps 2000 --train_batch_size 512 --learning_rate 1e-3 --num_eval_samples 4096",
    # Pixels: minutes of a laptop. So short a run gains from a rate that falls to 0. bf16 is faster where the processor
    # knows it. There is no closing table, since images are measured by a feature extractor: evaluate.py makes it.
    "images": "--max_train_steps 1200 --train_batch_size 64 --learning_rate 3e-4 --lr_scheduler cosine"
    " --mixed_precision bf16 --validation_steps 500",
    # Stable Diffusion: the paper's learning rate and number of steps, with a batch that fits one GPU. Four
    # processes decode images, since a GPU would wait for a single one.
    "text-to-image": "--max_train_steps 6000 --train_batch_size 16 --learning_rate 8e-6"
    f" --mixed_precision bf16 --validation_steps 500 --dataloader_num_workers {min(4, os.cpu_count() or 1)}",
}
# Section 5.1 of the paper, for both of its models. The batch of 1024 is 64 on each of 16 GPUs (with fewer, raise
# --gradient_accumulation_steps); no warm-up is mentioned.
PAPER = (
    " --gamma_conditioning embedding --solver_step 20 --ema_decay 0.95 --train_batch_size 64 --learning_rate 8e-6"
    " --lr_scheduler constant --lr_warmup_steps 0 --adam_weight_decay 0 --max_grad_norm 10"
)
PRESETS = {
    # w = 3 is the paper's for its FIDs; its pictures have w = 8. k = 100 are five solver steps.
    "sd15": "--pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5"
    " --k 100 --guidance_w 3 --metric huber --max_train_steps 6000" + PAPER,
    # k = 20 is a single solver step: no multiple estimation.
    "sd21-base": "--pretrained_teacher_model stabilityai/stable-diffusion-2-1-base"
    " --k 20 --guidance_w 8 --metric l2 --max_train_steps 80000" + PAPER,
    # Ours. A sub-path of k = 100 takes two calls of the teacher instead of five, and most are solved as well or better.
    # Half of the training is for γ = 1, where the student is used. toy/README.md has what each is worth.
    "improved": "--k 100 --solver dpmsolver++ --solver_step 100 --gamma_conditioning time --gamma_at_one 0.5",
}


def parser() -> training.Parser:
    """The flags of distill.py, with their defaults and the paper's values."""
    p = training.Parser(
        prog="distill.py",
        description="Distil a diffusion model into a few-step student with SPLAM.",
        usage="distill.py [flags]",
        epilog=training.recipes("Defaults by kind of teacher", RECIPES) + training.recipes("Presets", PRESETS),
        formatter_class=training.Help,
    )
    flag = p.add_argument_group("what to distil").add_argument
    teacher_help = "toy:<name>, ideal:<name>, or folder or hub id of a diffusers pipeline; paper: SD1.5, SD2.1-base"
    flag("--pretrained_teacher_model", default="toy:8gaussians", help=teacher_help)
    flag("--preset", nargs="+", action="extend", default=[], choices=PRESETS, help="recipes below; flags replace parts")
    training.add_data_arguments(p)
    flag = p.add_argument_group("method").add_argument
    flag("--ode", choices=splam.ODES, default="sl", help="the line: Eq. 12, Eq. 26, or none (γ = 1); paper: sl")
    # The longer the sub-paths, the fewer there are between noise and data, and each inherits through its target the
    # errors of all that lie between it and the data. Solved in five steps, those of k = 100 are accurate enough.
    flag("--k", type=training.positive, default=100, help="length of a sub-path in time steps; paper: 100, or 20")
    flag("--solver_step", type=training.positive, default=20, help="k_φ of multiple estimation, Eq. 18; paper: 20")
    # Ours: a single step of 100 costs less than half of DDIM's five of 20, and most sub-paths are solved as well or
    # better.
    solver_help = "of a sub-path; dpmsolver++ calls the teacher twice a step; paper: ddim"
    flag("--solver", choices=splam.SOLVERS, default="ddim", help=solver_help)
    # LCM's grid. Its spacing of 20 divides k = 100, so that sub-paths end at times where others start (or at 0).
    flag("--num_ddim_timesteps", type=training.positive, default=50, help="times where sub-paths start; paper: 50")
    w_help = "w in ε + w (ε - ε_∅): w = 8 is guidance_scale 9; paper: 3, or 8"
    flag("--guidance_w", type=training.finite, default=0.0, help=w_help)
    flag("--metric", choices=splam.METRICS, default="huber", help="d of Eq. 17; paper: huber for SD1.5, l2 for SD2.1")
    flag("--ema_decay", type=training.share, default=0.95, help="of the target network θ⁻; paper: 0.95")
    # Ours, and not the authors': in 2-D it makes half the error of their embedding (toy/README.md).
    gamma_help = "how the network learns γ: an embedding, or the time of equal noise; paper: embedding"
    flag("--gamma_conditioning", choices=splam.GAMMA_CONDITIONINGS, default="time", help=gamma_help)
    # Not both "exact" and "time": the time of equal noise is computed from σ_γ, and Eq. 24's σ_γ is not that of the
    # points that a solver makes (splam.py, section 2). toy/README.md has what each combination costs.
    sigma_help = "σ_γ below Eq. 15, or of Eq. 24, which makes a wrong t' of time conditioning; paper: approx"
    flag("--sigma", choices=splam.SIGMA_FORMS, default="approx", help=sigma_help)
    # Two options of this project. Measured in toy/README.md: the first did not help, the second did.
    flag("--gamma_draws", type=training.positive, default=1, help="γ for each solved sub-path; paper: 1")
    flag("--gamma_at_one", type=training.share, default=0.0, help="share of draws with γ = 1; paper: 0")
    training.add_arguments(p)
    # A short warm-up, while AdamW's second moments are still guesses; and the paper's clipping.
    p.set_defaults(lr_scheduler="constant_with_warmup", max_grad_norm=10.0)
    # For Stable Diffusion, whose weights, gradients and activations do not fit one GPU at a useful batch.
    flag = p.add_argument_group("large networks").add_argument
    flag("--lora_rank", type=training.count, default=0, help="train a LoRA of this rank instead of all weights")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--torch_compile", action="store_true", help="compile teacher, student and target")
    flag = p.add_argument_group("validation and speed").add_argument
    flag("--validation_steps", type=training.count, default=0, help="steps between sample grids; 0 for none")
    flag(
        "--num_eval_samples", type=training.count, default=0, help="samples a row of the closing table; 0 for no table"
    )
    flag("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    flag("--benchmark", action="store_true", help="time some steps instead: speed, memory, parts of a step")
    flag("--timed_steps", type=training.two_or_more, default=10, help="of --benchmark")
    return p


def with_presets(typed: Sequence[str]) -> list[str]:
    """What was typed, after the flags of the presets that are named in it."""
    presets = parser().parse_known_args(typed)[0].preset
    return [flag for preset in presets for flag in PRESETS[preset].split()] + list(typed)


def configure(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, DiffusionModel]:
    """The flags, read as the comment above RECIPES says, and the teacher, whose kind decides on the recipe."""
    p, given = parser(), with_presets(sys.argv[1:] if arguments is None else arguments)
    first = p.parse_args(given)  # a first look, for the teacher and what is needed to fit one
    check_flags(first)  # before a toy's teacher is fitted, or fitted anew
    name = first.pretrained_teacher_model
    # The default folder says what is distilled and how, so that different runs do not meet in one.
    short_name = name.partition(":")[2] if name.startswith(POINTS) else Path(name).name
    output_dir = first.output_dir or f"runs/{short_name}-{first.ode}"
    output_dir += "/benchmark" if first.benchmark else ""  # where nothing of a real run lies
    fit_flags = ["--seed", str(first.seed), "--mixed_precision", first.mixed_precision]
    fit_flags += ["--class_conditional"] if first.guidance_w else []  # to be guided, a toy's teacher needs labels
    own = Path(name).is_dir() and Path(name).resolve() == Path(output_dir).resolve()
    refuse(own, f"--output_dir {output_dir} is the teacher's own folder: the student would take its place")
    folder = writable_folder(output_dir)
    if training.process().is_main_process:  # first: --overwrite would fit a teacher anew that another run is using
        training.keep_others_out(folder.resolve())
    teacher = fit_or_load(name, folder / "teacher", fit_flags, first.overwrite)
    p.set_defaults(data=teacher.default_data)
    # The last look. argparse keeps the last value of a flag that comes twice, so what was typed has the last word.
    args = p.parse_args([*RECIPES[teacher.kind].split(), *given])
    args.output_dir = output_dir
    check(args, teacher)
    return args, teacher


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, whatever the teacher is."""
    # m = k / k_φ must be whole: a shorter last step would be a solver that no flag describes.
    refuse(args.k % args.solver_step, f"--k {args.k} is no multiple of --solver_step {args.solver_step}")
    idle = args.ode == "lcm" and (args.gamma_draws > 1 or args.gamma_at_one)
    refuse(idle, "--gamma_draws and --gamma_at_one are for --ode sl and dl: in LCM γ is always 1")
    # The table's MMD compares pairs of samples.
    refuse(args.num_eval_samples == 1, "--num_eval_samples must be 0, or 2 or more")
    if args.sigma == "exact" and args.gamma_conditioning == "time" and args.ode != "lcm":
        log.warning("--sigma exact and --gamma_conditioning time tell the network a wrong time: expect a poor student")


def check(args: argparse.Namespace, teacher: DiffusionModel) -> None:
    """Refuses what this teacher cannot do, before its student is trained."""
    times, network = len(teacher.schedule), teacher.network
    # With k = N-1 or more every sub-path would end at time 0, and the target would be the solver's own end: plain
    # regression, and no longer consistency training.
    refuse(args.k >= times - 1, f"--k must be smaller than {times - 1}, the teacher's last time")
    # The grid N-1, N-1-N/50, ... must consist of whole time steps, as that of diffusers' LCMScheduler does.
    refuse(times % args.num_ddim_timesteps, f"--num_ddim_timesteps must divide the teacher's {times} time steps")
    refuse(teacher.is_student, f"{teacher.name} is a student: --pretrained_teacher_model is to be what it came from")
    teacher.labels(read_prompts(args.prompts))  # refuses prompts that the model has no meaning for
    # Eq. 18 subtracts a prediction without condition. A teacher that was never trained to make one has none.
    unguided = args.guidance_w and not teacher.conditional
    refuse(unguided, "--guidance_w needs a conditional teacher: this one has no labels")
    refuse(args.data is None, "--data is missing: a folder of images, or images with captions")
    teacher.few_step_scheduler(args.num_ddim_timesteps)  # the student's, which diffusers may not have
    # Such a network has an embedding for each whole time, and t' lies between them.
    whole = network.config.get("time_embedding_type") == "learned" and args.gamma_conditioning == "time"
    refuse(whole, f"{teacher.name} has learned embeddings of whole times: it needs --gamma_conditioning embedding")
    without = args.gradient_checkpointing and not getattr(network, "_supports_gradient_checkpointing", False)
    refuse(without, f"--gradient_checkpointing: a {type(network).__name__} has none")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1, and where its lines are (the numbers are ours). Two defaults of this program are not the paper's: the
# student is told a time instead of γ, and the learning rate and batch are for small models. --preset sd15 has the
# paper's.
#
#     θ, θ⁻ <- the teacher's weights                                      Distillation.__init__
#     repeat                                                              Distillation.steps
#       1  draw (x_0, c) from the data, n, γ ~ U[0, 1], ε ~ N(0, I)       run.batches, splam.draw
#       2  encode x_0, if there is a VAE, and c                           DiffusionModel.prepare
#       3  x_t = α_t x_0 + σ_t ε, the start of the sub-path               splam.splad_loss, Eq. 1
#       4  x̂_s, its end, by m guided steps of the teacher's solver        splam.multiple_estimation, Eq. 18
#       5  x_γ on the line between them, and its noise σ_γ                splam.sub_path_point, Eq. 12
#       6  L = d( F_θ(x_γ, c, γ), F_θ⁻(x̂_s, c, 1) )                       splam.splad_loss, Eq. 16 and 17
#       7  θ <- θ - η ∇_θ L                                               accelerator.backward, optimizer.step
#       8  θ⁻ <- μ θ⁻ + (1 - μ) θ                                         splam.ema_update
#     the student is θ⁻ at γ = 1                                          Distillation.student
# ---------------------------------------------------------------------------------------------------------------------


class Distillation:
    """One run of Algorithm 1: the three networks, and the loop. The keyword arguments are for ablations.

    dataset   instead of the teacher's own for `args.data`
    draw      what is drawn for a step, called like splam.draw
    solver    what takes x_t to x_s, called like those of splam.SOLVERS
    embed     the embedding of γ, called like splam.gamma_embedding
    """

    def __init__(
        self,
        args: argparse.Namespace,
        teacher: DiffusionModel,
        dataset: Dataset | None = None,
        draw: Callable = splam.draw,
        solver: Callable | None = None,
        embed: Callable = splam.gamma_embedding,
    ):
        # θ <- the teacher's weights, in a trainable copy; with --lora_rank, only the LoRA on them is trainable.
        self.args, self.teacher, self.draw, self.solver = args, teacher, draw, solver or splam.SOLVERS[args.solver]
        # The random weights of a run are the γ-projection's, and a LoRA's, made on the next lines. With the seed set
        # here all processes make the same ones, and so does a repetition of the run.
        set_seed(args.seed)
        network = teacher.copy_network(args.lora_rank)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        conditioning = args.gamma_conditioning
        student = ConsistencyFunction(network, teacher.schedule, teacher.prediction_type, conditioning, embed)
        # θ⁻ begins as θ. It is copied before accelerate wraps the student for several processes: a wrapped copy would
        # take part in the gradient's communication.
        self.target = copy.deepcopy(student).eval().requires_grad_(False)
        # The teacher is never trained. So its weights may be kept in the precision in which it computes. The student's
        # may not: bf16 would round an AdamW step of 8e-6 away, for all but the smallest weights.
        teacher.to(training.process().device, training.DTYPES[args.mixed_precision])
        training.allow_tf32(args)  # before the data set is made, which may encode all images
        self.run = training.Run(args, student, dataset or teacher.dataset(args), {"target": self.target})
        # Compiled in place, so that names of weights and the modules around them stay what they are.
        if args.torch_compile:
            for module in (network, self.target.network, teacher.network):
                module.compile()

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Algorithm 1. Yields the number of each step and its loss, when student and target have been updated.

        A generator, so that three callers share one loop: `main` logs and saves between the steps, `benchmark` times
        them, and the laboratory in toy/ measures the student after some of them.
        """
        args, teacher, target, run = self.args, self.teacher, self.target, self.run
        accelerator, student, schedule, batches = run.accelerator, run.model, teacher.schedule, run.batches()
        shape, grid = (run.total_batch_size, *teacher.shape), (len(schedule), args.num_ddim_timesteps)
        method = {"k": args.k, "solver_step": args.solver_step, "solver": self.solver}
        method |= {"ode": args.ode, "sigma_form": args.sigma, "metric": args.metric}

        def draw_for(step: int) -> Draws:
            return self.draw(shape, *grid, run.generator(step), args.gamma_draws, args.gamma_at_one)

        # Line 1, n, γ and ε, for the batch of the whole step at once. All processes draw the same numbers, and each
        # keeps its own rows: so the run does not depend on how many processes share it. With a generator for each
        # process, one GPU and eight would be different runs.
        draws = draw_for(run.step + 1)
        for step in run.steps():
            losses = []
            for micro_step in range(args.gradient_accumulation_steps):
                x, label = next(batches)  # line 1, (x_0, c) as the data has them: pixels or points, classes or tokens
                rows = Draws(*run.rows(draws, micro_step))
                # accumulate: gradients add up over micro-batches, and processes exchange them at the last one only.
                with accelerator.accumulate(student):
                    # autocast: inside the networks, PyTorch runs matrix products and convolutions in
                    # --mixed_precision. The schedule, the line and the distance are other operations; they stay
                    # float32.
                    with accelerator.autocast():
                        x0, cond = teacher.prepare(x, label)  # line 2
                        # The teacher as the solver sees it: (x, t) -> (x_0, ε), told the condition, guided by w.
                        denoise = functools.partial(teacher.predict, cond=cond, w=args.guidance_w)
                        # Lines 3 to 6, one after the other, in splam.py.
                        loss = splad_loss(student, target, denoise, schedule, x0, cond, rows, **method)
                    # Line 7, ∇_θ L, outside autocast, as PyTorch asks for. accelerate divides by the number of
                    # micro-batches, so that their gradients add up to that of the mean. It is clipped when the last
                    # of them is in.
                    accelerator.backward(loss)
                    run.clip_gradients()
                    # Line 7, θ. Before the last micro-batch, accelerate lets these two lines do nothing.
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                losses.append(loss.detach())
            run.lr_scheduler.step()
            # Line 8, once a step. Every process averages for itself, since all hold the same θ (or, with FSDP, their
            # parts of it).
            ema_update(target, accelerator.unwrap_model(student), args.ema_decay)
            # Line 1 of the next step, here: a GPU is still computing what was asked for above, and the CPU is free. It
            # will wait as soon as the loss is read.
            draws = draw_for(step + 1)
            yield step, torch.stack(losses).mean()

    def student(self) -> DiffusionModel | None:
        """The few-step model as it is now: θ⁻, the *target's* weights, without the γ-projection. An average over the
        last steps samples better than the weights of any one of them.

        Every process must call this, since the weights may be spread over all of them; the main one gets the model.
        """
        weights = training.gathered(self.target.plain_state_dict())
        if not self.run.accelerator.is_main_process:
            return None
        student = self.teacher.student(weights, self.args.num_ddim_timesteps, self.args.lora_rank)
        return student.to(self.teacher.device)


@program
def main() -> None:
    """Trains, logs, saves and shows; or, with --benchmark, only times."""
    args, teacher = configure()
    if args.benchmark:
        benchmark(args, teacher)
        return
    # The student is measured at the end, but the measures are made now. If their data or their network are missing, the
    # program ends here, and not after hours of training.
    evaluation, prompts = None, read_prompts(args.prompts)
    if args.num_eval_samples and training.process().is_main_process:
        teacher.to(training.process().device)
        evaluation = Evaluation(teacher, args.data, args.num_eval_samples, prompts=prompts)
    distillation = Distillation(args, teacher)
    run = distillation.run
    # Every process must reach log, checkpoint and student, since they wait for each other inside. Only the main one
    # gets a student back, and so only that one samples.
    for step, loss in distillation.steps():
        run.log(step, loss)
        run.checkpoint(step)
        if args.validation_steps and step % args.validation_steps == 0:
            validate(step, distillation.student(), Path(args.output_dir) / "samples", prompts)
    if student := distillation.student():
        finish(args, teacher, student, evaluation, prompts)


def validate(step: int, student: DiffusionModel | None, folder: Path, prompts: list[str]) -> None:
    """A picture of the student as it is after this step. This is a function of its own so that the student's memory is
    free again when it returns; in `main` it would be kept until the next picture."""
    if student:
        samples = sample(student, range(preview(student)[0]), STEPS[-1], prompts=prompts)
        picture(samples, preview(student)[1]).save(writable_folder(folder) / f"step-{step}.png")


def finish(
    args: argparse.Namespace,
    teacher: DiffusionModel,
    student: DiffusionModel,
    evaluation: Evaluation | None,
    prompts: list[str],
) -> None:
    """Saves the student, the picture, and metrics.json; prints the table, if there is an evaluation to make one.

    The table compares the student in 1, 2 and 4 steps with the teacher by DDIM in as many, and in `many_steps`, which
    is what the student was distilled to do at once.
    """
    folder, many = Path(args.output_dir), teacher.many_steps
    save(student, folder)  # first: whatever happens below, the student is there
    metrics = {"configuration": {**vars(args), "pretrained_teacher_model": teacher.name}, "machine": machine()}
    record = folder / "metrics.json"
    # Also before the table, which may fail: a LoRA cannot be loaded without it. A repeated command keeps what it finds,
    # for that has the table's rows.
    if not record.is_file() or args.overwrite:
        record.write_text(json.dumps(metrics, indent=2))
    if evaluation:
        comparison = compare(evaluation, {"student": student}, STEPS, [*STEPS, many], args.guidance_w)
        print_comparison(comparison)
        samples = comparison.samples
        metrics |= {"rows": comparison.rows, "reference": comparison.reference}
    else:
        seeds = range(preview(teacher)[0])
        samples = {f"teacher, DDIM, {many} steps": sample(teacher, seeds, many, w=args.guidance_w, prompts=prompts)}
        samples |= {f"student, {n_steps(n)}": sample(student, seeds, n, prompts=prompts) for n in STEPS}
    overview(teacher, samples, args.k).save(folder / "overview.png")
    record.write_text(json.dumps(metrics, indent=2))
    print(f"{folder}/overview.png  {record}")


# ---------------------------------------------------------------------------------------------------------------------
# --benchmark: how fast is a step, and where does its time go?
#
# The yardstick is a cost model. A step is made of forward passes of the network (a backward pass counts as two), and a
# forward pass can be timed by itself. What the step takes beyond its passes is overhead: data, optimizer, Python.
# ---------------------------------------------------------------------------------------------------------------------

WARM_UP = 3  # steps that are not counted: memory is allocated, kernels are chosen


def forward_passes(args: argparse.Namespace) -> int:
    """The cost of one sample in a training step, in forward passes of the network: the teacher's, one or two for each
    of m solver steps, and twice if guided; one of the target; and of the student three for each γ, or four if it
    computes its activations twice."""
    teacher = args.k // args.solver_step * splam.SOLVER_CALLS[args.solver] * (2 if args.guidance_w else 1)
    return teacher + 1 + args.gamma_draws * (3 + args.gradient_checkpointing)


def now() -> float:
    """Seconds, at a moment when all that was asked of a GPU is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory() -> float:
    """GiB: of an accelerator if there is one, else of the process."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def watch(owner: object, method: str, part: str, seconds: Counter) -> None:
    """From now on, counts in `seconds[part]` what this method takes."""
    original = getattr(owner, method)  # bound to its owner; the attribute set below hides it there and nowhere else

    def timed(*args, **kwargs):
        begin = now()
        result = original(*args, **kwargs)
        seconds[part] += now() - begin
        return result

    setattr(owner, method, timed)


def benchmark(args: argparse.Namespace, teacher: DiffusionModel) -> None:
    """Times steps as they are, and then as many again with their parts, since each look at a GPU's clock makes it wait.
    Prints a report and leaves it in OUTPUT_DIR/benchmark."""
    args.max_train_steps = WARM_UP + 2 * args.timed_steps
    args.overwrite, args.resume_from_checkpoint = True, None  # of an earlier benchmark there is nothing to keep
    distillation = Distillation(args, teacher)
    run, steps, seconds, parts = distillation.run, distillation.steps(), [], Counter()
    for i in range(args.max_train_steps):
        # Halfway, stopwatches are put on the parts. What is left over is data, random numbers, EMA and the log.
        if i == WARM_UP + args.timed_steps:
            watch(teacher, "prepare", "VAE and text", parts)
            watch(teacher, "predict", "teacher", parts)
            watch(distillation.target, "forward", "target", parts)
            watch(run.model, "forward", "student", parts)
            watch(run.accelerator, "backward", "student", parts)
            watch(run.accelerator, "clip_grad_norm_", "optimizer", parts)
            watch(run.optimizer, "step", "optimizer", parts)
        begin = now()
        run.log(*next(steps))  # as main does it; to read the loss is to wait for the step's end
        seconds.append(now() - begin)
    timed, watched = seconds[WARM_UP:][: args.timed_steps], seconds[WARM_UP + args.timed_steps :]
    whole, split, deviation = statistics.mean(timed), statistics.mean(watched), statistics.stdev(timed)
    parts = {part: total / args.timed_steps for part, total in parts.items()}
    parts["data, EMA and others"] = split - sum(parts.values())
    passes, forward = forward_passes(args), network_seconds(teacher, args.train_batch_size, args.mixed_precision)
    model = passes * forward * args.gradient_accumulation_steps  # what the passes alone would take
    speed, memory = run.total_batch_size / whole, peak_memory()
    report = {"images/s": speed, "seconds a step": whole, "standard deviation": deviation, "parts": parts}
    report |= {"peak memory, GiB": memory, "forward passes": passes, "seconds a forward pass": forward}
    report |= {"ratio to the cost model": whole / model, "machine": machine(), "flags": vars(args)}
    if not run.accelerator.is_main_process:
        return
    (run.folder / "benchmark.json").write_text(json.dumps(report, indent=2))
    step = f"{whole:.4g} ± {deviation:.2g} s a step of {run.total_batch_size}"
    print(f"{speed:.4g} images/s, {step}; peak memory {memory:.3g} GiB; {machine()}")
    for part, value in parts.items():
        print(f"{part:22} {value:8.4f} s  {100 * value / split:3.0f} %")
    print(f"cost model: {passes} forward passes of {forward:.4g} s = {model:.4g} s; ratio {whole / model:.3f}")


if __name__ == "__main__":
    main()
