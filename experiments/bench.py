"""python -m experiments.bench [flags of distill.py]

How long does a training step take, and how long a sample?

The yardstick is a cost model. A step is made of forward passes of the network, of which a backward pass is worth two,
and a forward pass can be timed by itself. What the step takes beyond its passes is overhead: data, optimizer, Python.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.benchmark import Timer

import distill
import training
from cli import program
from evaluate import provenance
from sample import n_steps, sample

TIMED = 10  # steps, after those in which memory is allocated and kernels are chosen


def forward_passes(args: argparse.Namespace) -> int:
    """What a training step costs, in forward passes of the network with a batch: the teacher's in k / k_φ solver steps,
    twice as many for second order, and twice for guidance; one of the target; and of the student three, or four if
    activations are computed twice."""
    calls = (2 if "second_order" in args.improved else 1) * (2 if args.guidance_w else 1)
    return args.k // args.solver_step * calls + 1 + 3 + args.gradient_checkpointing


def seconds(call: Callable, times: int) -> float:
    """What a call takes, in the mean of so many after the first ones. torch's timer waits for what a GPU still does."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).timeit(times).mean


def report(distillation: distill.Distillation) -> None:
    """Prints it all: the step, the cost model, and samples."""
    args, teacher, n = distillation.args, distillation.teacher, distillation.args.train_batch_size
    labels, x = teacher.labels([]), torch.randn(n, *teacher.shape, device=teacher.device)
    t, cond = torch.full((n,), 999, device=x.device), teacher.condition([labels[i % len(labels)] for i in range(n)])
    # As the solver calls it, in the precision of the training.
    with training.autocast(teacher.device, args.mixed_precision):
        forward = seconds(partial(teacher.predict, x, t, cond), TIMED)  # one pass, without guidance
    steps = distillation.steps()
    # As distill.py does it: to log the loss is to read it, and so to wait for the step's end.
    whole = seconds(lambda: distillation.run.log(*next(steps)), TIMED)
    size = n * args.gradient_accumulation_steps * training.process().num_processes
    print(f"{size / whole:.4g} samples/s, {whole:.4g} s a step of {size}")
    passes = forward_passes(args)
    model = passes * forward * args.gradient_accumulation_steps  # what the passes alone would take
    print(f"cost model: {passes} forward passes of {forward:.4g} s = {model:.4g} s; ratio {whole / model:.3f}")
    if torch.accelerator.is_available():
        print(f"peak memory {torch.accelerator.max_memory_allocated() / 2**30:.3g} GiB")
    # What the student is for: to be faster in use than the teacher by the ratio of their steps, or twice that with w.
    student, many = distillation.student(), teacher.many_steps
    draws = {f"student, {n_steps(k)}": partial(sample, student, range(n), k) for k in distill.STEPS}
    draws[f"teacher, {n_steps(many)}"] = partial(sample, teacher, range(n), many, w=args.guidance_w)
    for name, draw in draws.items():
        print(f"a sample, {name}: {seconds(partial(draw, mixed_precision=args.mixed_precision), 3) / n:.4g} s")
    print(", ".join(f"{name} {value}" for name, value in provenance().items()))


@program
def main() -> None:
    """Times a run that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        args, teacher = distill.configure(["--output_dir", folder, *sys.argv[1:]])
        args.max_train_steps, args.lr_warmup_steps = 2 * TIMED, 0  # enough: the rest is not asked for
        report(distill.Distillation(args, teacher))


if __name__ == "__main__":
    main()
