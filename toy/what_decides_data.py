"""What decides whether SPLAM is better than LCM? The data: another density, and few points of it."""

from data import program
from toy.laboratory import Laboratory
from toy.points import Points
from toy.what_decides import picture, setting


class FewPoints(Points):
    """256 points of training data."""

    def __init__(self, data: str, split: str):
        super().__init__(data, split)
        if split == "train":
            self.samples, self.labels = self.samples[:256], self.labels[:256]


VARIANTS = {
    **setting("as it is"),
    **setting("spiral", flags="--pretrained_teacher_model ideal:spiral"),
    **setting("256 points of data", changes={"toy.points.Points": FewPoints}),
}


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
