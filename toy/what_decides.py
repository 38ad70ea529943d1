"""What decides whether SPLAM is better than LCM: one thing changed at a time.

All students have k = 100 and five solver steps, so that LCM and SPLAM differ in γ alone: always 1, or uniform. Other
factors have scripts of their own: k and multiple estimation (fig2a), training time (fig2b), w (fig3), σ (appb).
"""

import functools

import torch
from PIL import Image
from torch import Tensor

import splam
from data import program
from splam import Draws
from toy import plots
from toy.laboratory import Findings, Laboratory, Variant
from toy.mlp import PointMLP
from toy.points import Points

LCM, SPLAM, TIME = "--ode lcm", "--gamma_conditioning embedding", "--gamma_conditioning time"
METHODS = {"LCM": LCM, "SPLAM": SPLAM, "SPLAM, t'": TIME}
smooth_embedding, uniform_draw = splam.gamma_embedding, splam.draw


def sharp_embedding(gamma: Tensor) -> Tensor:
    """The frequencies of LCM's guidance embedding, up to 1000 radians and more, but zero at γ = 1 like ours."""
    angle = 1000 * (1 - gamma.float())[:, None] * torch.logspace(0, -4, splam.GAMMA_DIM // 2, device=gamma.device)
    return torch.cat([angle.sin(), angle.cos() - 1], dim=1)


def large_embedding(gamma: Tensor) -> Tensor:
    """As if the γ-projection learnt 30 times faster: AdamW moves a weight by the same step whatever its input is."""
    return 30 * smooth_embedding(gamma)


def half_at_one(*arguments, **options) -> Draws:
    """Half of the draws have γ = 1."""
    draws = uniform_draw(*arguments, **options)
    return draws._replace(gamma=(2 * draws.gamma).clamp_max(1))


def late_gamma(*arguments, **options) -> Draws:
    """γ between 0.5 and 1."""
    draws = uniform_draw(*arguments, **options)
    return draws._replace(gamma=0.5 + draws.gamma / 2)


class FewPoints(Points):
    """256 points of training data."""

    def __init__(self, data: str, split: str):
        super().__init__(data, split)
        if split == "train":
            self.samples, self.labels = self.samples[:256], self.labels[:256]


def setting(name: str, *, only: tuple[str, ...] = tuple(METHODS), flags: str = "", **options) -> dict[str, Variant]:
    return {f"{method}: {name}": Variant(f"{METHODS[method]} {flags}", **options) for method in only}


GAMMA, PAPER = ("SPLAM", "SPLAM, t'"), ("SPLAM",)
VARIANTS = {
    **setting("as it is"),
    **setting("10 starts", flags="--num_ddim_timesteps 10"),
    **setting("1000 starts", flags="--num_ddim_timesteps 1000"),
    **setting("32 units", changes={"toy.points.PointMLP": functools.partial(PointMLP, width=32)}),
    **setting("spiral", flags="--pretrained_teacher_model ideal:spiral"),
    **setting("trained teacher", flags="--pretrained_teacher_model toy:8gaussians"),
    **setting("poor teacher", flags="--pretrained_teacher_model toy:8gaussians", teacher="--max_train_steps 300"),
    **setting("256 points of data", changes={"toy.points.Points": FewPoints}),
    **setting("EMA 0", flags="--ema_decay 0"),
    **setting("EMA 0.99", flags="--ema_decay 0.99"),
    **setting("half of γ at 1", only=GAMMA, changes={"distill.draw": half_at_one}),
    **setting("γ above 0.5", only=GAMMA, changes={"distill.draw": late_gamma}),
    **setting("sharp embedding", only=PAPER, changes={"splam.gamma_embedding": sharp_embedding}),
    **setting("embedding x 30", only=PAPER, changes={"splam.gamma_embedding": large_embedding}),
}


def picture(found: Findings) -> Image.Image:
    return plots.dots({c: {name: found.last(name, c) for name in found.rows} for c in found.columns()[:3]})


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
