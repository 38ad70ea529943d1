"""The explorer's JavaScript, in a real browser, held against the Python functions that it repeats."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from improved import time_at
from splam import Schedule, multiple_estimation, sub_path_point
from toy.distributions import DISTRIBUTIONS

DOCS = Path(__file__).parents[1] / "docs"
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt install chromium")

SCHEDULE = Schedule(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod)

SHOW = """<script>
const show = (value) =>
  document.body.append(Object.assign(document.createElement("pre"), { id: "out", textContent: JSON.stringify(value) }));
const numbers = ({ path, piece, draws, steps, mixture, linear, markov, ...rest }) =>
  ({ ...rest, linear: { ...linear, way: [] }, markov: { ...markov, way: [] } });
%s</script></body>"""


def visit(folder, script):
    """Opens explorer.html and lets `script` run in it -> what that gives to `show`. The console must stay empty."""
    (folder / "explorer.html").write_text((DOCS / "explorer.html").read_text().replace("</body>", SHOW % script))
    shutil.copy(DOCS / "explorer.js", folder)
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --dump-dom"
    options += " --disable-component-update --enable-logging=stderr --v=0 --virtual-time-budget=10000"
    command = [BROWSER, *options.split(), f"--user-data-dir={folder}", (folder / "explorer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "<html" not in done.stdout:
        pytest.skip(f"{BROWSER} opens no file in {folder}")
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search('<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


def measured(folder, settings):
    """What the page computes for each of the settings, without its long lists of points."""
    return visit(folder, f"show({json.dumps(settings)}.map((each) => numbers(measure(each))));")


def random_settings(n, **fixed):
    chance, found = random.Random(0), []
    for _ in range(n):
        data = {"mixture": chance.choice(["8gaussians", "moons"]), "x0": chance.randrange(8)}
        noise = {"e1": chance.uniform(-2, 2), "e2": chance.uniform(-2, 2)}
        path = {"t": chance.randrange(19, 1000, 20), "k": chance.randrange(20, 501, 20), "m": chance.randint(1, 10)}
        line = {"gamma": chance.random(), "ode": chance.choice(["sl", "dl"]), "coupling": "ddim"}
        found.append(data | noise | path | line | fixed)
    return found


def compare(shown, asked, x_s=None):
    """The page's numbers with those of splam.py. With the Markov coupling x_s is drawn, and taken from the page."""
    mixture, t = DISTRIBUTIONS[asked["mixture"]], torch.tensor([asked["t"]])
    s = (t - asked["k"]).clamp_min(0)
    alpha, sigma = SCHEDULE.at(t, 2)
    x_t = alpha * mixture.means[asked["x0"]] + sigma * torch.tensor([[asked["e1"], asked["e2"]]])

    def denoise(x, time):
        alpha, sigma = SCHEDULE.at(time, 2)
        eps = mixture.eps(x, alpha, sigma)
        return (x - sigma * eps) / alpha, eps

    if x_s is None:
        x_s = multiple_estimation(denoise, SCHEDULE, x_t, t, s, asked["k"], math.ceil(asked["k"] / asked["m"]))
    found = {"xT": x_t, "xS": x_s, "epsHat": denoise(x_t, t)[1]}
    found |= {"endT": mixture.endpoint(x_t, alpha, sigma), "endS": mixture.endpoint(x_s, *SCHEDULE.at(s, 2))}
    for form in ("linear", "markov"):
        point = sub_path_point(x_t, x_s, t, s, torch.tensor([asked["gamma"]]), SCHEDULE, asked["ode"], form)
        time, end = time_at(SCHEDULE, point.alpha, point.sigma), mixture.endpoint(*point)
        for name, value in {**point._asdict(), "time": time, "end": end}.items():
            found[f"{form} {name}"], shown[f"{form} {name}"] = value, shown[form][name]
    for name, value in found.items():
        tolerance = 1e-3 if "end" in name else 1e-4  # float32 here, doubles there; and another ODE solver
        actual = torch.tensor(shown[name]).flatten().tolist()
        assert actual == pytest.approx(value.flatten().tolist(), rel=tolerance, abs=tolerance), f"{name} of {asked}"


def test_schedule_and_data_are_those_of_python(tmp_path):
    page = visit(tmp_path, "show({ schedule, mixtures });")
    assert page["schedule"]["alpha"] == pytest.approx(SCHEDULE.alpha.tolist(), rel=2e-5)
    assert page["schedule"]["sigma"] == pytest.approx(SCHEDULE.sigma.tolist(), rel=2e-5)
    for name, mixture in page["mixtures"].items():
        assert mixture["std"] == DISTRIBUTIONS[name].std
        assert torch.allclose(torch.tensor(mixture["means"]), DISTRIBUTIONS[name].means, atol=1e-6)


def test_numbers_are_those_of_splam(tmp_path):
    """And note 2 of equations.md, which the explorer exists to show: one DDIM step makes the linear σ exact."""
    settings = [*random_settings(10), *random_settings(10, m=1)]
    for shown, asked in zip(measured(tmp_path, settings), settings, strict=True):
        compare(shown, asked)
        if asked["m"] == 1:
            assert shown["measured"] == pytest.approx(shown["linear"]["sigma"], abs=1e-9)


def test_markov_pairs_have_the_spread_of_eq_24(tmp_path):
    settings = random_settings(20, coupling="markov")
    for shown, asked in zip(measured(tmp_path, settings), settings, strict=True):
        compare(shown, asked, torch.tensor([shown["xS"]]))
        # 2,000 draws of two coordinates: the spread is known to 1/√8000 of itself, and four such deviations are 4.5 %.
        assert shown["measured"] == pytest.approx(shown["markov"]["sigma"], rel=0.045)


READER = """
const seen = [readForm()];
panels.x.handle.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
seen.push(readForm());
(async () => {
  for (const hash of ["#explorer?t=399&k=100&m=5", "#explorer?mixture=8gaussians&x0=99&k=1e9&e1=&no=1"]) {
    location.hash = hash;
    await new Promise((done) => setTimeout(done, 100));
    seen.push(readForm());
  }
  const labelled = [...form.querySelectorAll("input, select")].every((each) => each.labels.length === 1);
  show({ seen, labelled, tooWide: document.documentElement.scrollWidth - innerWidth });
})();
"""


def test_a_reader_can_work_it_by_keyboard_and_link(tmp_path):
    found = visit(tmp_path, READER)
    start, right, linked, hostile = found["seen"]
    assert right["e1"] > start["e1"] and right["e2"] == start["e2"]
    assert linked == start | {"t": 399, "k": 100, "m": 5}
    assert hostile == start | {"mixture": "8gaussians", "x0": 7, "k": 500, "e1": 0}  # what is out of range: the border
    assert found["labelled"] and found["tooWide"] <= 0  # nothing is wider than the window
