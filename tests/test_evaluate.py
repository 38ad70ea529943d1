"""Distances against brute force and closed forms; feature extractors from a file that cannot run code."""

import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line, save, unet
from scipy.linalg import sqrtm

import evaluate
import sample
from data import BadInput, load_images
from evaluate import FrechetDistance, compare, mmd, spread, wasserstein2
from teacher import load
from toy import PointMLP


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


class Means(torch.nn.Module):
    """A feature extractor whose Fréchet distance is known: the mean of each channel."""

    def forward(self, pixels):
        means = pixels.float().mean((2, 3))
        return means, means


@pytest.fixture
def means(tmp_path) -> Path:
    example = (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),)
    dynamic = {"pixels": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(Means(), example, dynamic_shapes=dynamic), tmp_path / "means.pt2")
    return tmp_path / "means.pt2"


def test_fid_is_the_frechet_distance_of_the_features(means):
    """Against the closed form |μ_a - μ_b|² + tr(A + B - 2 sqrt(AB)) by scipy."""
    a, b = (seeded(300, 3, 8, 8, seed=s).mul(30).add(120).byte() for s in (0, 1))
    b = b // 2 + 10
    fa, fb = (x.double().mean((2, 3)).numpy() for x in (a, b))
    cov_a, cov_b = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    wanted = np.sum((fa.mean(0) - fb.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    distance = FrechetDistance(str(means), b, torch.device("cpu"))
    assert distance(a)["FD"] == pytest.approx(wanted, rel=1e-3)
    assert distance(b)["FD"] == pytest.approx(0, abs=1e-3)
    assert distance(b.float() / 127.5 - 1)["FD"] == pytest.approx(0, abs=1e-3)  # x_0 in [-1, 1] is the same images


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
        FrechetDistance(str(tmp_path / "evil.pt2"), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))
    assert not (tmp_path / "owned").exists()


def test_the_table_has_the_floor_the_teacher_the_student_and_map_errors(tmp_path):
    torch.manual_seed(0)
    teacher = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False)))
    student = teacher.student(teacher.network.state_dict(), 50)
    rows, samples, _ = compare(student, teacher, "toy:moons", steps=[1, 2], teacher_steps=[1, 8], num_samples=64)
    names = [(row["sampler"], row["steps"]) for row in rows[1:]]
    assert names == [("teacher, DDIM", 8), ("teacher, DDIM", 1), ("student", 1), ("student", 2)]
    endpoint, one = (sample.sample(teacher, range(64), n, "ddim") for n in (8, 1))
    assert rows[2]["map error"] == pytest.approx((one - endpoint).square().sum(1).sqrt().mean().item(), rel=1e-4)
    assert "map error" not in rows[1] and "map error" not in rows[4]  # the endpoint itself; a sampler with fresh noise
    # An untrained student is the teacher, and its one step is DDIM's one step.
    assert rows[3]["map error"] == pytest.approx(rows[2]["map error"], rel=1e-3)
    assert rows[0]["W2"] < min(row["W2"] for row in rows[1:]) and len(samples) == 5


def test_held_out_data_come_from_all_classes(images):
    data = load_images(images, "test")
    chosen = data.labels[spread(len(data.labels), 6)]
    assert set(chosen.tolist()) == {0, 1, 2} and spread(3, 10).tolist() == [0, 1, 2]


def test_bad_flags_end_in_one_line_and_status_2(images, tmp_path, call):
    t = save(tmp_path / "t", unet(size=32))
    flags = ["--pretrained_teacher_model", t, "--data", images, "--guidance_w", 0, "--num_samples", 4]
    status, _, err = call(evaluate.main, t)
    assert status == 2 and "--pretrained_teacher_model" in one_line(err)
    status, _, err = call(evaluate.main, t, *flags, "--features", tmp_path / "missing.pt2")
    assert status == 2 and "missing.pt2" in one_line(err)
    (tmp_path / "junk.pt2").write_text("junk")
    status, _, err = call(evaluate.main, t, *flags, "--features", tmp_path / "junk.pt2")
    assert status == 2 and "junk.pt2" in one_line(err)
    status, _, err = call(evaluate.main, "features", "--data", tmp_path, "--out", tmp_path / "f.pt2")
    assert status == 2 and "no images" in one_line(err)
