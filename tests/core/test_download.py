"""A download that is stopped by hand, and servers that ask for patience."""

import hashlib

import pytest
from sites import Site

from smfnet.core import download
from smfnet.core.checks import InputError
from smfnet.core.download import Published, fetch

pytest.importorskip("pooch")
CONTENT = bytes(range(256)) * 200


@pytest.fixture
def site():
    """A server of one file that can be continued."""
    s = Site(lambda path: CONTENT, continues=True)
    yield s
    s.server.shutdown()
    s.server.server_close()


def known(site, **changed):
    facts = dict(bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    return Published("file.bin", f"{site.url}/file.bin", **facts | changed)


def test_a_half_outlives_an_interruption(site, tmp_path, monkeypatch):
    """Control-C throws nothing away that was read, and the next call asks for the rest."""
    blocks = download._blocks

    def interrupted(answer):
        yield next(blocks(answer))
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(known(site), tmp_path)
    half = (tmp_path / "file.bin.part").stat().st_size
    assert half > 0 and not (tmp_path / "file.bin").exists()
    monkeypatch.setattr(download, "_blocks", blocks)
    assert fetch(known(site), tmp_path).read_bytes() == CONTENT and site.asked == [("file.bin", half)]


@pytest.mark.parametrize("proof", [{"bytes": None}, {"sha256": None, "blob": "x" * 40}, {"blob": "x" * 40}])
def test_every_proof_that_is_known_is_asked_for(site, tmp_path, proof):
    """A length may be unknown; a wrong checksum is never outvoted by the other facts."""
    if "blob" not in proof:
        assert fetch(known(site, **proof), tmp_path).read_bytes() == CONTENT
        site.mood = lambda path, visit: "corrupt"
        (tmp_path / "file.bin").unlink()
    with pytest.raises(InputError, match="not what the registry knows"):
        fetch(known(site, **proof), tmp_path, pause=0.01)
    assert not (tmp_path / "file.bin").exists()


def test_a_known_length_bounds_what_is_read(site, tmp_path):
    """A byte too many is refused before the end of the answer, as is a byte too few after it."""
    for size, reason in (
        (len(CONTENT) - 1, "sends more than"),
        (len(CONTENT) + 1, "not what the registry knows"),
    ):
        with pytest.raises(InputError, match=reason):
            fetch(known(site, bytes=size), tmp_path, pause=0.01)
        assert not list(tmp_path.iterdir())  # nor a half of something else


@pytest.mark.parametrize("attempts", [0, -1])
def test_no_attempt_is_no_success(site, tmp_path, attempts):
    with pytest.raises(InputError, match="allow at least one"):
        fetch(known(site), tmp_path, attempts=attempts)
    assert not site.visits


def test_pauses_grow(site, tmp_path, monkeypatch):
    """One between two attempts, none after the last."""
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    site.mood = lambda path, visit: 503
    with pytest.raises(InputError, match=r"503 .*\(4 attempts\)"):
        fetch(known(site), tmp_path, attempts=4, pause=5)
    assert pauses == [5, 10, 15]


@pytest.mark.parametrize("more", [0, 1, 9999])
def test_a_half_that_is_longer_than_the_file_costs_one_attempt(site, tmp_path, more):
    """The server refuses the rest of what has none (416); the half goes, and the file comes."""
    (tmp_path / "file.bin.part").write_bytes(bytes(len(CONTENT) + more))
    assert fetch(known(site), tmp_path, pause=0.01).read_bytes() == CONTENT
    assert site.asked == [("file.bin", len(CONTENT) + more)] and site.visits == {"file.bin": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
