"""Long runs: resumed after a kill, on several processes, in several micro-batches - always the same run."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, killed_at, losses, one_line, python, save
from safetensors import SafetensorError
from safetensors.torch import load_file

import distill
import teacher
import training
from toy.mlp import PointMLP


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """A 2-D distillation of 6 steps from a small random teacher. Few points in its picture, which takes longest."""
    monkeypatch.setattr(distill, "preview", lambda model: (32, 8))
    monkeypatch.setattr(teacher.PointModel, "many_steps", 20)
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
    micro = ["--output_dir", tmp_path / "micro", "--checkpointing_steps", 3, "--gradient_accumulation_steps", 2]
    assert call(distill.main, *half, *micro)[0] == 0
    # Resumed, a step may be cut otherwise than it was before.
    quarter = [
        *flags,
        "--train_batch_size",
        2,
        "--gradient_accumulation_steps",
        4,
        "--output_dir",
        tmp_path / "quarter",
    ]
    status, _, err = call(distill.main, *quarter, "--resume_from_checkpoint", tmp_path / "micro/checkpoint-3")
    assert status == 0 and losses(tmp_path / "quarter") == pytest.approx(losses(tmp_path / "one")[3:], rel=1e-3), err
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
    # A preset counts by the flags that it stands for.
    status, _, err = call(distill.main, *again, "latest", "--preset", "improved")
    assert status == 2 and "solver was ddim" in err and "preset" not in one_line(err)
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
    configuration = json.loads((out / "checkpoint-6/configuration.json").read_text())
    configuration["files"]["optimizer.bin"] = (out / "checkpoint-6/optimizer.bin").stat().st_size
    (out / "checkpoint-6/configuration.json").write_text(json.dumps(configuration))
    status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert status == 2 and re.search("[Ww]eights", one_line(err)), err
    assert not (tmp_path / "owned").exists()


def unchanged(folder: Path) -> dict[Path, tuple[int, int]]:
    """What lies in the folder, to be compared with what lies there later."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "torn": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(b"\xff" * file.stat().st_size),
}
FILES = ["model.safetensors", "target.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]


def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_another(flags, tmp_path, call):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", whole)[0] == 0
    cases = [(file, name, damage) for file in [*FILES, "configuration.json"] for name, damage in DAMAGES.items()]
    for text in ("[]", "{}", '{"step": 6}', (whole / "checkpoint-6/configuration.json").read_text() + "}"):
        cases.append(("configuration.json", text, lambda file, text=text: file.write_text(text)))
    for file, name, damage in cases:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        damage(out / "checkpoint-6" / file)
        before = unchanged(out)
        status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
        assert status == 2 and f"cannot resume from {out}/checkpoint-6: " in one_line(err), (file, name, err)
        assert f"--resume_from_checkpoint {out}/checkpoint-4 goes on" in err, (file, name, err)
        # Garbage of the right length is found by the reader of its format, which does not know the file's name.
        assert file in FILES and name == "garbage" or file in err or "not a checkpoint" in err, (file, name, err)
        assert before == unchanged(out), (file, name)
    again = ["--output_dir", out, "--resume_from_checkpoint", out / "checkpoint-4"]
    assert call(distill.main, *flags, *again)[0] == 0
    assert_equal(everything(out), everything(whole))
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-6/optimizer.bin").unlink()
    status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert status == 2 and "there is no other" in one_line(err)


def test_checkpoints_of_a_run_that_was_left_do_not_outlive_the_new_ones(flags, tmp_path, call):
    """The last one is damaged, and the run goes on from the one before. What it writes then is the latest."""
    every = [*flags, "--checkpointing_steps", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(distill.main, *every, "--output_dir", whole, "--checkpoints_total_limit", 3)[0] == 0
    shutil.copytree(whole, out)
    (out / "checkpoint-6/model.safetensors").write_bytes(b"torn")
    again = [*every, "--output_dir", out, "--checkpoints_total_limit", "1"]
    killed = python("-c", killed_at(6), *again, "--resume_from_checkpoint", f"{out}/checkpoint-4")
    assert killed.returncode == -9
    assert [path.name for path in training.checkpoints(out)] == ["checkpoint-5"]
    assert call(distill.main, *again, "--resume_from_checkpoint", "latest")[0] == 0
    assert_equal(everything(out), everything(whole))


def test_a_model_whose_checkpoints_are_gone_is_not_replaced_unasked(flags, tmp_path, call):
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    for checkpoint in training.checkpoints(out):
        shutil.rmtree(checkpoint)
    before = unchanged(out)
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        status, _, err = call(distill.main, *flags, "--seed", 1, "--output_dir", out, *more)
        assert status == 2 and "holds model_index.json of an earlier run: --overwrite" in one_line(err), err
    # Nor by a run that begins from another folder's checkpoint.
    assert call(distill.main, *flags, "--output_dir", tmp_path / "other")[0] == 0
    begins = ["--resume_from_checkpoint", tmp_path / "other/checkpoint-4"]
    status, _, err = call(distill.main, *flags, "--output_dir", out, *begins)
    assert status == 2 and "of an earlier run" in one_line(err), err
    folder = flags[1]
    status, _, err = call(distill.main, *flags, "--output_dir", folder, "--overwrite")
    assert status == 2 and "the teacher's own folder" in one_line(err), err
    assert before == unchanged(out) and not teacher.load(folder).is_student
    assert call(distill.main, *flags, "--output_dir", out, "--overwrite")[0] == 0


def test_processes_that_begin_at_different_steps_are_refused(flags, tmp_path, call, monkeypatch):
    """As on machines that share no disk: only one of them finds the checkpoint."""
    monkeypatch.setattr(training, "gather_object", lambda steps: [4, *steps])
    status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / "out")
    assert status == 2 and "begin at steps [4, 0]" in one_line(err), err


def test_a_checkpoint_may_have_any_name(flags, tmp_path, call):
    assert call(distill.main, *flags, "--output_dir", tmp_path / "whole")[0] == 0
    copy = shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "checkpoint-5000")
    status, _, err = call(distill.main, *flags, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", copy)
    assert status == 0, err
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")[4:]
    assert_equal(everything(tmp_path / "out"), everything(tmp_path / "whole"))


@pytest.mark.parametrize("kept", [[], ["checkpoint-4"], ["checkpoint-4", "checkpoint-6"]])
def test_after_a_resume_the_log_has_each_step_once(flags, tmp_path, call, kept):
    """Also where no checkpoint was reached, and where the last line was torn or is no text at all."""
    out = tmp_path / "out"
    assert call(distill.main, *flags, "--output_dir", out)[0] == 0
    log = (out / "metrics.jsonl").read_bytes()
    for path in training.checkpoints(out):
        if path.name not in kept:
            shutil.rmtree(path)
    (out / "model_index.json").unlink()  # the run did not reach its end
    (out / "metrics.jsonl").write_bytes(
        log + b'{"step": 7, "loss": 0.1}\n' + b'{"step": 1\n' + b'\xff\0{"step": 8, "lo'
    )
    status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert status == 0 and (out / "metrics.jsonl").read_bytes() == log, err


def last_line(err: str) -> str:
    """The one line that stands below the progress bar of a run that had begun."""
    return one_line("\n".join(line for line in err.split("\n") if "step/s" not in line and "s/step" not in line))


@pytest.mark.parametrize(
    "warm_up, words",
    [
        (0, "step 2: the loss is nan, and nothing of this step was saved; --resume_from_checkpoint latest goes on"),
        (1, "step 3: the loss is nan, and nothing of this step was saved; --resume_from_checkpoint latest goes on"),
        (None, "step 1: weights are no longer finite, and nothing of this step was saved; there is no checkpoint yet"),
    ],
)
def test_a_run_that_diverges_ends_before_anything_of_it_is_saved(flags, tmp_path, call, monkeypatch, warm_up, words):
    """By a learning rate that is far too large, which is 0 in the first step of a warm-up; or by a gradient that is
    not finite: the loss, which comes before it, is."""
    out = tmp_path / "out"
    if warm_up is None:

        def overflow(accelerator, parameters, norm):
            for parameter in parameters:
                parameter.grad.fill_(math.inf)
            return torch.tensor(math.inf)

        monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", overflow)
    more = ["--learning_rate", 1e30, "--checkpointing_steps", 1, "--lr_warmup_steps", warm_up or 0, "--output_dir", out]
    status, _, err = call(distill.main, *flags, *more)
    assert status == 2 and words in last_line(err), err
    named = re.search(r"goes on from (\S+),", err)
    assert [str(path) for path in training.checkpoints(out)][-1:] == ([named[1]] if named else [])
    assert all(math.isfinite(loss) for loss in losses(out)) and not (out / "model_index.json").exists()
    if warm_up is None:  # JSON has no infinity
        assert json.loads((out / "metrics.jsonl").read_text())["grad_norm"] is None


def start(script: str, *arguments) -> subprocess.Popen:
    """A process of its own that can be read from and written to."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, text=True, env=environment, cwd=ROOT, preexec_fn=listening, **pipes)


TELLS = """import distill, training
log = training.Run.log
def log_and_tell(run, step, loss):
    log(run, step, loss)
    print(step, flush=True)
    {then}
training.Run.log = log_and_tell
distill.main()"""


def test_a_folder_takes_one_run_at_a_time(flags, tmp_path, call):
    """While a run is held up in its third step nobody else may begin there. A killed one leaves nothing to wait for,
    although its data workers outlive it."""
    out = tmp_path / "out"
    held = "step == 3 and input()"
    first = start(TELLS.format(then=held), *flags, "--output_dir", out, "--dataloader_num_workers", 1)
    while first.stdout.readline() not in ("3\n", ""):
        pass
    assert first.poll() is None, first.stderr.read()
    before = unchanged(out)
    refit = ["--overwrite", "--pretrained_teacher_model", "toy:8gaussians"]  # whose teacher would be fitted in there
    for more in ([], ["--overwrite"], refit, ["--resume_from_checkpoint", "latest"]):
        status, _, err = call(distill.main, *flags, "--output_dir", out, *more)
        assert status == 2 and f"another run is writing to {out}" in one_line(err), err
    assert before == unchanged(out)
    first.kill()
    first.wait()
    status, _, err = call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert status == 0 and len(losses(out)) == 6, err
    assert call(distill.main, *flags, "--output_dir", out, "--overwrite")[0] == 0  # one process may come again


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_leaves_whole_checkpoints(flags, tmp_path, call, monkeypatch, sent):
    """At whatever moment it comes: a checkpoint is being written most of the time."""
    more = ["--output_dir", tmp_path, "--checkpointing_steps", 1, "--max_train_steps", 10**6]
    run = start(TELLS.format(then=""), *flags, *more)
    while run.stdout.readline() not in ("7\n", ""):
        pass
    run.send_signal(sent)
    out, err = run.communicate()
    assert run.returncode == 130 and "interrupted, and nothing more was saved" in last_line(err), err
    assert "--resume_from_checkpoint latest" in last_line(err)
    last = training.checkpoints(tmp_path)[-1]
    assert int(last.name.removeprefix("checkpoint-")) >= 6

    def interrupt(run, step, loss):
        assert f"checkpoint-{step - 1}" == last.name
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "log", interrupt)
    for path in training.checkpoints(tmp_path):
        last = path
        status, _, err = call(distill.main, *flags, *more, "--resume_from_checkpoint", path)
        assert status == 130 and "interrupted" in last_line(err), err


@pytest.mark.parametrize(
    "owner, writer, error, reason",
    [
        (training, "save_file", SafetensorError("I/O error: No space left\n(os error 28)"), "I/O error: No space left"),
        (training, "save_file", OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (torch, "save", RuntimeError("PytorchStreamWriter failed writing file\nframe #0"), "failed writing file"),
        (Path, "write_text", PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
        (teacher.PointModel, "write", SafetensorError("No space left"), "No space left"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_spoils_nothing(
    flags, tmp_path, call, monkeypatch, owner, writer, error, reason
):
    """Each library has an error of its own for a full disk."""
    out = tmp_path / "out"
    write, place = getattr(owner, writer), "pipeline.tmp" if writer == "write" else "checkpoint-4.tmp"

    def failing(*arguments, **options):
        if any(place in str(argument) for argument in arguments):
            raise error
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, writer, failing)
        status, _, err = call(distill.main, *flags, "--output_dir", out)
    where = out if writer == "write" else out / place
    assert status == 1 and f"cannot write {where}: " in last_line(err) and reason in last_line(err), err
    assert "--resume_from_checkpoint latest" in err and not (out / "model_index.json").exists()
    assert [p.name for p in training.checkpoints(out)][-1] == ("checkpoint-6" if where == out else "checkpoint-2")
    assert call(distill.main, *flags, "--output_dir", out, "--resume_from_checkpoint", "latest")[0] == 0
    assert len(losses(out)) == 6 and teacher.load(str(out)).is_student


# Children that die before their n-th change of a folder's files, for every n-th in a row of numbers, until one of them
# gets to its end. They are forked when all is imported, or each would need seconds.
DYING = """
import os, shutil, sys
from pathlib import Path
import diffusers.optimization, distill, teacher
from safetensors.torch import load_file

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

def dies(n, folder, action):
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 99)
        return status == 99
    def hook(event, arguments):
        nonlocal n
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # rmtree names files without their folder
        if (writes or event in CHANGES) and (str(folder) in str(arguments[0]) or os.sep not in str(arguments[0])):
            n -= 1
            if n == 0:
                os._exit(99)
    sys.addaudithook(hook)
    action()
    os._exit(0)
"""
# From 3 on: before that there is not even a folder. Without the picture, which takes longer than all the rest.
KILLED_RUNS = """
distill.finish, n = lambda args, model, student, *rest: teacher.save(student, out), 3
model = teacher.load(sys.argv[3])
model.student(model.network.state_dict(), 50)  # for the imports that are made on first use
def run(*more):
    sys.argv = ["distill.py", *sys.argv[2:], "--output_dir", str(out), *more]
    distill.main()
while dies(n, out := Path(sys.argv[1]) / f"{n:03d}", run):
    assert not dies(0, out, lambda: run("--resume_from_checkpoint", "latest"))
    n += 5
"""
KILLED_SAVES = """
folder, n = Path(sys.argv[1]), 1
names = [folder / name for name in ("old", "new")]
old, new = ((load_file(name / "unet/diffusion_pytorch_model.safetensors"), teacher.load(str(name))) for name in names)
def whole(model):
    weights, wanted = model.network.state_dict(), {m.prediction_type: w for w, m in (old, new)}[model.prediction_type]
    return all(weights[name].equal(wanted[name]) for name in wanted)
found = []
while dies(n, out := folder / f"out{n}", lambda: teacher.save(new[1], shutil.copytree(names[0], out))):
    if (out / "model_index.json").exists():
        found.append(teacher.load(str(out)).prediction_type)
        assert whole(teacher.load(str(out))), n
    teacher.save(new[1], out)
    assert teacher.load(str(out)).prediction_type == new[1].prediction_type and not (out / "pipeline.tmp").exists()
    n += 1
print(n, *found)
"""


def test_a_run_killed_before_any_change_of_its_files_ends_as_if_it_had_not_been(flags, tmp_path):
    done = python("-c", DYING + KILLED_RUNS, tmp_path / "out", *flags, "--checkpoints_total_limit", 1)
    assert done.returncode == 0, done.stderr
    *killed, whole = sorted((tmp_path / "out").iterdir())
    assert len(killed) > 10
    for out in killed:
        assert_equal(everything(out), everything(whole))
        assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
        assert not teacher.load(str(out)).network.training


def test_a_folder_that_is_replaced_never_looks_finished_when_it_is_not(tmp_path):
    for seed, kind in enumerate(("epsilon", "v_prediction")):
        torch.manual_seed(seed)
        save(tmp_path / ("old", "new")[seed], PointMLP(width=16, depth=1), kind, clip_sample=False)
    done = python("-c", DYING + KILLED_SAVES, tmp_path)
    assert done.returncode == 0, done.stderr
    n, *found = done.stdout.split()
    assert int(n) > 12 and found == sorted(found) and {*found} == {"epsilon", "v_prediction"}


def test_tensorboard_gets_what_metrics_jsonl_gets(flags, tmp_path, call):
    assert call(distill.main, *flags, "--output_dir", tmp_path / "out", "--report_to", "tensorboard")[0] == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["learning_rate"] < lines[2]["learning_rate"] == pytest.approx(1e-3)  # two steps of warm-up


def test_the_gradient_norm_is_logged_as_it_was_before_it_was_limited(flags, tmp_path, call):
    """AdamW's first moment is a tenth of the first gradient; it got what was left of it."""
    norms = {}
    for limit in (1e-3, 100.0):
        out, more = tmp_path / str(limit), ["--max_train_steps", 1, "--max_grad_norm", limit]
        assert call(distill.main, *flags, *more, "--output_dir", out)[0] == 0
        moments = torch.load(out / "checkpoint-1/optimizer.bin", weights_only=True)["state"].values()
        used = 10 * torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm()
        norms[limit] = json.loads((out / "metrics.jsonl").read_text())["grad_norm"]
        assert used.item() == pytest.approx(min(norms[limit], limit), rel=1e-3)
    assert 1e-2 < norms[1e-3] == norms[100.0] < 100
