"""What the page asks, answered by the models and the index. Plain values in and out; the server makes JSON of them."""

from __future__ import annotations

import functools
import hashlib
import io
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data.images import name_of, open_image
from ...kernels.block_masks import block_masks
from ...models.vit import normalize
from ..attention import attention_probabilities, most_attended, query_attention
from ..codes import choose_patches
from ..index import Index, nearest_patches, sprite
from ..runs import Runs, Views
from ..sheets import image_of, patch_picture, squares
from ..theme import LIGHT

MAX_UPLOAD = 24 << 20  # bytes
MAX_PIXELS = 64_000_000  # of an upload: more is refused before it is decoded
UPLOADED_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
REMEMBERED = 32  # images
SHOWN = 12  # patches of a sheet
SIDE = 112  # pixels of a patch's picture
BEST = 5  # predictions of a hidden patch
DISPLAY = 896  # pixels of the photograph on the page, or a little less


class BadRequest(Exception):
    """What was asked makes no sense; the text says why."""


@dataclass(frozen=True)
class Shown:
    """An image on the page: its views for the models, its codes [N], its square as a PNG."""

    key: str
    name: str
    views: Views
    codes: Tensor
    png: bytes


class Answers:
    """One method per question. The models run one question at a time, whatever thread asks."""

    def __init__(self, runs: Runs, index: Index, seed: int = 0):
        self.runs, self.index, self.seed = runs, index, seed
        self.shown: OrderedDict[str, Shown] = OrderedDict()
        self.lock = threading.RLock()
        self.rank = {code: i + 1 for i, code in enumerate(index.usage.ranking.tolist())}
        self.patch = functools.lru_cache(4096)(self._patch)
        self.thumb = functools.lru_cache(None)(self._thumb)

    def info(self) -> dict[str, Any]:
        """What the page needs to know once."""
        runs, usage = self.runs, self.index.usage
        depths = {"tokenizer": len(runs.tokenizer.encoder.blocks)}
        if runs.student is not None:
            depths = {"student": len(runs.student.blocks), **depths}
        return {
            "name": runs.name,
            "grid": list(runs.grid),
            "images": len(runs.images),
            "samples": [name_of(runs.samples, i) for i in range(len(runs.samples))],
            "held_out": runs.held_out,
            "counts": usage.counts.tolist(),
            "ranks": [self.rank[code] for code in range(usage.num_codes)],
            "used": usage.used,
            "perplexity": usage.perplexity,
            "most_frequent": float(usage.shares.max()),
            "colors": [_hex(color) for color in self.index.colors],
            "models": list(self.index.features),
            "depths": depths,
            "game": runs.student is not None,
            "problem": runs.problem,
            "hide": 0 if runs.settings is None else runs.settings.num_masked,
            "similarity": runs.teacher is not None,
        }

    def add(self, data: bytes) -> dict[str, Any]:
        """An image that was dropped on the page."""
        return self._describe(self._remember(hashlib.sha256(data).hexdigest()[:24], "your image", _decode(data)))

    def sample(self, number: int) -> dict[str, Any]:
        """One of the offered images."""
        self._check(number, len(self.runs.samples), "sample")
        name = name_of(self.runs.samples, number)
        return self._describe(self._remember(f"sample-{number}", name, self.runs.samples.open(number)))

    def picture(self, key: str) -> bytes:
        """The square that the models see, as PNG."""
        return self._get(key).png

    def _thumb(self, number: int) -> bytes:
        self._check(number, len(self.runs.samples), "sample")
        return _jpeg(image_of(squares([self.runs.samples.open(number)], 96)[0]))

    def code(self, code: int) -> dict[str, Any]:
        """How often a code occurs, and patches of the data set that have it, from as many images as possible."""
        usage = self.index.usage
        self._check(code, usage.num_codes, "code")
        return {
            "code": code,
            "count": int(usage.counts[code]),
            "share": float(usage.shares[code]),
            "rank": self.rank[code],
            "patches": choose_patches(self.index.codes, code, SHOWN, self.seed),
        }

    def _patch(self, image: int, patch: int) -> bytes:
        """A patch of the data set, framed, with its surroundings, as JPEG."""
        self._check(image, len(self.runs.images), "image")
        self._check(patch, self.index.codes.shape[1], "patch")
        photo = self.runs.images.open(image)
        return _jpeg(patch_picture(photo, self.runs.grid, patch, SIDE, LIGHT))

    @functools.cached_property
    def typical(self) -> bytes:
        """The typical patch of every code in one picture."""
        return _png(Image.fromarray(sprite(self.index.typical)))

    def nearest(self, key: str, patch: int, model: str) -> dict[str, Any]:
        """The patches of the data set whose features are most like this one's, at most one of an image."""
        shown = self._get(key)
        if model not in self.index.features:
            raise BadRequest(f"there are no features of {model!r}; there are those of {', '.join(self.index.features)}")
        self._check(patch, len(shown.codes), "patch")
        with self.lock:
            query = shown.views.features(model)[0, patch]
            return {"patches": nearest_patches(self.index, query, model, SHOWN)}

    def attention(self, key: str, patch: int, model: str, layer: int) -> dict[str, Any]:
        """What a patch attends to: by head, a number for each patch; and which hold most: of the mean, by head."""
        shown = self._get(key)
        if model not in ("student", "tokenizer") or getattr(self.runs, model) is None:
            raise BadRequest(f"there is no model {model!r} here")
        network = getattr(self.runs, model)
        self._check(layer - 1, len((network.encoder if model == "tokenizer" else network).blocks), "layer")
        self._check(patch, len(shown.codes), "patch")
        with self.lock:
            everything = attention_probabilities(network, shown.views.of[model], layer)
        heads = query_attention(everything, patch, self.runs.grid)[0].cpu()  # [H, h, w]
        most = most_attended(torch.stack([heads.mean(0), *heads]))
        return {"heads": heads.flatten(1).tolist(), "most": most.flatten(1).tolist()}

    def predict(self, key: str, hidden: list[int]) -> dict[str, Any]:
        """What the student says about hidden patches: its best codes, their probabilities, that of the true one."""
        shown, student = self._get(key), self.runs.student
        if student is None:
            raise BadRequest(self.runs.problem or "there is no student here")
        for patch in hidden:
            self._check(patch, len(shown.codes), "patch")
        hidden = sorted(set(hidden))
        mask = torch.zeros(1, len(shown.codes), dtype=torch.bool)
        mask[0, hidden] = True
        device = self.runs.device
        with self.lock, torch.no_grad():
            logits = student.predict(normalize(shown.views.of["student"]), mask.to(device))[0][0]
            chances = logits.float().softmax(-1).cpu()[hidden]
        best, codes = chances.topk(min(BEST, chances.shape[1]), dim=-1)
        true = shown.codes[hidden]
        return {
            "hidden": hidden,
            "codes": codes.tolist(),
            "chances": best.tolist(),
            "true": true.tolist(),
            "true_chance": chances.gather(1, true[:, None])[:, 0].tolist(),
            "right": int((codes[:, 0] == true).sum()),
            "within": int((codes == true[:, None]).any(1).sum()),
        }

    def mask(self, seed: int) -> dict[str, Any]:
        """A block mask as in the student's training."""
        settings = self.runs.settings
        if settings is None:
            raise BadRequest(self.runs.problem or "there is no student here")
        key = torch.tensor([seed], dtype=torch.int64)
        found = block_masks(
            key,
            self.runs.grid,
            settings.num_masked,
            min_patches=settings.min_mask_patches,
            max_patches=settings.max_mask_patches,
        )
        return {"hidden": found.flatten().nonzero()[:, 0].tolist()}

    def _remember(self, key: str, name: str, photo: Image.Image) -> Shown:
        with self.lock:
            if key not in self.shown:
                views = self.runs.views([photo])
                size = max(1, DISPLAY // self.runs.grid[0]) * self.runs.grid[0]
                shown = Shown(key, name, views, views.codes()[0], _png(image_of(squares([photo], size)[0])))
                self.shown[key] = shown
            self.shown.move_to_end(key)
            while len(self.shown) > REMEMBERED:
                self.shown.popitem(last=False)
            return self.shown[key]

    def _describe(self, shown: Shown) -> dict[str, Any]:
        found = {"key": shown.key, "name": shown.name, "codes": shown.codes.tolist()}
        if self.runs.teacher is not None:
            with self.lock:
                found["similarity"] = shown.views.similarity()[0].tolist()
        return found

    def _get(self, key: str) -> Shown:
        with self.lock:
            if key not in self.shown:
                raise BadRequest("this image is no longer remembered; choose it again")
            return self.shown[key]

    @staticmethod
    def _check(number: int, count: int, what: str) -> None:
        if not 0 <= number < count:
            raise BadRequest(f"there is no such {what}")


def _decode(data: bytes) -> Image.Image:
    """An uploaded image: of a known format, of bounded size, whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit on pixels here is the page's own, and lower
            with Image.open(io.BytesIO(data), formats=UPLOADED_FORMATS) as header:
                pixels = header.width * header.height
            if pixels > MAX_PIXELS:
                raise BadRequest(
                    f"the image has {pixels / 1e6:.0f} million pixels; at most {MAX_PIXELS / 1e6:.0f} are read"
                )
            return open_image(io.BytesIO(data))
    except BadRequest:
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        raise BadRequest("this is no image that can be read; use a JPEG, PNG, WebP, TIFF, GIF or BMP file") from error


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "jpeg", quality=88)
    return buffer.getvalue()


def _hex(color: Tensor) -> str:
    return "#" + "".join(f"{round(float(value) * 255):02x}" for value in color)
