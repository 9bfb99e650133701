"""Comparison tables and the study behind them: the arithmetic, the rendering, and what bad input says."""

import html.parser
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.report.study import (
    grid_scenes,
    measure_set,
    method_folders,
    other_images,
    set_folders,
    summarise_sets,
)
from smfnet.report.tables import (
    compare_set,
    group_remarks,
    image_remarks,
    name_key,
    over_seeds,
    profiles,
    read_summary,
    table_sets,
    to_html,
    to_markdown,
    trivial_wins,
    value_groups,
    worth,
    write_tables,
)

METRICS = ("EN", "MI", "SSIM")


def published(values: dict, name: str = "TNO") -> pd.DataFrame:
    """Rows as the transcribed tables have them."""
    return pd.DataFrame(
        [
            {
                "table": 1,
                "set": name,
                "method": k,
                "metric": m,
                "value": v,
                "printed": str(v),
                "source": "made up",
                "note": "",
            }
            for k, row in values.items()
            for m, v in zip(METRICS, row)
        ]
    )


def measured(values: dict, name: str = "TNO", n: int = 25, **more) -> pd.DataFrame:
    """Rows as the stage `evaluate` writes them."""
    return pd.DataFrame(
        [
            {
                "set": name,
                "method": k,
                "metric": m,
                "mean": v,
                "low": v - 0.5,
                "high": v + 0.5,
                "n": n,
                "undefined": 0,
                "protocol": "table1",
                "origin": "fused here",
                **more,
            }
            for k, row in values.items()
            for m, v in zip(METRICS, row)
        ]
    )


PUBLISHED = published({"DeFusion": (6.5, 1.7, 0.9), "DIDFuse": (6.9, 1.7, 0.8), "ours": (7.1, 2.1, 1.0)})
MEASURED = measured(
    {
        "ours": (7.0, 1.8, 0.9),
        "did_fuse": (6.9, 1.6, 0.8),
        "Own": (6.0, 2.5, 0.7),
        "maximum": (6.8, 4.7, 1.0),
        "average": (6.2, 1.6, 1.1),
    }
)


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by method and metric."""
    return table.set_index(["method", "metric"])


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_difference_interval_and_ranks_of_every_cell():
    table = compare_set(PUBLISHED, MEASURED, "tno", expected=25)
    c = cells(table)
    both = table[table["published"].notna() & table["measured"].notna()]
    np.testing.assert_allclose(both["difference"], both["measured"] - both["published"], atol=0)
    assert set(both["method"]) == {"DIDFuse", "ours"} and (table["set"] == "TNO").all()
    assert table["difference"].notna().sum() == len(both)  # nowhere else
    assert c.loc[("Own", "MI"), ["low", "high"]].tolist() == [2.0, 3.0]
    assert c["published_rank"].xs("MI", level="metric").dropna().to_dict() == {
        "DeFusion": 2,
        "DIDFuse": 2,
        "ours": 1,
    }  # a tie shares its rank
    assert c["measured_rank"].xs("MI", level="metric").dropna().to_dict() == {
        "DIDFuse": 3,
        "ours": 2,
        "Own": 1,
    }  # no trivial row


def test_a_rank_never_mixes_published_and_measured():
    """Lifting every measured value changes no published rank, and the other way round."""
    plain, lifted = (
        compare_set(PUBLISHED, MEASURED, "TNO"),
        compare_set(PUBLISHED, MEASURED.assign(mean=MEASURED["mean"] + 100), "TNO"),
    )
    pd.testing.assert_series_equal(plain["published_rank"], lifted["published_rank"])
    pd.testing.assert_series_equal(plain["measured_rank"], lifted["measured_rank"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=6, unique=True))
def test_the_best_measured_value_has_rank_one(values):
    rows = measured({f"m{i}": (v, v, v) for i, v in enumerate(values)})
    table = cells(compare_set(PUBLISHED[:0], rows, "TNO")).xs("EN", level="metric")
    assert table["measured_rank"].idxmin() == f"m{int(np.argmax(values))}" and sorted(
        table["measured_rank"]
    ) == list(range(1, len(values) + 1))


def test_images_of_a_subset_are_stated_and_not_ranked_with_the_others():
    rows = pd.concat([MEASURED, measured({"Few": (9.0, 9.0, 9.0)}, n=3)])
    table = compare_set(PUBLISHED, rows, "TNO", expected=361)
    assert np.isnan(cells(table).loc[("Few", "EN"), "measured_rank"])
    assert "3 of 361" in to_markdown(table) and "25 of 361" in to_html(table)


def test_seeds_become_a_spread():
    rows = pd.concat([measured({"ours": (6.0 + s, 2.0, 1.0)}, seed=s) for s in range(3)])
    row = cells(compare_set(PUBLISHED, rows, "TNO")).loc[("ours", "EN")]
    assert (row["measured"], row["spread"], row["n_seeds"]) == (7.0, 1.0, 3) and np.isnan(row["low"])
    text = to_markdown(compare_set(PUBLISHED, rows, "TNO"))
    assert (
        "| 7.0000 ± 1.0000 (3 seeds) |" in text
        and "[" not in text.split("| ours | measured")[1].split("\n")[0]
    )


def test_rows_without_a_seed_beside_rows_with_one():
    """A baseline has no seed and keeps its interval when a network has several."""
    rows = pd.concat(
        [measured({"ours": (6.0 + s, 2.0, 1.0)}, seed=s) for s in range(2)]
        + [measured({"maximum": (6.5, 4.0, 1.0)})]
    )
    both = over_seeds(rows).set_index(["method", "metric"])
    assert (
        both.loc[("maximum", "EN"), ["low", "high", "n_seeds"]].tolist() == [6.0, 7.0, 1]
        and both.loc[("ours", "EN"), "n_seeds"] == 2
    )


@pytest.mark.parametrize("seeds", [(None, 1), (None, 1, 2), (None, None), (1, 1), (0, 1, 1)])
def test_seeds_that_do_not_tell_rows_apart_are_refused(seeds):
    """A run without a seed beside others, or a seed that occurs twice, gives no mean but names the row."""
    rows = pd.concat(
        [
            measured({"ours": (6.0 + i, 2.0, 1.0)}, **({} if s is None else {"seed": s}))
            for i, s in enumerate(seeds)
        ]
    )
    with pytest.raises(InputError, match="TNO ours EN (has a row without a seed|is there twice)"):
        over_seeds(rows)


def test_names_meet_in_spite_of_their_spelling():
    assert len({name_key(n) for n in ("TarDAL", "TarDal[1]", "tar-dal", "Tar_DAL")}) == 1
    assert name_key("Ours") != name_key("Ours*") == name_key("ours-medical")
    assert table_sets(PUBLISHED, measured({"ours": (1, 1, 1)}, name="tno")) == ["TNO"]


def test_trivial_rows_that_beat_a_column():
    wins = trivial_wins(compare_set(PUBLISHED, MEASURED, "TNO", expected=25)).set_index(["metric", "trivial"])
    assert wins["beats_published"].to_dict() == {
        ("EN", "average"): False,
        ("MI", "average"): False,
        ("SSIM", "average"): True,
        ("EN", "maximum"): False,
        ("MI", "maximum"): True,
        ("SSIM", "maximum"): False,
    }
    assert wins.loc[("MI", "maximum"), ["published_best", "published_value", "measured_best"]].tolist() == [
        "SMFNet (paper)",
        2.1,
        "Own",
    ]
    said = worth(wins.reset_index())
    assert len(said) == 1 and "EN" not in said[0]
    assert "MI (maximum 4.7000 against 2.1000 of SMFNet (paper))" in said[0]
    few = worth(trivial_wins(compare_set(PUBLISHED, MEASURED, "TNO", expected=30)))
    assert "25 of 30 images" in few[0]
    assert "no published row" in worth(trivial_wins(compare_set(PUBLISHED[:0], MEASURED, "TNO")))[0]


def test_a_remark_belongs_to_what_was_measured():
    """Published rows of the same name are another network."""
    text = to_markdown(compare_set(PUBLISHED, MEASURED, "TNO", notes={"ours": "tiny preset"}))
    assert "| SMFNet (paper) | published |" in text and "| ours (tiny preset) | measured |" in text
    assert "tiny preset" not in to_markdown(
        compare_set(PUBLISHED, MEASURED[:0], "TNO", notes={"ours": "tiny preset"})
    )


def test_a_row_that_stands_alone_is_not_the_best():
    assert compare_set(PUBLISHED, measured({"ours": (1, 1, 1)}), "TNO")["measured_rank"].isna().all()


def test_two_groups_and_image_counts_in_words():
    assert [list(g.index) for g in value_groups(pd.Series({"a": 0.2, "b": 1.5, "c": 0.3}))] == [
        ["a", "c"],
        ["b"],
    ]
    assert (
        len(value_groups(pd.Series({"a": -1.0, "b": 5.0}))) == 1
        and len(value_groups(pd.Series(dtype=float))) == 1
    )
    table = compare_set(published({"A": (1, 1, 0.2), "B": (1, 1, 1.5)}), MEASURED, "TNO", expected=25)
    assert group_remarks([table], "SSIM")[0].startswith(
        "TNO: published SSIM falls into two groups, 0.2000 to 0.2000 (A)"
    )
    claims = pd.DataFrame({"kind": ["count"], "sets": ["TNO"], "target": ["36"]})
    assert "stated by the paper 36" in image_remarks([table], claims)[0]


def test_profiles_for_a_radar_plot_share_their_columns():
    extra = pd.concat([MEASURED, MEASURED[MEASURED["metric"] == "EN"].assign(metric="SCD")])
    sides = profiles(compare_set(PUBLISHED, extra, "TNO"))
    assert list(sides["published"].columns) == list(sides["measured"].columns) == list(METRICS)
    assert list(profiles(compare_set(PUBLISHED[:0], extra, "TNO"))["measured"].columns) == [*METRICS, "SCD"]


# --- rendering ----------------------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Collects tags, and complains when one is not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_closed_escaped_and_self_contained(tmp_path):
    table = compare_set(PUBLISHED, MEASURED.replace("Own", '<img src="x">'), "TNO", notes={"ours": "a & b"})
    files = write_tables({"TNO": table}, tmp_path / "t", title="<b>", remarks=["1 < 2"])
    page = files[2].read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open and checker.count["table"] == 1 and checker.count["tr"] == 1 + 6
    assert (
        "<img" not in page
        and "a &amp; b" in page
        and "<link" not in page
        and "http" not in page
        and "1 &lt; 2" in page
    )


def test_published_values_are_shown_as_printed():
    table = compare_set(published({"A": (6.5, 1.985, 0.1)}), MEASURED, "TNO")
    assert ">1.985<" in to_html(table) and "| 1.985 |" not in to_html(table) and "1.985" in to_markdown(table)
    assert "-0.0000" not in to_markdown(
        compare_set(published({"ours": (7.00001, 1.8, 0.9)}), MEASURED, "TNO")
    )


def test_the_csv_gives_the_table_back(tmp_path):
    table = compare_set(PUBLISHED, MEASURED, "TNO", expected=25)
    file = write_tables({"TNO": table}, tmp_path / "t", title="t")[0]
    again = pd.read_csv(file)
    np.testing.assert_array_equal(again["measured"], table["measured"])
    assert list(again["method"]) == list(table["method"])


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (MEASURED.drop(columns="low"), "lacks the columns low"),
        (MEASURED.assign(mean="x"), "holds text"),
        (pd.concat([MEASURED, MEASURED[:1].assign(mean=9.0)]), "twice"),
        (pd.concat([MEASURED, measured({"DIDFuse": (1, 1, 1)})]), "did_fuse and DIDFuse"),
        (
            pd.concat([measured({"ours": (1, 1, 1)}, seed=0), measured({"ours": (1, 1, 1)}, seed=1, n=4)]),
            "same images",
        ),
    ],
)
def test_a_bad_measurement_is_refused(frame, words):
    with pytest.raises(InputError, match=words):
        compare_set(PUBLISHED, frame, "TNO")


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="known are TNO"):
        compare_set(PUBLISHED, MEASURED, "Oslo")


def test_a_bad_summary_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="evaluate"):
        read_summary(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="empty.csv"):
        read_summary(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="lacks the columns set"):
        read_summary(tmp_path / "other.csv")


# --- the study ----------------------------------------------------------------------------------------------


@pytest.fixture()
def study(tmp_path):
    """A set of three pairs and two methods."""
    rng = np.random.default_rng(0)
    for folder in ("data/own/test/ir", "data/own/test/vi", "fused/own/ours", "data/fused/own/Theirs"):
        (tmp_path / folder).mkdir(parents=True)
        for stem in "abc":
            Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)).save(
                tmp_path / folder / f"{stem}.png"
            )
    return tmp_path


def methods_of(study):
    return method_folders("own", fused=study / "fused", others=other_images("", study / "data"))


def test_other_methods_are_measured_like_ours(study):
    place = set_folders("own", data=study / "data")
    tables = measure_set(place, methods_of(study))
    assert list(tables) == ["ours", "Theirs"] and all(len(t) == 3 for t in tables.values())
    summary = summarise_sets(
        {("own", m): t for m, t in tables.items()}, origin={("own", "Theirs"): "images at hand"}
    )
    text = summary.to_csv()
    assert len(compare_set(PUBLISHED[:0], pd.read_csv(io.StringIO(text)), "own")["method"].unique()) == 2
    assert (
        summary.loc[("own", "Theirs", "EN"), "origin"] == "images at hand"
        and (summary["protocol"] == "table1").all()
    )


@pytest.mark.parametrize("damage", ["missing", "broken", "size", "renamed"])
def test_one_bad_image_stops_the_measurement_and_is_named(study, damage):
    file = study / "data/fused/own/Theirs/b.png"
    if damage == "missing":
        file.unlink()
    elif damage == "broken":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "size":
        Image.new("L", (20, 20)).save(file)
    else:
        file.rename(file.with_name("z.png"))
    with pytest.raises(InputError, match=r"Theirs|b\.png") as caught:
        measure_set(set_folders("own", data=study / "data"), methods_of(study))
    assert "b" in str(caught.value) and ("z.png" in str(caught.value)) == (damage == "renamed")


def test_an_image_beyond_the_set_is_left_out_with_a_remark(study):
    Image.new("L", (64, 48)).save(study / "data/fused/own/Theirs/z.png")
    tables = measure_set(set_folders("own", data=study / "data"), methods_of(study))
    assert len(tables["Theirs"]) == 3 and "z.png" in tables["Theirs"].attrs["notes"][0]


def test_the_same_method_in_both_places_is_refused(study):
    (study / "data/fused/own/Theirs").rename(study / "data/fused/own/ours")
    with pytest.raises(InputError, match="is in .* too"):
        methods_of(study)


def test_a_grid_refuses_a_method_without_the_pair(study):
    (study / "fused/own/ours/b.png").unlink()
    with pytest.raises(InputError, match=r"ours: 0 images named b"):
        grid_scenes(set_folders("own", data=study / "data"), methods_of(study), ["b"])


def test_missing_folders_say_what_to_pass(study):
    with pytest.raises(InputError, match="scenes=DIR"):
        set_folders("scenes")
    with pytest.raises(InputError, match="nowhere"):
        set_folders("nowhere", data=study / "data")
    with pytest.raises(InputError, match="no such folder"):
        method_folders("own", fused=study / "fused", others=study / "absent")
