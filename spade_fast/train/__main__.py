# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.train`: train a SPADE generator. Options: `config`; loop: `trainer`.

Several GPUs: `torchrun --nproc-per-node 8 -m spade_fast.train ...`.
"""

from __future__ import annotations

import argparse
import os
import sys

from spade_fast.data import DataError
from spade_fast.files import WriteError, one_line, run_command
from spade_fast.models import VGGWeightsError
from spade_fast.models.checkpoint import CheckpointError
from spade_fast.train import config as cfg
from spade_fast.train.monitor import MissingExtraError
from spade_fast.train.plan import describe
from spade_fast.train.run_directory import RunDirectory, RunDirectoryError
from spade_fast.train.trainer import NonFiniteError, Trainer

USER_ERRORS = (
    *(cfg.ConfigError, DataError, RunDirectoryError, VGGWeightsError, MissingExtraError, CheckpointError),
    *(WriteError, OSError),
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 finished or stopped by time limit or signal (see `stopping`), 130 Ctrl-C, 2 non-finite loss, 1
    other errors."""
    parser = argparse.ArgumentParser(
        prog="python -m spade_fast.train", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file of options, as a run's config.json")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the whole plan and exit")
    parser.add_argument(
        "--profile", type=int, metavar="N", help="after N steps, write a trace and a table of where a step's time goes"
    )
    cfg.add_arguments(parser)
    args, given = cfg.parse(parser, argv)
    trainer = None
    rank = os.environ.get("RANK")
    who = f"rank {rank}: " if rank and int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        if args.resume and args.config:
            raise cfg.ConfigError("--resume and --config exclude each other: a run resumes with its own config.json")
        file = cfg.read_file(args.config) if args.config else {}
        if args.resume:
            run = RunDirectory(given.get("out", cfg.TrainConfig.out))
            run.require_run()
            file = {**cfg.read_run(run.config), "out": str(run.path)}
        config = cfg.resolve(cfg.merge(file, given))
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
    """`main`; under torchrun, which shows the traceback of the process that failed first, with its record of errors."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main(argv)
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)(argv)


if __name__ == "__main__":
    sys.exit(run_command(start))
