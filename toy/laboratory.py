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
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from data import POINTS, BadInput, writable_folder
from evaluate import Evaluation, machine, print_rows
from sample import SeededNoise, n_steps, overview, preview, sample
from splam import multiple_estimation
from teacher import DiffusionModel

STEPS = [1, 2, 4]
WORK = Path("runs/laboratory")  # teachers that are fitted here, and what an interrupted script has already measured
ROOT = Path(__file__).parents[1]
# All that a student's numbers depend on, beside its flags and the functions that its script brings along.
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "toy" / name for name in ("laboratory.py", "mlp.py", "distributions.py"))]


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
    """An evaluation that also knows where the teacher's PF-ODE ends, `endpoint`, for each of its noises."""

    def __init__(self, model: DiffusionModel, data: str, w: float, num_samples: int, features: str, precision: str):
        model.to(training.process().device)
        super().__init__(model, data, num_samples, features=features, mixed_precision=precision)
        labels, ends, self.w = model.labels([]), [], w
        self.noise = SeededNoise(model.shape, self.seeds, torch.device("cpu"))()
        self.labels = labels[torch.tensor(self.seeds) % len(labels)]
        for noise, label in zip(self.noise.split(model.batch_size), self.labels.split(model.batch_size), strict=True):
            with training.autocast(model.device, precision):
                cond = model.condition(label.to(model.device))
                ends.append(model.decode(pf_ode_end(model, noise.to(model.device), cond, w)).cpu())
        self.endpoint = torch.cat(ends)

    def sample(self, student: DiffusionModel, steps: int, count: int | None = None) -> Tensor:
        """From the bench's noises, or the first of them."""
        return sample(student, self.seeds[:count], steps, mixed_precision=self.mixed_precision)

    def distances(self, samples: Tensor) -> dict[str, float]:
        """To the data."""
        self.update(samples)
        return self.results()


def quality(bench: Bench, student: DiffusionModel) -> dict[str, float]:
    """How far a student's map, from noise to data, is from the PF-ODE's; and how far its samples are from the data."""
    samples = {n: bench.sample(student, n) for n in STEPS}
    errors = (samples[1] - bench.endpoint).flatten(1).norm(dim=1)
    values = {"map error": errors.mean().item(), "map error, 95 %": errors.quantile(0.95).item()}
    for n, x in samples.items():
        values |= {f"{name}, {n_steps(n)}": value for name, value in bench.distances(x).items()}
    return values


Measure = Callable[[Bench, DiffusionModel], dict]


# ---------------------------------------------------------------------------------------------------------------------
# Training students. Jobs are plain data, and what runs them are plain functions, since both go to other processes.
# ---------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One student."""

    name: str
    variant: Variant
    flags: list[str]  # of distill.py
    teacher: list[str]  # of teacher.py, or none for a teacher that exists
    at: list[int]  # steps after which it is measured
    measure: Measure
    num_samples: int
    features: str
    save_samples: bool


def key(*parts: object) -> str:
    """A file name for what is made from these parts, functions, and the sources of both.

    An edited function so never meets a result of the old one. Functions count by the files in which they stand.
    """
    files = set(SOURCES)

    def describe(part: object) -> str:
        files.add(Path(sys.modules[part.__module__].__file__))
        return part.__qualname__

    text = json.dumps(parts, default=describe)
    sources = "".join(file.read_text() for file in sorted(files))
    return hashlib.sha1((text + sources).encode()).hexdigest()[:12]


def teacher_key(job: Job) -> str:
    return key(job.teacher, job.variant.network, job.variant.dataset)


def fit_teacher(job: Job) -> str:
    """The name of the job's teacher. One of 2-D points is fitted first, if that is not done yet."""
    torch.set_num_threads(1)
    if not job.teacher:
        return distill.parser().parse_args(job.flags).pretrained_teacher_model
    folder = WORK / f"teacher-{teacher_key(job)}"
    if not (folder / "model_index.json").is_file():
        args = teacher.parse([*job.teacher, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
        model = teacher.new_model(args, **job.variant.network)
        with contextlib.redirect_stderr(io.StringIO()):  # one progress bar for all is enough
            teacher.train(args, model, job.variant.dataset(args.data) if job.variant.dataset else model.dataset(args))
    return str(folder)


@functools.lru_cache(maxsize=8)
def bench(name: str, *options) -> Bench:
    return Bench(teacher.load(name), *options)


def prepare(job: Job) -> tuple[argparse.Namespace, DiffusionModel, Bench]:
    """Flags, teacher and bench."""
    name = fit_teacher(job)
    args, model = distill.configure([*job.flags, "--pretrained_teacher_model", name])
    return args, model, bench(name, args.data, args.guidance_w, job.num_samples, job.features, args.mixed_precision)


def distil(job: Job) -> list[dict]:
    """The student's rows, one for each time it is measured."""
    with contextlib.redirect_stderr(io.StringIO()):
        args, model, place = prepare(job)
        dataset = job.variant.dataset(args.data) if job.variant.dataset else None
        distillation, rows = distill.Distillation(args, model, dataset, **job.variant.parts), []
        for step, _ in distillation.steps():
            if step in job.at:
                student, evaluations = distillation.student(), step * distill.forward_passes(args)
                row = {"variant": job.name, "seed": args.seed, "step": step, "evaluations": evaluations}
                rows.append({**row, **job.measure(place, student)})
        if job.save_samples:
            rows[-1]["samples"] = place.sample(student, 1, preview(model)[0]).tolist()
    return rows


def run_jobs(function: Callable[[Job], object], jobs: list[Job], processes: int) -> Iterator[tuple[Job, object]]:
    """Jobs and what the function made of them, in their order. To stop iterating cancels those not yet begun."""
    if processes == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    # "spawn": a forked process would inherit the threads of torch, which then wait for each other forever.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from zip(jobs, pool.map(function, jobs), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# A script
# ---------------------------------------------------------------------------------------------------------------------


class Findings(NamedTuple):
    """What was measured: rows by variant, in the order of seeds and times; what real data and the PF-ODE's ends have;
    and all flags of distill.py for the first student."""

    rows: dict[str, list[dict]]
    references: dict[str, dict[str, float]]
    configuration: dict[str, object]

    def columns(self) -> list[str]:
        """Those with one number a row."""
        first = next(iter(self.rows.values()))[0]
        return [column for column, value in first.items() if isinstance(value, float)]

    def of(self, variant: str, column: str) -> Tensor:
        """(seeds, times) or, where a row holds a list, (seeds, times, length)."""
        by_seed: dict[int, list] = {}
        for row in self.rows[variant]:
            by_seed.setdefault(row["seed"], []).append(row[column])
        return torch.tensor(list(by_seed.values()))

    def last(self, variant: str, column: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds, at the end of training."""
        values = self.of(variant, column)[:, -1]
        return values.mean().item(), values.std().item()

    def curves(self, column: str, x: str | list) -> dict[str, tuple]:
        """Lines of a plots.Panel, one for each variant: over another column's values, or over the list `x`."""
        lines = {}
        for name in self.rows:
            values = self.of(name, column)
            values = values[:, -1] if values.ndim == 3 else values
            lines[name] = (self.of(name, x)[0] if isinstance(x, str) else x, values.mean(0), values.std(0))
        return lines

    def ends(self, variants: dict[str, dict[float, str]], column: str) -> dict[str, tuple]:
        """Lines of a plots.Panel through the ends of variants, {line: {x: variant}}; those left out are skipped."""
        lines = {}
        for line, points in variants.items():
            if ends := {x: self.last(variant, column) for x, variant in points.items() if variant in self.rows}:
                lines[line] = (list(ends), *zip(*ends.values(), strict=True))
        return lines


class Laboratory:
    """One script: its flags, its students, and the table, picture and record that it ends with."""

    def __init__(self, script: str, doc: str, questions: Iterable[str] = (), **defaults):
        name = Path(script).stem
        p = training.Parser(
            prog=f"python -m toy.{name}", description=doc.splitlines()[2], formatter_class=training.Help
        )
        p.epilog = "All other flags are distill.py's, for all students."
        if questions:
            p.add_argument("question", choices=list(questions), help="which of the tables")
        p.add_argument("--pretrained_teacher_model", default="ideal:8gaussians", help="as of distill.py")
        p.add_argument("--seeds", type=training.two_or_more, default=5, help="students of each kind")
        p.add_argument(
            "--budget", type=training.positive, default=9000, help="network evaluations of a student, in batches"
        )
        p.add_argument("--num_samples", type=training.positive, default=1024, help="by which a student is measured")
        p.add_argument("--features", default="inception", help="of images, as of evaluate.py")
        p.add_argument("--only", nargs="+", help="some of the students, by their names in the table")
        p.add_argument(
            "--processes", type=training.positive, help="students at a time (default: one a core, one on a GPU)"
        )
        p.add_argument("--save_samples", action="store_true", help="also a picture of one step of the first students")
        p.add_argument("--quick", action="store_true", help="a few steps: shows that all works, and nothing else")
        p.add_argument("--out", help="without suffix (default: toy/results/ and the script's name)")
        p.set_defaults(**defaults)
        args, given = p.parse_known_args()
        points = args.pretrained_teacher_model.startswith(POINTS)
        self.flags = ["--train_batch_size", "128"] if points else []
        self.flags += ["--pretrained_teacher_model", args.pretrained_teacher_model, *given]
        if args.quick:
            args.seeds, args.budget, args.num_samples, args.processes = 2, 50, 64, 1
            self.flags += ["--train_batch_size", "16", "--lr_warmup_steps", "0"]
        args.processes = args.processes or (1 if torch.accelerator.is_available() else min(8, os.cpu_count() or 1))
        name += f"_{args.question}" if questions else ""
        self.args, self.out = args, Path(args.out or f"{WORK / 'quick' if args.quick else 'toy/results'}/{name}")
        writable_folder(self.out.parent)
        writable_folder(WORK)

    def job(self, name: str, variant: Variant, seed: int, measure: Measure, at: Iterable[float]) -> Job:
        """A student that is measured `at` these parts of its training, whose length the budget decides."""
        args = self.args
        flags = [*self.flags, *shlex.split(variant.flags), "--seed", str(seed), "--output_dir", str(WORK)]
        parsed = distill.parser().parse_args(flags)
        steps = parsed.max_train_steps or max(1, args.budget // distill.forward_passes(parsed))
        flags += ["--max_train_steps", str(steps)]
        fitted = []
        if parsed.pretrained_teacher_model.startswith(POINTS):
            quick = "--max_train_steps 30 --train_batch_size 32" if args.quick else ""
            fitted = ["--data", parsed.pretrained_teacher_model, "--seed", str(seed)]
            fitted += shlex.split(f"{quick} {variant.teacher}")
        times, save = sorted({max(1, round(steps * part)) for part in at}), args.save_samples and seed == 0
        return Job(name, variant, flags, fitted, times, measure, args.num_samples, args.features, save)

    def bench(self) -> Bench:
        """That of the first seed, where no variant changes the teacher."""
        return prepare(self.job("", Variant(), 0, quality, ()))[2]

    def report(
        self,
        variants: dict[str, Variant],
        picture: Callable[[Findings], Image.Image],
        measure: Measure = quality,
        at: Iterable[float] = (1,),
    ) -> None:
        """The whole script. What an interrupted call has measured lies in WORK, and is forgotten when all is
        written."""
        args = self.args
        if unknown := set(args.only or ()) - set(variants):
            raise BadInput(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(variants)}")
        names = [name for name in variants if name in (args.only or variants)]
        jobs = [self.job(name, variants[name], seed, measure, at) for name in names for seed in range(args.seeds)]
        records = {WORK / f"{key(job)}.json": job for job in jobs}
        teachers = {teacher_key(job): job for job in jobs if job.teacher}
        fitting = run_jobs(fit_teacher, list(teachers.values()), args.processes)
        list(tqdm(fitting, desc="teachers", total=len(teachers), leave=False))
        missing = [job for path, job in records.items() if not path.is_file()]
        trained = run_jobs(distil, missing, args.processes)
        progress = {"total": len(jobs), "initial": len(jobs) - len(missing), "leave": False}
        for job, rows in tqdm(trained, desc="students", **progress):
            draft = WORK / f"{key(job)}.tmp"
            draft.write_text(json.dumps(rows))
            draft.rename(draft.with_suffix(".json"))
        rows = {name: [] for name in names}
        for path, job in records.items():
            rows[job.name] += json.loads(path.read_text())
        configuration, _, place = prepare(jobs[0])
        references = {"held-out data": place.held_out_data(), "teacher, PF-ODE": place.distances(place.endpoint)}
        findings = Findings(rows, references, vars(configuration))
        self._write(findings, picture(findings), {name: variants[name].flags for name in names})
        for path in records:
            path.unlink()

    def _write(self, found: Findings, picture: Image.Image, flags: dict[str, str]) -> None:
        """Prints the table, and writes it beside the picture and the rows."""
        summary = {name: {column: found.last(name, column) for column in found.columns()} for name in found.rows}
        lines = []
        for name, values in summary.items():
            cells = {column: f"{mean:.3g} ± {deviation:.2g}" for column, (mean, deviation) in values.items()}
            lines.append({"student": name, "steps": found.rows[name][-1]["step"], **cells})
        print_rows(lines)
        for name, values in found.references.items():
            print(f"{name}: {', '.join(f'{column} {value:.4g}' for column, value in values.items())}")
        picture.save(f"{self.out}.png")
        lasts = {name: rows[len(rows) // self.args.seeds - 1] for name, rows in found.rows.items()}  # of the first seed
        if samples := {name: torch.tensor(row.pop("samples")) for name, row in lasts.items() if "samples" in row}:
            place = self.bench()
            panels = {"teacher, PF-ODE": place.endpoint[: preview(place.model)[0]], **samples}
            overview(place.model, panels).save(f"{self.out}-samples.png")
        threads = f"{self.args.processes} times one CPU thread"
        record = {"machine": machine() if torch.accelerator.is_available() else threads, "flags": vars(self.args)}
        record |= {"all students": shlex.join(self.flags), "students": flags, "first student": found.configuration}
        record |= {"references": found.references, "summary": summary, "rows": found.rows}
        Path(f"{self.out}.json").write_text(json.dumps(record, indent=1))
        print(f"{self.out}.png  {self.out}.json")
