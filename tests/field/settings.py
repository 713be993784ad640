"""Many settings of each encoder: what decides whether a pair of container and codec is sound."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.field import ffmpeg
from tests.field.cells import ENDINGS, FRAMES, MUXERS
from tests.field.codecs import PLAIN, h264, hevc
from tests.field.picture import SIZE

PAIRS = {
    "mp4": ("H.264", "HEVC", "VP9", "AV1", "MPEG-4", "Xvid", "MPEG-2", "MPEG-1", "MJPEG", "PNG"),
    "m4v": ("H.264", "MPEG-4"),
    "mov": ("H.264", "HEVC", "MPEG-4", "MPEG-2", "MJPEG", "ProRes", "DNxHR", "QuickTime RLE",
            "PNG", "H.263"),
    "mkv": ("H.264", "HEVC", "VP8", "VP9", "AV1", "MPEG-4", "Xvid", "MPEG-2", "MPEG-1", "MJPEG",
            "ProRes", "FFV1", "HuffYUV", "Ut Video", "raw", "Theora", "MS MPEG-4", "WMV2"),
    "webm": ("VP8", "VP9", "AV1"),
    "avi": ("H.264", "VP8", "VP9", "MPEG-4", "Xvid", "MPEG-2", "MJPEG", "FFV1", "HuffYUV",
            "Ut Video", "raw", "MS MPEG-4", "WMV2", "Cinepak", "H.263", "Sorenson"),
    "MPEG-PS": ("MPEG-1", "MPEG-2", "H.264", "MPEG-4"),
    "MPEG-TS": ("H.264", "HEVC", "MPEG-2"),
}  # fmt: skip
"""Container → codecs."""

_CUT = ("-ss", "0.8")
_OPEN = "open-gop=1:b-adapt=0"


@dataclass(frozen=True)
class Setting:
    """One way to encode."""

    name: str
    options: tuple[object, ...]
    size: tuple[int, int] = SIZE
    frames: int = len(FRAMES)
    remux: tuple[object, ...] = ()
    """ffmpeg's arguments of a second pass that copies; -ss stands before the input."""

    def make(self, folder: Path, container: str) -> Path | None:
        """The clip; None where the encoder or the container will not have it."""
        path = folder / f"a.{ENDINGS.get(container, container)}"
        muxer = MUXERS.get(container, ())
        try:
            ffmpeg.encode(path, *self.options, *muxer, numbers=range(self.frames), size=self.size)
            if self.remux:
                source = path.rename(folder / f"source{path.suffix}")
                before, after = (self.remux, ()) if self.remux[0] == "-ss" else ((), self.remux)
                ffmpeg.run(*before, "-i", source, "-c", "copy", *after, *muxer, path)
        except RuntimeError:
            return None
        return path


def settings(codec: str) -> Iterator[Setting]:
    """Those of a codec of `codecs.PLAIN`."""
    plain = tuple(PLAIN[codec])
    base = (256, 128) if codec == "DNxHR" else SIZE
    yield Setting("plain", plain, base)
    for size in ((322, 178), (480, 270)):
        yield Setting(f"{size[0]}x{size[1]}", plain, size, frames=30)
    yield Setting("one frame", plain, base, frames=1)
    bt709 = _words("-vf scale=out_color_matrix=bt709 -colorspace bt709 -color_primaries bt709")
    yield Setting("bt709", (*bt709, "-color_trc", "bt709", *plain), base)
    yield Setting("setsar 2", ("-vf", "setsar=2", *plain), base)
    yield Setting("starts at 1.4 s", plain, base, remux=("-output_ts_offset", "1.4"))
    if "-g" in plain:
        for gop in (1, 5, 250):
            yield Setting(f"g {gop}", (*plain, "-g", gop), base)
        yield Setting("cut by copy", (*plain, "-g", 24), base, remux=_CUT)
    own = {
        "H.264": _h264,
        "HEVC": _hevc,
        "VP8": _vp8,
        "VP9": _vp9,
        "AV1": _av1,
        "FFV1": _ffv1,
        "HuffYUV": _huffyuv,
        "Ut Video": _utvideo,
        "ProRes": _prores,
    }
    yield from own.get(codec, lambda: ())()
    if codec in ("MPEG-4", "Xvid", "MPEG-2", "MPEG-1"):
        yield from _mpeg(plain)
    if codec not in ("H.264", "HEVC", "HuffYUV", "Ut Video", "DNxHR"):  # these want even sizes
        yield Setting("odd size", plain, (97, 61), frames=30)


def _words(options: str) -> tuple[object, ...]:
    return tuple(options.split())


def _h264() -> Iterator[Setting]:
    defaults = _words("-c:v libx264 -pix_fmt yuv420p")
    yield Setting("x264 defaults", defaults)
    yield Setting("x264 defaults 640x360", defaults, (640, 360))
    for preset in ("ultrafast", "fast", "slow"):
        yield Setting(f"preset {preset}", (*defaults, "-preset", preset))
    yield Setting("bf 1", h264(bf=1))
    yield Setting("bf 3", h264(bf=3))
    yield Setting("bf 3 g 250", h264(bf=3, gop=250))
    yield Setting("bf 3 g 48", h264(bf=3, gop=48))
    yield Setting("bf 8 pyramid", h264(bf=8, extra="b-adapt=0:b-pyramid=normal"))
    yield Setting("bf 3 no pyramid", h264(bf=3, extra="b-adapt=0:b-pyramid=none"))
    yield Setting("open GOP", h264(bf=3, extra=_OPEN))
    yield Setting("intra refresh", h264(gop=24, extra="intra-refresh=1"))
    yield Setting("baseline", h264("-profile:v", "baseline"))
    yield Setting("interlaced", h264(bf=2, extra="tff=1"))
    yield Setting("fake interlaced", h264(extra="fake-interlaced=1"))
    yield Setting("10 bit", h264("-pix_fmt", "yuv420p10le"))
    yield Setting("4:2:2", h264("-pix_fmt", "yuv422p"))
    yield Setting("4:4:4", h264("-pix_fmt", "yuv444p"))
    yield Setting("4:4:4 odd size", h264("-pix_fmt", "yuv444p"), (97, 61))
    yield Setting("full range", ("-vf", "scale=out_range=full", *h264("-color_range", "pc")))
    yield Setting("grey", h264("-pix_fmt", "gray"))
    yield Setting("rgb", _words("-c:v libx264rgb -pix_fmt rgb24"))
    yield Setting("bf 3 cut by copy", h264(bf=3, gop=24), remux=_CUT)
    yield Setting("open GOP cut by copy", h264(bf=3, gop=24, extra=_OPEN), remux=_CUT)


def _hevc() -> Iterator[Setting]:
    defaults = _words("-c:v libx265 -x265-params log-level=none -pix_fmt yuv420p")
    yield Setting("x265 defaults", defaults)
    yield Setting("x265 defaults g 12", (*defaults, "-g", 12))
    yield Setting("x265 defaults 640x360", defaults, (640, 360))
    yield Setting("bf 3", hevc(bf=3))
    yield Setting("bf 3 g 250", hevc(bf=3, gop=250))
    yield Setting("bf 8", hevc(bf=8, gop=48, extra="b-adapt=0:rc-lookahead=20"))
    yield Setting("open GOP", hevc(bf=3, extra=_OPEN))
    yield Setting("intra refresh", hevc(gop=24, extra="intra-refresh=1"))
    yield Setting("10 bit", hevc("-pix_fmt", "yuv420p10le"))
    yield Setting("4:2:2", hevc("-pix_fmt", "yuv422p"))
    yield Setting("4:4:4", hevc("-pix_fmt", "yuv444p"))
    yield Setting("grey", hevc("-pix_fmt", "gray"))
    yield Setting("hvc1", hevc("-tag:v", "hvc1"))
    yield Setting("full range", ("-vf", "scale=out_range=full", *hevc("-color_range", "pc")))
    yield Setting("bf 3 cut by copy", hevc(bf=3, gop=24), remux=_CUT)
    yield Setting("open GOP cut by copy", hevc(bf=3, gop=24, extra=_OPEN), remux=_CUT)


def _vpx(encoder: str) -> tuple[object, ...]:
    return ("-c:v", encoder, *_words("-pix_fmt yuv420p -cpu-used 5 -b:v 1M -threads 1"))


def _alt_ref(options: tuple[object, ...]) -> Iterator[Setting]:
    yield Setting("defaults", options)
    hidden = (*options, "-auto-alt-ref", 1, "-lag-in-frames")
    yield Setting("alt-ref", (*hidden, 16, "-g", 24))
    yield Setting("alt-ref g 128", (*hidden, 25, "-g", 128))
    yield Setting("no alt-ref", (*options, "-auto-alt-ref", 0, "-lag-in-frames", 0))
    yield Setting("error resilient", (*options, "-error-resilient", "default"))


def _vp8() -> Iterator[Setting]:
    yield from _alt_ref(_vpx("libvpx"))


def _vp9() -> Iterator[Setting]:
    options = _vpx("libvpx-vp9")
    yield from _alt_ref(options)
    for form in ("yuv420p10le", "yuv422p", "yuv444p", "gbrp"):
        yield Setting(form, (*options, "-pix_fmt", form))


def _av1() -> Iterator[Setting]:
    svt = "-c:v libsvtav1 -preset 10 -svtav1-params lp=1 -g 24 -pix_fmt yuv420p"
    yield Setting("svt", _words(svt))
    yield Setting("aom", _words("-c:v libaom-av1 -cpu-used 8 -threads 1 -g 24 -pix_fmt yuv420p"))


def _ffv1() -> Iterator[Setting]:
    for form in ("yuv444p", "gray", "yuv422p10le", "gbrp"):
        yield Setting(form, ("-c:v", "ffv1", "-pix_fmt", form))


def _huffyuv() -> Iterator[Setting]:
    for form in ("yuv420p", "rgb24"):
        yield Setting(form, ("-c:v", "huffyuv", "-pix_fmt", form))
    for prediction in ("left", "plane", "median"):
        options = ("-c:v", "huffyuv", "-pix_fmt", "yuv422p", "-pred", prediction)
        yield Setting(prediction, options)
    yield Setting("adaptive", ("-c:v", "huffyuv", "-pix_fmt", "yuv422p", "-context", "1"))
    yield Setting("interlaced", _words("-c:v huffyuv -pix_fmt yuv422p -flags +ildct"))


def _utvideo() -> Iterator[Setting]:
    for form in ("yuv422p", "yuv444p", "gbrp"):
        yield Setting(form, ("-c:v", "utvideo", "-pix_fmt", form))
    for prediction in ("none", "left", "gradient", "median"):
        yield Setting(prediction, ("-c:v", "utvideo", "-pix_fmt", "yuv420p", "-pred", prediction))


def _prores() -> Iterator[Setting]:
    for profile in (0, 2, 3):
        options = ("-c:v", "prores_ks", "-profile:v", profile, "-pix_fmt", "yuv422p10le")
        yield Setting(f"profile {profile}", options)
    yield Setting("4444", _words("-c:v prores_ks -profile:v 4 -pix_fmt yuv444p10le"))
    yield Setting("interlaced", (*PLAIN["ProRes"], *_words("-flags +ildct -field_order tt")))


def _mpeg(plain: tuple[object, ...]) -> Iterator[Setting]:
    yield Setting("bf 2", (*plain, "-bf", 2))
    yield Setting("bf 2 g 250", (*plain, "-bf", 2, "-g", 250))
    yield Setting("bf 1", (*plain, "-bf", 1))
    closed = _words("-bf 2 -flags +cgop -sc_threshold 1000000000")
    yield Setting("bf 2 closed GOP", (*plain, *closed))
    yield Setting("bf 2 cut by copy", (*plain, "-bf", 2, "-g", 24), remux=_CUT)
    if plain[1] in ("mpeg4", "mpeg2video"):
        woven = _words("-bf 2 -flags +ilme+ildct -field_order tt")
        yield Setting("interlaced", (*plain, *woven))
