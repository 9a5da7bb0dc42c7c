"""Semantic segmentation: UPerNet on the pyramid of a ViT's layers, from images with masks to mIoU.

``config`` has the options, ``model`` and ``head`` the network, ``masks`` and ``views`` the data, ``task`` what the
training loop drives, ``evaluation`` the sliding window and the scores, ``overlays`` pictures of them.
"""
