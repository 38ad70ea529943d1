"""Stable Diffusion is one more kind of teacher: random weights, its own format, stock diffusers as the oracle."""

import argparse
import functools
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import losses, one_line
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from diffusers import UNet2DConditionModel as UNet
from PIL import Image

import distill
import evaluate
import sample
from data import BadInput, load_images
from sample import picture, to_pixels
from teacher import StableDiffusion, load
from toy import tab3_sl_vs_dl, tiny_sd
from toy.tiny_sd import CLIP, LENGTH, TEMPLATES, WIDTH, caption, make_tokenizer

WORDS = ["cat", "ship", "airplane"]


def pipeline(prediction_type="epsilon", scheduler=DDPMScheduler, **unet) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer([caption(word, i) for word in WORDS for i in range(len(TEMPLATES))])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    network = UNet(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        **unet,
    )
    noise = scheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )
    text = CLIP(tokenizer).text
    return StableDiffusionPipeline(vae, text, tokenizer, network, noise, None, None, requires_safety_checker=False)


@pytest.fixture
def folder(tmp_path):
    def saved(*args, **kwargs) -> str:
        pipeline(*args, **kwargs).save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    return saved


@pytest.fixture
def captions(tmp_path):
    """24 images of 16x16 with captions beside them."""
    (tmp_path / "captions").mkdir()
    for i in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"captions/{i:02d}.png")
        (tmp_path / f"captions/{i:02d}.txt").write_text(caption(WORDS[i % 3], i))
    return tmp_path / "captions"


def flags(folder: str, captions, out, **more) -> list:
    common = {"max_train_steps": 3, "train_batch_size": 4, "lr_warmup_steps": 0, "learning_rate": 1e-3, "seed": 3}
    common |= {"pretrained_teacher_model": folder, "data": captions, "output_dir": out, "mixed_precision": "no"}
    common |= {"dataloader_num_workers": 0}
    return [f"--{flag}={value}" for flag, value in (common | more).items()]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guidance_in_one_batch_is_two_passes_of_stock_parts(folder, prediction_type):
    model = load(folder(prediction_type))
    assert isinstance(model, StableDiffusion)
    stock = StableDiffusionPipeline.from_pretrained(model.name)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(1000)
    embedded, nothing = stock.encode_prompt("a photo of a cat", "cpu", 1, True)
    x, t, w = torch.randn(1, 4, 8, 8), 700, 2.5
    rows, forward = [], model.network.forward
    model.network.forward = lambda x, t, **cond: rows.append(len(x)) or forward(x, t, **cond)
    with torch.no_grad():
        with_prompt = stock.unet(x, t, encoder_hidden_states=embedded).sample
        without = stock.unet(x, t, encoder_hidden_states=nothing).sample
        for weight, passes in ((w, 2), (0.0, 1)):
            guided = with_prompt + weight * (with_prompt - without)
            cond = model.condition(model.labels(["a photo of a cat"]))
            x0, _ = model.predict(x, torch.tensor([t]), cond, weight)
            wanted = scheduler.step(guided, t, x).pred_original_sample
            assert torch.allclose(x0, wanted, rtol=1e-3, atol=1e-3)
            assert rows.pop() == passes and not rows  # w = 0 makes no unconditional pass
    assert (with_prompt - without).abs().max() > 1e-3


def test_what_makes_no_text_to_image_model_is_refused_in_one_line(folder, tmp_path):
    for change, words in (
        ({"without": "tokenizer/tokenizer.json"}, "tell texts apart"),
        ({"without": "vae/config.json"}, "cannot load"),
        ({"index": {"vae": ["diffusers", "UNet2DModel"]}}, "an AutoencoderKL is needed"),
        ({"index": {"text_encoder": [None, None]}}, "cannot load"),
        ({"torn": "text_encoder/model.safetensors"}, "cannot load"),
    ):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder("epsilon"), broken)
        if "without" in change:
            (broken / change["without"]).unlink()
        if "torn" in change:
            (broken / change["torn"]).write_bytes(b"torn")
        index = json.loads((broken / "model_index.json").read_text()) | change.get("index", {})
        (broken / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match=words) as refusal:
            load(str(broken))
        assert "\n" not in str(refusal.value)
    tiny = pipeline()
    tiny.register_modules(vae=AutoencoderTiny())
    for other, words in (
        (pipeline(in_channels=9), "9 channels"),
        (pipeline(num_class_embeds=3), "classes besides texts"),
        (tiny, "AutoencoderTiny"),
    ):
        with pytest.raises(BadInput, match=words):
            StableDiffusion(other, "other")


def test_a_half_precision_teacher_needs_no_autocast(folder):
    """Its guided ε is about as far from float32's as under autocast."""
    model, exact = load(folder("epsilon")), load(folder("epsilon"))
    x, t = torch.randn(16, 4, 8, 8), torch.linspace(50, 950, 16).long()
    cond = {key: value.detach() for key, value in model.condition(model.labels(["a photo of a cat"] * 16)).items()}
    with torch.no_grad():
        _, wanted = exact.predict(x, t, cond, 3.0)
        with torch.autocast("cpu", torch.bfloat16):  # float32 weights, as a student has them
            _, under_autocast = exact.predict(x, t, cond, 3.0)
        model.to("cpu", torch.bfloat16)
        seen, forward = [], model.network.forward
        model.network.forward = lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or forward(*a, **k)
        with torch.autocast("cpu", torch.bfloat16):
            _, plain = model.predict(x, t, cond, 3.0)
    assert seen == [False] and plain.dtype == torch.float32
    error, usual = (plain - wanted).square().mean().sqrt(), (under_autocast - wanted).square().mean().sqrt()
    assert 0 < error < 1.5 * usual


def test_the_vae_encodes_a_few_images_at_a_time(folder):
    model = load(folder("epsilon"))
    pixels, tokens = torch.rand(20, 3, 16, 16) * 2 - 1, model.labels(["a cat"] * 20)
    whole = model.vae.encode(pixels).latent_dist.mode() * model.vae.config.scaling_factor
    sizes, encode = [], model.vae.encode
    model.vae.encode = lambda x: sizes.append(len(x)) or encode(x)
    x0, _ = model.prepare(pixels, tokens)
    torch.testing.assert_close(x0, whole)
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize(
    "prediction_type, more",
    [
        ("epsilon", {"guidance_w": 3.0, "gamma_conditioning": "embedding", "mixed_precision": "bf16"}),
        ("v_prediction", {"gradient_checkpointing": None, "metric": "l2"}),
        ("epsilon", {"lora_rank": 2}),
    ],
)
def test_a_student_loads_in_stock_diffusers_and_samples_as_ours(
    folder, captions, tmp_path, call, prediction_type, more
):
    """Full or LoRA; 1 and 4 steps; and guidance_scale above 1 is diffusers' for any plain model."""
    teacher, out = folder(prediction_type), tmp_path / "out"
    command = [flag.removesuffix("=None") for flag in flags(teacher, captions, out, **more)]
    status, _, err = call(distill.main, *command)
    assert status == 0, err
    if "lora_rank" in more:
        stock = StableDiffusionPipeline.from_pretrained(teacher)
        stock.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        stock.scheduler = LCMScheduler.from_pretrained(out / "scheduler")
    else:
        stock = StableDiffusionPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    before = pipeline(prediction_type).unet.state_dict()
    student = load(str(out))
    assert any((student.network.state_dict()[name] - weight).abs().max() > 1e-4 for name, weight in before.items())
    for steps in (1, 4):
        ours = sample.sample(student, range(7, 9), steps, prompts=["a cat", "a ship"])
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        latents = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        options = {"num_inference_steps": steps, "generator": generators, "latents": latents, "output_type": "pt"}
        theirs = stock(["a ship", "a cat"], guidance_scale=1, **options).images
        assert torch.allclose(ours / 2 + 0.5, theirs, atol=2e-4)
    # Without fresh noise it is TCD's sampler in diffusers, whose pipelines have η = 0 if it is not given. (TCD ends at
    # time 0 and not at x_0, with 3 % of the last noise that it found: so the images differ a little.)
    ours = sample.sample(student, range(7, 9), 4, prompts=["a cat", "a ship"], eta=0.0)
    stock.scheduler = TCDScheduler.from_config(stock.scheduler.config)
    theirs = stock(["a ship", "a cat"], guidance_scale=1, **options).images
    assert torch.allclose(ours / 2 + 0.5, theirs, atol=0.03)


def test_a_lora_remembers_its_resolution_and_is_measured_in_half_precision(
    folder, captions, tmp_path, call, means, monkeypatch
):
    monkeypatch.setattr(distill, "Evaluation", functools.partial(evaluate.Evaluation, features=str(means)))
    out = tmp_path / "out"
    more = {"lora_rank": 2, "resolution": 32, "mixed_precision": "bf16", "num_eval_samples": 4}
    status, printed, err = call(distill.main, *flags(folder(), captions, out, **more))
    assert status == 0 and "student" in printed, err
    assert load(folder()).resolution == 16 and load(str(out)).resolution == 32
    assert len(json.loads((out / "metrics.json").read_text())["rows"]) >= 3


def test_a_cache_gives_the_same_losses(folder, captions, tmp_path, call):
    teacher = folder()
    for out, more in (("plain", {}), ("cached", {"cache_latents": tmp_path / "cache"})):
        status, _, err = call(distill.main, *flags(teacher, captions, tmp_path / out, guidance_w=2.0, **more))
        assert status == 0, err
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)
    other = flags(teacher, captions, tmp_path / "o", resolution=8, cache_latents=tmp_path / "cache")
    status, _, err = call(distill.main, *other)
    assert status == 2 and "resolution 16, not 8" in one_line(err)
    # Losses hide much, and AdamW magnifies rounding. So: what the losses are made of.
    model = load(teacher)
    options = {"data": str(captions), "resolution": None, "min_image_size": 0, "max_pwatermark": 1.0}
    options |= {"mixed_precision": "no", "cache_latents": str(tmp_path / "cache"), "allow_pipe": False}
    made, kept = (model.dataset(argparse.Namespace(**options | cache)) for cache in ({"cache_latents": None}, {}))
    pixels, tokens = made[[3, 1]]
    assert pixels.dtype == torch.uint8  # they travel as bytes, and mean what they meant as floats
    assert torch.equal(model.prepare(pixels, tokens)[0], model.prepare(pixels.float() / 127.5 - 1, tokens)[0])
    for batch in ([0, 5, 23], [7, 7]):
        (x0, cond), (kept_x0, kept_cond) = (model.prepare(*dataset[batch]) for dataset in (made, kept))
        assert torch.allclose(x0, kept_x0, atol=1e-5) and cond.keys() == kept_cond.keys()
        assert torch.allclose(cond["encoder_hidden_states"], kept_cond["encoder_hidden_states"], atol=1e-5)


def test_what_others_released_is_told_w_zero_as_stock_diffusers_tells_it(folder):
    """A U-Net with time_cond_proj_dim, as LCM's: guidance_scale 1 is the embedding of w = 0, which is not zero."""
    model = load(folder(scheduler=LCMScheduler, time_cond_proj_dim=8))
    assert model.is_student
    generator = torch.Generator().manual_seed(3)
    options = {"latents": torch.randn(4, 8, 8, generator=generator)[None], "generator": [generator]}
    stock = StableDiffusionPipeline.from_pretrained(model.name)
    theirs = stock("a cat", num_inference_steps=2, guidance_scale=1, output_type="pt", **options).images
    ours = sample.sample(model, range(3, 4), 2, prompts=["a cat"])
    assert torch.allclose(ours / 2 + 0.5, theirs, atol=2e-4)
    silent = model.condition(model.labels(["a cat"])) | {"timestep_cond": torch.zeros(1, 8)}
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([999])
    told, untold = (model.predict(x, t, c)[1] for c in (model.condition(model.labels(["a cat"])), silent))
    assert (told - untold).abs().max() > 1e-4


def test_ours_and_others_side_by_side_in_one_command(folder, captions, tmp_path, call, means):
    """A grid of prompts × steps beside the teacher, and a table with what each prompt is understood as."""
    teacher, theirs, out = folder(), str(tmp_path / "theirs"), tmp_path / "ours"
    pipeline(scheduler=LCMScheduler, time_cond_proj_dim=8).save_pretrained(theirs)
    assert call(distill.main, *flags(teacher, captions, out, guidance_w=1.0))[0] == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na blue ship\n")
    common = ["--prompts", prompts, "--guidance_w", 1, "--teacher_steps", 2]
    grid = [teacher, out, theirs, *common, "--steps", 1, 4, "--num_images", 4, "--out", tmp_path / "grid.png"]
    status, _, err = call(sample.main, *grid)
    assert status == 0, err
    with Image.open(tmp_path / "grid.png") as image:
        row = image.height / 5  # the teacher's, and two of each student's
        assert row.is_integer() and image.width / (row - 16) == pytest.approx((4 * 17 + 1) / 18)
        first = image.crop((0, 16, image.width, int(row)))
    model, pair = load(teacher), ["a red cat", "a blue ship"]
    guided = picture(sample.sample(model, range(4), 2, w=1.0, prompts=pair), 10).resize(first.size, 0)
    assert (np.asarray(first) == np.asarray(guided)).all()
    more = ["--data", captions, "--features", means, "--num_samples", 4, "--samples_dir", tmp_path / "kept"]
    before = [out, "--prompts", prompts, "--steps", 1, "--num_images", 2, "--out", tmp_path / "kept/ours-1"]
    assert call(sample.main, *before)[0] == 0  # as many GPUs may do it beforehand
    made = (tmp_path / "kept/ours-1/000001.png").stat().st_mtime_ns
    status, text, err = call(evaluate.main, "table", out, theirs, *common, *more, "--steps", 1)
    assert status == 0, err
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["teacher, DDIM", str(out), theirs]
    assert all(0 <= row["prompt accuracy"] <= 1 and row["network"] > 0 for row in rows)
    assert (tmp_path / "kept/ours-1/000001.png").stat().st_mtime_ns == made
    kept = Image.open(tmp_path / "kept/teacher-2/000003.png")
    again = sample.sample(model, [3], 2, w=1.0, prompts=pair)
    assert (np.asarray(kept) == to_pixels(again)[0]).all()


def test_a_protocol_is_what_is_published_and_flags_replace_its_parts(folder, captions, tmp_path, call, means, clip):
    """COCO's 30,000 at 256 pixels, but for 3 samples and networks that need no download."""
    student, prompts = folder(scheduler=LCMScheduler), tmp_path / "captions.txt"
    prompts.write_text("a red cat\na blue ship\na green airplane\n")
    ours = ["--pretrained_teacher_model", student, "--guidance_w", 0, "--data", captions, "--prompts", prompts]
    less = ["--num_samples", 3, "--features", means, "--clip_model", clip, "--steps", 1, "--teacher_steps"]
    sizes, shown = [], evaluate.ImageFeatures.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluate.ImageFeatures, "update", lambda self, x, texts: sizes.append(x.shape) or shown(self, x, texts)
        )
        status, text, err = call(evaluate.main, "table", student, "--protocol", "coco2014-30k", *ours, *less)
    assert status == 0 and clip in text and str(means) in text, err
    result = json.loads((tmp_path / "teacher/evaluation.json").read_text())
    assert result["flags"]["resolution"] == 256 and sizes[-1] == (3, 3, 256, 256) == (3, *sizes[0][1:])
    (row,) = result["rows"]
    assert -1 < row["CLIP"] < 1 and row["prompt accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert "--num_samples 30000" in evaluate.PROTOCOLS["coco2014-30k"]
    assert all("--clip_model ViT-g-14/laion2b_s12b_b42k" in flags for flags in evaluate.PROTOCOLS.values())


def test_the_error_and_the_parts_of_a_step_of_a_text_to_image_model(folder, captions, tmp_path, call):
    teacher = folder()
    flags = ["--data", captions, "--num_samples", 4, "--interval", 200, "--guidance_w", 2, "--out", tmp_path / "e.png"]
    status, _, err = call(evaluate.main, "error", teacher, *flags)
    assert status == 0, err
    guided = json.loads((tmp_path / "e.json").read_text())[teacher]
    assert call(evaluate.main, "error", teacher, teacher, *flags)[0] == 0  # named twice it is measured once
    assert json.loads((tmp_path / "e.json").read_text())[teacher] == guided
    flags = [teacher, *["--data", captions, "--train_batch_size", 4, "--timed_steps", 2, "--k", 20, "--guidance_w", 2]]
    status, _, err = call(distill.main, "--benchmark", "--pretrained_teacher_model", *flags, "--output_dir", tmp_path)
    assert status == 0, err
    parts = json.loads((tmp_path / "benchmark/benchmark.json").read_text())["parts"]
    assert len(guided) == 4 and min(guided) > 0 and min(parts.values()) > 0


def test_a_preset_is_the_papers_recipe_and_flags_replace_its_parts(folder, captions, tmp_path, call):
    out = tmp_path / "out"
    more = {"pretrained_teacher_model": folder(), "data": captions, "output_dir": out, "train_batch_size": 2}
    command = [f"--{flag}={value}" for flag, value in more.items()] + ["--max_train_steps=1"]
    status, _, err = call(distill.main, "--preset=sd21-base", "--k=40", *command)
    assert status == 0, err
    used = json.loads((out / "metrics.json").read_text())["configuration"]
    stated = {"guidance_w": 8.0, "metric": "l2", "solver_step": 20, "learning_rate": 8e-6, "ema_decay": 0.95}
    stated |= {"max_grad_norm": 10.0, "adam_weight_decay": 0.0, "gamma_conditioning": "embedding"}
    assert {name: used[name] for name in stated} == stated and used["k"] == 40 and used["max_train_steps"] == 1
    # A second preset replaces what it mentions, and leaves the rest.
    command[2] = f"--output_dir={tmp_path / 'improved'}"
    args, _ = distill.configure(["--preset", "sd21-base", "improved", *command])
    improved = {"solver": "dpmsolver++", "solver_step": 100, "k": 100, "gamma_at_one": 0.5}
    assert {name: vars(args)[name] for name in [*stated, *improved]} == stated | improved | {
        "gamma_conditioning": "time"
    }
    status, text, _ = call(distill.main, "--help")
    assert status == 0 and "--k 100 --guidance_w 3 --metric huber" in text


def test_the_laboratory_measures_against_images_and_by_prompts(folder, captions, images, tmp_path, call, monkeypatch):
    """Trained on pairs, measured against images of classes; each sample is shown with the text that made it."""
    seen = []

    class Recorder:
        name = "recorder"

        def update(self, samples, prompts):
            seen.append(list(prompts))

        def result(self):
            return {"FD": float(len(seen)), "prompt accuracy": 0.5}

    references = []
    monkeypatch.setattr(
        evaluate, "measures_for", lambda model, reference, *_: references.append(reference) or [Recorder()]
    )
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    command = ["--pretrained_teacher_model", folder(), "--data", captions, "--reference_data", images]
    command += ["--mixed_precision", "no", "--dataloader_num_workers", 0, "--guidance_w", 1, "--quick"]
    status, _, err = call(tab3_sl_vs_dl.main, *command, "--only", "LCM, k = 20")
    torch.set_num_threads(threads)
    assert status == 0, err
    assert [len(reference) for reference in references] == [len(load_images(str(images)).samples)]
    prompts = [StableDiffusion.default_prompts[i % 10] for i in range(64)]
    assert seen.count(prompts) == len([texts for texts in seen if texts]) == 2 * 7 + 1  # two students, and the teacher
    rows = json.loads((tmp_path / "runs/laboratory/quick/tab3_sl_vs_dl.json").read_text())["rows"]["LCM, k = 20"]
    assert {"prompt accuracy, 1 step", "prompt accuracy, 4 steps, η = 0", "FD, 2 steps, η = 0.5"} <= rows[0].keys()


def test_a_stable_diffusion_is_made_from_images_by_class(images, tmp_path, call):
    """Hardly trained, but whole: shards with true captions, latents of unit variance, a folder that diffusers reads."""
    steps = ["--clip_steps", 2, "--vae_steps", 2, "--max_train_steps", 2, "--train_batch_size", 8]
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
    stock = StableDiffusionPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    assert stock("a photo of a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    words = stock.tokenizer(["a photo of a cat", "a photo of a ship", "a picture of a ship"]).input_ids
    assert len(set(map(tuple, words))) == 3 and max(map(len, words)) < LENGTH
    latents = stock.vae.encode(data.samples / 127.5 - 1).latent_dist.mode() * stock.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, rel=0.05)
    more = {"data": f"{shards}/cifar-{{000..009}}.tar", "cache_latents": out / "latents", "mixed_precision": "bf16"}
    status, _, err = call(distill.main, *flags(str(out), None, tmp_path / "student", **more))
    assert status == 0, err


def test_bad_input_ends_in_one_line_and_status_2(folder, captions, tmp_path, call):
    teacher = folder()
    for more, words in (
        ({"data": f"{tmp_path}/{{0..3}}.tar"}, "no such shard"),
        ({"data": f"pipe:touch {tmp_path}/ran.tar"}, "--allow_pipe allows it"),
        ({"resolution": 15}, "--resolution 15"),
        ({"data": "0.tar", "num_eval_samples": 4}, "0.tar is no folder of images to measure against: --data"),
    ):
        status, _, err = call(distill.main, *flags(teacher, captions, tmp_path / "out", **more))
        assert status == 2 and words in one_line(err), err
    for path in captions.glob("*.txt"):
        path.unlink()
    status, _, err = call(distill.main, *flags(teacher, captions, tmp_path / "out"))
    assert status == 2 and "no captions in" in one_line(err)
    assert LENGTH == load(teacher).labels(["x " * 99]).shape[1]  # long prompts are cut off
