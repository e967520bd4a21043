"""Recipes: YAML files that extend one another, with `key=value` overrides from the command line. Free of torch."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from texttok_cli.config.plain_yaml import parse_yaml
from texttok_cli.config.recipe import GeneratorRecipe, Recipe, TokenizerRecipe
from texttok_cli.errors import RecipeError

# A mapping that changes one of these is another thing: it replaces what it extends instead of being merged into it.
DISCRIMINATORS = ("source", "kind")
OF_A_SIZE = ("depth", "width", "heads")  # what a backbone's `size` stands for, and therefore replaces
SHORT = reprlib.Repr()  # of a value in a message: aliases can make a short file's value endless
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200
AnyRecipe = TokenizerRecipe | GeneratorRecipe
TASKS: dict[str, type[AnyRecipe]] = {"tokenizer": TokenizerRecipe, "generator": GeneratorRecipe}


def recipes_root() -> Path:
    """Folder of the recipes that come with the package: inside the wheel, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names that `load_recipe` finds by themselves, such as `tiny/texttok-32-128`."""
    root = recipes_root()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("base/"))


def load_recipe(name: str | Path, overrides: str | Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe by path or bundled name, apply `a.b=value` overrides (one or several), and check every key.

    Raises RecipeError with one line per mistake, each naming the file, the key and, for a misspelt one, the likely key.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    path = _find(str(name))
    data = _read(path)
    for override in overrides:
        data = merge(data, _parse_override(override))
    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    task = data.get("task", "tokenizer")
    if not isinstance(task, str) or task not in TASKS:
        raise RecipeError(f"{where}: task {SHORT.repr(task)} is not one of {', '.join(TASKS)}")
    try:
        return TASKS[task].model_validate(data)
    except ValidationError as err:
        raise RecipeError("\n".join(f"{where}: {_explain(e, TASKS[task])}" for e in err.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def merge(base: Any, change: Any) -> Any:
    """Mappings are merged key by key; anything else, or a mapping with another discriminator, is replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    if any(key in change and key in base and base[key] != change[key] for key in DISCRIMINATORS):
        return change
    if "size" in change:
        base = {key: value for key, value in base.items() if key not in OF_A_SIZE}
    return {**base, **{key: merge(base.get(key), value) for key, value in change.items()}}


def _find(name: str) -> Path:
    candidates = [Path(name), recipes_root() / name, recipes_root() / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    close = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the package has: {', '.join(recipe_names())}"
    raise RecipeError(f"{name}: no such recipe, neither a file nor one that comes with texttok; {hint}")


def _read(path: Path, seen: tuple[Path, ...] = (), read: dict[Path, dict[str, Any]] | None = None) -> dict[str, Any]:
    """A recipe file with what it extends merged underneath; `read` are those that others extend, each of which is read once."""
    read, place = {} if read is None else read, path.resolve()  # one that extends ../here/ITSELF has ever longer paths
    if place in read:
        return read[place]
    if place in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(str(p) for p in seen)}")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as err:
        raise RecipeError(f"{path}: not readable as YAML: {err}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a {type(data).__name__}")
    said = data.pop("extends", [])
    parents = said if isinstance(said, list) else [said]
    if not all(isinstance(parent, str) for parent in parents):
        raise RecipeError(f"{path}: extends names a recipe, or a list of them, not {SHORT.repr(said)}")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, _read(_find_parent(parent, path), (*seen, place), read))
    read[place] = merge(merged, data)
    return read[place]


def _find_parent(name: str, child: Path) -> Path:
    for path in (child.parent / name, recipes_root() / name):
        file = path if path.suffix == ".yaml" else Path(f"{path}.yaml")
        if file.is_file():
            return file
    raise RecipeError(f"{child}: extends {name!r}, which is neither beside it nor among the recipes of texttok")


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {text!r}: write it as key.subkey=value, for example training.batch_size=64")
    try:
        parsed: Any = parse_yaml(value)
    except ValueError:
        raise RecipeError(f"override {text!r}: the value is not readable as YAML; quote it") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed  # type: ignore[no-any-return]


def _explain(error: Any, schema: type[BaseModel]) -> str:
    keys, names = _walk(tuple(str(part) for part in error["loc"]), schema)
    where = ".".join(keys)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known there: {', '.join(names)}"
        return f"unknown key {where!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "missing" or isinstance(error["input"], dict) else f" (given: {SHORT.repr(error['input'])})"
    return f"{where or 'recipe'}: {message[0].lower()}{message[1:]}{given}"


def _walk(loc: tuple[str, ...], schema: type[BaseModel]) -> tuple[list[str], list[str]]:
    """A pydantic location without the tags of unions, and the keys that the schema knows beside its last one."""
    models = [schema]
    keys: list[str] = []
    for part in loc[:-1]:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields or part.isdigit():
            keys.append(part)
        models = [m for f in fields for m in _models_in(f.annotation)] or models
    return [*keys, *loc[-1:]], sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in _models_in(arg)]
    return []
