"""The cells that `wanprep` refuses: name → what its message says (a regular expression)."""

REJECTED = {
    "mov-prores-alpha.mov": "alpha channel.* ffmpeg -i IN",
    "mov-quicktime-rle-alpha.mov": "alpha channel.* ffmpeg -i IN",
    "webm-vp9-alpha.webm": "alpha channel.* ffmpeg -c:v libvpx-vp9 -i IN",
    "webm-vp8-alpha.webm": "alpha channel.* ffmpeg -c:v libvpx -i IN",
    "mp4-hevc-dolby-vision.mp4": "Dolby Vision .dvh1.* SDR",
    "mp4-hevc-hdr-smpte2084.mp4": "HDR .* ffmpeg -i IN",
    "mp4-hevc-hdr-arib-std-b67.mp4": "HDR .* ffmpeg -i IN",
    "mp4-h-264-cut-off.mp4": r"cannot decode the video .its index \(moov\)",
    "mov-h-264-cut-off.mov": r"cannot decode the video .its index \(moov\)",
    "mp4-aac-sound-only.mp4": "no video stream",
    "mp4-aac-sound-only-with-a-cover.mp4": "no video stream",
    "mkv-h-264-no-frames.mkv": "no frames",
    "mp4-none-empty-file.mp4": "empty",
    "avi-unknown-unknown-codec.avi": "no decoder",
    "mp4-none-no-video-at-all.mp4": "cannot decode the video .it is a text that begins '<html>",
    "avi-none-no-video-at-all.avi": "cannot decode the video .it is a text that begins '<html>",
}
