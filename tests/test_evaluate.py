"""The programs of evaluate.py: the error of Fig. 2(c) and the cost model against what really happens; refusals."""

import json

import pytest
import torch
from conftest import CLASSES, one_line, save, unet
from diffusers import DDIMScheduler

import evaluate
from evaluate import approximated_errors
from metrics import ImageFeatures
from teacher import load


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_approximated_error_is_between_diffusers_predictions_at_neighbours(tmp_path, prediction_type):
    model = load(str(save(tmp_path / "model", unet(), prediction_type)))
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False)
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


@pytest.mark.parametrize(
    "flags, w, draws",
    [
        (["--k", 40], 0, 1),
        (["--k", 60, "--guidance_w", 2, "--ode", "lcm"], 2, 1),
        (["--k", 40, "--gamma_draws", 3], 0, 3),
    ],
)
def test_the_cost_model_counts_the_passes_that_are_made(tmp_path, images, call, flags, w, draws):
    teacher = save(tmp_path / "teacher", unet(classes=3, size=32))
    rows, batch, timed = [], 4, 2

    def count(module, inputs, output):
        if type(module).__name__ == "UNet2DModel":
            rows.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    more = ["--data", images, "--train_batch_size", batch, "--timed_steps", timed, "--output_dir", tmp_path / "out"]
    status, out, err = call(evaluate.main, "throughput", "--pretrained_teacher_model", teacher, *more, *flags)
    hook.remove()
    assert status == 0, err
    result = json.loads((tmp_path / "out/throughput.json").read_text())
    in_training = sum(rows[:-4]) / batch / (evaluate.WARM_UP + 2 * timed)  # the last four time a bare pass
    assert result["forward passes"] == in_training + 2 * draws  # a backward pass costs two forward ones
    assert in_training == flags[1] // 20 * (2 if w else 1) + 1 + draws
    assert result["images/s"] == pytest.approx(batch / result["seconds a step"])
    assert {"teacher", "target", "student", "optimizer", "VAE and text"} < set(result["parts"])
    assert min(result["parts"].values()) > 0 and "images/s" in out and "ratio" in out
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_trained_classifier_knows_the_names_of_its_classes(images, tmp_path, call):
    flags = ["--data", images, "--out", tmp_path / "f.pt2", "--output_dir", tmp_path / "run"]
    status, out, err = call(evaluate.main, "features", *flags, "--max_train_steps", 1, "--train_batch_size", 8)
    assert status == 0 and "test accuracy" in out, err
    measure = ImageFeatures(str(tmp_path / "f.pt2"), torch.zeros(2, 3, 32, 32).byte(), torch.device("cpu"))
    assert measure.classes == CLASSES


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
    status, _, err = call(evaluate.main, t, *flags[:-1], 0)
    assert status == 2 and "--num_samples must be positive" in one_line(err)
    status, _, err = call(evaluate.main, "throughput", *flags[:4], "--timed_steps", 1)
    assert status == 2 and "--timed_steps" in one_line(err)
    status, _, err = call(evaluate.main, t, *flags, "--protocol", "coco2014-30k")
    assert status == 2 and "--prompts" in one_line(err)
    status, _, err = call(evaluate.main, t, *flags, "--clip_model", "ViT-B-32/openai")
    assert status == 2 and "--clip_model" in one_line(err)
