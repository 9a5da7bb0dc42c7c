"""The loader with NVIDIA DALI: on the GPU where there is one, otherwise on the CPU, where it decodes only the crop.

All randomness comes from the view's draws, which go into the pipeline beside the files: DALI has no state to save, and
its crops, flips and masks are those of the other loader. On the CPU both loaders' batches are the same bits.
"""

from __future__ import annotations

import io
import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, require
from .draws import Draws, EpochSampler, Key
from .images import EXIF_ORIENTATION, ImageFolder, open_image
from .views import Cut, FinetuneView, Pictures, View, resized_cuts

require("nvidia.dali", "dali", "Loading with DALI")

from nvidia.dali import fn, pipeline_def, types  # noqa: E402
from nvidia.dali.auto_aug import rand_augment  # noqa: E402
from nvidia.dali.plugin.pytorch import feed_ndarray  # noqa: E402

# What DALI decodes to PIL's pixels. All else, and what metadata turns, PIL decodes and hands on as pixels.
PLAIN = {(kind, mode) for kind in ("JPEG", "PNG") for mode in ("RGB", "L")}
TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts of a PNG that may hold an orientation
FILTERS = {"bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
MAGNITUDES = 31  # of RandAugment, 0 .. 30
READ_AHEAD = 2  # batches whose files are read while another is decoded and one is trained on

_log = logging.getLogger(__name__)

Prepared = tuple[list[Key], dict[str, Any], Draws]  # keys, what is fed to the pipeline, draws


class DaliBatches(Dataset):
    """``dataset[key]`` for a batch of keys, decoded by DALI on the CPU: what a worker of torch's loader does.

    The pipeline is made in the process that uses it first, so that forked workers have one each.
    """

    def __init__(self, dataset: ImageFolder, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self._pipeline: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> dict[str, Tensor]:
        if self._pipeline is None:
            self._pipeline = self._build()
        batch = prepare(self.dataset, keys, whole_graph=False)
        submit(self._pipeline, batch)
        self._pipeline, (output,) = fetch(self._pipeline, self.dataset, batch, False, self._build)
        cuts = [Image.fromarray(np.asarray(output[i])) for i in range(len(output))]
        _, _, draws = batch
        view = self.dataset.view
        made = {**view.finish(resized_cuts(cuts, view, draws), draws), **self.dataset.names(keys)}
        self._pipeline.release_outputs()
        return made

    def _build(self) -> Any:
        return build(self.dataset.view, torch.device("cpu"), self.batch_size, 1, whole_graph=False)


class DaliLoader:
    """Batches of ``dataset[key]`` for the keys of each batch, on the GPU ``dataset.device``.

    While a step works on one batch, DALI makes the next, and the files after it are read.

    Raises, while iterating:
        DataError: an image has gone, or has become unreadable, or DALI failed.
    """

    def __init__(self, dataset: ImageFolder, batches: EpochSampler | list[list[Key]], batch_size: int, workers: int):
        self.dataset, self.batches = dataset, batches
        self.batch_size, self.threads = batch_size, max(workers, 1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        view, pipeline = self.dataset.view, self._build()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="reading") as readers:
            reading = self._read(readers)
            running = next(reading, None)
            if running is not None:
                submit(pipeline, running)
            while running is not None:
                pipeline, outputs = fetch(pipeline, self.dataset, running, True, self._build)
                pictures = self._pictures(outputs)
                pipeline.release_outputs()
                keys, _, draws = running
                running = next(reading, None)
                if running is not None:
                    submit(pipeline, running)  # before `finish` and the step, so that it runs meanwhile
                yield {**view.finish(pictures, draws), **self.dataset.names(keys)}

    def _build(self) -> Any:
        return build(self.dataset.view, self.dataset.device, self.batch_size, self.threads, whole_graph=True)

    def _read(self, readers: ThreadPoolExecutor) -> Iterator[Prepared]:
        """The batches, READ_AHEAD of them under way."""
        ahead: deque[Future[Prepared]] = deque()
        for keys in self.batches:
            ahead.append(readers.submit(prepare, self.dataset, keys, whole_graph=True))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _pictures(self, outputs: tuple) -> Pictures:
        device, pictures = self.dataset.device, {}
        for (name, picture), output in zip(self.dataset.view.pictures.items(), outputs, strict=True):
            shape = (len(output), picture.size, picture.size, 3)
            pictures[name] = torch.empty(shape, dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            feed_ndarray(output.as_tensor(), pictures[name], cuda_stream=stream)
        return pictures


def prepare(dataset: ImageFolder, keys: list[Key], whole_graph: bool, by_pil: bool = False) -> Prepared:
    """Reads a batch and draws for it; ``by_pil``: decodes it, too. DataError: an image cannot be read."""
    encoded, sizes = [], []
    for _, index in keys:
        try:
            data, size = decodable(dataset.images.read(index), by_pil)
        except Exception as error:  # PIL may raise anything at all on a damaged file
            raise dataset.lost(index, error) from error
        encoded.append(data)
        sizes.append(size)
    draws = dataset.draws(keys, np.array(sizes))
    fed = inputs(dataset.view, np.array(sizes), draws, whole_graph)
    return keys, {"encoded": encoded, **fed}, draws


def submit(pipeline: Any, batch: Prepared) -> None:
    for name, values in batch[1].items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()


def fetch(
    pipeline: Any, dataset: ImageFolder, batch: Prepared, whole_graph: bool, rebuild: Callable[[], Any]
) -> tuple[Any, tuple]:
    """Waits for what ``submit`` handed over -> the pipeline to go on with, and its outputs.

    An error ends a pipeline. If PIL opens all images that DALI could not decode, it decodes them for a new one.

    Raises:
        DataError: the image that DALI stumbled over, if PIL does so too; or DALI fails with PIL's pixels, too.
    """
    keys, _, _ = batch
    names = ", ".join(dataset.images.paths[index] for _, index in keys[:3])
    try:
        return pipeline, pipeline.share_outputs()
    except RuntimeError as error:
        for _, index in keys:
            try:
                dataset.images.open(index)
            except Exception as found:
                raise dataset.lost(index, found) from error
        _log.warning(
            "DALI could not decode a batch (%s, ...), so PIL does: %s", names, " ".join(str(error).split())[:300]
        )
    try:
        pipeline = rebuild()
        submit(pipeline, prepare(dataset, keys, whole_graph, by_pil=True))
        return pipeline, pipeline.share_outputs()
    except RuntimeError as error:
        raise DataError(
            f"DALI could not load a batch ({names}, ...), although PIL opens all of its images now: {error}. Start "
            "again; if it happens again, use --loader torchvision."
        ) from error


def decodable(data: bytes, by_pil: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """What DALI shall decode, the file itself wherever it can be and unless ``by_pil``, and (width, height)."""
    with Image.open(io.BytesIO(data)) as header:  # reads no more than the header
        plain, size = not by_pil and (header.format, header.mode) in PLAIN, header.size
        if plain and header.format == "JPEG":
            plain = header.getexif().get(EXIF_ORIENTATION, 1) == 1
        elif plain:
            plain = is_plain_png(data)
    if plain:
        return np.frombuffer(data, np.uint8), size
    image = open_image(io.BytesIO(data)).convert("RGB")
    return np.frombuffer(b"P6\n%d %d\n255\n" % image.size + image.tobytes(), np.uint8), image.size


def is_plain_png(data: bytes) -> bool:
    """Whether no metadata, before or after its pixels, may turn a PNG, and all of it is as it should be.

    PIL minds neither a wrong checksum of the pixels nor a missing end, at which DALI fails.
    """
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, checksum = data[at + 4 : at + 8], data[end - 4 : end]
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]).to_bytes(4, "big") != checksum:
            return False
        if kind == b"IEND":
            return True
        if kind == b"eXIf" or data.startswith(TURNING, at + 8):
            return False
        at = end
    return False


def inputs(view: View, sizes: np.ndarray, draws: Draws, whole_graph: bool) -> dict[str, np.ndarray]:
    """What the pipeline takes beside the files, by name, for images of sizes [B, 2] (width, height)."""
    start, shape = draws["box"][:, :2].astype(np.int32), (draws["box"][:, 2:] - draws["box"][:, :2]).astype(np.int32)
    fed = {"start": start, "shape": shape} if whole_graph or not view.resizes_first else {}
    if whole_graph:
        fed["height"] = (sizes if view.resizes_first else shape)[:, 1].astype(np.float32)
        fed["flip"] = draws["flip"].astype(np.int32)
        if view.resizes_first:
            fed["resized"] = draws["resized"][:, ::-1].astype(np.float32)
        if "augment_op" in draws:
            fed["op"] = (draws["augment_op"] * len(_suite())).astype(np.int32)
            fed["sign"] = draws["augment_sign"]
    return {name: np.ascontiguousarray(values) for name, values in fed.items()}


def build(view: View, device: torch.device, batch_size: int, threads: int, whole_graph: bool) -> Any:
    """The pipeline of a view, for what is fed to it by name: "encoded" and the ``inputs``.

    With the whole graph it makes the pictures, uint8 [size, size, 3]; on a GPU "mixed" decoding begins on the CPU and
    ends there. Otherwise it ends with what the box cuts out, [h, w, 3], or the whole image if the view resizes that
    first, which PIL then resizes: on the CPU DALI takes twice as long for that, and differs at the crop's border.
    """
    on_gpu, source = device.type == "cuda", fn.external_source

    # One run under way at a time: the loader starts the next as soon as one ends.
    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    def graph() -> Any:
        # What is to be turned comes from PIL, turned already.
        decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        encoded = source(name="encoded", dtype=types.UINT8, ndim=1)
        if view.resizes_first:
            image = fn.decoders.image(encoded, **decoder)
        else:
            box = {name: source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape")}
            image = fn.decoders.image_slice(encoded, axes=(1, 0), **box, **decoder)
        if not whole_graph:
            return image
        height = source(name="height", dtype=types.FLOAT, ndim=0)
        flip = source(name="flip", dtype=types.INT32, ndim=0)
        pictures = []
        for picture in view.pictures.values():
            if view.resizes_first:
                resized = _resized(image, height, source(name="resized", dtype=types.FLOAT, ndim=1), picture)
                box = {name: source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape")}
                resized = fn.slice(resized, axes=(1, 0), **box)
            else:
                side = types.Constant(float(picture.size))
                resized = _resized(image, height, fn.stack(side, side), picture)
            pictures.append(_augmented(view, fn.flip(resized, horizontal=flip)))
        return tuple(pictures)

    pipeline = graph()
    pipeline.build()
    return pipeline


def _resized(image: Any, height: Any, size: Any, picture: Cut) -> Any:
    """From ``height`` rows to size (rows, columns): rows before columns, with 8 bits between, as PIL does it.

    In one pass DALI would keep what overshoots black and white there, and differ by up to 12 levels.
    """
    how = {"interp_type": FILTERS[picture.resample], "antialias": True, "dtype": types.UINT8}
    return fn.resize(fn.resize(image, size=fn.stack(height, size[1]), **how), size=size, **how)


def _augmented(view: View, image: Any) -> Any:
    """RandAugment with the operations and signs that the view drew."""
    if not isinstance(view, FinetuneView) or not view.ops:
        return image
    op, sign = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("op", "sign"))
    suite = _suite()
    for level in range(view.ops):
        magnitude = rand_augment.signed_bin(view.magnitude, random_sign=sign[level])
        image = _chosen(suite, 0, op[level], image, magnitude)
    return image


def _chosen(suite: list, first: int, op: Any, image: Any, magnitude: Any) -> Any:
    """Augmentation number ``op`` - ``first`` of the suite; DALI sends each sample down its own branch."""
    if len(suite) == 1:
        return suite[0](image, magnitude_bin=magnitude, num_magnitude_bins=MAGNITUDES, fill_value=128)
    half = len(suite) // 2
    if op < first + half:
        result = _chosen(suite[:half], first, op, image, magnitude)
    else:
        result = _chosen(suite[half:], first + half, op, image, magnitude)
    return result


def _suite() -> list:
    return rand_augment.get_rand_augment_suite()
