"""Images with captions: a folder, or webdataset shards as img2dataset writes them; and a cache of their latents.

Both sources give whole batches (pixels (B, 3, R, R) in [-1, 1], tokens (B, L)), and skip and count what is unusable.
"""

import functools
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from data import EXTENSIONS, BadInput, writable_folder

log = logging.getLogger("pairs")
SHUFFLE_BUFFER = 1000  # samples, of each reading process


class PairOptions(NamedTuple):
    resolution: int
    min_image_size: int = 0
    max_pwatermark: float = 1.0


Tokenize = Callable[[list[str]], Tensor]
Pair = tuple[Tensor, str]


class Unusable(Exception):
    """A pair that is skipped, and why, in a word."""


def prepare(image: Image.Image, caption: str | None, meta: dict, options: PairOptions) -> Pair:
    """The smaller side resized to the resolution, the centre cut out. No mirroring: captions may say "left"."""
    if not caption or not caption.strip():
        raise Unusable("without caption")
    sizes = meta.get("original_width") or image.width, meta.get("original_height") or image.height
    if min(sizes) < options.min_image_size or (meta.get("pwatermark") or 0) > options.max_pwatermark:
        raise Unusable("filtered")
    square = ImageOps.fit(image.convert("RGB"), (options.resolution,) * 2, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1, caption.strip()


BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL and json raise, by format


def collate(pairs: list[Pair], tokenize: Tokenize) -> tuple[Tensor, Tensor]:
    pixels, captions = zip(*pairs, strict=True)
    return torch.stack(pixels), tokenize(list(captions))


def batches_of(pairs: Iterable[Pair], size: int, tokenize: Tokenize) -> Iterator[tuple[Tensor, Tensor]]:
    batch = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield collate(batch, tokenize)
            batch = []
    if batch:
        yield collate(batch, tokenize)


Part = tuple[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]]


class CaptionFolder(Dataset):
    """Images with `name.txt` beside each, or one `metadata.jsonl` with file_name and text (or caption)."""

    def __init__(self, folder: str, options: PairOptions, tokenize: Tokenize):
        self.options, self.tokenize, root = options, tokenize, Path(folder)
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise BadInput(f"no images in {root}" if root.is_dir() else f"no such folder: {root}")
        told = self._metadata(root / "metadata.jsonl")
        self.pairs = []
        for path in files:
            beside = path.with_suffix(".txt")
            text = told.get(path) or (beside.read_text(errors="replace") if beside.is_file() else "")
            if text.strip():
                self.pairs.append((path, text))
        if not self.pairs:
            raise BadInput(f"no captions in {root}: give each image a .txt beside it, or the folder a metadata.jsonl")
        if len(self.pairs) < len(files):
            log.warning(
                "left out %d of %d images in %s, without caption", len(files) - len(self.pairs), len(files), root
            )

    @staticmethod
    def _metadata(file: Path) -> dict[Path, str]:
        told = {}
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), 1):
            try:
                row = json.loads(line)
                told[file.parent / row["file_name"]] = row.get("text") or row.get("caption") or ""
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f"{file}, line {number}: no JSON object with file_name and text") from None
        return told

    def __len__(self) -> int:
        return len(self.pairs)

    def _pair(self, index: int) -> Pair | None:
        path, text = self.pairs[index]
        try:
            with Image.open(path) as image:
                return prepare(image, text, {}, self.options)
        except Unusable:
            return None
        except BROKEN as error:
            log.warning("skipped %s: %s", path, error)
            return None

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """An unusable image's place is taken by the next usable one."""
        return collate([self._usable(index) for index in indices], self.tokenize)

    def _usable(self, index: int) -> Pair:
        found = (self._pair((index + i) % len(self)) for i in range(len(self)))
        pair = next((pair for pair in found if pair is not None), None)
        if pair is None:
            raise BadInput("no image is readable and passes the filters")
        return pair

    def parts(self) -> list[Part]:
        def read(first: int) -> Iterator[tuple[Tensor, Tensor]]:
            found = (self._pair(i) for i in range(first, min(first + 1024, len(self))))
            return batches_of((pair for pair in found if pair is not None), 64, self.tokenize)

        return [(f"{i:05d}", functools.partial(read, 1024 * i)) for i in range((len(self) + 1023) // 1024)]


class Shards:
    """webdataset shards: jpg, png or webp with txt, or with json that holds a caption."""

    def __init__(self, pattern: str, options: PairOptions, tokenize: Tokenize):
        self.pattern, self.options, self.tokenize = pattern, options, tokenize
        self.urls: list[str] = webdataset.shardlists.expand_urls(pattern)
        missing = [url for url in self.urls if ":" not in url and not Path(url).is_file()]
        if missing:
            raise BadInput(f"no such shard: {missing[0]} ({len(missing)} of {len(self.urls)} in {pattern})")
        self.counts: Counter = Counter()  # members seen by this process, and why some were skipped
        if next(self._pairs(self.urls), None) is None:
            counts = ", ".join(f"{n} {what}" for what, n in self.counts.items()) or "no members"
            raise BadInput(f"no usable images with captions in {pattern}: {counts}")

    def _skip(self, where: str, why: str | Exception) -> bool:
        self.counts["broken" if isinstance(why, Exception) else why] += 1
        if why != "filtered":
            log.warning("skipped %s: %s (so far: %s)", where, why, dict(self.counts))
        return True  # to webdataset: go on

    def _pairs(self, urls: list[str]) -> Iterator[Pair]:
        """Every usable pair of these shards, in order."""
        source = ({"url": url} for url in urls)
        members = webdataset.tarfile_samples(source, handler=lambda error: self._skip("a shard's end", error))
        for member in members:
            self.counts["members"] += 1
            where = f"{member['__url__']}: {member['__key__']}"
            try:
                encoded = next((member[e] for e in ("jpg", "jpeg", "png", "webp") if e in member), None)
                meta = json.loads(member.get("json", b"{}"))
                caption = member["txt"].decode(errors="replace") if "txt" in member else meta.get("caption")
                if encoded is None:
                    raise ValueError("no image")
                with Image.open(io.BytesIO(encoded)) as image:
                    yield prepare(image, caption, meta, self.options)
            except Unusable as reason:
                self._skip(where, str(reason))
            except BROKEN as error:
                self._skip(where, error)

    def batches(self, batch_size: int, seed: int, start: int, rank: int, world: int) -> IterableDataset:
        """An endless stream of batches for process `rank` of `world`, each of whose workers reads shards of its own.

        A stream cannot skip the `start` batches that an earlier run took, so `start` goes into the seed: a resumed run
        continues in another order. (A cache continues exactly.)
        """
        return _Stream(self, batch_size, f"{seed} {start}", rank, world)

    def parts(self) -> list[Part]:
        def read(url: str) -> Iterator[tuple[Tensor, Tensor]]:
            return batches_of(self._pairs([url]), 64, self.tokenize)

        return [(f"{i:05d}", functools.partial(read, url)) for i, url in enumerate(self.urls)]


class _Stream(IterableDataset):
    def __init__(self, shards: Shards, batch_size: int, seed: str, rank: int, world: int):
        self.shards, self.batch_size, self.seed, self.rank, self.world = shards, batch_size, seed, rank, world

    def _epochs(self) -> Iterator[Pair]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.world * workers, self.rank * workers + number
        if len(self.shards.urls) < readers:
            raise BadInput(
                f"{len(self.shards.urls)} shards cannot be split over {readers} readers (processes x workers)"
            )
        epoch = 0
        while True:
            urls = list(self.shards.urls)
            random.Random(f"{self.seed} {epoch}").shuffle(
                urls
            )  # the same for all readers, so their shares are disjoint
            before = self.shards.counts["members"]
            buffer = random.Random(f"{self.seed} {epoch} {reader}")
            pairs = self.shards._pairs(urls[reader::readers])
            yield from webdataset.filters.shuffle(bufsize=SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=buffer)(pairs)
            if self.shards.counts["members"] == before:
                raise BadInput(f"the shards of reader {reader} of {self.shards.pattern} are empty")
            epoch += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches_of(self._epochs(), self.batch_size, self.shards.tokenize)


def load_pairs(data: str, options: PairOptions, tokenize: Tokenize) -> CaptionFolder | Shards:
    return (Shards if data.endswith(".tar") else CaptionFolder)(data, options, tokenize)


# ---------------------------------------------------------------------------------------------------------------------
# The cache: encode once, train from there
# ---------------------------------------------------------------------------------------------------------------------


def cache_pairs(
    pairs: CaptionFolder | Shards, folder: str, made_from: dict, encode: Callable, rank: int, world: int
) -> None:
    """Encodes every part into folder/<part>.safetensors, renamed into place: what exists is not made again."""
    root, parts = writable_folder(folder), pairs.parts()
    record = {**made_from, "parts": len(parts)}
    if (root / "cache.json").is_file():
        there = json.loads((root / "cache.json").read_text())
        differing = [key for key in sorted({*there, *record}) if there.get(key) != record.get(key)]
        if differing:
            words = ", ".join(f"{key} was {there.get(key)} and is {record.get(key)}" for key in differing)
            raise BadInput(f"--cache_latents {folder} was made otherwise ({words}): another folder please")
    elif rank == 0:
        (root / "cache.json.tmp").write_text(json.dumps(record, indent=2))
        (root / "cache.json.tmp").rename(root / "cache.json")
    todo = [part for part in parts[rank::world] if not (root / f"{part[0]}.safetensors").is_file()]
    for name, read in tqdm(todo, desc="latents", unit="part", disable=rank != 0 or not todo, leave=False):
        encoded = [encode(*batch) for batch in read()]
        columns = [torch.cat(column).contiguous() for column in zip(*encoded, strict=True)]
        draft = root / f"{name}.safetensors.tmp"
        save_file(dict(zip(("x0", "cond"), columns, strict=False)), draft)  # no tensors where nothing was usable
        draft.rename(root / f"{name}.safetensors")


class CachedLatents(Dataset):
    """(x_0, caption embedding) from a cache. Rows are read from disk when asked for: it may be larger than memory."""

    def __init__(self, folder: str):
        self.root = Path(folder)
        parts = json.loads((self.root / "cache.json").read_text())["parts"]
        self.files = [self.root / f"{i:05d}.safetensors" for i in range(parts)]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise BadInput(f"the cache {folder} is unfinished: {missing[0]} is missing")
        self.ends = np.cumsum([self._rows(file) for file in self.files])

    @staticmethod
    def _rows(file: Path) -> int:
        with safe_open(file, "pt") as part:
            return part.get_slice("x0").get_shape()[0] if "x0" in part.keys() else 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        which = np.searchsorted(self.ends, indices, side="right")
        for number in np.unique(which):  # each file is opened once a batch, in whichever process reads
            with safe_open(self.files[number], "pt") as part:
                x0, cond = part.get_slice("x0"), part.get_slice("cond")
                first = int(self.ends[number - 1]) if number else 0
                for index in {i for i, n in zip(indices, which, strict=True) if n == number}:
                    rows[index] = x0[index - first], cond[index - first]
        return torch.stack([rows[i][0] for i in indices]), torch.stack([rows[i][1] for i in indices])
