"""Names, URLs and repositories lead to the same weights as files; what cannot be fetched is told in one sentence."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from beitv2_fast import create_model
from beitv2_fast.errors import CheckpointError
from beitv2_fast.runs import sources
from beitv2_fast.runs.folder import content
from beitv2_fast.runs.sources import NAMED, PUBLISHED, Published, locate
from beitv2_fast.weights import convert
from beitv2_fast.weights.create import MODEL_CLASSES, model_config

from ..support.release_server import COMMIT, Server, serving, without_digests
from ..support.weights import assert_same_state, classifier, student, tokenizer

TOKENIZER = "vqkd_encoder_base_decoder_3x768x12_clip"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(tmp_path, monkeypatch) as server:
        yield server


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_s_model_has_as_many_parameters_as_the_list_says(name):
    config = model_config(name)
    with torch.device("meta"):
        model = MODEL_CLASSES[type(config)](config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PUBLISHED[name].millions


def test_only_tokenizers_have_hashes_and_they_are_those_in_their_names():
    assert {name: p.digest for name, p in PUBLISHED.items() if p.digest} == {
        "vqkd_encoder_base_decoder_3x768x12_clip": "d5036aa7",
        "vqkd_encoder_base_decoder_1x768x12_clip": "d93179da",
        "vqkd_encoder_base_decoder_1x768x12_dino": "663c55d7",
    }


def test_a_url_is_fetched_once_and_then_needs_no_network(server):
    server.files["/a/weights.pth"] = b"whole"
    file = locate(f"{server.url}/a/weights.pth")
    assert file.read_bytes() == b"whole" and file.parent == Path(torch.hub.get_dir()) / "checkpoints"
    asked = list(server.asked)
    assert locate(f"{server.url}/a/weights.pth") == file and server.asked == asked


def test_a_url_in_a_path_that_kept_one_slash_of_it_is_the_same_url(server):
    server.files["/weights.pth"] = b"whole"
    assert locate(Path(f"{server.url}/weights.pth")) == locate(f"{server.url}/weights.pth")


def test_two_urls_with_one_file_name_do_not_meet_in_the_cache(server):
    server.files |= {"/a/weights.pth": b"one", "/b/weights.pth": b"two"}
    assert [locate(f"{server.url}/{folder}/weights.pth").read_bytes() for folder in "ab"] == [b"one", b"two"]


@pytest.mark.parametrize("last", ["..", "%2e%2e%2fx.pth", "", "a%2fb.pth", "..\\x.pth", ".hidden", "x\x00.pth"])
def test_a_url_whose_file_name_could_leave_the_cache_is_refused_before_anything_is_asked(server, tmp_path, last):
    with pytest.raises(CheckpointError, match="plain name of a file"):
        locate(f"{server.url}/folder/{last}")
    assert not server.asked and not list(tmp_path.iterdir())


def test_a_file_of_another_hash_is_refused_and_not_kept(server):
    server.files[f"/{PUBLISHED[TOKENIZER].file}"] = b"another file"
    with pytest.raises(CheckpointError, match="invalid hash value"):
        locate(TOKENIZER)
    assert not list(Path(torch.hub.get_dir()).rglob("*.pth*[!k]"))


def test_a_file_with_the_hash_that_is_known_is_kept_under_its_published_name(server, monkeypatch):
    whole = b"the file"
    name = f"x-{hashlib.sha256(whole).hexdigest()[:8]}.pth"
    monkeypatch.setitem(NAMED, "x", Published(name, "vqkd_base_clip", 109, "of this test"))
    server.files[f"/{name}"] = whole
    assert locate("x") == Path(torch.hub.get_dir()) / "checkpoints" / name
    assert locate(f"{server.url}/{name}") == locate("x")  # its address is checked and kept alike


@pytest.mark.parametrize("changed", [False, True])
def test_a_download_goes_on_where_its_connection_ended_unless_the_file_has_changed(server, changed):
    first, second = bytes(range(250)) * 4, bytes(1000)
    server.files["/weights.pth"], server.cut = first, {"/weights.pth"}
    with pytest.raises(CheckpointError, match="ended after 500 of 1,000 bytes; the same command goes on"):
        locate(f"{server.url}/weights.pth")
    server.cut.clear()
    server.files["/weights.pth"] = second if changed else first
    assert locate(f"{server.url}/weights.pth").read_bytes() == server.files["/weights.pth"]
    assert server.sent == (1500 if changed else 1000)
    assert sorted(p.suffix for p in locate(f"{server.url}/weights.pth").parent.iterdir()) == [".lock", ".pth"]


def test_a_download_that_was_killed_at_its_end_begins_again(server):
    server.files["/weights.pth"] = bytes(1000)
    file = locate(f"{server.url}/weights.pth")
    part = file.rename(file.with_name(f".{file.name}"))
    part.with_name(f"{part.name}.etag").write_text(f'"{hashlib.sha256(bytes(1000)).hexdigest()}"')
    assert locate(f"{server.url}/weights.pth").read_bytes() == bytes(1000)


def test_without_a_network_one_sentence_says_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "RELEASE", "http://127.0.0.1:1/release")  # nothing listens there
    name = "beitv2_base_patch16_224_pt1k"
    with pytest.raises(CheckpointError) as error:
        locate(name)
    place = tmp_path / "hub" / "checkpoints" / f"{name}.pth"
    assert str(error.value).endswith(f"put that file at {place}.")
    assert f"http://127.0.0.1:1/release/{name}.pth could not be fetched" in str(error.value)
    place.write_bytes(b"put there")
    assert locate(name) == place


def _locate(url: str) -> bytes:
    return locate(url).read_bytes()


def test_many_processes_fetch_a_file_once(server):
    server.files["/weights.pth"] = bytes(10**6)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_locate, [f"{server.url}/weights.pth"] * 8)
    assert found == [bytes(10**6)] * 8
    assert server.got("/weights.pth") == 1


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (TOKENIZER, tokenizer),
        ("beitv2_base_patch16_224_pt1k", student),
        ("beitv2_large_patch16_224_pt1k_ft1k", classifier),
    ],
)
def test_a_published_name_reads_the_published_structure(server, tmp_path, monkeypatch, name, make):
    without_digests(monkeypatch)
    model = make()
    server.publish(name, convert(model.state_dict(), "published"), tmp_path)
    found = create_model(checkpoint=name, **({"heads": model.config.encoder.heads} if make is tokenizer else {}))
    published = {"quantize.idle", "quantize.steps"}  # of ours alone
    expected = {n: torch.zeros_like(v) if n in published else v for n, v in model.state_dict().items()}
    assert_same_state(found.state_dict(), expected)


def test_a_published_name_alone_brings_its_weights(server, tmp_path):
    name = "beitv2_base_patch16_224_pt1k_300e_ft1k"
    with pytest.raises(CheckpointError, match="404"):
        create_model(name)
    model = create_model("beitv2_base_classifier", dim=48, depth=2, heads=12, mlp_ratio=1, num_classes=1000)
    server.publish(name, convert(model.state_dict(), "published"), tmp_path)
    with pytest.raises(
        CheckpointError, match="holds no beitv2_base_patch16_224_pt1k_300e_ft1k: it has dim 48, not 768"
    ):
        create_model(name)
    assert_same_state(create_model(checkpoint=name).state_dict(), model.state_dict())


def test_a_repository_of_the_hub_is_read_like_its_folder(server, tmp_path):
    import timm
    from safetensors.torch import save

    theirs = timm.create_model(
        "beitv2_base_patch16_224", img_size=48, embed_dim=32, depth=2, num_heads=4, num_classes=7
    )
    config = {"architecture": "beitv2_base_patch16_224", "num_classes": 7}
    server.repositories["timm/small.in1k"] = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(theirs.state_dict()),
        "pytorch_model.bin": b"not needed",
        "onnx/model.safetensors": b"not needed",
    }
    expected = convert(theirs.state_dict(), "beitv2_fast", "timm")
    assert_same_state(create_model("hf-hub:timm/small.in1k").state_dict(), expected)
    fetched = {path.split("/")[-1] for _, path in server.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"} and not any("onnx" in path for _, path in server.asked)
    server.repositories.clear()  # as without a network: the cache is enough
    assert content(Path("hf-hub:timm/small.in1k")) == content(locate("hf-hub:timm/small.in1k"))
    assert locate("hf-hub:timm/small.in1k").name == COMMIT


def test_a_repository_of_one_file_is_that_file(server, tmp_path):
    torch.save({"model": dict(convert(student().state_dict(), "published"))}, tmp_path / "x")
    server.repositories["me/x"] = {"beitv2.pth": (tmp_path / "x").read_bytes(), "README.md": b"a card"}
    assert_same_state(create_model("hf-hub:me/x").state_dict(), student().state_dict())


@pytest.mark.parametrize("name", ["nobody/nothing", "../../etc", "a/b/c", ""])
def test_a_repository_that_is_not_there_is_told_with_what_to_do(server, name):
    with pytest.raises(CheckpointError, match=re.escape(f"hf-hub:{name} could not be fetched")) as error:
        locate(f"hf-hub:{name}")
    assert "put the files of https://huggingface.co/" in str(error.value)


def test_a_repository_cannot_write_outside_of_the_cache(server, tmp_path):
    server.repositories["me/evil"] = {"../../../../../escaped.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(CheckpointError):
        create_model("hf-hub:me/evil")
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.parent.glob("escaped*"))


def test_what_is_no_name_and_not_there_is_told_with_the_grammar():
    with pytest.raises(CheckpointError, match=r"no checkpoint file beitv3. Name a run folder, a file, a URL, hf-hub:"):
        create_model(checkpoint="beitv3")
