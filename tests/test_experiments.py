"""The experiments: what they record, at what cost, that they repeat, and the measures of their own."""

import json
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line, save, unet
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from safetensors.torch import save_file
from scipy.stats import ttest_rel

import distill
import teacher
from evaluate import Classifier, print_rows, provenance, wasserstein2
from experiments import __main__, bench, laboratory, table, verdict
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
        # A name is also that of the file in which its student is found after an interruption.
        assert len({laboratory.slug(variant) for variant in experiment.variants}) == len(experiment.variants)
    pickle.dumps(table.EXPERIMENTS)  # they go to other processes
    commands = re.findall(r"python -m experiments ([\w-]+)", (ROOT / "experiments/README.md").read_text())
    assert set(commands) - {"NAME"} <= set(table.EXPERIMENTS) and len(commands) > 5


@pytest.mark.parametrize("name", ["fig2c", "fig3", "appb", "symptoms", "decides-width"])
def test_an_experiment_records_what_it_compares(name, call):
    only = [*table.EXPERIMENTS[name].variants][:: len(table.EXPERIMENTS[name].variants) - 1]  # the first and the last
    torch.set_num_threads(2)
    provenance.cache_clear()
    record = quick(call, name, "--only", *only)
    assert torch.cuda.is_available() or record["machine"] == "CPU, threads: 1"  # how each student was trained
    assert list(record["rows"]) == list(record["students"]) == list(record["summary"]) == only
    assert {"commit", "torch", "diffusers", "machine", "minutes", "command", "references"} <= record.keys()
    assert {path.suffix for path in laboratory.WORK.iterdir()} == {".json", ".png"}  # nothing else is left
    for variant, students in record["rows"].items():
        first, second = (rows[-1] for rows in students)
        assert {"W2, 1 step", "W2, 2 steps", "W2, 4 steps", "loss", "gradient norm"} <= first.keys()
        assert 0 < first["map error"] < (100 if name == "symptoms" else 10)
        assert (first["map error"] > 5) == (variant == "wrong prediction type")  # as only a misread teacher's is
        assert 50 - first["evaluations"] / first["step"] < first["evaluations"] <= 50  # all cost the same, up to a step
        both = torch.tensor([first["map error"], second["map error"]])
        assert both[0] != both[1]
        assert record["summary"][variant]["map error"] == pytest.approx([both.mean().item(), both.std().item()])
    one, other = record["summary"].values()
    assert one["map error"] != other["map error"], "a change was not made"


@pytest.mark.parametrize("commit, kept", [("abc1234", 2), ("abc1234-dirty", 0)])
def test_numbers_repeat_and_an_interrupted_call_goes_on(commit, kept, call, monkeypatch):
    """With the same code. What was not committed may have been other code."""
    known = {"commit": commit, "torch": "", "diffusers": "", "machine": ""}
    monkeypatch.setattr(laboratory, "provenance", lambda: known)
    only, begun, draw = ["--only", "LCM, k = 100", "SL, half, k = 100"], [], distill.Distillation

    def interrupted(*arguments, **parts):
        begun.append(arguments)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **parts)

    record = quick(call, "tab3", *only)
    monkeypatch.setattr(distill, "Distillation", interrupted)
    assert call(__main__.main, "tab3", "--quick", *only)[0] == 130
    again = quick(call, "tab3", *only)
    assert len(begun) == 3 + 4 - kept  # the third begins anew
    assert again["rows"] == record["rows"] and again["references"] == record["references"]
    # Another command finds nothing of this one's.
    begun.clear()
    assert call(__main__.main, "tab3", "--quick", *only)[0] == 130
    begun.clear()
    assert call(__main__.main, "tab3", "--quick", *only, "--guidance_w", "0")[0] == 130 and len(begun) == 3


def test_images_take_the_same_road(images, call, tmp_path):
    place, features = save(tmp_path / "teacher", unet(size=8)), tmp_path / "features.safetensors"
    save_file(Classifier(3).state_dict(), features, metadata={"classes": json.dumps(["cat", "ship", "truck"])})
    flags = ["--pretrained_teacher_model", place, "--data", images, "--features", features, "--mixed_precision", "no"]
    ((rows, _),) = quick(call, "fig2c", *flags, "--only", "LCM, k = 20")["rows"].values()
    assert {"FD, 1 step", "FD, 4 steps", "map error", "f to its neighbour", "f to the end"} <= rows[-1].keys()


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
    assert values["W2, 1 step"] == pytest.approx(wasserstein2(one, place.reference[:256]), rel=1e-6)
    assert values["RMS to the end"] == pytest.approx(distance.square().mean().sqrt().item(), rel=0.01)
    assert values["sum of neighbours"] == pytest.approx(sum(values["f to its neighbour"]))
    assert len(values["t"]) == len(values["f to the end"]) == len(values["f to its neighbour"])


def test_the_errors_are_between_diffusers_predictions_at_neighbours(tmp_path, monkeypatch):
    model = teacher.load(str(save(tmp_path / "model", unet())))
    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    (x0, noise, end), f = torch.randn(3, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    states = {t: scheduler.add_noise(x0, noise, torch.tensor([t])) for t in (399, 379, 119)}
    for t, x in states.items():
        with torch.no_grad():
            f[t] = scheduler.step(model.network(x, t).sample, t, x).pred_original_sample
    monkeypatch.setattr(table, "TIMES", list(states))
    monkeypatch.setattr(table, "trajectories", lambda _: list(states.values()))
    monkeypatch.setattr(table, "quality", lambda *_: {})
    values = table.errors(SimpleNamespace(labels=[0] * 5, endpoint=end), model)
    pairs = (399, f[379]), (379, f[119]), (399, end), (379, end)
    wanted = [(f[t] - other).flatten(1).norm(dim=1).square().mean().sqrt().item() for t, other in pairs]
    assert values["f to its neighbour"] + values["f to the end"] == pytest.approx(wanted, rel=1e-3)


def test_the_trajectories_lead_to_the_end_that_scipy_finds(place, monkeypatch):
    """Guided, as the ends of `place` are."""
    monkeypatch.setattr(table, "TIMES", [999, 500, 100, 20, 0])
    table.trajectories.cache_clear()
    model, labels = place.model, torch.tensor(place.labels)
    noise, *_ = states = table.trajectories(place)
    end = model.mixture.endpoint(noise, *model.schedule.at(torch.tensor([999]), 2), labels, 2.0)
    distances = [(x - end).norm(dim=1).mean() for x in states]
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.3 and distances[-1] < 0.01


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


@pytest.mark.parametrize("flags", ["--k 20", "--guidance_w 2", "--guidance_w 2 --improved second_order"])
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


# -- the verdict ------------------------------------------------------------------------------------------------------

ERRORS = st.lists(st.tuples(*[st.floats(0.01, 100)] * 2), min_size=3, max_size=6, unique_by=lambda ab: ab[0] / ab[1])
OPPOSITE = {"ahead": "behind", "behind": "ahead", "level": "level"}


@given(ERRORS)
def test_the_rule_is_the_paired_t_test_and_the_same_for_both_sides(pairs):
    """By scipy's other form of the test, which is asked for a p value. To exchange A and B exchanges the words."""
    a, b = zip(*pairs, strict=True)
    ours, exchanged = verdict.judge(a, b), verdict.judge(b, a)
    p = ttest_rel(np.log(a), np.log(b)).pvalue
    assume(abs(p - 0.05) > 1e-6)
    assert (ours.word == "level") == (p > 0.05) and ours.word == OPPOSITE[exchanged.word]
    assert ours.word == "level" or (ours.word == "ahead") == (np.prod(np.divide(a, b)) < 1)
    assert [1 / exchanged.mean, 1 / exchanged.high] == pytest.approx([ours.mean, ours.low])


def rows_of(values, late):
    """A student's rows, seed by seed. The last row is `late` times what the others are."""
    for x in values:
        errors = {1: x, 4: x, 8: late * x}.items()
        yield [{"step": n, "W2, 2 steps": 9 * e, "W2, 4 steps": e, "map error": 2 / e} for n, e in errors]


def test_claims_are_decided_from_the_records(tmp_path, monkeypatch):
    """Pairs by seed, after a part of the training; quotients; by all measures, some, or none."""
    a, b = rows_of([1, 1.1, 1.2, 50], late=1), rows_of([2.1, 2.2, 2.4], late=0.1)
    (tmp_path / "one.json").write_text(json.dumps({"rows": {"A": [*a], "B": [*b]}}))
    ones, twos = ([[{"step": 1, "FD, 4 steps": x}]] * 2 for x in (1, 2))
    (tmp_path / "two-tiny-sd.json").write_text(json.dumps({"rows": {"A": ones, "B": twos}}))
    monkeypatch.setattr(verdict, "RESULTS", tmp_path)

    def words(says, a, b, record="one", **options):
        claim = verdict.Claim("Table 9", "A {} B", says, a, b, record, **options)
        found = [verdict.decide(claim, measure) for measure in verdict.MEASURES]
        return [each.word for each in found if each], verdict.holds(claim)

    assert words("ahead of", "A", "B") == (["ahead", "behind"], "partly")
    assert words("ahead of", "A", "B", after=1 / 2) == (["behind", "ahead"], "partly")
    assert words("ahead of", "A", "B", a_steps="2 steps") == (["behind"], "no")
    assert words("behind", "B", "A", measure="W2, 4 steps") == (["ahead"], "no")
    assert words("not behind", "B", "A", measure="W2, 4 steps") == (["ahead"], "yes")
    assert words("level with", "A / A", "B / B") == (["level", "level"], "not contradicted")
    assert words("ahead of", "A", "C") == ([], "not tested")
    assert words("ahead of", "A", "B", "two") == (["too few seeds"], "too few seeds")
    claim = verdict.Claim("Table 9", "", "ahead of", "A / B", "B / A", "one", "W2, 4 steps")
    assert verdict.decide(claim, "2-D, W2").ratios == pytest.approx([(1 / 0.21) ** 2, 5**2, 5**2])


def test_the_chapter_says_what_the_records_say_and_nothing_by_hand():
    """The tables are the program's, and no word of the rule stands below them. A misspelt student would be untested;
    and so would one of another name than an experiment gives it now, when that has been repeated."""
    chapter = (ROOT / "experiments/README.md").read_text()
    assert verdict.table("The paper", verdict.PAPER) in chapter
    assert verdict.table("This project", verdict.OURS) in chapter
    assert not re.search(r"\b(ahead|behind|level)\b", chapter[chapter.index("## How to read this") :])
    for claim in [*verdict.PAPER, *verdict.OURS]:
        assert verdict.holds(claim) != "not tested"
        students = {part for side in (claim.a, claim.b) for part in side.split(" / ")}
        assert students <= table.EXPERIMENTS[claim.record].variants.keys()


def test_the_readmes_numbers_are_those_of_the_record(capsys):
    """What `make` prints is the record's first run; the table is of its nine."""
    readme, record = ((ROOT / name).read_text() for name in ("README.md", "experiments/results/toy.json"))
    runs = json.loads(record)
    print_rows(runs["sl-0"]["rows"])
    assert capsys.readouterr().out + runs["sl-0"]["reference"] in readme
    for label, way, sampler in (
        ("teacher, DDIM", "sl", "teacher, DDIM"), ("student, the paper's method", "sl", "student"),
        ("student, `--improved`", "improved", "student"), ("LCM", "lcm", "student"),
    ):  # fmt: skip
        seeds = [[row for row in runs[f"{way}-{seed}"]["rows"] if row["sampler"] == sampler] for seed in range(3)]
        cells = re.search(rf"^\| {re.escape(label)}.*?\| (.*) \|$", readme, re.MULTILINE)[1].split(" | ")
        for cell, (column, n) in zip(cells, [("W2", 1), ("W2", 2), ("W2", 4), ("map error", 1)], strict=True):
            found = torch.tensor([row[column] for rows in seeds for row in rows if row["steps"] == n])
            assert cell == f"{found.mean():.3f} ± {found.std():.3f}" and len(found) == 3


@pytest.mark.parametrize("name, digits", [("cifar10", 2), ("cifar10-judge", 1)])
def test_the_tables_of_cifar10_are_those_of_their_records(name, digits):
    """Mean and deviation of FD, where there are several seeds, and of our classifier the mean accuracy."""
    _, page = (ROOT / "docs/images.md").read_text().split(f"(record `{name}`) |")
    rows = json.loads((ROOT / f"experiments/results/{name}.json").read_text())["rows"]
    for label, sampler in (
        ("teacher, DDIM", "teacher, DDIM"),
        ("**student**, `--improved`", "weights/cifar10-student|runs/cifar10-improved-2400-."),
        ("`--improved`, 1,200", "runs/cifar10-improved-1200-."),
        ("LCM, ", "runs/cifar10-lcm-2400-."),
        ("the paper's recipe", "runs/cifar10-paper-2400-."),
    ):
        line = re.search(rf"^\| {re.escape(label)}.*$", page, re.MULTILINE)[0]
        for cell, n in zip(line.split("|")[2:-1], (1, 2, 4, 50), strict=True):
            found = [row for row in rows if re.fullmatch(sampler, row["sampler"]) and row["steps"] == n]
            fd, right = (torch.tensor([row.get(key, -1) for row in found]) for key in ("FD", "prompt accuracy"))
            spread = f"±{fd.std():.{digits}f}" if len(found) > 1 else ""
            accuracy = f", {right.mean():.0%}" if name == "cifar10" else ""
            assert cell.strip() == (f"{fd.mean():.{digits}f}{spread}{accuracy}" if found else "")


def test_the_tables_of_text_to_image_are_those_of_their_records():
    """By w, FD and accuracy; and the students of Table 3, whose k is 100 where none is written."""
    page, records = (ROOT / "docs/images.md").read_text(), ROOT / "experiments/results"
    _, by_w = page.split("(record `tiny-sd`) |")
    runs = json.loads((records / "tiny-sd.json").read_text())
    assert by_w.splitlines()[0] == "".join(f" {run} |" for run in runs)
    for label, sampler, n in (
        ("teacher, 50 steps", "teacher, DDIM", 50), ("teacher, 4 steps", "teacher, DDIM", 4),
        ("**student**, 1 step", "student", 1), ("2 steps", "student", 2), ("4 steps", "student", 4),
    ):  # fmt: skip
        cells = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", by_w, re.MULTILINE)[1].split(" | ")
        for cell, run in zip(cells, runs.values(), strict=True):
            (row,) = (row for row in run["rows"] if row["sampler"] == sampler and row["steps"] == n)
            assert cell == f"{row['FD']:.2f}, {row['prompt accuracy']:.0%}"

    _, table3 = page.split("(record `tab3-tiny-sd`) |")
    names = table3.splitlines()[0].strip(" |").split(" | ")
    summary = json.loads((records / "tab3-tiny-sd.json").read_text())["summary"]
    for steps in ("1 step", "2 steps", "4 steps"):
        cells = re.search(rf"^\| {steps} \| (.*) \|$", table3, re.MULTILINE)[1].split(" | ")
        for name, cell in zip(names, cells, strict=True):
            mean, deviation = summary[name if "k = " in name else f"{name}, k = 100"][f"FD, {steps}"]
            assert cell == f"{mean:.1f}±{deviation:.1f}"


@pytest.mark.parametrize("claims", [verdict.PAPER, verdict.OURS])
def test_the_picture_shows_each_seed_of_each_claim(claims):
    figure = verdict.picture(claims)
    (axis,) = figure.axes
    drawn = [np.atleast_1d(line.get_xdata()).tolist() for line in axis.lines]
    for claim in claims:
        for found in filter(None, (verdict.decide(claim, measure) for measure in verdict.MEASURES)):
            assert found.ratios.tolist() in drawn and [found.mean] in drawn
            marks = [found.low, *found.ratios, found.high]  # without an interval, two of them are nan
            assert axis.get_xlim()[0] < np.nanmin(marks) and np.nanmax(marks) < axis.get_xlim()[1]
    assert [text.get_text() for text in axis.get_yticklabels()] == [*map(verdict.sentence, claims)]
    plt.close(figure)
