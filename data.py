"""Where x_0 comes from, in which order it is drawn, and how unusable input is refused.

Four sources, from the simplest to the largest. Each is a PyTorch dataset whose batches are pairs (data, label):

    Points          a 2-D distribution                    x_0 (B, 2) and class numbers (B,)
    Images          a folder of images by class           x_0 (B, 3, H, W) in [-1, 1] and class numbers (B,)
    CaptionFolder   images with captions in a folder      uint8 pixels (B, 3, R, R) and tokens (B, L)
    Shards          the same in webdataset's tar files    the same, as a stream
    CachedLatents   either of the last two, encoded       latents (B, C, h, w) and text embeddings (B, L, D)

Data from the web are never all good. A broken file is skipped, counted, and named in the log; nothing that lies in a
file ends a run. Only if nothing usable is left does the program end, with one line that says so (BadInput).
"""

import bisect
import functools
import io
import itertools
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm

from toy.distributions import DISTRIBUTIONS, GaussianMixture

log = logging.getLogger("data")
# torch.load can run code that a file contains. This makes every call refuse such files, those inside libraries too.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}
# Only the formats that the extensions promise: PIL knows some, PostScript for one, that it hands to an interpreter.
FORMATS = ["JPEG", "PNG", "WEBP"]


# ---------------------------------------------------------------------------------------------------------------------
# Refusing: one clear line on stderr and exit status 2
# ---------------------------------------------------------------------------------------------------------------------


class BadInput(Exception):
    """Something that a person can put right: a flag, a file, a folder. Its text is the one line that they see."""

    def __init__(self, why: str):
        # A loader's process hands its errors on with their tracebacks, which end with the line that was meant.
        super().__init__(why.rpartition("BadInput: ")[2].rstrip())


def refuse(when: object, why: str) -> None:
    """Ends the program with the line `why`, if the condition holds."""
    if when:
        raise BadInput(why)


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates the `main` of a command-line program: what is not a mistake of ours ends it with one line.

    Exit status 2 is a BadInput. 1 is the system's own trouble, a full disk, a missing permission or too little memory.
    130 is Ctrl-C or SIGTERM. Nothing is saved on the way out: whatever has its final name is complete already. A
    mistake of ours keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        # What a scheduler sends before it kills is taken for Ctrl-C. Only a main thread may say so.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        again = "what is finished is kept; the same command with --resume_from_checkpoint latest goes on with training"
        try:
            main()
        except BadInput as error:
            _end(str(error), 2)
        except OSError as error:
            _end(f"{error} ({again})", 1)
        except (RuntimeError, MemoryError) as error:
            # A GPU's error has a class of its own. A CPU's has only its words.
            full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
            if not full:
                raise
            less = "a smaller batch needs less; more --gradient_accumulation_steps keep a training's total the same"
            _end(f"out of memory: {less}", 1)
        except KeyboardInterrupt:
            _end(f"interrupted, and nothing more was saved ({again})", 130)

    return wrapped


def _end(why: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr)
    sys.exit(status)


def read_json(file: Path) -> dict:
    """A JSON file that holds an object; BadInput if it does not. Such files are read back later than they were written,
    by people who may have edited them."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from None
    refuse(not isinstance(content, dict), f"cannot read {file}: it holds no JSON object")
    return content


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be. Refused now rather than after hours, when the first result is to be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file that vanishes again. Permissions alone do not tell: a disk may be full, or mounted for reading only.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def read_prompts(values: list[str]) -> list[str]:
    """Prompts from the command line: the values themselves, or the lines of a file if a single value names one. What
    ends in .txt is meant as a file, and must be one."""
    missing = [text for text in values if text.lower().endswith(".txt") and not os.path.isfile(text)]
    refuse(missing, f"--prompts: no such file: {' '.join(missing)}")
    if len(values) != 1 or not os.path.isfile(values[0]):  # unlike Path.is_file, this takes prompts of any length
        return [str(value) for value in values]
    lines = [line.strip() for line in Path(values[0]).read_text(errors="replace").splitlines() if line.strip()]
    refuse(not lines, f"no prompts in {values[0]}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The order of batches
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..length-1. Each epoch has a seed of its own, so that a run can begin in any of them."""
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=shuffle).tolist()


class EndlessBatches(Sampler):
    """Batches of indices, epoch after epoch, each in a new order; where one is in this stream is a plain number.

    All epochs in a row are one endless list of indices. A batch of the whole run is `batch_size * world` of them in a
    row, of which process `rank` takes its own part. So the stream depends neither on the number of processes nor on
    interruptions: to resume is to begin at batch `start`. A batch that an epoch cannot fill goes on in the next epoch.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        # `length` counts the items of the data set, `start` this process's batches that a resumed run leaves out.
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.batch_size * self.world  # items of all processes; `first` counts from the first epoch's beginning
        for first in itertools.count(self.start * whole + self.rank * self.batch_size, whole):
            places = range(first, first + self.batch_size)
            yield [epoch_order(self.length, self.seed, p // self.length)[p % self.length] for p in places]


# ---------------------------------------------------------------------------------------------------------------------
# Points of a 2-D distribution
# ---------------------------------------------------------------------------------------------------------------------

POINTS = ("toy:", "ideal:")  # how the names of 2-D distributions begin; teacher.py says what sets the two apart


def distribution(name: str) -> GaussianMixture:
    """The mixture of "toy:moons" or "ideal:moons"."""
    known = {kind + which: mixture for kind in POINTS for which, mixture in DISTRIBUTIONS.items()}
    refuse(name not in known, f"unknown 2-D distribution {name!r}: choose from {', '.join(known)}")
    return known[name]


class Points(Dataset):
    """65,536 points of a distribution, always the same, with their classes (zeros where there are none)."""

    def __init__(self, data: str, split: str = "train"):
        # A seed for each split: test points are other points of the same density.
        refuse(split not in ("train", "test"), f"{data} has the splits train and test, not {split}")
        mixture, seed = distribution(data), {"train": 1, "test": 2}[split]
        self.samples, component = mixture.sample(2**16, torch.Generator().manual_seed(seed))
        self.labels = torch.zeros_like(component) if mixture.classes is None else mixture.classes[component]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        return self.samples[indices], self.labels[indices]


# ---------------------------------------------------------------------------------------------------------------------
# Images by class
# ---------------------------------------------------------------------------------------------------------------------


def centre_square(image: Image.Image, resolution: int) -> Tensor:
    """The middle of the image's longer side, resized by LANCZOS: uint8 (3, R, R)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    return to_tensor(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(file: Path, resolution: int | None) -> Tensor | None:
    """uint8 (3, H, W), a centre square if a resolution is given; None, and a line in the log, if the file is broken."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return centre_square(image, resolution) if resolution else to_tensor(image.convert("RGB"))
    except Exception as error:  # whatever a file makes a decoder raise; one that would fill the memory is refused too
        log.warning("skipped %s: %s", file, error)
        return None


def to_range(pixels: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1], the range that image models are trained on."""
    return pixels.float() / 127.5 - 1


def image_files(folder: str, split: str) -> list[Path]:
    """The images below `folder/split`, or below `folder` for the train split of a folder without splits.

    None is an error, except for a folder whose name begins with cifar10: torchvision can fill that one. The test split
    has no such way out. Training images in its place would make any model look better than it is.
    """
    root = Path(folder) / split
    if split == "train" and not root.is_dir():
        root = Path(folder)
    # is_file: to open a pipe that nobody writes to is to wait for ever.
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    missing = not files and not Path(folder).name.startswith("cifar10")
    refuse(missing, f"no images in {root}" if root.is_dir() else f"no such folder: {root}")
    return files


class ImageFiles:
    """Images of any size as centre squares of one, read when they are asked for: for sets that exceed memory."""

    def __init__(self, files: list[Path], resolution: int):
        self.files, self.resolution = files, resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """uint8 (B, 3, R, R), without the broken ones among them."""
        squares = [read_image(self.files[i], self.resolution) for i in indices.tolist()]
        usable = [square for square in squares if square is not None]
        return torch.stack(usable) if usable else torch.empty(0, 3, *[self.resolution] * 2, dtype=torch.uint8)


class Images(Dataset):
    """Images in memory, uint8 (n, 3, H, W), with their classes. With `mirror` each image is there twice: item i + n is
    the mirror image of item i."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: list[str], mirror: bool = False):
        self.samples, self.labels, self.classes, self.mirror = pixels, labels, classes, mirror

    def __len__(self) -> int:
        return len(self.samples) * (2 if self.mirror else 1)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: x_0 in [-1, 1] and labels (B,)."""
        index = torch.tensor(indices)
        i = index % len(self.samples)
        x = to_range(self.samples[i])
        return torch.where((index >= len(self.samples)).view(-1, 1, 1, 1), x.flip(3), x), self.labels[i]


@functools.cache  # the laboratory asks again and again
def load_images(folder: str, split: str = "train", resolution: int | None = None, mirror: bool = False) -> Images:
    """All images below `folder/split/<class>/`, in memory, as centre squares of `resolution`.

    Without a resolution they must be squares of one size already. Broken files are skipped and counted. A folder named
    cifar10* without images is filled by torchvision.
    """
    files = image_files(folder, split)
    if not files:
        return _torchvision_cifar10(folder, split, resolution, mirror)
    # A class is the name of the folder that an image lies in. Its number is its place in the alphabet, which is the
    # same for the train and the test split, and for all processes.
    classes = sorted({path.parent.name for path in files})
    pixels, labels = [], []
    for path in tqdm(files, desc=f"images {folder}", unit="img", leave=False, mininterval=1):
        if (image := read_image(path, resolution)) is None:
            continue
        pixels.append(image)
        labels.append(classes.index(path.parent.name))
        (_, height, width), size = image.shape, pixels[0].shape[1]
        refuse((height, width) != (size, size), f"{path} is {width}x{height} pixels, expected {size}x{size}")
    if broken := len(files) - len(pixels):
        log.warning("skipped %d broken of %d files in %s", broken, len(files), folder)
    refuse(not pixels, f"no readable images in {folder}: all {broken} are broken")
    return Images(torch.stack(pixels), torch.tensor(labels), classes, mirror)


def _torchvision_cifar10(folder: str, split: str, resolution: int | None, mirror: bool) -> Images:
    """CIFAR-10's arrays as torchvision has them, downloaded below `folder` if they are not there yet."""
    import torchvision  # takes a second, and few need it

    refuse(split not in ("train", "test"), f"CIFAR-10 has the splits train and test, not {split}")
    try:
        cifar = torchvision.datasets.CIFAR10(folder, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"no images in {folder}, and CIFAR-10 could not be downloaded: {error}") from None
    # An image that has this resolution already is not changed by it, not by a single bit.
    squares = [centre_square(Image.fromarray(image), resolution or 32) for image in cifar.data]
    return Images(torch.stack(squares), torch.tensor(cifar.targets), cifar.classes, mirror)


def reference_set(data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
    """All of the data, to be measured against: points (n, 2), or uint8 images of that resolution."""
    if data.startswith(POINTS):
        return Points(data, split).samples
    refuse(".tar" in data and not Path(data).is_dir(), f"{data} is no folder of images to measure against: --data")
    files = image_files(data, split)
    return ImageFiles(files, resolution) if files else load_images(data, split, resolution).samples


# ---------------------------------------------------------------------------------------------------------------------
# Images with captions
# ---------------------------------------------------------------------------------------------------------------------

Tokenize = Callable[[list[str]], Tensor]  # captions -> tokens (B, L)
# uint8 pixels (B, 3, R, R) and tokens (B, L). Bytes are a quarter of what floats would be, on the way from a loader's
# process to the device; there the model turns them into [-1, 1].
Batches = Iterator[tuple[Tensor, Tensor]]
Part = tuple[str, slice | str]  # what the cache encodes into one file: its name, and which samples or which shard


class PairOptions(NamedTuple):
    """The size that images get, which pairs are wanted at all, and whether --data may run commands."""

    resolution: int
    min_image_size: int = 0  # of the original's shorter side
    max_pwatermark: float = 1.0  # LAION's estimate of how likely the image has a watermark
    allow_pipe: bool = False


class Unwanted(Exception):
    """A pair that is whole and is left out all the same. The text is its kind, in the words of the final count."""


def read_pair(sample: dict, options: PairOptions) -> tuple[Tensor, str]:
    """uint8 image and caption of a sample in webdataset's form: {"jpg": bytes or path, "txt": bytes, "json": bytes}."""
    # img2dataset writes a json beside each image, with the caption and what is known of the original. A txt goes first.
    facts = json.loads(sample.get("json", "{}"))
    caption = sample["txt"].decode(errors="replace") if "txt" in sample else facts.get("text") or facts.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise Unwanted("without caption")
    file = next((sample[key] for key in sample if f".{key}" in EXTENSIONS), b"")
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
        # img2dataset may have made the file smaller than the original was; what counts is the original.
        original = facts.get("original_width"), facts.get("original_height")
        shorter_side = min(original if all(original) else image.size)
        if shorter_side < options.min_image_size or (facts.get("pwatermark") or 0) > options.max_pwatermark:
            raise Unwanted("filtered")
        # Not mirrored, unlike images by class: a caption may say left and right.
        return centre_square(image, options.resolution), caption.strip()


class Stream(IterableDataset):
    """What `read(worker, workers)` yields in each of a loader's processes. Not an iterator: they get it pickled, and
    begin themselves."""

    def __init__(self, read: Callable[[int, int], Iterator]):
        self.read = read

    def __iter__(self) -> Iterator:
        info = get_worker_info()
        return self.read(info.id, info.num_workers) if info else self.read(0, 1)


class Pairs:
    """What both sources of pairs share: samples become batches, and the unusable are skipped, counted and logged."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
        self.data, self.options, self.tokenize, self.counts = data, options, tokenize, Counter()

    def skip(self, name: str, error: Exception) -> None:
        """Counts a sample and logs it. Of the filtered, which may be millions, only every power of two is logged."""
        kind = str(error) if isinstance(error, Unwanted) else "broken"
        self.counts[kind] += 1
        if kind != "filtered" or self.counts[kind].bit_count() == 1:
            log.warning("skipped %s: %s (%d %s so far)", name, error, self.counts[kind], kind)

    def usable(self, samples: Iterable[dict]) -> Iterator[tuple[Tensor, str]]:
        """Pixels and caption of each sample that has both."""
        for sample in samples:
            self.counts["members"] += 1
            try:
                pair = read_pair(sample, self.options)
            except Exception as error:  # whatever a file from the web makes a decoder raise
                self.skip(f"{sample['__url__']}/{sample['__key__']}", error)
            else:
                self.counts["usable"] += 1
                yield pair

    def first(self, samples: Iterable[dict]) -> tuple[Tensor, str]:
        """The first usable pair; BadInput with all counts if there is none."""
        for pair in self.usable(samples):
            return pair
        kinds = ("members", "broken", "without caption", "filtered")
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in kinds)
        raise BadInput(f"no usable image-caption pairs in {self.data}: {counts}")

    def probe(self, samples: Iterable[dict]) -> None:
        """Refuses data without any usable pair, before a run begins."""
        self.counts.clear()
        self.first(samples)
        self.counts.clear()

    def batched(self, pairs: Iterator[tuple[Tensor, str]], size: int = 64) -> Batches:
        """Batches of `size`; the last may be smaller."""
        while batch := list(itertools.islice(pairs, size)):
            pixels, captions = zip(*batch, strict=True)
            yield torch.stack(pixels), self.tokenize(list(captions))


class CaptionFolder(Pairs, Dataset):
    """Images below a folder. Captions are in its metadata.jsonl, as Hugging Face has it, or in a .txt beside each."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
        super().__init__(data, options, tokenize)
        # In webdataset's form, so that read_pair can be the same: __url__ and __key__ name a sample in the log. Images
        # are kept as paths and opened when they are needed; captions are small, and kept.
        root, self.samples = Path(data), []
        metadata, files = self._metadata(root / "metadata.jsonl"), image_files(data, "")
        for path in files:
            name, text = path.relative_to(root), path.with_suffix(".txt")
            if name in metadata or text.is_file():
                caption = {"json": metadata[name]} if name in metadata else {"txt": text.read_bytes()}
                self.samples.append({"__url__": root, "__key__": name, path.suffix[1:].lower(): path, **caption})
        how = "expected 0.txt beside 0.jpg, and so on, or a metadata.jsonl"
        refuse(not self.samples, f"no captions in {root}: {how}")
        if len(self) < len(files):
            log.warning("left out %d of %d images in %s: without caption", len(files) - len(self), len(files), root)
        self.probe(self.samples)

    @staticmethod
    def _metadata(file: Path) -> dict[Path, bytes]:
        """Each image's line of metadata.jsonl."""
        lines = {}
        for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
            try:
                row = json.loads(line)
                row["text" if "text" in row else "caption"]  # a line without a caption is a bad line too
                lines[Path(row["file_name"])] = line
            except (ValueError, TypeError, KeyError):
                raise BadInput(f'{file}, line {number} is not {{"file_name": "0.jpg", "text": "a caption"}}') from None
        return lines

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once. In the place of an unusable pair stands the next usable one: a batch keeps its size,
        and which pair is where stays a function of the indices."""
        n = len(self)
        pairs = (self.first(self.samples[(i + k) % n] for k in range(n)) for i in indices)
        return next(self.batched(pairs, len(indices)))

    def parts(self) -> list[Part]:
        """Parts of 1,024 pairs."""
        return [(f"{i:05d}", slice(first, first + 1024)) for i, first in enumerate(range(0, len(self), 1024))]

    def read(self, part: slice) -> Batches:
        """The usable pairs of a part."""
        return self.batched(self.usable(self.samples[part]))


def expansions(pattern: str) -> int:
    """How many names the braces of a pattern stand for, counted without making any: {0..999999999999} would fill the
    memory, and so would {0..999}{0..999}{0..999}."""
    total = 1
    for inside in re.findall("{([^{}]*)}", pattern):
        ends = re.match(r"(-?\d+)\.\.(-?\d+)", inside)
        total *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inside.count(",") + 1
    return total


class Shards(Pairs):
    """webdataset's tar files, as img2dataset writes them: 0.jpg with 0.txt, or with 0.json that holds the caption."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
        from webdataset.shardlists import expand_urls  # webdataset takes a second, and few need it

        super().__init__(data, options, tokenize)
        # {000..999} and :: are expanded here, and what is a local file must exist. All shards of a run are known from
        # its first step on, since each epoch deals them out.
        try:
            # LAION-5B has 231,349.
            refuse(sum(map(expansions, data.split("::"))) > 10**6, f"{data} stands for more than a million shards")
            self.urls = expand_urls(data)
        except (AssertionError, ValueError, RecursionError) as error:  # unbalanced or deep braces, unknown variables
            raise BadInput(f"{data}: {error}") from None
        for url in self.urls:
            # The one scheme that webdataset hands to a shell. For others it starts a program, with the url as it is.
            scheme = urlparse(url).scheme
            refuse(scheme == "pipe" and not options.allow_pipe, f"{url} runs a shell command: --allow_pipe allows it")
            local = scheme == "file" or ("://" not in url and scheme != "pipe")
            refuse(local and not os.path.isfile(re.sub("^file:(//)?", "", url)), f"no such shard: {url}")
        self.probe(self.samples(self.urls))

    def samples(self, urls: list[str]) -> Iterator[dict]:
        """The samples of these shards, one after the other."""
        import webdataset

        def go_on(error: Exception) -> bool:
            self.skip(url, error)
            # A ValueError is two files of one name, and the rest is fine. Anything else is a torn archive, and its end.
            return isinstance(error, ValueError)

        for url in urls:
            yield from webdataset.tarfile_to_samples(handler=go_on)([{"url": url}])

    def parts(self) -> list[Part]:
        """A part for each shard."""
        stems = [re.sub("[^a-zA-Z0-9_-]", "_", Path(url).stem) for url in self.urls]
        return [(f"{i:05d}-{stem}", url) for i, (stem, url) in enumerate(zip(stems, self.urls, strict=True))]

    def read(self, part: str) -> Batches:
        """The usable pairs of a part."""
        return self.batched(self.usable(self.samples([part])))

    def check_readers(self, readers: int) -> None:
        """Refuses more readers than shards. A run calls it beforehand, with the number of its processes."""
        refuse(len(self.urls) < readers, f"{len(self.urls)} shards in {self.data} are too few for {readers} readers")

    def batches(self, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> Stream:
        """Batches without end for process `rank` of `world`, for DataLoader(batch_size=None).

        A tar file cannot be entered in the middle: to skip to batch `start` would mean to read all before it. So
        `start` is part of the seed, and a resumed run goes on in a new order.
        """
        return Stream(functools.partial(self._share, batch_size, f"{seed} {start}", rank, world))

    def _share(self, batch_size: int, seed: str, rank: int, world: int, worker: int, workers: int) -> Batches:
        # A reader is a worker of a process. Each has shards of its own, so that no pair is read twice in an epoch.
        self.check_readers(world * workers)
        return self.batched(self._epochs(seed, rank * workers + worker, world * workers), batch_size)

    def _epochs(self, seed: str, reader: int, readers: int) -> Iterator[tuple[Tensor, str]]:
        """The usable pairs of this reader. In each epoch the shards are dealt out anew to all readers."""
        import webdataset

        for epoch in itertools.count():
            urls = random.Random(f"{seed} {epoch}").sample(self.urls, len(self.urls))  # the same deal for all readers
            # 1,000 samples wait in a buffer from which the next is drawn; they wait undecoded, which is small.
            shuffle = webdataset.shuffle(1000, rng=random.Random(f"{seed} {epoch} {reader}"))
            before = self.counts["usable"]
            yield from self.usable(shuffle(self.samples(urls[reader::readers])))
            if self.counts["usable"] == before:
                # None of this reader's shards was any good. If others are, the next deal helps; if not, this raises.
                self.probe(self.samples(self.urls))


def load_pairs(data: str, options: tuple, tokenize: Tokenize) -> CaptionFolder | Shards:
    """Pairs from shards (paths or urls of tar files, with braces, joined by ::) or from a folder. `options` are the
    values of PairOptions."""
    shards = ".tar" in data and not os.path.isdir(data)
    return (Shards if shards else CaptionFolder)(data, PairOptions(*options), tokenize)


# ---------------------------------------------------------------------------------------------------------------------
# The cache of encoded pairs: VAE and text encoder need to see each pair only once
# ---------------------------------------------------------------------------------------------------------------------


def part_batches(pairs: Pairs, parts: list[Part], worker: int, workers: int) -> Iterator[tuple]:
    """This worker's parts: (name, batch) for each batch of each of them, and (name, None) at a part's end.

    A worker reads whole parts, so that the batches do not depend on how many workers there are.
    """
    for name, part in parts[worker::workers]:
        yield from ((name, batch) for batch in pairs.read(part))
        yield name, None


def cache_pairs(
    dataset: Pairs, folder: str, made_from: dict, encode: Callable, rank: int, world: int, workers: int = 0
) -> None:
    """Encodes each part of the data into a file of its own, and keeps those that an interrupted run has left.

    `encode` turns pixels (B, 3, R, R) and tokens (B, L) into latents and text embeddings; `workers` processes decode
    images meanwhile. `made_from` says what the result depends on; a folder that was made from anything else is refused.
    Process `rank` of `world` does its share only: the caller waits for the others before it reads.
    """
    # cache.json is written first and names all parts; a part is there as soon as its file has its final name. What an
    # interruption leaves is therefore always either complete or seen to be missing.
    target, parts = writable_folder(folder), dataset.parts()
    index, wanted = target / "cache.json", {**made_from, "parts": [name for name, _ in parts]}
    if index.is_file():
        there = read_json(index)
        differing = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
        what = ", ".join(f"{key} {there.get(key)}, not {wanted.get(key)}" for key in differing if key != "parts")
        refuse(differing, f"--cache_latents {folder} was made from {what or 'other parts'}: another folder please")
    elif rank == 0:
        draft = target / "cache.json.tmp"
        draft.write_text(json.dumps(wanted, indent=2))
        draft.rename(index)
    missing = [(name, part) for name, part in parts[rank::world] if not (target / f"{name}.safetensors").exists()]
    stream = Stream(functools.partial(part_batches, dataset, missing))
    loader = DataLoader(stream, batch_size=None, num_workers=min(workers, len(missing)))
    # Several parts are on their way at once, one for each worker. What waits here are latents and embeddings; a part of
    # them, 1,024 pairs of a folder or one shard, is small enough for memory.
    encoded = defaultdict(list)
    bar = tqdm(total=len(missing), desc="encoding", unit="part", mininterval=1, disable=rank != 0)
    for name, batch in loader:
        if batch is not None:
            encoded[name].append([tensor.cpu() for tensor in encode(*batch)])
            continue
        empty = [[torch.empty(0), torch.empty(0)]]  # for a part without usable pairs
        x0, cond = (torch.cat(tensors).contiguous() for tensors in zip(*encoded.pop(name, empty), strict=True))
        draft = target / f"{name}.tmp"
        save_file({"x0": x0, "cond": cond}, draft)
        draft.rename(target / f"{name}.safetensors")
        bar.update()


class CachedLatents(Dataset):
    """What `cache_pairs` wrote. Rows are read one by one, since all may exceed memory, and no file stays open, since
    there may be thousands."""

    def __init__(self, folder: str):
        index = Path(folder) / "cache.json"
        refuse(not index.is_file(), f"no cached latents in {folder}")
        names = read_json(index).get("parts")
        # Names as `parts` makes them: one with .. in it would lead out of the folder.
        sound = isinstance(names, list) and all(re.fullmatch("[a-zA-Z0-9_-]+", str(name)) for name in names)
        refuse(not sound, f"{index} was edited: its parts are no list of names")
        self.files = [Path(folder) / f"{name}.safetensors" for name in names]
        missing = [file.name for file in self.files if not file.is_file()]
        refuse(missing, f"{folder} lacks {len(missing)} of {len(self.files)} parts: {', '.join(missing[:3])}")
        self.starts = [0]  # the number of each file's first row in the whole, and after the last their count
        for file in self.files:
            try:
                with safe_open(file, "pt") as part:  # reads sizes as well, by which a file without its end is known
                    (rows, *_), (texts, *_) = (part.get_slice(key).get_shape() for key in ("x0", "cond"))
            except (SafetensorError, ValueError) as error:
                raise BadInput(f"{file} is damaged, and can be deleted to be encoded again: {error}") from None
            refuse(rows != texts, f"{file} is damaged: it holds {rows} latents and {texts} texts")
            self.starts.append(self.starts[-1] + rows)
        refuse(not len(self), f"{folder} holds no pairs")

    def __len__(self) -> int:
        return self.starts[-1]

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        which = bisect.bisect_right(self.starts, index) - 1
        with safe_open(self.files[which], "pt") as part:
            row = index - self.starts[which]
            return part.get_slice("x0")[row], part.get_slice("cond")[row]

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: latents (B, C, h, w) and text embeddings (B, L, D)."""
        x0, cond = zip(*map(self._row, indices), strict=True)
        return torch.stack(x0), torch.stack(cond)
