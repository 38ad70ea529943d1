"""Samplers: a seed per image, and diffusers' own loops as oracles."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line, save, unet
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from PIL import Image

import sample
import training
from sample import to_pixels
from teacher import load
from toy import plots
from toy.mlp import PointMLP


@pytest.fixture
def model(tmp_path):
    return load(str(save(tmp_path / "model", unet(), "v_prediction")))


@pytest.mark.parametrize("scheduler", sample.SAMPLERS)
def test_a_sample_depends_on_its_seed_alone(model, scheduler):
    whole = sample.sample(model, range(10, 16), 3, scheduler)
    for batch_size in (1, 4):
        assert torch.allclose(
            whole, sample.sample(model, range(10, 16), 3, scheduler, batch_size=batch_size), atol=1e-4
        )
    assert torch.allclose(whole[2:4], sample.sample(model, range(12, 14), 3, scheduler), atol=1e-4)
    assert (whole[0] - whole[1]).abs().mean() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kind, name", [(DDIMScheduler, "ddim"), (DPMSolverMultistepScheduler, "dpmsolver++")])
@pytest.mark.parametrize("scheduler", [{}, {"rescale_betas_zero_snr": True}, {"thresholding": True}])
def test_baselines_are_diffusers_loops_on_the_raw_network_output(tmp_path, kind, name, steps, scheduler):
    """The scheduler that knows the prediction type, against our conversion of it. Also where α is 0 at the last time,
    and without thresholding, whatever the teacher's scheduler does."""
    model = load(str(save(tmp_path / "model", unet(), "v_prediction", **scheduler)))
    model.scheduler.register_to_config(thresholding=False)
    solver = kind.from_config(model.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    solver.set_timesteps(steps)
    assert solver.timesteps[0] == 999  # from pure noise
    model.scheduler.register_to_config(**scheduler)
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(model.network(x, t).sample, t, x).prev_sample
    assert torch.allclose(sample.sample(model, range(3, 5), steps, name), x, rtol=1e-3, atol=2e-3)


def test_a_grid_or_a_folder_of_the_same_pixels(model, tmp_path, call):
    folder, grid = tmp_path / "folder", tmp_path / "grid.png"
    for out in (folder, grid):
        flags = ["--teacher_steps", 2, "--num_images", 4, "--seed", 5, "--out", out]
        assert call(sample.main, model.name, *flags)[0] == 0
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == ["000005.png", "000006.png", "000007.png", "000008.png"]
    whole = np.asarray(Image.open(grid))
    for i, name in enumerate(names):
        top, left = 1 + 9 * (i // 2), 1 + 9 * (i % 2)
        assert (np.asarray(Image.open(folder / name)) == whole[top : top + 8, left : left + 8]).all()


def test_eta_reaches_the_sampler(model, tmp_path, call):
    """From the command line, for a picture and for a folder. A folder that was made otherwise is refused."""
    made = {eta: to_pixels(sample.sample(model, [5], 2, "lcm", eta=eta))[0] for eta in (0.0, 1.0)}
    assert (made[0.0] != made[1.0]).any()
    flags = ["--scheduler", "lcm", "--seed", 5, "--num_images", 1]
    for eta, given in ((1.0, []), (0.0, ["--eta", 0])):
        folder, grid = tmp_path / f"folder-{eta}", tmp_path / "grid.png"
        assert call(sample.main, model.name, *flags, *given, "--steps", 2, "--out", folder)[0] == 0
        assert (np.asarray(Image.open(folder / "000005.png")) == made[eta]).all()
        assert call(sample.main, model.name, *flags, *given, "--steps", 2, "--out", grid)[0] == 0
        assert (np.asarray(Image.open(grid)) == made[eta]).all()
    status, _, err = call(sample.main, model.name, *flags, "--steps", 2, "--out", folder)
    assert status == 2 and "made with other flags" in one_line(err)
    # What adds no noise has no η in its record.
    assert call(sample.main, model.name, "--num_images", 1, "--teacher_steps", 2, "--out", tmp_path / "ddim")[0] == 0
    records = [
        json.loads((tmp_path / name / "samples.json").read_text()) for name in ("ddim", "folder-1.0", "folder-0.0")
    ]
    assert [record.get("eta") for record in records] == [None, None, 0.0]


def test_times_of_ones_own_are_those_of_diffusers_lcm(model, tmp_path, call):
    """Its `timesteps` and ours, with the same noises; for a picture and for a folder. A folder that was made at other
    times is refused."""
    times, noise = [999, 899, 499], sample.SeededNoise(model.shape, [5], torch.device("cpu"))
    solver, x = LCMScheduler.from_config(model.scheduler.config, clip_sample=False), noise()
    solver.set_timesteps(timesteps=times, original_inference_steps=50)
    with torch.no_grad():
        for t in solver.timesteps:
            x0 = solver.step(model.network(x, t).sample, t, x).denoised
            x = solver.add_noise(x0, noise(), solver.timesteps[solver.step_index]) if t != times[-1] else x0
    wanted = to_pixels(x)[0]
    assert (wanted != to_pixels(sample.sample(model, [5], 3, "lcm"))[0]).any()
    flags = ["--scheduler", "lcm", "--seed", 5, "--num_images", 1, "--timesteps", *times]
    folder, grid = tmp_path / "folder", tmp_path / "grid.png"
    assert call(sample.main, model.name, *flags[:-1], 500, "--out", folder)[0] == 2  # off the grid, and leaves nothing
    for out, image in ((folder, folder / "000005.png"), (grid, grid)):
        assert call(sample.main, model.name, *flags, "--out", out)[0] == 0
        assert np.abs(np.asarray(Image.open(image)).astype(int) - wanted).max() <= 1
    assert json.loads((folder / "samples.json").read_text())["timesteps"] == times
    status, _, err = call(sample.main, model.name, *flags[:-1], 799, "--out", folder)
    assert status == 2 and "made with other flags" in one_line(err)


@pytest.mark.parametrize("steps", [[2], [1, 2]])
def test_points_are_drawn_by_the_thousand(tmp_path, call, monkeypatch, steps):
    """In a picture of one panel and of several: a distribution cannot be seen in a few points."""
    name, drawn = save(tmp_path / "points", PointMLP(width=16)), []
    monkeypatch.setattr(plots, "_scatter", lambda axis, points, title: drawn.append(len(points)))
    status, _, err = call(sample.main, name, "--teacher_steps", *steps, "--out", tmp_path / "x.png")
    assert status == 0 and drawn == [4096] * len(steps), err


@pytest.mark.parametrize(("classes", "columns"), [(None, 8), (3, 6), (10, 10), (40, 8)])
def test_a_row_of_a_picture_shows_all_classes_equally_often(tmp_path, call, monkeypatch, classes, columns):
    shown = []
    monkeypatch.setattr(sample, "overview", lambda model, rows: shown.append(rows) or Image.new("RGB", (1, 1)))
    model = save(tmp_path / "m", unet(classes))
    flags = ["--teacher_steps", 1, 2, "--out", tmp_path / "x.png"]
    status, _, err = call(sample.main, model, *flags)
    assert status == 0, err
    assert [len(x) for x in shown[0].values()] == [columns, columns]
    # And all of a teacher's grid are whole rows of them.
    number, row = sample.preview(load(str(model)))
    assert row == columns and number % row == 0 and 60 <= number <= 64
    # So is the grid of one model: 8 pixels and a line for each image, and a line to begin with.
    assert call(sample.main, model, "--teacher_steps", 1, "--out", tmp_path / "grid.png")[0] == 0
    assert Image.open(tmp_path / "grid.png").size == (1 + 9 * columns, 1 + 9 * (number // columns))


def test_processes_share_the_samples_of_a_folder(model, tmp_path, monkeypatch):
    made = []
    for rank in range(3):
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=not rank)
        state.wait_for_everyone = lambda: None
        monkeypatch.setattr(training, "process", lambda state=state: state)
        before = set(tmp_path.glob("*.png"))
        sample.sample_to_folder(model, range(5, 12), tmp_path, 2, batch_size=2)
        made.append(set(tmp_path.glob("*.png")) - before)
    assert [len(files) for files in made] == [3, 2, 2]
    assert {path.name for path in set.union(*made)} == {f"{seed:06d}.png" for seed in range(5, 12)}
    alone = to_pixels(sample.sample(model, [11], 2))[0]
    assert (np.asarray(Image.open(tmp_path / "000011.png")) == alone).all()


def test_bad_flags_end_in_one_line_and_status_2(model, tmp_path, call):
    (tmp_path / "folder.png").mkdir()
    for flags, words in (
        (["--teacher_steps", 0], "--teacher_steps must be positive"),
        (["--teacher_steps", 2000], "1 to 1000 steps, not 2000"),
        (["--steps", "many"], "--steps must be positive"),
        (["--steps", 4], "--teacher_steps"),
        (["--steps", 60, "--scheduler", "lcm"], "1 to 50 steps, not 60"),
        (["--prompts", 1], "no classes"),
        (["--guidance_w", 1], "conditional teacher"),
        (["--guidance_w", 1, "--scheduler", "lcm"], "in its weights"),
        (["--eta", 0.5], "--eta is for students"),
        (["--eta", 0.5, "--scheduler", "lcm", "--steps", 1], "--eta is for students of several steps"),
        (["--eta", 1.5, "--scheduler", "lcm"], "from 0 to 1"),
        (["--timesteps", 999, "--teacher_steps", 2], "--timesteps are for students"),
        (["--timesteps", 999, 499, "--scheduler", "lcm", "--steps", 2], "leave --steps out"),
        (["--timesteps", 999, 500, "--scheduler", "lcm"], "on the student's grid: 999, 979, 959, ... 19"),
        (["--timesteps", 899, 499, "--scheduler", "lcm"], "must begin with 999 and fall"),
        (["--timesteps", 999, 499, 499, "--scheduler", "lcm"], "must begin with 999 and fall"),
        (["--timesteps", 999, -1, "--scheduler", "lcm"], "a whole number, 0 or more"),
        (["--num_images", 0], "positive"),
        (["--out", tmp_path / "model/unet/config.json/x.png"], "cannot write"),
        (["--out", tmp_path / "folder.png"], "folder.png must be the name of a file"),
        (["--out", tmp_path / "x.jpg"], "ends in .png"),
        (["--prompts", tmp_path / "captions.txt"], "no such file"),
        (["--prompts", "0", "captions.txt"], "no such file"),
    ):
        status, _, err = call(sample.main, model.name, *flags)
        assert status == 2 and words in one_line(err), err
    status, _, err = call(sample.main, tmp_path / "missing")
    assert status == 2 and "missing" in one_line(err)
