"""Laws of the report: it shows every result, loads nothing, escapes everything, and comes again byte for byte."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from results_folder import COUNTS, HEALTHY, NO_LABELS, QUERIES, REPOSITORY, make_results

from dino.images import ImageTable
from pipelines import params, paths
from pipelines.evaluation.feature_file import read_features
from pipelines.pictures.gallery import Classes, choose_queries, neighbour_rows
from pipelines.stages import report

HOSTILE = ['<script>alert("x")</script>', "a&b $\\frac$ 'q'", "衣服 {{ 7 * 7 }} --> é"]
ADDRESSES = ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and text outside of styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._in_style = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.texts.append(data)

    @property
    def words(self) -> str:
        """The text, blanks folded; what stands in different elements is apart."""
        return " ".join(" ".join(self.texts).split())

    def addresses(self) -> list[str]:
        """Everything that a browser could load or follow."""
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in ADDRESSES]


def make_report(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the stage in this process, below root; its page."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("DINO_ROOT", str(root))
    report.main(params.load())
    return (root / "report/index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def source(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make_report(folder, monkeypatch)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_equal_results_give_equal_bytes(folder: Path, source: str, tmp_path: Path):
    """Another process, another folder, hash seed, time zone and language."""
    make_results(tmp_path)
    environment = os.environ | {
        "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C", "DINO_ROOT": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [sys.executable, "-m", "pipelines.stages.report"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert digests(tmp_path / "report") == digests(folder / "report")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_page_loads_nothing(page: Page, source: str):
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses())
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert "http://" not in source and "https://" not in source and "@import" not in source
    assert all(name.startswith("#") for name in re.findall(r"url\(\s*['\"]?([^)]*)", source))
    policy = [attributes for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy[0]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_nothing_of_this_machine_stands_in_it(folder: Path, source: str):
    shown = re.sub(r"data:image/png;base64,[\w+/=]+", "", source)
    for word in (str(folder), str(REPOSITORY), socket.gethostname(), str(Path.home()) + "/"):
        assert word not in shown


def test_ids_are_unique_and_every_reference_has_its_target(page: Page, source: str):
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    used = set(re.findall(r"url\(#([^)]+)\)", source))
    used |= {address[1:] for address in page.addresses() if address.startswith("#")}
    assert used <= set(ids) and len(used) > 10


def distinct_scores() -> dict[str, Any]:
    """Metrics of all evaluations, each score a number of its own, so that none stands on the page by chance."""
    shares = (number / 1000 for number in np.random.default_rng(0).permutation(np.arange(311, 989)).tolist())

    def interval(prefix: str = "") -> dict[str, float]:
        names = [f"{prefix}top1{end}" for end in ("_low", "", "_high")]
        return dict(zip(names, sorted(islice(shares, 3)), strict=True))

    return {
        name: {
            kind: interval("val_") | interval("test_") | {setting: 5}
            | {f"val_by_{setting}": {str(tried): interval() for tried in (5, 10, 20)}}
            for kind in ("trained", "untrained", "pixels")
        }
        for name, setting in (("knn", "k"), ("probe", "lr"), ("linear", "lr_at_256"))
    }  # fmt: skip


def floats(values: Mapping[str, Any]) -> list[float]:
    """Every float in a tree of dicts."""
    inner = [number for value in values.values() if isinstance(value, Mapping) for number in floats(value)]
    return inner + [value for value in values.values() if isinstance(value, float)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of hostile class names, a sick training, and scores that are all different."""
    health = HEALTHY | {
        "state": "one-hot collapse",
        "advice": "Raise <pretrain.teacher_temp>.",
        "finding": "Entropy 0.01 < 0.02.",
        "since_epoch": 1.25,
    }
    root = make_results(tmp_path_factory.mktemp("hostile"), names=HOSTILE, health=health, **distinct_scores())
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make_report(root, monkeypatch)


def test_every_score_stands_on_the_page(hostile: str):
    words = Page(hostile).words
    expected = [f"{100 * value:.1f}" for value in floats(distinct_scores())]
    assert len(set(expected)) == len(expected) == 3 * 3 * (2 + 3) * 3
    assert [number for number in expected if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", words)] == []


def test_a_sick_training_says_what_to_do(hostile: str):
    words = Page(hostile).words
    assert "training is not healthy (one-hot collapse). Raise <pretrain.teacher_temp>." in words
    assert "since epoch 1.2 of 2. Entropy 0.01 < 0.02. Raise" in words


def test_the_doctors_limits_are_drawn_into_the_curves(hostile: str):
    words = Page(hostile).words
    assert "Information of the teacher" in words
    for limit in HEALTHY["healthy_above"].values():
        assert f"collapsed: below {limit:.2g}" in hostile


def test_hostile_class_names_are_text(hostile: str):
    page = Page(hostile)
    assert "<script" not in hostile
    assert all(name in page.words for name in HOSTILE)
    for tag in ("svg", "g", "text", "div", "figure", "section", "td", "li"):
        closed_itself = len(re.findall(rf"<{tag}\b[^>]*/>", hostile))
        assert len(re.findall(rf"<{tag}\b", hostile)) == len(re.findall(rf"</{tag}>", hostile)) + closed_itself > 0


def test_verdict_first_then_everything_else(page: Page, folder: Path):
    sentence = (
        "By k-NN and by probe the trained backbone beats the untrained network and raw pixels; by linear evaluation it "
        "beats the untrained network; "
    )
    words = page.words
    assert words.index(sentence + "training is healthy.") < words.index("Nearest neighbours")
    for word in (
        "weighted k-NN, temperature 0.07", "k = 10", "damping = 0.25, lr = 0.3", "diverged lr 30 damping 1",
        "12,345 images seen", "60 images", "duplicates within train 3", "12 to 18, median 12", "teacher_temp_start",
        "0123456789abcdef", "d41d8cd98f00b204e9800998ecf8427e", "uniform", "0.286",
    ):  # fmt: skip
        assert word in words, word
    assert "in test too" not in words  # none of these
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    pixels = {name: (folder / f"plots/{name}.png").read_bytes() for name in ("samples", "crops")}
    assert sum(attributes["src"] == report.data_uri(data) for attributes in pictures for data in pixels.values()) == 2
    assert all(attributes["alt"] for attributes in pictures)


def test_the_counts_are_those_of_the_images(page: Page):
    neighbours = [attributes.get("class", "") for tag, attributes in page.tags if tag == "figure"]
    wrong = neighbours.count("picture wrong")
    found = re.search(r"(\d+) of these (\d+) neighbours share", page.words)
    assert found and (int(found[1]), int(found[2])) == (6 * QUERIES - wrong, 6 * QUERIES) and wrong > 0
    assert page.words.count("✗") == wrong


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of images without labels, made over an older one with."""
    root = make_results(tmp_path_factory.mktemp("unlabelled"), labelled=False)
    (root / "report").mkdir()
    (root / "report/confusion.png").write_bytes(b"from an older report")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_report(root, monkeypatch)
    return root


def test_without_labels_the_parts_that_need_them_are_left_out_with_a_word(unlabelled: Path):
    page = Page((unlabelled / "report/index.html").read_text(encoding="utf-8"))
    pictures = {"scores.png", "curves.png", "neighbours.png", "attention.png"}  # scores.png says why there are none
    assert set(digests(unlabelled / "report")) == {"index.html", *pictures}
    assert "Without labels the trained backbone has no score; training is healthy." in page.words
    assert page.words.count(f"Left out: {NO_LABELS['skipped']}.") == 3
    assert "no labels" in page.words and "Errors" not in page.words and "✗" not in page.words
    assert sum(tag == "img" for tag, _ in page.tags) > QUERIES * 7  # neighbours and attention are there


def test_pngs_hold_pixels_and_nothing_else(folder: Path, source: str):
    files = sorted((folder / "report").glob("*.png"))
    assert [path.stem for path in files] == ["attention", "confusion", "curves", "neighbours", "scores"]
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert set(image.info) <= {"dpi"} and min(image.size) > 200
            assert len(np.unique(np.asarray(image.convert("L")))) > 30


def test_dark_and_light_differ_in_every_colour(page: Page, source: str):
    assert set(report.LIGHT) == set(report.DARK)
    assert not set(report.LIGHT.values()) & set(report.DARK.values())
    drawn = source[source.index("<body") :]
    assert not [value for value in report.LIGHT.values() if value in drawn]  # all by name, so that dark replaces them
    assert "var(--trained)" in drawn and "prefers-color-scheme: dark" in source


@pytest.mark.parametrize("theme", [report.LIGHT, report.DARK])
def test_text_has_contrast(theme: dict[str, str]):
    """4.5 to 1 as WCAG 2 asks of text; 3 to 1 of marks."""
    for name, least in {"ink": 7, "muted": 4.5, "trained": 4.5, "untrained": 4.0, "pixels": 3}.items():
        light, dark = sorted((luminance(theme[name]), luminance(theme["paper"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, name


def luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_neighbours_are_the_nearest_under_their_own_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    classes, features = Classes.read(), read_features("trained")
    rows = {split: np.flatnonzero(features.splits == split) for split in ("train", "test")}
    queries = [3, 0, 14]
    for query, shown in zip(queries, neighbour_rows(classes, queries, 4), strict=True):
        asked = features.rows_ND[rows["test"][query]]
        cosines = [float(asked @ features.rows_ND[row] / features.rows_ND[row].norm()) for row in rows["train"]]
        nearest = sorted(range(len(cosines)), key=lambda place: -cosines[place])[:4]
        own = classes.of["test", features.ids[rows["test"][query]]]
        names = [classes.of["train", features.ids[rows["train"][place]]] for place in nearest]
        assert [picture.caption for picture in shown] == [own, *names]
        assert [picture.right for picture in shown] == [None, *(name == own for name in names)]
        for picture, place in zip(shown[1:], nearest, strict=True):
            stored = ImageTable(paths.TRAIN_IMAGES).batch([place])
            height, width = stored.sizes_B2[0].tolist()
            times = 112 // max(height, width)
            assert picture.pixels.shape == (times * height, times * width, 3)
            assert np.array_equal(picture.pixels[::times, ::times, 0], stored.pixels_BCHW[0, 0, :height, :width])


def test_queries_take_the_classes_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    classes = Classes.read()
    rows = choose_queries(classes, 7)
    ids = ImageTable(paths.TEST_IMAGES).ids
    names = [classes.of["test", ids[row]] for row in rows]
    assert names == ["bag", "coat", "shoe", "bag", "coat", "shoe", "bag"]
    for name in classes.names:
        of_class = [row for row, image_id in enumerate(ids) if classes.of["test", image_id] == name]
        assert [row for row, found in zip(rows, names, strict=True) if found == name] == of_class[: names.count(name)]
    assert sorted(choose_queries(classes, 999)) == list(range(3 * COUNTS["test"]))
    unlabelled = Classes([], {})
    assert choose_queries(unlabelled, 3) == [0, 7, 14]
    assert choose_queries(unlabelled, 999) == list(range(15))


def test_the_snapshots_are_drawn_told_and_listed(page: Page, source: str):
    section = source[source.index('<section id="snapshots">') :]
    section = section[: section.index("</section>")]
    words = Page(section).words
    assert "k-NN on val went from 60.0 % (epoch 1) to 70.0 % (epoch 2), the highest." in words
    assert "k-NN of the teacher while training" in words and "teacher: epoch 2" in section
    assert section.count("<svg") == 2
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]]
    assert rows == [["1", "20", "60.0", "(50.0\u201370.0)", "4.0", "0.1"],
                    ["2", "(teacher)", "40", "70.0", "(60.0\u201380.0)", "5.0", "0.2"]]  # fmt: skip


def test_snapshots_without_labels_show_directions_only(unlabelled: Path):
    source = (unlabelled / "report/index.html").read_text(encoding="utf-8")
    section = source[source.index('<section id="snapshots">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 1 and "Directions in use (RankMe), on val" in section
    assert NO_LABELS["skipped"] in section and "k-NN of the teacher" not in section
