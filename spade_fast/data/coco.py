# SPDX-License-Identifier: Apache-2.0
"""COCO-Stuff in the directory layout of the SPADE authors' release, and Flickr Landscapes labeled in its classes.

    dataroot/train_img/*.jpg    photographs             (val_img, ...)
    dataroot/train_label/*.png  0..181, 255 = unknown   (val_label, ...)
    dataroot/train_inst/*.png   instance ids            (val_inst, ...)

Unknown is a class of its own, 182, as in the authors' code: 183 classes.
"""

from __future__ import annotations

from pathlib import Path

from .base import Spec
from .palettes import distinct_colors

UNKNOWN = 182
DEFAULTS = {"num_classes": 183, "use_edges": True, "preprocess": "resize_and_crop", "crop_size": 256}
FLICKR_DEFAULTS = {**DEFAULTS, "use_edges": False}

# COCO-Stuff's labels.txt, ids 1..182, here 0..181. Things that were never annotated (hat, shoe, ...) keep a number.
CLASS_NAMES = [
    *"person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant".split("|"),
    *"street sign|stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra".split("|"),
    *"giraffe|hat|backpack|umbrella|shoe|eye glasses|handbag|tie|suitcase|frisbee|skis|snowboard".split("|"),
    *"sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|plate".split("|"),
    *"wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza".split("|"),
    *"donut|cake|chair|couch|potted plant|bed|mirror|dining table|window|desk|toilet|door|tv|laptop".split("|"),
    *"mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|blender|book|clock".split("|"),
    *"vase|scissors|teddy bear|hair drier|toothbrush|hair brush|banner|blanket|branch|bridge".split("|"),
    *"building-other|bush|cabinet|cage|cardboard|carpet|ceiling-other|ceiling-tile|cloth|clothes".split("|"),
    *"clouds|counter|cupboard|curtain|desk-stuff|dirt|door-stuff|fence|floor-marble|floor-other".split("|"),
    *"floor-stone|floor-tile|floor-wood|flower|fog|food-other|fruit|furniture-other|grass|gravel".split("|"),
    *"ground-other|hill|house|leaves|light|mat|metal|mirror-stuff|moss|mountain|mud|napkin|net|paper".split("|"),
    *"pavement|pillow|plant-other|plastic|platform|playingfield|railing|railroad|river|road|rock|roof".split("|"),
    *"rug|salad|sand|sea|shelf|sky-other|skyscraper|snow|solid-other|stairs|stone|straw".split("|"),
    *"structural-other|table|tent|textile-other|towel|tree|vegetable|wall-brick|wall-concrete".split("|"),
    *"wall-other|wall-panel|wall-stone|wall-tile|wall-wood|water-other|waterdrops|window-blind".split("|"),
    *"window-other|wood|unknown".split("|"),
]


def stored_values() -> dict[int, int]:
    """Stored label value -> class."""
    return {**{value: value for value in range(UNKNOWN)}, 255: UNKNOWN}


def spec(name: str, phase: str, root: Path | None) -> Spec:
    """Files of "coco", or of "flickr": the same folders without instances.

    Flickr Landscapes has no labels of its own: the paper predicts them with a DeepLab trained on COCO-Stuff. Its
    photographs cannot be redistributed, so both the images and the label maps are the user's to make.
    """
    base = root or Path()
    return Spec(
        name=name,
        num_classes=DEFAULTS["num_classes"],
        palette=distinct_colors(DEFAULTS["num_classes"]),
        class_names=list(CLASS_NAMES),
        classes=stored_values(),
        image_dir=base / f"{phase}_img",
        label_dir=base / f"{phase}_label",
        instance_dir=base / f"{phase}_inst" if name == "coco" else None,
    )
