"""python -m toy.tiny_sd --data data/cifar10        40 minutes on two CPU cores

A real Stable Diffusion that fits a laptop: every part is trained here, from CIFAR-10 with captions, and is small.

1. The images are written as webdataset shards with captions, which distill.py then reads as it would read LAION.
2. Tokenizer: byte-pair encoding of the captions, in CLIP's format.
3. Text encoder: a CLIP text model, trained against an image network until captions find the images of their class.
4. VAE: 32x32 pixels -> latents of 16x16 with 4 channels.
5. U-Net: ordinary denoising of cached latents with 10 % of the captions dropped (teacher.train).
"""

import argparse
import io
import tempfile
from pathlib import Path

import torch
import webdataset
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import training
from data import Images, load_images, program
from splam import distance
from teacher import StableDiffusion, train
from toy.features import Classifier, fit

TEMPLATES = ["a photo of {}", "a picture of {}", "an image of {}", "a small photo of {}", "{}"]
LENGTH, WIDTH, SHARDS = 16, 64, 10  # tokens of a prompt, width of their embeddings, tar files


def caption(name: str, i: int) -> str:
    """The i-th way to say it: "a picture of an airplane"."""
    article = "an" if name[0] in "aeiou" else "a"
    return TEMPLATES[i % len(TEMPLATES)].format(f"{article} {name}")


def write_shards(images: Images, folder: Path) -> str:
    """Shuffled image-caption pairs as PNG and txt in `folder`; returns the pattern that names the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(images.samples), generator=torch.Generator().manual_seed(0)).tolist()
    for shard in tqdm(range(SHARDS), desc="shards", unit="tar", leave=False):
        path, draft = folder / f"cifar-{shard:03d}.tar", folder / f"cifar-{shard:03d}.tar.tmp"
        if path.is_file():
            continue
        with webdataset.TarWriter(str(draft)) as tar:
            for i in order[shard::SHARDS]:
                png = io.BytesIO()
                Image.fromarray(images.samples[i].permute(1, 2, 0).numpy()).save(png, "PNG")
                text = caption(images.classes[images.labels[i]], i)
                tar.write({"__key__": f"{i:06d}", "png": png.getvalue(), "txt": text})
        draft.rename(path)
    return f"{folder}/cifar-{{000..{SHARDS - 1:03d}}}.tar"


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding as CLIP does it: lower case, words end in </w>."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    options = {"vocab_size": 1000, "end_of_word_suffix": "</w>", "special_tokens": special, "show_progress": False}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(captions, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = bpe.model.save(folder)
        return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)


def text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two small layers."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **{name: getattr(tokenizer, name) for name in names},
    )
    return CLIPTextModel(config)


class CLIP(nn.Module):
    """Text and images in one space. Only the text model is kept."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.image = text_model(tokenizer), Classifier(WIDTH)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """The similarity of each image with each caption, (B, B)."""
        _, image = self.image(pixels)
        return 10 * normalize(image.float(), dim=1) @ normalize(self.text(tokens).pooler_output.float(), dim=1).T


def train_text_encoder(args: argparse.Namespace, images: Images, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's loss; but each caption fits every image of its class."""

    def loss_of(model: nn.Module, x: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
        phrasing = torch.randint(len(TEMPLATES), (len(x),), generator=generator).tolist()
        texts = [caption(images.classes[c], i) for c, i in zip(label.tolist(), phrasing, strict=True)]
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids.to(x.device)
        same = (label[:, None] == label[None]).float()
        logits = model((x + 1) * 127.5, tokens)
        return cross_entropy(logits, same / same.sum(1, keepdim=True)) + cross_entropy(logits.T, same / same.sum(0))

    return fit(args, CLIP(tokenizer), images, loss_of).text


class AutoEncoder(nn.Module):
    """The VAE with the whole of its loss as `forward`: DistributedDataParallel sees nothing but calls of that."""

    def __init__(self, size: int):
        super().__init__()
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            norm_num_groups=8,
            sample_size=size,
            mid_block_add_attention=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, and a little of the usual pull towards a standard normal posterior."""
        posterior = self.vae.encode(x).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        return distance(decoded, x, "huber").mean() + 1e-5 * posterior.kl().mean() / x[0].numel()


def train_vae(args: argparse.Namespace, images: Images) -> AutoencoderKL:
    """The VAE, with the scaling factor that gives latents unit variance, as the U-Net's schedule assumes."""
    vae = fit(args, AutoEncoder(images.samples.shape[-1]), images, lambda model, x, *_: model(x)).vae
    x, _ = images[list(range(0, len(images.samples), max(1, len(images.samples) // 500)))]
    with torch.no_grad():
        latents = vae.encode(x.to(vae.device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def new_unet() -> UNet2DConditionModel:
    """A U-Net in which one level looks at the text."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


@program
def main() -> None:
    p = training.Parser(
        prog="python -m toy.tiny_sd", description=__doc__.splitlines()[2], formatter_class=training.Help
    )
    p.add_argument("--data", default="data/cifar10", help="folder of images by class")
    p.add_argument("--shards", default="shards", help="folder for the image-caption pairs")
    p.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon", help="of the U-Net")
    p.add_argument("--clip_steps", type=training.positive, default=400, help="of training the text encoder")
    p.add_argument("--vae_steps", type=training.positive, default=900, help="of training the VAE")
    p.add_argument("--ema_decay", type=training.share, default=0.999, help="of the U-Net's weights that are saved")
    training.add_arguments(p)
    recipe = "--max_train_steps 4500 --train_batch_size 64 --learning_rate 1e-3 --lr_scheduler cosine --max_grad_norm 1"
    recipe += " --mixed_precision bf16 --resume_from_checkpoint latest --output_dir runs/tiny-sd"
    args = training.parse(p, recipe)

    def stage(name: str, **flags) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(args), "output_dir": str(folder / name), **flags})

    folder = Path(args.output_dir)
    images = load_images(args.data, mirror=True)
    shards = write_shards(images, Path(args.shards))
    set_seed(args.seed)  # of the initial weights
    tokenizer = make_tokenizer([caption(name, i) for name in images.classes for i in range(len(TEMPLATES))])
    text_encoder = train_text_encoder(stage("training-clip", max_train_steps=args.clip_steps), images, tokenizer)
    vae = train_vae(stage("training-vae", max_train_steps=args.vae_steps, learning_rate=2e-3), images)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
    options = {"prediction_type": args.prediction_type, "steps_offset": 1, "clip_sample": False}
    parts = (vae, text_encoder, tokenizer, new_unet(), DDPMScheduler(**noise, **options), None, None)
    pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    teacher = StableDiffusion(pipeline, str(folder)).to(training.process().device)
    pairs = {"data": shards, "resolution": None, "min_image_size": 0, "max_pwatermark": 1.0}
    unet = stage("", **pairs, cache_latents=str(folder / "latents"))
    train(unet, teacher, teacher.dataset(unet))
    print(f"text-to-image teacher: {folder}")


if __name__ == "__main__":
    main()
