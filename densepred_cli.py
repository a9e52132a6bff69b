"""The command line: ``densepred COMMAND ...`` and ``tools/*.py`` are the same code.

It lies outside the package because importing the package imports torch, and ``--help`` must answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable

ERRORS_OF_USERS = (ValueError, OSError, FloatingPointError)
"""Shown as one message without a stack trace, unless DENSEPRED_TRACEBACK is set."""

INTERRUPTED = 130
"""The exit status that shells give a program ended by Ctrl-C."""

BOUNDARY = (
    "measure boundary IoU, contours R x the diagonal wide: 0.02, Cityscapes 0.005; beside IoU, of PQ and AP in them"
)
"""Help of an option of several tasks."""

OVERLAYS = ("masks", "polygons", "classes", "scores", "timings")
"""What a video shows on its frames."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what train and test share."""
    parser.add_argument("--work-dir", help="where outputs go; default: work_dirs/<config's name>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        metavar="KEY=VALUE",
        help="override config values, e.g. train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Train a model, or go on with an interrupted run."""
    parser.add_argument("config")
    add_options(parser)
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="auto|PATH", help="go on from the newest checkpoint, or from PATH"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")


def run_train(args: argparse.Namespace) -> None:
    from densepred.engine import report, runner
    from densepred.engine.cures import leave_processes

    launched = runner.train(args.config, options_of(args), args.work_dir, args.resume, args.launcher, args.amp)
    leave_processes()
    print(report.where_outputs_are(launched.work_dir))


def add_test(parser: argparse.ArgumentParser) -> None:
    """Evaluate a checkpoint on the config's test set."""
    parser.add_argument("config")
    parser.add_argument("checkpoint", help="ours, .safetensors, or a published file, converted on the fly")
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", help="write predictions in the data set's official format")
    parser.add_argument("--show-dir", metavar="DIR", help="write a picture of every prediction")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("panoptic", "semantic", "instance"),
        help="what to deliver and measure; default: the config's",
    )
    parser.add_argument(
        "--tta", action="store_true", help="semantic: mean over six scales (0.5 to 1.75) and mirror images, slower"
    )
    parser.add_argument(
        "--oracle",
        metavar="NAME,...",
        help="polygons: put the truth in the place of these outputs: heatmap, offset, polygon, depth",
    )


def run_test(args: argparse.Namespace) -> None:
    from densepred.engine import report, runner
    from densepred.engine.cures import leave_processes

    options = ({"tasks": args.tasks} if args.tasks else {}) | options_of(args)
    if args.tta:
        from densepred.semantic_inference import TTA

        options = {"model.tta": dict(TTA)} | options
    if args.oracle:
        options = {"model.head.oracle": args.oracle.split(",")} | options
    launched = runner.test(args.config, args.checkpoint, options, args.work_dir, args.launcher, args.out, args.show_dir)
    leave_processes()
    print(report.where_outputs_are(launched.work_dir))


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Score predictions in an official format, without a model or a config."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    panoptic = tasks.add_parser("panoptic", help="COCO panoptic format: PQ, SQ, RQ")
    panoptic.add_argument("--gt", required=True, metavar="JSON", help="ground truth")
    panoptic.add_argument("--gt-dir", required=True, metavar="DIR", help="its PNG files")
    panoptic.add_argument("--pred", required=True, metavar="JSON", help="predictions")
    panoptic.add_argument("--pred-dir", required=True, metavar="DIR", help="their PNG files")
    panoptic.add_argument("--workers", type=int, default=0, help="processes; 0 counts in this one")
    instance = tasks.add_parser("instance", help="COCO results format: AP of masks or boxes")
    instance.add_argument("--gt", required=True, metavar="JSON", help="ground truth")
    instance.add_argument("--pred", required=True, metavar="JSON", help="list of results")
    instance.add_argument("--iou-type", choices=("segm", "bbox"), default="segm")
    cityscapes = tasks.add_parser("cityscapes-instance", help="Cityscapes results format: AP, AP50")
    cityscapes.add_argument("--gt", required=True, metavar="DIR", help="folder with *_gtFine_instanceIds.png below it")
    cityscapes.add_argument("--pred", required=True, metavar="DIR", help="folder of the text files and their masks")
    frames = tasks.add_parser("cityscapes-semantic", help="Cityscapes label maps: IoU and iIoU, classes and categories")
    frames.add_argument("--gt", required=True, metavar="DIR", help="folder with *_gtFine_instanceIds.png below it")
    frames.add_argument("--pred", required=True, metavar="DIR", help="label ids, one PNG a frame, named like it")
    semantic = tasks.add_parser("semantic", help="label maps: IoU, accuracy, Dice, boundary IoU, confusion matrix")
    semantic.add_argument("--gt", required=True, metavar="DIR", help="label maps")
    semantic.add_argument("--pred", required=True, metavar="DIR", help="label maps of the same names, classes 0..N-1")
    semantic.add_argument(
        "--dataset",
        choices=("ade20k", "camvid", "cityscapes", "dsb2018", "isbi2012"),
        help="truth as this set stores it (Cityscapes: predicted label ids, too), instead of the next three",
    )
    semantic.add_argument("--num-classes", type=int, metavar="N")
    semantic.add_argument("--ignore-index", type=int, help="true label that does not count; default: 255")
    semantic.add_argument("--reduce-zero-label", action="store_true", help="truth: 0 is ignored, k means class k - 1")
    semantic.add_argument("--confusion", metavar="CSV|PNG", help="write the confusion matrix, as the ending says")
    for task in (panoptic, instance, cityscapes, semantic):
        task.add_argument("--boundary-ratio", type=float, metavar="R", help=BOUNDARY)
    for task in (panoptic, instance, cityscapes, frames, semantic):
        task.add_argument("--out", metavar="JSON", help="write the figures, in 0..1 with full precision")


def run_evaluate(args: argparse.Namespace) -> None:
    if args.task == "panoptic":
        from densepred.evaluation.panoptic import evaluate_and_print

        paths = (args.gt, args.gt_dir, args.pred, args.pred_dir)
        evaluate_and_print(*paths, args.workers, args.boundary_ratio, args.out)
    elif args.task == "instance":
        from densepred.evaluation.coco_instance import evaluate_and_print

        evaluate_and_print(args.gt, args.pred, args.iou_type, args.boundary_ratio, args.out)
    elif args.task == "cityscapes-instance":
        from densepred.evaluation.cityscapes_instance import evaluate_and_print

        evaluate_and_print(args.gt, args.pred, args.boundary_ratio, args.out)
    elif args.task == "cityscapes-semantic":
        from densepred.evaluation.cityscapes_semantic import evaluate_and_print

        evaluate_and_print(args.gt, args.pred, args.out)
    else:
        from densepred.evaluation.semantic_files import evaluate_and_print

        labels = (args.num_classes, args.ignore_index, args.reduce_zero_label, args.dataset)
        evaluate_and_print(args.gt, args.pred, *labels, args.boundary_ratio, args.confusion, args.out)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Turn published weights into ours: every key used, none missing, every shape checked."""
    parser.add_argument("src", help="the published file (.pth, .pkl, .safetensors)")
    parser.add_argument("dst", help="where ours goes (.pth or .safetensors)")
    parser.add_argument(
        "--source", required=True, help="kmax-deeplab, torchvision-resnet, detectron2-resnet, convnext, ..."
    )
    parser.add_argument("--config", required=True, help="the config of the model that will load it")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE")


def run_convert(args: argparse.Namespace) -> None:
    from densepred import build_model
    from densepred.engine.conversion import convert_file

    print(convert_file(args.src, args.dst, args.source, build_model(args.config, options_of(args))))


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Time our code against a named baseline in the same run."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    evaluators = subjects.add_parser("eval", help="panoptic quality against the official evaluator, one core")
    evaluators.add_argument("--gt", metavar="JSON", help="default: generated maps")
    evaluators.add_argument("--gt-dir", metavar="DIR")
    evaluators.add_argument("--pred", metavar="JSON")
    evaluators.add_argument("--pred-dir", metavar="DIR")
    evaluators.add_argument("--repeats", type=int, default=5)
    model = subjects.add_parser(
        "model", help="a config: where a frame's time goes; without one Mask2Former against a baseline, one thread"
    )
    model.add_argument("config", nargs="?")
    model.add_argument("checkpoint", nargs="?", help="default: weights as initialised")
    model.add_argument("--frame", nargs=2, type=int, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    model.add_argument("--device", default="cpu", help="of a config's frames and steps")
    model.add_argument(
        "--switches",
        nargs="+",
        metavar="NAME",
        help="a config's inference and training steps with channels_last, bf16, compile, each and all, against without",
    )
    model.add_argument("--batch", type=int, default=2, help="images of a step under --switches")
    model.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="of --switches, e.g. data_root=...")
    model.add_argument(
        "--baseline", choices=("transformers", "none"), help="default: none for a config, else transformers"
    )
    model.add_argument("--encoder", nargs="+", choices=("swin_t", "r50"), default=["swin_t", "r50"])
    model.add_argument("--size", type=int, default=512, help="side of the square image")
    model.add_argument("--repeats", type=int, default=5)
    polygons = subjects.add_parser("polygons", help="decoding and region losses against the published loops")
    polygons.add_argument("--repeats", type=int, default=20)
    ops = subjects.add_parser("ops", help="operators against the official formulations: time, memory, accuracy")
    ops.add_argument("--device", default="cpu", help="cpu or cuda")
    ops.add_argument("--op", nargs="+", metavar="NAME", help="default: all")
    ops.add_argument("--repeats", type=int, default=5)
    ops.add_argument("--dtype", nargs="+", default=["float32"], metavar="TYPE", help="float32, bfloat16, float16")
    video = subjects.add_parser("video", help="the video demo's stages together against the slowest of them alone")
    video.add_argument("config", nargs="?")
    video.add_argument("checkpoint", nargs="?", help="default: weights as initialised")
    video.add_argument("--source", metavar="FILE")
    video.add_argument(
        "--synthetic",
        nargs=3,
        type=float,
        metavar=("DECODE", "MODEL", "DRAW"),
        help="instead of a model on a file: milliseconds that each stage waits",
    )
    video.add_argument("--frames", type=int, default=60, help="of each pass")
    video.add_argument("--repeats", type=int, default=3)
    video.add_argument("--device", default="cpu")


def run_benchmark(args: argparse.Namespace) -> None:
    if args.subject == "eval":
        from densepred.evaluation.benchmark import benchmark_eval

        print(benchmark_eval(args.gt, args.gt_dir, args.pred, args.pred_dir, args.repeats))
    elif args.subject == "ops":
        from densepred.engine.benchmark_ops import benchmark_ops

        print(benchmark_ops(args.device, args.op, args.repeats, args.dtype))
    elif args.subject == "video":
        from densepred.video.benchmark import benchmark_video

        what = (args.config, args.checkpoint, args.source, args.synthetic)
        print(benchmark_video(*what, args.frames, args.repeats, args.device))
    elif args.subject == "polygons":
        from densepred.engine.benchmark_polygons import benchmark_polygons

        print(benchmark_polygons(args.repeats))
    elif args.config is None or args.baseline == "transformers":
        from densepred.engine.benchmark_model import benchmark_model

        print(benchmark_model([args.config] if args.config else args.encoder, args.size, args.repeats, args.device))
    elif args.switches:
        from densepred.engine.benchmark_switches import benchmark_switches

        what = (args.config, args.switches, options_of(args))
        print(benchmark_switches(*what, args.batch, args.repeats, args.device))
    else:
        from densepred.engine.benchmark_frame import benchmark_frame

        print(benchmark_frame(args.config, args.checkpoint, args.frame, args.repeats, args.device))


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Segment one image: a picture and a JSON record."""
    parser.add_argument("image")
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="prediction.png", metavar="PNG", help="a .json beside it lists the segments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="leave out instances below it, 0..1")


def run_predict(args: argparse.Namespace) -> None:
    from densepred.inference import predict_to_file

    predict_to_file(args.config, args.checkpoint, args.image, args.out, args.device, args.score_threshold)


def add_video(parser: argparse.ArgumentParser) -> None:
    """Run a model on a video in real time: a file, a camera, a network stream."""
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--source", required=True, metavar="FILE|CAMERA|URL", help="a file, 0, rtsp://..., http://...")
    parser.add_argument(
        "--out", metavar="WEBM|MP4", help="write a video, VP9 or H.264; a .json beside it has the times"
    )
    parser.add_argument("--show", action="store_true", help="open a window: space pauses, q ends")
    parser.add_argument("--serve", metavar="[HOST:]PORT", help="a web page with the live view; default host: 127.0.0.1")
    parser.add_argument("--max-frames", type=int, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="leave out instances below it, 0..1")
    parser.add_argument(
        "--overlay",
        nargs="*",
        choices=OVERLAYS,
        default=["masks", "polygons", "classes", "timings"],
        help="what to draw; default: all but scores",
    )
    parser.add_argument("--opacity", type=float, default=0.5, help="of masks, 0..1")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds of silence that end a live source")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE")


def run_video(args: argparse.Namespace) -> None:
    from densepred.video.demo import VideoOptions, run_demo

    names = ("source", "out", "show", "serve", "max_frames", "score_threshold", "timeout")
    overlay = {name: name in args.overlay for name in OVERLAYS} | {"opacity": args.opacity}
    options = VideoOptions(**{name: getattr(args, name) for name in names}, overlay=overlay)
    run_demo(args.config, args.checkpoint, options, args.device, options_of(args))


def add_eco_source(parser: argparse.ArgumentParser) -> None:
    """Add what the tools of ECO-M2F share."""
    parser.add_argument("config", help="the parent's")
    parser.add_argument("checkpoint", help="the parent's weights")
    parser.add_argument(
        "--betas", nargs="+", type=float, metavar="BETA", help="the PQ that a layer less is worth, 0..1"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 measures in this one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; with workers they share all GPUs")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE")


def eco_source(args: argparse.Namespace, split: str) -> dict:
    """Return the arguments that the tools of ECO-M2F share."""
    from densepred.eco import BETAS, Source

    source = Source(args.config, args.checkpoint, split, args.device, options_of(args))
    return dict(source=source, betas=args.betas or BETAS, workers=args.workers)


def add_eco_derive(parser: argparse.ArgumentParser) -> None:
    """ECO-M2F, step 2: measure every encoder depth on every image, derive the ideal one for each beta."""
    add_eco_source(parser)
    parser.add_argument("--out", required=True, metavar="JSON", help="a killed run goes on; further betas cost nothing")
    parser.add_argument("--split", choices=("train", "val"), default="train")


def run_eco_derive(args: argparse.Namespace) -> None:
    from densepred.eco import derive

    derive(out=args.out, **eco_source(args, args.split))


def add_eco_tradeoff(parser: argparse.ArgumentParser) -> None:
    """ECO-M2F: quality against encoder GFLOPs of gates, fixed depths and the oracle; a JSON and a plot."""
    add_eco_source(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="what was measured stays there for the next call")
    parser.add_argument("--gate", nargs="+", default=[], metavar="BETA=CHECKPOINT", help="the trained gates")


def run_eco_tradeoff(args: argparse.Namespace) -> None:
    from densepred.eco_tradeoff import parse_gates, trade_off

    trade_off(out_dir=args.out, gates=parse_gates(args.gate), **eco_source(args, "val"))


def add_print_config(parser: argparse.ArgumentParser) -> None:
    """Print a config as the run sees it, after bases, options and links."""
    parser.add_argument("config")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE")


def run_print_config(args: argparse.Namespace) -> None:
    from densepred.engine.config import load_config

    print(load_config(args.config, options_of(args)).pretty_text)


COMMANDS: dict[str, tuple[Callable, Callable]] = {
    "train": (add_train, run_train),
    "test": (add_test, run_test),
    "evaluate": (add_evaluate, run_evaluate),
    "predict": (add_predict, run_predict),
    "video": (add_video, run_video),
    "convert": (add_convert, run_convert),
    "benchmark": (add_benchmark, run_benchmark),
    "eco-derive": (add_eco_derive, run_eco_derive),
    "eco-tradeoff": (add_eco_tradeoff, run_eco_tradeoff),
    "print-config": (add_print_config, run_print_config),
}


def options_of(args: argparse.Namespace) -> dict:
    """Return ``--cfg-options`` as a dict."""
    from densepred.engine.config import parse_options

    return parse_options(args.cfg_options)


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of one command, or of ``densepred`` with all of them."""
    if command is not None:
        parser = argparse.ArgumentParser(description=COMMANDS[command][0].__doc__)
        COMMANDS[command][0](parser)
        return parser
    parser = argparse.ArgumentParser(prog="densepred", description="Dense prediction and segmentation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=add.__doc__, description=add.__doc__))
    return parser


def main(command: str | None = None) -> None:
    """Run one command; without ``command`` the first word names it.

    Args:
        command: set by ``tools/*.py``, which are one command each.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the package index at every start
    args = make_parser(command).parse_args()
    command = command or args.command
    if args.__dict__.get("local_rank") is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        COMMANDS[command][1](args)
    except ERRORS_OF_USERS as error:
        if os.environ.get("DENSEPRED_TRACEBACK"):
            raise
        sys.exit(f"densepred {command}: {last_message(error)}\n(DENSEPRED_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        if os.environ.get("DENSEPRED_TRACEBACK"):
            raise
        print(f"densepred {command}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def last_message(error: Exception) -> str:
    """Return an error's message; of one raised in a data loader's worker, the message behind the worker's trace."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()


if __name__ == "__main__":
    main()
