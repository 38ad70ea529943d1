"""What a diffusion model is to the rest of the project: one small interface, its kinds, and how to train one.

    PointModel          2-D points; the network is toy/mlp.py's (FlowPoints: beyond the paper)
    ImageModel          pixels; a UNet2DModel of diffusers, with or without class labels
    StableDiffusion     text to image in the latents of a VAE
    StableDiffusionXL   the same, with a second text encoder, and told the image's size

Teachers and students are both DiffusionModels, and both are kept as folders in diffusers' pipeline format, or as a
LoRA. A student's scheduler is one for few steps; that is all that sets them apart. What differs between kinds of model
stands in this file, but for how points are drawn and measured.

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
from accelerate.utils import concatenate, recursively_apply, set_seed
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

import data
import training
from cli import Parser, by_library, positive, program, read_json, recipes, refuse, share
from improved import StraightPath
from splam import Schedule, ema_update, guided, to_x0_eps

log = logging.getLogger("teacher")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that pipe.load_lora_weights looks for
# What a LoRA adapts: attention, feed-forward and convolutions, as in diffusers' LCM-LoRA training script.
LORA_TARGETS = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut
downsamplers.0.conv upsamplers.0.conv time_emb_proj""".split()
# How libraries are to read weights: whatever type the files have; and no pickles, which can run code.
AS_FLOAT32 = {"dtype": torch.float32, "use_safetensors": True}
# What `load` may be told beside a name, and the help of the flags, which diffusers' scripts have too.
LOAD_OPTIONS = {
    "variant": "of a teacher's files: fp16 reads *.fp16.safetensors",
    "revision": "of a hub id: a branch, tag or commit",
    "pretrained_vae_model_name_or_path": "in the place of a teacher's VAE, as madebyollin/sdxl-vae-fp16-fix",
}


# ---------------------------------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionModel:
    """A frozen diffusion model: what distillation, sampling and evaluation must know of it.

    Two words. A *label* is what the data hold beside x_0: a class number, or a caption. A *condition* is what the
    network gets for it, as keyword arguments. This base class knows class numbers, for networks that have them; the
    last one means "no class" and is the condition of guidance's unconditional pass.

    Each kind adds two methods: `dataset(args)`, training data whose batches are (x, label) pairs for `prepare`, and
    the class method `load(name, **options)`, the model in a folder or under a hub id; LOAD_OPTIONS names the options.
    """

    kind: str  # "points", "images" or "text-to-image": which row of a program's table of recipes is for it
    # By which model_index.json tells the kinds apart: the class of the pipeline, and library and class of the network.
    # The first of the pipelines loads and saves a kind.
    pipelines: tuple[str, ...] = ("DDPMPipeline",)
    network_class: tuple[str, str]
    shape: tuple[int, ...]  # of one x_0
    resolution: int | None = None  # of the images that it makes, in pixels
    default_data: str | None = None  # what it was made from, where the model itself knows
    default_prompts: Sequence[str] = ()  # of models that are prompted by texts
    takes_w: bool = False  # whether its network is told a guidance scale, as some published students are
    # Keys of a network's config by which it takes more than x, t, class and text, and the values that this kind knows.
    inputs = {"class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim_type": None}
    many_steps, batch_size = 50, 1024  # DDIM steps that count as the end of its PF-ODE; samples at a time

    def __init__(self, network: nn.Module, scheduler, name: str):
        # Frozen here, once: a teacher is never trained, and a student's network is a copy (copy_network).
        self.network, self.scheduler, self.name = network.eval().requires_grad_(False), scheduler, name
        self.schedule = self._noise_schedule()
        # Schedulers of flow matching do not say it, since there is no choice.
        self.prediction_type: str = scheduler.config.get("prediction_type", "flow")
        self.is_student = type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
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

    def _noise_schedule(self) -> Schedule:
        """α and σ of Eq. 1. Refuses networks and schedulers that would be misread, and give bad samples without an
        error."""
        name, noise, config = self.name, self.scheduler.config, self.network.config
        alphas, kind = getattr(self.scheduler, "alphas_cumprod", None), type(self.scheduler).__name__
        # Solvers that can do both keep α and σ of a diffusion also where they are set to the straight lines of a flow.
        flow = alphas is None or noise.get("use_flow_sigmas")
        refuse(flow, f"{name} has a {kind}, of flow matching perhaps: an α and a σ with α² + σ² = 1 are needed")
        # predict_epsilon is how old folders say it, and what diffusers reads no longer.
        prediction = "sample" if noise.get("predict_epsilon") is False else noise.get("prediction_type")
        refuse(prediction not in ("epsilon", "v_prediction"), f"{name} predicts {prediction!r}, not epsilon or v")
        # Eq. 8 divides by α. Networks for such a schedule predict v.
        blind = prediction == "epsilon" and alphas[-1] == 0
        refuse(blind, f"{name} predicts epsilon, from which x_0 is lost at the last time: α is 0 (zero terminal SNR)")
        size = config.get("sample_size", 1)  # points have none
        refuse(not isinstance(size, int), f"{name} makes samples of size {size}: squares are needed")
        # Inpainting and the like need more than x_t. Some networks return a variance too.
        taken, returned = config.get("in_channels"), config.get("out_channels")
        refuse(taken != returned, f"{name} takes {taken} channels and returns {returned}: as many are needed")
        for key, value in self.inputs.items():
            found = config.get(key)
            refuse(found != value, f"{name} has {key} {found!r}: {value!r} is needed")
        # Where a file lacks weights, diffusers leaves parameters that have a shape and no values.
        refuse(any(weight.is_meta for weight in self.network.parameters()), f"{name} has no weights for some layers")
        return Schedule(alphas)

    # -- data, labels and conditions ----------------------------------------------------------------------------------

    def resize(self, resolution: int | None) -> None:
        """Sets the size of its images. BadInput if it has only one, and that is another."""
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
        return self.condition(torch.full((n,), self.null_label, device=self.device))

    # -- the network --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        """(x_0, ε̃) at x (B, ...) and t (B,), guided by w (Eq. 18).

        Both passes, with the condition and without, go through the network as one batch. w = 0 needs only the first.
        A large frozen network has weights of half precision, and gets such input; what comes back is float32.
        """
        x_in, t_in = x, t
        if w:
            cond = concatenate([cond, self.null_condition(len(x))])
            x_in, t_in = torch.cat([x, x]), torch.cat([t, t])
        dtype = next(self.network.parameters()).dtype
        cond = recursively_apply(lambda value: value.to(dtype) if value.is_floating_point() else value, cond)
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
        scheduler = by_library(lambda _: LCMScheduler(**config | options), self.name)
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


# ---------------------------------------------------------------------------------------------------------------------
# 2-D points
# ---------------------------------------------------------------------------------------------------------------------


class PointModel(DiffusionModel):
    """2-D points.

    A teacher "toy:moons" is a PointMLP trained on points of that mixture. A teacher "ideal:moons" knows ε in closed
    form: with it, what goes wrong in a student cannot be blamed on the teacher. It has a PointMLP as well, which is
    where its students start.
    """

    kind, network_class, closed_form = "points", ("toy.mlp", "PointMLP"), "ideal"
    shape, many_steps = (2,), 1000  # with so small a network, every time step can be one of the solver's

    def __init__(self, network: nn.Module, scheduler, name: str):
        super().__init__(network, scheduler, name)
        # Beside other work, two threads are 30 times slower than one for so small a network: each waits for the other.
        torch.set_num_threads(1)
        # A student of an ideal teacher is a network and nothing else, though its config remembers where it comes from.
        self.ideal = network.config.ideal and not self.is_student
        self.default_data = f"{self.closed_form if network.config.ideal else 'toy'}:{network.config.distribution}"
        self.mixture = data.distribution(self.default_data)

    @classmethod
    def load(cls, name: str, **options) -> "PointModel":
        """Of diffusers only its schedulers are asked: its pipelines would import transformers."""
        import diffusers

        from toy.mlp import PointMLP

        scheduler_class = getattr(diffusers, read_json(Path(name) / "model_index.json")["scheduler"][1])
        scheduler = scheduler_class.from_pretrained(name, subfolder="scheduler")
        return cls(PointMLP.from_pretrained(Path(name) / "unet"), scheduler, name)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Points of `args.data`."""
        known, found = self.null_label, data.distribution(args.data).num_classes
        refuse(known not in (None, found), f"{args.data} has {found} classes, and {self.name} knows {known}")
        return data.Points(args.data)

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        if not self.ideal:
            return super().predict(x, t, cond, w)
        alpha, sigma = self.schedule.at(t, 2)  # Tweedie: the mixture's ε is -σ times its score, below Eq. 3
        alpha = alpha.clamp_min(1e-3)  # where there is no signal, x_0 is a limit
        return to_x0_eps(self.mixture.eps(x, alpha, sigma, cond.get("class_labels"), w), x, alpha, sigma, "epsilon")


class FlowPoints(PointModel):
    """2-D points on the path of flow matching, beyond the paper. A teacher "flow:moons" is known in closed form; its
    network predicts ε - x_0."""

    pipelines, closed_form = ("FlowPoints",), "flow"

    def _noise_schedule(self) -> Schedule:
        return StraightPath(self.scheduler.config.num_train_timesteps)

    def few_step_scheduler(self, num_ddim_timesteps: int):
        """diffusers' FlowMatchLCMScheduler, which is told its times when it samples and remembers no grid."""
        from diffusers import FlowMatchLCMScheduler

        refuse(num_ddim_timesteps != 50, "--num_ddim_timesteps is 50 for flow matching")
        return FlowMatchLCMScheduler(len(self.schedule))


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
    def load(cls, name: str, **options) -> "ImageModel":
        """Of what diffusers' pipeline has: it knows older layouts of the folder too."""
        pipeline = _pipeline(cls, name, **options)
        return cls(pipeline.unet, pipeline.scheduler, name)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        """Images by class, each also as its mirror image, as squares of the network's size."""
        images = data.load_images(args.data, resolution=args.resolution, mirror=True)
        known, what = self.null_label, f"{args.data} has {len(images.classes)} classes"
        other = known is not None and len(images.classes) != known
        refuse(other, f"{what}, and {self.name} knows {known}: the last of its class embeddings must mean no class")
        return images


# ---------------------------------------------------------------------------------------------------------------------
# Text to image
# ---------------------------------------------------------------------------------------------------------------------


class StableDiffusion(DiffusionModel):
    """Any StableDiffusionPipeline: SD1.5, SD2.1 with its v-prediction, and fine-tuned ones.

    The U-Net is large, and cast to the compute precision once. The text encoder computes under autocast, as the student
    does; of the VAE see _by_vae.
    """

    kind, network_class = "text-to-image", ("diffusers", "UNet2DConditionModel")
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    batch_size, conditional = 16, True
    # Images at a time in the VAE, which needs more memory than the U-Net: half a GiB for one of 512 pixels.
    vae_batch_size = 8
    things = "an airplane, an automobile, a bird, a cat, a deer, a dog, a frog, a horse, a ship, a truck".split(", ")
    default_prompts = [f"a photo of {thing}" for thing in things]

    def __init__(self, pipeline, name: str):
        super().__init__(pipeline.unet, pipeline.scheduler, name)
        self.pipeline, self.vae, self.null = pipeline, pipeline.vae, None  # ∅, made when it is first asked for
        self.tokenizers = [part for key, part in pipeline.components.items() if key.startswith("tokenizer")]
        # Where a tokenizer's files are missing, transformers makes an empty vocabulary, by which all texts are alike.
        empty = min(map(len, self.tokenizers)) < 256
        refuse(empty, f"a tokenizer of {name} does not tell texts apart: are its files there?")
        # Keys of a VAE by which latents are more than scaled, as those of Playground and SD3 are.
        for key in ("latents_mean", "shift_factor"):
            refuse(self.vae.config.get(key), f"the VAE of {name} has a {key}, which is not known here")
        self.takes_w = self.network.config.time_cond_proj_dim is not None
        self.resize(self.network.config.sample_size * pipeline.vae_scale_factor)

    @classmethod
    def load(cls, name: str, pretrained_vae_model_name_or_path: str | None = None, **options) -> "StableDiffusion":
        """The pipeline's own VAE may be replaced, by the SDXL one that does not overflow in fp16 for example."""
        if pretrained_vae_model_name_or_path:
            from diffusers import AutoencoderKL

            options["vae"] = by_library(AutoencoderKL.from_pretrained, pretrained_vae_model_name_or_path, **AS_FLOAT32)
        return cls(_pipeline(cls, name, **options), name)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StableDiffusion":
        self.pipeline.to(device)
        self.network.to(dtype=dtype)
        return self

    def resize(self, resolution: int | None) -> None:
        """Its U-Net takes images of any size, and a student remembers in its config the one of its training."""
        factor = self.pipeline.vae_scale_factor
        self.resolution = resolution or self.resolution
        refuse(self.resolution % factor, f"--resolution {resolution} is no multiple of the VAE's {factor}")
        size = self.resolution // factor
        self.network.register_to_config(sample_size=size)
        self.shape, self.null = (self.network.config.in_channels, size, size), None  # which may hold the size

    def dataset(self, args: argparse.Namespace) -> data.Captions:
        """Images and captions, as a stream."""
        return data.Captions(args.data, self.resolution, args.min_image_size, args.max_pwatermark)

    def _by_vae(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Encodes or decodes, in float32, because some VAEs overflow in fp16. A VAE whose config says that it does not
        is computed as all else is. (diffusers' name for it is force_upcast, and true unless a config says otherwise.)
        """
        upcast = self.vae.config.force_upcast
        with torch.autocast(self.device.type, enabled=False) if upcast else contextlib.nullcontext():
            return torch.cat([call(part) for part in x.split(self.vae_batch_size)]).float()

    @torch.no_grad()
    def prepare(self, x: Tensor, label: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 pixels and captions -> (latents, condition). x_0 is the mean of the VAE's posterior, without a draw
        from it: in Stable Diffusion's VAEs the posterior's deviation is far below one grey level."""
        # Bytes become numbers here, on the device: bytes travel faster.
        latents = self._by_vae(lambda part: self.vae.encode(part).latent_dist.mode(), data.to_range(x))
        return latents * self.vae.config.scaling_factor, self.condition(label)

    def labels(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts or self.default_prompts)

    @torch.no_grad()
    def condition(self, label: Sequence[str], w: float = 0.0) -> dict[str, Tensor]:
        """The texts' embeddings (B, L, D); and w (B, D') for a network that is told it."""
        self._warn_of_cuts(list(label))
        return self._arguments(w, *self._encoded(list(label), guided=False)[0::2])

    @torch.no_grad()
    def null_condition(self, n: int) -> dict[str, Tensor]:
        # One for all samples and steps: what the pipeline itself guides with, where no negative prompt is given.
        if self.null is None:
            self.null = self._arguments(0.0, *self._encoded([""], guided=True)[1::2])
        return recursively_apply(lambda value: value.to(self.device).expand(n, *value.shape[1:]), self.null)

    def _encoded(self, texts: list[str], guided: bool) -> Sequence[Tensor | None]:
        """The pipeline's own encoding of texts: it knows its tokenizers, whether an encoder wants an attention mask,
        and what is ∅. Embeddings, those of ∅ if `guided`, and of SDXL then the pooled ones, in the same order."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
        return self.pipeline.encode_prompt(prompt=texts, device=self.device, **options)

    def _arguments(self, w: float, embedded: Tensor) -> dict[str, Tensor]:
        """The network's keyword arguments."""
        cond = {"encoder_hidden_states": embedded}
        if self.takes_w:
            scale, length = torch.full((len(embedded),), w), self.network.config.time_cond_proj_dim
            cond["timestep_cond"] = self.pipeline.get_guidance_scale_embedding(scale, length).to(embedded)
        return cond

    def _warn_of_cuts(self, texts: list[str]) -> None:
        """Says once that the text encoder gets no more than the beginning of long texts."""
        tokenizer, key = self.tokenizers[0], "sequence-length-is-longer-than-the-specified-maximum"
        longest, limit = max(map(len, tokenizer(texts, verbose=False).input_ids)), tokenizer.model_max_length
        if longest > limit and not tokenizer.deprecation_warnings.get(key):
            log.warning("a text of %d tokens: of those over %d only the beginnings are used", longest, limit)
            # Here transformers notes that it has warned. Its own words would be wrong: we cut the text.
            for tokenizer in self.tokenizers:
                tokenizer.deprecation_warnings[key] = True

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1]."""
        latents = x0.float() / self.vae.config.scaling_factor
        return self._by_vae(lambda part: self.vae.decode(part).sample, latents).clamp(-1, 1)

    def _with(self, network: nn.Module, scheduler, name: str) -> "StableDiffusion":
        # A shallow copy: the student shares the teacher's VAE, text encoders and tokenizers.
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(unet=network, scheduler=scheduler)
        return type(self)(pipeline, name)

    def write(self, folder: Path) -> None:
        """The whole pipeline; of a network with a LoRA only the LoRA, as pipe.load_lora_weights reads it, and the
        scheduler."""
        if not getattr(self.network, "peft_config", None):
            self.pipeline.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        self.pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(self.network))
        self.scheduler.save_pretrained(folder / "scheduler")


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline: the base model and fine-tuned ones. (The refiner is an image-to-image pipeline.)

    Two text encoders make one embedding, and the second also a pooled one. The network is told this and, as six
    numbers, the size of the original image, where it was cropped, and the size that is wanted.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    inputs = StableDiffusion.inputs | {"addition_embed_type": "text_time"}
    batch_size, vae_batch_size = 4, 2  # of 1024 pixels

    def _arguments(self, w: float, embedded: Tensor, pooled: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        cond, size = super()._arguments(w, embedded), (self.resolution, self.resolution)
        # What the pipeline says when it samples: a whole image of this size. So a student is trained under the very
        # condition that it will sample with. Whole numbers, since bf16 would round a size that is no multiple of 8.
        ids = self.pipeline._get_add_time_ids(size, (0, 0), size, torch.long, pooled.shape[-1]).to(self.device)
        return cond | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}}


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ---------------------------------------------------------------------------------------------------------------------

KINDS = (PointModel, FlowPoints, ImageModel, StableDiffusion, StableDiffusionXL)


def save(model: DiffusionModel, folder: Path) -> None:
    """Writes the model's folder. It is complete under another name before its parts take the place of older ones, and
    model_index.json, which `load` looks for, comes last."""
    draft, index = folder / "pipeline.tmp", "model_index.json"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.write(draft)
    (folder / index).unlink(missing_ok=True)
    for part in sorted(draft.iterdir(), key=lambda part: part.name == index):
        shutil.rmtree(folder / part.name, ignore_errors=True)  # a file is replaced as it is
        part.replace(folder / part.name)
    draft.rmdir()


def load(name: str, **options: str | None) -> DiffusionModel:
    """The teacher or student in a pipeline folder, in a folder with a LoRA of distill.py, or under a hub id.

    LOAD_OPTIONS names the options.
    """
    folder = Path(name)
    # A path that was mistyped must not be looked for on the hub, which takes a minute to say that it is not there.
    local = folder.exists() or len(folder.parts) != 2 or folder.parts[0] == "runs" or Path(folder.parts[0]).exists()
    refuse(local and not folder.is_dir(), f"no such folder: {name}")
    if (folder / LORA_FILE).is_file():
        return _load_lora(folder, **options)
    file = folder / "model_index.json"
    refuse(local and not file.is_file(), f"{name} is no pipeline folder of diffusers")
    if local and not any(folder.glob(f"*/*.{options.get('variant')}.*")):
        options["variant"] = None  # students, which may stand beside their teacher, have files of plain names
    if not local:
        where = {"revision": options.get("revision")}
        # Asked once whether it is there. A download would ask six times, for half a minute.
        if not by_library(try_to_load_from_cache, name, filename=file.name, **where):
            by_library(HfApi().model_info, name, **where)
        file = by_library(hf_hub_download, name, filename=file.name, **where)
    index = read_json(file)
    found = index.get("_class_name"), index.get("unet")
    kinds = [kind for kind in KINDS if found[0] in kind.pipelines and found[1] == list(kind.network_class)]
    # The kinds of points are not named: nobody has such a folder from elsewhere.
    names = ", ".join(name for kind in KINDS[2:] for name in kind.pipelines)
    refuse(not kinds, f"{name} is a {found[0]}, and what can be a teacher here is: {names}")
    other_vae = options.get("pretrained_vae_model_name_or_path")
    refuse(other_vae and kinds[0].kind != "text-to-image", f"--pretrained_vae_model_name_or_path: {name} has no VAE")
    return kinds[0].load(name, **options)


def _pipeline(kind: type[DiffusionModel], name: str, **options):
    """What diffusers makes of the folder or hub id."""
    import diffusers
    import transformers

    # Progress bars and advice of the libraries would stand between the lines of our own.
    diffusers.utils.logging.set_verbosity(diffusers.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # What no model here asks for would cost memory.
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    options |= {"requires_safety_checker": False} | unused | AS_FLOAT32
    return by_library(getattr(diffusers, kind.pipelines[0]).from_pretrained, name, **options)


def _load_lora(folder: Path, **options: str | None) -> DiffusionModel:
    """The teacher that the run's record names, with the LoRA added to its weights."""
    from diffusers import LCMScheduler

    configuration = read_json(folder / "metrics.json")["configuration"]
    options = {option: options.get(option) or configuration.get(option) for option in LOAD_OPTIONS}
    model = load(configuration["pretrained_teacher_model"], **options)
    model.resize(configuration.get("resolution"))
    model.pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    model.pipeline.fuse_lora()  # added to the weights: from here on it is a student like any other
    model.pipeline.unload_lora_weights()
    scheduler = by_library(LCMScheduler.from_pretrained, folder / "scheduler")
    return model._with(model.network, scheduler, str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Training a teacher: ordinary denoising
# ---------------------------------------------------------------------------------------------------------------------

# Command lines by kind of model, which are read before what was typed. Points take 15 seconds of one CPU core, images
# half an hour of two. scaled_linear is the form of Stable Diffusion's noise schedule; linear is DDPM's own. These
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
    flag("--data", required=True, help="folder of images, or toy:<name>, or ideal:<name>, or flow:<name>")
    flag("--class_conditional", action="store_true", help="with labels, of which 10 %% are dropped")
    flag("--resolution", type=positive, help="images are resized and cropped to it (default: their own)")
    flag("--block_out_channels", type=positive, nargs="+", help="of the images' U-Net, level by level; multiples of 8")
    # v is well conditioned everywhere. ε says little of x_0 where there is much noise.
    flag("--prediction_type", choices=["epsilon", "v_prediction"], default="v_prediction", help="of the network")
    flag("--beta_schedule", choices=["linear", "scaled_linear", "squaredcos_cap_v2"], help="how noise grows with t")
    flag("--beta_start", type=share, default=0.0001, help="β at the first time; Stable Diffusion: 0.00085")
    flag("--beta_end", type=share, default=0.02, help="and at the last one; Stable Diffusion: 0.012")
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
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    set_seed(args.seed)  # of the initial weights
    # clip_sample=False: to clip x_0 in every solver step would be another ODE than the one that is distilled.
    noise = {"beta_schedule": args.beta_schedule, "beta_start": args.beta_start, "beta_end": args.beta_end}
    scheduler = DDPMScheduler(**noise, prediction_type=args.prediction_type, clip_sample=False)
    if args.data.startswith("flow:"):
        return FlowPoints(_new_mlp(args, **network_options), FlowMatchEulerDiscreteScheduler(), args.output_dir)
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
    return PointMLP(num_class_embeds=labels, distribution=name, ideal=kind != "toy", **options)


def _new_unet(args: argparse.Namespace) -> nn.Module:
    """A small U-Net with attention at its third level."""
    from diffusers import UNet2DModel

    images, channels = data.load_images(args.data, resolution=args.resolution, mirror=True), args.block_out_channels
    size, levels = images.samples.shape[-1], len(channels)
    wrong = size % 2 ** (levels - 1) or any(width % 8 for width in channels)
    refuse(wrong, f"--block_out_channels must be multiples of 8, and {levels - 1} times halve {size} pixels")
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
            targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}
            wanted = targets[model.prediction_type]
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
    rows = torch.arange(len(dropped), device=dropped.device) + len(dropped) * dropped  # of both, one below the other
    return recursively_apply(lambda value: value[rows], concatenate([cond, null]))


@program
def main() -> None:
    """Trains a teacher, and says where it is."""
    args = parse()
    model = new_model(args)
    train(args, model, model.dataset(args))
    print(f"teacher: {args.output_dir}")


if __name__ == "__main__":
    main()
