"""Decoding of image files of all kinds to RGB, and errors for broken ones."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pytest

from diffusers_prx.data.images import (
    NO_FILES,
    AllowedFiles,
    UnreadableSample,
    image_endings,
    image_hash,
    image_size,
    image_value,
    read_image,
)
from image_files import encode, noise

RED = (250, 10, 20)


def two_halves(left: tuple, right: tuple, mode: str) -> PIL.Image.Image:
    image = PIL.Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


HALF = two_halves((0, 0, 0, 0), (*RED, 255), "RGBA")  # the left half is transparent, and black below that
GREY = HALF.convert("L").getpixel((6, 2))
PALETTE = PIL.Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 255, 0, *RED])
PALETTE.paste(0, (0, 0, 4, 8))


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encode(HALF, "png"), (255, 255, 255), RED),
        (encode(HALF.convert("LA"), "png"), (255, 255, 255), (GREY,) * 3),
        (encode(PALETTE, "png", transparency=0), (255, 255, 255), RED),
        (encode(PALETTE, "gif"), (0, 255, 0), RED),
        (encode(PIL.Image.new("L", (8, 8), 77), "png"), (77,) * 3, (77,) * 3),
        (encode(PIL.Image.new("1", (8, 8), 1), "png"), (255,) * 3, (255,) * 3),
        (encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"), (255, 0, 0), (255, 0, 0)),
        (encode(PIL.Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16)), "png"), (128,) * 3, (128,) * 3),
        (encode(PIL.Image.new("RGB", (8, 8), RED), "webp", lossless=True), RED, RED),
    ],
    ids=["rgba", "grey_alpha", "palette_transparent", "palette", "grey", "one_bit", "cmyk", "16_bit", "webp"],
)
def test_image_modes_are_converted_to_rgb(data, left, right):
    found = read_image(data)
    assert found.mode == "RGB"
    for x, color in ((2, left), (6, right)):
        assert np.abs(np.subtract(found.getpixel((x, 2)), color)).max() <= 3


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_used(kind):
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2
    assert np.abs(np.subtract(read_image(data).getpixel((3, 3)), RED)).max() <= 2


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    upright = PIL.Image.new("RGB", (24, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 8, 8))  # a white corner at the upper left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose from the upright to the stored image
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "jpeg" else {}))
    assert np.abs(np.asarray(read_image(data)).astype(int) - np.asarray(upright)).max() <= 3
    assert image_size(data) == (24, 16)


def number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc_profile(red: tuple, green: tuple, blue: tuple) -> bytes:
    """An ICC profile with the primaries in XYZ (D50) and the curve of sRGB."""
    curve = b"para\0\0\0\0\0\3\0\0" + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    tags = {name: xyz(value) for name, value in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}
    return write_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def xyz(values: tuple) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(number, values))


def write_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2.4 for displays, written by its specification."""
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    tags |= {b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    header = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(table + body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    return (header + b"".join(map(number, (0.9642, 1, 0.8249)))).ljust(128, b"\0") + table + body


DISPLAY_P3 = icc_profile((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "avif"])
def test_colors_of_an_icc_profile_are_converted(kind):
    if kind == "avif" and not PIL.features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF; 11.3 and newer can")
    options = {"lossless": True} if kind == "webp" else {"quality": 100, "subsampling": 0} if kind == "jpeg" else {}
    stored = PIL.Image.new("RGB", (16, 16), (230, 60, 40))
    found = read_image(encode(stored, kind, icc_profile=DISPLAY_P3, **options))
    assert np.abs(np.subtract(found.getpixel((3, 3)), (250, 31, 14))).max() <= (1 if kind in ("png", "tiff") else 4)


def test_colors_of_transparent_and_palette_images_are_converted():
    palette = PIL.Image.new("P", (8, 8), 1)
    palette.putpalette([0, 255, 0, 230, 60, 40])
    palette.paste(0, (0, 0, 4, 8))
    rgba = two_halves((230, 60, 40, 0), (230, 60, 40, 255), "RGBA")
    half = two_halves((230, 60, 40, 255), (230, 60, 40, 128), "RGBA")
    for image, options in ((palette, {"transparency": 0}), (rgba, {}), (half, {})):
        found = read_image(encode(image, "png", icc_profile=DISPLAY_P3, **options))
        left, right = found.getpixel((1, 1)), found.getpixel((6, 6))
        assert left == ((250, 31, 14) if image is half else (255, 255, 255))
        assert right == ((252, 143, 134) if image is half else (250, 31, 14))


def test_gray_profiles_are_converted():
    linear = write_profile(b"GRAY", {b"kTRC": b"curv" + b"\0" * 8})
    shown = (149, 149, 149)  # 255 (1.055 (77 / 255)^(1 / 2.4) - 0.055)
    deep = PIL.Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16))
    for image in (PIL.Image.new("L", (8, 8), 77), PIL.Image.new("LA", (8, 8), (77, 255)), deep):
        assert read_image(encode(image, "png", icc_profile=linear)).getpixel((1, 1)) == shown
        other = read_image(encode(image, "png", icc_profile=DISPLAY_P3))  # of another color model
        assert other.getpixel((1, 1)) == (77, 77, 77)


def test_srgb_and_broken_profiles_change_no_pixel():
    image = NOISE
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    own = icc_profile((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
    for profile in (srgb, own, b"", b"no profile" * 30, DISPLAY_P3[:200], DISPLAY_P3[:-200]):
        assert read_image(encode(image, "png", icc_profile=profile)).tobytes() == image.tobytes()


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ["zip", "text", "itxt"])
def test_a_png_with_more_text_than_pillow_allows_is_read(kind, behind):
    texts = PIL.PngImagePlugin.PngInfo()
    for number in range(1 if kind == "zip" else 70):
        if kind == "itxt":
            texts.add_itxt(f"workflow {number}", "x" * 1_000_000, zip=True)
        else:
            texts.add_text(f"workflow {number}", "x" * 1_500_000, zip=kind == "zip")
    image = NOISE.resize((24, 16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "png", pnginfo=texts, exif=exif)
    if behind:
        chunks, offset = [], 8
        while offset < len(data):
            chunks.append(data[offset : offset + 12 + int.from_bytes(data[offset : offset + 4], "big")])
            offset += len(chunks[-1])
        text = [chunk for chunk in chunks if chunk[4:8] in (b"tEXt", b"zTXt", b"iTXt")]
        data = data[:8] + b"".join([chunk for chunk in chunks[:-1] if chunk not in text] + text + chunks[-1:])
    assert read_image(data).tobytes() == image.transpose(PIL.Image.Transpose.ROTATE_270).tobytes()
    assert image_size(data) == (16, 24)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_tiny_and_narrow_images_keep_their_size(size):
    data = encode(PIL.Image.new("RGB", size, RED), "png")
    assert read_image(data).size == image_size(data) == size


def test_images_are_read_from_bytes_paths_and_addresses(tmp_path):
    PIL.Image.new("RGB", (5, 4), RED).save(tmp_path / "a b.png")
    path = tmp_path / "a b.png"
    for source in (path.read_bytes(), str(path), f"file://{path}"):
        assert read_image(source).getpixel((1, 1)) == RED
        assert image_size(source) == (5, 4)


def bomb(width: int, height: int) -> bytes:
    """PNG whose header declares more pixels than its few bytes hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


NOISE = noise(64, 64)
BROKEN = {
    "truncated_png": encode(NOISE, "png")[:2000],
    "truncated_jpeg": encode(NOISE, "jpeg")[:1500],
    "empty": b"",
    "text": b"not an image",
    "float": encode(PIL.Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "tiff"),
    "bomb": bomb(20000, 20000),
    "missing": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_unreadable(kind, tmp_path):
    with pytest.raises(UnreadableSample, match="400000000 pixels" if kind == "bomb" else "image"):
        read_image(BROKEN[kind])
    if kind != "missing":
        (tmp_path / "a").write_bytes(BROKEN[kind])
        with pytest.raises(UnreadableSample, match="image"):
            read_image(str(tmp_path / "a"))


def test_image_size_needs_the_header_only():
    with pytest.raises(UnreadableSample, match="400000000 pixels"):
        image_size(BROKEN["bomb"])
    assert image_size(BROKEN["truncated_png"]) == image_size(BROKEN["truncated_jpeg"]) == (64, 64)
    for kind in ("empty", "text", "missing"):
        with pytest.raises(UnreadableSample):
            image_size(BROKEN[kind])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_formats_that_start_other_programs_are_refused():
    with PIL.Image.open(io.BytesIO(EPS)) as opened:  # Pillow alone accepts it
        assert opened.format == "EPS"
    for read in (read_image, image_size):
        with pytest.raises(UnreadableSample, match="formats PNG"):
            read(EPS)


def test_files_that_are_not_regular_or_missing_are_refused(tmp_path):
    with pytest.raises(UnreadableSample, match="FileNotFoundError"):
        read_image(str(Path("nowhere.png")))
    os.mkfifo(tmp_path / "a.png")
    for path in (str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", "/dev/zero", str(tmp_path)):
        for read in (read_image, image_size):
            with pytest.raises(UnreadableSample, match="is not a regular file"):
                read(path)
        with pytest.raises(OSError, match="is not a regular file"):
            image_hash(path)


OUTSIDE = [
    *("/etc/hostname", "../secret.png", "file:///etc/hostname", "simplecache::file:///etc/hostname"),
    *("https://example.com/x.png", "zip://x.png::https://example.com/x.zip"),
    *("github://a:b@main/x.png", "hf://datasets/me/other/x.png", "hf://datasets/me/photos/../x.png"),
]


def test_allowed_files_are_those_of_the_data_set(tmp_path):
    allowed = AllowedFiles((str(tmp_path),), ("hf://datasets/me/photos/",))
    for name in OUTSIDE:
        for files in (allowed, NO_FILES):
            with pytest.raises(UnreadableSample, match="not inside its data set"):
                files.resolve(name)
    assert allowed.resolve("a.png") == allowed.resolve(str(tmp_path / "a.png")) == str(tmp_path / "a.png")
    for address in ("hf://datasets/me/photos/a.png", "zip://a.png::hf://datasets/me/photos/a.zip"):
        assert allowed.resolve(address) == address
    assert NO_FILES.resolve(b"content") == b"content"
    assert NO_FILES.resolve(None) is None


def test_image_value_reads_cells_of_an_image_column():
    assert image_value({"bytes": b"", "path": "a.png"}) == b""  # an empty file, not a path
    assert image_value({"bytes": None, "path": "a.png"}) == image_value("a.png") == "a.png"
    assert image_value(b"12") == image_value({"bytes": b"12"}) == b"12"
    assert image_value(None) is image_value(3) is image_value({"path": None}) is None


def test_image_endings_are_those_of_readable_formats():
    assert {"jpg", "jpeg", "png", "webp", "gif", "tiff"} <= image_endings()
    assert not image_endings() & {"txt", "json", "pdf", "npy", "eps", "ps", "psd"}
