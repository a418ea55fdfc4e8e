# SPDX-License-Identifier: Apache-2.0
"""ADE20K in the layout of ADEChallengeData2016, and its outdoor subset.

    dataroot/images/training/ADE_train_*.jpg        (validation/ADE_val_*.jpg)
    dataroot/annotations/training/ADE_train_*.png   0 = unknown, 1..150
    dataroot/sceneCategories.txt                    "ADE_train_00000001 airport_terminal", for the subset

The stored label value is the class, 0..150. Class 0 is unknown, or none of the 150. The authors' networks were trained,
released and tested this way: their code moves labels down by one only in a copy that it drops.
The option shift_labels makes label v class v - 1, and unknown class 150.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .palettes import distinct_colors
from .reading import DataError
from .spec import Defaults, Request, Spec

NUM_CLASSES = 151
DEFAULTS = Defaults(NUM_CLASSES, use_edges=False)
_FOLDERS = {"train": "training", "val": "validation"}

# Scenes under the open sky, by their names in sceneCategories.txt. The choice of scenes is this package's own.
# The paper uses the subset of Qi et al. (SIMS), a list of files: pass it as the file list.
OUTDOOR_SCENES = frozenset(
    """
    alley amphitheater apartment_building_outdoor aqueduct arch archaelogical_excavation badlands
    balcony_exterior barn barndoor baseball_field basketball_court_outdoor bayou bazaar_outdoor beach
    beach_house boardwalk boat_deck botanical_garden bridge broadleaf building_facade bus_stop butte
    cabin_outdoor campsite campus canal_natural canal_urban canyon carrousel castle cathedral_outdoor cemetery
    chalet church_outdoor cliff coast construction_site corn_field cottage cottage_garden courthouse courtyard
    creek crevasse crosswalk cultivated_field dam desert_road desert_sand desert_vegetation diner_outdoor
    dirt_track dock doorway_outdoor downtown driveway embassy excavation fairway farm field_road field_wild
    fire_escape fire_station fishpond football_field forest_path forest_road formal_garden fountain
    gas_station gazebo_exterior general_store_outdoor glacier golf_course greenhouse_outdoor gulch harbor
    hayfield heliport herb_garden highway hill hospital hot_spring hotel_outdoor house hunting_lodge_outdoor
    ice_floe ice_shelf ice_skating_rink_outdoor iceberg igloo industrial_area inn_outdoor islet
    japanese_garden junkyard kasbah kennel_outdoor lagoon lake lake_natural landfill landing_deck lawn
    library_outdoor lighthouse loading_dock mansion market_outdoor marsh mausoleum medina moat_water
    monastery_outdoor mosque_outdoor motel mountain mountain_path mountain_road mountain_snowy museum_outdoor
    needleleaf newsstand_outdoor nuclear_power_plant_outdoor oast_house ocean office_building oilrig orchard
    outdoor outhouse_outdoor pagoda palace park parking_garage_outdoor parking_lot pasture patio pavilion
    phone_booth picnic_area pier plantation playground plaza pond porch power_plant_outdoor promenade
    racecourse raft railroad_track rainforest residential_neighborhood restaurant_patio rice_paddy river road
    rock_arch roof_garden rope_bridge ruin runway sandbar savanna schoolhouse sea_cliff shed shipyard_outdoor
    shopfront ski_lodge ski_resort ski_slope sky skyscraper slum snowfield stadium_baseball stadium_football
    stadium_outdoor stone_circle street subway_station_outdoor swamp swimming_hole swimming_pool_outdoor
    synagogue_outdoor temple_east_asia temple_south_asia tennis_court_outdoor terrace toll_plaza
    topiary_garden tower train_station_outdoor tree_farm tree_house tundra underwater_coral_reef valley
    van_exterior vegetable_garden viaduct village vineyard volcano water_mill water_park water_tower waterfall
    waterfall_block waterfall_fan watering_hole wave wheat_field wild_field wind_farm windmill yard zen_garden
    zoo
    """.split()
)


def stored_values(shift_labels: bool) -> dict[int, int]:
    """The class of each stored label value; the stored 0 is unknown."""
    if shift_labels:
        return {0: 150, **{value: value - 1 for value in range(1, 151)}}
    return {value: value for value in range(151)}


def keep_outdoor(request: Request) -> Callable[[str], bool]:
    """Whether a sample of a name is of the outdoor subset.

    Raises:
        DataError: dataroot is not given, or its sceneCategories.txt is missing or malformed.
    """
    root = request.folder("dataroot")
    if root is None:
        raise DataError("dataset ade20k-outdoor: needs --dataroot, for sceneCategories.txt, or --file-list")
    names = _outdoor_names(root)
    return lambda name: name.rpartition("/")[2] in names


def _outdoor_names(root: Path) -> set[str]:
    """Names of the outdoor samples, by sceneCategories.txt."""
    path = root / "sceneCategories.txt"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the scene of each image ({error}); ade20k-outdoor needs this file of the dataset, or "
            "a file list (--file-list) with a name a line"
        ) from error
    names = set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) == 2 and (words[1] in OUTDOOR_SCENES or words[1].endswith(("_outdoor", "_exterior"))):
            names.add(words[0])
        elif words and len(words) != 2:
            raise DataError(f"{path}, line {number}: expected 'NAME SCENE', got {line!r}")
    return names


def spec(request: Request, phase: str) -> Spec:
    """Files of "ade20k". The samples of "ade20k-outdoor" are chosen among them by `keep_outdoor`."""
    root = request.folder("dataroot") or Path()
    return Spec(
        name=request.dataset,
        num_classes=NUM_CLASSES,
        palette=distinct_colors(NUM_CLASSES),
        class_names=None,
        classes=stored_values(request.shift_labels),
        image_dir=request.folder("image_dir") or root / "images" / _FOLDERS[phase],
        label_dir=request.folder("label_dir") or root / "annotations" / _FOLDERS[phase],
        instance_dir=request.folder("instance_dir"),
    )
