"""Configs: the classic text style, made strict.

A config is a Python file of plain data. ``_base_`` names files whose values it overrides, one level deep. A value written
``"${name}"`` or ``"${name.key}"`` is a link: it takes the value of that top-level key after every file and every
``--cfg-options`` has been merged, so that what several parts must agree on (``num_classes``, ``image_size``, a pipeline)
is written once and an override reaches them all. What would be accepted in silence elsewhere is an error here, with the
nearest right name: an unknown or unused key, a value of another type, a ``type`` that would keep the old type's arguments.
"""

import ast
import copy
import os
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.config import Config, DictAction

from densepred.engine.config_check import check_components
from densepred.errors import ConfigError, nearest

LINK = re.compile(r"\$\{([\w.]+)\}")
EXTRA_KEYS = {
    "compile": "MMEngine's torch.compile switch",
    "custom_imports": "modules to import before building, for parts registered outside densepred",
    "ema": "True keeps an exponential moving average of the weights and evaluates it",
    "find_unused_parameters": "MMEngine's DDP switch",
    "loggers": "names of further logging back ends: 'wandb', 'mlflow'",
    "model_wrapper_cfg": "MMEngine's DDP wrapper",
    "sync_bn": "'torch' synchronises batch norms over processes",
    "tasks": "which metrics are kept, where an evaluator lists them by task; what the head delivers links to it",
}
"""Top-level keys that mean something beside the arguments of MMEngine's Runner."""


def load_config(path: str | os.PathLike, cfg_options: dict[str, Any] | None = None) -> Config:
    """Read a config file, merge its bases and the options, resolve links, check every key.

    Args:
        path: the config file.
        cfg_options: dotted key -> value, e.g. ``{"model.head.num_queries": 64}``.

    Raises:
        ConfigError: see the module's docstring.
        FileNotFoundError: the file or one of its bases does not exist.
    """
    return resolve_config(load_linked_config(path, cfg_options))


def load_linked_config(path: str | os.PathLike, cfg_options: dict[str, Any] | None = None) -> Config:
    """Do as `load_config`, but leave the links in place: the form to write down beside a run."""
    return merge_options(Config(read_config_file(Path(path)), filename=str(path)), cfg_options)


def merge_options(cfg: Config, cfg_options: dict[str, Any] | None) -> Config:
    """Return the config with dotted options merged in."""
    values = cfg.to_dict()
    for key, value in (cfg_options or {}).items():
        values = set_option(values, key, value)
    return Config(values, filename=cfg.filename)


def resolve_config(cfg: Config) -> Config:
    """Return the linked config with every link replaced, after checking all keys, types and arguments."""
    values = cfg.to_dict()
    if custom_imports := values.get("custom_imports"):
        from mmengine.utils import import_modules_from_strings

        import_modules_from_strings(**custom_imports)
    resolved, used = resolve_links(values)
    check_top_level(values, used)
    check_components(resolved)
    return Config(resolved, filename=cfg.filename)


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """Turn the words after ``--cfg-options`` (``key=value``) into a dict, see `parse_value`.

    Raises:
        ConfigError: a word has no ``=``, or its value cannot be read.
    """
    options = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--cfg-options {pair}: write key=value, e.g. train_dataloader.batch_size=4")
        try:
            options[key] = parse_value(value)
        except (SyntaxError, ValueError, AssertionError, RecursionError) as error:  # MMEngine's are the last two
            raise ConfigError(
                f"--cfg-options {pair}: the value cannot be read; write a number, a word, a list or a tuple, or as in a "
                'config file dict(type="Name", size=(64, 64))'
            ) from error
    return options


def parse_value(text: str) -> Any:
    """Return an option's value: with a ``dict(`` in it as a config file has it, else as MMEngine (numbers, lists, tuples)."""
    if "dict(" in text:
        return ast.literal_eval(_DictCalls().visit(ast.parse(text.strip(), mode="eval")))
    # MMEngine's parser of lists drops every space, which a path may need.
    parse = DictAction._parse_iterable if set(text) & set("[](),") else DictAction._parse_int_float_bool
    return parse(text.strip("'\""))


class _DictCalls(ast.NodeTransformer):
    """Write dict(key=value, ...) as {"key": value, ...}, which is a literal."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        names = [word.arg for word in node.keywords]
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [word.value for word in node.keywords])


def read_config_file(path: Path, depth: int = 0) -> dict:
    """Return the merged values of one config file and its bases, links unresolved."""
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist{_nearest_file(path)}")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    values = {
        k: v
        for k, v in namespace.items()
        if not k.startswith("__") and not isinstance(v, ModuleType) and not callable(v)
    }
    bases = values.pop("_base_", [])
    if bases and depth:
        raise ConfigError(
            f"{path}: a base file names bases of its own; _base_ is one level deep: list them in the leaf"
        )
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        part = read_config_file(path.parent / base, depth + 1)
        if twice := sorted(merged.keys() & part.keys()):
            raise ConfigError(f"{path}: {', '.join(twice)} stands in two of its bases; write a value once")
        merged.update(part)
    return drop_orphans(merged, values, merge(merged, values, str(path)))


def drop_orphans(bases: dict, leaf: dict, merged: dict) -> dict:
    """Leave out what a base wrote for its own links, once the leaf has replaced the parts with those links.

    (A leaf with a pipeline of its own need not link to every number of the base's pipeline.)
    """
    while orphans := (links_in(bases) - links_in(merged)) & merged.keys() & bases.keys() - leaf.keys() - runner_keys():
        merged = {key: value for key, value in merged.items() if key not in orphans}  # may have held links of its own
    return merged


def links_in(node: Any) -> set[str]:
    """Return the top-level names that links in nested values reach."""
    if isinstance(node, dict):
        return set().union(*map(links_in, node.values()))
    if isinstance(node, list | tuple):
        return set().union(*map(links_in, node))
    match = LINK.fullmatch(node) if isinstance(node, str) else None
    return {match[1].split(".")[0]} if match else set()


def _nearest_file(path: Path) -> str:
    return nearest(path.name, (p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""


def merge(base: dict, child: dict, where: str, prefix: str = "") -> dict:
    """Return ``base`` overridden by ``child``, dict by dict; ``_delete_=True`` in a child's dict drops the base's.

    Raises:
        ConfigError: a value changes its kind, or ``type`` changes while arguments of the old type would stay.
    """
    child = dict(child)
    if child.pop("_delete_", False):
        return copy.deepcopy(child)
    check_type_change(base, child, where, prefix)
    merged = copy.deepcopy(base)
    for key, value in child.items():
        name = f"{prefix}{key}"
        if key in base:
            check_kind(name, base[key], value, where)
        if isinstance(value, dict):
            merged[key] = merge(base[key] if isinstance(base.get(key), dict) else {}, value, where, f"{name}.")
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def check_type_change(base: dict, child: dict, where: str, prefix: str) -> None:
    """Raise if ``child`` changes ``type`` and arguments written for the old type would stay."""
    old, new = base.get("type"), child.get("type")
    kept = sorted(base.keys() - child.keys() - {"type"})
    if old and new and old != new and kept:
        raise ConfigError(
            f"{where}: {prefix}type changes from {old} to {new}, but {', '.join(kept)} of {old} would stay; add "
            f"_delete_=True to that dict and list the arguments of {new}"
        )


def check_kind(name: str, old: Any, new: Any, where: str) -> None:
    """Raise if a plain value is overridden by one of another kind (numbers are one kind; None and links fit anything)."""

    def kind(value: Any) -> str | None:
        if isinstance(value, bool):
            return "bool"
        if isinstance(value, int | float):
            return "number"
        if isinstance(value, dict):
            return "dict"
        return "str" if isinstance(value, str) else None

    if any(isinstance(v, str) and LINK.fullmatch(v) for v in (old, new)):
        return
    if None not in (kind(old), kind(new)) and kind(old) != kind(new):
        raise ConfigError(f"{where}: {name} is {old!r} ({kind(old)}); {new!r} is a {kind(new)}")


def set_option(values: dict, key: str, value: Any) -> dict:
    """Return ``values`` with one dotted key set; digits index lists."""
    first = key.split(".")[0]
    if first not in values and (first != key or first not in runner_keys()):
        raise ConfigError(
            f"--cfg-options {key}={value}: unknown key {first!r}{nearest(first, values.keys() | runner_keys())}"
        )
    return _set(values, key.split("."), 0, value, f"--cfg-options {key}={value}")


def _set(node: Any, path: list[str], depth: int, value: Any, where: str) -> Any:
    """Return ``node`` with the value at ``path[depth:]`` below it set."""
    if depth == len(path):
        return value
    part, prefix = path[depth], ".".join(path[:depth])
    last = depth == len(path) - 1
    if isinstance(node, str) and LINK.fullmatch(node):
        raise ConfigError(f"{where}: {prefix} is the link {node}; set {node[2:-1]}.{part} instead")
    if isinstance(node, list | tuple):
        index = _index(node, part, where)
        items = [_set(item, path, depth + 1, value, where) if i == index else item for i, item in enumerate(node)]
        return type(node)(items)
    if node is None:  # an optional part: model.encoder.init_cfg.type=Pretrained fills it in
        node = {}
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: {prefix} is {node!r}, it has no keys")
    if last:
        check_type_change(node, {part: value}, where, f"{prefix}." if prefix else "")
        if part in node:
            check_kind(".".join(path), node[part], value, where)
    elif part not in node:
        raise ConfigError(f"{where}: unknown key {part!r} in {prefix}{nearest(part, node)}")
    return {**node, part: _set(node.get(part), path, depth + 1, value, where)}


def _index(node: list | tuple, part: str, where: str) -> int:
    if not part.lstrip("-").isdigit() or not -len(node) <= int(part) < len(node):
        raise ConfigError(f"{where}: {part!r} is no index of a list of {len(node)}")
    return int(part) % len(node)


def resolve_links(values: dict) -> tuple[dict, set[str]]:
    """Replace links by what they name; return the result and the top-level names that links reached."""
    used: set[str] = set()

    def walk(node: Any, name: str, trail: tuple[str, ...]) -> Any:
        if isinstance(node, dict):
            return {k: walk(v, f"{name}.{k}" if name else k, trail) for k, v in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(walk(v, f"{name}.{i}", trail) for i, v in enumerate(node))
        match = LINK.fullmatch(node) if isinstance(node, str) else None
        if not match:
            return node
        target = match[1]
        if target in trail:
            raise ConfigError(f"{name}: the links {' -> '.join([*trail, target])} go round in a circle")
        used.add(target.split(".")[0])
        return walk(_look_up(values, target, name), name, (*trail, target))

    return walk(values, "", ()), used


def _look_up(values: dict, target: str, name: str) -> Any:
    node: Any = values
    for part in target.split("."):
        if not isinstance(node, dict) or part not in node:
            known = node.keys() if isinstance(node, dict) else []
            raise ConfigError(f"{name} links to ${{{target}}}, but there is no {part!r}{nearest(part, known)}")
        node = node[part]
    return node


def runner_keys() -> set[str]:
    """Return the top-level keys that mean something to the runner."""
    import inspect

    from mmengine.runner import Runner

    return (set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}) | EXTRA_KEYS.keys()


def check_top_level(values: dict, used: set[str]) -> None:
    """Raise for a top-level key that neither the runner nor a link reads."""
    known = runner_keys()
    for key in values:
        if key not in known and key not in used:
            raise ConfigError(
                f"{key}: no part of the run reads this top-level key, and no ${{{key}}} links to it"
                f"{nearest(key, known | used)}"
            )
