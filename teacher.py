"""What a diffusion model is to the rest of the project: one small interface, its three kinds, and how to train one.

    PointModel        2-D points; the network is toy/mlp.py's
    ImageModel        pixels; a UNet2DModel of diffusers, with or without class labels
    StableDiffusion   text to image in the latents of a VAE

Teachers and students are both DiffusionModels, and both are kept as folders in diffusers' pipeline format. A student is
such a folder whose scheduler is one for few steps; that is all that sets them apart. All that differs between kinds of
model stands in this file.

    python teacher.py --data data/cifar10            trains one on images
    python teacher.py --data toy:moons               or on a 2-D distribution

diffusers, transformers and peft take seconds to import. So each is imported inside the function that needs it: the toy
needs neither transformers nor peft, and --help none of them.
"""

import argparse
import contextlib
import copy
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

import data
import training
from cli import BadInput, Parser, positive, program, read_json, recipes, refuse, share
from splam import Schedule, ema_update, guided, per_sample, to_x0_eps

log = logging.getLogger("teacher")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that pipe.load_lora_weights looks for
# What a LoRA adapts: attention, feed-forward and convolutions, as in diffusers' LCM-LoRA training script.
LORA_TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # of Stable Diffusion's pipelines


# ---------------------------------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A frozen diffusion model: what distillation, sampling and evaluation must know of it.

    Two words. A *label* is what the data hold beside x_0: a class number, or a caption. A *condition* is what the
    network gets for it, as keyword arguments. This base class knows class numbers, for networks that have them; the
    last one means "no class" and is the condition of guidance's unconditional pass.

    Each kind adds two methods: `dataset(args)`, training data whose batches are (x, label) pairs for `prepare`, and
    the class method `load(name)`, the model in a folder or under a hub id.
    """

    kind: str  # "points", "images" or "text-to-image": which row of a program's table of recipes is for it
    network_class: tuple[str, str]  # library and class, by which model_index.json tells the kinds apart
    pipelines: tuple[str, ...] = ("DDPMPipeline",)  # class names of diffusers' pipelines of this kind
    shape: tuple[int, ...]  # of one x_0
    resolution: int | None = None  # of the images that it makes, in pixels
    default_data: str | None = None  # what it was made from, where the model itself knows
    default_prompts: Sequence[str] = ()  # of models that are prompted by texts
    takes_w: bool = False  # whether its network is told a guidance scale, as some published students are
    many_steps, batch_size = 50, 1024  # DDIM steps that count as the end of its PF-ODE; samples at a time

    def __init__(self, network: nn.Module, scheduler, name: str):
        from diffusers import LCMScheduler, TCDScheduler

        _check(network, scheduler, name)
        # Frozen here, once: a teacher is never trained, and a student's network is a copy (copy_network).
        self.network, self.scheduler, self.name = network.eval().requires_grad_(False), scheduler, name
        self.schedule = Schedule(scheduler.alphas_cumprod)
        self.prediction_type: str = scheduler.config.prediction_type
        self.is_student = isinstance(scheduler, LCMScheduler | TCDScheduler)
        # How many times the grid of few-step sampling has: of a student, as many as it was distilled with.
        self.original_inference_steps: int = scheduler.config.get("original_inference_steps", 50)
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

    def resize(self, resolution: int | None) -> None:
        """Makes it a model of images of another size, where the network allows that."""
        other = resolution not in (None, self.resolution)
        refuse(other, f"--resolution {resolution}: {self.name} makes {self.kind} of {self.resolution or 'no'} pixels")

    def prepare(self, x: Tensor, label: Tensor | Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of the dataset -> (x_0, condition)."""
        return x, self.condition(label)

    def labels(self, prompts: Sequence[str]) -> list:
        """What a person asks for -> labels, one for each prompt. Without prompts: all classes in turn."""
        if not prompts:
            return list(range(self.null_label or 1))
        classes = self.null_label or 0
        # On the command line a class is its number; names of classes are not kept in a pipeline folder.
        unknown = not all(prompt.isdigit() and int(prompt) < classes for prompt in prompts)
        refuse(unknown, f"prompts are class labels here, and this model has {classes or 'no'} classes")
        return [int(prompt) for prompt in prompts]

    def condition(self, label: Tensor | Sequence, w: float = 0.0) -> dict[str, Tensor]:
        """Labels -> the network's keyword arguments. `w` is for a network that `takes_w`."""
        if self.null_label is None:
            return {}
        return {"class_labels": torch.as_tensor(label, device=self.device)}

    def null_condition(self, n: int) -> dict[str, Tensor]:
        """The condition ∅ of Eq. 18, for n samples."""
        return self.condition([self.null_label] * n)

    # -- the network --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        """(x_0, ε̃) at x (B, ...) and t (B,), guided by w (Eq. 18).

        Both passes, with the condition and without, go through the network as one batch. w = 0 needs only the first.
        A large frozen network has weights of half precision, and gets such input; what comes back is float32.
        """
        x_in, t_in = x, t
        if w:
            null = self.null_condition(len(x))
            cond = {key: torch.cat([value, null[key]]) for key, value in cond.items()}
            x_in, t_in = torch.cat([x, x]), torch.cat([t, t])
        dtype = next(self.network.parameters()).dtype
        cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
        output = self.network(x_in.to(dtype), t_in, **cond).sample.float()
        if w:
            output = guided(*output.chunk(2), w)
        return to_x0_eps(output, x, *self.schedule.at(t, x.ndim), self.prediction_type)

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> samples as a person sees them."""
        return x0

    # -- students -----------------------------------------------------------------------------------------------------

    def copy_network(self, lora_rank: int = 0) -> nn.Module:
        """A trainable copy in float32, where a student starts. With a LoRA, only the LoRA is trainable."""
        # float32, since the frozen network may have been cast to half: bf16 would round an AdamW step of 8e-6 away, for
        # all but the smallest weights.
        network = copy.deepcopy(self.network).train().float().requires_grad_(not lora_rank)
        if lora_rank:
            from peft import LoraConfig

            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS))
        return network

    def student(self, weights: dict[str, Tensor], num_ddim_timesteps: int, lora_rank: int = 0) -> "DiffusionModel":
        """This model with a student's weights, and the scheduler that samples in a few steps of that grid."""
        network = self.copy_network(lora_rank)
        network.load_state_dict(weights)
        return self._with(network, self.few_step_scheduler(num_ddim_timesteps), f"student of {self.name}")

    def few_step_scheduler(self, num_ddim_timesteps: int):
        """The LCMScheduler of a student. BadInput if diffusers makes another noise schedule of the teacher's config."""
        from diffusers import LCMScheduler

        # Clipping and thresholding would change the x_0 that the student was trained to give.
        options = {"original_inference_steps": num_ddim_timesteps, "clip_sample": False, "thresholding": False}
        # Of the teacher's config what LCM knows: any other key would make every load of the student warn.
        known = inspect.signature(LCMScheduler).parameters
        config = {key: value for key, value in self.scheduler.config.items() if key in known}
        scheduler = _by_library(lambda _: LCMScheduler(**config | options), self.name)
        here, there = self.schedule, Schedule(scheduler.alphas_cumprod)
        same = len(here) == len(there) and torch.allclose(here.alpha, there.alpha, rtol=0, atol=1e-3)
        refuse(not same, f"diffusers' LCMScheduler makes another noise schedule of the config of {self.name}")
        return scheduler

    def _with(self, network: nn.Module, scheduler, name: str) -> "DiffusionModel":
        """A model of this kind with another network and scheduler, all else shared."""
        return type(self)(network, scheduler, name)

    def write(self, folder: Path) -> None:
        """Network, scheduler, and the index that makes the folder a pipeline, into the empty `folder`."""
        import diffusers

        self.network.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        parts = {"unet": self.network_class, "scheduler": ("diffusers", type(self.scheduler).__name__)}
        index = {"_class_name": self.pipelines[0], "_diffusers_version": diffusers.__version__, **parts}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _check(network: nn.Module, scheduler, name: str) -> None:
    """Refuses networks and schedulers that would be misread, and give bad samples without an error."""
    alphas, config = getattr(scheduler, "alphas_cumprod", None), network.config
    kind = type(scheduler).__name__
    # Solvers that can do both keep α and σ of a diffusion also where they are set to the straight lines of a flow.
    flow = alphas is None or scheduler.config.get("use_flow_sigmas")
    refuse(flow, f"{name} has a {kind}, of flow matching perhaps: α and σ of Eq. 1 are needed")
    prediction = scheduler.config.get("prediction_type")
    if scheduler.config.get("predict_epsilon") is False:  # how old folders say it, and what diffusers reads no longer
        prediction = "sample"
    known = prediction in ("epsilon", "v_prediction")
    refuse(not known, f"{name} predicts {prediction!r}: epsilon or v_prediction are needed")
    # Eq. 8 divides by α. Networks for such a schedule predict v.
    blind = prediction == "epsilon" and alphas[-1] == 0
    refuse(blind, f"{name} predicts epsilon, from which x_0 is lost at the last time: α is 0 (zero terminal SNR)")
    size = config.get("sample_size", 1)  # points have none
    refuse(not isinstance(size, int), f"{name} makes samples of size {size}: squares are needed")
    channels = config.get("in_channels"), config.get("out_channels")
    what = "inpainting and the like need more than x_t, and have no students here"
    refuse(channels[0] != channels[1], f"{name} takes {channels[0]} channels and returns {channels[1]}: {what}")
    # Keys by which a network expects another input than its class and its text.
    for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type"):
        refuse(config.get(key), f"{name} has a {key} of {config.get(key)!r}: its network expects what no data here has")
    # Where a file lacks weights, diffusers leaves parameters that have a shape and no values.
    lacking = any(parameter.is_meta for parameter in network.parameters())
    refuse(lacking, f"{name} has no weights for some of its layers")


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
        # Beside other work, two threads are 30 times slower than one for so small a network: each waits for the other.
        torch.set_num_threads(1)
        # A student of an ideal teacher is a network and nothing else, though its config remembers where it comes from.
        self.ideal = network.config.ideal and not self.is_student
        self.default_data = f"{'ideal' if network.config.ideal else 'toy'}:{network.config.distribution}"
        self.mixture = data.distribution(self.default_data)

    @classmethod
    def load(cls, name: str) -> "PointModel":
        """Of diffusers only its schedulers are asked: its pipelines would import transformers."""
        import diffusers

        from toy.mlp import PointMLP

        scheduler = read_json(Path(name) / "model_index.json")["scheduler"][1]
        folder = Path(name) / "scheduler"
        scheduler = _by_library(getattr(diffusers, scheduler).from_pretrained, folder)
        try:
            return cls(PointMLP.from_pretrained(Path(name) / "unet"), scheduler, name)
        except (SafetensorError, OSError) as error:  # of the file; a mistake in PointMLP keeps its traceback
            raise BadInput(f"cannot load {name}: {error}") from error

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Points of `args.data`."""
        return data.Points(args.data)

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        if not self.ideal:
            return super().predict(x, t, cond, w)
        alpha, sigma = self.schedule.at(t, 2)  # Tweedie: the mixture's ε is -σ times its score, below Eq. 3
        return to_x0_eps(self.mixture.eps(x, alpha, sigma, cond.get("class_labels"), w), x, alpha, sigma, "epsilon")


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class ImageModel(DiffusionModel):
    """A U-Net on pixels."""

    kind, network_class, pipelines = "images", ("diffusers", "UNet2DModel"), ("DDPMPipeline", "DDIMPipeline")

    def __init__(self, network: nn.Module, scheduler, name: str):
        super().__init__(network, scheduler, name)
        channels, size = network.config.in_channels, network.config.sample_size
        refuse(channels != 3, f"{name} makes images of {channels} channels: red, green and blue are needed")
        self.resolution, self.shape = size, (channels, size, size)

    @classmethod
    def load(cls, name: str) -> "ImageModel":
        """In float32, whatever the files say, and from safetensors only: pickles can run code."""
        from diffusers import DDPMPipeline  # knows older layouts of the folder too

        pipeline = _by_library(DDPMPipeline.from_pretrained, name, use_safetensors=True, dtype=torch.float32)
        return cls(pipeline.unet, pipeline.scheduler, name)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Images by class, each also as its mirror image, as squares of the network's size."""
        images = data.load_images(args.data, resolution=self.resolution, mirror=True)
        classes, none = len(images.classes), "the last of its class embeddings must mean no class"
        too_many = self.null_label is not None and classes > self.null_label
        refuse(too_many, f"{args.data} has {classes} classes, and {self.name} knows {self.null_label}: {none}")
        return images


# ---------------------------------------------------------------------------------------------------------------------
# Text to image
# ---------------------------------------------------------------------------------------------------------------------


class StableDiffusion(DiffusionModel):
    """Any StableDiffusionPipeline: SD1.5, SD2.1 with its v-prediction, and fine-tuned ones.

    All parts are loaded in float32, whatever their files say. The U-Net is large, and cast to the compute precision
    once. The text encoder computes under autocast, as the student does; of the VAE see _vae_precision.
    """

    kind, network_class = "text-to-image", ("diffusers", "UNet2DConditionModel")
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    batch_size, conditional = 16, True
    things = "an airplane, an automobile, a bird, a cat, a deer, a dog, a frog, a horse, a ship, a truck".split(", ")
    default_prompts = [f"a photo of {thing}" for thing in things]

    def __init__(self, pipeline, name: str):
        super().__init__(pipeline.unet, pipeline.scheduler, name)
        self.pipeline, self.null_text = pipeline, None  # the empty text's embedding, made when it is first asked for
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        config, kind = self.network.config, type(self.vae).__name__
        refuse(not kind.endswith("AutoencoderKL"), f"{name} has an {kind}: an AutoencoderKL is needed")
        refuse(self.null_label is not None, f"{name} takes classes beside texts, which no data here has")
        other = config.in_channels != self.vae.config.latent_channels
        refuse(other, f"the network of {name} takes {config.in_channels} channels, and its VAE makes others")
        self.takes_w = config.time_cond_proj_dim is not None
        self.resolution = config.sample_size * pipeline.vae_scale_factor
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    @classmethod
    def load(cls, name: str) -> "StableDiffusion":
        """As an ImageModel. The safety checker and its kin are not loaded: they would cost memory, and nothing asks for
        them here."""
        from diffusers import StableDiffusionPipeline
        from transformers.utils import logging

        logging.disable_progress_bar()
        options = {"use_safetensors": True, "dtype": torch.float32, "requires_safety_checker": False}
        pipeline = _by_library(StableDiffusionPipeline.from_pretrained, name, **options, **dict.fromkeys(UNUSED_PARTS))
        # Where a tokenizer's files are missing, transformers makes an empty vocabulary, by which all texts are alike.
        empty = len(pipeline.tokenizer) < 256
        refuse(empty, f"the tokenizer of {name} does not tell texts apart: are its files there?")
        return cls(pipeline, name)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StableDiffusion":
        self.vae.to(device)
        self.text_encoder.to(device)
        self.network.to(device, dtype)
        return self

    def resize(self, resolution: int | None) -> None:
        """Its U-Net takes images of any size, and a student remembers in its config the one of its training."""
        factor = self.pipeline.vae_scale_factor
        self.resolution = resolution or self.resolution
        refuse(self.resolution % factor, f"--resolution {resolution} is no multiple of the VAE's {factor}")
        size = self.resolution // factor
        self.network.register_to_config(sample_size=size)
        self.shape = (self.shape[0], size, size)

    def dataset(self, args: argparse.Namespace) -> data.Captions:
        """Images and captions, as a stream."""
        return data.Captions(args.data, self.resolution, args.min_image_size, args.max_pwatermark)

    def _vae_precision(self) -> contextlib.AbstractContextManager:
        """float32, because some VAEs overflow in fp16. A VAE whose config says that it does not is computed as all
        else is. (diffusers' name for it is force_upcast, and true unless a config says otherwise.)"""
        if self.vae.config.force_upcast:
            return torch.autocast(self.device.type, enabled=False)
        return contextlib.nullcontext()

    @torch.no_grad()
    def prepare(self, x: Tensor, label: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 pixels and captions -> (latents, condition). x_0 is the mean of the VAE's posterior, without a draw
        from it: in Stable Diffusion's VAEs the posterior's deviation is far below one grey level."""
        pixels = data.to_range(x)  # here, on the device: bytes travel faster
        # Eight images at a time, as in decode: at 512 pixels one takes more than half a GiB in the encoder.
        with self._vae_precision():
            parts = [self.vae.encode(part).latent_dist.mode() for part in pixels.split(8)]
        return torch.cat(parts).float() * self.vae.config.scaling_factor, self.condition(label)

    def labels(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts or self.default_prompts)

    @torch.no_grad()
    def condition(self, label: Sequence[str], w: float = 0.0) -> dict[str, Tensor]:
        """The texts' embeddings (B, L, D); and w (B, D') for a network that is told it."""
        # The pipeline's own encoding: it knows its tokenizers, and whether its encoder wants an attention mask.
        self._warn_of_cuts(list(label))
        embedded, _ = self.pipeline.encode_prompt(list(label), self.device, 1, False)
        cond = {"encoder_hidden_states": embedded}
        if self.takes_w:
            scale = torch.full((len(embedded),), w)
            length = self.network.config.time_cond_proj_dim
            cond["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(scale, length).to(embedded)
        return cond

    def _warn_of_cuts(self, texts: list[str]) -> None:
        """Says once for each model that the text encoder gets no more than the beginning of long texts."""
        tokenizer, key = self.pipeline.tokenizer, "sequence-length-is-longer-than-the-specified-maximum"
        long = [ids for ids in tokenizer(texts, verbose=False).input_ids if len(ids) > tokenizer.model_max_length]
        # This is where transformers notes that it has warned. Its own words would be wrong here.
        if long and not tokenizer.deprecation_warnings.get(key):
            tokenizer.deprecation_warnings[key] = True
            how_many = f"{len(long)} of {len(texts)} texts have more than {tokenizer.model_max_length} tokens"
            log.warning(f"{how_many}, the longest {max(map(len, long))}: only their beginnings are used")

    def null_condition(self, n: int) -> dict[str, Tensor]:
        # One embedding for all samples and steps: the empty text, as Stable Diffusion was trained with for guidance.
        if self.null_text is None:
            self.null_text = self.condition([""])
        return {key: value.to(self.device).expand(n, *value.shape[1:]) for key, value in self.null_text.items()}

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
    """Writes the model's folder. It is complete under another name before its parts take the place of older ones, and
    model_index.json, which `load` looks for, comes last."""
    draft, index = folder / "pipeline.tmp", "model_index.json"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.write(draft)
    (folder / index).unlink(missing_ok=True)
    for part in sorted(draft.iterdir(), key=lambda part: part.name == index):
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    draft.rmdir()


def load(name: str) -> DiffusionModel:
    """The teacher or student in a pipeline folder, in a folder with a LoRA of distill.py, or under a hub id."""
    folder = Path(name)
    # A path that was mistyped must not be looked for on the hub, which takes a minute to say that it is not there.
    local = folder.exists() or len(folder.parts) != 2 or folder.parts[0] == "runs" or Path(folder.parts[0]).exists()
    refuse(local and not folder.is_dir(), f"no such folder: {name}")
    if (folder / LORA_FILE).is_file():
        return _load_lora(folder)
    refuse(local and not (folder / "model_index.json").is_file(), f"{name} is no pipeline folder of diffusers")
    _silence_libraries()
    index = read_json(folder / "model_index.json") if local else _hub_index(name)
    kinds = [kind for kind in KINDS if list(kind.network_class) == index.get("unet")]
    known = kinds and index.get("_class_name") in kinds[0].pipelines
    names = ", ".join(name for kind in KINDS[1:] for name in kind.pipelines)
    refuse(not known, f"{name} is a {index.get('_class_name')}, and what can be a teacher here is: {names}")
    return kinds[0].load(name)


def _hub_index(name: str) -> dict:
    """The model_index.json of a hub id."""
    from diffusers import DiffusionPipeline

    return _by_library(DiffusionPipeline.load_config, name)


def _by_library(call: Callable, name: str | Path, **options):
    """What a library reads of a folder or hub id. Each library has its own errors for what it cannot read."""
    try:
        return call(name, **options)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        hint = " (no variant: only *.safetensors of plain names are read)" if "no file named" in first_line else ""
        raise BadInput(f"cannot load {name}: {type(error).__name__}: {first_line}{hint}") from error


def _silence_libraries() -> None:
    """Progress bars and advice of diffusers and transformers, which would stand between the lines of our own."""
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()


def _load_lora(folder: Path) -> DiffusionModel:
    """The teacher that the run's record names, with the LoRA added to its weights."""
    from diffusers import LCMScheduler

    record = folder / "metrics.json"
    refuse(not record.is_file(), f"{folder} holds a LoRA, and no metrics.json that names the model it belongs to")
    configuration = read_json(record)["configuration"]
    model = load(configuration["pretrained_teacher_model"])
    model.resize(configuration.get("resolution"))
    model.pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    model.pipeline.fuse_lora()  # added to the weights: from here on it is a student like any other
    model.pipeline.unload_lora_weights()
    scheduler = _by_library(LCMScheduler.from_pretrained, folder / "scheduler")
    return model._with(model.network, scheduler, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Training a teacher: ordinary denoising
# ---------------------------------------------------------------------------------------------------------------------

# Command lines by kind of model, which are read before what was typed. Points take 15 seconds of two CPU cores,
# images half an hour. scaled_linear is the form of Stable Diffusion's noise schedule; linear is DDPM's own. These
# channels make 2.5 M weights.
RECIPES = {
    "points": "--max_train_steps 3000 --train_batch_size 512 --learning_rate 2e-3 --beta_schedule scaled_linear",
    "images": "--max_train_steps 6000 --train_batch_size 64 --learning_rate 1e-3 --beta_schedule linear"
    " --mixed_precision bf16 --block_out_channels 16 32 64 128",
}


def parser() -> Parser:
    """The flags of teacher.py."""
    about = "Train a teacher on images or on a 2-D distribution."
    p = Parser(prog="teacher.py", description=about, epilog=recipes("Defaults by kind of model", RECIPES))
    flag = p.add_argument_group("model and data").add_argument
    flag("--data", required=True, help="folder of images, or toy:<name>, or ideal:<name>")
    flag("--class_conditional", action="store_true", help="with labels, of which 10 %% are dropped")
    flag("--resolution", type=positive, help="images are resized and cropped to it (default: their own)")
    flag("--block_out_channels", type=positive, nargs="+", help="of the images' U-Net, level by level; multiples of 8")
    # v is well conditioned everywhere. ε says little of x_0 where there is much noise.
    types = ["epsilon", "v_prediction"]
    flag("--prediction_type", choices=types, default="v_prediction", help="what the network outputs")
    flag("--beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2"], help="how noise grows with t")
    # Averaged weights sample better than the last ones.
    flag("--ema_decay", type=share, default=0.999, help="of the weights that are saved")
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
    """An untrained model of the kind that `args.data` asks for. `network_options` are of the toy's MLP."""
    from diffusers import DDPMScheduler

    set_seed(args.seed)  # of the initial weights
    # clip_sample=False: to clip x_0 in every solver step would be another ODE than the one that is distilled.
    scheduler = DDPMScheduler(beta_schedule=args.beta_schedule, prediction_type=args.prediction_type, clip_sample=False)
    if args.data.startswith(data.POINTS):
        return PointModel(_new_mlp(args, **network_options), scheduler, args.output_dir)
    return ImageModel(_new_unet(args), scheduler, args.output_dir)


def _new_mlp(args: argparse.Namespace, **options) -> nn.Module:
    """A PointMLP that remembers what it is fitted to."""
    from toy.mlp import PointMLP

    refuse(args.resolution or args.block_out_channels, "--resolution and --block_out_channels are for images")
    classes, (kind, _, name) = data.distribution(args.data).num_classes, args.data.partition(":")
    refuse(args.class_conditional and not classes, f"--class_conditional: {args.data} has no classes")
    labels = classes + 1 if args.class_conditional else None
    return PointMLP(num_class_embeds=labels, distribution=name, ideal=kind == "ideal", **options)


def _new_unet(args: argparse.Namespace) -> nn.Module:
    """A small U-Net with attention at its third level."""
    from diffusers import UNet2DModel

    images, channels = data.load_images(args.data, resolution=args.resolution, mirror=True), args.block_out_channels
    size, levels = images.samples.shape[-1], len(channels)
    refuse(any(width % 8 for width in channels), "--block_out_channels must be multiples of 8")
    refuse(size % 2 ** (levels - 1), f"--block_out_channels: {size} pixels cannot be halved {levels - 1} times")
    attention = min(2, levels - 1)
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    labels = len(images.classes) + 1 if args.class_conditional else None
    shape = {"sample_size": size, "block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    head = {"attention_head_dim": min(32, channels[attention]), "num_class_embeds": labels}
    return UNet2DModel(**shape, **head, layers_per_block=1, norm_num_groups=8)


def train(args: argparse.Namespace, model: DiffusionModel, dataset: Dataset | data.Captions) -> None:
    """Trains the model's network to denoise its data (Eq. 8), and saves the average of its weights.

    The loop is built like the one in distill.py, where each line is explained.
    """
    # A copy is trained, and not model.network: that one stays frozen and gets the averaged weights at the end.
    network = model.copy_network()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    run = training.Run(args, network, dataset, average)
    model.to(run.accelerator.device)
    accelerator, trained, schedule = run.accelerator, run.model, model.schedule
    for step, (x, label), generator in run.batches():
        with accelerator.accumulate(trained):
            with accelerator.autocast():
                x0, cond = model.prepare(x, label)
                n = torch.randint(len(schedule), (len(x0),), generator=generator).to(x0.device)
                t = len(schedule) - 1 - n  # every time is drawn, from the noisiest as splam.draw counts them
                coin = torch.rand(len(x0), generator=generator).to(x0.device)
                noise = torch.randn(x0.shape, generator=generator).to(x0.device)
                if model.conditional:  # a tenth learns the unconditional ε, which guidance needs
                    cond = _drop(cond, model.null_condition(len(x0)), coin < 0.1)
                alpha, sigma = schedule.at(t, x0.ndim)
                output = trained(alpha * x0 + sigma * noise, t, **cond).sample  # Eq. 1
            wanted = noise if model.prediction_type == "epsilon" else alpha * noise - sigma * x0
            loss = mse_loss(output.float(), wanted)
            accelerator.backward(loss)
            run.clip_gradients()
            run.optimizer.step()
            run.optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.lr_scheduler.step()
            # An average over 1,000 steps would remember the random start for long, so it begins with a short one.
            ema_update(average, accelerator.unwrap_model(trained), min(args.ema_decay, step / (step + 10)))
            run.log(step, loss)
            run.checkpoint(step)
    model.network.load_state_dict(average.state_dict())
    if accelerator.is_main_process:
        save(model, run.folder)
    accelerator.wait_for_everyone()


def _drop(cond: dict[str, Tensor], null: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """The condition, and the null condition where `dropped` (B,) says so."""
    return {key: torch.where(per_sample(dropped, value.ndim), null[key], value) for key, value in cond.items()}


@program
def main() -> None:
    """Trains a teacher, and says where it is."""
    args = parse()
    model = new_model(args)
    train(args, model, model.dataset(args))
    print(f"teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
