"""The page ``/docs``: the OpenAPI document for people, without a script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from device_runtime.serve.answers import Json
from device_runtime.serve.openapi import document

STYLE = Path(__file__).parent / "reference.css"
ORDER = ("predict", "teach", "classes", "generations", "service", "open inference protocol")


class Reference:
    """Routes of the documentation.

    Args:
        routes: The routes that are documented.
    """

    def __init__(self, routes: list[BaseRoute]) -> None:
        self._document = document(routes)
        self._page = "".join(_page(self._document))

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/openapi.json", self.document),
            Route("/docs", self.page),
            Route("/docs/style.css", self.style),
        ]

    async def document(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        return Json(self._document)

    async def page(self, request: Request) -> Response:
        """Return the page."""
        return HTMLResponse(self._page)

    async def style(self, request: Request) -> Response:
        """Return the style of the page."""
        return FileResponse(STYLE, headers={"cache-control": "no-cache"})


def _page(found: Mapping[str, Any]) -> Iterator[str]:
    title, schemas = escape(found["info"]["title"]), found["components"]["schemas"]
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: HTTP</title>'
    yield '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs/style.css"></head>'
    yield f"<body><main><h1>{title}: HTTP</h1><p>{escape(found['info']['description'])} "
    yield "A program sends the token, where one is needed, as <code>Authorization: Bearer TOKEN</code>. "
    yield 'The same as <a href="/openapi.json">OpenAPI document</a>. <a href="/">Console</a>.</p>'
    for tag in ORDER:
        yield f'<section><h2 id="{_anchor(tag)}">{escape(tag.capitalize())}</h2>'
        for path, methods in found["paths"].items():
            for method, operation in methods.items():
                if operation["tags"] == [tag]:
                    yield from _operation(path, method, operation)
        yield "</section>"
    yield '<section><h2 id="objects">Objects</h2>'
    for name, schema in schemas.items():
        yield f'<h3 id="{name}">{name}</h3>{_properties(schema)}'
    yield "</section></main></body></html>"


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<article><h3><b class="{method}">{method.upper()}</b> <code>{escape(path)}</code></h3>'
    yield f"<p>{escape(operation['summary'])}.</p>"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Takes <code>{escape(kind)}</code>{_inline(content['schema'])}</p>"
    query = {one["name"]: one["schema"] for one in operation.get("parameters", ()) if one["in"] == "query"}
    if query:
        yield f"<p>Parameters of the URL</p>{_properties({'properties': query})}"
    for status, answer in operation["responses"].items():
        if status != "default":
            kinds = answer.get("content", {"": {"schema": {}}})
            given = ", ".join(f"<code>{escape(kind)}</code>{_inline(one['schema'])}" for kind, one in kinds.items())
            yield f"<p>Gives {status} {given}</p>"
    yield "</article>"


def _inline(schema: Mapping[str, Any]) -> str:
    if "properties" in schema:
        return f" with:{_properties(schema)}"
    return "" if schema.get("format") == "binary" or not schema else f": {_kind(schema)}"


def _properties(schema: Mapping[str, Any]) -> str:
    needed, rows = schema.get("required", ()), []
    for name, one in schema.get("properties", {}).items():
        mark = "" if name in needed or not needed else " <i>optional</i>"
        rows.append(
            f"<tr><th scope=row><code>{escape(name)}</code>{mark}</th><td>{_kind(one)}</td>"
            f"<td>{escape(one.get('description', ''))}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>" if rows else "<p>{}</p>"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the type of a value in a few words of HTML."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    if kind == "object" and schema.get("properties"):
        return f"object{_properties(schema)}"
    if kind == "object" and schema.get("additionalProperties"):
        return f"object of {_kind(schema['additionalProperties'])}"
    if schema.get("format") == "binary":
        return "file"
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, escape(kind))


def _anchor(text: str) -> str:
    return text.replace(" ", "-")
