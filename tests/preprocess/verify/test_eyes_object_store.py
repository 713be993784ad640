"""`wanprep verify` and `inspect` on a cache in a bucket: what is wrong there is named, too."""

import json
from pathlib import Path

from tests.object_store import BUCKET, ObjectStore, another_machine
from tests.preprocess.conftest import wanprep


def test_a_bucket_is_looked_at_like_a_folder(
    store: ObjectStore, tiny_t2v: Path, pictures: Path, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/eyes/shards"
    encode = ("encode", "--model", tiny_t2v, "--train-data-dir", pictures, "--output", url)
    with another_machine(tmp_path / "writer", **store.environment):
        ran = wanprep(*encode, "--size", 64, "--device", "cpu", "--num-workers", 1)
        assert ran.code == 0, ran.err
    with another_machine(tmp_path / "reader", **store.environment):
        ran = wanprep("verify", "--shards", url)
        assert ran.code == 0, ran.out + ran.err
        assert f"{url}: 12 samples" in ran.out and "no errors" in ran.out
        page = tmp_path / "page.html"
        ran = wanprep("inspect", "--shards", url, "--html", page)
        assert ran.code == 0 and url in ran.out, ran.err
        assert url in page.read_text() and page.read_text().count("<img") == 12
        assert str(tmp_path / "reader") not in page.read_text() + ran.out

    names = store.names("eyes/shards")
    (tar,) = (name for name in names if name.startswith("h64") and name.endswith(".tar"))
    place = f"{BUCKET}/eyes/shards/{tar}"
    data = bytearray(store.files().cat_file(place))
    data[len(data) // 2] ^= 1
    store.files().pipe_file(place, bytes(data))
    with another_machine(tmp_path / "third", **store.environment):
        found = tmp_path / "found.json"
        ran = wanprep("verify", "--shards", url, "--json", found)
        assert ran.code == 1
        findings = json.loads(found.read_text())["findings"]
        assert [finding["file"] for finding in findings] == [tar], ran.out
