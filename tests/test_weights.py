"""What is downloaded with the code: weights/, a teacher of CIFAR-10 and its student."""

import torch
from conftest import ROOT
from diffusers import DiffusionPipeline

from sample import sample
from teacher import load

WEIGHTS = ROOT / "weights"


def test_they_are_small_and_stock_diffusers_loads_them():
    """The repository is to stay one that is cloned on a whim."""
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 45e6
    for folder in WEIGHTS.iterdir():
        ours, stock = load(str(folder)).network.state_dict(), DiffusionPipeline.from_pretrained(folder).unet
        assert all(torch.equal(ours[name], weight) for name, weight in stock.state_dict().items())


def test_one_step_of_the_student_lands_where_25_guided_ones_of_its_teacher_do():
    """Of the teacher's samples from the same noises these are the nearest: not those of one step, or without w = 1."""
    teacher, student = (load(str(WEIGHTS / name)) for name in ("cifar10-teacher", "cifar10-student"))
    landing = sample(student, range(20), 1)
    one_step, unguided, guided = (
        (sample(teacher, range(20), steps, w=w) - landing).flatten(1).norm(dim=1).mean()
        for steps, w in ((1, 1), (25, 0), (25, 1))
    )
    assert guided < unguided < one_step and guided < one_step / 3  # 4.1, 6.2 and 15
