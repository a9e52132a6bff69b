"""densepred: dense prediction and segmentation."""
