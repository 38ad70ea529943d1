"""What a long training run needs and no reader of the method does: flags, batches, checkpoints, the log.

The loops themselves stand in the programs, each from top to bottom. They use a `Run` like this:

    run = Run(args, model, dataset, average)
    for step, (x, label), generator in run.batches():      # once for each micro-batch
        with accelerator.accumulate(model):
            ...                                            # loss, backward, optimizer
        if accelerator.sync_gradients:                     # after the last micro-batch of a step
            run.log(step, loss)
            run.checkpoint(step)

A step has --gradient_accumulation_steps *micro-batches*, whose gradients are added. All that a loop draws is a function
of the seed and of a number: that of the micro-batch, counted over steps, micro-batches of a step, and processes. So a
run that was killed and resumed computes what it would have computed without the kill, to the bit on a CPU. And eight
processes compute what one does with eight micro-batches a step. There are two exceptions. Captions come as a stream,
which after a kill is another one (see `loader`). Dropout draws by itself, and its state is kept in checkpoints.
"""

import argparse
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env, send_to_device, set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli import Parser, amount, by_library, count, positive, read_json, refuse, writable_folder
from data import Captions

log = logging.getLogger("training")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: Parser) -> None:
    """The flags of every training program, spelt as in diffusers' training scripts.

    A default stands here if it is the same for every program, and otherwise in the program.
    """
    flag = parser.add_argument_group("training").add_argument
    flag("--seed", type=count, default=0, help="of weights, data order and noise")
    flag("--max_train_steps", type=positive, help="paper: 6,000 for SD1.5, 80,000 for SD2.1-base")
    flag("--train_batch_size", type=positive, help="per process; paper: 1024 over 16 GPUs")
    flag("--gradient_accumulation_steps", type=positive, default=1, help="batches per step")
    flag("--learning_rate", type=amount, help="of AdamW; paper: 8e-6")
    flag("--lr_scheduler", choices=["constant", "linear", "cosine"], help="after the warm-up; paper: constant")
    flag("--lr_warmup_steps", type=count, default=100, help="paper: not stated")
    flag("--adam_weight_decay", type=amount, default=0.0, help="paper: 0")
    flag("--max_grad_norm", type=amount, help="gradients are clipped to this L2 norm, 0 for not; paper: 10")
    flag("--mixed_precision", choices=list(DTYPES), default="no", help="of the networks")
    flag("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and later GPUs")
    flag("--dataloader_num_workers", type=count, default=0, help="processes that read data")
    flag = parser.add_argument_group("output, checkpoints and logs").add_argument
    flag("--output_dir", help="all that the run writes lies below it (default: runs/ and a name)")
    flag("--checkpointing_steps", type=positive, default=500, help="steps between checkpoints; the last one is kept")
    flag("--resume_from_checkpoint", help='a checkpoint folder, or "latest": that of --output_dir, if there is one')
    flag("--report_to", help="beside metrics.jsonl: tensorboard, wandb, all, or another tracker of accelerate")
    flag("--tracker_project_name", default="splam", help="where that tracker files the run")


# ---------------------------------------------------------------------------------------------------------------------
# Processes, random numbers, batches
# ---------------------------------------------------------------------------------------------------------------------


def process() -> PartialState:
    """This process's rank and device, also before a Run exists. A program that was not launched has one process."""
    # Processes wait for the main one while it reads the data to measure against. By default they give up in 10 minutes.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=2))


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """What accelerator.autocast() is in a Run, for programs without one."""
    return torch.autocast(device.type, DTYPES[mixed_precision], enabled=mixed_precision != "no")


ORDER, NOISE = 0, 1  # what a micro-batch draws: which samples of the data, and the numbers of Algorithm 1


def numbered(seed: int, number: int, use: int) -> torch.Generator:
    """The random numbers of the micro-batch of that number, for one of its two uses. Were the uses one generator, the
    same number would decide which image is drawn and at which t it is shown.

    torch's generator reads the lower half of a seed only, so the three numbers are mixed into 32 bits first.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number, use)).generate_state(1)[0]))


def loader(
    dataset: Dataset | Captions,
    batch_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[list[Tensor]]:
    """Micro-batches without end for process `rank` of `world`, from its `first` on.

    Samples are drawn independently, as Algorithm 1 draws x_0: there are no epochs. Captions come as a stream instead,
    which cannot be entered in the middle, so `first` makes it another stream.
    """
    options = {"batch_size": None, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    options["generator"] = torch.Generator()  # or the loader would draw one of the numbers that dropout gets
    if isinstance(dataset, Captions):
        return iter(DataLoader(dataset.batches(batch_size, seed * 2**31 + first, rank, world), **options))

    draws = (numbered(seed, number, ORDER) for number in itertools.count(first * world + rank, world))
    indices = (torch.randint(len(dataset), (batch_size,), generator=generator).tolist() for generator in draws)
    return iter(DataLoader(dataset, sampler=indices, **options))


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

MARK = "run.json"  # in the folder of checkpoints: by it a folder is known as a run's
# Flags that change nothing of what is computed but the order of captions. A resumed run may have others.
FREE = """dataloader_num_workers output_dir checkpointing_steps resume_from_checkpoint report_to tracker_project_name
validation_steps num_eval_samples prompts""".split()


def check(args: argparse.Namespace) -> None:
    """Refuses bad flags and folders before anything is written."""
    warm_up, steps = args.lr_warmup_steps, args.max_train_steps
    refuse(warm_up >= steps, f"--lr_warmup_steps {warm_up} must be below --max_train_steps {steps}")
    for other in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        refuse(parse_flag_from_env(f"ACCELERATE_USE_{other}"), f"accelerate's {other} is not supported: use its DDP")
    trackers = ["all", *map(str, get_available_trackers())]
    words = f"--report_to {args.report_to} is none of {', '.join(trackers)}, which are installed"
    refuse(args.report_to and args.report_to not in trackers, words)
    # Without GPUs, or by a configuration of its own, `accelerate launch` sets an address for several processes and
    # starts one. Those that torchrun starts do not find each other, unless accelerate knows that they have no GPUs.
    launched = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    alone = process().num_processes != int(os.environ.get("WORLD_SIZE", 2 if launched else 1))
    ways = "accelerate launch --multi_gpu; without GPUs ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 distill.py"
    refuse(alone, f"several processes were asked for, and this one is alone: {ways}")
    folder = Path(args.output_dir)
    # checkpoints/ alone is not strange: another process of this run may be making the folder at this moment.
    others = [path for path in folder.glob("*") if path.name != "checkpoints"]
    strange = others and not (folder / "checkpoints" / MARK).is_file()
    refuse(strange, f"--output_dir {folder} holds files, and no checkpoints of this program")
    resumed_from(args)


def resumed_from(args: argparse.Namespace) -> Path | None:
    """The checkpoint that is asked for, if there is one. Refuses to train over another one."""
    there, asked = checkpoints(Path(args.output_dir)), args.resume_from_checkpoint
    latest = there[-1] if there else None
    path = latest if asked == "latest" else asked and Path(asked)
    ways = "--resume_from_checkpoint latest goes on with it, another --output_dir keeps it"
    other = latest and (path is None or path.resolve() != latest.resolve())
    refuse(other, f"{args.output_dir} holds {latest and latest.name} of an earlier run: {ways}")
    refuse(path and not (path / MARK).is_file(), f"{path} is no checkpoint of this program")
    return path


def run_folder(path: str | Path) -> Path:
    """The folder of a run, which from now on is known as one. Parts of a model will replace what lies there under the
    same name, so `check` has refused any other folder that holds something."""
    mark = writable_folder(Path(path) / "checkpoints") / MARK
    if not mark.is_file():
        mark.write_text(json.dumps({"command": sys.argv}))
    return Path(path)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of the run in `folder`, oldest first. A folder of their own keeps them out of the way of
    whoever uploads the student."""
    found = folder.glob("checkpoints/checkpoint-*[0-9]")
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


class Run:
    """One training run of `model` on `dataset`: accelerate's objects, where the run stands, and what it writes.

    `average` is a module that follows the model without an optimizer (an EMA); checkpoints hold it too. The attributes
    accelerator, model, optimizer and lr_scheduler are ready to be used; `step` counts finished steps.
    """

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, dataset: Dataset | Captions, average: nn.Module | None = None
    ):
        from diffusers.optimization import get_scheduler  # diffusers takes seconds: --help must not wait for it

        check(args)
        self.args, self.dataset, self.step, self.folder = args, dataset, 0, run_folder(args.output_dir)
        self.accelerator = _accelerator(args)
        # From here on, what is drawn without a generator (dropout) differs between processes, as it should: they have
        # different samples.
        set_seed(args.seed, device_specific=True)
        # Of matrix products. In convolutions PyTorch allows TF32 by default, and a VAE in float32 is faster by it.
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # of a LoRA, only that
        options = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(trained, **options)
        name = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
        schedule = get_scheduler(name, optimizer, None, args.lr_warmup_steps, args.max_train_steps)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, schedule)
        if average is not None:
            self.accelerator.register_for_checkpointing(average.to(self.accelerator.device))
        self._resume()
        if args.report_to:  # the flags go along, as numbers and texts
            flags = {name: x if isinstance(x, int | float | str) else str(x) for name, x in vars(args).items()}
            self.accelerator.init_trackers(args.tracker_project_name, flags)

    # -- the loop's tools ---------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, list[Tensor], torch.Generator]]:
        """For each micro-batch of this process: the number of its step, from 1 in a new run; the data, on the device;
        and the generator of its random numbers."""
        args, accelerator, parts = self.args, self.accelerator, self.args.gradient_accumulation_steps
        rank, world, first = accelerator.process_index, accelerator.num_processes, self.step * parts
        workers = args.dataloader_num_workers
        stream = loader(self.dataset, args.train_batch_size, args.seed, first, rank, world, workers)
        bar = {"initial": self.step, "total": args.max_train_steps, "unit": "step", "mininterval": 1}
        self.bar = tqdm(desc=self.folder.name, disable=not accelerator.is_main_process, **bar)
        for micro_batch in range(first, args.max_train_steps * parts):
            batch = send_to_device(next(stream), accelerator.device)
            yield micro_batch // parts + 1, batch, numbered(args.seed, micro_batch * world + rank, NOISE)
        self.bar.close()

    def clip_gradients(self) -> None:
        """Limits the gradient's L2 norm to --max_grad_norm (0: no limit), and keeps the norm for the log. Before
        a step's last micro-batch the gradient is not complete, and nothing is done."""
        if self.accelerator.sync_gradients:
            limit = self.args.max_grad_norm or math.inf
            self.norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def log(self, step: int, loss: Tensor) -> None:
        """One line of metrics.jsonl, and the progress bar. Every process must call this: they average their losses.

        `loss` is that of the step's last micro-batch. BadInput, on all processes, if it or the gradient is not
        finite.
        """
        values = {"loss": self.accelerator.reduce(loss.detach(), "mean").item(), "grad_norm": self.norm.item()}
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        # In fp16 an infinite norm means that the gradients' scale was too large: such a step is left out.
        watched = [values["loss"], 0 if self.args.mixed_precision == "fp16" else values["grad_norm"]]
        diverged = not all(map(math.isfinite, watched))
        refuse(diverged, f"step {step}: loss or gradient are not finite; a smaller --learning_rate may help")
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)
        self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
        self.bar.update()

    def show(self, step: int, picture: Image.Image) -> None:
        """A picture for those trackers that take some."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(picture.convert("RGB"))[None]}, step, **options)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> None:
        """Every --checkpointing_steps, and at the end. Every process must call this.

        checkpoint-N is written under another name and then renamed: whatever has that name is complete. Then the one
        before is deleted.
        """
        self.step, last = step, step == self.args.max_train_steps
        if step % self.args.checkpointing_steps and not last:
            return
        final, before = self.folder / "checkpoints" / f"checkpoint-{step}", checkpoints(self.folder)
        draft = final.with_suffix(".tmp")
        self.accelerator.save_state(str(draft))
        self.accelerator.wait_for_everyone()  # all processes have written their random states
        if self.accelerator.is_main_process:
            (draft / MARK).write_text(json.dumps({"step": step, **self._configuration()}, indent=2))
            draft.rename(final)
            for path in before:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _configuration(self) -> dict:
        """All that decides what is computed. Two micro-batches of one process and one of two are the same thing."""
        fixed = {name: value for name, value in vars(self.args).items() if name not in FREE}
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return {**fixed, "gradient_accumulation_steps": parts}

    def _resume(self) -> None:
        """Goes on from the checkpoint that is asked for."""
        path, file = resumed_from(self.args), self.folder / "metrics.jsonl"
        if path:
            # As JSON has it, where a tuple is a list.
            theirs, ours = read_json(path / MARK), json.loads(json.dumps(self._configuration()))
            self.step = theirs.pop("step")
            differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
            what = ", ".join(f"{key} was {theirs.get(key)} and is {ours.get(key)}" for key in differing)
            refuse(differing, f"{path} is of another configuration: {what}")
            by_library(self.accelerator.load_state, str(path))
            if self.step == self.args.max_train_steps:
                log.warning("%s is complete: no step is left, and its results are made again", path)
            self.accelerator.step = 0  # no micro-batch of the next step is done, however the steps before were cut
        # A line a step: what was logged after the checkpoint will be logged again.
        if self.accelerator.is_main_process and file.is_file():
            file.write_text("".join(file.read_text().splitlines(keepends=True)[: self.step]))


def _accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate, with the flags counting and not the environment that its launcher sets for other programs."""
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        # A plugin, since a number would give way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        dynamo_backend="no",  # --torch_compile says it
        # The loop advances the learning rate once a step. accelerate itself would do so once for each process.
        step_scheduler_with_optimizer=False,
    )
