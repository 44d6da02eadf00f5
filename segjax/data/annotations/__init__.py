"""Annotations of other tools, rasterised into the layout that `segjax.data.folder` describes.

coco, labelme, yolo, voc    readers, one per format: the images, and the regions annotated in them
panoptic                    the masks of COCO's panoptic segments
found                       the result of every reader, and the search for files
rasterise                   regions -> a map of class ids
write                       images and masks -> a folder
"""
