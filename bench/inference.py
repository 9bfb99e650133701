"""Latency, arithmetic and peak memory of fusion over picture sizes: `python -m bench.inference --help`.

Implementations, of the paper's size with the same weights, or of the shipped network with `--preset tiny`:

  literal   the untuned second implementation, bench/literal.py (of the paper's size only)
  network   the network as it is trained, after `prepare_for_training`
  prepared  `prepare_for_inference`, with the memory that is free
  streamed  the same with a budget for the fewest feature maps, three
  onnx      the exported network on ONNX Runtime, if that is installed

`make bench` calls it. Every cell of the table runs in a process of its own under a memory limit, so that
peak memory belongs to one implementation and one size. Peak memory counts what a pair takes on top of what
the process holds after a pair of 32x32 pixels; weights and what libraries load at their first call are not
counted. What does not fit says so; what would need a fifth more than the limit, judged by the largest size
so far, is left out and says that. What would take longer than a minute or so runs with `--slow`. The
roofline is the rate of a matrix product in the same library, measured in the same call. What stands between
it and the prepared network is told by the last line, its time by kind of operator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from bench.run import _gflop, _models, _pair, _print_row, cell_environment, peak_bytes, train_cell

SIZES = ("128x128", "320x240", "640x480", "1280x960", "1920x1080", "2560x1440", "3840x2160")  # width x height
IMPLEMENTATIONS = ("literal", "network", "prepared", "streamed", "onnx")
SECONDS_PER_MEGAPIXEL = {
    "literal": 370,
    "network": 120,
    "prepared": 45,
    "streamed": 45,
    "onnx": 150,
}  # rough, to know what is slow
PRESETS = {"paper": 1.0, "tiny": 0.1}  # and their time for a picture, rough, relative to the paper's size
PATIENCE = 60  # seconds; slower cells need --slow
SCRATCH = Path("runs", "bench")


def _pixels(size: str) -> int:
    width, height = map(int, size.split("x"))
    return width * height


def _prepared(model, size: str, fewest_maps: bool):
    "The prepared network, with free choice or with a budget for as few feature maps as possible."
    import torch

    from smfnet.fast.prepared import _memory, prepare_for_inference

    width, height = map(int, size.split("x"))
    budget = _memory((height, width), model.config.dim * 4, 3, (64, 64), torch.get_num_threads())
    return prepare_for_inference(model, max_memory=budget if fewest_maps else None)


def _model(name: str, preset: str):
    "The network behind an implementation: with the weights of the literal version, or the shipped one."
    if preset == "paper":
        return _models()["literal" if name == "literal" else "smfnet"].eval()
    from smfnet.fast.training import prepare_for_training
    from smfnet.network.model import SMFNet

    return prepare_for_training(SMFNet.from_pretrained(preset))


def _method(name: str, size: str, args):
    "An object with `fuse`."
    model = _model(name, args.preset)
    if name == "onnx":
        from smfnet.fusion.onnx import OnnxModel, export_onnx

        path = SCRATCH / f"{args.preset}.onnx"
        if not path.exists():
            export_onnx(model, path)
        return OnnxModel(path, threads=args.threads or None)
    return model if name in ("literal", "network") else _prepared(model, size, name == "streamed")


def fuse_cell(name: str, size: str, args) -> dict:
    "Seconds (best) and peak memory of one fused pair; the result is saved for comparison."
    import torch

    method, pair = _method(name, size, args), _pair(*map(int, size.split("x")))
    method.fuse(**_pair(32, 32))  # starts the libraries
    start, times = peak_bytes(reset=True), []
    while len(times) < args.repeats and (not times or sum(times) + times[-1] < 2 * PATIENCE):
        begin = time.perf_counter()
        fused = method.fuse(**pair)
        times.append(time.perf_counter() - begin)
    peak = peak_bytes()
    torch.save(fused, SCRATCH / f"{name}-{size}.pt")
    cell = {
        "seconds": min(times),
        "runs": len(times),
        "peak_mb": (peak - start) / 1e6,
        "process_mb": peak / 1e6,
    }
    if hasattr(method, "schedule"):
        plan = method.schedule(tuple(pair["vis"].shape[-2:]))
        cell |= {
            "maps": plan.maps,
            "tile": list(plan.tile),
            "threads": plan.threads,
            "planned_mb": plan.memory / 1e6,
        }
    return cell


def count_cell(name: str, size: str, args) -> dict:
    "Arithmetic per pixel, counted in float64, where every operation is one that the counter knows."
    from smfnet.fast.prepared import prepare_for_inference

    model = _model(name, args.preset).double()
    if name in ("prepared", "streamed"):
        import torch

        width, height = map(int, size.split("x"))
        model = prepare_for_inference(model, dtype=torch.float64, threads=1, tile=(height, width))
    pair = {k: v.double() for k, v in _pair(*map(int, size.split("x"))).items()}
    return {"gflop_per_megapixel": _gflop(lambda: model.fuse(**pair)) / _pixels(size) * 1e6}


def rate_cell(name: str, size: str, args) -> dict:
    "GFLOP/s of matrix products in the cache: 4096×256 with 256×256 by oneDNN, 1024×1024 by the BLAS library."
    import torch

    x = torch.randn(1, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    w, a = torch.randn(256, 256, 1, 1), torch.randn(1024, 1024)
    by_onednn = lambda: torch.mkldnn_convolution(x, w, None, (0, 0), (1, 1), (1, 1), 1)
    calls = {"onednn": (by_onednn, 2 * 4096 * 256 * 256), "blas": (lambda: a @ a, 2 * 1024**3)}
    rates = {}
    for library, (call, flop) in calls.items():
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        rates[library] = flop / min(times) / 1e9
    return {"gflops": max(rates.values()), "rates": rates, "threads": torch.get_num_threads()}


KINDS_OF_WORK = {  # operators by what they do; the first kind that fits counts
    "convolutions": ("convolution",),
    "matrix products": ("::mm", "::bmm", "::addmm"),
    "layer normalisation": ("layer_norm",),
    "copies, joining, padding": ("copy_", "::cat", "fill_", "_pad", "clone", "contiguous"),
    "other operators": ("",),
}


def shares_cell(name: str, size: str, args) -> dict:
    "Where the prepared network's time goes on one thread: shares by kind of operator."
    from torch.profiler import ProfilerActivity, profile

    from smfnet.fast.prepared import prepare_for_inference

    model, pair = (
        prepare_for_inference(_model("prepared", args.preset), threads=1),
        _pair(*map(int, size.split("x"))),
    )
    model.fuse(**pair)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        model.fuse(**pair)
        wall = time.perf_counter() - begin
    spent = dict.fromkeys(KINDS_OF_WORK, 0.0)
    for event in seen.key_averages():
        kind = next(k for k, words in KINDS_OF_WORK.items() if any(w in event.key for w in words))
        spent[kind] += event.self_cpu_time_total / 1e6
    return {
        "size": size,
        "seconds": wall,
        "shares": {k: v / wall for k, v in spent.items()}
        | {"between operators": max(0.0, 1 - sum(spent.values()) / wall)},
    }


def _train(name: str, size: str, args) -> dict:
    return train_cell(name, size, args.repeats)


CELLS = {"fuse": fuse_cell, "count": count_cell, "rate": rate_cell, "shares": shares_cell, "train": _train}


def _limit(amount: int):
    "A function that limits the data of the process that is about to start."

    def set_limit():
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (amount, amount))

    return set_limit


def _run_cell(kind: str, name: str, size: str, args) -> dict:
    "One cell in a fresh process under the memory limit."
    from smfnet.fast.tiles import show_memory

    command = [
        sys.executable,
        "-m",
        "bench.inference",
        "--cell",
        kind,
        name,
        size,
        "--preset",
        args.preset,
        "--repeats",
        str(args.repeats),
        "--threads",
        str(args.threads),
    ]
    limit = {} if sys.platform != "linux" else {"preexec_fn": _limit(args.limit)}
    done = subprocess.run(command, capture_output=True, text=True, env=cell_environment(name), **limit)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    full = done.returncode in (-9, 137) or any(
        word in done.stderr for word in ("allocate memory", "MemoryError", "bad_alloc", "Cannot allocate")
    )
    return {"failed": f"does not fit into {show_memory(args.limit)}" if full else last}


def _has_onnx() -> bool:
    from importlib.util import find_spec

    return bool(find_spec("onnxruntime") and find_spec("onnx") and find_spec("onnxscript"))


def _memory_guess(name: str, size: str, done: dict) -> tuple[float, str] | None:
    "Bytes that an implementation without a budget would take, by its largest size so far, and that size."
    cells = [
        (_pixels(s), row[name]["peak_mb"] * 1e6, s)
        for s, row in done.items()
        if "seconds" in row.get(name, {})
    ]
    if name in ("prepared", "streamed") or not cells:
        return None
    pixels, peak, largest = max(cells)
    return peak * _pixels(size) / pixels, largest


def _cell(name: str, size: str, results: dict, args) -> dict:
    "Run or leave out one cell; add its arithmetic and its distance to the roofline."
    counts, rate = results["gflop_per_megapixel"], results["rate"]["gflops"]
    guess = PRESETS[args.preset] * SECONDS_PER_MEGAPIXEL[name] * _pixels(size) / 1e6
    if guess > PATIENCE and not args.slow:
        return {"left out": f"about {guess:.0f} s; --slow runs it"}
    if (memory := _memory_guess(name, size, results["fuse"])) and memory[0] > 1.2 * args.limit:
        found = f"about {memory[0] / 1e9:.0f} GB, by its peak at {memory[1]}"
        return {"left out": f"would take {found}; the limit is {args.limit / 1e9:.1f} GB"}
    cell = _run_cell("fuse", name, size, args)
    if "seconds" in cell and name in counts:
        cell["gflop"] = counts[name] * _pixels(size) / 1e6
        cell["gflops"] = cell["gflop"] / cell["seconds"]
        cell["of_roofline"] = cell["gflops"] / rate
    return cell


def _differences(size: str) -> dict[str, float]:
    "Largest difference of each result from the first implementation that ran."
    import torch

    found = {
        n: torch.load(p, weights_only=True)
        for n in IMPLEMENTATIONS
        if (p := SCRATCH / f"{n}-{size}.pt").exists()
    }
    return {n: (x - next(iter(found.values()))).abs().max().item() for n, x in found.items()}


def _print_cell(size: str, name: str, c: dict) -> None:
    if "seconds" not in c:
        print(f"{size:>9} {name:8} {c.get('failed') or 'left out: ' + c['left out']}", flush=True)
        return
    rest = (
        f" {c['gflop']:9.1f} GFLOP {c['gflops']:7.1f} GFLOP/s {100 * c['of_roofline']:5.1f} % of roofline"
        if "gflop" in c
        else ""
    )
    print(f"{size:>9} {name:8} {c['seconds']:9.3f} s {c['peak_mb']:8.0f} MB{rest}", flush=True)


def _print_shares(cell: dict) -> None:
    "What stands between the prepared network and the roofline."
    text = (
        cell.get("failed")
        or ", ".join(f"{k} {100 * v:.0f} %" for k, v in cell["shares"].items())
        + f" ({cell['size']}, one thread, under a profiler)"
    )
    print(f"time of the prepared network: {text}")


def _print_summary(size: str, cells: dict) -> None:
    done = {n: c for n, c in cells.items() if "seconds" in c}
    for n in ("prepared", "streamed"):
        if n in done and "literal" in done:
            faster, less = (done["literal"][key] / done[n][key] for key in ("seconds", "peak_mb"))
            print(f"{size:>9} {n:8} {faster:.2f} × faster than literal, {less:.2f} × less memory")
    if len(done) > 1:
        print(
            f"{size:>9} largest difference from {next(iter(done))}: "
            + ", ".join(f"{n} {c['difference']:.1e}" for n, c in list(done.items())[1:])
        )


def draw(results: dict, path: Path) -> None:
    "Latency with the roofline, and peak memory, over megapixels; written as `path` with .svg and .png."
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.ticker import FuncFormatter, LogLocator

    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    colours = dict(zip(IMPLEMENTATIONS, sns.color_palette("colorblind")))
    for name in IMPLEMENTATIONS:
        cells = [
            (_pixels(s) / 1e6, row[name])
            for s, row in results["fuse"].items()
            if "seconds" in row.get(name, {})
        ]
        for ax, key, unit in ((axes[0], "seconds", 1), (axes[1], "peak_mb", 1e3)):
            if cells:
                ax.plot(
                    [x for x, _ in cells],
                    [c[key] / unit for _, c in cells],
                    "o-",
                    color=colours[name],
                    label=name,
                )
    count, rate = results["gflop_per_megapixel"].get("prepared"), results["rate"]["gflops"]
    sizes = [_pixels(s) / 1e6 for s in results["fuse"]]
    if count and sizes:
        axes[0].plot(sizes, [count * x / rate for x in sizes], "k--", label=f"prepared at {rate:.0f} GFLOP/s")
    for ax, label in zip(axes, ("seconds", "peak memory of one pair, GB")):
        ax.set(xscale="log", yscale="log", xlabel="width × height, pixels", ylabel=label)
        ax.set_xticks(sizes, [s.replace("x", "×") for s in results["fuse"]], rotation=30)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.legend(frameon=False)
    fig.tight_layout()
    for suffix in (".svg", ".png"):
        fig.savefig(path.with_suffix(suffix), dpi=110)


def _options(argv: list[str] | None) -> argparse.Namespace:
    from smfnet.fast.tiles import free_memory, parse_memory

    p = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__.splitlines()[0])
    p.add_argument(
        "--sizes", nargs="+", default=list(SIZES), metavar="WxH", help="sizes to fuse (default: %(default)s)"
    )
    p.add_argument(
        "--methods",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help="implementations (default: all)",
    )
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="network: of the paper's size, or the shipped tiny one (default: %(default)s)",
    )
    p.add_argument("--slow", action="store_true", help=f"also what takes longer than about {PATIENCE} s")
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
    p.add_argument(
        "--limit",
        type=parse_memory,
        default=int(0.9 * free_memory()),
        metavar="SIZE",
        help="memory of each process (default: 90 %% of what is free)",
    )
    p.add_argument(
        "--out",
        default=str(SCRATCH),
        metavar="DIR",
        help="receives inference.json, .svg and .png, or inference-tiny.* (default: %(default)s)",
    )
    p.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def _one_cell(args) -> int:
    import torch

    from smfnet.fast.memory import keep_freed_memory

    keep_freed_memory()  # unless `cell_environment` forbids it
    if args.threads:
        torch.set_num_threads(args.threads)
    kind, name, size = args.cell
    print(json.dumps(CELLS[kind](name, size, args)))
    return 0


def _table(results: dict, args) -> None:
    "Run and print all cells, size by size."
    for size in args.sizes:
        row = results["fuse"][size] = {}
        for name in results["methods"]:
            row[name] = _cell(name, size, results, args)
            _print_cell(size, name, row[name])
        for name, d in _differences(size).items():
            row[name]["difference"] = d
        _print_summary(size, row)
    if args.train_size and args.preset == "paper":
        results["train"] = {
            args.train_size: {n: _run_cell("train", n, args.train_size, args) for n in ("literal", "smfnet")}
        }
        _print_row("train", args.train_size, results["train"][args.train_size])


def main(argv: list[str] | None = None) -> int:
    args = _options(argv)
    if args.cell:
        return _one_cell(args)
    from smfnet.core.provenance import environment, git_revision, write_json

    git = git_revision()  # before the pictures, which would be changes
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for old in [*SCRATCH.glob("*.pt"), *SCRATCH.glob("*.onnx")]:
        old.unlink()
    rate = _run_cell("rate", "-", "0x0", args)
    if "failed" in rate:
        problem = f"a matrix product cannot be timed ({rate['failed']})"
        print(f"bench: error: {problem}; repair that or give another --limit", file=sys.stderr)
        return 2
    methods = [
        n
        for n in IMPLEMENTATIONS
        if n in args.methods and (n != "onnx" or _has_onnx()) and (n != "literal" or args.preset == "paper")
    ]
    counts = {
        n: _run_cell("count", n, "64x64", args)
        for n in ("literal", "network", "prepared")
        if n in methods or n == "prepared"
    }
    counts = {n: c["gflop_per_megapixel"] for n, c in counts.items() if "failed" not in c}
    if "prepared" in counts:
        counts["streamed"] = counts["prepared"]
    results = {
        "preset": args.preset,
        "fuse": {},
        "methods": methods,
        "gflop_per_megapixel": counts,
        "rate": rate,
    }
    speed = f"{rate['gflops']:.0f} GFLOP/s on {rate['threads']} threads"
    limit = f"memory limit {args.limit / 1e9:.1f} GB"
    print(f"{args.preset} network; matrix products: {speed}; {limit}", flush=True)
    _table(results, args)
    if "prepared" in methods:
        results["shares"] = _run_cell("shares", "prepared", "320x240", args)
        _print_shares(results["shares"])
    out = Path(args.out, "inference" if args.preset == "paper" else f"inference-{args.preset}")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, out)
    write_json(
        out.with_suffix(".json"),
        {
            **results,
            "limit": args.limit,
            "environment": environment(),
            "git": git,
            "command": ["python", "-m", "bench.inference", *(argv or sys.argv[1:])],
        },
    )
    print(f"written: {out}.json, .svg, .png")
    rows = [*results["fuse"].values(), *results.get("train", {}).values()]
    return int(any("failed" in c and "does not fit" not in c["failed"] for row in rows for c in row.values()))


if __name__ == "__main__":
    sys.exit(main())
