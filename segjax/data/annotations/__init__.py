"""Annotations of other tools, rasterised into the layout that `segjax.data.folder` describes.

coco, labelme, yolo, voc    a reader each: which images there are, and the regions that are annotated in them
panoptic                    the masks of COCO's panoptic segments
found                       what every reader returns, and how it finds files
rasterise                   regions -> a map of class ids
write                       images and masks -> a folder
"""
