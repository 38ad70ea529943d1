"""The machinery of a long training run, once: accelerate, AdamW, warm-up, clipping, progress, checkpoints, resuming.

What is trained, and by which loss, is the caller's. Its loop stays readable from top to bottom:

    run = Run(args, model, dataset)
    for step, batches in run:
        loss = run.optimize(loss_of(model, batch) for batch in batches)
        run.log(step, loss=loss)
        run.checkpoint(step)
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model, parse_flag_from_env, set_seed
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import BadInput, EndlessBatches, writable_folder
from pairs import Shards

# Flags that may differ between a checkpoint and the run that resumes it, because they do not change what is computed.
FREE_FLAGS = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_eval_samples",
    "report_to",
    "dataloader_num_workers",
}

SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine"]


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        return action.help if without or not action.option_strings else f"{action.help} (default %(default)s)"


def recipe_text(title: str, recipes: dict[str, dict]) -> str:
    """For the end of a program's help: sets of flags by name, written as one would type them."""
    lines = (f"  {name}: " + " ".join(f"--{flag} {value}" for flag, value in r.items()) for name, r in recipes.items())
    return f"{title}:\n" + "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every training program, spelt as diffusers' training scripts spell them."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="runs/8gaussians", help="everything the run writes lies below it")
    group.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    group.add_argument("--max_train_steps", type=int, help="paper: 6,000 for SD1.5, 80,000 for SD2.1-base")
    group.add_argument("--train_batch_size", type=int, help="per process; paper: 1024 over 16 GPUs")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches per step")
    group.add_argument("--learning_rate", type=float, help="of AdamW; paper: 8e-6")
    group.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant_with_warmup", help="paper: constant")
    group.add_argument("--lr_warmup_steps", type=int, default=100, help="paper: not stated")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="paper: 0")
    group.add_argument("--max_grad_norm", type=float, default=10.0, help="L2 norm of gradient clipping; paper: 10")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="of the networks")
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, on a GPU")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 on Ampere and later GPUs")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read data")
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="older checkpoints are deleted")
    group.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest" of --output_dir if any')
    group.add_argument("--report_to", choices=["tensorboard"], help="beside metrics.jsonl, which is always written")


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[mixed_precision], enabled=mixed_precision != "no")


def process() -> PartialState:
    """Rank and device, before a `Run` exists, by the same environment variables."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of data that `Teacher.dataset` reads."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        help="toy:<name>, a folder of images, or pairs with captions: a folder, or shards 'shards/{000..009}.tar'",
    )
    group.add_argument("--resolution", type=int, help="images are resized and cropped to it; default: the model's own")
    group.add_argument("--min_image_size", type=int, default=0, help="smaller images with captions are left out")
    group.add_argument(
        "--max_pwatermark", type=float, default=1.0, help="LAION's watermark probability; above: left out"
    )
    group.add_argument("--cache_latents", help="folder; encode images and captions once, then train from there")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Of those flags that are given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise BadInput(f"--{name} must be positive, not {value}")


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise BadInput("--use_8bit_adam needs the package bitsandbytes") from None
    return AdamW8bit


def stream_batches(dataset: Dataset | Shards, num_workers: int, **position) -> Iterator[list[torch.Tensor]]:
    """Batches without end, from a `position` that `EndlessBatches` and `Shards.batches` know."""
    streamed = isinstance(dataset, Shards)  # shards, which have an order of their own
    return iter(
        DataLoader(
            dataset.batches(**position) if streamed else dataset,
            sampler=None if streamed else EndlessBatches(len(dataset), **position),
            batch_size=None,  # the sampler's items are whole batches already
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
    )


def gathered(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, where FSDP has spread them over the processes; then each of these must call this."""
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


class Run:
    """One training run. `averages` are modules that change outside the optimizer; checkpoints hold them by their names.

    Iterating yields (step, batches): the step's number from 1, and an iterator over its micro-batches, each on the
    run's device. Everything random is a function of (seed, step), so a resumed run repeats an uninterrupted one.
    """

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, dataset: Dataset | Shards, averages: dict[str, nn.Module]
    ):
        check_positive(
            args, "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"
        )
        self.args, self.folder, self.averages = args, writable_folder(args.output_dir), averages
        # The step is decided by this class, so accelerate must not scale the warm-up by the number of processes.
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=args.report_to,
            project_dir=str(self.folder),
        )
        if self.accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise BadInput("several processes without GPUs need ACCELERATE_USE_CPU=true, or they would not cooperate")
        set_seed(args.seed, device_specific=True)  # from here on, dropout differs between processes
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adamw = _adamw_8bit() if args.use_8bit_adam else torch.optim.AdamW
        optimizer = adamw(trained, lr=args.learning_rate, weight_decay=args.adam_weight_decay)
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        if isinstance(dataset, Shards):
            dataset.check_readers(self.accelerator.num_processes * max(1, args.dataloader_num_workers))
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)  # of accelerate launch --use_fsdp
        if fsdp:
            if fsdp.fsdp_version == 1:
                raise BadInput("FSDP of version 1 is not supported: --fsdp_version 2 for accelerate launch")
            # Mixed precision is autocast's; this one would round x, α and σ as well, which are inputs of the model.
            fsdp.mixed_precision_policy = None
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, lr_scheduler)
        for module in averages.values():
            if fsdp:  # resharded after forward, the root too, because an average is taken shard by shard
                fsdp2_prepare_model(self.accelerator, module).set_reshard_after_forward(True)
            else:
                module.to(self.accelerator.device)
        self.dataset, self.step = dataset, 0
        earlier = checkpoints(self.folder)
        if earlier and not args.resume_from_checkpoint:
            raise BadInput(
                f"{self.folder} holds {earlier[-1].name} of an earlier run: --resume_from_checkpoint latest, "
                "or another --output_dir"
            )
        if args.resume_from_checkpoint == "latest":
            if earlier:
                self._resume(earlier[-1])
        elif args.resume_from_checkpoint:
            self._resume(Path(args.resume_from_checkpoint))
        if args.report_to:
            self.accelerator.init_trackers("splam")

    @property
    def total_batch_size(self) -> int:
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of one step, the same on every process: each draws for all and keeps its own rows."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_000_007 + step)

    def split(self, draws: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """What was drawn for a whole step's batch -> the rows of each micro-batch of this process, on its device."""
        size, accelerator = self.args.train_batch_size, self.accelerator
        for micro_step in range(self.args.gradient_accumulation_steps):
            first = (micro_step * accelerator.num_processes + accelerator.process_index) * size
            yield [rows[first : first + size].to(accelerator.device) for rows in draws]

    def __iter__(self) -> Iterator[tuple[int, Iterator]]:
        args, accelerator = self.args, self.accelerator
        stream = stream_batches(
            self.dataset,
            args.dataloader_num_workers,
            batch_size=args.train_batch_size,
            seed=args.seed,
            start=self.step * args.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.bar = tqdm(
            total=args.max_train_steps,
            initial=self.step,
            unit="step",
            mininterval=1,
            disable=not accelerator.is_main_process,
        )
        while self.step < args.max_train_steps:
            self.step += 1
            micro_batches = (next(stream) for _ in range(args.gradient_accumulation_steps))
            yield self.step, ([x.to(accelerator.device) for x in batch] for batch in micro_batches)
            self.bar.update()
        self.bar.close()

    def optimize(self, losses: Iterable[torch.Tensor]) -> float:
        """One optimizer step from the losses of its micro-batches, each computed when asked for.

        Returns their mean over micro-batches and processes."""
        total = torch.zeros((), device=self.accelerator.device)
        losses = iter(losses)
        for _ in range(self.args.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                loss = next(losses)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach() / self.args.gradient_accumulation_steps
        self.lr_scheduler.step()
        return self.accelerator.reduce(total, "mean").item()

    def log(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, and the progress bar."""
        if not self.accelerator.is_main_process:
            return
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.bar.set_postfix({"loss": f"{values['loss']:.4g}"}, refresh=False)
        if self.args.report_to:
            self.accelerator.log(values, step=step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _configuration(self) -> dict:
        fixed = {name: value for name, value in vars(self.args).items() if name not in FREE_FLAGS}
        batch = fixed.pop("train_batch_size") * fixed.pop("gradient_accumulation_steps")
        return {**fixed, "total_batch_size": batch * self.accelerator.num_processes}

    def checkpoint(self, step: int) -> None:
        """Every `--checkpointing_steps`, and at the end: checkpoint-N, written under another name and renamed."""
        if step % self.args.checkpointing_steps and step != self.args.max_train_steps:
            return
        final, draft = self.folder / f"checkpoint-{step}", self.folder / f"checkpoint-{step}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(draft))
        averages = {name: gathered(module.state_dict()) for name, module in self.averages.items()}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name, weights in averages.items():
                save_file(weights, draft / f"{name}.safetensors")
            (draft / "configuration.json").write_text(json.dumps(self._configuration(), indent=2))
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
            for old in checkpoints(self.folder)[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self, path: Path) -> None:
        if not (path / "configuration.json").is_file():
            raise BadInput(f"{path} is not a checkpoint of this program")
        there, here = json.loads((path / "configuration.json").read_text()), self._configuration()
        differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        if differing:
            pairs = ", ".join(f"{key} was {there.get(key)} and is {here.get(key)}" for key in differing)
            raise BadInput(f"{path} is of another configuration: {pairs}")
        # accelerate unpickles optimizer and random states with weights_only=True, which executes no code. FSDP's
        # sharded format is an exception, its index being a full pickle; --fsdp_state_dict_type FULL_STATE_DICT is none.
        self.accelerator.load_state(str(path))
        for key, module in self.averages.items():
            weights = load_file(path / f"{key}.safetensors")
            set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
        self.step = int(path.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
