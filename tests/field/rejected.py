"""The cells that `wanprep` refuses: name → what its message says (a regular expression)."""

REJECTED = {
    "mov-prores-alpha.mov": "alpha channel.* ffmpeg -i IN",
    "mov-quicktime-rle-alpha.mov": "alpha channel.* ffmpeg -i IN",
    "webm-vp9-alpha.webm": "alpha channel.* ffmpeg -i IN",
    "mp4-hevc-hdr-smpte2084.mp4": "HDR .* ffmpeg -i IN",
    "mp4-hevc-hdr-arib-std-b67.mp4": "HDR .* ffmpeg -i IN",
    "mp4-h-264-cut-off.mp4": "cannot decode the video",
    "mov-h-264-cut-off.mov": "cannot decode the video",
    "mp4-aac-sound-only.mp4": "no video stream",
    "mp4-aac-sound-only-with-a-cover.mp4": "no video stream",
    "mkv-h-264-no-frames.mkv": "cannot decode the video|no frames",
    "mp4-none-empty-file.mp4": "empty",
    "avi-unknown-unknown-codec.avi": "no decoder",
    "mp4-none-no-video-at-all.mp4": "cannot decode the video",
    "avi-none-no-video-at-all.avi": "cannot decode the video",
}
