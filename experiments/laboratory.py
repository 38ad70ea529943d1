"""How experiments are done: students trained at equal cost over several seeds, measured, and recorded.

A student's training is a command line of distill.py, so whatever is compared here is what that program does. Each is
trained in one thread, so that its numbers depend neither on the machine's cores nor on what else it does.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import distill
import teacher
import training
from cli import writable_folder
from data import POINTS
from evaluate import STEPS, Evaluation, print_rows, provenance
from experiments.bench import forward_passes
from sample import n_steps, slug
from teacher import DiffusionModel
from toy import plots

WORK = Path("runs/experiments")
# Columns of a row: what a run's log has; and what every student is measured by, where "1 step" stands for the distances
# of samples of one step, whatever they are called.
TRAINING, QUALITY = ["loss", "gradient norm"], ["map error", "1 step", "2 steps", "4 steps"]

# ---------------------------------------------------------------------------------------------------------------------
# Measuring a student
# ---------------------------------------------------------------------------------------------------------------------


class Bench(Evaluation):
    """An evaluation that also knows where the teacher's PF-ODE (Eq. 3), guided by w, ends for each of its noises:
    `endpoint`, (num_samples, ...). That is the map that is to be distilled, as far as DDIM in `many_steps` knows it."""

    def __init__(self, model: DiffusionModel, data: str, num_samples: int, w: float, **options):
        super().__init__(model.to(training.process().device), data, num_samples, **options)
        self.w = w  # of the teacher
        self.endpoint, distances = self.sampler(model, model.many_steps, w, None)
        self.references = {"held-out data": self.held_out_data(), "teacher, PF-ODE": distances}


@functools.lru_cache(maxsize=8)
def bench_of(name: str, *arguments, **options) -> Bench:
    """A teacher's bench, made once in each process: its reference and endpoints take longer than a student."""
    return Bench(teacher.load(name), *arguments, **options)


def quality(place: Bench, student: DiffusionModel) -> dict[str, float]:
    """How far a student's map, from noise to data, is from the PF-ODE's; and how far its samples are from the data."""
    values = {}
    for n in STEPS:
        samples, distances = place.sampler(student, n, 0.0, None)
        # With more steps fresh noise goes in between: the first one does not decide the sample, and there is no map.
        if n == 1:
            values["map error"] = (samples - place.endpoint).flatten(1).norm(dim=1).mean().item()
        values |= {f"{name}, {n_steps(n)}": value for name, value in distances.items()}
    return values


# ---------------------------------------------------------------------------------------------------------------------
# What was found
# ---------------------------------------------------------------------------------------------------------------------


class Findings(NamedTuple):
    """The rows of each student, by variant and seed."""

    rows: dict[str, list[list[dict]]]

    def of(self, variant: str, column: str) -> Tensor:
        """(seeds, times) or, where a row holds a list, (seeds, times, length)."""
        return torch.tensor([[row[column] for row in rows] for rows in self.rows[variant]])

    def summary(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By variant and column, mean and standard deviation over the seeds at the end of training."""
        summary = {}
        for name, ((*_, last), *_) in self.rows.items():
            ends = {column: self.of(name, column)[:, -1] for column, x in last.items() if isinstance(x, float)}
            summary[name] = {column: (x.mean().item(), x.std().item()) for column, x in ends.items()}
        return summary

    def columns(self, endings: Sequence[str]) -> list[str]:
        """The columns that end so."""
        first = next(iter(self.rows.values()))[0][0]
        return [column for ending in endings for column in first if column.endswith(ending)]

    def lines(self, column: str, x: str) -> dict[str, tuple]:
        """Lines of a plots.Panel over x. Either x is a column too, and each variant has a line; or variants are named
        "line, x = 20", and lines go through their ends."""
        lines, summary = {}, self.summary()
        for name in self.rows:
            line, _, value = name.rpartition(f", {x} = ")
            if line:
                lines.setdefault(line, []).append((float(value), *summary[name][column]))
                continue
            xs, ys = self.of(name, x), self.of(name, column)
            if ys.ndim == 3:  # lists are drawn as they are at the end of training
                xs, ys = xs[:, -1], ys[:, -1]
            lines[name] = zip(xs[0].tolist(), ys.mean(0).tolist(), ys.std(0).tolist(), strict=True)
        return {name: tuple(zip(*sorted(points), strict=True)) for name, points in lines.items()}

    def curves(self, over: dict[str, Sequence[str]], **style) -> Image.Image:
        """A panel for each of these columns, over each x."""
        asked = [(column, x) for x, endings in over.items() for column in self.columns(endings)]
        return plots.curves(*(plots.Panel(column, x, "", self.lines(column, x), **style) for column, x in asked))

    def dots(self) -> Image.Image:
        """A panel for each column of QUALITY, with a line for each variant."""
        return plots.dots(self.summary(), self.columns(QUALITY))


# ---------------------------------------------------------------------------------------------------------------------
# Training students. Jobs are plain data, and what runs them are plain functions, since both go to other processes.
# ---------------------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """One kind of student: flags, and what an ablation puts in the place of a part."""

    flags: str = ""  # of distill.py
    teacher: str = ""  # of teacher.py, for a teacher that is fitted here
    parts: dict[str, Callable] = {}  # of distill.Distillation: draw, solver, student
    network: dict[str, int] = {}  # of the toy's PointMLP, for the teacher and so for its students
    claims: str = ""  # what the fitted teacher's config says that it predicts, wrongly


class Experiment(NamedTuple):
    """Students to compare, and how."""

    variants: dict[str, Variant]
    picture: Callable[[Findings], Image.Image] = Findings.dots
    measure: Callable[[Bench, DiffusionModel], dict] = quality  # -> the columns of a row
    at: Sequence[float] = (1,)  # the parts of its training after which a student is measured
    defaults: dict = {}  # of the flags


class Job(NamedTuple):
    """One student: all that a process must be told to train and to measure it."""

    experiment: Experiment
    name: str  # of its variant
    flags: list[str]  # of distill.py
    fit: list[str]  # of teacher.py, or none for a teacher that exists
    args: argparse.Namespace  # the experiment's flags
    file: Path  # where the result is written, and found after an interruption


def fit_teacher(job: Job) -> None:
    """Fits the job's teacher, or finds it fitted."""
    variant, args = job.experiment.variants[job.name], teacher.parse([*job.fit, "--resume_from_checkpoint", "latest"])
    with contextlib.redirect_stderr(io.StringIO()):  # one progress bar for all is enough
        model = teacher.new_model(args, **variant.network)
        teacher.train(args, model, model.dataset(args))
    if variant.claims:  # as if weights had been converted with a wrong config
        model.scheduler.register_to_config(prediction_type=variant.claims)
        teacher.save(model, Path(args.output_dir))


def distil(job: Job) -> None:
    """Trains a student, or finds it trained. The result has a row for each time that it is measured."""
    if job.file.is_file():
        return
    begin, rows, since = time.perf_counter(), [], []
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        args, model = distill.configure([*job.flags, "--output_dir", folder])
        # Students of different k are compared at equal cost: a longer sub-path means fewer steps.
        args.max_train_steps = max(1, job.args.budget // forward_passes(args))
        against = job.args.reference_data or args.data, job.args.num_samples, args.guidance_w
        options = {"features": job.args.features, "mixed_precision": args.mixed_precision}
        place = bench_of(args.pretrained_teacher_model, *against, **options)
        distillation = distill.Distillation(args, model, **job.experiment.variants[job.name].parts)
        times = [max(1, round(args.max_train_steps * part)) for part in job.experiment.at]
        for step, loss in distillation.steps():
            since.append((loss.item(), distillation.run.norm.item()))
            if step in times:
                row = {"step": step, "evaluations": step * forward_passes(args)}
                row |= dict(zip(TRAINING, torch.tensor(since).mean(0).tolist(), strict=True))  # since the last row
                rows.append(row | job.experiment.measure(place, distillation.student()))
                since.clear()
    minutes = (time.perf_counter() - begin) / 60
    draft = job.file.with_suffix(".tmp")  # renamed when it is complete
    draft.write_text(json.dumps({"rows": rows, "references": place.references, "minutes": minutes}))
    draft.rename(job.file)


def run_jobs(function: Callable[[Job], None], jobs: list[Job], processes: int, what: str) -> None:
    """Calls the function with each job."""
    bar = functools.partial(tqdm, desc=what, total=len(jobs), leave=False)
    if processes == 1:
        list(bar(map(function, jobs)))
        return
    # "spawn": a forked process would inherit the threads of torch, which then wait for each other forever.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        list(bar(pool.map(function, jobs)))  # an error, or Ctrl-C, cancels those that have not begun


# ---------------------------------------------------------------------------------------------------------------------
# An experiment
# ---------------------------------------------------------------------------------------------------------------------


def jobs_of(experiment: Experiment, args: argparse.Namespace, others: list[str], work: Path) -> list[Job]:
    """All students. Where a flag comes twice the later counts, which is the variant's."""
    # Of points a hundred students are compared, where distill.py's default makes one: so the batches are small.
    common, jobs = ["--pretrained_teacher_model", args.pretrained_teacher_model, *others], []
    if args.pretrained_teacher_model.startswith(POINTS):
        common = ["--train_batch_size", "128", *common]
    if args.quick:
        common += ["--train_batch_size", "16", "--lr_warmup_steps", "0"]
    for name in args.only or experiment.variants:
        variant = experiment.variants[name]
        for seed in map(str, range(args.seeds)):
            flags, fit = [*common, *variant.flags.split(), "--seed", seed], []
            source = distill.parser().parse_args(flags).pretrained_teacher_model
            if source.startswith(POINTS):  # each seed has a teacher of its own, with other starting weights and data
                quick = "--max_train_steps 30 --train_batch_size 32 --lr_warmup_steps 0" if args.quick else ""
                fit = ["--data", source, "--seed", seed, *quick.split(), *variant.teacher.split()]
                # Students whose teachers are made alike share one.
                source = str(work / slug(f"{fit} {variant.network} {variant.claims}"))
                fit += ["--output_dir", source]
            flags += ["--pretrained_teacher_model", source]
            jobs.append(Job(experiment, name, flags, fit, args, work / f"{slug(name)}-{seed}.json"))
    return jobs


def perform(experiment: Experiment, args: argparse.Namespace, others: list[str]) -> None:
    """Trains and measures the students, prints, draws and writes.

    What an interrupted call has finished lies in a folder of its own: on images, an experiment takes hours. The same
    command at the same commit goes on from it, and removes it when all is written.
    """
    # Students are small: two processes with a thread each do more than one with two.
    torch.set_num_threads(1)
    origin = {"command": f"python -m experiments {shlex.join(sys.argv[1:])}", **provenance()}
    digest = hashlib.sha1(json.dumps(origin).encode()).hexdigest()
    work = WORK / f"{args.name}-{digest[:12]}"
    if origin["commit"].endswith("-dirty"):  # code that was not committed may have been other code
        shutil.rmtree(work, ignore_errors=True)
    writable_folder(work)
    jobs = jobs_of(experiment, args, others, work)
    teachers = {job.fit[-1]: job for job in jobs if job.fit}  # first: two processes must not both fit the same
    run_jobs(fit_teacher, list(teachers.values()), args.processes, "teachers")
    run_jobs(distil, jobs, args.processes, "students")
    rows, results = {job.name: [] for job in jobs}, [json.loads(job.file.read_text()) for job in jobs]
    for job, result in zip(jobs, results, strict=True):
        rows[job.name].append(result["rows"])
    found, table = Findings(rows), []
    for name, values in found.summary().items():
        cells = {c: f"{mean:.3g} ± {deviation:.2g}" for c, (mean, deviation) in values.items() if c not in TRAINING}
        table.append({"student": name, "steps": rows[name][0][-1]["step"], **cells})
    print_rows(table)
    experiment.picture(found).save(f"{args.out}.png")
    record = {**origin, "minutes": sum(result["minutes"] for result in results), "flags": vars(args)}
    record |= {"students": {name: experiment.variants[name].flags for name in rows}}
    record |= {"references": results[0]["references"], "summary": found.summary(), "rows": rows}
    Path(f"{args.out}.json").write_text(json.dumps(record, indent=1))
    print(f"{results[0]['references']}\n{args.out}.png  {args.out}.json")
    shutil.rmtree(work)
