"""python -m experiments.features --data data/cifar10 --out runs/cifar-features.safetensors

Trains a classifier whose features stand in for Inception's, where those cannot be downloaded. Distances by them compare
with each other only, never with a published FID.
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import training
from cli import Parser, output_file, positive, program
from data import Images, load_images
from evaluate import Classifier, prompt_accuracy

# A command line that is read before what was typed: about four times through CIFAR-10 and its mirror images.
RECIPE = (
    "--max_train_steps 3200 --train_batch_size 128 --learning_rate 4e-3 --lr_scheduler cosine --lr_warmup_steps 300"
    " --max_grad_norm 10 --adam_weight_decay 0.02 --mixed_precision bf16 --output_dir runs/features"
)


def fit(args: argparse.Namespace, module: nn.Module, images: Images, loss_of: Callable[..., Tensor]) -> nn.Module:
    """Trains a module by `loss_of(model, x, label, generator)`, whose random numbers must come from the generator:
    others would not be the same in a resumed run. Returns it in eval mode, on the device.

    The plain loop of this folder's own networks, which have neither averages nor a teacher. It is built like the one in
    distill.py, where each line is explained.
    """
    run = training.Run(args, module, images)
    accelerator = run.accelerator
    for step, (x, label), generator in run.batches():
        with accelerator.accumulate(run.model):
            loss = loss_of(run.model, x, label, generator)
            accelerator.backward(loss)
            run.clip_gradients()
            run.optimizer.step()
            run.optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.lr_scheduler.step()
            run.log(step, loss)
            run.checkpoint(step)
    return accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()


def shifted_loss(model: nn.Module, x: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy on images that are shifted by up to four pixels, all of a batch alike."""
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    # reflect: a black edge would tell how far the image was shifted.
    x = pad(x, (4, 4, 4, 4), mode="reflect").roll((dy, dx), (2, 3))[:, :, 4:-4, 4:-4]
    # The network takes pixels as they are in a file, 0..255.
    return cross_entropy(model((x + 1) * 127.5).float(), label, label_smoothing=0.1)


@program
def main() -> None:
    """Trains the classifier, measures its accuracy on the test split, and writes its weights."""
    p = Parser(prog="python -m experiments.features", description=__doc__.splitlines()[2])
    p.add_argument("--data", required=True, help="folder of images with the splits train and test")
    p.add_argument("--out", required=True, help="the file of weights, .safetensors")
    p.add_argument("--resolution", type=positive, help="images are resized to it (default: their own)")
    training.add_arguments(p)
    args = p.parse_args([*RECIPE.split(), *sys.argv[1:]])
    out = output_file(args.out, ".safetensors")
    set_seed(args.seed)  # of the initial weights
    images = load_images(args.data, "train", args.resolution, mirror=True)
    # Read now, so that a folder without a test split is refused before the training.
    test = load_images(args.data, "test", images.samples.shape[-1])
    classifier = fit(args, Classifier(len(images.classes)), images, shifted_loss)
    # Whether the features know what is on images that they have not seen: by those of a poor classifier, distances mean
    # little.
    with torch.no_grad():
        seen = prompt_accuracy(classifier, [], test.samples.split(250), test.labels.tolist())
    # Numbers and text only, so that evaluate.py reads them without running code. The names of the classes go along: by
    # them it tells which class a prompt asks for.
    draft = out.with_name(f"{out.name}.tmp")  # renamed when it is complete
    save_file(classifier.state_dict(), draft, metadata={"classes": json.dumps(images.classes)})
    draft.replace(out)
    print(f"test accuracy {100 * seen['prompt accuracy']:.2f} % on {len(test.labels)} images; {out}")


if __name__ == "__main__":
    main()
