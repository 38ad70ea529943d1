"""Images with captions, from a folder or from webdataset shards, and a cache of their latents and embeddings.

Whatever is unusable is skipped, counted, and named in the log.
"""

import bisect
import copy
import io
import itertools
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import webdataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from data import EXTENSIONS, BadInput, centre_square, writable_folder

log = logging.getLogger("pairs")

Tokenize = Callable[[list[str]], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]  # pixels (B, 3, R, R) in [-1, 1] and tokens (B, L)
Part = tuple[str, Callable[[], Batches]]  # a piece that can be encoded by itself: its name, and how to read it


class PairOptions(NamedTuple):
    """The size that images get, and which pairs are wanted at all."""

    resolution: int
    min_image_size: int = 0
    max_pwatermark: float = 1.0


class Unusable(Exception):
    """A pair that is whole but is not used; the text says why, in the words of the final count."""


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
        # Never mirrored: captions may say left and right.
        return centre_square(image, options.resolution).float() / 127.5 - 1, caption.strip()


class Pairs:
    """What both sources of pairs do: samples become batches; the unusable are skipped, counted and named in the log."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
        self.data, self.options, self.tokenize, self.counts = data, options, tokenize, Counter()

    def skip(self, name: str, error: Exception) -> None:
        """The filtered may be very many: of their counts, the powers of two are logged."""
        kind = str(error) if isinstance(error, Unusable) else "broken"
        self.counts[kind] += 1
        if kind != "filtered" or self.counts[kind].bit_count() == 1:
            log.warning("skipped %s: %s (%d %s so far)", name, error, self.counts[kind], kind)

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
        kinds = ("members", "broken", "without caption", "filtered")
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in kinds)
        raise BadInput(f"no usable image-caption pairs in {self.data}: {counts}")

    def probe(self, samples: Iterable[dict]) -> None:
        """Refuses what holds no usable pair at all."""
        self.counts.clear()
        self.first(samples)
        self.counts.clear()

    def batched(self, pairs: Iterator[tuple[Tensor, str]], size: int = 64) -> Batches:
        while batch := list(itertools.islice(pairs, size)):
            pixels, captions = zip(*batch, strict=True)
            yield torch.stack(pixels), self.tokenize(list(captions))


class CaptionFolder(Pairs, Dataset):
    """Images below a folder. A caption is a line of its metadata.jsonl, as Hugging Face has it, or a .txt beside."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
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
                self.samples.append({"__url__": root, "__key__": name, path.suffix[1:].lower(): path, **caption})
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
        pairs = (self.first(self.samples[(i + k) % n] for k in range(n)) for i in indices)
        return next(self.batched(pairs, len(indices)))

    def parts(self) -> list[Part]:
        slices = [self.samples[i : i + 1024] for i in range(0, len(self), 1024)]
        return [(f"{i:05d}", lambda part=part: self.batched(self.usable(part))) for i, part in enumerate(slices)]


class Shards(Pairs, IterableDataset):
    """webdataset's tar files, as img2dataset writes them: 0.jpg with 0.txt, or with 0.json that holds a caption."""

    def __init__(self, data: str, options: PairOptions, tokenize: Tokenize):
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
        def goes_on(error: Exception) -> bool:
            self.skip(url, error)
            return isinstance(error, ValueError)  # as for two files of one name; a torn archive ends here

        for url in urls:
            yield from webdataset.tarfile_to_samples(handler=goes_on)([{"url": url}])

    def parts(self) -> list[Part]:
        names = (re.sub(r"[^\w-]", "_", Path(url).stem) for url in self.urls)
        return [
            (f"{i:05d}-{name}", lambda url=url: self.batched(self.usable(self.samples([url]))))
            for i, (name, url) in enumerate(zip(names, self.urls, strict=True))
        ]

    def check_readers(self, readers: int) -> None:
        """A run calls it beforehand: an error in DataLoader's processes has many lines and takes 10 seconds to end."""
        if len(self.urls) < readers:
            raise BadInput(
                f"{len(self.urls)} shards in {self.data} cannot be shared by {readers} readers: "
                "processes times --dataloader_num_workers must not be more than the shards"
            )

    def batches(self, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> IterableDataset:
        """Batches without end for process `rank` of `world`, by DataLoader(batch_size=None).

        A stream cannot skip to its `start`-th batch without reading all before. So `start` is part of the seed, and a
        resumed run goes on in a new order.
        """
        stream = copy.copy(self)
        stream.place = batch_size, f"{seed} {start}", rank, world
        return stream

    def __iter__(self) -> Batches:
        batch_size, seed, rank, world = self.place
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        self.check_readers(world * workers)
        return self.batched(self.epochs(seed, rank * workers + worker, world * workers), batch_size)

    def epochs(self, seed: str, reader: int, readers: int) -> Iterator[tuple[Tensor, str]]:
        """In each epoch the shards are dealt out anew to the readers, which are the workers of all processes."""
        for epoch in itertools.count():
            urls = random.Random(f"{seed} {epoch}").sample(self.urls, len(self.urls))  # the same for all readers
            shuffle = webdataset.shuffle(1000, rng=random.Random(f"{seed} {epoch} {reader}"))
            before = self.counts["usable"]
            yield from self.usable(shuffle(self.samples(urls[reader::readers])))  # shuffled while still compressed
            if self.counts["usable"] == before:  # bad luck if other shards hold some: the next deal is another
                self.probe(self.samples(self.urls))


def load_pairs(data: str, options: PairOptions, tokenize: Tokenize) -> CaptionFolder | Shards:
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
            x0, cond = (torch.cat(tensors).contiguous() for tensors in zip(*encoded or empty, strict=True))
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
        self.starts = [0]  # of each part's rows in the whole, and the end
        for file in self.files:
            with safe_open(file, "pt") as part:
                self.starts.append(self.starts[-1] + part.get_slice("x0").get_shape()[0])

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        which = bisect.bisect_right(self.starts, index) - 1
        with safe_open(self.files[which], "pt") as part:
            row = index - self.starts[which]
            return part.get_slice("x0")[row], part.get_slice("cond")[row]

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        x0, cond = zip(*map(self.row, indices), strict=True)
        return torch.stack(x0), torch.stack(cond)
