"""What a run left behind, in a few lines."""

import json
from pathlib import Path


def where_outputs_are(work_dir: str) -> str:
    """Return lines that name the metrics, checkpoints and pictures in a work dir."""
    root = Path(work_dir)
    lines = []
    if (root / "metrics.json").is_file():
        metrics = json.loads((root / "metrics.json").read_text())["metrics"]
        lines.append("  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if value is not None))
    outputs = {
        "metrics": sorted(root.glob("metrics.json")),
        "checkpoint": sorted(root.glob("best_*.pth"))[-1:] or sorted(root.glob("*.pth"), key=_written)[-1:],
        "curves": sorted(root.glob("*curve*.png")),
        "pictures": sorted(root.glob("pictures/*.png"), key=_written)[-1:],
    }
    lines += [f"{name:>10}: {path}" for name, paths in outputs.items() for path in paths]
    return "\n".join(lines)


def _written(path: Path) -> float:
    return path.stat().st_mtime
