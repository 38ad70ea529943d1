"use strict";
// The sub-path explorer: one sub-path of the PF-ODE, drawn and measured while the reader turns the knobs.
//
// The first part repeats functions of splam.py and toy/distributions.py, for one point of the plane in the place of a
// batch. The teacher's ε is known in closed form, so nothing is trained and nothing is loaded. tests/test_explorer.py
// runs this file in a browser and holds its numbers against those of the Python code.
//
//     1  The mathematics          eps, trajectory, timeAt, multipleEstimation, subPathPoint
//     2  One setting, measured    measure
//     3  The pictures             Panel, and a function for each of the four
//     4  The controls             the form is the state; the URL's fragment can set it
//
// Notation as in splam.py: t, s start and end of a sub-path; r = α_t/α_s; ρ = σ/α; z = x/α. A point is [x, y].

// --------------------------------------------------------------------------------------------------------------------
// 1  The mathematics
// --------------------------------------------------------------------------------------------------------------------

/** α_t and σ_t of Stable Diffusion's schedule, whose β are evenly spaced in √β. */
function stableDiffusion() {
  const [first, last] = [Math.sqrt(0.00085), Math.sqrt(0.012)];
  const [alpha, sigma] = [[], []];
  let cumulative = 1;
  for (let t = 0; t < 1000; t++) {
    cumulative *= 1 - (first + ((last - first) * t) / 999) ** 2;
    alpha.push(Math.sqrt(cumulative));
    sigma.push(Math.sqrt(1 - cumulative));
  }
  return { alpha, sigma };
}

const schedule = stableDiffusion();

function onCircle(angle) {
  return [Math.cos(angle), Math.sin(angle)];
}

/** Mixtures of equally weighted isotropic Gaussians, as in toy/distributions.py. */
const mixtures = {
  "8gaussians": { std: 0.08, means: Array.from({ length: 8 }, (_, i) => onCircle((i * Math.PI) / 4)) },
  moons: {
    std: 0.06,
    means: [1, -1].flatMap((half) =>
      Array.from({ length: 32 }, (_, i) => {
        const [x, y] = onCircle((i * Math.PI) / 31);
        return [half * 0.75 * (x - 0.5), half * 0.75 * (y - 0.25)];
      }),
    ),
  },
};

/** a p + b q, for points p and q. */
function combine(a, p, b, q) {
  return [a * p[0] + b * q[0], a * p[1] + b * q[1]];
}

function scaled(a, p) {
  return [a * p[0], a * p[1]];
}

function dot(p, q) {
  return p[0] * q[0] + p[1] * q[1];
}

function distance(p, q) {
  return Math.hypot(p[0] - q[0], p[1] - q[1]);
}

/** The ideal noise prediction ε = -σ ∇ log p(x) of a mixture that was diffused to (α, σ). */
function eps(mixture, x, alpha, sigma) {
  const variance = (alpha * mixture.std) ** 2 + sigma ** 2;
  const offsets = mixture.means.map((mean) => combine(alpha, mean, -1, x));
  // Far from all components every density underflows to 0. Relative to that of the nearest one, one of them is 1.
  const nearest = Math.min(...offsets.map((offset) => dot(offset, offset)));
  let sum = 0;
  let total = [0, 0];
  for (const offset of offsets) {
    const weight = Math.exp((nearest - dot(offset, offset)) / (2 * variance));
    sum += weight;
    total = combine(1, total, weight, offset);
  }
  return scaled(-sigma / (variance * sum), total);
}

/**
 * The PF-ODE's way from x, at the noise level of (α, σ), down to the noise-to-signal ratio `to`: a list of {rho, z}.
 *
 * In z = x/α the ODE is dz/dρ = ε, and no noise schedule is left in it. So (α, σ) need not belong to an integer time,
 * nor have α² + σ² = 1: a point inside a sub-path can be read with either σ. Runge and Kutta's method of order 4, with
 * steps even in log(1 + ρ/0.1), since near the data the trajectory bends most.
 */
function trajectory(mixture, x, alpha, sigma, to = 0, steps = 300) {
  const slope = (rho, z) => {
    const unit = 1 / Math.hypot(1, rho);
    return eps(mixture, scaled(unit, z), unit, rho * unit);
  };
  const level = (rho) => Math.log1p(rho / 0.1);
  const from = sigma / alpha;
  const path = [{ rho: from, z: scaled(1 / alpha, x) }];
  for (let i = 1; i <= steps; i++) {
    const { rho, z } = path.at(-1);
    const next = i === steps ? to : 0.1 * Math.expm1(level(from) + ((level(to) - level(from)) * i) / steps);
    const h = next - rho;
    const a = slope(rho, z);
    const b = slope(rho + h / 2, combine(1, z, h / 2, a));
    const c = slope(rho + h / 2, combine(1, z, h / 2, b));
    const d = slope(next, combine(1, z, h, c));
    const mean = combine(1 / 6, combine(1, a, 1, d), 1 / 3, combine(1, b, 1, c));
    path.push({ rho: next, z: combine(1, z, h, mean) });
  }
  return path;
}

/** The real-valued time t' with the noise-to-signal ratio σ/α; between integer times it is linear in log ρ. */
function timeAt(alpha, sigma) {
  const logRatio = (t) => Math.log(schedule.sigma[t] / schedule.alpha[t]);
  const last = schedule.alpha.length - 1;
  const wanted = Math.min(Math.max(Math.log(sigma / alpha), logRatio(0)), logRatio(last));
  let after = 1;
  while (after < last && logRatio(after) < wanted) after++;
  return after - 1 + (wanted - logRatio(after - 1)) / (logRatio(after) - logRatio(after - 1));
}

/** Eq. 18: the points {t, x} of the teacher's way by DDIM steps from x_t, the first, to x_s, the last. */
function multipleEstimation(mixture, x, t, s, k, solverStep) {
  const points = [{ t, x }];
  for (let i = 0; i < Math.ceil(k / solverStep); i++) {
    const next = Math.max(t - solverStep, s);
    const noise = eps(mixture, x, schedule.alpha[t], schedule.sigma[t]);
    const x0 = combine(1 / schedule.alpha[t], x, -schedule.sigma[t] / schedule.alpha[t], noise); // Eq. 8
    x = combine(schedule.alpha[next], x0, schedule.sigma[next], noise);
    t = next;
    points.push({ t, x });
  }
  return points;
}

/** x_γ on the line between the ends of a sub-path, with its signal and its noise: Eq. 12 to 14, 24, 26 to 28. */
function subPathPoint(xT, xS, t, s, gamma, ode, form) {
  const [alphaT, sigmaT, alphaS, sigmaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]];
  const r = alphaT / alphaS;
  // The end of the line: r x_s, which has the signal of x_t, or x_s itself (DL). It holds the noise `shrink` σ_s.
  const shrink = ode === "sl" ? r : 1;
  const x = combine((1 - gamma) * shrink, xS, gamma, xT);
  const alpha = (1 - gamma) * shrink * alphaS + gamma * alphaT;
  if (form === "linear") return { x, alpha, sigma: (1 - gamma) * shrink * sigmaS + gamma * sigmaT };
  // Markov: x_t is r x_s plus fresh noise that x_s knows nothing of, of the variance 1 - r² (Eq. 20). Variances add.
  const fresh = Math.sqrt(sigmaT ** 2 - (r * sigmaS) ** 2);
  return { x, alpha, sigma: Math.hypot(((1 - gamma) * shrink + gamma * r) * sigmaS, gamma * fresh) };
}

// --------------------------------------------------------------------------------------------------------------------
// 2  One setting, measured
// --------------------------------------------------------------------------------------------------------------------

const FORMS = ["linear", "markov"];
const DRAWS = 2000; // their spread is then within about 2 % of the true one
const SHOWN_DRAWS = 400;

/** Standard normal points, the same at each call: a picture must not flicker while γ moves. */
function normalPoints(n) {
  let state = 1;
  const uniform = () => {
    // mulberry32, a small generator of random numbers
    state = (state + 0x6d2b79f5) | 0;
    let h = Math.imul(state ^ (state >>> 15), 1 | state);
    h = (h + Math.imul(h ^ (h >>> 7), 61 | h)) ^ h;
    return ((h ^ (h >>> 14)) >>> 0) / 2 ** 32;
  };
  return Array.from({ length: n }, () => scaled(Math.sqrt(-2 * Math.log(1 - uniform())), onCircle(2 * Math.PI * uniform())));
}

/** What does not depend on γ: the ends of the sub-path, the solver's steps, the trajectory and the draws. */
function solve({ t, k, m, ode, coupling, ...settings }) {
  const mixture = mixtures[settings.mixture];
  const s = Math.max(t - k, 0);
  const [alphaT, sigmaT, alphaS, sigmaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]];
  const r = alphaT / alphaS;
  const x0 = mixture.means[settings.x0];
  const noise = [settings.e1, settings.e2];
  const xT = combine(alphaT, x0, sigmaT, noise); // Eq. 1
  const epsHat = eps(mixture, xT, alphaT, sigmaT);
  const x0Hat = combine(1 / alphaT, xT, -sigmaT / alphaT, epsHat);
  const solved = { t, k, s, r, mixture, x0, xT, x0Hat, epsHat, steps: [], draws: [], ode, coupling };
  if (coupling === "ddim") {
    solved.steps = multipleEstimation(mixture, xT, t, s, k, Math.ceil(k / m));
    solved.xS = solved.steps.at(-1).x;
  } else {
    const [first, ...noises] = normalPoints(2 * DRAWS + 1);
    // The pair that is drawn as a line: x_s from its distribution given x_t and x_0.
    const fresh = (sigmaS / sigmaT) * Math.sqrt(1 - r * r);
    solved.xS = combine(alphaS, x0, 1, combine(Math.sqrt(sigmaS ** 2 - fresh ** 2), noise, fresh, first));
    // Many pairs given x_0, made in the order of Eq. 20: first x_s, then x_t by fresh noise.
    solved.draws = Array.from({ length: DRAWS }, (_, i) => {
      const xS = combine(alphaS, x0, sigmaS, noises[2 * i]);
      return { xS, xT: combine(r, xS, Math.sqrt(1 - r * r), noises[2 * i + 1]) };
    });
  }
  solved.path = trajectory(mixture, xT, alphaT, sigmaT);
  solved.piece = trajectory(mixture, xT, alphaT, sigmaT, sigmaS / alphaS, 100);
  solved.endT = solved.path.at(-1).z;
  solved.endS = trajectory(mixture, solved.xS, alphaS, sigmaS).at(-1).z;
  return solved;
}

/**
 * How much noise x_γ holds, measured without either formula.
 *
 * DDIM: x_γ - α_γ x̂_0 as a multiple of ε̂, with x̂_0 and ε̂ as the teacher sees them at x_t. Markov: the spread of the
 * draws around α_γ x_0, in each of the two coordinates.
 */
function measuredSigma({ t, s, xT, xS, x0, x0Hat, epsHat, draws, coupling, ode }, gamma) {
  if (coupling === "ddim") {
    const { x, alpha } = subPathPoint(xT, xS, t, s, gamma, ode, "linear");
    return dot(combine(1, x, -alpha, x0Hat), epsHat) / dot(epsHat, epsHat);
  }
  let sum = 0;
  for (const pair of draws) {
    const { x, alpha } = subPathPoint(pair.xT, pair.xS, t, s, gamma, ode, "linear");
    sum += distance(x, scaled(alpha, x0)) ** 2;
  }
  return Math.sqrt(sum / (2 * draws.length));
}

/** x = α z, with the α of the process at this ρ. */
function toX({ rho, z }) {
  return scaled(1 / Math.hypot(1, rho), z);
}

/** The distance of a point from the piece of a line between p and q. */
function fromLine(point, p, q) {
  const along = combine(1, q, -1, p);
  const u = dot(combine(1, point, -1, p), along) / (dot(along, along) || 1);
  return distance(point, combine(1, p, Math.min(1, Math.max(0, u)), along));
}

let last = { key: "", solved: null };

/** All that the pictures and the table show, for the settings of the form. */
function measure(settings) {
  const key = JSON.stringify({ ...settings, gamma: 0, view: "" });
  if (last.key !== key) last = { key, solved: solve(settings) };
  const { t, s, r, xT, xS, mixture, piece } = last.solved;
  const { gamma, ode } = settings;
  const m = { ...last.solved, settings, measured: measuredSigma(last.solved, gamma) };
  for (const form of FORMS) {
    const point = subPathPoint(xT, xS, t, s, gamma, ode, form);
    const way = trajectory(mixture, point.x, point.alpha, point.sigma);
    m[form] = { ...point, time: timeAt(point.alpha, point.sigma), way, end: way.at(-1).z };
  }
  const [zT, zS] = [scaled(1 / schedule.alpha[t], xT), scaled(1 / schedule.alpha[s], xS)];
  const lineEnd = scaled(ode === "sl" ? r : 1, xS);
  m.bendX = Math.max(...piece.map((point) => fromLine(toX(point), xT, lineEnd)));
  m.bendZ = Math.max(...piece.map((point) => fromLine(point.z, zT, zS)));
  return m;
}

// --------------------------------------------------------------------------------------------------------------------
// 3  The pictures
//
// SVG: it stays sharp, and takes its colours from the page's style sheet. A picture is built anew as text each time,
// all but the handle of x_t, which must keep the keyboard's focus.
// --------------------------------------------------------------------------------------------------------------------

const SIZE = 400; // the viewBox of a panel, of which the plot has [LEFT, SIZE - EDGE] × [EDGE, SIZE - BOTTOM]
const [LEFT, BOTTOM, EDGE] = [40, 24, 14];

/** "x_t" -> x with a small lowered t. */
function withSubscripts(text) {
  return text.replace(/_(.)/g, '<tspan dy="4" font-size="75%">$1</tspan><tspan dy="-4">&#8203;</tspan>');
}

/** A square picture with axes, and labels that keep clear of each other. */
class Panel {
  constructor(id) {
    this.svg = document.getElementById(id);
    this.layer = this.svg.querySelector(".layer");
    this.handle = this.svg.querySelector(".handle");
    this.sides = {}; // where each label was last time
    this.begin();
  }

  begin() {
    this.parts = [];
    this.taken = []; // boxes [left, top, right, bottom] that no label may cover
    this.names = [];
  }

  /** Show the rectangle from `low` to `high`. */
  show(low, high) {
    [this.low, this.high] = [low, high];
  }

  /** Show all these points, with some air, at the same scale across and up. */
  fit(points) {
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
    const [left, right, bottom, top] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const half = Math.max(right - left, top - bottom, 1e-6) * 0.64;
    const [x, y] = [(left + right) / 2, (bottom + top) / 2];
    this.show([x - half, y - half], [x + half, y + half]);
  }

  /** A point of the plane in the panel's units, and back. */
  at(p) {
    const [u, v] = [0, 1].map((i) => (p[i] - this.low[i]) / (this.high[i] - this.low[i]));
    return [LEFT + u * (SIZE - EDGE - LEFT), SIZE - BOTTOM - v * (SIZE - EDGE - BOTTOM)];
  }

  from([px, py]) {
    const [u, v] = [(px - LEFT) / (SIZE - EDGE - LEFT), (SIZE - BOTTOM - py) / (SIZE - EDGE - BOTTOM)];
    return [u, v].map((part, i) => this.low[i] + Math.min(1, Math.max(0, part)) * (this.high[i] - this.low[i]));
  }

  axes() {
    for (const i of [0, 1]) {
      const wanted = (this.high[i] - this.low[i]) / 3;
      const power = 10 ** Math.floor(Math.log10(wanted));
      const step = [5, 2, 1].map((digit) => digit * power).find((each) => each <= wanted * (1 + 1e-9));
      const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
      for (let n = Math.ceil(this.low[i] / step); n * step <= this.high[i]; n++) {
        const [x, y] = this.at(i ? [this.low[0], n * step] : [n * step, this.low[1]]);
        const text = (n * step || 0).toFixed(digits).replace("-", "−");
        const line = i ? `M${x} ${y}H${SIZE - EDGE}` : `M${x} ${y}V${EDGE}`;
        const place = i ? `x="${x - 5}" y="${y + 4}" text-anchor="end"` : `x="${x}" y="${y + 15}" text-anchor="middle"`;
        this.parts.push(`<path class="grid" d="${line}"/><text class="tick" ${place}>${text}</text>`);
      }
    }
    const [width, height] = [SIZE - EDGE - LEFT, SIZE - EDGE - BOTTOM];
    this.parts.push(`<rect class="frame" x="${LEFT}" y="${EDGE}" width="${width}" height="${height}"/>`);
  }

  curve(points, style) {
    if (!points.length) return;
    const d = points.map((p) => this.at(p).map((c) => c.toFixed(2)).join(" ")).join("L");
    this.parts.push(`<path class="${style}" clip-path="url(#explorer-clip)" d="M${d}"/>`);
  }

  circle(centre, radius, style) {
    const [x, y] = this.at(centre);
    const size = (radius / (this.high[0] - this.low[0])) * (SIZE - EDGE - LEFT);
    this.parts.push(`<circle class="${style}" clip-path="url(#explorer-clip)" cx="${x}" cy="${y}" r="${size}"/>`);
  }

  dots(points, style) {
    const d = points.map((p) => `M${this.at(p).map((c) => c.toFixed(1)).join(" ")}h0`).join("");
    this.parts.push(`<path class="${style}" clip-path="url(#explorer-clip)" d="${d}"/>`);
  }

  /** A mark, and its name if it has one. A mark outside the plot is left out. */
  mark(p, shape, style, name = "") {
    const [x, y] = this.at(p);
    if (x < LEFT || x > SIZE - EDGE || y < EDGE || y > SIZE - BOTTOM) return;
    this.parts.push(`<use class="mark ${style}" href="#mark-${shape}" x="${x.toFixed(2)}" y="${y.toFixed(2)}"/>`);
    this.taken.push([x - 8, y - 8, x + 8, y + 8]);
    if (name) this.names.push({ x, y, name });
  }

  /**
   * The names, after all marks are known. Each tries places around its mark, near ones first, and takes the one that
   * covers least; the side of last time first, so that names do not hop about while γ moves.
   */
  label() {
    for (const { x, y, name } of this.names) {
      const width = 7.4 * name.replaceAll("_", "").length + 4;
      let best = { cost: Infinity };
      for (const radius of [16, 26, 38, 52]) {
        for (let side = 0; side < 12; side++) {
          const [c, s] = onCircle((side * Math.PI) / 6);
          // The box's nearest point to the mark, and not its middle, is `radius` away.
          const [cx, cy] = [x + c * (radius + width / 2 - 4), y - s * (radius + 4)];
          const box = [cx - width / 2, cy - 9, cx + width / 2, cy + 9];
          let cost = radius / 10 + (this.sides[name] === side ? 0 : 3);
          for (const [left, top, right, bottom] of this.taken) {
            const w = Math.min(right, box[2]) - Math.max(left, box[0]);
            const h = Math.min(bottom, box[3]) - Math.max(top, box[1]);
            if (w > 0 && h > 0) cost += 10 + w * h;
          }
          if (box[0] < LEFT || box[2] > SIZE - EDGE || box[1] < EDGE || box[3] > SIZE - BOTTOM) cost += 1000;
          if (cost < best.cost) best = { cost, side, radius, cx, cy, box };
        }
      }
      this.sides[name] = best.side;
      this.taken.push(best.box);
      if (best.radius > 16) this.parts.push(`<path class="leader" d="M${x} ${y}L${best.cx} ${best.cy}"/>`);
      const place = `x="${best.cx}" y="${best.cy + 5}" text-anchor="middle"`;
      this.parts.push(`<text class="name" ${place}>${withSubscripts(name)}</text>`);
    }
  }

  end() {
    this.label();
    this.layer.innerHTML = this.parts.join("");
    this.begin();
  }
}

const panels = Object.fromEntries(["x", "z", "sigma", "ends"].map((name) => [name, new Panel(`explorer-${name}`)]));

/** The sub-path in x (letter "x"), or in z = x/α (letter "z"): each point with the signal α that it holds. */
function drawSpace(letter, m) {
  const panel = panels[letter];
  const place = (x, alpha) => (letter === "x" ? x : scaled(1 / alpha, x));
  const onPath = (point) => (letter === "x" ? toX(point) : point.z);
  const { t, s, r, settings, mixture } = m;
  const [alphaT, sigmaT, alphaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s]];
  const start = place(m.xT, alphaT);
  const [end, shrunk] = [place(m.xS, alphaS), place(scaled(r, m.xS), alphaT)];
  const steps = m.steps.map((step) => place(step.x, schedule.alpha[step.t]));
  const sl = settings.ode === "sl";

  if (!panel.frozen) {
    // Frozen while x_t is dragged: the picture must not move away under the pointer.
    const seen = [start, end, shrunk, ...steps];
    const around = (centre, reach) => seen.push(combine(1, centre, reach, [1, 1]), combine(1, centre, -reach, [1, 1]));
    if (m.draws.length) around(place(scaled(alphaT, m.x0), alphaT), (2.2 * sigmaT) / (letter === "x" ? 1 : alphaT));
    if (settings.view === "whole") for (const mean of mixture.means) around(mean, 3 * mixture.std);
    panel.fit(seen);
  }
  panel.axes();
  for (const mean of mixture.means) panel.circle(mean, 2 * mixture.std, "component");
  if (m.draws.length) {
    const cloud = m.draws.slice(0, SHOWN_DRAWS).map((pair) => {
      const point = subPathPoint(pair.xT, pair.xS, t, s, settings.gamma, settings.ode, "linear");
      return place(point.x, point.alpha);
    });
    panel.dots(cloud, "draws");
    // A circle of this radius holds half of a Gaussian cloud with deviation σ.
    for (const form of FORMS) {
      const { alpha, sigma } = m[form];
      const radius = Math.sqrt(2 * Math.log(2)) * sigma;
      panel.circle(place(scaled(alpha, m.x0), alpha), letter === "x" ? radius : radius / alpha, form);
    }
  }
  panel.curve(m.path.map(onPath), "ode");
  panel.curve(m.piece.map(onPath), "ode piece");
  panel.curve(steps, "step");
  if (letter === "x") {
    panel.curve([start, sl ? end : shrunk], "chord other");
    panel.curve([end, shrunk], "shrink");
  } else {
    for (const form of FORMS) panel.curve(m[form].way.map(onPath), form);
  }
  panel.curve([start, sl ? shrunk : end], "chord");

  panel.mark(place(m.x0, 1), "plus", "ink", "x_0");
  panel.mark(m.endT, "disc", "blue");
  for (const step of steps.slice(1, -1)) panel.mark(step, "small-square", "gray");
  panel.mark(start, "disc", "full", `${letter}_t`);
  panel.mark(end, "square", "red", `${letter}_s`);
  if (letter === "x") panel.mark(shrunk, "square", "red", "r x_s");
  panel.mark(place(m.linear.x, m.linear.alpha), "diamond", "full", `${letter}_γ`);
  panel.handle.setAttribute("transform", `translate(${panel.at(start).join(" ")})`);
  panel.handle.setAttribute("aria-valuenow", start[0].toFixed(3));
  panel.handle.setAttribute("aria-valuetext", `${start[0].toFixed(3)} across, ${start[1].toFixed(3)} up`);
  panel.end();
}

/** Both forms of σ_γ over γ, and the noise that is measured. */
function drawSigma(m) {
  const panel = panels.sigma;
  const { t, s, settings } = m;
  const curve = (form) => {
    const gammas = Array.from({ length: 51 }, (_, i) => i / 50);
    return gammas.map((gamma) => [gamma, subPathPoint(m.xT, m.xS, t, s, gamma, settings.ode, form).sigma]);
  };
  const curves = { linear: curve("linear"), markov: curve("markov") };
  const measured = Array.from({ length: 11 }, (_, i) => [i / 10, measuredSigma(m, i / 10)]);
  const heights = [...curves.linear, ...curves.markov, ...measured].map((point) => point[1]);
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  panel.show([-0.05, low - 0.12 * (high - low)], [1.05, high + 0.12 * (high - low)]);
  panel.axes();
  panel.curve([[settings.gamma, panel.low[1]], [settings.gamma, panel.high[1]]], "now");
  for (const form of FORMS) panel.curve(curves[form], form);
  for (const point of measured) panel.mark(point, "ring", "ink");
  panel.mark([settings.gamma, m.linear.sigma], "triangle", "linear", "linear");
  panel.mark([settings.gamma, m.markov.sigma], "cross", "markov", "Markov");
  panel.end();
}

/** Where the PF-ODE takes the points. The origin is where it takes x_s. */
function drawEnds(m) {
  const panel = panels.ends;
  const ends = [m.endT, m.linear.end, m.markov.end].map((end) => combine(1, end, -1, m.endS));
  // The scale changes in steps, so that the picture does not swell and shrink while γ moves.
  const farthest = Math.max(1e-4, ...ends.map((end) => Math.hypot(...end)));
  const half = 1.25 * 2 ** Math.ceil(Math.log2(farthest));
  panel.show([-half, -half], [half, half]);
  panel.axes();
  for (const mean of m.mixture.means) panel.circle(combine(1, mean, -1, m.endS), 2 * m.mixture.std, "component");
  panel.mark([0, 0], "square", "red", "x_s");
  panel.mark(ends[0], "disc", "blue", "x_t");
  panel.mark(ends[1], "triangle", "linear", "x_γ, linear");
  panel.mark(ends[2], "cross", "markov", "x_γ, Markov");
  panel.end();
}

function digits(x, n = 4) {
  const text = Math.abs(x).toFixed(n);
  return x < 0 && Number(text) ? `−${text}` : text;
}

function html(name) {
  return name.replace(/_(.)/g, "<sub>$1</sub>");
}

function writeNumbers(m) {
  const { t, s, settings, linear, markov, endS, measured } = m;
  const row = (name, alpha, sigma, time, end) =>
    `<tr><th scope="row">${html(name)}</th><td>${digits(alpha, 3)}</td><td>${digits(sigma, 3)}</td>` +
    `<td>${digits(time, 1)}</td><td>${digits(end[0], 3)}, ${digits(end[1], 3)}</td>` +
    `<td>${digits(distance(end, endS))}</td></tr>`;
  document.getElementById("explorer-points").innerHTML = [
    row("x_s", schedule.alpha[s], schedule.sigma[s], s, endS),
    row("x_t", schedule.alpha[t], schedule.sigma[t], t, m.endT),
    row("x_γ, linear σ", linear.alpha, linear.sigma, linear.time, linear.end),
    row("x_γ, Markov σ", markov.alpha, markov.sigma, markov.time, markov.end),
  ].join("");
  const facts = {
    "drift ratio r = α_t/α_s": m.r,
    "σ_γ linear − Markov (Eq. 25)": linear.sigma - markov.sigma,
    "noise in x_γ, measured": measured,
    "line to PF-ODE, farthest: in x": m.bendX,
    "line to PF-ODE, farthest: in z": m.bendZ,
  };
  document.getElementById("explorer-facts").innerHTML = Object.entries(facts)
    .map(([name, value]) => `<tr><th scope="row">${html(name)}</th><td>${digits(value)}</td></tr>`)
    .join("");
  document.getElementById("explorer-said").innerHTML = html(
    `At γ = ${settings.gamma.toFixed(2)}, x_γ holds the noise ${digits(measured)}. The linear σ is off by ` +
      `${digits(linear.sigma - measured)}, the Markov σ by ${digits(markov.sigma - measured)}. From x_γ the PF-ODE ends ` +
      `${digits(distance(linear.end, endS))} from the end of x_s if it starts with the linear σ, ` +
      `${digits(distance(markov.end, endS))} with the Markov σ.`,
  );
}

// --------------------------------------------------------------------------------------------------------------------
// 4  The controls
//
// The form is the state: its elements hold the settings, their ranges and their first values. A link's fragment,
// "#explorer?t=599&k=100", names the elements that differ from these.
// --------------------------------------------------------------------------------------------------------------------

const form = document.getElementById("explorer-form");
const field = form.elements;

/** The settings of the form, numbers as numbers; what was typed out of range counts as the border. */
function readForm() {
  field.x0.max = mixtures[field.mixture.value].means.length - 1;
  const settings = {};
  for (const { name, value, min, max } of field) {
    if (name) settings[name] = max ? Math.min(Math.max(Number(value), Number(min)), Number(max)) : value;
  }
  settings.x0 = Math.round(settings.x0);
  return settings;
}

/** Everything anew, from the form. */
function update() {
  const settings = readForm();
  const m = measure(settings);
  for (const name of ["gamma", "t", "k", "m"]) document.getElementById(`ex-${name}-out`).value = settings[name];
  field.m.disabled = settings.coupling === "markov"; // no solver there
  drawSpace("x", m);
  drawSpace("z", m);
  drawSigma(m);
  drawEnds(m);
  writeNumbers(m);
}

/** Put x_t where the panel shows the point p, by changing the noise. */
function moveTo(panel, p) {
  const { t, mixture, x0 } = readForm();
  const [alpha, sigma] = [schedule.alpha[t], schedule.sigma[t]];
  const x = panel === panels.x ? p : scaled(alpha, p);
  const noise = combine(1 / sigma, x, -alpha / sigma, mixtures[mixture].means[x0]);
  [field.e1.value, field.e2.value] = noise.map((e) => Math.min(Math.max(e, -3), 3).toFixed(3)); // as readForm does
  update();
}

for (const panel of [panels.x, panels.z]) {
  const { handle, svg } = panel;
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    panel.frozen = true;
    handle.focus({ preventScroll: true });
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!panel.frozen) return;
    const box = svg.getBoundingClientRect();
    const scale = SIZE / box.width;
    moveTo(panel, panel.from([(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]));
  });
  for (const over of ["pointerup", "pointercancel"]) {
    handle.addEventListener(over, () => {
      panel.frozen = false;
      update();
    });
  }
  handle.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault(); // the page would scroll
    const { t, xT } = last.solved;
    const here = panel === panels.x ? xT : scaled(1 / schedule.alpha[t], xT);
    moveTo(panel, combine(1, here, ((event.shiftKey ? 5 : 1) * (panel.high[0] - panel.low[0])) / 60, way));
  });
}

const PLAY_TIME = 4000;
const playButton = document.getElementById("explorer-play");
let playing = 0; // the timer of the next picture, or 0

function stop() {
  clearTimeout(playing);
  playing = 0;
  playButton.textContent = "Play γ";
}

/** γ from 0 to 1 in PLAY_TIME milliseconds. */
function play(begun) {
  const gamma = Math.min(1, (performance.now() - begun) / PLAY_TIME);
  field.gamma.value = gamma;
  update();
  if (gamma < 1) playing = setTimeout(play, 40, begun);
  else stop();
}

playButton.addEventListener("click", () => {
  if (playing) return stop();
  playButton.textContent = "Stop";
  play(performance.now());
});

form.addEventListener("input", (event) => {
  if (event.target.name === "gamma") stop();
  update();
});
form.addEventListener("submit", (event) => event.preventDefault());

/** Take over the settings of the URL's fragment, if it is one of ours. */
function readFragment() {
  const [place, text] = location.hash.split("?");
  if (place !== "#explorer" || text === undefined) return;
  stop();
  form.reset();
  for (const [name, value] of new URLSearchParams(text)) {
    if (field[name]) field[name].value = value;
  }
  update();
  document.getElementById("explorer").scrollIntoView();
}

window.addEventListener("hashchange", readFragment);
document.getElementById("explorer").addEventListener("click", (event) => {
  // A link to where the address already points changes nothing, so the browser would not tell of it.
  if (event.target.hash === location.hash) readFragment();
});
update();
readFragment();
