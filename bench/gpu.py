"""What to check first on a graphics card: `make gpu-check`, or `python -m bench.gpu --help`.

Every check writes its numbers to results/gpu/<card>.json as soon as it is done, and is not done twice:
stopped at any moment, the same command goes on. At the scale `tiny` everything runs in a minute on a CPU.
Its numbers mean nothing then, but nothing in this program waits for a card to be tried.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from smfnet.core.checks import InputError
from smfnet.core.command import run_command
from smfnet.core.provenance import git_revision, write_json
from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.fast.precision import arithmetic
from smfnet.fast.prepared import prepare_for_inference
from smfnet.losses.stages import stage2_loss
from smfnet.network.model import SMFNet
from smfnet.training.recipes import recipe
from smfnet.training.trainer import Speed, Trainer


@dataclass(frozen=True)
class Scale:
    "How much is computed."

    preset: str = "paper"  # size of the network
    patch: int = 128  # pixels
    batch: int = 6  # pairs
    batches: tuple[int, ...] = (12, 24, 32)  # further sizes, with the quickest arithmetic
    seconds: float = 120.0  # of training for each number
    steps: int = 40  # that are profiled, or compared
    pictures: tuple[tuple[int, int], ...] = ((480, 640), (1024, 1280), (2160, 3840))  # height, width
    backend: str = "inductor"  # of torch.compile


SCALES = {
    "full": Scale(),
    "tiny": Scale("tiny", 16, 2, (4,), 0.0, 2, ((48, 64),), "eager"),
}
CLOSE = {"bf16": 0.1, "off": 0.02}  # largest relative difference of the last losses from the literal loop's


def patches(scale: Scale, batch: int) -> PatchSet:
    "Noise with structure: enough patches for any number of steps."
    side = scale.patch * 4
    grid = np.linspace(0, 12, side, dtype=np.float32)
    wave = 0.5 + 0.4 * np.sin(grid[:, None]) * np.cos(grid[None])
    pairs = []
    for i in range(max(1, batch // 4)):
        noise = np.random.default_rng(i).random((2, side, side), np.float32)
        pairs.append(LoadedPair(f"{i}", *(0.8 * wave + 0.2 * noise).clip(0, 1)))
    return PatchSet(pairs, patch=scale.patch, stride=scale.patch // 2, seed=0)


def waited(device: str) -> float:
    "The time, after everything that the device was asked for."
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> float | None:
    "Largest memory of the device since the last call, GB."
    if not device.startswith("cuda"):
        return None
    found = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(found, 3)


def trainer(folder, scale: Scale, device: str, *, batch: int = 0, speed=Speed(), **options) -> Trainer:  # noqa: B008
    "A run of stage II that lasts as long as it is asked to."
    torch.manual_seed(0)
    batch = batch or scale.batch
    r = recipe("paper", patch=scale.patch, batch=batch, epochs=(0, 10**6), clip=0.01, **options)
    model = SMFNet(scale.preset)
    return Trainer(model, patches(scale, batch), r, folder, stages=(2,), device=device, speed=speed)


def pace(step: Callable[[int], object], scale: Scale, device: str, batch: int) -> dict:
    "Pairs a second: a few steps to warm up, then steps for the time of the scale, all read at the end."
    for i in range(3):
        step(i)
    peak(device)
    start, count = waited(device), 0
    while count < scale.steps or time.perf_counter() - start < scale.seconds:
        step(3 + count)
        count += 1
        if count % 10 == 0:
            waited(device)
    spent = waited(device) - start
    return {"pairs_per_second": round(batch * count / spent, 2), "steps": count, "peak_gb": peak(device)}


def train_pace(scale: Scale, device: str, *, batch: int = 0, **options) -> dict:
    "How quickly the trainer trains, and the loss of its first steps."
    with tempfile.TemporaryDirectory() as folder, compiled(scale):
        run = trainer(folder, scale, device, batch=batch, **options)
        run.fit(steps=scale.steps, progress=False)
        lines = [json.loads(line) for line in run.log.read_text().splitlines()]
        found = list(run.source.batches(0, run.recipe.batch))
        with arithmetic(tf32=run.speed.tf32):
            take = run.step_ahead if run.speed.read_every > 1 else run.train_step
            speed = pace(lambda i: take([found[i % len(found)]]), scale, device, run.recipe.batch)
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    return speed | {"first_loss": losses[0], "last_loss": float(np.mean(losses[-5:]))}


class compiled:
    "While this lasts, `torch.compile` uses the backend of the scale."

    def __init__(self, scale: Scale):
        self.backend, self.real = scale.backend, torch.compile

    def __enter__(self):
        torch.compile = functools.partial(self.real, backend=self.backend)

    def __exit__(self, *error):
        torch.compile = self.real


# --- the checks ---------------------------------------------------------------------------------------------


def literal(scale: Scale, device: str, done: dict) -> dict:
    "The plain loop in float32, five optimisers, nothing prepared: what all others are compared with."
    torch.manual_seed(0)
    model, data = SMFNet(scale.preset).to(device).train(), patches(scale, scale.batch)
    parts = ("encoder", "graph", "base_fusion", "detail_fusion", "decoder")
    adams = [torch.optim.Adam(getattr(model, p).parameters(), lr=1e-4) for p in parts]
    found = list(data.batches(2000, scale.batch))
    losses = []

    def step(i):
        batch = {k: v.to(device) for k, v in found[i % len(found)].items()}
        model.zero_grad()
        loss, _ = stage2_loss(model(**batch, stage=2), **batch)
        loss.backward()
        for part, adam in zip(parts, adams):
            torch.nn.utils.clip_grad_norm_(getattr(model, part).parameters(), 0.01)
            adam.step()
        losses.append(loss.item())

    for i in range(scale.steps):
        step(i)
    numbers = {"first_loss": losses[0], "last_loss": float(np.mean(losses[-5:]))}
    return numbers | pace(step, scale, device, scale.batch) | {"ok": bool(np.isfinite(losses).all())}


def training(scale: Scale, device: str, done: dict, *, amp: str, compile: bool) -> dict:
    "The trainer with one arithmetic: pairs a second, memory, and losses like the literal loop's."
    found, plain = train_pace(scale, device, amp=amp, compile=compile), done["literal"]
    ratio = found["pairs_per_second"] / plain["pairs_per_second"]
    apart = max(abs(found[k] / plain[k] - 1) for k in ("first_loss", "last_loss"))
    return found | {"times_literal": round(ratio, 2), "losses_apart": apart, "ok": apart < CLOSE[amp]}


def quickest(done: dict) -> dict:
    "The options of the quickest training so far."
    names = [n for n in done if n.startswith("training ") and "pairs_per_second" in done[n]]
    best = max(names, key=lambda n: done[n]["pairs_per_second"])
    return {"amp": "bf16" if "bf16" in best else "off", "compile": "compiled" in best}


def larger(scale: Scale, device: str, done: dict, *, batch: int) -> dict:
    "The quickest arithmetic with a larger batch; too little memory is a finding, not a failure."
    try:
        return train_pace(scale, device, batch=batch, **quickest(done)) | quickest(done) | {"ok": True}
    except torch.OutOfMemoryError as e:
        return {"out_of_memory": str(e).splitlines()[0], "ok": True}


def inference(scale: Scale, device: str, done: dict, *, size: tuple[int, int]) -> dict:
    "The prepared network against the plain one: largest difference, best of three times, peak memory."
    model = SMFNet.from_pretrained(scale.preset).to(device)
    g = torch.Generator().manual_seed(0)
    pair = {k: torch.rand(1, 1, *size, generator=g).to(device) for k in ("vis", "ir")}
    found, images = {}, {}
    for name, network in (("prepared", prepare_for_inference(model)), ("plain", model)):
        peak(device)
        times = []
        try:
            with arithmetic():
                for _ in range(3):
                    start = waited(device)
                    images[name] = network.fuse(**pair)
                    times.append(waited(device) - start)
        except torch.OutOfMemoryError as e:
            found[name] = {"out_of_memory": str(e).splitlines()[0]}
            continue
        found[name] = {"seconds": round(min(times), 4), "peak_gb": peak(device)}
    ok = "prepared" in images
    if len(images) == 2:
        found["levels_apart"] = 255 * (images["prepared"] - images["plain"]).abs().max().item()
        ok = found["levels_apart"] < 0.5
    return found | {"ok": ok}


KILLED = """
import sys, time
from bench.gpu import SCALES, trainer
run = trainer(sys.argv[1], SCALES[sys.argv[2]], sys.argv[3])
run.checkpoint_every = 5
run.resume()
run.fit(progress=False, steps=int(sys.argv[4]))
if sys.argv[5] == "wait": print("ready", flush=True); time.sleep(600)
"""


def resume(scale: Scale, device: str, done: dict) -> dict:
    "A run that is killed (SIGKILL) goes on from its checkpoint, and no step of the log is missing or double."
    name = next(k for k, v in SCALES.items() if v == scale)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", KILLED, folder, name, device]
        with subprocess.Popen([*command, "7", "wait"], stdout=subprocess.PIPE, text=True) as first:
            said = first.stdout.readline().strip()
            first.send_signal(signal.SIGKILL)
        second = subprocess.run([*command, "12", "end"], capture_output=True, text=True, timeout=600)
        log = Path(folder, "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    fine = said == "ready" and not second.returncode and steps == list(range(1, 13))
    return {"steps": len(steps), "said": second.stderr[-300:], "ok": fine}


def deterministic(scale: Scale, device: str, done: dict) -> dict:
    "Two runs with `Speed(deterministic=True)` end with the same weights, to the last bit."
    ends = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(folder, scale, device, speed=Speed(deterministic=True))
            run.fit(steps=scale.steps, progress=False)
            ends.append([p.detach().cpu() for p in run.model.parameters()])
    return {"ok": all(torch.equal(a, b) for a, b in zip(*ends))}


def profile(scale: Scale, device: str, done: dict) -> dict:
    "Where the time of a step goes: waits for the device, copies of memory order, the dearest operations."
    with tempfile.TemporaryDirectory() as folder, compiled(scale):
        run = trainer(folder, scale, device, speed=Speed(read_every=10), **quickest(done))
        run.fit(steps=3, progress=False)
        cuda = device.startswith("cuda")
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=kinds) as seen:
            run.fit(steps=3 + scale.steps, progress=False)
    cost = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda e: getattr(e, cost), reverse=True)
    count = lambda *names: sum(e.count for e in events if e.key in names)
    waits = count("cudaStreamSynchronize", "cudaDeviceSynchronize") / scale.steps
    dear = {e.key[:80]: round(getattr(e, cost) / 1e3 / scale.steps, 3) for e in events[:15]}
    copies = count("aten::contiguous", "aten::clone", "aten::copy_") / scale.steps
    return {"waits_per_step": waits, "copies_per_step": copies, "ms_per_step": dear, "ok": waits < 1}


def cells(scale: Scale, device: str, done: dict) -> dict:
    "The tests and cells that are left out elsewhere: those that are slow or need a card."
    if not device.startswith("cuda"):
        return {"skipped": "needs a card", "ok": True}
    command = [sys.executable, "-m", "pytest", "-q", "--notebook-flags", "slow cuda"]
    command += ["-k", "04_fast or 05_training", "tests/project/test_notebooks.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    return {"said": result.stdout.splitlines()[-1:], "ok": not result.returncode}


def plan(scale: Scale) -> dict[str, Callable[..., dict]]:
    "The checks in their order."
    checks = {"cells": cells, "literal": literal}
    for amp in ("off", "bf16"):
        for compile in (False, True):
            name = f"training {amp}{' compiled' if compile else ''}"
            checks[name] = functools.partial(training, amp=amp, compile=compile)
    checks |= {f"batch {n}": functools.partial(larger, batch=n) for n in scale.batches}
    checks |= {f"fuse {w}x{h}": functools.partial(inference, size=(h, w)) for h, w in scale.pictures}
    return checks | {"resume": resume, "deterministic": deterministic, "profile": profile}


# --- the command --------------------------------------------------------------------------------------------


def card(device: str) -> str:
    "The name of a device as a file name; `InputError` if it is not there."
    if device == "cpu":
        return "cpu"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise InputError(f"device: {device!r}, but PyTorch finds no CUDA device; try DEVICE=cpu")
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-").lower()


def settings(device: str, scale: str) -> dict:
    "What must be alike for numbers to stand in one file."
    return {
        "card": card(device), "scale": scale, "torch": torch.__version__, "cuda": torch.version.cuda,
        "revision": git_revision(), **{"sizes": asdict(SCALES[scale])},
    }


def check(device: str, scale: str, out: Path, only: list[str]) -> int:
    "Run what is not in the file yet; 0 if all is well, 1 if a check failed."
    about, path = settings(device, scale), out / f"{card(device)}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = json.loads(json.dumps(about)) == old.get("about")
    done = old["checks"] if same else {}
    if old and not same:
        path.replace(path.with_suffix(".old.json"))
    for name, run in plan(SCALES[scale]).items():
        if done.get(name, {}).get("ok") or only and name not in only:
            continue
        start = time.perf_counter()
        try:
            done[name] = run(SCALES[scale], device, done)
        except Exception as e:  # whatever a card answers: the other checks still count
            done[name] = {"error": f"{type(e).__name__}: {e}"[:500], "ok": False}
        done[name]["took"] = round(time.perf_counter() - start, 1)
        write_json(path, {"about": about, "checks": done})
        short = {k: v for k, v in done[name].items() if not isinstance(v, dict)}
        print(f"{name}: {short}", flush=True)
    bad = [name for name, found in done.items() if not found["ok"]]
    print(f"{len(done) - len(bad)} checks passed, {len(bad)} failed; see {path}", *bad)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    "The command; 0 all is well, 1 a check failed, 2 bad input."
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: %(default)s)")
    p.add_argument("--scale", choices=SCALES, help="how much: full, or tiny (default: tiny on a CPU)")
    p.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of <card>.json")
    p.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check; may be repeated")
    args = p.parse_args(argv)
    scale = args.scale or ("tiny" if args.device == "cpu" else "full")
    return run_command(lambda: check(args.device, scale, args.out, args.only), prefix="error")


if __name__ == "__main__":
    from bench.gpu import main as run  # so that what is pickled or compared has one name

    sys.exit(run())
