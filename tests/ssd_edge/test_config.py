"""Strict configuration: accepted values, and messages for refused ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ssd_edge.config import (
    DataConfig,
    PretrainConfig,
    StreamConfig,
    TrainConfig,
    merge,
    parse,
    parse_section,
    read_yaml,
    setting,
    to_tree,
)
from ssd_edge.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sample:
    """Settings with one field of every type."""

    count: int = setting(3, "why", minimum=1, maximum=9)
    rate: float = setting(0.5, "why", above=0.0, maximum=1.0)
    on: bool = setting(True, "why")
    name: str = setting("x", "why")
    kind: Literal["auto", "cpu"] = setting("auto", "why")
    level: Literal[1, 2] = setting(1, "why")
    sizes: tuple[int, ...] = setting((1,), "why", minimum=0)
    top_n: int | float | str = setting(10, "why")


def sample(**values: Any) -> Sample:
    return parse_section(Sample, values, "s")


@pytest.mark.parametrize("config", [TrainConfig(), PretrainConfig()])
def test_defaults_survive_a_round_trip(config: Any) -> None:
    tree = yaml.safe_load(yaml.safe_dump(to_tree(config)))
    assert parse(type(config), tree) == config
    assert parse(type(config), {}) == config


@pytest.mark.parametrize("config", [TrainConfig, PretrainConfig])
def test_every_default_has_a_reason_and_is_in_range(config: Any) -> None:
    for section in dataclasses.fields(config):
        if section.name == "learner":
            continue
        value = getattr(config(), section.name)
        assert all(field.metadata["why"] for field in dataclasses.fields(value))
        assert parse_section(type(value), dataclasses.asdict(value), section.name) == value


def test_values_are_converted_to_the_type_of_the_field() -> None:
    assert sample(count="7", rate="1e-3", on="off", name=5, sizes="1, 2,3", level="2", top_n="12") == Sample(
        7, 0.001, False, "5", "auto", 2, (1, 2, 3), 12
    )
    assert sample(rate=1).rate == 1.0
    assert sample(sizes=[4, "5"]).sizes == (4, 5)
    assert [sample(top_n=value).top_n for value in ("0.1", 0.1, "1.0k")] == [0.1, 0.1, "1.0k"]
    assert sample(on="Yes").on is True


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cuont", 1, r"^unknown key 's\.cuont'\. Did you mean 'count'\? Known: count, rate, "),
        (7, 1, r"^unknown key 's\.7'\. Known: count"),
        ("count", 2.5, r"^s\.count must be a whole number, but is 2\.5$"),
        ("count", "many", r"^s\.count must be a whole number, but is 'many'$"),
        ("count", True, r"^s\.count must be a whole number, but is True$"),
        ("count", None, r"^s\.count must be a whole number, but is None$"),
        ("count", 0, r"^s\.count must be at least 1, but is 0$"),
        ("count", 10, r"^s\.count must be at most 9, but is 10$"),
        ("rate", 0, r"^s\.rate must be greater than 0\.0, but is 0\.0$"),
        ("rate", "nan", r"^s\.rate must be a finite number, but is nan$"),
        ("rate", float("inf"), r"^s\.rate must be a finite number, but is inf$"),
        ("rate", 10**400, r"^s\.rate must be a number, but is 1000"),
        ("rate", [1], r"^s\.rate must be a number, but is \[1\]$"),
        ("on", 1, r"^s\.on must be true or false, but is 1$"),
        ("on", "maybe", r"^s\.on must be true or false, but is 'maybe'$"),
        ("name", True, r"^s\.name must be text, but is True$"),
        ("name", ["a"], r"^s\.name must be text, but is \['a'\]$"),
        ("kind", "cup", r"^s\.kind must be one of auto, cpu, but is 'cup'\. Did you mean 'cpu'\?$"),
        ("kind", ["cpu"], r"^s\.kind must be one of auto, cpu, but is \['cpu'\]"),
        ("sizes", 5, r"^s\.sizes must be a list of a whole number, but is 5$"),
        ("sizes", [1, "x"], r"^s\.sizes must be a whole number, but is 'x'$"),
        ("sizes", [1, -1], r"^s\.sizes must be at least 0, but is -1$"),
        ("top_n", [1], r"^s\.top_n must be a whole number or a number or text, but is \[1\]$"),
    ],
)
def test_refused_values(key: Any, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_section(Sample, {key: value}, "s")


def test_sections() -> None:
    config = parse(TrainConfig, {"data": {"path": "a", "classes": ["x", 1]}, "learner": {"k": 5}})
    assert config.data == DataConfig(path="a", classes=("x", "1"))
    assert config.learner == {"name": "slda", "k": 5}  # the learner checks it
    assert config.stream == StreamConfig()
    assert parse(TrainConfig, {"data": None, "learner": None}) == TrainConfig()  # all keys are commented out
    with pytest.raises(InputError, match=r"^unknown section 'dta'\. Did you mean 'data'\? Known: data, "):
        parse(TrainConfig, {"dta": {}})
    with pytest.raises(InputError, match=r"^unknown section '5'\. Known: data"):
        parse(TrainConfig, {5: {}})
    for section in ("data", "learner"):
        with pytest.raises(InputError, match=rf"^the section '{section}' must be a mapping .*, but is 'x'$"):
            parse(TrainConfig, {section: "x"})


@pytest.mark.parametrize(
    "text", ["007", "1.10", "no", "null", "1:30", "my folder #2", "a: b", "2024-13-40", "'x'", "[x", "- a"]
)
def test_arguments_for_text_fields_are_kept_verbatim(text: str) -> None:
    """YAML would read them as a number, boolean, comment, mapping or date, or fail."""
    assert parse(TrainConfig, merge({}, [f"data.path={text}"])).data.path == text


def test_arguments_override_the_file_and_are_parsed_by_type() -> None:
    tree = {"data": {"path": "a", "test_fraction": 0.5}, "stream": None}
    args = ["data.path=b=c", "data.classes=[cat, 'big dog', no]", "data.exclude=x,y"]
    args += ["run.panel=false", "stream.tasks=4"]
    config = parse(TrainConfig, merge(tree, args))
    assert config.data == DataConfig("b=c", 0.5, ("cat", "big dog", "no"), ("x", "y"))
    assert config.run.panel is False
    assert config.stream.tasks == 4
    assert tree == {"data": {"path": "a", "test_fraction": 0.5}, "stream": None}
    assert parse(TrainConfig, merge({}, ["data.classes="])).data.classes == ()


@pytest.mark.parametrize("arg", ["data.path", "path=x", "=x", "data.=x", ".path=x", ""])
def test_malformed_arguments_are_refused(arg: str) -> None:
    with pytest.raises(InputError, match=rf"^'{arg}' is not of the form section\.key=value, e\.g\. data"):
        merge({}, [arg])


def test_an_argument_for_a_section_that_is_not_a_mapping() -> None:
    with pytest.raises(InputError, match="the section 'data' must be a mapping of keys to values, but is 5"):
        merge({"data": 5}, ["data.path=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: {path: x", "is not valid YAML: "),
        (b"data: \xff", "is not valid YAML: "),
        (b"data: {path: 2024-13-40}", "is not valid YAML: month must be in 1..12"),
        (b"- a\n- b\n", r"must contain sections \(data:, learner:, …\), but contains \['a', 'b'\]"),
        (b"!!python/object/apply:os.system [ls]", "is not valid YAML: could not determine a constructor"),
        (b"[" * 5000, "is not valid YAML: "),
    ],
)
def test_invalid_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match=rf"c\.yaml {message}"):
        read_yaml(tmp_path / "c.yaml")


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(InputError, match=r"c\.yaml cannot be read \(No such file or directory\)"):
        read_yaml(path)
    path.write_text("# nothing but a comment\n")
    assert read_yaml(path) == {}
    path.write_text("data:\n  path: ü\n  # classes: [a]\nrun:\n", encoding="utf-8")
    assert read_yaml(path) == {"data": {"path": "ü"}, "run": None}


@pytest.mark.parametrize("form", ["data: {{path: {}}}", "{}", "data: {}"])
def test_aliases_are_refused(form: str, tmp_path: Path) -> None:
    """Thirty short lists of aliases make a value of a billion parts, which no message could show."""
    lists = ["&a0 [x, x]", *(f"&a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 30))]
    path = tmp_path / "c.yaml"
    path.write_text(form.format("[" + ", ".join(lists) + "]"))
    with pytest.raises(InputError, match=r"c\.yaml is not valid YAML: an alias \(\*\) is not supported: repeat it"):
        read_yaml(path)
    merged = merge({}, ["data.path=[" + ", ".join(lists) + "]"])
    assert isinstance(merged["data"]["path"], str)


def test_large_configurations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: " + "1:" * 60_000 + "1")  # a number to the base 60 with 60,000 digits
    with pytest.raises(InputError, match=r"c\.yaml has more than 50,000 bytes; is it the right file\?"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: !!timestamp 2", "a: " + "9" * 5000, "[" * 3000])
def test_whatever_a_loader_raises_is_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml is not valid YAML: ") as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 500
