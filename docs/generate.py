"""Writes the pages of docs/reference and docs/contributing.md: what the code already says, put into Markdown.

    python docs/generate.py             writes the pages
    python docs/generate.py --check     writes nothing; exit code 1 and the names of the pages that differ

Knows neither torch nor Ray: specs, errors and commands can be imported without them.
"""

import enum
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = "https://github.com/maas-ray/maas-ray/blob/main/"
REFRESH = "make docs-pages"
NOTE = f"<!-- Written by docs/generate.py; change the code, then run `{REFRESH}`. -->"

SPECS = {
    "train": ("Training spec", "maas-ray train", "jobs/specs/digits.yaml"),
    "tune": ("Search spec", "maas-ray tune", "jobs/specs/digits-search.yaml"),
    "serve": ("Serving spec", "maas-ray serve", "deployments/digits.yaml"),
}
BOUNDS = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each kind of spec, as `maas-ray schema` prints it."""
    from maas_ray.serve.spec.serve import ServeSpec
    from maas_ray.train.search.spec import TuneSpec
    from maas_ray.train.spec.train import TrainSpec

    return {
        "train": TrainSpec.model_json_schema(),
        "tune": TuneSpec.model_json_schema(),
        "serve": ServeSpec.model_json_schema(),
    }


def error_rows() -> list[tuple[str, int, bool, str]]:
    """Code, HTTP status, whether a retry may help, and when it happens; of each error, bases first."""
    from maas_ray import errors

    rows, waiting = [], [errors.MaasError]
    while waiting:
        kind = waiting.pop(0)
        if kind.__module__ == errors.__name__:
            rows.append((kind.code, kind.http_status, kind.retryable, (kind.__doc__ or "").splitlines()[0]))
        waiting[:0] = kind.__subclasses__()
    return rows


def commands() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every command of `maas-ray`: its whole name, its function and its help, in the order of `maas-ray --help`."""
    from maas_ray.cli.app import app

    def walk(name: str, group: typer.Typer) -> Iterator[tuple[str, Callable[..., Any], str]]:
        if (root := group.registered_callback) is not None and root.callback is not None:
            yield name, root.callback, inspect.getdoc(root.callback) or ""
        for found in group.registered_commands:
            if found.callback is not None:
                own = found.name or found.callback.__name__.replace("_", "-")
                yield f"{name} {own}", found.callback, found.help or inspect.getdoc(found.callback) or ""
        for inner in group.registered_groups:
            if inner.typer_instance is not None:
                yield from walk(f"{name} {inner.name}", inner.typer_instance)

    yield from walk("maas-ray", app)


def parameters(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """The arguments and options of a command, from its signature: names, type, default and help."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, parameter.annotation)
        kind, info = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint, None)
        is_argument = isinstance(info, typer.models.ArgumentInfo) or info is None
        long = name.replace("_", "-")
        first = getattr(
            info, "default", None
        )  # where the declaration is inside Annotated, typer keeps the first name here
        declared = [*([first] if isinstance(first, str) else []), *(getattr(info, "param_decls", None) or ())]
        if is_argument:
            names = [name.upper()]
        else:
            names = declared or ([f"--{long}", f"--no-{long}"] if kind is bool else [f"--{long}"])
        default = parameter.default
        says_nothing = default is None or default is False or default in (inspect.Parameter.empty, (), [])
        shown = getattr(info, "show_default", None)
        found.append(
            {
                "names": names,
                "required": default is inspect.Parameter.empty,
                "type": "flag" if kind is bool else _type_name(kind),
                "default": shown if isinstance(shown, str) else None if says_nothing else str(default),
                "variable": getattr(info, "envvar", None),
                "help": " ".join((getattr(info, "help", None) or "").split()),
            }
        )
    return found


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(each) for each in inner if each is not type(None))
    if origin in (list, tuple):
        return f"{_type_name(inner[0])}, repeatable"
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{each.value}`" for each in kind)
    return {str: "text", int: "integer", float: "number", Path: "path"}.get(kind, getattr(kind, "__name__", str(kind)))


def errors_page() -> str:
    """The table of errors."""
    lines = [
        "# Errors",
        "",
        NOTE,
        "",
        "An error message contains the fact, the value, the limit and the way out. Commands print `error[code]: message` on",
        'stderr and exit with code 1. The endpoint returns `{"error": message}` with the HTTP status below. *Retry* is yes where',
        "the same call may succeed later.",
        "",
        "| code | HTTP | retry | when |",
        "|---|---|---|---|",
    ]
    for code, status, is_retryable, when in error_rows():
        lines.append(f"| `{code}` | {status} | {'yes' if is_retryable else 'no'} | {_cell(when)} |")
    lines += [
        "",
        f"The classes and their tree are in [maas_ray/errors.py]({SOURCE}maas_ray/errors.py).",
        "",
    ]
    return _text(lines)


def models_page() -> str:
    """The parameters of every model that is known by name."""
    from maas_ray.models.classical import CLASSICAL
    from maas_ray.models.params import HuggingFaceSpec
    from maas_ray.models.spec import PARAMS

    lines = [
        "# Model parameters",
        "",
        NOTE,
        "",
        "`model: {name: NAME, params: {…}}` in a [training spec](train.md#modelspec). Of `package.module:Class`, `params` are the",
        "arguments of the constructor. [Models](../models.md) says which model is for what.",
        "",
    ]
    for name, kind in {**PARAMS, "hf:CLASS": HuggingFaceSpec, **CLASSICAL}.items():
        schema = kind.model_json_schema()
        lines += _section(f"`{name}`", schema, schema.get("$defs", {}))
    return _text(lines)


def spec_page(kind: str, schema: Mapping[str, Any]) -> str:
    """Every field of one kind of spec, a section for each object."""
    title, command, example = SPECS[kind]
    lines = [
        f"# {title}",
        "",
        NOTE,
        "",
        f"`{command} FILE` reads this from a YAML file, such as [{example}]({SOURCE}{example}). `maas-ray schema {kind}` prints",
        "the same as JSON Schema, from which editors complete and check the file. An unknown key is refused with the nearest",
        "right name. `--set a.b=value` overrides a field.",
        "",
    ]
    definitions = schema.get("$defs", {})
    waiting, done = [schema["title"]], set()
    while waiting:
        name = waiting.pop(0)
        if name in done:
            continue
        done.add(name)
        body = _object(schema if name == schema["title"] else definitions[name])
        if body is None:
            continue
        lines += _section(name, body, definitions)
        waiting += [found for found in _references(body["properties"]) if found not in done]
    return _text(lines)


def _section(name: str, body: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    if "description" in body:
        yield from (_prose(paragraph) + "\n" for paragraph in body["description"].split("\n\n"))
    yield "| field | type | default | description |"
    yield "|---|---|---|---|"
    for field, value in body["properties"].items():
        if field in body.get("required", ()):
            default = "*required*"
        else:
            default = _default(value.get("default"), value, definitions)
        described = _cell(value.get("description") or _first_paragraph(value, definitions))
        yield f"| `{field}` | {_type(value, definitions)} | {default} | {described} |"
    yield ""


def _object(schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema with properties: itself, or the branch of `anyOf` that has some."""
    if "properties" in schema:
        return schema
    return next((branch for branch in schema.get("anyOf", ()) if "properties" in branch), None)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rsplit("/", 1)[1]
            elif key not in ("default", "mapping"):
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _type(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})" if _object(definitions[name]) else _type(definitions[name], definitions)
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_type(branch, definitions) for branch in value[union]))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    match value.get("type"):
        case "array":
            items = value.get("items") or {}
            inner = [_type(part, definitions) for part in value.get("prefixItems", [items])]
            return f"list of {', '.join(inner)}"
        case "object":
            inner = value.get("additionalProperties")
            return f"mapping to {_type(inner, definitions)}" if isinstance(inner, Mapping) else "mapping"
        case None:
            return "any value"
        case str(name):
            limits = ", ".join(f"{sign}{value[key]}" for key, sign in BOUNDS.items() if key in value)
            pattern = f", matches `{value['pattern']}`".replace("|", "\\|") if "pattern" in value else ""
            return f"{name}{' ' if limits else ''}{limits}{pattern}"
    raise ValueError(f"no name for the type {value['type']!r}")


def _default(default: Any, value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if isinstance(default, Mapping) or (default is None and "$ref" in value):
        return "its defaults" if any(_object(definitions[name]) for name in _references(value)) else "`{}`"
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace("|", "\\|")


def _first_paragraph(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    names = list(_references(value))
    return definitions[names[0]].get("description", "").split("\n\n")[0] if len(names) == 1 else ""


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _prose(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        NOTE,
        "",
        "Every command has `--help`. `--json` prints one JSON document on stdout, `--debug` the traceback of an error; progress is",
        "printed on stderr; the exit code is 0 on success only.",
        "",
    ]
    for name, function, described in commands():
        lines += [f"## {name}", "", _prose(described.split("\n\n")[0]), ""]
        rows = [row for row in parameters(function) if row["names"] not in (["--json"], ["--debug"])]
        if rows:
            lines += ["| argument or option | type | default | description |", "|---|---|---|---|"]
        for row in rows:
            names = ", ".join(f"`{each}`" for each in row["names"])
            if row["variable"]:
                names += f" (`{row['variable']}`)"
            default = "*required*" if row["required"] else f"`{_cell(row['default'])}`" if row["default"] else ""
            lines.append(f"| {names} | {_cell(row['type'])} | {default} | {_cell(row['help'])} |")
        lines.append("")
    return _text(lines)


def contributing_page() -> str:
    """CONTRIBUTING.md, whose links are relative to the repository's root, as a page of the site."""
    text = (ROOT / "CONTRIBUTING.md").read_text()

    def link(found: re.Match[str]) -> str:
        target = found[1]
        if target.startswith(("http", "#")):
            return found[0]
        return f"]({target.removeprefix('docs/')})" if target.startswith("docs/") else f"]({SOURCE}{target})"

    title, _, rest = text.partition("\n")
    note = NOTE.replace("change the code", "change CONTRIBUTING.md")
    return f"{title}\n\n{note}\n" + re.sub(r"\]\(([^)]+)\)", link, rest)


def python_page() -> str:
    """Every name that `import maas_ray` offers, from its signature and docstring."""
    import maas_ray

    lines = ["# Python API", "", NOTE, "", "```python", "import maas_ray", "```", ""]
    for name in maas_ray.__all__:
        value = getattr(maas_ray, name)
        if name.startswith("_") or (inspect.ismodule(value) and not callable(value)):
            continue
        lines += [f"## {name}", "", *_described(name, value)]
        if not inspect.isclass(value):
            continue
        for member, each in inspect.getmembers_static(value):
            if not member.startswith("_") and (isinstance(each, property) or inspect.isfunction(each)):
                lines += [f"### {name}.{member}", "", *_described(f"{name}.{member}", each)]
    return _text(lines)


def _described(name: str, value: Any) -> list[str]:
    """A signature and the docstring behind it; of a package that can be called, those of its function."""
    if inspect.ismodule(value):
        from maas_ray.api import pools, runs

        value = {"serve": pools.serve, "train": runs.train}[name]
    shown = f"{name}" if isinstance(value, property) else f"{name}{_signature(value)}"
    return ["```text", shown, "```", "", "```text", inspect.getdoc(value) or "", "```", ""]


def _signature(value: Any) -> str:
    """Parameters with their defaults; types are in the docstring where they matter."""
    found = inspect.signature(value)
    plain = [
        each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values() if each.name != "self"
    ]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def pages() -> dict[Path, str]:
    """Every generated page."""
    found = {DOCS / "reference" / f"{kind}.md": spec_page(kind, schema) for kind, schema in schemas().items()}
    found[DOCS / "reference" / "models.md"] = models_page()
    found[DOCS / "reference" / "errors.md"] = errors_page()
    found[DOCS / "reference" / "commands.md"] = cli_page()
    found[DOCS / "reference" / "python.md"] = python_page()
    found[DOCS / "contributing.md"] = contributing_page()
    return found


def main() -> int:
    """Writes the pages, or compares them."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        sys.stdout.write(f"{path.relative_to(ROOT)} {'is stale' if '--check' in sys.argv else 'written'}\n")
        if "--check" not in sys.argv:
            path.write_text(pages()[path])
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
