"""Teachers are diffusers pipeline folders of both prediction types and of every schedule, with and without labels."""

import json
from unittest.mock import patch

import diffusers
import pytest
import torch
from conftest import losses, one_line, unet
from conftest import save as save_parts
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

import data
import distill
import sample
import teacher
import training
from cli import program
from teacher import ImageModel, PointModel, load, save
from toy.distributions import DISTRIBUTIONS
from toy.mlp import PointMLP

TYPES = ["epsilon", "v_prediction"]
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
ZERO_SNR = {"rescale_betas_zero_snr": True}  # which PNDM's scheduler does not know
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


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
        x0, eps = model.predict(x, torch.tensor([t]), {})
        wanted = scheduler.step(model.network(x, t).sample, t, x).pred_original_sample
        assert torch.allclose(x0, wanted, rtol=1e-3, atol=1e-3)
        assert torch.allclose(scheduler.add_noise(x0, eps, torch.tensor([t])), x, atol=1e-4)


@pytest.mark.parametrize("w, passed", [(2.5, 6), (-1.0, 6), (0.0, 3)])
def test_guidance_is_one_batch_and_none_a_single_pass(tmp_path, w, passed):
    model, rows = load(str(save_parts(tmp_path, unet(classes=4)))), []
    model.network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    model.predict(torch.randn(3, 3, 8, 8), torch.full((3,), 500), model.condition([0, 1, 3]), w)
    assert rows == [passed]


def test_an_ideal_teacher_answers_by_its_distribution_and_its_students_by_their_network(tmp_path):
    torch.manual_seed(0)
    network = PointMLP(width=16, num_class_embeds=3, distribution="clouds", ideal=True)
    model = load(str(save_parts(tmp_path / "t", network, clip_sample=False)))
    x, t, label = torch.randn(8, 2), torch.full((8,), 500), torch.arange(8) % 3
    alpha, sigma = model.schedule.at(t, 2)
    x0, eps = model.predict(x, t, model.condition(label), 2.0)
    torch.testing.assert_close(eps, DISTRIBUTIONS["clouds"].eps(x, alpha, sigma, label, 2.0))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    save(model.student(model.network.state_dict(), 50), tmp_path / "s")
    _, eps = load(str(tmp_path / "s")).predict(x, t, model.condition(label))
    torch.testing.assert_close(eps, network(x, t, label).sample)
    assert (network(x, t, 2 - label).sample - eps).abs().amax(1)[label != 1].min() > 1e-3  # it is told its label


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_teacher_learns_noise_or_velocity_and_drops_a_tenth_of_its_labels(tmp_path, prediction_type):
    """What the loop gives its network and wants of it, beside diffusers' add_noise and get_velocity."""
    flags = f"--data toy:moons --class_conditional --prediction_type {prediction_type} --output_dir {tmp_path}"
    args = teacher.parse(f"{flags} --max_train_steps 4 --lr_warmup_steps 0 --train_batch_size 4096".split())
    model, labels, times = teacher.new_model(args), [], []
    with patch("teacher.mse_loss", wraps=mse_loss) as compared:
        with patch.object(PointMLP, "forward", autospec=True, side_effect=PointMLP.forward) as given:
            teacher.train(args, model, model.dataset(args))
    for i, (x0, _) in zip(range(4), training.loader(model.dataset(args), 4096, 0), strict=False):
        generator = training.numbered(0, i, training.NOISE)
        t, _ = 999 - torch.randint(1000, (4096,), generator=generator), torch.rand(4096, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        (_, x, told), (_, target) = given.call_args_list[i].args, compared.call_args_list[i].args
        right = noise if prediction_type == "epsilon" else model.scheduler.get_velocity(x0, noise, t)
        torch.testing.assert_close((x, told), (model.scheduler.add_noise(x0, noise, t), t), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target, right, rtol=1e-4, atol=1e-5)
        times, labels = [*times, t], [*labels, given.call_args_list[i].kwargs["class_labels"]]
    t, dropped = torch.cat(times), (torch.cat(labels) == 2).float()
    assert t.min() < 5 and t.max() > 994  # every time is a start
    assert 0.09 < dropped.mean() < 0.11  # four standard deviations of 16,384 draws
    assert abs(dropped[t < 500].mean() - dropped[t >= 500].mean()) < 0.02  # whatever the time is


def test_the_flags_of_the_noise_are_those_of_diffusers_scheduler():
    for betas in ({}, {"beta_start": 0.00085, "beta_end": 0.012}):
        flags = [f"--{name}={value}" for name, value in betas.items()]
        model = teacher.new_model(teacher.parse(["--data=toy:moons", "--beta_schedule=linear", *flags]))
        assert torch.allclose(model.schedule.alpha**2, DDPMScheduler(**betas).alphas_cumprod, rtol=1e-5)


def test_a_saved_teacher_is_the_average_of_its_weights(images, tmp_path, call, monkeypatch):
    """Also: --resolution and --block_out_channels shape the network, and --class_conditional adds a label for none."""
    averages, update = [], teacher.ema_update
    monkeypatch.setattr(teacher, "ema_update", lambda *a: averages.append(a) or update(*a))
    flags = ["--data", images, "--output_dir", tmp_path, "--class_conditional", "--mixed_precision", "no"]
    flags += ["--max_train_steps", 3, "--lr_warmup_steps", 0, "--train_batch_size", 8, "--resolution", 8]
    status, _, err = call(teacher.main, *flags, "--block_out_channels", 8, 16)
    assert status == 0, err
    saved, (average, network, _) = load(str(tmp_path)), averages[-1]
    assert saved.resolution == 8 and list(saved.network.config.block_out_channels) == [8, 16]
    assert saved.null_label == 3 and saved.prediction_type == "v_prediction"
    assert all(map(torch.equal, saved.network.parameters(), average.parameters()))
    decays = [decay for _, _, decay in averages]
    assert decays[0] < 0.1 and decays == sorted(decays) and decays[-1] < 0.999  # else the random start would stay in it
    assert not any(map(torch.equal, saved.network.parameters(), network.parameters()))


@pytest.mark.parametrize("resolution", [[], ["--resolution", "8"]])
def test_images_are_read_once(resolution, images, tmp_path):
    """For the shape of the network and for its training: they may be many."""
    flags = ["--data", str(images), "--block_out_channels", "8", "16", "--output_dir", str(tmp_path), *resolution]
    args = teacher.parse(flags)
    with patch("data.open_image", wraps=data.open_image) as opened:
        data.load_images.cache_clear()
        teacher.new_model(args).dataset(args)
    assert opened.call_count == len(data.load_images(str(images)).samples)


def test_a_teacher_of_a_distribution_is_fitted_once(tmp_path, monkeypatch):
    recipe = "--max_train_steps 2 --lr_warmup_steps 0 --train_batch_size 8 --learning_rate 1e-3"
    monkeypatch.setitem(teacher.RECIPES, "points", f"{recipe} --beta_schedule scaled_linear")
    command = f"--pretrained_teacher_model toy:spiral --output_dir {tmp_path}".split()
    (_, first), (_, second) = distill.configure(command), distill.configure(command)
    assert first.default_data == "toy:spiral" and len(losses(tmp_path / "teacher")) == 2
    assert all(map(torch.equal, first.network.parameters(), second.network.parameters()))


def edit(file, **changes):
    """Entries of a JSON file become others."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def scheduled(name, **options):
    """Another scheduler in the place of DDPM's."""

    def change(folder):
        edit(INDEX, scheduler=["diffusers", name])(folder)
        getattr(diffusers, name)(**options).save_pretrained(folder / "scheduler")

    return change


def without_a_weight(folder):
    save_file({key: w for key, w in load_file(folder / WEIGHTS).items() if key != "conv_in.weight"}, folder / WEIGHTS)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler", None])
def test_what_samples_in_few_steps_is_a_student(tmp_path, kind):
    folder = save_parts(tmp_path, unet())
    if kind:
        scheduled(kind, original_inference_steps=40)(folder)
    model = load(str(folder))
    assert isinstance(model, ImageModel) and model.is_student == bool(kind)
    assert model.original_inference_steps == (40 if kind else 50)


def test_a_variant_is_read_by_its_name(tmp_path):
    folder = save_parts(tmp_path, unet())
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace("model.", "model.fp16."))
    found = load(str(folder), variant="fp16").network.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


REFUSED = {
    "no text": (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "cannot load"),
    "a network of elsewhere": (edit(INDEX, unet=["evil", "UNet2DModel"]), "what can be a teacher here is"),
    "a scheduler of elsewhere": (edit(INDEX, scheduler=["evil", "DDPMScheduler"]), "cannot load"),
    "torn weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"garbage" * 50), "cannot load"),
    "a missing weight": (without_a_weight, "no weights for some"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"), "*.bin are not read"),
    "a variant": (lambda f: (f / WEIGHTS).rename(f / WEIGHTS.replace("model.", "model.fp16.")), "--variant fp16"),
    "no square": (edit(UNET, sample_size=[8, 16]), "squares are needed"),
    "greys": (lambda folder: save_parts(folder, unet(in_channels=1, out_channels=1)), "1 channels"),
    "more than x_t": (lambda folder: save_parts(folder, unet(in_channels=9)), "takes 9 channels and returns 3"),
    "classes as times": (edit(UNET, class_embed_type="timestep"), "has class_embed_type 'timestep'"),
    "flow matching": (scheduled("FlowMatchEulerDiscreteScheduler"), "a FlowMatchEulerDiscreteScheduler"),
    "flow in a solver": (scheduled("UniPCMultistepScheduler", use_flow_sigmas=True), "of flow matching perhaps"),
    "x_0 as it is said today": (edit(SCHEDULER, prediction_type="sample"), "predicts 'sample'"),
    "x_0 as it was said": (edit(SCHEDULER, predict_epsilon=False), "predicts 'sample'"),
    "a schedule of DDPM's alone": (edit(SCHEDULER, beta_schedule="sigmoid"), "sigmoid is not implemented"),
    "a key of others": (lambda f: scheduled("PNDMScheduler")(f) or edit(SCHEDULER, **ZERO_SNR)(f), "another noise sch"),
    "no signal at the end": (edit(SCHEDULER, **ZERO_SNR), "zero terminal SNR"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_a_folder_that_would_be_misread_is_refused_in_one_line(tmp_path, call, monkeypatch, change, words):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save_parts(tmp_path / "t", unet())
    load(str(folder)).few_step_scheduler(50)  # until now it is whole, and can have students
    change(folder)
    status, _, err = call(program(lambda: load(str(folder)).few_step_scheduler(50)))
    assert status == 2 and str(folder) in one_line(err) and words in err


def test_a_mistyped_folder_is_refused_without_the_hub_and_what_the_hub_has_not_too(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/empty").mkdir(parents=True)
    assert isinstance(load(str(save_parts(tmp_path / "models/points", PointMLP(width=8)))), PointModel)
    status, _, err = call(sample.main, "nobody/nothing")
    assert status == 2 and "cannot load nobody/nothing" in one_line(err)
    monkeypatch.setattr(teacher, "hf_hub_download", lambda *a, **options: pytest.fail("the hub was asked"))
    for name in ("runs/cifar-studnt", "models/cifar", "student", "./student", "a/b/c", f"{tmp_path}/x", "models/empty"):
        status, _, err = call(sample.main, name)
        assert status == 2 and name.removeprefix("./") in one_line(err), err


def test_our_own_mistakes_keep_their_traceback(tmp_path, call, monkeypatch):
    folder = save_parts(tmp_path, PointMLP(width=8))
    monkeypatch.setattr(PointMLP, "__init__", lambda self, **options: {}["a typing error"])
    with pytest.raises(KeyError, match="a typing error"):
        call(sample.main, folder)


def test_bad_flags_end_in_one_line_and_status_2(images, tmp_path, call):
    for flags, words in (
        (["--data", tmp_path / "none"], "no such folder"),
        (["--data", "toy:rings"], "toy:rings"),
        (["--data", "toy:spiral", "--class_conditional"], "has no classes"),
        (["--data", "toy:moons", "--resolution", 8], "--resolution"),
        (["--data", images, "--block_out_channels", 8, 12], "--block_out_channels"),
        (["--data", images, "--resolution", 10], "--block_out_channels"),
    ):
        status, _, err = call(teacher.main, *flags, "--output_dir", tmp_path / "o")
        assert status == 2 and words in one_line(err) and not (tmp_path / "o").exists(), err
