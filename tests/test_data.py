"""Where x_0 comes from: what a person sees is what is trained on, classes keep their numbers, bad files are skipped."""

import io
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path

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


def grey(level=0, size=(8, 8), format="JPEG", mode="L", **options) -> bytes:
    """An image of one colour; its level of grey is its number, so that tests can tell images apart."""
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, format, **options)
    return file.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> str:
    """A folder of these files. What ends in .png or .jpg and has a number for content is an image of that level."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(name, content))
    return str(folder)


def as_bytes(name: str, content: bytes | str | int) -> bytes:
    if isinstance(content, int):
        return grey(content, format="PNG" if name.lower().endswith("png") else "JPEG")
    return content.encode() if isinstance(content, str) else content


def shard(path: Path, files: dict[str, bytes | str | int], mode="w") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(as_bytes(name, content))
            tar.addfile(member, io.BytesIO(as_bytes(name, content)))
    return str(path)


def numbered(*numbers: int) -> dict[str, bytes | str | int]:
    return {f"{n:03d}{ending}": content for n in numbers for ending, content in ((".jpg", n), (".txt", str(n)))}


def drawn(captions: Captions, batches=12, **options) -> list[tuple[int, str]]:
    """Levels and captions that the stream shows, a dozen batches of eight."""
    stream = itertools.islice(captions.batches(8, **{"seed": 0} | options), batches)
    return [(round(x.float().mean().item()), text) for pixels, texts in stream for x, text in zip(pixels, texts)]


def shown(captions: Captions) -> list[str]:
    """The captions among them, each once; and each with its own image, whose level it is."""
    pairs = drawn(captions)
    assert all(abs(level - int(text)) <= 1 for level, text in pairs)
    return sorted({text for _, text in pairs}, key=int)


# -- points ------------------------------------------------------------------------------------------------------------


def test_points_are_the_same_each_time_and_others_in_each_split():
    train, test = Points("toy:moons"), Points("toy:moons", "test")
    x, label = train[[3, 1]]
    assert x.shape == (2, 2) and len(train) == 2**16 and torch.equal(x, Points("ideal:moons").samples[[3, 1]])
    assert torch.equal(label, train.labels[[3, 1]]) and not torch.equal(train.samples, test.samples)
    assert torch.equal(reference_set("toy:moons", "test", None), test.samples)
    for name, split in [("toy:moon", "train"), ("toy:moons", "val")]:
        with pytest.raises(BadInput, match="unknown 2-D distribution 'toy:moon': .*toy:moons|splits train and test"):
            Points(name, split)


# -- one image (issue 24, point 5) -------------------------------------------------------------------------------------

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")  # its red is our green
PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([9, 9, 9, 200, 100, 50])
WHITE = (255, 255, 255)


def saved(image: Image.Image, format="PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, seen",
    [
        (grey((9, 8, 7), mode="RGB", format="PNG"), (9, 8, 7)),
        (grey((255, 0, 0, 0), mode="RGBA", format="PNG"), WHITE),
        (grey((0, 0, 0, 128), mode="RGBA", format="PNG"), (127, 127, 127)),
        (grey((255, 0, 0, 0), mode="RGBA", format="WEBP", lossless=True, exact=True), WHITE),
        (grey((0, 0), mode="LA", format="PNG"), WHITE),
        (grey(7, format="PNG", transparency=7), WHITE),
        (grey(7, format="PNG", transparency=8), (7, 7, 7)),
        (grey(0, mode="1", format="PNG", transparency=0), WHITE),
        (grey(1, mode="1", format="PNG"), WHITE),
        (grey((1, 2, 3), mode="RGB", format="PNG", transparency=(1, 2, 3)), WHITE),
        (saved(PALETTE), (200, 100, 50)),
        (saved(PALETTE, transparency=1), WHITE),
        (saved(PALETTE, transparency=bytes([255, 0])), WHITE),
        (grey(128 * 256, mode="I;16", format="PNG"), (128, 128, 128)),
        (grey(300, mode="I;16", format="PNG", transparency=300), WHITE),
        (grey(100, mode="L"), (100, 100, 100)),
        (grey((255, 0, 0, 0), mode="CMYK"), (0, 255, 255)),
        (grey((255, 0, 0), mode="RGB", format="PNG", icc_profile=SWAPPED), (0, 255, 0)),
        (grey((255, 0, 0, 255), mode="RGBA", format="PNG", icc_profile=SWAPPED), (0, 255, 0)),
        (grey((9, 8, 7), mode="RGB", format="PNG", icc_profile=b"no profile"), (9, 8, 7)),
        (grey(100, format="PNG", icc_profile=SRGB), (100, 100, 100)),  # a profile of another mode
    ],
)
def test_every_reader_sees_what_a_viewer_shows(tmp_path, content, seen):
    assert np.abs(all_readers(tmp_path, content) - np.array(seen)).max() <= 1


def all_readers(folder: Path, content: bytes) -> np.ndarray:
    """The pixels (H, W, 3) of one image, which must be the same for training, for captions and to be measured by."""
    fill(folder, {"0.png": content, "0.txt": "0"})
    natural = load_images(folder).samples[0]
    size = natural.shape[-1]
    captions, _ = next(iter(Captions(str(folder), size).batches(1, 0)))
    for pixels in (load_images(folder, resolution=size).samples, captions, reference_set(str(folder), "train", size)[[0]]):
        assert torch.equal(pixels[0], natural) and pixels.dtype == torch.uint8
    return natural.permute(1, 2, 0).numpy().astype(int)


TURNED = {  # how the stored rows and columns are shown
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.T, 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_camera_held_upright_gives_an_upright_image(tmp_path, orientation, format):
    stored, exif = np.kron([[0, 80], [160, 240]], np.ones((8, 8))).astype(np.uint8), Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(stored).convert("RGB"), format, exif=exif.tobytes())
    assert np.abs(all_readers(tmp_path, content) - TURNED[orientation](stored)[..., None]).max() <= 3


def test_exif_that_cannot_be_read_does_not_lose_the_image(tmp_path):
    content = grey((9, 8, 7), mode="RGB", format="PNG", exif=b"Exif\0\0garbage")
    assert (all_readers(tmp_path, content) == (9, 8, 7)).all()


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (16, 16), (40, 8), (6, 4)])
def test_the_centre_is_kept_and_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    cropped = F.center_crop(image, [min(size)] * 2)
    wanted = F.pil_to_tensor(F.resize(cropped, [8, 8], F.InterpolationMode.LANCZOS))
    assert torch.equal(centre_square(image, 8), wanted) and wanted.dtype == torch.uint8


# -- images by class (issue 24, point 6) -------------------------------------------------------------------------------


def test_pixels_labels_and_mirror_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    fill(tmp_path, {f"train/{c}/0.png": saved(Image.fromarray(x)) for c, x in zip("ab", pixels, strict=True)})
    images = load_images(tmp_path, mirror=True)
    assert len(images) == 4 and images.classes == ["a", "b"] and images.samples.dtype == torch.uint8
    for indices in ([0, 1, 2, 3], torch.arange(4)):
        x, labels = images[indices]
        assert labels.tolist() == [0, 1, 0, 1]
        got = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert (got == np.concatenate([pixels, pixels[:, :, ::-1]])).all()
    assert to_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


CAT_AND_DOG = {"cat/0.png": 0, "dog/0.png": 1}


@pytest.mark.parametrize(
    "files, classes, labels",
    [
        (CAT_AND_DOG, ["cat", "dog"], [0, 1]),
        ({"train/cat/0.PNG": 0, "train/dog/0.jpeg": 1, "test/emu/0.png": 2}, ["cat", "dog"], [0, 1]),
        ({"cat/day1/0.png": 0, "dog/day1/0.png": 1, "dog/day2/left/0.png": 2}, ["cat", "dog"], [0, 1, 1]),
        (CAT_AND_DOG | {".ipynb_checkpoints/0.png": 2, "cat/.ipynb_checkpoints/0.png": 2}, ["cat", "dog"], [0, 1]),
        (CAT_AND_DOG | {"__MACOSX/cat/._0.png": 2, "@eaDir/0.png": 2, "cat/._0.png": "x"}, ["cat", "dog"], [0, 1]),
        (CAT_AND_DOG | {"$RECYCLE.BIN/0.png": 2, "bird/readme.txt": ""}, ["cat", "dog"], [0, 1]),
        ({"train_station/0.png": 0, "valley/0.png": 1}, ["train_station", "valley"], [0, 1]),
        ({"0.png": 0, "1.png": 1, "__init__.png": 2}, [""], [0, 0, 0]),
    ],
)
def test_a_class_is_the_first_folder_that_holds_images(tmp_path, files, classes, labels):
    images = load_images(fill(tmp_path / ".hidden", files))
    assert images.classes == classes and images.labels.tolist() == labels
    assert len(reference_set(str(tmp_path / ".hidden"), "train", 8)) == len(labels)


def test_a_class_may_be_a_link(tmp_path):
    fill(tmp_path, {"all/dogs/0.png": 0, "set/cat/0.png": 1})
    (tmp_path / "set/dog").symlink_to(tmp_path / "all/dogs")
    assert load_images(tmp_path / "set").classes == ["cat", "dog"]


def test_the_test_split_is_numbered_by_the_train_split(tmp_path):
    fill(tmp_path, {f"train/{c}/0.png": 0 for c in ("cat", "dog", "emu")} | {"test/emu/0.png": 1, "test/dog/0.png": 2})
    images = load_images(tmp_path, "test")
    assert images.classes == ["cat", "dog", "emu"] and images.labels.tolist() == [1, 2]
    fill(tmp_path, {"test/fox/0.png": 3})
    with pytest.raises(BadInput, match=r"1 images lie in no class of the train split, such as .*test/fox/0\.png"):
        load_images(str(tmp_path), "test")
    assert len(reference_set(str(tmp_path), "test", 8)) == 3  # to measure against, classes do not matter


@pytest.mark.parametrize(
    "files, split, why",
    [
        ({"training/cat/0.png": 0, "test/cat/0.png": 1}, "train", "has the folders test, training: .* must be in .*/train"),
        ({"Train/0.png": 0, "Test/0.png": 1}, "train", "has the folders Test, Train"),
        ({"train2017/0.png": 0, "val2017/0.png": 1}, "train", "has the folders train2017, val2017"),
        ({"training_set/0.png": 0, "test_set/0.png": 1}, "train", "has the folders test_set, training_set"),
        ({"test/0.png": 0}, "train", "has the folders test"),
        ({"train/0.png": 0}, "test", "no such folder: .*test"),  # never the training images in its place
        (CAT_AND_DOG, "test", "no such folder: .*test"),
        ({"cat.txt": ""}, "train", r"no images \(\.jpg, \.jpeg, \.png, \.webp\) in"),
    ],
)
def test_no_split_is_taken_for_another(tmp_path, files, split, why):
    folder = fill(tmp_path, files)
    readers = [lambda: load_images(folder, split), lambda: reference_set(folder, split, 8)]
    for read in readers + [lambda: Captions(folder, 8)] * ("has the folders" in why):
        with pytest.raises(BadInput, match=why):
            read()


def test_broken_images_are_skipped_counted_and_named_once(tmp_path, caplog):
    whole = grey(0, (64, 64))
    broken = {"cut.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": "no image", "gif.jpg": grey(format="GIF")}
    fill(tmp_path, {f"train/a/{name}": content for name, content in broken.items()} | {"train/b/0.jpg": 5, "train/c/0.jpg": 9})
    images = load_images(tmp_path)
    assert images.labels.tolist() == [1, 2] and images.samples[:, 0, 0, 0].tolist() == [5, 9]
    assert reference_set(str(tmp_path), "train", 4)[torch.arange(6)].shape == (2, 3, 4, 4)
    for record in caplog.records:
        assert "6 images: 4 skipped" in record.message and all(record.message.count(name) == 1 for name in broken)
    assert len(caplog.records) == 2
    (tmp_path / "train/b/0.jpg").unlink()
    (tmp_path / "train/c/0.jpg").unlink()
    assert reference_set(str(tmp_path), "train", 4)[torch.arange(4)].shape == (0, 3, 4, 4)
    with pytest.raises(BadInput, match="no readable images in .*: all 4 are broken"):
        load_images(str(tmp_path))


def test_images_of_several_sizes_need_a_resolution(tmp_path):
    fill(tmp_path, {"a/0.png": grey(size=(4, 4), format="PNG"), "a/1.png": grey(size=(6, 4), format="PNG")})
    with pytest.raises(BadInput, match=r"1\.png is 6x4 pixels, expected 4x4"):
        load_images(tmp_path)
    assert load_images(tmp_path, resolution=2).samples.shape == (2, 3, 2, 2)


def test_cifar10_comes_from_torchvision_or_says_why_not(tmp_path, monkeypatch):
    class Downloaded:
        classes = ["x", "y", "z"]

        def __init__(self, root, train, download):
            assert download
            self.data, self.targets = np.full((3, 32, 32, 3), 7 + train, np.uint8), [0, 1, 2] if train else [2, 2, 1]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    images = load_images(tmp_path / "cifar10", "test")
    assert (images.samples == 7).all() and images.samples.shape == (3, 3, 32, 32)
    assert images.labels.tolist() == [2, 2, 1] and images.classes == ["x", "y", "z"]
    assert reference_set(str(tmp_path / "cifar10"), "train", 8)[[2]].shape == (1, 3, 8, 8)
    with pytest.raises(BadInput, match="splits train and test, not val"):
        load_images(tmp_path / "cifar10", "val")
    assert load_images(fill(tmp_path / "cifar10_png", CAT_AND_DOG)).classes == ["cat", "dog"]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(BadInput, match="could not be downloaded: no network"):
        load_images(tmp_path / "cifar10", "train")


# -- what lies in a folder and is no good file -------------------------------------------------------------------------


def fifo(path: Path):
    """A pipe. Who opens it gets a "{", and is not left waiting: these tests are to fail, not to hang."""
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=["{"], daemon=True).start()


@pytest.mark.parametrize(
    "name, make, kept",
    [
        ("x.jpg", fifo, ["0", "1"]),
        ("x.jpg", lambda path: path.mkdir(), ["0", "1"]),
        ("x.jpg", lambda path: os.mknod(path, stat.S_IFSOCK), ["0", "1"]),
        ("x.jpg", lambda path: path.symlink_to("/dev/null"), ["0", "1"]),
        ("001.txt", fifo, ["0"]),
        ("001.txt", lambda path: path.mkdir(), ["0"]),
        ("metadata.jsonl", fifo, ["0", "1"]),
    ],
)
def test_what_is_no_file_is_never_opened(tmp_path, name, make, kept, caplog):
    fill(tmp_path, numbered(0, 1))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert len(load_images(tmp_path)) == 2 and not caplog.records
    assert shown(Captions(str(tmp_path), 8)) == kept


@pytest.mark.parametrize("action, kept", [("ignore", ["0", "1"]), ("error", ["0"])])
def test_images_that_would_fill_the_memory_are_skipped(tmp_path, monkeypatch, action, kept):
    """PIL warns at its limit, and raises at twice that. Skipped, too, are other formats than the names promise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    sizes = [(8, 8), (12, 12), (20, 20)]
    files = {f"{i}.png": grey(i, size, "PNG") for i, size in enumerate(sizes)} | {"3.png": grey(3, format="BMP")}
    fill(tmp_path, files | {f"{i}.txt": str(i) for i in range(4)})
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert len(load_images(tmp_path, resolution=4)) == len(kept)
        assert shown(Captions(str(tmp_path), 8)) == kept


# -- captions in a folder (issue 24, point 12) -------------------------------------------------------------------------

LINES = '{"file_name": "0.jpg", "text": "0"}\n{"file_name": "./a/1.JPG", "caption": "1"}\n\n'


@pytest.mark.parametrize(
    "files, kept, named",
    [
        (numbered(0, 1), ["0", "1"], []),
        ({"0.png": 0, "0.txt": "\ufeff0\n", "1.webp": grey(1, format="WEBP"), "1.TXT": " 1 "}, ["0", "1"], []),
        ({"0.jpg": 0, "0.txt": "0".encode("utf-16"), "1.jpg": 1, "1.txt": "12 "[:1].encode("utf-8-sig")}, ["0", "1"], []),
        ({"0.jpg": 0, "0.json": '{"caption": "0"}', "1.jpg": 1, "1.json": '\ufeff{"text": "1"}'}, ["0", "1"], []),
        ({"0.jpg": 0, "0.json": "{", "0.txt": "0", "1.jpg": 1, "1.json": "[]", "1.txt": "1"}, ["0", "1"], []),
        ({"0.jpg": 0, "0.json": '{"caption": "9"}', "0.txt": "0"}, ["0"], []),  # a txt goes first
        ({"0.jpg": 0, "0.json": '{"caption": "0"}', "0.txt": " \n"}, ["0"], []),
        ({"0.jpg": 0, "a/1.jpg": 1, "metadata.jsonl": LINES}, ["0", "1"], []),
        ({"train/0.jpg": 0, "train/a/1.jpg": 1, "train/metadata.jsonl": "\ufeff" + LINES}, ["0", "1"], []),
        ({"train/0.jpg": 0, "metadata.jsonl": '{"file_name": "train\\\\0.jpg", "text": "0"}'}, ["0"], []),
        ({"train/0.jpg": 0, "train/0.txt": "0", "test/1.jpg": 1, "test/1.txt": "1"}, ["0"], []),
        ({"caf\u00e9.jpg": 0, "cafe\u0301.txt": "0", "0.5.jpg": 1, "0.5.txt": "1"}, ["0", "1"], []),
        ({"._0.jpg": "x", "._0.txt": "x", ".git/0.jpg": 9, ".git/0.txt": "9", "0.jpg": 0, "0.txt": "0"}, ["0"], []),
        (numbered(0) | {"mute.jpg": 1, "alone.txt": "1"}, ["0"], ["mute: no caption", "alone: no image"]),
        (numbered(0) | {"metadata.jsonl": '{"file_name": "gone.jpg", "text": "1"}'}, ["0"], ["gone: no image"]),
        (numbered(0) | {"e.jpg": 1, "e.txt": " ", "n.jpg": 1, "n.json": '{"text": null}'}, ["0"], ["e: no cap", "n: no cap"]),
        (numbered(0) | {"1.jpg": 1, "1.png": 2, "1.txt": "1"}, ["0"], ["1: several images"]),
        (numbered(0) | {"1.jpg": "no image", "1.txt": "1"}, ["0"], ["1: not a sound image"]),
    ],
)
def test_captions_in_a_folder(tmp_path, files, kept, named, caplog):
    captions = Captions(fill(tmp_path, files), 8)
    assert shown(captions) == kept and len(caplog.records) == bool(named)  # one line for all of them
    assert all(caplog.text.count(name) == 1 for name in named) and f"{len(named)} skipped" * bool(named) in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_a_caption_may_be_of_any_editor(tmp_path, encoding):
    captions = Captions(fill(tmp_path, {"0.jpg": 0, "0.txt": "a café – 5 €\n".encode(encoding)}), 8)
    assert drawn(captions, 1)[0][1] == "a café – 5 €"


def test_half_of_a_character_does_not_reach_a_tokenizer(tmp_path):
    captions = Captions(fill(tmp_path, {"0.jpg": 0, "0.json": '{"caption": "a \\ud83d cat"}'}), 8)
    assert drawn(captions, 1)[0][1] == "a ? cat"


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}', '{"file_name": 3, "text": "a"}'])
def test_a_bad_line_of_metadata_is_named(tmp_path, line):
    fill(tmp_path, {"0.jpg": 0, "metadata.jsonl": '{"file_name": "0.jpg", "text": "0"}\n\n' + line})
    with pytest.raises(BadInput, match=r"metadata\.jsonl, line 3 is not "):
        Captions(str(tmp_path), 8)


# -- shards (issue 24, points 13 and 14) -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("{0..1}.tar", ["0", "1"]), ("0.tar::1.tar", ["0", "1"]), ("*.tar", ["0", "1"]), ("", ["0", "1", "2", "3"]),
        ("2.tgz", ["2"]), ("below/3.tar.gz", ["3"]), ("below", ["3"]), ("*.t*", ["0", "1", "2"]), ("split", ["4"]),
        ("dir.tar", ["5"]),
    ],
)  # fmt: skip
def test_how_shards_may_be_written(tmp_path, pattern, kept, monkeypatch):
    for name, n in [("0.tar", 0), ("1.tar", 1), ("2.tgz", 2), ("below/3.tar.gz", 3)]:
        shard(tmp_path / "set" / name, numbered(n), "w" if name.endswith(".tar") else "w:gz")
    fill(tmp_path / "set", {"0_stats.json": "{}"})  # img2dataset leaves such
    shard(tmp_path / "split/train/0.tar", numbered(4))
    shard(tmp_path / "split/test/0.tar", numbered(9))
    fill(tmp_path / "dir.tar", numbered(5))
    monkeypatch.chdir(tmp_path if pattern in ("split", "dir.tar") else tmp_path / "set")
    assert shown(Captions(pattern or ".", 8)) == kept


@pytest.mark.parametrize("name", ["9.tar", "{0..1}.tar", "*.tgz", "user/data-set", "0.tar::b.tar", "none", "fifo.tar"])
def test_what_is_not_there_says_how_it_is_written(tmp_path, name, monkeypatch):
    shard(tmp_path / "0.tar", numbered(0))
    fifo(tmp_path / "fifo.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="^no such folder or shard: ") as refused:
        Captions(name, 8)
    for word in ("'{00000..00099}.tar'", "'FOLDER/*.tar'", "URL", "hf download --repo-type dataset"):
        assert word in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", ["pipe:{0}", "0.tar::pipe:{0}", "{{pipe:{0},0.tar}}", "p{{ipe:{0},x.tar}}", "PIPE:{0}"])
def test_no_shell_runs(tmp_path, pattern, monkeypatch):
    shard(tmp_path / "0.tar", numbered(0))
    monkeypatch.chdir(tmp_path)
    for command in ("touch ran.tar", "touch ran.tar # http://x/0.tar"):
        with pytest.raises(BadInput, match="^no such folder or shard: .*ran.tar"):
            Captions(pattern.format(command), 8)
    assert not (tmp_path / "ran.tar").exists()


RULE = r"a pair is 0\.jpg with 0\.txt or 0\.json \(in a tar, next to each other, and with no other dot in their names\)"


@pytest.mark.parametrize(
    "files, counted",
    [
        ({"0.jpg": "no image", "0.txt": "0", "1.jpg": 1}, "2 skipped; .*0: not a sound image.*; .*1: no caption"),
        ({"0.v2.jpg": 0, "0.v2.txt": "0"}, "1 skipped; .*0: no image"),
        ({"0.jpg": 0, "1.jpg": 1, "0.txt": "0", "1.txt": "1"}, "4? skipped; .*0: no "),
        ({"0.gif": 0, "0.txt": "0"}, "1 skipped; .*0: no image"),
        ({"._0.jpg": 0, "._0.txt": "0"}, "0 skipped"),
        ({}, "0 skipped"),
    ],
)
def test_a_refusal_says_the_rule(tmp_path, files, counted):
    with pytest.raises(BadInput, match=f"no usable pair in .*: {counted}.*{RULE}"):
        Captions(shard(tmp_path / "a.tar", files), 8)


@pytest.mark.parametrize("files", [{}, {"0.jpg": 0, "1.jpg": 1}, {"0.txt": ""}, {"0.csv": ""}])
def test_a_folder_without_pairs_says_the_rule(tmp_path, files):
    with pytest.raises(BadInput, match=f"no usable pair in .*skipped.*{RULE}"):
        Captions(fill(tmp_path, files), 8)


def spoilt(folder: Path) -> str:
    """Usable pairs between one of each kind of trouble; one shard is cut in the middle, one is none."""
    whole = grey(0, (64, 64))
    members = {
        "d/._1.jpg": "x", "d/1.jpg": 1, "d/._1.txt": "x", "d/1.txt": "1",  # as macOS packs them
        "text.jpg": "no image", "text.txt": "9", "half.jpg": whole[: len(whole) // 2], "half.txt": "9",
        "imageless.txt": "9", "twice.jpg": 4, "twice.JPG": 4, "twice.txt": "4",
        "broken.jpg": 5, "broken.json": "{", "broken.txt": "5",
        "2.PNG": 2, "2.json": '{"caption": "2", "pwatermark": null, "original_width": "x"}',
    }  # fmt: skip
    shard(folder / "0.tar", members)
    torn = shard(folder / "1.tar", {"000.jpg": 3, "000.txt": "3", "001.jpg": 7, "001.txt": "7" * 600})
    os.truncate(torn, 512 * 9 + 100)  # in the middle of 001.txt
    (folder / "2.tar").write_text("no tar at all")
    shard(folder / "3.tar", {"001.txt": "6", "001.jpg": 6})  # must not be 001's caption in the torn one
    return f"{folder}/{{0..3}}.tar"


def test_broken_members_are_skipped_counted_and_named_once(tmp_path, caplog):
    captions = Captions(spoilt(tmp_path), 8)
    assert shown(captions) == ["1", "2", "3", "4", "5", "6"]
    first, *others = caplog.records
    assert "such" not in first.message and not others
    assert [name for name in ("text", "half", "imageless") if f"0.tar/{name}: " in first.message]
    assert f"{len(captions.skipped)} skipped" in first.message and first.message.count("0.tar/half") == 1


def test_a_stream_tells_seldom(tmp_path, caplog):
    """A line when the number has doubled, and none twice: not one for each of these 64."""
    bad = {f"bad{i}{ending}": "9" for i in range(64) for ending in (".jpg", ".txt")}
    captions = Captions(shard(tmp_path / "0.tar", numbered(*range(40)) | bad), 8)
    assert not caplog.records  # the first pairs are good
    drawn(captions, 40)
    assert 1 <= len(caplog.records) <= 7 and caplog.text.count("bad0:") <= 1
    assert any("64 skipped" in record.message or "skipped" in record.message for record in caplog.records)


@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.parametrize(
    "wanted, kept",
    [((0, 1.0), "0123456"), ((20, 1.0), "2456"), ((0, 0.5), "012346"), ((20, 0.5), "246")],
)
def test_filters(tmp_path, source, wanted, kept):
    facts = [
        ({}, (8, 8)),
        ({}, (20, 8)),  # the smaller side counts
        ({"original_width": 20, "original_height": 20}, (8, 8)),  # of the original, where it is known
        ({"original_width": 20, "original_height": 8}, (20, 20)),
        ({"pwatermark": None}, (20, 20)),
        ({"pwatermark": 0.7}, (20, 20)),
        ({"pwatermark": 0.2}, (20, 20)),
    ]
    files = {}
    for i, (known, size) in enumerate(facts):
        files |= {f"{i}.jpg": grey(i, size), f"{i}.json": json.dumps({"caption": str(i), **known})}
    where = fill(tmp_path, files) if source == "folder" else shard(tmp_path / "0.tar", files)
    assert shown(Captions(where, 8, *wanted)) == list(kept)
    with pytest.raises(BadInput, match="no usable pair in .*: 7 skipped; .*0: filtered"):
        Captions(where, 8, min_image_size=21)


# -- the stream --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "shards"])
def captions(tmp_path, request) -> Captions:
    if request.param == "folder":
        return Captions(fill(tmp_path, numbered(*range(24))), 8)
    for i in range(8):
        shard(tmp_path / f"{i}.tar", numbered(*range(3 * i, 3 * i + 3)))
    return Captions(f"{tmp_path}/{{0..7}}.tar", 8)


def test_the_order_is_a_function_of_the_arguments(captions):
    reference = drawn(captions)
    assert len(reference) == 96 and drawn(captions) == reference  # batches are whole
    others = [drawn(captions, **options) for options in ({"seed": 1}, {"seed": 2**31}, {"rank": 1, "world": 2}, {"world": 2})]
    assert all(reference != other for other in others) and others[2] != others[3]


def test_all_pairs_are_drawn_alike(captions):
    counts = np.bincount([int(text) for _, text in drawn(captions, 150)], minlength=24)  # 50 each
    assert counts.min() > 20 and counts.max() < 100


def test_workers_read_different_parts_in_an_order_that_repeats(captions):
    def read() -> list[list[str]]:
        loader = DataLoader(captions.batches(8, seed=0), batch_size=None, num_workers=2)
        return [texts for _, texts in itertools.islice(loader, 8)]

    batches = read()
    assert batches[::2] != batches[1::2] and batches == read()


def test_what_a_loader_gets_can_be_sent(captions):
    sent = pickle.loads(pickle.dumps(captions.batches(8, seed=0)))
    assert [texts for _, texts in itertools.islice(sent, 2)] == [
        texts for _, texts in itertools.islice(captions.batches(8, seed=0), 2)
    ]


def test_a_mistake_of_ours_keeps_its_traceback(captions, tmp_path, monkeypatch):
    """Only decoding of a foreign file is caught: this would else be reported as 24 broken images."""
    images, reference = tmp_path / "images", captions.batches(8, seed=0)
    fill(images, {"0.jpg": 0})
    monkeypatch.setattr(data, "as_shown", lambda image: {}["ours"])
    for read in (
        lambda: next(iter(reference)),
        lambda: Captions(captions.data, 8),
        lambda: load_images(images),
        lambda: reference_set(str(images), "train", 8)[[0]],
    ):
        with pytest.raises(KeyError, match="ours"):
            read()


def test_a_stream_that_has_lost_its_data_ends(tmp_path):
    captions = Captions(shard(tmp_path / "0.tar", numbered(0)), 8)
    stream = iter(captions.batches(1, seed=0))
    next(stream)
    (tmp_path / "0.tar").write_text("no tar at all")
    with pytest.raises(BadInput, match="nothing usable any more"):
        list(itertools.islice(stream, 5000))


def test_importing_is_quick():
    code = "import data, sys; print([name for name in ('webdataset', 'torchvision', 'diffusers') if name in sys.modules])"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"
