"""Strict configs: what MMEngine accepts in silence is an error here."""

import re
from pathlib import Path

import pytest
from torch import nn

from densepred.engine.config import load_config, load_linked_config, merge, parse_options, resolve_links
from densepred.engine.config_check import fits
from densepred.errors import ConfigError
from densepred.registry import MODELS

BASE = """
num_classes = 5
size = (64, 64)
train_pipeline = [dict(type="PackSegInputs")]
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type="ConfigProbe", pipeline="${train_pipeline}"))
model = dict(type="ConfigProbe", classes="${num_classes}", size="${size}", neck=dict(type="ConfigProbe", classes=3))
"""


@MODELS.register_module(force=True)
class ConfigProbe(nn.Module):
    def __init__(self, classes: int, size: tuple = (), neck: dict | None = None, mode: str = "a", rate: float = 0.0):
        super().__init__()


@MODELS.register_module(force=True)
class OtherProbe(nn.Module):
    def __init__(self, width: int):
        super().__init__()


@pytest.fixture
def write(tmp_path: Path):
    def write_files(leaf: str, base: str = BASE) -> Path:
        (tmp_path / "base.py").write_text(base.replace('"${train_pipeline}"', "[]") if "pipeline" not in base else base)
        (tmp_path / "leaf.py").write_text('_base_ = ["base.py"]\n' + leaf)
        return tmp_path / "leaf.py"

    return write_files


@pytest.fixture(autouse=True)
def probe_dataset():
    from densepred.registry import DATASETS

    DATASETS.register_module(
        name="ConfigProbe", module=type("ConfigProbe", (), {"__init__": _dataset_init}), force=True
    )
    yield
    DATASETS.module_dict.pop("ConfigProbe")


def _dataset_init(self, pipeline: list):
    pass


def test_links_follow_overrides_of_files_and_options(write):
    cfg = load_config(write("num_classes = 7"), {"size": (32, 48)})
    assert cfg.model.classes == 7
    assert tuple(cfg.model.size) == (32, 48)


def test_overridden_pipeline_reaches_the_data_loader(write):
    cfg = load_config(write("train_pipeline = []"))
    assert cfg.train_dataloader.dataset.pipeline == []


def test_numbers_of_a_replaced_pipeline_are_dropped_with_it(write):
    cfg = load_config(write("model = dict(size=(8, 8))"))
    assert "size" not in cfg
    with pytest.raises(ConfigError, match="unknown key 'size'"):
        load_config(write("model = dict(size=(8, 8))"), {"size": (3, 3)})


def test_option_fills_in_an_optional_part(write):
    leaf = "model = dict(neck=dict(_delete_=True, type='ConfigProbe', classes=3, neck=None))"
    cfg = load_config(write(leaf), {"model.neck.neck.type": "OtherProbe", "model.neck.neck.width": 4})
    assert cfg.model.neck.neck.width == 4


def test_linked_config_keeps_its_links_and_runs_again(write, tmp_path):
    dumped = tmp_path / "dumped.py"
    dumped.write_text(load_linked_config(write("")).pretty_text)
    assert load_config(dumped, {"num_classes": 9}).model.classes == 9


@pytest.mark.parametrize(
    ("leaf", "options", "message"),
    [
        ("tran_cfg = dict(max_iters=3)", {}, r"tran_cfg: no part.*did you mean 'train_cfg'"),
        ("spare = 3", {}, "spare: no part of the run reads"),
        (
            "model = dict(nek=dict(type='ConfigProbe'))",
            {},
            r"model.nek: ConfigProbe has no argument .*did you mean 'neck'",
        ),
        ("", {"model.nek.classes": 3}, r"unknown key 'nek' in model; did you mean 'neck'"),
        ("", {"model.nek": 3}, r"model.nek: ConfigProbe has no argument .*did you mean 'neck'"),
        ("", {"num_clases": 3}, r"unknown key 'num_clases'; did you mean 'num_classes'"),
        ("", {"num_classes": "many"}, r"num_classes is 5 \(number\); 'many' is a str"),
        ("", {"model.neck.classes": 2.5}, r"model.neck.classes: 2.5 is a float; ConfigProbe takes <class 'int'>"),
        ("model = dict(mode=3)", {}, r"model.mode: 3 is a int"),
        (
            "model = dict(neck=dict(type='OtherProbe', width=3))",
            {},
            r"from ConfigProbe to OtherProbe, but classes",
        ),
        ("", {"model.neck.type": "OtherProbe"}, "type changes from ConfigProbe to OtherProbe"),
        (
            "model = dict(neck=dict(type='ConfigProb', _delete_=True))",
            {},
            r"'ConfigProb'; did you mean 'ConfigProbe'",
        ),
        ("model = dict(neck=dict(_delete_=True, type='OtherProbe'))", {}, "OtherProbe needs the argument 'width'"),
        (
            "train_dataloader = dict(batchsize=2)",
            {},
            r"batchsize: a data loader has no such key; did you mean 'batch_size'",
        ),
        ("num_classes = '${nothing}'", {}, r"links to \$\{nothing\}"),
        ("num_classes = '${size}'\nsize = '${num_classes}'", {}, "circle"),
        ("", {"size.7": 3}, "'7' is no index of a list of 2"),
        ("model = 3", {}, r"model is .* \(dict\); 3 is a number"),
        ("import nothing_of_that_name", {}, "ModuleNotFoundError"),
    ],
)
def test_every_slip_is_an_error_that_names_the_remedy(write, leaf, options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(leaf), options)


def test_bases_are_one_level_deep(write, tmp_path):
    (tmp_path / "root.py").write_text("")
    with pytest.raises(ConfigError, match="one level deep"):
        load_config(write("", base='_base_ = ["root.py"]'))


def test_value_in_two_bases_is_an_error(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("num_classes = 3")
    (tmp_path / "leaf.py").write_text('_base_ = ["one.py", "two.py"]')
    with pytest.raises(ConfigError, match="num_classes stands in two of its bases"):
        load_config(tmp_path / "leaf.py")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "kmax_r50_coco.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'kmax_r50_coco.py'"):
        load_config(tmp_path / "kmax_r50_coc.py")


def test_delete_drops_the_old_arguments():
    merged = merge({"a": {"type": "A", "x": 1}}, {"a": {"type": "B", "y": 2, "_delete_": True}}, "file")
    assert merged == {"a": {"type": "B", "y": 2}}


def test_merge_leaves_its_inputs_alone():
    base = {"a": {"b": [1]}}
    merge(base, {"a": {"b": [2]}}, "file")["a"]["b"].append(3)
    assert base == {"a": {"b": [1]}}


def test_resolved_links_are_copies():
    values, used = resolve_links({"p": [1], "a": "${p}", "b": "${p}"})
    values["a"].append(2)
    assert values["b"] == [1]
    assert used == {"p"}


def test_options_are_parsed_like_mmengine_does():
    assert parse_options(["a.b=3", "c=1e-4", "d=[1,2]", "e=x,y", "f=None", "g=k=v", "h=/a b/c"]) == {
        "a.b": 3,
        "c": 1e-4,
        "d": [1, 2],
        "e": ["x", "y"],
        "f": None,
        "g": "k=v",
        "h": "/a b/c",
    }
    with pytest.raises(ConfigError, match="write key=value"):
        parse_options(["a.b"])


def test_an_option_may_be_a_dict_as_in_a_config_file():
    words = [
        "a.b=dict(size=(40, 40), stride=(24,24))",
        """c=[dict(type="A b", size="${size}"), dict(x=None, y=-1e-3)]""",
    ]
    assert parse_options(words) == {
        "a.b": {"size": (40, 40), "stride": (24, 24)},
        "c": [{"type": "A b", "size": "${size}"}, {"x": None, "y": -1e-3}],
    }


@pytest.mark.parametrize(
    "value", ["dict(a=b)", "dict(a=open('x'))", "dict(a=(1,2)", "dict({'a': 1})", "dict(**{})", "x(1,2)", "[1,(2]"]
)
def test_a_value_that_cannot_be_read_is_told(value):
    with pytest.raises(ConfigError, match=re.escape(f"a={value}: the value cannot be read")):
        parse_options([f"a={value}"])


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (True, int, False),
        (None, int | None, True),
        ("a", int | str, True),
        ([1], tuple[int, ...], True),
        ({}, dict | None, True),
        (3, list, False),
    ],
)
def test_values_are_held_against_annotations(value, annotation, expected):
    assert fits(value, annotation) is expected
