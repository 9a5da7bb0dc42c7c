"""The encode command: the codes of a folder, whatever interrupts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from beitv2_fast import cli, create_model
from beitv2_fast.cli import encode, pieces
from beitv2_fast.cli.encode import EncodeConfig, encode_folder
from beitv2_fast.data.images import open_image
from beitv2_fast.data.views import EvalView
from beitv2_fast.errors import UserError
from beitv2_fast.weights import convert
from beitv2_fast.weights.files import write

from ..data.test_shards import write_tar
from ..support.training import ENVIRONMENT, write_images
from ..support.weights import tokenizer

OPTIONS = dict(batch_size=2, device="cpu", precision="fp32", workers=0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(encode, "PIECE_BATCHES", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Eleven images, two of them in folders, and the weights of a tokenizer."""
    folder = tmp_path_factory.mktemp("encode")
    write_images(folder / "images", 9, size=60)
    for name in ("b/x.png", "a/ü.png"):
        (folder / "images" / name).parent.mkdir()
        os.link(folder / "images" / "03.png", folder / "images" / name)
    model = tokenizer()
    write(folder / "t.safetensors", convert(model.state_dict(), "beitv2_fast"), "beitv2_fast", model.config)
    return folder


class Interrupted:
    """In place of ``atomically``: notes what was written; raises KeyboardInterrupt once before each of these names."""

    def __init__(self, patch: pytest.MonkeyPatch, *names: str):
        self.names, self.written, self.atomically = list(names), [], pieces.atomically
        patch.setattr(pieces, "atomically", self)

    def __call__(self, path: Path, write) -> None:
        if path.name in self.names:
            self.names.remove(path.name)
            raise KeyboardInterrupt
        self.atomically(path, write)
        self.written.append(path.name)


def config(world: Path, out: Path, **values) -> EncodeConfig:
    return EncodeConfig(**{"tokenizer": world / "t.safetensors", "out": out, **OPTIONS, **values})


def test_codes_are_the_tokenizers_for_each_path(world, tmp_path):
    count, left_out = encode_folder(world / "images", config(world, tmp_path / "codes.npz"))
    data = np.load(tmp_path / "codes.npz")
    assert (count, left_out, data["codes"].dtype, data["codes"].shape) == (11, [], np.uint16, (11, 3, 3))
    paths = data["paths"].tolist()
    assert paths == sorted(paths) and {"a/ü.png", "b/x.png", "00.png"} <= set(paths)
    model = create_model(checkpoint=world / "t.safetensors")
    for path, codes in zip(paths, data["codes"], strict=True):
        image = EvalView(48, 1.0)(open_image(world / "images" / path))["image"]
        assert torch.equal(model.encode(image[None])[0], torch.from_numpy(codes.astype(np.int64)).flatten())
    assert [path.name for path in tmp_path.iterdir()] == ["codes.npz"]


def test_safetensors_hold_the_same(world, tmp_path):
    encode_folder(world / "images", config(world, tmp_path / "codes.npz"))
    encode_folder(world / "images", config(world, tmp_path / "codes.safetensors"))
    data, npz = load_file(tmp_path / "codes.safetensors"), np.load(tmp_path / "codes.npz")
    assert np.array_equal(data["codes"], npz["codes"])
    assert bytes(data["paths"]).decode().split("\0") == npz["paths"].tolist()


def test_unreadable_images_are_listed_and_left_out(world, tmp_path, caplog):
    images = write_images(tmp_path / "images", 6, size=60)
    (images / "02.png").write_bytes(b"")
    (images / "text.jpg").write_text("no image")
    (images / "04.png").write_bytes((images / "03.png").read_bytes()[:-2000])
    os.symlink(world / "images" / "00.png", images / "outside.png")
    count, left_out = encode_folder(images, config(world, tmp_path / "codes.npz"))
    data, wrong = np.load(tmp_path / "codes.npz"), {"02.png", "04.png", "text.jpg", "outside.png"}
    assert count == 4 and {path for path, _ in left_out} == set(data["left_out"].tolist()) == wrong
    assert data["paths"].tolist() == ["00.png", "01.png", "03.png", "05.png"] and len(data["codes"]) == 4
    assert all(name in caplog.text for name in wrong)
    assert "text.jpg: not an image" in caplog.text and "02.png: an empty file" in caplog.text


def test_shards_give_the_codes_of_a_folder_with_the_same_images(world, tmp_path):
    names = ["00.png", "01.png", "02.png", "2024.05.01.png"]
    contents = [(world / "images" / f"0{i}.png").read_bytes() for i in range(4)]
    (tmp_path / "folder").mkdir()
    for name, content in zip(names, contents, strict=True):
        (tmp_path / "folder" / name).write_bytes(content)
    bad = [("bad.png", b"no image"), ("bad.cls", b"1")]
    write_tar(tmp_path / "shards" / "a.tar", [*zip(names[:2], contents[:2], strict=True), *bad])
    write_tar(tmp_path / "shards" / "b.tar", list(zip(names[2:], contents[2:], strict=True)))
    encode_folder(tmp_path / "folder", config(world, tmp_path / "folder.npz"))
    count, left_out = encode_folder(tmp_path / "shards", config(world, tmp_path / "shards.npz", workers=1))
    folder, shards = np.load(tmp_path / "folder.npz"), np.load(tmp_path / "shards.npz")
    assert count == 4 and [path for path, _ in left_out] == ["a.tar/bad.png"]
    assert shards["paths"].tolist() == ["a.tar/00.png", "a.tar/01.png", "b.tar/02.png", "b.tar/2024.05.01.png"]
    assert np.array_equal(shards["codes"], folder["codes"])


def test_a_shard_that_changed_is_another_encoding(world, tmp_path, monkeypatch):
    content = (world / "images" / "00.png").read_bytes()
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", content) for i in range(6)])
    Interrupted(monkeypatch, "codes.npz")
    with pytest.raises(KeyboardInterrupt):
        encode_folder(path, config(world, tmp_path / "codes.npz"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="the beginning of an encoding with other images"):
        encode_folder(path, config(world, tmp_path / "codes.npz"))


def test_a_folder_without_a_readable_image_is_an_error(world, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 1 files .*can be read"):
        encode_folder(tmp_path / "images", config(world, tmp_path / "codes.npz"))


@pytest.mark.parametrize("suffix", (".npz", ".safetensors"))
def test_an_interrupted_encoding_goes_on_and_ends_with_the_same_bytes(world, tmp_path, monkeypatch, suffix):
    encode_folder(world / "images", config(world, tmp_path / f"whole{suffix}"))
    out = tmp_path / f"codes{suffix}"
    writer = Interrupted(monkeypatch, "000000004.npz", "000000008.npz", out.name)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            encode_folder(world / "images", config(world, out))
    assert not out.exists()
    encode_folder(world / "images", config(world, out))
    assert writer.written == ["000000000.npz", "000000004.npz", "000000008.npz", out.name]  # each once
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


KILLED = """
import os, signal, sys
from beitv2_fast import cli
from beitv2_fast.cli import encode, pieces
encode.PIECE_BATCHES = 2
atomically, paths = pieces.atomically, []
def killed(path, write):
    paths.append(path)
    if len(paths) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    atomically(path, write)
pieces.atomically = killed
for kill_at in (2, 3):  # at the second piece; having written the others, at the output
    command = os.fork()  # importing torch takes longer than the command
    if not command:
        cli.main()
    assert os.waitpid(command, 0)[1] == signal.SIGKILL
"""


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(world, tmp_path, capsys):
    out = tmp_path / "codes.npz"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    encode_folder(world / "images", config(world, tmp_path / "whole.npz"))
    options = f"--tokenizer {world}/t.safetensors --device cpu --precision fp32 --batch-size 2 --workers 1".split()
    command = [sys.executable, "-c", KILLED, "encode", world / "images", *options, "--out", out]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == 0 and not out.exists(), killed.stderr
    assert len(list(tmp_path.glob(".codes.npz.pieces/*.npz"))) == 3
    assert cli.run_command([*map(str, command[3:])]) == 0
    torch.set_num_threads(threads)
    assert "the codes of 11 images" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.npz", "whole.npz"]


def test_pieces_of_other_options_are_refused_and_replaced_when_forced(world, tmp_path, monkeypatch):
    out = tmp_path / "codes.npz"
    Interrupted(monkeypatch, out.name)
    with pytest.raises(KeyboardInterrupt):
        encode_folder(world / "images", config(world, out))
    with pytest.raises(UserError, match="an encoding with other crop_pct"):
        encode_folder(world / "images", config(world, out, crop_pct=0.5))
    encode_folder(world / "images", config(world, out, crop_pct=0.5, force=True))
    assert len(np.load(out)["codes"]) == 11


def test_an_output_is_replaced_only_when_forced(world, tmp_path):
    out = tmp_path / "codes.npz"
    out.write_text("precious")
    with pytest.raises(UserError, match="exists"):
        encode_folder(world / "images", config(world, out))
    encode_folder(world / "images", config(world, out, force=True))
    assert len(np.load(out)["codes"]) == 11


def test_workers_change_no_byte(world, tmp_path):
    for name, workers in (("none.npz", 0), ("two.npz", 2)):
        encode_folder(world / "images", config(world, tmp_path / name, workers=workers))
    assert (tmp_path / "none.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_several_devices_take_turns_and_give_the_same_bytes(world, tmp_path, monkeypatch):
    encode_folder(world / "images", config(world, tmp_path / "one.npz"))
    monkeypatch.setattr(encode, "devices_of", lambda device: [torch.device("cpu")] * 2)
    encode_folder(world / "images", config(world, tmp_path / "two.npz"))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("name", ["codes.npz", "codes.safetensors"])
def test_a_folder_of_the_output_s_name_is_never_replaced(world, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is a folder, but a file is to be written"):
        encode_folder(world / "images", config(world, tmp_path / name, force=True))
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_encoding_that_was_stopped_before_its_first_piece_does_not_refuse_other_options(
    world, tmp_path, monkeypatch
):
    Interrupted(monkeypatch, "000000000.npz")
    with pytest.raises(KeyboardInterrupt):
        encode_folder(world / "images", config(world, tmp_path / "codes.npz", crop_pct=0.5))
    assert encode_folder(world / "images", config(world, tmp_path / "codes.npz"))[0] == 11
