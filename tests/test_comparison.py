"""The table: rows, map errors, several students, and images that are kept in a folder."""

import numpy as np
import pytest
import torch
from conftest import save, unet
from PIL import Image

import sample
from comparison import compare, spread
from data import BadInput, ImageFiles, centre_square, load_images
from kinds import ImageTeacher, StableDiffusion, to_pixels
from teacher import load
from toy import PointMLP


def test_the_table_has_the_floor_the_teacher_the_student_and_map_errors(tmp_path):
    torch.manual_seed(0)
    teacher = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False)))
    student = teacher.student(teacher.network.state_dict(), 50)
    rows, samples, _ = compare(
        {"student": student}, teacher, "toy:moons", steps=[1, 2], teacher_steps=[1, 8], num_samples=64
    )
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


@pytest.fixture
def counting(monkeypatch):
    """A measure that stands in for Inception: the mean of all pixels, and the prompts that came with them."""

    class Counting:
        name, values, texts = "the mean", (), ""

        def update(self, samples, texts):
            self.values = *self.values, *samples.float().mean((1, 2, 3)).tolist()
            self.texts += "".join(texts)

        def result(self):
            values, texts, self.values, self.texts = self.values, self.texts, (), ""
            return {"mean": float(np.mean(values)), "n": len(values), "texts": texts}

    monkeypatch.setattr(ImageTeacher, "measures", lambda *_: [Counting()])
    monkeypatch.setattr(ImageTeacher, "texts", lambda *_: ["a", "b"])


def test_images_kept_in_a_folder_are_the_same_and_are_not_made_again(images, counting, tmp_path):
    teacher = load(str(save(tmp_path / "teacher", unet(size=32))))
    one, two = (teacher.student(teacher.network.state_dict(), 50) for _ in range(2))
    one.name, two.name = "runs/one", "runs/two"
    torch.nn.init.normal_(two.network.conv_out.weight, std=0.1)

    def rows(**options):
        students = {"one": one, "two": two}
        options = {"steps": [1, 2], "teacher_steps": [3], "num_samples": 7, "batch_size": 3} | options
        return compare(students, teacher, str(images), **options).rows

    streamed, kept = rows(), rows(samples_dir=tmp_path / "kept")
    assert [row["sampler"] for row in kept] == ["held-out data", "teacher, DDIM", "one", "one", "two", "two"]
    assert len({row["mean"] for row in kept}) == 6
    assert [row["texts"] for row in streamed] == ["", *["abababa"] * 5] == [row["texts"] for row in kept]
    for a, b in zip(streamed, kept, strict=True):
        assert a["mean"] == pytest.approx(b["mean"], abs=1e-6) and a["n"] == b["n"] == min(7, 24)
        assert ("map error" in a) == ("map error" in b)  # whose values differ, since files are clipped

    files = sorted((tmp_path / "kept").rglob("*.png"))
    assert len(files) == 5 * 7
    before = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()  # as if interrupted
    again = rows(samples_dir=tmp_path / "kept", batch_size=2)
    assert [row["mean"] for row in again] == pytest.approx([row["mean"] for row in kept])
    assert {file for file in files if file.stat().st_mtime_ns != before[file]} == {files[3]}
    with pytest.raises(BadInput, match="other flags"):
        rows(samples_dir=tmp_path / "kept", mixed_precision="bf16")
    torch.nn.init.normal_(one.network.conv_out.weight, std=0.1)  # trained further, under the same name
    with pytest.raises(BadInput, match="another model"):
        rows(samples_dir=tmp_path / "kept")


def test_all_images_are_brought_to_the_resolution_by_lanczos_and_the_broken_are_left_out(tmp_path):
    """The protocol of COCO-2014: the centre square at 256 pixels, here 8, of both sides."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    files = ImageFiles([tmp_path / "a.png", tmp_path / "b.png"], 8)
    wanted = np.asarray(Image.fromarray(pixels[:, 8:32]).resize((8, 8), Image.Resampling.LANCZOS))
    assert (files[torch.tensor([0, 1])].permute(0, 2, 3, 1).numpy() == wanted).all()
    assert files[torch.tensor([1])].shape == (0, 3, 8, 8)
    x0 = torch.from_numpy(pixels[:, 8:32].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert (StableDiffusion.measured(None, x0, 8)[0].permute(1, 2, 0).numpy() == wanted).all()
    assert (StableDiffusion.measured(None, x0, None).permute(0, 2, 3, 1).numpy() == to_pixels(x0)).all()
    assert centre_square(Image.fromarray(pixels), 24).permute(1, 2, 0).numpy().tolist() == pixels[:, 8:32].tolist()
