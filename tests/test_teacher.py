"""Teachers are diffusers pipeline folders of every prediction type and schedule, with and without labels."""

import json
import shutil

import pytest
import torch
from conftest import one_line, unet
from conftest import save as save_parts
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from safetensors.torch import load_file, save_file

import distill
import sample
import teacher
from data import BadInput
from splam import ConsistencyFunction, boundary, to_x0_eps
from teacher import ImageModel, PointModel, fit_or_load, load, save
from toy.distributions import DISTRIBUTIONS
from toy.laboratory import pf_ode_end
from toy.mlp import PointMLP

TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_predictions_and_schedule_are_those_of_diffusers(tmp_path, prediction_type, beta_schedule):
    """Oracle: DDIMScheduler's pred_original_sample from the same network output."""
    model = load(str(save_parts(tmp_path, unet(), prediction_type, beta_schedule)))
    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    assert torch.allclose(model.schedule.alpha**2, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-9)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 10, 400, 900):
        with torch.no_grad():
            x0, eps = model.predict(x, torch.tensor([t]), {})
            wanted = scheduler.step(model.network(x, t).sample, t, x).pred_original_sample
        assert torch.allclose(x0, wanted, rtol=1e-3, atol=1e-3)
        alpha, sigma = model.schedule.at(torch.tensor([t]), 4)
        assert torch.allclose(alpha * x0 + sigma * eps, x, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_guidance_in_one_batch_is_guidance_in_two_passes(tmp_path, prediction_type):
    model = load(str(save_parts(tmp_path, unet(classes=4), prediction_type)))
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([5, 500, 900])
    label, nothing = torch.tensor([0, 1, 3]), torch.full((3,), 4)
    with torch.no_grad():
        _, with_label = model.predict(x, t, {"class_labels": label})
        _, without = model.predict(x, t, {"class_labels": nothing})
        x0, eps = model.predict(x, t, {"class_labels": label}, w=2.5)
    assert (with_label - without).abs().max() > 1e-3  # else the next line would hold for any w
    assert torch.allclose(eps, with_label + 2.5 * (with_label - without), rtol=1e-3, atol=1e-3)
    alpha, sigma = model.schedule.at(t, 4)
    assert torch.allclose(alpha * x0 + sigma * eps, x, atol=1e-3)


def test_w_zero_makes_no_unconditional_pass(tmp_path, monkeypatch):
    model = load(str(save_parts(tmp_path, unet(classes=4))))
    seen, forward = [], model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, t, **k: seen.append(len(x)) or forward(x, t, **k))
    for w, rows in ((0.0, 2), (1.0, 4)):
        model.predict(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), {"class_labels": torch.tensor([0, 1])}, w)
        assert seen.pop() == rows and not seen


def test_guidance_without_labels_is_refused(tmp_path):
    with pytest.raises(BadInput, match="conditional teacher"):
        load(str(save_parts(tmp_path, unet()))).predict(torch.randn(1, 3, 8, 8), torch.tensor([1]), {}, w=1.0)


@pytest.mark.parametrize("conditioning", ["embedding", "time"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_student_starts_as_the_teacher(tmp_path, prediction_type, conditioning):
    """At γ = 1 and step 0, whatever the γ-projection's weights are; and stock names and shapes come back out."""
    model = load(str(save_parts(tmp_path, unet(classes=4), prediction_type)))
    student = ConsistencyFunction(model.copy_network(), model.schedule, prediction_type, conditioning)
    x, t, cond = torch.randn(3, 3, 8, 8), torch.tensor([19, 499, 999]), {"class_labels": torch.tensor([0, 1, 4])}
    with torch.no_grad():
        x0, _ = model.predict(x, t, cond)
        c_skip, c_out = boundary(t, 4)
        assert torch.allclose(student(x, t, **cond), c_skip * x + c_out * x0, rtol=1e-3, atol=1e-3)
    weights = student.plain_state_dict()
    assert {name: w.shape for name, w in weights.items()} == {n: w.shape for n, w in model.network.state_dict().items()}
    again = model.student(weights, 50)
    assert all(torch.equal(a, b) for a, b in zip(again.network.parameters(), model.network.parameters(), strict=True))


def test_an_ideal_teacher_answers_by_its_distribution_and_its_students_by_their_network(tmp_path):
    torch.manual_seed(0)
    network = PointMLP(width=16, num_class_embeds=3, distribution="clouds", ideal=True)
    teacher = load(str(save_parts(tmp_path / "t", network, clip_sample=False)))
    x, t, label = torch.randn(8, 2), torch.full((8,), 500), torch.arange(8) % 3
    cond = teacher.condition(label)
    alpha, sigma = teacher.schedule.at(t, 2)
    x0, eps = teacher.predict(x, t, cond, 2.0)
    torch.testing.assert_close(eps, DISTRIBUTIONS["clouds"].eps(x, alpha, sigma, label, 2.0))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    save(teacher.student(teacher.network.state_dict(), 50), tmp_path / "s")
    student = load(str(tmp_path / "s"))
    _, eps = student.predict(x, t, cond)
    torch.testing.assert_close(eps, network(x, t, label).sample)


@pytest.mark.parametrize("ideal", [True, False])
def test_the_endpoint_is_where_the_teachers_own_sampler_arrives(tmp_path, ideal):
    torch.manual_seed(0)
    teacher = load(str(save_parts(tmp_path, PointMLP(width=16, ideal=ideal), clip_sample=False)))
    noise = sample.SeededNoise((2,), range(32), torch.device("cpu"))()
    by_sampler = sample.sample(teacher, range(32), 1000, "ddim")
    assert (pf_ode_end(teacher, noise, {}) - by_sampler).norm(dim=1).mean() < 0.01


def test_the_kind_is_read_from_the_folder(tmp_path):
    assert isinstance(load(str(save_parts(tmp_path / "a", unet()))), ImageModel)
    assert isinstance(load(str(save_parts(tmp_path / "b", PointMLP(width=8)))), PointModel)
    network = DiffusionPipeline.from_pretrained(save_parts(tmp_path / "c", unet(classes=4))).unet  # stock diffusers
    assert network.config.num_class_embeds == 5


def test_what_is_no_teacher_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="no pipeline folder"):
        load(str(tmp_path))
    with pytest.raises(BadInput, match="nobody/nothing"):
        load("nobody/nothing")
    with pytest.raises(BadInput, match="unknown 2-D distribution 'toy:rings'"):
        fit_or_load("toy:rings", tmp_path)


def test_a_folder_of_another_kind_is_refused_before_it_can_name_a_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    save_parts(tmp_path / "teacher", unet())
    file = tmp_path / "teacher/model_index.json"
    index = json.loads(file.read_text())
    evil = {"unet": ["evil", "UNet2DModel"]}, {"scheduler": ["evil", "DDPMScheduler"]}
    for change in ({"_class_name": "KandinskyPipeline"}, *evil):
        file.write_text(json.dumps(index | change))
        with pytest.raises(BadInput, match="no kind of teacher"):
            load(str(tmp_path / "teacher"))


def test_a_folder_holds_a_lora_or_a_pipeline_and_never_both(tmp_path, monkeypatch):
    """Else one of them would be loaded for the other."""
    model, folder = load(str(save_parts(tmp_path / "t", unet()))), tmp_path / "out"
    folder.mkdir()
    (folder / teacher.LORA_FILE).touch()
    save(model, folder)
    assert (folder / "model_index.json").is_file() and not (folder / teacher.LORA_FILE).exists()
    monkeypatch.setattr(model, "write", lambda draft: (draft / teacher.LORA_FILE).touch())
    save(model, folder)
    assert (folder / teacher.LORA_FILE).is_file() and not (folder / "model_index.json").exists()


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(file, **changes):
    """Entries of a JSON file become others."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def replaced(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def without(part):
    return lambda folder: shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()


def without_weights(file, name):
    def change(folder):
        save_file({key: w for key, w in load_file(folder / file).items() if key != name}, folder / file)

    return change


def of_flow_matching(folder):
    edit("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


BROKEN = {
    "the index is a list": (replaced("model_index.json", b"[]"), "no JSON object"),
    "the index is no text": (replaced("model_index.json", b"\xff\xfe"), "cannot read"),
    "the index names a number": (edit("model_index.json", unet=3), "no kind of teacher"),
    "the index names half a part": (edit("model_index.json", scheduler=["diffusers"]), "cannot load"),
    "the index names no class": (edit("model_index.json", scheduler=["diffusers", "Nonsense"]), "cannot load"),
    "the network is missing": (without("unet"), "cannot load"),
    "the scheduler is missing": (without("scheduler"), "cannot load"),
    "the network's config is empty": (replaced(UNET, b""), "cannot load"),
    "the network's config is another's": (edit(UNET, in_channels=4), "cannot load"),
    "the network's config is no config": (edit(UNET, num_class_embeds="x"), "cannot load"),
    "the weights are torn": (lambda folder: replaced(WEIGHTS, (folder / WEIGHTS).read_bytes()[:100])(folder), "cannot"),
    "the weights are garbage": (replaced(WEIGHTS, b"garbage" * 50), "cannot load"),
    "a weight is missing": (without_weights(WEIGHTS, "conv_in.weight"), "no weights for some"),
    "no size": (edit(UNET, sample_size=None), "None pixels"),
    "no square": (edit(UNET, sample_size=[8, 8]), "a square"),
    "flow matching": (of_flow_matching, "FlowMatchEulerDiscreteScheduler"),
    "classes that are times": (edit(UNET, class_embed_type="identity"), "classes as 'identity'"),
    "an unknown prediction": (edit(SCHEDULER, prediction_type="flow"), "'flow'"),
    "an unknown schedule": (edit(SCHEDULER, beta_schedule="foo"), "foo is not implemented"),
    "a schedule of nothing": (edit(SCHEDULER, num_train_timesteps=0), "does not fall"),
    "a schedule without noise": (edit(SCHEDULER, beta_start=0, beta_end=0), "does not fall"),
    "a schedule of nan": (edit(SCHEDULER, beta_end=float("nan")), "does not fall"),
    "epsilon with zero terminal SNR": (edit(SCHEDULER, rescale_betas_zero_snr=True), "zero terminal SNR"),
}


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line(tmp_path, change, words):
    folder = save_parts(tmp_path, unet())
    load(str(folder))  # which is whole until now
    change(folder)
    with pytest.raises(BadInput, match=words) as refusal:
        load(str(folder))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_schedule_that_the_students_scheduler_does_not_have_is_refused_before_training(tmp_path, call):
    folder = save_parts(tmp_path / "teacher", unet(), beta_schedule="sigmoid")  # DDPM's has it, LCM's has not
    flags = ["--pretrained_teacher_model", folder, "--data", "nowhere", "--output_dir", tmp_path / "out"]
    status, _, err = call(distill.main, *flags)
    assert status == 2 and "sigmoid" in one_line(err)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        (DDPMScheduler, {"beta_start": None, "beta_end": None}, "another noise schedule"),  # each kind has its defaults
        (PNDMScheduler, {"rescale_betas_zero_snr": True}, "another noise schedule"),  # PNDM does not know it
        (EulerDiscreteScheduler, {"rescale_betas_zero_snr": True}, "zero terminal SNR"),  # Euler has 2**-24 for 0
    ],
)
def test_a_student_has_the_schedule_of_its_teacher_or_is_refused_before_training(tmp_path, call, kind, changes, words):
    folder = save_parts(tmp_path / "teacher", unet())
    edit("model_index.json", scheduler=["diffusers", kind.__name__])(folder)
    kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    config = json.loads((folder / SCHEDULER).read_text()) | changes
    (folder / SCHEDULER).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert not load(str(folder)).is_student
    flags = ["--pretrained_teacher_model", folder, "--data", "nowhere", "--output_dir", tmp_path / "out"]
    status, _, err = call(distill.main, *flags)
    assert status == 2 and words in one_line(err), err


@pytest.mark.parametrize("times", ["x", None, 0, 5000])
def test_a_student_without_a_grid_is_refused_in_one_line(tmp_path, times):
    model = load(str(save_parts(tmp_path / "teacher", unet())))
    save(model.student(model.network.state_dict(), 50), tmp_path / "student")
    assert load(str(tmp_path / "student")).original_inference_steps == 50
    edit(SCHEDULER, original_inference_steps=times)(tmp_path / "student")
    with pytest.raises(BadInput, match="original_inference_steps"):
        load(str(tmp_path / "student"))


def test_images_of_one_channel_are_refused_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="1 channels"):
        load(str(save_parts(tmp_path, unet(in_channels=1, out_channels=1))))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_network_that_predicts_its_variance_too_is_used_without(tmp_path, prediction_type):
    """As diffusers does it: the first half of the output is ε, v or x_0."""
    network = unet(classes=4, out_channels=6)
    model = load(str(save_parts(tmp_path / "t", network, prediction_type, variance_type="learned_range")))
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([100, 900]), {"class_labels": torch.tensor([0, 3])}
    with torch.no_grad():
        x0, eps = model.predict(x, t, cond)
        half = network(x, t, **cond).sample[:, :3]
    wanted = to_x0_eps(half, x, *model.schedule.at(t, 4), prediction_type)
    torch.testing.assert_close((x0, eps), wanted)
    save(model.student(model.network.state_dict(), 50), tmp_path / "s")
    stock = DDPMPipeline.from_pretrained(tmp_path / "s").unet
    with torch.no_grad():
        torch.testing.assert_close(stock(x, t, **cond).sample, half)
    for sampler in ("ddim", "dpmsolver++"):
        assert sample.sample(model, range(2), 3, sampler).isfinite().all()


def test_weights_in_a_pickle_are_refused(tmp_path):
    save_parts(tmp_path, unet())
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet().state_dict(), tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match="cannot load"):
        load(str(tmp_path))


def test_training_with_labels_trains_the_label_of_no_class(images, tmp_path, call):
    flags = ["--data", images, "--output_dir", tmp_path, "--class_conditional", "--mixed_precision", "no"]
    status, _, err = call(teacher.main, *flags, "--max_train_steps", 3, "--train_batch_size", 32, "--seed", 3)
    assert status == 0, err
    trained, losses = load(str(tmp_path)), (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert trained.null_label == 3 and trained.prediction_type == "v_prediction" and len(losses) == 3
    # Every label's row, "no class" among them, has had a gradient: AdamW's first moment tells.
    table = torch.load(tmp_path / "checkpoint-3/optimizer.bin", weights_only=True)["state"]
    moments = [
        m["exp_avg"] for m in table.values() if m["exp_avg"].shape == trained.network.class_embedding.weight.shape
    ]
    assert len(moments) == 1 and (moments[0].abs().sum(1) > 0).all()


def test_images_are_brought_to_the_resolution_and_the_network_to_its_channels(images, tmp_path, call):
    flags = ["--data", images, "--output_dir", tmp_path, "--resolution", 8, "--block_out_channels", 8, 16]
    status, _, err = call(teacher.main, *flags, "--max_train_steps", 1, "--train_batch_size", 4)
    assert status == 0, err
    config = load(str(tmp_path)).network.config
    assert config.sample_size == 8 and list(config.block_out_channels) == [8, 16]


def test_bad_flags_end_in_one_line_and_status_2(images, tmp_path, call):
    (tmp_path / "file").touch()
    for flags, word in (
        (["--data", tmp_path / "none", "--output_dir", tmp_path / "o"], "no such folder"),
        (["--data", "toy:rings", "--output_dir", tmp_path / "o"], "toy:rings"),
        (["--data", "toy:moons", "--output_dir", tmp_path / "file"], "cannot write"),
        (["--data", "toy:moons", "--output_dir", tmp_path / "o", "--max_train_steps", 0], "max_train_steps"),
        (["--data", "toy:spiral", "--output_dir", tmp_path / "o", "--class_conditional"], "has no classes"),
        (["--data", "toy:moons", "--output_dir", tmp_path / "o", "--resolution", 8], "--resolution"),
        (["--data", images, "--output_dir", tmp_path / "o", "--block_out_channels", 8, 12], "--block_out_channels"),
        (["--data", images, "--output_dir", tmp_path / "o", "--resolution", 10], "--block_out_channels"),
    ):
        status, _, err = call(teacher.main, *flags)
        assert status == 2 and word in one_line(err)
