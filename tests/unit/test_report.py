"""The quicklook's pictures and the report page: right places, right colours, nothing smuggled."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import shapely
from PIL import Image

from adapters.polygon_area import PolygonArea
from pipeline.domain import ImageInfo, Region, TileKey
from pipeline.ports import Block, Record
from workflows.quicklook import quicklook
from workflows.report import write_report

COLORS = {0: "#000000", 1: "#ff0000", 2: "#0000ff"}


class Scene:
    """A source and a mask in one, that remembers what was read."""

    def __init__(self, image_CS: np.ndarray, *, channels: tuple[str, ...], spacing=None) -> None:
        shape = image_CS.shape[1:]
        self.image_CS, self.largest, self.reads = image_CS, 0, 0
        self.info = ImageInfo(
            shape=shape,
            axes=("z", "y", "x")[-len(shape) :],
            channels=channels,
            dtype=image_CS.dtype.name,
            nodata=(None,) * len(channels),
            spacing=spacing or (1.0,) * len(shape),
            unit="mm" if len(shape) == 3 else "m",
        )

    def read(self, region: Region) -> Block:
        self.largest, self.reads = max(self.largest, region.size), self.reads + 1
        index = region.slices(within=Region.whole(self.info.shape))
        part = self.image_CS[(slice(None), *index)]
        return Block(part, np.isfinite(part).all(axis=0))

    def digest(self) -> str:
        return ""


class Mask:
    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def write(self, region: Region, array: np.ndarray) -> str:
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        return self.labels[region.slices(within=Region.whole(self.labels.shape))]


def looked_at(scene: Scene, labels: np.ndarray, **options: object) -> dict[str, np.ndarray]:
    pictures = quicklook(scene, Mask(labels), colors=COLORS, nodata=255, **options)
    return {name: np.asarray(picture) for name, picture in pictures.items()}


def test_bands_are_shown_by_their_names_and_not_by_their_order():
    """Blue first, as most satellites store it, would paint vegetation and soil wrongly."""
    image = np.zeros((4, 8, 8), np.uint16)
    image[2, :4], image[0, 4:] = 1000, 1000
    scene = Scene(image, channels=("Blue", "Green", "Red", "NIR"))
    picture = looked_at(scene, np.zeros((8, 8), np.uint8))["image"]
    assert picture[0, 0].tolist() == [255, 0, 0, 255]
    assert picture[7, 0].tolist() == [0, 0, 255, 255]


def test_of_an_area_only_what_lies_near_is_shown_and_read():
    """A field in a scene of a terabyte would be a dot, and its picture take a night."""
    image = np.ones((1, 4000, 5000), np.uint16)
    scene, labels = Scene(image, channels=("1",)), np.full((4000, 5000), 255, np.uint8)
    labels[1000:1100, 2000:2050], labels[3000:3100, 4000:4100] = 1, 1
    fields = (shapely.box(2000, 1000, 2050, 1100), shapely.box(4000, 3000, 4100, 3100))
    area = PolygonArea(tuple(map(shapely.to_wkb, fields)), labels.shape, "")
    pictures = looked_at(scene, labels, area=area)
    assert scene.reads <= 6  # windows of 512 px
    height, width = pictures["mask"].shape[:2]
    assert (height, width) == (768, 768)  # of 2560 px
    assert 0 < (pictures["mask"][..., 3] > 0).sum() < 0.02 * height * width
    assert 0 < (pictures["image"][..., 3] > 0).mean() < 0.3


def test_mask_and_overlay_leave_out_nodata_and_background():
    """Nodata painted as a class is a lie; background laid over the image hides it."""
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    image[0, 0, 0] = np.nan
    labels = np.zeros((8, 8), np.uint8)
    labels[0, 0], labels[7, 7], labels[4, 4] = 255, 1, 77
    pictures = looked_at(Scene(image, channels=("1",)), labels)
    assert pictures["image"][0, 0, 3] == pictures["mask"][0, 0, 3] == 0
    assert pictures["mask"][7, 7].tolist() == [255, 0, 0, 255]
    assert pictures["mask"][4, 4, 3] == 0
    red, green, blue, alpha = pictures["overlay"][7, 7].tolist()
    assert (alpha, red > green == blue) == (255, True)
    assert np.array_equal(pictures["overlay"][3], pictures["image"][3])


def test_a_scene_with_no_valid_pixel_is_an_empty_picture():
    """An all-nodata scene is a legal input; percentiles of nothing are not."""
    scene = Scene(np.full((1, 5, 5), np.nan, np.float32), channels=("1",))
    pictures = looked_at(scene, np.full((5, 5), 255, np.uint8))
    assert all(not picture.any() for picture in pictures.values())


@pytest.mark.parametrize("shape", [(1, 3000), (1500, 700), (1037, 1411)])
def test_large_scenes_are_read_in_windows_and_sampled_in_place(shape):
    """The whole scene in memory is what this tool exists to avoid; a slip shifts the picture."""
    rows, columns = np.indices(shape)
    scene = Scene(np.stack([rows, columns, rows]).astype(np.float64), channels=("1", "2", "3"))
    labels = (columns >= shape[1] // 2).astype(np.uint8)
    pictures = looked_at(scene, labels, max_side=100)
    assert max(pictures["mask"].shape[:2]) == 100
    assert scene.largest <= 512 * 512
    red = pictures["mask"][..., 0] > 0
    assert red.any(axis=0).tolist() == [False] * (red.shape[1] // 2) + [True] * (
        red.shape[1] - red.shape[1] // 2
    )
    assert (np.diff(pictures["image"][0, :, 1].astype(int)) >= 0).all()


def test_the_number_of_reads_is_bounded_for_any_scene(monkeypatch):
    """A picture of a 100,000 px scene must not decode every block of it."""
    monkeypatch.setattr("workflows.quicklook.WINDOW", 8)
    monkeypatch.setattr("workflows.quicklook.MAX_WINDOWS", 100)
    scene = Scene(np.indices((640, 640)).astype(np.float32), channels=("1", "2"))
    picture = looked_at(scene, np.zeros((640, 640), np.uint8), max_side=320)["image"]
    assert scene.reads <= 100
    assert picture.shape == (320, 320, 4)


def test_a_volume_shows_three_planes_with_head_and_front_up_at_one_scale():
    """A plane upside down, or stretched by thick slices, misleads whoever glances at it."""
    labels = np.zeros((10, 40, 30), np.uint8)
    labels[5, 30:, :10] = 1
    labels[8:, 20, :] = 2
    scene = Scene(np.ones((1, 10, 40, 30), np.int16), channels=("1",), spacing=(4.0, 1.0, 1.0))
    mask = looked_at(scene, labels, max_side=112)["mask"]
    assert mask.shape[:2] == (40, 112)
    axial, coronal, sagittal = mask[:, :30], mask[:, 36:66], mask[:, 72:]
    assert axial[0, 0].tolist() == [255, 0, 0, 255]
    assert axial[39, 0].tolist() == [0, 0, 0, 255]
    assert (coronal[:8, :, 2] == 255).all()
    assert not coronal[8:16, :, 2].any()
    assert sagittal.shape == (40, 40, 4)
    assert (sagittal[:8, 20, 2] == 255).all()
    assert not mask[:, 30:36].any()


MANIFEST = {
    "status": "partial",
    "output": "/somewhere/<b>mask</b>.tif",
    "fingerprint": "f" * 64,
    "model": {"name": "<script>alert(1)</script>", "version": 3, "digest": "d" * 64},
    "source": {"uri": "/in/scene.tif", "crs": "PROJCRS[" + "x" * 500, "shape": (10, 20)},
    "tiles": {"total": 4, "done": 3, "failed": 1, "skipped": 1},
    "classes": [
        {"id": 0, "name": 'a"><img src=x>', "color": "#00ff00", "pixels": 750, "area_m2": 75e3},
        {"id": 2, "name": "crop & co", "color": "#0000ff", "pixels": 250, "area_m2": 25e3},
    ],
    "nodata_pixels": 40,
    "halo": {"before": (64, 64), "after": (60, 60), "window": None, "exact": True},
    "halo_work_ratio": 1.2345,
    "tile": (256, 256),
    "crf": None,
    "seam": {
        "windows": 2,
        "pixels": 8192,
        "max_abs_logit": 1.5e-6,
        "max_deviations": 3e-6,
        "label_disagreement": 0.125,
        "label_disagreement_upper_95": 0.25,
        "interior": {
            "windows": 2,
            "pixels": 4096,
            "max_abs_logit": 7e-7,
            "label_disagreement": 0.0,
        },
        "exact": False,
        "passed": False,
        "reason": "logits <far> away",
    },
    "seconds": 12.34,
    "peak_memory_bytes": 3 << 20,
    "stages": {
        "read": {"busy_s": 3.0, "waited_s": {"compute": 17.0}, "busy_share": 0.15},
        "compute": {"busy_s": 18.5, "waited_s": {"read": 0.3, "model": 1.2}, "busy_share": 0.925},
        "write": {"busy_s": 1.0, "waited_s": {"read": 0.01}, "busy_share": 0.9901},
    },
    "notes": ("no CRS",),
    "failed_tiles": [{"tile": 7, "error": "disk <full>", "deaths": 3}],
}


def record(number: int, **changes: object) -> Record:
    seconds = {"read": 0.1, "compute": 1.0 * number, "write": 0.2}
    values = {"key": TileKey("c", "segment", number), "status": "done", "seconds": seconds}
    return Record(**(values | changes))


class Tags(HTMLParser):
    """Checks that every tag that opens is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path) -> str:
    records = [record(1), record(2), record(3), record(4, skipped=True)]
    pictures = {"image": Image.new("RGBA", (4, 3)), "mask": Image.new("RGBA", (4, 3))}
    for name in ("a.html", "b.html"):
        write_report(
            tmp_path / name,
            manifest=MANIFEST,
            pictures=pictures,
            seams={"worst": Image.new("RGBA", (9, 3))},
            records=records,
        )
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    return (tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_is_well_formed(page):
    """It is mailed and archived: a picture or style elsewhere would be gone."""
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    sources = [attrs["src"] for tag, attrs in tags.seen if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"link", "script", "iframe"} & {tag for tag, _ in tags.seen}
    assert "http" not in page


def test_names_from_outside_are_text_and_never_markup(page):
    """A class or file name may come from anybody; a report is opened in a browser."""
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;b&gt;mask&lt;/b&gt;.tif" in page
    assert "crop &amp; co" in page
    assert "disk &lt;full&gt;" in page


def test_the_page_says_what_was_done_and_what_was_not(page):
    """Areas, failures, CRF off and a seam that shows are the honest part of a result."""
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<main>") :]))
    for said in (
        "partial", "3 of 4 tiles, 1 failed", "no CRS", "tile 7 failed", "750 75.00% 7.50",
        "nodata 40", "CRF off", "FAILED: logits &lt;far&gt; away",
        "astride tile borders within tiles windows 2 2 pixels 8,192 4,096",
        "logits apart, at most 1.5e-06 7e-07 labels that differ 12.500% 0.000%",
        "1.23 times that of one pass", "3 MiB",
        "compute 2.000 2.900 6.0", "all 3", "the reader 15% 3.0 the device 17.0",
        "the device 92% 18.5 the model to load 1.2, the reader 0.3", "the writer 99% 1.0 nothing",
    ):  # fmt: skip
        assert said in text, said


def test_sizes_fit_what_was_measured(tmp_path):
    """Hectares of a brain, or millions of hectares of a country, cannot be read."""

    def sizes(**row: float) -> str:
        classes = [{"id": 1, "name": "n", "color": "#000000", "pixels": 1} | row]
        path = tmp_path / "r.html"
        write_report(path, manifest={"classes": classes}, pictures={}, seams={}, records=[])
        return path.read_text(encoding="utf-8")

    assert '"n">ml<' in (volume := sizes(volume_ml=1234.5))
    assert "1,234.50" in volume
    assert '"n">km²<' in sizes(area_m2=2e7)
    assert '"n">ha<' in sizes(area_m2=2e6)
    assert "unknown" in sizes()
    assert "No tile was computed" in sizes()
