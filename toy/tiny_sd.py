"""A real Stable Diffusion that fits a laptop: every part is trained here, from CIFAR-10 with captions, and is small.

python -m toy.tiny_sd --data data/cifar10 --output_dir runs/tiny-sd        40 minutes on two CPU cores

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
from evaluate import Classifier
from kinds import StableDiffusion
from splam import distance
from teacher import train

TEMPLATES = ["a photo of {}", "a picture of {}", "an image of {}", "a small photo of {}", "{}"]
LENGTH, WIDTH, SHARDS = 16, 64, 10  # tokens of a prompt, width of their embeddings, tar files


def caption(name: str, i: int) -> str:
    return TEMPLATES[i % len(TEMPLATES)].format(f"a{'n' * (name[0] in 'aeiou')} {name}")


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
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1000,
            end_of_word_suffix="</w>",
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = bpe.model.save(folder)
        return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)


class CLIP(nn.Module):
    """Text and images in one space. Only the text model is kept."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text, self.image = CLIPTextModel(config), Classifier(WIDTH)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """The similarity of each image with each caption, (B, B)."""
        _, image = self.image(pixels)
        return 10 * normalize(image.float(), dim=1) @ normalize(self.text(tokens).pooler_output.float(), dim=1).T


def train_text_encoder(args: argparse.Namespace, images: Images, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    run = training.Run(args, CLIP(tokenizer), images, {})

    def loss_of(x: Tensor, label: Tensor, phrasing: Tensor) -> Tensor:
        texts = [caption(images.classes[c], i) for c, i in zip(label.tolist(), phrasing.tolist(), strict=True)]
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids.to(x.device)
        same = (label[:, None] == label[None]).float()  # each caption fits every image of its class
        logits = run.model((x + 1) * 127.5, tokens)
        return cross_entropy(logits, same / same.sum(1, keepdim=True)) + cross_entropy(logits.T, same / same.sum(0))

    for step, batches in run:
        phrasing = torch.randint(len(TEMPLATES), (run.total_batch_size,), generator=run.generator(step))
        pairs = zip(batches, run.split([phrasing]), strict=True)
        run.log(step, loss=run.optimize(loss_of(*batch, *rows) for batch, rows in pairs))
        run.checkpoint(step)
    return run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).text


def train_vae(args: argparse.Namespace, images: Images) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        norm_num_groups=8,
        sample_size=images.samples.shape[-1],
        mid_block_add_attention=False,
    )
    run = training.Run(args, vae, images, {})
    module = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)

    def loss_of(x: Tensor, _: Tensor) -> Tensor:
        with run.accelerator.autocast():
            posterior = module.encode(x).latent_dist
            decoded = module.decode(posterior.sample()).sample
        return distance(decoded, x, "huber") + 1e-5 * posterior.kl().mean() / x[0].numel()

    for step, batches in run:
        run.log(step, loss=run.optimize(loss_of(*batch) for batch in batches))
        run.checkpoint(step)
    with torch.no_grad():
        x, _ = images[list(range(0, len(images.samples), -(-len(images.samples) // 500)))]
        latents = module.encode(x.to(run.accelerator.device)).latent_dist.mode()
    module.register_to_config(scaling_factor=1 / latents.std().item())  # latents of unit variance for the U-Net
    return module


def new_unet() -> UNet2DConditionModel:
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
    p = argparse.ArgumentParser(
        prog="toy/tiny_sd.py", description=__doc__.splitlines()[0], formatter_class=training.Help
    )
    p.add_argument("--data", default="data/cifar10", help="folder of images by class")
    p.add_argument("--shards", default="shards", help="folder for the image-caption pairs")
    p.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon")
    p.add_argument("--clip_steps", type=int, default=400)
    p.add_argument("--vae_steps", type=int, default=900)
    p.add_argument("--ema_decay", type=float, default=0.999, help="of the U-Net's weights that are saved")
    training.add_arguments(p)
    p.set_defaults(
        output_dir="runs/tiny-sd",
        max_train_steps=4500,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        mixed_precision="bf16",
        max_grad_norm=1.0,
        resume_from_checkpoint="latest",
    )
    args = p.parse_args()

    def stage(name: str, **flags) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(args), "output_dir": str(folder / name), **flags})

    folder = Path(args.output_dir)
    images = load_images(args.data, mirror=True)
    shards = write_shards(images, Path(args.shards))
    set_seed(args.seed)
    tokenizer = make_tokenizer([caption(name, i) for name in images.classes for i in range(len(TEMPLATES))])
    text_encoder = train_text_encoder(stage("training-clip", max_train_steps=args.clip_steps), images, tokenizer)
    vae = train_vae(stage("training-vae", max_train_steps=args.vae_steps, learning_rate=2e-3), images)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=args.prediction_type,
        steps_offset=1,
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, new_unet(), scheduler, None, None, requires_safety_checker=False
    )
    teacher = StableDiffusion(pipeline, str(folder)).to(training.process().device)
    pairs = {"data": shards, "resolution": None, "min_image_size": 0, "max_pwatermark": 1.0}
    unet = stage("", **pairs, cache_latents=str(folder / "latents"))
    train(unet, teacher, teacher.dataset(unet))
    print(f"text-to-image teacher: {folder}")


if __name__ == "__main__":
    main()
