"""Where x_0 comes from: what a person sees is what is trained on, classes keep their numbers, bad files are skipped."""

import io
import itertools
import json
import os
import pickle
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageCms
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F

import data
from cli import BadInput
from data import Captions, Points, centre_square, load_images, reference_set, to_range
from training import loader

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")  # its red is our green
PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([9, 9, 9, 200, 100, 50])
WHITE = (255, 255, 255)
TURNED = {  # how the stored rows and columns are shown
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.T, 2), 8: np.rot90,
}  # fmt: skip
LINES = '{"file_name": "0.jpg", "text": "0"}\n{"file_name": "./a/1.JPG", "caption": "1"}\n\n'
LEFT_BEHIND = [".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "@eaDir/0.png"]
LEFT_BEHIND += ["cat/._0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png"]
ONE, TWO = {"0.jpg": 0, "0.txt": "0"}, {"cat/0.png": 0, "dog/0.png": 1}


def saved(image: Image.Image, format="PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def plain(colour, mode="RGB", format="PNG", size=(8, 8), **options) -> bytes:
    return saved(Image.new(mode, size, colour), format, **options)


def content(name: str, what: bytes | str | int) -> bytes:
    """Of a file. A number is an image whose level of grey it is, so that tests can tell images apart."""
    if isinstance(what, int):
        return plain(what, "L", "PNG" if name.lower().endswith("png") else "JPEG")
    return what.encode() if isinstance(what, str) else what


def fill(folder: Path, files: dict[str, bytes | str | int]) -> str:
    for name, what in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(name, what))
    return str(folder)


def shard(path: Path, files: dict[str, bytes | str | int], mode="w") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, what in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content(name, what))
            tar.addfile(member, io.BytesIO(content(name, what)))
    return str(path)


def numbered(*numbers: int) -> dict[str, str | int]:
    return {f"{n:03d}.{ending}": what for n in numbers for ending, what in (("jpg", n), ("txt", str(n)))}


def drawn(captions: Captions, batches=12, **options) -> list[tuple[int, str]]:
    """Levels and captions that a run is shown in a dozen batches of eight."""
    stream = itertools.islice(loader(captions, 8, **{"seed": 0} | options), batches)
    pairs = itertools.chain(*(zip(*batch, strict=True) for batch in stream))
    return [(round(pixels.float().mean().item()), text) for pixels, text in pairs]


def shown(captions: Captions) -> str:
    """Each number that is drawn; and each caption has its own image, whose level it is."""
    pairs = drawn(captions)
    assert all(abs(level - int(text)) <= 1 for level, text in pairs)
    return "".join(sorted({text for _, text in pairs}))


def refused(why: str):
    return pytest.raises(BadInput, match=why)


def test_points_are_the_same_each_time_and_others_in_each_split():
    train, test = Points("toy:moons"), reference_set("toy:moons", "test", None)
    x, label = train[[3, 1]]
    assert len(train) == 2**16 and torch.equal(x, Points("ideal:moons").samples[[3, 1]])
    assert torch.equal(label, train.labels[[3, 1]]) and not torch.equal(train.samples, test)
    with refused("unknown 2-D distribution 'toy:moon': .*toy:moons"):
        Points("toy:moon")


# One image (issue 24, point 5).
def all_readers(folder: Path, image: bytes) -> np.ndarray:
    """The pixels (H, W, 3) of one image, which must be the same for training, for captions and to be measured by."""
    name = fill(folder, {"0.png": image, "0.txt": "0"})
    whole = load_images(name).samples
    size = whole.shape[-1]
    captioned, _ = next(iter(Captions(name, size).batches(1, 0)))
    for pixels in (load_images(name, "train", size).samples, captioned, reference_set(name, "train", size)[[0]]):
        assert torch.equal(pixels, whole) and pixels.dtype == torch.uint8
    return whole[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("image, seen", ids=itertools.count(), argvalues=[
    (plain((9, 8, 7)), (9, 8, 7)), (plain(100, "L", "JPEG"), (100, 100, 100)), (plain(1, "1"), WHITE),
    (plain((0, 0, 0, 128), "RGBA"), (127, 127, 127)), (plain((0, 0), "LA"), WHITE),
    (plain((255, 0, 0, 0), "RGBA", "WEBP", lossless=True, exact=True), WHITE), (plain(7, "L", transparency=7), WHITE),
    (plain((1, 2, 3), transparency=(1, 2, 3)), WHITE), (plain(0, "1", transparency=0), WHITE),
    (saved(PALETTE), (200, 100, 50)), (saved(PALETTE, transparency=1), WHITE),
    (saved(PALETTE, transparency=bytes([255, 0])), WHITE), (plain((255, 0, 0, 0), "CMYK", "JPEG"), (0, 255, 255)),
    (plain(128 * 256, "I;16"), (128, 128, 128)), (plain(300, "I;16", transparency=300), WHITE),
    (plain((255, 0, 0), icc_profile=SWAPPED), (0, 255, 0)),
    (plain((255, 0, 0, 255), "RGBA", icc_profile=SWAPPED), (0, 255, 0)),
    (plain((9, 8, 7), icc_profile=b"no profile"), (9, 8, 7)),
    (plain(100, "L", icc_profile=SRGB), (100, 100, 100)),  # a profile of another mode
    (plain((9, 8, 7), exif=b"Exif\0\0garbage"), (9, 8, 7)),
])  # fmt: skip
def test_every_reader_sees_what_a_viewer_shows(tmp_path, image, seen):
    assert np.abs(all_readers(tmp_path, image) - np.array(seen)).max() <= 1


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_camera_held_upright_gives_an_upright_image(tmp_path, orientation, format):
    stored, exif = np.kron([[0, 80], [160, 240]], np.ones((8, 8))).astype(np.uint8), Image.Exif()
    exif[0x0112] = orientation
    image = saved(Image.fromarray(stored).convert("RGB"), format, exif=exif.tobytes())
    assert np.abs(all_readers(tmp_path, image) - TURNED[orientation](stored)[..., None]).max() <= 3


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (16, 16), (40, 8), (6, 4)])
def test_the_centre_is_kept_and_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    cropped = F.center_crop(image, [min(size)] * 2)
    wanted = F.pil_to_tensor(F.resize(cropped, [8, 8], F.InterpolationMode.LANCZOS))
    assert torch.equal(centre_square(image, 8), wanted) and wanted.dtype == torch.uint8


# Images by class (issue 24, point 6).
def test_pixels_labels_and_mirror_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    files = {f"train/{c}/0.png": saved(Image.fromarray(x)) for c, x in zip("ab", pixels, strict=True)}
    images = load_images(fill(tmp_path, files), mirror=True)
    assert len(images) == 4 and images.classes == ["a", "b"] and images.samples.dtype == torch.uint8
    for x, labels in (images[[0, 1, 2, 3]], images[torch.arange(4)]):
        got = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert (got == np.concatenate([pixels, pixels[:, :, ::-1]])).all() and labels.tolist() == [0, 1, 0, 1]
    assert to_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


@pytest.mark.parametrize("files, classes, labels", [
    (TWO, "cat dog", [0, 1]), ({"0.png": 0, "1.png": 1, "__2.png": 2}, "", [0, 0, 0]),
    ({"train/cat/0.PNG": 0, "train/dog/0.jpeg": 1, "test/emu/0.png": 2}, "cat dog", [0, 1]),
    ({"cat/day1/0.png": 0, "dog/day1/0.png": 1, "dog/day2/left/0.png": 2}, "cat dog", [0, 1, 1]),
    (TWO | dict.fromkeys(LEFT_BEHIND, 2) | {"bird/readme.txt": ""}, "cat dog", [0, 1]),
    ({"train_station/0.png": 0, "valley/0.png": 1}, "train_station valley", [0, 1]),
    ({"bullet_train/0.png": 0, "__background__/0.png": 1}, "__background__ bullet_train", [0, 1]),
    ({"caf\u00e9/0.png": 0, "cafe\u0301/1.png": 1}, "caf\u00e9", [0, 0]),
])  # fmt: skip
def test_a_class_is_the_first_folder_that_holds_images(tmp_path, files, classes, labels):
    images = load_images(fill(tmp_path / ".hidden", files))
    assert " ".join(images.classes) == classes and images.labels.tolist() == labels
    assert len(reference_set(str(tmp_path / ".hidden"), "train", 8)) == len(labels)


def test_the_test_split_is_numbered_by_the_train_split(tmp_path):
    names = "train/cat/0.png train/dog/0.png all/emus/0.png test/emu/0.png test/dog/0.png"
    fill(tmp_path, dict.fromkeys(names.split(), 0))
    (tmp_path / "train/emu").symlink_to(tmp_path / "all/emus")  # large sets are put together from links
    images = load_images(tmp_path, "test")
    assert images.classes == ["cat", "dog", "emu"] and images.labels.tolist() == [1, 2]
    fill(tmp_path, {"test/fox/0.png": 3, "train/0.png": 4, "sizes/1.png": 0, "sizes/2.png": plain(0, size=(9, 8))})
    for split, name in [("test", "test/fox/0.png"), ("train", "train/0.png")]:
        with refused(f"1 images lie in no class of the train split, such as .*{name}"):
            load_images(str(tmp_path), split)
    with refused(r"2\.png is 9x8 pixels, expected 8x8"):
        load_images(tmp_path / "sizes")
    assert len(reference_set(str(tmp_path), "test", 8)) == 3  # to measure against, classes do not matter
    with refused("is no folder of images to measure against"):
        reference_set("0.tar", "train", 8)


@pytest.mark.parametrize("files, split, why", [
    ({"Train/0.png": 0, "Test/0.png": 1}, "train", "the folders Test, Train"),
    ({"train2017/0.png": 0, "val2017/0.png": 1}, "train", "the folders train2017, val2017"),
    ({"training/0.png": 0, "test_set/0.png": 1}, "train", "the folders test_set, training: .* must be in .*/train"),
    ({"images/train/0.png": 0, "images/test/0.png": 1}, "train", "the folders test, train"),
    ({"cat/train/0.png": 0, "cat/valid/0.png": 1}, "train", "the folders train, valid"),
    ({"seg_train/a/0.png": 0, "seg_test/a/0.png": 1}, "train", "the folders seg_test"),
    ({"train/train/a/0.png": 0, "train/test/a/0.png": 1}, "train", "train holds splits, test, train"),
    ({"trainA/0.png": 0, "testA/0.png": 1}, "train", "the folders testA, trainA"),
    ({"train/0.png": 0, "bus/0.png": 1}, "train", "train beside bus: classes must lie together in"),  # a vehicle
    ({"train/0.png": 0}, "test", "no such folder: .*test"),  # never the training images in its place
    ({"cat.txt": ""}, "train", r"no images \(\.jpg, \.jpeg, \.png, \.webp\) in"),
])  # fmt: skip
def test_no_split_is_taken_for_another(tmp_path, files, split, why):
    folder = fill(tmp_path, files)
    readers = [lambda: load_images(folder, split), lambda: reference_set(folder, split, 8), lambda: Captions(folder, 8)]
    for read in readers[: 3 if "the folders" in why else 2]:
        with refused(why):
            read()


def test_broken_images_are_skipped_counted_and_named_once(tmp_path, caplog):
    broken = {"cut.jpg": plain(0, "L", "JPEG")[:-9], "e.png": b"", "t.jpg": "no image", "gif.jpg": plain(0, "L", "GIF")}
    (head, tail), alpha = saved(PALETTE).split(b"IDAT"), b"tRNS" + bytes(300)  # of more colours than a palette can have
    alpha = (300).to_bytes(4, "big") + alpha + zlib.crc32(alpha).to_bytes(4, "big")
    broken["alpha.png"] = head[:-4] + alpha + head[-4:] + b"IDAT" + tail
    fill(tmp_path / "train/a", broken)
    images = load_images(fill(tmp_path, {"train/b/0.jpg": 5, "train/c/0.jpg": 9}))
    assert images.labels.tolist() == [1, 2] and images.samples[:, 0, 0, 0].tolist() == [5, 9]
    assert reference_set(str(tmp_path), "train", 4)[torch.arange(7)].shape == (2, 3, 4, 4)
    for line in (record.message for record in caplog.records):
        assert "7 images: 5 skipped" in line and all(line.count(f"/{name}: ") == 1 for name in broken)
    assert len(caplog.records) == 2  # one of each reader
    assert reference_set(str(tmp_path / "train/a"), "train", 4)[torch.arange(5)].shape == (0, 3, 4, 4)
    with refused("no readable images in .*: all 5 are broken"):
        load_images(tmp_path / "train/a")


def test_cifar10_comes_from_torchvision(tmp_path, monkeypatch):
    def downloaded(root, train, download):
        assert download
        targets = [0, 1, 2] if train else [2, 2, 1]
        return Mock(data=np.full((3, 32, 32, 3), 7 + train, np.uint8), targets=targets, classes=["x", "y", "z"])

    folder = str(tmp_path / "cifar10")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", downloaded)
    images = load_images(folder, "test")
    assert images.labels.tolist() == [2, 2, 1] and images.classes == ["x", "y", "z"] and (images.samples == 7).all()
    assert reference_set(folder, "train", 8)[[2]].shape == (1, 3, 8, 8)
    assert load_images(fill(tmp_path / "cifar10_png", TWO)).classes == ["cat", "dog"]
    (tmp_path / "cifar100").mkdir()
    with refused("no images"):
        load_images(str(tmp_path / "cifar100"))


def fifo(path: Path):
    """A pipe. Who opens it gets a "{", and is not left waiting: these tests are to fail, not to hang."""
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=["{"], daemon=True).start()


@pytest.mark.parametrize("name, make, kept", [
    ("x.jpg", fifo, "01"), ("x.jpg", Path.mkdir, "01"), ("x.jpg", lambda path: path.symlink_to("/dev/null"), "01"),
    ("001.txt", fifo, "0"), ("001.txt", Path.mkdir, "0"), ("metadata.jsonl", fifo, "01"),
])  # fmt: skip
def test_what_is_no_file_is_never_opened(tmp_path, name, make, kept, caplog):
    folder = fill(tmp_path, numbered(0, 1))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert len(load_images(folder)) == 2 and not caplog.records and shown(captions := Captions(folder, 8)) == kept
    (tmp_path / "000.jpg").rename(tmp_path / "gone")
    assert kept == "0" or shown(captions) == "1"  # nor does a run end for a file that is no longer there


@pytest.mark.parametrize("action, kept", [("ignore", "01"), ("error", "0")])
def test_images_that_would_fill_the_memory_are_skipped(tmp_path, monkeypatch, action, kept):
    """PIL warns at its limit, and raises at twice that. Skipped, too, are other formats than the names promise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    images = [plain(i, "L", "PNG", (size, size)) for i, size in enumerate([8, 12, 20])] + [plain(3, "L", "BMP")]
    fill(tmp_path, {f"{i}.png": image for i, image in enumerate(images)} | {f"{i}.txt": str(i) for i in range(4)})
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert len(load_images(tmp_path, resolution=4)) == len(kept) and shown(Captions(str(tmp_path), 8)) == kept


# Captions in a folder (issue 24, point 12).
@pytest.mark.parametrize("files, kept, named", [
    (ONE | {"1.WEBP": plain(1, "L", "WEBP"), "1.TXT": " 1 \n"}, "01", []),
    ({"0.jpg": 0, "0.json": '{"caption": "0"}', "1.jpg": 1, "1.json": '\ufeff{"text": "1"}'}, "01", []),
    (ONE | {"0.json": "{", "1.jpg": 1, "1.json": "[]", "1.txt": "1"}, "01", []),
    (ONE | {"0.json": '{"caption": "9"}'}, "0", []),  # a txt goes first
    ({"0.jpg": 0, "0.json": '{"caption": "0"}', "0.txt": " \n"}, "0", []),
    ({"0.jpg": 0, "a/1.jpg": 1, "metadata.jsonl": LINES}, "01", []),
    ({"train/0.jpg": 0, "train/a/1.jpg": 1, "train/metadata.jsonl": "\ufeff" + LINES}, "01", []),
    ({"train/0.jpg": 0, "metadata.jsonl": '{"file_name": "train\\\\0.jpg", "text": "0"}'}, "0", []),
    ({"train/0.jpg": 0, "train/0.txt": "0", "test/1.jpg": 1, "test/1.txt": "1"}, "0", []),
    ({"caf\u00e9.jpg": 0, "cafe\u0301.txt": "0", "0.5.jpg": 1, "0.5.txt": "1"}, "01", []),
    (ONE | {"._0.jpg": "x", "._0.txt": "x", ".git/0.jpg": 9, ".git/0.txt": "9"}, "0", []),
    (ONE | {"mute.jpg": 1, "alone.txt": "1"}, "0", ["mute: no caption", "alone: no image"]),
    (ONE | {"metadata.jsonl": '{"file_name": "gone.jpg", "text": "1"}'}, "0", ["gone: no image"]),
    (ONE | {"e.jpg": 1, "e.txt": " ", "n.jpg": 1, "n.json": '{"text": null}'}, "0", ["e: no capt", "n: no capt"]),
    (ONE | {"1.jpg": 1, "1.png": 2, "1.txt": "1"}, "0", ["1: several images"]),
    (ONE | {"1.jpg": "no image", "1.txt": "1"}, "0", ["1: not a sound image"]),
])  # fmt: skip
def test_captions_in_a_folder(tmp_path, files, kept, named, caplog):
    captions = Captions(fill(tmp_path, files), 8)
    assert len(caplog.records) == bool(named)  # one line for all of them, and no other later
    assert shown(captions) == kept and len(caplog.records) == bool(named)
    assert all(caplog.text.count(f"/{name}") == 1 and f"{len(named)} skipped; " in caplog.text for name in named)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_a_caption_may_be_of_any_editor(tmp_path, encoding, caplog):
    data.warn_of_a_guess.cache_clear()
    files = {"0.jpg": 0, "0.txt": "a café – 5 €\n".encode(encoding), "1.jpg": 1, "1.json": '{"text": "a \\ud83d cat"}'}
    texts = {text for _, text in drawn(Captions(fill(tmp_path, files), 8))}
    assert texts == {"a café – 5 €", "a ? cat"}  # a half of a character would end a tokenizer
    assert caplog.text.count("taken for Windows' western alphabet") == (encoding == "cp1252")  # once


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}', '{"file_name": 3, "text": "a"}'])
def test_a_bad_line_of_metadata_is_named(tmp_path, line):
    with refused(r"metadata\.jsonl, line 4 is not "):
        Captions(fill(tmp_path, {"metadata.jsonl": LINES + line}), 8)


# Shards (issue 24, points 13 and 14).
@pytest.mark.parametrize("pattern, kept", [
    ("set/{0..1}.tar", "01"), ("set/0.tar::set/1.tar", "01"), ("set/*.tar", "01"), ("set/*.t*", "012"),
    ("set/2.tgz", "2"), ("set/b/3.tar.gz", "3"), ("set/b", "3"), ("set", "0123"), ("split", "4"),
])  # fmt: skip
def test_how_shards_may_be_written(tmp_path, pattern, kept, monkeypatch):
    for number, name in enumerate(["0.tar", "1.tar", "2.tgz", "b/3.tar.gz"]):
        shard(tmp_path / "set" / name, numbered(number), "w" if name.endswith(".tar") else "w:gz")
    fill(tmp_path / "set", {"0_stats.json": "{}"})  # img2dataset leaves such
    shard(tmp_path / "split/train/0.tar", numbered(4))
    shard(tmp_path / "split/test/0.tar", numbered(9))
    monkeypatch.chdir(tmp_path)
    assert shown(Captions(pattern, 8)) == kept
    with refused("they must lie in two folders"):
        Captions(fill(tmp_path / "set", numbered(5)), 8)
    with refused("cannot load {0..1.tar: .*braces"):
        Captions("{0..1.tar", 8)


@pytest.mark.parametrize("name", [
    "9.tar", "{0..1}.tar", "*.tgz", "user/data-set", "0.tar::b.tar", "none", "fifo.tar", "0.tar::pipe:touch ran.tar",
    "{pipe:touch ran.tar,0.tar}", "p{ipe:touch ran.tar,x}", "PIPE:touch ran.tar", "pipe:touch ran.tar # http://x/0.tar",
])  # fmt: skip
def test_what_is_no_shard_says_how_one_is_written_and_runs_no_shell(tmp_path, name, monkeypatch):
    shard(tmp_path / "0.tar", numbered(0))
    fifo(tmp_path / "fifo.tar")
    monkeypatch.chdir(tmp_path)
    how = r".*'\{00000\.\.00099\}\.tar', 'FOLDER/\*\.tar' or URLs.* hf download NAME --repo-type dataset"
    with refused("^no such folder or shard: " + how):
        Captions(name, 8)
    assert not (tmp_path / "ran.tar").exists()


@pytest.mark.parametrize("source", [fill, shard])
@pytest.mark.parametrize("files, counted", [
    ({"0.jpg": "no image", "0.txt": "0", "1.jpg": 1}, "2 skipped; .*0: not a sound image|1: no caption"),
    ({"0.gif": 0, "0.txt": "0"}, "1 skipped; .*0: no image"), ({"._0.jpg": 0, "._0.txt": "0"}, "0 skipped"),
    ({"0.v2.jpg": 0, "0.v2.txt": "0"}, "1 skipped; .*0: no image"), ({"0.csv": ""}, "[01] skipped"),
    ({"0.jpg": 0, "1.jpg": 1, "0.txt": "0", "1.txt": "1"}, "2 skipped; .*0: no image"),
])  # fmt: skip
def test_a_refusal_counts_and_says_the_rule(tmp_path, source, files, counted):
    rule = r"a pair is 0\.jpg, .* with 0\.txt, .* in a shard, next to each other and with no other dot in their names"
    if source is fill and {"1.txt", "0.v2.txt"} & files.keys():
        return  # are pairs in a folder, where the rule is simpler
    with refused(f"no usable pair in .*: {counted}.*{rule}"):
        Captions(source(tmp_path / "a.tar", files), 8)


def test_broken_members_are_skipped_counted_and_named_once(tmp_path, caplog):
    members = {
        "d/._1.jpg": "x", "d/1.jpg": 1, "d/._1.txt": "x", "d/1.txt": "1",  # as macOS packs them
        "text.jpg": "no image", "text.txt": "9", "half.jpg": plain(0, "L", "JPEG")[:-9], "half.txt": "9",
        "imageless.txt": "9", "twice.jpg": 4, "twice.JPG": 4, "twice.txt": "4",
        "broken.jpg": 5, "broken.json": "{", "broken.txt": "5",
        "2.PNG": 2, "2.json": '{"caption": "2", "pwatermark": null, "original_width": "x"}',
    }  # fmt: skip
    shard(tmp_path / "0.tar", members)
    torn = shard(tmp_path / "1.tar", {"000.jpg": 3, "000.txt": "3", "001.jpg": 9, "001.txt": "9" * 20_000})
    os.truncate(torn, 10_000)  # in the middle of 001.txt
    (tmp_path / "2.tar").write_text("no tar at all")
    shard(tmp_path / "3.tar", {"001.txt": "6", "001.jpg": 6})  # not the caption of the torn shard's 001.jpg
    captions = Captions(f"{tmp_path}/{{0..3}}.tar", 8)
    assert shown(captions) == "123456"
    (line,) = [record.message for record in caplog.records]
    assert all(line.count(f"0.tar/{name}: ") == 1 for name in ("text", "half", "imageless")) and ": 7 skipped; " in line
    assert all(f"{tmp_path}/{name}" in captions.skipped for name in ("0.tar", "1.tar", "2.tar", "1.tar/001"))


def test_a_stream_tells_seldom_and_ends_when_its_data_are_gone(tmp_path, caplog):
    bad = {f"bad{i}{ending}": "9" for i in range(64) for ending in (".jpg", ".txt")}
    captions = Captions(shard(tmp_path / "0.tar", numbered(*range(40)) | bad), 8)
    assert not caplog.records  # the first pairs are good
    stream = iter(captions.batches(8, seed=0))
    first, *_ = [texts for _, texts in itertools.islice(stream, 40)]
    assert first != sorted(first)  # a shard is shuffled
    assert 1 <= len(caplog.records) <= 7 and len(captions.skipped) == 64  # a line when the number has doubled
    assert all(caplog.text.count(f"/bad{i}:") <= 1 for i in range(64))
    (tmp_path / "0.tar").write_text("no tar at all")
    with refused("nothing usable any more"):
        list(itertools.islice(stream, 5000))


@pytest.mark.parametrize("source", [fill, shard])
@pytest.mark.parametrize("size, mark, kept", [(0, 1, "0123456"), (20, 1, "2456"), (0, 0.5, "012346"), (20, 0.5, "246")])
def test_filters(tmp_path, source, size, mark, kept):
    sizes, files = [(8, 8), (20, 8), (8, 8), (20, 20), (20, 20), (20, 20), (20, 20)], {}
    facts = [{}, {}, {"original_width": 20, "original_height": 20}, {"original_width": 20, "original_height": 8}]
    facts += [{"pwatermark": None}, {"pwatermark": 0.7}, {"pwatermark": 0.2}]
    for i, known in enumerate(facts):
        files |= {f"{i}.jpg": plain(i, "L", "JPEG", sizes[i]), f"{i}.json": json.dumps({"caption": str(i), **known})}
    where = source(tmp_path / "0.tar", files)
    assert shown(Captions(where, 8, size, mark)) == kept  # by the smaller side; of the original, where it is known
    with refused("no usable pair in .*: 1 skipped; .*: some are filtered"):
        Captions(where, 8, min_image_size=21)


@pytest.fixture(params=["folder", 1, 8])
def captions(tmp_path, request) -> Captions:
    if request.param == "folder":
        return Captions(fill(tmp_path, numbered(*range(24))), 8)
    for part in np.split(np.arange(24), request.param):
        shard(tmp_path / f"{part[0]}.tar", numbered(*part.tolist()))
    return Captions(f"{tmp_path}/*.tar", 8)


def test_the_order_is_a_function_of_the_arguments_and_draws_all_alike(captions):
    orders = [{}, {"seed": 1}, {"seed": 2**31 - 1}, {"first": 1}, {"rank": 0, "world": 2}, {"rank": 1, "world": 2}]
    streams = [drawn(captions, **order) for order in orders]
    assert len(streams[0]) == 96 and drawn(captions) == streams[0]  # and batches are whole
    sent = pickle.loads(pickle.dumps(captions.batches(8, seed=0)))  # as to a loader's process
    assert next(iter(sent))[1] == [text for _, text in streams[0][:8]]
    assert all(one != other for one, other in itertools.combinations(streams, 2))
    counts = np.bincount([int(text) for _, text in drawn(captions, 150)], minlength=24)  # 50 each
    assert counts.min() > 20 and counts.max() < 100


def test_workers_read_different_parts_in_an_order_that_repeats(captions):
    loaders = [DataLoader(captions.batches(8, seed=0), batch_size=None, num_workers=2) for _ in range(2)]
    first, again = ([texts for _, texts in itertools.islice(loader, 8)] for loader in loaders)
    assert first[::2] != first[1::2] and first == again


def test_a_mistake_of_ours_keeps_its_traceback(captions, tmp_path, monkeypatch):
    """Only decoding of a foreign file is caught: this would else be reported as 24 broken images."""
    images, stream = fill(tmp_path / "images", {"0.jpg": 0}), iter(captions.batches(8, seed=0))
    monkeypatch.setattr(data, "as_shown", lambda image: {}["ours"])
    readers = [lambda: load_images(images), lambda: reference_set(images, "train", 8)[[0]]]
    for read in [*readers, lambda: next(stream), lambda: Captions(captions.data, 8)]:
        with pytest.raises(KeyError, match="ours"):
            read()
