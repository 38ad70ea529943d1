"""Measures against brute force, closed forms and open_clip; feature extractors from a file that cannot run code."""

import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from data import BadInput
from metrics import ClipScore, ImageFeatures, mmd, wasserstein2

CPU = torch.device("cpu")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_w2_is_the_best_of_all_pairings():
    a, b = seeded(6, 2), seeded(6, 2, seed=1)
    pairings = (sum((a[i] - b[p[i]]).square().sum() for i in range(6)) / 6 for p in itertools.permutations(range(6)))
    assert wasserstein2(a, b) == pytest.approx(min(pairings).sqrt().item(), rel=1e-5)


def test_w2_of_a_shift_is_its_length_in_data_units():
    a = seeded(200, 2)
    assert wasserstein2(a, (a + torch.tensor([3.0, 4.0]))[torch.randperm(200)]) == pytest.approx(5, rel=1e-5)


def test_mmd_is_the_unbiased_estimate_of_its_definition():
    a, b = seeded(40, 2), seeded(40, 2, seed=1) + 1
    total = 0.0
    for h in (0.1, 0.3, 1.0):
        k = lambda x, y, h=h: np.exp(-np.sum((x - y) ** 2) / (2 * h * h))  # noqa: E731
        points = [p.double().numpy() for p in a], [p.double().numpy() for p in b]
        inside = sum(k(x, y) for p in points for i, x in enumerate(p) for j, y in enumerate(p) if i != j) / (40 * 39)
        total += (inside - 2 * np.mean([k(x, y) for x in points[0] for y in points[1]])) / 3
    assert mmd(a, b) == pytest.approx(np.sqrt(total), rel=1e-6)
    assert mmd(seeded(500, 2), seeded(500, 2, seed=1)) < 0.05 < 0.2 < mmd(a, b)


def test_fid_is_the_frechet_distance_of_the_features(means):
    """Against the closed form |μ_a - μ_b|² + tr(A + B - 2 sqrt(AB)) by scipy."""
    a, b = (seeded(300, 3, 8, 8, seed=s).mul(30).add(120).byte() for s in (0, 1))
    b = b // 2 + 10
    fa, fb = (x.double().mean((2, 3)).numpy() for x in (a, b))
    cov_a, cov_b = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    wanted = np.sum((fa.mean(0) - fb.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    measure = ImageFeatures(str(means), b, CPU)
    for batches in ([a], a.split(7)):
        for batch in batches:
            measure.update(batch, [])
        assert measure.result() == {"FD": pytest.approx(wanted, rel=1e-3)}
    measure.update(b, [])
    assert measure.result()["FD"] == pytest.approx(0, abs=1e-3)  # the sets before are forgotten


def test_prompt_accuracy_counts_prompts_that_name_one_class(means):
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0], blue[2] = 200, 200
    measure = ImageFeatures(str(means), torch.stack([red, blue]), CPU)
    pairs = [
        (red, "a photo of a Red thing", True),
        (blue, "something blue", True),
        (blue, "a red one", False),
        (red, "the green", False),
        (red, "credit, redder", None),  # no name of a class
        (red, "red and blue", None),
    ]
    images, texts, right = zip(*pairs, strict=True)
    for i in (0, 3):  # two batches
        measure.update(torch.stack(images[i : i + 3]), texts[i : i + 3])
    assert measure.result()["prompt accuracy"] == right.count(True) / (right.count(True) + right.count(False))
    measure.update(torch.stack(images), [])
    assert "prompt accuracy" not in measure.result()


def test_clip_score_is_the_mean_cosine_of_image_and_prompt(clip):
    images = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0)).byte()
    texts = ["a cat", "a dog on a boat", "nothing"]
    name, weights = clip.split("/", 1)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    total = 0.0
    with torch.no_grad():
        for image, text in zip(images, texts, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            a = model.eval().encode_image(preprocess(picture)[None])[0].double().numpy()
            b = model.encode_text(open_clip.get_tokenizer(name)([text]))[0].double().numpy()
            total += a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 3
    measure = ClipScore(clip, CPU)
    measure.update(images[:2], texts[:2])
    measure.update(images[2:], texts[2:])
    assert measure.result() == {"CLIP": pytest.approx(total, rel=1e-4)} and clip in measure.name
    assert measure.result() == {}
    for wrong in ("tiny-test", "tiny-test/missing.pt", "no-such-model/laion2b"):
        with pytest.raises(BadInput, match=wrong):
            ClipScore(wrong, CPU)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_feature_file_cannot_run_code(means, tmp_path):
    payload = io.BytesIO()
    torch.save(Evil(tmp_path / "owned"), payload)
    with zipfile.ZipFile(means) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = [name for name, content in members.items() if content[:2] == b"PK" or name.endswith(".pt")]
    assert pickled  # torch.export does keep torch.save files inside, which is why this test exists
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, payload.getvalue() if name in pickled else content)
    with pytest.raises(BadInput, match="evil.pt2"):
        ImageFeatures(str(tmp_path / "evil.pt2"), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), CPU)
    assert not (tmp_path / "owned").exists()
