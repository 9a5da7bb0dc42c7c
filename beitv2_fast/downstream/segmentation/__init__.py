"""Semantic segmentation: UPerNet on the pyramid of a ViT's layers, from images with masks to mIoU.

``model`` and ``head`` are the network, ``masks`` and ``views`` the data, ``training`` is where a training starts,
``evaluation`` the sliding window and the scores, ``overlays`` pictures of them.
"""

from ...errors import require

require("PIL", "train", "Reading images")
