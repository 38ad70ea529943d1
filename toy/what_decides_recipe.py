"""What decides whether SPLAM is better than LCM? The recipe: EMA, the share of γ = 1, the γ-embedding."""

import torch
from torch import Tensor

import splam
from data import program
from splam import Draws
from toy.laboratory import Laboratory
from toy.what_decides import picture, setting

smooth_embedding, uniform_draw = splam.gamma_embedding, splam.draw


def sharp_embedding(gamma: Tensor) -> Tensor:
    """The frequencies of LCM's guidance embedding, up to 1000 radians, but zero at γ = 1 like ours."""
    angle = 1000 * (1 - gamma.float())[:, None] * torch.logspace(0, -4, splam.GAMMA_DIM // 2, device=gamma.device)
    return torch.cat([angle.sin(), angle.cos() - 1], dim=1)


def large_embedding(gamma: Tensor) -> Tensor:
    """As if the γ-projection learnt 30 times faster: AdamW moves a weight by the same step whatever its input is."""
    return 30 * smooth_embedding(gamma)


def late_gamma(*arguments, **options) -> Draws:
    """γ between 0.5 and 1."""
    draws = uniform_draw(*arguments, **options)
    return draws._replace(gamma=0.5 + draws.gamma / 2)


GAMMA, PAPER = ("SPLAM", "SPLAM, t'"), ("SPLAM",)
VARIANTS = {
    **setting("as it is"),
    **setting("EMA 0", flags="--ema_decay 0"),
    **setting("EMA 0.99", flags="--ema_decay 0.99"),
    **setting("half of γ at 1", only=GAMMA, flags="--gamma_at_one 0.5"),
    **setting("γ above 0.5", only=GAMMA, changes={"distill.draw": late_gamma}),
    **setting("sharp embedding", only=PAPER, changes={"splam.gamma_embedding": sharp_embedding}),
    **setting("embedding x 30", only=PAPER, changes={"splam.gamma_embedding": large_embedding}),
}


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
