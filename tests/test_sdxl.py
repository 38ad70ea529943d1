"""SDXL is Stable Diffusion with more that its network is told. The oracle is diffusers' own pipeline, in every test."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from conftest import one_line, python
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers import StableDiffusionXLPipeline as Pipeline
from test_stable_diffusion import flags, one_step, pipeline, stock_images, write_captions  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import distill
import sample
import teacher
from cli import BadInput
from experiments.tiny_sd import WIDTH
from teacher import StableDiffusionXL, load

POOLED, TIMES = 24, 8  # widths of the pooled embedding, and of each of the six numbers' embedding
TOLD = {"addition_embed_type": "text_time", "addition_time_embed_dim": TIMES}
TOLD |= {"projection_class_embeddings_input_dim": 6 * TIMES + POOLED, "cross_attention_dim": WIDTH + 32}
# In a process that knows nothing of ours: a student of stock parts, four steps from the seeds 7 and 8.
STOCK = """import sys, torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
teacher, out = sys.argv[1:]
pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
if teacher != out:
    pipe.load_lora_weights(out)
    pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
latents = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
options = {"num_inference_steps": 4, "guidance_scale": 1, "generator": generators, "latents": latents}
torch.save(pipe(["a ship", "a cat"], output_type="pt", **options).images, out + "/images.pt")"""


def xl(prediction_type="epsilon", scheduler=EulerDiscreteScheduler, **options) -> Pipeline:
    """SDXL in small. Its two tokenizers pad texts differently, as the true ones do."""
    sd = pipeline(prediction_type, DDPMScheduler, **TOLD)
    second = copy.deepcopy(sd.tokenizer)
    second.pad_token = "!"
    widths = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": POOLED}
    text = CLIPTextModelWithProjection(CLIPTextConfig(**sd.text_encoder.config.to_dict() | widths))
    noise = scheduler.from_config(sd.scheduler.config)
    stock = Pipeline(sd.vae, sd.text_encoder, text, sd.tokenizer, second, sd.unet, noise, **options)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def folder(tmp_path):
    def saved(*args, **options) -> str:
        xl(*args, **options).save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    return saved


def flat(cond: dict) -> tuple:
    """Texts, pooled texts, sizes."""
    return (
        cond["encoder_hidden_states"],
        cond["added_cond_kwargs"]["text_embeds"],
        cond["added_cond_kwargs"]["time_ids"],
    )


@pytest.mark.parametrize("zeros", [True, False])
def test_the_network_is_told_what_the_pipeline_tells_it(folder, zeros):
    """Without condition too, which is zeros or the empty text; and at another size, though ∅ was asked for before."""
    model, given = load(folder(force_zeros_for_empty_prompt=zeros)), []
    stock = Pipeline.from_pretrained(model.name)
    assert isinstance(model, StableDiffusionXL) and (model.resolution, model.shape) == (16, (4, 8, 8))
    forward, prompts = stock.unet.forward, ["a cat", "a ship"]
    stock.unet.forward = lambda *args, **cond: given.append(flat(cond)) or forward(*args, **cond)
    for size in (16, 24):
        model.resize(size)
        stock(prompts, height=size, width=size, num_inference_steps=1, guidance_scale=3, output_type="latent")
        nothing, cond = flat(model.null_condition(2)), flat(model.condition(prompts))
        for i, both in enumerate(given.pop()):
            torch.testing.assert_close(torch.cat([nothing[i], cond[i]]), both, check_dtype=False)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_guided_teacher_samples_as_stock_ddim_does(folder, prediction_type):
    model = load(folder(prediction_type))
    stock = Pipeline.from_pretrained(model.name)
    stock.set_progress_bar_config(disable=True)
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, **options)
    images = [sample.sample(model, range(7, 9), 4, prompts=["a cat", "a ship"], w=w) / 2 + 0.5 for w in (2.0, 0.0)]
    for ours, guidance_scale in zip(images, (3, 1), strict=True):
        assert torch.allclose(ours, stock_images(stock, ["a ship", "a cat"], 4, guidance_scale), atol=2e-4)
    assert (images[0] - images[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "prediction_type, more",
    [("epsilon", ["--guidance_w=3", "--mixed_precision=bf16"]), ("v_prediction", ["--lora_rank=2"])],
)
def test_stock_diffusers_loads_a_student_elsewhere_and_samples_alike(folder, tmp_path, call, prediction_type, more):
    """Full or LoRA."""
    name, out = folder(prediction_type), tmp_path / "out"
    status, _, err = call(distill.main, *flags(name, write_captions(tmp_path / "captions"), out), *more)
    assert status == 0, err
    done = python("-c", STOCK, name if more == ["--lora_rank=2"] else out, out)
    assert done.returncode == 0, done.stderr
    student, untrained = load(str(out)), load(name).network.state_dict()
    assert any((student.network.state_dict()[key] - old).abs().max() > 1e-4 for key, old in untrained.items())
    ours = sample.sample(student, range(7, 9), 4, prompts=["a cat", "a ship"])
    assert torch.allclose(ours / 2 + 0.5, torch.load(out / "images.pt"), atol=2e-4)


def test_a_half_precision_teacher_is_as_exact_as_autocast(folder):
    """Without autocast too; and it is told sizes that bf16 does not have."""
    model, exact = load(folder()), load(folder())
    for each in (model, exact):
        each.resize(1202)
    x, t, cond = torch.randn(16, 4, 8, 8), torch.linspace(50, 950, 16).long(), exact.condition(["a cat"] * 16)
    _, wanted = exact.predict(x, t, cond, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = exact.predict(x, t, cond, 3.0)
    _, plain = model.to("cpu", torch.bfloat16).predict(x, t, cond, 3.0)
    error, usual = (plain - wanted).square().mean().sqrt(), (under_autocast - wanted).square().mean().sqrt()
    assert plain.dtype == torch.float32 and 0 < error < 1.5 * usual


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_computes_in_float32_if_its_config_says_so(folder, upcast):
    """Under autocast, in which a student is trained."""
    model = load(folder())
    model.vae.register_to_config(force_upcast=upcast)
    pixels, x0 = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.randn(3, 4, 8, 8)
    wanted = model.prepare(pixels, ["a cat"] * 3)[0], model.decode(x0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.prepare(pixels, ["a cat"] * 3)[0], model.decode(x0)
    assert all(torch.equal(a, b) == upcast and a.dtype == torch.float32 for a, b in zip(found, wanted, strict=True))


def test_another_vae_takes_the_place_of_the_pipelines_and_goes_into_its_students(folder, tmp_path, call):
    name, place, out = folder(), str(tmp_path / "vae"), tmp_path / "out"
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
    status, _, err = call(distill.main, *flags(name, write_captions(tmp_path / "captions"), out, lora_rank=2))
    assert status == 0, err
    record = json.loads((out / "metrics.json").read_text())
    record["configuration"]["pretrained_vae_model_name_or_path"] = place
    (out / "metrics.json").write_text(json.dumps(record))
    torch.testing.assert_close(load(str(out)).decode(x0), wanted)


def test_a_variant_is_read_in_float32_and_named_where_it_is_missing(tmp_path, call):
    half = xl().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    model, exact = load(str(tmp_path), variant="fp16"), half.to(torch.float32)
    found, wanted = model.condition(["a cat"]), exact.encode_prompt("a cat", do_classifier_free_guidance=False)
    torch.testing.assert_close(flat(found)[:2], (wanted[0], wanted[2]))
    assert all(map(torch.equal, model.network.parameters(), exact.unet.parameters()))
    status, _, err = call(sample.main, tmp_path)
    assert status == 2 and str(tmp_path) in err and "--variant fp16" in one_line(err)


def test_the_hub_is_asked_for_the_revision(folder, monkeypatch):
    name, asked, read = folder(), [], Pipeline.from_pretrained
    monkeypatch.setattr(teacher, "HfApi", Mock())
    monkeypatch.setattr(teacher, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or f"{name}/model_index.json")
    monkeypatch.setattr(
        Pipeline, "from_pretrained", lambda *a, **k: asked.append((a, k)) or read(name, dtype=torch.float32)
    )
    load("somebody/xl", revision="v1")
    assert [(a, k["revision"]) for a, k in asked] == [(("somebody/xl",), "v1")] * 2


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_files_is_refused(folder, tmp_path, call, part):
    name = folder()
    (tmp_path / "teacher" / part / "tokenizer.json").unlink()
    status, _, err = call(sample.main, name)
    assert status == 2 and name in err and "does not tell texts apart" in one_line(err)
