"""sample.py beyond the end-to-end tests of test_scripts.py: all kinds of models, any prompt, a judge, a terminal."""

import contextlib
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from dataclasses import asdict

import numpy as np
import pytest
import torch
from fcntl import ioctl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import config
import prepare
import quick
import sample
import train
from sedd import GPT, MODELS, SEDD, Absorbing, LogLinearNoise, SEDDConfig
from sedd import sample as diffuse
from test_published import Bomb
from test_scripts import ASCII, ROOT, call, complains, run, works

LINE = "\n\n" + "-" * 80 + "\n"  # between two texts
VOCAB = sorted(set("\n\t abcdefghijklmnopqrstuvwxyz{}0123456789é日"))
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257}
needs_bpe = pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"),
                               reason="needs GPT-2's BPE files: set TIKTOKEN_CACHE_DIR")  # fmt: skip


def random_model(parameterization="score", graph="absorb", vocab_size=len(VOCAB)):
    torch.manual_seed(0)
    config = SEDDConfig(vocab_size, 32, 1, 2, 16, 8, 0.0, graph, parameterization=parameterization)
    model = MODELS[parameterization](config)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model


def save(folder, model, meta=None):
    """A checkpoint as far as train.py's readers look into it."""
    folder.mkdir()
    meta = meta or {"tokenizer": "char", "vocab_size": len(VOCAB), "vocab": VOCAB}
    moments = {
        i: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for i, p in enumerate(model.parameters())
    }
    optimizer = {"adamw": {"state": moments, "param_groups": [{"params": list(moments)}]}}
    checkpoint = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": optimizer, "step": 1,
                  "config": asdict(model.config), "options": {"optimizer": "adamw"}, "meta": meta}  # fmt: skip
    torch.save(checkpoint, folder / "ckpt.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models of every kind, untrained."""
    home = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        save(home / kind, random_model(kind))
    save(home / "uniform", random_model("score", "uniform"))
    save(home / "bpe", random_model("score", "absorb", 50257), GPT2)
    random_model().save_pretrained(home / "published")
    random_model("score", "uniform", 50257).save_pretrained(home / "published_bpe")
    return home


def write(home, *args):
    """The text that sample.py prints, without print's own newline."""
    done = works(call("sample.py", *args, cwd=home))
    assert done.stdout[-1] == "\n"
    return done.stdout[:-1]


# ------------------------------------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("kind", ["score", "mean", "uniform"])
def test_all_that_score_write_and_keep_what_is_given(kind, home):
    text = write(home, f"--init_from={kind}", "--steps=3", "--prompt=abc{5}def{4}\n{2}")
    assert len(text) == 18 and text[:3] == "abc" and text[8:11] == "def" and text[15] == "\n"


def test_init_from_is_a_run_or_one_of_its_checkpoints(home):
    text = write(home, "--init_from=mean", "--steps=3")
    shutil.copy(home / "mean/ckpt.pt", home / "mean/ckpt.old.pt")
    for start in "./mean/", "mean/ckpt.pt", "mean/ckpt.old.pt", home / "mean":
        assert write(home, f"--init_from={start}", "--steps=3") == text


def test_gpt_goes_on_with_a_text(home):
    texts = write(home, "--init_from=causal", "--prompt=once {15}", "--num_samples=2").split(LINE)
    assert [len(text) for text in texts] == [20, 20] and texts[0] != texts[1]
    assert all(text.startswith("once ") for text in texts)
    assert len(write(home, "--init_from=causal", "--prompt=once{3}{2}")) == 9
    for option in "prompt={}a", "prompt={3}a{4}", "steps=128", "sampler=euler", "sampler=exact", "eta=0.1":
        done = call("sample.py", "--init_from=causal", f"--{option}", cwd=home)
        complains(done, "sample.py", "'causal'", "left to right", "--eta", "text after a gap")


@needs_bpe
def test_published_weights_write(home):
    text = write(home, "--init_from=published_bpe", "--steps=2", "--prompt=The while statement{9}")
    assert text.startswith("The while statement") and len(text) > 25


def test_other_tokens_are_written_and_prompted_as_numbers(home, tmp_path):
    """Those of published weights whose vocabulary nothing tells, and those of a data set of one's own."""
    save(tmp_path / "own", random_model(), {"vocab_size": len(VOCAB), "dtype": "<u2"})
    for folder, start in (home, "published"), (tmp_path, "own"):
        numbers = write(folder, f"--init_from={start}", "--steps=2", "--prompt=1 22 3 {5} 7").split(" ")
        assert numbers[:3] == ["1", "22", "3"] and numbers[8:] == ["7"]
        assert all(0 <= int(number) < len(VOCAB) for number in numbers)
        assert len(write(folder, f"--init_from={start}", "--steps=2", "--prompt=5").split(" ")) == 32
        for prompt in "1 x {5}", "1 99 {5}", "-1 {5}":
            done = call("sample.py", f"--init_from={start}", f"--prompt={prompt}", cwd=folder)
            complains(done, "sample.py", prompt.removesuffix(" {5}").split()[-1])


@needs_bpe
def test_the_end_of_a_text_in_a_prompt_is_one_token(home, generated):
    text = write(home, "--init_from=bpe", "--steps=1", "--prompt=The end.<|endoftext|>{9}")
    assert text.startswith("The end.<|endoftext|>") and generated[0][0][0, :4].tolist() == [464, 886, 13, 50256]


def test_nowhere_to_start_from(home, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    complains(call("sample.py", "--init_from=no/where", cwd=home), "sample.py", "no/where")
    complains(call("sample.py", "--init_from=.", cwd=home), "sample.py", "config.json")
    complains(call("sample.py", "--init_from=nowhere", cwd=home), "sample.py", "nowhere")


def test_where_its_owner_is_a_folder_the_hub_is_never_asked(home, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("the hub was asked"))
    (home / "out").mkdir(exist_ok=True)
    for start in "out/mytext", "mean/ckpt.old9.pt", "./nowhere", "../no/where":
        complains(call("sample.py", f"--init_from={start}", cwd=home), "sample.py", start)


def test_a_model_that_can_only_draw_mask_is_named(tmp_path):
    model = random_model()
    model.output_layer.linear.bias.data.fill_(1e4)  # finite, but not its exp
    save(tmp_path / "lost", model)
    done = call("sample.py", "--init_from=lost", "--steps=2", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "'lost' has diverged" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- what is said, and where


def test_the_newest_checkpoint_under_out_is_taken_and_named(home, tmp_path):
    complains(call("sample.py", cwd=tmp_path), "sample.py", "out/", "python train.py")
    (tmp_path / "out").mkdir()
    for age, (folder, kind) in enumerate({".": "score", "a": "mean", "b": "causal"}.items()):
        (tmp_path / "out" / folder).mkdir(exist_ok=True)
        shutil.copy(home / kind / "ckpt.pt", tmp_path / "out" / folder)
        os.utime(tmp_path / "out" / folder / "ckpt.pt", (2000 - age, 2000 - age))
    said = lambda *args: works(call("sample.py", *args, cwd=tmp_path)).stderr
    assert said("--steps=2").endswith(" 2 steps of tweedie, model from out\n")
    os.utime(tmp_path / "out/a/ckpt.pt", (3000, 3000))
    assert said("--steps=2").endswith(" 2 steps of tweedie, model from out/a\n")
    os.utime(tmp_path / "out/b/ckpt.pt", (4000, 4000))
    assert said("--prompt={4}").endswith(" 4 steps of GPT, model from out/b\n")
    assert said("--steps=2", "--init_from=out").endswith(" from out\n")
    (tmp_path / "out/b/ckpt.pt").write_bytes(b"")
    complains(call("sample.py", cwd=tmp_path), "sample.py", "out/b")


def test_the_text_and_one_line_of_what_made_it(home):
    done = works(call("sample.py", "--init_from=score", "--steps=3", cwd=home))
    assert len(done.stdout) == 33 and done.stdout[-1] == "\n"
    assert re.fullmatch(r"1 text of 32 tokens in \d+\.\d s: 3 steps of tweedie, model from score\n", done.stderr)
    done = works(call("sample.py", "--init_from=uniform", "--steps=2", "--sampler=euler", "--num_samples=2",
                      "--prompt={33}", cwd=home))  # fmt: skip
    assert re.fullmatch(r"2 texts of 33 tokens in .* s: 4 steps of euler, model from uniform\n", done.stderr)
    done = works(call("sample.py", "--init_from=causal", "--prompt=abc{2}", cwd=home))
    assert re.fullmatch(r"1 text of 5 tokens in .* s: 2 steps of GPT, model from causal\n", done.stderr)
    done = works(call("sample.py", "--init_from=score", "--sampler=exact", "--prompt=once{36}", cwd=home))
    assert re.fullmatch(r"1 text of 40 tokens in .* s: 36 steps of exact, model from score\n", done.stderr)
    assert done.stdout.startswith("once") and len(done.stdout) == 41


def test_what_made_the_text_stands_below_it(home):
    """Also in a file that gets both."""
    command = [sys.executable, str(ROOT / "sample.py"), "--init_from=score", "--steps=2", "--prompt=abc{3}"]
    done = quick.run(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert re.fullmatch("abc(?s:...)\n1 text of 6 tokens .*\n", done.stdout)


# --------------------------------------------------------------------------------------- many texts, and long ones


@pytest.fixture
def generated(monkeypatch):
    """The prompts that the models get from now on, and what they make of them."""
    calls = []
    for kind in SEDD, GPT:
        real = kind.generate

        def generate(self, prompt, *args, real=real, **options):
            prompt = prompt.clone()
            x = real(self, prompt, *args, **options)
            calls.append((prompt, x))
            return x

        monkeypatch.setattr(kind, "generate", generate)
    return calls


class Alphabet:
    """The exact model of texts that go on as 0, 1, ..., V - 1, 0, ... and begin anywhere: the distribution of each
    hidden token is that of V possible beginnings, of which one visible token leaves one."""

    def __init__(self, V, block_size):
        self.V, self.config, self.causal = V, SEDDConfig(V, block_size), False
        self.graph, self.noise = Absorbing(V), LogLinearNoise()

    def __call__(self, x, sigma):
        i = torch.arange(x.shape[1])
        texts = (torch.arange(self.V)[:, None] + i) % self.V
        fits = ((x[:, None] == texts) | (x[:, None] == self.V)).all(-1).double()
        assert fits.any(-1).all()  # no text has the tokens that are visible
        probs = (fits / fits.sum(-1, keepdim=True)) @ torch.nn.functional.one_hot(texts, self.V + 1).double().flatten(1)
        log_score = (probs.view(*x.shape, -1) / torch.expm1(sigma.double())[:, None, None]).log()
        return log_score.scatter(-1, x[..., None], 0.0)

    def to(self, device):
        return self

    def generate(self, prompt, steps, sampler="tweedie", callback=None, **how):
        return diffuse(self, self.graph, self.noise, prompt, steps, sampler, callback, **how)


@pytest.mark.parametrize(
    "block_size, length", [(8, 8), (8, 9), (8, 12), (8, 13), (8, 50), (9, 50), (2, 9), (1, 1), (64, 50)]
)
def test_pieces_join_without_loss(block_size, length, tmp_path, monkeypatch):
    """A token lost, doubled or written without what stands before it would break the alphabet."""
    model = Alphabet(11, block_size), {"meta": {"tokenizer": "char", "vocab": [*"abcdefghijk"]}}
    monkeypatch.setattr(train, "load_model", lambda start: model)
    alphabet = "".join("abcdefghijk"[(5 + i) % 11] for i in range(length))
    for first, last in (1, 0), (0, 1), (length // 2 + 1, 0):  # how much is kept
        gap = length - first - last
        if not gap or (last and length > block_size):  # the end is out of sight of the beginning
            continue
        prompt = alphabet[:first] + f"{{{gap}}}" + alphabet[length - last :]
        texts = write(tmp_path, "--init_from=it", "--steps=2", "--num_samples=3", f"--prompt={prompt}").split(LINE)
        assert texts == [alphabet] * 3


@pytest.mark.parametrize("model", ["score", "uniform", "causal"])
def test_each_piece_begins_with_the_last_half_of_the_one_before(model, home, generated):
    steps = [] if model == "causal" else ["--steps=2"]
    text = write(home, f"--init_from={model}", *steps, "--prompt=ab{88}")
    assert len(text) == 90 and text.startswith("ab")
    prompts, results = zip(*generated)
    assert [prompt.shape[1] for prompt in prompts] == [32, 32, 32, 32, 26]
    for prompt, before in zip(prompts[1:], results):
        assert prompt[0, :16].tolist() == before[0, 16:].tolist() and (prompt[0, 16:] == -1).all()
    joined = results[0][0].tolist() + [token for x in results[1:] for token in x[0, 16:].tolist()]
    assert text == "".join(VOCAB[token] for token in joined)


def test_long_texts_keep_what_is_given(home, generated):
    text = write(home, "--init_from=score", "--steps=2", f"--prompt={50 * 'a'}{{43}}the end")
    assert len(text) == 100 and text.startswith(50 * "a") and text.endswith("the end")
    assert [int((prompt == -1).sum()) for prompt, _ in generated] == [14, 16, 13]  # no piece without a gap
    text = write(home, "--init_from=score", "--steps=2", "--prompt=x{40}y{40}z")
    assert len(text) == 83 and (text[0], text[41], text[82]) == ("x", "y", "z")


@pytest.mark.parametrize("model", ["score", "causal"])
def test_many_texts_are_written_in_batches_that_fit(model, home, generated):
    args = [f"--init_from={model}", "--num_samples=1100", "--prompt={34}"] + ["--steps=1"] * (model == "score")
    texts = write(home, *args).split(LINE)
    assert len(texts) == 1100 and {len(text) for text in texts} == {34} and len(set(texts)) > 1000
    shapes = [tuple(prompt.shape) for prompt, _ in generated]
    assert shapes == [(512, 32), (512, 18)] * 2 + [(76, 32), (76, 18)]
    assert [prompt.tolist() for prompt, _ in generated[1::2]] == [
        [row[16:] + [-1, -1] for row in x.tolist()] for _, x in generated[::2]]  # fmt: skip
    halves = [torch.cat([x for _, x in generated[i::2]]).tolist() for i in (0, 1)]
    rows = [first + second[16:] for first, second in zip(*halves)]
    assert texts == ["".join(VOCAB[token] for token in row) for row in rows]
    assert write(home, *args).split(LINE) == texts


def test_texts_are_printed_as_they_are_finished(home, generated, monkeypatch):
    """So Ctrl-C costs none of them."""
    counted = SEDD.generate

    def generate(*args, **options):
        assert len(sys.stdout.buffer.getvalue().decode().split(LINE)) == max(1, 512 * len(generated))
        if len(generated) == 2:
            raise KeyboardInterrupt
        return counted(*args, **options)

    monkeypatch.setattr(SEDD, "generate", generate)
    done = call("sample.py", "--init_from=score", "--steps=1", "--num_samples=1100", cwd=home)
    assert done.returncode == 130 and len(done.stdout.split(LINE)) == 1024 and done.stderr == ""


# --------------------------------------------------------------------------------------------------------- any prompt

ANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# what people type, what the models know, what the shell lets through (lone surrogates stand for broken bytes)
TYPED = st.text(st.sampled_from("ab{} 09é日") | st.characters() | st.characters(categories=["Cs"]), max_size=12)
KNOWN, GAPS = st.text(st.sampled_from(VOCAB), max_size=8), st.integers(-1, 40).map("{{{}}}".format)
TEXTS = TYPED.map(lambda text: text.replace("\0", "")) | KNOWN
MARKS = st.sampled_from(["{1}", "{5}", "{}", "{{", "}}"])
PROMPTS = st.lists(TEXTS | GAPS, max_size=6) | st.lists(KNOWN | MARKS, max_size=6)


def reading(prompt):
    """What a prompt says, character by character: the texts that it keeps, and between them the gaps, as they stand."""
    texts, gaps = [""], []
    while prompt:
        if gap := re.match(r"\{([0-9]*)\}", prompt):
            texts.append("")
            gaps.append(gap[1])
            prompt = prompt[len(gap[0]) :]
        else:
            texts[-1] += prompt[0]
            prompt = prompt[2 if prompt[:2] in ("{{", "}}") else 1 :]
    return (texts, gaps) if gaps else (texts + [""], [""])


def test_how_a_prompt_is_read():
    for prompt, texts, gaps in [
        ("", ["", ""], [""]), ("a b", ["a b", ""], [""]), ("a{}b", ["a", "b"], [""]),
        ("{7}{8}a", ["", "", "a"], ["7", "8"]),
        ("{{5}}", ["{5}", ""], [""]), ("{{{5}}}", ["{", "}"], ["5"]), ("{{{{}}}}", ["{{}}", ""], [""]),
        ("f(){", ["f(){", ""], [""]), ("}{2}{", ["}", "{"], ["2"]),
        ("{abc}{-1}{ 2}{٣}{1", ["{abc}{-1}{ 2}{٣}{1", ""], [""]),
        ("{5}}}", ["", "}"], ["5"]), ("{}}", ["", "}"], [""]), ("{007}", ["", ""], ["007"]),
    ]:  # fmt: skip
        assert reading(prompt) == (texts, gaps)
        kept = [[*map(ord, text)] for text in texts]
        left = 64 - sum(map(len, kept)) - sum(int(gap or 0) for gap in gaps)
        expected = [token for text, gap in zip(kept, gaps) for token in text + [-1] * int(gap or left)] + kept[-1]
        assert sample.build_prompt(prompt, Letters(), 64, "") == expected


class Letters:
    """A tokenizer without a vocabulary."""

    encode = staticmethod(lambda text: np.array([*map(ord, text)], int))


@example(["{}{1}{{2}}"])
@example(["{٣}"])
@example(["{" + "9" * 5000 + "}"])
@example(["{0}", "a\r\n\t", "{2}"])
@example(["{1000000}", "a", "{1}"])
@example(["{}", "a", "{}"])
@example(["{31}", "a", "{}"])
@given(PROMPTS)
@ANY
def test_any_prompt(home, pieces):
    """By characters, so that the text tells each gap; what is refused has a reason."""
    prompt = "".join(pieces)
    texts, gaps = reading(prompt)
    sizes = [int(gap or 0) if len(gap) < 9 else 10**9 for gap in gaps]
    left = 32 - len("".join(texts)) - sum(sizes)
    sizes = [left if gap == "" else size for gap, size in zip(gaps, sizes)]
    right = gaps.count("") < 2 and ("" not in gaps or left > 0) and 0 < sum(sizes) <= 10**6
    right = right and not set("".join(texts)) - set(VOCAB)
    for model in "score", "uniform":
        done = call("sample.py", f"--init_from={model}", "--steps=1", f"--prompt={prompt}", cwd=home)
        assert done.returncode == (0 if right else 2)
        if right:
            assert re.fullmatch("".join(re.escape(text) + ".{%d}" % size for text, size in zip(texts, [*sizes, 0])),
                                done.stdout[:-1], re.DOTALL)  # fmt: skip
        else:
            assert done.stdout == "" and len(done.stderr.split("\n")) == 2, done.stderr


@needs_bpe
@given(PROMPTS)
@ANY
def test_any_prompt_in_byte_pairs(home, pieces):
    """A blank before a gap is the model's to write; all else is kept, but for what is no character."""
    prompt = "".join(pieces)
    done = call("sample.py", "--init_from=bpe", "--steps=1", f"--prompt={prompt}", cwd=home)
    if done.returncode:
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.split("\n")) == 2, done.stderr
    elif not re.search("[\ud800-\udfff]", prompt):
        *before, after = reading(prompt)[0]
        pattern = "".join(re.escape(text.removesuffix(" ")) + ".*" for text in before) + re.escape(after)
        assert re.fullmatch(pattern, done.stdout[:-1], re.DOTALL)


@needs_bpe
@pytest.mark.parametrize("prompt, kept", [
    ("The {3} is used", [464, -1, -1, -1, 318, 973]), ("The{3} is used", [464, -1, -1, -1, 318, 973]),
    ("The  {2}", [464, 220, -1, -1]), (" {1} {2} a", [-1, -1, -1, 257]),
    ("The\n{1}\n {1} ", [464, 198, -1, 198, -1, 220]),
    ("The {29}{} ", [464] + [-1] * 30 + [220]), ("The ", [464] + [-1] * 31), ("{{ {1} }}", [90, -1, 1782]),
])  # fmt: skip
def test_one_blank_before_a_gap_belongs_to_the_gap(home, generated, prompt, kept):
    """The token of a word begins with its blank: a blank that were kept alone would hardly ever be followed by one."""
    write(home, "--init_from=bpe", "--steps=1", f"--prompt={prompt}")
    assert generated[0][0].tolist() == [kept]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a model of byte-level tokens learned from English text, and the tokenizer of these."""
    home = tmp_path_factory.mktemp("learned")
    (home / "some.txt").write_text("the cat sat on the mat, and the rat ate the hat. " * 50)
    works(call("prepare.py", "some", "--input=some.txt", "--tokenizer=bpe", "--vocab_size=280", cwd=home))
    meta = json.loads((home / "data/some/meta.json").read_text())
    save(home / "bytes", random_model(vocab_size=meta["vocab_size"]), meta)
    return home, prepare.Tokenizer(meta)


def test_a_text_that_the_tokens_were_not_learned_from_is_kept(learned):
    home, tokenizer = learned
    prefix, suffix = "你好，世界！🙂 the cat 👩‍🚀", " 再见🎉\n"
    assert len(tokenizer.encode(prefix)) > 32  # more than a block
    for n in 10, 50:
        text = write(home, "--init_from=bytes", "--steps=2", f"--prompt={prefix} {{{n}}}{suffix}")
        assert text.startswith(prefix) and text.endswith(suffix) and len(text) > len(prefix + suffix)
    assert "\ufffd" in text  # an untrained model writes bytes that form no character


def test_gaps_count_tokens(learned):
    home, tokenizer = learned
    done = works(call("sample.py", "--init_from=bytes", "--steps=2", "--prompt=the cat {7}日本{2}🙂", cwd=home))
    kept = [len(tokenizer.encode(text)) for text in ("the cat", "日本", "🙂")]
    assert kept[0] < 7 and done.stderr.startswith(f"1 text of {sum(kept) + 9} tokens ")
    assert re.fullmatch("the cat.*日本.*🙂\n", done.stdout, re.DOTALL)
    done = works(call("sample.py", "--init_from=bytes", "--steps=2", "--prompt=the cat {}日本", cwd=home))
    assert done.stderr.startswith("1 text of 32 tokens ")


def test_bytes_that_form_no_character_break_no_terminal(learned):
    terminal = Terminal(learned[0], "--watch=False", "--init_from=bytes", "--steps=2", "--num_samples=20")
    assert terminal.end() == 0
    texts = re.sub("\r+\n", "\n", terminal.written.lstrip("\r"))  # the terminal adds one, a text may have another
    assert "\ufffd" in texts and not [c for c in texts if unicodedata.category(c) == "Cc" and c not in "\n\t"]


# ---------------------------------------------------------------------------------------------------------- the judge


WORDS = {"[UNK]": 0} | {c: i + 1 for i, c in enumerate(reversed(VOCAB[:-1]))}  # of the judge, which lacks 日


@pytest.fixture(scope="module")
def judges(home):
    """Two random GPT-2s in home: one that reads characters with a tokenizer of its own, and one without any."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    for name, vocab_size in ("judge", len(WORDS)), ("mute", 50257):
        torch.manual_seed(5)
        config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                         initializer_range=0.5, bos_token_id=0, eos_token_id=0)  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(home / name)
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(home / "judge")
    return transformers


def told(done):
    line = done.stderr.splitlines()[-1]
    found = re.fullmatch(r"perplexity ([\d.]+) by (\S+), unigram entropy ([\d.]+) nats .*", line)
    return float(found[1]), found[2], float(found[3])


@pytest.mark.parametrize("model", ["score", pytest.param("bpe", marks=needs_bpe)])
def test_perplexity_and_entropy_from_their_definitions(model, home, judges):
    args = f"--init_from={model}", "--steps=2", "--num_samples=3", "--judge=judge"
    done = works(call("sample.py", *args, cwd=home))
    texts = done.stdout[:-1].split(LINE)
    network = judges.GPT2LMHeadModel.from_pretrained(home / "judge").double()
    nats = []
    for text in texts:
        tokens = [WORDS.get(c, 0) for c in text][:24]
        for i in range(1, len(tokens)):  # a token at a time
            logits = network(torch.tensor([tokens[:i]])).logits[0, -1]
            nats.append((logits.logsumexp(0) - logits[tokens[i]]).item())
    seen = told(done)
    assert seen[0] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3, abs=0.006)
    assert seen[1] == "judge" and seen[0] > 1.2 * network.config.vocab_size**0.5
    assert "repetition lowers both" in done.stderr
    if model == "score":
        shares = [[text.count(c) / len(text) for c in set(text)] for text in texts]
        assert seen[2] == pytest.approx(-sum(p * math.log(p) for row in shares for p in row) / 3, abs=0.006)


def test_a_judge_weighs_every_token_alike(home, judges):
    judge = judges.pipeline("text-generation", str(home / "judge"))
    network = judges.GPT2LMHeadModel.from_pretrained(home / "judge")

    def perplexity(*texts):
        said = sample.judged(texts, torch.zeros(len(texts), 9, dtype=torch.long), judge)
        return float(re.match(r"perplexity ([\d.]+) by", said)[1])

    expected = network(torch.tensor([[WORDS[c] for c in "hello"]]), labels=torch.tensor([[WORDS[c] for c in "hello"]]))
    assert perplexity("hello") == pytest.approx(expected.loss.exp().item(), abs=0.006)
    few, many = perplexity("ab日"), perplexity("hello world")  # 2 and 10 tokens that count
    together = math.exp((2 * math.log(few) + 10 * math.log(many)) / 12)
    assert perplexity("ab日", "hello world") == pytest.approx(together, rel=1e-3)


def test_unigram_entropy_of_known_texts(home, judges):
    x = torch.tensor([[3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 6, 6]])
    said = sample.judged(["abc"] * 3, x, judges.pipeline("text-generation", str(home / "judge")))
    assert f"entropy {(0 + math.log(4) + math.log(2)) / 3:.2f} nats" in said


def test_no_judge(home, judges, monkeypatch):
    """A name that is wrong is told before a text is written."""
    monkeypatch.setattr(judges.utils.hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    complains(call("sample.py", "--init_from=score", "--judge=no/judge", cwd=home), "sample.py", "huggingface.co")


# -------------------------------------------------------------------------------------------------------- the terminal


@given(st.text(st.sampled_from("ab \t\n\x1b\r\x07\x9bé日") | st.characters(), max_size=60))
@ANY
def test_a_text_moves_no_cursor(text):
    shown = sample.UNSAFE.sub("\ufffd", text)
    assert len(shown) == len(text)
    for i, (a, b) in enumerate(zip(text, shown)):
        safe = unicodedata.category(a) != "Cc" or a in "\n\t" or text[i : i + 2] == "\r\n"
        assert b == (a if safe else "\ufffd")


class Terminal:
    """sample.py in a pseudo-terminal of 12 rows of 20 characters, and all that it wrote there."""

    def __init__(self, home, *args, **more):
        main, side = pty.openpty()
        ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 20, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"OMP_NUM_THREADS": "1"} | more
        self.process = quick.Popen([sys.executable, str(ROOT / "sample.py"), "--watch", *args], cwd=home, env=env,
                                   stdin=side, stdout=side, stderr=side, start_new_session=True)  # fmt: skip
        os.close(side)
        self.main, self.written = main, ""

    def read(self, until=None):
        with contextlib.suppress(OSError):  # what a terminal gives whose program has ended
            while (until is None or until not in self.written) and (some := os.read(self.main, 65536)):
                self.written += some.decode("utf-8", "ignore")
        return self.written

    def end(self):
        self.read()
        os.close(self.main)
        return self.process.wait(20)


def screens_of(written):
    """The frames, each the text and the step that the bar below it tells, and what follows when all is written."""
    before, *shown = written.split(sample.CLEAR)
    assert before.strip("\r") == ""
    frames = [frame.rpartition("\r\n\r") for frame in shown]
    frames = [(text.replace("\r\n", "\n"), re.search(r"(\d+)/", bar)) for text, _, bar in frames]
    return [(text, int(step[1])) for text, step in frames if step], shown[-1].replace("\r\n", "\n")


def test_watching_shows_masks_turn_into_text(home):
    started = time.monotonic()
    terminal = Terminal(home, "--init_from=score", "--steps=30", "--prompt=日ab{12}cd{9}\n{2}")
    assert terminal.end() == 0 and time.monotonic() - started > 6
    frames, after = screens_of(terminal.written)
    screens, steps = zip(*frames)
    assert len(screens) == 31 and steps == (*range(31),)
    assert after.replace("\r", "").startswith(screens[-1] + "\n1 text of 29 ")  # once, and not below the last frame
    dots = [screen.count("·") for screen in screens]
    assert dots[0] == 23 and dots[-1] == 0 and sorted(dots, reverse=True) == dots and len(set(dots)) > 8
    assert screens[0] == "日ab" + 12 * "·" + "cd" + 9 * "·" + "\n" + 2 * "·"
    assert all(screen.startswith("日ab") for screen in screens)


@pytest.mark.parametrize("model, how, steps", [("score", "--steps=10", 30), ("causal", "--top_p=0.9", 61)])
def test_watching_slides_along_a_long_text(model, how, steps, home):
    """Each frame holds the text up to the end of the piece in work, of which the terminal shows the last rows."""
    terminal = Terminal(home, f"--init_from={model}", how, "--prompt=日ab{61}")
    assert terminal.end() == 0
    frames, after = screens_of(terminal.written)
    screens, seen = zip(*frames)
    assert seen[-1] == steps and sorted(seen) == [*seen] and after.startswith(screens[-1] + "\n")
    assert {len(screen) for screen in screens} == {32, 48, 64} and all(screen.startswith("日ab") for screen in screens)
    for shorter, longer in zip(screens, screens[1:]):
        assert all(a in ("·", b) for a, b in zip(shorter, longer))  # what is written stays
    assert not any("·" in screen[: max(0, len(screen) - 16)] for screen in screens if len(screen) > 32)


def test_watching_the_first_text_wipes_out_no_other(home):
    terminal = Terminal(home, "--init_from=score", "--steps=2", "--num_samples=520")
    assert terminal.end() == 0
    frames, after = screens_of(terminal.written)
    assert [step for _, step in frames] == [0, 1, 2]
    texts = re.sub("\r[^\n]*\r", "", after).split(LINE)  # without the bar
    assert len(texts) == 520 and texts[0] == frames[-1][0] and texts[-1][32:].startswith("\n520 texts of 32 tokens")


@pytest.mark.parametrize("end, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_stopping_leaves_the_text_so_far(end, status, home):
    """Under the uniform graph, where there are no masks and text changes."""
    terminal = Terminal(home, "--init_from=uniform", "--steps=64", "--prompt=日ab{}")
    terminal.read(until=" 9/64")
    terminal.process.send_signal(end)
    assert terminal.end() == status
    frames, _ = screens_of(terminal.written)
    assert "Traceback" not in terminal.written
    screens = [screen for screen, _ in frames]
    assert len(set(screens)) > 3 and all(screen.startswith("日ab") and "·" not in screen for screen in screens)


def test_a_bar_counts_the_steps_of_all_texts_and_is_gone_when_they_come(home):
    terminal = Terminal(home, "--watch=False", "--init_from=score", "--steps=60", "--num_samples=1024", "--prompt={48}")
    assert terminal.end() == 0
    counts, totals = zip(*re.findall(r" (\d+)/(\d+)", terminal.written))
    assert set(totals) == {"240"} and 200 < int(counts[-1]) <= 240 and sorted(counts, key=int) == list(counts)
    first, *_, last = texts = re.sub("\r[^\n]*\r", "", terminal.written.replace("\r\n", "\n")).split(LINE)
    assert len(texts) == 1024 and len(first) == 48 and last[48:].startswith("\n1024 texts of 48") and "%|" not in last


@pytest.mark.parametrize(
    "model, how", [("causal", "--top_p=1"), ("score", "--sampler=exact"), ("uniform", "--steps=9")]
)
def test_a_bar_ends_at_its_total(model, how, home, monkeypatch):
    seen = []
    monkeypatch.setattr(config, "tqdm", lambda *args, **more: seen.append(tqdm(*args, **more)) or seen[-1])
    for prompt in "ab{20}", "{50}", f"{50 * 'a'}{{43}}":
        write(home, f"--init_from={model}", how, f"--prompt={prompt}", "--num_samples=600")
        assert seen[-1].n == seen[-1].total
    gaps = "{9}b{30}a"
    if model != "causal":
        write(home, f"--init_from={model}", how, f"--prompt={gaps}")
        assert seen[-1].n == seen[-1].total


def test_a_text_breaks_no_terminal_and_a_pipe_gets_it_whole(tmp_path):
    vocab = sorted(set(VOCAB) | {"\x1b", "\x07", "\r"})
    meta = {"tokenizer": "char", "vocab_size": len(vocab), "vocab": vocab}
    save(tmp_path / "wild", random_model(vocab_size=len(vocab)), meta)
    args = "--init_from=wild", "--steps=1", "--prompt=a\x1b2\x07{2}"
    assert write(tmp_path, *args).startswith("a\x1b2\x07")
    terminal = Terminal(tmp_path, "--watch=False", *args)
    assert terminal.end() == 0 and "\x1b" not in terminal.written
    assert terminal.written.lstrip("\r").startswith("a\ufffd2\ufffd")


def test_letters_that_a_locale_lacks(tmp_path):
    """A file and a pipe get them, also where the locale has 128 letters; a terminal shows a "?" for each."""
    vocab = [*"日月火水木金土"]
    save(tmp_path / "wide", random_model(vocab_size=7), {"tokenizer": "char", "vocab": vocab, "vocab_size": 7})
    args = "sample.py", "--init_from=wide", "--steps=1"
    for locale in {}, ASCII:
        text = works(run(*args, cwd=tmp_path, **locale)).stdout
        assert len(text) == 33 and set(text[:-1]) <= set(vocab)
    with open(tmp_path / "text.txt", "wb") as file:
        subprocess.run([sys.executable, ROOT / args[0], *args[1:]], cwd=tmp_path, env=os.environ | ASCII, stdout=file)
    assert (tmp_path / "text.txt").read_text(encoding="utf-8") == text
    terminal = Terminal(tmp_path, "--watch=False", *args[1:], **ASCII)
    assert terminal.end() == 0 and terminal.written.lstrip("\r").startswith(32 * "?" + "\r\n1 text")


def test_watching_needs_a_terminal(home):
    assert "\033" not in write(home, "--init_from=score", "--steps=2", "--watch")


def test_interrupted_sampling_ends_quietly(home, monkeypatch):
    def stop(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sedd.SEDD.generate", stop)
    done = call("sample.py", "--init_from=score", cwd=home)
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr


def test_help_fits_a_screen(home):
    done = works(call("sample.py", "--help", cwd=home))
    assert len(done.stdout.splitlines()) <= 40 and max(map(len, done.stdout.splitlines())) <= 110
    assert done.stdout.count("Example: python sample.py") == 1
