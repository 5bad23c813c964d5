"""Image search with FAISS over embeddings of one space.

    python faiss_search.py index dist/demo pictures pictures.index
    python faiss_search.py search dist/demo pictures.index "a red circle" --public-key key.pub

What makes the search safer is the encoder of the query and of the pictures. It is no filter: 20 of 60 unsafe captions of
the demo's test set find a safe picture first among their 60 safe and 60 unsafe ones, with the unedited model 5 of 60.

Query and pictures must be embedded into the same space. So the index carries the id of its space
(docs/how-to/embedding.md) and is refused
with an encoder of any other. An index of the model before a safety edit of placement `embedding` need not
be made again: `uwm-deploy migrate` turns it into one of the edited model. Names of special tokens in a query are ordinary
letters (the runtime's default), which keeps a query from hiding what follows them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import faiss
import numpy as np

from uwm_deploy.runtime.encoder import SafeEncoder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def build(encoder: SafeEncoder, folder: Path, out: Path) -> list[str]:
    """Writes the index and, beside it, what its rows are; returns the pictures that could not be read."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{folder} holds no pictures")
    rows = encoder.encode_image(files)
    index = faiss.IndexFlatIP(rows.shape[1])  # rows have length 1, so the inner product is the cosine
    index.add(np.ascontiguousarray(rows[rows.ok]))
    faiss.write_index(index, str(out))
    names = [str(file.relative_to(folder)) for file, good in zip(files, rows.ok, strict=True) if good]
    out.with_suffix(".json").write_text(json.dumps({"space": encoder.space, "tower": "image", "names": names}))
    return [str(error) for error in rows.errors]


def search(encoder: SafeEncoder, index_file: Path, query: str, k: int) -> list[tuple[str, float]]:
    """Names and cosines of the best matches."""
    about = json.loads(index_file.with_suffix(".json").read_text())
    if about["space"] != encoder.space:
        raise SystemExit(
            f"{index_file} holds embeddings of {about['space']}, and the query would be one of {encoder.space}: "
            "their cosines mean nothing. Index the pictures again, search with the bundle and variant of the index, or "
            "migrate the index"
        )
    index = faiss.read_index(str(index_file))
    cosines, places = index.search(np.ascontiguousarray(encoder.encode_text([query], on_error="raise")), k)
    return [(about["names"][p], float(c)) for p, c in zip(places[0], cosines[0], strict=True) if p >= 0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["index", "search"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path, help="folder of pictures, or the index")
    parser.add_argument("last", help="the index to write, or the query")
    parser.add_argument("--public-key", type=Path)
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()
    with SafeEncoder.open(given.bundle, public_key=given.public_key) as encoder:
        if given.what == "index":
            for broken in build(encoder, given.source, Path(given.last)):
                print(f"left out: {broken}")
        else:
            for name, cosine in search(encoder, given.source, given.last, given.k):
                print(f"{cosine:.4f} {name}")


if __name__ == "__main__":
    main()
