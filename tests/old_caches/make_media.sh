#!/bin/bash
# The media of the caches in this folder. The caches were encoded from them at d0f92fe (see README.md);
# made again, files need not have the same bytes, so this is a record, not a step of any test.
#   make_media.sh FFMPEG PYTHON FOLDER
set -eu
ffmpeg="$1 -loglevel error -y" python="$2"
mkdir -p "$3/media" "$3/timed"
cd "$3/media"
"$python" - <<'PYTHON'
from PIL import Image, ImageDraw

for number in range(33):  # a background that brightens, a disc that moves: no frame is like another
    image = Image.new("RGB", (96, 64), (40 + 5 * number, 90, 200 - 5 * number))
    draw = ImageDraw.Draw(image)
    draw.ellipse((2 * number, 12, 2 * number + 30, 42), fill=(240, 240 - 6 * number, 30))
    draw.rectangle((4, 48, 20, 60), fill=(220, 30, 30))
    image.save(f"frame-{number:02d}.png")
picture = Image.new("RGB", (64, 96), (200, 40, 40))
draw = ImageDraw.Draw(picture)
draw.ellipse((8, 8, 40, 40), fill=(20, 220, 60))
draw.rectangle((30, 60, 60, 90), fill=(30, 60, 220))
picture.save("photo.png")
exif = Image.Exif()
exif[0x0112] = 6
lying = picture.rotate(90, expand=True)
lying.save("E-portrait.tiff", exif=exif, compression="tiff_deflate")
lying.save("portrait.jpg", exif=exif, quality=92)
PYTHON
film="-framerate 24 -i frame-%02d.png"
x265="-c:v libx265 -crf 24 -x265-params log-level=none"
# Ordinary ones, of which the first frame rule read what is shown.
$ffmpeg $film -pix_fmt yuv420p -c:v libx264 -crf 22 h264.mp4
$ffmpeg $film -pix_fmt yuv420p -c:v libx264 -crf 22 -g 12 gop-12.mkv
$ffmpeg $film -pix_fmt yuv420p $x265:open-gop=0 hevc.mp4
$ffmpeg $film -c:v libvpx-vp9 -pix_fmt yuv420p -deadline good -b:v 200k vp9.webm
for matrix in smpte170m bt709 bt2020nc; do
  for range in tv pc; do
    $ffmpeg $film -vf "scale=out_color_matrix=$matrix:out_range=$range,format=yuv420p" \
      -colorspace $matrix -color_range $range -crf 24 -c:v libx264 "colour-$matrix-$range.mp4"
  done
done
$ffmpeg $film -pix_fmt yuv422p10le -c:v libx264 -crf 24 ten-bit-422.mp4
$ffmpeg -display_rotation 90 -i h264.mp4 -c copy turned.mp4
# A, B, E: the kinds of which it read other pictures.
$ffmpeg $film -pix_fmt yuv420p10le $x265:open-gop=0 A-ten-bit-420.mp4
$ffmpeg $film -pix_fmt yuv420p $x265:open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3 A-open-gop.mp4
$ffmpeg $film -pix_fmt yuv420p -c:v mpeg2video -g 12 -bf 2 -q:v 6 A-mpeg2.mpg
$ffmpeg $film -pix_fmt yuv420p -c:v libx264 -crf 24 -g 12 -bf 2 A-h264.avi
$ffmpeg -display_hflip -i h264.mp4 -c copy E-mirrored.mp4
$ffmpeg $film -pix_fmt yuv420p -c:v libx264 -crf 22 -g 10 gop.mp4
$ffmpeg -ss 0.3 -i gop.mp4 -c copy B-cut.mp4
rm gop.mp4
# For --fps.
$ffmpeg -i h264.mp4 -c copy ../timed/even.mp4
$ffmpeg -i h264.mp4 -c copy -video_track_timescale 600 slow-clock.mp4
$ffmpeg -i slow-clock.mp4 -c copy ../timed/B-600.avi
rm slow-clock.mp4
uneven="setpts='(N*40+30*gte(N,8)*(N-8)+if(gt(N,16),300,0))/1000/TB'"
$ffmpeg $film -pix_fmt yuv420p -vf "$uneven" -fps_mode vfr -enc_time_base 1:1000 \
  -c:v libx264 -crf 22 ../timed/B-vfr.mp4
$ffmpeg -framerate 8 -i frame-%02d.png -pix_fmt yuv420p -c:v libx264 -crf 22 ../timed/B-slow.mp4
"$python" - <<'PYTHON'
from PIL import Image

frames = [Image.open(f"frame-{number:02d}.png") for number in range(20)]
frames[0].save("../timed/B-anim.webp", save_all=True, append_images=frames[1:], duration=40)
PYTHON
rm frame-*.png
for file in ../media/*.* ../timed/*.*; do
  name=${file%.*}
  echo "clip ${name##*/}" > "$name.txt"
done
