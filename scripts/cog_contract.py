"""What `cog build` reads of train.py and predict.py: their signatures as text, never imported.

`inputs` parses them by its rules, `problems` finds what would fail a build or change an input in silence, and
`openapi_schema` is the schema that the local server validates with, where `cog build` would have written it.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Path": "string", "Secret": "string"}
# How `cog build` writes an option of Input() into the schema; accept since https://github.com/replicate/cog/pull/2863.
_SCHEMA_NAMES = {
    "ge": "minimum",
    "le": "maximum",
    "choices": "enum",
    "description": "description",
    "accept": "x-cog-accept",
}


@dataclass(frozen=True)
class CogInput:
    """One input of a signature, as text."""

    name: str
    type: str
    optional: bool
    options: dict[str, ast.expr]

    def literal(self, option: str) -> Any:
        """Return the value of one of its options."""
        return ast.literal_eval(self.options[option])

    @property
    def required(self) -> bool:
        """Whether a caller must give it."""
        return "default" not in self.options


def entry_point(source: str) -> ast.FunctionDef:
    """Return the top-level function `train`, or the method `Predictor.predict`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            return node
        if isinstance(node, ast.ClassDef) and node.name == "Predictor":
            return next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "predict")
    raise AssertionError("no entry point")


def inputs(source: str) -> list[CogInput]:
    """Return the inputs of an entry point's signature, in their order."""
    function = entry_point(source)
    arguments = [argument for argument in function.args.args if argument.arg != "self"]
    found = []
    for argument, default in zip(arguments, function.args.defaults, strict=True):
        annotation = argument.annotation
        optional = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Optional"
        kind = ast.unparse(annotation.slice if isinstance(annotation, ast.Subscript) and optional else annotation)  # type: ignore[arg-type]
        assert isinstance(default, ast.Call), argument.arg
        assert ast.unparse(default.func) == "Input", argument.arg
        options = {str(keyword.arg): keyword.value for keyword in default.keywords}
        found.append(CogInput(argument.arg, kind, optional, options))
    return found


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def problems(source: str) -> list[str]:  # noqa: PLR0912 (a list of rules, one after the other)
    """Return each rule of the contract that the source breaks."""
    found = []
    function = entry_point(source)
    if function.decorator_list:
        found.append(f"{function.name} has a decorator: omitted inputs would arrive as FieldInfo")
    if function.args.kwonlyargs or function.args.vararg or function.args.kwarg:
        found.append(f"{function.name} takes keyword-only or variable arguments")
    if function.returns is None or ast.unparse(function.returns).startswith("Optional"):
        found.append(f"{function.name} needs a plain return annotation")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "cog":
            found += [f"cog.{name.name} is renamed" for name in node.names if name.asname]
    for item in inputs(source):
        if item.type not in TYPES:
            found.append(f"{item.name}: type {item.type}")
        for option in ("default", "ge", "le", "choices"):
            if option in item.options and not _is_literal(item.options[option]):
                found.append(f"{item.name}: {option} is no plain literal")
        description = item.options.get("description")
        if not (isinstance(description, ast.Constant) and isinstance(description.value, str)):
            found.append(f"{item.name}: description is no plain string")
        elif "\n" in description.value or description.lineno != description.end_lineno:
            found.append(f"{item.name}: description spans lines")
        elif ast.get_source_segment(source, description) not in (
            repr(description.value),
            json.dumps(description.value),
        ):
            found.append(f"{item.name}: description isn't one literal")
        if "accept" in item.options and item.type != "Path":
            found.append(f"{item.name}: accept belongs to files")
        if item.required or not _is_literal(item.options["default"]):
            continue
        default = item.literal("default")
        if (default is None) != item.optional:
            found.append(f"{item.name}: default None and Optional[...] go together")
        if default is not None:
            if "ge" in item.options and default < item.literal("ge"):
                found.append(f"{item.name}: default below ge")
            if "le" in item.options and default > item.literal("le"):
                found.append(f"{item.name}: default above le")
            if "choices" in item.options and default not in item.literal("choices"):
                found.append(f"{item.name}: default is no choice")
    return found


def _properties(items: list[CogInput]) -> dict[str, Any]:
    properties = {}
    for order, item in enumerate(items):
        entry: dict[str, Any] = {"title": item.name, "type": TYPES[item.type], "x-order": order}
        if item.type == "Path":
            entry["format"] = "uri"
        if item.type == "Secret":
            entry |= {"format": "password", "writeOnly": True, "x-cog-secret": True}
        for option, name in _SCHEMA_NAMES.items():
            if option in item.options:
                entry[name] = item.literal(option)
        if not item.required and item.literal("default") is not None:
            entry["default"] = item.literal("default")
        properties[item.name] = entry
    return properties


def openapi_schema(predict_source: str, train_source: str) -> dict[str, Any]:
    """Return the schema of both commands as `cog build` writes it, from the text of predict.py and train.py."""
    schemas: dict[str, Any] = {}
    for name, source in (("Input", predict_source), ("TrainingInput", train_source)):
        items = inputs(source)
        schemas[name] = {
            "type": "object",
            "title": name,
            "properties": _properties(items),
            "required": [item.name for item in items if item.required],
            "additionalProperties": False,
        }
    uri = {"type": "string", "format": "uri"}
    schemas["Output"] = {"type": "array", "items": uri, "title": "Output"}
    weights = {"type": "object", "properties": {"weights": uri}, "required": ["weights"]}
    schemas["TrainingOutput"] = {**weights, "title": "TrainingOutput"}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {},
        "components": {"schemas": schemas},
    }


def write_schema(root: Path, target: Path) -> None:
    """Write `.cog/openapi_schema.json` into a folder from which the server is started."""
    schema = openapi_schema((root / "predict.py").read_text(), (root / "train.py").read_text())
    (target / ".cog").mkdir(parents=True, exist_ok=True)
    (target / ".cog" / "openapi_schema.json").write_text(json.dumps(schema, indent=2))
