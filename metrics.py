"""What samples are measured by: points against points, images by features, images against their prompts.

A measure is fed with batches, so that sets of any size can be measured:

    for samples, texts in batches:
        measure.update(samples, texts)
    measure.result()                        {"FD": 12.3}; and the next set can begin
"""

import json
import logging
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from data import BadInput, ImageFiles

logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # a file that cannot be read is reported here, in one line


class Measure(Protocol):
    name: str  # said below the table

    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        """Takes in a batch of points (B, 2), or of uint8 images (B, 3, H, W), and the prompts they were made from."""

    def result(self) -> dict[str, float]:
        """The measured numbers, by their names in the table. What was taken in is forgotten."""


# ---------------------------------------------------------------------------------------------------------------------
# Points
# ---------------------------------------------------------------------------------------------------------------------


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact W2 (rooted, in data units) of two equally large sets of points (n, d), by optimal assignment."""
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def mmd(a: Tensor, b: Tensor) -> float:
    """RBF maximum mean discrepancy (rooted, unbiased before the root), the mean of the bandwidths 0.1, 0.3 and 1."""
    n, total = len(a), 0.0
    aa, bb, ab = (torch.cdist(p.double(), q.double()).square() for p, q in ((a, a), (b, b), (a, b)))
    for bandwidth in (0.1, 0.3, 1.0):
        kernel_aa, kernel_bb, kernel_ab = ((-d / (2 * bandwidth**2)).exp() for d in (aa, bb, ab))
        inside = (kernel_aa.sum() + kernel_bb.sum() - 2 * n) / (n * (n - 1))
        total += (inside - 2 * kernel_ab.mean()).item() / 3
    return max(total, 0.0) ** 0.5


class PointDistances:
    """W2 and MMD of 2-D points to reference points."""

    name = "features: the points themselves"

    def __init__(self, reference: Tensor):
        self.reference, self.batches = reference, []

    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        self.batches.append(samples)

    def result(self) -> dict[str, float]:
        samples, self.batches = torch.cat(self.batches), []
        n = min(len(samples), len(self.reference), 2048)  # the assignment costs n³
        reference = self.reference[:n]
        return {"W2": wasserstein2(samples[:n], reference), "MMD": mmd(samples[:n], reference)}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class ImageFeatures:
    """What a network sees in images: the Fréchet distance of its features to those of the reference images, by
    torch-fidelity; and how often it sees the class that the prompt names, if it is a classifier that has names.

    The network is torch-fidelity's Inception ("inception"; then the distance is FID), or a file of `evaluate.py
    features` (.pt2: FD), which maps uint8 images (B, 3, H, W) to features (B, D) and logits. Such a file holds a graph,
    not code, and torch.load, forbidden to execute any (data.py), takes only tensors from it.
    """

    def __init__(self, network: str, reference: Tensor | ImageFiles, device: torch.device):
        self.name, self.device, names = f"features: {network}", device, {"classes": ""}
        self.distance = "FID" if network == "inception" else "FD"
        try:
            if network == "inception":
                cuda = device.type == "cuda"
                self.network = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False)
            else:
                self.network = torch.export.load(network, extra_files=names).module().to(device)
        except Exception as error:  # a missing file, no network, or a file of another kind, each with its own type
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"cannot load the feature extractor {network}: {reason}") from error
        self.classes: list[str] = json.loads(names["classes"] or "[]")
        self.features, self.named, self.right = [], 0, 0
        parts = torch.arange(len(reference)).split(250)
        for indices in tqdm(parts, desc="reference", unit="batch", leave=False, mininterval=1):
            self.update(reference[indices], [])
        self.reference = self._statistics()

    @torch.no_grad()
    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        for i in range(0, len(samples), 250):
            features, *logits = self.network(samples[i : i + 250].to(self.device))
            self.features.append(features.float().cpu())
            for text, row in zip(texts[i : i + 250], logits[0] if self.classes else (), strict=False):
                named = [name for name in self.classes if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE)]
                self.named += len(named) == 1  # other prompts are not counted
                self.right += named == [self.classes[row.argmax()]]

    def _statistics(self) -> dict:
        features, self.features = torch.cat(self.features), []
        return fid_features_to_statistics(features)

    def result(self) -> dict[str, float]:
        metric = fid_statistics_to_metric(self._statistics(), self.reference, verbose=False)
        values = {self.distance: metric["frechet_inception_distance"]}
        if self.named:
            values["prompt accuracy"] = self.right / self.named
        self.named = self.right = 0
        return values


class ClipScore:
    """The mean cosine between image and prompt in a CLIP of open_clip, named as architecture/weights; weights are a tag
    of open_clip's, or a file."""

    def __init__(self, model: str, device: torch.device):
        self.name, self.device = f"CLIP: {model}", device
        architecture, _, weights = model.partition("/")
        if not weights:
            raise BadInput(f"a CLIP model is named as architecture/weights, not {model}")
        try:
            import open_clip  # here, because it takes seconds

            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, device=device
            )
            self.tokenize = open_clip.get_tokenizer(architecture)
        except Exception as error:  # an unknown name, no network, a broken file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"cannot load the CLIP model {model}: {reason}") from error
        self.model.eval()
        self.cosines = []

    @torch.no_grad()
    def update(self, samples: Tensor, texts: Sequence[str]) -> None:
        for i in range(0, len(texts), 50):
            pixels = torch.stack([self.preprocess(to_pil_image(image)) for image in samples[i : i + 50]])
            image = self.model.encode_image(pixels.to(self.device))
            text = self.model.encode_text(self.tokenize(texts[i : i + 50]).to(self.device))
            self.cosines.append(cosine_similarity(image, text).cpu())

    def result(self) -> dict[str, float]:
        cosines, self.cosines = self.cosines, []
        return {"CLIP": torch.cat(cosines).mean().item()} if cosines else {}
