"""The kinds of diffusion model, behind one interface: images and Stable Diffusion; 2-D points are in toy/points.py.

A model is a folder (or hub id) of a diffusers pipeline, and its kind is read from `model_index.json` (teacher.load). A
finished student is such a folder too, and an object of the same class as its teacher.
"""

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from matplotlib.font_manager import findfont
from peft import LoraConfig
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid
from transformers.utils import logging as transformers_logging

import training
from data import BadInput, ImageFiles, centre_square, image_files, load_images
from metrics import ClipScore, ImageFeatures, Measure
from pairs import CachedLatents, PairOptions, cache_pairs, load_pairs
from splam import Schedule, guided, multiple_estimation, to_x0_eps

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

# What LoRA adapts: attention, feed-forward and convolutions, as in diffusers' LCM-LoRA training script.
LORA_TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()


class Teacher(ABC):
    """A frozen diffusion model, and all that distillation, sampling and evaluation must know about its kind.

    Subclasses say what one sample is and where data come from. A *label* is what data hold beside x_0, a *condition*
    the network's keyword arguments. The base class knows class labels, where the network has them, with the last one
    as "no class".
    """

    pipeline_class: type[DiffusionPipeline] = DDPMPipeline
    pipeline_names: tuple[str, ...] = ("DDPMPipeline",)  # in model_index.json
    shape: tuple[int, ...]  # of one x_0
    default_data: str | None = None
    recipe: dict = {}  # defaults of distill.py's flags for this kind
    training_recipe: dict = {}  # the same for teacher.py's, where that can train one
    evaluation: dict = {}  # defaults of evaluate.py's flags
    pictured, columns = 64, 8  # samples in a picture during training, and in a row

    def __init__(self, pipeline: DiffusionPipeline, name: str):
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
    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Training data whose batches are (data, label) pairs for `prepare`."""

    @abstractmethod
    def reference(self, data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
        """All of the data, to be measured against: points, or uint8 images of the resolution asked for."""

    @abstractmethod
    def measures(self, reference: Tensor | ImageFiles, features: str, clip_model: str | None) -> list[Measure]:
        """What samples of this kind are measured by."""

    @abstractmethod
    def measured(self, samples: Tensor, resolution: int | None) -> Tensor:
        """Samples as the measures take them."""

    @abstractmethod
    def picture(self, samples: Tensor, columns: int | None = None) -> Image.Image:
        """One picture of a batch of samples."""

    @abstractmethod
    def overview(self, panels: dict[str, Tensor], k: int = 100) -> Image.Image:
        """One picture of several batches side by side, under their names; k is the length of the sub-paths."""

    def read(self, file: Path) -> Tensor:
        """A sample of which `picture` was saved."""
        raise BadInput("points are not kept in files")

    @staticmethod
    @abstractmethod
    def new_network(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
        """An untrained network for teacher.py's `args.data`, and the dataset to train it on."""

    # -- data and conditions ------------------------------------------------------------------------------------------

    @property
    def conditional(self) -> bool:
        return self.null_label is not None

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """What a person asks for -> labels (n, ...). Without prompts: all classes in turn."""
        if not prompts:
            return torch.arange(self.null_label or 1)
        if not all(prompt.isdigit() and int(prompt) < (self.null_label or 0) for prompt in prompts):
            raise BadInput(f"prompts are class labels here, and this model has {self.null_label or 'no'} classes")
        return torch.tensor([int(prompt) for prompt in prompts])

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as sentences, where they are ones."""
        return []

    def condition(self, label: Tensor) -> dict[str, Tensor]:
        return {} if self.null_label is None else {"class_labels": label}

    def nothing(self, n: int) -> dict[str, Tensor]:
        """The condition ∅ of guidance, for n samples."""
        return self.condition(torch.full((n,), self.null_label, device=self.network.device))

    def prepare(self, data: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of the dataset -> (x_0, condition)."""
        return data, self.condition(label)

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> samples as people see them."""
        return x0

    # -- the model ----------------------------------------------------------------------------------------------------

    def endpoint(self, noise: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> Tensor:
        """Where the PF-ODE (Eq. 3, guided by w) takes the noise of time N-1, (B, ...): the map to be distilled.

        As far as DDIM in `evaluation`'s largest number of steps knows."""
        times, steps = len(self.schedule), max(self.evaluation["teacher_steps"])
        t = torch.full((len(noise),), times - 1, device=noise.device)
        zero = torch.zeros_like(t)
        x = multiple_estimation(
            lambda x, t: self.predict(x, t, cond, w), self.schedule, noise, t, zero, times - 1, times // steps
        )
        return self.predict(x, zero, cond, w)[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Teacher":
        """Moves the model. `dtype`, of the frozen network, is for kinds whose network is large."""
        self.network.to(device)
        return self

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        """(x_0, ε̃) at x (B, ...), t (B,) with guidance w (Eq. 18): both passes in one batch, and only one for w = 0."""
        if w and not self.conditional:
            raise BadInput("guidance needs a conditional teacher: this one has no labels")
        n = 2 if w else 1
        if w:
            nothing = self.nothing(len(x))
            cond = {key: torch.cat([value, nothing[key]]) for key, value in cond.items()}
        cond = {key: v.to(self.network.dtype) if v.is_floating_point() else v for key, v in cond.items()}
        x_in = x.to(self.network.dtype)
        output = self.network(torch.cat([x_in] * n), torch.cat([t] * n), **cond).sample.float()
        if w:
            output = guided(*output.chunk(2), w)
        return to_x0_eps(output, x, *self.schedule.at(t, x.ndim), self.prediction_type)

    def copy_network(self, lora_rank: int = 0) -> nn.Module:
        """A trainable copy in float32: where a student starts. With a LoRA, only that is trainable."""
        network = copy.deepcopy(self.network).train().float().requires_grad_(not lora_rank)
        if lora_rank:
            if not hasattr(network, "add_adapter"):
                raise BadInput(f"--lora_rank: diffusers has no LoRA for a {type(network).__name__}")
            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS))
        return network

    def student(self, weights: dict[str, Tensor], original_inference_steps: int, lora_rank: int = 0) -> "Teacher":
        """This teacher's pipeline with a student's weights and the scheduler of few-step sampling."""
        network = self.copy_network(lora_rank)
        network.load_state_dict(weights)
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(
            unet=network,
            scheduler=LCMScheduler.from_config(
                self.pipeline.scheduler.config,
                original_inference_steps=original_inference_steps,
                clip_sample=False,
                thresholding=False,
            ),
        )
        return type(self)(pipeline, f"student of {self.name}")


def refuse_pair_flags(args: argparse.Namespace) -> None:
    if args.min_image_size or args.max_pwatermark < 1 or args.cache_latents:
        raise BadInput("--min_image_size, --max_pwatermark and --cache_latents are for images with captions")


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
        "block_out_channels": [16, 32, 64, 128],
    }
    evaluation = {"teacher_steps": [1, 2, 4, 10, 50], "num_samples": 5000, "batch_size": 1024}

    def __init__(self, pipeline: DDPMPipeline, name: str):
        super().__init__(pipeline, name)
        config = self.network.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        refuse_pair_flags(args)
        images = load_images(args.data, resolution=args.resolution or self.shape[1], mirror=True)
        if images.samples.shape[-1] != self.shape[1]:
            raise BadInput(f"{self.name} makes images of {self.shape[1]} pixels, not {args.resolution}")
        if self.null_label is not None and len(images.classes) > self.null_label:
            raise BadInput(f"{args.data} has {len(images.classes)} classes, and {self.name} knows {self.null_label}")
        return images

    def reference(self, data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
        return load_images(data, split, resolution=self.shape[1]).samples

    def measures(self, reference: Tensor | ImageFiles, features: str, clip_model: str | None) -> list[Measure]:
        if clip_model:
            raise BadInput("--clip_model is for models that are prompted by texts")
        return [ImageFeatures(features, reference, self.network.device)]

    def measured(self, samples: Tensor, resolution: int | None) -> Tensor:
        return torch.from_numpy(to_pixels(samples)).permute(0, 3, 1, 2)

    def picture(self, samples: Tensor, columns: int | None = None) -> Image.Image:
        return Image.fromarray(to_pixels(make_grid(samples, columns or self.columns, padding=1, pad_value=1)[None])[0])

    def read(self, file: Path) -> Tensor:
        with Image.open(file) as image:
            return to_tensor(image) * 2 - 1

    def overview(self, panels: dict[str, Tensor], k: int = 100) -> Image.Image:
        """A row of images for each panel, enlarged, with the panel's name above it."""
        rows = [(name, self.picture(samples[: self.columns])) for name, samples in panels.items()]
        scale = max(1, 800 // rows[0][1].width)
        width, height, text = rows[0][1].width * scale, rows[0][1].height * scale, 16
        image = Image.new("RGB", (width, len(rows) * (height + text)), "white")
        font = ImageFont.truetype(findfont("DejaVu Sans"), 11)  # matplotlib brings it; it knows Greek
        for i, (name, row) in enumerate(rows):
            ImageDraw.Draw(image).text((4, i * (height + text) + 2), name, fill="black", font=font)
            image.paste(row.resize((width, height), Image.Resampling.NEAREST), (0, i * (height + text) + text))
        return image

    @staticmethod
    def new_network(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
        """A small U-Net (2.5 M weights by default) for the images in `args.data`, and these images."""
        images, channels = load_images(args.data, resolution=args.resolution, mirror=True), args.block_out_channels
        size, levels = images.samples.shape[-1], len(channels)
        if size % 2 ** (levels - 1) or any(width % 8 for width in channels):
            raise BadInput(
                f"--block_out_channels: {size} pixels cannot be halved {levels - 1} times, or no multiple of 8"
            )
        attention = min(2, levels - 1)  # the level that attends
        return UNet2DModel(
            sample_size=size,
            block_out_channels=channels,
            down_block_types=["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(levels)],
            up_block_types=["AttnUpBlock2D" if i == attention else "UpBlock2D" for i in reversed(range(levels))],
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=min(32, channels[attention]),
            num_class_embeds=len(images.classes) + 1 if args.class_conditional else None,
        ), images


def to_pixels(samples: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), rounded as diffusers' image processor does."""
    return ((samples / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class StableDiffusion(ImageTeacher):
    """Text to image in the latents of a VAE: any folder or hub id of a `StableDiffusionPipeline`.

    VAE and text encoder keep float32 weights. The VAE also computes in float32, because some overflow in fp16; the text
    encoder computes under autocast, as the student does. The large U-Net is cast to the compute dtype once.
    """

    pipeline_class = StableDiffusionPipeline
    pipeline_names = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    recipe = {
        "max_train_steps": 6000,
        "train_batch_size": 16,
        "learning_rate": 8e-6,
        "mixed_precision": "bf16",
        "validation_steps": 500,
        "num_eval_samples": 0,
    }
    evaluation = {"teacher_steps": [4, 50], "num_samples": 5000, "batch_size": 16}
    pictured, columns = 10, 10
    default_prompts = [
        f"a photo of a{'n' * (thing[0] in 'ae')} {thing}"
        for thing in "airplane automobile bird cat deer dog frog horse ship truck".split()
    ]

    def __init__(self, pipeline: StableDiffusionPipeline, name: str):
        super().__init__(pipeline, name)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.null_text: Tensor | None = None  # embedded when first asked for

    conditional = True

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StableDiffusion":
        for module in (self.vae, self.text_encoder):
            module.to(device)
        self.network.to(device, dtype)
        return self

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        return tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def dataset(self, args: argparse.Namespace) -> Dataset:
        resolution = args.resolution or self.shape[1] * self.pipeline.vae_scale_factor
        if resolution % self.pipeline.vae_scale_factor:
            raise BadInput(f"--resolution {resolution} is no multiple of the VAE's {self.pipeline.vae_scale_factor}")
        self.shape = (self.shape[0], *[resolution // self.pipeline.vae_scale_factor] * 2)
        pairs = load_pairs(args.data, PairOptions(resolution, args.min_image_size, args.max_pwatermark), self.tokenize)
        if not args.cache_latents:
            return pairs
        state = training.process()
        made_from = {name: getattr(args, name) for name in ("data", "min_image_size", "max_pwatermark")}
        made_from |= {"teacher": self.name, "resolution": resolution, "mixed_precision": args.mixed_precision}

        @torch.no_grad()
        def encode(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            with training.autocast(state.device, args.mixed_precision):
                x0, cond = self.prepare(pixels.to(state.device), tokens.to(state.device))
            return x0.cpu(), cond["encoder_hidden_states"].cpu()

        cache_pairs(pairs, args.cache_latents, made_from, encode, state.process_index, state.num_processes)
        state.wait_for_everyone()
        return CachedLatents(args.cache_latents)

    def reference(self, data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
        if ".tar" in data and not Path(data).is_dir():
            raise BadInput(f"{data} is no folder of images to measure against: --data")
        resolution = resolution or self.shape[1] * self.pipeline.vae_scale_factor
        files = image_files(data, split)
        return ImageFiles(files, resolution) if files else load_images(data, split, resolution).samples

    def measures(self, reference: Tensor | ImageFiles, features: str, clip_model: str | None) -> list[Measure]:
        measures = super().measures(reference, features, None)
        return measures + ([ClipScore(clip_model, self.network.device)] if clip_model else [])

    def measured(self, samples: Tensor, resolution: int | None) -> Tensor:
        return torch.stack([centre_square(Image.fromarray(x), resolution or len(x)) for x in to_pixels(samples)])

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts) or self.default_prompts

    def labels(self, prompts: Sequence[str]) -> Tensor:
        return self.tokenize(self.texts(prompts))

    @torch.no_grad()
    def condition(self, label: Tensor) -> dict[str, Tensor]:
        """`label`: tokens (B, L), or their embeddings (B, L, D) from a cache.

        Some released few-step U-Nets are told their guidance scale as well (`time_cond_proj_dim`). They get what stock
        diffusers gives them at guidance_scale 1: the embedding of w = 0.
        """
        embedded = label if label.is_floating_point() else self.text_encoder(label)[0]
        cond = {"encoder_hidden_states": embedded}
        if length := self.network.config.time_cond_proj_dim:
            zero = torch.zeros(len(label))
            cond["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(zero, length).to(embedded)
        return cond

    def nothing(self, n: int) -> dict[str, Tensor]:
        if self.null_text is None:
            self.null_text = self.text_encoder(self.tokenize([""]).to(self.network.device))[0].detach()
        return self.condition(self.null_text.expand(n, -1, -1))

    @torch.no_grad()
    def prepare(self, data: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels and tokens, or latents and embeddings from a cache. x_0 is the mean of the VAE's posterior, whose
        deviation is far below one grey level in the VAEs of Stable Diffusion; so a cache holds the very same x_0."""
        if not label.is_floating_point():
            with torch.autocast(data.device.type, enabled=False):
                data = self.vae.encode(data.float()).latent_dist.mode() * self.vae.config.scaling_factor
        return data, self.condition(label)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        with torch.autocast(x0.device.type, enabled=False):
            latents = (x0.float() / self.vae.config.scaling_factor).split(8)
            return torch.cat([self.vae.decode(part).sample for part in latents]).clamp(-1, 1)

    @staticmethod
    def new_network(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
        raise BadInput("toy/tiny_sd.py trains a small text-to-image model from nothing")

    def student(self, weights: dict[str, Tensor], original_inference_steps: int, lora_rank: int = 0) -> "Teacher":
        student = super().student(weights, original_inference_steps, lora_rank)
        student.network.register_to_config(sample_size=self.shape[1])  # what it was distilled at
        student.shape = self.shape
        return student
