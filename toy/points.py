"""The teacher of 2-D points: what kinds.py is for images."""

import argparse

import torch
from diffusers import DDPMPipeline
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import BadInput, ImageFiles
from kinds import Teacher, refuse_pair_flags
from metrics import Measure, PointDistances
from splam import sub_path_point, to_x0_eps
from toy import DISTRIBUTIONS, GaussianMixture, PointMLP, plots


class Points(Dataset):
    """65,536 points of `toy:<name>`, always the same, with their classes (zeros where there are none)."""

    def __init__(self, data: str, split: str):
        seed, mixture = {"train": 1, "test": 2}[split], distribution(data)
        self.samples, component = mixture.sample(2**16, torch.Generator().manual_seed(seed))
        self.labels = torch.zeros_like(component) if mixture.classes is None else mixture.classes[component]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.samples[indices], self.labels[indices]


class PointTeacher(Teacher):
    """2-D points: `DDPMPipeline` of `PointMLP`.

    An ideal teacher, "ideal:<name>", knows ε in closed form, and its MLP is where its students start.
    """

    shape, pictured = (2,), 4096
    recipe = {
        "max_train_steps": 2000,
        "train_batch_size": 512,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "num_eval_samples": 4096,
    }
    training_recipe = {
        "max_train_steps": 3000,
        "train_batch_size": 512,
        "learning_rate": 2e-3,
        "beta_schedule": "scaled_linear",
    }
    evaluation = {"teacher_steps": [1, 2, 4, 1000], "num_samples": 4096, "batch_size": 1024}

    def __init__(self, pipeline: DDPMPipeline, name: str):
        super().__init__(pipeline, name)
        config = self.network.config
        self.ideal = config.ideal and not self.is_student
        self.default_data = f"{'ideal' if config.ideal else 'toy'}:{config.distribution}"
        self.mixture = distribution(self.default_data)

    def predict(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> tuple[Tensor, Tensor]:
        if not self.ideal or (w and not self.conditional):  # which is refused there
            return super().predict(x, t, cond, w)
        alpha, sigma = self.schedule.at(t, 2)
        return to_x0_eps(self.mixture.eps(x, alpha, sigma, cond.get("class_labels"), w), x, alpha, sigma, "epsilon")

    def endpoint(self, noise: Tensor, cond: dict[str, Tensor], w: float = 0.0) -> Tensor:
        if not self.ideal:
            return super().endpoint(noise, cond, w)
        last = torch.tensor([len(self.schedule) - 1])
        return self.mixture.endpoint(noise, *self.schedule.at(last, 2), cond.get("class_labels"), w)

    def dataset(self, args: argparse.Namespace) -> Dataset:
        refuse_pair_flags(args)
        if args.resolution:
            raise BadInput("--resolution is for images")
        return Points(args.data, "train")

    def reference(self, data: str, split: str, resolution: int | None) -> Tensor | ImageFiles:
        return Points(data, split).samples

    def measures(self, reference: Tensor | ImageFiles, features: str, clip_model: str | None) -> list[Measure]:
        return [PointDistances(reference)]

    def measured(self, samples: Tensor, resolution: int | None) -> Tensor:
        return samples

    def picture(self, samples: Tensor, columns: int | None = None) -> Image.Image:
        return plots.scatter(samples)

    @torch.no_grad()
    def overview(self, panels: dict[str, Tensor], k: int = 100) -> Image.Image:
        """The panels, and four PF-ODE trajectories with the lines of their sub-paths, from x_t to r x_s (Eq. 12)."""

        def times(time: int) -> Tensor:
            return torch.full((4,), time, device=self.network.device)

        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).to(self.network.device)
        states, last = [x], len(self.schedule) - 1
        for time in range(last, 0, -1):  # DDIM steps of size 1: the PF-ODE, for the eye
            x0, eps = self.predict(states[-1], times(time), {})
            alpha, sigma = self.schedule.at(times(time - 1), 2)
            states.append(alpha * x0 + sigma * eps)
        paths, lines = torch.stack(states), []  # paths[last - t] is at time t
        for t in range(last, 0, -k):
            s = max(t - k, 0)
            ends = paths[last - t], paths[last - s], times(t), times(s)
            line = [sub_path_point(*ends, times(gamma), self.schedule, "sl", "approx").x for gamma in (1, 0)]
            lines.append(torch.stack(line))
        return plots.overview(panels, paths.cpu(), torch.stack(lines).cpu())

    @staticmethod
    def new_network(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
        if args.resolution or args.block_out_channels:
            raise BadInput("--resolution and --block_out_channels are for images")
        classes, (kind, _, name) = distribution(args.data).num_classes, args.data.partition(":")
        if args.class_conditional and not classes:
            raise BadInput(f"--class_conditional: {args.data} has no classes")
        labels = classes + 1 if args.class_conditional else None
        network = PointMLP(num_class_embeds=labels, distribution=name, ideal=kind == "ideal")
        return network, Points(args.data, "train")


POINTS = ("toy:", "ideal:")  # how names of 2-D distributions and their teachers begin


def distribution(data: str) -> GaussianMixture:
    kind, _, name = data.partition(":")
    if f"{kind}:" not in POINTS or name not in DISTRIBUTIONS:
        raise BadInput(f"unknown 2-D distribution {data!r}: choose from {', '.join('toy:' + n for n in DISTRIBUTIONS)}")
    return DISTRIBUTIONS[name]
