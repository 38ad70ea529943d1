"""How good is a student, and how fast? Four programs:

python evaluate.py STUDENT ...      the table: distances to data and teacher, prompts that were understood, time
python evaluate.py error MODEL ...  the approximated error of Fig. 2(c), by time step
python evaluate.py throughput ...   speed, memory and parts of a training step; the flags are distill.py's
python evaluate.py features ...     trains a classifier whose features stand in for Inception's, without a download
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import training
from comparison import compare, machine, network_seconds, print_table
from data import BadInput, Images, load_images, program, read_prompts, writable_folder
from distill import Distillation, configure, forward_passes, parser
from kinds import Teacher
from teacher import load
from toy import plots

PROTOCOLS = {  # as the literature does it: --data is the folder of the whole validation set, --prompts the captions
    # Imagen's zero-shot FID-30k; all images are brought to 256 pixels by LANCZOS, for CLIP too, as GigaGAN does.
    "coco2014-30k": {"num_samples": 30000, "resolution": 256, "clip_model": "ViT-g-14/laion2b_s12b_b42k"},
    # FID-5k of guided distillation (Meng et al.): at the size that the model makes.
    "coco2017-5k": {"num_samples": 5000, "clip_model": "ViT-g-14/laion2b_s12b_b42k"},
}


def table() -> None:
    p = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Print the table of students and their teacher. Others: evaluate.py error, throughput, features.",
        epilog=training.recipe_text("Protocols, of which a flag that is given replaces its part", PROTOCOLS),
        formatter_class=training.Help,
    )
    p.add_argument("students", nargs="+", help="pipeline folders or hub ids; the results are written into the first")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the students (paper: 1, 2, 4)")
    p.add_argument("--teacher_steps", type=int, nargs="*", help="of DDIM; empty for no teacher")
    p.add_argument("--pretrained_teacher_model", help="default: the one that the first student was distilled from")
    p.add_argument("--data", help="the reference set; default: what the first student was distilled with")
    p.add_argument("--split", default="train", help="of the data, the reference set")
    p.add_argument("--protocol", choices=PROTOCOLS, help="a published one, printed below")
    p.add_argument("--features", default="inception", help='"inception", or a network exported by torch.export (.pt2)')
    p.add_argument("--clip_model", help="for a CLIP score: architecture/weights of open_clip")
    p.add_argument("--resolution", type=int, help="to which all images are brought; default: the model's own")
    p.add_argument("--num_samples", type=int, help="a row")
    p.add_argument("--samples_dir", help="keep the images here; what an interrupted evaluation left is used again")
    p.add_argument("--seed", type=int, default=0, help="of the first sample")
    p.add_argument("--guidance_w", type=float, help="of the teacher; default: the one it was distilled with")
    p.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    p.add_argument("--batch_size", type=int, help="default: by kind of model")
    p.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no")
    first, _ = p.parse_known_args()
    p.set_defaults(**PROTOCOLS.get(first.protocol, {}))
    args = p.parse_args()
    training.check_positive(args, "num_samples", "batch_size", "resolution")
    if args.protocol and not args.prompts:
        raise BadInput(f"--protocol {args.protocol} needs its captions: --prompts FILE, one a line")
    folder = Path(args.students[0])
    record = folder / "metrics.json"
    trained_with = json.loads(record.read_text())["configuration"] if record.is_file() else {}
    for name in ("pretrained_teacher_model", "data", "guidance_w"):
        if getattr(args, name) is None:
            if name not in trained_with:
                raise BadInput(f"{record} does not say with which --{name} the student was distilled; please give it")
            setattr(args, name, trained_with[name])
    device = training.process().device
    students, teacher = {name: load(name).to(device) for name in args.students}, load(args.pretrained_teacher_model)
    comparison = compare(
        students if len(students) > 1 else {"student": students[args.students[0]]},
        teacher.to(device),
        args.data,
        steps=args.steps,
        teacher_steps=teacher.evaluation["teacher_steps"] if args.teacher_steps is None else args.teacher_steps,
        num_samples=args.num_samples or teacher.evaluation["num_samples"],
        features=args.features,
        clip_model=args.clip_model,
        resolution=args.resolution,
        split=args.split,
        seed=args.seed,
        w=args.guidance_w,
        prompts=read_prompts(args.prompts),
        batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
        samples_dir=args.samples_dir,
    )
    print_table(comparison)
    writable_folder(folder)
    teacher.overview(comparison.samples, trained_with.get("k", 100)).save(folder / "evaluation.png")
    result = {"rows": comparison.rows, "reference": comparison.reference, "machine": machine(), "flags": vars(args)}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2))
    print(f"{folder}/evaluation.png  {folder}/evaluation.json")


# ---------------------------------------------------------------------------------------------------------------------
# The approximated error, Fig. 2(c)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def approximated_errors(
    model: Teacher, x0: Tensor, cond: dict[str, Tensor], noise: Tensor, times: list[int], w: float
) -> Tensor:
    """The mean square of f(x_t, t) - f(x_t', t') for neighbours t, t' in `times`: what Eq. 6 leaves.

    Neighbours on a trajectory are simulated as for the paper's figure: the same noise on the same x_0.
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


def error() -> None:
    p = argparse.ArgumentParser(
        prog="evaluate.py error",
        description="By time step, how far predictions of x_0 at neighbouring times are apart: Fig. 2(c).",
        formatter_class=training.Help,
    )
    p.add_argument("models", nargs="+", help="pipeline folders or hub ids, of students and teachers")
    training.add_data_arguments(p)
    p.add_argument("--num_samples", type=int, default=1000, help="paper: 1000")
    p.add_argument("--interval", type=int, default=20, help="between neighbours, in time steps; paper: 20")
    p.add_argument("--guidance_w", type=float, default=0.0, help="of the teachers among the models")
    p.add_argument("--seed", type=int, default=0, help="of data and noise")
    p.add_argument("--batch_size", type=int, default=100)
    p.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no")
    p.add_argument("--out", default="runs/error.png", help="the plot; the numbers are written beside it as .json")
    args = p.parse_args()
    training.check_positive(args, "num_samples", "interval", "batch_size")
    out, device = Path(args.out), training.process().device
    writable_folder(out.parent)
    models = [load(name).to(device) for name in args.models]
    args.data = args.data or models[0].default_data
    if args.data is None:
        raise BadInput("--data is missing: a folder of images, or images with captions")
    times = list(range(len(models[0].schedule) - 1, 99, -args.interval))  # not below 100, as the paper
    if len(times) < 2:
        raise BadInput(f"--interval {args.interval} leaves no neighbours")
    count, curves = -(-args.num_samples // args.batch_size), {model.name: 0 for model in models}
    batches = training.stream_batches(models[0].dataset(args), 0, batch_size=args.batch_size, seed=args.seed)
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
        print(name.ljust(width), *(f"{value:8.4g}" for value in values[:: -(-len(values) // 8)]))
    print(f"{count * args.batch_size} samples of {args.data}; {machine()}; {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory of training
# ---------------------------------------------------------------------------------------------------------------------

WARM_UP = 3  # steps


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Counts the seconds that methods take, by the part of a training step that they belong to."""

    def __init__(self):
        self.seconds = Counter()

    def watch(self, owner: object, method: str, part: str) -> None:
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            begin = now()
            result = original(*args, **kwargs)
            self.seconds[part] += now() - begin
            return result

        setattr(owner, method, timed)


def peak_memory() -> float:
    """GiB: of an accelerator if there is one, else of the process."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def throughput() -> None:
    p = parser()
    p.prog, p.usage = "evaluate.py throughput", "evaluate.py throughput [flags]"
    p.description = "Measure a training step of distill.py, with the same flags: speed, memory, and where time goes."
    p.add_argument("--timed_steps", type=int, default=10)
    p.set_defaults(output_dir="runs/throughput")
    args, teacher = configure(p)
    if args.timed_steps < 2:
        raise BadInput("--timed_steps must be 2 or more, for their deviation")
    args.max_train_steps = WARM_UP + 2 * args.timed_steps
    distillation = Distillation(args, teacher)
    run, watch, seconds = distillation.run, Stopwatch(), []
    for step, batches in run:
        if step == WARM_UP + args.timed_steps + 1:  # separately, since every look at a GPU's clock makes it wait
            for owner, method, part in (
                (teacher, "prepare", "VAE and text"),
                (teacher, "predict", "teacher"),
                (distillation.target, "forward", "target"),
                (run.model, "forward", "student"),
                (run.accelerator, "backward", "student"),
                (run.accelerator, "clip_grad_norm_", "optimizer"),
                (run.optimizer, "step", "optimizer"),
            ):
                watch.watch(owner, method, part)
        begin = now()
        distillation.step(step, batches)
        seconds.append(now() - begin)
    timed, watched = seconds[WARM_UP:][: args.timed_steps], seconds[WARM_UP + args.timed_steps :]
    whole, split = statistics.mean(timed), statistics.mean(watched)
    parts = {part: total / args.timed_steps for part, total in watch.seconds.items()}
    parts["data, EMA and others"] = split - sum(parts.values())
    passes = forward_passes(args)
    forward = network_seconds(teacher, args.train_batch_size, args.mixed_precision)
    model = passes * forward * args.gradient_accumulation_steps
    result = {
        "images/s": run.total_batch_size / whole,
        "seconds a step": whole,
        "standard deviation": statistics.stdev(timed),
        "parts": parts,
        "peak memory, GiB": peak_memory(),
        "forward passes": passes,
        "seconds a forward pass": forward,
        "ratio to the cost model": whole / model,
        "machine": machine(),
        "flags": vars(args),
    }
    if not run.accelerator.is_main_process:
        return
    (run.folder / "throughput.json").write_text(json.dumps(result, indent=2))
    print(f"{result['images/s']:.4g} images/s, {whole:.4g} ± {result['standard deviation']:.2g} s a step", end="")
    print(f" of {run.total_batch_size}; peak memory {result['peak memory, GiB']:.3g} GiB; {machine()}")
    for part, value in parts.items():
        print(f"{part:22} {value:8.4f} s  {100 * value / split:3.0f} %")
    print(f"cost model: {passes} forward passes of {forward:.4g} s = {model:.4g} s; ratio {whole / model:.3f}")


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
    p.add_argument("--resolution", type=int, help="images are resized and cropped to it; default: their own")
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
    images = load_images(args.data, "train", args.resolution, mirror=True)
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
    torch.export.save(exported, draft, extra_files={"classes": json.dumps(images.classes)})
    draft.replace(out)
    print(f"test accuracy {100 * result:.2f} % on {len(test.labels)} images; {out}")


PROGRAMS = {"error": error, "throughput": throughput, "features": features}


@program
def main() -> None:
    if named := PROGRAMS.get(sys.argv[1] if len(sys.argv) > 1 else ""):
        del sys.argv[1]
        named()
    else:
        table()


if __name__ == "__main__":
    main()
