# SPDX-License-Identifier: Apache-2.0
"""`python -m spade_fast.quickstart`: trains on procedural landscapes for a few minutes and shows what came out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from spade_fast.files import program
from spade_fast.train.config import TrainConfig, resolve_config
from spade_fast.train.trainer import Trainer


def l1_to_real(trainer: Trainer) -> float:
    """Mean absolute difference of the fixed validation samples' synthesized and true images, in [0, 2]."""
    assert trainer.sheets is not None  # one process alone draws them
    real = torch.stack([sample["image"] for sample in trainer.sheets.fixed.samples])
    trainer.recalibrate()
    return (trainer.sheets.synthesize() - real).abs().mean().item()


def main(argv: list[str] | None = None) -> int:
    """Trains and prints what came out.

    Returns:
        The exit status: 0 if the difference to the true images has at least halved.
    """
    parser = argparse.ArgumentParser(
        prog=program("quickstart"),
        description="Trains on procedural landscapes for a few minutes and shows what came out.",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes of training (default: 4)")
    parser.add_argument("--crop-size", type=int, default=64, help="size of the images (default: 64)")
    parser.add_argument("--out", type=Path, help="new directory for the run (default: a new one below runs/)")
    args = parser.parse_args(argv)
    if args.out is None:
        Path("runs").mkdir(exist_ok=True)
        args.out = Path(tempfile.mkdtemp(prefix="quickstart-", dir="runs"))
    # One core is left to data loading. Small convolutions take several times as long if their threads wait for a core.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    config = TrainConfig(
        dataset="synthetic",
        crop_size=args.crop_size,
        ngf=16,
        ndf=16,
        batch_size=4,
        epochs=50,  # more than there is time for: max_minutes ends it
        lr=1e-3,  # more than the paper's: the network is small and the steps are few
        lambda_vgg=0.0,
        lambda_l1=60.0,
        ema_samples=32,
        max_minutes=args.minutes,
        workers=1,
        sample_every=200,
        num_samples=6,
        log_every=10,
        tensorboard=False,
        out=str(args.out),
    )
    trainer = Trainer(resolve_config(config))
    start = l1_to_real(trainer)
    print(f"Training a small SPADE generator on procedural landscapes for {args.minutes:g} minutes.", flush=True)
    reason = trainer.train()
    if reason.startswith("SIG"):
        return 130
    end = l1_to_real(trainer)
    picture = trainer.draw_samples()
    print(
        f"L1 to the true images (validation): {start:.3f} at the start, {end:.3f} at the end, {end / start:.0%} of it."
    )
    assert picture is not None
    print(f"Picture (label map | synthesized | real): {picture.resolve()}")
    return 0 if end <= start / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
