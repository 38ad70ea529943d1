"""Few-step sampling of students, many-step sampling of teachers from the same noise, and pictures of both.

    python sample.py runs/cifar-student --steps 4 --out samples.png
    python sample.py TEACHER STUDENT --steps 1 2 4 --prompts "a photo of a cat" --out grid.png

The noise of sample i follows from the seed `--seed` + i alone: not from its batch, its device or the model. So the
rows of a picture show what different models make of the same noise, and an interrupted folder of 30,000 images can be
filled up.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

import training
from data import EXTENSIONS, program, read_prompts, refuse, to_range, to_tensor, writable_folder
from splam import ConsistencyFunction, few_step_sample, few_step_times, multiple_estimation, sub_path_point
from teacher import DiffusionModel, load

SAMPLERS = ("lcm", "ddim", "dpmsolver++")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
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


def run_sampler(
    model: DiffusionModel,
    noise: SeededNoise,
    steps: int,
    sampler: str,
    cond: dict,
    w: float,
    eta: float,
    timesteps: Sequence[int],
) -> Tensor:
    """One batch: from noise at time N-1 to x_0, (B, ...).

    "lcm" is the student's sampler, Eq. 19 repeated, with the share `eta` of fresh noise between two steps, at
    `timesteps` or, without any, at LCM's times. "ddim" and "dpmsolver++" (here the multistep method, with one call of
    the network a step) are diffusers' solvers of the PF-ODE, fed with what the guided ε makes of v. Two settings matter
    for a fair comparison with a student: they start at the last time, N-1, where x really is pure noise ("trailing"
    spacing), and they do not clip x_0, which would be another ODE than the one that was distilled.
    """
    x = noise()
    if sampler == "lcm":
        times = timesteps or few_step_times(steps, len(model.schedule), model.original_inference_steps)
        student = ConsistencyFunction(model.network, model.schedule, model.prediction_type)
        *_, x = few_step_sample(student, model.schedule, x, times, noise, eta, **cond)
        return x
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    kind = DDIMScheduler if sampler == "ddim" else DPMSolverMultistepScheduler
    # v whatever the network's own type is: model.predict has converted its output already. From ε a solver could not
    # find x_0 where α is 0, which is where schedules with zero terminal SNR begin; from x_0 not ε where σ is small.
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    options |= {"clip_sample": False, "thresholding": False}
    solver = kind.from_config(model.scheduler.config, **options)
    solver.set_timesteps(steps, device=x.device)
    for t in solver.timesteps:  # dpmsolver++ is a multistep method: the solver remembers its last x_0
        times = t.expand(len(x))
        (x0, eps), (alpha, sigma) = model.predict(x, times, cond, w), model.schedule.at(times, x.ndim)
        x = solver.step(alpha * eps - sigma * x0, t, x).prev_sample
    return x


def default_sampler(model: DiffusionModel) -> str:
    """What the model was made for: a student jumps to x_0, with noise between jumps (Eq. 19); a teacher knows the
    direction of the PF-ODE."""
    return "lcm" if model.is_student else "ddim"


def check_steps(model: DiffusionModel, steps: int, sampler: str | None = None, timesteps: Sequence[int] = ()) -> None:
    """Refuses a number of steps that the sampler cannot take: a student has no more times than its training grid. Of
    times it refuses those at which no student was trained, and a first one at which x is not pure noise."""
    sampler = sampler or default_sampler(model)
    limit = model.original_inference_steps if sampler == "lcm" else len(model.schedule)
    refuse(not 1 <= steps <= limit, f"{sampler} takes 1 to {limit} steps, not {steps}")
    if timesteps:
        refuse(sampler != "lcm", f"--timesteps are for lcm: {sampler} has its own")
        grid = few_step_times(limit, len(model.schedule), limit)
        # Nothing would fail without this: a network answers at any time, and at a first time below N-1 pure noise is
        # taken for less than it is. The samples would only be bad.
        falling = sorted(set(timesteps), reverse=True) == list(timesteps)
        right = falling and timesteps[0] == grid[0] and set(timesteps) <= set(grid) and len(timesteps) == steps
        known = f"{', '.join(map(str, grid[:3]))}, ... {grid[-1]}"
        refuse(not right, f"--timesteps must begin with {grid[0]} and fall, on the student's grid: {known}")


@torch.no_grad()
def sample_batches(
    model: DiffusionModel,
    seeds: Sequence[int],
    steps: int,
    sampler: str | None = None,
    *,
    w: float = 0.0,
    eta: float = 1.0,
    timesteps: Sequence[int] = (),
    prompts: Sequence[str] = (),
    batch_size: int | None = None,
    mixed_precision: str = "no",
) -> Iterator[Tensor]:
    """One sample for each seed, decoded, batch by batch on the CPU. Seed s takes prompt s, modulo their number.

    Without a `sampler` (one of SAMPLERS) a student's is "lcm" and a teacher's "ddim"; without a `batch_size` it is the
    model's own. `w` guides a teacher. `eta` is the share of fresh noise between a student's steps, and `timesteps` are
    their times (as many as `steps`), if they are not to be LCM's.
    """
    sampler, batch_size = sampler or default_sampler(model), batch_size or model.batch_size
    check_steps(model, steps, sampler, timesteps)
    refuse(w and sampler == "lcm", "guidance is for teachers: what a student was distilled with is in its weights")
    refuse(eta != 1 and sampler != "lcm", f"--eta is for lcm: {sampler} adds no noise")
    # Labels go round with the seeds, not with the place in a batch: a sample's prompt follows from its seed too.
    labels = model.labels(prompts)
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    for batch in tqdm(batches, desc=f"{sampler} {steps}", unit="batch", leave=False, disable=len(batches) == 1):
        label = labels[torch.tensor(batch) % len(labels)].to(model.device)
        # The noise is float32 under autocast too: only products and convolutions are computed in half precision.
        with training.autocast(model.device, mixed_precision):
            noise, cond = SeededNoise(model.shape, batch, model.device), model.condition(label)
            x0 = run_sampler(model, noise, steps, sampler, cond, w, eta, timesteps)
        yield model.decode(x0).cpu()


def sample(model: DiffusionModel, seeds: Sequence[int], steps: int, sampler: str | None = None, **options) -> Tensor:
    """`sample_batches` as one tensor, (len(seeds), ...)."""
    return torch.cat(list(sample_batches(model, seeds, steps, sampler, **options)))


def png(folder: Path, seed: int) -> Path:
    """Where the sample of a seed is kept."""
    return folder / f"{seed:06d}.png"


def read_png(folder: Path, seed: int) -> Tensor:
    """A sample that was saved as a picture: (3, H, W) in [-1, 1], of which 256 levels are left in each channel."""
    with Image.open(png(folder, seed)) as image:
        return to_range(to_tensor(image))


def sample_to_folder(model: DiffusionModel, seeds, folder: Path, steps: int, sampler=None, **options) -> None:
    """Sample s becomes `folder`/s.png. What an interrupted call has left is kept, and several processes share the work.

    samples.json says how the images were made. A folder of images that were made otherwise is refused: a student that
    was trained further has the same name, so a sum of its weights is recorded too.
    """
    refuse(len(model.shape) == 1, "points are not kept in files")
    state, record = training.process(), writable_folder(folder) / "samples.json"
    sampler = sampler or default_sampler(model)
    # In float64, and kept to seven digits below: the order of a sum differs between devices, and so do its last digits.
    weights = sum(parameter.double().abs().sum().item() for parameter in model.network.parameters())
    made = {"model": model.name, "weights": f"{weights:.6e}", "steps": steps, "scheduler": sampler, **options}
    made.pop("batch_size", None)  # a sample does not depend on it, up to the rounding of a batched product
    # The usual values are left out. Solvers of the PF-ODE have no such options at all.
    if made.get("eta") == 1:
        del made["eta"]
    if not made.get("timesteps"):
        made.pop("timesteps", None)
    text = json.dumps(made, indent=2).encode()  # compared as bytes: an edited record may be no text at all
    other = record.is_file() and record.read_bytes() != text
    refuse(other, f"{folder} holds samples of another model, or made with other flags: see {record}")
    state.wait_for_everyone()  # nobody writes before all have looked
    if state.is_main_process:
        record.write_bytes(text)
    # Each process takes every n-th seed, and of those the ones that no earlier call has finished.
    missing = [seed for seed in seeds[state.process_index :: state.num_processes] if not png(folder, seed).is_file()]
    batches = sample_batches(model, missing, steps, sampler, **options)
    for seed, image in zip(missing, (image for batch in batches for image in batch), strict=True):
        draft = png(folder, seed).with_suffix(".tmp")  # renamed when complete: whatever is called .png is whole
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
    if model.default_prompts:
        return len(model.default_prompts), len(model.default_prompts)
    columns = 8
    if model.null_label and model.null_label <= 16:  # a thousand classes would have no room
        columns = model.null_label * max(1, 8 // model.null_label)
    return 64 // columns * columns, columns


def picture(samples: Tensor, columns: int = 8) -> Image.Image:
    """One picture of a batch of points or images."""
    if samples.ndim == 2:
        from toy import plots

        return plots.scatter(samples)
    from torchvision.utils import make_grid

    return Image.fromarray(to_pixels(make_grid(samples, columns, padding=1, pad_value=1)[None])[0])


def overview(model: DiffusionModel, panels: dict[str, Tensor], k: int = 100) -> Image.Image:
    """One picture of several batches under their names, drawn from the same noises: of images a row each, so that a
    column shows one noise. Of points a panel each, and three of the model's PF-ODE with a sub-path of length k."""
    from toy import plots

    if len(model.shape) == 1:
        return plots.overview(panels, plots.SubPath(*_sub_path(model, k)))
    from matplotlib.font_manager import findfont

    columns = preview(model)[1]
    rows = [picture(samples[:columns], columns) for samples in panels.values()]
    # Small images are enlarged, pixel by pixel. All rows get the size of the first, so that columns stay in line.
    scale = max(1, 800 // rows[0].width)
    size = rows[0].width * scale, rows[0].height * scale
    font = ImageFont.truetype(findfont("DejaVu Sans"), 11)  # comes with matplotlib, and has Greek letters
    for i, name in enumerate(panels):
        enlarged = rows[i].resize(size, Image.Resampling.NEAREST)
        rows[i] = ImageOps.expand(enlarged, (0, 16, 0, 0), "white")  # 16 pixels above it, for its name
        ImageDraw.Draw(rows[i]).text((4, 2), name, fill="black", font=font)
    return plots.below(*rows)


@torch.no_grad()
def _sub_path(model: DiffusionModel, k: int, n: int = 8) -> tuple:
    """The values of plots.SubPath: n trajectories of the PF-ODE from time N-1 to 0, and a sub-path of length k of one.

    DDIM steps of size 1 are the PF-ODE, as far as the eye can tell. The sub-path that is shown is the most bent one:
    its bend is the height of its middle over its chord in z = x/α, divided by the chord's length. Above a quarter it
    would be a hairpin, and is left out.
    """
    last, denoise = len(model.schedule) - 1, functools.partial(model.predict, cond={})
    states = [torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(model.device)]
    for time in range(last, 0, -1):
        t = torch.full((n,), time, device=model.device)
        states.append(multiple_estimation(denoise, model.schedule, states[-1], t, t - 1, k=1, solver_step=1))
    paths, alphas = torch.stack(states).cpu(), model.schedule.alpha.cpu().flip(0)  # place last - t is time t
    z = paths / alphas[:, None, None]
    begins = torch.arange(0, last - k + 1, 10)
    starts, middles, ends = z[begins], z[begins + k // 2], z[begins + k]
    chords, rises = ends - starts, middles - starts
    bend = (chords[..., 0] * rises[..., 1] - chords[..., 1] * rises[..., 0]).abs() / chords.square().sum(2)
    best = torch.where(bend < 0.25, bend, 0).argmax()
    begin, which = begins[best // n], best % n
    piece, alpha = paths[begin : begin + k + 1, which], alphas[begin : begin + k + 1, None]
    # Eleven points of the line that replaces this piece, at γ = 0, 0.1, ... 1.
    t, gamma = torch.full((11,), last - int(begin)), torch.linspace(0, 1, 11)
    line = sub_path_point(piece[:1], piece[-1:], t, t - k, gamma, model.schedule, "sl", "approx").x
    return paths, piece, alpha, line, f"t = {int(t[0])}, s = {int(t[0]) - k}"


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def output_file(path: str | Path, suffix: str) -> Path:
    """Where a result is to be written: refused now rather than after the work that it is the result of."""
    file = Path(path)
    refuse(file.suffix != suffix or file.is_dir(), f"{file} must be the name of a file that ends in {suffix}")
    writable_folder(file.parent)
    return file


def add_arguments(parser: training.Parser) -> None:
    """Flags of every program that samples."""
    parser.add_argument("--seed", type=training.seed, default=0, help="of the first sample; the i-th has it plus i")
    parser.add_argument("--prompts", nargs="+", default=[], help="texts, or a file with one a line, or class labels")
    parser.add_argument("--batch_size", type=training.positive, help="samples at a time (default: by kind of model)")
    parser.add_argument("--mixed_precision", choices=list(training.DTYPES), default="no", help="of the networks")


def add_student_arguments(parser: training.Parser) -> None:
    """Flags of programs in which students take several steps."""
    # The paper's 1 is the default, and what a perfect student needs; splam.py, section 5, has the reason.
    eta_help = "share of fresh noise between a student's steps; with 0 the first noise alone decides; paper: 1"
    parser.add_argument("--eta", type=training.fraction, default=1.0, help=eta_help)
    # LCM's times were chosen for Stable Diffusion's schedule. docs/images.md has measured others on another one.
    times_help = "of a student's steps, falling, in the place of --steps (default: LCM's times, evenly spaced)"
    parser.add_argument("--timesteps", type=training.count, nargs="+", default=[], help=times_help)


def parser() -> training.Parser:
    """The flags of sample.py."""
    p = training.Parser(prog="sample.py", description="Sample students and teachers.", formatter_class=training.Help)
    p.add_argument("models", nargs="+", help="pipeline folders or hub ids")
    p.add_argument("--steps", type=training.positive, nargs="+", help="evaluations of students (default 4; paper: 1-4)")
    p.add_argument("--teacher_steps", type=training.positive, nargs="+", help="of teachers (default 50)")
    p.add_argument("--scheduler", choices=SAMPLERS, help="default: lcm for a student, ddim for a teacher")
    p.add_argument("--guidance_w", type=training.finite, default=0.0, help="ε + w (ε - ε_∅), for teachers")
    add_student_arguments(p)
    p.add_argument(
        "--num_images",
        type=training.positive,
        help="default: about 64, or one row in a picture of several rows; of points 4096",
    )
    p.add_argument("--out", default="samples.png", help="a .png for one picture of all, else a folder for one each")
    add_arguments(p)
    return p


@program
def main() -> None:
    """Plans and checks all rows, then samples: (model, sampler, steps), each a row of the picture or a folder."""
    args = parser().parse_args()
    options = {"prompts": read_prompts(args.prompts)}
    options |= {"batch_size": args.batch_size, "mixed_precision": args.mixed_precision}
    # Whoever writes samples.jpg wants a picture, and would be surprised by a folder of that name.
    out = output_file(args.out, ".png") if Path(args.out).suffix.lower() in EXTENSIONS else writable_folder(args.out)
    plan = []
    for name in args.models:  # all are loaded, and so all names checked, before hours of sampling begin
        model = load(name).to(training.process().device)
        sampler = args.scheduler or default_sampler(model)
        timesteps = args.timesteps if sampler == "lcm" else []  # a teacher beside students keeps its own times
        few = [len(timesteps)] if timesteps else args.steps or [4]
        # Checked here and not when its turn comes: the rows before it may take hours, and a folder's record is written
        # before its images.
        for n in few if sampler == "lcm" else args.teacher_steps or [50]:
            check_steps(model, n, sampler, timesteps)
            plan.append((model, sampler, n))
    samplers = {sampler for _, sampler, _ in plan}
    # A flag that no row can use is refused: silently ignored, it would seem to have had no effect.
    misplaced = samplers == {"lcm"} and (args.guidance_w or args.teacher_steps)
    refuse(misplaced, "--guidance_w and --teacher_steps are for teachers; a student has its guidance in its weights")
    misplaced = "lcm" not in samplers and (args.steps or args.timesteps)
    refuse(misplaced, "--steps and --timesteps are for students; a teacher takes --teacher_steps")
    refuse(args.steps and args.timesteps, "--timesteps says how many steps there are: leave --steps out")
    several = any(sampler == "lcm" and n > 1 for _, sampler, n in plan)
    refuse(args.eta != 1 and not several, "--eta is for students of several steps: no others add noise")
    # In a picture of several rows each row is one model's, so a row holds as many samples as there are columns.
    columns = preview(plan[0][0])[1]
    number = args.num_images or (columns if len(plan) > 1 else max(1, 64 // columns) * columns)
    seeds, rows = range(args.seed, args.seed + number), {}
    for model, sampler, n in plan:
        # A student has its guidance in its weights. A teacher's solver adds no noise between its steps, and a single
        # step has nothing between.
        w = 0.0 if sampler == "lcm" else args.guidance_w
        eta = args.eta if sampler == "lcm" and n > 1 else 1.0
        timesteps = args.timesteps if sampler == "lcm" else []
        if out.suffix == ".png":
            words = (f", w = {w:g}" if w else "") + (f", η = {eta:g}" if eta != 1 else "")
            row = f"{model.name}, {sampler}, {n_steps(n, timesteps)}{words}"
            rows[row] = sample(model, seeds, n, sampler, w=w, eta=eta, timesteps=timesteps, **options)
        else:
            folder = out if len(plan) == 1 else out / f"{Path(model.name).name}-{sampler}-{n}"
            sample_to_folder(model, seeds, folder, n, sampler, w=w, eta=eta, timesteps=timesteps, **options)
    # A model alone has nothing to be compared with. By default its grid has whole rows of all classes; any other number
    # of images is shown in a square.
    if len(rows) == 1:
        picture(*rows.values(), columns=round(number**0.5) if args.num_images else columns).save(out)
    elif rows:
        overview(model, rows).save(out)
    print(out)


def n_steps(n: int, timesteps: Sequence[int] = ()) -> str:
    """How a row is named, in tables and pictures."""
    times = f" at t = {', '.join(map(str, timesteps))}" if timesteps else ""
    return ("1 step" if n == 1 else f"{n} steps") + times


if __name__ == "__main__":
    main()
