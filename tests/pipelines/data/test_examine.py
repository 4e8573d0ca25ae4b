"""One look at every image: exact sums, shrinking, broken files, the same from any number of threads."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from dino.decode import content_id, extension, open_image
from pipelines.data import examine as module
from pipelines.data.examine import Examined, Limits, examine, look
from pipelines.data.imageset import Entry, ImageSet
from pipelines.data.png import encode_png


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def image_set(data: list[bytes]) -> ImageSet:
    return ImageSet([Entry(f"{i}", "train", None) for i in range(len(data))], None, data.__getitem__, False, "")


Look = Callable[..., Examined]


@pytest.fixture
def look_at_all() -> Iterator[Look]:
    with contextlib.ExitStack() as files:

        def look_at_all(data: list[bytes], max_short_px: int = 512, aspect: float = 10.0) -> Examined:
            spool = files.enter_context(tempfile.TemporaryFile(buffering=0))
            return examine(
                image_set(data), limits=Limits(max_short_px, 10**6, aspect), spool=spool, advance=lambda more: None
            )

        yield look_at_all


def test_mean_and_std_are_those_of_all_pixels(look_at_all: Look) -> None:
    pixels = [noise(9, 7, 3), noise(20, 5, 3, seed=1) // 2, noise(4, 4, seed=2)]
    examined = look_at_all([encode_png(p) for p in pixels])
    mean, std = examined.mean_std([0, 1, 2], channels=3)
    colour = [p if p.ndim == 3 else np.stack([p] * 3, axis=2) for p in pixels]
    every_pixel = np.concatenate([p.reshape(-1, 3) for p in colour]).astype(np.float64) / 255
    np.testing.assert_allclose(mean, every_pixel.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(std, every_pixel.std(axis=0), rtol=1e-12)
    mean, std = examined.mean_std([2], channels=1)
    np.testing.assert_allclose([*mean, *std], [(pixels[2] / 255).mean(), (pixels[2] / 255).std()], rtol=1e-12)
    assert examined.mean_std([0, 1, 2], 3) == examined.mean_std([2, 0, 1], 3), "exact, hence in any order"


def test_one_flat_colour_has_a_std_to_divide_by(look_at_all: Look) -> None:
    examined = look_at_all([encode_png(np.full((5, 5), 7, np.uint8))])
    assert examined.mean_std([0], 1) == ([7 / 255], [1 / 255])


def test_large_images_are_shrunk_to_the_short_side(look_at_all: Look) -> None:
    smooth = np.linspace(0, 255, 120 * 90).reshape(90, 120).astype(np.uint8)
    data = [
        encode(smooth, "JPEG", quality=99),
        encode(np.stack([smooth] * 3, 2), "PNG"),
        encode(smooth.T.copy(), "BMP"),
        encode(np.stack([smooth] * 3, 2), "WEBP"),
        encode(smooth[:30], "PNG"),
        encode(smooth[:31], "PNG"),
    ]
    examined = look_at_all(data, max_short_px=30)
    stored = [examined.read(row) for row in range(6)]
    assert [extension(image) for image in stored] == [".jpg", ".png", ".png", ".jpg", ".png", ".png"]
    assert examined.sizes_N2.tolist() == [[30, 40], [30, 40], [40, 30], [30, 40], [30, 120], [30, 116]]
    assert examined.shrunk == 5 and stored[4] == data[4]
    for row, image in enumerate(stored):
        pixels = np.asarray(open_image(image)).astype(float)
        assert list(pixels.shape[:2]) == examined.sizes_N2[row].tolist()
        assert examined.ids[row] == content_id(image)
        assert abs(pixels.mean() - (127 if row < 4 else 42)) < 4
    assert stored == [look_at_all(data, max_short_px=30).read(row) for row in range(6)]


def test_a_shrunk_image_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    facts = look(encode(noise(60, 90), "JPEG", exif=exif), Limits(20, 10**6, 10.0))
    assert (facts.height, facts.width) == (30, 20)
    assert facts.shrunk is not None
    assert open_image(facts.shrunk).size == (20, 30)


def test_broken_images_are_reported_and_do_not_stop_the_others(look_at_all: Look) -> None:
    good = encode_png(noise(8, 8))
    examined = look_at_all([good, b"", good[:-40], b"no image", good])
    assert examined.broken.keys() == {1, 2, 3}
    assert "not an image" in examined.broken[3] and "not readable" in examined.broken[2]
    assert examined.read(4) == good


def test_absurd_images_are_left_out_with_the_reason(look_at_all: Look) -> None:
    data = [encode_png(noise(*size)) for size in ((8, 80), (8, 81), (81, 8), (1001, 1000))]
    examined = look_at_all(data, max_short_px=16)
    assert list(examined.broken) == [1, 2, 3]
    assert examined.broken[1].startswith("81 x 8 pixels: longer than data.max_aspect (10) times its short side; cut")
    assert examined.broken[2].startswith("8 x 81 pixels: longer than ")
    assert examined.broken[3].startswith("1,000 x 1,001 pixels: more than data.max_pixels (1,000,000); raise that")


def test_any_number_of_threads_gives_the_same(look_at_all: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [encode_png(noise(24, 20 + i % 9, 3, seed=i)) for i in range(500)]
    for row in range(7, 500, 40):
        data[row] = b"broken"
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(module, "_threads", lambda images, threads=threads: threads)
        examined = look_at_all(data, max_short_px=22)
        rows = [row for row in range(500) if row not in examined.broken]
        stored = [examined.read(row) for row in rows]
        results.append((examined.ids, list(examined.broken.items()), examined.mean_std(rows, 3), stored))
    assert results[0] == results[1] == results[2]


def test_memory_is_bounded_no_thread_runs_far_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for item, square in module._map_in_order(lambda x: x * x, items(), threads=3):
        assert square == item * item
        assert len(taken) <= item + 8


def test_threads_where_images_are_large_only() -> None:
    assert module._threads(image_set([encode_png(noise(28, 28))] * 3)) == 1
    assert module._threads(image_set([encode_png(noise(128, 128))] * 3)) > 1


def test_a_file_that_changes_meanwhile_is_an_error(look_at_all: Look) -> None:
    data = [encode_png(noise(8, 8))]
    examined = look_at_all(data)
    data[0] = encode_png(noise(8, 8, seed=1))
    with pytest.raises(ValueError, match="0 changed while it was read; run the stage again"):
        examined.read(0)
