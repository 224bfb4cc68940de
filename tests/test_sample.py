"""sample.py beyond the end-to-end tests of test_scripts.py: all kinds of models, any prompt, a judge, a terminal."""

import contextlib
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from dataclasses import asdict

import pytest
import torch
from fcntl import ioctl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prepare
import sample
from sedd import MODELS, SEDDConfig
from test_published import Bomb
from test_scripts import ROOT, call, complains, works

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
    moments = {i: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for i, p in enumerate(model.parameters())}
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
    text = write(home, f"--init_from={kind}", "--steps=3", "--infill=abc{5}def{4}\n{2}")
    assert len(text) == 18 and text[:3] == "abc" and text[8:11] == "def" and text[15] == "\n"


def test_init_from_is_out_dir_by_another_name(home):
    assert write(home, "--init_from=mean", "--steps=3") == write(home, "--out_dir=mean", "--steps=3")


def test_gpt_goes_on_with_a_prefix(home):
    texts = write(home, "--out_dir=causal", "--prefix=once ", "--num_samples=2", "--length=20").split(LINE)
    assert [len(text) for text in texts] == [20, 20] and texts[0] != texts[1]
    assert all(text.startswith("once ") for text in texts)
    for option in "suffix=a", "infill={3}", "steps=128", "sampler=euler":
        done = call("sample.py", "--out_dir=causal", f"--{option}", cwd=home)
        complains(done, "sample.py", "'causal'", "left to right", "--" + option.split("=")[0])


@needs_bpe
def test_published_weights_write(home):
    text = write(home, "--init_from=published_bpe", "--steps=2", "--prefix=The while statement", "--length=12")
    assert text.startswith("The while statement") and len(text) > 25


def test_published_weights_of_an_unknown_vocabulary(home):
    done = call("sample.py", "--init_from=published", cwd=home)
    complains(done, "sample.py", "'published'", f"{len(VOCAB)} tokens", "50257")


def test_nowhere_to_start_from(home, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    complains(call("sample.py", "--init_from=no/where", cwd=home), "sample.py", "'no/where'")
    complains(call("sample.py", "--init_from=.", cwd=home), "sample.py", "config.json")
    complains(call("sample.py", "--out_dir=published", cwd=home), "sample.py", "published/ckpt.pt", "train.py")


@pytest.mark.parametrize("kind, graph", [(kind, "absorb") for kind in MODELS] + [("score", "uniform")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_named(kind, graph, value, tmp_path):
    model = random_model(kind, graph)
    model.blocks[0].mlp[0].weight.data[0] = value
    save(tmp_path / "lost", model)
    complains(call("sample.py", "--out_dir=lost", cwd=tmp_path), "sample.py", "lost/ckpt.pt", "not all finite")


def test_a_model_that_can_only_draw_mask_is_named(tmp_path):
    model = random_model()
    model.output_layer.linear.bias.data.fill_(1e4)  # finite, but not its exp
    save(tmp_path / "lost", model)
    done = call("sample.py", "--out_dir=lost", "--steps=2", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "'lost' has diverged" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------- any prompt

ANY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# what people type, what the models know, what the shell lets through (lone surrogates stand for broken bytes)
TEXTS = st.text(st.sampled_from("ab{}09é日") | st.characters() | st.characters(categories=["Cs"]), max_size=12)
GAPS, KNOWN = st.integers(-1, 40).map("{{{}}}".format), st.text(st.sampled_from(VOCAB), max_size=8)
PIECES = st.lists(TEXTS | KNOWN | GAPS, max_size=6) | st.lists(KNOWN | st.sampled_from(["{1}", "{5}"]), max_size=6)


def kept(pieces, text):
    """Whether the pieces are in the text, in their order, the first at its beginning and the last at its end."""
    return re.fullmatch(".*".join(map(re.escape, pieces)), text, re.DOTALL)


@pytest.mark.parametrize("model", ["score", "uniform", pytest.param("bpe", marks=needs_bpe)])
@example(["{}{1}{{2}}"])
@example(["{٣}"])
@example(["{" + "9" * 5000 + "}"])
@example(["{0}", "a\r\n\t", "{2}"])
@given(PIECES)
@ANY
def test_any_infill(model, home, pieces):
    infill = "".join(pieces)
    done = call("sample.py", f"--init_from={model}", "--steps=1", f"--infill={infill}", cwd=home)
    if done.returncode:
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.split("\n")) == 2, done.stderr
    elif infill and not re.search("[\ud800-\udfff]", infill):  # GPT-2's tokens have none of these
        assert kept(re.split(r"\{\d+\}", infill), done.stdout[:-1])


@example("", "")
@example("a{3}", "{}")
@given(TEXTS, TEXTS)
@ANY
def test_any_prefix_and_suffix(home, prefix, suffix):
    done = call("sample.py", "--init_from=score", "--steps=1", f"--prefix={prefix}", f"--suffix={suffix}", cwd=home)
    if done.returncode:
        assert set(prefix + suffix) - set(VOCAB) or len(prefix + suffix) >= 32
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.split("\n")) == 2, done.stderr
    else:
        assert len(done.stdout[:-1]) == 32 and kept([prefix, suffix], done.stdout[:-1])


# ---------------------------------------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judges(home):
    """Two random GPT-2s in home, without tokenizers: one that knows the models' characters and one GPT-2's tokens."""
    transformers = pytest.importorskip("transformers")
    for name, vocab_size in ("judge", len(VOCAB)), ("judge_bpe", 50257):
        torch.manual_seed(5)
        config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                         initializer_range=0.5, bos_token_id=0, eos_token_id=0)  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(home / name)
    return transformers


def told(done):
    line = done.stderr.splitlines()[-1]
    found = re.fullmatch(r"perplexity ([\d.]+) by (\S+), unigram entropy ([\d.]+) nats .*", line)
    return float(found[1]), found[2], float(found[3])


@pytest.mark.parametrize("model, judge", [("score", "judge"), pytest.param("bpe", "judge_bpe", marks=needs_bpe)])
def test_perplexity_and_entropy_from_their_definitions(model, judge, home, judges):
    args = f"--out_dir={model}", "--steps=2", "--num_samples=3", f"--judge={judge}"
    done = works(call("sample.py", *args, cwd=home))
    texts = done.stdout[:-1].split(LINE)
    network = judges.GPT2LMHeadModel.from_pretrained(home / judge).double()
    meta = GPT2 if model == "bpe" else {"tokenizer": "char", "vocab_size": len(VOCAB), "vocab": VOCAB}
    nats = []
    for text in texts:
        tokens = prepare.Tokenizer(meta).encode(text)[:24]
        for i in range(1, len(tokens)):  # a token at a time
            logits = network(torch.tensor([tokens[:i]])).logits[0, -1]
            nats.append((logits.logsumexp(0) - logits[tokens[i]]).item())
    seen = told(done)
    assert seen[0] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3, abs=0.006)
    assert seen[1] == judge and seen[0] > 1.2 * network.config.vocab_size ** 0.5
    if model == "score":
        shares = [[text.count(c) / len(text) for c in set(text)] for text in texts]
        assert seen[2] == pytest.approx(-sum(p * math.log(p) for row in shares for p in row) / 3, abs=0.006)


@needs_bpe
def test_a_judge_reads_with_its_own_tokenizer(home, judges):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0} | {c: i + 1 for i, c in enumerate(reversed(VOCAB[:-1]))}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    judges.GPT2LMHeadModel.from_pretrained(home / "judge").save_pretrained(home / "own")
    judges.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(home / "own")
    judge, encode = sample.load_judge(str(home / "own"), torch.device("cpu"), prepare.Tokenizer(GPT2))
    assert encode("ab日x") == [words["a"], words["b"], 0 if "日" not in words else words["日"], words["x"]]
    assert sample.perplexity(judge, encode, ["a", ""]) is math.nan
    network, tokens = judges.GPT2LMHeadModel.from_pretrained(home / "judge"), torch.tensor([encode("hello")])
    expected = network(tokens, labels=tokens).loss.exp().item()
    assert sample.perplexity(judge, encode, ["hello"]) == pytest.approx(expected, rel=1e-4)


def test_unigram_entropy_of_known_texts():
    x = torch.tensor([[3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 6, 6]])
    assert sample.unigram_entropy(x) == pytest.approx((0 + math.log(4) + math.log(2)) / 3, abs=1e-6)


def test_no_judge(home, judges, monkeypatch):
    monkeypatch.setattr(judges.utils.hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    ask = lambda judge: call("sample.py", "--out_dir=score", f"--judge={judge}", cwd=home)
    complains(ask("no/judge"), "sample.py", "'no/judge'", "causal language model")
    complains(ask("published"), "sample.py", "'published'", "causal language model")
    complains(ask("judge_bpe"), "sample.py", "'judge_bpe'", "no tokenizer", "50257", f"{len(VOCAB)}")
    (home / "coded").mkdir()
    code = {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}
    (home / "coded/config.json").write_text(json.dumps({"model_type": "x", "auto_map": code}))
    (home / "coded/c.py").write_text("open('exploded', 'w')")
    complains(ask("coded"), "sample.py", "'coded'")
    (home / "pickled").mkdir()
    config = json.loads((home / "judge/config.json").read_text())
    (home / "pickled/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    torch.save({"transformer.wte.weight": Bomb()}, home / "pickled/pytorch_model.bin")
    complains(ask("pickled"), "sample.py", "'pickled'", "causal language model")
    assert not (home / "exploded").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    complains(ask("judge"), "sample.py", "pip install -e '.[judge]'")


# -------------------------------------------------------------------------------------------------------- the terminal


@given(st.text(st.sampled_from("ab \t\n\x1b\r\x07é日") | st.characters(), max_size=60), st.integers(2, 20))
@ANY
def test_rows_fit_and_hold_the_text(text, width):
    rows = sample.wrap(text, width)
    cells = lambda row: sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in row)
    assert all(cells(row) <= width and (row.isprintable() or not row) for row in rows)
    assert "".join(rows) == "".join(c if c.isprintable() else "?" for c in text.expandtabs(4) if c != "\n")
    assert len(rows) > text.count("\n")


class Terminal:
    """sample.py in a pseudo-terminal of 12 rows of 20 characters, and all that it wrote there."""

    def __init__(self, home, *args):
        main, side = pty.openpty()
        ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 20, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--watch", *args], cwd=home, env=env,
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


ENTER, LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"


def screens_of(shown):
    """The frames, each the text on its rows put together and its last row, which says the step."""
    frames = [frame.split("\r\n") for frame in shown.split("\033[H")[1:]]
    assert all(len(frame) == 12 and all(row.startswith("\033[K") for row in frame) for frame in frames)
    return [("".join(row[3:] for row in frame[:-1]), frame[-1][3:]) for frame in frames]


def test_watching_shows_masks_turn_into_text(home):
    terminal = Terminal(home, "--out_dir=score", "--steps=30", "--infill=日ab{12}cd{9}\n{2}")
    terminal.read(until=ENTER)
    started = time.monotonic()
    assert terminal.end() == 0 and time.monotonic() - started > 5
    before, rest = terminal.written.split(ENTER)
    shown, after = rest.split(LEAVE)
    assert before == ""
    screens, steps = zip(*screens_of(shown))
    assert 20 < len(screens) <= 31 and steps[0] == "step 0 of 30" and steps[-1] == "step 30 of 30"
    assert screens[-1] == "".join(sample.wrap(after.replace("\r\n", "\n"), 20))
    dots = [screen.count("·") for screen in screens]
    assert dots[0] == 23 and dots[-1] == 0 and sorted(dots, reverse=True) == dots and len(set(dots)) > 8
    assert screens[0] == "日ab" + 12 * "·" + "cd" + 11 * "·" and all(screen.startswith("日ab") for screen in screens)


@pytest.mark.parametrize("end, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_the_terminal_as_it_was(end, status, home):
    """Under the uniform graph, where there are no masks and text changes."""
    terminal = Terminal(home, "--out_dir=uniform", "--steps=64", "--prefix=日ab")
    terminal.read(until="step 9 of")
    terminal.process.send_signal(end)
    assert terminal.end() == status
    assert terminal.written.endswith(LEAVE) and "Traceback" not in terminal.written
    screens, steps = zip(*screens_of(terminal.written.split(ENTER)[1].split(LEAVE)[0].removesuffix("^C")))
    assert len(set(screens)) > 3 and all(screen.startswith("日ab") and "·" not in screen for screen in screens)


def test_watching_needs_a_terminal(home):
    assert "\033" not in write(home, "--out_dir=score", "--steps=2", "--watch")


def test_interrupted_sampling_ends_quietly(home, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.sample", stop)
    done = call("sample.py", "--out_dir=score", cwd=home)
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr


def test_help_fits_a_screen(home):
    done = works(call("sample.py", "--help", cwd=home))
    assert len(done.stdout.splitlines()) <= 40 and max(map(len, done.stdout.splitlines())) <= 110
    assert done.stdout.count("Example: python sample.py") == 1
