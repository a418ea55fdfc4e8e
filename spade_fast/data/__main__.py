# SPDX-License-Identifier: Apache-2.0
"""Commands: check."""

from __future__ import annotations

import sys

from spade_fast.files import run_command

from . import check

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "check":
        sys.exit("usage: python -m spade_fast.data check --dataset NAME [options of training]; -h after check for all")
    sys.exit(run_command(lambda: check.main(sys.argv[2:])))
