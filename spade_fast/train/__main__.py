# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.train`: train a SPADE generator. Options: `config`; loop: `trainer`.

Several GPUs: `torchrun --nproc-per-node 8 -m spade_fast.train ...`.
"""

from __future__ import annotations

import argparse
import os
import sys

from spade_fast.cli import ConfigError, add_options, parse
from spade_fast.data import DataError
from spade_fast.data.options import check_command
from spade_fast.files import WriteError, one_line, program, run_command
from spade_fast.models import VGGWeightsError
from spade_fast.models.checkpoint import CheckpointError
from spade_fast.train.config import PATHS, TrainConfig, merge, read_file, read_run, resolve_config
from spade_fast.train.monitor import MissingExtraError
from spade_fast.train.plan import describe
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError
from spade_fast.train.trainer import NonFiniteError, Trainer

USER_ERRORS = (
    *(ConfigError, DataError, RunDirectoryError, VGGWeightsError, MissingExtraError, CheckpointError),
    *(WriteError, OSError),
)
EXAMPLES = """\
examples:
  your own photos and label maps, a tenth of them held out; no VGG weights are downloaded:
    python -m spade_fast.train --dataset folder --image-dir photos --label-dir labels --num-classes 20 \\
        --val-split 0.1 --lambda-vgg 0 --out runs/mine
  a dataset of the paper, with its schedule:
    python -m spade_fast.train --preset coco --dataroot PATH --out runs/coco
  on eight GPUs, and then again from the newest checkpoint:
    torchrun --nproc-per-node 8 -m spade_fast.train --preset coco --dataroot PATH --out runs/coco
    torchrun --nproc-per-node 8 -m spade_fast.train --resume --out runs/coco
"""


def parser() -> argparse.ArgumentParser:
    """The command line of training."""
    p = argparse.ArgumentParser(
        prog=program("train"),
        usage="%(prog)s [--dataset NAME | --preset NAME] [options]; see the examples at the end",
        description="Trains a SPADE generator. Ctrl-C saves; --resume continues.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--config", metavar="FILE", help="JSON or YAML file of options, as a run's config.json")
    p.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    p.add_argument("--dry-run", action="store_true", help="print the whole plan and exit")
    p.add_argument(
        "--profile", type=int, metavar="N", help="after N steps, write a trace and a table of where a step's time goes"
    )
    add_options(p, TrainConfig)
    return p


def _missing(config: TrainConfig) -> bool:
    """Whether a path of the data is not there. The check would say no more than that."""
    paths = (getattr(config, name) for name in PATHS if name not in ("vgg_weights", "out"))
    return any(path is not None and not os.path.exists(path) for path in paths)


def main(argv: list[str] | None = None) -> int:
    """Trains.

    Returns:
        The exit status: 0 finished or stopped by time limit or signal (see `stopping`), 130 Ctrl-C, 2 non-finite loss,
        1 other errors.
    """
    args, given = parse(parser(), argv, TrainConfig)
    trainer = config = None
    rank = os.environ.get("RANK")
    who = f"rank {rank}: " if rank and int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        if args.resume and args.config:
            raise ConfigError("--resume and --config exclude each other: a run resumes with its own config.json")
        file = read_file(args.config) if args.config else {}
        if args.resume:
            run = RunDirectory(given.get("out", TrainConfig.out))
            run.require_run()
            file = {**read_run(run.config), "out": str(run.path)}
        config = resolve_config(merge(file, given))
        if args.dry_run:
            print(describe(config))
            return 0
        trainer = Trainer(config, resume=args.resume)
        reason = trainer.train(args.profile)
    except NonFiniteError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        text = one_line(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, DataError) and config is not None and not _missing(config):
            more = "\n" if "\n" in text else "; "
            text += f"{more}to list every fault of the data: {check_command(config)}"
        print(f"{who}error: {text}", file=sys.stderr)
        if trainer is not None and trainer.last_checkpoint is not None:
            print(f"Saved {trainer.last_checkpoint}; --resume continues from there.", file=sys.stderr)
        return 1
    trainer.ranks.leave()
    if reason == "fault":
        return 1
    if not trainer.ranks.is_main:
        return 130 if reason == "SIGINT" else 0
    done = f"step {trainer.step} of {trainer.total_steps}, saved {trainer.last_checkpoint}"
    print(
        f"Finished: {done}" if reason == "finished" else f"Stopped ({reason}): {done}; --resume continues from there."
    )
    return 130 if reason == "SIGINT" else 0


def start(argv: list[str] | None = None) -> int:
    """`main`; under torchrun, with its record of errors, which shows the traceback of the process that failed first."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main(argv)
    from torch.distributed.elastic.multiprocessing.errors import record

    status = record(main)(argv)
    assert status is not None  # record is typed as if it swallowed errors; it raises them
    return status


if __name__ == "__main__":
    sys.exit(run_command(start))
