"""The paper's figures and tables as scripts: what they record, at what cost, and that they can be repeated."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import one_line, save, unet
from diffusers import DDPMScheduler
from PIL import Image

import distill
import toy.laboratory
from data import Points
from evaluate import wasserstein2
from sample import sample
from splam import Schedule
from teacher import load
from toy import (
    appb_sigma,
    fig2a_skip_size,
    fig2b_convergence,
    fig2c_error,
    fig3_guidance,
    symptoms,
    tab3_sl_vs_dl,
    what_decides,
)
from toy.laboratory import STEPS, Variant
from toy.mlp import PointMLP

SCRIPTS = "fig2a_skip_size fig2b_convergence fig2c_error fig3_guidance tab3_sl_vs_dl appb_sigma symptoms".split()
SCRIPTS += [f"what_decides {question}" for question in what_decides.SETTINGS]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick(call, script, *flags) -> dict:
    status, out, err = call(script.main, "--quick", *flags)
    assert status == 0, err
    name = out.split()[-1]
    with Image.open(name.replace(".json", ".png")) as picture:
        assert min(picture.size) > 100
    return json.loads(open(name).read())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_records_all_it_compares_and_its_flags(name, call):
    module, *question = name.split()
    script = importlib.import_module(f"toy.{module}")
    record = quick(call, script, *question)
    variants = what_decides.variants(*question) if question else script.VARIANTS
    assert list(record["rows"]) == list(variants) == list(record["students"]) == list(record["summary"])
    for variant, rows in record["rows"].items():
        assert {row["seed"] for row in rows} == {0, 1} and {row["variant"] for row in rows} == {variant}
        for row in rows:
            assert all(f"{measure}, {n} step{'s' * (n > 1)}" in row for measure in ("W2", "MMD") for n in STEPS)
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
            assert 0 < row["map error"] < row["map error, 95 %"] < (100 if name == "symptoms" else 10)
            assert row["loss"] > 0 and row["gradient norm"] > 0
        last = [[row["map error"] for row in rows if row["seed"] == seed][-1] for seed in (0, 1)]
        assert last[0] != last[1]
        mean, deviation = record["summary"][variant]["map error"]
        assert mean == pytest.approx(sum(last) / 2)
        assert deviation == pytest.approx(abs(last[0] - last[1]) / math.sqrt(2), rel=1e-4)
        args = distill.parser().parse_args([*record["all students"].split(), *record["students"][variant].split()])
        cost = distill.forward_passes(args)  # so all cost the same, up to a step
        assert rows[-1]["evaluations"] == cost * rows[-1]["step"]
        assert 50 - cost < rows[-1]["evaluations"] <= 50
    assert len({summary["map error"][0] for summary in record["summary"].values()}) == len(record["summary"]) > 4, (
        "two students are the same: a change was not made"
    )
    assert record["references"].keys() == {"held-out data", "teacher, PF-ODE"}


def test_two_steps_without_fresh_noise_are_two_steps_of_ddim():
    """For a student that is still its teacher. With fresh noise alone they are Eq. 19's two. The columns of `quality`
    have both."""
    teacher = load(str(save(Path("t"), PointMLP(width=16), clip_sample=False)))
    place = toy.laboratory.Bench(teacher, "toy:8gaussians", 1024, 0.0)
    student = teacher.student(teacher.network.state_dict(), 50)
    ddim = sample(teacher, place.seeds, 2, "ddim")
    assert place.sample(student, 2, eta=0.0, timesteps=(999, 499)) == pytest.approx(ddim, abs=1e-3)
    usual = sample(student, place.seeds, 2)
    assert place.sample(student, 2, timesteps=(999, 499)) == pytest.approx(usual, abs=1e-3)
    values = toy.laboratory.quality(place, student)
    assert values["W2, 2 steps"] == pytest.approx(place.distances(usual)["W2"], abs=1e-3)
    assert values["W2, 2 steps, η = 0"] == pytest.approx(place.distances(ddim)["W2"], abs=1e-3)
    half = place.distances(sample(student, place.seeds, 2, eta=0.5))["W2"]
    assert values["W2, 2 steps, η = 0.5"] == pytest.approx(half, abs=1e-6) != values["W2, 2 steps"]
    error = (ddim - place.endpoint).norm(dim=1).mean().item()
    assert values["map error, 2 steps, η = 0"] == pytest.approx(error, abs=1e-3)


def test_numbers_repeat_and_an_interrupted_script_goes_on(call, monkeypatch):
    only = ["--only", "LCM, k = 100", "SL, t', k = 100"]
    record, done = quick(call, tab3_sl_vs_dl, *only), []

    def interrupted(job):
        done.append(job)
        if len(done) == 3:
            raise KeyboardInterrupt
        return distil(job)

    def unpicturable(found):
        raise RuntimeError

    distil = toy.laboratory.distil
    monkeypatch.setattr(toy.laboratory, "distil", interrupted)
    assert call(tab3_sl_vs_dl.main, "--quick", *only)[0] == 130
    again = quick(call, tab3_sl_vs_dl, *only)
    assert len(done) == 3 + 2  # two were kept, the third begins anew
    assert again["rows"] == record["rows"] and again["references"] == record["references"]
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(tab3_sl_vs_dl, "picture", unpicturable)
        call(tab3_sl_vs_dl.main, "--quick", *only)
    assert len(done) == 3 + 2 + 4  # nothing was kept from what was finished
    quick(call, tab3_sl_vs_dl, *only)
    assert len(done) == 3 + 2 + 4  # but from what was not


@pytest.mark.parametrize(
    ("script", "question", "only"),
    [
        (fig2a_skip_size, [], "LCM + ME, k = 50"),
        (fig3_guidance, [], "SPLAM + ME, w = 2"),
        (what_decides, ["width"], "LCM: 16 units"),
    ],
)
def test_some_of_the_students_make_a_picture_too(script, question, only, call):
    assert list(quick(call, script, *question, "--only", only)["rows"]) == [only]


def test_the_wrong_teacher_is_made_only_for_the_student_that_needs_it(call):
    """It is trained in this process, in which accelerate allows one precision only: that of images is another."""
    for only in ("healthy", symptoms.WRONG):
        assert not symptoms.WRONG_TYPE.exists()
        assert list(quick(call, symptoms, "--only", only)["rows"]) == [only]
    assert load(str(symptoms.WRONG_TYPE)).prediction_type == "epsilon"


def test_gamma_is_drawn_and_embedded_as_said():
    assert what_decides.late_gamma((1000, 2), 1000, 50, torch.Generator()).gamma.min() > 0.5
    one = torch.ones(3)
    assert not what_decides.sharp_embedding(one).any() and not what_decides.large_embedding(one).any()


def test_curves_are_taken_along_one_training(call):
    """The last point of a curve is what a shorter road to it gives: the same student, measured once."""
    name = "LCM, k = 20"
    curve = quick(call, fig2b_convergence, "--only", name)["rows"][name]
    assert [row["step"] for row in curve if row["seed"] == 0] == [1, 2, 5, 10]
    short = quick(call, tab3_sl_vs_dl, "--only", name, "--max_train_steps", 5)["rows"][name]
    assert short[0]["map error"] == [row for row in curve if row["step"] == 5][0]["map error"]


def test_images_take_the_same_road(images, means, call, tmp_path):
    teacher = save(tmp_path / "teacher", unet(size=8))
    flags = ["--pretrained_teacher_model", teacher, "--data", images, "--features", means, "--mixed_precision", "no"]
    more = ["--only", "LCM, k = 20", "--save_samples", "--out", "there"]
    rows = quick(call, fig2c_error, *flags, *more)["rows"]["LCM, k = 20"]
    with Image.open("there-samples.png") as picture:  # two rows of eight images
        assert picture.size[1] > 2 * (picture.size[0] - 20) / 8
    assert {"FD, 1 step", "FD, 4 steps", "map error", "neighbours", "end"} <= set(rows[0])
    assert len(rows) == 2 and rows[0]["FD, 1 step"] > 0


@pytest.fixture
def job(tmp_path) -> toy.laboratory.Job:
    """256 samples of a student of one step."""
    toy.laboratory.WORK.mkdir(parents=True)
    flags = ["--output_dir", str(tmp_path), "--pretrained_teacher_model", "ideal:8gaussians", "--max_train_steps", "1"]
    teacher = ["--data", "ideal:8gaussians", "--max_train_steps", "1"]
    return toy.laboratory.Job("", Variant(), flags, teacher, [1], toy.laboratory.quality, 256, "", None, False)


@pytest.fixture
def bench(job) -> toy.laboratory.Bench:
    return toy.laboratory.prepare(job)[2]


def test_few_points_to_learn_from_are_as_many_to_be_measured_by(job):
    seen = []

    def dataset(data):
        seen.append(what_decides.few_points(data))
        return seen[-1]

    few = job._replace(variant=Variant(dataset=dataset), measure=lambda bench, _: {"points": len(bench.reference)})
    assert toy.laboratory.distil(few)[0]["points"] == 2**16
    assert [len(points) for points in seen] == [256, 256]  # the teacher's, and the student's
    whole = Points("ideal:8gaussians").samples[:256]
    assert all(torch.equal(points[list(range(256))][0], whole) for points in seen)


def test_the_map_error_is_the_distance_to_many_steps_of_the_teacher(bench):
    """By diffusers' DDIM, from the same noises; the student is an untrained one."""
    student = bench.model.student(bench.model.network.state_dict(), 50)
    one, many = sample(student, range(256), 1), sample(bench.model, range(256), 1000, "ddim")
    distance = (one - many).square().sum(1).sqrt()
    values = toy.laboratory.quality(bench, student)
    assert values["map error"] == pytest.approx(distance.mean().item(), rel=0.01)
    assert values["map error, 95 %"] == pytest.approx(distance.quantile(0.95).item(), rel=0.01)
    assert values["W2, 1 step"] == pytest.approx(wasserstein2(one, bench.reference[:256]), rel=1e-6)
    floor = bench.held_out_data()["W2"]
    assert floor == pytest.approx(wasserstein2(bench.reference[:256], bench.reference[-256:]), rel=0.3)


def test_the_linear_sigma_is_the_right_one_where_ddim_couples_the_ends(bench):
    """Appendix B, in the ideal map's own words: with a Markov chain neither is."""

    def left(coupling, sigma, solver_step=20):
        return max(appb_sigma.inconsistency(bench, coupling, sigma, 599, 100, solver_step))

    assert left("DDIM", "approx") < 0.1 * left("DDIM", "exact")
    assert left("DDIM", "approx") < 0.5 * left("DDIM", "approx", 100)
    assert left("Markov", "approx") > 0.3 and left("Markov", "exact") > 0.3


def test_the_markov_coupling_takes_the_ancestral_steps_of_diffusers():
    oracle, generator = DDPMScheduler(clip_sample=False), torch.Generator().manual_seed(0)
    schedule, x_t = Schedule(oracle.alphas_cumprod), torch.randn((64, 2), generator=generator)

    def denoise(x, t):
        eps, (alpha, sigma) = x.sin(), schedule.at(t, x.ndim)
        return (x - sigma * eps) / alpha, eps

    t, s = torch.full((64,), 900), torch.full((64,), 600)
    torch.manual_seed(1)
    ours = appb_sigma.markov_estimation(denoise, schedule, x_t, t, s, k=300, solver_step=100)
    oracle.set_timesteps(10)
    torch.manual_seed(1)
    theirs = x_t
    for time in (900, 800, 700):
        theirs = oracle.step(theirs.sin(), time, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_edited_source_never_meets_an_old_result(job, tmp_path, monkeypatch):
    """The key of a finished student changes with any source that made it, and with the file of any function it uses."""
    source, script = tmp_path / "splam.py", tmp_path / "ablation.py"
    source.write_text("k = 1")
    script.write_text("def late(*arguments):\n    return 1")
    monkeypatch.setattr(toy.laboratory, "SOURCES", [*toy.laboratory.SOURCES, source])
    monkeypatch.syspath_prepend(tmp_path)
    ablation = importlib.import_module("ablation")
    ablated, keys = job._replace(variant=Variant(parts={"draw": ablation.late})), []
    for file, text in ((source, "k = 1"), (source, "k = 2"), (script, "def late(*arguments):\n    return 2")):
        file.write_text(text)
        keys.append([toy.laboratory.key(job), toy.laboratory.key(ablated), toy.laboratory.teacher_key(job)])
    first, other_source, other_script = keys
    assert not set(first) & set(other_source)  # nothing that was made by other code is taken, a teacher neither
    assert other_source[0] == other_script[0] and other_source[1] != other_script[1]  # only what uses the script


def test_bad_flags_end_in_one_line_and_status_2(call):
    for flags, words in (
        (["--seeds", 1], "--seeds must be 2 or more"),
        (["--budget", 0], "--budget must be positive"),
        (["--quick", "--only", "LCM"], "LCM is none of LCM, k = 20"),
        (["--quick", "--pretrained_teacher_model", "ideal:rings"], "ideal:rings"),
        (["--quick", "--pretrained_teacher_model", "missing"], "missing"),
        (["--quick", "--ema_decay", 1], "--ema_decay"),
    ):
        status, _, err = call(tab3_sl_vs_dl.main, *flags)
        assert status == 2 and words in one_line(err), err
    status, _, err = call(tab3_sl_vs_dl.main, "--kk", 20)
    assert status == 2 and "--kk" in err
