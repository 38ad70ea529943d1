"""On a GPU that is not there. FakeTensorMode computes shapes, types and devices of tensors without their values. So a
tensor left on the CPU raises where it meets one on "cuda", as it would on a real one."""

import copy

import pytest
import torch
from conftest import save, unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from test_stable_diffusion import POOLED, pipeline, xl
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

import splam
from improved import ToldTheTime
from sample import sample
from splam import Schedule, SubPathStudent
from teacher import StableDiffusion, StableDiffusionXL, load
from toy.distributions import GaussianMixture
from toy.mlp import PointMLP

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA")
KINDS = ["points", "ideal points", "images", "text-to-image", "SDXL"]


def model_of(kind, tmp_path):
    if kind == "text-to-image":
        return StableDiffusion(pipeline(), "tiny")
    if kind == "SDXL":
        return StableDiffusionXL(xl(), "tiny")
    if kind == "images":
        return load(str(save(tmp_path, unet(classes=3))))
    return load(str(save(tmp_path, PointMLP(width=8, num_class_embeds=3, distribution="moons", ideal="ideal" in kind))))


class CopyToGpu(TorchFunctionMode):
    """copy.deepcopy, but each tensor's copy is a fake one on the GPU. (Module.to cannot replace fake parameters.)"""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.Tensor.clone, torch.Tensor.__deepcopy__):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        with self.mode:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")


def encoded(pipeline, prompt, device, **_):
    """Embeddings with and without condition; of SDXL also the pooled ones, as wide as in test_stable_diffusion.py."""
    shape = len(prompt), pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim
    found = [torch.empty(shape, device=device)] * 2
    if hasattr(pipeline, "text_encoder_2"):
        found += [torch.empty(len(prompt), POOLED, device=device)] * 2
    return found


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(thing) -> its copy on a fake GPU. All that a test computes is fake."""
    # autocast looks for a GPU and would switch itself off without one.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(GaussianMixture, "num_classes", 2)  # which it computes from values
    for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        monkeypatch.setattr(pipeline_class, "encode_prompt", encoded)  # which looks at the tokens' values
    monkeypatch.setattr(Schedule, "__deepcopy__", lambda schedule, memo: schedule, raising=False)  # stays on the CPU
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def copied(thing):
        with unset_fake_temporarily(), CopyToGpu(mode):
            return copy.deepcopy(thing)

    with mode:
        yield copied


@pytest.mark.parametrize("ode", ["dl", "lcm"])
@pytest.mark.parametrize("precision, student_class", [(torch.bfloat16, ToldTheTime), (torch.float16, SubPathStudent)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_guided_step_of_algorithm_1_stays_on_the_gpu(tmp_path, on_gpu, kind, precision, ode, student_class):
    with unset_fake_temporarily():
        real = model_of(kind, tmp_path).to("cpu", precision)
        student = student_class(real.copy_network(), real.schedule, real.prediction_type)
        labels = real.labels([])[:2]
    teacher, student, target = on_gpu(real), on_gpu(student), on_gpu(student)
    x = torch.empty(2, *((3, 16, 16) if teacher.kind == "text-to-image" else teacher.shape), device="cuda")
    with torch.autocast("cuda", precision):
        x0, cond = teacher.prepare(x, labels)
        draws = splam.draw(x0, 1000, 50, torch.Generator())
        loss = splam.splad_loss(
            student, target, lambda x, t: teacher.predict(x, t, cond, 3.0), teacher.schedule, x0, cond, draws,
            k=100, solver_step=50, ode=ode, metric="huber",
        )  # fmt: skip
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
    splam.ema_update(target, student, 0.95)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_sampled_on_the_gpu_and_its_samples_come_back(tmp_path, on_gpu, kind):
    with unset_fake_temporarily():
        teacher = model_of(kind, tmp_path)
        student = teacher.student(teacher.network.state_dict(), 50)
    samples = sample(on_gpu(student), range(3), 2, mixed_precision="bf16")
    assert samples.device.type == "cpu" and len(samples) == 3
