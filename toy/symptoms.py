"""python -m toy.symptoms

What a healthy run looks like, and what common mistakes look like: docs/symptoms.md says what to check.

The first student has distill.py's own flags for 2-D points. Each of the others has one mistake.
"""

import json

from PIL import Image

import teacher
from data import program
from toy import plots
from toy.laboratory import TRAINING, WORK, Findings, Laboratory, Variant

GUIDED = "--pretrained_teacher_model ideal:clouds --guidance_w"
WRONG = "wrong prediction type"
WRONG_TYPE = WORK / "wrong-prediction-type"
VARIANTS = {
    "healthy": Variant(),
    "learning rate x 10": Variant("--learning_rate 1e-2"),
    "learning rate / 10": Variant("--learning_rate 1e-4"),
    "EMA 0": Variant("--ema_decay 0"),
    "EMA 0.999": Variant("--ema_decay 0.999"),
    "exact σ with time": Variant("--sigma exact"),
    "LCM, ends off the grid": Variant("--ode lcm --k 50 --solver_step 25"),
    "k = 200, one solver step": Variant("--k 200 --solver_step 200"),
    WRONG: Variant(f"--pretrained_teacher_model {WRONG_TYPE}"),
    # The next two are a pair: guidance_scale 1 is w = 0. On two classes that overlap, since guidance needs some.
    "guidance_scale 1 meant": Variant(f"{GUIDED} 0", teacher="--class_conditional"),
    "and w = 1 typed": Variant(f"{GUIDED} 1", teacher="--class_conditional"),
}
PARTS = [i / 12 for i in range(1, 13)]  # of the training, after which students are measured


def make_teacher_with_a_wrong_type(quick: bool) -> None:
    """One that predicts v and says in its scheduler's config that it predicts ε, as after a careless conversion."""
    steps = ["--max_train_steps", "30"] if quick else []
    # A second call finds the folder of the first, and changes what is changed already.
    teacher.fit_or_load("toy:8gaussians", WRONG_TYPE, steps)
    file = WRONG_TYPE / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))


def picture(found: Findings) -> Image.Image:
    """Loss, gradient norm and map error by step."""
    columns = [*TRAINING, "map error"]
    return plots.curves(*(plots.Panel(c, "training steps", "", found.curves(c, "step")) for c in columns))


@program
def main() -> None:
    laboratory = Laboratory(__file__, __doc__, seeds=2)
    # Only where it is asked for. It is trained in this process, in the precision of points, and accelerate allows only
    # one precision a process: students of images, which have another, could then not be trained here.
    if WRONG in (laboratory.args.only or VARIANTS):
        make_teacher_with_a_wrong_type(laboratory.args.quick)
    laboratory.report(VARIANTS, picture, at=PARTS)


if __name__ == "__main__":
    main()
