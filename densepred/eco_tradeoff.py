"""ECO-M2F's trade-off: panoptic quality against the encoder's multiply-adds, for gates, for fixed depths and for the oracle.

All images are measured once at all exits (`densepred.eco.measure`); a policy is a depth for every image, and its quality
and cost are sums over what was measured there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from densepred.adaptive import GATE, fingerprint
from densepred.data.derived import ideal_depths
from densepred.eco import BETAS, Records, Source, measure
from densepred.engine.build import build_model
from densepred.engine.checkpoint import read_checkpoint, state_dict_of
from densepred.engine.conversion import fitting_weights, naming
from densepred.evaluation.panoptic import panoptic_quality
from densepred.visualization import write_png


def trade_off(
    source: Source,
    out_dir: str | Path,
    gates: Mapping[float, str],
    betas: Sequence[float] = BETAS,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Evaluate gates, fixed depths and the oracle, and write ``tradeoff.json`` and ``tradeoff.png``.

    What was measured stays in ``out_dir`` (``records.jsonl``), so that another gate or beta costs no forward pass.

    Args:
        source: the parent and the images, of the validation split.
        out_dir: folder.
        gates: checkpoint by the beta it was trained for.
        betas: of the oracle, which knows each image's ideal depth.
        workers: see `densepred.eco.measure`.

    Returns:
        A point for each policy, see `point`.

    Raises:
        ValueError: a gate was trained on another parent.
    """
    out_dir = Path(out_dir)
    records = measure(source, out_dir / "records.jsonl", workers)
    depths, parent = records.identity["model"]["depths"], records.identity["model"]["fingerprint"]
    chosen = {(beta, path): gate_depths(records, source, path, parent) for beta, path in gates.items()}
    points = [point(records, [depth] * len(records.images), policy="fixed", depth=depth) for depth in depths]
    points += [point(records, ideal_depths(records.quality, depths, b), policy="oracle", beta=b) for b in betas]
    points += [point(records, d, policy="gate", beta=b, checkpoint=path) for (b, path), d in chosen.items()]
    text = json.dumps(dict(**_origin(records, source), points=points), indent=1)
    (out_dir / "tradeoff.json").write_text(text + "\n")
    write_png(out_dir / "tradeoff.png", picture(points))
    print(_table(points))
    print(f"written to {out_dir / 'tradeoff.json'} and {out_dir / 'tradeoff.png'}")
    return points


def parse_gates(words: Sequence[str]) -> dict[float, str]:
    """Turn ``BETA=CHECKPOINT`` into checkpoints by beta.

    Raises:
        ValueError: a word is not of that form.
    """
    gates = {}
    for word in words:
        beta, _, checkpoint = word.partition("=")
        try:
            gates[float(beta)] = checkpoint
        except ValueError:
            checkpoint = ""
        if not checkpoint:
            raise ValueError(f"--gate {word}: write BETA=CHECKPOINT, e.g. 0.0005=work_dirs/gate/iter_1000.pth")
    return gates


def _origin(records: Records, source: Source) -> dict[str, Any]:
    return dict(
        config=source.config,
        checkpoint=source.checkpoint,
        dataset=records.identity["dataset"],
        unit="1 multiply-add = 1",
    )


def point(records: Records, depths: Sequence[int], **policy: Any) -> dict[str, Any]:
    """Return one policy's figures.

    Args:
        records: what was measured.
        depths: (N,) layers run for each image.
        policy: what names it in the result.

    Returns:
        ``policy``, then ``PQ``, ``PQ_th``, ``PQ_st`` in percent, ``mean_depth``, ``encoder_gflops`` (in the layers run,
        mean of the images) and ``images_by_depth``. Without things or stuff their PQ is ``None``.

    Raises:
        ValueError: no segment counts in any image.
    """
    depths = np.asarray(depths)
    metainfo, exits = records.identity["metainfo"], records.identity["model"]["depths"]
    total = np.zeros((len(metainfo["classes"]), 4))
    for rows, depth in zip(records.counts, depths, strict=True):
        run = rows[rows[:, 0] == exits.index(depth)]
        total[run[:, 1].astype(int)] += run[:, 2:]
    quality = panoptic_quality(total, metainfo["isthing"])
    if not quality["All"]["n"]:
        raise ValueError(
            f"{records.identity['dataset']['source']}: no image has a segment that counts; nothing to compare"
        )
    groups = dict(PQ="All", PQ_th="Things", PQ_st="Stuff")
    return dict(
        **policy,
        **{name: 100 * quality[group]["pq"] if quality[group]["n"] else None for name, group in groups.items()},
        mean_depth=float(depths.mean()),
        encoder_gflops=float((depths * records.layer_flops).mean() / 1e9),
        images_by_depth={str(depth): int((depths == depth).sum()) for depth in exits},
    )


def gate_depths(records: Records, source: Source, checkpoint: str, parent: str) -> np.ndarray:
    """Return the depths (N,) that a trained gate chooses.

    Raises:
        ValueError: its checkpoint does not fit the model, or its other weights are not the parent's.
    """
    model = build_model(source.config, dict(source.cfg_options))
    with naming(checkpoint):
        weights, _ = fitting_weights(model, state_dict_of(read_checkpoint(checkpoint)), whole=True)
    if fingerprint(weights) != parent:
        raise ValueError(
            f"{checkpoint}: this gate belongs to other weights than {source.checkpoint}: its parent must be the one measured"
        )
    logits = F.linear(torch.from_numpy(records.vectors), weights[f"{GATE}weight"], weights[f"{GATE}bias"])  # (N, E)
    return np.array(records.identity["model"]["depths"])[logits.argmax(1).numpy()]


def _table(points: list[dict]) -> str:
    lines = [f"{'policy':>8} {'beta':>8} {'depth':>6} {'GFLOPs':>9} {'PQ':>7}"]
    for p in points:
        beta = f"{p['beta']:g}" if "beta" in p else ""
        lines.append(f"{p['policy']:>8} {beta:>8} {p['mean_depth']:>6.2f} {p['encoder_gflops']:>9.3f} {p['PQ']:>7.2f}")
    return "\n".join(lines)


def picture(points: Sequence[Mapping]) -> np.ndarray:
    """Draw PQ against encoder GFLOPs, a line a policy, as an RGB array (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    styles = dict(
        fixed=dict(color="black", marker="s", label="fixed depth (layers)"),
        oracle=dict(color="C0", marker="o", linestyle="--", label="oracle (beta)"),
        gate=dict(color="C1", marker="D", label="gate (beta)"),
    )
    for policy, style in styles.items():
        line = sorted((p for p in points if p["policy"] == policy), key=lambda p: p["encoder_gflops"])
        if line:
            axes.plot([p["encoder_gflops"] for p in line], [p["PQ"] for p in line], markersize=5, **style)
        for at, names in _labels(line).items():
            label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            where = dict(xytext=(4, 4), textcoords="offset points", fontsize="x-small", color=style["color"])
            axes.annotate(label, at, **where)
    axes.set_xlabel("encoder layers, GFLOPs an image (1 multiply-add = 1)")
    axes.set_ylabel("PQ")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _labels(points: Sequence[Mapping]) -> dict[tuple[float, float], list[str]]:
    """Return the depths or betas of points by where they lie: several betas may choose alike."""
    labels: dict[tuple[float, float], list[str]] = {}
    for p in sorted(points, key=lambda p: p.get("beta", 0)):
        labels.setdefault((p["encoder_gflops"], p["PQ"]), []).append(f"{p.get('beta', p.get('depth')):g}")
    return labels
