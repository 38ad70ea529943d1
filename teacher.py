"""Teachers: loading one by name, saving, and `python teacher.py --data ...`, which trains one here.

What a model is, to the rest of the project, is the class `kinds.Teacher`.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import Dataset

import training
from data import BadInput, program
from kinds import ImageTeacher, StableDiffusion, Teacher
from splam import distance, draw, ema_update
from toy.points import POINTS, PointTeacher, distribution

KINDS = {  # by the network that model_index.json names
    ("diffusers", "UNet2DModel"): ImageTeacher,
    ("diffusers", "UNet2DConditionModel"): StableDiffusion,
    ("toy.mlp", "PointMLP"): PointTeacher,
}
TYPES = ["epsilon", "v_prediction", "sample"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
LORA_FILE = "pytorch_lora_weights.safetensors"
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # of Stable Diffusion's pipelines


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """A pipeline folder, complete under another name before its parts take the place of an older one's.

    A network with a LoRA is saved as the LoRA alone, as `pipe.load_lora_weights` reads it, beside the scheduler.
    """
    draft = folder / "pipeline.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    if getattr(pipeline.unet, "peft_config", None):
        type(pipeline).save_lora_weights(draft, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
        pipeline.scheduler.save_pretrained(draft / "scheduler")
    else:
        pipeline.save_pretrained(draft)
    for part in draft.iterdir():
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    draft.rmdir()


def load(name: str) -> Teacher:
    """The teacher or student in a pipeline folder, in a folder with a LoRA of distill.py, or under a hub id."""
    if (Path(name) / LORA_FILE).is_file():
        return _load_lora(Path(name))
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise BadInput(f"{name} is no pipeline folder: it has no model_index.json")
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise BadInput(f"no pipeline folder and no reachable hub id: {name}") from error
    kind = KINDS.get(tuple(index.get("unet") or ()))
    parts = {key: tuple(part) for key, part in index.items() if isinstance(part, list) and key not in UNUSED_PARTS}
    # from_pretrained imports the modules that this file names, so they must be known ones.
    unknown = [part for part in parts.values() if part[0] not in (None, "diffusers", "transformers", "toy.mlp")]
    if kind is None or unknown or index.get("_class_name") not in kind.pipeline_names:
        raise BadInput(f"{name} is a {index.get('_class_name')}, which is no kind of teacher known here")
    unused = {key: None for key in UNUSED_PARTS if key in index}
    try:
        pipeline = kind.pipeline_class.from_pretrained(name, use_safetensors=True, **unused)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    pipeline.register_to_config(**({"requires_safety_checker": False} if unused else {}))
    return kind(pipeline, name)


def _load_lora(folder: Path) -> Teacher:
    record = folder / "metrics.json"
    if not record.is_file():
        raise BadInput(f"{folder} holds a LoRA but no metrics.json, which names the model that it belongs to")
    base = load(json.loads(record.read_text())["configuration"]["pretrained_teacher_model"])
    base.pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    base.pipeline.fuse_lora()
    base.pipeline.unload_lora_weights()
    base.pipeline.register_modules(scheduler=LCMScheduler.from_pretrained(folder / "scheduler"))
    return type(base)(base.pipeline, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Training a teacher: ordinary denoising, Eq. 8 in the units of the prediction type
# ---------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="teacher.py",
        description="Train a teacher on images or on a 2-D distribution.",
        usage="teacher.py --data DATA [flags]",
        epilog=training.recipe_text(
            "Defaults by kind of teacher",
            {kind.__name__: kind.training_recipe for kind in (PointTeacher, ImageTeacher)},
        ),
        formatter_class=training.Help,
    )
    p.add_argument("--data", required=True, help="folder of images, or toy:<name>, or ideal:<name>")
    p.add_argument("--class_conditional", action="store_true", help="with labels, of which 10 %% are dropped")
    p.add_argument("--resolution", type=int, help="images are resized and cropped to it; default: their own")
    p.add_argument("--block_out_channels", type=int, nargs="+", help="of the images' U-Net, level by level")
    p.add_argument("--prediction_type", choices=TYPES, default="v_prediction", help="what the network outputs")
    p.add_argument("--beta_schedule", choices=BETAS, help="of the noise; Stable Diffusion: scaled_linear")
    p.add_argument("--ema_decay", type=float, default=0.999, help="of the weights that are saved")
    training.add_arguments(p)
    p.set_defaults(lr_scheduler="cosine", max_grad_norm=1.0)
    return p


def train(args: argparse.Namespace, teacher: Teacher, dataset: Dataset) -> None:
    """Trains the teacher's network on its data and saves the average of its weights as a pipeline folder."""
    schedule, network = teacher.schedule, teacher.copy_network()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    run = training.Run(args, network, dataset, {"average": average})
    teacher.to(run.accelerator.device)

    def loss_of(data: Tensor, label: Tensor, t: Tensor, drop: Tensor, noise: Tensor) -> Tensor:
        with run.accelerator.autocast():
            x0, cond = teacher.prepare(data, label)
            if teacher.conditional:
                nothing = teacher.nothing(len(x0))
                dropped = {key: (drop < 0.1).view(-1, *[1] * (value.ndim - 1)) for key, value in cond.items()}
                cond = {key: torch.where(dropped[key], nothing[key], value) for key, value in cond.items()}
            alpha, sigma = schedule.at(t, x0.ndim)
            targets = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
            output = run.model(alpha * x0 + sigma * noise, t, **cond).sample
        return distance(output, targets[teacher.prediction_type], "l2")

    for step, batches in run:
        draws = draw((run.total_batch_size, *teacher.shape), len(schedule), len(schedule), run.generator(step))
        loss = run.optimize(loss_of(*batch, *rows) for batch, rows in zip(batches, run.split(draws), strict=True))
        ema_update(average, run.accelerator.unwrap_model(run.model), min(args.ema_decay, step / (step + 10)))
        run.log(step, loss=loss)
        run.checkpoint(step)
    weights = training.gathered(average.state_dict())
    if run.accelerator.is_main_process:
        teacher.network.load_state_dict(weights)
        save_pipeline(teacher.pipeline, run.folder)
    run.accelerator.wait_for_everyone()


def fit(args: argparse.Namespace) -> None:
    """A teacher of the kind that `args.data` asks for, from nothing."""
    set_seed(args.seed)  # of the initial weights
    kind = kind_of_data(args.data)
    network, dataset = kind.new_network(args)
    scheduler = DDPMScheduler(beta_schedule=args.beta_schedule, prediction_type=args.prediction_type, clip_sample=False)
    train(args, kind(DDPMPipeline(unet=network, scheduler=scheduler), args.output_dir), dataset)


def kind_of_data(data: str) -> type[Teacher]:
    return PointTeacher if data.startswith(POINTS) else ImageTeacher


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = parser()
    first, _ = p.parse_known_args(arguments)
    p.set_defaults(**kind_of_data(first.data).training_recipe)
    return p.parse_args(arguments)


def fit_or_load(name: str, folder: Path, seed: int, mixed_precision: str, class_conditional: bool = False) -> Teacher:
    """A teacher by name. "toy:<name>" and "ideal:<name>" are fitted here and now, and kept in `folder`, where the next
    call finds them."""
    if not name.startswith(POINTS):
        return load(name)
    distribution(name)
    if not (folder / "model_index.json").is_file():
        flags = {"data": name, "output_dir": folder, "seed": seed, "mixed_precision": mixed_precision}
        flags["resume_from_checkpoint"] = "latest"  # of a fit that was interrupted
        labels = ["--class_conditional"] * class_conditional
        fit(parse([*labels, *(f"--{flag}={value}" for flag, value in flags.items())]))
    teacher = load(str(folder))
    if teacher.default_data != name:
        raise BadInput(f"{folder} holds a teacher of {teacher.default_data}: give {name} another --output_dir")
    return teacher


@program
def main() -> None:
    args = parse()
    fit(args)
    print(f"teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
