"""Where images come from, in what order they are drawn, and how unusable input is refused."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

log = logging.getLogger("data")
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.load unpickles no code, whatever a library asks it for
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}


class BadInput(Exception):
    """Something a person can put right. Programs answer with its text on one line of stderr and exit status 2."""


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates the `main` of a command-line program: quiet logging, and BadInput as one clear line."""

    @functools.wraps(main)
    def wrapped() -> None:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        try:
            main()
        except BadInput as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def writable_folder(path: str) -> Path:
    """The folder, made if need be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been as quick
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def read_prompts(values: list[str]) -> list[str]:
    """Prompts from the command line: themselves, or one file's lines."""
    if len(values) != 1 or not os.path.isfile(values[0]):  # Path.is_file raises on prompts longer than file names
        return [str(value) for value in values]
    lines = [line.strip() for line in Path(values[0]).read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"no prompts in {values[0]}")
    return lines


def centre_square(image: Image.Image, resolution: int) -> Tensor:
    """The middle of the larger side, resized by LANCZOS: uint8 (3, R, R)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    pixels = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


class ImageFiles:
    """Images of any size as centre squares of one, read when they are asked for: sets that exceed memory."""

    def __init__(self, files: list[Path], resolution: int):
        self.files, self.resolution = files, resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """uint8 (B, 3, R, R), without the broken ones."""
        squares = []
        for i in indices.tolist():
            try:
                with Image.open(self.files[i]) as image:
                    squares.append(centre_square(image, self.resolution))
            except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files, by format
                log.warning("skipped %s: %s", self.files[i], error)
        return torch.stack(squares) if squares else torch.empty(0, 3, *[self.resolution] * 2, dtype=torch.uint8)


class Images(Dataset):
    """Images in memory with their class. Item i >= len(samples) is the mirror image of item i - len(samples)."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: list[str], mirror: bool = False):
        self.samples, self.labels, self.classes, self.mirror = pixels, labels, classes, mirror  # uint8 (n, 3, H, W)

    def __len__(self) -> int:
        return len(self.samples) * (2 if self.mirror else 1)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: x_0 (B, 3, H, W) in [-1, 1] and labels (B,)."""
        index = torch.tensor(indices)
        i = index % len(self.samples)
        x = self.samples[i].float() / 127.5 - 1
        return torch.where((index >= len(self.samples)).view(-1, 1, 1, 1), x.flip(3), x), self.labels[i]


def image_files(folder: str, split: str) -> list[Path]:
    """Images below `folder/split`; below `folder` itself for the train split of a folder without splits. None only for
    a folder named cifar10*, which torchvision can fill."""
    root = Path(folder) / split
    if split == "train" and not root.is_dir():
        root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files and not Path(folder).name.startswith("cifar10"):
        raise BadInput(f"no images in {root}" if root.is_dir() else f"no such folder: {root}")
    return files


@functools.cache  # a program asks for the same images several times
def load_images(folder: str, split: str = "train", resolution: int | None = None, mirror: bool = False) -> Images:
    """All images below `folder/split/<class>/`, in memory.

    A folder named cifar10* that holds no images is filled by torchvision's download (which checks the archive's md5
    before it opens it). Broken files are skipped, named in the log, and counted. All become centre squares of
    `resolution`; where that is not given, they must be squares of one size.
    """
    files = image_files(folder, split)
    if not files:
        return _torchvision_cifar10(folder, split, resolution, mirror)
    classes = sorted({path.parent.name for path in files})
    pixels, labels, broken = [], [], 0
    for path in tqdm(files, desc=f"images {folder}", unit="img", leave=False, mininterval=1):
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
                if resolution and array.shape != (resolution, resolution, 3):
                    array = centre_square(image, resolution).permute(1, 2, 0).numpy()
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files, by format
            log.warning("skipped %s: %s", path, error)
            broken += 1
            continue
        size = (pixels[0] if pixels else array).shape[0]
        if array.shape != (size, size, 3):
            raise BadInput(f"{path} is {array.shape[1]}x{array.shape[0]} pixels, expected {size}x{size}")
        pixels.append(array)
        labels.append(classes.index(path.parent.name))
    if broken:
        log.warning("skipped %d broken of %d files in %s", broken, len(files), folder)
    if not pixels:
        raise BadInput(f"no readable images in {folder}: all {broken} are broken")
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels), classes, mirror)


def _torchvision_cifar10(folder: str, split: str, resolution: int | None, mirror: bool) -> Images:
    try:
        cifar = torchvision.datasets.CIFAR10(folder, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"no images in {folder}, and CIFAR-10 could not be downloaded: {error}") from None
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    if resolution and pixels.shape[-1] != resolution:
        pixels = torch.stack([centre_square(Image.fromarray(image), resolution) for image in cifar.data])
    return Images(pixels, torch.tensor(cifar.targets), cifar.classes, mirror)


class EndlessBatches(Sampler):
    """Batches of indices from shuffled epochs without end; the position in the stream is a plain number.

    A batch of the whole run is `batch_size * world` consecutive indices, of which each process takes its own rows. So
    the stream depends neither on the number of processes nor on where a run was interrupted.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.world + self.rank) * self.batch_size
        epoch, order = -1, []
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.length != epoch:
                    epoch = p // self.length
                    shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.length, generator=shuffle).tolist()
                batch.append(order[p % self.length])
            yield batch
            position += self.batch_size * self.world
