"""python -m toy.features --data data/cifar10 --out runs/cifar-features.pt2

Trains a classifier whose features stand in for Inception's, where those cannot be downloaded. Distances by them compare
with each other only, never with a published FID.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset

import training
from data import Images, load_images, program, writable_folder


def _convolution(inside: int, outside: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """A small residual network: pixels 0..255 (B, 3, H, W) -> (features (B, 256), logits (B, classes))."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            *(_convolution(3, 32), _convolution(32, 64, pool=True)),
            Residual(_convolution(64, 64), _convolution(64, 64)),
            *(_convolution(64, 128, pool=True), _convolution(128, 256, pool=True)),
            Residual(_convolution(256, 256), _convolution(256, 256)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels.float() / 127.5 - 1)
        return features, self.head(features)


def fit(args: argparse.Namespace, module: nn.Module, dataset: Dataset, loss_of: Callable[..., Tensor]) -> nn.Module:
    """Trains a module by `loss_of(model, x, label, generator)`, whose random numbers must come from the generator.

    The plain loop of this folder's own networks, which have neither averages nor a teacher.
    """
    run = training.Run(args, module, dataset, {})
    accelerator, batches = run.accelerator, run.batches()
    for step in run.steps():
        generator, losses = run.generator(step), []
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(run.model):
                loss = loss_of(run.model, *next(batches), generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
                run.optimizer.step()
                run.optimizer.zero_grad()
            losses.append(loss.detach())
        run.lr_scheduler.step()
        run.log(step, torch.stack(losses).mean())
        run.checkpoint(step)
    return accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()


def shifted_loss(model: nn.Module, x: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy on images that are shifted by up to four pixels, all of a batch alike."""
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    x = pad(x, (4, 4, 4, 4), mode="reflect").roll((dy, dx), (2, 3))[:, :, 4:-4, 4:-4]
    _, logits = model((x + 1) * 127.5)
    return cross_entropy(logits.float(), label, label_smoothing=0.1)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Images, device: torch.device) -> float:
    """The share of images whose class is the largest logit."""
    right = 0
    for pixels, labels in zip(images.samples.split(250), images.labels.split(250), strict=True):
        right += (classifier(pixels.to(device))[1].argmax(1).cpu() == labels).sum().item()
    return right / len(images.labels)


@program
def main() -> None:
    p = training.Parser(
        prog="python -m toy.features", description=__doc__.splitlines()[2], formatter_class=training.Help
    )
    p.add_argument("--data", required=True, help="folder of images with the splits train and test")
    p.add_argument("--out", required=True, help="the exported network, .pt2")
    p.add_argument(
        "--resolution", type=training.positive, help="images are resized and cropped to it (default: their own)"
    )
    training.add_arguments(p)
    recipe = (
        "--max_train_steps 3200 --train_batch_size 128 --learning_rate 4e-3 --lr_scheduler cosine --max_grad_norm 10"
    )
    recipe += " --adam_weight_decay 0.02 --lr_warmup_steps 300 --mixed_precision bf16 --output_dir runs/features"
    args = training.parse(p, recipe)
    out = Path(args.out)
    writable_folder(out.parent)
    set_seed(args.seed)  # of the initial weights
    images = load_images(args.data, "train", args.resolution, mirror=True)
    test = load_images(args.data, "test", resolution=images.samples.shape[-1])
    classifier = fit(args, Classifier(len(images.classes)), images, shifted_loss)
    result = accuracy(classifier, test, training.process().device)
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(classifier.cpu(), (images.samples[:2],), dynamic_shapes=batch)
    draft = out.with_name(out.name + ".tmp.pt2")
    torch.export.save(exported, draft, extra_files={"classes": json.dumps(images.classes)})
    draft.replace(out)
    print(f"test accuracy {100 * result:.2f} % on {len(test.labels)} images; {out}")


if __name__ == "__main__":
    main()
