"""The experiments: what they record, at what cost, that they repeat, and the measures of their own."""

import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, one_line, save, unet
from diffusers import DDPMScheduler
from safetensors.torch import save_file

import distill
import teacher
from evaluate import Classifier, wasserstein2
from experiments import __main__, bench, laboratory, table
from sample import SeededNoise, sample
from splam import Schedule, multiple_estimation
from toy.mlp import PointMLP


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    laboratory.bench_of.cache_clear()  # another test's teacher may have the same name


def quick(call, name, *flags) -> dict:
    status, out, err = call(__main__.main, name, "--quick", *flags)
    assert status == 0, err
    return json.loads(open(out.split()[-1]).read())


def test_all_variants_are_command_lines_and_all_experiments_are_explained():
    for name, experiment in table.EXPERIMENTS.items():
        assert re.search(rf"^ +{name}  ", table.__doc__, re.MULTILINE)
        for variant in experiment.variants.values():
            distill.parser().parse_args(variant.flags.split())
            teacher.parse(["--data", "toy:moons", *variant.teacher.split()])
    pickle.dumps(table.EXPERIMENTS)  # they go to other processes
    commands = re.findall(r"python -m experiments ([\w-]+)", (ROOT / "experiments/README.md").read_text())
    assert set(commands) - {"NAME"} <= set(table.EXPERIMENTS) and len(commands) > 5


@pytest.mark.parametrize("name", ["fig2a", "fig2b", "fig2c", "fig3", "appb", "symptoms", "decides-width"])
def test_an_experiment_records_what_it_compares(name, call, monkeypatch):
    monkeypatch.setattr(table, "GAMMAS", torch.tensor([1.0]))  # scipy's solver is slow
    only = [*table.EXPERIMENTS[name].variants][:: len(table.EXPERIMENTS[name].variants) - 1]  # the first and the last
    record = quick(call, name, "--only", *only)
    assert list(record["rows"]) == list(record["students"]) == list(record["summary"]) == only
    assert {"commit", "torch", "diffusers", "machine", "minutes", "command", "references"} <= record.keys()
    assert {path.suffix for path in laboratory.WORK.iterdir()} == {".json", ".png"}  # nothing else is left
    for variant, students in record["rows"].items():
        first, second = (rows[-1] for rows in students)
        assert {"W2, 1 step", "W2, 2 steps", "W2, 4 steps", "loss", "gradient norm"} <= first.keys()
        assert 0 < first["map error"] < first["map error, 95 %"] < (100 if name == "symptoms" else 10)
        assert 50 - first["evaluations"] / first["step"] < first["evaluations"] <= 50  # all cost the same, up to a step
        both = torch.tensor([first["map error"], second["map error"]])
        assert both[0] != both[1]
        assert record["summary"][variant]["map error"] == pytest.approx([both.mean().item(), both.std().item()])
    one, other = record["summary"].values()
    assert one["map error"] != other["map error"], "a change was not made"


def test_numbers_repeat_and_an_interrupted_call_goes_on(call, monkeypatch):
    only, done, distil = ["--only", "LCM, k = 100", "SL, half, k = 100"], [], laboratory.distil

    def interrupted(job):
        done.append(job)
        if len(done) == 3:
            raise KeyboardInterrupt
        return distil(job)

    record = quick(call, "tab3", *only)
    monkeypatch.setattr(laboratory, "distil", interrupted)
    assert call(__main__.main, "tab3", "--quick", *only)[0] == 130
    again = quick(call, "tab3", *only)
    assert len(done) == 3 + 2  # two were kept, the third begins anew
    assert again["rows"] == record["rows"] and again["references"] == record["references"]


def test_images_take_the_same_road(images, call, tmp_path):
    place, features = save(tmp_path / "teacher", unet(size=8)), tmp_path / "features.safetensors"
    save_file(Classifier(3).state_dict(), features, metadata={"classes": json.dumps(["cat", "ship", "truck"])})
    flags = ["--pretrained_teacher_model", place, "--data", images, "--features", features, "--mixed_precision", "no"]
    ((rows, _),) = quick(call, "fig2c", *flags, "--only", "LCM, k = 20", "--keep")["rows"].values()
    assert {"FD, 1 step", "FD, 4 steps", "map error", "f to its neighbour", "f to the end"} <= rows[-1].keys()
    assert teacher.load("runs/experiments/fig2c-quick/LCM-k-20").is_student


def test_bad_flags_end_in_one_line_and_status_2(call):
    bad = {"--seeds 1": "--seeds must be 2", "--only LCM": "LCM is none of LCM, k = 20", "--kk 20": "--kk"}
    bad |= {"--pretrained_teacher_model ideal:rings": "ideal:rings", "--max_train_steps 5": "--max_train_steps"}
    for flags, words in bad.items():
        status, _, err = call(__main__.main, "tab3", "--quick", *flags.split())
        assert status == 2 and words in one_line(err), err


@pytest.fixture
def place(tmp_path) -> laboratory.Bench:
    """Noises and their ends by an ideal teacher, whose network has seen nothing."""
    network = PointMLP(num_class_embeds=3, distribution="clouds", ideal=True)
    folder = save(tmp_path / "ideal", network, clip_sample=False)
    return laboratory.Bench(teacher.load(str(folder)), "ideal:clouds", 256, 2.0)


def test_the_measures_are_what_they_say(place):
    """The ends by scipy's solver, which knows no steps; the distances by samples that are made here."""
    model, noise = place.model, SeededNoise((2,), place.seeds, torch.device("cpu"))()
    exact = model.mixture.endpoint(noise, *model.schedule.at(torch.tensor([999]), 2), torch.tensor(place.labels), 2.0)
    assert (place.endpoint - exact).norm(dim=1).mean() < 2e-3 and set(place.labels) == {0, 1}
    student = model.student(model.network.state_dict(), 50)
    one, values = sample(student, range(256), 1), table.errors(place, student)
    distance = (one - exact).norm(dim=1)
    assert values["map error"] == pytest.approx(distance.mean().item(), rel=0.01)
    assert values["map error, 95 %"] == pytest.approx(distance.quantile(0.95).item(), rel=0.01)
    assert values["W2, 1 step"] == pytest.approx(wasserstein2(one, place.reference[:256]), rel=1e-6)
    assert values["RMS to the end"] == pytest.approx(distance.square().mean().sqrt().item(), rel=0.01)
    assert values["sum of neighbours"] == pytest.approx(sum(values["f to its neighbour"]))
    assert len(values["t"]) == len(values["f to the end"]) == len(values["f to its neighbour"])


def test_data_are_true_to_their_class_and_as_diverse_as_data(place):
    x, component = place.model.mixture.sample(20000, torch.Generator().manual_seed(0))
    labels = place.model.mixture.classes[component]
    for classes, scale, wanted in ((labels, 1, (0.84, 1)), (1 - labels, 1, (0.16, 1)), (labels, 2, (0.83, 2))):
        data = SimpleNamespace(model=place.model, labels=classes.tolist())
        assert table.fidelity_and_diversity(data, scale * x) == pytest.approx(wanted, abs=0.02)


def test_the_linear_sigma_is_the_right_one_where_ddim_couples_the_ends(place, monkeypatch):
    """Appendix B, in the ideal map's own words: with a Markov chain neither is."""
    monkeypatch.setattr(table, "GAMMAS", torch.tensor([0.5]))
    linear, markov = (table.residual(place.model, multiple_estimation, 20, form).item() for form in table.SIGMA_FORMS)
    assert linear < 0.1 * markov
    assert linear < 0.5 * table.residual(place.model, multiple_estimation, 100, "linear").item()
    assert all(table.residual(place.model, table.markov_estimation, 20, form) > 0.1 for form in table.SIGMA_FORMS)


def test_the_markov_coupling_takes_the_ancestral_steps_of_diffusers():
    oracle, generator = DDPMScheduler(clip_sample=False), torch.Generator().manual_seed(0)
    schedule, theirs = Schedule(oracle.alphas_cumprod), torch.randn((64, 2), generator=generator)

    def denoise(x, t):
        eps, (alpha, sigma) = x.sin(), schedule.at(t, x.ndim)
        return (x - sigma * eps) / alpha, eps

    t, s = torch.full((64,), 900), torch.full((64,), 600)
    torch.manual_seed(1)
    ours = table.markov_estimation(denoise, schedule, theirs, t, s, k=300, solver_step=100)
    oracle.set_timesteps(10)
    torch.manual_seed(1)
    for time in (900, 800, 700):
        theirs = oracle.step(theirs.sin(), time, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", ["--k 20", "--guidance_w 2", "--improved", "--guidance_w 2 --improved second_order"])
def test_the_cost_model_counts_the_networks_calls(flags, tmp_path):
    folder, calls = save(tmp_path / "teacher", PointMLP(num_class_embeds=9)), []
    command = f"--pretrained_teacher_model {folder} --output_dir {tmp_path}/out --max_train_steps 1 --lr_warmup_steps 0"
    args, model = distill.configure([*command.split(), *flags.split()])
    distillation = distill.Distillation(args, model)
    for network in (model.network, distillation.target.network, distillation.run.model.network):
        # A guided call of the teacher has both conditions in one batch; a backward pass counts as two.
        weight = 3 if network.training else 1
        network.first.register_forward_hook(lambda _, x, __, weight=weight: calls.append(weight * len(x[0])))
    list(distillation.steps())
    assert sum(calls) == bench.forward_passes(args) * args.train_batch_size


def test_the_bench_prints_steps_and_samples(tmp_path, call):
    folder = save(tmp_path / "teacher", PointMLP())
    status, out, err = call(bench.main, "--pretrained_teacher_model", folder, "--train_batch_size", 8)
    assert status == 0 and "samples/s" in out, err
    assert "cost model: 9 forward passes" in out and "a sample, student, 4 steps" in out and "commit" in out
