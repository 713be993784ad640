"""The matrix: every cell that is tried. How a cell is made: `cells`; who asserts it: test_matrix."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tests.field import boxes, ffmpeg
from tests.field.animations import animations
from tests.field.cells import FRAMES, Cell, oriented
from tests.field.codecs import PLAIN as CODECS
from tests.field.codecs import h264, hevc
from tests.field.picture import SIZE, picture

PAIRS = {
    "mp4": ("H.264", "HEVC", "VP9", "AV1", "MPEG-4", "MPEG-2", "MPEG-1", "MJPEG", "PNG"),
    "m4v": ("H.264", "MPEG-4"),
    "mov": ("H.264", "HEVC", "MPEG-4", "MPEG-2", "MJPEG", "ProRes", "DNxHR", "QuickTime RLE",
            "PNG", "JPEG 2000", "H.263"),
    "mkv": ("H.264", "HEVC", "VP8", "VP9", "AV1", "MPEG-4", "MPEG-2", "MPEG-1", "MJPEG", "ProRes",
            "FFV1", "HuffYUV", "Ut Video", "raw", "Theora", "MS MPEG-4", "WMV2"),
    "webm": ("VP8", "VP9", "AV1"),
    "avi": ("H.264", "VP8", "VP9", "MPEG-4", "Xvid", "MPEG-2", "MJPEG", "FFV1", "HuffYUV",
            "Ut Video", "raw", "MS MPEG-4", "WMV2", "Cinepak", "H.263", "Sorenson"),
    "MPEG-PS": ("MPEG-1", "MPEG-2", "H.264", "HEVC", "MPEG-4"),
    "mpeg": ("MPEG-1", "MPEG-2"),
    "MPEG-TS": ("H.264", "HEVC", "MPEG-2"),
}  # fmt: skip
"""Container → codecs that are tried in it with nothing odd."""

_B = {
    "H.264": h264(bf=3),
    "HEVC": hevc(bf=3),
    "MPEG-4": (*CODECS["MPEG-4"], "-bf", 2),
    "Xvid": (*CODECS["Xvid"], "-bf", 2),
    "MPEG-2": (*CODECS["MPEG-2"], "-bf", 2),
    "MPEG-1": (*CODECS["MPEG-1"], "-bf", 2),
}
_B_IN = (
    *(("H.264", c) for c in ("mp4", "m4v", "mov", "mkv", "avi", "MPEG-PS", "MPEG-TS")),
    *(("HEVC", c) for c in ("mp4", "mov", "mkv", "MPEG-TS")),
    *(("MPEG-4", c) for c in ("mp4", "mkv", "avi")),
    *(("MPEG-2", c) for c in ("mp4", "mkv", "MPEG-PS", "MPEG-TS")),
    *(("MPEG-1", c) for c in ("MPEG-PS", "mkv")),
)
_OPEN = {
    "H.264": h264(bf=3, extra="open-gop=1:b-adapt=0"),
    "HEVC": hevc(bf=3, extra="open-gop=1:b-adapt=0"),
}
_VP9 = ("-c:v", "libvpx-vp9", "-deadline", "good", "-cpu-used", "5", "-b:v", "1M", "-threads", "1")
_VP8 = ("-c:v", "libvpx", "-deadline", "good", "-cpu-used", "5", "-b:v", "1M", "-threads", "1")
_HIDDEN = ("-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "30", "-pix_fmt", "yuv420p")
_LARGE = (384, 256)
"""Frames of more than a few bytes, that can be cut in the middle."""
_EVEN = ("-sc_threshold", "1000000000")
"""No key frames but every 12th, whatever the pictures are."""
_SOUND = ("-f", "lavfi", "-i", "sine=duration=6", "-map", "0:v", "-map", "1:a", "-b:a", "32k")
_SMALL = ("-f", "lavfi", "-i", "color=gray:size=48x32:rate=24:duration=2.5", "-map", "0:v",
          "-map", "1:v")  # fmt: skip
# An AVI's times are numbers of packets: it fills gaps with empty ones, here 600 a second.
_SPARSE = ("-vf", "settb=1/600,setpts=N*25+mod(N*7\\,11)", "-fps_mode", "passthrough",
           "-enc_time_base", "1/600")  # fmt: skip


def _plain() -> Iterator[Cell]:
    for container, codecs in PAIRS.items():
        for codec in codecs:
            # DNxHR takes no pictures as small as ours.
            size = (256, 128) if codec == "DNxHR" else SIZE
            yield Cell(container=container, codec=codec, options=CODECS[codec], size=size)


def _order() -> Iterator[Cell]:
    """Frames that are stored in another order, or lean on others across key frames."""
    for codec, container in _B_IN:
        yield Cell(container=container, codec=codec, oddity="B-frames", options=_B[codec])
    # libxvid packs a B-frame into the packet of the one before; an empty one follows. ffmpeg never
    # gets the last two frames out of it.
    for container in ("avi", "mkv"):
        yield Cell(container=container, codec="Xvid", oddity="packed B-frames",
                   options=_B["Xvid"], shown=FRAMES[:58])  # fmt: skip
    for codec, options in _OPEN.items():
        for container in ("mp4", "mov", "mkv", "MPEG-TS"):
            yield Cell(container=container, codec=codec, oddity="open GOP", options=options)
    yield Cell(container="avi", codec="H.264", oddity="open GOP", options=_OPEN["H.264"])
    for container in ("mp4", "mkv", "avi", "MPEG-TS"):
        options = h264(gop=24, extra="intra-refresh=1")
        yield Cell(container=container, codec="H.264", oddity="intra refresh", options=options)
    for container in ("mp4", "mkv"):
        options = hevc(gop=24, extra="intra-refresh=1")
        yield Cell(container=container, codec="HEVC", oddity="intra refresh", options=options)
    for container in ("webm", "mkv", "mp4", "avi"):
        yield Cell(container=container, codec="VP9", oddity="hidden frames",
                   options=(*_VP9, *_HIDDEN))  # fmt: skip
    for container in ("webm", "mkv"):
        yield Cell(container=container, codec="VP8", oddity="hidden frames",
                   options=(*_VP8, *_HIDDEN))  # fmt: skip
    aom = ("-c:v", "libaom-av1", "-cpu-used", "8", "-b:v", "1M", "-threads", "1", "-g", "30",
           "-lag-in-frames", "12", "-pix_fmt", "yuv420p")  # fmt: skip
    for container in ("webm", "mp4"):
        yield Cell(container=container, codec="AV1", oddity="hidden frames", options=aom)


def _edits() -> Iterator[Cell]:
    """mp4's edit lists. Cut by copying, what lies before the cut is stored, but not shown."""
    cut = ((("-ss", "0.75"), ()),)
    late = FRAMES[18:]
    for container in ("mp4", "mov", "m4v"):
        yield Cell(container=container, codec="H.264", oddity="edit list", shown=late,
                   options=h264(bf=3), copies=cut)  # fmt: skip
    yield Cell(container="mp4", codec="H.264", oddity="edit list", detail="open GOP", shown=late,
               options=_OPEN["H.264"], copies=cut)  # fmt: skip
    for codec in ("HEVC", "MPEG-4", "MPEG-2"):
        yield Cell(container="mp4", codec=codec, oddity="edit list", shown=late, copies=cut,
                   options=_B[codec])  # fmt: skip
    yield Cell(container="mov", codec="ProRes", oddity="edit list", shown=late, copies=cut,
               options=CODECS["ProRes"])  # fmt: skip
    for container in ("mp4", "mov"):
        yield Cell(container=container, codec="H.264", oddity="edit list that delays",
                   options=h264(bf=3), copies=((("-itsoffset", "1"), ()),))  # fmt: skip
    # Ours count in 1/12288 s, 512 a frame: 10 frames, then 15 from the 30th. No B-frames: with
    # them the media's own times are shifted.
    parts = ((410, 0), (625, 30 * 512))
    yield Cell(container="mp4", codec="H.264", oddity="edit list of two parts", options=h264(),
               shown=(*FRAMES[:10], *FRAMES[30:45]),
               edits=(lambda path: boxes.set_edits(path, parts),))  # fmt: skip
    ends = ((1000, 0),)
    yield Cell(container="mp4", codec="H.264", oddity="edit list that ends early",
               options=h264(), shown=FRAMES[:24],
               edits=(lambda path: boxes.set_edits(path, ends),))  # fmt: skip


def _times() -> Iterator[Cell]:
    """Times that are irregular, wrong or missing. Every frame counts, whatever its time."""
    irregular = ("-vf", "settb=1/1000,setpts=N*40+mod(N*N*7\\,23)+gte(N\\,20)*700", "-fps_mode",
                 "passthrough", "-enc_time_base", "1/1000")  # fmt: skip
    vfr = "variable frame rate"
    seconds = (59 * 40 + 59 * 59 * 7 % 23 + 700) / 1000
    for container in ("mp4", "mov", "mkv", "MPEG-TS"):
        yield Cell(container=container, codec="H.264", oddity=vfr, fps=59 / seconds,
                   options=(*irregular, *h264(bf=3)))  # fmt: skip
    for codec in ("VP8", "VP9"):
        yield Cell(container="webm", codec=codec, oddity=vfr, fps=59 / seconds,
                   options=(*irregular, *CODECS[codec]))  # fmt: skip
    for codec in ("MPEG-4", "H.264", "MJPEG"):
        yield Cell(container="avi", codec=codec, oddity=vfr, options=(*_SPARSE, *CODECS[codec]))
    slower = (((), ("-bsf:v", "setts=ts=TS*10")),)
    for container, codec in (("mkv", "H.264"), ("webm", "VP9")):
        yield Cell(container=container, codec=codec, oddity="wrong frame rate in the header", fps=2.4,
                   options=CODECS[codec], copies=slower)  # fmt: skip
    for container, codec in (("mkv", "H.264"), ("webm", "VP8"), ("webm", "VP9"), ("mkv", "FFV1")):
        yield Cell(container=container, codec=codec, oddity="no duration", make_it=_piped(codec))
    for codec in ("H.264", "HEVC"):
        fragments = ("-movflags", "frag_keyframe+empty_moov+default_base_moof")
        yield Cell(container="mp4", codec=codec, oddity="fragmented",
                   options=(*_B[codec], *fragments))  # fmt: skip
    yield Cell(container="mp4", codec="H.264", oddity="duration too long", options=h264(bf=3),
               edits=(lambda path: boxes.set_duration(path, 5000),))  # fmt: skip
    for container, codec in (("mkv", "H.264"), ("webm", "VP9")):
        yield Cell(container=container, codec=codec, oddity="duration too long",
                   options=CODECS[codec],
                   edits=(lambda path: boxes.set_matroska_duration(path, 9e7),))  # fmt: skip
    negative = (((), ("-bsf:v", "setts=ts=TS-500", "-avoid_negative_ts", "disabled")),)
    for codec, options in (("H.264", h264(bf=3)), ("HEVC", hevc()), ("MPEG-4", CODECS["MPEG-4"])):
        yield Cell(container="mkv", codec=codec, oddity="times below 0", options=options,
                   copies=negative)  # fmt: skip
    # 33 bits of 1/90000 s: they begin anew after 95443.7 s.
    for codec in ("H.264", "MPEG-2"):
        yield Cell(container="MPEG-TS", codec=codec, oddity="times that wrap around",
                   options=(*_B[codec], "-output_ts_offset", "95442"))  # fmt: skip
    yield Cell(container="m4v", codec="MPEG-4", oddity="no container", detail="no times",
               make_it=lambda path: _write(path, *_B["MPEG-4"], "-f", "m4v"))  # fmt: skip
    for codec, form in (("H.264", "h264"), ("MPEG-2", "mpeg2video")):
        yield Cell(container="mpg", codec=codec, oddity="no container", detail="no times",
                   make_it=lambda path, codec=codec, form=form: _write(  # type: ignore[misc]
                       path, *_B[codec], "-f", form))  # fmt: skip


def _shapes() -> Iterator[Cell]:
    """Pictures that are to be shown in another shape than they are stored in."""
    names = {2: "mirrored", 3: "turned", 4: "mirrored", 5: "turned and mirrored", 6: "turned",
             7: "turned and mirrored", 8: "turned"}  # fmt: skip
    for orientation, oddity in names.items():
        for container, codec in (("mp4", "H.264"), ("mov", "HEVC")):
            yield Cell(container=container, codec=codec, oddity=oddity, detail=f"as {orientation}",
                       options=CODECS[codec], orientation=orientation,
                       edits=(oriented(orientation),))  # fmt: skip
    for container, codec in (("m4v", "MPEG-4"), ("mov", "ProRes"), ("mov", "MJPEG")):
        yield Cell(container=container, codec=codec, oddity="turned", options=CODECS[codec],
                   orientation=6, edits=(oriented(6),))  # fmt: skip
    # A stored picture of orientation 6 is shown turned clockwise, which ffmpeg calls -90 degrees.
    for container, codec in (("mkv", "H.264"), ("webm", "VP9")):
        yield Cell(container=container, codec=codec, oddity="turned", detail="by projection",
                   options=CODECS[codec], orientation=6,
                   copies=((("-display_rotation", "-90"), ()),))  # fmt: skip
    for orientation, bsf in ((6, "rotate=270"), (2, "flip=horizontal")):
        for container in ("mp4", "mkv", "MPEG-TS"):
            yield Cell(container=container, codec="H.264", oddity=names[orientation],
                       detail="by the codec", options=h264(), orientation=orientation,
                       copies=(((), ("-bsf:v", f"h264_metadata=display_orientation=insert:{bsf}")),))  # fmt: skip
    odd = (97, 61)
    full = ("-pix_fmt", "yuv444p")
    for container, codec, options in (
        ("mp4", "H.264", h264(*full)),
        ("mp4", "MPEG-4", CODECS["MPEG-4"]),
        ("avi", "MPEG-4", CODECS["MPEG-4"]),
        ("MPEG-PS", "MPEG-2", CODECS["MPEG-2"]),
        ("webm", "VP8", CODECS["VP8"]),
        ("webm", "VP9", CODECS["VP9"]),
        ("webm", "AV1", CODECS["AV1"]),
        ("mov", "MJPEG", CODECS["MJPEG"]),
        ("mov", "ProRes", CODECS["ProRes"]),
        ("mkv", "FFV1", CODECS["FFV1"]),
        ("avi", "raw", CODECS["raw"]),
    ):
        yield Cell(container=container, codec=codec, oddity="odd size", options=options, size=odd)
    wide = ("-vf", "setsar=2")
    for container, codec in (("mp4", "H.264"), ("mov", "ProRes"), ("mkv", "FFV1"),
                             ("webm", "VP9"), ("MPEG-TS", "MPEG-2"), ("MPEG-PS", "MPEG-2"),
                             ("avi", "MPEG-4")):  # fmt: skip
        aspect = ("-aspect", "3:1") if codec != "MPEG-2" else ("-aspect", "16:9")
        shown = (192, 64) if codec != "MPEG-2" else (114, 64)
        yield Cell(container=container, codec=codec, oddity="non-square pixels",
                   options=(*CODECS[codec], *aspect), shown_size=shown)  # fmt: skip
    yield Cell(container="mp4", codec="H.264", oddity="non-square pixels", detail="high",
               options=("-vf", "setsar=1/2", *h264()), shown_size=(96, 128))  # fmt: skip
    yield Cell(container="mp4", codec="H.264", oddity="non-square pixels", detail="turned",
               options=(*wide, *h264()), orientation=6, edits=(oriented(6),),
               shown_size=(96, 128))  # fmt: skip
    for container, codec in (("webm", "VP9"), ("webm", "VP8"), ("mkv", "H.264")):
        yield Cell(container=container, codec=codec, oddity="size changes", sizes_vary=True,
                   make_it=_size_changes(codec))  # fmt: skip


def _pixels() -> Iterator[Cell]:
    """Pixels of other kinds, all of which 8-bit RGB can show."""
    ten = "10 bit"
    yield Cell(container="mp4", codec="H.264", oddity=ten, options=h264("-pix_fmt", "yuv420p10le"))
    for container in ("mp4", "mkv"):
        yield Cell(container=container, codec="HEVC", oddity=ten,
                   options=hevc("-pix_fmt", "yuv420p10le"))  # fmt: skip
    for codec in ("VP9", "AV1"):
        yield Cell(container="webm", codec=codec, oddity=ten,
                   options=(*CODECS[codec], "-pix_fmt", "yuv420p10le"))  # fmt: skip
    for container, codec, form in (("mp4", "H.264", "gray"), ("mkv", "FFV1", "gray"),
                                   ("mov", "MJPEG", "gray"), ("mkv", "HEVC", "gray")):  # fmt: skip
        yield Cell(container=container, codec=codec, oddity="grey", grey=True,
                   options=(*CODECS[codec], "-pix_fmt", form))  # fmt: skip
    for container, codec in (("mp4", "H.264"), ("mp4", "HEVC"), ("webm", "VP9"), ("mkv", "FFV1")):
        yield Cell(container=container, codec=codec, oddity="4:4:4",
                   options=(*CODECS[codec], "-pix_fmt", "yuv444p"))  # fmt: skip
    yield Cell(container="mp4", codec="H.264", oddity="RGB",
               options=("-c:v", "libx264rgb", "-crf", "14", "-preset", "veryfast"))  # fmt: skip
    for container, codec in (("mp4", "H.264"), ("mp4", "HEVC"), ("webm", "VP9")):
        yield Cell(container=container, codec=codec, oddity="full range",
                   options=("-vf", "scale=out_range=full", *CODECS[codec],
                            "-color_range", "pc"))  # fmt: skip
    woven = ("-flags", "+ilme+ildct", "-field_order", "tt")
    for container, codec in (("mp4", "H.264"), ("mkv", "H.264"), ("MPEG-PS", "MPEG-2"),
                             ("MPEG-TS", "MPEG-2"), ("avi", "MPEG-4"), ("mov", "ProRes")):  # fmt: skip
        options = h264(bf=3, extra="tff=1") if codec == "H.264" else (*CODECS[codec], *woven)
        yield Cell(container=container, codec=codec, oddity="interlaced", options=options)


def _beside() -> Iterator[Cell]:
    """What else a file may hold."""
    for container in ("mp4", "mkv", "MPEG-TS"):
        yield Cell(container=container, codec="H.264", oddity="longer sound",
                   options=h264(bf=3), inputs=_SOUND)  # fmt: skip
    yield Cell(container="webm", codec="VP9", oddity="longer sound",
               options=(*CODECS["VP9"], "-c:a", "libopus"), inputs=_SOUND)  # fmt: skip
    for container in ("mp4", "mkv", "mov"):
        yield Cell(container=container, codec="H.264", oddity="two videos", inputs=_SMALL,
                   options=(*h264(), "-disposition:v:0", "default"))  # fmt: skip
    for container, edits in (("mp4", ()), ("mp4", (boxes.cover_first,)), ("mkv", ())):
        yield Cell(container=container, codec="H.264", oddity="cover",
                   detail="first" if edits else "", make_it=_with_cover, edits=edits)  # fmt: skip
    yield Cell(container="mov", codec="ProRes", oddity="time code",
               options=(*CODECS["ProRes"], "-timecode", "01:00:00:00"))  # fmt: skip
    yield Cell(container="mov", codec="H.264", oddity="time code",
               options=(*h264(bf=3), "-timecode", "01:00:00:00"))  # fmt: skip
    for container, codec in (("mp4", "H.264"), ("webm", "VP9"), ("avi", "MJPEG")):
        yield Cell(container=container, codec=codec, oddity="one frame", numbers=(7,),
                   options=CODECS[codec])  # fmt: skip
    for ending, form in (("mp4", "matroska"), ("avi", "mp4"), ("mkv", "mpegts")):
        yield Cell(container=ending, codec="H.264", oddity="name of another container",
                   detail=f"is {form}", options=(*h264(bf=3), "-f", form))  # fmt: skip


def _by_index() -> Iterator[Cell]:
    """AVIs of codecs that decord reads, by index: what a wrong index would show in."""
    for codec in ("HuffYUV", "Ut Video"):
        cell = Cell(container="avi", codec=codec, options=CODECS[codec])
        vfr = (*_SPARSE, *cell.options)
        yield replace(cell, oddity="variable frame rate", options=vfr)
        yield replace(cell, oddity="longer sound", inputs=_SOUND)
        yield replace(cell, oddity="two videos", inputs=_SMALL)
        yield replace(cell, oddity="one frame", numbers=(7,))
        wide = (*cell.options, "-aspect", "3:1")
        yield replace(cell, oddity="non-square pixels", options=wide, shown_size=(192, 64))
        woven = (*cell.options, "-flags", "+ildct", "-field_order", "tt")
        yield replace(cell, oddity="interlaced", options=woven)
        yield replace(cell, oddity="cut off", shown=FRAMES[:40], damaged_last=True, size=_LARGE,
                      edits=(lambda path: boxes.cut_at_packet(path, 0, 40),))  # fmt: skip


def _damaged() -> Iterator[Cell]:
    """Files of which a part is missing. What is whole is shown, as far as it can be."""
    for container, codec in (("mkv", "H.264"), ("webm", "VP9"), ("avi", "MJPEG"),
                             ("avi", "MPEG-4"), ("MPEG-TS", "H.264"), ("MPEG-PS", "MPEG-2")):  # fmt: skip
        # Frames of less than 2048 bytes share a sector of an MPEG-PS.
        options = (*CODECS[codec], *(("-g", 1) if container == "MPEG-PS" else ()))
        yield Cell(container=container, codec=codec, oddity="cut off", options=options,
                   shown=FRAMES[:40], damaged_last=True, size=_LARGE,
                   edits=(lambda path: boxes.cut_at_packet(path, 0, 40),))  # fmt: skip
    fragments = ("-movflags", "frag_keyframe+empty_moov+default_base_moof")
    yield Cell(container="mp4", codec="H.264", oddity="cut off", detail="fragmented",
               options=(*h264(), *fragments), shown=FRAMES[:36], damaged_last=True,
               edits=(lambda path: boxes.cut_at_packet(path, 0, 36),))  # fmt: skip
    for container, codec in (("MPEG-TS", "H.264"), ("MPEG-TS", "HEVC"), ("MPEG-TS", "MPEG-2"),
                             ("MPEG-PS", "MPEG-2")):  # fmt: skip
        yield Cell(container=container, codec=codec, oddity="starts without a key frame",
                   options=(*CODECS[codec], *(_EVEN if codec == "MPEG-2" else ())),
                   shown=FRAMES[12:], size=_LARGE,
                   edits=(lambda path: boxes.cut_at_packet(path, 4, None),))  # fmt: skip
    # Frames that are stored behind the first key frame and shown before it need lost ones.
    opened = (("H.264", _OPEN["H.264"]), ("HEVC", _OPEN["HEVC"]), ("MPEG-2", _B["MPEG-2"]))
    for codec, options in opened:
        yield Cell(container="MPEG-TS", codec=codec, oddity="starts without a key frame",
                   detail="open GOP", options=(*options, *(_EVEN if codec == "MPEG-2" else ())),
                   shown=FRAMES[12:], size=_LARGE,
                   edits=(lambda path: boxes.cut_at_packet(path, 4, None),))  # fmt: skip


def _refused() -> Iterator[Cell]:
    """What cannot be read, or not without a choice that is the user's. REJECTED has the reasons."""
    alpha = ("-vf", "format=rgba,colorchannelmixer=aa=0.5")
    for container, codec, options in (
        ("mov", "ProRes", ("-c:v", "prores_ks", "-pix_fmt", "yuva444p10le")),
        ("mov", "QuickTime RLE", ("-c:v", "qtrle", "-pix_fmt", "argb")),
        ("webm", "VP9", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8")),
        ("webm", "VP8", ("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0")),
    ):
        yield Cell(container=container, codec=codec, oddity="alpha", options=(*alpha, *options))
    for curve in ("smpte2084", "arib-std-b67"):
        params = f"transfer={curve}:colorprim=bt2020:range=limited"
        yield Cell(container="mp4", codec="HEVC", oddity="HDR", detail=curve,
                   options=hevc("-pix_fmt", "yuv420p10le", extra=params))  # fmt: skip
    # Marked as one whose colours only Dolby's decoders know.
    yield Cell(container="mp4", codec="HEVC", oddity="Dolby Vision", options=hevc(),
               edits=(lambda path: boxes.replace_all(path, b"hev1", b"dvh1"),))  # fmt: skip
    for container in ("mp4", "mov"):
        yield Cell(container=container, codec="H.264", oddity="cut off", options=h264(),
                   edits=(lambda path: boxes.cut(path, 0.7),))  # fmt: skip
    sound = ("-f", "lavfi", "-i", "sine=duration=2", "-b:a", "32k")
    yield Cell(container="mp4", codec="AAC", oddity="sound only",
               make_it=lambda path: _only(path, *sound))  # fmt: skip
    yield Cell(container="mp4", codec="AAC", oddity="sound only", detail="with a cover",
               make_it=_sound_with_cover)  # fmt: skip
    yield Cell(container="mkv", codec="H.264", oddity="no frames", options=h264("-frames:v", "0"))
    yield Cell(container="mp4", codec="none", oddity="empty file", make_it=Path.touch)
    yield Cell(container="avi", codec="unknown", oddity="unknown codec", options=CODECS["MPEG-4"],
               edits=(lambda path: boxes.replace_all(path, b"FMP4", b"ZZZZ"),))  # fmt: skip
    for ending in ("mp4", "avi"):
        yield Cell(container=ending, codec="none", oddity="no video at all",
                   make_it=lambda path: _text(path))  # fmt: skip


def _text(path: Path) -> None:
    path.write_text("<html><body>404 Not Found</body></html>\n" * 20)


def _only(path: Path, *arguments: object) -> None:
    ffmpeg.run(*arguments, path)


def _sound_with_cover(path: Path) -> None:
    from PIL import Image

    cover = path.with_name(f"{path.name}.png")
    Image.fromarray(picture(200, (160, 160))).save(cover)
    ffmpeg.run("-f", "lavfi", "-i", "sine=duration=2", "-i", cover, "-map", "0", "-map", "1",
               "-c:v", "png", "-disposition:v", "attached_pic", path)  # fmt: skip
    cover.unlink()


def _piped(codec: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        form = "webm" if path.suffix == ".webm" else "matroska"
        written = ffmpeg.run(
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE[0]}x{SIZE[1]}"),
            *("-r", ffmpeg.RATE, "-i", "-", *CODECS[codec], "-f", form, "-"),
            stdin=ffmpeg.raw(FRAMES),
        )
        path.write_bytes(written)

    return make


def _write(path: Path, *options: object) -> None:
    ffmpeg.encode(path, *options, numbers=FRAMES)


def _size_changes(codec: str) -> Callable[[Path], None]:
    """Thirty pictures of one size and thirty of half of it, in one stream."""

    def make(path: Path) -> None:
        parts = []
        for size, numbers in ((SIZE, FRAMES[:30]), ((48, 32), FRAMES[30:])):
            part = path.with_name(f"part-{size[0]}-{path.name}")
            ffmpeg.encode(part, *CODECS[codec], numbers=numbers, size=size)
            parts.append(part)
        listed = path.with_name(f"{path.name}.txt")
        listed.write_text("".join(f"file '{part}'\n" for part in parts))
        # In Annex B each key frame brings its own parameters.
        bsf = ("-bsf:v", "dump_extra") if codec == "H.264" else ()
        ffmpeg.run("-f", "concat", "-safe", "0", "-i", listed, "-c", "copy", *bsf, path)
        for part in (*parts, listed):
            part.unlink()

    return make


def _with_cover(path: Path) -> None:
    from PIL import Image

    cover = path.with_name(f"{path.name}.png")
    Image.fromarray(picture(200, (160, 160))).save(cover)
    if path.suffix == ".mkv":
        attached = ("-attach", cover, "-metadata:s:t", "mimetype=image/png")
        ffmpeg.encode(path, *h264(bf=3), *attached, numbers=FRAMES)
    else:
        inputs = ("-i", cover, "-map", "0:v", "-map", "1:v", "-c:v:1", "png")
        first = [option if option != "-c:v" else "-c:v:0" for option in h264(bf=3)]
        ffmpeg.encode(path, *first, "-pix_fmt:v:1", "rgb24", "-disposition:v:1", "attached_pic",
                      numbers=FRAMES, inputs=inputs)  # fmt: skip
    cover.unlink()


CELLS: tuple[Cell, ...] = (
    *_plain(),
    *_order(),
    *_edits(),
    *_times(),
    *_shapes(),
    *_pixels(),
    *_beside(),
    *_by_index(),
    *_damaged(),
    *animations(),
    *_refused(),
)
