"""Stable Diffusion and SDXL are two more kinds of teachers: random weights, stock diffusers as the oracle."""

import argparse
import copy
import inspect
import io
import re
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import one_line, python
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers import LatentConsistencyModelPipeline as LCMPipeline
from diffusers import StableDiffusionPipeline as Pipeline
from diffusers import StableDiffusionXLPipeline as PipelineXL
from diffusers import UNet2DConditionModel as UNet
from huggingface_hub import ModelCard
from PIL import Image
from test_teacher import INDEX, edit
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import distill
import sample
import teacher
from cli import BadInput
from data import load_images
from experiments import tiny_sd
from experiments.tiny_sd import CLIP, LENGTH, TEMPLATES, WIDTH, caption, make_tokenizer
from teacher import StableDiffusion, StableDiffusionXL, load

WORDS = ["cat", "ship", "airplane"]
POOLED, TIMES = 24, 8  # widths of SDXL's pooled embedding, and of each of the six numbers' embedding
TOLD = {"addition_embed_type": "text_time", "addition_time_embed_dim": TIMES}
TOLD |= {"projection_class_embeddings_input_dim": 6 * TIMES + POOLED, "cross_attention_dim": WIDTH + 32}
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
    stock = Pipeline(vae, text, tokenizer, network, noise, None, None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def xl(prediction_type="epsilon", **options) -> PipelineXL:
    """SDXL in small. Its two tokenizers pad texts differently, as the true ones do."""
    sd = pipeline(prediction_type, **TOLD)
    second = copy.deepcopy(sd.tokenizer)
    second.pad_token = "!"
    widths = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": POOLED}
    text = CLIPTextModelWithProjection(CLIPTextConfig(**sd.text_encoder.config.to_dict() | widths))
    noise = EulerDiscreteScheduler.from_config(sd.scheduler.config)
    stock = PipelineXL(sd.vae, sd.text_encoder, text, sd.tokenizer, second, sd.unet, noise, **options)
    stock.set_progress_bar_config(disable=True)
    return stock


BOTH = pytest.mark.parametrize("kind", [pipeline, xl])


@pytest.fixture(autouse=True)
def one_step(monkeypatch):
    """Of the teacher in a run's last picture: saves time."""
    monkeypatch.setattr(StableDiffusion, "many_steps", 1)


@pytest.fixture
def folder(tmp_path):
    def saved(stock) -> str:
        stock.save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    return saved


@pytest.fixture
def captions(tmp_path):
    """24 images of 16x16 with captions beside them."""
    folder = tmp_path / "captions"
    folder.mkdir()
    for i in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption(WORDS[i % 3], i))
    return folder


def flags(folder: str, captions, out, **more) -> list:
    common = {"pretrained_teacher_model": folder, "data": captions, "output_dir": out, "mixed_precision": "no"}
    return [*STEPS, *[f"--{flag}={value}" for flag, value in (common | {"dataloader_num_workers": 0} | more).items()]]


def stock_images(stock, prompts, steps, guidance_scale):
    """Of the seeds from 7 on. (Seed 7 takes the second of two prompts.)"""
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    latents = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    options = {"generator": generators, "latents": latents, "output_type": "pt"}
    return stock(prompts, num_inference_steps=steps, guidance_scale=guidance_scale, **options).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@BOTH
def test_a_guided_teacher_samples_as_stock_ddim_does(folder, kind, prediction_type):
    stock = kind(prediction_type)
    model = load(folder(stock))
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, **options)
    images = [sample.sample(model, range(7, 9), 4, prompts=["a cat", "a ship"], w=w) / 2 + 0.5 for w in (2.0, 0.0)]
    for ours, guidance_scale in zip(images, (3, 1), strict=True):
        assert torch.allclose(ours, stock_images(stock, ["a ship", "a cat"], 4, guidance_scale), atol=2e-4)
    assert (images[0] - images[1]).abs().max() > 1e-2


@BOTH
def test_a_half_precision_teacher_is_as_exact_as_autocast(folder, kind):
    """Without autocast too; and SDXL is told sizes that bf16 does not have."""
    name = folder(kind())
    model, exact = load(name), load(name)
    for each in (model, exact):
        each.resize(1202)
    x, t, cond = torch.randn(16, 4, 8, 8), torch.linspace(50, 950, 16).long(), exact.condition(["a cat"] * 16)
    _, wanted = exact.predict(x, t, cond, 3.0)
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, as a student has them
        _, under_autocast = exact.predict(x, t, cond, 3.0)
    _, plain = model.to("cpu", torch.bfloat16).predict(x, t, cond, 3.0)
    error, usual = (plain - wanted).square().mean().sqrt(), (under_autocast - wanted).square().mean().sqrt()
    assert plain.dtype == torch.float32 and 0 < error < 1.5 * usual


@pytest.mark.parametrize("kind, dtype", [(pipeline, torch.bfloat16), (xl, torch.float16)])
def test_what_is_stored_in_half_precision_computes_in_float32(tmp_path, kind, dtype):
    """Whatever type the files have and declare. float32 of the same, rounded weights is the oracle."""
    half = kind().to(dtype)
    half.save_pretrained(tmp_path, variant="fp16")
    model, exact = load(str(tmp_path), variant="fp16"), half.to(torch.float32)
    assert all(map(torch.equal, model.network.parameters(), exact.unet.parameters()))
    assert {weight.dtype for part in (model.network, model.vae) for weight in part.parameters()} == {torch.float32}
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    wanted, *_ = exact.encode_prompt("a cat", **options)
    torch.testing.assert_close(model.condition(["a cat"])["encoder_hidden_states"], wanted)


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
    model = load(folder(pipeline()))
    student = model.student(model.network.state_dict(), 50)
    assert not caplog.text
    for one in (model, model, student):
        embedded = one.condition(["a cat", "a ship " * 40, "a cat " * 50])["encoder_hidden_states"]
        assert embedded.shape == (3, LENGTH, WIDTH)
    (record,) = caplog.records
    longest = len(model.pipeline.tokenizer("a cat " * 50, verbose=False).input_ids)
    assert f"a text of {longest} tokens: of those over {LENGTH}" in record.getMessage()
    assert "transformers" not in capfd.readouterr().err


def test_the_vae_encodes_a_few_images_at_a_time(folder):
    model = load(folder(pipeline()))
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    whole = model.vae.encode(pixels / 127.5 - 1).latent_dist.mode() * model.vae.config.scaling_factor
    sizes, encode = [], model.vae.encode
    model.vae.encode = lambda x: sizes.append(len(x)) or encode(x)
    x0, cond = model.prepare(pixels, ["a cat"] * 20)
    torch.testing.assert_close(x0, whole)
    assert sizes == [8, 8, 4]
    assert not x0.requires_grad and not cond["encoder_hidden_states"].requires_grad  # else each step would hold a graph


STUDENTS = {
    "full": (pipeline, "epsilon", ["--guidance_w=3", "--mixed_precision=bf16"]),
    "improved": (pipeline, "v_prediction", ["--gradient_checkpointing", "--metric=l2", "--improved"]),
    "lora": (pipeline, "epsilon", ["--lora_rank=2"]),
    "xl": (xl, "epsilon", ["--guidance_w=3", "--mixed_precision=bf16"]),
    "xl-lora": (xl, "v_prediction", ["--lora_rank=2"]),
}


def test_students_sample_alike_in_stock_diffusers_by_what_their_cards_say(captions, tmp_path, call, monkeypatch):
    """In a process that knows nothing of ours, which runs the cards' own lines; and as they did in their runs."""
    prompts, in_run, finish = ["a cat", "a ship"], [], distill.finish

    def keep(args, teacher, student, evaluation):
        in_run.append(sample.sample(student, range(7, 9), 4, prompts=prompts) / 2 + 0.5)
        finish(args, teacher, student, evaluation)

    monkeypatch.setattr(distill, "finish", keep)
    ours, script = {}, f"import os, torch\nos.chdir({str(tmp_path)!r})\n{inspect.getsource(stock_images)}"
    for name, (kind, prediction_type, more) in STUDENTS.items():
        teacher, out, before = tmp_path / f"teacher of {name}", tmp_path / name, kind(prediction_type)
        before.save_pretrained(teacher)
        status, _, err = call(distill.main, *flags(teacher, captions, out), *more)
        assert status == 0, err
        script += re.search("```python(\n.*?)```", (out / "README.md").read_text(), re.S)[1]
        student = load(str(out))
        weights, untrained = student.network.state_dict(), before.unet.state_dict()
        assert any((weights[key] - old).abs().max() > 1e-4 for key, old in untrained.items()), name
        for steps in (1, 4):
            file = f"{name}-{steps}.pt"
            ours[file] = sample.sample(student, range(7, 9), steps, prompts=prompts) / 2 + 0.5
            script += f"torch.save(stock_images(pipe, ['a ship', 'a cat'], {steps}, 1), '{file}')\n"
        assert torch.allclose(ours[file], in_run.pop(), atol=2e-4), name
    done = python("-c", f"{script}assert image.size == (16, 16)")
    assert done.returncode == 0, done.stderr
    for file, images in ours.items():
        assert torch.allclose(images, torch.load(tmp_path / file), atol=2e-4), file


def test_a_card_has_the_licence_of_the_teachers_and_links_what_the_hub_can(folder):
    model = load(folder(pipeline()))
    Path(model.name, "README.md").write_text("---\nlicense: openrail++\n---\n")
    for rank in (0, 2):
        args = distill.parser().parse_args(["--output_dir=out", f"--lora_rank={rank}"])
        card = ModelCard(distill.model_card(args, model)).data.to_dict()
        assert (card["license"], card["library_name"]) == ("openrail++", "diffusers") and "base_model" not in card
        assert {"splam", "text-to-image"} <= {*card["tags"]} and ("lora" in card["tags"]) == bool(rank)
    model.name = "some/one"  # an id, and no folder
    assert ModelCard(distill.model_card(args, model)).data.base_model == model.name


@pytest.mark.parametrize("rank", [0, 2])
def test_the_target_copies_what_is_trained_and_nothing_else(folder, captions, tmp_path, rank):
    """Of SDXL a copy of all that a LoRA leaves alone would be 10 GB. Nor does the average move it."""
    typed = flags(folder(pipeline()), captions, tmp_path / "out", lora_rank=rank, ema_decay=0.5)
    args, teacher = distill.configure([*map(str, typed), "--gradient_checkpointing"])
    run = distill.Distillation(args, teacher)
    assert run.run.model.network.is_gradient_checkpointing  # which the flag asks for
    student = dict(run.run.model.named_parameters())
    target = dict(run.target.named_parameters())
    assert all((target[name] is weight) != weight.requires_grad for name, weight in student.items())
    frozen = {name: weight.clone() for name, weight in student.items() if not weight.requires_grad}
    next(run.steps())
    assert bool(frozen) == bool(rank) and all(torch.equal(student[name], old) for name, old in frozen.items())


def test_a_lora_remembers_its_resolution_and_a_dataset_leaves_the_model_alone(folder, captions, tmp_path, call):
    teacher, out = folder(pipeline()), tmp_path / "out"
    status, _, err = call(distill.main, *flags(teacher, captions, out, lora_rank=2, resolution=32))
    assert status == 0, err
    model, student = load(teacher), load(str(out))
    data = student.dataset(argparse.Namespace(data=str(captions), resolution=8, min_image_size=9, max_pwatermark=0.5))
    assert (data.resolution, data.min_image_size, data.max_pwatermark) == (32, 9, 0.5)
    assert (model.resolution, student.resolution, student.shape) == (16, 32, (4, 16, 16))
    model.resize(24)
    assert (model.resolution, model.shape) == (24, (4, 12, 12))
    with pytest.raises(BadInput, match="--resolution 15 is no multiple"):
        model.resize(15)
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


def test_teacher_and_student_side_by_side_in_one_picture(folder, tmp_path, call):
    """A grid of prompts × steps; w guides the teacher and is told to the student that takes it."""
    teacher, theirs = folder(pipeline()), str(tmp_path / "theirs")
    pipeline(scheduler=LCMScheduler, time_cond_proj_dim=8).save_pretrained(theirs)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na blue ship\n")
    grid = [teacher, theirs, "--prompts", prompts, "--guidance_w", 1, "--teacher_steps", 2, "--steps", 1, 4]
    status, _, err = call(sample.main, *grid, "--num_images", 4, "--out", tmp_path / "grid.png")
    assert status == 0, err
    with Image.open(tmp_path / "grid.png") as image:
        height = image.height // 3  # of a row: the teacher has one, and the student two
        assert image.height == 3 * height and image.width / (height - 16) == pytest.approx((4 * 17 + 1) / 18)
        rows = [np.asarray(image.crop((0, i * height + 16, image.width, (i + 1) * height))) for i in range(3)]
    for row, name, steps in zip(rows, (teacher, theirs, theirs), (2, 1, 4), strict=True):
        guided = sample.sample(load(name), range(4), steps, w=1.0, prompts=["a red cat", "a blue ship"])
        assert (row == np.asarray(sample.picture(guided, 10).resize(row.shape[1::-1], 0))).all()


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
    assert stock("a photo of a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    latents = stock.vae.encode(data.samples / 127.5 - 1).latent_dist.mode() * stock.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.05)


REFUSED = {
    "a projection of other texts": (pipeline, {"encoder_hid_dim": 8}, None, "has encoder_hid_dim_type 'text_proj'"),
    "inpainting": (pipeline, {}, edit(INDEX, _class_name="StableDiffusionInpaintPipeline"), "is a StableDiffusionInp"),
    "what calls itself XL": (pipeline, {}, edit(INDEX, _class_name=PipelineXL.__name__), "'text_time' is needed"),
    "no VAE": (pipeline, {}, lambda folder: shutil.rmtree(folder / "vae"), "cannot load"),
    "a VAE that also shifts": (pipeline, {}, edit("vae/config.json", shift_factor=0.1), "has a shift_factor"),
    "no tokenizer": (
        pipeline,
        {},
        lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
        "does not tell texts apart",
    ),
    "no second tokenizer": (
        xl,
        {},
        lambda folder: (folder / "tokenizer_2/tokenizer.json").unlink(),
        "does not tell texts apart",
    ),
}


@pytest.mark.parametrize("kind, options, change, words", REFUSED.values(), ids=REFUSED)
def test_what_would_be_misread_is_refused_in_one_line(tmp_path, call, kind, options, change, words):
    kind(**options).save_pretrained(tmp_path)
    if change:
        change(tmp_path)
    status, _, err = call(sample.main, tmp_path)
    assert status == 2 and words in one_line(err) and str(tmp_path) in err, err


# -- SDXL -------------------------------------------------------------------------------------------------------------


def flat(cond: dict) -> tuple:
    """Texts, pooled texts, sizes."""
    added = cond["added_cond_kwargs"]
    return cond["encoder_hidden_states"], added["text_embeds"], added["time_ids"]


@pytest.mark.parametrize("zeros", [True, False])
def test_the_network_is_told_what_the_pipeline_tells_it(folder, zeros):
    """Without condition too, which is zeros or the empty text; and at another size, though ∅ was asked for before."""
    model, given = load(folder(xl(force_zeros_for_empty_prompt=zeros))), []
    stock = PipelineXL.from_pretrained(model.name)
    assert isinstance(model, StableDiffusionXL) and (model.resolution, model.shape) == (16, (4, 8, 8))
    forward, prompts = stock.unet.forward, ["a cat", "a ship"]
    stock.unet.forward = lambda *args, **cond: given.append(flat(cond)) or forward(*args, **cond)
    for size in (16, 24):
        model.resize(size)
        stock(prompts, height=size, width=size, num_inference_steps=1, guidance_scale=3, output_type="latent")
        nothing, cond = flat(model.null_condition(2)), flat(model.condition(prompts))
        for i, both in enumerate(given.pop()):
            torch.testing.assert_close(torch.cat([nothing[i], cond[i]]), both, check_dtype=False)


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_computes_in_float32_if_its_config_says_so(folder, upcast):
    """Under autocast, in which a student is trained."""
    model = load(folder(xl()))
    model.vae.register_to_config(force_upcast=upcast)
    pixels, x0 = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.randn(3, 4, 8, 8)
    wanted = model.prepare(pixels, ["a cat"] * 3)[0], model.decode(x0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.prepare(pixels, ["a cat"] * 3)[0], model.decode(x0)
    assert all(torch.equal(a, b) == upcast and a.dtype == torch.float32 for a, b in zip(found, wanted, strict=True))


def test_another_vae_takes_the_place_of_the_pipelines_and_goes_into_its_students(folder, captions, tmp_path, call):
    name, place, out = folder(xl()), str(tmp_path / "vae"), tmp_path / "out"
    other = copy.deepcopy(xl().vae).requires_grad_(False)
    other.decoder.conv_out.weight.mul_(2)
    other.register_to_config(scaling_factor=0.3, force_upcast=False)
    other.save_pretrained(place)
    model, x0 = load(name, pretrained_vae_model_name_or_path=place), torch.randn(1, 4, 8, 8)
    wanted = other.decode(x0 / 0.3).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(x0), wanted)
    assert (load(name).decode(x0) - wanted).abs().max() > 0.1
    teacher.save(model.student(model.network.state_dict(), 50), tmp_path / "full")
    torch.testing.assert_close(load(str(tmp_path / "full")).decode(x0), wanted)
    other.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(BadInput, match=f"cannot load {tmp_path}/pickle.*bin are not read"):
        load(name, pretrained_vae_model_name_or_path=str(tmp_path / "pickle"))
    # A LoRA has no VAE, and a record of how its teacher was loaded.
    more = {"lora_rank": 2, "pretrained_vae_model_name_or_path": place}
    status, _, err = call(distill.main, *flags(name, captions, out, **more))
    assert status == 0, err
    torch.testing.assert_close(load(str(out)).decode(x0), wanted)


def test_the_hub_is_asked_for_the_revision(folder, monkeypatch):
    name, asked, read = folder(xl()), [], PipelineXL.from_pretrained
    monkeypatch.setattr(teacher, "HfApi", Mock())
    monkeypatch.setattr(teacher, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or f"{name}/model_index.json")
    monkeypatch.setattr(
        PipelineXL, "from_pretrained", lambda *a, **k: asked.append((a, k)) or read(name, dtype=torch.float32)
    )
    load("somebody/xl", revision="v1")
    assert [(a, k["revision"]) for a, k in asked] == [(("somebody/xl",), "v1")] * 2
