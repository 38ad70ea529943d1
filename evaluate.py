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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import default_timer, repeat
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm, trange

import sample
import training
from data import BadInput, centre_square, program, read_json, read_prompts, reference_set, refuse, to_range
from sample import add_arguments, n_steps, overview, preview, read_png, sample_batches, sample_to_folder, to_pixels
from teacher import DiffusionModel, load

# ---------------------------------------------------------------------------------------------------------------------
# Measures
#
# A measure is an object with three members. `update(samples, prompts)` takes in a batch, so that sets of any size can
# be measured: points (B, 2), or uint8 images (B, 3, H, W); and what they were made from, texts or numbers of classes.
# `result()` returns the measured numbers by column of the table, and forgets what was taken in, so that the next set
# can begin. `name` is what is said below the table.
# ---------------------------------------------------------------------------------------------------------------------


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 of two equally large sets of points (n, d), in data units: the best pairing's root mean square
    distance.

    For sets of one size, moving one distribution onto the other at least cost is an assignment problem, which scipy
    solves exactly. So there is no regularization to choose, and no error but that of the finite samples.
    """
    from scipy.optimize import linear_sum_assignment

    # float64: cdist takes the difference of large squares, which float32 would round away for close points.
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


def mmd(a: Tensor, b: Tensor) -> float:
    """RBF maximum mean discrepancy of two sets of points (n, d), averaged over the bandwidths 0.1, 0.3 and 1.

    A kernel average compares a point with all others at once, weighted by exp(-distance²/(2 bandwidth²)).
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

    def update(self, samples: Tensor, prompts: Sequence[str | int]) -> None:
        self.batches.append(samples)

    def result(self) -> dict[str, float]:
        samples, self.batches = torch.cat(self.batches), []
        n = min(len(samples), len(self.reference), 2048)  # the assignment's time grows with n³
        reference = self.reference[:n]
        return {"W2": wasserstein2(samples[:n], reference), "MMD": mmd(samples[:n], reference)}


class ImageFeatures:
    """What a network sees in uint8 images (B, 3, H, W): the Fréchet distance of its features to the reference images';
    and, if it is a classifier, how often it sees the class that was asked for, by a text that names it or by number.

    The network is torch-fidelity's Inception, and the distance then FID; or it is a classifier of toy/features.py,
    which maps images to features (B, D) and logits, and the distance is called FD.
    """

    def __init__(self, network: str, reference: Sequence, device: torch.device):
        self.name, self.device, self.classes = f"features: {network}", device, []
        self.distance = "FID" if network == "inception" else "FD"  # only Inception's may be called as published ones
        try:
            if network == "inception":
                from torch_fidelity.utils import create_feature_extractor

                # The weights of the published FIDs, and the pooled features of 2048 numbers.
                options = {"cuda": device.type == "cuda", "verbose": False}
                self.network = create_feature_extractor("inception-v3-compat", ["2048"], **options)
            else:
                from toy.features import load_classifier

                self.network, self.classes = load_classifier(network)
                self.network.to(device)
        except Exception as error:  # a missing file, no network, or a file of another kind, each with its own type
            reason = " ".join(str(error).split())[:200]  # torch writes a line for each weight that does not fit
            raise BadInput(f"cannot load the feature extractor {network}: {reason}") from error
        # The Fréchet distance looks at mean and covariance only. Those of the reference set are computed once.
        from torch_fidelity.metric_fid import fid_features_to_statistics

        self.features, self.right = [], []  # what `update` collects
        for indices in tqdm(torch.arange(len(reference)).split(250), desc="reference", unit="batch", leave=False):
            self.update(reference[indices], [])
        self.reference, self.features = fid_features_to_statistics(torch.cat(self.features)), []

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[str | int]) -> None:
        """Takes in images and, if they have any, their prompts: texts, or numbers of classes (teacher.py and
        toy.features both number the classes of a folder by the alphabet). A text that names no class, or two, is not
        counted: it has no right answer, or more than one."""
        for i in range(0, len(samples), 250):  # by its own size: the sampler's batches may be much larger
            features, *logits = self.network(samples[i : i + 250].to(self.device))
            self.features.append(features.float().cpu())
            for prompt, row in zip(prompts[i : i + 250], logits[0] if self.classes else (), strict=False):
                named = [prompt] if isinstance(prompt, int) else self.classes_in(prompt)
                if len(named) == 1:
                    self.right.append(named[0] == row.argmax().item())

    def classes_in(self, text: str) -> list[int]:
        """Which classes a text names, in whole words: "credit" does not name "red"."""
        names = enumerate(self.classes)
        return [i for i, name in names if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)]

    def result(self) -> dict[str, float]:
        """|μ_a - μ_b|² + tr(A + B - 2 √(A B)) of the two sets' means and covariances, in features squared."""
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        statistics = fid_features_to_statistics(torch.cat(self.features))
        metric = fid_statistics_to_metric(statistics, self.reference, verbose=False)
        values = {self.distance: metric["frechet_inception_distance"]}
        if self.right:
            values["prompt accuracy"] = sum(self.right) / len(self.right)
        self.features, self.right = [], []
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

            self.model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, weights, device=device)
            self.tokenize = open_clip.get_tokenizer(architecture)
        except Exception as error:  # an unknown name, no network, a broken file
            raise BadInput(f"cannot load the CLIP model {model}: {error}".splitlines()[0]) from error
        self.model.eval()

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[str | int]) -> None:
        """Takes in uint8 images (B, 3, H, W) and their prompts, which are texts."""
        for i in range(0, len(prompts), 50):  # few at a time: CLIP's networks are larger than Inception
            images = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in samples[i : i + 50])
            image = self.model.encode_image(torch.stack([self.preprocess(x) for x in images]).to(self.device))
            text = self.model.encode_text(self.tokenize(prompts[i : i + 50]).to(self.device))
            self.cosines.append(torch.cosine_similarity(image, text).cpu())

    def result(self) -> dict[str, float]:
        cosines, self.cosines = self.cosines, []
        return {"CLIP": torch.cat(cosines).mean().item()} if cosines else {}


# ---------------------------------------------------------------------------------------------------------------------
# What samples are measured against, and by what
# ---------------------------------------------------------------------------------------------------------------------


def measures_for(model: DiffusionModel, reference: Sequence, features: str, clip_model: str | None) -> list:
    """The measures for samples of this model. A model of points needs no network to see them with; a CLIP score needs
    prompts that say something."""
    refuse(clip_model and not model.default_prompts, "--clip_model is for models that are prompted by texts")
    if len(model.shape) == 1:
        return [PointDistances(reference)]
    clip = [ClipScore(clip_model, model.device)] if clip_model else []
    seen = ImageFeatures(features, reference, model.device)
    if model.null_label not in (None, len(seen.classes)):
        seen.classes = []  # the classifier was trained on other classes, and cannot say what the model was asked for
    return [seen, *clip]


def spread(length: int, n: int) -> Tensor:
    """At most n indices below `length`, evenly spread, because the files of a data set are sorted by class."""
    return torch.linspace(0, length - 1, min(length, n)).long()


@dataclass(eq=False)  # compared, and hashed, by identity: caches are keyed by one
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
    eta: float = 1.0  # the share of fresh noise between a student's steps
    timesteps: Sequence[int] = ()  # of a student's steps, if they are not LCM's

    def __post_init__(self):
        self.seeds = range(self.seed, self.seed + self.num_samples)
        self.resolution = self.resolution or self.model.resolution
        self.batch_size = min(self.batch_size or self.model.batch_size, self.num_samples)
        # What samples are asked to show, in turn, as sample.py asks for it: texts, or numbers of classes.
        texts, by_class = list(self.prompts) or list(self.model.default_prompts), self.model.null_label is not None
        self.asked = self.model.labels(self.prompts).tolist() if by_class else texts
        self.reference = reference_set(self.data, self.split, self.resolution)
        self.measures = measures_for(self.model, self.reference, self.features, self.clip_model)

    def update(self, samples: Tensor, prompts: Sequence[str | int] = ()) -> None:
        """Shows the measures a batch of a sampler (points, or images in [-1, 1]) or of data (points, or uint8
        images)."""
        # Samples are rounded to 8 bits first, as files are. Otherwise the features' network would see a difference
        # between samples and data that nobody can see in a picture.
        if samples.ndim == 4 and samples.is_floating_point():
            pixels = to_pixels(samples)
            samples = torch.stack([centre_square(Image.fromarray(x), self.resolution) for x in pixels])
        for measure in self.measures:
            measure.update(samples, prompts)

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

    def student_options(self, model: DiffusionModel, steps: int) -> dict:
        """η and the times of a sampler. A teacher's DDIM has its own times, and it and a single step add no noise: so
        they are as they always are."""
        eta = self.eta if model.is_student and steps > 1 else 1.0
        return {"eta": eta, "timesteps": list(self.timesteps) if model.is_student else []}

    def sampler(self, model: DiffusionModel, steps: int, w: float, samples_dir: str | None) -> tuple[Tensor, dict]:
        """One sampler: some of its samples, as many as fit in 1 GiB, and its row of the table.

        With `samples_dir` images are kept there as files, and found there again. Then a first batch is made once more,
        to be timed.
        """
        # Guidance calls the network twice a step, with the condition and without.
        size, seeds, evaluations = self.batch_size, self.seeds, steps * (2 if w else 1)
        parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        network = evaluations * network_seconds(model, size, self.mixed_precision) / size
        options = {"w": w, "prompts": self.prompts, "batch_size": size, "mixed_precision": self.mixed_precision}
        options |= self.student_options(model, steps)
        if samples_dir:
            share = "" if options["eta"] == 1 else f"-eta{self.eta:g}"
            times = "".join(f"-t{t}" for t in options["timesteps"])
            folder = Path(samples_dir) / f"{Path(model.name).name}-{steps}{share}{times}"
            sample_to_folder(model, seeds, folder, steps, **options)
        timed = parts[0] if samples_dir else seeds
        batches, kept, seconds = sample_batches(model, timed, steps, **options), [], 0.0
        for part in parts:
            # sample_batches makes a batch when it is asked for it. So this is the time of sampling, without measuring.
            begin = default_timer()
            x = next(batches, None)
            seconds += default_timer() - begin
            if samples_dir:
                x = torch.stack([read_png(folder, seed) for seed in part])
            self.update(x, [self.asked[s % len(self.asked)] for s in part if self.asked])
            if not kept or (len(kept) + 1) * x.numel() <= 2**28:  # in float32, 2**28 numbers are 1 GiB
                kept.append(x)
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
    # Input of the network's own precision, at the first time of sampling. What the values are does not matter.
    labels = model.labels([])
    x = torch.randn(batch_size, *model.shape, device=model.device, dtype=next(model.network.parameters()).dtype)
    cond = model.as_network_takes(model.condition(labels[torch.arange(batch_size) % len(labels)].to(model.device)))
    t = torch.full((batch_size,), len(model.schedule) - 1, device=model.device)

    def call() -> None:
        model.network(x, t, **cond).sample.sum().item()  # to read a number is to wait for a GPU

    with training.autocast(model.device, mixed_precision):
        return min(repeat(call, number=1, repeat=4)[1:])


def compare(evaluation: Evaluation, students: dict, steps, teacher_steps, w: float, samples_dir=None) -> Comparison:
    """Rows: held-out data, the evaluation's model as the teacher by DDIM, the students by name; all from the same
    noises.

    "map error" is the mean L2 distance, in sample space, to the teacher's output at its largest number of steps from
    the same noise. It is defined where the noise decides the sample: DDIM at any number of steps, a student at one, or
    if no fresh noise is added between its steps (then a perfect student of several steps does not have 0: splam.py,
    section 5). A student that was distilled at another resolution shares no noise with its teacher, and has none.
    "ms/sample" is the time of all, "network" the part of it that as many bare network calls take.
    """
    teacher, reference, rows, endpoint = evaluation.model, evaluation.reference, [], None
    # A data set's files are sorted by class, so that its first samples would all be of one.
    plan = [("teacher, DDIM", teacher, n, w) for n in sorted(teacher_steps, reverse=True)]
    plan += [(name, student, n, 0.0) for name, student in students.items() for n in sorted(steps)]
    for name, model, n, _ in plan:  # all are checked before the first takes its time
        sample.check_steps(model, n, timesteps=evaluation.student_options(model, n)["timesteps"])
        refuse(model.kind != teacher.kind, f"{name} makes {model.kind}, and its teacher {teacher.kind}")
        refuse(model.null_label != teacher.null_label, f"{name} and its teacher know different numbers of classes")
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(evaluation.seed))
    shown = reference[order[: preview(teacher)[0]]]
    samples = {"data": to_range(shown) if shown.dtype == torch.uint8 else shown}
    try:
        rows.append({"sampler": "held-out data", **evaluation.held_out_data()})
    except BadInput as error:  # many folders of images have no split to be held out; the rest of the table can be made
        logging.getLogger("evaluate").warning("no row of held-out data: %s", error)
    for name, model, n, guidance in plan:
        x, values = evaluation.sampler(model, n, guidance, samples_dir)
        rows.append({"sampler": name, "steps": n, **values})
        # The teacher's largest number of steps comes first, and is what the others are compared with.
        if endpoint is None and model is teacher:
            endpoint = x
        elif endpoint is not None and (model is teacher or n == 1 or not evaluation.eta) and x.shape == endpoint.shape:
            rows[-1]["map error"] = (x - endpoint).flatten(1).norm(dim=1).mean().item()
        options = evaluation.student_options(model, n)
        share = "" if options["eta"] == 1 else f", η = {options['eta']:g}"
        samples[f"{name}, {n_steps(n, options['timesteps'])}{share}"] = x
    count = f"{len(evaluation.seeds)} samples a row, in batches of {evaluation.batch_size}"
    count += f", η = {evaluation.eta:g}" if evaluation.eta != 1 else ""
    count += f", students' times {', '.join(map(str, evaluation.timesteps))}" if evaluation.timesteps else ""
    against = f"{len(reference)} samples of {evaluation.data} ({evaluation.split})"
    names = [measure.name for measure in evaluation.measures]
    return Comparison(rows, samples, f"{count}, against {', '.join([against, *names])}")


def print_rows(rows: Sequence[dict]) -> None:
    """A line for each row, under the names of all columns."""
    # A dict keeps the order of its keys: columns appear as they first do in the rows, which need not all have them.
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns]
    for row in rows:
        values = [row.get(column, "-") for column in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(rest, widths[1:], strict=True))]))


def print_comparison(comparison: Comparison) -> None:
    """The table, and below it what one must know to compare it with another."""
    print_rows(comparison.rows)
    print(f"{comparison.reference}; {machine()}")


def machine() -> str:
    """What the numbers were measured on: seconds mean nothing without it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


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
    prompts = read_prompts(args.prompts)  # what is no file comes back as it is
    refuse(args.protocol and prompts == args.prompts, "a --protocol needs its captions: --prompts FILE, one a line")
    refuse(args.num_samples == 1, "--num_samples must be 2 or more: distances compare many samples, and MMD pairs")
    folder = Path(args.students[0])
    record = folder / "metrics.json"
    trained_with = read_json(record).get("configuration") if record.is_file() else {}
    refuse(not isinstance(trained_with, dict), f"{record} has no configuration of a student")
    kinds = {"pretrained_teacher_model": str, "data": str, "guidance_w": (int, float)}
    for name, kind in kinds.items():
        if getattr(args, name) is None:
            value = trained_with.get(name)
            unknown = not isinstance(value, kind) or value != value  # missing, or edited; nan is not itself
            refuse(unknown, f"{record} does not say with which --{name} the student was distilled")
            setattr(args, name, trained_with[name])
    # Of several students each is named by its folder, or the rows could not be told apart.
    device, alone = training.process().device, len(args.students) == 1
    students = {"student" if alone else name: load(name).to(device) for name in args.students}
    refuse(args.steps and args.timesteps, "--timesteps says how many steps there are: leave --steps out")
    steps = [len(args.timesteps)] if args.timesteps else args.steps or [1, 2, 4]
    most = max(steps) if any(student.is_student for student in students.values()) else 0  # of a student
    refuse(args.timesteps and not most, "--timesteps are for students: a teacher's DDIM has its own")
    refuse(args.eta != 1 and most < 2, "--eta is for students of several steps: no others add noise")
    teacher = load(args.pretrained_teacher_model).to(device)
    k, times = trained_with.get("k", 100), len(teacher.schedule)
    refuse(not isinstance(k, int) or not 0 < k < times, f"{record}: k is {k}, and the teacher has {times} times")
    same = "data num_samples split features clip_model resolution seed batch_size mixed_precision eta timesteps".split()
    options = {name: getattr(args, name) for name in same}
    evaluation = Evaluation(teacher, prompts=prompts, **options)
    teacher_steps = [1, 2, 4, teacher.many_steps] if args.teacher_steps is None else args.teacher_steps
    comparison = compare(evaluation, students, steps, teacher_steps, args.guidance_w, args.samples_dir)
    print_comparison(comparison)  # before anything is written, which may fail: hours of sampling must not be lost
    # Not a folder of a hub id's own name: from then on, that name would mean the folder.
    results = folder if folder.is_dir() else Path("runs") / folder.name
    out = sample.output_file(results / "evaluation.png", ".png")
    overview(teacher, comparison.samples, k).save(out)
    result = {"rows": comparison.rows, "reference": comparison.reference, "machine": machine(), "flags": vars(args)}
    out.with_suffix(".json").write_text(json.dumps(result, indent=2))
    print(f"{out}  {out.with_suffix('.json')}")


# ---------------------------------------------------------------------------------------------------------------------
# The approximated error, Fig. 2(c)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def approximated_errors(model: DiffusionModel, x0: Tensor, cond: dict, noise: Tensor, times: list, w: float) -> Tensor:
    """The mean square of f(x_t, t) - f(x_t', t') for neighbours t, t' in `times`: what Eq. 6 leaves, by t.

    A consistency function would have 0 everywhere. The paper adds these errors up along a trajectory to bound the
    error of the whole, which is why it wants each to be small. Neighbours on a trajectory are simulated as for its
    figure: the same noise on the same x_0. (toy/fig2c_error.py takes true neighbours.)
    """

    # A generator, so that only two predictions are in memory: the one for t and that for its neighbour.
    def predictions() -> Iterator[Tensor]:
        for time_step in times:
            t = torch.full((len(x0),), time_step, device=x0.device)
            alpha, sigma = model.schedule.at(t, x0.ndim)
            yield model.predict(alpha * x0 + sigma * noise, t, cond, w)[0]

    return torch.stack([(a - b).square().mean().cpu() for a, b in itertools.pairwise(predictions())])


def error(args: argparse.Namespace) -> None:
    """The subcommand: a curve for each model, printed, plotted, and written as .json. All see the same data and
    noise."""
    from toy import plots

    out, device, size = sample.output_file(args.out, ".png"), training.process().device, args.batch_size or 100
    models = [load(name).to(device) for name in dict.fromkeys(args.models)]  # each once: sums below are kept by name
    sizes = {model.shape for model in models}
    refuse(len(sizes) > 1, f"models of different sizes have no data in common: {sorted(sizes)}")
    args.data = args.data or models[0].default_data
    refuse(args.data is None, "--data is missing: a folder of images, or images with captions")
    times = list(range(len(models[0].schedule) - 1, 99, -args.interval))  # not below 100, as in the paper's figure
    refuse(len(times) < 2, f"--interval {args.interval} leaves no neighbours")
    count, means = math.ceil(args.num_samples / size), {model.name: 0 for model in models}
    batches = training.stream_batches(models[0].dataset(args), 0, batch_size=size, seed=args.seed)
    for i, (data, label) in zip(trange(count, unit="batch", leave=False), batches, strict=False):
        x0, _ = models[0].prepare(data.to(device), label.to(device))
        # A CPU's generator, with a seed for each batch: the same noise on every device and for every model.
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed + i)).to(device)
        for model in models:
            w = 0.0 if model.is_student else args.guidance_w  # a student's guidance is in its weights
            with training.autocast(device, args.mixed_precision):
                cond = model.condition(label.to(device))
                means[model.name] += approximated_errors(model, x0, cond, noise, times, w) / count
    times = times[:-1]  # an error belongs to the noisier of two neighbours
    curves = {name: squares.sqrt().tolist() for name, squares in means.items()}
    label = f"RMS of f(x_t, t) - f(x_t-{args.interval}, t-{args.interval})"
    lines = {name: (times, values, None) for name, values in curves.items()}
    plots.curves(plots.Panel("approximated error", "t", label, lines)).save(out)
    out.with_suffix(".json").write_text(json.dumps({"t": times, **curves}))
    shown = range(0, len(times), math.ceil(len(times) / 8))  # at most eight columns
    print_rows([{"model": name, **{f"t={times[i]}": values[i] for i in shown}} for name, values in curves.items()])
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
    flag = t.add_argument
    flag("students", nargs="+", help="pipeline folders or hub ids; the first gets the results, or runs/")
    flag("--steps", type=training.positive, nargs="+", help="of the students (default and paper: 1 2 4)")
    # With many steps the teacher costs most of the time, and may be known already. So it can be left out.
    flag("--teacher_steps", type=training.positive, nargs="*", help="DDIM's, or none (default 1 2 4 50; points 1000)")
    flag("--pretrained_teacher_model", help="default: the one that the first student was distilled from")
    flag("--guidance_w", type=training.finite, help="of the teacher (default: as it was distilled with)")
    flag("--data", help="the reference set (default: what the first student was distilled with)")
    flag("--split", default="train", help="of the data, the reference set")
    flag("--protocol", choices=PROTOCOLS, help="a published one, printed below")
    flag("--features", default="inception", help='"inception", or a file of toy/features.py')
    flag("--clip_model", help="for a CLIP score: architecture/weights of open_clip")
    flag("--resolution", type=training.positive, help="of all images (default: the model's own)")
    flag("--num_samples", type=training.positive, default=5000, help="a row")
    flag("--samples_dir", help="keep the images here; what an interrupted evaluation left is used again")
    sample.add_student_arguments(t)
    add_arguments(t)
    e = programs.add_parser("error", help="neighbouring predictions, Fig. 2(c)", formatter_class=training.Help)
    flag = e.add_argument
    flag("models", nargs="+", help="pipeline folders or hub ids, of students and teachers")
    flag("--interval", type=training.positive, default=20, help="between neighbours, in time steps; paper: 20")
    flag("--guidance_w", type=training.finite, default=0.0, help="of the teachers among the models")
    flag("--num_samples", type=training.positive, default=1000, help="paper: 1000")
    flag("--out", default="runs/error.png", help="the plot; the numbers are written beside it as .json")
    training.add_data_arguments(e)
    add_arguments(e)
    return p


@program
def main() -> None:
    """Reads a protocol's flags between the name of the program and what was typed, which so has the last word."""
    typed = sys.argv[1:]
    first, _ = parser().parse_known_args(typed)  # a first look, for --protocol
    protocol = PROTOCOLS.get(getattr(first, "protocol", None), "").split()
    args = parser().parse_args([typed[0], *protocol, *typed[1:]])
    {"table": table, "error": error}[typed[0]](args)


if __name__ == "__main__":
    main()
