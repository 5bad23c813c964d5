"""A bundle whose tokenizer knows a token that the model has no embedding for, as a user's own checkpoint may."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.records.codec import json_from_record, read_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes

TOKEN = "\N{CIRCLED DIVISION SLASH}"
"""The token; captions that have it have an id without an embedding."""


def with_a_strange_token(bundle: Path, out: Path, *, older: bool) -> Path:
    """Writes the bundle again with the token.

    Args:
        bundle: An honest one.
        out: Where to.
        older: Whether it says nothing of the number of embeddings, as those of older releases; then the engine has to.
    """
    manifest = open_bundle(bundle).manifest
    body, spec = json.loads((bundle / BundleLayout.TOKENIZER).read_text(encoding="utf-8")), manifest.model.text
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    body["added_tokens"].append({"id": spec.vocabulary, "content": TOKEN, **flags})
    content = json.dumps(body).encode()
    text = dataclasses.replace(
        spec, tokenizer_digest=digest_of_bytes(content), vocabulary=0 if older else spec.vocabulary
    )
    model = dataclasses.replace(manifest.model, text=text)
    report = dataclasses.replace(read_record(VerifyReport, bundle / BundleLayout.REPORT), model=model)
    edit = dataclasses.replace(manifest.edit, model=model)
    reported = json_from_record(report).encode()
    verdict = dataclasses.replace(manifest.verdict, report_digest=digest_of_bytes(reported))
    parts: dict[str, Path | bytes] = {file.path: bundle / file.path for file in manifest.files}
    parts |= {BundleLayout.TOKENIZER: content, BundleLayout.REPORT: reported}
    parts |= {
        name: json_from_record(record).encode()
        for name, record in ((BundleLayout.EDIT, edit), (BundleLayout.VERDICT, verdict))
    }
    bundle_from_parts(out, dataclasses.replace(manifest, model=model, edit=edit, verdict=verdict), parts)
    return out
