"""Where x_0 comes from: points of a density, images by class, images with captions.

    Points     a 2-D distribution               x_0 (B, 2) and class numbers (B,)
    Images     a folder of images by class      x_0 (B, 3, H, W) in [-1, 1] and class numbers (B,)
    Captions   images with captions             uint8 pixels (B, 3, R, R) and B texts

The first two lie in memory and are indexed by a whole batch of numbers. Captions are a stream without end, because a
set of the web's size has neither a length nor a short way to its middle.

Data from the web are never all good. A broken image or pair is skipped and counted, and the log names some. What a
person must put right, such as images in no class, or no usable image at all, ends the program before the run begins.
"""

import contextlib
import functools
import glob
import io
import itertools
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from cli import by_library, refuse
from toy.distributions import DISTRIBUTIONS, GaussianMixture

log = logging.getLogger("data")

# ---------------------------------------------------------------------------------------------------------------------
# Points of a 2-D distribution
# ---------------------------------------------------------------------------------------------------------------------

POINTS = ("toy:", "ideal:", "flow:")  # how the names of 2-D distributions begin; teacher.py says what sets them apart


def distribution(name: str) -> GaussianMixture:
    """The mixture of "toy:moons", "ideal:moons" or "flow:moons"; BadInput for a name that is none."""
    known = {kind + which: mixture for kind in POINTS for which, mixture in DISTRIBUTIONS.items()}
    refuse(name not in known, f"unknown 2-D distribution {name!r}: choose from {', '.join(known)}")
    return known[name]


class Points(Dataset):
    """65,536 points of a distribution, always the same, with their classes (zeros where there are none)."""

    def __init__(self, data: str, split: str = "train"):
        # A seed for each split: test points are other points of the same density.
        mixture, seed = distribution(data), {"train": 1, "test": 2}[split]
        self.samples, component = mixture.sample(2**16, torch.Generator().manual_seed(seed))
        self.labels = torch.zeros_like(component) if mixture.classes is None else mixture.classes[component]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        """A whole batch at once: x_0 (B, 2) and labels (B,)."""
        return self.samples[indices], self.labels[indices]


# ---------------------------------------------------------------------------------------------------------------------
# Foreign files: what cannot be used is skipped
# ---------------------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# Only the formats that the extensions promise: PIL knows some, PostScript for one, that it hands to an interpreter.
FORMATS = ["JPEG", "PNG", "WEBP"]
# What programs leave and no person chose: .ipynb_checkpoints/ and ._0.jpg; and what zip, file servers and Windows make.
LEFT_BEHIND = re.compile(r"(^|/)(\.[^/]|(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN)/)")


class Unusable(Exception):
    """Unusable(name, why): a foreign file that cannot be used. Only the few lines that read such files raise it."""


class Skipped(dict):
    """Why each unusable file was skipped, by its name.

    The log says it in one line for many: a list that is read once gets one line, and a stream without end gets a new
    one when the number has doubled.
    """

    told = 0

    def usable(self, read: Callable, files: Iterable) -> Iterator:
        """read(file) for each file, but for those where it raises Unusable. Any other error is a mistake of ours."""
        for file in files:
            try:
                yield read(file)
            except Unusable as error:
                self.add(*error.args)

    def add(self, name: object, why: object) -> bool:
        """Also what webdataset calls with its errors. True is its word for "go on"."""
        self[str(name)] = str(why)
        return True

    def __str__(self) -> str:
        news = list(self.items())[self.told :]
        return "; ".join([f"{len(self)} skipped", *(f"{name}: {why}" for name, why in news[:5])])

    def tell(self, where: str) -> None:
        """Writes that line, if there is anything new to say."""
        if len(self) >= max(1, 2 * self.told):
            log.warning("%s: %s", where, self)
            self.told = len(self)


def files_below(root: Path, *endings: str) -> list[Path]:
    """All files at any depth whose names end so. Links are followed: large sets are put together from them."""
    names = (Path(at, name).relative_to(root) for at, _, inside in os.walk(root, followlinks=True) for name in inside)
    chosen = (name for name in names if name.name.lower().endswith(endings) and not LEFT_BEHIND.search(str(name)))
    # is_file: to open a pipe that nobody writes to is to wait for ever.
    return sorted(root / name for name in chosen if (root / name).is_file())


def open_image(file: Path | io.BytesIO, name: object) -> Image.Image:
    """The decoded image, as its array says; Unusable if the file holds none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            # A palette is looked up here: it may lack colours that the image asks for.
            return image.convert("RGBA") if image.mode == "P" else image
    # Whatever a file makes a decoder raise: OSError, SyntaxError, struct.error, and more. PIL refuses one, too, that
    # would fill the memory.
    except Exception as error:
        raise Unusable(name, "not a sound image" if isinstance(error, UnidentifiedImageError) else error) from error


# ---------------------------------------------------------------------------------------------------------------------
# One image: what a person would see, as numbers
# ---------------------------------------------------------------------------------------------------------------------


def as_shown(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it. The array alone may lie on its side, or hold colours that nobody sees."""
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # EXIF that cannot be read does not turn the image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey: convert() would make all above 255 white
        grey = np.asarray(image)
        hidden = grey == image.info.get("transparency", -1)  # the grey that stands for no colour, if there is one
        image = Image.fromarray(np.where(hidden, 255, grey >> 8).astype(np.uint8))
    if image.has_transparency_data:  # below alpha lies any colour; on a plain white ground it does not show
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile:  # the numbers mean another colour space than sRGB, as a phone's or a printer's do
        with contextlib.suppress(ImageCms.PyCMSError):  # a profile that is broken, or made for another mode
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre_square(image: Image.Image, resolution: int) -> Tensor:
    """The middle of the longer side, as shown, resized by LANCZOS: uint8 (3, R, R)."""
    image, side = as_shown(image), min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return to_tensor(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


def to_range(pixels: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1], the range that image models are trained on."""
    return pixels.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Images by class
# ---------------------------------------------------------------------------------------------------------------------

# How people name their splits: training, Test, valid, test_images, seg_test, trainA. (But a bullet_train is a class.)
SPLIT = re.compile(
    r"(train(ing)?|(.*[-_ ])?(test(ing)?|val(id(ation)?)?|dev|eval))([-_ ]?(set|data|images|split|[ab]))?\d*", re.I
)


def split_folder(folder: str | Path, split: str) -> Path:
    """`folder/split`; for the train split of a folder without splits, the folder itself.

    BadInput rather than another split: test images that were trained on make any model look better than it is.
    """
    folder, root = Path(folder), Path(folder, split)
    if split != "train" or not folder.is_dir():
        refuse(not root.is_dir(), f"no such folder: {root}")
        return root
    inside = {file.relative_to(folder).parts[:-1] for file in files_below(folder, *EXTENSIONS)}
    if root.is_dir():
        beside = sorted({parts[0] for parts in inside if parts} - {"train"})
        classes = beside and not any(map(SPLIT.fullmatch, beside))
        refuse(classes, f"{folder} has train beside {', '.join(beside[:3])}: classes must lie together in {root}")
        within = {parts[1] for parts in inside if parts[:1] == ("train",) and len(parts) > 1}
        nested = within and all(map(SPLIT.fullmatch, within))
        refuse(nested, f"{root} holds splits, {', '.join(sorted(within))}: it is to hold classes")
        return root
    others = sorted({part for parts in inside for part in parts if SPLIT.fullmatch(part)})
    refuse(others, f"{folder} has the folders {', '.join(others)}: what is to be trained on must be in {root}")
    return folder


def images_by_class(folder: str | Path, split: str) -> list[tuple[Path | Image.Image, str]]:
    """The images of a split, each with its class: the first folder below the split, or "" if there is none.

    A folder named cifar10, or cifar10_..., that holds no images is filled by torchvision.
    """
    if re.match("cifar10(?!0)", Path(folder).name) and not files_below(Path(folder), *EXTENSIONS):
        from torchvision.datasets import CIFAR10  # takes a second, and few need it

        cifar = CIFAR10(folder, train=split == "train", download=True)
        return [(Image.fromarray(x), cifar.classes[y]) for x, y in zip(cifar.data, cifar.targets, strict=True)]
    root = split_folder(folder, split)
    files = files_below(root, *EXTENSIONS)
    refuse(not files, f"no images ({', '.join(EXTENSIONS)}) in {root}")
    names = ("" if file.parent == root else file.relative_to(root).parts[0] for file in files)
    return [(file, unicodedata.normalize("NFC", name)) for file, name in zip(files, names, strict=True)]


class ImageFiles:
    """Images as centre squares, read when they are asked for: for sets that exceed memory.

    Without a resolution they must be squares of one size already, which then is the resolution.
    """

    def __init__(self, images: Iterable[Path | Image.Image], resolution: int | None):
        self.images, self.resolution, self.skipped = list(images), resolution, Skipped()
        self.alike = resolution is None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | Iterable[int]) -> Tensor:
        """uint8 (B, 3, R, R), without the broken ones among them."""
        squares = list(self.skipped.usable(self._square, (self.images[i] for i in indices)))
        self.skipped.tell(f"{len(self)} images")
        return torch.stack(squares) if squares else torch.empty(0, 3, *[self.resolution or 0] * 2, dtype=torch.uint8)

    def _square(self, file: Path | Image.Image) -> Tensor:
        image = file if isinstance(file, Image.Image) else open_image(file, file)
        size = self.resolution = self.resolution or image.width
        wrong = self.alike and image.size != (size, size)
        refuse(wrong, f"{file} is {image.width}x{image.height} pixels, expected {size}x{size}")
        return centre_square(image, size)


class Images(Dataset):
    """Images in memory, uint8 (n, 3, H, W), with their classes. With `mirror` each image is there twice: item i + n is
    the mirror image of item i."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: list[str], mirror: bool = False):
        self.samples, self.labels, self.classes, self.mirror = pixels, labels, classes, mirror

    def __len__(self) -> int:
        return len(self.samples) * (2 if self.mirror else 1)

    def __getitem__(self, indices: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        """A whole batch at once: x_0 (B, 3, H, W) in [-1, 1] and labels (B,)."""
        index = torch.as_tensor(indices)
        i = index % len(self.samples)
        x = to_range(self.samples[i])
        return torch.where((index >= len(self.samples)).view(-1, 1, 1, 1), x.flip(3), x), self.labels[i]


@functools.cache  # the laboratory asks again and again
def load_images(folder: str, split: str = "train", resolution: int | None = None, mirror: bool = False) -> Images:
    """All images of a split, in memory: as centre squares of `resolution`, or as they are.

    BadInput if none is readable; for images of no class; and for several sizes where no resolution is given.
    """
    chosen = images_by_class(folder, split)
    images, names = zip(*chosen, strict=True)
    # A class's number is its place in the alphabet of the train split, whichever classes another split lacks.
    trained_on = chosen if split == "train" else images_by_class(folder, "train")
    classes = sorted({name for _, name in trained_on if name}) or [""]
    outside = [str(file) for file, name in zip(images, names, strict=True) if name not in classes]
    refuse(outside, f"{len(outside)} images lie in no class of the train split, such as {outside[:1]}")
    files = ImageFiles(images, resolution)
    samples = files[tqdm(range(len(files)), desc=f"images {folder}", unit="img", leave=False, mininterval=1)]
    refuse(not len(samples), f"no readable images in {folder}: all {len(files)} are broken")
    labels = [classes.index(name) for file, name in zip(images, names, strict=True) if str(file) not in files.skipped]
    return Images(samples, torch.tensor(labels), classes, mirror)


def reference_set(data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
    """All of a split, to be measured against: points (n, 2), or uint8 images of that resolution."""
    if data.startswith(POINTS):
        return Points(data, split).samples
    refuse(".tar" in data and not Path(data).is_dir(), f"{data} is no folder of images to measure against: --data")
    return ImageFiles([image for image, _ in images_by_class(data, split)], resolution)


# ---------------------------------------------------------------------------------------------------------------------
# Images with captions
# ---------------------------------------------------------------------------------------------------------------------

REMOTE = ("http://", "https://", "hf://", "gs://")  # what webdataset reads from afar; a pipe: would run a shell command
PAIR = (
    "a pair is 0.jpg, .jpeg, .png or .webp with 0.txt, or with 0.json or a line of metadata.jsonl whose key text or"
    " caption holds it; in a shard, next to each other and with no other dot in their names"
)
SHARDS = "shards are '{00000..00099}.tar', 'FOLDER/*.tar' or URLs of such; a data set of the Hub must be here first: "
HUB = "hf download NAME --repo-type dataset --local-dir FOLDER"


def read_text(content: bytes) -> str:
    """Text of the encodings that editors write: UTF-8 and UTF-16, with and without a BOM, else Windows' own."""
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode(json.detect_encoding(content))
    warn_of_a_guess()
    return content.decode("cp1252", errors="replace")


@functools.cache  # once
def warn_of_a_guess() -> None:
    """An older encoding does not tell which it is."""
    log.warning("a text is not UTF-8: it is taken for Windows' western alphabet, and is garbled if it is of another")


def read_facts(content: str | bytes) -> dict:
    """What is known of an image, as img2dataset writes it: a JSON object. Nothing, if that is broken."""
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(content)
        return facts if isinstance(facts, dict) else {}
    return {}


def plain_name(path: Path) -> str:
    """A path without its last ending, the same for names that look alike to a person: é is spelt in two ways."""
    return unicodedata.normalize("NFC", str(path.with_suffix("")))


def pairs_in_folder(root: Path, metadata: Iterable[Path]) -> dict[str, dict[str, Path | bytes]]:
    """Files of one name and different endings, as webdataset has it: {"cat": {"jpg": file, "txt": file}, ...}.

    A line of metadata.jsonl, as Hugging Face has it, stands for a json. BadInput for a line that is none.
    """
    pairs = {}
    for file in files_below(root, *EXTENSIONS, ".txt", ".json"):
        pairs.setdefault(plain_name(file), {})[file.suffix[1:].lower()] = file
    for file in filter(Path.is_file, metadata):
        lines = enumerate(read_text(file.read_bytes()).split("\n"), start=1)
        for i, line in [(i, line) for i, line in lines if line.strip()]:
            name = read_facts(line).get("file_name")
            refuse(not isinstance(name, str), f'{file}, line {i} is not {{"file_name": "0.jpg", "text": "a caption"}}')
            pairs.setdefault(plain_name(file.parent / name.replace("\\", "/")), {})["json"] = line.encode()
    return pairs


def shard_urls(data: str) -> list[str]:
    """The tar files of a pattern: {000..999}, * and :: are expanded here, and what is a local file must exist."""
    from webdataset.shardlists import expand_urls  # webdataset takes a second, and few need it

    shards = []
    for url in by_library(expand_urls, data):
        there = url.startswith(REMOTE) or os.path.isfile(url)
        found = [url] if there else sorted(filter(os.path.isfile, glob.glob(url)))
        refuse(not found, f"no such folder or shard: {url} ({SHARDS}{HUB})")
        shards += found
    return shards


def shuffled(seed: int, samples: Iterator[dict]) -> Iterator[dict]:
    """Samples in another order: 1,000 of them wait, undecoded and small, and the next one is drawn from these.

    Each of a loader's workers has an order of its own. Else those that read the same shard would show the same.
    """
    from webdataset.filters import shuffle

    worker = get_worker_info()
    return shuffle(1000, seed=f"{seed} {worker.id if worker else 0}")(samples)


class Captions:
    """Images with captions: webdataset's tar files, as img2dataset writes them, a folder of such, or one of images.

    Each image of a folder is taken for a shard of one sample. So all that follows is the same for both: a sample is
    {"jpg": bytes, "txt": bytes, "json": bytes}.
    """

    def __init__(self, data: str, resolution: int, min_image_size: int = 0, max_pwatermark: float = 1.0):
        # Wanted are images whose original has a shorter side of `min_image_size` pixels or more, and a watermark by no
        # more than this probability, which is LAION's estimate.
        self.data, self.resolution = data, resolution
        self.min_image_size, self.max_pwatermark = min_image_size, max_pwatermark
        self.skipped, self.files, self.in_vain = Skipped(), {}, 0
        self.shards = self._of_folder() if os.path.isdir(data) else shard_urls(data)
        # A few pairs are read at once. If none is usable, a run must not begin; what is not, its owner wants to know.
        pairs = self.skipped.usable(self.pair, self.samples({"url": url} for url in self.shards))
        usable = sum(1 for _ in itertools.islice(pairs, 32))
        refuse(not usable, f"no usable pair in {data}: {self.skipped}. {PAIR}")
        self.skipped.tell(data)

    def _of_folder(self) -> list[str]:
        """The names of the folder's pairs, whose files are kept; or its tar files, if it holds no pairs."""
        root = split_folder(self.data, "train")
        pairs = pairs_in_folder(root, {root / "metadata.jsonl", Path(self.data, "metadata.jsonl")})
        tars = files_below(root, ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
        if tars:  # beside which img2dataset leaves 00000_stats.json and the like
            images = files_below(root, *EXTENSIONS)
            refuse(images, f"{root} holds shards, and images such as {images[:1]}: they must lie in two folders")
            return [str(tar) for tar in tars]
        self.files = {name: files for name, files in pairs.items() if len(files) > 1}
        # What stands alone is named at once, however many are drawn before it.
        for name in sorted(pairs.keys() - self.files.keys()):
            self.skipped.add(name, "no caption" if f".{[*pairs[name]][0]}" in EXTENSIONS else "no image")
        return list(self.files)

    def samples(self, shards: Iterable[dict[str, str]]) -> Iterator[dict]:
        """The samples of {"url": shard}, ..., one shard after the other."""
        from webdataset.tariterators import tarfile_samples

        for shard in shards:
            url = shard["url"]
            # If one shard is good, it is drawn before this; else the stream would search for ever.
            self.in_vain += 1
            refuse(self.in_vain > 1000 + 20 * len(self.shards), f"{self.data} has nothing usable any more")
            if url not in self.files:
                # One at a time: else the last sample of a torn shard would go on in the next.
                torn = functools.partial(self.skipped.add, url)
                yield from tarfile_samples([shard], torn, lambda name: not LEFT_BEHIND.search(name))
                continue
            sample = {"__url__": Path(url).parent, "__key__": Path(url).name}
            for ending, file in self.files[url].items():
                with contextlib.suppress(OSError):  # a file that is gone is one that was never there
                    sample[ending] = file if isinstance(file, bytes) else file.read_bytes()
            yield sample

    def pair(self, sample: dict) -> tuple[Tensor, str]:
        """uint8 pixels (3, R, R) and caption. Unusable if the sample lacks one of them, or is not wanted."""
        name = f"{sample['__url__']}/{sample['__key__']}"
        facts = read_facts(sample.get("json", b"{}"))
        texts = [read_text(sample.get("txt", b"")), facts.get("text"), facts.get("caption")]
        captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        files = [sample[key] for key in sample if f".{key}" in EXTENSIONS]
        if len(files) != 1 or not captions:
            raise Unusable(name, "no caption" if len(files) == 1 else "several images" if files else "no image")
        image = open_image(io.BytesIO(files[0]), name)
        # img2dataset may have made the file smaller than the original was; what counts is the original.
        known = {fact: value for fact, value in facts.items() if isinstance(value, int | float)}
        sides = known.get("original_width") or image.width, known.get("original_height") or image.height
        if min(sides) < self.min_image_size or known.get("pwatermark", 0) > self.max_pwatermark:
            raise Unusable(sample["__url__"], "some are filtered")  # once a shard: of billions no name is kept
        self.in_vain = 0
        # Not mirrored, unlike images by class: a caption may say left and right. Half of a character, which JSON can
        # hold, would end a tokenizer.
        return centre_square(image, self.resolution), captions[0].encode(errors="replace").decode()

    def batches(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> IterableDataset:
        """Batches without end for process `rank` of `world`, for DataLoader(batch_size=None): uint8 pixels
        (B, 3, R, R) and B captions. A function of these numbers, and of how many workers the loader has."""
        import webdataset as wds

        # Each process draws shards by a seed of its own, and so does each of its workers, whose number webdataset adds.
        seed = int(np.random.SeedSequence((seed, rank, world)).generate_state(1)[0])
        return wds.DataPipeline(
            wds.ResampledShards(self.shards, seed=seed, deterministic=True),
            self.samples,
            functools.partial(shuffled, seed),
            functools.partial(self.skipped.usable, self.pair),
            wds.batched(batch_size, self._batch),
        )

    def _batch(self, pairs: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
        # In a loader's process the log goes to stderr too, and each process has a count of its own.
        self.skipped.tell(self.data)
        pixels, captions = zip(*pairs, strict=True)
        return torch.stack(pixels), list(captions)
