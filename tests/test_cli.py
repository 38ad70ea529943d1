"""How the programs speak: one line for what is foreseen, a traceback for our own mistakes."""

import os
import signal

import pytest
import torch
from conftest import one_line, python

import cli


def failing(error: BaseException):
    @cli.program
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, words",
    [
        (cli.BadInput("--k is wrong"), 2, "test_cli.py: error: --k is wrong"),
        (PermissionError(13, "Permission denied", "x"), 1, "Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nuse"), 1, "CUDA out of memory"),
        (KeyboardInterrupt(), 130, "--resume_from_checkpoint latest"),
    ],
)
def test_what_is_foreseen_is_one_line(call, monkeypatch, error, status, words):
    code, _, err = call(failing(error))
    assert code == status and words in one_line(err)
    monkeypatch.setenv("SPLAM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        failing(error)()


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("ours")])  # what the foreseen ones are kinds of
def test_a_mistake_of_ours_keeps_its_traceback(error):
    """A typing error in splad_loss must not come out as bad input."""
    with pytest.raises(type(error)):
        failing(error)()


def test_sigterm_is_an_interruption(call):
    """What a cluster's scheduler sends before it kills."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a program without a handler goes on, and this test with it
    status, _, err = call(cli.program(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert status == 130 and "interrupted" in one_line(err)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.positive, ["1", "2147483647"], ["0", "-1", "1.5", "2147483648", "9" * 400, "many"]),
        (cli.count, ["0", "7"], ["-1", "1e3"]),
        (cli.two_or_more, ["2"], ["1", "0"]),
        (cli.amount, ["0", "1e-5"], ["-1e-3", "nan", "inf", "1e300", "fast"]),
        (cli.share, ["0", "0.95"], ["1", "-0.1", "nan"]),
        (cli.finite, ["-1", "8"], ["nan", "-inf", "1e300"]),
    ],
)
def test_numbers(kind, good, bad):
    parser = cli.Parser(prog="x")
    parser.add_argument("--flag", type=kind)
    for text in good:
        assert parser.parse_args([f"--flag={text}"]).flag == float(text)
    for text in bad:
        with pytest.raises(cli.BadInput, match="--flag must be "):
            parser.parse_args([f"--flag={text}"])


def test_flags_are_not_abbreviated():
    """--seed 7 in a laboratory script was taken for --seeds 7."""
    parser = cli.Parser(prog="x")
    parser.add_argument("--seeds")
    with pytest.raises(cli.BadInput, match="--seed"):
        parser.parse_args(["--seed", "7"])


def test_prompts_are_texts_or_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  a dog \n", encoding="utf-8")
    assert cli.read_prompts([str(file)]) == ["a cat", "a dog"]
    assert cli.read_prompts(["a cat.", "b.txt"]) == ["a cat.", "b.txt"]
    file.write_text("\n")
    with pytest.raises(cli.BadInput, match="no prompts"):
        cli.read_prompts([str(file)])


def test_places_for_results_are_refused_before_the_work(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "x.jpg", tmp_path / "folder.png"):
        with pytest.raises(cli.BadInput, match=r"ends in \.png"):
            cli.output_file(path, ".png")
    assert cli.output_file(tmp_path / "new" / "x.png", ".png").parent.is_dir()


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_record_that_a_person_edited_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(cli.BadInput, match="metrics.json"):
        cli.read_json(tmp_path / "metrics.json")


def test_help_waits_for_no_heavy_library_and_the_toy_for_few(tmp_path):
    """They take seconds. One process shows it of all programs, since what one has imported the next ones have too."""
    script = f"""import contextlib, sys, distill, evaluate, sample, teacher
def run(program, flags):
    sys.argv = ["program.py", *flags.split()]
    with contextlib.suppress(SystemExit):
        program.main()
few = {{'transformers', 'peft', 'webdataset', 'torchmetrics', 'torchvision'}}
for program in (distill, evaluate, sample, teacher):
    run(program, "--help")
assert not (loaded := {{'diffusers', *few}} & set(sys.modules)), loaded
short = "--max_train_steps 1 --lr_warmup_steps 0 --output_dir {tmp_path}/"
teacher.PointModel.many_steps = 2
run(teacher, f"--data toy:8gaussians {{short}}t")
run(distill, f"--pretrained_teacher_model {tmp_path}/t --num_eval_samples 16 {{short}}s")
assert not (loaded := few & set(sys.modules)), loaded"""
    done = python("-c", script)
    assert done.returncode == 0 and (tmp_path / "s/metrics.json").is_file(), done.stderr
    assert done.stdout.count("usage: ") == 4 and "--k 100 --guidance_w 3 --metric huber" in done.stdout  # the presets
