"""python -m experiments.tiny_sd --data data/cifar10        an hour on two CPU cores

A real Stable Diffusion that fits a laptop: every part is trained here, from CIFAR-10 with captions, and is small.

1. The images are written as webdataset shards with captions, which distill.py then reads as it would read LAION.
2. Tokenizer: byte-pair encoding of the captions, in CLIP's format.
3. Text encoder: a CLIP text model, trained against an image network until captions find the images of their class.
4. VAE: 32x32 pixels -> latents of 16x16 with 4 channels.
5. U-Net: ordinary denoising of latents with 10 % of the captions dropped (teacher.train).
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import webdataset
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import training
from cli import Parser, positive, program, share
from data import Captions, Images, load_images
from evaluate import Classifier
from experiments.features import fit
from splam import distance
from teacher import StableDiffusion, train

# A command line that is read before what was typed. An hour with checkpoints: the same command goes on after a stop.
RECIPE = (
    "--max_train_steps 4500 --train_batch_size 64 --learning_rate 1e-3 --lr_scheduler cosine --max_grad_norm 1"
    " --mixed_precision bf16 --resume_from_checkpoint latest --output_dir runs/tiny-sd"
)
TEMPLATES = ["a photo of {}", "a picture of {}", "an image of {}", "a small photo of {}", "{}"]
LENGTH, WIDTH, SHARDS = 16, 64, 10  # tokens of a prompt, width of their embeddings, tar files


def caption(name: str, i: int) -> str:
    """The i-th way to say it: "a picture of an airplane"."""
    article = "an" if name[0] in "aeiou" else "a"
    return TEMPLATES[i % len(TEMPLATES)].format(f"{article} {name}")


def write_shards(images: Images, folder: Path) -> None:
    """Shuffled image-caption pairs as PNG and txt, in tar files; nothing if the folder is there."""
    if folder.is_dir():
        return
    draft = folder.with_name(f"{folder.name}.tmp")  # renamed when all are complete
    draft.mkdir(parents=True, exist_ok=True)
    # Images lie on disk class by class. distill.py shuffles among 1,000 samples only, so the order must be random here.
    order = torch.randperm(len(images.samples), generator=torch.Generator().manual_seed(0)).tolist()
    size = math.ceil(len(order) / SHARDS)
    with webdataset.ShardWriter(f"{draft}/cifar-%03d.tar", maxcount=size, verbose=0) as writer:
        for i in tqdm(order, "shards", leave=False):
            text = caption(images.classes[images.labels[i]], i)
            writer.write({"__key__": f"{i:06d}", "png": images.samples[i].permute(1, 2, 0).numpy(), "txt": text})
    draft.rename(folder)


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding that is learnt from the captions. How text is cut into words, CLIP's tokenizer knows."""
    # Ids of single letters can differ from call to call (tokenizers numbers them in the order of a hash table).
    return CLIPTokenizer(model_max_length=LENGTH).train_new_from_iterator(captions, 1000, show_progress=False)


class CLIP(nn.Module):
    """Text and images in one space. Only the text model is kept; the image network just gives it something to match."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        # Two layers of 64 units: the captions are ten words in five phrases.
        widths = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
        # The text model takes a caption's embedding from the place of the end token, so it must know the ids.
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **widths, **depth, **ids))
        self.image = Classifier(WIDTH)  # its "logits" are the image's embedding

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """The similarity of each image with each caption, (B, B): ten times the cosine, since a softmax of numbers
        between -1 and 1 could never be sure."""
        image = self.image(pixels)
        return 10 * normalize(image.float(), dim=1) @ normalize(self.text(tokens).pooler_output.float(), dim=1).T


def train_text_encoder(args: argparse.Namespace, images: Images, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's loss; but each caption fits every image of its class."""

    def loss_of(model: nn.Module, x: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        """Cross entropy in both directions: of captions given the image, and of images given the caption."""
        phrasing = torch.randint(len(TEMPLATES), (len(x),), generator=generator).tolist()
        texts = [caption(images.classes[c], i) for c, i in zip(label.tolist(), phrasing, strict=True)]
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids.to(x.device)
        # In a batch of 64 there are about six images of each of ten classes. CLIP's own loss has one right answer, and
        # would push the other five captions of the class away.
        same = (label[:, None] == label[None]).float()
        logits = model((x + 1) * 127.5, tokens)
        return cross_entropy(logits, same / same.sum(1, keepdim=True)) + cross_entropy(logits.T, same / same.sum(0))

    return fit(args, CLIP(tokenizer), images, loss_of).text


class AutoEncoder(nn.Module):
    """The VAE with the whole of its loss as `forward`: DistributedDataParallel sees nothing but calls of that."""

    def __init__(self, size: int):
        super().__init__()
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        widths = {"block_out_channels": (32, 64), "norm_num_groups": 8, "sample_size": size}
        self.vae = AutoencoderKL(**blocks, **widths, mid_block_add_attention=False)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, and a little of the usual pull towards a standard normal posterior. More of it would blur the
        images, and these latents only have to be such that a U-Net can learn them."""
        posterior = self.vae.encode(x).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        return distance(decoded, x, "huber").mean() + 1e-5 * posterior.kl().mean() / x[0].numel()


def train_vae(args: argparse.Namespace, images: Images) -> AutoencoderKL:
    """The VAE, with the scaling factor that gives latents unit variance, as the U-Net's schedule assumes."""
    vae = fit(args, AutoEncoder(images.samples.shape[-1]), images, lambda model, x, *_: model(x)).vae
    x, _ = images[list(range(0, len(images.samples), max(1, len(images.samples) // 500)))]  # about 500 are enough
    with torch.no_grad():
        latents = vae.encode(x.to(vae.device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def new_unet() -> UNet2DConditionModel:
    """A U-Net in which one level of three, that of 8x8 places, and diffusers' block at the bottom look at the text.
    Attention is cheap there: it compares every place with every token."""
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    widths = {"block_out_channels": (32, 64, 128), "norm_num_groups": 8, "cross_attention_dim": WIDTH}
    options = {"sample_size": 16, "layers_per_block": 1, "attention_head_dim": 4}
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **widths, **options)


@program
def main() -> None:
    """Makes the shards, trains the three networks one after the other, and saves the pipeline."""
    p = Parser(prog="python -m experiments.tiny_sd", description=__doc__.splitlines()[2])
    p.add_argument("--data", default="data/cifar10", help="folder of images by class")
    p.add_argument("--shards", default="shards", help="folder for the image-caption pairs")
    p.add_argument("--clip_steps", type=positive, default=400, help="of training the text encoder")
    p.add_argument("--vae_steps", type=positive, default=900, help="of training the VAE")
    p.add_argument("--ema_decay", type=share, default=0.999, help="of the U-Net's weights that are saved")
    training.add_arguments(p)
    args = p.parse_args([*RECIPE.split(), *sys.argv[1:]])
    folder = training.run_folder(args.output_dir)

    def stage(name: str, **flags) -> argparse.Namespace:
        """The flags of one network's training. Each has a folder of its own, for its checkpoints."""
        set_seed(args.seed)  # of the initial weights
        return argparse.Namespace(**{**vars(args), "output_dir": str(folder / name), **flags})

    # Mirrored, which doubles the images for text encoder and VAE. The shards hold them as they are.
    images = load_images(args.data, mirror=True)
    write_shards(images, Path(args.shards))
    # Kept: made again after an interruption, it might number the tokens otherwise than the trained text encoder.
    kept = folder / "training-tokenizer"
    if not kept.is_dir():
        captions = [caption(name, i) for name in images.classes for i in range(len(TEMPLATES))]
        make_tokenizer(captions).save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    text_encoder = train_text_encoder(stage("training-clip", max_train_steps=args.clip_steps), images, tokenizer)
    vae = train_vae(stage("training-vae", max_train_steps=args.vae_steps, learning_rate=2e-3), images)
    # Without a safety checker and its feature extractor, the two None: there is nothing to check in ten classes.
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
    options = {"steps_offset": 1, "clip_sample": False}
    unet = stage("")
    parts = (vae, text_encoder, tokenizer, new_unet(), DDPMScheduler(**noise, **options), None, None)
    teacher = StableDiffusion(StableDiffusionPipeline(*parts, requires_safety_checker=False), str(folder))
    train(unet, teacher, Captions(args.shards, teacher.resolution))
    print(f"text-to-image teacher: {folder}")


if __name__ == "__main__":
    main()
