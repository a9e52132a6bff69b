"""densepred: dense prediction and segmentation. Importing it registers every part."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Albumentations asks the package index at every import
