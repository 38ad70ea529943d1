"""What the scripts of this folder share: students distilled at equal cost over several seeds, measured, and recorded.

A variant is a command line of distill.py, so whatever is compared here is what that program does. Each student is
trained in one thread, so that its numbers depend neither on the machine's cores nor on what else it does.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import distill
import teacher
import training
from data import POINTS, refuse, writable_folder
from evaluate import Evaluation, machine, print_rows
from sample import SeededNoise, n_steps, overview, preview, sample
from splam import multiple_estimation
from teacher import DiffusionModel

STEPS = [1, 2, 4]
ETAS = [0.0, 0.5, 1.0]  # shares of fresh noise between them
TRAINING = ("loss", "gradient norm")  # columns that a row has beside what was measured
WORK = Path("runs/laboratory")  # teachers that are fitted here, and what an interrupted script has already measured
ROOT = Path(__file__).parents[1]
# All that a student's numbers depend on, beside its flags and the functions that its script brings along.
TOY = ("laboratory.py", "mlp.py", "distributions.py", "features.py")
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "toy" / name for name in TOY)]


class Variant(NamedTuple):
    """A row of a table, told apart from the others by flags, or by what an ablation puts in the place of a part."""

    flags: str = ""  # of distill.py
    teacher: str = ""  # of teacher.py, for a teacher that is fitted here
    parts: dict[str, Callable] = {}  # keyword arguments of distill.Distillation: draw, solver, embed
    network: dict[str, int] = {}  # those of the toy's PointMLP, for the teacher and so for its students
    dataset: Callable[[str], Dataset] | None = None  # in the place of data.Points, for both


# ---------------------------------------------------------------------------------------------------------------------
# Measuring a student
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pf_ode_end(model: DiffusionModel, noise: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> Tensor:
    """Where the PF-ODE (Eq. 3, guided by w) takes the noise of time N-1, (B, ...): the map that is to be distilled.

    Of an ideal teacher by scipy's solver, of others as far as their DDIM in `many_steps` steps knows.
    """
    last = len(model.schedule) - 1
    t = torch.full((len(noise),), last, device=noise.device)
    zero = torch.zeros_like(t)
    if getattr(model, "ideal", False):
        return model.mixture.endpoint(noise, *model.schedule.at(t[:1], 2), cond.get("class_labels"), w)
    denoise = functools.partial(model.predict, cond=cond, w=w)
    x = multiple_estimation(denoise, model.schedule, noise, t, zero, last, len(model.schedule) // model.many_steps)
    return denoise(x, zero)[0]


class Bench(Evaluation):
    """An evaluation that also knows where the teacher's PF-ODE, guided by w, ends for each of its noises: `endpoint`,
    (num_samples, ...). The map error is the distance to these ends."""

    def __init__(self, model: DiffusionModel, data: str, num_samples: int, w: float, **options):
        super().__init__(model.to(training.process().device), data, num_samples, **options)
        # The noise and label of each seed are those that `sample` gives a student.
        labels, ends, self.w = model.labels([]), [], w
        self.noise = SeededNoise(model.shape, self.seeds, torch.device("cpu"))()
        self.labels = labels[torch.tensor(self.seeds) % len(labels)]
        for noise, label in zip(self.noise.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            with training.autocast(model.device, self.mixed_precision):
                cond = model.condition(label.to(model.device))
                ends.append(model.decode(pf_ode_end(model, noise.to(model.device), cond, w)).cpu())
        self.endpoint = torch.cat(ends)

    def sample(self, student: DiffusionModel, steps: int, count: int | None = None, **options) -> Tensor:
        """A student's samples from these noises, or from the first `count` of them. `options` are those of `sample`."""
        return sample(student, self.seeds[:count], steps, mixed_precision=self.mixed_precision, **options)

    def distances(self, samples: Tensor) -> dict[str, float]:
        """From the samples to the data: W2 and MMD of points, the Fréchet distance of images, and how many of them show
        what their prompts name."""
        self.update(samples, [self.asked[seed % len(self.asked)] for seed in self.seeds if self.asked])
        return self.results()

    def errors(self, samples: Tensor) -> Tensor:
        """From each sample to where the PF-ODE ends from the same noise, (num_samples,)."""
        return (samples - self.endpoint).flatten(1).norm(dim=1)


def quality(bench: Bench, student: DiffusionModel) -> dict[str, float]:
    """How far a student's map, from noise to data, is from the PF-ODE's; and how far its samples are from the data.

    Both also with less fresh noise between steps, or none. Then a student of several steps is such a map too.
    """
    samples = {n: bench.sample(student, n) for n in STEPS}
    errors = bench.errors(samples[1])
    values = {"map error": errors.mean().item(), "map error, 95 %": errors.quantile(0.95).item()}
    for n, x in samples.items():
        values |= {f"{name}, {n_steps(n)}": value for name, value in bench.distances(x).items()}
    for n in STEPS[1:]:
        for eta in ETAS[:-1]:
            values |= less_noise(bench, bench.sample(student, n, eta=eta), n_steps(n), eta)
    return values


def less_noise(bench: Bench, samples: Tensor, name: str, eta: float) -> dict[str, float]:
    """The distances of samples that were made with a share `eta` of fresh noise; and the map error, if there was none:
    otherwise the first noise does not decide the sample, and there is no map. (A perfect student has a map error in
    several steps too: splam.py, section 5.)"""
    values = {f"{n}, {name}, η = {eta:g}": value for n, value in bench.distances(samples).items() if n != "MMD"}
    return values if eta else values | {f"map error, {name}, η = 0": bench.errors(samples).mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Training students. Jobs are plain data, and what runs them are plain functions, since both go to other processes.
# ---------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One student: all that a process must be told to train and to measure it."""

    name: str
    variant: Variant
    flags: list[str]  # of distill.py
    teacher: list[str]  # of teacher.py, or none for a teacher that exists
    at: list[int]  # steps after which it is measured
    measure: Callable[[Bench, DiffusionModel], dict]  # -> the columns of a row
    num_samples: int
    features: str
    reference: str | None  # what samples are measured against; without one, --data
    save_samples: bool


def key(*parts: object) -> str:
    """A file name for what is made from these parts and the project's SOURCES.

    So a result that other code made has another name, and is not found again by mistake. A function among the parts
    counts by its name and the text of the file that it stands in, for a script's own file is none of SOURCES.
    """

    def describe(function: Callable) -> list[str]:
        return [function.__qualname__, Path(sys.modules[function.__module__].__file__).read_text()]

    sources = [file.read_text() for file in sorted(SOURCES)]
    return hashlib.sha1(json.dumps([parts, sources], default=describe).encode()).hexdigest()[:12]


def teacher_key(job: Job) -> str:
    """Jobs with the same one share a teacher."""
    return key(job.teacher, job.variant.network, job.variant.dataset)


def fit_teacher(job: Job) -> str:
    """The name of the job's teacher. One of 2-D points is fitted first, if that is not done yet."""
    torch.set_num_threads(1)
    if not job.teacher:
        return distill.parser().parse_args(job.flags).pretrained_teacher_model
    folder, dataset = WORK / f"teacher-{teacher_key(job)}", job.variant.dataset
    if not (folder / "model_index.json").is_file():  # it is written last
        args = teacher.parse([*job.teacher, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
        model = teacher.new_model(args, **job.variant.network)
        with contextlib.redirect_stderr(io.StringIO()):  # one progress bar for all is enough
            teacher.train(args, model, dataset(args.data) if dataset else model.dataset(args))
    return str(folder)


@functools.lru_cache(maxsize=8)
def bench(name: str, *arguments, **options) -> Bench:
    """A teacher's bench, made once in each process: its reference features and endpoints take longer than a student."""
    return Bench(teacher.load(name), *arguments, **options)


def prepare(job: Job) -> tuple[argparse.Namespace, DiffusionModel, Bench]:
    """The job's flags as distill.py reads them, its teacher and its bench."""
    name = fit_teacher(job)  # in a script it is there by now, and only found
    # A folder for each student, since no two runs may write to the same one.
    where = ["--pretrained_teacher_model", name, "--output_dir", str(WORK / key(job))]
    args, model = distill.configure([*job.flags, *where])
    options = {"features": job.features, "mixed_precision": args.mixed_precision}
    return args, model, bench(name, job.reference or args.data, job.num_samples, args.guidance_w, **options)


def distil(job: Job) -> list[dict]:
    """Trains a student. The result is its rows, one for each time that it is measured."""
    rows = []
    with contextlib.redirect_stderr(io.StringIO()):
        args, model, place = prepare(job)
        dataset = job.variant.dataset(args.data) if job.variant.dataset else None
        distillation = distill.Distillation(args, model, dataset, **job.variant.parts)
        since = []  # loss and gradient norm of each step since the last measurement
        for step, loss in distillation.steps():
            since.append(torch.stack([loss, distillation.run.norm]))
            if step in job.at:
                student, evaluations = distillation.student(), step * distill.forward_passes(args)
                row = {"variant": job.name, "seed": args.seed, "step": step, "evaluations": evaluations}
                rows.append({**row, **job.measure(place, student)})
                rows[-1] |= dict(zip(TRAINING, torch.stack(since).mean(0).tolist(), strict=True))
                since.clear()
        if job.save_samples:
            rows[-1]["samples"] = place.sample(student, 1, preview(model)[0]).tolist()
    return rows


def run_jobs(function: Callable[[Job], object], jobs: list[Job], processes: int) -> Iterator[tuple[int, object]]:
    """The place of a job in the list and what the function made of it, as they are done. To stop iterating cancels
    those not yet begun."""
    if processes == 1:
        yield from ((i, function(job)) for i, job in enumerate(jobs))
        return
    # "spawn": a forked process would inherit the threads of torch, which then wait for each other forever.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {pool.submit(function, job): i for i, job in enumerate(jobs)}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# A script
# ---------------------------------------------------------------------------------------------------------------------


class Findings(NamedTuple):
    """What a script has measured, for its picture: rows by variant, in the order of seeds and then of steps; and the
    first student's bench, which is everybody's where no variant changes the teacher."""

    rows: dict[str, list[dict]]
    bench: Bench

    def columns(self) -> list[str]:
        """Those with one measured number a row. Others hold lists, or whole numbers that say which row it is."""
        first = next(iter(self.rows.values()))[0]
        return [column for column, value in first.items() if isinstance(value, float) and column not in TRAINING]

    def of(self, variant: str, column: str) -> Tensor:
        """(seeds, times) or, where a row holds a list, (seeds, times, length)."""
        rows = self.rows[variant]
        return torch.tensor([row[column] for row in rows]).unflatten(0, (rows[-1]["seed"] + 1, -1))

    def last(self, variant: str, column: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds, at the end of training."""
        values = self.of(variant, column)[:, -1]
        return values.mean().item(), values.std().item()

    def summary(self) -> dict[str, dict[str, tuple[float, float]]]:
        """`last` by variant and column, as plots.dots takes it."""
        return {name: {column: self.last(name, column) for column in self.columns()} for name in self.rows}

    def curves(self, column: str, x: str | list) -> dict[str, tuple]:
        """Lines of a plots.Panel, one for each variant: over another column's values, or over the list `x`."""
        lines = {}
        for name in self.rows:
            values = self.of(name, column)
            values = values[:, -1] if values.ndim == 3 else values  # lists are drawn as they are at the end of training
            lines[name] = (self.of(name, x)[0] if isinstance(x, str) else x, values.mean(0), values.std(0))
        return lines

    def ends(self, variants: dict[str, dict[float, str]], column: str) -> dict[str, tuple]:
        """Lines of a plots.Panel through the ends of variants, {line: {x: variant}}; those that --only left out are
        skipped."""
        lines = {}
        for line, points in variants.items():
            if ends := {x: self.last(variant, column) for x, variant in points.items() if variant in self.rows}:
                lines[line] = (list(ends), *zip(*ends.values(), strict=True))
        return lines


class Laboratory:
    """One script: its flags, its students, and the table, picture and record that it ends with.

    `doc` is the script's docstring, `defaults` are those of its flags. A script with several tables names them in
    `questions`, and one of them is then its argument.
    """

    def __init__(self, script: str, doc: str, questions: Iterable[str] = (), **defaults):
        name, about = Path(script).stem, doc.splitlines()[2]  # the docstring's first line is the command
        p = training.Parser(prog=f"python -m toy.{name}", description=about, formatter_class=training.Help)
        p.epilog, flag = "All other flags are distill.py's, for all students.", p.add_argument
        if questions:
            flag("question", choices=list(questions), help="which of the tables")
        flag("--pretrained_teacher_model", default="ideal:8gaussians", help="as of distill.py")
        flag("--seeds", type=training.two_or_more, default=5, help="students of each kind")
        flag("--budget", type=training.positive, default=9000, help="network evaluations of a student, in batches")
        flag("--num_samples", type=training.positive, default=1024, help="by which a student is measured")
        flag("--features", default="inception", help="of images, as of evaluate.py")
        flag("--reference_data", help="images to measure against, if --data are images with captions")
        flag("--only", nargs="+", help="some of the students, by their names in the table")
        flag("--processes", type=training.positive, help="students at a time (default: one a core, one on a GPU)")
        flag("--save_samples", action="store_true", help="also a picture of one step of the first students")
        flag("--quick", action="store_true", help="a few steps: shows that all works, and nothing else")
        flag("--out", help="without suffix (default: toy/results/ and the script's name)")
        p.set_defaults(**defaults)
        self.args, others = p.parse_known_args()
        args = self.args
        # The flags of all students. Where one comes twice the later counts: first defaults, then what was typed.
        points = args.pretrained_teacher_model.startswith(POINTS)
        self.flags = ["--train_batch_size", "128"] if points else []
        self.flags += ["--pretrained_teacher_model", args.pretrained_teacher_model, *others]
        if args.quick:
            args.seeds, args.budget, args.num_samples, args.processes = 2, 50, 64, 1
            self.flags += ["--train_batch_size", "16", "--lr_warmup_steps", "0"]
        # More processes than eight would need much memory, and on a GPU they would only wait for each other.
        args.processes = args.processes or (1 if torch.accelerator.is_available() else min(8, os.cpu_count() or 1))
        name += f"_{args.question}" if questions else ""
        self.out = Path(args.out or f"{WORK / 'quick' if args.quick else 'toy/results'}/{name}")
        writable_folder(self.out.parent)
        writable_folder(WORK)

    def job(self, name: str, variant: Variant, seed: int, measure: Callable, at: Iterable[float]) -> Job:
        """A student that is measured `at` these parts of its training, whose length the budget decides."""
        args = self.args
        flags = [*self.flags, *variant.flags.split(), "--seed", str(seed)]
        parsed = distill.parser().parse_args(distill.with_presets(flags))
        steps = parsed.max_train_steps or max(1, args.budget // distill.forward_passes(parsed))
        flags += ["--max_train_steps", str(steps)]
        data, fitted = parsed.pretrained_teacher_model, []
        if data.startswith(POINTS):  # each seed has a teacher of its own, with other starting weights and data
            quick = "--max_train_steps 30 --train_batch_size 32" if args.quick else ""
            fitted = ["--data", data, "--seed", str(seed), *quick.split(), *variant.teacher.split()]
        times, save = sorted({max(1, round(steps * part)) for part in at}), args.save_samples and seed == 0
        against = (args.num_samples, args.features, args.reference_data)
        return Job(name, variant, flags, fitted, times, measure, *against, save)

    def report(
        self, variants: dict[str, Variant], picture: Callable[[Findings], Image.Image], measure=quality, at=(1,)
    ) -> None:
        """The whole script: trains the students, `measure`s them `at` these parts of their training, draws and writes.

        What an interrupted call has measured lies in WORK, and is forgotten when all is written.
        """
        args = self.args
        unknown = sorted(set(args.only or ()) - set(variants))
        refuse(unknown, f"--only: {', '.join(unknown)} is none of {', '.join(variants)}")
        names = [name for name in variants if name in (args.only or variants)]
        jobs = [self.job(name, variants[name], seed, measure, at) for name in names for seed in range(args.seeds)]
        # Teachers first: two processes that need the same one must not both fit it.
        teachers = {teacher_key(job): job for job in jobs if job.teacher}
        fitting = run_jobs(fit_teacher, list(teachers.values()), args.processes)
        list(tqdm(fitting, "teachers", len(teachers), leave=False))
        records = {WORK / f"{key(job)}.json": job for job in jobs}
        missing = [path for path in records if not path.is_file()]
        trained = run_jobs(distil, [records[path] for path in missing], args.processes)
        progress = tqdm(trained, "students", len(jobs), leave=False, initial=len(jobs) - len(missing))
        for i, rows in progress:
            draft = missing[i].with_suffix(".tmp")  # renamed when complete: whatever is called .json is whole
            draft.write_text(json.dumps(rows))
            draft.rename(missing[i])
        rows = {name: [] for name in names}
        for path, job in records.items():
            rows[job.name] += json.loads(path.read_text())
        first, _, place = prepare(jobs[0])
        found, flags = Findings(rows, place), {name: variants[name].flags for name in names}
        self._write(found, picture(found), {"students": flags, "first student": vars(first)})
        for path in records:
            path.unlink()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # where its student was trained

    def _write(self, found: Findings, picture: Image.Image, students: dict[str, dict]) -> None:
        """Prints the table, and writes it beside the picture and the rows. `students` are parts of the record."""
        place, summary, table = found.bench, found.summary(), []
        references = {"held-out data": place.held_out_data(), "teacher, PF-ODE": place.distances(place.endpoint)}
        for name, values in summary.items():
            cells = {column: f"{mean:.3g} ± {deviation:.2g}" for column, (mean, deviation) in values.items()}
            table.append({"student": name, "steps": found.rows[name][-1]["step"], **cells})
        print_rows(table)
        for name, values in references.items():
            print(f"{name}: {', '.join(f'{column} {value:.4g}' for column, value in values.items())}")
        picture.save(f"{self.out}.png")
        # Samples are drawn and not recorded. Only the first seed's last row has them, and only with --save_samples.
        kept = {name: row for name, rows in found.rows.items() for row in rows if "samples" in row}
        if samples := {name: torch.tensor(row.pop("samples")) for name, row in kept.items()}:
            panels = {"teacher, PF-ODE": place.endpoint[: preview(place.model)[0]], **samples}
            overview(place.model, panels).save(f"{self.out}-samples.png")
        threads = f"{self.args.processes} times one CPU thread"
        record = {"machine": machine() if torch.accelerator.is_available() else threads, "flags": vars(self.args)}
        record |= {"all students": shlex.join(self.flags), **students, "references": references}
        record |= {"summary": summary, "rows": found.rows}
        Path(f"{self.out}.json").write_text(json.dumps(record, indent=1))
        print(f"{self.out}.png  {self.out}.json")
