"""The explorer's JavaScript, in a real browser, held against the Python functions that it repeats."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest
import torch

from docs import page
from splam import SOLVERS, Schedule, sub_path_point
from toy.distributions import GaussianMixture

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt install chromium")

DATA = page.explorer_data()


@pytest.fixture
def visit(tmp_path):
    """visit(fragment, script) opens the page, lets the reader's `script` run in it, and returns what the page has
    written into <pre id="explorer-numbers">. The page may write nothing to the console."""

    def open_page(fragment, script=""):
        text = page.build("..").replace("</body>", f"<script>{script}</script></body>")
        (tmp_path / "index.html").write_text(text)
        address = (tmp_path / "index.html").as_uri() + fragment
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        options += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom"]
        done = subprocess.run([BROWSER, *options, address], capture_output=True, text=True, timeout=120)
        if "<html" not in done.stdout:
            pytest.skip(f"{BROWSER} opens no file in {tmp_path}")
        assert "CONSOLE" not in done.stderr, done.stderr
        return json.loads(html.unescape(re.search('<pre id="explorer-numbers">(.*?)</pre>', done.stdout, re.DOTALL)[1]))

    return open_page


def dump(settings):
    return f"#explorer?dump&settings={quote(json.dumps(settings))}"


def random_settings(n, **fixed):
    chance = random.Random(0)
    return [
        {
            "mixture": (mixture := chance.choice(list(DATA["mixtures"]))),
            "x0": chance.randrange(len(DATA["mixtures"][mixture]["means"])),
            "e1": round(chance.uniform(-2, 2), 2),
            "e2": round(chance.uniform(-2, 2), 2),
            "t": chance.randrange(19, 1000, 20),
            "k": chance.randrange(20, 501, 20),
            "m": chance.randint(1, 10),
            "gamma": chance.randrange(101) / 100,
            "solver": chance.choice(list(SOLVERS)),
            "ode": chance.choice(["sl", "dl"]),
            "sigma": chance.choice(["approx", "exact"]),
        }
        | fixed
        for _ in range(n)
    ]


# JavaScript computes in doubles. So that all that differs is a mistake, the reference does too, from the same tables.
SCHEDULE = Schedule(torch.ones(1000))
SCHEDULE.alpha, SCHEDULE.sigma = (torch.tensor(DATA[name], dtype=torch.float64) for name in ("alphas", "sigmas"))
MIXTURES = {
    name: GaussianMixture(torch.tensor(mixture["means"], dtype=torch.float64), mixture["std"])
    for name, mixture in DATA["mixtures"].items()
}


def points(*coordinates):
    return torch.tensor([coordinates], dtype=torch.float64)


def reference(asked, x_s=None):
    """What the page must have computed, by its names. With the Markov coupling its x_s is drawn, and taken from it."""
    mixture, t = MIXTURES[asked["mixture"]], torch.tensor([asked["t"]])
    s = (t - asked["k"]).clamp_min(0)
    alpha, sigma = SCHEDULE.at(t, 2)
    x0 = mixture.means[asked["x0"]][None]
    x_t = alpha * x0 + sigma * points(asked["e1"], asked["e2"])

    def denoise(x, time):
        alpha, sigma = SCHEDULE.at(time, 2)
        eps = mixture.eps(x, alpha, sigma)
        return (x - sigma * eps) / alpha, eps

    if x_s is None:
        step = math.ceil(asked["k"] / asked["m"])
        x_s = SOLVERS[asked["solver"]](denoise, SCHEDULE, x_t, t, s, asked["k"], step)
    eps = denoise(x_t, t)[1]
    found = {"s": s, "xT": x_t, "xS": x_s, "x0": x0, "eps": eps}
    found |= {"endT": mixture.endpoint(x_t, alpha, sigma), "endS": mixture.endpoint(x_s, *SCHEDULE.at(s, 2))}
    for form in ("approx", "exact"):
        point = sub_path_point(x_t, x_s, t, s, points(asked["gamma"]), SCHEDULE, asked["ode"], form)
        found |= {f"{form} {name}": value for name, value in point._asdict().items()}
        found[f"{form} time"] = SCHEDULE.time_at(point.alpha, point.sigma)
        found[f"{form} end"] = mixture.endpoint(*point)
    return {name: value.flatten().tolist() for name, value in found.items()}


def compare(shown, asked, x_s=None):
    shown = {**shown, **{f"{form} {name}": value for form, of in shown["forms"].items() for name, value in of.items()}}
    for name, expected in reference(asked, x_s).items():
        # An end comes from another ODE solver; its own tolerance is 1e-7, and the trajectories may part on the way.
        tolerance = 1e-4 if "end" in name else 1e-6
        actual = shown[name] if isinstance(shown[name], list) else [shown[name]]
        assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance), f"{name} of {asked}"


def test_numbers_are_those_of_splam(visit):
    settings = random_settings(20)
    for shown, asked in zip(visit(dump(settings)), settings, strict=True):
        compare(shown, asked)
        # The noise that is called measured: what x_γ holds beside α_γ x̂_0, as a multiple of ε̂.
        x, eps = (torch.tensor(value) for value in (shown["forms"]["approx"]["x"], shown["eps"]))
        alpha_t, sigma_t = (table[asked["t"]].item() for table in (SCHEDULE.alpha, SCHEDULE.sigma))
        x0 = (torch.tensor(shown["xT"]) - sigma_t * eps) / alpha_t
        left = x - shown["forms"]["approx"]["alpha"] * x0
        assert shown["measured"] == pytest.approx((left @ eps / (eps @ eps)).item(), abs=1e-4)


def test_one_ddim_step_makes_the_linear_sigma_exact(visit):
    """Note 2: what the explorer exists to show."""
    for shown in visit(dump(random_settings(10, m=1, solver="ddim"))):
        assert shown["measured"] == pytest.approx(shown["forms"]["approx"]["sigma"], abs=1e-9)


def test_markov_pairs_have_the_spread_of_eq_24(visit):
    settings = random_settings(20, coupling="markov", seed=7)
    drawn = []
    for shown, asked in zip(visit(dump(settings)), settings, strict=True):
        compare(shown, asked, points(*shown["xS"]))
        # 2,000 draws of two coordinates: the spread is known to 1/√8000 of itself, and four such deviations are 4.5 %.
        assert shown["measured"] == pytest.approx(shown["forms"]["exact"]["sigma"], rel=0.045)
        # x_s given x_t and x_0 (DDPM's posterior) has one random term. One seed must make the same of it everywhere.
        t, s = asked["t"], shown["s"]
        alpha, sigma = SCHEDULE.alpha.numpy(), SCHEDULE.sigma.numpy()
        fresh = sigma[s] / sigma[t] * math.sqrt(1 - (alpha[t] / alpha[s]) ** 2)
        kept = math.sqrt(sigma[s] ** 2 - fresh**2)
        mean = alpha[s] * points(*shown["x0"]) + kept * points(asked["e1"], asked["e2"])
        drawn.append((points(*shown["xS"]) - mean) / fresh)
    assert (torch.cat(drawn) - drawn[0]).abs().max() < 1e-6 and drawn[0].abs().max() < 4


# What a reader does. Each step leaves the settings that the form then has.
READER = """
const seen = [];
const note = () => seen.push(readForm());
const later = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const key = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const pointer = (type, x, y) =>
  panels.x.handle.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, bubbles: true }));
const put = (name, value) => {
  field[name].value = value;
  field[name].dispatchEvent(new Event("input", { bubbles: true }));
};
const explained = (control) =>
  control.labels.length === 1 && document.getElementById(control.getAttribute("aria-describedby")).textContent !== "";

(async () => {
  setForm({}), note();
  readFragment(), note();
  key(panels.x.handle, "ArrowRight"), note();
  key(panels.z.handle, "ArrowUp"), note();

  panels.x.handle.setPointerCapture = () => {}; // there is no pointer behind these events
  const middle = panels.x.from([200, 200]);
  const box = panels.x.svg.getBoundingClientRect();
  pointer("pointerdown", 0, 0);
  pointer("pointermove", box.left + box.width / 2, box.top + box.height / 2);
  pointer("pointerup", 0, 0);
  const missed = distance(last.solved.xT, middle);

  const changes = { k: 300, sigma: "exact", mixture: "8gaussians", x0: 99, gamma: 0.25 };
  for (const [name, value] of Object.entries(changes)) put(name, value);
  note();
  const link = document.getElementById("explorer-link").getAttribute("href");
  put("t", 999);
  location.hash = link;
  await later(100);
  note();
  location.hash = "#explorer?t=x&k=1e9&mixture=none&x0=-5&e1=&nonsense=1&__proto__=1";
  await later(100);
  note();
  playButton.click();
  await later(6000);
  note();
  const done = document.createElement("pre");
  done.id = "explorer-numbers";
  done.textContent = JSON.stringify({
    seen,
    missed,
    explained: [...form.querySelectorAll("input, select")].every(explained),
    button: playButton.textContent,
    said: document.getElementById("explorer-said").textContent,
    tooWide: document.documentElement.scrollWidth - innerWidth,
  });
  document.body.append(done);
})();
"""


def test_a_reader_can_work_it_by_keyboard_and_share_a_link(visit):
    found = visit("#explorer?t=599&k=100", READER)
    start, first, right, up, changed, linked, hostile, played = found["seen"]
    assert first == start | {"t": 599, "k": 100}
    assert right["eps"][0] > first["eps"][0] and right["eps"][1] == first["eps"][1]
    assert up["eps"][1] > right["eps"][1] and up["eps"][0] == right["eps"][0]
    assert found["missed"] < 2e-3  # the noise is rounded to 0.001
    assert (changed["k"], changed["sigma"], changed["gamma"]) == (300, "exact", 0.25)
    assert changed["x0"] == 7  # the last of 8
    assert linked == changed
    assert hostile == start | {"k": 500, "x0": 0}
    assert played == hostile | {"gamma": 1}
    assert found["explained"] and found["button"] == "Play γ" and "γ = 1.00" in found["said"]
    assert found["tooWide"] <= 0  # nothing is wider than the window
