"""JSON Schema (2020-12) of the project's JSON files, generated from the records that they hold.

``python -m uwm_deploy.records.schema verdict`` prints one of them; docs/schema/ holds those that other programs read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.model import SCHEMA_VERSION
from uwm_deploy.records.verdict import Baseline, Verdict

PUBLISHED: Mapping[str, type] = {"verdict": Verdict, "verify": VerifyReport, "baseline": Baseline}
"""Name of a file (without ``.json``) to its record; their schemas are docs/schema/<name>.schema.json."""

_SCALARS: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


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


def _object_of(record: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(record)
    fields = dataclasses.fields(record)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {
        "type": "object",
        "description": (record.__doc__ or "").split("\n\n")[0].strip(),
        "properties": {f.name: _schema(hints[f.name], definitions) for f in fields},
        "required": required,
        "additionalProperties": False,
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # a record that holds itself ends here
            definitions[kind.__name__] = _object_of(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part, definitions) for part in arguments]}
    if origin is tuple:
        return _array_of(arguments, definitions)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": "null"} if kind is type(None) else {"type": _SCALARS[kind]}


def _array_of(arguments: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    parts = [_schema(part, definitions) for part in arguments]
    return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}


if __name__ == "__main__":
    sys.stdout.write(text_of(PUBLISHED[sys.argv[1]]))
