"""Measures against brute force, closed forms and open_clip; the table; the error of Fig. 2(c); refusals."""

import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, classifier, one_line, save, unet
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm

import evaluate
import sample
from data import BadInput, ImageFiles, centre_square, load_images
from evaluate import ClipScore, Evaluation, ImageFeatures, approximated_errors, compare, mmd, spread, wasserstein2
from sample import to_pixels
from teacher import ImageModel, load
from teacher import save as save_model
from toy import features
from toy.mlp import PointMLP

CPU = torch.device("cpu")


# -- measures --------------------------------------------------------------------------------------------------------


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
    fa, fb = (x.amax((2, 3)).double().numpy() / 127.5 for x in (a, b))  # see conftest.classifier
    cov_a, cov_b = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    wanted = np.sum((fa.mean(0) - fb.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    measure = ImageFeatures(str(means), b, CPU)
    for batches in ([a], a.split(7)):
        for batch in batches:
            measure.update(batch, [])
        assert measure.result() == {"FD": pytest.approx(wanted, rel=1e-3)}
    measure.update(b, [])
    assert measure.result()["FD"] == pytest.approx(0, abs=1e-6)  # the sets before are forgotten


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


def test_of_a_model_with_classes_those_are_looked_for_that_it_was_asked_for(means, images, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "network_seconds", lambda *_: 0.0)
    model, drawn, asked = load(str(save(tmp_path / "model", unet(classes=3)))), [], []
    network = model.network.forward
    model.network.forward = lambda x, t, class_labels: (
        drawn.extend(class_labels.tolist()) or network(x, t, class_labels)
    )
    for prompts in ([], ["2", "0"]):
        evaluation = Evaluation(model, str(images), 5, features=str(means), prompts=prompts, batch_size=2)
        monkeypatch.setattr(evaluation.measures[0], "update", lambda x, prompts: asked.extend(prompts))
        monkeypatch.setattr(evaluation.measures[0], "result", dict)
        evaluation.sampler(model, 1, 0.0, None)
    assert asked == drawn == [0, 1, 2, 0, 1, 2, 0, 2, 0, 2]


def test_a_number_is_the_class_at_that_place(means):
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0], blue[2] = 200, 200
    measure = ImageFeatures(str(means), torch.stack([red, blue]), CPU)
    numbers = [measure.classes.index(name) for name in ("red", "blue", "blue")]
    measure.update(torch.stack([red, red, blue]), numbers)
    assert measure.result()["prompt accuracy"] == 2 / 3


def test_a_classifier_of_other_classes_says_nothing_and_a_student_of_other_classes_is_refused(means, images, tmp_path):
    three, four = (load(str(save(tmp_path / str(n), unet(classes=n)))) for n in (3, 4))
    measure = Evaluation(four, str(images), 5, features=str(means)).measures[0]
    measure.update(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 2, 3])
    assert "prompt accuracy" not in measure.result()
    with pytest.raises(BadInput, match="different numbers of classes"):
        compare(Evaluation(three, str(images), 5, features=str(means)), {"four": four}, [1], [1], 0.0)


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


def test_a_feature_file_cannot_run_code(means, tmp_path, monkeypatch):
    """Bombs of several kinds leave no trace; neither they nor a good file meet a reader that could run one."""
    trace, archive, exported, legacy, readers = tmp_path / "owned", io.BytesIO(), io.BytesIO(), io.BytesIO(), []
    torch.save(Evil(trace), archive)
    torch.save(Evil(trace), legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(exported, "w") as file:  # as torch.export laid it out
        file.writestr("p/archive_format", "pt2")
        file.writestr("p/data/weights/model.pt", archive.getvalue())
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    bombs = {
        "a.pkl": pickle.dumps(Evil(trace)),
        "b.pt": archive.getvalue(),
        "c.pt": legacy.getvalue(),
        "d.pt2": exported.getvalue(),
        "e.py": code.encode(),
        "f.safetensors": safetensors.torch.save(weights(3), metadata={"classes": code}),
    }
    for module in (pickle, torch, torch.export, torch.jit):
        monkeypatch.setattr(module, "load", lambda *_, module=module, **__: readers.append(module))
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"cannot load the feature extractor .*{name}"):
            ImageFeatures(str(tmp_path / name), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), CPU)
    ImageFeatures(str(means), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), CPU)
    assert not trace.exists() and not readers
    pickle.loads(bombs["a.pkl"])
    assert trace.exists()  # they are live


def weights(classes, **changed) -> dict[str, torch.Tensor]:
    """Those of a feature file, some of them changed, or with None left out."""
    whole = {**classifier(classes).state_dict(), **changed}
    return {name: value for name, value in whole.items() if value is not None}


RGB = json.dumps(["red", "green", "blue"])
NAN = {"head.bias": torch.tensor([0, 0, torch.nan])}
BAD_FEATURE_FILES = {  # weights and "classes" in the metadata, or bytes, and what is said of them
    "empty": (b"", "header"),
    "text": (b"junk " * 100, "header"),
    "huge header": (b"\xff" * 7 + b"\x00" + b"{}", "header"),
    "zip": (b"PK\x03\x04" + bytes(500), "header"),
    "truncated": (safetensors.torch.save(weights(3), {"classes": RGB})[:-100], "deserializing"),
    "other network": ({"conv.weight": torch.ones(3, 3)}, RGB, "Missing key"),
    "one missing": (weights(3, **{"head.bias": None}), RGB, "Missing key.*head.bias"),
    "one more": (weights(3, extra=torch.ones(2)), RGB, "Unexpected key.*extra"),
    "other shapes": (weights(4), RGB, "size mismatch.*head"),
    "no metadata": (weights(3), None, "names of its classes"),
    "no JSON": (weights(3), "red green blue", "Expecting value"),
    "a text": (weights(3), '"rgb"', "names of its classes"),
    "an object": (weights(3), '{"a": 1, "b": 2, "c": 3}', "names of its classes"),
    "numbers": (weights(3), "[0, 1, 2]", "names of its classes"),
    "endless nesting": (weights(3), "[" * 100_000, "recursion"),
    "not finite": (weights(3, **NAN), RGB, "finite"),
    "impossible variance": (weights(3, **{"body.0.1.running_var": torch.full((32,), -1.0)}), RGB, "finite"),
}


@pytest.mark.parametrize("kind", [*BAD_FEATURE_FILES, "missing", "a folder", "a pipe"])
def test_a_bad_feature_file_is_refused_in_one_line(kind, tmp_path, request):
    file = tmp_path / f"{kind}.safetensors"
    content, *classes, words = BAD_FEATURE_FILES.get(kind, (None, "no such file"))
    if isinstance(content, dict):
        save_file(content, file, metadata=None if classes == [None] else {"classes": classes[0]})
    elif content is not None:
        file.write_bytes(content)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
        request.addfinalizer(functools.partial(os.close, os.open(file, os.O_RDWR)))  # or a reader would wait for ever
    with pytest.raises(BadInput) as refused:
        ImageFeatures(str(file), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), CPU)
    text = str(refused.value).removeprefix(f"cannot load the feature extractor {file}: ")
    assert re.match(f".*{words}", text) and len(text) <= 200 and "\n" not in text


def test_features_are_made_where_the_images_are(means):
    """Not one constant of the network may stay behind on the CPU: torch would then raise, on a GPU and here."""
    network, names = features.load_classifier(str(means))
    outputs = network.to("meta")(torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta"))
    assert [output.device.type for output in outputs] == ["meta"] * 2 and names == ["red", "green", "blue"]


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_the_floor_the_teacher_the_student_and_map_errors(tmp_path):
    torch.manual_seed(0)
    teacher = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False)))
    student = teacher.student(teacher.network.state_dict(), 50)
    rows, samples, _ = compare(Evaluation(teacher, "toy:moons", 64), {"student": student}, [1, 2], [1, 8], 0.0)
    names = [(row["sampler"], row["steps"]) for row in rows[1:]]
    assert names == [("teacher, DDIM", 8), ("teacher, DDIM", 1), ("student", 1), ("student", 2)]
    endpoint, one = (sample.sample(teacher, range(64), n, "ddim") for n in (8, 1))
    assert rows[2]["map error"] == pytest.approx((one - endpoint).square().sum(1).sqrt().mean().item(), rel=1e-4)
    assert "map error" not in rows[1] and "map error" not in rows[4]  # the endpoint itself; a sampler with fresh noise
    # An untrained student is the teacher, and its one step is DDIM's one step.
    assert rows[3]["map error"] == pytest.approx(rows[2]["map error"], rel=1e-3)
    assert rows[0]["W2"] < min(row["W2"] for row in rows[1:]) and len(samples) == 5
    # And without fresh noise its two steps are DDIM's two, so that they have a map error; more steps than one have
    # none otherwise.
    rows = compare(Evaluation(teacher, "toy:moons", 64, eta=0.0), {"student": student}, [2], [8, 2], 0.0).rows
    assert rows[3]["map error"] == pytest.approx(rows[2]["map error"], rel=1e-2)
    rows, _, text = compare(Evaluation(teacher, "toy:moons", 64, eta=0.5), {"student": student}, [2], [8, 2], 0.0)
    assert "map error" not in rows[3] and "η = 0.5" in text


def test_steps_that_no_sampler_can_take_are_refused_before_anything_is_sampled(tmp_path, monkeypatch):
    teacher = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False)))
    student, sampled = teacher.student(teacher.network.state_dict(), 50), []
    monkeypatch.setattr(evaluate, "sample_batches", lambda *arguments, **options: sampled.append(1))
    for steps, teacher_steps in (([1, 51], [8]), ([1], [8, 0]), ([0], [8])):
        with pytest.raises(BadInput, match="takes 1 to"):
            compare(Evaluation(teacher, "toy:moons", 64), {"student": student}, steps, teacher_steps, 0.0)
    assert not sampled


def test_held_out_data_come_from_all_classes(images):
    data = load_images(images, "test")
    chosen = data.labels[spread(len(data.labels), 6)]
    assert set(chosen.tolist()) == {0, 1, 2} and spread(3, 10).tolist() == [0, 1, 2]


@pytest.fixture
def counting(monkeypatch):
    """A measure that stands in for Inception: the mean of all pixels, and the prompts that came with them."""

    class Counting:
        name, values, texts = "the mean", (), ""

        def update(self, samples, prompts):
            self.values = *self.values, *samples.float().mean((1, 2, 3)).tolist()
            self.texts += "".join(prompts)

        def result(self):
            values, texts, self.values, self.texts = self.values, self.texts, (), ""
            return {"mean": float(np.mean(values)), "n": len(values), "texts": texts}

    monkeypatch.setattr(evaluate, "measures_for", lambda *_: [Counting()])
    monkeypatch.setattr(ImageModel, "default_prompts", ["a", "b"])


def test_images_kept_in_a_folder_are_the_same_and_are_not_made_again(images, counting, tmp_path):
    teacher = load(str(save(tmp_path / "teacher", unet(size=32))))
    one, two = (teacher.student(teacher.network.state_dict(), 50) for _ in range(2))
    one.name, two.name = "runs/one", "runs/two"
    torch.nn.init.normal_(two.network.conv_out.weight, std=0.1)

    def rows(samples_dir=None, **options):
        evaluation = Evaluation(teacher, str(images), 7, **{"batch_size": 3} | options)
        return compare(evaluation, {"one": one, "two": two}, [1, 2], [3], 0.0, samples_dir).rows

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
    (tmp_path / "kept/teacher-3/samples.json").write_bytes(b"\xff\xfe")  # not even text
    with pytest.raises(BadInput, match="another model"):
        rows(samples_dir=tmp_path / "kept")


def test_a_student_of_another_resolution_has_distances_but_no_map_error(images, counting, tmp_path):
    teacher, smaller = (load(str(save(tmp_path / str(size), unet(size=size)))) for size in (16, 8))
    students = {"same": teacher.student(teacher.network.state_dict(), 50), "smaller": smaller}
    evaluation = Evaluation(teacher, str(images), 4)
    rows = compare(evaluation, students, [1], [2], 0.0).rows
    assert [row["sampler"] for row in rows if "map error" in row] == ["same"]
    assert [row["n"] for row in rows[1:]] == [4, 4, 4]
    points = load(str(save(tmp_path / "points", PointMLP(width=16))))
    with pytest.raises(BadInput, match="far makes points, and its teacher images"):
        compare(evaluation, {"far": points}, [1], [2], 0.0)


def test_all_images_are_brought_to_the_resolution_by_lanczos_and_the_broken_are_left_out(tmp_path, monkeypatch):
    """The protocol of COCO-2014: the centre square at 256 pixels, here 8, of both sides."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    files = ImageFiles([tmp_path / "a.png", tmp_path / "b.png"], 8)
    wanted = np.asarray(Image.fromarray(pixels[:, 8:32]).resize((8, 8), Image.Resampling.LANCZOS))
    assert (files[torch.tensor([0, 1])].permute(0, 2, 3, 1).numpy() == wanted).all()
    assert files[torch.tensor([1])].shape == (0, 3, 8, 8)
    x0, shown = torch.from_numpy(pixels[:, 8:32].copy()).permute(2, 0, 1)[None] / 127.5 - 1, []

    class Seen:
        def update(self, samples, prompts):
            shown.append(samples)

    monkeypatch.setattr(evaluate, "measures_for", lambda *_: [Seen()])
    teacher = load(str(save(tmp_path / "teacher", unet(size=24))))
    for resolution in (8, None):
        Evaluation(teacher, str(tmp_path), 1, resolution=resolution).update(x0)
    assert (shown[0][0].permute(1, 2, 0).numpy() == wanted).all()
    assert (shown[1].permute(0, 2, 3, 1).numpy() == to_pixels(x0)).all()
    assert centre_square(Image.fromarray(pixels), 24).permute(1, 2, 0).numpy().tolist() == pixels[:, 8:32].tolist()


# -- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_approximated_error_is_between_diffusers_predictions_at_neighbours(tmp_path, prediction_type):
    model = load(str(save(tmp_path / "model", unet(), prediction_type)))
    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    predictions = {}
    with torch.no_grad():
        for t in (119, 379, 399):
            x = scheduler.add_noise(x0, noise, torch.tensor([t]))
            predictions[t] = scheduler.step(model.network(x, t).sample, t, x).pred_original_sample
    wanted = [(predictions[a] - predictions[b]).square().mean() for a, b in ((399, 379), (379, 119))]
    got = approximated_errors(model, x0, {}, noise, [399, 379, 119], 0.0)
    assert got == pytest.approx(torch.stack(wanted), rel=1e-3)


def test_the_error_program_draws_a_curve_for_each_model(tmp_path, images, call):
    teacher, other = (save(tmp_path / name, unet(size=32)) for name in ("teacher", "other"))
    network = unet(size=32)
    torch.nn.init.normal_(network.conv_out.weight, std=0.5)
    save(other, network)
    flags = ["--data", images, "--num_samples", 6, "--batch_size", 3, "--interval", 100, "--out", tmp_path / "e.png"]
    status, out, err = call(evaluate.main, "error", teacher, other, *flags)
    assert status == 0 and str(teacher) in out, err
    curves = json.loads((tmp_path / "e.json").read_text())
    assert curves["t"] == [999, 899, 799, 699, 599, 499, 399, 299] and (tmp_path / "e.png").stat().st_size > 5000
    assert len(curves[str(teacher)]) == 8 and curves[str(teacher)] != curves[str(other)]
    for flags, words in (([], "--data"), (["--data", images, "--interval", 900], "--interval 900")):
        status, _, err = call(evaluate.main, "error", teacher, *flags)
        assert status == 2 and words in one_line(err)


def test_a_trained_classifier_knows_the_names_of_its_classes(images, tmp_path, call):
    flags = ["--data", images, "--out", tmp_path / "f.safetensors", "--output_dir", tmp_path / "run"]
    status, out, err = call(features.main, *flags, "--max_train_steps", 1, "--train_batch_size", 8)
    assert status == 0 and "test accuracy" in out, err
    measure = ImageFeatures(str(tmp_path / "f.safetensors"), torch.zeros(2, 3, 32, 32).byte(), torch.device("cpu"))
    assert measure.classes == CLASSES


def test_bad_flags_end_in_one_line_and_status_2(images, tmp_path, call):
    t, points = save(tmp_path / "t", unet(size=32)), save(tmp_path / "points", PointMLP(width=16))
    (tmp_path / "junk.pt2").write_text("junk")
    for name in ("folder.png", "folder.safetensors", "cifar10/val"):
        (tmp_path / name).mkdir(parents=True)
    flags = ["--pretrained_teacher_model", t, "--data", images, "--guidance_w", 0, "--num_samples", 4]
    of_points = ["--pretrained_teacher_model", points, "--guidance_w", 0, "--data", "toy:moons"]
    protocol = ["--protocol", "coco2014-30k"]
    for program, arguments, words in (
        (evaluate, ["table", t], "--pretrained_teacher_model"),
        (evaluate, ["table", t, *flags, "--features", tmp_path / "missing.pt2"], "missing.pt2"),
        (evaluate, ["table", t, *flags, "--features", tmp_path / "junk.pt2"], "junk.pt2"),
        (evaluate, ["table", t, *flags[:-1], 0], "--num_samples must be positive"),
        (evaluate, ["table", t, *flags, "--steps", 1, 0], "--steps must be positive"),
        (evaluate, ["table", t, *flags, "--teacher_steps", -4], "--teacher_steps must be positive"),
        (evaluate, ["table", t, *flags, *protocol], "--prompts"),
        (evaluate, ["table", t, *flags, *protocol, "--prompts", "a cat"], "needs its captions: --prompts FILE"),
        (evaluate, ["table", t, *flags, *protocol, "--prompts", tmp_path / "no.txt"], "no such file"),
        (evaluate, ["table", t, *flags, "--clip_model", "ViT-B-32/openai"], "--clip_model"),
        (evaluate, ["table", t, *flags, "--split", "val"], "no such folder"),
        (evaluate, ["table", t, *flags, "--num_samples", 1], "2 or more"),
        (evaluate, ["table", t, *flags, "--data", tmp_path / "cifar10", "--split", "val"], "train and test, not val"),
        (evaluate, ["table", points, *of_points, "--split", "val"], "train and test, not val"),
        (evaluate, ["error", t, save(tmp_path / "small", unet(size=16)), "--data", images], "of different sizes"),
        # Of an output that cannot be written, before the model or the data that are missing here.
        (evaluate, ["error", tmp_path / "missing", "--out", tmp_path / "folder.png"], "folder.png must be"),
        (evaluate, ["error", tmp_path / "missing", "--out", tmp_path / "e.jpg"], "ends in .png"),
        (evaluate, ["error", tmp_path / "missing", "--out", t / "model_index.json/e.png"], "cannot write"),
        (features, ["--data", tmp_path / "missing", "--out", tmp_path / "folder.safetensors"], "must be the name"),
        (features, ["--data", tmp_path / "missing", "--out", tmp_path / "f.pt2"], "ends in .safetensors"),
        (features, ["--data", t, "--out", tmp_path / "f.safetensors"], "no images"),
    ):
        status, _, err = call(program.main, *arguments)
        assert status == 2 and words in one_line(err), err


def test_eta_reaches_the_table(tmp_path, call):
    """Without fresh noise a student of two steps has a map error. That of an untrained one is DDIM's."""
    teacher, out = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False))), tmp_path / "student"
    save_model(teacher.student(teacher.network.state_dict(), 50), out)
    flags = [
        "--pretrained_teacher_model",
        tmp_path / "t",
        "--data",
        "toy:moons",
        "--guidance_w",
        0,
        "--num_samples",
        64,
    ]
    for eta, text in ((["--eta", 0], "η = 0"), ([], "features")):
        status, printed, err = call(evaluate.main, "table", out, *flags, "--steps", 2, "--teacher_steps", 2, 8, *eta)
        assert status == 0 and text in printed and ("η" in printed) == bool(eta), err
        *_, ddim, student = json.loads((out / "evaluation.json").read_text())["rows"]
        assert ("map error" in student) == bool(eta)
        assert not eta or student["map error"] == pytest.approx(ddim["map error"], rel=1e-2)
    for name, steps in ((out, 1), (tmp_path / "t", 2)):  # nothing here adds noise
        status, _, err = call(evaluate.main, "table", name, *flags, "--steps", steps, "--eta", 0)
        assert status == 2 and "--eta is for students of several steps" in one_line(err), err


def test_times_of_ones_own_reach_the_table(tmp_path, call):
    """The student's row is of as many steps as there are times, and of these times; the teacher's rows stay."""
    teacher, out = load(str(save(tmp_path / "t", PointMLP(width=16), clip_sample=False))), tmp_path / "student"
    save_model(teacher.student(teacher.network.state_dict(), 50), out)
    flags = f"--pretrained_teacher_model {tmp_path / 't'} --data toy:moons --guidance_w 0 --num_samples 64".split()
    rows = {}
    for times in ([999, 499], [999, 899], []):
        given = ["--timesteps", *times] if times else ["--steps", 2]
        status, printed, err = call(evaluate.main, "table", out, *flags, *given, "--teacher_steps", 4)
        assert status == 0 and ("students' times" in printed) == bool(times), err
        *_, rows["teacher"], rows[tuple(times)] = json.loads((out / "evaluation.json").read_text())["rows"]
        assert rows["teacher"]["steps"] == 4 and rows[tuple(times)]["steps"] == 2
    assert rows[999, 499]["W2"] == rows[()]["W2"] != rows[999, 899]["W2"]
    for name, more, words in (
        (out, ["--timesteps", 999, 499, "--steps", 2], "leave --steps out"),
        (out, ["--timesteps", 999, 500], "on the student's grid"),
        (tmp_path / "t", ["--timesteps", 999, 499], "--timesteps are for students"),
    ):
        status, _, err = call(evaluate.main, "table", name, *flags, *more)
        assert status == 2 and words in one_line(err), err


def test_the_results_of_a_hub_id_do_not_make_a_folder_of_its_name(tmp_path, call, monkeypatch):
    """That folder would be what the name means from then on."""
    t = save(tmp_path / "t", PointMLP(width=16))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda name: load({"someone/student": str(t)}.get(name, name)))
    flags = ["--pretrained_teacher_model", t, "--data", "toy:moons", "--guidance_w", 0, "--num_samples", 8]
    status, out, err = call(evaluate.main, "table", "someone/student", *flags, "--steps", 1, "--teacher_steps", 1)
    assert status == 0 and not (tmp_path / "someone").exists(), err
    assert (tmp_path / "runs/student/evaluation.json").is_file() and "runs/student/evaluation.png" in out


def test_an_edited_record_of_a_student_is_refused_in_one_line(tmp_path, call):
    t = save(tmp_path / "t", PointMLP(width=16))
    good = {"pretrained_teacher_model": str(t), "data": "toy:moons", "guidance_w": 0.0, "k": 20}
    flags = ["--num_samples", 8, "--steps", 1, "--teacher_steps", 1]
    (t / "metrics.json").write_text(json.dumps({"configuration": good}))
    status, _, err = call(evaluate.main, "table", t, *flags)
    assert status == 0, err
    contents = [b"", b"junk", b"\xff\xfe", b"[]", b"{}", b'{"configuration": null}', b'{"configuration": [1]}']
    changes = [{"k": k} for k in ("20", 0, -1, 1000, 2.5, None, [])]
    changes += [
        {"guidance_w": "1"},
        {"guidance_w": None},
        {"guidance_w": math.nan},
        {"data": 5},
        {"data": None},
        {"pretrained_teacher_model": []},
    ]
    contents += [json.dumps({"configuration": {**good, **change}}).encode() for change in changes]
    for content in contents:
        (t / "metrics.json").write_bytes(content)
        status, _, err = call(evaluate.main, "table", t, *flags)
        assert status == 2 and "metrics.json" in one_line(err), (content, err)
