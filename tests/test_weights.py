"""What is downloaded with the code: weights/, a teacher of CIFAR-10."""

import torch
from conftest import ROOT
from diffusers import DiffusionPipeline

from teacher import load

WEIGHTS = ROOT / "weights"


def test_they_are_small_and_stock_diffusers_loads_them():
    """The repository is to stay one that is cloned on a whim."""
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 45e6
    for folder in WEIGHTS.iterdir():
        ours, stock = load(str(folder)).network.state_dict(), DiffusionPipeline.from_pretrained(folder).unet
        assert all(torch.equal(ours[name], weight) for name, weight in stock.state_dict().items())
