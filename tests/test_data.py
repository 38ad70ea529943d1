"""Where x_0 comes from: each item once an epoch, whatever the number of readers; bad ones skipped; encoded once."""

import argparse
import functools
import io
import itertools
import json
import logging
import os
import pickle
import stat
import tarfile
import threading
import warnings
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F
from webdataset.shardlists import expand_urls

import training
from data import (
    BadInput,
    CachedLatents,
    CaptionFolder,
    EndlessBatches,
    PairOptions,
    Points,
    Shards,
    cache_pairs,
    centre_square,
    expansions,
    image_files,
    load_images,
    load_pairs,
    program,
    read_prompts,
    refuse,
    to_range,
)
from teacher import StableDiffusion


def write(path, size=(4, 4), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_pixels_labels_and_mirror_images(tmp_path):
    first, second = write(tmp_path / "train/a/0.png", seed=1), write(tmp_path / "train/b/0.png", seed=2)
    images = load_images(tmp_path, mirror=True)
    assert len(images) == 4 and images.classes == ["a", "b"]
    x, labels = images[[0, 1, 2, 3]]
    assert labels.tolist() == [0, 1, 0, 1]
    as_pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for got, wanted in zip(as_pixels, [first, second, first[:, ::-1], second[:, ::-1]], strict=True):
        assert (got == wanted).all()


def test_range_is_minus_one_to_one(tmp_path):
    write(tmp_path / "0.png")
    images = load_images(tmp_path)
    images.samples[0, :, 0, 0], images.samples[0, :, 0, 1] = 0, 255
    x, _ = images[[0]]
    assert x[0, 0, 0, 0] == -1 and x[0, 0, 0, 1] == 1


def test_broken_images_are_skipped_counted_and_named(tmp_path, caplog):
    for i in range(3):
        write(tmp_path / f"train/a/good{i}.jpg")
    whole = (tmp_path / "train/a/good0.jpg").read_bytes()
    (tmp_path / "train/a/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/a/empty.png").touch()
    (tmp_path / "train/a/text.jpg").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        assert len(load_images(tmp_path)) == 3
    for name in ("truncated.jpg", "empty.png", "text.jpg", "skipped 3 broken of 6"):
        assert name in caplog.text
    assert "good" not in caplog.text


def test_images_of_several_sizes_need_a_resolution(tmp_path):
    write(tmp_path / "train/a/0.png")
    write(tmp_path / "train/a/1.png", size=(6, 4))
    with pytest.raises(BadInput, match=r"1\.png is 6x4 pixels, expected 4x4"):
        load_images(tmp_path)
    assert load_images(tmp_path, resolution=4).samples.shape == (2, 3, 4, 4)
    small = load_images(tmp_path, resolution=2).samples
    with Image.open(tmp_path / "train/a/1.png") as image:
        wanted = np.asarray(image.convert("RGB").crop((1, 0, 5, 4)).resize((2, 2), Image.Resampling.LANCZOS))
    assert (small[1].permute(1, 2, 0).numpy() == wanted).all()


def test_folders_without_usable_images_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no images in"):
        load_images(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        load_images(tmp_path / "missing")
    (tmp_path / "a.png").write_text("broken")
    with pytest.raises(BadInput, match="all 1 are broken"):
        load_images(tmp_path)
    with pytest.raises(BadInput, match="test"):  # never the training images in place of a missing test split
        load_images(tmp_path, "test")


def test_cifar10_comes_from_torchvision_or_says_why_not(tmp_path, monkeypatch):
    class Downloaded:
        data, targets, classes = np.full((2, 32, 32, 3), 7, np.uint8), [1, 0], ["x", "y"]

        def __init__(self, root, train, download):
            assert download and train is False

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    images = load_images(tmp_path / "cifar10", "test")
    assert images.samples.shape == (2, 3, 32, 32) and images.labels.tolist() == [1, 0]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(BadInput, match="could not be downloaded: no network"):
        load_images(tmp_path / "cifar10")


@given(
    length=st.integers(1, 20),
    batch=st.integers(1, 7),
    world=st.integers(1, 3),
    start=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_the_stream_does_not_depend_on_processes_or_interruptions(length, batch, world, start, seed):
    """The processes' batches, put together, are one process's large batches; and a late start is a suffix."""
    n = 12
    whole = list(itertools.islice(EndlessBatches(length, batch * world, seed), n))
    parts = [itertools.islice(EndlessBatches(length, batch, seed, start, r, world), n - start) for r in range(world)]
    assert whole[start:] == [sum(rows, []) for rows in zip(*parts, strict=True)]


@given(length=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_epoch_is_a_new_permutation(length, seed):
    stream = EndlessBatches(length, length, seed)
    first, second = itertools.islice(stream, 2)
    assert sorted(first) == sorted(second) == list(range(length))
    assert torch.tensor(first).shape == (length,) and (length < 10 or first != second)


# ======================================================================================================================
# Images with captions
# ======================================================================================================================

SMALL = PairOptions(resolution=8)


def tokenize(captions: list[str]) -> torch.Tensor:
    """A caption's number is its token, so that tests can tell the pairs apart."""
    return torch.tensor([[int(caption)] for caption in captions])


def encoded(number=0, size=(8, 8), format="JPEG") -> bytes:
    """An image whose level of grey is its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number, number, number)).save(file, format)
    return file.getvalue()


def shard(path, members: dict[str, bytes | str]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def shards(folder, sizes: list[int]) -> str:
    """Shards of pairs that are numbered through; the pattern that names them."""
    numbers = itertools.count()
    for i, size in enumerate(sizes):
        pairs = {}
        for n in itertools.islice(numbers, size):
            pairs |= {f"{n:03d}.jpg": encoded(n), f"{n:03d}.txt": f"{n}"}
        shard(folder / f"{i}.tar", pairs)
    return f"{folder}/{{0..{len(sizes) - 1}}}.tar"


def all_tokens(dataset) -> list[int]:
    batches = itertools.chain(*(dataset.read(part) for _, part in dataset.parts()))
    return [token for _, tokens in batches for token in tokens.flatten().tolist()]


def take(stream, n: int) -> list[list[int]]:
    return [tokens.flatten().tolist() for _, tokens in itertools.islice(stream, n)]


# -- one image ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (16, 16), (40, 8), (6, 4)])
def test_the_centre_is_kept_and_resized(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cropped = F.center_crop(image, [min(size)] * 2)
    wanted = F.pil_to_tensor(F.resize(cropped, [8, 8], F.InterpolationMode.LANCZOS))
    got = centre_square(image, 8)
    assert got.dtype == torch.uint8 and got.shape == (3, 8, 8)
    assert (got == wanted).all()


def test_alpha_grey_and_palettes_become_rgb():
    assert (centre_square(Image.new("L", (9, 5), 0), 4) == 0).all()
    assert (centre_square(Image.new("RGBA", (9, 5), (255, 255, 255, 255)), 4) == 255).all()
    assert centre_square(Image.new("P", (9, 5)), 4).shape == (3, 4, 4)


def test_left_stays_left_black_is_minus_one_and_white_is_one(tmp_path):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    image.save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("0")
    pixels, _ = load_pairs(str(tmp_path), SMALL, tokenize)[[0] * 16]
    assert pixels.dtype == torch.uint8  # as they travel; what a model gets is to_range of them
    pixels = to_range(pixels)
    assert (pixels[..., :4] == 1).all() and (pixels[..., 4:] == -1).all()


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["text", "caption"])
def test_captions_from_metadata_and_from_files_beside(tmp_path, key, caplog):
    (tmp_path / "below").mkdir()
    for number, name in enumerate(["a.jpg", "below/b.png", "c.JPEG", "d.webp", "none.jpg"]):
        extension = name.split(".")[1].lower()
        (tmp_path / name).write_bytes(encoded(number, format={"jpg": "jpeg"}.get(extension, extension)))
    rows = [{"file_name": "a.jpg", key: "0"}, {"file_name": "./below/b.png", key: "1"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "c.txt").write_text("2\n")
    (tmp_path / "d.txt").write_text("3")
    pairs = load_pairs(str(tmp_path), SMALL, tokenize)
    assert isinstance(pairs, CaptionFolder) and len(pairs) == 4
    pixels, tokens = pairs[[3, 0, 1, 2]]
    assert pixels.shape == (4, 3, 8, 8) and tokens.dtype == torch.int64
    levels = ((to_range(pixels).mean((1, 2, 3)) + 1) * 127.5).round().long()
    assert levels.tolist() == tokens.flatten().tolist() and sorted(levels.tolist()) == [0, 1, 2, 3]
    assert "left out 1 of 5" in caplog.text


def folder_of(path, numbers, broken=()):
    for n in numbers:
        (path / f"{n:04d}.jpg").write_bytes(b"no image" if n in broken else encoded(n % 256))
        (path / f"{n:04d}.txt").write_text(str(n))
    return str(path)


def test_the_next_usable_image_replaces_a_broken_one(tmp_path, caplog):
    pairs = load_pairs(folder_of(tmp_path, range(5), broken={1, 2, 4}), SMALL, tokenize)
    caplog.clear()
    _, tokens = pairs[[0, 1, 2, 3, 4]]
    assert tokens.flatten().tolist() == [0, 3, 3, 3, 0]
    assert "0001.jpg" in caplog.text and "0004.jpg" in caplog.text and "4 broken so far" in caplog.text
    assert "0000.jpg" not in caplog.text


def test_folder_through_a_loader_with_workers(tmp_path):
    pairs = load_pairs(folder_of(tmp_path, range(6), broken={2}), SMALL, tokenize)
    loader = DataLoader(pairs, sampler=[[0, 1], [2, 3], [5, 4]], batch_size=None, num_workers=2)
    assert take(loader, 3) == [[0, 1], [3, 3], [5, 4]]


def test_parts_of_a_folder(tmp_path):
    pairs = load_pairs(folder_of(tmp_path, range(3), broken={1}), SMALL, tokenize)
    one, two = pairs.samples[0], pairs.samples[1]
    pairs.samples = [one] * 1024 + [two] * 2 + [one] * 3  # 1029 files take long to make
    assert [name for name, _ in pairs.parts()] == ["00000", "00001"]
    sizes = [[len(tokens) for _, tokens in pairs.read(part)] for _, part in pairs.parts()]
    assert sizes == [[64] * 16, [3]] and pairs.counts["broken"] == 2


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match="no such folder: .*missing$"):
        load_pairs(str(tmp_path / "missing"), SMALL, tokenize)
    with pytest.raises(BadInput, match="no images in"):
        load_pairs(str(tmp_path), SMALL, tokenize)
    (tmp_path / "0.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"no captions in .* 0\.txt beside 0\.jpg.* metadata\.jsonl$"):
        load_pairs(str(tmp_path), SMALL, tokenize)
    (tmp_path / "0.txt").write_text("0")
    with pytest.raises(BadInput, match="1 members, 1 broken, 0 without caption, 0 filtered$"):
        load_pairs(str(tmp_path), SMALL, tokenize)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"file_name": "a.jpg"}', '{"text": "a"}', '{"file_name": 3, "text": "a"}']
)
def test_a_bad_line_of_metadata_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "0"}\n' + line)
    with pytest.raises(BadInput, match=r"metadata\.jsonl, line 2 "):
        load_pairs(str(tmp_path), SMALL, tokenize)


# -- what lies in a folder and is no good file -------------------------------------------------------------------------


def fifo(path):
    """A pipe. Who opens it gets a "{", and is not left waiting: these tests are to fail, not to hang."""
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=["{"], daemon=True).start()


@pytest.mark.parametrize(
    "name, make, kept",
    [
        ("x.jpg", fifo, [0, 1]),
        ("x.jpg", lambda path: path.mkdir(), [0, 1]),
        ("x.jpg", lambda path: os.mknod(path, stat.S_IFSOCK), [0, 1]),
        ("x.jpg", lambda path: path.symlink_to("/dev/null"), [0, 1]),
        ("0001.txt", fifo, [0]),
        ("0001.txt", lambda path: path.mkdir(), [0]),
        ("metadata.jsonl", fifo, [0, 1]),
    ],
)
def test_what_is_no_file_is_never_opened(tmp_path, name, make, kept, caplog):
    folder_of(tmp_path, range(2))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert [path.name for path in image_files(tmp_path, "train")] == ["0000.jpg", "0001.jpg"]
    assert all_tokens(load_pairs(str(tmp_path), SMALL, tokenize)) == kept and "skipped" not in caplog.text


@pytest.mark.parametrize("action, kept", [("ignore", [0, 1]), ("error", [0])])
def test_images_that_would_fill_the_memory_are_skipped(tmp_path, monkeypatch, caplog, action, kept):
    """As are other formats than the names promise. PIL warns at its limit, and raises at twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for number, size in enumerate([(8, 8), (12, 12), (20, 20)]):
        (tmp_path / f"{number}.png").write_bytes(encoded(number, size, "PNG"))
    (tmp_path / "3.png").write_bytes(encoded(format="BMP"))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(str(number))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert len(load_images(tmp_path, resolution=4)) == len(kept)
        skipped = caplog.text
        assert all_tokens(load_pairs(str(tmp_path), SMALL, tokenize)) == kept
    for text in (skipped, caplog.text.removeprefix(skipped)):
        assert all((f"{number}.png" in text) == (number not in kept) for number in range(4))


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_is_dealt_out_to_the_processes(tmp_path, world):
    """With a batch of one, a reader's first epoch is as long as its shards: the union is each pair once, shuffled."""
    pairs = load_pairs(shards(tmp_path, [7] * 6), SMALL, tokenize)
    assert isinstance(pairs, Shards)
    shares = [sum(take(pairs.batches(1, 0, 0, rank, world), 42 // world), []) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(42))
    assert all(share != sorted(share) for share in shares)


def test_an_epoch_is_dealt_out_to_workers_of_processes(tmp_path):
    pairs = load_pairs(shards(tmp_path, [3] * 4), SMALL, tokenize)
    shares = [take(DataLoader(pairs.batches(3, 0, 0, r, 2), batch_size=None, num_workers=2), 2) for r in range(2)]
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(12))


def test_batches_are_whole_and_nothing_is_dropped_across_epochs(tmp_path):
    pairs = load_pairs(shards(tmp_path, [3, 5, 2]), SMALL, tokenize)
    batches = take(pairs.batches(4, 0, 0, 0, 1), 10)  # 40 of 10 pairs: four epochs
    assert {len(batch) for batch in batches} == {4}
    read = sum(batches, [])
    epochs = [read[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]


def test_pixels_belong_to_their_captions(tmp_path):
    pairs = load_pairs(shards(tmp_path, [9, 9]), SMALL, tokenize)
    pixels, tokens = next(iter(pairs.batches(18, 0, 0, 0, 1)))
    assert (((to_range(pixels).mean((1, 2, 3)) + 1) * 127.5).round().long() == tokens.flatten()).all()


def test_the_order_is_a_function_of_the_arguments(tmp_path):
    pairs = load_pairs(shards(tmp_path, [6] * 4), SMALL, tokenize)
    reference = take(pairs.batches(4, 0, 0, 0, 1), 6)
    assert take(pairs.batches(4, 0, 0, 0, 1), 6) == reference
    assert take(pairs.batches(4, 1, 0, 0, 1), 6) != reference
    assert take(pairs.batches(4, 0, 6, 0, 1), 6) != reference  # resumed after six batches


def test_more_readers_than_shards_are_refused(tmp_path, monkeypatch):
    pairs = load_pairs(shards(tmp_path, [2, 2]), SMALL, tokenize)
    with pytest.raises(BadInput, match="^2 shards .* 3 readers"):
        iter(pairs.batches(1, 0, 0, 0, 3))
    monkeypatch.setattr("data.get_worker_info", lambda: SimpleNamespace(num_workers=2, id=0))  # without the processes
    assert len(take(pairs.batches(1, 0, 0, 0, 1), 1)) == 1
    with pytest.raises(BadInput, match="^2 shards .* 4 readers"):
        iter(pairs.batches(1, 0, 0, 0, 2))


@pytest.mark.parametrize("world, workers, used", [(1, 4, 3), (2, 4, 1), (3, 4, 1), (1, 2, 2), (1, 0, 0)])
def test_no_more_workers_than_shards_are_started(tmp_path, world, workers, used):
    pairs = load_pairs(shards(tmp_path, [2, 2, 2]), SMALL, tokenize)
    position = {"batch_size": 2, "seed": 0, "world": world}
    streams = [training.stream_batches(pairs, workers, rank=rank, **position) for rank in range(world)]
    assert {stream._num_workers for stream in streams} == {used}
    epoch = [take(stream, 3 // world) for stream in streams]
    if used * world == 3 or not used:
        assert sorted(sum(itertools.chain(*epoch), [])) == list(range(6))


def test_what_ends_a_worker_is_one_line():
    """ExceptionWrapper is what a loader's process sends (and one that has sent it takes seconds to end)."""
    try:
        refuse(True, "no usable pairs")
    except BadInput:
        sent = pickle.loads(pickle.dumps(ExceptionWrapper(where="in DataLoader worker process 0")))
    with pytest.raises(BadInput, match="^no usable pairs$"):
        sent.reraise()


def spoilt(tmp_path) -> str:
    """Usable pairs between one of each kind of trouble; one shard is cut in the middle, one is none."""
    whole = encoded(size=(64, 64))
    members = {
        "ok1.jpg": encoded(), "ok1.txt": "1",
        "text.jpg": "no image", "text.txt": "9",
        "half.jpg": whole[: len(whole) // 2], "half.txt": "9",
        "gif.jpg": encoded(format="GIF"), "gif.txt": "9",
        "json.jpg": encoded(), "json.json": "{", "json.txt": "9",
        "list.jpg": encoded(), "list.json": "[]",
        "imageless.txt": "9",
        "twice.jpg": encoded(), "twice.JPG": encoded(), "twice.txt": "4",
        "mute.jpg": encoded(), "empty.jpg": encoded(), "empty.txt": " \n", "null.jpg": encoded(),
        "null.json": '{"caption": null}',
        "ok2.PNG": encoded(format="PNG"), "ok2.json": '{"caption": "2", "pwatermark": null, "original_width": null}',
    }  # fmt: skip
    shard(tmp_path / "0.tar", members)
    torn = shard(tmp_path / "1.tar", {"ok3.jpg": encoded(), "ok3.txt": "3", "cut.jpg": whole, "cut.txt": "9"})
    with open(torn, "r+b") as file:
        file.truncate(512 * 6 + 100)  # in the middle of cut.jpg
    (tmp_path / "2.tar").write_text("no tar at all")
    return f"{tmp_path}/{{0..2}}.tar"


def test_broken_members_are_skipped_counted_and_named(tmp_path, caplog):
    pairs = load_pairs(spoilt(tmp_path), SMALL, tokenize)
    caplog.clear()
    assert all_tokens(pairs) == [1, 4, 2, 3]
    assert pairs.counts["usable"] == 4 and pairs.counts["without caption"] == 3
    for key in ("text", "half", "gif", "json", "list", "imageless", "mute", "empty", "null"):
        assert f"0.tar/{key}:" in caplog.text, key
    assert "1.tar: " in caplog.text and "2.tar: " in caplog.text and "/ok" not in caplog.text
    assert pairs.counts["broken"] == 6 + 3 and "9 broken so far" in caplog.text
    assert sorted(sum(take(pairs.batches(2, 0, 0, 0, 1), 4), [])) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_reader_whose_shards_are_all_bad_waits_for_the_next_deal(tmp_path):
    """One bad shard must not end a run; all of them must."""
    shards(tmp_path, [1, 1])
    (tmp_path / "1.tar").write_text("no tar at all")
    pairs = load_pairs(f"{tmp_path}/{{0..1}}.tar", SMALL, tokenize)
    assert take(pairs.batches(1, 0, 0, 0, 2), 3) == take(pairs.batches(1, 0, 0, 1, 2), 3) == [[0]] * 3
    stream = iter(pairs.batches(1, 0, 0, 0, 1))
    next(stream)
    (tmp_path / "0.tar").write_text("no tar at all")
    with pytest.raises(BadInput, match="0 members, 2 broken"):
        list(itertools.islice(stream, 2))


def test_shards_that_cannot_be_used(tmp_path):
    shards(tmp_path, [1])
    for data, missing in [("{0..1}.tar", "1.tar"), ("9.tar", "9.tar"), ("*.tar", r"\*.tar")]:
        with pytest.raises(BadInput, match=f"^no such shard: {tmp_path}/{missing}$"):
            load_pairs(f"{tmp_path}/{data}", SMALL, tokenize)
    with pytest.raises(BadInput, match="^no such shard: b.tar$"):
        load_pairs(f"{tmp_path}/0.tar::b.tar", SMALL, tokenize)
    for braces in ("{0..1.tar", "{" * 3000 + "0.tar" + "}" * 3000):
        with pytest.raises(BadInput, match=f"^{braces}: "):
            load_pairs(braces, SMALL, tokenize)
    bad = shard(tmp_path / "bad.tar", {"0.jpg": "no image", "0.txt": "0", "1.jpg": encoded()})
    with pytest.raises(BadInput, match=r"bad\.tar: 2 members, 1 broken, 1 without caption, 0 filtered$"):
        load_pairs(bad, SMALL, tokenize)


@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
def test_a_pipe_is_no_shard(tmp_path, scheme):
    shards(tmp_path, [0, 2])
    fifo(tmp_path / "2.tar")
    with pytest.raises(BadInput, match="^no such shard: "):
        load_pairs(f"{scheme}{tmp_path}/2.tar", SMALL, tokenize)
    assert all_tokens(load_pairs(f"{scheme}{tmp_path}/1.tar", SMALL, tokenize)) == [0, 1]


@pytest.mark.parametrize(
    "pattern", ["pipe:{0}", "1.tar::pipe:{0}", "{{pipe:{0},1.tar}}", "p{{ipe:{0},x.tar}}", " pipe:{0}", "PIPE:{0}"]
)
def test_a_shell_runs_only_if_it_is_allowed(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards(tmp_path, [0, 1])
    with pytest.raises(BadInput, match="runs a shell command: --allow_pipe allows it$"):
        load_pairs(pattern.format("touch ran.tar"), SMALL, tokenize)
    assert not (tmp_path / "ran.tar").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999999}.tar",
        "{-9..999999999999..2}.tar",
        "{0..999999999999\n}.tar",
        "{0..999}{0..999}/{0..999}.tar",
        "{{0..999}{0..999}{0..999},a}.tar",
        "{{{0..999}}{{0..999}}{0,1}}.tar",
        "{0,1}" * 40 + ".tar",
        "{0..900000}.tar::{0..900000}.tar",
        "{" + "9" * 5000 + "..0}.tar",
    ],
)
def test_endless_braces_are_refused_before_they_are_expanded(pattern, monkeypatch):
    monkeypatch.setattr("webdataset.shardlists.expand_urls", lambda urls: pytest.fail("expanded"))
    with pytest.raises(BadInput, match="more than a million shards$|limit .4300 digits"):
        load_pairs(pattern, SMALL, tokenize)


@pytest.mark.parametrize("pattern", ["{000..999}.tar", "{9..0}x{,y}", "{0..9}/{20..29}{a,b}", "{-3..3}", "abc"])
def test_names_in_braces_are_counted(pattern):
    assert expansions(pattern) == len(expand_urls(pattern))


def test_shards_that_a_command_prints(tmp_path):
    shards(tmp_path, [2])
    allowed = SMALL._replace(allow_pipe=True)
    assert all_tokens(load_pairs(f"pipe:cat {tmp_path}/0.tar", allowed, tokenize)) == [0, 1]


def test_a_folder_may_be_called_like_a_shard(tmp_path):
    (tmp_path / "a.tar").mkdir()
    assert len(load_pairs(folder_of(tmp_path / "a.tar", range(2)), SMALL, tokenize)) == 2


# -- filters -----------------------------------------------------------------------------------------------------------

FACTS = [
    ({}, (8, 8), 0.0),
    ({}, (20, 8), 0.0),  # the smaller side counts
    ({"original_width": 20, "original_height": 20}, (8, 8), 0.0),  # of the original, where it is known
    ({"original_width": 20, "original_height": 8}, (20, 20), 0.0),
    ({"pwatermark": None}, (20, 20), 0.0),
    ({"pwatermark": 0.7}, (20, 20), 0.0),
    ({"pwatermark": 0.2}, (20, 20), 0.0),
]


@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.parametrize(
    "options, kept",
    [
        (PairOptions(8), [0, 1, 2, 3, 4, 5, 6]),
        (PairOptions(8, min_image_size=20), [2, 4, 5, 6]),
        (PairOptions(8, max_pwatermark=0.5), [0, 1, 2, 3, 4, 6]),
        (PairOptions(8, 20, 0.5), [2, 4, 6]),
    ],
)
def test_filters(tmp_path, source, options, kept, caplog):
    members, rows = {}, []
    for i, (facts, size, _) in enumerate(FACTS):
        members |= {f"{i}.jpg": encoded(i, size), f"{i}.json": json.dumps({"caption": str(i), **facts})}
        (tmp_path / f"{i}.jpg").write_bytes(members[f"{i}.jpg"])
        rows.append({"file_name": f"{i}.jpg", "text": str(i), **facts})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = str(tmp_path) if source == "folder" else shard(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(data, options, tokenize)
        assert all_tokens(pairs) == kept and pairs.counts["filtered"] == len(FACTS) - len(kept)
    assert ("filtered so far" in caplog.text) == (len(kept) < len(FACTS))
    with pytest.raises(BadInput, match="7 members, 0 broken, 0 without caption, 7 filtered$"):
        load_pairs(data, PairOptions(8, min_image_size=21), tokenize)


# -- the cache ---------------------------------------------------------------------------------------------------------


def encode(pixels, tokens):
    """An encoder of a kind: latents (B, 1, 4, 4) that depend on the pixels, and an embedding (B, 2) on the tokens."""
    return to_range(pixels).mean(1, keepdim=True)[..., ::2, ::2], tokens.float() * torch.tensor([1.0, -1.0])


def test_the_cache_holds_what_encoding_gives(tmp_path):
    """From processes that share the work, with a part in the middle that has no usable pairs."""
    pattern, cache = shards(tmp_path, [3, 2, 4]), tmp_path / "cache"
    shard(tmp_path / "1.tar", {"a.jpg": "no image", "a.txt": "0"})
    pairs = load_pairs(pattern, SMALL, tokenize)
    for rank in (1, 0):
        cache_pairs(pairs, cache, {"teacher": "a"}, encode, rank, 2)
    cached = CachedLatents(cache)
    wanted = [encode(*batch) for _, part in pairs.parts() for batch in pairs.read(part)]
    x0, cond = (torch.cat(tensors) for tensors in zip(*wanted, strict=True))
    order = [6, 2, 3, 0, 2, 5, 1, 4]  # across the parts' borders, and one of them twice
    assert len(cached) == 7
    for got, all_rows in zip(cached[order], (x0, cond), strict=True):
        assert torch.equal(got, all_rows[order])
    for got, _ in DataLoader(cached, sampler=[[1, 5], [5, 1]], batch_size=None, num_workers=2):
        assert {row.sum().item() for row in got} == {row.sum().item() for row in x0[[1, 5]]}


def test_a_cache_does_not_depend_on_workers(tmp_path, capfd, monkeypatch):
    """Nor does the log; and what is there already is not read again."""
    pairs = load_pairs(shards(tmp_path, [70, 3, 5, 2]), SMALL, tokenize)  # 70 are two batches
    shard(tmp_path / "1.tar", {"a.jpg": "no image", "a.txt": "0"})
    log, handler = logging.getLogger("data"), logging.StreamHandler()
    monkeypatch.setattr(log, "handlers", [handler])
    for workers in (0, 2, 9):
        cache_pairs(pairs, tmp_path / f"{workers}", {}, encode, 0, 1, workers)
        assert capfd.readouterr().err.count("1.tar/a: ") == 1
    content = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("0", "2", "9")]
    assert len(content[0]) == 5 and content[0] == content[1] == content[2]
    for name in ("0", "1"):
        (tmp_path / f"{name}.tar").write_text("no tar at all")
    (tmp_path / "2/00002-2.safetensors").unlink()
    cache_pairs(pairs, tmp_path / "2", {}, encode, 0, 1, 2)
    assert (tmp_path / "2/00002-2.safetensors").read_bytes() == content[0]["00002-2.safetensors"]
    assert "skipped" not in capfd.readouterr().err


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def holds(**tensors):
    return lambda file: save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)


def says(content):
    return lambda file: file.write_text(content)


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("cache.json", says("{"), "cannot read .*cache.json"),
        ("cache.json", says("[]"), "cannot read .*cache.json"),
        ("cache.json", says("{}"), "cache.json was edited"),
        ("cache.json", says('{"parts": "00000-0"}'), "cache.json was edited"),
        ("cache.json", says('{"parts": ["../cache/00000-0"]}'), "cache.json was edited"),
        ("cache.json", lambda file: says(f'{{"parts": ["{file.parent}/00000-0"]}}')(file), "cache.json was edited"),
        ("cache.json", says('{"parts": ["00000-0", null, ["00001-1"]]}'), "cache.json was edited"),
        ("cache.json", says('{"parts": [3]}'), "lacks 1 of 1 parts"),
        ("cache.json", says('{"parts": []}'), "holds no pairs"),
        ("00000-0.safetensors", cut, "00000-0.safetensors is damaged"),
        ("00000-0.safetensors", says(""), "00000-0.safetensors is damaged"),
        ("00000-0.safetensors", says("no tensors" * 99), "00000-0.safetensors is damaged"),
        ("00000-0.safetensors", holds(x0=(2, 1, 4, 4)), "00000-0.safetensors is damaged"),
        ("00000-0.safetensors", holds(x0=(), cond=(2, 2)), "00000-0.safetensors is damaged"),
        ("00000-0.safetensors", holds(x0=(2, 1, 4, 4), cond=(1, 2)), "00000-0.safetensors is damaged"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, name, damage, words):
    pairs, cache = load_pairs(shards(tmp_path, [2, 2]), SMALL, tokenize), tmp_path / "cache"
    cache_pairs(pairs, cache, {}, encode, 0, 1)
    damage(cache / name)
    with pytest.raises(BadInput, match=words) as refused:
        CachedLatents(cache)
    assert "\n" not in str(refused.value)
    if name == "cache.json":
        with pytest.raises(BadInput, match="cannot read|other parts"):
            cache_pairs(pairs, cache, {}, encode, 0, 1)


class NoModules(pickle.Pickler):
    def reducer_override(self, thing):
        assert not isinstance(thing, torch.nn.Module), type(thing)
        return NotImplemented


def test_what_a_loader_gets_is_small_and_can_be_sent(tmp_path, monkeypatch):
    """To a process that begins from nothing, as all do from Python 3.14 on."""
    from test_stable_diffusion import pipeline

    model, folder = StableDiffusion(pipeline(), "tiny"), tmp_path / "folder"
    folder.mkdir()
    folder_of(folder, range(3), broken={1})
    shards(tmp_path, [2, 2])
    flags = {"resolution": None, "min_image_size": 0, "max_pwatermark": 1.0, "mixed_precision": "no"}
    flags |= {"cache_latents": None, "allow_pipe": True, "dataloader_num_workers": 1}
    flags = [flags | more for more in ({"data": str(folder)}, {"data": f"pipe:cat {tmp_path}/{{0..1}}.tar"})]
    texts, piped = (model.dataset(argparse.Namespace(**each)) for each in flags)
    # "spawn" sends what "forkserver" sends, and leaves no server behind.
    monkeypatch.setattr("data.DataLoader", functools.partial(DataLoader, multiprocessing_context="spawn"))
    cached = model.dataset(argparse.Namespace(**flags[0] | {"cache_latents": str(tmp_path / "cache")}))
    assert len(cached) == 2
    x0, cond = model.prepare(*texts[[0, 2]])
    for made, kept in zip((x0, cond["encoder_hidden_states"]), cached[[0, 1]], strict=True):
        assert torch.allclose(made, kept, atol=1e-6)
    for dataset, content in [
        (texts, 0),
        (piped.batches(4, 0), 0),
        (cached, 0),
        (Points("toy:moons"), 2**16 * 16),
        (load_images(folder), 2 * 3 * 64),
    ]:
        NoModules(file := io.BytesIO()).dump(dataset)
        assert len(file.getvalue()) < content + 100_000, type(dataset)


def test_processes_wait_for_each_others_caches_for_hours(monkeypatch):
    given_to = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: given_to.update(options))
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**launched, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="process group has not been initialized"):  # the rest of accelerate's work
        training.process()
    assert given_to["timeout"] > timedelta(hours=12)


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path):
    pairs, cache, calls = load_pairs(shards(tmp_path, [2, 2, 2]), SMALL, tokenize), tmp_path / "cache", Counter()

    def interrupted(pixels, tokens):
        calls.update(tokens.flatten().tolist())
        if 3 in tokens:
            raise KeyboardInterrupt
        return encode(pixels, tokens)

    def counted(pixels, tokens):
        calls.update(tokens.flatten().tolist())
        return encode(pixels, tokens)

    with pytest.raises(KeyboardInterrupt):
        cache_pairs(pairs, cache, {}, interrupted, 0, 1)
    with pytest.raises(BadInput, match="lacks 2 of 3 parts: 00001-1.safetensors"):
        CachedLatents(cache)
    (cache / "00001-1.tmp").write_bytes(b"half")  # as a kill while writing leaves it
    cache_pairs(pairs, cache, {}, counted, 0, 1)
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    assert CachedLatents(cache)[list(range(6))][1][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    cache_pairs(pairs, cache, {}, interrupted, 0, 1)  # all is there: nothing is encoded


def test_a_cache_of_something_else_is_refused(tmp_path):
    pattern, cache = shards(tmp_path, [1, 1]), tmp_path / "cache"
    pairs = load_pairs(pattern, SMALL, tokenize)
    cache_pairs(pairs, cache, {"teacher": "a", "resolution": 8}, encode, 0, 1)
    with pytest.raises(BadInput, match=r"^--cache_latents .*cache was made from resolution 8, not 16: another folder"):
        cache_pairs(pairs, cache, {"teacher": "a", "resolution": 16}, encode, 0, 1)
    fewer = load_pairs(f"{tmp_path}/0.tar", SMALL, tokenize)
    with pytest.raises(BadInput, match="was made from other parts: another folder"):
        cache_pairs(fewer, cache, {"teacher": "a", "resolution": 8}, encode, 1, 2)
    with pytest.raises(BadInput, match="no cached latents in"):
        CachedLatents(tmp_path)


def test_parts_of_shards_with_the_same_file_name_have_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0 0.tar", {"0.jpg": encoded(), "0.txt": "0"})
    pairs = load_pairs(f"{tmp_path}/{{a,b}}/0 0.tar", SMALL, tokenize)
    assert [name for name, _ in pairs.parts()] == ["00000-0_0", "00001-0_0"]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_values_or_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n a dog \n")
    assert read_prompts([str(file)]) == ["a cat", "a dog"]
    assert read_prompts(["a cat"]) == ["a cat"] and read_prompts([str(file), "b"]) == [str(file), "b"]
    assert read_prompts(["a cat " * 1000]) == ["a cat " * 1000]  # longer than a file's name may be
    file.write_text("\n \n")
    with pytest.raises(BadInput, match=r"no prompts in .*prompts\.txt"):
        read_prompts([str(file)])


@pytest.mark.parametrize("memory", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: [None] * 2**60])
def test_too_little_memory_is_one_line_and_status_1(call, memory):
    """What PyTorch raises on a CPU has no class of its own; other errors of its class stay tracebacks."""
    status, _, err = call(program(memory))
    assert status == 1 and "out of memory" in one_line(err)
    with pytest.raises(RuntimeError, match="size of tensor"):
        program(lambda: torch.ones(2) + torch.ones(3))()
