"""Time the loading of training patches from a set's files: `python -m bench.loading --help`.

Each row is one way of loading, in a process of its own: decoding anew for every patch, with a memory that
holds the whole set, and in the training process instead of workers. What counts is pairs of patches a second,
from the moment the loader is asked to the last batch, after one batch that starts the workers. The consumer
does nothing, so this is what the loader can deliver, not what a training would take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

WAYS = {"decode every patch": 0, "remember decoded pairs": 4 << 30}  # bytes of memory a process
NEEDED = 200  # pairs of 128×128 a second with two workers


def measure(args) -> dict:
    "One row: build the patch set, read through epochs for a while."
    import torch

    torch.set_num_threads(1)
    from smfnet.data.pairs import get_pairs, patch_loader
    from smfnet.data.patches import PatchSet

    name = Path(args.set) if Path(args.set).is_dir() else args.set
    pairs = get_pairs(
        name, None if isinstance(name, Path) else args.split, root=args.root, memory=args.memory
    )
    start = time.perf_counter()
    patches = PatchSet(pairs, patch=args.patch, stride=args.patch)
    setup = time.perf_counter() - start
    if args.memory == 0 or args.workers:
        pairs.cache.kept.clear()  # workers shall not inherit what the contrast filter has decoded
        pairs.cache.used = 0
    loader = patch_loader(patches, args.batch, workers=args.workers)
    first_epoch, count, epoch, begin = None, 0, 0, None
    while begin is None or time.perf_counter() - begin < args.seconds:
        loader.batch_sampler.set_epoch(epoch)
        started, seen = time.perf_counter(), 0
        for batch in loader:
            if begin is None:
                begin = started = time.perf_counter()  # the first batch starts the workers
                continue
            seen += len(batch["ir"])
            if time.perf_counter() - begin > args.seconds and first_epoch:
                break
        count += seen
        first_epoch = first_epoch or seen / (time.perf_counter() - started)
        epoch += 1
    return {
        "pairs_per_second": count / (time.perf_counter() - begin),
        "first_epoch": first_epoch,
        "epochs": epoch,
        "patches": len(patches),
        "setup_s": setup,
    }


def _row(args, workers: int, memory: int) -> dict:
    command = [
        sys.executable,
        "-m",
        "bench.loading",
        "--cell",
        "--set",
        args.set,
        "--split",
        args.split,
        "--workers",
        str(workers),
        "--memory",
        str(memory),
        "--seconds",
        str(args.seconds),
        "--batch",
        str(args.batch),
        "--patch",
        str(args.patch),
        *(["--root", args.root] if args.root else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failed": said[-1] if said else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _line(r: dict) -> str:
    "A row for people."
    if "failed" in r:
        return f"failed: {r['failed']}"
    speed = f"{r['pairs_per_second']:8.0f} pairs/s   first epoch {r['first_epoch']:6.0f} pairs/s"
    return f"{speed}   {r['patches']} patches, listed in {r['setup_s']:.1f} s"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__.splitlines()[0])
    p.add_argument(
        "--set",
        default="RoadScene",
        help="data set, or a folder that holds ir/ and vi/ (default: %(default)s)",
    )
    p.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    p.add_argument("--root", help="folder that holds the sets (default: SMFNET_DATA, then data/)")
    p.add_argument("--patch", type=int, default=128, help="side, pixels (default: %(default)s)")
    p.add_argument("--batch", type=int, default=8, help="pairs (default: %(default)s)")
    p.add_argument(
        "--workers", type=int, default=2, help="processes that decode and cut (default: %(default)s)"
    )
    p.add_argument("--seconds", type=float, default=10, help="time of each row (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="write all numbers and the environment to FILE")
    p.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.cell:
        print(json.dumps(measure(args)))
        return 0
    results = {
        f"{way}, {w} workers": _row(args, w, memory)
        for way, memory in WAYS.items()
        for w in dict.fromkeys((0, args.workers))
    }
    for way, r in results.items():
        print(f"{way:36} {_line(r)}")
    reached = all(
        r.get("first_epoch", 0) >= NEEDED
        for way, r in results.items()
        if way.endswith(f"{args.workers} workers")
    )
    verdict = "reached" if reached else "not reached"
    print(f"{NEEDED} pairs/s with {args.workers} workers, also in the first epoch: {verdict}")
    if args.json:
        from smfnet.core.provenance import environment, git_revision, write_json

        write_json(
            args.json,
            {
                "results": results,
                "environment": environment(),
                "git": git_revision(),
                "command": ["python", "-m", "bench.loading", *(argv or sys.argv[1:])],
            },
        )
    return int(any("failed" in r for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
