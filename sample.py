"""Few-step sampling of students, many-step sampling of teachers from the same noise, and pictures of both.

    python sample.py runs/cifar-student --steps 4 --out samples.png
    python sample.py TEACHER STUDENT --steps 1 2 4 --prompts "a photo of a cat" --out grid.png

The noise of sample i follows from the seed `--seed` + i alone: not from its batch, its device or the model. So the rows
of a picture show what different models make of the same noise, and a folder of 30,000 images can be filled up.
"""

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

import training
from cli import Parser, count, finite, output_file, positive, program, read_prompts, refuse, writable_folder
from data import to_range, to_tensor
from splam import ConsistencyFunction, few_step_sample, few_step_times
from teacher import LOAD_OPTIONS, DiffusionModel, load

# ---------------------------------------------------------------------------------------------------------------------
# Samplers
#
# Each takes a model, its noise, times that fall from N-1, the condition and the guidance scale. It yields after each
# evaluation of the network; the last tensor (B, ...) is the sample.
#
# The teacher's knows α and σ, and nothing else of the teacher's own scheduler. That one may add noise, clip x_0 or have
# other times. It would make samples of another ODE than the one that is distilled.
# ---------------------------------------------------------------------------------------------------------------------


class SeededNoise:
    """Standard normal noise (B, ...), each sample's from a generator of its own; every call continues them.

    The generators are the CPU's, because a GPU's give other numbers for the same seed. One generator for a whole batch
    would be faster, but then a sample would depend on its neighbours, and on the batch size.
    """

    def __init__(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device)


def lcm(model: DiffusionModel, noise: SeededNoise, times: Sequence[int], cond: dict, w: float) -> Iterator[Tensor]:
    """A student's sampler, Eq. 19 repeated. Its guidance is in its weights; or in `cond`, if it takes w."""
    student = ConsistencyFunction(model.network, model.schedule, model.prediction_type)
    return few_step_sample(student, model.schedule, noise(), times, noise, **cond)


def ddim(model: DiffusionModel, noise: SeededNoise, times: Sequence[int], cond: dict, w: float) -> Iterator[Tensor]:
    """The same loop with ε̂ in the place of fresh noise: x_s = α_s x̂_0 + σ_s ε̂, an Euler step along the PF-ODE
    (splam.py, section 1). The last step goes all the way, to x̂_0.

    diffusers' DDIMScheduler has the same times, if its spacing is "trailing". But its steps are N // n long, which is
    wrong if n does not divide N.
    """
    x, x0, eps = noise(), None, None
    for time in times:
        t = torch.full((len(x),), time, device=x.device)
        if x0 is not None:
            alpha, sigma = model.schedule.at(t, x.ndim)
            x = alpha * x0 + sigma * eps
        x0, eps = model.predict(x, t, cond, w)
        yield x0


def sampling_times(model: DiffusionModel, steps: int) -> list[int]:
    """A student's are LCM's, on the grid of its training. A teacher's divide all of N evenly, up to rounding. Both
    begin at N-1, where x is taken for pure noise; diffusers calls such times "trailing"."""
    n = len(model.schedule)
    if model.is_student:
        return few_step_times(steps, n, model.original_inference_steps)
    stops = np.arange(n, 0, -n / steps)[:steps]  # floats may give one stop too many, at 0
    return [int(stop) - 1 for stop in np.round(stops)]


# ---------------------------------------------------------------------------------------------------------------------
# Samples of a model
# ---------------------------------------------------------------------------------------------------------------------


def check_steps(model: DiffusionModel, steps: int, timesteps: Sequence[int] = (), w: float = 0.0) -> None:
    """Refuses what would be sampled without an error, and be bad: more steps than there are times; times at which the
    model was not trained, or of which the first is not that of pure noise; guidance that it cannot have."""
    limit = model.original_inference_steps if model.is_student else len(model.schedule)
    refuse(not 1 <= steps <= limit, f"{model.name} takes 1 to {limit} steps, not {steps}")
    grid = sampling_times(model, limit)
    falling = sorted({*timesteps} & {*grid}, reverse=True)
    wrong = timesteps and (falling != list(timesteps) or falling[0] != grid[0] or len(falling) != steps)
    refuse(wrong, f"--timesteps must be {steps} falling times of {grid[0]}, ... {grid[-1]}, the first {grid[0]}")
    # A student has its guidance in its weights, if its network does not take w beside t.
    refuse(w and not (model.takes_w if model.is_student else model.conditional), f"{model.name} cannot be guided")


@torch.no_grad()
def sample_batches(
    model, seeds, steps, *, w=0.0, timesteps=(), prompts=(), batch_size=None, mixed_precision="no"
) -> Iterator[Tensor]:
    """One sample of the DiffusionModel for each seed, decoded, batch by batch on the CPU.

    A model is sampled as it was made to be: a student jumps to x_0, a teacher knows the direction of the PF-ODE. `w`
    guides a teacher, and a student whose network takes w. `timesteps` are the times of the steps, as many as `steps`,
    if they are not to be sampling_times. Seed s takes prompt s, modulo their number. Without a `batch_size` it is the
    model's own.
    """
    sampler, size, labels = lcm if model.is_student else ddim, batch_size or model.batch_size, model.labels(prompts)
    check_steps(model, steps, timesteps, w)
    times = list(timesteps) or sampling_times(model, steps)
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    words = {"desc": title(model, steps, timesteps, w), "unit": "call", "leave": False}
    with tqdm(total=len(batches) * (steps + 1), **words) as bar:  # the last call for each batch is the decoder's
        for batch in batches:
            # The noise is float32 under autocast too: only products and convolutions are computed in half precision.
            with training.autocast(model.device, mixed_precision):
                noise = SeededNoise(model.shape, batch, model.device)
                cond = model.condition([labels[seed % len(labels)] for seed in batch], w if model.is_student else 0.0)
                for x in sampler(model, noise, times, cond, w):  # noqa: B007
                    bar.update()
                samples = model.decode(x).cpu()
            bar.update()
            yield samples


def sample(model: DiffusionModel, seeds: Sequence[int], steps: int, **options) -> Tensor:
    """`sample_batches` as one tensor, (len(seeds), ...)."""
    return torch.cat(list(sample_batches(model, seeds, steps, **options)))


def png(folder: Path, seed: int) -> Path:
    """Where the sample of a seed is kept."""
    return folder / f"{seed:06d}.png"


def read_png(folder: Path, seed: int) -> Tensor:
    """A sample that was saved as a picture: (3, H, W) in [-1, 1], of which 256 levels are left in each channel."""
    with Image.open(png(folder, seed)) as image:
        return to_range(to_tensor(image))


def sample_to_folder(model: DiffusionModel, seeds: Sequence[int], folder: Path, steps: int, **options) -> None:
    """Sample s becomes `folder`/s.png. Several processes share the work. BadInput if the folder holds other files.

    What is there already is kept, so that an interrupted call can go on. Nothing tells which model made it; so a
    warning says how many there are.
    """
    refuse(len(model.shape) == 1, "points are not kept in files: --out must end in .png")
    state, folder, names = training.process(), writable_folder(folder), {png(folder, seed).name for seed in seeds}
    found = {path.name.removesuffix(".tmp") for path in folder.iterdir() if not path.name.startswith(".")}
    refuse(found - names, f"{folder} holds other files than these samples: {', '.join(sorted(found - names)[:3])}")
    # Each process takes every n-th seed, and of those the ones that no earlier call has finished.
    share = seeds[state.process_index :: state.num_processes]
    missing = [seed for seed in share if not png(folder, seed).is_file()]
    if len(missing) < len(share):
        logging.getLogger("sample").warning("%s has %d samples, which are kept", folder, len(share) - len(missing))
    batches = sample_batches(model, missing, steps, **options)
    for seed, image in zip(missing, (image for batch in batches for image in batch), strict=True):
        draft = png(folder, seed).with_suffix(".png.tmp")  # renamed when complete: whatever is called .png is whole
        Image.fromarray(to_pixels(image[None])[0]).save(draft, "PNG")
        draft.replace(png(folder, seed))
    state.wait_for_everyone()  # the caller may read the samples of all processes next


# ---------------------------------------------------------------------------------------------------------------------
# Pictures. What a sample is shows in its shape: points are (B, 2), images (B, 3, H, W) in [-1, 1].
# ---------------------------------------------------------------------------------------------------------------------


def to_pixels(samples: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded as diffusers' image processor does. Without the rounding,
    `byte` would cut off, and images would be half a grey level darker than those that they are compared with."""
    return ((samples / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def preview(model: DiffusionModel) -> tuple[int, int]:
    """How many samples a picture of the model shows, and how many of them in a row: one for each of its default
    prompts, or of its classes (of few classes several). Of points it shows thousands, all in one panel, since only many
    together show a distribution."""
    if len(model.shape) == 1:
        return 4096, 4096
    kinds = len(model.labels([]))
    columns = kinds * max(1, 8 // kinds) if kinds <= 16 else 8  # a thousand classes would have no room
    return (columns if model.default_prompts else 64 // columns * columns), columns


def picture(samples: Tensor, columns: int = 8) -> Image.Image:
    """One picture of a batch of points or images."""
    if samples.ndim == 2:
        from toy import plots

        return plots.overview({f"{len(samples)} points": samples})
    from torchvision.utils import make_grid

    return Image.fromarray(to_pixels(make_grid(samples, columns, padding=1, pad_value=1)[None])[0])


def overview(model: DiffusionModel, panels: dict[str, Tensor], k: int = 100) -> Image.Image:
    """One picture of several batches under their names, drawn from the same noises: of images a row each, so that a
    column shows one noise. Of points a panel each, and the PF-ODE, if the model is a teacher, with a sub-path of length
    k."""
    if len(model.shape) == 1:
        from toy import plots

        noise = SeededNoise(model.shape, range(64), model.device)()
        cond = model.null_condition(len(noise)) if model.conditional else {}
        denoise = functools.partial(model.predict, cond=cond)
        return plots.overview(panels, None if model.is_student else plots.sub_path(denoise, model.schedule, noise, k))
    rows, size, columns = [], None, preview(model)[1]
    for name, samples in panels.items():
        row = picture(samples[:columns], columns)
        # Small images are enlarged, pixel by pixel. All rows get the size of the first, so that columns stay in line.
        size = size or tuple(side * max(1, 800 // row.width) for side in row.size)
        row = ImageOps.expand(row.resize(size, Image.Resampling.NEAREST), (0, 16, 0, 0), "white")
        ImageDraw.Draw(row).text((4, 2), name, fill="black")
        rows.append(np.asarray(row))
    return Image.fromarray(np.concatenate(rows))


def n_steps(n: int, timesteps: Sequence[int] = ()) -> str:
    """How a number of steps is written, in tables and pictures."""
    times = f" at t = {', '.join(map(str, timesteps))}" if timesteps else ""
    return ("1 step" if n == 1 else f"{n} steps") + times


def title(model: DiffusionModel, steps: int, timesteps: Sequence[int] = (), w: float = 0.0) -> str:
    """What samples are called: "runs/cifar-teacher, w = 2, 50 steps"."""
    return f"{model.name}{f', w = {w:g}' if w else ''}, {n_steps(steps, timesteps)}"


def slug(text: str) -> str:
    """The text as the name of a file, the same for a folder that was typed as ./runs/it/ or as runs/it."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: Parser) -> None:
    """Flags of every program that samples."""
    flag = parser.add_argument
    flag("--seed", type=count, default=0, help="of the first sample; the i-th has it plus i")
    flag("--prompts", nargs="+", default=[], help="texts, or a .txt file with one a line, or class labels")
    flag("--batch_size", type=positive, help="samples at a time (default: by kind of model)")
    flag("--mixed_precision", choices=list(training.DTYPES), default="no", help="of the networks")
    # LCM's times were chosen for Stable Diffusion's schedule. On another one others can be better (docs/images.md).
    flag("--timesteps", type=count, nargs="+", default=[], help="of a student, falling (default: LCM's, for --steps)")


def parser() -> Parser:
    """The flags of sample.py."""
    p = Parser(prog="sample.py", description="Sample students and teachers.")
    flag = p.add_argument
    flag("models", nargs="+", help="pipeline folders or hub ids")
    flag("--steps", type=positive, nargs="+", help="evaluations of students (default 4; paper: 1-4)")
    flag("--teacher_steps", type=positive, nargs="+", help="of teachers (default 50)")
    flag("--guidance_w", type=finite, default=0.0, help="ε + w (ε - ε_∅), for teachers and for networks that take w")
    flag("--num_images", type=positive, help="default: one row of each of several models, about 64 of one; points 4096")
    flag("--out", default="samples.png", help="a .png for one picture of all, else a folder for one each")
    add_arguments(p)
    for option, words in LOAD_OPTIONS.items():
        flag(f"--{option}", help=words)
    return p


@program
def main() -> None:
    """Plans and checks all rows of the picture, or all folders; then samples, which may take hours."""
    args, plan, rows = parser().parse_args(), {}, {}
    options = {"prompts": read_prompts(args.prompts), "batch_size": args.batch_size}
    options["mixed_precision"] = args.mixed_precision
    asked = {option: getattr(args, option) for option in LOAD_OPTIONS}
    models = [load(name, **asked).to(training.process().device) for name in args.models]
    for model in models:
        model.labels(options["prompts"])
        steps, timesteps, w, useless = args.teacher_steps or [50], [], args.guidance_w, args.steps or args.timesteps
        if model.is_student:
            steps, timesteps, useless = args.steps or [len(args.timesteps) or 4], args.timesteps, args.teacher_steps
            w = 0.0 if len(models) > 1 and not model.takes_w else w  # it is for the teacher that stands beside
        kind = "student, which takes --steps" if model.is_student else "teacher, which takes --teacher_steps"
        refuse(useless and len(models) == 1, f"{model.name} is a {kind}")
        for n in steps:
            check_steps(model, n, timesteps, w)
            plan[title(model, n, timesteps, w)] = model, n, {"timesteps": timesteps, "w": w}
    out = Path(args.out)
    if out.suffix.lower() in Image.registered_extensions():  # whoever writes samples.jpg does not want a folder
        output_file(out, ".png")
    # In a picture of several rows each row is one model's, so a row holds as many samples as there are columns.
    number, columns = preview(models[0])
    number = args.num_images or (number if len(plan) == 1 else columns)
    seeds = range(args.seed, args.seed + number)
    for name, (model, n, how) in plan.items():
        if out.suffix == ".png":
            rows[name] = sample(model, seeds, n, **how, **options)
        else:
            sample_to_folder(model, seeds, out / slug(name) if len(plan) > 1 else out, n, **how, **options)
    if len(rows) == 1:
        picture(*rows.values(), columns).save(out)
    elif rows:
        overview(models[0], rows).save(out)
    print(out)


if __name__ == "__main__":
    main()
