"""Bad inputs over all commands: none may end in a traceback, a hang, or a file half written or replaced.

    python tests/project/bad_inputs.py              all of them, some minutes on one core
    python tests/project/bad_inputs.py --quick      the part that `make test` runs
    python tests/project/bad_inputs.py -v fuse      those whose name has this word, each with what it said

Every case runs in a forked copy of this process, which has everything imported already: that costs a few
hundredths of a second, and a copy can be killed, limited in memory and disk, and given any streams. A sample
runs as programs of their own. The place holds good images beside the bad ones, pipes, sockets, devices and
links; after each case it is compared with what it was. Linux and macOS only.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LIMIT = 30.0  # seconds for one case; most take a tenth of one
MEMORY = 6 << 30  # bytes that a case may take beyond this process
LONG = "n" * 300  # no file system has names so long
FAULTS = ("traceback", "hang", "crash", "replaced", "half written", "accepted", "wordy")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, what is broken around it, and the statuses that it may end with."""

    name: str
    words: tuple[str, ...]
    program: str = "smfnet"  # or "train"
    ends: tuple[int, ...] = (1, 2)
    disk: int | None = None  # bytes that a file may have
    stream: str = ""  # what is wrong with the output stream
    apart: bool = False  # as a program of its own, not as a copy of this one


@dataclasses.dataclass
class Outcome:
    """How a case ended."""

    case: Case
    status: int | None  # None: killed when its time was up; negative: the signal
    said: str
    seconds: float
    faults: list[str]


# --- the place ----------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that would leave a trace if it were run."""

    def __reduce__(self):
        return Path.touch, (Path("trace"),)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """A picture of nothing."""
    return np.random.default_rng(seed).integers(40, 200, shape).astype(np.uint8)


def png(image: np.ndarray, form: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **options)
    return out.getvalue()


def bad_files() -> dict[str, bytes]:
    """Files that are called images and are none, or none that can be used."""
    good, tiff, jpeg = png(noise(48, 64)), png(noise(48, 64), "TIFF"), png(noise(48, 64), "JPEG")
    bomb = bytearray(good)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height of the header
    found = {
        "empty.png": b"",
        "text.png": b"this is no image\n",
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "head.png": good[:20],
        "half.png": good[: len(good) // 2],
        "bomb.png": bytes(bomb),
        "flipped.png": good[:60] + bytes(255 - b for b in good[60:90]) + good[90:],
        "half.tif": tiff[: len(tiff) // 2],
        "head.tif": b"II*\0\xff\xff\xff\x7f",
        "circle.tif": b"II*\0\x08\0\0\0" + b"\0\0" + (8).to_bytes(4, "little"),
        "half.jpg": jpeg[: len(jpeg) // 3],
        "riff.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "head.bmp": b"BM" + b"\xff" * 60,
        "short.pgm": b"P5\n64 48\n255\n123",
        "huge.ppm": b"P6\n999999999 999999999\n255\n",
        "letters.pgm": b"P2\nx y\nz\n",
        "head.gif": b"GIF89a\xff\xff\xff\xff\xf7\xff\xff",
        "random.png": noise(3000).tobytes(),
        "random.tif": b"II*\0" + noise(3000, seed=1).tobytes(),
        "small.png": png(noise(3, 3)),
        "flat.png": png(np.full((48, 64), 7, np.uint8)),
        "other_size.png": png(noise(20, 30)),
    }
    nan = io.BytesIO()
    Image.fromarray(np.full((48, 64), np.nan, np.float32)).save(nan, "TIFF")
    return found | {"nan.tif": nan.getvalue(), "archive.png": zipped()}


def zipped(name: str = "a.png", content: bytes = b"x") -> bytes:
    """A zip archive with one member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, content)
    return out.getvalue()


def bad_weights(good: bytes) -> dict[str, bytes]:
    """Files that are called weights."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    claim = len(header).to_bytes(8, "little") + header
    odd = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(2)}, "epoch": 3}, odd)
    whole = io.BytesIO()
    torch.save([1, "two"], whole)
    return {
        "empty.safetensors": b"",
        "text.safetensors": b"no weights\n",
        "half.safetensors": good[: len(good) // 2],
        "claim.safetensors": claim,
        "long_header.safetensors": b"\xff" * 64,
        "deep.safetensors": len(deep := b"[" * 90_000).to_bytes(8, "little") + deep,
        "page.pth": b"<!DOCTYPE html><html></html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "evil.pth": pickle.dumps(Bomb()),
        "empty.pth": b"",
        "other.pth": odd.getvalue(),
        "list.pth": whole.getvalue(),
        "half.pth": odd.getvalue()[:300],
        "zip.pth": zipped(),
        "image.pth": png(noise(8, 8)),
        "text.onnx": b"no network\n",
        "empty.onnx": b"",
        "random.onnx": noise(500).tobytes(),
    }


def special(place: Path) -> dict[str, Path]:
    """What is there and no regular file; devices only where they may be made."""
    made = {n: place / n for n in ("pipe", "socket", "loop", "dangling", "folder.png", "to_pipe")}
    os.mkfifo(made["pipe"])
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(place)  # the address of a socket is short
        s.bind("socket")
        os.chdir(here)
    made["loop"].symlink_to(made["loop"])
    made["dangling"].symlink_to(place / "nowhere" / "x")
    made["to_pipe"].symlink_to(made["pipe"])
    made["folder.png"].mkdir()
    with contextlib.suppress(OSError):
        os.mknod(place / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(place / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        made |= {"null": place / "null", "zero": place / "zero"}
    return made


def build(place: Path) -> dict[str, Path]:
    """Good pairs, good weights, and everything bad."""
    from smfnet.network.model import SMFNet

    for seed, name in enumerate("ab"):
        for side, channels in (("ir", ()), ("vi", (3,)), ("fused", (3,))):
            (place / side).mkdir(exist_ok=True)
            (place / side / f"{name}.png").write_bytes(png(noise(48, 64, *channels, seed=seed)))
    torch.manual_seed(0)
    SMFNet("tiny").save(place / "good.safetensors")
    for folder, files in (
        ("images", bad_files()),
        ("weights", bad_weights((place / "good.safetensors").read_bytes())),
        ("archives", archives()),
    ):
        (place / folder).mkdir()
        for name, content in files.items():
            (place / folder / name).write_bytes(content)
    for name in os.listdir(place / "images"):  # each bad image beside a good one, on each side
        for side in ("ir", "vi", "fused"):
            folder = place / "sets" / name / side
            folder.mkdir(parents=True)
            for stem in "ab":
                shutil.copy(place / side / f"{stem}.png", folder)
        for side in ("ir", "vi", "fused"):
            broken = place / "sets" / name / f"{side}_bad"
            shutil.copytree(place / side, broken)
            (broken / "b.png").unlink()
            shutil.copy(place / "images" / name, broken / f"b{Path(name).suffix}")
    for side in ("ir", "vi", "fused"):  # names that tables and messages find hard
        (place / "odd" / side).mkdir(parents=True)
        for name in ODD_NAMES:
            shutil.copy(place / side / "a.png", place / "odd" / side / f"{name}.png")
    (place / "file").write_text("a regular file")
    (place / "empty").mkdir()
    return special(place)


ODD_NAMES = (
    os.fsdecode(b"caf\xe9"), "two\nlines", "\x1b[31mred", "汉字 😀", "a,b;\"c'", "=1+1", "e\u0301", "n" * 250,
    "x.y.z",
)  # fmt: skip


def archives() -> dict[str, bytes]:
    """What may be given to `data add`."""
    return {
        "empty.zip": b"",
        "text.zip": b"no archive",
        "half.zip": zipped(content=bytes(5000))[:-30],
        "outside.zip": zipped("../../outside.png"),
        "long.zip": zipped(f"{LONG}.png"),
        "bomb.zip": zipped(content=bytes(90 << 20)),
        "other.tar": bytes(10240),
        "half.tar.gz": b"\x1f\x8b\x08\0\0\0\0\0\0\x03abc",
        "half.tar.bz2": b"BZh91AY&SY",
        "half.tar.xz": b"\xfd7zXZ\0\0\x04",
    }


# --- the cases ----------------------------------------------------------------------------------------------

GOOD = "--weights good.safetensors --device cpu".split()
FUSE = ("fuse", "--ir", "ir", "--vis", "vi", "--out", "out", *GOOD)
VIDEO = ("video", "--ir", "ir", "--vis", "vi", "--out", "out/film.mkv", *GOOD)
EVALUATE = ("evaluate", "--fused", "fused", "--ir", "ir", "--vis", "vi")
CHECK = ("data", "check", "--ir", "ir", "--vis", "vi")
TRAIN = ("--data", ".", "--out", "out/run", "--steps", "1")
EXPORT = ("export-onnx", "--weights", "good.safetensors", "--out", "out/x.onnx")


def changed(words: tuple[str, ...], option: str, *values: str) -> tuple[str, ...]:
    """A command line with other values of an option."""
    if option not in words:
        return (*words, option, *values)
    i = words.index(option)
    return (*words[: i + 1], *values, *words[i + 2 :])


def image_cases(files) -> Iterator[Case]:
    """Each bad file in each place where an image is read."""
    for name in files:
        bad, folder = f"images/{name}", f"sets/{name}"
        for side, partner, good in (("ir", "vis", "vi/a.png"), ("vis", "ir", "ir/a.png")):
            words = (f"--{side}", bad, f"--{partner}", good, "--out")
            yield Case(f"fuse {side} {name}", ("fuse", *words, "out", *GOOD))
            yield Case(f"video {side} {name}", ("video", *words, "out/film.mkv", *GOOD))
        usable = (0, 1, 2) if name in ("flat.png", "flipped.png") else (1, 2)
        for option, side in (("--ir", "ir"), ("--vis", "vi"), ("--fused", "fused")):
            there = f"{folder}/{side}_bad"
            if side != "fused":
                yield Case(f"fuse folder {side} {name}", changed(FUSE, option, there), ends=usable)
                yield Case(f"check {side} {name}", changed(CHECK, option, there), ends=usable)
            yield Case(f"evaluate {side} {name}", changed(EVALUATE, option, there), ends=usable)
        words = changed(TRAIN, "--data", folder)
        (yield Case(f"train {name}", words, "train", ends=(0, 1, 2))) if name == "half.png" else None


def weight_cases(files) -> Iterator[Case]:
    """Each bad file where weights are read."""
    for name in files:
        path = f"weights/{name}"
        yield Case(f"fuse weights {name}", changed(FUSE, "--weights", path))
        yield Case(f"video weights {name}", changed(VIDEO, "--weights", path))
        yield Case(f"export weights {name}", changed(EXPORT, "--weights", path))
        yield Case(f"train weights {name}", changed(TRAIN, "--init", path), "train")


OPTIONS = (
    (FUSE, ("--ir", "--vis", "--out", "--weights"), "smfnet"),
    (VIDEO, ("--ir", "--vis", "--out", "--weights"), "smfnet"),
    (EVALUATE, ("--fused", "--ir", "--vis", "--csv", "--compare"), "smfnet"),
    (("data", "list"), ("--root",), "smfnet"),
    (("data", "verify"), ("--root",), "smfnet"),
    (("data", "verify", "TNO"), ("--root",), "smfnet"),
    (("data", "add", "M3FD", "empty"), ("--root",), "smfnet"),
    (("weights", "verify", "released"), ("--root",), "smfnet"),
    (CHECK, ("--ir", "--vis", "--pictures"), "smfnet"),
    (EXPORT, ("--out", "--weights"), "smfnet"),
    (TRAIN, ("--data", "--out", "--init"), "train"),
)
PATHS = {
    "nothing": "",
    "blank": " ",
    "nobody's home": "~nobody-of-this-name/x",
    "long name": LONG,
    "long path": "d/" * 2500 + "x",
    "below a file": "file/deeper/x.png",
    "no /proc": "/proc/none/x",
    "no /sys": "/sys/none.csv",
    "memory": "/proc/self/mem",
    "pipe": "pipe",
    "link to a pipe": "to_pipe",
    "socket": "socket",
    "loop": "loop",
    "below a loop": "loop/x",
    "dangling": "dangling",
    "null": "null",
    "zero": "zero",
    "file": "file",
    "empty folder": "empty",
    "folder.png": "folder.png",
    "not there": "gone/x.png",
    "bytes": os.fsdecode(b"caf\xe9.png"),
    "lines": "two\nlines",
    "escape": "\x1b[31mred",
    "option": "--",
}


def path_cases(made) -> Iterator[Case]:
    """Each odd path for each option that takes one."""
    for words, options, program in OPTIONS:
        for option in options:
            for what, path in PATHS.items():
                if path in ("null", "zero") and path not in made:
                    continue
                out = option in ("--out", "--csv", "--root", "--pictures", "--init")
                ends = (0, 1, 2) if out or what == "dangling" else (1, 2)
                title = (
                    f"{program} {' '.join(words[: 1 + (words[0] in ('data', 'weights'))])} {option} {what}"
                )
                name = title.replace("train --data", "train") if program == "train" else title
                yield Case(name, changed(words, option, path), program, ends)
    for what in (*PATHS, *archives()):
        path = PATHS.get(what, f"archives/{what}")
        if path not in ("null", "zero") or path in made:
            yield Case(f"data add {what}", ("data", "add", "M3FD", path, "--root", "out"))


NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e99",
    "",
    "abc",
    "1,5",
    "0x10",
    "9" * 400,
    "-0.0",
    "٣",
    "1e-320",
)


def number_cases() -> Iterator[Case]:
    """Each odd number for each option that takes one; some are numbers after all."""
    words = {
        "--threads": FUSE, "--max-memory": FUSE, "--fps": VIDEO, "--workers": EVALUATE, "--tolerance": CHECK,
        "--range": FUSE,
    }  # fmt: skip
    for option, line in words.items():
        for number in NUMBERS:
            values = (f"{option}={number}",) if option != "--range" else (option, number, "7")
            yield Case(f"number {option} {number[:8]}", (*line, *values), ends=(0, 1, 2))
    for number in NUMBERS:
        yield Case(f"number video range {number[:8]}", (*VIDEO, "--range", "3", number), ends=(0, 1, 2))
        for option in ("--steps", "--minutes", "--seed", "--checkpoint-every", "--stages"):
            if (option, number) == ("--steps", "0"):
                continue  # that is the whole recipe
            line = (
                (*TRAIN, f"{option}={number}") if option != "--steps" else (*TRAIN[:4], f"--steps={number}")
            )
            yield Case(f"number train {option} {number[:8]}", changed(line, "--data", "empty"), "train")
    for name in ("batch", "patch", "stride", "lr", "epochs", "gain", "min_contrast", "nonsense"):
        for value in ("nan", "-1", "0", "1e99", "", "abc", "[]", "{}", "null", "[" * 5000, '"x"', "true"):
            line = (*TRAIN, "--set", f"{name}={value}")
            yield Case(f"setting {name} {value[:8]}", line, "train", ends=(0, 1, 2))


def name_cases() -> Iterator[Case]:
    """Good files whose names are odd: done, or refused in a line."""
    pairs = ("--ir", "odd/ir", "--vis", "odd/vi")
    for name, words in {
        "fuse": ("fuse", *pairs, "--out", "out", *GOOD),
        "video": ("video", *pairs, "--out", "out/film.mkv", *GOOD),
        "video folder": ("video", *pairs, "--out", "out", *GOOD),
        "evaluate": ("evaluate", "--fused", "odd/fused", *pairs),
        "table": ("evaluate", "--fused", "odd/fused", *pairs, "--csv", "out/t.csv"),
        "compare": ("evaluate", "--fused", "odd/fused", *pairs, "--compare", "odd/vi", "--csv", "out/t.csv"),
        "check": ("data", "check", *pairs, "--pictures", "out"),
    }.items():
        yield Case(f"names {name}", words, ends=(0, 1, 2))
        yield Case(f"names {name} ascii", words, ends=(0, 1, 2), stream="ascii")
    yield Case("names train", changed(TRAIN, "--data", "odd"), "train", ends=(0, 1, 2))


def word_cases() -> Iterator[Case]:
    """Words that are none of the known ones."""
    odd = ("", "nothing", "../..", "\x1b[31m", "ir\nvi", os.fsdecode(b"\xff"), "☃", "x" * 5000)
    for word in odd:
        yield Case(f"word command {ascii(word)[:12]}", (word,))
        for command in ("data", "weights"):
            yield Case(f"word task {command} {ascii(word)[:12]}", (command, word))
        yield Case(f"word weights {ascii(word)[:12]}", changed(FUSE, "--weights", word))
        yield Case(f"word device {ascii(word)[:12]}", changed(FUSE, "--device", word))
        yield Case(f"word protocol {ascii(word)[:12]}", (*EVALUATE, "--protocol", word))
        for task in ("get", "verify"):
            yield Case(f"word {task} {ascii(word)[:12]}", ("data", task, word, "--root", "out"))
        for task in ("get", "verify", "show"):
            yield Case(f"word weights {task} {ascii(word)[:12]}", ("weights", task, word, "--root", "out"))
        yield Case(f"word split {ascii(word)[:12]}", ("data", "get", "TNO", word, "--root", "out"))
        yield Case(f"word add {ascii(word)[:12]}", ("data", "add", word, "empty", "--root", "out"))
        for option in ("--preset", "--recipe", "--device"):
            yield Case(f"word train {option} {ascii(word)[:12]}", (*TRAIN, option, word), "train")
    yield Case("word nothing at all", ())
    yield Case("word no training", (), "train")


STREAMS = ("full", "closed", "reader gone", "ascii", "gbk", "cp932", "utf-16", "error full", "both closed")


def machine_cases() -> Iterator[Case]:
    """Good input on a machine that fails: small disks and broken streams."""
    good = {
        "fuse": (FUSE, "smfnet"),
        "video": (VIDEO, "smfnet"),
        "video mp4": (changed(VIDEO, "--out", "out/film.mp4"), "smfnet"),
        "evaluate": ((*EVALUATE, "--csv", "out/t.csv"), "smfnet"),
        "check": ((*CHECK, "--pictures", "out/p"), "smfnet"),
        "train": (TRAIN, "train"),
        "list": (("data", "list"), "smfnet"),
        "help": (("--help",), "smfnet"),
        "bad": (("fuse", "--ir", "gone×…é", "--vis", "vi", "--out", "out"), "smfnet"),
    }
    for name, (words, program) in good.items():
        for size in (0, 1, 100, 5000, 200_000):
            yield Case(f"disk {size} {name}", words, program, (0, 1, 2), disk=size)
        for stream in STREAMS:
            yield Case(f"stream {stream} {name}", words, program, (0, 1, 2, 141), stream=stream)


def apart_cases() -> Iterator[Case]:
    """A sample as programs of their own."""
    for case in (
        Case("apart image", changed(FUSE, "--ir", "images/half.png")),
        Case("apart pipe", (*EVALUATE, "--csv", "pipe")),
        Case("apart training", changed(TRAIN, "--data", "empty"), "train"),
        Case("apart full", ("data", "list"), ends=(2,), stream="full"),
        Case("apart gone", ("data", "list"), ends=(0, 141), stream="reader gone"),
        Case("apart closed", ("data", "list"), ends=(0,), stream="closed"),
        Case("apart ascii", EVALUATE, ends=(0,), stream="ascii"),
        Case("apart gbk", (*EVALUATE, "--compare", "vi"), ends=(0,), stream="gbk"),
        Case("apart cp932", FUSE, ends=(0,), stream="cp932"),
    ):
        yield dataclasses.replace(case, apart=True)


def all_cases(place: Path, made: dict[str, Path]) -> list[Case]:
    """All of them; names are unique."""
    images, weights = sorted(os.listdir(place / "images")), sorted(os.listdir(place / "weights"))
    found = [
        *image_cases(images), *weight_cases(weights), *path_cases(made), *number_cases(), *name_cases(),
        *word_cases(), *machine_cases(), *apart_cases(),
    ]  # fmt: skip
    return list({c.name: c for c in found}.values())


def quick(cases: list[Case], parts: int = 12) -> list[Case]:
    """One in so many, the same ones each time, without those that take long."""
    slow = ("train", "video mp4", "apart", "bomb", "workers")
    chosen = [c for c in cases if hashlib.sha256(c.name.encode("utf-8", "replace")).digest()[0] % parts == 0]
    return [c for c in chosen if not any(word in c.name for word in slow)] + [
        c for c in cases if c.name in ("apart training", "apart gone")
    ]


# --- running one --------------------------------------------------------------------------------------------


def program(name: str) -> Callable[[list[str]], int]:
    """The function behind a program."""
    from smfnet import cli
    from smfnet.core.command import run_command
    from smfnet.training import processes

    if name == "smfnet":
        return cli.main
    return lambda words: run_command(
        lambda: processes.main(words), prefix="error"
    )  # as the module's last cell


def break_stream(kind: str) -> None:
    """Break the streams of this process, which is a copy."""
    if kind in ("full", "error full"):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        if kind == "error full":
            os.dup2(full, 2)
    elif kind == "reader gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif kind in ("closed", "both closed"):
        sys.stdout = None
        os.close(1)
        if kind == "both closed":
            sys.stderr = None
            os.close(2)
    elif kind:
        for number, name in ((1, "stdout"), (2, "stderr")):
            errors = "strict" if number == 1 else "backslashreplace"
            setattr(sys, name, open(number, "w", encoding=kind, errors=errors, closefd=False))


def limit(disk: int | None) -> None:
    """Limit the memory, and the size of files as if the disk were full."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if disk is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))


def be(case: Case, out: int, err: int) -> None:
    """Become the command, in a copy of this process; never returns."""
    status = 70  # of a defect
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            lines = 1 if name == "stderr" else -1
            setattr(sys, name, open(number, "w", lines, encoding="utf-8", errors="strict", closefd=False))
        time.sleep = lambda seconds: None  # pauses between attempts
        limit(case.disk)
        break_stream(case.stream)
        try:
            status = program(case.program)(list(case.words))
        except SystemExit as e:
            status = e.code or 0
        for stream in filter(None, (sys.stdout, sys.stderr)):  # as Python does at its end
            stream.flush()
    except BaseException:
        text = traceback.format_exc()
        with contextlib.suppress(OSError):
            os.write(err, text.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)


def copy(case: Case) -> tuple[int, tuple[int, int]]:
    """Start a case in a copy of this process: its number, and what reads its streams."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    if (number := os.fork()) == 0:
        be(case, out_end, err_end)
    os.close(out_end)
    os.close(err_end)
    return number, (out, err)


SHELL = {"full": "{} > /dev/full", "closed": "{} >&-", "reader gone": "{} | head -0; exit ${{PIPESTATUS[0]}}"}


def start_apart(case: Case) -> tuple[int, tuple[int, int]]:
    """The same as a program of its own, in a shell that breaks its streams."""
    code = "from smfnet.cli import main; raise SystemExit(main())"
    start = ["-m", "smfnet.training.processes"] if case.program == "train" else ["-c", code]
    line = SHELL.get(case.stream, "{}").format('"$@"')
    env = dict(os.environ) | (
        {} if case.stream in SHELL or not case.stream else {"PYTHONIOENCODING": case.stream}
    )
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", line, "bash", sys.executable, *start, *case.words],
        stdin=subprocess.DEVNULL, stdout=out_end, stderr=err_end, env=env, start_new_session=True,
    )  # fmt: skip
    os.close(out_end)
    os.close(err_end)
    return process.pid, (out, err)


def follow(number: int, streams: tuple[int, int], seconds: float) -> tuple[int | None, str]:
    """Read what a process says until it ends, or end it with all that it started."""
    end, said, open_ones = time.monotonic() + seconds, {s: b"" for s in streams}, set(streams)
    with selectors.DefaultSelector() as ready:
        for s in streams:
            ready.register(s, selectors.EVENT_READ)
        while open_ones and (left := end - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                block = os.read(key.fd, 1 << 16)
                said[key.fd] += block
                if not block:
                    ready.unregister(key.fd)
                    open_ones.discard(key.fd)
    done = os.waitpid(number, os.WNOHANG)
    while not done[0] and time.monotonic() < end:
        time.sleep(0.002)
        done = os.waitpid(number, os.WNOHANG)
    if not done[0]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
        os.waitpid(number, 0)
    for s in streams:
        os.close(s)
    text = b"".join(said.values()).decode("utf-8", "replace")
    return (os.waitstatus_to_exitcode(done[1]) if done[0] else None), text


# --- judging ------------------------------------------------------------------------------------------------


def look(place: Path) -> dict[str, tuple]:
    """Everything in a place: kind, size, and when it was last written."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            s = os.lstat(path)
            fixed = () if stat.S_ISDIR(s.st_mode) else (s.st_size, s.st_mtime_ns, s.st_ino)
            found[os.path.relpath(path, place)] = (s.st_mode, *fixed)
    return found


def half_written(path: Path) -> bool:
    """Whether a new file is no whole file of its kind, or has a name that is only for the time of writing."""
    if path.name.startswith((".tmp", ".smfnet")) or path.is_symlink() or not path.is_file():
        return path.name.startswith((".tmp", ".smfnet"))
    if path.stat().st_size == 0:
        return True
    if path.read_bytes()[:4] == b"\x89PNG":
        try:
            Image.open(path).load()
        except Exception:
            return True
    return False


def judge(case: Case, status: int | None, said: str, place: Path, before: dict) -> list[str]:
    """Names of the faults of a case."""
    after, faults = look(place), []
    if "Traceback" in said or "Exception ignored" in said or status == 70:
        faults.append("traceback")
    if status is None:
        faults.append("hang")
    elif status < 0 or status > 128 and status not in case.ends:
        faults.append("crash")
    elif status not in case.ends and "traceback" not in faults:
        faults.append("accepted" if status == 0 else f"status {status}")
    wanted = {
        w for o, w in zip(case.words, case.words[1:], strict=False) if o in ("--csv", "--out") and w == "file"
    }
    if any(after.get(path) != was for path, was in before.items() if path not in wanted):
        faults.append("replaced")
    partial = (
        case.name.startswith("video") or "partial" in said
    )  # the frames until then, under a name that says so
    new = [Path(place, p) for p in after.keys() - before.keys()]
    if (
        any(half_written(p) for p in new if not (partial and ".partial" in p.name))
        or (place / "trace").exists()
    ):
        faults.append("half written")
    if said.count("\n") > 40:
        faults.append("wordy")
    return faults


def clean(place: Path, before: dict) -> None:
    """Remove what a case has made."""
    for path in sorted(look(place).keys() - before.keys(), reverse=True):
        target = place / path
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(
            missing_ok=True
        )


def run(case: Case, place: Path, before: dict) -> Outcome:
    """Run a case in the place, and leave the place as it was."""
    started = time.monotonic()
    number, streams = start_apart(case) if case.apart else copy(case)
    status, said = follow(number, streams, LIMIT * (4 if case.apart else 1))
    faults = judge(case, status, said, place, before)
    clean(place, before)
    if (place / "file").read_bytes() != b"a regular file":
        (place / "file").write_text("a regular file")
        before["file"] = look(place)["file"]
    return Outcome(case, status, said, time.monotonic() - started, faults)


def warm() -> None:
    """Import all that the commands import, so that the copies need not."""
    import pandas  # noqa: F401

    import smfnet.data.acquire
    import smfnet.data.pair_check
    import smfnet.fusion.files
    import smfnet.fusion.model_zoo
    import smfnet.fusion.onnx
    import smfnet.fusion.video
    import smfnet.metrics.folder
    import smfnet.training.processes  # noqa: F401

    torch.set_num_threads(1)


@contextlib.contextmanager
def stage() -> Iterator[tuple[Path, list[Case]]]:
    """A new place as working folder, and the cases for it."""
    warm()
    here, saved = os.getcwd(), os.environ.pop("SMFNET_DATA", None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        os.chdir(place)
        try:
            made = build(place)
            yield place, all_cases(place, made)
        finally:
            os.chdir(here)
            if saved is not None:
                os.environ["SMFNET_DATA"] = saved


def table(outcomes: list[Outcome]) -> str:
    """Counts by the first word of a case's name."""
    groups = list(dict.fromkeys(o.case.name.split()[0] for o in outcomes))
    rows = [("group", "cases", *FAULTS, "other", "seconds")]
    for group in (*groups, "all"):
        own = [o for o in outcomes if group in ("all", o.case.name.split()[0])]
        count = Counter(f if f in FAULTS else "other" for o in own for f in o.faults)
        seconds = f"{sum(o.seconds for o in own):.1f}"
        rows.append((group, len(own), *(count[f] for f in (*FAULTS, "other")), seconds))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(x).rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Run them and print the table; 0 if there is no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only cases whose name has one of these")
    parser.add_argument("--quick", action="store_true", help="the part that the tests run")
    parser.add_argument("-v", action="store_true", help="print what each case said")
    args, outcomes = parser.parse_args(argv), []
    with stage() as (place, cases):
        cases = quick(cases) if args.quick else cases
        cases = [c for c in cases if not args.words or any(w in c.name for w in args.words)]
        before = look(place)
        for case in cases:
            outcomes.append(o := run(case, place, before))
            before = look(place) if "replaced" in o.faults else before
            if o.faults or args.v:
                end = "\n    ".join(o.said.strip().splitlines()[-6:])
                line = f"{ascii(case.name)}: {', '.join(o.faults) or 'fine'} ({o.status}, {o.seconds:.1f} s)"
                words = " ".join(w if len(w) < 60 else f"{w[:20]}..." for w in case.words)
                print(
                    f"{line}\n    {ascii(words)}\n    {ascii(end) if not end.isprintable() else end}",
                    flush=True,
                )
    print(table(outcomes))
    slow = sorted(outcomes, key=lambda o: -o.seconds)[:3]
    print("slowest:", ", ".join(f"{ascii(o.case.name)} {o.seconds:.1f} s" for o in slow))
    return 1 if any(o.faults for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
