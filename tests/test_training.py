"""Long runs: resumed after a kill, on several processes, in several micro-batches - always the same run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, killed_at, losses, one_line, python, save
from safetensors.torch import load_file

import distill
import training
from toy.mlp import PointMLP


@pytest.fixture
def flags(tmp_path):
    """A 2-D distillation of 6 steps from a small random teacher."""
    torch.manual_seed(0)
    folder = save(tmp_path / "teacher", PointMLP(width=16, depth=1), clip_sample=False)
    return f"""--pretrained_teacher_model {folder} --max_train_steps 6 --train_batch_size 8 --lr_warmup_steps 2
        --checkpointing_steps 2 --num_eval_samples 0 --ema_decay 0.5 --gamma_conditioning embedding""".split()


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Student and target of the last checkpoint, and the exported student."""
    last = training.checkpoints(folder)[-1]
    parts = {
        "m": load_file(last / "model.safetensors"),
        "t": load_file(last / "target.safetensors"),
        "s": student(folder),
    }
    return {f"{part}.{name}": w for part, weights in parts.items() for name, w in weights.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_resumed_after_a_kill_is_bit_identical(flags, tmp_path, call):
    assert call(distill.main, *flags, "--output_dir", tmp_path / "whole")[0] == 0
    assert python("-c", killed_at(5), *flags, "--output_dir", tmp_path / "killed").returncode == -9
    assert [path.name for path in training.checkpoints(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-4"]
    status, _, err = call(
        distill.main, *flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest"
    )
    assert status == 0, err
    assert_equal(everything(tmp_path / "whole"), everything(tmp_path / "killed"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_kill_while_writing_leaves_the_last_good_checkpoint(flags, tmp_path, call):
    out = tmp_path / "out"
    script = """import distill, os, signal, training
write = training.save_file
def save_file(weights, path):
    write(weights, path)
    if "checkpoint-4" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
training.save_file = save_file
distill.main()"""
    assert python("-c", script, *flags, "--output_dir", out).returncode == -9
    assert (out / "checkpoint-4.tmp").is_dir() and [p.name for p in training.checkpoints(out)] == ["checkpoint-2"]
    assert call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")[0] == 0
    assert [path.name for path in training.checkpoints(out)] == [
        "checkpoint-4",
        "checkpoint-6",
    ]  # and a total limit of 2


def test_the_same_seed_repeats_exactly_and_another_does_not(flags, tmp_path, call):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(distill.main, *flags, "--output_dir", tmp_path / name, "--seed", seed)[0] == 0
    a, b, c = (everything(tmp_path / name) for name in "abc")
    assert_equal(a, b)
    assert not torch.equal(a["s.last.weight"], c["s.last.weight"])


def test_micro_batches_and_processes_only_divide_the_work(flags, tmp_path, call):
    """Two processes with half the batch, and two micro-batches of half, are one process with all of it."""
    assert call(distill.main, *flags, "--output_dir", tmp_path / "one")[0] == 0
    half = [*flags, "--train_batch_size", 4]
    assert call(distill.main, *half, "--output_dir", tmp_path / "micro", "--gradient_accumulation_steps", 2)[0] == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = python(*launch, ROOT / "distill.py", *half, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    start, one = load_file(tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"), student(tmp_path / "one")
    for name in ("micro", "two"):
        other = student(tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
        for key in one:
            moved = (one[key] - start[key]).abs().max()
            assert moved > 1e-3  # the learning rate is 1e-3: without this, standing still would pass
            assert torch.allclose(one[key], other[key], atol=0.01 * moved), (name, key)


def test_processes_that_would_not_cooperate_are_refused(flags, tmp_path, call, monkeypatch):
    """torchrun without GPUs: some versions of accelerate see one process where the launcher has started two."""

    class Alone(training.Accelerator):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.setattr(training, "Accelerator", Alone)
    status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / "out")
    assert status == 2 and "ACCELERATE_USE_CPU" in one_line(err)


def test_a_checkpoint_of_another_configuration_is_refused_and_left_alone(flags, tmp_path, call):
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = [*flags, "--output_dir", out, "--resume_from_checkpoint"]
    status, _, err = call(distill.main, *again, "latest", "--k", 200)
    assert status == 2 and "k was 100 and is 200" in one_line(err)
    status, _, err = call(distill.main, *again, tmp_path / "teacher")
    assert status == 2 and "not a checkpoint" in one_line(err)
    status, _, err = call(distill.main, *flags, "--output_dir", out, "--seed", 1)
    assert status == 2 and "holds checkpoint-6 of an earlier run" in one_line(err)
    assert "--resume_from_checkpoint latest" in err and "--overwrite" in err  # both ways out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_the_same_command_twice_makes_its_results_again_and_overwrite_trains_anew(flags, tmp_path, call, caplog):
    """A finished run of the same flags is nothing to refuse; of other flags it is; --overwrite forgets it."""
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    first, trained = everything(out), (out / "metrics.jsonl").read_text()
    (out / "metrics.json").unlink()
    status, text, err = call(distill.main, *flags, "--output_dir", out)
    assert status == 0 and "--overwrite" in caplog.text and (out / "metrics.json").is_file(), err
    assert (out / "metrics.jsonl").read_text() == trained  # not a step was made
    assert call(distill.main, *flags, "--output_dir", out, "--seed", 1, "--overwrite")[0] == 0
    assert len(losses(out)) == 6 and losses(out) != [json.loads(line)["loss"] for line in trained.splitlines()]
    assert not torch.equal(everything(out)["s.last.weight"], first["s.last.weight"])


def test_overwrite_deletes_nothing_before_all_flags_are_known_to_be_good(flags, tmp_path, call, monkeypatch):
    out, fitted = tmp_path / "out", []
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    contradiction = ["--resume_from_checkpoint", out / "checkpoint-4"]
    for more in (["--kk", 3], ["--k", 7], ["--max_train_steps", 0], contradiction):
        status, _, err = call(distill.main, *flags, "--output_dir", out, "--overwrite", *more)
        assert status == 2 and str(more[0]) in one_line(err), err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(distill, "fit_or_load", lambda *arguments: fitted.append(arguments))
    for more in (["--kk", 3], ["--k", 7]):  # nor is a toy's teacher fitted anew
        assert call(distill.main, "--output_dir", out, "--overwrite", *more)[0] == 2
    assert not fitted


def test_the_default_folder_is_named_after_teacher_and_method(flags, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("sl", "lcm"):
        status, text, err = call(distill.main, *flags, "--ode", method)
        assert status == 0 and f"runs/teacher-{method}/overview.png" in text, err


def test_the_saved_student_is_the_average_and_the_average_is_that_of_the_online_network(flags, tmp_path, call):
    """Eq. 6's θ⁻: μ θ⁻ + (1 - μ) θ after each step, from the teacher's weights on; and it is what is exported."""
    out, mu = tmp_path / "out", 0.5
    more = ["--gamma_conditioning", "time", "--checkpointing_steps", 1, "--checkpoints_total_limit", 9]
    assert call(distill.main, *flags, *more, "--output_dir", out)[0] == 0
    average = load_file(tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors")
    for path in training.checkpoints(out):
        online, target = load_file(path / "model.safetensors"), load_file(path / "target.safetensors")
        for name in average:
            average[name] = mu * average[name] + (1 - mu) * online[f"network.{name}"]
            torch.testing.assert_close(average[name], target[f"network.{name}"], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(weight, target[f"network.{name}"]) for name, weight in student(out).items())
    assert not torch.equal(student(out)["last.weight"], online["network.last.weight"])


class Evil:
    """A pickle that leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(flags, tmp_path, call):
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    assert not list(out.rglob("unet/*.bin"))
    torch.save(Evil(tmp_path / "owned"), out / "checkpoint-6/optimizer.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert not (tmp_path / "owned").exists()


def test_tensorboard_gets_what_metrics_jsonl_gets(flags, tmp_path, call):
    assert call(distill.main, *flags, "--output_dir", tmp_path / "out", "--report_to", "tensorboard")[0] == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["learning_rate"] < lines[2]["learning_rate"] == pytest.approx(1e-3)  # two steps of warm-up
