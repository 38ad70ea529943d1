"""Images in, batches in order, and bad input refused with one clear line."""

import itertools
import logging

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import BadInput, EndlessBatches, load_images


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
