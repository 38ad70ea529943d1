"""What the scripts of this folder share: students distilled at equal cost over several seeds, measured, and recorded.

A variant is a command line of distill.py, so whatever is compared here is what that program does. Each student is
trained in one thread, so that its numbers depend neither on the cores of the machine nor on what else it does.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import distill
import training
from comparison import machine, print_rows, results, spread, update
from data import BadInput, writable_folder
from kinds import Teacher
from metrics import Measure
from sample import SeededNoise, sample
from teacher import fit, load, parse
from toy.points import POINTS

STEPS = [1, 2, 4]
WORK = Path("runs/laboratory")  # teachers that are fitted here, and what an interrupted script has already measured


class Variant(NamedTuple):
    """A row of a table: flags of distill.py; flags of teacher.py, for a teacher that is fitted here; and what an
    ablation changes in the code, as {"splam.gamma_embedding": replacement}."""

    flags: str = ""
    teacher: str = ""
    changes: dict[str, object] = {}


class Bench:
    """A teacher, and all that its students are measured by."""

    def __init__(self, teacher: Teacher, data: str, w: float, num_samples: int, features: str, mixed_precision: str):
        self.teacher, self.data, self.w, self.mixed_precision = teacher, data, w, mixed_precision
        self.device = training.process().device
        teacher.to(self.device)
        self.seeds, batch = range(num_samples), teacher.evaluation["batch_size"]
        self.noise = SeededNoise(teacher.shape, self.seeds, torch.device("cpu"))()
        labels = teacher.labels([])
        self.labels = labels[torch.tensor(self.seeds) % len(labels)]
        self.reference = teacher.reference(data, "train", None)
        self.measures: list[Measure] = teacher.measures(self.reference, features, None)
        parts = zip(self.noise.split(batch), self.labels.split(batch), strict=True)
        self.endpoint = torch.cat([self._endpoint(*part) for part in parts])

    @torch.no_grad()
    def _endpoint(self, noise: Tensor, label: Tensor) -> Tensor:
        with training.autocast(self.device, self.mixed_precision):
            cond = self.teacher.condition(label.to(self.device))
            return self.teacher.decode(self.teacher.endpoint(noise.to(self.device), cond, self.w)).cpu()

    def sample(self, student: Teacher, steps: int, count: int | None = None) -> Tensor:
        """From the bench's noises, or the first of them."""
        return sample(student, self.seeds[:count], steps, mixed_precision=self.mixed_precision)

    def distances(self, samples: Tensor) -> dict[str, float]:
        """To the data."""
        update(self.measures, self.teacher.measured(samples, None), [])
        return results(self.measures)

    def references(self) -> dict[str, dict[str, float]]:
        """The floor, which is the distance of data to data; and the teacher at the end of its PF-ODE."""
        held_out = self.teacher.reference(self.data, "test", None)
        for part in spread(len(held_out), len(self.seeds)).split(250):
            update(self.measures, held_out[part], [])
        return {"held-out data": results(self.measures), "teacher, PF-ODE": self.distances(self.endpoint)}


def quality(bench: Bench, student: Teacher) -> dict[str, float]:
    """How far a student's map, from noise to data, is from the PF-ODE's; and how far its samples are from the data."""
    samples = {n: bench.sample(student, n) for n in STEPS}
    errors = (samples[1] - bench.endpoint).flatten(1).norm(dim=1)
    values = {"map error": errors.mean().item(), "map error, 95 %": errors.quantile(0.95).item()}
    for n, x in samples.items():
        values |= {f"{name}, {n} step{'s' * (n > 1)}": value for name, value in bench.distances(x).items()}
    return values


Measured = Callable[[Bench, Teacher], dict]


class Job(NamedTuple):
    """One student, in a form that goes to another process."""

    variant: str
    flags: list[str]  # of distill.py
    teacher: list[str]  # flags of teacher.py, or none for a teacher that exists
    changes: dict[str, object]
    at: list[int]  # steps after which it is measured
    measure: Measured
    num_samples: int
    features: str
    save_samples: bool

    @property
    def teacher_changes(self) -> dict[str, object]:
        """Those of network and data, which are the teacher's as well."""
        return {name: replacement for name, replacement in self.changes.items() if name.startswith("toy.points.")}


def silent(*arguments, **options) -> tqdm:
    """No bar: one for all students is enough."""
    return tqdm(*arguments, **{**options, "disable": True})


@contextlib.contextmanager
def changed(changes: dict[str, object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, replacement in {"training.tqdm": silent, **changes}.items():
            stack.enter_context(patch(name, replacement))
        yield


def digest(*parts: object) -> str:
    """A name for what is made from these parts; functions are known by theirs."""
    text = json.dumps(parts, default=lambda part: getattr(part, "__qualname__", repr(part)))
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def fit_teacher(job: Job) -> str:
    """The name of the job's teacher; where that is of 2-D points, the folder in which it is fitted now, if it is not
    there yet."""
    torch.set_num_threads(1)
    if not job.teacher:
        return distill.parser().parse_args(job.flags).pretrained_teacher_model
    folder = WORK / f"teacher-{digest(job.teacher, job.teacher_changes)}"
    if not (folder / "model_index.json").is_file():
        with changed(job.teacher_changes):
            fit(parse([*job.teacher, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]))
    return str(folder)


@functools.lru_cache(maxsize=8)
def bench(teacher: str, data: str, w: float, num_samples: int, features: str, mixed_precision: str) -> Bench:
    return Bench(load(teacher), data, w, num_samples, features, mixed_precision)


def prepare(job: Job) -> tuple[argparse.Namespace, Teacher, Bench]:
    """Flags, teacher and bench, of the code as it is."""
    name = fit_teacher(job)
    args, teacher = distill.configure(distill.parser(), [*job.flags, "--pretrained_teacher_model", name])
    return args, teacher, bench(name, args.data, args.guidance_w, job.num_samples, job.features, args.mixed_precision)


def distil(job: Job) -> list[dict]:
    """The student's rows, one for each time it is measured."""
    args, teacher, place = prepare(job)
    with changed(job.changes):
        distillation, rows, calls = distill.Distillation(args, teacher), [], distill.forward_passes(args)
        for step, batches in distillation.run:
            distillation.step(step, batches)
            if step in job.at:
                student = distillation.student().to(place.device)
                row = {"variant": job.variant, "seed": args.seed, "step": step, "evaluations": step * calls}
                rows.append({**row, **job.measure(place, student)})
        if job.save_samples:
            rows[-1]["samples"] = place.sample(student, 1, teacher.pictured).tolist()
    return rows


def each(function: Callable, jobs: list[Job], processes: int) -> Iterator[tuple[Job, object]]:
    """Jobs and what the function made of them, as they are done."""
    if processes == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Findings(NamedTuple):
    """What was measured: rows by variant, in the order of seeds and times; references; each variant's flags, and all
    flags of distill.py for the first student."""

    rows: dict[str, list[dict]]
    references: dict[str, dict[str, float]]
    flags: dict[str, str]
    configuration: dict[str, object]

    def columns(self) -> list[str]:
        """Those of one number a row."""
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

    def lines(self, variants: dict[str, dict[float, str]], column: str) -> dict[str, tuple]:
        """Lines of a plots.Panel through the ends of variants, {line: {x: variant}}; those left out are skipped."""
        found = {}
        for line, points in variants.items():
            if ends := {x: self.last(variant, column) for x, variant in points.items() if variant in self.rows}:
                found[line] = (list(ends), *zip(*ends.values(), strict=True))
        return found


class Laboratory:
    """One script: its flags, its students, and the table, picture and record that it ends with."""

    def __init__(self, script: str, doc: str, **defaults):
        name = Path(script).stem
        p = argparse.ArgumentParser(
            prog=f"python -m toy.{name}",
            description=doc.splitlines()[0],
            epilog="All other flags are distill.py's, for all students.",
            formatter_class=training.Help,
        )
        p.add_argument("--pretrained_teacher_model", default="ideal:8gaussians", help="as of distill.py")
        p.add_argument("--seeds", type=int, default=5, help="students of each kind")
        p.add_argument("--budget", type=int, default=9000, help="network evaluations of a student, in whole batches")
        p.add_argument("--num_samples", type=int, default=1024, help="by which a student is measured")
        p.add_argument("--features", default="inception", help="of images, as of evaluate.py")
        p.add_argument("--only", nargs="+", help="some of the students, by their names in the table")
        p.add_argument("--processes", type=int, help="students at a time; default: one a core, at most 8; on a GPU 1")
        p.add_argument("--save_samples", action="store_true", help="also a picture of one step of the first students")
        p.add_argument("--quick", action="store_true", help="a few steps: shows that all works, and nothing else")
        p.add_argument("--out", help=f"without suffix; default: toy/results/{name}")
        p.set_defaults(**defaults)
        args, given = p.parse_known_args()
        self.flags = ["--train_batch_size", "128"] if args.pretrained_teacher_model.startswith(POINTS) else []
        self.flags += ["--pretrained_teacher_model", args.pretrained_teacher_model, *given]
        if args.quick:
            args.seeds, args.budget, args.num_samples, args.processes = 2, 50, 64, 1
            self.flags += ["--train_batch_size", "16", "--lr_warmup_steps", "0"]
        training.check_positive(args, "budget", "num_samples", "processes")
        if args.seeds < 2:
            raise BadInput(f"--seeds must be 2 or more, for their spread, not {args.seeds}")
        args.processes = args.processes or (1 if torch.accelerator.is_available() else min(8, os.cpu_count() or 1))
        args.out = args.out or f"{WORK / 'quick' if args.quick else 'toy/results'}/{name}"
        writable_folder(Path(args.out).parent)
        writable_folder(WORK)
        self.args = args

    def _job(self, name: str, variant: Variant, seed: int, measure: Measured, at: Iterable[float]) -> Job:
        args = self.args
        flags = [*self.flags, *shlex.split(variant.flags), "--seed", str(seed), "--output_dir", str(WORK)]
        parsed = distill.parser().parse_args(flags)
        steps = parsed.max_train_steps or max(1, args.budget // distill.forward_passes(parsed))
        flags += ["--max_train_steps", str(steps)]
        teacher = []
        if parsed.pretrained_teacher_model.startswith(POINTS):
            teacher = ["--data", parsed.pretrained_teacher_model, "--seed", str(seed)]
            teacher += ["--max_train_steps", "30", "--train_batch_size", "32"] * args.quick + shlex.split(
                variant.teacher
            )
        times, save_samples = sorted({max(1, round(steps * part)) for part in at}), args.save_samples and seed == 0
        mine = variant.changes, times, measure, args.num_samples, args.features, save_samples
        return Job(name, flags, teacher, *mine)

    def report(
        self,
        variants: dict[str, Variant],
        picture: Callable[[Findings], Image.Image],
        measure: Measured = quality,
        at: Iterable[float] = (1,),
    ) -> None:
        """The whole script: students, table, picture and record."""
        found = self.run(variants, measure, at)
        self.finish(found, picture(found))

    def run(self, variants: dict[str, Variant], measure: Measured, at: Iterable[float]) -> Findings:
        """Trains and measures all students, `at` these parts of their training. What an interrupted call had measured
        is taken from WORK, where `finish` forgets it."""
        if unknown := set(self.args.only or ()) - set(variants):
            raise BadInput(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(variants)}")
        names = [name for name in variants if name in (self.args.only or variants)]
        jobs = [self._job(name, variants[name], seed, measure, at) for name in names for seed in range(self.args.seeds)]
        teachers = {digest(job.teacher, job.teacher_changes): job for job in jobs if job.teacher}
        with tqdm(total=len(teachers), desc="teachers", leave=False) as bar:
            for _ in each(fit_teacher, list(teachers.values()), self.args.processes):
                bar.update()
        self.records = {WORK / f"{digest(job)}.json": job for job in jobs}
        missing = [job for path, job in self.records.items() if not path.is_file()]
        with tqdm(total=len(jobs), desc="students", initial=len(jobs) - len(missing), leave=False) as bar:
            for job, rows in each(distil, missing, self.args.processes):
                draft = WORK / f"{digest(job)}.tmp"
                draft.write_text(json.dumps(rows))
                draft.rename(draft.with_suffix(".json"))
                bar.update()
        rows = {name: [] for name in names}
        for path, job in self.records.items():
            rows[job.variant] += json.loads(path.read_text())
        configuration, _, place = prepare(jobs[0])
        return Findings(rows, place.references(), {name: variants[name].flags for name in names}, vars(configuration))

    def bench(self) -> Bench:
        """That of the first seed, where no variant changes the teacher."""
        return prepare(self._job("", Variant(), 0, quality, ()))[2]

    def finish(self, found: Findings, picture: Image.Image) -> None:
        """Prints the table, and writes it beside the picture and the rows."""
        args, out = self.args, Path(self.args.out)
        summary = {name: {column: found.last(name, column) for column in found.columns()} for name in found.rows}
        lines = []
        for name, values in summary.items():
            cells = {column: f"{mean:.3g} ± {deviation:.2g}" for column, (mean, deviation) in values.items()}
            lines.append({"student": name, "steps": found.rows[name][-1]["step"], **cells})
        print_rows(lines)
        for name, values in found.references.items():
            print(f"{name}: {', '.join(f'{column} {value:.4g}' for column, value in values.items())}")
        device = machine() if torch.accelerator.is_available() else f"{args.processes} times one CPU thread"
        record = {
            "machine": device,
            "flags": vars(args),
            "all students": shlex.join(self.flags),
            "students": found.flags,
        }
        record |= {"first student": found.configuration, "references": found.references, "summary": summary}
        picture.save(out.with_name(out.name + ".png"))
        last = {name: rows[len(rows) // args.seeds - 1] for name, rows in found.rows.items()}  # of the first seed
        if samples := {name: torch.tensor(row.pop("samples")) for name, row in last.items() if "samples" in row}:
            place = self.bench()
            panels = {"teacher, PF-ODE": place.endpoint[: place.teacher.pictured], **samples}
            place.teacher.overview(panels).save(out.with_name(out.name + "-samples.png"))
        out.with_name(out.name + ".json").write_text(json.dumps({**record, "rows": found.rows}, indent=1))
        print(f"{out}.png  {out}.json")
        for path in self.records:
            path.unlink()
