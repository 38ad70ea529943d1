"""What a diffusion model is to the rest of the project: one small interface, its three kinds, and how to train one.

    PointModel        2-D points; the network is toy/mlp.py's
    ImageModel        pixels; a UNet2DModel of diffusers, with or without class labels
    StableDiffusion   text to image in the latents of a VAE

Teachers and students are both DiffusionModels, and both are kept as folders in diffusers' pipeline format. A student is
such a folder whose scheduler is an LCMScheduler; that is all that sets them apart. All that differs between kinds of
model stands in this file.

    python teacher.py --data data/cifar10            trains one on images
    python teacher.py --data toy:moons               or on a 2-D distribution

diffusers, transformers and peft take seconds to import. So each is imported inside the function that needs it: the toy
needs neither transformers nor peft, and --help none of them.
"""

import argparse
import contextlib
import copy
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

import data
import training
from splam import Schedule, distance, draw, ema_update, guided, to_x0_eps

LORA_FILE = training.MODEL_FILES[0]
# What a LoRA adapts: attention, feed-forward and convolutions, as in diffusers' LCM-LoRA training script.
LORA_TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # of Stable Diffusion's pipelines


# ---------------------------------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A frozen diffusion model: what distillation, sampling and evaluation must know of it.

    Two words. A *label* is what the data hold beside x_0: a class number, or the tokens of a caption. A *condition* is
    what the network gets for it, as keyword arguments. This base class knows class numbers, for networks that have
    them; the last one means "no class" and is the condition of guidance's unconditional pass.

    Each kind adds two methods: `dataset(args)`, training data whose batches are (x, label) pairs for `prepare`, and
    the class method `load(name, index)`, the model in a folder or under a hub id, whose model_index.json is `index`.
    """

    kind: str  # "points", "images" or "text-to-image": which row of a program's table of recipes is for it
    network_class: tuple[str, str]  # library and class, by which model_index.json tells the kinds apart
    pipeline_names: tuple[str, ...] = ("DDPMPipeline",)
    shape: tuple[int, ...]  # of one x_0
    resolution: int | None = None  # of the images that it makes, in pixels
    default_data: str | None = None  # what it was made from, where the model itself knows
    default_prompts: Sequence[str] = ()  # of models that are prompted by texts
    many_steps, batch_size = 50, 1024  # DDIM steps that count as the end of its PF-ODE; samples at a time

    def __init__(self, network: nn.Module, scheduler, name: str):
        from diffusers import LCMScheduler

        _drop_variance(network)
        _check_parts(network, scheduler, name)
        # Frozen here, once: a teacher is never trained, and a student's network is a copy (copy_network).
        self.network, self.scheduler, self.name = network.eval().requires_grad_(False), scheduler, name
        self.schedule = Schedule(scheduler.alphas_cumprod)
        self.prediction_type: str = scheduler.config.prediction_type
        self.is_student = isinstance(scheduler, LCMScheduler)
        # How many times the grid of few-step sampling has: of a student, as many as it was distilled with. diffusers'
        # own default is 50 as well.
        times: int = scheduler.config.get("original_inference_steps", 50)
        sound = isinstance(times, int) and 0 < times <= len(self.schedule)
        data.refuse(self.is_student and not sound, f"the scheduler of {name} has {times!r} original_inference_steps")
        self.original_inference_steps = times
        classes = network.config.get("num_class_embeds")
        self.null_label = None if classes is None else classes - 1

    @property
    def device(self) -> torch.device:
        """Where its network is."""
        return next(self.network.parameters()).device

    @property
    def conditional(self) -> bool:
        """Whether it can be guided."""
        return self.null_label is not None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "DiffusionModel":
        """Moves the model. `dtype` is for the frozen network of kinds whose network is large."""
        self.network.to(device)
        return self

    # -- data, labels and conditions ----------------------------------------------------------------------------------

    def prepare(self, x: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of the dataset -> (x_0, condition)."""
        return x, self.condition(label)

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """What a person asks for -> labels (n, ...). Without prompts: all classes in turn."""
        if not prompts:
            return torch.arange(self.null_label or 1)
        classes = self.null_label or 0
        # On the command line a class is its number; names of classes are not kept in a pipeline folder.
        unknown = not all(prompt.isdigit() and int(prompt) < classes for prompt in prompts)
        data.refuse(unknown, f"prompts are class labels here, and this model has {classes or 'no'} classes")
        return torch.tensor([int(prompt) for prompt in prompts])

    def condition(self, label: Tensor) -> dict[str, Tensor]:
        """Labels (B, ...) -> the network's keyword arguments."""
        return {} if self.null_label is None else {"class_labels": label}

    def null_condition(self, n: int) -> dict[str, Tensor]:
        """The condition ∅ of Eq. 18, for n samples."""
        return self.condition(torch.full((n,), self.null_label, device=self.device))

    # -- the network --------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        """(x_0, ε̃) at x (B, ...) and t (B,), guided by w (Eq. 18).

        Both passes, with the condition and without, go through the network as one batch. w = 0 needs only the first.
        The network gets its own precision, which for a large frozen one is half; what comes back is float32.
        """
        data.refuse(w and not self.conditional, "guidance needs a conditional teacher: this one has no labels")
        x_in, t_in = x, t
        if w:
            null = self.null_condition(len(x))
            cond = {key: torch.cat([value, null[key]]) for key, value in cond.items()}
            x_in, t_in = torch.cat([x, x]), torch.cat([t, t])
        dtype, cond = next(self.network.parameters()).dtype, self.as_network_takes(cond)
        # A network whose weights are half already needs no autocast. That would still compute its normalizations in
        # float32, and cast before and after each of them: two thirds more kernels on a GPU, for little accuracy.
        context = contextlib.nullcontext()
        if dtype != torch.float32:
            context = torch.autocast(self.device.type, enabled=False)
        with context:
            output = self.network(x_in.to(dtype), t_in, **cond).sample.float()
        if w:
            output = guided(*output.chunk(2), w)
        return to_x0_eps(output, x, *self.schedule.at(t, x.ndim), self.prediction_type)

    def as_network_takes(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition in the precision of the network's weights; class numbers and tokens as they are."""
        dtype = next(self.network.parameters()).dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> samples as a person sees them."""
        return x0

    # -- students -----------------------------------------------------------------------------------------------------

    def copy_network(self, lora_rank: int = 0) -> nn.Module:
        """A trainable copy in float32, where a student starts. With a LoRA, only the LoRA is trainable."""
        # float32, since the frozen network may have been cast to half precision (see Distillation).
        network = copy.deepcopy(self.network).train().float().requires_grad_(not lora_rank)
        if lora_rank:
            from peft import LoraConfig

            unable = not hasattr(network, "add_adapter")
            data.refuse(unable, f"--lora_rank: diffusers has no LoRA for a {type(network).__name__}")
            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS))
        return network

    def student(self, weights: dict[str, Tensor], num_ddim_timesteps: int, lora_rank: int = 0) -> "DiffusionModel":
        """This model with a student's weights, and the scheduler that samples in a few steps of that grid."""
        network = self.copy_network(lora_rank)
        network.load_state_dict(weights)
        return self._with(network, self.few_step_scheduler(num_ddim_timesteps), f"student of {self.name}")

    def few_step_scheduler(self, num_ddim_timesteps: int):
        """The LCMScheduler of a student, with this model's schedule. BadInput if diffusers cannot make it."""
        from diffusers import LCMScheduler

        # Clipping and thresholding would change the x_0 that the student was trained to give.
        options = {"original_inference_steps": num_ddim_timesteps, "clip_sample": False, "thresholding": False}
        try:
            scheduler = LCMScheduler.from_config(self.scheduler.config, **options)
        except Exception as error:  # what diffusers raises depends on what it does not know
            raise data.BadInput(f"diffusers' LCMScheduler cannot take the schedule of {self.name}: {error}") from error
        # It reads the same config in its own way: with its own defaults for what is missing there, and with options
        # that the teacher's kind of scheduler does not know.
        here, there = self.schedule, Schedule(scheduler.alphas_cumprod)
        same = len(here) == len(there) and torch.allclose(here.alpha.cpu(), there.alpha, rtol=0, atol=1e-3)
        data.refuse(not same, f"diffusers' LCMScheduler makes another noise schedule of the config of {self.name}")
        _check_parts(self.network, scheduler, f"a student of {self.name}")
        return scheduler

    def _with(self, network: nn.Module, scheduler, name: str) -> "DiffusionModel":
        """A model of this kind with another network and scheduler, all else shared."""
        return type(self)(network, scheduler, name)

    def write(self, folder: Path) -> None:
        """Network, scheduler, and the index that makes the folder a DDPMPipeline, into the empty `folder`."""
        import diffusers

        self.network.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        parts = {"unet": self.network_class, "scheduler": ("diffusers", type(self.scheduler).__name__)}
        index = {"_class_name": self.pipeline_names[0], "_diffusers_version": diffusers.__version__, **parts}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _drop_variance(network: nn.Module) -> None:
    """Of a U-Net that also predicts the variance of DDPM's steps, keeps what predicts the mean: the first half of its
    output. No ODE asks for the other half, and a network with as many channels out as in is one that any sampler takes.
    """
    channels = network.config.get("in_channels")
    if channels and network.config.out_channels == 2 * channels:
        head = network.conv_out
        head.weight, head.bias = nn.Parameter(head.weight[:channels]), nn.Parameter(head.bias[:channels])
        network.register_to_config(out_channels=channels)


def _check_parts(network: nn.Module, scheduler, name: str) -> None:
    """Refuses networks and schedulers that no part of this project could use. Each of these would otherwise show as a
    traceback far from its cause, or as samples that are not finite."""
    alphas, config = getattr(scheduler, "alphas_cumprod", None), network.config
    kind, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    data.refuse(alphas is None, f"{name} has a {kind}, of flow matching perhaps: α and σ of Eq. 1 are needed")
    falling = len(alphas) > 1 and alphas[0] < 1 and alphas[-1] >= 0 and (alphas.diff() < 0).all()
    data.refuse(not falling, f"the {kind} of {name} has an α that does not fall from below 1 towards 0")
    known = prediction in ("epsilon", "sample", "v_prediction")
    data.refuse(not known, f"{name} predicts {prediction!r}, which is none of epsilon, sample, v_prediction")
    # Eq. 8 divides by α. Networks for such a schedule predict v, or x_0.
    blind = prediction == "epsilon" and alphas[-1] == 0
    data.refuse(blind, f"{name} predicts epsilon, from which x_0 is lost at the last time: α is 0 (zero terminal SNR)")
    size = config.get("sample_size", 1)  # 2-D points have none
    data.refuse(not isinstance(size, int) or size < 1, f"{name} makes images of {size} pixels: a square is needed")
    channels = config.get("in_channels"), config.get("out_channels")
    data.refuse(channels[0] != channels[1], f"{name} takes {channels[0]} channels and returns {channels[1]}")
    other = config.get("class_embed_type")
    data.refuse(other, f"{name} takes classes as {other!r}: numbers of classes are needed")


def refuse_pair_flags(args: argparse.Namespace) -> None:
    """For kinds without captions. (teacher.py itself does not have these flags.)"""
    neutral = {"min_image_size": 0, "max_pwatermark": 1.0, "cache_latents": None, "allow_pipe": False}
    given = any(getattr(args, name, value) != value for name, value in neutral.items())
    names = "--min_image_size, --max_pwatermark, --cache_latents and --allow_pipe"
    data.refuse(given, f"{names} are for images with captions")


# ---------------------------------------------------------------------------------------------------------------------
# 2-D points
# ---------------------------------------------------------------------------------------------------------------------


class PointModel(DiffusionModel):
    """2-D points.

    A teacher "toy:moons" is a PointMLP trained on points of that mixture. A teacher "ideal:moons" knows ε in closed
    form: with it, what goes wrong in a student cannot be blamed on the teacher. It has a PointMLP as well, which is
    where its students start.
    """

    kind, network_class = "points", ("toy.mlp", "PointMLP")
    shape, many_steps = (2,), 1000  # with so small a network, every time step can be one of the solver's

    def __init__(self, network: nn.Module, scheduler, name: str):
        super().__init__(network, scheduler, name)
        # A student of an ideal teacher is a network and nothing else, though its config remembers where it comes from.
        self.ideal = network.config.ideal and not self.is_student
        self.default_data = f"{'ideal' if network.config.ideal else 'toy'}:{network.config.distribution}"
        self.mixture = data.distribution(self.default_data)

    @classmethod
    def load(cls, name: str, index: dict) -> "PointModel":
        import diffusers

        from toy.mlp import PointMLP

        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(name, subfolder="scheduler")
        return cls(PointMLP.from_pretrained(Path(name) / "unet"), scheduler, name)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        refuse_pair_flags(args)
        data.refuse(args.resolution, "--resolution is for images")
        return data.Points(args.data)

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        if not self.ideal or (w and not self.conditional):  # the base class refuses the latter
            return super().predict(x, t, cond, w)
        alpha, sigma = self.schedule.at(t, 2)  # Tweedie: the mixture's ε is -σ times its score, below Eq. 3
        return to_x0_eps(self.mixture.eps(x, alpha, sigma, cond.get("class_labels"), w), x, alpha, sigma, "epsilon")


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class ImageModel(DiffusionModel):
    """A U-Net on pixels."""

    kind, network_class = "images", ("diffusers", "UNet2DModel")

    def __init__(self, network: nn.Module, scheduler, name: str):
        super().__init__(network, scheduler, name)
        channels = network.config.in_channels
        data.refuse(channels != 3, f"{name} makes images of {channels} channels: red, green and blue are needed")
        self.resolution = network.config.sample_size
        self.shape = (channels, self.resolution, self.resolution)

    @classmethod
    def load(cls, name: str, index: dict) -> "ImageModel":
        from diffusers import DDPMPipeline  # knows older layouts of the folder too

        pipeline = DDPMPipeline.from_pretrained(name, use_safetensors=True)
        return cls(pipeline.unet, pipeline.scheduler, name)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Images by class, each also as its mirror image. They must have the network's size and no more classes."""
        refuse_pair_flags(args)
        images = data.load_images(args.data, resolution=args.resolution or self.resolution, mirror=True)
        other_size, classes = images.samples.shape[-1] != self.resolution, len(images.classes)
        data.refuse(other_size, f"{self.name} makes images of {self.resolution} pixels, not {args.resolution}")
        too_many = self.null_label is not None and classes > self.null_label
        data.refuse(too_many, f"{args.data} has {classes} classes, and {self.name} knows {self.null_label}")
        return images


# ---------------------------------------------------------------------------------------------------------------------
# Text to image
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(tokenizer, texts: Sequence[str]) -> Tensor:
    """Texts -> tokens (n, L), where L = 77 is all that CLIP can take. What is longer is cut off."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


class StableDiffusion(DiffusionModel):
    """Any StableDiffusionPipeline: SD1.5, SD2.1 with its v-prediction, and fine-tuned ones.

    The U-Net is large, and cast to the compute precision once. VAE and text encoder keep float32 weights. The text
    encoder computes under autocast, as the student does; of the VAE see _vae_precision.
    """

    kind, network_class = "text-to-image", ("diffusers", "UNet2DConditionModel")
    pipeline_names = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    batch_size = 16
    things = "an airplane, an automobile, a bird, a cat, a deer, a dog, a frog, a horse, a ship, a truck".split(", ")
    default_prompts = [f"a photo of {thing}" for thing in things]
    conditional = True

    def __init__(self, pipeline, name: str):
        super().__init__(pipeline.unet, pipeline.scheduler, name)
        self.pipeline = pipeline
        # Not a method, which would hold this model: datasets have it, and from Python 3.14 on they are pickled for each
        # process of a loader.
        self.tokenize = functools.partial(tokenize, pipeline.tokenizer)
        vae = type(pipeline.vae).__name__
        known = vae in ("AutoencoderKL", "AsymmetricAutoencoderKL")
        data.refuse(not known, f"{name} has an {vae}: an AutoencoderKL is needed")
        data.refuse(self.null_label is not None, f"{name} takes classes besides texts, which no data here has")
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.null_text: Tensor | None = None  # the empty text's embedding, made when it is first asked for
        config = self.network.config
        other = config.in_channels != self.vae.config.latent_channels  # for inpainting it takes more than a latent
        data.refuse(other, f"the network of {name} takes {config.in_channels} channels, and its VAE makes others")
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.resolution = config.sample_size * pipeline.vae_scale_factor

    @classmethod
    def load(cls, name: str, index: dict) -> "StableDiffusion":
        """Weights in safetensors only: pickles can run code."""
        from diffusers import StableDiffusionPipeline

        # The safety checker and its kin are not loaded: they would cost memory and are not distilled. Without the flag
        # diffusers would warn of it, and so would everyone who loads the student.
        options = {"use_safetensors": True, "requires_safety_checker": False, **dict.fromkeys(UNUSED_PARTS)}
        model = cls(StableDiffusionPipeline.from_pretrained(name, **options), name)
        # A tokenizer whose files are missing is loaded all the same, with an empty vocabulary.
        alike = len(model.labels([]).unique(dim=0)) == 1
        data.refuse(alike, f"the tokenizer of {name} does not tell texts apart: are its files there?")
        return model

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StableDiffusion":
        self.vae.to(device)
        self.text_encoder.to(device)
        self.network.to(device, dtype)
        return self

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """uint8 pixels and tokens; with --cache_latents, latents and embeddings, made now if they are not there."""
        resolution, factor = args.resolution or self.resolution, self.pipeline.vae_scale_factor
        data.refuse(resolution % factor, f"--resolution {resolution} is no multiple of the VAE's {factor}")
        # A U-Net takes any size. The student will remember the one at which it was distilled.
        self.resolution, self.shape = resolution, (self.shape[0], resolution // factor, resolution // factor)
        options = (resolution, args.min_image_size, args.max_pwatermark, args.allow_pipe)
        pairs = data.load_pairs(args.data, options, self.tokenize)
        if not args.cache_latents:
            return pairs
        state = training.process()
        # All that latents and embeddings depend on. A cache that was made otherwise is refused.
        made_from = {name: getattr(args, name) for name in ("data", "min_image_size", "max_pwatermark")}
        made_from |= {"teacher": self.name, "resolution": resolution, "mixed_precision": args.mixed_precision}

        def encode(pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), training.autocast(self.device, args.mixed_precision):
                x0, cond = self.prepare(pixels.to(self.device), tokens.to(self.device))
            return x0, cond["encoder_hidden_states"]

        # evaluate.py has no flag for workers.
        place = (state.process_index, state.num_processes, getattr(args, "dataloader_num_workers", 0))
        data.cache_pairs(pairs, args.cache_latents, made_from, encode, *place)
        state.wait_for_everyone()
        return data.CachedLatents(args.cache_latents)

    def _vae_precision(self) -> contextlib.AbstractContextManager:
        """float32, because some VAEs overflow in fp16. A VAE whose config says that it does not is computed as all
        else is. (diffusers' name for it is force_upcast, and true unless a config says otherwise.)"""
        if self.vae.config.force_upcast:
            return torch.autocast(self.device.type, enabled=False)
        return contextlib.nullcontext()

    @torch.no_grad()
    def prepare(self, x: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels (uint8, or in [-1, 1]) and tokens, or latents and embeddings of a cache -> (latents, condition).

        x_0 is the mean of the VAE's posterior, without a draw from it. In Stable Diffusion's VAEs the posterior's
        deviation is far below one grey level; and so a cache holds the very same x_0.
        """
        x = data.to_range(x) if x.dtype == torch.uint8 else x  # here, on the device: bytes travel faster
        if not label.is_floating_point():  # tokens are whole numbers, embeddings are not
            # Eight images at a time, as in decode: at 512 pixels one takes more than half a GiB in the encoder.
            with self._vae_precision():
                parts = [self.vae.encode(part).latent_dist.mode() for part in x.float().split(8)]
            x = torch.cat(parts).float() * self.vae.config.scaling_factor
        return x, self.condition(label)

    def labels(self, prompts: Sequence[str]) -> Tensor:
        return self.tokenize(prompts or self.default_prompts)

    @torch.no_grad()
    def condition(self, label: Tensor) -> dict[str, Tensor]:
        """`label`: tokens (B, L), or their embeddings (B, L, D).

        Some released few-step U-Nets are told their guidance scale as well (`time_cond_proj_dim`). They get what stock
        diffusers gives them at guidance_scale 1: the embedding of w = 0.
        """
        embedded = label if label.is_floating_point() else self.text_encoder(label)[0]
        cond = {"encoder_hidden_states": embedded}
        if length := self.network.config.time_cond_proj_dim:
            zero = torch.zeros(len(label))
            cond["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(zero, length).to(embedded)
        return cond

    def null_condition(self, n: int) -> dict[str, Tensor]:
        # One embedding for all samples and steps: the empty text, as Stable Diffusion was trained with for guidance.
        if self.null_text is None:
            self.null_text = self.text_encoder(self.tokenize([""]).to(self.device))[0].detach()
        return self.condition(self.null_text.to(self.device).expand(n, -1, -1))

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], eight images at a time: a decoder needs more memory than the U-Net."""
        with self._vae_precision():
            parts = (x0.float() / self.vae.config.scaling_factor).split(8)
            return torch.cat([self.vae.decode(part).sample for part in parts]).float().clamp(-1, 1)

    def _with(self, network: nn.Module, scheduler, name: str) -> "StableDiffusion":
        # A shallow copy: the student shares the teacher's VAE, text encoder and tokenizer.
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(unet=network, scheduler=scheduler)
        network.register_to_config(sample_size=self.shape[1])  # at which it was distilled
        return StableDiffusion(pipeline, name)

    def write(self, folder: Path) -> None:
        """The whole pipeline; of a network with a LoRA only the LoRA, as pipe.load_lora_weights reads it, and the
        scheduler."""
        if not getattr(self.network, "peft_config", None):
            self.pipeline.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        self.pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(self.network))
        self.scheduler.save_pretrained(folder / "scheduler")


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ---------------------------------------------------------------------------------------------------------------------

KINDS = (PointModel, ImageModel, StableDiffusion)


def save(model: DiffusionModel, folder: Path) -> None:
    """Writes the model's folder. It is complete under another name before its parts take the place of older ones.

    What `load` looks for first is removed first and comes last, so that a folder that has it is whole, and never a
    mixture of two models. OSError if it cannot be written.
    """
    draft, marks = folder / "pipeline.tmp", training.MODEL_FILES
    with training.writing(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        model.write(draft)
        for name in marks:
            (folder / name).unlink(missing_ok=True)
        for part in sorted(draft.iterdir(), key=lambda part: part.name in marks):
            if (folder / part.name).is_dir():
                shutil.rmtree(folder / part.name)
            part.replace(folder / part.name)
        draft.rmdir()


def load(name: str) -> DiffusionModel:
    """The teacher or student in a pipeline folder, in a folder with a LoRA of distill.py, or under a hub id.

    All models come through here. So this is the one place that turns what libraries raise for a damaged folder, each
    in its own way, into a BadInput. What is whole but unusable is refused in _check_parts.
    """
    try:
        return _load_lora(Path(name)) if (Path(name) / LORA_FILE).is_file() else _load_pipeline(name)
    except data.BadInput:
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise data.BadInput(f"cannot load {name}: {type(error).__name__}: {first_line}") from error


def _load_pipeline(name: str) -> DiffusionModel:
    index = _read_index(name)
    kinds = [kind for kind in KINDS if list(kind.network_class) == index.get("unet")]
    parts = [part for key, part in index.items() if isinstance(part, list) and key not in UNUSED_PARTS]
    # diffusers imports whatever module this file names. So before it does, each must be one that is known.
    unknown = [part for part in parts if part[:1] not in ([None], ["diffusers"], ["transformers"], ["toy.mlp"])]
    unknown = unknown or not kinds or index.get("_class_name") not in kinds[0].pipeline_names
    data.refuse(unknown, f"{name} is a {index.get('_class_name')}, which is no kind of teacher known here")
    _silence_libraries(kinds[0])
    model = kinds[0].load(name, index)
    # Where a file lacks weights, diffusers leaves parameters that have a shape and no values.
    modules = [part for part in vars(model).values() if isinstance(part, nn.Module)]
    empty = any(parameter.is_meta for module in modules for parameter in module.parameters())
    data.refuse(empty, f"{name} has no weights for some of its layers")
    return model


def _read_index(name: str) -> dict:
    """model_index.json of a folder or hub id.

    diffusers could read a folder's too. But to ask it is to import its pipelines, and with them transformers.
    """
    if Path(name).exists():
        data.refuse(not (Path(name) / "model_index.json").is_file(), f"{name} is no pipeline folder")
        return data.read_json(Path(name) / "model_index.json")
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise data.BadInput(f"no pipeline folder and no reachable hub id: {name}") from error


def _silence_libraries(kind: type[DiffusionModel]) -> None:
    """Progress bars and advice of diffusers and transformers, which would stand between the lines of our own."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    if kind is not PointModel:  # which needs no transformers
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _load_lora(folder: Path) -> DiffusionModel:
    from diffusers import LCMScheduler

    record, reason = folder / "metrics.json", "which names the model that it belongs to"
    data.refuse(not record.is_file(), f"{folder} holds a LoRA but no metrics.json, {reason}")
    configuration = data.read_json(record)["configuration"]
    pipeline = load(configuration["pretrained_teacher_model"]).pipeline
    if resolution := configuration.get("resolution"):  # at which it was distilled, if that is not the teacher's own
        pipeline.unet.register_to_config(sample_size=resolution // pipeline.vae_scale_factor)
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    pipeline.fuse_lora()  # added to the weights: from here on it is a student like any other
    pipeline.unload_lora_weights()
    pipeline.register_modules(scheduler=LCMScheduler.from_pretrained(folder / "scheduler"))
    return StableDiffusion(pipeline, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Training a teacher: ordinary denoising
# ---------------------------------------------------------------------------------------------------------------------

# Command lines by kind of model, which are read before what was typed. Points take 15 seconds of two CPU cores,
# images half an hour. scaled_linear is the form of Stable Diffusion's noise schedule, but with diffusers' default
# ends, which are not Stable Diffusion's; linear is DDPM's own schedule. These channels make 2.5 M weights.
RECIPES = {
    "points": "--max_train_steps 3000 --train_batch_size 512 --learning_rate 2e-3 --beta_schedule scaled_linear",
    "images": "--max_train_steps 6000 --train_batch_size 64 --learning_rate 1e-3 --beta_schedule linear"
    " --mixed_precision bf16 --block_out_channels 16 32 64 128",
}


def parser() -> argparse.ArgumentParser:
    """The flags of teacher.py."""
    p = training.Parser(
        prog="teacher.py",
        description="Train a teacher on images or on a 2-D distribution.",
        usage="teacher.py --data DATA [flags]",
        epilog=training.recipes("Defaults by kind of model", RECIPES),
        formatter_class=training.Help,
    )
    flag = p.add_argument_group("model and data").add_argument
    flag("--data", required=True, help="folder of images, or toy:<name>, or ideal:<name>")
    flag("--class_conditional", action="store_true", help="with labels, of which 10 %% are dropped")
    flag("--resolution", type=training.positive, help="images are resized and cropped to it (default: their own)")
    flag("--block_out_channels", type=training.positive, nargs="+", help="of the images' U-Net, level by level")
    # v is well conditioned everywhere. ε says little of x_0 where there is much noise, and x_0 little of ε where not.
    types = ["epsilon", "v_prediction", "sample"]
    flag("--prediction_type", choices=types, default="v_prediction", help="what the network outputs")
    flag("--beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2"], help="how noise grows with t")
    # Averaged weights sample better than the last ones.
    flag("--ema_decay", type=training.share, default=0.999, help="of the weights that are saved")
    training.add_arguments(p)
    p.set_defaults(lr_scheduler="cosine", max_grad_norm=1.0)
    return p


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags: the recipe for --data first, then what was typed, which so has the last word."""
    p, typed = parser(), list(sys.argv[1:] if arguments is None else arguments)
    first, _ = p.parse_known_args(typed)
    points = first.data.startswith(data.POINTS)
    name = first.data.partition(":")[2] if points else Path(first.data).name
    p.set_defaults(output_dir=f"runs/{name}-teacher")
    return p.parse_args([*RECIPES["points" if points else "images"].split(), *typed])


def new_model(args: argparse.Namespace, **network_options) -> DiffusionModel:
    """An untrained model of the kind that `args.data` asks for.

    `network_options` are for ablations of the toy's MLP. clip_sample=False: to clip x_0 in every solver step would be
    another ODE than the one that the student is distilled from.
    """
    from diffusers import DDPMScheduler

    set_seed(args.seed)  # of the initial weights
    scheduler = DDPMScheduler(beta_schedule=args.beta_schedule, prediction_type=args.prediction_type, clip_sample=False)
    if args.data.startswith(data.POINTS):
        return PointModel(_new_mlp(args, **network_options), scheduler, args.output_dir)
    return ImageModel(_new_unet(args), scheduler, args.output_dir)


def _new_mlp(args: argparse.Namespace, **options) -> nn.Module:
    from toy.mlp import PointMLP

    data.refuse(args.resolution or args.block_out_channels, "--resolution and --block_out_channels are for images")
    classes, (kind, _, name) = data.distribution(args.data).num_classes, args.data.partition(":")
    data.refuse(args.class_conditional and not classes, f"--class_conditional: {args.data} has no classes")
    labels = classes + 1 if args.class_conditional else None
    return PointMLP(num_class_embeds=labels, distribution=name, ideal=kind == "ideal", **options)


def _new_unet(args: argparse.Namespace) -> nn.Module:
    """A small U-Net with attention at its third level."""
    from diffusers import UNet2DModel

    # GroupNorm has 8 groups, so that every width must be a multiple of 8; each level but the last halves the image.
    images, channels = data.load_images(args.data, resolution=args.resolution, mirror=True), args.block_out_channels
    size, levels = images.samples.shape[-1], len(channels)
    impossible = size % 2 ** (levels - 1) or any(width % 8 for width in channels)
    why = f"{size} pixels cannot be halved {levels - 1} times, or no multiple of 8"
    data.refuse(impossible, f"--block_out_channels: {why}")
    attention = min(2, levels - 1)
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    labels = len(images.classes) + 1 if args.class_conditional else None
    shape = {"sample_size": size, "block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    head = {"attention_head_dim": min(32, channels[attention]), "num_class_embeds": labels}
    return UNet2DModel(**shape, **head, layers_per_block=1, norm_num_groups=8)


def train(args: argparse.Namespace, model: DiffusionModel, dataset: Dataset) -> None:
    """Trains the model's network to denoise its data (Eq. 8), and saves the average of its weights.

    The loss is the mean square between what the network outputs and what `prediction_type` says that it should. The
    loop is built like the one in distill.py, where each line is explained: what all processes draw alike, what
    autocast covers, which calls every process must reach.
    """
    # A copy is trained, and not model.network: that one stays frozen and gets the averaged weights at the end.
    network = model.copy_network()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    run = training.Run(args, network, dataset, {"average": average})
    model.to(run.accelerator.device)
    accelerator, schedule, batches = run.accelerator, model.schedule, run.batches()
    for step in run.steps():
        # Every time step is a possible start here: N starts on a grid of N times. There is no sub-path to place a γ on,
        # so this uniform number becomes the coin that decides who is told no label.
        draws = draw((run.total_batch_size, *model.shape), len(schedule), len(schedule), run.generator(step))
        losses = []
        for micro_step in range(args.gradient_accumulation_steps):
            x, label = next(batches)
            t, coin, noise = run.rows(draws, micro_step)
            with accelerator.accumulate(run.model):
                with accelerator.autocast():
                    x0, cond = model.prepare(x, label)
                    if model.conditional:  # a tenth learns the unconditional ε, which guidance needs
                        cond = _drop(cond, model.null_condition(len(x0)), coin[:, 0] < 0.1)
                    alpha, sigma = schedule.at(t, x0.ndim)
                    output = run.model(alpha * x0 + sigma * noise, t, **cond).sample  # Eq. 1
                # Outside autocast: the loss is float32.
                wanted = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
                loss = distance(output, wanted[model.prediction_type], "l2").mean()
                accelerator.backward(loss)
                run.clip_gradients()
                run.optimizer.step()
                run.optimizer.zero_grad()
            losses.append(loss.detach())
        run.lr_scheduler.step()
        # An average over 1,000 steps would remember the random start for long, so it begins with a short one.
        ema_update(average, accelerator.unwrap_model(run.model), min(args.ema_decay, step / (step + 10)))
        run.log(step, torch.stack(losses).mean())
        run.checkpoint(step)
    weights = training.gathered(average.state_dict())
    # Others may go on only when the folder is there: they load it next, if distill.py has called.
    if accelerator.is_main_process:
        model.network.load_state_dict(weights)
        save(model, run.folder)
    accelerator.wait_for_everyone()


def _drop(cond: dict[str, Tensor], null: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """The condition, and the null condition where `dropped` (B,) says so."""
    where = {key: dropped.view(-1, *[1] * (value.ndim - 1)) for key, value in cond.items()}  # (B, 1, ...), as its value
    return {key: torch.where(where[key], null[key], value) for key, value in cond.items()}


def fit(args: argparse.Namespace) -> None:
    """A model of the kind that `args.data` asks for, trained from nothing."""
    model = new_model(args)
    train(args, model, model.dataset(args))


def fit_or_load(name: str, folder: Path, arguments: Sequence[str] = (), overwrite: bool = False) -> DiffusionModel:
    """The teacher of that name. "toy:<name>" and "ideal:<name>" are fitted here and now, by teacher.py's `arguments`,
    and kept in `folder`, where the next call finds them."""
    if not name.startswith(data.POINTS):
        return load(name)
    data.distribution(name)  # refuses an unknown one before anything is fitted
    if overwrite or not (folder / "model_index.json").is_file():
        how = ["--overwrite"] if overwrite else ["--resume_from_checkpoint", "latest"]  # an interrupted fit goes on
        fit(parse(["--data", name, "--output_dir", str(folder), *how, *arguments]))
    teacher = load(str(folder))
    other = teacher.default_data != name
    data.refuse(other, f"{folder} holds a teacher of {teacher.default_data}: give {name} another --output_dir")
    return teacher


@data.program
def main() -> None:
    args = parse()
    fit(args)
    print(f"teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
