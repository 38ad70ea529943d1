"""How good is a student? Distances to data and to the teacher, network evaluations and time per sample.

`python evaluate.py STUDENT` prints the table. `python evaluate.py features` trains the small classifier whose features
stand in for Inception's where nothing can be downloaded.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

import training
from data import BadInput, Images, load_images, program, read_prompts, writable_folder
from kinds import Teacher, to_pixels
from sample import sample
from teacher import load

log = logging.getLogger("evaluate")
logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # a file that cannot be read is reported here, in one line

# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of samples
# ---------------------------------------------------------------------------------------------------------------------


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 (rooted, in data units) of two equally large sets of points (n, d), by optimal assignment."""
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def mmd(a: Tensor, b: Tensor) -> float:
    """RBF maximum mean discrepancy (rooted, unbiased before the root), the mean of the bandwidths 0.1, 0.3 and 1."""
    n, total = len(a), 0.0
    aa, bb, ab = (torch.cdist(p.double(), q.double()).square() for p, q in ((a, a), (b, b), (a, b)))
    for bandwidth in (0.1, 0.3, 1.0):
        kernel_aa, kernel_bb, kernel_ab = ((-d / (2 * bandwidth**2)).exp() for d in (aa, bb, ab))
        inside = (kernel_aa.sum() + kernel_bb.sum() - 2 * n) / (n * (n - 1))
        total += (inside - 2 * kernel_ab.mean()).item() / 3
    return max(total, 0.0) ** 0.5


class PointDistances:
    """W2 and MMD of 2-D points to reference points."""

    name = "the points themselves"

    def __init__(self, reference: Tensor):
        self.reference = reference

    def __call__(self, samples: Tensor) -> dict[str, float]:
        n = min(len(samples), len(self.reference), 2048)  # the assignment costs n³
        reference = self.reference[:n]
        return {"W2": wasserstein2(samples[:n], reference), "MMD": mmd(samples[:n], reference)}


class FrechetDistance:
    """Fréchet distance by torch-fidelity, on its Inception ("inception": FID) or on an exported network (.pt2: FD).

    An exported network maps uint8 images (B, 3, H, W) to (features (B, D), logits). Its file holds a graph, not code,
    and torch.load, forbidden to execute any (data.py), takes only tensors from it.
    """

    def __init__(self, features: str, reference: Tensor, device: torch.device):
        self.name, self.device = features, device
        try:
            if features == "inception":
                cuda = device.type == "cuda"
                self.extractor = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False)
            else:
                self.extractor = torch.export.load(features).module().to(device)
        except Exception as error:  # a missing file, no network, or a file of another kind, each with its own type
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"cannot load the feature extractor {features}: {reason}") from error
        self.reference = self._statistics(reference)

    @torch.no_grad()
    def _statistics(self, pixels: Tensor) -> dict:
        batches = tqdm(pixels.split(250), desc="features", unit="batch", leave=False, mininterval=1)
        features = [self.extractor(batch.to(self.device))[0].float().cpu() for batch in batches]
        return fid_features_to_statistics(torch.cat(features))

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """`samples` are x_0 in [-1, 1], or uint8 images."""
        pixels = samples if samples.dtype == torch.uint8 else torch.from_numpy(to_pixels(samples)).permute(0, 3, 1, 2)
        metric = fid_statistics_to_metric(self._statistics(pixels), self.reference, verbose=False)
        return {"FID" if self.name == "inception" else "FD": metric["frechet_inception_distance"]}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A table, one dictionary a row; a batch of samples for each row; and what they were measured against."""

    rows: list[dict]
    samples: dict[str, Tensor]
    reference: str


def compare(
    student: Teacher,
    teacher: Teacher,
    data: str,
    *,
    steps: Sequence[int],
    teacher_steps: Sequence[int],
    num_samples: int,
    features: str = "inception",
    split: str = "train",
    seed: int = 0,
    w: float = 0.0,
    prompts: Sequence[str] = (),
    batch_size: int = 1024,
    mixed_precision: str = "no",
) -> Comparison:
    """Rows: held-out data (the floor), the teacher by DDIM, the student; every sampler from the same seeds.

    "map error" is the mean L2 distance, in sample space, to the teacher's output at its largest number of steps from
    the same noise. It is defined for maps of the noise: DDIM at any number of steps, the student at one.
    """
    reference = student.reference(data, split)
    if reference.ndim == 2:
        distances = PointDistances(reference)
    else:
        distances = FrechetDistance(features, reference, student.network.device)
    shown = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))[:num_samples]
    points = reference.ndim == 2
    samples, rows = {"data": reference[shown] if points else reference[shown] / 127.5 - 1}, []
    try:
        held_out = student.reference(data, "train" if split == "test" else "test")
        rows.append({"sampler": "held-out data", **distances(held_out[spread(len(held_out), num_samples)])})
    except BadInput as error:
        log.warning("no row of held-out data: %s", error)
    plan = [("teacher, DDIM", teacher, n, w) for n in sorted(teacher_steps, reverse=True)]
    plan += [("student", student, n, 0.0) for n in sorted(steps)]
    endpoint = None
    for name, model, n, guidance in plan:
        begin = time.perf_counter()
        seeds = range(seed, seed + num_samples)
        x = sample(model, seeds, n, w=guidance, prompts=prompts, batch_size=batch_size, mixed_precision=mixed_precision)
        seconds = time.perf_counter() - begin
        row = {"sampler": name, "steps": n, "evaluations": n * (2 if guidance else 1), **distances(x)}
        if endpoint is None and model is teacher:
            endpoint = x
        elif endpoint is not None and (model is teacher or n == 1):
            row["map error"] = (x - endpoint).flatten(1).norm(dim=1).mean().item()
        rows.append({**row, "ms/sample": 1000 * seconds / num_samples})
        samples[f"{name}, {n} step{'s' * (n > 1)}"] = x
    against = f"{len(reference)} samples of {data} ({split}), features: {distances.name}"
    return Comparison(rows, samples, f"{num_samples} samples a row, in batches of {batch_size}, against {against}")


def spread(length: int, n: int) -> Tensor:
    """At most n indices below `length`, evenly spread, because the files of a data set are sorted by class."""
    return torch.linspace(0, length - 1, min(length, n)).long()


def print_table(comparison: Comparison) -> None:
    columns = list(dict.fromkeys(column for row in comparison.rows for column in row))
    lines = [columns]
    for row in comparison.rows:
        values = [row.get(column, "-") for column in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(rest, widths[1:], strict=True))]))
    print(f"{comparison.reference}; {machine()}")


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def evaluate() -> None:
    p = argparse.ArgumentParser(prog="evaluate.py", description="Print the table of a student and its teacher.")
    p.add_argument("student", help='pipeline folder, or "features" for what "evaluate.py features --help" tells')
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the student (paper: 1, 2, 4)")
    p.add_argument("--teacher_steps", type=int, nargs="*", help="of DDIM; empty for no teacher")
    p.add_argument("--pretrained_teacher_model", help="default: the one that the student was distilled from")
    p.add_argument("--data", help="default: the data that the student was distilled with")
    p.add_argument("--split", default="train", help="of the data, the reference set")
    p.add_argument("--features", default="inception", help='"inception", or a network exported by torch.export (.pt2)')
    p.add_argument("--num_samples", type=int)
    p.add_argument("--seed", type=int, default=0, help="of the first sample")
    p.add_argument("--guidance_w", type=float, help="of the teacher; default: the one it was distilled with")
    p.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    p.add_argument("--batch_size", type=int, default=1024)
    p.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no")
    args = p.parse_args()
    folder = Path(args.student)
    record = folder / "metrics.json"
    trained_with = json.loads(record.read_text())["configuration"] if record.is_file() else {}
    for name in ("pretrained_teacher_model", "data", "guidance_w"):
        if getattr(args, name) is None:
            if name not in trained_with:
                raise BadInput(f"{record} does not say with which --{name} the student was distilled; please give it")
            setattr(args, name, trained_with[name])
    device = training.process().device
    student, teacher = load(args.student).to(device), load(args.pretrained_teacher_model).to(device)
    comparison = compare(
        student,
        teacher,
        args.data,
        steps=args.steps,
        teacher_steps=teacher.evaluation["teacher_steps"] if args.teacher_steps is None else args.teacher_steps,
        num_samples=args.num_samples or teacher.evaluation["num_samples"],
        features=args.features,
        split=args.split,
        seed=args.seed,
        w=args.guidance_w,
        prompts=read_prompts(args.prompts),
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
    )
    print_table(comparison)
    writable_folder(args.student)
    teacher.overview(comparison.samples, trained_with.get("k", 100)).save(folder / "evaluation.png")
    result = {"rows": comparison.rows, "reference": comparison.reference, "machine": machine(), "flags": vars(args)}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2))
    print(f"{folder}/evaluation.png  {folder}/evaluation.json")


# ---------------------------------------------------------------------------------------------------------------------
# Features without a download
# ---------------------------------------------------------------------------------------------------------------------


def _convolution(inside: int, outside: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """A small residual network: pixels 0..255 (B, 3, H, W) -> (features (B, 256), logits (B, classes))."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, 32),
            _convolution(32, 64, pool=True),
            Residual(_convolution(64, 64), _convolution(64, 64)),
            _convolution(64, 128, pool=True),
            _convolution(128, 256, pool=True),
            Residual(_convolution(256, 256), _convolution(256, 256)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels.float() / 127.5 - 1)
        return features, self.head(features)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Images, device: torch.device) -> float:
    right = 0
    for pixels, labels in zip(images.samples.split(250), images.labels.split(250), strict=True):
        right += (classifier(pixels.to(device))[1].argmax(1).cpu() == labels).sum().item()
    return right / len(images.labels)


def features() -> None:
    p = argparse.ArgumentParser(prog="evaluate.py features", description="Train a classifier and export its features.")
    p.add_argument("--data", required=True, help="folder of images with the splits train and test")
    p.add_argument("--out", required=True, help="the exported network, .pt2")
    training.add_arguments(p)
    p.set_defaults(
        output_dir="runs/features",
        max_train_steps=3200,
        train_batch_size=128,
        learning_rate=4e-3,
        adam_weight_decay=0.02,
        lr_scheduler="cosine",
        lr_warmup_steps=300,
        mixed_precision="bf16",
    )
    args = p.parse_args()
    out = Path(args.out)
    writable_folder(out.parent)
    set_seed(args.seed)  # of the initial weights
    images = load_images(args.data, "train", mirror=True)
    test = load_images(args.data, "test", resolution=images.samples.shape[-1])
    run = training.Run(args, Classifier(len(images.classes)), images, averages={})

    def loss_of(x: Tensor, label: Tensor, dx: int, dy: int) -> Tensor:
        x = nn.functional.pad(x, (4, 4, 4, 4), mode="reflect").roll((dy, dx), (2, 3))[:, :, 4:-4, 4:-4]
        _, logits = run.model((x + 1) * 127.5)
        return cross_entropy(logits.float(), label, label_smoothing=0.1)

    for step, batches in run:
        shift = torch.randint(-4, 5, (2,), generator=run.generator(step)).tolist()
        run.log(step, loss=run.optimize(loss_of(x, label, *shift) for x, label in batches))
        run.checkpoint(step)
    classifier = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    result = accuracy(classifier, test, run.accelerator.device)
    exported = torch.export.export(
        classifier.cpu(), (images.samples[:2],), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
    )
    draft = out.with_name(out.name + ".tmp.pt2")
    torch.export.save(exported, draft)
    draft.replace(out)
    print(f"test accuracy {100 * result:.2f} % on {len(test.labels)} images; {out}")


@program
def main() -> None:
    if sys.argv[1:2] == ["features"]:
        del sys.argv[1]
        features()
    else:
        evaluate()


if __name__ == "__main__":
    main()
