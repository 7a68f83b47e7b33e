"""The form of an event class: what is promised of one version, without any name of a class or module.

    @event("order.placed", key="customer", version=2)
    class OrderPlaced:                 {"version": 2, "key": "customer", "tags": [], "subject": null, "personal": [],
        order: str              ──▶     "schema": {"type": "object", "required": ["order"],
        note: str = ""                             "properties": {"note": {"default": "", "type": "string"}, "order": …}}}

The schema is JSON Schema: sorted, without prose, nested types named by the path at which they are first met.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import msgspec.inspect

from trilogue.codec import Coder, coder
from trilogue.errors import UnknownEvent

Form = dict[str, Any]
_NOISE = {"title", "description", "examples", "$comment", "$defs", "discriminator", "deprecated"}
_NAMED = ("properties", "patternProperties")
_LISTS = {"anyOf": "anyOf", "oneOf": "anyOf", "allOf": "allOf", "prefixItems": "prefixItems"}
_NESTED = ("items", "additionalProperties", "propertyNames")
_TIMES = {msgspec.inspect.DateTimeType: "date-time", msgspec.inspect.TimeType: "time"}


def form_of(code: Coder) -> Form:
    """What is promised of a version: its key, tags and personal fields, and its JSON Schema without any names of ours.

    Raises UnknownEvent for a class with a default that cannot be written down.
    """
    return _form_of(code.cls)


@lru_cache(maxsize=4096)
def _form_of(cls: Any) -> Form:
    code = coder(cls)
    mark = code.mark
    return {
        "version": code.version,
        "key": mark.key,
        "tags": sorted(mark.tags),
        "subject": mark.subject,
        "personal": sorted(mark.personal),
        # As it will come back from a file: a default may be a tuple.
        "schema": msgspec.json.decode(msgspec.json.encode(_Plain().document(_json_schema(cls)))),
    }


def fields_of(form: Form) -> list[str]:
    """The names of the fields as they stand in the data, optional ones with a question mark."""
    schema = form["schema"]
    required = schema.get("required", ())
    return [name if name in required else f"{name}?" for name in schema.get("properties", {})]


def _json_schema(cls: Any) -> Form:
    if hasattr(cls, "model_json_schema"):
        return _pydantic_schema(cls)
    objects = _objects(msgspec.inspect.type_info(cls))
    try:
        refs, components = msgspec.json.schema_components(tuple(objects), schema_hook=_nested_schema)
    except TypeError as error:  # a default that is an object of a class msgspec does not know
        raise UnknownEvent(
            f"{cls.__qualname__} has no schema: {error}; expected types that JSON has, and for a default that is an object "
            "field(default_factory=...)"
        ) from error
    for ref, found in zip(refs, objects.values(), strict=True):
        _say_times(_target(ref["$ref"], components), found)
    return {**refs[0], "$defs": components}


def _objects(top: msgspec.inspect.Type) -> dict[type, Any]:
    """The classes with fields in a type, itself first."""
    found: dict[type, Any] = {}
    waiting = [top]
    while waiting:
        info: Any = waiting.pop()
        if not hasattr(info, "fields"):
            waiting += _parts(info)
        elif info.cls not in found:
            found[info.cls] = info
            waiting += [each.type for each in info.fields]
    return found


def _parts(info: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    for name in info.__struct_fields__:
        value = getattr(info, name)
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, msgspec.inspect.Type))


def _say_times(schema: Form, info: Any) -> None:
    # msgspec writes a datetime as any text, and nobody would see it become one.
    for each in info.fields:
        times = [_TIMES[type(scalar)] for scalar in _scalars(each.type) if type(scalar) in _TIMES]
        if times and each.encode_name in schema.get("properties", {}):
            schema["properties"][each.encode_name]["format"] = times[0]


def _scalars(info: Any) -> Iterator[msgspec.inspect.Type]:
    if hasattr(info, "fields"):
        return
    yield info
    for part in _parts(info):
        yield from _scalars(part)


def _nested_schema(cls: Any) -> Form:
    if not hasattr(cls, "model_json_schema"):
        raise NotImplementedError
    return _pydantic_schema(cls)


def _pydantic_schema(cls: Any) -> Form:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that are no JSON: they are left out, and nothing is lost
        schema: Form = cls.model_json_schema(schema_generator=_pydantic_generator())
    return schema


@lru_cache(maxsize=1)
def _pydantic_generator() -> Any:
    from pydantic.json_schema import GenerateJsonSchema

    class Stable(GenerateJsonSchema):
        """As pydantic's own, but a Decimal is not a pattern that changes with the release."""

        def decimal_schema(self, schema: Any) -> Any:
            return {"type": "string", "format": "decimal"}

    return Stable


class _Plain:
    """A JSON Schema with nested types named by the path they are first met at, sorted, and without prose."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.defs: dict[str, Any] = {}

    def document(self, schema: Form) -> Form:
        scope = schema.get("$defs", {})
        top = _target(schema["$ref"], scope) if "$ref" in schema else schema
        self.names[id(top)] = "#"
        plain = self.node(top, "", scope)
        return {**plain, "$defs": dict(sorted(self.defs.items()))} if self.defs else plain

    def node(self, node: Any, path: str, scope: Form) -> Any:
        if not isinstance(node, dict):
            return node
        scope = {**scope, **node["$defs"]} if "$defs" in node else scope
        plain: Form = {}
        for name, value in node.items():
            if name == "$ref":
                plain[name] = self.ref(_target(value, scope), path, scope)
            elif name in _NAMED:
                plain[name] = {each: self.node(value[each], f"{path}.{each}".lstrip("."), scope) for each in sorted(value)}
            elif name in _NESTED:
                plain[name] = self.node(value, f"{path}[]", scope)
            elif name in _LISTS:
                plain[_LISTS[name]] = self.several(name, value, path, scope)
            elif name not in _NOISE:
                plain[name] = sorted(value, key=_text) if name in ("required", "enum") else value
        return dict(sorted(plain.items()))

    def several(self, name: str, nodes: Sequence[Any], path: str, scope: Form) -> list[Any]:
        plain = [self.node(each, path, scope) for each in nodes]
        return plain if name == "prefixItems" else sorted(plain, key=_text)

    def ref(self, target: Any, path: str, scope: Form) -> str:
        if id(target) not in self.names:
            name = path
            while name in self.defs:
                name += "'"
            self.names[id(target)] = name
            self.defs[name] = None  # taken: the type may hold itself
            self.defs[name] = self.node(target, path, scope)
        return self.names[id(target)]


def _target(ref: str, scope: Form) -> Any:
    return scope[ref.removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")]


def _text(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()
