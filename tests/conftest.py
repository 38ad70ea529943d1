"""What several rooms' tests share: a way to call the programs, small pipelines, and real images where they are."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from hypothesis import settings
from PIL import Image

import teacher
from toy.mlp import PointMLP

constants.HF_HUB_OFFLINE = True  # no test needs a network, and none may wait for one
settings.register_profile("splam", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("splam")
CIFAR_ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "cifar10_jpg.tar.xz"
CLASSES, PER_CLASS = ["cat", "ship", "truck"], {"train": 32, "test": 8}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """A program is a process; tests that call several in one process must reset accelerate's shared state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, "--flag", value, ...) -> (exit status, stdout, stderr) of a program's `main`."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        capsys.readouterr()  # what came before is not of this program
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        AcceleratorState._reset_state(reset_partial_state=True)
        out, err = capsys.readouterr()
        return status, out, err

    return run


ROOT = Path(__file__).parents[1]


def python(*arguments) -> subprocess.CompletedProcess:
    """Python in a process of its own, with as many threads as any other."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def one_line(err: str) -> str:
    """The one line that a terminal is left with; anything more, a traceback say, fails."""
    lines = [line for line in (line.split("\r")[-1] for line in err.split("\n")) if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder of 3 classes, train and test: CIFAR-10's own where the archive is at hand, else drawn."""
    root = tmp_path_factory.mktemp("images")
    wanted = {f"{split}/{c}/{i:04d}.jpg" for split, n in PER_CLASS.items() for c in CLASSES for i in range(n)}
    if CIFAR_ARCHIVE.is_file():
        with tarfile.open(CIFAR_ARCHIVE) as archive:
            # Set here and not given to `extract`, which takes it from Python 3.11.4 on only: Debian 12 has 3.11.2.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in archive:
                if member.name.removeprefix("./") in wanted:
                    archive.extract(member, root)
                    wanted.discard(member.name.removeprefix("./"))
                    if not wanted:
                        break
    random = np.random.default_rng(0)
    for name in sorted(wanted):  # stripes whose direction and colour are the class
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        c, stripes = CLASSES.index(Path(name).parent.name), np.indices((32, 32))
        wave = np.sin(0.4 * stripes[c % 2] + random.uniform(0, 6)) * 60 + 128
        Image.fromarray(
            (wave[..., None] * np.eye(3)[c] + random.normal(60, 9, (32, 32, 3))).clip(0, 255).astype("uint8")
        ).save(root / name)
    return root


def unet(classes: int | None = None, size: int = 8, **options) -> UNet2DModel:
    """The smallest U-Net that has everything, with weights large enough to matter."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=None if classes is None else classes + 1,
        **options,
    )


def save(folder: Path, network, prediction_type="epsilon", beta_schedule="scaled_linear", **scheduler) -> Path:
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type, **scheduler)
    if isinstance(network, PointMLP):
        teacher.save(teacher.PointModel(network, scheduler, str(folder)), Path(folder))
    else:
        DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
    return folder
