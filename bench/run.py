"""Time the paper-size network against its literal version: `make bench`, or `python -m bench.run --help`.

Every cell of the table runs in a process of its own, so that peak memory belongs to one implementation and
one size, and nothing that one cell leaves in caches or allocators helps the next. All cells run in one call,
one after the other, with the same weights; the largest difference of the results is printed with the times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

SIZES = ("128x128", "320x240")  # width x height, as in file managers
IMPLEMENTATIONS = ("literal", "smfnet")


def _models():
    "Both implementations with the same random weights, ours prepared for training."
    import torch

    from bench.literal import LiteralSMFNet, released_key
    from smfnet.fast.training import prepare_for_training
    from smfnet.network.released import load_released

    torch.manual_seed(7)
    literal = LiteralSMFNet().eval()
    with torch.no_grad():
        for p in literal.parameters():
            if not p.any():
                p.fill_(0.1)  # what starts at zero would hide its branch from the comparison
    state = {released_key(k): v for k, v in literal.state_dict().items()}
    return {"literal": literal, "smfnet": prepare_for_training(load_released(state, verbose=False))}


def _pair(width: int, height: int, batch: int = 1):
    import torch

    g = torch.Generator().manual_seed(0)
    return {k: torch.rand(batch, 1, height, width, generator=g) for k in ("vis", "ir")}


def peak_bytes(reset: bool = False) -> int:
    "Largest memory that the process has held; on Linux since its start or the last `reset`."
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # forbidden in some containers; the peak since the start is as good, a model was just loaded
    return next(
        1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")
    )


def _peak_mb() -> float:
    return peak_bytes() / 2**20


def _gflop(call) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def fuse_cell(name: str, size: str, repeats: int) -> dict:
    "Seconds (best of `repeats`), peak memory and arithmetic of one fused pair; the result is saved."
    import torch

    model, pair = _models()[name], _pair(*map(int, size.split("x")))
    base = _peak_mb()
    call = lambda: model.fuse(**pair)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fused = call()
        times.append(time.perf_counter() - start)
    peak = _peak_mb() - base
    torch.save(fused, _result(name, size))
    return {"seconds": min(times), "peak_mb": peak, "gflop": _gflop(call)}


def train_cell(name: str, size: str, repeats: int) -> dict:
    "Images a second of a stage II training step (forward, loss, backward, clipping, Adam), batch 2."
    import torch

    from bench.literal import LiteralTrainer
    from smfnet.losses.stages import stage2_loss
    from smfnet.training.recipes import clip_gradients, make_optimiser, recipe

    model, pair = _models()[name].train(), _pair(*map(int, size.split("x")), batch=2)
    loss = lambda f: stage2_loss(f, **pair)[0]
    if name == "literal":
        trainer = LiteralTrainer(model, 2)
        step = lambda: trainer.step(pair["vis"], pair["ir"], loss)
    else:
        r = recipe("paper", channels_last=True)
        model.to(memory_format=torch.channels_last)
        optimiser = make_optimiser(model, r)

        def step():
            optimiser.zero_grad(set_to_none=True)
            loss(model(**pair, stage=2)).backward()
            clip_gradients(model, r.clip)
            optimiser.step()

    times = []
    for _ in range(
        repeats + 3
    ):  # the first three steps find their memory and optimiser state, and do not count
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times[3:]), "images_per_second": 2 / min(times[3:]), "peak_mb": _peak_mb()}


def _result(name: str, size: str) -> Path:
    return Path("runs", "bench", f"{name}-{size}.pt")


def cell_environment(name: str) -> dict[str, str]:
    "Environment of a cell's process: the literal version runs without our setting of the allocator."
    return {**os.environ, **({"SMFNET_KEEP_MEMORY": "0"} if name == "literal" else {})}


def _run_cell(kind: str, name: str, size: str, args) -> dict:
    "One cell in a fresh process."
    command = [
        sys.executable,
        "-m",
        "bench.run",
        "--cell",
        kind,
        name,
        size,
        "--repeats",
        str(args.repeats),
        "--threads",
        str(args.threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=cell_environment(name))
    if done.returncode:
        return {
            "failed": done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"exit {done.returncode}"
        }
    return json.loads(done.stdout.splitlines()[-1])


def _difference(size: str) -> float | None:
    import torch

    paths = [_result(n, size) for n in IMPLEMENTATIONS]
    if not all(p.exists() for p in paths):
        return None
    a, b = (torch.load(p, weights_only=True) for p in paths)
    return (a - b).abs().max().item()


def _print_row(kind: str, size: str, cells: dict) -> None:
    for name, c in cells.items():
        if "failed" in c:
            print(f"{kind:6} {size:>9} {name:8} failed: {c['failed']}")
            continue
        extra = (
            f"{c['gflop']:9.1f} GFLOP {c['gflop'] / c['seconds']:7.1f} GFLOP/s"
            if "gflop" in c
            else f"{c['images_per_second']:7.3f} images/s"
        )
        print(f"{kind:6} {size:>9} {name:8} {c['seconds']:8.3f} s {c['peak_mb']:8.0f} MB {extra}")
    if all("seconds" in c for c in cells.values()):
        a, b = (cells[n] for n in IMPLEMENTATIONS)
        faster, less = (a[key] / b[key] for key in ("seconds", "peak_mb"))
        print(f"{kind:6} {size:>9} ratio    {faster:8.2f} × faster, {less:.2f} × less memory")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    p.add_argument(
        "--sizes",
        nargs="+",
        default=list(SIZES),
        metavar="WxH",
        help="image sizes to fuse (default: %(default)s)",
    )
    p.add_argument(
        "--train-size",
        default="128x128",
        metavar="WxH",
        help="patch of the training step; empty: none (default: %(default)s)",
    )
    p.add_argument(
        "--repeats", type=int, default=3, help="runs of each cell, the best counts (default: %(default)s)"
    )
    p.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0: its own choice")
    p.add_argument("--json", metavar="FILE", help="write all numbers and the environment to FILE")
    p.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.cell:
        import torch

        from smfnet.fast.memory import keep_freed_memory

        keep_freed_memory()  # unless `cell_environment` forbids it
        if args.threads:
            torch.set_num_threads(args.threads)
        kind, name, size = args.cell
        print(json.dumps({"fuse": fuse_cell, "train": train_cell}[kind](name, size, args.repeats)))
        return 0
    _result("x", "y").parent.mkdir(parents=True, exist_ok=True)
    for old in _result("x", "y").parent.glob("*.pt"):
        old.unlink()
    jobs = [("fuse", s) for s in args.sizes] + ([("train", args.train_size)] if args.train_size else [])
    results = {}
    for kind, size in jobs:
        results[f"{kind} {size}"] = cells = {n: _run_cell(kind, n, size, args) for n in IMPLEMENTATIONS}
        _print_row(kind, size, cells)
        if kind == "fuse":
            cells["difference"] = _difference(size)
            print(
                f"{kind:6} {size:>9} largest difference of the results: {cells['difference']:.1e}"
                if cells["difference"] is not None
                else ""
            )
    if args.json:
        from smfnet.core.provenance import environment, git_revision, write_json

        write_json(
            args.json,
            {
                "results": results,
                "environment": environment(),
                "git": git_revision(),
                "machine": platform.processor(),
                "command": ["python", "-m", "bench.run", *(argv or sys.argv[1:])],
            },
        )
    return int(
        any("failed" in c for cells in results.values() for c in cells.values() if isinstance(c, dict))
    )


if __name__ == "__main__":
    sys.exit(main())
