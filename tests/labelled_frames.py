"""A small set in the layout of the labelled frames of MSRS, for the tests of loaders and tasks."""

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
from datasets_toys import png, scenes

from smfnet.data.registry import DataSet, find_set

TRAIN, TEST = ("00004D", "00008N"), ("00040D", "00044N")
FOLDERS = ("a", "b")


def write_frames(root: Path) -> DataSet:
    """Four frames in two folders, with masks and boxes; the division stands in root/parts.json."""
    for k, (stem, s) in enumerate(zip((*TRAIN, *TEST), scenes(4))):
        for side, image in (("ir", s.ir), ("vi", s.vis)):
            png(root / "toy" / FOLDERS[k % 2] / side / f"{stem}.png", image)
        png(root / f"toy/labels/segmentation/{stem}.png", np.minimum(s.mask, 8))
        objects = root / f"toy/labels/detection/fusion/{stem}.txt"
        objects.parent.mkdir(parents=True, exist_ok=True)
        objects.write_text("0 0.25 0.5 0.1 0.5\n2 0.5 0.5 0.25 0.5\n")
    stored = {"apart": 20, "train": TRAIN, "test": TEST, "between": []}
    (root / "parts.json").write_text(json.dumps(stored))
    known = find_set("MSRS-labelled")

    def moved(name: str, count: int):
        s = known.split(name)
        extra = {**s.extra, "frames": {"file": str(root / "parts.json")}, "images": list(FOLDERS)}
        return dataclasses.replace(s, set="toy", folder="toy", count=count, extra=MappingProxyType(extra))

    splits = {name: moved(name, count) for name, count in (("all", 4), ("train", 2), ("test", 2))}
    return dataclasses.replace(known, name="toy", root="toy", splits=splits)
