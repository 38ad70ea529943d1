"""What a long training run needs and no reader of the method does: flags, batches, checkpoints, resuming, logging.

The loops themselves stand in distill.py and teacher.py, each from top to bottom. They use a `Run` like this:

    run = Run(args, model, dataset, {"target": target})
    batches = run.batches()
    for step in run.steps():
        draws = draw(..., run.generator(step))             # the random numbers of this step, for all processes
        for micro_step in range(args.gradient_accumulation_steps):
            batch, rows = next(batches), run.rows(draws, micro_step)
            ...                                            # loss, backward, optimizer
        run.log(step, loss)
        run.checkpoint(step)

Two promises rest on this file. A run that was killed and resumed computes what it would have computed without the kill,
to the bit on a CPU. And several processes, or several micro-batches, only divide the work of one. Both hold because all
that is random is a function of the seed and the step, and never of what happened before or of who computes it.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    fsdp2_prepare_model,
    gather_object,
    load,
    parse_flag_from_env,
    set_seed,
)
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import BadInput, EndlessBatches, Shards, read_json, refuse, writable_folder

log = logging.getLogger("training")
# One of these makes a folder a finished model for teacher.py: the name that pipe.load_lora_weights looks for, or that
# of a pipeline's index.
MODEL_FILES = ("pytorch_lora_weights.safetensors", "model_index.json")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a BadInput, so one line, where argparse prints the usage before it."""

    def error(self, message: str) -> None:
        raise BadInput(message.removeprefix("argument ").replace(": ", " ", 1))


class Help(argparse.RawDescriptionHelpFormatter):
    """A line for each flag, with its default if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=118)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "X"

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default in (None, []) or isinstance(action.default, bool) or not action.option_strings
        return action.help if without or action.default is argparse.SUPPRESS else f"{action.help} (default %(default)s)"


def number(kind: type, allowed: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """A type for argparse: a finite number that is `allowed`, or the error that it "must be `words`"."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            if math.isfinite(value) and allowed(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"must be {words}, not {text}")

    return parse


# Batches and numbers of steps fit into 31 bits: beyond them PyTorch raises errors of its own.
positive = number(int, lambda n: 0 < n < 2**31, "positive, and below 2**31")
count = number(int, lambda n: 0 <= n < 2**31, "a whole number, 0 or more, and below 2**31")
workers = number(int, lambda n: 0 <= n <= 256, "from 0 to 256")  # each has the whole program in its memory
two_or_more = number(int, lambda n: n >= 2, "2 or more, for their spread")
amount = number(float, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30")  # float32 ends at 3e38
# numpy's generator takes seeds below 2**32, and accelerate adds the number of the process to it.
seed = number(int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2**31 - 1")
share = number(float, lambda x: 0 <= x < 1, "in [0, 1)")
fraction = number(float, lambda x: 0 <= x <= 1, "from 0 to 1")
finite = number(float, lambda x: abs(x) <= 1e30, "a number of at most 1e30")


def recipes(title: str, named: dict[str, str]) -> str:
    """For the end of a program's help: command lines by name."""
    return "\n".join([f"{title}:", *(f"  {name}: {flags}" for name, flags in named.items()), ""])


def parse(parser: argparse.ArgumentParser, recipe: str) -> argparse.Namespace:
    """The command line, with that of the recipe read before it: what is typed has the last word."""
    return parser.parse_args([*recipe.split(), *sys.argv[1:]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every training program, spelt as in diffusers' training scripts.

    A default stands here if it is the same for every program, and otherwise in the program.
    """
    flag = parser.add_argument_group("training").add_argument
    flag("--seed", type=seed, default=0, help="of weights, data order and noise")
    flag("--max_train_steps", type=positive, help="paper: 6,000 for SD1.5, 80,000 for SD2.1-base")
    flag("--train_batch_size", type=positive, help="per process; paper: 1024 over 16 GPUs")
    flag("--gradient_accumulation_steps", type=positive, default=1, help="batches per step")
    flag("--learning_rate", type=amount, help="of AdamW; paper: 8e-6")
    flag("--lr_scheduler", choices=["constant", "constant_with_warmup", "linear", "cosine"], help="paper: constant")
    flag("--lr_warmup_steps", type=count, default=100, help="paper: not stated")
    flag("--adam_weight_decay", type=amount, default=0.0, help="paper: 0")
    flag("--max_grad_norm", type=amount, help="gradients are clipped to this L2 norm; paper: 10")
    flag("--mixed_precision", choices=list(DTYPES), default="no", help="of the networks")
    flag("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, on a GPU")
    flag("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and later GPUs")
    flag("--dataloader_num_workers", type=workers, default=0, help="processes that read data; at most one a shard")
    flag = parser.add_argument_group("output, checkpoints and logs").add_argument
    flag("--output_dir", help="all that the run writes lies below it (default: runs/ and a name)")
    flag("--overwrite", action="store_true", help="start anew, and delete an earlier run's checkpoints")
    flag("--checkpointing_steps", type=positive, default=500, help="steps between checkpoints")
    flag("--checkpoints_total_limit", type=positive, default=2, help="older checkpoints are deleted")
    flag("--resume_from_checkpoint", help='a checkpoint folder, or "latest": that of --output_dir, if there is one')
    flag("--report_to", choices=["tensorboard"], help="beside metrics.jsonl, which is always written")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that a model's `dataset` reads."""
    flag = parser.add_argument_group("data").add_argument
    flag("--data", help="toy:<name>, a folder of images, or captioned images: a folder, or 'shards/{000..009}.tar'")
    flag("--resolution", type=positive, help="images are resized and cropped to it (default: the model's own)")
    flag("--min_image_size", type=count, default=0, help="captioned images with a shorter side are left out")
    flag("--max_pwatermark", type=amount, default=1.0, help="and those that LAION thinks likelier to be watermarked")
    flag("--cache_latents", help="folder: encode captioned images once, and train from there")
    flag("--allow_pipe", action="store_true", help="shards may be 'pipe:...', which runs shell commands")


# ---------------------------------------------------------------------------------------------------------------------
# Devices and batches
# ---------------------------------------------------------------------------------------------------------------------


def process() -> PartialState:
    """This process's rank and device, also before a Run exists. A program that was not launched has one process."""
    # Processes wait for each other until all have encoded their share of a cache, which may be hours. By default they
    # would give up after ten minutes. (If one dies, its launcher ends the others.)
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=1))


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """What accelerator.autocast() is in a Run, for programs without one."""
    return torch.autocast(device.type, DTYPES[mixed_precision], enabled=mixed_precision != "no")


def allow_tf32(args: argparse.Namespace) -> None:
    """Sets what --allow_tf32 says. To be called before anything is encoded, or a cache would have another precision."""
    # Matrix products only. Convolutions keep PyTorch's default, which allows TF32: without it, the float32 convolutions
    # of a VAE would take longer than all the rest of a distillation.
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32


def stream_batches(dataset: Dataset | Shards, num_workers: int, **position) -> Iterator[list[Tensor]]:
    """Batches without end, from a `position` as EndlessBatches and Shards.batches take it."""
    # batch_size=None: what the sampler yields, and what shards yield, are whole batches already.
    # Pinned memory lets a GPU fetch a batch while it computes.
    options = {"batch_size": None, "num_workers": num_workers, "pin_memory": torch.cuda.is_available()}
    if isinstance(dataset, Shards):  # which have an order of their own
        # Each reader needs a shard.
        options["num_workers"] = min(num_workers, len(dataset.urls) // position.get("world", 1))
        return iter(DataLoader(dataset.batches(**position), **options))
    return iter(DataLoader(dataset, sampler=EndlessBatches(len(dataset), **position), **options))


def gathered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, where FSDP has spread them over the processes. Every process must call this."""
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache  # which keeps the lock until the process ends, and lets the same process use the folder again
def keep_others_out(folder: Path) -> FileLock:
    """Refuses to write to a folder, given by its absolute path, to which another process writes.

    The system takes the lock back however the process ends, so a killed run leaves none behind.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another run is writing to {folder}: give this one another --output_dir") from None
    return lock


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes an OSError that names the folder of what the libraries raise when, for one, a disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are torch.save's and safetensors' own
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot write {folder}: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

# Flags that may differ between a checkpoint and the run that resumes it: they change nothing of what is computed. A
# preset counts by the flags that it stands for. The last two count together with the number of processes, as the total
# batch size.
FREE_FLAGS = """preset output_dir overwrite resume_from_checkpoint checkpointing_steps checkpoints_total_limit report_to
validation_steps num_eval_samples prompts dataloader_num_workers allow_pipe benchmark timed_steps
train_batch_size gradient_accumulation_steps""".split()


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _adamw(args: argparse.Namespace, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer's class. The 8-bit one keeps its moments in a quarter of the memory, on a GPU."""
    if not args.use_8bit_adam:
        # Fused: a few kernels for all weights, on the device to which accelerate is about to move them. Elsewhere None,
        # which leaves the choice to PyTorch.
        return functools.partial(torch.optim.AdamW, fused=device.type == "cuda" or None)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise BadInput("--use_8bit_adam needs the package bitsandbytes") from None
    return AdamW8bit


class Run:
    """One training run of `model` on `dataset`: accelerate's objects, where the run stands, and what it writes.

    `averages` are modules that follow the model without an optimizer (an EMA); checkpoints hold them too, by name.
    The attributes accelerator, model, optimizer and lr_scheduler are ready to be used; `step` counts finished steps.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, dataset: Dataset, averages: dict[str, nn.Module]):
        from diffusers.optimization import get_scheduler  # diffusers takes seconds: --help must not wait for it

        # The order below matters: accelerate must know the devices before anything is moved to one, the optimizer
        # must get the parameters before they are spread over processes, and a checkpoint is read into what is
        # prepared.
        self.args, self.folder, self.averages = args, writable_folder(args.output_dir), averages
        self.dataset, self.step = dataset, 0
        options = {"mixed_precision": args.mixed_precision, "log_with": args.report_to, "project_dir": str(self.folder)}
        options["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        # Gradients lie where processes exchange them, and are not copied there: that saves as much memory as they take.
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        # The loop advances the learning rate once a step. accelerate itself would do so once for each process.
        self.accelerator = Accelerator(step_scheduler_with_optimizer=False, **options)
        alone = self.accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1))
        refuse(alone, "several processes without GPUs need ACCELERATE_USE_CPU=true, or they would not cooperate")
        if self.accelerator.is_main_process:
            keep_others_out(self.folder.resolve())
        if isinstance(dataset, Shards):
            dataset.check_readers(self.accelerator.num_processes)
        # From here on, what is drawn without a generator (dropout) differs between processes, as it should: they have
        # different samples.
        set_seed(args.seed, device_specific=True)
        allow_tf32(args)

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # of a LoRA, only that
        adamw = _adamw(args, self.accelerator.device)
        optimizer = adamw(trained, lr=args.learning_rate, weight_decay=args.adam_weight_decay)
        # None stands for the rules of a schedule in pieces, which has no flag here.
        lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps)
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)  # of accelerate launch --use_fsdp
        if fsdp:
            refuse(fsdp.fsdp_version == 1, "FSDP of version 1 is not supported: --fsdp_version 2 for accelerate launch")
            # FSDP's own mixed precision would round the model's inputs, and with them x, α and σ. Autocast does not.
            fsdp.mixed_precision_policy = None
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, lr_scheduler)
        for module in averages.values():
            if fsdp:
                # Spread over the processes exactly as the model is, since an average is taken shard by shard.
                fsdp2_prepare_model(self.accelerator, module).set_reshard_after_forward(True)
            else:
                module.to(self.accelerator.device)
        self._begin()
        if args.report_to:
            self.accelerator.init_trackers("splam")

    # -- the loop's tools ---------------------------------------------------------------------------------------------

    @property
    def total_batch_size(self) -> int:
        """Samples in one optimizer step, over micro-batches and processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def steps(self) -> tqdm:
        """The numbers of the steps that are left, from 1 in a new run, with a progress bar."""
        last, silent = self.args.max_train_steps, not self.accelerator.is_main_process
        options = {"initial": self.step, "total": last, "unit": "step", "mininterval": 1, "disable": silent}
        self.bar = tqdm(range(self.step + 1, last + 1), **options)
        return self.bar

    def batches(self) -> Iterator[list[Tensor]]:
        """This process's micro-batches on its device, without end, from where the run stands.

        Where it stands is a number of batches, so no state of a loader needs to be saved.
        """
        args, start = self.args, self.step * self.args.gradient_accumulation_steps
        position = {"batch_size": args.train_batch_size, "seed": args.seed, "start": start}
        position |= {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        for batch in stream_batches(self.dataset, args.dataloader_num_workers, **position):
            # A copy out of pinned memory need not be waited for: what computes with it is queued behind it, and PyTorch
            # keeps the pinned memory until the copy is done. Other memory has no such keeper.
            yield [part.to(self.accelerator.device, non_blocking=part.is_pinned()) for part in batch]

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of one step: a function of the seed and the step, the same on every process."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_000_007 + step)

    def rows(self, draws: Iterable[Tensor], micro_step: int) -> list[Tensor]:
        """Of what was drawn for a whole step, the rows of this process's micro-batch, on its device.

        The whole batch is ordered by micro-step and then by process, which is the order of EndlessBatches too. So row i
        of the draws always meets item i of the data, however the batch is cut into pieces.
        """
        size, accelerator = self.args.train_batch_size, self.accelerator
        first = (micro_step * accelerator.num_processes + accelerator.process_index) * size
        return [part[first : first + size].to(accelerator.device) for part in draws]

    def clip_gradients(self) -> None:
        """Limits the gradient's L2 norm to --max_grad_norm and keeps the norm for the log; where the gradient is not
        complete yet, before a step's last micro-batch, nothing."""
        if self.accelerator.sync_gradients:
            self.norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)

    def log(self, step: int, loss: Tensor) -> None:
        """One line of metrics.jsonl, and the progress bar. Every process must call this: they average their losses.

        BadInput, on all of them, if the average is not finite.
        """
        value = self.accelerator.reduce(loss, "mean").item()  # .item() waits for a GPU to finish the step
        norm = gathered({"norm": self.norm})["norm"].item()  # before it was limited
        self._refuse_divergence(step, math.isfinite(value), f"the loss is {value}")
        if not self.accelerator.is_main_process:
            return
        # In fp16 the norm is infinite when a step was too large for the gradients' scale; such a step is left out.
        values = {"loss": value, "grad_norm": norm if math.isfinite(norm) else None}
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.bar.set_postfix({"loss": f"{value:.4g}"}, refresh=False)
        if self.args.report_to:
            self.accelerator.log(values, step=step)

    def _refuse_divergence(self, step: int, finite: bool, what: str) -> None:
        if finite:
            return
        last = checkpoints(self.folder)
        ways = f"--resume_from_checkpoint latest goes on from {last[-1]}" if last else "there is no checkpoint yet"
        ways += ", --overwrite with a smaller --learning_rate starts anew"
        raise BadInput(f"step {step}: {what}, and nothing of this step was saved; {ways}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> None:
        """Every --checkpointing_steps, and at the end. Every process must call this.

        checkpoint-N is written under another name and then renamed: whatever has that name is complete.
        """
        if step % self.args.checkpointing_steps and step != self.args.max_train_steps:
            return
        final, draft = self.folder / f"checkpoint-{step}", self.folder / f"checkpoint-{step}.tmp"
        averages = {name: gathered(module.state_dict()) for name, module in self.averages.items()}
        # The loss was taken before the step. What the step has made of the weights shows in their averages first.
        finite = all(weight.isfinite().all() for weights in averages.values() for weight in weights.values())
        self._refuse_divergence(step, finite, "weights are no longer finite")
        # The main process clears the place, all write into it, the main one finishes and renames. Between these no
        # process may be ahead of the others.
        with writing(draft):
            if self.accelerator.is_main_process:
                shutil.rmtree(draft, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(draft))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for name, weights in averages.items():
                    save_file(weights, draft / f"{name}.safetensors")
                files = [file for file in draft.rglob("*") if file.is_file()]  # FSDP's lie in folders
                sizes = {str(file.relative_to(draft)): file.stat().st_size for file in files}
                configuration = {**self._configuration(), "step": step, "files": sizes}
                (draft / "configuration.json").write_text(json.dumps(configuration, indent=2))
                shutil.rmtree(final, ignore_errors=True)  # of a run that had gone on from here before
                draft.rename(final)
                # Of later steps are those of a run that went on from an earlier checkpoint than the last. They would
                # be taken for the latest, and would outlive this run's own.
                there = checkpoints(self.folder)
                passed = [old for old in there if _step_of(old) <= step]
                for old in [*passed[: -self.args.checkpoints_total_limit], *there[len(passed) :]]:
                    shutil.rmtree(old)
            self.accelerator.wait_for_everyone()

    def _configuration(self) -> dict:
        """All that decides what is computed. A batch of 64 and two micro-batches of 32 are the same thing."""
        fixed = {name: value for name, value in vars(self.args).items() if name not in FREE_FLAGS}
        return {**fixed, "total_batch_size": self.total_batch_size}

    def _differences(self, path: Path) -> list[str]:
        """What is another configuration in the checkpoint than in this run."""
        with self._reading(path):
            file, here = path / "configuration.json", self._configuration()
            there = read_json(file) if file.is_file() else {}
            refuse(not {"step", "files"} <= there.keys(), "it is not a checkpoint of this program")
        # A flag that one of the two did not know counts as not given.
        known = sorted({*there, *here} - {*FREE_FLAGS, "step", "files"})
        differing = [key for key in known if there.get(key) != here.get(key)]
        return [f"{key} was {there.get(key)} and is {here.get(key)}" for key in differing]

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Makes a BadInput, which names another checkpoint, of whatever is raised while this one is read."""
        try:
            yield
        except Exception as error:  # each of the formats has errors of its own, and damage can look like any of them
            others = [other for other in checkpoints(self.folder) if other.resolve() != path.resolve()]
            ways = f"--resume_from_checkpoint {others[-1]} goes on from there" if others else "there is no other"
            reason = str(error).partition("\n")[0]
            raise BadInput(f"cannot resume from {path}: {reason}; {ways}, --overwrite starts anew") from error

    def _resume(self, path: Path) -> None:
        """Reads a checkpoint into all that is prepared."""
        differences = self._differences(path)
        refuse(differences, f"{path} is of another configuration: {', '.join(differences)}")
        with self._reading(path):
            there = read_json(path / "configuration.json")
            for name, size in there["files"].items():
                whole = (path / name).is_file() and (path / name).stat().st_size == size
                refuse(not whole, f"its {name} is missing, or has not the {size} bytes that were written")
            load(path / "random_states_0.pkl")  # accelerate passes over random states that it cannot read
            # accelerate reads optimizer and random states with weights_only=True, which runs no code. FSDP's sharded
            # format is the exception: its index is a full pickle. --fsdp_state_dict_type FULL_STATE_DICT has none.
            self.accelerator.load_state(str(path))
            # No micro-batch of the next step is done, however the steps before were cut into them.
            self.accelerator.step = 0
            # Averages are no models for accelerate, so they are read here; with FSDP each process takes its part.
            for name, module in self.averages.items():
                weights = load_file(path / f"{name}.safetensors")
                set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
            self.step = int(there["step"])  # a copy of a checkpoint may have any name

    def _begin(self) -> None:
        """Starts anew, or from a checkpoint; refuses to train over an earlier run that nobody spoke of."""
        args, earlier, path = self.args, checkpoints(self.folder), self.args.resume_from_checkpoint
        # A model whose checkpoints are gone, or one that was downloaded: its weights would be replaced.
        finished = [self.folder / name for name in MODEL_FILES if (self.folder / name).is_file()]
        contradiction = args.overwrite and path not in (None, "latest")
        refuse(contradiction, f"--overwrite starts anew, and --resume_from_checkpoint {path} does not")
        if args.overwrite:  # the two waits: nobody deletes before all have looked, nobody writes before all is deleted
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for checkpoint in earlier:
                    shutil.rmtree(checkpoint)
            self.accelerator.wait_for_everyone()
            earlier, finished, path = [], [], None
        elif path == "latest":
            path = earlier[-1] if earlier else None  # None: the first of several equal commands begins the run
        elif not path and earlier and _step_of(earlier[-1]) == args.max_train_steps:
            if not self._differences(earlier[-1]):
                # The same command a second time: there is nothing left to train, and its results are made again.
                log.warning("%s holds this run, finished: --overwrite trains it anew", self.folder)
                path = earlier[-1]
        # From a checkpoint of another folder a run may begin, but not over what lies in its own.
        elsewhere = path and Path(path).resolve().parent != self.folder.resolve()
        if elsewhere:
            self._differences(Path(path))  # refuses what is no checkpoint at all, which is to be said first
        if path and not (elsewhere and (earlier or finished)):
            self._resume(Path(path))
        elif earlier or finished:
            ways = "--resume_from_checkpoint latest goes on with it, " if earlier else ""
            ways += "--overwrite starts anew"
            holds = f"{self.folder} holds {(earlier or finished)[-1].name} of an earlier run"
            raise BadInput(f"{holds}: {ways}, another --output_dir keeps both")
        # Each process has looked for checkpoints on its own machine. If they began at different steps, gradients of
        # different weights would be averaged, without an error.
        places = gather_object([self.step])
        apart = len(set(places)) > 1
        refuse(apart, f"processes begin at steps {places}: do all machines share the disk of {self.folder}?")
        if self.accelerator.is_main_process:
            self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Leaves what was logged before the next step. The steps from there on come again, and a kill may have torn a
        line."""
        metrics, draft = self.folder / "metrics.jsonl", self.folder / "metrics.jsonl.tmp"
        lines = metrics.read_text(errors="replace").splitlines(keepends=True) if metrics.is_file() else []
        steps = [re.match(r'{"step": (\d+),', line) for line in lines]
        draft.write_text("".join(line for line, n in zip(lines, steps, strict=True) if n and int(n[1]) <= self.step))
        draft.replace(metrics)
