"""The video demo: scenes of every kind of prediction, drawing, files, and the command as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import densepred_cli
from densepred import build_model
from densepred.engine.checkpoint import write_checkpoint
from densepred.structures import InstanceData, PanopticMap, SegSample
from densepred.video import demo as demo_module
from densepred.video import sink as sink_module
from densepred.video.benchmark import benchmark_video
from densepred.video.demo import Demo, VideoOptions, check_display, load_predictor, run_video
from densepred.video.overlay import Painter, draw_timings, write
from densepred.video.scene import make_scene
from densepred.video.server import VideoServer
from densepred.video.sink import FileSink, check_out, has_pyav, letter_box
from densepred.video.source import VideoSource
from densepred.video.stages import Meter, Packet, StageError
from densepred.video.state import FrameHub, OverlayState
from tests.browser import browser, missing
from tests.small import CONFIGS, LOADERS, NARROW, SMALL, SMALL_MASK2FORMER, SMALL_SEMANTIC
from tests.streams import MJPEGServer, free_port, jpeg, wait_until

ROOT = Path(__file__).parents[1]
SIZE = (48, 64)
CLASSES, PALETTE = ("road", "car", "tree"), ((128, 64, 128), (0, 0, 142), (107, 142, 35))
CONFIG = CONFIGS / "unetpp_effnetlite0_camvid.py"
META = dict(classes=CLASSES, palette=PALETTE)
ALL_ON = OverlayState(scores=True).snapshot()
needs_pyav = pytest.mark.skipif(not has_pyav(), reason="PyAV is not installed")


def squares(*corners: tuple[int, int], side: int = 16) -> torch.Tensor:
    """Return squares (N, 4, 2) with their upper left corners (x, y)."""
    unit = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) * (side - 1)
    return torch.tensor(corners)[:, None] + unit


def masks_of(polygons: torch.Tensor) -> torch.Tensor:
    pictures = [cv2.fillPoly(np.zeros(SIZE, np.uint8), [p.int().numpy()], 1) for p in polygons]
    return torch.from_numpy(np.stack(pictures)).bool()


def instances(scores: list[float], **fields: torch.Tensor) -> SegSample:
    sample = SegSample()
    sample.pred_instances = InstanceData(labels=torch.ones(len(scores)).long(), scores=torch.tensor(scores), **fields)
    return sample


def semantic() -> SegSample:
    sample = SegSample()
    labels = torch.full(SIZE, 255)
    labels[:20], labels[20:40] = 2, 0
    sample.pred_semantic = labels
    return sample


def panoptic(left: int = 8) -> SegSample:
    ids = torch.full(SIZE, 7)
    ids[:4] = 0
    ids[16:32, left : left + 16] = 300
    segments = [dict(id=7, label=0, isthing=False, score=0.9), dict(id=300, label=1, isthing=True, score=0.8)]
    sample = SegSample()
    sample.pred_panoptic = PanopticMap(ids, segments)
    return sample


def seen(scene, k: int) -> np.ndarray:
    return scene.index == k + 1


def test_scene_of_a_semantic_map():
    scene = make_scene(semantic(), SIZE, 0.5)
    assert [(item.label, item.thing, item.score) for item in scene.items] == [(0, False, None), (2, False, None)]
    assert seen(scene, 1)[:20].all() and seen(scene, 0)[20:40].all() and not scene.index[40:].any()


def test_scene_of_a_panoptic_map():
    scene = make_scene(panoptic(), SIZE, 0.5)
    assert [(item.label, item.thing, item.score) for item in scene.items] == [(0, False, 0.9), (1, True, 0.8)]
    assert scene.items[1].box.tolist() == [8, 16, 24, 32]
    assert seen(scene, 1)[16:32, 8:24].all() and seen(scene, 0)[40:].all() and not scene.index[:4].any()


def test_scene_of_masks_has_the_best_on_top_and_no_weak_ones():
    masks = masks_of(squares((0, 0), (8, 8), (40, 20)))
    scene = make_scene(instances([0.6, 0.9, 0.4], masks=masks), SIZE, 0.5)
    assert [item.score for item in scene.items] == pytest.approx([0.9, 0.6])
    assert np.array_equal(seen(scene, 0), masks[1]) and np.array_equal(seen(scene, 1), masks[0] & ~masks[1])


def test_scene_of_polygons_has_the_nearest_on_top():
    polygons = squares((0, 0), (8, 8)).float()
    scene = make_scene(instances([0.9, 0.6], polygons=polygons, depths=torch.tensor([0.7, 0.1])), SIZE, 0.5)
    masks = masks_of(polygons).numpy()
    assert np.array_equal(seen(scene, 1), masks[1]) and np.array_equal(seen(scene, 0), masks[0] & ~masks[1])
    assert scene.items[1].box.tolist() == [8, 8, 23, 23]
    assert np.array_equal(scene.items[0].polygon, polygons[0])


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -1e9])
def test_wild_vertices_are_drawn_within_the_frame(wild):
    polygons = squares((10, 10)).float()
    polygons[0, 0, 0] = wild
    scene = make_scene(instances([0.9], polygons=polygons), SIZE, 0.5)
    painter = Painter(CLASSES, PALETTE)
    picture = painter.draw(np.zeros((*SIZE, 3), np.uint8), scene, painter.colors(scene.items), ALL_ON)
    assert picture.shape == (*SIZE, 3)


@pytest.mark.parametrize("kind", ["masks", "polygons"])
def test_a_frame_without_objects(kind):
    fields = dict(masks=torch.zeros(0, *SIZE).bool()) if kind == "masks" else dict(polygons=torch.zeros(0, 16, 2))
    scene = make_scene(instances([], **fields), SIZE, 0.5)
    painter = Painter(CLASSES, PALETTE)
    rgb = np.full((*SIZE, 3), 77, np.uint8)
    assert np.array_equal(painter.draw(rgb, scene, painter.colors([]), ALL_ON), rgb)


def test_more_objects_than_a_map_can_number():
    sample = instances([0.9] * 300, polygons=squares(*[(k % 40, k % 30) for k in range(300)]).float())
    assert len(make_scene(sample, SIZE, 0.5).items) == 255


def test_a_model_that_segments_nothing_is_refused():
    with pytest.raises(ValueError, match="a video shows a segmentation"):
        make_scene(SegSample(), SIZE, 0.5)


def test_masks_are_mixed_by_opacity_and_switched_off():
    rgb = np.full((*SIZE, 3), 100, np.uint8)
    scene = make_scene(semantic(), SIZE, 0.5)
    painter, off = Painter(CLASSES, PALETTE), dict.fromkeys(ALL_ON, False)
    colors = painter.colors(scene.items)
    assert colors == [PALETTE[0], PALETTE[2]]
    assert np.array_equal(painter.draw(rgb, scene, colors, off | {"opacity": 0.5}), rgb)
    for opacity in (0.0, 0.3, 1.0):
        picture = painter.draw(rgb, scene, colors, off | {"masks": True, "opacity": opacity})
        expected = (1 - opacity) * 100 + opacity * np.array(PALETTE[2])
        assert np.abs(picture[5, 5] - expected).max() <= 1
        assert (picture[45] == 100).all()  # void stays as it is


@pytest.mark.parametrize("switch", ["polygons", "classes", "scores"])
@pytest.mark.parametrize("kind", ["panoptic", "polygons"])
def test_each_switch_draws_something(switch, kind):
    sample = panoptic() if kind == "panoptic" else instances([0.9], polygons=squares((20, 20)).float())
    scene = make_scene(sample, SIZE, 0.5)
    rgb = np.full((*SIZE, 3), 100, np.uint8)
    painter = Painter(CLASSES, PALETTE)
    switches = dict.fromkeys(ALL_ON, False) | {switch: True, "opacity": 0.5}
    picture = painter.draw(rgb, scene, painter.colors(scene.items), switches)
    assert (picture != rgb).any() and (rgb == 100).all()


def test_colours_stay_with_objects_over_frames():
    painter = Painter(CLASSES, PALETTE)
    found = []
    for step in range(20):
        polygons = squares((2 * step, 0), (44 - 2 * step, 30)).float()
        order = [0, 1] if step % 2 else [1, 0]
        scores = [0.9, 0.8]
        items = make_scene(instances(scores, polygons=polygons[order]), SIZE, 0.5).items
        colors = painter.colors(items)
        found.append([colors[order.index(0)], colors[order.index(1)]])
    assert all(pair == found[0] for pair in found) and found[0][0] != found[0][1]


def test_timings_and_text_fit_small_and_large_pictures():
    meter = Meter(live=True)
    meter.add(Packet(1, 0.0, None, ms=dict(decode=1.0, model=20.0, draw=3.0)), 0.05)
    for size in ((30, 20), (540, 960)):
        picture = np.full((*size, 3), 200, np.uint8)
        draw_timings(picture, meter.record(drops=3))
        write(picture, "far away", 10**4, -50, 1.0)
        assert (picture != 200).any()


def test_drawing_a_large_frame_takes_milliseconds():
    size = (540, 960)
    sample = semantic()
    sample.pred_semantic = torch.from_numpy(np.arange(540)[:, None] // 60 % 3).repeat(1, 960)
    rgb = np.zeros((*size, 3), np.uint8)
    painter, times = Painter(CLASSES, PALETTE), []
    for _ in range(10):
        start = time.thread_time()
        scene = make_scene(sample, size, 0.5)
        painter.draw(rgb, scene, painter.colors(scene.items), ALL_ON)
        times.append(time.thread_time() - start)
    assert min(times) < 0.03  # `densepred.visualization` needs 0.07


def test_switches_are_set_together_or_not_at_all():
    state = OverlayState()
    state.update(opacity=1, scores=True)
    assert state.snapshot()["opacity"] == 1.0 and state.snapshot()["scores"] is True
    for wrong in ({"opacity": 1.5}, {"opacity": True}, {"opacity": float("nan")}, {"masks": 1}, {"nothing": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            state.update(timings=False, **wrong)
    assert state.snapshot()["timings"] is True


def test_the_hub_hands_on_the_newest_frame():
    hub = FrameHub()
    assert hub.wait(0, 0.01) is None and hub.wait(-1, 0.01) is None and hub.record() == {}
    for value in (50, 200):
        hub.publish(np.full((*SIZE, 3), value, np.uint8), {"frames": value})
    number, data = hub.wait(0, 1.0)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert number == 2 and abs(picture.mean() - 200) < 3 and hub.record() == {"frames": 200}
    assert hub.wait(1, 1.0)[1] is data  # encoded once for all
    assert hub.wait(2, 0.01) is None
    threading.Timer(0.1, hub.close).start()
    start = time.monotonic()
    assert hub.wait(2, 20.0) is None and time.monotonic() - start < 10 and hub.closed


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (answer := capture.read())[0]:
        frames.append(answer[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def ramp(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    return [np.full((*size, 3), (40 + 5 * k, 100, 200 - 5 * k), np.uint8) for k in range(count)]


@pytest.mark.parametrize("name", ["a.webm", pytest.param("a.mp4", marks=needs_pyav), "opencv.webm"])
def test_files_hold_every_frame(name, tmp_path, monkeypatch, capfd):
    if name == "opencv.webm":
        monkeypatch.setattr(sink_module, "has_pyav", lambda: False)
    path = tmp_path / name
    frames = ramp(20, (49, 63))
    sink = FileSink(path, 12.5, live=False)
    for frame in frames:
        sink.write(frame, 0.0)
    sink.close()
    found, fps = read_video(path)
    assert capfd.readouterr().err == ""
    assert fps == pytest.approx(12.5) and len(found) == 20
    assert found[0].shape == (50, 64, 3)
    assert all(np.abs(a[5:40, 5:50].mean((0, 1)) - b[0, 0]).max() < 15 for a, b in zip(found, frames, strict=True))
    assert sink.record()["frames"] == 20
    codec = path.read_bytes()[:4000]
    assert b"V_VP9" in codec if path.suffix == ".webm" else b"ftyp" in codec


@needs_pyav
@pytest.mark.parametrize("ending", [".webm", ".mp4"])
def test_pictures_stay_sharp_at_a_low_rate(ending, tmp_path):
    """Of a slide show every frame is a new scene, for which a bit rate reckoned by the second leaves nothing."""
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.integers(0, 255, (24, 32, 1)), np.ones((4, 4, 3))).astype(np.uint8) for _ in range(6)]
    sink = FileSink(tmp_path / f"a{ending}", 1, live=False)
    for scene in scenes:
        sink.write(scene, 0.0)
    sink.close()
    found = read_video(tmp_path / f"a{ending}")[0]
    errors = [np.abs(frame.astype(float) - scene).mean() for frame, scene in zip(found, scenes, strict=True)]
    assert max(errors) < 10


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_browser_plays_the_files(tmp_path, monkeypatch):
    names = ["a.webm", "opencv.webm"] + ["a.mp4"] * has_pyav()
    for name in names:
        monkeypatch.setattr(sink_module, "has_pyav", lambda name=name: name != "opencv.webm" and has_pyav())
        sink = FileSink(tmp_path / name, 10, live=False)
        for frame in ramp(5, (48, 96)):
            sink.write(frame, 0.0)
        sink.close()
    videos = "".join(f'<video muted autoplay src="{name}"></video>' for name in names)
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html>{videos}")
    state = (
        "return [...document.querySelectorAll('video')].map(v => v.error ? v.error.message : [v.videoWidth, v.ended])"
    )
    with browser(tmp_path / "profile") as chromium:
        chromium.open(f"file://{tmp_path}/page.html")
        wait_until(lambda: all(shown != [96, False] and shown != [0, False] for shown in chromium.run(state)), 60)
        assert chromium.run(state) == [[96, True]] * len(names)


@needs_pyav
@pytest.mark.parametrize("ending", [".webm", ".mp4"])
def test_a_live_file_keeps_the_time_of_its_frames(ending, tmp_path):
    import av

    sink = FileSink(tmp_path / f"a{ending}", 25, live=True)
    arrived = [5.0, 5.04, 5.5, 5.5, 6.25]  # two at the same moment must not stop the writer
    for frame, moment in zip(ramp(5), arrived, strict=True):
        sink.write(frame, moment)
    sink.close()
    with av.open(str(tmp_path / f"a{ending}")) as file:
        times = [float(frame.time) for frame in file.decode(video=0)]
    assert times == pytest.approx([0, 0.04, 0.5, 0.5, 1.25], abs=2e-3)


def test_a_file_without_frames_is_none(tmp_path):
    sink = FileSink(tmp_path / "a.webm", 25, live=False)
    sink.close()
    assert not list(tmp_path.iterdir())


def test_letter_box_keeps_proportions():
    frame = np.full((40, 40, 3), 200, np.uint8)
    boxed = letter_box(frame, (40, 80))
    assert (boxed[:, 20:60] == 200).all() and not boxed[:, :20].any() and not boxed[:, 60:].any()
    assert (letter_box(frame, (20, 10))[5:15] == 200).all()
    assert letter_box(frame, (40, 40)) is frame


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"\.webm \(VP9\) or \.mp4"):
        check_out(tmp_path / "a.avi")
    with pytest.raises(OSError):
        check_out(tmp_path / "file" / "a.webm")
    (tmp_path / "folder.webm").mkdir()
    with pytest.raises(OSError):
        check_out(tmp_path / "folder.webm")
    old = tmp_path / "old.webm"
    old.write_bytes(b"old")
    check_out(old)
    check_out(tmp_path / "new" / "a.webm")
    assert old.read_bytes() == b"old" and not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(sink_module, "has_pyav", lambda: False)
    with pytest.raises(ValueError, match=r"H\.264 needs PyAV"):
        check_out(tmp_path / "a.mp4")


def test_a_window_needs_a_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="--serve"):
        check_display()


@pytest.fixture
def clip(tmp_path) -> Path:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, SIZE[::-1])
    for k in range(12):
        writer.write(np.full((*SIZE, 3), 20 * k, np.uint8))
    writer.release()
    return path


def run(source: VideoSource, predict=lambda rgb: panoptic(), **options) -> dict:
    return run_video(predict, META, source, VideoOptions("", **options), OverlayState(), FrameHub())


def test_a_file_becomes_a_file(clip, tmp_path):
    record = run(VideoSource(clip), out=tmp_path / "out.webm")
    assert (record["frames"], record["drops"], record["end"]) == (12, 0, "the source ended")
    assert record["input"]["frames"] == record["output"]["frames"] == 12
    frames, fps = read_video(tmp_path / "out.webm")
    assert len(frames) == 12 and fps == 10


def test_frames_of_a_new_size_are_letter_boxed_into_the_first(tmp_path):
    script = [jpeg(30), jpeg(60), jpeg(90, (64, 64)), jpeg(90, (64, 64)), 2.0]
    sizes = []

    def predict(rgb: np.ndarray) -> SegSample:
        sizes.append(rgb.shape[:2])
        sample = SegSample()
        sample.pred_semantic = torch.zeros(rgb.shape[:2]).long()
        return sample

    with MJPEGServer([[step for part in script for step in (part, 0.15)]]) as server:
        record = run(VideoSource(server.url, timeout=1.0), predict, out=tmp_path / "out.webm")
    assert set(sizes) == {(48, 64), (64, 64)} and record["live"]
    assert record["input"]["size_changes"] == 1
    assert {frame.shape for frame in read_video(tmp_path / "out.webm")[0]} == {(48, 64, 3)}


def test_a_failing_model_leaves_a_whole_file(clip, tmp_path):
    calls = []

    def predict(rgb: np.ndarray) -> SegSample:
        calls.append(rgb)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return panoptic()

    with pytest.raises(StageError, match=r"the model stage failed after \d+ frames: RuntimeError: out of memory"):
        run(VideoSource(clip), predict, out=tmp_path / "out.webm")
    assert 5 <= len(read_video(tmp_path / "out.webm")[0]) <= 8


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="no signals in this thread")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_twice_leaves_a_whole_file(clip, tmp_path, number):
    before, calls = signal.getsignal(number), []

    def predict(rgb: np.ndarray) -> SegSample:
        calls.append(rgb)
        if len(calls) > 5:  # some frames are drawn
            signal.raise_signal(number)
            time.sleep(0.2)
        return panoptic()

    record = run(VideoSource(clip), predict, out=tmp_path / "out.webm")
    assert record["end"] == "interrupted" and 1 <= record["frames"] < 12
    assert len(read_video(tmp_path / "out.webm")[0]) == record["frames"]
    assert signal.getsignal(number) is before


def test_a_stream_without_a_picture_is_no_video():
    with MJPEGServer([[b"junk", 3.0]]) as server, pytest.raises(ValueError, match="not one frame could be read"):
        run(VideoSource(server.url, timeout=0.6))


def test_a_paused_picture_stands_still_and_follows_the_switches():
    state, hub = OverlayState(timings=False), FrameHub()
    demo = Demo(lambda rgb: panoptic(), META, 0.5, state, hub)
    rgb = np.full((*SIZE, 3), 100, np.uint8)
    demo.draw(Packet(1, 0.0, rgb, demo.model(rgb)), Meter(False).record(0))
    before, number = demo.picture, hub.wait(0, 1)[0]
    state.update(paused=True)
    gate = threading.Thread(target=demo.gate, args=(lambda: False,))
    gate.start()
    assert hub.wait(number, 0.2) is None
    state.update(masks=False, polygons=False, classes=False)
    assert hub.wait(number, 5.0) is not None
    assert (before != 100).any() and (demo.picture == 100).all()
    state.update(paused=False)
    gate.join(5)
    assert not gate.is_alive()


MODELS = {
    "panoptic": ("kmax_r18_shapes.py", SMALL | NARROW),
    "masks": (
        "mask2former_r18_shapes.py",
        SMALL_MASK2FORMER | dict.fromkeys(("tasks", "model.head.tasks"), ("instance",)),
    ),
    "semantic": (CONFIG.name, LOADERS),
    "polygons": ("centerpoly_r18_shapes.py", SMALL_SEMANTIC),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_runs_on_a_video(kind, clip, shapes):
    config, options = MODELS[kind]
    torch.manual_seed(0)
    predict, meta = load_predictor(CONFIGS / config, None, cfg_options=options | {"data_root": str(shapes)})
    sample = predict(np.zeros((*SIZE, 3), np.uint8))
    if kind in ("masks", "polygons"):
        assert {"masks", "polygons"} & set(sample.pred_instances.keys()) == {kind}  # no masks where polygons are drawn
    else:
        assert f"pred_{kind}" in sample
    options = VideoOptions("", max_frames=3, score_threshold=0.0)
    record = run_video(predict, meta, VideoSource(clip), options, OverlayState(), FrameHub())
    assert record["frames"] == 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model as a run leaves it: with its classes, so that a video needs no data set."""
    path = tmp_path_factory.mktemp("model") / "model.pth"
    model = build_model(CONFIG)
    count = model.head.num_classes
    meta = dict(classes=[f"class {k}" for k in range(count)], palette=[(9 * k, 99, 9) for k in range(count)])
    meta |= dict(isthing=[False] * count, category_ids=list(range(count)))
    write_checkpoint({"state_dict": model.state_dict(), "meta": {"dataset_meta": meta}}, path)
    return path


def command(monkeypatch, *words: str) -> str:
    """Run ``densepred video`` and return what it refuses with."""
    monkeypatch.setattr(sys, "argv", ["densepred", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        densepred_cli.main("video")
    *message, remedy = str(caught.value.code).split("\n")
    assert "DENSEPRED_TRACEBACK" in remedy
    return "\n".join(message)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--source", "nowhere.mp4"], "nowhere.mp4: no such video"),
        (["--source", "CLIP", "--out", "a.avi"], "videos are written as"),
        (["--source", "CLIP", "--out", "/proc/none/a.webm"], "/proc/none"),
        (["--source", "CLIP", "--max-frames", "0"], "at least 1"),
        (["--source", "CLIP", "--timeout", "0"], "more than 0 seconds"),
        (["--source", "CLIP", "--timeout", "inf"], "at most a day"),
        (["--source", "CLIP", "--score-threshold", "50"], "scores are in 0..1"),
        (["--source", "OLD", "--out", "OLD"], "this is the source"),
        (["--source", "CLIP", "--opacity", "2"], "opacity is a number in 0..1"),
        (["--source", "CLIP", "--serve", "PORT"], "in use"),
        (["--source", "CLIP"], "other.pth"),
    ],
)
def test_the_command_refuses_with_one_message(words, message, clip, tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    write_checkpoint({"state_dict": {"weight": torch.zeros(2)}}, other)
    old = clip.rename(tmp_path / "old.webm") if "OLD" in words else None
    with MJPEGServer([]) as server:
        known = {"CLIP": str(clip), "OLD": str(old), "PORT": server.url.split(":")[2].split("/")[0]}
        words = [known.get(word, word) for word in words]
        refusal = command(monkeypatch, CONFIG, other, *words)
    assert message in refusal and ("\n" not in refusal or message == "other.pth")


def test_ctrl_c_while_the_model_loads_is_one_line(clip, tmp_path, monkeypatch, capsys):
    def load(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "load_predictor", load)
    words = [CONFIG, "a.pth", "--source", clip, "--out", tmp_path / "out.webm", "--serve", "0"]
    monkeypatch.setattr(sys, "argv", ["densepred", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        densepred_cli.main("video")
    assert caught.value.code == 130 and not (tmp_path / "out.webm").exists()
    assert re.fullmatch(r"live view: http://\S+\ndensepred video: interrupted\n", capsys.readouterr().err)
    assert "video-server" not in {thread.name for thread in threading.enumerate()}


def test_the_figures_are_out_before_the_server_waits_for_its_pages(clip, checkpoint, tmp_path, monkeypatch, capsys):
    whole = VideoServer.stop

    def stop(server: VideoServer) -> None:
        whole(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoServer, "stop", stop)
    out = tmp_path / "out.webm"
    words = [CONFIG, checkpoint, "--source", clip, "--out", out, "--max-frames", "2", "--serve", "0"]
    monkeypatch.setattr(sys, "argv", ["densepred", *map(str, words)])
    with pytest.raises(SystemExit):
        densepred_cli.main("video")
    assert json.loads(capsys.readouterr().out) == json.loads(out.with_suffix(".json").read_text())


def test_the_command_writes_a_video_and_its_figures(clip, checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs" / "out.webm"
    words = [CONFIG, checkpoint, "--source", clip, "--out", out, "--max-frames", "4"]
    monkeypatch.setattr(sys, "argv", ["densepred", *map(str, words), "--overlay", "masks", "--opacity", "1"])
    densepred_cli.main("video")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.with_suffix(".json").read_text())
    assert record["frames"] == record["output"]["frames"] == len(read_video(out)[0]) == 4
    assert set(record["stages"]) == {"decode", "model", "draw"}


def test_the_benchmark_times_a_model_on_a_file(clip, checkpoint):
    table = benchmark_video(CONFIG, checkpoint, str(clip), None, frames=60, repeats=1)
    assert "| model " in table and re.search(r"\n12 frames, 1 repeats; together [\d.]+x", table)  # it has no more
    with MJPEGServer([[jpeg(1)]]) as server, pytest.raises(ValueError, match="a live source has its own pace"):
        benchmark_video(CONFIG, checkpoint, server.url, None)


def test_ctrl_c_closes_the_file(checkpoint, tmp_path):
    out, port = tmp_path / "out.webm", free_port()
    with MJPEGServer([[step for k in range(20) for step in (jpeg(10 * k), 0.05)]], endless=True) as server:
        words = [CONFIG, checkpoint, "--source", server.url, "--out", out, "--serve", port]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "video_demo.py"), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            wait_until(lambda: drawn_frames(port) >= 5 or process.poll() is not None, 240)
            process.send_signal(signal.SIGINT)
            said, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, complaint
    assert re.fullmatch(r"live view: http://127\.0\.0\.1:\d+/\n", complaint)
    record = json.loads(said)
    assert record["end"] == "interrupted" and record["live"]
    assert len(read_video(out)[0]) == record["frames"] == record["output"]["frames"] >= 5


def drawn_frames(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/record.json", timeout=2) as answer:
            return json.load(answer).get("frames", 0)
    except OSError:
        return 0
