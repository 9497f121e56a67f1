"""Check and measure kernels: `python -m benchmarks [OP ...] [--out FOLDER]`, in `kernels/`, on a CUDA device."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks.harness import Result, run_case, write

HERE = Path(__file__).parent
OPS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "harness", "plot"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON files")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of which the median is taken")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out a peer, by its name")
    parser.add_argument("--commit", help="what is measured, where the checkout has no git history")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.ops) - set(OPS))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; choose from {', '.join(OPS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    torch.manual_seed(0)
    failed = []
    for op in arguments.ops or OPS:
        results: list[Result] = []
        try:
            for case in importlib.import_module(f"benchmarks.{op}").cases():
                rows = run_case(case, repeats=arguments.repeats, skip=arguments.skip)
                _print(rows)
                results += rows
                write(arguments.out, op, results, arguments.commit)  # what is measured is not lost with what is not
        except Exception as error:  # the others can still be measured
            failed.append(op)
            print(f"{op}: FAILED {type(error).__name__}: {error}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _print(rows: list[Result]) -> None:
    first = rows[0]
    shape = " ".join(f"{name}{size}" for name, size in first.shape.items())
    aim = "" if first.target is None else f", aim {first.target:.2f} x"
    print(f"{first.op} {shape}: floor {first.floor_ms:.4f} ms{aim}")
    for row in rows:
        if row.ms is None or row.forward_ms is None or row.peak_mib is None:
            print(f"  {row.implementation:<24} did not run: {row.error}")
            continue
        rate = f"{row.flops / row.ms / 1e9:.0f} TFLOP/s" if row.flops else f"{row.bytes / row.ms / 1e9:.2f} TB/s"
        print(
            f"  {row.implementation:<24} {row.ms:8.4f} ms ({row.over_floor:.2f} x floor, {rate}), "
            f"forward {row.forward_ms:.4f} ms, {row.peak_mib:.0f} MiB, held {row.saved_mib:.0f} MiB",
            flush=True,
        )


main()
