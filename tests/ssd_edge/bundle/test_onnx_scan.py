"""Tests of the ONNX rules of docs/bundle.md on models from the `onnx` package and on handwritten bytes."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from helpers import by_hand as hand

from ssd_edge import ort
from ssd_edge.bundle import onnx_scan
from ssd_edge.bundle.onnx_scan import Facts, Value, scan
from ssd_edge.errors import BundleRefusedError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

field, node = hand.field, hand.node


def refused(data: bytes) -> str:
    """Check that a model is refused and return the message."""
    with pytest.raises(BundleRefusedError) as caught:
        scan(data, "x.onnx")
    message = str(caught.value)
    assert message.startswith("x.onnx ")
    assert len(message) < 300
    return message


def graph(nodes, name="inner", inputs=(), outputs=("y",), tensors=()):
    output_info = [helper.make_tensor_value_info(o, TensorProto.FLOAT, [1]) for o in outputs]
    input_info = [helper.make_tensor_value_info(i, TensorProto.FLOAT, [1]) for i in inputs]
    return helper.make_graph(list(nodes), name, input_info, output_info, list(tensors))


def model(nodes, **more):
    imports = more.pop("opset_imports", [helper.make_opsetid("", 18)])
    return helper.make_model(graph(nodes, inputs=["x"], **more), opset_imports=imports, ir_version=8)


def nested(inner, depth=1):
    """Return `inner` nested in the branches of `depth` If nodes."""
    for _ in range(depth):
        branch = graph([inner])
        inner = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph([identity()]))
    return inner


def identity():
    return helper.make_node("Identity", ["x"], ["y"])


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def every_node(nodes):
    for parent in nodes:
        yield parent
        for attribute in parent.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from every_node(inner.node)


def checked_facts(data: bytes) -> Facts:
    """Return the facts about a model after comparing them with those that `onnx` parses."""
    parsed, facts = onnx.load_model_from_string(data), scan(data, "x.onnx", allow_control_flow=True)
    nodes = list(every_node(parsed.graph.node))
    assert facts.nodes == len(nodes)
    assert facts.op_types == tuple(sorted({each.op_type for each in nodes}))
    assert [facts.opset] == [entry.version for entry in parsed.opset_import]
    assert [value.name for value in facts.outputs] == [value.name for value in parsed.graph.output]
    assert facts.metadata == {entry.key: entry.value for entry in parsed.metadata_props}
    return facts


def test_facts_of_the_tiny_model():
    data = hand.onnx(model=field(14, field(1, "who") + field(2, "ß")))
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    assert checked_facts(data) == Facts(
        opset=18,
        nodes=3,
        op_types=("Cast", "Mul", "ReduceMean"),
        inputs=(Value("images", "uint8", ("batch", 8, 8, 3)),),
        outputs=(Value("embeddings", "float32", ("batch", 3)),),
        metadata={"who": "ß"},
    )


def test_valid_models_are_accepted():
    weights = numpy_helper.from_array(np.ones((3, 2), np.float16), "w")
    typed = helper.make_tensor("t", TensorProto.INT64, [3], [1, -1, 2**40])
    ones, places = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", 7, [1], [0])
    sparse = helper.make_sparse_tensor(ones, places, [2])
    nodes = [
        nested(identity(), 3),
        helper.make_node("Loop", ["n", "c"], ["z"], body=graph([identity()])),
        helper.make_node("Constant", [], ["k"], value=typed),
        helper.make_node("Constant", [], ["l"], sparse_value=sparse),
        helper.make_node("Constant", [], ["m"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["o"], value_strings=[b"a", b"\xff"]),
        helper.make_node("Transpose", ["x"], ["p"], perm=[0, 1, -1], domain="ai.onnx"),
    ]
    made = model(nodes, tensors=[weights, typed])
    made.metadata_props.add(key="a", value="b")
    made.graph.value_info.append(helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None))
    made.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(key="S", value="w")
    made.graph.sparse_initializer.append(sparse)
    facts = checked_facts(made.SerializeToString())
    assert {"If", "Loop", "Identity"} < set(facts.op_types)
    assert facts.control_flow == ("If", "Loop")
    both = model([identity()], opset_imports=[helper.make_opsetid("ai.onnx", 21)])
    assert checked_facts(both.SerializeToString()).opset == 21


@pytest.mark.parametrize(
    "hidden",
    [
        nested(identity(), 2),
        helper.make_node("Loop", ["n", "c"], ["z"], body=graph([identity()])),
        helper.make_node("Scan", ["x"], ["z"], body=graph([identity()]), num_scan_inputs=1),
        helper.make_node("SequenceMap", ["x"], ["z"]),  # also if what it runs is missing
        helper.make_node("OfTomorrow", ["x"], ["z"], bodies=[graph([identity()])]),
    ],
    ids=lambda node: node.op_type,
)
def test_control_flow_is_refused_unless_allowed(hidden):
    data = model([identity(), hidden]).SerializeToString()
    wanted = f"x.onnx has control flow ({hidden.op_type}), which may never end; "
    assert refused(data).startswith(wanted)
    assert scan(data, "x.onnx", allow_control_flow=True).control_flow == (hidden.op_type,)


@pytest.mark.parametrize("name", ["RandomNormalLike", "Bernoulli", "Multinomial"])
def test_random_numbers_are_refused(name):
    assert f"draws random numbers ({name})" in refused(
        model([helper.make_node(name, ["x"], ["y"])]).SerializeToString()
    )


def test_input_with_an_initializer_is_not_an_input():
    made = model([identity()], tensors=[numpy_helper.from_array(np.zeros(1, np.float32), "x")])
    assert scan(made.SerializeToString(), "x").inputs == ()


HOSTILE_NODES = {
    "foreign": (helper.make_node("Gemm", [], ["y"], domain="com.microsoft"), "the foreign domain b'com.microsoft'"),
    "case": (helper.make_node("Gemm", [], ["y"], domain="AI.ONNX"), "the foreign domain b'AI.ONNX'"),
    "engine": (helper.make_node("EPContext", [], ["y"], domain="com.microsoft"), "has an EPContext node: an engine"),
    "own engine": (helper.make_node("EPContext", [], ["y"]), "has an EPContext node: an engine that was compiled"),
    "escape": (helper.make_node("\x1b[2J", [], ["y"]), r"has a node whose operator is b'\x1b[2J'"),
    "nothing": (onnx.NodeProto(), "has a node whose operator is b''"),
    "weights": (helper.make_node("Constant", [], ["y"], value=external()), "keeps the weights of b'w' in another file"),
}


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("kind", HOSTILE_NODES)
def test_hostile_nodes_are_found_at_any_depth(kind, depth):
    bad, message = HOSTILE_NODES[kind]
    assert message in refused(model([identity(), nested(bad, depth)]).SerializeToString())
    loop = helper.make_node("Loop", ["n", "c"], ["z"], body=graph([nested(bad, depth)]))
    assert message in refused(model([loop]).SerializeToString())
    several = onnx.NodeProto(op_type="Scan")
    attribute = several.attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.extend([graph([identity()]), graph([bad])])
    assert message in refused(model([several]).SerializeToString())


def test_external_weights_are_found_everywhere():
    message = "keeps the weights of b'w' in another file"
    assert message in refused(model([identity()], tensors=[external()]).SerializeToString())
    assert message in refused(model([nested(identity())], tensors=[external()]).SerializeToString())
    inner = helper.make_node("If", ["c"], ["y"], then_branch=graph([identity()], tensors=[external()]))
    assert message in refused(model([inner]).SerializeToString())
    sparse = onnx.SparseTensorProto(indices=external(), dims=[1])
    for made in (model([identity()]), model([helper.make_node("Constant", [], ["y"], sparse_value=sparse)])):
        made.graph.sparse_initializer.append(sparse)
        assert message in refused(made.SerializeToString())
    several = onnx.NodeProto(op_type="Constant")
    several.attribute.add(name="v").tensors.extend([external()])
    assert message in refused(model([several]).SerializeToString())


@pytest.mark.parametrize("location", [1, 2, 2**32 + 1, 2**64 - 1])
def test_nondefault_data_location_is_refused(location):
    """Include 2^32 + 1, which protobuf truncates to 1 (EXTERNAL)."""
    tensor = hand.tensor("axes", 7, [2], struct.pack("<2q", 1, 2), field(14, location))
    assert "in another file" in refused(hand.onnx(tensors=[tensor]))
    if location == 2**32 + 1:
        parsed = onnx.load_model_from_string(hand.onnx(tensors=[tensor]))
        assert parsed.graph.initializer[0].data_location != TensorProto.DEFAULT
    harmless = hand.tensor("axes", 7, [2], struct.pack("<2q", 1, 2), field(14, 0))
    assert scan(hand.onnx(tensors=[harmless]), "x").nodes == 3


def test_functions_and_training_info_are_refused():
    function = helper.make_function("ai.onnx", "F", ["x"], ["y"], [identity()], [helper.make_opsetid("", 18)])
    made = model([identity()])
    made.functions.append(function)
    assert "has local functions" in refused(made.SerializeToString())
    made = model([identity()])
    made.training_info.add().algorithm.CopyFrom(graph([HOSTILE_NODES["foreign"][0]]))
    assert "has training information" in refused(made.SerializeToString())


def test_opsets():
    for domain in ("ai.onnx.ml", "com.microsoft", "local"):
        imports = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
        message = refused(model([identity()], opset_imports=imports).SerializeToString())
        assert f"needs operators of the foreign domain {domain.encode()!r}" in message
    assert "imports the standard operators 2 times" in refused(hand.onnx(opsets=(("", 18), ("ai.onnx", 17))))
    assert "imports the standard operators 0 times" in refused(hand.onnx(opsets=()))
    for version in (0, 2**31, 2**64 - 1):
        assert f"names opset {version}" in refused(hand.onnx(opsets=(("", version),)))


def test_duplicate_fields_are_refused():
    """Refuse duplicates: protobuf merges two graphs and keeps the last string, other parsers keep the first."""
    bad = field(7, field(1, node("Gemm", [], [], field(7, "com.microsoft"))))
    merged = hand.onnx(model=bad)
    assert [each.domain for each in onnx.load_model_from_string(merged).graph.node] == ["", "", "", "com.microsoft"]
    assert "has field 7 of a model twice, which readers merge or drop" in refused(merged)
    domains = node("Gemm", [], [], field(7, "com.microsoft"), field(7, ""))
    assert "has field 7 of a node twice" in refused(hand.onnx(nodes=[domains]))
    branch = field(1, "then_branch") + field(6, field(1, node("Abs", [], [])))
    twice = node("If", [], [], field(5, branch + field(6, field(1, node("Abs", [], [])))))
    assert "has field 6 of a attribute twice" in refused(hand.onnx(nodes=[twice]))
    both = field(1, field(1, 8) + field(2, "n"))
    value = field(1, "v") + field(2, field(1, field(1, 1) + field(2, both)))
    assert "has a dimension with two values" in refused(hand.onnx(graph=field(13, value)))
    value = field(1, "v") + field(2, field(1, field(1, 1)) + field(4, b""))
    assert "has a type with two values" in refused(hand.onnx(graph=field(13, value)))


def test_polyglot_of_onnx_and_ort_format_is_refused():
    """Refuse an ONNX model that ONNX Runtime would load as its own format because of its magic bytes."""
    data = hand.onnx()
    polyglot = data[:2] + field(2, "ORTM") + data[2:]
    assert polyglot[4:8] == b"ORTM"
    assert onnx.load_model_from_string(polyglot).producer_name == "ORTM"
    assert "has the mark of ONNX Runtime's own format" in refused(polyglot)
    runtime = ort.load()
    assert runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="ORT"):
        runtime.InferenceSession(polyglot, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an ONNX model: it has no ir_version"),
        (field(1, 8), "is not an ONNX model: it has no graph"),
        (b"an ONNX file", "is not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n", "is not an ONNX model"),
        (hand.onnx(model=field(99, 1)), "has an unknown field, 99, in its model"),
        (hand.onnx(model=field(2**28, 1)), "has an unknown field, 268435456, in its model"),
        (hand.onnx(graph=field(3, b"")), "has an unknown field, 3, in its graph"),
        (hand.onnx(model=b"\x3b"), "has wire type 3 in field 7 of its model, not 2"),
        (hand.onnx(model=b"\x3d1234"), "has wire type 5 in field 7 of its model, not 2"),
        (hand.onnx(model=b"\x12"), "has a broken number at byte"),
        (hand.onnx(model=b"\x12\x05abc"), "ends within field 2 of its model"),
        (hand.onnx(model=b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), "ends within field 2 of its model"),
        (hand.onnx(model=b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), "ends within field 2 of its model"),
        (hand.onnx(model=b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), "has a broken number at byte"),
        (hand.onnx(model=b"\x12" + b"\xff" * 11), "has a broken number at byte"),
        (hand.onnx(model=b"\x12\x80\x00"), "has a broken number at byte"),  # overlong encoding of 0
        (hand.onnx(model=b"\xba\x00\x00"), "has a broken number at byte"),  # overlong encoding of field 7
        (hand.onnx(graph=b"\x0a\x7f"), "ends within field 1 of its graph"),
        (hand.onnx(graph=field(12, field(1, b"\xff"))), "has a name that is not UTF-8"),
        (hand.onnx(graph=field(12, field(1, "y"))), "has an input or output 'y' that is not a tensor"),
        (hand.onnx(model=field(14, field(1, "k")) * 2), "has a key twice in its metadata"),
        (hand.onnx(nodes=[]), "has no nodes"),
    ],
)
def test_malformed_models_are_refused(data, message):
    assert message in refused(data)


def test_limits():
    single = field(1, node("Abs", ["x"], ["y"]))
    assert scan(hand.onnx(graph=single * (onnx_scan.MAX_NODES - 3)), "x").nodes == onnx_scan.MAX_NODES
    assert f"has more than {onnx_scan.MAX_NODES} nodes" in refused(hand.onnx(graph=single * (onnx_scan.MAX_NODES - 2)))
    many = node("Concat", [""] * onnx_scan.MAX_FIELDS, ["y"])
    assert f"has more than {onnx_scan.MAX_FIELDS} fields" in refused(hand.onnx(nodes=[many]))
    deep = b""
    for _ in range(2000):
        deep = node("If", [], [], field(5, field(6, field(1, deep or node("Abs", [], [])))))
    assert f"is nested deeper than {onnx_scan.MAX_DEPTH} messages" in refused(hand.onnx(nodes=[deep]))
    kind = field(1, field(1, 1))
    for _ in range(2000):
        kind = field(4, field(1, kind))
    assert "is nested deeper" in refused(hand.onnx(graph=field(13, field(2, kind))))


def test_scanning_weights_takes_no_memory_or_time():
    weights = hand.tensor("quarter", 1, [3], bytes(40_000_000))
    data = hand.onnx(tensors=[weights])
    tracemalloc.start()
    try:
        start = time.perf_counter()
        scan(data, "x")
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert seconds < 0.5  # about 0.5 ms on a desktop CPU


def test_accepted_mutants_are_valid_onnx():
    """Every mutant that the scanner accepts is parsed by `onnx` to the same operators and breaks no rule."""
    valid = model([nested(identity(), 2)], tensors=[numpy_helper.from_array(np.ones(2, np.float32), "w")])
    seeds, rng, accepted = (valid.SerializeToString(), hand.onnx()), random.Random(0), 0
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                other = rng.randrange(len(data))
                data[at : at + rng.randint(0, 8)] = data[other : other + rng.randint(0, 8)]
        try:
            facts = scan(bytes(data), "x.onnx")
        except BundleRefusedError:
            continue
        accepted += 1
        parsed = onnx.load_model_from_string(bytes(data))
        nodes = list(every_node(parsed.graph.node))
        assert (facts.nodes, set(facts.op_types)) == (len(nodes), {each.op_type for each in nodes})
        assert {each.domain for each in nodes} <= {"", "ai.onnx"}
        assert not parsed.functions
        assert all(not tensor.external_data and not tensor.data_location for tensor in parsed.graph.initializer)
    assert accepted > 100
