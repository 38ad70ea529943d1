"""The explorer's JavaScript, in a real browser, held against the Python functions that it repeats."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from test_splam import SD, mixture_denoiser

from improved import time_at
from splam import multiple_estimation, sub_path_point
from toy.distributions import DISTRIBUTIONS

DOCS = Path(__file__).parents[1] / "docs"
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt install chromium")

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


def random_settings(n, **fixed):
    chance, found = random.Random(0), []
    for _ in range(n):
        data = {"mixture": chance.choice(["8gaussians", "moons"]), "x0": chance.randrange(8)}
        noise = {"e1": chance.uniform(-2, 2), "e2": chance.uniform(-2, 2)}
        path = {"t": chance.randrange(19, 1000, 20), "k": chance.randrange(20, 501, 20), "m": chance.randint(1, 10)}
        line = {"gamma": chance.random(), "ode": chance.choice(["sl", "dl"]), "coupling": "ddim"}
        found.append(data | noise | path | line | fixed)
    return found


def python_of(asked, x_s):
    """What splam.py has where the page has a number of the same name. In the Markov coupling, x_s is the page's own."""
    mixture, t = DISTRIBUTIONS[asked["mixture"]], torch.tensor([asked["t"]])
    s, denoise = (t - asked["k"]).clamp_min(0), partial(mixture_denoiser, mixture=mixture)
    alpha, sigma = SD.at(t, 2)
    x_t = alpha * mixture.means[asked["x0"]] + sigma * torch.tensor([[asked["e1"], asked["e2"]]])
    if asked["coupling"] == "ddim":
        x_s = multiple_estimation(denoise, SD, x_t, t, s, asked["k"], math.ceil(asked["k"] / asked["m"]))
    found = {"xT": x_t, "xS": x_s, "epsHat": denoise(x_t, t)[1]}
    found |= {"endT": mixture.endpoint(x_t, alpha, sigma), "endS": mixture.endpoint(x_s, *SD.at(s, 2))}
    for form in ("linear", "markov"):
        point = sub_path_point(x_t, x_s, t, s, torch.tensor([asked["gamma"]]), SD, asked["ode"], form)
        time, end = time_at(SD, point.alpha, point.sigma), mixture.endpoint(*point)
        found |= {f"{form} {name}": value for name, value in {**point._asdict(), "time": time, "end": end}.items()}
    return found


def test_numbers_are_those_of_splam(tmp_path):
    """And note 2 of equations.md, which the explorer exists to show: one DDIM step makes the linear σ exact, and Markov
    pairs have the spread of Eq. 24. 2,000 draws of two coordinates tell it to 1/√8000; 4.5 % are four such deviations.
    """
    settings = [*random_settings(10), *random_settings(10, m=1), *random_settings(20, coupling="markov")]
    page = visit(tmp_path, f"show({json.dumps(settings)}.map((each) => numbers(measure(each))));")
    for shown, asked in zip(page, settings, strict=True):
        for form in ("linear", "markov"):
            shown |= {f"{form} {name}": value for name, value in shown[form].items()}
        for name, value in python_of(asked, torch.tensor([shown["xS"]])).items():
            tolerance = 1e-3 if "end" in name else 1e-4  # float32 here, doubles there; and another ODE solver
            actual = torch.tensor(shown[name]).flatten().tolist()
            assert actual == pytest.approx(value.flatten().tolist(), rel=tolerance, abs=tolerance), f"{name} of {asked}"
        if asked["coupling"] == "markov":
            assert shown["measured"] == pytest.approx(shown["markov"]["sigma"], rel=0.045)
        elif asked["m"] == 1:
            assert shown["measured"] == pytest.approx(shown["linear"]["sigma"], abs=1e-9)


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
