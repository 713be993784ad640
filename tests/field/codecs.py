"""How each codec is told to encode: nearly lossless, quickly, one key frame in 12, no B-frames."""

from collections.abc import Sequence

GOP = 12

_X265 = "log-level=none:scenecut=0:pools=1:frame-threads=1:wpp=0"
_REALTIME = ("-deadline", "realtime", "-cpu-used", "8", "-b:v", "2M", "-auto-alt-ref", "0")


def h264(*options: object, gop: int = GOP, bf: int = 0, extra: str = "") -> tuple[object, ...]:
    """x264 with its own parameters in `extra`, key=value with colons between."""
    params = "threads=1:scenecut=0" + (f":{extra}" if extra else "")
    return ("-c:v", "libx264", "-preset", "veryfast", "-crf", "14", "-g", gop, "-bf", bf,
            "-pix_fmt", "yuv420p", "-x264-params", params, *options)  # fmt: skip


def hevc(*options: object, gop: int = GOP, bf: int = 0, extra: str = "") -> tuple[object, ...]:
    """x265 with its own parameters in `extra`; without "open-gop=1" its GOPs are closed."""
    closed = "" if "open-gop" in extra else ":open-gop=0"
    params = f"{_X265}:keyint={gop}:bframes={bf}{closed}" + (f":{extra}" if extra else "")
    return ("-c:v", "libx265", "-preset", "ultrafast", "-crf", "14", "-pix_fmt", "yuv420p",
            "-x265-params", params, *options)  # fmt: skip


_YUV = ("-pix_fmt", "yuv420p")
_Q = ("-q:v", "3", "-g", GOP)

PLAIN: dict[str, Sequence[object]] = {
    "H.264": h264(),
    "HEVC": hevc(),
    "VP8": ("-c:v", "libvpx", *_REALTIME, "-g", GOP, *_YUV),
    "VP9": ("-c:v", "libvpx-vp9", *_REALTIME, "-row-mt", "0", "-g", GOP, *_YUV),
    "AV1": ("-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", "8", "-crf", "20",
            "-b:v", "0", "-threads", "1", "-lag-in-frames", "0", "-g", GOP, *_YUV),
    "MPEG-4": ("-c:v", "mpeg4", *_Q, *_YUV),
    "Xvid": ("-c:v", "libxvid", *_Q, *_YUV),
    "MPEG-2": ("-c:v", "mpeg2video", *_Q, *_YUV),
    "MPEG-1": ("-c:v", "mpeg1video", *_Q, *_YUV),
    "MJPEG": ("-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p"),
    "ProRes": ("-c:v", "prores_ks", "-profile:v", "1", "-pix_fmt", "yuv422p10le"),
    "DNxHR": ("-c:v", "dnxhd", "-profile:v", "dnxhr_lb", "-pix_fmt", "yuv422p"),
    "FFV1": ("-c:v", "ffv1", *_YUV),
    "HuffYUV": ("-c:v", "huffyuv", "-pix_fmt", "yuv422p"),
    "Ut Video": ("-c:v", "utvideo", *_YUV),
    "raw": ("-c:v", "rawvideo", *_YUV),
    "QuickTime RLE": ("-c:v", "qtrle", "-pix_fmt", "rgb24"),
    "PNG": ("-c:v", "png", "-pix_fmt", "rgb24"),
    "H.263": ("-c:v", "h263p", *_Q, *_YUV),
    "Sorenson": ("-c:v", "flv", *_Q, *_YUV),
    "MS MPEG-4": ("-c:v", "msmpeg4", *_Q, *_YUV),
    "WMV2": ("-c:v", "wmv2", *_Q, *_YUV),
    "Theora": ("-c:v", "libtheora", "-q:v", "8", "-g", GOP, *_YUV),
    "Cinepak": ("-c:v", "cinepak", "-q:v", "3", "-g", GOP, "-pix_fmt", "rgb24"),
    "JPEG 2000": ("-c:v", "jpeg2000", "-q:v", "3", *_YUV),
}  # fmt: skip
"""Codec → options of an ordinary clip."""
