"""Teachers: everything that differs between 2-D points and images is behind the class `Teacher`.

A teacher is a folder (or hub id) of a diffusers pipeline; its kind is read from `model_index.json`. A finished student
is such a folder too, so it is loaded by the same function. `python teacher.py --data ...` trains a teacher.
"""

import argparse
import copy
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

import training
from data import BadInput, load_images, program
from splam import Schedule, distance, draw, ema_update, guided, sub_path_point, to_x0_eps
from toy import DISTRIBUTIONS, GaussianMixture, PointMLP, plots

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()


TYPES = ["epsilon", "v_prediction", "sample"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


class Teacher(ABC):
    """A frozen diffusion model, and all that distillation, sampling and evaluation must know about its kind.

    Subclasses say what one sample is and where data come from. Conditions are dictionaries of the network's keyword
    arguments; the base class knows class labels, where the network has them, with its last label as "no class".
    """

    shape: tuple[int, ...]  # of one sample
    default_data: str | None = None
    recipe: dict = {}  # defaults of distill.py's flags for this kind
    training_recipe: dict = {}  # the same for teacher.py's
    evaluation: dict = {}  # DDIM steps of the table and samples a row

    def __init__(self, pipeline: DDPMPipeline, name: str):
        self.pipeline, self.name = pipeline, name
        self.network: nn.Module = pipeline.unet.eval().requires_grad_(False)
        # A student's LCMScheduler and a teacher's scheduler share their noise schedule.
        config = pipeline.scheduler.config
        self.schedule = Schedule(pipeline.scheduler.alphas_cumprod)
        self.prediction_type: str = config.prediction_type
        labels = self.network.config.get("num_class_embeds")
        self.null_label = None if labels is None else labels - 1
        self.is_student = isinstance(pipeline.scheduler, LCMScheduler)
        self.original_inference_steps: int = config.get("original_inference_steps", 50)  # of the few-step time grid

    # -- what a kind of teacher must say ------------------------------------------------------------------------------

    @abstractmethod
    def dataset(self, data: str, split: str = "train", mirror: bool = False) -> Dataset:
        """Data whose batches are (x_0, label) pairs, with all of it, unscaled, as `samples`."""

    @abstractmethod
    def picture(self, samples: Tensor, columns: int = 8) -> Image.Image:
        """One picture of a batch of samples."""

    @abstractmethod
    def overview(self, panels: dict[str, Tensor], k: int) -> Image.Image:
        """One picture of several batches side by side, under their names; k is the length of the sub-paths."""

    @staticmethod
    @abstractmethod
    def new_network(data: str, class_conditional: bool) -> tuple[nn.Module, Dataset]:
        """An untrained network for `data`, and the dataset to train it on."""

    # -- the model ----------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> "Teacher":
        self.network.to(device)
        return self

    def condition(self, label: Tensor) -> dict[str, Tensor]:
        return {} if self.null_label is None else {"class_labels": label}

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        """(x_0, ε̃) at x (B, ...), t (B,) with guidance w (Eq. 18): both passes in one batch, and only one for w = 0."""
        if w and not cond:
            raise BadInput("guidance needs a class-conditional teacher: this one has no labels")
        if w:
            nothing = self.condition(torch.full_like(cond["class_labels"], self.null_label))
            both = {key: torch.cat([value, nothing[key]]) for key, value in cond.items()}
            output = self.network(torch.cat([x, x]), torch.cat([t, t]), **both).sample.float()
            output = guided(*output.chunk(2), w)
        else:
            output = self.network(x, t, **cond).sample.float()
        return to_x0_eps(output, x, *self.schedule.at(t, x.ndim), self.prediction_type)

    def copy_network(self) -> nn.Module:
        """A trainable copy: where a student starts."""
        return copy.deepcopy(self.network).train().requires_grad_(True)

    def student(self, weights: dict[str, Tensor], original_inference_steps: int) -> "Teacher":
        """This teacher's pipeline with a student's weights and the scheduler of few-step sampling."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(weights)
        scheduler = LCMScheduler.from_config(
            self.pipeline.scheduler.config,
            original_inference_steps=original_inference_steps,
            clip_sample=False,
            thresholding=False,
        )
        return type(self)(DDPMPipeline(unet=network, scheduler=scheduler), f"student of {self.name}")


def save_pipeline(pipeline: DDPMPipeline, folder: Path) -> None:
    """A pipeline folder, complete under another name before its parts take the place of an older one's."""
    draft = folder / "pipeline.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft)
    for part in draft.iterdir():
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    draft.rmdir()


class ImageTeacher(Teacher):
    """A U-Net on pixels: `DDPMPipeline` of `UNet2DModel`, with or without class labels."""

    recipe = {
        "max_train_steps": 1200,
        "train_batch_size": 64,
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "mixed_precision": "bf16",
        "validation_steps": 500,
        "num_eval_samples": 0,
    }
    training_recipe = {
        "max_train_steps": 6000,
        "train_batch_size": 64,
        "learning_rate": 1e-3,
        "mixed_precision": "bf16",
        "beta_schedule": "linear",
    }
    evaluation = {"teacher_steps": [1, 2, 4, 10, 50], "num_samples": 5000}

    def __init__(self, pipeline: DDPMPipeline, name: str):
        super().__init__(pipeline, name)
        config = self.network.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def dataset(self, data: str, split: str = "train", mirror: bool = False) -> Dataset:
        images = load_images(data, split, resolution=self.shape[1], mirror=mirror)
        if self.null_label is not None and len(images.classes) > self.null_label:
            raise BadInput(f"{data} has {len(images.classes)} classes, and {self.name} knows {self.null_label}")
        return images

    def picture(self, samples: Tensor, columns: int = 8) -> Image.Image:
        return Image.fromarray(to_pixels(make_grid(samples, columns, padding=1, pad_value=1)[None])[0])

    def overview(self, panels: dict[str, Tensor], k: int) -> Image.Image:
        """A row of eight images for each panel, enlarged, with the panel's name above it."""
        scale = max(1, 96 // self.shape[1])
        rows = [(name, self.picture(samples[:8])) for name, samples in panels.items()]
        width, height, text = rows[0][1].width * scale, rows[0][1].height * scale, 16
        image = Image.new("RGB", (width, len(rows) * (height + text)), "white")
        for i, (name, row) in enumerate(rows):
            ImageDraw.Draw(image).text((4, i * (height + text) + 2), name, fill="black")
            image.paste(row.resize((width, height), Image.Resampling.NEAREST), (0, i * (height + text) + text))
        return image

    @staticmethod
    def new_network(data: str, class_conditional: bool) -> tuple[nn.Module, Dataset]:
        """A small U-Net (2.5 M weights) for the images in `data`, and these images."""
        images = load_images(data, mirror=True)
        size = images.samples.shape[-1]
        if size % 8:
            raise BadInput(f"the images of {data} are {size} pixels wide; this U-Net needs a multiple of 8")
        return UNet2DModel(
            sample_size=size,
            block_out_channels=(16, 32, 64, 128),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            num_class_embeds=len(images.classes) + 1 if class_conditional else None,
        ), images


def to_pixels(samples: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), rounded as diffusers' image processor does."""
    return ((samples / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class Points(Dataset):
    """65,536 points of `toy:<name>`, always the same, with the mixture component that each came from."""

    def __init__(self, data: str, split: str):
        seed = {"train": 1, "test": 2}[split]
        self.samples, self.labels = distribution(data).sample(2**16, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.samples[indices], self.labels[indices]


class PointTeacher(Teacher):
    """An MLP on 2-D points: `DDPMPipeline` of `PointMLP`."""

    shape = (2,)
    recipe = {
        "max_train_steps": 2000,
        "train_batch_size": 512,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "num_eval_samples": 4096,
    }
    training_recipe = {
        "max_train_steps": 3000,
        "train_batch_size": 512,
        "learning_rate": 2e-3,
        "beta_schedule": "scaled_linear",
    }
    evaluation = {"teacher_steps": [1, 2, 4, 1000], "num_samples": 4096}

    def __init__(self, pipeline: DDPMPipeline, name: str):
        super().__init__(pipeline, name)
        self.default_data = f"toy:{self.network.config.distribution}"

    def dataset(self, data: str, split: str = "train", mirror: bool = False) -> Dataset:
        return Points(data, split)

    def picture(self, samples: Tensor, columns: int = 8) -> Image.Image:
        return plots.scatter(samples)

    @torch.no_grad()
    def overview(self, panels: dict[str, Tensor], k: int) -> Image.Image:
        """The panels, and four PF-ODE trajectories with the lines of their sub-paths, from x_t to r x_s (Eq. 12)."""

        def times(time: int) -> Tensor:
            return torch.full((4,), time, device=self.network.device)

        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).to(self.network.device)
        states, last = [x], len(self.schedule) - 1
        for time in range(last, 0, -1):  # DDIM steps of size 1: the PF-ODE, for the eye
            x0, eps = self.predict(states[-1], times(time), {})
            alpha, sigma = self.schedule.at(times(time - 1), 2)
            states.append(alpha * x0 + sigma * eps)
        paths, lines = torch.stack(states), []  # paths[last - t] is at time t
        for t in range(last, 0, -k):
            s = max(t - k, 0)
            ends = paths[last - t], paths[last - s], times(t), times(s)
            line = [sub_path_point(*ends, times(gamma), self.schedule, "sl", "approx").x for gamma in (1, 0)]
            lines.append(torch.stack(line))
        return plots.overview(panels, paths.cpu(), torch.stack(lines).cpu())

    @staticmethod
    def new_network(data: str, class_conditional: bool) -> tuple[nn.Module, Dataset]:
        if class_conditional:
            raise BadInput("--class_conditional is for images")
        return PointMLP(distribution=data.removeprefix("toy:")), Points(data, "train")


def distribution(data: str) -> GaussianMixture:
    name = data.removeprefix("toy:")
    if name not in DISTRIBUTIONS:
        raise BadInput(f"unknown 2-D distribution {data!r}: choose from {', '.join('toy:' + n for n in DISTRIBUTIONS)}")
    return DISTRIBUTIONS[name]


KINDS = {("diffusers", "UNet2DModel"): ImageTeacher, ("toy.mlp", "PointMLP"): PointTeacher}


def kind_of_data(data: str) -> type[Teacher]:
    return PointTeacher if data.startswith("toy:") else ImageTeacher


def load(name: str) -> Teacher:
    """The teacher (or student) in a pipeline folder or under a hub id."""
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise BadInput(f"{name} is no pipeline folder: it has no model_index.json")
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise BadInput(f"no pipeline folder and no reachable hub id: {name}") from error
    # from_pretrained imports the modules that this file names, so they must be known ones.
    kind = KINDS.get(tuple(index.get("unet") or ()))
    if index.get("_class_name") != "DDPMPipeline" or kind is None or index["scheduler"][0] != "diffusers":
        raise BadInput(f"{name} is a {index.get('_class_name')}, which is no kind of teacher known here")
    try:
        return kind(DDPMPipeline.from_pretrained(name, use_safetensors=True), name)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load {name}: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Training a teacher: ordinary denoising, Eq. 8 in the units of the prediction type
# ---------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="teacher.py",
        description="Train a teacher on images or on a 2-D distribution.",
        usage="teacher.py --data DATA [flags]",
        epilog=training.recipe_text({kind.__name__: kind.training_recipe for kind in KINDS.values()}),
        formatter_class=training.Help,
    )
    p.add_argument("--data", required=True, help="folder of images, or toy:<name>")
    p.add_argument("--class_conditional", action="store_true", help="with labels, of which 10 %% are dropped")
    p.add_argument("--prediction_type", choices=TYPES, default="v_prediction", help="what the network outputs")
    p.add_argument("--beta_schedule", choices=BETAS, help="of the noise; Stable Diffusion: scaled_linear")
    p.add_argument("--ema_decay", type=float, default=0.999, help="of the weights that are saved")
    training.add_arguments(p)
    p.set_defaults(lr_scheduler="cosine", max_grad_norm=1.0)
    return p


def train(args: argparse.Namespace) -> None:
    """Trains a network of the kind that `args.data` asks for and saves its average as a pipeline folder."""
    set_seed(args.seed)  # of the initial weights
    network, dataset = kind_of_data(args.data).new_network(args.data, args.class_conditional)
    scheduler = DDPMScheduler(beta_schedule=args.beta_schedule, prediction_type=args.prediction_type, clip_sample=False)
    average = copy.deepcopy(network).requires_grad_(False)
    run = training.Run(args, network, dataset, {"average": average})
    schedule = Schedule(scheduler.alphas_cumprod)
    null_label = network.config.get("num_class_embeds", None)

    def loss_of(x0: Tensor, label: Tensor, t: Tensor, drop: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = schedule.at(t, x0.ndim)
        wanted = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[args.prediction_type]
        cond = {} if null_label is None else {"class_labels": torch.where(drop < 0.1, null_label - 1, label)}
        with run.accelerator.autocast():
            output = run.model(alpha * x0 + sigma * noise, t, **cond).sample
        return distance(output, wanted, "l2")

    for step, batches in run:
        draws = draw((run.total_batch_size, *dataset.samples.shape[1:]), len(schedule), 1, run.generator(step))
        loss = run.optimize(loss_of(*batch, *rows) for batch, rows in zip(batches, run.split(draws), strict=True))
        ema_update(average, run.accelerator.unwrap_model(run.model), min(args.ema_decay, step / (step + 10)))
        run.log(step, loss=loss)
        run.checkpoint(step)
    if run.accelerator.is_main_process:
        save_pipeline(DDPMPipeline(unet=average, scheduler=scheduler), run.folder)
    run.accelerator.wait_for_everyone()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = parser()
    first, _ = p.parse_known_args(arguments)
    p.set_defaults(**kind_of_data(first.data).training_recipe)
    return p.parse_args(arguments)


def fit_or_load(name: str, folder: Path, seed: int, mixed_precision: str) -> Teacher:
    """A teacher by name. "toy:<name>" is fitted here and now, and kept in `folder`, where the next call finds it."""
    if not name.startswith("toy:"):
        return load(name)
    distribution(name)
    if not (folder / "model_index.json").is_file():
        flags = {"data": name, "output_dir": folder, "seed": seed, "mixed_precision": mixed_precision}
        flags["resume_from_checkpoint"] = "latest"  # of a fit that was interrupted
        train(parse([f"--{flag}={value}" for flag, value in flags.items()]))
    teacher = load(str(folder))
    if teacher.default_data != name:
        raise BadInput(f"{folder} holds a teacher of {teacher.default_data}: give {name} another --output_dir")
    return teacher


@program
def main() -> None:
    args = parse()
    train(args)
    print(f"teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
