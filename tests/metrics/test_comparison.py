"""What the numbers are worth: intervals that cover, pictures that count once, seeds, who is best."""

import numpy as np
import pandas as pd
import pytest

from smfnet.core.checks import InputError
from smfnet.data.matching import Pair
from smfnet.data.registry import find_set, locate
from smfnet.metrics.comparison import (
    best_of,
    compare,
    compare_all,
    mean_interval,
    seed_difference,
    seed_verdict,
    summarise,
    verdicts,
)
from smfnet.metrics.folder import clusters_of

POPULATIONS = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "lognormal": (lambda rng, size: rng.lognormal(size=size), np.exp(0.5)),
    "heavy tails": (lambda rng, size: rng.standard_t(3, size), 0.0),
    "five steps": (lambda rng, size: rng.integers(0, 5, size) / 4, 0.5),
}


def percentile(values, draws=499):
    """The interval that the project no longer reports: the middle 95 % of means of resamples."""
    at = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return np.quantile(values[at].mean(1), [0.025, 0.975])


def coverage(interval, population, n, repeats=1500):
    """Share of intervals that hold the true mean."""
    draw, true = POPULATIONS[population]
    ends = [interval(x) for x in draw(np.random.default_rng(1), (repeats, n))]
    return np.mean([low <= true <= high for low, high in ends])


def keeps_its_promise(interval):
    """Whether an interval covers bell-shaped values as often as it says, for few and for more images."""
    return all(coverage(interval, "normal", n) >= 0.93 for n in (12, 25))


def test_interval_covers_and_percentile_would_not():
    assert keeps_its_promise(mean_interval)
    assert not keeps_its_promise(percentile)


@pytest.mark.parametrize("n", [12, 25])
@pytest.mark.parametrize("population", POPULATIONS)
def test_interval_never_covers_less_than_percentile(population, n):
    assert coverage(mean_interval, population, n) >= coverage(percentile, population, n)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_level_is_the_share_that_covers(level):
    assert coverage(lambda x: mean_interval(x, level=level), "normal", 8) == pytest.approx(level, abs=0.04)


def clustered_sets(repeats=1000, correlation=0.8):
    """Test sets of 21 pictures, each used twice, and 5 that stand alone; the true mean is 0."""
    rng = np.random.default_rng(2)
    names = [*np.repeat(np.arange(21), 2), *range(21, 26)]
    shared = np.sqrt(correlation) * rng.normal(size=(repeats, 26))[:, names]
    return shared + np.sqrt(1 - correlation) * rng.normal(size=shared.shape), names


def test_pictures_that_are_shared_count_once():
    sets, names = clustered_sets()

    def covered(clusters):
        return np.mean(
            [low <= 0 <= high for low, high in (mean_interval(x, clusters=clusters) for x in sets)]
        )

    assert covered(None) < 0.90
    assert 0.93 < covered(names) < 0.97


def tables(rng, leads, n=25, spread=0.02):
    """A table a method: scenes that differ, a lead for each method, and noise."""
    scene = rng.normal(6.8, 0.6, n)
    stems = pd.Index([f"{i:02d}" for i in range(n)], name="stem")
    return {m: pd.DataFrame({"EN": scene + a + rng.normal(0, spread, n)}, stems) for m, a in leads.items()}


def doubled(table):
    """Every image twice, the copies under other stems."""
    return pd.concat([table, table.rename(index=lambda s: f"{s}x")])


def test_copies_add_nothing():
    plain = tables(np.random.default_rng(3), {"A": 0.0, "B": 0.01, "C": 0.05})
    twice = {m: doubled(t) for m, t in plain.items()}
    names = {f"{s}x": s for s in plain["A"].index}
    for one, two in (
        (summarise(plain["A"]), summarise(twice["A"], clusters=names)),
        (compare(plain), compare(twice, clusters=names)),
        (compare_all(plain), compare_all(twice, clusters=names)),
        (best_of(plain), best_of(twice, clusters=names)),
    ):
        pd.testing.assert_frame_equal(
            one.drop(columns="n", errors="ignore"), two.drop(columns="n", errors="ignore")
        )
    assert compare(twice).loc[0, "p"] < compare(plain).loc[0, "p"]
    for t in twice.values():
        t.attrs["clusters"] = names
    pd.testing.assert_frame_equal(compare(twice), compare(twice, clusters=names))
    assert compare(twice, clusters={}).loc[0, "p"] < compare(twice).loc[0, "p"]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5, 1e-3])
def test_a_lead_of_a_hundred_thousandth_is_not_best(noise):
    rng = np.random.default_rng(4)
    field = tables(rng, {"first": 0.0, "last": -0.5})
    field["second"] = field["first"] - 1e-5 + noise * rng.normal(size=(25, 1))
    found = best_of(field).set_index("method")
    assert found["standing"].to_dict() == {"first": "among the best", "second": "among the best", "last": ""}
    assert found["rank_to"].to_dict() == {"first": 2, "second": 2, "last": 3}
    finer = best_of(field, resolution=1e-6).set_index("method")["standing"]
    assert (finer["first"] == "best") == (noise < 1e-4)  # 25 images average the noise


def test_a_clear_lead_is_best_and_an_uncertain_one_is_not():
    rng = np.random.default_rng(5)
    clear = best_of(tables(rng, {"A": 0.0, "B": 0.1, "C": -0.1})).set_index("method")
    assert clear["standing"].to_dict() == {"A": "", "B": "best", "C": ""}
    assert clear[["rank", "rank_from", "rank_to"]].loc["A"].tolist() == [2, 2, 2]
    close = best_of(tables(rng, {"A": 0.0, "B": 0.002, "C": -0.1})).set_index("method")
    assert close["standing"].to_dict() == {"A": "among the best", "B": "among the best", "C": ""}


def test_the_family_is_the_whole_table():
    """A lead that is significant alone is not so among many comparisons."""
    rng = np.random.default_rng(6)
    for _ in range(100):
        pair = tables(rng, {"A": 0.0, "B": 0.013})
        if 0.001 < compare(pair).loc[0, "p"] < 0.01 and compare(pair).loc[0, "low"] > 0:
            break
    assert set(best_of(pair)["standing"]) == {"best", ""}
    others = {f"M{i}": t - 0.001 * i for i, t in enumerate([pair["A"]] * 6, 2)}
    noisy = {m: t + rng.normal(0, 0.02, (25, 1)) for m, t in others.items()}
    assert "best" not in set(best_of(pair | noisy)["standing"])


def test_equal_methods_have_no_best():
    rng = np.random.default_rng(7)
    found = [best_of(tables(rng, dict.fromkeys("ABCD", 0.0)))["standing"] for _ in range(60)]
    assert np.mean([(s == "best").any() for s in found]) <= 0.05
    assert np.mean([(s == "").any() for s in found]) <= 0.12  # 0.05 and two standard errors


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_images_decide_nothing(n):
    field = tables(np.random.default_rng(8), {"A": 0.0, "B": 1.0}, n=n)
    assert verdicts(compare(field)).tolist() == ["open"]
    assert set(best_of(field)["standing"]) == {"among the best"}
    low, high = summarise(field["A"]).loc["EN", ["low", "high"]]
    assert np.isnan(low) == np.isnan(high) == (n == 1)


def test_undefined_and_equal_values():
    field = tables(np.random.default_rng(9), {"A": 0.0, "B": 1.0})
    same = {"A": field["A"], "B": field["A"].copy()}
    found = compare(same).iloc[0]
    assert (
        found[["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]
        and verdicts(compare(same))[0] == "tie"
    )
    gone = {m: t.assign(VIF=np.nan) for m, t in field.items()}
    assert verdicts(compare(gone)).tolist() == ["better", "open"]
    assert compare(gone)["p_holm"].isna().tolist() == [False, True]
    assert best_of(gone).set_index("metric").loc["VIF", "standing"].tolist() == ["", ""]
    assert best_of(gone).set_index("metric").loc["EN", "standing"].tolist() == ["", "best"]
    with pytest.raises(InputError, match="3 names for 25 images"):
        compare(field, clusters=["a", "b", "c"])


def null_differences(seeds, spread, repeats=600):
    """Differences of two methods without any true one, 25 images × seeds."""
    rng = np.random.default_rng(10)
    image, rest = rng.normal(size=(repeats, 25, 1)), 0.5 * rng.normal(size=(repeats, 25, seeds))
    return image + rest + spread * rng.normal(size=(repeats, 1, seeds))


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_and_images_are_both_counted(seeds, spread):
    found = [seed_difference(d) for d in null_differences(seeds, spread)]
    assert np.mean([f.low <= 0 <= f.high for f in found]) > 0.905
    words = [f.verdict for f in found]
    assert np.mean([w in ("better", "worse") for w in words]) < 0.095


def test_images_alone_would_find_differences_where_none_are():
    wrong = [np.prod(np.sign(mean_interval(d.mean(1)))) > 0 for d in null_differences(3, 1.0)]
    assert np.mean(wrong) > 0.4


def test_two_seeds_are_too_few():
    rng = np.random.default_rng(11)
    clear = 1 + 0.01 * rng.normal(size=(25, 4))
    assert [seed_difference(clear[:, :k]).verdict for k in (1, 2, 3, 4)] == ["too few seeds"] * 2 + [
        "better"
    ] * 2
    assert seed_difference(-clear).verdict == "worse"
    assert seed_difference(clear[:1]).verdict == "not told apart"  # one image has no interval
    words = {seed_difference(d).verdict for d in null_differences(2, 1.0)}
    assert words == {"not told apart", "too few seeds"}
    assert (
        seed_verdict(0.0, 0.1, 9) == "not told apart" and seed_verdict(np.nan, np.nan, 1) == "too few seeds"
    )


def on_disk(name):
    """Pairs of a test split that is on this machine, by the registry."""
    split = find_set(name).split("test")
    root = locate(split)
    if root is None:
        pytest.skip(f"{name} is not on this machine")
    return [Pair(p.stem, root / p.ir.path, root / p.vis.path) for p in split.pairs]


@pytest.mark.parametrize(
    ("name", "groups"), [("TNO", 25), ("RoadScene", 49), ("MRI-PET", 21), ("MRI-CT", 21), ("MRI-SPECT", 73)]
)
def test_groups_of_the_public_sets(name, groups):
    """The derived splits `test-distinct` state the same numbers."""
    pairs = on_disk(name)
    shared = clusters_of(pairs)
    assert len({shared.get(p.stem, p.stem) for p in pairs}) == groups
    if "test-distinct" in find_set(name).splits:
        assert find_set(name).split("test-distinct").count == groups


def test_renamed_files_are_recognised(tmp_path):
    """Names don't matter: what is shared is found by content."""
    pairs = on_disk("RoadScene")
    renamed = []
    for i, p in enumerate(pairs):
        pair = Pair(f"{i:02d}", tmp_path / f"ir{i}.jpg", tmp_path / f"vis{i}.jpg")
        pair.ir.write_bytes(p.ir.read_bytes())
        pair.vis.write_bytes(p.vis.read_bytes())
        renamed.append(pair)
    at = [i for i, p in enumerate(pairs) if p.stem in ("FLIR_09465", "FLIR_video_02829")]
    assert clusters_of(renamed) == {f"{i:02d}": f"{at[0]:02d}" for i in at}
