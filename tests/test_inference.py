"""Single images: the right size, the right classes, the files that `densepred predict` leaves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from densepred import build_model, load_config
from densepred.data.loading import read_image
from densepred.engine.checkpoint import write_checkpoint
from densepred.inference import load_model, predict_image, predict_to_file, segment_records
from densepred.registry import DATASETS
from densepred.structures import InstanceData, SegSample
from tests.small import SHAPES_CONFIG, small_shapes

RULES = ("class_threshold_thing", "class_threshold_stuff", "overlap_threshold", "pixel_confidence_threshold")


@pytest.fixture(scope="module")
def options(shapes) -> dict:
    """Options of a small model whose thresholds are zero: untrained it is sure of nothing, and would predict nothing."""
    return small_shapes(shapes) | {f"model.head.{rule}": 0.0 for rule in RULES}


@pytest.fixture(scope="module")
def written(options, tmp_path_factory):
    """A checkpoint as a run leaves it, with class names of its own."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = build_model(SHAPES_CONFIG, options)
    cfg = load_config(SHAPES_CONFIG, options)
    meta = DATASETS.build(dict(cfg.test_dataloader.dataset, pipeline=[])).metainfo
    renamed = dict(meta, classes=[f"my {name}" for name in meta["classes"]])
    path = folder / "iter_4.pth"
    write_checkpoint({"state_dict": model.state_dict(), "meta": {"dataset_meta": renamed}}, path)
    return path


@pytest.fixture(scope="module")
def model(written, options):
    return load_model(SHAPES_CONFIG, written, cfg_options=options)


@pytest.fixture
def photo(shapes) -> str:
    return str(sorted((shapes / "val2017").iterdir())[0])


def test_model_is_loaded_for_evaluation_with_the_classes_of_its_checkpoint(model, written):
    assert not model.training
    assert model.dataset_meta["classes"][0] == "my cross"
    stored = torch.load(written, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device, options):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .*'cpu' is always there") as caught:
        load_model(SHAPES_CONFIG, None, device, options)
    assert "\n" not in str(caught.value)


def test_classes_come_from_the_data_set_where_the_checkpoint_tells_none(written, options, tmp_path):
    weights = torch.load(written, weights_only=True)["state_dict"]
    write_checkpoint({"state_dict": weights}, tmp_path / "bare.pth")
    bare = load_model(SHAPES_CONFIG, tmp_path / "bare.pth", cfg_options=options)
    assert bare.dataset_meta["classes"][:2] == ("cross", "disc")
    assert bare.dataset_meta["isthing"] == (True,) * 6 + (False,) * 4


@pytest.mark.parametrize("size", [(64, 80), (50, 33), (200, 90)])
def test_prediction_has_the_size_of_the_image(model, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    sample = predict_image(model, image)
    assert sample.pred_panoptic.ids.shape == size
    numbers = {s["id"] for s in sample.pred_panoptic.segments}
    assert numbers
    assert set(np.unique(sample.pred_panoptic.numpy())) - {0} == numbers


def test_file_and_array_give_the_same_prediction(model, photo):
    from_file, from_array = predict_image(model, photo), predict_image(model, read_image(photo))
    assert torch.equal(from_file.pred_panoptic.ids, from_array.pred_panoptic.ids)
    assert from_file.img_path == photo


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)]
)
def test_array_that_is_no_image_is_refused_with_its_form(model, wrong):
    with pytest.raises(ValueError, match=r"an image is an \(H, W, 3\) uint8 RGB array, not \(8, 8"):
        predict_image(model, wrong)


def test_checkpoint_of_another_architecture_is_refused_by_name(written, options):
    with pytest.raises(ValueError, match=r"iter_4.pth: the checkpoint belongs to another architecture"):
        load_model(SHAPES_CONFIG, written, cfg_options=options | {"model.head.embed_dim": 16})


def test_classes_that_do_not_fit_the_head_are_refused(written, options, tmp_path):
    content = torch.load(written, weights_only=True)
    content["meta"]["dataset_meta"]["classes"].pop()
    write_checkpoint(content, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"has 9 classes .* model.head.num_classes is 10"):
        load_model(SHAPES_CONFIG, tmp_path / "short.pth", cfg_options=options)


def test_files_of_a_prediction_agree_with_it(written, options, photo, tmp_path, capsys):
    config = load_config(SHAPES_CONFIG, options)
    out = tmp_path / "new" / "scene.png"
    predict_to_file(config, written, photo, out)
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".json"))]
    height, width = read_image(photo).shape[:2]
    picture = Image.open(out)
    assert max(picture.size) == 480
    assert picture.size[0] * height == picture.size[1] * width
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["height"], record["width"]) == (height, width)
    predicted = predict_image(load_model(config, written), photo).pred_panoptic
    areas = {s["id"]: int((predicted.ids == s["id"]).sum()) for s in predicted.segments}
    assert areas
    assert {s["id"]: s["area"] for s in record["segments"]} == areas
    assert all(s["category"].startswith("my ") for s in record["segments"])


def test_picture_that_is_no_png_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"out.jpg: the picture is written as PNG; name it .*out.png"):
        predict_to_file("no_config.py", None, "no_image.jpg", tmp_path / "out.jpg")


def test_instances_below_the_threshold_are_left_out():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[:, 1:3] = True
    instances = InstanceData(scores=torch.tensor([0.9, 0.5, 0.4]), labels=torch.tensor([1, 0, 1]), masks=masks)
    sample = SegSample(pred_instances=instances)
    assert [record["score"] for record in segment_records(sample, ("a", "b"))] == [pytest.approx(0.9), 0.5]
    (record,) = segment_records(sample, ("a", "b"), score_threshold=0.8)
    assert (record["category"], record["area"], record["bbox"]) == ("b", 10, [0, 1, 5, 2])


def test_polygons_come_with_their_coordinates_and_as_coco_takes_them():
    square = torch.tensor([[10.0, 5.0], [20.0, 5.0], [20.0, 9.0], [10.001, 9.0]])
    polygons = torch.stack([square, square - 13, square.where(square > 5, torch.nan)])
    known = dict(
        labels=torch.tensor([1, 0, 0]), scores=torch.tensor([0.9, 0.8, 0.7]), depths=torch.tensor([2.0, 1.0, 0.0])
    )
    sample = SegSample(pred_instances=InstanceData(polygons=polygons, **known), metainfo=dict(ori_shape=(30, 40)))
    whole, cut = segment_records(sample, ("a", "b"))
    assert whole["polygon"] == [[10, 5], [20, 5], [20, 9], [10, 9]]
    assert whole["segmentation"] == [[10.5, 5.5, 20.5, 5.5, 20.5, 9.5, 10.5, 9.5]]
    assert (whole["depth"], whole["area"], whole["bbox"]) == (2, 55, [10, 5, 11, 5])
    assert cut["polygon"][0] == [-3, -8] and cut["area"] == 0
    assert json.loads(json.dumps([whole, cut])) == [whole, cut]
    masks = torch.zeros(3, 30, 40, dtype=torch.bool)
    masks[0, 6:8, 10:20] = True
    sample.pred_instances = InstanceData(polygons=polygons, masks=masks, **known)
    hidden, _ = segment_records(sample, ("a", "b"))
    assert hidden["polygon"] == whole["polygon"]
    assert (hidden["area"], hidden["segmentation"]["size"]) == (20, [30, 40])
