"""The programs end to end: 2-D points to a stated distance, real images through the whole road."""

import json

import numpy as np
import pytest
import torch
from conftest import one_line, python, save, unet
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image

import distill
import evaluate
import sample
import teacher
from teacher import PointModel
from toy import features
from toy.mlp import PointMLP


@pytest.mark.parametrize(
    ("conditioning", "map_error", "one_step", "four_steps"),
    [("time", 0.06, 0.18, 0.16), ("embedding", 0.16, 0.27, 0.17)],
)
def test_8_gaussians_are_distilled_to_a_stated_distance(conditioning, map_error, one_step, four_steps, tmp_path, call):
    """Less than half of `make`'s steps. Reached over three seeds: map errors 0.044 and 0.124, W2 of one step 0.154 and
    0.224, of four 0.141 and 0.145. W2 is 0.127 between two such samples of the data, and 1.0 for DDIM in one step."""
    teacher_flags = ["--data", "toy:8gaussians", "--output_dir", tmp_path / "teacher", "--max_train_steps", 1500]
    assert call(teacher.main, *teacher_flags)[0] == 0
    flags = ["--output_dir", tmp_path, "--max_train_steps", 800, "--gamma_conditioning", conditioning]
    status, out, err = call(distill.main, *flags, "--num_eval_samples", 1024)
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = {(row["sampler"], row.get("steps")): row for row in metrics["rows"]}
    assert rows["teacher, DDIM", 1]["W2"] > 0.9
    assert rows["student", 1]["map error"] < map_error and rows["student", 1]["W2"] < one_step
    assert rows["student", 4]["W2"] < four_steps
    assert f"{rows['student', 4]['W2']:.4g}" in out and "overview.png" in out
    assert np.asarray(Image.open(tmp_path / "overview.png")).std() > 10


def test_the_image_road(images, tmp_path, call):
    """Train a teacher, distil it, sample, train a feature extractor and evaluate: each command as the README has it."""
    t, s, network = tmp_path / "teacher", tmp_path / "student", tmp_path / "features.safetensors"
    tiny = ["--train_batch_size", 16, "--lr_warmup_steps", 1, "--data", images]
    status, _, err = call(teacher.main, *tiny, "--output_dir", t, "--max_train_steps", 50)
    assert status == 0, err
    losses = [json.loads(line)["loss"] for line in (t / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:5])
    flags = ["--pretrained_teacher_model", t, "--output_dir", s, "--max_train_steps", 4, "--validation_steps", 2]
    status, _, err = call(distill.main, *tiny, *flags)
    assert status == 0, err
    assert Image.open(s / "samples/step-4.png").size == Image.open(s / "samples/step-2.png").size == (8 * 33 + 1,) * 2
    configuration = json.loads((s / "metrics.json").read_text())["configuration"]
    assert configuration["pretrained_teacher_model"] == str(t) and configuration["mixed_precision"] == "bf16"
    status, _, err = call(sample.main, s, "--steps", 4, "--out", tmp_path / "samples.png", "--num_images", 9)
    assert status == 0 and Image.open(tmp_path / "samples.png").size == (3 * 33 + 1,) * 2, err
    status, out, err = call(
        features.main, "--data", images, "--out", network, "--output_dir", tmp_path / "f",
        "--max_train_steps", 12, "--train_batch_size", 32, "--lr_warmup_steps", 2,
    )  # fmt: skip
    assert status == 0 and "test accuracy" in out, err
    flags = ["--features", network, "--num_samples", 24, "--steps", 1, 2, "--teacher_steps", 1, 3]
    status, out, err = call(evaluate.main, "table", s, *flags)
    assert status == 0, err
    rows = json.loads((s / "evaluation.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"]) for row in rows[1:]] == [
        ("teacher, DDIM", 3), ("teacher, DDIM", 1), ("student", 1), ("student", 2),
    ]  # fmt: skip
    assert all(row["FD"] > 0 for row in rows)
    picture = np.asarray(Image.open(s / "evaluation.png"))
    assert picture[16:112].std() > 20  # the first row shows the data, in their own range
    assert str(network) in out and "24 samples a row" in out and "against 96 samples" in out


def test_stock_diffusers_samples_the_student_as_ours_does(tmp_path, call):
    """DiffusionPipeline.from_pretrained, LCMScheduler, 4 steps, a generator per image: the same pictures."""
    t, s = save(tmp_path / "teacher", unet(size=32), "v_prediction"), tmp_path / "student"
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / "0.png")
    flags = ["--pretrained_teacher_model", t, "--data", data, "--output_dir", s, "--gamma_conditioning", "embedding"]
    steps = ["--max_train_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-2, "--validation_steps", 0]
    status, _, err = call(distill.main, *flags, *steps, "--lr_warmup_steps", 0, "--ema_decay", 0.1)
    assert status == 0, err
    pipeline = DiffusionPipeline.from_pretrained(s)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.unet.state_dict().keys() == unet(size=32).state_dict().keys()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    stock = pipeline(batch_size=3, generator=generators, num_inference_steps=4, output_type="np").images
    ours = sample.sample(teacher.load(str(s)), range(7, 10), 4)
    assert torch.allclose(torch.from_numpy(stock), (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-4)
    before = sample.sample(teacher.load(str(t)), range(7, 10), 4, "lcm")
    assert (ours - before).abs().mean() > 0.01  # the student has learnt something, so its weights were saved


def test_guidance_and_labels_from_teacher_to_student(images, tmp_path, call):
    t = save(tmp_path / "teacher", unet(classes=3, size=32), beta_schedule="squaredcos_cap_v2")
    flags = ["--pretrained_teacher_model", t, "--data", images, "--max_train_steps", 2, "--train_batch_size", 4]
    for w in (0, 2):
        status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / f"w{w}", "--guidance_w", w)
        assert status == 0, err
    first = [json.loads((tmp_path / f"w{w}/metrics.jsonl").read_text().splitlines()[0])["loss"] for w in (0, 2)]
    assert first[0] != first[1]  # same seed, same student: only the teacher's guidance differs
    model = teacher.load(str(tmp_path / "w2"))
    cat, ship = (sample.sample(model, range(1), 2, prompts=[label]) for label in "01")
    assert not torch.equal(cat, ship)


@pytest.fixture
def points(tmp_path):
    torch.manual_seed(0)
    return save(tmp_path / "teacher", PointMLP(width=16, depth=1), clip_sample=False)


def first_loss(call, points, out, *flags):
    small = ["--max_train_steps", 1, "--train_batch_size", 64, "--num_eval_samples", 0, "--output_dir", out]
    status, _, err = call(distill.main, "--pretrained_teacher_model", points, *small, *flags)
    assert status == 0, err
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def test_every_flag_of_the_method_is_read(points, tmp_path, call, monkeypatch):
    """Each changes the very first loss, the same for all else; in bf16 it stays near its float32 value."""
    monkeypatch.setattr(PointModel, "many_steps", 1)  # saves time
    base = first_loss(call, points, tmp_path / "base")
    others = "ode dl, ode lcm, sigma exact, metric l2, metric huber_sample, k 200"
    others += ", solver_step 100, gamma_conditioning embedding, seed 1"
    others += ", num_ddim_timesteps 25, gamma_draws 3, gamma_at_one 0.5, solver dpmsolver++"
    for flag in others.split(", "):
        assert first_loss(call, points, tmp_path / flag, *f"--{flag}".split()) != base, flag
    scheduler = json.loads((tmp_path / "num_ddim_timesteps 25/scheduler/scheduler_config.json").read_text())
    assert scheduler["original_inference_steps"] == 25
    assert first_loss(call, points, tmp_path / "bf16", "--mixed_precision", "bf16") == pytest.approx(base, rel=0.05)


@pytest.mark.parametrize(
    "flags, teachers, draws",
    [
        (["--k", 40], 2, 1),
        (["--k", 60, "--guidance_w", 2, "--ode", "lcm"], 6, 1),
        (["--k", 40, "--gamma_draws", 3], 2, 3),
        (["--k", 40, "--solver", "dpmsolver++"], 4, 1),
    ],
)
def test_the_cost_model_counts_the_passes_that_are_made(tmp_path, images, call, flags, teachers, draws):
    teacher = save(tmp_path / "teacher", unet(classes=3, size=32))
    rows, batch, timed = [], 4, 2

    def count(module, inputs, output):
        if type(module).__name__ == "UNet2DModel":
            rows.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    more = ["--data", images, "--train_batch_size", batch, "--timed_steps", timed, "--output_dir", tmp_path / "out"]
    status, out, err = call(distill.main, "--benchmark", "--pretrained_teacher_model", teacher, *more, *flags)
    hook.remove()
    assert status == 0, err
    result = json.loads((tmp_path / "out/benchmark/benchmark.json").read_text())
    in_training = sum(rows[:-4]) / batch / (distill.WARM_UP + 2 * timed)  # the last four time a bare pass
    assert result["forward passes"] == in_training + 2 * draws  # a backward pass costs two forward ones
    assert in_training == teachers + 1 + draws
    assert result["images/s"] == pytest.approx(batch / result["seconds a step"])
    assert {"teacher", "target", "student", "optimizer", "VAE and text"} < set(result["parts"])
    assert min(result["parts"].values()) > 0 and "images/s" in out and "ratio" in out
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_bad_flags_end_in_one_line_and_status_2(points, images, tmp_path, call):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    image_teacher = save(tmp_path / "image_teacher", unet(size=16))
    two_classes = save(tmp_path / "two_classes", unet(classes=2, size=32))
    learned = unet(time_embedding_type="learned", num_train_timesteps=1000)
    model, student = teacher.load(str(points)), tmp_path / "student"
    teacher.save(model.student(model.network.state_dict(), 50), student)
    for flags, words in (
        (["--pretrained_teacher_model", "toy:rings"], "toy:rings"),
        (["--pretrained_teacher_model", tmp_path / "empty"], "no pipeline folder"),
        (["--pretrained_teacher_model", points, "--k", 50], "--k 50 is no multiple of --solver_step 20"),
        (["--pretrained_teacher_model", points, "--k", 2000], "--k must be smaller"),
        (["--pretrained_teacher_model", points, "--k", 999, "--solver_step", 333], "--k must be smaller than 999"),
        (["--pretrained_teacher_model", points, "--num_ddim_timesteps", 30], "--num_ddim_timesteps must divide"),
        (["--pretrained_teacher_model", points, "--gamma_draws", 2, "--ode", "lcm"], "--gamma_draws"),
        (["--pretrained_teacher_model", points, "--gamma_at_one", 1], "--gamma_at_one must be in [0, 1)"),
        (["--pretrained_teacher_model", points, "--ema_decay", 1], "--ema_decay"),
        (["--pretrained_teacher_model", points, "--guidance_w", 1], "conditional teacher"),
        (["--pretrained_teacher_model", points, "--prompts", "a cat"], "prompts are class labels here"),
        (["--pretrained_teacher_model", points, "--num_eval_samples", 1], "--num_eval_samples"),
        (["--pretrained_teacher_model", student], "is a student"),
        (["--pretrained_teacher_model", points, "--train_batch_size", 0], "--train_batch_size"),
        (["--pretrained_teacher_model", points, "--train_batch_size", 10**12], "below 2**31"),
        (["--pretrained_teacher_model", points, "--dataloader_num_workers", 10**5], "from 0 to 256"),
        (["--pretrained_teacher_model", save(tmp_path / "learned", learned), "--data", images], "embedding"),
        (["--pretrained_teacher_model", points, "--benchmark", "--timed_steps", 1], "--timed_steps"),
        (["--pretrained_teacher_model", points, "--output_dir", tmp_path / "file"], "cannot write"),
        (["--pretrained_teacher_model", image_teacher], "--data is missing"),
        (["--pretrained_teacher_model", image_teacher, "--data", tmp_path / "empty"], "no images"),
        (["--pretrained_teacher_model", image_teacher, "--data", images, "--resolution", 32], "of 16 pixels, not 32"),
        (["--pretrained_teacher_model", two_classes, "--data", images], "3 classes, and"),
    ):
        status, _, err = call(distill.main, "--output_dir", tmp_path / "out", *flags)
        assert status == 2 and words in one_line(err), err


@pytest.mark.parametrize(
    "flag, values",
    [
        ("learning_rate", ["nan", "inf", "-1e-3", "fast", "1e300"]),
        ("max_grad_norm", ["-1", "nan"]),
        ("adam_weight_decay", ["inf"]),
        ("guidance_w", ["nan", "-1e300"]),
        ("ema_decay", ["nan", "-0.1"]),
        ("seed", ["-1", "1.5", "2147483648", "9" * 400]),
        ("checkpoints_total_limit", ["0", "-1"]),
        ("lr_warmup_steps", ["-1"]),
    ],
)
def test_numbers_that_are_none_end_in_one_line_and_status_2(points, tmp_path, call, flag, values):
    for value in values:
        flags = ["--pretrained_teacher_model", points, "--output_dir", tmp_path / "out", f"--{flag}={value}"]
        status, _, err = call(distill.main, *flags)
        assert status == 2 and f"--{flag} must be " in one_line(err) and value in err, err
    assert not list((tmp_path / "out").rglob("checkpoint*"))


def test_a_sigma_that_contradicts_the_conditioning_is_warned_of(points, tmp_path, call, caplog):
    for conditioning, warned in (("time", True), ("embedding", False)):
        caplog.clear()
        first_loss(call, points, tmp_path / conditioning, "--sigma", "exact", "--gamma_conditioning", conditioning)
        assert ("wrong time" in caplog.text) == warned


HEAVY = "{'transformers', 'peft', 'webdataset', 'torch_fidelity', 'open_clip'}"
LOADED = f"assert not (loaded := {HEAVY} & set(sys.modules)), loaded"


@pytest.mark.parametrize("name", ["distill", "teacher", "sample", "evaluate"])
def test_help_waits_for_no_heavy_library(name):
    """Nor for diffusers, whose import alone takes longer than a person waits for a list of flags."""
    script = f"""import sys, {name}
sys.argv = ["{name}.py", "--help"]
try:
    {name}.main()
except SystemExit:
    {LOADED}
    assert "diffusers" not in sys.modules"""
    done = python("-c", script)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def test_the_toy_needs_no_heavy_library(tmp_path):
    flags = f"--output_dir {tmp_path} --max_train_steps 1 --train_batch_size 8 --num_eval_samples 16".split()
    fit = f"--data toy:8gaussians --output_dir {tmp_path}/teacher --max_train_steps 1".split()
    script = f"""import sys, distill, teacher
sys.argv = ["teacher.py", *{fit}]
teacher.main()
sys.argv = ["distill.py", *{flags}]
teacher.PointModel.many_steps = 2
distill.main()
{LOADED}"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_an_output_folder_keeps_one_toy_teacher(tmp_path, call):
    save(tmp_path / "teacher", PointMLP(width=8, distribution="moons"), clip_sample=False)
    status, _, err = call(distill.main, "--pretrained_teacher_model", "toy:spiral", "--output_dir", tmp_path)
    assert status == 2 and "toy:moons" in one_line(err)
