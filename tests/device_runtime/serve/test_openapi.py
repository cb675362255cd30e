"""The OpenAPI document is that of the routes, and its schemas are those of the answers."""

from __future__ import annotations

import json
import re
from typing import Any

from helpers.tiny_photos import finished, form, picture

from device_runtime.serve.openapi import OPERATIONS, SCHEMAS


def check(value: Any, schema: dict[str, Any], where: str = "") -> None:
    """Check a value with the few words of JSON Schema that the document uses."""
    if "$ref" in schema:
        check(value, SCHEMAS[schema["$ref"].rpartition("/")[2]], where)
        return
    if "anyOf" in schema:
        errors = []
        for one in schema["anyOf"]:
            try:
                check(value, one, where)
            except AssertionError as error:
                errors.append(error)
        assert len(errors) < len(schema["anyOf"]), (where, value, errors)
        return
    if "enum" in schema:
        assert value in schema["enum"], (where, value)
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    kinds["null"] = type(None)
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), (where, value, schema)
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), (where, sorted(value))
        properties = schema.get("properties", {})
        if properties and "uptime" not in value:  # the status of the service has more than that of the device
            assert set(value) <= set(properties), (where, sorted(set(value) - set(properties)))
        for key, inner in value.items():
            check(inner, properties.get(key, schema.get("additionalProperties", {})), f"{where}.{key}")
    if isinstance(value, list):
        for inner in value:
            check(inner, schema.get("items", {}), where + "[]")


def test_the_document_has_every_operation_and_no_other(client):
    found = client.get("/openapi.json").json()
    listed = {f"{method.upper()} {path}" for path, methods in found["paths"].items() for method in methods}
    assert listed == set(OPERATIONS)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert references <= set(found["components"]["schemas"])
    assert all(operation["summary"] for methods in found["paths"].values() for operation in methods.values())


def test_answers_are_as_the_document_says(client, station):
    def answer(operation: str, **options: Any) -> Any:
        method, path = operation.split()
        real = re.sub(r"{(\w+)}", lambda name: options.pop(name[1]), path)
        got = client.request(method, real, **options)
        assert got.status_code == OPERATIONS[operation].status, (operation, got.text)
        check(got.json(), OPERATIONS[operation].gives, operation)
        return got.json()

    job = answer("POST /v1/learn", files=form("wedge"), data={"label": "wedge"})
    finished(client, job)
    answer("GET /v1/jobs/{id}", id=job["id"])
    answer("POST /v1/predict", files={"image": picture("cup")})
    answer("POST /v1/predict", files={"image": picture("cup")}, data={"boxes": "[[[0, 0, 4, 4]]]"})
    for name in ("session", "status", "classes", "history", "jobs", "captures", "cameras", "tray"):
        answer(f"GET /v1/{name}")
    capture = answer("POST /v1/captures", json={"label": "more"})
    answer("POST /v1/captures/{id}/images", id=capture["id"], files=form("wedge", 2, 50))
    answer("POST /v1/rename", json={"label": "cup", "new": "mug"})
    answer("POST /v1/merge-labels", json={"labels": ["mug", "nut"], "into": "thing"})
    answer("POST /v1/forget", json={"label": "wedge"})
    answer("POST /v1/rollback", json={})
    answer("GET /v2/models/{model}", model="ssd-edge")
    check(client.post("/v1/rename", json={"label": "x", "new": "y"}).json(), SCHEMAS["Error"])


def test_the_page_needs_no_script_and_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert "://" not in page.text
    assert all(path.partition(" ")[2] in page.text for path in OPERATIONS)
    anchors = set(re.findall(r'href="#(\w+)"', page.text))
    assert anchors <= set(re.findall(r'id="([\w-]+)"', page.text))
    assert client.get("/docs/style.css").headers["content-type"].startswith("text/css")
