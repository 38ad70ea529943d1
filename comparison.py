"""The table of students beside their teacher: distances to the data and to the teacher, network evaluations, time."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import training
from data import BadInput, ImageFiles
from kinds import Teacher
from metrics import Measure
from sample import png, sample_batches, sample_to_folder

log = logging.getLogger("comparison")
KEPT = 2**28  # numbers: as many samples of a row as fit in 1 GiB are compared with the teacher's


class Comparison(NamedTuple):
    """A table, one dictionary a row; some samples of each row; and what they were measured against."""

    rows: list[dict]
    samples: dict[str, Tensor]
    reference: str


class Timed:
    """Iterates over something and counts the seconds that it takes, without those of the loop around it."""

    def __init__(self, iterable: Iterable):
        self.iterator, self.seconds = iter(iterable), 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        begin = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - begin


@torch.no_grad()
def network_seconds(model: Teacher, batch_size: int, mixed_precision: str) -> float:
    """Seconds of one bare network call on a batch: the least of three, after one to warm up."""
    device, seconds = model.network.device, []
    x = torch.randn(batch_size, *model.shape, device=device, dtype=model.network.dtype)
    labels = model.labels([])
    cond = model.condition(labels[torch.arange(batch_size) % len(labels)].to(device))
    t = torch.full((batch_size,), len(model.schedule) - 1, device=device)
    with training.autocast(device, mixed_precision):
        for _ in range(4):
            begin = time.perf_counter()
            model.network(x, t, **cond).sample.sum().item()  # reading a number waits for a GPU
            seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def compare(
    students: dict[str, Teacher],
    teacher: Teacher,
    data: str,
    *,
    steps: Sequence[int],
    teacher_steps: Sequence[int],
    num_samples: int,
    features: str = "inception",
    clip_model: str | None = None,
    resolution: int | None = None,
    split: str = "train",
    seed: int = 0,
    w: float = 0.0,
    prompts: Sequence[str] = (),
    batch_size: int | None = None,
    mixed_precision: str = "no",
    samples_dir: str | None = None,
) -> Comparison:
    """Rows: held-out data (the floor), the teacher by DDIM, the students (by their names); all from the same seeds.

    "map error" is the mean L2 distance, in sample space, to the teacher's output at its largest number of steps from
    the same noise. It is defined for maps of the noise: DDIM at any number of steps, a student at one. "ms/sample" is
    the time of all, "network" its part that as many bare network calls take.
    """
    reference = teacher.reference(data, split, resolution)
    measures = teacher.measures(reference, features, clip_model)
    samples, rows, endpoint = {"data": shown(teacher, reference, seed)}, [], None
    batch_size = min(batch_size or teacher.evaluation["batch_size"], num_samples)
    options = {"prompts": prompts, "batch_size": batch_size, "mixed_precision": mixed_precision}
    texts = teacher.texts(prompts)
    seeds = range(seed, seed + num_samples)
    parts = [seeds[i : i + batch_size] for i in range(0, num_samples, batch_size)]
    try:
        held_out = teacher.reference(data, "train" if split == "test" else "test", resolution)
        for part in spread(len(held_out), num_samples).split(250):
            update(measures, held_out[part], [])
        rows.append({"sampler": "held-out data", **results(measures)})
    except BadInput as error:
        log.warning("no row of held-out data: %s", error)
    plan = [("teacher, DDIM", teacher, n, w) for n in sorted(teacher_steps, reverse=True)]
    plan += [(name, student, n, 0.0) for name, student in students.items() for n in sorted(steps)]
    for name, model, n, guidance in plan:
        calls = n * (2 if guidance else 1)
        network = calls * network_seconds(model, batch_size, mixed_precision) / batch_size
        if samples_dir:
            folder = Path(samples_dir) / f"{Path(model.name).name}-{n}"
            sample_to_folder(model, seeds, folder, n, w=guidance, **options)
            batches = (torch.stack([model.read(png(folder, s)) for s in part]) for part in parts)
            timed = Timed(sample_batches(model, parts[0], n, w=guidance, **options))
            count = len(torch.cat(list(timed)))
        else:
            batches = timed = Timed(sample_batches(model, seeds, n, w=guidance, **options))
            count = num_samples
        kept = []
        for part, x in zip(parts, batches, strict=True):
            update(measures, model.measured(x, resolution), [texts[s % len(texts)] for s in part if texts])
            if not kept or (len(kept) + 1) * x.numel() <= KEPT:
                kept.append(x)
        x = samples[f"{name}, {n} step{'s' * (n > 1)}"] = torch.cat(kept)
        row = {"sampler": name, "steps": n, "evaluations": calls, **results(measures)}
        if endpoint is None and model is teacher:
            endpoint = x
        elif endpoint is not None and (model is teacher or n == 1):
            row["map error"] = (x - endpoint).flatten(1).norm(dim=1).mean().item()
        rows.append({**row, "ms/sample": 1000 * timed.seconds / count, "network": 1000 * network})
    against = f"{len(reference)} samples of {data} ({split}), {', '.join(measure.name for measure in measures)}"
    return Comparison(rows, samples, f"{num_samples} samples a row, in batches of {batch_size}, against {against}")


def update(measures: Sequence[Measure], samples: Tensor, texts: Sequence[str]) -> None:
    for measure in measures:
        measure.update(samples, texts)


def results(measures: Sequence[Measure]) -> dict[str, float]:
    return {name: value for measure in measures for name, value in measure.result().items()}


def shown(teacher: Teacher, reference: Tensor | ImageFiles, seed: int) -> Tensor:
    """Some of the data, for the picture."""
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    chosen = reference[order[: teacher.pictured]]
    return chosen / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen


def spread(length: int, n: int) -> Tensor:
    """At most n indices below `length`, evenly spread, because the files of a data set are sorted by class."""
    return torch.linspace(0, length - 1, min(length, n)).long()


def print_rows(rows: Sequence[dict]) -> None:
    """A line for each row, under the names of all columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns]
    for row in rows:
        values = [row.get(column, "-") for column in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(rest, widths[1:], strict=True))]))


def print_table(comparison: Comparison) -> None:
    print_rows(comparison.rows)
    print(f"{comparison.reference}; {machine()}")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"
