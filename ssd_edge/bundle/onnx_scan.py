"""Scan an ONNX file before a runtime loads it, without the `onnx` package.

A runtime follows instructions in a model: it opens external files for weights, loads plug-ins for custom operators and
runs precompiled engines. Bundles need none of these features, so a model that uses them is refused. docs/bundle.md
gives the rules and their reasons.

Protobuf is ambiguous: repeated singular fields are merged, unknown fields are skipped, and numbers may be padded, so a
scanner and a runtime could see different models. Only the unambiguous form that every exporter writes is accepted.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as short

from ssd_edge.errors import BundleRefusedError

MAX_NODES = 5_000
MAX_FIELDS = 250_000
MAX_DEPTH = 64

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PLAIN = {"int": (_VARINT,), "float": (_FIXED32,), "double": (_FIXED64,), "bytes": (_BYTES,)}

# Message → its fields as number:type, from onnx.proto 1.23. A star means `repeated`; numbers may then be packed.
_SCHEMA = {
    "model": "1:int 2:bytes 3:bytes 4:bytes 5:int 6:bytes 7:graph 8:opset* 14:pair*",
    "graph": "1:node* 2:bytes 5:tensor* 10:bytes 11:value* 12:value* 13:value* 14:annotation* 15:sparse* 16:pair*",
    "node": "1:bytes* 2:bytes* 3:bytes 4:bytes 5:attribute* 6:bytes 7:bytes 8:bytes 9:pair*",
    "attribute": (
        "1:bytes 2:float 3:int 4:bytes 5:tensor 6:graph 7:float* 8:int* 9:bytes* 10:tensor* 11:graph* 13:bytes "
        "14:type 15:type* 20:int 22:sparse 23:sparse*"
    ),
    "tensor": (
        "1:int* 2:int 4:float* 5:int* 6:bytes* 7:int* 8:bytes 9:bytes 10:double* 11:int* 12:bytes 13:pair* 14:int "
        "16:pair*"
    ),
    "sparse": "1:tensor 2:tensor 3:int*",
    "pair": "1:bytes 2:bytes",
    "annotation": "1:bytes 2:pair*",
    "opset": "1:bytes 2:int",
    "value": "1:bytes 2:type 3:bytes 4:pair*",
    "type": "1:array 4:element 5:map 6:bytes 8:array 9:element",
    "array": "1:int 2:shape",
    "element": "1:type",
    "map": "1:int 2:type",
    "shape": "1:dimension*",
    "dimension": "1:int 2:bytes 3:bytes",
}
# Fields of onnx.proto that no bundle needs.
_REFUSED = {
    ("model", 20): "training information",
    ("model", 25): "local functions",
    ("model", 26): "a configuration of several devices",
    ("node", 10): "a configuration of several devices",
    ("attribute", 21): "a reference to a function's attribute",
    ("tensor", 3): "a tensor in segments",
    ("type", 7): "an opaque type",
}
_ONE_OF = {"type": (1, 4, 5, 8, 9), "dimension": (1, 2)}
_DTYPES = (
    *("undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16"),
    *("float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"),
)
# What a graph costs is not known before it runs; with these, it may never end.
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # and any other operator with a graph inside
# A test says nothing about the next run of a graph that draws random numbers.
_RANDOM = (b"Bernoulli", b"Multinomial", b"RandomNormal", b"RandomNormalLike", b"RandomUniform", b"RandomUniformLike")
_OWN_DOMAINS = (b"", b"ai.onnx")  # two spellings of the same domain
_OP_TYPE = re.compile(rb"[A-Za-z][A-Za-z0-9_]{0,63}")

# Field number → flat values of one message: integers, or start and end of bytes and submessages. Lists of numbers and
# names are not kept.
Fields = dict[int, "array[int]"]


@dataclass(frozen=True)
class Value:
    """An input or output. A dimension is a number, a name, or None if unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Facts:
    """Facts about a model.

    Attributes:
        opset: Version of the standard ONNX operators.
        nodes: Number of nodes, including those of subgraphs.
        op_types: Sorted unique operator types.
        inputs: Inputs of the graph without an initial value.
        outputs: Outputs of the graph.
        metadata: ``metadata_props`` of the model.
        control_flow: Those of `op_types` that may run other nodes any number of times.
    """

    opset: int
    nodes: int
    op_types: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    metadata: dict[str, str]
    control_flow: tuple[str, ...] = ()


def _compile(fields: str) -> dict[int, tuple[tuple[int, ...], str | None, bool]]:
    """Parse a schema into field number → (allowed wire types, submessage or None, True if repeated)."""
    table = {}
    for field in fields.split():
        number, kind = field.split(":")
        repeated = kind.endswith("*")
        kind = kind.rstrip("*")
        wires: tuple[int, ...] = _PLAIN.get(kind, (_BYTES,))
        if repeated and wires != (_BYTES,):
            wires = (*wires, _BYTES)
        table[int(number)] = (wires, None if kind in _PLAIN else kind, repeated)
    return table


def _signed(number: int) -> int:
    return number - 2**64 if number >> 63 else number


_TABLES = {message: _compile(fields) for message, fields in _SCHEMA.items()}


def scan(data: bytes, what: str, allow_control_flow: bool = False) -> Facts:
    """Scan an ONNX file in bounded time and memory; weights are skipped, not copied.

    Args:
        data: The file.
        what: Its name in error messages.
        allow_control_flow: Accept `CONTROL_FLOW`.

    Raises:
        BundleRefusedError: The file is not ONNX, ambiguous or too large, or needs anything except standard operators.
    """
    # ONNX Runtime treats any data with this mark as its own format.
    if data[4:8] == b"ORTM":
        raise BundleRefusedError(f"{what} has the mark of ONNX Runtime's own format ('ORTM' at byte 4)")
    facts = _Scanner(data, what).run()
    if facts.control_flow and not allow_control_flow:
        raise BundleRefusedError(
            f"{what} has control flow ({', '.join(facts.control_flow)}), which may never end; if you trust where it "
            "comes from, add --allow-control-flow"
        )
    return facts


class _Scanner:
    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._fields_read = 0
        self._nodes = 0
        self._op_types: set[str] = set()
        self._control_flow: set[str] = set()

    def _refuse(self, reason: str) -> BundleRefusedError:
        return BundleRefusedError(f"{self._what} {reason}; only a plain ONNX model may be in a bundle")

    def run(self) -> Facts:
        model = self._fields("model", 0, len(self._data))
        if 1 not in model or 7 not in model:
            raise self._refuse("is not an ONNX model: it has no " + ("ir_version" if 1 not in model else "graph"))
        opset = self._opset(model)
        # Explicit stack: the depth of recursion in Python depends on the caller.
        stack = [self._inside("model", model)]
        while stack:
            submessage = next(stack[-1], None)
            if submessage is None:
                stack.pop()
                continue
            message, fields = submessage
            if len(stack) > MAX_DEPTH:
                raise self._refuse(f"is nested deeper than {MAX_DEPTH} messages")
            if message == "node":
                self._node(fields)
            elif message == "tensor":
                self._tensor(fields)
            stack.append(self._inside(message, fields))
        if self._nodes == 0:
            raise self._refuse("has no nodes")
        graph = self._one("graph", model, 7)
        initial = {self._text(fields, 8) for fields in self._each("tensor", graph, 5)}
        inputs = [self._value(fields) for fields in self._each("value", graph, 11)]
        outputs = [self._value(fields) for fields in self._each("value", graph, 12)]
        pairs = [(self._text(pair, 1), self._text(pair, 2)) for pair in self._each("pair", model, 14)]
        if len(dict(pairs)) != len(pairs):
            raise self._refuse("has a key twice in its metadata")
        given = tuple(value for value in inputs if value.name not in initial)
        op_types, control_flow = (tuple(sorted(names)) for names in (self._op_types, self._control_flow))
        return Facts(opset, self._nodes, op_types, given, tuple(outputs), dict(pairs), control_flow)

    def _node(self, node: Fields) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._refuse(f"has more than {MAX_NODES} nodes")
        op_type, domain = self._raw(node, 4), self._raw(node, 7)
        if op_type == b"EPContext":
            raise self._refuse("has an EPContext node: an engine that was compiled elsewhere")
        if domain not in _OWN_DOMAINS:
            raise self._refuse(f"has the operator {short(op_type)} of the foreign domain {short(domain)}")
        if not _OP_TYPE.fullmatch(op_type):
            raise self._refuse(f"has a node whose operator is {short(op_type)}")
        if op_type in _RANDOM:
            raise self._refuse(f"draws random numbers ({op_type.decode()})")
        self._op_types.add(op_type.decode())
        if op_type.decode() in CONTROL_FLOW or any(
            6 in attribute or 11 in attribute for attribute in self._each("attribute", node, 5)
        ):
            self._control_flow.add(op_type.decode())

    def _tensor(self, tensor: Fields) -> None:
        # Refuse every value but 0: runtimes truncate it to 32 bits, and 1 means EXTERNAL.
        if 13 in tensor or (14 in tensor and tensor[14][0] != 0):
            raise self._refuse(f"keeps the weights of {short(self._raw(tensor, 8))} in another file")

    def _opset(self, model: Fields) -> int:
        imports = list(self._each("opset", model, 8))
        for fields in imports:
            if self._raw(fields, 1) not in _OWN_DOMAINS:
                raise self._refuse(f"needs operators of the foreign domain {short(self._raw(fields, 1))}")
        if len(imports) != 1:
            raise self._refuse(f"imports the standard operators {len(imports)} times, not once")
        version = imports[0][2][0] if 2 in imports[0] else 0
        if not 1 <= version < 2**31:
            raise self._refuse(f"names opset {version}")
        return version

    def _value(self, value: Fields) -> Value:
        name = self._text(value, 1)
        kind = self._one("type", value, 2)
        if 1 not in kind:
            raise self._refuse(f"has an input or output {short(name)} that is not a tensor")
        kind = self._one("array", kind, 1)
        number = kind[1][0] if 1 in kind else 0
        shape = None
        if 2 in kind:
            shape = tuple(
                _signed(dimension[1][0]) if 1 in dimension else self._text(dimension, 2) or None
                for dimension in self._each("dimension", self._one("shape", kind, 2), 1)
            )
        return Value(name, _DTYPES[number] if number < len(_DTYPES) else f"type {number}", shape)

    def _inside(self, message: str, fields: Fields) -> Iterator[tuple[str, Fields]]:
        """Yield the submessages of a message with their kinds."""
        for number in fields:
            inner = _TABLES[message][number][1]
            if inner is not None:
                for submessage in self._each(inner, fields, number):
                    yield inner, submessage

    def _one(self, message: str, fields: Fields, number: int) -> Fields:
        return next(self._each(message, fields, number), {})

    def _each(self, message: str, fields: Fields, number: int) -> Iterator[Fields]:
        spans = fields.get(number, ())
        return (self._fields(message, spans[at], spans[at + 1]) for at in range(0, len(spans), 2))

    def _raw(self, fields: Fields, number: int) -> bytes:
        if number not in fields:
            return b""
        start, end = fields[number]
        return self._data[start:end]

    def _text(self, fields: Fields, number: int) -> str:
        try:
            return self._raw(fields, number).decode()
        except UnicodeDecodeError as error:
            raise self._refuse(f"has a name that is not UTF-8 ({error})") from error

    def _fields(self, message: str, start: int, end: int) -> Fields:
        """Parse the fields of one message without its submessages."""
        found: Fields = {}
        table, at = _TABLES[message], start
        while at < end:
            self._fields_read += 1
            if self._fields_read > MAX_FIELDS:
                raise self._refuse(f"has more than {MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number not in table:
                known = _REFUSED.get((message, number), f"an unknown field, {short(number)}, in its {message}")
                raise self._refuse(f"has {known}" if at > 2 else "is not an ONNX model")
            wires, inner, repeated = table[number]
            if wire not in wires:
                raise self._refuse(f"has wire type {wire} in field {number} of its {message}, not {wires[0]}")
            if number in found and not repeated:
                raise self._refuse(f"has field {number} of a {message} twice, which readers merge or drop")
            if number not in found:
                found[number] = array("Q")
            values: tuple[int, ...] = ()
            if wire == _VARINT:
                value, at = self._varint(at, end)
                values = (value,)
            elif wire == _BYTES:
                length, at = self._varint(at, end)
                values = (at, at + length)
                at += length
            else:
                at += 4 if wire == _FIXED32 else 8
            if at > end:
                raise self._refuse(f"ends within field {number} of its {message}")
            if inner is not None or not repeated:
                found[number].extend(values)
        if sum(number in found for number in _ONE_OF.get(message, ())) > 1:
            raise self._refuse(f"has a {message} with two values, of which readers use the last")
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Parse a number of at most 64 bits in its shortest form; return it and the position after it."""
        data, value, shift = self._data, 0, 0
        while at < end and shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (byte == 0 and shift) or value >> 64:
                    break
                return value, at
            shift += 7
        raise self._refuse(f"has a broken number at byte {at}")
