"""Long runs: resumed after a kill, on several processes, in several micro-batches - always the same run."""

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import is_tensorboard_available
from conftest import ROOT, losses, one_line, python, save, unet
from PIL import Image
from safetensors.torch import load_file

import distill
import evaluate
import teacher
import training
from data import Points
from toy.mlp import PointMLP


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """A 2-D distillation of 6 steps from a small random teacher. Its picture, which takes longest, shows little."""
    monkeypatch.setattr(distill, "preview", lambda model: (32, 8))
    for kind in (teacher.PointModel, teacher.ImageModel):
        monkeypatch.setattr(kind, "many_steps", 2)
    torch.manual_seed(0)
    folder = save(tmp_path / "teacher", PointMLP(width=16, depth=1), clip_sample=False)
    return f"""--pretrained_teacher_model {folder} --max_train_steps 6 --train_batch_size 8 --lr_warmup_steps 2
        --checkpointing_steps 2 --num_eval_samples 0 --ema_decay 0.5""".split()


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """The trained network of the last checkpoint, and the exported student."""
    parts = {"m": load_file(training.checkpoints(folder)[-1] / "model.safetensors"), "s": student(folder)}
    return {f"{part}.{name}": w for part, weights in parts.items() for name, w in weights.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


KILLED = """import distill, os, pathlib, signal, training
def killing(function, now):
    def wrapped(*arguments):
        os.kill(os.getpid(), signal.SIGKILL) if now(*arguments) else function(*arguments)
    return wrapped
{where} = killing({where}, {when})
distill.main()"""


@pytest.mark.parametrize("kind, last, where, when", ids=["points", "images"], argvalues=[
    ("points", 2, "pathlib.Path.rename", "lambda draft, final: 'checkpoint-4' in str(final)"),  # while it is written
    ("images", 4, "training.Run.log", "lambda run, step, loss: step == 5"),
])  # fmt: skip
def test_a_run_resumed_after_a_kill_is_bit_identical(
    kind, last, where, when, flags, images, tmp_path, call, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as in the killed process
    if kind == "images":
        folder = save(tmp_path / "unet", unet(classes=3, dropout=0.2))  # whose dropout draws without a generator
        flags += ["--pretrained_teacher_model", folder, "--data", images, "--guidance_w", 1, "--validation_steps", 0]
    else:
        flags += ["--gradient_accumulation_steps", 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(distill.main, *flags, "--output_dir", whole)[0] == 0
    script = KILLED.format(where=where, when=when)
    assert python("-c", script, *flags, "--output_dir", killed).returncode == -9
    assert [path.name for path in training.checkpoints(killed)] == [f"checkpoint-{last}"]
    assert call(distill.main, *flags, "--output_dir", killed, "--resume_from_checkpoint", "latest")[0] == 0
    assert_equal(everything(whole), everything(killed))
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()  # no step comes twice


def test_the_random_numbers_of_micro_batches_differ_in_everything():
    """By seed, by number and by use: torch's generator reads the lower 32 bits of a seed only."""
    places = [(seed, number, use) for seed in (0, 1, 2**31 - 1) for number in (0, 1, 50_000) for use in (0, 1)]
    draws = {torch.rand(1, generator=training.numbered(*place)).item() for place in places}
    assert len(draws) == len(places)


def test_micro_batches_and_processes_only_divide_the_work(flags, tmp_path, call):
    """Two processes compute what one does with two micro-batches."""
    micro, two = tmp_path / "micro", tmp_path / "two"
    assert call(distill.main, *flags, "--gradient_accumulation_steps", 2, "--output_dir", micro)[0] == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = python(*launch, ROOT / "distill.py", *flags, "--output_dir", two)
    assert done.returncode == 0, done.stderr
    start, one = load_file(tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"), student(micro)
    for key, weight in student(two).items():
        moved = (one[key] - start[key]).abs().max()
        assert moved > 1e-3  # the learning rate is 1e-3: without this, standing still would pass
        assert torch.allclose(one[key], weight, atol=0.01 * moved), key


def test_the_flag_counts_and_not_the_environment_of_a_launcher(flags, tmp_path, call, monkeypatch):
    """accelerate takes ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which launchers set, before its argument."""
    more = ["--gradient_accumulation_steps", 3]
    assert call(distill.main, *flags, *more, "--output_dir", tmp_path / "a")[0] == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setattr(torch, "compile", None)  # whoever calls it fails
    assert call(distill.main, *flags, *more, "--output_dir", tmp_path / "b")[0] == 0
    assert_equal(everything(tmp_path / "a"), everything(tmp_path / "b"))
    for other in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{other}", "true")
            status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / "c")
            assert status == 2 and other in one_line(err) and not (tmp_path / "c").exists()


def test_processes_that_would_not_cooperate_are_refused(flags, tmp_path, call, monkeypatch):
    """Without GPUs, accelerate sees one process where torchrun has started two, and its launcher starts only one."""
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "2", ROOT / "distill.py"]
    done = subprocess.run([*map(str, launch), *map(str, flags), "--output_dir", tmp_path / "out"], capture_output=True)
    assert done.returncode and b"ACCELERATE_USE_CPU" in done.stderr and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / "out")
    assert status == 2 and "ACCELERATE_USE_CPU" in one_line(err) and not (tmp_path / "out").exists()


def unchanged(folder: Path) -> dict[Path, bytes]:
    """What lies in the folder, to be compared with what lies there later."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_that_an_earlier_run_wrote_is_lost(flags, tmp_path, call):
    out, latest = tmp_path / "out", ["--resume_from_checkpoint", "latest"]
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    before = unchanged(out)
    for more, words in (
        ([*latest, "--seed", 1, "--metric", "l2"], "metric was huber and is l2, seed was 0 and is 1"),
        ([*latest, "--improved", "time"], "improved was [] and is ['time']"),
        (["--resume_from_checkpoint", tmp_path / "teacher"], "holds checkpoint-6"),
        ([], "holds checkpoint-6 of an earlier run: --resume_from_checkpoint latest"),
    ):
        status, _, err = call(distill.main, *flags, "--output_dir", out, *more)
        assert status == 2 and words in one_line(err), err
        assert before == unchanged(out)
    # What is written, and how often, may change.
    free = ["--checkpointing_steps", 5, "--validation_steps", 4]
    status, _, err = call(distill.main, *flags, "--output_dir", out, *latest, *free)
    assert status == 0 and len(losses(out)) == 6, err  # not a step was made
    shutil.rmtree(out / "checkpoints")  # for their size
    before = unchanged(out)
    for more in ([], latest):
        status, _, err = call(distill.main, *flags, "--output_dir", out, *more)
        assert status == 2 and "no checkpoints of this program" in one_line(err) and before == unchanged(out), err


def test_the_record_names_the_commit_that_was_run(flags, tmp_path, call, monkeypatch):
    """And not the one that is there when it has been run. A machine need not have git."""
    out = tmp_path / "out"

    def git(*arguments, **options):
        return SimpleNamespace(stdout="after" if (out / "metrics.jsonl").exists() else "before")

    try:
        monkeypatch.setattr("evaluate.subprocess.run", git)
        evaluate.provenance.cache_clear()
        assert call(distill.main, *flags, "--output_dir", out)[0] == 0
        assert json.loads((out / "metrics.json").read_text())["commit"] == "before"
        monkeypatch.undo()
        monkeypatch.setenv("PATH", "")
        evaluate.provenance.cache_clear()
        assert evaluate.provenance()["commit"] == ""
    finally:
        evaluate.provenance.cache_clear()


def test_a_folder_that_holds_something_of_the_users_is_refused(flags, tmp_path, call):
    """A model's parts would replace those of the same names."""
    file = tmp_path / "mine/unet/config.json"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for name, words in (("mine", "no checkpoints of this program"), ("teacher", "the teacher's own folder")):
        before = unchanged(tmp_path / name)
        status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / name)
        assert status == 2 and words in one_line(err) and unchanged(tmp_path / name) == before, err


def test_a_folder_that_another_process_is_making_is_not_refused(flags, tmp_path):
    """Between the folder of checkpoints and the mark in it."""
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    distill.configure([*map(str, flags), "--output_dir", str(tmp_path / "out")])


class Evil:
    """A pickle that leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "torn": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "code": lambda file: torch.save(Evil(file.parents[3] / "owned"), file),
}
FILES = ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", training.MARK]


def test_a_damaged_checkpoint_is_one_line_that_names_it_and_runs_no_code(flags, tmp_path, call):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", whole)[0] == 0
    for file in FILES:
        for name, damage in DAMAGES.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            damage(out / "checkpoints/checkpoint-6" / file)
            before = unchanged(out)
            status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
            assert status == 2 and f"{out}/checkpoints/checkpoint-6" in one_line(err), (file, name, err)
            assert before == unchanged(out) and not (tmp_path / "owned").exists(), (file, name)


def test_the_saved_student_is_the_average_of_the_online_network(flags, tmp_path, call, monkeypatch):
    """Eq. 6's θ⁻: μ θ⁻ + (1 - μ) θ after each step, from the teacher's weights on; and it is what is exported."""
    online, mu, checkpoint = [], 0.5, training.Run.checkpoint

    def keep(run, step):
        online.append({name: w.clone() for name, w in run.model.network.state_dict().items()})
        checkpoint(run, step)

    monkeypatch.setattr(training.Run, "checkpoint", keep)
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--improved", "time", "--output_dir", out)[0] == 0
    average = load_file(tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors")
    for weights in online:
        average = {name: mu * average[name] + (1 - mu) * weights[name] for name in average}
    for name, weight in student(out).items():
        torch.testing.assert_close(average[name], weight, rtol=1e-5, atol=1e-7)
    assert not torch.equal(student(out)["last.weight"], online[-1]["last.weight"])


def test_the_gradient_is_limited_and_0_means_that_it_is_not(flags, tmp_path, call):
    """AdamW's first moment is a tenth of what clipping left of the first gradient; and it is told the weight decay."""
    norms = {}
    for limit in (1e-3, 100.0, 0):
        out, more = tmp_path / str(limit), ["--max_train_steps", 1, "--lr_warmup_steps", 0, "--max_grad_norm", limit]
        more += ["--adam_weight_decay", 0.1]
        assert call(distill.main, *flags, *more, "--output_dir", out)[0] == 0
        adamw = torch.load(out / "checkpoints/checkpoint-1/optimizer.bin", weights_only=True)
        used = 10 * torch.cat([moment["exp_avg"].flatten() for moment in adamw["state"].values()]).norm()
        assert adamw["param_groups"][0]["weight_decay"] == 0.1
        norms[limit] = json.loads((out / "metrics.jsonl").read_text())["grad_norm"]
        assert used.item() == pytest.approx(min(norms[limit], limit or math.inf), rel=1e-3)
    assert 1e-2 < norms[1e-3] == norms[100.0] == norms[0] < 100


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_schedule_warms_up(flags, tmp_path, call, schedule):
    more = ["--lr_scheduler", schedule, "--learning_rate", 1e-3]
    assert call(distill.main, *flags, *more, "--output_dir", tmp_path / "out")[0] == 0
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])  # logged after the step: the next one's
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 0)


def test_a_tracker_gets_flags_numbers_and_pictures_and_a_missing_one_is_refused(flags, tmp_path, call):
    out = tmp_path / "out"
    flags += ["--report_to", "tensorboard", "--tracker_project_name", "mine", "--validation_steps", 3]
    status, _, err = call(distill.main, *flags, "--output_dir", out)
    if not is_tensorboard_available():
        assert status == 2 and "--report_to tensorboard is none of" in err
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert status == 0, err
    events = EventAccumulator(str(out / "mine")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(out))
    (first, _), saved = events.Images("validation"), Image.open(out / "samples/step-3.png").convert("RGB")
    assert first.step == 3 and Image.open(io.BytesIO(first.encoded_image_string)).tobytes() == saved.tobytes()
    assert "ema_decay: 0.5" in next((out / "mine").rglob("hparams.yml")).read_text()


def test_a_resumed_loader_goes_on_where_processes_share_the_work():
    """Of two processes, the second one's fourth micro-batch is the run's eighth."""
    points, number = Points("toy:8gaussians"), 3 * 2 + 1
    indices = torch.randint(len(points), (4,), generator=training.numbered(5, number, training.ORDER))
    x, _ = next(training.loader(points, 4, seed=5, first=3, rank=1, world=2))
    assert torch.equal(x, points.samples[indices])


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_run_that_diverges_ends_before_anything_of_it_is_saved(flags, tmp_path, call, monkeypatch, broken):
    out, more = tmp_path / "out", ["--checkpointing_steps", 1, "--lr_warmup_steps", 0]
    if broken == "loss":
        more += ["--learning_rate", 1e30]
    else:
        monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    status, _, err = call(distill.main, *flags, *more, "--output_dir", out)
    bar, line = (line for line in err.split("\n") if line.strip())  # of the run that had begun
    assert status == 2 and "not finite" in line and "step" in bar
    logged = "".join(file.read_text() for file in out.glob("metrics.jsonl"))
    assert "NaN" not in logged and "Infinity" not in logged and not (out / "model_index.json").exists()
