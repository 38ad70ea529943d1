"""Samplers: a seed for each sample, and diffusers' schedulers and scipy as oracles; folders and pictures."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line, unet
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import sample
import training
from sample import SeededNoise, to_pixels
from teacher import ImageModel, PointModel, save
from toy import plots
from toy.mlp import PointMLP

SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")


def model_with(kind=DDPMScheduler, classes=None, **options):
    return ImageModel(unet(classes), kind(**{**SCHEDULE, **options}), "model")


@pytest.mark.parametrize("kind", [DDPMScheduler, LCMScheduler])
def test_a_sample_depends_on_its_seed_alone(kind):
    model = model_with(kind)
    whole = sample.sample(model, range(10, 16), 3)
    assert torch.allclose(whole[2:], sample.sample(model, range(12, 16), 3, batch_size=3), atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True}, {"prediction_type": "epsilon"}])
def test_ddim_is_diffusers_own_loop_with_and_without_guidance(steps, w, options):
    """The scheduler that knows the prediction type, on the raw output of the network. Also where α is 0 at the end."""
    model, config = model_with(classes=3, **options), {**SCHEDULE, **options, "timestep_spacing": "trailing"}
    solver = DDIMScheduler(**config, clip_sample=False)
    solver.set_timesteps(steps)
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)])
    assert solver.timesteps.tolist() == sample.sampling_times(model, steps)
    with torch.no_grad():
        for t in solver.timesteps:
            output = model.network(x, t, class_labels=torch.tensor([1, 2])).sample  # by their seeds, 4 and 5
            free = model.network(x, t, class_labels=torch.tensor([3, 3])).sample
            x = solver.step((1 + w) * output - w * free, t, x).prev_sample
    ours = sample.sample(model, range(4, 6), steps, w=w)
    assert torch.allclose(ours, x, rtol=1e-3, atol=2e-3 * x.abs().max().item())


OTHERS = [
    (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True, "thresholding": True}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"euler_at_final": True, "lambda_min_clipped": -2.0, "use_lu_lambdas": True}),
]


def test_ddim_does_not_hear_what_the_teachers_scheduler_says():
    wanted = sample.sample(model_with(), range(2), 6)
    for kind, options in OTHERS:
        assert torch.equal(sample.sample(model_with(kind, **options), range(2), 6), wanted), options


@pytest.mark.parametrize("steps, bound", [(1000, 0.003), (501, 0.005), (61, 0.03)])
def test_ddim_arrives_where_the_pf_ode_ends_in_any_number_of_steps(steps, bound):
    """By scipy. diffusers' DDIM is 0.1 off in 501 steps, and has 62 times for 61."""
    model = PointModel(PointMLP(width=8, distribution="clouds", ideal=True), DDPMScheduler(**SCHEDULE), "ideal:clouds")
    model.prediction_type, model.null_label = "epsilon", None
    noise = SeededNoise((2,), range(100), torch.device("cpu"))()
    end = model.mixture.endpoint(noise, *model.schedule.at(torch.tensor([999]), 2))
    assert (sample.sample(model, range(100), steps) - end).norm(dim=1).mean() < bound


@pytest.mark.parametrize("times", [[], [999], [999, 899, 499], [999, 19]])
def test_a_student_is_sampled_as_by_diffusers_lcm(times):
    """At its own times and at others, with the same noises. TCD's scheduler marks a student as well."""
    model, noise = model_with(LCMScheduler), SeededNoise((3, 8, 8), [5, 6], torch.device("cpu"))
    solver, x = LCMScheduler(**SCHEDULE, clip_sample=False), noise()
    solver.set_timesteps(4) if not times else solver.set_timesteps(timesteps=times, original_inference_steps=50)
    with torch.no_grad():
        for i, t in enumerate(solver.timesteps):
            x0 = solver.step(model.network(x, t).sample, t, x).denoised
            x = solver.add_noise(x0, noise(), solver.timesteps[i + 1]) if i + 1 < len(solver.timesteps) else x0
    for student in (model, model_with(TCDScheduler)):
        assert torch.allclose(sample.sample(student, [5, 6], len(times) or 4, timesteps=times), x, rtol=1e-3, atol=1e-3)


def test_a_student_that_takes_w_is_told_it(monkeypatch):
    told = []
    for model in (model_with(LCMScheduler, classes=3), model_with(classes=3)):
        condition, model.takes_w = model.condition, True
        monkeypatch.setattr(model, "condition", lambda label, w=0.0, own=condition: told.append(w) or own(label))
        sample.sample(model, [0], 1, w=3.0)
    assert told == [3.0, 0.0, 0.0]  # a teacher's ε̃ is guided, from two conditions


def test_a_grid_and_a_folder_have_the_same_pixels_and_a_folder_is_filled_up(tmp_path, call, caplog):
    name, folder, grid = (tmp_path / part for part in ("model", "folder", "grid.png"))
    save(model_with(), name)
    flags = ["--teacher_steps", 2, "--num_images", 4, "--seed", 5, "--out"]
    for out in (folder, grid):
        assert call(sample.main, name, *flags, out)[0] == 0
    names = [f"{seed:06d}.png" for seed in range(5, 9)]
    assert sorted(path.name for path in folder.iterdir()) == names
    whole = np.asarray(Image.open(grid))
    for i, file in enumerate(names):
        assert (np.asarray(Image.open(folder / file)) == whole[1:9, 1 + 9 * i : 9 + 9 * i]).all()
    # What an interrupted call has left is kept, with a warning that says so, and drafts are made anew.
    made = (folder / names[1]).read_bytes()
    (folder / names[0]).write_bytes(b"kept")
    (folder / names[1]).rename(folder / f"{names[1]}.tmp")
    assert call(sample.main, name, *flags, folder)[0] == 0 and "has 3 samples, which are kept" in caplog.text
    assert (folder / names[0]).read_bytes() == b"kept" and (folder / names[1]).read_bytes() == made
    assert (to_pixels(sample.read_png(folder, 7)[None])[0] == np.asarray(Image.open(folder / names[2]))).all()
    flags[3] = 3  # of 4, so that one of the samples is another file
    status, _, err = call(sample.main, name, *flags, folder)
    assert status == 2 and "holds other files than these samples: 000008.png" in one_line(err)


def test_processes_share_the_samples_of_a_folder(tmp_path, monkeypatch):
    model, made = model_with(), []
    for rank in range(3):
        state = SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=lambda: None)
        monkeypatch.setattr(training, "process", lambda state=state: state)
        sample.sample_to_folder(model, range(5, 12), tmp_path, 2, batch_size=2)
        made.append(len(list(tmp_path.glob("*.png"))))
    assert made == [3, 5, 7]
    alone = VaeImageProcessor().postprocess(sample.sample(model, [11], 2))[0]  # pixels as diffusers makes them
    assert (np.asarray(Image.open(tmp_path / "000011.png")) == np.asarray(alone)).all()


@pytest.mark.parametrize(("classes", "columns"), [(None, 8), (3, 6), (10, 10), (40, 8)])
def test_a_row_of_a_picture_shows_all_classes_equally_often(tmp_path, call, classes, columns):
    """An image has 8 pixels and a line, and there is a line to begin with. Rows of several models have names above."""
    save(model_with(classes=classes), tmp_path / "m")
    flags = [tmp_path / "m", "--out", tmp_path / "x.png", "--teacher_steps"]
    width, scale = 1 + 9 * columns, 800 // (1 + 9 * columns)
    for steps, size in (([1], (width, 1 + 9 * (64 // columns))), ([1, 2], (width * scale, 2 * (10 * scale + 16)))):
        assert call(sample.main, *flags, *steps)[0] == 0
        assert Image.open(tmp_path / "x.png").size == size


@pytest.mark.parametrize("kind, flags", [(DDPMScheduler, [2]), (DDPMScheduler, [1, 2]), (LCMScheduler, [1, 2])])
def test_points_are_drawn_by_the_thousand(tmp_path, call, monkeypatch, kind, flags):
    """In a picture of one panel and of several. These have the PF-ODE of a teacher, but not of a student."""
    drawn, draw, teacher = [], plots.overview, kind is DDPMScheduler
    save(PointModel(PointMLP(width=16, num_class_embeds=9), kind(**SCHEDULE), "points"), tmp_path / "points")
    monkeypatch.setattr(plots, "overview", lambda *given: drawn.append(given) or draw(*given))
    flag = "--teacher_steps" if teacher else "--steps"
    status, _, err = call(sample.main, tmp_path / "points", "--out", tmp_path / "x.png", flag, *flags)
    ((panels, *path),) = drawn
    assert status == 0 and [len(x) for x in panels.values()] == [4096] * len(flags), err
    assert any(path) == (teacher and len(flags) > 1)


def test_a_teacher_is_guided_beside_its_student(tmp_path, call, monkeypatch):
    """Each has a folder of its own. Even a single batch has a progress bar, with a name."""
    monkeypatch.chdir(tmp_path)
    for kind in (DDPMScheduler, LCMScheduler):
        save(model_with(kind, classes=3), Path(kind.__name__[:3]))
    flags = ["--guidance_w", 2, "--steps", 1, 2, "--teacher_steps", 2, "--num_images", 3, "--out", "out"]
    status, _, err = call(sample.main, "DDP", "LCM", *flags)
    assert status == 0 and "DDP, w = 2, 2 steps:   0%" in err
    assert sample.slug("./runs/a/, 4 steps") == sample.slug("runs/a, 4 steps") == "runs-a-4-steps"
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"DDP-w-2-2-steps", "LCM-1-step", "LCM-2-steps"}


def test_bad_flags_end_in_one_line_and_leave_nothing(tmp_path, call):
    save(model_with(), tmp_path / "teacher")
    save(model_with(LCMScheduler), tmp_path / "student")
    for name, flags, words in (
        ("teacher", ["--teacher_steps", 2000], "1 to 1000 steps, not 2000"),
        ("teacher", ["--steps", 4], "takes --teacher_steps"),
        ("student", ["--steps", 60], "1 to 50 steps, not 60"),
        ("teacher", ["--prompts", 1], "no classes"),
        ("teacher", ["--guidance_w", 1], "cannot be guided"),
        ("student", ["--guidance_w", 1], "cannot be guided"),
        ("student", ["--teacher_steps", 4], "takes --steps"),
        ("student", ["--timesteps", 999, 500], "2 falling times of 999, ... 19, the first 999"),
        ("student", ["--out", tmp_path / "x.jpg"], "ends in .png"),
    ):
        status, _, err = call(sample.main, tmp_path / name, "--out", tmp_path / "new" / "out", *flags)
        assert status == 2 and words in one_line(err) and not (tmp_path / "new").exists(), err
