"""python -m toy.features --data data/cifar10 --out runs/cifar-features.safetensors

Trains a classifier whose features stand in for Inception's, where those cannot be downloaded. Distances by them compare
with each other only, never with a published FID.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import training
from data import Images, load_images, program, refuse
from sample import output_file


def _convolution(inside: int, outside: int, pool: bool = False) -> nn.Sequential:
    # No bias: BatchNorm subtracts the mean right after, and any bias with it.
    layers = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """A small residual network: pixels 0..255 (B, 3, H, W) -> (features (B, 256), logits (B, classes)).

    The range of a file's pixels is part of the network, so that who uses it cannot get it wrong.
    """

    def __init__(self, classes: int):
        super().__init__()
        # The three poolings halve the image: of 32x32 pixels, 4x4 places are left for the mean.
        fine = [_convolution(3, 32), _convolution(32, 64, pool=True)]
        middle = [Residual(_convolution(64, 64), _convolution(64, 64)), _convolution(64, 128, pool=True)]
        coarse = [_convolution(128, 256, pool=True), Residual(_convolution(256, 256), _convolution(256, 256))]
        self.body = nn.Sequential(*fine, *middle, *coarse, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(256, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels.float() / 127.5 - 1)
        return features, self.head(features)


def fit(args: argparse.Namespace, module: nn.Module, images: Images, loss_of: Callable[..., Tensor]) -> nn.Module:
    """Trains a module by `loss_of(model, x, label, generator)`, whose random numbers must come from the generator.

    The plain loop of this folder's own networks, which have neither averages nor a teacher. It is built like the one in
    distill.py, where each line is explained. Random numbers from elsewhere would not be the same in a resumed run.
    """
    run = training.Run(args, module, images, {})
    accelerator, batches = run.accelerator, run.batches()
    for step in run.steps():
        generator, losses = run.generator(step), []
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(run.model):
                loss = loss_of(run.model, *next(batches), generator)
                accelerator.backward(loss)
                run.clip_gradients()
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
    logits = [classifier(pixels.to(device))[1].cpu() for pixels in images.samples.split(250)]
    return (torch.cat(logits).argmax(1) == images.labels).double().mean().item()


def load_classifier(file: str) -> tuple[Classifier, list[str]]:
    """The network of a file that `main` wrote, in eval mode on the CPU, and the names of its classes.

    The file holds numbers and text only, so reading it cannot run code. What is not such a file raises: BadInput with
    the reason where there is one to give, else whatever the reader raises.
    """
    refuse(not Path(file).is_file(), "no such file")  # a named pipe would be waited for without end
    with safe_open(file, "pt") as content:
        names = json.loads((content.metadata() or {}).get("classes", "null"))
        weights = {key: content.get_tensor(key) for key in content.keys()}
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    refuse(not named, "it does not say the names of its classes")
    network = Classifier(len(names)).eval()
    network.load_state_dict(weights)
    # All weights lie on the way to the logits. What is not finite would be a distance that looks like any other.
    refuse(not network(torch.zeros(1, 3, 8, 8))[1].isfinite().all(), "its weights give no finite logits")
    return network, names


@program
def main() -> None:
    """Trains the classifier, measures its accuracy on the test split, and writes its weights."""
    description = __doc__.splitlines()[2]
    p = training.Parser(prog="python -m toy.features", description=description, formatter_class=training.Help)
    p.add_argument("--data", required=True, help="folder of images with the splits train and test")
    p.add_argument("--out", required=True, help="the file of weights, .safetensors")
    p.add_argument("--resolution", type=training.positive, help="images are resized to it (default: their own)")
    training.add_arguments(p)
    recipe = "--max_train_steps 3200 --train_batch_size 128 --learning_rate 4e-3 --lr_scheduler cosine"
    recipe += " --max_grad_norm 10 --adam_weight_decay 0.02 --lr_warmup_steps 300 --mixed_precision bf16"
    args = training.parse(p, f"{recipe} --output_dir runs/features")
    out = output_file(args.out, ".safetensors")
    set_seed(args.seed)  # of the initial weights
    images = load_images(args.data, "train", args.resolution, mirror=True)
    test = load_images(args.data, "test", resolution=images.samples.shape[-1])
    classifier = fit(args, Classifier(len(images.classes)), images, shifted_loss)
    right = 100 * accuracy(classifier, test, training.process().device)
    draft = out.with_name(f"{out.name}.tmp")  # renamed when it is complete
    save_file(classifier.state_dict(), draft, metadata={"classes": json.dumps(images.classes)})
    draft.replace(out)
    print(f"test accuracy {right:.2f} % on {len(test.labels)} images; {out}")


if __name__ == "__main__":
    main()
