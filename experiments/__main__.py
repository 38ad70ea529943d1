"""`python -m experiments NAME`: reads the command line. The experiments are in table.py, how they are done is in
laboratory.py."""

import os

import torch

from cli import Parser, positive, program, refuse, two_or_more, writable_folder
from experiments import table
from experiments.laboratory import WORK, perform


def parser() -> Parser:
    """The flags of all experiments."""
    # Few, and none of how a student is trained: those are distill.py's, which a person knows already.
    p = Parser(prog="python -m experiments", description="The paper's figures and tables.", epilog=table.__doc__)
    flag = p.add_argument
    flag("name", choices=table.EXPERIMENTS, metavar="NAME", help="one of those below")
    flag("--pretrained_teacher_model", default="ideal:8gaussians", help="as of distill.py")
    # A seed decides the teacher of points, the student's new weights, its data and its noise. One seed has no spread.
    flag("--seeds", type=two_or_more, default=5, help="students of each kind")
    # Network evaluations and not steps, since a step with a long sub-path costs more than one with a short one.
    flag("--budget", type=positive, default=9000, help="network evaluations of a student, in batches")
    flag("--num_samples", type=positive, default=1024, help="by which a student is measured")
    flag("--features", default="inception", help="of images, as of evaluate.py")
    # Shards cannot be measured against: their samples have no order, and no end.
    flag("--reference_data", help="images to measure against, if --data are images with captions")
    flag("--only", nargs="+", help="some of the students, by their names in the table")
    flag("--processes", type=positive, help="students at a time (default: one a core, one on a GPU)")
    flag("--quick", action="store_true", help="a few steps: shows that all works, and nothing else")
    flag("--out", help=f"without suffix (default: {WORK}/NAME)")
    return p


@program
def main() -> None:
    """Reads the flags, and performs the experiment. What is not known here goes to distill.py, for all students."""
    p = parser()
    # A first look, for the experiment: it has defaults of its own, which what is typed replaces.
    experiment = table.EXPERIMENTS[p.parse_known_args()[0].name]
    p.set_defaults(**experiment.defaults)
    args, others = p.parse_known_args()
    if args.quick:
        # In this process, since starting others takes longer than these students do.
        args.seeds, args.budget, args.num_samples, args.processes = 2, 50, 64, 1
    # More processes than eight would need much memory, and on a GPU they would only wait for each other.
    args.processes = args.processes or (1 if torch.accelerator.is_available() else min(8, os.cpu_count() or 1))
    # Never results/ by itself: there are the records of whole experiments, and --only or --quick make parts.
    args.out = args.out or f"{WORK / args.name}{'-quick' if args.quick else ''}"
    writable_folder(os.path.dirname(args.out) or ".")
    unknown = sorted(set(args.only or ()) - set(experiment.variants))
    refuse(unknown, f"--only: {', '.join(unknown)} is none of {', '.join(experiment.variants)}")
    # The experiment's own would come later on each command line, and count.
    ours = {"--seed", "--max_train_steps", "--output_dir"} & set(others)
    refuse(ours, f"{', '.join(ours)}: an experiment sets it by itself, from --seeds and --budget")
    perform(experiment, args, others)


if __name__ == "__main__":
    main()
