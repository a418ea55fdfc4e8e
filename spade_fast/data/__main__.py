# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.data check`: reads every file of a dataset and lists every fault."""

from __future__ import annotations

import argparse
import sys

from spade_fast.cli import ConfigError, add_options, parse
from spade_fast.data import PHASES, check
from spade_fast.files import program, run_command
from spade_fast.train.config import TrainConfig, merge, read_file


def main(argv: list[str] | None = None) -> int:
    """The command `check`. It takes the options of training, and a configuration file of training.

    Returns:
        The exit status: 0 without faults, 1 with.
    """
    parser = argparse.ArgumentParser(
        prog=program("data check"),
        usage="%(prog)s [--dataset NAME | --preset NAME] [options]",
        description="Reads every file of a dataset and lists every fault. Takes the options of training.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="options of a training run, as JSON or YAML")
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all", help="what to read (default: all)")
    parser.add_argument("--labels-only", action="store_true", help="without images, as for synthesis")
    add_options(parser, TrainConfig)
    args, given = parse(parser, argv, TrainConfig)
    try:
        options = merge(read_file(args.config) if args.config else {}, given)
    except ConfigError as error:
        parser.error(str(error))
    phases = PHASES if args.phase == "all" else (args.phase,)
    return int(check.run(options, phases, need_images=not args.labels_only) > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "check":
        sys.exit("usage: python -m spade_fast.data check --dataset NAME [options of training]; -h after check for all")
    sys.exit(run_command(lambda: main(sys.argv[2:])))
