"""Speed and memory of smfnet.metrics against the plain NumPy/SciPy reference of the tests.

    python bench/metrics.py [--json FILE] [--rounds N]

Both sides measure the same rendered 768×576 pair in one run, on one thread, taking turns, so that whatever
else the machine does falls on both. Reported are medians and the fastest rounds; the ratio is of medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from smfnet.core.provenance import environment, write_json
from smfnet.data.scenes import render_scene
from smfnet.metrics import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "metrics"))
import metrics_reference as reference  # noqa: E402

GOALS = {"ratio": 20.0, "seconds": 0.3, "memory_mb": 1000.0}


def pair(height, width):
    "A rendered pair and a fused image made from it; whole numbers 0-255."
    scene = render_scene(1, size=(height, width))
    ir, vis = scene.ir.astype(np.float32), reference.gray(scene.vis)
    return {"fused": np.rint(0.5 * np.maximum(ir, vis) + 0.25 * (ir + vis)), "ir": ir, "vis": vis}


def seconds(function):
    "Wall time of one call."
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(times):
    "Median and minimum of repeated measurements, in seconds."
    return {"median": statistics.median(times), "fastest": min(times)}


def speed(rounds):
    "Plain and fast take turns on one thread."
    images = pair(576, 768)
    torch.set_num_threads(1)
    fast, plain = evaluate(**images), reference.evaluate(*images.values())  # warms both, and they must agree
    worst = max(abs(fast[name] / plain[name] - 1) for name in fast)
    times = {"plain": [], "fast": []}
    for _ in range(rounds):
        times["plain"].append(seconds(lambda: reference.evaluate(*images.values())))
        times["fast"] += [seconds(lambda: evaluate(**images)) for _ in range(5)]
    torch.set_num_threads(2)
    evaluate(**images)
    two = [seconds(lambda: evaluate(**images)) for _ in range(4 * rounds)]
    torch.set_num_threads(1)
    result = {name: summary(t) for name, t in times.items()} | {"fast_two_threads": summary(two)}
    return result | {
        "ratio": result["plain"]["median"] / result["fast"]["median"],
        "largest_relative_difference": worst,
    }


def peak_mb():
    "Peak resident memory of this process so far, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def memory():
    "Runs in a process of its own: peak before and after measuring one 3840×2160 pair."
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (2160, 3840), dtype=np.uint8) for name in ("fused", "ir", "vis")}
    torch.set_num_threads(1)
    before = peak_mb()
    took = seconds(lambda: evaluate(**images))
    print(
        json.dumps(
            {"before_mb": before, "peak_mb": peak_mb(), "extra_mb": peak_mb() - before, "seconds": took}
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--rounds", type=int, default=9, help="measurements of the plain reference (default: 9)"
    )
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_only:
        return memory()
    s = speed(args.rounds)
    child = subprocess.run(
        [sys.executable, __file__, "--memory-only"], check=True, capture_output=True, text=True
    )
    m = json.loads(child.stdout)
    print("768×576, nine metrics, seconds (median, fastest)")
    for name in ("plain", "fast", "fast_two_threads"):
        print(f"  {name:18} {s[name]['median']:.3f}  {s[name]['fastest']:.3f}")
    print(f"  plain / fast, one thread each: {s['ratio']:.1f} (goal {GOALS['ratio']:.0f})")
    print(f"  largest relative difference of a metric: {s['largest_relative_difference']:.1e}")
    print(f"3840×2160: {m['seconds']:.1f} s, peak {m['peak_mb']:.0f} MB, ", end="")
    print(f"of it {m['extra_mb']:.0f} MB for measuring (goal {GOALS['memory_mb']:.0f})")
    slow = min(s["fast"]["median"], s["fast_two_threads"]["median"]) > GOALS["seconds"]
    met = s["ratio"] >= GOALS["ratio"] and not slow and m["extra_mb"] < GOALS["memory_mb"]
    print("all goals met" if met else "NOT all goals met")
    if args.json:
        write_json(
            args.json,
            {
                "speed_768x576": s,
                "memory_3840x2160": m,
                "goals": GOALS,
                "met": met,
                "environment": environment(),
            },
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
