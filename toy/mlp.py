"""A diffusion network for points, with the calling convention and the time embedding of diffusers' U-Nets."""

from pathlib import Path
from typing import NamedTuple

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu


class Output(NamedTuple):
    """Where diffusers' networks have their result too: network(...).sample."""

    sample: Tensor


class PointMLP(nn.Module, ConfigMixin):
    """Residual MLP (B, 2) -> (B, 2), called like a U-Net: network(x, t, class_labels=...).sample.

    Its config also remembers what it was fitted to: `distribution`, and whether the teacher that it belongs to is
    `ideal`, which answers by the distribution's closed form, so that only its students need the network.

    It is saved as diffusers saves a model, config.json and safetensors. It does not inherit diffusers' ModelMixin,
    which would do that too, because that class imports transformers: half a second for every start of the toy.
    """

    config_name = "config.json"
    weights_name = "diffusion_pytorch_model.safetensors"

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
        # t as sines and cosines of many frequencies, then two layers. Both have diffusers' names, since splam.py puts
        # its embedding of γ between them, in any network.
        self.time_proj = Timesteps(time_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_dim, width)
        # The number after the last class stands for "no class", which guidance needs.
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.first = nn.Linear(2, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Output:
        """x (B, 2), times (B,) or one time, and class numbers (B,) if it has classes. Times need not be whole:
        improved.py tells a student some between those of the schedule."""
        emb = self.time_embedding(self.time_proj(timestep.expand(len(sample))))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        h = self.first(sample)
        # Each layer adds to h what it makes of h and of the condition, as a U-Net's residual blocks do.
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(silu(inner(silu(h + emb))))
        return Output(sample=self.last(silu(h)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Config and weights, into `folder`."""
        self.save_config(folder)
        # contiguous: safetensors writes memory as it lies, and refuses views.
        save_file({name: w.contiguous() for name, w in self.state_dict().items()}, Path(folder) / self.weights_name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PointMLP":
        """What save_pretrained wrote."""
        network = cls.from_config(cls.load_config(folder))
        network.load_state_dict(load_file(Path(folder) / cls.weights_name))
        return network
