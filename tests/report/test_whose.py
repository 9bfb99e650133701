"""Whose numbers they are: no printed value is shown as ours, and no measured one as the paper's network."""

import html
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from smfnet.core.tables import PAPER
from smfnet.report.figures import radar_pair
from smfnet.report.model_card import piece_card
from smfnet.report.power import power_table, power_words, write_power
from smfnet.report.published import audit_means, audit_outliers, missing_class_plot, outlier_map
from smfnet.report.tables import (
    as_printed,
    compare_set,
    group_remarks,
    met_rows,
    profiles,
    to_short_html,
    trivial_wins,
    worth,
    write_tables,
)
from smfnet.report.worth import COLUMNS, print_words, printed_leads
from smfnet.training.ablations import ablation_table, table_texts, tidy

# Printed numbers begin with 1, measured ones with 3, so that every number on a page tells whose it is.
METRICS = ("EN", "MI")
PRINTED = {"DIDFuse": (1.1, 1.2), "ours": (1.5, 1.6), "ours-medical": (1.3, 1.4)}
OWN = {
    "DIDFuse": (3.1, 3.2),
    "ours": (3.5, 3.6),
    "ours as saved": (3.7, 3.8),
    "ours-medical": (3.3, 3.4),
    "tiny": (3.8, 3.7),
    "maximum": (3.9, 3.9),
}


def rows(values: dict, column: str, **more) -> pd.DataFrame:
    """A row a method and metric."""
    found = [(k, m, v) for k, row in values.items() for m, v in zip(METRICS, row)]
    return pd.DataFrame(found, columns=["method", "metric", column]).assign(set="TNO", **more)


def compared(names: dict) -> pd.DataFrame:
    """One set as the stage `table1` compares it."""
    measured, notes = as_printed(rows(OWN, "mean", low=3.01, high=3.99, n=25), {"ours": "some weights"})
    return compare_set(rows(PRINTED, "value"), measured, "TNO", notes=notes, names=names)


def in_html(text: str) -> list[tuple[str, str]]:
    """Name and number of every value in tables: by the colours of the sides, where a label has both."""
    found = []
    for line in re.findall(r"<tr>(.*?)</tr>", text, re.S):
        label, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)
        names = dict(re.findall(r'<span class="(\w)">(.*?)</span>', label))
        plain = re.sub("<small>.*?</small>|<.*?>", "", label)
        for cell in cells:
            spans = re.findall(r'<span class="(\w)[^>]*>(.*?)</span>', cell) or [("", cell)]
            found += [(html.unescape(names.get(side, plain)), number) for side, number in spans]
    return found


def in_markdown(text: str) -> list[tuple[str, str]]:
    """Label and number of every value in tables."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(label, cell.strip("*").removeprefix("<u>")) for label, *cells in lines for cell in cells]


def ablation() -> pd.DataFrame:
    """Two configurations with two seeds."""
    labels = {"set": "RoadScene", "protocol": "p", "conditions": "c", "revision": "r"}
    runs = (("ours", 0, 3.5), ("ours", 1, 3.6), ("inn", 0, 3.1), ("inn", 1, 3.4))
    parts = [tidy(pd.DataFrame({"EN": [v]}, index=["a"]), config=c, seed=s, **labels) for c, s, v in runs]
    printed = pd.DataFrame({"method": ["ours", "inn"], "metric": "EN", "value": [1.5, 1.4]})
    return ablation_table(printed, pd.concat(parts), ["EN"])


def rendered(table: pd.DataFrame, folder) -> dict[str, list[tuple[str, str]]]:
    """What every table for readers says: names and numbers."""
    _, md, page = write_tables({"TNO": table}, folder / "t", title="t")
    parts, cells = ablation(), power_table(ablation())
    texts = table_texts(parts, "t", [])
    write_power(parts, cells, power_words(cells), folder / "power")
    phase = {"params": {"init": "", "grow": -1, "stages": [1], "settings": {}}, "seconds": 1, "seed": 0}
    phase |= {"curve": [], "git": {"revision": "r"}}
    facts = {"name": "x", "half": True, "moved": 0.0, "looks": "", "tried": [], "reached": {}, "ahead": {}}
    card = piece_card(facts, [phase], {"TNO": table})
    return {
        "html": in_html(page.read_text()),
        "short": in_html(to_short_html({"TNO": table})),
        "markdown": in_markdown(md.read_text()),
        "card": in_markdown(card),
        "ablation": in_html(texts[".html"]),
        "ablation in Markdown": in_markdown(texts[".md"]),
        "power": in_html((folder / "power.html").read_text()),
        "power in Markdown": in_markdown((folder / "power.md").read_text()),
    }


def is_ours(name: str) -> bool:
    """Whether a name says that something is ours."""
    return bool(re.search(r"\bours\b", name, re.I))


@pytest.mark.parametrize("theirs", [False, True], ids=["our weights", "authors' weights"])
def test_every_table_tells_printed_from_measured(tmp_path, theirs):
    """Tables as HTML, Markdown and CSV, in reports and cards; the authors' checkpoint is not ours either."""
    names = {"ours": "authors' weights"} if theirs else {}
    names |= {"tiny": "ours · tiny"}
    table = compared(names)
    for place, pairs in rendered(table, tmp_path).items():
        printed = {name for name, number in pairs if re.match(r"1\.\d", number)}
        measured = {name for name, number in pairs if re.match(r"3\.\d", number)}
        assert any(PAPER in name for name in printed) and not any(map(is_ours, printed)), (place, printed)
        assert not any(PAPER in name for name in measured), (place, measured)
        if "power" not in place:
            assert any(map(is_ours, measured)) or place == "short", (place, measured)
        if theirs and place in ("html", "short", "markdown", "card"):
            own = {name for name, number in pairs if re.match(r"3\.[5678]000", number) and "tiny" not in name}
            assert own and all(name.split(": ")[-1].startswith("authors' weights") for name in own), own
    assert table.loc[table["published"].notna(), "published_name"].map(is_ours).sum() == 0
    assert PAPER not in set(table.loc[table["measured"].notna(), "measured_name"])
    medical = table[table["published_name"].eq(f"{PAPER} trained on medical images")]
    assert set(medical["measured_name"]) == {"ours · medical"}


def test_sentences_and_pictures_tell_printed_from_measured():
    """Remarks on columns, legends and axes."""
    table = compared({})
    said = worth(trivial_wins(table))
    assert f"of {PAPER}" in said[0] and not is_ours(said[0])
    apart = table.copy()
    apart.loc[apart["method"] == "ours", ["published", "measured"]] *= 3
    printed, measured = group_remarks([apart], "EN")
    assert PAPER in printed and not is_ours(printed) and is_ours(measured) and PAPER not in measured
    assert PAPER not in set(met_rows([table])["method"]) and "ours" in set(met_rows([table])["method"])

    figure = radar_pair(**profiles(table), title="TNO", highlight=[PAPER, "ours"])
    left, right = ({t.get_text() for t in ax.get_legend().get_texts()} for ax in figure.axes)
    assert PAPER in left and not any(map(is_ours, left)) and "ours" in right and PAPER not in right
    heavy = [line.get_label() for ax in figure.axes for line in ax.lines if line.get_linewidth() > 2]
    assert heavy == [PAPER, "ours"]

    values = {"ours": 1.5, "DIDFuse": 1.4, "MURF": 1.3}
    cells = pd.DataFrame([(k, m, v) for k, v in values.items() for m in COLUMNS],
                         columns=["method", "metric", "value"])  # fmt: skip
    widths = pd.DataFrame({"metric": COLUMNS, "half-width": 0.5})
    said = print_words(printed_leads(cells, widths))[0]
    assert f"{PAPER} before DIDFuse" in said and not is_ours(said)


def test_audits_of_print_name_the_paper():
    """Findings, and the axes of their pictures."""
    cells = pd.DataFrame({"table": 2, "set": "s", "method": ["ours"] * 3 + ["a"] * 3,
                          "metric": ["x", "y", "mAP"] * 2, "value": [1.0, 2, 9, 1, 2, 1.5]})  # fmt: skip
    cells["printed"] = cells["value"].astype(str)
    found = audit_means(cells)
    assert list(found["method"]) == [PAPER, "a"] and list(found["status"]) == ["differs", "agrees"]
    others = [cells[:3].assign(method=f"m{i}", value=1.0 + i / 100) for i in range(6)]
    many = pd.concat([*others, cells[:3]])
    assert PAPER in set(audit_outliers(many)["method"])
    figure, (one, two) = plt.subplots(2)
    outlier_map(one, many.assign(table=1))
    missing_class_plot(two, found.assign(text="implied 1.0 ± 0.1"))
    for ax in (one, two):
        labels = [t.get_text() for t in ax.get_yticklabels()]
        assert PAPER in labels and not any(map(is_ours, labels))
    plt.close(figure)
