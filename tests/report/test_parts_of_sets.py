"""A set that was measured in part, or whose size nobody knows, never reproduces a claim."""

import pandas as pd
import pytest
from test_published import claims, judged, measured_like_print, published  # noqa: F401  (fixtures)

from smfnet.report.claims import ablation_rows, measured_rows
from smfnet.report.evidence import verdicts
from smfnet.report.study import expected_images

PARTS = pytest.mark.parametrize("complete", [False, None], ids=["a part", "of unknown size"])


def cut(rows: pd.DataFrame, where: pd.Series, complete) -> pd.DataFrame:
    """The same numbers, some of them from a part of a set."""
    return rows.assign(complete_set=rows["complete_set"].astype(object).mask(where, complete))


@PARTS
@pytest.mark.parametrize("name", ["TNO", "RoadScene", "MSRS"])
def test_one_part_among_whole_sets_counts_as_nothing(claims, published, name, complete):  # noqa: F811
    """A rank that needs this set is open; one that the other sets decide is what it is without this set."""
    rows = measured_like_print(published)
    speaks = claims["sets"].map(lambda text: name in text.split(";"))
    about = claims[(claims["kind"] == "rank") & speaks]
    part = (rows["set"] == name) & (rows["method"] == "ours")
    found = judged(about, published, cut(rows, part, complete))["verdict"]
    without = judged(about, published, rows[~part])["verdict"]
    assert (found == "reproduced").equals(without == "reproduced")
    whole = judged(about, published, rows)["verdict"] == "reproduced"
    needed = whole & (about.set_index("id")["cells_needed"] == "")
    assert needed.sum() >= 1 and (found[needed] == "open").all()


@PARTS
@pytest.mark.parametrize("methods", [("ours",), ("other",), ("ours", "other")], ids="+".join)
def test_an_ablation_needs_both_sides_on_the_whole_set(claims, published, methods, complete):  # noqa: F811
    """The network's rows, those of the other configuration, or both are of a part."""
    rows = measured_like_print(published)
    ablations = claims[claims["kind"] == "ablation"]
    whole = judged(ablations, published, rows, "our weights")["verdict"]
    ablations = ablations[ablations["id"].isin(whole.index[whole == "reproduced"])]
    assert len(ablations) > 2
    chosen = rows["method"].isin([*ablations["target"]] if "other" in methods else [])
    chosen |= rows["method"].isin(methods)
    found = judged(ablations, published, cut(rows, chosen, complete), "our weights")
    assert set(found["verdict"]) == {"open"}
    said = "unknown" if complete is None else "25 images are not the complete test set"
    assert found["why"].str.contains(said).all()


@PARTS
def test_rivals_of_a_part_confirm_nothing(claims, published, complete):  # noqa: F811
    """Neither trained rivals (tables 2 and 3) nor published images (tables 1 and 4)."""
    rows = measured_like_print(published)
    task = judged(claims, published, cut(rows, rows["method"] != "ours", complete)).loc["3.3-c"]
    assert task["verdict"] == "open" and "measured are 0 of" in task["why"]
    rivals = cut(rows[rows["method"] != "ours"], rows["set"] == "TNO", complete)
    asked = dict(expected=expected_images, layers=["other methods' images"])
    found = verdicts(claims, published, others=rivals, **asked).set_index("id").loc["3.2-j"]
    assert found["verdict"] == "open"
    found = verdicts(claims, published, others=cut(rivals, rivals["n"] > 0, complete), **asked)
    assert set(found["verdict"]) == {"not tested"}


@pytest.mark.parametrize(("name", "pairs"), [("TNO", 25), ("RoadScene", 50), ("MSRS", 361)])
def test_a_set_is_whole_with_exactly_its_images(name, pairs):
    """One image fewer is a part, and one more is something else; undefined values were measured too."""
    raw = {"set": name, "method": "ours", "metric": "EN", "mean": 6.0, "low": 5.0, "high": 7.0}

    def whole(n, **more):
        rows = pd.DataFrame([raw | {"n": n} | more])
        return measured_rows(rows, expected=expected_images)["complete_set"].tolist()

    assert expected_images(name) == pairs
    assert [whole(n) for n in (0, pairs - 1, pairs, pairs + 1)] == [[False], [False], [True], [False]]
    assert whole(pairs - 2, undefined=2) == [True] and whole(pairs, undefined=2) == [False]


def test_an_ablation_is_whole_with_exactly_its_images(published):  # noqa: F811
    """By the images of its rows, whatever the number of seeds."""
    facts = {"set": "TNO", "metric": "EN", "protocol": "p", "conditions": "c", "revision": "r"}
    for n, whole in ((24, False), (25, True), (26, False)):
        rows = [
            {**facts, "config": c, "seed": seed, "stem": f"{i}", "value": 7.0}
            for c in ("ours", "inn")
            for seed in (0, 1)
            for i in range(n)
        ]
        found = ablation_rows(pd.DataFrame(rows), published=published, expected=expected_images)
        assert found["complete_set"].tolist() == [whole, whole]


@PARTS
def test_a_part_of_another_set_matters_to_nobody(claims, published, complete):  # noqa: F811
    """Claims on RoadScene alone are judged as if the other sets were whole, and say nothing else."""
    rows = measured_like_print(published)
    about = claims[(claims["sets"] == "RoadScene") & claims["kind"].isin(["rank", "ablation"])]
    found, whole = (
        judged(about, published, some, "our weights")
        for some in (cut(rows, rows["set"] != "RoadScene", complete), rows)
    )
    assert (whole["verdict"] == "reproduced").sum() > 2 and found.equals(whole)
