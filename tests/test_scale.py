"""Stable Diffusion on more of everything: processes, shards, precisions, kills - and at its true size."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import DISTILL, killed_at, losses, one_line, python
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_stable_diffusion import WORDS, flags, pipeline
from transformers import CLIPTextConfig, CLIPTextModel

import distill
import training
from teacher import StableDiffusion
from toy.tiny_sd import LENGTH, caption

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # accelerate launch's default
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
}
RUNS = {
    "plain": {"gamma_conditioning": "embedding", "checkpointing_steps": 2},
    "bf16": {"mixed_precision": "bf16", "max_train_steps": 1},
    "lora": {"lora_rank": 2},
}
# accelerate shards on GPUs alone, torch on CPUs too: so accelerate is told that it is on GPUs.
PROGRAMS = """
import json, os, sys
from accelerate.state import AcceleratorState, GradientState
import distill, training
process = training.process
def on_gpus():
    state = process()
    state.distributed_type = "MULTI_GPU"
    return state
for environment, flags in json.loads(sys.argv[1]):
    os.environ.update(environment)
    training.process = on_gpus if environment else process
    sys.argv = ["distill.py", *flags]
    distill.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
"""


def picture(i: int, kind: str) -> bytes:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i)).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(24):
        (folder / f"{i:02d}.png").write_bytes(picture(i, "PNG"))
        (folder / f"{i:02d}.txt").write_text(caption(WORDS[i % 3], i))
    return folder


@pytest.fixture
def shards(tmp_path) -> str:
    """Two shards of four pairs; the second also holds a picture without its end, and one without its caption."""
    broken = [{"jpg": picture(8, "JPEG")[:-300], "txt": "a cat"}, {"jpg": picture(9, "JPEG")}]
    for shard in range(2):
        whole = [{"jpg": picture(i, "JPEG"), "txt": caption(WORDS[i % 3], i)} for i in range(4 * shard, 4 * shard + 4)]
        with webdataset.TarWriter(f"{tmp_path}/{shard}.tar") as tar:
            for i, member in enumerate(whole + broken * shard):
                tar.write({"__key__": f"{shard}-{i}", **member})
    return f"{tmp_path}/{{0..1}}.tar"


def two_processes(folder: Path, *programs: tuple[dict, list]) -> None:
    """Several runs of distill.py, one after the other, on the same two processes."""
    script = folder / "programs.py"
    script.write_text(PROGRAMS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    done = python(*launch, script, json.dumps(programs))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, teacher, pairs) -> dict[str, Path]:
    """Runs of two processes that each hold all weights."""
    folder = tmp_path_factory.mktemp("replicated")
    out = {name: folder / name for name in RUNS}
    two_processes(folder, *[({}, flags(teacher, pairs, out[name], **more)) for name, more in RUNS.items()])
    return out


def test_two_processes_share_the_batch_of_one(teacher, pairs, replicated, tmp_path, call):
    status, _, err = call(distill.main, *flags(teacher, pairs, tmp_path, **{**RUNS["plain"], "train_batch_size": 8}))
    assert status == 0, err
    one, two = losses(tmp_path), losses(replicated["plain"])
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=5e-3)


def assert_same_student(out: Path, wanted: Path, teacher: str) -> None:
    """To a hundredth of what training has moved."""
    file = "unet/diffusion_pytorch_model.safetensors"
    start, mine, theirs = (load_file(folder / file) for folder in (Path(teacher), out, wanted))
    for name, weight in theirs.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0 and (mine[name] - weight).abs().max() <= 0.01 * moved, name


def test_sharded_weights_learn_what_replicated_ones_do(teacher, pairs, replicated, tmp_path):
    """FSDP: losses, the averaged student, and its rest after an interruption; a LoRA; and the precision of autocast."""
    out = {name: tmp_path / name for name in ("plain", "rest", "bf16", "lora")}
    two_processes(tmp_path, (FSDP, flags(teacher, pairs, out["plain"], validation_steps=2, **RUNS["plain"])))
    assert list(out["plain"].glob("checkpoint-3/pytorch_model_fsdp*"))  # so the weights were sharded indeed
    again = flags(teacher, pairs, out["rest"], resume_from_checkpoint=out["plain"] / "checkpoint-2", **RUNS["plain"])
    # Efficient loading lets transformers load nothing but on the main process, once the processes are connected.
    second = {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    more = [(second, flags(teacher, pairs, out[name], **RUNS[name])) for name in ("bf16", "lora")]
    two_processes(tmp_path, (FSDP, again), *more)
    for name in RUNS:
        assert losses(out[name]) == pytest.approx(losses(replicated[name]), rel=1e-4), name
        norms = [
            [json.loads(line)["grad_norm"] for line in (folder[name] / "metrics.jsonl").read_text().splitlines()]
            for folder in (out, replicated)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), name
    assert losses(out["rest"]) == losses(out["plain"])[2:]
    assert_same_student(out["plain"], replicated["plain"], teacher)
    assert_same_student(out["rest"], out["plain"], teacher)
    mine, theirs = (load_file(folder["lora"] / "pytorch_lora_weights.safetensors") for folder in (out, replicated))
    assert mine.keys() == theirs.keys() and all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


def test_the_first_version_of_fsdp_is_refused(teacher, pairs, tmp_path, call, monkeypatch):
    class Sharding(training.Accelerator):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.state.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1})

    monkeypatch.setattr(training, "Accelerator", Sharding)
    status, _, err = call(distill.main, *flags(teacher, pairs, tmp_path))
    assert status == 2 and "--fsdp_version 2" in one_line(err)


def test_a_killed_run_repeats_what_it_would_have_done(teacher, pairs, tmp_path):
    runs = [flags(teacher, pairs, tmp_path / name, checkpointing_steps=2, lora_rank=2) for name in ("whole", "killed")]
    # All in processes of their own, with equally many threads.
    assert python("-c", DISTILL, *runs[0]).returncode == 0
    assert python("-c", killed_at(3), *runs[1]).returncode == -9
    assert [path.name for path in training.checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    done = python("-c", DISTILL, *runs[1], "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_broken_members_of_shards_are_passed_over_and_counted(teacher, shards, tmp_path, call, caplog):
    status, _, err = call(distill.main, *flags(teacher, shards, tmp_path / "out"))
    assert status == 0, err
    assert len(losses(tmp_path / "out")) == 3  # of 4 samples each, so all 8 usable ones were asked for
    assert "(1 broken so far)" in caplog.text and "(1 without caption so far)" in caplog.text


def test_more_readers_than_shards_are_refused(teacher, shards, tmp_path, call, monkeypatch):
    """Of three processes. More workers than shards are no mistake: as many are started as there is work for."""

    class OneOfThree(training.Accelerator):
        num_processes = 3

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            monkeypatch.setenv("WORLD_SIZE", "3")

    assert call(distill.main, *flags(teacher, shards, tmp_path / "one", dataloader_num_workers=3))[0] == 0
    monkeypatch.setattr(training, "Accelerator", OneOfThree)
    status, _, err = call(distill.main, *flags(teacher, shards, tmp_path / "out", dataloader_num_workers=2))
    assert status == 2 and "2 shards" in one_line(err) and "3 readers" in err


def test_precisions_and_loras_start_from_one_loss(teacher, pairs, tmp_path, call):
    first = {}
    for precision in ("no", "bf16"):
        for rank in (0, 2):
            more = {"mixed_precision": precision, "lora_rank": rank, "max_train_steps": 1}
            out = tmp_path / f"{precision}-{rank}"
            status, _, err = call(distill.main, *flags(teacher, pairs, out, **more))
            assert status == 0, err
            first[precision, rank] = losses(out)[0]
    assert 0 < first["no", 0] == pytest.approx(first["no", 2], rel=1e-5)  # a LoRA begins as nothing
    assert first["bf16", 0] == pytest.approx(first["bf16", 2], rel=1e-5)
    assert first["no", 0] != first["bf16", 0] == pytest.approx(first["no", 0], rel=0.05)


def true_size() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with random weights and a short text encoder."""
    small = pipeline()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(small.tokenizer),
            hidden_size=768,
            num_hidden_layers=1,
            num_attention_heads=12,
            max_position_embeddings=LENGTH,
        )
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    return StableDiffusionPipeline(**{**small.components, **parts}, requires_safety_checker=False)


@pytest.mark.slow
def test_the_true_size_takes_a_step(pairs, tmp_path, call, monkeypatch):
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    monkeypatch.setattr(StableDiffusion, "default_prompts", ["a cat"])
    monkeypatch.setattr(StableDiffusion, "many_steps", 1)
    large = true_size()
    assert sum(weight.numel() for weight in large.unet.parameters()) == 859_520_964
    large.save_pretrained(tmp_path / "teacher")
    del large
    more = {"lora_rank": 4, "resolution": 64, "train_batch_size": 1, "max_train_steps": 1, "k": 20, "solver_step": 20}
    status, _, err = call(distill.main, *flags(tmp_path / "teacher", pairs, tmp_path / "out", **more))
    assert status == 0, err
    (loss,) = losses(tmp_path / "out")
    assert 0 < loss < 10
    trained = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert any(weight.any() for name, weight in trained.items() if "lora_B" in name or "lora.up" in name)
