"""A diffusion network for points, with the calling convention and the time embedding of diffusers' U-Nets."""

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import silu


class PointMLP(ModelMixin, ConfigMixin):
    """Residual MLP (B, 2) -> (B, 2). The saved config remembers to what `distribution` it was fitted, and whether the
    teacher that it belongs to is `ideal`: answers by the distribution's closed form, so that only students need it."""

    @register_to_config
    def __init__(
        self,
        width: int = 128,
        depth: int = 3,
        time_dim: int = 64,
        num_class_embeds: int | None = None,
        distribution: str = "8gaussians",
        ideal: bool = False,
    ):
        super().__init__()
        self.time_proj = Timesteps(time_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_dim, width)
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.first = nn.Linear(2, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        emb = self.time_embedding(self.time_proj(timestep.expand(len(sample))))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        h = self.first(sample)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(silu(inner(silu(h + emb))))
        return UNet2DOutput(sample=self.last(silu(h)))
