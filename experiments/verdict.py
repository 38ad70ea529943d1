"""python -m experiments.verdict

Do the paper's claims hold? Each says that one student, A, is ahead of another, B, or behind it, or level with it. All
are decided from the records in results/ by one rule, whomever it favours; then printed as a table, and drawn.

The rule. Each seed that A and B share gives a ratio A / B of their errors. The logarithms of these ratios have a mean,
and a 95 % confidence interval by Student's t (the paired t-test). A is *ahead* if all of the interval is below a ratio
of 1, *behind* if it is above, and else *level*: no difference was seen. Two seeds are too few for a word.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

from cli import Parser, program
from toy.plots import MARKERS, WIDTH, plt

RESULTS = Path(__file__).parent / "results"
# What students are measured by: how the names of the records on these data end, and the column there. In four steps W2
# is hardly larger than between two samples of the data. So the error of one step stands beside it.
MEASURES = {
    "2-D, map error": ("", "map error"),
    "2-D, W2": ("", "W2, 4 steps"),
    "CIFAR-10, FD": ("-cifar16", "FD, 4 steps"),
    "text to image, FD": ("-tiny-sd", "FD, 4 steps"),
}
# What a claim may say, and the words of the rule that are then in its favour.
FITTING = {"ahead of": ["ahead"], "behind": ["behind"], "level with": ["level"], "not behind": ["ahead", "level"]}
FEW, TICKS = "too few seeds", [0.125, 0.25, 0.5, 1, 2, 4, 8, 16]

# ---------------------------------------------------------------------------------------------------------------------
# The claims
# ---------------------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A against B, by the names that a record gives them. "X / Y" is how many times larger the error of X is."""

    source: str  # of the claim: in the paper, or "ours"
    text: str
    says: str  # one of FITTING, which stands in the place of {}
    a: str
    b: str
    record: str = "tab3"
    measure: str = ""  # another than those above, which only some records have
    a_steps: str = ""  # if they are not the four of B
    after: float = 1  # this part of the training


# The names are those of table.py, so that an experiment that is repeated is read here without a change. SL and SPLAM
# are the same student there, the paper's, with its embedding of γ. Where a name has no k, it is 100.
GROWTH = "SPLAM, k = 200 / SPLAM, k = 50", "LCM, k = 200 / LCM, k = 50"
NARROW = "SPLAM, t': 32 units, not 128", "LCM: 32 units, not 128", "decides-width"
LARGE, NONE = "SPLAM, w = 8", "SPLAM, w = 0"
SOLVER, SUM = "decides-solver", "sum of neighbours"
HALF, SECOND = "SPLAM, t', half: DDIM x 5", "SPLAM, t', half, second order"
AHEAD, BEHIND, LEVEL, NOT_BEHIND = FITTING
PAPER = [
    # k = 20 for both on SD2.1-base; on SD1.5 SPLAM has 100, and with w = 8 its two steps surpass LCM's four (Section
    # 5.1.2).
    Claim("Table 1", "SPLAM {} LCM, both k = 20", AHEAD, "SL, k = 20", "LCM, k = 20"),
    Claim("Table 2", "SPLAM {} LCM at k = 20", AHEAD, "SL, k = 100", "LCM, k = 20"),
    Claim("Table 2", "SPLAM in 2 steps {} LCM at k = 20 in 4", AHEAD, "SL, k = 100", "LCM, k = 20", a_steps="2 steps"),
    # Appendix C: DL "surely outperforms LCM", and SL, with the drift r in its line, DL.
    Claim("Table 3", "SL {} DL", AHEAD, "SL, k = 100", "DL, k = 100"),
    Claim("Table 3", "DL {} LCM at k = 20", AHEAD, "DL, k = 100", "LCM, k = 20"),
    # Section 5.2: with k, "LCM suffers a more drastic decline", as long as a sub-path is solved in one step. In more of
    # them SPLAM is "stably maintaining high image fidelity with large steps".
    Claim("Fig. 2(a)", "SPLAM {} LCM in growth, k = 50 to 200, no ME", AHEAD, *GROWTH, "fig2a"),
    Claim("Fig. 2(a)", "SPLAM with ME {} SPLAM without", AHEAD, "SPLAM + ME, k = 100", "SPLAM, k = 100", "fig2a"),
    Claim("Fig. 2(a)", "SPLAM {} SPLAM, k = 20", AHEAD, "SL, k = 100", "SL, k = 20"),
    Claim("Fig. 2(a)", "SPLAM, k = 200, {} k = 100", NOT_BEHIND, "SPLAM + ME, k = 200", "SPLAM + ME, k = 100", "fig2a"),
    # "Our metrics initially converge more slowly", then SPLAM surpasses LCM "by a large margin"; k = 100 "brings SPLAM
    # faster convergence".
    Claim("Fig. 2(b)", "SPLAM early {} LCM, both k = 20", BEHIND, "SPLAM, k = 20", "LCM, k = 20", "fig2b", after=1 / 8),
    Claim("Fig. 2(b)", "SPLAM late {} LCM, both k = 20", AHEAD, "SPLAM, k = 20", "LCM, k = 20", "fig2b"),
    Claim("Fig. 2(b)", "SPLAM early {} LCM at k = 20", AHEAD, "SPLAM, k = 100", "LCM, k = 20", "fig2b", after=1 / 8),
    # The sum of |f(x_t, t) - f(x_s, s)| over neighbours, which bounds the error of the whole.
    Claim("Fig. 2(c)", "SPLAM {} LCM in sum, both k = 20", AHEAD, "SPLAM, k = 20", "LCM, k = 20", "fig2c", SUM),
    Claim("Fig. 2(c)", "SPLAM {} LCM in sum", AHEAD, "SPLAM, k = 100", "LCM, k = 100", "fig2c", SUM),
    # A larger w costs FID and follows the prompt better. Fidelity is the probability of the desired class: the more the
    # better, unlike errors, so A and B change places.
    Claim("Fig. 3", "SPLAM, w = 8, {} w = 0 in W2", BEHIND, LARGE, NONE, "fig3", "W2, 4 steps"),
    Claim("Fig. 3", "SPLAM, w = 8, {} w = 0 in fidelity", AHEAD, NONE, LARGE, "fig3", "fidelity, student"),
    # Huber "provides faster convergence".
    Claim("App. A", "SPLAM with Huber {} L2 early", AHEAD, "SPLAM: huber", "SPLAM: l2", "decides-metric"),
    # Training with the approximate σ or with the exact one "yields nearly the same results".
    Claim("App. B", "linear σ {} Markov σ, k = 20", LEVEL, "SL, k = 20", "SL, Markov σ, k = 20"),
    Claim("App. B", "linear σ {} Markov σ", LEVEL, "SL, k = 100", "SL, Markov σ, k = 100"),
]
# What this project adds, as if it claimed that each part helps; LCM with the part that it can have, too; and where the
# records have SPLAM at its best against LCM.
OURS = [
    Claim("ours", "SPLAM, t', {} SPLAM", AHEAD, "SL, t', k = 100", "SL, k = 100"),
    Claim("ours", "SPLAM, t', half, {} t'", AHEAD, "SL, t', half, k = 100", "SL, t', k = 100"),
    Claim("ours", "SPLAM, all three, {} t', half", AHEAD, SECOND, HALF, SOLVER),
    Claim("ours", "LCM, second order, {} LCM", AHEAD, "LCM, second order", "LCM: DDIM x 5", SOLVER),
    Claim("ours", "SPLAM, t', half, {} LCM", AHEAD, "SL, t', half, k = 100", "LCM, k = 100"),
    Claim("ours", "SPLAM, all three, {} LCM, second order", AHEAD, SECOND, "LCM, second order", SOLVER),
    Claim("ours", "SPLAM, t', late {} LCM, both k = 20", AHEAD, "SPLAM, t', k = 20", "LCM, k = 20", "fig2b"),
    Claim("ours", "SPLAM, t', 32 units, {} LCM", AHEAD, *NARROW),
    Claim("ours", "SL, t', {} DL, t'", AHEAD, "SL, t', k = 100", "DL, t', k = 100"),
    Claim("ours", "flow matching: DL {} SL", AHEAD, "DL, k = 100", "SL, k = 100", "flow"),
    Claim("ours", "SPLAM, t', {} LCM in sum", AHEAD, "SPLAM, t', k = 100", "LCM, k = 100", "fig2c", SUM),
    Claim("ours", "all three, Huber, {} L2", AHEAD, f"{SECOND}: huber", f"{SECOND}: l2", "decides-metric"),
    Claim("ours", "t', linear σ, {} Markov σ", AHEAD, "SL, t', k = 100", "SL, Markov σ, t', k = 100"),
]


# ---------------------------------------------------------------------------------------------------------------------
# The records, and the rule
# ---------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the seeds say of A / B: a word; the ratios; their geometric mean, and the ends of its interval."""

    word: str
    ratios: np.ndarray
    mean: float
    low: float
    high: float


def judge(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """The rule, from the errors of A and B, seed by seed."""
    logs, low, high, word = np.log(a) - np.log(b), np.nan, np.nan, FEW
    if len(logs) > 2:
        low, high = ttest_1samp(logs, 0).confidence_interval()  # of 95 %
        word = "ahead" if high < 0 else "behind" if low > 0 else "level"
    return Verdict(word, np.exp(logs), *np.exp([logs.mean(), low, high]).tolist())


def errors(record: str, side: str, column: str, after: float) -> list[float]:
    """Seed by seed, what one side of a claim has in a column after a part of its training; none without a record."""
    student, _, divisor = side.partition(" / ")
    file, values = RESULTS / f"{record}.json", []
    for rows in json.loads(file.read_text())["rows"].get(student, []) if file.is_file() else []:
        # The nearest row: students of unequal cost are measured after unequal numbers of steps.
        values.append(min(rows, key=lambda row: abs(row["step"] - after * rows[-1]["step"]))[column])
    if divisor:
        divisors = errors(record, divisor, column, after)
        values = [value / other for value, other in zip(values, divisors, strict=False)]
    return values


def decide(claim: Claim, measure: str) -> Verdict | None:
    """The verdict by one of MEASURES, or None if no record can say."""
    ending, column = MEASURES[measure]
    if (claim.measure or claim.a_steps) and "4 steps" not in column:
        return None  # the map error is of one step, and no other measure stands for it
    column = claim.measure or column
    column_of_a = column.replace("4 steps", claim.a_steps or "4 steps")
    a = errors(claim.record + ending, claim.a, column_of_a, claim.after)
    b = errors(claim.record + ending, claim.b, column, claim.after)
    seeds = min(len(a), len(b))  # that both have
    return judge(a[:seeds], b[:seeds]) if seeds else None


# ---------------------------------------------------------------------------------------------------------------------
# The table and the picture
# ---------------------------------------------------------------------------------------------------------------------


def sentence(claim: Claim) -> str:
    """The claim in words."""
    return f"{claim.source}: {claim.text.format(claim.says)}".removeprefix("ours: ")


def holds(claim: Claim) -> str:
    """Whether all measures are in the claim's favour, none, or some. Those with too few seeds do not count."""
    # One measure against a claim is enough for "partly": a claim of the paper knows no data set.
    verdicts = [verdict for measure in MEASURES if (verdict := decide(claim, measure))]
    fits = [verdict.word in FITTING[claim.says] for verdict in verdicts if verdict.word != FEW]
    if not fits:
        return FEW if verdicts else "not tested"
    if all(fits):  # that no difference was seen does not show that there is none
        return "not contradicted" if claim.says == LEVEL else "yes"
    return "partly" if any(fits) else "no"


def cell(verdict: Verdict | None) -> str:
    """The word; below it the mean ratio with its deviation over seeds, and in how many seeds A is ahead."""
    if verdict is None:
        return "–"
    wins, n = (verdict.ratios < 1).sum(), len(verdict.ratios)
    return f"{verdict.word}<br>{verdict.mean:.2f}±{verdict.ratios.std(ddof=1):.2f}, {wins}/{n}"


def table(title: str, claims: Sequence[Claim]) -> str:
    """In Markdown, a row for each claim."""
    rows = [[title, *MEASURES, "holds"]]
    for claim in claims:
        rows.append([sentence(claim), *(cell(decide(claim, measure)) for measure in MEASURES), holds(claim)])
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def picture(claims: Sequence[Claim]) -> plt.Figure:
    """A line for each claim, and at its end whether it holds. Where the claim says that the ratio is, it is grey."""
    shown = []  # all that must lie within the axis
    figure, axis = plt.subplots(figsize=(WIDTH, 0.31 * len(claims) + 1), layout="constrained")
    for y, claim in enumerate(claims):
        side = {AHEAD: (0.01, 1), BEHIND: (1, 100), LEVEL: (1, 1), NOT_BEHIND: (0.01, 1)}[claim.says]
        axis.fill_betweenx([y - 0.42, y + 0.42], *side, color="0.93", lw=0)
        axis.text(1.02, y, holds(claim), va="center", transform=axis.get_yaxis_transform())
    for i, measure in enumerate(MEASURES):
        style = {"color": ["C0", "C1", "C2", "C4"][i], "marker": MARKERS[i]}  # C3 is a grey
        axis.plot([], [], ls="", label=measure, **style)
        for y, claim in enumerate(claims):
            if verdict := decide(claim, measure):
                height = y + 0.22 * (i - (len(MEASURES) - 1) / 2)
                axis.plot(verdict.ratios, [height] * len(verdict.ratios), ls="", ms=2, alpha=0.6, **style)
                # Hollow, and without an interval, where the seeds are too few.
                face = "white" if verdict.word == FEW else style["color"]
                axis.plot(verdict.mean, height, ms=4.5, mfc=face, **style)
                axis.plot([verdict.low, verdict.high], [height] * 2, color=style["color"], lw=1.2)
                shown += [verdict.low, *verdict.ratios, verdict.high]
    axis.axvline(1, color="black", lw=1)
    axis.grid(axis="x", alpha=0.3)
    axis.set(xscale="log", ylim=(len(claims) - 0.5, -0.5))
    axis.set_xlabel("ratio of errors, A / B (left of 1: A is ahead)")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.set_xticks([], minor=True)
    axis.set_xlim(np.nanmin(shown) / 1.2, np.nanmax(shown) * 1.2)
    axis.set_yticks(range(len(claims)), map(sentence, claims))
    figure.legend(loc="outside upper right", ncols=len(MEASURES))
    return figure


@program
def main() -> None:
    """Prints the tables for README.md, and draws a picture of each in results/."""
    Parser(prog="python -m experiments.verdict", description=__doc__.splitlines()[2]).parse_args()
    print(table("The paper", PAPER), table("This project", OURS), sep="\n\n")
    for name, claims in {"verdict": PAPER, "verdict-ours": OURS}.items():
        picture(claims).savefig(RESULTS / f"{name}.png", dpi=160)


if __name__ == "__main__":
    main()
