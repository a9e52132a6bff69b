"""Single images: load a trained model, predict, write the picture."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose

from densepred.data.loading import read_image
from densepred.engine.build import build_model
from densepred.engine.checkpoint import read_checkpoint, state_dict_of
from densepred.engine.config import load_config, merge_options, resolve_links
from densepred.engine.conversion import fitting_weights, naming
from densepred.engine.hooks import check_classes
from densepred.engine.pictures import GRID_SIDE
from densepred.heads.polygon_masks import round_coordinates
from densepred.ops.polygon_fill import coco_polygon, fill_polygon
from densepred.registry import DATASETS, TRANSFORMS
from densepred.segmentor import Segmentor
from densepred.structures import SegSample
from densepred.visualization import draw_sample, fit, resize_sample, write_png

PathLike = str | os.PathLike


def load_model(
    config: PathLike | Config,
    checkpoint: PathLike | None = None,
    device: str = "cpu",
    cfg_options: dict[str, Any] | None = None,
) -> Segmentor:
    """Build a model for prediction.

    Args:
        config: path of a config file, or a config as `densepred.load_config` returns it.
        checkpoint: ours or a published file; without one the weights stay as initialised.
        device: where the model goes.
        cfg_options: dotted key -> value, see `densepred.build_model`.

    Returns:
        The model in evaluation mode, with ``dataset_meta`` (``classes``, ``palette``, ``isthing``: those it was trained
        with, where the checkpoint tells) and ``test_pipeline``, the config's without the steps named ``Load...``.

    Raises:
        ConfigError: an unknown key, a wrong type, a name that is not registered.
        FileNotFoundError, ValueError: the checkpoint cannot be read or does not fit the model exactly; the classes do
            not fit the head; the device is none of this machine's.
    """
    require_device(device)
    model = build_model(config, cfg_options)
    dataset = _resolved(config, cfg_options)["test_dataloader"]["dataset"]
    trained_on = load_trained(model, checkpoint) if checkpoint is not None else None
    model.dataset_meta = trained_on or _classes_of(dataset)
    check_classes(model.dataset_meta, model.head.num_classes, getattr(model.head, "thing_classes", None), "test")
    steps = [step for step in dataset["pipeline"] if not step["type"].startswith("Load")]
    model.test_pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    return model.to(device).eval()


def require_device(device: str) -> None:
    """Refuse a device that this machine or this PyTorch has not.

    Raises:
        ValueError: it has not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch goes on with all it knows
        raise ValueError(f"device {device!r} cannot be used: {reason}; 'cpu' is always there") from None


def _resolved(config: PathLike | Config, cfg_options: dict[str, Any] | None) -> dict:
    if isinstance(config, Config):
        return resolve_links(merge_options(config, cfg_options).to_dict())[0]
    return load_config(config, cfg_options).to_dict()


def load_trained(model: Segmentor, checkpoint: PathLike) -> dict | None:
    """Load a checkpoint into ``model``, strictly, and return the classes it was trained on, where it tells them."""
    content = read_checkpoint(checkpoint)
    with naming(checkpoint):
        weights, _ = fitting_weights(model, state_dict_of(content), whole=True)
    model.load_state_dict(weights)
    return (content.get("meta") or {}).get("dataset_meta")


def _classes_of(dataset: dict) -> dict:
    """Return the class table of a data set's config; its files are opened only where they hold the table."""
    in_file = bool(dataset.get("classes_from_file"))
    return DATASETS.build({**dataset, "pipeline": [], "lazy_init": not in_file}).metainfo


def predict_image(model: Segmentor, image: PathLike | np.ndarray) -> SegSample:
    """Predict on one image.

    Args:
        model: from `load_model`.
        image: a file, or an (H, W, 3) uint8 RGB array.

    Returns:
        The sample with the head's ``pred_`` fields at the image's own size, on the model's device.

    Raises:
        FileNotFoundError, DamagedImageError: the file cannot be read.
        ValueError: the array is not of that form.
    """
    path = None if isinstance(image, np.ndarray) else os.fspath(image)
    pixels = image if path is None else read_image(path)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"an image is an (H, W, 3) uint8 RGB array, not {pixels.shape} {pixels.dtype}")
    size = pixels.shape[:2]
    results = dict(img=pixels, img_path=path, img_id=0, ori_shape=size, img_shape=size, rng=np.random.default_rng(0))
    packed = model.test_pipeline(results)
    with torch.no_grad():
        return model.test_step(dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]]))[0]


def predict_to_file(
    config: PathLike | Config,
    checkpoint: PathLike | None,
    image: PathLike,
    out: PathLike,
    device: str = "cpu",
    score_threshold: float = 0.5,
) -> None:
    """Predict on one image, write the picture to ``out`` (PNG) and the segments to a JSON file of its name; print both.

    The picture of a small image is enlarged, so that names can be read.

    The JSON holds ``image``, ``height``, ``width`` and ``segments``, see `segment_records`.

    Args:
        config, checkpoint, device: see `load_model`.
        image: the file.
        out: where the picture goes, ``*.png``.
        score_threshold: instances with a lower score, 0..1, are left out of both.

    Raises:
        ValueError: ``out`` is no PNG; and what `load_model` and `predict_image` raise.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the picture is written as PNG; name it {out.with_suffix('.png')}")
    pixels = read_image(image)
    model = load_model(config, checkpoint, device)
    sample = predict_image(model, pixels)
    longest = max(GRID_SIDE, *pixels.shape[:2])
    canvas = fit(pixels, longest, longest)
    print(
        write_png(
            out,
            draw_sample(canvas, resize_sample(sample, canvas.shape[:2]), "pred", model.dataset_meta, score_threshold),
        )
    )
    record = dict(image=os.fspath(image), height=pixels.shape[0], width=pixels.shape[1])
    record["segments"] = list(segment_records(sample, model.dataset_meta["classes"], score_threshold))
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(out.with_suffix(".json"))


def segment_records(
    sample: SegSample, classes: tuple[str, ...], score_threshold: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Yield a record for each predicted segment, from what `draw_sample` draws: panoptic, else semantic, else instances.

    Instances with a lower score than ``score_threshold`` are left out: models name a fixed number of them.

    A record has ``label``, ``category`` (its name), ``area`` in pixels, ``bbox`` (x, y, width, height), ``segmentation``
    (COCO's compressed RLE), and of ``id``, ``isthing``, ``score``, ``depth``, ``polygon`` ([[x, y], ...] in pixels) those
    that the prediction has. Of instances with polygons and no masks ``segmentation`` is COCO's list of polygons, whose
    coordinates are half a pixel more, area and box are those of their part in the image, and those with a vertex that is
    not finite are left out.
    """
    from pycocotools import mask as rle

    for code, known in _shapes(sample, score_threshold):
        text = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        yield {
            **known,
            "category": classes[known["label"]],
            "area": int(rle.area(code)),
            "bbox": rle.toBbox(code).tolist(),
            "segmentation": known.get("segmentation", text),
        }


def _shapes(sample: SegSample, score_threshold: float) -> Iterator[tuple[dict, dict]]:
    """Yield each segment's run lengths, as pycocotools has them, and what is known of it."""
    if "pred_panoptic" in sample:
        ids = sample.pred_panoptic.numpy()
        for segment in sample.pred_panoptic.segments:
            known = {k: segment[k] for k in ("id", "label", "isthing", "score") if k in segment}
            yield _run_lengths(ids == segment["id"]), known
    elif "pred_semantic" in sample:
        labels = sample.pred_semantic.cpu().numpy()
        for label in np.unique(labels):
            yield _run_lengths(labels == label), dict(label=int(label))
    else:
        yield from _instances(sample, score_threshold)


def _instances(sample: SegSample, score_threshold: float) -> Iterator[tuple[dict, dict]]:
    instances = sample.pred_instances.cpu()
    for n in torch.nonzero(instances.scores >= score_threshold).flatten().tolist():
        known: dict[str, Any] = dict(label=int(instances.labels[n]), score=float(instances.scores[n]))
        if "depths" in instances:
            known["depth"] = float(instances.depths[n])
        if "polygons" in instances:
            if not instances.polygons[n].isfinite().all():
                continue
            known["polygon"] = round_coordinates(instances.polygons[n].numpy()).tolist()
        if "masks" in instances:
            yield _run_lengths(instances.masks[n].numpy()), known
        else:
            polygon = np.array(known["polygon"])
            mask = np.zeros(sample.ori_shape, bool)
            window, inside = fill_polygon(polygon, sample.ori_shape)
            mask[window] = inside
            yield _run_lengths(mask), known | dict(segmentation=[coco_polygon(polygon)])


def _run_lengths(mask: np.ndarray) -> dict:
    from pycocotools import mask as rle

    return rle.encode(np.asfortranarray(mask, np.uint8))
