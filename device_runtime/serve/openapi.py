"""The OpenAPI document of the service: its routes, with their docstrings as summaries, and what they take and give."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from device_runtime import results
from ssd_edge.system import VERSION

Schema = dict[str, Any]
JSON, FORM, BYTES = "application/json", "multipart/form-data", "application/octet-stream"
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
FILE: Schema = {"type": "string", "format": "binary"}
FILES: Schema = {"type": "array", "items": FILE, "description": "one or several image files"}
HIDDEN = ("/", "/docs", "/docs/style.css", "/openapi.json")  # pages


def nullable(schema: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": schema}


def fields(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Return the schema of an object."""
    found: Schema = {"type": "object", "properties": {**required, **(optional or {})}}
    return {**found, "required": list(required)} if required else found


def named(name: str) -> Schema:
    """Return a reference to a schema of `components`."""
    return {"$ref": f"#/components/schemas/{name}"}


def schema_of(kind: Any) -> Schema:
    """Return the schema of the JSON value of a type: dataclasses, lists, mappings, unions and plain values."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        own = {field.metadata.get("key", field.name): field for field in dataclasses.fields(kind)}
        needed = [key for key, field in own.items() if not field.metadata.get("optional")]
        values = {key: schema_of(hints[field.name]) for key, field in own.items()}
        return {"type": "object", "properties": values, "required": needed}
    if origin in (typing.Union, types.UnionType):
        rest = [one for one in inner if one is not type(None)]
        found = schema_of(rest[0]) if len(rest) == 1 else {"anyOf": [schema_of(one) for one in rest]}
        return nullable(found) if len(rest) < len(inner) else found
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(inner[1])}
    if origin is not None and issubclass(origin, Sequence | tuple):
        return listed(schema_of(inner[0]))
    return {str: TEXT, int: WHOLE, float: NUMBER, bool: FLAG}.get(kind, {})


FORGETTING = {"max_forgetting": {**NUMBER, "description": "share, 0 to 0.1: refuse a change that costs others more"}}
PREDICTION = fields(
    {
        "image": TEXT,
        "label": {**TEXT, "description": "name of a class, or unknown"},
        "score": {**nullable(NUMBER), "description": "probability that nearest is right, if the class is known"},
        "generation": WHOLE,
        "nearest": {**TEXT, "description": "best class, even if the image is unknown"},
        "margin": {**NUMBER, "description": "cosine above the threshold of that class; negative for unknown"},
    },
    {"box": {**listed(NUMBER), "description": "x0, y0, x1, y1"}},
)
ERROR = fields({"error": {**TEXT, "description": "one sentence"}, "code": {**WHOLE, "description": "exit code"}})
TENSOR = fields(
    {"name": TEXT, "datatype": TEXT, "shape": listed(WHOLE)}, {"data": listed({}), "parameters": fields({})}
)
SCHEMAS: dict[str, Schema] = {
    "Error": ERROR,
    "Prediction": PREDICTION,
    "Predictions": fields({"generation": WHOLE, "predictions": listed(named("Prediction"))}),
    "Class": fields(
        {
            "name": TEXT,
            "images": {**WHOLE, "description": "images that it was taught with"},
            "origin": {"enum": ["bundle", "device"]},
            "recognised": nullable(fields({"images": WHOLE, "right": WHOLE})),
            "confused": listed(fields({"with": TEXT, "images": WHOLE})),
        }
    ),
    "Classes": fields({"generation": WHOLE, "classes": listed(named("Class"))}),
    "Job": fields(
        {
            "id": TEXT,
            "kind": {"const": "learn"},
            "label": TEXT,
            "state": {"enum": ["waiting", "running", "done", "refused", "failed", "cancelled"]},
            "stage": TEXT,
            "share": {**NUMBER, "description": "0 to 1"},
            "seconds_left": nullable(NUMBER),
            "result": nullable(named("LearnResult")),
            "error": nullable(named("Error")),
        }
    ),
    "Capture": fields(
        {
            "id": TEXT,
            "label": TEXT,
            "new": {**FLAG, "description": "true if the device does not know the class"},
            "camera": nullable(TEXT),
            "state": {"enum": ["collecting", "held", "learning", "done"]},
            "images": WHOLE,
            "different": {**WHOLE, "description": "images that count: different views"},
            "needed": {**WHOLE, "description": "different views that a learn needs"},
            "most": {**WHOLE, "description": "images that it may hold"},
            "hint": {"enum": ["", "turn", "full", "preparing"]},
            "job": nullable(TEXT),
            "expires_in": {**NUMBER, "description": "seconds"},
        }
    ),
    "Camera": fields(
        {
            "id": TEXT,
            "source": TEXT,
            "state": {"enum": ["starting", "running", "lost", "ended"]},
            "problem": TEXT,
            "frames": WHOLE,
            "fps": NUMBER,
            "latency_ms": nullable(NUMBER),
            "answer": nullable(fields({})),
        }
    ),
    "Moment": fields(
        {
            "id": TEXT,
            "camera": TEXT,
            "at": NUMBER,
            "age": {**NUMBER, "description": "seconds"},
            "label": TEXT,
            "nearest": TEXT,
            "score": nullable(NUMBER),
            "frames": WHOLE,
        }
    ),
    "Model": fields(
        {
            "name": TEXT,
            "versions": {**listed(TEXT), "description": "generations"},
            "platform": TEXT,
            "inputs": listed(TENSOR),
            "outputs": listed(TENSOR),
            "parameters": fields({}),
        }
    ),
    "Infer": fields(
        {"inputs": listed(TENSOR)}, {"id": TEXT, "outputs": listed(fields({"name": TEXT})), "parameters": fields({})}
    ),
    "Inferred": fields({"model_name": TEXT, "model_version": TEXT, "outputs": listed(TENSOR)}, {"id": TEXT}),
    **{
        kind.__name__: schema_of(kind)
        for kind in (
            results.LearnResult,
            results.RenameResult,
            results.ForgetResult,
            results.MergeLabelsResult,
            results.MergeResult,
            results.RollbackResult,
            results.Status,
            results.History,
        )
    },
}


@dataclasses.dataclass(frozen=True)
class _Operation:
    """Description of what an operation takes and gives.

    Attributes:
        gives: Schema of its answer, or its media type.
        takes: Media type → schema of its body.
        query: Name → schema of its parameters.
        status: Status of its answer.
    """

    gives: Schema | str
    takes: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    query: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    status: int = 200


def _json(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> dict[str, Schema]:
    return {JSON: fields(required, optional)}


_TENSORS = {JSON: named("Infer"), BYTES: FILE}
OPERATIONS: dict[str, _Operation] = {
    "GET /v1/session": _Operation(fields({"token_needed": FLAG, "signed_in": FLAG, "version": TEXT}, {"device": TEXT})),
    "POST /v1/session": _Operation(fields({"signed_in": FLAG}), _json({"token": TEXT})),
    "DELETE /v1/session": _Operation(fields({"signed_in": FLAG})),
    "POST /v1/predict": _Operation(
        named("Predictions"),
        {
            FORM: fields({"image": FILES}, {"boxes": {**TEXT, "description": "JSON: per image a list of boxes"}}),
            "image/jpeg": FILE,
        },
        {"reject": {**FLAG, "description": "false: always name the nearest class, never unknown"}},
    ),
    "GET /v1/status": _Operation(named("Status")),
    "GET /v1/classes": _Operation(named("Classes")),
    "GET /v1/history": _Operation(named("History")),
    "POST /v1/learn": _Operation(
        named("Job"),
        {
            FORM: fields({"label": TEXT, "image": FILES}, FORGETTING),
            JSON: fields({"label": TEXT}, {"camera": nullable(TEXT), "frames": WHOLE, "every": NUMBER, **FORGETTING}),
        },
        status=202,
    ),
    "GET /v1/jobs": _Operation(fields({"jobs": listed(named("Job"))})),
    "GET /v1/jobs/{id}": _Operation(named("Job")),
    "DELETE /v1/jobs/{id}": _Operation(named("Job")),
    "POST /v1/rename": _Operation(named("RenameResult"), _json({"label": TEXT, "new": TEXT})),
    "POST /v1/forget": _Operation(named("ForgetResult"), _json({"label": TEXT}, {"exactly": FLAG, **FORGETTING})),
    "POST /v1/merge-labels": _Operation(
        named("MergeLabelsResult"), _json({"labels": listed(TEXT), "into": TEXT}, FORGETTING)
    ),
    "POST /v1/rollback": _Operation(named("RollbackResult"), _json({}, {"generation": nullable(WHOLE)})),
    "POST /v1/export": _Operation(BYTES, _json({}, {"history": FLAG})),
    "POST /v1/merge": _Operation(named("MergeResult"), {BYTES: FILE}),
    "GET /v1/captures": _Operation(fields({"captures": listed(named("Capture"))})),
    "POST /v1/captures": _Operation(named("Capture"), _json({"label": TEXT}, {"camera": nullable(TEXT)}), status=201),
    "GET /v1/captures/{id}": _Operation(named("Capture")),
    "DELETE /v1/captures/{id}": _Operation("", status=204),
    "POST /v1/captures/{id}/hold": _Operation(named("Capture")),
    "POST /v1/captures/{id}/resume": _Operation(named("Capture")),
    "POST /v1/captures/{id}/images": _Operation(named("Capture"), {FORM: fields({"image": FILES})}),
    "POST /v1/captures/{id}/tray": _Operation(named("Capture"), _json({"ids": listed(TEXT)})),
    "POST /v1/captures/{id}/learn": _Operation(named("Job"), _json({}, FORGETTING), status=202),
    "GET /v1/cameras": _Operation(fields({"cameras": listed(named("Camera"))})),
    "GET /v1/cameras/{id}/frame.jpg": _Operation("image/jpeg"),
    "GET /v1/cameras/{id}/live.mjpeg": _Operation("multipart/x-mixed-replace"),
    "GET /v1/tray": _Operation(fields({"tray": listed(named("Moment"))})),
    "GET /v1/tray/{id}.jpg": _Operation("image/jpeg"),
    "DELETE /v1/tray/{id}": _Operation("", status=204),
    "GET /v1/events": _Operation("text/event-stream"),
    "GET /metrics": _Operation("text/plain"),
    "GET /v2": _Operation(fields({"name": TEXT, "version": TEXT, "extensions": listed(TEXT)})),
    "GET /v2/health/live": _Operation(fields({"live": FLAG})),
    "GET /v2/health/ready": _Operation(fields({"ready": FLAG})),
    **{
        f"{method} /v2/models/{{model}}{version}{action}": _Operation(gives, takes)
        for version in ("", "/versions/{version}")
        for method, action, gives, takes in (
            ("GET", "", named("Model"), {}),
            ("GET", "/ready", fields({"name": TEXT, "ready": FLAG}), {}),
            ("POST", "/infer", named("Inferred"), _TENSORS),
        )
    },
}


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of some routes.

    Args:
        routes: The routes; those in `HIDDEN` are left out.

    Raises:
        KeyError: `OPERATIONS` does not know one of them.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route) or route.path in HIDDEN:
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path, {})[method.lower()] = _described(route, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SSD-Edge device",
            "version": VERSION,
            "description": "Predict, teach and undo on a device. Errors are objects with a sentence and an exit code.",
        },
        "security": [{"token": []}, {}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(route: Route, method: str) -> dict[str, Any]:
    operation = OPERATIONS[f"{method} {route.path}"]
    text = re.sub(r"``(.+?)``", r"\1", " ".join((route.endpoint.__doc__ or "").split()))
    inside = [
        {"name": name, "in": "path", "required": True, "schema": TEXT} for name in re.findall(r"{(\w+)}", route.path)
    ]
    query = [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    answer: dict[str, Any] = {"description": "done"}
    if operation.gives:
        raw = isinstance(operation.gives, str)
        kind, schema = (operation.gives, FILE) if raw else (JSON, operation.gives)
        answer["content"] = {kind: {"schema": schema}}
    found: dict[str, Any] = {
        "summary": text.rstrip("."),
        "tags": ["open inference protocol" if route.path.startswith("/v2") else _tag(route.path)],
        "responses": {
            str(operation.status): answer,
            "default": {"description": "refused", "content": {JSON: {"schema": named("Error")}}},
        },
    }
    if inside or query:
        found["parameters"] = [*inside, *query]
    if operation.takes:
        content = {kind: {"schema": schema} for kind, schema in operation.takes.items()}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _tag(path: str) -> str:
    word = path.removeprefix("/v1/").partition("/")[0]
    groups = {
        "predict": ("predict",),
        "teach": ("learn", "jobs", "captures", "tray", "cameras"),
        "classes": ("classes", "rename", "forget", "merge-labels"),
        "generations": ("history", "rollback", "export", "merge"),
    }
    return next((tag for tag, words in groups.items() if word in words), "service")
