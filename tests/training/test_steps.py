"""What a run does step by step, against what is written here by hand and not against another run.

The plain loop below shares no line with the trainer: its own patches in the order of the data object, its own
schedule, clipping, accumulation and fading, one Adam a sub-network. Tests of the loop's order alone give the
trainer a step that computes nothing.
"""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from smfnet.core.checks import InputError
from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.fast.training import prepare_for_training
from smfnet.losses.stages import LossWeights, stage1_loss, stage2_loss
from smfnet.network.model import SMFNet
from smfnet.training import ablations, processes
from smfnet.training.ablations import train_configuration
from smfnet.training.recipes import Recipe, recipe
from smfnet.training.trainer import Trainer

PARTS = {1: ("encoder", "graph", "decoder")}
PARTS[2] = (*PARTS[1], "base_fusion", "detail_fusion")


def pair(name: str = "noise", seed: int = 0, shape: tuple[int, int] = (24, 32)) -> LoadedPair:
    """Noise in both modalities; 24×32 pixels hold 6 patches of 16 with stride 8."""
    return LoadedPair(name, *np.random.default_rng(seed).random((2, *shape), np.float32))


def patches(pairs: int = 1, **changes) -> PatchSet:
    """The 6 patches of one pair, or the 12 of two."""
    return PatchSet([pair(seed=i) for i in range(pairs)], **{"patch": 16, "stride": 8, "seed": 3, **changes})


def start() -> SMFNet:
    """The tiny network in float64, weights from seed 0."""
    torch.manual_seed(0)
    return SMFNet("tiny").double()


def log_of(folder: Path, kind: str) -> list[dict]:
    """Records of one kind."""
    found = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [r for r in found if r["kind"] == kind]


# --- against a plain loop ----------------------------------------------------------------------------------

SETTINGS = dict(patch=16, stride=8, lr=2e-3, lr_every=2, lr_factor=0.5, lr_floor=6e-4, batch=3, epochs=(2, 3))
# Rates of stage I's parts over all five epochs, and of the fusion layers from stage II on: halved every two
# epochs, not below the floor. Written out, not computed.
OLD = {1: (2e-3, 2e-3), 2: (1e-3, 1e-3, 6e-4)}
NEW = {2: (2e-3, 2e-3, 1e-3)}


def clipped(part: nn.Module, limit: float) -> float:
    """Shorten a sub-network's gradient to `limit`; its norm before."""
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    if limit and norm > limit:
        for g in gradients:
            g.mul_(limit / norm)
    return norm


def plain_loop(model: SMFNet, data: PatchSet, *, clip, accumulate, fade, frozen, variant, losses):
    """Train both stages in place; weights after stage I, and one record a step."""
    adams = {k: torch.optim.Adam(getattr(model, k).parameters(), betas=(0.9, 0.999)) for k in PARTS[2]}
    for stage, epoch in [(s, e) for s in (1, 2) for e in range(len(OLD[s]))]:
        model.train()
        for m in model.modules() if frozen else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        groups = data.order(1000 * stage + epoch).reshape(-1, accumulate, 3)
        for group in groups:
            model.zero_grad()
            record = {}
            for indices in group:
                both = np.stack([data[1000 * stage + epoch, i] for i in indices]).astype(np.float64)
                images = {"ir": torch.tensor(both[:, :1]), "vis": torch.tensor(both[:, 1:])}
                shown = {k: (1 - fade) * x + fade / 2 for k, x in images.items()}
                loss_of, more = ((stage1_loss, losses[1]), (stage2_loss, losses[2]))[stage - 1]
                total, terms = loss_of(model(**shown, stage=stage), **images, variant=variant, **more)
                (total / accumulate).backward()
                values = {"loss": total.detach(), **{f"term.{k}": v for k, v in terms.items()}}
                for k, v in values.items():
                    record[k] = record.get(k, 0) + v.item() / accumulate
            for name in PARTS[stage]:
                record[f"norm.{name}"] = clipped(getattr(model, name), clip)
                rates = NEW if "fusion" in name else OLD
                adams[name].param_groups[0]["lr"] = rates[stage][epoch]
                adams[name].step()
            yield stage, epoch, {"lr": OLD[stage][epoch], **record}


PLAIN = dict(clip=0.01, accumulate=1, fade=0.0, frozen=False, variant="paper", losses={1: {}, 2: {}})
MANY = dict(
    clip=0.0,
    accumulate=2,
    fade=0.1,
    frozen=True,
    variant="paper",
    losses={
        1: {"weights": LossWeights(alpha2=2.0, beta1=3.0, alpha4=4.0), "reading": "foreground"},
        2: {"weights": LossWeights(alpha2=2.0, beta1=3.0, alpha4=4.0)},
    },
)
CHANGED = dict(weights={"alpha2": 2.0, "beta1": 3.0, "alpha4": 4.0}, reading="foreground")
CASES = {
    "as in the paper": (PLAIN, dict(clip=0.01), {}),
    "every option": (
        MANY,
        dict(clip=0, accumulate=2, fade=0.1, freeze_bn=True, **CHANGED),
        dict(gain=0.3, flips=False),
    ),
    "as released": ({**PLAIN, "variant": "released", "clip": 0.1}, dict(clip=0.1, loss="released"), {}),
}


def distance(a: dict, b: dict, origin: dict) -> float:
    """How far two states are apart, in lengths of the way that one of them went."""
    names = [k for k in sorted(origin) if "num_batches" not in k]
    flat = lambda state: torch.cat([state[k].flatten() for k in names])
    return ((flat(a) - flat(b)).norm() / (flat(b) - flat(origin)).norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_the_steps_of_a_plain_loop(tmp_path, case):
    """Weights after each stage, running statistics, and every number of the log, in float64.

    The two differ by rounding and by the 1e-6 that PyTorch adds to a norm before it divides: 2e-8 of the way
    where it was measured. A slip in rate, order, norm or loss is a visible part of the way.
    """
    by_hand, settings, cut = CASES[case]
    data, plain, trained = patches(**cut), prepare_for_training(start()), start()
    origin = copy.deepcopy(start().state_dict())
    steps, ends = [], {}
    for stage, epoch, record in plain_loop(plain, data, **by_hand):
        steps.append((stage, epoch, record))
        ends[stage] = {k: v.clone() for k, v in plain.state_dict().items()}
    r = recipe("paper", **SETTINGS, **settings)
    run = Trainer(trained, data, r, tmp_path, validate=lambda model: {"way": float(model.training)})
    assert run.fit(progress=False)
    for stage in (1, 2):
        found = load_file(tmp_path / f"stage{stage}.safetensors")
        assert distance(found, ends[stage], origin) < 1e-6
    log = log_of(tmp_path, "step")
    assert [(x["stage"], x["epoch"]) for x in log] == [(stage, epoch) for stage, epoch, _ in steps]
    assert [x["step"] for x in log] == list(range(1, len(steps) + 1))
    for line, (_, _, record) in zip(log, steps):
        numbers = {k: v for k, v in line.items() if k == "lr" or k.startswith(("loss", "term.", "norm."))}
        assert numbers == pytest.approx(record, rel=1e-5, abs=1e-8)
    statistics = {k for k in origin if "running" in k}
    moved = {k for k in statistics if not torch.equal(trained.state_dict()[k], origin[k])}
    assert moved == (set() if by_hand["frozen"] else statistics)


# --- validation --------------------------------------------------------------------------------------------


def normalised(model: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("frozen", [False, True])
def test_validation_sees_the_network_in_use_and_training_goes_on(tmp_path, frozen):
    """Every module is in evaluation mode during it and in training mode after it, statistics moving."""
    r = recipe("demo", patch=16, stride=8, batch=3, epochs=(2, 1), freeze_bn=frozen)
    model, seen = start(), []

    def validate(network):
        assert network is model and not any(m.training for m in network.modules())
        seen.append([m.running_mean.clone() for m in normalised(network)])
        before = copy.deepcopy(network.state_dict())
        network(ir=torch.rand(1, 1, 16, 16).double(), vis=torch.rand(1, 1, 16, 16).double())
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
        return {"score": 10.0 * len(seen)}

    t = Trainer(model, patches(), r, tmp_path, validate=validate)
    loss, modes = t.loss, []

    def watched(batch):
        still = {m for m in model.modules() if not m.training}
        modes.append(still == (set(normalised(model)) if frozen else set()))
        return loss(batch)

    t.loss = watched
    assert t.fit(progress=False) and len(seen) == 3 and len(modes) == 6 and all(modes)
    for earlier, later in itertools.pairwise(seen):
        same = [torch.equal(a, b) for a, b in zip(earlier, later)]
        assert all(same) if frozen else not any(same)
    found = [(x["stage"], x["epoch"], x["step"], x["score"]) for x in log_of(tmp_path, "validation")]
    assert found == [(1, 0, 2, 10.0), (1, 1, 4, 20.0), (2, 0, 6, 30.0)]


# --- the order of a run ------------------------------------------------------------------------------------


WALK = {**SETTINGS, "batch": 2, "epochs": (3, 3)}
OPTIONS = ("validate", "validate_every", "checkpoint_every")  # of a trainer, not of a recipe


def walk(folder: Path, data: PatchSet | None = None, *, fit=None, stages=(1, 2), **settings) -> list[tuple]:
    """Stage, epoch and pictures of each step of a run whose steps compute nothing, and where it stands."""
    torch.manual_seed(0)
    options = {k: settings.pop(k) for k in OPTIONS if k in settings}
    r = recipe("paper", **{**WALK, **settings})
    t = Trainer(SMFNet("tiny"), data or patches(2), r, folder, stages=stages, **options)
    seen = []

    def step(batches):
        keys = [x.numpy().tobytes() for b in batches for x in torch.cat([b["ir"], b["vis"]], 1)]
        seen.append((t.progress.stage, t.progress.epoch, keys))
        return {"loss": 0.0}

    t.train_step = step
    t.resume()
    t.fit(progress=False, **(fit or {}))
    return seen


def test_every_epoch_shows_every_patch_once_in_an_order_of_its_own(tmp_path):
    """Both stages included: six epochs, six orders, and those of another seed are others again."""
    walks = [walk(tmp_path / f"{seed}", patches(2, flips=False, seed=seed)) for seed in (3, 4)]
    orders = []
    for seen in walks:
        places = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
        assert [(s, e) for s, e, _ in seen] == [place for place in places for _ in range(6)]
        for place in places:
            shown = [key for s, e, keys in seen if (s, e) == place for key in keys]
            assert len(shown) == len(set(shown)) == 12
            orders.append(tuple(shown))
    assert len(set(map(frozenset, orders))) == 1 and len(set(orders)) == 12


def test_mirrors_belong_to_epoch_and_seed(tmp_path):
    """The same patch is mirrored otherwise in other epochs, and by another seed."""
    one, two = (patches(2, seed=seed) for seed in (3, 4))
    versions = [[data[epoch, i].tobytes() for i in range(12)] for data in (one, two) for epoch in range(4)]
    assert len(set(map(tuple, versions))) == 8
    assert all(len({v[i] for v in versions}) > 1 for i in range(12))


@pytest.mark.parametrize(
    ("accumulate", "batch", "pictures"), [(1, 5, [5, 5]), (2, 2, [4, 4, 4]), (2, 4, [8]), (3, 2, [6, 6])]
)
def test_what_does_not_fill_a_step_is_dropped(tmp_path, accumulate, batch, pictures):
    """An incomplete batch, or an incomplete group of batches, is left out of its epoch."""
    seen = walk(tmp_path, accumulate=accumulate, batch=batch, epochs=(2, 1))
    for place in ((1, 0), (1, 1), (2, 0)):
        assert [len(keys) for s, e, keys in seen if (s, e) == place] == pictures


@pytest.mark.parametrize(
    ("every", "at"), [(1, [6, 12, 18, 24, 30, 36]), (2, [12, 18, 30, 36]), (9, [18, 36])]
)
def test_validation_is_due_every_so_many_epochs_and_at_the_end_of_a_stage(tmp_path, every, at):
    """Three epochs a stage, six steps an epoch; the log says where."""
    walk(tmp_path, validate=lambda model: {"score": 1.0}, validate_every=every)
    assert [x["step"] for x in log_of(tmp_path, "validation")] == at


def test_a_continued_run_neither_repeats_nor_leaves_out(tmp_path):
    """Stopped within an epoch, at its end or at that of a stage, it goes on with the very next batch."""
    whole = walk(tmp_path / "whole", epochs=(1, 1))
    for stop in (1, 5, 6, 7, 11):
        parts = [walk(tmp_path / f"{stop}", epochs=(1, 1), fit=fit) for fit in ({"steps": stop}, {})]
        assert [len(p) for p in parts] == [stop, 12 - stop] and parts[0] + parts[1] == whole


def test_a_stage_alone_goes_on_where_the_other_ended(tmp_path):
    """Stage II for itself has its own order and the rates of a network that stage I has trained."""
    both = walk(tmp_path / "both")
    alone = walk(tmp_path / "one", stages=(1,)) + walk(tmp_path / "two", stages=(2,))
    assert both == alone


def test_checkpoints_come_when_they_are_due(tmp_path):
    """Every two steps; the newest three are kept, and the end of an epoch is one."""
    walk(tmp_path, checkpoint_every=2, epochs=(1, 1), fit={"steps": 5})
    kept = sorted(p.stem for p in (tmp_path / "checkpoints").glob("*.json"))
    assert kept == ["step-000000002", "step-000000004", "step-000000005"]


def test_a_continued_run_has_the_random_numbers_of_the_straight_one(tmp_path):
    """Training draws none, but validation or a later part may: the state of the generator is restored."""
    walk(tmp_path, fit={"steps": 2})
    expected = torch.rand(3)
    torch.manual_seed(77)
    t = Trainer(SMFNet("tiny"), patches(2), recipe("paper", **WALK), tmp_path)
    assert t.resume() and torch.equal(torch.rand(3), expected)


def loaded(seed: int) -> SMFNet:
    """A network whose weights are a decision."""
    torch.manual_seed(seed)
    model = SMFNet("tiny")
    model.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("seed", {"seed": 1}),
        ("stages", {"stages": (1,)}),
        ("recipe", {"r": {"clip": 0.5}}),
        ("data", {"data": {"seed": 4}}),
        ("data", {"data": {"flips": False}}),
        ("initial weights", {"model": 1}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, what, change):
    """Whatever decides the weights is part of what a checkpoint must agree on."""

    def life(model=0, data=None, r=None, **options):
        r = recipe("paper", **{**WALK, **(r or {})})
        return Trainer(loaded(model), patches(2, **(data or {})), r, tmp_path, **options)

    life().save()
    assert life().resume()
    with pytest.raises(InputError, match=f"holds a run with another {what}[ ;]"):
        life(**change).resume()


def test_weights_say_whether_their_run_is_complete(tmp_path, monkeypatch):
    """A run that was stopped leaves weights, marked as such; the stages' own say at which step they were."""
    monkeypatch.setattr(Trainer, "train_step", lambda self, batches: {"loss": 0.0})
    r = recipe("paper", **WALK)
    for steps, complete in ((20, "False"), (0, "True")):
        processes.train(loaded(0), patches(2), r, tmp_path, steps=steps, progress=False)
        with safe_open(tmp_path / "weights.safetensors", "pt") as f:
            assert f.metadata()["complete"] == complete
    for stage, step in ((1, "18"), (2, "36")):
        with safe_open(tmp_path / f"stage{stage}.safetensors", "pt") as f:
            assert f.metadata()["step"] == step and json.loads(f.metadata()["recipe"])["batch"] == 2


# --- rates -------------------------------------------------------------------------------------------------


def stretch(*rates: float) -> list[float]:
    """Each rate for twenty epochs."""
    return [rate for rate in rates for _ in range(20)]


@pytest.mark.parametrize("stages", [(1, 2), (2,)])
def test_rates_of_the_paper_in_every_epoch(tmp_path, stages):
    """120 epochs, halved every twenty; the fusion layers begin in stage II, whoever trained stage I."""
    data = PatchSet([pair(shape=(128, 128))], seed=0)
    t = Trainer(SMFNet("tiny"), data, recipe("paper", batch=1), tmp_path, stages=stages)
    old = [*stretch(1e-4, 5e-5), *stretch(2.5e-5, 1.25e-5, 6.25e-6, 3.125e-6)]
    new = stretch(1e-4, 5e-5, 2.5e-5, 1.25e-5)
    for stage, epoch in [*((1, e) for e in range(40)), *((2, e) for e in range(80))]:
        t.progress.stage, t.progress.epoch = stage, epoch
        t.set_rates()
        rates = {g["name"]: g["lr"] for g in t.optimiser.param_groups}
        assert all(rates[k] == pytest.approx(old[epoch + 40 * (stage - 1)]) for k in PARTS[1])
        if stage == 2:
            assert rates["base_fusion"] == rates["detail_fusion"] == pytest.approx(new[epoch])


def test_the_numbers_of_the_paper():
    """What the paper prints, and what its release adds, literally."""
    r = Recipe()
    assert (r.epochs, r.lr, r.batch, r.patch) == ((40, 80), 1e-4, 6, 128)
    assert (r.lr_every, r.lr_factor, r.lr_floor, r.clip) == (20, 0.5, 1e-6, 0.01)
    assert (r.stride, r.min_contrast, r.flips, r.gain, r.fade) == (128, 0.1, True, 0.0, 0.0)
    assert (r.loss, r.reading, r.weights) == ("paper", "ordered_classes", {})
    assert (r.accumulate, r.freeze_bn, r.amp) == (1, False, "off")
    assert recipe("released") == Recipe(loss="released") != r == recipe("paper")


# --- from settings to a run --------------------------------------------------------------------------------


class Called(Exception):
    """Ends a program where it would begin to train."""


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What `train` was called with."""
    found = {}

    def train(model, data, r, folder, **options):
        found.update(model=model, data=data, r=r, folder=folder, **options)
        raise Called

    for module in (processes, ablations):
        monkeypatch.setattr(module, "train", train)
    return found


CUTS = [{}, {"gain": 0.25}, {"flips": False}, {"min_contrast": 0.2}, {"stride": 12}, {"patch": 20}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("seed", [0, 5])
def test_every_setting_of_the_data_reaches_the_patches(tmp_path, asked, monkeypatch, cut, seed):
    """The program and an ablation cut, mirror and darken as the recipe says, with the seed that was given."""
    flat = pair("flat", 1)
    flat.vis[:] = 0.85 + 0.15 * flat.vis  # contrast about 0.12
    pairs = [pair(), flat]
    monkeypatch.setattr(processes, "load_pairs", lambda folder, progress: pairs)
    r = recipe("demo", **{"patch": 16, "stride": 8, "batch": 2, **cut})
    names = ("patch", "stride", "min_contrast", "flips", "gain")
    expected = PatchSet(pairs, **{k: getattr(r, k) for k in names}, seed=seed).fingerprint()
    settings = {"patch": 16, "stride": 8, "batch": 2, **cut}
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "o"), "--seed", str(seed)]
    with pytest.raises(Called):
        processes.main(command + [x for k, v in settings.items() for x in ("--set", f"{k}={json.dumps(v)}")])
    assert asked["data"].fingerprint() == expected and asked["r"] == r and asked["seed"] == seed
    asked.clear()
    with pytest.raises(Called):
        train_configuration("ours", pairs, tmp_path, seed=seed, r=r)
    assert asked["data"].fingerprint() == expected and asked["r"] == r and asked["seed"] == seed


@pytest.mark.parametrize("stages", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_program_draws_by_its_seed_and_trains_the_stages_it_was_told(
    tmp_path, asked, monkeypatch, stages, seed
):
    """Initial weights of `--seed`, stages of `--stages`; the rest as given."""
    monkeypatch.setattr(processes, "load_pairs", lambda folder, progress: [pair()])
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "o"), "--seed", str(seed), "--steps", "7"]
    command += ["--set", "patch=16", "--stages", *map(str, stages), "--checkpoint-every", "9"]
    with pytest.raises(Called):
        processes.main(command)
    torch.manual_seed(seed)
    expected = SMFNet("tiny").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in asked["model"].state_dict().items())
    assert (asked["stages"], asked["steps"], asked["checkpoint_every"]) == (stages, 7, 9)
    assert asked["folder"] == tmp_path / "o" and asked["notes"] == {"recipe": "demo", "seed": str(seed)}


@pytest.mark.parametrize(
    ("name", "network", "weights", "stages"),
    [
        ("ours", {}, {}, (1, 2)),
        ("one_stage", {}, {}, (2,)),
        ("both_cc_graph", {}, {"graph_cc_stage1": 1.0}, (1, 2)),
        ("without_intensity_and_semantic", {}, {"intensity": 0.0, "semantic": 0.0}, (1, 2)),
        ("without_residual_transformer", {"base": "stacked"}, {}, (1, 2)),
        ("inn", {"detail": "inn"}, {}, (1, 2)),
        ("without_graph", {"graph": False}, {"graph_cc_stage2": 0.0}, (1, 2)),
        ("exchanged_fusion_layers", {"exchange": True}, {}, (1, 2)),
    ],
)
def test_a_configuration_trains_what_its_name_says(tmp_path, asked, name, network, weights, stages):
    """Its switch is set in the network or in the loss, beside what the recipe asks for itself."""
    r = recipe("demo", patch=16, stride=8, batch=2, weights={"alpha2": 3.0})
    with pytest.raises(Called):
        train_configuration(name, [pair()], tmp_path, seed=5, r=r)
    torch.manual_seed(5)
    expected = SMFNet("tiny", **network)
    assert asked["model"].config == expected.config and asked["stages"] == stages
    drawn = expected.state_dict()
    assert all(torch.equal(v, drawn[k]) for k, v in asked["model"].state_dict().items())
    assert asked["r"].weights == {"alpha2": 3.0, **weights}
    assert asked["r"].epochs == ((0, 5) if name == "one_stage" else (2, 3))
