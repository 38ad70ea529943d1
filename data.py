"""Where images come from, in what order they are drawn, and how unusable input is refused."""

import bisect
import functools
import io
import itertools
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
import webdataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm
from webdataset.shardlists import expand_urls

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


def load_images(folder: str, split: str = "train", resolution: int | None = None, mirror: bool = False) -> Images:
    """All images below `folder/split/<class>/`; below `folder` itself for the train split of a folder without splits.

    A folder named cifar10* that holds no images is filled by torchvision's download (which checks the archive's md5
    before it opens it). Broken files are skipped, named in the log, and counted. The images must be square and all of
    one size, `resolution` where it is given.
    """
    root = Path(folder) / split
    if split == "train" and not root.is_dir():
        root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files and Path(folder).name.startswith("cifar10"):
        return _torchvision_cifar10(folder, split, mirror)
    if not files:
        raise BadInput(f"no images in {root}" if root.is_dir() else f"no such folder: {root}")
    classes = sorted({path.parent.name for path in files})
    pixels, labels, broken = [], [], 0
    for path in tqdm(files, desc=f"images {root}", unit="img", leave=False, mininterval=1):
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files, by format
            log.warning("skipped %s: %s", path, error)
            broken += 1
            continue
        size = resolution or (pixels[0].shape[0] if pixels else array.shape[0])
        if array.shape != (size, size, 3):
            raise BadInput(f"{path} is {array.shape[1]}x{array.shape[0]} pixels, expected {size}x{size}")
        pixels.append(array)
        labels.append(classes.index(path.parent.name))
    if broken:
        log.warning("skipped %d broken of %d files in %s", broken, len(files), root)
    if not pixels:
        raise BadInput(f"no readable images in {root}: all {broken} are broken")
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels), classes, mirror)


def _torchvision_cifar10(folder: str, split: str, mirror: bool) -> Images:
    try:
        cifar = torchvision.datasets.CIFAR10(folder, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"no images in {folder}, and CIFAR-10 could not be downloaded: {error}") from None
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
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


# -- images with captions ---------------------------------------------------------------------------------------------

Batches = Iterator[tuple[Tensor, Tensor]]  # pixels (B, 3, R, R) in [-1, 1] and tokens (B, L)


class PairOptions(NamedTuple):
    """The size that images get, and which pairs are wanted at all."""

    resolution: int
    min_image_size: int = 0
    max_pwatermark: float = 1.0


class Unusable(Exception):
    """A pair that is whole but is not used; the text says why, in the words of the final count."""


def centre_square(image: Image.Image, resolution: int) -> Tensor:
    """The smaller side resized to `resolution`, the middle of the larger one. Only the square itself is computed.

    Never mirrored: captions may say left and right.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    pixels = image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS, square)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def read_pair(sample: dict, options: PairOptions) -> tuple[Tensor, str]:
    """Pixels and caption of a sample as webdataset has it: {"jpg": bytes, "txt": bytes, "json": bytes}, say."""
    facts = json.loads(sample.get("json", "{}"))
    caption = sample["txt"].decode(errors="replace") if "txt" in sample else facts.get("text") or facts.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("without caption")
    file = next((sample[key] for key in sample if f".{key}" in EXTENSIONS), b"")
    # Only the formats that the names promise: PIL hands PostScript, for one, to an interpreter.
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=["JPEG", "PNG", "WEBP"]) as image:
        original = facts.get("original_width"), facts.get("original_height")
        small = min(original if all(original) else image.size) < options.min_image_size
        if small or (facts.get("pwatermark") or 0) > options.max_pwatermark:
            raise Unusable("filtered")
        return centre_square(image, options.resolution), caption.strip()


class Pairs:
    """What both sources of pairs do: samples become batches; the unusable are skipped, counted and named in the log."""

    def __init__(self, data: str, options: PairOptions, tokenize: Callable[[list[str]], Tensor]):
        self.data, self.options, self.tokenize, self.counts = data, options, tokenize, Counter()

    def skip(self, name: str, error: Exception) -> bool:
        """True tells webdataset to go on. The filtered may be very many: only powers of two are logged."""
        kind = str(error) if isinstance(error, Unusable) else "broken"
        self.counts[kind] += 1
        if kind != "filtered" or self.counts[kind].bit_count() == 1:
            log.warning("skipped %s: %s (%d %s so far)", name, error, self.counts[kind], kind)
        return True

    def usable(self, samples: Iterable[dict]) -> Iterator[tuple[Tensor, str]]:
        for sample in samples:
            self.counts["members"] += 1
            try:
                pair = read_pair(sample, self.options)
            except Exception as error:  # nothing that lies in a file from the web may end a run
                self.skip(f"{sample['__url__']}/{sample['__key__']}", error)
            else:
                self.counts["usable"] += 1
                yield pair

    def first(self, samples: Iterable[dict]) -> tuple[Tensor, str]:
        for pair in self.usable(samples):
            return pair
        kinds = ", ".join(f"{self.counts[kind]} {kind}" for kind in ("members", "broken", "without caption", "filtered"))
        raise BadInput(f"no usable image-caption pairs in {self.data}: {kinds}")

    def probe(self, samples: Iterable[dict]) -> None:
        """Refuses what holds no usable pair at all. DataLoader's processes could not say it in one line."""
        self.counts.clear()
        self.first(samples)
        self.counts.clear()

    def batched(self, pairs: Iterator[tuple[Tensor, str]], size: int = 64) -> Batches:
        while batch := list(itertools.islice(pairs, size)):
            pixels, captions = zip(*batch, strict=True)
            yield torch.stack(pixels), self.tokenize(list(captions))


class CaptionFolder(Pairs, Dataset):
    """Images below a folder. A caption is a line of its metadata.jsonl, as Hugging Face has it, or a .txt beside."""

    def __init__(self, data: str, options: PairOptions, tokenize: Callable[[list[str]], Tensor]):
        super().__init__(data, options, tokenize)
        root, self.samples = Path(data), []
        if not root.is_dir():
            raise BadInput(f"no such folder: {root}")
        metadata = self.metadata(root / "metadata.jsonl")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
        for path in files:
            name, text = path.relative_to(root), path.with_suffix(".txt")
            if name in metadata or text.is_file():
                caption = {"json": metadata[name]} if name in metadata else {"txt": text.read_bytes()}
                sample = {"__url__": root, "__key__": name, path.suffix[1:].lower(): path, **caption}
                self.samples.append(sample)
        if not files:
            raise BadInput(f"no images in {root}")
        if not self.samples:
            raise BadInput(f"no captions in {root}: expected 0.txt beside 0.jpg, and so on, or a metadata.jsonl")
        if len(self) < len(files):
            log.warning("left out %d of %d images in %s: without caption", len(files) - len(self), len(files), root)
        self.probe(self.samples)

    @staticmethod
    def metadata(file: Path) -> dict[Path, bytes]:
        """Each image's line."""
        lines = {}
        for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
            try:
                row = json.loads(line)
                name, _ = row["file_name"], row["text" if "text" in row else "caption"]
                lines[Path(name)] = line
            except (ValueError, TypeError, KeyError):
                raise BadInput(f'{file}, line {number} is not {{"file_name": "0.jpg", "text": "a caption"}}') from None
        return lines

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once. The next usable pair stands in for one that is not."""
        n = len(self)
        return next(self.batched(self.first(self.samples[(i + k) % n] for k in range(n)) for i in indices), n)

    def parts(self) -> list[tuple[str, Callable[[], Batches]]]:
        """Pieces that can be encoded one by one: 1024 images each."""
        slices = [self.samples[i : i + 1024] for i in range(0, len(self), 1024)]
        return [(f"{i:05d}", lambda part=part: self.batched(self.usable(part))) for i, part in enumerate(slices)]


class Shards(Pairs, IterableDataset):
    """webdataset's tar files, as img2dataset writes them: 0.jpg with 0.txt, or with 0.json that holds a caption."""

    def __init__(self, data: str, options: PairOptions, tokenize: Callable[[list[str]], Tensor]):
        super().__init__(data, options, tokenize)
        try:
            self.urls = expand_urls(data)
        except (AssertionError, ValueError) as error:  # unbalanced braces, unknown variables
            raise BadInput(f"{data}: {error}") from None
        for url in self.urls:
            if "://" not in url and not url.startswith("pipe:") and not os.path.isfile(url):
                raise BadInput(f"no such shard: {url}")
        self.probe(self.samples(self.urls))

    def samples(self, urls: list[str]) -> Iterator[dict]:
        for url in urls:  # one at a time, so that the torn end of one cannot mix with the next
            go_on = functools.partial(self.skip, url)
            yield from webdataset.tarfile_to_samples(handler=go_on)([{"url": url}])

    def parts(self) -> list[tuple[str, Callable[[], Batches]]]:
        """Pieces that can be encoded one by one: a shard each."""
        names = (re.sub(r"[^\w-]", "_", Path(url).stem) for url in self.urls)
        return [
            (f"{i:05d}-{name}", lambda url=url: self.batched(self.usable(self.samples([url]))))
            for i, (name, url) in enumerate(zip(names, self.urls, strict=True))
        ]

    def check_readers(self, readers: int) -> None:
        if len(self.urls) < readers:
            raise BadInput(
                f"{len(self.urls)} shards in {self.data} cannot be shared by {readers} readers: "
                "processes times --dataloader_num_workers must not be more than the shards"
            )

    def batches(self, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> IterableDataset:
        """Batches without end, for DataLoader(batch_size=None).

        A stream cannot skip to its `start`-th batch without reading all before. So `start` is part of the seed, and a
        resumed run goes on in a new order.
        """
        return ShardBatches(self, batch_size, f"{seed} {start}", rank, world)


class ShardBatches(IterableDataset):
    """In each epoch the shards are dealt out anew to the readers: DataLoader's workers in each process of the run."""

    def __init__(self, shards: Shards, batch_size: int, seed: str, rank: int, world: int):
        self.shards, self.batch_size, self.seed, self.rank, self.world = shards, batch_size, seed, rank, world

    def __iter__(self) -> Batches:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        self.shards.check_readers(self.world * workers)
        pairs = self.pairs(self.rank * workers + worker, self.world * workers)
        return self.shards.batched(pairs, self.batch_size)

    def pairs(self, reader: int, readers: int) -> Iterator[tuple[Tensor, str]]:
        shards = self.shards
        for epoch in itertools.count():
            urls = random.Random(f"{self.seed} {epoch}").sample(shards.urls, len(shards.urls))  # alike for all readers
            shuffle = webdataset.shuffle(1000, rng=random.Random(f"{self.seed} {epoch} {reader}"))  # of files, not pixels
            before = shards.counts["usable"]
            yield from shards.usable(shuffle(shards.samples(urls[reader::readers])))
            if shards.counts["usable"] == before:  # bad luck if other shards have some: the next epoch's deal differs
                shards.probe(shards.samples(shards.urls))


def load_pairs(data: str, options: PairOptions, tokenize: Callable[[list[str]], Tensor]) -> CaptionFolder | Shards:
    """Image-caption pairs of shards (paths or urls of tar files, with braces, joined by ::) or of a folder."""
    shards = ".tar" in data and not os.path.isdir(data)
    return (Shards if shards else CaptionFolder)(data, options, tokenize)


# -- the cache of encoded pairs ---------------------------------------------------------------------------------------


def cache_pairs(
    dataset: CaptionFolder | Shards,
    folder: str,
    made_from: dict,
    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    rank: int,
    world: int,
) -> None:
    """Encodes each part once, into a file of its own; those that an interrupted run left are kept.

    Process `rank` does its share only: wait for the others before reading.
    """
    target, parts = writable_folder(folder), dataset.parts()
    index, wanted = target / "cache.json", {**made_from, "parts": [name for name, _ in parts]}
    if index.is_file():
        there = json.loads(index.read_text())
        differing = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {there.get(key)}, not {wanted.get(key)}" for key in differing if key != "parts")
            raise BadInput(f"--cache_latents {folder} was made from {pairs or 'other parts'}: another folder please")
    elif rank == 0:
        draft = target / "cache.json.tmp"
        draft.write_text(json.dumps(wanted, indent=2))
        draft.rename(index)
    for name, read in tqdm(parts[rank::world], desc="encoding", unit="part", mininterval=1, disable=rank != 0):
        final, draft = target / f"{name}.safetensors", target / f"{name}.tmp"
        if not final.exists():
            encoded = [[tensor.cpu() for tensor in encode(*batch)] for batch in read()]
            empty = [[torch.empty(0), torch.empty(0)]]  # of a part without usable pairs
            x0, cond = (torch.cat(tensors) for tensors in zip(*encoded or empty, strict=True))
            save_file({"x0": x0, "cond": cond}, draft)
            draft.rename(final)


class CachedLatents(Dataset):
    """What `cache_pairs` wrote, read row by row, since it may exceed memory. No file stays open: there may be many."""

    def __init__(self, folder: str):
        index = Path(folder) / "cache.json"
        if not index.is_file():
            raise BadInput(f"no cached latents in {folder}")
        self.files = [Path(folder) / f"{name}.safetensors" for name in json.loads(index.read_text())["parts"]]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise BadInput(f"{folder} lacks {len(missing)} of {len(self.files)} parts: {missing[0]} is the first")
        self.ends = []  # of each part's rows in the whole
        for file in self.files:
            with safe_open(file, "pt") as part:
                self.ends.append(part.get_slice("x0").get_shape()[0] + (self.ends[-1] if self.ends else 0))

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        which = bisect.bisect_right(self.ends, index)
        with safe_open(self.files[which], "pt") as part:
            row = index - self.ends[which]  # from the end, hence negative
            return part.get_slice("x0")[row], part.get_slice("cond")[row]

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        x0, cond = zip(*map(self.row, indices), strict=True)
        return torch.stack(x0), torch.stack(cond)
