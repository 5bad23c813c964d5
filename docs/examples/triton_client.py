"""Embeddings from a Triton server that serves the repository of `uwm-deploy triton`.

    python triton_client.py localhost:8001 --bundle dist/demo --text "a red circle" --image photo.jpg

Before the first request it asks the server which bundle it serves (the parameter `uwm_bundle_sha256` of the models) and
refuses another one than the bundle at hand.
"""

from __future__ import annotations

import argparse
import hashlib
import uuid
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def check_bundle(client: triton.InferenceServerClient, bundle: Path) -> None:
    """Raises unless both models come from this bundle."""
    wanted = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    for model in ("clip_image", "clip_text"):
        parameters = client.get_model_config(model).config.parameters
        served = parameters["uwm_bundle_sha256"].string_value if "uwm_bundle_sha256" in parameters else "nothing"
        if served.removeprefix("sha256:") != wanted:
            raise SystemExit(f"{model} on the server is of bundle {served}, not {wanted}")


def embed(client: triton.InferenceServerClient, model: str, name: str, items: list[bytes]) -> np.ndarray:
    """(n, d) rows of length 1; one item per row, as bytes."""
    rows = triton.InferInput(name, [len(items), 1], "BYTES")
    rows.set_data_from_numpy(np.array([[item] for item in items], dtype=np.object_))
    answer = client.infer(model, [rows], request_id=str(uuid.uuid4()))  # some servers insist on an id
    found: np.ndarray = answer.as_numpy("EMBEDDING")
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url", help="host:port of the gRPC endpoint")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--image", action="append", default=[], type=Path)
    given = parser.parse_args()
    with triton.InferenceServerClient(given.url) as client:
        check_bundle(client, given.bundle)
        if given.text:
            print(embed(client, "clip_text", "TEXT", [text.encode() for text in given.text]))
        if given.image:
            print(embed(client, "clip_image", "IMAGE", [path.read_bytes() for path in given.image]))


if __name__ == "__main__":
    main()
