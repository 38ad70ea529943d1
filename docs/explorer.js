"use strict";
// The sub-path explorer: one sub-path of the PF-ODE, drawn and measured while the reader turns the knobs.
//
// The first part repeats functions of splam.py and toy/distributions.py under the same names, for one point of the
// plane in the place of a batch. Here the teacher's ε is known in closed form, so nothing is trained and nothing is
// loaded. tests/test_explorer.py runs this file in a browser and holds its numbers against those of the Python code.
//
//     1  The mathematics          eps, endpoint, timeAt, multipleEstimation, secondOrderEstimation, subPathPoint
//     2  One setting, measured    measure
//     3  The pictures             Panel, and a function for each of the four
//     4  The controls             the form is the state; the URL's fragment is a copy of the form
//
// Notation as in splam.py: t, s start and end of a sub-path; r = α_t/α_s; ρ = σ/α; z = x/α. A point is [x, y].

const data = JSON.parse(document.getElementById("explorer-data").textContent);
const schedule = { alpha: data.alphas, sigma: data.sigmas };

// --------------------------------------------------------------------------------------------------------------------
// 1  The mathematics
// --------------------------------------------------------------------------------------------------------------------

/** a p + b q, for points p and q. */
function combine(a, p, b, q) {
  return [a * p[0] + b * q[0], a * p[1] + b * q[1]];
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
  // Far from all components every density underflows to 0. Relative to that of the nearest one, one of them is 1.
  let nearest = Infinity;
  for (const mean of mixture.means) {
    nearest = Math.min(nearest, (alpha * mean[0] - x[0]) ** 2 + (alpha * mean[1] - x[1]) ** 2);
  }
  let sum = 0;
  let first = 0;
  let second = 0;
  for (const mean of mixture.means) {
    const offset0 = alpha * mean[0] - x[0];
    const offset1 = alpha * mean[1] - x[1];
    const weight = Math.exp((nearest - offset0 ** 2 - offset1 ** 2) / (2 * variance));
    sum += weight;
    first += weight * offset0;
    second += weight * offset1;
  }
  const factor = -sigma / (variance * sum);
  return [factor * first, factor * second];
}

/** The teacher: (x, t) -> [x_0, ε], by Eq. 8. */
function denoiser(mixture) {
  return (x, t) => {
    const [alpha, sigma] = [schedule.alpha[t], schedule.sigma[t]];
    const noise = eps(mixture, x, alpha, sigma);
    return [combine(1 / alpha, x, -sigma / alpha, noise), noise];
  };
}

// Dormand and Prince's Runge-Kutta method of order 5. Each row of STAGES weighs the slopes so far; the last row is the
// step itself. ERROR weighs the slopes to the difference from a method of order 4, which says how long a step may be.
const STAGES = [
  [1 / 5],
  [3 / 40, 9 / 40],
  [44 / 45, -56 / 15, 32 / 9],
  [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
  [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
  [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
];
const PLACES = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1];
const ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40];
const TOLERANCE = 1e-7;

/**
 * The PF-ODE's way from x, at the noise level of (α, σ), to the data: a list of {rho, z, slope} down to ρ = 0.
 *
 * In z = x/α the ODE is dz/dρ = ε, and no noise schedule is left in it. So (α, σ) need not belong to an integer time,
 * nor have α² + σ² = 1: a point inside a sub-path can be read with either σ.
 */
function trajectory(mixture, x, alpha, sigma) {
  const slopeAt = (rho, z) => {
    const unit = 1 / Math.hypot(1, rho);
    return eps(mixture, combine(unit, z, 0, z), unit, rho * unit);
  };
  let [rho, z] = [sigma / alpha, combine(1 / alpha, x, 0, x)];
  let slope = slopeAt(rho, z);
  let length = rho / 50;
  const path = [{ rho, z, slope }];
  while (rho > 0) {
    length = Math.min(length, rho);
    const slopes = [slope];
    let next;
    STAGES.forEach((weights, i) => {
      next = weights.reduce((sum, weight, j) => combine(1, sum, -length * weight, slopes[j]), z);
      slopes.push(slopeAt(rho - length * PLACES[i], next));
    });
    const error = ERROR.reduce((sum, weight, j) => combine(1, sum, length * weight, slopes[j]), [0, 0]);
    const relative = Math.hypot(...error) / (TOLERANCE * (1 + Math.hypot(...z)));
    if (relative <= 1) {
      rho = rho - length < 1e-12 ? 0 : rho - length;
      z = next;
      slope = slopes.at(-1);
      path.push({ rho, z, slope });
    }
    length *= Math.min(5, Math.max(0.2, 0.9 * (relative + 1e-10) ** -0.2));
  }
  return path;
}

/** Where the PF-ODE takes x: the last point of its trajectory. */
function endpoint(mixture, x, alpha, sigma) {
  return trajectory(mixture, x, alpha, sigma).at(-1).z;
}

/** The real-valued time t' with the noise-to-signal ratio σ/α; between integer times it is linear in log ρ. */
function timeAt(alpha, sigma) {
  const logRatio = (t) => Math.log(schedule.sigma[t] / schedule.alpha[t]);
  const last = schedule.alpha.length - 1;
  const wanted = Math.min(Math.max(Math.log(sigma / alpha), logRatio(0)), logRatio(last));
  let [before, after] = [0, last];
  while (after - before > 1) {
    const middle = (before + after) >> 1;
    if (logRatio(middle) < wanted) before = middle;
    else after = middle;
  }
  return before + (wanted - logRatio(before)) / (logRatio(after) - logRatio(before));
}

/** Eq. 18: the points {t, x} of the teacher's way by DDIM steps from x_t, the first, to x_s, the last. */
function multipleEstimation(denoise, x, t, s, k, solverStep) {
  const points = [{ t, x }];
  for (let i = 0; i < Math.ceil(k / solverStep); i++) {
    t = Math.max(t - solverStep, s);
    const [x0, noise] = denoise(x, points.at(-1).t);
    x = combine(schedule.alpha[t], x0, schedule.sigma[t], noise);
    points.push({ t, x });
  }
  return points;
}

/** The same by DPM-Solver++ (2S): DDIM to the middle of the step, then the whole step with an x_0 from there. */
function secondOrderEstimation(denoise, x, t, s, k, solverStep) {
  const { alpha, sigma } = schedule;
  const logRatio = (time) => Math.log(alpha[time] / sigma[time]);
  const points = [{ t, x }];
  for (let i = 0; i < Math.ceil(k / solverStep); i++) {
    const next = Math.max(t - solverStep, s);
    if (next < t) {
      const half = timeAt(Math.sqrt(alpha[t] * alpha[next]), Math.sqrt(sigma[t] * sigma[next]));
      const middle = Math.max(Math.min(Math.round(half), t - 1), next);
      const [x0, noise] = denoise(x, t);
      const [x0Middle] = denoise(combine(alpha[middle], x0, sigma[middle], noise), middle);
      const share = (logRatio(next) - logRatio(t)) / (2 * (logRatio(middle) - logRatio(t)));
      const x0Whole = combine(1 - share, x0, share, x0Middle);
      const noiseWhole = combine(1 / sigma[t], x, -alpha[t] / sigma[t], x0Whole);
      x = combine(alpha[next], x0Whole, sigma[next], noiseWhole);
    }
    t = next;
    points.push({ t, x });
  }
  return points;
}

const SOLVERS = { ddim: multipleEstimation, "dpmsolver++": secondOrderEstimation };

/** x_γ on the line between the ends of a sub-path, with its signal and its noise: Eq. 12 to 14, 24, 26 to 28. */
function subPathPoint(xT, xS, t, s, gamma, ode, sigmaForm) {
  const [alphaT, sigmaT, alphaS, sigmaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]];
  const r = alphaT / alphaS;
  // The end of the line: r x_s, which has the signal of x_t, or x_s itself (DL). It holds the noise `shrink` σ_s.
  const shrink = ode === "sl" ? r : 1;
  const x = combine((1 - gamma) * shrink, xS, gamma, xT);
  const alpha = (1 - gamma) * shrink * alphaS + gamma * alphaT;
  // Linear: both ends have the same noise, so its coefficients are on a line. Markov: x_t is r x_s plus fresh noise
  // that x_s knows nothing of. Then variances add; 1 - r² = σ_t² - r² σ_s² is that of the fresh noise (Eq. 20).
  const sigma =
    sigmaForm === "approx"
      ? (1 - gamma) * shrink * sigmaS + gamma * sigmaT
      : Math.hypot(((1 - gamma) * shrink + gamma * r) * sigmaS, gamma * Math.sqrt(sigmaT ** 2 - (r * sigmaS) ** 2));
  return { x, alpha, sigma };
}

// --------------------------------------------------------------------------------------------------------------------
// 2  One setting, measured
// --------------------------------------------------------------------------------------------------------------------

const DRAWS = 2000; // their spread is then within about 2 % of the true one
const SHOWN_DRAWS = 400;
const GAMMAS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1];

/** Standard normal points that are the same for the same seed: a picture must not flicker while γ moves. */
function normalPoints(n, seed) {
  let state = seed;
  const uniform = () => {
    // mulberry32, a small generator of random numbers
    state = (state + 0x6d2b79f5) | 0;
    let h = Math.imul(state ^ (state >>> 15), 1 | state);
    h = (h + Math.imul(h ^ (h >>> 7), 61 | h)) ^ h;
    return ((h ^ (h >>> 14)) >>> 0) / 2 ** 32;
  };
  return Array.from({ length: n }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    return [radius * Math.cos(angle), radius * Math.sin(angle)];
  });
}

/** What does not depend on γ: the ends of the sub-path, the solver's steps, the trajectory and the draws. */
function solve(settings) {
  const { t, k, m, ode, coupling } = settings;
  const mixture = data.mixtures[settings.mixture];
  const s = Math.max(t - k, 0);
  const [alphaT, sigmaT, alphaS, sigmaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]];
  const r = alphaT / alphaS;
  const x0 = mixture.means[settings.x0];
  const xT = combine(alphaT, x0, sigmaT, settings.eps); // Eq. 1
  const [x0Hat, epsHat] = denoiser(mixture)(xT, t);
  const solved = { t, k, s, r, mixture, x0, xT, x0Hat, epsHat, steps: [], draws: [], ode, coupling };

  if (coupling === "ddim") {
    const step = Math.ceil(k / m);
    solved.steps = SOLVERS[settings.solver](denoiser(mixture), xT, t, s, k, step);
    solved.xS = solved.steps.at(-1).x;
  } else {
    const [first, ...noises] = normalPoints(2 * DRAWS + 1, settings.seed);
    // The pair that is drawn as a line: x_s from its distribution given x_t and x_0.
    const fresh = (sigmaS / sigmaT) * Math.sqrt(1 - r * r);
    const noise = combine(Math.sqrt(sigmaS ** 2 - fresh ** 2), settings.eps, fresh, first);
    solved.xS = combine(alphaS, x0, 1, noise);
    // Many pairs given x_0, made in the order of Eq. 20: first x_s, then x_t by fresh noise.
    solved.draws = Array.from({ length: DRAWS }, (_, i) => {
      const xS = combine(alphaS, x0, sigmaS, noises[2 * i]);
      return { xS, xT: combine(r, xS, Math.sqrt(1 - r * r), noises[2 * i + 1]) };
    });
  }
  solved.path = trajectory(mixture, xT, alphaT, sigmaT);
  solved.endT = solved.path.at(-1).z;
  solved.endS = endpoint(mixture, solved.xS, alphaS, sigmaS);
  solved.measured = GAMMAS.map((gamma) => ({ gamma, sigma: measuredSigma(solved, gamma) }));
  // The picture of the ends has one scale for all γ, so that it does not jump while γ moves.
  const away = ["approx", "exact"].map((form) => {
    const { x, alpha, sigma } = subPathPoint(xT, solved.xS, t, s, 0.5, ode, form);
    return distance(endpoint(mixture, x, alpha, sigma), solved.endS);
  });
  solved.farthest = Math.max(distance(solved.endT, solved.endS), ...away);
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
    const { x, alpha } = subPathPoint(xT, xS, t, s, gamma, ode, "approx");
    return dot(combine(1, x, -alpha, x0Hat), epsHat) / dot(epsHat, epsHat);
  }
  let sum = 0;
  for (const pair of draws) {
    const { x, alpha } = subPathPoint(pair.xT, pair.xS, t, s, gamma, ode, "approx");
    sum += distance(x, combine(alpha, x0, 0, x0)) ** 2;
  }
  return Math.sqrt(sum / (2 * draws.length));
}

/** The point of a trajectory at noise-to-signal ratio ρ: Hermite's cubic between two steps of the ODE solver. */
function pointAt(path, rho) {
  const i = Math.max(1, path.findIndex((point) => point.rho <= rho));
  const [a, b] = [path[i - 1], path[i]];
  const h = b.rho - a.rho;
  const u = (rho - a.rho) / h;
  const ends = combine((1 + 2 * u) * (1 - u) ** 2, a.z, u * u * (3 - 2 * u), b.z);
  return combine(1, ends, h, combine(u * (1 - u) ** 2, a.slope, u * u * (u - 1), b.slope));
}

/** n + 1 points {rho, z} of a trajectory between two ρ, evenly in log(1 + ρ/0.1): near the data it bends most. */
function samplePath(path, from, to, n) {
  const scale = (rho) => Math.log(1 + rho / 0.1);
  return Array.from({ length: n + 1 }, (_, i) => {
    const rho = 0.1 * Math.expm1(scale(from) + ((scale(to) - scale(from)) * i) / n);
    return { rho, z: pointAt(path, Math.min(from, Math.max(to, rho))) };
  });
}

/** x = α z, with the α of the process at this ρ. */
function toX({ rho, z }) {
  return combine(1 / Math.hypot(1, rho), z, 0, z);
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
  const key = JSON.stringify({ ...settings, gamma: 0, sigma: "", view: "" });
  if (last.key !== key) last = { key, solved: solve(settings) };
  const solved = last.solved;
  const { t, s, r, xT, xS, mixture, path } = solved;
  const { gamma, ode } = settings;
  const [alphaT, alphaS] = [schedule.alpha[t], schedule.alpha[s]];
  const forms = {};
  for (const form of ["approx", "exact"]) {
    const point = subPathPoint(xT, xS, t, s, gamma, ode, form);
    const way = trajectory(mixture, point.x, point.alpha, point.sigma);
    forms[form] = { ...point, time: timeAt(point.alpha, point.sigma), way, end: way.at(-1).z };
  }
  const [rhoT, rhoS] = [schedule.sigma[t] / alphaT, schedule.sigma[s] / alphaS];
  const piece = samplePath(path, rhoT, rhoS, 40);
  const [zT, zS] = [combine(1 / alphaT, xT, 0, xT), combine(1 / alphaS, xS, 0, xS)];
  const lineEnd = combine(ode === "sl" ? r : 1, xS, 0, xS);
  return {
    ...solved,
    settings,
    forms,
    told: forms[settings.sigma],
    piece,
    zT,
    zS,
    lineEnd,
    measuredHere: measuredSigma(solved, gamma),
    bendX: Math.max(...piece.map((point) => fromLine(toX(point), xT, lineEnd))),
    bendZ: Math.max(...piece.map((point) => fromLine(point.z, zT, zS))),
  };
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

/** The largest of 1, 2, 5 times a power of ten that is not above x. */
function niceBelow(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return [5, 2, 1].map((digit) => digit * power).find((step) => step <= x * (1 + 1e-9));
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
      const step = niceBelow((this.high[i] - this.low[i]) / 3);
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
    if (x + size < LEFT || x - size > SIZE - EDGE || y + size < EDGE || y - size > SIZE - BOTTOM) return;
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
          const [c, s] = [Math.cos((side * Math.PI) / 6), Math.sin((side * Math.PI) / 6)];
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
      this.parts.push(
        `<text class="name" x="${best.cx}" y="${best.cy + 5}" text-anchor="middle">${withSubscripts(name)}</text>`,
      );
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
  const place = (x, alpha) => (letter === "x" ? x : combine(1 / alpha, x, 0, x));
  const { t, s, r, settings, mixture, told } = m;
  const [alphaT, sigmaT, alphaS] = [schedule.alpha[t], schedule.sigma[t], schedule.alpha[s]];
  const onPath = (point) => place(toX(point), 1 / Math.hypot(1, point.rho));
  const start = place(m.xT, alphaT);
  const [end, shrunk] = [place(m.xS, alphaS), place(combine(r, m.xS, 0, m.xS), alphaT)];
  const sl = settings.ode === "sl";

  if (!panel.frozen) {
    // Frozen while x_t is dragged: the picture must not move away under the pointer.
    const seen = [start, end, shrunk, ...m.steps.map((step) => place(step.x, schedule.alpha[step.t]))];
    if (m.draws.length) {
      const centre = place(combine(alphaT, m.x0, 0, m.x0), alphaT);
      const reach = (2.2 * sigmaT) / (letter === "x" ? 1 : alphaT);
      seen.push(combine(1, centre, reach, [1, 1]), combine(1, centre, -reach, [1, 1]));
    }
    if (settings.view === "whole") {
      for (const mean of mixture.means) {
        seen.push(combine(1, mean, 3 * mixture.std, [1, 1]), combine(1, mean, -3 * mixture.std, [1, 1]));
      }
    }
    panel.fit(seen);
  }
  panel.axes();
  for (const mean of mixture.means) panel.circle(mean, 2 * mixture.std, "component");

  if (m.draws.length) {
    const cloud = m.draws.slice(0, SHOWN_DRAWS).map((pair) => {
      const point = subPathPoint(pair.xT, pair.xS, t, s, settings.gamma, settings.ode, "approx");
      return place(point.x, point.alpha);
    });
    panel.dots(cloud, "draws");
    // A circle of this radius holds half of a Gaussian cloud with deviation σ.
    for (const form of ["exact", "approx"]) {
      const radius = Math.sqrt(2 * Math.log(2)) * m.forms[form].sigma;
      const centre = place(combine(told.alpha, m.x0, 0, m.x0), told.alpha);
      panel.circle(centre, letter === "x" ? radius : radius / told.alpha, form);
    }
  }
  panel.curve(samplePath(m.path, m.path[0].rho, 0, 200).map(onPath), "ode");
  panel.curve(m.piece.map(onPath), "ode piece");
  panel.curve(m.steps.map((step) => place(step.x, schedule.alpha[step.t])), "step");
  if (letter === "x") {
    panel.curve([start, sl ? end : shrunk], "chord other");
    panel.curve([end, shrunk], "shrink");
  } else {
    for (const form of ["approx", "exact"]) {
      const { way } = m.forms[form];
      panel.curve(samplePath(way, way[0].rho, 0, 100).map(onPath), form);
    }
  }
  panel.curve([start, sl ? shrunk : end], "chord");

  panel.mark(place(m.x0, 1), "plus", "ink", "x_0");
  panel.mark(m.endT, "disc", "blue");
  for (const step of m.steps.slice(1, -1)) panel.mark(place(step.x, schedule.alpha[step.t]), "small-square", "gray");
  panel.mark(start, "disc", "full", `${letter}_t`);
  if (letter === "x") {
    panel.mark(end, "square", "red", "x_s");
    panel.mark(shrunk, "square", "red", "r x_s");
  } else {
    panel.mark(end, "square", "red", "z_s");
  }
  panel.mark(place(told.x, told.alpha), "diamond", "full", `${letter}_γ`);
  const [hx, hy] = panel.at(start);
  panel.handle.setAttribute("transform", `translate(${hx} ${hy})`);
  panel.handle.setAttribute("aria-valuenow", start[0].toFixed(3));
  panel.handle.setAttribute("aria-valuetext", `${start[0].toFixed(3)} across, ${start[1].toFixed(3)} up`);
  panel.end();
}

/** Both forms of σ_γ over γ, and the noise that is measured. */
function drawSigma(m) {
  const panel = panels.sigma;
  const { t, s, settings } = m;
  const over = Array.from({ length: 51 }, (_, i) => i / 50);
  const sigmas = {};
  for (const form of ["approx", "exact"]) {
    sigmas[form] = over.map((gamma) => [gamma, subPathPoint(m.xT, m.xS, t, s, gamma, settings.ode, form).sigma]);
  }
  const heights = [...sigmas.approx, ...sigmas.exact].map((p) => p[1]).concat(m.measured.map((p) => p.sigma));
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  panel.show([-0.05, low - 0.12 * (high - low)], [1.05, high + 0.12 * (high - low)]);
  panel.axes();
  panel.curve([[settings.gamma, panel.low[1]], [settings.gamma, panel.high[1]]], "now");
  for (const form of ["approx", "exact"]) panel.curve(sigmas[form], form);
  for (const { gamma, sigma } of m.measured) panel.mark([gamma, sigma], "ring", "ink");
  panel.mark([settings.gamma, m.forms.approx.sigma], "triangle", "approx", "linear");
  panel.mark([settings.gamma, m.forms.exact.sigma], "cross", "exact", "Markov");
  panel.end();
}

/** Where the PF-ODE takes the points. The origin is where it takes x_s. */
function drawEnds(m) {
  const panel = panels.ends;
  const ends = [m.endT, m.forms.approx.end, m.forms.exact.end].map((end) => combine(1, end, -1, m.endS));
  const farthest = Math.max(m.farthest, ...ends.map((end) => Math.hypot(...end)));
  const half = 1.25 * Math.max(farthest, 1e-4);
  panel.show([-half, -half], [half, half]);
  panel.axes();
  for (const mean of m.mixture.means) panel.circle(combine(1, mean, -1, m.endS), 2 * m.mixture.std, "component");
  panel.mark([0, 0], "square", "red", "x_s");
  panel.mark(ends[0], "disc", "blue", "x_t");
  panel.mark(ends[1], "triangle", "approx", "x_γ, linear");
  panel.mark(ends[2], "cross", "exact", "x_γ, Markov");
  panel.end();
}

// --------------------------------------------------------------------------------------------------------------------
// 4  The controls
//
// The form is the state: its elements hold the settings, their ranges and their first values. A link's fragment,
// "#explorer?t=599&k=100", names the elements that differ from these.
// --------------------------------------------------------------------------------------------------------------------

const form = document.getElementById("explorer-form");
const field = form.elements;
const PARAMETERS = [...field].map((element) => element.name).filter((name) => name);

/** Set the form: all elements to their first values, but for those that are named. A link may hold anything. */
function setForm(values) {
  form.reset();
  for (const [name, value] of Object.entries(values)) {
    if (!PARAMETERS.includes(name)) continue;
    const { options } = field[name];
    const number = /^-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;
    const known = options ? [...options].some((option) => option.value === value) : number.test(value);
    if (known) field[name].value = value;
  }
}

/** The settings of the form, numbers as numbers. What is out of range, by hand or by a link, goes to its border. */
function readForm() {
  const means = data.mixtures[field.mixture.value].means;
  field.x0.max = means.length - 1;
  for (const name of ["x0", "e1", "e2", "seed"]) {
    const { min, max, value, defaultValue } = field[name];
    const number = value === "" ? Number(defaultValue) : Number(value);
    const inside = Math.min(Math.max(number, Number(min)), Number(max));
    if (inside !== Number(value)) field[name].value = inside;
  }
  const number = (name) => Number(field[name].value);
  return {
    mixture: field.mixture.value,
    x0: Math.round(number("x0")),
    eps: [number("e1"), number("e2")],
    t: number("t"),
    k: number("k"),
    m: number("m"),
    solver: field.solver.value,
    gamma: number("gamma"),
    ode: field.ode.value,
    sigma: field.sigma.value,
    coupling: field.coupling.value,
    view: field.view.value,
    seed: Math.round(number("seed")),
  };
}

/** The fragment of the present setting. */
function linkToForm() {
  const start = ({ defaultValue, options }) => defaultValue ?? [...options].find((each) => each.defaultSelected).value;
  const changed = PARAMETERS.filter((name) => field[name].value !== start(field[name]));
  return `#explorer?${new URLSearchParams(changed.map((name) => [name, field[name].value]))}`;
}

function digits(x, n = 4) {
  return x.toFixed(n).replace(/^-(?=.*[1-9])/, "−").replace("-", ""); // and no −0.0000
}

function writeNumbers(m) {
  const { t, s, settings, forms, endS } = m;
  const { approx, exact } = forms;
  const html = (name) => name.replace(/_(.)/g, "<sub>$1</sub>");
  const row = (name, alpha, sigma, time, end, isTold) =>
    `<tr${isTold ? ' class="told"' : ""}><th scope="row">${html(name)}</th><td>${digits(alpha, 3)}</td>` +
    `<td>${digits(sigma, 3)}</td><td>${digits(time, time % 1 ? 1 : 0)}</td>` +
    `<td>${digits(end[0], 3)}, <wbr>${digits(end[1], 3)}</td><td>${digits(distance(end, endS))}</td></tr>`;
  document.getElementById("explorer-points").innerHTML = [
    row("x_s", schedule.alpha[s], schedule.sigma[s], s, endS, false),
    row("x_t", schedule.alpha[t], schedule.sigma[t], t, m.endT, false),
    row("x_γ, linear σ", approx.alpha, approx.sigma, approx.time, approx.end, settings.sigma === "approx"),
    row("x_γ, Markov σ", exact.alpha, exact.sigma, exact.time, exact.end, settings.sigma === "exact"),
  ].join("");
  const facts = [
    ["drift ratio r = α_t/α_s", digits(m.r)],
    ["σ_γ linear − Markov (Eq. 25)", digits(approx.sigma - exact.sigma)],
    ["noise in x_γ, measured", digits(m.measuredHere)],
    ["… linear σ is off by", digits(approx.sigma - m.measuredHere)],
    ["… Markov σ is off by", digits(exact.sigma - m.measuredHere)],
    ["line to PF-ODE, farthest: in x", digits(m.bendX)],
    ["line to PF-ODE, farthest: in z", digits(m.bendZ)],
  ];
  document.getElementById("explorer-facts").innerHTML = facts
    .map(([name, value]) => `<tr><th scope="row">${html(name)}</th><td>${value}</td></tr>`)
    .join("");
  const name = settings.sigma === "approx" ? "linear" : "Markov";
  const measured = settings.coupling === "ddim" ? "x_γ − α_γ x̂_0 holds the noise" : "The draws’ spread is";
  const apart = settings.coupling === "ddim" ? "" : " (a Markov pair lies on two trajectories, with two ends)";
  const [fromApprox, fromExact] = [approx, exact].map(({ end }) => digits(distance(end, endS)));
  return html(
    `At γ = ${settings.gamma.toFixed(2)} the student is told t′ = ${m.told.time.toFixed(1)}, by the ${name} σ. ` +
      `${measured} ${digits(m.measuredHere)}; the linear σ is off by ${digits(approx.sigma - m.measuredHere)}, ` +
      `the Markov σ by ${digits(exact.sigma - m.measuredHere)}. From x_γ the PF-ODE ends ${fromApprox} from the end ` +
      `of x_s if it starts with the linear σ, ${fromExact} with the Markov σ${apart}.`,
  );
}

let saying = 0;

/** Everything anew, from the form. */
function update() {
  const settings = readForm();
  const m = measure(settings);
  for (const name of ["gamma", "t", "k", "m"]) {
    document.getElementById(`ex-${name}-out`).value = name === "gamma" ? settings.gamma.toFixed(2) : settings[name];
  }
  // What the other coupling does not use stays where it is, and cannot be changed.
  field.m.disabled = field.solver.disabled = settings.coupling === "markov";
  field.seed.disabled = settings.coupling === "ddim";
  drawSpace("x", m);
  drawSpace("z", m);
  drawSigma(m);
  drawEnds(m);
  const sentence = writeNumbers(m);
  // A screen reader reads this aloud. It should do so when the reader has stopped turning, not at each step.
  clearTimeout(saying);
  saying = setTimeout(() => (document.getElementById("explorer-said").innerHTML = sentence), 250);
  document.getElementById("explorer-link").setAttribute("href", linkToForm());
  return m;
}

/** Put x_t where the panel shows the point p, by changing the noise. */
function moveTo(panel, p) {
  const { t, eps: before, mixture, x0 } = readForm();
  const [alpha, sigma] = [schedule.alpha[t], schedule.sigma[t]];
  const x = panel === panels.x ? p : combine(alpha, p, 0, p);
  const noise = combine(1 / sigma, x, -alpha / sigma, data.mixtures[mixture].means[x0]);
  [field.e1.value, field.e2.value] = noise.map((e, i) => (Number.isFinite(e) ? e : before[i]).toFixed(3));
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
    const here = panel === panels.x ? xT : combine(1 / schedule.alpha[t], xT, 0, xT);
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

/** For tests/test_explorer.py: what the formulas gave, as numbers. */
function numbers({ settings, s, xT, xS, x0, epsHat, endT, endS, forms, measuredHere }) {
  for (const form of Object.values(forms)) delete form.way;
  return { settings, s, xT, xS, x0, eps: epsHat, endT, endS, measured: measuredHere, forms };
}

/** Take over the settings of the URL's fragment, if it is one of ours. */
function readFragment() {
  const [place, text] = location.hash.split("?");
  if (place !== "#explorer" || text === undefined) return;
  const values = new URLSearchParams(text);
  if (values.has("dump")) {
    const list = JSON.parse(values.get("settings") ?? "[{}]");
    const dump = document.createElement("pre");
    dump.id = "explorer-numbers";
    dump.textContent = JSON.stringify(list.map((each) => (setForm(each), numbers(update()))));
    document.body.append(dump);
    return;
  }
  stop();
  setForm(Object.fromEntries(values));
  update();
  const section = document.getElementById("explorer");
  const { top, bottom } = section.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight) section.scrollIntoView();
}

window.addEventListener("hashchange", readFragment);
document.addEventListener("click", (event) => {
  // A link to where the address already points changes nothing, so the browser would not tell of it.
  if (event.target.closest?.("a")?.hash === location.hash) readFragment();
});
update();
readFragment();
