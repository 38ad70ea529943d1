"""How good is a student? Two programs:

    python evaluate.py table STUDENT ...     distances to data and teacher, prompts that were understood, time
    python evaluate.py error MODEL ...       the approximated error of Fig. 2(c), by time step

Points are measured by their exact Wasserstein distance to the data, images by the Fréchet distance of a network's
features (FID, if the network is Inception), and images with prompts also by how well the two agree. Where a PF-ODE
has a known end, there is something better than a distance between distributions: the *map error*, how far a sample is
from the end of the teacher's trajectory from the same noise.
"""

import argparse
import itertools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import training
from data import BadInput, centre_square, program, read_prompts, reference_set, refuse, to_range, writable_folder
from sample import add_arguments, n_steps, overview, preview, read_png, sample_batches, sample_to_folder, to_pixels
from teacher import DiffusionModel, load

log = logging.getLogger("evaluate")


# ---------------------------------------------------------------------------------------------------------------------
# Measures
#
# A measure is an object with three members. `update(samples, texts)` takes in a batch, so that sets of any size can be
# measured: points (B, 2), or uint8 images (B, 3, H, W) and the prompts that they were made from. `result()` returns the
# measured numbers by column of the table, and forgets what was taken in, so that the next set can begin. `name` is what
# is said below the table.
# ---------------------------------------------------------------------------------------------------------------------


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 of two equally large sets of points (n, d), in data units: the best pairing's root mean square
    distance."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def mmd(a: Tensor, b: Tensor) -> float:
    """RBF maximum mean discrepancy of two sets of points (n, d), averaged over the bandwidths 0.1, 0.3 and 1.

    W2 asks how far points must be moved, MMD whether kernel averages differ. Where few points are far off, W2 sees it
    first; where densities are slightly wrong everywhere, MMD does.

    Unbiased before the root is taken; so of two samples of the same data it may be negative, and then 0 is returned.
    """
    n, total = len(a), 0.0
    aa, bb, ab = (torch.cdist(p.double(), q.double()).square() for p, q in ((a, a), (b, b), (a, b)))
    for bandwidth in (0.1, 0.3, 1.0):
        kernel_aa, kernel_bb, kernel_ab = ((-d / (2 * bandwidth**2)).exp() for d in (aa, bb, ab))
        inside = (kernel_aa.sum() + kernel_bb.sum() - 2 * n) / (n * (n - 1))  # without each point's 1 with itself
        total += (inside - 2 * kernel_ab.mean()).item() / 3
    return max(total, 0.0) ** 0.5


class PointDistances:
    """W2 and MMD of 2-D points (B, 2) to reference points."""

    name = "features: the points themselves"

    def __init__(self, reference: Tensor):
        self.reference, self.batches = reference, []

    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        self.batches.append(samples)

    def result(self) -> dict[str, float]:
        samples, self.batches = torch.cat(self.batches), []
        n = min(len(samples), len(self.reference), 2048)  # the assignment costs n³
        reference = self.reference[:n]
        return {"W2": wasserstein2(samples[:n], reference), "MMD": mmd(samples[:n], reference)}


class ImageFeatures:
    """What a network sees in uint8 images (B, 3, H, W): the Fréchet distance of its features to the reference images';
    and how often it sees the class that the prompt names, if it is a classifier that has names.

    The network is torch-fidelity's Inception, and the distance then FID; or it is a file of toy/features.py (.pt2),
    which maps images to features (B, D) and logits, and the distance is called FD.
    """

    def __init__(self, network: str, reference: Sequence, device: torch.device):
        self.name, self.device, names = f"features: {network}", device, {"classes": ""}
        self.distance = "FID" if network == "inception" else "FD"  # only Inception's may be called as published ones
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # its errors are reported below, in one line
        try:
            if network == "inception":
                from torch_fidelity.utils import create_feature_extractor

                cuda = device.type == "cuda"
                self.network = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False)
            else:
                self.network = torch.export.load(network, extra_files=names).module().to(device)
        except Exception as error:  # a missing file, no network, or a file of another kind, each with its own type
            raise _cannot_load("feature extractor", network, error) from error
        self.classes: list[str] = json.loads(names["classes"] or "[]")
        self.features, self.named, self.right = [], 0, 0
        parts = torch.arange(len(reference)).split(250)
        for indices in tqdm(parts, desc="reference", unit="batch", leave=False, mininterval=1):
            self.update(reference[indices], [])
        self.reference = self._statistics()

    @torch.no_grad()
    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        """Takes in images and, if they have any, their prompts. A prompt that names no class, or two, is not
        counted."""
        for i in range(0, len(samples), 250):
            features, *logits = self.network(samples[i : i + 250].to(self.device))
            self.features.append(features.float().cpu())
            for text, row in zip(texts[i : i + 250], logits[0] if self.classes else (), strict=False):
                named = [name for name in self.classes if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)]
                self.named += len(named) == 1
                self.right += named == [self.classes[row.argmax()]]

    def _statistics(self) -> dict:
        from torch_fidelity.metric_fid import fid_features_to_statistics

        features, self.features = torch.cat(self.features), []
        return fid_features_to_statistics(features)

    def result(self) -> dict[str, float]:
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        metric = fid_statistics_to_metric(self._statistics(), self.reference, verbose=False)
        values = {self.distance: metric["frechet_inception_distance"]}
        if self.named:
            values["prompt accuracy"] = self.right / self.named
        self.named = self.right = 0
        return values


class ClipScore:
    """The mean cosine between image and prompt in a CLIP of open_clip. The model is named as architecture/weights,
    where weights are a tag of open_clip's or a file."""

    def __init__(self, model: str, device: torch.device):
        self.name, self.device, self.cosines = f"CLIP: {model}", device, []
        architecture, _, weights = model.partition("/")
        refuse(not weights, f"a CLIP model is named as architecture/weights, not {model}")
        try:
            import open_clip

            options = {"pretrained": weights, "device": device}
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, **options)
            self.tokenize = open_clip.get_tokenizer(architecture)
        except Exception as error:  # an unknown name, no network, a broken file
            raise _cannot_load("CLIP model", model, error) from error
        self.model.eval()

    @torch.no_grad()
    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        """Takes in uint8 images (B, 3, H, W) and their prompts."""
        for i in range(0, len(texts), 50):
            images = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in samples[i : i + 50])
            image = self.model.encode_image(torch.stack([self.preprocess(x) for x in images]).to(self.device))
            text = self.model.encode_text(self.tokenize(texts[i : i + 50]).to(self.device))
            self.cosines.append(torch.cosine_similarity(image, text).cpu())

    def result(self) -> dict[str, float]:
        cosines, self.cosines = self.cosines, []
        return {"CLIP": torch.cat(cosines).mean().item()} if cosines else {}


def _cannot_load(what: str, name: str, error: Exception) -> BadInput:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BadInput(f"cannot load the {what} {name}: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# What samples are measured against, and by what
# ---------------------------------------------------------------------------------------------------------------------


def measures_for(model: DiffusionModel, reference: Sequence, features: str, clip_model: str | None) -> list:
    """The measures for samples of this model."""
    refuse(clip_model and not model.default_prompts, "--clip_model is for models that are prompted by texts")
    if len(model.shape) == 1:
        return [PointDistances(reference)]
    clip = [ClipScore(clip_model, model.device)] if clip_model else []
    return [ImageFeatures(features, reference, model.device), *clip]


def spread(length: int, n: int) -> Tensor:
    """At most n indices below `length`, evenly spread, because the files of a data set are sorted by class."""
    return torch.linspace(0, length - 1, min(length, n)).long()


@dataclass
class Evaluation:
    """What samplers have in common when they are compared: the data, the measures, and the seeds of their noises."""

    model: DiffusionModel  # the teacher
    data: str
    num_samples: int  # of each sampler
    split: str = "train"  # of the data: the reference set
    features: str = "inception"  # of images; else a file of toy/features.py
    clip_model: str | None = None
    resolution: int | None = None  # to which images are brought; the model's own if it is not given
    seed: int = 0  # of the first sample
    prompts: Sequence[str] = ()
    batch_size: int | None = None
    mixed_precision: str = "no"

    def __post_init__(self):
        self.seeds = range(self.seed, self.seed + self.num_samples)
        self.resolution = self.resolution or self.model.resolution
        self.batch_size = min(self.batch_size or self.model.batch_size, self.num_samples)
        self.texts = list(self.prompts) or list(self.model.default_prompts)
        self.reference = reference_set(self.data, self.split, self.resolution)
        self.measures = measures_for(self.model, self.reference, self.features, self.clip_model)

    def update(self, samples: Tensor, texts: Sequence[str] = ()) -> None:
        """Shows the measures a batch of a sampler (points, or images in [-1, 1]) or of data (points, or uint8
        images)."""
        if samples.ndim == 4 and samples.is_floating_point():
            pixels = to_pixels(samples)
            samples = torch.stack([centre_square(Image.fromarray(x), self.resolution) for x in pixels])
        for measure in self.measures:
            measure.update(samples, texts)

    def results(self) -> dict[str, float]:
        """All measures of what they were shown since the last call."""
        return {name: value for measure in self.measures for name, value in measure.result().items()}

    def held_out_data(self) -> dict[str, float]:
        """Real data that the reference set does not hold, as if a sampler had made them. Two samples of one
        distribution are some distance apart by chance; a sampler that comes as near as this cannot be told from the
        data."""
        data = reference_set(self.data, "train" if self.split == "test" else "test", self.resolution)
        for part in spread(len(data), len(self.seeds)).split(250):
            self.update(data[part])
        return self.results()

    def sampler(self, model: DiffusionModel, steps: int, w: float, samples_dir: str | None) -> tuple[Tensor, dict]:
        """One sampler: some of its samples, as many as fit in 1 GiB, and its row of the table.

        With `samples_dir` images are kept there as files, and found there again. Then a first batch is made once more,
        to be timed.
        """
        size, seeds, evaluations = self.batch_size, self.seeds, steps * (2 if w else 1)
        parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        network = evaluations * network_seconds(model, size, self.mixed_precision) / size
        timed, options = parts[0] if samples_dir else seeds, {"w": w, "prompts": self.prompts}
        options |= {"batch_size": size, "mixed_precision": self.mixed_precision}
        batches = made = sample_batches(model, timed, steps, **options)
        if samples_dir:
            folder = Path(samples_dir) / f"{Path(model.name).name}-{steps}"
            sample_to_folder(model, seeds, folder, steps, **options)
            batches = (torch.stack([read_png(folder, seed) for seed in part]) for part in parts)
        # sample_batches is lazy: a batch is made when the loop asks for it. So the clock runs between two batches, and
        # stands while they are measured.
        kept, seconds, begin = [], 0.0, time.perf_counter()
        for part, x in zip(parts, batches, strict=True):
            seconds += time.perf_counter() - begin
            self.update(x, [self.texts[s % len(self.texts)] for s in part if self.texts])
            if not kept or (len(kept) + 1) * x.numel() <= 2**28:
                kept.append(x)
            begin = time.perf_counter()
        if samples_dir:
            list(made)
            seconds = time.perf_counter() - begin
        times = {"ms/sample": 1000 * seconds / len(timed), "network": 1000 * network}
        return torch.cat(kept), {"evaluations": evaluations, **self.results(), **times}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A table, one dictionary a row; some samples of each row; and what they were measured against."""

    rows: list[dict]
    samples: dict[str, Tensor]
    reference: str


@torch.no_grad()
def network_seconds(model: DiffusionModel, batch_size: int, mixed_precision: str) -> float:
    """Seconds of one bare network call on a batch: the least of three, after one to warm up.

    Sampling cannot be faster than its network calls. What a sampler takes beyond them is overhead: the VAE, the
    solver's arithmetic, Python.
    """
    seconds, labels = [], model.labels([])
    x = torch.randn(batch_size, *model.shape, device=model.device, dtype=next(model.network.parameters()).dtype)
    cond = model.condition(labels[torch.arange(batch_size) % len(labels)].to(model.device))
    t = torch.full((batch_size,), len(model.schedule) - 1, device=model.device)
    with training.autocast(model.device, mixed_precision):
        for _ in range(4):
            begin = time.perf_counter()
            model.network(x, t, **cond).sample.sum().item()  # to read a number is to wait for a GPU
            seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def compare(
    evaluation: Evaluation, students: dict[str, DiffusionModel], steps, teacher_steps, w: float, samples_dir=None
) -> Comparison:
    """Rows: held-out data, the evaluation's model as the teacher by DDIM, the students by name; all from the same
    noises.

    "map error" is the mean L2 distance, in sample space, to the teacher's output at its largest number of steps from
    the same noise. It is defined where the noise decides the sample: DDIM at any number of steps, a student at one.
    "ms/sample" is the time of all, "network" the part of it that as many bare network calls take.
    """
    teacher, reference, rows, endpoint = evaluation.model, evaluation.reference, [], None
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(evaluation.seed))
    shown = reference[order[: preview(teacher)[0]]]
    samples = {"data": to_range(shown) if shown.dtype == torch.uint8 else shown}
    try:
        rows.append({"sampler": "held-out data", **evaluation.held_out_data()})
    except BadInput as error:
        log.warning("no row of held-out data: %s", error)
    plan = [("teacher, DDIM", teacher, n, w) for n in sorted(teacher_steps, reverse=True)]
    plan += [(name, student, n, 0.0) for name, student in students.items() for n in sorted(steps)]
    for name, model, n, guidance in plan:
        x, values = evaluation.sampler(model, n, guidance, samples_dir)
        row = {"sampler": name, "steps": n, **values}
        # The teacher's largest number of steps comes first, and is what the others are compared with.
        if endpoint is None and model is teacher:
            endpoint = x
        elif endpoint is not None and (model is teacher or n == 1):
            row["map error"] = (x - endpoint).flatten(1).norm(dim=1).mean().item()
        samples[f"{name}, {n_steps(n)}"] = x
        rows.append(row)
    against = f"{len(reference)} samples of {evaluation.data} ({evaluation.split})"
    names = ", ".join(measure.name for measure in evaluation.measures)
    count = f"{len(evaluation.seeds)} samples a row, in batches of {evaluation.batch_size}"
    return Comparison(rows, samples, f"{count}, against {against}, {names}")


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


def print_comparison(comparison: Comparison) -> None:
    print_rows(comparison.rows)
    print(f"{comparison.reference}; {machine()}")


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


# Published protocols, as command lines that are read before what was typed. --data is then the folder of the whole
# validation set, and --prompts its captions.
PROTOCOLS = {
    # Imagen's zero-shot FID-30k; all images are brought to 256 pixels by LANCZOS, for CLIP too, as GigaGAN does.
    "coco2014-30k": "--num_samples 30000 --resolution 256 --clip_model ViT-g-14/laion2b_s12b_b42k",
    # FID-5k of guided distillation (Meng et al.): at the size that the model makes.
    "coco2017-5k": "--num_samples 5000 --clip_model ViT-g-14/laion2b_s12b_b42k",
}


def table(args: argparse.Namespace) -> None:
    """The subcommand: compares students, and leaves evaluation.json and .png in the first one's folder.

    What is not given on the command line is read from the metrics.json that distill.py left there: the teacher, the
    data, and the guidance scale that the student has in its weights.
    """
    missing = args.protocol and not args.prompts
    refuse(missing, f"--protocol {args.protocol} needs its captions: --prompts FILE, one a line")
    folder = Path(args.students[0])
    record = folder / "metrics.json"
    trained_with = json.loads(record.read_text())["configuration"] if record.is_file() else {}
    for name in ("pretrained_teacher_model", "data", "guidance_w"):
        if getattr(args, name) is None:
            unknown = name not in trained_with
            refuse(unknown, f"{record} does not say with which --{name} the student was distilled; please give it")
            setattr(args, name, trained_with[name])
    device = training.process().device
    students, teacher = {name: load(name).to(device) for name in args.students}, load(args.pretrained_teacher_model)
    if len(students) == 1:
        students = {"student": students[args.students[0]]}
    same = "data num_samples split features clip_model resolution seed batch_size mixed_precision".split()
    flags = {name: getattr(args, name) for name in same}
    evaluation = Evaluation(teacher.to(device), prompts=read_prompts(args.prompts), **flags)
    teacher_steps = [1, 2, 4, teacher.many_steps] if args.teacher_steps is None else args.teacher_steps
    comparison = compare(evaluation, students, args.steps, teacher_steps, args.guidance_w, args.samples_dir)
    print_comparison(comparison)
    writable_folder(folder)
    overview(teacher, comparison.samples, trained_with.get("k", 100)).save(folder / "evaluation.png")
    flags = {name: value for name, value in vars(args).items() if name != "run"}
    result = {"rows": comparison.rows, "reference": comparison.reference, "machine": machine(), "flags": flags}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2))
    print(f"{folder}/evaluation.png  {folder}/evaluation.json")


# ---------------------------------------------------------------------------------------------------------------------
# The approximated error, Fig. 2(c)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def approximated_errors(
    model: DiffusionModel, x0: Tensor, cond: dict[str, Tensor], noise: Tensor, times: list[int], w: float
) -> Tensor:
    """The mean square of f(x_t, t) - f(x_t', t') for neighbours t, t' in `times`: what Eq. 6 leaves, by t.

    A consistency function would have 0 everywhere. The paper adds these errors up along a trajectory to bound the
    error of the whole, which is why it wants each to be small. Neighbours on a trajectory are simulated as for its
    figure: the same noise on the same x_0. (toy/fig2c_error.py takes true neighbours.)
    """
    squares, before = [], None
    for n in times:
        t = torch.full((len(x0),), n, device=x0.device)
        alpha, sigma = model.schedule.at(t, x0.ndim)
        denoised, _ = model.predict(alpha * x0 + sigma * noise, t, cond, w)
        if before is not None:
            squares.append((before - denoised).square().mean().cpu())
        before = denoised
    return torch.stack(squares)


def error(args: argparse.Namespace) -> None:
    """The subcommand: a curve for each model, printed, plotted, and written as .json. All see the same data and
    noise."""
    from toy import plots

    out, device = Path(args.out), training.process().device
    writable_folder(out.parent)
    models = [load(name).to(device) for name in args.models]
    args.data = args.data or models[0].default_data
    refuse(args.data is None, "--data is missing: a folder of images, or images with captions")
    times = list(range(len(models[0].schedule) - 1, 99, -args.interval))  # not below 100, as the paper
    refuse(len(times) < 2, f"--interval {args.interval} leaves no neighbours")
    size = args.batch_size or 100
    count, curves = math.ceil(args.num_samples / size), {model.name: 0 for model in models}
    batches = training.stream_batches(models[0].dataset(args), 0, batch_size=size, seed=args.seed)
    for i, (data, label) in enumerate(tqdm(itertools.islice(batches, count), total=count, unit="batch", leave=False)):
        x0, _ = models[0].prepare(data.to(device), label.to(device))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed + i)).to(device)
        for model in models:
            w = 0.0 if model.is_student else args.guidance_w
            with training.autocast(device, args.mixed_precision):
                cond = model.condition(label.to(device))
                squares = approximated_errors(model, x0, cond, noise, times, w)
            curves[model.name] += squares / count
    curves = {name: squares.sqrt().tolist() for name, squares in curves.items()}
    label = f"RMS of f(x_t, t) - f(x_t-{args.interval}, t-{args.interval})"
    lines = {name: (times[:-1], values, None) for name, values in curves.items()}
    plots.curves(plots.Panel("approximated error", "t", label, lines)).save(out)
    out.with_suffix(".json").write_text(json.dumps({"t": times[:-1], **curves}))
    width = max(map(len, curves))
    for name, values in {"t": times[:-1], **curves}.items():
        print(name.ljust(width), *(f"{value:8.4g}" for value in values[:: math.ceil(len(values) / 8)]))
    print(f"{count * size} samples of {args.data}; {machine()}; {out}")


# ---------------------------------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------------------------------


def parser() -> training.Parser:
    """The flags of both programs."""
    p = training.Parser(prog="evaluate.py", description="Measure students and their teacher.")
    programs = p.add_subparsers(required=True, metavar="table|error")
    t = programs.add_parser("table", help="compare students with their teacher", formatter_class=training.Help)
    t.epilog = training.recipes("Protocols, of which a flag that is given replaces its part", PROTOCOLS)
    t.add_argument("students", nargs="+", help="pipeline folders or hub ids; the results are written into the first")
    t.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the students (paper: 1, 2, 4)")
    teacher_steps_help = "of DDIM (default: 1, 2, 4 and 50, or 1000 for points; none given: no teacher)"
    t.add_argument("--teacher_steps", type=int, nargs="*", help=teacher_steps_help)
    t.add_argument("--pretrained_teacher_model", help="default: the one that the first student was distilled from")
    t.add_argument("--guidance_w", type=training.finite, help="of the teacher (default: as it was distilled with)")
    t.add_argument("--data", help="the reference set (default: what the first student was distilled with)")
    t.add_argument("--split", default="train", help="of the data, the reference set")
    t.add_argument("--protocol", choices=PROTOCOLS, help="a published one, printed below")
    t.add_argument("--features", default="inception", help='"inception", or a file of toy/features.py')
    t.add_argument("--clip_model", help="for a CLIP score: architecture/weights of open_clip")
    t.add_argument("--resolution", type=training.positive, help="of all images (default: the model's own)")
    t.add_argument("--num_samples", type=training.positive, default=5000, help="a row")
    t.add_argument("--samples_dir", help="keep the images here; what an interrupted evaluation left is used again")
    t.set_defaults(run=table)
    e = programs.add_parser("error", help="neighbouring predictions, Fig. 2(c)", formatter_class=training.Help)
    e.add_argument("models", nargs="+", help="pipeline folders or hub ids, of students and teachers")
    e.add_argument(
        "--interval", type=training.positive, default=20, help="between neighbours, in time steps; paper: 20"
    )
    e.add_argument("--guidance_w", type=training.finite, default=0.0, help="of the teachers among the models")
    e.add_argument("--num_samples", type=training.positive, default=1000, help="paper: 1000")
    e.add_argument("--out", default="runs/error.png", help="the plot; the numbers are written beside it as .json")
    e.set_defaults(run=error)
    training.add_data_arguments(e)
    for program_parser in (t, e):
        add_arguments(program_parser)
    return p


@program
def main() -> None:
    typed = sys.argv[1:]
    first, _ = parser().parse_known_args(typed)  # for --protocol, which is then read before the other flags
    protocol = PROTOCOLS.get(getattr(first, "protocol", None), "").split()
    args = parser().parse_args([typed[0], *protocol, *typed[1:]])
    args.run(args)


if __name__ == "__main__":
    main()
