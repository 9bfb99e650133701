"""Small data sets and folders that the tests of data sets share."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smfnet.data.registry import pin_folder
from smfnet.data.scenes import render_set


@pytest.fixture(scope="session")
def real():
    """The folder of real sets."""
    folder = os.environ.get("SMFNET_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("the environment variable SMFNET_DATA names no folder of real sets")
    return Path(folder)


@functools.cache  # drawing takes longer than most tests; nobody changes what is drawn
def scenes(n=3, seed=0):
    return tuple(render_set(n, seed=seed, size=(64, 80)))


def png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def files_below(folder: Path) -> list[str]:
    return (
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if folder.exists()
        else []
    )


@pytest.fixture
def toy(tmp_path):
    """A pinned set of two splits, published in home/."""
    for part, seed in (("train", 0), ("test", 1)):
        for i, s in enumerate(scenes(seed=seed)):
            png(tmp_path / f"home/toy/{part}/ir/{i}.png", s.ir)
            png(tmp_path / f"home/toy/{part}/vi/{i}.png", s.vis)
    return pin_folder("toy", tmp_path / "home", ["train", "test"], url="http://127.0.0.1:1")
