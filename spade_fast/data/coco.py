# SPDX-License-Identifier: Apache-2.0
"""COCO-Stuff in the directory layout of the SPADE authors' release, and Flickr Landscapes labeled in its classes.

    dataroot/train_img/*.jpg    photographs             (val_img, ...)
    dataroot/train_label/*.png  0..181, 255 = unknown   (val_label, ...)
    dataroot/train_inst/*.png   instance ids            (val_inst, ...)

Unknown is a class of its own, 182, as in the authors' code: 183 classes.
"""

from __future__ import annotations

from pathlib import Path

from .palettes import distinct_colors
from .spec import Defaults, Request, Spec

UNKNOWN = 182
NUM_CLASSES = 183
DEFAULTS = Defaults(NUM_CLASSES, use_edges=True)
FLICKR_DEFAULTS = Defaults(NUM_CLASSES, use_edges=False)

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
    """The class of each stored label value."""
    return {**{value: value for value in range(UNKNOWN)}, 255: UNKNOWN}


def spec(request: Request, phase: str) -> Spec:
    """Files of "coco", or of "flickr": the same folders without instances.

    Flickr Landscapes has no labels of its own: the paper predicts them with a DeepLab trained on COCO-Stuff. Its
    photographs cannot be redistributed. The user makes both the images and the label maps.
    """
    root = request.folder("dataroot") or Path()
    instances = root / f"{phase}_inst" if request.dataset == "coco" else None
    return Spec(
        name=request.dataset,
        num_classes=NUM_CLASSES,
        palette=distinct_colors(NUM_CLASSES),
        class_names=list(CLASS_NAMES),
        classes=stored_values(),
        image_dir=request.folder("image_dir") or root / f"{phase}_img",
        label_dir=request.folder("label_dir") or root / f"{phase}_label",
        instance_dir=request.folder("instance_dir") or instances,
    )
