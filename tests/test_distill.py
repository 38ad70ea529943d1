"""The program end to end: 2-D points to a stated distance, real images through the whole road."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import losses, one_line, save, unet
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image

import data
import distill
import evaluate
import sample
import splam
import teacher
import training
from experiments import features
from improved import PARTS
from teacher import ImageModel
from toy.mlp import PointMLP


@pytest.fixture(autouse=True)
def one_step(monkeypatch):
    """Of an image teacher in a run's last picture: saves time."""
    monkeypatch.setattr(ImageModel, "many_steps", 1)


def test_8_gaussians_are_distilled_to_a_stated_distance(tmp_path, call):
    """Half of `make`'s steps or less, the student's with half of its batch. W2 is 0.127 between two such samples of the
    data, and 1.0 for DDIM in one step."""
    t = tmp_path / "teacher"
    assert call(teacher.main, "--data", "toy:8gaussians", "--output_dir", t, "--max_train_steps", 1500)[0] == 0
    for method, map_error, one_step, four_steps in (([], 0.16, 0.27, 0.17), (["--improved", "time"], 0.08, 0.18, 0.16)):
        s = tmp_path / f"student {method}"
        flags = ["--pretrained_teacher_model", t, "--output_dir", s, "--max_train_steps", 800, *method]
        status, out, err = call(distill.main, *flags, "--train_batch_size", 256, "--num_eval_samples", 1024)
        assert status == 0, err
        rows = json.loads((s / "metrics.json").read_text())["rows"]
        rows = {(row["sampler"], row.get("steps")): row for row in rows}
        assert rows["teacher, DDIM", 1]["W2"] > 0.9
        assert rows["student", 1]["map error"] < map_error and rows["student", 1]["W2"] < one_step
        assert rows["student", 4]["W2"] < four_steps
        assert f"{rows['student', 4]['W2']:.4g}" in out and "overview.png" in out
        assert np.asarray(Image.open(s / "overview.png")).std() > 10


def test_the_image_road(images, tmp_path, call):
    """Train a teacher, distil it, sample, train a feature extractor and evaluate."""
    t, s, network = tmp_path / "teacher", tmp_path / "student", tmp_path / "features.safetensors"
    tiny = ["--train_batch_size", 16, "--lr_warmup_steps", 1, "--data", images]
    status, _, err = call(
        teacher.main, *tiny, "--output_dir", t, "--max_train_steps", 50, "--block_out_channels", 8, 16
    )
    assert status == 0, err
    assert np.mean(losses(t)[-15:]) < 0.85 * np.mean(losses(t)[:5])
    flags = ["--pretrained_teacher_model", t, "--output_dir", s, "--max_train_steps", 4, "--validation_steps", 2]
    status, _, err = call(distill.main, *tiny, *flags, "--improved")
    assert status == 0, err
    assert Image.open(s / "samples/step-4.png").size == Image.open(s / "samples/step-2.png").size == (8 * 33 + 1,) * 2
    configuration = json.loads((s / "metrics.json").read_text())["configuration"]
    assert configuration["pretrained_teacher_model"] == str(t) and configuration["mixed_precision"] == "bf16"
    assert configuration["improved"] == list(PARTS) and configuration["solver_step"] == 100
    status, _, err = call(sample.main, s, "--steps", 4, "--out", tmp_path / "samples.png", "--num_images", 9)
    assert status == 0 and Image.open(tmp_path / "samples.png").size == (8 * 33 + 1, 2 * 33 + 1), err
    status, out, err = call(
        features.main, "--data", images, "--out", network, "--output_dir", tmp_path / "f",
        "--max_train_steps", 12, "--train_batch_size", 32, "--lr_warmup_steps", 2,
    )  # fmt: skip
    assert status == 0 and "test accuracy" in out, err
    flags = ["--features", network, "--num_samples", 24, "--steps", 1, 2, "--teacher_steps", 1, 3]
    status, out, err = call(evaluate.main, s, *flags)
    assert status == 0, err
    rows = json.loads((s / "evaluation.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"]) for row in rows[1:]] == [
        ("teacher, DDIM", 3), ("teacher, DDIM", 1), ("student", 1), ("student", 2),
    ]  # fmt: skip
    assert all(row["FD"] > 0 for row in rows)


@pytest.mark.parametrize("classes", [None, 3])
def test_stock_diffusers_samples_the_student_as_ours_does(classes, images, tmp_path, call):
    """On another grid than LCM's own. A U-Net with classes, whose student is guided, is told them by hand, since no
    pipeline of diffusers does."""
    t, s = save(tmp_path / "teacher", unet(classes, size=32), "v_prediction"), tmp_path / "student"
    flags = ["--pretrained_teacher_model", t, "--data", images, "--output_dir", s, "--validation_steps", 0]
    flags += ["--max_train_steps", 2, "--train_batch_size", 2, "--lr_warmup_steps", 0, "--learning_rate", 1e-2]
    flags += ["--ema_decay", 0.1, "--num_ddim_timesteps", 25, "--k", 40, "--guidance_w", 1 if classes else 0]
    status, _, err = call(distill.main, *flags)
    assert status == 0, err
    stock, before = DiffusionPipeline.from_pretrained(s), unet(classes, size=32).state_dict()
    after = stock.unet.state_dict()
    assert after.keys() == before.keys() and all((after[name] - w).abs().max() > 1e-3 for name, w in before.items())
    assert isinstance(stock.scheduler, LCMScheduler) and stock.scheduler.config.original_inference_steps == 25
    stock.set_progress_bar_config(disable=True)
    if classes:
        stock.unet.forward = partial(stock.unet.forward, class_labels=torch.arange(3))  # by their seeds
    for steps in (1, 4):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
        theirs = stock(3, generators, num_inference_steps=steps, output_type="np").images
        ours = sample.sample(teacher.load(str(s)), range(3), steps).clamp(-1, 1) / 2 + 0.5
        assert torch.allclose(ours.permute(0, 2, 3, 1), torch.from_numpy(theirs), atol=1e-4)


@pytest.fixture
def points(tmp_path):
    torch.manual_seed(0)
    return save(tmp_path / "teacher", PointMLP(width=16, depth=1), clip_sample=False)


def first_loss(call, teacher, out, *flags) -> float:
    """As it is logged, by a run that is not finished: its picture takes longest."""

    def main():
        distillation = distill.Distillation(*distill.configure())
        distillation.run.log(*next(distillation.steps()))

    small = ["--max_train_steps", 1, "--lr_warmup_steps", 0, "--train_batch_size", 64]
    call(main, "--pretrained_teacher_model", teacher, *small, "--output_dir", out, *flags)
    return losses(out)[0]


def test_the_first_loss_of_a_guided_run_is_splad_loss_with_the_guided_teacher(images, tmp_path, call):
    """With w, and not with -w or 0: a wrong sign in the loop changes nothing else that one could see."""
    t = save(tmp_path / "teacher", unet(classes=3, size=32), "v_prediction")
    flags = ["--data", images, "--train_batch_size", 4, "--mixed_precision", "no", "--guidance_w", 2, "--k", 40]
    found, model = first_loss(call, t, tmp_path / "out", *flags), teacher.load(str(t))
    x, label = next(training.loader(data.load_images(str(images), mirror=True), 4, 0))
    draws, wanted = splam.draw(x, 1000, 50, training.numbered(0, 0, training.NOISE)), {}
    student = splam.SubPathStudent(model.copy_network(), model.schedule, model.prediction_type)
    target, cond = copy.deepcopy(student), {"class_labels": label}
    for w in (-2, 0, 2):

        def guided(x, t, w=w):
            with torch.no_grad():
                with_label, without = (
                    model.network(x, t, class_labels=c).sample for c in (label, torch.full_like(label, 3))
                )
            output = without + (1 + w) * (with_label - without)
            return splam.to_x0_eps(output, x, *model.schedule.at(t, 4), "v_prediction")

        # The random projection of γ is the run's only other number: zero in the first step it is not.
        torch.manual_seed(0)
        method = {"k": 40, "solver_step": 20, "metric": "huber"}
        student.network.time_embedding.projection.reset_parameters()
        wanted[w] = splam.splad_loss(student, target, guided, model.schedule, x, cond, draws, **method).item()
    assert found == pytest.approx(wanted[2], rel=1e-3)
    assert abs(wanted[2] - wanted[0]) > 0.01 * wanted[2] < abs(wanted[2] - wanted[-2])


def test_dropout_is_the_students_alone(points, tmp_path):
    """In the target or the teacher it would be noise in what the student is asked for."""
    flags = ["--pretrained_teacher_model", str(points), "--output_dir", str(tmp_path / "out")]
    distillation = distill.Distillation(*distill.configure(flags))
    next(distillation.steps())
    modes = [part.training for part in (distillation.run.model, distillation.target, distillation.teacher.network)]
    assert modes == [True, False, False]


def test_all_three_networks_compute_in_the_precision_that_is_asked_for(points, tmp_path):
    """accelerate sees to the student. Without autocast around the loop the other two would compute in float32."""
    flags = ["--pretrained_teacher_model", str(points), "--output_dir", str(tmp_path / "out")]
    distillation, computed = distill.Distillation(*distill.configure([*flags, "--mixed_precision", "bf16"])), {}
    student = distillation.run.accelerator.unwrap_model(distillation.run.model)
    parts = {"student": student, "target": distillation.target, "teacher": distillation.teacher}
    for name, part in parts.items():
        part.network.register_forward_hook(lambda *call, name=name: computed.update({name: call[2].sample.dtype}))
    next(distillation.steps())
    assert computed == dict.fromkeys(parts, torch.bfloat16)


def test_every_flag_of_the_method_is_read(points, tmp_path, call):
    """Each changes the very first loss, the same for all else; bf16 does so by little."""
    base = first_loss(call, points, tmp_path / "out")
    others = "ode dl, ode lcm, sigma markov, metric l2, k 200, solver_step 100, seed 1, num_ddim_timesteps 25"
    others += ", improved time, improved half, improved second_order, improved"
    found = {flag: first_loss(call, points, tmp_path / "out", *f"--{flag}".split()) for flag in others.split(", ")}
    assert len({base, *found.values()}) == 1 + len(found), found
    assert base != first_loss(call, points, tmp_path / "out", "--mixed_precision=bf16") == pytest.approx(base, rel=0.05)


def test_the_default_folder_is_named_after_teacher_and_method(points, monkeypatch):
    monkeypatch.chdir(points.parent)
    for flags, name in (([], "sl"), (["--ode", "lcm"], "lcm"), (["--improved"], "sl-improved")):
        args, _ = distill.configure(["--pretrained_teacher_model", str(points), *flags])
        assert args.output_dir == f"runs/teacher-{name}"


def test_what_would_fail_late_or_in_silence_is_refused_first(points, images, tmp_path, call):
    (tmp_path / "empty").mkdir()
    image_teacher = save(tmp_path / "image_teacher", unet(size=16))
    two_classes, four_classes = (save(tmp_path / str(n), unet(classes=n, size=32)) for n in (2, 4))
    learned = save(tmp_path / "learned", unet(time_embedding_type="learned", num_train_timesteps=1000))
    model, student = teacher.load(str(points)), tmp_path / "student"
    teacher.save(model.student(model.network.state_dict(), 50), student)
    for name, flags, words in (
        ("toy:rings", [], "toy:rings"),
        ("toy:8gaussians", ["--max_train_steps", 100], "--lr_warmup_steps 100"),  # and not after its teacher was fitted
        ("toy:8gaussians", ["--report_to", "nobody"], "--report_to nobody is none of"),
        ("toy:8gaussians", ["--resume_from_checkpoint", tmp_path / "none"], "none is no checkpoint"),
        (tmp_path / "empty", [], "no pipeline folder"),
        (student, [], "is a student"),
        (points, ["--k", 50], "--k 50 is no multiple of --solver_step 20"),
        (points, ["--k", 999, "--solver_step", 333], "--k must be smaller than 999"),
        (points, ["--num_ddim_timesteps", 30], "--num_ddim_timesteps must divide"),
        (points, ["--ode", "lcm", "--k", 50, "--solver_step", 25], "ends sub-paths where none start"),
        (points, ["--guidance_w", 1], "no labels to be guided by"),
        (points, ["--prompts", "a cat"], "prompts are class labels here"),
        (points, ["--num_eval_samples", 1], "--num_eval_samples"),
        (points, ["--resolution", 8], "--resolution 8"),
        ("toy:8gaussians", ["--data", images], "unknown 2-D distribution"),
        (points, ["--lora_rank", 2], "--lora_rank is for models"),
        (points, ["--pretrained_vae_model_name_or_path", "x"], "has no VAE"),
        ("toy:clouds", ["--data", "toy:8gaussians", "--guidance_w", 1], "8 classes, and"),
        (learned, ["--data", images, "--improved", "time", "--ode", "lcm"], "embeddings of whole times only"),
        (image_teacher, [], "--data is missing"),
        (image_teacher, ["--data", tmp_path / "empty"], "no images"),
        (image_teacher, ["--data", images, "--resolution", 32], "of 16 pixels"),
        (two_classes, ["--data", images], "3 classes, and"),
        (four_classes, ["--data", images], "3 classes, and"),  # whose numbers may mean others
    ):
        out = tmp_path / "out"
        status, _, err = call(distill.main, "--pretrained_teacher_model", name, "--output_dir", out, *flags)
        assert status == 2 and words in one_line(err), err
        assert not (tmp_path / "out").exists()


def test_the_toys_teacher_is_fitted_as_its_student_is_trained():
    typed = "--pretrained_teacher_model toy:moons --seed 3 --mixed_precision bf16 --guidance_w 2".split()
    fit = distill.point_teacher_flags(distill.parser().parse_args(typed), "runs/moons")
    assert (fit.data, fit.seed, fit.mixed_precision, fit.class_conditional) == ("toy:moons", 3, "bf16", True)
    assert (fit.output_dir, fit.resume_from_checkpoint) == ("runs/moons/teacher", "latest")


def test_what_is_meant_seldom_is_warned_of(points, tmp_path, caplog):
    named, trailing = tmp_path / "SD-Turbo", tmp_path / "trailing"
    save(named, PointMLP(width=16))
    save(trailing, PointMLP(width=16), timestep_spacing="trailing")
    for name, flags, words in (
        (points, "--sigma markov --improved time", "wrong time"),
        (points, "--k 50 --solver_step 25", "where none start"),
        (points, "--sigma markov", None),
        (named, "", f"{named} looks like a model of few steps"),
        (trailing, "", f"{trailing} looks like a model of few steps"),
    ):
        caplog.clear()
        distill.configure(f"--pretrained_teacher_model {name} --output_dir {tmp_path}/out {flags}".split())
        assert words in caplog.text if words else not caplog.text


def test_presets_are_the_papers_settings(points):
    """Its Appendix A, and its Section 5.1 for w. A preset goes before a recipe, and what is typed before both."""
    for name, k, w, metric, steps in (("sd15", 100, 3, "huber", 6000), ("sd21-base", 20, 8, "l2", 80000)):
        args = distill.parser().parse_args(distill.PRESETS[name].split())
        assert (args.k, args.guidance_w, args.metric, args.max_train_steps) == (k, w, metric, steps)
        assert (args.learning_rate, args.ema_decay, args.max_grad_norm, args.solver_step) == (8e-6, 0.95, 10, 20)
        assert (args.lr_scheduler, args.lr_warmup_steps, args.adam_weight_decay) == ("constant", 0, 0)
        assert args.ode == "sl" and args.improved is None and args.sigma == "linear"
    assert args.pretrained_teacher_model.startswith("sd2-community/")  # the original was removed from the hub
    assert distill.parser().parse_args(distill.PRESETS["sdxl"].split()).lora_rank == 64  # ours, not the paper's
    typed = f"--pretrained_teacher_model {points} --guidance_w 0 --k 40 --preset sd21-base --output_dir {points}/out"
    args, _ = distill.configure(typed.split())
    assert (args.guidance_w, args.k, args.metric, args.train_batch_size) == (0, 40, "l2", 64)
