"""Classes of datasets for which weights are published, but segjax has no reader; `folder.py` can read them."""

from __future__ import annotations

from segjax.data.specs import DATASETS, DatasetSpec, distinct_colors, named_colors

# Gong et al., "Look into Person", CVPR 2017.
_LIP = """
    background, hat, hair, glove, sunglasses, upper-clothes, dress, coat, socks, pants, jumpsuits, scarf, skirt, face,
    left-arm, right-arm, left-leg, right-leg, left-shoe, right-shoe
"""
# Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR 2014: the 59
# most frequent classes. With background, which has the label 0, there are 60.
_PASCAL_CONTEXT = """
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
    ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
    keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
    sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
"""
# Caesar et al., "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018: 80 thing and 91 stuff classes in the
# order of their ids; 11 of the 182 ids are unused.
_COCO_STUFF = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain,
    mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river,
    road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
# Wang et al., "LoveDA", NeurIPS 2021, track on datasets and benchmarks; rrggbb.
_LOVEDA = """
    background ffffff, building ff0000, road ffff00, water 0000ff, barren 9f81b7, forest 00ff00, agricultural ffc380
"""
# ISPRS, 2D semantic labeling contest: Potsdam and Vaihingen have the same classes.
_ISPRS = """
    impervious_surface ffffff, building 0000ff, low_vegetation 00ffff, tree 00ff00, car ffff00, clutter ff0000
"""
# Waqas Zamir et al., "iSAID", CVPR workshops 2019.
_ISAID = """
    background 000000, ship 00003f, storage_tank 003f3f, baseball_diamond 003f00, tennis_court 003f7f,
    basketball_court 003fbf, ground_track_field 003fff, bridge 007f3f, large_vehicle 007f7f, small_vehicle 00007f,
    helicopter 0000bf, swimming_pool 0000ff, roundabout 00bf7f, soccer_ball_field 007fbf, plane 007fff, harbor 00649b
"""


def _unpainted(name: str, text: str, *first: str) -> DatasetSpec:
    """Classes without published colours."""
    names = (*first, *(entry.strip() for entry in text.split(",")))
    return DatasetSpec(name, names, tuple(distinct_colors(len(names))), 255)


def _painted(name: str, text: str) -> DatasetSpec:
    colors = named_colors(text)
    return DatasetSpec(name, tuple(colors), tuple(colors.values()), 255)


CLASS_LISTS = {
    spec.name: spec
    for spec in (
        _unpainted("lip", _LIP),
        _unpainted("pascal_context", _PASCAL_CONTEXT, "background"),
        _unpainted("pascal_context_59", _PASCAL_CONTEXT),
        _unpainted("coco_stuff10k", _COCO_STUFF),
        _painted("loveda", _LOVEDA),
        _painted("potsdam", _ISPRS),
        _painted("vaihingen", _ISPRS),
        _painted("isaid", _ISAID),
    )
}


def classes_of_dataset(name: str) -> DatasetSpec:
    """The classes of a dataset of `specs.DATASETS` or `CLASS_LISTS`.

    Raises:
      KeyError: Neither table has the dataset, or its classes are named by its files.
    """
    spec = DATASETS[name].spec if name in DATASETS else CLASS_LISTS[name]
    if spec is None:
        raise KeyError(name)
    return spec
