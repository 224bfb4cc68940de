"""Published weights: what the authors' code wrote is read, what is written has its format, and all else is refused."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import train
from sedd import D3PM, GPT, SEDD, SEDDConfig

load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

DATA = Path(__file__).parent / "data"
both_names = pytest.mark.parametrize("name", ["absorb", "uniform"])
both_formats = pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])


def write(folder, config, weights, file):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (save_file if file.endswith("safetensors") else torch.save)(weights, folder / file)
    return folder


def published(name):
    return json.loads((DATA / name / "config.json").read_text()), load_file(DATA / name / "model.safetensors")


def random_model(name="absorb", noise="loglinear", kind=SEDD):
    torch.manual_seed(0)
    parameterization = {SEDD: "score", D3PM: "mean", GPT: "causal"}[kind]
    model = kind(SEDDConfig(13, 10, 2, 2, 32, 16, 0.25, name, noise, parameterization))
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model


def refused(folder, *words):
    """With an error that has these words in its kind or its message."""
    with pytest.raises(Exception) as error:
        SEDD.from_pretrained(folder)
    for word in words:
        assert word in f"{type(error.value).__name__}: {error.value}"


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def without(monkeypatch):
    """As if these packages were not installed."""
    return lambda *packages: [monkeypatch.setitem(sys.modules, package, None) for package in packages]


# ------------------------------------------------------------------------------------------ what is read and written


@both_names
@both_formats
def test_published_weights_give_the_published_scores(name, file, tmp_path):
    model = SEDD.from_pretrained(write(tmp_path, *published(name), file))
    expected = torch.load(DATA / name / "io.pt", weights_only=True)
    assert not model.training and model.config.graph == name
    assert (model(expected["x"], expected["sigma"]) - expected["log_score"]).abs().max() < 2e-4


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@both_names
def test_saving_and_loading_is_the_identity(name, noise, tmp_path):
    model = random_model(name, noise)
    model.save_pretrained(tmp_path / "a/b")
    again = SEDD.from_pretrained(tmp_path / "a/b")
    assert again.config == model.config and same_weights(again, model)
    assert vars(again.noise) == vars(model.noise) and type(again.graph) is type(model.graph)
    assert sorted(os.listdir(tmp_path / "a/b")) == ["config.json", "model.safetensors"]


@both_names
def test_what_is_written_is_laid_out_as_what_was_published(name, tmp_path):
    SEDD.from_pretrained(DATA / name).save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    their_config, their_weights = published(name)
    for part in config.keys() | {"model", "graph", "noise", "tokens"}:  # what the authors' model is built from
        assert changed(config, "model.name", "")[part] == changed(their_config, "model.name", "")[part]
    assert weights.keys() == their_weights.keys()
    for key in weights:
        assert weights[key].dtype == their_weights[key].dtype and weights[key].equal(their_weights[key])


def test_saving_replaces_a_model_in_either_format(tmp_path):
    write(tmp_path, *published("uniform"), "pytorch_model.bin")
    for seed_of_bias in 1, 2:
        model = random_model("absorb")
        model.output_layer.linear.bias.data += seed_of_bias
        model.save_pretrained(tmp_path)
        assert same_weights(SEDD.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("kind", [D3PM, GPT])
def test_baselines_have_no_place_in_the_format(kind, tmp_path):
    with pytest.raises(ValueError, match="parameterization='(mean|causal)'"):
        random_model(kind=kind).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["safetensors.torch", "huggingface_hub"])
def test_a_missing_package_is_named(package, without):
    without(package)
    with pytest.raises(ImportError, match=package.split(".")[0]):
        SEDD.from_pretrained(DATA / "absorb")


@pytest.mark.parametrize("place", ["", "no/such/place", "no such\nplace", "a/b/c/d", "\0", str(DATA / "graph.pt")])
def test_a_place_that_does_not_exist(place, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(place)


@both_formats
def test_a_pointer_of_git_lfs_is_told_from_weights(file, tmp_path):
    """What a clone without git lfs has in their place."""
    write(tmp_path, *published("absorb"), file)
    oid = "0" * 64
    (tmp_path / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 678000000\n")
    refused(tmp_path, file, "git lfs pull")


@pytest.mark.parametrize("file, word", [
    (None, "pytorch_model.bin"), ("pytorch_model.bin", "git lfs pull"), ("config.json", "JSON")])  # fmt: skip
def test_the_scripts_say_in_one_line_what_is_wrong(file, word, tmp_path, capsys):
    folder = write(tmp_path, *published("absorb"), "pytorch_model.bin")
    if file is None:
        (folder / "pytorch_model.bin").unlink()
    else:
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SystemExit) as end:
        train.load_model(str(folder))
    line = capsys.readouterr().err
    assert end.value.code == 2 and len(line.splitlines()) == 1 and str(folder) in line and word in line


def test_the_scripts_name_the_command_that_installs_what_is_missing(without, capsys):
    without("safetensors.torch")
    with pytest.raises(SystemExit):
        train.load_model(str(DATA / "absorb"))
    assert "pip install -e '.[hub]'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- malformed folders


def changed(config, path, value):
    """A copy of a nested dict with the entry at path changed, or without it where value is ..."""
    config = copy.deepcopy(config)
    *path, last = path.split(".")
    place = config
    for key in path:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize("path", ["tokens", "graph", "graph.type", "noise.type", "model", "model.scale_by_sigma"] + [
    f"model.{key}" for key in ("length", "n_blocks", "n_heads", "hidden_size", "cond_dim", "dropout")])  # fmt: skip
def test_every_key_is_needed_and_of_its_type(path, tmp_path):
    config, weights = published("absorb")
    for value in ..., None, [], "two", {}, -1, 2.5:
        if path == "model.length" and value is not ...:
            continue  # the model does not depend on it
        write(tmp_path, changed(config, path, value), weights, "model.safetensors")
        refused(tmp_path, path.split(".")[-1] if value is ... else "")


@pytest.mark.parametrize("path, value, word", [
    ("tokens", 12, "vocab_embed.embedding"), ("tokens", 10**15, "memory"), ("tokens", 11.0, "TypeError"),
    ("tokens", True, "vocab_embed.embedding"), ("model.n_blocks", 1, "blocks.1"), ("model.n_blocks", 3, "blocks.2"),
    ("model.n_heads", 3, "n_head"), ("model.hidden_size", 64, "size mismatch"),
    ("model.cond_dim", 8, "sigma_map"), ("model.dropout", 1.5, "dropout"),
    ("model.scale_by_sigma", False, "scale_by_sigma"), ("graph.type", "uniform", "scale_by_sigma"),
    ("graph.type", "ring", "ring graph"), ("noise.type", "cosine", "'cosine'"),
])  # fmt: skip
def test_config_that_does_not_fit(path, value, word, tmp_path):
    config, weights = published("absorb")
    refused(write(tmp_path, changed(config, path, value), weights, "model.safetensors"), word)


def test_what_this_code_does_not_have_is_refused(tmp_path):
    config, weights = published("uniform")
    write(tmp_path, changed(config, "model.scale_by_sigma", True), weights, "model.safetensors")
    refused(tmp_path, "scale_by_sigma")
    config = changed(config, "noise.type", "geometric")
    assert SEDD.from_pretrained(write(tmp_path, config, weights, "model.safetensors")).config.noise == "geometric"
    refused(write(tmp_path, changed(config, "noise.sigma_max", 10), weights, "model.safetensors"), "geometric")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"tokens"', b"[" * 100_000])
def test_config_that_is_no_json_object(content, tmp_path):
    (write(tmp_path, *published("absorb"), "model.safetensors") / "config.json").write_bytes(content)
    refused(tmp_path)


@both_formats
@pytest.mark.parametrize("key, change, word", [
    ("vocab_embed.embedding", lambda w: None, "vocab_embed"),
    ("blocks.0.norm1.weight", lambda w: None, "blocks.0.norm1.weight"),
    ("blocks.0.norm1.weight", lambda w: w[:, None].clone(), "blocks.0.norm1.weight"),
    ("output_layer.linear.weight", lambda w: w[:-1].clone(), "output_layer.linear.weight"),
    ("blocks.9.norm1.weight", lambda w: torch.zeros(3), "blocks.9.norm1.weight"),
    ("rotary_emb.inv_freq", lambda w: None, "rotary_emb.inv_freq"),
    ("rotary_emb.inv_freq", lambda w: w[:-1].clone(), "rotary_emb.inv_freq"),
])  # fmt: skip
def test_weights_that_do_not_fit(key, change, word, file, tmp_path):
    config, weights = published("absorb")
    weights = {**weights, key: change(weights.get(key))}
    refused(write(tmp_path, config, {k: v for k, v in weights.items() if v is not None}, file), word)


def test_rotary_frequencies_are_those_of_the_file(tmp_path):
    config, weights = published("absorb")
    model = SEDD.from_pretrained(DATA / "absorb")
    weights["rotary_emb.inv_freq"] *= 2
    other = SEDD.from_pretrained(write(tmp_path, config, weights, "model.safetensors"))
    x, sigma = torch.randint(11, (2, 9)), torch.ones(2)
    assert not torch.allclose(other(x, sigma), model(x, sigma))
    model.rotary_emb.inv_freq *= 2
    assert other(x, sigma).equal(model(x, sigma))


@both_formats
def test_missing_files(file, tmp_path):
    refused(tmp_path, "config.json")
    write(tmp_path, *published("absorb"), file)
    (tmp_path / "config.json").rename(tmp_path / "config.txt")
    refused(tmp_path, "config.json")
    (tmp_path / "config.txt").rename(tmp_path / "config.json")
    (tmp_path / file).unlink()
    refused(tmp_path, "pytorch_model.bin")


@both_formats
def test_truncated_weights(file, tmp_path):
    whole = (write(tmp_path, *published("absorb"), file) / file).read_bytes()
    for size in 0, 1, 7, 8, 9, 1000, len(whole) // 2, len(whole) - 20, len(whole) - 1:
        (tmp_path / file).write_bytes(whole[:size])
        refused(tmp_path)


def test_a_flipped_byte_of_a_bin_is_noticed_or_harmless(tmp_path):
    """By its checksums. (A .safetensors has none.)"""
    file = "pytorch_model.bin"
    whole = (write(tmp_path, *published("absorb"), file) / file).read_bytes()
    model, generator, noticed = SEDD.from_pretrained(tmp_path), random.Random(0), 0
    for place in [generator.randrange(len(whole)) for _ in range(100)]:
        (tmp_path / file).write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        try:
            assert same_weights(SEDD.from_pretrained(tmp_path), model)
        except AssertionError:
            raise
        except Exception:
            noticed += 1
    assert noticed > 50


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_can_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "absorb/config.json", tmp_path)
    torch.save({"vocab_embed.embedding": Bomb()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "UnpicklingError")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "BadZipFile")
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Bomb(), 2))
        archive.writestr("model/version", "3\n")
    (tmp_path / "pytorch_model.bin").write_bytes(inside.getvalue())
    refused(tmp_path, "UnpicklingError")
    for content in [], {"vocab_embed.embedding": 1}, {1: torch.zeros(1)}, torch.zeros(3):
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(tmp_path)
    assert not (tmp_path / "exploded").exists()
