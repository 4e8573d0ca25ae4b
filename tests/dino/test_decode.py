"""One decoder for every format: upright, 8 bits, grey or RGB; and an error for what is no whole image."""

import io

import numpy as np
import pytest
from PIL import Image

from dino.decode import content_id, decode_image, extension, open_image

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("MPO", ".jpg"),  # what many phones write
        ("WEBP", ".webp"),
        ("BMP", ".bmp"),
        ("TIFF", ".tiff"),
        ("GIF", ".gif"),
    ],
)
def test_every_format_in_grey_and_in_colour(form: str, name: str) -> None:
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2).repeat(4, 0).repeat(4, 1)
    tolerance = {"JPEG": 40, "MPO": 40, "WEBP": 60, "GIF": 40}.get(form, 0)  # lossy colour, or a palette
    for pixels, channels in ((colour[..., 0], 1), (colour, 3)):
        data = encode(np.ascontiguousarray(pixels), form)
        assert extension(data) == name
        expected = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        found = decode_image(data, channels)
        assert found.dtype == np.uint8 and found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= tolerance
        if form != "WEBP":  # which has no grey mode
            assert open_image(data).mode == ("L" if channels == 1 else "RGB")


def test_grey_in_three_channels_and_colour_in_one() -> None:
    np.testing.assert_array_equal(decode_image(encode(RAMP), 3), np.stack([RAMP] * 3))
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_array_equal(decode_image(encode(red), 1), np.full((1, 2, 2), 76))  # ITU-R 601 luma


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    upright = RAMP.repeat(8, 0).repeat(8, 1)
    stored = {  # how a camera that turns the upright picture like this stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(stored), form, exif=exif)
    found = decode_image(data, 1)[0].astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (8 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_full_range(form: str) -> None:
    data = encode(RAMP.astype(np.uint16) * 257, form)
    assert open_image(data).mode == "L"
    np.testing.assert_array_equal(decode_image(data, 1)[0], RAMP)


def test_float_grey_in_0_1_is_scaled_and_other_floats_are_refused() -> None:
    data = encode((RAMP / 255).astype(np.float32), "TIFF")
    np.testing.assert_array_equal(decode_image(data, 1)[0], RAMP)
    for bad in (RAMP.astype(np.float32), np.full((2, 2), np.nan, np.float32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(ValueError, match="values from"):
            decode_image(encode(bad, "TIFF"), 1)


def test_transparency_is_laid_on_white() -> None:
    black_half_seen = np.zeros((2, 2, 4), np.uint8)
    black_half_seen[0, :, 3] = 255
    expected = np.array([[0, 0], [255, 255]])
    assert (decode_image(encode(black_half_seen), 3) == expected).all()
    grey = np.ascontiguousarray(black_half_seen[..., 2:])
    assert open_image(encode(Image.fromarray(grey, "LA"))).mode == "L"
    assert (decode_image(encode(Image.fromarray(grey, "LA")), 1) == expected).all()
    palette = Image.fromarray(black_half_seen).quantize(2)
    assert (decode_image(encode(palette), 3) == expected).all()
    index = Image.fromarray(np.array([[0, 0], [7, 7]], np.uint8))
    assert (decode_image(encode(index, transparency=7), 1) == expected).all()


def test_one_bit_palette_and_cmyk() -> None:
    bits = Image.fromarray(RAMP > 100)
    assert open_image(encode(bits)).mode == "L"
    np.testing.assert_array_equal(decode_image(encode(bits), 1)[0], (RAMP > 100) * 255)
    colour = Image.fromarray(np.stack([RAMP, 255 - RAMP, RAMP // 2], 2))
    np.testing.assert_array_equal(decode_image(encode(colour.quantize(24)), 3), np.asarray(colour).transpose(2, 0, 1))
    assert decode_image(encode(colour.convert("CMYK"), "TIFF"), 3).shape == (3, 4, 6)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(np.full((3, 3), value, np.uint8)) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data, 1), np.full((1, 3, 3), 10))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_file_is_an_error_never_a_half_grey_picture(form: str) -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), form)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"not (readable as )?an image"):
            decode_image(data[: int(len(data) * share)], 3)


FORMS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]


@pytest.mark.parametrize("form", FORMS)
def test_too_many_pixels_are_refused_by_the_header_alone(form: str) -> None:
    data = encode(np.zeros((40, 50), np.uint8), form)
    assert decode_image(data, 1, max_pixels=2000).shape == (1, 40, 50)
    cut = data[: len(data) - 20]  # without a whole body, which nobody looks at; libwebp opens whole files only
    for file in (data, cut) if form != "WEBP" else (data,):
        with pytest.raises(ValueError, match=r"^50 x 40 pixels: more than data\.max_pixels \(1,999\); raise that"):
            decode_image(file, 1, max_pixels=1999)


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_a_bomb_costs_nothing(side: int) -> None:
    """A PNG of some hundred bytes whose header claims up to 3,600 million pixels; Pillow warns or refuses by itself."""
    import resource
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**5))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"more than data\.max_pixels \(80,000,000\)"):
        decode_image(data, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB; decoded: 400,000 and more


def test_pillows_own_limit_is_the_one_that_params_know() -> None:
    from pipelines.params import PILLOWS_MAX_PIXELS

    assert Image.MAX_IMAGE_PIXELS is not None
    assert PILLOWS_MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_what_is_no_image_is_an_error() -> None:
    for data in (b"", b"<html>404</html>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(ValueError, match="not an image"):
            decode_image(data, 3)


def test_only_formats_that_every_installation_of_pillow_reads_alike() -> None:
    """Others may start foreign programs (EPS), or are read in some builds only."""
    for form in ("PPM", "TGA", "ICO"):
        with pytest.raises(ValueError, match="not an image"):
            decode_image(encode(np.zeros((16, 16, 3), np.uint8), form), 3)


def test_identity_is_the_content() -> None:
    assert content_id(b"") == "d41d8cd98f00b204"
    assert content_id(b"a") != content_id(b"b")
