"""What decides whether SPLAM is better than LCM? The teacher: the density itself, a trained MLP, a poor one."""

from data import program
from toy.laboratory import Laboratory
from toy.what_decides import picture, setting

VARIANTS = {
    **setting("as it is"),
    **setting("trained teacher", flags="--pretrained_teacher_model toy:8gaussians"),
    **setting("poor teacher", flags="--pretrained_teacher_model toy:8gaussians", teacher="--max_train_steps 300"),
}


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
