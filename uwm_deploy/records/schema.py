"""JSON Schema (2020-12) of the project's JSON files, generated from the records that they hold.

``python -m uwm_deploy.records.schema verdict`` prints one of them; docs/schema/ holds those that other programs read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.model import SCHEMA_VERSION
from uwm_deploy.records.shape import Choice, Enumeration, Items, Options, Record, Scalar, Shape, Table, fields_of
from uwm_deploy.records.verdict import Baseline, Verdict

PUBLISHED: Mapping[str, type] = {"verdict": Verdict, "verify": VerifyReport, "baseline": Baseline}
"""Name of a file (without ``.json``) to its record; their schemas are docs/schema/<name>.schema.json."""

_SCALARS: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_of(record: type) -> dict[str, Any]:
    """Schema of the file that holds a record; unknown keys are refused, as by the reader."""
    definitions: dict[str, Any] = {}
    body = _object_of(record, definitions)
    body["properties"] |= {"schema_version": {"const": SCHEMA_VERSION}, "record": {"const": record.__name__}}
    body["required"] += ["schema_version", "record"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": record.__name__,
        **body,
        "$defs": dict(sorted(definitions.items())),
    }


def text_of(record: type) -> str:
    """The schema as the file that docs/schema/ holds."""
    return json.dumps(schema_of(record), indent=1, ensure_ascii=False) + "\n"


def _object_of(record: type, definitions: dict[str, Any]) -> dict[str, Any]:
    fields = fields_of(record)
    return {
        "type": "object",
        "description": (record.__doc__ or "").split("\n\n")[0].strip(),
        "properties": {name: _schema(shape, definitions) for name, shape in fields.shapes.items()},
        "required": list(fields.required),
        "additionalProperties": False,
    }


def _schema(shape: Shape, definitions: dict[str, Any]) -> dict[str, Any]:
    match shape:
        case Record(kind, name):
            if name not in definitions:
                definitions[name] = {}  # a record that holds itself ends here
                definitions[name] = _object_of(kind, definitions)
            return {"$ref": f"#/$defs/{name}"}
        case Options():
            return {"anyOf": [_schema(part, definitions) for part in shape.parts]}
        case Items():
            return _array_of(shape, definitions)
        case Table(item):
            return {"type": "object", "additionalProperties": _schema(item, definitions)}
        case Choice() | Enumeration():
            return {"enum": list(shape.values)}
        case Scalar(kind):
            return {"type": _SCALARS[kind]}


def _array_of(shape: Items, definitions: dict[str, Any]) -> dict[str, Any]:
    parts = [_schema(part, definitions) for part in shape.parts]
    if shape.repeated:
        return {"type": "array", "items": parts[0]}
    return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}


if __name__ == "__main__":
    sys.stdout.write(text_of(PUBLISHED[sys.argv[1]]))
