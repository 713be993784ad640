#!/bin/sh
# Wheels that a bare machine with torch and CUDA lacks (Python 3.12, x86-64), without a network there:
#     benchmarks/gpu_wheels.sh                  into .whl/, 17 MB
#     benchmarks/gpu_wheels.sh .whl-nf4 nf4     bitsandbytes, 43 MB: too much to go with the others
# docs/measurements.md says how they are installed and what else must be there.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.whl}
packages="diffusers==0.42.1 peft==0.21.2 zarr==3.1.6 numcodecs==0.16.6 donfig==0.8.1.post1
    google-crc32c==1.9.0 webdataset==1.0.2 braceexpand==0.1.7"
[ "${2:-}" = nf4 ] && packages="bitsandbytes==0.50.2"
platforms=""
for version in 2_28 2_27 2_24 2_17 2014 2010 1; do
    case $version in 2_*) name=manylinux_${version}_x86_64 ;; *) name=manylinux${version}_x86_64 ;; esac
    platforms="$platforms --platform $name"
done
rm -rf "$folder"
# shellcheck disable=SC2086 # lists of words
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp $platforms --dest "$folder" $packages
kilobytes=$(du -sk "$folder" | cut -f1)
tree=$(git ls-files -z | xargs -0 du -ck | tail -1 | cut -f1)
echo "$folder: $((kilobytes / 1024)) MB, the working tree $((tree / 1024)) MB"
if [ $((kilobytes + tree)) -gt 65536 ]; then
    echo "together more than the 64 MiB that can be carried" >&2
    exit 1
fi
